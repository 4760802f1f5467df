"""Error routing: which error leads to which state, what the state's task gets of it, and what always leaves the run."""

import asyncio
import enum
import gc
import typing
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, Literal, Optional

import pytest
from hypothesis import given, settings, strategies as st

import cano.testing
from cano import (
    AttemptTimeoutError,
    CanoError,
    Caught,
    ConfigurationError,
    InvalidTransitionError,
    JoinConfig,
    JoinError,
    JoinStrategy,
    JoinTimeoutError,
    NonRetryable,
    Res,
    ResourceError,
    Resources,
    RetryAfter,
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
)

# Short, for the tests that also run in real time.
STEP = 0.01
FOREVER = 3600.0


class S(enum.Enum):
    START = enum.auto()
    CHARGE = enum.auto()
    ASK = enum.auto()
    OTHER = enum.auto()
    JOINED = enum.auto()
    DONE = enum.auto()
    FAILED = enum.auto()


class Declined(Exception):
    """What failing tasks raise."""


class Stolen(Declined):
    """A subclass of it."""


class Expired(Exception):
    """Something else."""


class StolenAbroad(Expired, Stolen):
    """A class with two lines of ancestors."""


class Ours(CanoError):
    """A class that a user derived from one of cano's."""


class OurExhausted(RetryExhaustedError):
    """The same of a special one."""


def raises(error: BaseException | type[BaseException], *, waits: bool = True) -> Callable[[], Any]:
    """A task that fails, after a suspension or without any."""

    async def fail() -> S:
        if waits:
            await asyncio.sleep(0)
        raise error

    return fail


def charging(task: Any, on_error: Any, **options: Any) -> Workflow[S]:
    """CHARGE runs the task; every other state is an exit."""
    workflow = Workflow[S]().register(S.CHARGE, task, on_error=on_error, **options)
    return workflow.add_exit_states([state for state in S if state is not S.CHARGE])


async def outcome(workflow: Workflow[S], initial: S = S.CHARGE, **options: Any) -> Any:
    """The exit state reached, or the exception that left the run."""
    try:
        return await workflow.orchestrate(initial, **options)
    except BaseException as error:
        return error


async def ends(on_error: Any, error: BaseException, **options: Any) -> Any:
    """Where a task's error leads; "leaves" if it leaves the run."""
    came = await outcome(charging(raises(error), on_error, **options))
    return "leaves" if came is error or getattr(came, "__cause__", None) is error else came


def caught_by(on_error: Any, task: Any, **options: Any) -> tuple[Workflow[S], list[Any]]:
    """A workflow in which errors lead to ASK, and what the task of ASK has got."""
    seen: list[Any] = []

    def ask(error: Caught[Exception]) -> S:
        seen.append(error)
        return S.DONE

    workflow = Workflow[S]().register(S.CHARGE, task, on_error=on_error, **options).register(S.ASK, ask)
    return workflow.add_exit_states([S.DONE, S.FAILED]), seen


def problems_of(workflow: Workflow[S]) -> list[str]:
    with pytest.raises(ConfigurationError) as caught:
        workflow.validate()
    return list(caught.value.problems)


# The most specific class


@pytest.mark.parametrize(
    ("on_error", "error", "expected"),
    [
        pytest.param({Declined: S.ASK}, Declined(), S.ASK, id="its own class"),
        pytest.param({Declined: S.ASK}, Stolen(), S.ASK, id="a base"),
        pytest.param({Exception: S.FAILED}, Declined(), S.FAILED, id="Exception"),
        pytest.param({Stolen: S.ASK}, Declined(), "leaves", id="a subclass is no match"),
        pytest.param({Expired: S.ASK}, Declined(), "leaves", id="another class"),
        pytest.param({Exception: S.FAILED, Declined: S.ASK}, Stolen(), S.ASK, id="whatever the order"),
        pytest.param({Declined: S.ASK, Stolen: S.OTHER, Exception: S.FAILED}, Stolen(), S.OTHER, id="of three"),
        pytest.param({(Expired, Declined): S.ASK}, Stolen(), S.ASK, id="a tuple"),
        pytest.param({(Expired, Exception): S.FAILED, Declined: S.ASK}, Stolen(), S.ASK, id="a class beside a tuple"),
        pytest.param({Declined: S.ASK, Expired: S.OTHER}, StolenAbroad(), S.OTHER, id="the first of two bases"),
        pytest.param({Stolen: S.ASK, Exception: S.FAILED}, StolenAbroad(), S.ASK, id="the second before the last"),
        pytest.param({LookupError: S.ASK, Exception: S.FAILED}, KeyError("x"), S.ASK, id="a class of Python's"),
        pytest.param({OSError: S.ASK}, ConnectionResetError(), S.ASK, id="a grandparent"),
        pytest.param({ExceptionGroup: S.ASK}, ExceptionGroup("x", [Declined()]), S.ASK, id="a group"),
        pytest.param({Declined: S.ASK}, ExceptionGroup("x", [Declined()]), "leaves", id="a member of a group"),
        pytest.param({Exception: S.FAILED}, TypeError("x"), S.FAILED, id="a mistake in the task"),
        pytest.param({CanoError: S.ASK, Exception: S.FAILED}, Ours(), S.ASK, id="a user's CanoError"),
        pytest.param({Exception: S.FAILED}, Ours(), S.FAILED, id="a user's CanoError by Exception"),
        pytest.param({TaskExecutionError: S.ASK}, NonRetryable("x"), S.ASK, id="NonRetryable"),
        pytest.param({Exception: S.FAILED}, RetryAfter(1), S.FAILED, id="RetryAfter without retries"),
    ],
)
async def test_most_specific_class_decides(on_error: Any, error: Exception, expected: Any) -> None:
    """The first class of the error's MRO that is a key decides the next state; without one the error leaves the run."""
    assert await ends(on_error, error) == expected


@settings(max_examples=300, deadline=None)
@given(
    bases=st.lists(st.lists(st.integers(0, 9), max_size=2), min_size=1, max_size=8),
    keys=st.lists(st.integers(0, 9), min_size=1, max_size=4, unique=True),
)
def test_any_hierarchy(bases: list[list[int]], keys: list[int]) -> None:
    """In every hierarchy of classes the key that comes first in the MRO decides."""
    classes: list[type[Exception]] = [Exception]
    for number, wanted in enumerate(bases):
        parents = dict.fromkeys(classes[parent % len(classes)] for parent in wanted) or {Exception: None}
        try:
            classes.append(type(f"E{number}", tuple(parents), {}))
        except TypeError:  # no MRO
            classes.append(type(f"E{number}", (next(iter(parents)),), {}))
    states = {classes[key % len(classes)]: state for key, state in zip(keys, list(S)[2:], strict=False)}
    error = classes[-1]()
    expected = next((states[one] for one in type(error).__mro__ if one in states), error)

    assert cano.testing.run(outcome(charging(raises(error), states))) is expected


@pytest.mark.parametrize(
    "task",
    [
        pytest.param(raises(Declined()), id="after a suspension"),
        pytest.param(raises(Declined(), waits=False), id="without one"),
        pytest.param(lambda: asyncio.gather(raises(Declined())()), id="of an awaitable"),
        pytest.param(lambda: (_ for _ in ()).throw(Declined()), id="of a plain function"),
    ],
)
async def test_every_kind_of_task(task: Any) -> None:
    """However the task fails, its error leads on."""
    assert await outcome(charging(task, {Declined: S.ASK})) is S.ASK


async def test_stop_iteration_of_a_plain_function() -> None:
    """What a plain function cannot let out is the RuntimeError that the engine makes of it."""

    def task() -> S:
        raise StopIteration

    assert await outcome(charging(task, {RuntimeError: S.ASK})) is S.ASK


async def test_without_on_error_nothing_changes() -> None:
    """An error of a state that names no other leaves the run, whatever another state names."""
    error = Declined()
    workflow = Workflow[S]().register(S.START, lambda: S.CHARGE, on_error={Exception: S.ASK})

    came = await outcome(workflow.register(S.CHARGE, raises(error)).add_exit_state(S.ASK), S.START)

    assert came is error


# Retries


def fixed(retries: int, **options: Any) -> TaskConfig:
    return TaskConfig(**options).with_fixed_retry(retries, 0)


@pytest.mark.parametrize(
    ("on_error", "expected", "kind"),
    [
        pytest.param({Declined: S.ASK}, S.ASK, Stolen, id="the failure"),
        pytest.param({Exception: S.ASK}, S.ASK, Stolen, id="the failure by Exception"),
        pytest.param({RetryExhaustedError: S.ASK}, S.ASK, RetryExhaustedError, id="itself"),
        pytest.param({Stolen: S.FAILED, RetryExhaustedError: S.ASK}, S.ASK, RetryExhaustedError, id="itself before it"),
        pytest.param({CanoError: S.FAILED, Declined: S.ASK}, S.ASK, Stolen, id="the failure before a base of itself"),
        pytest.param({CanoError: S.FAILED, Exception: S.ASK}, S.ASK, Stolen, id="also by Exception"),
        pytest.param({CanoError: S.ASK}, S.ASK, RetryExhaustedError, id="a base of itself at last"),
        pytest.param({(CanoError, Expired): S.ASK}, S.ASK, RetryExhaustedError, id="the same in a tuple"),
        pytest.param({Expired: S.ASK}, None, RetryExhaustedError, id="neither"),
    ],
)
async def test_retries_exhausted(on_error: Any, expected: S | None, kind: type[Exception]) -> None:
    """The last failure decides and is what is caught, unless a key names RetryExhaustedError; its bases come last."""
    failure = Stolen()
    workflow, seen = caught_by(on_error, raises(failure), config=fixed(2))

    came = await outcome(workflow)

    caught = seen[0] if expected is S.ASK else came
    assert (came is S.DONE) == (expected is S.ASK)
    assert type(caught) is kind
    assert caught is failure or caught.__cause__ is failure


async def test_retries_come_first() -> None:
    """An error leads on only when every attempt has failed; one that succeeds in time goes its own way."""
    attempts: list[int] = []

    async def task(ctx: RunContext) -> S:
        attempts.append(ctx.attempt)
        if len(attempts) in (1, 2, 3, 4, 5):
            raise Declined
        return S.OTHER

    workflow = charging(task, {Declined: S.ASK}, config=fixed(2))

    assert [await outcome(workflow), await outcome(workflow)] == [S.ASK, S.OTHER]
    assert attempts == [1, 2, 3, 1, 2, 3]


async def test_error_that_is_not_worth_a_retry() -> None:
    """What ends the retries early leads on as it is."""
    attempts: list[None] = []

    async def task() -> S:
        attempts.append(None)
        raise NonRetryable("stolen card") from Declined()

    workflow, seen = caught_by({Declined: S.FAILED, NonRetryable: S.ASK}, task, config=fixed(5))

    assert await outcome(workflow) is S.DONE
    assert len(attempts) == 1
    assert type(seen[0]) is NonRetryable


async def test_retry_after_that_comes_too_often() -> None:
    """The last RetryAfter is the last failure."""
    workflow, seen = caught_by({RetryAfter: S.ASK, Exception: S.FAILED}, raises(RetryAfter(0)), config=fixed(1))

    await outcome(workflow)

    assert type(seen[0]) is RetryAfter


async def test_exhausted_by_hand() -> None:
    """A RetryExhaustedError that a task raises is looked at in the same way; without a cause it stands for itself."""

    async def chained() -> S:
        raise OurExhausted("x", 3) from Declined()

    without = OurExhausted("x", 3)

    assert await outcome(charging(chained, {Declined: S.ASK, CanoError: S.FAILED})) is S.ASK
    assert await outcome(charging(chained, {RetryExhaustedError: S.OTHER, Declined: S.ASK})) is S.OTHER
    assert await ends({Exception: S.ASK}, without) is S.ASK
    assert await ends({Declined: S.ASK}, without) == "leaves"


async def test_exhausted_by_a_mistake() -> None:
    """A mistake in the definition that was retried on demand is still none that Exception catches."""
    config = fixed(1, retry_on=ResourceError)
    task = raises(ResourceError("x"))

    assert type(await outcome(charging(task, {Exception: S.ASK}, config=config))) is RetryExhaustedError
    assert await outcome(charging(task, {ResourceError: S.ASK, Exception: S.FAILED}, config=config)) is S.ASK
    assert await outcome(charging(task, {CanoError: S.ASK, Exception: S.FAILED}, config=config)) is S.ASK


async def test_predicate_that_raises() -> None:
    """What a retry_on predicate raises leads on in the place of the failure."""

    def broken(_: Exception) -> bool:
        raise Expired

    config = fixed(3, retry_on=broken)

    assert await outcome(charging(raises(Declined()), {Declined: S.ASK, Expired: S.OTHER}, config=config)) is S.OTHER


# Limits


async def test_attempt_timeout() -> None:
    """An attempt that takes too long leads on, as the only one or as the last."""

    async def slow() -> S:
        await asyncio.sleep(FOREVER)
        return S.DONE

    for config in (TaskConfig(attempt_timeout=STEP), fixed(1, attempt_timeout=STEP)):
        workflow, seen = caught_by({TimeoutError: S.ASK}, slow, config=config)

        assert await outcome(workflow) is S.DONE
        assert type(seen[0]) is AttemptTimeoutError


EVERYTHING = {(Exception, CanoError, WorkflowError, TimeoutError, WorkflowTimeoutError): S.FAILED}


@pytest.mark.parametrize(
    "config", [None, fixed(3), TaskConfig(attempt_timeout=FOREVER)], ids=["plain", "retry", "limit"]
)
async def test_end_of_the_budget_is_never_caught(config: TaskConfig | None) -> None:
    """When the run's own time is up the run ends, whatever is named."""

    async def slow() -> S:
        await asyncio.sleep(FOREVER)
        return S.DONE

    came = await outcome(charging(slow, EVERYTHING, config=config), timeout=STEP)

    assert type(came) is WorkflowTimeoutError
    assert came.state is S.CHARGE


@pytest.mark.parametrize("kind", ["split", "fork", "factory"])
async def test_end_of_the_budget_in_branches(kind: str) -> None:
    """The same in the branches of a split, and between states that never suspend."""

    async def slow() -> S:
        await asyncio.sleep(FOREVER)
        return S.DONE

    join = JoinConfig(JoinStrategy.All, S.JOINED)
    workflow = Workflow[S]().register(S.OTHER, slow, on_error=EVERYTHING).add_exit_states([S.JOINED, S.FAILED])
    if kind == "fork":
        task = lambda: TaskResult.Split([S.OTHER, S.OTHER])  # noqa: E731
        workflow.register(S.CHARGE, task, join=join, on_error=EVERYTHING)
    else:
        tasks: Any = [slow, slow] if kind == "split" else slow
        workflow.register_split(S.CHARGE, tasks, join, on_error=EVERYTHING)

    assert type(await outcome(workflow, timeout=STEP)) is WorkflowTimeoutError


@pytest.mark.parametrize("target", [S.ASK, S.FAILED], ids=["a state", "an exit"])
async def test_error_in_the_place_of_the_budget(target: S) -> None:
    """A task that answers the end of the budget with an error leads on; the budget is looked at before the next attempt."""
    asked: list[None] = []

    async def stubborn() -> S:
        try:
            await asyncio.sleep(FOREVER)
        except asyncio.CancelledError:
            raise Declined from None
        return S.DONE

    workflow = Workflow[S]().register(S.CHARGE, stubborn, on_error={Declined: target})
    workflow.register(S.ASK, lambda: asked.append(None) or S.DONE).add_exit_states([S.DONE, S.FAILED])

    task = asyncio.current_task()
    came = await outcome(workflow, timeout=STEP)

    assert came is S.FAILED if target is S.FAILED else type(came) is WorkflowTimeoutError
    assert asked == []
    assert task is not None
    assert task.cancelling() == 0


async def test_end_of_another_budget_is_a_failure() -> None:
    """The timeout of a run that a task started is the task's failure, and so is one that the task raises by hand."""
    inner = Workflow[str]().register("slow", lambda: asyncio.sleep(FOREVER)).add_exit_state("done").with_timeout(STEP)

    async def nested() -> Any:
        return await inner.orchestrate("slow")

    assert await outcome(charging(nested, {WorkflowTimeoutError: S.ASK}), timeout=FOREVER) is S.ASK
    assert await ends({TimeoutError: S.ASK}, WorkflowTimeoutError("by hand")) is S.ASK


async def test_limit_of_the_next_state() -> None:
    """The limit of an attempt that failed does not bind the state that follows."""

    async def slow() -> S:
        await asyncio.sleep(3 * STEP)
        return S.DONE

    workflow = Workflow[S]().register(S.ASK, slow).add_exit_state(S.DONE)
    workflow.register(S.CHARGE, raises(Declined()), config=TaskConfig(attempt_timeout=STEP), on_error={Declined: S.ASK})

    assert await outcome(workflow) is S.DONE


# What leaves the run whatever is named


@pytest.mark.parametrize(
    "error",
    [asyncio.CancelledError("x"), GeneratorExit(), type("Own", (BaseException,), {})()],
    ids=lambda e: type(e).__name__,
)
async def test_base_exceptions_pass(error: BaseException) -> None:
    """What is no Exception leaves the run as it is."""
    assert await outcome(charging(raises(error), EVERYTHING)) is error


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_the_end_of_the_process_passes(kind: type[BaseException]) -> None:
    """KeyboardInterrupt and SystemExit end the loop as well."""
    with pytest.raises(kind):
        cano.testing.run(charging(raises(kind()), EVERYTHING).orchestrate(S.CHARGE))


def wrong_tasks() -> dict[str, tuple[Any, type[Exception], dict[str, Any]]]:
    """For each mistake in a definition that shows at run time: a task, the error, and options."""

    def takes_resource(value: Annotated[int, Res("missing")]) -> S:
        return S.DONE

    def takes_result(result: SplitResult) -> S:
        return S.DONE

    def takes_other(res: Resources) -> S:
        return res.get("also missing")

    def declares() -> Literal[S.DONE]:
        return S.FAILED  # type: ignore[return-value]

    join = JoinConfig(JoinStrategy.Quorum(3), S.JOINED)
    return {
        "no state": (lambda: 42, InvalidTransitionError, {}),
        "undeclared": (declares, InvalidTransitionError, {}),
        "a state unknown": (lambda: S.START, UnknownStateError, {}),
        "split without a join": (lambda: TaskResult.Split([S.DONE]), WorkflowError, {}),
        "split into the unknown": (lambda: TaskResult.Split([S.START]), UnknownStateError, {"join": join}),
        "split that cannot join": (lambda: TaskResult.Split([S.DONE]), ConfigurationError, {"join": join}),
        "no such resource": (takes_resource, ResourceError, {}),
        "no such resource by hand": (takes_other, ResourceError, {}),
    }


@pytest.mark.parametrize("mistake", wrong_tasks())
async def test_mistake_in_the_definition(mistake: str) -> None:
    """Neither Exception nor a class of Python's hides a mistake in the definition; a class of cano's catches it."""
    task, kind, options = wrong_tasks()[mistake]
    foreign = {(Exception, ValueError, LookupError, KeyError, TypeError): S.FAILED}

    def workflow(on_error: Any) -> Workflow[S]:
        workflow = Workflow[S]().register(S.CHARGE, task, on_error=on_error, **options)
        return workflow.add_exit_states([S.DONE, S.FAILED, S.ASK, S.JOINED])

    assert isinstance(await outcome(workflow(foreign)), kind)
    assert await outcome(workflow({kind: S.ASK, **foreign})) is S.ASK
    assert await outcome(workflow({CanoError: S.ASK, **foreign})) is S.ASK


async def test_factory_that_makes_nonsense() -> None:
    """Branches that are none are a mistake in the definition; what their factory raises is not."""
    join = JoinConfig(JoinStrategy.All, S.DONE)

    def workflow(factory: Any) -> Workflow[S]:
        workflow = Workflow[S]().register_split(S.CHARGE, factory, join, on_error={Exception: S.FAILED})
        return workflow.add_exit_states([S.DONE, S.FAILED])

    assert type(await outcome(workflow(lambda: [5]))) is ConfigurationError
    assert await outcome(workflow(raises(Declined()))) is S.FAILED


async def test_panic_of_a_native_extension() -> None:
    """A panic is a failure of the task."""
    panic = type("PanicException", (BaseException,), {"__module__": "pyo3_runtime"})

    assert await outcome(charging(raises(panic("x")), {TaskExecutionError: S.ASK})) is S.ASK


# Cancellation


async def cancelled_in(workflow: Workflow[S], **options: Any) -> tuple[Any, int]:
    """Cancel a run once it waits; what comes of it, and how many cancels its task still counts."""
    running = asyncio.create_task(outcome(workflow, **options))
    await asyncio.sleep(STEP)
    running.cancel("enough")
    return await running, running.cancelling()


async def test_cancel_passes() -> None:
    """A cancelled run ends with the cancellation, in the failing state and in the one that the error led to."""

    async def waits(error: Caught[Declined] | None) -> S:
        await asyncio.sleep(FOREVER)
        return S.DONE

    workflow = Workflow[S]().register(S.CHARGE, waits, on_error=EVERYTHING).register(S.ASK, waits, on_error=EVERYTHING)
    workflow.register(S.START, raises(Declined()), on_error={Declined: S.ASK}).add_exit_states([S.DONE, S.FAILED])

    for initial in (S.CHARGE, S.START):
        came, cancelling = await cancelled_in(workflow, initial=initial)

        assert type(came) is asyncio.CancelledError
        assert came.args == ("enough",)
        assert cancelling == 1


@pytest.mark.parametrize(
    "config", [None, fixed(3), TaskConfig(attempt_timeout=FOREVER)], ids=["plain", "retry", "limit"]
)
async def test_error_in_the_place_of_a_cancellation(config: TaskConfig | None) -> None:
    """A task that answers a cancel with an error has been told to stop, and so has the run: the error leaves it."""

    async def converts() -> S:
        try:
            await asyncio.sleep(FOREVER)
        except asyncio.CancelledError:
            raise Declined from None
        return S.DONE

    came, cancelling = await cancelled_in(charging(converts, EVERYTHING, config=config))

    assert type(came) is Declined
    assert cancelling == 1


async def test_error_in_the_place_of_an_attempts_end() -> None:
    """A task that answers the end of its attempt with an error is not told to stop by anybody else: the error leads on."""

    async def converts() -> S:
        try:
            await asyncio.sleep(FOREVER)
        except asyncio.CancelledError:
            raise Declined from None
        return S.DONE

    workflow = charging(converts, {Declined: S.ASK}, config=TaskConfig(attempt_timeout=STEP))

    assert await outcome(workflow) is S.ASK


async def test_error_of_a_loser_that_is_cancelled() -> None:
    """A branch that answers its cancellation with an error does not go on to another state."""
    entered: list[None] = []

    async def converts() -> S:
        try:
            await asyncio.sleep(FOREVER)
        except asyncio.CancelledError:
            raise Declined from None
        return S.JOINED

    async def quick() -> S:
        await asyncio.sleep(STEP)
        return S.JOINED

    workflow = Workflow[S]().register(S.ASK, lambda: entered.append(None) or S.JOINED).add_exit_state(S.JOINED)
    workflow.register(S.OTHER, converts, on_error={Declined: S.ASK}).register(S.DONE, quick)
    join = JoinConfig(JoinStrategy.Any, S.JOINED)
    workflow.register(S.CHARGE, lambda: TaskResult.Split([S.OTHER, S.DONE]), join=join)

    assert await outcome(workflow) is S.JOINED
    assert entered == []


async def test_cancel_that_was_swallowed_before() -> None:
    """A cancel that an earlier state has lived through keeps no later error from leading on."""

    async def swallows() -> S:
        try:
            await asyncio.sleep(FOREVER)
        except asyncio.CancelledError:
            return S.CHARGE
        return S.DONE

    workflow = charging(raises(Declined()), {Declined: S.ASK}).copy()
    workflow._exits.pop(S.START)

    came, cancelling = await cancelled_in(workflow.register(S.START, swallows), initial=S.START)

    assert came is S.ASK
    assert cancelling == 1


async def test_cancel_in_the_turn_of_the_failure() -> None:
    """A cancel that arrives when the failure is on its way already is delivered where the run next waits."""
    entered: list[str] = []

    async def charge() -> S:
        running.cancel("enough")  # pending: nothing waits that it could interrupt
        raise Declined

    async def ask() -> S:
        entered.append("ask")
        await asyncio.sleep(FOREVER)
        return S.DONE

    workflow = Workflow[S]().register(S.CHARGE, charge, on_error={Declined: S.ASK}).register(S.ASK, ask)
    running = asyncio.create_task(outcome(workflow.add_exit_state(S.DONE)))

    assert type(await running) is asyncio.CancelledError
    assert entered == ["ask"]


async def test_cancel_through_the_handle() -> None:
    """A run that is cancelled through its handle says so, whatever its task makes of it."""

    async def waits() -> S:
        await asyncio.sleep(FOREVER)
        return S.DONE

    run = charging(waits, EVERYTHING).start(S.CHARGE)
    await asyncio.sleep(STEP)
    run.cancel("enough")

    with pytest.raises(WorkflowCancelledError):
        await run


# Splits and forks

ALL = JoinStrategy.All


def split(on_error: Any, *branches: Any, strategy: JoinStrategy = ALL, **options: Any) -> Workflow[S]:
    workflow = Workflow[S]().register_split(
        S.CHARGE, branches, JoinConfig(strategy, S.JOINED, **options), on_error=on_error
    )
    return workflow.add_exit_states([S.JOINED, S.ASK, S.FAILED])


async def one() -> int:
    await asyncio.sleep(0)
    return 1


async def test_split_that_fails() -> None:
    """A join that fails leads on by its own class, not by what its branches raised; the result is in the error."""
    seen: list[JoinError] = []

    def ask(error: Caught[JoinError]) -> S:
        seen.append(error)
        return S.DONE

    join = JoinConfig(ALL, S.JOINED)
    workflow = Workflow[S]().register(S.ASK, ask).add_exit_states([S.JOINED, S.DONE, S.FAILED])
    workflow.register_split(S.CHARGE, [one, raises(Declined())], join, on_error={Declined: S.FAILED, JoinError: S.ASK})

    assert await outcome(workflow) is S.DONE
    assert [type(error) for error in seen[0].exceptions] == [Declined]
    assert seen[0].result is not None
    assert seen[0].result.values() == [1]
    assert seen[0].state is S.CHARGE


@pytest.mark.parametrize(
    ("on_error", "expected"),
    [
        pytest.param({JoinError: S.ASK}, S.ASK, id="JoinError"),
        pytest.param({JoinTimeoutError: S.ASK, JoinError: S.FAILED}, S.ASK, id="JoinTimeoutError"),
        pytest.param({Exception: S.FAILED}, S.FAILED, id="Exception"),
        pytest.param({ExceptionGroup: S.ASK, Exception: S.FAILED}, S.ASK, id="ExceptionGroup"),
    ],
)
async def test_split_that_takes_too_long(on_error: Any, expected: S) -> None:
    """A split that is not decided in time leads on, once its branches have ended."""

    async def slow() -> None:
        await asyncio.sleep(FOREVER)

    assert await outcome(split(on_error, one, slow, timeout=STEP)) is expected


async def test_split_that_succeeds() -> None:
    """A failure that the strategy allows leads nowhere."""
    workflow = split({Exception: S.FAILED}, one, raises(Declined()), strategy=JoinStrategy.Any)

    assert await outcome(workflow) is S.JOINED


async def test_branch_with_retries() -> None:
    """A branch is no state: however it is run, its failure is the join's affair."""
    task = raises(Declined())
    configured = type("Configured", (), {"config": fixed(1), "run": staticmethod(task)})()

    assert await outcome(split({(Declined, RetryExhaustedError): S.FAILED, JoinError: S.ASK}, configured)) is S.ASK


def fork(on_error: Any, first: Any, branch_errors: Any, *branches: Any) -> Workflow[S]:
    """CHARGE runs the first task, OTHER and START run the branches and join into JOINED."""
    workflow = Workflow[S]().register(S.CHARGE, first, join=JoinConfig(ALL, S.JOINED), on_error=on_error)
    for state, branch in zip((S.OTHER, S.START), branches, strict=False):
        workflow.register(state, branch, on_error=branch_errors)
    return workflow.add_exit_states([S.JOINED, S.FAILED])


def forks() -> TaskResult[S]:
    return TaskResult.Split([S.OTHER, S.START])


@pytest.mark.parametrize("waits", [False, True], ids=["at once", "later"])
async def test_error_inside_a_branch_of_states(waits: bool) -> None:  # noqa: FBT001
    """A branch that runs through states follows their errors, and ends where they lead."""
    seen: list[Any] = []

    def ask(error: Caught[Declined], ctx: RunContext) -> S:
        seen.append((error, ctx.branch, ctx.visit))
        return S.FAILED

    def joined(result: SplitResult) -> S:
        seen.append(result.values())
        return S.DONE

    failure = Declined()
    workflow = Workflow[S]().register(S.CHARGE, forks, join=JoinConfig(ALL, S.JOINED))
    workflow.register(S.OTHER, raises(failure, waits=waits), on_error={Declined: S.ASK}).register(S.ASK, ask)
    workflow.register(S.START, lambda: S.JOINED).register(S.JOINED, joined).add_exit_states([S.DONE, S.FAILED])

    assert await outcome(workflow) is S.DONE
    assert seen == [(failure, 0, 1), [S.FAILED, S.JOINED]]
    assert failure.__notes__ == ["state=OTHER task=raises.<locals>.fail branch=0 attempt=1/1 path=OTHER"]


async def test_error_that_leads_to_the_joined_state() -> None:
    """A branch that an error leads to the joined state has succeeded."""
    workflow = fork({Exception: S.FAILED}, forks, {Declined: S.JOINED}, raises(Declined()), raises(Declined()))

    assert await outcome(workflow) is S.JOINED


async def test_fork_that_fails() -> None:
    """The task of a fork leads on by its own error, and by that of its join."""
    failing = raises(Declined())

    assert await outcome(fork({Declined: S.FAILED}, failing, None)) is S.FAILED
    assert await outcome(fork({JoinError: S.FAILED}, forks, None, failing, failing)) is S.FAILED
    assert type(await outcome(fork({Declined: S.FAILED}, forks, None, failing, failing))) is JoinError


async def test_nested_splits() -> None:
    """An inner split whose error is caught in its branch is no failure of the outer one."""
    inner = Workflow[S]().register_split(
        S.OTHER, [raises(Declined())], JoinConfig(ALL, S.DONE), on_error={JoinError: S.ASK}
    )
    inner.register(S.ASK, lambda: S.JOINED).register(S.START, lambda: S.JOINED)
    inner.register(S.CHARGE, forks, join=JoinConfig(ALL, S.JOINED), on_error={JoinError: S.FAILED})

    assert await outcome(inner.add_exit_states([S.JOINED, S.DONE, S.FAILED])) is S.JOINED


async def test_error_that_leads_to_a_split() -> None:
    """A state that errors lead to may be a split; the function that makes its branches may take the error."""
    seen: list[Any] = []

    def branches(error: Caught[Declined]) -> list[Any]:
        seen.append(error)
        return [one, one]

    failure = Declined()
    workflow = Workflow[S]().register(S.CHARGE, raises(failure), on_error={Declined: S.ASK})
    workflow.register_split(S.ASK, branches, JoinConfig(ALL, S.DONE)).add_exit_state(S.DONE)

    assert await outcome(workflow) is S.DONE
    assert seen == [failure]


# The path


async def test_path_and_visits() -> None:
    """A state that an error leads to is entered like any other: it is in the path, and its visits count."""
    keys: list[tuple[S, int, str]] = []

    def charge(ctx: RunContext) -> S:
        keys.append((ctx.state, ctx.visit, ctx.idempotency_key))
        raise Declined

    def ask(ctx: RunContext) -> S:
        keys.append((ctx.state, ctx.visit, ctx.idempotency_key))
        return S.CHARGE if ctx.visit < 2 else S.DONE

    workflow = Workflow[S]().register(S.CHARGE, charge, on_error={Declined: S.ASK}).register(S.ASK, ask)
    run = workflow.add_exit_state(S.DONE).start(S.CHARGE)
    await run

    assert run.path == [S.CHARGE, S.ASK, S.CHARGE, S.ASK, S.DONE]
    assert [entry[:2] for entry in keys] == [(S.CHARGE, 1), (S.ASK, 1), (S.CHARGE, 2), (S.ASK, 2)]
    assert len({key for *_, key in keys}) == 4


async def test_error_that_leads_to_an_exit() -> None:
    """An error may end the run: the exit state is what it returns."""
    run = charging(raises(Declined()), {Declined: S.FAILED}).start(S.CHARGE)

    assert await run is S.FAILED
    assert run.state is S.FAILED
    assert run.path == [S.CHARGE, S.FAILED]


@pytest.mark.parametrize("kind", ["plain", "async"])
async def test_error_that_leads_back_lets_others_run(kind: str) -> None:
    """A state whose errors lead to itself keeps the loop no longer than any other: one turn in 1,024 transitions."""
    count, seen = 0, []

    def plain() -> S:
        nonlocal count
        count += 1
        if count < 5000:
            raise Declined
        return S.DONE

    async def asynchronous() -> S:
        return plain()

    async def other() -> None:
        while True:
            seen.append(count)
            await asyncio.sleep(0)

    beside = asyncio.create_task(other())
    workflow = charging(plain if kind == "plain" else asynchronous, {Declined: S.CHARGE})
    assert await outcome(workflow) is S.DONE
    beside.cancel()
    await asyncio.wait([beside])

    assert seen[:4] == [1023, 2047, 3071, 4095]


async def test_declared_states_bind_results_alone() -> None:
    """A state that an error leads to need not be among those that the task declares to return."""

    async def task() -> Literal[S.DONE]:
        raise Declined

    assert await outcome(charging(task, {Declined: S.ASK})) is S.ASK


# What the task gets


async def test_caught_is_the_error_itself() -> None:
    """The task gets the very object that was raised, with the note and the facts it would have left the run with."""
    failure = Declined("no funds")
    workflow, seen = caught_by({Declined: S.ASK}, raises(failure), config=fixed(1))

    await outcome(workflow, workflow_id="order-1")

    assert seen[0] is failure
    assert failure.__notes__ == ["workflow_id='order-1' state=CHARGE task=raises.<locals>.fail attempt=2/2 path=CHARGE"]
    assert failure.__cano__.state is S.CHARGE  # type: ignore[attr-defined]
    assert failure.__cano__.attempt == 2  # type: ignore[attr-defined]
    assert failure.__traceback__ is not None
    assert failure.__traceback__.tb_frame.f_code.co_name == "fail"


def with_parameter(annotation: Any) -> tuple[Any, list[Any]]:
    """A task with one parameter of that annotation, and what it gets."""
    seen: list[Any] = []

    def ask(error: Any) -> S:
        seen.append(error)
        return S.DONE

    ask.__annotations__["error"] = annotation
    return ask, seen


@pytest.mark.parametrize(
    "annotation",
    [
        pytest.param(Caught[Declined], id="class"),
        pytest.param(Caught[Exception], id="base"),
        pytest.param(Caught[Stolen | Expired], id="union"),
        pytest.param(Caught[Declined | Expired] | None, id="union or None"),
        pytest.param(Caught[Declined] | None, id="or None"),
        pytest.param(None | Caught[Declined], id="None or"),
        pytest.param(Optional[Caught[Declined]], id="Optional"),  # noqa: UP045
        pytest.param(typing.Union[Caught[Declined], None], id="Union"),  # noqa: UP007
        pytest.param("Caught[Declined] | None", id="text"),
        pytest.param(Annotated[Caught[Declined], "the reason"], id="annotated"),
    ],
)
async def test_annotations_that_take_the_error(annotation: Any) -> None:
    """A parameter takes the error by its class, a base or a union of classes, and may do without."""
    ask, seen = with_parameter(annotation)
    failure = Stolen()
    workflow = Workflow[S]().register(S.CHARGE, raises(failure), on_error={Declined: S.ASK}).register(S.ASK, ask)

    await outcome(workflow.add_exit_state(S.DONE))

    assert seen == [failure]


async def test_error_beside_other_parameters() -> None:
    """The error is one parameter of many, by position or by keyword, of a function or a method."""
    seen: list[Any] = []

    class Ask:
        def run(self, ctx: RunContext, *, res: Resources, error: Caught[Declined] | None = None) -> S:
            seen.extend([ctx.state, type(res), type(error)])
            return S.DONE

    workflow = Workflow[S]().register(S.CHARGE, raises(Declined()), on_error={Declined: S.ASK}).register(S.ASK, Ask())

    await outcome(workflow.add_exit_state(S.DONE))

    assert seen == [S.ASK, Resources, Declined]


async def test_task_that_does_not_ask() -> None:
    """A task that errors lead to need not take them."""
    workflow = Workflow[S]().register(S.CHARGE, raises(Declined()), on_error={Declined: S.ASK})

    assert await outcome(workflow.register(S.ASK, lambda: S.DONE).add_exit_state(S.DONE)) is S.DONE


async def test_error_is_optional() -> None:
    """A state that is also entered in other ways asks for ``Caught[E] | None``, and gets None then."""
    ask, seen = with_parameter(Caught[Declined] | None)
    workflow = Workflow[S]().register(S.CHARGE, raises(Declined()), on_error={Declined: S.ASK}).register(S.ASK, ask)
    workflow.register(S.START, lambda: S.ASK).add_exit_state(S.DONE)

    for initial in (S.CHARGE, S.START, S.ASK):
        await outcome(workflow, initial)

    assert [type(error) for error in seen] == [Declined, type(None), type(None)]


async def test_error_or_result() -> None:
    """A state that both a split and an error lead to gets what it was entered with."""
    seen: list[Any] = []

    def joined(result: SplitResult | None, error: Caught[JoinError] | None) -> S:
        seen.append((type(result), type(error)))
        return S.DONE

    def workflow(*branches: Any) -> Workflow[S]:
        join = JoinConfig(ALL, S.JOINED)
        workflow = Workflow[S]().register_split(S.CHARGE, branches, join, on_error={JoinError: S.JOINED})
        return workflow.register(S.JOINED, joined).add_exit_state(S.DONE)

    await outcome(workflow(one))
    await outcome(workflow(raises(Declined())))

    assert seen == [(SplitResult, type(None)), (type(None), JoinError)]


async def test_error_is_kept_for_every_attempt() -> None:
    """Each attempt of the task gets the same error."""
    seen: list[Any] = []

    async def ask(error: Caught[Declined]) -> S:
        seen.append(error)
        if len(seen) < 3:
            raise Expired
        return S.DONE

    failure = Declined()
    workflow = Workflow[S]().register(S.CHARGE, raises(failure), on_error={Declined: S.ASK})

    await outcome(workflow.register(S.ASK, ask, config=fixed(2)).add_exit_state(S.DONE))

    assert seen == [failure] * 3


async def test_error_is_kept_for_one_visit() -> None:
    """The error belongs to the visit it led to; a later visit of the same state does not get it."""
    seen: list[Any] = []

    def ask(error: Caught[Declined] | None) -> S:
        seen.append(error)
        return S.ASK if len(seen) == 1 else S.DONE

    failure = Declined()
    workflow = Workflow[S]().register(S.CHARGE, raises(failure), on_error={Declined: S.ASK}).register(S.ASK, ask)

    await outcome(workflow.add_exit_state(S.DONE))

    assert seen == [failure, None]


async def test_errors_in_a_row() -> None:
    """Each error replaces the one before."""
    seen: list[Any] = []

    def ask(error: Caught[Declined]) -> S:
        seen.append(error)
        raise Expired

    def other(error: Caught[Expired]) -> S:
        seen.append(error)
        return S.DONE

    workflow = Workflow[S]().register(S.CHARGE, raises(Declined()), on_error={Declined: S.ASK}).add_exit_state(S.DONE)
    workflow.register(S.ASK, ask, on_error={Expired: S.OTHER}).register(S.OTHER, other)

    await outcome(workflow)

    assert [type(error) for error in seen] == [Declined, Expired]


async def test_error_required_in_another_way() -> None:
    """A task that requires an error fails when its state is entered without one, and the error says what to do."""
    workflow, _ = caught_by({Declined: S.ASK}, raises(Declined()))

    came = await outcome(workflow, S.ASK)

    assert type(came) is WorkflowError
    assert str(came) == (
        "the task takes Caught[Exception], but its state was not entered through on_error; "
        "annotate the parameter Caught[Exception] | None"
    )
    assert came.state is S.ASK


@pytest.mark.parametrize("annotation", [Caught[Stolen], Caught[Stolen] | None], ids=["required", "optional"])
async def test_error_of_another_class(annotation: Any) -> None:
    """An error that is none of those the task takes is not handed over, nor hidden: the run says what would take it."""
    ask, seen = with_parameter(annotation)
    workflow = Workflow[S]().register(S.CHARGE, raises(Expired()), on_error={Exception: S.ASK}).register(S.ASK, ask)

    came = await outcome(workflow.add_exit_state(S.DONE))

    assert type(came) is WorkflowError
    assert str(came) == (
        "the task takes Caught[Stolen], but its state was entered with Expired; "
        "annotate the parameter Caught[Stolen | Expired]"
    )
    assert seen == []


@pytest.mark.parametrize(
    "asked", [Caught, Caught[Any], Caught[int], Caught[BaseException], Caught[Declined | None], Caught["Declined"]]
)
def test_error_of_no_class(asked: Any) -> None:
    """What is taken are subclasses of Exception, which a task must name."""
    ask, _ = with_parameter(asked)

    with pytest.raises(ConfigurationError, match="Caught must be given subclasses of Exception"):
        Workflow[S]().register(S.ASK, ask)


# Errors of the state that an error led to


async def test_error_of_the_next_state() -> None:
    """What the next state raises leaves the run as it is: the caught error is not chained to it."""
    failure = Expired()
    workflow = Workflow[S]().register(S.CHARGE, raises(Declined()), on_error={Declined: S.ASK})

    came = await outcome(workflow.register(S.ASK, raises(failure)).add_exit_state(S.DONE))

    assert came is failure
    assert came.__context__ is None
    assert came.__cause__ is None
    assert came.__notes__ == ["state=ASK task=raises.<locals>.fail attempt=1/1 path=CHARGE>ASK"]


async def test_error_raised_from_the_caught_one() -> None:
    """``raise X from error`` chains the caught error as anywhere."""

    async def ask(error: Caught[Declined]) -> S:
        raise Expired from error

    failure = Declined()
    workflow = Workflow[S]().register(S.CHARGE, raises(failure), on_error={Declined: S.ASK}).register(S.ASK, ask)

    came = await outcome(workflow.add_exit_state(S.DONE))

    assert type(came) is Expired
    assert came.__cause__ is failure
    assert "state=CHARGE" in failure.__notes__[0]


async def test_caught_error_raised_again() -> None:
    """A caught error that is raised again leaves the run as the same object, with the note of where it first failed."""

    async def ask(error: Caught[Declined]) -> S:
        raise error

    failure = Declined()
    workflow = Workflow[S]().register(S.CHARGE, raises(failure), on_error={Declined: S.ASK}).register(S.ASK, ask)

    came = await outcome(workflow.add_exit_state(S.DONE))

    assert came is failure
    assert failure.__notes__ == ["state=CHARGE task=raises.<locals>.fail attempt=1/1 path=CHARGE"]
    gc.collect()  # an error raised by who has it as a parameter is in a cycle with that frame


async def test_state_does_not_catch_for_another() -> None:
    """What on_error names is for errors of its own state, not for those of the states it leads to."""
    failure = Expired()
    workflow = Workflow[S]().register(S.CHARGE, raises(Declined()), on_error={Exception: S.ASK})

    assert await outcome(workflow.register(S.ASK, raises(failure)).add_exit_state(S.DONE)) is failure


# Definition


def test_problems_are_found_with_all_others() -> None:
    """Targets that nobody registered, states that only a missing edge could reach, and errors nobody brings are reported."""

    def ask(error: Caught[Declined]) -> Literal[S.DONE]:
        return S.DONE

    def takes(error: Caught[Declined]) -> None: ...

    def charge() -> Literal[S.DONE]:
        return S.DONE

    workflow = Workflow[S](name="w").register(S.CHARGE, charge, on_error={Declined: S.FAILED, Expired: S.OTHER})
    workflow.register(S.ASK, ask).register_split(S.START, [takes], JoinConfig(ALL, S.DONE)).add_exit_state(S.DONE)

    assert problems_of(workflow) == [
        "state CHARGE leads to FAILED, which is neither registered nor an exit state",
        "state CHARGE leads to OTHER, which is neither registered nor an exit state",
        "state ASK cannot be reached from the initial state",
        "state START cannot be reached from the initial state",
        "the task of state ASK takes a Caught error, but no on_error leads to that state",
        "a branch of the split in state START takes a Caught error, which only the task of a state gets",
    ]


def test_target_of_a_task_that_declares_nothing() -> None:
    """A missing target is reported whatever the task may return."""
    workflow = charging(raises(Declined()), {Declined: S.CHARGE}).copy()
    workflow._exits.pop(S.ASK)

    workflow.register(S.ASK, lambda: S.DONE, on_error={Declined: "nowhere"})  # type: ignore[dict-item]

    assert problems_of(workflow) == ["state ASK leads to nowhere, which is neither registered nor an exit state"]


def test_missing_targets_do_not_hide_who_takes_an_error() -> None:
    """A state that a split in trouble leads to by error counts as one that errors lead to."""
    ask, _ = with_parameter(Caught[Declined])
    workflow = Workflow[S]().register_split(S.CHARGE, [one], JoinConfig(ALL, S.OTHER), on_error={JoinError: S.ASK})
    workflow.register(S.ASK, ask).add_exit_state(S.DONE)

    assert problems_of(workflow) == [
        "the split in state CHARGE joins into OTHER, which is neither registered nor an exit state"
    ]


def test_errors_are_ways_through_the_graph() -> None:
    """A state that only an error leads to is reached, and one that only an error leaves has a way out."""

    def charge() -> Literal[S.CHARGE]:
        return S.CHARGE

    def ask() -> Literal[S.DONE]:
        return S.DONE

    workflow = Workflow[S]().register(S.CHARGE, charge, on_error={Declined: S.ASK}).register(S.ASK, ask)
    workflow.add_exit_state(S.DONE).validate()


def test_way_out_that_is_none() -> None:
    """An error that leads back is no way out."""

    def charge() -> Literal[S.CHARGE]:
        return S.CHARGE

    workflow = Workflow[S]().register(S.CHARGE, charge, on_error={Declined: S.CHARGE}).add_exit_state(S.DONE)

    assert problems_of(workflow) == ["state CHARGE has no way to an exit state"]


async def test_exit_state_with_a_task() -> None:
    """An exit state ends the run; what was registered for it, its errors included, does not count."""
    workflow = Workflow[S]().register(S.DONE, raises(Declined()), on_error={Declined: S.ASK})
    workflow.register(S.CHARGE, lambda: S.DONE).add_exit_state(S.DONE)

    assert await outcome(workflow) is S.DONE


async def test_decorator_and_copy() -> None:
    """`task` takes on_error as `register` does, and a copy of the workflow has it."""
    workflow = Workflow[S]().add_exit_states([S.ASK, S.DONE])

    @workflow.task(S.CHARGE, on_error={Declined: S.ASK})
    async def charge() -> S:
        raise Declined

    assert await outcome(workflow) is S.ASK
    assert await outcome(workflow.copy()) is S.ASK


async def test_mapping_is_read_once() -> None:
    """What becomes of the mapping after registration changes nothing."""
    on_error: dict[Any, S] = {Declined: S.ASK}
    workflow = charging(raises(Declined()), on_error)

    on_error[Declined] = S.FAILED

    assert await outcome(workflow) is S.ASK


async def test_states_of_any_kind() -> None:
    """An equal state is the same state, whatever object names it."""
    workflow = Workflow[Any]().register("charge", raises(Declined()), on_error={Declined: 1.0})

    assert await workflow.add_exit_state(1).orchestrate("charge") == 1


ON_ERROR: dict[str, Callable[[Any], object]] = {
    "register": lambda on_error: Workflow[S]().register(S.CHARGE, one, on_error=on_error),
    "register_split": lambda on_error: Workflow[S]().register_split(
        S.CHARGE, [], JoinConfig(ALL, S.DONE), on_error=on_error
    ),
    "task": lambda on_error: Workflow[S]().task(S.CHARGE, on_error=on_error)(one),
}


@pytest.mark.parametrize(
    ("on_error", "text"),
    [
        pytest.param(
            {}, "on_error of state CHARGE must have a key, got {}; None leaves every error as it is", id="empty"
        ),
        pytest.param(
            Declined,
            "on_error of state CHARGE must be a mapping from exception classes to states, got <class ",
            id="class",
        ),
        pytest.param(
            [(Declined, S.ASK)],
            "on_error of state CHARGE must be a mapping from exception classes to states, ",
            id="list",
        ),
        *(
            pytest.param(
                {key: S.ASK},
                "a key in on_error of state CHARGE must be a subclass of Exception or a tuple of them, ",
                id=name,
            )
            for name, key in {
                "BaseException": BaseException,
                "CancelledError": asyncio.CancelledError,
                "KeyboardInterrupt": KeyboardInterrupt,
                "BaseExceptionGroup": BaseExceptionGroup,
                "instance": Declined(),
                "no exception": int,
                "text": "Declined",
                "None": None,
                "empty tuple": (),
                "tuple with a number": (Declined, 5),
                "tuple in a tuple": (Declined, (Expired,)),
                "generic": ExceptionGroup[Declined],
            }.items()
        ),
        pytest.param(
            {Declined: S.ASK, (Expired, Declined): S.OTHER},
            "on_error of state CHARGE must name each class once, got Declined twice",
            id="twice",
        ),
        pytest.param({Declined: []}, "a state must be hashable, got []", id="no state"),
        pytest.param({Declined: S}, "S is the Enum class", id="Enum class"),
    ],
)
@pytest.mark.parametrize("door", ON_ERROR)
def test_on_error_that_is_none(door: str, on_error: Any, text: str) -> None:
    """What is no mapping from subclasses of Exception to states is refused where it is registered."""
    with pytest.raises(ConfigurationError) as caught:
        ON_ERROR[door](on_error)

    assert str(caught.value).startswith(text)


def test_refused_registration_changes_nothing() -> None:
    """A state whose on_error is refused can be registered anew."""
    workflow = Workflow[S]()

    with pytest.raises(ConfigurationError):
        workflow.register(S.CHARGE, one, on_error={})

    assert workflow.register(S.CHARGE, one).registered_states == {S.CHARGE}


async def test_run_by_hand_needs_no_loop() -> None:
    """Errors lead on wherever a coroutine can be stepped."""
    coroutine: Awaitable[S] = charging(raises(Declined(), waits=False), {Declined: S.ASK}).orchestrate(S.CHARGE)

    with pytest.raises(StopIteration) as stop:
        coroutine.__await__().send(None)  # type: ignore[attr-defined]

    assert stop.value.value is S.ASK
