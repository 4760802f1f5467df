"""A batch of 10,000 items, 100 at once, down to the list of what they returned."""

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable
from time import thread_time
from typing import Any

import pytest

from cano import BatchTask, BranchOutcome, RetryMode, Workflow

pytestmark = [pytest.mark.benchmark(timer=thread_time), pytest.mark.timeout(60)]

ITEMS = 10_000
CONCURRENCY = 100
RETRIES = 3

Work = Callable[[int], Awaitable[int]]
Contender = Callable[[], Awaitable[list[int]]]


async def returns_at_once(item: int) -> int:
    return 1


async def sleeps(item: int) -> int:
    await asyncio.sleep(0)
    return 1


KINDS: dict[str, Work] = {"return at once": returns_at_once, "sleep(0)": sleeps}


async def comes_by_and_by() -> AsyncIterator[int]:
    for item in range(ITEMS):
        yield item


def batch(
    work: Work, load: Callable[[], Iterable[int] | AsyncIterable[int]] = lambda: range(ITEMS), **options: Any
) -> Contender:
    """A workflow of one batch; it returns the values."""
    values: list[int] = []

    class Batch(BatchTask[str]):
        concurrency = CONCURRENCY

        def finish(self, outcomes: list[BranchOutcome]) -> str:
            values[:] = [outcome.value for outcome in outcomes]
            return "done"

    task = Batch()
    vars(task).update(options, load=load, process_item=work)
    workflow = Workflow[str]().register("batch", task).add_exit_state("done")

    async def run() -> list[int]:
        await workflow.orchestrate("batch")
        return values

    return run


def gather_behind_semaphore(work: Work) -> Contender:
    async def run() -> list[int]:
        semaphore = asyncio.Semaphore(CONCURRENCY)

        async def process(item: int) -> int:
            async with semaphore:
                return await work(item)

        return await asyncio.gather(*[process(item) for item in range(ITEMS)])

    return run


def pulling_workers(work: Work) -> Contender:
    async def run() -> list[int]:
        values = [0] * ITEMS
        left = enumerate(range(ITEMS))

        async def worker() -> None:
            for index, item in left:
                values[index] = await work(item)

        await asyncio.gather(*[worker() for _ in range(CONCURRENCY)])
        return values

    return run


def semaphore_before_each_task(work: Work) -> Contender:
    """What reads an asynchronous iterable no further than there is room."""

    async def run() -> list[int]:
        semaphore = asyncio.Semaphore(CONCURRENCY)

        async def process(item: int) -> int:
            try:
                return await work(item)
            finally:
                semaphore.release()

        tasks = []
        async with asyncio.TaskGroup() as group:
            async for item in comes_by_and_by():
                await semaphore.acquire()
                tasks.append(group.create_task(process(item)))
        return [task.result() for task in tasks]

    return run


def retried(work: Work) -> Work:
    async def process(item: int) -> int:
        for attempt in range(RETRIES + 1):
            try:
                return await work(item)
            except Exception:
                if attempt == RETRIES:
                    raise
                await asyncio.sleep(0.1)
        raise AssertionError

    return process


def limited(work: Work) -> Work:
    async def process(item: int) -> int:
        async with asyncio.timeout(5):
            return await work(item)

    return process


@pytest.mark.parametrize("kind", KINDS)
def test_batch(versus, kind):
    work = KINDS[kind]
    contenders = {
        "cano": batch(work),
        "semaphore + gather": gather_behind_semaphore(work),
        "workers that pull": pulling_workers(work),
    }
    versus(f"10,000 items that {kind}, 100 at once", contenders, returns=[1] * ITEMS, per=ITEMS)


@pytest.mark.parametrize("kind", KINDS)
def test_async_iterable(versus, kind):
    work = KINDS[kind]
    contenders = {"cano": batch(work, comes_by_and_by), "semaphore + TaskGroup": semaphore_before_each_task(work)}
    versus(f"10,000 of an async iterable that {kind}", contenders, returns=[1] * ITEMS, per=ITEMS)


@pytest.mark.parametrize("kind", KINDS)
def test_item_retry(versus, kind):
    work = KINDS[kind]
    contenders = {
        "cano": batch(work, item_retry=RetryMode.fixed(RETRIES, 0.1)),
        "semaphore + gather + loop": gather_behind_semaphore(retried(work)),
    }
    versus(f"10,000 with item_retry that {kind}", contenders, returns=[1] * ITEMS, per=ITEMS)


@pytest.mark.parametrize("kind", KINDS)
def test_item_timeout(versus, kind):
    work = KINDS[kind]
    contenders = {
        "cano": batch(work, item_timeout=5),
        "semaphore + gather + asyncio.timeout": gather_behind_semaphore(limited(work)),
    }
    versus(f"10,000 with item_timeout that {kind}", contenders, returns=[1] * ITEMS, per=ITEMS)
