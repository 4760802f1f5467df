//! How what a store has done comes back to those who await it: as futures of their loops.
//!
//! ```text
//! the loop's thread        a thread of the store
//! Waiter::new, submit  ->  the work, without Python
//!                          deliver: for each loop one Delivery, one call_soon_threadsafe
//! Delivery.__call__    <-
//! ```
//!
//! Everything that came of one commit reaches a loop in one call. A future that is done already was cancelled: it is left
//! alone, and what it claimed is given back. So it is where the loop is closed before it has run the delivery.

use std::mem;
use std::sync::{Mutex, PoisonError};

use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::PyList;
use pyo3::{PyTraverseError, PyVisit};

use crate::core::checkpoint::Row;
use crate::core::claim::{Fence, RunSummary};
use crate::store::error::StoreError;

use super::asyncio::Asyncio;
use super::checkpoint_store::{store_error, summary_in_python};
use super::row::PyRow;

/// What came of what a store was asked.
pub(super) enum Outcome {
    Done,
    Claimed(Fence),
    Rows(Vec<Row>),
    Runs(Vec<RunSummary>),
    Failed(StoreError),
}

impl Outcome {
    pub(super) fn into_python(self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        match self {
            Self::Done => Ok(py.None()),
            Self::Claimed(Fence(fence)) => Ok(fence.into_pyobject(py)?.into_any().unbind()),
            Self::Rows(rows) => {
                let rows: Vec<_> = rows.into_iter().map(|row| Py::new(py, PyRow(row))).collect::<PyResult<_>>()?;
                Ok(PyList::new(py, rows)?.into_any().unbind())
            }
            Self::Runs(runs) => {
                let runs: Vec<_> = runs.iter().map(|run| summary_in_python(py, run)).collect::<PyResult<_>>()?;
                Ok(PyList::new(py, runs)?.into_any().unbind())
            }
            Self::Failed(error) => Err(store_error(py, error)),
        }
    }
}

/// A future that is done already; its loop is the running one.
pub(super) fn done<'py>(py: Python<'py>, value: impl IntoPyObject<'py>) -> PyResult<Bound<'py, PyAny>> {
    let event_loop = Asyncio::of(py)?.running_loop(py)?;
    let future = event_loop.call_method0(intern!(py, "create_future"))?;
    future.call_method1(intern!(py, "set_result"), (value,))?;
    Ok(future)
}

/// Gives a claim back that nobody has heard of.
pub(super) type GiveBack = Box<dyn FnOnce(Fence) + Send>;

/// A future that a loop awaits and a thread of a store completes.
pub(super) struct Waiter {
    event_loop: Py<PyAny>,
    future: Py<PyAny>,
    /// Whether the loop is on a virtual clock, which must not jump meanwhile.
    is_held: bool,
    give_back: Option<GiveBack>,
}

impl Waiter {
    /// A future of the running loop, and what completes it.
    pub(super) fn new(py: Python<'_>, give_back: Option<GiveBack>) -> PyResult<(Self, Bound<'_, PyAny>)> {
        let event_loop = Asyncio::of(py)?.running_loop(py)?;
        let future = event_loop.call_method0(intern!(py, "create_future"))?;
        let is_held = hold(&event_loop, 1)?;
        Ok((Self { event_loop: event_loop.unbind(), future: future.clone().unbind(), is_held, give_back }, future))
    }

    /// Undoes `new` where the future was not handed to anybody.
    pub(super) fn unsent(py: Python<'_>) -> PyResult<()> {
        hold(&Asyncio::of(py)?.running_loop(py)?, -1).map(drop)
    }

    fn complete(mut self, py: Python<'_>, outcome: Outcome) -> PyResult<()> {
        if self.is_held {
            hold(self.event_loop.bind(py), -1)?;
        }
        let future = self.future.bind(py);
        if future.call_method0(intern!(py, "done"))?.is_truthy()? {
            self.abandon(&outcome);
            return Ok(());
        }
        match outcome.into_python(py) {
            Ok(value) => future.call_method1(intern!(py, "set_result"), (value,)),
            Err(error) => future.call_method1(intern!(py, "set_exception"), (error,)),
        }
        .map(drop)
    }

    fn abandon(&mut self, outcome: &Outcome) {
        if let (Outcome::Claimed(fence), Some(give_back)) = (outcome, self.give_back.take()) {
            give_back(*fence);
        }
    }
}

/// Keeps the clock of a `cano.testing.VirtualClockLoop` on real time, as `cano.testing.real_time` does.
fn hold(event_loop: &Bound<'_, PyAny>, change: i64) -> PyResult<bool> {
    let holds = intern!(event_loop.py(), "holds");
    let Some(count) = event_loop.getattr_opt(holds)? else { return Ok(false) };
    event_loop.setattr(holds, count.extract::<i64>()? + change)?;
    Ok(true)
}

/// Hands outcomes to their loops; called in a thread of the store.
pub(super) fn deliver(outcomes: Vec<(Waiter, Outcome)>) {
    if outcomes.is_empty() {
        return;
    }
    let mut outcomes = Some(outcomes);
    Python::try_attach(|py| {
        for (event_loop, arrived) in by_loop(py, outcomes.take().unwrap_or_default()) {
            if let Err(error) = send(event_loop.bind(py), arrived) {
                error.write_unraisable(py, None);
            }
        }
    });
    mem::forget(outcomes); // an interpreter that is ending takes nothing back
}

type Arrived = Vec<(Waiter, Outcome)>;

fn by_loop(py: Python<'_>, outcomes: Arrived) -> Vec<(Py<PyAny>, Arrived)> {
    let mut loops: Vec<(Py<PyAny>, Arrived)> = Vec::new();
    for (waiter, outcome) in outcomes {
        match loops.iter_mut().find(|(event_loop, _)| event_loop.is(&waiter.event_loop)) {
            Some((_, arrived)) => arrived.push((waiter, outcome)),
            None => loops.push((waiter.event_loop.clone_ref(py), vec![(waiter, outcome)])),
        }
    }
    loops
}

fn send(event_loop: &Bound<'_, PyAny>, arrived: Arrived) -> PyResult<()> {
    let py = event_loop.py();
    let delivery = Bound::new(py, Delivery { arrived: Mutex::new(arrived) })?;
    let sent = event_loop.call_method1(intern!(py, "call_soon_threadsafe"), (&delivery,));
    match sent {
        Err(error) if !event_loop.call_method0(intern!(py, "is_closed"))?.is_truthy()? => Err(error),
        Ok(_) | Err(_) => Ok(()),
    }
}

/// Outcomes on their way to one loop.
#[pyclass(frozen, module = "cano._core")]
struct Delivery {
    arrived: Mutex<Arrived>,
}

impl Delivery {
    fn take(&self) -> Arrived {
        mem::take(&mut *self.arrived.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Drop for Delivery {
    /// A loop that is closed runs nothing of what it has still to run.
    fn drop(&mut self) {
        for (mut waiter, outcome) in self.take() {
            waiter.abandon(&outcome);
        }
    }
}

#[pymethods]
impl Delivery {
    fn __call__(&self, py: Python<'_>) {
        for (waiter, outcome) in self.take() {
            if let Err(error) = waiter.complete(py, outcome) {
                error.write_unraisable(py, None);
            }
        }
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        let Ok(arrived) = self.arrived.try_lock() else { return Ok(()) };
        arrived.iter().try_for_each(|(waiter, _)| {
            visit.call(&waiter.event_loop)?;
            visit.call(&waiter.future)
        })
    }
}
