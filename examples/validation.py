"""Validation: a broken definition is refused before any task runs, with every problem at once.

The possible next states are read from the return annotations of the tasks.

Run it: python examples/validation.py
"""

from enum import Enum, auto
from typing import Literal

from cano import ConfigurationError, JoinConfig, JoinStrategy, SplitResult, Workflow


class State(Enum):
    VALIDATE = auto()
    PRICE = auto()
    CHARGE = auto()
    SHIP = auto()
    WAIT = auto()
    DONE = auto()
    REJECTED = auto()


async def validate() -> Literal[State.PRICE, State.REJECTED]:
    return State.PRICE


async def quote() -> float:
    return 9.99


async def charge(quotes: SplitResult) -> Literal[State.SHIP]:
    return State.SHIP


async def ship() -> Literal[State.DONE]:
    return State.DONE


async def wait() -> Literal[State.DONE]:
    return State.DONE


def attempt(workflow: Workflow[State], initial: State = State.VALIDATE) -> None:
    try:
        workflow.validate()
        workflow.validate_initial_state(initial)
    except ConfigurationError as error:
        print(error)
    else:
        print(f"{workflow.name} is valid and can start in {initial.name}")


def main() -> None:
    attempt(
        Workflow[State](name="broken")
        .register(State.VALIDATE, validate)  # may return REJECTED, which leads nowhere
        .register_split(State.PRICE, [quote, quote], JoinConfig(JoinStrategy.Quorum(3), State.CHARGE))
        .register(State.CHARGE, charge)  # SHIP is not registered
        .register(State.WAIT, wait)  # nobody goes to WAIT
        .add_exit_state(State.DONE)
    )
    order = (
        Workflow[State](name="order")
        .register(State.VALIDATE, validate)
        .register_split(State.PRICE, [quote, quote], JoinConfig(JoinStrategy.All, State.CHARGE))
        .register(State.CHARGE, charge)
        .register(State.SHIP, ship)
        .add_exit_states([State.DONE, State.REJECTED])
    )
    attempt(order)
    attempt(order, State.WAIT)


if __name__ == "__main__":
    main()
