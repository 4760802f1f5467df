"""When the run goes on that waits for a split: where its last branch ends, in the same callback of the event loop."""

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from cano import JoinConfig, JoinStrategy, Workflow, WorkflowTimeoutError

pytestmark = pytest.mark.usefixtures("native")

FOREVER = 3600.0


@pytest.fixture
def native(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--loop") == "debug" or request.config.getoption("--branches") == "asyncio":
        pytest.skip("with asyncio's tasks it takes the loop's next turn")


def into(*branches: Any, joined: Callable[[], object] = lambda: None, **options: Any) -> Workflow[str]:
    def end() -> str:
        joined()
        return "end"

    return (
        Workflow[str]()
        .register_split("split", branches, JoinConfig(options.pop("strategy", JoinStrategy.All), "joined", **options))
        .register("joined", end)
        .add_exit_state("end")
    )


def future() -> asyncio.Future[Any]:
    return asyncio.get_running_loop().create_future()


async def settled(turns: int = 5) -> None:
    for _ in range(turns):
        await asyncio.sleep(0)


async def test_run_goes_on_in_the_callback_of_its_last_branch() -> None:
    """What was scheduled after the wake-up of the last branch comes after the run has gone on."""
    seen: list[object] = []
    waited = future()

    async def branch() -> None:
        await waited
        seen.append("branch")

    run = asyncio.create_task(into(branch, joined=lambda: seen.append("joined")).orchestrate("split"))
    await settled()
    waited.set_result(None)
    asyncio.get_running_loop().call_soon(seen.append, "later callback")
    await run

    assert seen == ["branch", "joined", "later callback"]


async def test_run_is_the_current_task_when_it_goes_on() -> None:
    """In its own context and as the current task, which nobody is afterwards."""
    seen: list[object] = []
    waited = future()

    async def branch() -> None:
        await waited

    run = asyncio.create_task(into(branch, joined=lambda: seen.append(asyncio.current_task())).orchestrate("split"))
    await settled()
    waited.set_result(None)
    asyncio.get_running_loop().call_soon(lambda: seen.append(asyncio.current_task()))
    await run

    assert seen == [run, None]


async def test_done_callbacks_of_branches_come_first() -> None:
    """A done-callback that somebody added to a branch runs before the run goes on."""
    seen: list[object] = []
    waited = future()

    async def branch() -> None:
        task = asyncio.current_task()
        assert task is not None
        task.add_done_callback(lambda _: seen.append("callback"))
        await waited

    run = asyncio.create_task(into(branch, joined=lambda: seen.append("joined")).orchestrate("split"))
    await settled()
    waited.set_result(None)
    await run

    assert seen == ["callback", "joined"]


class CallsBackAtOnce:
    """A future that calls its callbacks inside `set_result`, whoever calls that."""

    def __init__(self) -> None:
        self._asyncio_future_blocking = False
        self.callbacks: list[Callable[[object], object]] = []

    def __await__(self) -> Iterator[object]:
        self._asyncio_future_blocking = True
        yield self

    def get_loop(self) -> asyncio.AbstractEventLoop:
        return asyncio.get_running_loop()

    def add_done_callback(self, callback: Callable[[object], object], **_: object) -> None:
        self.callbacks.append(callback)

    def result(self) -> None:
        return None

    def set_result(self) -> None:
        for callback in self.callbacks:
            callback(self)


async def test_never_inside_the_step_of_another_task() -> None:
    """A branch that is woken from within a task's step ends there, but the run goes on in the loop's next turn."""
    seen: list[object] = []
    foreign = CallsBackAtOnce()

    async def branch() -> None:
        await foreign
        seen.append("branch")

    run = asyncio.create_task(into(branch, joined=lambda: seen.append("joined")).orchestrate("split"))
    await settled()
    this = asyncio.current_task()
    foreign.set_result()

    assert asyncio.current_task() is this
    assert seen == ["branch"]
    assert await run == "end"
    assert seen == ["branch", "joined"]


@pytest.mark.parametrize("depth", [2, 15, 16, 17, 40])
async def test_nested_runs_go_on_one_inside_the_other(depth: int) -> None:
    """Splits nested in one another end from the inside out, however many."""
    waited = future()

    async def innermost() -> None:
        await waited

    branch: Callable[[], Any] = innermost
    for _ in range(depth):
        workflow = into(branch)

        async def branch(workflow: Workflow[str] = workflow) -> str:
            return await workflow.orchestrate("split")

    run = asyncio.create_task(branch())
    await settled()
    waited.set_result(None)

    assert await run == "end"


async def test_run_that_splits_again_and_again() -> None:
    """A run whose splits each wait for a future that is resolved at once uses no stack for them."""
    rounds = 3_000
    left = iter(range(rounds))

    async def branch() -> None:
        waited = future()
        asyncio.get_running_loop().call_soon(waited.set_result, None)
        await waited

    workflow = (
        Workflow[str]()
        .register_split("split", [branch, branch], JoinConfig(JoinStrategy.All, "again"))
        .register("again", lambda: "end" if next(left, None) is None else "split")
        .add_exit_state("end")
    )

    assert await workflow.orchestrate("split") == "end"


@pytest.mark.parametrize("how", ["cancel", "timeout"])
async def test_cancel_in_the_turn_in_which_the_last_branch_ends(how: str) -> None:
    """A cancel that comes first is not lost when the last branch ends before it is delivered."""
    waited = future()
    loop = asyncio.get_running_loop()

    async def branch() -> None:
        await waited

    async def stays() -> None:
        try:
            await asyncio.sleep(FOREVER)
        except asyncio.CancelledError:
            return

    workflow = into(branch, stays).with_timeout(1.0 if how == "timeout" else None)
    run = asyncio.create_task(workflow.orchestrate("split"))
    await settled()
    if how == "cancel":
        run.cancel("now")
        waited.set_result(None)
        with pytest.raises(asyncio.CancelledError, match="now"):
            await run
    else:
        loop.call_later(1.0, waited.set_result, None)
        with pytest.raises(WorkflowTimeoutError):
            await run
    assert run.cancelling() == (how == "cancel")


async def test_what_the_run_waits_for_is_a_future_to_others() -> None:
    """Its task shows what it waits for, which can be looked at and cancelled like any future."""
    waited = future()

    async def branch() -> None:
        await waited

    run = asyncio.create_task(into(branch).orchestrate("split"))
    await settled()
    waiter = run._fut_waiter  # type: ignore[attr-defined]

    assert asyncio.isfuture(waiter)
    assert waiter.get_loop() is asyncio.get_running_loop()
    assert (waiter.done(), waiter.cancelled()) == (False, False)
    assert "pending" in repr(waiter)
    assert "Waiter" in repr(run)
    with pytest.raises(RuntimeError, match="not done"):
        waiter.result()
    told: list[object] = []
    waiter.add_done_callback(told.append)
    waiter.add_done_callback(print)
    assert waiter.remove_done_callback(print) == 1

    assert waiter.cancel("by hand") is True
    assert waiter.cancel() is False
    assert (waiter.done(), waiter.cancelled()) == (True, True)
    with pytest.raises(asyncio.CancelledError, match="by hand"):
        waiter.result()
    waiter.add_done_callback(told.append)
    with pytest.raises(asyncio.CancelledError):
        await run
    assert told == [waiter, waiter]
    assert "cancelled" in repr(waiter)
    assert waited.cancelled()
