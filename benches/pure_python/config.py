"""What a workflow is made of: errors, retries, joins and results, all plain values."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Annotated, Any, ClassVar, Generic, Self, TypeVar

S = TypeVar("S", bound=Hashable)
E = TypeVar("E", bound=Exception)
Seconds = float | timedelta

_TEN_YEARS = 315_576_000.0
_MOST_RETRIES = 1_000_000
_SHORTEST_DELAY = 0.001


@dataclass(frozen=True, slots=True)
class ErrorContext:
    """Where a run was when an exception left a task; ``attempt`` is 0 when no attempt had finished.

    ``path`` holds the newest 256 of the ``entered`` states, oldest first; runs are numbered as they start.
    """

    state: Hashable | None
    task: str | None
    attempt: int
    max_attempts: int
    path: tuple[Hashable, ...]
    entered: int
    branch: int | None
    run: int


class CanoError(Exception):
    """Base of every error of this engine."""


class ConfigurationError(CanoError, ValueError):
    """A definition or an argument is refused, before any user code runs; ``problems`` lists every one."""

    def __init__(self, message: str, problems: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.problems = tuple(problems) or (message,)


class WorkflowError(CanoError):
    """A run could not go on."""


class InvalidTransitionError(WorkflowError):
    """A task returned something that is no state."""


class UnknownStateError(WorkflowError, LookupError):
    """A task returned a state that is neither registered nor an exit state."""


class WorkflowTimeoutError(WorkflowError, TimeoutError):
    """A run used up its whole budget: ``elapsed`` of ``limit`` seconds."""

    def __init__(self, message: str, elapsed: float, limit: float) -> None:
        super().__init__(message)
        self.elapsed = elapsed
        self.limit = limit


class JoinError(WorkflowError, ExceptionGroup[Exception]):
    """A split failed; a group of every branch's own exception, in branch order, with the ``result`` of the split."""

    def __new__(cls, message: str, exceptions: Sequence[Exception], result: SplitResult) -> Self:  # noqa: ARG004
        return super().__new__(cls, message, exceptions)

    def __init__(self, message: str, exceptions: Sequence[Exception], result: SplitResult) -> None:
        ExceptionGroup.__init__(self, message, exceptions)
        self.result = result

    def derive(self, excs: Sequence[Exception]) -> JoinError:  # type: ignore[override]
        """A group of the same kind around some of the exceptions."""
        return type(self)(self.message, excs, self.result)


class JoinTimeoutError(JoinError):
    """The timeout of a split fell before its join was decided; the first member is a `TimeoutError`."""


class TaskExecutionError(CanoError):
    """A task failed."""


class RetryAfter(TaskExecutionError):
    """Raised in a task: the attempt failed, try again after ``delay`` seconds."""

    def __init__(self, delay: Seconds, message: str | None = None) -> None:
        self.delay = seconds("delay", delay)
        super().__init__(message if message is not None else f"retry after {self.delay} s")


class NonRetryable(TaskExecutionError):
    """Raised in a task: fail at once, whatever retries are left."""


class RetryExhaustedError(CanoError):
    """The last of ``attempts`` attempts failed; ``__cause__`` is that failure."""

    def __init__(self, message: str, attempts: int) -> None:
        super().__init__(message)
        self.attempts = attempts


class AttemptTimeoutError(CanoError, TimeoutError):
    """One attempt took longer than ``limit`` seconds."""

    def __init__(self, message: str, limit: float) -> None:
        super().__init__(message)
        self.limit = limit


_NEVER_RETRIED = (NonRetryable, ConfigurationError, InvalidTransitionError, UnknownStateError)
_MISTAKES = (TypeError, AttributeError, NameError, AssertionError, NotImplementedError)


def seconds(name: str, value: Seconds) -> float:
    """The duration as a float of seconds, 0 to ten years, in whole nanoseconds like that of the native core."""
    number = value.total_seconds() if isinstance(value, timedelta) else value
    if type(number) not in (int, float) or not 0 <= number <= _TEN_YEARS:
        raise ConfigurationError(f"{name} must be at least 0 and at most ten years ({_TEN_YEARS:.0f} s), got {value!r}")
    return round(float(number), 9)


def count(name: str, value: int, least: int, most: int | None = None) -> int:
    """The number, if it is a whole one within the bounds."""
    if type(value) is not int or value < least:
        raise ConfigurationError(f"{name} must be at least {least}, got {value!r}")
    if most is not None and value > most:
        raise ConfigurationError(f"{name} must be at most {most}, got {value!r}")
    return value


@dataclass(frozen=True, slots=True)
class RetryMode:
    """How often a failed task is repeated, and after which delays; made by `none`, `fixed` and `exponential`.

    With k the number of the attempt that failed, ``d = min(max_delay, base * factor**(k - 1))``, spread evenly over
    ``d * (1 - jitter) .. d * (1 + jitter)`` and cut to ``min(1 ms, d) .. max_delay``. A fixed delay is the case of
    factor 1, no jitter and no bound.
    """

    retries: int = 0
    base: float = 0.0
    factor: float = 1.0
    max_delay: float = math.inf
    jitter: float = 0.0

    @classmethod
    def none(cls) -> RetryMode:
        """One attempt."""
        return cls()

    @classmethod
    def fixed(cls, retries: int, delay: Seconds) -> RetryMode:
        """Up to ``1 + retries`` attempts with equal pauses."""
        return cls(count("retries", retries, 0, _MOST_RETRIES), seconds("delay", delay))

    @classmethod
    def exponential(
        cls,
        retries: int = 3,
        base: Seconds = 0.1,
        factor: float = 2.0,
        max_delay: Seconds = 30.0,
        jitter: float = 0.1,
    ) -> RetryMode:
        """Up to ``1 + retries`` attempts with growing pauses: by default about 0.1, 0.2 and 0.4 s."""
        first, bound = seconds("base", base), seconds("max_delay", max_delay)
        if not (math.isfinite(factor) and factor >= 1):
            raise ConfigurationError(f"factor must be finite and at least 1, got {factor!r}")
        if not 0 <= jitter <= 1:
            raise ConfigurationError(f"jitter must be at least 0 and at most 1, got {jitter!r}")
        if first > bound:
            raise ConfigurationError(f"base must be at most max_delay ({bound} s), got {first} s")
        return cls(count("retries", retries, 0, _MOST_RETRIES), first, factor, bound, jitter)

    def delay(self, failed: int, error: Exception) -> float:
        """Seconds to wait after the failure of attempt number ``failed``."""
        if isinstance(error, RetryAfter):
            return min(error.delay, self.max_delay)
        try:
            grown = min(self.max_delay, self.base * self.factor ** (failed - 1))
        except OverflowError:
            grown = self.max_delay if self.base else 0.0
        if not self.jitter:
            return grown
        spread = grown * (1 + self.jitter * (2 * random.random() - 1))
        return min(max(spread, min(_SHORTEST_DELAY, grown)), self.max_delay)


RetryOn = type[Exception] | tuple[type[Exception], ...] | Callable[[Exception], bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskConfig:
    """How a task is run; by default once, without a limit."""

    retry: RetryMode = RetryMode()
    retry_on: RetryOn = Exception
    attempt_timeout: Seconds | None = None

    def __post_init__(self) -> None:
        if self.attempt_timeout is not None:
            object.__setattr__(self, "attempt_timeout", seconds("attempt_timeout", self.attempt_timeout))

    def is_retryable(self, error: Exception) -> bool:
        """Whether the failure is one to repeat; a programming mistake only if ``retry_on`` names its kind."""
        if not self.retry.retries or isinstance(error, _NEVER_RETRIED):
            return False
        if isinstance(error, RetryAfter):
            return True
        if not isinstance(self.retry_on, type | tuple):
            return not isinstance(error, _MISTAKES) and bool(self.retry_on(error))
        if not isinstance(error, _MISTAKES):
            return isinstance(error, self.retry_on)
        named = self.retry_on if isinstance(self.retry_on, tuple) else (self.retry_on,)
        return any(isinstance(error, kind) and issubclass(kind, _MISTAKES) for kind in named)


Caught = Annotated[E, "Caught"]

_DEFINITION_ERRORS = (ConfigurationError, InvalidTransitionError, UnknownStateError)


class OnError(Generic[S]):
    """Which state follows which error: the most specific class decides.

    Mistakes in the definition answer to our own classes alone; a `RetryExhaustedError` stands for the failure that is its
    cause, unless it is named itself.
    """

    def __init__(self, given: Mapping[type[Exception] | tuple[type[Exception], ...], S]) -> None:
        self.states: dict[type[Exception], S] = {}
        for key, state in given.items():
            for kind in key if isinstance(key, tuple) else (key,):
                if not (isinstance(kind, type) and issubclass(kind, Exception)) or kind in self.states:
                    raise ConfigurationError(f"on_error takes subclasses of Exception, each once, got {kind!r}")
                self.states[kind] = state

    def find(self, error: Exception) -> tuple[Exception, S] | None:
        """The exception that a key matches, which may be the cause, and the state it leads to."""
        cause = error.__cause__
        if not isinstance(error, RetryExhaustedError) or not isinstance(cause, Exception):
            return self._match(error, type(error).__mro__)
        named = [kind for kind in type(error).__mro__ if issubclass(kind, RetryExhaustedError)]
        own = [kind for kind in type(error).__mro__ if issubclass(kind, CanoError)]
        return self._match(error, named) or self._match(cause, type(cause).__mro__) or self._match(error, own)

    def _match(self, error: Exception, kinds: Sequence[type]) -> tuple[Exception, S] | None:
        is_mistake = isinstance(error, _DEFINITION_ERRORS) or type(error) is WorkflowError
        for kind in kinds:
            if kind in self.states and (not is_mistake or issubclass(kind, CanoError)):
                return error, self.states[kind]
        return None


@dataclass(frozen=True, slots=True)
class JoinStrategy:
    """Which ends of its branches a split waits for."""

    name: str
    number: float = 1

    All: ClassVar[JoinStrategy]
    Any: ClassVar[JoinStrategy]
    PartialTimeout: ClassVar[JoinStrategy]

    @classmethod
    def Quorum(cls, n: int) -> JoinStrategy:
        """``n`` branches succeed."""
        return cls("Quorum", count("n in Quorum(n)", n, 1))

    @classmethod
    def Percentage(cls, p: float) -> JoinStrategy:
        """``ceil(p * total)`` branches succeed."""
        if isinstance(p, bool) or not 0 < p <= 1:
            raise ConfigurationError(f"p in Percentage(p) must be above 0 and at most 1, got {p!r}")
        return cls("Percentage", p)

    @classmethod
    def PartialResults(cls, n: int) -> JoinStrategy:
        """``n`` branches end, well or badly."""
        return cls("PartialResults", count("n in PartialResults(n)", n, 1))

    def __str__(self) -> str:
        return f"{self.name}({self.number})" if self.name in {"Quorum", "Percentage", "PartialResults"} else self.name

    @property
    def counts_failures(self) -> bool:
        """Whether a failed branch brings the decision nearer."""
        return self.name.startswith("Partial")

    @property
    def is_patient(self) -> bool:
        """Whether it waits for the timeout or the last branch even with enough ends."""
        return self.name == "PartialTimeout"

    def need(self, total: int) -> int:
        """How many of the ends that count are enough."""
        if self.name == "All":
            return total
        if self.name == "Percentage":  # 0.07 * 100 is 7.000000000000001 and must not ask for eight
            return max(1, math.ceil(round(self.number * total, 9)))
        return int(self.number)

    def problem(self, total: int | None, timeout: Seconds | None) -> str | None:
        """Why a split of ``total`` branches (None: not known yet) cannot be joined like this."""
        if self.is_patient and timeout is None:
            return "PartialTimeout needs a timeout, got None"
        if total is None:
            return None
        if total == 0 and self.name != "All":
            return f"{self} needs at least one branch, the split has none; only All joins an empty split"
        if self.need(total) > total:
            return f"{self} cannot be reached: the split has {total} branches"
        return None


JoinStrategy.All = JoinStrategy("All")
JoinStrategy.Any = JoinStrategy("Any")
JoinStrategy.PartialTimeout = JoinStrategy("PartialTimeout")


@dataclass(frozen=True, slots=True)
class JoinConfig(Generic[S]):
    """How a split is joined, and the state that follows."""

    strategy: JoinStrategy
    next_state: S
    timeout: Seconds | None = None
    bulkhead: int | None = None
    fail_fast: bool = False
    hedge_after: Seconds | None = None

    def __post_init__(self) -> None:
        if self.timeout is not None:
            object.__setattr__(self, "timeout", seconds("timeout", self.timeout))
        if self.hedge_after is not None:
            object.__setattr__(self, "hedge_after", seconds("hedge_after", self.hedge_after))
            if not self.hedge_after or self.strategy is not JoinStrategy.Any:
                raise ConfigurationError(
                    f"hedge_after must be above 0, with Any; got {self.hedge_after}, {self.strategy}"
                )
        if self.bulkhead is not None:
            count("bulkhead", self.bulkhead, 1)


@dataclass(slots=True)
class BranchOutcome:
    """How a branch ended: with a value, or with an ``error`` that is not None."""

    index: int
    name: str
    value: Any
    error: Exception | None
    elapsed: float


@dataclass(slots=True)
class SplitResult:
    """Every branch of a split, each list in branch order; ``cancelled`` holds indices."""

    successes: list[BranchOutcome] = field(default_factory=list)
    errors: list[BranchOutcome] = field(default_factory=list)
    cancelled: list[int] = field(default_factory=list)

    @property
    def completed_count(self) -> int:
        """The branches that ended with a value or an error."""
        return len(self.successes) + len(self.errors)

    @property
    def total_count(self) -> int:
        """All branches."""
        return self.completed_count + len(self.cancelled)

    def values(self) -> list[Any]:
        """The values of the successes."""
        return [outcome.value for outcome in self.successes]


class TaskResult:
    """What a task may return in place of a bare state."""

    @dataclass(frozen=True, slots=True)
    class Single:
        """One next state."""

        state: Hashable

    @dataclass(frozen=True, slots=True)
    class Split:
        """One branch for each state."""

        states: Sequence[Any]
