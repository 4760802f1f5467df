"""A transition: the task of a state is awaited, and the state that it returns is looked up."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from enum import Enum
from functools import partial
from itertools import pairwise
from time import thread_time
from types import ModuleType
from typing import Any

import pytest

import cano
from benches import pure_python

pytestmark = pytest.mark.benchmark(timer=thread_time)

State = Enum("State", [f"S{number}" for number in range(10)] + ["END"])
STATES: dict[str, list[Any]] = {"Enum": list(State), "str": [state.name for state in State]}

Task = Callable[[], Awaitable[Any]]


def no_config(engine: ModuleType) -> None:
    return None


def retry(engine: ModuleType) -> Any:
    return engine.TaskConfig(retry=engine.RetryMode.exponential())


def retry_and_timeout(engine: ModuleType) -> Any:
    return engine.TaskConfig(retry=engine.RetryMode.exponential(), attempt_timeout=5)


async def retry_by_hand(task: Task) -> Any:
    for delay in (0.1, 0.2, 0.4):
        try:
            return await task()
        except Exception:  # noqa: BLE001 - that is what a retry is
            await asyncio.sleep(delay)
    return await task()


async def retry_and_timeout_by_hand(task: Task) -> Any:
    for delay in (0.1, 0.2, 0.4):
        try:
            async with asyncio.timeout(5):
                return await task()
        except Exception:  # noqa: BLE001 - that is what a retry is
            await asyncio.sleep(delay)
    async with asyncio.timeout(5):
        return await task()


CONFIGS = {"": no_config, ", retry": retry, ", retry + timeout": retry_and_timeout}
BY_HAND = {", retry": retry_by_hand, ", retry + timeout": retry_and_timeout_by_hand}


def two_states(states: list[Any], transitions: int) -> dict[Any, Task]:
    """Two tasks that lead to each other, until there were so many transitions."""
    first, second, *_, end = states
    left = transitions // 2

    async def ping() -> Any:
        return second

    async def pong() -> Any:
        nonlocal left
        left -= 1
        if left:
            return first
        left = transitions // 2
        return end

    return {first: ping, second: pong}


def chain(states: list[Any]) -> dict[Any, Task]:
    """A task for each state but the last, each leading to the next."""

    def lead_to(state: Any) -> Task:
        async def task() -> Any:
            return state

        return task

    return {state: lead_to(following) for state, following in pairwise(states)}


def suspending(task: Task) -> Task:
    async def suspend() -> Any:
        await asyncio.sleep(0)
        return await task()

    return suspend


def alternately(tasks: list[Task], end: Any) -> Task:
    ping, pong = tasks

    async def by_hand() -> Any:
        while True:
            await ping()
            if await pong() is end:
                return end

    return by_hand


def in_turn(tasks: list[Task], end: Any) -> Task:
    async def by_hand() -> Any:
        state = None
        for task in tasks:
            state = await task()
        return state

    return by_hand


def contenders(
    tasks: Mapping[Any, Task], end: Any, config: str, order: Callable[[list[Task], Any], Task]
) -> dict[str, Task]:
    """The two engines, the tasks just awaited, and the tasks awaited with what is configured done by hand."""

    def on(engine: ModuleType) -> Task:
        workflow = engine.Workflow().add_exit_state(end)
        for state, task in tasks.items():
            workflow.register(state, task, config=CONFIGS[config](engine))
        return partial(workflow.orchestrate, next(iter(tasks)))

    every = {"cano": on(cano), "awaited by hand": order(list(tasks.values()), end), "pure Python": on(pure_python)}
    if config:
        every["the same by hand"] = order([partial(BY_HAND[config], task) for task in tasks.values()], end)
    return every


@pytest.mark.parametrize("config", CONFIGS, ids=["plain", "retry", "retry + timeout"])
@pytest.mark.parametrize("kind", STATES)
def test_loop(versus, kind, config):
    end = STATES[kind][-1]
    tasks = two_states(STATES[kind], 10_000)
    versus(f"loop, {kind}{config}", contenders(tasks, end, config, alternately), returns=end, per=10_000)


@pytest.mark.parametrize("config", ["", ", retry + timeout"], ids=["plain", "retry + timeout"])
def test_loop_that_suspends(versus, config):
    end = State.END
    tasks = {state: suspending(task) for state, task in two_states(STATES["Enum"], 1_000).items()}
    versus(f"loop of 1,000, suspending{config}", contenders(tasks, end, config, alternately), returns=end, per=1_000)


@pytest.mark.parametrize("config", CONFIGS, ids=["plain", "retry", "retry + timeout"])
@pytest.mark.parametrize("kind", STATES)
def test_chain(versus, kind, config):
    end = STATES[kind][-1]
    tasks = chain(STATES[kind])
    versus(f"chain, {kind}{config}", contenders(tasks, end, config, in_turn), returns=end, calls=300, per=10)
