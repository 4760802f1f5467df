//! The windows of a stream.

use std::sync::{Mutex, PoisonError};

use pyo3::prelude::*;
use pyo3::types::PyString;

use crate::core::window::{Filling, Window};

use super::convert::{count, duration};
use super::definition::Rebuilt;

/// How a stream is cut into windows.
#[pyclass(frozen, eq, module = "cano", name = "StreamWindow")]
#[derive(PartialEq)]
pub(super) struct PyStreamWindow(Window);

#[pymethods]
impl PyStreamWindow {
    #[staticmethod]
    #[pyo3(name = "Count")]
    fn count(n: &Bound<'_, PyAny>) -> PyResult<Self> {
        Ok(Self(Window::count(count("n", n)?)?))
    }

    #[staticmethod]
    #[pyo3(name = "Duration")]
    fn duration(seconds: &Bound<'_, PyAny>) -> PyResult<Self> {
        Ok(Self(Window::duration(duration("seconds", seconds)?)?))
    }

    /// The first window of a stream that starts now; by duration or not.
    fn _open(&self, now: f64) -> PyFilling {
        PyFilling(Mutex::new(Filling::new(self.0, now)))
    }

    #[getter]
    fn _is_timed(&self) -> bool {
        matches!(self.0, Window::Duration(_))
    }

    fn __repr__(&self) -> String {
        match self.0 {
            Window::Count(n) => format!("StreamWindow.Count({n})"),
            Window::Duration(width) => format!("StreamWindow.Duration({:?})", width.as_seconds()),
        }
    }

    fn __hash__(&self, py: Python<'_>) -> PyResult<isize> {
        PyString::new(py, &self.__repr__()).hash()
    }

    /// Its constructor, for copies and pickles.
    fn __reduce__<'py>(slf: &Bound<'py, Self>) -> PyResult<Rebuilt<'py>> {
        let caller = slf.py().import("operator")?.getattr("methodcaller")?;
        let call = match slf.get().0 {
            Window::Count(n) => caller.call1(("Count", n))?,
            Window::Duration(width) => caller.call1(("Duration", width.as_seconds()))?,
        };
        Ok((call, (slf.get_type(),)))
    }
}

/// The window of a stream that is being filled.
#[pyclass(frozen, module = "cano._core", name = "Filling")]
pub(super) struct PyFilling(Mutex<Filling>);

impl PyFilling {
    fn with<R>(&self, access: impl FnOnce(&mut Filling) -> R) -> R {
        access(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

#[pymethods]
impl PyFilling {
    fn add(&self, now: f64) {
        self.with(|filling| filling.add(now));
    }

    fn is_due(&self, now: f64) -> bool {
        self.with(|filling| filling.is_due(now))
    }

    #[getter]
    fn end(&self) -> Option<f64> {
        self.with(|filling| filling.end())
    }

    fn hand_over(&self) {
        self.with(Filling::hand_over);
    }
}
