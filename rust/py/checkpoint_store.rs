//! What the checkpoint stores have in common: what Python asks of them, and what it is told.

use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyString;

use crate::core::checkpoint::{Limits, Row, WorkflowId};
use crate::core::claim::{Fence, Lease, Refusal, RunFilter, RunStatus, RunSummary};
use crate::store::error::{Failure, OpenReason, StoreError};

use super::convert::{count, duration, natural, refused, text};
use super::errors::{
    RunClaimedError, RunConflictError, RunNotFoundError, RunTooLargeError, StoreFailedError, StoreOpenError,
};
use super::now::wall;
use super::row::{PyRow, id_of, members};

const LONGEST_NAME: usize = 128;
const MOST_RUNS: u64 = 1_000_000;

/// The arguments of `start_run`: the run's id, its workflow's name and version.
pub(super) fn run_to_start(
    workflow_id: &Bound<'_, PyAny>,
    workflow: &Bound<'_, PyAny>,
    version: &Bound<'_, PyAny>,
) -> PyResult<(WorkflowId, String, u32)> {
    let id = id_of(workflow_id)?;
    let workflow = text("workflow", workflow, LONGEST_NAME)?;
    let version = natural("version", version, 0, u32::MAX.into())?;
    Ok((id, workflow, version as u32))
}

pub(super) fn row_of(row: &Bound<'_, PyAny>) -> PyResult<Row> {
    let row = row.cast::<PyRow>().map_err(|_| refused("row", "a CheckpointRow", row))?;
    Ok(row.get().0.clone())
}

pub(super) fn fence_of(fence: &Bound<'_, PyAny>) -> PyResult<Fence> {
    natural("fence", fence, 0, u64::MAX).map(Fence)
}

/// The limits of a store; None is what they usually are.
pub(super) fn limits_of(
    max_blob: Option<&Bound<'_, PyAny>>,
    max_rows: Option<&Bound<'_, PyAny>>,
    max_bytes: Option<&Bound<'_, PyAny>>,
) -> PyResult<Limits> {
    let usual = Limits::default();
    let given = |name, value: Option<&Bound<'_, PyAny>>, usual: u64| {
        value.map_or(Ok(usual.cast_signed()), |value| count(name, value))
    };
    let blob = given("max_blob", max_blob, usual.blob as u64)?;
    Ok(Limits::new(blob, given("max_rows", max_rows, usual.rows)?, given("max_bytes", max_bytes, usual.bytes)?)?)
}

/// The arguments of `list_runs`.
pub(super) fn filter_of(
    status: Option<&Bound<'_, PyAny>>,
    older_than: Option<&Bound<'_, PyAny>>,
    limit: Option<&Bound<'_, PyAny>>,
) -> PyResult<RunFilter> {
    let age = older_than.map(|value| duration("older_than", value)).transpose()?;
    let limit = limit.map_or(Ok(1_000), |value| natural("limit", value, 1, MOST_RUNS))?;
    Ok(RunFilter {
        statuses: status.map_or_else(|| Ok(RunStatus::ALL.to_vec()), statuses_of)?,
        updated_before: age.map_or(u64::MAX, |age| wall().saturating_sub(age.as_millis())),
        limit: limit as u32,
    })
}

fn statuses(py: Python<'_>) -> PyResult<&[Py<PyAny>]> {
    static MEMBERS: PyOnceLock<Vec<Py<PyAny>>> = PyOnceLock::new();
    let members = MEMBERS.get_or_try_init(py, || members(py, "RunStatus", RunStatus::ALL.map(RunStatus::name)))?;
    Ok(members)
}

fn status_in_python(py: Python<'_>, status: RunStatus) -> PyResult<Bound<'_, PyAny>> {
    let at = RunStatus::ALL.iter().position(|known| *known == status).expect("all are there");
    Ok(statuses(py)?[at].bind(py).clone())
}

fn status_of(value: &Bound<'_, PyAny>) -> PyResult<Option<RunStatus>> {
    let at = statuses(value.py())?.iter().position(|member| value.is(member));
    Ok(at.map(|at| RunStatus::ALL[at]))
}

/// One status, or several.
fn statuses_of(value: &Bound<'_, PyAny>) -> PyResult<Vec<RunStatus>> {
    if let Some(status) = status_of(value)? {
        return Ok(vec![status]);
    }
    let wrong = || refused("status", "a RunStatus, or an iterable of them", value);
    if value.is_instance_of::<PyString>() {
        return Err(wrong());
    }
    let several = value.try_iter().map_err(|_| wrong())?;
    several.map(|one| status_of(&one?)?.ok_or_else(wrong)).collect()
}

/// A `cano.RunSummary`.
pub(super) fn summary_in_python<'py>(py: Python<'py>, run: &RunSummary) -> PyResult<Bound<'py, PyAny>> {
    static CLASS: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    let class = CLASS.get_or_try_init(py, || {
        Ok::<_, PyErr>(py.import("cano._checkpoints")?.getattr(intern!(py, "RunSummary"))?.unbind())
    })?;
    let standing = &run.standing;
    class.bind(py).call1((
        run.id.as_str(),
        &run.workflow,
        run.version,
        status_in_python(py, standing.status)?,
        &run.state,
        standing.lease.as_ref().map(|lease| &lease.owner),
        run.created_at,
        run.updated_at,
        standing.usage.rows,
        standing.usage.bytes,
    ))
}

/// The exception for what a store did not do.
pub(super) fn store_error(py: Python<'_>, error: StoreError) -> PyErr {
    let text = error.to_string();
    match error {
        StoreError::Open { reason, .. } => StoreOpenError::new_err((text, open_reason(&reason))),
        StoreError::Refused { id, refusal } => refusal_in_python(py, text, &id, refusal).unwrap_or_else(|error| error),
        StoreError::Row(error) => error.into(),
        StoreError::Failed { failure, .. } => failed(text, failure_reason(failure)),
        StoreError::Closed => failed(text, "closed"),
        StoreError::Forked => failed(text, "forked"),
    }
}

fn failed(text: String, reason: &'static str) -> PyErr {
    StoreFailedError::new_err((text, None::<String>, None::<u64>, reason))
}

fn refusal_in_python(py: Python<'_>, text: String, id: &WorkflowId, refusal: Refusal) -> PyResult<PyErr> {
    let id = id.as_str().to_owned();
    let none = None::<u64>;
    Ok(match refusal {
        Refusal::Claimed(Lease { owner, until }) => RunClaimedError::new_err((text, id, none, owner, until)),
        Refusal::Unclaimed => RunClaimedError::new_err((text, id)),
        Refusal::Unknown => RunNotFoundError::new_err((text, id)),
        Refusal::Exists(status) | Refusal::Over(status) => {
            RunConflictError::new_err((text, id, none, status_in_python(py, status)?.unbind()))
        }
        Refusal::Conflict { sequence, is_same, .. } => {
            RunConflictError::new_err((text, id, sequence, py.None(), is_same))
        }
        Refusal::Gap { sequence, .. } | Refusal::Misplaced { sequence } => {
            RunConflictError::new_err((text, id, sequence))
        }
        Refusal::OutOfPlace { .. } => RunConflictError::new_err((text, id)),
        Refusal::Full { .. } => RunTooLargeError::new_err((text, id)),
    })
}

fn failure_reason(failure: Failure) -> &'static str {
    match failure {
        Failure::DiskFull => "disk-full",
        Failure::Busy => "busy",
        Failure::Io => "io",
        Failure::Damaged => "damaged",
        Failure::ReadOnly => "read-only",
        Failure::Other => "other",
    }
}

fn open_reason(reason: &OpenReason) -> &'static str {
    match reason {
        OpenReason::NoName => "no-name",
        OpenReason::DirectoryMissing(_) => "no-directory",
        OpenReason::DirectoryInsecure { .. } => "insecure-directory",
        OpenReason::Symlink(_) => "symlink",
        OpenReason::NotAFile(_) => "not-a-file",
        OpenReason::OtherOwner { .. } => "other-owner",
        OpenReason::FileInsecure { .. } => "insecure-file",
        OpenReason::NotAStore => "not-a-store",
        OpenReason::Version { .. } => "version",
        OpenReason::Forked => "forked",
        OpenReason::NoWal => "no-wal",
        OpenReason::Failed { failure, .. } => failure_reason(*failure),
    }
}

/// Who a store is to others: this process, and a number that no other store has.
pub(super) fn fresh_owner(py: Python<'_>) -> PyResult<String> {
    let token: String = py.import("secrets")?.call_method1("token_hex", (8,))?.extract()?;
    Ok(format!("{}-{token}", std::process::id()))
}
