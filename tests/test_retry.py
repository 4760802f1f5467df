"""Retries: what is repeated, how often, after which delay, and what leaves the run in the end."""

import asyncio
import copy
import dataclasses
import enum
import gc
import pickle
import random
import weakref
from collections.abc import Callable, Iterator
from datetime import timedelta
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, strategies as st

import cano.testing
from cano import (
    AttemptTimeoutError,
    CanoError,
    ConfigurationError,
    InvalidTransitionError,
    NonRetryable,
    ResourceError,
    RetryAfter,
    RetryExhaustedError,
    RetryMode,
    RunContext,
    Task,
    TaskConfig,
    TaskExecutionError,
    UnknownStateError,
    Workflow,
)

# Short, for the tests that also run in real time.
STEP = 0.01
FOREVER = 3600.0


class S(enum.Enum):
    START = enum.auto()
    NEXT = enum.auto()
    END = enum.auto()


class Oops(Exception):
    """What failing tasks raise."""


class Worse(Oops):
    """A subclass of it."""


class Attempts:
    """A task that raises the given errors in turn, then succeeds; it keeps when each attempt began."""

    def __init__(self, *errors: BaseException | type[BaseException]) -> None:
        self.errors = errors
        self.at: list[float] = []

    async def run(self) -> S:
        self.at.append(asyncio.get_running_loop().time())
        if len(self.at) <= len(self.errors):
            raise self.errors[len(self.at) - 1]
        return S.END

    @property
    def count(self) -> int:
        return len(self.at)

    @property
    def delays(self) -> list[float]:
        return [later - earlier for earlier, later in pairwise(self.at)]


def workflow_of(task: Any, config: TaskConfig | None = None) -> Workflow[S]:
    return Workflow[S]().register(S.START, task, config=config).add_exit_state(S.END)


async def run(task: Any, config: TaskConfig | None = None) -> S:
    return await workflow_of(task, config).orchestrate(S.START)


async def failure(task: Any, config: TaskConfig | None = None) -> BaseException:
    with pytest.raises(BaseException) as caught:
        await run(task, config)
    return caught.value


def fixed(retries: int, delay: float = 0, **options: Any) -> TaskConfig:
    return TaskConfig(retry=RetryMode.fixed(retries, delay), **options)


def refused(call: Callable[[], object]) -> str:
    with pytest.raises(ConfigurationError) as caught:
        call()
    return str(caught.value)


def pickled(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))  # noqa: S301 - just made


# How often


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(None, id="no config"),  # RT-004: ours runs once
        pytest.param(TaskConfig(), id="default config"),
        pytest.param(TaskConfig.minimal(), id="minimal"),
        pytest.param(TaskConfig(retry=RetryMode.none()), id="none"),
        pytest.param(fixed(0), id="no retries"),
        pytest.param(TaskConfig().with_exponential_retry(0), id="no exponential retries"),
        pytest.param(TaskConfig().with_attempt_timeout(FOREVER), id="only a timeout"),
    ],
)
async def test_no_retries(config: TaskConfig | None) -> None:
    """Without retries a task runs once, and what it raises leaves the run as it is."""
    error = Oops()
    task = Attempts(error)

    raised = await failure(task, config)

    # RT-001, RT-017
    assert raised is error
    assert error.__notes__ == ["state=START task=Attempts attempt=1/1 path=START"]
    assert task.count == 1


@pytest.mark.parametrize("retries", [1, 2, 5])
@pytest.mark.parametrize(
    "mode", [RetryMode.fixed, lambda retries, _: RetryMode.exponential(retries, 0)], ids=["fixed", "exponential"]
)
async def test_attempts_are_one_more_than_retries(retries: int, mode: Any) -> None:
    """A task that keeps failing runs once and then once for each retry."""
    task = Attempts(*[Oops] * 100)

    raised = await failure(task, TaskConfig(retry=mode(retries, 0)))

    # RT-016, RT-018
    assert isinstance(raised, RetryExhaustedError)
    assert task.count == retries + 1


@pytest.mark.parametrize("failures", [0, 1, 2])
async def test_success_ends_the_attempts(failures: int) -> None:
    """A task is repeated until it succeeds, and not once more."""
    task = Attempts(*[Oops] * failures)

    end = await run(task, fixed(2))

    # RT-015
    assert end is S.END
    assert task.count == failures + 1


async def test_retries_of_plain_functions() -> None:
    """Plain functions are retried like coroutine functions."""
    calls: list[None] = []

    def task() -> S:
        calls.append(None)
        if len(calls) < 3:
            raise Oops
        return S.END

    await run(task, fixed(2))

    assert len(calls) == 3


async def test_attempt_numbers() -> None:
    """The context counts the attempts of a visit from 1."""
    seen: list[tuple[int, int]] = []

    def task(context: RunContext) -> S:
        seen.append((context.visit, context.attempt))
        if context.attempt < 3:
            raise Oops
        return S.START if context.visit == 1 else S.END

    await run(task, fixed(2))

    assert seen == [(1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (2, 3)]


async def test_retries_begin_anew_in_each_state() -> None:
    """Attempts are counted per visit: a state entered later has all of its retries."""
    first, second = Attempts(Oops, Oops), Attempts(Oops, Oops)

    async def goes_on() -> S:
        await first.run()
        return S.NEXT

    workflow = Workflow[S]().add_exit_state(S.END)
    workflow.register(S.START, goes_on, config=fixed(2)).register(S.NEXT, second, config=fixed(2))

    await workflow.orchestrate(S.START)

    assert (first.count, second.count) == (3, 3)


async def test_thousands_of_retries() -> None:
    """Many retries without a delay neither grow the stack nor starve the loop."""
    turns = 0

    async def ticks() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    ticker = asyncio.create_task(ticks())
    task = Attempts(*[Oops] * 5_000)

    await run(task, fixed(5_000))

    ticker.cancel()
    await asyncio.wait([ticker])
    assert task.count == 5_001
    assert turns >= 5_000


# After which delay


@pytest.mark.virtual
async def test_fixed_delays() -> None:
    """Fixed retries pause equally long before each of them."""
    task = Attempts(Oops, Oops, Oops)

    await run(task, fixed(3, 0.1))

    # RT-002
    assert task.delays == pytest.approx([0.1, 0.1, 0.1], abs=1e-9)


@pytest.mark.virtual
async def test_no_delay_after_the_last_attempt() -> None:
    """The last failure leaves at once."""
    task = Attempts(Oops, Oops)

    await failure(task, fixed(1, 10))

    # RT-002
    assert asyncio.get_running_loop().time() == 10


@pytest.mark.virtual
@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        pytest.param(RetryMode.fixed(2, timedelta(minutes=1)), [60, 60], id="timedelta"),
        pytest.param(RetryMode.exponential(3, 0.1, jitter=0), [0.1, 0.2, 0.4], id="default factor"),  # RT-003
        pytest.param(RetryMode.exponential(2, 0.05, factor=3, jitter=0), [0.05, 0.15], id="factor 3"),  # RT-005
        pytest.param(
            RetryMode.exponential(3, 0.1, factor=10, max_delay=0.5, jitter=0), [0.1, 0.5, 0.5], id="cap"
        ),  # RT-006
        pytest.param(RetryMode.exponential(3, 1, factor=1, jitter=0), [1, 1, 1], id="factor 1"),
        pytest.param(RetryMode.exponential(3, 2, factor=2, max_delay=2, jitter=0), [2, 2, 2], id="base at the cap"),
        pytest.param(RetryMode.exponential(3, 0, factor=9, jitter=0.5), [0, 0, 0], id="base 0"),  # RT-013
        pytest.param(RetryMode.exponential(2, 0.0004, jitter=0), [0.0004, 0.0008], id="below 1 ms"),  # RT-014, B17
        pytest.param(
            RetryMode.exponential(4, 0.001, factor=1e300, max_delay=7, jitter=0), [0.001, 7, 7, 7], id="overflow"
        ),  # RT-011
        pytest.param(RetryMode.fixed(2, 86_400 * 365), [86_400 * 365] * 2, id="a year"),
    ],
)
async def test_delays(mode: RetryMode, expected: list[float]) -> None:
    """The delay before retry k is ``min(max_delay, base * factor ** (k - 1))``, to the nanosecond."""
    task = Attempts(*[Oops] * len(expected))

    await run(task, TaskConfig(retry=mode))

    assert task.delays == pytest.approx(expected, rel=0, abs=2e-9)


@given(
    base=st.integers(0, 100_000_000).map(lambda microseconds: microseconds / 1e6),  # a base is whole nanoseconds
    factor=st.floats(1, 10),
    spare=st.floats(0, 1_000),
    jitter=st.floats(0, 1),
    seed=st.integers(0, 2**32),
)
def test_delays_stay_in_their_bounds(base: float, factor: float, spare: float, jitter: float, seed: int) -> None:
    """Jitter spreads a delay by its fraction both ways, never above the cap and never from something to nothing."""
    random.seed(seed)
    cap = base + spare
    mode = RetryMode.exponential(6, base, factor=factor, max_delay=cap, jitter=jitter)
    task = Attempts(*[Oops] * 6)

    cano.testing.run(run(task, TaskConfig(retry=mode)))

    # RT-007, RT-008, RT-012, B16
    for k, delay in enumerate(task.delays, start=1):
        middle = min(cap, base * factor ** (k - 1))
        tolerance = 1e-8 * max(1.0, task.at[k])  # of the clock, and of whole nanoseconds
        assert delay >= min(middle, max(middle * (1 - jitter), 0.001)) - tolerance
        assert delay <= min(cap, middle * (1 + jitter)) + tolerance


@pytest.mark.virtual
async def test_default_exponential_delays() -> None:
    """The default exponential retry pauses about 0.1, 0.2 and 0.4 s, within ten percent, and makes four attempts."""
    random.seed(7)
    task = Attempts(*[Oops] * 4)

    await failure(task, TaskConfig().with_exponential_retry())

    # RT-003
    assert task.count == 4
    for delay, middle in zip(task.delays, [0.1, 0.2, 0.4], strict=True):
        assert middle * 0.9 <= delay <= middle * 1.1


@pytest.mark.virtual
async def test_jitter_spreads() -> None:
    """Jittered delays differ from each other and use the whole range."""
    random.seed(7)
    task = Attempts(*[Oops] * 300)

    await run(task, TaskConfig(retry=RetryMode.exponential(300, 1, factor=1, jitter=0.5)))

    # RT-007
    assert 0.5 <= min(task.delays) < 0.55
    assert 1.45 < max(task.delays) <= 1.5
    assert len(set(task.delays)) > 290


@pytest.mark.virtual
async def test_seeded_jitter() -> None:
    """``random.seed`` makes the delays repeatable."""

    async def delays() -> list[float]:
        random.seed(42)
        task = Attempts(Oops, Oops, Oops)
        began = asyncio.get_running_loop().time()
        await run(task, TaskConfig().with_exponential_retry())
        return [round(at - began, 9) for at in task.at]

    assert await delays() == await delays()


# What leaves the run


async def test_exhausted() -> None:
    """The error of used-up retries counts the attempts and has the last failure as its cause, both with their place."""
    errors = [Oops("first"), Oops("second"), Oops("third")]

    raised = await failure(Attempts(*errors), fixed(2))

    # RT-016, FSM-011
    assert isinstance(raised, RetryExhaustedError)
    assert str(raised) == "task Attempts failed in each of its 3 attempts: Oops"
    assert raised.__cause__ is errors[2]
    assert (raised.attempts, raised.attempt, raised.state, raised.task) == (3, 3, S.START, "Attempts")
    assert raised.__notes__ == errors[2].__notes__ == ["state=START task=Attempts attempt=3/3 path=START"]
    assert not hasattr(errors[0], "__notes__")


async def test_exhausted_pickles() -> None:
    """The error of used-up retries survives pickling with its facts."""
    raised = await failure(Attempts(Oops, Oops), fixed(1))

    again = pickled(raised)

    assert (type(again), str(again), again.attempts, again.state) == (RetryExhaustedError, str(raised), 2, S.START)


async def test_failure_that_is_not_retryable() -> None:
    """A failure that is not worth a retry leaves the run as it is, with the number of its attempt."""
    error = KeyError("key")

    raised = await failure(Attempts(Oops, error), fixed(5, retry_on=Oops))

    assert raised is error
    assert error.__notes__ == ["state=START task=Attempts attempt=2/6 path=START"]


async def test_failures_do_not_chain() -> None:
    """An attempt's exception knows nothing of the attempts before it."""
    raised = await failure(Attempts(Oops("first"), Oops("second")), fixed(1))

    assert raised.__cause__ is not None
    assert raised.__cause__.__context__ is None


async def test_failed_attempts_are_freed() -> None:
    """The exception of an attempt is gone when the next attempt begins."""
    died: list[weakref.ref[Any]] = []
    alive: list[int] = []

    async def task() -> S:
        alive.append(sum(one() is not None for one in died))
        if len(alive) > 3:
            return S.END
        error = Oops()
        died.append(weakref.ref(error))
        try:
            raise error
        finally:
            del error

    gc.disable()
    try:
        await run(task, fixed(3))
    finally:
        gc.enable()

    assert alive == [0, 0, 0, 0]


async def test_unsuitable_results_are_not_retried() -> None:
    """A task that returns no state made a mistake that another attempt would repeat."""
    calls: list[None] = []

    def task() -> Any:
        calls.append(None)
        return "no state"

    raised = await failure(task, fixed(3))

    # B49
    assert isinstance(raised, InvalidTransitionError)
    assert len(calls) == 1


# What is worth a retry


@pytest.fixture(
    params=[
        pytest.param(lambda kind: kind, id="type"),
        pytest.param(lambda kind: (OSError, kind), id="tuple"),
        pytest.param(lambda kind: lambda error: isinstance(error, kind), id="predicate"),
    ]
)
def on(request: pytest.FixtureRequest) -> Any:
    """The three ways of naming what is worth a retry."""
    return request.param


@pytest.mark.parametrize("error", [Oops, Worse], ids=["same", "subclass"])
async def test_retry_on(on: Any, error: type[Exception]) -> None:
    """A failure of a kind that retry_on names is retried."""
    task = Attempts(error)

    await run(task, fixed(1, retry_on=on(Oops)))

    assert task.count == 2


@pytest.mark.parametrize("error", [Oops, KeyError, ValueError])
async def test_retry_on_something_else(on: Any, error: type[Exception]) -> None:
    """A failure of a kind that retry_on does not name is not retried."""
    task = Attempts(error)

    raised = await failure(task, fixed(1, retry_on=on(Worse)))

    assert type(raised) is error
    assert task.count == 1


async def test_retry_on_timeout(on: Any) -> None:
    """An attempt timeout can be named like any other failure, by its own class or as a TimeoutError."""
    calls: list[None] = []

    async def task() -> S:
        calls.append(None)
        await asyncio.sleep(FOREVER if len(calls) < 3 else 0)
        return S.END

    config = fixed(1, retry_on=on(TimeoutError), attempt_timeout=STEP)
    named = fixed(1, retry_on=on(AttemptTimeoutError), attempt_timeout=STEP)

    with pytest.raises(RetryExhaustedError):
        await run(task, config)
    await run(task, named)

    assert len(calls) == 3


async def test_predicate_gets_the_failure() -> None:
    """A predicate is asked once about each failure but is not needed for the last one to leave."""
    errors = [Oops("first"), Oops("second")]
    asked: list[Exception] = []

    def predicate(error: Exception) -> bool:
        asked.append(error)
        return True

    await run(Attempts(*errors), fixed(2, retry_on=predicate))

    assert asked == errors


async def test_predicate_decides_alone() -> None:
    """A predicate is asked about programming errors as well."""
    task = Attempts(TypeError)

    await run(task, fixed(1, retry_on=lambda error: isinstance(error, TypeError)))

    assert task.count == 2


async def test_predicate_that_raises() -> None:
    """What a predicate raises leaves the run, with the failure it was asked about as its context."""
    error, broken = Oops(), KeyError("broken predicate")

    def predicate(_: Exception) -> bool:
        raise broken

    raised = await failure(Attempts(error), fixed(3, retry_on=predicate))

    assert raised is broken
    assert broken.__context__ is error
    assert "attempt=1/4" in broken.__notes__[0]


MISTAKES = [TypeError, AttributeError, NameError, AssertionError, NotImplementedError]
OURS = [NonRetryable, ConfigurationError, InvalidTransitionError, UnknownStateError, ResourceError]


@pytest.mark.parametrize("kind", [*MISTAKES, *OURS, UnboundLocalError])
async def test_never_retried(kind: type[Exception]) -> None:
    """Programming errors and errors of the definition are not retried unless asked for."""
    task = Attempts(kind("mistake"))

    raised = await failure(task, fixed(3))

    # RT-019, B49
    assert type(raised) is kind
    assert task.count == 1


@pytest.mark.parametrize("kind", [*MISTAKES, *OURS[1:], UnboundLocalError])
@pytest.mark.parametrize("name", [lambda kind: kind, lambda kind: (Oops, kind)], ids=["type", "tuple"])
async def test_never_retried_unless_named(kind: type[Exception], name: Any) -> None:
    """A type in retry_on that names such an error has it retried."""
    task = Attempts(kind("mistake"))

    await run(task, fixed(1, retry_on=name(kind)))

    assert task.count == 2


async def test_naming_a_mistake_names_no_other() -> None:
    """A named programming error has its subclasses retried, no other programming error."""
    config = fixed(3, retry_on=(NameError, Exception))
    named, other = Attempts(UnboundLocalError), Attempts(TypeError)

    await run(named, config)
    raised = await failure(other, config)

    assert named.count == 2
    assert type(raised) is TypeError


@pytest.mark.parametrize(
    "kind", [CanoError, TaskExecutionError, ExceptionGroup, OSError, TimeoutError, StopAsyncIteration]
)
async def test_retried_by_default(kind: type[Exception]) -> None:
    """Every other Exception is retried by default."""
    error = ExceptionGroup("several", [Oops()]) if kind is ExceptionGroup else kind("failed")
    task = Attempts(error)

    await run(task, fixed(1))

    assert task.count == 2


class Fatal(BaseException):
    """An exception that nothing may retry."""


@pytest.mark.parametrize("kind", [Fatal, asyncio.CancelledError, GeneratorExit])
async def test_base_exceptions_pass(on: Any, kind: type[BaseException]) -> None:
    """A BaseException is never retried and leaves the run as it is; no predicate is asked."""
    error = kind("stop")
    task = Attempts(error)

    raised = await failure(task, fixed(3, retry_on=on(Exception)))

    assert raised is error
    assert task.count == 1


async def test_non_retryable() -> None:
    """NonRetryable ends the attempts and leaves the run itself, with its cause."""
    cause = Oops()

    async def task() -> S:
        raise NonRetryable("the card was declined") from cause

    raised = await failure(task, fixed(5))

    assert isinstance(raised, NonRetryable)
    assert raised.__cause__ is cause
    assert (str(raised), raised.attempt, raised.state) == ("the card was declined", 1, S.START)


@pytest.mark.parametrize(
    "retry_on", [lambda _: True, NonRetryable, TaskExecutionError], ids=["predicate", "named", "base"]
)
async def test_non_retryable_beats_the_configuration(retry_on: Any) -> None:
    """NonRetryable ends the attempts whatever retry_on says."""

    class Declined(NonRetryable):
        pass

    task = Attempts(Declined("no"))

    raised = await failure(task, fixed(5, retry_on=retry_on))

    assert isinstance(raised, Declined)
    assert task.count == 1


async def test_non_retryable_after_failures() -> None:
    """NonRetryable in a later attempt ends the attempts there."""
    task = Attempts(Oops, NonRetryable("enough"), Oops)

    raised = await failure(task, fixed(5))

    assert isinstance(raised, NonRetryable)
    assert raised.attempt == 2


# RetryAfter


@pytest.mark.virtual
@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        pytest.param(RetryMode.fixed(2, 1), [30, 1], id="fixed"),
        pytest.param(RetryMode.exponential(2, 1, jitter=0), [30, 2], id="exponential"),
        pytest.param(RetryMode.exponential(2, 1, max_delay=5, jitter=0), [5, 2], id="exponential with a lower cap"),
        pytest.param(RetryMode.exponential(2, 1, factor=1, max_delay=30, jitter=1), None, id="without jitter"),
    ],
)
async def test_retry_after(mode: RetryMode, expected: list[float] | None) -> None:
    """RetryAfter sets the next delay, without jitter and up to max_delay; the one after that is computed as ever."""
    task = Attempts(RetryAfter(30), Oops)

    await run(task, TaskConfig(retry=mode))

    assert task.delays[0] == 30 if expected is None else task.delays == pytest.approx(expected)


@pytest.mark.virtual
async def test_retry_after_nothing() -> None:
    """RetryAfter(0) has the next attempt follow at once."""
    task = Attempts(RetryAfter(0))

    await run(task, fixed(1, 10))

    assert task.delays == [0]


async def test_retry_after_uses_up_an_attempt() -> None:
    """An attempt that raises RetryAfter has failed: the last one leaves as the cause of RetryExhaustedError."""
    last = RetryAfter(0)

    raised = await failure(Attempts(RetryAfter(0), RetryAfter(0), last), fixed(2))

    assert isinstance(raised, RetryExhaustedError)
    assert raised.__cause__ is last


async def test_retry_after_whatever_retry_on_says(on: Any) -> None:
    """RetryAfter is the task's own wish for another attempt, which retry_on need not name."""
    task = Attempts(RetryAfter(0))

    await run(task, fixed(1, retry_on=on(ConnectionError)))

    assert task.count == 2


async def test_retry_after_without_retries() -> None:
    """Where no retry is configured RetryAfter leaves the run like any failure."""
    error = RetryAfter(5)

    raised = await failure(Attempts(error))

    assert raised is error


@pytest.mark.parametrize(
    ("delay", "expected"),
    [
        pytest.param(3, 3.0, id="int"),
        pytest.param(0.25, 0.25, id="float"),
        pytest.param(timedelta(minutes=2), 120.0, id="timedelta"),
    ],
)
def test_retry_after_delay(delay: Any, expected: float) -> None:
    """The delay of RetryAfter is in seconds, a float, whatever it was given as."""
    error = RetryAfter(delay)

    assert error.delay == expected
    assert type(error.delay) is float
    assert str(error) == f"retry after {expected} s"


@pytest.mark.parametrize("delay", [-1, float("nan"), float("inf"), True, "3", None, timedelta(seconds=-1)], ids=repr)
def test_retry_after_refuses(delay: Any) -> None:
    """RetryAfter cannot be made with a delay that is none."""
    assert "delay must be" in refused(lambda: RetryAfter(delay))


def test_retry_after_pickles() -> None:
    """RetryAfter survives pickling with delay, text and attributes."""
    error = RetryAfter(2.5, "come back later")
    error.add_note("note")

    again = pickled(error)

    assert (again.delay, str(again), again.__notes__) == (2.5, "come back later", ["note"])


# Cancelling


async def test_cancelled_pause() -> None:
    """A cancellation during the pause between two attempts ends the run at once; there is no other attempt."""
    task = Attempts(Oops, Oops)
    running = asyncio.create_task(run(task, fixed(2, FOREVER)))
    await asyncio.sleep(STEP)

    running.cancel("enough")

    with pytest.raises(asyncio.CancelledError, match="enough"):
        await running
    assert task.count == 1


async def test_cancelled_attempt() -> None:
    """A cancelled attempt is not a failed one."""
    calls: list[None] = []

    async def task() -> S:
        calls.append(None)
        await asyncio.sleep(FOREVER)
        return S.END

    running = asyncio.create_task(run(task, fixed(2)))
    await asyncio.sleep(STEP)

    running.cancel()

    with pytest.raises(asyncio.CancelledError):
        await running
    assert len(calls) == 1


async def test_failure_while_cancelled() -> None:
    """An attempt that turns its cancellation into a failure is the last one: that failure leaves the run."""
    calls: list[None] = []

    async def task() -> S:
        calls.append(None)
        try:
            await asyncio.sleep(FOREVER)
        except asyncio.CancelledError:
            raise Oops from None
        return S.END

    running = asyncio.create_task(run(task, fixed(3)))
    await asyncio.sleep(STEP)

    running.cancel()

    with pytest.raises(Oops):
        await running
    assert len(calls) == 1


# Where a configuration comes from


async def test_config_of_the_class() -> None:
    """A task's attribute ``config`` is its configuration, of the class or of the object."""

    class OfClass(Attempts):
        config = fixed(2)

    class OfObject(Attempts):
        def __init__(self, *errors: Any) -> None:
            super().__init__(*errors)
            self.config = fixed(1)

    of_class, of_object = OfClass(*[Oops] * 9), OfObject(*[Oops] * 9)

    await failure(of_class)
    await failure(of_object)

    assert (of_class.count, of_object.count) == (3, 2)


async def test_config_at_registration_wins() -> None:
    """A configuration given at registration takes the place of the task's own."""

    class Configured(Attempts):
        config = fixed(5)

    task = Configured(*[Oops] * 9)

    await failure(task, fixed(1))

    assert task.count == 2


async def test_config_is_read_once() -> None:
    """A configuration is read at registration; a later change is not seen."""

    class Configured(Attempts):
        config = fixed(2)

    task = Configured(*[Oops] * 9)
    workflow = workflow_of(task)

    task.config = fixed(5)
    with pytest.raises(RetryExhaustedError):
        await workflow.orchestrate(S.START)

    # WF-035
    assert task.count == 3


@pytest.mark.parametrize(
    "config", [3, {"retries": 3}, RetryMode.fixed(1, 0), TaskConfig], ids=["int", "dict", "mode", "class"]
)
def test_config_of_another_type(config: Any) -> None:
    """A configuration is a TaskConfig, both as an argument and as an attribute."""

    class Configured(Attempts):
        pass

    Configured.config = config  # type: ignore[attr-defined]

    assert "must be a TaskConfig" in refused(lambda: workflow_of(Attempts(), config))
    assert "must be a TaskConfig" in refused(lambda: workflow_of(Configured()))


async def test_one_config_for_many_tasks() -> None:
    """A configuration may be shared; it keeps no state of its own."""
    config = fixed(1)
    tasks = [Attempts(Oops) for _ in range(5)]
    workflow = workflow_of(tasks[0], config)

    await asyncio.gather(*(run(task, config) for task in tasks))
    await workflow.orchestrate(S.START)

    assert [task.count for task in tasks] == [3, 2, 2, 2, 2]


# TaskConfig


def test_config_defaults() -> None:
    """By default a task runs once, without a time limit, and any Exception would be worth a retry."""
    config = TaskConfig()

    # RT-004
    assert (config.retry, config.retry_on, config.attempt_timeout) == (RetryMode.none(), Exception, None)
    assert config == TaskConfig.minimal()


def test_config_changed_copies() -> None:
    """The with_ methods give changed copies, chain, and leave the original alone."""
    config = TaskConfig(retry_on=Oops)

    changed = config.with_fixed_retry(3, 0.2).with_attempt_timeout(timedelta(seconds=1.5))
    again = changed.with_exponential_retry(2, 0.5, factor=3, max_delay=9, jitter=0).with_attempt_timeout(None)

    assert changed == TaskConfig(retry=RetryMode.fixed(3, 0.2), retry_on=Oops, attempt_timeout=1.5)
    assert again == TaskConfig(retry=RetryMode.exponential(2, 0.5, factor=3, max_delay=9, jitter=0), retry_on=Oops)
    assert config == TaskConfig(retry_on=Oops)


def test_config_exponential_defaults() -> None:
    """The defaults of with_exponential_retry are those of RetryMode.exponential."""
    assert TaskConfig().with_exponential_retry().retry == RetryMode.exponential()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        pytest.param({"retry": 3}, "retry must be a RetryMode, got 3", id="retry 3"),
        pytest.param({"retry": None}, "retry must be a RetryMode", id="retry None"),
        pytest.param({"retry": RetryMode.fixed}, "retry must be a RetryMode", id="retry without numbers"),
        pytest.param({"retry_on": None}, "retry_on must be", id="retry_on None"),
        pytest.param({"retry_on": Oops()}, "retry_on must be", id="retry_on instance"),
        pytest.param({"retry_on": "Oops"}, "retry_on must be", id="retry_on text"),
        pytest.param({"retry_on": int}, "retry_on must be", id="retry_on int"),
        pytest.param({"retry_on": BaseException}, "retry_on must be", id="retry_on BaseException"),
        pytest.param({"retry_on": asyncio.CancelledError}, "retry_on must be", id="retry_on CancelledError"),
        pytest.param({"retry_on": (Oops, KeyboardInterrupt)}, "retry_on must be", id="retry_on KeyboardInterrupt"),
        pytest.param({"retry_on": [Oops]}, "retry_on must be", id="retry_on list"),
        pytest.param({"attempt_timeout": -1}, "attempt_timeout must be", id="attempt_timeout -1"),
        pytest.param({"attempt_timeout": True}, "attempt_timeout must be", id="attempt_timeout True"),
        pytest.param({"attempt_timeout": float("nan")}, "attempt_timeout must be", id="attempt_timeout nan"),
        pytest.param({"attempt_timeout": float("inf")}, "attempt_timeout must be", id="attempt_timeout inf"),
        pytest.param({"attempt_timeout": "1"}, "attempt_timeout must be", id="attempt_timeout text"),
    ],
)
def test_config_refused(options: dict[str, Any], text: str) -> None:
    """A configuration with a value out of range or of the wrong type cannot be made."""
    assert text in refused(lambda: TaskConfig(**options))


def test_config_takes_keywords_only() -> None:
    """The fields of a configuration are given by name."""
    with pytest.raises(TypeError):
        TaskConfig(RetryMode.none())  # type: ignore[call-arg]


def test_config_is_frozen() -> None:
    """A configuration cannot be changed."""
    config = TaskConfig()

    with pytest.raises(dataclasses.FrozenInstanceError):
        config.attempt_timeout = 1  # type: ignore[misc]


def test_config_is_a_value() -> None:
    """Equal configurations are equal and hash alike; different ones differ."""
    configs = [
        TaskConfig(),
        fixed(1),
        fixed(2),
        fixed(1, 0.5),
        fixed(1, retry_on=Oops),
        fixed(1, attempt_timeout=1),
    ]

    assert len(set(configs)) == len(configs)
    assert fixed(1, attempt_timeout=timedelta(seconds=1)) == configs[-1]
    assert hash(fixed(1, attempt_timeout=1.0)) == hash(configs[-1])


def test_config_repr() -> None:
    """The text of a configuration shows its fields as they are written, and nothing internal."""
    config = TaskConfig().with_fixed_retry(3, 0.2).with_attempt_timeout(1)

    assert repr(config) == (
        "TaskConfig(retry=RetryMode.fixed(3, 0.2), retry_on=<class 'Exception'>, attempt_timeout=1.0, "
        "circuit_breaker=None, rate_limiter=None)"
    )


@pytest.mark.parametrize(
    "duplicate", [copy.copy, copy.deepcopy, pickled, dataclasses.replace], ids=lambda one: one.__name__
)
async def test_config_copies(duplicate: Callable[[TaskConfig], TaskConfig]) -> None:
    """A configuration copies and pickles into an equal one that works like it."""
    config = fixed(2, retry_on=Oops, attempt_timeout=5)
    task = Attempts(*[Oops] * 9)

    again = duplicate(config)
    await failure(task, again)

    assert again == config
    assert task.count == 3


def test_config_as_a_dict() -> None:
    """``dataclasses.asdict`` gives the public fields."""
    assert dataclasses.asdict(fixed(1, 0.5, attempt_timeout=2)) == {
        "retry": RetryMode.fixed(1, 0.5),
        "retry_on": Exception,
        "attempt_timeout": 2.0,
        "circuit_breaker": None,
        "rate_limiter": None,
    }


# RetryMode


@pytest.mark.parametrize(
    ("mode", "text"),
    [
        pytest.param(RetryMode.none(), "RetryMode.none()", id="none"),
        pytest.param(RetryMode.fixed(3, 0.2), "RetryMode.fixed(3, 0.2)", id="fixed"),
        pytest.param(RetryMode.fixed(0, timedelta(minutes=1)), "RetryMode.fixed(0, 60.0)", id="fixed with a timedelta"),
        pytest.param(
            RetryMode.exponential(),
            "RetryMode.exponential(3, 0.1, factor=2.0, max_delay=30.0, jitter=0.1)",
            id="exponential",
        ),
    ],
)
def test_mode_is_a_value(mode: RetryMode, text: str) -> None:
    """A retry mode reads as it is written, and equals, hashes, copies and pickles like another one that reads the same."""
    again = eval(repr(mode), {"RetryMode": RetryMode})  # noqa: S307 - our own repr

    assert repr(mode) == text
    assert mode == again == pickled(mode) == copy.deepcopy(mode)
    assert hash(mode) == hash(again)


def test_modes_differ() -> None:
    """Retry modes with other numbers are not equal."""
    modes = [
        RetryMode.none(),
        RetryMode.fixed(1, 0),
        RetryMode.fixed(1, 1),
        RetryMode.fixed(2, 1),
        RetryMode.exponential(),
        RetryMode.exponential(jitter=0.2),
    ]

    assert len(set(modes)) == len(modes)
    assert modes[0] != "RetryMode.none()"


@pytest.mark.parametrize(
    ("make", "text"),
    [
        pytest.param(lambda: RetryMode.fixed(-1, 0), "retries must be at least 0, got -1", id="retries -1"),
        pytest.param(lambda: RetryMode.fixed(1_000_001, 0), "at most 1000000", id="too many retries"),  # RT-026, B15
        pytest.param(lambda: RetryMode.fixed(2**63 - 1, 0), "at most 1000000", id="retries 2**63 - 1"),
        pytest.param(lambda: RetryMode.fixed(2**64, 0), "retries must be", id="retries 2**64"),
        pytest.param(lambda: RetryMode.fixed(retries=True, delay=0), "retries must be", id="retries True"),
        pytest.param(lambda: RetryMode.fixed(1.0, 0), "retries must be", id="retries 1.0"),  # type: ignore[arg-type]
        pytest.param(lambda: RetryMode.fixed(1, -0.1), "delay must be", id="delay -0.1"),
        pytest.param(lambda: RetryMode.fixed(1, float("nan")), "delay must be", id="delay nan"),
        pytest.param(lambda: RetryMode.fixed(1, float("inf")), "delay must be", id="delay inf"),
        pytest.param(lambda: RetryMode.fixed(1, 1e12), "ten years", id="delay too long"),
        pytest.param(lambda: RetryMode.fixed(1, "1"), "delay must be", id="delay text"),  # type: ignore[arg-type]
        pytest.param(lambda: RetryMode.exponential(factor=0.5), "factor must be", id="factor 0.5"),  # RT-010
        pytest.param(lambda: RetryMode.exponential(factor=0), "factor must be", id="factor 0"),
        pytest.param(lambda: RetryMode.exponential(factor=float("nan")), "factor must be", id="factor nan"),
        pytest.param(lambda: RetryMode.exponential(factor=float("-inf")), "factor must be", id="factor -inf"),
        pytest.param(lambda: RetryMode.exponential(jitter=-0.1), "jitter must be", id="jitter -0.1"),  # RT-009
        pytest.param(lambda: RetryMode.exponential(jitter=1.1), "jitter must be", id="jitter 1.1"),
        pytest.param(lambda: RetryMode.exponential(jitter=float("nan")), "jitter must be", id="jitter nan"),
        pytest.param(lambda: RetryMode.exponential(jitter=True), "jitter must be", id="jitter True"),
        pytest.param(lambda: RetryMode.exponential(base=-1), "base must be", id="base -1"),
        pytest.param(lambda: RetryMode.exponential(max_delay=-1), "max_delay must be", id="max_delay -1"),
        pytest.param(lambda: RetryMode.exponential(base=31), "at most max_delay", id="base above max_delay"),
        pytest.param(lambda: RetryMode.exponential(retries=-1), "retries must be", id="exponential retries -1"),
    ],
)
def test_mode_refused(make: Callable[[], object], text: str) -> None:
    """A retry mode with a number out of range or of the wrong type cannot be made."""
    assert text in refused(make)


def test_mode_bounds() -> None:
    """The ends of every range are allowed."""
    modes = [
        RetryMode.fixed(0, 0),
        RetryMode.fixed(1_000_000, 315_576_000),
        RetryMode.exponential(1_000_000, 0, factor=1, max_delay=0, jitter=0),
        RetryMode.exponential(1, 5, factor=1e308, max_delay=5, jitter=1),
    ]

    assert len(modes) == 4


def test_task_base_has_no_configuration() -> None:
    """The base class of tasks leaves the configuration to the subclass."""
    assert Task.config is None


@pytest.fixture(autouse=True)
def _restored_dice() -> Iterator[None]:
    """Tests seed the global dice; nobody else gets that seed."""
    state = random.getstate()
    yield
    random.setstate(state)
