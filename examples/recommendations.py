"""Under a deadline: four engines recommend something, and after half a second the page shows what there is.

PartialTimeout goes on when all have ended, or when the time is up; an engine that fails or is late only leaves a gap.

Run it: python examples/recommendations.py
"""

import asyncio
from dataclasses import dataclass
from enum import Enum, auto
from typing import Literal

from cano import JoinConfig, JoinStrategy, SplitResult, Workflow


class State(Enum):
    RECOMMEND = auto()
    MERGE = auto()
    DONE = auto()


@dataclass(frozen=True)
class Engine:
    name: str
    takes: float
    titles: list[str]

    async def run(self) -> list[str]:
        await asyncio.sleep(self.takes)  # stands for a request
        if not self.titles:
            raise ConnectionError(f"{self.name} is down")
        return self.titles


ENGINES = [
    Engine("collaborative", 0.3, ["Dune", "Solaris"]),
    Engine("content-based", 0.1, []),
    Engine("trending", 0.05, ["Solaris", "Momo"]),
    Engine("personalized", 0.9, ["Ubik"]),
]


async def merge(answers: SplitResult) -> Literal[State.DONE]:
    for answer in answers.successes:
        print(f"{answer.name:13}  after {answer.elapsed:.2f} s: {', '.join(answer.value)}")
    for failure in answers.errors:
        print(f"{failure.name:13}  failed: {failure.error}")
    for index in answers.cancelled:
        print(f"{ENGINES[index].name:13}  was too slow")
    titles = dict.fromkeys(title for titles in answers.values() for title in titles)
    print(f"you may like {', '.join(titles)}")
    return State.DONE


def main() -> None:
    workflow = (
        Workflow[State]()
        .register_split(State.RECOMMEND, ENGINES, JoinConfig(JoinStrategy.PartialTimeout, State.MERGE, timeout=0.5))
        .register(State.MERGE, merge)
        .add_exit_state(State.DONE)
    )

    print(asyncio.run(workflow.orchestrate(State.RECOMMEND)))


if __name__ == "__main__":
    main()
