"""A stepped task reads page after page; a page that fails is read again, and those before it are not.

Run it: python examples/stepped.py
"""

import asyncio
from enum import Enum, auto
from typing import Literal

from cano import Done, More, SteppedTask, TaskConfig, Workflow


class State(Enum):
    READ = auto()
    DONE = auto()


PAGES: dict[str | None, tuple[str, str | None]] = {
    None: ("anchors", "b"),
    "b": ("bells", "c"),
    "c": ("chains", None),
}


class ReadPages(SteppedTask[State]):
    config = TaskConfig().with_fixed_retry(2, 0.05).with_attempt_timeout(1)  # of each page

    def __init__(self) -> None:
        self.failures: dict[str | None, int] = {"b": 1, "c": 2}

    async def step(self, cursor: str | None) -> More[str] | Done[Literal[State.DONE]]:
        print(f"page {cursor or 'a'}", end=": ")
        await asyncio.sleep(0.01)
        if self.failures.get(cursor):
            self.failures[cursor] -= 1
            print("failed")
            raise ConnectionError
        content, following = PAGES[cursor]
        print(content)
        return Done(State.DONE) if following is None else More(following)


def main() -> None:
    workflow = Workflow[State]().register_stepped(State.READ, ReadPages()).add_exit_state(State.DONE)

    print(asyncio.run(workflow.orchestrate(State.READ)))


if __name__ == "__main__":
    main()
