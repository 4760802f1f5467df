"""cano: an in-process asyncio workflow engine.

A workflow is a finite state machine: states, one task per state, exit states; a state may split into many tasks at once
and join by strategy. Rust decides and drives; nothing Python runs per transition but the user's code.
"""

from typing import TYPE_CHECKING

from ._batch import BatchTask
from ._breaker import CircuitSnapshot, CircuitState
from ._checkpoints import CheckpointStore, RowKind, RunStatus, RunSummary
from ._codec import Codec, JsonCodec
from ._config import Seconds, TaskConfig, configure
from ._core import (
    BranchOutcome,
    Bulkhead,
    CheckpointRow,
    CircuitBreaker,
    CircuitPolicy,
    ErrorContext,
    InMemoryCheckpointStore,
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
    SqliteCheckpointStore,
    StreamWindow,
    WindowedRateLimiter,
    WindowPolicy,
    __version__,
)
from ._durable import recover_all
from ._errors import (
    AttemptTimeoutError,
    CanoError,
    CheckpointError,
    CircuitOpenError,
    CompensationFailedError,
    CompensationTimeoutError,
    ConfigurationError,
    CorruptRowError,
    DuplicateResourceError,
    InvalidTransitionError,
    JoinError,
    JoinTimeoutError,
    KeyNotFoundError,
    NeedsAttentionError,
    NonRetryable,
    Orphan,
    OrphanedStepError,
    OutputNotSerializableError,
    OutputTooLargeError,
    OutputUnreadableError,
    RateLimitedError,
    ResourceError,
    ResourceNotFoundError,
    ResourceTypeError,
    RetryAfter,
    RetryExhaustedError,
    RunClaimedError,
    RunConflictError,
    RunNotFoundError,
    RunTooLargeError,
    StoreError,
    StoreFailedError,
    StoreOpenError,
    StoreTypeError,
    TaskExecutionError,
    UnknownStateError,
    UnknownTierError,
    WorkflowCancelledError,
    WorkflowError,
    WorkflowTimeoutError,
    WorkflowVersionError,
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
from ._saga import CompensatableTask
from ._tasks import Task, TaskResult, in_thread
from ._workflow import Run, Workflow

if TYPE_CHECKING:
    from ._postgres import PostgresCheckpointStore as PostgresCheckpointStore

__all__ = [
    "After",
    "AttemptTimeoutError",
    "BatchTask",
    "BranchOutcome",
    "Bulkhead",
    "CanoError",
    "Caught",
    "CheckpointError",
    "CheckpointRow",
    "CheckpointStore",
    "CircuitBreaker",
    "CircuitOpenError",
    "CircuitPolicy",
    "CircuitSnapshot",
    "CircuitState",
    "Codec",
    "CompensatableTask",
    "CompensationFailedError",
    "CompensationTimeoutError",
    "ConfigurationError",
    "Continue",
    "CorruptRowError",
    "Done",
    "DuplicateResourceError",
    "ErrorContext",
    "FromResources",
    "HealthStatus",
    "InMemoryCheckpointStore",
    "InvalidTransitionError",
    "ItemErrorPolicy",
    "JoinConfig",
    "JoinError",
    "JoinStrategy",
    "JoinTimeoutError",
    "JsonCodec",
    "KeyNotFoundError",
    "LimiterSnapshot",
    "MemoryStore",
    "More",
    "MultiRateLimiter",
    "NeedsAttentionError",
    "NonRetryable",
    "Orphan",
    "OrphanedStepError",
    "OutputNotSerializableError",
    "OutputTooLargeError",
    "OutputUnreadableError",
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
    "RowKind",
    "Run",
    "RunClaimedError",
    "RunConflictError",
    "RunContext",
    "RunNotFoundError",
    "RunStatus",
    "RunSummary",
    "RunTooLargeError",
    "Seconds",
    "SplitResult",
    "SqliteCheckpointStore",
    "SteppedTask",
    "Stop",
    "StoreError",
    "StoreFailedError",
    "StoreOpenError",
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
    "WorkflowVersionError",
    "__version__",
    "configure",
    "in_thread",
    "recover_all",
]


def __getattr__(name: str) -> object:
    """What needs an extra is imported when it is asked for."""
    if name == "PostgresCheckpointStore":
        from ._postgres import PostgresCheckpointStore  # noqa: PLC0415 - see above

        PostgresCheckpointStore.__module__ = "cano"
        return PostgresCheckpointStore
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _claim_public_home() -> None:
    """Tracebacks, pickles and documentation name `cano`, not the private module."""
    for name in __all__:
        public = globals().get(name)
        if str(getattr(public, "__module__", "")).startswith("cano._"):
            public.__module__ = "cano"


_claim_public_home()
del _claim_public_home
