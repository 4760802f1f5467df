"""Two kinds of timeout: of one attempt, which a retry gets over, and of the whole run, which ends it.

Run it: python examples/timeout.py
"""

import asyncio
from enum import Enum, auto
from typing import Literal

from cano import RunContext, TaskConfig, Workflow, WorkflowTimeoutError


class State(Enum):
    FETCH = auto()
    STORE = auto()
    DONE = auto()


async def fetch(context: RunContext) -> Literal[State.STORE]:
    delay = 1.0 if context.attempt < 3 else 0.05
    print(f"  fetch, attempt {context.attempt}: would take {delay} s, may take 0.2 s")
    await asyncio.sleep(delay)
    return State.STORE


async def store(context: RunContext) -> Literal[State.DONE]:
    print(f"  store: takes 0.5 s, {context.remaining():.1f} s are left of the run")
    await asyncio.sleep(0.5)
    return State.DONE


async def run_both() -> None:
    workflow = (
        Workflow[State]()
        .register(State.FETCH, fetch, config=TaskConfig().with_fixed_retry(3, 0.05).with_attempt_timeout(0.2))
        .register(State.STORE, store)
        .add_exit_state(State.DONE)
        .with_timeout(2)
    )
    print("a run that may take 2 s:")
    print(f"  {await workflow.orchestrate(State.FETCH)}")
    print("the same, but it may take 0.8 s:")
    try:
        await workflow.orchestrate(State.FETCH, timeout=0.8)
    except WorkflowTimeoutError as error:
        print(f"  {type(error).__name__} in {error.state}: {error}")


def main() -> None:
    asyncio.run(run_both())


if __name__ == "__main__":
    main()
