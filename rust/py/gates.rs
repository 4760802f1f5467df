//! What holds the branches of a split back besides its own bulkhead: one that it shares with others, and hedging.
//!
//! A branch of a split behind a shared bulkhead has one of the slots from its start to its end. A split that wants to start a
//! branch and finds none free stands in the line, with one place however many branches it has left; once it has been given a
//! slot it stands at the end again if it wants more. It leaves the line when nothing more is to be started.
//!
//! Hedging starts the branches one by one; when is the core's `Hedge`. One timer serves all of them: it runs while the next
//! start waits for nothing but the newest branch to be slow.

use pyo3::intern;
use pyo3::prelude::*;
use pyo3::{PyTraverseError, PyVisit};

use crate::core::hedge::Hedge;
use crate::core::join::Outcome;

use super::asyncio::disarm;
use super::branch;
use super::bulkhead::{Grant, PyBulkhead, Queued, Slot};
use super::split::{Split, State};
use super::table::JoinSpec;

struct Shared {
    bulkhead: Py<PyBulkhead>,
    queued: Option<Queued>,
    /// The slot that the line brought, until a branch starts with it.
    granted: Option<Slot>,
    /// One for each branch that is alive.
    slots: Vec<Slot>,
}

struct Hedging {
    after: f64,
    rule: Hedge,
    /// The timer, and how many branches had been started when it was armed.
    timer: Option<(usize, Py<PyAny>)>,
}

pub(super) struct Gates {
    shared: Option<Shared>,
    hedging: Option<Hedging>,
}

impl Gates {
    /// None where nothing but the split's own bulkhead counts.
    pub(super) fn of(py: Python<'_>, spec: &JoinSpec) -> Option<Box<Self>> {
        if spec.shared.is_none() && spec.hedge_after.is_none() {
            return None;
        }
        let shared = spec.shared.as_ref().map(|bulkhead| Shared {
            bulkhead: bulkhead.clone_ref(py),
            queued: None,
            granted: None,
            slots: Vec::new(),
        });
        let hedging = spec.hedge_after.map(|after| Hedging { after, rule: Hedge::OPENED, timer: None });
        Some(Box::new(Self { shared, hedging }))
    }

    pub(super) fn traverse(&self, visit: &PyVisit<'_>) -> Result<(), PyTraverseError> {
        if let Some(shared) = &self.shared {
            visit.call(&shared.bulkhead)?;
            for slot in shared.slots.iter().chain(&shared.granted) {
                slot.traverse(visit)?;
            }
        }
        match &self.hedging {
            Some(Hedging { timer: Some((_, timer)), .. }) => visit.call(timer),
            _ => Ok(()),
        }
    }
}

impl Split {
    /// Whether another branch may start now, and it has its slot then; else the split is in the line if that is why.
    pub(super) fn passes_gates(slf: &Bound<'_, Self>, state: &mut State) -> bool {
        let started = state.started();
        let Some(gates) = &mut state.gates else { return true };
        if gates.hedging.as_ref().is_some_and(|hedging| !hedging.rule.is_due(started)) {
            return false;
        }
        let Some(shared) = &mut gates.shared else { return true };
        let slot = match (shared.granted.take(), &shared.queued) {
            (Some(slot), _) => slot,
            (None, Some(_)) => return false,
            (None, None) => {
                let event_loop = slf.get().event_loop(slf.py());
                match PyBulkhead::acquire(shared.bulkhead.bind(slf.py()), event_loop, slf) {
                    Ok(slot) => slot,
                    Err(queued) => {
                        shared.queued = Some(queued);
                        return false;
                    }
                }
            }
        };
        shared.slots.push(slot);
        true
    }

    /// A branch ended. Its slot is given back, unless it is this split's turn again.
    pub(super) fn passed_gates(&self, py: Python<'_>, outcome: Outcome) {
        let slot = self.state.with(py, |state| {
            let gates = state.gates.as_mut()?;
            if let Some(hedging) = &mut gates.hedging {
                hedging.rule.branch_ended(outcome);
            }
            let shared = gates.shared.as_mut()?;
            let slot = shared.slots.pop()?;
            if shared.queued.as_ref().is_some_and(|queued| shared.bulkhead.get().renew(queued)) {
                shared.queued = None;
                shared.granted = Some(slot);
                return None;
            }
            Some(slot)
        });
        drop(slot);
    }

    /// Nothing more is to be started: leaves the line, and disarms the timer of hedging.
    pub(super) fn shut(&self, py: Python<'_>) {
        let (place, granted, timer) = self.state.with(py, |state| {
            let Some(gates) = &mut state.gates else { return (None, None, None) };
            let timer = gates.hedging.as_mut().and_then(|hedging| hedging.timer.take());
            let Some(shared) = &mut gates.shared else { return (None, None, timer) };
            let place = shared.queued.take().map(|queued| (shared.bulkhead.clone_ref(py), queued));
            (place, shared.granted.take(), timer)
        });
        if let Some((bulkhead, queued)) = place {
            bulkhead.get().leave(&queued);
        }
        drop(granted);
        disarm(py, timer.map(|(_, timer)| timer));
    }

    /// The branches are gone without an end: so are their slots.
    pub(super) fn give_slots_back(&self, py: Python<'_>) {
        let slots = self.state.with(py, |state| {
            let shared = state.gates.as_mut().and_then(|gates| gates.shared.as_mut());
            shared.map(|shared| std::mem::take(&mut shared.slots))
        });
        drop(slots);
    }

    /// A slot came: a branch starts with it. It is dropped if nothing is to be started any more.
    pub(super) fn slot_came(slf: &Bound<'_, Self>, grant: &Grant) -> PyResult<()> {
        let (py, this) = (slf.py(), slf.get());
        let Some(slot) = grant.take() else { return Ok(()) };
        let unwanted = this.state.with(py, |state| {
            let is_wanted = state.goes_on();
            match state.gates.as_mut().and_then(|gates| gates.shared.as_mut()) {
                Some(shared) if is_wanted => {
                    shared.queued = None;
                    shared.granted.replace(slot)
                }
                _ => Some(slot),
            }
        });
        drop(unwanted);
        Self::start_late(slf)
    }

    /// The newest branch has run for as long as hedging waits.
    pub(super) fn newest_is_slow(slf: &Bound<'_, Self>) -> PyResult<()> {
        let timer = slf.get().state.with(slf.py(), |state| {
            let started = state.started();
            let hedging = state.gates.as_mut()?.hedging.as_mut()?;
            hedging.rule.newest_is_slow(started);
            hedging.timer.take()
        });
        drop(timer);
        Self::start_late(slf)
    }

    /// Starts what may be started now, from a callback of the loop.
    fn start_late(slf: &Bound<'_, Self>) -> PyResult<()> {
        let started = {
            let seat = slf.get().is_native().then(|| branch::seat(slf.get().event_loop(slf.py()))).transpose();
            seat.map(|_seat| Self::start(slf, false))
        };
        Self::after_callback(slf, started)
    }

    /// Sees to it that the timer of hedging runs for the newest branch, if the next one waits for nothing else.
    pub(super) fn arm_hedging(slf: &Bound<'_, Self>) {
        let py = slf.py();
        let (old, wanted) = slf.get().state.with(py, |state| {
            let (started, has_more, newest) =
                (state.started(), state.goes_on() && state.has_more(), state.newest_began());
            let Some(hedging) = state.gates.as_mut().and_then(|gates| gates.hedging.as_mut()) else {
                return (None, None);
            };
            let is_wanted = has_more && !hedging.rule.is_due(started);
            let is_armed = hedging.timer.as_ref().is_some_and(|(armed_for, _)| *armed_for == started);
            match newest.filter(|_| is_wanted) {
                Some(_) if is_armed => (None, None),
                newest => (hedging.timer.take(), newest.map(|began| (started, began, hedging.after))),
            }
        });
        disarm(py, old.map(|(_, timer)| timer));
        let Some((started, began, after)) = wanted else { return };
        let arm = || {
            let clock = slf.get().env.get().clock(py)?;
            let left = after - (slf.get().mark(py) - began);
            clock.call_at(py, clock.now(py)? + left, slf.getattr(intern!(py, "_hedge"))?)
        };
        let timer = match arm() {
            Ok(timer) => timer,
            Err(error) => return error.write_unraisable(py, Some(slf)),
        };
        let stray = slf.get().state.with(py, |state| {
            let goes_on = state.goes_on(); // arming may have run anything
            match state.gates.as_mut().and_then(|gates| gates.hedging.as_mut()) {
                Some(hedging) if goes_on => hedging.timer.replace((started, timer)).map(|(_, old)| old),
                _ => Some(timer),
            }
        });
        disarm(py, stray);
    }
}
