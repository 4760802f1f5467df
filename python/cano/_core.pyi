from asyncio import Future
from collections.abc import Awaitable, Callable, Coroutine, Generator, Hashable, Iterable, Iterator, Sequence
from os import PathLike
from types import TracebackType
from typing import Any, ClassVar, Final, TypeVar, final, overload

from typing_extensions import disjoint_base

from ._breaker import CircuitSnapshot, CircuitState
from ._checkpoints import RowKind, RunStatus, RunSummary
from ._config import Seconds
from ._durable import Definition
from ._join import JoinConfig
from ._resources import Resources

__all__ = [
    "BranchOutcome",
    "Bulkhead",
    "CheckpointRow",
    "CircuitBreaker",
    "CircuitPolicy",
    "Compensation",
    "Completion",
    "ErrorContext",
    "Factory",
    "Filling",
    "InMemoryCheckpointStore",
    "JoinStrategy",
    "Limiter",
    "LimiterSnapshot",
    "Log",
    "MemoryStore",
    "MultiRateLimiter",
    "Permit",
    "Plan",
    "Policy",
    "RateLimiter",
    "RateLimiterPolicy",
    "Resumed",
    "RetryMode",
    "Run",
    "RunContext",
    "Split",
    "SplitResult",
    "SqliteCheckpointStore",
    "Standing",
    "StreamWindow",
    "Table",
    "TaskSpec",
    "WaitingCall",
    "WindowPolicy",
    "WindowedRateLimiter",
    "__version__",
    "check_fence",
    "check_workflow_id",
    "configure_branches",
    "decode_log",
    "encode_within_limits",
    "limits_of_runs",
    "rules_of_claims",
    "seconds",
    "set_virtual_time",
]
__version__: Final[str]

_T = TypeVar("_T")
_D = TypeVar("_D")

def configure_branches(native: bool, /) -> None: ...
def set_virtual_time(seconds: float | None, /) -> None: ...
def check_fence(fence: int, /) -> int: ...
def check_workflow_id(workflow_id: str, /) -> None: ...
def decode_log(workflow_id: str, stored: list[tuple[int, bytes]], next_sequence: int, /) -> list[CheckpointRow]: ...
def encode_within_limits(workflow_id: str, row: CheckpointRow, /) -> bytes: ...
def limits_of_runs() -> tuple[int, int]: ...
def rules_of_claims() -> list[tuple[str, str, str]]: ...
@overload
def seconds(name: str, value: Seconds, /) -> float: ...
@overload
def seconds(name: str, value: Seconds | None, /) -> float | None: ...

@final
class RetryMode:
    """How often a failed attempt is repeated, and after which delay.

    Made by `none`, `fixed` and `exponential`; equal modes compare equal.
    """

    @staticmethod
    def none() -> RetryMode:
        """One attempt, whatever happens."""

    @staticmethod
    def fixed(retries: int, delay: Seconds) -> RetryMode:
        """Up to `retries` more attempts, `delay` seconds after each failure.

        Args:
            retries: 0 to 1,000,000; 0 is `none`.
            delay: Seconds, 0 to ten years.

        Raises:
            ConfigurationError: A value is out of range or of the wrong type.

        Example:
            >>> RetryMode.fixed(3, 0.2)
            RetryMode.fixed(3, 0.2)
        """

    @staticmethod
    def exponential(
        retries: int = 3,
        base: Seconds = 0.1,
        *,
        factor: float = 2.0,
        max_delay: Seconds = 30.0,
        jitter: float = 0.1,
    ) -> RetryMode:
        """Up to `retries` more attempts, after longer and longer delays.

        The delay after failure k is ``d = min(max_delay, base * factor ** (k - 1))``, drawn from
        ``d * (1 - jitter)`` to ``d * (1 + jitter)`` and never above `max_delay`: by default about 0.1, 0.2 and 0.4 s.

        Args:
            retries: 0 to 1,000,000; 0 is `none`.
            base: Seconds after the first failure, at most `max_delay`; 0 stays 0, anything else is never drawn below 1 ms
                (or below itself, if it is shorter).
            factor: 1 or more, finite.
            max_delay: Seconds that no delay exceeds, jitter included, nor one asked for with `RetryAfter`.
            jitter: A fraction, 0 to 1. The dice are Python's `random`.

        Raises:
            ConfigurationError: A value is out of range or of the wrong type.
        """

    def __eq__(self, other: object, /) -> bool: ...
    def __ne__(self, other: object, /) -> bool: ...
    def __hash__(self, /) -> int: ...
    def __reduce__(self) -> tuple[object, ...]: ...

@final
class JoinStrategy:
    """When a split may go on.

    - ``All``: all branches succeeded.
    - ``Any``: one succeeded; the others are cancelled.
    - ``Quorum(n)``: n succeeded; the others are cancelled.
    - ``Percentage(p)``: ``ceil(p * branches)`` succeeded; the others are cancelled.
    - ``PartialResults(n)``: n ended, well or badly; the others are cancelled.
    - ``PartialTimeout``: the join's timeout passed, or all ended; the others are cancelled.

    A strategy that every branch's end leaves unreached fails the join with `JoinError`.
    """

    All: ClassVar[JoinStrategy]
    Any: ClassVar[JoinStrategy]
    PartialTimeout: ClassVar[JoinStrategy]

    @staticmethod
    def Quorum(n: int) -> JoinStrategy:
        """Go on once `n` branches succeeded, 1 or more.

        Raises:
            ConfigurationError: `n` is below 1 or no int. More than the split has branches is refused when the workflow is
                validated.
        """

    @staticmethod
    def Percentage(p: float) -> JoinStrategy:
        """Go on once ``ceil(p * branches)`` branches succeeded.

        Args:
            p: A fraction above 0, at most 1.

        Raises:
            ConfigurationError: `p` is out of range or no number.
        """

    @staticmethod
    def PartialResults(n: int) -> JoinStrategy:
        """Go on once `n` branches ended, well or badly, 1 or more.

        Raises:
            ConfigurationError: `n` is below 1 or no int. More than the split has branches is refused when the workflow is
                validated.
        """

    def __eq__(self, other: object, /) -> bool: ...
    def __ne__(self, other: object, /) -> bool: ...
    def __hash__(self, /) -> int: ...
    def __reduce__(self) -> tuple[object, ...]: ...

@final
class Bulkhead:
    """A limit to how much happens at once, shared by whoever has this object: splits, tasks, runs, loops, threads.

    It has `limit` slots. A split with ``JoinConfig(bulkhead=...)`` takes one for each branch that it starts, and gives it back
    when the branch has ended. ``async with bulkhead:`` takes one for the block. Who finds none free waits in one line, first
    come, first served; a split stands there once, and again at the end when it has been given a slot and wants another.

    A slot is never given to somebody who has gone: a cancelled task, a split that is decided, a loop that is closed. It goes on
    to the next.

    Waiting for a slot while holding one of the same bulkhead can wait for ever: splits nested over one bulkhead, or a branch
    that enters it once more.

    Args:
        limit: How many slots, 1 to 1,000,000,000.
        name: What its repr calls it; None is nothing.

    Raises:
        ConfigurationError: `limit` is out of range, or a value of the wrong type.

    Cancellation: a task that is cancelled while it waits leaves the line; if the slot has come in the same turn of the loop, it
    goes on to the next.

    Example:
        >>> database = Bulkhead(2, name="database")
        >>> async def main() -> None:
        ...     async with database:
        ...         print(database)
        >>> asyncio.run(main())
        <Bulkhead database limit=2 in_use=1 waiting=0>
    """

    def __new__(cls, limit: int, *, name: str | None = None) -> Bulkhead: ...
    @property
    def limit(self) -> int:
        """How many slots there are."""

    @property
    def in_use(self) -> int:
        """How many slots are not free."""

    @property
    def waiting(self) -> int:
        """How many splits and tasks wait for a slot."""

    @property
    def name(self) -> str | None:
        """Its name, or None."""

    def __aenter__(self) -> Awaitable[None]: ...
    def __aexit__(self, *_error: object) -> Awaitable[None]: ...

@final
class StreamWindow:
    """When the outputs of a stream are flushed.

    - ``Count(n)``: n at a time.
    - ``Duration(seconds)``: those of each stretch of time.

    What is left when the source ends is flushed as well; a window without outputs is not.
    """

    @staticmethod
    def Count(n: int) -> StreamWindow:
        """Flush `n` outputs at a time, 1 to 1,000,000,000.

        Raises:
            ConfigurationError: `n` is out of range or no int.
        """

    @staticmethod
    def Duration(seconds: Seconds) -> StreamWindow:
        """Flush what came together at ``start + k * seconds``, k = 1, 2, 3...

        The start is when the source was opened, on the event loop's clock; the ends do not drift, whatever items and flushes
        cost. An item that is being processed at an end belongs to that window, which is flushed as soon as it is done. The
        source is read in a task of its own, with a copy of the context variables.

        Args:
            seconds: Above 0, at most ten years.

        Raises:
            ConfigurationError: `seconds` is out of range or no duration.
        """

    def _open(self, now: float) -> Filling: ...
    @property
    def _is_timed(self) -> bool: ...
    def __eq__(self, other: object, /) -> bool: ...
    def __ne__(self, other: object, /) -> bool: ...
    def __hash__(self, /) -> int: ...
    def __reduce__(self) -> tuple[object, ...]: ...

@final
class Filling:
    def add(self, now: float) -> None: ...
    def is_due(self, now: float) -> bool: ...
    @property
    def end(self) -> float | None: ...
    def hand_over(self) -> None: ...

@final
class BranchOutcome:
    """One branch that succeeded or failed.

    Attributes:
        index: Its place in the split, 0 for the first.
        name: The name of its task, or of the state it started in.
        value: What it returned; None if it failed.
        error: What it raised; None if it succeeded.
        elapsed: Seconds from its start to its end.
    """

    def __new__(
        cls,
        index: int,
        name: str,
        value: object = None,
        error: Exception | None = None,
        elapsed: float = 0.0,
    ) -> BranchOutcome: ...
    @property
    def index(self) -> int: ...
    @property
    def name(self) -> str: ...
    @property
    def value(self) -> Any: ...
    @property
    def error(self) -> Exception | None: ...
    @property
    def elapsed(self) -> float: ...
    def __reduce__(self) -> tuple[object, ...]: ...

@final
class ErrorContext:
    """Where a run was when an exception left a task.

    Attributes:
        state: The state whose task failed; None when the run failed outside a state.
        task: Name of the task; None when no task was running.
        attempt: 1-based number of the attempt that failed; 0 when no attempt had finished (a whole-run timeout).
        max_attempts: How many attempts the task's configuration allows.
        path: The states entered so far, oldest first, the failing state last; at most the newest 256.
        entered: How many states were entered in all; more than ``len(path)`` in a long run.
        workflow_id: The id given to the run, or None.
        branch: Index of the split branch that failed, in registration order; None outside a split.
        sequence: Which run of this process it was. Runs are numbered as they start.
    """

    def __new__(
        cls,
        state: Hashable | None,
        task: str | None,
        attempt: int,
        max_attempts: int,
        path: tuple[Hashable, ...],
        entered: int,
        workflow_id: str | None,
        branch: int | None,
        sequence: int,
    ) -> ErrorContext: ...
    @property
    def state(self) -> Hashable | None: ...
    @property
    def task(self) -> str | None: ...
    @property
    def attempt(self) -> int: ...
    @property
    def max_attempts(self) -> int: ...
    @property
    def path(self) -> tuple[Hashable, ...]: ...
    @property
    def entered(self) -> int: ...
    @property
    def workflow_id(self) -> str | None: ...
    @property
    def branch(self) -> int | None: ...
    @property
    def sequence(self) -> int: ...
    def __eq__(self, other: object, /) -> bool: ...
    def __hash__(self, /) -> int: ...
    def __reduce__(self) -> tuple[object, ...]: ...

@final
class SplitResult:
    """Every outcome of a split, handed to the task of the state it joins into.

    Made by hand only in tests, from outcomes in any order and the indices of the cancelled branches.

    Raises:
        ConfigurationError: The indices are not 0, 1, 2... once each.

    Example:
        >>> SplitResult([BranchOutcome(0, "fast", 7)], cancelled=[1]).values()
        [7]
    """

    def __new__(cls, outcomes: Sequence[BranchOutcome], cancelled: Sequence[int] = ()) -> SplitResult: ...
    @property
    def successes(self) -> list[BranchOutcome]:
        """The branches that returned, in branch order."""

    @property
    def errors(self) -> list[BranchOutcome]:
        """The branches that raised, in branch order."""

    @property
    def cancelled(self) -> list[int]:
        """Indices of the branches that were cancelled or never started, ascending."""

    @property
    def completed_count(self) -> int:
        """How many branches ended, well or badly."""

    @property
    def total_count(self) -> int:
        """How many branches the split has."""

    def values(self) -> list[Any]:
        """What the successful branches returned, in branch order."""

    def _outcomes(self) -> list[BranchOutcome]: ...
    def __reduce__(self) -> tuple[object, ...]: ...

@final
class RunContext:
    """Where a task is in its run; a parameter annotated with it gets a fresh one in each attempt."""

    @property
    def workflow_id(self) -> str | None:
        """The id given to the run, or None."""

    @property
    def run_id(self) -> str:
        """A random id of this run, 32 hexadecimal digits."""

    @property
    def state(self) -> Any:
        """The state; in a branch, the one that was split."""

    @property
    def attempt(self) -> int:
        """1-based number of the attempt."""

    @property
    def visit(self) -> int:
        """1-based count of entries to this state in this run."""

    @property
    def branch(self) -> int | None:
        """Index of the branch, in registration order; None outside a split."""

    def remaining(self) -> float:
        """Seconds left of the whole run's timeout, 0 or more; infinity without one."""

    @property
    def idempotency_key(self) -> str:
        """A text to give to services that must not act twice, 32 hexadecimal digits.

        The same in every attempt of one visit; another one in each visit and each branch. A durable run has the same again
        after a crash and a resume, and a new run under its workflow id has others. Of runs that are not durable, those with the
        same workflow id have the same, and those without one have others each.
        """

@final
class CircuitPolicy:
    """When a circuit breaker opens, and how it closes again.

    The constructor is for failures in a row, `rate` for a share of the calls in a window. Equal policies compare equal.

    Args:
        failure_threshold: How many failures without a success between them open the breaker, 1 to 1,000,000.
        reset_timeout: Seconds that it stays open before probes are let through, above 0.
        half_open_max_calls: How many probes may be in flight at once, and how many must succeed to close it, 1 to 10,000.
        probe_timeout: Seconds that a probe holds its place, above 0; longer than any healthy call. The place of a probe
            that takes this long is free again, and its outcome counts for nothing.

    Raises:
        ConfigurationError: A value is out of range or of the wrong type.

    Example:
        >>> CircuitPolicy(3, 10)
        CircuitPolicy(failure_threshold=3, reset_timeout=10.0, half_open_max_calls=1, probe_timeout=60.0)
    """

    def __new__(
        cls,
        failure_threshold: int = 5,
        reset_timeout: Seconds = 30.0,
        half_open_max_calls: int = 1,
        *,
        probe_timeout: Seconds = 60.0,
    ) -> CircuitPolicy: ...
    @staticmethod
    def rate(
        failure_rate: float | None = None,
        *,
        calls: int | None = None,
        seconds: Seconds | None = None,
        minimum_calls: int | None = None,
        slow_call_duration: Seconds | None = None,
        slow_call_rate: float | None = None,
        reset_timeout: Seconds = 30.0,
        half_open_max_calls: int = 1,
        probe_timeout: Seconds = 60.0,
    ) -> CircuitPolicy:
        """A policy for the share of failures, of slow calls, or of either.

        After each outcome that counts, the breaker opens if the window holds `minimum_calls` and
        ``failures / calls >= failure_rate`` or ``slow calls / calls >= slow_call_rate``. A probe that is a slow call opens
        it again, as one that fails.

        Args:
            failure_rate: A fraction above 0, at most 1; None does not look at failures.
            calls: The window is the last so many calls, 1 to 10,000.
            seconds: The window is the last so many seconds, above 0, to a 16th of them. Give this or `calls`.
            minimum_calls: How many calls the window must hold before it says anything, 1 to 1,000,000 and at most `calls`;
                None is 10, or `calls` if that is fewer.
            slow_call_duration: Seconds from the permit to the outcome from which on a call is slow, however it ends, above
                0; None does not look at slow calls. Needs `slow_call_rate`.
            slow_call_rate: A fraction above 0, at most 1.
            reset_timeout: As in the constructor.
            half_open_max_calls: As in the constructor.
            probe_timeout: As in the constructor.

        Raises:
            ConfigurationError: A value is out of range or of the wrong type, the window is missing or given twice, or
                there is neither a failure rate nor a slow call rate.

        Example:
            >>> policy = CircuitPolicy.rate(0.5, calls=100, slow_call_duration=2, slow_call_rate=0.8)
            >>> policy.minimum_calls, policy.failure_threshold
            (10, None)
        """

    @property
    def failure_threshold(self) -> int | None: ...
    @property
    def failure_rate(self) -> float | None: ...
    @property
    def calls(self) -> int | None: ...
    @property
    def seconds(self) -> float | None: ...
    @property
    def minimum_calls(self) -> int | None: ...
    @property
    def slow_call_duration(self) -> float | None: ...
    @property
    def slow_call_rate(self) -> float | None: ...
    @property
    def reset_timeout(self) -> float: ...
    @property
    def half_open_max_calls(self) -> int: ...
    @property
    def probe_timeout(self) -> float: ...
    def __eq__(self, other: object, /) -> bool: ...
    def __ne__(self, other: object, /) -> bool: ...
    def __hash__(self, /) -> int: ...
    def __reduce__(self) -> tuple[object, ...]: ...

@final
class Permit:
    """The right to make one call, from `CircuitBreaker.try_acquire`; to be given back to the same breaker, once.

    A permit that is dropped is given back as ignored. While the breaker is half-open a permit that somebody keeps holds a
    probe's place until the policy's `probe_timeout`.
    """

@final
class CircuitBreaker:
    """Lets calls through to something that fails, or spares it them.

    Closed, it lets every call through. After `failure_threshold` failures in a row, or what else its policy says, it is
    open and refuses all of them. `reset_timeout` seconds later the next call that asks makes it half-open: then up to
    `half_open_max_calls` probes are in flight at once; when so many have succeeded it is closed, when one fails it is open
    again. No timer runs, and looking at it changes nothing.

    ``async with breaker:`` guards a block: its end is a success, an `Exception` that leaves it a failure; what leaves it
    that is no `Exception`, such as ``asyncio.CancelledError``, is ignored: it frees the place and counts as neither. Each
    block has a permit of its own, so that any number may be open at once, in one task or in many.

    An outcome counts only in the period that its permit is of: one of a call from before the breaker opened or closed
    changes nothing. All methods may be called from any task, loop and thread. The clock is the system's monotonic one; under
    `cano.testing` it is the virtual one.

    Args:
        failure_threshold: Failures in a row that open it, 1 to 1,000,000; or a `CircuitPolicy`, which has the next two, too.
        reset_timeout: Seconds that it stays open, above 0.
        half_open_max_calls: Probes at once, and successes to close it, 1 to 10,000.
        name: For errors and logs, a printable text of 1 to 128 bytes; None is no name.
        on_change: Called with the breaker, the old and the new `CircuitState`, once for each change, in the thread whose
            call made the change, before that call returns. What it raises goes to ``sys.unraisablehook`` and changes
            nothing. Changes that threads make at the same time may be told in either order.

    Raises:
        ConfigurationError: A value is out of range or of the wrong type.

    Example:
        >>> breaker = CircuitBreaker(1, 30, name="payments")
        >>> breaker.record_failure(breaker.try_acquire())
        >>> breaker.state
        <CircuitState.Open: 'open'>
    """

    @overload
    def __new__(
        cls,
        failure_threshold: int = 5,
        reset_timeout: Seconds = 30.0,
        half_open_max_calls: int = 1,
        *,
        name: str | None = None,
        on_change: Callable[[CircuitBreaker, CircuitState, CircuitState], object] | None = None,
    ) -> CircuitBreaker: ...
    @overload
    def __new__(
        cls,
        failure_threshold: CircuitPolicy,
        *,
        name: str | None = None,
        on_change: Callable[[CircuitBreaker, CircuitState, CircuitState], object] | None = None,
    ) -> CircuitBreaker: ...
    @property
    def name(self) -> str | None:
        """The name, or None."""

    @property
    def policy(self) -> CircuitPolicy:
        """When it opens, and how it closes again."""

    @property
    def state(self) -> CircuitState:
        """The state; an open breaker becomes half-open only when a call asks."""

    def try_acquire(self) -> Permit:
        """Let a call through, to be followed by one of the ``record_`` methods.

        Raises:
            CircuitOpenError: The breaker is open, or half-open with all its probes in flight.

        Example:
            >>> breaker = CircuitBreaker()
            >>> permit = breaker.try_acquire()
            >>> breaker.record_success(permit)
        """

    def record_success(self, permit: Permit) -> None:
        """Take the permit back: the call succeeded.

        Raises:
            ConfigurationError: The permit has been used, or is of another breaker.
        """

    def record_failure(self, permit: Permit) -> None:
        """Take the permit back: the call failed.

        Raises:
            ConfigurationError: The permit has been used, or is of another breaker.
        """

    def record_ignored(self, permit: Permit) -> None:
        """Take the permit back: the call was given up, which says nothing about what it called.

        Raises:
            ConfigurationError: The permit has been used, or is of another breaker.
        """

    def force_open(self) -> None:
        """Refuse every call until `reset`; calls in flight no longer count."""

    def reset(self) -> None:
        """Close it, with all counts at zero; calls in flight no longer count."""

    def snapshot(self) -> CircuitSnapshot:
        """What it looks like now; looking changes nothing."""

    def __aenter__(self) -> Awaitable[None]: ...
    def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None, /
    ) -> Awaitable[None]: ...

@disjoint_base
class MemoryStore:
    """Values that tasks of one process share, by key.

    Any hashable key, any value. Values are handed out as the objects they are, never copied. Each operation is atomic, also
    between threads.

    Example:
        >>> store = MemoryStore()
        >>> store.put("total", 3)
        >>> store.get("total", int)
        3
    """

    def __new__(cls) -> MemoryStore: ...
    def put(self, key: Hashable, value: object) -> None:
        """Store a value, in the place of any other under this key."""

    @overload
    def get(self, key: Hashable, type_: None = None) -> Any: ...
    @overload
    def get(self, key: Hashable, type_: type[_T]) -> _T:
        """The value under a key.

        Args:
            key: The key.
            type_: What the value must be an instance of; None accepts anything.

        Raises:
            KeyNotFoundError: Nothing is stored under the key.
            StoreTypeError: The value is not an instance of `type_`.
        """

    def get_or(self, key: Hashable, default: _D) -> Any | _D:
        """The value under a key, or `default` if there is none."""

    def remove(self, key: Hashable) -> None:
        """Forget a key; one that is not there is no error."""

    def append(self, key: Hashable, item: object) -> None:
        """Add an item to the list under a key; the first one makes the list.

        Raises:
            StoreTypeError: The value is no list; it stays as it is.
        """

    def contains_key(self, key: Hashable) -> bool:
        """Whether something is stored under the key; the same as ``key in store``."""

    def keys(self) -> list[Any]:
        """The keys, in the order in which they were first stored."""

    def clear(self) -> None:
        """Forget everything."""

    def __len__(self) -> int: ...
    def __contains__(self, key: Hashable, /) -> bool: ...
    def __iter__(self) -> Iterator[Any]: ...

@final
class CheckpointRow:
    """One row of a durable run's log.

    Which fields a row has depends on its kind; "may" fields may be None.

    ======================  ==========  =========  ======  ===========  ========  =========
    kind                    next_state  refers_to  due_at  output_blob  snapshot  is_intent
    ======================  ==========  =========  ======  ===========  ========  =========
    StateEntry              -           -          -       -            may       may
    CompensationCompletion  has         -          -       the output   may       -
    StepCursor              may         may        -       the cursor   may       -
    TimerDue                -           -          has     -            may       -
    RollbackStarted         -           -          -       the error    may       -
    Compensated             -           has        -       -            -         -
    Finished                -           -          -       -            may       -
    NeedsAttention          -           -          -       the reason   may       -
    ======================  ==========  =========  ======  ===========  ========  =========

    Args:
        sequence: The row's number in the log, from 0 without gaps.
        kind: What the row tells.
        state: Label of the state that it is about; of the exit state where a run finished. At most 128 bytes.
        task_id: Name of the state's task, at most 128 bytes; empty for a split and an exit state.
        visit: Which entry of the run into this state it is, from 1.
        attempt: Which attempt of the visit it is, from 1.
        workflow_version: The workflow's version, 0 if it has none.
        fingerprint: A digest of the workflow's name and definition, 64 bits.
        run_id: 16 bytes that tell this run from another one under the same id.
        recorded_at: When the row was made, in milliseconds since 1970.
        next_state: Where the run goes from here, decided for good.
        refers_to: Compensated: the row that was undone. Step cursor: the first row whose place it takes.
        due_at: When the timer fires, in milliseconds since 1970.
        is_intent: Whether the step is to be compensated from its entry on, without an output.
        output_blob: An output, a cursor, an error or a reason, as the codec wrote it; empty bytes are there, None is not.
        snapshot: The run's own data, as the codec wrote it.

    Raises:
        ConfigurationError: A value is of the wrong type or out of range, or no row of this kind has it, or must have it.

    Example:
        >>> CheckpointRow(0, RowKind.StateEntry, "CHARGE", task_id="charge")
        <CheckpointRow 0: state entry of "CHARGE", task "charge", visit 1, attempt 1>
    """

    def __new__(
        cls,
        sequence: int,
        kind: RowKind,
        state: str,
        *,
        task_id: str = "",
        visit: int = 1,
        attempt: int = 1,
        workflow_version: int = 0,
        fingerprint: int = 0,
        run_id: bytes = b"\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00",
        recorded_at: int = 0,
        next_state: str | None = None,
        refers_to: int | None = None,
        due_at: int | None = None,
        is_intent: bool = False,
        output_blob: bytes | None = None,
        snapshot: bytes | None = None,
    ) -> CheckpointRow: ...
    @property
    def sequence(self) -> int: ...
    @property
    def kind(self) -> RowKind: ...
    @property
    def state(self) -> str: ...
    @property
    def task_id(self) -> str: ...
    @property
    def visit(self) -> int: ...
    @property
    def attempt(self) -> int: ...
    @property
    def workflow_version(self) -> int: ...
    @property
    def fingerprint(self) -> int: ...
    @property
    def run_id(self) -> bytes: ...
    @property
    def recorded_at(self) -> int: ...
    @property
    def next_state(self) -> str | None: ...
    @property
    def refers_to(self) -> int | None: ...
    @property
    def due_at(self) -> int | None: ...
    @property
    def is_intent(self) -> bool: ...
    @property
    def output_blob(self) -> bytes | None: ...
    @property
    def snapshot(self) -> bytes | None: ...
    def replace(self, **changes: Any) -> CheckpointRow:
        """The row with other values for some fields, named as the constructor's arguments.

        Raises:
            ConfigurationError: A value is refused.

        Example:
            >>> CheckpointRow(0, RowKind.StateEntry, "CHARGE").replace(state="PAY").state
            'PAY'
        """

    def encode(self, workflow_id: str) -> bytes:
        """The bytes to store under the id of the run: with a format number, the length, and a checksum that covers the id.

        Raises:
            ConfigurationError: The id is not one.
            RunTooLargeError: A blob has more than 64 MiB.
        """

    @staticmethod
    def decode(workflow_id: str, sequence: int, data: bytes) -> CheckpointRow:
        """The row that `encode` wrote for this place of this run.

        Raises:
            CorruptRowError: The bytes are not what was written, or belong to another place or run, or are of a later format.

        Example:
            >>> row = CheckpointRow(0, RowKind.Finished, "DONE")
            >>> CheckpointRow.decode("order-1", 0, row.encode("order-1")) == row
            True
            >>> CheckpointRow.decode("order-2", 0, row.encode("order-1"))
            Traceback (most recent call last):
            cano.CorruptRowError: row 0 of run "order-2" is damaged at byte 70: ...
        """

    def __eq__(self, other: object, /) -> bool: ...
    def __ne__(self, other: object, /) -> bool: ...
    def __hash__(self, /) -> int: ...
    def __getnewargs_ex__(self) -> tuple[object, ...]: ...

@final
class InMemoryCheckpointStore:
    """Keeps the logs of durable runs as long as the process lives; for tests, and for runs that need not outlive it.

    Everything that a durable store promises but durability: rows are checked alike, runs have one owner, and whoever has lost
    one changes nothing. Safe from several loops and threads. Its claims last until they are given up, or the store is closed
    or gone.

    Args:
        max_blob: Bytes of one output, cursor or snapshot, 1 to 64 MiB.
        max_rows: Rows that a run keeps, 1 to 1,000,000,000.
        max_bytes: Bytes of a run's rows, 1 to 1 TiB.

    Raises:
        ConfigurationError: A limit is out of range or of the wrong type.

    Example:
        >>> async def main():
        ...     async with InMemoryCheckpointStore() as store:
        ...         fence = await store.start_run("order-1", workflow="order", version=1)
        ...         row = CheckpointRow(0, RowKind.StateEntry, "CHARGE", task_id="charge")
        ...         await store.append("order-1", row, fence=fence)
        ...         return await store.load_run("order-1")
        >>> asyncio.run(main())
        [<CheckpointRow 0: state entry of "CHARGE", task "charge", visit 1, attempt 1>]
    """

    def __new__(
        cls, *, max_blob: int = 2097152, max_rows: int = 50000, max_bytes: int = 52428800
    ) -> InMemoryCheckpointStore: ...
    @property
    def owner(self) -> str:
        """Who claims what is claimed through this store."""

    def another_owner(self) -> InMemoryCheckpointStore:
        """A store with the same runs and limits, as another process would have it: with an owner of its own.

        Example:
            >>> async def main():
            ...     store = InMemoryCheckpointStore()
            ...     await store.start_run("order-1", workflow="order", version=1)
            ...     other = store.another_owner()
            ...     try:
            ...         await other.claim("order-1")
            ...     except RunClaimedError:
            ...         store.close()  # its owner is gone
            ...     return await other.claim("order-1")
            >>> asyncio.run(main())
            2
        """

    def start_run(self, workflow_id: str, *, workflow: str, version: int) -> Awaitable[int]:
        """Claim an id that has no run yet.

        Cancellation: what was claimed for a caller that is cancelled meanwhile is forgotten again.

        Args:
            workflow_id: The run's id: 1 to 256 bytes, not blank, no control characters.
            workflow: The workflow's name, 1 to 128 bytes.
            version: The workflow's version, 0 if it has none.

        Returns:
            The fence, to be shown with each row.

        Raises:
            ConfigurationError: An argument is out of range or of the wrong type.
            RunClaimedError: There is such a run, and it is somebody's.
            RunConflictError: There is such a run, and it is nobody's: resume or discard it.
            StoreFailedError: The store is closed, or its disk failed.
        """

    def claim(self, workflow_id: str) -> Awaitable[int]:
        """Claim a run that is there and nobody's, or whose owner's lease has run out.

        Cancellation: what was claimed for a caller that is cancelled meanwhile is given up again.

        Returns:
            The fence; those of earlier claims are out of date.

        Raises:
            RunNotFoundError: There is no such run.
            RunClaimedError: It is somebody's.
            RunConflictError: It is over.
            StoreFailedError: The store is closed, or its disk failed.
        """

    def append(self, workflow_id: str, row: CheckpointRow, *, fence: int | None = None) -> Awaitable[None]:
        """Add the next row of a run. A row that ends the run gives up its claim.

        Cancellation: what is under way is done nevertheless.

        Args:
            workflow_id: The run's id.
            row: The row; its sequence is the one that follows.
            fence: What the run was claimed under; None for a run that is nobody's, which begins with its row 0.

        Raises:
            RunNotFoundError: There is no run that could have been claimed.
            RunClaimedError: The run is somebody else's by now, or has an owner and there is no fence.
            RunConflictError: There is a row of this sequence, or this one cannot follow yet, or not after the last one.
            RunTooLargeError: It is more than the limits allow.
            StoreFailedError: The store is closed, or its disk failed: then nothing was written, or `is_same` of a
                `RunConflictError` tells whoever tries again that it was.
        """

    def load_run(self, workflow_id: str) -> Awaitable[list[CheckpointRow]]:
        """The rows of a run in ascending order; none if there is no such run.

        Cursors whose place a later one has taken are left out.

        Raises:
            CorruptRowError: A row is damaged or missing.
            StoreFailedError: The store is closed, or its disk failed.
        """

    def clear(self, workflow_id: str, *, fence: int | None = None) -> Awaitable[None]:
        """Forget a run and its rows; fine if there is none.

        Args:
            workflow_id: The run's id.
            fence: What the run was last claimed under; None for a run that is nobody's.

        Raises:
            RunClaimedError: The run is somebody else's by now, or has an owner and there is no fence.
            StoreFailedError: The store is closed, or its disk failed.
        """

    def release(self, workflow_id: str, fence: int, *, stopped: bool = False) -> Awaitable[None]:
        """Give up a claim.

        Args:
            workflow_id: The run's id.
            fence: What it was claimed under.
            stopped: Whether the run has failed and is resumed only by those who ask for it; else anybody who looks for runs
                to resume may have it at once.

        Raises:
            RunNotFoundError: There is no such run.
            RunClaimedError: The run is somebody else's by now, or nobody's.
            StoreFailedError: The store is closed, or its disk failed.
        """

    def list_runs(
        self,
        *,
        status: RunStatus | Iterable[RunStatus] | None = None,
        older_than: Seconds | None = None,
        limit: int = 1000,
    ) -> Awaitable[list[RunSummary]]:
        """The runs that are there, the longest untouched first.

        Args:
            status: Only runs that have come so far; None for all.
            older_than: Only runs whose last row, claim or release is longer ago than these seconds; None for all.
            limit: How many at most, 1 to 1,000,000.

        Raises:
            ConfigurationError: An argument is out of range or of the wrong type.
            StoreFailedError: The store is closed, or its disk failed.
        """

    def close(self) -> None:
        """Give up all claims; every later call raises `StoreFailedError`. Closing again does nothing."""

    def aclose(self) -> Awaitable[None]:
        """Do what `close` does."""

    def __aenter__(self) -> Awaitable[InMemoryCheckpointStore]: ...
    def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None, /
    ) -> Awaitable[None]: ...

@final
class SqliteCheckpointStore:
    """Keeps the logs of durable runs in an SQLite file.

    What was answered is on the disk, and outlives the process and, as far as the disk honours a sync, the machine. One thread
    writes: all that waits when it is free shares one transaction and one sync, so that a thousand runs in flight cost little
    more than one. Nothing blocks the loop. Safe from several loops and threads.

    Several processes of one machine may share the file. A run belongs to one of them at a time: its claim lasts as long as the
    store that made it is open and alive. Whoever opens the file while nobody else has it open takes back the claims of the
    dead at once; else they last until the lease runs out. A store that is not closed is closed when its object goes or the
    interpreter ends.

    Args:
        path: The file; made with mode 0600 if it is not there. Its directory must exist. Not on a network disk.
        lease: Seconds for which a claim outlives an owner that died, 0.1 to one day; it is renewed three times in that time.
        max_blob: Bytes of one output, cursor or snapshot, 1 to 64 MiB.
        max_rows: Rows that a run keeps, 1 to 1,000,000,000.
        max_bytes: Bytes of a run's rows, 1 to 1 TiB.
        allow_insecure_path: Accept a file of another user, and one, or a directory, that others may write to.

    Raises:
        ConfigurationError: An argument is out of range or of the wrong type.
        StoreOpenError: The file cannot be opened, or is none of ours.

    Example:
        >>> async def main():
        ...     async with SqliteCheckpointStore("runs.db") as store:
        ...         fence = await store.start_run("order-1", workflow="order", version=1)
        ...         row = CheckpointRow(0, RowKind.Finished, "DONE")
        ...         await store.append("order-1", row, fence=fence)
        ...     async with SqliteCheckpointStore("runs.db") as store:
        ...         return await store.load_run("order-1")
        >>> asyncio.run(main())
        [<CheckpointRow 0: finished of "DONE", visit 1, attempt 1>]
    """

    def __new__(
        cls,
        path: str | PathLike[str],
        *,
        lease: Seconds = 15.0,
        max_blob: int = 2097152,
        max_rows: int = 50000,
        max_bytes: int = 52428800,
        allow_insecure_path: bool = False,
    ) -> SqliteCheckpointStore: ...
    @property
    def path(self) -> str:
        """The path as it was given."""

    @property
    def owner(self) -> str:
        """Who claims what is claimed through this store: the process's number and a random one."""

    def start_run(self, workflow_id: str, *, workflow: str, version: int) -> Awaitable[int]:
        """Claim an id that has no run yet.

        Cancellation: what was claimed for a caller that is cancelled meanwhile is forgotten again.

        Args:
            workflow_id: The run's id: 1 to 256 bytes, not blank, no control characters.
            workflow: The workflow's name, 1 to 128 bytes.
            version: The workflow's version, 0 if it has none.

        Returns:
            The fence, to be shown with each row.

        Raises:
            ConfigurationError: An argument is out of range or of the wrong type.
            RunClaimedError: There is such a run, and it is somebody's.
            RunConflictError: There is such a run, and it is nobody's: resume or discard it.
            StoreFailedError: The store is closed, or its disk failed.
        """

    def claim(self, workflow_id: str) -> Awaitable[int]:
        """Claim a run that is there and nobody's, or whose owner's lease has run out.

        Cancellation: what was claimed for a caller that is cancelled meanwhile is given up again.

        Returns:
            The fence; those of earlier claims are out of date.

        Raises:
            RunNotFoundError: There is no such run.
            RunClaimedError: It is somebody's.
            RunConflictError: It is over.
            StoreFailedError: The store is closed, or its disk failed.
        """

    def append(self, workflow_id: str, row: CheckpointRow, *, fence: int | None = None) -> Awaitable[None]:
        """Add the next row of a run. A row that ends the run gives up its claim.

        Cancellation: what is under way is done nevertheless.

        Args:
            workflow_id: The run's id.
            row: The row; its sequence is the one that follows.
            fence: What the run was claimed under; None for a run that is nobody's, which begins with its row 0.

        Raises:
            RunNotFoundError: There is no run that could have been claimed.
            RunClaimedError: The run is somebody else's by now, or has an owner and there is no fence.
            RunConflictError: There is a row of this sequence, or this one cannot follow yet, or not after the last one.
            RunTooLargeError: It is more than the limits allow.
            StoreFailedError: The store is closed, or its disk failed: then nothing was written, or `is_same` of a
                `RunConflictError` tells whoever tries again that it was.
        """

    def load_run(self, workflow_id: str) -> Awaitable[list[CheckpointRow]]:
        """The rows of a run in ascending order; none if there is no such run.

        Cursors whose place a later one has taken are left out.

        Raises:
            CorruptRowError: A row is damaged or missing.
            StoreFailedError: The store is closed, or its disk failed.
        """

    def clear(self, workflow_id: str, *, fence: int | None = None) -> Awaitable[None]:
        """Forget a run and its rows; fine if there is none.

        Args:
            workflow_id: The run's id.
            fence: What the run was last claimed under; None for a run that is nobody's.

        Raises:
            RunClaimedError: The run is somebody else's by now, or has an owner and there is no fence.
            StoreFailedError: The store is closed, or its disk failed.
        """

    def release(self, workflow_id: str, fence: int, *, stopped: bool = False) -> Awaitable[None]:
        """Give up a claim.

        Args:
            workflow_id: The run's id.
            fence: What it was claimed under.
            stopped: Whether the run has failed and is resumed only by those who ask for it; else anybody who looks for runs
                to resume may have it at once.

        Raises:
            RunNotFoundError: There is no such run.
            RunClaimedError: The run is somebody else's by now, or nobody's.
            StoreFailedError: The store is closed, or its disk failed.
        """

    def list_runs(
        self,
        *,
        status: RunStatus | Iterable[RunStatus] | None = None,
        older_than: Seconds | None = None,
        limit: int = 1000,
    ) -> Awaitable[list[RunSummary]]:
        """The runs that are there, the longest untouched first.

        Args:
            status: Only runs that have come so far; None for all.
            older_than: Only runs whose last row, claim or release is longer ago than these seconds; None for all.
            limit: How many at most, 1 to 1,000,000.

        Raises:
            ConfigurationError: An argument is out of range or of the wrong type.
            StoreFailedError: The store is closed, or its disk failed.
        """

    def close(self) -> None:
        """Write what is under way, give up all claims, and let go of the file.

        It blocks until that is done, which may be a while on a slow disk; in a coroutine, await `aclose`. Every later call
        raises `StoreFailedError`; closing again does nothing.
        """

    def aclose(self) -> Awaitable[None]:
        """Do what `close` does, in a thread of the loop's executor."""

    def __aenter__(self) -> Awaitable[SqliteCheckpointStore]: ...
    def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None, /
    ) -> Awaitable[None]: ...

@final
class Standing:
    def __new__(
        cls,
        workflow_id: str,
        status: str,
        owner: str | None,
        until: int | None,
        fence: int,
        next_sequence: int,
        kept_rows: int,
        kept_bytes: int,
        /,
    ) -> Standing: ...
    def start(self, now: int, /) -> None: ...
    def claim(self, now: int, /) -> str: ...
    def append(self, fence: int | None, row: CheckpointRow, data: bytes, there: bytes | None, /) -> str: ...
    def misplaced(self, sequence: int, /) -> None: ...
    def release(self, fence: int, /) -> None: ...
    def clear(self, fence: int | None, now: int, /) -> None: ...

@final
class RateLimiterPolicy:
    """How a token bucket is filled: it gains `tokens` in every `period`, evenly, up to its capacity.

    It starts full, with ``capacity = max_tokens + burst``. In any time ``w`` it grants at most
    ``capacity + tokens * w / period``. Equal policies compare equal.

    Args:
        tokens: How many come back in each period, 1 to 1,000,000,000.
        period: Seconds, above 0, up to ten years.
        max_tokens: How many it holds, 1 to 1,000,000,000; None is as many as `tokens`.
        burst: How many more it holds, 0 to 1,000,000,000.

    Raises:
        ConfigurationError: A value is out of range or of the wrong type.

    Example:
        >>> policy = RateLimiterPolicy.per_second(10, max_tokens=2, burst=5)  # 7 at once, then one every 0.1 s
        >>> policy.capacity
        7
    """

    def __new__(
        cls, tokens: int, period: Seconds, *, max_tokens: int | None = None, burst: int = 0
    ) -> RateLimiterPolicy: ...
    @staticmethod
    def per_second(tokens: int, *, max_tokens: int | None = None, burst: int = 0) -> RateLimiterPolicy:
        """So many tokens in every second."""

    @staticmethod
    def per_minute(tokens: int, *, max_tokens: int | None = None, burst: int = 0) -> RateLimiterPolicy:
        """So many tokens in every minute, evenly."""

    @staticmethod
    def per_hour(tokens: int, *, max_tokens: int | None = None, burst: int = 0) -> RateLimiterPolicy:
        """So many tokens in every hour, evenly."""

    @property
    def tokens(self) -> int:
        """How many come back in each period."""

    @property
    def period(self) -> float:
        """The period in seconds."""

    @property
    def max_tokens(self) -> int:
        """How many it holds, without the burst."""

    @property
    def burst(self) -> int:
        """How many more it holds."""

    @property
    def capacity(self) -> int:
        """How many it holds: ``max_tokens + burst``."""

    def __eq__(self, other: object, /) -> bool: ...
    def __ne__(self, other: object, /) -> bool: ...
    def __hash__(self, /) -> int: ...
    def __getnewargs_ex__(self) -> tuple[tuple[int, float], dict[str, int]]: ...

@final
class WindowPolicy:
    """How much fits into a fixed window: `limit` in every `seconds`.

    The windows lie end to end from the first grant on; nothing that only looks moves them. At the seam of two windows up to
    twice the limit may be granted in a short time. Equal policies compare equal.

    Args:
        limit: How much is granted in each window, 1 to 1,000,000,000.
        seconds: The width of a window, above 0, up to ten years.

    Raises:
        ConfigurationError: A value is out of range or of the wrong type.

    Example:
        >>> WindowPolicy.per_day(1_000).seconds
        86400.0
    """

    def __new__(cls, limit: int, seconds: Seconds) -> WindowPolicy: ...
    @staticmethod
    def per_second(limit: int) -> WindowPolicy:
        """So much in every second."""

    @staticmethod
    def per_minute(limit: int) -> WindowPolicy:
        """So much in every minute."""

    @staticmethod
    def per_hour(limit: int) -> WindowPolicy:
        """So much in every hour."""

    @staticmethod
    def per_day(limit: int) -> WindowPolicy:
        """So much in every 24 hours."""

    @property
    def limit(self) -> int:
        """How much is granted in each window."""

    @property
    def seconds(self) -> float:
        """The width of a window in seconds."""

    def __eq__(self, other: object, /) -> bool: ...
    def __ne__(self, other: object, /) -> bool: ...
    def __hash__(self, /) -> int: ...
    def __getnewargs__(self) -> tuple[int, float]: ...

@final
class LimiterSnapshot:
    """A limiter as it was at one moment.

    Attributes:
        capacity: The most that is granted at once.
        available: What was left, in whole tokens; those who wait had not taken theirs yet.
        used: ``capacity - available``.
        available_in: Seconds until something would be left; 0 if something was.
        resets_in: Seconds until the window ends; None for a bucket, and before the first grant.
        waiting: How many waited.
    """

    @property
    def capacity(self) -> int: ...
    @property
    def available(self) -> int: ...
    @property
    def used(self) -> int: ...
    @property
    def available_in(self) -> float: ...
    @property
    def resets_in(self) -> float | None: ...
    @property
    def waiting(self) -> int: ...
    def __eq__(self, other: object, /) -> bool: ...
    def __ne__(self, other: object, /) -> bool: ...

@disjoint_base
class Limiter:
    @property
    def name(self) -> str | None:
        """What `RateLimitedError.tier` says, or None."""

    def try_acquire(self, cost: int = 1) -> None:
        """Take a cost now.

        Nobody who waits is overtaken: while somebody does, only a cost of 0 is granted.

        Args:
            cost: What the call takes, 0 or more. 0 is always granted.

        Raises:
            RateLimitedError: It is not granted now, and nothing was taken. `retry_after` says how long it takes; infinity is
                for a cost above the capacity, which is never granted.
            ConfigurationError: `cost` is negative or no int.
        """

    def acquire(self, cost: int = 1) -> Coroutine[Any, Any, None]:
        """Take a cost as soon as it can be had and everybody who came before has been served.

        Where it can be had at once nothing suspends.

        Args:
            cost: What the call takes, 0 or more. 0 is always granted.

        Raises:
            RateLimitedError: The cost is above the capacity, so that waiting would not help.
            ConfigurationError: `cost` is negative or no int.

        Cancellation:
            Nothing was taken, and the next in line has its turn.
        """

    def time_until(self, cost: int = 1) -> float:
        """Seconds until a cost can be had; infinity if it never can.

        Exact while nobody waits, else the least that it takes to serve the others first.

        Raises:
            ConfigurationError: `cost` is negative or no int.
        """

    def snapshot(self) -> LimiterSnapshot:
        """What is left, and how many wait; looking changes nothing."""

    def _enter(self, cost: int) -> WaitingCall | None: ...

@final
class RateLimiter(Limiter):
    """A token bucket, shared by everything that holds it: tasks, runs, event loops, threads.

    Tokens come back evenly, so the calls that it holds up are spread evenly too. What cannot be granted at once is granted
    in the order of the calls. It can be used by hand or be a resource of a workflow.

    Args:
        policy: How the bucket is filled.
        name: What errors call it, 1 to 128 bytes; None for no name.

    Raises:
        ConfigurationError: A value is out of range or of the wrong type.

    Example:
        >>> limiter = RateLimiter(RateLimiterPolicy.per_second(10, max_tokens=1))
        >>> limiter.try_acquire()
        >>> limiter.try_acquire(2)
        Traceback (most recent call last):
        ...
        cano.RateLimitedError: rate limited: a cost is granted up to 1, never one of 2
        >>> asyncio.run(limiter.acquire())  # 0.1 s later
    """

    def __new__(cls, policy: RateLimiterPolicy, *, name: str | None = None) -> RateLimiter: ...
    @property
    def policy(self) -> RateLimiterPolicy:
        """How the bucket is filled."""

@final
class WindowedRateLimiter(Limiter):
    """So much in every fixed window, shared by everything that holds it: tasks, runs, event loops, threads.

    For quotas that somebody else counts in windows; a `RateLimiter` spreads calls evenly. What cannot be granted at once is
    granted in the order of the calls. It can be used by hand or be a resource of a workflow.

    Args:
        policy: How much fits into a window.
        name: What errors call it, 1 to 128 bytes; None for no name.

    Raises:
        ConfigurationError: A value is out of range or of the wrong type.

    Example:
        >>> limiter = WindowedRateLimiter(WindowPolicy(1_000, seconds=60))
        >>> limiter.try_acquire(600)
        >>> limiter.snapshot().available
        400
    """

    def __new__(cls, policy: WindowPolicy, *, name: str | None = None) -> WindowedRateLimiter: ...
    @property
    def policy(self) -> WindowPolicy:
        """How much fits into a window."""

@final
class MultiRateLimiter:
    """Several limiters at once: all of them grant a call, or none is charged.

    Each tier is a limiter and what a call costs it. A limiter may be a tier of several of these, and be used alone, too.
    Without tiers everything is granted.

    Example:
        >>> tokens = WindowedRateLimiter(WindowPolicy.per_day(1_000_000))
        >>> model = MultiRateLimiter().with_tier("calls", RateLimiter(RateLimiterPolicy.per_second(5)))
        >>> model.with_tier("tokens", tokens, cost=800).try_acquire()
        >>> model.snapshot()["tokens"].used
        800
    """

    def __new__(cls) -> MultiRateLimiter: ...
    def with_tier(self, name: str, limiter: RateLimiter | WindowedRateLimiter, cost: int = 1) -> MultiRateLimiter:
        """Add a tier; gives the same object. It counts for every call that comes later, those that wait stay as they are.

        Args:
            name: What errors call it, 1 to 128 bytes, different from that of every other tier.
            limiter: Who has to grant the cost. Under two names it is charged for both.
            cost: What a call takes of it, 0 or more; 0 never holds a call up.

        Raises:
            ConfigurationError: A value is out of range or of the wrong type, or the name is taken.
        """

    def try_acquire(self, tiers: Iterable[str] | None = None) -> None:
        """Take the cost of every tier now.

        Args:
            tiers: The names of those that count for this call; None is all.

        Raises:
            RateLimitedError: Nothing was taken. `tier` is the first that can never grant its cost (`retry_after` is infinity),
                or else the first that cannot now.
            UnknownTierError: There is no tier of a name; nothing was taken.
            ConfigurationError: `tiers` is no iterable of names.
        """

    def acquire(self, tiers: Iterable[str] | None = None) -> Coroutine[Any, Any, None]:
        """Take the cost of every tier as soon as all can be had and everybody who came before in any of them has been served.

        Where they can be had at once nothing suspends.

        Args:
            tiers: The names of those that count for this call; None is all.

        Raises:
            RateLimitedError: A cost is above the capacity of its limiter, so that waiting would not help.
            UnknownTierError: There is no tier of a name; nothing was taken.
            ConfigurationError: `tiers` is no iterable of names.

        Cancellation:
            Nothing was taken of any tier, and the next in each line has its turn.
        """

    def time_until(self, tiers: Iterable[str] | None = None) -> float:
        """Seconds until the costs can be had; infinity if they never can.

        Exact while nobody waits, else the least that it takes to serve the others first.

        Raises:
            UnknownTierError: There is no tier of a name.
            ConfigurationError: `tiers` is no iterable of names.
        """

    def snapshot(self) -> dict[str, LimiterSnapshot]:
        """The limiter of each tier, by name in the order of the tiers, all at the same moment."""

    def _enter(self, tiers: Iterable[str] | None) -> WaitingCall | None: ...

@final
class WaitingCall:
    def turn(self) -> Awaitable[None] | None: ...
    def leave(self) -> None: ...
    def told(self) -> None: ...

@final
class Policy:
    def __new__(
        cls,
        retry: RetryMode,
        retry_on: Any,
        explicit: tuple[type[Exception], ...] | None,
        never: tuple[type[Exception], ...],
        attempt_timeout: float | None,
        breaker: CircuitBreaker | None,
        limiter: RateLimiter | WindowedRateLimiter | MultiRateLimiter | None,
    ) -> Policy: ...
    def pause(self, error: BaseException, failures: int) -> float | None: ...

@final
class Plan:
    def __new__(
        cls,
        sources: Sequence[tuple[str, Any, Any]],
        keywords: tuple[str, ...] | None,
        declared: tuple[Any, ...] | None,
        is_coroutine_function: bool,
    ) -> Plan: ...
    @property
    def needs_joined(self) -> bool: ...

@final
class TaskSpec:
    def __new__(
        cls,
        call: Callable[..., Any],
        name: str,
        plan: Plan,
        policy: Policy | None,
        model: str | None = None,
        cursor: Any = None,
        compensation: Compensation | None = None,
    ) -> TaskSpec: ...
    @property
    def cursor(self) -> Any: ...
    @property
    def output(self) -> Any: ...
    @property
    def name(self) -> str: ...
    @property
    def plan(self) -> Plan: ...
    @property
    def model(self) -> str | None: ...

@final
class Compensation:
    def __new__(cls, task: TaskSpec, output_type: Any, register_before: bool) -> Compensation: ...

@final
class Completion:
    @property
    def state(self) -> Any: ...
    @property
    def task(self) -> str: ...
    @property
    def visit(self) -> int: ...
    @property
    def output(self) -> Any: ...
    @property
    def output_type(self) -> Any: ...
    @property
    def is_stored(self) -> bool: ...
    @property
    def sequence(self) -> int | None: ...
    @property
    def limit(self) -> float | None: ...
    @property
    def has_compensation(self) -> bool: ...
    def undo(self, output: Any) -> Any: ...
    def annotate(self, run: Run, error: BaseException) -> None: ...

@final
class Factory:
    def __new__(cls, task: TaskSpec) -> Factory: ...

@final
class Table:
    def __new__(
        cls,
        subject: str,
        entries: Iterable[
            tuple[
                Any,
                str,
                TaskSpec | tuple[TaskSpec, ...] | Factory | None,
                JoinConfig[Any] | None,
                tuple[tuple[type[Exception], Any], ...],
            ]
        ],
        shims: tuple[
            Callable[[Any], tuple[TaskSpec, ...]],
            Callable[[Run], Coroutine[Any, Any, Any]],
            type[Any],
            type[Any],
            type[Any],
            type[Any],
        ],
        compensation_timeout: float | None,
        /,
    ) -> Table: ...
    @property
    def passing(self) -> list[str]: ...
    @property
    def labels(self) -> dict[str, Any]: ...
    def check_initial(self, state: Any) -> None: ...

@final
class Resumed:
    def __new__(cls, workflow_id: str, rows: Sequence[CheckpointRow], passing: Sequence[str], /) -> Resumed: ...
    @property
    def position(self) -> str: ...
    @property
    def state(self) -> str: ...
    @property
    def start(self) -> int: ...
    @property
    def blob(self) -> bytes | None: ...
    @property
    def snapshot(self) -> bytes | None: ...
    @property
    def run_id(self) -> bytes: ...

@final
class Log:
    def __new__(
        cls,
        store: Any,
        workflow_id: str,
        definition: Definition,
        snapshot: Callable[[], bytes] | None,
        run_id: bytes,
        version: int,
        fingerprint: int,
        resumed: Resumed | None = None,
        cursor: Any = None,
        /,
    ) -> Log: ...
    @property
    def definition(self) -> Definition: ...
    def owned(self, fence: int) -> None: ...
    def take_cursor(self) -> Any: ...
    @property
    def is_over(self) -> bool: ...
    @property
    def is_rolled_back(self) -> bool: ...
    @property
    def next(self) -> int: ...
    @property
    def due_at(self) -> int | None: ...
    @property
    def is_lost(self) -> bool: ...
    @property
    def unclosed(self) -> BaseException | None: ...
    def refused(self, error: BaseException) -> None: ...
    def cursor(self, cursor: Any, next_state: str | None = None, /) -> Future[None]: ...
    def timer(self, due_at: int) -> Future[None]: ...
    def roll_back(self, reason: bytes) -> Future[None]: ...
    def compensated(self, sequence: int, state: str, task: str, visit: int) -> Future[None]: ...
    def finished(self) -> Future[None]: ...
    def needs_attention(self, reason: bytes) -> Future[None]: ...
    def landed(self) -> int | None: ...

@final
class Split:
    def push(self, item: Any) -> Awaitable[None] | None: ...
    def _more(self) -> None: ...
    def _time_out(self) -> None: ...
    def _deadline(self) -> None: ...
    def _turn(self) -> None: ...

@final
class Run:
    def __new__(
        cls,
        table: Table,
        state: Any,
        resources: Resources,
        workflow_id: str | None,
        timeout: float | None,
        data: object = None,
        log: Log | None = None,
        resumed: Resumed | None = None,
        /,
    ) -> Run: ...
    @property
    def log(self) -> Log | None: ...
    def label_of(self, state: Any) -> str | None: ...
    def __await__(self) -> Generator[Any, None, Any]: ...
    def __iter__(self) -> Run: ...
    def __next__(self) -> Any: ...
    def send(self, value: Any) -> Any: ...
    def throw(self, kind: Any, value: Any = None, traceback: Any = None, /) -> Any: ...
    def close(self) -> None: ...
    def _fire(self) -> None: ...
    @property
    def state(self) -> Any: ...
    @property
    def path(self) -> tuple[Any, ...]: ...
    @property
    def id(self) -> str: ...
    @property
    def resources(self) -> Resources: ...
    @property
    def deadline(self) -> float | None: ...
    def timed_out(self) -> BaseException: ...
    def each(
        self,
        task: TaskSpec,
        iterator: Iterator[Any] | None,
        feeder: Callable[[Split], Coroutine[Any, Any, None]] | None,
        concurrency: int,
        /,
    ) -> Run: ...
    def annotate(self, error: BaseException) -> None: ...
    def completion(self, state: str, task: str, visit: int, sequence: int, output: bytes | None, /) -> Completion: ...
    @property
    def cr_await(self) -> Any: ...
    @property
    def cr_running(self) -> bool: ...
    @property
    def cr_frame(self) -> Any: ...
    @property
    def cr_code(self) -> Any: ...
