"""A bulkhead: eight branches, but never more than two at once, so they run in four waves.

Run it: python examples/bulkhead.py
"""

import asyncio
from dataclasses import dataclass
from enum import Enum, auto
from typing import Annotated

from cano import JoinConfig, JoinStrategy, Res, Workflow


class State(Enum):
    WORK = auto()
    DONE = auto()


@dataclass(frozen=True)
class Job:
    number: int

    async def run(self, start: Annotated[float, Res("start")]) -> None:
        loop = asyncio.get_running_loop()
        begin = loop.time() - start
        await asyncio.sleep(0.2)
        end = loop.time() - start
        print(f"job {self.number}  {begin:.1f} s to {end:.1f} s  {' ' * round(20 * begin)}####")


async def run_jobs() -> None:
    jobs = [Job(number) for number in range(1, 9)]
    workflow = (
        Workflow[State]()
        .register_split(State.WORK, jobs, JoinConfig(JoinStrategy.All, State.DONE, bulkhead=2))
        .add_exit_state(State.DONE)
    )
    start = asyncio.get_running_loop().time()
    print(await workflow.orchestrate(State.WORK, resources={"start": start}))


def main() -> None:
    asyncio.run(run_jobs())


if __name__ == "__main__":
    main()
