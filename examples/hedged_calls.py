"""Redundant API calls: the same question to three replicas, each next one only if the newest is slow or one has failed.

Where `JoinStrategy.Any` alone would always ask all of them, hedging mostly asks one.

Run it: python examples/hedged_calls.py
"""

import asyncio
from dataclasses import dataclass
from enum import Enum, auto
from typing import Annotated, Literal

from cano import JoinConfig, JoinError, JoinStrategy, Res, SplitResult, Workflow

Weather = dict[str, float]
"""How long each replica takes to answer, in seconds; below zero: to fail."""


class State(Enum):
    ASK = auto()
    SHOW = auto()
    DONE = auto()


@dataclass(frozen=True)
class Replica:
    name: str

    async def run(self, weather: Annotated[Weather, Res("weather")], asked: Annotated[list[str], Res("asked")]) -> str:
        asked.append(self.name)
        takes = weather[self.name]
        await asyncio.sleep(abs(takes))  # an HTTP request in real life; a loser's is cancelled
        if takes < 0:
            raise ConnectionError(f"{self.name} is down")
        return self.name


def show(joined: SplitResult) -> Literal[State.DONE]:
    print(f"{joined.values()[0]} answered ", end="")
    return State.DONE


REPLICAS = [Replica("near"), Replica("far"), Replica("spare")]
WORKFLOW = (
    Workflow[State]()
    .register_split(State.ASK, REPLICAS, JoinConfig(JoinStrategy.Any, State.SHOW, timeout=2, hedge_after=0.1))
    .register(State.SHOW, show)
    .add_exit_state(State.DONE)
)

DAYS: dict[str, Weather] = {
    "a good day": {"near": 0.05, "far": 0.1, "spare": 0.1},
    "near is slow": {"near": 0.5, "far": 0.05, "spare": 0.1},
    "near is down": {"near": -0.02, "far": 0.05, "spare": 0.1},
    "two are slow": {"near": 0.5, "far": 0.5, "spare": 0.1},
    "all are down": {"near": -0.02, "far": -0.05, "spare": -0.05},
}


async def ask_every_day() -> None:
    loop = asyncio.get_running_loop()
    for day, weather in DAYS.items():
        asked: list[str] = []
        start = loop.time()
        print(f"{day}: ", end="")
        try:
            await WORKFLOW.orchestrate(State.ASK, resources={"weather": weather, "asked": asked})
        except JoinError as error:
            print(f"{len(error.exceptions)} errors ", end="")
        print(f"after {loop.time() - start:.2f} s, asked: {', '.join(asked)}")


def main() -> None:
    asyncio.run(ask_every_day())


if __name__ == "__main__":
    main()
