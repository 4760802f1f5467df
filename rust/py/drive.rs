//! The state loop of one run: which phase it is in, and what follows from what the user's code did.
//!
//! Phases. `Enter` a state -> `Call` its task -> `Work` (an attempt, a back-off, or a split's factory is suspended) or `Join`
//! (a split is) -> `Enter` the next state. Every rule about retries and joins is the core's; every rule about cancellation is
//! `asyncio.timeout`'s: what comes out of the user's code passes through unless the run's own timer asked for it.

use std::mem;

use pyo3::exceptions::{PyException, PyRuntimeError, PyStopIteration};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::{PyTraverseError, PyVisit};

use crate::core::breaker::Outcome;
use crate::core::retry::RetryVerdict;

use super::asyncio::Asyncio;
use super::breaker::{Grant, PyBreaker};
use super::definition::{Source, TaskSpec, asked_delay};
use super::env::{Handed, RunContext, arguments};
use super::errors::{
    AttemptTimeoutError, CancelledError, CheckpointError, RetryExhaustedError, WorkflowError, from_panic,
};
use super::failure::Failure;
use super::log::{Log, Place};
use super::route::tasks;
use super::run::{Input, Run, Step, is_coroutine, step};
use super::saga::Completion;
use super::split::Split;
use super::table::Kind;
use super::timer::{Armed, Limit, Timer};

/// Transitions without a suspension after which the loop gets a turn; and items of a batch.
pub(super) const TURN: u32 = 1024;

/// How far the run came.
pub(super) enum Advance<'py> {
    Suspended(Bound<'py, PyAny>),
    Finished(Bound<'py, PyAny>),
}

/// What the suspended coroutine is.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Work {
    Attempt,
    /// An attempt at one step of a stepped task.
    Step,
    /// An attempt at a compensatable task.
    Forward,
    Backoff,
    /// The wait for the rate limiter, before an attempt.
    Admission,
    Factory,
    /// The run ends with an error, and what it has done is undone.
    RollBack,
}

pub(super) enum Phase {
    Enter(usize),
    Call,
    Work(Work, Py<PyAny>),
    Join(Py<Split>),
    /// The run failed before it was resumed.
    Undo(PyErr),
    /// A row is on its way; what follows once the store has it.
    Log(Py<PyAny>, After),
    Over,
}

/// What follows a row.
#[derive(Clone, Copy)]
pub(super) enum After {
    Call,
    /// A compensatable step is done, and leads to this state.
    Enter(usize),
    Finish,
}

/// What follows a phase.
pub(super) enum Flow<'py> {
    Go(Phase),
    Suspend(Bound<'py, PyAny>, Phase),
    Finish(Bound<'py, PyAny>),
    /// The error ends the run, and everything that could be undone is.
    Fail(PyErr),
}

/// What is run.
pub(super) enum Program {
    /// States, until an exit state or the one that a fork joins into.
    Machine { until: Option<usize> },
    /// One task, whose value is the outcome: a branch with a policy of its own.
    Branch(Py<TaskSpec>),
    /// Branches that come one after the other; the outcome is their `SplitResult`. What feeds them is taken at the start.
    Items(Option<Items>),
}

/// What feeds a split: an iterator, or a function that makes the feeder's coroutine for the split; and what each item is for.
pub(super) struct Items {
    pub(super) task: Py<TaskSpec>,
    pub(super) iterator: Option<Py<PyAny>>,
    pub(super) feeder: Option<Py<PyAny>>,
    pub(super) concurrency: usize,
}

pub(super) struct Drive {
    pub(super) phase: Phase,
    pub(super) program: Program,
    pub(super) state: usize,
    pub(super) attempt: u32,
    /// Whether the present phase has not suspended yet.
    pub(super) fresh: bool,
    pub(super) unsuspended: u32,
    /// What led into the present state.
    pub(super) handed: Handed,
    /// What the last step left for the next one.
    pub(super) cursor: Option<Py<PyAny>>,
    pub(super) timer: Timer,
    /// The compensatable steps that are done, newest last.
    pub(super) stack: Vec<Py<Completion>>,
    /// The step whose completion is on its way to the log.
    pub(super) done: Option<Completion>,
    /// The row with which the present visit began.
    pub(super) entered: Option<u64>,
    /// Whether the task's rate limiter has granted the next attempt.
    is_admitted: bool,
    /// A cancel that came while a row was on its way.
    pub(super) withheld: Option<PyErr>,
    /// What the task's circuit breaker has granted to the attempt under way.
    grant: Option<Grant>,
}

impl Drive {
    fn new(state: usize, phase: Phase, program: Program) -> Self {
        Self {
            phase,
            program,
            state,
            attempt: 0,
            fresh: true,
            unsuspended: 0,
            handed: Handed::Nothing,
            cursor: None,
            timer: Timer::default(),
            stack: Vec::new(),
            done: None,
            entered: None,
            is_admitted: false,
            withheld: None,
            grant: None,
        }
    }

    /// Runs states from `state` on.
    pub(super) fn machine(state: usize, until: Option<usize>) -> Self {
        Self::new(state, Phase::Enter(state), Program::Machine { until })
    }

    /// Runs one task as a branch of the split in `state`.
    pub(super) fn branch(state: usize, task: Py<TaskSpec>) -> Self {
        Self::new(state, Phase::Call, Program::Branch(task))
    }

    /// Runs branches as they come, beside a task of `state`.
    pub(super) fn items(state: usize, items: Items) -> Self {
        Self::new(state, Phase::Call, Program::Items(Some(items)))
    }

    /// Goes on until the user's code suspends or the run ends.
    pub(super) fn advance<'py>(&mut self, run: &Bound<'py, Run>, input: Input<'py>) -> PyResult<Advance<'py>> {
        let py = run.py();
        let mut phase = mem::replace(&mut self.phase, Phase::Over);
        let mut input = Some(input);
        loop {
            let flow = match phase {
                Phase::Enter(_) | Phase::Call | Phase::Undo(_) if matches!(input, Some(Input::Throw(_))) => {
                    let Some(Input::Throw(error)) = input else { unreachable!("matched above") };
                    self.interrupted(run, error).and_then(Err)
                }
                Phase::Enter(state) => self.enter(run, state),
                Phase::Call => self.call(run),
                Phase::Work(work, inner) => {
                    let input = input.take().unwrap_or_else(|| Input::nothing(py));
                    self.work(run, work, inner.into_bound(py), input)
                }
                Phase::Join(split) => self.join(run, split, input.take()),
                Phase::Undo(error) => self.undo(run, error),
                Phase::Log(answer, after) => self.record(run, answer.into_bound(py), after, input.take()),
                Phase::Over => return Err(WorkflowError::new_err("the run is over")),
            };
            input = None;
            let flow = match flow {
                Ok(flow) => flow,
                Err(error) => self.on_error(run, error).or_else(|error| self.unwind(run, error))?,
            };
            match flow {
                Flow::Go(next) => phase = next,
                Flow::Suspend(value, next) => {
                    self.phase = next;
                    self.unsuspended = 0;
                    return Ok(Advance::Suspended(value));
                }
                Flow::Finish(value) => return Ok(Advance::Finished(value)),
                Flow::Fail(error) => return Err(error),
            }
        }
    }

    /// Enters a state, and each next one for as long as nothing suspends or needs more than a call and a look-up.
    pub(super) fn enter<'py>(&mut self, run: &Bound<'py, Run>, mut state: usize) -> PyResult<Flow<'py>> {
        let (py, this) = (run.py(), run.get());
        let env = this.env.get();
        let table = env.table.get();
        if let Some(log) = this.durable() {
            return self.enter_durably(run, log.get(), state);
        }
        let counted = if table.counts_visits { table.states.len() } else { 0 };
        let until = match self.program {
            Program::Machine { until } => until,
            Program::Branch(_) | Program::Items(_) => None,
        };
        loop {
            this.track.with(py, |track| track.enter(state, counted));
            self.state = state;
            self.attempt = 0;
            let entry = &table.states[state];
            if matches!(entry.kind, Kind::Exit) || until == Some(state) {
                return Ok(Flow::Finish(entry.key.bind(py).clone()));
            }
            self.unsuspended += 1;
            if self.unsuspended == TURN {
                return Ok(Flow::Suspend(py.None().into_bound(py), Phase::Call));
            }
            let Some(task) = entry.untimed_task().filter(|_| env.budget.is_none()) else {
                return self.call(run);
            };
            if let Some(breaker) = task.breaker() {
                self.pass(run, breaker)?;
            }
            self.attempt = 1;
            self.fresh = true;
            let made = match self.invoke(run, task) {
                Ok(made) if is_coroutine(&made) => made,
                Ok(value) => return self.returned_at_once(run, Work::Attempt, value),
                Err(error) => return self.raised(run, Work::Attempt, error),
            };
            let value = match step(&made, Input::nothing(py)) {
                Step::Returned(value) => value,
                Step::Yielded(value) => return self.suspend(run, Work::Attempt, made, value),
                Step::Raised(error) => return self.raised(run, Work::Attempt, error),
            };
            if let (Some(grant), Some(breaker)) = (self.grant.take(), task.breaker()) {
                PyBreaker::settle(breaker.bind(py), &grant, Outcome::Success)?;
            }
            match table.by_identity(&value) {
                Some(next) if entry.may_lead_to(next) => {
                    self.handed.forget();
                    state = next;
                }
                _ => return self.route(run, &value),
            }
        }
    }

    /// Enters a state once the store knows that it is entered.
    fn enter_durably<'py>(&mut self, run: &Bound<'py, Run>, log: &Log, state: usize) -> PyResult<Flow<'py>> {
        let (py, this) = (run.py(), run.get());
        let table = this.env.get().table.get();
        let entry = &table.states[state];
        let visit = this.track.with(py, |track| {
            track.enter(state, table.states.len());
            track.visits[state]
        });
        self.state = state;
        self.attempt = 0;
        self.fresh = true;
        if !entry.has_row() {
            self.unsuspended += 1;
            if self.unsuspended == TURN {
                return Ok(Flow::Suspend(py.None().into_bound(py), Phase::Call));
            }
            return self.call(run);
        }
        let is_exit = matches!(entry.kind, Kind::Exit);
        let place = Place {
            state: entry.label.bind(py).to_string(),
            task: entry.task_name(py),
            visit,
            is_intent: entry.registers_before(),
        };
        match log.enter(py, place, is_exit) {
            Ok(answer) => self.record(run, answer, if is_exit { After::Finish } else { After::Call }, None),
            Err(error) => Err(self.failed(run, None, error)),
        }
    }

    /// Waits for the answer to a row, whoever cancels the run meanwhile; then honours the cancel, or goes on.
    pub(super) fn record<'py>(
        &mut self,
        run: &Bound<'py, Run>,
        answer: Bound<'py, PyAny>,
        after: After,
        input: Option<Input<'py>>,
    ) -> PyResult<Flow<'py>> {
        let py = run.py();
        let is_done = answer.call_method0(intern!(py, "done"))?.is_truthy()?;
        let is_cancelled = is_done && answer.call_method0(intern!(py, "cancelled"))?.is_truthy()?;
        match input {
            // What the answer is, it says itself.
            Some(Input::Throw(error)) if is_cancelled || is_done && !error.is_instance_of::<CancelledError>(py) => {
                drop(error);
            }
            // Of several the newest leaves; an anyio scope cancels in every turn of the loop.
            Some(Input::Throw(error)) if error.is_instance_of::<CancelledError>(py) => self.withheld = Some(error),
            Some(Input::Throw(error)) => return Err(error),
            Some(Input::Send(_)) | None => {}
        }
        if !is_done {
            let waiting = Asyncio::of(py)?.wait_for(&answer)?;
            self.suspended(run)?;
            return Ok(Flow::Suspend(waiting, Phase::Log(answer.unbind(), after)));
        }
        let answer = if is_cancelled {
            Err(CheckpointError::new_err("the store has dropped a row on its way"))
        } else {
            answer.call_method0(intern!(py, "result"))
        };
        let mut sequence = None;
        if let Some(log) = run.get().durable() {
            match &answer {
                Ok(_) => sequence = log.get().landed(py),
                Err(error) => log.get().refused(py, error.value(py)),
            }
        }
        if let Some(step) = self.done.take() {
            self.push(run, step.recorded(sequence))?;
        } else if sequence.is_some() {
            self.entered = sequence;
        }
        match (answer, self.withheld.take()) {
            (Ok(_), None) => {}
            (Ok(_), Some(cancel)) => return Err(self.interrupted(run, cancel)?),
            (Err(error), None) if matches!(after, After::Finish) => self.leave_open(run, error)?,
            (Err(error), Some(cancel)) => {
                cancel.value(py).setattr(intern!(py, "__context__"), error.into_value(py))?;
                return Err(self.interrupted(run, cancel)?);
            }
            (Err(error), None) => {
                self.timer.settle(py, None)?;
                return Err(self.failed(run, None, error));
            }
        }
        self.timer.settle(py, None)?;
        Ok(match after {
            After::Call => Flow::Go(Phase::Call),
            After::Enter(next) => Flow::Go(Phase::Enter(next)),
            After::Finish => Flow::Finish(run.get().env.get().state(py, self.state).clone()),
        })
    }

    /// The last task is done, so the run is; that its log does not say so is told beside the result.
    fn leave_open(&mut self, run: &Bound<'_, Run>, error: PyErr) -> PyResult<()> {
        match run.get().durable() {
            Some(log) if !log.get().is_lost(run.py()) => {
                log.get().leave_open(run.py(), error);
                Ok(())
            }
            _ => {
                self.timer.settle(run.py(), None)?;
                Err(self.failed(run, None, error))
            }
        }
    }

    pub(super) fn call<'py>(&mut self, run: &Bound<'py, Run>) -> PyResult<Flow<'py>> {
        let py = run.py();
        if let Program::Branch(task) = &self.program {
            let task = task.clone_ref(py);
            return self.begin(run, Work::Attempt, &task);
        }
        if let Program::Items(items) = &mut self.program {
            let items = items.take();
            return self.open_items(run, items);
        }
        let table = run.get().env.get().table.get();
        match &table.states[self.state].kind {
            Kind::Task { task, .. } => {
                let work = match task.get() {
                    TaskSpec { has_steps: true, .. } => Work::Step,
                    TaskSpec { compensation: Some(_), .. } => {
                        self.check_stack(run, task)?;
                        Work::Forward
                    }
                    _ => Work::Attempt,
                };
                self.begin(run, work, task)
            }
            Kind::Factory { task, .. } => self.begin(run, Work::Factory, task),
            Kind::Split { branches, join } => self.open(run, tasks(branches.bind(py))?, join),
            Kind::Exit => unreachable!("an exit state ends the run when it is entered"),
        }
    }

    /// Starts an attempt and runs it to its first suspension.
    fn begin<'py>(&mut self, run: &Bound<'py, Run>, work: Work, spec: &Py<TaskSpec>) -> PyResult<Flow<'py>> {
        let (py, env, task) = (run.py(), run.get().env.get(), spec.get());
        if let Some(error) = run.get().check_budget(py)? {
            self.attempt = 0;
            return Err(self.failed(run, None, error));
        }
        if let Some(wait) = self.admission(run, task)? {
            self.fresh = true;
            return self.work(run, Work::Admission, wait, Input::nothing(py));
        }
        if let Some(breaker) = task.breaker() {
            self.pass(run, breaker)?;
        }
        self.attempt += 1;
        self.fresh = true;
        if work == Work::Forward {
            self.intend(run, spec)?;
        } else if let Some(limit) = task.attempt_timeout() {
            self.timer.attempt_deadline = Some(env.now(py)? + limit);
        }
        match self.invoke(run, task) {
            Ok(made) if work == Work::Forward => self.forward(run, task, made),
            Ok(made) if is_coroutine(&made) => self.work(run, work, made, Input::nothing(py)),
            Ok(value) => self.returned_at_once(run, work, value),
            Err(error) => self.raised(run, work, error),
        }
    }

    /// The wait for the task's rate limiter, if there is one; nobody waits for what the breaker would refuse as it is.
    fn admission<'py>(&mut self, run: &Bound<'py, Run>, task: &TaskSpec) -> PyResult<Option<Bound<'py, PyAny>>> {
        let Some(limiter) = task.limiter().filter(|_| !mem::take(&mut self.is_admitted)) else {
            return Ok(None);
        };
        if let Some(refusal) = task.breaker().and_then(|breaker| breaker.get().rejection()) {
            return Err(self.failed(run, self.task(run), refusal));
        }
        if limiter.try_now() {
            return Ok(None);
        }
        limiter.acquire(run.py()).map(Some)
    }

    /// Asks the task's circuit breaker for the next attempt; a refusal ends the state, whatever retries are left.
    fn pass(&mut self, run: &Bound<'_, Run>, breaker: &Py<PyBreaker>) -> PyResult<()> {
        let py = run.py();
        match PyBreaker::admit(breaker.bind(py)) {
            Ok(grant) => {
                self.grant = Some(grant);
                Ok(())
            }
            Err(refusal) => Err(self.failed(run, self.task(run), refusal)),
        }
    }

    /// Tells the breaker how the attempt ended; one that is told nothing, since the attempt was cancelled, counts nothing.
    fn settle(&mut self, run: &Bound<'_, Run>, outcome: Outcome) {
        let Some(grant) = self.grant.take() else { return };
        if let Some(task) = self.task(run)
            && let Some(breaker) = task.get().breaker()
        {
            // A grant is taken from where it is kept, so it is used once, and by the breaker that gave it.
            PyBreaker::settle(breaker.bind(run.py()), &grant, outcome).ok();
        }
    }

    #[inline]
    fn invoke<'py>(&self, run: &Bound<'py, Run>, task: &TaskSpec) -> PyResult<Bound<'py, PyAny>> {
        let (py, this) = (run.py(), run.get());
        match &*task.plan_ref().sources {
            [] => task.call_bare(py),
            [Source::Resources] => task.call_one(py, this.env.get().resources.bind(py)),
            _ => {
                let context = || {
                    let is_branch = matches!(self.program, Program::Branch(_));
                    let visit = match (&this.scope, is_branch) {
                        (Some((scope, _)), true) => scope.visit,
                        _ => this.track.with(py, |track| track.visits.get(self.state).copied().unwrap_or(1)),
                    };
                    RunContext {
                        env: this.env.clone_ref(py),
                        scope: this.scope.clone(),
                        index: self.state,
                        attempt: self.attempt,
                        visit,
                        is_branch,
                    }
                };
                let plan = task.plan.bind(py);
                let cursor = self.cursor.as_ref().map(|cursor| cursor.bind(py));
                task.call(py, arguments(plan, this.env.get(), context, Some(run), &self.handed, cursor)?)
            }
        }
    }

    /// A call that made no coroutine: a plain function's value, or another kind of awaitable.
    fn returned_at_once<'py>(
        &mut self,
        run: &Bound<'py, Run>,
        work: Work,
        value: Bound<'py, PyAny>,
    ) -> PyResult<Flow<'py>> {
        let py = run.py();
        let is_state = work == Work::Attempt
            && matches!(self.program, Program::Machine { .. })
            && run.get().env.get().table.get().by_identity(&value).is_some();
        let awaitable = if is_state { None } else { value.get_type().getattr_opt(intern!(py, "__await__"))? };
        match awaitable {
            Some(method) => match method.call1((&value,)) {
                Ok(inner) => self.work(run, work, inner, Input::nothing(py)),
                Err(error) => self.raised(run, work, error),
            },
            None => self.returned(run, work, value),
        }
    }

    /// Steps the suspended coroutine.
    pub(super) fn work<'py>(
        &mut self,
        run: &Bound<'py, Run>,
        work: Work,
        inner: Bound<'py, PyAny>,
        input: Input<'py>,
    ) -> PyResult<Flow<'py>> {
        if work == Work::Forward {
            self.withhold(run.py(), &input);
        }
        match step(&inner, input) {
            Step::Yielded(value) => self.suspend(run, work, inner, value),
            Step::Returned(value) => {
                drop(inner);
                // What a cancel that was withheld stands for is asked when the step has been taken down.
                if self.withheld.is_none() {
                    self.timer.settle(run.py(), None)?;
                }
                self.returned(run, work, value)
            }
            Step::Raised(error) if work == Work::RollBack => Ok(Flow::Fail(error)),
            Step::Raised(error) => {
                drop(inner);
                let error = self.or_cancel(run.py(), error);
                self.raised(run, work, error)
            }
        }
    }

    fn suspend<'py>(
        &mut self,
        run: &Bound<'py, Run>,
        work: Work,
        inner: Bound<'py, PyAny>,
        value: Bound<'py, PyAny>,
    ) -> PyResult<Flow<'py>> {
        self.suspended(run)?;
        Ok(Flow::Suspend(value, Phase::Work(work, inner.unbind())))
    }

    pub(super) fn returned<'py>(
        &mut self,
        run: &Bound<'py, Run>,
        work: Work,
        value: Bound<'py, PyAny>,
    ) -> PyResult<Flow<'py>> {
        self.timer.attempt_deadline = None;
        self.settle(run, Outcome::Success);
        match work {
            Work::Backoff => Ok(Flow::Go(Phase::Call)),
            Work::Admission => {
                self.is_admitted = true;
                Ok(Flow::Go(Phase::Call))
            }
            Work::Factory => self.made_branches(run, &value),
            Work::Attempt if matches!(self.program, Program::Branch(_)) => Ok(Flow::Finish(value)),
            Work::Attempt => self.route(run, &value),
            Work::Step => self.stepped(run, &value),
            Work::Forward => self.compensatable(run, &value),
            Work::RollBack => Ok(Flow::Fail(PyErr::from_value(value))),
        }
    }

    /// An exception came out of the user's code, or out of the wait between two attempts.
    fn raised<'py>(&mut self, run: &Bound<'py, Run>, work: Work, error: PyErr) -> PyResult<Flow<'py>> {
        let (py, env) = (run.py(), run.get().env.get());
        let limit = self.timer.settle(py, Some(&error))?;
        let error = match (limit, run.get().budget()) {
            (Some(Limit::Run), Some(budget)) => {
                let told = env.timed_out(py, budget);
                told.set_cause(py, Some(error));
                self.attempt = 0;
                self.grant = None;
                return Err(self.failed(run, self.task(run), told));
            }
            (Some(_), _) => {
                let seconds = self.task(run).and_then(|task| task.get().attempt_timeout()).unwrap_or_default();
                let text = format!("the attempt took longer than its attempt_timeout of {seconds} s");
                let told = AttemptTimeoutError::new_err((text, seconds));
                told.set_cause(py, Some(error));
                told
            }
            (None, _) if error.is_instance_of::<PyStopIteration>(py) => self.stop_iteration(run, error)?,
            (None, _) => error,
        };
        if !error.is_instance_of::<PyException>(py) {
            return Err(match from_panic(py, error) {
                Ok(panic) => {
                    self.settle(run, Outcome::Failure);
                    self.failed(run, self.task(run), panic)
                }
                Err(passes) => {
                    self.grant = None;
                    passes
                }
            });
        }
        self.settle(run, Outcome::Failure);
        let Some(task) = self.task(run).filter(|_| matches!(work, Work::Attempt | Work::Step | Work::Forward)) else {
            return Err(self.failed(run, self.task(run), error));
        };
        self.retry(run, task, error)
    }

    /// A plain function that lets a `StopIteration` out would end the run like a return; a coroutine (PEP 479) cannot.
    fn stop_iteration(&self, run: &Bound<'_, Run>, error: PyErr) -> PyResult<PyErr> {
        let told = PyRuntimeError::new_err(format!("{} raised StopIteration", self.place(run)?));
        told.set_cause(run.py(), Some(error));
        Ok(told)
    }

    /// Asks the core what follows a failed attempt.
    fn retry<'py>(&mut self, run: &Bound<'py, Run>, task: Py<TaskSpec>, error: PyErr) -> PyResult<Flow<'py>> {
        let py = run.py();
        let Some(policy) = &task.get().policy else {
            return Err(self.failed(run, Some(task), error));
        };
        let policy = policy.get();
        match policy.is_retryable(py, error.value(py).as_any().cast()?) {
            // An attempt that was told to stop is the last one, whatever it made of the cancellation.
            Ok(true) if !self.fresh && self.timer.was_cancelled(py)? => {
                return Err(self.failed(run, Some(task), error));
            }
            Ok(true) => {}
            Ok(false) => return Err(self.failed(run, Some(task), error)),
            Err(broken) => {
                broken.set_context(py, Some(error));
                return Err(self.failed(run, Some(task), broken));
            }
        }
        let asked = match asked_delay(error.value(py)) {
            Ok(asked) => asked,
            Err(problem) => {
                problem.set_cause(py, Some(error));
                return Err(self.failed(run, Some(task), problem));
            }
        };
        let names = Asyncio::of(py)?;
        match policy.retry.after_failure(self.attempt, asked, names.dice(py)?) {
            RetryVerdict::NotConfigured => Err(self.failed(run, Some(task), error)),
            RetryVerdict::Exhausted => {
                let failure = self.failure(run, Some(&task));
                let last = run.get().annotate(py, &failure, error);
                let attempts = self.attempt;
                let name = task.get().name.bind(py).to_cow()?;
                let told = RetryExhaustedError::new_err((
                    format!(
                        "task {name} failed in each of its {attempts} attempts: {}",
                        last.value(py).get_type().name()?
                    ),
                    attempts,
                ));
                told.set_cause(py, Some(last));
                Err(self.failed(run, Some(task), told))
            }
            RetryVerdict::Retry(delay) => {
                drop(error);
                self.fresh = true;
                let sleep = names.sleep(py, delay.as_seconds())?;
                self.work(run, Work::Backoff, sleep, Input::nothing(py))
            }
        }
    }

    /// Cancelled, or whatever else was thrown in: it leaves the run unless our own timer asked for it.
    pub(super) fn interrupted(&mut self, run: &Bound<'_, Run>, error: PyErr) -> PyResult<PyErr> {
        let (py, env) = (run.py(), run.get().env.get());
        let limit = self.timer.settle(py, Some(&error))?;
        match (limit, run.get().budget()) {
            (Some(_), Some(budget)) => {
                let told = env.timed_out(py, budget);
                told.set_cause(py, Some(error));
                self.attempt = 0;
                Ok(self.failed(run, None, told))
            }
            _ => Ok(error),
        }
    }

    pub(super) fn suspended(&mut self, run: &Bound<'_, Run>) -> PyResult<()> {
        if mem::take(&mut self.fresh) {
            let py = run.py();
            let watched = self.may_go_on(run);
            self.timer.suspended(py, run.get().budget(), watched, |due| arm(run, due))?;
        }
        Ok(())
    }

    /// Whether a failure of the present task may be followed by another attempt, or by a state.
    fn may_go_on(&self, run: &Bound<'_, Run>) -> bool {
        match &self.program {
            Program::Branch(task) => return task.get().max_attempts() > 1,
            Program::Items(_) => return false,
            Program::Machine { .. } => {}
        }
        let state = &run.get().env.get().table.get().states[self.state];
        let is_repeatable = match &state.kind {
            Kind::Task { task, .. } => task.get().max_attempts() > 1,
            Kind::Factory { .. } | Kind::Split { .. } | Kind::Exit => false,
        };
        is_repeatable || !state.on_error.is_empty()
    }

    pub(super) fn timer_fired(&mut self, run: &Bound<'_, Run>) -> PyResult<Option<Py<PyAny>>> {
        let (py, env) = (run.py(), run.get().env.get());
        self.timer.fired(py, env, run.get().budget(), |due| arm(run, due))
    }

    /// The task of the present state, or of the branch.
    pub(super) fn task(&self, run: &Bound<'_, Run>) -> Option<Py<TaskSpec>> {
        let py = run.py();
        match &self.program {
            Program::Branch(task) => return Some(task.clone_ref(py)),
            Program::Items(_) => return None,
            Program::Machine { .. } => {}
        }
        match &run.get().env.get().table.get().states[self.state].kind {
            Kind::Task { task, .. } | Kind::Factory { task, .. } => Some(task.clone_ref(py)),
            Kind::Exit | Kind::Split { .. } => None,
        }
    }

    pub(super) fn failure<'a>(&self, run: &Bound<'_, Run>, task: Option<&'a Py<TaskSpec>>) -> Failure<'a> {
        Failure {
            state: self.state,
            task: task.map(|task| &task.get().name),
            attempt: self.attempt,
            max_attempts: task.map_or(1, |task| task.get().max_attempts()),
            branch: run.get().scope.as_ref().map(|(_, branch)| *branch),
        }
    }

    /// Annotates the exception that ends the run, unless `on_error` says otherwise.
    pub(super) fn failed(&self, run: &Bound<'_, Run>, task: Option<Py<TaskSpec>>, mut error: PyErr) -> PyErr {
        if error.is_instance_of::<PyStopIteration>(run.py()) {
            error = self.stop_iteration(run, error).unwrap_or_else(|problem| problem);
        }
        let failure = self.failure(run, task.as_ref());
        run.get().annotate(run.py(), &failure, error)
    }

    pub(super) fn awaiting(&self, py: Python<'_>) -> Option<Py<PyAny>> {
        match &self.phase {
            Phase::Work(_, inner) => Some(inner.clone_ref(py)),
            Phase::Enter(_) | Phase::Call | Phase::Join(_) | Phase::Undo(_) | Phase::Log(..) | Phase::Over => None,
        }
    }

    pub(super) fn close(&mut self, py: Python<'_>) -> PyResult<()> {
        let told = self.abandon(py);
        match mem::replace(&mut self.phase, Phase::Over) {
            Phase::Work(_, inner) => {
                if let Some(close) = inner.bind(py).getattr_opt(intern!(py, "close"))? {
                    close.call0()?;
                }
                Ok(())
            }
            Phase::Join(split) => Split::close(split.bind(py)),
            Phase::Enter(_) | Phase::Call | Phase::Undo(_) | Phase::Log(..) | Phase::Over => Ok(()),
        }
        .and(told)
    }

    pub(super) fn stop(&mut self, py: Python<'_>) {
        self.timer.stop(py);
    }

    pub(super) fn traverse(&self, visit: &PyVisit<'_>) -> Result<(), PyTraverseError> {
        match &self.phase {
            Phase::Work(_, inner) => visit.call(inner)?,
            Phase::Join(split) => visit.call(split)?,
            Phase::Log(answer, _) => visit.call(answer)?,
            Phase::Enter(_) | Phase::Call | Phase::Undo(_) | Phase::Over => {}
        }
        match &self.program {
            Program::Branch(task) => visit.call(task)?,
            Program::Items(Some(items)) => {
                visit.call(&items.task)?;
                visit.call(&items.iterator)?;
                visit.call(&items.feeder)?;
            }
            Program::Items(None) | Program::Machine { .. } => {}
        }
        match &self.handed {
            Handed::Nothing => {}
            Handed::Joined(result) => visit.call(result)?,
            Handed::Caught(error) => visit.call(error)?,
        }
        visit.call(&self.cursor)?;
        for step in &self.stack {
            visit.call(step)?;
        }
        if let Some(step) = &self.done {
            step.traverse(visit)?;
        }
        self.timer.traverse(visit)
    }
}

/// Has the run called when a deadline is due; a branch is called by its split.
fn arm(run: &Bound<'_, Run>, due: f64) -> PyResult<Armed> {
    let (py, this) = (run.py(), run.get());
    if let Some(split) = &this.split {
        Split::arm(split.bind(py), due, run)?;
        return Ok(Armed::BySplit);
    }
    let fire = run.getattr(intern!(py, "_fire"))?;
    Ok(Armed::ByLoop(this.env.get().clock(py)?.call_at(py, due, fire)?))
}
