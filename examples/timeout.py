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
    """Get faster with every attempt: 0.4 s, 0.2 s, 0.13 s."""
    delay = 0.4 / context.attempt
    print(f"  fetch, attempt {context.attempt}: takes {delay:.2f} s, may take 0.15 s")
    await asyncio.sleep(delay)
    return State.STORE


async def store(context: RunContext) -> Literal[State.DONE]:
    print(f"  store: {context.remaining():.1f} s left of the run")
    await asyncio.sleep(0.3)
    return State.DONE


async def run_both() -> None:
    workflow = (
        Workflow[State]()
        .register(State.FETCH, fetch, config=TaskConfig().with_fixed_retry(3, 0.05).with_attempt_timeout(0.15))
        .register(State.STORE, store)
        .add_exit_state(State.DONE)
        .with_timeout(2)
    )
    print("a run of up to 2 s:")
    print(f"  {await workflow.orchestrate(State.FETCH)}")
    print("the same, of up to 0.6 s:")
    try:
        await workflow.orchestrate(State.FETCH, timeout=0.6)
    except WorkflowTimeoutError as error:
        print(f"  {error}")
        print(f"  it was in state {error.state}, after {error.elapsed:.1f} s")


def main() -> None:
    asyncio.run(run_both())


if __name__ == "__main__":
    main()
