//! From Python's numbers to the core's: one converter for each kind, which names the parameter it refuses.

use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::{PyBool, PyBoolMethods, PyBytes, PyDelta, PyFloat, PyInt, PyString};

use crate::core::time::Nanos;

use super::errors::{ConfigurationError, check_text, show};

pub(super) fn refused(name: &str, wanted: &str, value: &Bound<'_, PyAny>) -> PyErr {
    match (show(value), value.get_type().name()) {
        (Ok(text), Ok(class)) => ConfigurationError::new_err(format!("{name} must be {wanted}, got {text} ({class})")),
        (Err(error), _) | (_, Err(error)) => error,
    }
}

/// A float, or an int that is no bool.
pub(super) fn number(name: &str, value: &Bound<'_, PyAny>) -> PyResult<f64> {
    let is_number =
        value.is_instance_of::<PyFloat>() || (value.is_instance_of::<PyInt>() && !value.is_instance_of::<PyBool>());
    if !is_number {
        return Err(refused(name, "a number", value));
    }
    value.extract().map_err(|_| refused(name, "a number in the range of a float", value))
}

/// An int that is no bool.
pub(super) fn count(name: &str, value: &Bound<'_, PyAny>) -> PyResult<i64> {
    if !value.is_instance_of::<PyInt>() || value.is_instance_of::<PyBool>() {
        return Err(refused(name, "an int", value));
    }
    value.extract().map_err(|_| refused(name, "an int of at most 64 bits", value))
}

/// An int that is no bool, from 0; one beyond 64 bits is as high as the highest.
pub(super) fn cost(value: &Bound<'_, PyAny>) -> PyResult<u64> {
    let is_bool = value.is_instance_of::<PyBool>();
    match value.extract() {
        Ok(cost) if !is_bool => Ok(cost),
        _ if is_bool || !value.is_instance_of::<PyInt>() => Err(refused("cost", "an int", value)),
        _ if value.gt(0)? => Ok(u64::MAX),
        _ => Err(refused("cost", "at least 0", value)),
    }
}

/// An int that is no bool, within bounds that may be beyond 64 bits signed.
pub(super) fn natural(name: &str, value: &Bound<'_, PyAny>, least: u64, most: u64) -> PyResult<u64> {
    if !value.is_instance_of::<PyInt>() || value.is_instance_of::<PyBool>() {
        return Err(refused(name, "an int", value));
    }
    match value.extract() {
        Ok(number) if (least..=most).contains(&number) => Ok(number),
        _ => Err(refused(name, &format!("at least {least} and at most {most}"), value)),
    }
}

/// A text that UTF-8 can hold.
pub(super) fn plain_text(name: &str, value: &Bound<'_, PyAny>) -> PyResult<String> {
    if !value.is_instance_of::<PyString>() {
        return Err(refused(name, "a text", value));
    }
    value.extract().map_err(|_| refused(name, "a text that UTF-8 can hold", value))
}

/// Bytes, copied.
pub(super) fn bytes(name: &str, value: &Bound<'_, PyAny>) -> PyResult<Vec<u8>> {
    value.cast::<PyBytes>().map(|bytes| bytes.as_bytes().to_vec()).map_err(|_| refused(name, "bytes", value))
}

/// True or False.
pub(super) fn flag(name: &str, value: &Bound<'_, PyAny>) -> PyResult<bool> {
    value.cast::<PyBool>().map(PyBoolMethods::is_true).map_err(|_| refused(name, "a bool", value))
}

/// A printable text of 1 to `limit` bytes.
pub(super) fn text(name: &str, value: &Bound<'_, PyAny>, limit: usize) -> PyResult<String> {
    check_text(name, value, limit)?;
    value.extract()
}

/// A duration: seconds as a number, or a timedelta.
pub(super) fn duration(name: &str, value: &Bound<'_, PyAny>) -> PyResult<Nanos> {
    let seconds = if value.is_instance_of::<PyDelta>() {
        value.call_method0("total_seconds")?.extract()?
    } else {
        number(name, value).map_err(|_| refused(name, "seconds as a number or a timedelta", value))?
    };
    Ok(Nanos::from_seconds(name, seconds)?)
}

/// The seconds of a duration, after the same checks as everywhere; None stays None.
#[pyfunction]
#[pyo3(signature = (name, value, /))]
pub(super) fn seconds(name: &str, value: Option<&Bound<'_, PyAny>>) -> PyResult<Option<f64>> {
    value.map(|value| duration(name, value).map(Nanos::as_seconds)).transpose()
}

/// Whether `hash()` accepts the value, which a list, or a tuple with one, it does not; what else it raises is raised.
pub(super) fn is_hashable(value: &Bound<'_, PyAny>) -> PyResult<bool> {
    match value.hash() {
        Ok(_) => Ok(true),
        Err(error) if error.is_instance_of::<PyTypeError>(value.py()) => Ok(false),
        Err(error) => Err(error),
    }
}
