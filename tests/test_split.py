"""Splits: who decides, what is cancelled and awaited, what the joined state gets, and what is left behind (nothing)."""

import asyncio
import contextlib
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
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Annotated, Any, Optional

import pytest
from hypothesis import given, strategies as st

import cano.testing
from cano import (
    AttemptTimeoutError,
    BranchOutcome,
    ConfigurationError,
    ErrorContext,
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
ONE_OF_EACH = [
    ALL,
    ANY,
    JoinStrategy.Quorum(2),
    JoinStrategy.Percentage(0.5),
    JoinStrategy.PartialResults(2),
    PARTIAL_TIMEOUT,
]
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


def pickled(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))  # noqa: S301 - just made


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

    def joined() -> S:
        entered.append(now())
        return S.END

    await split_into(plan(ends), strategy, joined, timeout=timeout).orchestrate(S.SPLIT)

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

    def joined() -> S:
        log.append("joined")
        return S.END

    await split_into(plan(text, log, cleanup=3 * STEP), strategy, joined, timeout=timeout).orchestrate(S.SPLIT)

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
    assert [type(one.error) for one in result.errors] == [Oops]


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
        waits: list[Awaitable[None]] = [asyncio.sleep(0), asyncio.sleep(STEP), asyncio.wait_for(asyncio.sleep(0), 1)]
        for wait in waits:
            await wait
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


# Branches as tasks of asyncio


class Recorded:
    """A branch that keeps its task, and waits until it is let go."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.tasks: list[asyncio.Task[Any]] = []

    async def run(self) -> str:
        task = asyncio.current_task()
        assert task is not None
        self.tasks.append(task)
        await self.go.wait()
        return "value"

    @property
    def task(self) -> asyncio.Task[Any]:
        return self.tasks[0]


async def observed(check: Callable[[asyncio.Task[Any]], Awaitable[object]]) -> asyncio.Task[Any]:
    """Have a branch check the task of its sibling, which waits meanwhile; give that task, ended."""
    recorded = Recorded()

    async def checks() -> None:
        try:
            await asyncio.sleep(0)
            await check(recorded.task)
        finally:
            recorded.go.set()

    await join([recorded, checks])
    return recorded.task


async def test_branch_is_a_task() -> None:
    """The task of a branch is an asyncio.Task that says what it does: name, loop, coroutine, stack, state."""

    async def check(task: asyncio.Task[Any]) -> None:
        assert isinstance(task, asyncio.Task)
        assert asyncio.isfuture(task)
        assert (task.done(), task.cancelled(), task.cancelling()) == (False, False, 0)
        assert task.get_loop() is asyncio.get_running_loop()
        assert "run" in getattr(task.get_coro(), "__qualname__", "run")
        assert isinstance(task.get_name(), str)
        task.set_name("renamed")
        assert task.get_name() == "renamed"
        assert "renamed" in repr(task)
        assert all(isinstance(frame, types.FrameType) for frame in task.get_stack())
        with pytest.raises(asyncio.InvalidStateError):
            task.result()
        with pytest.raises(asyncio.InvalidStateError):
            task.exception()

    task = await observed(check)

    assert (task.done(), task.cancelled(), task.exception(), task.result()) == (True, False, None, "value")
    assert task.cancel() is False


async def test_branch_can_be_referred_to() -> None:
    """The task of a branch can be a key, a weak reference and a place for attributes, as libraries use them."""

    async def check(task: asyncio.Task[Any]) -> None:
        task.tag = "tagged"  # type: ignore[attr-defined]
        assert {task: 1}[task] == 1
        assert weakref.ref(task)() is task

    task = await observed(check)

    assert task.tag == "tagged"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "wait",
    [
        pytest.param(asyncio.shield, id="shield"),
        pytest.param(asyncio.gather, id="gather"),
        pytest.param(lambda task: asyncio.wait([task]), id="wait"),
        pytest.param(lambda task: asyncio.wait_for(task, FOREVER), id="wait_for"),
        pytest.param(lambda task: task, id="await"),
    ],
)
async def test_branch_may_wait_for_its_sibling(wait: Callable[[asyncio.Task[Any]], Awaitable[object]]) -> None:
    """A branch may await a sibling's task in every way that asyncio has."""
    recorded = Recorded()

    async def waits() -> None:
        asyncio.get_running_loop().call_later(STEP, recorded.go.set)
        await wait(recorded.task)

    result = await join([recorded, waits])

    assert shape(result) == ([0, 1], [], [])


async def test_branch_that_waits_for_a_failing_sibling() -> None:
    """A branch that awaits a sibling's task fails with what that one raised; the same object is in both errors."""
    tasks: list[asyncio.Task[Any]] = []

    async def fails() -> None:
        tasks.append(asyncio.current_task())  # type: ignore[arg-type]
        await asyncio.sleep(STEP)
        raise Oops("shared")

    async def waits() -> None:
        await tasks[0]

    error = await join_error([fails, waits])

    first, second = error.exceptions
    assert first is second


async def test_cancel_counters_of_a_branch() -> None:
    """The task of a branch counts cancel and uncancel, and hands the message of a cancel on."""
    seen: list[object] = []

    async def run() -> str:
        task = asyncio.current_task()
        assert task is not None
        seen.append([task.cancel("first"), task.cancel("second"), task.cancelling()])
        try:
            await asyncio.sleep(FOREVER)
        except asyncio.CancelledError as error:
            seen.append(error.args)
        seen.append([task.uncancel(), task.uncancel(), task.uncancel(), task.cancelling()])
        await asyncio.sleep(STEP)
        return "went on"

    result = await join([run])

    assert seen == [[True, True, 2], ("second",), [1, 0, 0, 0]]
    assert result.values() == ["went on"]


async def test_done_callbacks_of_a_branch() -> None:
    """Done-callbacks of a branch's task are called with it, each in its context; a removed one is not."""
    called: list[object] = []
    context = contextvars.copy_context()
    context.run(variable.set, "of the callback")

    def callback(task: asyncio.Task[Any]) -> None:
        called.append((task.result(), variable.get(), asyncio.current_task()))

    def removed(_: object) -> None:
        called.append("removed")

    async def check(task: asyncio.Task[Any]) -> None:
        task.add_done_callback(callback, context=context)
        task.add_done_callback(removed)
        task.add_done_callback(removed)
        assert task.remove_done_callback(removed) == 2

    task = await observed(check)
    task.add_done_callback(callback, context=context)
    await asyncio.sleep(0)

    assert called == [("value", "of the callback", None)] * 2


async def test_done_callback_of_a_branch_that_raises(asyncio_reports: list[str]) -> None:
    """A done-callback that raises is reported by asyncio and disturbs neither branch nor join."""

    def callback(_: object) -> None:
        raise Oops("from a callback")

    async def check(task: asyncio.Task[Any]) -> None:
        task.add_done_callback(callback)

    task = await observed(check)
    reported = "\n".join(asyncio_reports)
    asyncio_reports.clear()

    assert task.result() == "value"
    assert "from a callback" in reported


async def test_loser_is_a_cancelled_task() -> None:
    """The task of a cancelled branch is a cancelled task."""
    recorded = Recorded()

    await join([recorded, branch(1, "s1")], ANY)

    assert recorded.task.cancelled()
    with pytest.raises(asyncio.CancelledError):
        recorded.task.result()
    with pytest.raises(asyncio.CancelledError):
        recorded.task.exception()


async def test_branch_ended_from_outside() -> None:
    """Whoever has the task of a branch may cancel it, from a callback or another task."""
    recorded = Recorded()
    asyncio.get_running_loop().call_later(STEP, lambda: recorded.task.cancel("from a callback"))

    error = await join_error([recorded])

    assert shape(error.result) == ([], [], [0])


async def test_tasks_made_by_branches() -> None:
    """A task that a branch makes and leaves running is its own affair: it outlives branch and join."""
    made: list[asyncio.Task[str]] = []

    async def run() -> None:
        made.append(asyncio.create_task(asyncio.sleep(3 * STEP, "later")))

    await join([run, run])

    assert [task.done() for task in made] == [False, False]
    assert await asyncio.gather(*made) == ["later", "later"]


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

    def __await__(self) -> Generator[Any, None, str]:
        yield from asyncio.sleep(0).__await__()
        return "value"


def gives_coroutine() -> Coroutine[Any, Any, str]:
    return as_coroutine()


def gives_awaitable() -> Later:
    return Later()


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
        pytest.param(gives_coroutine, id="function that gives a coroutine"),
        pytest.param(gives_awaitable, id="function that gives an awaitable"),
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


def by_width(width: int) -> list[object]:
    return by_list()[:width]


async def by_coroutine() -> list[object]:
    await asyncio.sleep(0)
    return by_list()


def by_given_coroutine() -> Coroutine[Any, Any, list[object]]:
    return by_coroutine()


def by_resources(resources: Resources) -> list[object]:
    return by_list()[: resources.get("width", int)]


async def by_injection(width: Annotated[int, Res("width")], context: RunContext) -> tuple[object, ...]:
    assert (context.state, context.branch) == (S.SPLIT, None)
    return tuple(by_list()[:width])


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
        pytest.param(functools.partial(by_width, 3), id="partial"),
        pytest.param(ByCall(), id="callable object"),
        pytest.param(by_given_coroutine, id="function that gives a coroutine"),
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


async def test_factory_is_asked_at_each_entry() -> None:
    """Each entry into the state makes its branches anew, as many as there are by then."""
    results: list[SplitResult] = []
    widths = iter([1, 3, 2])

    def joined(result: SplitResult) -> S:
        results.append(result)
        return S.SPLIT if len(results) < 3 else S.END

    workflow = split_into(lambda: plan("s1 s1 s1")[: next(widths)], ALL, joined)

    await workflow.orchestrate(S.SPLIT)

    assert [result.total_count for result in results] == [1, 3, 2]


@pytest.mark.parametrize("made", [[], (), {}], ids=["list", "tuple", "dict"])
async def test_empty_factory(made: object) -> None:
    """All joins an empty run-time list at once, with an empty result."""
    result = await join(lambda: made)

    # SP-019
    assert shape(result) == ([], [], [])
    assert (result.completed_count, result.total_count, result.values()) == (0, 0, [])


@pytest.mark.parametrize("strategy", ALL_BUT_ALL, ids=repr)
async def test_empty_factory_refused(strategy: JoinStrategy) -> None:
    """Every strategy but All refuses an empty run-time list on entry."""
    with pytest.raises(ConfigurationError) as caught:
        await join(lambda: (), strategy, timeout=1)

    # SP-020, JN-002
    assert "at least one branch" in str(caught.value)
    assert caught.value.state is S.SPLIT


@pytest.mark.parametrize("strategy", [JoinStrategy.Quorum(3), JoinStrategy.PartialResults(3)], ids=repr)
async def test_factory_with_too_few_branches(strategy: JoinStrategy) -> None:
    """A strategy that a run-time list is too short for is refused on entry, before any branch runs."""
    log: Log = []

    with pytest.raises(ConfigurationError, match="cannot be reached"):
        await join(lambda: plan("s1 s1", log), strategy)

    # B45
    assert log == []


@pytest.mark.parametrize(
    ("made", "text"),
    [
        pytest.param(lambda: [branch(0), 42], "42", id="number"),
        pytest.param(lambda: [branch(0), None], "None", id="None"),
        pytest.param(lambda: [branch(0), WithRun], "register an instance", id="class"),
        pytest.param(lambda: [branch(0), as_coroutine()], "without calling it", id="coroutine"),
        pytest.param(lambda: [branch(0), lambda a, b: a + b], "no annotation", id="parameters"),
        pytest.param(lambda: None, "iterable of tasks", id="no list"),
        pytest.param(lambda: "ab", "iterable of tasks", id="text"),
        pytest.param(lambda: branch(0), "iterable of tasks", id="task"),
    ],
)
async def test_factory_with_something_else(made: Callable[[], object], text: str) -> None:
    """A run-time list with something that is no task is refused as a whole: no branch runs."""
    with pytest.raises(ConfigurationError) as caught:
        await join(made)

    assert text in str(caught.value)
    assert caught.value.state is S.SPLIT


async def test_factory_that_raises() -> None:
    """What a factory raises leaves the run unchanged, with the state in its note."""
    failure = Oops("no list")

    def factory() -> list[object]:
        raise failure

    with pytest.raises(Oops) as caught:
        await join(factory)

    assert caught.value is failure
    assert "state=SPLIT" in failure.__notes__[0]


async def test_factory_whose_list_raises() -> None:
    """What iterating over a run-time list raises leaves the run unchanged, and no branch runs."""
    log: Log = []

    def factory() -> Iterator[object]:
        def made() -> Iterator[object]:
            yield branch(0, "s1", log)
            raise Oops

        return made()

    with pytest.raises(Oops):
        await join(factory)

    assert log == []


@pytest.mark.virtual
async def test_timeout_does_not_count_the_factory() -> None:
    """The timeout of a split counts from its branches, not from the factory that makes them."""

    async def factory() -> Any:
        await asyncio.sleep(10)
        return plan("n")

    await join_error(factory, ALL, timeout=1)

    assert now() == 11


# What is refused


def refused(call: Callable[[], object]) -> str:
    with pytest.raises(ConfigurationError) as caught:
        call()
    return str(caught.value)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        pytest.param(
            lambda: JoinStrategy.Quorum(0), "n in Quorum(n) must be at least 1, got 0", id="Quorum(0)"
        ),  # SP-021
        pytest.param(lambda: JoinStrategy.Quorum(-1), "got -1", id="Quorum(-1)"),
        pytest.param(lambda: JoinStrategy.Quorum(n=True), "int", id="Quorum(True)"),
        pytest.param(lambda: JoinStrategy.Quorum(1.0), "int", id="Quorum(1.0)"),  # type: ignore[arg-type]
        pytest.param(lambda: JoinStrategy.Quorum(2**70), "64 bits", id="Quorum(2**70)"),
        pytest.param(lambda: JoinStrategy.PartialResults(0), "at least 1, got 0", id="PartialResults(0)"),  # JN-006
        pytest.param(lambda: JoinStrategy.Percentage(0), "above 0", id="Percentage(0)"),  # WF-009
        pytest.param(lambda: JoinStrategy.Percentage(1.5), "1.5", id="Percentage(1.5)"),
        pytest.param(lambda: JoinStrategy.Percentage(-0.1), "-0.1", id="Percentage(-0.1)"),
        pytest.param(lambda: JoinStrategy.Percentage(float("nan")), "NaN", id="Percentage(nan)"),
        pytest.param(lambda: JoinStrategy.Percentage("0.5"), "number", id="Percentage('0.5')"),  # type: ignore[arg-type]
        pytest.param(lambda: JoinStrategy.Percentage(p=True), "number", id="Percentage(True)"),
    ],
)
def test_strategy_refused(make: Callable[[], object], text: str) -> None:
    """A strategy whose number is out of range or of the wrong type cannot be made."""
    # SP-022
    assert text in refused(make)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        pytest.param(
            {"bulkhead": 0}, "bulkhead must be an int of at least 1, or a Bulkhead, got 0", id="bulkhead 0"
        ),  # WF-010
        pytest.param({"bulkhead": -1}, "-1", id="bulkhead -1"),
        pytest.param({"bulkhead": True}, "True", id="bulkhead True"),
        pytest.param({"bulkhead": 2.0}, "2.0", id="bulkhead 2.0"),
        pytest.param({"timeout": -1}, "-1", id="timeout -1"),
        pytest.param({"timeout": True}, "True", id="timeout True"),
        pytest.param({"timeout": float("nan")}, "NaN", id="timeout nan"),
        pytest.param({"timeout": float("inf")}, "inf", id="timeout inf"),
        pytest.param({"timeout": "1"}, "'1'", id="timeout text"),
        pytest.param({"timeout": timedelta(seconds=-1)}, "-1", id="timeout timedelta"),
        pytest.param({"fail_fast": 1}, "fail_fast must be True or False, got 1", id="fail_fast 1"),
        pytest.param({"strategy": "All"}, "strategy must be a JoinStrategy", id="strategy text"),
        pytest.param(
            {"strategy": JoinStrategy.Quorum}, "strategy must be a JoinStrategy", id="strategy without a number"
        ),
        pytest.param({"next_state": []}, "next_state must be hashable", id="next_state list"),
    ],
)
def test_join_config_refused(options: dict[str, Any], text: str) -> None:
    """A join with a value out of range or of the wrong type cannot be made."""
    arguments: dict[str, Any] = {"strategy": ALL, "next_state": S.END, **options}

    assert text in refused(lambda: JoinConfig(**arguments))


@pytest.mark.parametrize(
    ("tasks", "strategy", "text"),
    [
        pytest.param(
            2, JoinStrategy.Quorum(3), "Quorum(3) cannot be reached: the split has 2 branches", id="Quorum"
        ),  # B45
        pytest.param(1, JoinStrategy.PartialResults(2), "the split has 1 branch", id="PartialResults"),  # WF-012
        pytest.param(2, PARTIAL_TIMEOUT, "PartialTimeout needs a timeout", id="PartialTimeout"),  # WF-008
        *(pytest.param(0, one, "at least one branch", id=f"no branch, {one!r}") for one in ALL_BUT_ALL),
    ],
)
def test_validate_split(tasks: int, strategy: JoinStrategy, text: str) -> None:
    """A join that its branches can never meet is refused when the workflow is validated."""
    workflow = split_into([branch(0)] * tasks, strategy)

    assert text in refused(workflow.validate)


def test_validate_partial_timeout_of_a_factory() -> None:
    """PartialTimeout without a timeout is refused at validation even where the branches come at run time."""
    workflow = split_into(by_list, PARTIAL_TIMEOUT)

    assert "needs a timeout" in refused(workflow.validate)


def test_validate_target_of_a_join() -> None:
    """A split that joins into a state that does not exist is refused at validation, by name."""
    workflow = Workflow[S]().register_split(S.SPLIT, plan("s1"), JoinConfig(ALL, S.OTHER)).add_exit_state(S.END)

    # WF-006
    assert "OTHER" in refused(workflow.validate)


async def test_join_into_an_exit_state() -> None:
    """A split may join straight into an exit state."""
    workflow = Workflow[S]().register_split(S.SPLIT, plan("s1"), JoinConfig(ALL, S.END)).add_exit_state(S.END)

    # WF-007
    assert await workflow.orchestrate(S.SPLIT) is S.END


async def test_empty_split() -> None:
    """All joins a split without branches at once."""
    result = await join([], ALL, bulkhead=1, timeout=1)

    # SP-019, JN-001
    assert shape(result) == ([], [], [])


@pytest.mark.parametrize(
    ("tasks", "text"),
    [
        pytest.param([42], "got 42", id="number"),
        pytest.param([branch(0), WithRun], "register an instance", id="class"),
        pytest.param(42, "iterable of tasks", id="no list"),
        pytest.param("ab", "iterable of tasks", id="text"),
    ],
)
def test_register_split_refused(tasks: Any, text: str) -> None:
    """Something that is no task, or no list of tasks, is refused at registration."""
    assert text in refused(lambda: split_into(tasks))


@pytest.mark.parametrize("given_join", [ALL, None, S.END, "All"], ids=repr)
def test_register_split_needs_a_join_config(given_join: Any) -> None:
    """A split is registered with a JoinConfig and nothing less."""
    workflow = Workflow[S]()

    assert "must be a JoinConfig" in refused(lambda: workflow.register_split(S.SPLIT, plan("s1"), given_join))


def test_register_split_reads_its_list_once() -> None:
    """The branches may be any iterable; it is read at registration, and later changes of it are not seen."""
    tasks = plan("s1 s1")
    workflow = split_into(task for task in tasks)
    listed = split_into(tasks)

    tasks.clear()

    # WF-025
    assert cano.testing.run(workflow.orchestrate(S.SPLIT)) is S.END
    assert cano.testing.run(listed.orchestrate(S.SPLIT)) is S.END


# JoinConfig and JoinStrategy


def test_join_config_defaults() -> None:
    """A join has no timeout, no bulkhead and does not fail fast unless asked."""
    config = JoinConfig(ALL, S.END)

    # JN-009
    assert (config.timeout, config.bulkhead, config.fail_fast) == (None, None, False)


def test_join_config_changed_copies() -> None:
    """The with_ methods give changed copies and leave the original alone."""
    config = JoinConfig(ALL, S.END)

    changed = config.with_timeout(timedelta(seconds=2)).with_bulkhead(3).with_next_state(S.JOINED)

    # JN-009
    assert changed == JoinConfig(ALL, S.JOINED, timeout=2.0, bulkhead=3)
    assert config == JoinConfig(ALL, S.END)
    assert changed.with_timeout(None).with_bulkhead(None) == JoinConfig(ALL, S.JOINED)


def test_join_config_checks_its_copies() -> None:
    """A changed copy is checked like the original."""
    config = JoinConfig(ALL, S.END)

    assert "bulkhead" in refused(lambda: config.with_bulkhead(0))
    assert "timeout" in refused(lambda: config.with_timeout(-1))


def test_join_config_is_frozen() -> None:
    """A join cannot be changed."""
    config = JoinConfig(ALL, S.END)

    with pytest.raises(dataclasses.FrozenInstanceError):
        config.timeout = 1  # type: ignore[misc]


def test_join_config_copies() -> None:
    """A join is a value: it copies and pickles into an equal one."""
    config = JoinConfig(JoinStrategy.Percentage(0.3), "joined", timeout=1, bulkhead=2, fail_fast=True)

    assert copy.deepcopy(config) == config
    assert pickled(config) == config
    assert dataclasses.asdict(config)["strategy"] == JoinStrategy.Percentage(0.3)


@pytest.mark.parametrize("strategy", [*ONE_OF_EACH, JoinStrategy.Percentage(1)], ids=repr)
def test_strategy_is_a_value(strategy: JoinStrategy) -> None:
    """A strategy reads as it is written, and equals and hashes like another one that reads the same."""
    again = eval(repr(strategy), {"JoinStrategy": JoinStrategy})  # noqa: S307 - our own repr

    assert repr(strategy).startswith("JoinStrategy.")
    assert again == strategy
    assert hash(again) == hash(strategy)


def test_strategies_differ() -> None:
    """Strategies of another kind or number are not equal."""
    strategies = [*ONE_OF_EACH, JoinStrategy.Quorum(3), JoinStrategy.PartialResults(3), JoinStrategy.Percentage(0.6)]

    assert len(set(strategies)) == len(strategies)
    assert ALL != "All"


# SplitResult


@pytest.mark.virtual
async def test_result_shape() -> None:
    """The joined state gets every outcome in branch order: index, name, value or error, and the exact time taken."""
    result = await join(
        [lambda_after(0.5, "late"), branch(1, "f0"), branch(2, "n"), lambda_after(0.25, "early")],
        JoinStrategy.PartialResults(3),
    )

    # JN-008
    late, early = result.successes
    (error,) = result.errors
    assert [(one.index, one.value, one.error, one.elapsed) for one in (late, early)] == [
        (0, "late", None, 0.5),
        (3, "early", None, 0.25),
    ]
    assert (error.index, error.name, error.value, type(error.error), error.elapsed) == (1, "branch1", None, Oops, 0.0)
    assert result.cancelled == [2]
    assert (result.completed_count, result.total_count) == (3, 4)
    assert result.values() == ["late", "early"]


@pytest.mark.virtual
async def test_elapsed_behind_a_bulkhead() -> None:
    """The time a branch took counts from its own start, not from the split's."""
    result = await join([lambda_after(0.5, None), lambda_after(0.25, None), lambda: None], bulkhead=1)

    assert [one.elapsed for one in result.successes] == [0.5, 0.25, 0.0]


@pytest.mark.virtual
async def test_elapsed_counts_retries() -> None:
    """The time a branch took is that of all its attempts and the pauses between them."""

    class Flaky(Task[S]):
        config = TaskConfig().with_fixed_retry(1, 2.0)

        async def run(self, context: RunContext) -> None:
            await asyncio.sleep(0.5)
            if context.attempt == 1:
                raise Oops

    result = await join([Flaky()])

    assert result.successes[0].elapsed == 3.0


async def test_names_of_branches() -> None:
    """Branches are named like any task: an attribute name, else the qualified name of the function or the class."""

    class Named(WithRun):
        name = "charge"

    result = await join([Named(), WithRun(), as_coroutine, branch(3)])

    assert [one.name for one in result.successes] == ["charge", "WithRun", "as_coroutine", "branch3"]


async def test_result_lists_are_copies() -> None:
    """Changing a list that a result gave does not change the result."""
    result = await join(plan("s1 f1 c1"), PARTIAL_TIMEOUT, timeout=FOREVER)

    for given_list in (result.successes, result.errors, result.cancelled, result.values()):
        given_list.clear()

    assert shape(result) == ([0], [1], [2])
    assert result.values() == ["value 0"]


@pytest.mark.parametrize("name", ["successes", "errors", "cancelled", "completed_count", "total_count"])
async def test_result_is_frozen(name: str) -> None:
    """A result cannot be changed."""
    result = await join(plan("s1"))

    with pytest.raises(AttributeError):
        setattr(result, name, None)


async def test_result_repr() -> None:
    """The text of a result counts its outcomes, that of an outcome names index, branch and kind, no values."""
    result = await join(plan("s1 f1 c1"), PARTIAL_TIMEOUT, timeout=FOREVER)

    assert repr(result) == "<SplitResult 1 succeeded, 1 failed, 1 cancelled of 3>"
    assert re.fullmatch(r"<BranchOutcome 0 branch0 value=str elapsed=0\.\d+>", repr(result.successes[0]))
    assert re.fullmatch(r"<BranchOutcome 1 branch1 error=Oops elapsed=0\.\d+>", repr(result.errors[0]))


async def test_result_pickles() -> None:
    """A result survives pickling with every outcome."""
    result = await join(plan("s1 f1 c1"), PARTIAL_TIMEOUT, timeout=FOREVER)

    again = pickled(result)

    assert shape(again) == shape(result)
    assert again.values() == result.values()
    assert again.errors[0].error.args == (1,)
    assert [one.elapsed for one in again.successes] == [one.elapsed for one in result.successes]
    assert [one.name for one in again.successes] == ["branch0"]


def test_result_made_by_hand() -> None:
    """A test of a joined state's task can make a result, from outcomes in any order."""
    failure = Oops(0)

    result = SplitResult([BranchOutcome(2, "c", value="two"), BranchOutcome(0, "a", error=failure)], cancelled=[1])

    assert shape(result) == ([2], [0], [1])
    assert result.errors[0].error is failure
    assert result.values() == ["two"]


@pytest.mark.parametrize(
    ("indices", "cancelled"),
    [
        pytest.param([0, 0], [], id="twice"),
        pytest.param([0], [0], id="ended and cancelled"),
        pytest.param([1], [], id="gap"),
        pytest.param([0], [5], id="too high"),
    ],
)
def test_result_made_by_hand_refused(indices: list[int], cancelled: list[int]) -> None:
    """The branches of a result are numbered from 0 without a gap."""
    outcomes = [BranchOutcome(index, "branch") for index in indices]

    assert "branch indices must be" in refused(lambda: SplitResult(outcomes, cancelled))


def test_result_made_by_hand_collected() -> None:
    """The cyclic collector finds a value that refers to the result it is in."""

    class Value:
        result: SplitResult

    value = Value()
    value.result = SplitResult([BranchOutcome(0, "branch", value=value)])
    died = weakref.ref(value)

    del value
    gc.collect()

    assert died() is None


# Who gets the result


async def test_joined_task_gets_the_result_by_annotation() -> None:
    """The joined state's task gets the result wherever it asks for it, beside its other parameters."""
    seen: list[object] = []

    async def joined(number: Annotated[int, Res("number")], *, context: RunContext, result: SplitResult) -> S:
        seen.extend([number, context.state, result.values()])
        return S.END

    await split_into(plan("s1"), ALL, joined).orchestrate(S.SPLIT, resources={"number": 7})

    assert seen == [7, S.JOINED, ["value 0"]]


async def test_every_attempt_of_the_joined_task_gets_the_result() -> None:
    """A retry of the joined state's task gets the same result again."""
    results: list[SplitResult] = []

    def joined(result: SplitResult) -> S:
        results.append(result)
        if len(results) < 3:
            raise Oops
        return S.END

    workflow = Workflow[S]().register_split(S.SPLIT, plan("s1"), JoinConfig(ALL, S.JOINED)).add_exit_state(S.END)
    workflow.register(S.JOINED, joined, config=TaskConfig().with_fixed_retry(2, 0))

    await workflow.orchestrate(S.SPLIT)

    assert len(results) == 3
    assert len({id(result) for result in results}) == 1


@pytest.mark.parametrize("annotation", [SplitResult | None, Optional[SplitResult]], ids=["union", "Optional"])  # noqa: UP045
async def test_result_is_optional(annotation: Any) -> None:
    """A task that may be entered without a split asks for ``SplitResult | None``, and gets None then."""
    seen: list[SplitResult | None] = []

    def joined(result: SplitResult | None) -> S:
        seen.append(result)
        return S.END

    joined.__annotations__["result"] = annotation
    workflow = split_into(plan("s1"), ALL, joined)

    await workflow.orchestrate(S.SPLIT)
    await workflow.orchestrate(S.JOINED)

    assert [type(one) for one in seen] == [SplitResult, types.NoneType]


async def test_result_is_kept_for_one_visit() -> None:
    """The result belongs to the visit the join led to; a later visit of the same state does not get it."""
    seen: list[SplitResult | None] = []

    def joined(result: SplitResult | None) -> S:
        seen.append(result)
        return S.JOINED if len(seen) == 1 else S.END

    await split_into(plan("s1"), ALL, joined).orchestrate(S.SPLIT)

    assert [type(one) for one in seen] == [SplitResult, types.NoneType]


async def test_result_required_without_a_split() -> None:
    """A task that requires a result fails when its state is entered by another way, and the error says what to do."""
    workflow = split_into(plan("s1"), ALL, collector([]))

    with pytest.raises(WorkflowError, match=r"SplitResult \| None") as caught:
        await workflow.orchestrate(S.JOINED)

    assert caught.value.state is S.JOINED


async def test_factory_of_the_joined_state_gets_the_result() -> None:
    """A split may join into a split, whose factory gets the result of the first."""
    results: list[SplitResult] = []

    def factory(result: SplitResult) -> list[object]:
        return [functools.partial(str.upper, value) for value in result.values()]

    workflow = (
        Workflow[S]()
        .register_split(S.SPLIT, plan("s1 s1"), JoinConfig(ALL, S.OTHER))
        .register_split(S.OTHER, factory, JoinConfig(ALL, S.JOINED))
        .register(S.JOINED, collector(results))
        .add_exit_state(S.END)
    )

    await workflow.orchestrate(S.SPLIT)

    assert results[0].values() == ["VALUE 0", "VALUE 1"]


async def needs_result(result: SplitResult) -> S:
    return S.END


@pytest.mark.parametrize(
    "workflow",
    [
        pytest.param(split_into([needs_result]), id="branch"),
        pytest.param(split_into(plan("s1")).register(S.OTHER, needs_result), id="other state"),
        pytest.param(Workflow[S]().register(S.OTHER, needs_result).add_exit_state(S.END), id="no split"),
    ],
)
def test_split_result_required_in_wrong_place(workflow: Workflow[S]) -> None:
    """A task that requires a result where no split joins is refused at validation."""
    assert "SplitResult" in refused(workflow.validate)


# JoinError


async def test_join_error_has_the_exceptions_of_the_branches() -> None:
    """A failed join is an exception group of the branches' own exception objects, in branch order."""
    failures = [Oops(0), Oops(1)]

    async def fails(index: int) -> None:
        await asyncio.sleep((2 - index) * STEP)
        raise failures[index]

    error = await join_error([functools.partial(fails, 0), branch(1), functools.partial(fails, 1)])

    assert isinstance(error, ExceptionGroup)
    assert isinstance(error, WorkflowError)
    assert list(error.exceptions) == failures
    assert error.result is not None
    assert [one.error for one in error.result.errors] == failures


async def test_join_error_names_the_branches() -> None:
    """Each exception of a failed join has a note and facts that name state, task and branch."""
    error = await join_error(plan("s1 f1"))

    (failure,) = error.exceptions
    assert failure.__notes__ == ["state=SPLIT task=branch1 branch=1 attempt=1/1 path=SPLIT"]
    context: ErrorContext = failure.__cano__  # type: ignore[union-attr]
    assert (context.state, context.task, context.branch, context.path) == (S.SPLIT, "branch1", 1, (S.SPLIT,))


async def test_join_error_says_what_was_missed() -> None:
    """The text of a failed join names state and strategy and counts the outcomes; its facts say where it was."""
    error = await join_error(plan("s1 f1 c1"), JoinStrategy.Quorum(2))

    assert error.message == "the split in state SPLIT did not reach Quorum(2): 1 succeeded, 1 failed, 1 cancelled of 3"
    assert (error.state, error.task, error.path) == (S.SPLIT, None, (S.SPLIT,))
    assert error.__notes__ == ["state=SPLIT attempt=1/1 path=SPLIT"]


async def test_join_error_path() -> None:
    """The path of a failed join ends with the split's state."""
    workflow = split_into(plan("f1")).register(S.OTHER, lambda: S.SPLIT)

    with pytest.raises(JoinError) as caught:
        await workflow.orchestrate(S.OTHER)

    assert caught.value.path == (S.OTHER, S.SPLIT)
    assert caught.value.exceptions[0].__notes__[0].endswith("path=OTHER>SPLIT")


async def test_join_error_without_exceptions() -> None:
    """Where no branch raised an exception, the group has one that says so."""
    error = await join_error(plan("c1 c1"))

    (placeholder,) = error.exceptions
    assert isinstance(placeholder, TaskExecutionError)
    assert str(placeholder) == "no branch of the split in state SPLIT raised: 0 succeeded, 0 failed, 2 cancelled of 2"


async def test_join_error_with_except_star() -> None:
    """``except*`` picks the failures of one kind out of a failed join."""

    async def fails() -> None:
        raise KeyError("key")

    caught: list[BaseException] = []
    try:
        await join([branch(0, "f1"), fails, branch(2, "f1")])
    except* KeyError as group:
        caught.extend(group.exceptions)
    except* Oops as group:
        caught.extend(group.exceptions)

    assert [type(one) for one in caught] == [KeyError, Oops, Oops]


async def test_join_error_parts_keep_their_facts() -> None:
    """The parts that ``split`` makes are join errors with the same result, place and note."""
    error = await join_error([branch(0, "f1"), lambda: int("no number")])

    matched, rest = error.split(Oops)

    for part in (matched, rest):
        assert isinstance(part, JoinError)
        assert part.result is error.result
        assert part.__notes__ == error.__notes__
        assert part.state is S.SPLIT
    assert [[type(one) for one in part.exceptions] for part in (matched, rest) if part] == [[Oops], [ValueError]]


async def test_join_error_pickles() -> None:
    """A failed join survives pickling with its text, exceptions, notes, place and result."""
    error = await join_error(plan("s1 f1"))

    again = pickled(error)

    assert (type(again), str(again), again.__notes__) == (JoinError, str(error), error.__notes__)
    assert again.exceptions[0].__notes__ == error.exceptions[0].__notes__
    assert shape(again.result) == ([0], [1], [])
    assert again.result.errors[0].error is again.exceptions[0]
    assert again.state is S.SPLIT


async def test_join_timeout_error() -> None:
    """A join that is too late has a TimeoutError before the branches' exceptions, so ``except* TimeoutError`` works."""
    caught: list[BaseException] = []

    try:
        await join(plan("f1 n"), ALL, timeout=20 * STEP)
    except* TimeoutError as group:
        caught.append(group)
    except* Oops as group:
        caught.append(group)

    late, failed = caught
    assert isinstance(late, JoinTimeoutError)
    assert isinstance(failed, JoinTimeoutError)
    assert [type(one) for one in (*late.exceptions, *failed.exceptions)] == [TimeoutError, Oops]
    assert late.message.startswith(
        "the split in state SPLIT was not decided within its timeout of 0.2 s: 0 succeeded, 1 failed"
    )


async def test_join_timeout_error_pickles() -> None:
    """A join that was too late survives pickling."""
    error = await join_error(plan("n"), ALL, timeout=STEP)

    again = pickled(error)

    assert isinstance(again, JoinTimeoutError)
    assert [type(one) for one in again.exceptions] == [TimeoutError]
    assert shape(again.result) == ([], [], [0])


async def test_same_exception_in_several_branches() -> None:
    """Branches that raise one and the same exception object fail each with it."""
    failure = Oops("shared")

    async def fails() -> None:
        raise failure

    error = await join_error([fails, fails])

    assert list(error.exceptions) == [failure, failure]
    assert shape(error.result) == ([], [0, 1], [])


async def test_failed_join_is_not_retried() -> None:
    """A split is entered once: the failure of a join is not a failed attempt of anything."""
    log: Log = []

    await join_error(plan("f1", log))

    assert log == ["+0"]


# Cancellation


async def cancelled(workflow: Workflow[S], message: str | None = None, *, after: float = STEP, times: int = 1) -> Any:
    """Start a run in a task, cancel that `times` times, and give the CancelledError that came out."""
    task = asyncio.create_task(workflow.orchestrate(S.SPLIT))
    for _ in range(times):
        await asyncio.sleep(after)
        task.cancel(message)
    with pytest.raises(asyncio.CancelledError) as caught:
        await task
    return caught.value


@each_strategy
async def test_outer_cancel(strategy: JoinStrategy) -> None:
    """Cancelling a run cancels every branch and awaits it before the cancellation goes on."""
    log: Log = []
    workflow = split_into(plan("n n n", log, cleanup=STEP), strategy, timeout=FOREVER)

    await cancelled(workflow)

    # SP-035
    assert log == ["+0", "+1", "+2", "-0", "-1", "-2", ".0", ".1", ".2"]


async def test_outer_cancel_passes_its_message_on() -> None:
    """The message of a cancellation reaches the branches, and comes out of the run."""
    messages: list[object] = []

    async def run() -> None:
        try:
            await asyncio.sleep(FOREVER)
        except asyncio.CancelledError as error:
            messages.append(error.args)
            raise

    error = await cancelled(split_into([run, run]), "enough")

    assert messages == [("enough",), ("enough",)]
    assert error.args == ("enough",)


async def test_outer_cancel_repeated() -> None:
    """Each further cancellation of a run reaches the branches that are still cleaning up."""
    log: Log = []

    async def stubborn() -> None:
        for _ in range(3):
            try:
                await asyncio.sleep(FOREVER)
            except asyncio.CancelledError:
                log.append("cancelled")
        raise asyncio.CancelledError

    await cancelled(split_into([stubborn]), times=3)

    assert log == ["cancelled"] * 3


async def test_outer_cancel_beats_what_the_branches_make_of_it() -> None:
    """A cancelled run ends cancelled even if its branches succeed or fail instead of ending cancelled."""

    async def fails() -> None:
        try:
            await asyncio.sleep(FOREVER)
        finally:
            raise Oops

    workflow = split_into([branch(0, "n", deaf=True), fails], ANY)

    await cancelled(workflow)

    assert asyncio.current_task().cancelling() == 0  # type: ignore[union-attr]


async def test_outer_cancel_starts_nothing() -> None:
    """A cancelled run starts no branch that its bulkhead held back."""
    log: Log = []

    await cancelled(split_into(plan("n n n", log), ALL, bulkhead=1))

    assert log == ["+0", "-0", ".0"]


async def test_outer_cancel_while_losers_clean_up() -> None:
    """A cancellation that comes after the decision, while losers are awaited, still ends the run as cancelled."""
    entered: list[None] = []
    workflow = split_into(plan("s1 n", cleanup=5 * STEP), ANY, lambda: entered.append(None))

    await cancelled(workflow, after=3 * STEP)

    assert entered == []


async def test_cancel_by_handle() -> None:
    """Cancelling the handle of a run cancels and awaits its branches, then raises WorkflowCancelledError."""
    log: Log = []
    run = split_into(plan("n n", log, cleanup=STEP)).start(S.SPLIT)
    await asyncio.sleep(STEP)

    run.cancel("no longer needed")

    with pytest.raises(WorkflowCancelledError) as caught:
        await run
    assert log == ["+0", "+1", "-0", "-1", ".0", ".1"]
    assert (caught.value.state, caught.value.reason) == (S.SPLIT, "no longer needed")


async def test_branch_that_cancels_itself() -> None:
    """A branch that cancels its own task counts as cancelled; siblings and run are not touched."""

    async def run() -> None:
        asyncio.current_task().cancel()  # type: ignore[union-attr]
        await asyncio.sleep(FOREVER)

    result = await join([run, branch(1, "s3")], ANY)

    assert shape(result) == ([1], [], [0])


async def test_branch_that_returns_with_a_cancel_pending() -> None:
    """A branch that is cancelled in its last step counts as cancelled, as any task of asyncio."""

    async def run() -> str:
        asyncio.current_task().cancel()  # type: ignore[union-attr]
        return "value"

    async def raises() -> None:
        asyncio.current_task().cancel()  # type: ignore[union-attr]
        raise Oops(1)

    result = await join([run, raises, branch(2)], PARTIAL_TIMEOUT, timeout=FOREVER)

    assert shape(result) == ([2], [1], [0])


async def test_branch_that_cancels_its_sibling() -> None:
    """A branch that cancels a sibling's task ends that one only."""
    tasks: list[asyncio.Task[Any]] = []

    async def victim() -> None:
        tasks.append(asyncio.current_task())  # type: ignore[arg-type]
        await asyncio.sleep(FOREVER)

    async def killer() -> str:
        await asyncio.sleep(STEP)
        tasks[0].cancel()
        return "done"

    result = await join([victim, killer, branch(2, "s3")], JoinStrategy.PartialResults(2))

    assert shape(result) == ([1, 2], [], [0])


async def test_branch_that_cancels_the_run() -> None:
    """A branch may cancel the task its run is awaited in, and is cancelled itself by that."""
    host = asyncio.current_task()
    assert host is not None
    log: Log = []

    async def run() -> None:
        host.cancel("from inside")
        try:
            await asyncio.sleep(FOREVER)
        finally:
            log.append("ended")

    with pytest.raises(asyncio.CancelledError, match="from inside"):
        await join([run, branch(1, "n")])

    assert log == ["ended"]
    assert host.uncancel() == 0


async def test_branch_cancelled_before_its_first_step() -> None:
    """A run that is cancelled at once leaves no coroutine that was never awaited."""
    task = asyncio.create_task(split_into(plan("n n")).orchestrate(S.SPLIT))
    task.cancel()

    with pytest.raises(asyncio.CancelledError):
        await task
    gc.collect()

    assert task.cancelled()


async def test_cancelling_counter() -> None:
    """A split that cancelled losers leaves no cancellation request on the task of the run."""
    await join(plan("s1 n n"), ANY)
    await join_error(plan("n"), ALL, timeout=STEP)

    assert asyncio.current_task().cancelling() == 0  # type: ignore[union-attr]


async def test_closed_run() -> None:
    """Closing the coroutine of a run ends its branches, and their late ends disturb nobody."""
    log: Log = []

    async def run() -> None:
        log.append("begun")
        try:
            await asyncio.sleep(FOREVER)
        finally:
            log.append("ended")

    coroutine = split_into([run, run]).orchestrate(S.SPLIT)
    coroutine.send(None)
    await asyncio.sleep(0)

    coroutine.close()
    for _ in range(3):
        await asyncio.sleep(0)

    assert log == ["begun"] * 2 + ["ended"] * 2


def test_loop_that_ends_with_a_live_run() -> None:
    """A loop that is shut down while a run waits for its branches cancels and awaits them like any task."""
    log: Log = []

    async def main() -> None:
        split_into(plan("n n", log)).start(S.SPLIT)
        await asyncio.sleep(STEP)

    cano.testing.run(main())

    assert log[:2] == ["+0", "+1"]
    assert {"-0", "-1"} <= set(log)


# BaseException


@pytest.mark.parametrize("strategy", [ANY, ALL, PARTIAL_TIMEOUT], ids=repr)
async def test_base_exception_of_a_branch(strategy: JoinStrategy) -> None:
    """A branch's BaseException is no outcome: it ends the run as it is, after every branch has ended."""
    log: Log = []
    failure = Fatal("stop")

    async def run() -> None:
        await asyncio.sleep(STEP)
        raise failure

    workflow = split_into([run, *plan("n", log, cleanup=STEP)], strategy, lambda: log.append("joined"), timeout=FOREVER)

    with pytest.raises(Fatal) as caught:
        await workflow.orchestrate(S.SPLIT)

    assert caught.value is failure
    assert log == ["+0", "-0", ".0"]


async def test_base_exception_starts_nothing() -> None:
    """After a branch's BaseException no branch is started that a bulkhead held back."""
    log: Log = []

    async def run() -> None:
        raise Fatal

    with pytest.raises(Fatal):
        await join([run, *plan("s1", log)], ALL, bulkhead=1)

    assert log == []


async def test_base_exception_of_a_loser() -> None:
    """A BaseException that a loser raises while it is cancelled ends the run, too."""

    async def loser() -> None:
        try:
            await asyncio.sleep(FOREVER)
        finally:
            raise Fatal

    with pytest.raises(Fatal):
        await join([branch(0, "s1"), loser], ANY)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_interrupt_in_a_branch(kind: type[BaseException], asyncio_reports: list[str]) -> None:
    """An interrupt raised in a branch leaves the event loop at once, and the siblings are cancelled as the loop ends."""
    log: Log = []

    async def run() -> None:
        await asyncio.sleep(STEP)
        raise kind

    with pytest.raises(kind):
        cano.testing.run(join([run, *plan("n", log)]))
    gc.collect()
    asyncio_reports.clear()  # that main() ended with it, too; asyncio reports the same of a TaskGroup

    assert log[:2] == ["+0", "-0"]


async def test_generator_exit_in_a_branch() -> None:
    """A GeneratorExit raised in a branch ends the run like any BaseException."""

    async def run() -> None:
        raise GeneratorExit

    with pytest.raises(GeneratorExit):
        await join([run])


# Branches that wait in unusual ways


async def test_branches_on_one_future() -> None:
    """Many branches may wait for the same future, and each gets its result."""
    future = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().call_later(STEP, future.set_result, "shared")

    async def run() -> Any:
        return await future

    result = await join([run] * 50)

    assert result.values() == ["shared"] * 50


async def test_loser_on_a_shared_future() -> None:
    """A loser that waits for a future of others under a shield leaves that future alone."""
    future = asyncio.get_running_loop().create_future()

    async def run() -> Any:
        return await asyncio.shield(future)

    await join([branch(0, "s1"), run], ANY)

    assert not future.done()


async def test_branch_on_a_finished_future() -> None:
    """A branch may wait for a future that is done, failed or cancelled already."""
    loop = asyncio.get_running_loop()
    done, failed, gone = loop.create_future(), loop.create_future(), loop.create_future()
    done.set_result("done")
    failed.set_exception(Oops("failed"))
    gone.cancel()

    async def waits(future: Any) -> Any:
        return await future

    result = await join(
        [functools.partial(waits, one) for one in (done, failed, gone)], PARTIAL_TIMEOUT, timeout=FOREVER
    )

    assert shape(result) == ([0], [1], [2])


async def test_branch_on_a_cancelled_task() -> None:
    """A branch that waits for a task somebody cancels counts as cancelled, the run goes on."""
    task = asyncio.create_task(asyncio.sleep(FOREVER))

    async def waits() -> None:
        await task

    async def cancels() -> None:
        task.cancel()

    result = await join([waits, cancels], JoinStrategy.Quorum(1))

    assert shape(result) in {0: ([1], [], [0])}.values()


class Yields:
    """An awaitable that yields what no event loop understands."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __await__(self) -> Iterator[Any]:
        yield self.value


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: Yields(42), id="number"),
        pytest.param(lambda: Yields("text"), id="text"),
        pytest.param(lambda: Yields(asyncio.get_running_loop().create_future()), id="future without await"),
    ],
)
async def test_branch_that_yields_nonsense(make: Callable[[], Awaitable[object]]) -> None:
    """A branch that yields what asyncio refuses fails with RuntimeError; its siblings do not notice."""

    async def run() -> None:
        await make()

    result = await join([run, branch(1, "s1")], ANY)

    assert shape(result) == ([1], [0], [])
    assert isinstance(result.errors[0].error, RuntimeError)


async def test_branch_on_a_future_of_another_loop() -> None:
    """A branch that waits for another loop's future fails alone."""
    other = asyncio.new_event_loop()
    future = other.create_future()

    async def run() -> None:
        await future

    try:
        result = await join([run, branch(1, "s1")], ANY)
    finally:
        other.close()

    assert shape(result) == ([1], [0], [])
    assert isinstance(result.errors[0].error, RuntimeError)


async def test_branches_that_only_yield() -> None:
    """Branches that give way many times without waiting for anything take turns."""
    log: list[int] = []

    def yields(index: int) -> Callable[[], Coroutine[Any, Any, None]]:
        async def run() -> None:
            for _ in range(3):
                log.append(index)
                await asyncio.sleep(0)

        return run

    await join([yields(0), yields(1)])

    assert log == [0, 1] * 3


async def test_branches_that_only_yield_starve_nobody() -> None:
    """While branches do nothing but give way, the rest of the loop has a turn as often as they."""
    turns = 0
    over = False

    async def ticks() -> None:
        nonlocal turns
        while not over:
            turns += 1
            await asyncio.sleep(0)

    async def run() -> None:
        for _ in range(1_000):
            await asyncio.sleep(0)

    ticker = asyncio.create_task(ticks())
    await join([run] * 5)
    over = True
    await ticker

    assert turns >= 1_000


async def test_loser_that_only_yields() -> None:
    """A loser that does nothing but give way can be cancelled between two turns."""
    turns = 0

    async def run() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async def ends() -> None:
        for _ in range(10):
            await asyncio.sleep(0)

    result = await join([run, ends], ANY)

    assert shape(result) == ([1], [], [0])
    assert turns <= 15


async def test_branches_with_structured_concurrency() -> None:
    """Task groups, gather, wait and wait_for work in branches as in any task."""

    async def group() -> str:
        async with asyncio.TaskGroup() as tasks:
            one = tasks.create_task(asyncio.sleep(STEP, "group"))
        return one.result()

    async def gather() -> str:
        return (await asyncio.gather(asyncio.sleep(STEP, "gather")))[0]

    async def wait() -> str:
        done, _ = await asyncio.wait([asyncio.create_task(asyncio.sleep(STEP, "wait"))])
        return done.pop().result()

    async def wait_for() -> str:
        return await asyncio.wait_for(asyncio.sleep(STEP, "wait_for"), FOREVER)

    result = await join([group, gather, wait, wait_for])

    assert result.values() == ["group", "gather", "wait", "wait_for"]


async def test_split_inside_a_branch() -> None:
    """A branch may run a workflow of its own, with splits; its failure is the branch's, the inner place stays."""
    inner = split_into(plan("s1 f1"))

    async def run() -> S:
        return await inner.orchestrate(S.SPLIT)

    error = await join_error([branch(0), run])

    (failure,) = error.exceptions
    assert isinstance(failure, JoinError)
    assert [type(one) for one in failure.exceptions] == [Oops]
    assert failure.exceptions[0].__notes__ == ["state=SPLIT task=branch1 branch=1 attempt=1/1 path=SPLIT"]


# Loops that are set up differently


@pytest.mark.parametrize("bulkhead", [None, 1])
async def test_task_factory_is_honoured(bulkhead: int | None) -> None:
    """Branches are made by the loop's task factory, if it has one, and are what it made."""
    loop = asyncio.get_running_loop()
    made: list[asyncio.Task[Any]] = []
    seen: list[Any] = []

    def factory(loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> asyncio.Task[Any]:
        task = asyncio.Task(coroutine, loop=loop, **options)
        made.append(task)
        return task

    async def run() -> str:
        seen.append((asyncio.current_task(), variable.get()))
        variable.set("branch")
        return "value"

    variable.set("run")
    loop.set_task_factory(factory)
    try:
        result = await join([run] * 3, bulkhead=bulkhead)
    finally:
        loop.set_task_factory(None)

    assert result.values() == ["value"] * 3
    assert seen == [(task, "run") for task in made]


@pytest.mark.skipif(sys.version_info < (3, 12), reason="eager tasks came with 3.12")
@pytest.mark.parametrize("bulkhead", [None, 1])
async def test_eager_task_factory(bulkhead: int | None) -> None:
    """With eager tasks the outcomes are the same."""
    loop = asyncio.get_running_loop()
    loop.set_task_factory(asyncio.eager_task_factory)  # type: ignore[attr-defined,unused-ignore]

    try:
        result = await join(
            [lambda: 0, branch(1, "f1"), branch(2, "s0"), as_coroutine],
            PARTIAL_TIMEOUT,
            timeout=FOREVER,
            bulkhead=bulkhead,
        )
    finally:
        loop.set_task_factory(None)

    assert shape(result) == ([0, 2, 3], [1], [])


@pytest.mark.parametrize("text", ["s1 n", "f1 f2", "c1 c1"])
def test_debug_mode(text: str) -> None:
    """In asyncio's debug mode a split behaves the same."""

    async def main() -> Shape:
        try:
            return shape(await join(plan(text), ANY))
        except JoinError as error:
            return shape(error.result)

    assert cano.testing.run(main(), debug=True) == cano.testing.run(main())


async def test_many_branches() -> None:
    """A thousand branches run at once."""
    result = await join([functools.partial(asyncio.sleep, STEP, index) for index in range(1_000)])

    assert result.values() == list(range(1_000))


async def test_many_branches_behind_a_bulkhead() -> None:
    """A thousand plain branches pass through a bulkhead of one."""
    result = await join([functools.partial(abs, -index) for index in range(1_000)], bulkhead=1)

    assert result.values() == list(range(1_000))


async def test_many_losers() -> None:
    """A thousand losers are cancelled and awaited."""
    result = await join(plan("s1" + " n" * 1_000), ANY)

    assert result.cancelled == list(range(1, 1_001))


@pytest.mark.parametrize("bulkhead", [None, 1])
async def test_branches_that_cannot_start(bulkhead: int | None) -> None:
    """Any number of branches that fail before they start, for want of a resource, are failures like others."""

    async def run(value: Annotated[int, Res("missing")]) -> None:
        raise AssertionError("it cannot be called")

    error = await join_error([run] * 10_000, bulkhead=bulkhead)

    assert len(error.exceptions) == 10_000
    assert {type(one) for one in error.exceptions} == {ResourceNotFoundError}


async def test_branches_of_concurrent_runs() -> None:
    """Runs of one workflow at once keep their branches and results apart."""

    async def run(number: Annotated[int, Res("number")]) -> int:
        await asyncio.sleep(STEP)
        return number

    results: list[SplitResult] = []
    workflow = split_into([run] * 2, ALL, collector(results))

    await asyncio.gather(*(workflow.orchestrate(S.SPLIT, resources={"number": number}) for number in range(20)))

    assert sorted(result.values() for result in results) == [[number] * 2 for number in range(20)]


def test_runs_on_several_loops() -> None:
    """One workflow may run on the loops of several threads at once."""
    workflow = split_into(plan("s1 s1 n"), JoinStrategy.Quorum(2))

    def work() -> list[S]:
        return [cano.testing.run(workflow.orchestrate(S.SPLIT)) for _ in range(20)]

    with ThreadPoolExecutor(4) as pool:
        ends = [one.result() for one in [pool.submit(work) for _ in range(4)]]

    assert ends == [[S.END] * 20] * 4


# What is left behind


class Tracked:
    """Something whose end can be seen."""


class TrackedError(Exception):
    """An exception whose end can be seen."""


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        pytest.param(PARTIAL_TIMEOUT, {"timeout": 5 * STEP}, id="proceeds"),
        pytest.param(PARTIAL_TIMEOUT, {"timeout": 5 * STEP, "bulkhead": 2}, id="proceeds behind a bulkhead"),
        pytest.param(ALL, {"timeout": 5 * STEP}, id="too late"),
        pytest.param(ALL, {"fail_fast": True}, id="fails"),
    ],
)
@pytest.mark.parametrize("retries", [0, 1], ids=["plain", "retried"])
async def test_nothing_is_left(strategy: JoinStrategy, options: dict[str, Any], retries: int) -> None:
    """After a split, also a failed one, reference counts alone free resources, values and exceptions."""
    died: list[weakref.ref[Any]] = []

    class Succeeds(Task[S]):
        config = TaskConfig().with_fixed_retry(retries, 0)

        async def run(self, _: Resources) -> Tracked:
            value = Tracked()
            died.append(weakref.ref(value))
            await asyncio.sleep(STEP)
            return value

    class Fails(Succeeds):
        async def run(self, _: Resources) -> Any:
            await asyncio.sleep(2 * STEP)
            error = TrackedError()
            died.append(weakref.ref(error))
            try:
                raise error
            finally:
                del error  # or the frame of the branch and the exception would keep each other

    class Waits(Succeeds):
        async def run(self, _: Resources) -> Any:
            value = Tracked()
            died.append(weakref.ref(value))
            await asyncio.sleep(FOREVER)

    async def use() -> None:
        resource = Tracked()
        died.append(weakref.ref(resource))
        workflow = split_into([Succeeds(), Fails(), Waits()], strategy, **options)
        with contextlib.suppress(JoinError):
            await workflow.orchestrate(S.SPLIT, resources={"resource": resource})

    await use()
    await asyncio.sleep(0)  # let the loop drop the handle that it has just run

    assert len(died) >= 4
    assert [one for one in died if one() is not None] == []


@pytest.mark.usefixtures("no_collector")
async def test_nothing_is_left_of_a_cancelled_run() -> None:
    """A cancelled run frees what its branches had."""
    died: list[weakref.ref[Any]] = []

    async def run() -> None:
        value = Tracked()
        died.append(weakref.ref(value))
        await asyncio.sleep(FOREVER)

    async def use() -> None:
        task = asyncio.create_task(split_into([run, run]).orchestrate(S.SPLIT))
        await asyncio.sleep(STEP)
        task.cancel()
        await asyncio.wait([task])

    await use()
    await asyncio.sleep(0)

    assert [one() for one in died] == [None, None]


@pytest.mark.usefixtures("no_collector")
async def test_result_is_dropped_after_its_visit() -> None:
    """The result of a split is freed once the state it led to is left."""
    died: list[weakref.ref[Any]] = []
    alive: list[bool] = []

    def makes() -> Tracked:
        value = Tracked()
        died.append(weakref.ref(value))
        return value

    def joined(result: SplitResult) -> S:
        alive.append(died[0]() is not None)
        return S.OTHER

    def later() -> S:
        alive.append(died[0]() is not None)
        return S.END

    await split_into([makes], ALL, joined).register(S.OTHER, later).orchestrate(S.SPLIT)

    assert alive == [True, False]
