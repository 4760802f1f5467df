//! A split at run time: its branches, their join, and the future on which the parent waits.
//!
//! Every branch is an `asyncio.Task` with one native done-callback. The core's `Join` counts; what it decides is carried out
//! here: the rest is cancelled, and the parent is woken once, when the join is decided and no branch is alive. Branches that
//! a bulkhead still holds back when the decision falls are never started and count as cancelled.
//!
//! Invariants.
//! - `alive` counts the tasks whose callback has not run; the parent goes on only at zero.
//! - The cell is never borrowed while Python runs: tasks to cancel or start are taken out first.
//! - A callback cannot lose the parent: whatever fails in it becomes the outcome of its branch.

use std::sync::Arc;

use pyo3::exceptions::{PyException, PyRuntimeError};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use pyo3::{PyTraverseError, PyVisit};

use crate::core::join::{Join, JoinVerdict, Outcome};

use super::asyncio::{Asyncio, disarm};
use super::definition::TaskSpec;
use super::drive::{Drive, branch_name};
use super::env::{Env, Failure, RunContext, Scope, arguments};
use super::errors::{CancelledError, from_panic};
use super::result::{End, Ended, SplitResult};
use super::run::{GilCell, Run};
use super::table::JoinSpec;

/// What a branch starts with.
pub(super) enum Start {
    Task(Py<TaskSpec>),
    State(usize),
}

struct Branch {
    /// Taken when the branch is started.
    start: Option<Start>,
    task: Option<Py<PyAny>>,
    ended: Ended,
}

struct State {
    branches: Vec<Branch>,
    join: Join,
    next: usize,
    alive: usize,
    waiter: Option<Py<PyAny>>,
    timer: Option<Py<PyAny>>,
    /// What was thrown into the parent, or a `BaseException` of a branch: nothing more is started, and it leaves the run.
    interrupted: Option<PyErr>,
}

impl State {
    fn goes_on(&self) -> bool {
        self.interrupted.is_none() && self.join.verdict() == JoinVerdict::Undecided
    }
}

/// What the parent finds when it looks.
pub(super) enum Poll<'py> {
    Waiting(Bound<'py, PyAny>),
    Joined(JoinVerdict, SplitResult),
    Interrupted(PyErr),
}

#[pyclass(frozen, module = "cano._core")]
pub(super) struct Split {
    env: Py<Env>,
    scope: Arc<Scope>,
    /// The state that a fork's branches run up to.
    until: usize,
    bulkhead: usize,
    /// The parent's context, for branches that are started later.
    context: Py<PyAny>,
    /// `asyncio.Task`, or `loop.create_task` where a task factory is installed, which then sees every branch.
    make_task: Py<PyAny>,
    /// Keyword arguments for it.
    options: Py<PyDict>,
    state: GilCell<State>,
}

impl Split {
    /// Starts as many branches as the bulkhead lets through.
    pub(super) fn open(run: &Bound<'_, Run>, state: usize, starts: Vec<Start>, spec: &JoinSpec) -> PyResult<Py<Split>> {
        let (py, this) = (run.py(), run.get());
        let env = this.env.get();
        let clock = env.clock(py)?;
        let visit = this.track.with(py, |track| track.visits.get(state).copied().unwrap_or(1));
        let (path, entered) = this.path_copy(py);
        let scope = Scope { parent: this.scope.clone(), state, visit, path: path.into(), entered };
        let event_loop = clock.event_loop.bind(py);
        let options = PyDict::new(py);
        options.set_item(intern!(py, "name"), env.label(py, state))?;
        let has_factory = !event_loop.call_method0(intern!(py, "get_task_factory"))?.is_none();
        let make_task = if has_factory {
            event_loop.getattr(intern!(py, "create_task"))?.unbind()
        } else {
            options.set_item(intern!(py, "loop"), event_loop)?;
            Asyncio::of(py)?.task.clone_ref(py).into_any()
        };
        let join = Join::new(spec.strategy, starts.len(), spec.fail_fast);
        let branches = starts
            .into_iter()
            .map(|start| Branch {
                ended: Ended { name: branch_name(py, env, &start), end: End::Cancelled, elapsed: 0.0 },
                start: Some(start),
                task: None,
            })
            .collect();
        let split = Bound::new(
            py,
            Split {
                env: this.env.clone_ref(py),
                scope: Arc::new(scope),
                until: spec.next,
                bulkhead: spec.bulkhead.unwrap_or(usize::MAX),
                context: Asyncio::of(py)?.copy_context(py)?.unbind(),
                make_task,
                options: options.unbind(),
                state: GilCell::new(State {
                    branches,
                    join,
                    next: 0,
                    alive: 0,
                    waiter: None,
                    timer: None,
                    interrupted: None,
                }),
            },
        )?;
        if let Some(seconds) = spec.timeout {
            let callback = split.getattr(intern!(py, "_time_out"))?;
            let timer = clock.call_at(py, clock.now(py)? + seconds, callback)?;
            split.get().state.with(py, |state| state.timer = Some(timer));
        }
        Self::start(&split, true);
        Ok(split.unbind())
    }

    /// Starts branches while the bulkhead has room and nothing is decided. `at_once`: inside the parent's own step.
    fn start(slf: &Bound<'_, Self>, at_once: bool) {
        let (py, this) = (slf.py(), slf.get());
        loop {
            let next = this.state.with(py, |state| {
                if !state.goes_on() || state.alive >= this.bulkhead || state.next == state.branches.len() {
                    return None;
                }
                let index = state.next;
                state.next += 1;
                state.alive += 1;
                Some((index, state.branches[index].start.take()))
            });
            let Some((index, start)) = next else { return };
            let made = start
                .ok_or_else(|| PyRuntimeError::new_err("a branch was started twice"))
                .and_then(|start| Self::start_one(slf, index, start, at_once));
            match made {
                Ok(task) => this.state.with(py, |state| state.branches[index].task = Some(task)),
                Err(error) => drop(this.record(py, index, Err(error))),
            }
        }
    }

    fn start_one(slf: &Bound<'_, Self>, index: usize, start: Start, at_once: bool) -> PyResult<Py<PyAny>> {
        let (py, this) = (slf.py(), slf.get());
        let env = this.env.get();
        let clock = env.clock(py)?;
        let place = Some((this.scope.clone(), index));
        let started = clock.now(py)?;
        this.state.with(py, |state| state.branches[index].ended.elapsed = started);
        let coroutine = match start {
            Start::Task(task) if task.get().is_plain_coroutine() => {
                let context = || RunContext {
                    env: this.env.clone_ref(py),
                    scope: place.clone(),
                    index: this.scope.state,
                    attempt: 1,
                    visit: this.scope.visit,
                    is_branch: true,
                };
                let plan = task.get().plan.bind(py);
                if plan.get().sources.is_empty() {
                    task.get().call_bare(py)?
                } else {
                    task.get().call(py, arguments(plan, env, context, None)?)?
                }
            }
            Start::Task(task) => {
                let drive = Drive::branch(this.scope.state, task);
                this.driven(py, this.scope.state, drive, place)?
            }
            Start::State(first) => {
                let drive = Drive::machine(first, Some(this.until));
                this.driven(py, first, drive, place)?
            }
        };
        let task = this.make_task(py, coroutine, at_once)?;
        let done = Done { split: slf.clone().unbind(), index };
        task.call_method1(intern!(py, "add_done_callback"), (done,))?;
        Ok(task.unbind())
    }

    /// A branch that needs a run of its own, inside a real coroutine.
    fn driven<'py>(
        &self,
        py: Python<'py>,
        state: usize,
        drive: Drive,
        place: Option<(Arc<Scope>, usize)>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let run = Run::with_drive(self.env.clone_ref(py), state, drive, place);
        self.env.get().table.get().drive.bind(py).call1((run,))
    }

    fn make_task<'py>(
        &self,
        py: Python<'py>,
        coroutine: Bound<'py, PyAny>,
        at_once: bool,
    ) -> PyResult<Bound<'py, PyAny>> {
        let make_task = self.make_task.bind(py);
        let options = self.options.bind(py);
        if at_once {
            return make_task.call((coroutine,), Some(options));
        }
        // Outside the parent's step its context is not the current one; a task copies the one it is made in.
        self.context.bind(py).call_method(intern!(py, "run"), (make_task, coroutine), Some(options))
    }

    /// A branch ended: records it, and carries out what follows.
    fn ended(slf: &Bound<'_, Self>, index: usize, outcome: PyResult<Py<PyAny>>) {
        let (py, this) = (slf.py(), slf.get());
        if this.record(py, index, outcome) {
            Self::start(slf, false);
        }
        this.wake(py);
    }

    /// Records how a branch ended, and cancels the rest if that decides the join. Whether the split goes on.
    fn record(&self, py: Python<'_>, index: usize, outcome: PyResult<Py<PyAny>>) -> bool {
        let now = self.env.get().now(py).unwrap_or_default();
        let (end, counted, fatal) = match outcome {
            Ok(value) => (End::Value(value), Outcome::Succeeded, None),
            Err(error) if error.is_instance_of::<CancelledError>(py) => (End::Cancelled, Outcome::Cancelled, None),
            Err(error) => match Self::as_failure(py, error) {
                Ok(error) => {
                    let error = self.annotate(py, index, error);
                    (End::Error(error.into_value(py).into_any()), Outcome::Failed, None)
                }
                Err(fatal) => (End::Cancelled, Outcome::Cancelled, Some(fatal)),
            },
        };
        let (was_going_on, goes_on, dropped) = self.state.with(py, |state| {
            let was_going_on = state.goes_on();
            state.alive -= 1;
            let branch = &mut state.branches[index];
            branch.ended.elapsed = now - branch.ended.elapsed;
            let dropped = (std::mem::replace(&mut branch.ended.end, end), branch.task.take());
            state.join.branch_ended(counted);
            if let Some(fatal) = fatal
                && state.interrupted.is_none()
            {
                state.interrupted = Some(fatal);
            }
            (was_going_on, state.goes_on(), dropped)
        });
        drop(dropped);
        if was_going_on && !goes_on {
            self.cancel_rest(py, None);
        }
        goes_on
    }

    /// An `Exception` is a failure of its branch; another `BaseException` ends the whole run.
    fn as_failure(py: Python<'_>, error: PyErr) -> Result<PyErr, PyErr> {
        if error.is_instance_of::<PyException>(py) { Ok(error) } else { from_panic(py, error) }
    }

    fn annotate(&self, py: Python<'_>, index: usize, error: PyErr) -> PyErr {
        let name = self.state.with(py, |state| state.branches[index].ended.name.clone_ref(py));
        let failure =
            Failure { state: self.scope.state, task: Some(&name), attempt: 1, max_attempts: 1, branch: Some(index) };
        let path = self.scope.path.iter().copied();
        failure.annotate(py, self.env.get(), path, self.scope.entered, error)
    }

    /// Cancels every branch that is alive.
    fn cancel_rest(&self, py: Python<'_>, message: Option<&Bound<'_, PyAny>>) {
        let tasks: Vec<Py<PyAny>> = self.state.with(py, |state| {
            state.branches.iter().filter_map(|branch| Some(branch.task.as_ref()?.clone_ref(py))).collect()
        });
        for task in tasks {
            let cancelled = match message {
                Some(message) => task.bind(py).call_method1(intern!(py, "cancel"), (message,)),
                None => task.bind(py).call_method0(intern!(py, "cancel")),
            };
            if let Err(error) = cancelled {
                error.write_unraisable(py, Some(task.bind(py)));
            }
        }
    }

    fn is_over(state: &State) -> bool {
        state.alive == 0 && !state.goes_on()
    }

    /// Resolves the parent's future, once nothing is left to wait for.
    fn wake(&self, py: Python<'_>) {
        let waiter = self.state.with(py, |state| if Self::is_over(state) { state.waiter.take() } else { None });
        let Some(waiter) = waiter else { return };
        let waiter = waiter.bind(py);
        let woken = waiter.call_method0(intern!(py, "done")).and_then(|done| done.is_truthy()).and_then(|done| {
            if !done {
                waiter.call_method1(intern!(py, "set_result"), (py.None(),))?;
            }
            Ok(())
        });
        if let Err(error) = woken {
            error.write_unraisable(py, Some(waiter));
        }
    }

    /// An exception was thrown into the parent: it is passed on as a cancel, and leaves the run at the end.
    ///
    /// Of several cancels the newest leaves, with the one before as its context, as from any coroutine that is cancelled while
    /// it cleans up; another exception is never replaced by a cancel.
    pub(super) fn interrupt(&self, py: Python<'_>, error: PyErr) -> PyResult<()> {
        let arguments = error.value(py).getattr(intern!(py, "args"))?;
        let message = arguments.get_item(0).ok();
        let before = self.state.with(py, |state| state.interrupted.take());
        let kept = match before {
            Some(before) if !before.is_instance_of::<CancelledError>(py) => before,
            Some(before) => {
                error.set_context(py, Some(before));
                error
            }
            None => error,
        };
        let replaced = self.state.with(py, |state| state.interrupted.replace(kept));
        drop(replaced);
        self.cancel_rest(py, message.as_ref());
        Ok(())
    }

    /// What the parent has to do now. The result can be taken once.
    pub(super) fn poll<'py>(slf: &Bound<'py, Self>) -> PyResult<Poll<'py>> {
        let (py, this) = (slf.py(), slf.get());
        if !this.state.with(py, |state| Self::is_over(state)) {
            let waiter = this.env.get().clock(py)?.event_loop.bind(py).call_method0(intern!(py, "create_future"))?;
            waiter.setattr(intern!(py, "_asyncio_future_blocking"), true)?;
            let kept = waiter.clone().unbind();
            let old = this.state.with(py, |state| state.waiter.replace(kept));
            drop(old);
            return Ok(Poll::Waiting(waiter));
        }
        let (timer, interrupted, verdict, branches) = this.state.with(py, |state| {
            (state.timer.take(), state.interrupted.take(), state.join.verdict(), std::mem::take(&mut state.branches))
        });
        disarm(py, timer);
        if let Some(error) = interrupted {
            return Ok(Poll::Interrupted(error));
        }
        let ended = branches.into_iter().map(|branch| branch.ended).collect();
        Ok(Poll::Joined(verdict, SplitResult::new(ended)))
    }

    /// The parent is closed: nothing waits for the branches any more, they are cancelled.
    pub(super) fn close(&self, py: Python<'_>) -> PyResult<()> {
        let timer = self.state.with(py, |state| state.timer.take());
        disarm(py, timer);
        self.interrupt(py, CancelledError::new_err(()))
    }
}

#[pymethods]
impl Split {
    /// The event loop's timer calls this.
    fn _time_out(&self, py: Python<'_>) {
        let decided = self.state.with(py, |state| {
            let was_going_on = state.goes_on();
            let timer = state.timer.take();
            if was_going_on {
                state.join.timed_out();
            }
            (was_going_on, timer)
        });
        if decided.0 {
            self.cancel_rest(py, None);
        }
        self.wake(py);
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.env)?;
        visit.call(&self.context)?;
        visit.call(&self.make_task)?;
        visit.call(&self.options)?;
        self.state
            .peek(|state| {
                visit.call(&state.waiter)?;
                visit.call(&state.timer)?;
                for branch in &state.branches {
                    visit.call(&branch.task)?;
                    if let Some(Start::Task(task)) = &branch.start {
                        visit.call(task)?;
                    }
                    if let End::Value(object) | End::Error(object) = &branch.ended.end {
                        visit.call(object)?;
                    }
                }
                Ok(())
            })
            .unwrap_or(Ok(()))
    }
}

/// The done-callback of one branch's task.
#[pyclass(frozen, module = "cano._core")]
struct Done {
    split: Py<Split>,
    index: usize,
}

#[pymethods]
impl Done {
    fn __call__(&self, task: &Bound<'_, PyAny>) {
        let py = task.py();
        let outcome = task.call_method0(intern!(py, "result")).map(Bound::unbind);
        Split::ended(self.split.bind(py), self.index, outcome);
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.split)
    }
}
