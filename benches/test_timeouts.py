"""What a time limit of 5 s adds to an attempt that stays within it."""

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from time import thread_time

import pytest

from cano import TaskConfig, Workflow

pytestmark = pytest.mark.benchmark(timer=thread_time)

ATTEMPTS = 1_000

Task = Callable[[], Awaitable[str]]


def returns_at_once() -> Task:
    left = ATTEMPTS

    async def task() -> str:
        nonlocal left
        left = left - 1 or ATTEMPTS
        return "again" if left < ATTEMPTS else "done"

    return task


def suspends_once() -> Task:
    left = ATTEMPTS

    async def task() -> str:
        nonlocal left
        await asyncio.sleep(0)
        left = left - 1 or ATTEMPTS
        return "again" if left < ATTEMPTS else "done"

    return task


def workflow(task: Task, config: TaskConfig | None) -> Task:
    return partial(Workflow[str]().register("again", task, config=config).add_exit_state("done").orchestrate, "again")


def with_asyncio_timeout(task: Task) -> Task:
    async def loop() -> str:
        while True:
            async with asyncio.timeout(5):
                state = await task()
            if state == "done":
                return state

    return loop


def without(task: Task) -> Task:
    async def loop() -> str:
        while True:
            state = await task()
            if state == "done":
                return state

    return loop


@pytest.mark.parametrize("make_task", [returns_at_once, suspends_once])
def test_attempt_timeout(versus, make_task):
    task, config = make_task(), TaskConfig(attempt_timeout=5)
    pairs = {
        "cano": (workflow(task, config), workflow(task, None)),
        "asyncio.timeout": (with_asyncio_timeout(task), without(task)),
    }
    versus.added(f"added to a task that {make_task.__name__.replace('_', ' ')}", pairs, returns="done", per=ATTEMPTS)
