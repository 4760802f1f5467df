"""What the benchmarks of splits are made of: branches, and contenders that run them, down to the list of what they returned."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

Body = Callable[[], Awaitable[int]]
Contender = Callable[[], Awaitable[Any]]

SLEEP = 0.0005
"""Seconds: short, as the loop turns; with many branches the first have slept before the last begins."""


class _Futures:
    """The futures of the next call, made before its time is taken."""

    left: Iterator[asyncio.Future[int]] = iter(())


async def returns_at_once() -> int:
    return 1


async def sleeps() -> int:
    await asyncio.sleep(0)
    return 1


async def awaits_its_future() -> int:
    return await next(_Futures.left)


async def sleeps_for_a_time() -> int:
    await asyncio.sleep(SLEEP)
    return 1


async def sleeps_for_long() -> int:
    await asyncio.sleep(100)
    return 0


async def raises() -> int:
    raise ValueError


KINDS: dict[str, Sequence[Body]] = {
    "return at once": [returns_at_once],
    "sleep(0)": [sleeps],
    "await a future": [awaits_its_future],
    "await a timer": [sleeps_for_a_time],
    "do all of these": [returns_at_once, sleeps, awaits_its_future, sleeps_for_a_time],
}


def bodies(kind: str, branches: int) -> list[Body]:
    """So many branches of a kind; mixed ones take turns."""
    these = KINDS[kind]
    return [these[index % len(these)] for index in range(branches)]


def futures(branches: int, *, resolved: bool = True) -> Callable[[], None]:
    """Prepares a call: makes its futures, and has them resolved by one callback in the loop's second turn from now."""

    def prepare() -> None:
        loop = asyncio.get_running_loop()
        made = [loop.create_future() for _ in range(branches)]
        _Futures.left = iter(made)
        if resolved:
            loop.call_soon(loop.call_soon, resolve, made)

    return prepare


def resolve(made: Sequence[asyncio.Future[int]]) -> None:
    for future in made:
        future.set_result(1)


def futures_of(kind: str, branches: int) -> Callable[[], None] | None:
    """What prepares a call with branches of this kind."""
    return futures(branches) if awaits_its_future in KINDS[kind] else None


# --- contenders ------------------------------------------------------------------------------------------------------


def split(
    engine: ModuleType,
    branches: Sequence[Body],
    *,
    strategy: str = "All",
    bulkhead: Any = None,
    read: Callable[[Any], Any] | None = None,
) -> Contender:
    """A workflow with one split; it returns what `read` makes of the result, by default the list of values."""
    result = None

    def collect(joined: engine.SplitResult) -> str:
        nonlocal result
        result = joined.values() if read is None else read(joined)
        return "done"

    reached = getattr(engine.JoinStrategy, strategy)
    if strategy == "PartialResults":
        reached = reached(len(branches))
    join = engine.JoinConfig(reached, "collect", bulkhead=bulkhead)
    workflow = engine.Workflow().register_split("split", branches, join)
    workflow.register("collect", collect).add_exit_state("done")

    async def run() -> Any:
        await workflow.orchestrate("split")
        return result

    return run


def gather(branches: Sequence[Body]) -> Contender:
    async def run() -> list[int]:
        return await asyncio.gather(*[body() for body in branches])

    return run


def gather_exceptions(branches: Sequence[Body]) -> Contender:
    async def run() -> int:
        return len(await asyncio.gather(*[body() for body in branches], return_exceptions=True))

    return run


def task_group(branches: Sequence[Body]) -> Contender:
    async def run() -> list[int]:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(body()) for body in branches]
        return [task.result() for task in tasks]

    return run


def wait_for_the_first(branches: Sequence[Body]) -> Contender:
    async def run() -> list[int]:
        tasks = [asyncio.create_task(body()) for body in branches]
        done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        return [task.result() for task in done]

    return run


def task_group_until_the_first(branches: Sequence[Body]) -> Contender:
    class FirstError(Exception):
        pass

    async def run() -> list[int]:
        first = []

        async def branch(body: Body) -> None:
            first.append(await body())
            raise FirstError

        try:
            async with asyncio.TaskGroup() as group:
                for body in branches:
                    group.create_task(branch(body))
        except* FirstError:
            pass
        return first

    return run


def cancelled(contender: Contender) -> Contender:
    """The contender in a task of its own, cancelled from outside once all branches wait."""

    async def run() -> str:
        task = asyncio.create_task(contender())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        task.cancel()
        try:
            await task
        except asyncio.CancelledError:
            return "cancelled"
        return "not cancelled"

    return run


def gather_behind_semaphore(branches: Sequence[Body], *, bulkhead: int) -> Contender:
    async def run() -> list[int]:
        semaphore = asyncio.Semaphore(bulkhead)

        async def branch(body: Body) -> int:
            async with semaphore:
                return await body()

        return await asyncio.gather(*[branch(body) for body in branches])

    return run


def pulling_workers(branches: Sequence[Body], *, bulkhead: int) -> Contender:
    async def run() -> list[int]:
        values = [0] * len(branches)
        left = enumerate(branches)

        async def worker() -> None:
            for index, body in left:
                values[index] = await body()

        await asyncio.gather(*[worker() for _ in range(bulkhead)])
        return values

    return run
