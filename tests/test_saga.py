"""Sagas: what is undone when a run fails, in which order, within which time, and what is told of what could not be.

The order of the roll-back and its reports are checked against tables; that nothing stays done is checked by a ledger, which
counts what was done and undone over random workflows and every place where they can fail or be cancelled.
"""

import asyncio
import contextlib
import contextvars
import enum
import gc
import logging
import pickle
import weakref
from collections import Counter
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given, settings, strategies as st

from cano import (
    AttemptTimeoutError,
    Caught,
    CompensatableTask,
    CompensationFailedError,
    CompensationTimeoutError,
    ConfigurationError,
    InvalidTransitionError,
    JoinConfig,
    JoinError,
    JoinStrategy,
    Orphan,
    OrphanedStepError,
    Res,
    Resource,
    Resources,
    RetryExhaustedError,
    RunContext,
    SplitResult,
    TaskConfig,
    TaskExecutionError,
    TaskResult,
    UnknownStateError,
    Workflow,
    WorkflowCancelledError,
    WorkflowError,
    WorkflowTimeoutError,
    testing,
)

TICK = 0.02  # seconds, also where they are real
PanicException = type("PanicException", (BaseException,), {"__module__": "pyo3_runtime"})


class Boom(Exception):
    """A failure of the user's own."""


class Step(CompensatableTask):
    """Writes to a log what it does and undoes; its output is its name and how often it was done."""

    def __init__(self, log, name, then, *, fails=None, takes=0.0, undoing_fails=None, undoing_takes=0.0, config=None):
        self.log = log
        self.name = name
        self.then = then
        self.fails = fails
        self.takes = takes
        self.undoing_fails = undoing_fails
        self.undoing_takes = undoing_takes
        self.config = config

    async def run(self):
        if self.takes:
            await asyncio.sleep(self.takes)
        if self.fails is not None:
            raise self.fails
        self.log.append(self.name)
        return self.then, f"{self.name} {self.log.count(self.name)}"

    async def compensate(self, output):
        if self.undoing_takes:
            await asyncio.sleep(self.undoing_takes)
        if self.undoing_fails is not None:
            raise self.undoing_fails
        self.log.append(f"undo {output}")


class PlainStep(Step):
    """A step without a suspension."""

    def run(self):
        self.log.append(self.name)
        return self.then, f"{self.name} {self.log.count(self.name)}"


def chain(log, names, last, *, kind=Step, **steps):
    """One compensatable step for each name, one after the other, then a plain task."""
    workflow = Workflow()
    states = [*names, "last"]
    for name, then in zip(names, states[1:], strict=True):
        workflow.register_with_compensation(name, kind(log, name, **({"then": then} | steps.get(name, {}))))
    return workflow.register("last", last).add_exit_state("done")


def boom():
    raise Boom


async def forever():
    await asyncio.sleep(1e6)


async def failure(workflow, state="a", **options):
    """What a run of the workflow raises."""
    with pytest.raises(BaseException) as caught:
        await workflow.orchestrate(state, **options)
    return caught.value


def notes(error):
    return getattr(error, "__notes__", [])


# --- order -----------------------------------------------------------------------------------------------------------


async def test_failure_undoes_newest_first():
    """A run that fails has its steps undone, newest first, each with its own output; the step that failed is not."""
    # SG-001
    log = []
    workflow = chain(log, "abcd", boom, d={"fails": Boom()})

    await failure(workflow)

    assert log == ["a", "b", "c", "undo c 1", "undo b 1", "undo a 1"]


async def test_clean_roll_back_gives_the_original_error():
    """If everything is undone the run raises what it failed with, the same object, with the place where it failed."""
    # SG-002
    log, error = [], Boom()

    raised = await failure(chain(log, "abc", boom, c={"fails": error}))

    assert raised is error
    assert notes(error) == ["state=c task=c attempt=1/1 path=a>b>c"]
    assert (error.__cause__, error.__context__) == (None, None)


async def test_plain_tasks_are_not_undone():
    """Only compensatable tasks are undone; plain ones between them are passed over."""
    # SG-003
    log = []
    workflow = (
        Workflow()
        .register_with_compensation("a", Step(log, "a", "b"))
        .register("b", lambda: "c")
        .register_with_compensation("c", Step(log, "c", "d"))
        .register("d", boom)
        .add_exit_state("done")
    )

    assert isinstance(await failure(workflow), Boom)
    assert log == ["a", "c", "undo c 1", "undo a 1"]


async def test_completed_run_undoes_nothing():
    """A run that reaches an exit state keeps what it has done."""
    # SG-026, B28
    log = []

    assert await chain(log, "abc", lambda: "done").orchestrate("a") == "done"
    assert log == ["a", "b", "c"]


async def test_run_with_nothing_done_just_fails():
    """Where nothing was done there is nothing to wait for: the error leaves at once."""
    # SG-011, SG-016, SG-024, PAN-006
    log = []

    error = await failure(chain(log, "ab", boom, a={"fails": PanicException("index")}))

    assert type(error) is TaskExecutionError
    assert log == []


@pytest.mark.parametrize("k", range(6))
async def test_exactly_the_steps_before_the_failure_are_undone(k):
    """For each place of the failure, the steps before it are undone and no others."""
    # SG-014
    log = []
    names = "abcde"
    steps = {names[k]: {"fails": Boom()}} if k < len(names) else {}

    await failure(chain(log, names, boom, **steps))

    done = [*names[:k]]
    assert log == done + [f"undo {name} 1" for name in reversed(done)]


async def test_long_stack():
    """Sixty steps are undone in reverse."""
    # SG-013
    log = []
    names = [f"s{number}" for number in range(60)]

    await failure(chain(log, names, boom), "s0")

    assert log[60:] == [f"undo {name} 1" for name in reversed(names)]


async def test_each_visit_is_undone():
    """A step that was done in several visits is undone once for each, with the output of that visit."""
    # B06
    log = []

    class Loop(CompensatableTask):
        def run(self, ctx: RunContext):
            log.append(ctx.visit)
            return ("again" if ctx.visit < 3 else "last"), ctx.visit

        def compensate(self, output, ctx: RunContext):
            log.append(f"undo {output} of visit {ctx.visit}")

    workflow = Workflow().register_with_compensation("again", Loop()).register("last", boom).add_exit_state("done")

    await failure(workflow, "again")

    assert log == [1, 2, 3, "undo 3 of visit 3", "undo 2 of visit 2", "undo 1 of visit 1"]


async def test_forty_runs_at_once():
    """Runs of one workflow at once do not touch each other's steps: the failed ones net to zero, the others keep theirs."""
    # SG-015, G04
    counts = Counter()

    class Charge(CompensatableTask):
        def __init__(self, name, then):
            self.name = name
            self.then = then

        async def run(self, ctx: RunContext):
            await asyncio.sleep(0.01)
            number = int(ctx.workflow_id)
            if "abc".index(self.name) == number % 4:
                raise Boom
            counts[number] += 1
            return self.then, number

        async def compensate(self, output):
            await asyncio.sleep(0.01)
            counts[output] -= 1

    workflow = Workflow()
    for state, then in ("ab", "bc", ("c", "done")):
        workflow.register_with_compensation(state, Charge(state, then))
    workflow.add_exit_state("done")

    results = await asyncio.gather(
        *(workflow.orchestrate("a", workflow_id=str(number)) for number in range(40)), return_exceptions=True
    )

    for number, result in enumerate(results):
        if number % 4 == 3:
            assert (result, counts[number]) == ("done", 3)
        else:
            assert type(result) is Boom
            assert counts[number] == 0


# --- what starts a roll-back -----------------------------------------------------------------------------------------


@pytest.mark.virtual
async def test_exhausted_retries_start_it():
    """A failure that is retried undoes nothing before the last attempt has failed."""
    log = []
    config = TaskConfig().with_fixed_retry(2, 1)

    error = await failure(chain(log, "ab", boom, b={"fails": Boom(), "config": config}))

    assert type(error) is RetryExhaustedError
    assert log == ["a", "undo a 1"]


@pytest.mark.virtual
async def test_forward_attempt_timeout():
    """The forward step is bounded by its attempt timeout like any task, and one that ran out of it is not undone."""
    # SG-017, G08
    log = []
    config = TaskConfig().with_attempt_timeout(1)

    error = await failure(chain(log, "ab", boom, b={"takes": 5, "config": config}))

    assert type(error) is AttemptTimeoutError
    assert log == ["a", "undo a 1"]


@pytest.mark.virtual
async def test_run_timeout_starts_it():
    """A run that is out of time is rolled back, in a time of its own."""
    # TT-004
    log = []
    workflow = chain(log, "ab", forever, b={"undoing_takes": 4}).with_timeout(10)
    began = asyncio.get_running_loop().time()

    error = await failure(workflow)

    assert type(error) is WorkflowTimeoutError
    assert log == ["a", "b", "undo b 1", "undo a 1"]
    assert asyncio.get_running_loop().time() - began == 14


async def test_join_that_fails_starts_it():
    """A split that fails after a compensatable step rolls that step back, once its branches are over."""
    log = []
    join = JoinConfig(JoinStrategy.All, "done")
    workflow = Workflow().register_with_compensation("a", Step(log, "a", "split"))
    workflow.register_split("split", [boom, lambda: log.append("branch")], join).add_exit_state("done")

    assert type(await failure(workflow)) is JoinError
    assert log == ["a", "branch", "undo a 1"]


async def test_on_error_does_not_undo():
    """An error that leads on undoes nothing; what was done is undone if the run fails later."""
    log = []
    workflow = Workflow().register_with_compensation("a", Step(log, "a", "b"))
    workflow.register("b", boom, on_error={Boom: "c"})
    workflow.register_with_compensation("c", Step(log, "c", "d", fails=Boom()), on_error={Boom: "d"})
    workflow.register("d", lambda: "done").add_exit_state("done")
    later = workflow.copy().register_with_compensation("e", Step(log, "e", "f")).register("f", boom)

    assert await workflow.orchestrate("a") == "done"
    assert log == ["a"]
    assert type(await failure(later, "e")) is Boom
    assert log == ["a", "e", "undo e 1"]


class Exit(BaseException):
    """Something that only its own raiser should catch."""


async def test_base_exception_starts_it():
    """Also what is no Exception is let out only after the roll-back, as the same object."""
    log, error = [], Exit()

    def leave():
        raise error

    assert await failure(chain(log, "ab", leave)) is error
    assert log == ["a", "b", "undo b 1", "undo a 1"]


async def test_base_exception_with_a_failed_roll_back():
    """What is no Exception cannot be in the group: it leaves as it is, and the group is its cause."""
    log, error = [], Exit()

    def leave():
        raise error

    assert await failure(chain(log, "a", leave, a={"undoing_fails": Boom()})) is error
    failed = error.__cause__
    assert type(failed) is CompensationFailedError
    assert [type(member) for member in failed.exceptions] == [TaskExecutionError, Boom]
    assert str(failed.exceptions[0]) == "the run ended with Exit"


# --- failures of the roll-back ---------------------------------------------------------------------------------------


async def test_failing_compensation_does_not_stop_the_others():
    """Every compensation is tried; the error has the original failure first, then theirs in the order of the roll-back."""
    # SG-004, SG-005, FSM-015, ER-004
    log = []
    original, first, second = Boom("original"), ValueError("c"), KeyError("a")
    workflow = chain(log, "abcd", boom, a={"undoing_fails": second}, c={"undoing_fails": first}, d={"fails": original})

    error = await failure(workflow, workflow_id="order-1")

    assert type(error) is CompensationFailedError
    assert error.exceptions == (original, first, second)
    assert all(member is known for member, known in zip(error.exceptions, (original, first, second), strict=True))
    assert log == ["a", "b", "c", "undo b 1"]
    assert error.orphans == (Orphan("c", "c", 1, "c 1", first), Orphan("a", "a", 1, "a 1", second))
    place = "workflow_id='order-1' state={0} task={0} attempt=1/1 path=a>b>c>d"
    assert [notes(member) for member in error.exceptions] == [[place.format(name)] for name in "dca"]
    assert notes(error) == [place.format("d")]
    assert (error.state, error.task, error.attempt, error.workflow_id) == ("d", "d", 1, "order-1")
    text = "the run failed and was not rolled back completely: 2 of its steps are not undone (3 sub-exceptions)"
    assert str(error) == text


async def test_error_of_a_failed_roll_back_pickles():
    """What a failed roll-back raises can be sent to another process, outputs included."""
    error = await failure(chain([], "ab", boom, a={"undoing_fails": KeyError("a")}))

    back = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own

    assert (str(back), repr(back.exceptions), repr(back.orphans)) == (
        str(error),
        repr(error.exceptions),
        repr(error.orphans),
    )


@pytest.mark.parametrize(
    ("raised", "kind", "text"),
    [
        (PanicException("index out of bounds"), TaskExecutionError, "panic: index out of bounds"),
        (Exit(), TaskExecutionError, "the compensation of task b in state b ended with Exit"),
        (
            asyncio.CancelledError(),
            TaskExecutionError,
            "the compensation of task b in state b ended with CancelledError",
        ),
        (SystemExit(3), TaskExecutionError, "the compensation of task b in state b ended with SystemExit"),
        (StopIteration(), RuntimeError, "coroutine raised StopIteration"),
        (TimeoutError("their own"), TimeoutError, "their own"),
    ],
    ids=repr,
)
async def test_whatever_a_compensation_raises_is_collected(raised, kind, text):
    """A panic, an exit or a cancellation out of a compensation is one collected error; the rest still runs."""
    # SG-006, PAN-008
    log = []

    error = await failure(chain(log, "abc", boom, b={"undoing_fails": raised}))

    assert [type(member) for member in error.exceptions] == [Boom, kind]
    assert str(error.exceptions[1]) == text
    assert log == ["a", "b", "c", "undo c 1", "undo a 1"]


@pytest.mark.virtual
async def test_plain_compensation():
    """``compensate`` may be a plain function, which may return an awaitable; what it raises is collected alike."""
    log = []

    class Plain(CompensatableTask):
        def __init__(self, name, then):
            self.name = name
            self.then = then

        def run(self):
            return self.then, self.name

        def compensate(self, output) -> Awaitable[None] | None:
            log.append(output)
            if output == "a":
                raise StopIteration
            return asyncio.sleep(1, log.append("later"))

    workflow = (
        Workflow().register_with_compensation("a", Plain("a", "b")).register_with_compensation("b", Plain("b", "c"))
    )

    error = await failure(workflow.register("c", boom).add_exit_state("done"))

    assert log == ["b", "later", "a"]
    assert [type(member) for member in error.exceptions] == [Boom, StopIteration]


async def test_nested_failures_are_flattened():
    """A failed roll-back inside a failed run, or inside a compensation, gives one flat error with all orphans."""
    # SG-027
    log = []
    inner = chain(log, "xy", boom, x={"undoing_fails": ValueError("x")})

    class Outer(Step):
        async def compensate(self, _output):
            await inner.orchestrate("x")

    async def last():
        await inner.orchestrate("x")

    workflow = (
        Workflow().register_with_compensation("a", Outer(log, "a", "b")).register("b", last).add_exit_state("done")
    )

    error = await failure(workflow)

    assert [repr(member) for member in error.exceptions] == ["Boom()", "ValueError('x')", "Boom()", "ValueError('x')"]
    assert [orphan.task for orphan in error.orphans] == ["x", "a", "x"]
    assert error.state == "last"  # where it failed first: in the inner run


async def test_group_of_others_is_one_member():
    """An ExceptionGroup that is not ours stays a member as it is."""
    group = ExceptionGroup("theirs", [ValueError()])

    error = await failure(chain([], "a", boom, a={"undoing_fails": group}))

    assert error.exceptions[1] is group


# --- limits ----------------------------------------------------------------------------------------------------------


@pytest.mark.virtual
async def test_compensation_is_bounded_by_the_attempt_timeout():
    """A compensation that takes longer than its task's attempt timeout is stopped and not repeated; the others run."""
    # SG-007
    log = []
    config = TaskConfig().with_attempt_timeout(1).with_fixed_retry(3, 0)
    began = asyncio.get_running_loop().time()

    error = await failure(chain(log, "abc", boom, b={"undoing_takes": 60, "config": config}))

    assert asyncio.get_running_loop().time() - began == 1
    assert log == ["a", "b", "c", "undo c 1", "undo a 1"]
    assert type(error.exceptions[1]) is AttemptTimeoutError
    assert error.exceptions[1].limit == 1
    assert str(error.exceptions[1]) == "the compensation took longer than its attempt_timeout of 1.0 s"
    assert [orphan.output for orphan in error.orphans] == ["b 1"]


@pytest.mark.virtual
async def test_roll_back_is_bounded_as_a_whole():
    """When the compensation timeout is over the compensation in progress is stopped, and no other begins."""
    # SG-008, D07
    log = []
    workflow = chain(log, "abc", boom, b={"undoing_takes": 60}).with_compensation_timeout(5)
    began = asyncio.get_running_loop().time()

    error = await failure(workflow)

    assert asyncio.get_running_loop().time() - began == 5
    assert log == ["a", "b", "c", "undo c 1"]
    assert [f"{type(member).__name__}: {member}" for member in error.exceptions] == [
        "Boom: ",
        "OrphanedStepError: the compensation of task b in state b was stopped: the compensation timeout of 5.0 s was used up",
        "OrphanedStepError: the compensation of task a in state a was not begun: the compensation timeout of 5.0 s was used up",
        "CompensationTimeoutError: the roll-back took longer than 5.0 s",
    ]
    assert [(orphan.task, orphan.output) for orphan in error.orphans] == [("b", "b 1"), ("a", "a 1")]
    assert error.exceptions[3].limit == 5


async def test_no_time_at_all():
    """With no time nothing is undone: each step is an orphan with its output, newest first, then comes the timeout."""
    # SG-009
    log = []

    error = await failure(chain(log, "abc", boom).with_compensation_timeout(0))

    assert log == ["a", "b", "c"]
    kinds = [Boom, OrphanedStepError, OrphanedStepError, OrphanedStepError, CompensationTimeoutError]
    assert [type(member) for member in error.exceptions] == kinds
    assert [(orphan.task, orphan.output, orphan.error) for orphan in error.orphans] == [
        (name, f"{name} 1", member) for name, member in zip("cba", error.exceptions[1:4], strict=True)
    ]


@pytest.mark.virtual
@pytest.mark.parametrize(
    ("timeout", "given", "limit"),
    [(None, None, 30), (10, None, 5), (100, None, 30), (None, 7, 7), (10, 7, 7), (10, 90, 90)],
)
async def test_default_limit(timeout, given, limit):
    """The limit is half of the run's timeout and at most 30 s, unless the workflow gives one."""
    # D06, D08, TT-009, TT-010, TT-011
    workflow = chain([], "a", boom, a={"undoing_takes": 1000}).with_compensation_timeout(given)
    began = asyncio.get_running_loop().time()

    error = await failure(workflow, timeout=timeout)

    assert asyncio.get_running_loop().time() - began == limit
    assert error.exceptions[-1].limit == limit


@pytest.mark.virtual
async def test_compensation_that_ignores_its_limit_is_waited_for():
    """As everywhere in asyncio, what swallows its cancellation goes on, and what it then returns counts."""
    log = []

    class Stubborn(Step):
        async def compensate(self, output):
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                await asyncio.sleep(1)
            log.append(f"undo {output}")

    config = TaskConfig().with_attempt_timeout(1)
    workflow = Workflow().register_with_compensation("a", Stubborn(log, "a", "b", config=config)).register("b", boom)

    assert type(await failure(workflow.add_exit_state("done"))) is Boom
    assert log == ["a", "undo a 1"]


# --- what is refused -------------------------------------------------------------------------------------------------


def returning(value, log, **options):
    """A compensatable task that returns this, in the place of the second of two steps."""

    class Returns(CompensatableTask):
        name = "b"
        config = TaskConfig().with_fixed_retry(3, 0).with_attempt_timeout(0.5)

        def run(self):
            log.append("b")
            return value

        async def compensate(self, output):
            await asyncio.sleep(options.get("takes", 0))
            log.append(f"undo {output}")
            if "fails" in options:
                raise options["fails"]

    workflow = Workflow().register_with_compensation("a", Step(log, "a", "b"))
    on_error: Any = {Exception: "done", WorkflowError: "done"}
    return workflow.register_with_compensation("b", Returns(), on_error=on_error).add_exit_state("done")


@pytest.mark.parametrize(
    ("state", "kind", "text"),
    [
        (TaskResult.Split(["a", "b"]), WorkflowError, "returned TaskResult.Split; a compensatable task cannot split"),
        ("nowhere", UnknownStateError, "returned nowhere, which is neither registered nor an exit state"),
        (3, InvalidTransitionError, "returned a value of type int"),
        ([], InvalidTransitionError, "returned a value of type list"),
    ],
)
async def test_refused_result_is_undone_at_once(state, kind, text):
    """A step whose next state is refused was done: it is undone first, then the others, and neither retried nor led on."""
    # SG-018, SG-022, B08
    log = []

    error = await failure(returning((state, "b 1"), log))

    assert type(error) is kind
    assert text in str(error)
    assert log == ["a", "b", "undo b 1", "undo a 1"]


@pytest.mark.parametrize("raised", [KeyError("no"), PanicException("x")])
async def test_refused_result_that_cannot_be_undone(raised):
    """If that compensation fails, the refusal is the original failure, in its place, and the rest is undone all the same."""
    # SG-020, B07
    log = []

    error = await failure(returning((TaskResult.Split(["a"]), "b 1"), log, fails=raised))

    assert [type(member) for member in error.exceptions] == [
        WorkflowError,
        KeyError if isinstance(raised, KeyError) else TaskExecutionError,
    ]
    assert error.exceptions[0].state == "b"
    assert [orphan.output for orphan in error.orphans] == ["b 1"]
    assert log == ["a", "b", "undo b 1", "undo a 1"]


async def test_refused_result_is_undone_within_the_limits():
    """That compensation is bounded as every other is."""
    # SG-021, B09
    error = await failure(returning(("nowhere", "b 1"), [], takes=60))

    assert [type(member) for member in error.exceptions] == [UnknownStateError, AttemptTimeoutError]


@pytest.mark.parametrize("value", ["done", None, ("done",), ("done", 1, 2), TaskResult.Single("done"), ["done", 1]])
async def test_result_without_an_output_is_refused(value):
    """A compensatable task returns a pair; of anything else there is no output to undo it with."""
    log = []

    error = await failure(returning(value, log).register_with_compensation("c", Step(log, "c", "a")), "c")

    assert type(error) is InvalidTransitionError
    assert "a compensatable task returns (next state, output)" in str(error)
    assert log == ["c", "a", "b", "undo a 1", "undo c 1"]


async def test_single_result_leads_on():
    """The next state may be wrapped in TaskResult.Single."""
    log = []

    assert await returning((TaskResult.Single("done"), 1), log).orchestrate("a") == "done"


async def test_undeclared_state_is_undone_at_once():
    """A state that the annotation does not declare is refused like one that does not exist."""
    log = []

    class Declares(Step):
        async def run(self) -> tuple[Literal["done"], str]:
            return await super().run()

    workflow = Workflow().register_with_compensation("a", Declares(log, "a", "b")).register("b", boom)

    with pytest.raises(ConfigurationError, match="state b cannot be reached"):
        workflow.add_exit_state("done").validate()
    open_ended = Workflow().register("start", lambda: "a").register_with_compensation("a", Declares(log, "a", "b"))
    error = await failure(open_ended.register("b", boom).add_exit_state("done"), "start")
    assert type(error) is InvalidTransitionError
    assert "declares only done" in str(error)
    assert log == ["a", "undo a 1"]


def problems(workflow):
    with pytest.raises(ConfigurationError) as caught:
        workflow.validate()
    return caught.value.problems


def test_names_must_differ():
    """Two compensatable tasks of one name could not be told apart in a log."""
    # SG-028, B06
    workflow = Workflow().register_with_compensation("a", Step([], "charge", "b"))
    workflow.register_with_compensation("b", Step([], "charge", "done")).add_exit_state("done")

    assert problems(workflow) == (
        "the compensatable tasks of states a and b are both called charge; give each a name of its own",
    )


def test_compensatable_task_is_no_branch():
    """A compensatable task in a split is refused when it is registered."""
    join = JoinConfig(JoinStrategy.All, "done")

    with pytest.raises(ConfigurationError, match="task a is a compensatable task, which cannot be a branch of a split"):
        Workflow().register_split("split", [Step([], "a", "b")], join)


def forked(log, task):
    join = JoinConfig(JoinStrategy.All, "joined")
    workflow = Workflow().register_with_compensation("before", Step(log, "before", "fork"))
    workflow.register("fork", task, join=join).register("left", lambda: "a")
    workflow.register_with_compensation("a", Step(log, "a", "joined"))
    return workflow.register_with_compensation("joined", Step(log, "joined", "done")).add_exit_state("done")


def test_compensatable_state_in_a_declared_branch():
    """Where annotations tell that a branch leads to a compensatable task, validation refuses it; after the join it is fine."""

    def fork() -> TaskResult[Literal["left", "joined"]]:
        return TaskResult.Split(["left"])

    def left() -> Literal["a"]:
        return "a"

    workflow = forked([], fork)
    workflow._states["left"] = Workflow().register("left", left)._states["left"]

    assert problems(workflow) == (
        (
            "a branch of the split in state fork leads to a, whose task is compensatable; "
            "do it before the split or after the join"
        ),
    )


async def test_compensatable_state_in_a_branch():
    """Where only the run shows it, the branch fails before the task is called, and the run is rolled back."""
    log = []

    error = await failure(forked(log, lambda: TaskResult.Split(["left"])), "before")

    assert type(error) is JoinError
    assert "task a in state a is compensatable, which it cannot be in a branch of a split" in str(error.exceptions[0])
    assert log == ["before", "undo before 1"]


async def test_saga_around_a_split():
    """Before a split and after a join, compensatable tasks are as good as anywhere."""
    log = []
    workflow = forked(log, lambda: TaskResult.Split(["left"]))
    workflow._states["left"] = Workflow().register("left", lambda: "joined")._states["left"]

    assert await workflow.orchestrate("before") == "done"
    assert log == ["before", "joined"]


class OnlyRun:
    def run(self):
        return "done"


class OnlyCompensate:
    def compensate(self, output):
        pass


@pytest.mark.parametrize("task", [OnlyRun(), OnlyCompensate(), lambda: "done", 3, Step], ids=repr)
def test_door_takes_compensatable_tasks_alone(task):
    """What is registered with compensation has both methods."""
    with pytest.raises(ConfigurationError, match=r"must be an object with run and compensate|is a class"):
        Workflow().register_with_compensation("a", task)


def test_other_doors_refuse_compensatable_tasks():
    """A task that could be undone is not registered as one that cannot, with the base or without."""

    class WithoutBase:
        def run(self):
            return "done", 1

        def compensate(self, output):
            pass

    for task in (Step([], "a", "b"), WithoutBase()):
        with pytest.raises(ConfigurationError, match=r"register it with register_with_compensation\(\)"):
            Workflow().register("a", task)
    Workflow().register_with_compensation("a", WithoutBase()).add_exit_state("done").validate()


def test_base_without_its_methods_is_refused():
    """A subclass that lacks a method is refused by name."""

    class Half(CompensatableTask):
        def run(self):
            return "done", 1

    with pytest.raises(ConfigurationError, match="is a compensatable task without a method compensate"):
        Workflow().register_with_compensation("a", Half())


@pytest.mark.parametrize("annotation", [SplitResult, SplitResult | None, Caught[Boom], Caught[Boom] | None])
def test_compensation_gets_nothing_that_led_into_the_state(annotation):
    """What led into the state was for ``run``; ``compensate`` cannot ask for it."""

    class Asks(Step):
        async def compensate(self, output, led: annotation):
            pass

    with pytest.raises(ConfigurationError, match=r"a\.compensate takes what led into the state"):
        Workflow().register_with_compensation("a", Asks([], "a", "b"))


def test_compensation_takes_the_output_first():
    """``compensate`` without a parameter for the output is refused, and so is one that asks for something unknown."""

    class Nothing(Step):
        async def compensate(self):
            pass

    class Unknown(Step):
        async def compensate(self, output, other: int):
            pass

    with pytest.raises(ConfigurationError, match="must take output first"):
        Workflow().register_with_compensation("a", Nothing([], "a", "b"))
    with pytest.raises(ConfigurationError, match=r"parameter other of task a\.compensate is annotated"):
        Workflow().register_with_compensation("a", Unknown([], "a", "b"))


# --- arguments -------------------------------------------------------------------------------------------------------


class Bank(Resource):
    def __init__(self):
        self.log = []
        self.open = False

    async def setup(self):
        self.open = True

    async def teardown(self):
        self.open = False


async def test_both_methods_are_given_what_they_ask_for():
    """Arguments are filled in by annotation; the context of the compensation is that of the step, its key as well."""
    # G01
    keys = {}

    class Charge(CompensatableTask[str, int]):
        name = "charge"

        async def run(self, bank: Annotated[Bank, Res("bank")], ctx: RunContext) -> tuple[Literal["last"], int]:
            keys["run"] = ctx.idempotency_key
            return "last", 7

        async def compensate(
            self, output: int, res: Resources, *, ctx: RunContext, bank: Annotated[Bank, Res("bank")]
        ) -> None:
            assert bank.open
            assert res.get("bank", Bank) is bank
            keys["compensate"] = ctx.idempotency_key
            bank.log.append((output, ctx.state, ctx.visit, ctx.attempt, ctx.branch, ctx.workflow_id))

    bank = Bank()
    workflow = Workflow({"bank": bank}).register_with_compensation("charge", Charge()).register("last", boom)

    await failure(workflow.add_exit_state("done"), "charge", workflow_id="order-1")

    assert bank.log == [(7, "charge", 1, 1, None, "order-1")]
    assert not bank.open
    assert keys["run"] == keys["compensate"]


async def test_missing_resource_of_a_compensation():
    """A resource that is not there fails the one compensation that asks for it."""

    class Asks(Step):
        async def compensate(self, output, bank: Annotated[Bank, Res("bank")]):
            pass

    workflow = Workflow().register_with_compensation("a", Asks([], "a", "b")).register("b", boom)

    error = await failure(workflow.add_exit_state("done"))

    assert "bank" in str(error.exceptions[1])


async def test_context_variables_are_those_of_the_run():
    """The roll-back sees the context variables of the task that awaits the run."""
    user = contextvars.ContextVar("user")
    seen = []

    class Reads(Step):
        async def compensate(self, output):
            seen.append(user.get())

    user.set("ada")
    workflow = Workflow().register_with_compensation("a", Reads([], "a", "b")).register("b", boom)

    await failure(workflow.add_exit_state("done"))

    assert seen == ["ada"]


# --- registered before it begins -------------------------------------------------------------------------------------


def registered(log, *, fails=None, takes=0.0, config=None, **options):
    class Charge(CompensatableTask):
        name = "charge"

        async def run(self, ctx: RunContext):
            log.append("charge")
            await asyncio.sleep(takes)
            if fails is not None and (config is None or ctx.attempt <= config[1]):
                raise fails
            return "last", f"receipt {ctx.attempt}"

        def compensate(self, output, ctx: RunContext):
            log.append(f"undo {output}")

    workflow = Workflow().register_with_compensation("a", Step(log, "a", "charge"))
    workflow.register_with_compensation(
        "charge", Charge(), register_before=True, config=config and config[0], **options
    )
    return workflow.register("last", boom).register("other", boom).add_exit_state("done")


async def test_registered_before_it_is_undone_though_it_failed():
    """A step that is registered before it begins is undone with None for its output if it does not end well."""
    # SG-024, G08
    for error in (Boom(), PanicException("x")):
        log = []
        await failure(registered(log, fails=error))
        assert log == ["a", "charge", "undo None", "undo a 1"]


@pytest.mark.virtual
async def test_registered_before_it_is_undone_once():
    """If it ends well it is undone once, with its output; attempts that failed before are the business of its retries."""
    log = []
    await failure(registered(log))
    assert log == ["a", "charge", "undo receipt 1", "undo a 1"]

    log.clear()
    retry = TaskConfig().with_fixed_retry(3, 1)
    await failure(registered(log, fails=Boom(), config=(retry, 2)))
    assert log == ["a", "charge", "charge", "charge", "undo receipt 3", "undo a 1"]


@pytest.mark.virtual
async def test_registered_before_and_timed_out():
    """A step that was interrupted may have done something: it is undone with None."""
    log = []
    await failure(registered(log, takes=60, config=(TaskConfig().with_attempt_timeout(1), 0)))
    assert log == ["a", "charge", "undo None", "undo a 1"]


async def test_registered_before_and_led_on():
    """An error that leads on leaves the step on the stack, since nobody knows what it has done."""
    log = []
    await failure(registered(log, fails=Boom(), on_error={Boom: "other"}))
    assert log == ["a", "charge", "undo None", "undo a 1"]


@pytest.mark.virtual
async def test_step_that_did_not_begin_is_not_undone():
    """A run that is out of time before a step begins does not undo that step."""
    log = []
    workflow = registered(log)
    workflow._states["a"] = Workflow().register_with_compensation("a", Slow(log))._states["a"]

    error = await failure(workflow.with_timeout(1))

    assert type(error) is WorkflowTimeoutError
    assert log == ["a", "undo a"]


class Slow(CompensatableTask):
    """Swallows the run's timeout, so that the run is out of time between two states."""

    name = "a"

    def __init__(self, log):
        self.log = log

    async def run(self):
        self.log.append("a")
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(60)
        return "charge", None

    def compensate(self, output):
        self.log.append("undo a")


# --- cancellation ----------------------------------------------------------------------------------------------------


async def test_cancel_rolls_back_and_goes_on():
    """A cancelled run is rolled back, then the cancel goes on with its message and its count."""
    # B35, CN-008
    log = []
    task = asyncio.create_task(chain(log, "ab", forever, b={"undoing_takes": 3 * TICK}).orchestrate("a"))
    await asyncio.sleep(TICK)
    task.cancel("enough")
    with pytest.raises(asyncio.CancelledError) as caught:
        await task

    assert caught.value.args == ("enough",)
    assert caught.value.__cause__ is None
    assert task.cancelling() == 1
    assert log == ["a", "b", "undo b 1", "undo a 1"]


async def test_second_cancel_does_not_stop_a_roll_back():
    """More cancels while steps are undone interrupt nothing; the newest one goes on, with the first as its context."""
    # CN-015
    log = []
    task = asyncio.create_task(
        chain(log, "abc", forever, a={"undoing_takes": 3 * TICK}, c={"undoing_takes": 3 * TICK}).orchestrate("a")
    )
    await asyncio.sleep(TICK)
    for message in ("first", "second", "third"):
        task.cancel(message)
        await asyncio.sleep(TICK)
    with pytest.raises(asyncio.CancelledError) as caught:
        await task

    assert log == ["a", "b", "c", "undo c 1", "undo b 1", "undo a 1"]
    assert [caught.value.args, caught.value.__context__.args] == [("third",), ("first",)]


async def test_cancel_during_the_roll_back_of_a_failure():
    """A cancel that comes while a failure is rolled back goes on when that is done; the failure is its context."""
    log = []
    error = Boom()
    task = asyncio.create_task(
        chain(log, "ab", boom, a={"undoing_takes": 3 * TICK}, b={"fails": error}).orchestrate("a")
    )
    await asyncio.sleep(TICK)
    task.cancel("enough")
    with pytest.raises(asyncio.CancelledError) as caught:
        await task

    assert caught.value.__context__ is error
    assert log == ["a", "undo a 1"]


async def test_failed_roll_back_of_a_cancelled_run(caplog):
    """A cancel is always a cancel: the error of the roll-back is its cause, and is logged, since a cancel is seldom read."""
    # CN-009
    failing = ValueError("no")
    task = asyncio.create_task(
        chain([], "ab", forever, b={"undoing_fails": failing}).orchestrate("a", workflow_id="o-1")
    )
    await asyncio.sleep(TICK)
    task.cancel("enough")
    with caplog.at_level(logging.ERROR, "cano"), pytest.raises(asyncio.CancelledError) as caught:
        await task

    failed = caught.value.__cause__
    assert type(failed) is CompensationFailedError
    assert [type(member) for member in failed.exceptions] == [WorkflowCancelledError, ValueError]
    assert (failed.exceptions[0].reason, str(failed.exceptions[0])) == ("enough", "the run was cancelled: 'enough'")
    assert (failed.state, failed.workflow_id) == ("last", "o-1")
    assert [orphan.output for orphan in failed.orphans] == ["b 1"]
    assert [record.getMessage() for record in caplog.records] == [
        "a roll-back failed while its run was being cancelled"
    ]


async def test_handle_of_a_cancelled_run():
    """Through a handle, a clean roll-back gives WorkflowCancelledError, a failed one its error, to everybody who awaits."""
    log = []
    run = chain(log, "a", forever).start("a")
    await asyncio.sleep(TICK)
    assert run.cancel("withdrawn")
    with pytest.raises(WorkflowCancelledError) as caught:
        await run
    assert caught.value.reason == "withdrawn"
    assert log == ["a", "undo a 1"]

    run = chain(log, "a", forever, a={"undoing_fails": Boom()}).start("a")
    await asyncio.sleep(TICK)
    assert run.cancel("withdrawn")
    for _ in range(2):
        with pytest.raises(CompensationFailedError) as failed:
            await run
        assert [type(member) for member in failed.value.exceptions] == [WorkflowCancelledError, Boom]
        assert failed.value.exceptions[0].reason == "withdrawn"


async def test_asyncio_timeout_around_a_run():
    """A deadline of the caller's own rolls the run back and stays what it is, also when it passes during a roll-back."""
    log = []
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(TICK):
            await chain(log, "a", forever, a={"undoing_takes": 3 * TICK}).orchestrate("a")
    assert log == ["a", "undo a 1"]

    log.clear()
    with pytest.raises(TimeoutError) as caught:
        async with asyncio.timeout(TICK):
            await chain(log, "a", boom, a={"undoing_takes": 3 * TICK}).orchestrate("a")
    assert log == ["a", "undo a 1"]
    assert type(caught.value.__cause__.__context__) is Boom
    assert asyncio.current_task().cancelling() == 0


async def test_cancel_does_not_interrupt_a_forward_step():
    """A step that is being done when a cancel comes is done to its end, then undone; the next one does not begin."""
    # CN-010
    log = []
    task = asyncio.create_task(chain(log, "abc", boom, b={"takes": 3 * TICK}).orchestrate("a"))
    for message in ("first", "second"):
        await asyncio.sleep(TICK)
        task.cancel(message)
    with pytest.raises(asyncio.CancelledError) as caught:
        await task

    assert caught.value.args == ("second",)
    assert task.cancelling() == 2
    assert log == ["a", "b", "undo b 1", "undo a 1"]


async def test_cancel_during_a_forward_step_that_fails():
    """If the step fails after the cancel it is neither retried nor led on from: the cancel goes on, with its failure."""
    log, error = [], Boom()
    step = Step(log, "b", "done", takes=2 * TICK, fails=error, config=TaskConfig().with_fixed_retry(3, 0))
    workflow = Workflow().register_with_compensation("a", Step(log, "a", "b"))
    workflow.register_with_compensation("b", step, on_error={Exception: "done"}).add_exit_state("done")
    task = asyncio.create_task(workflow.orchestrate("a"))
    await asyncio.sleep(TICK)
    task.cancel("enough")
    with pytest.raises(asyncio.CancelledError) as caught:
        await task

    assert (caught.value.args, caught.value.__context__) == (("enough",), error)
    assert log == ["a", "undo a 1"]


async def test_cancel_during_a_forward_step_that_is_refused():
    """If what the step returned is refused the cancel goes on all the same, and the step is undone."""
    log = []
    task = asyncio.create_task(chain(log, "a", boom, a={"takes": 2 * TICK, "then": "nowhere"}).orchestrate("a"))
    await asyncio.sleep(TICK)
    task.cancel()
    with pytest.raises(asyncio.CancelledError) as caught:
        await task

    assert type(caught.value.__context__) is UnknownStateError
    assert log == ["a", "undo a 1"]


@pytest.mark.virtual
@pytest.mark.parametrize("names", ["a", "ab"])
async def test_run_timeout_does_not_interrupt_a_forward_step(names):
    """A step that is being done when the run's time is over is done to its end; then the run is out of time."""
    # TT-004, TT-005, B30
    log = []
    workflow = chain(log, names, lambda: "done", **{names[-1]: {"takes": 8}}).with_timeout(5)

    error = await failure(workflow)

    assert type(error) is WorkflowTimeoutError
    assert error.elapsed == 8
    assert asyncio.current_task().cancelling() == 0
    assert log == [*names, *(f"undo {name} 1" for name in reversed(names))]


async def test_cancel_and_timeout_during_a_forward_step():
    """Of a cancel and the run's own timeout the cancel leaves."""
    log = []
    workflow = chain(log, "a", lambda: "done", a={"takes": 3 * TICK}).with_timeout(TICK)
    task = asyncio.create_task(workflow.orchestrate("a"))
    await asyncio.sleep(2 * TICK)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert task.cancelling() == 1
    assert log == ["a", "undo a 1"]


async def test_closed_run_cancels_its_forward_step():
    """Closing a run closes what it is doing, also a step that no cancel reaches."""
    log = []

    class Tells(Step):
        async def run(self):
            try:
                await forever()
            finally:
                log.append("closed")

    workflow = Workflow().register_with_compensation("a", Tells(log, "a", "done")).add_exit_state("done")
    for waits in (False, True):
        coroutine = workflow.orchestrate("a")
        coroutine.send(None)
        if waits:
            await asyncio.sleep(0)
        coroutine.close()
        await asyncio.sleep(0)
        await asyncio.sleep(0)

    assert log == ["closed"]


async def test_roll_back_whose_own_task_is_cancelled_goes_on():
    """Whoever cancels every task there is, cancels the roll-back's as well: it goes on in another one, where it was."""
    log = []
    task = asyncio.create_task(chain(log, "abc", boom, b={"undoing_takes": 3 * TICK}).orchestrate("a"))
    await asyncio.sleep(TICK)
    for other in asyncio.all_tasks() - {asyncio.current_task()}:
        other.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert log == ["a", "b", "c", "undo c 1", "undo b 1", "undo a 1"]


@pytest.mark.parametrize("waits", [False, True])
async def test_compensation_that_cancels_itself(waits):
    """A compensation that cancels its own task is tried once more, and then reported; the others run."""
    log = []

    class Cancels(Step):
        async def compensate(self, _output):
            log.append("cancels")
            asyncio.current_task().cancel()
            if waits:
                await asyncio.sleep(60)
            else:
                raise asyncio.CancelledError

    workflow = Workflow().register_with_compensation("a", Step(log, "a", "b"))
    workflow.register_with_compensation("b", Cancels(log, "b", "c")).register("c", boom).add_exit_state("done")

    error = await failure(workflow)

    assert log == ["a", "b", "cancels", "cancels", "undo a 1"]
    assert str(error.exceptions[1]) == "the compensation of task b in state b was cancelled twice"


async def test_run_closed_during_its_roll_back():
    """Closing a run that is being rolled back cannot wait for it: the roll-back goes on by itself."""
    log = []
    coroutine = chain(log, "ab", boom, kind=PlainStep, b={"undoing_takes": TICK}).orchestrate("a")
    coroutine.send(None)
    coroutine.close()
    await asyncio.sleep(3 * TICK)

    assert log == ["a", "b", "undo b 1", "undo a 1"]


@pytest.mark.parametrize("strategy", [JoinStrategy.All, JoinStrategy.Any])
async def test_saga_of_a_run_inside_a_branch(strategy):
    """A branch may run a workflow of its own that has compensatable tasks: that run is rolled back inside the branch."""
    log, after = [], []
    failing, waiting = chain(log, "ab", boom), chain(log, "xy", forever, y={"undoing_takes": TICK})

    async def quick():
        await asyncio.sleep(TICK)

    branches = [lambda: failing.orchestrate("a"), lambda: waiting.orchestrate("x"), quick]
    join = JoinConfig(strategy, "after", fail_fast=strategy == JoinStrategy.All)
    workflow = (
        Workflow().register_split("split", branches, join).register("after", lambda: after.append(len(log)) or "done")
    )
    workflow.add_exit_state("done")

    if strategy == JoinStrategy.All:
        assert isinstance(await failure(workflow, "split"), JoinError)
    else:
        assert await workflow.orchestrate("split") == "done"
        assert after == [8]
    assert Counter(log) == Counter(["a", "b", "x", "y", *(f"undo {name} 1" for name in "abxy")])


def test_roll_back_at_the_end_of_asyncio_run():
    """`asyncio.run` cancels what is alive when its function ends, and waits: the steps of a run left alone are undone."""
    log = []

    async def main():
        global_runs.append(chain(log, "abc", forever, b={"undoing_takes": 0.01}).start("a"))
        await asyncio.sleep(0.01)

    global_runs = []
    asyncio.run(main())

    assert log == ["a", "b", "c", "undo c 1", "undo b 1", "undo a 1"]


async def test_closed_run_tells_what_stays_done(caplog):
    """A run whose coroutine is closed cannot wait for anything: what it had done stays done, and is logged."""
    log = []
    coroutine = chain(log, "ab", forever, kind=PlainStep).orchestrate("a")
    coroutine.send(None)
    with caplog.at_level(logging.ERROR, "cano"):
        coroutine.close()

    assert log == ["a", "b"]
    text = "a run was closed before its end; not undone: task a in state a, task b in state b"
    assert [record.getMessage() for record in caplog.records] == [text]


async def test_nothing_is_kept_after_a_roll_back():
    """The outputs, the error and the task of a roll-back go with the run."""

    class Output:
        pass

    outputs = []

    class Makes(CompensatableTask):
        def run(self):
            output = Output()
            outputs.append(weakref.ref(output))
            return "last", output

        async def compensate(self, output):
            await asyncio.sleep(0)

    workflow = Workflow().register_with_compensation("a", Makes()).register("last", boom).add_exit_state("done")
    gc.disable()
    try:
        await failure(workflow)
        task = asyncio.create_task(workflow.orchestrate("a"))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait((task,))
        del task
        await asyncio.sleep(0)
        assert [output() for output in outputs if output() is not None] == []
    finally:
        gc.enable()


# --- the ledger nets to zero -----------------------------------------------------------------------------------------


@dataclass
class Part:
    """What one state of a random workflow does."""

    kind: Literal["step", "plain", "before"]
    waits: int
    undoing_waits: int


class Balance:
    """Counts what is done and not undone."""

    def __init__(self):
        self.open = Counter()
        self.begun = Counter()

    def task(self, index, part, fails, then):
        balance = self

        class Counts(CompensatableTask):
            name = f"part{index}"

            async def run(self):
                balance.begun[index] += 1
                if part.kind == "before":
                    balance.open[index] += 1  # done at once, so that a failure leaves it done
                for _ in range(part.waits):
                    await asyncio.sleep(0)
                if fails:
                    raise Boom
                if part.kind == "step":
                    balance.open[index] += 1
                return then, index

            async def compensate(self, output):
                assert output in (index, None)
                for _ in range(part.undoing_waits):
                    await asyncio.sleep(0)
                balance.open[index] -= 1

        return Counts()

    def workflow(self, parts, failing):
        workflow = Workflow()
        for index, part in enumerate(parts):
            then = "done" if index == len(parts) - 1 else index + 1
            task = self.task(index, part, index == failing, then)
            if part.kind == "plain":
                workflow.register(index, alone(task))
            else:
                workflow.register_with_compensation(index, task, register_before=part.kind == "before")
        return workflow.add_exit_state("done")


def alone(task):
    async def run():
        return (await task.run())[0]

    return run


parts_of = st.lists(
    st.builds(Part, st.sampled_from(["step", "plain", "before"]), st.integers(0, 2), st.integers(0, 2)),
    min_size=1,
    max_size=6,
)


@pytest.mark.model
@settings(deadline=None, max_examples=300)
@given(parts=parts_of, failing=st.integers(0, 6))
def test_ledger_of_a_failed_run_nets_to_zero(parts, failing):
    """Whatever the workflow and wherever it fails, nothing stays done; a run that succeeds keeps everything."""
    # SG-014, SG-015, SG-016
    balance = Balance()
    workflow = balance.workflow(parts, failing)

    if failing >= len(parts):
        assert testing.run(workflow.orchestrate(0)) == "done"
        assert balance.open == {index: 1 for index, part in enumerate(parts) if part.kind != "plain"}
    else:
        with pytest.raises(Boom):
            testing.run(workflow.orchestrate(0))
        assert not +balance.open
        assert not -balance.open


@pytest.mark.model
@settings(deadline=None, max_examples=60)
@given(parts=parts_of, failing=st.integers(0, 9), again=st.integers(1, 4))
def test_ledger_of_a_cancelled_run_nets_to_zero(parts, failing, again):
    """Wherever one or two cancels fall, either the run has succeeded and keeps everything, or nothing stays done."""

    async def cancelled_after(ticks):
        balance = Balance()
        task = asyncio.create_task(balance.workflow(parts, failing).orchestrate(0))
        for tick in range(ticks + again):
            if tick in (ticks, ticks + again - 1):
                task.cancel()
            await asyncio.sleep(0)
        await asyncio.wait((task,))
        if not task.cancelled() and task.exception() is None:
            assert balance.open == {index: 1 for index, part in enumerate(parts) if part.kind != "plain"}
        else:
            assert not +balance.open
            assert not -balance.open

    longest = sum(part.waits + part.undoing_waits + 2 for part in parts)
    for ticks in range(longest + 3):
        testing.run(cancelled_after(ticks))


# --- the definition ---------------------------------------------------------------------------------------------------


class Order(enum.Enum):
    RESERVE = 1
    CHARGE = 2
    DONE = 3


def test_definition_of_a_saga():
    """Enum states, annotations and `copy` work as for any task; the options freeze with the workflow."""
    # WF-027

    class Reserve(CompensatableTask[Order, int]):
        name = "reserve"

        async def run(self) -> tuple[Literal[Order.DONE], int]:
            return Order.DONE, 1

        async def compensate(self, output: int) -> None: ...

    workflow = Workflow[Order]().register_with_compensation(Order.RESERVE, Reserve()).add_exit_state(Order.DONE)
    copy = workflow.with_compensation_timeout(3).copy()
    workflow.validate()

    assert testing.run(copy.orchestrate(Order.RESERVE)) is Order.DONE
    with pytest.raises(ConfigurationError, match="frozen"):
        workflow.with_compensation_timeout(1)
    with pytest.raises(ConfigurationError, match="already has task reserve"):
        Workflow[Order]().register_with_compensation(Order.RESERVE, Reserve()).register(Order.RESERVE, boom)
