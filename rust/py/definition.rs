//! What a definition is made of: retry modes, join strategies, and the prepared form of a task.

use pyo3::exceptions::{PyBaseException, PyTypeError};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyDict, PyString, PyTuple, PyType};
use pyo3::{PyTraverseError, PyVisit};

use crate::core::join::JoinStrategy;
use crate::core::retry::{RetryMode, RetryVerdict};
use crate::core::time::Nanos;

use super::asyncio::Asyncio;
use super::breaker::PyBreaker;
use super::convert::{count, duration, number};
use super::errors::{NonRetryable, RetryAfter};
use super::limiter::AnyLimiter;

/// How often a failed attempt is repeated, and after which delay.
#[pyclass(frozen, eq, module = "cano", name = "RetryMode")]
#[derive(PartialEq)]
pub(super) struct PyRetryMode(RetryMode);

#[pymethods]
impl PyRetryMode {
    #[staticmethod]
    fn none() -> Self {
        Self(RetryMode::None)
    }

    #[staticmethod]
    fn fixed(retries: &Bound<'_, PyAny>, delay: &Bound<'_, PyAny>) -> PyResult<Self> {
        let delay = duration("delay", delay)?;
        Ok(Self(RetryMode::fixed(count("retries", retries)?, delay)?))
    }

    #[staticmethod]
    #[pyo3(
        signature = (retries=None, base=None, *, factor=None, max_delay=None, jitter=None),
        text_signature = "(retries=3, base=0.1, *, factor=2.0, max_delay=30.0, jitter=0.1)"
    )]
    fn exponential(
        retries: Option<&Bound<'_, PyAny>>,
        base: Option<&Bound<'_, PyAny>>,
        factor: Option<&Bound<'_, PyAny>>,
        max_delay: Option<&Bound<'_, PyAny>>,
        jitter: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Self> {
        let or = |given: Option<&Bound<'_, PyAny>>, name: &str, seconds: f64| {
            given.map_or_else(|| Ok(Nanos::from_seconds(name, seconds)?), |value| duration(name, value))
        };
        Ok(Self(RetryMode::exponential(
            retries.map_or(Ok(3), |value| count("retries", value))?,
            or(base, "base", 0.1)?,
            factor.map_or(Ok(2.0), |value| number("factor", value))?,
            or(max_delay, "max_delay", 30.0)?,
            jitter.map_or(Ok(0.1), |value| number("jitter", value))?,
        )?))
    }

    fn __repr__(&self) -> String {
        match self.0 {
            RetryMode::None => "RetryMode.none()".to_owned(),
            RetryMode::Fixed { retries, delay } => {
                format!("RetryMode.fixed({retries}, {:?})", delay.as_seconds())
            }
            RetryMode::Exponential { retries, base, factor, max_delay, jitter } => format!(
                "RetryMode.exponential({retries}, {:?}, factor={factor:?}, max_delay={:?}, jitter={jitter:?})",
                base.as_seconds(),
                max_delay.as_seconds()
            ),
        }
    }

    fn __hash__(&self, py: Python<'_>) -> PyResult<isize> {
        PyString::new(py, &self.__repr__()).hash()
    }

    /// Its constructor, for copies and pickles.
    fn __reduce__<'py>(slf: &Bound<'py, Self>) -> PyResult<Rebuilt<'py>> {
        let (py, class) = (slf.py(), slf.get_type());
        let caller = py.import("operator")?.getattr("methodcaller")?;
        let call = match slf.get().0 {
            RetryMode::None => caller.call1(("none",))?,
            RetryMode::Fixed { retries, delay } => caller.call1(("fixed", retries, delay.as_seconds()))?,
            RetryMode::Exponential { retries, base, factor, max_delay, jitter } => {
                let options = PyDict::new(py);
                options.set_item("factor", factor)?;
                options.set_item("max_delay", max_delay.as_seconds())?;
                options.set_item("jitter", jitter)?;
                caller.call(("exponential", retries, base.as_seconds()), Some(&options))?
            }
        };
        Ok((call, (class,)))
    }
}

/// A function and its arguments, as `__reduce__` gives them.
pub(super) type Rebuilt<'py> = (Bound<'py, PyAny>, (Bound<'py, PyType>,));

/// When a split may go on.
#[pyclass(frozen, eq, module = "cano", name = "JoinStrategy")]
#[derive(PartialEq)]
pub(super) struct PyJoinStrategy(pub(super) JoinStrategy);

#[pymethods]
impl PyJoinStrategy {
    #[classattr]
    #[pyo3(name = "All")]
    fn all() -> Self {
        Self(JoinStrategy::All)
    }

    #[classattr]
    #[pyo3(name = "Any")]
    fn any() -> Self {
        Self(JoinStrategy::Any)
    }

    #[classattr]
    #[pyo3(name = "PartialTimeout")]
    fn partial_timeout() -> Self {
        Self(JoinStrategy::PartialTimeout)
    }

    #[staticmethod]
    #[pyo3(name = "Quorum")]
    fn quorum(n: &Bound<'_, PyAny>) -> PyResult<Self> {
        Ok(Self(JoinStrategy::quorum(count("n", n)?)?))
    }

    #[staticmethod]
    #[pyo3(name = "Percentage")]
    fn percentage(p: &Bound<'_, PyAny>) -> PyResult<Self> {
        Ok(Self(JoinStrategy::percentage(number("p", p)?)?))
    }

    #[staticmethod]
    #[pyo3(name = "PartialResults")]
    fn partial_results(n: &Bound<'_, PyAny>) -> PyResult<Self> {
        Ok(Self(JoinStrategy::partial_results(count("n", n)?)?))
    }

    fn __repr__(&self) -> String {
        format!("JoinStrategy.{}", self.0)
    }

    fn __hash__(&self, py: Python<'_>) -> PyResult<isize> {
        PyString::new(py, &self.__repr__()).hash()
    }

    /// Its constructor or constant, for copies and pickles.
    fn __reduce__<'py>(slf: &Bound<'py, Self>) -> PyResult<Rebuilt<'py>> {
        let operator = slf.py().import("operator")?;
        let get = match slf.get().0 {
            JoinStrategy::Quorum(n) => operator.call_method1("methodcaller", ("Quorum", n))?,
            JoinStrategy::PartialResults(n) => operator.call_method1("methodcaller", ("PartialResults", n))?,
            JoinStrategy::Percentage(p) => operator.call_method1("methodcaller", ("Percentage", p))?,
            constant @ (JoinStrategy::All | JoinStrategy::Any | JoinStrategy::PartialTimeout) => {
                operator.call_method1("attrgetter", (constant.to_string(),))?
            }
        };
        Ok((get, (slf.get_type(),)))
    }
}

/// A `TaskConfig` as the driver reads it.
#[pyclass(frozen, module = "cano._core")]
pub(super) struct Policy {
    pub(super) retry: RetryMode,
    /// Exception types that are worth another attempt, or a predicate.
    retry_on: Py<PyAny>,
    /// Those of `retry_on` that overrule `never`; None where `retry_on` is a predicate, which decides alone.
    explicit: Option<Py<PyTuple>>,
    /// Programming errors and our own shape errors.
    never: Py<PyTuple>,
    pub(super) attempt_timeout: Option<f64>,
    pub(super) breaker: Option<Py<PyBreaker>>,
    pub(super) limiter: Option<AnyLimiter>,
}

#[pymethods]
impl Policy {
    #[new]
    fn new(
        retry: &Bound<'_, PyRetryMode>,
        retry_on: Py<PyAny>,
        explicit: Option<Py<PyTuple>>,
        never: Py<PyTuple>,
        attempt_timeout: Option<f64>,
        breaker: Option<Py<PyBreaker>>,
        limiter: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Self> {
        let limiter = limiter.map(|limiter| AnyLimiter::of("rate_limiter", limiter)).transpose()?;
        Ok(Self { retry: retry.get().0, retry_on, explicit, never, attempt_timeout, breaker, limiter })
    }

    /// Seconds to wait after this failure, the k-th in a row; None if it is to leave.
    fn pause(&self, error: &Bound<'_, PyBaseException>, failures: u32) -> PyResult<Option<f64>> {
        let py = error.py();
        if !self.is_retryable(py, error)? {
            return Ok(None);
        }
        match self.retry.after_failure(failures, asked_delay(error)?, Asyncio::of(py)?.dice(py)?) {
            RetryVerdict::Retry(delay) => Ok(Some(delay.as_seconds())),
            RetryVerdict::Exhausted | RetryVerdict::NotConfigured => Ok(None),
        }
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.retry_on)?;
        visit.call(&self.explicit)?;
        visit.call(&self.breaker)?;
        if let Some(limiter) = &self.limiter {
            limiter.traverse(&visit)?;
        }
        visit.call(&self.never)
    }
}

impl Policy {
    /// Whether this failure is worth another attempt; raises what a predicate raises.
    pub(super) fn is_retryable(&self, py: Python<'_>, error: &Bound<'_, PyBaseException>) -> PyResult<bool> {
        // What the task itself asks for counts more than the policy's opinion of its exceptions.
        if error.is_instance_of::<NonRetryable>() || error.is_instance_of::<RetryAfter>() {
            return Ok(error.is_instance_of::<RetryAfter>());
        }
        let Some(explicit) = &self.explicit else {
            return self.retry_on.bind(py).call1((error,))?.is_truthy();
        };
        Ok(error.is_instance(self.retry_on.bind(py))?
            && (!error.is_instance(self.never.bind(py))? || error.is_instance(explicit.bind(py))?))
    }
}

/// The delay that a task asks for before its next attempt.
pub(super) fn asked_delay(error: &Bound<'_, PyBaseException>) -> PyResult<Option<Nanos>> {
    if !error.is_instance_of::<RetryAfter>() {
        return Ok(None);
    }
    duration("delay", &error.getattr(intern!(error.py(), "delay"))?).map(Some)
}

/// Where one argument of a task comes from.
pub(super) enum Source {
    /// What the step before left; None in the first step.
    Cursor,
    Resources,
    Resource {
        key: Py<PyAny>,
        class: Py<PyAny>,
    },
    Context,
    /// The run itself, for the tasks that cano writes around what a user's class has.
    Run,
    Joined {
        optional: bool,
    },
    Caught {
        classes: Py<PyTuple>,
        optional: bool,
    },
    /// The run's own data, an instance of this class.
    Data(Py<PyType>),
}

/// How a function wants to be called, read once from its signature, and the states its annotation declares.
#[pyclass(frozen, module = "cano._core")]
pub(super) struct Plan {
    pub(super) sources: Box<[Source]>,
    /// Names of the last arguments, where they are passed by keyword.
    keywords: Option<Py<PyTuple>>,
    pub(super) declared: Option<Py<PyTuple>>,
    /// Whether calling it does nothing but make a coroutine.
    is_coroutine_function: bool,
}

#[pymethods]
impl Plan {
    #[new]
    fn new(
        py: Python<'_>,
        sources: Vec<(String, Py<PyAny>, Py<PyAny>)>,
        keywords: Option<Py<PyTuple>>,
        declared: Option<Py<PyTuple>>,
        is_coroutine_function: bool,
    ) -> PyResult<Self> {
        let sources = sources
            .into_iter()
            .map(|(kind, key, class)| match kind.as_str() {
                "cursor" => Ok(Source::Cursor),
                "data" => Ok(Source::Data(key.extract(py)?)),
                "resources" => Ok(Source::Resources),
                "resource" => Ok(Source::Resource { key, class }),
                "context" => Ok(Source::Context),
                "run" => Ok(Source::Run),
                "joined" => Ok(Source::Joined { optional: false }),
                "joined or none" => Ok(Source::Joined { optional: true }),
                "caught" => Ok(Source::Caught { classes: key.extract(py)?, optional: false }),
                "caught or none" => Ok(Source::Caught { classes: key.extract(py)?, optional: true }),
                other => Err(PyTypeError::new_err(format!("no such argument source: {other}"))),
            })
            .collect::<PyResult<_>>()?;
        Ok(Self { sources, keywords, declared, is_coroutine_function })
    }

    /// Whether a parameter asks for the `SplitResult`, and cannot do without it.
    #[getter]
    pub(super) fn needs_joined(&self) -> bool {
        self.sources.iter().any(|source| matches!(source, Source::Joined { optional: false }))
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        for source in &self.sources {
            match source {
                Source::Resource { key, class } => {
                    visit.call(key)?;
                    visit.call(class)?;
                }
                Source::Caught { classes, .. } => visit.call(classes)?,
                Source::Data(class) => visit.call(class)?,
                Source::Resources | Source::Context | Source::Cursor | Source::Run | Source::Joined { .. } => {}
            }
        }
        visit.call(&self.keywords)?;
        visit.call(&self.declared)
    }
}

impl Plan {
    /// Whether a parameter asks for the error that led into the state, and cannot do without it.
    pub(super) fn needs_caught(&self) -> bool {
        self.sources.iter().any(|source| matches!(source, Source::Caught { optional: false, .. }))
    }

    pub(super) fn wants_context(&self) -> bool {
        self.sources.iter().any(|source| matches!(source, Source::Context | Source::Run))
    }

    /// The classes of run data that parameters ask for.
    pub(super) fn data(&self) -> impl Iterator<Item = &Py<PyType>> {
        self.sources.iter().filter_map(|source| match source {
            Source::Data(class) => Some(class),
            _ => None,
        })
    }

    /// Whether a parameter asks for what led into the state, be it there or not.
    pub(super) fn wants_handed(&self) -> bool {
        self.sources.iter().any(|source| matches!(source, Source::Joined { .. } | Source::Caught { .. }))
    }

    fn wants_run(&self) -> bool {
        self.sources.iter().any(|source| matches!(source, Source::Run))
    }
}

/// A task, ready to be called: the bound callable with its plan, name and policy, and the processing model if it has one.
#[pyclass(frozen, module = "cano._core")]
pub(super) struct TaskSpec {
    call: Py<PyAny>,
    pub(super) name: Py<PyString>,
    pub(super) plan: Py<Plan>,
    pub(super) policy: Option<Py<Policy>>,
    pub(super) model: Option<Py<PyString>>,
    /// Whether each attempt is one step of several.
    pub(super) has_steps: bool,
    is_router: bool,
    /// The annotation of its cursor, if it has one.
    cursor: Option<Py<PyAny>>,
    pub(super) compensation: Option<Py<Compensation>>,
}

/// How a compensatable task is undone.
#[pyclass(frozen, module = "cano._core")]
pub(super) struct Compensation {
    /// Called with the output first.
    pub(super) task: Py<TaskSpec>,
    /// The annotation of the output.
    pub(super) output_type: Py<PyAny>,
    /// Whether the task is undone even if it began and did not end well.
    register_before: bool,
}

#[pymethods]
impl Compensation {
    #[new]
    fn new(task: Py<TaskSpec>, output_type: Py<PyAny>, register_before: bool) -> Self {
        Self { task, output_type, register_before }
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.task)?;
        visit.call(&self.output_type)
    }
}

#[pymethods]
impl TaskSpec {
    #[new]
    #[pyo3(signature = (call, name, plan, policy, model=None, cursor=None, compensation=None))]
    #[allow(clippy::too_many_arguments, reason = "the fields, as a record has them")]
    fn new(
        py: Python<'_>,
        call: Py<PyAny>,
        name: Py<PyString>,
        plan: Py<Plan>,
        policy: Option<Py<Policy>>,
        model: Option<Py<PyString>>,
        cursor: Option<Py<PyAny>>,
        compensation: Option<Py<Compensation>>,
    ) -> Self {
        let has_steps = plan.get().sources.iter().any(|source| matches!(source, Source::Cursor));
        let is_router = model.as_ref().is_some_and(|model| model.bind(py) == "router");
        Self { call, name, plan, policy, model, has_steps, is_router, cursor, compensation }
    }

    /// The annotation of its output, if it can be undone.
    #[getter]
    fn output(&self, py: Python<'_>) -> Option<Py<PyAny>> {
        self.compensation.as_ref().map(|compensation| compensation.get().output_type.clone_ref(py))
    }

    #[getter]
    fn cursor(&self, py: Python<'_>) -> Option<Py<PyAny>> {
        self.cursor.as_ref().map(|cursor| cursor.clone_ref(py))
    }

    #[getter]
    fn name(&self, py: Python<'_>) -> Py<PyString> {
        self.name.clone_ref(py)
    }

    #[getter]
    fn plan(&self, py: Python<'_>) -> Py<Plan> {
        self.plan.clone_ref(py)
    }

    #[getter]
    fn model(&self, py: Python<'_>) -> Option<Py<PyString>> {
        self.model.as_ref().map(|model| model.clone_ref(py))
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.call)?;
        visit.call(&self.plan)?;
        visit.call(&self.cursor)?;
        visit.call(&self.policy)?;
        visit.call(&self.compensation)
    }
}

impl TaskSpec {
    /// The same with its first argument given.
    pub(super) fn of(&self, py: Python<'_>, first: Py<PyAny>) -> PyResult<Self> {
        static PARTIAL: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
        let partial = PARTIAL.import(py, "functools", "partial")?;
        Ok(Self {
            call: partial.call1((&self.call, first))?.unbind(),
            name: self.name.clone_ref(py),
            plan: self.plan.clone_ref(py),
            policy: self.policy.as_ref().map(|policy| policy.clone_ref(py)),
            model: None,
            has_steps: false,
            is_router: false,
            cursor: None,
            compensation: None,
        })
    }

    /// Whether its model is that of a router.
    pub(super) fn is_router(&self) -> bool {
        self.is_router
    }

    pub(super) fn plan_ref(&self) -> &Plan {
        self.plan.get()
    }

    pub(super) fn registers_before(&self) -> bool {
        self.compensation.as_ref().is_some_and(|compensation| compensation.get().register_before)
    }

    pub(super) fn max_attempts(&self) -> u32 {
        self.policy.as_ref().map_or(1, |policy| policy.get().retry.max_attempts())
    }

    pub(super) fn attempt_timeout(&self) -> Option<f64> {
        self.policy.as_ref()?.get().attempt_timeout
    }

    pub(super) fn limiter(&self) -> Option<&AnyLimiter> {
        self.policy.as_ref()?.get().limiter.as_ref()
    }

    #[inline]
    pub(super) fn breaker(&self) -> Option<&Py<PyBreaker>> {
        self.policy.as_ref()?.get().breaker.as_ref()
    }

    /// Whether its coroutine can run as it is: nothing of the policy has to act around it.
    pub(super) fn is_plain_coroutine(&self) -> bool {
        self.plan.get().is_coroutine_function && self.policy.is_none() && !self.plan.get().wants_run()
    }

    /// The same of a task that is done on items: called with the item alone.
    pub(super) fn takes_nothing_else(&self) -> bool {
        self.is_plain_coroutine() && self.plan.get().sources.is_empty()
    }

    /// Calls the task with arguments in the order of the plan's sources.
    pub(super) fn call<'py>(
        &self,
        py: Python<'py>,
        mut arguments: Vec<Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let call = self.call.bind(py);
        if let Some(keywords) = &self.plan.get().keywords {
            let keywords = keywords.bind(py);
            let named = PyDict::new(py);
            let first = arguments.len() - keywords.len();
            for (name, value) in keywords.iter().zip(arguments.drain(first..)) {
                named.set_item(name, value)?;
            }
            return call.call(PyTuple::new(py, arguments)?, Some(&named));
        }
        match arguments.as_slice() {
            [] => call.call0(),
            [a] => call.call1((a,)),
            [a, b] => call.call1((a, b)),
            [a, b, c] => call.call1((a, b, c)),
            _ => call.call1(PyTuple::new(py, arguments)?),
        }
    }

    /// Calls a task that takes nothing.
    pub(super) fn call_bare<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        self.call.bind(py).call0()
    }

    /// Calls a task that takes one argument, without a list.
    pub(super) fn call_one<'py>(&self, py: Python<'py>, argument: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        self.call.bind(py).call1((argument,))
    }
}
