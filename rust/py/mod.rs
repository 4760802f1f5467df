//! The driver: what Python hands over is converted here, `core` is asked, and its verdict carried out.
//!
//! A file uses the files named above it; from `timer` on, the files are the parts of one machine and know each other: a run
//! has a drive, a drive opens splits, a split has branches, and a branch may be a run. `unsafe` appears in `run.rs`,
//! `branch.rs` and `branch_type.rs` alone.

mod errors;

mod convert;

mod asyncio;

mod now;

mod row;

mod checkpoint_store;

mod delivery;

mod sqlite_store;

mod memory_checkpoints;

mod standing;

mod current;

mod definition;

mod window;

mod memory;

mod circuit_policy;

mod breaker;

mod bulkhead;

mod on_error;

mod limiter_policy;

mod line;

mod limiter;

mod table;

mod log;

mod env;

mod failure;

mod result;

mod timer;

mod run;

mod branch;

mod branch_type;

mod waiter;

mod split;

mod turns;

mod feed;

mod gates;

mod drive;

mod route;

mod saga;

#[pyo3::pymodule(gil_used = true)]
mod _core {
    #[pymodule_export]
    use super::branch::configure_branches;
    #[pymodule_export]
    use super::breaker::{PyBreaker, PyPermit};
    #[pymodule_export]
    use super::bulkhead::PyBulkhead;
    #[pymodule_export]
    use super::circuit_policy::PyCircuitPolicy;
    #[pymodule_export]
    use super::convert::seconds;
    #[pymodule_export]
    use super::definition::{Compensation, Plan, Policy, PyJoinStrategy, PyRetryMode, TaskSpec};
    #[pymodule_export]
    use super::env::RunContext;
    #[pymodule_export]
    use super::failure::ErrorContext;
    #[pymodule_export]
    use super::limiter::{PyMultiRateLimiter, PyRateLimiter, PyWindowedRateLimiter};
    #[pymodule_export]
    use super::limiter_policy::{LimiterSnapshot, PyRateLimiterPolicy, PyWindowPolicy};
    #[pymodule_export]
    use super::line::{PyLimiter, WaitingCall};
    #[pymodule_export]
    use super::log::{Log, Resumed};
    #[pymodule_export]
    use super::memory::MemoryStore;
    #[pymodule_export]
    use super::memory_checkpoints::PyMemoryCheckpoints;
    #[pymodule_export]
    use super::now::set_virtual_time;
    #[pymodule_export]
    use super::result::{BranchOutcome, SplitResult};
    #[pymodule_export]
    use super::row::PyRow;
    #[pymodule_export]
    use super::run::Run;
    #[pymodule_export]
    use super::saga::Completion;
    #[pymodule_export]
    use super::split::Split;
    #[pymodule_export]
    use super::sqlite_store::PySqliteStore;
    #[pymodule_export]
    use super::standing::{
        PyStanding, check_fence, check_workflow_id, decode_log, encode_within_limits, limits_of_runs, rules_of_claims,
    };
    #[pymodule_export]
    use super::table::{Factory, Table};
    #[pymodule_export]
    use super::window::{PyFilling, PyStreamWindow};

    #[pymodule_init]
    #[allow(clippy::unnecessary_wraps, reason = "the form that pyo3 calls")]
    fn init(module: &pyo3::Bound<'_, pyo3::types::PyModule>) -> pyo3::PyResult<()> {
        super::run::install_send(module.py());
        Ok(())
    }

    #[pymodule_export]
    #[allow(non_upper_case_globals, reason = "the Python name of the version")]
    const __version__: &str = env!("CARGO_PKG_VERSION");
}
