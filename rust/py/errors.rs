//! The Python exception classes, and the one place where a core error becomes one of them.

use pyo3::exceptions::PyException;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyString, PyType};

use crate::core::checkpoint::{Fault, Problem, RowError};
use crate::core::error::Error;

/// The classes of `python/cano/_errors.py`; they are written there, so that they pickle, type and document like Python.
mod python {
    pyo3::import_exception!(cano._errors, AttemptTimeoutError);
    pyo3::import_exception!(cano._errors, CircuitOpenError);
    pyo3::import_exception!(cano._errors, CanoError);
    pyo3::import_exception!(cano._errors, ConfigurationError);
    pyo3::import_exception!(cano._errors, CheckpointError);
    pyo3::import_exception!(cano._errors, CorruptRowError);
    pyo3::import_exception!(cano._errors, InvalidTransitionError);
    pyo3::import_exception!(cano._errors, KeyNotFoundError);
    pyo3::import_exception!(cano._errors, NonRetryable);
    pyo3::import_exception!(cano._errors, ResourceError);
    pyo3::import_exception!(cano._errors, RateLimitedError);
    pyo3::import_exception!(cano._errors, RetryAfter);
    pyo3::import_exception!(cano._errors, RetryExhaustedError);
    pyo3::import_exception!(cano._errors, RunClaimedError);
    pyo3::import_exception!(cano._errors, RunConflictError);
    pyo3::import_exception!(cano._errors, RunNotFoundError);
    pyo3::import_exception!(cano._errors, RunTooLargeError);
    pyo3::import_exception!(cano._errors, StoreFailedError);
    pyo3::import_exception!(cano._errors, StoreOpenError);
    pyo3::import_exception!(cano._errors, StoreTypeError);
    pyo3::import_exception!(cano._errors, TaskExecutionError);
    pyo3::import_exception!(cano._errors, UnknownStateError);
    pyo3::import_exception!(cano._errors, UnknownTierError);
    pyo3::import_exception!(cano._errors, WorkflowError);
    pyo3::import_exception!(cano._errors, WorkflowTimeoutError);
    pyo3::import_exception!(asyncio.exceptions, CancelledError);
}
pub(super) use python::*;

impl From<Error> for PyErr {
    fn from(error: Error) -> PyErr {
        ConfigurationError::new_err(error.to_string())
    }
}

impl From<RowError> for PyErr {
    fn from(error: RowError) -> PyErr {
        let facts = (error.to_string(), error.id.as_str().to_owned(), error.sequence);
        match error.problem {
            Problem::Fault(Fault::TooLong { .. }) => RunTooLargeError::new_err(facts),
            Problem::Fault(_) => CheckpointError::new_err(facts),
            Problem::Damaged { .. }
            | Problem::Format { .. }
            | Problem::Missing
            | Problem::Twice
            | Problem::OtherRun => CorruptRowError::new_err(facts),
        }
    }
}

/// A function or class of `cano._errors`, looked up once.
fn helper<'py>(py: Python<'py>, cell: &'static PyOnceLock<Py<PyAny>>, name: &str) -> PyResult<&'py Bound<'py, PyAny>> {
    cell.get_or_try_init(py, || Ok(py.import("cano._errors")?.getattr(name)?.unbind())).map(|found| found.bind(py))
}

/// The value as it may stand in a message.
pub(super) fn show(value: &Bound<'_, PyAny>) -> PyResult<String> {
    static SHOW: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    helper(value.py(), &SHOW, "show")?.call1((value,))?.extract()
}

/// Refuses what is no printable text of 1 to `limit` bytes.
pub(super) fn check_text(what: &str, text: &Bound<'_, PyAny>, limit: usize) -> PyResult<()> {
    static CHECK_TEXT: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    if !text.is_instance_of::<PyString>() {
        return Err(ConfigurationError::new_err(format!("{what} must be a text, got {}", show(text)?)));
    }
    helper(text.py(), &CHECK_TEXT, "check_text")?.call1((what, text, limit)).map(drop)
}

/// The name of a state in messages and keys.
pub(super) fn label(state: &Bound<'_, PyAny>) -> PyResult<String> {
    static LABEL: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    helper(state.py(), &LABEL, "label")?.call1((state,))?.extract()
}

/// The name of a state that nobody has checked, as it may stand in a message.
pub(super) fn shown_label(state: &Bound<'_, PyAny>) -> PyResult<String> {
    static SHOWN_LABEL: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    helper(state.py(), &SHOWN_LABEL, "shown_label")?.call1((state,))?.extract()
}

/// The name that somebody gave to something, if it is one.
pub(super) fn check_name<'py>(name: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyString>> {
    static CHECK_NAME: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    helper(name.py(), &CHECK_NAME, "check_name")?.call1((name,))?;
    Ok(name.cast::<PyString>()?.clone())
}

/// What `throw` was called with, also in its three-argument form, which Python before 3.12 uses.
pub(super) fn thrown<'py>(
    kind: Bound<'py, PyAny>,
    value: Option<Bound<'py, PyAny>>,
    traceback: Option<Bound<'py, PyAny>>,
) -> PyResult<Bound<'py, PyAny>> {
    let error = match value {
        Some(value) if value.is_instance(&kind)? => value,
        Some(value) => kind.call1((value,))?,
        None if kind.is_callable() && kind.is_instance_of::<PyType>() => kind.call0()?,
        None => kind,
    };
    if let Some(traceback) = traceback {
        error.setattr(intern!(error.py(), "__traceback__"), traceback)?;
    }
    Ok(error)
}

/// One `ConfigurationError` that lists every problem of `subject`.
pub(super) fn configuration(py: Python<'_>, subject: &str, problems: Vec<String>) -> PyErr {
    let made = py.get_type::<ConfigurationError>().call_method1("of", (subject, problems));
    match made {
        Ok(error) => PyErr::from_value(error),
        Err(error) => error,
    }
}

/// `JoinError` or `JoinTimeoutError` around the branches' own exceptions.
pub(super) fn join_error(
    py: Python<'_>,
    class: &str,
    message: String,
    exceptions: Vec<Py<PyAny>>,
    result: Bound<'_, PyAny>,
) -> PyErr {
    let made = py.import("cano._errors").and_then(|module| module.getattr(class)?.call1((message, exceptions, result)));
    match made {
        Ok(error) => PyErr::from_value(error),
        Err(error) => error,
    }
}

/// Turns the panic of a native extension (`pyo3_runtime`'s `PanicException`, a `BaseException`) into `TaskExecutionError`.
pub(super) fn from_panic(py: Python<'_>, error: PyErr) -> Result<PyErr, PyErr> {
    if error.is_instance_of::<PyException>(py) {
        return Err(error);
    }
    let class = error.get_type(py);
    let is_panic = class.name().is_ok_and(|name| name == "PanicException")
        && class.module().is_ok_and(|module| module == "pyo3_runtime");
    if !is_panic {
        return Err(error);
    }
    let told = TaskExecutionError::new_err(format!("panic: {}", error.value(py)));
    told.set_cause(py, Some(error));
    Ok(told)
}
