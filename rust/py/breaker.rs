//! Circuit breakers, their permits, and `async with`.
//!
//! The core's breaker is under a lock that is held for one question at a time, and never while Python runs: decide, unlock,
//! then tell `on_change`. The `Gate` around the lock is shared with the permits, so that they hold no Python object and can
//! give themselves back wherever they are dropped.
//!
//! An `async with` block needs a permit of its own, whichever task ends it and in whichever order, but all that its end is
//! told is the breaker. It keeps one thing more: Python looks `__aexit__` up when the block begins, once and before it calls
//! `__aenter__` (so does `AsyncExitStack`), and calls what it found when the block ends. Here that is a new `BlockEnd` for
//! whoever looks. `__aenter__` puts the permit into the one that its thread has looked up last, so that a block owns its
//! permit: one that is dropped without having ended drops it, too. An `__aenter__` that has no such end refuses.

use std::cell::Cell;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use pyo3::exceptions::PyException;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyDict, PyTuple, PyType};
use pyo3::{PyTraverseError, PyVisit};

use crate::core::breaker::{Admission, Breaker, Change, Outcome, Permit, Snapshot, State};
use crate::core::time::{Moment, Nanos};

use super::circuit_policy::{Given, PyCircuitPolicy};
use super::errors::{CircuitOpenError, ConfigurationError, check_text, show};
use super::now::now;

const LONGEST_NAME: usize = 128;

/// A breaker of the core, as all who use it share it.
struct Gate(Mutex<Breaker>);

impl Gate {
    fn lock(&self) -> MutexGuard<'_, Breaker> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A permit that knows its breaker; dropped without an outcome, it is given back as ignored.
pub(super) struct Grant {
    gate: Arc<Gate>,
    permit: Permit,
    /// Under the lock of the gate.
    is_used: AtomicBool,
}

impl Grant {
    #[inline]
    fn give_back(&self, outcome: Outcome) -> Result<Option<Change>, Misuse> {
        let mut breaker = self.gate.lock();
        if self.is_used.load(Relaxed) {
            return Err(Misuse::Again);
        }
        self.is_used.store(true, Relaxed);
        let is_timed = outcome == Outcome::Failure || breaker.needs_time();
        let now = if is_timed { now() } else { Moment::default() };
        Ok(breaker.record(self.permit, outcome, now))
    }
}

impl Drop for Grant {
    fn drop(&mut self) {
        if !*self.is_used.get_mut() {
            self.give_back(Outcome::Ignored).ok(); // never a change of state
        }
    }
}

/// Why a permit is not taken back.
#[derive(Clone, Copy)]
pub(super) enum Misuse {
    Again,
    Elsewhere,
}

impl From<Misuse> for PyErr {
    fn from(misuse: Misuse) -> PyErr {
        ConfigurationError::new_err(match misuse {
            Misuse::Again => "the permit has been used; it is good for one call and one outcome",
            Misuse::Elsewhere => "the permit is of another circuit breaker; each takes back its own",
        })
    }
}

/// Lets calls through to something that fails, or spares it them.
#[pyclass(frozen, weakref, module = "cano", name = "CircuitBreaker")]
pub(super) struct PyBreaker {
    gate: Arc<Gate>,
    #[pyo3(get)]
    policy: Py<PyCircuitPolicy>,
    #[pyo3(get)]
    name: Option<String>,
    on_change: Option<Py<PyAny>>,
}

impl PyBreaker {
    /// Lets a call through, or refuses it with `CircuitOpenError`. It may call Python, as `settle` may: `on_change`.
    #[inline]
    pub(super) fn admit(slf: &Bound<'_, Self>) -> PyResult<Grant> {
        let permit = Self::ask(slf)?;
        Ok(Grant { gate: Arc::clone(&slf.get().gate), permit, is_used: AtomicBool::new(false) })
    }

    fn ask(slf: &Bound<'_, Self>) -> PyResult<Permit> {
        let this = slf.get();
        let mut breaker = this.gate.lock();
        let now = if breaker.needs_time() { now() } else { Moment::default() };
        match breaker.acquire(now) {
            Admission::Admitted { permit, change } => {
                drop(breaker);
                Self::announce(slf, change);
                Ok(permit)
            }
            Admission::Rejected { .. } => {
                let snapshot = breaker.snapshot(now);
                drop(breaker);
                Err(this.refusal(&snapshot))
            }
        }
    }

    /// Takes back what `admit` has granted.
    #[inline]
    pub(super) fn settle(slf: &Bound<'_, Self>, grant: &Grant, outcome: Outcome) -> Result<(), Misuse> {
        if !Arc::ptr_eq(&grant.gate, &slf.get().gate) {
            return Err(Misuse::Elsewhere);
        }
        let change = grant.give_back(outcome)?;
        Self::announce(slf, change);
        Ok(())
    }

    /// The error that a call would get at this moment; looking changes nothing.
    pub(super) fn rejection(&self) -> Option<PyErr> {
        let snapshot = self.gate.lock().snapshot(now());
        (snapshot.is_forced || snapshot.retry_after.is_some()).then(|| self.refusal(&snapshot))
    }

    fn refusal(&self, snapshot: &Snapshot) -> PyErr {
        let retry_after = snapshot.retry_after.map(Nanos::as_seconds);
        CircuitOpenError::new_err((
            format!("circuit breaker{}", self.describe(snapshot)),
            self.name.clone(),
            retry_after,
        ))
    }

    /// " payments is open; ..."
    fn describe(&self, snapshot: &Snapshot) -> String {
        let name = self.name.as_ref().map(|name| format!(" {name}")).unwrap_or_default();
        let how = match (snapshot.state, snapshot.retry_after.map(|wait| wait.as_seconds().max(0.001))) {
            (State::Closed, _) => "closed".to_owned(),
            (State::Open, _) if snapshot.is_forced => "forced open; only reset() closes it".to_owned(),
            (State::Open, Some(wait)) => format!("open; it lets a call through again in {wait:.3} s"),
            (State::Open, None) => "open; it lets the next call through".to_owned(),
            (State::HalfOpen, None) => "half-open; it lets the next call through".to_owned(),
            (State::HalfOpen, Some(wait)) => {
                format!("half-open, with all its probes in flight; it lets a call through in at most {wait:.3} s")
            }
        };
        format!("{name} is {how}")
    }

    #[inline]
    fn announce(slf: &Bound<'_, Self>, change: Option<Change>) {
        if let (Some(change), Some(on_change)) = (change, &slf.get().on_change) {
            Self::tell(slf, change, on_change.bind(slf.py()));
        }
    }

    fn tell(slf: &Bound<'_, Self>, Change { from, to }: Change, on_change: &Bound<'_, PyAny>) {
        let (from, to) = (circuit_state(slf.py(), from), circuit_state(slf.py(), to));
        let told = from.and_then(|from| on_change.call1((slf, from, to?)));
        if let Err(error) = told {
            error.write_unraisable(slf.py(), Some(on_change));
        }
    }

    #[inline]
    fn record(slf: &Bound<'_, Self>, permit: &Bound<'_, PyAny>, outcome: Outcome) -> PyResult<()> {
        let Ok(permit) = permit.cast::<PyPermit>() else {
            let wanted = "permit must be a Permit that try_acquire() has returned";
            return Err(ConfigurationError::new_err(format!("{wanted}, got {}", show(permit)?)));
        };
        Ok(Self::settle(slf, &permit.get().0, outcome)?)
    }
}

#[pymethods]
impl PyBreaker {
    #[new]
    #[pyo3(
        signature = (failure_threshold=None, reset_timeout=None, half_open_max_calls=None, *, name=None, on_change=None),
        text_signature = "(failure_threshold=5, reset_timeout=30.0, half_open_max_calls=1, *, name=None, on_change=None)"
    )]
    fn new(
        py: Python<'_>,
        failure_threshold: Given<'_, '_>,
        reset_timeout: Given<'_, '_>,
        half_open_max_calls: Given<'_, '_>,
        name: Given<'_, '_>,
        on_change: Option<Bound<'_, PyAny>>,
    ) -> PyResult<Self> {
        let policy = match failure_threshold.and_then(|given| given.cast::<PyCircuitPolicy>().ok()) {
            Some(_) if reset_timeout.is_some() || half_open_max_calls.is_some() => {
                let text = "reset_timeout and half_open_max_calls are the policy's: CircuitBreaker(CircuitPolicy(...))";
                return Err(ConfigurationError::new_err(text));
            }
            Some(policy) => policy.clone(),
            None => {
                let policy = PyCircuitPolicy::new(failure_threshold, reset_timeout, half_open_max_calls, None)?;
                Bound::new(py, policy)?
            }
        };
        Ok(Self {
            gate: Arc::new(Gate(Mutex::new(Breaker::new(policy.get().0)))),
            policy: policy.unbind(),
            name: name.map(checked_name).transpose()?,
            on_change: on_change.map(checked_callback).transpose()?,
        })
    }

    #[getter]
    fn state(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        let state = self.gate.lock().state();
        circuit_state(py, state)
    }

    fn try_acquire(slf: &Bound<'_, Self>) -> PyResult<PyPermit> {
        Ok(PyPermit(Self::admit(slf)?))
    }

    fn record_success(slf: &Bound<'_, Self>, permit: &Bound<'_, PyAny>) -> PyResult<()> {
        Self::record(slf, permit, Outcome::Success)
    }

    fn record_failure(slf: &Bound<'_, Self>, permit: &Bound<'_, PyAny>) -> PyResult<()> {
        Self::record(slf, permit, Outcome::Failure)
    }

    fn record_ignored(slf: &Bound<'_, Self>, permit: &Bound<'_, PyAny>) -> PyResult<()> {
        Self::record(slf, permit, Outcome::Ignored)
    }

    fn force_open(slf: &Bound<'_, Self>) {
        let change = slf.get().gate.lock().force_open();
        Self::announce(slf, change);
    }

    fn reset(slf: &Bound<'_, Self>) {
        let change = slf.get().gate.lock().reset();
        Self::announce(slf, change);
    }

    fn snapshot<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        static CLASS: PyOnceLock<Py<PyType>> = PyOnceLock::new();
        let Snapshot { state, is_forced, counts, probes, successes, retry_after, .. } =
            self.gate.lock().snapshot(now());
        let fields = PyDict::new(py);
        fields.set_item("state", circuit_state(py, state)?)?;
        fields.set_item("is_forced", is_forced)?;
        fields.set_item("calls", counts.calls)?;
        fields.set_item("failures", counts.failures)?;
        fields.set_item("slow_calls", counts.slow_calls)?;
        fields.set_item("probes", probes)?;
        fields.set_item("successes", successes)?;
        let wait = (!is_forced).then(|| retry_after.unwrap_or_default().as_seconds());
        fields.set_item("retry_after", wait)?;
        CLASS.import(py, "cano._breaker", "CircuitSnapshot")?.call((), Some(&fields))
    }

    fn __aenter__(slf: &Bound<'_, Self>) -> PyResult<Py<Done>> {
        let block = BEGINNING.take().and_then(|block| block.upgrade());
        let Some(block) = block.filter(|block| block.is_of(&slf.get().gate)) else {
            return Err(ConfigurationError::new_err(
                "a circuit breaker is entered by async with; to do it by hand, use try_acquire() and a permit",
            ));
        };
        let grant = Self::admit(slf)?;
        block.grant.get_or_init(|| grant);
        Done::get(slf.py())
    }

    #[classattr]
    #[pyo3(name = "__aexit__")]
    fn aexit() -> BlockEnd {
        BlockEnd { block: Arc::default(), breaker: None }
    }

    fn __repr__(&self) -> String {
        let snapshot = self.gate.lock().snapshot(now());
        format!("<CircuitBreaker{}>", self.describe(&snapshot))
    }

    /// A breaker never changes what it refers to, so that whatever closes a cycle through it can be cleared.
    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.on_change)
    }
}

/// The right to make one call.
#[pyclass(frozen, module = "cano", name = "Permit")]
pub(super) struct PyPermit(Grant);

#[pymethods]
impl PyPermit {
    fn __repr__(&self) -> &'static str {
        if self.0.is_used.load(Relaxed) { "<Permit, used>" } else { "<Permit, unused>" }
    }
}

/// What an `async with` block has of its own: a permit, once it has begun.
#[derive(Default)]
struct Block {
    /// The breaker that `__aexit__` was looked up on; none if it was looked up on the class.
    gate: Option<Arc<Gate>>,
    grant: OnceLock<Grant>,
}

impl Block {
    fn is_of(&self, gate: &Arc<Gate>) -> bool {
        self.gate.as_ref().is_none_or(|own| Arc::ptr_eq(own, gate))
    }
}

thread_local! {
    /// The block whose end was looked up last, until it begins.
    static BEGINNING: Cell<Option<Weak<Block>>> = const { Cell::new(None) };
}

/// `__aexit__`: as an attribute of the class, what makes the others; each of those, the end of one block.
#[pyclass(frozen, module = "cano._core")]
struct BlockEnd {
    block: Arc<Block>,
    breaker: Option<Py<PyBreaker>>,
}

#[pymethods]
impl BlockEnd {
    fn __get__<'py>(
        slf: &Bound<'py, Self>,
        breaker: Option<&Bound<'py, PyBreaker>>,
        _class: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, Self>> {
        let gate = breaker.map(|breaker| Arc::clone(&breaker.get().gate));
        let block = Arc::new(Block { gate, grant: OnceLock::new() });
        let beginning = Arc::downgrade(&block);
        let end = Bound::new(slf.py(), Self { block, breaker: breaker.map(|breaker| breaker.clone().unbind()) })?;
        BEGINNING.set(Some(beginning));
        Ok(end)
    }

    /// Takes the breaker first if it was looked up on the class, then the type of the exception, the exception, the traceback.
    #[pyo3(signature = (*args))]
    fn __call__(&self, py: Python<'_>, args: &Bound<'_, PyTuple>) -> PyResult<Py<Done>> {
        let (breaker, ended) = match &self.breaker {
            Some(breaker) => (breaker.bind(py).clone(), args.get_item(0)?),
            None => (args.get_item(0)?.cast_into::<PyBreaker>()?, args.get_item(1)?),
        };
        let outcome = if ended.is_none() {
            Outcome::Success
        } else if ended.cast::<PyType>()?.is_subclass_of::<PyException>()? {
            Outcome::Failure
        } else {
            Outcome::Ignored
        };
        let grant = self.block.grant.get().ok_or_else(|| {
            ConfigurationError::new_err("no async with block has begun that this __aexit__ could end")
        })?;
        PyBreaker::settle(&breaker, grant, outcome)?;
        Done::get(py)
    }

    /// As with the breaker, a cycle through it can be cleared elsewhere.
    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.breaker)
    }
}

/// An awaitable that is done.
#[pyclass(frozen, module = "cano._core")]
struct Done;

impl Done {
    fn get(py: Python<'_>) -> PyResult<Py<Self>> {
        static DONE: PyOnceLock<Py<Done>> = PyOnceLock::new();
        DONE.get_or_try_init(py, || Py::new(py, Self)).map(|done| done.clone_ref(py))
    }
}

#[pymethods]
impl Done {
    fn __await__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    fn __next__(_slf: &Bound<'_, Self>) -> Option<()> {
        None
    }
}

/// The member of `cano.CircuitState`.
fn circuit_state(py: Python<'_>, state: State) -> PyResult<Py<PyAny>> {
    static MEMBERS: PyOnceLock<[Py<PyAny>; 3]> = PyOnceLock::new();
    let [closed, open, half_open] = MEMBERS.get_or_try_init(py, || {
        let class = py.import("cano._breaker")?.getattr("CircuitState")?;
        let member = |name| class.getattr(name).map(Bound::unbind);
        Ok::<_, PyErr>([member("Closed")?, member("Open")?, member("HalfOpen")?])
    })?;
    let member = match state {
        State::Closed => closed,
        State::Open => open,
        State::HalfOpen => half_open,
    };
    Ok(member.clone_ref(py))
}

fn checked_name(name: &Bound<'_, PyAny>) -> PyResult<String> {
    check_text("name", name, LONGEST_NAME)?;
    name.extract()
}

fn checked_callback(on_change: Bound<'_, PyAny>) -> PyResult<Py<PyAny>> {
    let wanted = "on_change must be a function of (breaker, old, new)";
    if !on_change.is_callable() {
        return Err(ConfigurationError::new_err(format!("{wanted}, got {}", show(&on_change)?)));
    }
    let inspect = on_change.py().import("inspect")?;
    if inspect.call_method1("iscoroutinefunction", (&on_change,))?.is_truthy()? {
        return Err(ConfigurationError::new_err(format!("{wanted} that is not async, got {}", show(&on_change)?)));
    }
    Ok(on_change.unbind())
}
