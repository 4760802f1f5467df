"""How one task is run: retries, what is worth a retry, the time limit of an attempt."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from datetime import timedelta
from functools import partial
from typing import Any, Literal, Self, TypeAlias

from . import _core
from ._core import CircuitBreaker, MultiRateLimiter, RateLimiter, RetryMode, WindowedRateLimiter
from ._errors import (
    CheckpointError,
    ConfigurationError,
    InvalidTransitionError,
    NonRetryable,
    OutputNotSerializableError,
    OutputTooLargeError,
    ResourceError,
    UnknownStateError,
    show,
)

Seconds: TypeAlias = float | int | timedelta
"""A duration: seconds as a number, or a timedelta; 0 to ten years."""

FINAL_ERRORS: tuple[type[Exception], ...] = (
    NonRetryable,
    CheckpointError,
    ConfigurationError,
    InvalidTransitionError,
    UnknownStateError,
    ResourceError,
    OutputNotSerializableError,
    OutputTooLargeError,
)
_NEVER_RETRIED: tuple[type[Exception], ...] = (
    TypeError,
    AttributeError,
    NameError,
    AssertionError,
    NotImplementedError,
    *FINAL_ERRORS,
)


def configure(*, branches: Literal["native", "asyncio"]) -> None:
    """Choose how splits run their branches from now on, in the whole process.

    Args:
        branches: "native", the default, starts each branch inside its parent's step, as a task of cano's own that needs no
            turn of the loop to begin or to report its end. "asyncio" makes an `asyncio.Task` of each branch (compatibility
            mode). A loop in debug mode or with a task factory always gets asyncio's tasks.

    Raises:
        ConfigurationError: `branches` is neither.

    Example:
        >>> configure(branches="native")
    """
    if branches not in ("native", "asyncio"):
        raise ConfigurationError(f"branches must be 'native' or 'asyncio', got {show(branches)}")
    _core.configure_branches(branches == "native")


class _Prepared:
    """Holds what the driver reads: derived from the fields, not one of them; None where there is nothing to look after."""

    __slots__ = ("_policy",)
    _policy: _core.Policy | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskConfig(_Prepared):
    """How a task is run; without one it runs once, with no time limit.

    Attempt k of n fails -> delay(k) -> attempt k + 1; the last failure raises `RetryExhaustedError`.

    Attributes:
        retry: How often and after which delay a failed attempt is repeated.
        retry_on: What is worth another attempt: an exception type, a tuple of them, or a predicate. TypeError,
            AttributeError, NameError, AssertionError, NotImplementedError and cano's own definition errors are not,
            unless a type here names them (or a subclass of them), or the predicate says so. A failure that is not worth
            a retry leaves the run as it is.
        attempt_timeout: Seconds that one attempt may take, counted from its start; None is no limit. A longer attempt is
            cancelled at its next suspension and fails with `AttemptTimeoutError`, which is retried like any failure.
        circuit_breaker: Asked before each attempt, and told how it ended: returned, raised an Exception (a time-out is one),
            or neither, when it was cancelled. One that is open ends the state with `CircuitOpenError`, whatever retries are
            left, and the task is not called. It may be shared by any number of tasks. None lets every attempt through.
        rate_limiter: Charged before each attempt, with a cost of 1 or that of each tier; the attempt waits for its turn, in
            the line of all who use the limiter. The wait is no part of the attempt's time. It may be shared by any number of
            tasks. None lets every attempt through. With a circuit breaker as well, nobody waits for one that is open.

    Raises:
        ConfigurationError: A value is out of range or of the wrong type.

    Example:
        >>> TaskConfig().with_fixed_retry(3, 0.2).with_attempt_timeout(1.5).attempt_timeout
        1.5
    """

    retry: RetryMode = field(default_factory=RetryMode.none)
    retry_on: type[Exception] | tuple[type[Exception], ...] | Callable[[Exception], bool] = Exception
    attempt_timeout: Seconds | None = None
    circuit_breaker: CircuitBreaker | None = None
    rate_limiter: RateLimiter | WindowedRateLimiter | MultiRateLimiter | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.retry, RetryMode):
            raise ConfigurationError(f"retry must be a RetryMode, got {show(self.retry)}")
        breaker = self.circuit_breaker
        if breaker is not None and not isinstance(breaker, CircuitBreaker):
            raise ConfigurationError(f"circuit_breaker must be a CircuitBreaker or None, got {show(breaker)}")
        limit = _core.seconds("attempt_timeout", self.attempt_timeout)
        explicit, limiter = _explicit(self.retry_on), self.rate_limiter
        policy = _core.Policy(self.retry, self.retry_on, explicit, _NEVER_RETRIED, limit, breaker, limiter)
        acts = self.retry != RetryMode.none() or any(part is not None for part in (limit, breaker, limiter))
        object.__setattr__(self, "attempt_timeout", limit)
        object.__setattr__(self, "_policy", policy if acts else None)

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(type(self), **{item.name: getattr(self, item.name) for item in fields(self)}), ()

    @classmethod
    def minimal(cls) -> Self:
        """One attempt, no time limit: the same as ``TaskConfig()``."""
        return cls()

    def with_fixed_retry(self, retries: int, delay: Seconds) -> Self:
        """A copy that repeats a failed attempt up to `retries` times, `delay` seconds after each failure."""
        return replace(self, retry=RetryMode.fixed(retries, delay))

    def with_exponential_retry(
        self,
        retries: int = 3,
        base: Seconds = 0.1,
        *,
        factor: float = 2.0,
        max_delay: Seconds = 30.0,
        jitter: float = 0.1,
    ) -> Self:
        """A copy that repeats a failed attempt up to `retries` times, after longer and longer delays.

        The delay before attempt k + 1 is ``min(max_delay, base * factor ** (k - 1))``, spread by plus or minus `jitter`
        (a fraction, 0 to 1) and never above `max_delay`: by default about 0.1, 0.2 and 0.4 s.
        """
        mode = RetryMode.exponential(retries, base, factor=factor, max_delay=max_delay, jitter=jitter)
        return replace(self, retry=mode)

    def with_attempt_timeout(self, seconds: Seconds | None) -> Self:
        """A copy whose attempts may take `seconds` each; None is no limit."""
        return replace(self, attempt_timeout=seconds)

    def with_circuit_breaker(self, breaker: CircuitBreaker | None) -> Self:
        """A copy whose attempts the breaker lets through or refuses; None lets each through."""
        return replace(self, circuit_breaker=breaker)

    def with_rate_limiter(self, limiter: RateLimiter | WindowedRateLimiter | MultiRateLimiter | None) -> Self:
        """A copy whose attempts wait for the limiter; None lets each through."""
        return replace(self, rate_limiter=limiter)


def _explicit(retry_on: Any) -> tuple[type[Exception], ...] | None:
    """The types of `retry_on` that overrule the never-retried ones; None for a predicate, which decides alone."""
    types = retry_on if isinstance(retry_on, tuple) else (retry_on,)
    if all(isinstance(one, type) and issubclass(one, Exception) for one in types):
        return tuple(one for one in types if issubclass(one, _NEVER_RETRIED))
    if callable(retry_on) and not isinstance(retry_on, type):
        return None
    raise ConfigurationError(
        f"retry_on must be a subclass of Exception, a tuple of them, or a predicate, got {show(retry_on)}"
    )
