"""Tasks made at run time: one state loads records, the next splits into a task for each, and three quarters are enough.

Run it: python examples/dynamic_tasks.py
"""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto
from typing import Annotated, Literal

from cano import JoinConfig, JoinStrategy, MemoryStore, Res, SplitResult, Workflow

Store = Annotated[MemoryStore, Res("store")]


class State(Enum):
    LOAD = auto()
    PROCESS = auto()
    AGGREGATE = auto()
    DONE = auto()


async def load(store: Store) -> Literal[State.PROCESS]:
    store.put("records", list(range(1, 101)))
    return State.PROCESS


@dataclass(frozen=True)
class ProcessRecord:
    record: int

    async def run(self) -> int:
        await asyncio.sleep(self.record / 1000)  # stands for the work
        if self.record % 10 == 0:
            raise ValueError(f"record {self.record} is broken")
        return self.record * 2


def process_each(store: Store) -> Iterator[ProcessRecord]:
    for record in store.get("records", list):
        yield ProcessRecord(record)


async def aggregate(processed: SplitResult) -> Literal[State.DONE]:
    print(f"total of {len(processed.successes)} records: {sum(processed.values())}")
    print(f"{len(processed.errors)} failed, {len(processed.cancelled)} were not needed any more")
    return State.DONE


def main() -> None:
    workflow = (
        Workflow[State]({"store": MemoryStore()})
        .register(State.LOAD, load)
        .register_split(
            State.PROCESS,
            process_each,
            JoinConfig(JoinStrategy.Percentage(0.75), State.AGGREGATE, timeout=10, bulkhead=20),
        )
        .register(State.AGGREGATE, aggregate)
        .add_exit_state(State.DONE)
    )

    print(asyncio.run(workflow.orchestrate(State.LOAD)))


if __name__ == "__main__":
    main()
