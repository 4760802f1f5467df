"""cano: an in-process asyncio workflow engine.

A workflow is a finite state machine: states, one task per state, exit states; a state may split into many tasks at once
and join by strategy. Rust decides and drives; nothing Python runs per transition but the user's code.
"""

from ._batch import BatchTask
from ._breaker import CircuitSnapshot, CircuitState
from ._config import Seconds, TaskConfig, configure
from ._core import (
    BranchOutcome,
    Bulkhead,
    CircuitBreaker,
    CircuitPolicy,
    ErrorContext,
    JoinStrategy,
    LimiterSnapshot,
    MemoryStore,
    MultiRateLimiter,
    Permit,
    RateLimiter,
    RateLimiterPolicy,
    RetryMode,
    RunContext,
    SplitResult,
    StreamWindow,
    WindowedRateLimiter,
    WindowPolicy,
    __version__,
)
from ._errors import (
    AttemptTimeoutError,
    CanoError,
    CircuitOpenError,
    ConfigurationError,
    DuplicateResourceError,
    InvalidTransitionError,
    JoinError,
    JoinTimeoutError,
    KeyNotFoundError,
    NonRetryable,
    RateLimitedError,
    ResourceError,
    ResourceNotFoundError,
    ResourceTypeError,
    RetryAfter,
    RetryExhaustedError,
    StoreError,
    StoreTypeError,
    TaskExecutionError,
    UnknownStateError,
    UnknownTierError,
    WorkflowCancelledError,
    WorkflowError,
    WorkflowTimeoutError,
)
from ._join import JoinConfig
from ._models import (
    After,
    Continue,
    Done,
    ItemErrorPolicy,
    More,
    Pending,
    PollErrorPolicy,
    PollTask,
    Ready,
    RouterTask,
    SteppedTask,
    Stop,
    StreamProgress,
    StreamTask,
    TimerTask,
    Until,
)
from ._on_error import Caught
from ._resources import FromResources, HealthStatus, Res, Resource, Resources
from ._tasks import Task, TaskResult, in_thread
from ._workflow import Run, Workflow

__all__ = [
    "After",
    "AttemptTimeoutError",
    "BatchTask",
    "BranchOutcome",
    "Bulkhead",
    "CanoError",
    "Caught",
    "CircuitBreaker",
    "CircuitOpenError",
    "CircuitPolicy",
    "CircuitSnapshot",
    "CircuitState",
    "ConfigurationError",
    "Continue",
    "Done",
    "DuplicateResourceError",
    "ErrorContext",
    "FromResources",
    "HealthStatus",
    "InvalidTransitionError",
    "ItemErrorPolicy",
    "JoinConfig",
    "JoinError",
    "JoinStrategy",
    "JoinTimeoutError",
    "KeyNotFoundError",
    "LimiterSnapshot",
    "MemoryStore",
    "More",
    "MultiRateLimiter",
    "NonRetryable",
    "Pending",
    "Permit",
    "PollErrorPolicy",
    "PollTask",
    "RateLimitedError",
    "RateLimiter",
    "RateLimiterPolicy",
    "Ready",
    "Res",
    "Resource",
    "ResourceError",
    "ResourceNotFoundError",
    "ResourceTypeError",
    "Resources",
    "RetryAfter",
    "RetryExhaustedError",
    "RetryMode",
    "RouterTask",
    "Run",
    "RunContext",
    "Seconds",
    "SplitResult",
    "SteppedTask",
    "Stop",
    "StoreError",
    "StoreTypeError",
    "StreamProgress",
    "StreamTask",
    "StreamWindow",
    "Task",
    "TaskConfig",
    "TaskExecutionError",
    "TaskResult",
    "TimerTask",
    "UnknownStateError",
    "UnknownTierError",
    "Until",
    "WindowPolicy",
    "WindowedRateLimiter",
    "Workflow",
    "WorkflowCancelledError",
    "WorkflowError",
    "WorkflowTimeoutError",
    "__version__",
    "configure",
    "in_thread",
]


def _claim_public_home() -> None:
    """Tracebacks, pickles and documentation name `cano`, not the private module."""
    for name in __all__:
        public = globals()[name]
        if str(getattr(public, "__module__", "")).startswith("cano._"):
            public.__module__ = "cano"


_claim_public_home()
del _claim_public_home
