//! The log of a durable run: the rows that it writes, one at a time, under dense numbers, and what a resume reads in them.
//!
//! A write is a future, which nobody cancels: the run waits for the answer, whatever happens meanwhile, and only then is the
//! row counted. So a number is used again only if the store has said that the row is not there.

use std::mem;
use std::sync::OnceLock;
use std::time::{SystemTime, UNIX_EPOCH};

use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyString};
use pyo3::{PyTraverseError, PyVisit};

use crate::core::checkpoint::{Row, RowKind, WorkflowId, check_log};
use crate::core::resume::{Position, Resumption};

use super::asyncio::Asyncio;
use super::errors::{ConfigurationError, RunClaimedError, RunConflictError};
use super::row::PyRow;
use super::run::GilCell;

/// Where a resumed run goes on, read from its rows.
#[pyclass(frozen, module = "cano._core")]
pub(super) struct Resumed {
    pub(super) found: Resumption,
    run_id: [u8; 16],
}

#[pymethods]
impl Resumed {
    /// Reads the rows of a run; `passing` has the states that a run cannot be resumed in.
    #[new]
    #[pyo3(signature = (workflow_id, rows, passing, /))]
    fn new(workflow_id: &str, rows: Vec<Bound<'_, PyRow>>, passing: Vec<String>) -> PyResult<Self> {
        let py_error = |error: crate::core::error::Error| ConfigurationError::new_err(error.to_string());
        let id = WorkflowId::new(workflow_id).map_err(py_error)?;
        let mut rows: Vec<Row> = rows.iter().map(|row| row.get().0.clone()).collect();
        rows.sort_by_key(|row| row.sequence);
        check_log(&id, &rows)?;
        let found = Resumption::of(&rows, |state| !passing.iter().any(|passes| passes == state));
        let Some((found, last)) = found.zip(rows.last()) else {
            return Err(ConfigurationError::new_err("rows must not be empty"));
        };
        Ok(Self { found, run_id: last.run_id })
    }

    /// What is to be done: "again", "next", "roll back", or the status of a run that is over.
    #[getter]
    fn position(&self) -> &'static str {
        match self.found.position {
            Position::Again { .. } => "again",
            Position::Next { .. } => "next",
            Position::RollBack { .. } => "roll back",
            Position::Finished { .. } => "finished",
            Position::RolledBack { .. } => "rolled back",
            Position::NeedsAttention { .. } => "needs attention",
        }
    }

    /// The state that it is about.
    #[getter]
    fn state(&self) -> &str {
        match &self.found.position {
            Position::Again { state, .. }
            | Position::Next { state }
            | Position::RollBack { state, .. }
            | Position::Finished { state }
            | Position::RolledBack { state }
            | Position::NeedsAttention { state, .. } => state,
        }
    }

    /// How often the visit, or the roll-back, is begun with this resume.
    #[getter]
    fn start(&self) -> u32 {
        match self.found.position {
            Position::Again { start, .. } | Position::RollBack { start, .. } => start,
            _ => 1,
        }
    }

    /// The cursor of a task that works in steps, or the reason of a roll-back or of a stop.
    #[getter]
    fn blob<'py>(&self, py: Python<'py>) -> Option<Bound<'py, PyBytes>> {
        let blob = match &self.found.position {
            Position::Again { cursor, .. } => cursor.as_ref(),
            Position::RollBack { reason, .. } | Position::NeedsAttention { reason, .. } => Some(reason),
            _ => None,
        };
        blob.map(|blob| PyBytes::new(py, blob))
    }

    #[getter]
    fn snapshot<'py>(&self, py: Python<'py>) -> Option<Bound<'py, PyBytes>> {
        self.found.snapshot.as_ref().map(|blob| PyBytes::new(py, blob))
    }

    #[getter]
    fn run_id<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.run_id)
    }
}

/// The rows of a run on their way to a store.
#[pyclass(frozen, module = "cano._core")]
pub(super) struct Log {
    append: Py<PyAny>,
    workflow_id: Py<PyString>,
    fence: OnceLock<Py<PyAny>>,
    /// What the run has to know of its workflow: it makes bytes of cursors and outputs.
    #[pyo3(get)]
    definition: Py<PyAny>,
    /// What the visit that is resumed got as far as, for its task.
    cursor: GilCell<Option<Py<PyAny>>>,
    /// Gives the bytes of the run's own variables, or None.
    snapshot: Option<Py<PyAny>>,
    run_id: [u8; 16],
    version: u32,
    fingerprint: u64,
    book: GilCell<Book>,
    unclosed: GilCell<Option<Py<PyAny>>>,
}

/// What is known of the log, and of the visit that the run is in.
#[derive(Default)]
struct Book {
    /// The sequence of the next row.
    next: u64,
    place: Place,
    /// The row that is on its way.
    written: Option<Written>,
    /// The first of the cursors whose place the next one takes; none if the newest row is no cursor.
    cursors_from: Option<u64>,
    /// When the timer of this visit fires.
    due_at: Option<u64>,
    /// How many times the visit that is entered next was begun before.
    started: u32,
    rollbacks: u32,
    status: Status,
}

/// What the rows of a visit have in common.
#[derive(Default, Clone)]
pub(super) struct Place {
    pub(super) state: String,
    pub(super) task: String,
    pub(super) visit: u32,
    /// Whether the step is to be undone from its entry on.
    pub(super) is_intent: bool,
}

#[derive(Clone, Copy)]
struct Written {
    sequence: u64,
    kind: RowKind,
    due_at: Option<u64>,
}

#[derive(Default, Clone, Copy, PartialEq)]
enum Status {
    #[default]
    Forward,
    Backward,
    Over,
    RolledBack,
    /// The run is somebody else's, or its log is not what it should be: nothing of it is to be touched.
    Lost,
}

#[pymethods]
impl Log {
    #[new]
    #[pyo3(signature = (store, workflow_id, definition, snapshot, run_id, version, fingerprint, resumed=None, cursor=None, /))]
    #[allow(clippy::too_many_arguments, reason = "the fields, as a record has them")]
    fn new(
        store: &Bound<'_, PyAny>,
        workflow_id: Py<PyString>,
        definition: Py<PyAny>,
        snapshot: Option<Py<PyAny>>,
        run_id: [u8; 16],
        version: u32,
        fingerprint: u64,
        resumed: Option<&Bound<'_, Resumed>>,
        cursor: Option<Py<PyAny>>,
    ) -> PyResult<Self> {
        let mut book = Book::default();
        if let Some(resumed) = resumed {
            let found = &resumed.get().found;
            book.next = found.next;
            book.place = Place { state: resumed.get().state().to_owned(), visit: 1, ..Place::default() };
            match &found.position {
                Position::Again { start, due_at, visit, .. } => {
                    (book.started, book.due_at) = (start - 1, *due_at);
                    book.place.visit = *visit;
                }
                Position::RollBack { start, .. } => {
                    book.rollbacks = start - 1;
                    book.status = Status::Backward;
                }
                _ => {}
            }
        }
        Ok(Self {
            append: store.getattr(intern!(store.py(), "append"))?.unbind(),
            workflow_id,
            fence: OnceLock::new(),
            definition,
            cursor: GilCell::new(cursor),
            snapshot,
            run_id,
            version,
            fingerprint,
            book: GilCell::new(book),
            unclosed: GilCell::new(None),
        })
    }

    /// The run is owned under this fence.
    fn owned(&self, fence: Py<PyAny>) {
        self.fence.get_or_init(|| fence);
    }

    /// What the visit that is resumed got as far as; once.
    pub(super) fn take_cursor(&self, py: Python<'_>) -> Option<Py<PyAny>> {
        self.cursor.with(py, Option::take)
    }

    /// Whether a row says that the run is over.
    #[getter]
    pub(super) fn is_over(&self, py: Python<'_>) -> bool {
        self.book.with(py, |book| matches!(book.status, Status::Over | Status::RolledBack))
    }

    /// Whether the log is no longer the run's own to write, clear or give up.
    #[getter]
    pub(super) fn is_lost(&self, py: Python<'_>) -> bool {
        self.book.with(py, |book| book.status == Status::Lost)
    }

    /// Why the log does not say that the run has reached its exit state, if so.
    #[getter]
    fn unclosed(&self, py: Python<'_>) -> Option<Py<PyAny>> {
        self.unclosed.with(py, |error| error.as_ref().map(|error| error.clone_ref(py)))
    }

    /// The store did not take the row that was written last.
    pub(super) fn refused(&self, py: Python<'_>, error: &Bound<'_, PyAny>) {
        let is_lost = error.is_instance_of::<RunClaimedError>() || error.is_instance_of::<RunConflictError>();
        self.book.with(py, |book| {
            book.written = None;
            if is_lost {
                book.status = Status::Lost;
            }
        });
    }

    /// Whether it is over because everything has been undone.
    #[getter]
    fn is_rolled_back(&self, py: Python<'_>) -> bool {
        self.book.with(py, |book| book.status == Status::RolledBack)
    }

    /// The sequence of the next row.
    #[getter]
    fn next(&self, py: Python<'_>) -> u64 {
        self.book.with(py, |book| book.next)
    }

    /// When the timer of this visit fires, in milliseconds since 1970.
    #[getter]
    fn due_at(&self, py: Python<'_>) -> Option<u64> {
        self.book.with(py, |book| book.due_at)
    }

    /// Writes how far the present task got, and where the run goes if the task has said so.
    #[pyo3(signature = (cursor, next_state=None, /))]
    pub(super) fn cursor<'py>(
        &self,
        cursor: &Bound<'py, PyAny>,
        next_state: Option<String>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let py = cursor.py();
        let place = self.book.with(py, |book| book.place.clone());
        let definition = self.definition.bind(py);
        let blob = definition.call_method1(intern!(py, "encode_cursor"), (place.state, cursor))?.extract()?;
        self.write(py, RowKind::StepCursor, |row, book| {
            row.refers_to = book.cursors_from;
            row.payload = Some(blob);
            row.next_state = next_state;
        })
    }

    /// Writes when the present timer fires.
    fn timer<'py>(&self, py: Python<'py>, due_at: u64) -> PyResult<Bound<'py, PyAny>> {
        self.write(py, RowKind::TimerDue, |row, _| row.due_at = Some(due_at))
    }

    /// Writes that the run goes backwards from here on.
    fn roll_back<'py>(&self, py: Python<'py>, reason: Vec<u8>) -> PyResult<Bound<'py, PyAny>> {
        self.write(py, RowKind::RollbackStarted, |row, book| {
            row.attempt = book.rollbacks + 1;
            row.payload = Some(reason);
        })
    }

    /// Writes that the step of a row has been undone.
    fn compensated<'py>(
        &self,
        py: Python<'py>,
        sequence: u64,
        state: String,
        task: String,
        visit: u32,
    ) -> PyResult<Bound<'py, PyAny>> {
        self.write(py, RowKind::Compensated, |row, _| {
            row.refers_to = Some(sequence);
            (row.state, row.task, row.visit, row.attempt) = (state, task, visit, 1);
        })
    }

    /// Writes that an exit state was reached, or that everything has been undone.
    fn finished<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        self.write(py, RowKind::Finished, |_, _| {})
    }

    /// Writes that the run cannot go on without a person.
    fn needs_attention<'py>(&self, py: Python<'py>, reason: Vec<u8>) -> PyResult<Bound<'py, PyAny>> {
        self.write(py, RowKind::NeedsAttention, |row, _| row.payload = Some(reason))
    }

    /// Counts the row that was written last: the store has it. Gives its sequence.
    pub(super) fn landed(&self, py: Python<'_>) -> Option<u64> {
        self.book.with(py, |book| {
            let written = book.written.take()?;
            book.next = written.sequence + 1;
            let cursors_from = book.cursors_from.unwrap_or(written.sequence);
            book.cursors_from = (written.kind == RowKind::StepCursor).then_some(cursors_from);
            match written.kind {
                RowKind::TimerDue => book.due_at = written.due_at,
                RowKind::RollbackStarted => {
                    book.rollbacks += 1;
                    book.status = Status::Backward;
                }
                RowKind::Finished if book.status == Status::Backward => book.status = Status::RolledBack,
                RowKind::Finished | RowKind::NeedsAttention => book.status = Status::Over,
                RowKind::StateEntry | RowKind::CompensationCompletion | RowKind::StepCursor | RowKind::Compensated => {}
            }
            Some(written.sequence)
        })
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.append)?;
        visit.call(self.fence.get())?;
        visit.call(&self.definition)?;
        self.cursor.peek(|cursor| visit.call(cursor)).unwrap_or(Ok(()))?;
        self.unclosed.peek(|error| visit.call(error)).unwrap_or(Ok(()))?;
        visit.call(&self.snapshot)
    }
}

impl Log {
    pub(super) fn run_id_in_hex(&self) -> String {
        format!("{:032x}", u128::from_be_bytes(self.run_id))
    }

    /// Writes that a state is entered; the rows that follow are of this visit.
    pub(super) fn enter<'py>(&self, py: Python<'py>, place: Place, is_exit: bool) -> PyResult<Bound<'py, PyAny>> {
        let snapshot = match &self.snapshot {
            Some(snapshot) => Some(snapshot.bind(py).call0()?.extract()?),
            None => None,
        };
        let start = self.book.with(py, |book| {
            let start = mem::take(&mut book.started) + 1;
            if start == 1 {
                book.due_at = None;
            }
            book.place = place;
            start
        });
        if start == 1 {
            drop(self.take_cursor(py));
        }
        let kind = if is_exit { RowKind::Finished } else { RowKind::StateEntry };
        self.write(py, kind, |row, book| {
            row.attempt = start;
            row.is_intent = book.place.is_intent;
            row.snapshot = snapshot;
        })
    }

    /// The run has reached its exit state, and the store did not take the row that says so.
    pub(super) fn leave_open(&self, py: Python<'_>, error: PyErr) {
        let error = error.into_value(py).into_any();
        drop(self.unclosed.with(py, |unclosed| unclosed.replace(error)));
    }

    /// Writes that a compensatable step is done, and where it leads.
    pub(super) fn completed<'py>(&self, output: &Bound<'py, PyAny>, next_state: String) -> PyResult<Bound<'py, PyAny>> {
        let py = output.py();
        let place = self.book.with(py, |book| book.place.clone());
        let definition = self.definition.bind(py);
        let output = definition.call_method1(intern!(py, "encode_output"), (place.state, output))?.extract()?;
        self.write(py, RowKind::CompensationCompletion, |row, _| {
            row.payload = Some(output);
            row.next_state = Some(next_state);
        })
    }

    /// Hands a row to the store, and gives the future of its answer.
    fn write<'py>(
        &self,
        py: Python<'py>,
        kind: RowKind,
        fill: impl FnOnce(&mut Row, &Book),
    ) -> PyResult<Bound<'py, PyAny>> {
        let row = self.book.with(py, |book| {
            let place = book.place.clone();
            let mut row = Row {
                sequence: book.next,
                kind,
                state: place.state,
                task: place.task,
                visit: place.visit,
                attempt: 1,
                version: self.version,
                fingerprint: self.fingerprint,
                run_id: self.run_id,
                recorded_at: now(),
                next_state: None,
                refers_to: None,
                due_at: None,
                is_intent: false,
                payload: None,
                snapshot: None,
            };
            fill(&mut row, book);
            book.written = Some(Written { sequence: row.sequence, kind, due_at: row.due_at });
            row
        });
        let (id, row) = (self.workflow_id.bind(py), PyRow(row));
        let answer = match self.fence.get() {
            Some(fence) => {
                let options = PyDict::new(py);
                options.set_item(intern!(py, "fence"), fence)?;
                self.append.bind(py).call((id, row), Some(&options))?
            }
            None => self.append.bind(py).call1((id, row))?,
        };
        Asyncio::of(py)?.ensure_future(&answer)
    }
}

/// The wall clock, which runs on while no process does.
#[allow(clippy::disallowed_methods, reason = "times of rows; no rule reads them")]
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}
