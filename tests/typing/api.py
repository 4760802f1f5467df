"""The public API as a type checker sees it: checked by mypy and basedpyright, never run."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from datetime import UTC, datetime, timedelta
from enum import Enum
from typing import Annotated, Any, Literal, assert_type

from cano import (
    After,
    BatchTask,
    BranchOutcome,
    Bulkhead,
    Caught,
    CircuitBreaker,
    CircuitPolicy,
    CircuitState,
    CompensatableTask,
    CompensationFailedError,
    Continue,
    Done,
    FromResources,
    ItemErrorPolicy,
    JoinConfig,
    JoinError,
    JoinStrategy,
    LimiterSnapshot,
    MemoryStore,
    More,
    MultiRateLimiter,
    Orphan,
    Pending,
    Permit,
    PollErrorPolicy,
    PollTask,
    RateLimiter,
    RateLimiterPolicy,
    Ready,
    Res,
    Resources,
    RetryMode,
    RouterTask,
    Run,
    RunContext,
    SplitResult,
    SteppedTask,
    Stop,
    StreamProgress,
    StreamTask,
    StreamWindow,
    Task,
    TaskConfig,
    TaskResult,
    TimerTask,
    Until,
    WindowedRateLimiter,
    WindowPolicy,
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


class Declined(Exception):
    left: float = 0.0


class Expired(Exception):
    """Has nothing to tell."""


async def ask(error: Caught[Declined]) -> Literal[Order.NEW, Order.DONE]:
    assert_type(error, Declined)
    assert_type(error.left, float)
    return Order.NEW


def ask_again(error: Caught[Declined | Expired] | None) -> Order:
    assert_type(error, Declined | Expired | None)
    return Order.DONE if isinstance(error, Declined) else Order.NEW


class Charge(Task[Order]):
    config = TaskConfig().with_fixed_retry(3, timedelta(seconds=1)).with_attempt_timeout(2)

    async def run(self, result: SplitResult) -> TaskResult[Order]:
        assert_type(result.successes, list[BranchOutcome])
        assert_type(result.cancelled, list[int])
        return TaskResult.Single(Order.DONE)


class Choose(RouterTask[Order]):
    def route(self) -> Literal[Order.PAID, Order.DONE]:
        return Order.PAID


class Upload(PollTask[Order]):
    on_poll_error = PollErrorPolicy.RetryOnError(3)

    async def poll(self, ctx: RunContext) -> Ready[Order] | Pending:
        assert_type(Ready(Order.DONE).state, Order)
        return Ready(Order.DONE) if ctx.attempt > 1 else Pending(timedelta(seconds=1))


class CoolDown(TimerTask[Order]):
    def wait(self, ctx: RunContext) -> After | Until:
        return After(5) if ctx.attempt > 1 else Until(datetime.now(UTC))

    def after_wait(self) -> Order:
        return Order.DONE


class Pages(SteppedTask[Order]):
    async def step(self, cursor: str | None) -> More[str] | Done[Literal[Order.DONE]]:
        assert_type(More("b").cursor, str)
        return More("b") if cursor is None else Done(Order.DONE)


class Readings(StreamTask[Order]):
    window = StreamWindow.Duration(timedelta(seconds=1))
    on_item_error = ItemErrorPolicy.Skip

    async def open(self, cursor: int | None) -> AsyncIterator[float]:
        yield float(cursor or 0)

    def process_item(self, item: float) -> tuple[float, int]:
        return item, 1

    async def flush_window(self, outputs: list[float]) -> type[Continue] | Stop[Order]:
        return Stop(Order.DONE) if len(outputs) > 3 else Continue

    def on_close(self, reason: str, progress: StreamProgress) -> Order:
        assert_type(progress.skipped, int)
        return Order.DONE if reason == "exhausted" else Order.PAID


class Import(BatchTask[Order]):
    concurrency = 10
    item_retry = RetryMode.fixed(2, 0.1)
    item_timeout = timedelta(seconds=5)

    def load(self) -> Iterator[int]:
        yield 1

    async def process_item(self, item: int, ctx: RunContext) -> str:
        return f"{item} {ctx.branch}"

    def finish(self, outcomes: list[BranchOutcome]) -> Literal[Order.DONE]:
        assert_type(outcomes[0].error, Exception | None)
        return Order.DONE


class Follow(BatchTask[Order]):
    def __init__(self, concurrency: int) -> None:
        self.concurrency = concurrency
        self.item_timeout = 5 if concurrency > 1 else None

    async def load(self, store: Annotated[MemoryStore, Res("store")]) -> AsyncIterator[str]:
        yield store.get("total", str)

    def process_item(self, item: str) -> int:
        return len(item)

    async def finish(self, outcomes: list[BranchOutcome]) -> Order:
        return Order.DONE


def read(res: Resources) -> Order:
    assert_type(res.get("store", MemoryStore), MemoryStore)
    assert_type(Deps.from_resources(res), Deps)
    assert_type(Deps.from_resources(res).store, MemoryStore)
    return Order.PAID


class Reserve(CompensatableTask[Order, int]):
    async def run(self, ctx: RunContext) -> tuple[Literal[Order.PAID], int]:
        return Order.PAID, ctx.visit

    async def compensate(self, output: int, res: Resources) -> None: ...


def look_after(error: CompensationFailedError) -> None:
    assert_type(error.orphans, tuple[Orphan, ...])
    assert_type(error.exceptions[0], Exception | ExceptionGroup[Exception])
    assert_type(error.orphans[0].error, Exception)


async def use() -> None:
    workflow = Workflow[Order](Resources({"store": MemoryStore()}))
    join = JoinConfig(JoinStrategy.Quorum(2), Order.DONE, timeout=1).with_bulkhead(4)
    assert_type(join, JoinConfig[Order])
    assert_type(workflow.register(Order.NEW, read), Workflow[Order])
    assert_type(workflow.register(Order.NEW, ask, on_error={Declined: Order.NEW}), Workflow[Order])
    workflow.register(Order.NEW, ask_again, on_error={(Declined, Expired): Order.NEW, Exception: Order.DONE})
    workflow.register(Order.NEW, ask, on_error={asyncio.CancelledError: Order.NEW})  # type: ignore[dict-item]
    workflow.register(Order.NEW, ask, on_error={Declined: "new"})  # type: ignore[dict-item]
    workflow.register_split(Order.PAID, [pay], join, on_error={JoinError: Order.DONE, ValueError: Order.NEW})
    workflow.register_split(Order.PAID, [pay, Charge(), Import(), Follow(2)], join).add_exit_states([Order.DONE])
    assert_type(workflow.register_router(Order.NEW, Choose()), Workflow[Order])
    workflow.register(Order.NEW, Upload()).register(Order.NEW, CoolDown())
    assert_type(
        workflow.register_with_compensation(Order.NEW, Reserve(), register_before=True), Workflow[Order]
    ).with_compensation_timeout(5)
    workflow.register_stepped(Order.NEW, Pages(), config=TaskConfig.minimal()).register_stream(Order.NEW, Readings())
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


async def guarded() -> int:
    breaker = CircuitBreaker(3, timedelta(seconds=5), name="payments", on_change=changed)
    assert_type(breaker.try_acquire(), Permit)
    assert_type(CircuitBreaker(CircuitPolicy.rate(0.5, calls=10)).state, CircuitState)
    assert_type(breaker.snapshot().retry_after, float | None)
    async with breaker:
        return 1


def changed(breaker: CircuitBreaker, old: CircuitState, new: CircuitState) -> None:
    assert_type(breaker.name, str | None)


async def limit() -> Order:
    limiter = RateLimiter(RateLimiterPolicy.per_second(10, burst=5), name="api")
    window = WindowedRateLimiter(WindowPolicy(10, timedelta(days=1)))
    multi = MultiRateLimiter().with_tier("calls", limiter).with_tier("quota", window, cost=3)
    assert_type(multi, MultiRateLimiter)
    await multi.acquire(["calls"])
    await limiter.acquire(cost=2)
    assert_type(window.time_until(3), float)
    assert_type(limiter.policy.capacity, int)
    assert_type(limiter.snapshot().resets_in, float | None)
    assert_type(multi.snapshot(), dict[str, LimiterSnapshot])
    return Order.DONE


@Workflow[Order]().task(Order.NEW, config=TaskConfig.minimal(), on_error={Declined: Order.NEW})
async def decorated(ctx: RunContext) -> Order:
    return Order.PAID


wrapped: Callable[[Resources], Coroutine[Any, Any, Order]] = in_thread(read)
kept: Callable[[RunContext], Coroutine[Any, Any, Order]] = decorated


def not_of_errors(value: Caught[int]) -> Order:  # type: ignore[type-var]
    return Order.DONE


def failed(error: JoinError) -> None:
    assert_type(error.exceptions, tuple[Exception | ExceptionGroup[Exception], ...])
    assert_type(error.result, SplitResult | None)
    assert_type(error.attempt, int | None)
