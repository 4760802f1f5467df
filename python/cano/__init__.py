"""cano: an in-process asyncio workflow engine.

A workflow is a finite state machine: states, one task per state, exit states; a state may split into many tasks at once
and join by strategy. Rust decides and drives; nothing Python runs per transition but the user's code.
"""

from ._config import Seconds, TaskConfig, configure
from ._core import (
    BranchOutcome,
    ErrorContext,
    JoinStrategy,
    LimiterSnapshot,
    MemoryStore,
    MultiRateLimiter,
    RateLimiter,
    RateLimiterPolicy,
    RetryMode,
    RunContext,
    SplitResult,
    WindowedRateLimiter,
    WindowPolicy,
    __version__,
)
from ._errors import (
    AttemptTimeoutError,
    CanoError,
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
from ._resources import FromResources, HealthStatus, Res, Resource, Resources
from ._tasks import Task, TaskResult, in_thread
from ._workflow import Run, Workflow

__all__ = [
    "AttemptTimeoutError",
    "BranchOutcome",
    "CanoError",
    "ConfigurationError",
    "DuplicateResourceError",
    "ErrorContext",
    "FromResources",
    "HealthStatus",
    "InvalidTransitionError",
    "JoinConfig",
    "JoinError",
    "JoinStrategy",
    "JoinTimeoutError",
    "KeyNotFoundError",
    "LimiterSnapshot",
    "MemoryStore",
    "MultiRateLimiter",
    "NonRetryable",
    "RateLimitedError",
    "RateLimiter",
    "RateLimiterPolicy",
    "Res",
    "Resource",
    "ResourceError",
    "ResourceNotFoundError",
    "ResourceTypeError",
    "Resources",
    "RetryAfter",
    "RetryExhaustedError",
    "RetryMode",
    "Run",
    "RunContext",
    "Seconds",
    "SplitResult",
    "StoreError",
    "StoreTypeError",
    "Task",
    "TaskConfig",
    "TaskExecutionError",
    "TaskResult",
    "UnknownStateError",
    "UnknownTierError",
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
