"""What a loop still holds: tasks that are not done, timers that will still fire, threads that were started.

Everything here reads asyncio's own books and changes nothing. Tasks are taken by what they offer, not by their class, since
the branches of a split are tasks of ours. A timer that some living task waits for (the one inside ``asyncio.sleep``, the one
of ``asyncio.timeout``) is that task's affair and is not reported beside it.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeAlias

Orphan: TypeAlias = "asyncio.Task[Any] | asyncio.TimerHandle | threading.Thread"

ENGINE_THREADS = ("cano-",)
"""Workers that stay for the next run."""

LOOP_THREADS = ("asyncio_",)
"""Workers of a loop's default executor: they stay until the loop shuts it down."""

_JOIN = 1.0
"""Real seconds that a thread on its way out is given before it counts as left behind."""

_SHOWN = 20


def assert_no_orphans(*, ignore: Iterable[asyncio.Task[Any] | asyncio.TimerHandle] = ()) -> None:
    """Assert that the running loop has nothing left but the task that asks.

    Fails for every other task that is not done, and for every timer that would still fire and that no living task waits for.
    A cancelled timer is not pending, wherever the loop keeps it. A loop that does not show its timers (uvloop) is checked
    for tasks only.

    Args:
        ignore: Tasks and timers that may stay.

    Raises:
        AssertionError: Something is left; the message has one entry each, for a task with the place where it is suspended.
        RuntimeError: No loop is running.

    Example:
        >>> async def main():
        ...     poller = asyncio.create_task(asyncio.sleep(3600), name="poller")
        ...     await asyncio.sleep(1)
        ...     assert_no_orphans()
        >>> run(main())
        Traceback (most recent call last):
        ...
        AssertionError: 1 orphan is left:
        - task 'poller' of sleep(), suspended
            at ...
    """
    expect_none(alive(asyncio.get_running_loop()), ignore)


@contextmanager
def no_orphans() -> Iterator[None]:
    """Assert on leaving the block that nothing that began in it is left.

    What was there on entry may stay: tasks, timers, threads. Of what came since, the rule of `assert_no_orphans` holds, and no
    thread may be left but idle workers: those named ``cano-...`` and those of the loop's default executor. A thread on its
    way out is given one second of real time. An exception that leaves the block goes on, and nothing is checked.

    Raises:
        AssertionError: Something is left; the message has one entry each.
        RuntimeError: No loop is running.

    Example:
        >>> async def main():
        ...     with no_orphans():
        ...         await asyncio.gather(asyncio.sleep(1), asyncio.sleep(2))
        >>> run(main())
    """
    loop = asyncio.get_running_loop()
    before, threads = alive(loop), threading.enumerate()
    yield
    expect_none([*alive(loop), *started_threads(threads, idle=ENGINE_THREADS + LOOP_THREADS)], before)


def alive(loop: asyncio.AbstractEventLoop) -> list[Orphan]:
    """The loop's unfinished tasks, by name, and its pending timers, by deadline."""
    tasks = sorted(asyncio.all_tasks(loop), key=lambda task: task.get_name())
    timers = [timer for timer in getattr(loop, "_scheduled", ()) if not timer.cancelled()]
    return [*tasks, *sorted(timers)]


def started_threads(before: Iterable[threading.Thread], *, idle: tuple[str, ...]) -> list[threading.Thread]:
    """The threads that are alive, were not there before, and whose name does not begin like an idle worker's."""
    new = [thread for thread in set(threading.enumerate()).difference(before) if not thread.name.startswith(idle)]
    for thread in new:
        thread.join(_JOIN)
    return [thread for thread in new if thread.is_alive()]


def expect_none(left: Iterable[Orphan], ignore: Iterable[Orphan] = ()) -> None:
    """Raise AssertionError naming what is left, except what is ignored, the current task, and the timers of living tasks."""
    left = list(left)
    # By identity: two timers of the same deadline and callback are equal, and still two.
    ignored = {id(known) for known in ignore}
    ignored.add(id(_current_task()))
    awaited = _awaited(left)
    orphans = [orphan for orphan in left if id(orphan) not in ignored and not _is_owned(orphan, awaited)]
    if orphans:
        count = "1 orphan is" if len(orphans) == 1 else f"{len(orphans)} orphans are"
        raise AssertionError(f"{count} left:{entries(orphans)}")


def entries(orphans: Sequence[Orphan]) -> str:
    """The lines of a message, one entry for each of the first 20."""
    shown = "".join(f"\n- {describe(orphan)}" for orphan in orphans[:_SHOWN])
    return shown if len(orphans) <= _SHOWN else f"{shown}\n- and {len(orphans) - _SHOWN} more"


def describe(orphan: Orphan) -> str:
    """One entry of a message: what it is, its name, and where it stands, the outermost frame first."""
    if isinstance(orphan, threading.Thread):
        frame = sys._current_frames().get(orphan.ident or 0)
        return f"thread {orphan.name!r}{_at([frame] if frame else [])}"
    if isinstance(orphan, asyncio.TimerHandle):
        return f"timer {orphan!r}"
    coroutine = orphan.get_coro()
    name = getattr(coroutine, "__qualname__", type(coroutine).__name__)
    state = "suspended" if getattr(coroutine, "cr_suspended", True) else "not started"
    return f"task {orphan.get_name()!r} of {name}(), {state}{_at(_frames(coroutine))}"


def _current_task() -> asyncio.Task[Any] | None:
    try:
        return asyncio.current_task()
    except RuntimeError:  # no loop is running: pytest asks when it has stopped
        return None


def _awaited(left: Iterable[Orphan]) -> set[int]:
    """The identities of all tasks, and of the futures they wait for."""
    tasks = [task for task in left if not isinstance(task, (asyncio.TimerHandle, threading.Thread))]
    return {id(thing) for task in tasks for thing in (task, getattr(task, "_fut_waiter", None)) if thing is not None}


def _is_owned(timer: Orphan, awaited: set[int]) -> bool:
    # asyncio.sleep and wait have the future that the task waits for among the arguments of the timer;
    # the timer of asyncio.timeout is the bound method of an object that knows its task.
    if not isinstance(timer, asyncio.TimerHandle):
        return False
    args: Iterable[object] = getattr(timer, "_args", None) or ()
    bound_to = getattr(getattr(timer, "_callback", None), "__self__", None)
    return any(id(thing) in awaited for thing in (*args, getattr(bound_to, "_task", None)))


def _frames(awaitable: object) -> Iterator[FrameType]:
    """The frames of a chain of awaits, down to the first object that does not say what it waits for."""
    while awaitable is not None:
        inner = None
        for frame_name, inner_name in (
            ("cr_frame", "cr_await"),
            ("gi_frame", "gi_yieldfrom"),
            ("ag_frame", "ag_await"),
        ):
            frame = getattr(awaitable, frame_name, None)
            if frame is not None:
                yield frame
            inner = inner or getattr(awaitable, inner_name, None)
        awaitable = inner


def _at(frames: Iterable[FrameType]) -> str:
    return "".join(
        f"\n    at {frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_qualname}" for frame in frames
    )
