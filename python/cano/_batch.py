"""Batches: one task that works through many items, so many at once.

The items are branches of a split that is fed: each is started when there is room for it, so that of a million only those in
flight exist. A list, a generator and any other iterable are asked by the driver; an asynchronous one is read by a coroutine
that runs beside the items.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import AsyncIterable, Awaitable, Callable, Hashable, Iterable
from functools import partial
from typing import Any, TypeVar

from . import _core
from ._config import Seconds, TaskConfig
from ._core import RetryMode
from ._errors import ConfigurationError, show
from ._methods import Method, outcome, plan_of
from ._tasks import Form, Task

S = TypeVar("S", bound=Hashable)

_LOAD = Form(yields=True, iterates=True)
_PROCESS = Form(("item",))
_FINISH = Form(("outcomes",))


class BatchTask(Task[S]):
    """A task that loads items, processes each, and finishes with what came of them.

    load -> process_item for each item, at most `concurrency` at once -> finish, whose value is the next state

    The three methods may be async or plain. ``load()`` returns the items, as any iterable or asynchronous iterable; it may
    itself be a generator. ``process_item(item)`` returns a value or raises: an item that fails fills its own place, and the
    batch goes on. ``finish(outcomes)`` gets one `BranchOutcome` for each item, in the order of the items, whatever the order
    in which they ended. After these, each method may take parameters that are filled in as those of any task.

    Items are asked for when there is room: at most `concurrency` are in flight, and of an asynchronous iterable one more is
    kept ready. Items that end at once let the loop have a turn after 1,024 of them. Each item runs with a copy of the context
    that the task had when it loaded, and with a `RunContext` whose ``branch`` is its index. What is iterated is closed when
    nothing more is wanted of it, by its ``close`` or ``aclose``, as generators, files and cursors have one.

    What `load` raises, while the items are read as well, cancels the items in flight and fails the task. A retry of the task
    (`config`) loads and processes everything again; `item_retry` repeats one item. An item that cancels itself has failed
    with a `TaskExecutionError`; a `BaseException` of an item is no outcome, it ends the run.

    Attributes:
        concurrency: How many items may be in flight at once, 1 or more.
        item_retry: How often and after which delay a failed item is repeated. What is worth a retry is said by ``retry_on``
            of `config`.
        item_timeout: Seconds that one attempt of an item may take; None is no limit.

    Raises:
        ConfigurationError: When it is registered: an attribute is out of range, or a method is missing or asks for something
            that cannot be filled in.

    Cancellation: the items in flight are cancelled and awaited, what is iterated is closed, and `finish` is not called.

    Example:
        >>> class Total(BatchTask[str]):
        ...     concurrency = 10
        ...
        ...     def load(self) -> range:
        ...         return range(100)
        ...
        ...     async def process_item(self, item: int) -> int:
        ...         return item * item
        ...
        ...     def finish(self, outcomes: list[BranchOutcome]) -> str:
        ...         print(sum(outcome.value for outcome in outcomes))
        ...         return "done"
        >>> import asyncio
        >>> asyncio.run(Workflow[str]().register("total", Total()).add_exit_state("done").orchestrate("total"))
        328350
        'done'
    """

    concurrency: int = 1
    item_retry: RetryMode = RetryMode.none()
    item_timeout: Seconds | None = None


class Batch:
    """The loop of one batch task."""

    def __init__(self, task: Any, name: str, config: TaskConfig) -> None:
        self.name = name
        concurrency = getattr(task, "concurrency", 1)
        if type(concurrency) is not int or concurrency < 1:
            raise ConfigurationError(f"concurrency of {name} must be an int of at least 1, got {show(concurrency)}")
        self.concurrency = min(concurrency, sys.maxsize)
        self.load, self.finish = Method.of(task, name, "load", _LOAD), Method.of(task, name, "finish", _FINISH)
        self.item = self._item(task, config)

    def _item(self, task: Any, config: TaskConfig) -> _core.TaskSpec:
        """What is done on each item: a task of its own."""
        name = f"{self.name}.process_item"
        process = Method.of(task, self.name, "process_item", _PROCESS)
        sources, keywords, _, _ = process.reading
        if any(kind.startswith(("joined", "caught")) for kind, _, _ in sources):
            raise ConfigurationError(f"task {name} takes what led into the state, which only load and finish can get")
        retry = getattr(task, "item_retry", RetryMode.none())
        if not isinstance(retry, RetryMode):
            raise ConfigurationError(f"item_retry of {self.name} must be a RetryMode, got {show(retry)}")
        limit = _core.seconds(f"item_timeout of {self.name}", getattr(task, "item_timeout", None))
        policy = TaskConfig(retry=retry, retry_on=config.retry_on, attempt_timeout=limit)._policy
        plan = _core.Plan(sources, keywords, None, inspect.iscoroutinefunction(process.call))
        return _core.TaskSpec(process.call, name, plan, policy)

    def spec(self, config: TaskConfig) -> _core.TaskSpec:
        """The one task that the batch becomes."""
        plan = plan_of((self.load, self.finish), (self.finish,), leads_with=("run",))
        return _core.TaskSpec(self.run, self.name, plan, config._policy)

    async def run(self, run: _core.Run, *filled: Any) -> Any:
        arguments = iter(filled)
        load, finish = self.load.bind(arguments), self.finish.bind(arguments)
        items = await outcome(load())
        if isinstance(items, AsyncIterable):
            result = await run.each(self.item, None, partial(_feed, items), self.concurrency)
        elif isinstance(items, Iterable) and not isinstance(items, (str, bytes)):
            result = await run.each(self.item, iter(items), None, self.concurrency)
        else:
            raise ConfigurationError(f"{self.name}.load must return an iterable of items, got {show(items)}")
        del items
        return await outcome(finish(result._outcomes()))


async def _feed(items: AsyncIterable[Any], split: _core.Split) -> None:
    """Push the items as they come; wait where the split has no room."""
    iterator = aiter(items)
    try:
        async for item in iterator:
            if (room := split.push(item)) is not None:
                await room
    finally:
        aclose: Callable[[], Awaitable[None]] | None = getattr(iterator, "aclose", None)
        if aclose is not None:
            await aclose()
