"""Streams: items one by one, windows by count and by duration, and an orderly end whatever ends them."""

import asyncio
import contextvars
import copy
import enum
import gc
import logging
import pickle
import weakref
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Literal

import anyio
import pytest
from hypothesis import given, settings, strategies as st

from cano import (
    AttemptTimeoutError,
    ConfigurationError,
    Continue,
    InvalidTransitionError,
    ItemErrorPolicy,
    JoinConfig,
    JoinStrategy,
    NonRetryable,
    Res,
    Resource,
    ResourceNotFoundError,
    Resources,
    RetryAfter,
    RunContext,
    Stop,
    StreamProgress,
    StreamTask,
    StreamWindow,
    TaskConfig,
    TaskExecutionError,
    TaskResult,
    Workflow,
    WorkflowCancelledError,
    WorkflowError,
    WorkflowTimeoutError,
    testing,
)

Count, Duration = StreamWindow.Count, StreamWindow.Duration
FailFast, Skip, Retry = ItemErrorPolicy.FailFast, ItemErrorPolicy.Skip, ItemErrorPolicy.Retry
FOREVER = 3600.0


class S(enum.Enum):
    START = 1
    STOPPED = 2
    DONE = 3


class Oops(Exception):
    pass


class Worse(Exception):
    pass


def now():
    return asyncio.get_running_loop().time()


async def ticks(count=5):
    for _ in range(count):
        await asyncio.sleep(0)


class Numbers(StreamTask[S]):
    """A stream of numbers that writes down what happens to it.

    A pair (seconds, number) comes after so many seconds; `fails` maps a number to the errors of its first tries, `stop_at` is
    the output whose window ends the stream.
    """

    def __init__(self, items, *, window=None, on_item_error=None, fails=(), stop_at=None):
        self.items = [item if isinstance(item, tuple) else (None, item) for item in items]
        self.fails = {number: list(errors) for number, errors in dict(fails).items()}
        self.stop_at = stop_at
        self.log = []
        self.windows = []
        self.flushed_at = []
        self.progress = None
        if window is not None:
            self.window = window
        if on_item_error is not None:
            self.on_item_error = on_item_error

    async def open(self, cursor, progress: StreamProgress):
        assert cursor is None
        self.progress = progress
        self.started = now()
        self.log.append("open")
        try:
            for pause, number in self.items:
                if pause is not None:
                    await asyncio.sleep(pause)
                yield number
        finally:
            self.log.append("source closed")

    async def process_item(self, item):
        self.log.append(item)
        if self.fails.get(item):
            error = self.fails[item].pop(0)
            if error is not None:
                raise error
        return item, f"after {item}"

    async def flush_window(self, outputs):
        self.windows.append(outputs)
        self.flushed_at.append(now() - self.started)
        self.log.append(outputs)
        return Stop(S.STOPPED) if self.stop_at in outputs else Continue

    async def on_close(self, reason):
        self.log.append(reason)
        return S.DONE


def workflow_of(task, resources=None, **options):
    return Workflow(resources).register_stream(S.START, task, **options).add_exit_states([S.STOPPED, S.DONE])


async def run(task, **options):
    return await workflow_of(task, **options).orchestrate(S.START)


async def cancelled(task, after=None, **options):
    """Run, cancel after so many seconds (some turns of the loop by default), and give what leaves the run."""
    handle = workflow_of(task, **options).start(S.START)
    await (ticks() if after is None else asyncio.sleep(after))
    handle.cancel("enough")
    with pytest.raises(BaseException) as caught:
        await handle
    return caught.value


# Windows by count


@pytest.mark.parametrize(
    ("count", "items", "windows"),
    [
        pytest.param(2, 5, [[1, 2], [3, 4], [5]], id="with a rest"),  # STR-001
        pytest.param(2, 4, [[1, 2], [3, 4]], id="exact multiple"),  # STR-008
        pytest.param(9, 3, [[1, 2, 3]], id="never full"),  # STR-007
        pytest.param(1, 3, [[1], [2], [3]], id="each"),
        pytest.param(3, 0, [], id="nothing"),  # STR-008
    ],
)
async def test_windows_by_count(count, items, windows):
    """So many outputs are flushed at once, in order, and what is left at the end; a window is never empty."""
    task = Numbers(range(1, items + 1), window=Count(count))

    end = await run(task)

    # STR-007, STR-008, STR-029
    assert end is S.DONE
    assert task.windows == windows
    assert task.log[-1] == "exhausted"
    assert task.log.count("exhausted") == 1
    assert task.progress == StreamProgress(f"after {items}" if items else None, items, 0, len(windows))


async def test_defaults():
    """By default each output is flushed alone, the first error ends the stream, and its name is that of the class."""
    error = Oops()
    task = Numbers([1, 2, 3], fails={3: [error]})

    with pytest.raises(Oops) as caught:
        await run(task)

    # STR-002
    assert task.windows == [[1], [2]]
    assert caught.value is error
    assert caught.value.__cano__.task == "Numbers"
    assert (StreamTask.window, StreamTask.on_item_error) == (Count(1), FailFast)


async def test_order_of_things():
    """The source is closed before what is left is flushed, and the close hook comes last."""
    task = Numbers([1, 2, 3], window=Count(2))

    await run(task)

    assert task.log == ["open", 1, 2, [1, 2], 3, "source closed", [3], "exhausted"]


async def test_plain_methods():
    """All methods may be plain, on an object without a base; the source may be any async iterable."""

    class Source:
        def __init__(self):
            self.left = [3, 2, 1]

        def __aiter__(self):
            return self

        async def __anext__(self):
            if not self.left:
                raise StopAsyncIteration
            return self.left.pop()

    class Task:
        window = Count(2)

        def __init__(self):
            self.windows = []

        def open(self, cursor):
            assert cursor is None
            return Source()

        def process_item(self, item):
            return item * 10, item

        def flush_window(self, outputs):
            self.windows.append(outputs)
            return Continue

        def on_close(self, reason):
            return S.DONE if reason == "exhausted" else None

    task = Task()
    await run(task)

    assert task.windows == [[10, 20], [30]]


async def test_open_may_return_its_source_later():
    """`open` may be an async function that returns an async iterable."""

    class Task(Numbers):
        async def open(self, cursor, progress: StreamProgress):
            await asyncio.sleep(0)
            return super().open(cursor, progress)

    task = Task([1, 2])
    await run(task)

    assert task.windows == [[1], [2]]


async def test_arguments_of_the_methods():
    """Each method asks for its own arguments, after those that it is given."""
    seen = []

    class Task:
        async def open(self, cursor, ctx: RunContext, items: Annotated[list, Res("items")]):
            seen.append((cursor, ctx.state, ctx.attempt))
            for item in items:
                yield item

        def process_item(self, item, /, factor: Annotated[int, Res("factor")], *, progress: StreamProgress):
            seen.append((item, progress.outputs))
            return item * factor, item

        def flush_window(self, outputs, res: Resources, limit: int = 3):
            seen.append((outputs, res.get("factor"), limit))
            return Continue

        def on_close(self, reason, ctx: RunContext, progress: StreamProgress):
            seen.append((reason, ctx.visit, progress.cursor))
            return S.DONE

    await workflow_of(Task(), {"items": [4], "factor": 10}).orchestrate(S.START)

    assert seen == [(None, S.START, 1), (4, 0), ([40], 10, 3), ("exhausted", 1, 4)]


async def test_two_runs_at_once_are_two_streams():
    """Runs of one workflow share nothing but the task."""

    class Task:
        window = Count(3)

        def __init__(self):
            self.windows = []

        async def open(self, _, ctx: RunContext):
            for number in range(5):
                await asyncio.sleep(0)
                yield f"{ctx.workflow_id}{number}"

        def process_item(self, item):
            return item, item

        def flush_window(self, outputs):
            self.windows.append(" ".join(outputs))
            return Continue

        def on_close(self, _):
            return S.DONE

    task = Task()
    workflow = workflow_of(task)
    await asyncio.gather(*(workflow.orchestrate(S.START, workflow_id=name) for name in "ab"))

    assert sorted(task.windows) == ["a0 a1 a2", "a3 a4", "b0 b1 b2", "b3 b4"]


# Windows by duration


@pytest.mark.virtual
async def test_windows_by_duration():
    """Outputs are flushed together at the ends of equal stretches of time, with the cursor of the last one."""
    task = Numbers([(0.03, 1), (0.03, 2), (0.03, 3), (0.03, 4)], window=Duration(0.05))

    await run(task)

    # STR-004
    assert task.windows == [[1], [2, 3], [4]]
    assert task.flushed_at == pytest.approx([0.05, 0.1, 0.12])
    assert task.progress.cursor == "after 4"


@pytest.mark.virtual
async def test_empty_stretches_flush_nothing():
    """A stretch of time without outputs is no window, and arms no timer."""
    task = Numbers([(0.5, 1), (100, 2), (0.1, 3), (FOREVER, 4)], window=Duration(1))

    await run(task)

    # STR-005
    assert task.windows == [[1], [2, 3], [4]]
    assert task.flushed_at == pytest.approx([1, 101, 100.6 + FOREVER])


@pytest.mark.virtual
async def test_ends_of_windows_do_not_drift():
    """Whatever items and flushes cost, windows end at start + k x width."""

    class Slow(Numbers):
        async def process_item(self, item):
            await asyncio.sleep(0.3)
            return await super().process_item(item)

        async def flush_window(self, outputs):
            verdict = await super().flush_window(outputs)
            await asyncio.sleep(0.37)
            return verdict

    task = Slow([(0.2, number) for number in range(12)], window=Duration(1))

    await run(task)

    # B40
    assert all(
        at % 1 == pytest.approx(0, abs=0.3) for at in task.flushed_at[:-1]
    )  # late by the item in process at most
    assert [number for window in task.windows for number in window] == list(range(12))


@pytest.mark.virtual
async def test_item_in_process_at_the_end_belongs_to_the_window():
    """A window whose end passes while an item is in process is flushed with it, when it is done; a ready item waits."""

    class Slow(Numbers):
        async def process_item(self, item):
            await asyncio.sleep(5 if item == 2 else 0)
            return await super().process_item(item)

    task = Slow([(0.25, 1), (0.25, 2), (0, 3)], window=Duration(1))

    await run(task)

    assert task.windows == [[1, 2], [3]]
    assert task.flushed_at[0] == 5.5


@pytest.mark.virtual
async def test_no_item_is_lost_between_windows():
    """The request for the next item stays open while windows end: nothing is lost, doubled or read ahead."""
    asked = []

    class Source:
        def __init__(self):
            self.busy = False

        def __aiter__(self):
            return self

        async def __anext__(self):
            assert not self.busy
            self.busy = True
            asked.append(now())
            await asyncio.sleep(0.75)
            self.busy = False
            if len(asked) == 20:
                raise StopAsyncIteration
            return len(asked)

    class Task(Numbers):
        def open(self, _, progress: StreamProgress):
            self.started, self.progress = now(), progress
            return Source()

        async def flush_window(self, outputs):
            await asyncio.sleep(0.5)
            return await super().flush_window(outputs)

    task = Task([], window=Duration(1))
    await run(task)

    assert [number for window in task.windows for number in window] == list(range(1, 20))
    assert len(asked) == 20


@dataclass
class Story:
    """What a source, its items and their flushes take, in 1/512 s, which floats and whole nanoseconds hold exactly."""

    gaps: list[int]
    costs: list[int]
    flush: int
    width: int

    def windows(self):
        """The reference: the windows, and when each was handed over."""
        done, outputs, end, time = [], [], None, 0
        for number, (gap, cost) in enumerate(zip(self.gaps, self.costs, strict=True)):
            comes = time + gap
            while end is not None and end <= max(comes, time):
                time = max(time, end)
                done.append((outputs, time))
                outputs, end, time = [], None, time + self.flush
            time = max(time, comes) + cost
            outputs.append(number)
            if end is None:
                end = (time // self.width + 1) * self.width
            if time >= end:
                done.append((outputs, time))
                outputs, end, time = [], None, time + self.flush
        ended = time + self.gaps[-1]
        if end is not None and end <= ended:
            done.append((outputs, end))
            outputs = []
        return [*done, (outputs, ended)] if outputs else done


durations = st.one_of(st.integers(0, 3), st.integers(0, 2000))


@st.composite
def stories(draw):
    count = draw(st.integers(1, 12))
    take = st.lists(durations, min_size=count, max_size=count)
    return Story(draw(take), draw(take), draw(durations), draw(st.one_of(st.integers(1, 3), st.integers(1, 3000))))


@given(story=stories())
@settings(max_examples=300, deadline=None)
def test_windows_by_duration_follow_the_model(story):
    """For any source, items, flushes and width the windows are those of the reference, and so are their times."""

    class Task:
        window = Duration(story.width / 512)

        def __init__(self):
            self.windows = []

        async def open(self, _):
            self.started = now()
            for number, gap in enumerate(story.gaps):
                await asyncio.sleep(gap / 512)
                yield number
            await asyncio.sleep(story.gaps[-1] / 512)

        async def process_item(self, item):
            await asyncio.sleep(story.costs[item] / 512)
            return item, item

        async def flush_window(self, outputs):
            self.windows.append((outputs, (now() - self.started) * 512))
            await asyncio.sleep(story.flush / 512)
            return Continue

        def on_close(self, _):
            return S.DONE

    task = Task()
    testing.run(run(task))

    assert task.windows == story.windows()


async def test_source_of_timed_windows_keeps_its_task():
    """Where windows end by time, one task reads the source from its first item to its end: scopes in it may span items."""
    tasks, left = set(), []

    class Task(Numbers):
        async def open(self, _, progress: StreamProgress):
            self.started, self.progress = now(), progress
            try:
                with anyio.CancelScope():
                    async with asyncio.timeout(FOREVER):
                        for number in range(5):
                            tasks.add(asyncio.current_task())
                            yield number
            finally:
                tasks.add(asyncio.current_task())
                left.append(1)

    await run(Task([], window=Duration(FOREVER)))
    await run(Task([], window=Duration(FOREVER), stop_at=0))
    await cancelled(Task([], window=Duration(FOREVER)))

    assert asyncio.current_task() not in tasks
    assert len(tasks) == len(left) == 3


@pytest.mark.virtual
async def test_timeout_of_a_source_does_not_hit_a_flush():
    """A timeout inside the source is the source's, also when a flush is in progress."""

    class Task(Numbers):
        async def open(self, _, progress: StreamProgress):
            self.started, self.progress = now(), progress
            yield 1
            with suppress(TimeoutError):
                async with asyncio.timeout(1.5):
                    await asyncio.sleep(FOREVER)
            yield 2

        async def flush_window(self, outputs):
            await asyncio.sleep(1)
            return await super().flush_window(outputs)

    task = Task([], window=Duration(1))

    assert await run(task) is S.DONE
    assert task.windows == [[1], [2]]


VARIABLE = contextvars.ContextVar("variable", default="unset")


@pytest.mark.parametrize(
    ("window", "seen"), [(Count(1), "source"), (Duration(FOREVER), "open")], ids=["count", "timed"]
)
async def test_context_variables(window, seen):
    """The source sees the variables that `open` set; what it sets itself stays in it where it has a task of its own."""
    got = []

    class Task(Numbers):
        async def open(self, cursor, progress: StreamProgress):
            VARIABLE.set("open")
            return self.source(cursor, progress)

        async def source(self, cursor, progress):
            got.append(VARIABLE.get())
            VARIABLE.set("source")
            async for item in super().open(cursor, progress):
                yield item
                assert VARIABLE.get() == "source"

        def process_item(self, item):
            got.append(VARIABLE.get())
            return item, item

    await run(Task([1], window=window))

    assert got == ["open", seen]


@pytest.mark.parametrize("window", [Count(3), Duration(0.05)], ids=["count", "timed"])
@pytest.mark.parametrize("is_cancelled", [False, True], ids=["left alone", "cancelled"])
async def test_streams_inside_a_fork(window, is_cancelled):
    """Streams may run in the branches' own states, each by itself; a cancel drains every one."""
    items = [(0.01, number) for number in range(9)] + [(FOREVER, 9)] * is_cancelled
    tasks = [Numbers(items, window=window) for _ in "ab"]
    join = JoinConfig(JoinStrategy.All, S.DONE)
    workflow = Workflow().register(S.START, lambda: TaskResult.Split(["a", "b"]), join=join).add_exit_state(S.DONE)
    for state, task in zip("ab", tasks, strict=True):
        workflow.register_stream(state, task)
    run = workflow.start(S.START)

    if is_cancelled:
        await asyncio.sleep(0.5)
        run.cancel()
        with pytest.raises(WorkflowCancelledError):
            await run
    else:
        await run

    for task in tasks:
        assert [number for outputs in task.windows for number in outputs] == list(range(9))
        assert task.log[-1] == ("cancelled" if is_cancelled else "exhausted")


# The end


@pytest.mark.parametrize(
    "items", [[1, 2, 3, 4, 5], [(0.1, 1), (0.2, 2), (0.3, 3), (FOREVER, 4)]], ids=["ready", "slow"]
)
@pytest.mark.parametrize("window", [Count(2), Count(3), Duration(0.5), Count(9)], ids=repr)
@pytest.mark.virtual
async def test_flush_that_stops(window, items):
    """Stop ends the stream with its state, its cursor committed, the source closed and no close hook."""
    task = Numbers(items[:3] if window == Count(9) else items, window=window, stop_at=3)

    end = await run(task)

    # STR-006: by count, by duration and at the end
    assert end is S.STOPPED
    assert 3 in task.windows[-1]
    assert task.progress.cursor == f"after {task.windows[-1][-1]}"
    assert "source closed" in task.log
    assert "exhausted" not in task.log


@pytest.mark.parametrize("window", [Count(2), Duration(FOREVER)], ids=["count", "timed"])
async def test_error_of_the_source(window):
    """What the source raises ends the stream: the open window is dropped, and there is no close hook."""
    error = Oops()

    class Task(Numbers):
        async def open(self, cursor, progress: StreamProgress):
            async for item in super().open(cursor, progress):
                yield item
            raise error

    task = Task([1, 2, 3], window=window)
    with pytest.raises(Oops) as caught:
        await run(task)

    assert caught.value is error
    assert task.windows == ([[1, 2]] if window == Count(2) else [])
    assert "exhausted" not in task.log


@pytest.mark.parametrize("window", [Count(2), Duration(0.05)], ids=["count", "timed"])
@pytest.mark.virtual
async def test_error_of_a_flush(window):
    """A flush that fails ends the stream: its window is not committed, the source is closed, there is no close hook."""

    class Task(Numbers):
        async def flush_window(self, outputs):
            if 4 in outputs:
                raise Oops
            return await super().flush_window(outputs)

    task = Task([(0.02, number) for number in range(1, 7)], window=window)
    with pytest.raises(Oops):
        await run(task)

    assert task.windows[-1][-1] < 4
    assert task.progress.cursor == f"after {task.windows[-1][-1]}"
    assert task.log[-1] == "source closed"


async def test_error_of_the_close_hook():
    """What `on_close` raises leaves the run as it is; what was flushed is flushed."""

    class Task(Numbers):
        async def on_close(self, _):
            raise Oops

    task = Task([1, 2])
    with pytest.raises(Oops):
        await run(task)

    assert task.windows == [[1], [2]]


@pytest.mark.parametrize("window", [Count(2), Duration(FOREVER)], ids=["count", "timed"])
@pytest.mark.parametrize(("fails", "leaves"), [({}, Worse), ({2: [Oops()]}, Worse)], ids=["alone", "after an error"])
async def test_error_in_closing_the_source(window, fails, leaves):
    """What a source raises while it is closed leaves the run, with the error before it as its context."""

    class Source:
        def __init__(self):
            self.left = [2, 1]

        def __aiter__(self):
            return self

        async def __anext__(self):
            if not self.left:
                raise StopAsyncIteration
            return self.left.pop()

        async def aclose(self):
            await asyncio.sleep(0)
            raise Worse

    class Task(Numbers):
        def open(self, _, progress: StreamProgress):
            self.started, self.progress = now(), progress
            return Source()

    task = Task([], window=window, fails=fails)
    with pytest.raises(leaves) as caught:
        await run(task)

    assert "exhausted" not in task.log
    assert isinstance(caught.value.__context__, Oops if fails else (StopAsyncIteration, type(None)))


PanicException = type("PanicException", (BaseException,), {"__module__": "pyo3_runtime"})


@pytest.mark.parametrize("method", ["open", "process_item", "flush_window", "on_close"])
@pytest.mark.parametrize("policy", [FailFast, Skip, Retry(5)], ids=repr)
async def test_panic_in_a_method(method, policy):
    """A panic in any method becomes a TaskExecutionError, whatever errors are got over; resources are torn down."""

    class Part(Resource):
        async def teardown(self):
            torn_down.append(1)

    class Task(Numbers):
        pass

    def panics(*_):
        raise PanicException("boom")

    torn_down = []
    setattr(Task, method, lambda self, given: panics())  # noqa: ARG005
    task = Task([1, 2], on_item_error=policy, window=Duration(FOREVER))
    with pytest.raises(TaskExecutionError, match="panic: boom"):
        await workflow_of(task, {"part": Part()}).orchestrate(S.START)

    # STR-027, PAN-006, PAN-007, B10
    assert torn_down == [1]


# Item errors


async def test_fail_fast():
    """The first failing item ends the stream; the open window is neither flushed nor committed."""
    task = Numbers([1, 2, 3, 4, 5], window=Count(2), fails={4: [Oops()]})

    with pytest.raises(Oops):
        await run(task)

    # STR-009
    assert task.windows == [[1, 2]]
    assert task.progress == StreamProgress("after 2", 3, 0, 1)
    assert task.log[-1] == "source closed"


async def test_skip(caplog):
    """A failing item is dropped, counted and logged; its cursor is never committed."""
    caplog.set_level(logging.WARNING, "cano")
    errors = {2: [Oops("two")], 5: [Oops("five")], 6: [AttributeError("six")]}
    task = Numbers(range(1, 7), window=Count(2), on_item_error=Skip, fails=errors)

    await run(task)

    # STR-010, B38
    assert task.windows == [[1, 3], [4]]
    assert task.progress == StreamProgress("after 4", 3, 3, 2)
    assert [record.getMessage() for record in caplog.records] == ["an item of task Numbers failed and is skipped"] * 3
    assert [str(record.exc_info[1]) for record in caplog.records] == ["two", "five", "six"]


async def test_skip_everything():
    """A stream all of whose items are skipped flushes and commits nothing, and ends well."""
    task = Numbers([1, 2, 3], on_item_error=Skip, fails={number: [Oops()] for number in (1, 2, 3)})

    assert await run(task) is S.DONE
    assert task.progress == StreamProgress(None, 0, 3, 0)


@pytest.mark.virtual
async def test_retry_is_of_the_same_item(caplog):
    """A failing item is tried again, after longer and longer pauses, and nothing is dropped."""
    caplog.set_level(logging.WARNING, "cano")
    task = Numbers([1, 2, 3], window=Count(9), on_item_error=Retry(2), fails={2: [Oops(), Oops()], 3: [Oops()]})
    began = now()

    await run(task)

    # STR-011, B38
    assert task.log[1:-3] == [1, 2, 2, 2, 3, 3]
    assert task.windows == [[1, 2, 3]]
    assert now() - began == pytest.approx(0.1 + 0.2 + 0.1, rel=0.1)
    assert len(caplog.records) == 3


@pytest.mark.virtual
@pytest.mark.parametrize("retries", [0, 2])
async def test_retries_that_do_not_suffice(retries):
    """The error after the last retry ends the stream as it is; no retries at all is to fail fast."""
    errors = [Oops(number) for number in range(retries + 1)]
    task = Numbers([1, 2], on_item_error=Retry(retries), fails={2: list(errors)})

    with pytest.raises(Oops) as caught:
        await run(task)

    # STR-011
    assert caught.value is errors[-1]
    assert Retry(0) == FailFast
    assert task.log.count(2) == retries + 1


@pytest.mark.virtual
async def test_retry_that_asks_for_its_delay():
    """RetryAfter sets the pause before the next try."""
    task = Numbers([1], on_item_error=Retry(1), fails={1: [RetryAfter(7)]})
    began = now()

    await run(task)

    assert now() - began == 7


@pytest.mark.parametrize(
    ("policy", "error"),
    [
        (Retry(5), TypeError()),
        (Retry(5), NonRetryable()),
        (Skip, NonRetryable()),
        (Skip, ResourceNotFoundError("x")),
        (Skip, ConfigurationError("x")),
    ],
    ids=repr,
)
async def test_errors_that_are_not_got_over(policy, error):
    """NonRetryable and mistakes in the definition end the stream; a programming error is not tried again."""
    task = Numbers([1], on_item_error=policy, fails={1: [error]})

    with pytest.raises(type(error)) as caught:
        await run(task)

    assert caught.value is error
    assert task.log.count(1) == 1


@pytest.mark.virtual
@pytest.mark.parametrize(
    ("policy", "log", "error"),
    [
        (FailFast, [1, 2], AttemptTimeoutError),
        (Skip, [1, 2, 3], None),
        (Retry(1), [1, 2, 2], AttemptTimeoutError),
    ],
    ids=repr,
)
async def test_attempt_timeout_bounds_one_item(policy, log, error):
    """The attempt timeout is each try's of each item; running out of it is an item error."""

    class Task(Numbers):
        async def process_item(self, item):
            result = await super().process_item(item)
            await asyncio.sleep(FOREVER if item == 2 else 0.9)
            return result

    task = Task([1, 2, 3], on_item_error=policy)
    config = TaskConfig(attempt_timeout=1)
    if error is None:
        await run(task, config=config)
        assert task.windows == [[1], [3]]
    else:
        with pytest.raises(error) as caught:
            await run(task, config=config)
        assert caught.value.limit == 1.0

    # STR-012
    assert [item for item in task.log if isinstance(item, int)] == log


@pytest.mark.virtual
@pytest.mark.parametrize("method", ["open", "flush_window", "on_close"])
async def test_attempt_timeout_bounds_every_call(method):
    """Opening, flushing and closing have the same limit; reading the source has none."""

    class Task(Numbers):
        pass

    async def hangs(*_):
        await asyncio.sleep(FOREVER)

    if method != "open":
        await run(Task([(60, 1)]), config=TaskConfig(attempt_timeout=1))  # the source alone may take its time
    setattr(Task, method, lambda self, given: hangs())  # noqa: ARG005
    with pytest.raises(AttemptTimeoutError) as caught:  # G12
        await run(Task([(60, 1)]), config=TaskConfig(attempt_timeout=1))

    assert str(caught.value).endswith("Task took longer than its attempt_timeout of 1.0 s")


@pytest.mark.virtual
async def test_own_timeout_error_is_an_item_error():
    """A TimeoutError of the user's own is no attempt timeout."""
    task = Numbers([1], fails={1: [TimeoutError("mine")]})

    with pytest.raises(TimeoutError, match="mine") as caught:
        await run(task, config=TaskConfig(attempt_timeout=5))

    assert not isinstance(caught.value, AttemptTimeoutError)


@pytest.mark.parametrize(
    ("config", "setting"),
    [
        (TaskConfig().with_fixed_retry(1, 0), "retry"),
        (TaskConfig().with_exponential_retry(), "retry"),
        (TaskConfig(retry_on=KeyError), "retry_on"),
    ],
)
@pytest.mark.parametrize("place", ["attribute", "registration"])
def test_settings_that_mean_nothing_to_a_stream(config, setting, place):
    """Of a configuration only the attempt timeout applies; anything else is refused, by its name."""
    # STR-013, STR-030, G12
    task = Numbers([1])
    if place == "attribute":
        task.config, config = config, None

    with pytest.raises(ConfigurationError, match=rf"config of stream Numbers must not set {setting},"):
        workflow_of(task, config=config)


# Cancellation


@pytest.mark.parametrize("window", [Count(10), Duration(FOREVER)], ids=["count", "timed"])
async def test_cancel_drains(window):
    """A cancel closes the source, flushes the open window once, commits its cursor, closes, and then goes on."""
    task = Numbers([1, 2, (FOREVER, 3)], window=window)

    error = await cancelled(task, after=0.02)

    # STR-014
    assert isinstance(error, WorkflowCancelledError)
    assert error.reason == "enough"
    assert task.log == ["open", 1, 2, "source closed", [1, 2], "cancelled"]
    assert task.progress == StreamProgress("after 2", 2, 0, 1)


@pytest.mark.parametrize("window", [Count(10), Duration(FOREVER)], ids=["count", "timed"])
async def test_cancel_of_an_empty_window(window):
    """Where nothing is open, nothing is flushed, and it still closes."""
    task = Numbers([(FOREVER, 1)], window=window)

    await cancelled(task)

    # STR-016
    assert task.log == ["open", "source closed", "cancelled"]


@pytest.mark.parametrize("window", [Count(10), Duration(FOREVER)], ids=["count", "timed"])
async def test_cancel_beats_an_item_that_is_ready(window):
    """A cancel is seen between two items, however many are ready."""

    class Task(Numbers):
        def process_item(self, item):
            if item == 3:
                handle.cancel()
            return super().process_item(item)

    task = Task(range(1, 100), window=window)
    handle = workflow_of(task).start(S.START)
    with pytest.raises(WorkflowCancelledError):
        await handle

    # STR-015, B62: what was finished is kept
    assert task.log == ["open", 1, 2, 3, "source closed", [1, 2, 3], "cancelled"]


async def test_items_that_are_ready_give_others_a_turn():
    """A source that never waits gives the event loop a turn at least once per 1,024 items, so that it can be cancelled."""

    class Endless(Numbers):
        async def open(self, _, progress: StreamProgress):
            self.started, self.progress = now(), progress
            while True:
                yield 1

        def process_item(self, item):
            return item, item

        def flush_window(self, _):
            return Continue

    task = Endless([])
    await cancelled(task, after=None)

    assert task.log == ["cancelled"]
    assert task.progress.outputs <= 10 * 1024


async def test_stop_and_state_of_a_drain_are_not_used():
    """What the flush and the close hook of a drain return is not used."""
    task = Numbers([1, (FOREVER, 2)], window=Count(10), stop_at=1)

    error = await cancelled(task)

    # STR-015
    assert isinstance(error, WorkflowCancelledError)
    assert task.log[-2:] == [[1], "cancelled"]
    assert task.progress.cursor == "after 1"


async def test_cancel_in_an_item():
    """An item that is interrupted is dropped; those before it are flushed."""

    class Task(Numbers):
        async def process_item(self, item):
            if item == 3:
                await asyncio.sleep(FOREVER)
            return await super().process_item(item)

    task = Task([1, 2, 3], window=Count(10), on_item_error=Skip)
    await cancelled(task)

    assert task.log == ["open", 1, 2, "source closed", [1, 2], "cancelled"]
    assert task.progress == StreamProgress("after 2", 2, 0, 1)


@pytest.mark.parametrize("policy", [FailFast, Skip, Retry(5)], ids=repr)
async def test_cancel_that_an_item_turns_into_an_error(policy):
    """What an item makes of a cancel leaves the run, after the drain, whatever errors are got over."""

    class Task(Numbers):
        async def process_item(self, item):
            if item == 2:
                try:
                    await asyncio.sleep(FOREVER)
                except asyncio.CancelledError as error:
                    raise Oops from error
            return await super().process_item(item)

    task = Task([1, 2], window=Count(10), on_item_error=policy)
    error = await cancelled(task)

    assert isinstance(error, Oops)
    assert task.log == ["open", 1, "source closed", [1], "cancelled"]


async def test_cancel_that_an_item_swallows():
    """A cancel that an item swallows is taken: the stream goes on, and later errors are judged as ever."""

    class Task(Numbers):
        async def process_item(self, item):
            if item == 1:
                with suppress(asyncio.CancelledError):
                    await asyncio.sleep(FOREVER)
            return await super().process_item(item)

    task = Task([1, 2, 3], on_item_error=Skip, fails={2: [Oops()]})
    handle = workflow_of(task).start(S.START)
    await ticks()
    handle.cancel()

    assert await handle is S.DONE
    assert task.windows == [[1], [3]]


async def test_cancel_in_a_pause_before_a_retry():
    """A cancel ends the pause at once; the item is dropped."""
    task = Numbers([1, 2], window=Count(10), on_item_error=Retry(5), fails={2: [RetryAfter(FOREVER)]})

    await cancelled(task)

    assert task.log == ["open", 1, 2, "source closed", [1], "cancelled"]


@pytest.mark.parametrize("window", [Count(2), Duration(0.01)], ids=["count", "timed"])
async def test_cancel_in_a_flush(window):
    """A window whose flush is interrupted is not flushed again nor committed; the stream still closes."""

    class Task(Numbers):
        async def flush_window(self, outputs):
            self.log.append(outputs)
            await asyncio.sleep(FOREVER)

    task = Task([1, 2, (FOREVER, 3)], window=window)
    error = await cancelled(task, after=0.1)

    assert isinstance(error, WorkflowCancelledError)
    assert task.log == ["open", 1, 2, [1, 2], "source closed", "cancelled"]
    assert task.progress == StreamProgress(None, 2, 0, 0)


async def test_cancel_in_the_last_flush():
    """A cancel in the flush after the end of the source closes as cancelled, once."""

    class Task(Numbers):
        async def flush_window(self, outputs):
            self.log.append(outputs)
            await asyncio.sleep(FOREVER)

    task = Task([1], window=Count(2))
    await cancelled(task)

    assert task.log == ["open", 1, "source closed", [1], "cancelled"]


async def test_cancel_in_the_close_hook():
    """A cancel in the close hook goes on at once: the hook is called once."""

    class Task(Numbers):
        async def on_close(self, reason):
            self.log.append(reason)
            await asyncio.sleep(FOREVER)

    task = Task([1])
    error = await cancelled(task)

    assert isinstance(error, WorkflowCancelledError)
    assert task.log[-1:] == ["exhausted"]


async def test_cancel_in_open():
    """A hanging `open` is cancelled like any task; there is nothing to close."""

    class Task(Numbers):
        async def open(self, _):
            await asyncio.sleep(FOREVER)

    task = Task([1])
    error = await cancelled(task)

    # STR-023
    assert isinstance(error, WorkflowCancelledError)
    assert task.log == []


@pytest.mark.parametrize("window", [Count(10), Duration(FOREVER)], ids=["count", "timed"])
async def test_source_that_cleans_up_is_waited_for(window):
    """The source gets the cancel with its message where it waits, and is over before the window is flushed."""

    class Task(Numbers):
        async def open(self, _, progress: StreamProgress):
            self.started, self.progress = now(), progress
            yield 1
            try:
                await asyncio.sleep(FOREVER)
            except asyncio.CancelledError as error:
                await ticks(20)
                self.log.append(error.args)
                raise

    task = Task([], window=window)
    await cancelled(task, after=0.02)

    assert task.log == [1, ("enough",), [1], "cancelled"]


@pytest.mark.parametrize("window", [Count(10), Duration(FOREVER)], ids=["count", "timed"])
async def test_source_that_makes_an_error_of_the_cancel(window):
    """What the source makes of a cancel leaves the run, after the drain."""

    class Task(Numbers):
        async def open(self, _, progress: StreamProgress):
            self.started, self.progress = now(), progress
            yield 1
            try:
                await asyncio.sleep(FOREVER)
            except asyncio.CancelledError as error:
                raise Oops from error

    task = Task([], window=window)
    error = await cancelled(task, after=0.02)

    assert isinstance(error, Oops)
    assert task.log == [1, [1], "cancelled"]


async def test_timed_source_that_swallows_the_cancel():
    """A source with a task of its own cannot take the cancel: what it yields then is dropped, and it is closed."""

    class Task(Numbers):
        async def open(self, _, progress: StreamProgress):
            self.started, self.progress = now(), progress
            yield 1
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(FOREVER)
            try:
                yield 2
            finally:
                self.log.append("source closed")

    task = Task([], window=Duration(FOREVER))
    await cancelled(task, after=0.02)

    assert task.log == [1, "source closed", [1], "cancelled"]


@pytest.mark.parametrize(
    ("fails", "log", "leaves", "context"),
    [
        pytest.param(["on_close"], [[1]], "on_close", asyncio.CancelledError, id="close"),  # STR-017
        pytest.param(["flush_window"], ["cancelled"], "flush_window", asyncio.CancelledError, id="flush"),  # STR-018
        pytest.param(["flush_window", "on_close"], [], "on_close", Oops, id="both"),
    ],
)
async def test_errors_in_a_drain(fails, log, leaves, context):
    """What the drain raises leaves in place of the cancel, which is its context; each part of it is done all the same."""
    task = Numbers([1, (FOREVER, 2)], window=Count(10))

    for method in fails:

        async def raises(_, method=method):
            raise Oops(method)

        setattr(task, method, raises)
    error = await cancelled(task)

    assert error.args == (leaves,)
    assert isinstance(error.__context__, context)
    assert task.log == ["open", 1, "source closed", *log]
    assert task.progress.cursor == (None if "flush_window" in fails else "after 1")


@pytest.mark.parametrize("method", ["flush_window", "on_close"])
async def test_second_cancel_hits_what_the_drain_waits_for(method):
    """A second cancel interrupts the flush or the hook in progress; what follows is still done, the newest cancel leaves."""

    class Task(Numbers):
        async def flush_window(self, outputs):
            await self.wait("flush_window")
            return await super().flush_window(outputs)

        async def on_close(self, reason):
            self.log.append(reason)
            await self.wait("on_close")

        async def wait(self, where):
            if where == method:
                await asyncio.sleep(FOREVER)

    task = Task([1, (FOREVER, 2)], window=Count(10))
    host = asyncio.create_task(run(task))
    await ticks()
    host.cancel("first")
    await ticks()
    host.cancel("second")
    with pytest.raises(asyncio.CancelledError) as caught:
        await host

    assert caught.value.args == ("second",)
    assert task.log[-1] == "cancelled"
    assert task.progress.windows == (0 if method == "flush_window" else 1)


@pytest.mark.virtual
@pytest.mark.parametrize("window", [Count(10), Duration(FOREVER)], ids=["count", "timed"])
async def test_run_timeout_drains(window):
    """The end of the run's budget drains like a cancel, and is told as what it is."""
    task = Numbers([1, 2, (FOREVER, 3)], window=window)

    with pytest.raises(WorkflowTimeoutError) as caught:
        await workflow_of(task).with_timeout(5).orchestrate(S.START)

    # STR-022, TT-013
    assert caught.value.elapsed == 5
    assert task.log == ["open", 1, 2, "source closed", [1, 2], "cancelled"]
    assert task.progress.cursor == "after 2"


@pytest.mark.virtual
async def test_drain_is_bounded_by_the_attempt_timeout():
    """Where there is an attempt timeout, a flush and a hook that hang in a drain have it too."""

    class Task(Numbers):
        async def flush_window(self, _):
            await asyncio.sleep(FOREVER)

        async def on_close(self, reason):
            self.log.append(reason)
            await asyncio.sleep(FOREVER)

    task = Task([1, (FOREVER, 2)], window=Count(10))
    began = now()
    error = await cancelled(task, after=1, config=TaskConfig(attempt_timeout=10))

    assert isinstance(error, AttemptTimeoutError)
    assert isinstance(error.__context__, AttemptTimeoutError) or error.__cause__ is not None
    assert now() - began == 21
    assert task.log[-1] == "cancelled"


@pytest.mark.virtual
async def test_cancel_pending_when_a_limit_begins():
    """A cancel that is pending when an item begins is not taken for the item's timeout."""

    class Task(Numbers):
        def process_item(self, item):
            handle.cancel()
            return self.later(item)

        async def later(self, item):
            try:
                await asyncio.sleep(FOREVER)
            finally:
                await asyncio.sleep(60)
            return item, item

    task = Task([1])
    handle = workflow_of(task, config=TaskConfig(attempt_timeout=1)).start(S.START)
    with pytest.raises(WorkflowCancelledError):
        await handle


async def test_own_cancelled_error_is_a_failure():
    """A WorkflowCancelledError that an item raises is an error like any other: nothing was cancelled."""
    task = Numbers([1, 2], window=Count(10), fails={2: [WorkflowCancelledError("mine")]})

    with pytest.raises(WorkflowCancelledError, match="mine"):
        await run(task)

    # STR-031
    assert task.log[-1] == "source closed"


def left_suspended(coroutine):
    """Step a coroutine until it waits for something that does not come."""

    async def steps():
        while True:
            future = coroutine.send(None)
            if future is None:
                await asyncio.sleep(0)
            else:
                future._asyncio_future_blocking = False
                await asyncio.wait([future])

    return steps()


@pytest.mark.parametrize("where", ["source", "item"])
def test_run_that_is_closed_waits_for_nothing(where):
    """A run whose coroutine is closed lets go of its source without waiting for it."""

    class Task(Numbers):
        async def process_item(self, item):
            if where == "item" and item == 1:
                await asyncio.sleep(FOREVER)
            return await super().process_item(item)

    async def main():
        task = Task([1, (FOREVER, 2)], window=Duration(FOREVER))
        coroutine = run(task)
        host = asyncio.create_task(left_suspended(coroutine))
        await asyncio.sleep(0.01)
        host.cancel()
        await asyncio.wait([host])

        coroutine.close()

        await ticks()
        assert task.log[-1] == "source closed"
        assert "cancelled" not in task.log
        testing.assert_no_orphans()

    testing.run(main())


# What the methods return


@pytest.mark.parametrize(
    ("method", "result", "text"),
    [
        ("open", [1, 2], "open of task Numbers returned a value of type list; it returns an async iterator"),
        ("open", None, "open of task Numbers returned a value of type NoneType; it returns an async iterator"),
        (
            "process_item",
            5,
            "process_item of task Numbers returned a value of type int; it returns a pair (output, cursor)",
        ),
        ("process_item", (1, 2, 3), "process_item of task Numbers returned a value of type tuple; it returns a pair"),
        (
            "flush_window",
            None,
            "flush_window of task Numbers returned a value of type NoneType; it returns Continue or",
        ),
        ("flush_window", S.DONE, "flush_window of task Numbers returned a value of type S; it returns Continue or"),
        ("on_close", None, "returned a value of type NoneType"),
    ],
)
@pytest.mark.parametrize("policy", [FailFast, Skip, Retry(3)], ids=repr)
async def test_method_that_returns_something_else(method, result, text, policy):
    """What a method may not return is refused, naming method, task and type, whatever errors are got over."""
    task = Numbers([1], on_item_error=policy)
    setattr(task, method, lambda _: result)

    with pytest.raises(InvalidTransitionError) as caught:
        await run(task)

    assert text in str(caught.value)


@pytest.mark.parametrize("method", ["flush_window", "on_close"])
async def test_stream_cannot_split(method):
    """A split out of a stream is refused, with the reason."""
    task = Numbers([1])
    split = TaskResult.Split([S.DONE])
    setattr(task, method, lambda _: Stop(split) if method == "flush_window" else split)

    with pytest.raises(WorkflowError, match="a stream cannot split"):
        await run(task)  # STR-024


async def test_single_results():
    """Stop and `on_close` may hold a TaskResult.Single."""
    task = Numbers([1])
    task.flush_window = lambda _: Stop(TaskResult.Single(S.STOPPED))

    assert await run(task) is S.STOPPED


def test_continue_is_not_called():
    """Continue is returned as it is."""
    with pytest.raises(ConfigurationError, match="without a call"):
        Continue()


@pytest.mark.parametrize(
    ("flush", "close", "problems"),
    [
        (type[Continue] | Stop[Literal["a"]], Literal["b"], ["a", "b"]),
        (Continue, Literal["b"], ["b"]),
        (type[Continue], Literal["b"], ["b"]),
        (Stop[Literal["a"]], str, []),
        (Stop[str], Literal["b"], []),
        (None, Literal["b"], []),
    ],
)
def test_annotations_of_a_stream(flush, close, problems):
    """States are known to `validate()` where both methods that lead to one declare theirs."""

    class Task(Numbers):
        def flush_window(self, _outputs):
            raise NotImplementedError

        def on_close(self, _reason):
            raise NotImplementedError

    if flush is not None:
        Task.flush_window.__annotations__["return"] = flush
    Task.on_close.__annotations__["return"] = close
    workflow = Workflow().register_stream("start", Task([])).add_exit_state("done")

    if problems:
        with pytest.raises(ConfigurationError) as caught:
            workflow.validate()
        missing = [f"state start leads to {state}, which is neither registered nor an exit state" for state in problems]
        assert set(missing) <= set(caught.value.problems)
    else:
        workflow.validate()


# Definitions


@pytest.mark.parametrize(
    ("attribute", "value", "type_name"),
    [
        ("window", 5, "StreamWindow"),
        ("window", None, "StreamWindow"),
        ("window", StreamWindow, "StreamWindow"),
        ("on_item_error", "Skip", "ItemErrorPolicy"),
        ("on_item_error", ItemErrorPolicy, "ItemErrorPolicy"),
    ],
)
def test_attribute_of_another_type(attribute, value, type_name):
    """An attribute of another type is refused by its name."""
    task = Numbers([])
    setattr(task, attribute, value)

    with pytest.raises(ConfigurationError, match=f"{attribute} of task Numbers must be of type {type_name}"):
        workflow_of(task)


@pytest.mark.parametrize("make", [lambda: Count(0), lambda: Duration(0)], ids=["count", "duration"])
def test_windows_that_hold_nothing(make):
    """A window of no outputs or of no time is refused."""
    with pytest.raises(ConfigurationError, match=r"must be (at least 1|above 0)"):  # STR-003
        make()


@pytest.mark.virtual
async def test_narrow_windows_do_not_starve_the_source():
    """However narrow windows are, the source gets its turn."""
    task = Numbers([(0.001, number) for number in range(50)], window=Duration(1e-9))

    await run(task)

    assert task.windows == [[number] for number in range(50)]  # STR-003


def test_generator_functions():
    """Of the methods only `open` may be a generator function, and only an async one."""

    def generator(_):
        yield

    for method in ("open", "process_item"):
        task = Numbers([])
        setattr(task, method, generator)
        with pytest.raises(ConfigurationError, match=rf"task Numbers.{method} is a generator function"):
            workflow_of(task)


def test_progress_is_the_streams_own():
    """A StreamProgress is only a stream's to ask for."""

    def task(progress: StreamProgress):
        return progress

    with pytest.raises(ConfigurationError, match=r"parameter progress of task .* is annotated"):
        Workflow().register(S.START, task)


@pytest.mark.parametrize("value", [Count(3), Duration(0.5), FailFast, Skip, Retry(3), Stop(S.DONE)], ids=repr)
def test_values_are_values(value):
    """Windows and policies compare by value, are copied and pickled, and show how they are made."""
    assert pickle.loads(pickle.dumps(value)) == copy.copy(value) == value  # noqa: S301 - just made
    assert hash(copy.deepcopy(value)) == hash(value)
    assert value != object()
    shown = repr(value)
    assert shown in (repr(Stop(S.DONE)), "StreamWindow.Count(3)", "StreamWindow.Duration(0.5)") or eval(shown) == value  # noqa: S307


async def test_nothing_of_a_stream_stays_alive():
    """When a run is over, its outputs and items are let go."""

    class Item:
        pass

    alive = weakref.WeakSet()

    class Task(Numbers):
        async def open(self, _, progress: StreamProgress):
            self.started, self.progress = now(), progress
            for _ in range(3):
                item = Item()
                alive.add(item)
                yield item

        def process_item(self, item):
            return item, None

        def flush_window(self, outputs):
            assert len(outputs) == 3
            return Continue

    for window in (Count(3), Duration(FOREVER)):
        await run(Task([], window=window))
        gc.collect()
        assert len(alive) == 0
