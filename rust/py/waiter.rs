//! `Waiter`: the future that a run yields while it waits for its split.
//!
//! A future of asyncio's calls back in the loop's next turn. The last branch of a split ends inside a callback of the loop as
//! it is, so the parent may go on at once, within that callback, where no task is the current one. Whatever ends the wait
//! from within somebody's step (a cancel) takes the next turn, as with any future.

use std::cell::Cell;
use std::mem;

use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyString};
use pyo3::{PyTraverseError, PyVisit, intern};

use super::branch::{cancelled_error, copy_context, within};
use super::run::GilCell;

enum Status {
    Pending,
    Done,
    Cancelled(Option<Py<PyAny>>),
}

struct State {
    is_blocking: bool,
    status: Status,
    callbacks: Vec<(Py<PyAny>, Py<PyAny>)>,
}

thread_local! {
    /// How many parents go on inside one another's last branches.
    static DEPTH: Cell<u32> = const { Cell::new(0) };
}

/// Parents nested deeper than this go on in the loop's next turn, so that nesting uses no stack.
const DEPTH_LIMIT: u32 = 16;

#[pyclass(frozen, weakref, module = "cano._core")]
pub(super) struct Waiter {
    event_loop: Py<PyAny>,
    state: GilCell<State>,
}

impl Waiter {
    pub(super) fn new(event_loop: Py<PyAny>) -> Self {
        Self {
            event_loop,
            state: GilCell::new(State { is_blocking: true, status: Status::Pending, callbacks: Vec::new() }),
        }
    }

    /// Ends the wait; nothing happens if a cancel has done so. `at_once`: inside this call.
    pub(super) fn resolve(slf: &Bound<'_, Self>, at_once: bool) -> PyResult<()> {
        let py = slf.py();
        let callbacks = slf.get().end(py, Status::Done);
        if !at_once || DEPTH.get() >= DEPTH_LIMIT {
            return Self::schedule(slf, callbacks);
        }
        DEPTH.set(DEPTH.get() + 1);
        let mut outcome = Ok(());
        for (callback, context) in callbacks {
            let came = within(context.bind(py), || callback.bind(py).call1((slf,)).map(drop));
            outcome = outcome.and(match came {
                Some(came) => came,
                None => Self::schedule(slf, vec![(callback, context)]),
            });
        }
        DEPTH.set(DEPTH.get() - 1);
        outcome
    }

    /// What was waiting for this end; nothing if there was one before.
    fn end(&self, py: Python<'_>, status: Status) -> Vec<(Py<PyAny>, Py<PyAny>)> {
        self.state.with(py, |state| {
            if !matches!(state.status, Status::Pending) {
                return Vec::new();
            }
            state.status = status;
            mem::take(&mut state.callbacks)
        })
    }

    fn schedule(slf: &Bound<'_, Self>, callbacks: Vec<(Py<PyAny>, Py<PyAny>)>) -> PyResult<()> {
        let py = slf.py();
        for (callback, context) in callbacks {
            let options = PyDict::new(py);
            options.set_item(intern!(py, "context"), context)?;
            slf.get().event_loop.bind(py).call_method(intern!(py, "call_soon"), (callback, slf), Some(&options))?;
        }
        Ok(())
    }
}

#[pymethods]
impl Waiter {
    #[getter]
    fn _asyncio_future_blocking(&self, py: Python<'_>) -> bool {
        self.state.with(py, |state| state.is_blocking)
    }

    #[setter(_asyncio_future_blocking)]
    fn set_blocking(&self, py: Python<'_>, is_blocking: bool) {
        self.state.with(py, |state| state.is_blocking = is_blocking);
    }

    fn get_loop(&self, py: Python<'_>) -> Py<PyAny> {
        self.event_loop.clone_ref(py)
    }

    fn done(&self, py: Python<'_>) -> bool {
        self.state.with(py, |state| !matches!(state.status, Status::Pending))
    }

    fn cancelled(&self, py: Python<'_>) -> bool {
        self.state.with(py, |state| matches!(state.status, Status::Cancelled(_)))
    }

    fn result(&self, py: Python<'_>) -> PyResult<()> {
        let message = self.state.with(py, |state| match &state.status {
            Status::Pending => Err(PyRuntimeError::new_err("the split is not done")),
            Status::Done => Ok(None),
            Status::Cancelled(message) => Ok(Some(message.as_ref().map(|message| message.clone_ref(py)))),
        })?;
        message.map_or(Ok(()), |message| Err(cancelled_error(py, message)))
    }

    #[pyo3(signature = (msg=None))]
    fn cancel(slf: &Bound<'_, Self>, msg: Option<Py<PyAny>>) -> PyResult<bool> {
        if slf.get().done(slf.py()) {
            return Ok(false);
        }
        let callbacks = slf.get().end(slf.py(), Status::Cancelled(msg));
        Self::schedule(slf, callbacks).map(|()| true)
    }

    #[pyo3(signature = (callback, /, *, context=None))]
    fn add_done_callback(slf: &Bound<'_, Self>, callback: Py<PyAny>, context: Option<Py<PyAny>>) -> PyResult<()> {
        let py = slf.py();
        let context = match context {
            Some(context) => context,
            None => copy_context(py)?.unbind(),
        };
        if slf.get().done(py) {
            return Self::schedule(slf, vec![(callback, context)]);
        }
        slf.get().state.with(py, |state| state.callbacks.push((callback, context)));
        Ok(())
    }

    #[pyo3(signature = (callback, /))]
    fn remove_done_callback(&self, callback: &Bound<'_, PyAny>) -> PyResult<usize> {
        let py = callback.py();
        let (mut kept, mut removed) = (Vec::new(), 0);
        for entry in self.state.with(py, |state| mem::take(&mut state.callbacks)) {
            if entry.0.bind(py).eq(callback)? {
                removed += 1;
            } else {
                kept.push(entry);
            }
        }
        self.state.with(py, |state| state.callbacks.splice(0..0, kept).for_each(drop));
        Ok(removed)
    }

    fn __repr__<'py>(&self, py: Python<'py>) -> Bound<'py, PyString> {
        let status = self.state.with(py, |state| match state.status {
            Status::Pending => "pending",
            Status::Done => "done",
            Status::Cancelled(_) => "cancelled",
        });
        PyString::new(py, &format!("<Waiter for a split, {status}>"))
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.event_loop)?;
        self.state
            .peek(|state| {
                if let Status::Cancelled(message) = &state.status {
                    visit.call(message)?;
                }
                for (callback, context) in &state.callbacks {
                    visit.call(callback)?;
                    visit.call(context)?;
                }
                Ok(())
            })
            .unwrap_or(Ok(()))
    }

    fn __clear__(&self) {
        drop(self.state.peek_mut(|state| mem::take(&mut state.callbacks)));
    }
}
