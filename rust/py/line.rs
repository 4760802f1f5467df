//! Those who wait for limiters, and how they are told that it is their turn.
//!
//! Model. The core keeps the order and the costs; here each ticket has a `WaitingCall`, kept by every limiter that it
//! stands in line for. The coroutine in `_limiter.py` asks it for its `turn` and awaits what it is given, again and again:
//!
//! ```text
//! first in all its lines, and there is room     it takes everything: done
//! first in all its lines, and there is none     a sleep until there will be
//! not first                                     a future, done when it has become first in one of them
//! ```
//!
//! Nobody is given anything by others. Whoever leaves a line tells the next one, in that one's own loop, and what is told
//! asks again in its own step. So until a call goes on, a cancel takes nothing with it: it leaves, and the next is told.
//!
//! Invariants. Every call in a line is asleep as the first of all its lines, or has been told since it last asked, or has
//! somebody in front. One whose loop is closed can do nothing: it leaves when it is told, and when it is found in front
//! of a call that would have to wait.
//!
//! Locks. Each limiter has one; a call takes those of its limiters in the order of their numbers. Under a lock no Python
//! runs, and no Python object is made or dropped.

use std::collections::BTreeMap;
use std::mem;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use pyo3::exceptions::PyRuntimeError;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::{PyTraverseError, PyVisit};

use crate::core::limiter::{
    Charge, Head, Limiter, LimiterPolicy, Place, Refusal, Ticket, Turn, acquire, admit, leave, try_acquire,
};
use crate::core::time::Moment;

use super::asyncio::Asyncio;
use super::errors::RateLimitedError;
use super::now::now;

/// A loop's clock in seconds is coarser than the core's in nanoseconds: a sleep that is shorter might not move it.
const SHORTEST_SLEEP: f64 = 1e-6;

type Line = BTreeMap<Ticket, Py<WaitingCall>>;

pub(super) struct Shared {
    pub(super) limiter: Limiter,
    line: Line,
}

/// What a bucket and a window have in common: all but their policies.
#[pyclass(frozen, subclass, weakref, module = "cano._core", name = "Limiter")]
pub(super) struct PyLimiter {
    /// Its place in the order of locks.
    number: u64,
    pub(super) name: Option<Arc<str>>,
    shared: Mutex<Shared>,
}

impl PyLimiter {
    pub(super) fn of(policy: LimiterPolicy, name: Option<String>) -> Self {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        Self {
            number: COUNT.fetch_add(1, Ordering::Relaxed),
            name: name.map(Into::into),
            shared: Mutex::new(Shared { limiter: Limiter::new(policy), line: Line::new() }),
        }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a cost now, if that can be.
    #[inline]
    pub(super) fn try_now(&self, cost: u64) -> Result<(), Refusal> {
        let mut shared = self.lock();
        try_acquire(now(), &mut [&mut shared.limiter], &[Charge { limiter: 0, cost }])
    }

    pub(super) fn traverse(&self, visit: &PyVisit<'_>) -> Result<(), PyTraverseError> {
        // Never locked here: a lock is not held where the collector can come.
        let Ok(shared) = self.shared.try_lock() else { return Ok(()) };
        shared.line.values().try_for_each(|call| visit.call(call))
    }

    pub(super) fn clear(&self) {
        let line = mem::take(&mut self.lock().line); // unlocked at the end of this line, before what is in it goes
        drop(line);
    }
}

/// What a call asks of whom: a charge for each tier, and each limiter once, in the order of their locks.
pub(super) struct Call {
    pub(super) limiters: Vec<Py<PyLimiter>>,
    pub(super) charges: Vec<Charge>,
    /// What an error calls the tiers.
    pub(super) names: Vec<Option<Arc<str>>>,
}

impl Call {
    /// A call of one limiter.
    pub(super) fn single(limiter: &Bound<'_, PyLimiter>, cost: u64) -> Self {
        Self {
            limiters: vec![limiter.clone().unbind()],
            charges: vec![Charge { limiter: 0, cost }],
            names: vec![limiter.get().name.clone()],
        }
    }

    /// A call with one more tier.
    pub(super) fn add(&mut self, name: Arc<str>, limiter: &Bound<'_, PyLimiter>, cost: u64) {
        let number = limiter.get().number;
        let index = self.limiters.partition_point(|known| known.get().number < number);
        if self.limiters.get(index).is_none_or(|known| known.get().number != number) {
            self.limiters.insert(index, limiter.clone().unbind());
            for charge in self.charges.iter_mut().filter(|charge| charge.limiter >= index) {
                charge.limiter += 1;
            }
        }
        self.charges.push(Charge { limiter: index, cost });
        self.names.push(Some(name));
    }

    /// The same call, where only some tiers cost anything.
    pub(super) fn only(&self, py: Python<'_>, is_charged: impl Fn(usize) -> bool) -> Self {
        let charges = self.charges.iter().enumerate();
        Self {
            limiters: self.limiters.iter().map(|limiter| limiter.clone_ref(py)).collect(),
            charges: charges
                .map(|(tier, &Charge { limiter, cost })| Charge {
                    limiter,
                    cost: if is_charged(tier) { cost } else { 0 },
                })
                .collect(),
            names: self.names.clone(),
        }
    }

    /// Takes everything now, if that can be.
    pub(super) fn try_now(&self) -> Result<(), Refusal> {
        locked(&self.limiters, |now, limiters, _| try_acquire(now, limiters, &self.charges))
    }

    /// The same; nobody is refused because of a call that cannot come any more.
    pub(super) fn try_acquire(&self, py: Python<'_>) -> PyResult<()> {
        let mut taken = self.try_now();
        if matches!(taken, Err(Refusal { retry_after: Some(_), .. })) && self.drop_closed(py)? {
            taken = self.try_now();
        }
        taken.map_err(|refusal| self.error(refusal))
    }

    /// Takes everything now, or stands in line.
    pub(super) fn enter(&self, py: Python<'_>) -> PyResult<Option<Py<WaitingCall>>> {
        self.drop_closed(py)?;
        let call = Py::new(py, WaitingCall::new(py, &self.limiters)?)?;
        let place = locked(&self.limiters, |now, limiters, lines| {
            let place = acquire(now, limiters, &self.charges);
            if let Ok(Place::Waiting(ticket)) = place {
                call.get().ticket.get_or_init(|| ticket);
                for (index, line) in lines.iter_mut().enumerate() {
                    if self.charges.iter().any(|charge| charge.limiter == index && charge.cost > 0) {
                        line.insert(ticket, call.clone_ref(py));
                    }
                }
            }
            place
        });
        match place {
            Ok(Place::Granted) => Ok(None),
            Ok(Place::Waiting(_)) => Ok(Some(call)),
            Err(refusal) => Err(self.error(refusal)),
        }
    }

    /// Makes calls leave whose loop is closed and that stand in front, and tells those behind; whether there were any.
    fn drop_closed(&self, py: Python<'_>) -> PyResult<bool> {
        let heads = locked(&self.limiters, |_, _, lines| {
            let heads = lines.iter().filter_map(|line| line.values().next());
            heads.map(|call| call.clone_ref(py)).collect::<Vec<_>>()
        });
        let mut dropped = false;
        for call in heads {
            if call.get().is_closed(py)? {
                tell(py, call.get().leave_lines(py))?;
                dropped = true;
            }
        }
        Ok(dropped)
    }

    /// What a refused call raises.
    fn error(&self, refusal: Refusal) -> PyErr {
        let Charge { limiter, .. } = self.charges[refusal.tier];
        let name = self.names[refusal.tier].as_deref();
        let by = name.map_or(String::new(), |name| format!(" by '{name}'"));
        let (text, retry_after) = if let Some(wait) = refusal.retry_after {
            (format!("retry after {} s", wait.as_seconds()), wait.as_seconds())
        } else {
            let asked = self.charges.iter().filter(|charge| charge.limiter == limiter);
            let asked = asked.fold(0, |sum: u64, charge| sum.saturating_add(charge.cost));
            let most = self.limiters[limiter].get().lock().limiter.snapshot(now()).capacity;
            let more = if asked == u64::MAX { " or more" } else { "" };
            (format!("a cost is granted up to {most}, never one of {asked}{more}"), f64::INFINITY)
        };
        RateLimitedError::new_err((format!("rate limited{by}: {text}"), name.map(str::to_owned), retry_after))
    }
}

/// Locks the limiters, which are distinct and in the order of their numbers, for `act`.
pub(super) fn locked<R>(
    limiters: &[Py<PyLimiter>],
    act: impl FnOnce(Moment, &mut [&mut Limiter], &mut [&mut Line]) -> R,
) -> R {
    let mut shared: Vec<_> = limiters.iter().map(|limiter| limiter.get().lock()).collect();
    let (mut limiters, mut lines): (Vec<_>, Vec<_>) = shared
        .iter_mut()
        .map(|shared| {
            let Shared { limiter, line } = &mut **shared;
            (limiter, line)
        })
        .unzip();
    act(now(), &mut limiters, &mut lines)
}

/// One that stands in line.
#[pyclass(frozen, module = "cano._core")]
pub(super) struct WaitingCall {
    limiters: Vec<Py<PyLimiter>>,
    /// Known once it stands in line.
    ticket: OnceLock<Ticket>,
    event_loop: Py<PyAny>,
    /// A future of that loop, done when it was told.
    told: Mutex<Py<PyAny>>,
}

impl WaitingCall {
    fn new(py: Python<'_>, limiters: &[Py<PyLimiter>]) -> PyResult<Self> {
        let event_loop = Asyncio::of(py)?.running_loop(py)?;
        let told = event_loop.call_method0(intern!(py, "create_future"))?;
        Ok(Self {
            limiters: limiters.iter().map(|limiter| limiter.clone_ref(py)).collect(),
            ticket: OnceLock::new(),
            event_loop: event_loop.unbind(),
            told: Mutex::new(told.unbind()),
        })
    }

    fn future<'py>(&self, py: Python<'py>) -> Bound<'py, PyAny> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner).bind(py).clone()
    }

    /// A future that is not done yet.
    fn pending_future<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let future = self.future(py);
        if !is_done(&future)? {
            return Ok(future);
        }
        let fresh = self.event_loop.bind(py).call_method0(intern!(py, "create_future"))?;
        let told = fresh.clone().unbind();
        let done = mem::replace(&mut *self.told.lock().unwrap_or_else(PoisonError::into_inner), told);
        drop(done);
        Ok(fresh)
    }

    fn ticket(&self) -> Ticket {
        *self.ticket.get().expect("nobody has the call before it stands in line")
    }

    fn is_closed(&self, py: Python<'_>) -> PyResult<bool> {
        self.event_loop.bind(py).call_method0(intern!(py, "is_closed"))?.is_truthy()
    }

    /// Lets its coroutine go on, in its own loop; fails if that is closed.
    fn wake(slf: &Bound<'_, Self>) -> PyResult<()> {
        let (py, event_loop) = (slf.py(), slf.get().event_loop.bind(slf.py()));
        if Asyncio::of(py)?.running_loop(py).is_ok_and(|running| running.is(event_loop)) {
            return slf.get().told(py);
        }
        let told = slf.getattr(intern!(py, "told"))?;
        event_loop.call_method1(intern!(py, "call_soon_threadsafe"), (told,)).map(drop)
    }

    /// Leaves all lines; gives those that are first now.
    fn leave_lines(&self, py: Python<'_>) -> Vec<Py<WaitingCall>> {
        let ticket = self.ticket();
        let (heads, _struck) = locked(&self.limiters, |_, limiters, lines| {
            let heads = leave(limiters, ticket);
            strike(py, ticket, lines, &heads)
        });
        heads
    }
}

#[pymethods]
impl WaitingCall {
    /// Takes what it came for if it is its turn: None. Else what to await before asking again.
    fn turn<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyAny>>> {
        let future = self.pending_future(py)?; // before it asks, so that no word gets lost
        let ticket = self.ticket();
        let (turn, parted) = locked(&self.limiters, |now, limiters, lines| {
            let turn = admit(now, limiters, ticket);
            let heads = if let Turn::Admitted(heads) = &turn { Some(heads) } else { None };
            let parted = heads.map(|heads| strike(py, ticket, lines, heads));
            (turn, parted)
        });
        match turn {
            Turn::Admitted(_) => parted.map_or(Ok(()), |(heads, _)| tell(py, heads)).map(|()| None),
            Turn::Wait(time) => Asyncio::of(py)?.sleep(py, time.as_seconds().max(SHORTEST_SLEEP)).map(Some),
            Turn::NotFirst => Ok(Some(future)),
        }
    }

    /// Gives up.
    fn leave(&self, py: Python<'_>) -> PyResult<()> {
        tell(py, self.leave_lines(py))
    }

    /// It has become first in a line; called in its own loop.
    fn told(&self, py: Python<'_>) -> PyResult<()> {
        let future = self.future(py);
        if !is_done(&future)? {
            future.call_method1(intern!(py, "set_result"), (py.None(),))?;
        }
        Ok(())
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        self.limiters.iter().try_for_each(|limiter| visit.call(limiter))?;
        visit.call(&self.event_loop)?;
        self.told.try_lock().map_or(Ok(()), |told| visit.call(&*told))
    }
}

/// Takes a ticket out of the lines; gives the calls of the heads, and what is to be dropped without a lock.
fn strike(
    py: Python<'_>,
    ticket: Ticket,
    lines: &mut [&mut Line],
    heads: &[Head],
) -> (Vec<Py<WaitingCall>>, Vec<Py<WaitingCall>>) {
    let struck = lines.iter_mut().filter_map(|line| line.remove(&ticket)).collect();
    let heads = heads.iter().filter_map(|head| lines[head.limiter].get(&head.ticket));
    (heads.map(|call| call.clone_ref(py)).collect(), struck)
}

/// Tells calls that they have become first; one whose loop is closed leaves, and the next is told in its place.
fn tell(py: Python<'_>, mut calls: Vec<Py<WaitingCall>>) -> PyResult<()> {
    let mut outcome = Ok(());
    while let Some(call) = calls.pop() {
        if let Err(error) = WaitingCall::wake(call.bind(py)) {
            calls.extend(call.get().leave_lines(py));
            if !error.is_instance_of::<PyRuntimeError>(py) {
                outcome = outcome.and(Err(error));
            }
        }
    }
    outcome
}

fn is_done(future: &Bound<'_, PyAny>) -> PyResult<bool> {
    future.call_method0(intern!(future.py(), "done"))?.is_truthy()
}
