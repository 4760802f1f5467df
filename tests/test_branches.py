"""Branches as tasks: every risk that a task made by hand has, looked for one by one.

`tests/test_split.py` says what a split does; this file says that a branch cannot be told from a task of asyncio by the code
that runs in it, around it or beside it. The tests hold in compatibility mode as well, where nothing else is said: those that
take the fixture `native` look at what only native branches do.
"""

import asyncio
import contextlib
import contextvars
import gc
import inspect
import io
import os
import subprocess
import sys
import textwrap
import threading
import time
import tracemalloc
import types
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterator
from typing import Any

import anyio.lowlevel
import pytest

import cano
import cano.testing
from cano import JoinConfig, JoinError, JoinStrategy, SplitResult, Task, TaskConfig, Workflow, WorkflowCancelledError

ALL, ANY = JoinStrategy.All, JoinStrategy.Any
STEP = 0.01
FOREVER = 3600.0

variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")


class Oops(Exception):
    """What a branch raises."""


class Tracked:
    """Something whose end can be seen."""


def into(*branches: Any, strategy: JoinStrategy = ALL, joined: Any = None, **options: Any) -> Workflow[str]:
    """A workflow of one split."""
    return (
        Workflow[str]()
        .register_split("split", branches, JoinConfig(strategy, "joined", **options))
        .register("joined", joined or (lambda: "end"))
        .add_exit_state("end")
    )


async def join(*branches: Any, strategy: JoinStrategy = ALL, **options: Any) -> SplitResult:
    """Run a split that succeeds, and give what its joined state got."""
    results: list[SplitResult] = []

    def joined(result: SplitResult) -> str:
        results.append(result)
        return "end"

    await into(*branches, strategy=strategy, joined=joined, **options).orchestrate("split")
    return results[0]


async def join_error(*branches: Any, strategy: JoinStrategy = ALL, **options: Any) -> JoinError:
    """Run a split that fails, and give its error."""
    with pytest.raises(JoinError) as caught:
        await join(*branches, strategy=strategy, **options)
    return caught.value


def me() -> asyncio.Task[Any]:
    """The current task."""
    task = asyncio.current_task()
    assert task is not None
    return task


async def forever() -> None:
    await asyncio.get_running_loop().create_future()


async def ticks(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


def is_native(task: object) -> bool:
    return type(task).__name__ == "Branch"


@pytest.fixture
def native(request: pytest.FixtureRequest) -> None:
    """For what only native branches do: skipped where compatibility mode is asked for."""
    if request.config.getoption("--loop") == "debug" or request.config.getoption("--branches") == "asyncio":
        pytest.skip("needs native branches")


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def in_process(code: str, *, timeout: float = 15) -> subprocess.CompletedProcess[str]:
    """Run a script in an interpreter of its own, which may crash."""
    # asyncio's debug mode would ask for compatibility mode there.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONASYNCIODEBUG"}
    return subprocess.run(  # noqa: S603 - our own text
        [sys.executable, "-X", "faulthandler", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=env,
        check=False,
    )


PRELUDE = """
import asyncio, gc, sys
from cano import JoinConfig, JoinStrategy, SplitResult, Workflow, JoinError
def into(*branches, strategy=JoinStrategy.All, **options):
    return (Workflow[str]().register_split("split", branches, JoinConfig(strategy, "end", **options)).add_exit_state("end"))
"""


# --- identity --------------------------------------------------------------------------------------------------------


async def waits_for_nothing() -> None:
    pass


async def waits_for_a_turn() -> None:
    await asyncio.sleep(0)


async def waits_for_a_timer() -> None:
    await asyncio.sleep(STEP)


async def waits_for_a_future() -> None:
    future = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().call_soon(future.set_result, None)
    await future


async def waits_for_a_task() -> None:
    await asyncio.create_task(asyncio.sleep(0))


async def waits_for_a_thread() -> None:
    await asyncio.get_running_loop().run_in_executor(None, time.sleep, 0)


@pytest.mark.parametrize(
    "wait", [waits_for_nothing, waits_for_a_turn, waits_for_a_timer, waits_for_a_future, waits_for_a_task]
)
@pytest.mark.parametrize("bulkhead", [None, 2])
async def test_identity(wait: Callable[[], Awaitable[None]], bulkhead: int | None) -> None:
    """A branch is one task from its first step to its last, another one than its siblings and its parent."""
    seen: list[list[asyncio.Task[Any]]] = []

    async def run() -> None:
        own = [me()]
        for _ in range(3):
            await wait()
            own.append(me())
        seen.append(own)

    parent = me()
    await join(*[run] * 5, bulkhead=bulkhead)

    assert all(len(set(own)) == 1 for own in seen)
    assert len({own[0] for own in seen} | {parent}) == 6
    assert all(isinstance(own[0], asyncio.Task) for own in seen)


@pytest.mark.usefixtures("native")
async def test_branch_is_native() -> None:
    """The tests of this file do look at native branches."""
    kinds: list[bool] = []

    async def run() -> None:
        kinds.append(is_native(me()))

    class Retried(Task[str]):
        config = TaskConfig().with_fixed_retry(1, 0)

        async def run(self) -> None:
            kinds.append(is_native(me()))

    await join(run, Retried(), waits_for_nothing)

    assert kinds == [True, True]


@pytest.mark.parametrize("ends", ["returns", "raises", "cancels itself", "suspends and raises"])
async def test_parent_is_restored(ends: str) -> None:
    """After a split, whatever its branches did, the current task is the one from before."""
    seen: list[asyncio.Task[Any]] = []

    async def run() -> None:
        if ends.startswith("suspends"):
            await asyncio.sleep(0)
        if "raises" in ends:
            raise Oops
        if ends == "cancels itself":
            raise asyncio.CancelledError

    async def machine() -> None:
        with contextlib.suppress(JoinError):
            await join(run, run)
        seen.append(me())

    parent = me()
    await machine()
    await join(machine, machine)

    assert seen[0] is parent
    assert len(set(seen)) == 3
    assert me() is parent


async def test_parent_is_restored_after_nested_splits() -> None:
    """Three levels of splits: each level finds its own task again."""
    checks: list[bool] = []

    def level(depth: int) -> Callable[[], Coroutine[Any, Any, None]]:
        async def run() -> None:
            own = me()
            if depth:
                await join(level(depth - 1), waits_for_a_turn, level(depth - 1))
            else:
                await asyncio.sleep(0)
            checks.append(me() is own)

        return run

    await join(level(3), level(3))

    assert checks == [True] * 30


async def test_callables_are_called_where_a_task_is() -> None:
    """A plain function that makes a branch's coroutine runs inside a task, at once or late."""
    seen: list[object] = []

    def makes() -> Coroutine[Any, Any, None]:
        seen.append(asyncio.current_task())
        return waits_for_a_turn()

    await join(*[makes] * 3, bulkhead=1)

    assert None not in seen


# --- the surface of a task -------------------------------------------------------------------------------------------


async def finished(run: Callable[[], Awaitable[object]]) -> asyncio.Task[Any]:
    """The task of a branch that has ended."""
    tasks: list[asyncio.Task[Any]] = []

    async def keeps() -> object:
        tasks.append(me())
        return await run()

    with contextlib.suppress(JoinError):
        await join(keeps)
    return tasks[0]


async def returns() -> str:
    await asyncio.sleep(0)
    return "value"


async def raises() -> None:
    await asyncio.sleep(0)
    raise Oops("raised")


async def cancels() -> None:
    me().cancel("why")
    await asyncio.sleep(0)


@pytest.mark.usefixtures("native")
async def test_nothing_of_the_base_is_reached() -> None:
    """Every method and attribute of asyncio.Task is overridden, since the base of a branch is never initialised."""
    task = await finished(returns)
    harmless = {"__class_getitem__", "__del__", "__init__", "__new__", "__getattribute__", "__doc__", "__module__"}
    harmless |= {"__dict__", "__weakref__", "__dictoffset__", "__weakrefoffset__", "__weaklistoffset__"}

    inherited = {name for base in (asyncio.Task, asyncio.Future) for name in vars(base)}

    assert inherited - set(vars(type(task))) - harmless == set()


def test_an_unknown_task_type_falls_back_to_asyncio_tasks() -> None:
    """Where a task is not laid out as expected, splits warn once and run asyncio's tasks."""
    done = in_process(
        PRELUDE
        + textwrap.dedent("""
        asyncio.tasks.Task = asyncio.tasks._PyTask
        kinds = []
        async def run():
            kinds.append(type(asyncio.current_task()) is asyncio.Task)
        for _ in range(2):
            asyncio.run(into(run, run).orchestrate("split"))
        print(kinds)
        """)
    )

    assert done.returncode == 0, done.stderr[-1500:]
    assert done.stdout.splitlines()[-1] == "[True, True, True, True]"
    assert done.stderr.count("native branches are not available here") == 1


@pytest.mark.parametrize("kind", ["Task", "Future"])
def test_methods_of_the_base_do_not_crash(kind: str) -> None:
    """The base's own methods, called past a branch's, may answer nonsense or raise; the process lives."""
    done = in_process(
        PRELUDE
        + textwrap.dedent(f"""
        async def run():
            task = asyncio.current_task()
            for name, method in vars(asyncio.{kind}).items():
                if name in ("__new__", "__init__", "__getattribute__", "__class_getitem__"):
                    continue
                for arguments in ((), (1,), (print,)):
                    try:
                        method(task, *arguments) if callable(method) else method.__get__(task)
                    except BaseException:
                        pass
            gc.collect()
        async def main():
            try:
                await into(run, run).orchestrate("split")
            except BaseException:
                pass
            gc.collect()
        asyncio.run(main())
        print("alive")
        """)
    )

    assert done.returncode == 0, done.stderr[-1500:]
    assert done.stdout.splitlines()[-1] == "alive"


@pytest.mark.usefixtures("native")
async def test_branches_are_made_by_splits_alone() -> None:
    """Nobody can make, derive from or copy a branch."""
    kind = type(await finished(returns))

    coroutine = returns()
    with pytest.raises(TypeError):
        kind(coroutine)  # type: ignore[call-arg]
    coroutine.close()
    with pytest.raises(TypeError):
        type("Derived", (kind,), {})
    gc.collect()


async def test_surface_of_a_suspended_branch() -> None:
    """A branch that waits answers like a task that waits."""
    go = asyncio.get_running_loop().create_future()
    tasks: list[asyncio.Task[Any]] = []
    loop = asyncio.get_running_loop()

    async def waits() -> str:
        tasks.append(me())
        await go
        return "value"

    async def looks() -> None:
        (task,) = tasks
        assert asyncio.isfuture(task)
        assert inspect.isawaitable(task)
        assert asyncio.ensure_future(task) is task
        assert (task.done(), task.cancelled(), task.cancelling()) == (False, False, 0)
        assert task.get_loop() is loop
        assert task._loop is loop  # type: ignore[attr-defined]
        assert task._state == "PENDING"  # type: ignore[attr-defined]
        assert task._fut_waiter is go  # type: ignore[attr-defined]
        assert task._must_cancel is False  # type: ignore[attr-defined]
        assert task._asyncio_future_blocking is False  # type: ignore[attr-defined]
        assert inspect.getcoroutinestate(task.get_coro()) == inspect.CORO_SUSPENDED  # type: ignore[arg-type]
        for unset in (task.result, task.exception):
            with pytest.raises(asyncio.InvalidStateError):
                unset()
        for refused in (task.set_result, task.set_exception):
            with pytest.raises(RuntimeError, match="does not support"):
                refused(Oops())  # type: ignore[arg-type]
        with pytest.raises(TypeError):
            task.add_done_callback()  # type: ignore[call-arg]
        assert hash(task) == hash(task)
        assert task in {task: 1}
        assert task != me()
        assert weakref.ref(task)() is task
        assert "waits" in repr(task)
        go.set_result(None)

    await join(waits, looks)


@pytest.mark.parametrize("ends", [returns, raises, cancels])
async def test_surface_after_the_end(ends: Callable[[], Awaitable[object]]) -> None:
    """A branch that has ended answers like a task that has ended, and so does it after its loop."""
    seen: list[tuple[Any, ...]] = []
    loop = asyncio.get_running_loop()
    names: list[str] = []

    async def run() -> object:
        names.append(me().get_name())
        return await ends()

    task = await finished(run)
    twin = loop.create_task(ends())  # type: ignore[arg-type]
    await asyncio.wait([twin])

    def answers(of: asyncio.Task[Any]) -> tuple[Any, ...]:
        def outcome(call: Callable[[], object]) -> object:
            try:
                value = call()
            except BaseException as error:  # a CancelledError is an answer as well
                value = error
            if isinstance(value, asyncio.CancelledError):
                return asyncio.CancelledError  # which of the two calls gets the message differs between versions
            return (type(value), value.args) if isinstance(value, BaseException) else value

        return (
            of.done(),
            of.cancelled(),
            of.cancelling(),
            of.cancel("late"),
            of.cancelling(),
            outcome(of.result),
            outcome(of.exception),
            of._state,  # type: ignore[attr-defined]
            of._fut_waiter,  # type: ignore[attr-defined]
            bool(of.get_stack()),
            of.remove_done_callback(print),
        )

    seen += [answers(task), answers(twin)]
    from_thread: list[object] = []
    thread = threading.Thread(target=lambda: from_thread.extend([task.get_loop(), task.get_name()]))
    thread.start()
    thread.join()

    assert seen[0] == seen[1]
    assert from_thread == [loop, names[0]]


@pytest.mark.parametrize("way", ["await", "shield", "gather", "wait", "wait_for", "as_completed", "add_done_callback"])
@pytest.mark.parametrize("ends", [returns, raises, cancels])
@pytest.mark.parametrize("when", ["before", "after"])
async def test_waiting_for_a_branch(  # noqa: C901 - one case for each way
    way: str, ends: Callable[[], Awaitable[object]], when: str
) -> None:
    """Another task may wait for a branch in every way that asyncio has, before and after its end, and gets what it gave."""
    tasks: list[asyncio.Task[Any]] = []
    expected = {returns: "value", raises: Oops, cancels: asyncio.CancelledError}[ends]

    async def runs() -> object:
        tasks.append(me())
        await asyncio.sleep(0)
        return await ends()

    async def wait() -> object:  # noqa: PLR0911 - one for each way
        (task,) = tasks
        try:
            match way:
                case "await":
                    return await task
                case "shield":
                    return await asyncio.shield(task)
                case "gather":
                    return (await asyncio.gather(task))[0]
                case "wait":
                    await asyncio.wait([task])
                    return task.result()
                case "wait_for":
                    return await asyncio.wait_for(task, FOREVER)
                case "as_completed":
                    return await next(iter(asyncio.as_completed([task])))
                case _:
                    called: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
                    task.add_done_callback(called.set_result)
                    assert await called is task
                    return task.result()
        except BaseException as error:
            return type(error)

    async def beside() -> object:
        await ticks(1)
        return await wait()

    outside = asyncio.create_task(beside())
    with contextlib.suppress(JoinError):
        await join(runs, waits_for_a_timer)
    gotten = await (outside if when == "before" else wait())
    await outside

    assert gotten == expected


async def test_branch_is_cancelled_through_who_awaits_it() -> None:
    """A task that awaits a branch and is cancelled cancels the branch, with its message."""
    tasks: list[asyncio.Task[Any]] = []
    seen: list[object] = []

    async def runs() -> None:
        tasks.append(me())
        try:
            await forever()
        except asyncio.CancelledError as error:
            seen.append(error.args)
            raise

    async def beside() -> None:
        await ticks(2)
        await tasks[0]

    outside = asyncio.create_task(beside())
    asyncio.get_running_loop().call_later(STEP, outside.cancel, "through")
    error = await join_error(runs)
    await asyncio.wait([outside])

    assert seen == [("through",)]
    assert error.result is not None
    assert error.result.cancelled == [0]
    assert outside.cancelled()


async def test_own_fields() -> None:
    """Attributes can be put on a branch, and methods replaced, as some task scopes do; they die with it."""
    died: list[weakref.ref[Any]] = []
    cancelled: list[object] = []

    async def run() -> None:
        task = me()
        task.mine = Tracked()  # type: ignore[attr-defined]
        died.append(weakref.ref(task.mine))  # type: ignore[attr-defined]
        died.append(weakref.ref(task))
        original = task.cancel

        def cancel(*arguments: Any) -> bool:
            cancelled.append(arguments)
            return original(*arguments)

        task.cancel = cancel  # type: ignore[method-assign]
        me().cancel("mine")
        del task.cancel
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(0)
        await asyncio.sleep(0)

    await join(run)
    await asyncio.sleep(0)
    gc.collect()

    assert cancelled == [("mine",)]
    assert [one() for one in died] == [None, None]


@pytest.mark.usefixtures("no_collector", "native")
async def test_own_fields_are_freed_by_reference_counts() -> None:
    """What somebody put on a branch, and a weak reference to it, go with the branch, without the collector."""
    died: list[weakref.ref[Any]] = []
    called: list[bool] = []

    async def run() -> None:
        task = me()
        task.mine = Tracked()  # type: ignore[attr-defined]
        died.append(weakref.ref(task.mine))  # type: ignore[attr-defined]
        died.append(weakref.ref(task, lambda _: called.append(True)))
        del task
        await asyncio.sleep(0)

    await into(run).orchestrate("split")
    await asyncio.sleep(0)

    assert [one() for one in died] == [None, None]
    assert called == [True]


async def test_names() -> None:
    """A branch is named after its split's task and index, may be renamed, and keeps its name."""
    names: list[str] = []

    async def run() -> asyncio.Task[Any]:
        names.append(me().get_name())
        me().set_name(f"mine {len(names)}")
        await asyncio.sleep(0)
        names.append(me().get_name())
        me().set_name(7)
        return me()

    result = await join(run)

    assert names[1:] == ["mine 1"]
    assert [task.get_name() for task in result.values()] == ["7"]
    assert "name='7'" in repr(result.values()[0])


async def test_stack_of_a_branch() -> None:
    """The stack of a suspended branch is that of its coroutine, and print_stack prints it."""
    tasks: list[asyncio.Task[Any]] = []

    async def waits_deep_down() -> None:
        tasks.append(me())
        await forever()

    async def looks() -> None:
        frames = tasks[0].get_stack()
        assert frames
        assert "waits_deep_down" in {frame.f_code.co_name for frame in frames}
        out = io.StringIO()
        tasks[0].print_stack(file=out)
        assert "waits_deep_down" in out.getvalue()
        assert len(tasks[0].get_stack(limit=1)) == 1
        tasks[0].print_stack(limit=1, file=io.StringIO())
        tasks[0].cancel()

    await join_error(waits_deep_down, looks)


async def test_context_of_a_branch() -> None:
    """get_context (3.12) is the context that the branch runs in, a copy of the parent's of its own."""
    seen: list[object] = []

    async def run() -> None:
        variable.set("of the branch")
        await asyncio.sleep(0)
        if sys.version_info >= (3, 12):
            seen.append(me().get_context().get(variable))
        seen.append(variable.get())

    variable.set("of the parent")
    await join(run, run)

    assert set(seen) == {"of the branch"}
    assert variable.get() == "of the parent"


@pytest.mark.parametrize("bulkhead", [None, 1])
async def test_context_of_late_starts(bulkhead: int | None) -> None:
    """A branch that a bulkhead starts late runs in a copy of the parent's context, not of the one that made room."""
    seen: list[str] = []

    async def run() -> None:
        seen.append(variable.get())
        variable.set("of a branch")
        await asyncio.sleep(0)
        assert variable.get() == "of a branch"

    def plain() -> Coroutine[Any, Any, None]:
        seen.append(variable.get())
        return run()

    variable.set("of the parent")
    await join(run, plain, run, plain, run, bulkhead=bulkhead)

    assert seen == ["of the parent"] * 7


async def test_done_callbacks() -> None:
    """Done-callbacks are called by the loop, in order, in the context that they were given or added in."""
    called: list[object] = []
    other = contextvars.copy_context()
    other.run(variable.set, "given")
    tasks: list[asyncio.Task[Any]] = []

    async def run() -> None:
        tasks.append(me())
        variable.set("of the branch")
        me().add_done_callback(lambda task: called.append((1, task is tasks[0], variable.get(), task.done())))
        me().add_done_callback(lambda _: called.append((2, variable.get())), context=other)
        me().add_done_callback(called.append)
        me().add_done_callback(called.append)
        assert me().remove_done_callback(called.append) == 2
        assert me().remove_done_callback(called.append) == 0
        assert called == []

    await join(run)
    await asyncio.sleep(0)

    assert called == [(1, True, "of the branch", True), (2, "given")]


async def test_done_callback_compares_badly() -> None:
    """A callback whose comparison raises or changes the callbacks disturbs nothing."""
    called: list[str] = []

    class Hostile:
        def __eq__(self, other: object) -> bool:
            me().add_done_callback(lambda _: called.append("added meanwhile"))
            raise Oops

        __hash__ = None  # type: ignore[assignment]

        def __call__(self, _: object) -> None:
            called.append("hostile")

    async def run() -> None:
        me().add_done_callback(Hostile())
        me().add_done_callback(lambda _: called.append("kept"))
        with pytest.raises(Oops):
            me().remove_done_callback(print)

    await join(run)
    await asyncio.sleep(0)

    assert called == ["hostile", "kept", "added meanwhile"]


# --- cancels and their counters --------------------------------------------------------------------------------------


@pytest.mark.parametrize("wait", [waits_for_a_turn, forever])
async def test_cancel_with_a_message(wait: Callable[[], Awaitable[None]]) -> None:
    """The message of a cancel arrives, wherever the branch waits; the last of several wins where a task says so."""
    seen: list[object] = []
    tasks: list[asyncio.Task[Any]] = []

    async def run() -> None:
        tasks.append(me())
        try:
            while True:
                await wait()
        except asyncio.CancelledError as error:
            seen.append((error.args, me().cancelling()))
            raise

    async def cancels_it() -> None:
        assert tasks[0].cancel(msg="because")
        assert tasks[0].cancelling() == 1
        await asyncio.sleep(0)

    await join_error(run, cancels_it)

    assert seen == [(("because",), 1)]
    assert tasks[0].cancelled()


async def test_counters() -> None:
    """Cancels are counted and taken back one by one, never below zero."""
    seen: list[object] = []

    async def run() -> str:
        task = me()
        seen.append(task.uncancel())
        task.cancel("one")
        seen.append((task.cancelling(), task._must_cancel))  # type: ignore[attr-defined]
        task.cancel("two")
        seen.append(task.cancelling())
        try:
            await asyncio.sleep(0)
        except asyncio.CancelledError as error:
            seen.append(error.args)
        seen.append((task.cancelling(), task._must_cancel))  # type: ignore[attr-defined]
        seen.append([task.uncancel() for _ in range(3)])
        await asyncio.sleep(0)
        return "went on"

    result = await join(run)

    assert seen == [0, (1, True), 2, ("two",), (2, False), [1, 0, 0]]
    assert result.values() == ["went on"]


@pytest.mark.parametrize("wait", [waits_for_a_turn, waits_for_a_timer, forever])
async def test_timeout_inside(wait: Callable[[], Awaitable[None]]) -> None:
    """asyncio.timeout in a branch expires there only and leaves no count behind, opened before or after a suspension."""
    counts: list[int] = []

    async def run() -> str:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0):
                while True:
                    await wait()
        await asyncio.sleep(0)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(STEP / 2):
                await forever()
        counts.append(me().cancelling())
        return "went on"

    result = await join(run, run, waits_for_a_timer)

    assert result.values()[:2] == ["went on"] * 2
    assert counts == [0, 0]


async def test_timeout_around() -> None:
    """asyncio.timeout around a split ends it with TimeoutError, awaits its branches and leaves no count behind."""
    ended: list[object] = []

    async def run() -> None:
        try:
            await forever()
        finally:
            await ticks(3)
            ended.append(me().cancelling())

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(STEP):
            await join(run, run)

    assert ended == [1, 1]
    assert me().cancelling() == 0


async def test_timeouts_that_expire_together() -> None:
    """Timeouts around the split, in a branch and nested in it that expire at one moment: each block says what it does."""
    seen: list[str] = []

    async def run() -> None:
        try:
            async with asyncio.timeout_at(moment):
                try:
                    async with asyncio.timeout_at(moment):
                        await forever()
                except TimeoutError:
                    seen.append("inner")
                    raise
        except TimeoutError:
            seen.append("outer")
            raise

    moment = asyncio.get_running_loop().time() + STEP
    with pytest.raises(TimeoutError):
        async with asyncio.timeout_at(moment):
            await join(run, run)

    assert me().cancelling() == 0
    assert len(seen) <= 4


async def test_cancel_together_with_a_timeout() -> None:
    """A user's cancel in the same pass as a timeout of ours is not lost."""

    async def work() -> None:
        task.get_loop().call_at(moment, task.cancel, "by the user")
        async with asyncio.timeout_at(moment):
            await join(forever, forever)

    moment = asyncio.get_running_loop().time() + STEP
    task = asyncio.create_task(work())
    await asyncio.wait([task])

    assert task.cancelled()


@pytest.mark.parametrize("times", [1, 2, 5])
async def test_swallowed_cancels(times: int) -> None:
    """A branch may ignore cancels: the run waits for it, and each further cancel reaches it."""
    seen: list[object] = []

    async def run() -> str:
        for _ in range(times):
            try:
                await forever()
            except asyncio.CancelledError as error:
                seen.append(error.args)
                await asyncio.sleep(0)
        return "done at last"

    task = asyncio.create_task(into(run, forever).orchestrate("split"))
    for index in range(times):
        await ticks(6)
        assert not task.done()
        task.cancel(f"cancel {index}")
    await asyncio.wait([task])

    assert task.cancelled()
    assert seen == [(f"cancel {index}",) for index in range(times)]


async def test_cancel_that_a_future_refuses() -> None:
    """A cancel while the branch waits for a done future is delivered in its next step."""
    seen: list[object] = []
    future = asyncio.get_running_loop().create_future()
    tasks: list[asyncio.Task[Any]] = []

    async def run() -> None:
        tasks.append(me())
        try:
            await future
        except asyncio.CancelledError as error:
            seen.append(error.args)
            raise

    async def sets_and_cancels() -> None:
        future.set_result(None)
        assert tasks[0].cancel("refused")
        assert tasks[0]._must_cancel  # type: ignore[attr-defined]

    await join_error(run, sets_and_cancels)

    assert seen == [("refused",)]


# --- anyio -----------------------------------------------------------------------------------------------------------


async def test_anyio_scope_inside() -> None:
    """anyio's move_on_after and task groups work in a branch, from its first step and later."""

    async def run() -> list[bool]:
        seen = []
        for before in (0, 1):
            await ticks(before)
            with anyio.move_on_after(STEP) as scope:
                await anyio.sleep_forever()
            seen.append(scope.cancelled_caught)
        async with anyio.create_task_group() as group:
            group.start_soon(anyio.sleep_forever)
            await anyio.sleep(STEP)
            group.cancel_scope.cancel()
        seen.append(group.cancel_scope.cancelled_caught or group.cancel_scope.cancel_called)
        with anyio.CancelScope() as scope:
            scope.cancel()
            await anyio.lowlevel.checkpoint()
        seen.append(scope.cancelled_caught)
        return seen

    result = await join(run, run)

    assert result.values() == [[True] * 4] * 2


async def test_anyio_scope_around() -> None:
    """anyio's move_on_after around a split cancels it and catches what it threw."""
    ended: list[int] = []

    async def run() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            ended.append(1)

    with anyio.move_on_after(STEP) as scope:
        await join(run, run)

    assert scope.cancelled_caught
    assert ended == [1, 1]
    assert me().cancelling() == 0


@pytest.mark.parametrize("before", [0, 1, 2])
async def test_anyio_scope_cancelled_by_a_branch(before: int) -> None:
    """A branch may cancel a scope around the split, even in its first step: everything in it ends, nothing else."""
    ended: list[int] = []

    async def cancels_scope() -> None:
        await ticks(before)
        scope.cancel()
        await anyio.sleep_forever()

    async def waits() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            ended.append(1)

    with anyio.CancelScope() as scope:
        await join(waits, cancels_scope, waits)

    assert scope.cancelled_caught
    assert len(ended) == 2 if before else len(ended) in (1, 2)
    assert me().cancelling() == 0
    await anyio.lowlevel.checkpoint()


async def test_anyio_scopes_across() -> None:
    """A scope around the split and one in each branch: a branch cancels the outer one, its own does not swallow it."""
    swallowed: list[bool] = []

    async def run() -> None:
        with anyio.CancelScope() as own:
            await anyio.sleep(STEP)
            outer.cancel()
            await anyio.sleep_forever()
        swallowed.append(own.cancelled_caught)

    with anyio.CancelScope() as outer:
        await join(run, run)

    assert outer.cancelled_caught
    assert swallowed == []


async def test_anyio_split_in_a_task_group() -> None:
    """Splits in a task group, which splits themselves use task groups: a failure ends all, in order."""
    ended: list[str] = []

    async def inner() -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(anyio.sleep_forever)
            group.start_soon(anyio.sleep_forever)

    async def fails() -> None:
        await anyio.sleep(STEP)
        raise Oops

    async def splits() -> None:
        try:
            await join(inner, inner)
        finally:
            ended.append("split")

    with pytest.raises(ExceptionGroup) as caught:
        async with anyio.create_task_group() as group:
            group.start_soon(splits)
            group.start_soon(fails)

    assert caught.group_contains(Oops)
    assert ended == ["split"]


# --- futures that branches share, and those that are none --------------------------------------------------------------


@pytest.mark.parametrize("end", ["result", "exception", "cancel"])
async def test_shared_future(end: str) -> None:
    """Fifty branches on one future all get its end."""
    future: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    seen: list[object] = []

    async def run() -> None:
        try:
            seen.append(await future)
        except BaseException as error:
            seen.append(type(error))

    def ends() -> None:
        if end == "result":
            future.set_result("value")
        elif end == "exception":
            future.set_exception(Oops())
        else:
            future.cancel()

    asyncio.get_running_loop().call_later(STEP, ends)
    await join(*[run] * 50)

    assert seen == [{"result": "value", "exception": Oops, "cancel": asyncio.CancelledError}[end]] * 50


async def test_loser_cancels_a_shared_future() -> None:
    """A cancelled branch cancels the future that it waits for, as a task does: shield it to share it."""
    plain, shielded = (asyncio.get_running_loop().create_future() for _ in range(2))

    async def on_plain() -> None:
        await plain

    async def on_shielded() -> None:
        await asyncio.shield(shielded)

    await join(on_plain, on_shielded, waits_for_a_turn, strategy=ANY)

    assert plain.cancelled()
    assert not shielded.done()
    shielded.cancel()


class FutureLike:
    """The least that asyncio takes for a future."""

    def __init__(self, **options: Any) -> None:
        self._asyncio_future_blocking = False
        self.loop = asyncio.get_running_loop()
        self.callbacks: list[tuple[Any, Any]] = []
        self.is_done = False
        self.options = options

    def get_loop(self) -> Any:
        return self.loop

    def add_done_callback(self, callback: Any, *, context: Any = None) -> None:
        if error := self.options.get("add_raises"):
            raise error
        if self.options.get("calls_at_once"):
            self.is_done = True
            callback(self)
            return
        self.callbacks.append((callback, context))
        if self.options.get("adds_twice"):
            self.callbacks.append((callback, context))

    def remove_done_callback(self, callback: Any) -> int:
        before = len(self.callbacks)
        self.callbacks = [one for one in self.callbacks if one[0] != callback]
        return before - len(self.callbacks)

    def cancel(self, msg: object = None) -> bool:
        if error := self.options.get("cancel_raises"):
            raise error
        return False

    def done(self) -> bool:
        return self.is_done

    def result(self) -> object:
        if error := self.options.get("result_raises"):
            raise error
        return "foreign"

    def set(self) -> None:
        self.is_done = True
        for callback, context in self.callbacks:
            self.loop.call_soon(callback, self, context=context)

    def __await__(self) -> Generator[Any, None, object]:
        self._asyncio_future_blocking = True
        yield self
        return self.result()


async def test_foreign_future() -> None:
    """A future-like object of another library is waited for."""
    future = FutureLike()

    async def run() -> object:
        value = await future
        await asyncio.sleep(STEP)
        return value

    asyncio.get_running_loop().call_later(STEP, future.set)
    result = await join(run, returns)

    assert result.values() == ["foreign", "value"]


@pytest.mark.usefixtures("native")
async def test_future_that_calls_back_twice() -> None:
    """A second call for a future that is not waited for any more is passed over."""
    future = FutureLike(adds_twice=True)
    times: list[float] = []

    async def run() -> object:
        value = await future
        times.append(asyncio.get_running_loop().time())
        await asyncio.sleep(0)
        await asyncio.sleep(STEP)
        times.append(asyncio.get_running_loop().time())
        return value

    asyncio.get_running_loop().call_later(STEP, future.set)
    result = await join(run, returns)

    assert result.values() == ["foreign", "value"]
    assert times[1] - times[0] > STEP / 2


@pytest.mark.usefixtures("native")
async def test_hostile_future() -> None:
    """A future whose methods raise fails the branch that waits for it, and no other (a task of asyncio would hang)."""
    bad_result = FutureLike(result_raises=Oops("result"))

    def waiting(future: FutureLike) -> Callable[[], Coroutine[Any, Any, object]]:
        async def run() -> object:
            return await future

        return run

    asyncio.get_running_loop().call_later(STEP, bad_result.set)
    error = await join_error(waiting(FutureLike(add_raises=Oops("add"))), waiting(bad_result), returns)

    assert [str(one) for one in error.exceptions] == ["add", "result"]
    assert error.result is not None
    assert error.result.values() == ["value"]


@pytest.mark.timeout(5)
@pytest.mark.usefixtures("native")
async def test_future_that_calls_back_at_once() -> None:
    """A future that calls its callback inside add_done_callback, which it must not, cannot make the join hang."""

    async def run() -> object:
        return await FutureLike(calls_at_once=True)

    async with asyncio.timeout(1):
        with contextlib.suppress(JoinError):
            await join(run, returns)


@pytest.mark.timeout(5)
@pytest.mark.usefixtures("native")
async def test_future_whose_cancel_raises() -> None:
    """A loser whose future's cancel raises is reported, and awaited: the join hears of its end."""
    hostile = FutureLike(cancel_raises=Oops("no cancel"))
    unraisable: list[object] = []

    async def run() -> object:
        return await hostile

    hook, sys.unraisablehook = sys.unraisablehook, unraisable.append
    try:
        asyncio.get_running_loop().call_later(STEP, hostile.set)
        result = await join(run, returns, strategy=ANY)
    finally:
        sys.unraisablehook = hook

    assert "value" in result.values()
    assert len(unraisable) == 1


class Yields:
    """An awaitable that yields what no loop understands."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __await__(self) -> Generator[Any, None, object]:
        return (yield self.value)


async def test_bad_yields() -> None:
    """A branch that yields nonsense, a future without awaiting it, or one of another loop gets a RuntimeError, alone."""
    other_loop = asyncio.new_event_loop()
    foreign = other_loop.create_future()
    plain = asyncio.get_running_loop().create_future()
    seen: list[str] = []

    def yielding(value: object) -> Callable[[], Coroutine[Any, Any, str]]:
        async def run() -> str:
            with pytest.raises(RuntimeError) as caught:
                await Yields(value)
            seen.append(str(caught.value))
            await asyncio.sleep(0)
            return "went on"

        return run

    async def on_foreign() -> str:
        with pytest.raises(RuntimeError, match="different loop"):
            await foreign
        return "went on"

    async def on_itself() -> str:
        with pytest.raises(RuntimeError, match="await on itself"):
            await me()
        return "went on"

    result = await join(yielding(42), yielding(plain), yielding(object()), on_foreign, on_itself, returns)
    other_loop.close()

    assert result.values() == ["went on"] * 5 + ["value"]
    assert [text for text in seen if "bad yield" in text or "yield was used instead" in text] == seen


# --- re-entrancy -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wait", [waits_for_a_turn, forever])
@pytest.mark.parametrize("target", ["itself", "sibling before", "sibling after", "parent"])
async def test_branch_cancels(  # noqa: C901 - the targets and the waits in one place
    wait: Callable[[], Awaitable[None]], target: str
) -> None:
    """A branch cancels itself, a sibling or its parent, from its first step on: exactly that one is told."""
    tasks: dict[int, asyncio.Task[Any]] = {}
    cancelled: list[int] = []

    def branch(index: int) -> Callable[[], Coroutine[Any, Any, None]]:
        async def run() -> None:
            tasks[index] = me()
            try:
                if index == 1:
                    if target == "sibling after":
                        await asyncio.sleep(0)
                    {"itself": me(), "parent": parent}.get(target, tasks.get(2 if "after" in target else 0)).cancel(
                        target
                    )  # type: ignore[union-attr]
                await wait()
                if wait is waits_for_a_turn:
                    await ticks(3)
            except asyncio.CancelledError as error:
                cancelled.append(index)
                assert error.args == (target,)  # noqa: PT017 - it goes on
                raise
            finally:
                if wait is forever and target != "parent":
                    for other in tasks.values():
                        other.cancel(target)

        return run

    async def work() -> None:
        await join(branch(0), branch(1), branch(2))

    parent = asyncio.create_task(work())
    await asyncio.wait([parent])

    if target == "parent":
        assert parent.cancelled()
    else:
        assert isinstance(parent.exception(), JoinError)
        first = {"itself": 1, "sibling before": 0, "sibling after": 2}[target]
        assert cancelled[0] == first
        if wait is waits_for_a_turn:
            assert cancelled == [first]


@pytest.mark.parametrize("before", [0, 1])
async def test_branch_cancels_the_run(before: int) -> None:
    """A branch cancels its run by the handle: the run ends as cancelled, and its siblings have ended."""
    ended: list[int] = []

    async def cancels_run() -> None:
        await ticks(before)
        handle.cancel()
        await forever()

    async def waits() -> None:
        try:
            await forever()
        finally:
            ended.append(1)

    handle = into(waits, cancels_run, waits).start("split")
    with pytest.raises(WorkflowCancelledError):
        await handle

    assert ended in ([1], [1, 1])


async def test_cancel_from_a_finalizer() -> None:
    """An object whose `__del__` cancels the branches and the parent goes while the engine drops values."""
    tasks: list[asyncio.Task[Any]] = []

    class Cancels:
        def __del__(self) -> None:
            for task in tasks:
                task.cancel("from __del__")
                task.cancelling()
                repr(task)

    async def gives() -> object:
        tasks.append(me())
        value = Cancels()
        await asyncio.sleep(0)
        del value
        return Cancels()

    async def waits() -> None:
        tasks.append(me())
        await forever()

    async def raises_it() -> None:
        tasks.append(me())
        raise Oops(Cancels())

    async def work() -> None:
        with contextlib.suppress(JoinError):
            await join(waits, gives, raises_it)
        tasks.clear()

    await asyncio.create_task(work())


async def test_cancel_from_a_done_callback() -> None:
    """A done-callback of one branch cancels the next: a chain of a hundred unwinds without nesting."""
    tasks: list[asyncio.Task[Any]] = []

    async def run() -> None:
        index = len(tasks)
        tasks.append(me())
        me().add_done_callback(lambda _: tasks[index - 1].cancel() if index else None)
        await forever()

    asyncio.get_running_loop().call_later(STEP, lambda: tasks[-1].cancel())  # noqa: PLW0108 - not made yet
    error = await join_error(*[run] * 100)

    assert error.result is not None
    assert error.result.cancelled == list(range(100))


async def test_branch_runs_another_workflow_of_itself() -> None:
    """A branch may run the workflow that it belongs to."""
    depth = 0

    async def run() -> None:
        nonlocal depth
        depth += 1
        if depth < 20:
            await workflow.orchestrate("split")

    workflow = into(run, waits_for_a_turn)
    await workflow.orchestrate("split")

    assert depth == 20


# --- the decision falls while branches are started --------------------------------------------------------------------


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        pytest.param(ANY, {}, id="Any"),
        pytest.param(JoinStrategy.PartialResults(1), {}, id="PartialResults"),
        pytest.param(JoinStrategy.Quorum(1), {}, id="Quorum"),
        pytest.param(ANY, {"bulkhead": 2}, id="behind a bulkhead"),
    ],
)
async def test_decision_during_the_start(strategy: JoinStrategy, options: dict[str, Any]) -> None:
    """Branches after the one whose immediate end decides are never called: nothing to await, nothing to warn about."""
    called: list[int] = []

    def branch(index: int) -> Callable[[], Coroutine[Any, Any, int]]:
        def makes() -> Coroutine[Any, Any, int]:
            called.append(index)
            return immediate()

        async def immediate() -> int:
            return index

        return makes

    result = await join(*map(branch, range(5)), strategy=strategy, **options)
    gc.collect()

    assert called == [0]
    assert (result.values(), result.cancelled) == ([0], [1, 2, 3, 4])


@pytest.mark.usefixtures("native")
async def test_failure_during_the_start() -> None:
    """With fail_fast, an immediate failure starts nothing more, and cancels those that wait already."""
    seen: list[str] = []

    async def waits() -> None:
        seen.append("waits")
        try:
            await forever()
        finally:
            seen.append("ended")

    async def fails() -> None:
        raise Oops

    async def never() -> None:
        seen.append("never")

    await join_error(waits, fails, never, fail_fast=True)

    assert seen == ["waits", "ended"]


@pytest.mark.usefixtures("native")
async def test_order_of_the_start() -> None:
    """A branch runs up to its first suspension before the next one is called; a split of immediate ones takes no turn."""
    seen: list[str] = []

    def branch(index: int) -> Callable[[], Coroutine[Any, Any, None]]:
        async def run() -> None:
            seen.append(f"{index}a")
            await asyncio.sleep(0)
            seen.append(f"{index}b")

        return run

    await join(*map(branch, range(3)))
    assert seen == ["0a", "1a", "2a", "0b", "1b", "2b"]

    turns: list[object] = []
    asyncio.get_running_loop().call_soon(turns.append, 1)
    await join(*[waits_for_nothing] * 10)
    assert turns == []
    await asyncio.sleep(0)


@pytest.mark.parametrize("wakes", ["future", "timer", "turn"])
async def test_sleep_lets_what_was_scheduled_run_first(wakes: str) -> None:
    """What a branch schedules with call_soon has run when its `sleep(0)` returns, whatever its siblings did before."""
    loop = asyncio.get_running_loop()
    future = loop.create_future()
    ran: list[bool] = []

    async def run() -> None:
        if wakes == "future":
            await future
        else:
            await asyncio.sleep(STEP if wakes == "timer" else 0)
        for _ in range(3):
            called: list[int] = []
            loop.call_soon(called.append, 1)
            await asyncio.sleep(0)
            ran.append(called == [1])

    async def sets() -> None:
        await asyncio.sleep(STEP)
        future.set_result(None)

    await join(run, run, run, sets)

    assert ran == [True] * 9


async def test_turns_are_shared_fairly() -> None:
    """Branches that only yield do not starve the loop, and none of them its siblings."""
    counts = [0] * 4
    turns = 0
    stop = False

    def branch(index: int) -> Callable[[], Coroutine[Any, Any, None]]:
        async def run() -> None:
            while not stop:
                counts[index] += 1
                await asyncio.sleep(0)

        return run

    async def stops() -> None:
        nonlocal stop, turns
        for _ in range(100):
            turns += 1
            await asyncio.sleep(0)
        stop = True

    beside = asyncio.create_task(stops())
    await join(*map(branch, range(3)), waits_for_a_timer)
    await beside

    assert turns == 100
    assert max(counts[:3]) - min(counts[:3]) <= 1
    assert 50 <= counts[0] <= 200


# --- many, and deep --------------------------------------------------------------------------------------------------


async def immediate() -> int:
    return 1


@pytest.mark.parametrize("bulkhead", [1, 7, None])
@pytest.mark.parametrize("run", [immediate, waits_for_a_turn])
async def test_many_branches(run: Any, bulkhead: int | None) -> None:
    """Ten thousand branches behind a bulkhead start one after the other, not one inside the other."""
    result = await join(*[run] * 10_000, bulkhead=bulkhead)

    assert len(result.values()) == 10_000


async def test_immediate_after_a_late_one() -> None:
    """One slow branch, then ten thousand that end at once in its place: no recursion either."""

    async def slow() -> int:
        await asyncio.sleep(STEP)
        return 0

    result = await join(slow, *[immediate] * 10_000, bulkhead=1)

    assert sum(result.values()) == 10_000


@pytest.mark.realtime
@pytest.mark.parametrize("wait", ["pass", "await asyncio.sleep(0)", "await asyncio.sleep(0.01)", "raise ValueError"])
@pytest.mark.parametrize("depth", [300, 5000])
def test_deep_nesting(wait: str, depth: int) -> None:
    """Splits nested hundreds and thousands of levels deep work, or raise RecursionError; the process never crashes."""
    done = in_process(
        PRELUDE
        + textwrap.dedent(f"""
        async def level(depth):
            if depth:
                async def run():
                    await level(depth - 1)
                await into(run, run_leaf).orchestrate("split")
            else:
                await leaf()
        async def run_leaf():
            await asyncio.sleep(0)
        async def leaf():
            {wait}
        try:
            asyncio.run(level({depth}))
            print("worked")
        except (RecursionError, JoinError) as error:
            print(type(error).__name__)
        """)
    )

    assert done.returncode == 0, (done.returncode, done.stderr[-1500:])
    assert done.stdout.strip() in ("worked", "RecursionError", "JoinError")
    if depth == 300:
        assert done.stdout.strip() == ("JoinError" if "raise" in wait else "worked")


# --- what ends the loop ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("when", ["at once", "after a turn", "after a timer", "behind a bulkhead"])
def test_interrupt(kind: type[BaseException], when: str, asyncio_reports: list[str]) -> None:
    """KeyboardInterrupt and SystemExit of a branch leave the loop, and the siblings' clean-up runs."""
    cleaned: list[int] = []

    async def waits() -> None:
        try:
            await forever()
        finally:
            cleaned.append(1)

    async def interrupts() -> None:
        if when != "at once":
            await (asyncio.sleep(0) if when == "after a turn" else asyncio.sleep(STEP))
        raise kind("ends all")

    options = {"bulkhead": 2} if when == "behind a bulkhead" else {}
    with pytest.raises(kind, match="ends all"):
        asyncio.run(into(waits, interrupts, waits, **options).orchestrate("split"))
    gc.collect()
    asyncio_reports.clear()  # a task that ended with SystemExit is reported by some versions of asyncio

    assert len(cleaned) >= 1


def test_loop_closed_with_a_live_split() -> None:
    """A loop that stops and is closed under a waiting split: dropping everything then neither crashes nor complains."""
    done = in_process(
        PRELUDE
        + """
async def waits():
    try:
        await asyncio.get_running_loop().create_future()
    finally:
        print("cleaned")
async def yields():
    while True:
        await asyncio.sleep(0)
for shape in ([waits, waits], [waits, yields], [yields, yields]):
    loop = asyncio.new_event_loop()
    run = into(*shape).orchestrate("split")
    task = loop.create_task(run)
    loop.call_later(0.01, loop.stop)
    loop.run_forever()
    loop.close()
    task._log_destroy_pending = False
    del task, run, loop
    gc.collect()
print("alive")
"""
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "alive"
    assert done.stdout.split().count("cleaned") == 3
    assert "Traceback" not in done.stderr


async def test_run_dropped_while_branches_wait() -> None:
    """A run whose coroutine is closed while its branches wait cancels them; the loop steps their clean-up."""
    ended: list[str] = []

    async def waits() -> None:
        try:
            await forever()
        finally:
            await asyncio.sleep(0)
            ended.append("waits")

    async def yields() -> None:
        try:
            while True:  # noqa: ASYNC110 - it never ends
                await asyncio.sleep(0)
        finally:
            ended.append("yields")

    run = into(waits, yields).orchestrate("split")

    async def drives() -> None:
        """Step the run by hand, in a task, and drop it."""
        run.send(None)
        await ticks(3)
        run.close()

    await asyncio.create_task(drives())
    await ticks(6)

    assert sorted(ended) == ["waits", "yields"]


def test_interpreter_ends_with_a_live_split() -> None:
    """An interpreter that ends while branches wait ends in peace."""
    done = in_process(
        PRELUDE
        + """
kept = []
async def waits():
    kept.append(asyncio.current_task())
    await asyncio.get_running_loop().create_future()
loop = asyncio.new_event_loop()
task = loop.create_task(into(waits, waits).orchestrate("split"))
loop.call_later(0.01, loop.stop)
loop.run_forever()
print(len(kept))
"""
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "2"
    assert "Fatal" not in done.stderr


# --- introspection ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setter", [sys.settrace, sys.setprofile])
async def test_tracing(setter: Callable[[Any], None]) -> None:
    """Debuggers, coverage and profilers see the frames of branches, in the first step and in later ones."""
    seen: list[tuple[str, str]] = []

    async def traced_branch() -> None:
        await asyncio.sleep(0)
        await asyncio.sleep(STEP)

    def tracer(frame: types.FrameType, event: str, _: object) -> Any:
        if frame.f_code.co_name == "traced_branch":
            seen.append((event, frame.f_code.co_name))
        return tracer

    before = sys.gettrace() if setter is sys.settrace else sys.getprofile()
    setter(tracer)
    try:
        await join(traced_branch, traced_branch)
    finally:
        setter(before)

    events = [event for event, _ in seen]
    assert events.count("call") == 6
    assert events.count("return") == 6


@pytest.mark.usefixtures("native")
async def test_all_tasks() -> None:
    """asyncio.all_tasks() has the parent and not its branches, which are the parent's own."""
    seen: list[set[asyncio.Task[Any]]] = []
    branches: list[asyncio.Task[Any]] = []

    async def run() -> None:
        branches.append(me())
        await asyncio.sleep(0)
        seen.append(asyncio.all_tasks())

    await join(run, run)

    assert all(me() in one for one in seen)
    assert not any(one & set(branches) for one in seen)


async def test_traceback_of_a_failure() -> None:
    """The traceback of a branch's exception leads to the line that raised, with no frame twice."""
    error = await join_error(raises)

    (cause,) = error.exceptions
    names = []
    trace = cause.__traceback__
    while trace:
        names.append(trace.tb_frame.f_code.co_name)
        trace = trace.tb_next
    assert names[-1] == "raises"
    assert names.count("raises") == 1


# --- which kind ------------------------------------------------------------------------------------------------------


async def kind_of_branches() -> list[bool]:
    kinds: list[bool] = []

    async def run() -> None:
        kinds.append(is_native(me()))
        await asyncio.sleep(0)

    await join(run, run)
    return kinds


@pytest.fixture
def chosen(request: pytest.FixtureRequest) -> Iterator[Callable[..., None]]:
    """`cano.configure`, taken back afterwards."""
    yield cano.configure
    cano.configure(branches=request.config.getoption("--branches"))


@pytest.mark.usefixtures("native")
async def test_configured(chosen: Callable[..., None]) -> None:
    """cano.configure chooses the kind for splits that open from then on."""
    chosen(branches="asyncio")
    first = await kind_of_branches()
    chosen(branches="native")

    assert (first, await kind_of_branches()) == ([False, False], [True, True])


@pytest.mark.usefixtures("native")
async def test_configured_during_a_split(chosen: Callable[..., None]) -> None:
    """A split that is open keeps its kind."""
    kinds: list[bool] = []

    async def run() -> None:
        kinds.append(is_native(me()))
        chosen(branches="asyncio")
        await asyncio.sleep(0)

    await join(run, run, run, bulkhead=1)

    assert kinds == [True] * 3


def test_debug_mode_uses_tasks_of_asyncio() -> None:
    """A loop in debug mode gets tasks of asyncio, so that its reports name them."""
    assert asyncio.run(kind_of_branches(), debug=True) == [False, False]


async def test_task_factory_sees_branches() -> None:
    """A loop with a task factory makes the branches with it."""
    loop = asyncio.get_running_loop()
    made: list[object] = []

    def factory(loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> Any:
        made.append(coroutine)
        return asyncio.Task(coroutine, loop=loop, **options)

    loop.set_task_factory(factory)
    try:
        kinds = await kind_of_branches()
    finally:
        loop.set_task_factory(None)

    assert kinds == [False, False]
    assert len(made) == 2


# --- time and memory --------------------------------------------------------------------------------------------------


@pytest.mark.virtual
async def test_elapsed() -> None:
    """Each branch's elapsed time is its own, from its first step to its end."""

    def lasting(seconds: float) -> Callable[[], Coroutine[Any, Any, None]]:
        async def run() -> None:
            await asyncio.sleep(seconds)

        return run

    result = await join(lasting(1), lasting(3), waits_for_a_turn, lasting(2), bulkhead=2)

    assert [round(one.elapsed, 3) for one in result.successes] == pytest.approx([1, 3, 0, 2])


@pytest.mark.usefixtures("no_collector", "native")
@pytest.mark.parametrize("wait", [waits_for_nothing, waits_for_a_turn, waits_for_a_timer])
async def test_reference_counts_free_everything(wait: Callable[[], Awaitable[None]]) -> None:
    """Without the collector: values, errors, locals, coroutines, tasks and contexts go when the run has ended."""
    died: list[weakref.ref[Any]] = []

    def track() -> Tracked:
        value = Tracked()
        died.append(weakref.ref(value))
        return value

    async def succeeds() -> Tracked:
        died.append(weakref.ref(me()))
        died.append(weakref.ref(me().get_coro()))
        in_context.set(track())
        await wait()
        return track()

    async def fails() -> None:
        died.append(weakref.ref(me()))
        local = track()
        await wait()
        raise Oops(local)

    async def is_cancelled() -> None:
        died.append(weakref.ref(me()))
        _local = track()
        await forever()

    async def use() -> None:
        await into(succeeds, succeeds).orchestrate("split")
        with contextlib.suppress(JoinError):
            await into(is_cancelled, fails, succeeds, fail_fast=True).orchestrate("split")
        await into(is_cancelled, succeeds, strategy=ANY).orchestrate("split")
        task = asyncio.create_task(into(is_cancelled, succeeds).orchestrate("split"))
        await asyncio.sleep(2 * STEP)
        task.cancel()
        await asyncio.wait([task])

    in_context: contextvars.ContextVar[Tracked] = contextvars.ContextVar("in_context")
    await use()
    await ticks(2)

    assert len(died) >= 10
    assert [one for one in died if one() is not None] == []


@pytest.mark.realtime
@pytest.mark.timeout(60)
def test_no_growth() -> None:
    """100,000 splits of 10, ended in every way, leave neither objects nor memory behind."""
    done = in_process(
        PRELUDE
        + """
import os
def rss():
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
async def at_once(): return 1
async def turn(): await asyncio.sleep(0)
async def fails(): raise ValueError
async def waits(): await asyncio.get_running_loop().create_future()
good = into(*[at_once] * 9, turn)
bad = into(*[fails] * 10)
lost = into(*[waits] * 5, turn, *[at_once] * 4, strategy=JoinStrategy.Any)
async def rounds(count):
    for index in range(count):
        await good.orchestrate("split")
        if index % 20 == 0:
            try:
                await bad.orchestrate("split")
            except JoinError:
                pass
            await lost.orchestrate("split")
async def main():
    await rounds(5_000)
    gc.collect()
    before, blocks, memory = len(gc.get_objects()), sys.getallocatedblocks(), rss()
    await rounds(90_000)
    gc.collect()
    print(len(gc.get_objects()) - before, sys.getallocatedblocks() - blocks, rss() - memory)
asyncio.run(main())
""",
        timeout=50,
    )

    assert done.returncode == 0, done.stderr
    objects, blocks, memory = map(int, done.stdout.split())
    assert abs(objects) < 100
    assert abs(blocks) < 1_000
    assert memory < 4_000_000


@pytest.mark.usefixtures("native")
async def test_memory_of_suspended_branches() -> None:
    """A suspended branch needs no more memory than a task under asyncio.gather."""
    count = 2_000
    sizes: list[int] = []
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def waits() -> None:
        await future

    async def measured(work: Awaitable[Any]) -> None:
        nonlocal future
        future = asyncio.get_running_loop().create_future()
        gc.collect()
        tracemalloc.start()
        try:
            task = asyncio.ensure_future(work)
            await ticks(3)
            gc.collect()
            sizes.append(tracemalloc.get_traced_memory()[0])
        finally:
            tracemalloc.stop()
        future.set_result(None)
        await task

    async def gather() -> None:
        await asyncio.gather(*[waits() for _ in range(count)])

    workflow = into(*[waits] * count)
    await measured(workflow.orchestrate("split"))  # the first time builds the table
    sizes.clear()
    await measured(workflow.orchestrate("split"))
    await measured(gather())

    assert sizes[0] <= sizes[1], [size / count for size in sizes]
