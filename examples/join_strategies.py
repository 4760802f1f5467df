"""The six join strategies on the same five branches: when each lets the run go on, and with what.

The branches end 0.1 s after each other; the second one fails.

Run it: python examples/join_strategies.py
"""

import asyncio
from dataclasses import dataclass
from enum import Enum, auto
from typing import Annotated, Literal

from cano import JoinConfig, JoinError, JoinStrategy, Res, SplitResult, Workflow

Start = Annotated[float, Res("start")]

STRATEGIES = (
    JoinStrategy.All,
    JoinStrategy.Any,
    JoinStrategy.Quorum(2),
    JoinStrategy.Percentage(0.8),
    JoinStrategy.PartialResults(3),
    JoinStrategy.PartialTimeout,
)


class State(Enum):
    ASK = auto()
    SHOW = auto()
    DONE = auto()


@dataclass(frozen=True)
class Source:
    """A task as an object: anything with a method run."""

    name: str
    delay: float
    works: bool = True

    async def run(self) -> str:
        await asyncio.sleep(self.delay)
        if not self.works:
            raise ConnectionError(f"{self.name} is down")
        return self.name


SOURCES = (Source("a", 0.1), Source("b", 0.2, works=False), Source("c", 0.3), Source("d", 0.4), Source("e", 0.5))


def show(joined: SplitResult, start: Start) -> Literal[State.DONE]:
    print(
        f"after {elapsed(start)}"
        f"  got {' '.join(joined.values()):8}"
        f"  failed {' '.join(branch.name for branch in joined.errors) or '-'}"
        f"  cancelled {' '.join(SOURCES[index].name for index in joined.cancelled) or '-'}"
    )
    return State.DONE


def elapsed(start: float) -> str:
    return f"{asyncio.get_running_loop().time() - start:.2f} s"


async def compare() -> None:
    for strategy in STRATEGIES:
        timeout = 0.35 if strategy == JoinStrategy.PartialTimeout else None
        workflow = (
            Workflow[State]()
            .register_split(State.ASK, SOURCES, JoinConfig(strategy, State.SHOW, timeout=timeout))
            .register(State.SHOW, show)
            .add_exit_state(State.DONE)
        )
        print(f"{str(strategy).removeprefix('JoinStrategy.'):17}", end=" ", flush=True)
        start = asyncio.get_running_loop().time()
        try:
            await workflow.orchestrate(State.ASK, resources={"start": start})
        except JoinError as error:  # the strategy was not reached: a group of what the branches raised
            print(f"after {elapsed(start)}  {type(error).__name__}: {error.exceptions[0]}")


def main() -> None:
    asyncio.run(compare())


if __name__ == "__main__":
    main()
