"""The processing models as users write them: optional bases, what their methods return, and their policies.

A model is a task that is written as several methods, or as one method that is called again and again; the loop around them is
cano's. The parameters of each method are filled in by annotation, after those that it is given.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, ClassVar, Generic, Self, TypeVar, final

from . import _core
from ._config import Seconds
from ._core import RetryMode, StreamWindow
from ._errors import ConfigurationError, show
from ._tasks import Task

S = TypeVar("S", bound=Hashable)
C = TypeVar("C")


def _seconds(name: str, value: Seconds) -> float:
    if value is None:
        raise ConfigurationError(f"{name} must be seconds as a number or a timedelta, got None")
    return _core.seconds(name, value)


# --- router ----------------------------------------------------------------------------------------------------------


class RouterTask(Task[S]):
    """Optional base of a task that only chooses the next state; it is registered with `Workflow.register_router`.

    Write ``route()``, async or plain: it returns the next state. A router reads and changes nothing, so there is nothing of
    it to record.

    Example:
        >>> class BySize(RouterTask[str]):
        ...     def route(self, res: Resources) -> str:
        ...         return "small" if res.get("total", int) < 100 else "large"
        >>> workflow = Workflow({"total": 250}).register_router("sort", BySize()).add_exit_states(["small", "large"])
        >>> asyncio.run(workflow.orchestrate("sort"))
        'large'
    """


# --- poll ------------------------------------------------------------------------------------------------------------


@final
@dataclass(frozen=True, slots=True)
class Ready(Generic[S]):
    """What ``poll`` returns when the wait is over.

    Attributes:
        state: The next state.
    """

    state: S


@final
@dataclass(frozen=True, slots=True)
class Pending:
    """What ``poll`` returns to be called again.

    Attributes:
        delay: Seconds to sleep before that; with 0 the event loop still gets a turn.

    Raises:
        ConfigurationError: `delay` is out of range or no duration.
    """

    delay: Seconds = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "delay", _seconds("delay", self.delay))


@final
@dataclass(frozen=True, slots=True, repr=False)
class PollErrorPolicy:
    """What happens when ``poll`` raises.

    - ``FailFast``, the default: the error is the task's.
    - ``RetryOnError(retries)``: up to so many errors in a row are got over; a ``Pending`` starts the count anew.
    """

    _retries: int

    FailFast: ClassVar[PollErrorPolicy]

    @staticmethod
    def RetryOnError(retries: int) -> PollErrorPolicy:
        """Get over up to `retries` errors in a row; the next one is the task's.

        After the k-th error in a row it sleeps ``min(30, 0.1 * 2 ** (k - 1))`` seconds, spread by plus or minus a tenth:
        about 0.1, 0.2 and 0.4 s. What is worth a retry is what is in a task's attempts: not a TypeError and its like, nor
        NonRetryable; RetryAfter sets the delay, to 30 s at most. Each error that is got over is logged as a warning of the
        logger "cano".

        Args:
            retries: 0 to 1,000,000; 0 is ``FailFast``.

        Raises:
            ConfigurationError: `retries` is out of range or no int.

        Example:
            >>> PollErrorPolicy.RetryOnError(3)
            PollErrorPolicy.RetryOnError(3)
        """
        RetryMode.fixed(retries, 0)  # refuses what is no count
        return PollErrorPolicy(retries)

    def __repr__(self) -> str:
        return f"PollErrorPolicy.RetryOnError({self._retries})" if self._retries else "PollErrorPolicy.FailFast"


PollErrorPolicy.FailFast = PollErrorPolicy(0)


class PollTask(Task[S]):
    """Optional base of a task that looks again and again until something is ready.

    Write ``poll()``, async or plain: it returns ``Ready(state)`` or ``Pending(delay)``. The whole loop is one attempt of the
    task: ``attempt_timeout`` bounds it, a retry of the configuration begins it anew. Without an ``attempt_timeout`` only the
    run's timeout does.

    Attributes:
        on_poll_error: What happens when ``poll`` raises; read once, when the task is registered.

    Example:
        >>> class Upload(PollTask[str]):
        ...     seen = 0
        ...
        ...     async def poll(self) -> Ready[str] | Pending:
        ...         self.seen += 1
        ...         return Ready("done") if self.seen == 3 else Pending(60)
        >>> asyncio.run(Workflow().register("wait", Upload()).add_exit_state("done").orchestrate("wait"))
        'done'
    """

    on_poll_error: PollErrorPolicy = PollErrorPolicy.FailFast


# --- timer -----------------------------------------------------------------------------------------------------------


@final
@dataclass(frozen=True, slots=True)
class After:
    """What ``wait`` returns to sleep for a time.

    Attributes:
        seconds: 0 to ten years; 0 gives the event loop a turn.

    Raises:
        ConfigurationError: `seconds` is out of range or no duration.
    """

    seconds: Seconds

    def __post_init__(self) -> None:
        object.__setattr__(self, "seconds", _seconds("seconds", self.seconds))


@final
@dataclass(frozen=True, slots=True)
class Until:
    """What ``wait`` returns to sleep until an instant; one that has passed gives the event loop a turn.

    Attributes:
        instant: An aware datetime, or a time of the event loop's clock (``loop.time()``).

    Raises:
        ConfigurationError: `instant` is a datetime without a time zone, not finite, or neither.
    """

    instant: datetime | float

    def __post_init__(self) -> None:
        if isinstance(self.instant, datetime):
            if self.instant.utcoffset() is None:
                raise ConfigurationError(
                    f"instant must be an aware datetime, got {self.instant.isoformat()}, which names no time zone"
                )
        elif not _is_finite(self.instant):
            raise ConfigurationError(
                f"instant must be an aware datetime or a finite time of the loop's clock, got {show(self.instant)}"
            )


def _is_finite(value: Any) -> bool:
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an int beyond any float
        return False


class TimerTask(Task[S]):
    """Optional base of a task that sleeps once and then goes on.

    Write ``wait()``, which returns ``After(seconds)`` or ``Until(instant)``, and ``after_wait()``, which returns the next
    state; both async or plain. The time to sleep is fixed when ``wait`` returns, so a wall clock that is set meanwhile
    changes nothing. It lives in this process only: a run that is started again waits from the beginning.

    Example:
        >>> class CoolDown(TimerTask[str]):
        ...     def wait(self) -> After:
        ...         return After(6 * 3600)
        ...
        ...     def after_wait(self) -> str:
        ...         return "done"
        >>> cano.testing.run(Workflow().register("rest", CoolDown()).add_exit_state("done").orchestrate("rest"))
        'done'
    """


# --- stepped ---------------------------------------------------------------------------------------------------------


@final
@dataclass(frozen=True, slots=True)
class More(Generic[C]):
    """What ``step`` returns to be called again.

    Attributes:
        cursor: What the next step is given, any value.
    """

    cursor: C


@final
@dataclass(frozen=True, slots=True)
class Done(Generic[S]):
    """What the last ``step`` returns.

    Attributes:
        state: The next state.
    """

    state: S


class SteppedTask(Task[S]):
    """Optional base of a task that works in steps; it is registered with `Workflow.register_stepped`.

    Write ``step(cursor)``, async or plain: it returns ``More(cursor)`` or ``Done(state)``. The first step gets None, each
    other one the cursor that the step before returned. Each step is an attempt of its own: it has all the retries of the
    configuration, always with the same cursor, and the whole ``attempt_timeout``. ``RunContext.idempotency_key`` is that of
    the visit, the same in every step.

    Example:
        >>> class CountDown(SteppedTask[str]):
        ...     def step(self, cursor: int | None) -> More[int] | Done[str]:
        ...         left = 3 if cursor is None else cursor
        ...         return More(left - 1) if left else Done("done")
        >>> asyncio.run(Workflow().register_stepped("count", CountDown()).add_exit_state("done").orchestrate("count"))
        'done'
    """


# --- stream ----------------------------------------------------------------------------------------------------------


@final
class Continue:
    """What ``flush_window`` returns to go on with the stream; as it is, without a call."""

    def __new__(cls) -> Self:
        raise ConfigurationError("Continue is returned as it is, without a call")


@final
@dataclass(frozen=True, slots=True)
class Stop(Generic[S]):
    """What ``flush_window`` returns to end the stream; ``on_close`` is not called.

    Attributes:
        state: The next state.
    """

    state: S


@final
@dataclass(frozen=True, slots=True, repr=False)
class ItemErrorPolicy:
    """What happens when ``process_item`` raises, or takes longer than the ``attempt_timeout``.

    - ``FailFast``, the default: the error ends the stream.
    - ``Skip``: the item is dropped, counted in `StreamProgress` and logged as a warning of the logger "cano".
    - ``Retry(retries)``: the same item is tried again, up to so many times.

    Neither gets over NonRetryable, nor over an error of the definition, such as a resource that is missing.
    """

    _retries: int | None

    FailFast: ClassVar[ItemErrorPolicy]
    Skip: ClassVar[ItemErrorPolicy]

    @staticmethod
    def Retry(retries: int) -> ItemErrorPolicy:
        """Try the same item up to `retries` times more; what it raises then ends the stream.

        The pauses, what is worth a retry and the log are those of `PollErrorPolicy.RetryOnError`.

        Args:
            retries: 0 to 1,000,000; 0 is ``FailFast``.

        Raises:
            ConfigurationError: `retries` is out of range or no int.

        Example:
            >>> ItemErrorPolicy.Retry(3)
            ItemErrorPolicy.Retry(3)
        """
        RetryMode.fixed(retries, 0)  # refuses what is no count
        return ItemErrorPolicy(retries)

    def __repr__(self) -> str:
        named = {None: "Skip", 0: "FailFast"}.get(self._retries, f"Retry({self._retries})")
        return f"ItemErrorPolicy.{named}"


ItemErrorPolicy.FailFast = ItemErrorPolicy(0)
ItemErrorPolicy.Skip = ItemErrorPolicy(None)


@final
@dataclass(slots=True)
class StreamProgress:
    """How far a stream has come; a parameter annotated with it gets the stream's own, which goes on counting.

    Attributes:
        cursor: The newest committed cursor: that of the last item of the last window that was flushed; None before.
        outputs: How many items were processed.
        skipped: How many items were dropped by ``ItemErrorPolicy.Skip``.
        windows: How many windows were flushed.
    """

    cursor: Any = None
    outputs: int = 0
    skipped: int = 0
    windows: int = 0


class StreamTask(Task[S]):
    """Optional base of a task that reads a source without end; it is registered with `Workflow.register_stream`.

    Write these methods, async or plain:

    - ``open(cursor)``: the source, an async iterator; it may be an async generator function. The cursor is None.
    - ``process_item(item)``: a pair ``(output, cursor)``; the cursor tells where to go on after this item.
    - ``flush_window(outputs)``: the list of outputs of one window, in order, at most once each. ``Continue``, or
      ``Stop(state)`` to end here. When it returns, the cursor of the last item is committed.
    - ``on_close(reason)``: the next state, when the source has ended ("exhausted"). It is also called when the run is
      cancelled or out of time ("cancelled"); then its result is not used.

    Items are processed one after another. When the source ends, what is left is flushed as a last window. An error, other
    than those that `on_item_error` gets over, ends the stream: the open window is dropped, ``on_close`` is not called. However
    it ends, the source is closed (``aclose``) before it is over.

    ``attempt_timeout`` bounds each call of a method; reading the source is not bounded. Nothing else of a configuration
    applies to a stream, and is refused.

    Cancellation: the source is closed, the open window flushed, its cursor committed and ``on_close("cancelled")`` called, in
    that order and whatever they raise; then the cancel goes on, or the last error that they raised. The item that was being
    processed is dropped. A window whose flush was interrupted is not flushed again, nor is its cursor committed.

    Attributes:
        window: When outputs are flushed; read once, when the task is registered, as is the next one.
        on_item_error: What happens when an item fails.

    Example:
        >>> class Sums(StreamTask[str]):
        ...     window = StreamWindow.Count(2)
        ...
        ...     async def open(self, cursor):
        ...         for number in range(5):
        ...             yield number
        ...
        ...     def process_item(self, item):
        ...         return item * 10, item
        ...
        ...     def flush_window(self, outputs):
        ...         print(outputs)
        ...         return Continue
        ...
        ...     def on_close(self, reason):
        ...         return "done"
        >>> asyncio.run(Workflow().register_stream("sum", Sums()).add_exit_state("done").orchestrate("sum"))
        [0, 10]
        [20, 30]
        [40]
        'done'
    """

    window: StreamWindow = StreamWindow.Count(1)
    on_item_error: ItemErrorPolicy = ItemErrorPolicy.FailFast
