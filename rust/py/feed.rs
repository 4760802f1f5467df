//! A split that is fed: its branches come one after the other, each when there is room for it.
//!
//! They come out of an iterator, which is asked for the next one when the bulkhead has room; or a feeder, a coroutine that
//! runs beside the branches, pushes them. At most one that was pushed waits for room, so that what is in flight is bounded
//! however many there will be.
//!
//! An exception of the iterator or the feeder is none of a branch: it ends the split and leaves through the parent.

use std::mem;

use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::PyIterator;
use pyo3::{PyTraverseError, PyVisit};

use super::branch;
use super::definition::TaskSpec;
use super::split::{Branch, Split, Start};

/// Where the index of a branch stands, for the feeder.
pub(super) const FEEDER: usize = usize::MAX;

/// Where branches come from.
#[derive(Default)]
pub(super) struct Feed {
    /// Gives a `TaskSpec` for each branch; None once it is exhausted, or where a feeder pushes them.
    iterator: Option<Py<PyAny>>,
    /// Whether a feeder runs, and its task once it is made.
    pub(super) is_feeding: bool,
    pub(super) feeder: Option<Py<PyAny>>,
    pushed: Option<Py<TaskSpec>>,
    /// What the feeder waits for.
    room: Option<Py<PyAny>>,
}

impl Feed {
    pub(super) fn new(iterator: Option<Py<PyAny>>) -> Self {
        Self { iterator, ..Self::default() }
    }

    pub(super) fn traverse(&self, visit: &PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.iterator)?;
        visit.call(&self.feeder)?;
        visit.call(&self.pushed)?;
        visit.call(&self.room)
    }
}

impl Split {
    /// Adds the next branch, if there is room for it and it is there; false if not.
    pub(super) fn take_from_feed(slf: &Bound<'_, Self>) -> bool {
        let (py, this) = (slf.py(), slf.get());
        let (pushed, iterator, room) = this.state.with(py, |state| {
            let has_room = state.has_room(this.bulkhead);
            match state.feed.as_mut().filter(|_| has_room) {
                Some(feed) => (feed.pushed.take(), feed.iterator.as_ref().map(|it| it.clone_ref(py)), feed.room.take()),
                None => (None, None, None),
            }
        });
        if let Some(room) = room {
            tell(room.bind(py));
        }
        if let Some(task) = pushed {
            this.add(py, task);
            let is_last = this.state.with(py, |state| state.feed.as_ref().is_some_and(|feed| !feed.is_feeding));
            if is_last {
                this.fed_up(py, None);
            }
            return true;
        }
        let Some(iterator) = iterator else { return false };
        match this.next_of(iterator.bind(py)) {
            Ok(Some(task)) => {
                this.add(py, task);
                true
            }
            Ok(None) => {
                this.fed_up(py, None);
                false
            }
            Err(error) => {
                this.fed_up(py, Some(error));
                false
            }
        }
    }

    /// Asks the iterator, which is user code, in the context of the parent.
    fn next_of(&self, iterator: &Bound<'_, PyAny>) -> PyResult<Option<Py<TaskSpec>>> {
        let py = iterator.py();
        let ask = || match iterator.cast::<PyIterator>()?.clone().next() {
            Some(task) => Ok(Some(task?.cast_into::<TaskSpec>()?.unbind())),
            None => Ok(None),
        };
        match &self.context {
            Some(context) => branch::within(context.bind(py), ask).unwrap_or_else(ask),
            None => ask(),
        }
    }

    fn add(&self, py: Python<'_>, task: Py<TaskSpec>) {
        let branch = Branch::new(py, self.env.get(), Start::Task(task));
        self.state.with(py, |state| {
            state.join.branch_added();
            state.branches.push(branch);
        });
    }

    /// No more branches come; with an error, those that live are cancelled. Whether the split goes on.
    pub(super) fn fed_up(&self, py: Python<'_>, error: Option<PyErr>) -> bool {
        let (goes_on, is_broken, dropped) = self.state.with(py, |state| {
            let (iterator, is_one_left) = match &mut state.feed {
                Some(feed) => (feed.iterator.take(), feed.pushed.is_some()),
                None => (None, false),
            };
            if !is_one_left || error.is_some() {
                state.join.fed_up();
            }
            let is_broken = error.is_some() && state.interrupted.is_none();
            let unused = if is_broken { mem::replace(&mut state.interrupted, error) } else { error };
            (state.goes_on(), is_broken, (iterator, unused))
        });
        drop(dropped);
        if is_broken {
            self.cancel_rest(py, None);
        }
        goes_on
    }

    /// The feeder gives one more; whether another may come at once.
    pub(super) fn fed(slf: &Bound<'_, Self>, task: Py<TaskSpec>) -> PyResult<bool> {
        let (py, this) = (slf.py(), slf.get());
        let refused = this.state.with(py, |state| match &mut state.feed {
            Some(feed) if feed.pushed.is_none() => {
                feed.pushed = Some(task);
                None
            }
            _ => Some(task),
        });
        drop(refused);
        // The feeder's own step is under way: it is the current task again afterwards.
        let _seat = if branch::is_chosen(py) { Some(branch::seat(this.event_loop(py))?) } else { None };
        Self::start(slf, false);
        Ok(this.state.with(py, |state| state.feed.as_ref().is_none_or(|feed| feed.pushed.is_none())))
    }

    pub(super) fn room_for_more<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        let (py, this) = (slf.py(), slf.get());
        let future = this.event_loop(py).call_method0(intern!(py, "create_future"))?;
        let kept = future.clone().unbind();
        let is_waiting = this.state.with(py, |state| match &mut state.feed {
            Some(feed) if feed.pushed.is_some() => {
                feed.room = Some(kept);
                true
            }
            _ => false,
        });
        if !is_waiting {
            tell(&future);
        }
        Ok(future)
    }
}

/// Resolves a future, unless it was cancelled.
fn tell(future: &Bound<'_, PyAny>) {
    let py = future.py();
    let is_done = future.call_method0(intern!(py, "done")).is_ok_and(|done| done.is_truthy().unwrap_or(false));
    if !is_done && let Err(error) = future.call_method1(intern!(py, "set_result"), (py.None(),)) {
        error.write_unraisable(py, Some(future));
    }
}
