"""A whole run: what it costs to begin and to end one, and to construct its workflow."""

import asyncio
from collections.abc import Awaitable, Callable
from enum import Enum
from functools import partial
from time import thread_time
from types import ModuleType
from typing import Any

import pytest

import cano
from benches import pure_python

pytestmark = pytest.mark.benchmark(timer=thread_time)

State = Enum("State", ["A", "B", "C", "D", "E", "END"])
A, B, C, D, E, END = State


async def a() -> State:
    return B


async def b() -> State:
    return C


async def c() -> State:
    return D


async def d() -> State:
    return E


async def e() -> State:
    return END


def five_states(engine: ModuleType) -> Any:
    workflow = engine.Workflow().register(A, a).register(B, b).register(C, c).register(D, d).register(E, e)
    return workflow.add_exit_state(END)


async def by_hand() -> State:
    await a()
    await b()
    await c()
    await d()
    return await e()


def constructed(engine: ModuleType) -> Callable[[], Awaitable[State]]:
    return lambda: five_states(engine).orchestrate(A)


def prebuilt(engine: ModuleType) -> Callable[[], Awaitable[State]]:
    return partial(five_states(engine).orchestrate, A)


async def empty_task() -> State:
    return await asyncio.create_task(e())


def test_prebuilt(versus):
    contenders = {"cano": prebuilt(cano), "awaited by hand": by_hand, "pure Python": prebuilt(pure_python)}
    versus("five states, prebuilt", contenders, returns=END, calls=500)


def test_constructed(versus):
    contenders = {"cano": constructed(cano), "pure Python": constructed(pure_python)}
    versus("five states, constructed and run", contenders, returns=END, calls=100)


def test_one_state(versus):
    workflow = cano.Workflow().register(E, e).add_exit_state(END)
    contenders = {"cano": partial(workflow.orchestrate, E), "empty asyncio task": empty_task, "awaited by hand": e}
    versus("one state", contenders, returns=END, calls=500)


def test_started(versus):
    workflow = cano.Workflow().register(E, e).add_exit_state(END)

    async def started() -> State:
        return await workflow.start(E)

    versus("one state, started", {"cano": started, "empty asyncio task": empty_task}, returns=END, calls=200)
