//! Deadlines of a run: one timer for all of them, armed at the first suspension that needs it.
//!
//! Code that does not suspend cannot be interrupted, so nothing is armed before the first suspension. The handle outlives
//! the attempt that armed it: an attempt that ends early leaves it be, and when it fires early it is armed again for what is
//! due then. Firing cancels the host task, as `asyncio.timeout` does; when the cancellation comes back out of the task it is
//! taken back with `uncancel()` and becomes the timeout's own error, unless somebody else asked for a cancel as well.

use pyo3::intern;
use pyo3::prelude::*;
use pyo3::{PyTraverseError, PyVisit};

use super::asyncio::{Asyncio, disarm};
use super::env::{Budget, Env};
use super::errors::{CancelledError, WorkflowError};

/// Which limit passed.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Limit {
    Attempt,
    Run,
}

/// Who calls when the deadline is due.
#[derive(Default)]
pub(super) enum Armed {
    #[default]
    Not,
    /// A handle of the event loop.
    ByLoop(Py<PyAny>),
    /// The split of the branch, which has one handle for all of them.
    BySplit,
}

impl Armed {
    fn take_handle(&mut self) -> Option<Py<PyAny>> {
        match std::mem::take(self) {
            Armed::ByLoop(handle) => Some(handle),
            Armed::Not | Armed::BySplit => None,
        }
    }
}

#[derive(Default)]
pub(super) struct Timer {
    armed: Armed,
    armed_for: f64,
    /// The attempt's deadline in the loop's time; the run's is in `Env`.
    pub(super) attempt_deadline: Option<f64>,
    /// The task that drives the run, known once a timer was armed.
    host: Option<Py<PyAny>>,
    /// `host.cancelling()` when the present phase first suspended.
    cancelling: i64,
    /// Each limit that fired is one cancel of the host to take back.
    attempt_fired: bool,
    run_fired: bool,
}

impl Timer {
    /// The earliest deadline that holds now.
    fn due(&self, budget: Option<Budget>) -> Option<f64> {
        let run = budget.filter(|_| !self.run_fired).map(|budget| budget.deadline);
        match (self.attempt_deadline, run) {
            (Some(attempt), Some(run)) => Some(attempt.min(run)),
            (attempt, run) => attempt.or(run),
        }
    }

    /// The present phase suspends for the first time: sees to it that a timer is armed for its deadline.
    ///
    /// `watched`: whether somebody will ask `was_cancelled` about this phase.
    pub(super) fn suspended(
        &mut self,
        py: Python<'_>,
        budget: Option<Budget>,
        watched: bool,
        arm: impl FnOnce(f64) -> PyResult<Armed>,
    ) -> PyResult<()> {
        let due = self.due(budget);
        if due.is_none() && !watched {
            return Ok(());
        }
        if self.host.is_none() {
            self.host = Asyncio::of(py)?.host(py)?;
        }
        if let Some(host) = &self.host {
            // A cancel that is still to be delivered is not one that the task has lived through.
            let host = host.bind(py);
            let pending = match host.getattr_opt(intern!(py, "_must_cancel"))? {
                Some(pending) => i64::from(pending.is_truthy()?),
                None => 0,
            };
            self.cancelling = requests(host)? - pending;
        }
        let Some(due) = due else {
            return Ok(());
        };
        if self.host.is_none() {
            return Err(WorkflowError::new_err("a timeout needs a running asyncio task: await the run inside one"));
        }
        if !matches!(self.armed, Armed::Not) && self.armed_for <= due {
            return Ok(());
        }
        disarm(py, self.armed.take_handle());
        self.armed = arm(due)?;
        self.armed_for = due;
        Ok(())
    }

    /// Whether somebody else asked the host to stop since the present phase first suspended.
    pub(super) fn was_cancelled(&self, py: Python<'_>) -> PyResult<bool> {
        match &self.host {
            Some(host) => Ok(requests(host.bind(py))? > self.cancelling),
            None => Ok(false),
        }
    }

    /// The timer fired. Gives the task to cancel if a deadline has passed; arms itself again if it has not.
    pub(super) fn fired(
        &mut self,
        py: Python<'_>,
        env: &Env,
        budget: Option<Budget>,
        arm: impl FnOnce(f64) -> PyResult<Armed>,
    ) -> PyResult<Option<Py<PyAny>>> {
        drop(self.armed.take_handle());
        let Some(due) = self.due(budget) else {
            return Ok(None);
        };
        let now = env.now(py)?;
        let is_over = now >= due;
        if is_over && !self.run_fired && budget.is_some_and(|budget| now >= budget.deadline) {
            self.run_fired = true;
        } else if is_over {
            self.attempt_fired = true;
            self.attempt_deadline = None;
        }
        // An attempt that cleans up for long, or goes on, is still bound by the run's budget.
        if let Some(due) = self.due(budget).filter(|due| *due > now) {
            self.armed = arm(due)?;
            self.armed_for = due;
        }
        Ok(self.host.as_ref().filter(|_| is_over).map(|host| host.clone_ref(py)))
    }

    /// A phase ended, with `error` or well: takes a cancel of ours back, and tells which limit the error stands for.
    ///
    /// A task that swallowed the cancellation keeps its result; the run's budget is looked at again before the next attempt.
    pub(super) fn settle(&mut self, py: Python<'_>, error: Option<&PyErr>) -> PyResult<Option<Limit>> {
        self.attempt_deadline = None;
        let limit = match (std::mem::take(&mut self.run_fired), std::mem::take(&mut self.attempt_fired)) {
            (false, false) => return Ok(None),
            (true, also) => (Limit::Run, 1 + usize::from(also)),
            (false, true) => (Limit::Attempt, 1),
        };
        let Some(host) = &self.host else { return Ok(None) };
        let host = host.bind(py);
        for _ in 0..limit.1 {
            host.call_method0(intern!(py, "uncancel"))?;
        }
        let ours =
            requests(host)? <= self.cancelling && error.is_some_and(|error| error.is_instance_of::<CancelledError>(py));
        Ok(ours.then_some(limit.0))
    }

    /// The run ended: nothing of it may fire any more.
    pub(super) fn stop(&mut self, py: Python<'_>) {
        disarm(py, self.armed.take_handle());
        self.host = None;
    }

    pub(super) fn traverse(&self, visit: &PyVisit<'_>) -> Result<(), PyTraverseError> {
        if let Armed::ByLoop(handle) = &self.armed {
            visit.call(handle)?;
        }
        visit.call(&self.host)
    }
}

/// How many cancels of the task nobody has taken back.
fn requests(task: &Bound<'_, PyAny>) -> PyResult<i64> {
    task.call_method0(intern!(task.py(), "cancelling"))?.extract()
}
