"""A queue consumer: takes up to ten jobs, works on four of them at a time, and comes back until the queue is drained.

A job that fails for good is set aside, and the others go on. The queue is a Redis list if a server is named, else one in
memory. What has been taken from the list is lost if the process dies; a queue that must not lose a job moves it to a
second list (LMOVE) until it is done.

Run it: python examples/queue_consumer.py          (or with a server: --redis redis://localhost)
"""

import argparse
import asyncio
from enum import Enum, auto
from typing import Annotated, Any, Literal, Protocol, runtime_checkable

from cano import BatchTask, BranchOutcome, MemoryStore, Res, Resource, RetryMode, Workflow


class State(Enum):
    CONSUME = auto()
    DRAINED = auto()


@runtime_checkable
class Queue(Protocol):
    async def put(self, job: str) -> None: ...
    async def take(self, most: int) -> list[str]: ...
    async def set_aside(self, job: str) -> None: ...


class MemoryQueue:
    def __init__(self) -> None:
        self.waiting: asyncio.Queue[str] = asyncio.Queue()

    async def put(self, job: str) -> None:
        await self.waiting.put(job)

    async def take(self, most: int) -> list[str]:
        return [self.waiting.get_nowait() for _ in range(min(most, self.waiting.qsize()))]

    async def set_aside(self, job: str) -> None:
        print(f"  set aside: {job}")


class RedisQueue(Resource):
    def __init__(self, url: str) -> None:
        from redis.asyncio import Redis  # noqa: PLC0415 - only who names a server needs it

        self.redis: Any = Redis.from_url(url, decode_responses=True)

    async def put(self, job: str) -> None:
        await self.redis.rpush("jobs", job)

    async def take(self, most: int) -> list[str]:
        return await self.redis.lpop("jobs", most) or []

    async def set_aside(self, job: str) -> None:
        await self.redis.rpush("jobs:failed", job)
        print(f"  set aside: {job}")

    async def teardown(self) -> None:
        await self.redis.aclose()


TheQueue = Annotated[Queue, Res("queue")]
Store = Annotated[MemoryStore, Res("store")]


class Consume(BatchTask[State]):
    concurrency = 4
    item_retry = RetryMode.fixed(2, 0.05)
    item_timeout = 1

    async def load(self, queue: TheQueue, store: Store) -> list[str]:
        jobs = await queue.take(10)
        store.put("jobs", jobs)
        return jobs

    async def process_item(self, job: str) -> None:
        await asyncio.sleep(0.02)  # stands for the work
        if not job.endswith(".jpg"):
            raise ValueError(f"{job} is no picture")

    async def finish(
        self, outcomes: list[BranchOutcome], queue: TheQueue, store: Store
    ) -> Literal[State.CONSUME, State.DRAINED]:
        print(f"{len(outcomes):2} jobs, {sum(outcome.error is None for outcome in outcomes)} done")
        for job, outcome in zip(store.get("jobs", list), outcomes, strict=True):
            if outcome.error is not None:
                await queue.set_aside(job)
        return State.CONSUME if outcomes else State.DRAINED


async def consume(queue: Queue) -> None:
    for number in range(1, 26):
        await queue.put(f"scan-{number:02}.{'txt' if number % 9 == 0 else 'jpg'}")

    workflow = Workflow[State]({"queue": queue, "store": MemoryStore()})
    workflow.register(State.CONSUME, Consume()).add_exit_state(State.DRAINED)

    print(await workflow.orchestrate(State.CONSUME))


def main() -> None:
    parser = argparse.ArgumentParser(description="Consume a queue until it is drained.")
    parser.add_argument("--redis", metavar="URL", help="the Redis server that has the queue")
    options = parser.parse_args()

    asyncio.run(consume(RedisQueue(options.redis) if options.redis else MemoryQueue()))


if __name__ == "__main__":
    main()
