"""The smallest workflow: two states with a task each, and the state that ends it.

Run it: python examples/hello.py
"""

import asyncio
from enum import Enum, auto
from typing import Literal

from cano import Workflow


class State(Enum):
    HELLO = auto()
    WORLD = auto()
    DONE = auto()


async def hello() -> Literal[State.WORLD]:
    print("hello,")
    return State.WORLD


def world() -> Literal[State.DONE]:  # a task that does not wait for anything may be a plain function
    print("world")
    return State.DONE


def main() -> None:
    workflow = Workflow[State]()
    workflow.register(State.HELLO, hello)
    workflow.register(State.WORLD, world)
    workflow.add_exit_state(State.DONE)

    print(asyncio.run(workflow.orchestrate(State.HELLO)))


if __name__ == "__main__":
    main()
