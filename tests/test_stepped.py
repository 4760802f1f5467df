"""Stepped tasks: a cursor from step to step, and retries that hold for one step each."""

import asyncio
import enum
import gc
import weakref
from typing import Annotated, Literal

import pytest
from hypothesis import given, strategies as st

from cano import (
    AttemptTimeoutError,
    ConfigurationError,
    Done,
    InvalidTransitionError,
    JoinConfig,
    JoinStrategy,
    More,
    NonRetryable,
    Res,
    RetryExhaustedError,
    RunContext,
    SplitResult,
    SteppedTask,
    TaskConfig,
    TaskResult,
    UnknownStateError,
    Workflow,
    WorkflowCancelledError,
    WorkflowError,
    WorkflowTimeoutError,
    testing,
)


class S(enum.Enum):
    START = 1
    NEXT = 2
    DONE = 3


class Oops(Exception):
    pass


class Counting(SteppedTask[S]):
    """Counts from nothing to a target, and keeps the cursors it got; some of its calls fail."""

    def __init__(self, target, *, fails=(), state=S.DONE):
        self.target = target
        self.fails = list(fails)
        self.state = state
        self.cursors = []

    async def step(self, cursor):
        self.cursors.append(cursor)
        if cursor in self.fails:
            self.fails.remove(cursor)
            raise Oops(cursor)
        count = (cursor or 0) + 1
        return Done(self.state) if count == self.target else More(count)


def workflow_of(task, resources=None, **options):
    return Workflow(resources).register_stepped(S.START, task, **options).add_exit_state(S.DONE)


async def run(task, **options):
    return await workflow_of(task, **options).orchestrate(S.START)


async def ticks(count=5):
    for _ in range(count):
        await asyncio.sleep(0)


# From step to step


@pytest.mark.parametrize("target", [1, 4, 5])
async def test_cursor_goes_from_step_to_step(target):
    """The first step gets None, each other one the cursor of the step before, until one is done."""
    task = Counting(target)

    end = await run(task)

    # ST-001..003
    assert end is S.DONE
    assert task.cursors == [None, *range(1, target)]


async def test_plain_step_and_any_cursor():
    """A step may be plain, on an object without a base; a cursor is passed on as it is, also one that is empty or None."""
    cursors = [[], {}, None, 0, More(1)]
    seen = []

    class Task:
        def step(self, cursor):
            seen.append(cursor)
            return More(cursors[len(seen) - 1]) if len(seen) <= len(cursors) else Done(S.DONE)

    await run(Task())

    assert all(got is given for got, given in zip(seen, [None, *cursors], strict=True))


async def test_each_visit_begins_from_nothing():
    """A state that is entered again begins without a cursor."""
    task = Counting(2, state=S.NEXT)
    visits = iter([S.START, S.DONE])

    await workflow_of(task).register(S.NEXT, lambda: next(visits)).orchestrate(S.START)

    assert task.cursors == [None, 1, None, 1]


async def test_two_runs_at_once_have_their_own_cursors():
    """Runs of one workflow do not share cursors."""
    seen = []

    class Task:
        async def step(self, cursor, ctx: RunContext):
            seen.append((ctx.workflow_id, cursor))
            await asyncio.sleep(0)
            return More((cursor or 0) + 1) if cursor != 3 else Done(S.DONE)

    workflow = workflow_of(Task())
    await asyncio.gather(*(workflow.orchestrate(S.START, workflow_id=name) for name in "ab"))

    for name in "ab":
        assert [cursor for run, cursor in seen if run == name] == [None, 1, 2, 3]


async def test_arguments_of_a_step():
    """A step asks for its arguments after the cursor; the context counts the attempts of each step."""
    seen = []

    class Task:
        config = TaskConfig().with_fixed_retry(1, 0)

        def step(self, cursor, /, limit: Annotated[int, Res("limit")], *, ctx: RunContext):
            seen.append((cursor, limit, ctx.state, ctx.attempt, ctx.visit))
            if cursor == 1 and ctx.attempt == 1:
                raise Oops
            return More((cursor or 0) + 1) if cursor != 2 else Done(S.DONE)

    await workflow_of(Task(), {"limit": 9}).orchestrate(S.START)

    assert seen == [(None, 9, S.START, 1, 1), (1, 9, S.START, 1, 1), (1, 9, S.START, 2, 1), (2, 9, S.START, 1, 1)]


async def test_step_after_a_split():
    """Every step in the state that a split joins into may take the result."""
    seen = []

    class Task:
        def step(self, cursor, result: SplitResult):
            seen.append(result.values())
            return More(1) if cursor is None else Done(S.DONE)

    workflow = workflow_of(Task()).register_split("split", [lambda: 7], JoinConfig(JoinStrategy.All, S.START))
    await workflow.orchestrate("split")

    assert seen == [[7], [7]]


async def test_steps_inside_a_fork():
    """A stepped task may run in a branch's own states."""
    tasks = [Counting(3), Counting(4)]
    join = JoinConfig(JoinStrategy.All, S.DONE)
    workflow = Workflow().register(S.START, lambda: TaskResult.Split(["a", "b"]), join=join).add_exit_state(S.DONE)
    for state, task in zip("ab", tasks, strict=True):
        workflow.register_stepped(state, task)

    await workflow.orchestrate(S.START)

    assert [task.cursors for task in tasks] == [[None, 1, 2], [None, 1, 2, 3]]


async def test_steps_that_never_suspend_give_others_a_turn():
    """Many steps that never wait give the event loop a turn once per 1,024."""
    turns = 0

    async def others():
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    other = asyncio.create_task(others())

    class Task:
        def step(self, cursor):
            return More((cursor or 0) + 1) if cursor != 10_000 else Done(S.DONE)

    await run(Task())

    other.cancel()
    await asyncio.wait([other])
    assert turns >= 9


# Retries and limits


async def test_retry_has_the_same_cursor():
    """A step that fails is tried again with the same cursor; every step has the whole budget of retries."""
    task = Counting(6, fails=[3, 3, 4, 4])

    await run(task, config=TaskConfig().with_fixed_retry(2, 0))

    assert task.cursors == [None, 1, 2, 3, 3, 3, 4, 4, 4, 5]  # ST-007, D19


@given(failures=st.lists(st.integers(0, 3), min_size=1, max_size=8), retries=st.integers(0, 3))
def test_retries_of_steps_follow_the_model(failures, retries):
    """Step k fails failures[k] times: it is called so many times and once more, unless its retries do not suffice."""
    expected = []
    for cursor, count in enumerate(failures):
        expected += [cursor or None] * (min(count, retries) + 1)
        if count > retries:
            break
    fails = [cursor or None for cursor, count in enumerate(failures) for _ in range(count)]
    task = Counting(len(failures), fails=fails)
    config = TaskConfig().with_fixed_retry(retries, 0)

    try:
        testing.run(workflow_of(task, config=config).orchestrate(S.START))
        is_done = True
    except (Oops, RetryExhaustedError):
        is_done = False

    assert task.cursors == expected
    assert is_done == all(count <= retries for count in failures)


async def test_step_error_leaves_the_run():
    """Without retries the error of a step leaves as it is."""
    task = Counting(5, fails=[2])

    with pytest.raises(Oops) as caught:
        await run(task)

    # ST-011, ST-012
    assert caught.value.args == (2,)
    assert caught.value.__notes__ == ["state=START task=Counting attempt=1/1 path=START"]
    assert task.cursors == [None, 1, 2]


async def test_step_that_fails_in_each_attempt():
    """A step whose retries do not suffice raises RetryExhaustedError, with its attempts."""
    task = Counting(5, fails=[2] * 3)
    task.config = TaskConfig().with_fixed_retry(2, 0)

    with pytest.raises(RetryExhaustedError) as caught:
        await run(task)

    # ST-012
    assert caught.value.attempts == 3
    assert caught.value.attempt == 3
    assert isinstance(caught.value.__cause__, Oops)


async def test_step_that_is_not_worth_a_retry():
    """What is not retried in a task is not retried in a step."""
    calls = []

    class Task:
        config = TaskConfig().with_fixed_retry(5, 0)

        def step(self, cursor):
            calls.append(cursor)
            raise NonRetryable

    with pytest.raises(NonRetryable):
        await run(Task())

    assert calls == [None]


@pytest.mark.virtual
async def test_attempt_timeout_bounds_one_step():
    """The attempt timeout is each step's own: many steps may take longer together, one may not."""
    durations = [0.9, 0.9, 0.9, 5, 0.9]
    calls = []

    class Task:
        async def step(self, cursor):
            calls.append(cursor)
            await asyncio.sleep(durations[len(calls) - 1])
            return More(len(calls)) if len(calls) < len(durations) else Done(S.DONE)

    await run(Task(), config=TaskConfig().with_fixed_retry(1, 0).with_attempt_timeout(1))
    assert calls == [None, 1, 2, 3, 3]  # ST-013: ours is per step

    calls.clear()
    with pytest.raises(AttemptTimeoutError):
        await run(Task(), config=TaskConfig(attempt_timeout=1))
    assert calls == [None, 1, 2, 3]


@pytest.mark.virtual
async def test_run_timeout_ends_between_steps():
    """The run's budget is looked at before each step, and ends a step that waits."""

    class Task:
        async def step(self, _cursor):
            await asyncio.sleep(1)
            return More(None)

    with pytest.raises(WorkflowTimeoutError) as caught:
        await workflow_of(Task()).with_timeout(5.5).orchestrate(S.START)

    assert caught.value.elapsed == 5.5


async def test_cancel_in_a_step():
    """A cancel reaches the step where it waits; no further step begins, whatever retries there are."""
    cursors = []

    class Task:
        config = TaskConfig().with_fixed_retry(5, 0)

        async def step(self, cursor):
            cursors.append(cursor)
            await asyncio.sleep(0 if cursor is None else 3600)
            return More(1)

    handle = workflow_of(Task()).start(S.START)
    await ticks()

    handle.cancel()

    with pytest.raises(WorkflowCancelledError):
        await handle
    assert cursors == [None, 1]  # CN-017


PanicException = type("PanicException", (BaseException,), {"__module__": "pyo3_runtime"})


async def test_panic_in_a_step():
    """A panic in a step becomes a TaskExecutionError, and is not retried."""
    calls = []

    class Task:
        config = TaskConfig().with_fixed_retry(5, 0)

        def step(self, cursor):
            calls.append(cursor)
            raise PanicException("boom")

    with pytest.raises(Exception, match="panic: boom") as caught:
        await run(Task())

    # PAN-006
    assert type(caught.value).__name__ == "TaskExecutionError"
    assert calls == [None]


async def test_cursor_lives_no_longer_than_needed():
    """A cursor is let go when the next step has returned its own, and the last one with the visit."""

    class Cursor:
        pass

    alive, most = weakref.WeakSet(), 0

    class Task:
        def step(self, _cursor, steps: Annotated[list, Res("steps")]):
            nonlocal most
            most = max(most, len(alive))
            if not steps:
                return Done(S.DONE)
            made = Cursor()
            alive.add(made)
            return More(steps.pop() and made)

    await workflow_of(Task(), {"steps": [1] * 10}).orchestrate(S.START)

    assert (most, len(alive)) == (1, 0)


# What it returns


@pytest.mark.parametrize("value", [S.DONE, None, 5, TaskResult.Single(S.DONE), More, Done], ids=repr)
async def test_step_that_returns_something_else(value):
    """What is neither More nor Done is refused, naming state, task and type; it is never tried again."""
    calls = []

    class Task:
        name = "count"
        config = TaskConfig().with_fixed_retry(5, 0)

        def step(self, cursor):
            calls.append(cursor)
            return value

    with pytest.raises(InvalidTransitionError) as caught:
        await run(Task())

    text = f"task count in state START returned a value of type {type(value).__qualname__}; "
    assert str(caught.value) == text + "a step returns More(cursor) or Done(state)"
    assert calls == [None]


async def test_task_that_is_not_stepped_has_no_more():
    """More out of a plain task is no state."""
    with pytest.raises(InvalidTransitionError, match="value of type More"):
        await Workflow().register(S.START, lambda: More(1)).add_exit_state(S.DONE).orchestrate(S.START)


@pytest.mark.parametrize(
    ("state", "error"),
    [(S.NEXT, UnknownStateError), (5, InvalidTransitionError), ([], InvalidTransitionError)],
    ids=repr,
)
async def test_done_with_what_is_no_state(state, error):
    """Done leads to a state of the workflow like any task."""
    with pytest.raises(error):
        await run(Counting(2, state=state))


async def test_done_with_a_single_result():
    """Done may hold a TaskResult.Single."""
    assert await run(Counting(2, state=TaskResult.Single(S.DONE))) is S.DONE


async def test_step_cannot_split():
    """A split out of a stepped task is refused, with the reason."""
    with pytest.raises(WorkflowError, match="a stepped task cannot split"):
        await run(Counting(2, state=TaskResult.Split([S.DONE])))  # ST-010


def test_annotation_of_step():
    """`Literal` states in Done are known to `validate()`; More adds none."""

    class Task:
        def step(self, cursor: int | None) -> More[int] | Done[Literal["gone"]]:
            raise NotImplementedError

    with pytest.raises(ConfigurationError, match="state start leads to gone"):
        Workflow().register_stepped("start", Task()).add_exit_state("done").validate()


def test_signature_is_read_once_per_function(monkeypatch):
    """A second object of a class is registered without looking at its signature again, and nothing is kept alive."""
    first, second = Counting(2), Counting(3)
    workflow_of(first)

    monkeypatch.setattr("inspect.signature", None)
    workflow = workflow_of(second)

    assert testing.run(workflow.orchestrate(S.START)) is S.DONE
    reference = weakref.ref(first)
    del first
    gc.collect()
    assert reference() is None
