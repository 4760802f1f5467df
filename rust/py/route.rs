//! What follows from what a task returned or raised: the next state, or a split and its join.

use pyo3::exceptions::PyTimeoutError;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyString, PyTuple};

use crate::core::join::{Join, JoinVerdict};

use super::definition::TaskSpec;
use super::drive::{After, Drive, Flow, Items, Phase, Program, TURN};
use super::env::{Env, Handed};
use super::errors::{
    InvalidTransitionError, TaskExecutionError, UnknownStateError, WorkflowError, join_error, shown_label,
};
use super::failure::is_out_of_budget;
use super::feed::Feed;
use super::result::SplitResult;
use super::run::{Input, Run};
use super::split::{Poll, Split, Start};
use super::table::{JoinSpec, Kind, Table};

impl Drive {
    /// The next state, from what the task returned.
    pub(super) fn route<'py>(&mut self, run: &Bound<'py, Run>, value: &Bound<'py, PyAny>) -> PyResult<Flow<'py>> {
        let table = run.get().env.get().table.get();
        match table.by_identity(value) {
            Some(next) => self.go(run, table, next),
            None => self.route_by_value(run, value),
        }
    }

    pub(super) fn go<'py>(&mut self, run: &Bound<'py, Run>, table: &Table, next: usize) -> PyResult<Flow<'py>> {
        if !table.states[self.state].may_lead_to(next) {
            return Err(self.undeclared(run, table, next));
        }
        self.handed.forget();
        Ok(Flow::Go(Phase::Enter(next)))
    }

    /// The state that an error leads to, if the present one has named one; otherwise the error leaves the run.
    #[cold]
    pub(super) fn on_error<'py>(&mut self, run: &Bound<'py, Run>, error: PyErr) -> PyResult<Flow<'py>> {
        let (py, env) = (run.py(), run.get().env.get());
        let on_error = &env.table.get().states[self.state].on_error;
        if on_error.is_empty() || matches!(self.program, Program::Branch(_)) {
            return Err(error);
        }
        if run.get().durable().is_some_and(|log| log.get().is_lost(py)) {
            return Err(error);
        }
        // A run that was told to stop does not go on, whatever its task made of the cancellation.
        if !self.fresh && self.timer.was_cancelled(py)? {
            return Err(error);
        }
        let error = error.into_value(py).into_bound(py);
        match on_error.find(&error).filter(|_| !is_out_of_budget(env, &error)) {
            Some((caught, next)) => {
                self.handed = Handed::Caught(caught.unbind());
                self.cursor = None;
                Ok(Flow::Go(Phase::Enter(next)))
            }
            None => Err(PyErr::from_value(error.into_any())),
        }
    }

    #[cold]
    pub(super) fn route_by_value<'py>(
        &mut self,
        run: &Bound<'py, Run>,
        value: &Bound<'py, PyAny>,
    ) -> PyResult<Flow<'py>> {
        let (py, table) = (run.py(), run.get().env.get().table.get());
        let class = value.get_type();
        if class.is(table.single.bind(py)) {
            let state = value.getattr(intern!(py, "state"))?;
            return self.look_up(run, table, &state);
        }
        if class.is(table.split.bind(py)) {
            return self.fork(run, table, value);
        }
        self.look_up(run, table, value)
    }

    /// What a step returned: the next cursor, or `Done` with the next state.
    ///
    /// A durable run writes the cursor before the next step.
    pub(super) fn stepped<'py>(&mut self, run: &Bound<'py, Run>, value: &Bound<'py, PyAny>) -> PyResult<Flow<'py>> {
        let (py, table) = (run.py(), run.get().env.get().table.get());
        let class = value.get_type();
        if class.is(table.done.bind(py)) {
            self.cursor = None;
            return self.route(run, &value.getattr(intern!(py, "state"))?);
        }
        if !class.is(table.more.bind(py)) {
            let error = InvalidTransitionError::new_err(format!(
                "{} returned a value of type {}; a step returns More(cursor) or Done(state)",
                self.place(run)?,
                class.qualname()?
            ));
            return Err(self.failed(run, self.task(run), error));
        }
        let cursor = value.getattr(intern!(py, "cursor"))?;
        self.cursor = Some(cursor.clone().unbind());
        self.attempt = 0;
        if let Some(log) = run.get().durable() {
            self.fresh = true;
            return match log.get().cursor(&cursor, None) {
                Ok(answer) => self.record(run, answer, After::Call, None),
                Err(error) => Err(self.failed(run, self.task(run), error)),
            };
        }
        self.unsuspended += 1;
        if self.unsuspended == TURN {
            return Ok(Flow::Suspend(py.None().into_bound(py), Phase::Call));
        }
        Ok(Flow::Go(Phase::Call))
    }

    pub(super) fn look_up<'py>(
        &mut self,
        run: &Bound<'py, Run>,
        table: &Table,
        value: &Bound<'py, PyAny>,
    ) -> PyResult<Flow<'py>> {
        match table.find(value) {
            Ok(Some(next)) => return self.go(run, table, next),
            Ok(None) => {}
            Err(error) => return Err(self.failed(run, self.task(run), error)),
        }
        let place = self.place(run)?;
        let error = if table.has_state_of_type(&value.get_type()) {
            UnknownStateError::new_err(format!(
                "{place} returned {}, which is neither registered nor an exit state",
                shown_label(value)?
            ))
        } else {
            InvalidTransitionError::new_err(format!(
                "{place} returned a value of type {}; a task returns a state, TaskResult.Single or TaskResult.Split",
                value.get_type().qualname()?
            ))
        };
        Err(self.failed(run, self.task(run), error))
    }

    pub(super) fn undeclared(&self, run: &Bound<'_, Run>, table: &Table, next: usize) -> PyErr {
        let py = run.py();
        let names: Vec<String> = table.states[self.state]
            .declared
            .iter()
            .flatten()
            .map(|index| table.states[*index].label.bind(py).to_string())
            .collect();
        let error = match self.place(run) {
            Ok(place) => InvalidTransitionError::new_err(format!(
                "{place} returned {}, but its annotation declares only {}",
                table.states[next].label.bind(py),
                names.join(", ")
            )),
            Err(error) => error,
        };
        self.failed(run, self.task(run), error)
    }

    /// The task returned `TaskResult.Split`: one branch for each state it lists.
    pub(super) fn fork<'py>(
        &mut self,
        run: &Bound<'py, Run>,
        table: &Table,
        value: &Bound<'py, PyAny>,
    ) -> PyResult<Flow<'py>> {
        let Kind::Task { fork: Some(join), .. } = &table.states[self.state].kind else {
            let task = self.task(run);
            let advice = match task.as_ref().and_then(|task| task.get().model.as_ref()) {
                Some(model) => format!("a {} cannot split", model.bind(run.py()).to_cow()?),
                None => "register its state with register_split(), or give register() a join=".to_owned(),
            };
            let error = WorkflowError::new_err(format!("{} returned TaskResult.Split; {advice}", self.place(run)?));
            return Err(self.failed(run, task, error));
        };
        let mut starts = Vec::new();
        for state in value.getattr(intern!(run.py(), "states"))?.try_iter()? {
            let state = state?;
            match table.find(&state) {
                Ok(Some(index)) => starts.push(Start::State(index)),
                Ok(None) => {
                    let error = UnknownStateError::new_err(format!(
                        "{} split into {}, which is neither registered nor an exit state",
                        self.place(run)?,
                        shown_label(&state)?
                    ));
                    return Err(self.failed(run, self.task(run), error));
                }
                Err(error) => return Err(self.failed(run, self.task(run), error)),
            }
        }
        self.open_checked(run, starts, join)
    }

    /// A factory gave the branches of a split.
    pub(super) fn made_branches<'py>(
        &mut self,
        run: &Bound<'py, Run>,
        value: &Bound<'py, PyAny>,
    ) -> PyResult<Flow<'py>> {
        let (py, table) = (run.py(), run.get().env.get().table.get());
        let Kind::Factory { join, .. } = &table.states[self.state].kind else {
            unreachable!("only a factory's state runs a factory")
        };
        let prepared = table.prepare.bind(py).call1((value,)).and_then(|prepared| tasks(prepared.cast::<PyTuple>()?));
        match prepared {
            Ok(starts) => self.open_checked(run, starts, join),
            Err(error) => Err(self.failed(run, self.task(run), error)),
        }
    }

    /// Opens a split whose number of branches is known only now.
    pub(super) fn open_checked<'py>(
        &mut self,
        run: &Bound<'py, Run>,
        starts: Vec<Start>,
        join: &JoinSpec,
    ) -> PyResult<Flow<'py>> {
        match join.strategy.check(starts.len(), join.timeout.is_some()) {
            Ok(()) => self.open(run, starts, join),
            Err(error) => Err(self.failed(run, self.task(run), error.into())),
        }
    }

    pub(super) fn open<'py>(
        &mut self,
        run: &Bound<'py, Run>,
        starts: Vec<Start>,
        join: &JoinSpec,
    ) -> PyResult<Flow<'py>> {
        if let Some(error) = run.get().check_budget(run.py())? {
            self.attempt = 0;
            return Err(self.failed(run, None, error));
        }
        self.fresh = true;
        self.attempt = 1;
        self.timer.attempt_deadline = None;
        let split = Split::open(run, self.state, starts, join)?;
        self.join(run, split, None)
    }

    /// Opens a split that is fed.
    pub(super) fn open_items<'py>(&mut self, run: &Bound<'py, Run>, items: Option<Items>) -> PyResult<Flow<'py>> {
        let py = run.py();
        let Some(items) = items else { unreachable!("a run of items opens its split once") };
        self.fresh = true;
        let feed = Some(Feed::new(py, items.task, items.iterator)?);
        let spec = JoinSpec::of_items(items.concurrency);
        let split = Split::new(run, self.state, Vec::new(), Join::fed(), &spec, feed)?;
        let feeder = items.feeder.map(|feeder| feeder.bind(py).call1((&split,))).transpose()?;
        Split::begin(&split, None, feeder)?;
        self.join(run, split.unbind(), None)
    }

    /// Waits for a split, or takes its result.
    pub(super) fn join<'py>(
        &mut self,
        run: &Bound<'py, Run>,
        split: Py<Split>,
        input: Option<Input<'py>>,
    ) -> PyResult<Flow<'py>> {
        let (py, table) = (run.py(), run.get().env.get().table.get());
        if let Some(input) = input {
            if let Input::Throw(error) = input {
                split.get().interrupt(py, error)?;
            }
            Split::resumed(split.bind(py))?;
        }
        let (verdict, result) = match Split::poll(split.bind(py))? {
            Poll::Turn => {
                self.suspended(run)?;
                return Ok(Flow::Suspend(py.None().into_bound(py), Phase::Join(split)));
            }
            Poll::Waiting(waiter) => {
                self.suspended(run)?;
                return Ok(Flow::Suspend(waiter, Phase::Join(split)));
            }
            Poll::Interrupted(error) => return Err(self.interrupted(run, error)?),
            Poll::Joined(verdict, result) => (verdict, result),
        };
        self.timer.settle(py, None)?;
        if matches!(self.program, Program::Items(_)) {
            return Ok(Flow::Finish(Bound::new(py, result)?.into_any()));
        }
        let Some(join) = table.states[self.state].join() else {
            unreachable!("a split was opened from a state that has a join")
        };
        if verdict == JoinVerdict::Proceed {
            self.handed = Handed::Joined(Py::new(py, result)?.into_any());
            return Ok(Flow::Go(Phase::Enter(join.next)));
        }
        let error = self.join_failed(run, join, verdict, result)?;
        Err(self.failed(run, None, error))
    }

    pub(super) fn join_failed(
        &self,
        run: &Bound<'_, Run>,
        join: &JoinSpec,
        verdict: JoinVerdict,
        result: SplitResult,
    ) -> PyResult<PyErr> {
        let py = run.py();
        let mut exceptions = result.exceptions(py);
        let result = Bound::new(py, result)?;
        let state = run.get().env.get().label(py, self.state);
        let counts = result.get().counts();
        let (class, message) = if verdict == JoinVerdict::TimedOut {
            let seconds = join.timeout.unwrap_or_default();
            let text = format!("the split in state {state} was not decided within its timeout of {seconds} s");
            let timeout = PyTimeoutError::new_err(text.clone());
            exceptions.insert(0, timeout.into_value(py).into_any());
            ("JoinTimeoutError", text)
        } else {
            ("JoinError", format!("the split in state {state} did not reach {}", join.strategy))
        };
        if exceptions.is_empty() {
            let text = format!("no branch of the split in state {state} raised: {counts}");
            exceptions.push(TaskExecutionError::new_err(text).into_value(py).into_any());
        }
        Ok(join_error(py, class, format!("{message}: {counts}"), exceptions, result.into_any()))
    }

    /// "task charge in state CHARGE"
    pub(super) fn place(&self, run: &Bound<'_, Run>) -> PyResult<String> {
        let py = run.py();
        let state = run.get().env.get().label(py, self.state).to_cow()?;
        Ok(match self.task(run) {
            Some(task) => format!("task {} in state {state}", task.get().name.bind(py).to_cow()?),
            None => format!("state {state}"),
        })
    }
}

pub(super) fn tasks(branches: &Bound<'_, PyTuple>) -> PyResult<Vec<Start>> {
    branches.iter().map(|branch| Ok(Start::Task(branch.cast_into::<TaskSpec>()?.unbind()))).collect()
}

/// The name of a branch.
pub(super) fn branch_name(py: Python<'_>, env: &Env, start: &Start) -> Py<PyString> {
    match start {
        Start::Task(task) | Start::Item(task, _) => task.get().name.clone_ref(py),
        Start::State(state) => env.label(py, *state).clone().unbind(),
    }
}
