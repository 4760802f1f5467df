//! Where a run was when an exception left a task: the note and the attribute `__cano__` that the exception gets.

use pyo3::exceptions::{PyBaseException, PyException};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyDict, PyList, PyString, PyTuple, PyType};
use pyo3::{PyTraverseError, PyVisit};

use super::env::Env;
use super::errors::{WorkflowTimeoutError, label, show};

/// How many of the newest states stand in a note.
const SHOWN: usize = 16;

/// Where a run was when an exception left a task.
#[pyclass(frozen, get_all, weakref, module = "cano")]
pub(super) struct ErrorContext {
    state: Py<PyAny>,
    task: Option<Py<PyString>>,
    attempt: u32,
    max_attempts: u32,
    path: Py<PyTuple>,
    entered: u64,
    workflow_id: Option<Py<PyString>>,
    branch: Option<usize>,
    sequence: u64,
}

#[pymethods]
impl ErrorContext {
    #[new]
    #[allow(clippy::too_many_arguments, reason = "the fields, as a record has them")]
    fn new(
        state: Py<PyAny>,
        task: Option<Py<PyString>>,
        attempt: u32,
        max_attempts: u32,
        path: Py<PyTuple>,
        entered: u64,
        workflow_id: Option<Py<PyString>>,
        branch: Option<usize>,
        sequence: u64,
    ) -> Self {
        Self { state, task, attempt, max_attempts, path, entered, workflow_id, branch, sequence }
    }

    fn __str__(&self, py: Python<'_>) -> PyResult<String> {
        let path = self.path.bind(py);
        let first = path.len().saturating_sub(SHOWN);
        let newest: Vec<String> = path.iter().skip(first).map(|state| label(&state)).collect::<PyResult<_>>()?;
        let state = self.state.bind(py);
        let state = if state.is_none() { None } else { Some(label(state)?) };
        let task = self.task.as_ref().map(|task| task.bind(py).to_cow()).transpose()?;
        let place = Place { state: state.as_deref(), task: task.as_deref(), branch: self.branch };
        place.note(py, self.workflow_id.as_ref(), (self.attempt, self.max_attempts), &trail(newest, self.entered))
    }

    fn __repr__(&self, py: Python<'_>) -> PyResult<String> {
        Ok(format!("<ErrorContext {}>", self.__str__(py)?))
    }

    fn __eq__(&self, py: Python<'_>, other: &Bound<'_, PyAny>) -> PyResult<bool> {
        match other.cast::<Self>() {
            Ok(other) => self.fields(py)?.eq(other.get().fields(py)?),
            Err(_) => Ok(false),
        }
    }

    fn __hash__(&self, py: Python<'_>) -> PyResult<isize> {
        self.fields(py)?.hash()
    }

    fn __reduce__<'py>(slf: &Bound<'py, Self>) -> PyResult<(Bound<'py, PyType>, Bound<'py, PyTuple>)> {
        Ok((slf.get_type(), slf.get().fields(slf.py())?))
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.state)?;
        visit.call(&self.path)
    }
}

impl ErrorContext {
    fn fields<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        (
            &self.state,
            &self.task,
            self.attempt,
            self.max_attempts,
            &self.path,
            self.entered,
            &self.workflow_id,
            self.branch,
            self.sequence,
        )
            .into_pyobject(py)
    }
}

/// "path=(240 more)>A>B"
fn trail(mut newest: Vec<String>, entered: u64) -> String {
    let more = entered.saturating_sub(newest.len() as u64);
    if more > 0 {
        newest.insert(0, format!("({more} more)"));
    }
    format!("path={}", newest.join(">"))
}

/// What a note names besides the attempt and the path.
struct Place<'a> {
    state: Option<&'a str>,
    task: Option<&'a str>,
    branch: Option<usize>,
}

impl Place<'_> {
    fn note(
        &self,
        py: Python<'_>,
        workflow_id: Option<&Py<PyString>>,
        (attempt, max_attempts): (u32, u32),
        trail: &str,
    ) -> PyResult<String> {
        let mut note = String::with_capacity(96);
        let mut add = |name: &str, value: &str| {
            for part in [name, "=", value, " "] {
                note.push_str(part);
            }
        };
        if let Some(id) = workflow_id {
            add("workflow_id", &show(id.bind(py))?);
        }
        if let Some(state) = self.state {
            add("state", state);
        }
        if let Some(task) = self.task {
            add("task", task);
        }
        if let Some(branch) = self.branch {
            add("branch", &branch.to_string());
        }
        add("attempt", &format!("{attempt}/{max_attempts}"));
        note.push_str(trail);
        Ok(note)
    }
}

/// The path of a run, as its failures tell it.
pub(super) struct Trail {
    pub(super) path: Py<PyTuple>,
    entered: u64,
    text: String,
}

impl Trail {
    pub(super) fn new(py: Python<'_>, env: &Env, path: &[u32], entered: u64) -> PyResult<Self> {
        let newest = &path[path.len().saturating_sub(SHOWN)..];
        let newest = newest.iter().map(|state| Ok(env.label(py, *state as usize).to_cow()?.into_owned()));
        let text = trail(newest.collect::<PyResult<_>>()?, entered);
        Ok(Self { path: env.path(py, path.iter().copied())?.unbind(), entered, text })
    }
}

/// Which attempt of which task failed.
pub(super) struct Failure<'a> {
    pub(super) state: usize,
    pub(super) task: Option<&'a Py<PyString>>,
    pub(super) attempt: u32,
    pub(super) max_attempts: u32,
    pub(super) branch: Option<usize>,
}

impl Failure<'_> {
    pub(super) fn context(&self, py: Python<'_>, env: &Env, trail: &Trail) -> ErrorContext {
        ErrorContext {
            state: env.state(py, self.state).clone().unbind(),
            task: self.task.map(|task| task.clone_ref(py)),
            attempt: self.attempt,
            max_attempts: self.max_attempts,
            path: trail.path.clone_ref(py),
            entered: trail.entered,
            workflow_id: env.workflow_id.as_ref().map(|id| id.clone_ref(py)),
            branch: self.branch,
            sequence: env.sequence,
        }
    }

    /// Puts the note and `__cano__` on an exception, unless a run nested in this one already did.
    ///
    /// An exception object that is raised again in a later run (a module-level singleton) gets the new run's context. One
    /// whose class refuses attributes stays as it is.
    pub(super) fn annotate(&self, py: Python<'_>, env: &Env, trail: &Trail, error: &Bound<'_, PyAny>) {
        match self.write(py, env, trail, error) {
            Err(problem) if !problem.is_instance_of::<PyException>(py) => problem.write_unraisable(py, Some(error)),
            Ok(()) | Err(_) => {}
        }
    }

    fn write(&self, py: Python<'_>, env: &Env, trail: &Trail, error: &Bound<'_, PyAny>) -> PyResult<()> {
        let name = intern!(py, "__cano__");
        // Every exception has a dict; a look into it raises nothing where the name is missing, as an attribute would.
        let own = error.getattr(intern!(py, "__dict__"))?.cast_into::<PyDict>()?;
        if let Some(known) = own.get_item(name)?
            && let Ok(known) = known.cast::<ErrorContext>()
        {
            if known.get().sequence >= env.sequence {
                return Ok(());
            }
            forget(error, &known.get().__str__(py)?)?;
        }
        let task = self.task.map(|task| task.bind(py).to_cow()).transpose()?;
        let state = env.label(py, self.state).to_cow()?;
        let place = Place { state: Some(&state), task: task.as_deref(), branch: self.branch };
        let note = place.note(py, env.workflow_id.as_ref(), (self.attempt, self.max_attempts), &trail.text)?;
        add_note(error, &own, note)?;
        error.setattr(name, self.context(py, env, trail))
    }
}

/// Whether an exception is the end of this run's budget; that of a run which a task started is a failure like any other.
pub(super) fn is_out_of_budget(env: &Env, error: &Bound<'_, PyBaseException>) -> bool {
    if !error.is_instance_of::<WorkflowTimeoutError>() {
        return false;
    }
    let Ok(context) = error.getattr(intern!(error.py(), "__cano__")) else { return false };
    let context = context.cast::<ErrorContext>();
    context.is_ok_and(|context| (context.get().sequence, context.get().attempt) == (env.sequence, 0))
}

/// `add_note()`; the first one is put down directly, which costs a quarter, unless the class has a way of its own.
fn add_note(error: &Bound<'_, PyAny>, own: &Bound<'_, PyDict>, note: String) -> PyResult<()> {
    static ADD_NOTE: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    let py = error.py();
    let (method, notes) = (intern!(py, "add_note"), intern!(py, "__notes__"));
    let usual = ADD_NOTE.get_or_try_init(py, || py.get_type::<PyBaseException>().getattr(method).map(Bound::unbind))?;
    if error.get_type().getattr(method)?.is(usual.bind(py)) && !own.contains(notes)? {
        return error.setattr(notes, PyList::new(py, [note])?);
    }
    error.call_method1(method, (note,)).map(drop)
}

/// Takes the note of an earlier run off an exception.
fn forget(error: &Bound<'_, PyAny>, note: &str) -> PyResult<()> {
    let py = error.py();
    let name = intern!(py, "__notes__");
    let kept = PyList::empty(py);
    for other in error.getattr(name)?.try_iter()? {
        let other = other?;
        if !other.eq(note)? {
            kept.append(other)?;
        }
    }
    error.setattr(name, kept)
}
