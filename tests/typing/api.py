"""The public API as a type checker sees it: checked by mypy and basedpyright, never run."""

from collections.abc import Callable, Coroutine
from datetime import timedelta
from enum import Enum
from typing import Annotated, Any, Literal, assert_type

from cano import (
    BranchOutcome,
    Bulkhead,
    FromResources,
    JoinConfig,
    JoinError,
    JoinStrategy,
    MemoryStore,
    Res,
    Resources,
    RetryMode,
    Run,
    RunContext,
    SplitResult,
    Task,
    TaskConfig,
    TaskResult,
    Workflow,
    in_thread,
)


class Order(Enum):
    NEW = 1
    PAID = 2
    DONE = 3


class Deps(FromResources):
    store: Annotated[MemoryStore, Res("store")]


async def pay(store: Annotated[MemoryStore, Res("store")], ctx: RunContext) -> Literal[Order.DONE]:
    assert_type(store.get("total", int), int)
    assert_type(store.get_or("total", None), Any | None)
    assert_type(ctx.branch, int | None)
    assert_type(ctx.remaining(), float)
    return Order.DONE


class Charge(Task[Order]):
    config = TaskConfig().with_fixed_retry(3, timedelta(seconds=1)).with_attempt_timeout(2)

    async def run(self, result: SplitResult) -> TaskResult[Order]:
        assert_type(result.successes, list[BranchOutcome])
        assert_type(result.cancelled, list[int])
        return TaskResult.Single(Order.DONE)


def read(res: Resources) -> Order:
    assert_type(res.get("store", MemoryStore), MemoryStore)
    assert_type(Deps.from_resources(res), Deps)
    assert_type(Deps.from_resources(res).store, MemoryStore)
    return Order.PAID


async def use() -> None:
    workflow = Workflow[Order](Resources({"store": MemoryStore()}))
    join = JoinConfig(JoinStrategy.Quorum(2), Order.DONE, timeout=1).with_bulkhead(4)
    assert_type(join, JoinConfig[Order])
    assert_type(workflow.register(Order.NEW, read), Workflow[Order])
    bulkhead = Bulkhead(4, name="database")
    assert_type(join.with_bulkhead(bulkhead), JoinConfig[Order])
    assert_type(
        JoinConfig(JoinStrategy.Any, Order.DONE, bulkhead=bulkhead, hedge_after=0.1).bulkhead, int | Bulkhead | None
    )
    assert_type(join.with_hedge_after(timedelta(seconds=1)), JoinConfig[Order])
    async with bulkhead as entered:
        assert_type(entered, None)
        assert_type(bulkhead.waiting, int)
    workflow.register_split(Order.PAID, [pay, Charge()], join).add_exit_states([Order.DONE])
    assert_type(await workflow.orchestrate(Order.NEW, timeout=timedelta(seconds=3)), Order)
    run = workflow.start(Order.NEW)
    assert_type(run, Run[Order])
    assert_type(run.path, list[Order])
    assert_type(await run, Order)
    assert_type(workflow.exit_states, frozenset[Order])
    assert_type(RetryMode.exponential(jitter=0), RetryMode)


@Workflow[Order]().task(Order.NEW, config=TaskConfig.minimal())
async def decorated(ctx: RunContext) -> Order:
    return Order.PAID


wrapped: Callable[[Resources], Coroutine[Any, Any, Order]] = in_thread(read)
kept: Callable[[RunContext], Coroutine[Any, Any, Order]] = decorated


def failed(error: JoinError) -> None:
    assert_type(error.exceptions, tuple[Exception | ExceptionGroup[Exception], ...])
    assert_type(error.result, SplitResult | None)
    assert_type(error.attempt, int | None)
