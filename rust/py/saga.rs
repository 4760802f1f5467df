//! What a run has done and may have to undo.
//!
//! The compensatable steps that are done stand on a stack of the drive, newest last. A run that is about to end with an error
//! hands them to `roll_back` in `python/cano/_saga.py` and waits for it; the exception that gives ends the run.

use std::mem;

use pyo3::exceptions::PyGeneratorExit;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyString, PyTuple};
use pyo3::{PyTraverseError, PyVisit};

use crate::core::resume::{Position, Resumption};

use super::definition::{Compensation, TaskSpec};
use super::drive::{After, Drive, Flow, Phase, Work};
use super::env::{Env, Handed, RunContext, arguments};
use super::errors::{CancelledError, InvalidTransitionError, TaskExecutionError, WorkflowError};
use super::failure::Failure;
use super::run::{Input, Run};
use super::table::Kind;

/// Seconds for a roll-back, if nobody said: half of the run's timeout, and at most this.
const LONGEST: f64 = 30.0;

/// A step that is done, and how it is undone.
#[pyclass(frozen, module = "cano._core")]
pub(super) struct Completion {
    env: Py<Env>,
    /// The state; one that the workflow no longer has goes by its label.
    state: Py<PyAny>,
    pub(super) index: Option<usize>,
    #[pyo3(get)]
    pub(super) task: Py<PyString>,
    #[pyo3(get)]
    pub(super) visit: u32,
    /// What the step returned, or its bytes.
    pub(super) output: Py<PyAny>,
    #[pyo3(get)]
    is_stored: bool,
    /// The number of its row in the log.
    #[pyo3(get)]
    pub(super) sequence: Option<u64>,
    /// Its task, if that can still undo it.
    spec: Option<Py<TaskSpec>>,
}

#[pymethods]
impl Completion {
    #[getter]
    fn state(&self, py: Python<'_>) -> Py<PyAny> {
        self.state.clone_ref(py)
    }

    #[getter]
    fn output(&self, py: Python<'_>) -> Py<PyAny> {
        self.output.clone_ref(py)
    }

    #[getter]
    fn output_type(&self, py: Python<'_>) -> Option<Py<PyAny>> {
        self.compensation().map(|compensation| compensation.output_type.clone_ref(py))
    }

    /// Seconds that the compensation may take; None is no limit.
    #[getter]
    fn limit(&self) -> Option<f64> {
        self.spec.as_ref().and_then(|spec| spec.get().attempt_timeout())
    }

    #[getter]
    fn has_compensation(&self) -> bool {
        self.spec.is_some()
    }

    /// Calls the compensation with the output, and gives what it returned.
    fn undo<'py>(&self, py: Python<'py>, output: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        let (Some(compensation), Some(index)) = (self.compensation(), self.index) else {
            return Err(WorkflowError::new_err("the step has no compensation"));
        };
        let task = compensation.task.get();
        let context = || RunContext {
            env: self.env.clone_ref(py),
            scope: None,
            index,
            attempt: 1,
            visit: self.visit,
            is_branch: false,
        };
        let filled = arguments(task.plan.bind(py), self.env.get(), context, None, &Handed::Nothing, Some(output))?;
        task.call(py, filled)
    }

    /// Puts the place of the step on what its compensation raised.
    fn annotate(&self, run: &Bound<'_, Run>, error: &Bound<'_, PyAny>) -> PyResult<()> {
        let Some(state) = self.index else { return Ok(()) };
        let failure = Failure { state, task: Some(&self.task), attempt: 1, max_attempts: 1, branch: None };
        run.get().annotate_value(run.py(), &failure, error)
    }

    fn __repr__(&self, py: Python<'_>) -> PyResult<String> {
        Ok(format!("<Completion task={} visit={}>", self.task.bind(py).to_cow()?, self.visit))
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        self.traverse(&visit)
    }
}

impl Completion {
    /// The same with the number of its row, if there is one.
    pub(super) fn recorded(self, sequence: Option<u64>) -> Self {
        Self { sequence: sequence.or(self.sequence), ..self }
    }

    pub(super) fn traverse(&self, visit: &PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.env)?;
        visit.call(&self.state)?;
        visit.call(&self.output)?;
        visit.call(&self.spec)
    }

    fn compensation(&self) -> Option<&Compensation> {
        self.spec.as_ref()?.get().compensation.as_ref().map(Py::get)
    }

    /// A step whose completion was read from a log.
    pub(super) fn stored(
        py: Python<'_>,
        env: &Py<Env>,
        (state, task): (&str, &str),
        visit: u32,
        sequence: u64,
        output: Option<Py<PyAny>>,
    ) -> Self {
        let table = env.get().table.get();
        let index = table.by_label(py, state);
        let spec = index.and_then(|index| match &table.states[index].kind {
            Kind::Task { task, .. } if task.get().compensation.is_some() => Some(task.clone_ref(py)),
            _ => None,
        });
        Self {
            env: env.clone_ref(py),
            state: index.map_or_else(
                || PyString::new(py, state).into_any().unbind(),
                |index| env.get().state(py, index).clone().unbind(),
            ),
            index,
            task: PyString::new(py, task).unbind(),
            visit,
            is_stored: output.is_some(),
            output: output.unwrap_or_else(|| py.None()),
            sequence: Some(sequence),
            spec,
        }
    }
}

impl Drive {
    /// Takes over what a run has done that may have to be undone, and whether it was about to.
    pub(super) fn resume(&mut self, py: Python<'_>, env: &Py<Env>, found: &Resumption) -> PyResult<()> {
        for undo in &found.to_undo {
            let output = undo.output.as_ref().map(|output| PyBytes::new(py, output).into_any().unbind());
            let place = (undo.state.as_str(), undo.task.as_str());
            let step = Completion::stored(py, env, place, undo.visit, undo.sequence, output);
            self.stack.push(Py::new(py, step)?);
        }
        if let Position::RollBack { reason, .. } = &found.position {
            let text = format!("the run failed before it was resumed: {}", String::from_utf8_lossy(reason));
            self.phase = Phase::Undo(TaskExecutionError::new_err(text));
        }
        Ok(())
    }

    /// A compensatable step began: it goes on in a task of its own, which no cancel of the run reaches.
    pub(super) fn forward<'py>(
        &mut self,
        run: &Bound<'py, Run>,
        task: &TaskSpec,
        made: Bound<'py, PyAny>,
    ) -> PyResult<Flow<'py>> {
        let py = run.py();
        if made.get_type().getattr_opt(intern!(py, "__await__"))?.is_none() {
            return self.returned(run, Work::Forward, made);
        }
        let shielded = shim(py, "uninterrupted")?.call1((made, task.attempt_timeout()))?;
        self.work(run, Work::Forward, shielded, Input::nothing(py))
    }

    /// Keeps a cancel, the newest one, until the step in progress is done.
    pub(super) fn withhold(&mut self, py: Python<'_>, input: &Input<'_>) {
        if let Input::Throw(error) = input
            && error.is_instance_of::<CancelledError>(py)
        {
            self.withheld = Some(error.clone_ref(py));
        }
    }

    /// The cancel that was withheld, with the error as its context; the error if there is none.
    pub(super) fn or_cancel(&mut self, py: Python<'_>, error: PyErr) -> PyErr {
        let Some(cancel) = self.withheld.take() else { return error };
        cancel.set_context(py, Some(error));
        cancel
    }

    /// What a compensatable task returned: the next state, and its output. If that is refused the run ends, whatever
    /// `on_error` says.
    pub(super) fn compensatable<'py>(
        &mut self,
        run: &Bound<'py, Run>,
        value: &Bound<'py, PyAny>,
    ) -> PyResult<Flow<'py>> {
        let pair = value.cast::<PyTuple>().ok().filter(|pair| pair.len() == 2);
        let (Some(pair), Some(task)) = (pair, self.task(run)) else {
            let error = InvalidTransitionError::new_err(format!(
                "{} returned a value of type {}; a compensatable task returns (next state, output)",
                self.place(run)?,
                value.get_type().qualname()?
            ));
            let error = self.failed(run, self.task(run), error);
            return self.refused(run, error);
        };
        let step = self.completion(run, &task, pair.get_item(1)?.unbind());
        match self.route(run, &pair.get_item(0)?) {
            Ok(Flow::Go(Phase::Enter(next))) => self.completed(run, step, next),
            Ok(_) => unreachable!("a compensatable task leads to a state"),
            Err(error) => self.rejected(run, step, error),
        }
    }

    /// A compensatable step is done, and leads to a state that it may lead to.
    ///
    /// The one place between the two: a completion that is to outlive the process is written here, before it counts.
    fn completed<'py>(&mut self, run: &Bound<'py, Run>, step: Completion, next: usize) -> PyResult<Flow<'py>> {
        let (py, env) = (run.py(), run.get().env.get());
        let Some(log) = run.get().durable() else {
            self.push(run, step)?;
            return match self.withheld.take() {
                None => Ok(Flow::Go(Phase::Enter(next))),
                Some(cancel) => Err(self.interrupted(run, cancel)?),
            };
        };
        let next_state = env.label(py, next).to_string();
        match log.get().completed(step.output.bind(py), next_state) {
            Ok(answer) => {
                self.fresh = self.withheld.is_none();
                self.done = Some(step);
                self.record(run, answer, After::Enter(next), None)
            }
            Err(error) => {
                let error = self.failed(run, self.task(run), error);
                self.rejected(run, step, error)
            }
        }
    }

    /// Goes on with the roll-back of a run that failed before it was resumed.
    pub(super) fn undo<'py>(&mut self, run: &Bound<'py, Run>, error: PyErr) -> PyResult<Flow<'py>> {
        let error = run.get().annotate(run.py(), &self.failure(run, None), error);
        self.roll_back(run, error)
    }

    /// A compensatable step is done, and what it returned is refused: it is undone with the others.
    pub(super) fn rejected<'py>(
        &mut self,
        run: &Bound<'py, Run>,
        step: Completion,
        error: PyErr,
    ) -> PyResult<Flow<'py>> {
        self.push(run, step)?;
        self.refused(run, error)
    }

    fn refused<'py>(&mut self, run: &Bound<'py, Run>, mut error: PyErr) -> PyResult<Flow<'py>> {
        if self.withheld.is_some() {
            let cancel = self.or_cancel(run.py(), error);
            error = self.interrupted(run, cancel)?;
        }
        self.unwind(run, error)
    }

    /// A step that is to be undone even if it does not end well is about to begin; its output is None.
    pub(super) fn intend(&mut self, run: &Bound<'_, Run>, task: &Py<TaskSpec>) -> PyResult<()> {
        if !task.get().registers_before() || self.attempt > 1 {
            return Ok(());
        }
        let step = self.completion(run, task, run.py().None());
        self.push(run, step)
    }

    fn completion(&self, run: &Bound<'_, Run>, task: &Py<TaskSpec>, output: Py<PyAny>) -> Completion {
        let (py, this) = (run.py(), run.get());
        Completion {
            env: this.env.clone_ref(py),
            state: this.env.get().state(py, self.state).clone().unbind(),
            index: Some(self.state),
            task: task.get().name.clone_ref(py),
            visit: this.track.with(py, |track| track.visits.get(self.state).copied().unwrap_or(1)),
            output,
            is_stored: false,
            sequence: self.entered.filter(|_| task.get().registers_before()),
            spec: Some(task.clone_ref(py)),
        }
    }

    /// Puts a step on the stack; it takes the place of what was registered before it began.
    pub(super) fn push(&mut self, run: &Bound<'_, Run>, step: Completion) -> PyResult<()> {
        let place = (step.index, step.visit);
        let newest = self.stack.last().map(|newest| (newest.get().index, newest.get().visit));
        let replaced = if newest == Some(place) { self.stack.pop() } else { None };
        self.stack.push(Py::new(run.py(), step)?);
        drop(replaced);
        Ok(())
    }

    /// The run is about to end with an error: undoes what it has done.
    pub(super) fn unwind<'py>(&mut self, run: &Bound<'py, Run>, error: PyErr) -> PyResult<Flow<'py>> {
        let py = run.py();
        // A run that is over, or somebody else's, is left as it is.
        let is_open = run.get().durable().is_none_or(|log| !log.get().is_over(py) && !log.get().is_lost(py));
        if self.stack.is_empty() || !is_open || error.is_instance_of::<PyGeneratorExit>(py) {
            return Err(error);
        }
        self.roll_back(run, error)
    }

    fn roll_back<'py>(&mut self, run: &Bound<'py, Run>, error: PyErr) -> PyResult<Flow<'py>> {
        let py = run.py();
        self.timer.stop(py);
        self.fresh = false;
        let env = run.get().env.get();
        let limit = env.table.get().compensation_timeout;
        let limit = limit.unwrap_or_else(|| env.budget.map_or(LONGEST, |budget| LONGEST.min(budget.limit / 2.0)));
        let steps = PyTuple::new(py, mem::take(&mut self.stack))?;
        let made = shim(py, "roll_back")?.call1((run, steps, error.into_value(py), limit))?;
        self.work(run, Work::RollBack, made, Input::nothing(py))
    }

    /// The run is closed, and can wait for nothing: tells of the steps that stay as they are.
    pub(super) fn abandon(&mut self, py: Python<'_>) -> PyResult<()> {
        if self.stack.is_empty() {
            return Ok(());
        }
        let steps = PyTuple::new(py, mem::take(&mut self.stack))?;
        shim(py, "abandon")?.call1((steps,)).map(drop)
    }

    /// Refuses a compensatable task in a branch, whose run nobody rolls back.
    pub(super) fn check_stack(&self, run: &Bound<'_, Run>, task: &Py<TaskSpec>) -> PyResult<()> {
        if run.get().scope.is_none() {
            return Ok(());
        }
        let text =
            "is compensatable, which it cannot be in a branch of a split: do it before the split or after the join";
        let error = WorkflowError::new_err(format!("{} {text}", self.place(run)?));
        Err(self.failed(run, Some(task.clone_ref(run.py())), error))
    }
}

fn shim<'py>(py: Python<'py>, name: &str) -> PyResult<Bound<'py, PyAny>> {
    py.import(intern!(py, "cano._saga"))?.getattr(name)
}
