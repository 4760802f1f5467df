//! `SqliteCheckpointStore`: the SQLite store, its threads, and how they end.
//!
//! ```text
//! thread        does                                                          ends
//! cano-store    commits (`rust/store/writer.rs`), hands over what came of it   when all is written
//! cano-reader   reads and decodes rows, hands them over                        when all is read
//! cano-lease    keeps the lease alive while the store owns a run               at once
//! ```
//!
//! The first two wait for the interpreter when they hand something over, so whoever waits for them to end, lets go of it:
//! closing always does. A store is closed when it is asked to, when its object goes, and when the interpreter ends,
//! whichever comes first. In a child of the process that opened it there are no threads: it refuses everything, and leaves
//! everything as it is.

use std::collections::HashSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::{self, JoinHandle};
use std::time::Duration;
use std::{mem, process};

use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyTuple;

use crate::core::checkpoint::{RowKind, WorkflowId};
use crate::core::claim::{Fence, Refusal, RunFilter};
use crate::store::error::{Failure, OpenReason, StoreError};
use crate::store::file::Trust;
use crate::store::{Answer, Completion, Operation, Settings, Store};

use super::asyncio::Asyncio;
use super::checkpoint_store::{fence_of, filter_of, fresh_owner, limits_of, row_of, run_to_start, store_error};
use super::convert::{duration, flag, refused};
use super::delivery::{GiveBack, Outcome, Waiter, deliver, done};
use super::errors::ConfigurationError;
use super::now::wall;
use super::row::id_of;

const SHORTEST_LEASE: f64 = 0.1;
const LONGEST_LEASE: f64 = 86_400.0;
const USUAL_LEASE: Duration = Duration::from_secs(15);
/// How often the lease is renewed while it lasts.
const BEATS: u32 = 3;

/// What comes back with the outcome of an operation.
struct Ticket {
    /// None for what the store asks for itself.
    waiter: Option<Waiter>,
    /// The fence that the operation shows.
    fence: Option<Fence>,
    /// Whether the claim is given up when it is done.
    is_end: bool,
}

/// The claims that keep the lease alive.
#[derive(Default)]
struct Claims {
    state: Mutex<Held>,
    ended: Condvar,
}

#[derive(Default)]
struct Held {
    fences: HashSet<Fence>,
    is_over: bool,
}

impl Claims {
    fn lock(&self) -> MutexGuard<'_, Held> {
        lock(&self.state)
    }

    fn note(&self, completions: &[Completion<Ticket>]) {
        let mut held = self.lock();
        for Completion { ticket, outcome } in completions {
            let is_lost = matches!(
                outcome,
                Err(StoreError::Refused { refusal: Refusal::Claimed(_) | Refusal::Unclaimed | Refusal::Unknown, .. })
            );
            match (outcome, ticket.fence) {
                (Ok(Answer::Claimed(fence)), _) => drop(held.fences.insert(*fence)),
                (Ok(_), Some(fence)) if ticket.is_end => drop(held.fences.remove(&fence)),
                (Err(_), Some(fence)) if is_lost => drop(held.fences.remove(&fence)),
                _ => {}
            }
        }
    }

    /// Waits for the next beat; whether there is one.
    fn wait(&self, pause: Duration) -> bool {
        let held = self.lock();
        let (held, _) =
            self.ended.wait_timeout_while(held, pause, |held| !held.is_over).unwrap_or_else(PoisonError::into_inner);
        !held.is_over
    }

    fn end(&self) {
        self.lock().is_over = true;
        self.ended.notify_all();
    }
}

enum Question {
    Load(WorkflowId),
    List(RunFilter),
}

/// An open store, as its threads share it.
struct Open {
    process: u32,
    store: Arc<Store<Ticket>>,
    claims: Arc<Claims>,
    lease: Duration,
    questions: Mutex<Option<Sender<(Question, Waiter)>>>,
    /// The reader and the lease, until they are waited for.
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Open {
    fn new(path: &Path, settings: Settings, lease: Duration) -> Result<Self, StoreError> {
        let claims = Arc::new(Claims::default());
        let noted = Arc::clone(&claims);
        let store = Arc::new(Store::open(path, settings, move |completions| {
            noted.note(&completions);
            deliver(completions.into_iter().filter_map(outcome).collect());
        })?);
        let (questions, asked) = mpsc::channel();
        let (reading, renewing, beating) = (Arc::clone(&store), Arc::clone(&store), Arc::clone(&claims));
        let reader = spawn("cano-reader", path, move || {
            for (question, waiter) in asked {
                let answer = catch_unwind(AssertUnwindSafe(|| answer(&reading, question)));
                deliver(vec![(waiter, answer.unwrap_or_else(|_| Outcome::Failed(panicked())))]);
            }
        })?;
        let beat = spawn("cano-lease", path, move || {
            while beating.wait(lease / BEATS) {
                if !beating.lock().fences.is_empty() {
                    // What fails now is tried again at the next beat.
                    let ticket = Ticket { waiter: None, fence: None, is_end: false };
                    let _ = renewing.submit(Operation::Renew { until: end_of(lease) }, ticket);
                }
            }
        })?;
        Ok(Self {
            process: process::id(),
            store,
            claims,
            lease,
            questions: Mutex::new(Some(questions)),
            threads: Mutex::new(vec![reader, beat]),
        })
    }

    fn is_inherited(&self) -> bool {
        self.process != process::id()
    }

    fn ask(&self, question: Question, waiter: Waiter) -> Result<(), StoreError> {
        if self.is_inherited() {
            return Err(StoreError::Forked);
        }
        let questions = lock(&self.questions);
        let questions = questions.as_ref().ok_or(StoreError::Closed)?;
        questions.send((question, waiter)).map_err(|_| StoreError::Closed)
    }

    /// Does what was asked, gives up all claims, and ends the threads; whoever calls it has let go of the interpreter.
    fn close(&self) {
        if self.is_inherited() {
            return;
        }
        lock(&self.questions).take();
        self.claims.end();
        // Who comes second waits as well; but not a thread of a store, in which the object may go: it may be waited for.
        let here = thread::current();
        let is_ours = here.name().is_some_and(|name| name.starts_with("cano-"));
        let threads = if is_ours { self.threads.try_lock().ok() } else { Some(lock(&self.threads)) };
        let Some(mut threads) = threads else { return };
        for thread in threads.drain(..).filter(|thread| thread.thread().id() != here.id()) {
            thread.join().ok();
        }
        self.store.close();
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        if self.is_inherited() {
            mem::forget(self.questions.get_mut().unwrap_or_else(PoisonError::into_inner).take());
            mem::forget(mem::take(self.threads.get_mut().unwrap_or_else(PoisonError::into_inner)));
        } else {
            self.close();
        }
    }
}

fn spawn(name: &str, path: &Path, work: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>, StoreError> {
    let thread = thread::Builder::new().name(name.to_owned()).spawn(work);
    thread.map_err(|error| StoreError::Open { path: path.to_owned(), reason: OpenReason::from(error) })
}

fn panicked() -> StoreError {
    StoreError::Failed { failure: Failure::Other, text: "the reader panicked".to_owned() }
}

fn answer(store: &Store<Ticket>, question: Question) -> Outcome {
    match question {
        Question::Load(id) => store.load_run(&id).map_or_else(Outcome::Failed, Outcome::Rows),
        Question::List(filter) => store.list_runs(&filter).map_or_else(Outcome::Failed, Outcome::Runs),
    }
}

fn outcome(completion: Completion<Ticket>) -> Option<(Waiter, Outcome)> {
    let outcome = match completion.outcome {
        Ok(Answer::Claimed(fence)) => Outcome::Claimed(fence),
        Ok(Answer::Appended(_) | Answer::Done) => Outcome::Done,
        Err(error) => Outcome::Failed(error),
    };
    Some((completion.ticket.waiter?, outcome))
}

/// When a lease that begins now ends, in milliseconds since 1970.
fn end_of(lease: Duration) -> u64 {
    wall() + lease.as_millis() as u64
}

/// Keeps the logs of durable runs in an SQLite file.
#[pyclass(frozen, weakref, module = "cano", name = "SqliteCheckpointStore")]
pub(super) struct PySqliteStore {
    open: Arc<Open>,
    #[pyo3(get)]
    path: String,
    #[pyo3(get)]
    owner: String,
}

impl PySqliteStore {
    fn submit<'py>(
        &self,
        py: Python<'py>,
        operation: Operation,
        give_back: Option<GiveBack>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let (fence, is_end) = match &operation {
            Operation::Append { fence, row, .. } => {
                (*fence, matches!(row.kind, RowKind::Finished | RowKind::NeedsAttention))
            }
            Operation::Clear { fence, .. } => (*fence, true),
            Operation::Release { fence, .. } | Operation::Stop { fence, .. } => (Some(*fence), true),
            Operation::Start { .. } | Operation::Claim { .. } | Operation::Renew { .. } => (None, false),
        };
        awaited(py, give_back, |waiter| {
            self.open.store.submit(operation, Ticket { waiter: Some(waiter), fence, is_end })
        })
    }

    /// What is done with a claim whose caller was cancelled before it knew of it.
    fn give_back(&self, operation: impl FnOnce(Fence) -> Operation + Send + 'static) -> GiveBack {
        let store = Arc::downgrade(&self.open.store);
        Box::new(move |fence| {
            if let Some(store) = store.upgrade() {
                // A store that takes nothing more gives up its claims itself.
                let _ = store.submit(operation(fence), Ticket { waiter: None, fence: Some(fence), is_end: true });
            }
        })
    }
}

/// A future of the running loop, completed by whoever the waiter is sent to.
fn awaited(
    py: Python<'_>,
    give_back: Option<GiveBack>,
    send: impl FnOnce(Waiter) -> Result<(), StoreError>,
) -> PyResult<Bound<'_, PyAny>> {
    let (waiter, future) = Waiter::new(py, give_back)?;
    match send(waiter) {
        Ok(()) => Ok(future),
        Err(error) => {
            Waiter::unsent(py)?;
            Err(store_error(py, error))
        }
    }
}

#[pymethods]
impl PySqliteStore {
    #[new]
    #[pyo3(
        signature = (path, *, lease=None, max_blob=None, max_rows=None, max_bytes=None, allow_insecure_path=None),
        text_signature = "(path, *, lease=15.0, max_blob=2097152, max_rows=50000, max_bytes=52428800, \
            allow_insecure_path=False)"
    )]
    fn new(
        py: Python<'_>,
        path: &Bound<'_, PyAny>,
        lease: Option<&Bound<'_, PyAny>>,
        max_blob: Option<&Bound<'_, PyAny>>,
        max_rows: Option<&Bound<'_, PyAny>>,
        max_bytes: Option<&Bound<'_, PyAny>>,
        allow_insecure_path: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Self> {
        let file: PathBuf = path.extract().map_err(|_| refused("path", "a text or a path", path))?;
        if file.as_os_str() == ":memory:" {
            return Err(ConfigurationError::new_err(
                "path must be that of a file, got ':memory:'; InMemoryCheckpointStore keeps runs in memory",
            ));
        }
        let is_anyones = allow_insecure_path.map_or(Ok(false), |value| flag("allow_insecure_path", value))?;
        let lease = lease.map_or(Ok(USUAL_LEASE), lease_of)?;
        let owner = fresh_owner(py)?;
        let settings = Settings {
            owner: owner.clone(),
            limits: limits_of(max_blob, max_rows, max_bytes)?,
            trust: if is_anyones { Trust::Anyones } else { Trust::Ours },
        };
        let open = py.detach(|| Open::new(&file, settings, lease)).map_err(|error| store_error(py, error))?;
        let open = Arc::new(open);
        close_at_exit(py, &open)?;
        Ok(Self { open, path: file.display().to_string(), owner })
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
        let started = id.clone();
        let give_back = self.give_back(|fence| Operation::Clear { id: started, fence: Some(fence), now: wall() });
        let (now, until) = (wall(), end_of(self.open.lease));
        self.submit(py, Operation::Start { id, workflow, version, now, until }, Some(give_back))
    }

    fn claim<'py>(&self, py: Python<'py>, workflow_id: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        let id = id_of(workflow_id)?;
        let claimed = id.clone();
        let give_back = self.give_back(|fence| Operation::Release { id: claimed, fence, now: wall() });
        self.submit(py, Operation::Claim { id, now: wall(), until: end_of(self.open.lease) }, Some(give_back))
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
        self.submit(py, Operation::Append { id, fence, row }, None)
    }

    fn load_run<'py>(&self, py: Python<'py>, workflow_id: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        let id = id_of(workflow_id)?;
        awaited(py, None, |waiter| self.open.ask(Question::Load(id), waiter))
    }

    #[pyo3(signature = (workflow_id, *, fence=None))]
    fn clear<'py>(
        &self,
        py: Python<'py>,
        workflow_id: &Bound<'py, PyAny>,
        fence: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let (id, fence) = (id_of(workflow_id)?, fence.map(fence_of).transpose()?);
        self.submit(py, Operation::Clear { id, fence, now: wall() }, None)
    }

    #[pyo3(signature = (workflow_id, fence, *, stopped=None), text_signature = "($self, workflow_id, fence, *, stopped=False)")]
    fn release<'py>(
        &self,
        py: Python<'py>,
        workflow_id: &Bound<'py, PyAny>,
        fence: &Bound<'py, PyAny>,
        stopped: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let (id, fence, now) = (id_of(workflow_id)?, fence_of(fence)?, wall());
        let is_stopped = stopped.map_or(Ok(false), |value| flag("stopped", value))?;
        let operation =
            if is_stopped { Operation::Stop { id, fence, now } } else { Operation::Release { id, fence, now } };
        self.submit(py, operation, None)
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
        awaited(py, None, |waiter| self.open.ask(Question::List(filter), waiter))
    }

    fn close(&self, py: Python<'_>) {
        py.detach(|| self.open.close());
    }

    /// Closes in a thread of the loop's executor.
    fn aclose<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        let py = slf.py();
        let event_loop = Asyncio::of(py)?.running_loop(py)?;
        event_loop.call_method1(intern!(py, "run_in_executor"), (py.None(), slf.getattr(intern!(py, "close"))?))
    }

    fn __aenter__<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        done(slf.py(), slf)
    }

    #[pyo3(signature = (*_error))]
    fn __aexit__<'py>(slf: &Bound<'py, Self>, _error: &Bound<'py, PyTuple>) -> PyResult<Bound<'py, PyAny>> {
        Self::aclose(slf)
    }

    fn __repr__(&self) -> String {
        format!("<SqliteCheckpointStore {:?}>", self.path)
    }
}

impl Drop for PySqliteStore {
    fn drop(&mut self) {
        Python::attach(|py| py.detach(|| self.open.close()));
    }
}

fn lease_of(value: &Bound<'_, PyAny>) -> PyResult<Duration> {
    let lease = duration("lease", value)?.as_seconds();
    if !(SHORTEST_LEASE..=LONGEST_LEASE).contains(&lease) {
        return Err(refused("lease", &format!("at least {SHORTEST_LEASE} s and at most {LONGEST_LEASE} s"), value));
    }
    Ok(Duration::from_secs_f64(lease))
}

/// The stores that are closed when the interpreter ends, while their threads can still talk to it.
static OPENED: Mutex<Vec<Weak<Open>>> = Mutex::new(Vec::new());

fn close_at_exit(py: Python<'_>, open: &Arc<Open>) -> PyResult<()> {
    static REGISTERED: PyOnceLock<()> = PyOnceLock::new();
    REGISTERED.get_or_try_init(py, || {
        let close = wrap_pyfunction!(close_stores, py)?;
        py.import("atexit")?.call_method1("register", (close,)).map(drop)
    })?;
    let mut opened = lock(&OPENED);
    opened.retain(|open| open.strong_count() > 0);
    opened.push(Arc::downgrade(open));
    Ok(())
}

#[pyfunction]
fn close_stores(py: Python<'_>) {
    let opened = mem::take(&mut *lock(&OPENED));
    py.detach(|| opened.iter().filter_map(Weak::upgrade).for_each(|open| open.close()));
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
