"""The plain-Python engine, opponent of the benchmarks and oracle of the property tests, keeps the rules itself."""

import asyncio
import contextvars
import gc
import time
import weakref
from enum import Enum, auto
from functools import partial

import pytest

from benches.pure_python import (
    AttemptTimeoutError,
    Caught,
    ConfigurationError,
    InvalidTransitionError,
    JoinConfig,
    JoinError,
    JoinStrategy,
    JoinTimeoutError,
    NonRetryable,
    RetryAfter,
    RetryExhaustedError,
    RetryMode,
    SplitResult,
    TaskConfig,
    TaskExecutionError,
    TaskResult,
    UnknownStateError,
    Workflow,
    WorkflowError,
    WorkflowTimeoutError,
)
from benches.pure_python.split import Split

TICK = 0.02
NO_DELAY = RetryMode.fixed(2, 0)
All, Any, PartialTimeout = JoinStrategy.All, JoinStrategy.Any, JoinStrategy.PartialTimeout
Quorum, Percentage, PartialResults = JoinStrategy.Quorum, JoinStrategy.Percentage, JoinStrategy.PartialResults


class S(Enum):
    START = auto()
    WORK = auto()
    JOINED = auto()
    DONE = auto()


def go(state):
    async def task():
        return state

    return task


def value(result, ticks=0, trace=None):
    """A branch that ends with the result, or with the exception, after so many ticks."""

    async def branch():
        try:
            if ticks:
                await asyncio.sleep(ticks * TICK)
        finally:
            if trace is not None:
                trace.append(result)
        if isinstance(result, BaseException):
            raise result
        return result

    return branch


def one_task(task, **options):
    return Workflow().register(S.START, task, **options).add_exit_state(S.DONE)


def split(tasks, strategy=All, **options):
    """A workflow of one split; `joined(workflow)` gives its result."""
    return Workflow().register_split(S.START, tasks, JoinConfig(strategy, S.JOINED, **options)).add_exit_state(S.DONE)


async def joined(workflow):
    results = []

    async def keep(result: SplitResult):
        results.append(result)
        return S.DONE

    await workflow.register(S.JOINED, keep).orchestrate(S.START)
    return results[0]


def ends(result):
    """Values and errors by branch, and the indices of the cancelled."""
    return {
        o.index: o.value if o.error is None else o.error for o in result.successes + result.errors
    }, result.cancelled


# Transitions


class Task:
    async def run(self):
        return S.DONE


class Later:
    def __await__(self):
        yield from asyncio.sleep(0).__await__()
        return S.DONE


def later():
    return Later()


class Charge:
    name = "charge"
    config = TaskConfig(retry=NO_DELAY)

    def __init__(self):
        self.calls = 0

    def run(self, _resources):
        self.calls += 1
        if self.calls < 3:
            raise OSError
        return S.DONE


async def test_run_ends_in_the_exit_state_reached():
    """Each task names the next state, and the run returns the exit state."""
    workflow = one_task(go(S.WORK)).register(S.WORK, go(S.DONE))

    assert await workflow.orchestrate(S.START) is S.DONE


async def test_exit_state_runs_nothing():
    """A state that is registered and an exit ends the run, also as the initial one."""
    workflow = one_task(go(S.WORK)).register(S.WORK, pytest.fail).add_exit_state(S.WORK)

    assert await workflow.orchestrate(S.START) is S.WORK
    assert await workflow.orchestrate(S.WORK) is S.WORK


@pytest.mark.parametrize(
    "task",
    [
        lambda: S.DONE,
        partial(go(S.DONE)),
        later,
        lambda _resources: S.DONE,
        Task(),
        Charge(),
        go(TaskResult.Single(S.DONE)),
    ],
    ids=["function", "partial", "function of an awaitable", "one parameter", "object", "object with config", "single"],
)
async def test_task_forms(task):
    """A task is a function or an object with run, sync or async, with one parameter or none."""
    assert await one_task(task).orchestrate(S.START) is S.DONE


@pytest.mark.parametrize(
    ("returned", "error"),
    [
        (S.JOINED, UnknownStateError),
        (TaskResult.Single(S.JOINED), UnknownStateError),
        ("DONE", InvalidTransitionError),
        (None, InvalidTransitionError),
        ([S.DONE], InvalidTransitionError),
        (TaskResult.Split([S.DONE]), WorkflowError),
    ],
    ids=str,
)
async def test_return_value_that_is_no_state(returned, error):
    """A value of the states' type is an unknown state, anything else an invalid transition; neither is retried."""
    calls = []
    workflow = one_task(lambda: calls.append(1) or returned, config=TaskConfig(retry=NO_DELAY))

    with pytest.raises(error) as caught:
        await workflow.orchestrate(S.START)

    assert type(caught.value) is error
    assert len(calls) == 1


@pytest.mark.parametrize("initial", [S.JOINED, "START", []], ids=repr)
async def test_initial_state_that_is_unknown(initial):
    """A run cannot start in a state that nobody registered."""
    with pytest.raises(ConfigurationError):
        await one_task(go(S.DONE)).orchestrate(initial)


async def test_error_of_a_task_leaves_unchanged():
    """The exception object comes out as it is, and carries where it happened."""
    error = KeyError("x")
    workflow = one_task(go(S.WORK)).register(S.WORK, value(error))

    with pytest.raises(KeyError) as caught:
        await workflow.orchestrate(S.START)

    assert caught.value is error
    assert (error.__cano__.state, error.__cano__.path, error.__cano__.attempt) == (S.WORK, (S.START, S.WORK), 1)
    assert error.__context__ is None


class Traced(Exception):
    pass


async def traced():
    raise Traced


@pytest.mark.parametrize(
    "workflow",
    [
        one_task(traced),
        one_task(traced, config=TaskConfig(retry=NO_DELAY, attempt_timeout=1)),
        one_task(traced, on_error={OSError: S.DONE}),
        one_task(traced, on_error={Traced: S.WORK}).register(S.WORK, traced),
        split([traced] * 3).register(S.JOINED, go(S.DONE)),
    ],
    ids=["task", "retry", "not caught", "caught", "split"],
)
async def test_errors_are_freed_at_once(workflow):
    """No reference cycle keeps an error, and the frames of its traceback, until the collector runs."""
    known = []

    async def main():
        try:
            await workflow.orchestrate(S.START)
        except Exception as error:
            own = [*getattr(error, "exceptions", ()), error.__cause__, error]
            known.extend(weakref.ref(one) for one in own if one is not None)
            del own

    gc.collect()
    gc.disable()
    try:
        await asyncio.create_task(main())
        await asyncio.sleep(0)
        left = [one() for one in known]
    finally:
        gc.enable()

    assert known
    assert left == [None] * len(known)


async def test_path_keeps_the_newest_256_states():
    """A long run keeps the newest part of its path and the count."""
    left = iter(range(999))

    async def loop():
        return S.START if next(left, None) is not None else S.WORK

    with pytest.raises(UnknownStateError) as caught:
        await one_task(loop).orchestrate(S.START)

    assert caught.value.__cano__.path == (S.START,) * 256
    assert caught.value.__cano__.entered == 1000


async def test_long_run_lets_others_run():
    """A run that never suspends yields to the loop once per 1,024 transitions."""
    turns = []
    left = iter(range(4096))

    async def other():
        while True:
            await asyncio.sleep(0)
            turns.append(1)

    task = asyncio.create_task(other())
    await one_task(lambda: S.START if next(left, None) is not None else S.DONE).orchestrate(S.START)
    task.cancel()

    assert len(turns) == 3


async def test_definition_is_checked_as_a_whole():
    """Every problem of a definition is reported at once, before any task runs."""
    workflow = (
        Workflow()
        .register_split(S.START, [pytest.fail], JoinConfig(Quorum(2), S.JOINED))
        .register_split(S.WORK, [], JoinConfig(PartialTimeout, S.START))
    )

    with pytest.raises(ConfigurationError) as caught:
        await workflow.orchestrate(S.START)

    assert len(caught.value.problems) == 4


async def test_workflow_is_frozen_by_its_first_run():
    """After the first run nothing can be registered, and a state cannot be registered twice before."""
    workflow = one_task(go(S.DONE))
    with pytest.raises(ConfigurationError):
        workflow.register(S.START, go(S.DONE))
    await workflow.orchestrate(S.START)

    with pytest.raises(ConfigurationError):
        workflow.register(S.WORK, go(S.DONE))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Quorum(0),
        lambda: Percentage(0),
        lambda: Percentage(float("nan")),
        lambda: PartialResults(1.5),
        lambda: RetryMode.fixed(-1, 0),
        lambda: RetryMode.fixed(1, float("nan")),
        lambda: RetryMode.exponential(base=2, max_delay=1),
        lambda: RetryMode.exponential(factor=0.5),
        lambda: RetryMode.exponential(jitter=1.5),
        lambda: TaskConfig(attempt_timeout=True),
        lambda: JoinConfig(All, S.DONE, bulkhead=0),
        lambda: JoinConfig(Any, S.DONE, hedge_after=0),
        lambda: JoinConfig(All, S.DONE, hedge_after=1),
        lambda: Workflow().with_timeout(-1),
        lambda: Workflow().register(S.START, Task),
        lambda: Workflow().register(S.START, lambda a, b: S.DONE),  # noqa: ARG005
    ],
)
def test_values_out_of_range_are_refused(make):
    """A value that no definition may hold is refused where it is given."""
    with pytest.raises(ConfigurationError):
        make()


# Retry


@pytest.mark.parametrize("failures", [0, 1, 2])
async def test_retry_until_success(failures):
    """A failed attempt is repeated while retries are left."""
    calls = []

    async def flaky():
        calls.append(1)
        if len(calls) <= failures:
            raise OSError
        return S.DONE

    await one_task(flaky, config=TaskConfig(retry=NO_DELAY)).orchestrate(S.START)

    assert len(calls) == failures + 1


async def test_retry_exhausted():
    """The last failure becomes the cause of RetryExhaustedError."""
    errors = [OSError(1), OSError(2), OSError(3)]
    left = iter(errors)

    async def failing():
        raise next(left)

    with pytest.raises(RetryExhaustedError) as caught:
        await one_task(failing, config=TaskConfig(retry=NO_DELAY)).orchestrate(S.START)

    assert caught.value.__cause__ is errors[2]
    assert caught.value.attempts == caught.value.__cano__.attempt == 3


@pytest.mark.parametrize("config", [None, TaskConfig(), TaskConfig(retry=RetryMode.fixed(0, 1), attempt_timeout=1)])
async def test_no_retry_without_configuration(config):
    """Without retries the first failure leaves as it is."""
    with pytest.raises(OSError, match="once"):
        await one_task(value(OSError("once")), config=config).orchestrate(S.START)


class OurTypeError(TypeError):
    pass


@pytest.mark.parametrize(
    ("retry_on", "error", "expected"),
    [
        (Exception, OSError(), True),
        (OSError, TimeoutError(), True),
        (OSError, ValueError(), False),
        ((KeyError, ValueError), KeyError(), True),
        (lambda error: "now" in str(error), ValueError("not now"), True),
        (lambda error: "now" in str(error), ValueError("never"), False),
        (Exception, TypeError(), False),
        (Exception, NotImplementedError(), False),
        (RuntimeError, NotImplementedError(), False),
        (lambda _: True, AttributeError(), False),
        (TypeError, TypeError(), True),
        ((TypeError, OSError), OurTypeError(), True),
        ((OurTypeError, Exception), OurTypeError(), True),
        (NameError, UnboundLocalError(), True),
        (NonRetryable, NonRetryable(), False),
        (Exception, UnknownStateError(), False),
    ],
    ids=repr,
)
def test_what_is_worth_a_retry(retry_on, error, expected):
    """Programming mistakes are retried only by name, our own definition errors and NonRetryable never."""
    assert TaskConfig(retry=NO_DELAY, retry_on=retry_on).is_retryable(error) is expected


@pytest.mark.parametrize(
    ("mode", "failed", "error", "expected"),
    [
        (RetryMode.fixed(3, 0.1), 3, OSError(), 0.1),
        (RetryMode.fixed(3, 0.1), 1, RetryAfter(3600), 3600),
        (RetryMode.exponential(jitter=0), 3, OSError(), 0.4),
        (RetryMode.exponential(jitter=0), 10, OSError(), 30),
        (RetryMode.exponential(jitter=0), 100_000, OSError(), 30),
        (RetryMode.exponential(base=0), 100_000, OSError(), 0),
        (RetryMode.exponential(jitter=1), 1, RetryAfter(0), 0),
        (RetryMode.exponential(), 1, RetryAfter(3600), 30),
    ],
    ids=repr,
)
def test_delay_after_a_failure(mode, failed, error, expected):
    """The delay grows up to its bound, and RetryAfter replaces it."""
    assert mode.delay(failed, error) == pytest.approx(expected)


@pytest.mark.parametrize("dice", [0.0, 0.5, 1.0])
def test_jitter_stays_within_its_bounds(monkeypatch, dice):
    """Full jitter neither exceeds the bound nor turns a delay into none."""
    monkeypatch.setattr("random.random", lambda: dice)
    mode = RetryMode.exponential(base=0.1, max_delay=0.15, jitter=1)

    assert mode.delay(1, OSError()) == pytest.approx([0.001, 0.1, 0.15][int(dice * 2)])


@pytest.mark.parametrize("error", [asyncio.CancelledError(), KeyboardInterrupt()], ids=repr)
def test_base_exceptions_are_never_retried(error):
    """What is no Exception passes through at its first appearance."""
    calls = []

    async def main():
        async def task():
            calls.append(1)
            raise error

        await one_task(task, config=TaskConfig(retry=NO_DELAY)).orchestrate(S.START)

    with pytest.raises(type(error)):
        asyncio.run(main())
    assert len(calls) == 1


# Time limits


async def test_attempt_timeout_is_fresh_for_each_attempt():
    """Each attempt has its own deadline, and a timeout is a failure like any other."""
    calls = []

    async def slow():
        calls.append(1)
        await asyncio.sleep(TICK if len(calls) < 3 else 0)
        return S.DONE

    config = TaskConfig(retry=NO_DELAY, attempt_timeout=TICK / 2)

    assert await one_task(slow, config=config).orchestrate(S.START) is S.DONE
    assert len(calls) == 3


async def test_attempt_timeout_without_retry():
    """It is a TimeoutError that tells the limit."""
    workflow = one_task(value(S.DONE, ticks=2), config=TaskConfig(attempt_timeout=TICK))

    with pytest.raises(TimeoutError) as caught:
        await workflow.orchestrate(S.START)

    assert type(caught.value) is AttemptTimeoutError
    assert caught.value.limit == TICK
    assert asyncio.current_task().cancelling() == 0


async def test_attempt_that_never_suspends_never_times_out():
    """What cannot be interrupted is not late."""
    workflow = one_task(lambda: time.sleep(0.002) or S.DONE, config=TaskConfig(attempt_timeout=0.001))

    assert await workflow.orchestrate(S.START) is S.DONE


@pytest.mark.parametrize("limits", [{"config": TaskConfig(attempt_timeout=TICK)}, {}], ids=["attempt", "run"])
async def test_own_timeout_error_of_a_task_stays_its_own(limits):
    """A TimeoutError that the task makes of the cancellation is not taken for ours."""
    error = TimeoutError("mine")

    async def task():
        try:
            await asyncio.sleep(1)
        except asyncio.CancelledError:
            raise error from None

    with pytest.raises(TimeoutError) as caught:
        await one_task(task, **limits).orchestrate(S.START, timeout=2 * TICK)

    assert caught.value is error


async def test_external_cancel_beats_a_timeout():
    """If both come at once the run is cancelled."""

    async def task():
        try:
            await asyncio.sleep(1)
        except asyncio.CancelledError:
            run.cancel()
            raise

    run = asyncio.create_task(one_task(task, config=TaskConfig(attempt_timeout=TICK)).orchestrate(S.START))

    with pytest.raises(asyncio.CancelledError):
        await run


@pytest.mark.parametrize(
    "workflow",
    [
        one_task(value(S.DONE, ticks=50)),
        one_task(value(OSError()), config=TaskConfig(retry=RetryMode.fixed(1, 50 * TICK))),
        split([value(1, ticks=50)]).register(S.JOINED, go(S.DONE)),
        split([value(1, ticks=50)]).register(S.JOINED, go(S.DONE)).with_timeout(100 * TICK),
    ],
    ids=["attempt", "back-off", "split", "option before setting"],
)
async def test_budget_interrupts(workflow):
    """A run that outlives its budget ends with WorkflowTimeoutError, wherever it waits."""
    with pytest.raises(WorkflowTimeoutError) as caught:
        await workflow.orchestrate(S.START, timeout=TICK)

    assert caught.value.limit == TICK <= caught.value.elapsed < 50 * TICK
    assert (caught.value.__cano__.state, caught.value.__cano__.attempt) == (S.START, 0)
    assert asyncio.current_task().cancelling() == 0


@pytest.mark.realtime
@pytest.mark.parametrize("config", [None, TaskConfig(retry=NO_DELAY)], ids=["next state", "next attempt"])
async def test_budget_is_noticed_without_a_suspension(config):
    """A spent budget starts neither another state nor another attempt."""
    calls = []

    def slow():
        calls.append(1)
        time.sleep(0.06)
        if config:
            raise OSError
        return S.WORK

    workflow = one_task(slow, config=config).register(S.WORK, pytest.fail).with_timeout(0.05)

    with pytest.raises(WorkflowTimeoutError):
        await workflow.orchestrate(S.START)
    assert len(calls) == 1


class EarlyLoop(asyncio.SelectorEventLoop):
    """A loop whose timers fire a little early, as those of uvloop do, which count in milliseconds."""

    def call_at(self, when, *arguments, **options):
        return super().call_at(when - TICK / 2, *arguments, **options)


@pytest.mark.parametrize("new_loop", [None, EarlyLoop], ids=["stock", "early"])
@pytest.mark.parametrize("config", [None, TaskConfig(retry=RetryMode.fixed(1, 50 * TICK))], ids=["state", "back-off"])
def test_budget_survives_a_swallowed_cancellation(config, new_loop):
    """A task that swallows the cancellation finishes, but no other state and no back-off starts."""

    async def stubborn():
        try:
            await asyncio.sleep(9)
        except asyncio.CancelledError:
            if config:
                raise OSError("stopped") from None
            return S.WORK

    workflow = one_task(stubborn, config=config).register(S.WORK, pytest.fail).with_timeout(TICK)

    with pytest.raises(WorkflowTimeoutError) as caught, asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(workflow.orchestrate(S.START))

    assert caught.value.elapsed < 25 * TICK


async def test_budget_of_a_nested_run_is_a_failure_of_the_task():
    """Only the run whose budget is spent ends by it; the outer one sees an exception."""
    inner = one_task(value(S.DONE, ticks=9)).with_timeout(TICK)

    async def task():
        return await inner.orchestrate(S.START)

    outer = one_task(task, config=TaskConfig(retry=NO_DELAY))

    with pytest.raises(RetryExhaustedError) as caught:
        await outer.orchestrate(S.START, timeout=99 * TICK)
    assert caught.value.__cause__.limit == TICK


# Splits


A, B, C, D = (value(letter, ticks) for ticks, letter in enumerate("abcd", 1))
BAD = ValueError("bad")


@pytest.mark.parametrize(
    ("strategy", "tasks", "expected"),
    [
        (All, [B, A, A], ({0: "b", 1: "a", 2: "a"}, [])),
        (All, [], ({}, [])),
        (Any, [C, A, B], ({1: "a"}, [0, 2])),
        (Any, [C, value(BAD), A], ({1: BAD, 2: "a"}, [0])),
        (Quorum(2), [A, B, C, D], ({0: "a", 1: "b"}, [2, 3])),
        (Quorum(2), [A, value(BAD), C, D], ({0: "a", 1: BAD, 2: "c"}, [3])),
        (Percentage(0.5), [A, B, C], ({0: "a", 1: "b"}, [2])),
        (Percentage(0.07), [value(1)] + [D] * 13, ({0: 1}, [*range(1, 14)])),
        (PartialResults(2), [A, value(BAD), C], ({0: "a", 1: BAD}, [2])),
        (PartialResults(1), [value(BAD), C], ({0: BAD}, [1])),
        (PartialTimeout, [A, value(BAD)], ({0: "a", 1: BAD}, [])),
        (PartialTimeout, [A, value(BAD), value("late", 40)], ({0: "a", 1: BAD}, [2])),
        (Any, [value(1), value(2), pytest.fail], ({0: 1}, [1, 2])),
        (Any, [value(asyncio.CancelledError()), A], ({1: "a"}, [0])),
    ],
    ids=str,
)
async def test_join_proceeds(strategy, tasks, expected):
    """The split goes on as soon as its strategy is met, and says how every branch ended."""
    workflow = split(tasks, strategy, timeout=20 * TICK)

    result = await joined(workflow)

    assert ends(result) == expected
    assert result.total_count == len(tasks)
    assert result.values() == [outcome.value for outcome in result.successes]


@pytest.mark.parametrize(
    ("strategy", "tasks", "expected"),
    [
        (All, [A, value(BAD)], ({0: "a", 1: BAD}, [])),
        (Any, [value(BAD), value(BAD, 1)], ({0: BAD, 1: BAD}, [])),
        (Quorum(2), [value(BAD), C, value(BAD)], ({0: BAD, 1: "c", 2: BAD}, [])),
        (Percentage(1.0), [value(BAD), A], ({0: BAD, 1: "a"}, [])),
        (All, [A, value(asyncio.CancelledError())], ({0: "a"}, [1])),
        (PartialTimeout, [value(asyncio.CancelledError())], ({}, [0])),
    ],
    ids=str,
)
async def test_join_fails_when_every_branch_has_ended(strategy, tasks, expected):
    """JoinError holds the branches' own exceptions in branch order, or one that says there was none."""
    with pytest.raises(JoinError) as caught:
        await joined(split(tasks, strategy, timeout=20 * TICK))

    own = [error for error in caught.value.exceptions if type(error) is not TaskExecutionError]
    assert type(caught.value) is JoinError
    assert ends(caught.value.result) == expected
    assert own == [outcome.error for outcome in caught.value.result.errors]
    assert len(caught.value.exceptions) == max(1, len(own))


async def test_join_error_can_be_taken_apart():
    """Its members tell their branch, and except* finds them in a group of the same kind."""
    with pytest.raises(JoinError) as caught:
        await joined(split([A, value(OSError("x")), value(KeyError("y"))]))

    assert [error.__cano__.branch for error in caught.value.exceptions] == [1, 2]
    part, _ = caught.value.split(KeyError)
    assert type(part) is JoinError
    assert part.result is caught.value.result


async def test_fail_fast_cancels_what_cannot_help():
    """With fail_fast a join that can no longer succeed does not wait."""
    trace = []
    workflow = split([value("long", 40, trace), value(BAD, 1), C], Quorum(3), fail_fast=True)

    with pytest.raises(JoinError) as caught:
        await joined(workflow)

    assert ends(caught.value.result) == ({1: BAD}, [0, 2])
    assert trace == ["long"]


@pytest.mark.parametrize(
    ("strategy", "tasks", "types"),
    [
        (All, [A, value(BAD), value(1, 40)], [TimeoutError, ValueError]),
        (PartialResults(2), [value(1, 40), value(2, 40)], [TimeoutError]),
        (PartialTimeout, [value(1, 40), value(asyncio.CancelledError())], [TimeoutError]),
    ],
    ids=str,
)
async def test_join_timeout(strategy, tasks, types):
    """A split that is undecided at its timeout cancels the rest and fails, a TimeoutError first."""
    with pytest.raises(JoinTimeoutError) as caught:
        await joined(split(tasks, strategy, timeout=3 * TICK))

    assert [type(error) for error in caught.value.exceptions] == types


async def test_cancelled_branches_are_awaited():
    """Their clean-up is over before the joined state starts, and what they end with is recorded."""
    trace = []

    async def stubborn(end):
        try:
            await asyncio.sleep(9)
        except asyncio.CancelledError:
            await asyncio.sleep(TICK)
            trace.append("cleaned up")
            return end() if callable(end) else end

    def fail():
        raise BAD

    tasks = [A, lambda: stubborn("late"), lambda: stubborn(fail), value(3, 40)]
    workflow = split(tasks, Any).register(S.JOINED, lambda _: trace.append("joined") or S.WORK)
    workflow.register(S.WORK, go(S.DONE))
    await workflow.orchestrate(S.START)

    assert trace == ["cleaned up", "cleaned up", "joined"]
    assert ends(await joined(split(tasks, Any))) == ({0: "a", 1: "late", 2: BAD}, [3])


async def test_timeout_counts_only_while_undecided():
    """A straggler that outlives the timeout cannot undo a decision."""

    async def straggler():
        try:
            await asyncio.sleep(9)
        except asyncio.CancelledError:
            await asyncio.sleep(4 * TICK)

    result = await joined(split([A, straggler], Any, timeout=2 * TICK))

    assert result.values() == ["a", None]


@pytest.mark.parametrize("bulkhead", [1, 3, 20])
async def test_bulkhead_bounds_the_branches_alive(bulkhead):
    """At most so many branches are alive at a time, started in order, each in the parent's context."""
    variable = contextvars.ContextVar("variable", default="parent")
    started, seen = [], []
    alive = widest = 0

    def branch(index):
        async def run():
            nonlocal alive, widest
            started.append(index)
            seen.append(variable.get())
            variable.set("branch")
            alive += 1
            widest = max(widest, alive)
            await asyncio.sleep(TICK / 10)
            alive -= 1

        return run

    result = await joined(split([branch(index) for index in range(9)], bulkhead=bulkhead))

    assert started == [*range(9)]
    assert set(seen) == {"parent"}
    assert widest == min(bulkhead, 9)
    assert result.completed_count == 9


async def test_bulkhead_never_starts_branches_after_the_decision():
    """What waits behind the bulkhead when the decision falls counts as cancelled."""
    result = await joined(split([value(BAD), A, pytest.fail, pytest.fail], PartialResults(1), bulkhead=1))

    assert ends(result) == ({0: BAD}, [1, 2, 3])


@pytest.mark.virtual
async def test_hedged_branches_start_one_by_one():
    """The next branch starts when the newest is slow or one has failed, and none after the decision."""
    loop, starts = asyncio.get_running_loop(), []
    began = loop.time()

    def branch(ticks, error=None):
        async def run():
            starts.append(round((loop.time() - began) / TICK))
            await asyncio.sleep(ticks * TICK)
            if error is not None:
                raise error
            return ticks

        return run

    tasks = [branch(9), branch(3, BAD), branch(9), branch(1), pytest.fail]
    result = await joined(split(tasks, Any, hedge_after=2 * TICK))

    assert starts == [0, 2, 4, 5]
    assert ends(result) == ({1: BAD, 3: 1}, [0, 2, 4])


async def test_branch_has_its_own_configuration():
    """A branch that is an object keeps its retries and its limit."""

    class Slow:
        config = TaskConfig(attempt_timeout=TICK)

        async def run(self):
            await asyncio.sleep(9)

    charge = Charge()

    result = await joined(split([charge, Slow(), value(BAD), A], PartialTimeout, timeout=20 * TICK))

    assert charge.calls == 3
    assert [(o.index, o.name) for o in result.successes] == [(0, "charge"), (3, A.__qualname__)]
    assert [type(o.error) for o in result.errors] == [AttemptTimeoutError, ValueError]


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
async def test_branches_known_at_run_time(is_async):
    """A callable gives the branches when the state is entered, and the join is checked then."""
    widths = iter([2, 0])

    def tasks():
        return (A for _ in range(next(widths)))

    async def later():
        return tasks()

    workflow = split(later if is_async else tasks, Any).register(S.JOINED, go(S.DONE))

    assert await workflow.orchestrate(S.START) is S.DONE
    with pytest.raises(ConfigurationError):
        await workflow.orchestrate(S.START)


async def test_split_result_is_for_one_visit():
    """Only the visit right after a split is given its result."""
    results = []

    async def keep(result: "SplitResult | None"):
        results.append(result)
        return S.WORK if len(results) == 1 else S.DONE

    workflow = split([A]).register(S.JOINED, keep).register(S.WORK, go(S.JOINED))

    await workflow.orchestrate(S.START)

    assert results[0].values() == ["a"]
    assert results[1] is None


@pytest.mark.parametrize(
    ("on_error", "error", "config", "expected"),
    [
        pytest.param({LookupError: S.DONE, Exception: S.WORK}, KeyError(), None, S.DONE, id="most specific"),
        pytest.param({(OSError, KeyError): S.WORK}, KeyError(), None, S.WORK, id="tuple"),
        pytest.param({OSError: S.WORK}, KeyError(), None, KeyError, id="other"),
        pytest.param({OSError: S.WORK}, OSError(), TaskConfig(retry=NO_DELAY), S.WORK, id="last failure"),
        pytest.param(
            {RetryExhaustedError: S.DONE, OSError: S.WORK},
            OSError(),
            TaskConfig(retry=NO_DELAY),
            S.DONE,
            id="exhausted",
        ),
        pytest.param({Exception: S.WORK}, UnknownStateError(), None, UnknownStateError, id="mistake"),
        pytest.param({WorkflowError: S.WORK}, UnknownStateError(), None, S.WORK, id="mistake by our class"),
        pytest.param({Exception: S.WORK}, WorkflowTimeoutError("", 1, 1), None, S.WORK, id="timeout of another run"),
        pytest.param({Exception: S.WORK}, asyncio.CancelledError(), None, asyncio.CancelledError, id="cancelled"),
    ],
)
async def test_error_leads_on(on_error, error, config, expected):
    """The most specific class that `on_error` names decides the next state; without one the error leaves the run."""
    workflow = one_task(value(error), on_error=on_error, config=config).add_exit_state(S.WORK)
    try:
        came = await workflow.orchestrate(S.START)
    except BaseException as left:
        came = type(left)

    assert came is expected


async def test_error_of_a_split_leads_on():
    """A join that fails leads on like a task, in a branch of states as well; the next state takes its error."""
    seen = []

    def keep(error: "Caught[JoinError] | None"):
        seen.append(error)
        return S.DONE

    join = JoinConfig(All, S.JOINED)
    workflow = Workflow().register_split(S.WORK, [value(OSError())], join, on_error={JoinError: S.JOINED})
    workflow.register(S.START, lambda: TaskResult.Split([S.WORK]), join=join, on_error={JoinError: S.JOINED})
    workflow.register(S.JOINED, keep).add_exit_state(S.DONE)

    assert await workflow.orchestrate(S.START) is S.DONE
    assert await workflow.orchestrate(S.WORK) is S.DONE
    assert [type(one) for one in seen] == [type(None), JoinError]


async def test_task_that_is_told_to_stop_leads_nowhere():
    """An error that a task makes of a cancellation leaves the run."""

    async def convert():
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            raise OSError("stopped") from None

    running = asyncio.create_task(one_task(convert, on_error={OSError: S.DONE}).orchestrate(S.START))
    await asyncio.sleep(TICK)
    running.cancel()

    with pytest.raises(OSError, match="stopped"):
        await running


@pytest.mark.parametrize("on_error", [{int: S.DONE}, {BaseException: S.DONE}, {(OSError, 5): S.DONE}])
def test_on_error_of_no_error(on_error):
    """Only subclasses of Exception lead on."""
    with pytest.raises(ConfigurationError):
        one_task(go(S.DONE), on_error=on_error)


async def test_task_that_splits_into_states():
    """Each listed state starts a branch that runs up to an exit or the joined state, with a path of its own."""
    trace = []
    workflow = Workflow().add_exit_states(["exit"])
    workflow.register(
        "fan", go(TaskResult.Split(["a", "b", "c", "exit"])), join=JoinConfig(PartialTimeout, "joined", 1)
    )
    workflow.register("a", go("a2")).register("a2", go("joined"))
    workflow.register("b", value("exit", 1)).register("c", value(BAD))

    async def keep(result: SplitResult):
        trace.append(result)
        return "exit"

    await workflow.register("joined", keep).orchestrate("fan")

    assert ends(trace[0]) == ({0: "joined", 1: "exit", 2: BAD, 3: "exit"}, [])
    assert [outcome.name for outcome in trace[0].successes] == ["a", "b", "exit"]


async def test_task_that_splits_into_an_unknown_state():
    """Every listed state is checked before any branch starts."""
    workflow = Workflow().add_exit_state("exit").register("a", pytest.fail)
    workflow.register("fan", go(TaskResult.Split(["a", "z"])), join=JoinConfig(All, "exit"))

    with pytest.raises(UnknownStateError):
        await workflow.orchestrate("fan")


# Cancellation


async def test_outer_cancel_reaches_every_branch_with_its_message():
    """All branches are cancelled and awaited, a second cancel cancels again, and the first one leaves."""
    seen = []

    async def stubborn():
        for _ in range(2):
            try:
                await asyncio.sleep(9)
            except asyncio.CancelledError as error:
                seen.append(error.args)

    run = asyncio.create_task(joined(split([stubborn, value(1, 40, seen)])))
    await asyncio.sleep(0.001)
    run.cancel("first")
    await asyncio.sleep(0.001)
    run.cancel("second")

    with pytest.raises(asyncio.CancelledError) as caught:
        await run

    assert caught.value.args == ("first",)
    assert seen == [("first",), 1, ("second",)]


@pytest.mark.parametrize("is_branch", [False, True], ids=["run", "branch"])
async def test_attempt_that_was_cancelled_is_the_last(is_branch):
    """A task that turns its cancellation into a failure is not tried again."""
    calls = []

    class Stubborn:
        config = TaskConfig(retry=NO_DELAY)

        async def run(self):
            calls.append(1)
            try:
                await asyncio.sleep(9)
            except asyncio.CancelledError:
                raise BAD from None

    if is_branch:
        assert ends(await joined(split([Stubborn(), A], Any))) == ({0: BAD, 1: "a"}, [])
    else:
        run = asyncio.create_task(one_task(Stubborn()).orchestrate(S.START))
        await asyncio.sleep(0)
        run.cancel()
        with pytest.raises(ValueError, match="bad"):
            await run

    assert len(calls) == 1


@pytest.mark.parametrize("passes", [0, 1, 2])
async def test_outer_cancel_at_any_pass_of_the_loop(passes):
    """A cancel before the branches' first step, at it or after it leaves nothing behind."""
    run = asyncio.create_task(joined(split([A, lambda: S.DONE, Charge()] * 2, bulkhead=4)))
    for _ in range(passes):
        await asyncio.sleep(0)
    run.cancel()

    with pytest.raises(asyncio.CancelledError):
        await run

    await asyncio.sleep(0)
    assert asyncio.all_tasks() == {asyncio.current_task()}


def test_sweep_of_the_loop_does_not_hang():
    """Branches that are cancelled from outside before their first step do not keep the parent waiting."""

    async def main():
        run = asyncio.create_task(joined(split([A, B])))
        await asyncio.sleep(0)
        assert len(asyncio.all_tasks()) == 4
        return run

    run = asyncio.run(main())

    assert run.cancelled()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3), BaseException("other")], ids=repr)
async def test_base_exception_of_a_branch_ends_the_run(error):
    """The other branches are cancelled and awaited before it leaves."""
    trace = []

    with pytest.raises(type(error)) as caught:
        await joined(split([value(error), value("long", 40, trace), value("done")], Any))

    assert caught.value is error
    assert trace == []


async def test_base_exception_of_a_branch_awaits_the_others():
    """A branch that was running cleans up first."""
    trace = []

    with pytest.raises(KeyboardInterrupt):
        await joined(split([value(KeyboardInterrupt(), 1), value("long", 40, trace)]))

    assert trace == ["long"]


@pytest.mark.parametrize("is_deferred", [False, True], ids=["at once", "deferred"])
async def test_branches_that_end_in_one_pass(monkeypatch, is_deferred):
    """The first end decides and cancels the second, unless ends are booked where done callbacks would run."""
    monkeypatch.setattr(Split, "is_deferred", is_deferred)

    result = await joined(split([value(1), value(2), value(3, 40)], Any))

    assert ends(result) == (({0: 1, 1: 2}, [2]) if is_deferred else ({0: 1}, [1, 2]))


async def test_one_workflow_runs_many_times_at_once():
    """Runs of one frozen workflow share nothing."""
    results = []

    async def keep(result: SplitResult):
        results.append(result)
        return S.DONE

    workflow = split([A, B], Any).register(S.JOINED, keep)

    ended = await asyncio.gather(*(workflow.orchestrate(S.START) for _ in range(20)))

    assert ended == [S.DONE] * 20
    assert len({id(result) for result in results}) == 20
