//! The `on_error` of a state: which state an error leads to.
//!
//! The first class in the MRO of the error's type that is a key decides, so the most specific key wins. Two kinds of errors
//! are looked at more closely. A mistake in the definition answers to cano's own classes alone: `Exception` must not hide it.
//! A `RetryExhaustedError` stands for the last failure, which decides unless a key names the error itself.

use pyo3::exceptions::{PyBaseException, PyException};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::PyType;
use pyo3::{PyTraverseError, PyVisit};

use super::errors::{
    CanoError, CheckpointError, ConfigurationError, InvalidTransitionError, ResourceError, RetryExhaustedError,
    UnknownStateError, WorkflowError,
};

/// The classes that are keys, none of them twice, and the index of the state that each leads to.
#[derive(Default)]
pub(super) struct OnError(Box<[(Py<PyType>, usize)]>);

impl OnError {
    pub(super) fn new(keys: Vec<(Py<PyType>, usize)>) -> Self {
        Self(keys.into_boxed_slice())
    }

    #[inline]
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The exception that a key matches, which is `error` or the failure behind it, and the state that the key leads to.
    pub(super) fn find<'py>(
        &self,
        error: &Bound<'py, PyBaseException>,
    ) -> Option<(Bound<'py, PyBaseException>, usize)> {
        let Some(failure) = last_failure(error) else {
            let (_, next) = self.first(error, is_mistake(error))?;
            return Some((error.clone(), next));
        };
        let own = self.first(error, true);
        if let Some((key, next)) = own
            && key.bind(error.py()).is_subclass_of::<RetryExhaustedError>().is_ok_and(|is_named| is_named)
        {
            return Some((error.clone(), next));
        }
        let behind = self.first(&failure, is_mistake(&failure)).map(|(_, next)| (failure, next));
        behind.or_else(|| own.map(|(_, next)| (error.clone(), next)))
    }

    /// The first class of the error's MRO that is a key, or that is one of cano's own and a key.
    fn first(&self, error: &Bound<'_, PyBaseException>, own_only: bool) -> Option<(&Py<PyType>, usize)> {
        let py = error.py();
        error.get_type().mro().iter().find_map(|class| {
            let (key, next) = self.0.iter().find(|(key, _)| class.is(key.bind(py)))?;
            let counts = !own_only || key.bind(py).is_subclass_of::<CanoError>().is_ok_and(|is_own| is_own);
            counts.then_some((key, *next))
        })
    }

    pub(super) fn traverse(&self, visit: &PyVisit<'_>) -> Result<(), PyTraverseError> {
        self.0.iter().try_for_each(|(class, _)| visit.call(class))
    }
}

/// The failure that a `RetryExhaustedError` stands for.
fn last_failure<'py>(error: &Bound<'py, PyBaseException>) -> Option<Bound<'py, PyBaseException>> {
    if !error.is_instance_of::<RetryExhaustedError>() {
        return None;
    }
    let cause = error.getattr(intern!(error.py(), "__cause__")).ok()?;
    if cause.is_instance_of::<PyException>() { cause.cast_into().ok() } else { None }
}

/// Whether the error says that the workflow itself is wrong.
fn is_mistake(error: &Bound<'_, PyBaseException>) -> bool {
    error.is_instance_of::<ConfigurationError>()
        || error.is_instance_of::<InvalidTransitionError>()
        || error.is_instance_of::<UnknownStateError>()
        || error.is_instance_of::<ResourceError>()
        || error.is_instance_of::<CheckpointError>()
        // Those derived from it, such as a failed join, are what happens to a workflow that is right.
        || error.is_exact_instance_of::<WorkflowError>()
}
