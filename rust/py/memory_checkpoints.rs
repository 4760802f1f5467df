//! `InMemoryCheckpointStore`: the core's ledger under a lock; everything is done when it is asked.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pyo3::prelude::*;
use pyo3::types::PyTuple;

use crate::core::checkpoint::WorkflowId;
use crate::core::claim::{Refusal, RunStatus};
use crate::core::ledger::{Ledger, Unwritten};
use crate::store::error::StoreError;

use super::checkpoint_store::{fence_of, filter_of, fresh_owner, limits_of, row_of, run_to_start, store_error};
use super::convert::flag;
use super::delivery::{Outcome, done};
use super::now::wall;
use super::row::id_of;

/// Keeps the logs of durable runs as long as the process lives.
#[pyclass(frozen, weakref, module = "cano", name = "InMemoryCheckpointStore")]
pub(super) struct PyMemoryCheckpoints {
    /// Shared by all owners; what the first of them has been told to allow, holds for all.
    ledger: Arc<Mutex<Ledger>>,
    #[pyo3(get)]
    owner: String,
    is_closed: Mutex<bool>,
}

impl PyMemoryCheckpoints {
    fn of(py: Python<'_>, ledger: Arc<Mutex<Ledger>>) -> PyResult<Self> {
        Ok(Self { ledger, owner: fresh_owner(py)?, is_closed: Mutex::new(false) })
    }

    /// What the ledger answers, as a future that is done; a store that is closed raises at once.
    fn ask<'py>(
        &self,
        py: Python<'py>,
        question: impl FnOnce(&mut Ledger) -> Result<Outcome, StoreError>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let is_closed = *lock(&self.is_closed);
        let answer = if is_closed { Err(StoreError::Closed) } else { question(&mut lock(&self.ledger)) };
        match answer {
            Ok(outcome) => done(py, outcome.into_python(py)?),
            Err(error) => Err(store_error(py, error)),
        }
    }
}

#[pymethods]
impl PyMemoryCheckpoints {
    #[new]
    #[pyo3(
        signature = (*, max_blob=None, max_rows=None, max_bytes=None),
        text_signature = "(*, max_blob=2097152, max_rows=50000, max_bytes=52428800)"
    )]
    fn new(
        py: Python<'_>,
        max_blob: Option<&Bound<'_, PyAny>>,
        max_rows: Option<&Bound<'_, PyAny>>,
        max_bytes: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Self> {
        let limits = limits_of(max_blob, max_rows, max_bytes)?;
        Self::of(py, Arc::new(Mutex::new(Ledger::new(limits))))
    }

    fn another_owner(&self, py: Python<'_>) -> PyResult<Self> {
        Self::of(py, Arc::clone(&self.ledger))
    }

    #[pyo3(signature = (workflow_id, *, workflow, version))]
    fn start_run<'py>(
        &self,
        py: Python<'py>,
        workflow_id: &Bound<'py, PyAny>,
        workflow: &Bound<'py, PyAny>,
        version: &Bound<'py, PyAny>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let (id, workflow, version) = run_to_start(workflow_id, workflow, version)?;
        self.ask(py, |ledger| {
            let started = ledger.start(&id, &self.owner, &workflow, version, wall());
            started.map(Outcome::Claimed).map_err(|refusal| refused(id, refusal))
        })
    }

    fn claim<'py>(&self, py: Python<'py>, workflow_id: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        let id = id_of(workflow_id)?;
        self.ask(py, |ledger| {
            let claimed = ledger.claim(&id, &self.owner, wall());
            claimed.map(Outcome::Claimed).map_err(|refusal| refused(id, refusal))
        })
    }

    #[pyo3(signature = (workflow_id, row, *, fence=None))]
    fn append<'py>(
        &self,
        py: Python<'py>,
        workflow_id: &Bound<'py, PyAny>,
        row: &Bound<'py, PyAny>,
        fence: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let (id, row, fence) = (id_of(workflow_id)?, row_of(row)?, fence.map(fence_of).transpose()?);
        self.ask(py, |ledger| match ledger.append(&id, fence, row) {
            Ok(()) => Ok(Outcome::Done),
            Err(Unwritten::Refused(refusal)) => Err(refused(id, refusal)),
            Err(Unwritten::Row(error)) => Err(error.into()),
        })
    }

    fn load_run<'py>(&self, py: Python<'py>, workflow_id: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        let id = id_of(workflow_id)?;
        self.ask(py, |ledger| Ok(Outcome::Rows(ledger.rows(&id).to_vec())))
    }

    #[pyo3(signature = (workflow_id, *, fence=None))]
    fn clear<'py>(
        &self,
        py: Python<'py>,
        workflow_id: &Bound<'py, PyAny>,
        fence: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let (id, fence) = (id_of(workflow_id)?, fence.map(fence_of).transpose()?);
        self.ask(py, |ledger| done_or(id.clone(), ledger.clear(&id, fence, wall())))
    }

    #[pyo3(
        signature = (workflow_id, fence, *, stopped=None),
        text_signature = "($self, workflow_id, fence, *, stopped=False)"
    )]
    fn release<'py>(
        &self,
        py: Python<'py>,
        workflow_id: &Bound<'py, PyAny>,
        fence: &Bound<'py, PyAny>,
        stopped: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let (id, fence) = (id_of(workflow_id)?, fence_of(fence)?);
        let is_stopped = stopped.map_or(Ok(false), |value| flag("stopped", value))?;
        let after = if is_stopped { RunStatus::stopped } else { |status| status };
        self.ask(py, |ledger| done_or(id.clone(), ledger.release(&id, fence, wall(), after)))
    }

    #[pyo3(
        signature = (*, status=None, older_than=None, limit=None),
        text_signature = "($self, *, status=None, older_than=None, limit=1000)"
    )]
    fn list_runs<'py>(
        &self,
        py: Python<'py>,
        status: Option<&Bound<'py, PyAny>>,
        older_than: Option<&Bound<'py, PyAny>>,
        limit: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let filter = filter_of(status, older_than, limit)?;
        self.ask(py, |ledger| Ok(Outcome::Runs(ledger.list(&filter))))
    }

    fn close(&self) {
        *lock(&self.is_closed) = true;
        lock(&self.ledger).leave(&self.owner);
    }

    fn aclose<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        self.close();
        done(py, py.None())
    }

    fn __aenter__<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        done(slf.py(), slf)
    }

    #[pyo3(signature = (*_error))]
    fn __aexit__<'py>(&self, py: Python<'py>, _error: &Bound<'py, PyTuple>) -> PyResult<Bound<'py, PyAny>> {
        self.aclose(py)
    }

    fn __repr__(&self) -> String {
        format!("<InMemoryCheckpointStore of {:?}>", self.owner)
    }
}

impl Drop for PyMemoryCheckpoints {
    fn drop(&mut self) {
        self.close();
    }
}

fn refused(id: WorkflowId, refusal: Refusal) -> StoreError {
    StoreError::Refused { id, refusal }
}

fn done_or(id: WorkflowId, answer: Result<(), Refusal>) -> Result<Outcome, StoreError> {
    answer.map(|()| Outcome::Done).map_err(|refusal| refused(id, refusal))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
