"""An event loop whose clock jumps.

Model. asyncio waits in one place, ``selector.select(timeout)``, and reads the clock in one place, ``loop.time()``. Both are
ours here. A pass of the loop that would wait does one of three things:

    something real is in flight     wait in real time; the clock advances by what was waited
    else, a timer is pending        set the clock to its deadline, exactly, and wait for nothing
    else                            the program looks stuck: give other threads a grace period to call in, then say so

"In flight" is: a file descriptor besides the loop's own wake-up pipe, a job given to an executor (until the job itself ends,
not merely the future that was waited for), a child process, an open `real_time` block. The loop cannot see a thread that
somebody started by hand and that will call ``call_soon_threadsafe``; `real_time` is for that.

Invariants. The clock never goes back. It stands still while callbacks run, and while it waits for a call from another thread.
It is at or after the deadline of each timer that fires. Timers fire in the order of their deadlines and, where these are equal,
in the order in which they were set: on a clock that stands still equal deadlines are the rule, and a heap alone would shuffle
them.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import math
import selectors
import time
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterator
from contextlib import contextmanager, suppress
from contextvars import Context
from functools import partial
from itertools import count
from typing import Any, TypeAlias, TypeVar, TypeVarTuple, cast

from cano import _core

from ._leaks import alive, entries

_T = TypeVar("_T")
_Ts = TypeVarTuple("_Ts")
_Events: TypeAlias = "list[tuple[selectors.SelectorKey, int]]"
_Poll: TypeAlias = "Callable[[float | None], _Events]"


class ClockStalledError(RuntimeError):
    """The program waits for something that cannot happen.

    No callback is ready, no timer is pending, nothing real is in flight, and the coroutine that is being run is not done. The
    message has one entry for each task, with the place where it is suspended.
    """


class VirtualClockLoop(asyncio.SelectorEventLoop):
    """An asyncio event loop whose clock jumps to the next timer when nothing else is left to do.

    ``await asyncio.sleep(3600)`` takes no real time, and afterwards ``loop.time()`` is exactly 3600.0. While a socket,
    a pipe, an executor's job or a child process is in flight the loop waits in real time, so that none of them meets a
    false timeout. Timers of the same deadline fire in the order in which they were set.

    Args:
        start: Where the clock begins, in seconds.
        grace: How many real seconds to wait for another thread before a stuck program is reported.

    Raises:
        ClockStalledError: From ``run_until_complete``, when the program is stuck. The tasks are left as they are, so that
            `asyncio.Runner` cancels them as usual.

    Example:
        >>> with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
        ...     runner.run(asyncio.sleep(3600))
        ...     runner.get_loop().time()
        3600.0
    """

    _selector: selectors.BaseSelector
    _scheduled: list[asyncio.TimerHandle]
    _default_executor: concurrent.futures.ThreadPoolExecutor | None

    def __init__(self, *, start: float = 0.0, grace: float = 5.0) -> None:
        self.holds = 0  # how many real_time blocks are open
        self._grace = grace
        self._has_main = False
        self._turns = count()
        self._jobs: set[concurrent.futures.Future[Any]] = set()
        self._children: list[asyncio.SubprocessTransport] = []
        super().__init__(_Selector(self._wait))
        self._set_time(start)

    def time(self) -> float:
        """The virtual time in seconds."""
        return self._now

    def call_at(
        self, when: float, callback: Callable[[*_Ts], object], *args: *_Ts, context: Context | None = None
    ) -> asyncio.TimerHandle:
        """Call back at a time of this clock; at equal times in the order of the calls."""
        deadline = _Deadline(when)
        deadline.turn = next(self._turns)
        return super().call_at(deadline, callback, *args, context=context)

    def run_forever(self) -> None:
        """Run until `stop` is called; meanwhile this thread's breakers and limiters read the same clock."""
        _core.set_virtual_time(self._now)
        try:
            super().run_forever()
        finally:
            _core.set_virtual_time(None)

    def run_until_complete(self, future: Generator[Any, None, _T] | Awaitable[_T]) -> _T:
        """Run until the future is done, or until it never can be."""
        self._has_main = True
        try:
            return super().run_until_complete(cast("Awaitable[_T]", future))
        finally:
            self._has_main = False

    def run_in_executor(
        self, executor: concurrent.futures.Executor | None, func: Callable[[*_Ts], _T], *args: *_Ts
    ) -> asyncio.Future[_T]:
        """Run a function in a thread or process; the clock keeps real time until it has ended."""
        pool = executor or self._default_executor
        if pool is None:
            pool = concurrent.futures.ThreadPoolExecutor(thread_name_prefix="asyncio")
            self.set_default_executor(pool)
        job = pool.submit(func, *args)
        future = asyncio.wrap_future(job, loop=self)
        self._jobs.add(job)
        job.add_done_callback(self._job_ended)
        return future

    async def shutdown_default_executor(self, *args: Any, **kwargs: Any) -> None:
        """Wait in real time for the default executor's threads."""
        with real_time():
            await super().shutdown_default_executor(*args, **kwargs)

    async def _make_subprocess_transport(self, *args: Any, **kwargs: Any) -> asyncio.SubprocessTransport:
        # Python 3.11 waits for a child in a thread of its own, of which no file descriptor tells.
        child: asyncio.SubprocessTransport
        child = await super()._make_subprocess_transport(*args, **kwargs)  # type: ignore[misc]  # not in typeshed
        self._children.append(child)
        return child

    def _job_ended(self, job: concurrent.futures.Future[Any]) -> None:
        # In the worker's thread, after the result was posted to the loop: by this order the loop has the result
        # when it forgets the job. A job may outlive its loop.
        with suppress(RuntimeError):
            self.call_soon_threadsafe(self._jobs.discard, job)

    def _set_time(self, now: float) -> None:
        self._now = now
        if self.is_running():
            _core.set_virtual_time(now)
        # asyncio fires what is due before now + resolution. One unit in the last place makes that "at or before now" for
        # every size of now; the system clock's nanosecond would fire early, and never once now is above 2**24 s.
        self._clock_resolution = math.ulp(now)

    def _in_flight(self) -> bool:
        self._children = [child for child in self._children if child.get_returncode() is None]
        return bool(self.holds or self._jobs or self._children) or len(self._selector.get_map()) > 1

    def _wait(self, poll: _Poll, timeout: float | None) -> _Events:
        if timeout == 0:
            return poll(0)
        if self._in_flight():
            began = time.monotonic()
            events = poll(timeout)
            self._set_time(self._now + (time.monotonic() - began))
            return events
        events = poll(0)
        if events:
            return events
        deadline = self._scheduled[0].when() if self._scheduled else math.inf
        if deadline < math.inf:
            self._set_time(float(deadline))
            return []
        events = poll(self._grace if self._has_main else None)
        if not events:
            raise ClockStalledError(self._stalled())
        return events

    def _stalled(self) -> str:
        return (
            f"the virtual clock stands at {self._now} s: nothing is scheduled or in flight, and no other thread called in for"
            f" {self._grace} s of real time, but the coroutine is not done{entries(alive(self))}"
        )


class _Selector(selectors.DefaultSelector):
    """The system's selector, except that the loop decides how to wait."""

    def __init__(self, wait: Callable[[_Poll, float | None], _Events]) -> None:
        super().__init__()
        self._wait = wait

    def select(self, timeout: float | None = None) -> _Events:
        return self._wait(super().select, timeout)


class _Deadline(float):
    """A time that is less than an equal one of a later turn."""

    __slots__ = ("turn",)
    turn: int

    def __lt__(self, other: float) -> bool:
        if isinstance(other, _Deadline) and self == other:
            return self.turn < other.turn
        return float.__lt__(self, other)


@contextmanager
def real_time() -> Iterator[None]:
    """Keep the running loop's clock on real time inside the block.

    For work that the loop cannot see: a thread started by hand, or native code, that calls ``call_soon_threadsafe`` when it is
    done. The clock advances by the real time waited, and does not jump. Blocks may nest and overlap. On any other loop it
    does nothing.

    Raises:
        RuntimeError: No loop is running.

    Example:
        >>> async def main():
        ...     posted, loop = asyncio.Event(), asyncio.get_running_loop()
        ...     with real_time():
        ...         threading.Thread(target=loop.call_soon_threadsafe, args=(posted.set,)).start()
        ...         await asyncio.wait_for(posted.wait(), 60)
        >>> run(main())
    """
    loop = asyncio.get_running_loop()
    if not isinstance(loop, VirtualClockLoop):
        yield
        return
    loop.holds += 1
    try:
        yield
    finally:
        loop.holds -= 1


def run(main: Coroutine[Any, Any, _T], *, debug: bool | None = None, start: float = 0.0) -> _T:
    """Run a coroutine on a new `VirtualClockLoop` and return its result.

    Like `asyncio.run`: at the end the tasks left over are cancelled, asynchronous generators closed, the default executor
    shut down, and the loop is closed.

    Args:
        main: The coroutine.
        debug: asyncio's debug mode; None leaves it to ``PYTHONASYNCIODEBUG``.
        start: Where the clock begins, in seconds.

    Raises:
        ClockStalledError: The coroutine waits for something that cannot happen.
        RuntimeError: A loop is already running in this thread.

    Example:
        >>> async def main():
        ...     await asyncio.sleep(6 * 3600)
        ...     return asyncio.get_running_loop().time()
        >>> run(main())
        21600.0
    """
    if asyncio._get_running_loop() is not None:
        main.close()
        raise RuntimeError("run() needs a thread without a running loop; inside one, await the coroutine")
    with asyncio.Runner(debug=debug, loop_factory=partial(VirtualClockLoop, start=start)) as runner:
        return runner.run(main)
