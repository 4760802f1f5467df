"""Splits: who decides, what is cancelled and awaited, what the joined state gets, and what is left behind (nothing)."""

import asyncio
import contextvars
import copy
import dataclasses
import enum
import functools
import gc
import pickle
import re
import sys
import types
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from datetime import timedelta
from typing import Annotated, Any, Optional

import pytest
from hypothesis import given, strategies as st

import cano.testing
from cano import (
    AttemptTimeoutError,
    BranchOutcome,
    ConfigurationError,
    JoinConfig,
    JoinError,
    JoinStrategy,
    JoinTimeoutError,
    MemoryStore,
    Res,
    ResourceNotFoundError,
    Resources,
    RetryExhaustedError,
    RunContext,
    SplitResult,
    Task,
    TaskConfig,
    TaskExecutionError,
    TaskResult,
    Workflow,
    WorkflowCancelledError,
    WorkflowError,
)

# One step of a plan. Short, since the tests that do not need the virtual clock also run in real time.
STEP = 0.01
FOREVER = 3600.0

ALL, ANY, PARTIAL_TIMEOUT = JoinStrategy.All, JoinStrategy.Any, JoinStrategy.PartialTimeout
ONE_OF_EACH = [ALL, ANY, JoinStrategy.Quorum(2), JoinStrategy.Percentage(0.5), JoinStrategy.PartialResults(2), PARTIAL_TIMEOUT]
ALL_BUT_ALL = ONE_OF_EACH[1:]

each_strategy = pytest.mark.parametrize("strategy", ONE_OF_EACH, ids=repr)


class S(enum.Enum):
    SPLIT = enum.auto()
    JOINED = enum.auto()
    OTHER = enum.auto()
    END = enum.auto()


class Oops(Exception):
    """What failing branches raise; its argument is the index of the branch."""


class Fatal(BaseException):
    """An exception that no engine may turn into an outcome."""


Log = list[str]
Shape = tuple[list[int], list[int], list[int]]


def branch(
    index: int, ends: str = "s1", log: Log | None = None, *, cleanup: float = 0.0, deaf: bool = False
) -> Callable[[], Coroutine[Any, Any, str]]:
    """A branch that succeeds (``s2``: after two steps), fails (``f2``), cancels itself (``c2``) or never ends (``n``).

    It logs "+0" when it starts, "-0" when it is cancelled and ".0" when it has cleaned up. A deaf one goes on after that.
    """
    log = [] if log is None else log

    async def run() -> str:
        log.append(f"+{index}")
        try:
            await asyncio.sleep(int(ends[1:]) * STEP if ends != "n" else FOREVER)
        except asyncio.CancelledError:
            log.append(f"-{index}")
            await asyncio.sleep(cleanup)
            log.append(f".{index}")
            if not deaf:
                raise
        if ends[0] == "f":
            raise Oops(index)
        if ends[0] == "c":
            raise asyncio.CancelledError
        return f"value {index}"

    run.__qualname__ = f"branch{index}"
    return run


def plan(text: str, log: Log | None = None, **options: Any) -> list[Callable[[], Coroutine[Any, Any, str]]]:
    """The branches of a text like "s1 f2 n", see `branch`."""
    return [branch(index, ends, log, **options) for index, ends in enumerate(text.split())]


def split_into(tasks: Any, strategy: JoinStrategy = ALL, joined: Any = None, **options: Any) -> Workflow[S]:
    """A workflow that splits, joins and ends; `joined` is the task of the joined state."""
    return (
        Workflow[S]()
        .register_split(S.SPLIT, tasks, JoinConfig(strategy, S.JOINED, **options))
        .register(S.JOINED, joined or (lambda: S.END))
        .add_exit_state(S.END)
    )


async def join(tasks: Any, strategy: JoinStrategy = ALL, **options: Any) -> SplitResult:
    """Run a split, and give what its joined state got."""
    results: list[SplitResult] = []

    async def joined(result: SplitResult) -> S:
        results.append(result)
        return S.END

    await split_into(tasks, strategy, joined, **options).orchestrate(S.SPLIT)
    (result,) = results
    return result


async def join_error(tasks: Any, strategy: JoinStrategy = ALL, **options: Any) -> JoinError:
    """Run a split that fails, and give its error."""
    with pytest.raises(JoinError) as caught:
        await join(tasks, strategy, **options)
    return caught.value


def shape(result: SplitResult | None) -> Shape:
    """The indices of the successes, the errors and the cancelled branches."""
    assert result is not None
    return [one.index for one in result.successes], [one.index for one in result.errors], result.cancelled


def now() -> float:
    return asyncio.get_running_loop().time()


# Deciding


@pytest.mark.parametrize(
    ("strategy", "text", "expected"),
    [
        pytest.param(ALL, "s1 s2 s3", ([0, 1, 2], [], []), id="All"),  # SP-001
        pytest.param(ALL, "s3 s1 s2", ([0, 1, 2], [], []), id="All out of order"),
        pytest.param(ALL, "s1", ([0], [], []), id="All of one"),  # SP-023
        pytest.param(ANY, "n s1 n", ([1], [], [0, 2]), id="Any"),  # SP-004, SP-005
        pytest.param(ANY, "f1 f1 s2 n", ([2], [0, 1], [3]), id="Any after failures"),
        pytest.param(ANY, "s1", ([0], [], []), id="Any of one"),
        pytest.param(JoinStrategy.Quorum(2), "s1 n s2 n", ([0, 2], [], [1, 3]), id="Quorum cancels the rest"),  # D01
        pytest.param(JoinStrategy.Quorum(2), "f1 s2 s3", ([1, 2], [0], []), id="Quorum with a failure"),  # SP-006
        pytest.param(JoinStrategy.Quorum(3), "s1 s1 s1 n", ([0, 1, 2], [], [3]), id="Quorum 3 of 4"),  # SP-006
        pytest.param(JoinStrategy.Percentage(0.75), "s1 n s2 s3", ([0, 2, 3], [], [1]), id="75 % of 4"),  # SP-008
        pytest.param(JoinStrategy.Percentage(0.5), "s1 s2 n", ([0, 1], [], [2]), id="50 % of 3"),  # JN-004
        pytest.param(JoinStrategy.Percentage(1.0), "s1 s2", ([0, 1], [], []), id="100 %"),  # JN-004
        pytest.param(JoinStrategy.Percentage(1), "s1 s2", ([0, 1], [], []), id="100 % as an int"),
        pytest.param(JoinStrategy.PartialResults(2), "s1 n s2 n", ([0, 2], [], [1, 3]), id="PartialResults"),  # SP-009
        pytest.param(JoinStrategy.PartialResults(2), "s1 f2 n n", ([0], [1], [2, 3]), id="PartialResults mixed"),  # D02
        pytest.param(JoinStrategy.PartialResults(2), "f1 f2 n", ([], [0, 1], [2]), id="PartialResults of failures"),
    ],
)
async def test_strategy_is_met(strategy: JoinStrategy, text: str, expected: Shape) -> None:
    """A split goes on as soon as its strategy is met, and the branches that have not ended are cancelled."""
    result = await join(plan(text), strategy)

    assert shape(result) == expected


@pytest.mark.parametrize(
    ("strategy", "text", "expected"),
    [
        pytest.param(ALL, "s1 f2 s3", ([0, 2], [1], []), id="All"),  # SP-002, SP-003
        pytest.param(ALL, "f1 f2", ([], [0, 1], []), id="All of failures"),
        pytest.param(ALL, "s1 c2 s3", ([0, 2], [], [1]), id="All with a cancelled one"),
        pytest.param(ANY, "f1 f2 f3", ([], [0, 1, 2], []), id="Any"),
        pytest.param(ANY, "c1", ([], [], [0]), id="Any of a cancelled one"),
        pytest.param(JoinStrategy.Quorum(2), "s1 f2 f3 c4", ([0], [1, 2], [3]), id="Quorum"),
        pytest.param(JoinStrategy.Percentage(1.0), "s1 f2", ([0], [1], []), id="100 %"),  # SP-008
        pytest.param(JoinStrategy.Percentage(0.5), "s1 f1 f2", ([0], [1, 2], []), id="50 % of 3"),
        pytest.param(JoinStrategy.PartialResults(2), "s1 c2 c3", ([0], [], [1, 2]), id="PartialResults"),  # SP-011
    ],
)
async def test_strategy_is_not_met(strategy: JoinStrategy, text: str, expected: Shape) -> None:
    """A split fails when every branch has ended without its strategy being met, and its error has every outcome."""
    error = await join_error(plan(text), strategy)

    assert not isinstance(error, JoinTimeoutError)
    assert shape(error.result) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("s1 n f2 n", ([0], [2], [1, 3]), id="some ended"),  # SP-012, SP-013
        pytest.param("f1 n", ([], [0], [1]), id="only failures ended"),  # SP-016
        pytest.param("s1 c1 n", ([0], [], [1, 2]), id="one cancelled itself"),
    ],
)
async def test_partial_timeout_passes(text: str, expected: Shape) -> None:
    """PartialTimeout goes on at its timeout with the branches that have ended, well or badly."""
    result = await join(plan(text), PARTIAL_TIMEOUT, timeout=20 * STEP)

    assert shape(result) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("s1 f2", ([0], [1], []), id="mixed"),  # SP-014
        pytest.param("f1 f2", ([], [0, 1], []), id="all failed"),  # SP-016, D31
    ],
)
async def test_partial_timeout_all_ended(text: str, expected: Shape) -> None:
    """PartialTimeout goes on before its timeout once every branch has ended, even if every one failed."""
    result = await join(plan(text), PARTIAL_TIMEOUT, timeout=FOREVER)

    assert shape(result) == expected


async def test_partial_timeout_all_cancelled() -> None:
    """PartialTimeout fails when every branch has ended and none of them with an outcome."""
    error = await join_error(plan("c1 c2"), PARTIAL_TIMEOUT, timeout=FOREVER)

    # JN-007
    assert not isinstance(error, JoinTimeoutError)
    assert shape(error.result) == ([], [], [0, 1])


@pytest.mark.virtual
@pytest.mark.parametrize(
    ("strategy", "steps"),
    [
        pytest.param(ALL, 9, id="All"),
        pytest.param(ANY, 1, id="Any"),
        pytest.param(JoinStrategy.Quorum(2), 5, id="Quorum(2)"),
        pytest.param(JoinStrategy.Quorum(4), 9, id="Quorum(4)"),
        pytest.param(JoinStrategy.Percentage(0.6), 7, id="60 %"),
        pytest.param(JoinStrategy.PartialResults(2), 3, id="PartialResults(2)"),
        pytest.param(JoinStrategy.PartialResults(5), 9, id="PartialResults(5)"),
        pytest.param(PARTIAL_TIMEOUT, 6, id="PartialTimeout"),
    ],
)
async def test_moment_of_the_decision(strategy: JoinStrategy, steps: int) -> None:
    """The joined state is entered at the very moment at which the strategy is met, not earlier and not later."""
    entered: list[float] = []
    timeout = 6 * STEP if strategy == PARTIAL_TIMEOUT else None
    ends = "s1 f3 s5 s7 s9" if strategy != ALL else "s1 s3 s5 s7 s9"
    workflow = split_into(plan(ends), strategy, lambda: entered.append(now()) or S.END, timeout=timeout)

    await workflow.orchestrate(S.SPLIT)

    # SP-003, SP-007, SP-009, SP-012
    assert entered == [pytest.approx(steps * STEP)]


@pytest.mark.virtual
@pytest.mark.parametrize(
    ("strategy", "text"),
    [
        pytest.param(ALL, "f1 s5 s9", id="All"),  # B48
        pytest.param(JoinStrategy.Quorum(2), "f1 f2 s9", id="Quorum"),
        pytest.param(JoinStrategy.Percentage(1.0), "f1 s5 s9", id="Percentage"),
        pytest.param(JoinStrategy.PartialResults(3), "c1 s5 s9", id="PartialResults"),
    ],
)
async def test_lost_join_waits_for_every_outcome(strategy: JoinStrategy, text: str) -> None:
    """A join that can no longer be met lets the branches in flight end, so that every outcome is reported."""
    error = await join_error(plan(text), strategy)

    assert now() == pytest.approx(9 * STEP)
    assert error.result is not None
    assert error.result.successes[-1].index == 2


@pytest.mark.parametrize(
    ("strategy", "text", "expected"),
    [
        pytest.param(ALL, "f1 n n", ([], [0], [1, 2]), id="All"),  # B48
        pytest.param(ALL, "s1 f2 n", ([0], [1], [2]), id="All after a success"),
        pytest.param(ALL, "c1 n n", ([], [], [0, 1, 2]), id="All after a cancelled one"),
        pytest.param(ANY, "f1 f2", ([], [0, 1], []), id="Any"),
        pytest.param(JoinStrategy.Quorum(2), "f1 f2 n", ([], [0, 1], [2]), id="Quorum"),
        pytest.param(JoinStrategy.Percentage(0.6), "f1 f2 n s1", ([3], [0, 1], [2]), id="Percentage"),
        pytest.param(JoinStrategy.PartialResults(3), "c1 n n", ([], [], [0, 1, 2]), id="PartialResults"),
    ],
)
async def test_fail_fast(strategy: JoinStrategy, text: str, expected: Shape) -> None:
    """With fail_fast the branches in flight are cancelled as soon as the join can no longer be met."""
    error = await join_error(plan(text), strategy, fail_fast=True)

    assert shape(error.result) == expected


async def test_fail_fast_while_still_possible() -> None:
    """With fail_fast a failure that the strategy can bear cancels nothing."""
    result = await join(plan("f1 s3 s3"), JoinStrategy.Quorum(2), fail_fast=True)

    assert shape(result) == ([1, 2], [0], [])


@given(data=st.data())
def test_strategy_follows_the_table(data: st.DataObject) -> None:
    """Whatever the ends and their order, the verdict and the outcomes are those of the documented table."""
    total = data.draw(st.integers(1, 6), label="total")
    kinds = data.draw(st.lists(st.sampled_from("sfc"), min_size=total, max_size=total), label="kinds")
    moments = data.draw(st.permutations(range(1, total + 1)), label="moments")
    n = data.draw(st.integers(1, total), label="n")
    strategy, counts, need = data.draw(
        st.sampled_from(
            [
                (ALL, "s", total),
                (ANY, "s", 1),
                (JoinStrategy.Quorum(n), "s", n),
                (JoinStrategy.Percentage(n / total), "s", n),
                (JoinStrategy.PartialResults(n), "sf", n),
            ]
        ),
        label="strategy",
    )
    ended: Shape = ([], [], [])
    reached = 0
    for index in sorted(range(total), key=lambda index: moments[index]):
        ended["sfc".index(kinds[index])].append(index)
        reached += kinds[index] in counts
        if reached == need:
            break
    known = sorted(ended[0]), sorted(ended[1])
    expected = (*known, [index for index in range(total) if index not in known[0] + known[1]])
    text = " ".join(f"{kind}{moment}" for kind, moment in zip(kinds, moments, strict=True))

    if reached == need:
        result: SplitResult | None = cano.testing.run(join(plan(text), strategy))
    else:
        result = cano.testing.run(join_error(plan(text), strategy)).result

    # JN-001 to JN-008
    assert shape(result) == expected


# Decided means done


@pytest.mark.parametrize(
    ("strategy", "text"),
    [
        pytest.param(ANY, "s1 n n", id="Any"),
        pytest.param(JoinStrategy.Quorum(1), "s1 n n", id="Quorum"),
        pytest.param(JoinStrategy.Percentage(0.3), "s1 n n", id="Percentage"),
        pytest.param(JoinStrategy.PartialResults(1), "f1 n n", id="PartialResults"),
        pytest.param(PARTIAL_TIMEOUT, "s1 n n", id="PartialTimeout"),
    ],
)
async def test_losers_are_awaited(strategy: JoinStrategy, text: str) -> None:
    """The joined task starts after every loser was cancelled and has finished its clean-up, awaits included."""
    log: Log = []
    timeout = 3 * STEP if strategy == PARTIAL_TIMEOUT else None
    workflow = split_into(
        plan(text, log, cleanup=3 * STEP), strategy, lambda: log.append("joined") or S.END, timeout=timeout
    )

    await workflow.orchestrate(S.SPLIT)

    # SP-038, B27
    assert log == ["+0", "+1", "+2", "-1", "-2", ".1", ".2", "joined"]


@pytest.mark.parametrize(
    ("strategy", "options", "text"),
    [
        pytest.param(ALL, {"fail_fast": True}, "f1 n n", id="fail_fast"),
        pytest.param(ALL, {"timeout": 3 * STEP}, "s1 n n", id="timeout"),
    ],
)
async def test_losers_of_a_failed_join_are_awaited(strategy: JoinStrategy, options: dict[str, Any], text: str) -> None:
    """A join that fails early raises after every branch was cancelled and has finished its clean-up."""
    log: Log = []

    await join_error(plan(text, log, cleanup=3 * STEP), strategy, **options)

    # SP-017, B27
    assert log == ["+0", "+1", "+2", "-1", "-2", ".1", ".2"]


@pytest.mark.virtual
@each_strategy
async def test_timeout_counts_only_while_undecided(strategy: JoinStrategy) -> None:
    """A straggler's clean-up that outlives the timeout does not turn a reached join into a timeout."""
    tasks = plan("s1 s2 n", cleanup=100 * STEP) if strategy != ALL else plan("s1 s2")

    result = await join(tasks, strategy, timeout=5 * STEP)

    # SP-039, B61
    assert len(result.successes) >= 1


@pytest.mark.virtual
async def test_loser_that_swallows_its_cancellation_once() -> None:
    """A loser that goes on after the cancellation is waited for, and its late success is reported."""
    loser = branch(1, "n", cleanup=7 * STEP, deaf=True)

    result = await join([branch(0, "s1"), loser], ANY)

    assert now() == pytest.approx(8 * STEP)
    assert shape(result) == ([0, 1], [], [])


async def test_error_after_the_decision() -> None:
    """A loser that fails while it is cancelled is in the errors, and asyncio has nothing to report."""

    async def loser() -> None:
        try:
            await asyncio.sleep(FOREVER)
        finally:
            raise Oops(1)

    result = await join([branch(0, "s1"), loser], ANY)
    gc.collect()

    # The fixture asyncio_reports fails the test for "exception was never retrieved".
    assert shape(result) == ([0], [1], [])
    assert result.errors[0].error.args == (1,)


async def test_branches_that_end_in_the_same_pass() -> None:
    """Branches that never wait all end before the join state is entered, and every one is accounted for."""
    log: Log = []

    def instant(index: int) -> Callable[[], Coroutine[Any, Any, int]]:
        async def run() -> int:
            log.append(f"+{index}")
            return index

        return run

    result = await join([instant(index) for index in range(5)], ANY)

    assert result.total_count == 5
    assert result.successes[0].index == 0
    assert len(log) >= len(result.successes) >= 1


# Timeouts of a split


@pytest.mark.parametrize(
    ("strategy", "text", "expected"),
    [
        pytest.param(ALL, "s1 n f2", ([0], [2], [1]), id="All"),
        pytest.param(ANY, "f1 n", ([], [0], [1]), id="Any"),
        pytest.param(JoinStrategy.Quorum(2), "s1 n n", ([0], [], [1, 2]), id="Quorum"),
        pytest.param(JoinStrategy.Percentage(0.6), "s1 n n", ([0], [], [1, 2]), id="Percentage"),
        pytest.param(JoinStrategy.PartialResults(3), "s1 f2 n", ([0], [1], [2]), id="PartialResults"),  # SP-018
        pytest.param(PARTIAL_TIMEOUT, "n n", ([], [], [0, 1]), id="PartialTimeout"),  # SP-015
    ],
)
async def test_timeout(strategy: JoinStrategy, text: str, expected: Shape) -> None:
    """An undecided join fails at its timeout, with every outcome so far; PartialTimeout only if nothing has ended."""
    error = await join_error(plan(text), strategy, timeout=20 * STEP)

    # SP-017
    assert isinstance(error, JoinTimeoutError)
    assert shape(error.result) == expected


@pytest.mark.virtual
@each_strategy
async def test_timeout_moment(strategy: JoinStrategy) -> None:
    """The timeout counts from the entry into the state and falls at its exact moment, whatever the strategy."""
    workflow = Workflow[S]().add_exit_state(S.END)
    workflow.register(S.OTHER, lambda_after(1.0, S.SPLIT))
    workflow.register_split(S.SPLIT, plan("n n"), JoinConfig(strategy, S.END, timeout=2.5))

    with pytest.raises(JoinTimeoutError):
        await workflow.orchestrate(S.OTHER)

    assert now() == 3.5


def lambda_after(delay: float, value: Any) -> Callable[[], Coroutine[Any, Any, Any]]:
    async def run() -> Any:
        await asyncio.sleep(delay)
        return value

    return run


async def test_timeout_of_zero() -> None:
    """A timeout of 0 seconds is no missing one: what has to wait is too late."""
    error = await join_error(plan("n"), ALL, timeout=0)

    assert isinstance(error, JoinTimeoutError)


async def test_timeout_leaves_no_timer() -> None:
    """A join that is decided in time takes its timer back."""
    await join(plan("s1"), ALL, timeout=FOREVER)

    timers = getattr(asyncio.get_running_loop(), "_scheduled", [])
    assert [timer for timer in timers if not timer.cancelled()] == []


@pytest.mark.virtual
async def test_timeout_as_a_timedelta() -> None:
    """A timedelta is a timeout as well."""
    error = await join_error(plan("n"), ALL, timeout=timedelta(milliseconds=1500))

    assert isinstance(error, JoinTimeoutError)
    assert now() == 1.5


# Bulkhead


@pytest.mark.parametrize("limit", [1, 2, 3, 10, 11, 1_000])
async def test_bulkhead_bounds_what_is_alive(limit: int) -> None:
    """With a bulkhead never more branches than its limit are alive, and all of them run."""
    alive, most = 0, 0

    async def run() -> None:
        nonlocal alive, most
        alive += 1
        most = max(most, alive)
        await asyncio.sleep(STEP)
        alive -= 1

    result = await join([run] * 10, ALL, bulkhead=limit)

    # SP-026
    assert most == min(limit, 10)
    assert result.total_count == len(result.successes) == 10


@pytest.mark.virtual
async def test_bulkhead_order() -> None:
    """A slot that becomes free goes to the next branch in branch order, at that moment."""
    started: list[tuple[int, float]] = []

    def timed(index: int, steps: int) -> Callable[[], Coroutine[Any, Any, None]]:
        async def run() -> None:
            started.append((index, now()))
            await asyncio.sleep(steps)

        return run

    await join([timed(index, steps) for index, steps in enumerate([5, 1, 3, 4, 2])], ALL, bulkhead=2)

    assert started == [(0, 0.0), (1, 0.0), (2, 1.0), (3, 4.0), (4, 5.0)]


@pytest.mark.parametrize(
    ("strategy", "text", "started", "expected"),
    [
        pytest.param(ANY, "s1 s1 s1 s1", 1, ([0], [], [1, 2, 3]), id="Any"),
        pytest.param(JoinStrategy.Quorum(2), "s1 f1 s1 s1", 3, ([0, 2], [1], [3]), id="Quorum"),
        pytest.param(JoinStrategy.Percentage(0.5), "s1 s1 s1 s1", 2, ([0, 1], [], [2, 3]), id="Percentage"),
        pytest.param(JoinStrategy.PartialResults(1), "f1 s1 s1 s1", 1, ([], [0], [1, 2, 3]), id="PartialResults"),
        pytest.param(PARTIAL_TIMEOUT, "s1 n s1 s1", 2, ([0], [], [1, 2, 3]), id="PartialTimeout"),
    ],
)
async def test_branches_behind_the_bulkhead_are_never_started(
    strategy: JoinStrategy, text: str, started: int, expected: Shape
) -> None:
    """Branches that have not started when the join is decided are never started and count as cancelled."""
    log: Log = []
    timeout = 20 * STEP if strategy == PARTIAL_TIMEOUT else None

    result = await join(plan(text, log), strategy, bulkhead=1, timeout=timeout)
    gc.collect()  # a coroutine that was made and not run would warn, which is an error here

    assert shape(result) == expected
    assert [entry for entry in log if entry[0] == "+"] == [f"+{index}" for index in range(started)]


@pytest.mark.parametrize(
    "options",
    [pytest.param({"fail_fast": True}, id="fail_fast"), pytest.param({"timeout": 5 * STEP}, id="timeout")],
)
async def test_branches_behind_the_bulkhead_of_a_failed_join(options: dict[str, Any]) -> None:
    """A join that fails starts none of the branches that its bulkhead still holds back."""
    log: Log = []
    text = "f1 s1 s1" if "fail_fast" in options else "n s1 s1"

    error = await join_error(plan(text, log), ALL, bulkhead=1, **options)

    assert error.result is not None
    assert error.result.cancelled[-2:] == [1, 2]
    assert "+1" not in log


async def test_bulkhead_slot_is_free_after_the_cleanup() -> None:
    """A branch that cancels itself keeps its slot until its clean-up is over."""
    log: Log = []

    async def cancels_itself() -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        try:
            await asyncio.sleep(FOREVER)
        finally:
            await asyncio.sleep(STEP)
            log.append("cleaned")

    await join([cancels_itself, branch(1, "s1", log)], ANY, bulkhead=1)

    assert log == ["cleaned", "+1"]


@pytest.mark.virtual
async def test_bulkhead_slot_is_held_over_retries() -> None:
    """A branch keeps its slot through its retries and the pauses between them."""
    log: list[tuple[str, float]] = []

    class Flaky(Task[S]):
        config = TaskConfig().with_fixed_retry(2, 1.0)

        async def run(self) -> None:
            log.append(("flaky", now()))
            raise Oops

    async def second() -> None:
        log.append(("second", now()))

    await join([Flaky(), second], ANY, bulkhead=1)

    # SP-027
    assert log == [("flaky", 0.0), ("flaky", 1.0), ("flaky", 2.0), ("second", 2.0)]


# Context variables and the current task

variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="default")


@pytest.mark.parametrize("bulkhead", [None, 1, 2])
async def test_context_of_branches(bulkhead: int | None) -> None:
    """Every branch starts with the context of the run, whoever's end started it, and keeps its changes to itself."""
    seen: list[str] = []

    async def run() -> None:
        seen.append(variable.get())
        variable.set("branch")
        await asyncio.sleep(0)
        seen.append(variable.get())

    variable.set("run")
    await join([run] * 3, ALL, bulkhead=bulkhead)

    assert sorted(seen) == ["branch"] * 3 + ["run"] * 3
    assert variable.get() == "run"


@pytest.mark.parametrize("bulkhead", [None, 1])
async def test_context_of_plain_branches(bulkhead: int | None) -> None:
    """A plain function in a branch has a context of its own, too."""
    seen: list[str] = []

    def run() -> None:
        seen.append(variable.get())
        variable.set("branch")

    variable.set("run")
    await join([run] * 3, ALL, bulkhead=bulkhead)

    assert seen == ["run"] * 3
    assert variable.get() == "run"


async def test_context_of_an_earlier_state() -> None:
    """What an earlier state set, the branches see: sequential states share the context of the run."""
    seen: list[str] = []

    def first() -> S:
        variable.set("first")
        return S.SPLIT

    workflow = split_into([lambda: seen.append(variable.get())] * 2).register(S.OTHER, first)

    await workflow.orchestrate(S.OTHER)

    assert seen == ["first", "first"]


async def test_current_task_of_branches() -> None:
    """A branch has one current task for its whole life, another than its siblings and the run."""
    tasks: list[set[Any]] = []

    async def run() -> None:
        seen = {asyncio.current_task()}
        for wait in (lambda: asyncio.sleep(0), lambda: asyncio.sleep(STEP), lambda: asyncio.wait_for(asyncio.sleep(0), 1)):
            await wait()
            seen.add(asyncio.current_task())
        tasks.append(seen)

    host = asyncio.current_task()
    await join([run] * 3)

    assert [len(seen) for seen in tasks] == [1, 1, 1]
    assert len(set.union(*tasks) | {host}) == 4
    assert asyncio.current_task() is host


async def test_current_task_after_failures() -> None:
    """After a split that failed, the current task is the one it was before."""
    host = asyncio.current_task()

    await join_error(plan("f1 n"), ALL, fail_fast=True)

    assert asyncio.current_task() is host


# Kinds of branches


class Counted:
    """A task object with state of its own."""

    def __init__(self) -> None:
        self.calls = 0

    async def run(self) -> int:
        self.calls += 1
        calls = self.calls
        await asyncio.sleep(0)
        return calls


async def as_coroutine() -> str:
    return "value"


class WithRun:
    async def run(self) -> str:
        return "value"

    def plain(self) -> str:
        return "value"


class WithRunBare:
    async def run_bare(self) -> str:
        return "value"


class WithCall:
    async def __call__(self) -> str:
        return "value"


class Later:
    """An awaitable that is no coroutine."""

    def __await__(self) -> Iterator[Any]:
        yield from asyncio.sleep(0).__await__()
        return "value"


@pytest.mark.parametrize(
    "task",
    [
        pytest.param(as_coroutine, id="async function"),
        pytest.param(lambda: "value", id="plain function"),
        pytest.param(functools.partial(lambda value: value, "value"), id="partial"),
        pytest.param(WithRun(), id="object"),
        pytest.param(WithRunBare(), id="object with run_bare"),
        pytest.param(WithCall(), id="callable object"),
        pytest.param(WithRun().plain, id="bound method"),
        pytest.param(lambda: as_coroutine(), id="function that gives a coroutine"),
        pytest.param(lambda: Later(), id="function that gives an awaitable"),
    ],
)
async def test_kinds_of_branches(task: Any) -> None:
    """Whatever may be a task may be a branch, and what it returns or is awaited to is its value."""
    result = await join([task, task])

    assert result.values() == ["value", "value"]


async def test_same_task_in_several_branches() -> None:
    """One task object may be several branches; each branch is a call of its own."""
    task = Counted()

    result = await join([task] * 5)

    assert result.values() == [1, 2, 3, 4, 5]


async def test_plain_branch_that_raises() -> None:
    """What a plain function raises is the error of its branch and nobody else's."""

    def fails() -> None:
        raise Oops(0)

    result = await join([fails, branch(1, "s1")], ANY)

    assert shape(result) == ([1], [0], [])


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(None, id="None"),
        pytest.param(S.OTHER, id="state"),
        pytest.param(TaskResult.Single(S.OTHER), id="Single"),
        pytest.param([], id="list"),
        pytest.param(Oops("a value"), id="exception"),
    ],
)
async def test_value_of_a_branch(value: object) -> None:
    """What a branch returns is its value, untouched: it does not route, not even if it is a state."""

    async def run() -> object:
        return value

    result = await join([run, lambda: value])

    # SP-029, G05
    assert [one is value for one in result.values()] == [True, True]


async def test_branches_share_the_resources() -> None:
    """Branches get the resources of the run, and what each writes there is seen after the join."""
    store = MemoryStore()

    def writes(index: int) -> Callable[[Resources], Coroutine[Any, Any, None]]:
        async def run(resources: Resources) -> None:
            resources.get("store", MemoryStore).put(str(index), index)

        return run

    await split_into([writes(index) for index in range(3)]).orchestrate(S.SPLIT, resources={"store": store})

    # SP-025
    assert sorted(store.keys()) == ["0", "1", "2"]


async def test_arguments_of_branches() -> None:
    """Branches are filled in like any task: resources by key, and a context that names state and branch."""
    seen: list[tuple[object, ...]] = []

    async def run(number: Annotated[int, Res("number")], *, context: RunContext) -> None:
        seen.append((number, context.state, context.branch, context.attempt, context.visit))

    await split_into([run] * 2).orchestrate(S.SPLIT, resources={"number": 7})

    assert seen == [(7, S.SPLIT, 0, 1, 1), (7, S.SPLIT, 1, 1, 1)]


async def test_idempotency_keys_of_branches() -> None:
    """Every branch has an idempotency key of its own, the same in each attempt."""
    keys: list[str] = []

    class Keyed(Task[S]):
        config = TaskConfig().with_fixed_retry(1, 0)

        async def run(self, context: RunContext) -> None:
            keys.append(context.idempotency_key)
            if context.attempt == 1:
                raise Oops

    await join([Keyed()] * 3)

    assert len(keys) == 6
    assert len(set(keys)) == 3


# Branches with a configuration of their own


async def test_retries_of_a_branch() -> None:
    """A branch is retried by its own configuration: two failures, then a success, are three calls."""
    attempts: list[int] = []

    class Flaky(Task[S]):
        config = TaskConfig().with_fixed_retry(2, STEP)

        async def run(self, context: RunContext) -> str:
            attempts.append(context.attempt)
            if context.attempt < 3:
                raise Oops
            return "at last"

    result = await join([Flaky(), branch(1)])

    # SP-024
    assert attempts == [1, 2, 3]
    assert result.values() == ["at last", "value 1"]


async def test_retries_of_a_branch_exhausted() -> None:
    """A branch whose retries are used up fails with RetryExhaustedError, its last failure as the cause."""
    calls: list[None] = []

    class Broken(Task[S]):
        name = "broken"
        config = TaskConfig().with_fixed_retry(2, 0)

        async def run(self) -> None:
            calls.append(None)
            raise Oops(len(calls))

    error = await join_error([Broken()])

    (exhausted,) = error.exceptions
    assert isinstance(exhausted, RetryExhaustedError)
    assert exhausted.attempts == 3
    assert isinstance(exhausted.__cause__, Oops)
    assert exhausted.__cause__.args == (3,)
    assert exhausted.__notes__ == ["state=SPLIT task=broken branch=0 attempt=3/3 path=SPLIT"]


async def test_attempt_timeout_of_a_branch() -> None:
    """A branch that takes longer than its attempt timeout fails alone, and its counters are clean."""

    class Slow(Task[S]):
        config = TaskConfig().with_attempt_timeout(STEP)

        async def run(self) -> None:
            await asyncio.sleep(FOREVER)

    result = await join([Slow(), branch(1, "s5")], JoinStrategy.Quorum(1))

    assert shape(result) == ([1], [0], [])
    assert isinstance(result.errors[0].error, AttemptTimeoutError)


async def test_loser_in_a_pause_between_attempts() -> None:
    """A loser that waits for its next attempt is cancelled there and makes no other attempt."""
    calls: list[None] = []

    class Flaky(Task[S]):
        config = TaskConfig().with_fixed_retry(5, FOREVER)

        async def run(self) -> None:
            calls.append(None)
            raise Oops

    result = await join([branch(0, "s1"), Flaky()], ANY)

    assert shape(result) == ([0], [], [1])
    assert len(calls) == 1


async def test_cancellation_is_no_failed_attempt() -> None:
    """A loser with retries is not retried because it was cancelled."""
    calls: list[None] = []

    class Slow(Task[S]):
        config = TaskConfig().with_fixed_retry(5, 0)

        async def run(self) -> None:
            calls.append(None)
            await asyncio.sleep(FOREVER)

    result = await join([branch(0, "s1"), Slow()], ANY)

    assert shape(result) == ([0], [], [1])
    assert len(calls) == 1


# Run-time lists


def by_generator_function() -> Iterator[object]:
    for index in range(3):
        yield branch(index)


def by_list() -> list[object]:
    return [branch(index) for index in range(3)]


async def by_coroutine() -> list[object]:
    await asyncio.sleep(0)
    return by_list()


def by_resources(resources: Resources) -> list[object]:
    return by_list()[: resources.get("width", int)]


async def by_injection(width: Annotated[int, Res("width")], context: RunContext) -> tuple[object, ...]:
    assert (context.state, context.branch) == (S.SPLIT, None)
    return tuple(by_list()[:width])


class ByObject:
    async def run(self) -> list[object]:
        return by_list()


class ByCall:
    def __call__(self) -> list[object]:
        return by_list()


@pytest.mark.parametrize(
    "factory",
    [
        pytest.param(by_list, id="function"),
        pytest.param(by_coroutine, id="async function"),
        pytest.param(by_resources, id="resources"),
        pytest.param(by_injection, id="injected"),
        pytest.param(lambda: (branch(index) for index in range(3)), id="generator expression"),
        pytest.param(by_generator_function, id="generator function"),
        pytest.param(lambda: {branch(index): None for index in range(3)}, id="dict"),
        pytest.param(lambda: map(branch, range(3)), id="map"),
        pytest.param(functools.partial(plan, "s1 s1 s1"), id="partial", marks=pytest.mark.xfail(strict=False, reason="*"))
        if False
        else pytest.param(functools.partial(by_list), id="partial"),
        pytest.param(ByCall(), id="callable object"),
        pytest.param(lambda: by_coroutine(), id="function that gives a coroutine"),
    ],
)
async def test_factory(factory: Any) -> None:
    """A function, async or plain, may make the branches when the state is entered; its parameters are filled in."""
    results: list[SplitResult] = []
    workflow = split_into(factory, ALL, collector(results))

    await workflow.orchestrate(S.SPLIT, resources={"width": 3})

    assert results[0].values() == ["value 0", "value 1", "value 2"]


def collector(results: list[SplitResult]) -> Callable[[SplitResult], S]:
    """A task for the joined state that keeps what it gets."""

    def joined(result: SplitResult) -> S:
        results.append(result)
        return S.END

    return joined
