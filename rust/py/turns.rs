//! When the branches of a split get their turns: those that let others run first, and those whose attempt is over.
//!
//! A native branch that yields nothing (`sleep(0)`) is queued. If every living branch is queued, the parent yields nothing as
//! well and steps them all when it is resumed; otherwise a handle on the loop serves those that are queued when it is made.
//!
//! The time limits of all branches' attempts share one timer.

use pyo3::intern;
use pyo3::prelude::*;

use super::asyncio::disarm;
use super::branch;
use super::run::Run;
use super::split::Split;

impl Split {
    /// A branch wants to be called when an attempt's deadline is due: one timer serves all of them.
    ///
    /// Deadlines of equal limits come in order, so that each is added at the end; one that is over earlier than the last
    /// finds its place from there. An attempt that ended in time leaves its entry, which then calls for nothing; once most
    /// are such, they are thrown out, so that they are no more than twice the branches alive however many there were.
    pub(super) fn arm(slf: &Bound<'_, Self>, due: f64, run: &Bound<'_, Run>) -> PyResult<()> {
        let (py, run) = (slf.py(), run.clone().unbind());
        let left = slf.get().state.with(py, |state| {
            if state.deadlines.len() < 2 * state.alive + 64 {
                return Vec::new();
            }
            let deadlines = std::mem::take(&mut state.deadlines);
            let (over, alive) = deadlines.into_iter().partition::<Vec<_>, _>(|(_, run)| run.get().is_over(py));
            state.deadlines = alive.into();
            over
        });
        drop(left);
        let is_first = slf.get().state.with(py, |state| {
            let at = match state.deadlines.back() {
                Some((last, _)) if *last > due => state.deadlines.partition_point(|(other, _)| *other <= due),
                _ => state.deadlines.len(),
            };
            state.deadlines.insert(at, (due, run));
            at == 0
        });
        if is_first { Self::arm_for_first(slf) } else { Ok(()) }
    }

    fn arm_for_first(slf: &Bound<'_, Self>) -> PyResult<()> {
        let (py, this) = (slf.py(), slf.get());
        let (first, old) =
            this.state.with(py, |state| (state.deadlines.front().map(|(due, _)| *due), state.deadline_timer.take()));
        disarm(py, old);
        let Some(first) = first else { return Ok(()) };
        let callback = slf.getattr(intern!(py, "_deadline"))?;
        let timer = this.env.get().clock(py)?.call_at(py, first, callback)?;
        this.state.with(py, |state| state.deadline_timer = Some(timer));
        Ok(())
    }

    /// Ends the attempts whose deadline is due.
    pub(super) fn deadline_came(slf: &Bound<'_, Self>) -> PyResult<()> {
        let (py, this) = (slf.py(), slf.get());
        let now = this.env.get().now(py)?;
        let (due, timer) = this.state.with(py, |state| {
            let count = state.deadlines.partition_point(|(due, _)| *due <= now);
            (state.deadlines.drain(..count).collect::<Vec<_>>(), state.deadline_timer.take())
        });
        drop(timer);
        let mut outcome = Ok(());
        for (_, run) in due {
            outcome = outcome.and(Run::_fire(run.bind(py)));
        }
        outcome.and(Self::arm_for_first(slf))
    }

    /// The parent was resumed: steps the branches that wait for it to be.
    pub(super) fn resumed(slf: &Bound<'_, Self>) -> PyResult<()> {
        let (py, this) = (slf.py(), slf.get());
        if this.state.with(py, |state| state.queued.is_empty()) {
            return Ok(());
        }
        let _seat = branch::seat(this.event_loop(py))?;
        // What would end the loop is known to the split already, and leaves through the parent.
        drop(Self::step_queued(slf));
        Ok(())
    }

    /// Steps every branch that is queued now. An error is one that ends the loop as well.
    fn step_queued(slf: &Bound<'_, Self>) -> PyResult<()> {
        let (py, this) = (slf.py(), slf.get());
        let batch = this.state.with(py, |state| std::mem::take(&mut state.queued));
        Self::step_batch(slf, batch)
    }

    fn step_batch(slf: &Bound<'_, Self>, batch: Vec<Py<PyAny>>) -> PyResult<()> {
        let (py, this) = (slf.py(), slf.get());
        let mut batch = batch.into_iter();
        while let Some(next) = batch.next() {
            if let Err(error) = branch::step_in_context(next.bind(py), this.event_loop(py)) {
                this.state.with(py, |state| state.queued.splice(0..0, batch).for_each(drop));
                return Err(error);
            }
        }
        Ok(())
    }

    /// A branch wants another turn.
    pub(super) fn queue(slf: &Bound<'_, Self>, branch: &Bound<'_, PyAny>) {
        let branch = branch.clone().unbind();
        slf.get().state.with(slf.py(), |state| state.queued.push(branch));
    }

    /// While the parent waits for its future, the loop has to step what is queued.
    pub(super) fn schedule_queued(slf: &Bound<'_, Self>) {
        let (py, this) = (slf.py(), slf.get());
        let wanted = this.state.with(py, |state| {
            let wanted = (state.waiter.is_some() || state.is_abandoned) && !state.queued.is_empty();
            if wanted {
                let batch = std::mem::take(&mut state.queued);
                state.batches.push_back(batch);
            }
            wanted
        });
        if !wanted {
            return;
        }
        let scheduled = slf
            .getattr(intern!(py, "_turn"))
            .and_then(|turn| this.event_loop(py).call_method1(intern!(py, "call_soon"), (turn,)));
        if let Err(error) = scheduled {
            this.state.with(py, |state| {
                let batch = state.batches.pop_back().unwrap_or_default();
                state.queued = batch;
            });
            error.write_unraisable(py, Some(slf));
        }
    }

    /// Steps the oldest batch.
    pub(super) fn turn_came(slf: &Bound<'_, Self>) -> PyResult<()> {
        let outcome = {
            let _seat = branch::seat(slf.get().event_loop(slf.py()))?;
            let batch = slf.get().state.with(slf.py(), |state| state.batches.pop_front());
            Self::step_batch(slf, batch.unwrap_or_default())
        };
        Self::after_callback(slf, outcome)
    }
}
