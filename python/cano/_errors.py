"""Every error that cano raises.

::

    CanoError(Exception)
    ├── ConfigurationError (ValueError)
    │   └── UnknownTierError (KeyError)
    ├── WorkflowError
    │   ├── InvalidTransitionError
    │   ├── UnknownStateError (LookupError)
    │   ├── WorkflowTimeoutError (TimeoutError)
    │   ├── WorkflowCancelledError
    │   └── JoinError (ExceptionGroup)
    │       └── JoinTimeoutError
    ├── TaskExecutionError
    │   ├── RetryAfter
    │   └── NonRetryable
    ├── RetryExhaustedError
    ├── AttemptTimeoutError (TimeoutError)
    ├── CircuitOpenError
    ├── RateLimitedError
    ├── StoreError
    │   ├── KeyNotFoundError (KeyError)
    │   └── StoreTypeError (TypeError)
    ├── ResourceError
    │   ├── ResourceNotFoundError (KeyError)
    │   ├── ResourceTypeError (TypeError)
    │   └── DuplicateResourceError
    ├── CheckpointError
    │   ├── RunNotFoundError (LookupError)
    │   ├── RunConflictError
    │   ├── RunClaimedError
    │   ├── RunTooLargeError
    │   ├── CorruptRowError
    │   ├── WorkflowVersionError
    │   ├── NeedsAttentionError
    │   ├── StoreFailedError
    │   └── StoreOpenError
    ├── OutputNotSerializableError
    ├── OutputTooLargeError
    ├── OutputUnreadableError
    └── CompensationFailedError (ExceptionGroup)
        its members besides the original failure: what compensations raised, and
        ├── OrphanedStepError
        └── CompensationTimeoutError (TimeoutError)

The text says what is wrong, the value, and what would be right; the attributes carry the same as facts. All of them pickle.
An exception that a task raises is never wrapped: it leaves the run as the same object, with one note and the attribute
``__cano__``, an `ErrorContext`.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self, final

from . import _core
from ._core import ErrorContext

if TYPE_CHECKING:
    from ._checkpoints import RunStatus
    from ._config import Seconds
    from ._core import SplitResult

_TEXT_LIMIT = 80
LABEL_LIMIT = 128


def show(value: object) -> str:
    """The value as it may stand in a message: its repr, control characters escaped, at most 80 characters."""
    text = value if isinstance(value, str) else repr(value)
    text = "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text[: 2 * _TEXT_LIMIT]
    )
    text = f"'{text}'" if isinstance(value, str) else text
    return text if len(text) <= _TEXT_LIMIT else text[: _TEXT_LIMIT - 3] + "..."


def label(state: Hashable) -> str:
    """The name of a state in messages, keys and stored rows: an Enum member's name, else its text."""
    name = getattr(state, "_name_", None)
    return name if type(name) is str else str(state)


def shown_label(state: Hashable) -> str:
    """The name of a state that nobody has checked, as it may stand in a message."""
    text = label(state)
    return text if text.isprintable() and len(text) <= _TEXT_LIMIT else show(text)


def check_text(what: str, text: str, limit: int) -> None:
    """Refuse a text that is empty, longer than `limit` bytes, or not printable (control characters, lone surrogates)."""
    if not text.isprintable():
        raise ConfigurationError(f"{what} must be printable, got {show(text)}")
    size = len(text.encode())
    if not 0 < size <= limit:
        raise ConfigurationError(f"{what} must have 1 to {limit} bytes, got {size}: {show(text)}")


def check_name(name: Any) -> None:
    """Refuse what cannot name a workflow, or what workflows share."""
    if not isinstance(name, str):
        raise ConfigurationError(f"name must be a text, got {show(name)}")
    check_text("name", name, LABEL_LIMIT)


class CanoError(Exception):
    """Base of every error of this library."""

    category: ClassVar[str] = "cano"
    __cano__: ErrorContext | None = None

    def __init__(self, message: str = "") -> None:
        super().__init__(message)

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""

    @property
    def state(self) -> Hashable | None:
        """The state in which it happened; None outside a run."""
        return self.__cano__.state if self.__cano__ else None

    @property
    def task(self) -> str | None:
        """Name of the task in which it happened; None outside a task."""
        return self.__cano__.task if self.__cano__ else None

    @property
    def attempt(self) -> int | None:
        """1-based number of the attempt; 0 when none had finished; None outside a run."""
        return self.__cano__.attempt if self.__cano__ else None

    @property
    def path(self) -> tuple[Hashable, ...] | None:
        """The states entered, oldest first, at most the newest 256; None outside a run."""
        return self.__cano__.path if self.__cano__ else None

    @property
    def workflow_id(self) -> str | None:
        """The id given to the run, or None."""
        return self.__cano__.workflow_id if self.__cano__ else None


class ConfigurationError(CanoError, ValueError):
    """A definition or an argument is refused, before any user code runs.

    Attributes:
        problems: Every problem found, one sentence each, in the order of the definition.
    """

    category = "configuration"

    def __init__(self, message: str, problems: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.problems: tuple[str, ...] = tuple(problems) or (message,)

    @classmethod
    def of(cls, subject: str, problems: Sequence[str]) -> Self:
        """One error for all the problems of a definition."""
        if len(problems) == 1:
            return cls(f"{subject}: {problems[0]}", problems)
        return cls(f"{subject} has {len(problems)} problems:" + "".join(f"\n  - {p}" for p in problems), problems)


class UnknownTierError(ConfigurationError, KeyError):
    """A multi limiter has no tier of this name; nothing was taken."""


class WorkflowError(CanoError):
    """A run could not go on."""

    category = "workflow"


class InvalidTransitionError(WorkflowError):
    """A task returned something that is no state, or a state that it did not declare."""


class UnknownStateError(WorkflowError, LookupError):
    """A task returned a state that is neither registered nor an exit state."""


class WorkflowTimeoutError(WorkflowError, TimeoutError):
    """A run used up its whole budget.

    Attributes:
        elapsed: Seconds since the run started.
        limit: The budget in seconds.
    """

    category = "timeout"

    def __init__(self, message: str, elapsed: float = 0.0, limit: float = 0.0) -> None:
        super().__init__(message)
        self.elapsed = elapsed
        self.limit = limit


class WorkflowCancelledError(WorkflowError):
    """A run was cancelled through its handle (`Run.cancel`).

    Attributes:
        reason: What was given to `Run.cancel`, or None.
    """

    category = "cancelled"

    def __init__(self, message: str, reason: str | None = None) -> None:
        super().__init__(message)
        self.reason = reason


class JoinError(WorkflowError, ExceptionGroup[Exception]):
    """A split did not reach what its join strategy asks for.

    It is an `ExceptionGroup` of every branch's own exception, in branch order, each with a note that names its branch.
    Where no branch raised one (each was cancelled), the group holds one exception that says so.

    Attributes:
        result: The `SplitResult` with every outcome.
    """

    def __new__(cls, message: str, exceptions: Sequence[Exception], _result: "SplitResult | None" = None) -> Self:
        return super().__new__(cls, message, exceptions)

    def __init__(self, message: str, exceptions: Sequence[Exception], result: "SplitResult | None" = None) -> None:
        ExceptionGroup.__init__(self, message, exceptions)
        self.result = result

    def __str__(self) -> str:
        return ExceptionGroup.__str__(self)

    def derive(self, excs: Sequence[Exception]) -> "JoinError":  # type: ignore[override]
        """A group of the same kind around some of its exceptions (`ExceptionGroup.split` and ``except*`` use it)."""
        part = type(self)(self.message, excs, self.result)
        part.__cano__ = self.__cano__
        return part


class JoinTimeoutError(JoinError):
    """The timeout of a split passed before its join strategy was decided.

    Its first member is a `TimeoutError`, so ``except* TimeoutError`` catches it. It cannot be one itself: CPython does not
    allow a class that is an `ExceptionGroup` and an `OSError` (which `TimeoutError` is) at once.
    """

    category = "timeout"


class TaskExecutionError(CanoError):
    """A task failed; tasks may raise it, and cano does when a native extension panics ("panic: ...")."""

    category = "task"


class RetryAfter(TaskExecutionError):
    """Raise it in a task to fail the attempt and set the delay before the next one.

    Args:
        delay: Seconds to wait, 0 to ten years. An exponential retry's ``max_delay`` still bounds it.
        message: Text; None gives a standard one.

    Raises:
        ConfigurationError: `delay` is out of range or no duration.
    """

    def __init__(self, delay: "Seconds", message: str | None = None) -> None:
        if delay is None:
            raise ConfigurationError("delay must be seconds as a number or a timedelta, got None")
        self.delay: float = _core.seconds("delay", delay)
        super().__init__(message if message is not None else f"retry after {self.delay} s")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.delay, str(self)), self.__dict__


class NonRetryable(TaskExecutionError):
    """Raise it in a task to fail at once, whatever retries are left."""


class RetryExhaustedError(CanoError):
    """The last attempt that the retry policy allows failed; ``__cause__`` is that failure.

    Attributes:
        attempts: How many attempts were made.
    """

    category = "retry"

    def __init__(self, message: str, attempts: int = 0) -> None:
        super().__init__(message)
        self.attempts = attempts


class AttemptTimeoutError(CanoError, TimeoutError):
    """One attempt of a task took longer than its ``attempt_timeout``.

    Attributes:
        limit: The limit in seconds.
    """

    category = "timeout"

    def __init__(self, message: str, limit: float = 0.0) -> None:
        super().__init__(message)
        self.limit = limit


class CircuitOpenError(CanoError):
    """A circuit breaker did not let a call through.

    Attributes:
        breaker: The breaker's name, or None.
        retry_after: Seconds until the breaker lets a call through, at most; None if only its ``reset()`` ends that.
    """

    category = "circuit"

    def __init__(self, message: str, breaker: str | None = None, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.breaker = breaker
        self.retry_after = retry_after


class RateLimitedError(CanoError):
    """A rate limiter did not grant a call, and took nothing.

    Attributes:
        tier: Name of the first tier in the way, or the limiter's own name; None if it has none.
        retry_after: Seconds until it may be granted, if nobody in front gives up: 0.001 or more; infinity if it never is.
    """

    category = "rate"

    def __init__(self, message: str, tier: str | None = None, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.tier = tier
        self.retry_after = retry_after


class StoreError(CanoError):
    """A value store refused an operation."""

    category = "store"


class KeyNotFoundError(StoreError, KeyError):
    """The store has no such key."""


class StoreTypeError(StoreError, TypeError):
    """The stored value is not of the type asked for."""


class ResourceError(CanoError):
    """A resource could not be found, set up or torn down."""

    category = "resource"


class ResourceNotFoundError(ResourceError, KeyError):
    """No resource has this key."""


class ResourceTypeError(ResourceError, TypeError):
    """The resource is not of the type asked for."""


class DuplicateResourceError(ResourceError):
    """The key already has a resource."""


class CheckpointError(CanoError):
    """The log of a run could not be written, read, or owned.

    Attributes:
        sequence: The number of the row that it is about, or None.
    """

    category = "checkpoint"

    def __init__(self, message: str, workflow_id: str | None = None, sequence: int | None = None) -> None:
        super().__init__(message)
        self._workflow_id = workflow_id
        self.sequence = sequence

    @property
    def workflow_id(self) -> str | None:
        """The id of the run that it is about, also outside of a run; None if it is about none."""
        return super().workflow_id if self._workflow_id is None else self._workflow_id


class RunNotFoundError(CheckpointError, LookupError):
    """The store has no run of this id."""


class RunConflictError(CheckpointError):
    """What was to be done does not fit what the store has of the run; nothing was changed.

    Attributes:
        status: How far the run is, if it is there already or is over; None if it is about a row.
        is_same: Whether the row that was to be added is there already, byte by byte: an earlier append has done it.
    """

    def __init__(
        self,
        message: str,
        workflow_id: str | None = None,
        sequence: int | None = None,
        status: "RunStatus | None" = None,
        is_same: bool = False,  # noqa: FBT001, FBT002 - Rust calls it by position
    ) -> None:
        super().__init__(message, workflow_id, sequence)
        self.status = status
        self.is_same = is_same


class RunClaimedError(CheckpointError):
    """The run is somebody else's, or is not claimed any more; nothing was changed.

    Attributes:
        owner: Whose it is, or None if nobody's.
        until: When the owner's lease ends, in milliseconds since 1970, or None. An owner that lives moves it.
    """

    def __init__(
        self,
        message: str,
        workflow_id: str | None = None,
        sequence: int | None = None,
        owner: str | None = None,
        until: int | None = None,
    ) -> None:
        super().__init__(message, workflow_id, sequence)
        self.owner = owner
        self.until = until


class RunTooLargeError(CheckpointError):
    """A row or a run would hold more than the store's limits allow; nothing was written."""


class CorruptRowError(CheckpointError):
    """What is stored is not what was written, or was written by a later version of cano."""


class WorkflowVersionError(CheckpointError):
    """A run was begun by another version of its workflow.

    Attributes:
        stored: The version that the run has.
        expected: The version that the workflow has.
    """

    def __init__(self, message: str, workflow_id: str | None = None, stored: int = 0, expected: int = 0) -> None:
        super().__init__(message, workflow_id)
        self.stored = stored
        self.expected = expected


class NeedsAttentionError(CheckpointError):
    """The run is parked: it cannot go on without a person."""


class StoreFailedError(CheckpointError):
    """A checkpoint store could not do what it was asked.

    Attributes:
        reason: "disk-full", "busy", "io", "damaged", "read-only", "closed", "forked" or "other".
    """

    def __init__(
        self, message: str, workflow_id: str | None = None, sequence: int | None = None, reason: str = "other"
    ) -> None:
        super().__init__(message, workflow_id, sequence)
        self.reason = reason


class StoreOpenError(CheckpointError):
    """A checkpoint store could not be opened.

    Attributes:
        reason: What is in the way, as one word, or several with hyphens: "no-directory", "insecure-directory", "symlink",
            "not-a-file", "other-owner", "insecure-file", "not-a-store", "version", "forked", "no-wal", or a reason of
            `StoreFailedError`.
    """

    def __init__(self, message: str, reason: str = "other") -> None:
        super().__init__(message)
        self.reason = reason


# --- what is to outlive the process ----------------------------------------------------------------------------------


class OutputNotSerializableError(CanoError):
    """A value that is to be stored cannot be written by the codec, or would not come back as its annotated type."""

    category = "output"


class OutputTooLargeError(CanoError):
    """A value that is to be stored is larger than a row may be.

    Attributes:
        size: Its bytes.
        limit: How many there may be.
    """

    category = "output"

    def __init__(self, message: str, size: int = 0, limit: int = 0) -> None:
        super().__init__(message)
        self.size = size
        self.limit = limit


class OutputUnreadableError(CanoError):
    """Bytes that were stored are no value of the type that the code annotates."""

    category = "output"


# --- compensation ----------------------------------------------------------------------------------------------------


@final
@dataclass(frozen=True, slots=True)
class Orphan:
    """A step that was done and could not be undone, so that somebody has to look after it.

    Attributes:
        state: Where it was done.
        task: Name of the task that did it.
        visit: 1-based count of the entries of the run into the state.
        output: What the step returned beside the next state; bytes as they were stored if they could not be read, None for
            one that was registered before it began and did not end well.
        error: Why it was not undone: what its ``compensate`` raised, or an `OrphanedStepError`.
    """

    state: Hashable
    task: str
    visit: int
    output: Any
    error: Exception


class CompensationFailedError(CanoError, ExceptionGroup[Exception]):
    """A run failed, and not everything that it had done could be undone.

    It is an `ExceptionGroup`: first the original failure, then the failure of each compensation in the order of the
    roll-back, newest step first. A member that is itself a `CompensationFailedError`, of a run inside this one, is replaced
    by its members. The original failure of a run that was cancelled is a `WorkflowCancelledError`.

    Attributes:
        orphans: The steps that are not undone, each with its output, in the order of the roll-back.
    """

    category = "compensation"

    def __new__(cls, message: str, exceptions: Sequence[Exception], _orphans: Sequence[Orphan] = ()) -> Self:
        return super().__new__(cls, message, exceptions)

    def __init__(self, message: str, exceptions: Sequence[Exception], orphans: Sequence[Orphan] = ()) -> None:
        ExceptionGroup.__init__(self, message, exceptions)
        self.orphans: tuple[Orphan, ...] = tuple(orphans)

    def __str__(self) -> str:
        return ExceptionGroup.__str__(self)

    def derive(self, excs: Sequence[Exception]) -> "CompensationFailedError":  # type: ignore[override]
        """A group of the same kind around some of its exceptions (`ExceptionGroup.split` and ``except*`` use it)."""
        part = type(self)(self.message, excs, self.orphans)
        part.__cano__ = self.__cano__
        return part


class OrphanedStepError(CanoError):
    """A step was not undone, since its compensation was stopped, did not begin or does not exist."""

    category = "compensation"


class CompensationTimeoutError(CanoError, TimeoutError):
    """A roll-back took longer than the workflow's compensation timeout; what was left is not undone.

    Attributes:
        limit: The timeout in seconds.
    """

    category = "compensation"

    def __init__(self, message: str, limit: float = 0.0) -> None:
        super().__init__(message)
        self.limit = limit
