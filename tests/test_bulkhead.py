"""Shared bulkheads: never above the limit, first come first served, and no slot is lost whatever ends when."""

import asyncio
import contextlib
import copy
import gc
import inspect
import os
import pickle
import threading
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from typing import Any

import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

import cano.testing
from cano import (
    Bulkhead,
    ConfigurationError,
    JoinConfig,
    JoinError,
    JoinStrategy,
    JoinTimeoutError,
    SplitResult,
    Task,
    TaskConfig,
    TaskResult,
    Workflow,
)
from cano.testing import VirtualClockLoop

STEP = 0.01
FOREVER = 3600.0
ALL, ANY = JoinStrategy.All, JoinStrategy.Any

STEPS = int(os.environ.get("CANO_STATE_MACHINE_STEPS", "50"))
EXAMPLES = int(os.environ.get("CANO_STATE_MACHINE_EXAMPLES", "60"))

Body = Callable[[], Coroutine[Any, Any, Any]]


@pytest.fixture(params=["native", "asyncio"], autouse=True)
def branches(request: pytest.FixtureRequest) -> Iterator[str]:
    """What branches are: tasks of cano's own, and asyncio's."""
    cano.configure(branches=request.param)
    yield request.param
    cano.configure(branches="native")


class Oops(Exception):
    """What failing branches raise."""


async def ticks(count: int = 5) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def forever() -> None:
    await asyncio.get_running_loop().create_future()


def split(
    tasks: Any, bulkhead: Bulkhead | int, strategy: JoinStrategy = ALL, joined: Any = None, **options: Any
) -> Any:
    """A workflow of a split, the state it joins into, and the end."""
    return (
        Workflow[str]()
        .register_split("split", tasks, JoinConfig(strategy, "joined", bulkhead=bulkhead, **options))
        .register("joined", joined or (lambda: "end"))
        .add_exit_state("end")
    )


def run_split(
    tasks: Any, bulkhead: Bulkhead | int, strategy: JoinStrategy = ALL, **options: Any
) -> "asyncio.Task[str]":
    return asyncio.create_task(split(tasks, bulkhead, strategy, **options).orchestrate("split"))


def counts(bulkhead: Bulkhead) -> tuple[int, int]:
    return bulkhead.in_use, bulkhead.waiting


class Workers:
    """Branches that last a step each, in as many splits as one likes; `order` is who started when."""

    def __init__(self, lasting: float = STEP) -> None:
        self.lasting = lasting
        self.order: list[str] = []
        self.alive = 0
        self.most = 0

    def __call__(self, name: str, count: int) -> list[Body]:
        async def run() -> None:
            self.order.append(name)
            self.alive += 1
            self.most = max(self.most, self.alive)
            try:
                await asyncio.sleep(self.lasting)
            finally:
                self.alive -= 1

        return [run] * count


# The object


def test_fresh() -> None:
    """A bulkhead knows its limit and its name; nothing is in use and nobody waits."""
    bulkhead = Bulkhead(4, name="database")

    assert (bulkhead.limit, bulkhead.name) == (4, "database")
    assert counts(bulkhead) == (0, 0)
    assert repr(bulkhead) == "<Bulkhead database limit=4 in_use=0 waiting=0>"
    assert repr(Bulkhead(1)) == "<Bulkhead limit=1 in_use=0 waiting=0>"
    assert Bulkhead(1).name is None
    assert Bulkhead.__module__ == "cano"


def test_identity() -> None:
    """Bulkheads are equal if they are the same; copies of a configuration share one."""
    bulkhead = Bulkhead(2)
    join = JoinConfig(ALL, "x", bulkhead=bulkhead)

    assert bulkhead != Bulkhead(2)
    assert join.with_timeout(1).bulkhead is bulkhead
    assert join == JoinConfig(ALL, "x").with_bulkhead(bulkhead)
    assert join.with_bulkhead(3).bulkhead == 3
    with pytest.raises(TypeError):
        pickle.dumps(bulkhead)
    with pytest.raises(TypeError):
        copy.deepcopy(join)


def test_cannot_be_changed() -> None:
    """What a bulkhead says cannot be set, and nothing can be put on it."""
    bulkhead = Bulkhead(2)

    for name in ("limit", "in_use", "waiting", "name", "other"):
        with pytest.raises(AttributeError):
            setattr(bulkhead, name, 1)
    with pytest.raises(TypeError):
        type("Own", (Bulkhead,), {})


@pytest.mark.parametrize("limit", [0, -1, 1_000_000_001, 2**70, 1.0, True, "1", None, [1]], ids=repr)
def test_limit_out_of_range(limit: Any) -> None:
    """A limit is an int from 1 to 1,000,000,000."""
    with pytest.raises(ConfigurationError, match=r"^limit must be "):
        Bulkhead(limit)


@pytest.mark.parametrize("name", ["", 5, b"x", "a\nb", "x" * 129], ids=str)
def test_name_out_of_range(name: Any) -> None:
    """A name is a printable text of 1 to 128 bytes."""
    with pytest.raises(ConfigurationError, match=r"^name must "):
        Bulkhead(1, name=name)


def test_bulkhead_beyond_any_split() -> None:
    """A split's own bulkhead may be larger than any number."""
    assert cano.testing.run(split([forever_not], 10**30).orchestrate("split")) == "end"


async def forever_not() -> None:
    pass


# By hand


async def test_free_slot_is_taken_without_a_turn_of_the_loop() -> None:
    """Entering a bulkhead that has room does not suspend, nor does leaving it."""
    bulkhead = Bulkhead(1)
    turns: list[int] = []
    asyncio.get_running_loop().call_soon(turns.append, 1)

    async with bulkhead as entered:
        inside = counts(bulkhead)

    assert turns == []
    assert entered is None
    assert inside == (1, 0)
    assert counts(bulkhead) == (0, 0)
    assert inspect.isawaitable(bulkhead.__aenter__())


async def test_first_come_first_served() -> None:
    """Tasks get the slot in the order in which they came."""
    bulkhead = Bulkhead(2)
    order: list[int] = []

    async def task(number: int) -> None:
        async with bulkhead:
            order.append(number)
            await asyncio.sleep(STEP)

    async with asyncio.TaskGroup() as group:
        for number in range(10):
            group.create_task(task(number))
        await ticks(1)
        assert counts(bulkhead) == (2, 8)

    assert order == list(range(10))
    assert counts(bulkhead) == (0, 0)


async def test_exception_of_the_block_leaves_it() -> None:
    """What a block raises passes through, and its slot is given back."""
    bulkhead = Bulkhead(1)

    with pytest.raises(Oops):
        async with bulkhead:
            raise Oops

    assert counts(bulkhead) == (0, 0)


async def test_left_more_often_than_entered() -> None:
    """Leaving what was not entered is refused, also while a split has slots."""
    bulkhead = Bulkhead(2)
    run = run_split([forever], bulkhead)
    await ticks()

    with pytest.raises(RuntimeError, match="left more often than it was entered"):
        await bulkhead.__aexit__(None, None, None)

    assert counts(bulkhead) == (1, 0)
    run.cancel()
    await asyncio.wait([run])
    assert counts(bulkhead) == (0, 0)


async def test_awaited_twice() -> None:
    """What `async with` awaits can be awaited once."""
    bulkhead = Bulkhead(1)
    way_in = bulkhead.__aenter__()
    await way_in
    with pytest.raises(RuntimeError, match="only once"):
        await way_in
    way_out = bulkhead.__aexit__(None, None, None)
    await way_out
    with pytest.raises(RuntimeError, match="only once"):
        await way_out


def test_without_a_loop() -> None:
    """Entering needs a running loop, and says so."""

    async def enter() -> None:
        async with Bulkhead(1):
            pass

    coroutine = enter()
    with pytest.raises(RuntimeError, match="no running event loop"):
        coroutine.send(None)


async def holding(bulkhead: Bulkhead, release: asyncio.Event) -> None:
    async with bulkhead:
        await release.wait()


async def entering(bulkhead: Bulkhead, log: list[str], name: str) -> None:
    async with bulkhead:
        log.append(name)


@pytest.mark.parametrize("turns", [0, 1, 2])
@pytest.mark.parametrize("first", ["cancel", "release"])
async def test_cancelled_waiter_hands_its_turn_on(first: str, turns: int) -> None:
    """Whether the cancel or the slot comes first, in the same turn of the loop or later, the next one gets the slot."""
    bulkhead, release, log = Bulkhead(1), asyncio.Event(), list[str]()
    holder = asyncio.create_task(holding(bulkhead, release))
    await ticks()
    gone = asyncio.create_task(entering(bulkhead, log, "gone"))
    second = asyncio.create_task(entering(bulkhead, log, "second"))
    await ticks()

    steps = [lambda: gone.cancel("message"), release.set]
    for step in steps if first == "cancel" else reversed(steps):
        step()
        await ticks(turns)
    await asyncio.wait([holder, gone, second])

    assert gone.cancelled() or log == ["gone", "second"]  # entered before the cancel could reach it
    assert log[-1] == "second"
    assert counts(bulkhead) == (0, 0)


async def test_cancelled_exactly_when_the_slot_has_come() -> None:
    """A waiter whose slot has come, but that has not gone on yet, gives it on when it is cancelled."""
    bulkhead, log = Bulkhead(1), list[str]()
    loop = asyncio.get_running_loop()
    await bulkhead.__aenter__()
    for delay in range(4):  # passes of the loop between the release and the cancel
        gone = asyncio.create_task(entering(bulkhead, log, "gone"))
        second = asyncio.create_task(entering(bulkhead, log, "second"))
        await ticks()

        def later(task: "asyncio.Task[None]", passes: int) -> None:
            if passes:
                loop.call_soon(later, task, passes - 1)
            else:
                task.cancel()

        await bulkhead.__aexit__(None, None, None)
        later(gone, delay)
        await asyncio.wait([gone, second])
        assert log[-1] == "second"
        assert counts(bulkhead) == (0, 0)
        await bulkhead.__aenter__()

    assert log.count("second") == 4
    assert log.count("gone") < 4


async def test_timeout_while_waiting() -> None:
    """`asyncio.timeout` around the block ends the wait, and the line is shorter by one."""
    bulkhead = Bulkhead(1)

    async with bulkhead:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(STEP), bulkhead:
                pass
        assert counts(bulkhead) == (1, 0)
    assert counts(bulkhead) == (0, 0)


async def test_closed_coroutine_leaves_the_line() -> None:
    """A coroutine that is closed while it waits has left the line, and one that is closed inside gives its slot back."""
    bulkhead = Bulkhead(1)

    async def enter() -> None:
        async with bulkhead:
            await forever()

    inside, waiting = enter(), enter()
    inside.send(None)
    waiting.send(None)
    before = counts(bulkhead)
    waiting.close()
    after = counts(bulkhead)
    inside.close()

    assert (before, after, counts(bulkhead)) == ((1, 1), (1, 0), (0, 0))


async def test_slot_that_an_exception_lets_go() -> None:
    """A slot that is let go by what an exception unwinds goes on to the next, and the exception is not disturbed."""
    bulkhead, log = Bulkhead(1), list[str]()
    await bulkhead.__aenter__()
    ways = [bulkhead.__aenter__().__await__()]  # type: ignore[attr-defined]
    next(ways[0])
    waiting = asyncio.create_task(entering(bulkhead, log, "next"))
    await ticks()
    await bulkhead.__aexit__(None, None, None)
    await ticks()

    def fail() -> None:
        raise Oops

    with pytest.raises(Oops):
        max(ways.pop(), fail())  # the first argument is dropped while the second raises
    await waiting

    assert log == ["next"]
    assert counts(bulkhead) == (0, 0)


async def test_task_that_nobody_else_keeps_alive_gets_its_slot() -> None:
    """The line keeps whoever waits alive."""
    bulkhead, release, log = Bulkhead(1), asyncio.Event(), list[str]()
    holder = asyncio.create_task(holding(bulkhead, release))
    await ticks()
    asyncio.create_task(entering(bulkhead, log, "forgotten"))  # noqa: RUF006 - that is the point
    run_split([lambda: log.append("branch")], bulkhead)
    await ticks()
    gc.collect()

    release.set()
    await ticks(10)

    assert holder.done()
    assert log == ["forgotten", "branch"]


# Splits


@pytest.mark.parametrize("limit", [1, 3, 100])
async def test_splits_share_the_limit(limit: int) -> None:
    """Splits of different runs and workflows have never more branches alive together than there are slots."""
    bulkhead, workers = Bulkhead(limit), Workers()

    runs = [run_split(workers(f"{number}", 7), bulkhead) for number in range(4)]
    await asyncio.wait(runs)

    assert [run.result() for run in runs] == ["end"] * 4
    assert len(workers.order) == 28
    assert workers.most == min(limit, 28)
    assert counts(bulkhead) == (0, 0)


@pytest.mark.virtual
async def test_splits_take_turns() -> None:
    """A split that has been given a slot stands at the end of the line, however many branches it has left."""
    bulkhead, workers = Bulkhead(1), Workers()

    runs = [run_split(workers(name, count), bulkhead) for name, count in [("a", 5), ("b", 3), ("c", 1)]]
    await asyncio.wait(runs)

    assert "".join(workers.order) == "aabcababa"  # a stood there first


@pytest.mark.virtual
async def test_splits_and_tasks_take_turns() -> None:
    """Splits and `async with` blocks stand in one line."""
    bulkhead, workers = Bulkhead(1), Workers()

    async def by_hand() -> None:
        async with bulkhead:
            workers.order.append("h")
            await asyncio.sleep(STEP)

    run = run_split(workers("a", 3), bulkhead)
    await ticks()
    tasks = [asyncio.create_task(by_hand()) for _ in range(2)]
    await asyncio.wait([run, *tasks])

    assert "".join(workers.order) == "aahah" or "".join(workers.order) == "aahha"


async def test_split_stands_in_the_line_once() -> None:
    """A split with many branches left has one place in the line."""
    bulkhead = Bulkhead(2)

    runs = [run_split([forever] * 10, bulkhead) for _ in range(3)]
    await ticks()
    inside = counts(bulkhead)
    for run in runs:
        run.cancel()
    await asyncio.wait(runs)

    assert inside == (2, 3)
    assert counts(bulkhead) == (0, 0)


async def test_free_slots_are_taken_at_once() -> None:
    """A split that finds as many free slots as it has branches starts all of them when it opens."""
    bulkhead, workers = Bulkhead(5), Workers()

    await run_split(workers("a", 5), bulkhead)

    assert workers.most == 5


@pytest.mark.virtual
async def test_slot_is_held_until_the_branch_has_ended() -> None:
    """The slot of a cancelled branch is free when its clean-up is over."""
    bulkhead, log = Bulkhead(1), list[str]()

    async def cleans() -> None:
        try:
            await asyncio.sleep(FOREVER)
        finally:
            await asyncio.sleep(3 * STEP)
            log.append("cleaned")

    run = run_split([cleans], bulkhead, timeout=STEP)
    await ticks()
    other = asyncio.create_task(entering(bulkhead, log, "other"))
    await asyncio.wait([run, other])

    assert isinstance(run.exception(), JoinTimeoutError)
    assert log == ["cleaned", "other"]


@pytest.mark.virtual
async def test_slot_is_held_over_retries_and_states() -> None:
    """A branch keeps its slot over its retries, and a fork's branch over all of its states."""
    bulkhead, log = Bulkhead(1), list[str]()

    class Flaky(Task[str]):
        config = TaskConfig().with_fixed_retry(1, STEP)

        async def run(self) -> str:
            log.append("attempt")
            if log.count("attempt") == 1:
                raise Oops
            return "middle"

    async def middle() -> str:
        log.append("middle")
        await asyncio.sleep(STEP)
        return "joined"

    workflow = (
        Workflow[str]()
        .register(
            "fork", lambda: TaskResult.Split(["first", "last"]), join=JoinConfig(ALL, "joined", bulkhead=bulkhead)
        )
        .register("first", Flaky())
        .register("middle", middle)
        .register("last", lambda: log.append("last") or "joined")  # type: ignore[func-returns-value]
        .register("joined", lambda: "end")
        .add_exit_state("end")
    )
    await workflow.orchestrate("fork")

    assert log == ["attempt", "attempt", "middle", "last"]
    assert counts(bulkhead) == (0, 0)


async def test_branches_made_at_run_time() -> None:
    """A split whose branches are made when it is entered shares the limit as well."""
    bulkhead, workers = Bulkhead(2), Workers()

    await asyncio.gather(*(run_split(lambda: workers("a", 5), bulkhead) for _ in range(2)))

    assert workers.most == 2
    assert len(workers.order) == 10


@pytest.mark.parametrize("limit", [1, 2, 7])
async def test_branches_that_do_not_wait(limit: int) -> None:
    """Ten thousand branches that return at once use no stack, and leave nothing in use."""
    bulkhead = Bulkhead(limit)
    ran: list[int] = []

    await run_split([lambda: ran.append(1)] * 10_000, bulkhead)

    assert len(ran) == 10_000
    assert counts(bulkhead) == (0, 0)


async def test_failing_branches_give_their_slots_back() -> None:
    """Branches that fail, at once, later, or because they cannot be called, free their slots."""
    bulkhead = Bulkhead(2)

    async def fails() -> None:
        await asyncio.sleep(0)
        raise Oops

    def fails_at_once() -> None:
        raise Oops

    async def cancels_itself() -> None:
        raise asyncio.CancelledError

    with pytest.raises(JoinError) as caught:
        await split([fails, fails_at_once, cancels_itself] * 3, bulkhead).orchestrate("split")

    assert caught.value.result is not None
    assert len(caught.value.result.errors) == 6
    assert counts(bulkhead) == (0, 0)


class Fatal(BaseException):
    """An exception that is no outcome."""


async def test_base_exception_gives_every_slot_back() -> None:
    """A BaseException of a branch leaves the run when every slot is given back, and nothing more is started."""
    bulkhead = Bulkhead(2)

    async def fatal() -> None:
        await asyncio.sleep(0)
        raise Fatal

    with pytest.raises(Fatal):
        await split([forever, fatal, pytest.fail], bulkhead).orchestrate("split")

    assert counts(bulkhead) == (0, 0)


@pytest.mark.virtual
async def test_decided_split_leaves_the_line() -> None:
    """A split that is decided, or fails, while it waits for a slot never starts what is left."""
    bulkhead, workers, results = Bulkhead(2), Workers(), list[SplitResult]()

    def joined(result: SplitResult) -> str:
        results.append(result)
        return "end"

    run = asyncio.create_task(split(workers("a", 5), bulkhead, ANY, joined).orchestrate("split"))
    other = run_split(workers("b", 3), bulkhead)
    await asyncio.wait([run, other])

    assert "".join(sorted(workers.order)) == "aabbb"
    assert results[0].cancelled[-3:] == [2, 3, 4]
    assert counts(bulkhead) == (0, 0)


@pytest.mark.virtual
@pytest.mark.parametrize("ends", ["timeout", "cancel", "run timeout"])
async def test_split_that_got_no_slot_can_end(ends: str) -> None:
    """A split that waits for its first slot can time out and be cancelled, and leaves the line."""
    bulkhead, release = Bulkhead(1), asyncio.Event()
    holder = asyncio.create_task(holding(bulkhead, release))
    await ticks()

    options = {"timeout": STEP} if ends == "timeout" else {}
    workflow = split([pytest.fail], bulkhead, **options)
    run = asyncio.create_task(workflow.orchestrate("split", timeout=STEP if ends == "run timeout" else None))
    await ticks()
    inside = counts(bulkhead)
    if ends == "cancel":
        run.cancel()
    await asyncio.wait([run])

    assert inside == (1, 1)
    assert counts(bulkhead) == (1, 0)
    if ends == "cancel":
        assert run.cancelled()
    else:
        assert type(run.exception()).__name__ == {"timeout": "JoinTimeoutError"}.get(ends, "WorkflowTimeoutError")
    release.set()
    await holder


@pytest.mark.parametrize("passes", range(4))
async def test_split_that_ends_while_its_slot_is_on_its_way(passes: int) -> None:
    """A slot that comes for a split that has been cancelled meanwhile goes on to the next."""
    bulkhead, log = Bulkhead(1), list[str]()
    loop = asyncio.get_running_loop()
    await bulkhead.__aenter__()
    run = run_split([forever] * 2, bulkhead)
    await ticks()
    next_one = asyncio.create_task(entering(bulkhead, log, "next"))
    await ticks()

    def cancel_after(passes: int) -> None:
        if passes:
            loop.call_soon(cancel_after, passes - 1)
        else:
            run.cancel()

    await bulkhead.__aexit__(None, None, None)
    cancel_after(passes)
    await asyncio.wait([run, next_one])

    assert log == ["next"]
    assert counts(bulkhead) == (0, 0)


@pytest.mark.virtual
async def test_slot_for_a_split_that_is_ending_goes_on_at_once() -> None:
    """A slot that reaches a split which is cancelled, but still cleans up, does not wait for that."""
    bulkhead, log = Bulkhead(2), list[str]()

    async def cleans() -> None:
        try:
            await forever()
        finally:
            await asyncio.sleep(STEP)
            log.append("cleaned")

    await bulkhead.__aenter__()
    run = run_split([cleans, pytest.fail], bulkhead)
    await ticks()
    next_one = asyncio.create_task(entering(bulkhead, log, "next"))
    await ticks()

    run.cancel()
    await bulkhead.__aexit__(None, None, None)
    await asyncio.wait([run, next_one])

    assert log == ["next", "cleaned"]
    assert counts(bulkhead) == (0, 0)


async def test_closed_run_gives_its_slots_back() -> None:
    """A run that is closed leaves the line, and its branches give their slots back when they have ended."""
    bulkhead = Bulkhead(2)
    coroutine = split([forever] * 5, bulkhead).orchestrate("split")
    coroutine.send(None)
    inside = counts(bulkhead)

    coroutine.close()
    line = bulkhead.waiting
    await ticks()

    assert inside == (2, 1)
    assert line == 0
    assert counts(bulkhead) == (0, 0)


@pytest.mark.virtual
async def test_splits_nested_over_one_bulkhead_wait_for_one_another() -> None:
    """A split inside a branch waits for a slot that the branch has: like with any semaphore, only a timeout ends that."""
    bulkhead = Bulkhead(1)

    async def nested() -> None:
        await split([forever_not], bulkhead).orchestrate("split")

    with pytest.raises(JoinTimeoutError):
        await split([nested], bulkhead, timeout=1).orchestrate("split")

    assert counts(bulkhead) == (0, 0)


async def test_two_bulkheads_may_be_nested() -> None:
    """A branch may enter another bulkhead, by hand or by a split of its own."""
    outer, inner, workers = Bulkhead(3), Bulkhead(2), Workers()

    async def nested() -> None:
        await split(workers("a", 3), inner).orchestrate("split")
        async with inner:
            pass

    await split([nested] * 5, outer).orchestrate("split")

    assert workers.most == 2
    assert counts(outer) == counts(inner) == (0, 0)


# Threads and loops


def in_threads(count: int, main: Callable[[int], Awaitable[None]]) -> None:
    """Runs a coroutine on a loop of its own in each of so many threads; fails as they do."""
    errors: list[BaseException] = []

    def body(number: int) -> None:
        try:
            asyncio.run(_await(main(number)))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=body, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


async def _await(awaitable: Awaitable[None]) -> None:
    await awaitable


@pytest.mark.realtime
@pytest.mark.parametrize("limit", [1, 3])
def test_threads_share_the_limit(limit: int) -> None:
    """Splits and blocks of loops in eight threads never exceed the limit together, and all of them are served."""
    bulkhead, lock, alive, most, done = Bulkhead(limit), threading.Lock(), 0, 0, 0

    @contextlib.contextmanager
    def counted() -> Iterator[None]:
        nonlocal alive, most, done
        with lock:
            alive += 1
            most = max(most, alive)
        try:
            yield
            with lock:
                done += 1
        finally:
            with lock:
                alive -= 1

    async def branch() -> None:
        with counted():
            await asyncio.sleep(0)

    async def main(number: int) -> None:
        for turn in range(10):
            tasks = [run_split([branch] * 10, bulkhead), run_split([branch] * 10, bulkhead, ANY)]
            if (turn + number) % 3 == 0:
                await asyncio.sleep(0)
                tasks[1].cancel()
            async with bulkhead:
                with counted():
                    await asyncio.sleep(0)
            await asyncio.wait(tasks)
            assert tasks[0].result() == "end"

    in_threads(8, main)

    assert most == limit
    assert done >= 8 * 10 * 11
    assert counts(bulkhead) == (0, 0)


@pytest.mark.realtime
def test_slot_from_another_thread_wakes_the_loop() -> None:
    """A loop that sleeps until the slot comes is woken by the thread that gives it back."""
    bulkhead = Bulkhead(1)
    waits, log = threading.Event(), list[str]()

    async def first(_: int) -> None:
        async with bulkhead:
            await asyncio.to_thread(waits.wait, 5)
            while bulkhead.waiting < 2:  # noqa: ASYNC110 - the other thread
                await asyncio.sleep(STEP)
            log.append("first")

    async def second(_: int) -> None:
        run = run_split([lambda: log.append("branch")], bulkhead)
        task = asyncio.create_task(entering(bulkhead, log, "block"))
        waits.set()
        await asyncio.wait([run, task])

    async def main(number: int) -> None:
        if number:
            while not bulkhead.in_use:  # noqa: ASYNC110 - the other thread
                await asyncio.sleep(STEP)
        await (second if number else first)(number)

    in_threads(2, main)

    assert log == ["first", "branch", "block"]
    assert counts(bulkhead) == (0, 0)


def strand(*makes: Callable[[], Awaitable[Any]]) -> asyncio.AbstractEventLoop:
    """Leaves awaitables to themselves on a loop that does not run any more."""
    loop = VirtualClockLoop()

    async def main() -> None:
        for make in makes:
            asyncio.ensure_future(make())  # noqa: RUF006 - the line keeps it alive
        await ticks()

    loop.run_until_complete(main())
    return loop


@pytest.fixture
def _stranded(asyncio_reports: list[str]) -> Iterator[None]:
    """For tests that strand tasks on purpose."""
    yield
    gc.collect()
    assert all("Task was destroyed but it is pending" in text for text in asyncio_reports)
    asyncio_reports.clear()


@pytest.mark.usefixtures("_stranded")
@pytest.mark.parametrize("closed", ["before the slot comes", "while the slot is on its way"])
def test_closed_loop_is_passed_over(closed: str) -> None:
    """Those whose loop is closed, before a slot is theirs or before they have it, are passed over, thousands as well."""
    bulkhead, log = Bulkhead(1), list[str]()

    async def block() -> None:
        async with bulkhead:
            log.append("block")

    def run() -> Any:
        return split([lambda: log.append("branch")], bulkhead).orchestrate("split")

    holder = asyncio.new_event_loop()
    holder.run_until_complete(_await(bulkhead.__aenter__()))
    loop = strand(*[block, run] * 2_000)
    served = strand(block, run)
    assert counts(bulkhead) == (1, 4_002)

    if closed == "before the slot comes":
        loop.close()
    holder.run_until_complete(_await(bulkhead.__aexit__(None, None, None)))
    if closed == "while the slot is on its way":
        loop.close()
    served.run_until_complete(ticks(10))
    served.close()
    holder.close()

    assert log == ["block", "branch"]
    assert counts(bulkhead) == (0, 0)


@pytest.mark.usefixtures("_stranded")
def test_run_whose_loop_is_closed_gives_its_slots_back() -> None:
    """A run that is stranded on a closed loop frees its slots when it is let go."""
    bulkhead = Bulkhead(3)

    async def block() -> None:
        async with bulkhead:
            await forever()

    loop = strand(lambda: split([forever] * 2, bulkhead).orchestrate("split"), block)
    inside = counts(bulkhead)
    loop.close()
    del loop
    gc.collect()

    assert inside == (3, 0)
    assert counts(bulkhead) == (0, 0)


# Leaks


class Thing:
    """Something that can be watched."""


@pytest.mark.parametrize("ends", ["well", "badly", "cancelled", "waiting"])
async def test_reference_counts_free_everything(ends: str) -> None:
    """What ran behind a bulkhead goes with the last reference, and so does the bulkhead, without the collector."""
    bulkhead = Bulkhead(2)
    refs: list[weakref.ref[Any]] = [weakref.ref(bulkhead)]

    def body(thing: Thing) -> Body:
        async def run() -> Thing:
            await asyncio.sleep(STEP if ends != "cancelled" else FOREVER)
            if ends == "badly":
                raise Oops(thing)
            return thing

        return run

    async def main(bulkhead: Bulkhead) -> None:
        things = [Thing() for _ in range(5)]
        refs.extend(map(weakref.ref, things))
        runs = [run_split([body(thing) for thing in things], bulkhead) for _ in range(2)]
        refs.extend(map(weakref.ref, runs))
        await ticks()
        if ends == "cancelled":
            runs[0].cancel()
        if ends in ("cancelled", "waiting"):
            runs[1].cancel()
        await asyncio.wait(runs)
        for run in runs:
            with contextlib.suppress(asyncio.CancelledError):
                run.exception()
        assert counts(bulkhead) == (0, 0)

    gc.collect()
    gc.disable()
    try:
        await main(bulkhead)
        del bulkhead
        await ticks()
        left = [ref() for ref in refs]
    finally:
        gc.enable()

    assert left == [None] * len(refs)


def test_abandoned_line_is_collected() -> None:
    """A bulkhead that nobody holds goes with those who wait for it."""
    bulkhead = Bulkhead(1)
    ref = weakref.ref(bulkhead)

    async def block(bulkhead: Bulkhead) -> None:
        async with bulkhead:
            pass

    async def main(bulkhead: Bulkhead) -> None:
        await bulkhead.__aenter__()
        coroutine = block(bulkhead)
        coroutine.send(None)
        coroutine.close()
        way_in = bulkhead.__aenter__().__await__()
        next(way_in)
        assert counts(bulkhead) == (1, 1)

    cano.testing.run(main(bulkhead))
    del bulkhead
    gc.collect()

    assert ref() is None


# Against a model


class Hand:
    """An `async with`, one step at a time."""

    def __init__(self, way_in: Any) -> None:
        self.way_in = way_in
        self.future: asyncio.Future[None] | None = None


class Shared:
    """A split: how many branches it has left, and the futures that those alive wait for."""

    def __init__(self, name: int, count: int) -> None:
        self.name = name
        self.left = count
        self.started = 0
        self.alive: list[int] = []
        self.futures: dict[int, asyncio.Future[None]] = {}
        self.run: asyncio.Task[str] | None = None


class Model:
    """The slots and the line, in plain words.

    A slot that is given back belongs to the first of the line; `granted` are those who have not heard of it yet.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.line: list[Hand | Shared] = []
        self.granted: list[Hand | Shared] = []
        self.told: list[Hand] = []
        self.inside: list[Hand] = []
        self.splits: list[Shared] = []
        self.starts: list[int] = []

    def in_use(self) -> int:
        return len(self.granted) + len(self.told) + len(self.inside) + sum(len(split.alive) for split in self.splits)

    def give_back(self) -> None:
        if self.line:
            self.granted.append(self.line.pop(0))

    def start(self, split: Shared) -> None:
        split.alive.append(split.started)
        split.started += 1
        split.left -= 1
        self.starts.append(split.name)

    def want_more(self, split: Shared) -> None:
        while split.left and self.in_use() < self.limit:
            self.start(split)
        if split.left:
            self.line.append(split)

    def turn(self) -> None:
        """Those who were granted a slot hear of it."""
        while self.granted:
            one = self.granted.pop(0)
            if isinstance(one, Hand):
                self.told.append(one)
            else:
                self.start(one)
                self.want_more(one)

    def branch_ends(self, split: Shared, index: int) -> None:
        split.alive.remove(index)
        if self.line and self.line[0] is split:
            self.line.pop(0)
            self.start(split)
            self.want_more(split)
            return
        self.give_back()
        if split not in self.line:
            self.want_more(split)

    def split_is_cancelled(self, split: Shared) -> None:
        if split in self.line:
            self.line.remove(split)
        split.left = 0
        while split.alive:
            split.alive.pop()
            self.give_back()


class BulkheadMachine(RuleBasedStateMachine):
    """Blocks and splits that come, go on and give up in any order, several in one turn of the loop."""

    def __init__(self, branches: str) -> None:
        super().__init__()
        cano.configure(branches=branches)  # type: ignore[arg-type]
        self.loop = VirtualClockLoop()
        self.model = Model(0)

    def teardown(self) -> None:
        async def end() -> None:
            model = self.model
            for hand in [one for one in [*model.line, *model.granted, *model.told] if isinstance(one, Hand)]:
                hand.way_in.close()
            for _ in model.inside:
                await self.bulkhead.__aexit__(None, None, None)
            for split in model.splits:
                if split.run is not None:
                    split.run.cancel()
                    await asyncio.wait([split.run])
            await ticks(10)

        if self.model.limit:
            self.loop.run_until_complete(end())
            assert counts(self.bulkhead) == (0, 0)
        self.loop.close()

    @precondition(lambda self: not self.model.limit)
    @rule(limit=st.integers(1, 4))
    def make(self, limit: int) -> None:
        self.bulkhead = Bulkhead(limit)
        self.model = Model(limit)
        self.starts: list[int] = []

    def do(self, act: Callable[[], Any]) -> Any:
        """One turn: those who were granted a slot hear of it, then this happens."""

        async def main() -> Any:
            await ticks()
            self.model.turn()
            self.compare()
            result = act()
            if inspect.isawaitable(result):
                await result
            assert counts(self.bulkhead) == (self.model.in_use(), len(self.model.line))

        self.loop.run_until_complete(main())

    def compare(self) -> None:
        assert counts(self.bulkhead) == (self.model.in_use(), len(self.model.line))
        assert self.starts == self.model.starts
        for one in self.model.told:
            assert one.future is not None
            assert one.future.done()
        for one in self.model.line:
            assert isinstance(one, Shared) or (one.future is not None and not one.future.done())

    @precondition(lambda self: self.model.limit)
    @rule(data=st.data(), count=st.integers(1, 4))
    def blocks(self, data: st.DataObject, count: int) -> None:
        """Some things that `async with` blocks do, without a turn of the loop between them."""

        def act() -> None:
            for _ in range(count):
                waiting = [one for one in [*self.model.line, *self.model.granted] if isinstance(one, Hand)]
                kinds = ["come", "come"]
                kinds += ["leave", "leave"] if self.model.inside else []
                kinds += ["give up"] if waiting or self.model.told else []
                kinds += ["go on"] if self.model.told else []
                kind = data.draw(st.sampled_from(kinds))
                if kind == "come":
                    self.come()
                elif kind == "leave":
                    self.leave(data.draw(st.sampled_from(self.model.inside)))
                elif kind == "go on":
                    self.go_on(data.draw(st.sampled_from(self.model.told)))
                else:
                    self.give_up(data.draw(st.sampled_from(waiting + self.model.told)), data.draw(st.booleans()))
                assert counts(self.bulkhead) == (self.model.in_use(), len(self.model.line))

        self.do(act)

    def come(self) -> None:
        hand = Hand(self.bulkhead.__aenter__().__await__())  # type: ignore[attr-defined]
        try:
            hand.future = next(hand.way_in)
        except StopIteration:
            assert self.model.in_use() < self.model.limit
            self.model.inside.append(hand)
        else:
            self.model.line.append(hand)

    def leave(self, hand: Hand) -> None:
        self.model.inside.remove(hand)
        self.model.give_back()
        self.bulkhead.__aexit__(None, None, None)

    def go_on(self, hand: Hand) -> None:
        self.model.told.remove(hand)
        self.model.inside.append(hand)
        with pytest.raises(StopIteration):
            next(hand.way_in)

    def give_up(self, hand: Hand, is_closed: bool) -> None:  # noqa: FBT001 - drawn
        if is_closed:
            hand.way_in.close()
        else:
            with pytest.raises(asyncio.CancelledError):
                hand.way_in.throw(asyncio.CancelledError())
        if hand in self.model.line:
            self.model.line.remove(hand)
            return
        places: tuple[list[Any], ...] = (self.model.granted, self.model.told)
        for place in places:
            if hand in place:
                place.remove(hand)
        self.model.give_back()

    def body(self, split: Shared) -> Body:
        async def run() -> None:
            index = len(split.futures)
            self.starts.append(split.name)
            split.futures[index] = self.loop.create_future()
            await split.futures[index]

        return run

    @precondition(lambda self: self.model.limit)
    @rule(count=st.integers(1, 5))
    def opens(self, count: int) -> None:
        """A split opens."""

        async def act() -> None:
            shared = Shared(len(self.model.splits), count)
            self.model.splits.append(shared)
            shared.run = run_split([self.body(shared)] * count, self.bulkhead)
            await ticks()
            self.model.want_more(shared)

        self.do(act)

    @precondition(lambda self: any(split.alive for split in self.model.splits))
    @rule(data=st.data())
    def ends(self, data: st.DataObject) -> None:
        """A branch ends."""

        async def act() -> None:
            split = data.draw(st.sampled_from([split for split in self.model.splits if split.alive]))
            index = data.draw(st.sampled_from(split.alive))
            split.futures[index].set_result(None)
            self.model.branch_ends(split, index)
            await ticks(8)
            self.model.turn()
            self.compare()

        self.do(act)

    @precondition(lambda self: any(split.alive or split.left for split in self.model.splits))
    @rule(data=st.data())
    def is_cancelled(self, data: st.DataObject) -> None:
        """A run is cancelled."""

        async def act() -> None:
            split = data.draw(st.sampled_from([split for split in self.model.splits if split.alive or split.left]))
            assert split.run is not None
            split.run.cancel()
            self.model.split_is_cancelled(split)
            await asyncio.wait([split.run])
            await ticks(8)
            self.model.turn()
            self.compare()

        self.do(act)

    @invariant()
    def is_never_above_the_limit(self) -> None:
        if self.model.limit:
            assert self.bulkhead.in_use <= self.bulkhead.limit
            assert not self.bulkhead.waiting or self.bulkhead.in_use == self.bulkhead.limit


@pytest.mark.model
@pytest.mark.timeout(600)  # a failing example is shrunk for minutes
def test_follows_the_model(branches: str) -> None:
    """Whatever comes, goes on and gives up when, slots and line are those of a plain model, and all are free at the end."""
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        lambda: BulkheadMachine(branches),
        settings=settings(max_examples=EXAMPLES, stateful_step_count=STEPS, deadline=None),
    )
