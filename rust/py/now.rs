//! The clock of breakers and limiters, which tasks, loops and threads share: the system's monotonic one.
//!
//! While a virtual clock runs in a thread (`cano.testing`), what that thread asks is answered by it.

use std::cell::Cell;
use std::sync::OnceLock;
use std::time::{Duration, Instant, SystemTime};

use pyo3::prelude::*;

use crate::core::time::Moment;

thread_local! {
    static VIRTUAL: Cell<Option<Moment>> = const { Cell::new(None) };
}

/// The present moment; moments of one clock alone can be compared.
pub(super) fn now() -> Moment {
    VIRTUAL.get().unwrap_or_else(|| {
        static START: OnceLock<Instant> = OnceLock::new();
        #[allow(clippy::disallowed_methods, reason = "the one place that reads it for them")]
        let (start, now) = (START.get_or_init(Instant::now), Instant::now());
        moment(now.saturating_duration_since(*start))
    })
}

/// The time that machines share, in milliseconds since 1970.
pub(super) fn wall() -> u64 {
    #[allow(clippy::disallowed_methods, reason = "the one place that reads it for stores")]
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// Sets what this thread takes for the present, in seconds; None gives it the system's clock back.
#[pyfunction]
#[pyo3(signature = (seconds, /))]
pub(super) fn set_virtual_time(seconds: Option<f64>) {
    VIRTUAL.set(seconds.map(|seconds| moment(Duration::try_from_secs_f64(seconds).unwrap_or_default())));
}

fn moment(since: Duration) -> Moment {
    Moment::from_nanos(u64::try_from(since.as_nanos()).unwrap_or(u64::MAX))
}
