"""Waiting for somebody else: a router looks first, a timer pauses once, a poll task asks until the report is ready.

Run it: python examples/poll.py
"""

import asyncio
import logging
from dataclasses import dataclass
from enum import Enum, auto
from typing import Annotated, Literal

from cano import After, Pending, PollErrorPolicy, PollTask, Ready, Res, RouterTask, TaskConfig, TimerTask, Workflow


class State(Enum):
    LOOK = auto()
    PAUSE = auto()
    ASK = auto()
    READ = auto()
    DONE = auto()


@dataclass
class Service:
    """Somebody's server: busy at the second request, and ready with the report at the fourth."""

    requests: int = 0

    async def status(self) -> str:
        self.requests += 1
        await asyncio.sleep(0.01)
        if self.requests == 2:
            raise ConnectionError("busy")
        return "ready" if self.requests == 4 else "working"


Remote = Annotated[Service, Res("service")]


class Look(RouterTask[State]):
    async def route(self, service: Remote) -> Literal[State.PAUSE, State.READ]:
        status = await service.status()
        print(f"look: {status}")
        return State.READ if status == "ready" else State.PAUSE


class Pause(TimerTask[State]):
    def wait(self) -> After:
        print("pause for 0.1 s")
        return After(0.1)

    def after_wait(self) -> Literal[State.ASK]:
        return State.ASK


class Ask(PollTask[State]):
    on_poll_error = PollErrorPolicy.RetryOnError(2)
    config = TaskConfig(attempt_timeout=10)  # of all the requests together

    async def poll(self, service: Remote) -> Ready[Literal[State.READ]] | Pending:
        print(f"request {service.requests + 1}")
        return Ready(State.READ) if await service.status() == "ready" else Pending(0.05)


def read() -> Literal[State.DONE]:
    print("the report is here")
    return State.DONE


def main() -> None:
    logging.getLogger("cano").setLevel(logging.ERROR)  # the request that failed is a warning there
    workflow = (
        Workflow[State]({"service": Service()})
        .register_router(State.LOOK, Look())
        .register(State.PAUSE, Pause())
        .register(State.ASK, Ask())
        .register(State.READ, read)
        .add_exit_state(State.DONE)
    )
    print(asyncio.run(workflow.orchestrate(State.LOOK)))


if __name__ == "__main__":
    main()
