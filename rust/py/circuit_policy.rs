//! `CircuitPolicy`: when a breaker opens, and how it closes again.

use pyo3::prelude::*;
use pyo3::types::{PyDict, PyString, PyTuple};

use crate::core::breaker::{Policy, SlowCall, Trip};
use crate::core::tally::Window;
use crate::core::time::Nanos;

use super::convert::{count, duration, number};
use super::errors::ConfigurationError;

const FAILURE_THRESHOLD: i64 = 5;
const MINIMUM_CALLS: u32 = 10;
const RESET_TIMEOUT: f64 = 30.0;
const HALF_OPEN_MAX_CALLS: i64 = 1;
const PROBE_TIMEOUT: f64 = 60.0;

/// The attributes, named as the arguments that make the same policy again.
const ATTRIBUTES: [&str; 10] = [
    "failure_threshold",
    "failure_rate",
    "calls",
    "seconds",
    "minimum_calls",
    "slow_call_duration",
    "slow_call_rate",
    "reset_timeout",
    "half_open_max_calls",
    "probe_timeout",
];

/// An argument that may be left out.
pub(super) type Given<'a, 'py> = Option<&'a Bound<'py, PyAny>>;

/// When a breaker opens, and how it closes again.
#[pyclass(frozen, eq, module = "cano", name = "CircuitPolicy")]
#[derive(PartialEq)]
pub(super) struct PyCircuitPolicy(pub(super) Policy);

#[pymethods]
impl PyCircuitPolicy {
    #[new]
    #[pyo3(
        signature = (failure_threshold=None, reset_timeout=None, half_open_max_calls=None, *, probe_timeout=None),
        text_signature = "(failure_threshold=5, reset_timeout=30.0, half_open_max_calls=1, *, probe_timeout=60.0)"
    )]
    pub(super) fn new(
        failure_threshold: Given<'_, '_>,
        reset_timeout: Given<'_, '_>,
        half_open_max_calls: Given<'_, '_>,
        probe_timeout: Given<'_, '_>,
    ) -> PyResult<Self> {
        let threshold = failure_threshold.map_or(Ok(FAILURE_THRESHOLD), |value| count("failure_threshold", value))?;
        let trip = Trip::consecutive_failures(threshold)?;
        Self::around(trip, reset_timeout, half_open_max_calls, probe_timeout)
    }

    #[staticmethod]
    #[pyo3(
        signature = (
            failure_rate=None, *, calls=None, seconds=None, minimum_calls=None, slow_call_duration=None,
            slow_call_rate=None, reset_timeout=None, half_open_max_calls=None, probe_timeout=None
        ),
        text_signature = "(failure_rate=None, *, calls=None, seconds=None, minimum_calls=None, \
                          slow_call_duration=None, slow_call_rate=None, reset_timeout=30.0, half_open_max_calls=1, \
                          probe_timeout=60.0)"
    )]
    #[allow(clippy::too_many_arguments, reason = "the keywords of a Python signature")]
    fn rate(
        failure_rate: Given<'_, '_>,
        calls: Given<'_, '_>,
        seconds: Given<'_, '_>,
        minimum_calls: Given<'_, '_>,
        slow_call_duration: Given<'_, '_>,
        slow_call_rate: Given<'_, '_>,
        reset_timeout: Given<'_, '_>,
        half_open_max_calls: Given<'_, '_>,
        probe_timeout: Given<'_, '_>,
    ) -> PyResult<Self> {
        let window = window(calls, seconds)?;
        let minimum = match window {
            Window::Calls(calls) => MINIMUM_CALLS.min(calls),
            Window::Time(_) => MINIMUM_CALLS,
        };
        let trip = Trip::rate(
            window,
            minimum_calls.map_or(Ok(minimum.into()), |value| count("minimum_calls", value))?,
            failure_rate.map(|value| number("failure_rate", value)).transpose()?,
            slow_call(slow_call_duration, slow_call_rate)?,
        )?;
        Self::around(trip, reset_timeout, half_open_max_calls, probe_timeout)
    }

    #[getter]
    fn failure_threshold(&self) -> Option<u32> {
        match self.0.trip {
            Trip::ConsecutiveFailures { threshold } => Some(threshold),
            Trip::Rate { .. } => None,
        }
    }

    #[getter]
    fn failure_rate(&self) -> Option<f64> {
        match self.0.trip {
            Trip::ConsecutiveFailures { .. } => None,
            Trip::Rate { failure_rate, .. } => failure_rate,
        }
    }

    #[getter]
    fn calls(&self) -> Option<u32> {
        match self.window()? {
            Window::Calls(calls) => Some(calls),
            Window::Time(_) => None,
        }
    }

    #[getter]
    fn seconds(&self) -> Option<f64> {
        match self.window()? {
            Window::Calls(_) => None,
            Window::Time(duration) => Some(duration.as_seconds()),
        }
    }

    #[getter]
    fn minimum_calls(&self) -> Option<u32> {
        match self.0.trip {
            Trip::ConsecutiveFailures { .. } => None,
            Trip::Rate { minimum_calls, .. } => Some(minimum_calls),
        }
    }

    #[getter]
    fn slow_call_duration(&self) -> Option<f64> {
        self.slow_call().map(|slow| slow.duration.as_seconds())
    }

    #[getter]
    fn slow_call_rate(&self) -> Option<f64> {
        self.slow_call().map(|slow| slow.rate)
    }

    #[getter]
    fn reset_timeout(&self) -> f64 {
        self.0.reset_timeout.as_seconds()
    }

    #[getter]
    fn half_open_max_calls(&self) -> u32 {
        self.0.half_open_max_calls
    }

    #[getter]
    fn probe_timeout(&self) -> f64 {
        self.0.probe_timeout.as_seconds()
    }

    fn __repr__(slf: &Bound<'_, Self>) -> PyResult<String> {
        let of = if slf.get().window().is_some() { ".rate" } else { "" };
        let arguments = Self::arguments(slf)?.iter().map(|(name, value)| Ok(format!("{name}={}", value.repr()?)));
        Ok(format!("CircuitPolicy{of}({})", arguments.collect::<PyResult<Vec<_>>>()?.join(", ")))
    }

    fn __hash__(slf: &Bound<'_, Self>) -> PyResult<isize> {
        PyString::new(slf.py(), &Self::__repr__(slf)?).hash()
    }

    /// What made it, for copies and pickles.
    fn __reduce__<'py>(slf: &Bound<'py, Self>) -> PyResult<(Bound<'py, PyAny>, Bound<'py, PyTuple>)> {
        let (py, class, arguments) = (slf.py(), slf.get_type(), Self::arguments(slf)?);
        if slf.get().window().is_some() {
            let make = py.import("operator")?.getattr("methodcaller")?.call(("rate",), Some(&arguments))?;
            return Ok((make, (class,).into_pyobject(py)?));
        }
        let make = py.import("functools")?.getattr("partial")?.call((class,), Some(&arguments))?;
        Ok((make, PyTuple::empty(py)))
    }
}

impl PyCircuitPolicy {
    fn around(
        trip: Trip,
        reset_timeout: Given<'_, '_>,
        half_open_max_calls: Given<'_, '_>,
        probe_timeout: Given<'_, '_>,
    ) -> PyResult<Self> {
        let or = |given: Given<'_, '_>, name: &str, seconds: f64| {
            given.map_or_else(|| Ok(Nanos::from_seconds(name, seconds)?), |value| duration(name, value))
        };
        Ok(Self(Policy::new(
            trip,
            or(reset_timeout, "reset_timeout", RESET_TIMEOUT)?,
            half_open_max_calls.map_or(Ok(HALF_OPEN_MAX_CALLS), |value| count("half_open_max_calls", value))?,
            or(probe_timeout, "probe_timeout", PROBE_TIMEOUT)?,
        )?))
    }

    fn window(&self) -> Option<Window> {
        match self.0.trip {
            Trip::ConsecutiveFailures { .. } => None,
            Trip::Rate { window, .. } => Some(window),
        }
    }

    fn slow_call(&self) -> Option<SlowCall> {
        match self.0.trip {
            Trip::ConsecutiveFailures { .. } => None,
            Trip::Rate { slow_call, .. } => slow_call,
        }
    }

    fn arguments<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyDict>> {
        let arguments = PyDict::new(slf.py());
        for name in ATTRIBUTES {
            let value = slf.getattr(name)?;
            if !value.is_none() {
                arguments.set_item(name, value)?;
            }
        }
        Ok(arguments)
    }
}

fn window(calls: Given<'_, '_>, seconds: Given<'_, '_>) -> PyResult<Window> {
    match (calls, seconds) {
        (Some(calls), None) => Ok(Window::calls(count("calls", calls)?)?),
        (None, Some(seconds)) => Ok(Window::time(duration("seconds", seconds)?)?),
        (None, None) => Err(ConfigurationError::new_err("a rate needs a window: calls or seconds, got neither")),
        (Some(_), Some(_)) => Err(ConfigurationError::new_err("a rate has one window: calls or seconds, got both")),
    }
}

fn slow_call(duration_: Given<'_, '_>, rate: Given<'_, '_>) -> PyResult<Option<SlowCall>> {
    match (duration_, rate) {
        (None, None) => Ok(None),
        (Some(slow), Some(rate)) => {
            let slow = duration("slow_call_duration", slow)?;
            Ok(Some(SlowCall::new(slow, number("slow_call_rate", rate)?)?))
        }
        (Some(_), None) => Err(ConfigurationError::new_err("slow_call_duration needs slow_call_rate, got None")),
        (None, Some(_)) => Err(ConfigurationError::new_err("slow_call_rate needs slow_call_duration, got None")),
    }
}
