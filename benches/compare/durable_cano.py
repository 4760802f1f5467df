"""Durable steps of cano on SQLite: seconds per step, of so many runs through ten states at once.

Run it: python benches/compare/durable_cano.py 1000
"""

import asyncio
import sys
import tempfile
from collections.abc import Awaitable, Callable
from time import perf_counter

from cano import SqliteCheckpointStore, Workflow

STEPS = 10


def leading_to(state: int) -> Callable[[], Awaitable[int]]:
    async def step() -> int:
        return state

    step.__qualname__ = f"to {state}"
    return step


async def measure(runs: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        async with SqliteCheckpointStore(f"{folder}/runs.db") as store:
            workflow = Workflow[int](name="bench")
            for state in range(STEPS):
                workflow.register(state, leading_to(state + 1))
            workflow.add_exit_state(STEPS).with_checkpoint_store(store)
            await workflow.orchestrate(0, workflow_id="first")
            began = perf_counter()
            await asyncio.gather(*(workflow.orchestrate(0, workflow_id=str(run)) for run in range(runs)))
            return (perf_counter() - began) / (runs * STEPS)


if __name__ == "__main__":
    print(asyncio.run(measure(int(sys.argv[1]))))
