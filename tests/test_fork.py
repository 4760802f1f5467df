"""Forks: a task returns `TaskResult.Split`, and each listed state starts a branch that runs through states."""

import asyncio
import contextlib
import contextvars
import enum
import gc
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal

import pytest

import cano.testing
from cano import (
    AttemptTimeoutError,
    ConfigurationError,
    InvalidTransitionError,
    JoinConfig,
    JoinError,
    JoinStrategy,
    JoinTimeoutError,
    Res,
    RetryExhaustedError,
    RunContext,
    SplitResult,
    TaskConfig,
    TaskResult,
    UnknownStateError,
    Workflow,
    WorkflowError,
)

STEP = 0.01
FOREVER = 3600.0

ALL, ANY = JoinStrategy.All, JoinStrategy.Any


class S(enum.Enum):
    FORK = enum.auto()
    LEFT = enum.auto()
    RIGHT = enum.auto()
    MIDDLE = enum.auto()
    INNER = enum.auto()
    JOINED = enum.auto()
    END = enum.auto()
    STOP = enum.auto()


class Oops(Exception):
    """What failing tasks raise."""


def to(state: S, delay: float | None = None, error: Exception | None = None) -> Callable[[], Any]:
    """A task that goes to a state, after a delay if one is given, or raises."""

    async def later() -> S:
        await asyncio.sleep(delay or 0)
        if error is not None:
            raise error
        return state

    return later


def into(*states: S) -> Callable[[], Any]:
    """A task that splits into these states."""

    def task() -> Any:
        return TaskResult.Split(states)

    return task


class Fork:
    """A workflow that forks from FORK and joins into JOINED, where it keeps the results; END and STOP are exits."""

    def __init__(self, *states: S, strategy: JoinStrategy = ALL, task: Any = None, **options: Any) -> None:
        self.results: list[SplitResult] = []
        self.workflow = (
            Workflow[S]()
            .register(S.FORK, task or into(*states), join=JoinConfig(strategy, S.JOINED, **options))
            .register(S.JOINED, self.joined)
            .add_exit_states([S.END, S.STOP])
        )

    def joined(self, result: SplitResult) -> S:
        self.results.append(result)
        return S.END

    def register(self, state: S, task: Any, **options: Any) -> "Fork":
        self.workflow.register(state, task, **options)
        return self

    async def run(self, **options: Any) -> SplitResult:
        await self.workflow.orchestrate(S.FORK, **options)
        return self.results[-1]

    async def error(self) -> JoinError:
        with pytest.raises(JoinError) as caught:
            await self.run()
        return caught.value


def shape(result: SplitResult | None) -> tuple[list[int], list[int], list[int]]:
    assert result is not None
    return [one.index for one in result.successes], [one.index for one in result.errors], result.cancelled


def now() -> float:
    return asyncio.get_running_loop().time()


# Where branches go


async def test_branches_run_through_states() -> None:
    """Each listed state starts a branch, which runs through registered states until it reaches the joined state."""
    log: list[S] = []

    def visits(state: S, following: S) -> Callable[[], S]:
        def task() -> S:
            log.append(state)
            return following

        return task

    fork = Fork(S.LEFT, S.RIGHT)
    fork.register(S.LEFT, visits(S.LEFT, S.MIDDLE)).register(S.MIDDLE, visits(S.MIDDLE, S.JOINED))
    fork.register(S.RIGHT, visits(S.RIGHT, S.JOINED))

    result = await fork.run()

    assert sorted(state.name for state in log) == ["LEFT", "MIDDLE", "RIGHT"]
    assert shape(result) == ([0, 1], [], [])


async def test_value_of_a_branch() -> None:
    """The value of a branch is the state it reached: the joined one, or an exit."""
    fork = Fork(S.LEFT, S.RIGHT, S.MIDDLE)
    fork.register(S.LEFT, to(S.JOINED)).register(S.RIGHT, to(S.STOP)).register(S.MIDDLE, to(S.END))

    result = await fork.run()

    assert result.values() == [S.JOINED, S.STOP, S.END]
    assert [one.name for one in result.successes] == ["LEFT", "RIGHT", "MIDDLE"]


async def test_joined_task_runs_once() -> None:
    """The joined state's task does not run in the branches that reach it, but once after the join."""
    fork = Fork(S.LEFT, S.RIGHT).register(S.LEFT, to(S.JOINED)).register(S.RIGHT, to(S.JOINED))

    await fork.run()

    assert len(fork.results) == 1


async def test_branch_that_starts_at_its_end() -> None:
    """A branch that starts in an exit or in the joined state has ended, without running a task."""
    result = await Fork(S.JOINED, S.END).run()

    assert result.values() == [S.JOINED, S.END]


async def test_same_state_twice() -> None:
    """A state listed twice starts two branches."""
    branches: list[int | None] = []

    async def task(context: RunContext) -> S:
        branches.append(context.branch)
        return S.JOINED

    result = await Fork(S.LEFT, S.LEFT).register(S.LEFT, task).run()

    assert sorted(one for one in branches if one is not None) == [0, 1]
    assert result.total_count == 2


async def test_branch_that_visits_a_state_twice() -> None:
    """A branch may loop; it counts its own visits."""
    visits: list[tuple[int | None, int]] = []

    def task(context: RunContext) -> S:
        visits.append((context.branch, context.visit))
        return S.LEFT if context.visit < 3 else S.JOINED

    await Fork(S.LEFT, S.LEFT).register(S.LEFT, task).run()

    assert sorted(visits, key=lambda one: (one[0] or 0, one[1])) == [
        (branch, visit) for branch in (0, 1) for visit in (1, 2, 3)
    ]


async def test_branch_that_never_waits_gives_way() -> None:
    """A branch that goes through thousands of states without waiting lets its siblings run in between."""
    steps = {0: 0, 1: 0}
    behind: list[int] = []

    def task(context: RunContext) -> S:
        branch = context.branch or 0
        steps[branch] += 1
        behind.append(abs(steps[0] - steps[1]))
        return S.LEFT if steps[branch] < 5_000 else S.JOINED

    await Fork(S.LEFT, S.LEFT).register(S.LEFT, task).run()

    assert steps == {0: 5_000, 1: 5_000}
    assert max(behind) < 2_000


async def test_empty_fork() -> None:
    """All joins a fork into no states at once."""
    result = await Fork().run()

    assert shape(result) == ([], [], [])


@pytest.mark.parametrize(
    "made", [lambda: iter([S.LEFT]), lambda: (S.LEFT,), lambda: {S.LEFT: 1}], ids=["iterator", "tuple", "dict"]
)
async def test_any_iterable_of_states(made: Callable[[], Any]) -> None:
    """The states of a fork may be any iterable."""
    fork = Fork(task=lambda: TaskResult.Split(made())).register(S.LEFT, to(S.JOINED))

    result = await fork.run()

    assert result.values() == [S.JOINED]


@pytest.mark.parametrize("value", [S.LEFT, TaskResult.Single(S.LEFT)], ids=["state", "Single"])
async def test_task_that_does_not_fork(value: Any) -> None:
    """A task that may fork may as well return one state, and nothing is joined then."""
    fork = Fork(task=lambda: value).register(S.LEFT, to(S.STOP))

    end = await fork.workflow.orchestrate(S.FORK)

    assert end is S.STOP
    assert fork.results == []


async def test_states_that_are_equal() -> None:
    """A listed state is found by equality, as everywhere."""
    workflow = Workflow[str]().add_exit_state("end")
    workflow.register("fork", lambda: TaskResult.Split(["AB".lower()]), join=JoinConfig(ALL, "end"))
    workflow.register("ab", lambda: "end")

    assert await workflow.orchestrate("fork") == "end"


async def test_fork_into_itself() -> None:
    """A branch may fork again from the same state; each fork joins its own branches."""
    depth: list[int] = []

    def task() -> Any:
        depth.append(len(depth))
        return TaskResult.Split([S.FORK]) if len(depth) < 5 else S.JOINED

    result = await Fork(task=task).run()

    assert depth == [0, 1, 2, 3, 4]
    assert result.values() == [S.JOINED]


async def test_fork_in_a_loop() -> None:
    """A fork may be entered again and again in one run."""
    rounds: list[list[S]] = []

    def joined(result: SplitResult) -> S:
        rounds.append(result.values())
        return S.FORK if len(rounds) < 3 else S.END

    workflow = Workflow[S]().register(S.FORK, into(S.LEFT), join=JoinConfig(ALL, S.JOINED)).add_exit_state(S.END)
    workflow.register(S.LEFT, to(S.JOINED)).register(S.JOINED, joined)

    await workflow.orchestrate(S.FORK)

    assert rounds == [[S.JOINED]] * 3


# What is refused


async def test_split_without_a_join() -> None:
    """A task that splits where no join was registered fails, and the error says what to register."""
    workflow = Workflow[S]().register(S.FORK, into(S.LEFT)).register(S.LEFT, to(S.END)).add_exit_state(S.END)

    with pytest.raises(WorkflowError, match=r"register_split\(\), or give register\(\) a join=") as caught:
        await workflow.orchestrate(S.FORK)

    # WF-032, WF-033
    assert (caught.value.state, caught.value.attempt) == (S.FORK, 1)


async def test_split_without_a_join_is_not_retried() -> None:
    """A split that cannot be joined is a mistake in the definition: no retry repeats it."""
    calls: list[None] = []

    def task() -> Any:
        calls.append(None)
        return TaskResult.Split([S.END])

    workflow = Workflow[S]().add_exit_state(S.END)
    workflow.register(S.FORK, task, config=TaskConfig().with_fixed_retry(3, 0))

    with pytest.raises(WorkflowError):
        await workflow.orchestrate(S.FORK)

    assert len(calls) == 1


@pytest.mark.parametrize("state", [S.RIGHT, 42, None, []], ids=repr)
async def test_fork_into_an_unknown_state(state: Any) -> None:
    """A fork that lists a state which does not exist fails as a whole: none of its branches runs."""
    ran: list[None] = []
    fork = Fork(task=lambda: TaskResult.Split([S.LEFT, state])).register(S.LEFT, lambda: ran.append(None))

    with pytest.raises(WorkflowError) as caught:
        await fork.run()

    assert isinstance(caught.value, UnknownStateError | InvalidTransitionError)
    assert caught.value.state is S.FORK
    assert ran == []


@pytest.mark.parametrize(
    "strategy", [ANY, JoinStrategy.Quorum(1), JoinStrategy.Percentage(1), JoinStrategy.PartialResults(1)], ids=repr
)
async def test_empty_fork_refused(strategy: JoinStrategy) -> None:
    """Every strategy but All refuses a fork into no states on entry."""
    with pytest.raises(ConfigurationError, match="at least one branch") as caught:
        await Fork(strategy=strategy).run()

    assert caught.value.state is S.FORK


async def test_fork_with_too_few_branches() -> None:
    """A strategy that needs more branches than the fork has is refused on entry."""
    fork = Fork(S.LEFT, S.LEFT, strategy=JoinStrategy.Quorum(3)).register(S.LEFT, to(S.JOINED))

    with pytest.raises(ConfigurationError, match="the split has 2 branches"):
        await fork.run()


@pytest.mark.parametrize(
    ("join", "text"),
    [
        pytest.param(JoinConfig(ALL, S.MIDDLE), "MIDDLE", id="unknown joined state"),
        pytest.param(JoinConfig(JoinStrategy.PartialTimeout, S.END), "needs a timeout", id="PartialTimeout"),
    ],
)
def test_validate_fork(join: JoinConfig[S], text: str) -> None:
    """What is wrong with the join of a fork, whatever its branches, is found at validation."""
    workflow = Workflow[S]().register(S.FORK, into(S.END), join=join).add_exit_state(S.END)

    with pytest.raises(ConfigurationError) as caught:
        workflow.validate()

    assert text in str(caught.value)


@pytest.mark.parametrize("join", [ALL, S.END, True], ids=repr)
def test_register_with_something_else_as_join(join: Any) -> None:
    """A join is a JoinConfig and nothing less."""
    workflow = Workflow[S]()

    with pytest.raises(ConfigurationError, match="must be a JoinConfig"):
        workflow.register(S.FORK, into(S.END), join=join)


@pytest.mark.parametrize("states", [5, None], ids=repr)
def test_split_of_no_list(states: Any) -> None:
    """A split is made of an iterable of states."""
    with pytest.raises(ConfigurationError, match="iterable of states"):
        TaskResult.Split(states)


def test_task_results_read_as_written() -> None:
    """The texts of task results are how they are written."""
    assert repr(TaskResult.Split([1, 2])) == "TaskResult.Split([1, 2])"
    assert repr(TaskResult.Single(1)) == "TaskResult.Single(1)"


async def test_branch_into_a_state_that_does_not_exist() -> None:
    """A branch that leaves for a state which does not exist fails alone."""
    fork = Fork(S.LEFT, S.RIGHT, strategy=ANY).register(S.LEFT, to(S.MIDDLE)).register(S.RIGHT, to(S.JOINED, STEP))

    result = await fork.run()

    assert shape(result) == ([1], [0], [])
    assert isinstance(result.errors[0].error, UnknownStateError)
    assert result.errors[0].error.state is S.LEFT


async def test_branch_that_returns_what_it_did_not_declare() -> None:
    """In a branch, too, a task may only return the states that its annotation declares."""

    async def task() -> Literal[S.JOINED]:
        return S.STOP  # type: ignore[return-value]

    error = await Fork(S.LEFT).register(S.LEFT, task).error()

    (failure,) = error.exceptions
    assert isinstance(failure, InvalidTransitionError)
    assert "declares only JOINED" in str(failure)


# Joining


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        pytest.param(ANY, ([1], [0], [2]), id="Any"),
        pytest.param(JoinStrategy.Quorum(1), ([1], [0], [2]), id="Quorum"),
        pytest.param(JoinStrategy.Percentage(0.1), ([1], [0], [2]), id="Percentage"),
        pytest.param(JoinStrategy.PartialResults(1), ([], [0], [1, 2]), id="PartialResults"),
        pytest.param(JoinStrategy.PartialTimeout, ([1], [0], [2]), id="PartialTimeout"),
    ],
)
async def test_strategies(strategy: JoinStrategy, expected: Any) -> None:
    """Join strategies apply to the branches of a fork as to those of a split."""
    fork = Fork(S.LEFT, S.RIGHT, S.MIDDLE, strategy=strategy, timeout=20 * STEP)
    fork.register(S.LEFT, to(S.JOINED, STEP, Oops())).register(S.RIGHT, to(S.JOINED, 10 * STEP))
    fork.register(S.MIDDLE, to(S.JOINED, FOREVER))

    result = await fork.run()

    assert shape(result) == expected


async def test_failed_join() -> None:
    """A failed fork raises JoinError with each branch's own exception, named by state and branch."""
    failure = Oops()
    fork = Fork(S.LEFT, S.RIGHT).register(S.LEFT, to(S.MIDDLE)).register(S.RIGHT, to(S.JOINED))
    fork.register(S.MIDDLE, to(S.JOINED, STEP, failure))

    error = await fork.error()

    assert list(error.exceptions) == [failure]
    context = failure.__cano__  # type: ignore[attr-defined]
    assert (context.state, context.branch, context.path[-2:]) == (S.MIDDLE, 0, (S.LEFT, S.MIDDLE))
    assert (error.state, error.path) == (S.FORK, (S.FORK,))
    assert shape(error.result) == ([1], [0], [])


async def test_timeout() -> None:
    """A fork that is not decided in time raises JoinTimeoutError."""
    fork = Fork(S.LEFT, timeout=STEP).register(S.LEFT, to(S.JOINED, FOREVER))

    error = await fork.error()

    assert isinstance(error, JoinTimeoutError)
    assert shape(error.result) == ([], [], [0])


async def test_bulkhead() -> None:
    """A bulkhead bounds the branches that are alive, each of them with all its states."""
    alive, most = 0, 0

    async def enters() -> S:
        nonlocal alive, most
        alive += 1
        most = max(most, alive)
        await asyncio.sleep(STEP)
        return S.MIDDLE

    async def leaves() -> S:
        nonlocal alive
        await asyncio.sleep(STEP)
        alive -= 1
        return S.JOINED

    fork = Fork(*[S.LEFT] * 7, bulkhead=2).register(S.LEFT, enters).register(S.MIDDLE, leaves)

    result = await fork.run()

    assert most == 2
    assert len(result.successes) == 7


async def test_losers_are_awaited() -> None:
    """The joined task starts after every loser was cancelled, in whatever state it was, and has cleaned up."""
    log: list[str] = []

    async def loser() -> S:
        try:
            await asyncio.sleep(FOREVER)
        finally:
            await asyncio.sleep(STEP)
            log.append("cleaned")
        return S.JOINED

    def joined() -> S:
        log.append("joined")
        return S.END

    workflow = (
        Workflow[S]().register(S.FORK, into(S.LEFT, S.RIGHT), join=JoinConfig(ANY, S.JOINED)).add_exit_state(S.END)
    )
    workflow.register(S.LEFT, to(S.MIDDLE)).register(S.MIDDLE, loser)
    workflow.register(S.RIGHT, to(S.JOINED, STEP)).register(S.JOINED, joined)

    await workflow.orchestrate(S.FORK)

    # B27
    assert log == ["cleaned", "joined"]


async def test_cancelled_run() -> None:
    """Cancelling the run cancels every branch in the state it is in, and awaits it."""
    log: list[S] = []

    async def task(context: RunContext) -> S:
        try:
            await asyncio.sleep(FOREVER)
        finally:
            await asyncio.sleep(STEP)
            log.append(context.state)
        return S.JOINED

    fork = Fork(S.LEFT, S.RIGHT).register(S.LEFT, to(S.MIDDLE)).register(S.MIDDLE, task).register(S.RIGHT, task)
    run = asyncio.create_task(fork.workflow.orchestrate(S.FORK))
    await asyncio.sleep(STEP)

    run.cancel()

    with pytest.raises(asyncio.CancelledError):
        await run
    assert sorted(state.name for state in log) == ["MIDDLE", "RIGHT"]


# Tasks in branches


async def test_retries_in_a_branch() -> None:
    """A state that a branch runs through is retried by its own configuration."""
    attempts: list[int] = []

    async def task(context: RunContext) -> S:
        attempts.append(context.attempt)
        if context.attempt < 3:
            raise Oops
        return S.JOINED

    fork = Fork(S.LEFT).register(S.LEFT, to(S.MIDDLE))
    fork.register(S.MIDDLE, task, config=TaskConfig().with_fixed_retry(2, STEP))

    await fork.run()

    assert attempts == [1, 2, 3]


async def test_retries_in_a_branch_exhausted() -> None:
    """A branch whose retries are used up fails with RetryExhaustedError that names state, attempt and branch."""
    fork = Fork(S.LEFT).register(S.LEFT, to(S.JOINED, 0, Oops()), config=TaskConfig().with_fixed_retry(1, 0))

    error = await fork.error()

    (failure,) = error.exceptions
    assert isinstance(failure, RetryExhaustedError)
    assert (failure.state, failure.attempt) == (S.LEFT, 2)
    assert "branch=0 attempt=2/2" in failure.__notes__[0]


async def test_attempt_timeout_in_a_branch() -> None:
    """An attempt timeout of a state cancels that attempt only, not the branch's siblings."""
    fork = Fork(S.LEFT, S.RIGHT, strategy=ANY).register(S.RIGHT, to(S.JOINED, 5 * STEP))
    fork.register(S.LEFT, to(S.JOINED, FOREVER), config=TaskConfig().with_attempt_timeout(STEP))

    result = await fork.run()

    assert shape(result) == ([1], [0], [])
    assert isinstance(result.errors[0].error, AttemptTimeoutError)


async def test_forking_task_is_retried() -> None:
    """The task that forks has retries of its own; the fork happens when it returns."""
    attempts: list[int] = []

    def task(context: RunContext) -> Any:
        attempts.append(context.attempt)
        if context.attempt < 3:
            raise Oops
        return TaskResult.Split([S.LEFT])

    workflow = Workflow[S]().add_exit_state(S.END).register(S.LEFT, to(S.END))
    workflow.register(S.FORK, task, config=TaskConfig().with_fixed_retry(2, 0), join=JoinConfig(ALL, S.END))

    await workflow.orchestrate(S.FORK)

    assert attempts == [1, 2, 3]


async def test_failed_branches_do_not_repeat_the_fork() -> None:
    """The retries of the task that forks do not cover its branches: a failed join leaves the run."""
    attempts: list[None] = []

    def task() -> Any:
        attempts.append(None)
        return TaskResult.Split([S.LEFT])

    workflow = Workflow[S]().add_exit_state(S.END).register(S.LEFT, to(S.END, 0, Oops()))
    workflow.register(S.FORK, task, config=TaskConfig().with_fixed_retry(2, 0), join=JoinConfig(ALL, S.END))

    with pytest.raises(JoinError):
        await workflow.orchestrate(S.FORK)

    assert len(attempts) == 1


@pytest.mark.virtual
async def test_attempt_timeout_does_not_cover_the_branches() -> None:
    """The attempt timeout of the task that forks ends with its return; branches may take longer."""
    workflow = Workflow[S]().add_exit_state(S.END).register(S.LEFT, to(S.END, 10))
    config = TaskConfig().with_attempt_timeout(1)
    workflow.register(S.FORK, into(S.LEFT), config=config, join=JoinConfig(ALL, S.END))

    await workflow.orchestrate(S.FORK)

    assert now() == 10


async def test_resources_in_branches() -> None:
    """Tasks in branches are filled in from the run's resources."""
    seen: list[int] = []

    def task(number: Annotated[int, Res("number")]) -> S:
        seen.append(number)
        return S.JOINED

    await Fork(S.LEFT, S.LEFT).register(S.LEFT, task).run(resources={"number": 7})

    assert seen == [7, 7]


async def test_context_of_branches() -> None:
    """A branch has one context for all its states, apart from its siblings' and the run's."""
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="run")
    seen: list[str] = []

    def first(context: RunContext) -> S:
        seen.append(variable.get())
        variable.set(f"branch {context.branch}")
        return S.MIDDLE

    def second() -> S:
        seen.append(variable.get())
        return S.JOINED

    await Fork(S.LEFT, S.LEFT).register(S.LEFT, first).register(S.MIDDLE, second).run()

    assert sorted(seen) == ["branch 0", "branch 1", "run", "run"]
    assert variable.get() == "run"


async def test_idempotency_keys() -> None:
    """Keys differ by branch, state and visit, and stay the same over the attempts of one visit."""
    keys: list[tuple[int, str]] = []

    def task(context: RunContext) -> S:
        keys.append((context.attempt, context.idempotency_key))
        if context.attempt == 1:
            raise Oops
        return S.LEFT if context.visit == 1 else S.JOINED

    fork = Fork(S.LEFT, S.LEFT, S.RIGHT)
    fork.register(S.LEFT, task, config=TaskConfig().with_fixed_retry(1, 0))
    fork.register(S.RIGHT, task, config=TaskConfig().with_fixed_retry(1, 0))

    await fork.run()

    first = sorted(key for attempt, key in keys if attempt == 1)
    second = sorted(key for attempt, key in keys if attempt == 2)
    assert first == second
    assert len(set(first)) == len(first) == 7  # two branches of 2 visits, and one that comes from RIGHT


async def test_idempotency_key_of_a_given_id() -> None:
    """With a workflow id the keys of branches are the same in every run of that id."""
    keys: list[str] = []

    def task(context: RunContext) -> S:
        keys.append(context.idempotency_key)
        return S.JOINED

    for _ in range(2):
        await Fork(S.LEFT, S.LEFT).register(S.LEFT, task).run(workflow_id="order-7")

    assert sorted(keys[:2]) == sorted(keys[2:])
    assert len(set(keys)) == 2


async def test_path_of_the_run() -> None:
    """The path of the run has the fork and the joined state, not the states of its branches."""
    fork = Fork(S.LEFT, S.RIGHT).register(S.LEFT, to(S.JOINED)).register(S.RIGHT, to(S.STOP))
    run = fork.workflow.start(S.FORK)

    await run

    assert run.path == [S.FORK, S.JOINED, S.END]


# Splits in forks, forks in splits


def nested(log: list[Any]) -> Fork:
    """FORK splits into LEFT and RIGHT; LEFT forks again, into two INNER, and joins into MIDDLE, which goes to JOINED."""

    def inner(context: RunContext) -> S:
        log.append(("inner", context.branch))
        return S.MIDDLE

    def middle(result: SplitResult | None, context: RunContext) -> S:
        log.append(("middle", context.branch, None if result is None else result.values()))
        return S.JOINED

    fork = Fork(S.LEFT, S.RIGHT).register(S.LEFT, into(S.INNER, S.INNER), join=JoinConfig(ALL, S.MIDDLE))
    return fork.register(S.INNER, inner).register(S.MIDDLE, middle).register(S.RIGHT, to(S.JOINED))


async def test_fork_in_a_branch() -> None:
    """A branch may fork; its joined state gets the result of the inner fork, the outer one that of the outer fork."""
    log: list[Any] = []

    result = await nested(log).run()

    assert log == [("inner", 0), ("inner", 1), ("middle", 0, [S.MIDDLE, S.MIDDLE])]
    assert result.values() == [S.JOINED, S.JOINED]


async def test_fork_in_a_branch_that_joins_where_the_outer_one_does() -> None:
    """An inner fork that joins into the outer joined state ends its branch there."""
    fork = Fork(S.LEFT, S.RIGHT).register(S.LEFT, into(S.INNER, S.INNER), join=JoinConfig(ALL, S.JOINED))
    fork.register(S.INNER, to(S.JOINED)).register(S.RIGHT, to(S.JOINED))

    result = await fork.run()

    assert result.values() == [S.JOINED, S.JOINED]
    assert len(fork.results) == 1


async def test_split_in_a_branch() -> None:
    """A branch may run through a state with a split, and goes on where that joins."""
    seen: list[list[Any]] = []

    def middle(result: SplitResult) -> S:
        seen.append(result.values())
        return S.JOINED

    fork = Fork(S.LEFT, S.LEFT).register(S.MIDDLE, middle)
    fork.workflow.register_split(S.LEFT, [lambda: 1, lambda: 2], JoinConfig(ALL, S.MIDDLE))

    result = await fork.run()

    assert seen == [[1, 2], [1, 2]]
    assert result.values() == [S.JOINED, S.JOINED]


async def test_run_time_split_in_a_branch() -> None:
    """A branch may run through a state whose branches are made when it is entered."""
    fork = Fork(S.LEFT)
    fork.workflow.register_split(S.LEFT, lambda: [lambda: 1] * 3, JoinConfig(ALL, S.JOINED))

    result = await fork.run()

    assert result.values() == [S.JOINED]


async def test_failure_of_a_nested_fork() -> None:
    """An inner fork that fails is the failure of its branch: groups nest as the forks do."""
    fork = Fork(S.LEFT, S.RIGHT).register(S.LEFT, into(S.INNER, S.END), join=JoinConfig(ALL, S.JOINED))
    fork.register(S.INNER, to(S.JOINED, 0, Oops())).register(S.RIGHT, to(S.JOINED))

    error = await fork.error()

    (inner,) = error.exceptions
    assert isinstance(inner, JoinError)
    assert (inner.state, inner.__notes__) == (S.LEFT, ["state=LEFT branch=0 attempt=1/1 path=LEFT"])
    assert [type(one) for one in inner.exceptions] == [Oops]
    assert "state=INNER" in inner.exceptions[0].__notes__[0]


async def test_loser_with_a_nested_fork() -> None:
    """A loser that has forked is cancelled with all of its branches, and everything is awaited."""
    log: list[str] = []

    async def inner() -> S:
        try:
            await asyncio.sleep(FOREVER)
        finally:
            await asyncio.sleep(STEP)
            log.append("cleaned")
        return S.JOINED

    fork = Fork(S.LEFT, S.RIGHT, strategy=ANY).register(S.RIGHT, to(S.JOINED, STEP)).register(S.INNER, inner)
    fork.register(S.LEFT, into(S.INNER, S.INNER), join=JoinConfig(ALL, S.JOINED))

    result = await fork.run()

    assert shape(result) == ([1], [], [0])
    assert log == ["cleaned", "cleaned"]


async def test_cancel_message_reaches_the_innermost_branches() -> None:
    """The message of a cancellation passes through nested forks."""
    messages: list[object] = []

    async def inner() -> S:
        try:
            await asyncio.sleep(FOREVER)
        except asyncio.CancelledError as error:
            messages.extend(error.args)
            raise
        return S.JOINED

    fork = (
        Fork(S.LEFT).register(S.LEFT, into(S.INNER, S.INNER), join=JoinConfig(ALL, S.JOINED)).register(S.INNER, inner)
    )
    run = asyncio.create_task(fork.workflow.orchestrate(S.FORK))
    await asyncio.sleep(STEP)

    run.cancel("enough")

    with pytest.raises(asyncio.CancelledError, match="enough"):
        await run
    assert messages == ["enough", "enough"]


async def test_base_exception_of_a_nested_branch() -> None:
    """A BaseException leaves nested forks and the run as it is, after every branch has ended."""
    ended: list[None] = []

    class Fatal(BaseException):
        pass

    async def fails() -> S:
        await asyncio.sleep(STEP)
        raise Fatal

    async def waits() -> S:
        try:
            await asyncio.sleep(FOREVER)
        finally:
            ended.append(None)
        return S.JOINED

    fork = Fork(S.LEFT, S.RIGHT).register(S.LEFT, into(S.INNER, S.RIGHT), join=JoinConfig(ANY, S.JOINED))
    fork.register(S.INNER, fails).register(S.RIGHT, waits)

    with pytest.raises(Fatal):
        await fork.run()

    assert len(ended) == 2


async def test_idempotency_keys_of_nested_branches() -> None:
    """Nested branches that have the same index, state and visit have different keys."""
    keys: list[str] = []

    def inner(context: RunContext) -> S:
        keys.append(context.idempotency_key)
        return S.JOINED

    fork = Fork(S.LEFT, S.LEFT).register(S.LEFT, into(S.INNER, S.INNER), join=JoinConfig(ALL, S.JOINED))

    await fork.register(S.INNER, inner).run()

    assert len(set(keys)) == len(keys) == 4


def test_deep_forks() -> None:
    """Forks that nest thousands deep end well or with an exception, not with a crash."""
    depth = 5_000
    count = 0

    def task() -> Any:
        nonlocal count
        count += 1
        return TaskResult.Split([S.FORK]) if count < depth else S.JOINED

    async def main() -> None:
        with contextlib.suppress(RecursionError, JoinError):
            await Fork(task=task).run()

    cano.testing.run(main())

    assert count > sys.getrecursionlimit() / 10


async def test_wide_fork() -> None:
    """A thousand branches fork into three each."""
    fork = Fork(*[S.LEFT] * 1_000).register(S.LEFT, into(*[S.INNER] * 3), join=JoinConfig(ALL, S.JOINED))

    result = await fork.register(S.INNER, to(S.JOINED, STEP)).run()

    assert len(result.successes) == 1_000


# What is left behind


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


class Tracked:
    """Something whose end can be seen."""


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("strategy", [ALL, ANY], ids=repr)
async def test_nothing_is_left(strategy: JoinStrategy) -> None:
    """After a fork, also a failed one, reference counts alone free what it used."""
    died: list[weakref.ref[Any]] = []

    async def waits() -> S:
        value = Tracked()
        died.append(weakref.ref(value))
        await asyncio.sleep(2 * STEP)
        return S.JOINED

    async def fails() -> S:
        error = Oops()
        died.append(weakref.ref(error))
        try:
            raise error
        finally:
            del error

    async def use() -> None:
        resource = Tracked()
        died.append(weakref.ref(resource))
        fork = Fork(S.LEFT, S.RIGHT, S.MIDDLE, strategy=strategy).register(S.LEFT, fails).register(S.RIGHT, waits)
        fork.register(S.MIDDLE, to(S.JOINED, STEP))
        with contextlib.suppress(JoinError):
            await fork.workflow.orchestrate(S.FORK, resources={"resource": resource})
        fork.results.clear()

    await use()
    await asyncio.sleep(0)

    assert len(died) == 3
    assert [one() for one in died] == [None] * 3
