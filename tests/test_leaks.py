"""Nothing grows, nothing lingers: memory over many runs, objects after one run, and runs that are handled badly."""

import asyncio
import ctypes
import gc
import logging
import os
import sys
import threading
import tracemalloc
import types
import weakref
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import pytest

from cano import (
    BatchTask,
    BranchOutcome,
    Bulkhead,
    Caught,
    CompensatableTask,
    CompensationFailedError,
    InvalidTransitionError,
    JoinConfig,
    JoinError,
    JoinStrategy,
    MemoryStore,
    Res,
    Resource,
    Resources,
    RetryExhaustedError,
    RetryMode,
    RunContext,
    SplitResult,
    Task,
    TaskConfig,
    TaskResult,
    Workflow,
    WorkflowCancelledError,
    WorkflowTimeoutError,
    in_thread,
)
from cano.testing import VirtualClockLoop, run

RUNS = 20_000
RUNS_IN_DEBUG_MODE = 400  # where asyncio writes down a stack for each task


class Boom(Exception):
    """A failure of the user's own."""


class Thing:
    """Something that can be watched."""


class Part(Resource):
    """A resource with a life cycle that does nothing."""


async def ticks(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def forever() -> Any:
    await asyncio.get_running_loop().create_future()


def task_with(config: TaskConfig, function: Callable[..., Any]) -> Task[Any]:
    class Configured(Task[Any]):
        pass

    task = Configured()
    task.name = "task"
    task.config = config
    task.run = function  # type: ignore[attr-defined]
    return task


def one(task: Any, resources: Any = None) -> Workflow[str]:
    """A workflow of one state."""
    return Workflow[str](resources).register("only", task).add_exit_state("done")


def split(*branches: Any, strategy: JoinStrategy = JoinStrategy.All, **join: Any) -> Workflow[str]:
    """A workflow of one split."""
    return Workflow[str]().register_split("only", branches, JoinConfig(strategy, "done", **join)).add_exit_state("done")


class Batch(BatchTask[str]):
    """A batch over what `items` makes; `work` is done on each."""

    concurrency = 2

    def __init__(self, items: Callable[[], Any], work: Callable[[Any], Any], **attributes: Any) -> None:
        self.items = items
        self.work = work
        vars(self).update(attributes)

    def load(self) -> Any:
        return self.items()

    async def process_item(self, item: Any) -> Any:
        return await self.work(item)

    def finish(self, outcomes: list[BranchOutcome]) -> str:
        return "done"


async def ended(awaitable: Any) -> Any:
    """The type of what leaves the awaitable; the exception itself is let go."""
    try:
        return await awaitable
    except asyncio.CancelledError:
        return asyncio.CancelledError
    except Exception as error:
        return type(error)


async def cancelled(awaitable: Any) -> Any:
    """Cancel the awaitable when it waits, and wait for it."""
    task = asyncio.ensure_future(awaitable)
    await ticks(3)
    task.cancel("message")
    return await ended(task)


# --- over many runs --------------------------------------------------------------------------------------------------


def fails() -> None:
    raise Boom


async def value() -> str:
    return "value"


async def waits_a_turn() -> str:
    await asyncio.sleep(0)
    return "done"


async def waits(item: Any) -> Any:
    await asyncio.sleep(0)
    return item


async def waits_and_fails(item: Any) -> None:
    await asyncio.sleep(0)
    raise Boom


async def waits_forever(item: Any) -> None:
    await forever()


def three() -> Iterator[int]:
    yield from range(3)


async def three_later() -> AsyncIterator[int]:
    for item in range(3):
        yield item


def two_and_a_failure() -> Iterator[int]:
    yield from range(2)
    raise Boom


SHAPES: dict[str, tuple[Workflow[str], Callable[[Workflow[str]], Any], Any]] = {
    "success": (
        Workflow[str]().register("only", waits_a_turn).add_exit_state("done"),
        lambda workflow: ended(workflow.orchestrate("only")),
        "done",
    ),
    "failure": (one(fails), lambda workflow: ended(workflow.orchestrate("only")), Boom),
    "handle": (one(waits_a_turn), lambda workflow: ended(workflow.start("only")), "done"),
    "cancel": (one(forever), lambda workflow: cancelled(workflow.orchestrate("only")), asyncio.CancelledError),
    "timeout": (one(forever), lambda workflow: ended(workflow.orchestrate("only", timeout=1)), WorkflowTimeoutError),
    "unused timeout": (one(waits_a_turn), lambda workflow: ended(workflow.orchestrate("only", timeout=1e6)), "done"),
    "retries": (
        one(task_with(TaskConfig().with_fixed_retry(2, 0).with_attempt_timeout(9), fails)),
        lambda workflow: ended(workflow.orchestrate("only")),
        RetryExhaustedError,
    ),
    "attempt timeout": (
        one(task_with(TaskConfig().with_attempt_timeout(1).with_fixed_retry(1, 1), forever)),
        lambda workflow: ended(workflow.orchestrate("only")),
        RetryExhaustedError,
    ),
    "split": (split(value, value, value), lambda workflow: ended(workflow.orchestrate("only")), "done"),
    "failing split": (split(value, fails, fails), lambda workflow: ended(workflow.orchestrate("only")), JoinError),
    "decided split": (
        split(forever, value, forever, strategy=JoinStrategy.Any, timeout=60),
        lambda workflow: ended(workflow.orchestrate("only")),
        "done",
    ),
    "hedged split": (
        split(fails, value, forever, strategy=JoinStrategy.Any, hedge_after=60),
        lambda workflow: ended(workflow.orchestrate("only")),
        "done",
    ),
    "shared bulkhead": (
        split(waits_a_turn, value, waits_a_turn, bulkhead=Bulkhead(1)),
        lambda workflow: asyncio.gather(*(workflow.orchestrate("only") for _ in range(2))),
        ["done", "done"],
    ),
    "cancelled split": (
        split(forever, forever, bulkhead=1),
        lambda workflow: cancelled(workflow.orchestrate("only")),
        asyncio.CancelledError,
    ),
    "batch": (one(Batch(three, waits)), lambda workflow: ended(workflow.orchestrate("only")), "done"),
    "batch of async items": (
        one(Batch(three_later, waits)),
        lambda workflow: ended(workflow.orchestrate("only")),
        "done",
    ),
    "batch of failing items": (
        one(Batch(lambda: [1], waits_and_fails, item_retry=RetryMode.fixed(1, 0), item_timeout=9)),
        lambda workflow: ended(workflow.orchestrate("only")),
        "done",
    ),
    "batch that cannot be read": (
        one(Batch(two_and_a_failure, waits_forever, concurrency=3)),
        lambda workflow: ended(workflow.orchestrate("only")),
        Boom,
    ),
    "cancelled batch": (
        one(Batch(three_later, waits_forever)),
        lambda workflow: cancelled(workflow.orchestrate("only")),
        asyncio.CancelledError,
    ),
    "resources": (
        one(waits_a_turn, {"part": Part(), "managed": 1}),
        lambda workflow: ended(workflow.orchestrate("only")),
        "done",
    ),
    "definition": (
        one(value),
        lambda _: ended(one(waits_a_turn, {"a": 1}).orchestrate("only")),
        "done",
    ),
}


def caught(_: Caught[Boom]) -> str:
    return "done"


SHAPES["error that leads on"] = (
    Workflow[str]()
    .register("only", fails, on_error={Boom: "caught"}, config=TaskConfig().with_fixed_retry(1, 0))
    .register("caught", caught)
    .add_exit_state("done"),
    lambda workflow: ended(workflow.orchestrate("only")),
    "done",
)


class Undoable(CompensatableTask[str, Thing]):
    """A step whose output can be watched."""

    def __init__(self, then: str = "last", fails: type[Exception] | None = None) -> None:
        self.then = then
        self.fails = fails

    async def run(self) -> Any:
        return self.then, Thing()

    async def compensate(self, output: Thing) -> None:
        await ticks(1)
        if self.fails is not None:
            raise self.fails


def saga(last: Any, **options: Any) -> Workflow[str]:
    workflow = Workflow[str]().register_with_compensation("only", Undoable(**options))
    return workflow.register("last", last).add_exit_state("done")


SHAPES["saga"] = (saga(value, then="done"), lambda workflow: ended(workflow.orchestrate("only")), "done")
SHAPES["saga that is undone"] = (saga(fails), lambda workflow: ended(workflow.orchestrate("only")), Boom)
SHAPES["saga that cannot be undone"] = (
    saga(fails, fails=Boom),
    lambda workflow: ended(workflow.orchestrate("only")),
    CompensationFailedError,
)
SHAPES["cancelled saga"] = (
    saga(forever),
    lambda workflow: cancelled(workflow.orchestrate("only")),
    asyncio.CancelledError,
)


class _MallInfo2(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (*"abcdefg", "uordblks", *"hi")]


def native_bytes() -> int:
    """Bytes that malloc has given out: what Rust holds, and Python's larger blocks; 0 where glibc does not tell."""
    tell = getattr(ctypes.CDLL(None), "mallinfo2", None) if sys.platform == "linux" else None
    if tell is None:
        return 0
    tell.restype = _MallInfo2
    return int(tell().uordblks)


@contextmanager
def no_collector() -> Iterator[None]:
    """Whatever is in a cycle stays."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class Use:
    """What is in use at one moment, garbage excluded."""

    def __init__(self) -> None:
        self.garbage = gc.collect()
        self.native = native_bytes()
        self.traced = tracemalloc.get_traced_memory()[0]
        self.objects = len(gc.get_objects())


@pytest.mark.parametrize("shape", SHAPES)
def test_many_runs_use_no_more_than_few(shape: str) -> None:
    """20,000 runs leave no object, no byte and no garbage behind, whatever their ending."""
    # reliability C8, C9, section 7
    workflow, how, outcome = SHAPES[shape]
    runs = RUNS_IN_DEBUG_MODE if os.environ.get("PYTHONASYNCIODEBUG") else RUNS

    async def repeat(count: int) -> None:
        for _ in range(count):
            assert await how(workflow) == outcome

    async def measure() -> tuple[Use, Use]:
        await repeat(100)
        before = Use()
        await repeat(runs // 2)
        tracemalloc.start()
        await repeat(100)
        growths: list[int] = []  # a leak grows each time, a table of the interpreter's once
        for _ in range(3):
            traced = Use().traced
            await repeat(runs // 20)
            growths.append(Use().traced - traced)
        tracemalloc.stop()
        await repeat(runs // 2)
        after = Use()
        after.traced, before.traced = min(growths), 0
        return before, after

    with no_collector():
        before, after = run(measure())

    assert after.garbage < 20
    assert after.objects - before.objects < 20
    assert after.traced < 10_000
    assert after.native - before.native < 2 * RUNS  # less than two bytes a run


# --- after one run ---------------------------------------------------------------------------------------------------


class Watch:
    """Weak references to whatever a scenario makes."""

    def __init__(self) -> None:
        self.watched: list[weakref.ref[Any]] = []

    def new(self, thing: Any = None) -> Any:
        thing = Thing() if thing is None else thing
        self.watched.append(weakref.ref(thing))
        return thing

    async def raises(self, kind: type[BaseException], awaitable: Any) -> None:
        """Await; what comes out is of this kind, and is watched with its causes and members."""
        held = [awaitable]
        del awaitable  # the exception's traceback has this frame, and a task has its exception
        try:
            await held.pop()
        except kind as error:
            todo: list[Any] = [error]
            while todo:
                found = self.new(todo.pop())
                todo += [*getattr(found, "exceptions", ()), found.__cause__, found.__context__]
                todo = [one for one in todo if one is not None and type(one).__weakrefoffset__]
            del error, found
        else:
            raise AssertionError(f"{kind.__name__} was not raised")


Scenario = Callable[[Watch], Any]


class State(str):  # noqa: SLOT000 - with slots it could not be watched
    """A state that equals a registered one, and is not it."""


async def result_and_resources(watch: Watch) -> None:
    async def task(res: Resources, thing: Annotated[Thing, Res("thing")], ctx: RunContext) -> Any:
        await asyncio.sleep(0)
        return TaskResult.Single(watch.new(State("done")))

    await one(watch.new(task)).orchestrate("only", resources={"thing": watch.new()})


async def resources_with_a_life_cycle(watch: Watch) -> None:
    @contextmanager
    def managed() -> Iterator[Any]:
        yield watch.new()

    await one(lambda: "done", Resources({"a": watch.new(WatchedPart())}).manage("m", managed)).orchestrate("only")


class WatchedPart(Resource):
    """A resource without slots, so that it can be watched."""


async def definition(watch: Watch) -> None:
    workflow = watch.new(one(watch.new(task_with(TaskConfig().with_fixed_retry(1, 0), value))))
    workflow.validate()


async def values_of_a_split(watch: Watch) -> None:
    async def branch() -> Any:
        await asyncio.sleep(0)
        return watch.new()

    async def joined(result: SplitResult) -> str:
        assert len(result.values()) == 2
        return "done"

    workflow = Workflow[str]().register_split("only", [branch, branch], JoinConfig(JoinStrategy.All, "joined"))
    await workflow.register("joined", joined).add_exit_state("done").orchestrate("only")


async def failure(watch: Watch) -> None:
    async def task() -> None:
        thing = watch.new()
        await asyncio.sleep(0)
        raise Boom(thing)

    await watch.raises(Boom, one(task).orchestrate("only"))


async def failure_of_a_handle(watch: Watch) -> None:
    await watch.raises(Boom, one(fails).start("only"))


async def retries_exhausted(watch: Watch) -> None:
    def task() -> None:
        raise watch.new(Boom(watch.new()))

    workflow = one(task_with(TaskConfig().with_fixed_retry(3, 0), task))
    await watch.raises(RetryExhaustedError, workflow.orchestrate("only"))


async def retried_failures(watch: Watch) -> None:
    attempts = iter(range(9))

    async def task() -> str:
        await asyncio.sleep(0)
        if next(attempts) < 3:
            raise watch.new(Boom(watch.new()))
        assert all(ref() is None for ref in watch.watched)  # gone before the run goes on
        return "done"

    await one(task_with(TaskConfig().with_fixed_retry(3, 0), task)).orchestrate("only")


def leading_on(watch: Watch, handler: Any, *, retries: int = 0) -> Workflow[str]:
    """A workflow whose first task fails, into the state of the handler."""

    async def task() -> str:
        thing = watch.new()
        await asyncio.sleep(0)
        raise watch.new(Boom(thing))

    workflow = Workflow[str]().register("handler", handler).add_exit_state("done")
    config = TaskConfig().with_fixed_retry(retries, 0)
    return workflow.register("only", task, on_error={Boom: "handler"}, config=config)


async def caught_error(watch: Watch) -> None:
    async def handler(error: Caught[Boom]) -> str:
        await asyncio.sleep(0)
        return "after"

    async def after() -> str:
        await asyncio.sleep(0)
        assert all(ref() is None for ref in watch.watched)  # gone with the visit it led to
        return "done"

    await leading_on(watch, handler).register("after", after).orchestrate("only")


async def caught_error_of_retries(watch: Watch) -> None:
    async def handler(error: Caught[Boom] | None) -> str:
        if error is None:
            assert all(ref() is None for ref in watch.watched)
            return "done"
        return "handler"

    await leading_on(watch, handler, retries=2).orchestrate("only")


async def caught_error_that_nobody_takes(watch: Watch) -> None:
    await leading_on(watch, lambda: "done").orchestrate("only")


async def error_from_a_caught_one(watch: Watch) -> None:
    async def handler(error: Caught[Boom]) -> str:
        await asyncio.sleep(0)
        raise Boom from error

    await watch.raises(Boom, leading_on(watch, handler).orchestrate("only"))


async def caught_error_in_a_run_that_is_cancelled(watch: Watch) -> None:
    async def handler(error: Caught[Boom]) -> None:
        await forever()

    task = asyncio.ensure_future(leading_on(watch, handler).orchestrate("only"))
    await ticks(4)
    task.cancel()
    await watch.raises(asyncio.CancelledError, task)


async def caught_join_error(watch: Watch) -> None:
    async def branch() -> None:
        await asyncio.sleep(0)
        raise watch.new(Boom(watch.new()))

    def handler(error: Caught[JoinError]) -> str:
        watch.new(error)
        return "after"

    def after() -> str:
        assert all(ref() is None for ref in watch.watched)
        return "done"

    workflow = Workflow[str]().register("handler", handler).register("after", after).add_exit_state("done")
    join = JoinConfig(JoinStrategy.All, "done")
    await workflow.register_split("only", [branch, value], join, on_error={JoinError: "handler"}).orchestrate("only")


async def attempt_timeout(watch: Watch) -> None:
    workflow = one(task_with(TaskConfig().with_attempt_timeout(0.001).with_fixed_retry(1, 0), forever))
    await watch.raises(RetryExhaustedError, workflow.orchestrate("only"))


async def run_timeout(watch: Watch) -> None:
    await watch.raises(WorkflowTimeoutError, one(forever).orchestrate("only", timeout=0.001))


async def run_timeout_in_split(watch: Watch) -> None:
    await watch.raises(WorkflowTimeoutError, split(forever, forever).orchestrate("only", timeout=0.001))


async def run_timeout_in_set_up(watch: Watch) -> None:
    class Slow(Resource):
        async def setup(self) -> None:
            await forever()

    await watch.raises(WorkflowTimeoutError, one(value, {"a": Slow()}).orchestrate("only", timeout=0.001))


async def failed_set_up(watch: Watch) -> None:
    class Fails(Resource):
        async def setup(self) -> None:
            raise Boom

    await watch.raises(Boom, one(value, {"a": WatchedPart(), "b": Fails()}).orchestrate("only"))


async def failed_join(watch: Watch) -> None:
    async def branch() -> None:
        await asyncio.sleep(0)
        raise watch.new(Boom(watch.new()))

    await watch.raises(JoinError, split(branch, value, branch, fails).orchestrate("only"))


async def invalid_transition(watch: Watch) -> None:
    def task() -> Any:
        return watch.new()

    await watch.raises(InvalidTransitionError, one(task).orchestrate("only"))


async def cancelled_run(watch: Watch) -> None:
    task = asyncio.ensure_future(one(forever, {"thing": watch.new()}).orchestrate("only"))
    await ticks(2)
    task.cancel()
    await watch.raises(asyncio.CancelledError, task)


async def cancelled_split(watch: Watch) -> None:
    async def branch(thing: Annotated[Thing, Res("thing")]) -> None:
        await forever()

    workflow = Workflow[str]({"thing": watch.new()}).add_exit_state("done")
    workflow.register_split("only", [watch.new(branch), branch], JoinConfig(JoinStrategy.All, "done"))
    task = asyncio.ensure_future(workflow.orchestrate("only"))
    await ticks(3)
    task.cancel()
    await watch.raises(asyncio.CancelledError, task)


async def cancelled_handle(watch: Watch) -> None:
    handle = watch.new(one(forever).start("only"))
    await ticks(2)
    handle.cancel("reason")
    await watch.raises(WorkflowCancelledError, handle)


async def cancelled_tear_down(watch: Watch) -> None:
    class Slow(Resource):
        async def teardown(self) -> None:
            await forever()

    task = asyncio.ensure_future(one(lambda: "done", {"a": Slow()}).orchestrate("only"))
    await ticks(3)
    task.cancel()
    await watch.raises(asyncio.CancelledError, task)


async def failed_call_in_a_thread(watch: Watch) -> None:
    await watch.raises(Boom, one(in_thread(fails)).orchestrate("only"))


async def cancelled_call_in_a_thread(watch: Watch) -> None:
    entered, goes_on = threading.Event(), threading.Event()

    def blocks() -> None:
        entered.set()
        goes_on.wait(10)

    task = asyncio.ensure_future(one(in_thread(blocks)).orchestrate("only"))
    while not entered.is_set():
        await ticks(1)
    task.cancel()
    await ticks(2)
    goes_on.set()
    await watch.raises(asyncio.CancelledError, task)


async def batch(watch: Watch) -> None:
    """Items, values, errors, the generator, the task and its run; the items already before finish."""

    class Finishes(Batch):
        def finish(self, outcomes: list[BranchOutcome], ctx: RunContext) -> str:
            assert [ref() for ref in items[1:]] == [None] * 5  # the traceback of the failing item has the first
            assert len(outcomes) == 6
            watch.new(outcomes[0].error)
            return "done"

    items: list[weakref.ref[Any]] = []

    def thing() -> Thing:
        made = Thing()
        items.append(weakref.ref(made))
        return watch.new(made)

    def read() -> Iterator[Any]:
        for _ in range(6):
            yield thing()

    async def work(item: Any) -> Any:
        await asyncio.sleep(0)
        if item is items[0]():
            raise Boom(watch.new())
        return watch.new()

    await one(watch.new(Finishes(lambda: watch.new(read()), work))).orchestrate("only")


async def batch_of_async_items(watch: Watch) -> None:
    async def read() -> AsyncIterator[Any]:
        for _ in range(6):
            await asyncio.sleep(0)
            yield watch.new()

    limits = {"item_retry": RetryMode.fixed(1, 0), "item_timeout": 9}
    await one(watch.new(Batch(lambda: watch.new(read()), waits, **limits))).orchestrate("only")


async def batch_that_cannot_be_read(watch: Watch) -> None:
    def read() -> Iterator[Any]:
        yield watch.new()
        yield watch.new()
        raise watch.new(Boom(watch.new()))

    await watch.raises(Boom, one(Batch(read, waits_forever, concurrency=3)).orchestrate("only"))


async def batch_whose_items_all_fail(watch: Watch) -> None:
    class Finishes(Batch):
        def finish(self, outcomes: list[BranchOutcome]) -> str:
            raise ExceptionGroup("all", [watch.new(outcome.error) for outcome in outcomes])

    await watch.raises(ExceptionGroup, one(Finishes(three, waits_and_fails)).orchestrate("only"))


async def cancelled_batch(watch: Watch) -> None:
    async def read() -> AsyncIterator[Any]:
        for _ in range(6):
            yield watch.new()

    for items in (read, lambda: (watch.new() for _ in range(6))):
        task = asyncio.ensure_future(one(Batch(items, waits_forever)).orchestrate("only"))
        await ticks(3)
        task.cancel()
        await watch.raises(asyncio.CancelledError, task)


async def closed_batch(watch: Watch) -> None:
    async def stops(item: Any) -> None:
        await hands_out(item)

    coroutine = one(Batch(lambda: (watch.new() for _ in range(6)), stops)).orchestrate("only")
    coroutine.send(None)
    coroutine.close()


SCENARIOS: list[Scenario] = [
    result_and_resources,
    resources_with_a_life_cycle,
    definition,
    values_of_a_split,
    failure,
    failure_of_a_handle,
    retries_exhausted,
    retried_failures,
    caught_error,
    caught_error_of_retries,
    caught_error_that_nobody_takes,
    error_from_a_caught_one,
    caught_error_in_a_run_that_is_cancelled,
    caught_join_error,
    attempt_timeout,
    run_timeout,
    run_timeout_in_split,
    run_timeout_in_set_up,
    failed_set_up,
    failed_join,
    invalid_transition,
    cancelled_run,
    cancelled_split,
    cancelled_handle,
    cancelled_tear_down,
    failed_call_in_a_thread,
    cancelled_call_in_a_thread,
    batch,
    batch_of_async_items,
    batch_that_cannot_be_read,
    batch_whose_items_all_fail,
    cancelled_batch,
    closed_batch,
]


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
async def test_objects_of_a_run_die_at_once(scenario: Scenario) -> None:
    """Arguments, results, exceptions, resources and definitions go when the run is let go, without the collector."""
    # reliability C9; hot-path 5
    watch = Watch()

    with no_collector():
        await scenario(watch)
        await ticks(3)
        alive = [ref() for ref in watch.watched]

    assert watch.watched
    assert [thing for thing in alive if thing is not None] == []


@types.coroutine
def hands_out(value: Any) -> Generator[Any, Any, Any]:
    """An await that no loop knows: hands the value to whoever drives, and returns what it is sent."""
    return (yield value)


class TestCyclesOfTheUser:
    """What the user ties into a knot is found by the collector: every class of ours shows what it holds."""

    def test_task_that_knows_its_workflow_is_collected(self) -> None:
        """A frozen workflow whose task refers to it goes with the next collection."""
        task = task_with(TaskConfig().with_fixed_retry(1, 0), value)
        task.workflow = one(task)  # type: ignore[attr-defined]
        task.workflow.validate()  # type: ignore[attr-defined]
        refs = [weakref.ref(task), weakref.ref(task.workflow)]  # type: ignore[attr-defined]

        del task
        gc.collect()

        assert [ref() for ref in refs] == [None, None]

    def test_suspended_run_in_its_own_resources_is_collected(self) -> None:
        """A run that was left in the middle, and that its resources refer to, goes, and its task's clean-up runs."""
        events = []

        async def task(thing: Annotated[Thing, Res("thing")], ctx: RunContext) -> str:
            try:
                return await hands_out("pause")
            finally:
                events.append("clean-up")

        thing = Thing()
        thing.coroutine = one(task).orchestrate("only", resources={"thing": thing})  # type: ignore[attr-defined]
        thing.coroutine.send(None)  # type: ignore[attr-defined]
        ref = weakref.ref(thing)

        del thing
        gc.collect()

        assert ref() is None
        assert events == ["clean-up"]

    def test_suspended_run_that_an_error_led_on_is_collected(self) -> None:
        """A run that was left in the visit of an error, whose traceback refers to the run, goes with the next collection."""
        watch = Watch()

        async def task() -> str:
            raise watch.new(Boom(watch.new()))

        async def handler(error: Caught[Boom]) -> str:
            return await hands_out("pause")

        workflow = Workflow[str]().register("only", task, on_error={Boom: "handler"}).register("handler", handler)
        coroutine = workflow.add_exit_state("done").orchestrate("only")
        coroutine.send(None)

        del coroutine
        gc.collect()

        assert [ref() for ref in watch.watched] == [None, None]

    async def test_split_result_that_holds_itself_is_collected(self) -> None:
        """A branch value that refers to the result it is in goes with the next collection."""
        kept: list[Any] = []

        async def branch() -> Thing:
            return Thing()

        async def joined(result: SplitResult) -> str:
            (thing,) = result.values()
            thing.result = result
            kept.append(weakref.ref(thing))
            return "done"

        workflow = Workflow[str]().register_split("only", [branch], JoinConfig(JoinStrategy.All, "joined"))
        await workflow.register("joined", joined).add_exit_state("done").orchestrate("only")
        gc.collect()

        assert kept[0]() is None

    async def test_context_that_a_task_keeps_in_a_resource_is_collected(self) -> None:
        """A RunContext kept in a resource of its own run is a cycle that the collector sees."""
        thing = Thing()

        async def task(thing: Annotated[Thing, Res("thing")], ctx: RunContext) -> str:
            thing.ctx = ctx  # type: ignore[attr-defined]
            return "done"

        await one(task).orchestrate("only", resources={"thing": thing})
        ref = weakref.ref(thing)
        del thing
        gc.collect()

        assert ref() is None

    def test_store_that_holds_itself_is_collected(self) -> None:
        """A MemoryStore among its own values goes with the next collection."""
        store, thing = MemoryStore(), Thing()
        store.put("self", store)
        store.put("thing", thing)
        ref = weakref.ref(thing)

        del store, thing
        gc.collect()

        assert ref() is None


# --- runs that are handled badly -------------------------------------------------------------------------------------


class Diary(Resource):
    """A resource that writes down its life; its tear-down may have to wait."""

    def __init__(self, *, waits: bool = False) -> None:
        self.lines: list[str] = []
        self.waits = waits

    async def setup(self) -> None:
        self.lines.append("up")

    async def teardown(self) -> None:
        self.lines.append("down")
        if self.waits:
            await hands_out("tear-down")
            self.lines.append("torn")


@pytest.fixture
def unraisable(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What Python could only report to `sys.unraisablehook`."""
    seen: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", seen.append)
    return seen


class TestNeverAwaited:
    def test_coroutine_that_is_dropped_warns(self) -> None:
        """`orchestrate` is a coroutine function: forgetting its await gets Python's own warning, and runs nothing."""
        diary = Diary()
        workflow = one(fails, {"diary": diary})

        with pytest.warns(RuntimeWarning, match="coroutine 'Workflow.orchestrate' was never awaited"):
            workflow.orchestrate("only")

        assert diary.lines == []

    async def test_dropped_handle_of_a_failing_run_is_reported_by_asyncio(self, asyncio_reports: list[str]) -> None:
        """An error that nobody takes is reported as that of any task, by the name of the workflow."""
        Workflow[str](name="nightly").register("only", fails).add_exit_state("done").start("only")

        await ticks(3)
        gc.collect()

        assert len(asyncio_reports) == 1
        assert "Task exception was never retrieved" in asyncio_reports[0]
        assert "nightly" in asyncio_reports[0]
        asyncio_reports.clear()

    async def test_dropped_handle_of_a_run_that_ends_well_is_silent(self) -> None:
        """Nobody has to take a result."""
        finished = []
        one(lambda: finished.append(1) or "done").start("only")

        await ticks(3)

        assert finished == [1]

    def test_start_without_a_loop_leaves_no_coroutine_behind(self) -> None:
        """A refused start makes nothing that could be forgotten."""
        with pytest.raises(Exception, match="running event loop"):
            one(value).start("only")

        assert gc.collect() >= 0  # a coroutine left behind would warn, and warnings are errors


class TestAwaitedTwice:
    async def test_coroutine_awaited_again_is_refused(self) -> None:
        """A coroutine object runs once, as Python has it."""
        coroutine = one(lambda: "done").orchestrate("only")
        first = await coroutine

        with pytest.raises(RuntimeError, match="cannot reuse already awaited coroutine"):
            await coroutine

        assert first == "done"

    async def test_handle_awaited_again_gives_the_same(self) -> None:
        """A handle may be awaited any number of times, at once and later, and gives the same result or error."""
        good, bad = one(waits_a_turn).start("only"), one(fails).start("only")

        results = await asyncio.gather(good, good, bad, bad, return_exceptions=True)
        again = await asyncio.gather(good, bad, return_exceptions=True)

        assert results[:2] == ["done", "done"]
        assert results[2] is results[3]
        assert again == ["done", results[2]]

    def test_handle_awaited_on_another_loop_is_refused(self) -> None:
        """A live run belongs to its loop; asyncio refuses an await from another one."""

        async def main() -> None:
            handle = one(forever).start("only")

            async def elsewhere() -> None:
                await handle

            with pytest.raises(RuntimeError, match="different loop"):
                await asyncio.to_thread(run, elsewhere())
            handle.cancel()
            await ticks(3)
            assert handle.done()

        run(main())

    async def test_handle_is_cancelled_from_another_thread_through_the_loop(self) -> None:
        """`call_soon_threadsafe` is the door for other threads, as for every asyncio object."""
        loop, handle = asyncio.get_running_loop(), one(forever).start("only")

        await asyncio.to_thread(lambda: loop.call_soon_threadsafe(handle.cancel, "from a thread"))
        with pytest.raises(WorkflowCancelledError) as caught:
            await handle

        assert caught.value.reason == "from a thread"

    def test_run_stepped_by_another_thread_is_refused(self) -> None:
        """A run belongs to the thread that stepped it first."""

        async def task() -> str:
            return await hands_out("pause")

        coroutine = one(task).orchestrate("only")
        coroutine.send(None)
        seen = []

        def foreign() -> None:
            try:
                coroutine.send("done")
            except RuntimeError as error:
                seen.append(str(error))

        thread = threading.Thread(target=foreign)
        thread.start()
        thread.join()

        assert seen == ["a run belongs to the thread that started it; use loop.call_soon_threadsafe()"]

    def test_runs_of_one_workflow_in_many_threads_do_not_meet(self) -> None:
        """A frozen workflow may be used by a loop in each thread at once."""
        workflow, outcomes = one(waits_a_turn), []

        async def many() -> None:
            outcomes.extend([await workflow.orchestrate("only") for _ in range(200)])

        threads = [threading.Thread(target=lambda: asyncio.run(many())) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

        assert outcomes == ["done"] * 800


class TestLoopThatEnds:
    @pytest.mark.parametrize("shape", ["task", "split"])
    def test_asyncio_run_that_ends_first_ends_the_run(self, shape: str) -> None:
        """Runs that are alive when `asyncio.run` ends are cancelled by it, and clean up on the loop."""
        diary, events = Diary(), []

        async def task() -> None:
            try:
                await forever()
            finally:
                events.append("clean-up")

        async def main() -> Any:
            workflow = Workflow[str]({"diary": diary}).add_exit_state("done").with_timeout(60)
            if shape == "task":
                workflow.register("only", task)
            else:
                workflow.register_split("only", [task, task], JoinConfig(JoinStrategy.All, "done"))
            handle = workflow.start("only")
            await ticks(5)
            return handle

        handle = run(main())

        assert handle.done()
        assert diary.lines == ["up", "down"]
        assert events == ["clean-up"] * (1 if shape == "task" else 2)

    @pytest.mark.parametrize("shape", ["task", "split", "timeout", "resources"])
    def test_loop_closed_under_a_run_breaks_nothing_else(self, shape: str, unraisable: list[Any]) -> None:
        """A loop that is closed without cancelling its tasks strands the run; the process goes on, without a report."""
        workflow = {
            "task": lambda: one(forever),
            "split": lambda: split(forever, forever, timeout=60),
            "timeout": lambda: one(forever).with_timeout(60),
            "resources": lambda: one(forever, {"a": Part()}),
        }[shape]()
        loop = VirtualClockLoop()

        async def main() -> Any:
            handle = workflow.start("only")
            await ticks(5)
            return handle

        handle = loop.run_until_complete(main())
        loop.close()
        stranded = handle.done()
        with pytest.raises(RuntimeError, match="Event loop is closed"):
            handle.cancel()

        assert not stranded
        assert unraisable == []

    def test_runs_of_a_closed_loop_do_not_outlive_the_next_loop(self, asyncio_reports: list[str]) -> None:
        """What keeps live runs from the collector lets go of those whose loop was closed."""
        loop = VirtualClockLoop()

        async def main() -> Any:
            handle = one(forever).start("only")
            await ticks(2)
            return weakref.ref(handle._task)

        ref = loop.run_until_complete(main())
        loop.close()
        del loop

        async def other() -> None:
            await one(lambda: "done").start("only")

        run(other())
        gc.collect()

        assert ref() is None
        assert all("Task was destroyed but it is pending" in text for text in asyncio_reports)
        asyncio_reports.clear()


class TestDrivenByHand:
    def test_values_pass_between_driver_and_task(self) -> None:
        """What a task hands out goes up unchanged, what is sent goes down unchanged, and the end is the exit state."""
        thing, seen = Thing(), []

        async def task() -> str:
            seen.append(await hands_out(thing))
            seen.append(await hands_out("second"))
            return "done"

        coroutine = one(task).orchestrate("only")
        handed = [coroutine.send(None), coroutine.send("a")]
        with pytest.raises(StopIteration) as stop:
            coroutine.send("b")

        assert handed[0] is thing
        assert handed[1] == "second"
        assert seen == ["a", "b"]
        assert stop.value.value == "done"

    def test_exception_thrown_in_reaches_the_task(self) -> None:
        """`throw` lands where the task waits, as the same object, and the task may catch it and go on."""
        error, seen = Boom(), []

        async def task() -> str:
            try:
                await hands_out("first")
            except Boom as caught:
                seen.append(caught)
            return await hands_out("second")

        coroutine = one(task).orchestrate("only")
        coroutine.send(None)
        handed = coroutine.throw(error)
        with pytest.raises(StopIteration) as stop:
            coroutine.send("done")

        assert seen[0] is error
        assert handed == "second"
        assert stop.value.value == "done"

    def test_exception_thrown_in_and_not_caught_is_a_failure_of_the_task(self) -> None:
        """What comes back out is the same object, annotated; with a policy it is retried like any failure."""
        error = Boom()

        async def task(ctx: RunContext) -> str:
            return await hands_out(ctx.attempt)

        coroutine = one(task_with(TaskConfig().with_fixed_retry(1, 0), task)).orchestrate("only")
        attempts = [coroutine.send(None), coroutine.throw(error)]
        while attempts[-1] is None:  # the back-off's own turn of the loop
            attempts[-1] = coroutine.send(None)
        with pytest.raises(RetryExhaustedError) as caught:
            coroutine.throw(error)

        assert attempts == [1, 2]
        assert caught.value.__cause__ is error

    @pytest.mark.parametrize("started", [False, True], ids=["before the first step", "suspended"])
    async def test_close_ends_the_task_and_tears_down_what_need_not_wait(self, started: bool) -> None:  # noqa: FBT001
        """`close` raises GeneratorExit in the task; a tear-down that does not wait is still done."""
        diary, events = Diary(), []

        async def task() -> str:
            try:
                return await hands_out("pause")
            except GeneratorExit:
                events.append("closed")
                raise

        coroutine = one(task, {"diary": diary}).orchestrate("only")
        if started:
            coroutine.send(None)
        coroutine.close()

        assert events == ["closed"] * started
        assert diary.lines == ["up", "down"] * started
        coroutine.close()

    async def test_close_cannot_wait_for_a_tear_down(self, caplog: pytest.LogCaptureFixture) -> None:
        """A tear-down that has to wait cannot, while its coroutine is closed: what is left out is logged by name."""
        first, second = Diary(), Diary(waits=True)

        async def task() -> str:
            return await hands_out("pause")

        coroutine = one(task, {"first": first, "second": second}).orchestrate("only")
        coroutine.send(None)
        with pytest.raises(RuntimeError, match="ignored GeneratorExit"):
            coroutine.close()
        with caplog.at_level(logging.ERROR, logger="cano"):
            coroutine.close()

        assert (first.lines, second.lines) == (["up"], ["up", "down"])
        assert [record.getMessage() for record in caplog.records] == [
            "resource 'first' was not torn down: the coroutine using it was closed"
        ]

    async def test_close_in_a_split_ends_the_branches(self) -> None:
        """A closed run cannot await its branches; they are closed with it, or cancelled where they are plain tasks."""
        events = []

        async def branch() -> None:
            try:
                await forever()
            finally:
                events.append("ended")

        coroutine = split(branch, branch).orchestrate("only")
        coroutine.send(None)
        await ticks(2)
        coroutine.close()
        await ticks(3)

        assert events == ["ended", "ended"]

    def test_task_that_ignores_its_close_is_reported(self) -> None:
        """A task that goes on after GeneratorExit gets Python's own error for that."""

        async def task() -> str:
            try:
                return await hands_out("pause")
            except GeneratorExit:
                return await hands_out("again")

        coroutine = one(task).orchestrate("only")
        coroutine.send(None)

        with pytest.raises(RuntimeError, match="ignored GeneratorExit"):
            coroutine.close()

    def test_timeout_without_a_loop_is_refused(self) -> None:
        """A run with a timeout needs a loop, says so, and runs nothing."""
        ran = []
        coroutine = one(lambda: ran.append(1) or "done").orchestrate("only", timeout=1)

        with pytest.raises(RuntimeError, match="no running event loop"):
            coroutine.send(None)

        assert ran == []

    def test_plain_run_needs_no_loop_at_all(self) -> None:
        """States without waits, timeouts or splits run wherever a coroutine can be stepped."""
        with pytest.raises(StopIteration) as stop:
            one(value_of_done).orchestrate("only").send(None)

        assert stop.value.value == "done"

    async def test_async_generator_around_a_run_can_be_closed(self) -> None:
        """A run awaited inside an asynchronous generator that is closed early tears down."""
        diary = Diary()

        async def results() -> AsyncIterator[str]:
            async with Resources({"diary": diary}) as resources:
                while True:
                    yield await one(lambda: "done", resources).orchestrate("only")

        generator = results()
        first = await anext(generator)
        await generator.aclose()

        assert first == "done"
        assert diary.lines == ["up", "down"]


async def value_of_done() -> str:
    return "done"
