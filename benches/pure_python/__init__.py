"""The same engine in plain Python and asyncio: the opponent of the benchmarks and the oracle of the property tests.

It is written the way a careful engineer would write it by hand, and it imports nothing of cano.
"""

from .config import (
    AttemptTimeoutError,
    BranchOutcome,
    CanoError,
    Caught,
    ConfigurationError,
    ErrorContext,
    InvalidTransitionError,
    JoinConfig,
    JoinError,
    JoinStrategy,
    JoinTimeoutError,
    NonRetryable,
    RetryAfter,
    RetryExhaustedError,
    RetryMode,
    SplitResult,
    TaskConfig,
    TaskExecutionError,
    TaskResult,
    UnknownStateError,
    WorkflowError,
    WorkflowTimeoutError,
)
from .engine import Workflow

__all__ = [
    "AttemptTimeoutError",
    "BranchOutcome",
    "CanoError",
    "Caught",
    "ConfigurationError",
    "ErrorContext",
    "InvalidTransitionError",
    "JoinConfig",
    "JoinError",
    "JoinStrategy",
    "JoinTimeoutError",
    "NonRetryable",
    "RetryAfter",
    "RetryExhaustedError",
    "RetryMode",
    "SplitResult",
    "TaskConfig",
    "TaskExecutionError",
    "TaskResult",
    "UnknownStateError",
    "Workflow",
    "WorkflowError",
    "WorkflowTimeoutError",
]
