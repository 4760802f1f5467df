"""Waiting for a checkpoint store, which nobody may interrupt: only its answer tells what it holds."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from . import _core

T = TypeVar("T")


async def settled(answer: Awaitable[T]) -> T:
    """The answer of a store; a cancel goes on once it is there."""
    future = asyncio.ensure_future(answer)
    cancelled: asyncio.CancelledError | None = None
    try:
        while not future.done():
            try:
                await asyncio.wait((future,))
            except asyncio.CancelledError as error:
                cancelled = error  # the newest one leaves; an anyio scope cancels in every turn of the loop
        if cancelled is None:
            return future.result()
        if not future.cancelled() and (failure := future.exception()) is not None:
            cancelled.__context__ = failure
        raise cancelled
    finally:
        del cancelled


async def written(log: _core.Log, answer: Awaitable[None]) -> None:
    """A row of the log, once the store has it or has refused it; a cancel goes on then."""
    future = asyncio.ensure_future(answer)
    try:
        await settled(future)
    finally:
        failure = asyncio.CancelledError() if future.cancelled() else future.exception()
        if failure is None:
            log.landed()
        else:
            log.refused(failure)
