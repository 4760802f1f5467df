"""Batches: items read when there is room for them, so many in flight at once, and finished with what came of each."""

import asyncio
import collections
import contextlib
import contextvars
import gc
import heapq
import inspect
import itertools
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given, settings, strategies as st

import cano.testing
from cano import (
    AttemptTimeoutError,
    BatchTask,
    BranchOutcome,
    ConfigurationError,
    InvalidTransitionError,
    JoinConfig,
    JoinError,
    JoinStrategy,
    MemoryStore,
    NonRetryable,
    Res,
    Resources,
    RetryAfter,
    RetryExhaustedError,
    RetryMode,
    RunContext,
    SplitResult,
    TaskConfig,
    TaskExecutionError,
    TaskResult,
    Workflow,
    WorkflowCancelledError,
    WorkflowTimeoutError,
)

STEP = 0.01
FOREVER = 3600.0

ALL = JoinStrategy.All


class Oops(Exception):
    """What fails raises; its argument says where."""


class Fatal(BaseException):
    """An exception that no engine may turn into an outcome."""


class Job(BatchTask[str]):
    """A batch over `items`, or over what it returns if it is a function; `work` is done on each.

    `finished` is what it finished with, each time; any other attribute is one of the batch.
    """

    def __init__(self, items: Any, work: Callable[[Any], Any], **attributes: Any) -> None:
        self.items = items
        self.work = work
        self.finished: list[list[BranchOutcome]] = []
        vars(self).update(attributes)

    def load(self) -> Any:
        return self.items() if callable(self.items) else self.items

    async def process_item(self, item: Any) -> Any:
        value = self.work(item)
        return await value if inspect.isawaitable(value) else value

    def finish(self, outcomes: list[BranchOutcome]) -> str:
        self.finished.append(outcomes)
        return "done"


def workflow_of(task: Any, **options: Any) -> Workflow[str]:
    return Workflow[str]().register("batch", task, **options).add_exit_states(["done", "other"])


async def run(job: Job, **options: Any) -> list[BranchOutcome]:
    """What the batch finishes with."""
    assert await workflow_of(job).orchestrate("batch", **options) == "done"
    return job.finished[-1]


def shape(outcomes: list[BranchOutcome]) -> list[Any]:
    """The value of each, or the type of its error."""
    return [one.value if one.error is None else type(one.error) for one in outcomes]


def now() -> float:
    return asyncio.get_running_loop().time()


def double(item: int) -> int:
    return item * 2


def fails_on(*bad: Any) -> Callable[[Any], Any]:
    """Work that raises on these items, and returns the others."""

    def work(item: Any) -> Any:
        if item in bad:
            raise Oops(item)
        return item

    return work


@dataclass
class Gauge:
    """Work of one step; counts what is in flight, and how far an iterable that it makes was read."""

    sleep: float = STEP
    started: int = 0
    in_flight: int = 0
    most: int = 0
    read: int = 0
    ahead: int = 0
    ended: int = 0
    closed: list[float] = field(default_factory=list)

    async def __call__(self, item: Any) -> Any:
        self.started += 1
        self.in_flight += 1
        self.most = max(self.most, self.in_flight)
        try:
            await asyncio.sleep(self.sleep)
        finally:
            self.in_flight -= 1
            self.ended += 1
        return item

    def asked(self) -> None:
        """The iterable gives one more; those it gave that have not ended are in flight, or ahead of them."""
        self.read += 1
        self.ahead = max(self.ahead, self.read - self.ended)

    def items(self, total: int, *, breaks: bool = False) -> Iterator[int]:
        """A generator, which notes how far it is read and when it is closed; it may raise at its end."""
        try:
            for item in range(total):
                self.asked()
                yield item
            if breaks:
                raise Oops
        finally:
            self.closed.append(now())

    async def async_items(self, total: int, *, breaks: bool = False) -> AsyncIterator[int]:
        try:
            for item in range(total):
                self.asked()
                yield item
            if breaks:
                raise Oops
        finally:
            await asyncio.sleep(0)  # closing may wait
            self.closed.append(now())


# Outcomes


async def test_outcomes_are_in_input_order() -> None:
    """A batch loads, processes each item and finishes with one outcome each in input order, whoever was first."""
    # BT-001
    log: list[Any] = []

    class Reads(BatchTask[str]):
        concurrency = 3

        async def load(self) -> list[int]:
            log.append("load")
            return [3, 1, 2, 0]

        async def process_item(self, item: int) -> int:
            await asyncio.sleep(item * STEP)
            log.append(item)
            return item * 10

        async def finish(self, outcomes: list[BranchOutcome]) -> str:
            log.append([one.value for one in outcomes])
            return "done"

    await workflow_of(Reads()).orchestrate("batch")

    assert log[0] == "load"
    assert sorted(log[1:5]) == [0, 1, 2, 3]
    assert log[1:5] != [3, 1, 2, 0]
    assert log[5:] == [[30, 10, 20, 0]]


async def test_failing_item_fills_its_own_place() -> None:
    """An item that fails has its error as its outcome; the others are processed, and finish decides."""
    # BT-003
    outcomes = await run(Job(range(4), fails_on(0, 2)))

    assert shape(outcomes) == [Oops, 1, Oops, 3]
    assert [one.error.args for one in outcomes if one.error] == [(0,), (2,)]


async def test_items_that_all_fail_fail_nothing() -> None:
    """A batch of which every item failed goes where finish sends it."""
    job = Job(range(3), fails_on(0, 1, 2), concurrency=2)
    job.finish = lambda outcomes: "other" if all(one.error for one in outcomes) else "done"  # type: ignore[method-assign]

    assert await workflow_of(job).orchestrate("batch") == "other"


@pytest.mark.virtual
async def test_outcome_says_what_became_of_the_item() -> None:
    """An outcome has the place of its item, the name of the method, value or error, and how long it took."""
    job = Job([1, 2], lambda item: asyncio.sleep(item * STEP, item), concurrency=2, name="import")

    first, second = await run(job)

    assert (first.index, first.name, first.value, first.error) == (0, "import.process_item", 1, None)
    assert (second.index, second.value) == (1, 2)
    assert first.elapsed == pytest.approx(STEP)
    assert second.elapsed == pytest.approx(2 * STEP)


async def test_error_of_an_item_is_the_object_itself_with_a_note() -> None:
    """The error is what the item raised, and says which item it was."""
    error = Oops("x")

    def work(item: int) -> None:
        if item == 2:
            raise error

    outcomes = await run(Job(range(4), work, name="import"))

    assert outcomes[2].error is error
    assert error.__notes__ == ["state=batch task=import.process_item branch=2 attempt=1/1 path=batch"]
    assert error.__cano__.branch == 2  # type: ignore[attr-defined]


async def test_value_of_any_kind() -> None:
    """Whatever an item returns is its value: None, an exception, a coroutine's result, or another outcome."""
    values: list[Any] = [None, Oops(), BranchOutcome(0, "x"), [], TaskResult.Single("done")]

    outcomes = await run(Job(values, lambda item: item))

    assert [one.value for one in outcomes] == values
    assert [one.error for one in outcomes] == [None] * 5


@pytest.mark.parametrize("concurrency", [1, 3])
@pytest.mark.parametrize("sleep", [None, STEP], ids=["at once", "later"])
async def test_panic_of_an_item_fills_its_own_place(concurrency: int, sleep: float | None) -> None:
    """A panicking item is a failed item like any other."""
    # PAN-014, G21
    panic = type("PanicException", (BaseException,), {"__module__": "pyo3_runtime"})

    async def work(item: int) -> int:
        if sleep is not None:
            await asyncio.sleep(sleep)
        if item == 1:
            raise panic("index out of bounds")
        return item

    outcomes = await run(Job(range(3), work, concurrency=concurrency))

    assert shape(outcomes) == [0, TaskExecutionError, 2]
    assert str(outcomes[1].error) == "panic: index out of bounds"


@pytest.mark.parametrize("concurrency", [1, 3])
@pytest.mark.parametrize("sleep", [None, STEP], ids=["at once", "later"])
@pytest.mark.parametrize("attributes", [{}, {"item_retry": RetryMode.fixed(3, 0)}], ids=["plain", "retry"])
async def test_item_that_cancels_itself_fills_its_own_place(
    concurrency: int, sleep: float | None, attributes: dict[str, Any]
) -> None:
    """A CancelledError that nobody asked for is the failure of its item, which is not repeated: no outcome is missing."""
    tried: list[int] = []

    async def work(item: int) -> int:
        tried.append(item)
        if sleep is not None:
            await asyncio.sleep(sleep)
        if item == 1:
            raise asyncio.CancelledError("own")
        return item

    outcomes = await run(Job(range(3), work, concurrency=concurrency, **attributes))

    assert [one.index for one in outcomes] == [0, 1, 2]
    assert shape(outcomes) == [0, TaskExecutionError, 2]
    assert isinstance(outcomes[1].error.__cause__, asyncio.CancelledError)
    assert sorted(tried) == [0, 1, 2]


# How many at once


async def test_one_at_a_time_by_default() -> None:
    """Without a word about it, items are processed one after another."""
    # BT-002
    gauge = Gauge()

    await run(Job(range(5), gauge))

    assert gauge.most == 1


@pytest.mark.parametrize("source", ["list", "generator", "async generator"])
@pytest.mark.parametrize("concurrency", [1, 2, 3, 7, 20, 100])
async def test_concurrency_is_reached_and_never_exceeded(concurrency: int, source: str) -> None:
    """As many items as allowed are in flight, and never one more."""
    # BT-002
    gauge = Gauge()
    items = {
        "list": list(range(20)),
        "generator": lambda: gauge.items(20),
        "async generator": lambda: gauge.async_items(20),
    }

    outcomes = await run(Job(items[source], gauge, concurrency=concurrency))

    assert gauge.most == min(concurrency, 20)
    assert shape(outcomes) == list(range(20))


@pytest.mark.virtual
@pytest.mark.parametrize("source", ["list", "async generator"])
@pytest.mark.parametrize(("concurrency", "steps"), [(1, 6), (2, 3), (3, 2), (4, 2), (6, 1)])
async def test_places_are_filled_at_once(concurrency: int, steps: int, source: str) -> None:
    """The next item starts at the moment at which one ends."""
    gauge = Gauge()
    began = now()

    await run(Job(range(6) if source == "list" else lambda: gauge.async_items(6), gauge, concurrency=concurrency))

    assert now() - began == pytest.approx(steps * STEP)


@pytest.mark.virtual
async def test_short_items_do_not_wait_for_a_long_one() -> None:
    """Places are independent: there are no rounds."""
    log: list[tuple[int, float]] = []

    async def work(item: int) -> None:
        log.append((item, round((now() - began) / STEP)))
        await asyncio.sleep((5 if item == 0 else 1) * STEP)

    began = now()
    await run(Job(range(6), work, concurrency=2))

    assert log == [(0, 0), (1, 0), (2, 1), (3, 2), (4, 3), (5, 4)]


@pytest.mark.virtual
@pytest.mark.parametrize("source", ["range", "async generator"])
async def test_ten_thousand_at_once(source: str) -> None:
    """Ten thousand items in flight are nothing special."""
    total = 1_000 if asyncio.get_running_loop().get_debug() else 10_000  # each task writes down a stack there
    gauge = Gauge()
    items = range(total) if source == "range" else gauge.async_items(total)

    outcomes = await run(Job(items, gauge, concurrency=10_000))

    assert gauge.most == total
    assert len(outcomes) == total


@pytest.mark.parametrize("value", [0, -1, True, 1.0, "2", None, [1]], ids=repr)
def test_concurrency_that_is_none(value: Any) -> None:
    """A batch that could process nothing is refused when it is registered, as is any other value."""
    with pytest.raises(ConfigurationError, match=r"concurrency of import must be an int of at least 1, got "):
        workflow_of(Job([], double, concurrency=value, name="import"))


async def test_concurrency_beyond_any_batch() -> None:
    """Any int will do; one of more than 64 bits lets everything through."""
    assert shape(await run(Job(range(3), double, concurrency=10**30))) == [0, 2, 4]


# What is loaded


class Sequence:
    """An iterable of its own kind."""

    def __iter__(self) -> Iterator[int]:
        return iter((0, 1, 2))


class AsyncSequence:
    """An asynchronous iterable of its own kind."""

    async def __aiter__(self) -> AsyncIterator[int]:
        for item in range(3):
            await asyncio.sleep(0)
            yield item


class AsyncCounter:
    """An asynchronous iterator that has nothing but what it needs."""

    def __init__(self) -> None:
        self.numbers = iter(range(3))

    def __aiter__(self) -> "AsyncCounter":
        return self

    async def __anext__(self) -> int:
        for number in self.numbers:
            return number
        raise StopAsyncIteration


class Both(Sequence):
    """Iterable either way."""

    async def __aiter__(self) -> AsyncIterator[int]:
        for item in (0, 1, 2):
            yield item


def generator() -> Iterator[int]:
    yield from range(3)


async def async_generator() -> AsyncIterator[int]:
    for item in range(3):
        yield item


async def waiting_async_generator() -> AsyncIterator[int]:
    for item in range(3):
        await asyncio.sleep(STEP)
        yield item


ITERABLES: dict[str, Callable[[], Any]] = {
    "list": lambda: [0, 1, 2],
    "tuple": lambda: (0, 1, 2),
    "range": lambda: range(3),
    "dict": lambda: {0: "a", 1: "b", 2: "c"},
    "bytearray": lambda: bytearray([0, 1, 2]),
    "deque": lambda: collections.deque([0, 1, 2]),
    "iterator": lambda: iter([0, 1, 2]),
    "map": lambda: map(int, "012"),
    "generator": generator,
    "iterable": Sequence,
    "async generator": async_generator,
    "async generator that waits": waiting_async_generator,
    "async iterable": AsyncSequence,
    "async iterator": AsyncCounter,
    "both": Both,
}


@pytest.mark.parametrize("concurrency", [1, 2, 5])
@pytest.mark.parametrize("loads", ["plain", "async"])
@pytest.mark.parametrize("kind", ITERABLES)
async def test_any_iterable_may_be_loaded(kind: str, loads: str, concurrency: int) -> None:
    """Load, plain or async, returns any iterable or asynchronous iterable."""
    job = Job(None, double, concurrency=concurrency)

    async def later() -> Any:
        await asyncio.sleep(0)
        return ITERABLES[kind]()

    job.load = ITERABLES[kind] if loads == "plain" else later  # type: ignore[method-assign]

    assert shape(await run(job)) == [0, 2, 4]


async def test_load_may_be_a_generator() -> None:
    """Load may itself be a generator, plain or asynchronous, with parameters of its own."""
    seen: list[Any] = []

    class Plain(Job):
        def load(self, context: RunContext) -> Iterator[str]:
            yield context.state

    class Asynchronous(Job):
        async def load(self, context: RunContext) -> AsyncIterator[str]:
            await asyncio.sleep(0)
            yield context.state

    for job in (Plain(None, seen.append), Asynchronous(None, seen.append)):
        await run(job)

    assert seen == ["batch", "batch"]


@pytest.mark.parametrize("items", [[], (), generator, async_generator], ids=["list", "tuple", "generator", "async"])
async def test_nothing_to_do(items: Any) -> None:
    """A batch without items finishes at once, with no outcomes."""

    def none() -> Iterator[int]:
        yield from ()

    async def none_later() -> AsyncIterator[int]:
        for item in ():
            yield item

    job = Job({generator: none, async_generator: none_later}.get(items, items) if callable(items) else items, double)

    assert await run(job) == []


@pytest.mark.parametrize("items", [None, 5, "abc", b"abc", object()], ids=["None", "int", "str", "bytes", "object"])
@pytest.mark.parametrize("loads", ["plain", "async"])
async def test_load_that_returns_no_items(items: Any, loads: str) -> None:
    """What is no iterable, or a text, fails the task by an error that names the method and what it returned."""
    job = Job(items, double, name="import")

    async def later() -> Any:
        return items

    if loads == "async":
        job.load = later  # type: ignore[method-assign]

    with pytest.raises(ConfigurationError, match=r"import\.load must return an iterable of items, got ") as caught:
        await run(job)

    assert (caught.value.state, caught.value.task) == ("batch", "import")
    assert job.finished == []


# Read when there is room


@pytest.mark.parametrize("concurrency", [1, 3, 10])
async def test_generator_is_asked_when_there_is_room(concurrency: int) -> None:
    """Of a million items only those in flight have been asked for."""
    # BT-008, G13
    gauge = Gauge(sleep=0)

    async def work(item: int) -> None:
        await gauge(item)
        if item == 500:
            raise Fatal

    with pytest.raises(Fatal):
        await run(Job(lambda: gauge.items(1_000_000), work, concurrency=concurrency))

    assert gauge.ahead == concurrency
    assert gauge.read <= 501 + concurrency


@pytest.mark.parametrize("concurrency", [1, 3, 10])
async def test_async_iterable_is_read_one_ahead(concurrency: int) -> None:
    """Of an asynchronous iterable one item more is kept ready."""
    # BT-008, G13
    gauge = Gauge(sleep=0)

    async def work(item: int) -> None:
        await gauge(item)
        if item == 500:
            raise Fatal

    with pytest.raises(Fatal):
        await run(Job(lambda: gauge.async_items(1_000_000), work, concurrency=concurrency))

    assert gauge.ahead == concurrency + 1
    assert gauge.read <= 502 + concurrency


@pytest.mark.parametrize("source", ["generator", "async generator"])
@pytest.mark.parametrize("sleeps", ["later", "at once"])
async def test_only_items_in_flight_exist(source: str, sleeps: str) -> None:
    """An item is let go when it has been processed."""

    class Item:
        """Something that can be watched."""

    alive: weakref.WeakSet[Item] = weakref.WeakSet()
    most = 0

    def make() -> Item:
        nonlocal most
        item = Item()
        alive.add(item)
        most = max(most, len(alive))
        return item

    async def make_later() -> AsyncIterator[Item]:
        for _ in range(1_000):
            yield make()

    async def work(item: Item) -> None:
        if sleeps == "later":
            await asyncio.sleep(0)

    gc.disable()
    try:
        items = (make() for _ in range(1_000)) if source == "generator" else make_later()
        await run(Job(items, work, concurrency=4))
    finally:
        gc.enable()

    assert most <= 4 + 3  # one more in the hand of the iterable, of the driver, and of the last place


async def test_time_limits_of_items_that_ended_are_forgotten() -> None:
    """Limits of an hour keep nothing of items that ended long before, though the first item is still there."""
    runs: list[int] = []
    last = asyncio.Event()

    async def work(item: int) -> None:
        await asyncio.sleep(0)
        if item == 0:
            await last.wait()
        if item == 999:
            last.set()
        if item in (200, 999):
            runs.append(sum(type(thing).__qualname__ == "Run" for thing in gc.get_objects()))

    await run(Job(range(1_000), work, concurrency=3, item_timeout=3600))

    assert runs[1] - runs[0] < 100


async def test_items_that_end_at_once_let_others_run() -> None:
    """A batch whose items never wait gives the loop a turn, and can be cancelled, though it has no end."""
    task = asyncio.create_task(run(Job(itertools.count, double)))
    await asyncio.sleep(0)
    for _ in range(5):
        await asyncio.sleep(0)
    assert not task.done()

    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_async_iterable_that_never_waits_lets_others_run() -> None:
    """The same of an asynchronous iterable that never waits."""

    async def count() -> AsyncIterator[int]:
        for item in itertools.count():
            yield item

    task = asyncio.create_task(run(Job(count, double)))
    for _ in range(5):
        await asyncio.sleep(0)
    assert not task.done()

    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.virtual
async def test_slow_reading_lets_items_end() -> None:
    """While an asynchronous iterable waits for its next item, those in flight go on."""
    log: list[tuple[str, float]] = []

    async def slow() -> AsyncIterator[int]:
        for item in range(2):
            await asyncio.sleep(2 * STEP)
            log.append((f"read {item}", round((now() - began) / STEP)))
            yield item

    async def work(item: int) -> None:
        await asyncio.sleep(STEP)
        log.append((f"done {item}", round((now() - began) / STEP)))

    began = now()
    await run(Job(slow, work))

    assert log == [("read 0", 2), ("done 0", 3), ("read 1", 4), ("done 1", 5)]


@pytest.mark.virtual
async def test_reading_goes_on_while_items_are_processed() -> None:
    """An asynchronous iterable prepares the next item while others are in flight."""
    began = now()

    async def slow() -> AsyncIterator[int]:
        for item in range(3):
            await asyncio.sleep(STEP)
            yield item

    await run(Job(slow, Gauge()))

    assert now() - began == pytest.approx(4 * STEP)


# What the methods take


async def test_parameters_of_the_three_methods() -> None:
    """Each method takes, after what it is given, whatever a task takes, in any order; load and finish as one visit."""
    seen: dict[str, Any] = {}

    class Job(BatchTask[str]):
        concurrency = 2

        async def load(self, store: Annotated[MemoryStore, Res("store")], res: Resources, ctx: RunContext) -> list[int]:
            seen["load"] = (store, res.get("store"), ctx.state, ctx.branch, ctx.attempt, ctx.visit)
            return [5, 6]

        async def process_item(
            self, item: int, ctx: RunContext, store: Annotated[MemoryStore, Res("store")], res: Resources
        ) -> int:
            seen[f"item {item}"] = (store, res.get("store"), ctx.state, ctx.branch, ctx.attempt, ctx.visit)
            return item

        def finish(self, outcomes: list[BranchOutcome], res: Resources, ctx: RunContext) -> str:
            seen["finish"] = (res.get("store"), ctx.state, ctx.branch, ctx.attempt, ctx.visit, len(outcomes))
            return "done"

    store = MemoryStore()
    await workflow_of(Job()).orchestrate("batch", resources={"store": store})

    assert seen == {
        "load": (store, store, "batch", None, 1, 1),
        "item 5": (store, store, "batch", 0, 1, 1),
        "item 6": (store, store, "batch", 1, 1, 1),
        "finish": (store, "batch", None, 1, 1, 2),
    }


@pytest.mark.parametrize("attributes", [{}, {"item_retry": RetryMode.fixed(1, 0)}], ids=["plain", "retry"])
async def test_parameters_by_keyword_only(attributes: dict[str, Any]) -> None:
    """Keyword-only parameters are filled in, and those with a default that asks for nothing are left alone."""
    seen: list[Any] = []

    class Job(BatchTask[str]):
        def load(self, *, ctx: RunContext, much: int = 2) -> list[int]:
            seen.append(ctx.state)
            return [1] * much

        async def process_item(self, item: int, factor: int = 3, *, store: Annotated[str, Res("store")]) -> int:
            seen.append((item * factor, store))
            return item

        async def finish(self, outcomes: list[BranchOutcome], *, res: Resources, ctx: RunContext) -> str:
            seen.append((len(outcomes), res.get("store"), ctx.state))
            return "done"

    job = Job()
    vars(job).update(attributes)
    await workflow_of(job).orchestrate("batch", resources={"store": "s"})

    assert seen == ["batch", (3, "s"), (3, "s"), (2, "s", "batch")]


async def test_plain_methods_and_a_parameter_without_annotation() -> None:
    """All three may be plain; one parameter without annotation is the resources."""

    class Job(BatchTask[str]):
        def load(self, res):
            return res.get("items")

        def process_item(self, item, res):
            return item + res.get("more")

        def finish(self, outcomes, res):
            return res.get("next")[sum(one.value for one in outcomes)]

    resources = {"items": [1, 2], "more": 10, "next": {23: "other"}}

    assert await workflow_of(Job()).orchestrate("batch", resources=resources) == "other"


async def test_split_result_in_load_and_finish() -> None:
    """In the state that a split joins into, load and finish may take its result."""

    class Job(BatchTask[str]):
        def load(self, joined: SplitResult) -> list[int]:
            return joined.values()

        def process_item(self, item: int) -> int:
            return item * 10

        def finish(self, outcomes: list[BranchOutcome], joined: SplitResult | None) -> str:
            assert joined is not None
            assert [one.value for one in outcomes] == [value * 10 for value in joined.values()]
            return "done"

    workflow = workflow_of(Job()).register_split("split", [lambda: 1, lambda: 2], JoinConfig(ALL, "batch"))

    assert await workflow.orchestrate("split") == "done"


class NoLoad(BatchTask[str]):
    def process_item(self, item: Any) -> None: ...
    def finish(self, outcomes: Any) -> str: ...


class NoProcess(BatchTask[str]):
    def load(self) -> None: ...
    def finish(self, outcomes: Any) -> str: ...


class NoFinish(BatchTask[str]):
    def load(self) -> None: ...
    def process_item(self, item: Any) -> None: ...


class LoadNumber(NoLoad):
    load = 5


class LoadTakesMore(NoLoad):
    def load(self, path: str) -> None: ...


class ProcessTakesNothing(NoProcess):
    def process_item(self) -> None: ...


class ProcessByKeyword(NoProcess):
    def process_item(self, *, item: Any) -> None: ...


class ProcessTakesMore(NoProcess):
    def process_item(self, item: Any, path: str) -> None: ...


class ProcessTakesJoined(NoProcess):
    def process_item(self, item: Any, joined: SplitResult) -> None: ...


class ProcessIsGenerator(NoProcess):
    def process_item(self, item: Any) -> Iterator[Any]:
        yield item


class ProcessIsAsyncGenerator(NoProcess):
    async def process_item(self, item: Any) -> AsyncIterator[Any]:
        yield item


class FinishTakesNothing(NoFinish):
    def finish(self) -> str: ...


class FinishIsGenerator(NoFinish):
    def finish(self, outcomes: Any) -> Iterator[str]:
        yield "done"


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (NoLoad, r"NoLoad is a batch task without a method load"),
        (NoProcess, r"NoProcess is a batch task without a method process_item"),
        (NoFinish, r"NoFinish is a batch task without a method finish"),
        (LoadNumber, r"LoadNumber is a batch task without a method load"),
        (LoadTakesMore, r"parameter path of task LoadTakesMore\.load is annotated"),
        (ProcessTakesNothing, r"ProcessTakesNothing\.process_item must take item first"),
        (ProcessByKeyword, r"ProcessByKeyword\.process_item must take item first"),
        (ProcessTakesMore, r"parameter path of task ProcessTakesMore\.process_item is annotated"),
        (
            ProcessTakesJoined,
            r"ProcessTakesJoined\.process_item takes what led into the state, which only load and finish can",
        ),
        (ProcessIsGenerator, r"ProcessIsGenerator\.process_item is a generator function"),
        (ProcessIsAsyncGenerator, r"ProcessIsAsyncGenerator\.process_item is a generator function"),
        (FinishTakesNothing, r"FinishTakesNothing\.finish must take outcomes first"),
        (FinishIsGenerator, r"FinishIsGenerator\.finish is a generator function"),
    ],
)
def test_methods_that_do_not_fit(kind: type[BatchTask[str]], message: str) -> None:
    """A method that is missing, or asks for what cannot be filled in, is refused when the task is registered."""
    with pytest.raises(ConfigurationError, match=message):
        workflow_of(kind())


def test_class_instead_of_an_instance() -> None:
    """The class itself is no task."""
    with pytest.raises(ConfigurationError, match=r"Job is a class; register an instance: Job\(\)"):
        workflow_of(Job)


@pytest.mark.virtual
async def test_context_of_an_item() -> None:
    """An item knows its place, its attempt, the visit of its state and what is left of the run."""
    seen: list[tuple[Any, ...]] = []

    class Job(BatchTask[str]):
        concurrency = 2

        def load(self) -> str:
            return list("ab")  # type: ignore[return-value]

        async def process_item(self, item: str, ctx: RunContext) -> None:
            seen.append((item, ctx.state, ctx.branch, ctx.attempt, ctx.visit, ctx.workflow_id, ctx.remaining()))

        def finish(self, outcomes: list[BranchOutcome]) -> str:
            return "batch" if len(seen) < 4 else "done"

    await workflow_of(Job()).orchestrate("batch", workflow_id="w", timeout=9)

    assert seen == [
        ("a", "batch", 0, 1, 1, "w", 9),
        ("b", "batch", 1, 1, 1, "w", 9),
        ("a", "batch", 0, 1, 2, "w", 9),
        ("b", "batch", 1, 1, 2, "w", 9),
    ]


async def test_idempotency_key_of_an_item() -> None:
    """An item's key stays the same over its retries and the task's, and is its own: per item, visit and run."""
    keys: dict[tuple[str, int], list[str]] = collections.defaultdict(list)
    own: set[str] = set()
    rounds = 0

    class Job(BatchTask[str]):
        concurrency = 2
        item_retry = RetryMode.fixed(1, 0)
        config = TaskConfig().with_fixed_retry(1, 0)

        def load(self, ctx: RunContext) -> list[str]:
            own.add(ctx.idempotency_key)
            return ["a", "b"]

        async def process_item(self, item: str, ctx: RunContext) -> None:
            keys[item, ctx.visit].append(ctx.idempotency_key)
            if ctx.attempt == 1:
                raise Oops

        def finish(self, outcomes: list[BranchOutcome], ctx: RunContext) -> str:
            nonlocal rounds
            rounds += 1
            if ctx.attempt == 1:
                raise Oops
            return "batch" if ctx.visit == 1 else "done"

    workflow = workflow_of(Job())
    await workflow.orchestrate("batch", workflow_id="w")
    assert {place: len(found) for place, found in keys.items()} == dict.fromkeys(itertools.product("ab", (1, 2)), 4)
    assert all(len(set(found)) == 1 for found in keys.values())
    everyone = {key for found in keys.values() for key in found} | own
    assert len(everyone) == 4 + 2

    keys.clear()
    await workflow.orchestrate("batch", workflow_id="w")
    assert {key for found in keys.values() for key in found} <= everyone
    await workflow.orchestrate("batch", workflow_id="other")
    assert all(len(set(found)) == 2 for found in keys.values())


# Retries and time limits of items


async def test_retry_of_an_item() -> None:
    """A poisoned item is tried three times, a flaky one succeeds on its third, a healthy one runs once."""
    # BT-004
    tried: collections.Counter[str] = collections.Counter()

    def work(item: str) -> str:
        tried[item] += 1
        if item == "poisoned" or (item == "flaky" and tried[item] < 3):
            raise Oops(tried[item])
        return item

    outcomes = await run(Job(["healthy", "poisoned", "flaky"], work, item_retry=RetryMode.fixed(2, STEP)))

    assert tried == {"healthy": 1, "poisoned": 3, "flaky": 3}
    assert shape(outcomes) == ["healthy", RetryExhaustedError, "flaky"]
    error = outcomes[1].error
    assert isinstance(error, RetryExhaustedError)
    assert error.attempts == 3
    assert isinstance(error.__cause__, Oops)
    assert error.__cano__.branch == 1


@pytest.mark.virtual
async def test_delay_between_attempts_of_an_item() -> None:
    """The back-off of an item holds its place, and nobody else's."""
    log: list[tuple[str, int]] = []

    async def work(item: str) -> None:
        log.append((item, round((now() - began) / STEP)))
        if item == "a":
            raise Oops
        await asyncio.sleep(STEP)

    began = now()
    await run(Job(["a", "b", "c", "d"], work, concurrency=2, item_retry=RetryMode.fixed(1, 5 * STEP)))

    assert log == [("a", 0), ("b", 0), ("c", 1), ("d", 2), ("a", 5)]
    assert now() - began == pytest.approx(5 * STEP)


@pytest.mark.parametrize(
    ("retry_on", "error", "attempts"),
    [
        (Exception, Oops(), 3),
        (Exception, TypeError(), 1),
        (ValueError, Oops(), 1),
        ((ValueError, TypeError), TypeError(), 3),
        (lambda error: error.args == ("again",), Oops("again"), 3),
        (lambda error: error.args == ("again",), Oops(), 1),
        (Exception, NonRetryable("x"), 1),
        (ValueError, RetryAfter(0), 3),
    ],
)
@pytest.mark.parametrize("given", ["attribute", "register"])
async def test_what_is_worth_a_retry_of_an_item(retry_on: Any, error: Exception, attempts: int, given: str) -> None:
    """`retry_on` of the task's config decides for items as well, wherever the config is given."""
    tried: list[int] = []

    def work(item: int) -> None:
        tried.append(item)
        raise error

    job = Job([1], work, item_retry=RetryMode.fixed(2, 0))
    config = TaskConfig(retry_on=retry_on)
    if given == "attribute":
        job.config = config
    await workflow_of(job, config=None if given == "attribute" else config).orchestrate("batch")

    assert len(tried) == attempts


@pytest.mark.virtual
async def test_retry_after_of_an_item() -> None:
    """An item may say when it wants to be repeated."""
    moments: list[float] = []

    def work(item: int) -> int:
        moments.append(now())
        if len(moments) == 1:
            raise RetryAfter(7 * STEP)
        return item

    assert shape(await run(Job([1], work, item_retry=RetryMode.fixed(2, STEP)))) == [1]
    assert moments[1] - moments[0] == pytest.approx(7 * STEP)


@pytest.mark.virtual
@pytest.mark.parametrize("concurrency", [1, 3])
async def test_time_limit_of_an_item(concurrency: int) -> None:
    """An item that takes too long fails alone."""
    # BT-008, G13
    began = now()
    job = Job([1, 9, 2], lambda item: asyncio.sleep(item * STEP, item), concurrency=concurrency, item_timeout=3 * STEP)

    outcomes = await run(job)

    assert shape(outcomes) == [1, AttemptTimeoutError, 2]
    assert now() - began == pytest.approx((6 if concurrency == 1 else 3) * STEP)


@pytest.mark.virtual
async def test_time_limit_is_of_one_attempt() -> None:
    """Each attempt of an item has the whole limit, and one that runs into it is repeated."""
    attempts: list[int] = []

    async def work(item: int) -> int:
        attempts.append(item)
        await asyncio.sleep((9 if len(attempts) < 3 else 2) * STEP)
        return item

    began = now()
    outcomes = await run(Job([1], work, item_retry=RetryMode.fixed(2, STEP), item_timeout=3 * STEP))

    assert shape(outcomes) == [1]
    assert now() - began == pytest.approx((3 + 1 + 3 + 1 + 2) * STEP)


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("item_retry", 5, r"item_retry of import must be a RetryMode, got 5"),
        ("item_retry", None, r"item_retry of import must be a RetryMode, got None"),
        ("item_timeout", -1, r"item_timeout of import must be at least 0"),
        ("item_timeout", "5", r"item_timeout of import must be seconds as a number or a timedelta, got '5'"),
        ("config", 5, r"config of task import must be a TaskConfig, got 5"),
    ],
)
def test_attribute_out_of_range(attribute: str, value: Any, message: str) -> None:
    """A bad attribute is refused by its name when the task is registered."""
    with pytest.raises(ConfigurationError, match=message):
        workflow_of(Job([], double, name="import", **{attribute: value}))


async def test_batch_without_options_adds_no_retry() -> None:
    """Without `item_retry` an item runs once, whatever the config says of the task."""
    tried: list[int] = []

    def work(item: int) -> None:
        tried.append(item)
        raise Oops

    outcomes = await run(Job(range(3), work, config=TaskConfig().with_fixed_retry(5, 0).with_attempt_timeout(60)))

    assert tried == [0, 1, 2]
    assert shape(outcomes) == [Oops, Oops, Oops]


# The task as a whole


async def test_error_of_load() -> None:
    """An error of load fails the task: nothing is processed, finish is not called."""
    # BT-005
    tried: list[int] = []

    for load in (failing, failing_later, failing_generator, failing_async_generator):
        job = Job(None, tried.append)
        job.load = load  # type: ignore[method-assign]
        with pytest.raises(Oops, match="load") as caught:
            await run(job)
        assert caught.value.__cano__.task.endswith("Job")  # type: ignore[attr-defined]
        assert job.finished == []

    assert tried == []


def failing() -> Any:
    raise Oops("load")


async def failing_later() -> Any:
    await asyncio.sleep(0)
    raise Oops("load")


def failing_generator() -> Iterator[int]:
    raise Oops("load")
    yield 1


async def failing_async_generator() -> AsyncIterator[int]:
    raise Oops("load")
    yield 1


@pytest.mark.parametrize("reads", ["async", "plain"])
@pytest.mark.parametrize("concurrency", [2, 5])
async def test_error_while_items_are_read(concurrency: int, reads: str) -> None:
    """An error of the iterable cancels the items in flight, which are awaited, and fails the task."""
    # BT-005
    log: list[str] = []

    def items() -> Iterator[int]:
        yield from range(3)
        raise Oops("reading")

    async def items_later() -> AsyncIterator[int]:
        for item in items():
            yield item
            await asyncio.sleep(0)

    async def work(item: int) -> None:
        log.append(f"+{item}")
        try:
            await asyncio.sleep(STEP if item < 2 else FOREVER)
        except asyncio.CancelledError:
            await asyncio.sleep(STEP)
            log.append(f"x{item}")
            raise
        finally:
            log.append(f"-{item}")

    job = Job(items_later if reads == "async" else items, work, concurrency=concurrency)
    with pytest.raises(Oops, match="reading") as caught:
        await run(job)

    assert caught.value.__cano__.state == "batch"  # type: ignore[attr-defined]
    assert job.finished == []
    begun = {line[1] for line in log if line[0] == "+"}
    assert begun == {line[1] for line in log if line[0] == "-"}
    assert {line for line in log if line[0] == "x"} <= {f"x{item}" for item in begun}
    assert "2" not in begun or "x2" in log


async def test_error_of_finish() -> None:
    """An error of finish fails the task."""
    # BT-005

    class Fails(Job):
        def finish(self, outcomes: list[BranchOutcome]) -> str:
            raise Oops

    with pytest.raises(Oops) as caught:
        await workflow_of(Fails(range(2), double)).orchestrate("batch")

    assert caught.value.__cano__.state == "batch"  # type: ignore[attr-defined]


async def test_finish_that_returns_no_state() -> None:
    """What finish returns is the next state, and is checked as of any task."""

    class Returns(Job):
        def finish(self, outcomes: list[BranchOutcome]) -> Any:
            return 5

    with pytest.raises(InvalidTransitionError, match="int"):
        await workflow_of(Returns([], double)).orchestrate("batch")


async def test_retry_of_the_task_repeats_everything() -> None:
    """A retry of the task loads again, processes every item again and finishes again."""
    # BT-006
    log: list[Any] = []

    class Job(BatchTask[str]):
        config = TaskConfig().with_fixed_retry(1, 0)

        def load(self) -> list[int]:
            log.append("load")
            return [1, 2]

        def process_item(self, item: int, ctx: RunContext) -> None:
            log.append((item, ctx.attempt))

        def finish(self, outcomes: list[BranchOutcome], ctx: RunContext) -> str:
            log.append(f"finish {ctx.attempt}")
            raise Oops

    with pytest.raises(RetryExhaustedError) as caught:
        await workflow_of(Job()).orchestrate("batch")

    assert log == ["load", (1, 1), (2, 1), "finish 1", "load", (1, 1), (2, 1), "finish 2"]
    assert caught.value.attempts == 2
    assert isinstance(caught.value.__cause__, Oops)


@pytest.mark.parametrize("where", ["load", "reading", "async reading", "finish"])
async def test_retry_of_the_task_after_each_kind_of_error(where: str) -> None:
    """The second attempt of a task is a whole one, wherever the first one failed."""
    loads = 0

    def items() -> Any:
        nonlocal loads
        loads += 1
        if where == "load" and loads == 1:
            raise Oops
        return read_later() if where == "async reading" else read()

    def read() -> Iterator[int]:
        yield 1
        if where == "reading" and loads == 1:
            raise Oops
        yield 2

    async def read_later() -> AsyncIterator[int]:
        yield 1
        if loads == 1:
            raise Oops
        yield 2

    job = Job(items, lambda item: asyncio.sleep(0, item), concurrency=2, config=TaskConfig().with_fixed_retry(1, 0))
    finish = job.finish

    def failing_finish(outcomes: list[BranchOutcome]) -> str:
        if where == "finish" and loads == 1:
            raise Oops
        return finish(outcomes)

    job.finish = failing_finish  # type: ignore[method-assign]

    assert shape(await run(job)) == [1, 2]
    assert loads == 2


@pytest.mark.virtual
async def test_attempt_timeout_of_the_task() -> None:
    """`attempt_timeout` of the config is for the batch as a whole; items in flight are cancelled and awaited."""
    gauge = Gauge(sleep=2 * STEP)
    began = now()

    with pytest.raises(AttemptTimeoutError):
        await run(Job(lambda: gauge.items(9), gauge, concurrency=2, config=TaskConfig().with_attempt_timeout(5 * STEP)))

    assert now() - began == pytest.approx(5 * STEP)
    assert (gauge.started, gauge.ended, gauge.in_flight) == (6, 6, 0)


@pytest.mark.virtual
async def test_attempt_timeout_is_retried() -> None:
    """A batch that ran out of time is repeated as a whole."""
    loads: list[int] = []

    def items() -> list[float]:
        loads.append(1)
        return [FOREVER if len(loads) == 1 else STEP]

    config = TaskConfig().with_attempt_timeout(2 * STEP).with_fixed_retry(1, 0)

    assert shape(await run(Job(items, lambda item: asyncio.sleep(item, "x"), config=config))) == ["x"]


@pytest.mark.virtual
@pytest.mark.parametrize("attributes", [{}, {"item_retry": RetryMode.fixed(9, 0)}], ids=["plain", "retry"])
async def test_budget_of_the_run(attributes: dict[str, Any]) -> None:
    """The run's timeout ends a batch like any task, its items are awaited."""
    gauge = Gauge(sleep=2 * STEP)
    began = now()

    with pytest.raises(WorkflowTimeoutError) as caught:
        await run(Job(lambda: gauge.async_items(9), gauge, concurrency=2, **attributes), timeout=5 * STEP)

    assert now() - began == pytest.approx(5 * STEP)
    assert gauge.in_flight == 0
    assert caught.value.state == "batch"


@pytest.mark.virtual
async def test_budget_that_is_used_up_between_two_items() -> None:
    """An item is not begun when the run's time is up, though the one before it would not be cancelled."""
    started: list[int] = []

    async def deaf(item: int) -> None:
        started.append(item)
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(FOREVER)

    with pytest.raises(WorkflowTimeoutError):
        await run(Job(range(9), deaf), timeout=STEP)

    assert started == [0]


async def test_base_exception_of_an_item() -> None:
    """A BaseException of an item is no outcome: it ends the run as it is, after every item in flight has ended."""
    gauge = Gauge(sleep=FOREVER)

    async def work(item: int) -> None:
        if item == 2:
            await asyncio.sleep(0)
            raise Fatal
        await gauge(item)

    job = Job(range(9), work, concurrency=4, config=TaskConfig().with_fixed_retry(3, 0))
    with pytest.raises(Fatal):
        await run(job)

    assert (gauge.started, gauge.in_flight) == (3, 0)
    assert job.finished == []


@pytest.mark.parametrize("when", ["at once", "later"])
@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_interrupt_in_an_item(kind: type[BaseException], when: str, asyncio_reports: list[str]) -> None:
    """An interrupt raised in an item leaves the event loop at once, and the other items are cancelled as the loop ends."""
    gauge = Gauge(sleep=FOREVER)

    async def work(item: int) -> None:
        if item == 1:
            if when == "later":
                await asyncio.sleep(STEP)
            raise kind
        await gauge(item)

    with pytest.raises(kind):
        cano.testing.run(run(Job(range(9), work, concurrency=2)))
    gc.collect()
    asyncio_reports.clear()  # that main() ended with it, too; asyncio reports the same of a TaskGroup

    assert (gauge.started, gauge.in_flight) == (1, 0)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, Fatal])
@pytest.mark.parametrize("reads", ["async", "plain"])
def test_interrupt_while_items_are_read(kind: type[BaseException], reads: str, asyncio_reports: list[str]) -> None:
    """An interrupt raised by the iterable ends the run as it is; the items in flight are cancelled."""
    gauge = Gauge(sleep=FOREVER)

    def items() -> Iterator[int]:
        yield 1
        raise kind

    async def items_later() -> AsyncIterator[int]:
        yield 1
        raise kind

    with pytest.raises(kind):
        cano.testing.run(run(Job(items_later if reads == "async" else items, gauge, concurrency=2)))
    gc.collect()
    asyncio_reports.clear()

    assert (gauge.started <= 1, gauge.in_flight) == (True, 0)


@pytest.mark.parametrize("reads", ["async", "plain"])
async def test_iterable_that_cancels_itself(reads: str) -> None:
    """A CancelledError of the iterable is what leaves the run, as if load itself had raised it."""
    gauge = Gauge(sleep=FOREVER)

    def items() -> Iterator[int]:
        yield 1
        raise asyncio.CancelledError

    async def items_later() -> AsyncIterator[int]:
        yield 1
        await asyncio.sleep(0)
        raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        await run(Job(items_later if reads == "async" else items, gauge, concurrency=2))

    assert (gauge.started <= 1, gauge.in_flight) == (True, 0)


@pytest.mark.parametrize("kind", ["plain", "async"])
async def test_stop_iteration_of_an_item(kind: str) -> None:
    """A StopIteration that an item lets out is an error, as in a coroutine."""
    job = Job([1], double)

    def plain(item: int) -> int:
        raise StopIteration

    async def later(item: int) -> int:
        raise StopIteration

    job.process_item = plain if kind == "plain" else later  # type: ignore[method-assign]

    assert shape(await run(job)) == [RuntimeError]


# Cancelled


@pytest.mark.parametrize("source", ["list", "generator", "async generator"])
async def test_cancelled_from_outside(source: str) -> None:
    """A cancel reaches every item in flight with its message, and comes out when the last one has ended."""
    messages: list[Any] = []
    gauge = Gauge()

    async def work(item: int) -> None:
        try:
            await asyncio.sleep(FOREVER)
        except asyncio.CancelledError as error:
            messages.append(error.args)
            await asyncio.sleep(STEP)
            messages.append(item)
            raise

    items = {"list": range(9), "generator": lambda: gauge.items(9), "async generator": lambda: gauge.async_items(9)}
    job = Job(items[source], work, concurrency=2)
    task = asyncio.create_task(run(job))
    for _ in range(4):
        await asyncio.sleep(0)
    task.cancel("enough")

    with pytest.raises(asyncio.CancelledError, match="enough"):
        await task

    assert messages[:2] == [("enough",), ("enough",)]
    assert sorted(messages[2:]) == [0, 1]
    assert job.finished == []


async def test_cancelled_by_its_handle() -> None:
    """`Run.cancel` ends a batch as it ends any task."""
    gauge = Gauge(sleep=FOREVER)
    handle = workflow_of(Job(range(9), gauge, concurrency=3)).start("batch")
    for _ in range(3):
        await asyncio.sleep(0)
    handle.cancel("reason")

    with pytest.raises(WorkflowCancelledError, match="reason"):
        await handle

    assert (gauge.started, gauge.in_flight) == (3, 0)


@pytest.mark.parametrize("method", ["load", "finish"])
async def test_cancelled_in_load_or_finish(method: str) -> None:
    """Load and finish are cancelled where they wait."""
    job = Job([1], double)
    reached = asyncio.Event()

    async def waits(*_: Any) -> Any:
        reached.set()
        await asyncio.sleep(FOREVER)

    async def load() -> Any:
        return await waits()

    async def finish(outcomes: Any) -> Any:
        return await waits()

    setattr(job, method, {"load": load, "finish": finish}[method])
    task = asyncio.create_task(run(job))
    await reached.wait()
    task.cancel()

    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("concurrency", [1, 2, 9])
async def test_async_iterable_that_swallows_a_cancel(concurrency: int) -> None:
    """An asynchronous iterable that goes on though it was cancelled is read no further, and closed."""
    gauge = Gauge(sleep=FOREVER)
    log: list[str] = []

    async def deaf() -> AsyncIterator[int]:
        yield 1
        try:
            for item in itertools.count(2):
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.sleep(FOREVER)
                log.append("deaf")
                yield item
        finally:
            log.append("closed")

    task = asyncio.create_task(run(Job(deaf, gauge, concurrency=concurrency)))
    for _ in range(5):
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait((task,))

    assert task.cancelled()
    assert log == ["deaf", "closed"]
    assert (gauge.started, gauge.in_flight) == (1, 0)


# What is read is closed


ENDINGS: dict[str, Any] = {
    "end": "done",
    "reading": Oops,
    "finish": Oops,
    "cancel": asyncio.CancelledError,
    "timeout": WorkflowTimeoutError,
    "attempt timeout": AttemptTimeoutError,
    "fatal": Fatal,
}


@pytest.mark.parametrize("source", ["generator", "async generator"])
@pytest.mark.parametrize("ending", ENDINGS)
async def test_iterable_is_closed(source: str, ending: str) -> None:
    """However a batch ends, a generator that it read is closed when it is over, though the exception is kept."""
    gauge = Gauge(sleep=0 if ending in ("end", "finish") else FOREVER)
    closed_before_finish: list[int] = []

    async def work(item: int) -> None:
        if ending == "fatal" and item == 1:
            await asyncio.sleep(0)
            raise Fatal
        await gauge(item)

    class Ends(Job):
        concurrency = 9 if ending == "reading" else 2
        config = TaskConfig(attempt_timeout=STEP if ending == "attempt timeout" else None)

        def load(self) -> Any:
            read = gauge.items if source == "generator" else gauge.async_items
            return read(4, breaks=ending == "reading")

        def finish(self, outcomes: list[BranchOutcome]) -> str:
            closed_before_finish.append(len(gauge.closed))
            if ending == "finish":
                raise Oops
            return "done"

    workflow = workflow_of(Ends(None, work))
    task = asyncio.create_task(workflow.orchestrate("batch", timeout=STEP if ending == "timeout" else None))
    for _ in range(20):
        await asyncio.sleep(0)
    if ending == "cancel":
        task.cancel()
    (outcome,) = await asyncio.gather(task, return_exceptions=True)

    assert outcome == "done" if ending == "end" else isinstance(outcome, ENDINGS[ending])
    assert len(gauge.closed) == 1
    assert closed_before_finish == ([1] if ending in ("end", "finish") else [])


@pytest.mark.parametrize("source", ["generator", "async generator"])
async def test_iterable_of_a_run_that_is_closed(source: str) -> None:
    """Closing the coroutine of a run closes its generator, an asynchronous one in the next turns of the loop."""
    gauge = Gauge(sleep=FOREVER)
    items = gauge.items if source == "generator" else gauge.async_items
    coroutine = run(Job(lambda: items(9), gauge, concurrency=2))
    coroutine.send(None)
    for _ in range(2):
        await asyncio.sleep(0)

    coroutine.close()

    assert source != "generator" or len(gauge.closed) == 1
    for _ in range(5):
        await asyncio.sleep(0)
    assert (gauge.started, gauge.in_flight, len(gauge.closed)) == (2, 0, 1)


@pytest.mark.parametrize("when", ["before", "after"])
async def test_iterator_with_a_close_is_closed(when: str) -> None:
    """What is iterated is closed by its `close` or `aclose`, like a file or a cursor, if it has one."""
    closed: list[str] = []

    class Cursor:
        def __iter__(self) -> "Cursor":
            return self

        def __next__(self) -> int:
            if when == "before":
                raise Oops
            raise StopIteration

        def close(self) -> None:
            closed.append("close")

    class AsyncCursor:
        def __aiter__(self) -> "AsyncCursor":
            return self

        async def __anext__(self) -> int:
            if when == "before":
                raise Oops
            raise StopAsyncIteration

        async def aclose(self) -> None:
            closed.append("aclose")

    for cursor in (Cursor(), AsyncCursor()):
        with pytest.raises(Oops) if when == "before" else contextlib.nullcontext():
            await run(Job(cursor, double))

    assert closed == ["close", "aclose"]


@pytest.mark.parametrize("source", ["generator", "async generator"])
async def test_error_of_closing(source: str) -> None:
    """An error that the iterable raises when it is closed fails the task, unless something else ends it already."""

    def items() -> Iterator[int]:
        try:
            yield from range(9)
        finally:
            raise Oops("closing")

    async def items_later() -> AsyncIterator[int]:
        try:
            for item in range(9):
                yield item
        finally:
            raise Oops("closing")

    made = items if source == "generator" else items_later

    with pytest.raises(Oops, match="closing"):
        await run(Job(made, double))
    task = asyncio.create_task(run(Job(made, Gauge(sleep=FOREVER))))
    for _ in range(5):
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


# Context variables

variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")


@pytest.mark.parametrize("source", ["list", "generator", "async generator"])
@pytest.mark.parametrize("attributes", [{}, {"item_retry": RetryMode.fixed(1, 0)}], ids=["plain", "retry"])
@pytest.mark.parametrize("concurrency", [1, 2, 9])
async def test_each_item_has_its_own_context(concurrency: int, attributes: dict[str, Any], source: str) -> None:
    """An item sees what the task's context held, load included; what it sets is seen by nobody else."""
    seen: list[str] = []

    async def work(item: int) -> None:
        seen.append(variable.get())
        variable.set(f"item {item}")
        await asyncio.sleep(0)
        assert variable.get() == f"item {item}"

    class Loads(Job):
        def load(self) -> Any:
            variable.set("load")
            return {"list": range(4), "generator": self.read(), "async generator": self.read_later()}[source]

        def read(self) -> Iterator[int]:
            for item in range(4):
                seen.append(variable.get())
                yield item

        async def read_later(self) -> AsyncIterator[int]:
            for item in range(4):
                seen.append(variable.get())
                yield item

        def finish(self, outcomes: list[BranchOutcome]) -> str:
            seen.append(variable.get())
            return super().finish(outcomes)

    job = Loads(None, work, concurrency=concurrency, **attributes)
    variable.set("before")
    await run(job)

    assert seen == ["load"] * (5 if source == "list" else 9)
    variable.set("unset")


@pytest.mark.parametrize("source", ["generator", "async generator"])
@pytest.mark.parametrize("concurrency", [1, 2, 9])
@pytest.mark.parametrize("ending", ["end", "cancel"])
async def test_iterable_has_one_context_of_its_own(source: str, concurrency: int, ending: str) -> None:
    """A generator runs in one context from its first item to its end: what it sets it can reset, and only it sees it."""
    seen: list[str] = []
    reset: list[str] = []

    def items() -> Iterator[int]:
        token = variable.set("reading")
        try:
            for item in range(4):
                assert variable.get() == "reading"
                yield item
        finally:
            variable.reset(token)
            reset.append(variable.get())

    async def items_later() -> AsyncIterator[int]:
        token = variable.set("reading")
        try:
            for item in range(4):
                assert variable.get() == "reading"
                yield item
        finally:
            variable.reset(token)
            reset.append(variable.get())

    async def work(item: int) -> None:
        seen.append(variable.get())
        await asyncio.sleep(FOREVER if ending == "cancel" else 0)

    variable.set("outside")
    task = asyncio.create_task(run(Job(items if source == "generator" else items_later, work, concurrency=concurrency)))
    for _ in range(20):
        await asyncio.sleep(0)
    if ending == "cancel":
        task.cancel()
    await asyncio.wait((task,))

    assert task.cancelled() == (ending == "cancel")
    assert set(seen) == {"outside"}
    assert reset == ["outside"]
    variable.set("unset")


# In the company of others


async def test_batch_as_a_branch() -> None:
    """A batch may be a branch of a split: its value is what finish returns."""
    contexts: list[tuple[int | None, str]] = []

    class Items(BatchTask[str]):
        concurrency = 2

        def __init__(self, factor: int) -> None:
            self.factor = factor

        def load(self, ctx: RunContext) -> range:
            contexts.append((ctx.branch, ctx.idempotency_key))
            return range(3)

        async def process_item(self, item: int, ctx: RunContext) -> int:
            contexts.append((ctx.branch, ctx.idempotency_key))
            await asyncio.sleep(0)
            return item * self.factor

        def finish(self, outcomes: list[BranchOutcome]) -> Any:
            return [one.value for one in outcomes]

    values: list[Any] = []

    def joined(result: SplitResult) -> str:
        values.extend(result.values())
        return "done"

    workflow = Workflow[str]().register_split("split", [Items(1), Items(10)], JoinConfig(ALL, "joined"))
    await workflow.register("joined", joined).add_exit_state("done").orchestrate("split")

    assert values == [[0, 1, 2], [0, 10, 20]]
    assert collections.Counter(branch for branch, _ in contexts) == {0: 3, 1: 3, 2: 2}
    assert len({key for _, key in contexts}) == 8


async def test_batch_as_a_branch_that_loses() -> None:
    """A batch that loses a split is cancelled with its items, and its generator is closed."""
    gauge = Gauge(sleep=FOREVER)
    batch = Job(lambda: gauge.items(9), gauge, concurrency=3)
    winner = lambda: asyncio.sleep(STEP, "x")  # noqa: E731
    workflow = Workflow[str]().register_split("split", [batch, winner], JoinConfig(JoinStrategy.Any, "done"))

    await workflow.add_exit_state("done").orchestrate("split")

    assert (gauge.started, gauge.in_flight, len(gauge.closed)) == (3, 0, 1)


async def test_batch_as_a_branch_that_fails() -> None:
    """A batch that fails is a failed branch, whose error says where."""
    batch = Job(failing_generator, double)
    workflow = Workflow[str]().register_split("split", [batch], JoinConfig(ALL, "done")).add_exit_state("done")

    with pytest.raises(JoinError) as caught:
        await workflow.orchestrate("split")

    (error,) = caught.value.exceptions
    assert isinstance(error, Oops)
    assert error.__cano__.branch == 0  # type: ignore[attr-defined]


async def test_batches_in_a_fork() -> None:
    """A batch may be a state on the way of a fork's branches, and may itself fork."""
    seen: list[tuple[int | None, str]] = []

    class Items(BatchTask[str]):
        def load(self) -> str:
            return list("ab")  # type: ignore[return-value]

        def process_item(self, item: str, ctx: RunContext) -> None:
            seen.append((ctx.branch, item))

        def finish(self, outcomes: list[BranchOutcome], ctx: RunContext) -> Any:
            return TaskResult.Split(["left", "right"]) if ctx.state == "fork" else "joined"

    workflow = Workflow[str]().register("fork", Items(), join=JoinConfig(ALL, "joined"))
    workflow.register("left", Items()).register("right", Items())
    workflow.register("joined", lambda: "done").add_exit_state("done")

    assert await workflow.orchestrate("fork") == "done"
    assert sorted(seen) == [(0, "a")] * 3 + [(1, "b")] * 3


async def test_batch_in_an_item() -> None:
    """An item may run a workflow with a batch of its own."""
    inner = Job(range(3), lambda item: asyncio.sleep(0, item), concurrency=2)
    workflow = workflow_of(inner)

    async def work(item: int) -> str:
        return await workflow.orchestrate("batch")

    outcomes = await run(Job(range(3), work, concurrency=2))

    assert shape(outcomes) == ["done"] * 3
    assert [shape(found) for found in inner.finished] == [[0, 1, 2]] * 3


async def test_deep_nesting() -> None:
    """Batches in items in batches, a hundred deep, use no stack."""

    def nested(depth: int) -> Workflow[str]:
        async def work(item: int) -> str:
            return await nested(depth - 1).orchestrate("batch") if depth else "bottom"

        return workflow_of(Job([depth], work))

    assert await nested(100).orchestrate("batch") == "done"


async def test_one_task_object_in_many_runs() -> None:
    """A batch keeps nothing of a run: many runs of one workflow do not meet."""
    job = Job(range(5), lambda item: asyncio.sleep(0, item), concurrency=2)
    workflow = workflow_of(job)

    await asyncio.gather(*[workflow.orchestrate("batch") for _ in range(20)])

    assert [shape(found) for found in job.finished] == [list(range(5))] * 20


async def test_batch_in_a_loop_of_states() -> None:
    """A state with a batch may be entered again and again; each visit loads anew."""
    left = [3, 2, 1]
    job = Job(lambda: range(left[0]), double)
    finish = job.finish

    def again(outcomes: list[BranchOutcome]) -> str:
        finish(outcomes)
        left.pop(0)
        return "batch" if left else "done"

    job.finish = again  # type: ignore[method-assign]
    await workflow_of(job).orchestrate("batch")

    assert [len(found) for found in job.finished] == [3, 2, 1]


def test_declared_states_of_finish() -> None:
    """The return annotation of finish is that of the task: validate knows where the batch leads."""

    class Leads(Job):
        def finish(self, outcomes: list[BranchOutcome]) -> Literal["nowhere"]:
            return "nowhere"

    with pytest.raises(ConfigurationError, match="nowhere"):
        workflow_of(Leads([], double)).validate()


# Against a model


@dataclass(frozen=True)
class Item:
    reading: int
    attempts: list[tuple[int, bool]]


@dataclass(frozen=True)
class Plan:
    """Times in milliseconds. The last of an item's attempts is repeated; `breaks` is the item that cannot be read."""

    items: list[Item]
    concurrency: int
    retries: int
    delay: int
    timeout: int | None
    reads_slowly: bool
    breaks: int | None


Outcomes = list[tuple[int, str, int]]


def expected(plan: Plan) -> tuple[list[tuple[int, int, int]], Outcomes | None, int]:
    """Which attempt begins when; how each item ends and how long it took, or None if one cannot be read; and the end."""
    begun, outcomes = [], []
    free, started = [0] * plan.concurrency, 0
    for index, item in enumerate(plan.items):
        read = started + item.reading if plan.reads_slowly else free[0]
        if index == plan.breaks:
            return [one for one in begun if one[0] < read], None, read
        moment = started = max(read, heapq.heappop(free))
        for attempt in range(plan.retries + 1):
            begun.append((moment, index, attempt + 1))
            duration, is_good = item.attempts[min(attempt, len(item.attempts) - 1)]
            is_late = plan.timeout is not None and duration > plan.timeout
            moment += plan.timeout if is_late and plan.timeout else duration
            if is_good and not is_late:
                break
            moment += plan.delay if attempt < plan.retries else 0
        failure = "RetryExhaustedError" if plan.retries else "AttemptTimeoutError" if is_late else "Oops"
        outcomes.append((index, "good" if is_good and not is_late else failure, moment - started))
        heapq.heappush(free, moment)
    return begun, outcomes, max(free)


class Planned(BatchTask[str]):
    """A batch that does what a plan says, and writes down when."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.concurrency = plan.concurrency
        self.item_retry = RetryMode.fixed(plan.retries, plan.delay / 1000) if plan.retries else RetryMode.none()
        self.item_timeout = None if plan.timeout is None else plan.timeout / 1000
        self.begun: list[tuple[int, int, int]] = []
        self.outcomes: Outcomes | None = None

    def load(self) -> Any:
        return self.read_slowly() if self.plan.reads_slowly else self.read()

    def read(self) -> Iterator[int]:
        for index in range(len(self.plan.items)):
            if index == self.plan.breaks:
                raise Oops
            yield index

    async def read_slowly(self) -> AsyncIterator[int]:
        for index in range(len(self.plan.items)):
            await asyncio.sleep(self.plan.items[index].reading / 1000)
            if index == self.plan.breaks:
                raise Oops
            yield index

    async def process_item(self, index: int, context: RunContext) -> None:
        self.begun.append((round(now() * 1000), index, context.attempt))
        attempts = self.plan.items[index].attempts
        duration, is_good = attempts[min(context.attempt, len(attempts)) - 1]
        if duration:
            await asyncio.sleep(duration / 1000)
        if not is_good:
            raise Oops

    def finish(self, outcomes: list[BranchOutcome]) -> str:
        kinds = [type(one.error).__name__ if one.error else "good" for one in outcomes]
        self.outcomes = [
            (one.index, kind, round(one.elapsed * 1000)) for one, kind in zip(outcomes, kinds, strict=True)
        ]
        return "done"

    async def run(self) -> int:
        with contextlib.suppress(Oops):
            await workflow_of(self).orchestrate("batch")
        return round(now() * 1000)


def even(most: int) -> st.SearchStrategy[int]:
    return st.integers(0, most // 2).map(lambda half: half * 2)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    attempts = st.lists(st.tuples(even(20), st.booleans()), min_size=1, max_size=3)
    items = draw(st.lists(st.builds(Item, even(8), attempts), max_size=12))
    return Plan(
        items=items,
        concurrency=draw(st.integers(1, 5)),
        retries=draw(st.integers(0, 2)),
        delay=draw(even(10)),
        timeout=draw(st.none() | even(14).map(lambda half: half + 1)),  # odd: no attempt ends just then
        reads_slowly=draw(st.booleans()),
        breaks=draw(st.none() | st.integers(0, 12)),
    )


@pytest.mark.model
@settings(max_examples=300, deadline=None)
@given(plan=plans(), branches=st.sampled_from(["native", "asyncio"]))
def test_batch_does_what_the_model_says(plan: Plan, branches: Any) -> None:
    """Every attempt begins at the moment, and every item and the run end as and when, a model of 20 lines says."""
    cano.configure(branches=branches)
    batch = Planned(plan)
    begun, outcomes, end = expected(plan)

    ended = cano.testing.run(batch.run())

    assert ended == end
    assert batch.outcomes == outcomes
    # What begins just when the reading breaks may have begun.
    assert sorted(one for one in batch.begun if outcomes is not None or one[0] < end) == sorted(begun)
