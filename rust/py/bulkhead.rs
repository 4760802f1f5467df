//! `Bulkhead`: a limit that splits and tasks share, over runs, loops and threads.
//!
//! The core keeps the slots and the line. A slot in use is a `Slot`, which is given back when it is dropped, however that
//! comes about. A slot that passes on to somebody in the line travels as a `Grant`, the argument of a call in their own loop:
//! `call_soon` from within it, else `call_soon_threadsafe`. Who leaves meanwhile takes it out of the grant and drops it, a loop
//! that is closed drops its calls, and one that is closed already refuses them: the slot goes to the next in each case.
//!
//! Invariant: the lock is held while the core answers; nothing of Python is called or let go meanwhile.

use std::mem;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use pyo3::exceptions::PyRuntimeError;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyString, PyTuple};
use pyo3::{PyTraverseError, PyVisit};

use crate::core::bulkhead::{Bulkhead, Place, Ticket};

use super::asyncio::Asyncio;
use super::convert::count;
use super::errors::{check_name, thrown};

/// Where a slot lies on its way.
#[derive(Default)]
struct Envelope(Mutex<Option<Slot>>);

impl Envelope {
    fn take(&self) -> Option<Slot> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn put(&self, slot: Slot) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(slot);
    }
}

/// Somebody in the line: an object that takes a `Grant` in its method `_granted`, which its loop calls.
struct Waiting {
    event_loop: Py<PyAny>,
    who: Py<PyAny>,
    envelope: Arc<Envelope>,
}

/// A place in the line, for its owner.
pub(super) struct Queued {
    ticket: Ticket,
    /// Of the line, then of the grant: where both are gone the slot is as well.
    envelope: Weak<Envelope>,
}

struct Books {
    slots: Bulkhead<Waiting>,
    /// How many of the slots in use are those of `async with` blocks.
    entered: usize,
}

/// How many may be at work at once, whoever they are.
#[pyclass(frozen, weakref, module = "cano", name = "Bulkhead")]
pub(super) struct PyBulkhead {
    books: Mutex<Books>,
    name: Option<Py<PyString>>,
}

#[pymethods]
impl PyBulkhead {
    #[new]
    #[pyo3(signature = (limit, *, name=None))]
    fn new(limit: &Bound<'_, PyAny>, name: Option<&Bound<'_, PyAny>>) -> PyResult<Self> {
        let slots = Bulkhead::new(count("limit", limit)?)?;
        let name = name.map(check_name).transpose()?.map(Bound::unbind);
        Ok(Self { books: Mutex::new(Books { slots, entered: 0 }), name })
    }

    #[getter]
    fn limit(&self) -> usize {
        self.books().slots.limit()
    }

    #[getter]
    fn in_use(&self) -> usize {
        self.books().slots.in_use()
    }

    #[getter]
    fn waiting(&self) -> usize {
        self.books().slots.waiting()
    }

    #[getter]
    fn name(&self, py: Python<'_>) -> Option<Py<PyString>> {
        Some(self.name.as_ref()?.clone_ref(py))
    }

    fn __aenter__(slf: Py<Self>) -> Passage {
        Passage { bulkhead: slf, at: Mutex::new(At::Entrance) }
    }

    #[pyo3(signature = (*_error))]
    fn __aexit__(slf: &Bound<'_, Self>, _error: &Bound<'_, PyTuple>) -> PyResult<Passage> {
        let was_entered = {
            let mut books = slf.get().books();
            let was_entered = books.entered > 0;
            books.entered -= usize::from(was_entered);
            was_entered
        };
        if !was_entered {
            return Err(PyRuntimeError::new_err("the bulkhead is left more often than it was entered"));
        }
        drop(Slot::of(slf));
        Ok(Passage { bulkhead: slf.clone().unbind(), at: Mutex::new(At::Exit) })
    }

    fn __repr__(&self, py: Python<'_>) -> PyResult<String> {
        let name = match &self.name {
            Some(name) => format!(" {}", name.bind(py).to_cow()?),
            None => String::new(),
        };
        let books = self.books();
        let (limit, in_use, waiting) = (books.slots.limit(), books.slots.in_use(), books.slots.waiting());
        Ok(format!("<Bulkhead{name} limit={limit} in_use={in_use} waiting={waiting}>"))
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        // The lock is free whenever Python, and so the collector, runs.
        if let Ok(books) = self.books.try_lock() {
            for waiting in books.slots.line() {
                visit.call(&waiting.event_loop)?;
                visit.call(&waiting.who)?;
            }
        }
        Ok(())
    }

    fn __clear__(&self) {
        let line = self.books().slots.clear();
        drop(line);
    }
}

impl PyBulkhead {
    fn books(&self) -> MutexGuard<'_, Books> {
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a free slot, or stands in the line: the loop will call the method `_granted` of `who`.
    pub(super) fn acquire(
        slf: &Bound<'_, Self>,
        event_loop: &Bound<'_, PyAny>,
        who: &Bound<'_, PyAny>,
    ) -> Result<Slot, Queued> {
        let mut envelope = Weak::new();
        let place = slf.get().books().slots.acquire(|| {
            let waiting = Waiting {
                event_loop: event_loop.clone().unbind(),
                who: who.clone().unbind(),
                envelope: Arc::default(),
            };
            envelope = Arc::downgrade(&waiting.envelope);
            waiting
        });
        match place {
            Place::Taken => Ok(Slot::of(slf)),
            Place::Waiting(ticket) => Err(Queued { ticket, envelope }),
        }
    }

    /// Whether a slot that would be given back now would come back, to this place; then the place is used up.
    pub(super) fn renew(&self, queued: &Queued) -> bool {
        let first = self.books().slots.renew(queued.ticket);
        first.is_some()
    }

    /// Gives up a place in the line, or the slot that is on its way.
    pub(super) fn leave(&self, queued: &Queued) {
        let left = self.books().slots.leave(queued.ticket);
        let slot = queued.envelope.upgrade().and_then(|envelope| envelope.take());
        drop((left, slot));
    }

    /// A slot is free, or passes on to the first in the line who can be told.
    fn give_back(slf: &Bound<'_, Self>) {
        let py = slf.py();
        let next = || slf.get().books().slots.release();
        let Some(mut first) = next() else { return };
        let raised = PyErr::take(py); // a slot may be dropped by what an exception unwinds
        while let Some(slot) = Slot::of(slf).pass_on(py, &first) {
            drop(slot.kept());
            match next() {
                Some(second) => first = second,
                None => break,
            }
        }
        if let Some(error) = raised {
            error.restore(py);
        }
    }

    /// A block is entered with a slot.
    fn enter(&self, slot: Slot) {
        drop(slot.kept());
        self.books().entered += 1;
    }
}

/// One slot in use.
pub(super) struct Slot {
    bulkhead: Option<Py<PyBulkhead>>,
}

impl Slot {
    fn of(bulkhead: &Bound<'_, PyBulkhead>) -> Self {
        Self { bulkhead: Some(bulkhead.clone().unbind()) }
    }

    /// Leaves it in use, in the hands of whoever calls this.
    fn kept(mut self) -> Option<Py<PyBulkhead>> {
        self.bulkhead.take()
    }

    /// Calls somebody who was in the line; the slot comes back if that is not possible.
    fn pass_on(self, py: Python<'_>, waiting: &Waiting) -> Option<Slot> {
        let event_loop = waiting.event_loop.bind(py);
        waiting.envelope.put(self);
        let call = || {
            let grant = Bound::new(py, Grant(waiting.envelope.clone()))?;
            let is_inside = Asyncio::of(py)?.is_running(event_loop)?;
            let name = if is_inside { intern!(py, "call_soon") } else { intern!(py, "call_soon_threadsafe") };
            let granted = waiting.who.bind(py).getattr(intern!(py, "_granted"))?;
            event_loop.call_method1(name, (granted, grant))
        };
        let error = call().err()?;
        let is_closed = event_loop.call_method0(intern!(py, "is_closed")).and_then(|closed| closed.is_truthy());
        if !is_closed.unwrap_or(false) {
            error.write_unraisable(py, Some(event_loop));
        }
        waiting.envelope.take()
    }

    pub(super) fn traverse(&self, visit: &PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.bulkhead)
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        if let Some(bulkhead) = self.bulkhead.take() {
            // Only the end of the interpreter refuses, when nobody waits any more.
            let _ = Python::try_attach(|py| PyBulkhead::give_back(bulkhead.bind(py)));
        }
    }
}

/// A slot on its way to its new owner.
#[pyclass(frozen, module = "cano._core")]
pub(super) struct Grant(Arc<Envelope>);

impl Grant {
    /// The slot, unless its owner has given it up.
    pub(super) fn take(&self) -> Option<Slot> {
        self.0.take()
    }
}

#[pymethods]
impl Grant {
    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        match self.0.0.try_lock() {
            Ok(slot) => slot.as_ref().map_or(Ok(()), |slot| slot.traverse(&visit)),
            Err(_) => Ok(()),
        }
    }
}

enum At {
    Entrance,
    /// In the line; the task waits for the future.
    Line(Queued, Py<PyAny>),
    /// The slot is there, and the task about to be resumed.
    Slot(Slot),
    Exit,
    Over,
}

/// What `async with` awaits, on its way in or out.
#[pyclass(frozen, module = "cano._core")]
struct Passage {
    bulkhead: Py<PyBulkhead>,
    at: Mutex<At>,
}

impl Passage {
    fn go_to(&self, next: At) -> At {
        mem::replace(&mut *self.at.lock().unwrap_or_else(PoisonError::into_inner), next)
    }

    fn enter(slf: &Bound<'_, Self>) -> PyResult<Option<Py<PyAny>>> {
        let (py, this) = (slf.py(), slf.get());
        let bulkhead = this.bulkhead.bind(py);
        let event_loop = Asyncio::of(py)?.running_loop(py)?;
        match PyBulkhead::acquire(bulkhead, &event_loop, slf) {
            Ok(slot) => {
                bulkhead.get().enter(slot);
                Ok(None)
            }
            Err(queued) => {
                let future = event_loop.call_method0(intern!(py, "create_future"));
                // A line that one cannot wait in is left.
                let future = future.inspect_err(|_| bulkhead.get().leave(&queued))?;
                this.wait(queued, future).map(Some)
            }
        }
    }

    /// Hands the future out, as an `await` of it does.
    fn wait(&self, queued: Queued, future: Bound<'_, PyAny>) -> PyResult<Py<PyAny>> {
        future.setattr(intern!(future.py(), "_asyncio_future_blocking"), true)?;
        let handed = future.clone().unbind();
        drop(self.go_to(At::Line(queued, future.unbind())));
        Ok(handed)
    }

    /// Leaves the line, or gives the slot on.
    fn turn_back(&self) {
        match self.go_to(At::Over) {
            At::Line(queued, _) => self.bulkhead.get().leave(&queued),
            At::Slot(slot) => drop(slot),
            At::Entrance | At::Exit | At::Over => {}
        }
    }
}

#[pymethods]
impl Passage {
    fn __await__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    fn __iter__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    fn __next__(slf: &Bound<'_, Self>) -> PyResult<Option<Py<PyAny>>> {
        let (py, this) = (slf.py(), slf.get());
        match this.go_to(At::Over) {
            At::Entrance => Self::enter(slf),
            At::Line(queued, future) => this.wait(queued, future.into_bound(py)).map(Some),
            At::Slot(slot) => {
                this.bulkhead.get().enter(slot);
                Ok(None)
            }
            At::Exit => Ok(None),
            At::Over => Err(PyRuntimeError::new_err("a bulkhead's passage can be awaited only once")),
        }
    }

    #[pyo3(signature = (kind, value=None, traceback=None, /))]
    fn throw(
        &self,
        kind: Bound<'_, PyAny>,
        value: Option<Bound<'_, PyAny>>,
        traceback: Option<Bound<'_, PyAny>>,
    ) -> PyResult<()> {
        self.turn_back();
        Err(PyErr::from_value(thrown(kind, value, traceback)?))
    }

    fn close(&self) {
        self.turn_back();
    }

    /// The event loop calls this with the slot.
    fn _granted(&self, grant: &Bound<'_, Grant>) -> PyResult<()> {
        let py = grant.py();
        let Some(slot) = grant.get().take() else { return Ok(()) };
        match self.go_to(At::Over) {
            At::Line(_, future) => {
                drop(self.go_to(At::Slot(slot)));
                let future = future.bind(py);
                if !future.call_method0(intern!(py, "done"))?.is_truthy()? {
                    future.call_method1(intern!(py, "set_result"), (py.None(),))?;
                }
                Ok(())
            }
            elsewhere => {
                drop(self.go_to(elsewhere));
                Ok(())
            }
        }
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.bulkhead)?;
        match self.at.try_lock().as_deref() {
            Ok(At::Line(_, future)) => visit.call(future),
            Ok(At::Slot(slot)) => slot.traverse(&visit),
            Ok(At::Entrance | At::Exit | At::Over) | Err(_) => Ok(()),
        }
    }

    fn __clear__(&self) {
        drop(self.go_to(At::Over));
    }
}
