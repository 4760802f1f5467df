//! What the rules of `core::claim` say of a run that a store in Python keeps.

use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::core::checkpoint::{Limits, Problem, Row, RowError, RowKind, WorkflowId, check_log as check};
use crate::core::claim::{Fence, Lease, Refusal, RunStatus, Standing, Usage};
use crate::store::error::StoreError;

use super::checkpoint_store::{fence_of, store_error};
use super::errors::CheckpointError;
use super::row::{PyRow, id_of};

/// What a store knows of a run besides its rows. Each method raises what is in the way.
#[pyclass(frozen, module = "cano._core", name = "Standing")]
pub(super) struct PyStanding {
    id: WorkflowId,
    standing: Standing,
}

#[pymethods]
impl PyStanding {
    #[new]
    #[pyo3(signature = (workflow_id, status, owner, until, fence, next_sequence, kept_rows, kept_bytes, /))]
    #[allow(clippy::too_many_arguments, reason = "the columns of a run")]
    fn new(
        workflow_id: &Bound<'_, PyAny>,
        status: &str,
        owner: Option<String>,
        until: Option<u64>,
        fence: u64,
        next_sequence: u64,
        kept_rows: u64,
        kept_bytes: u64,
    ) -> PyResult<Self> {
        let id = id_of(workflow_id)?;
        let status = RunStatus::from_name(status).ok_or_else(|| {
            let text = format!("run {:?}: {status:?} is no status of a run", id.as_str());
            CheckpointError::new_err((text, id.as_str().to_owned()))
        })?;
        let standing = Standing {
            status,
            lease: owner.map(|owner| Lease { owner, until: until.unwrap_or(0) }),
            fence: Fence(fence),
            next: next_sequence,
            usage: Usage { rows: kept_rows, bytes: kept_bytes },
        };
        Ok(Self { id, standing })
    }

    #[pyo3(signature = (now, /))]
    fn start(&self, py: Python<'_>, now: u64) -> PyResult<()> {
        self.answer(py, Err(self.standing.start(now)))
    }

    /// Returns the status once it is claimed.
    #[pyo3(signature = (now, /))]
    fn claim(&self, py: Python<'_>, now: u64) -> PyResult<&'static str> {
        self.answer(py, self.standing.claim(now).map(RunStatus::name))
    }

    /// `there`: the bytes that are stored at the place of the row already, if any are.
    /// Returns the status after the row.
    #[pyo3(signature = (fence, row, data, there, /))]
    fn append(
        &self,
        py: Python<'_>,
        fence: Option<u64>,
        row: &PyRow,
        data: &[u8],
        there: Option<&[u8]>,
    ) -> PyResult<&'static str> {
        let verdict = self.standing.append(fence.map(Fence), &row.0, data.len() as u64, &Limits::default());
        let verdict = verdict.map_err(|refusal| match refusal {
            Refusal::Conflict { sequence, next, .. } => {
                Refusal::Conflict { sequence, next, is_same: there == Some(data) }
            }
            refusal => refusal,
        });
        self.answer(py, verdict.map(RunStatus::name))
    }

    /// After `append` has found nothing: the row says that it takes the place of one that is not there.
    #[pyo3(signature = (sequence, /))]
    fn misplaced(&self, py: Python<'_>, sequence: u64) -> PyResult<()> {
        self.answer(py, Err(Refusal::Misplaced { sequence }))
    }

    #[pyo3(signature = (fence, /))]
    fn release(&self, py: Python<'_>, fence: u64) -> PyResult<()> {
        self.answer(py, self.standing.release(Fence(fence)))
    }

    #[pyo3(signature = (fence, now, /))]
    fn clear(&self, py: Python<'_>, fence: Option<u64>, now: u64) -> PyResult<()> {
        self.answer(py, self.standing.clear(fence.map(Fence), now))
    }
}

impl PyStanding {
    fn answer<T>(&self, py: Python<'_>, verdict: Result<T, Refusal>) -> PyResult<T> {
        verdict.map_err(|refusal| store_error(py, StoreError::Refused { id: self.id.clone(), refusal }))
    }
}

/// The rows and the bytes that a run may keep.
#[pyfunction]
pub(super) fn limits_of_runs() -> (u64, u64) {
    let limits = Limits::default();
    (limits.rows, limits.bytes)
}

/// Which status follows which when a row of each kind is added: (status, kind, status after).
#[pyfunction]
pub(super) fn rules_of_claims() -> Vec<(&'static str, &'static str, &'static str)> {
    let pairs = RunStatus::ALL.into_iter().flat_map(|status| RowKind::ALL.map(|kind| (status, kind)));
    pairs.filter_map(|(status, kind)| Some((status.name(), kind.name(), status.after(kind)?.name()))).collect()
}

/// The bytes to store under the id, within the limits of a store.
#[pyfunction]
#[pyo3(signature = (workflow_id, row, /))]
pub(super) fn encode_within_limits<'py>(
    py: Python<'py>,
    workflow_id: &Bound<'py, PyAny>,
    row: &PyRow,
) -> PyResult<Bound<'py, PyBytes>> {
    Ok(PyBytes::new(py, &row.0.encode(&id_of(workflow_id)?, &Limits::default())?))
}

/// The rows of a run from what was stored, in ascending order; `next_sequence` is the sequence of the row to come.
#[pyfunction]
#[pyo3(signature = (workflow_id, stored, next_sequence, /))]
pub(super) fn decode_log(
    workflow_id: &Bound<'_, PyAny>,
    stored: Vec<(u64, Bound<'_, PyBytes>)>,
    next_sequence: u64,
) -> PyResult<Vec<PyRow>> {
    let id = id_of(workflow_id)?;
    let rows: Vec<Row> = stored
        .iter()
        .map(|(sequence, bytes)| Row::decode(&id, *sequence, bytes.as_bytes()))
        .collect::<Result<_, _>>()?;
    check(&id, &rows)?;
    let end = rows.last().map_or(0, |row| row.sequence + 1);
    if end != next_sequence {
        return Err(RowError { id, sequence: end, problem: Problem::Missing }.into());
    }
    Ok(rows.into_iter().map(PyRow).collect())
}

/// A refusal if this is no id of a run.
#[pyfunction]
#[pyo3(signature = (workflow_id, /))]
pub(super) fn check_workflow_id(workflow_id: &Bound<'_, PyAny>) -> PyResult<()> {
    id_of(workflow_id).map(drop)
}

/// A fence as a signed column holds it: one that is larger was never drawn, and neither was the largest.
#[pyfunction]
#[pyo3(signature = (fence, /))]
pub(super) fn check_fence(fence: &Bound<'_, PyAny>) -> PyResult<u64> {
    Ok(fence_of(fence)?.0.min(i64::MAX as u64))
}
