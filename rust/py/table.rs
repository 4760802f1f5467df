//! The frozen form of a workflow: states by identity, everything about a state by index.

use std::collections::{HashMap, HashSet, hash_map};

use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyString, PyTuple, PyType};
use pyo3::{PyTraverseError, PyVisit};

use crate::core::graph::{self, Next, Node, Target};
use crate::core::join::JoinStrategy;

use super::bulkhead::PyBulkhead;
use super::convert::is_hashable;
use super::definition::{Plan, PyJoinStrategy, TaskSpec};
use super::errors::{ConfigurationError, configuration, shown_label};
use super::on_error::OnError;

/// State object -> dense index.
///
/// A hit on the address is always right: the table keeps its keys alive, so an equal address is the same object. A miss
/// asks the dict by hash and `==`; its answer is not remembered by address, because that object may die and its address be
/// used again.
struct Index {
    /// (address, index + 1); address 0 is free. A power of two, at most half full.
    slots: Box<[(usize, u32)]>,
    by_value: Py<PyDict>,
}

impl Index {
    fn new(py: Python<'_>, keys: &[Py<PyAny>]) -> PyResult<Self> {
        let by_value = PyDict::new(py);
        let mut slots = vec![(0, 0); (keys.len() * 2).next_power_of_two().max(8)].into_boxed_slice();
        for (index, key) in keys.iter().enumerate() {
            by_value.set_item(key, index)?;
            let mut at = Self::start(key.as_ptr() as usize, slots.len());
            while slots[at].0 != 0 {
                at = (at + 1) & (slots.len() - 1);
            }
            slots[at] = (key.as_ptr() as usize, index as u32);
        }
        Ok(Self { slots, by_value: by_value.unbind() })
    }

    /// Objects are 16-byte aligned; folding the higher bits in keeps members of one arena apart.
    fn start(address: usize, slots: usize) -> usize {
        let folded = address >> 4;
        (folded ^ (folded >> 9)) & (slots - 1)
    }

    #[inline]
    fn by_identity(&self, key: &Bound<'_, PyAny>) -> Option<usize> {
        let address = key.as_ptr() as usize;
        let mut at = Self::start(address, self.slots.len());
        loop {
            let (found, index) = self.slots[at];
            if found == address {
                return Some(index as usize);
            }
            if found == 0 {
                return None;
            }
            at = (at + 1) & (self.slots.len() - 1);
        }
    }

    /// By hash and `==`; raises what the key's own methods raise.
    fn by_value(&self, key: &Bound<'_, PyAny>) -> PyResult<Option<usize>> {
        match self.by_value.bind(key.py()).get_item(key)? {
            Some(index) => Ok(Some(index.extract()?)),
            None => Ok(None),
        }
    }
}

/// How the branches of a split are joined.
pub(super) struct JoinSpec {
    pub(super) strategy: JoinStrategy,
    pub(super) next: usize,
    pub(super) timeout: Option<f64>,
    pub(super) bulkhead: Option<usize>,
    /// A bulkhead that others use as well.
    pub(super) shared: Option<Py<PyBulkhead>>,
    pub(super) fail_fast: bool,
    pub(super) hedge_after: Option<f64>,
}

impl JoinSpec {
    /// Of a split that is fed: so many at once, and every end counts.
    pub(super) fn of_items(concurrency: usize) -> Self {
        Self {
            strategy: JoinStrategy::All,
            next: 0,
            timeout: None,
            bulkhead: Some(concurrency),
            shared: None,
            fail_fast: false,
            hedge_after: None,
        }
    }

    /// Whether branches may have to be started after the others.
    pub(super) fn starts_late(&self) -> bool {
        self.bulkhead.is_some() || self.shared.is_some() || self.hedge_after.is_some()
    }
}

/// What happens in a state.
pub(super) enum Kind {
    Exit,
    /// One task; with a join, it may return `TaskResult.Split`.
    Task {
        task: Py<TaskSpec>,
        fork: Option<JoinSpec>,
    },
    /// A fixed list of branches.
    Split {
        branches: Py<PyTuple>,
        join: JoinSpec,
    },
    /// A task that makes the list of branches when the state is entered.
    Factory {
        task: Py<TaskSpec>,
        join: JoinSpec,
    },
}

pub(super) struct State {
    pub(super) key: Py<PyAny>,
    pub(super) label: Py<PyString>,
    pub(super) kind: Kind,
    /// Indices of the states that the task declared to return; None where it declared nothing.
    pub(super) declared: Option<Box<[usize]>>,
    pub(super) on_error: OnError,
}

/// A frozen workflow.
#[pyclass(frozen, module = "cano._core")]
pub(super) struct Table {
    index: Index,
    pub(super) states: Box<[State]>,
    /// Whether some task asks for a `RunContext`, or can be undone, so that visits must be counted.
    pub(super) counts_visits: bool,
    /// Turns what a split factory returned into a tuple of `TaskSpec`.
    pub(super) prepare: Py<PyAny>,
    /// `async def drive(run): return await run`, so that a task always runs a real coroutine.
    pub(super) drive: Py<PyAny>,
    /// What a task returns instead of a bare state.
    pub(super) single: Py<PyType>,
    pub(super) split: Py<PyType>,
    /// What a step returns.
    pub(super) more: Py<PyType>,
    pub(super) done: Py<PyType>,
    /// Seconds for a roll-back; None is the default.
    pub(super) compensation_timeout: Option<f64>,
}

/// A state as the Python face hands it over.
#[derive(FromPyObject)]
struct Entry<'py>(
    Bound<'py, PyAny>,         // the state
    Bound<'py, PyString>,      // its label
    Bound<'py, PyAny>,         // TaskSpec, tuple of TaskSpec, or None for an exit
    Option<Bound<'py, PyAny>>, // JoinConfig
    Bound<'py, PyTuple>,       // on_error, as `Key`s
);

/// A class of errors, and the state that it leads to.
type Key<'py> = (Bound<'py, PyType>, Bound<'py, PyAny>);
/// prepare, drive, and the classes of results: `Table` tells what each is for.
type Shims = (Py<PyAny>, Py<PyAny>, Py<PyType>, Py<PyType>, Py<PyType>, Py<PyType>);

/// What an annotation lists: the indices of the states, and the targets for the graph.
type Declared = (Box<[usize]>, Vec<Target>);

/// Collects what is wrong with a definition while its parts are converted.
struct Checked<'a> {
    index: &'a Index,
    problems: Vec<String>,
    /// The states that some join, and some `on_error`, leads to.
    joined: Vec<usize>,
    caught: Vec<usize>,
}

impl Checked<'_> {
    fn join(&mut self, config: &Bound<'_, PyAny>, label: &str) -> PyResult<Option<JoinSpec>> {
        let py = config.py();
        let next = config.getattr(intern!(py, "next_state"))?;
        let Some(target) = self.index.by_value(&next)? else {
            self.problems.push(format!(
                "the split in state {label} joins into {}, which is neither registered nor an exit state",
                shown_label(&next)?
            ));
            return Ok(None);
        };
        let strategy = config.getattr(intern!(py, "strategy"))?;
        let bulkhead = config.getattr(intern!(py, "bulkhead"))?;
        let shared = bulkhead.cast::<PyBulkhead>().ok().map(|shared| shared.clone().unbind());
        // A limit that no integer of ours holds is beyond any number of branches.
        let own = (shared.is_none() && !bulkhead.is_none()).then(|| bulkhead.extract().unwrap_or(usize::MAX));
        self.joined.push(target);
        Ok(Some(JoinSpec {
            strategy: strategy.cast::<PyJoinStrategy>()?.get().0,
            next: target,
            timeout: config.getattr(intern!(py, "timeout"))?.extract()?,
            bulkhead: own,
            shared,
            fail_fast: config.getattr(intern!(py, "fail_fast"))?.extract()?,
            hedge_after: config.getattr(intern!(py, "hedge_after"))?.extract()?,
        }))
    }

    fn strategy(&mut self, join: &JoinSpec, branches: Option<usize>, label: &str) {
        // The number of branches of a factory or a fork is known only at run time: then only the timeout is looked at.
        let total = branches.unwrap_or(usize::MAX);
        if let Err(error) = join.strategy.check(total, join.timeout.is_some()) {
            self.problems.push(format!("the split in state {label}: {error}"));
        }
    }

    fn declared(&self, task: &TaskSpec, py: Python<'_>) -> PyResult<Option<Declared>> {
        let Some(declared) = &task.plan_ref().declared else {
            return Ok(None);
        };
        let mut indices = Vec::new();
        let mut targets = Vec::new();
        for state in declared.bind(py) {
            let target = self.target(&state)?;
            if let Target::State(index) = target {
                indices.push(index);
            }
            targets.push(target);
        }
        Ok(Some((indices.into_boxed_slice(), targets)))
    }

    fn on_error(&mut self, keys: &Bound<'_, PyTuple>) -> PyResult<(OnError, Vec<Target>)> {
        let mut found = Vec::new();
        let mut targets = Vec::new();
        for key in keys {
            let (class, state): Key<'_> = key.extract()?;
            let target = self.target(&state)?;
            if let Target::State(index) = target {
                found.push((class.unbind(), index));
                self.caught.push(index);
            }
            targets.push(target);
        }
        Ok((OnError::new(found), targets))
    }

    fn target(&self, state: &Bound<'_, PyAny>) -> PyResult<Target> {
        Ok(match self.index.by_value(state)? {
            Some(index) => Target::State(index),
            None => Target::Missing(shown_label(state)?),
        })
    }

    fn state(&mut self, entry: Entry<'_>) -> PyResult<(Option<State>, Node)> {
        let Entry(key, label, work, join, on_error) = entry;
        let (py, name) = (key.py(), label.to_string());
        let mut declared = None;
        let mut next = Next::Undeclared;
        let join_spec = match &join {
            Some(config) => self.join(config, &name)?,
            None => None,
        };
        let kind = if work.is_none() {
            Some(Kind::Exit)
        } else if let Ok(branches) = work.cast::<PyTuple>() {
            join_spec.map(|join| {
                self.strategy(&join, Some(branches.len()), &name);
                next = Next::Declared(vec![Target::State(join.next)]);
                Kind::Split { branches: branches.clone().unbind(), join }
            })
        } else if let Ok(factory) = work.cast::<Factory>() {
            join_spec.map(|join| {
                self.strategy(&join, None, &name);
                next = Next::Declared(vec![Target::State(join.next)]);
                Kind::Factory { task: factory.get().task.clone_ref(py), join }
            })
        } else {
            let task = work.cast::<TaskSpec>()?;
            if let Some(join) = &join_spec {
                self.strategy(join, None, &name);
            } else if let Some((indices, targets)) = self.declared(task.get(), py)? {
                declared = Some(indices);
                next = Next::Declared(targets);
            }
            let lost = join.is_some() && join_spec.is_none();
            (!lost).then(|| Kind::Task { task: task.clone().unbind(), fork: join_spec })
        };
        let (on_error, error_targets) = self.on_error(&on_error)?;
        let node = Node { label: name, exit: work.is_none(), next, on_error: error_targets };
        let state = kind.map(|kind| State { key: key.unbind(), label: label.unbind(), kind, declared, on_error });
        Ok((state, node))
    }

    /// Tasks that need a `SplitResult` or an error although none can be there for them.
    fn handed_nothing(&self, py: Python<'_>, states: &[Option<State>]) -> Vec<String> {
        let mut problems = Vec::new();
        for (index, state) in states.iter().enumerate() {
            let Some(State { label, kind, .. }) = state else { continue };
            match kind {
                Kind::Exit => {}
                Kind::Task { task, .. } | Kind::Factory { task, .. } => {
                    let plan = task.get().plan_ref();
                    if plan.needs_joined() && !self.joined.contains(&index) {
                        problems.push(format!(
                            "the task of state {label} takes a SplitResult, but no split joins into that state"
                        ));
                    }
                    if plan.needs_caught() && !self.caught.contains(&index) {
                        problems.push(format!(
                            "the task of state {label} takes a Caught error, but no on_error leads to that state"
                        ));
                    }
                }
                Kind::Split { branches, .. } => {
                    let needs = |asks: fn(&Plan) -> bool| {
                        let asks_one = |branch: Bound<'_, PyAny>| {
                            branch.cast::<TaskSpec>().is_ok_and(|task| asks(task.get().plan_ref()))
                        };
                        branches.bind(py).iter().any(asks_one)
                    };
                    if needs(Plan::needs_joined) {
                        problems.push(format!(
                            "a branch of the split in state {label} takes a SplitResult, which only the state that it joins into gets"
                        ));
                    }
                    if needs(Plan::needs_caught) {
                        problems.push(format!(
                            "a branch of the split in state {label} takes a Caught error, which only the task of a state gets"
                        ));
                    }
                }
            }
        }
        problems
    }
}

impl Checked<'_> {
    /// Compensatable tasks that could not be told apart, and those that a branch of a split would run.
    fn not_undone(&self, py: Python<'_>, states: &[Option<State>]) -> PyResult<Vec<String>> {
        let mut problems = Vec::new();
        let mut names: HashMap<String, String> = HashMap::new();
        for state in states.iter().flatten() {
            let Some(task) = state.compensatable() else { continue };
            let (name, label) = (task.name.bind(py).to_string(), state.label.bind(py).to_string());
            match names.entry(name) {
                hash_map::Entry::Occupied(other) => problems.push(format!(
                    "the compensatable tasks of states {} and {label} are both called {}; give each a name of its own",
                    other.get(),
                    other.key()
                )),
                hash_map::Entry::Vacant(free) => drop(free.insert(label)),
            }
        }
        for (start, state) in states.iter().enumerate() {
            let Some(State { label, kind: Kind::Task { task, fork: Some(join) }, .. }) = state else { continue };
            let Some((branches, _)) = self.declared(task.get(), py)? else { continue };
            let (mut seen, mut rest) = (HashSet::from([start, join.next]), branches.to_vec());
            while let Some(index) = rest.pop() {
                let Some(state) = states[index].as_ref().filter(|_| seen.insert(index)) else { continue };
                if state.compensatable().is_some() {
                    problems.push(format!(
                        "a branch of the split in state {label} leads to {}, whose task is compensatable; \
                         do it before the split or after the join",
                        state.label.bind(py)
                    ));
                }
                rest.extend(state.declared.iter().flatten());
            }
        }
        Ok(problems)
    }
}

/// Marks the task of a `register_split` whose branches are made at run time.
#[pyclass(frozen, module = "cano._core")]
pub(super) struct Factory {
    task: Py<TaskSpec>,
}

#[pymethods]
impl Factory {
    #[new]
    fn new(task: Py<TaskSpec>) -> Self {
        Self { task }
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.task)
    }
}

#[pymethods]
impl Table {
    /// `entries`: (state, label, task | tuple of tasks | Factory | None, join config | None, keys of `on_error`), registered
    /// states first.
    #[new]
    #[pyo3(signature = (subject, entries, shims, compensation_timeout, /))]
    fn new(
        py: Python<'_>,
        subject: &str,
        entries: Vec<Entry<'_>>,
        shims: Shims,
        compensation_timeout: Option<f64>,
    ) -> PyResult<Self> {
        let keys: Vec<Py<PyAny>> = entries.iter().map(|entry| entry.0.clone().unbind()).collect();
        let index = Index::new(py, &keys)?;
        let mut checked = Checked { index: &index, problems: Vec::new(), joined: Vec::new(), caught: Vec::new() };
        let mut states = Vec::with_capacity(entries.len());
        let mut nodes = Vec::with_capacity(entries.len());
        for entry in entries {
            let (state, node) = checked.state(entry)?;
            states.push(state);
            nodes.push(node);
        }
        let mut problems: Vec<String> =
            graph::problems(&nodes, None).into_iter().map(|problem| problem.to_string()).collect();
        problems.append(&mut checked.problems);
        problems.extend(checked.handed_nothing(py, &states));
        problems.extend(checked.not_undone(py, &states)?);
        if !problems.is_empty() {
            return Err(configuration(py, subject, problems));
        }
        let states: Vec<State> = states.into_iter().flatten().collect();
        let counts_visits = states.iter().any(|state| state.wants_context(py));
        let (prepare, drive, single, split, more, done) = shims;
        Ok(Self {
            index,
            states: states.into_boxed_slice(),
            counts_visits,
            prepare,
            drive,
            single,
            split,
            more,
            done,
            compensation_timeout,
        })
    }

    /// The labels of the states that a run cannot be resumed in: they take what only the step before them can give.
    #[getter]
    fn passing(&self, py: Python<'_>) -> Vec<String> {
        self.states.iter().filter(|state| !state.lasts()).map(|state| state.label.bind(py).to_string()).collect()
    }

    /// The states by their labels.
    #[getter]
    fn labels<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let labels = PyDict::new(py);
        self.states.iter().try_for_each(|state| labels.set_item(&state.label, &state.key))?;
        Ok(labels)
    }

    /// Refuses a state in which no run can start.
    fn check_initial(&self, state: &Bound<'_, PyAny>) -> PyResult<()> {
        self.initial(state).map(|_| ())
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.index.by_value)?;
        for state in &self.states {
            visit.call(&state.key)?;
            visit.call(state.join().and_then(|join| join.shared.as_ref()))?;
            state.on_error.traverse(&visit)?;
            match &state.kind {
                Kind::Exit => {}
                Kind::Task { task, .. } | Kind::Factory { task, .. } => visit.call(task)?,
                Kind::Split { branches, .. } => visit.call(branches)?,
            }
        }
        Ok(())
    }
}

impl State {
    /// The task, where no attempt timeout, no rate limiter, no cursor and no output has to be looked after.
    #[inline]
    pub(super) fn untimed_task(&self) -> Option<&TaskSpec> {
        match &self.kind {
            Kind::Task { task, .. }
                if task.get().attempt_timeout().is_none()
                    && task.get().limiter().is_none()
                    && !task.get().has_steps
                    && task.get().compensation.is_none() =>
            {
                Some(task.get())
            }
            _ => None,
        }
    }

    /// The task of the state, if it has one.
    fn task(&self) -> Option<&TaskSpec> {
        match &self.kind {
            Kind::Task { task, .. } | Kind::Factory { task, .. } => Some(task.get()),
            Kind::Split { .. } | Kind::Exit => None,
        }
    }

    /// What a row calls the task; nothing for a split and an exit.
    pub(super) fn task_name(&self, py: Python<'_>) -> String {
        match &self.kind {
            Kind::Task { task, .. } => task.get().name.bind(py).to_string(),
            Kind::Factory { .. } | Kind::Split { .. } | Kind::Exit => String::new(),
        }
    }

    pub(super) fn has_steps(&self) -> bool {
        self.task().is_some_and(|task| task.has_steps)
    }

    pub(super) fn registers_before(&self) -> bool {
        self.task().is_some_and(TaskSpec::registers_before)
    }

    /// Whether entering the state is worth a row: a router only chooses, and chooses again.
    pub(super) fn has_row(&self) -> bool {
        !self.task().is_some_and(TaskSpec::is_router)
    }

    /// Whether a run can be resumed in this state.
    fn lasts(&self) -> bool {
        self.has_row() && !self.task().is_some_and(|task| task.plan_ref().wants_handed())
    }

    /// Whether the task's annotation allows this next state.
    #[inline]
    pub(super) fn may_lead_to(&self, next: usize) -> bool {
        self.declared.as_ref().is_none_or(|declared| declared.contains(&next))
    }

    pub(super) fn join(&self) -> Option<&JoinSpec> {
        match &self.kind {
            Kind::Task { fork, .. } => fork.as_ref(),
            Kind::Split { join, .. } | Kind::Factory { join, .. } => Some(join),
            Kind::Exit => None,
        }
    }

    /// The task, if it can be undone.
    fn compensatable(&self) -> Option<&TaskSpec> {
        match &self.kind {
            Kind::Task { task, .. } => Some(task.get()).filter(|task| task.compensation.is_some()),
            Kind::Exit | Kind::Split { .. } | Kind::Factory { .. } => None,
        }
    }

    fn wants_context(&self, py: Python<'_>) -> bool {
        match &self.kind {
            Kind::Exit => false,
            Kind::Task { task, .. } => task.get().plan_ref().wants_context() || task.get().compensation.is_some(),
            // A fork's or a factory's branches may want one.
            Kind::Factory { .. } => true,
            Kind::Split { branches, .. } => branches
                .bind(py)
                .iter()
                .any(|branch| branch.cast::<TaskSpec>().is_ok_and(|task| task.get().plan_ref().wants_context())),
        }
    }
}

impl Table {
    #[inline]
    pub(super) fn by_identity(&self, state: &Bound<'_, PyAny>) -> Option<usize> {
        self.index.by_identity(state)
    }

    /// By identity, else by hash and `==`; a value that cannot be hashed is no state.
    pub(super) fn find(&self, state: &Bound<'_, PyAny>) -> PyResult<Option<usize>> {
        match self.by_identity(state) {
            Some(index) => Ok(Some(index)),
            None if is_hashable(state)? => self.index.by_value(state),
            None => Ok(None),
        }
    }

    pub(super) fn by_label(&self, py: Python<'_>, label: &str) -> Option<usize> {
        self.states.iter().position(|state| state.label.bind(py).to_cow().is_ok_and(|found| found == label))
    }

    /// Whether some state of this workflow is of exactly this type.
    pub(super) fn has_state_of_type(&self, class: &Bound<'_, PyType>) -> bool {
        self.states.iter().any(|state| state.key.bind(class.py()).get_type().is(class))
    }

    pub(super) fn initial(&self, state: &Bound<'_, PyAny>) -> PyResult<usize> {
        if let Some(index) = self.find(state)? {
            return Ok(index);
        }
        Err(ConfigurationError::new_err(format!(
            "the initial state {} is neither registered nor an exit state",
            shown_label(state)?
        )))
    }
}
