//! What a run shares with its branches, and what a task may ask about where it is.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use pyo3::exceptions::{PyBaseException, PyRuntimeError};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyString, PyTuple, PyType};
use pyo3::{PyTraverseError, PyVisit};

use super::asyncio::Clock;
use super::definition::{Plan, Source};
use super::errors::{self, WorkflowTimeoutError};
use super::log::Log;
use super::run::Run;
use super::table::Table;

type Found = HashMap<(usize, usize), (Py<Plan>, Py<PyAny>)>;

/// The constants of one run: table, resources, ids, clock and budget.
#[pyclass(frozen, module = "cano._core")]
pub(super) struct Env {
    pub(super) table: Py<Table>,
    pub(super) resources: Py<PyAny>,
    pub(super) workflow_id: Option<Py<PyString>>,
    /// Numbers the runs of this process; tells a nested run's error from a stale one.
    pub(super) sequence: u64,
    pub(super) budget: Option<Budget>,
    /// The run's own variables.
    data: Option<Py<PyAny>>,
    /// Where a durable run writes its rows.
    pub(super) log: Option<Py<Log>>,
    run_id: OnceLock<Py<PyString>>,
    clock: OnceLock<Clock>,
    /// Resources looked up so far, by plan and argument; the plan is kept so that its address stays its own.
    found: Mutex<Found>,
}

/// The whole-run timeout.
#[derive(Clone, Copy)]
pub(super) struct Budget {
    started: f64,
    pub(super) limit: f64,
    pub(super) deadline: f64,
}

impl Env {
    pub(super) fn new(
        py: Python<'_>,
        table: Py<Table>,
        resources: Py<PyAny>,
        workflow_id: Option<Py<PyString>>,
        timeout: Option<f64>,
        data: Option<Py<PyAny>>,
        log: Option<Py<Log>>,
    ) -> PyResult<Self> {
        static RUNS: AtomicU64 = AtomicU64::new(1);
        let mut env = Self {
            table,
            resources,
            workflow_id,
            sequence: RUNS.fetch_add(1, Ordering::Relaxed),
            budget: None,
            data,
            log,
            run_id: OnceLock::new(),
            clock: OnceLock::new(),
            found: Mutex::default(),
        };
        if let Some(limit) = timeout {
            let started = env.clock(py)?.now(py)?;
            env.budget = Some(Budget { started, limit, deadline: started + limit });
        }
        Ok(env)
    }

    pub(super) fn clock(&self, py: Python<'_>) -> PyResult<&Clock> {
        if let Some(clock) = self.clock.get() {
            return Ok(clock);
        }
        let clock = Clock::running(py)?;
        Ok(self.clock.get_or_init(|| clock))
    }

    pub(super) fn now(&self, py: Python<'_>) -> PyResult<f64> {
        self.clock(py)?.now(py)
    }

    pub(super) fn run_id(&self, py: Python<'_>) -> PyResult<Py<PyString>> {
        if let Some(id) = self.run_id.get() {
            return Ok(id.clone_ref(py));
        }
        let made = match &self.log {
            Some(log) => PyString::new(py, &log.get().run_id_in_hex()).unbind(),
            None => py.import("secrets")?.call_method1("token_hex", (16,))?.cast_into()?.unbind(),
        };
        Ok(self.run_id.get_or_init(|| made).clone_ref(py))
    }

    /// The error of a run whose budget is used up.
    pub(super) fn timed_out(&self, py: Python<'_>, budget: Budget) -> PyErr {
        match self.now(py) {
            Ok(now) => {
                let (elapsed, limit) = (now - budget.started, budget.limit);
                WorkflowTimeoutError::new_err((
                    format!("the run took {elapsed:.3} s of the {limit} s it was given"),
                    elapsed,
                    limit,
                ))
            }
            Err(error) => error,
        }
    }

    /// The resource that argument number `at` of a plan asks for, looked up and type-checked once per run.
    pub(super) fn resource<'py>(
        &self,
        plan: &Bound<'py, Plan>,
        at: usize,
        key: &Py<PyAny>,
        class: &Py<PyAny>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let py = plan.py();
        let place = (plan.as_ptr() as usize, at);
        let known =
            self.found.lock().unwrap_or_else(PoisonError::into_inner).get(&place).map(|(_, value)| value.clone_ref(py));
        if let Some(value) = known {
            return Ok(value.into_bound(py));
        }
        let value = self.resources.bind(py).call_method1(intern!(py, "get"), (key, class))?;
        let entry = (plan.clone().unbind(), value.clone().unbind());
        let replaced = self.found.lock().unwrap_or_else(PoisonError::into_inner).insert(place, entry);
        drop(replaced);
        Ok(value)
    }

    /// The run's own variables, for a parameter that asks for this class.
    fn data<'py>(&self, class: &Bound<'py, PyType>) -> PyResult<Bound<'py, PyAny>> {
        match &self.data {
            Some(data) if data.bind(class.py()).is_instance(class)? => Ok(data.bind(class.py()).clone()),
            _ => Err(errors::WorkflowError::new_err(format!(
                "the task takes {} as run data, which this run does not have",
                class.name()?
            ))),
        }
    }

    pub(super) fn state<'py>(&self, py: Python<'py>, index: usize) -> &Bound<'py, PyAny> {
        self.table.get().states[index].key.bind(py)
    }

    pub(super) fn label<'py>(&self, py: Python<'py>, index: usize) -> &Bound<'py, PyString> {
        self.table.get().states[index].label.bind(py)
    }

    /// The states of a path as a tuple.
    pub(super) fn path<'py>(
        &self,
        py: Python<'py>,
        path: impl ExactSizeIterator<Item = u32>,
    ) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(py, path.map(|index| self.state(py, index as usize)))
    }
}

#[pymethods]
impl Env {
    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.table)?;
        visit.call(&self.resources)?;
        visit.call(&self.data)?;
        visit.call(&self.log)?;
        if let Some(clock) = self.clock.get() {
            visit.call(&clock.event_loop)?;
        }
        // The lock is free whenever Python, and so the collector, runs.
        if let Ok(found) = self.found.try_lock() {
            for (plan, value) in found.values() {
                visit.call(plan)?;
                visit.call(value)?;
            }
        }
        Ok(())
    }
}

/// Where in its parent's run a split happened; its branches share it.
pub(super) struct Scope {
    /// The scope of the run that split, and which branch of it that run was.
    pub(super) parent: Option<(Arc<Scope>, usize)>,
    pub(super) state: usize,
    pub(super) visit: u32,
    pub(super) path: Box<[u32]>,
    pub(super) entered: u64,
}

/// What led into a state, for the one visit that began with it.
#[derive(Default)]
pub(super) enum Handed {
    #[default]
    Nothing,
    /// The `SplitResult` of the split that joined into the state.
    Joined(Py<PyAny>),
    /// The error that `on_error` sent there.
    Caught(Py<PyBaseException>),
}

impl Handed {
    /// The visit is over.
    #[inline]
    pub(super) fn forget(&mut self) {
        if !matches!(self, Handed::Nothing) {
            *self = Handed::Nothing;
        }
    }
}

/// Where a task is: its run, state, attempt, visit and branch.
#[pyclass(frozen, module = "cano")]
pub(super) struct RunContext {
    pub(super) env: Py<Env>,
    pub(super) scope: Option<(Arc<Scope>, usize)>,
    pub(super) index: usize,
    pub(super) attempt: u32,
    pub(super) visit: u32,
    /// Whether the task is itself a branch: then the scope's last level already names state, visit and branch.
    pub(super) is_branch: bool,
}

#[pymethods]
impl RunContext {
    #[getter]
    fn workflow_id(&self, py: Python<'_>) -> Option<Py<PyString>> {
        let id = self.env.get().workflow_id.as_ref()?;
        Some(id.clone_ref(py))
    }

    #[getter]
    fn run_id(&self, py: Python<'_>) -> PyResult<Py<PyString>> {
        self.env.get().run_id(py)
    }

    #[getter]
    fn state(&self, py: Python<'_>) -> Py<PyAny> {
        self.env.get().state(py, self.index).clone().unbind()
    }

    #[getter]
    fn attempt(&self) -> u32 {
        self.attempt
    }

    #[getter]
    fn visit(&self) -> u32 {
        self.visit
    }

    #[getter]
    fn branch(&self) -> Option<usize> {
        self.scope.as_ref().map(|(_, branch)| *branch)
    }

    fn remaining(&self, py: Python<'_>) -> PyResult<f64> {
        let env = self.env.get();
        match env.budget {
            Some(budget) => Ok((budget.deadline - env.now(py)?).max(0.0)),
            None => Ok(f64::INFINITY),
        }
    }

    #[getter]
    fn idempotency_key(&self, py: Python<'_>) -> PyResult<String> {
        let env = self.env.get();
        // A durable run knows its own id again; a new run under the same workflow id is another one.
        let id = match &env.workflow_id {
            Some(id) if env.log.is_none() => id.clone_ref(py),
            _ => env.run_id(py)?,
        };
        // Each part carries its length, so that no two places share a text.
        let mut text = String::new();
        let mut add = |part: &str| {
            text.push_str(&part.len().to_string());
            text.push(':');
            text.push_str(part);
        };
        add(&id.bind(py).to_cow()?);
        let mut levels = Vec::new();
        let mut level = self.scope.as_ref();
        while let Some((scope, branch)) = level {
            levels.push((scope.state, scope.visit, *branch));
            level = scope.parent.as_ref();
        }
        for (state, visit, branch) in levels.into_iter().rev() {
            add(&env.label(py, state).to_cow()?);
            add(&visit.to_string());
            add(&branch.to_string());
        }
        if !self.is_branch {
            add(&env.label(py, self.index).to_cow()?);
            add(&self.visit.to_string());
        }
        let digest = py.import("hashlib")?.getattr("blake2b")?.call1((PyBytes::new(py, text.as_bytes()),))?;
        let digest: String = digest.call_method0("hexdigest")?.extract()?;
        Ok(digest[..32].to_owned())
    }

    fn __repr__(&self, py: Python<'_>) -> PyResult<String> {
        let branch = self.branch().map_or(String::new(), |branch| format!(" branch={branch}"));
        let label = self.env.get().label(py, self.index).to_cow()?;
        Ok(format!("<RunContext state={label} attempt={} visit={}{branch}>", self.attempt, self.visit))
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.env)
    }
}

/// The arguments of a task, in the order of its plan.
pub(super) fn arguments<'py>(
    plan: &Bound<'py, Plan>,
    env: &Env,
    context: impl Fn() -> RunContext,
    run: Option<&Bound<'py, Run>>,
    handed: &Handed,
    cursor: Option<&Bound<'py, PyAny>>,
) -> PyResult<Vec<Bound<'py, PyAny>>> {
    let py = plan.py();
    plan.get()
        .sources
        .iter()
        .enumerate()
        .map(|(at, source)| match source {
            Source::Cursor => Ok(cursor.map_or_else(|| py.None().into_bound(py), Clone::clone)),
            Source::Resources => Ok(env.resources.bind(py).clone()),
            Source::Resource { key, class } => env.resource(plan, at, key, class),
            Source::Context => Ok(Bound::new(py, context())?.into_any()),
            Source::Run => match run {
                Some(run) => Ok(run.clone().into_any()),
                None => Err(PyRuntimeError::new_err("a branch without a run of its own was asked for its run")),
            },
            Source::Data(class) => env.data(class.bind(py)),
            Source::Joined { optional } => match handed {
                Handed::Joined(result) => Ok(result.bind(py).clone()),
                Handed::Nothing | Handed::Caught(_) if *optional => Ok(py.None().into_bound(py)),
                Handed::Nothing | Handed::Caught(_) => Err(errors::WorkflowError::new_err(
                    "the task takes a SplitResult, but its state was not entered through a split; \
                     annotate the parameter SplitResult | None",
                )),
            },
            Source::Caught { classes, optional } => match handed {
                Handed::Caught(error) if error.bind(py).is_instance(classes.bind(py))? => {
                    Ok(error.bind(py).as_any().clone())
                }
                Handed::Caught(error) => {
                    let (asked, came) = (names(classes.bind(py))?, error.bind(py).get_type().name()?);
                    Err(errors::WorkflowError::new_err(format!(
                        "the task takes Caught[{asked}], but its state was entered with {came}; \
                         annotate the parameter Caught[{asked} | {came}]"
                    )))
                }
                Handed::Nothing | Handed::Joined(_) if *optional => Ok(py.None().into_bound(py)),
                Handed::Nothing | Handed::Joined(_) => {
                    let asked = names(classes.bind(py))?;
                    Err(errors::WorkflowError::new_err(format!(
                        "the task takes Caught[{asked}], but its state was not entered through on_error; \
                         annotate the parameter Caught[{asked}] | None"
                    )))
                }
            },
        })
        .collect()
}

/// "Declined | Expired"
fn names(classes: &Bound<'_, PyTuple>) -> PyResult<String> {
    let names = classes.iter().map(|class| Ok(class.cast::<PyType>()?.name()?.to_string()));
    Ok(names.collect::<PyResult<Vec<_>>>()?.join(" | "))
}
