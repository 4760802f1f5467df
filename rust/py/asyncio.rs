//! The few names of asyncio that the driver calls, looked up once per process.

use std::sync::OnceLock;
use std::time::Instant;

use pyo3::exceptions::PyRuntimeError;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyType;

pub(super) struct Asyncio {
    running_loop: Py<PyAny>,
    loop_of_this_thread: Py<PyAny>,
    current_task: Py<PyAny>,
    sleep: Py<PyAny>,
    ensure_future: Py<PyAny>,
    shield: Py<PyAny>,
    pub(super) task: Py<PyType>,
    base_loop_time: Py<PyAny>,
    monotonic: Py<PyAny>,
    random: Py<PyAny>,
}

impl Asyncio {
    pub(super) fn of(py: Python<'_>) -> PyResult<&Asyncio> {
        static NAMES: PyOnceLock<Asyncio> = PyOnceLock::new();
        NAMES.get_or_try_init(py, || {
            let asyncio = py.import("asyncio")?;
            Ok(Asyncio {
                running_loop: asyncio.getattr("get_running_loop")?.unbind(),
                loop_of_this_thread: asyncio.getattr("_get_running_loop")?.unbind(),
                current_task: asyncio.getattr("current_task")?.unbind(),
                sleep: asyncio.getattr("sleep")?.unbind(),
                ensure_future: asyncio.getattr("ensure_future")?.unbind(),
                shield: asyncio.getattr("shield")?.unbind(),
                task: asyncio.getattr("Task")?.cast_into()?.unbind(),
                base_loop_time: asyncio.getattr("BaseEventLoop")?.getattr("time")?.unbind(),
                monotonic: py.import("time")?.getattr("monotonic")?.unbind(),
                random: py.import("random")?.getattr("random")?.unbind(),
            })
        })
    }

    /// The loop that is running in this thread; an error if none is.
    pub(super) fn running_loop<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        self.running_loop.bind(py).call0()
    }

    /// Whether this is called from within a loop.
    pub(super) fn is_running(&self, event_loop: &Bound<'_, PyAny>) -> PyResult<bool> {
        Ok(self.loop_of_this_thread.bind(event_loop.py()).call0()?.is(event_loop))
    }

    /// Whether a loop's clock is asyncio's own; remembered for the class that is seen first.
    fn is_stock(&self, event_loop: &Bound<'_, PyAny>) -> PyResult<bool> {
        static SEEN: PyOnceLock<(Py<PyType>, bool)> = PyOnceLock::new();
        let py = event_loop.py();
        let class = event_loop.get_type();
        if let Some((_, is_stock)) = SEEN.get(py).filter(|(seen, _)| class.is(seen)) {
            return Ok(*is_stock);
        }
        let is_stock = class.getattr(intern!(py, "time"))?.is(self.base_loop_time.bind(py));
        SEEN.get_or_init(py, || (class.unbind(), is_stock));
        Ok(is_stock)
    }

    pub(super) fn sleep<'py>(&self, py: Python<'py>, seconds: f64) -> PyResult<Bound<'py, PyAny>> {
        self.sleep.bind(py).call1((seconds,))
    }

    /// A future or task for what can be awaited.
    pub(super) fn ensure_future<'py>(&self, awaitable: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        self.ensure_future.bind(awaitable.py()).call1((awaitable,))
    }

    /// What a coroutine yields to wait for a future that goes on if the wait is cancelled.
    pub(super) fn wait_for<'py>(&self, future: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        let py = future.py();
        let outer = self.shield.bind(py).call1((future,))?;
        outer.setattr(intern!(py, "_asyncio_future_blocking"), true)?;
        Ok(outer)
    }

    /// A number in [0, 1) for the core's jitter; Python's, so that `random.seed` makes a test repeatable.
    pub(super) fn dice(&self, py: Python<'_>) -> PyResult<f64> {
        self.random.bind(py).call0()?.extract()
    }

    /// The task that is running now, if any; without a running loop there is none.
    pub(super) fn host(&self, py: Python<'_>) -> PyResult<Option<Py<PyAny>>> {
        match self.current_task.bind(py).call0() {
            Ok(task) => Ok((!task.is_none()).then(|| task.unbind())),
            Err(error) if error.is_instance_of::<PyRuntimeError>(py) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// The event loop of a run and its clock.
pub(super) struct Clock {
    pub(super) event_loop: Py<PyAny>,
    /// `time.monotonic` where the loop's `time()` is asyncio's own (it returns just that), else the loop's bound method.
    now: Py<PyAny>,
    is_stock: bool,
}

impl Clock {
    pub(super) fn running(py: Python<'_>) -> PyResult<Clock> {
        let names = Asyncio::of(py)?;
        let event_loop = names.running_loop(py)?;
        let is_stock = names.is_stock(&event_loop)?;
        let now =
            if is_stock { names.monotonic.clone_ref(py) } else { event_loop.getattr(intern!(py, "time"))?.unbind() };
        Ok(Clock { event_loop: event_loop.unbind(), now, is_stock })
    }

    pub(super) fn now(&self, py: Python<'_>) -> PyResult<f64> {
        self.now.bind(py).call0()?.extract()
    }

    /// Whether the loop has a task factory, and whether it is in debug mode. The methods that tell are Python around an
    /// attribute where the loop is asyncio's.
    pub(super) fn habits(&self, py: Python<'_>) -> PyResult<(bool, bool)> {
        let event_loop = self.event_loop.bind(py);
        let (factory, debug) = if self.is_stock {
            (event_loop.getattr(intern!(py, "_task_factory"))?, event_loop.getattr(intern!(py, "_debug"))?)
        } else {
            let factory = event_loop.call_method0(intern!(py, "get_task_factory"))?;
            (factory, event_loop.call_method0(intern!(py, "get_debug"))?)
        };
        Ok((!factory.is_none(), debug.is_truthy()?))
    }

    /// A point in time for differences: the loop's clock, read natively where it is the system's monotonic one.
    pub(super) fn mark(&self, py: Python<'_>) -> PyResult<f64> {
        static START: OnceLock<Instant> = OnceLock::new();
        if !self.is_stock {
            return self.now(py);
        }
        #[allow(clippy::disallowed_methods, reason = "elapsed times of branches, twice per branch; no rule reads them")]
        let (start, now) = (START.get_or_init(Instant::now), Instant::now());
        Ok(now.saturating_duration_since(*start).as_secs_f64())
    }

    /// Arms a timer; cancel what is returned with `disarm`.
    pub(super) fn call_at(&self, py: Python<'_>, when: f64, callback: Bound<'_, PyAny>) -> PyResult<Py<PyAny>> {
        let handle = self.event_loop.bind(py).call_method1(intern!(py, "call_at"), (when, callback))?;
        Ok(handle.unbind())
    }
}

/// Cancels a timer handle, if there is one.
pub(super) fn disarm(py: Python<'_>, handle: Option<Py<PyAny>>) {
    if let Some(handle) = handle
        && let Err(error) = handle.bind(py).call_method0(intern!(py, "cancel"))
    {
        error.write_unraisable(py, None);
    }
}
