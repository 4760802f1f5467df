//! What a split hands to the state it joins into.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

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
#[pyclass(frozen, get_all, module = "cano")]
pub(super) struct BranchOutcome {
    index: usize,
    name: Py<PyString>,
    value: Py<PyAny>,
    error: Option<Py<PyAny>>,
    elapsed: f64,
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
        Self { index, name, value, error, elapsed }
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
        let fields = (this.index, &this.name, &this.value, &this.error, this.elapsed);
        Ok((slf.get_type(), fields.into_pyobject(py)?))
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.value)?;
        visit.call(&self.error)
    }
}

/// Where a split happened, for the notes on its branches' exceptions; they are written when somebody looks at the errors.
pub(super) struct Origin {
    pub(super) env: Py<Env>,
    pub(super) scope: Arc<Scope>,
}

/// Every outcome of a split, in branch order.
#[pyclass(frozen, module = "cano")]
pub(super) struct SplitResult {
    branches: Box<[Ended]>,
    origin: Option<Origin>,
    is_annotated: AtomicBool,
}

impl SplitResult {
    pub(super) fn new(branches: Vec<Ended>, origin: Option<Origin>) -> Self {
        Self { branches: branches.into_boxed_slice(), origin, is_annotated: AtomicBool::new(false) }
    }

    /// Names its branch on every exception, once; a branch that was a run of its own has done so already.
    fn annotate(&self, py: Python<'_>) {
        let Some(Origin { env, scope }) = &self.origin else { return };
        if self.is_annotated.swap(true, Ordering::Relaxed) {
            return;
        }
        let trail = match Trail::new(py, env.get(), &scope.path, scope.entered) {
            Ok(trail) => trail,
            Err(problem) => return problem.write_unraisable(py, None),
        };
        for (index, branch) in self.branches.iter().enumerate() {
            if let End::Error(error) = &branch.end {
                let task = Some(&branch.name);
                let failure = Failure { state: scope.state, task, attempt: 1, max_attempts: 1, branch: Some(index) };
                failure.annotate(py, env.get(), &trail, error.bind(py));
            }
        }
    }

    /// The exceptions of the branches that failed, in branch order.
    pub(super) fn exceptions(&self, py: Python<'_>) -> Vec<Py<PyAny>> {
        self.annotate(py);
        self.branches
            .iter()
            .filter_map(|branch| match &branch.end {
                End::Error(error) => Some(error.clone_ref(py)),
                End::Value(_) | End::Cancelled => None,
            })
            .collect()
    }

    /// "2 succeeded, 1 failed, 0 cancelled of 3"
    pub(super) fn counts(&self) -> String {
        let failed = self.branches.iter().filter(|branch| matches!(branch.end, End::Error(_))).count();
        let completed = self.completed_count();
        let total = self.branches.len();
        format!("{} succeeded, {failed} failed, {} cancelled of {total}", completed - failed, total - completed)
    }

    fn outcomes<'py>(&self, py: Python<'py>, failed: bool) -> PyResult<Bound<'py, PyList>> {
        if failed {
            self.annotate(py);
        }
        let list = PyList::empty(py);
        for (index, branch) in self.branches.iter().enumerate() {
            let (value, error) = match &branch.end {
                End::Value(value) if !failed => (value.clone_ref(py), None),
                End::Error(error) if failed => (py.None(), Some(error.clone_ref(py))),
                _ => continue,
            };
            let name = branch.name.clone_ref(py);
            list.append(BranchOutcome { index, name, value, error, elapsed: branch.elapsed })?;
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
    fn successes<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        self.outcomes(py, false)
    }

    #[getter]
    fn errors<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        self.outcomes(py, true)
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
        let outcomes = this.successes(py)?;
        for failed in this.errors(py)? {
            outcomes.append(failed)?;
        }
        Ok((slf.get_type(), (outcomes, this.cancelled()).into_pyobject(py)?))
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(self.origin.as_ref().map(|origin| &origin.env))?;
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
