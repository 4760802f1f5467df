//! What a limiter is made from, and what can be seen of it: plain values.

use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::core::limiter::{LimiterPolicy, Snapshot};
use crate::core::time::{Moment, Nanos};

use super::convert::{count, duration};

const SECOND: f64 = 1.0;
const MINUTE: f64 = 60.0;
const HOUR: f64 = 3_600.0;
const DAY: f64 = 86_400.0;

/// Positional arguments and keywords of a constructor, for copies and pickles.
type Arguments<'py, T> = (T, Bound<'py, PyDict>);

/// A token bucket: how many tokens come back in which time, and how many it holds.
#[pyclass(frozen, eq, hash, skip_from_py_object, module = "cano", name = "RateLimiterPolicy")]
#[derive(Clone, Copy, PartialEq, Hash)]
pub(super) struct PyRateLimiterPolicy {
    tokens: u64,
    period: Nanos,
    max_tokens: u64,
    burst: u64,
}

impl PyRateLimiterPolicy {
    fn of(
        tokens: &Bound<'_, PyAny>,
        period: Nanos,
        max_tokens: Option<&Bound<'_, PyAny>>,
        burst: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Self> {
        let tokens = count("tokens", tokens)?;
        let max_tokens = max_tokens.map_or(Ok(tokens), |value| count("max_tokens", value))?;
        let burst = burst.map_or(Ok(0), |value| count("burst", value))?;
        LimiterPolicy::bucket(tokens, period, max_tokens, burst)?;
        Ok(Self { tokens: tokens as u64, period, max_tokens: max_tokens as u64, burst: burst as u64 })
    }

    fn per(
        tokens: &Bound<'_, PyAny>,
        seconds: f64,
        max_tokens: Option<&Bound<'_, PyAny>>,
        burst: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Self> {
        Self::of(tokens, Nanos::from_seconds("period", seconds)?, max_tokens, burst)
    }

    pub(super) fn rule(&self) -> LimiterPolicy {
        LimiterPolicy::Bucket { tokens: self.tokens, period: self.period, capacity: self.capacity() }
    }
}

#[pymethods]
impl PyRateLimiterPolicy {
    #[new]
    #[pyo3(
        signature = (tokens, period, *, max_tokens=None, burst=None),
        text_signature = "(tokens, period, *, max_tokens=None, burst=0)"
    )]
    fn new(
        tokens: &Bound<'_, PyAny>,
        period: &Bound<'_, PyAny>,
        max_tokens: Option<&Bound<'_, PyAny>>,
        burst: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Self> {
        Self::of(tokens, duration("period", period)?, max_tokens, burst)
    }

    #[staticmethod]
    #[pyo3(
        signature = (tokens, *, max_tokens=None, burst=None),
        text_signature = "(tokens, *, max_tokens=None, burst=0)"
    )]
    fn per_second(
        tokens: &Bound<'_, PyAny>,
        max_tokens: Option<&Bound<'_, PyAny>>,
        burst: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Self> {
        Self::per(tokens, SECOND, max_tokens, burst)
    }

    #[staticmethod]
    #[pyo3(
        signature = (tokens, *, max_tokens=None, burst=None),
        text_signature = "(tokens, *, max_tokens=None, burst=0)"
    )]
    fn per_minute(
        tokens: &Bound<'_, PyAny>,
        max_tokens: Option<&Bound<'_, PyAny>>,
        burst: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Self> {
        Self::per(tokens, MINUTE, max_tokens, burst)
    }

    #[staticmethod]
    #[pyo3(
        signature = (tokens, *, max_tokens=None, burst=None),
        text_signature = "(tokens, *, max_tokens=None, burst=0)"
    )]
    fn per_hour(
        tokens: &Bound<'_, PyAny>,
        max_tokens: Option<&Bound<'_, PyAny>>,
        burst: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Self> {
        Self::per(tokens, HOUR, max_tokens, burst)
    }

    #[getter]
    fn tokens(&self) -> u64 {
        self.tokens
    }

    #[getter]
    fn period(&self) -> f64 {
        self.period.as_seconds()
    }

    #[getter]
    fn max_tokens(&self) -> u64 {
        self.max_tokens
    }

    #[getter]
    fn burst(&self) -> u64 {
        self.burst
    }

    #[getter]
    fn capacity(&self) -> u64 {
        self.max_tokens + self.burst
    }

    fn __repr__(&self) -> String {
        format!(
            "RateLimiterPolicy({}, {:?}, max_tokens={}, burst={})",
            self.tokens,
            self.period(),
            self.max_tokens,
            self.burst
        )
    }

    fn __getnewargs_ex__<'py>(&self, py: Python<'py>) -> PyResult<Arguments<'py, (u64, f64)>> {
        let options = PyDict::new(py);
        options.set_item("max_tokens", self.max_tokens)?;
        options.set_item("burst", self.burst)?;
        Ok(((self.tokens, self.period()), options))
    }
}

/// Fixed windows: how much fits into each, and how long one is.
#[pyclass(frozen, eq, hash, skip_from_py_object, module = "cano", name = "WindowPolicy")]
#[derive(Clone, Copy, PartialEq, Hash)]
pub(super) struct PyWindowPolicy {
    limit: u64,
    width: Nanos,
}

impl PyWindowPolicy {
    fn of(limit: &Bound<'_, PyAny>, width: Nanos) -> PyResult<Self> {
        let limit = count("limit", limit)?;
        LimiterPolicy::window(limit, width)?;
        Ok(Self { limit: limit as u64, width })
    }

    fn per(limit: &Bound<'_, PyAny>, seconds: f64) -> PyResult<Self> {
        Self::of(limit, Nanos::from_seconds("seconds", seconds)?)
    }

    pub(super) fn rule(&self) -> LimiterPolicy {
        LimiterPolicy::Window { limit: self.limit, width: self.width }
    }
}

#[pymethods]
impl PyWindowPolicy {
    #[new]
    fn new(limit: &Bound<'_, PyAny>, seconds: &Bound<'_, PyAny>) -> PyResult<Self> {
        Self::of(limit, duration("seconds", seconds)?)
    }

    #[staticmethod]
    fn per_second(limit: &Bound<'_, PyAny>) -> PyResult<Self> {
        Self::per(limit, SECOND)
    }

    #[staticmethod]
    fn per_minute(limit: &Bound<'_, PyAny>) -> PyResult<Self> {
        Self::per(limit, MINUTE)
    }

    #[staticmethod]
    fn per_hour(limit: &Bound<'_, PyAny>) -> PyResult<Self> {
        Self::per(limit, HOUR)
    }

    #[staticmethod]
    fn per_day(limit: &Bound<'_, PyAny>) -> PyResult<Self> {
        Self::per(limit, DAY)
    }

    #[getter]
    fn limit(&self) -> u64 {
        self.limit
    }

    #[getter]
    fn seconds(&self) -> f64 {
        self.width.as_seconds()
    }

    fn __repr__(&self) -> String {
        format!("WindowPolicy({}, {:?})", self.limit, self.seconds())
    }

    fn __getnewargs__(&self) -> (u64, f64) {
        (self.limit, self.seconds())
    }
}

/// A limiter as it was at one moment.
#[pyclass(frozen, eq, get_all, module = "cano")]
#[derive(PartialEq)]
pub(super) struct LimiterSnapshot {
    capacity: u64,
    available: u64,
    used: u64,
    available_in: f64,
    resets_in: Option<f64>,
    waiting: usize,
}

impl LimiterSnapshot {
    pub(super) fn new(seen: Snapshot, now: Moment) -> Self {
        Self {
            capacity: seen.capacity,
            available: seen.available,
            used: seen.capacity - seen.available,
            available_in: seen.available_in.as_seconds(),
            resets_in: seen.resets_at.map(|at| at.since(now).as_seconds()),
            waiting: seen.waiting,
        }
    }

    /// "7 of 10 available, 0 waiting"
    pub(super) fn summary(&self) -> String {
        format!("{} of {} available, {} waiting", self.available, self.capacity, self.waiting)
    }
}

#[pymethods]
impl LimiterSnapshot {
    fn __repr__(&self) -> String {
        format!("<LimiterSnapshot: {}>", self.summary())
    }
}
