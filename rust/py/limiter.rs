//! The rate limiters: a bucket, a window, and several of them at once.
//!
//! A call that is granted at once costs one lock and the core's decision, and makes no Python object. One that has to wait
//! is a coroutine of `_limiter.py`, which asks `line.rs` whose turn it is.

use std::sync::{Mutex, MutexGuard, PoisonError};

use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyDict, PyString};
use pyo3::{PyTraverseError, PyVisit};

use crate::core::limiter::{Charge, time_until};
use crate::core::time::Nanos;

use super::convert::{cost, text};
use super::errors::{ConfigurationError, UnknownTierError, show};
use super::limiter_policy::{LimiterSnapshot, PyRateLimiterPolicy, PyWindowPolicy};
use super::line::{Call, PyLimiter, WaitingCall, locked};
use super::now::now;

const NAME_LIMIT: usize = 128;

/// The coroutine that takes a charge of a limiter, waiting if it has to.
fn waiting<'py>(limiter: &Bound<'py, PyAny>, charge: impl IntoPyObject<'py>) -> PyResult<Bound<'py, PyAny>> {
    static ACQUIRE: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    let py = limiter.py();
    let acquire = ACQUIRE.get_or_try_init(py, || py.import("cano._limiter")?.getattr("acquire").map(Bound::unbind))?;
    acquire.bind(py).call1((limiter, charge))
}

/// Seconds, infinity for never.
fn seconds(wait: Option<Nanos>) -> f64 {
    wait.map_or(f64::INFINITY, Nanos::as_seconds)
}

fn wrong_type(name: &str, wanted: &str, value: &Bound<'_, PyAny>) -> PyErr {
    match show(value) {
        Ok(shown) => ConfigurationError::new_err(format!("{name} must be {wanted}, got {shown}")),
        Err(error) => error,
    }
}

#[pymethods]
impl PyLimiter {
    #[getter]
    fn name(&self) -> Option<&str> {
        self.name.as_deref()
    }

    #[pyo3(signature = (cost=1))]
    fn try_acquire(slf: &Bound<'_, Self>, #[pyo3(from_py_with = cost)] cost: u64) -> PyResult<()> {
        if slf.get().try_now(cost).is_ok() {
            return Ok(());
        }
        Call::single(slf, cost).try_acquire(slf.py())
    }

    #[pyo3(signature = (cost=1))]
    fn acquire<'py>(slf: &Bound<'py, Self>, #[pyo3(from_py_with = cost)] cost: u64) -> PyResult<Bound<'py, PyAny>> {
        waiting(slf, cost)
    }

    /// Takes a cost now (None), or stands in line for it.
    fn _enter(slf: &Bound<'_, Self>, cost: u64) -> PyResult<Option<Py<WaitingCall>>> {
        if slf.get().try_now(cost).is_ok() {
            return Ok(None);
        }
        Call::single(slf, cost).enter(slf.py())
    }

    #[pyo3(signature = (cost=1))]
    fn time_until(&self, #[pyo3(from_py_with = cost)] cost: u64) -> f64 {
        seconds(self.lock().limiter.time_until(now(), cost))
    }

    fn snapshot(&self) -> LimiterSnapshot {
        let shared = self.lock();
        let now = now();
        LimiterSnapshot::new(shared.limiter.snapshot(now), now)
    }

    fn __repr__(slf: &Bound<'_, Self>) -> PyResult<String> {
        let (class, this) = (slf.get_type().name()?, slf.get());
        let name = this.name().map_or(String::new(), |name| format!(" '{name}'"));
        Ok(format!("<{class}{name}: {}>", this.snapshot().summary()))
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        self.traverse(&visit)
    }

    fn __clear__(&self) {
        self.clear();
    }
}

/// A token bucket.
#[pyclass(frozen, extends = PyLimiter, module = "cano", name = "RateLimiter")]
pub(super) struct PyRateLimiter {
    #[pyo3(get)]
    policy: PyRateLimiterPolicy,
}

#[pymethods]
impl PyRateLimiter {
    #[new]
    #[pyo3(signature = (policy, *, name=None))]
    fn new(policy: &Bound<'_, PyAny>, name: Option<&Bound<'_, PyAny>>) -> PyResult<PyClassInitializer<Self>> {
        let Ok(given) = policy.cast::<PyRateLimiterPolicy>() else {
            return Err(wrong_type("policy", "a RateLimiterPolicy", policy));
        };
        let name = name.map(|name| text("name", name, NAME_LIMIT)).transpose()?;
        let policy = *given.get();
        Ok(PyClassInitializer::from(PyLimiter::of(policy.rule(), name)).add_subclass(Self { policy }))
    }
}

/// Fixed windows, end to end from the first grant on.
#[pyclass(frozen, extends = PyLimiter, module = "cano", name = "WindowedRateLimiter")]
pub(super) struct PyWindowedRateLimiter {
    #[pyo3(get)]
    policy: PyWindowPolicy,
}

#[pymethods]
impl PyWindowedRateLimiter {
    #[new]
    #[pyo3(signature = (policy, *, name=None))]
    fn new(policy: &Bound<'_, PyAny>, name: Option<&Bound<'_, PyAny>>) -> PyResult<PyClassInitializer<Self>> {
        let Ok(given) = policy.cast::<PyWindowPolicy>() else {
            return Err(wrong_type("policy", "a WindowPolicy", policy));
        };
        let name = name.map(|name| text("name", name, NAME_LIMIT)).transpose()?;
        let policy = *given.get();
        Ok(PyClassInitializer::from(PyLimiter::of(policy.rule(), name)).add_subclass(Self { policy }))
    }
}

/// Several limiters at once: all grant, or none.
#[pyclass(frozen, weakref, module = "cano", name = "MultiRateLimiter")]
pub(super) struct PyMultiRateLimiter {
    /// A call of all tiers. Its lock comes before those of the limiters.
    tiers: Mutex<Call>,
}

impl PyMultiRateLimiter {
    fn lock(&self) -> MutexGuard<'_, Call> {
        self.tiers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the cost of every tier now, if that can be.
    fn try_now(&self) -> bool {
        self.lock().try_now().is_ok()
    }

    /// A call of the tiers that are named; of all where None are.
    fn call(&self, py: Python<'_>, tiers: Option<&Bound<'_, PyAny>>) -> PyResult<Call> {
        let Some(tiers) = tiers else { return Ok(self.lock().only(py, |_| true)) };
        let refused = || wrong_type("tiers", "an iterable of tier names", tiers);
        if tiers.is_instance_of::<PyString>() {
            return Err(refused());
        }
        let given = tiers
            .try_iter()
            .map_err(|error| if error.is_instance_of::<PyTypeError>(py) { refused() } else { error })?;
        let chosen = given.map(|name| self.tier(&name?)).collect::<PyResult<Vec<_>>>()?;
        Ok(self.lock().only(py, |tier| chosen.contains(&tier)))
    }

    /// Which tier has the name.
    fn tier(&self, name: &Bound<'_, PyAny>) -> PyResult<usize> {
        let text: Option<String> = name.extract().ok();
        let known = |text: &str| self.lock().names.iter().flatten().position(|known| **known == *text);
        match text.and_then(|text| known(text.as_str())) {
            Some(tier) => Ok(tier),
            None => Err(UnknownTierError::new_err(format!("no tier {} among {}", show(name)?, self.names()))),
        }
    }

    /// "the tiers 'api', 'day'"
    fn names(&self) -> String {
        let tiers = self.lock();
        let names: Vec<String> = tiers.names.iter().flatten().map(|name| format!("'{name}'")).collect();
        if names.is_empty() { "no tiers".to_owned() } else { format!("the tiers {}", names.join(", ")) }
    }
}

#[pymethods]
impl PyMultiRateLimiter {
    #[new]
    fn new() -> Self {
        Self { tiers: Mutex::new(Call { limiters: Vec::new(), charges: Vec::new(), names: Vec::new() }) }
    }

    #[pyo3(signature = (name, limiter, cost=1))]
    fn with_tier<'py>(
        slf: &Bound<'py, Self>,
        name: &Bound<'py, PyAny>,
        limiter: &Bound<'py, PyAny>,
        #[pyo3(from_py_with = cost)] cost: u64,
    ) -> PyResult<Bound<'py, Self>> {
        let name = text("name", name, NAME_LIMIT)?;
        let Ok(limiter) = limiter.cast::<PyLimiter>() else {
            return Err(wrong_type("limiter", "a RateLimiter or a WindowedRateLimiter", limiter));
        };
        let mut tiers = slf.get().lock();
        if tiers.names.iter().flatten().any(|known| **known == name) {
            return Err(ConfigurationError::new_err(format!("name must be one that no tier has yet, got '{name}'")));
        }
        tiers.add(name.into(), limiter, cost);
        Ok(slf.clone())
    }

    #[pyo3(signature = (tiers=None))]
    fn try_acquire(&self, py: Python<'_>, tiers: Option<&Bound<'_, PyAny>>) -> PyResult<()> {
        if tiers.is_none() && self.try_now() {
            return Ok(());
        }
        self.call(py, tiers)?.try_acquire(py)
    }

    #[pyo3(signature = (tiers=None))]
    fn acquire<'py>(slf: &Bound<'py, Self>, tiers: Option<Bound<'py, PyAny>>) -> PyResult<Bound<'py, PyAny>> {
        waiting(slf, tiers)
    }

    /// Takes the costs now (None), or stands in line for them.
    fn _enter(&self, py: Python<'_>, tiers: Option<&Bound<'_, PyAny>>) -> PyResult<Option<Py<WaitingCall>>> {
        if tiers.is_none() && self.try_now() {
            return Ok(None);
        }
        self.call(py, tiers)?.enter(py)
    }

    #[pyo3(signature = (tiers=None))]
    fn time_until(&self, py: Python<'_>, tiers: Option<&Bound<'_, PyAny>>) -> PyResult<f64> {
        let call = self.call(py, tiers)?;
        Ok(seconds(locked(&call.limiters, |now, limiters, _| time_until(now, limiters, &call.charges))))
    }

    /// Every tier's limiter at the same moment.
    fn snapshot<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let call = self.call(py, None)?;
        let seen: Vec<LimiterSnapshot> = locked(&call.limiters, |now, limiters, _| {
            let of = |charge: &Charge| LimiterSnapshot::new(limiters[charge.limiter].snapshot(now), now);
            call.charges.iter().map(of).collect()
        });
        let snapshots = PyDict::new(py);
        for (name, seen) in call.names.iter().zip(seen) {
            snapshots.set_item(name.as_deref(), Py::new(py, seen)?)?;
        }
        Ok(snapshots)
    }

    fn __repr__(&self) -> String {
        format!("<MultiRateLimiter with {}>", self.names())
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        // Never locked here: a lock is not held where the collector can come.
        let Ok(tiers) = self.tiers.try_lock() else { return Ok(()) };
        tiers.limiters.iter().try_for_each(|limiter| visit.call(limiter))
    }
}

/// Any of the three, as a task's configuration takes them.
pub(super) enum AnyLimiter {
    Single(Py<PyLimiter>),
    Multi(Py<PyMultiRateLimiter>),
}

impl AnyLimiter {
    pub(super) fn of(name: &str, value: &Bound<'_, PyAny>) -> PyResult<Self> {
        if let Ok(limiter) = value.cast::<PyLimiter>() {
            return Ok(Self::Single(limiter.clone().unbind()));
        }
        match value.cast::<PyMultiRateLimiter>() {
            Ok(limiter) => Ok(Self::Multi(limiter.clone().unbind())),
            Err(_) => Err(wrong_type(name, "a RateLimiter, a WindowedRateLimiter or a MultiRateLimiter", value)),
        }
    }

    /// Takes a cost of 1, or that of each tier, if that can be now; no Python runs.
    pub(super) fn try_now(&self) -> bool {
        match self {
            Self::Single(limiter) => limiter.get().try_now(1).is_ok(),
            Self::Multi(limiter) => limiter.get().try_now(),
        }
    }

    /// The coroutine that takes the same, waiting if it has to.
    pub(super) fn acquire<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        match self {
            Self::Single(limiter) => waiting(limiter.bind(py), 1),
            Self::Multi(limiter) => waiting(limiter.bind(py), py.None()),
        }
    }

    pub(super) fn traverse(&self, visit: &PyVisit<'_>) -> Result<(), PyTraverseError> {
        match self {
            Self::Single(limiter) => visit.call(limiter),
            Self::Multi(limiter) => visit.call(limiter),
        }
    }
}
