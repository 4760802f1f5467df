//! A split at run time: its branches, their join, and the future on which the parent waits.
//!
//! The core's `Join` counts; what it decides is carried out here: the rest is cancelled, and the parent is woken once, when
//! the join is decided and no branch is alive. Branches that a bulkhead still holds back when the decision falls are never
//! started and count as cancelled.
//!
//! A branch is a native `Branch`, started inside the parent's step; or an `asyncio.Task` with one native done-callback, where
//! the loop is in debug mode, has a task factory, or somebody asked for it (compatibility mode).
//!
//! Invariants.
//! - `alive` counts the branches that have started and not ended; the parent goes on only at zero.
//! - The cell is never borrowed while Python runs: branches to cancel, start or step are taken out first.
//! - A callback cannot lose the parent: whatever fails in it becomes the outcome of its branch.

use std::cell::Cell;
use std::collections::VecDeque;
use std::sync::Arc;

use pyo3::exceptions::{PyBaseException, PyException, PyRuntimeError};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyString};
use pyo3::{PyTraverseError, PyVisit};

use crate::core::join::{Join, JoinVerdict, Outcome};

use super::asyncio::{Asyncio, Clock, disarm};
use super::branch;
use super::bulkhead::Grant;
use super::current::Seat;
use super::definition::TaskSpec;
use super::drive::{Drive, TURN};
use super::env::{Env, Handed, RunContext, Scope, arguments};
use super::errors::{CancelledError, from_panic};
use super::failure::is_out_of_budget;
use super::feed::{FEEDER, Feed, cancelled_itself};
use super::gates::Gates;
use super::result::{End, Ended, Origin, SplitResult};
use super::route::branch_name;
use super::run::{GilCell, Run};
use super::table::JoinSpec;
use super::waiter::Waiter;

/// What a branch starts with.
pub(super) enum Start {
    Task(Py<TaskSpec>),
    /// A task that takes an item before its other arguments.
    Item(Py<TaskSpec>, Py<PyAny>),
    State(usize),
}

pub(super) struct Branch {
    /// Taken when the branch is started.
    start: Option<Start>,
    task: Option<Py<PyAny>>,
    ended: Ended,
}

impl Branch {
    pub(super) fn new(py: Python<'_>, env: &Env, start: Start) -> Self {
        Self {
            ended: Ended { name: branch_name(py, env, &start), end: End::Cancelled, elapsed: 0.0 },
            start: Some(start),
            task: None,
        }
    }
}

pub(super) struct State {
    pub(super) branches: Vec<Branch>,
    pub(super) join: Join,
    next: usize,
    pub(super) gates: Option<Box<Gates>>,
    pub(super) alive: usize,
    pub(super) waiter: Option<Py<Waiter>>,
    timer: Option<Py<PyAny>>,
    /// When attempts of branches are over, earliest first, and the timer for the first.
    pub(super) deadlines: VecDeque<(f64, Py<Run>)>,
    pub(super) deadline_timer: Option<Py<PyAny>>,
    /// Native branches that want another turn, oldest first.
    pub(super) queued: Vec<Py<PyAny>>,
    /// Those that handles on the loop will step, one handle for each batch: a branch that lets others run first does so
    /// for all that was scheduled before, as a task does.
    pub(super) batches: VecDeque<Vec<Py<PyAny>>>,
    /// Whether done-callbacks of branches are on their way, which come before the parent.
    is_told: bool,
    /// Whether the parent is gone.
    pub(super) is_abandoned: bool,
    /// Whether branches are being started further up the stack.
    is_starting: bool,
    /// When a branch ended that was started by the loop which is still at it: then the next one starts.
    last_end: Option<f64>,
    /// Where further branches come from.
    pub(super) feed: Option<Feed>,
    /// What was thrown into the parent, or a `BaseException` of a branch: nothing more is started, and it leaves the run.
    pub(super) interrupted: Option<PyErr>,
}

impl State {
    pub(super) fn goes_on(&self) -> bool {
        self.interrupted.is_none() && self.join.verdict() == JoinVerdict::Undecided
    }

    /// Whether another branch may start, if there is one; the feeder takes nobody's place.
    pub(super) fn has_room(&self, bulkhead: usize) -> bool {
        let feeders = usize::from(self.feed.as_ref().is_some_and(|feed| feed.is_feeding));
        self.goes_on() && self.alive - feeders < bulkhead
    }

    /// The task of a branch, or of the feeder.
    fn task(&mut self, index: usize) -> Option<&mut Option<Py<PyAny>>> {
        if index == FEEDER {
            return self.feed.as_mut().map(|feed| &mut feed.feeder);
        }
        self.branches.get_mut(index).map(|branch| &mut branch.task)
    }

    /// How many branches have been started.
    pub(super) fn started(&self) -> usize {
        self.next
    }

    /// Whether there are branches that have not been started.
    pub(super) fn has_more(&self) -> bool {
        self.next < self.branches.len()
    }

    /// When the branch that was started last began, if it is alive.
    pub(super) fn newest_began(&self) -> Option<f64> {
        let newest = self.branches.get(self.next.checked_sub(1)?)?;
        newest.task.as_ref().map(|_| newest.ended.elapsed)
    }
}

/// What came of a branch: its value, or the exception it raised.
pub(super) type Came = Result<Py<PyAny>, Py<PyBaseException>>;

/// What the parent finds when it looks.
pub(super) enum Poll<'py> {
    Waiting(Bound<'py, PyAny>),
    /// All living branches are queued: the parent gives the loop a turn, then `resumed` steps them.
    Turn,
    Joined(JoinVerdict, SplitResult),
    Interrupted(PyErr),
}

/// How the branches of a split are run.
enum Mode {
    Native,
    /// `asyncio.Task`, or `loop.create_task` where a task factory is installed, which then sees every branch; and the keyword
    /// arguments for it.
    Compatible {
        make_task: Py<PyAny>,
        options: Py<PyDict>,
    },
}

thread_local! {
    /// How many splits are starting branches inside one another's steps.
    static DEPTH: Cell<u32> = const { Cell::new(0) };
}

/// Splits nested deeper than this start their branches in a turn of the loop, so that nesting uses no stack.
const DEPTH_LIMIT: u32 = 32;

#[pyclass(frozen, module = "cano._core")]
pub(super) struct Split {
    pub(super) env: Py<Env>,
    scope: Arc<Scope>,
    /// The state that a fork's branches run up to.
    until: usize,
    pub(super) bulkhead: usize,
    /// Whether `gates` hold branches back as well.
    is_gated: bool,
    /// The parent's context, for branches that are started later; None where all start at once.
    pub(super) context: Option<Py<PyAny>>,
    event_loop: Py<PyAny>,
    mode: Mode,
    pub(super) state: GilCell<State>,
}

impl Split {
    /// Starts as many branches as the bulkhead lets through.
    pub(super) fn open(run: &Bound<'_, Run>, state: usize, starts: Vec<Start>, spec: &JoinSpec) -> PyResult<Py<Split>> {
        let join = Join::new(spec.strategy, starts.len(), spec.fail_fast);
        let split = Self::new(run, state, starts, join, spec, None)?;
        Self::begin(&split, spec.timeout, None)?;
        Ok(split.unbind())
    }

    pub(super) fn new<'py>(
        run: &Bound<'py, Run>,
        state: usize,
        starts: Vec<Start>,
        join: Join,
        spec: &JoinSpec,
        feed: Option<Feed>,
    ) -> PyResult<Bound<'py, Split>> {
        let (py, this) = (run.py(), run.get());
        let env = this.env.get();
        let clock = env.clock(py)?;
        let visit = this.track.with(py, |track| track.visits.get(state).copied().unwrap_or(1));
        let (path, entered) = this.path_copy(py);
        let scope = Scope { parent: this.scope.clone(), state, visit, path: path.into(), entered };
        let has_parent = branch::is_chosen(py) && !branch::is_free(clock.event_loop.bind(py))?;
        let mode = Mode::choose(py, clock, env.label(py, state), has_parent)?;
        let branches = starts.into_iter().map(|start| Branch::new(py, env, start)).collect();
        let gates = Gates::of(py, spec);
        Bound::new(
            py,
            Split {
                env: this.env.clone_ref(py),
                scope: Arc::new(scope),
                until: spec.next,
                bulkhead: spec.bulkhead.unwrap_or(usize::MAX),
                is_gated: gates.is_some(),
                context: spec.starts_late().then(|| branch::copy_context(py).map(Bound::unbind)).transpose()?,
                event_loop: clock.event_loop.clone_ref(py),
                mode,
                state: GilCell::new(State {
                    branches,
                    join,
                    next: 0,
                    gates,
                    alive: 0,
                    waiter: None,
                    timer: None,
                    deadlines: VecDeque::new(),
                    deadline_timer: None,
                    queued: Vec::new(),
                    batches: VecDeque::new(),
                    is_told: false,
                    is_abandoned: false,
                    is_starting: false,
                    last_end: None,
                    feed,
                    interrupted: None,
                }),
            },
        )
    }

    /// Starts as many branches as the bulkhead lets through, inside the parent's step.
    pub(super) fn begin(slf: &Bound<'_, Self>, timeout: Option<f64>, feeder: Option<Bound<'_, PyAny>>) -> PyResult<()> {
        let (py, this) = (slf.py(), slf.get());
        if let Some(seconds) = timeout {
            let clock = this.env.get().clock(py)?;
            let timer = clock.call_at(py, clock.now(py)? + seconds, slf.getattr(intern!(py, "_time_out"))?)?;
            this.state.with(py, |state| state.timer = Some(timer));
        }
        let _seat = this.seat(py)?;
        if let Some(feeder) = feeder {
            this.state.with(py, |state| {
                state.alive += 1;
                state.feed.as_mut().map(|feed| feed.is_feeding = true)
            });
            Self::start_coroutine(slf, FEEDER, feeder, true)?;
        }
        Self::start(slf, true);
        Ok(())
    }

    /// The place of the current task, where branches are stepped in it.
    pub(super) fn seat<'py, 'a>(&'a self, py: Python<'py>) -> PyResult<Option<Seat<'py, 'a>>> {
        match self.mode {
            Mode::Native => branch::seat(self.event_loop(py)).map(Some),
            Mode::Compatible { .. } => Ok(None),
        }
    }

    /// Starts branches while the bulkhead has room and nothing is decided. `at_once`: inside the parent's own step.
    pub(super) fn start(slf: &Bound<'_, Self>, at_once: bool) {
        let (py, this) = (slf.py(), slf.get());
        // A branch that ends while it is started leaves its place to the loop below, not to one within it.
        if this.state.with(py, |state| std::mem::replace(&mut state.is_starting, true)) {
            return;
        }
        DEPTH.set(DEPTH.get() + 1);
        let mut taken = 0;
        loop {
            let next = this.state.with(py, |state| {
                if !state.has_room(this.bulkhead) || !state.has_more() {
                    return None;
                }
                let index = state.next;
                if this.is_gated && !Self::passes_gates(slf, state) {
                    return None;
                }
                state.next += 1;
                state.alive += 1;
                Some((index, state.branches[index].start.take()))
            });
            let Some((index, start)) = next else {
                if taken < TURN && Self::take_from_feed(slf) {
                    taken += 1;
                    continue;
                }
                break;
            };
            let made = start
                .ok_or_else(|| PyRuntimeError::new_err("a branch was started twice"))
                .and_then(|start| Self::start_one(slf, index, start, at_once));
            match made {
                Ok(()) => {}
                Err(error) => drop(this.record(py, index, Err(error.into_value(py)))),
            }
        }
        DEPTH.set(DEPTH.get() - 1);
        this.state.with(py, |state| {
            state.is_starting = false;
            state.last_end = None;
        });
        if this.is_gated {
            Self::arm_hedging(slf);
        }
        if taken == TURN
            && let Err(error) = Self::start_later(slf)
        {
            this.fed_up(py, Some(error));
        }
    }

    fn start_one(slf: &Bound<'_, Self>, index: usize, start: Start, at_once: bool) -> PyResult<()> {
        let (py, this) = (slf.py(), slf.get());
        let env = this.env.get();
        let place = Some((this.scope.clone(), index));
        let last_end = this.state.with(py, |state| state.last_end.take());
        let started = last_end.unwrap_or_else(|| this.mark(py));
        this.state.with(py, |state| state.branches[index].ended.elapsed = started);
        let start = match start {
            Start::Item(task, item) if !task.get().takes_nothing_else() => {
                Start::Task(Py::new(py, task.get().of(py, item)?)?)
            }
            other => other,
        };
        let coroutine = match start {
            Start::Item(task, item) => task.get().call_one(py, item.bind(py))?,
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
                    task.get().call(py, arguments(plan, env, context, None, &Handed::Nothing, None)?)?
                }
            }
            Start::Task(task) => {
                let drive = Drive::branch(this.scope.state, task);
                Self::driven(slf, this.scope.state, drive, place)?
            }
            Start::State(first) => {
                let drive = Drive::machine(first, Some(this.until));
                Self::driven(slf, first, drive, place)?
            }
        };
        Self::start_coroutine(slf, index, coroutine, at_once)
    }

    fn start_coroutine(
        slf: &Bound<'_, Self>,
        index: usize,
        coroutine: Bound<'_, PyAny>,
        at_once: bool,
    ) -> PyResult<()> {
        let (py, this) = (slf.py(), slf.get());
        match &this.mode {
            Mode::Native => Self::start_native(slf, index, coroutine, at_once),
            Mode::Compatible { make_task, options } => {
                let (make_task, options) = (make_task.bind(py), options.bind(py));
                let task = match &this.context {
                    // Outside the parent's step its context is not the current one; a task copies the one it is made in.
                    Some(context) if !at_once => {
                        context.bind(py).call_method(intern!(py, "run"), (make_task, coroutine), Some(options))?
                    }
                    _ => make_task.call((coroutine,), Some(options))?,
                };
                let done = Done { split: slf.clone().unbind(), index };
                task.call_method1(intern!(py, "add_done_callback"), (done,))?;
                this.keep(py, index, task.unbind());
                Ok(())
            }
        }
    }

    fn start_native(slf: &Bound<'_, Self>, index: usize, coroutine: Bound<'_, PyAny>, at_once: bool) -> PyResult<()> {
        let (py, this) = (slf.py(), slf.get());
        let context = match &this.context {
            Some(context) if !at_once => branch::copy_of(context.bind(py))?,
            _ => branch::copy_context(py)?,
        };
        let name = this.state.with(py, |state| match state.branches.get(index) {
            Some(branch) => branch.ended.name.clone_ref(py),
            None => this.env.get().label(py, this.scope.state).clone().unbind(),
        });
        let branch = branch::new(slf, index, name, coroutine, context)?;
        this.keep(py, index, branch.clone().unbind());
        if DEPTH.get() > DEPTH_LIMIT {
            Self::queue(slf, &branch);
            return Ok(());
        }
        // What would end the loop is known to the split already, and leaves through the parent.
        drop(branch::step_in_context(&branch, this.event_loop(py)));
        Ok(())
    }

    fn keep(&self, py: Python<'_>, index: usize, task: Py<PyAny>) {
        self.state.with(py, |state| state.task(index).map(|place| *place = Some(task)));
    }

    /// A branch that needs a run of its own, inside a real coroutine.
    fn driven<'py>(
        slf: &Bound<'py, Self>,
        state: usize,
        drive: Drive,
        place: Option<(Arc<Scope>, usize)>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let (py, this) = (slf.py(), slf.get());
        let split = Some(slf.clone().unbind());
        let run = Run::with_drive(this.env.clone_ref(py), state, drive, place, split);
        this.env.get().table.get().drive.bind(py).call1((run,))
    }

    /// A branch ended: records it, and carries out what follows.
    pub(super) fn ended(slf: &Bound<'_, Self>, index: usize, outcome: Came) {
        let (py, this) = (slf.py(), slf.get());
        let goes_on = if index == FEEDER { this.feeder_ended(py, outcome) } else { this.record(py, index, outcome) };
        if goes_on {
            Self::start(slf, false);
        }
    }

    /// Records how a branch ended, and cancels the rest if that decides the join. Whether the split goes on.
    fn record(&self, py: Python<'_>, index: usize, outcome: Came) -> bool {
        let now = self.mark(py);
        let (end, counted, fatal) = match outcome {
            Ok(value) => (End::Value(value), Outcome::Succeeded, None),
            Err(error) => match self.as_failure(py, error) {
                Ok(error) => (End::Error(error.into_any()), Outcome::Failed, None),
                Err(fatal) => (End::Cancelled, Outcome::Cancelled, fatal),
            },
        };
        let (was_going_on, goes_on, dropped) = self.state.with(py, |state| {
            let was_going_on = state.goes_on();
            state.alive -= 1;
            state.last_end = state.is_starting.then_some(now);
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
        if self.is_gated {
            self.passed_gates(py, counted);
        }
        if was_going_on && !goes_on {
            self.cancel_rest(py, None);
        }
        goes_on
    }

    /// What feeds the split ended: no more branches come. An exception is the split's own.
    fn feeder_ended(&self, py: Python<'_>, outcome: Came) -> bool {
        let error = outcome.err().map(|error| PyErr::from_value(error.into_bound(py).into_any()));
        let dropped = self.state.with(py, |state| {
            state.alive -= 1;
            state.feed.as_mut().and_then(|feed| {
                feed.is_feeding = false;
                feed.feeder.take()
            })
        });
        drop(dropped);
        self.fed_up(py, error)
    }

    /// An `Exception` is a failure of its branch, unless it is the end of this run's budget. That ends the whole run, as does a
    /// `BaseException`, other than a cancel, which ends its branch alone (`Err(None)`); an item that cancels itself has failed.
    fn as_failure(&self, py: Python<'_>, error: Py<PyBaseException>) -> Result<Py<PyBaseException>, Option<PyErr>> {
        let raised = error.bind(py);
        if raised.is_instance_of::<PyException>() {
            let is_fatal = is_out_of_budget(self.env.get(), raised);
            return if is_fatal { Err(Some(PyErr::from_value(raised.clone().into_any()))) } else { Ok(error) };
        }
        if raised.is_instance_of::<CancelledError>() {
            return if self.is_fed(py) { Ok(cancelled_itself(raised)) } else { Err(None) };
        }
        match from_panic(py, PyErr::from_value(raised.clone().into_any())) {
            Ok(failure) => Ok(failure.into_value(py)),
            Err(fatal) => Err(Some(fatal)),
        }
    }

    /// The branches that have started and not ended.
    fn living(&self, py: Python<'_>) -> Vec<Py<PyAny>> {
        self.state.with(py, |state| {
            let feeder = state.feed.iter().filter_map(|feed| feed.feeder.as_ref());
            let tasks = state.branches.iter().filter_map(|branch| branch.task.as_ref());
            feeder.chain(tasks).map(|task| task.clone_ref(py)).collect()
        })
    }

    /// Cancels every branch that is alive; no other is started.
    pub(super) fn cancel_rest(&self, py: Python<'_>, message: Option<&Bound<'_, PyAny>>) {
        self.shut(py);
        for task in self.living(py) {
            let task = task.bind(py);
            let cancelled = match (&self.mode, message) {
                (Mode::Native, message) => branch::cancel_by_split(task, message),
                (_, Some(message)) => task.call_method1(intern!(py, "cancel"), (message,)).map(drop),
                (_, None) => task.call_method0(intern!(py, "cancel")).map(drop),
            };
            if let Err(error) = cancelled {
                error.write_unraisable(py, Some(task));
            }
        }
    }

    fn is_over(state: &State) -> bool {
        state.alive == 0 && !state.goes_on()
    }

    /// Lets the parent go on, once nothing is left to wait for; at the end of a callback of the loop.
    ///
    /// At once if it may and nobody's step is under way, which a foreign future may have called us from.
    fn wake(&self, py: Python<'_>, may_go_on: bool) -> PyResult<()> {
        let (waiter, is_told) = self.state.with(py, |state| {
            let waiter = if Self::is_over(state) { state.waiter.take() } else { None };
            (waiter, state.is_told)
        });
        let Some(waiter) = waiter else { return Ok(()) };
        let at_once = may_go_on && !is_told && self.is_native() && branch::is_free(self.event_loop(py))?;
        Waiter::resolve(waiter.bind(py), at_once)
    }

    /// An exception was thrown into the parent: it is passed on as a cancel, and leaves the run at the end.
    ///
    /// The newest cancel leaves, with what came before as its context, as from any coroutine that is cancelled while it cleans
    /// up; only another `BaseException` is never replaced by one.
    pub(super) fn interrupt(&self, py: Python<'_>, error: PyErr) -> PyResult<()> {
        let arguments = error.value(py).getattr(intern!(py, "args"))?;
        let message = arguments.get_item(0).ok();
        let before = self.state.with(py, |state| state.interrupted.take());
        let kept = match before {
            Some(before)
                if !before.is_instance_of::<CancelledError>(py) && !before.is_instance_of::<PyException>(py) =>
            {
                before
            }
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
        let (is_over, all_are_queued) = this.state.with(py, |state| {
            let queued = state.queued.len();
            (Self::is_over(state), queued > 0 && queued == state.alive && state.batches.is_empty())
        });
        if all_are_queued {
            return Ok(Poll::Turn);
        }
        if !is_over {
            let waiter = Bound::new(py, Waiter::new(this.event_loop.clone_ref(py)))?;
            let kept = waiter.clone().unbind();
            let old = this.state.with(py, |state| state.waiter.replace(kept));
            drop(old);
            Self::schedule_queued(slf);
            return Ok(Poll::Waiting(waiter.into_any()));
        }
        let unclosed = this.close_iterator(py).err();
        let (timers, interrupted, verdict, branches, left) = this.state.with(py, |state| {
            (
                [state.timer.take(), state.deadline_timer.take()],
                state.interrupted.take(),
                state.join.verdict(),
                std::mem::take(&mut state.branches),
                (std::mem::take(&mut state.deadlines), state.feed.take()),
            )
        });
        drop(left);
        for timer in timers {
            disarm(py, timer);
        }
        if let Some(error) = interrupted.or(unclosed) {
            return Ok(Poll::Interrupted(error));
        }
        let ended = branches.into_iter().map(|branch| branch.ended).collect();
        let origin = Origin::new(this.env.clone_ref(py), this.scope.clone());
        Ok(Poll::Joined(verdict, SplitResult::new(ended, Some(origin))))
    }

    /// Somebody who waits for a branch itself is told that it ended.
    pub(super) fn told(&self, py: Python<'_>) {
        self.state.with(py, |state| state.is_told = true);
    }

    /// What a callback of the loop did to branches may leave branches queued, or the parent with nothing to wait for.
    pub(super) fn after_callback(slf: &Bound<'_, Self>, outcome: PyResult<()>) -> PyResult<()> {
        Self::schedule_queued(slf);
        let woken = slf.get().wake(slf.py(), outcome.is_ok());
        outcome.and(woken)
    }

    pub(super) fn event_loop<'py>(&self, py: Python<'py>) -> &Bound<'py, PyAny> {
        self.event_loop.bind(py)
    }

    /// A point in time, for how long branches took.
    pub(super) fn mark(&self, py: Python<'_>) -> f64 {
        self.env.get().clock(py).and_then(|clock| clock.mark(py)).unwrap_or_default()
    }

    /// The parent is closed: nothing waits for the branches any more, they are cancelled; on a closed loop, closed as well.
    pub(super) fn close(slf: &Bound<'_, Self>) -> PyResult<()> {
        let (py, this) = (slf.py(), slf.get());
        let timer = this.state.with(py, |state| state.timer.take());
        disarm(py, timer);
        let mut closed = this.close_iterator(py);
        if !this.event_loop(py).call_method0(intern!(py, "is_closed"))?.is_truthy()? {
            this.interrupt(py, CancelledError::new_err(()))?;
            this.state.with(py, |state| state.is_abandoned = true);
            Self::schedule_queued(slf);
            return closed;
        }
        this.shut(py);
        if this.is_native() {
            for task in this.living(py) {
                closed = closed.and(branch::close(task.bind(py)));
            }
        }
        this.give_slots_back(py);
        closed
    }

    pub(super) fn is_native(&self) -> bool {
        matches!(self.mode, Mode::Native)
    }
}

impl Mode {
    fn choose(py: Python<'_>, clock: &Clock, name: &Bound<'_, PyString>, is_native: bool) -> PyResult<Self> {
        let (has_factory, is_in_debug_mode) = clock.habits(py)?;
        if is_native && !has_factory && !is_in_debug_mode {
            return Ok(Mode::Native);
        }
        let event_loop = clock.event_loop.bind(py);
        let options = PyDict::new(py);
        options.set_item(intern!(py, "name"), name)?;
        let make_task = if has_factory {
            event_loop.getattr(intern!(py, "create_task"))?.unbind()
        } else {
            options.set_item(intern!(py, "loop"), event_loop)?;
            Asyncio::of(py)?.task.clone_ref(py).into_any()
        };
        Ok(Mode::Compatible { make_task, options: options.unbind() })
    }
}

#[pymethods]
impl Split {
    /// The event loop's timer calls this.
    fn _time_out(slf: &Bound<'_, Self>) -> PyResult<()> {
        let (py, this) = (slf.py(), slf.get());
        let (was_going_on, timer) = this.state.with(py, |state| {
            let was_going_on = state.goes_on();
            let timer = state.timer.take();
            if was_going_on {
                state.join.timed_out();
            }
            (was_going_on, timer)
        });
        drop(timer);
        if was_going_on {
            this.cancel_rest(py, None);
        }
        Self::after_callback(slf, Ok(()))
    }

    /// Gives the split one more item; what has to be awaited before the next, or None.
    fn push<'py>(slf: &Bound<'py, Self>, item: Py<PyAny>) -> PyResult<Option<Bound<'py, PyAny>>> {
        Self::fed(slf, item)
    }

    /// The event loop calls this when it had its turn.
    fn _more(slf: &Bound<'_, Self>) -> PyResult<()> {
        Self::more_came(slf)
    }

    /// The event loop's timer calls this for the attempts whose deadline is due.
    fn _deadline(slf: &Bound<'_, Self>) -> PyResult<()> {
        Self::deadline_came(slf)
    }

    /// The event loop's timer calls this when the newest branch of a hedged split is slow.
    fn _hedge(slf: &Bound<'_, Self>) -> PyResult<()> {
        Self::newest_is_slow(slf)
    }

    /// The event loop calls this with a slot of the shared bulkhead.
    fn _granted(slf: &Bound<'_, Self>, grant: &Bound<'_, Grant>) -> PyResult<()> {
        Self::slot_came(slf, grant.get())
    }

    /// The event loop calls this for the branches that were queued.
    fn _turn(slf: &Bound<'_, Self>) -> PyResult<()> {
        Self::turn_came(slf)
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.env)?;
        visit.call(&self.context)?;
        visit.call(&self.event_loop)?;
        if let Mode::Compatible { make_task, options } = &self.mode {
            visit.call(make_task)?;
            visit.call(options)?;
        }
        self.state
            .peek(|state| {
                visit.call(&state.waiter)?;
                visit.call(&state.timer)?;
                visit.call(&state.deadline_timer)?;
                if let Some(feed) = &state.feed {
                    feed.traverse(&visit)?;
                }
                if let Some(gates) = &state.gates {
                    gates.traverse(&visit)?;
                }
                for branch in state.batches.iter().flatten().chain(&state.queued) {
                    visit.call(branch)?;
                }
                for (_, run) in &state.deadlines {
                    visit.call(run)?;
                }
                for branch in &state.branches {
                    visit.call(&branch.task)?;
                    match &branch.start {
                        Some(Start::Task(task)) => visit.call(task)?,
                        Some(Start::Item(task, item)) => {
                            visit.call(task)?;
                            visit.call(item)?;
                        }
                        Some(Start::State(_)) | None => {}
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
    fn __call__(&self, task: &Bound<'_, PyAny>) -> PyResult<()> {
        let py = task.py();
        let outcome = task.call_method0(intern!(py, "result")).map(Bound::unbind).map_err(|error| error.into_value(py));
        Split::ended(self.split.bind(py), self.index, outcome);
        self.split.get().wake(py, false)
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.split)
    }
}
