//! The rows of a run's log and their kinds, as Python has them.

use std::fmt::Write;

use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyBytes, PyDict};

use crate::core::checkpoint::{Limits, MOST_MILLIS, MOST_SEQUENCE, Row, RowKind, WorkflowId};

use super::convert::{bytes, flag, natural, plain_text, refused};
use super::errors::ConfigurationError;

/// Positional arguments and keywords of a constructor, for copies and pickles.
type Arguments<'py, T> = (T, Bound<'py, PyDict>);

/// A row; it keeps the rules of its kind.
#[pyclass(frozen, eq, hash, skip_from_py_object, module = "cano", name = "CheckpointRow")]
#[derive(Clone, PartialEq, Hash)]
pub(super) struct PyRow(pub(super) Row);

#[pymethods]
impl PyRow {
    #[new]
    #[pyo3(
        signature = (
            sequence, kind, state, *, task_id=None, visit=None, attempt=None, workflow_version=None, fingerprint=None,
            run_id=None, recorded_at=None, next_state=None, refers_to=None, due_at=None, is_intent=None,
            output_blob=None, snapshot=None
        ),
        text_signature = "(sequence, kind, state, *, task_id='', visit=1, attempt=1, workflow_version=0, fingerprint=0, \
            run_id=b'\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00', recorded_at=0, \
            next_state=None, refers_to=None, due_at=None, is_intent=False, output_blob=None, snapshot=None)"
    )]
    #[allow(clippy::too_many_arguments, reason = "the fields of a row, by their names")]
    fn new(
        sequence: &Bound<'_, PyAny>,
        kind: &Bound<'_, PyAny>,
        state: &Bound<'_, PyAny>,
        task_id: Option<&Bound<'_, PyAny>>,
        visit: Option<&Bound<'_, PyAny>>,
        attempt: Option<&Bound<'_, PyAny>>,
        workflow_version: Option<&Bound<'_, PyAny>>,
        fingerprint: Option<&Bound<'_, PyAny>>,
        run_id: Option<&Bound<'_, PyAny>>,
        recorded_at: Option<&Bound<'_, PyAny>>,
        next_state: Option<&Bound<'_, PyAny>>,
        refers_to: Option<&Bound<'_, PyAny>>,
        due_at: Option<&Bound<'_, PyAny>>,
        is_intent: Option<&Bound<'_, PyAny>>,
        output_blob: Option<&Bound<'_, PyAny>>,
        snapshot: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Self> {
        let row = Row {
            sequence: natural("sequence", sequence, 0, MOST_SEQUENCE)?,
            kind: kind_of(kind)?,
            state: plain_text("state", state)?,
            task: task_id.map_or(Ok(String::new()), |value| plain_text("task_id", value))?,
            visit: small("visit", visit, 1)?,
            attempt: small("attempt", attempt, 1)?,
            version: small("workflow_version", workflow_version, 0)?,
            fingerprint: large("fingerprint", fingerprint, u64::MAX)?.unwrap_or(0),
            run_id: run_id.map_or(Ok([0; 16]), sixteen_bytes)?,
            recorded_at: large("recorded_at", recorded_at, MOST_MILLIS)?.unwrap_or(0),
            next_state: next_state.map(|value| plain_text("next_state", value)).transpose()?,
            refers_to: large("refers_to", refers_to, MOST_SEQUENCE)?,
            due_at: large("due_at", due_at, MOST_MILLIS)?,
            is_intent: is_intent.map_or(Ok(false), |value| flag("is_intent", value))?,
            payload: output_blob.map(|value| bytes("output_blob", value)).transpose()?,
            snapshot: snapshot.map(|value| bytes("snapshot", value)).transpose()?,
        };
        row.check().map_err(|fault| ConfigurationError::new_err(fault.to_string()))?;
        Ok(Self(row))
    }

    #[getter]
    fn sequence(&self) -> u64 {
        self.0.sequence
    }

    #[getter]
    fn kind<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        kind_in_python(py, self.0.kind)
    }

    #[getter]
    fn state(&self) -> &str {
        &self.0.state
    }

    #[getter]
    fn task_id(&self) -> &str {
        &self.0.task
    }

    #[getter]
    fn visit(&self) -> u32 {
        self.0.visit
    }

    #[getter]
    fn attempt(&self) -> u32 {
        self.0.attempt
    }

    #[getter]
    fn workflow_version(&self) -> u32 {
        self.0.version
    }

    #[getter]
    fn fingerprint(&self) -> u64 {
        self.0.fingerprint
    }

    #[getter]
    fn run_id<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.0.run_id)
    }

    #[getter]
    fn recorded_at(&self) -> u64 {
        self.0.recorded_at
    }

    #[getter]
    fn next_state(&self) -> Option<&str> {
        self.0.next_state.as_deref()
    }

    #[getter]
    fn refers_to(&self) -> Option<u64> {
        self.0.refers_to
    }

    #[getter]
    fn due_at(&self) -> Option<u64> {
        self.0.due_at
    }

    #[getter]
    fn is_intent(&self) -> bool {
        self.0.is_intent
    }

    #[getter]
    fn output_blob<'py>(&self, py: Python<'py>) -> Option<Bound<'py, PyBytes>> {
        self.0.payload.as_ref().map(|blob| PyBytes::new(py, blob))
    }

    #[getter]
    fn snapshot<'py>(&self, py: Python<'py>) -> Option<Bound<'py, PyBytes>> {
        self.0.snapshot.as_ref().map(|blob| PyBytes::new(py, blob))
    }

    fn encode<'py>(&self, py: Python<'py>, workflow_id: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyBytes>> {
        let bytes = self.0.encode(&id_of(workflow_id)?, &Limits::MOST)?;
        Ok(PyBytes::new(py, &bytes))
    }

    #[staticmethod]
    fn decode(workflow_id: &Bound<'_, PyAny>, sequence: &Bound<'_, PyAny>, data: &Bound<'_, PyAny>) -> PyResult<Self> {
        let id = id_of(workflow_id)?;
        let sequence = natural("sequence", sequence, 0, MOST_SEQUENCE)?;
        let data = data.cast::<PyBytes>().map_err(|_| refused("data", "bytes", data))?;
        Ok(Self(Row::decode(&id, sequence, data.as_bytes())?))
    }

    fn __repr__(&self) -> String {
        let Row { sequence, kind, state, task, visit, attempt, .. } = &self.0;
        let mut text = format!("<CheckpointRow {sequence}: {} of {state:?}", kind.name());
        let mut add = |part: std::fmt::Arguments<'_>| text.write_fmt(part).expect("a String takes everything");
        if !task.is_empty() {
            add(format_args!(", task {task:?}"));
        }
        add(format_args!(", visit {visit}, attempt {attempt}"));
        if self.0.is_intent {
            add(format_args!(", an intent"));
        }
        if let Some(next_state) = &self.0.next_state {
            add(format_args!(", goes to {next_state:?}"));
        }
        if let Some(refers_to) = self.0.refers_to {
            add(format_args!(", refers to {refers_to}"));
        }
        if let Some(due_at) = self.0.due_at {
            add(format_args!(", due at {due_at}"));
        }
        for (name, blob) in [("output_blob", &self.0.payload), ("snapshot", &self.0.snapshot)] {
            if let Some(blob) = blob {
                add(format_args!(", {name} of {} bytes", blob.len()));
            }
        }
        text + ">"
    }

    /// The same with other values for some fields.
    #[pyo3(signature = (**changes))]
    fn replace<'py>(slf: &Bound<'py, Self>, changes: Option<&Bound<'py, PyDict>>) -> PyResult<Bound<'py, PyAny>> {
        let ((sequence, kind, state), fields) = slf.get().__getnewargs_ex__(slf.py())?;
        fields.set_item("sequence", sequence)?;
        fields.set_item("kind", kind)?;
        fields.set_item("state", state)?;
        for (name, value) in changes.into_iter().flatten() {
            fields.set_item(name, value)?;
        }
        slf.get_type().call((), Some(&fields))
    }

    fn __getnewargs_ex__<'py>(&self, py: Python<'py>) -> PyResult<Arguments<'py, (u64, Bound<'py, PyAny>, &str)>> {
        let fields = PyDict::new(py);
        fields.set_item("task_id", self.task_id())?;
        fields.set_item("visit", self.0.visit)?;
        fields.set_item("attempt", self.0.attempt)?;
        fields.set_item("workflow_version", self.0.version)?;
        fields.set_item("fingerprint", self.0.fingerprint)?;
        fields.set_item("run_id", self.run_id(py))?;
        fields.set_item("recorded_at", self.0.recorded_at)?;
        fields.set_item("next_state", self.next_state())?;
        fields.set_item("refers_to", self.0.refers_to)?;
        fields.set_item("due_at", self.0.due_at)?;
        fields.set_item("is_intent", self.0.is_intent)?;
        fields.set_item("output_blob", self.output_blob(py))?;
        fields.set_item("snapshot", self.snapshot(py))?;
        Ok(((self.0.sequence, self.kind(py)?, self.state()), fields))
    }
}

/// The id of a run.
pub(super) fn id_of(value: &Bound<'_, PyAny>) -> PyResult<WorkflowId> {
    Ok(WorkflowId::new(&plain_text("workflow_id", value)?)?)
}

fn small(name: &str, value: Option<&Bound<'_, PyAny>>, least: u32) -> PyResult<u32> {
    value.map_or(Ok(least), |value| Ok(natural(name, value, least.into(), u32::MAX.into())? as u32))
}

fn large(name: &str, value: Option<&Bound<'_, PyAny>>, most: u64) -> PyResult<Option<u64>> {
    value.map(|value| natural(name, value, 0, most)).transpose()
}

fn sixteen_bytes(value: &Bound<'_, PyAny>) -> PyResult<[u8; 16]> {
    bytes("run_id", value)?.try_into().map_err(|_| refused("run_id", "16 bytes", value))
}

/// The members of an Enum of `cano._checkpoints`, by their values.
pub(super) fn members(
    py: Python<'_>,
    class: &str,
    values: impl IntoIterator<Item = &'static str>,
) -> PyResult<Vec<Py<PyAny>>> {
    let class = py.import("cano._checkpoints")?.getattr(class)?;
    values.into_iter().map(|value| Ok(class.call1((value,))?.unbind())).collect()
}

fn kinds(py: Python<'_>) -> PyResult<&[Py<PyAny>]> {
    static MEMBERS: PyOnceLock<Vec<Py<PyAny>>> = PyOnceLock::new();
    let members = MEMBERS.get_or_try_init(py, || members(py, "RowKind", RowKind::ALL.map(RowKind::name)))?;
    Ok(members)
}

fn kind_in_python(py: Python<'_>, kind: RowKind) -> PyResult<Bound<'_, PyAny>> {
    Ok(kinds(py)?[kind as usize - 1].bind(py).clone())
}

fn kind_of(value: &Bound<'_, PyAny>) -> PyResult<RowKind> {
    let at = kinds(value.py())?.iter().position(|member| value.is(member));
    at.map(|at| RowKind::ALL[at]).ok_or_else(|| refused("kind", "a RowKind", value))
}
