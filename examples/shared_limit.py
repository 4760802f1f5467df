"""A limit that several workflows share: an API allows three calls at once, whoever makes them.

Two workflows and a check by hand stand in one line and take turns.

Run it: python examples/shared_limit.py
"""

import asyncio
from dataclasses import dataclass
from enum import Enum, auto

from cano import Bulkhead, JoinConfig, JoinStrategy, Workflow

API = Bulkhead(3, name="api")


made: list[tuple[float, str, float]] = []


class State(Enum):
    CALL = auto()
    DONE = auto()


async def call(what: str, start: float) -> None:
    loop = asyncio.get_running_loop()
    begin = loop.time() - start
    await asyncio.sleep(0.2)  # a request in real life
    made.append((round(begin, 1), what, round(loop.time() - start, 1)))


@dataclass(frozen=True)
class Call:
    what: str
    start: float

    async def run(self) -> None:
        await call(self.what, self.start)


async def check(start: float) -> None:
    async with API:
        await call("check", start)


async def run_both() -> None:
    start = asyncio.get_running_loop().time()

    def workflow(name: str, calls: int) -> Workflow[State]:
        tasks = [Call(f"{name} {number}", start) for number in range(1, calls + 1)]
        return (
            Workflow[State](name=name)
            .register_split(State.CALL, tasks, JoinConfig(JoinStrategy.All, State.DONE, bulkhead=API))
            .add_exit_state(State.DONE)
        )

    async with asyncio.TaskGroup() as group:
        group.create_task(workflow("order", 6).orchestrate(State.CALL))
        group.create_task(workflow("invoice", 3).orchestrate(State.CALL))
        group.create_task(check(start))
    for begin, what, end in sorted(made):
        print(f"{what:9}  {begin:.1f} s to {end:.1f} s  {' ' * round(20 * begin)}####")
    print(API)


def main() -> None:
    asyncio.run(run_both())


if __name__ == "__main__":
    main()
