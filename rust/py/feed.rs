//! A split that is fed: one task is done on items that come one after the other, each when there is room for it.
//!
//! They come out of an iterator, which is asked for the next one when the bulkhead has room; or a feeder, a coroutine that
//! runs beside the branches, pushes them. At most one that was pushed waits for room, so that what is in flight is bounded
//! however many there will be. Branches that end where they are started, and a feeder that never waits, let the loop have a
//! turn after so many.
//!
//! An exception of the iterator or the feeder is none of a branch: it ends the split and leaves through the parent. The
//! iterator is closed once it has nothing more to give, at the latest when the split is over.

use std::mem;

use pyo3::exceptions::PyBaseException;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::PyIterator;
use pyo3::{PyTraverseError, PyVisit};

use super::asyncio::Asyncio;
use super::branch;
use super::definition::TaskSpec;
use super::drive::TURN;
use super::errors::TaskExecutionError;
use super::split::{Branch, Split, Start};

/// Where the index of a branch stands, for the feeder.
pub(super) const FEEDER: usize = usize::MAX;

/// Where branches come from.
pub(super) struct Feed {
    /// What is done on each item.
    task: Py<TaskSpec>,
    /// Gives the items; None once it is closed, or where a feeder pushes them.
    iterator: Option<Py<PyAny>>,
    /// The iterator's context, a copy of the parent's: what it sets is seen by nobody else.
    context: Py<PyAny>,
    /// Whether the loop has its turn before the next item is taken.
    pauses: bool,
    /// Whether a feeder runs, and its task once it is made.
    pub(super) is_feeding: bool,
    pub(super) feeder: Option<Py<PyAny>>,
    /// How many the feeder has pushed since it last had to wait.
    in_a_row: u32,
    pushed: Option<Py<PyAny>>,
    /// What the feeder waits for.
    room: Option<Py<PyAny>>,
}

impl Feed {
    pub(super) fn new(py: Python<'_>, task: Py<TaskSpec>, iterator: Option<Py<PyAny>>) -> PyResult<Self> {
        let context = branch::copy_context(py)?.unbind();
        Ok(Self {
            task,
            iterator,
            context,
            pauses: false,
            is_feeding: false,
            feeder: None,
            in_a_row: 0,
            pushed: None,
            room: None,
        })
    }

    pub(super) fn traverse(&self, visit: &PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.task)?;
        visit.call(&self.iterator)?;
        visit.call(&self.context)?;
        visit.call(&self.feeder)?;
        visit.call(&self.pushed)?;
        visit.call(&self.room)
    }
}

impl Split {
    /// Whether branches come one after the other; not any more once the parent has the result.
    pub(super) fn is_fed(&self, py: Python<'_>) -> bool {
        self.state.with(py, |state| state.feed.is_some())
    }

    /// Adds the next branch, if there is room for it and it is there; false if not.
    pub(super) fn take_from_feed(slf: &Bound<'_, Self>) -> bool {
        let (py, this) = (slf.py(), slf.get());
        let (pushed, has_iterator, room) = this.state.with(py, |state| {
            let has_room = state.has_room(this.bulkhead);
            match state.feed.as_mut().filter(|feed| has_room && !feed.pauses) {
                Some(feed) => (feed.pushed.take(), feed.iterator.is_some(), feed.room.take()),
                None => (None, false, None),
            }
        });
        if let Some(room) = room {
            tell(room.bind(py));
        }
        if let Some(item) = pushed {
            this.add(py, item);
            let is_last = this.state.with(py, |state| state.feed.as_ref().is_some_and(|feed| !feed.is_feeding));
            if is_last {
                this.fed_up(py, None);
            }
            return true;
        }
        if !has_iterator {
            return false;
        }
        let next = this.with_iterator(py, |iterator| iterator.cast::<PyIterator>()?.clone().next().transpose());
        let error = match next {
            Ok(Some(item)) => {
                this.add(py, item.unbind());
                return true;
            }
            Ok(None) => this.close_iterator(py).err(),
            Err(error) => Some(error),
        };
        this.fed_up(py, error);
        false
    }

    /// Calls the iterator, which is user code, in its context.
    fn with_iterator<'py, R: Default>(
        &self,
        py: Python<'py>,
        body: impl Fn(&Bound<'py, PyAny>) -> PyResult<R>,
    ) -> PyResult<R> {
        let found = self.state.with(py, |state| {
            let feed = state.feed.as_ref()?;
            Some((feed.iterator.as_ref()?.clone_ref(py), feed.context.clone_ref(py)))
        });
        let Some((iterator, context)) = found else { return Ok(R::default()) };
        let iterator = iterator.into_bound(py);
        branch::within(context.bind(py), || body(&iterator)).unwrap_or_else(|| body(&iterator))
    }

    /// Closes the iterator, as a generator or a file can be.
    pub(super) fn close_iterator(&self, py: Python<'_>) -> PyResult<()> {
        let closed = self.with_iterator(py, |iterator| match iterator.getattr_opt(intern!(py, "close"))? {
            Some(close) => close.call0().map(drop),
            None => Ok(()),
        });
        let iterator = self.state.with(py, |state| state.feed.as_mut().and_then(|feed| feed.iterator.take()));
        drop(iterator);
        closed
    }

    fn add(&self, py: Python<'_>, item: Py<PyAny>) {
        let task = self.state.with(py, |state| state.feed.as_ref().map(|feed| feed.task.clone_ref(py)));
        let Some(task) = task else { return };
        let branch = Branch::new(py, self.env.get(), Start::Item(task, item));
        self.state.with(py, |state| {
            state.join.branch_added();
            state.branches.push(branch);
        });
    }

    /// No more branches come; with an error, those that live are cancelled. Whether the split goes on.
    pub(super) fn fed_up(&self, py: Python<'_>, error: Option<PyErr>) -> bool {
        let (goes_on, is_broken, unused) = self.state.with(py, |state| {
            let is_one_left = state.feed.as_ref().is_some_and(|feed| feed.pushed.is_some());
            if !is_one_left || error.is_some() {
                state.join.fed_up();
            }
            let is_broken = error.is_some() && state.interrupted.is_none();
            let unused = if is_broken { mem::replace(&mut state.interrupted, error) } else { error };
            (state.goes_on(), is_broken, unused)
        });
        drop(unused);
        if is_broken {
            self.cancel_rest(py, None);
        }
        goes_on
    }

    /// Where the loop is to have a turn before more branches are started: goes on in a callback of its.
    pub(super) fn start_later(slf: &Bound<'_, Self>) -> PyResult<()> {
        let (py, this) = (slf.py(), slf.get());
        let more = slf.getattr(intern!(py, "_more"))?;
        this.event_loop(py).call_method1(intern!(py, "call_soon"), (more,))?;
        this.pause(py, true);
        Ok(())
    }

    fn pause(&self, py: Python<'_>, pauses: bool) {
        self.state.with(py, |state| state.feed.as_mut().map(|feed| feed.pauses = pauses));
    }

    /// The loop had its turn.
    pub(super) fn more_came(slf: &Bound<'_, Self>) -> PyResult<()> {
        let (py, this) = (slf.py(), slf.get());
        this.pause(py, false);
        if this.is_fed(py) {
            let _seat = this.seat(py)?;
            Self::start(slf, false);
        }
        Self::after_callback(slf, Ok(()))
    }

    /// The feeder gives one more; what it then waits for, unless another may come at once.
    pub(super) fn fed<'py>(slf: &Bound<'py, Self>, item: Py<PyAny>) -> PyResult<Option<Bound<'py, PyAny>>> {
        let (py, this) = (slf.py(), slf.get());
        let refused = this.state.with(py, |state| match &mut state.feed {
            Some(feed) if feed.pushed.is_none() => {
                feed.pushed = Some(item);
                None
            }
            _ => Some(item),
        });
        drop(refused);
        {
            // The feeder's own step is under way: it is the current task again afterwards.
            let _seat = this.seat(py)?;
            Self::start(slf, false);
        }
        let (goes_on, is_full, is_turn) = this.state.with(py, |state| {
            let goes_on = state.goes_on();
            let Some(feed) = &mut state.feed else { return (goes_on, false, false) };
            let is_full = feed.pushed.is_some();
            feed.in_a_row = if is_full || feed.in_a_row == TURN { 0 } else { feed.in_a_row + 1 };
            (goes_on, is_full, feed.in_a_row == TURN)
        });
        if goes_on && !is_full {
            return is_turn.then(|| Asyncio::of(py)?.sleep(py, 0.0)).transpose();
        }
        let future = this.event_loop(py).call_method0(intern!(py, "create_future"))?;
        if goes_on {
            let kept = future.clone().unbind();
            let old = this.state.with(py, |state| state.feed.as_mut().and_then(|feed| feed.room.replace(kept)));
            drop(old);
        } else {
            // A feeder that gives more though it was told to stop is told again.
            future.call_method0(intern!(py, "cancel"))?;
        }
        Ok(Some(future))
    }
}

/// A cancel that nobody asked for is how its item failed: every item has an outcome.
pub(super) fn cancelled_itself(cancelled: &Bound<'_, PyBaseException>) -> Py<PyBaseException> {
    let py = cancelled.py();
    let error = TaskExecutionError::new_err("the item cancelled itself");
    error.set_cause(py, Some(PyErr::from_value(cancelled.clone().into_any())));
    error.into_value(py)
}

/// Resolves a future, unless it was cancelled.
fn tell(future: &Bound<'_, PyAny>) {
    let py = future.py();
    let is_done = future.call_method0(intern!(py, "done")).is_ok_and(|done| done.is_truthy().unwrap_or(false));
    if !is_done && let Err(error) = future.call_method1(intern!(py, "set_result"), (py.None(),)) {
        error.write_unraisable(py, Some(future));
    }
}
