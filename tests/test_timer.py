"""Timers: one sleep between `wait` and `after_wait`."""

import asyncio
import enum
import math
from datetime import UTC, datetime, timedelta, timezone, tzinfo
from typing import Annotated, Literal

import pytest

from cano import (
    After,
    AttemptTimeoutError,
    ConfigurationError,
    InvalidTransitionError,
    JoinConfig,
    JoinStrategy,
    Res,
    RunContext,
    SplitResult,
    TaskConfig,
    TaskResult,
    TimerTask,
    Until,
    Workflow,
    WorkflowCancelledError,
    WorkflowError,
)


class S(enum.Enum):
    START = 1
    DONE = 2


class Oops(Exception):
    pass


class Timer(TimerTask[S]):
    """Waits for what it is given, and keeps the moments of its calls."""

    def __init__(self, due, state=S.DONE):
        self.due = due
        self.state = state
        self.at = []

    async def wait(self):
        self.at.append(asyncio.get_running_loop().time())
        if isinstance(self.due, Exception):
            raise self.due
        return self.due() if callable(self.due) else self.due

    async def after_wait(self):
        self.at.append(asyncio.get_running_loop().time())
        if isinstance(self.state, Exception):
            raise self.state
        return self.state

    @property
    def waited(self):
        return self.at[1] - self.at[0]


def workflow_of(task, resources=None, **options):
    return Workflow(resources).register(S.START, task, **options).add_exit_state(S.DONE)


async def run(task, **options):
    return await workflow_of(task, **options).orchestrate(S.START)


async def ticks(count=5):
    for _ in range(count):
        await asyncio.sleep(0)


def now():
    return asyncio.get_running_loop().time()


@pytest.fixture
def sleeps(monkeypatch):
    """What asyncio.sleep is called with."""
    calls, sleep = [], asyncio.sleep

    async def spy(delay, result=None):
        calls.append(delay)
        return await sleep(delay, result)

    monkeypatch.setattr(asyncio, "sleep", spy)
    return calls


@pytest.mark.virtual
@pytest.mark.parametrize("seconds", [30, 30.0, timedelta(seconds=30)], ids=repr)
async def test_after(seconds, sleeps):
    """It sleeps once, exactly as long as `wait` says, and then goes where `after_wait` says."""
    timer = Timer(After(seconds))

    end = await run(timer)

    # TM-001
    assert end is S.DONE
    assert timer.waited == 30
    assert sleeps == [30.0]


@pytest.mark.virtual
async def test_until_a_time_of_the_loop(sleeps):
    """A time of the event loop's clock is met exactly."""
    due = now() + 12.5
    timer = Timer(Until(due))

    await run(timer)

    assert timer.at[1] == due  # TM-002
    assert len(sleeps) == 1


@pytest.mark.virtual
@pytest.mark.parametrize("zone", [UTC, timezone(timedelta(hours=-11)), timezone(timedelta(hours=14))], ids=str)
async def test_until_an_aware_datetime(zone):
    """An aware datetime is met, in whatever zone it is written."""
    timer = Timer(lambda: Until(datetime.now(zone) + timedelta(seconds=30)))

    await run(timer)

    assert 29 < timer.waited <= 30  # TM-001


@pytest.mark.realtime
async def test_until_is_not_early():
    """A future instant is not early, in real time either."""
    due = datetime.now(UTC) + timedelta(milliseconds=20)

    await run(Timer(Until(due)))

    assert datetime.now(UTC) >= due  # TM-002


@pytest.mark.virtual
@pytest.mark.parametrize(
    "due",
    [
        After(0),
        Until(-math.pi),
        Until(0),
        Until(datetime(1970, 1, 1, tzinfo=UTC)),
        Until(datetime.min.replace(tzinfo=UTC)),
    ],
    ids=repr,
)
async def test_past_instant_fires_at_once(due):
    """No time and a past instant give the event loop a turn, and then fire."""
    turns = []
    asyncio.get_running_loop().call_soon(turns.append, 1)
    timer = Timer(due)

    await run(timer)

    assert timer.waited == 0  # TM-002
    assert turns == [1]


@pytest.mark.virtual
async def test_attempt_timeout_ends_a_long_timer():
    """A timer that is longer than the attempt timeout fails, without `after_wait`."""
    timer = Timer(After(3600))

    with pytest.raises(AttemptTimeoutError):
        await run(timer, config=TaskConfig(attempt_timeout=5))

    assert len(timer.at) == 1  # TM-003


@pytest.mark.virtual
async def test_error_in_wait(sleeps):
    """An error in `wait` leaves as it is, and nothing sleeps."""
    error = Oops()

    with pytest.raises(Oops) as caught:
        await run(Timer(error))

    # TM-004
    assert caught.value is error
    assert sleeps == []


@pytest.mark.virtual
async def test_error_in_after_wait(sleeps):
    """An error in `after_wait` leaves as it is, after the sleep."""
    error = Oops()

    with pytest.raises(Oops) as caught:
        await run(Timer(After(5), error))

    # TM-004
    assert caught.value is error
    assert sleeps == [5.0]


@pytest.mark.virtual
async def test_retry_waits_again():
    """A retry begins with `wait`."""
    states = [Oops(), S.DONE]

    class Again(Timer):
        async def after_wait(self):
            self.state = states.pop(0)
            return await super().after_wait()

    timer = Again(After(5))
    await run(timer, config=TaskConfig().with_fixed_retry(1, 1))

    assert timer.at == [0, 5, 6, 11]


async def test_cancel_ends_the_sleep():
    """A cancel ends the sleep at once, and `after_wait` is not called."""
    timer = Timer(After(3600))
    handle = workflow_of(timer).start(S.START)
    await ticks()

    handle.cancel()

    with pytest.raises(WorkflowCancelledError):
        await handle
    assert len(timer.at) == 1  # CN-017


async def test_arguments_of_both_methods():
    """Each method asks for its own arguments, and they may be plain."""
    seen = []

    class Task:
        def wait(self, pause: Annotated[float, Res("pause")]):
            seen.append(pause)
            return After(pause)

        def after_wait(self, ctx: RunContext, state: Annotated[S, Res("next")]):
            seen.append(ctx.state)
            return state

    await workflow_of(Task(), {"pause": 0.0, "next": S.DONE}).orchestrate(S.START)

    assert seen == [0.0, S.START]


async def test_timer_as_a_branch():
    """As a branch, a timer's value is what `after_wait` returns."""
    values = []

    def joined(result: SplitResult):
        values.extend(result.values())
        return "done"

    join = JoinConfig(JoinStrategy.All, "joined")
    workflow = Workflow().register_split("split", [Timer(After(0), n) for n in range(3)], join)
    await workflow.register("joined", joined).add_exit_state("done").orchestrate("split")

    assert values == [0, 1, 2]


async def test_timer_cannot_split():
    """A split out of a timer is refused, with the reason."""
    with pytest.raises(WorkflowError, match="a timer cannot split"):
        await run(Timer(After(0), TaskResult.Split([S.DONE])))


@pytest.mark.parametrize("due", [5, None, timedelta(seconds=5), datetime(2030, 1, 1, tzinfo=UTC), After], ids=repr)
async def test_wait_that_returns_something_else(due):
    """What is neither After nor Until is refused, naming method and type."""
    timer = Timer(lambda: due)

    with pytest.raises(InvalidTransitionError) as caught:
        await run(timer)

    text = f"wait of task Timer returned a value of type {type(due).__qualname__}; "
    assert str(caught.value) == text + "it returns After(seconds) or Until(instant)"


class Vague(tzinfo):
    """A zone that does not know its offset: a datetime in it is naive."""

    def utcoffset(self, _):
        return None


@pytest.mark.parametrize(
    "instant",
    [
        datetime(2030, 1, 1),  # noqa: DTZ001 - the very mistake
        datetime(2030, 1, 1, tzinfo=Vague()),
        math.nan,
        math.inf,
        True,
        10**400,
        "2030-01-01",
        timedelta(seconds=5),
        None,
    ],
    ids=lambda value: str(value)[:20],
)
def test_instant_that_is_none(instant):
    """An instant is an aware datetime or a finite time of the loop's clock; a naive datetime is refused."""
    with pytest.raises(ConfigurationError, match="instant must be an aware datetime"):
        Until(instant)


def test_annotation_of_after_wait():
    """A `Literal` annotation of `after_wait` is known to `validate()`."""

    class Task(TimerTask[str]):
        def wait(self) -> Literal["ignored"]:
            raise NotImplementedError

        def after_wait(self) -> Literal["gone"]:
            raise NotImplementedError

    with pytest.raises(ConfigurationError, match="state start leads to gone") as caught:
        Workflow().register("start", Task()).add_exit_state("done").validate()

    assert "ignored" not in str(caught.value)
