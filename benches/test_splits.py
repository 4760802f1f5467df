"""A split into branches and their join, down to the list of what the branches returned."""

import asyncio
from collections.abc import Awaitable, Callable
from time import thread_time
from types import ModuleType

import pytest

import cano
from benches import pure_python

pytestmark = [pytest.mark.benchmark(timer=thread_time), pytest.mark.timeout(60)]

Body = Callable[[], Awaitable[int]]
Contender = Callable[[], Awaitable[list[int]]]

waiting: list[asyncio.Future[int]] = []


async def returns_at_once() -> int:
    return 1


async def sleeps() -> int:
    await asyncio.sleep(0)
    return 1


async def waits() -> int:
    loop = asyncio.get_running_loop()
    future = loop.create_future()
    if not waiting:
        loop.call_soon(resolve)
    waiting.append(future)
    return await future


def resolve() -> None:
    for future in waiting:
        future.set_result(1)
    waiting.clear()


BODIES = {"return at once": returns_at_once, "sleep(0)": sleeps, "await a future": waits}


def split(engine: ModuleType, body: Body, branches: int, *, bulkhead: int | None = None) -> Contender:
    values: list[int] = []

    def collect(joined: engine.SplitResult) -> str:
        values[:] = joined.values()
        return "done"

    join = engine.JoinConfig(engine.JoinStrategy.All, "collect", bulkhead=bulkhead)
    workflow = engine.Workflow().register_split("split", [body] * branches, join)
    workflow.register("collect", collect).add_exit_state("done")

    async def run() -> list[int]:
        await workflow.orchestrate("split")
        return values

    return run


def gather(body: Body, branches: int) -> Contender:
    async def run() -> list[int]:
        return await asyncio.gather(*[body() for _ in range(branches)])

    return run


def task_group(body: Body, branches: int) -> Contender:
    async def run() -> list[int]:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(body()) for _ in range(branches)]
        return [task.result() for task in tasks]

    return run


def gather_behind_semaphore(body: Body, branches: int, *, bulkhead: int) -> Contender:
    async def run() -> list[int]:
        semaphore = asyncio.Semaphore(bulkhead)

        async def branch() -> int:
            async with semaphore:
                return await body()

        return await asyncio.gather(*[branch() for _ in range(branches)])

    return run


def pulling_workers(body: Body, branches: int, *, bulkhead: int) -> Contender:
    async def run() -> list[int]:
        values = [0] * branches
        indices = iter(range(branches))

        async def worker() -> None:
            for index in indices:
                values[index] = await body()

        await asyncio.gather(*[worker() for _ in range(bulkhead)])
        return values

    return run


@pytest.mark.parametrize("branches", [3, 10, 100, 1_000, 10_000])
@pytest.mark.parametrize("what", BODIES)
def test_split(versus, what, branches):
    body = BODIES[what]
    contenders = {
        "cano": split(cano, body, branches),
        "asyncio.gather": gather(body, branches),
        "asyncio.TaskGroup": task_group(body, branches),
        "pure Python": split(pure_python, body, branches),
    }
    calls = max(1, 500 // branches)
    versus(f"{branches:,} branches that {what}", contenders, returns=[1] * branches, calls=calls, per=branches)


def test_bulkhead(versus):
    branches = 10_000
    contenders = {
        "cano": split(cano, sleeps, branches, bulkhead=100),
        "semaphore + gather": gather_behind_semaphore(sleeps, branches, bulkhead=100),
        "pure Python": split(pure_python, sleeps, branches, bulkhead=100),
        "workers that pull": pulling_workers(sleeps, branches, bulkhead=100),
    }
    versus("10,000 that sleep(0), bulkhead 100", contenders, returns=[1] * branches, per=branches)
