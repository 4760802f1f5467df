"""A cancel before every single callback of the event loop, for every shape of workflow.

Method. `SteppedLoop` is the virtual-clock loop that counts the callbacks it runs. A first run without a cancel gives the
number of steps and the usual outcome of a shape; then the same run is repeated once for each step, and just before that step
it is cancelled. A cancel may come from `Task.cancel`, `Run.cancel`, `asyncio.timeout` or an anyio scope; pairs of cancels hit
the clean-up. After each run the same invariants hold, whatever the shape: see `Trial.check`.
"""

import asyncio
import itertools
import math
import os
import random
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any

import anyio
import pytest

from cano import (
    After,
    BatchTask,
    BranchOutcome,
    Bulkhead,
    CompensatableTask,
    Continue,
    Done,
    ItemErrorPolicy,
    JoinConfig,
    JoinError,
    JoinStrategy,
    JoinTimeoutError,
    More,
    Pending,
    PollErrorPolicy,
    Ready,
    Res,
    Resource,
    Resources,
    RetryExhaustedError,
    RetryMode,
    Stop,
    StreamWindow,
    Task,
    TaskConfig,
    TaskResult,
    Workflow,
    WorkflowCancelledError,
    WorkflowTimeoutError,
    in_thread,
)
from cano.testing import VirtualClockLoop, assert_no_orphans

MESSAGE = "stop"
STRIDE = 7 if os.environ.get("PYTHONASYNCIODEBUG") else 1  # of the pairs of steps: debug mode writes down many stacks
CLEAN_UP = ("tear-down", "disconnecting", "draining", "undoing")


# --- the loop --------------------------------------------------------------------------------------------------------


class _Step(asyncio.Handle):
    __slots__ = ()

    def _run(self) -> None:
        self._loop.before_step()
        super()._run()


class _TimerStep(asyncio.TimerHandle):
    __slots__ = ()

    def _run(self) -> None:
        self._loop.before_step()
        super()._run()


class SteppedLoop(VirtualClockLoop):
    """Counts the callbacks it runs, and does what is planned just before one of them."""

    def __init__(self) -> None:
        self.step: int | None = None
        self.plan: dict[int, list[Callable[[], object]]] = {}
        super().__init__()

    def before_step(self) -> None:
        if self.step is None:
            return
        for action in self.plan.pop(self.step, ()):
            action()
        self.step += 1

    def _call_soon(self, *args: Any, **kwargs: Any) -> asyncio.Handle:
        handle = super()._call_soon(*args, **kwargs)
        handle.__class__ = _Step
        return handle

    def call_at(self, *args: Any, **kwargs: Any) -> asyncio.TimerHandle:
        timer = super().call_at(*args, **kwargs)
        timer.__class__ = _TimerStep
        return timer


# --- what happened ---------------------------------------------------------------------------------------------------


class Boom(Exception):
    """A failure of the user's own."""


@dataclass
class Ledger:
    """What is going on in the user's code of one run."""

    clock: Callable[[], float] = float
    scale: float = 1.0
    alive: list[str] = field(default_factory=list)
    begun: list[tuple[float, str]] = field(default_factory=list)
    messages: list[tuple[Any, ...]] = field(default_factory=list)
    live: list[str] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)
    bulkheads: list[Bulkhead] = field(default_factory=list)

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """A piece of user code, from its first to its last line."""
        self.begun.append((self.clock(), name))
        self.alive.append(name)
        try:
            yield
        except asyncio.CancelledError as error:
            self.messages.append(error.args)
            raise
        finally:
            self.alive.remove(name)

    async def work(self, name: str, seconds: float = 1.0) -> None:
        """Work that waits, and has a clean-up that waits as well."""
        with self.span(name):
            try:
                await asyncio.sleep(seconds * self.scale)
            finally:
                await asyncio.sleep(0)

    def set_up(self, name: str) -> None:
        """A resource is ready."""
        self.live.append(name)

    def tear_down(self, name: str) -> None:
        """A resource is about to go: it is the newest one, and nobody uses it."""
        if self.alive:
            self.violations.append(f"{self.alive} alive at the tear-down of {name}")
        if not self.live or self.live.pop() != name:
            self.violations.append(f"{name} torn down out of turn")

    def bulkhead(self, limit: int) -> Bulkhead:
        """A bulkhead that is to be free at the end."""
        self.bulkheads.append(Bulkhead(limit))
        return self.bulkheads[-1]

    def check(self) -> None:
        """Nothing of the run is alive, its bulkheads are free, and its resources came and went as they should."""
        assert not self.alive
        assert [(bulkhead.in_use, bulkhead.waiting) for bulkhead in self.bulkheads] == [(0, 0)] * len(self.bulkheads)
        assert not self.live
        assert not self.violations


class Part(Resource):
    """A resource that waits in its set-up and in its tear-down."""

    def __init__(self, ledger: Ledger, name: str, *, fails: bool = False) -> None:
        self.ledger = ledger
        self.name = name
        self.fails = fails

    async def setup(self) -> None:
        await self.ledger.work(f"set-up of {self.name}", 0.5)
        if self.fails:
            raise Boom(self.name)
        self.ledger.set_up(self.name)

    async def teardown(self) -> None:
        self.ledger.tear_down(self.name)
        await self.ledger.work(f"tear-down of {self.name}", 0.5)


# --- the shapes ------------------------------------------------------------------------------------------------------


def does(ledger: Ledger, name: str, *results: Any, seconds: float = 1.0, config: TaskConfig | None = None) -> Task[Any]:
    """A task that works, then returns (or raises) its results one after another, the last one for ever."""
    todo = list(results)

    class Work(Task[Any]):
        async def run(self) -> Any:
            await ledger.work(name, seconds)
            result = todo.pop(0) if len(todo) > 1 else todo[0]
            if isinstance(result, Exception):
                raise result
            return result

    task = Work()
    task.name = name
    task.config = config
    return task


def branches(ledger: Ledger, *seconds: float, fails: tuple[int, ...] = ()) -> list[Task[Any]]:
    return [
        does(ledger, f"branch{index}", Boom(index) if index in fails else index, seconds=duration)
        for index, duration in enumerate(seconds)
    ]


def joined(ledger: Ledger, *tasks: Any, **join: Any) -> Workflow[str]:
    strategy = join.pop("strategy", JoinStrategy.All)
    workflow = Workflow[str]().register_split("split", tasks, JoinConfig(strategy, "after", **join))
    return workflow.register("after", does(ledger, "after", "done")).add_exit_state("done")


def single(ledger: Ledger, *results: Any, config: TaskConfig | None = None, **options: Any) -> Workflow[str]:
    return (
        Workflow[str]()
        .register("only", does(ledger, "only", *results, config=config, **options))
        .add_exit_state("done")
    )


SHAPES: dict[str, tuple[Callable[[Ledger], Workflow[str]], str, object]] = {}


def shape(initial: str, outcome: object = "done") -> Callable[[Any], Any]:
    """Add a shape: the state it starts in, and what it returns or the type it raises when nobody cancels it."""

    def add(make: Callable[[Ledger], Workflow[str]]) -> Callable[[Ledger], Workflow[str]]:
        SHAPES[make.__name__] = (make, initial, outcome)
        return make

    return add


@shape("a")
def chain(ledger: Ledger) -> Workflow[str]:
    workflow = Workflow[str]().register("a", does(ledger, "a", "b")).register("b", does(ledger, "b", "c"))
    return workflow.register("c", does(ledger, "c", "done")).add_exit_state("done")


@shape("only")
def loop(ledger: Ledger) -> Workflow[str]:
    return single(ledger, "only", "only", "only", "only", "done", seconds=0)


@shape("only")
def hot_loop(ledger: Ledger) -> Workflow[str]:
    visits = itertools.count(1)

    def step() -> str:
        return "done" if next(visits) == 3000 else "only"

    return Workflow[str]().register("only", step).add_exit_state("done")


@shape("only")
def retry_with_backoff(ledger: Ledger) -> Workflow[str]:
    config = TaskConfig().with_exponential_retry(3, 1.0, jitter=0.5)
    return single(ledger, Boom(1), Boom(2), "done", config=config)


@shape("only", RetryExhaustedError)
def retry_exhausted(ledger: Ledger) -> Workflow[str]:
    return single(ledger, Boom(), config=TaskConfig().with_fixed_retry(2, 0))


@shape("only", RetryExhaustedError)
def attempt_timeout(ledger: Ledger) -> Workflow[str]:
    config = TaskConfig().with_fixed_retry(1, 0.5).with_attempt_timeout(0.5)
    return single(ledger, "done", config=config)


@shape("a")
def errors_lead_on(ledger: Ledger) -> Workflow[str]:
    keys: Any = {Exception: "c"}
    retried = TaskConfig().with_fixed_retry(1, 0.5)
    workflow = Workflow[str]().register("a", does(ledger, "a", Boom(), config=retried), on_error={Boom: "b"})
    join = JoinConfig(JoinStrategy.All, "done")
    workflow.register_split("b", branches(ledger, 0, 1, fails=(0,)), join, on_error={JoinError: "f"} | keys)
    fork = does(ledger, "f", TaskResult.Split(["g", "g"]))
    workflow.register("f", fork, join=join, on_error=keys).register(
        "g", does(ledger, "g", Boom()), on_error={Boom: "h"}
    )
    workflow.register("h", does(ledger, "h", Boom())).register("c", does(ledger, "c", Boom(), "done"), on_error=keys)
    return workflow.add_exit_state("done")


@shape("only", WorkflowTimeoutError)
def run_timeout(ledger: Ledger) -> Workflow[str]:
    return single(ledger, "only").with_timeout(2.5)


@shape("only", WorkflowTimeoutError)
def run_timeout_in_backoff(ledger: Ledger) -> Workflow[str]:
    config = TaskConfig().with_fixed_retry(5, 1.0).with_attempt_timeout(0.75)
    return single(ledger, "done", config=config).with_timeout(3)


@shape("split", WorkflowTimeoutError)
def run_timeout_in_split(ledger: Ledger) -> Workflow[str]:
    retried = TaskConfig().with_fixed_retry(5, 0.5)
    hopeless = does(ledger, "hopeless", Boom(), config=retried)
    return joined(ledger, hopeless, *branches(ledger, 1, 5)).with_timeout(2.5)


@shape("split")
def split_all(ledger: Ledger) -> Workflow[str]:
    return joined(ledger, *branches(ledger, 0, 1, 1, 2))


@shape("split", JoinError)
def split_all_failed(ledger: Ledger) -> Workflow[str]:
    return joined(ledger, *branches(ledger, 0, 1, 2, fails=(0, 2)))


@shape("split", JoinError)
def split_all_failed_fast(ledger: Ledger) -> Workflow[str]:
    return joined(ledger, *branches(ledger, 2, 1, 3, fails=(1,)), fail_fast=True)


@shape("split")
def split_any(ledger: Ledger) -> Workflow[str]:
    return joined(ledger, *branches(ledger, 2, 1, 3), strategy=JoinStrategy.Any)


@shape("split")
def split_quorum(ledger: Ledger) -> Workflow[str]:
    return joined(ledger, *branches(ledger, 1, 2, 3, 4, fails=(0,)), strategy=JoinStrategy.Quorum(2))


@shape("split")
def split_with_bulkhead(ledger: Ledger) -> Workflow[str]:
    return joined(ledger, *branches(ledger, 1, 2, 1, 1, 2), bulkhead=2)


@shape("split")
def split_any_with_bulkhead(ledger: Ledger) -> Workflow[str]:
    return joined(ledger, *branches(ledger, 1, 2, 1, 1), strategy=JoinStrategy.Any, bulkhead=2)


@shape("split")
def split_hedged(ledger: Ledger) -> Workflow[str]:
    return joined(ledger, *branches(ledger, 9, 2, 1, 9, fails=(1,)), strategy=JoinStrategy.Any, hedge_after=1.25)


@shape("split")
def splits_over_a_shared_bulkhead(ledger: Ledger) -> Workflow[str]:
    shared = ledger.bulkhead(2)

    def inner(name: str, strategy: JoinStrategy) -> Callable[[], Any]:
        tasks = [does(ledger, f"{name}{index}", "x", seconds=index) for index in (1, 2, 1)]
        nested = Workflow[str]().register_split("split", tasks, JoinConfig(strategy, "done", bulkhead=shared))
        nested.add_exit_state("done")
        return lambda: nested.orchestrate("split")

    async def by_hand() -> None:
        async with shared:
            await ledger.work("by hand")

    return joined(ledger, inner("p", JoinStrategy.All), inner("q", JoinStrategy.Any), by_hand)


@shape("split")
def partial_timeout(ledger: Ledger) -> Workflow[str]:
    return joined(ledger, *branches(ledger, 1, 2, 9), strategy=JoinStrategy.PartialTimeout, timeout=2.5)


@shape("split", JoinTimeoutError)
def join_timeout(ledger: Ledger) -> Workflow[str]:
    return joined(ledger, *branches(ledger, 1, 9, 9), timeout=2.5, bulkhead=2)


@shape("split", JoinError)
def split_with_retries(ledger: Ledger) -> Workflow[str]:
    retried = TaskConfig().with_fixed_retry(1, 0.5).with_attempt_timeout(1.5)
    slow = does(ledger, "slow", "x", seconds=9, config=retried)
    flaky = does(ledger, "flaky", Boom(), "x", config=retried)
    return joined(ledger, slow, flaky)


@shape("split")
def split_made_at_run_time(ledger: Ledger) -> Workflow[str]:
    async def make() -> list[Task[Any]]:
        await ledger.work("factory")
        return branches(ledger, 1, 2)

    workflow = Workflow[str]().register_split("split", make, JoinConfig(JoinStrategy.All, "done"))
    return workflow.add_exit_state("done")


@shape("split")
def split_in_split(ledger: Ledger) -> Workflow[str]:
    def inner(name: str, strategy: JoinStrategy) -> Callable[[], Any]:
        tasks = [does(ledger, f"{name}{index}", "x", seconds=index) for index in (1, 2)]
        nested = Workflow[str]().register_split("split", tasks, JoinConfig(strategy, "done")).add_exit_state("done")

        async def run() -> str:
            with ledger.span(name):
                return await nested.orchestrate("split")

        return run

    return joined(ledger, inner("p", JoinStrategy.All), inner("q", JoinStrategy.Any))


@shape("fork")
def fork(ledger: Ledger) -> Workflow[str]:
    split = TaskResult.Split(["left", "right", "nested"])
    workflow = Workflow[str]().register("fork", does(ledger, "fork", split), join=JoinConfig(JoinStrategy.All, "after"))
    workflow.register("left", does(ledger, "left", "left2")).register("left2", does(ledger, "left2", "after"))
    workflow.register("right", does(ledger, "right", "after", seconds=2.5))
    workflow.register_split("nested", branches(ledger, 0, 2), JoinConfig(JoinStrategy.All, "after"))
    return workflow.register("after", does(ledger, "after", "done")).add_exit_state("done")


@shape("only")
def resources(ledger: Ledger) -> Workflow[str]:
    parts = {name: Part(ledger, name) for name in "pqr"}
    return Workflow[str](parts).register("only", does(ledger, "only", "done")).add_exit_state("done")


@shape("only", Boom)
def resources_of_a_failing_run(ledger: Ledger) -> Workflow[str]:
    parts = {name: Part(ledger, name) for name in "pq"}
    return Workflow[str](parts).register("only", does(ledger, "only", Boom())).add_exit_state("done")


@shape("only", Boom)
def resources_with_a_failing_set_up(ledger: Ledger) -> Workflow[str]:
    parts = {name: Part(ledger, name, fails=name == "r") for name in "pqrs"}
    return Workflow[str](parts).register("only", does(ledger, "only", "done")).add_exit_state("done")


@shape("only", WorkflowTimeoutError)
def timeout_in_set_up(ledger: Ledger) -> Workflow[str]:
    parts = {name: Part(ledger, name) for name in "pqr"}
    workflow = Workflow[str](parts).register("only", does(ledger, "only", "done")).add_exit_state("done")
    return workflow.with_timeout(1.25)


@shape("split", WorkflowTimeoutError)
def timeout_in_split_with_resources(ledger: Ledger) -> Workflow[str]:
    parts = Resources({name: Part(ledger, name) for name in "pq"})
    workflow = Workflow[str](parts).register_split(
        "split", branches(ledger, 1, 2, 9), JoinConfig(JoinStrategy.All, "done", bulkhead=2)
    )
    return workflow.add_exit_state("done").with_timeout(3)


@shape("only")
def managed(ledger: Ledger) -> Workflow[str]:
    @asynccontextmanager
    async def connection() -> Any:
        await ledger.work("connecting", 0.5)
        ledger.set_up("connection")
        yield "connection"
        ledger.tear_down("connection")
        await ledger.work("disconnecting", 0.5)

    @contextmanager
    def folder() -> Iterator[str]:
        ledger.set_up("folder")
        yield "folder"
        ledger.tear_down("folder")

    async def use(connection: Annotated[str, Res("connection")], folder: Annotated[str, Res("folder")]) -> str:
        await ledger.work(f"use of {connection} and {folder}")
        return "done"

    held = Resources().manage("folder", folder).manage("connection", connection)
    return Workflow[str](held).register("only", use).add_exit_state("done")


@shape("a")
def thread(ledger: Ledger) -> Workflow[str]:
    def block() -> str:
        with ledger.span("thread"):
            return "b"

    workflow = Workflow[str]({"p": Part(ledger, "p")}).register("a", in_thread(block))
    return workflow.register("b", does(ledger, "b", "done")).add_exit_state("done")


@shape("outer")
def workflow_in_workflow(ledger: Ledger) -> Workflow[str]:
    inner = Workflow[str]({"inner": Part(ledger, "inner")}).register("only", does(ledger, "inner", "done"))
    inner.add_exit_state("done").with_timeout(30)

    async def outer() -> str:
        await inner.orchestrate("only")
        await inner.start("only")
        return "done"

    return Workflow[str]().register("outer", outer).add_exit_state("done").with_timeout(60)


@shape("split")
def scopes_in_tasks(ledger: Ledger) -> Workflow[str]:
    async def group() -> None:
        with pytest.raises(BaseExceptionGroup) as caught:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(ledger.work("child", 5))
                await ledger.work("group")
                raise Boom
        assert caught.group_contains(Boom)

    async def deadline() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1.5):
                await ledger.work("deadline", 5)

    async def scope() -> None:
        with anyio.move_on_after(1.5):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(asyncio.sleep, 5)
                await asyncio.sleep(5)

    return joined(ledger, group, deadline, scope)


@shape("a")
def awaitables(ledger: Ledger) -> Workflow[str]:
    class Work:
        def __await__(self) -> Any:
            yield from ledger.work("awaitable").__await__()
            return "b"

    def future() -> asyncio.Future[str]:
        made: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_soon(lambda: made.done() or made.set_result("done"))
        return made

    def work() -> Work:
        return Work()

    return Workflow[str]().register("a", work).register("b", future).add_exit_state("done")


@shape("poll")
def poll(ledger: Ledger) -> Workflow[str]:
    todo = [Pending(), Boom(1), Boom(2), Pending(1), Ready("done")]

    class Poll:
        on_poll_error = PollErrorPolicy.RetryOnError(2)

        async def poll(self) -> Any:
            await ledger.work("poll")
            result = todo.pop(0)
            if isinstance(result, Exception):
                raise result
            return result

    return Workflow[str]().register("poll", Poll()).add_exit_state("done")


@shape("split")
def timer(ledger: Ledger) -> Workflow[str]:
    class Timer:
        async def wait(self) -> After:
            await ledger.work("wait")
            return After(2)

        async def after_wait(self) -> str:
            await ledger.work("after wait")
            return "x"

    return joined(ledger, Timer(), *branches(ledger, 1))


@shape("step")
def stepped(ledger: Ledger) -> Workflow[str]:
    todo = [More(1), Boom(), More(2), More(3), Done("done")]

    class Steps:
        config = TaskConfig().with_fixed_retry(1, 0.5).with_attempt_timeout(5)

        async def step(self, cursor: int | None) -> Any:
            await ledger.work(f"step {cursor}")
            result = todo.pop(0)
            if isinstance(result, Exception):
                raise result
            return result

    return Workflow[str]().register_stepped("step", Steps()).add_exit_state("done")


def saga(ledger: Ledger, *last: Any, resources: Any = None, **options: Any) -> Workflow[str]:
    """Two steps that are done with the third, which works as `does` would; what is done is like a resource that is set up.

    No cancel reaches the two, so they take no time: an anyio scope, which cancels in each turn, lets none pass on this clock.
    """

    class Step(CompensatableTask[str, str]):
        def __init__(self, name: str, then: str) -> None:
            self.name = name
            self.then = then

        async def run(self) -> Any:
            await ledger.work(self.name, 0)
            ledger.set_up(self.name)
            return self.then, self.name

        async def compensate(self, output: str) -> None:
            assert output == self.name
            ledger.tear_down(self.name)
            await ledger.work(f"undoing {output}", 0)

    work = does(ledger, "c", *last, **options)

    async def commit() -> str:
        state: str = await work.run()  # type: ignore[attr-defined]
        ledger.live[:] = [name for name in ledger.live if name not in ("a", "b")]
        return state

    workflow = Workflow[str](resources).register_with_compensation("a", Step("a", "b"))
    workflow.register_with_compensation("b", Step("b", "c"))
    return workflow.register("c", commit).add_exit_state("done")


@shape("a")
def saga_that_succeeds(ledger: Ledger) -> Workflow[str]:
    return saga(ledger, "done")


@shape("a", Boom)
def saga_that_fails(ledger: Ledger) -> Workflow[str]:
    return saga(ledger, Boom(), resources={"p": Part(ledger, "p")})


@shape("a", WorkflowTimeoutError)
def saga_out_of_time(ledger: Ledger) -> Workflow[str]:
    return saga(ledger, "done", seconds=9).with_timeout(5)


@shape("outer", Boom)
def saga_in_saga(ledger: Ledger) -> Workflow[str]:
    async def outer() -> str:
        return await saga(ledger, Boom()).orchestrate("a")

    return Workflow[str]().register("outer", outer).add_exit_state("done").with_timeout(60)


class Numbers:
    """A stream all parts of which wait, and whose source has a clean-up that waits."""

    def __init__(self, ledger: Ledger, window: StreamWindow, *, count: int = 5, stop: bool = False) -> None:
        self.ledger = ledger
        self.window = window
        self.count = count
        self.stop = stop
        self.fails = [2, 3]

    on_item_error = ItemErrorPolicy.Retry(1)

    async def open(self, _cursor: None) -> Any:
        await self.ledger.work("open")
        return self.numbers()

    async def numbers(self) -> Any:
        with self.ledger.span("source"):
            try:
                for number in range(self.count):
                    await asyncio.sleep(self.ledger.scale)
                    yield number
            finally:
                await asyncio.sleep(0)

    async def process_item(self, item: int) -> Any:
        await self.ledger.work(f"item {item}", 0.25)
        if item in self.fails:
            self.fails.remove(item)
            raise Boom(item)
        return item, item

    async def flush_window(self, outputs: list[int]) -> Any:
        await self.ledger.work("draining: flush")
        return Stop("done") if self.stop and 3 in outputs else Continue

    async def on_close(self, _reason: str) -> str:
        if "source" in self.ledger.alive:
            self.ledger.violations.append("the source outlived on_close")
        await self.ledger.work("draining: close")
        return "done"


def stream(numbers: Numbers, **options: Any) -> Workflow[str]:
    return Workflow[str]().register_stream("stream", numbers, **options).add_exit_state("done")


@shape("stream")
def stream_by_count(ledger: Ledger) -> Workflow[str]:
    return stream(Numbers(ledger, StreamWindow.Count(2)), config=TaskConfig().with_attempt_timeout(30))


@shape("stream")
def stream_by_duration(ledger: Ledger) -> Workflow[str]:
    return stream(Numbers(ledger, StreamWindow.Duration(2.6)))


@shape("stream")
def short_stream(ledger: Ledger) -> Workflow[str]:
    return stream(Numbers(ledger, StreamWindow.Duration(2.6), count=1))


@shape("stream")
def stream_that_stops(ledger: Ledger) -> Workflow[str]:
    return stream(Numbers(ledger, StreamWindow.Duration(1.1), stop=True))


@shape("stream", WorkflowTimeoutError)
def stream_out_of_time(ledger: Ledger) -> Workflow[str]:
    return stream(Numbers(ledger, StreamWindow.Duration(2.6))).with_timeout(7)


@shape("split")
def stubborn_branch(ledger: Ledger) -> Workflow[str]:
    async def stubborn() -> str:
        with ledger.span("stubborn"):
            for _ in range(3):
                try:
                    await asyncio.sleep(1)
                except asyncio.CancelledError as error:
                    ledger.messages.append(error.args)
        return "x"

    return joined(ledger, stubborn, *branches(ledger, 1, 2))


class Batch(BatchTask[str]):
    """Items that work for so many seconds, or fail after one; they are read at once, or with some work before each."""

    def __init__(self, ledger: Ledger, *items: float | Boom, reads: str = "at once", **attributes: Any) -> None:
        self.ledger = ledger
        self.items = items
        self.reads = reads
        vars(self).update(attributes)

    def load(self) -> Any:
        return self.read_slowly() if self.reads == "slowly" else self.read()

    def read(self) -> Iterator[float | Boom]:
        self.ledger.set_up("generator")
        try:
            yield from self.items
            if self.reads == "badly":
                raise Boom
        finally:
            self.closed()

    async def read_slowly(self) -> AsyncIterator[float | Boom]:
        self.ledger.set_up("generator")
        try:
            for item in self.items:
                await self.ledger.work("reading", 0.75)
                yield item
        finally:
            try:
                await asyncio.sleep(0.5)
            finally:
                self.closed()

    def closed(self) -> None:
        self.ledger.live.remove("generator")

    async def process_item(self, item: float | Boom) -> float:
        await self.ledger.work("item", 1 if isinstance(item, Boom) else item)
        if isinstance(item, Boom):
            raise item
        return item

    async def finish(self, outcomes: list[BranchOutcome]) -> str:
        await self.ledger.work("finish")
        return "done"


def batch_of(batch: Batch, **options: Any) -> Workflow[str]:
    return Workflow[str](**options).register("batch", batch).add_exit_state("done")


@shape("batch")
def batch(ledger: Ledger) -> Workflow[str]:
    return batch_of(Batch(ledger, 1, 2, 1, Boom(), 0, 1, concurrency=2))


@shape("batch")
def batch_read_slowly(ledger: Ledger) -> Workflow[str]:
    return batch_of(Batch(ledger, 1, 3, 0, 1, 1, reads="slowly", concurrency=2))


@shape("batch")
def batch_with_retries(ledger: Ledger) -> Workflow[str]:
    limits = {"item_retry": RetryMode.fixed(1, 0.5), "item_timeout": 1.25}
    return batch_of(Batch(ledger, 1, Boom(), 9, 1, concurrency=2, **limits))


@shape("batch", Boom)
def batch_read_badly(ledger: Ledger) -> Workflow[str]:
    return batch_of(Batch(ledger, 1, 2, 1, reads="badly", concurrency=2), resources={"p": Part(ledger, "p")})


@shape("batch", RetryExhaustedError)
def batch_retried_as_a_whole(ledger: Ledger) -> Workflow[str]:
    return batch_of(Batch(ledger, 1, reads="badly", concurrency=2, config=TaskConfig().with_fixed_retry(1, 0.5)))


@shape("batch", WorkflowTimeoutError)
def run_timeout_in_batch(ledger: Ledger) -> Workflow[str]:
    return batch_of(Batch(ledger, 1, 2, 9, 1, reads="slowly", concurrency=3)).with_timeout(3)


@shape("split")
def batches_in_split(ledger: Ledger) -> Workflow[str]:
    slow, quick = (Batch(ledger, 1, 2, 1, reads=reads, concurrency=2) for reads in ("slowly", "at once"))
    return joined(ledger, slow, quick, strategy=JoinStrategy.Any)


NAMES = tuple(SHAPES)


def random_shape(seed: int, ledger: Ledger) -> Workflow[str]:
    """States in a row, some of which split, with limits, retries and resources by the dice; twice nested at most."""
    dice = random.Random(seed)
    gates = random.Random(~seed)
    shared = [ledger.bulkhead(2) for _ in range(4)]  # by depth: over one bulkhead nothing is nested

    def leaf(name: str, result: str) -> Task[Any]:
        config = TaskConfig(attempt_timeout=dice.choice((None, None, 0.5, 1, 1.5)))
        if dice.random() < 0.4:
            config = config.with_fixed_retry(dice.randint(1, 2), dice.choice((0, 0.5, 1)))
        results = [Boom() if dice.random() < 0.25 else result for _ in range(dice.randint(1, 3))]
        return does(ledger, name, *results, seconds=dice.choice((0, 0.5, 1, 2)), config=config)

    def nested(prefix: str) -> Callable[[], Any]:
        inner = row(f"{prefix}.", {})
        return lambda: inner.orchestrate("s0")

    def row(prefix: str, parts: dict[str, Part]) -> Workflow[str]:
        workflow = Workflow[str](parts).add_exit_state("done").with_timeout(dice.choice((None, None, 0.5, 1, 2, 4)))
        length = dice.randint(1, 3)
        for index in range(length):
            state, after = f"s{index}", f"s{index + 1}" if index + 1 < length else "done"
            name = f"{prefix}{index}"
            if dice.random() < 0.5 or prefix.count(".") > 1:
                workflow.register(state, leaf(name, after))
                continue
            width = dice.randint(1, 4)
            tasks = [
                nested(f"{name}.{number}") if dice.random() < 0.3 else leaf(f"{name}.{number}", "x")
                for number in range(width)
            ]
            strategy = dice.choice((JoinStrategy.All, JoinStrategy.Any, JoinStrategy.Quorum(width // 2 + 1)))
            limits = {"timeout": dice.choice((None, 0.5, 1.5, 3)), "bulkhead": dice.choice((None, None, 1, 2))}
            if gates.random() < 0.3:
                limits["bulkhead"] = shared[prefix.count(".")]
            if strategy == JoinStrategy.Any and gates.random() < 0.5:
                limits["hedge_after"] = gates.choice((0.25, 1))
            join = JoinConfig(strategy, after, fail_fast=dice.random() < 0.3, **limits)
            workflow.register_split(state, tasks, join)
        return workflow

    return row("", {name: Part(ledger, name, fails=dice.random() < 0.1) for name in "pq"[: dice.randint(0, 2)]})


CANCELS_BY_ITSELF = {
    "saga_out_of_time",
    "attempt_timeout",
    "batch_read_badly",
    "batch_retried_as_a_whole",
    "batch_with_retries",
    "batches_in_split",
    "run_timeout",
    "run_timeout_in_backoff",
    "run_timeout_in_batch",
    "run_timeout_in_split",
    "split_all_failed_fast",
    "split_any",
    "split_quorum",
    "split_any_with_bulkhead",
    "split_hedged",
    "splits_over_a_shared_bulkhead",
    "partial_timeout",
    "join_timeout",
    "split_with_retries",
    "split_in_split",
    "timeout_in_set_up",
    "timeout_in_split_with_resources",
    "scopes_in_tasks",
    "stream_that_stops",
    "stream_out_of_time",
}
"""Shapes in which the engine cancels as well, without a message."""


# --- one run ---------------------------------------------------------------------------------------------------------


class Trial:
    """One run of a shape, with a cancel before some of its steps; subclasses say where that comes from."""

    task_factory: Any = None

    def __init__(self, name: str | int, *steps: int) -> None:
        make, self.initial, self.usual = (
            SHAPES[name] if isinstance(name, str) else (partial(random_shape, name), "s0", ...)
        )
        self.cancels_by_itself = isinstance(name, int) or name in CANCELS_BY_ITSELF
        self.loop = SteppedLoop()
        self.ledger = Ledger(self.loop.time)
        self.workflow = make(self.ledger)
        self.delivered = 0
        self.cancelled_at = math.inf
        self.error: BaseException | None = None
        for step in steps:
            self.loop.plan.setdefault(step, []).append(self.cancel)
        with asyncio.Runner(loop_factory=lambda: self.loop) as runner:
            runner.run(self.main())

    def cancel(self) -> None:
        if self.act():
            self.delivered += 1
            self.cancelled_at = min(self.cancelled_at, self.loop.time())

    def act(self) -> bool:
        """Cancel; False if it was too early or too late for that."""
        raise NotImplementedError

    async def body(self) -> str:
        return await self.workflow.orchestrate(self.initial)

    async def host(self, main: asyncio.Task[Any]) -> str:
        """What the caller's own coroutine sees: at the very moment the run is over, nothing of it is alive."""
        try:
            return await self.body()
        finally:
            self.ledger.check()
            assert_no_orphans(ignore=(main,))

    async def main(self) -> None:
        main = asyncio.current_task()
        self.loop.set_task_factory(self.task_factory)
        self.task = asyncio.create_task(self.host(main), name="host")
        self.loop.step = 0
        await asyncio.wait((self.task,))
        self.steps, self.loop.step = self.loop.step, None
        if self.task.cancelled():
            self.outcome: object = asyncio.CancelledError
        else:
            self.error = self.task.exception()
            self.outcome = self.task.result() if self.error is None else type(self.error)

    def check(self) -> None:
        """The invariants of every trial; `host` has seen to those of the moment when the run was over."""
        if isinstance(self.error, AssertionError):
            raise self.error
        assert self.outcome == self.expected
        assert self.task.cancelling() == self.cancelling
        assert set(self.ledger.messages) <= set(self.allowed)
        late = [name for time, name in self.ledger.begun if time > self.cancelled_at and not name.startswith(CLEAN_UP)]
        assert not late

    @property
    def expected(self) -> object:
        return asyncio.CancelledError if self.delivered else self.usual

    @property
    def cancelling(self) -> int:
        return self.delivered

    @property
    def allowed(self) -> list[tuple[Any, ...]]:
        """The arguments of the cancellations that the user's code may have seen."""
        own: list[tuple[Any, ...]] = [()] if self.cancels_by_itself else []
        return [*own, (MESSAGE,)]


class ByTask(Trial):
    """`Task.cancel` of the task that awaits `orchestrate`."""

    def act(self) -> bool:
        return self.task.cancel(MESSAGE)


class ByHandle(Trial):
    """`Run.cancel`."""

    run: Any = None

    async def body(self) -> str:
        self.run = self.workflow.start(self.initial)
        return await self.run

    def check(self) -> None:
        super().check()
        assert not isinstance(self.error, WorkflowCancelledError) or self.error.reason == MESSAGE

    def act(self) -> bool:
        return self.run is not None and self.run.cancel(MESSAGE)

    @property
    def expected(self) -> object:
        return WorkflowCancelledError if self.delivered else self.usual

    @property
    def cancelling(self) -> int:
        return 0


class ByAwaiter(ByHandle):
    """`Task.cancel` of the task that awaits the handle."""

    def act(self) -> bool:
        return self.task.cancel(MESSAGE)

    @property
    def expected(self) -> object:
        return asyncio.CancelledError if self.delivered else self.usual

    @property
    def cancelling(self) -> int:
        return self.delivered


class ByTimeout(Trial):
    """A deadline of `asyncio.timeout` around the run."""

    scope: asyncio.Timeout | None = None

    async def body(self) -> str:
        async with asyncio.timeout(None) as self.scope:
            return await self.workflow.orchestrate(self.initial)

    def act(self) -> bool:
        if self.scope is None or self.task.done():
            return False
        self.scope.reschedule(self.loop.time())
        return True

    @property
    def expected(self) -> object:
        return TimeoutError if self.scope is not None and self.scope.expired() else self.usual

    @property
    def cancelling(self) -> int:
        return 0

    @property
    def allowed(self) -> list[tuple[Any, ...]]:
        return [()]


class ByScope(Trial):
    """An anyio scope around the run, which cancels again in each turn of the loop until the run has left it."""

    scope: anyio.CancelScope | None = None

    async def body(self) -> str:
        with anyio.CancelScope() as self.scope:
            return await self.workflow.orchestrate(self.initial)
        return "left"

    def act(self) -> bool:
        if self.scope is None or self.task.done():
            return False
        self.scope.cancel()
        return True

    @property
    def expected(self) -> object:
        return "left" if self.scope is not None and self.scope.cancelled_caught else self.usual

    @property
    def cancelling(self) -> int:
        return 0

    @property
    def allowed(self) -> list[tuple[Any, ...]]:
        texts = {args for args in self.ledger.messages if args and str(args[0]).startswith("Cancelled")}
        return [*super().allowed, *texts]


# --- the tests -------------------------------------------------------------------------------------------------------


class ByTaskOfAFactory(ByTask):
    """As `ByTask`, on a loop whose tasks are made by somebody's factory."""

    @staticmethod
    def task_factory(loop: asyncio.AbstractEventLoop, work: Any, **options: Any) -> asyncio.Task[Any]:
        return asyncio.Task(work, loop=loop, **options)


class ByTaskStartedAtOnce(ByTask):
    """As `ByTask`, on a loop whose tasks begin as soon as they are made."""

    task_factory = staticmethod(getattr(asyncio, "eager_task_factory", ByTaskOfAFactory.task_factory))


@pytest.mark.parametrize("name", NAMES)
def test_shape_without_a_cancel_has_its_usual_outcome(name: str) -> None:
    """Each shape, left alone, ends as its table entry says, and leaves nothing."""
    trial = ByTask(name)

    trial.check()

    assert trial.delivered == 0


@pytest.mark.parametrize(
    "how", [ByTask, ByHandle, ByAwaiter, ByTimeout, ByScope, ByTaskOfAFactory, ByTaskStartedAtOnce]
)
@pytest.mark.parametrize("name", NAMES)
def test_cancel_before_every_step_leaves_nothing(name: str, how: type[Trial]) -> None:
    """Wherever a cancel falls, it comes out as its kind asks, everything has ended, and the counts are as they were."""
    # CN-005, CN-006, CN-007, CN-013, CN-014, CN-016, CN-021, B27, B34, B35; reliability C1
    steps = how(name).steps
    delivered = 0

    for step in range(steps + 1):
        trial = how(name, step)
        delivered += trial.delivered

        trial.check()

    assert delivered >= steps // 4


@pytest.mark.parametrize(("how", "gap"), [*itertools.product((ByTask, ByHandle), (0, 1, 2, 3)), (ByAwaiter, 1)])
@pytest.mark.parametrize("name", NAMES)
def test_second_cancel_soon_after_every_step_leaves_nothing(name: str, how: type[Trial], gap: int) -> None:
    """A second cancel, zero to three steps after the first, hits the clean-up and changes none of the promises."""
    steps = how(name).steps

    for step in range(steps):
        trial = how(name, step, step + gap)

        trial.check()


@pytest.mark.parametrize(
    "name",
    [
        "awaitables",
        "batch",
        "batch_read_slowly",
        "managed",
        "resources",
        "resources_with_a_failing_set_up",
        "short_stream",
        "retry_with_backoff",
        "run_timeout_in_backoff",
        "run_timeout_in_split",
        "split_made_at_run_time",
        "split_quorum",
        "split_with_bulkhead",
        "split_hedged",
        "splits_over_a_shared_bulkhead",
        "saga_that_fails",
        "saga_out_of_time",
    ],
)
def test_two_cancels_at_every_pair_of_steps_leave_nothing(name: str) -> None:
    """Every ordered pair of steps may be hit by two cancels of one run."""
    # reliability C2
    steps = ByTask(name).steps

    for first, second in itertools.islice(itertools.combinations(range(steps + 3), 2), 0, None, STRIDE):
        trial = ByTask(name, first, second)

        trial.check()


@pytest.mark.parametrize(
    "name",
    [
        "chain",
        "loop",
        "retry_exhausted",
        "batch_read_slowly",
        "split_all",
        "split_any_with_bulkhead",
        "splits_over_a_shared_bulkhead",
        "split_in_split",
        "fork",
        "resources",
        "managed",
        "poll",
        "stepped",
        "stream_by_count",
        "saga_that_succeeds",
        "saga_that_fails",
    ],
)
async def test_cancel_after_every_tick_of_any_loop_leaves_nothing(name: str) -> None:
    """The promises need no special loop: they hold on the one that the test suite runs on, whichever it is."""
    make, initial, _ = SHAPES[name]

    for ticks in range(50):
        ledger = Ledger(scale=0)
        host = asyncio.create_task(make(ledger).orchestrate(initial))
        for _ in range(ticks):
            await asyncio.sleep(0)
        delivered = host.cancel(MESSAGE)
        await asyncio.wait((host,))

        ledger.check()
        assert host.cancelled() == delivered
        assert delivered or host.exception() is None or type(host.exception()) is SHAPES[name][2]


@pytest.mark.parametrize("seed", range(100))
def test_random_shape_survives_random_cancels(seed: int) -> None:
    """No combination of states, splits, limits, retries and resources breaks a promise; the seed replays it."""
    # reliability C4
    dice = random.Random(seed)
    usual = ByTask(seed)

    for _ in range(8):
        how = dice.choice((ByTask, ByHandle, ByAwaiter, ByScope, ByTaskOfAFactory))
        trial = how(seed, *(dice.randrange(usual.steps + 1) for _ in range(dice.randint(1, 3))))
        trial.usual = usual.outcome

        trial.check()


def test_sweeps_are_as_wide_as_promised() -> None:
    """There are at least 25 shapes, and together they have at least 500 steps to cancel at."""
    # reliability C1
    steps = [ByTask(name).steps for name in NAMES]

    assert len(NAMES) >= 25
    assert sum(steps) >= 500
