"""A write to five replicas, of which three must confirm: the slowest two are not waited for.

With `fail_fast` the write is given up as soon as three can no longer confirm.

Run it: python examples/replica_writes.py
"""

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum, auto
from typing import Literal

from cano import JoinConfig, JoinError, JoinStrategy, SplitResult, Workflow


class State(Enum):
    WRITE = auto()
    CONFIRM = auto()
    WRITTEN = auto()


@dataclass(frozen=True)
class WriteReplica:
    number: int
    is_up: bool

    async def run(self) -> int:
        await asyncio.sleep(self.number * 0.05)  # stands for a request
        if not self.is_up:
            raise ConnectionError(f"replica {self.number} is down")
        return self.number


async def confirm(writes: SplitResult) -> Literal[State.WRITTEN]:
    print(f"  written to {', '.join(map(str, writes.values()))}; {len(writes.errors)} failed")
    # A cancelled write may have arrived: the replica finds out when it catches up.
    print(f"  {len(writes.cancelled)} not waited for")
    return State.WRITTEN


async def write(down: Iterable[int]) -> None:
    workflow = (
        Workflow[State]()
        .register_split(
            State.WRITE,
            [WriteReplica(number, number not in down) for number in range(1, 6)],
            JoinConfig(JoinStrategy.Quorum(3), State.CONFIRM, timeout=5, fail_fast=True),
        )
        .register(State.CONFIRM, confirm)
        .add_exit_state(State.WRITTEN)
    )
    try:
        print(f"  {await workflow.orchestrate(State.WRITE)}")
    except JoinError as error:
        print(f"  not written: {', '.join(map(str, error.exceptions))}")


async def write_thrice() -> None:
    for down in ([], [2], [1, 3, 4]):
        print(f"replicas that are down: {down}")
        await write(down)


def main() -> None:
    asyncio.run(write_thrice())


if __name__ == "__main__":
    main()
