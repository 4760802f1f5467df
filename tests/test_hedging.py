"""Hedging: which branch starts when, which is never called, and that nothing of it outlives the decision."""

import asyncio
import contextvars
import gc
import math
import pickle
import weakref
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

import cano.testing
from cano import (
    BranchOutcome,
    Bulkhead,
    ConfigurationError,
    JoinConfig,
    JoinError,
    JoinStrategy,
    JoinTimeoutError,
    SplitResult,
    Task,
    TaskConfig,
    TaskResult,
    Workflow,
)

STEP = 0.01
FOREVER = 3600.0
ANY = JoinStrategy.Any

Body = Callable[[], Coroutine[Any, Any, Any]]


@pytest.fixture(params=["native", "asyncio"], autouse=True)
def branches(request: pytest.FixtureRequest) -> Iterator[str]:
    """What branches are: tasks of cano's own, and asyncio's."""
    cano.configure(branches=request.param)
    yield request.param
    cano.configure(branches="native")


class Oops(Exception):
    """What failing branches raise; its argument is the index of the branch."""


def now() -> float:
    return asyncio.get_running_loop().time()


class Plan:
    """Branches of a text like "n f2 s1 c1": never, fails after 2 steps, succeeds after 1, cancels itself after 1.

    `starts` are the steps at which they were started, by index.
    """

    def __init__(self, text: str) -> None:
        self.ends = text.split()
        self.starts: dict[int, float] = {}
        self.cleaned: list[int] = []
        self.branches = [self.branch(index) for index in range(len(self.ends))]

    def branch(self, index: int) -> Body:
        ends = self.ends[index]

        async def run() -> str:
            self.starts[index] = round(now() / STEP, 6)
            try:
                await asyncio.sleep(int(ends[1:]) * STEP if ends != "n" else FOREVER)
            except asyncio.CancelledError:
                await asyncio.sleep(STEP)
                self.cleaned.append(index)
                raise
            if ends[0] == "f":
                raise Oops(index)
            if ends[0] == "c":
                raise asyncio.CancelledError
            return f"value {index}"

        return run


def hedged(tasks: Any, after: float | timedelta = STEP, joined: Any = None, **options: Any) -> Workflow[str]:
    """A workflow that splits, joins and ends."""
    return (
        Workflow[str]()
        .register_split("split", tasks, JoinConfig(ANY, "joined", hedge_after=after, **options))
        .register("joined", joined or (lambda: "end"))
        .add_exit_state("end")
    )


async def join(tasks: Any, after: float | timedelta = STEP, **options: Any) -> SplitResult:
    """Run a hedged split, and give what its joined state got."""
    results: list[SplitResult] = []

    def joined(result: SplitResult) -> str:
        results.append(result)
        return "end"

    await hedged(tasks, after, joined, **options).orchestrate("split")
    (result,) = results
    return result


def shape(result: SplitResult | None) -> tuple[list[int], list[int], list[int]]:
    assert result is not None
    return [one.index for one in result.successes], [one.index for one in result.errors], result.cancelled


# When branches start


@pytest.mark.virtual
@pytest.mark.parametrize(
    ("text", "starts", "ended"),
    [
        pytest.param("s1 s1 s1", [0], ([0], [], [1, 2]), id="the first is fast"),
        pytest.param("n s1 s1", [0, 3], ([1], [], [0, 2]), id="the first is slow"),
        pytest.param("n n n s1", [0, 3, 6, 9], ([3], [], [0, 1, 2]), id="all but the last are slow"),
        pytest.param("s4 n n", [0, 3], ([0], [], [1, 2]), id="the slow one comes first"),
        pytest.param("f1 s9 n n", [0, 1, 4, 7], ([1], [0], [2, 3]), id="the first fails"),
        pytest.param("f5 n n s1 n", [0, 3, 5, 8], ([3], [0], [1, 2, 4]), id="one fails while the newest is young"),
        pytest.param("f5 f2 n n s2 n", [0, 3, 5, 5, 8], ([4], [0, 1], [2, 3, 5]), id="two fail at once"),
        pytest.param("c1 s1 n", [0, 1], ([1], [], [0, 2]), id="the first cancels itself"),
        pytest.param("f4 s4", [0, 3], ([1], [0], []), id="no more to start"),
        pytest.param("s9", [0], ([0], [], []), id="only one"),
    ],
)
async def test_starts(text: str, starts: list[int], ended: tuple[list[int], list[int], list[int]]) -> None:
    """The next branch starts when the newest has run for so long, or one has ended without success."""
    plan = Plan(text)

    result = await join(plan.branches, 3 * STEP)

    assert plan.starts == dict(enumerate(starts))
    assert shape(result) == ended


@pytest.mark.virtual
async def test_all_fail() -> None:
    """When every branch has failed, one after the other, the join fails with all of their errors."""
    plan = Plan("f2 f2 f9 f1")

    with pytest.raises(JoinError) as caught:
        await join(plan.branches, 4 * STEP)

    assert plan.starts == {0: 0, 1: 2, 2: 4, 3: 8}
    assert shape(caught.value.result) == ([], [0, 1, 2, 3], [])
    assert not isinstance(caught.value, JoinTimeoutError)


@pytest.mark.virtual
async def test_all_are_started_and_wait() -> None:
    """Once every branch has been started there is nothing more to wait for than their ends."""
    plan = Plan("n n s9")

    result = await join(plan.branches, STEP)

    assert plan.starts == {0: 0, 1: 1, 2: 2}
    assert now() == pytest.approx(12 * STEP)  # and a step for the losers' clean-up
    assert shape(result) == ([2], [], [0, 1])


@pytest.mark.virtual
async def test_elapsed_counts_from_the_own_start() -> None:
    """How long a branch took is counted from its own start."""
    result = await join(Plan("f5 n s2").branches, 3 * STEP)

    took = {one.index: one.elapsed for one in result.successes + result.errors}
    assert took == {0: pytest.approx(5 * STEP), 2: pytest.approx(2 * STEP)}


async def test_tasks_that_are_not_started_are_never_called() -> None:
    """A task of a branch that is not started is not called."""
    called = []

    def task(index: int) -> Callable[[], int]:
        return lambda: called.append(index) or index  # type: ignore[func-returns-value]

    result = await join([task(0), task(1), task(2)])

    assert called == [0]
    assert shape(result) == ([0], [], [1, 2])


async def test_failures_without_a_wait() -> None:
    """Branches that fail without waiting are followed by the next at once, also thousands of them."""
    called = []

    def fails() -> None:
        called.append(1)
        raise Oops

    result = await join([fails] * 3_000 + [lambda: "value"] * 3, FOREVER)

    assert len(called) == 3_000
    assert len(result.errors) == 3_000
    assert result.values() == ["value"]
    assert result.cancelled == [3_001, 3_002]


@pytest.mark.virtual
async def test_retries_are_within_the_branch() -> None:
    """A failed attempt that is retried is no end of the branch; being slow counts from the branch's start."""
    starts = []

    class Flaky(Task[str]):
        config = TaskConfig().with_fixed_retry(2, 2 * STEP)

        async def run(self) -> str:
            starts.append(round(now() / STEP))
            if len(starts) == 1:
                raise Oops
            await asyncio.sleep(FOREVER)
            return "never"

    plan = Plan("s1")

    result = await join([Flaky(), *plan.branches], 5 * STEP)

    assert starts == [0, 2]
    assert plan.starts == {0: 5}
    assert shape(result) == ([1], [], [0])


@pytest.mark.virtual
@pytest.mark.parametrize("waits", [False, True])
async def test_branches_made_at_run_time(*, waits: bool) -> None:
    """Branches that a function makes are hedged from the moment at which they are there."""
    plan = Plan("n s1 n")

    async def make() -> list[Body]:
        if waits:
            await asyncio.sleep(5 * STEP)
        return plan.branches

    result = await join(make, 3 * STEP)

    assert plan.starts == {0: 5 * waits, 1: 5 * waits + 3}
    assert shape(result) == ([1], [], [0, 2])


@pytest.mark.virtual
async def test_fork() -> None:
    """Branches that run through states of their own are hedged as any others."""
    entered: list[tuple[str, float]] = []

    def state(name: str, following: str, delay: float) -> Body:
        async def run() -> str:
            entered.append((name, round(now() / STEP)))
            await asyncio.sleep(delay)
            return following

        return run

    workflow = (
        Workflow[str]()
        .register(
            "fork",
            lambda: TaskResult.Split(["slow", "fast", "other"]),
            join=JoinConfig(ANY, "joined", hedge_after=3 * STEP),
        )
        .register("slow", state("slow", "slower", 2 * STEP))
        .register("slower", state("slower", "joined", FOREVER))
        .register("fast", state("fast", "faster", STEP))
        .register("faster", state("faster", "joined", STEP))
        .register("other", state("other", "joined", 0))
        .register("joined", lambda: "end")
        .add_exit_state("end")
    )

    await workflow.orchestrate("fork")

    assert entered == [("slow", 0), ("slower", 2), ("fast", 3), ("faster", 4)]


# With other limits


@pytest.mark.virtual
async def test_timeout_before_the_next_start() -> None:
    """A timeout below hedge_after is allowed: only the first branch is ever started."""
    plan = Plan("n s1")

    with pytest.raises(JoinTimeoutError) as caught:
        await join(plan.branches, 9 * STEP, timeout=2 * STEP)

    assert plan.starts == {0: 0}
    assert plan.cleaned == [0]
    assert shape(caught.value.result) == ([], [], [0, 1])


@pytest.mark.virtual
async def test_timeout_between_starts() -> None:
    """The timeout counts from the split's start, and ends the starts."""
    plan = Plan("n n n n")

    with pytest.raises(JoinTimeoutError):
        await join(plan.branches, 3 * STEP, timeout=7 * STEP)

    assert plan.starts == {0: 0, 1: 3, 2: 6}
    assert plan.cleaned == [0, 1, 2]


@pytest.mark.virtual
@pytest.mark.parametrize(
    ("text", "bulkhead", "starts"),
    [
        pytest.param("f5 n s1", 1, {0: 0, 1: 5}, id="late for the bulkhead"),
        pytest.param("f7 n n s1 n n", 2, {0: 0, 1: 2, 2: 7}, id="late, and one more for the failure"),
        pytest.param("f7 f9 n n s1 n", 2, {0: 0, 1: 2, 2: 7, 3: 11}, id="late, and one more for each failure"),
        pytest.param("f3 n s9", 2, {0: 0, 1: 2, 2: 3}, id="in time"),
    ],
)
@pytest.mark.parametrize("make", [int, Bulkhead], ids=["own", "shared"])
async def test_full_bulkhead_delays_the_start(
    text: str, bulkhead: int, starts: dict[int, int], make: Callable[[int], int | Bulkhead]
) -> None:
    """A start that is due waits until the bulkhead, own or shared, has room, and is made up for then."""
    plan = Plan(text)

    with pytest.raises(JoinTimeoutError):
        await join(plan.branches, 2 * STEP, bulkhead=make(bulkhead), timeout=11.5 * STEP)

    assert plan.starts == starts


@pytest.mark.virtual
async def test_shared_bulkhead_is_asked_when_a_start_is_due() -> None:
    """A hedged split has a slot for each branch alive, and stands in the line only while a start is due."""
    bulkhead = Bulkhead(2)
    seen: list[tuple[float, int, int]] = []
    plan = Plan("n n s1")

    async def watch() -> None:
        for _ in range(8):
            await asyncio.sleep(STEP)
            seen.append((bulkhead.in_use, bulkhead.waiting, len(plan.starts)))

    async def hold() -> None:
        async with bulkhead:
            await asyncio.sleep(5.5 * STEP)

    _, _, result = await asyncio.gather(
        hold(), watch(), join(plan.branches, 2.5 * STEP, bulkhead=bulkhead, timeout=7.5 * STEP), return_exceptions=True
    )

    assert isinstance(result, JoinTimeoutError)
    assert seen == [(2, 0, 1)] * 2 + [(2, 1, 1)] * 3 + [(2, 0, 2)] * 2 + [(2, 0, 2)]
    assert (bulkhead.in_use, bulkhead.waiting) == (0, 0)


# Ending


async def test_losers_are_awaited() -> None:
    """The joined state is entered when the losers have cleaned up."""
    plan = Plan("n n s1 n")

    result = await join(plan.branches, 3 * STEP)

    assert plan.cleaned == [0, 1]
    assert shape(result) == ([2], [], [0, 1, 3])


@pytest.mark.virtual
@pytest.mark.parametrize("at", [0, 1.5, 3.5])
async def test_cancelled_run(at: float) -> None:
    """A cancelled run starts no other branch, and has awaited those that were started."""
    plan = Plan("n n n n")
    run = asyncio.create_task(join(plan.branches, 2 * STEP))

    await asyncio.sleep(at * STEP)
    run.cancel("message")
    with pytest.raises(asyncio.CancelledError, match="message"):
        await run

    started = 1 + int(at / 2)
    assert list(plan.starts) == plan.cleaned == list(range(started))


async def test_closed_run() -> None:
    """A run that is closed leaves neither a branch nor a timer."""
    plan = Plan("n n n")
    coroutine = hedged(plan.branches, 10 * STEP).orchestrate("split")
    coroutine.send(None)

    coroutine.close()
    await asyncio.sleep(3 * STEP)

    assert plan.cleaned in ([0], [])  # compatibility mode: not begun
    assert len(plan.starts) <= 1
    cano.testing.assert_no_orphans()


class Fatal(BaseException):
    """An exception that is no outcome."""


@pytest.mark.virtual
async def test_base_exception_ends_the_starts() -> None:
    """A BaseException of a branch leaves the run, and no other branch is started."""
    plan = Plan("n n n")

    async def fatal() -> None:
        await asyncio.sleep(STEP)
        raise Fatal

    with pytest.raises(Fatal):
        await join([fatal, *plan.branches], 3 * STEP)
    await asyncio.sleep(9 * STEP)

    assert plan.starts == {}


@pytest.mark.virtual
async def test_one_timer_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many branches were started, one timer runs, and none after the decision."""
    loop = asyncio.get_running_loop()
    armed: list[asyncio.TimerHandle] = []
    call_at = loop.call_at

    def watched(when: float, callback: Any, *args: Any, **options: Any) -> asyncio.TimerHandle:
        handle = call_at(when, callback, *args, **options)
        if "_hedge" in repr(callback):
            assert all(other.cancelled() or other.when() <= loop.time() for other in armed)
            armed.append(handle)
        return handle

    monkeypatch.setattr(loop, "call_at", watched)
    await join(Plan("n f1 n f3 n n s1").branches, 2 * STEP)

    assert len(armed) >= 4
    assert all(other.cancelled() or other.when() <= loop.time() for other in armed)


async def test_context_of_a_late_branch() -> None:
    """A branch that is started late runs in a copy of the parent's context."""
    variable = contextvars.ContextVar("variable", default="none")
    seen = []

    async def first() -> None:
        variable.set("first")
        await asyncio.sleep(STEP)
        raise Oops

    async def slow() -> None:
        seen.append(variable.get())
        variable.set("slow")
        await asyncio.sleep(FOREVER)

    async def last() -> None:
        seen.append(variable.get())

    variable.set("parent")
    await join([first, slow, last], 3 * STEP)

    assert seen == ["parent", "parent"]
    assert variable.get() == "parent"


async def test_reference_counts_free_everything() -> None:
    """Values, errors, tasks and results of a hedged split go with the last reference, without the collector."""

    class Thing:
        pass

    things: list[weakref.ref[Thing]] = []

    def made() -> Thing:
        thing = Thing()
        things.append(weakref.ref(thing))
        return thing

    async def fails() -> None:
        raise Oops(made())

    async def slow() -> None:
        thing = made()
        await asyncio.sleep(FOREVER)
        del thing

    async def works() -> Thing:
        await asyncio.sleep(STEP)
        return made()

    gc.disable()
    try:
        await hedged([fails, slow, works, slow], STEP).orchestrate("split")
        await asyncio.sleep(0)
    finally:
        gc.enable()

    assert len(things) >= 3
    assert [thing() for thing in things] == [None] * len(things)


# Against a model


@dataclass
class Model:
    """The starts, one event after the other; every duration is in whole numbers and no two events fall together."""

    durations: list[int]
    is_success: list[bool]
    after: int
    limit: int

    def starts(self) -> dict[int, int]:
        starts: dict[int, int] = {}
        ends: dict[int, int] = {}
        due, clock, newest, is_over = 1, 0, 0, False
        while not is_over:
            while len(starts) < min(due, len(self.durations)) and len(ends) < self.limit:
                newest, index = clock, len(starts)
                starts[index] = clock
                ends[index] = clock + self.durations[index]
            slow = newest + self.after if due <= len(starts) < len(self.durations) else math.inf
            first = min(ends, key=ends.__getitem__)
            if slow < ends[first]:
                clock, due = int(slow), len(starts) + 1
                continue
            clock = ends.pop(first)
            due += 1
            is_over = self.is_success[first] or (not ends and len(starts) == len(self.durations))
        return starts


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_starts_follow_the_model(data: st.DataObject) -> None:
    """Whatever the branches do, each starts when a plain simulation says."""
    total = data.draw(st.integers(1, 7), label="total")
    # The last four digits of a moment say which durations led to it, and how often hedge_after did: no two are equal.
    durations = [data.draw(st.integers(1, 9)) * 10_000 + 8 * 2**index for index in range(total)]
    is_success = data.draw(st.lists(st.booleans(), min_size=total, max_size=total), label="is_success")
    after = data.draw(st.integers(1, 6), label="after") * 10_000 + 1
    limit = data.draw(st.integers(1, 4) | st.none(), label="limit")
    is_shared = data.draw(st.booleans(), label="is_shared")
    cano.configure(branches=data.draw(st.sampled_from(["native", "asyncio"]), label="branches"))
    starts: dict[int, int] = {}

    def branch(index: int) -> Body:
        async def run() -> None:
            starts[index] = round(now())
            await asyncio.sleep(durations[index])
            if not is_success[index]:
                raise Oops(index)

        return run

    async def main() -> None:
        bulkhead = Bulkhead(limit) if is_shared and limit else limit
        try:
            await join([branch(index) for index in range(total)], float(after), bulkhead=bulkhead)
        except JoinError:
            assert not any(is_success)
        assert not isinstance(bulkhead, Bulkhead) or (bulkhead.in_use, bulkhead.waiting) == (0, 0)

    cano.testing.run(main())

    assert starts == Model(durations, is_success, after, limit or total).starts()


# The definition


@pytest.mark.parametrize(
    ("value", "text"),
    [
        pytest.param(0, "hedge_after must be above 0, got 0; None starts all branches at once", id="zero"),
        pytest.param(timedelta(), "hedge_after must be above 0", id="no timedelta"),
        pytest.param(-1, "hedge_after must be at least 0 and at most ten years", id="negative"),
        pytest.param(math.nan, "hedge_after must be at least 0 and at most ten years", id="nan"),
        pytest.param(math.inf, "hedge_after must be at least 0 and at most ten years", id="inf"),
        pytest.param(True, "hedge_after must be seconds as a number or a timedelta, got True", id="bool"),
        pytest.param("1", "hedge_after must be seconds as a number or a timedelta, got '1'", id="text"),
    ],
)
def test_hedge_after_out_of_range(value: Any, text: str) -> None:
    """hedge_after is a duration above zero."""
    for call in (lambda: JoinConfig(ANY, "x", hedge_after=value), lambda: JoinConfig(ANY, "x").with_hedge_after(value)):
        with pytest.raises(ConfigurationError) as caught:
            call()
        assert str(caught.value).startswith(text)


@pytest.mark.parametrize(
    "strategy",
    [
        JoinStrategy.All,
        JoinStrategy.Quorum(1),
        JoinStrategy.Percentage(0.1),
        JoinStrategy.PartialResults(1),
        JoinStrategy.PartialTimeout,
    ],
    ids=repr,
)
def test_hedge_after_with_another_strategy(strategy: JoinStrategy) -> None:
    """hedge_after is refused with every strategy but Any, by name."""
    with pytest.raises(ConfigurationError) as caught:
        JoinConfig(strategy, "x", timeout=1, hedge_after=1)

    assert str(caught.value) == f"hedge_after needs the strategy JoinStrategy.Any, got {strategy!r}"


def test_hedge_after_is_part_of_the_configuration() -> None:
    """Copies, comparisons and pickles know hedge_after."""
    join = JoinConfig(ANY, "x").with_hedge_after(timedelta(seconds=2))

    assert join.hedge_after == 2.0
    assert join == JoinConfig(ANY, "x", hedge_after=2)
    assert join != JoinConfig(ANY, "x")
    assert join.with_timeout(5).with_bulkhead(2).hedge_after == 2.0
    assert join.with_hedge_after(None) == JoinConfig(ANY, "x")
    assert replace(join, hedge_after=1e-9).hedge_after == 1e-9
    assert pickle.loads(pickle.dumps(join)) == join  # noqa: S301 - just made


def test_outcomes_are_those_of_any_split() -> None:
    """What the joined state gets says nothing of hedging: success, failure, cancelled."""
    result = cano.testing.run(join(Plan("f1 s1 n").branches))

    assert isinstance(result.successes[0], BranchOutcome)
    assert (result.completed_count, result.total_count) == (2, 3)
