"""A bulkhead: eight branches, but never more than two at once, so they run in four waves.

Run it: python examples/bulkhead.py
"""

import asyncio
from dataclasses import dataclass
from enum import Enum, auto
from time import monotonic

from cano import JoinConfig, JoinStrategy, Workflow

START = monotonic()


class State(Enum):
    WORK = auto()
    DONE = auto()


@dataclass(frozen=True)
class Job:
    number: int

    async def run(self) -> None:
        begin = monotonic() - START
        await asyncio.sleep(0.2)
        end = monotonic() - START
        print(f"job {self.number}  {begin:.1f} s to {end:.1f} s  {' ' * round(20 * begin)}####")


def main() -> None:
    workflow = (
        Workflow[State]()
        .register_split(
            State.WORK,
            [Job(number) for number in range(1, 9)],
            JoinConfig(JoinStrategy.All, State.DONE, bulkhead=2),
        )
        .add_exit_state(State.DONE)
    )

    print(asyncio.run(workflow.orchestrate(State.WORK)))


if __name__ == "__main__":
    main()
