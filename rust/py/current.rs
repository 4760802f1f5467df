//! Which task is the current one of an event loop, as `asyncio.current_task()` tells.
//!
//! asyncio enters and leaves a task around each of its steps. A split steps many branches in a row, so that each only takes
//! the place of the one before; whoever had the place before all of them gets it back at the end.

use pyo3::exceptions::{PyImportError, PyKeyError};
use pyo3::prelude::*;
use pyo3::types::PyDict;

/// Where asyncio keeps it.
pub(super) enum Current {
    /// A dict from loops to tasks, up to Python 3.13.
    Table(Py<PyDict>),
    /// The thread, behind a function.
    Function(Py<PyAny>),
}

impl Current {
    pub(super) fn find(py: Python<'_>) -> PyResult<Self> {
        let module = py.import("_asyncio")?;
        if let Some(table) = module.getattr_opt("_current_tasks")? {
            return Ok(Self::Table(table.cast_into_exact::<PyDict>()?.unbind()));
        }
        match module.getattr_opt("_swap_current_task")? {
            Some(swap) => Ok(Self::Function(swap.unbind())),
            None => Err(PyImportError::new_err("asyncio tells no place for the current task")),
        }
    }

    /// Makes a task the current one; whoever calls this holds a `Seat`.
    pub(super) fn take(&self, event_loop: &Bound<'_, PyAny>, task: &Bound<'_, PyAny>) -> PyResult<()> {
        match self {
            Self::Table(table) => table.bind(event_loop.py()).set_item(event_loop, task),
            Self::Function(swap) => swap.bind(event_loop.py()).call1((event_loop, task)).map(drop),
        }
    }

    fn present<'py>(&self, event_loop: &Bound<'py, PyAny>) -> PyResult<Option<Bound<'py, PyAny>>> {
        let py = event_loop.py();
        match self {
            Self::Table(table) => table.bind(py).get_item(event_loop),
            Self::Function(swap) => {
                let task = swap.bind(py).call1((event_loop, py.None()))?;
                Ok((!task.is_none()).then_some(task))
            }
        }
    }

    pub(super) fn is_free(&self, event_loop: &Bound<'_, PyAny>) -> PyResult<bool> {
        match self {
            Self::Table(table) => table.bind(event_loop.py()).contains(event_loop).map(|is_taken| !is_taken),
            Self::Function(_) => Seat::hold(self, event_loop).map(|seat| !seat.is_taken()),
        }
    }

    fn vacate(&self, event_loop: &Bound<'_, PyAny>) -> PyResult<()> {
        let py = event_loop.py();
        match self {
            Self::Table(table) => match table.bind(py).del_item(event_loop) {
                Err(error) if error.is_instance_of::<PyKeyError>(py) => Ok(()), // no branch took it
                outcome => outcome,
            },
            Self::Function(swap) => swap.bind(py).call1((event_loop, py.None())).map(drop),
        }
    }
}

/// Gives the place of the current task back to who has it now, when it is dropped.
pub(super) struct Seat<'py, 'a> {
    current: &'a Current,
    event_loop: &'a Bound<'py, PyAny>,
    before: Option<Bound<'py, PyAny>>,
}

impl<'py, 'a> Seat<'py, 'a> {
    pub(super) fn hold(current: &'a Current, event_loop: &'a Bound<'py, PyAny>) -> PyResult<Self> {
        let before = current.present(event_loop)?;
        Ok(Self { current, event_loop, before })
    }

    /// Whether there was a current task.
    pub(super) fn is_taken(&self) -> bool {
        self.before.is_some()
    }
}

impl Drop for Seat<'_, '_> {
    fn drop(&mut self) {
        let given_back = match &self.before {
            Some(task) => self.current.take(self.event_loop, task),
            None => self.current.vacate(self.event_loop),
        };
        if let Err(error) = given_back {
            error.write_unraisable(self.event_loop.py(), Some(self.event_loop));
        }
    }
}
