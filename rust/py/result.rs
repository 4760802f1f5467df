//! What a split hands to the state it joins into.

use std::sync::{Arc, OnceLock};

use pyo3::prelude::*;
use pyo3::types::{PyList, PyString, PyTuple, PyType};
use pyo3::{PyTraverseError, PyVisit};

use super::env::{Env, Scope};
use super::failure::{Failure, Trail};

/// How one branch ended.
pub(super) enum End {
    Value(Py<PyAny>),
    Error(Py<PyAny>),
    Cancelled,
}

/// One branch of a finished split.
pub(super) struct Ended {
    pub(super) name: Py<PyString>,
    pub(super) end: End,
    pub(super) elapsed: f64,
}

/// One branch that succeeded or failed.
#[pyclass(frozen, module = "cano")]
pub(super) struct BranchOutcome {
    #[pyo3(get)]
    index: usize,
    #[pyo3(get)]
    name: Py<PyString>,
    #[pyo3(get)]
    value: Py<PyAny>,
    error: Option<Py<PyAny>>,
    #[pyo3(get)]
    elapsed: f64,
    /// The result it was taken from, which knows what to write on the error.
    result: Option<Py<SplitResult>>,
}

#[pymethods]
impl BranchOutcome {
    #[new]
    #[pyo3(signature = (index, name, value=None, error=None, elapsed=0.0))]
    fn new(
        py: Python<'_>,
        index: usize,
        name: Py<PyString>,
        value: Option<Py<PyAny>>,
        error: Option<Py<PyAny>>,
        elapsed: f64,
    ) -> Self {
        let value = value.unwrap_or_else(|| py.None());
        Self { index, name, value, error, elapsed, result: None }
    }

    #[getter]
    fn error(&self, py: Python<'_>) -> Option<Py<PyAny>> {
        let error = self.error.as_ref()?;
        if let Some(result) = &self.result {
            result.get().annotate(py, self.index);
        }
        Some(error.clone_ref(py))
    }

    fn __repr__(&self, py: Python<'_>) -> PyResult<String> {
        let what = match &self.error {
            Some(error) => format!("error={}", error.bind(py).get_type().name()?),
            None => format!("value={}", self.value.bind(py).get_type().name()?),
        };
        Ok(format!("<BranchOutcome {} {} {what} elapsed={:.6}>", self.index, self.name, self.elapsed))
    }

    fn __reduce__<'py>(slf: &Bound<'py, Self>) -> PyResult<(Bound<'py, PyType>, Bound<'py, PyTuple>)> {
        let (py, this) = (slf.py(), slf.get());
        let fields = (this.index, &this.name, &this.value, this.error(py), this.elapsed);
        Ok((slf.get_type(), fields.into_pyobject(py)?))
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.value)?;
        visit.call(&self.result)?;
        visit.call(&self.error)
    }
}

/// Where a split happened, for the notes on its branches' exceptions; each is written when somebody looks at the exception.
pub(super) struct Origin {
    pub(super) env: Py<Env>,
    pub(super) scope: Arc<Scope>,
    trail: OnceLock<Trail>,
}

impl Origin {
    pub(super) fn new(env: Py<Env>, scope: Arc<Scope>) -> Self {
        Self { env, scope, trail: OnceLock::new() }
    }

    fn trail(&self, py: Python<'_>) -> PyResult<&Trail> {
        if let Some(trail) = self.trail.get() {
            return Ok(trail);
        }
        let trail = Trail::new(py, self.env.get(), &self.scope.path, self.scope.entered)?;
        Ok(self.trail.get_or_init(|| trail))
    }
}

/// Every outcome of a split, in branch order.
#[pyclass(frozen, module = "cano")]
pub(super) struct SplitResult {
    branches: Box<[Ended]>,
    origin: Option<Origin>,
}

impl SplitResult {
    pub(super) fn new(branches: Vec<Ended>, origin: Option<Origin>) -> Self {
        Self { branches: branches.into_boxed_slice(), origin }
    }

    /// Names its branch on an exception, unless a branch that was a run of its own has done so already.
    fn annotate(&self, py: Python<'_>, index: usize) {
        let (Some(origin), Ended { name, end: End::Error(error), .. }) = (&self.origin, &self.branches[index]) else {
            return;
        };
        let (env, state) = (origin.env.get(), origin.scope.state);
        let failure = Failure { state, task: Some(name), attempt: 1, max_attempts: 1, branch: Some(index) };
        match origin.trail(py) {
            Ok(trail) => failure.annotate(py, env, trail, error.bind(py)),
            Err(problem) => problem.write_unraisable(py, None),
        }
    }

    /// The exceptions of the branches that failed, in branch order.
    pub(super) fn exceptions(&self, py: Python<'_>) -> Vec<Py<PyAny>> {
        let mut exceptions = Vec::new();
        for (index, branch) in self.branches.iter().enumerate() {
            if let End::Error(error) = &branch.end {
                self.annotate(py, index);
                exceptions.push(error.clone_ref(py));
            }
        }
        exceptions
    }

    /// "2 succeeded, 1 failed, 0 cancelled of 3"
    pub(super) fn counts(&self) -> String {
        let failed = self.branches.iter().filter(|branch| matches!(branch.end, End::Error(_))).count();
        let completed = self.completed_count();
        let total = self.branches.len();
        format!("{} succeeded, {failed} failed, {} cancelled of {total}", completed - failed, total - completed)
    }

    /// Those that succeeded, those that failed, or both.
    fn select<'py>(slf: &Bound<'py, Self>, succeeded: bool, failed: bool) -> PyResult<Bound<'py, PyList>> {
        let py = slf.py();
        let list = PyList::empty(py);
        for (index, branch) in slf.get().branches.iter().enumerate() {
            let (value, error, result) = match &branch.end {
                End::Value(value) if succeeded => (value.clone_ref(py), None, None),
                End::Error(error) if failed => (py.None(), Some(error.clone_ref(py)), Some(slf.clone().unbind())),
                _ => continue,
            };
            let name = branch.name.clone_ref(py);
            list.append(BranchOutcome { index, name, value, error, elapsed: branch.elapsed, result })?;
        }
        Ok(list)
    }
}

#[pymethods]
impl SplitResult {
    /// From outcomes (in any order) and the indices of the cancelled branches; for tests of a joined state's task.
    #[new]
    #[pyo3(signature = (outcomes, cancelled=Vec::new()), text_signature = "(outcomes, cancelled=())")]
    fn from_outcomes(py: Python<'_>, outcomes: Vec<Bound<'_, BranchOutcome>>, cancelled: Vec<usize>) -> PyResult<Self> {
        let total = outcomes.len() + cancelled.len();
        let mut branches: Vec<Ended> = (0..total)
            .map(|_| Ended { name: PyString::intern(py, "cancelled").unbind(), end: End::Cancelled, elapsed: 0.0 })
            .collect();
        let mut free = vec![true; total];
        for index in &cancelled {
            claim(&mut free, *index)?;
        }
        for outcome in outcomes {
            let outcome = outcome.get();
            claim(&mut free, outcome.index)?;
            branches[outcome.index] = Ended {
                name: outcome.name.clone_ref(py),
                end: match &outcome.error {
                    Some(error) => End::Error(error.clone_ref(py)),
                    None => End::Value(outcome.value.clone_ref(py)),
                },
                elapsed: outcome.elapsed,
            };
        }
        Ok(Self::new(branches, None))
    }

    #[getter]
    fn successes<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyList>> {
        Self::select(slf, true, false)
    }

    #[getter]
    fn errors<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyList>> {
        Self::select(slf, false, true)
    }

    /// What a batch finishes with: every item's outcome, in input order.
    fn _outcomes<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyList>> {
        Self::select(slf, true, true)
    }

    #[getter]
    fn cancelled(&self) -> Vec<usize> {
        self.branches
            .iter()
            .enumerate()
            .filter(|(_, branch)| matches!(branch.end, End::Cancelled))
            .map(|(index, _)| index)
            .collect()
    }

    #[getter]
    fn completed_count(&self) -> usize {
        self.branches.iter().filter(|branch| !matches!(branch.end, End::Cancelled)).count()
    }

    #[getter]
    fn total_count(&self) -> usize {
        self.branches.len()
    }

    fn values<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        let list = PyList::empty(py);
        for branch in &self.branches {
            if let End::Value(value) = &branch.end {
                list.append(value)?;
            }
        }
        Ok(list)
    }

    fn __repr__(&self) -> String {
        format!("<SplitResult {}>", self.counts())
    }

    fn __reduce__<'py>(slf: &Bound<'py, Self>) -> PyResult<(Bound<'py, PyType>, Bound<'py, PyTuple>)> {
        let (py, this) = (slf.py(), slf.get());
        let outcomes = Self::successes(slf)?;
        for failed in Self::errors(slf)? {
            outcomes.append(failed)?;
        }
        Ok((slf.get_type(), (outcomes, this.cancelled()).into_pyobject(py)?))
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        if let Some(origin) = &self.origin {
            visit.call(&origin.env)?;
            visit.call(origin.trail.get().map(|trail| &trail.path))?;
        }
        for branch in &self.branches {
            match &branch.end {
                End::Value(object) | End::Error(object) => visit.call(object)?,
                End::Cancelled => {}
            }
        }
        Ok(())
    }
}

fn claim(free: &mut [bool], index: usize) -> PyResult<()> {
    match free.get_mut(index) {
        Some(slot) if *slot => {
            *slot = false;
            Ok(())
        }
        _ => Err(super::errors::ConfigurationError::new_err(format!(
            "branch indices must be 0 to {} once each, got {index}",
            free.len().saturating_sub(1)
        ))),
    }
}
