"""How a stream is run: items one after another, outputs handed over window by window, and an orderly end.

Model. ``open`` -> (next item -> ``process_item`` -> when the window is due, ``flush_window``) again and again -> the source
is closed, what is left is flushed -> ``on_close``. When a window is due is the core's rule.

A source that is read for windows by count is awaited as ``async for`` would. A window by duration may be due while the source
is silent, so there the source lives in a task of its own, from its first item to its ``aclose``: scopes and context variables
in it hold from one item to the next, and its own timeouts do not hit a flush. That task reads only when it is asked; one
request stays open for as many windows as pass meanwhile, so no item is lost and none is read ahead.

Invariants.
- An output is handed to ``flush_window`` at most once, in order.
- A cursor is committed when the flush of its window has returned, in one place: where the run is durable, as a row.
- However a stream ends, its source is closed and the source's task is over before.
- After a cancel the source is closed, the open window flushed and ``on_close`` called, each of them whatever the others raise.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable
from functools import partial
from itertools import count
from typing import Any

from . import _core
from ._config import FINAL_ERRORS
from ._errors import AttemptTimeoutError
from ._log import written
from ._methods import Method, not_one_of, outcome, requests
from ._models import Continue, Stop, StreamProgress

_TURN = 1024
"""Items without a turn of the event loop, as transitions of a run."""

_NOTHING_YET = object()

_log = logging.getLogger("cano")


class Stream:
    """A stream as it was registered."""

    def __init__(
        self,
        name: str,
        methods: tuple[Method, ...],
        window: _core.StreamWindow,
        limit: float | None,
        retries: _core.Policy | None,
        *,
        skips: bool,
    ) -> None:
        self.name = name
        self.methods = methods
        self.window = window
        self.limit = limit
        self.retries = retries
        self.skips = skips

    async def run(self, run: _core.Run, *filled: Any) -> Any:
        """One attempt of the task: the next state."""
        return await _Course(self, run, filled).run()


class _Course:
    """One run of a stream from its source's opening to its end."""

    def __init__(self, stream: Stream, run: _core.Run, filled: tuple[Any, ...]) -> None:
        arguments = iter(filled)
        self._stream = stream
        self._run = run
        self._log = run.log
        self._progress = StreamProgress()
        self._open, *methods = (method.bind(arguments, self._progress) for method in stream.methods)
        if stream.limit is not None:
            methods = [partial(self._limited, stream.limit, method) for method in methods]
        self._process, self._flush, self._close = methods
        self._host = asyncio.current_task()
        self._loop = asyncio.get_running_loop()
        self._outputs: list[Any] = []
        self._newest: Any = None
        self._requests = requests(self._host)

    async def run(self) -> Any:
        limit = self._stream.limit
        opened = await (self._opened() if limit is None else self._limited(limit, self._opened))
        self._filling = self._stream.window._open(self._loop.time())
        self._source = (_Detached if self._stream.window._is_timed else _Attached)(opened)
        try:
            stop = await self._read()
            if stop is None:
                await self._source.close()
                stop = await self._hand_over()
        except GeneratorExit:  # closed from outside: nothing can be awaited any more
            self._source.abandon()
            raise
        except BaseException as error:
            if isinstance(error, asyncio.CancelledError):
                await self._drain(*error.args[:1])
            elif self._was_cancelled():  # what the cancel was made into leaves in its place
                await self._drain()
            else:
                await self._source.close()
            raise
        if stop is not None:
            await self._source.close()
            return stop.state
        return await outcome(self._close("exhausted"))

    async def _drain(self, *message: object) -> None:
        close = self._source.close
        await _in_turn(lambda: close(*message), self._hand_over, lambda: outcome(self._close("cancelled")))

    async def _opened(self) -> AsyncIterator[Any]:
        source = self._open(None if self._log is None else self._log.take_cursor())
        if not isinstance(source, AsyncIterable):
            source = await outcome(source)
        if not isinstance(source, AsyncIterable):
            raise not_one_of(f"open of task {self._stream.name}", source, "an async iterator")
        return aiter(source)

    async def _read(self) -> Stop[Any] | None:
        """Process the items of the source; None when there are no more."""
        for number in count(1):
            # A cancel is delivered between two items; others get a turn every so many items.
            if number % _TURN == 0 or getattr(self._host, "_must_cancel", False):
                await asyncio.sleep(0)
            self._requests = requests(self._host)
            if self._filling.is_due(self._loop.time()):
                stop = await self._hand_over()
                if stop is not None:
                    return stop
            try:
                item = await self._source.next(self._filling.end)
            except StopAsyncIteration:
                return None
            if item is not _NOTHING_YET:
                await self._take(item)
        return None

    async def _take(self, item: Any) -> None:
        failures = 0
        while True:
            try:
                result = self._process(item)
                if isinstance(result, Awaitable):
                    result = await result
                break
            except Exception as error:
                failures += 1
                pause = self._pause(error, failures)
                if pause is None and not self._is_skipped(error):
                    raise
                self._report(error, failures, pause)
            if pause is None:
                self._progress.skipped += 1
                return
            await asyncio.sleep(pause)
        if not (isinstance(result, tuple) and len(result) == 2):  # noqa: PLR2004 - a pair
            raise not_one_of(f"process_item of task {self._stream.name}", result, "a pair (output, cursor)")
        output, self._newest = result
        self._outputs.append(output)
        self._filling.add(self._loop.time())
        self._progress.outputs += 1

    def _was_cancelled(self) -> bool:
        return requests(self._host) > self._requests

    def _pause(self, error: Exception, failures: int) -> float | None:
        policy = self._stream.retries
        return None if policy is None or self._was_cancelled() else policy.pause(error, failures)

    def _is_skipped(self, error: Exception) -> bool:
        return self._stream.skips and not isinstance(error, FINAL_ERRORS) and not self._was_cancelled()

    def _report(self, error: Exception, failures: int, pause: float | None) -> None:
        if pause is None:
            _log.warning("an item of task %s failed and is skipped", self._stream.name, exc_info=error)
        else:
            text = "an item of task %s failed (%d in a row); trying it again in %.3f s"
            _log.warning(text, self._stream.name, failures, pause, exc_info=error)

    async def _hand_over(self) -> Stop[Any] | None:
        """Flush the open window, if there is anything in it, and commit its cursor."""
        if not self._outputs:
            return None
        outputs, cursor, self._outputs = self._outputs, self._newest, []
        self._filling.hand_over()
        verdict = await outcome(self._flush(outputs))
        if verdict is not Continue and type(verdict) is not Stop:
            raise not_one_of(f"flush_window of task {self._stream.name}", verdict, "Continue or Stop(state)")
        if self._log is not None:
            leads_to = self._run.label_of(verdict.state) if isinstance(verdict, Stop) else None
            await written(self._log, self._log.cursor(cursor, leads_to))
        self._progress.cursor = cursor
        self._progress.windows += 1
        return None if verdict is Continue else verdict

    async def _limited(self, limit: float, method: Callable[..., Any], *given: Any) -> Any:
        """Call a method of the user's, within the attempt's timeout."""
        # A scope takes a cancel that is pending when it is entered for its own (gh-134471): it is delivered before.
        if getattr(self._host, "_must_cancel", False):
            await asyncio.sleep(0)
        scope = asyncio.timeout(limit)
        try:
            async with scope:
                return await outcome(method(*given))
        except TimeoutError as error:
            if not scope.expired():
                raise
            text = f"a call of task {self._stream.name} took longer than its attempt_timeout of {limit} s"
            raise AttemptTimeoutError(text, limit) from error


async def _in_turn(*steps: Callable[[], Awaitable[object]]) -> None:
    """Take all of the steps, whatever they raise; of several errors the last one leaves, the others are its context."""
    for number, step in enumerate(steps, 1):
        try:
            await step()
        except GeneratorExit:
            raise
        except BaseException:
            await _in_turn(*steps[number:])
            raise


async def _aclose(source: AsyncIterator[Any]) -> None:
    close = getattr(source, "aclose", None)
    if close is not None:
        await outcome(close())


class _Attached:
    """A source that is read where its items are processed."""

    def __init__(self, source: AsyncIterator[Any]) -> None:
        self._source = source
        self._is_open = True

    async def next(self, _until: float | None) -> Any:
        return await anext(self._source)

    async def close(self, *_message: object) -> None:
        if self._is_open:
            self._is_open = False
            await _aclose(self._source)

    def abandon(self) -> None:
        """Nothing to do: the event loop closes a generator that nobody can await any more."""


class _Detached:
    """A source that is read in a task of its own, so that one can wait for its next item and the end of a window at once."""

    def __init__(self, source: AsyncIterator[Any]) -> None:
        self._source = source
        self._loop = asyncio.get_running_loop()
        self._request = asyncio.Event()
        self._is_asked = False
        self._items: list[Any] = []  # one, at most
        self._news = self._loop.create_future()
        self._is_open = True
        self._task = self._loop.create_task(self._read())
        self._task.add_done_callback(self._tell)

    async def _read(self) -> None:
        try:
            while self._is_open:
                await self._request.wait()
                self._request.clear()
                self._items.append(await anext(self._source))
                self._tell()
        finally:
            await _aclose(self._source)

    def _tell(self, _task: object = None) -> None:
        if not self._news.done():
            self._news.set_result(None)

    async def next(self, until: float | None) -> Any:
        """The next item; `_NOTHING_YET` from `until` on. What the reading raises, also at its end, comes out once."""
        if not self._is_asked:
            self._is_asked = True
            self._request.set()
        if not (self._items or self._task.done()):
            self._news = self._loop.create_future()
            timer = None if until is None else self._loop.call_at(until, self._tell)
            try:
                await self._news
            finally:
                if timer is not None:
                    timer.cancel()
        if until is not None and self._loop.time() >= until:
            return _NOTHING_YET
        if self._items:
            self._is_asked = False
            return self._items.pop()
        if self._task.done():
            self._is_open = False
            self._task.result()
        return _NOTHING_YET

    async def close(self, *message: object) -> None:
        if not self._is_open:
            return
        self._is_open = False
        host = asyncio.current_task()
        before = requests(host)
        self._task.cancel(*message)
        try:
            await self._task
        except StopAsyncIteration:
            pass
        except asyncio.CancelledError:
            if requests(host) > before:
                raise

    def abandon(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop may be closed
            self._task.cancel()
