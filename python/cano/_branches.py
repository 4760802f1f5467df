"""What the native tasks of branches need from Python: the driver imports it with the first split."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Coroutine, Generator
from types import SimpleNamespace
from typing import Any


def await_branch(branch: Any) -> Generator[Any, None, Any]:
    """The steps of ``await branch``: those of a future."""
    if not branch.done():
        branch._asyncio_future_blocking = True
        yield branch
    if not branch.done():
        raise RuntimeError("await wasn't used with future")
    return branch.result()


def scratch_task(
    base: type[asyncio.Task[None]],
) -> tuple[asyncio.Task[None], Coroutine[Any, Any, None], contextvars.Context]:
    """A task on no loop that never runs, with its coroutine and its context, for whoever looks how a task is laid out."""

    async def nothing() -> None: ...

    loop: Any = SimpleNamespace(get_debug=lambda: False, call_soon=lambda *_, **__: None)
    coroutine, context = nothing(), contextvars.copy_context()
    task = base(coroutine, loop=loop, context=context)
    task._log_destroy_pending = False  # type: ignore[attr-defined]
    coroutine.close()
    return task, coroutine, context
