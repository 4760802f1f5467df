"""Workflows that note what they do in a ledger, and the rules that the ledger of a durable run has to keep.

An effect is noted as it begins: `reserve`, and `-reserve` as it is undone. Effects stand in groups: all of a group are
acknowledged by the same row, so once anything of a later group is noted, none of an earlier one may be.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cano import (
    After,
    BatchTask,
    Caught,
    CompensatableTask,
    Continue,
    Done,
    JoinConfig,
    JoinStrategy,
    More,
    RunContext,
    SplitResult,
    SteppedTask,
    StreamTask,
    StreamWindow,
    TaskResult,
    TimerTask,
    Workflow,
)


class Boom(Exception):
    pass


async def at_once() -> None:
    await asyncio.sleep(0)


@dataclass
class World:
    """What lies outside of the workflows: the ledger, which takes a run, an effect and its key, and how long work takes."""

    note: Callable[[str, str, str], None]
    work: Callable[[], Awaitable[None]] = at_once
    undo: Callable[[], Awaitable[None]] = at_once

    async def does(self, ctx: RunContext, effect: str) -> None:
        self.note(ctx.workflow_id or "", effect, ctx.idempotency_key)
        await self.work()

    def task(self, effect: str, leads_to: Any, *, fails: bool = False) -> Any:
        async def task(ctx: RunContext) -> Any:
            await self.does(ctx, effect)
            if fails:
                raise Boom(effect)
            return leads_to

        task.__qualname__ = effect
        return task


@dataclass
class Turns:
    done: int = 0


class Undoable(CompensatableTask[str, str]):
    def __init__(self, world: World, effect: str, leads_to: str, *, turns: int = 1, fails: bool = False) -> None:
        self.name = effect
        self.world, self.leads_to, self.turns, self.fails = world, leads_to, turns, fails

    async def run(self, ctx: RunContext) -> tuple[str, str]:
        effect = f"{self.name}{ctx.visit}"
        await self.world.does(ctx, effect)
        if self.fails:
            raise Boom(effect)
        return (self.leads_to if ctx.visit == self.turns else ctx.state), effect

    async def compensate(self, output: str | None, ctx: RunContext) -> None:
        effect = f"{self.name}{ctx.visit}"
        told = output == (None if self.fails else effect)
        self.world.note(ctx.workflow_id or "", f"-{effect}" if told else f"-{effect} of {output}", ctx.idempotency_key)
        await self.world.undo()


class Stepping(SteppedTask[str]):
    def __init__(self, world: World) -> None:
        self.world = world

    async def step(self, cursor: int | None, ctx: RunContext) -> More[int] | Done[str]:
        step = cursor or 0
        await self.world.does(ctx, f"step{step}")
        return Done("read") if step == 2 else More(step + 1)


class Reading(StreamTask[str]):
    window = StreamWindow.Count(2)

    def __init__(self, world: World) -> None:
        self.world = world

    async def open(self, cursor: int | None) -> Any:
        for number in range((cursor or 0) + 1, 7):
            yield number

    async def process_item(self, item: int, ctx: RunContext) -> tuple[int, int]:
        await self.world.does(ctx, f"item{item}")
        return item, item

    async def flush_window(self, outputs: list[int], ctx: RunContext) -> Any:
        await self.world.does(ctx, "flush" + "+".join(map(str, outputs)))
        return Continue

    async def on_close(self, reason: str) -> str:
        return "last"


class Items(BatchTask[str]):
    concurrency = 2

    def __init__(self, world: World) -> None:
        self.world = world

    def load(self) -> range:
        return range(3)

    async def process_item(self, item: int, ctx: RunContext) -> int:
        await self.world.does(ctx, f"item{item}")
        return item

    def finish(self, outcomes: Any) -> str:
        return "last"


class Pause(TimerTask[str]):
    def wait(self) -> After:
        return After(60)

    def after_wait(self) -> str:
        return "last"


@dataclass(frozen=True)
class Shape:
    """A workflow from "start" on, and what a run of it that nothing disturbs does."""

    make: Callable[[World, Workflow[str]], Workflow[str]]
    groups: Sequence[Sequence[str]]
    undone: Sequence[str] = ()
    outcome: str = "done"
    """The exit state, or the name of the error."""
    data: Callable[[], Any] = lambda: None
    compensatable: Sequence[str] = ()
    """What is undone if the run ends early."""

    def workflow(self, world: World, name: str, store: Any) -> Workflow[str]:
        made = self.make(world, Workflow[str](name=name))
        return made.add_exit_state("done").with_checkpoint_store(store).with_recovery_limit(100)


def _chain(world: World, new: Workflow[str]) -> Workflow[str]:
    def plain(ctx: RunContext) -> str:
        world.note(ctx.workflow_id or "", "b", ctx.idempotency_key)
        return "c"

    new.register("start", world.task("a", "b")).register("b", plain)
    return (
        new.register("c", world.task("c", "d"))
        .register("d", world.task("d", "e"))
        .register("e", world.task("e", "done"))
    )


def _loop(world: World, new: Workflow[str]) -> Workflow[str]:
    async def turn(ctx: RunContext, data: Turns) -> str:
        assert data.done == ctx.visit - 1
        await world.does(ctx, f"turn{ctx.visit}")
        data.done += 1
        return "last" if data.done == 4 else "start"

    return new.with_data(Turns).register("start", turn).register("last", world.task("last", "done"))


def _split(world: World, new: Workflow[str]) -> Workflow[str]:
    async def add(result: SplitResult, ctx: RunContext) -> str:
        await world.does(ctx, "add")
        assert sorted(outcome.value for outcome in result.successes) == [1, 2, 3]
        return "last"

    branches = [world.task(name, value) for value, name in enumerate(("left", "middle", "right"), 1)]
    new.register("start", world.task("a", "split"))
    new.register_split("split", branches, JoinConfig(JoinStrategy.All, "add")).register("add", add)
    return new.register("last", world.task("last", "done"))


def _saga(world: World, new: Workflow[str]) -> Workflow[str]:
    new.register_with_compensation("start", Undoable(world, "reserve", "charge"))
    new.register_with_compensation("charge", Undoable(world, "charge", "tell", turns=2))
    new.register("tell", world.task("tell", "book"))
    new.register_with_compensation("book", Undoable(world, "book", "ship"), register_before=True)
    return new.register("ship", world.task("ship", "done", fails=True))


def _cursors(world: World, new: Workflow[str]) -> Workflow[str]:
    new.register_stepped("start", Stepping(world)).register_stream("read", Reading(world))
    return new.register("last", world.task("last", "done"))


def _kept_saga(world: World, new: Workflow[str]) -> Workflow[str]:
    new.register_with_compensation("start", Undoable(world, "reserve", "charge"))
    return new.register_with_compensation("charge", Undoable(world, "charge", "done", turns=2), register_before=True)


def _intent(world: World, new: Workflow[str]) -> Workflow[str]:
    new.register_with_compensation("start", Undoable(world, "reserve", "charge"))
    return new.register_with_compensation("charge", Undoable(world, "charge", "done", fails=True), register_before=True)


def _failing(world: World, new: Workflow[str]) -> Workflow[str]:
    return new.register("start", world.task("a", "b")).register("b", world.task("b", "done", fails=True))


def _router(world: World, new: Workflow[str]) -> Workflow[str]:
    new.register("start", world.task("a", "route")).register_router("route", world.task("route", "b"))
    return new.register("b", world.task("b", "done"))


def _caught(world: World, new: Workflow[str]) -> Workflow[str]:
    async def ask(error: Caught[Boom], ctx: RunContext) -> str:
        await world.does(ctx, "ask")
        return "last"

    new.register("start", world.task("charge", None, fails=True), on_error={Boom: "ask"}).register("ask", ask)
    return new.register("last", world.task("last", "done"))


def _fork(world: World, new: Workflow[str]) -> Workflow[str]:
    into = TaskResult.Split(["left", "right"])
    new.register("start", world.task("a", into), join=JoinConfig(JoinStrategy.All, "last"))
    new.register("left", world.task("left", "last")).register("right", world.task("right", "last"))
    return new.register("last", world.task("last", "done"))


def _batch(world: World, new: Workflow[str]) -> Workflow[str]:
    return new.register("start", Items(world)).register("last", world.task("last", "done"))


def _timer(world: World, new: Workflow[str]) -> Workflow[str]:
    new.register("start", world.task("a", "pause")).register("pause", Pause())
    return new.register("last", world.task("last", "done"))


SHAPES = {
    "chain": Shape(_chain, [["a"], ["b"], ["c"], ["d"], ["e"]]),
    "loop": Shape(_loop, [["turn1"], ["turn2"], ["turn3"], ["turn4"], ["last"]], data=Turns),
    "split": Shape(_split, [["a"], ["left", "middle", "right", "add"], ["last"]]),
    "saga": Shape(
        _saga,
        [["reserve1"], ["charge1"], ["charge2"], ["tell"], ["book1"], ["ship"]],
        ["-book1", "-charge2", "-charge1", "-reserve1"],
        "Boom",
        compensatable=("reserve1", "charge1", "charge2", "book1"),
    ),
    "cursors": Shape(
        _cursors,
        [
            ["step0"],
            ["step1"],
            ["step2"],
            ["item1", "item2", "flush1+2"],
            ["item3", "item4", "flush3+4"],
            ["item5", "item6", "flush5+6"],
            ["last"],
        ],
    ),
    "kept saga": Shape(
        _kept_saga, [["reserve1"], ["charge1"], ["charge2"]], compensatable=("reserve1", "charge1", "charge2")
    ),
    "intent": Shape(
        _intent,
        [["reserve1"], ["charge1"]],
        ["-charge1", "-reserve1"],
        "Boom",
        compensatable=("reserve1", "charge1"),
    ),
    "failing": Shape(_failing, [["a"], ["b"]], (), "Boom"),
    "router": Shape(_router, [["a", "route"], ["b"]]),
    "caught": Shape(_caught, [["charge", "ask"], ["last"]]),
    "fork": Shape(_fork, [["a", "left", "right"], ["last"]]),
    "batch": Shape(_batch, [["item0", "item1", "item2"], ["last"]]),
    "timer": Shape(_timer, [["a"], ["last"]]),
}

Entry = tuple[str, str]
"""An effect, and the key that a service would have been given."""


def broken(shape: Shape, ledger: Sequence[Entry], interruptions: int) -> list[str]:
    """The rules that the ledger of one run, which is over, does not keep after it was interrupted so often."""
    effects = [effect for effect, _ in ledger]
    rank = {
        effect: number
        for number, group in enumerate([*shape.groups, *([step] for step in shape.undone)])
        for effect in group
    }
    if unknown := [effect for effect in effects if effect not in rank]:
        return [f"not of this workflow: {unknown}"]
    ranks = [rank[effect] for effect in effects]
    wrong = []
    if ranks != sorted(ranks):
        wrong.append("done or undone again after it was acknowledged, or gone forward after a roll-back began")
    if often := [effect for effect, times in Counter(effects).items() if times > 1 + interruptions]:
        wrong.append(f"more often than it was interrupted: {often}")
    if missing := [effect for effect in rank if effect not in effects]:
        wrong.append(f"forgotten: {missing}")
    if changing := [effect for effect in rank if len({key for of, key in ledger if of == effect}) > 1]:
        wrong.append(f"with several keys: {changing}")
    return wrong


def cut_short(shape: Shape, ledger: Sequence[Entry]) -> Shape:
    """The shape of a run that ended after what it has done so far: that is undone, newest first."""
    done = {effect for effect, _ in ledger}
    groups = [group for group in shape.groups if not done.isdisjoint(group)]
    undone = [f"-{effect}" for group in reversed(groups) for effect in group if effect in shape.compensatable]
    return replace(shape, groups=groups, undone=undone)
