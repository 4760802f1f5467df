"""Split and join: one state runs three tasks at once, the next gets what they found.

Tasks say what they need in their annotations: a resource by key, or the result of the split.

Run it: python examples/split_join.py
"""

import asyncio
from enum import Enum, auto
from typing import Annotated, Literal

from cano import JoinConfig, JoinStrategy, MemoryStore, Res, SplitResult, Workflow

Store = Annotated[MemoryStore, Res("store")]


class State(Enum):
    LOAD = auto()
    MEASURE = auto()
    REPORT = auto()
    DONE = auto()


async def load(store: Store) -> Literal[State.MEASURE]:
    store.put("numbers", list(range(1, 11)))
    return State.MEASURE


async def total(store: Store) -> int:
    await asyncio.sleep(0.3)  # stands for a query, a request, a file
    numbers: list[int] = store.get("numbers", list)
    return sum(numbers)


async def largest(store: Store) -> int:
    await asyncio.sleep(0.1)
    numbers: list[int] = store.get("numbers", list)
    return max(numbers)


async def mean(store: Store) -> float:
    await asyncio.sleep(0.2)
    numbers: list[int] = store.get("numbers", list)
    return sum(numbers) / len(numbers)


async def report(joined: SplitResult) -> Literal[State.DONE]:
    for branch in joined.successes:  # in the order of registration, whoever was first
        print(f"{branch.name:8} {branch.value:5}  after {branch.elapsed:.1f} s")
    return State.DONE


def main() -> None:
    workflow = (
        Workflow[State]({"store": MemoryStore()})
        .register(State.LOAD, load)
        .register_split(
            State.MEASURE,
            [total, largest, mean],
            JoinConfig(JoinStrategy.All, State.REPORT, timeout=5),
        )
        .register(State.REPORT, report)
        .add_exit_state(State.DONE)
    )

    print(asyncio.run(workflow.orchestrate(State.LOAD)))


if __name__ == "__main__":
    main()
