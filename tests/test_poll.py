"""Poll tasks: again and again until ready, errors that are got over, and what ends the loop."""

import asyncio
import copy
import enum
import logging
import pickle
from itertools import pairwise
from typing import Annotated, Literal

import pytest

from cano import (
    AttemptTimeoutError,
    ConfigurationError,
    InvalidTransitionError,
    JoinConfig,
    JoinStrategy,
    NonRetryable,
    Pending,
    PollErrorPolicy,
    PollTask,
    Ready,
    Res,
    Resources,
    RetryAfter,
    RunContext,
    SplitResult,
    TaskConfig,
    TaskResult,
    Workflow,
    WorkflowCancelledError,
    WorkflowError,
    WorkflowTimeoutError,
)


class S(enum.Enum):
    START = 1
    DONE = 2


class Oops(Exception):
    pass


class Scripted(PollTask[S]):
    """Returns or raises what it is told to, the last one for ever, and keeps when it was called."""

    def __init__(self, *script, policy=None):
        self.script = list(script)
        self.at = []
        if policy is not None:
            self.on_poll_error = policy

    async def poll(self):
        self.at.append(asyncio.get_running_loop().time())
        result = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        if isinstance(result, BaseException):
            raise result
        return result

    @property
    def pauses(self):
        return [later - earlier for earlier, later in pairwise(self.at)]


def workflow_of(task, resources=None, **options):
    return Workflow(resources).register(S.START, task, **options).add_exit_state(S.DONE)


async def run(task, **options):
    return await workflow_of(task, **options).orchestrate(S.START)


async def ticks(count=5):
    for _ in range(count):
        await asyncio.sleep(0)


READY = Ready(S.DONE)
RetryOnError = PollErrorPolicy.RetryOnError


# Until it is ready


async def test_ready_gives_the_next_state():
    """Ready forwards its state, also within TaskResult.Single."""
    assert await run(Scripted(READY)) is S.DONE  # PL-001
    assert await run(Scripted(Ready(TaskResult.Single(S.DONE)))) is S.DONE


@pytest.mark.virtual
async def test_pending_sleeps_and_polls_again():
    """Pending sleeps for its delay, none by default, and polls again."""
    task = Scripted(Pending(3), Pending(), Pending(0.5), READY)

    await run(task)

    assert task.pauses == [3, 0, 0.5]  # PL-001


async def test_plain_poll():
    """`poll` may be a plain function of an object without a base."""
    polls = iter([Pending(), READY])

    class Task:
        def poll(self):
            return next(polls)

    assert await run(Task()) is S.DONE


@pytest.mark.parametrize("result", [Pending(), RetryAfter(0)], ids=["pending", "error"])
async def test_every_round_gives_others_a_turn(result):
    """However often it polls without a pause, the event loop gets a turn in each round."""
    # B37
    task = Scripted(*[result] * 20, READY, policy=RetryOnError(100))
    turns = set()

    async def others():
        while True:
            turns.add(len(task.at))
            await asyncio.sleep(0)

    other = asyncio.create_task(others())
    await run(task)
    other.cancel()
    await asyncio.wait([other])

    assert turns >= set(range(1, 21))


async def test_arguments_of_poll():
    """`poll` asks for its arguments like a task; they are filled in once per attempt."""
    seen = []

    class Task:
        def poll(self, store: Annotated[list, Res("list")], *, ctx: RunContext, res: Resources):
            seen.append((store, ctx))
            assert res.get("list") is store
            return READY if len(seen) == 3 else Pending()

    await workflow_of(Task(), {"list": []}).orchestrate(S.START)

    assert len({id(store) for store, _ in seen}) == 1
    assert len({id(ctx) for _, ctx in seen}) == 1
    assert (seen[0][1].state, seen[0][1].attempt, seen[0][1].visit) == (S.START, 1, 1)


async def test_poll_after_a_split():
    """A poll task in the state that a split joins into may take the result."""

    class Task:
        def poll(self, result: SplitResult):
            return Ready(S.DONE) if result.values() == [7] else Pending()

    workflow = workflow_of(Task()).register_split("split", [lambda: 7], JoinConfig(JoinStrategy.All, S.START))

    assert await workflow.orchestrate("split") is S.DONE


async def test_poll_as_a_branch():
    """As a branch, a poll task's value is what Ready holds."""
    join = JoinConfig(JoinStrategy.All, "joined")
    workflow = Workflow().register_split("split", [Scripted(Pending(), Ready(n)) for n in range(3)], join)
    values = []

    def joined(result: SplitResult):
        values.extend(result.values())
        return "done"

    await workflow.register("joined", joined).add_exit_state("done").orchestrate("split")

    assert values == [0, 1, 2]


# Errors


async def test_first_error_fails_by_default():
    """Unless told otherwise the first error ends it, and leaves as it is."""
    error = Oops()
    task = Scripted(error, READY)

    with pytest.raises(Oops) as caught:
        await run(task)

    # PL-002
    assert caught.value is error
    assert len(task.at) == 1


@pytest.mark.virtual
async def test_errors_in_a_row_are_got_over():
    """RetryOnError(2) gets over two errors in a row; the third is the task's."""
    # PL-003
    task = Scripted(Oops(), Oops(), READY, policy=RetryOnError(2))
    assert await run(task) is S.DONE
    assert len(task.at) == 3

    last = Oops()
    task = Scripted(Oops(), Oops(), last, READY, policy=RetryOnError(2))
    with pytest.raises(Oops) as caught:
        await run(task)
    assert caught.value is last
    assert len(task.at) == 3


@pytest.mark.virtual
async def test_pending_counts_errors_anew():
    """A poll that is merely pending ends the row of errors, and with it the growth of the pauses."""
    task = Scripted(Oops(), Oops(), Pending(), Oops(), Oops(), READY, policy=RetryOnError(2))

    await run(task)

    # PL-004
    assert len(task.at) == 6
    assert task.pauses == pytest.approx([0.1, 0.2, 0, 0.1, 0.2], rel=0.1)


@pytest.mark.virtual
async def test_errors_back_off():
    """The pauses after errors double from 0.1 s up to 30 s, spread by a tenth at most."""
    task = Scripted(*[Oops()] * 12, READY, policy=RetryOnError(12))

    await run(task)

    # PL-006, B37: ours pauses
    expected = [min(30, 0.1 * 2**k) for k in range(12)]
    assert task.pauses == pytest.approx(expected, rel=0.1)
    assert max(task.pauses) <= 30 + 1e-9


@pytest.mark.virtual
async def test_errors_that_are_got_over_are_logged(caplog):
    """Each error that is got over is a warning with its traceback; one that is not is the caller's to log."""
    caplog.set_level(logging.WARNING, "cano")
    task = Scripted(Oops("one"), Oops("two"), Oops("three"), policy=RetryOnError(2))
    task.name = "door"

    with pytest.raises(Oops, match="three"):
        await run(task)

    # B37
    texts = [record.getMessage().partition(";")[0] for record in caplog.records]
    assert texts == [f"poll of task door failed ({n} in a row)" for n in (1, 2)]
    assert [str(record.exc_info[1]) for record in caplog.records] == ["one", "two"]


@pytest.mark.parametrize("error", [TypeError(), NonRetryable(), ConfigurationError("x")], ids=repr)
async def test_errors_that_no_retry_helps(error):
    """What is not retried in a task's attempts is not got over either."""
    task = Scripted(error, READY, policy=RetryOnError(5))

    with pytest.raises(type(error)):
        await run(task)

    assert len(task.at) == 1


@pytest.mark.virtual
async def test_error_that_asks_for_its_delay():
    """RetryAfter sets the pause before the next poll."""
    task = Scripted(RetryAfter(7), READY, policy=RetryOnError(1))

    await run(task)

    assert task.pauses == [7]


async def test_no_errors_at_all():
    """RetryOnError(0) is FailFast."""
    assert RetryOnError(0) == PollErrorPolicy.FailFast
    with pytest.raises(Oops):
        await run(Scripted(Oops(), READY, policy=RetryOnError(0)))


# What ends it


@pytest.mark.virtual
async def test_attempt_timeout_bounds_the_whole_loop():
    """The attempt timeout counts from the first poll to the last, not before its limit."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    task = Scripted(Pending(1))

    with pytest.raises(AttemptTimeoutError):
        await run(task, config=TaskConfig(attempt_timeout=4.5))

    # PL-005
    assert loop.time() - began == 4.5
    assert len(task.at) == 5


@pytest.mark.virtual
async def test_loop_has_no_limit_of_its_own():
    """Without a limit it polls as long as it takes."""
    task = Scripted(*[Pending(3600)] * 10_000, READY)

    await run(task)

    assert len(task.at) == 10_001  # PL-007


@pytest.mark.virtual
async def test_retry_begins_the_loop_anew():
    """A retry of the configuration repeats the whole loop, errors counted anew."""
    task = Scripted(Pending(), Oops(), Oops(), Oops(), Pending(), READY, policy=RetryOnError(1))

    await run(task, config=TaskConfig().with_fixed_retry(1, 10))

    assert task.pauses == pytest.approx([0, 0.1, 10, 0.1, 0], rel=0.1)


@pytest.mark.virtual
async def test_run_timeout_ends_it():
    """The run's budget ends the loop where it is."""
    with pytest.raises(WorkflowTimeoutError):
        await workflow_of(Scripted(Pending(1))).with_timeout(3.5).orchestrate(S.START)


@pytest.mark.parametrize("script", [[Pending()], [Pending(3600)], [Oops()]], ids=["turn", "sleep", "back-off"])
async def test_cancel_between_polls(script):
    """A cancel ends the pause at once, and there is no further poll."""
    task = Scripted(*script, policy=RetryOnError(1_000))
    handle = workflow_of(task).start(S.START)
    await ticks()
    count = len(task.at)

    handle.cancel("enough")

    with pytest.raises(WorkflowCancelledError):
        await handle
    assert len(task.at) == count  # CN-017


async def test_error_out_of_a_cancel_is_not_got_over():
    """What a poll makes of a cancel leaves the run, whatever errors are got over."""
    polls = []

    class Task:
        on_poll_error = RetryOnError(5)

        async def poll(self):
            polls.append(1)
            try:
                await asyncio.sleep(3600)
            except asyncio.CancelledError as error:
                raise Oops from error

    handle = workflow_of(Task()).start(S.START)
    await ticks()

    handle.cancel()

    with pytest.raises(Oops):
        await handle
    assert len(polls) == 1


# What it returns, and how it is written


async def test_poll_cannot_split():
    """A split out of a poll task is refused, with the reason."""
    with pytest.raises(WorkflowError, match="a poll task cannot split"):
        await run(Scripted(Ready(TaskResult.Split([S.DONE]))))


@pytest.mark.parametrize("value", [S.DONE, None, 5, Ready, Pending], ids=repr)
async def test_poll_that_returns_something_else(value):
    """What is neither Ready nor Pending is refused, naming method and type; it is never tried again."""
    task = Scripted(value, policy=RetryOnError(5))

    with pytest.raises(InvalidTransitionError) as caught:
        await run(task, config=TaskConfig().with_fixed_retry(5, 0))

    text = f"poll of task Scripted returned a value of type {type(value).__qualname__}; "
    assert str(caught.value) == text + "it returns Ready(state) or Pending(delay)"
    assert len(task.at) == 1


@pytest.mark.parametrize(
    ("annotation", "declares"),
    [
        (Ready[Literal["done", "gone"]] | Pending, True),
        (Ready[Literal["gone"]], True),
        (Annotated[Ready[Literal["gone"]] | Pending, "checked"], True),
        (Ready[str] | Pending, False),
        (Ready | Pending, False),
        (Pending | None, False),
    ],
)
def test_annotation_of_poll(annotation, declares):
    """`Literal` states in Ready are known to `validate()`; without them any state is allowed."""

    class Task:
        def poll(self):
            raise NotImplementedError

    Task.poll.__annotations__["return"] = annotation
    workflow = Workflow().register("start", Task()).add_exit_state("done")

    if declares:
        with pytest.raises(ConfigurationError, match="state start leads to gone"):
            workflow.validate()
    else:
        workflow.validate()


async def test_undeclared_state_fails():
    """A state that the annotation does not list fails at that task."""

    class Task:
        def poll(self) -> Ready[Literal["done"]] | Pending:
            return Ready("other")

    workflow = Workflow().register("start", Task()).add_exit_states(["done", "other"])
    with pytest.raises(InvalidTransitionError, match="declares only done"):
        await workflow.orchestrate("start")


@pytest.mark.parametrize("policy", [5, "FailFast", None, PollErrorPolicy], ids=repr)
def test_policy_of_another_type(policy):
    """A policy that is none is refused by the attribute's name."""
    task = Scripted(READY)
    task.on_poll_error = policy

    with pytest.raises(ConfigurationError, match="on_poll_error of task Scripted must be of type PollErrorPolicy"):
        workflow_of(task)


@pytest.mark.parametrize("value", [PollErrorPolicy.FailFast, RetryOnError(3), READY, Pending(1.5)], ids=repr)
def test_values_are_values(value):
    """Policies and results compare by value, are copied and pickled, and show how they are made."""
    assert pickle.loads(pickle.dumps(value)) == copy.copy(value) == value  # noqa: S301 - just made
    assert hash(copy.deepcopy(value)) == hash(value)
    assert repr(value) in (
        "PollErrorPolicy.FailFast",
        "PollErrorPolicy.RetryOnError(3)",
        repr(READY),
        "Pending(delay=1.5)",
    )
