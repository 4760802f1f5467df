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
from ._tasks import Task, name_of, read_signature, refuse_generator

S = TypeVar("S", bound=Hashable)


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

    def _shim(self, config: TaskConfig | None) -> tuple[Callable[..., Any], _core.Plan]:
        name = name_of(self)
        if type(self.concurrency) is not int or self.concurrency < 1:
            raise ConfigurationError(
                f"concurrency of {name} must be an int of at least 1, got {show(self.concurrency)}"
            )
        concurrency = min(self.concurrency, sys.maxsize)
        load, finish = self._method("load", ""), self._method("finish", "outcomes")
        refuse_generator(finish, f"{name}.finish")
        reading, finishing = read_signature(load, f"{name}.load"), read_signature(finish, f"{name}.finish", given=1)
        item = self._item(f"{name}.process_item", config or TaskConfig())
        split_at = len(reading.sources)

        async def run_batch(run: _core.Run, *arguments: Any) -> Any:
            items = await _value(_call(load, arguments[:split_at], reading.keywords))
            if isinstance(items, AsyncIterable):
                result = await run.each(item, None, partial(_feed, items), concurrency)
            elif isinstance(items, Iterable) and not isinstance(items, (str, bytes)):
                result = await run.each(item, iter(items), None, concurrency)
            else:
                raise ConfigurationError(f"{name}.load must return an iterable of items, got {show(items)}")
            del items
            return await _value(_call(finish, (result._outcomes(), *arguments[split_at:]), finishing.keywords))

        sources = [("run", None, None), *reading.sources, *finishing.sources]
        return run_batch, _core.Plan(sources, None, finishing.declared, is_coroutine_function=True)

    def _method(self, name: str, takes: str) -> Callable[..., Any]:
        found = getattr(self, name, None)
        if not callable(found):
            raise ConfigurationError(
                f"{type(self).__qualname__} has no method {name}({takes}), which a BatchTask needs"
            )
        return found  # type: ignore[no-any-return]

    def _item(self, name: str, config: TaskConfig) -> _core.TaskSpec:
        """What is done on each item."""
        process = self._method("process_item", "item")
        refuse_generator(process, name, "an item is processed to one value")
        signature = read_signature(process, name, given=1)
        if any(kind.startswith("joined") for kind, _, _ in signature.sources):
            raise ConfigurationError(f"{name} takes a SplitResult, which only load and finish can get")
        if not isinstance(self.item_retry, RetryMode):
            raise ConfigurationError(f"item_retry of {name_of(self)} must be a RetryMode, got {show(self.item_retry)}")
        limit = _core.seconds(f"item_timeout of {name_of(self)}", self.item_timeout)
        policy = TaskConfig(retry=self.item_retry, retry_on=config.retry_on, attempt_timeout=limit)._policy
        plan = _core.Plan(signature.sources, signature.keywords, None, signature.is_coroutine_function)
        return _core.TaskSpec(process, name, plan, policy)


def _call(method: Callable[..., Any], arguments: tuple[Any, ...], keywords: tuple[str, ...] | None) -> Any:
    """Call with arguments of which the last ones are passed by keyword."""
    if keywords is None:
        return method(*arguments)
    first = len(arguments) - len(keywords)
    return method(*arguments[:first], **dict(zip(keywords, arguments[first:], strict=True)))


async def _value(value: Any) -> Any:
    return await value if inspect.isawaitable(value) else value


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
