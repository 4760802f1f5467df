"""Time limits of attempts and runs: when they fall, what they stop, and how they nest with everybody else's."""

import asyncio
import contextlib
import enum
import gc
import weakref
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any

import anyio
import pytest
from hypothesis import example, given, strategies as st

import cano.testing
from cano import (
    AttemptTimeoutError,
    ConfigurationError,
    JoinConfig,
    JoinError,
    JoinStrategy,
    JoinTimeoutError,
    RetryExhaustedError,
    RetryMode,
    RunContext,
    SplitResult,
    Task,
    TaskConfig,
    TaskResult,
    Workflow,
    WorkflowError,
    WorkflowTimeoutError,
)

STEP = 0.01
FOREVER = 3600.0


class S(enum.Enum):
    START = enum.auto()
    NEXT = enum.auto()
    OTHER = enum.auto()
    END = enum.auto()
    LATE = enum.auto()


class Oops(Exception):
    """What failing tasks raise."""


def now() -> float:
    return asyncio.get_running_loop().time()


def pending() -> list[asyncio.TimerHandle]:
    """The timers that would still fire."""
    return [timer for timer in asyncio.get_running_loop()._scheduled if not timer.cancelled()]  # type: ignore[attr-defined]


def cancelling() -> int:
    task = asyncio.current_task()
    assert task is not None
    return task.cancelling()


def sleeping(*delays: float) -> Callable[[], Awaitable[S]]:
    """A task that sleeps, one delay after the other in its attempts, and ends."""
    left = list(delays)

    async def task() -> S:
        await asyncio.sleep(left.pop(0))
        return S.END

    return task


def limited(limit: float, retries: int = 0, delay: float = 0) -> TaskConfig:
    return TaskConfig(retry=RetryMode.fixed(retries, delay), attempt_timeout=limit)


def workflow_of(task: Any, config: TaskConfig | None = None, **states: Any) -> Workflow[S]:
    workflow = Workflow[S]().register(S.START, task, config=config).add_exit_state(S.END)
    for name, other in states.items():
        workflow.register(S[name], other)
    return workflow


async def run(task: Any, config: TaskConfig | None = None, **options: Any) -> S:
    return await workflow_of(task, config).orchestrate(S.START, **options)


# Attempts


async def test_attempt_timeout() -> None:
    """An attempt that takes too long fails with AttemptTimeoutError, which says where, for how long and why."""
    with pytest.raises(AttemptTimeoutError) as caught:
        await run(sleeping(FOREVER), limited(STEP))

    # RT-023
    error = caught.value
    assert isinstance(error, TimeoutError)
    assert str(error) == "the attempt took longer than its attempt_timeout of 0.01 s"
    assert (error.limit, error.state, error.attempt) == (STEP, S.START, 1)
    assert isinstance(error.__cause__, asyncio.CancelledError)
    assert error.__notes__[0].endswith("attempt=1/1 path=START")


@pytest.mark.virtual
@pytest.mark.parametrize("limit", [0.25, 1, timedelta(seconds=90)], ids=str)
async def test_attempt_timeout_moment(limit: Any) -> None:
    """The timeout falls exactly at its limit."""
    with pytest.raises(AttemptTimeoutError):
        await run(sleeping(FOREVER), limited(limit))

    assert now() == (limit.total_seconds() if isinstance(limit, timedelta) else limit)


@pytest.mark.virtual
async def test_each_attempt_has_a_fresh_deadline() -> None:
    """Every attempt has the whole limit for itself; used-up retries end with the timeout as their cause."""
    calls: list[float] = []

    async def task() -> S:
        calls.append(now())
        await asyncio.sleep(FOREVER)
        return S.END

    with pytest.raises(RetryExhaustedError) as caught:
        await run(task, limited(1, 2))

    # RT-021
    assert calls == [0, 1, 2]
    assert isinstance(caught.value.__cause__, AttemptTimeoutError)
    assert str(caught.value).endswith("AttemptTimeoutError")
    assert now() == 3


async def test_timed_out_attempt_is_retried() -> None:
    """A first attempt that is too slow and a second one that is not are a success."""
    end = await run(sleeping(FOREVER, 0), limited(STEP, 1))

    # RT-022
    assert end is S.END


@pytest.mark.virtual
async def test_no_attempt_timeout() -> None:
    """Without a limit an attempt may take as long as it likes."""
    await run(sleeping(1e6))

    # RT-024
    assert now() == 1e6


async def test_timeout_stops_the_task_where_it_waits() -> None:
    """A timed-out attempt is stopped at its suspension: what follows does not run, its clean-up does, awaits included."""
    log: list[str] = []

    async def task() -> S:
        try:
            log.append("begun")
            await asyncio.sleep(FOREVER)
            log.append("not stopped")
        finally:
            await asyncio.sleep(5 * STEP)
            log.append("cleaned up")
        return S.END

    with pytest.raises(AttemptTimeoutError):
        await run(task, limited(STEP))

    # RT-025
    assert log == ["begun", "cleaned up"]


@pytest.mark.virtual
async def test_attempt_timeout_counts_from_the_start() -> None:
    """The time that an attempt spends before its first suspension counts."""
    loop = asyncio.get_running_loop()

    async def task() -> S:
        loop._set_time(now() + 0.75)  # type: ignore[attr-defined]
        await asyncio.sleep(FOREVER)
        return S.END

    with pytest.raises(AttemptTimeoutError):
        await run(task, limited(1))

    assert now() == 1


@pytest.mark.virtual
@pytest.mark.parametrize("form", ["plain", "async"])
async def test_attempt_that_does_not_wait(form: str) -> None:
    """An attempt that never suspends cannot be interrupted, and its result stands however long it took."""
    loop = asyncio.get_running_loop()

    def plain() -> S:
        loop._set_time(now() + 10)  # type: ignore[attr-defined]
        return S.END

    async def coroutine() -> S:
        return plain()

    assert await run(coroutine if form == "async" else plain, limited(1)) is S.END


async def test_attempt_timeout_of_zero() -> None:
    """A limit of 0 seconds leaves time for what does not wait, and for nothing else."""
    await run(lambda: S.END, limited(0))

    with pytest.raises(AttemptTimeoutError):
        await run(sleeping(STEP), limited(0))


@pytest.mark.virtual
async def test_pauses_are_not_covered() -> None:
    """The pause between attempts is not part of any attempt."""

    class Fails:
        calls = 0

        async def run(self) -> S:
            self.calls += 1
            await asyncio.sleep(0.5)
            if self.calls < 3:
                raise Oops
            return S.END

    await run(Fails(), limited(1, 2, 10))

    assert now() == 0.5 * 3 + 10 * 2


async def test_error_of_the_task_itself() -> None:
    """A TimeoutError that the task raises is its own failure, no attempt timeout."""
    error = TimeoutError("mine")

    async def task() -> S:
        raise error

    with pytest.raises(TimeoutError) as caught:
        await run(task, limited(FOREVER))

    assert caught.value is error


async def test_cancelled_error_of_the_task_itself() -> None:
    """A CancelledError that the task raises by itself passes through, although a timer is armed."""

    async def task() -> S:
        await asyncio.sleep(0)
        raise asyncio.CancelledError("mine")

    with pytest.raises(asyncio.CancelledError, match="mine"):
        await run(task, limited(FOREVER))


async def test_swallowed_attempt_timeout() -> None:
    """An attempt that swallows its timeout and returns keeps its result, and nothing of the timeout is left."""

    async def task() -> S:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(FOREVER)
        return S.END

    end = await run(task, limited(STEP))

    assert end is S.END
    assert cancelling() == 0


@pytest.mark.virtual
async def test_swallowed_attempt_timeout_that_goes_on() -> None:
    """An attempt that swallows its timeout and goes on is not cancelled again."""

    async def task() -> S:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(FOREVER)
        await asyncio.sleep(10)
        return S.END

    await run(task, limited(1))

    assert now() == 11
    assert cancelling() == 0


async def test_timeout_turned_into_another_failure() -> None:
    """An attempt that turns its timeout into an error has failed with that error, and is retried like any other."""
    calls: list[int] = []

    async def task(context: RunContext) -> S:
        calls.append(cancelling())
        if context.attempt == 1:
            try:
                await asyncio.sleep(FOREVER)
            except asyncio.CancelledError:
                raise Oops from None
        return S.END

    await run(task, limited(STEP, 1))

    assert calls == [0, 0]


@pytest.mark.virtual
async def test_timeouts_of_several_states() -> None:
    """Each state has its own limit: a shorter one after a longer one, none after one."""
    workflow = Workflow[S]().add_exit_state(S.END)

    async def first() -> S:
        await asyncio.sleep(0.5)
        return S.NEXT

    async def second() -> S:
        await asyncio.sleep(50)
        return S.OTHER

    workflow.register(S.START, first, config=limited(10))
    workflow.register(S.NEXT, second)
    workflow.register(S.OTHER, sleeping(FOREVER), config=limited(1))

    with pytest.raises(AttemptTimeoutError):
        await workflow.orchestrate(S.START)

    assert now() == 0.5 + 50 + 1


@pytest.mark.virtual
async def test_attempt_after_an_early_end() -> None:
    """The deadline of an attempt that ended early does not touch the next one, which has its own."""
    with pytest.raises(RetryExhaustedError):
        await run(failing_then_sleeping(), limited(1, 1))

    assert now() == 0.75 + 1


def failing_then_sleeping() -> Callable[[RunContext], Awaitable[S]]:
    async def task(context: RunContext) -> S:
        if context.attempt == 1:
            await asyncio.sleep(0.75)
            raise Oops
        await asyncio.sleep(FOREVER)
        return S.END

    return task


# One timer


class Arms:
    """Counts how often a timer is armed on the running loop."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.deadlines: list[float] = []
        loop = asyncio.get_running_loop()
        call_at = loop.call_at

        def counting(when: float, *args: Any, **options: Any) -> asyncio.TimerHandle:
            self.deadlines.append(when)
            return call_at(when, *args, **options)

        monkeypatch.setattr(loop, "call_at", counting)


@pytest.mark.virtual
async def test_attempts_share_a_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many attempts a run has, one timer serves them all."""
    arms = Arms(monkeypatch)
    most = 0

    async def task(context: RunContext) -> S:
        nonlocal most
        await asyncio.sleep(0)
        most = max(most, len(pending()))
        if context.attempt <= 1_000:
            raise Oops
        return S.END

    await run(task, limited(10, 1_000))

    assert arms.deadlines == [10]
    assert most == 1
    assert pending() == []


@pytest.mark.virtual
async def test_states_share_a_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many states a run passes, with limits of their own and one of the run, one timer serves them all."""
    arms = Arms(monkeypatch)

    async def task(context: RunContext) -> S:
        await asyncio.sleep(0)
        return S.START if context.visit < 1_000 else S.END

    await run(task, limited(10), timeout=5)

    assert arms.deadlines == [5]
    assert pending() == []


@pytest.mark.virtual
async def test_timer_is_armed_again_when_it_fires_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """A timer that fires for an attempt which is over is armed again for the attempt that runs then."""
    arms = Arms(monkeypatch)

    with pytest.raises(RetryExhaustedError):
        await run(failing_then_sleeping(), limited(1, 1))

    ours = [when for when in arms.deadlines if when not in (0.75, 0.75 + FOREVER)]
    assert ours == [1, 1.75]


@pytest.mark.virtual
@pytest.mark.parametrize("form", ["plain", "async"])
async def test_no_timer_without_a_suspension(monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    """A run that never waits arms no timer, whatever limits it has."""
    arms = Arms(monkeypatch)

    async def coroutine() -> S:
        return S.END

    await run(coroutine if form == "async" else lambda: S.END, limited(1), timeout=1)

    assert arms.deadlines == []


@pytest.mark.virtual
async def test_run_with_plain_branches_has_one_timer() -> None:
    """While a split waits, the limit of the run needs one timer, however many branches there are."""
    seen: list[int] = []
    futures = [asyncio.get_running_loop().create_future() for _ in range(10)]

    async def waits() -> None:
        await futures.pop()

    async def ends() -> None:
        await asyncio.sleep(0)
        seen.append(len(pending()))

    workflow = Workflow[S]().add_exit_state(S.END)
    workflow.register_split(S.START, [waits] * 10 + [ends], JoinConfig(JoinStrategy.Any, S.END))

    await workflow.orchestrate(S.START, timeout=10)

    assert seen == [1]


class Limited(Task[S]):
    """A branch that waits for a future, with a limit of its own."""

    def __init__(self, limit: float, future: "asyncio.Future[None] | None" = None) -> None:
        self.config = limited(limit)
        self.future = future or asyncio.get_running_loop().create_future()

    async def run(self) -> None:
        await self.future


@pytest.mark.virtual
async def test_limited_branches_share_a_timer() -> None:
    """The limits of all branches of a split need one timer, beside that of the split and that of the run."""
    seen: list[int] = []

    async def ends() -> None:
        await asyncio.sleep(0)
        seen.append(len(pending()))

    workflow = Workflow[S]().add_exit_state(S.END)
    branches = [Limited(5 + index % 7) for index in range(50)]
    workflow.register_split(S.START, [*branches, ends], JoinConfig(JoinStrategy.Any, S.END, timeout=20))

    await workflow.orchestrate(S.START, timeout=30)

    assert seen == [3]
    assert pending() == []


@pytest.mark.virtual
@pytest.mark.parametrize("bulkhead", [None, 1, 2])
async def test_limits_of_branches(bulkhead: int | None) -> None:
    """Each branch is stopped at its own limit, whatever the limits of the others, and whenever it started."""
    results: list[SplitResult] = []
    limits = [3, 1, 2, 1, 4, 0.5]
    join = JoinConfig(JoinStrategy.PartialTimeout, S.NEXT, timeout=FOREVER, bulkhead=bulkhead)

    def joined(result: SplitResult) -> S:
        results.append(result)
        return S.END

    workflow = Workflow[S]().register(S.NEXT, joined).add_exit_state(S.END)
    workflow.register_split(S.START, [Limited(limit) for limit in limits], join)

    await workflow.orchestrate(S.START)

    assert [one.elapsed for one in results[0].errors] == limits
    assert now() == {None: 4, 1: sum(limits), 2: 7}[bulkhead]


@pytest.mark.virtual
async def test_limit_of_a_branch_after_one_that_ended() -> None:
    """The limit of a branch holds although the one that a timer was armed for has ended."""
    future = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().call_later(0.5, future.set_result, None)
    workflow = Workflow[S]().add_exit_state(S.END)
    workflow.register_split(S.START, [Limited(1, future), Limited(3), Limited(2)], JoinConfig(JoinStrategy.All, S.END))

    with pytest.raises(JoinError) as caught:
        await workflow.orchestrate(S.START)

    assert caught.value.result is not None
    assert [one.elapsed for one in caught.value.result.errors] == [3, 2]


ENDINGS: dict[str, tuple[Any, TaskConfig | None, dict[str, Any]]] = {
    "success": (lambda: sleeping(STEP), limited(FOREVER), {"timeout": FOREVER}),
    "failure": (lambda: failing, limited(FOREVER), {"timeout": FOREVER}),
    "attempt timeout": (lambda: sleeping(FOREVER), limited(STEP), {"timeout": FOREVER}),
    "run timeout": (lambda: sleeping(FOREVER), limited(FOREVER), {"timeout": STEP}),
    "exhausted": (lambda: sleeping(FOREVER, FOREVER), limited(STEP, 1), {"timeout": FOREVER}),
}


async def failing() -> S:
    await asyncio.sleep(STEP)
    raise Oops


@pytest.mark.virtual
@pytest.mark.parametrize("ending", ENDINGS)
async def test_no_timer_is_left(ending: str) -> None:
    """However a run ends, it leaves no timer and no cancellation request."""
    make, config, options = ENDINGS[ending]

    with contextlib.suppress(Oops, TimeoutError, RetryExhaustedError):
        await run(make(), config, **options)

    assert pending() == []
    assert cancelling() == 0


@pytest.mark.virtual
async def test_no_timer_is_left_of_a_cancelled_run() -> None:
    """A cancelled run leaves no timer."""
    running = asyncio.create_task(run(sleeping(FOREVER), limited(FOREVER), timeout=FOREVER))
    await asyncio.sleep(1)

    running.cancel()
    await asyncio.wait([running])

    assert pending() == []


@pytest.mark.virtual
async def test_no_timer_is_left_of_a_closed_run() -> None:
    """A run that is closed instead of awaited to its end leaves no timer."""
    future = asyncio.get_running_loop().create_future()

    async def task() -> S:
        await future
        return S.END

    coroutine = run(task, limited(FOREVER), timeout=FOREVER)
    coroutine.send(None)
    armed = len(pending())

    coroutine.close()

    assert armed == 1
    assert pending() == []


@pytest.mark.parametrize("ending", ["attempt timeout", "run timeout", "exhausted"])
async def test_timeouts_leave_no_cycle(ending: str) -> None:
    """The error of a timeout, and what the task had, are freed without the collector."""
    died: list[weakref.ref[Any]] = []

    class Tracked:
        pass

    async def task() -> S:
        value = Tracked()
        died.append(weakref.ref(value))
        await asyncio.sleep(FOREVER)
        return S.END

    async def use() -> None:
        _, config, options = ENDINGS[ending]
        try:
            await run(task, config, **options)
        except (TimeoutError, RetryExhaustedError) as error:
            died.append(weakref.ref(error))

    gc.collect()
    gc.disable()
    try:
        await use()
        await asyncio.sleep(0)
        left = [one() for one in died if one() is not None]
    finally:
        gc.enable()

    assert len(died) >= 2
    assert left == []


# Whole runs


async def test_run_timeout() -> None:
    """A run over its budget fails with WorkflowTimeoutError, which says where, how long it took and what it had."""
    with pytest.raises(WorkflowTimeoutError) as caught:
        await run(sleeping(FOREVER), timeout=2 * STEP)

    # TT-001, FSM-012
    error = caught.value
    assert isinstance(error, TimeoutError)
    assert isinstance(error, WorkflowError)
    assert (error.state, error.attempt, error.path) == (S.START, 0, (S.START,))
    assert error.limit == 2 * STEP
    assert error.elapsed >= error.limit
    assert isinstance(error.__cause__, asyncio.CancelledError)


@pytest.mark.virtual
async def test_run_timeout_facts() -> None:
    """The time a run took is exact, and stands in its text."""
    with pytest.raises(WorkflowTimeoutError) as caught:
        await run(sleeping(FOREVER), timeout=2.5)

    # TT-002
    assert (caught.value.elapsed, caught.value.limit, now()) == (2.5, 2.5, 2.5)
    assert str(caught.value) == "the run took 2.500 s of the 2.5 s it was given"


@pytest.mark.virtual
async def test_run_timeout_spans_the_states() -> None:
    """The budget is one for all states of a run, pauses between attempts included."""

    async def first(context: RunContext) -> S:
        await asyncio.sleep(1)
        if context.attempt == 1:
            raise Oops
        return S.NEXT

    workflow = workflow_of(first, TaskConfig().with_fixed_retry(1, 5), NEXT=sleeping(FOREVER)).with_timeout(10)

    with pytest.raises(WorkflowTimeoutError) as caught:
        await workflow.orchestrate(S.START)

    assert caught.value.path == (S.START, S.NEXT)
    assert now() == 10


@pytest.mark.virtual
async def test_run_timeout_in_a_pause() -> None:
    """The budget ends a pause between attempts."""
    with pytest.raises(WorkflowTimeoutError) as caught:
        await run(failing, TaskConfig().with_fixed_retry(1, FOREVER), timeout=5)

    assert now() == 5
    assert caught.value.state is S.START


async def test_run_timeout_is_not_retried() -> None:
    """The end of the budget is no failed attempt."""
    calls: list[None] = []

    async def task() -> S:
        calls.append(None)
        await asyncio.sleep(FOREVER)
        return S.END

    with pytest.raises(WorkflowTimeoutError):
        await run(task, TaskConfig(retry=RetryMode.fixed(5, 0), retry_on=TimeoutError), timeout=STEP)

    assert len(calls) == 1


@pytest.mark.virtual
async def test_timeout_of_one_run() -> None:
    """A timeout given to a run takes the place of the workflow's, longer or shorter."""
    workflow = workflow_of(sleeping(3, 3, 3)).with_timeout(2)

    with pytest.raises(WorkflowTimeoutError) as own:
        await workflow.orchestrate(S.START)
    with pytest.raises(WorkflowTimeoutError) as shorter:
        await workflow.start(S.START, timeout=1)
    longer = await workflow.orchestrate(S.START, timeout=timedelta(minutes=1))

    assert (own.value.limit, shorter.value.limit, longer) == (2, 1, S.END)


@pytest.mark.virtual
async def test_concurrent_runs_have_their_own_budgets() -> None:
    """Runs of one workflow at once are bounded each by its own timeout."""
    workflow = workflow_of(sleeping(*[3] * 5))

    runs = [workflow.start(S.START, timeout=timeout) for timeout in (1, 2, 4, 5)]
    ends = await asyncio.gather(*runs, return_exceptions=True)

    assert [type(end) for end in ends] == [WorkflowTimeoutError, WorkflowTimeoutError, S, S]


async def test_error_before_the_timeout() -> None:
    """What a task raises within the budget is returned as it is."""
    with pytest.raises(Oops):
        await run(failing, timeout=FOREVER)

    # TT-006
    assert cancelling() == 0


@pytest.mark.parametrize("timeout", [315_576_000, timedelta(days=3652)], ids=str)
async def test_huge_timeout(timeout: Any) -> None:
    """A budget of years is one."""
    # TT-007
    assert await run(sleeping(STEP), timeout=timeout) is S.END


@pytest.mark.parametrize(
    "timeout", [-1, float("nan"), float("inf"), True, "1", 315_576_001, timedelta(seconds=-1)], ids=repr
)
async def test_timeout_refused(timeout: Any) -> None:
    """A budget out of range or of the wrong type is refused, where it is set and where it is given to a run."""
    workflow = workflow_of(sleeping(0))

    with pytest.raises(ConfigurationError, match="timeout must be"):
        workflow.with_timeout(timeout)
    with pytest.raises(ConfigurationError, match="timeout must be"):
        await workflow.orchestrate(S.START, timeout=timeout)


async def test_timeout_of_zero() -> None:
    """A budget of 0 seconds is used up before the first task, but reaches a run's end where it begins."""
    calls: list[None] = []
    workflow = workflow_of(lambda: calls.append(None))

    with pytest.raises(WorkflowTimeoutError):
        await workflow.orchestrate(S.START, timeout=0)
    end = await workflow.orchestrate(S.END, timeout=0)

    assert calls == []
    assert end is S.END


@pytest.mark.virtual
@pytest.mark.parametrize("kind", ["task", "split", "factory", "fork", "branches of a fork"])
async def test_used_up_budget_starts_nothing(kind: str) -> None:
    """What would start after the budget was used up, by a task that did not wait, is not started."""
    calls: list[str] = []
    loop = asyncio.get_running_loop()

    def slow() -> Any:
        loop._set_time(now() + 10)  # type: ignore[attr-defined]
        return TaskResult.Split([S.NEXT]) if kind == "branches of a fork" else S.NEXT

    def called() -> Any:
        calls.append(kind)
        return TaskResult.Split([S.END]) if kind == "fork" else [lambda: None]

    join = JoinConfig(JoinStrategy.All, S.END)
    workflow = Workflow[S]().register(S.START, slow, join=join).add_exit_state(S.END)
    if kind in ("split", "factory"):
        workflow.register_split(S.NEXT, [called] if kind == "split" else called, join)
    else:
        workflow.register(S.NEXT, called, join=join)

    with pytest.raises(WorkflowTimeoutError) as caught:
        await workflow.orchestrate(S.START, timeout=5)

    # B30
    assert calls == []
    assert caught.value.elapsed == 10
    assert cancelling() == 0


@pytest.mark.virtual
@pytest.mark.parametrize("following", ["task", "split", "factory", "fork"])
async def test_swallowed_run_timeout_in_a_branch(following: str) -> None:
    """A branch that swallows the end of the budget gets no further than the state it is in."""
    calls: list[None] = []

    async def deaf() -> S:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(FOREVER)
        return S.OTHER

    async def called() -> Any:
        calls.append(None)
        await asyncio.sleep(FOREVER)

    join = JoinConfig(JoinStrategy.All, S.END)
    workflow = Workflow[S]().register(S.START, lambda: TaskResult.Split([S.NEXT]), join=join).add_exit_state(S.END)
    workflow.register(S.NEXT, deaf)
    if following in ("split", "factory"):
        workflow.register_split(S.OTHER, [called] if following == "split" else called, join)
    else:
        workflow.register(S.OTHER, called, join=join if following == "fork" else None)

    with pytest.raises(WorkflowTimeoutError):
        await workflow.orchestrate(S.START, timeout=5)

    # B30
    assert (calls, now(), cancelling()) == ([], 5, 0)


@pytest.mark.virtual
@pytest.mark.parametrize("strategy", [JoinStrategy.All, JoinStrategy.Any, JoinStrategy.PartialResults(1)], ids=repr)
@pytest.mark.parametrize("kind", ["next state", "next attempt"])
async def test_budget_used_up_by_a_branch(kind: str, strategy: JoinStrategy) -> None:
    """A budget that a branch used up without waiting ends the run, before the branch's next state or attempt."""
    calls: list[None] = []
    loop = asyncio.get_running_loop()

    class Blocks(Task[S]):
        config = TaskConfig().with_fixed_retry(1, 0)

        async def run(self, context: RunContext) -> S:
            await asyncio.sleep(1)
            if context.attempt > 1:
                calls.append(None)
            loop._set_time(now() + 10)  # type: ignore[attr-defined]
            if kind == "next attempt":
                raise Oops
            return S.OTHER

    workflow = Workflow[S]().add_exit_state(S.END).register(S.OTHER, lambda: calls.append(None))
    workflow.register(S.NEXT, Blocks())
    join = JoinConfig(strategy, S.END)
    workflow.register(
        S.START, lambda: TaskResult.Split([S.NEXT, S.END][: 1 + (strategy == JoinStrategy.All)]), join=join
    )

    with pytest.raises(WorkflowTimeoutError) as caught:
        await workflow.orchestrate(S.START, timeout=5)

    # B30
    assert calls == []
    assert (caught.value.elapsed, caught.value.limit, cancelling()) == (11, 5, 0)


@pytest.mark.virtual
async def test_run_timeout_turned_into_a_failure_in_a_branch() -> None:
    """A branch that turns the end of the budget into a failure makes no other attempt."""
    calls: list[None] = []

    class Branch(Task[S]):
        config = TaskConfig().with_fixed_retry(3, 0)

        async def run(self) -> None:
            calls.append(None)
            try:
                await asyncio.sleep(FOREVER)
            finally:
                raise Oops

    workflow = Workflow[S]().add_exit_state(S.END)
    workflow.register_split(S.START, [Branch()], JoinConfig(JoinStrategy.All, S.END))

    with pytest.raises(WorkflowTimeoutError):
        await workflow.orchestrate(S.START, timeout=5)

    assert len(calls) == 1


async def test_swallowed_run_timeout() -> None:
    """A task that swallows the end of the budget is the last one: its next state is not run."""
    calls: list[None] = []

    async def deaf() -> S:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(FOREVER)
        return S.NEXT

    workflow = workflow_of(deaf, NEXT=lambda: calls.append(None))

    with pytest.raises(WorkflowTimeoutError):
        await workflow.orchestrate(S.START, timeout=STEP)

    # B30
    assert calls == []
    assert cancelling() == 0


async def test_swallowed_run_timeout_in_the_last_task() -> None:
    """A run that reaches an exit state has ended well, even if its last task swallowed the end of the budget."""

    async def deaf() -> S:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(FOREVER)
        return S.END

    end = await run(deaf, timeout=STEP)

    assert end is S.END
    assert cancelling() == 0


@pytest.mark.virtual
@pytest.mark.parametrize("ending", [S.END, S.NEXT], ids=["that ends", "that goes on"])
async def test_run_timeout_after_a_swallowed_attempt_timeout(ending: S) -> None:
    """An attempt that swallows its own timeout is still bounded by the budget of the run."""

    async def deaf() -> S:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(FOREVER)
        await asyncio.sleep(FOREVER)
        return ending

    with pytest.raises(WorkflowTimeoutError) as caught:
        await workflow_of(deaf, limited(1), NEXT=lambda: S.END).orchestrate(S.START, timeout=5)

    assert (now(), caught.value.elapsed, cancelling()) == (5, 5, 0)


@pytest.mark.virtual
async def test_run_timeout_while_a_timed_out_attempt_cleans_up() -> None:
    """The clean-up of an attempt that timed out is bounded by the budget of the run, and there is no other attempt."""
    log: list[float] = []

    async def task() -> S:
        try:
            await asyncio.sleep(FOREVER)
        finally:
            try:
                await asyncio.sleep(FOREVER)
            finally:
                log.append(now())
        return S.END

    with pytest.raises(WorkflowTimeoutError):
        await run(task, limited(1, 3), timeout=5)

    assert log == [5]
    assert cancelling() == 0


@pytest.mark.virtual
async def test_attempt_timeout_while_a_run_over_its_budget_cleans_up() -> None:
    """The limit of an attempt still bounds its clean-up after the run's budget stopped it; the run's error leaves."""
    log: list[float] = []

    async def task() -> S:
        try:
            await asyncio.sleep(FOREVER)
        finally:
            try:
                await asyncio.sleep(FOREVER)
            finally:
                log.append(now())
        return S.END

    with pytest.raises(WorkflowTimeoutError):
        await run(task, limited(5), timeout=1)

    assert log == [5]
    assert cancelling() == 0


async def test_run_timeout_waits_for_the_cleanup() -> None:
    """A run over its budget ends after the clean-up of the task it stopped."""
    log: list[str] = []

    async def task() -> S:
        try:
            await asyncio.sleep(FOREVER)
        finally:
            await asyncio.sleep(5 * STEP)
            log.append("cleaned up")
        return S.END

    with pytest.raises(WorkflowTimeoutError) as caught:
        await run(task, timeout=STEP)

    assert log == ["cleaned up"]
    assert caught.value.elapsed >= 5 * STEP


@pytest.mark.virtual
async def test_remaining() -> None:
    """A task may ask how much of the budget is left: inf without one, never below 0."""
    seen: list[float] = []

    async def task(context: RunContext) -> S:
        seen.append(context.remaining())
        await asyncio.sleep(1.5)
        seen.append(context.remaining())
        asyncio.get_running_loop()._set_time(now() + 10)  # type: ignore[attr-defined]
        seen.append(context.remaining())
        return S.END

    await run(task, timeout=4)
    await run(task)

    assert seen == [4, 2.5, 0, float("inf"), float("inf"), float("inf")]


@pytest.mark.virtual
async def test_remaining_in_a_branch() -> None:
    """A branch asks for the budget of the whole run."""
    seen: list[float] = []

    async def branch(context: RunContext) -> None:
        await asyncio.sleep(1)
        seen.append(context.remaining())

    workflow = Workflow[S]().add_exit_state(S.END)
    workflow.register_split(S.START, [branch] * 2, JoinConfig(JoinStrategy.All, S.END))

    await workflow.orchestrate(S.START, timeout=4)

    assert seen == [3, 3]


# Timeouts of runs with branches


@pytest.mark.virtual
@pytest.mark.parametrize(
    "config", [None, limited(FOREVER), TaskConfig().with_fixed_retry(3, 0)], ids=["plain", "limited", "retried"]
)
@pytest.mark.parametrize("kind", ["split", "fork"])
async def test_run_timeout_ends_branches(config: TaskConfig | None, kind: str) -> None:
    """The end of the budget cancels every branch once, awaits its clean-up, and is raised by the run, not by a join."""
    log: list[str] = []

    class Branch(Task[S]):
        async def run(self) -> S:
            try:
                await asyncio.sleep(FOREVER)
            except asyncio.CancelledError:
                log.append("cancelled")
                await asyncio.sleep(1)
                log.append("ended")
                raise
            return S.END

    Branch.config = config
    workflow = Workflow[S]().add_exit_state(S.END)
    join = JoinConfig(JoinStrategy.Any, S.END)
    if kind == "split":
        workflow.register_split(S.START, [Branch(), Branch()], join)
    else:
        workflow.register(S.START, lambda: TaskResult.Split([S.NEXT, S.NEXT]), join=join).register(S.NEXT, Branch())

    with pytest.raises(WorkflowTimeoutError) as caught:
        await workflow.orchestrate(S.START, timeout=5)

    assert log == ["cancelled"] * 2 + ["ended"] * 2
    assert (caught.value.elapsed, caught.value.state, caught.value.path) == (6, S.START, (S.START,))
    assert cancelling() == 0


@pytest.mark.virtual
async def test_run_timeout_while_losers_clean_up() -> None:
    """A budget that ends after the decision, while losers clean up, still ends the run."""

    async def loser() -> None:
        try:
            await asyncio.sleep(FOREVER)
        finally:
            await asyncio.sleep(10)

    workflow = Workflow[S]().add_exit_state(S.END).register(S.NEXT, lambda: S.END)
    workflow.register_split(S.START, [sleeping(1), loser], JoinConfig(JoinStrategy.Any, S.NEXT))

    with pytest.raises(WorkflowTimeoutError) as caught:
        await workflow.orchestrate(S.START, timeout=5)

    assert caught.value.state is S.START
    assert cancelling() == 0


@pytest.mark.virtual
async def test_run_timeout_in_a_factory() -> None:
    """The budget bounds the making of branches, too."""

    async def factory() -> list[Any]:
        await asyncio.sleep(FOREVER)
        return []

    workflow = Workflow[S]().add_exit_state(S.END)
    workflow.register_split(S.START, factory, JoinConfig(JoinStrategy.All, S.END))

    with pytest.raises(WorkflowTimeoutError):
        await workflow.orchestrate(S.START, timeout=5)

    assert now() == 5


# Nesting

LIMITS = ["outer", "run", "join", "attempt", "inner"]
"""From the outside in: around the run, of the run, of its split, of the attempt, inside the attempt."""

KINDS = ["state", "split", "fork"]


def nest(kind: str, task: Callable[[], Awaitable[S]], limits: dict[str, float]) -> Workflow[S]:
    """A workflow that runs the task as a state's, as a branch of a split or in a branch of a fork, and ends where it says."""

    def joined(result: SplitResult) -> S:
        (value,) = result.values()
        return value  # type: ignore[no-any-return]

    class Limited(Task[S]):
        config = TaskConfig().with_attempt_timeout(limits.get("attempt"))

        async def run(self) -> S:
            return await task()

    workflow = Workflow[S]().add_exit_states([S.END, S.LATE])
    join = JoinConfig(JoinStrategy.All, S.NEXT, timeout=limits.get("join"))
    if kind == "state":
        return workflow.register(S.START, Limited())
    if kind == "split":
        workflow.register_split(S.START, [Limited()], join)
    else:
        workflow.register(S.START, lambda: TaskResult.Split([S.OTHER]), join=join).register(S.OTHER, Limited())
    return workflow.register(S.NEXT, joined)


async def stopped_by(kind: str, limits: dict[str, float], sleep: float) -> str:
    """Sleep inside some limits, and tell which of them stopped it."""

    async def task() -> S:
        try:
            async with asyncio.timeout(limits.get("inner")):
                await asyncio.sleep(sleep)
        except TimeoutError:
            return S.LATE
        return S.END

    try:
        async with asyncio.timeout(limits.get("outer")):
            end = await nest(kind, task, limits).orchestrate(S.START, timeout=limits.get("run"))
    except AttemptTimeoutError:
        return "attempt"
    except WorkflowTimeoutError:
        return "run"
    except JoinTimeoutError:
        return "join"
    except JoinError as error:
        return "attempt" if isinstance(error.exceptions[0], AttemptTimeoutError) else "a failure"
    except TimeoutError:
        return "outer"
    return "inner" if end is S.LATE else "none"


@given(
    kind=st.sampled_from(KINDS),
    limits=st.dictionaries(st.sampled_from(LIMITS), st.integers(1, 4)),
    sleep=st.integers(1, 5),
)
@example(kind="state", limits=dict.fromkeys(LIMITS, 1), sleep=1)
@example(kind="split", limits=dict.fromkeys(LIMITS, 1), sleep=1)
@example(kind="fork", limits=dict.fromkeys(LIMITS, 1), sleep=1)
def test_nested_limits(kind: str, limits: dict[str, float], sleep: int) -> None:
    """Of nested limits the first to fall stops the work, of several that fall at the same moment the outermost."""
    if kind == "state":
        limits.pop("join", None)
    moment = min([*limits.values(), sleep])
    falling = [name for name in LIMITS if limits.get(name) == moment]
    expected = falling[0] if falling else "none"

    async def main() -> tuple[str, float, int, list[Any]]:
        return await stopped_by(kind, limits, sleep), now(), cancelling(), pending()

    assert cano.testing.run(main()) == (expected, moment, 0, [])


def under_attempt_timeout(limit: float, body: Callable[[], Awaitable[S]]) -> Awaitable[S]:
    return run(body, limited(limit))


def under_run_timeout(limit: float, body: Callable[[], Awaitable[S]]) -> Awaitable[S]:
    return run(body, timeout=limit)


async def under_asyncio_timeout(limit: float, body: Callable[[], Awaitable[S]]) -> S:
    async with asyncio.timeout(limit):
        return await body()


OURS = pytest.mark.parametrize("under", [under_attempt_timeout, under_run_timeout], ids=["attempt", "run"])


async def inner_timeout(limit: float) -> str:
    try:
        async with asyncio.timeout(limit):
            await asyncio.sleep(FOREVER)
    except TimeoutError:
        return "timeout"
    return "slept"


async def inner_wait_for(limit: float) -> str:
    try:
        await asyncio.wait_for(asyncio.sleep(FOREVER), limit)
    except TimeoutError:
        return "timeout"
    return "slept"


async def inner_move_on_after(limit: float) -> str:
    with anyio.move_on_after(limit) as scope:
        await asyncio.sleep(FOREVER)
    return "moved on" if scope.cancelled_caught else "slept"


async def inner_fail_after(limit: float) -> str:
    try:
        with anyio.fail_after(limit):
            await asyncio.sleep(FOREVER)
    except TimeoutError:
        return "timeout"
    return "slept"


async def inner_task_group(limit: float) -> str:
    async def stops() -> None:
        await asyncio.sleep(limit)
        raise Oops

    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(stops())
            group.create_task(asyncio.sleep(FOREVER))
    except ExceptionGroup:
        return "failed"
    return "slept"


async def inner_anyio_group(limit: float) -> str:
    async with anyio.create_task_group() as group:
        group.start_soon(asyncio.sleep, FOREVER)
        await asyncio.sleep(limit)
        group.cancel_scope.cancel()
    return "cancelled"


async def inner_shielded_scope(limit: float) -> str:
    with anyio.CancelScope(shield=True):
        await asyncio.sleep(limit)
    return "shielded"


async def inner_cleanup(limit: float) -> str:
    try:
        await asyncio.sleep(FOREVER)
    finally:
        await asyncio.sleep(limit)
    return "slept"


INNER = [
    inner_timeout,
    inner_wait_for,
    inner_move_on_after,
    inner_fail_after,
    inner_task_group,
    inner_anyio_group,
    inner_shielded_scope,
    inner_cleanup,
]


@OURS
@pytest.mark.parametrize("limit", [1, 2, 3], ids=["first", "at the same moment", "later"])
@pytest.mark.parametrize("rest", [0, 5], ids=["and ends", "and goes on"])
@pytest.mark.parametrize("inner", INNER, ids=lambda inner: inner.__name__.removeprefix("inner_"))
def test_inside_like_asyncio_timeout(
    under: Any, inner: Callable[[float], Awaitable[str]], limit: float, rest: float
) -> None:
    """Whatever happens inside, our limits do exactly what ``asyncio.timeout`` does in their place."""

    async def observe(under: Any) -> tuple[list[str], str, float, int]:
        log: list[str] = []

        async def body() -> S:
            log.append(await inner(limit))
            await asyncio.sleep(rest)
            return S.END

        try:
            outcome = str(await under(2, body))
        except TimeoutError:
            outcome = "timeout"
        except asyncio.CancelledError:  # TaskGroup of Python 3.11 may leave a cancellation request behind
            outcome = "cancelled"
        return log, outcome, now(), cancelling()

    assert cano.testing.run(observe(under)) == cano.testing.run(observe(under_asyncio_timeout))


async def around_timeout(limit: float, body: Callable[[], Awaitable[object]]) -> str:
    async with asyncio.timeout(limit):
        await body()
    return "ended"


async def around_wait_for(limit: float, body: Callable[[], Awaitable[object]]) -> str:
    async def coroutine() -> object:
        return await body()

    await asyncio.wait_for(coroutine(), limit)
    return "ended"


async def around_move_on_after(limit: float, body: Callable[[], Awaitable[object]]) -> str:
    with anyio.move_on_after(limit) as scope:
        await body()
    return "moved on" if scope.cancelled_caught else "ended"


async def around_fail_after(limit: float, body: Callable[[], Awaitable[object]]) -> str:
    with anyio.fail_after(limit):
        await body()
    return "ended"


async def around_task_group(limit: float, body: Callable[[], Awaitable[object]]) -> str:
    async def stops() -> None:
        await asyncio.sleep(limit)
        raise Oops

    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(stops())
            await body()
    except ExceptionGroup:
        return "failed"
    return "ended"


async def _awaiting(body: Callable[[], Awaitable[object]]) -> None:
    await body()


async def around_anyio_group(limit: float, body: Callable[[], Awaitable[object]]) -> str:
    async with anyio.create_task_group() as group:
        group.start_soon(_awaiting, body)
        await asyncio.sleep(limit)
        group.cancel_scope.cancel()
    return "ended"


AROUND = [
    around_timeout,
    around_wait_for,
    around_move_on_after,
    around_fail_after,
    around_task_group,
    around_anyio_group,
]


@pytest.mark.parametrize("limit", [1, 2, 3], ids=["first", "at the same moment", "later"])
@pytest.mark.parametrize("around", AROUND, ids=lambda around: around.__name__.removeprefix("around_"))
@OURS
def test_around_like_asyncio_timeout(
    under: Any, around: Callable[[float, Callable[[], Awaitable[object]]], Awaitable[str]], limit: float
) -> None:
    """Whatever is around, our limits do exactly what ``asyncio.timeout`` does in their place."""

    async def observe(under: Any) -> tuple[list[str], str, float, int]:
        log: list[str] = []

        async def body() -> S:
            try:
                await asyncio.sleep(FOREVER)
            except asyncio.CancelledError:
                log.append("cancelled")
                raise
            return S.END

        async def limited_body() -> None:
            try:
                await under(2, body)
            except TimeoutError:
                log.append("timeout")

        outcome = "timeout"
        with contextlib.suppress(TimeoutError):
            outcome = await around(limit, limited_body)
        return log, outcome, now(), cancelling()

    assert cano.testing.run(observe(under)) == cano.testing.run(observe(under_asyncio_timeout))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("around", AROUND, ids=lambda around: around.__name__.removeprefix("around_"))
def test_around_a_run(around: Callable[[float, Callable[[], Awaitable[object]]], Awaitable[str]], kind: str) -> None:
    """Whoever is around a run may cancel it, with branches or without, and finds nothing left of it."""
    log: list[str] = []

    async def task() -> S:
        try:
            await asyncio.sleep(FOREVER)
        finally:
            log.append("cleaned up")
        return S.END

    async def main() -> tuple[str, float, int]:
        workflow = nest(kind, task, {})
        outcome = "timeout"
        with contextlib.suppress(TimeoutError):
            outcome = await around(2, lambda: workflow.orchestrate(S.START))
        return outcome, now(), cancelling()

    outcome, moment, requests = cano.testing.run(main())

    assert outcome in ("timeout", "moved on", "failed", "ended")
    assert (moment, requests, log) == (2, 0, ["cleaned up"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("inner", INNER[:7], ids=lambda inner: inner.__name__.removeprefix("inner_"))
def test_scopes_in_a_task(inner: Callable[[float], Awaitable[str]], kind: str) -> None:
    """Scopes and groups that end inside a task, also in its first step, leave run and siblings alone."""

    async def task() -> S:
        await inner(0)
        await inner(1)
        return S.END

    async def observe(run: Callable[[], Awaitable[S]]) -> tuple[S, int]:
        return await run(), cancelling()

    plain = cano.testing.run(observe(task))
    ours = cano.testing.run(observe(lambda: nest(kind, task, {}).orchestrate(S.START)))

    assert ours == (plain if kind == "state" else (S.END, 0))


async def test_scope_around_a_run_cancelled_by_a_branch() -> None:
    """A branch may cancel an anyio scope that is around its run, in its first step."""
    log: list[str] = []

    with anyio.CancelScope() as scope:

        async def cancels() -> None:
            scope.cancel()
            await asyncio.sleep(FOREVER)

        async def waits() -> None:
            try:
                await asyncio.sleep(FOREVER)
            finally:
                log.append("cleaned up")

        workflow = Workflow[S]().add_exit_state(S.END)
        workflow.register_split(S.START, [waits, cancels], JoinConfig(JoinStrategy.All, S.END))
        await workflow.orchestrate(S.START)

    assert scope.cancelled_caught
    assert log == ["cleaned up"]
    assert cancelling() == 0


async def test_anyio_group_inside_branches() -> None:
    """Branches may open anyio task groups of their own."""

    async def branch() -> list[int]:
        done: list[int] = []

        async def child(number: int) -> None:
            await anyio.sleep(number * STEP)
            done.append(number)

        async with anyio.create_task_group() as group:
            for number in (2, 1, 3):
                group.start_soon(child, number)
        return done

    results: list[SplitResult] = []

    def joined(result: SplitResult) -> S:
        results.append(result)
        return S.END

    workflow = Workflow[S]().register(S.NEXT, joined).add_exit_state(S.END)
    workflow.register_split(S.START, [branch] * 3, JoinConfig(JoinStrategy.All, S.NEXT))

    await workflow.orchestrate(S.START)

    assert results[0].values() == [[1, 2, 3]] * 3


async def test_run_inside_an_anyio_group() -> None:
    """Runs may be the tasks of an anyio task group, and one that fails cancels the others."""
    log: list[str] = []

    async def waits() -> S:
        try:
            await asyncio.sleep(FOREVER)
        finally:
            log.append("cleaned up")
        return S.END

    with pytest.raises(ExceptionGroup) as caught:
        async with anyio.create_task_group() as group:
            group.start_soon(run, waits)
            group.start_soon(run, failing)

    assert [type(one) for one in caught.value.exceptions] == [Oops]
    assert log == ["cleaned up"]


# Timeouts together with cancellations of others


@pytest.mark.virtual
@pytest.mark.parametrize(
    "under", [under_attempt_timeout, under_run_timeout, under_asyncio_timeout], ids=["attempt", "run", "asyncio"]
)
@pytest.mark.parametrize(
    ("cancel_at", "limit"), [(1, 3), (3, 1), (2, 2)], ids=["cancel first", "timeout first", "at the same moment"]
)
async def test_cancel_and_timeout(under: Any, cancel_at: float, limit: float) -> None:
    """Where somebody cancels while a timeout is on its way, or the other way round, the cancellation leaves."""
    log: list[float] = []

    async def body() -> S:
        try:
            await asyncio.sleep(FOREVER)
        finally:
            try:
                await asyncio.sleep(10)
            finally:
                log.append(now())
        return S.END

    async def main() -> S:
        return await under(limit, body)  # type: ignore[no-any-return]

    task = asyncio.create_task(main())
    asyncio.get_running_loop().call_later(cancel_at, task.cancel, "by the user")
    await asyncio.wait([task])

    # CN-014
    assert task.cancelled()
    assert task.cancelling() == 1
    assert log == [12] if cancel_at == limit else [3]


@pytest.mark.virtual
@pytest.mark.parametrize("first", ["timeout", "cancel"])
@pytest.mark.parametrize("kind", KINDS)
async def test_cancel_and_run_timeout_at_the_same_moment(kind: str, first: str) -> None:
    """A cancellation and the end of the budget in one pass of the loop are a cancellation, in either order."""
    workflow = nest(kind, sleeping(FOREVER), {})
    loop = asyncio.get_running_loop()
    delay = 0 if first == "timeout" else 2
    task: asyncio.Task[S] | None = None

    def cancel() -> None:
        assert task is not None
        task.cancel("by the user")

    if delay:
        loop.call_at(2, cancel)
    task = asyncio.create_task(workflow.orchestrate(S.START, timeout=2))
    await asyncio.sleep(1)
    if not delay:
        loop.call_at(2, cancel)
    await asyncio.wait([task])

    # CN-014
    assert task.cancelled()
    assert now() == 2


@pytest.mark.virtual
@OURS
async def test_timeout_after_a_swallowed_cancel(under: Any) -> None:
    """A task that swallowed somebody's cancellation is still stopped by its timeout, as such."""

    async def body() -> S:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(FOREVER)
        task = asyncio.current_task()
        assert task is not None
        task.uncancel()
        await asyncio.sleep(FOREVER)
        return S.END

    async def main() -> S:
        return await under(3, body)  # type: ignore[no-any-return]

    task = asyncio.create_task(main())
    asyncio.get_running_loop().call_later(1, task.cancel)
    await asyncio.wait([task])

    assert isinstance(task.exception(), TimeoutError)
    assert now() == 3


@pytest.mark.virtual
@OURS
async def test_timeout_in_a_cancelled_task(under: Any) -> None:
    """A timeout that begins while a cancellation is being handled counts for itself."""

    async def main() -> str:
        try:
            await asyncio.sleep(FOREVER)
        except asyncio.CancelledError:
            try:
                await under(2, sleeping(FOREVER))
            except TimeoutError:
                return "timeout"
        return "no timeout"

    task = asyncio.create_task(main())
    await asyncio.sleep(1)

    task.cancel()

    assert await task == "timeout"
    assert now() == 3


@pytest.mark.virtual
@OURS
async def test_result_at_the_moment_of_the_timeout(under: Any) -> None:
    """Work that is done in the very pass of the loop in which its limit falls is too late, as with asyncio.timeout."""
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().call_later(2, future.set_result, None)

    async def body() -> S:
        await future
        return S.END

    with pytest.raises(TimeoutError):
        await under(2, body)

    assert cancelling() == 0


@pytest.mark.parametrize("config", [limited(1), limited(1, 2)], ids=["once", "retried"])
def test_debug_mode(config: TaskConfig) -> None:
    """In asyncio's debug mode limits work the same."""

    async def main() -> tuple[type[BaseException], float]:
        with pytest.raises((AttemptTimeoutError, RetryExhaustedError)) as caught:
            await run(sleeping(*[FOREVER] * 3), config)
        return caught.type, now()

    assert cano.testing.run(main(), debug=True) == cano.testing.run(main())


def test_run_that_nobody_drives() -> None:
    """A run with a limit that is stepped outside of any task fails with an error that says why."""

    async def suspends() -> S:
        await asyncio.sleep(1)
        return S.END

    async def main() -> None:
        coroutine = run(suspends, limited(1))

        def step() -> None:
            try:
                coroutine.send(None)
            except BaseException as error:
                done.set_exception(error)

        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_soon(step)
        await done

    with pytest.raises(WorkflowError, match="needs a running asyncio task"):
        cano.testing.run(main())
