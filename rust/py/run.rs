//! `Run`: the awaitable that carries one workflow run, and the one way to step a coroutine.
//!
//! Model. A `Run` is an iterator in the sense of `await`: each `__next__`, `send` or `throw` takes the `Drive` out of its
//! cell, lets it go on until the user's code suspends or the run ends, and puts it back. While the drive is out, the user's
//! code runs; it may look at the run (`state`, `path`) or call it again (refused), but finds no borrowed cell.
//!
//! Invariants.
//! - No cell is borrowed while Python runs: what is inside is taken out or copied first, and Python objects are dropped
//!   outside. `GilCell` panics if this is broken, it never aliases.
//! - A run belongs to the thread that stepped it first.
//! - However a run ends, its timer is cancelled and its drive dropped, so that nothing keeps its objects alive.
//!
//! What is yielded goes up unchanged: it is the event loop's affair.

use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, OnceLock};
use std::thread::{self, ThreadId};

use pyo3::exceptions::{PyRuntimeError, PyStopIteration};
use pyo3::prelude::*;
use pyo3::types::{PyIterator, PySendResult, PyString, PyTuple};
use pyo3::{PyTraverseError, PyTypeInfo, PyVisit, ffi, intern};

use crate::core::resume::Resumption;

use super::definition::TaskSpec;
use super::drive::{Advance, Drive, Items};
use super::env::{Budget, Env, Scope};
use super::errors::{TaskExecutionError, thrown};
use super::failure::{Failure, Trail};
use super::log::{Log, Resumed};
use super::saga::Completion;
use super::split::Split;
use super::table::Table;

/// A cell for state that only the holder of the interpreter's lock touches.
pub(super) struct GilCell<T>(RefCell<T>);

// SAFETY: the content is reached through `with` alone, which asks for the `Python` token, so accesses of two threads are
// ordered by the interpreter's lock (the module declares `gil_used = true`); two accesses of one thread are kept apart by
// the RefCell.
#[allow(unsafe_code, reason = "the reason stands above")]
unsafe impl<T: Send> Sync for GilCell<T> {}

impl<T> GilCell<T> {
    pub(super) fn new(content: T) -> Self {
        Self(RefCell::new(content))
    }

    /// Looks at or changes the content. `access` must not call Python, nor drop a Python object.
    #[inline]
    pub(super) fn with<R>(&self, _py: Python<'_>, access: impl FnOnce(&mut T) -> R) -> R {
        access(&mut self.0.borrow_mut())
    }

    /// For the collector, which runs with the lock held and calls no Python.
    pub(super) fn peek<R>(&self, access: impl FnOnce(&T) -> R) -> Option<R> {
        self.0.try_borrow().ok().map(|content| access(&content))
    }

    /// The same, to take something out.
    pub(super) fn peek_mut<R>(&self, access: impl FnOnce(&mut T) -> R) -> Option<R> {
        self.0.try_borrow_mut().ok().map(|mut content| access(&mut content))
    }
}

/// What a coroutine is resumed with.
pub(super) enum Input<'py> {
    Send(Bound<'py, PyAny>),
    Throw(PyErr),
}

impl<'py> Input<'py> {
    pub(super) fn nothing(py: Python<'py>) -> Self {
        Input::Send(py.None().into_bound(py))
    }
}

/// What a coroutine did when it was resumed.
pub(super) enum Step<'py> {
    Yielded(Bound<'py, PyAny>),
    Returned(Bound<'py, PyAny>),
    Raised(PyErr),
}

/// Whether this is exactly a coroutine of an `async def`.
#[inline]
pub(super) fn is_coroutine(value: &Bound<'_, PyAny>) -> bool {
    std::ptr::eq(value.get_type_ptr(), &raw const ffi::PyCoro_Type)
}

/// Resumes a coroutine, or the iterator of an awaitable.
#[inline]
pub(super) fn step<'py>(inner: &Bound<'py, PyAny>, input: Input<'py>) -> Step<'py> {
    match input {
        Input::Send(value) => {
            // SAFETY: `PyIterator::send` is `PyIter_Send`, which takes any object that has `am_send`, `tp_iternext` or a
            // `send` method, and raises for one that has none; the cast claims no more than that.
            #[allow(unsafe_code, reason = "the reason stands above")]
            let iterator = unsafe { inner.cast_unchecked::<PyIterator>() };
            match iterator.send(&value) {
                Ok(PySendResult::Next(value)) => Step::Yielded(value),
                Ok(PySendResult::Return(value)) => Step::Returned(value),
                Err(error) => Step::Raised(error),
            }
        }
        Input::Throw(error) => throw(inner, error),
    }
}

/// Throws into a coroutine; an iterator that has no `throw` just ends with the exception (PEP 380).
fn throw<'py>(inner: &Bound<'py, PyAny>, error: PyErr) -> Step<'py> {
    let py = inner.py();
    let name = intern!(py, "throw");
    let error = error.into_value(py);
    let came = if is_coroutine(inner) {
        inner.call_method1(name, (error,))
    } else {
        match inner.getattr_opt(name) {
            Ok(Some(method)) => method.call1((error,)),
            Ok(None) => return Step::Raised(PyErr::from_value(error.into_bound(py).into_any())),
            Err(problem) => return Step::Raised(problem),
        }
    };
    match came {
        Ok(value) => Step::Yielded(value),
        Err(error) if error.is_instance_of::<PyStopIteration>(py) => {
            match error.value(py).getattr(intern!(py, "value")) {
                Ok(value) => Step::Returned(value),
                Err(problem) => Step::Raised(problem),
            }
        }
        Err(error) => Step::Raised(error),
    }
}

/// Where a run is, for whoever looks at it from outside.
#[derive(Default)]
pub(super) struct Track {
    pub(super) state: usize,
    /// The newest states entered, oldest first.
    pub(super) path: VecDeque<u32>,
    pub(super) entered: u64,
    /// Entries by state; empty where nobody asks.
    pub(super) visits: Vec<u32>,
    over: bool,
}

impl Track {
    /// How many states of the path are kept.
    const KEPT: usize = 256;

    /// Takes over how far the run had come.
    fn resume(&mut self, py: Python<'_>, table: &Table, found: &Resumption) {
        let labels: HashMap<String, usize> =
            table.states.iter().enumerate().map(|(index, state)| (state.label.bind(py).to_string(), index)).collect();
        self.visits.resize(table.states.len(), 0);
        for (label, count) in &found.visits {
            if let Some(index) = labels.get(label) {
                self.visits[*index] = *count;
            }
        }
        self.entered = found.path.len() as u64;
        let known = found.path.iter().filter_map(|label| labels.get(label).map(|index| *index as u32));
        self.path.extend(known.skip(found.path.len().saturating_sub(Self::KEPT - 1)));
    }

    pub(super) fn enter(&mut self, state: usize, counted_states: usize) {
        self.state = state;
        self.entered += 1;
        if self.path.len() == Self::KEPT {
            self.path.pop_front();
        }
        self.path.push_back(state as u32);
        if counted_states > 0 {
            self.visits.resize(counted_states, 0);
            self.visits[state] += 1;
        }
    }
}

/// One run of a workflow, or of one branch of a split.
#[pyclass(frozen, weakref, module = "cano._core")]
pub(super) struct Run {
    pub(super) env: Py<Env>,
    pub(super) track: GilCell<Track>,
    /// Of a branch: where it was split off, and its index.
    pub(super) scope: Option<(Arc<Scope>, usize)>,
    /// Of a branch: the split that calls it when a deadline is due.
    pub(super) split: Option<Py<Split>>,
    /// Whether another run looks after the budget: a branch's parent, or the run whose task made this one.
    is_part: bool,
    drive: GilCell<Option<Box<Drive>>>,
    owner: OnceLock<ThreadId>,
}

impl Run {
    pub(super) fn with_drive(
        env: Py<Env>,
        state: usize,
        drive: Drive,
        scope: Option<(Arc<Scope>, usize)>,
        split: Option<Py<Split>>,
    ) -> Self {
        Self {
            env,
            track: GilCell::new(Track { state, ..Track::default() }),
            is_part: scope.is_some(),
            scope,
            split,
            drive: GilCell::new(Some(Box::new(drive))),
            owner: OnceLock::new(),
        }
    }

    /// A part of this run, beside its present task: branches that come one after the other.
    fn part(&self, py: Python<'_>, items: Items) -> Self {
        let (path, entered) = self.path_copy(py);
        let (state, visits) = self.track.with(py, |track| (track.state, track.visits.clone()));
        let drive = Drive::items(state, items);
        let mut part = Self::with_drive(self.env.clone_ref(py), state, drive, self.scope.clone(), None);
        part.track = GilCell::new(Track { state, path: path.into(), entered, visits, over: false });
        part.is_part = true;
        part
    }

    /// The drive, if the run is suspended; refused on a foreign thread.
    fn take(&self, py: Python<'_>) -> PyResult<Option<Box<Drive>>> {
        if *self.owner.get_or_init(|| thread::current().id()) != thread::current().id() {
            return Err(PyRuntimeError::new_err(
                "a run belongs to the thread that started it; use loop.call_soon_threadsafe()",
            ));
        }
        Ok(self.drive.with(py, Option::take))
    }

    fn put(&self, py: Python<'_>, drive: Box<Drive>) {
        self.drive.with(py, |cell| *cell = Some(drive));
    }

    pub(super) fn is_over(&self, py: Python<'_>) -> bool {
        self.track.with(py, |track| track.over)
    }

    /// The whole-run timeout, if this run has a timer for it: what it is a part of has one, and cancels it.
    pub(super) fn budget(&self) -> Option<Budget> {
        self.env.get().budget.filter(|_| !self.is_part)
    }

    /// The error, if the budget is used up by now.
    pub(super) fn check_budget(&self, py: Python<'_>) -> PyResult<Option<PyErr>> {
        let env = self.env.get();
        match env.budget {
            Some(budget) if env.now(py)? >= budget.deadline => Ok(Some(env.timed_out(py, budget))),
            _ => Ok(None),
        }
    }

    /// The note for a failure in the present state, outside any attempt.
    fn failure(&self, py: Python<'_>) -> Failure<'static> {
        Failure {
            state: self.track.with(py, |track| track.state),
            task: None,
            attempt: 0,
            max_attempts: 0,
            branch: self.scope.as_ref().map(|(_, branch)| *branch),
        }
    }

    /// Where the run writes its rows, if it is durable; a part of a run writes none.
    #[inline]
    pub(super) fn durable(&self) -> Option<&Py<Log>> {
        self.env.get().log.as_ref().filter(|_| !self.is_part)
    }

    /// A copy of the path, newest last, and how many states were entered in all.
    pub(super) fn path_copy(&self, py: Python<'_>) -> (Vec<u32>, u64) {
        let own = self.track.with(py, |track| (track.path.iter().copied().collect::<Vec<u32>>(), track.entered));
        match &self.scope {
            Some((scope, _)) if own.1 == 0 => (scope.path.to_vec(), scope.entered),
            _ => own,
        }
    }

    /// Annotates the exception that ends the run, and hands it back.
    pub(super) fn annotate(&self, py: Python<'_>, failure: &Failure<'_>, error: PyErr) -> PyErr {
        if let Err(problem) = self.annotate_value(py, failure, error.value(py)) {
            problem.write_unraisable(py, None);
        }
        error
    }

    pub(super) fn annotate_value(
        &self,
        py: Python<'_>,
        failure: &Failure<'_>,
        error: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        failure.annotate(py, self.env.get(), &self.trail(py)?, error);
        Ok(())
    }

    fn trail(&self, py: Python<'_>) -> PyResult<Trail> {
        let (path, entered) = self.path_copy(py);
        Trail::new(py, self.env.get(), &path, entered)
    }

    /// The same for who calls it as an iterator.
    fn iterate<'py>(slf: &Bound<'py, Self>, input: Input<'py>) -> PyResult<Bound<'py, PyAny>> {
        match Self::resume(slf, input)? {
            Advance::Suspended(value) => Ok(value),
            // Made at once: the lazy form costs three times as much.
            Advance::Finished(value) => Err(PyErr::from_value(slf.py().get_type::<PyStopIteration>().call1((value,))?)),
        }
    }

    fn resume<'py>(slf: &Bound<'py, Self>, input: Input<'py>) -> PyResult<Advance<'py>> {
        let (py, run) = (slf.py(), slf.get());
        let Some(mut drive) = run.take(py)? else {
            return Err(match input {
                Input::Throw(error) => error,
                Input::Send(_) if run.track.with(py, |track| track.over) => {
                    PyRuntimeError::new_err("a run can be awaited only once")
                }
                Input::Send(_) => PyRuntimeError::new_err("the run is already being awaited"),
            });
        };
        let advance = catch_unwind(AssertUnwindSafe(|| drive.advance(slf, input)));
        let outcome = match advance {
            Ok(Ok(Advance::Suspended(value))) => {
                run.put(py, drive);
                return Ok(Advance::Suspended(value));
            }
            Ok(outcome) => outcome,
            Err(panic) => {
                let text = panic
                    .downcast_ref::<&str>()
                    .map(|text| (*text).to_owned())
                    .or_else(|| panic.downcast_ref::<String>().cloned())
                    .unwrap_or_else(|| "no text".to_owned());
                let text = format!("panic: {text} (a bug in cano, please report it)");
                Err(run.annotate(py, &run.failure(py), TaskExecutionError::new_err(text)))
            }
        };
        run.track.with(py, |track| track.over = true);
        drive.stop(py);
        outcome
    }
}

#[pymethods]
impl Run {
    #[new]
    #[pyo3(signature = (table, state, resources, workflow_id, timeout, data=None, log=None, resumed=None, /))]
    #[allow(clippy::too_many_arguments, reason = "all that a run is made of")]
    fn new(
        py: Python<'_>,
        table: Py<Table>,
        state: &Bound<'_, PyAny>,
        resources: Py<PyAny>,
        workflow_id: Option<Py<PyString>>,
        timeout: Option<f64>,
        data: Option<Py<PyAny>>,
        log: Option<Py<Log>>,
        resumed: Option<&Bound<'_, Resumed>>,
    ) -> PyResult<Self> {
        let state = table.get().initial(state)?;
        let mut track = Track { state, ..Track::default() };
        if let Some(resumed) = resumed {
            track.resume(py, table.get(), &resumed.get().found);
        }
        let mut drive = Drive::machine(state, None);
        if let Some(log) = log.as_ref().filter(|_| table.get().states[state].has_steps()) {
            drive.cursor = log.get().take_cursor(py);
        }
        let env = Py::new(py, Env::new(py, table, resources, workflow_id, timeout, data, log)?)?;
        if let Some(resumed) = resumed {
            drive.resume(py, &env, &resumed.get().found)?;
        }
        let mut run = Self::with_drive(env, state, drive, None, None);
        run.track = GilCell::new(track);
        Ok(run)
    }

    fn __await__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    fn __iter__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    fn __next__<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        Self::iterate(slf, Input::nothing(slf.py()))
    }

    fn send<'py>(slf: &Bound<'py, Self>, value: Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        Self::iterate(slf, Input::Send(value))
    }

    #[pyo3(signature = (kind, value=None, traceback=None, /))]
    fn throw<'py>(
        slf: &Bound<'py, Self>,
        kind: Bound<'py, PyAny>,
        value: Option<Bound<'py, PyAny>>,
        traceback: Option<Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        Self::iterate(slf, Input::Throw(PyErr::from_value(thrown(kind, value, traceback)?)))
    }

    /// Ends the run without another step: what it runs is closed, its branches are cancelled.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        if let Some(mut drive) = self.take(py)? {
            self.track.with(py, |track| track.over = true);
            let closed = drive.close(py);
            drive.stop(py);
            closed?;
        }
        Ok(())
    }

    /// The event loop's timer calls this.
    pub(super) fn _fire(slf: &Bound<'_, Self>) -> PyResult<()> {
        let (py, run) = (slf.py(), slf.get());
        let Some(mut drive) = run.take(py)? else {
            return Ok(());
        };
        let host = drive.timer_fired(slf);
        run.put(py, drive);
        if let Some(host) = host? {
            host.bind(py).call_method0(intern!(py, "cancel"))?;
        }
        Ok(())
    }

    #[getter]
    fn state(&self, py: Python<'_>) -> Py<PyAny> {
        let state = self.track.with(py, |track| track.state);
        self.env.get().state(py, state).clone().unbind()
    }

    #[getter]
    fn path<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        let (path, _) = self.path_copy(py);
        self.env.get().path(py, path.into_iter())
    }

    #[getter]
    fn id(&self, py: Python<'_>) -> PyResult<Py<PyString>> {
        match &self.env.get().workflow_id {
            Some(id) => Ok(id.clone_ref(py)),
            None => self.env.get().run_id(py),
        }
    }

    #[getter]
    fn resources(&self, py: Python<'_>) -> Py<PyAny> {
        self.env.get().resources.clone_ref(py)
    }

    /// Where a durable run writes its rows; None for another one, and for a part of a run.
    #[getter]
    fn log(&self, py: Python<'_>) -> Option<Py<Log>> {
        self.durable().map(|log| log.clone_ref(py))
    }

    /// The label of a state of the workflow; None for anything else.
    fn label_of(&self, state: &Bound<'_, PyAny>) -> PyResult<Option<Py<PyString>>> {
        let table = self.env.get().table.get();
        Ok(table.find(state)?.map(|index| table.states[index].label.clone_ref(state.py())))
    }

    /// When the budget of the whole run ends, in the loop's time; None without one.
    #[getter]
    fn deadline(&self) -> Option<f64> {
        self.env.get().budget.map(|budget| budget.deadline)
    }

    /// `WorkflowTimeoutError` for a budget that ended outside the state loop.
    fn timed_out(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        let env = self.env.get();
        let budget = env.budget.ok_or_else(|| PyRuntimeError::new_err("the run has no budget"))?;
        let error = env.timed_out(py, budget);
        Ok(self.annotate(py, &self.failure(py), error).into_value(py).into_any())
    }

    /// Annotates an exception that was made for the run outside of it.
    #[pyo3(name = "annotate")]
    fn annotate_in_python(&self, error: &Bound<'_, PyAny>) -> PyResult<()> {
        let py = error.py();
        self.annotate_value(py, &self.failure(py), error)
    }

    /// Does a task on items as they come, so many at once, and gives the `SplitResult`.
    #[pyo3(signature = (task, iterator, feeder, concurrency, /))]
    fn each(
        &self,
        py: Python<'_>,
        task: Py<TaskSpec>,
        iterator: Option<Py<PyAny>>,
        feeder: Option<Py<PyAny>>,
        concurrency: usize,
    ) -> Self {
        self.part(py, Items { task, iterator, feeder, concurrency })
    }

    /// A compensatable step of this run, as a row of its log tells of it.
    #[pyo3(signature = (state, task, visit, sequence, output, /))]
    fn completion(
        &self,
        py: Python<'_>,
        state: &str,
        task: &str,
        visit: u32,
        sequence: u64,
        output: Option<Py<PyAny>>,
    ) -> Completion {
        Completion::stored(py, &self.env, (state, task), visit, sequence, output)
    }

    #[getter]
    fn cr_await(&self, py: Python<'_>) -> Option<Py<PyAny>> {
        self.drive.with(py, |drive| drive.as_ref().and_then(|drive| drive.awaiting(py)))
    }

    #[getter]
    fn cr_running(&self, py: Python<'_>) -> bool {
        !self.track.with(py, |track| track.over) && self.drive.with(py, |drive| drive.is_none())
    }

    #[getter]
    fn cr_frame(&self, py: Python<'_>) -> PyResult<Option<Py<PyAny>>> {
        self.of_inner(py, "cr_frame")
    }

    #[getter]
    fn cr_code(&self, py: Python<'_>) -> PyResult<Option<Py<PyAny>>> {
        self.of_inner(py, "cr_code")
    }

    fn __repr__(&self, py: Python<'_>) -> PyResult<String> {
        let (state, entered, over) = self.track.with(py, |track| (track.state, track.entered, track.over));
        let label = self.env.get().label(py, state).to_cow()?;
        let over = if over { " over" } else { "" };
        Ok(format!("<Run state={label} entered={entered}{over}>"))
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.env)?;
        visit.call(&self.split)?;
        self.drive.peek(|drive| drive.as_ref().map_or(Ok(()), |drive| drive.traverse(&visit))).unwrap_or(Ok(()))
    }

    fn __clear__(&self) {
        drop(self.drive.peek_mut(Option::take));
    }
}

impl Run {
    fn of_inner(&self, py: Python<'_>, name: &str) -> PyResult<Option<Py<PyAny>>> {
        match self.cr_await(py) {
            Some(inner) => Ok(inner.bind(py).getattr_opt(name)?.map(Bound::unbind)),
            None => Ok(None),
        }
    }
}

/// Lets `await` of a run on Python 3.11 take its result as it is, not out of a `StopIteration`; 3.12 does not ask any more.
#[allow(unsafe_code, reason = "pyo3 has no such slot")]
pub(super) fn install_send(py: Python<'_>) {
    // SAFETY: a heap type, which pyo3 made, and nobody has used yet.
    unsafe {
        let class = Run::type_object_raw(py).cast::<ffi::PyHeapTypeObject>();
        (*class).as_async.am_send = Some(am_send);
    }
}

#[allow(unsafe_code, reason = "the interpreter calls it")]
unsafe extern "C" fn am_send(
    run: *mut ffi::PyObject,
    value: *mut ffi::PyObject,
    result: *mut *mut ffi::PyObject,
) -> ffi::PySendResult {
    // SAFETY: called by a thread that is attached, with valid references and a place for the result; the type has the slot
    // of its instances alone. Panics are caught in `resume`.
    unsafe {
        Python::attach_unchecked(|py| {
            let run = Bound::from_borrowed_ptr(py, run);
            let value = Bound::from_borrowed_ptr(py, value);
            let (came, status) = match Run::resume(run.cast_unchecked::<Run>(), Input::Send(value)) {
                Ok(Advance::Suspended(value)) => (value.into_ptr(), ffi::PySendResult::PYGEN_NEXT),
                Ok(Advance::Finished(value)) => (value.into_ptr(), ffi::PySendResult::PYGEN_RETURN),
                Err(error) => {
                    error.restore(py);
                    (std::ptr::null_mut(), ffi::PySendResult::PYGEN_ERROR)
                }
            };
            result.write(came);
            status
        })
    }
}
