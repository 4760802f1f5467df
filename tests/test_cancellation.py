"""Cancellation, clause by clause of docs/cancellation.md; tests/test_cancel_everywhere.py has the same for every loop step.

Endless waits end by a cancel only, and clean-ups take turns of the loop instead of time, so most tests run on any loop.
"""

import asyncio
import gc
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import anyio
import pytest

from cano import (
    AttemptTimeoutError,
    CanoError,
    ConfigurationError,
    JoinConfig,
    JoinError,
    JoinStrategy,
    Resource,
    SplitResult,
    Task,
    TaskConfig,
    Workflow,
    WorkflowCancelledError,
    WorkflowError,
    WorkflowTimeoutError,
    _tasks,
    in_thread,
)
from cano.testing import assert_no_orphans, run


class Boom(Exception):
    """A failure of the user's own."""


async def ticks(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def forever() -> None:
    await asyncio.get_running_loop().create_future()


class Diary:
    """What happened, in order."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def __str__(self) -> str:
        return " ".join(self.lines)

    async def waits(self, name: str, clean_up: int = 2) -> Any:
        """Wait until cancelled, then clean up for some turns of the loop."""
        self.lines.append(f"+{name}")
        try:
            await forever()
        except asyncio.CancelledError as error:
            self.lines.append(f"!{name}" + "".join(f"({arg})" for arg in error.args))
            try:
                await ticks(clean_up)
            except asyncio.CancelledError:
                self.lines.append(f"!!{name}")
                raise
            self.lines.append(f".{name}")
            raise

    def waiting(self, name: str, *, config: TaskConfig | None = None, clean_up: int = 2) -> Any:
        """`waits` as a task."""

        async def task() -> Any:
            return await self.waits(name, clean_up)

        return configured(task, config)


def configured(function: Any, config: TaskConfig | None) -> Any:
    class Configured(Task[Any]):
        name = function.__name__

    if config is None:
        return function
    task = Configured()
    task.config = config
    task.run = function  # type: ignore[attr-defined]
    return task


def one(task: Any, resources: Any = None) -> Workflow[str]:
    """A workflow of one state."""
    return Workflow[str](resources).register("only", task).add_exit_state("done")


def split(*branches: Any, strategy: JoinStrategy = JoinStrategy.All, **join: Any) -> Workflow[str]:
    """A workflow of one split."""
    return Workflow[str]().register_split("only", branches, JoinConfig(strategy, "done", **join)).add_exit_state("done")


async def cancelled_after(count: int, awaitable: Any, *messages: str) -> asyncio.Task[Any]:
    """Start the work in a task, cancel that after some turns (and again a little later for each further message), wait."""
    task = asyncio.ensure_future(awaitable)
    await ticks(count)
    for message in messages or (None,):
        task.cancel(message)
        await ticks(4)
    await asyncio.wait((task,))
    return task


class Part(Resource):
    """A resource whose set-up or tear-down waits for ever when told to."""

    def __init__(self, diary: Diary, name: str, *, hangs_in: str = "") -> None:
        self.diary = diary
        self.name = name
        self.hangs_in = hangs_in

    async def setup(self) -> None:
        if self.hangs_in == "setup":
            await self.diary.waits(f"setup-{self.name}")
        self.diary.lines.append(f"up-{self.name}")

    async def teardown(self) -> None:
        self.diary.lines.append(f"down-{self.name}")
        if self.hangs_in == "teardown":
            await self.diary.waits(f"teardown-{self.name}")


def parts(diary: Diary, hanging: str = "", where: str = "") -> dict[str, Part]:
    return {name: Part(diary, name, hangs_in=where if name == hanging else "") for name in "abc"}


class TestWhoGetsWhat:
    async def test_task_cancel_raises_cancelled_error_with_its_message(self) -> None:
        """Whoever cancels the task that awaits the run gets asyncio's own error, with the message given."""
        # CN-006
        task = await cancelled_after(1, one(forever).orchestrate("only"), "because")

        with pytest.raises(asyncio.CancelledError) as caught:
            task.result()

        assert caught.value.args == ("because",)
        assert task.cancelling() == 1

    @pytest.mark.virtual
    async def test_timeout_around_a_run_raises_timeout_error(self) -> None:
        """`asyncio.timeout` around a run ends it and raises its own error; the count of cancels is back to zero."""
        diary = Diary()

        with pytest.raises(TimeoutError) as caught:
            async with asyncio.timeout(5):
                await one(diary.waiting("task")).orchestrate("only")

        assert type(caught.value) is TimeoutError
        assert str(diary) == "+task !task .task"
        assert asyncio.current_task().cancelling() == 0

    async def test_anyio_scope_around_a_run_ends_it(self) -> None:
        """An anyio scope around a run knows its own cancel when it comes back out."""
        diary = Diary()

        with anyio.CancelScope() as scope:
            asyncio.get_running_loop().call_soon(scope.cancel)
            await split(diary.waiting("a"), diary.waiting("b")).orchestrate("only")

        assert scope.cancelled_caught
        assert asyncio.current_task().cancelling() == 0

    async def test_run_cancel_raises_workflow_cancelled_error_to_every_awaiter(self) -> None:
        """One `Run.cancel` reaches everybody who awaits the handle, each with an error that says why."""
        # CN-002, CN-005
        handle = one(forever).start("only")
        awaiters = [asyncio.ensure_future(handle) for _ in range(5)]
        await ticks(2)

        accepted = handle.cancel("no longer needed")
        errors = await asyncio.gather(*awaiters, return_exceptions=True)

        assert accepted
        assert [type(error) for error in errors] == [WorkflowCancelledError] * 5
        assert {error.reason for error in errors} == {"no longer needed"}
        assert all(isinstance(error, WorkflowError) and isinstance(error, CanoError) for error in errors)
        assert not any(isinstance(error, asyncio.CancelledError) for error in errors)
        assert all(awaiter.cancelling() == 0 for awaiter in awaiters)
        with pytest.raises(WorkflowCancelledError, match="no longer needed"):
            await handle  # also later

    @pytest.mark.parametrize(
        ("reason", "text"),
        [
            pytest.param(None, "the run was cancelled", id="none"),
            pytest.param("budget cut", "the run was cancelled: 'budget cut'", id="text"),
            pytest.param("line\nbreak", "the run was cancelled: 'line\\nbreak'", id="escaped"),
        ],
    )
    async def test_run_cancel_error_says_why_and_where(self, reason: str | None, text: str) -> None:
        """The error has the reason as attribute and in its text, and knows the state the run was in."""
        handle = one(forever).start("only", workflow_id="order-7")
        await ticks(1)

        handle.cancel(reason)
        with pytest.raises(WorkflowCancelledError) as caught:
            await handle

        assert caught.value.reason == reason
        assert str(caught.value) == text
        assert (caught.value.state, caught.value.path, caught.value.workflow_id) == ("only", ("only",), "order-7")

    @pytest.mark.parametrize("reason", [3, b"bytes", True], ids=repr)
    async def test_run_cancel_refuses_a_reason_that_is_no_text(self, reason: Any) -> None:
        """A reason that is not a text is refused, and the run goes on."""
        handle = one(forever).start("only")
        await ticks(1)

        with pytest.raises(ConfigurationError, match="reason"):
            handle.cancel(reason)

        assert not handle.done()
        handle.cancel()
        await asyncio.gather(handle, return_exceptions=True)

    async def test_run_cancel_again_keeps_the_first_reason(self) -> None:
        """Cancelling once more is accepted while the run cleans up, and the first reason counts."""
        # CN-001, CN-013
        diary = Diary()
        handle = one(diary.waiting("task", clean_up=20)).start("only")
        await ticks(1)

        first = handle.cancel("first")
        await ticks(3)
        second = handle.cancel("second")
        with pytest.raises(WorkflowCancelledError) as caught:
            await handle

        assert (first, second, caught.value.reason) == (True, True, "first")

    async def test_run_cancel_of_a_finished_run_changes_nothing(self) -> None:
        """After the end a cancel is refused, and the result stays, however often it is awaited."""
        handle = one(lambda: "done").start("only")
        first = await handle

        accepted = handle.cancel("late")

        assert (accepted, first, await handle, handle.done()) == (False, "done", "done", True)

    async def test_handle_dropped_does_not_cancel(self) -> None:
        """A run goes on when nobody keeps its handle."""
        # CN-003
        finished = asyncio.Event()

        async def task() -> str:
            await ticks(5)
            finished.set()
            return "done"

        one(task).start("only")
        gc.collect()

        await finished.wait()
        await ticks(2)

    async def test_cancelled_awaiter_of_a_handle_cancels_the_run(self) -> None:
        """As with a task: the run ends, every awaiter gets CancelledError, and only the cancelled one was cancelled."""
        diary = Diary()
        handle = one(diary.waiting("task")).start("only")
        first, second = asyncio.ensure_future(handle), asyncio.ensure_future(handle)
        await ticks(2)

        first.cancel("mine")
        await asyncio.wait((first, second))

        assert first.cancelled()
        assert second.cancelled()
        assert (first.cancelling(), second.cancelling()) == (1, 0)
        assert str(diary) == "+task !task(mine) .task"

    async def test_shielded_run_outlives_its_awaiter(self) -> None:
        """`asyncio.shield` keeps the run going when its awaiter is cancelled."""
        goes_on = asyncio.Event()

        async def task() -> str:
            await goes_on.wait()
            return "done"

        handle = one(task).start("only")

        async def awaiter() -> str:
            return await asyncio.shield(handle)

        awaited = await cancelled_after(3, awaiter())
        goes_on.set()

        assert awaited.cancelled()
        assert await handle == "done"

    @pytest.mark.parametrize("order", ["run first", "awaiter first"])
    async def test_awaiter_cancelled_together_with_the_run_gets_cancelled_error(self, order: str) -> None:
        """Who was cancelled itself must stop: CancelledError goes before WorkflowCancelledError."""
        handle = one(forever).start("only")
        awaiter, other = asyncio.ensure_future(handle), asyncio.ensure_future(handle)
        await ticks(2)

        for cancel in (handle.cancel, awaiter.cancel) if order == "run first" else (awaiter.cancel, handle.cancel):
            cancel("together")
        await asyncio.wait((awaiter, other))

        assert awaiter.cancelled()
        assert isinstance(other.exception(), WorkflowCancelledError)

    async def test_run_await_with_a_cancel_pending_passes_it_on(self) -> None:
        """A cancel of the awaiter that was requested but not yet delivered is not lost in WorkflowCancelledError."""

        async def awaiter() -> None:
            handle = one(forever).start("only")
            await ticks(1)
            handle.cancel("the run")
            asyncio.current_task().cancel("the awaiter")
            await handle

        task = asyncio.ensure_future(awaiter())
        await asyncio.wait((task,))

        assert task.cancelled()

    async def test_run_cancel_in_the_clean_up_of_a_cancelled_task_raises_its_own_error(self) -> None:
        """A task that was cancelled before, and cancels its run while it cleans up, gets WorkflowCancelledError."""
        seen = []

        async def owner() -> None:
            handle = one(forever).start("only")
            try:
                await forever()
            finally:
                handle.cancel("owner goes")
                try:
                    await handle
                except WorkflowCancelledError as error:
                    seen.append(error.reason)

        task = await cancelled_after(2, owner())

        assert task.cancelled()
        assert seen == ["owner goes"]

    async def test_gather_over_handles_cancels_each_run(self) -> None:
        """`asyncio.gather` of handles passes its cancel on to every run."""
        diary = Diary()
        handles = [one(diary.waiting(name)).start("only") for name in "ab"]

        async def both() -> list[str]:
            return await asyncio.gather(*handles)

        task = await cancelled_after(3, both())

        assert task.cancelled()
        assert sorted(diary.lines) == ["!a", "!b", "+a", "+b", ".a", ".b"]
        assert all(handle.done() for handle in handles)

    @pytest.mark.virtual
    @pytest.mark.parametrize("who", ["task", "handle"])
    @pytest.mark.parametrize("first", ["cancel", "timeout"])
    @pytest.mark.parametrize("shape", ["task", "split"])
    async def test_cancel_in_the_same_tick_as_the_run_timeout_wins(self, shape: str, first: str, who: str) -> None:
        """Whichever comes first, a run that is cancelled and over its budget at once counts as cancelled."""
        # CN-014
        diary, loop = Diary(), asyncio.get_running_loop()
        workflow = one(diary.waiting("task")) if shape == "task" else split(diary.waiting("a"), diary.waiting("b"))
        handle = workflow.start("only", timeout=5)
        awaiter = asyncio.ensure_future(handle)
        cancel = handle.cancel if who == "handle" else awaiter.cancel

        if first == "timeout":  # at equal deadlines, the timer that was armed first fires first
            await ticks(3)
        loop.call_at(5, cancel, "now")
        (outcome,) = await asyncio.gather(awaiter, return_exceptions=True)

        assert type(outcome) is (WorkflowCancelledError if who == "handle" else asyncio.CancelledError)
        assert loop.time() == 5

    @pytest.mark.virtual
    async def test_run_over_its_budget_that_nobody_cancelled_times_out(self) -> None:
        """A handle that could be cancelled, but is not, leaves the timeout what it is."""
        # CN-020
        handle = one(forever).start("only", timeout=5)

        with pytest.raises(WorkflowTimeoutError) as caught:
            await handle

        assert caught.value.limit == 5
        assert asyncio.current_task().cancelling() == 0

    @pytest.mark.virtual
    async def test_timeout_around_a_run_that_ends_with_its_own_budget_is_the_one_raised(self) -> None:
        """Two deadlines in the same tick: the outer one, which cancelled the run, is the one that is told."""
        with pytest.raises(TimeoutError) as caught:
            async with asyncio.timeout(5):
                await one(forever).orchestrate("only", timeout=5)

        assert type(caught.value) is TimeoutError
        assert asyncio.current_task().cancelling() == 0

    @pytest.mark.parametrize("shape", ["task", "split"])
    def test_interrupt_from_the_keyboard_ends_the_run_first(self, shape: str) -> None:
        """Ctrl-C cancels the run, which cleans up before `asyncio.run` raises KeyboardInterrupt."""
        diary = Diary()

        async def interrupts() -> str:
            signal.raise_signal(signal.SIGINT)
            return await diary.waits("task")

        workflow = one(interrupts, parts(diary)) if shape == "task" else split(interrupts, diary.waiting("other"))
        with pytest.raises(KeyboardInterrupt):
            run(workflow.orchestrate("only"))

        assert ".task" in diary.lines
        assert diary.lines[-1] in ("down-a", ".other")


class TestWhereItFalls:
    @pytest.mark.parametrize("how", ["task", "handle"])
    async def test_cancel_before_the_first_step_runs_no_user_code(self, how: str) -> None:
        """A run that is cancelled before it began sets nothing up and starts no task."""
        # CN-007
        diary = Diary()
        workflow = one(diary.waiting("task"), parts(diary))

        if how == "task":
            outcome = await cancelled_after(0, workflow.orchestrate("only"))
        else:
            handle = workflow.start("only")
            handle.cancel()
            outcome = asyncio.ensure_future(handle)
            await asyncio.wait((outcome,))

        assert str(diary) == ""
        assert outcome.cancelled() if how == "task" else isinstance(outcome.exception(), WorkflowCancelledError)

    async def test_cancel_during_set_up_tears_down_what_was_set_up(self) -> None:
        """The set-up in progress is cancelled, what was up goes down, the rest is never touched, no task starts."""
        diary = Diary()

        task = await cancelled_after(2, one(diary.waiting("task"), parts(diary, "b", "setup")).orchestrate("only"), "m")

        assert task.cancelled()
        assert str(diary) == "up-a +setup-b !setup-b(m) .setup-b down-a"

    async def test_cancel_during_an_attempt_lets_it_clean_up(self) -> None:
        """The task sees CancelledError where it waits, may wait in its clean-up, and resources go afterwards, once."""
        # CN-016
        diary = Diary()

        task = await cancelled_after(2, one(diary.waiting("task"), parts(diary)).orchestrate("only"), "m")

        assert task.cancelled()
        assert str(diary) == "up-a up-b up-c +task !task(m) .task down-c down-b down-a"

    async def test_cancelled_attempt_is_not_repeated(self) -> None:
        """Cancellation is no failure: it is not retried, whatever the policy."""
        diary = Diary()
        config = TaskConfig(retry_on=lambda _: True).with_fixed_retry(5, 0)

        task = await cancelled_after(2, one(diary.waiting("task", config=config)).orchestrate("only"))

        assert task.cancelled()
        assert str(diary) == "+task !task .task"

    @pytest.mark.parametrize("how", ["task", "handle", "join"])
    async def test_attempt_that_turns_the_cancel_into_an_error_is_not_repeated(self, how: str) -> None:
        """A task that answers a cancel with an error of its own has failed for good: a retry would lose the cancel."""
        attempts = []

        async def converts() -> str:
            attempts.append(1)
            try:
                await forever()
            except asyncio.CancelledError as error:
                raise Boom("converted") from error
            return "done"

        async def wins() -> None:
            await ticks(2)

        task = configured(converts, TaskConfig().with_fixed_retry(3, 0))
        if how == "join":
            outcome: Any = await split(task, wins, strategy=JoinStrategy.Any).orchestrate("only")
        elif how == "task":
            outcome = (await cancelled_after(2, one(task).orchestrate("only"))).exception()
        else:
            handle = one(task).start("only")
            await ticks(2)
            handle.cancel()
            (outcome,) = await asyncio.gather(handle, return_exceptions=True)

        assert len(attempts) == 1
        assert outcome == "done" if how == "join" else type(outcome) is Boom

    @pytest.mark.virtual
    async def test_cancel_during_back_off_ends_it_at_once(self) -> None:
        """A run that waits for its next attempt ends without one, and without waiting on."""
        attempts = []

        def fails() -> None:
            attempts.append(1)
            raise Boom

        workflow = one(configured(fails, TaskConfig().with_fixed_retry(5, 60)))
        task = asyncio.ensure_future(workflow.orchestrate("only"))
        await asyncio.sleep(90)

        task.cancel()
        await asyncio.wait((task,))

        assert task.cancelled()
        assert (len(attempts), asyncio.get_running_loop().time()) == (2, 90)

    @pytest.mark.virtual
    async def test_cancel_in_the_same_tick_as_the_attempt_timeout_wins(self) -> None:
        """An attempt that is cancelled as it times out is neither reported as a timeout nor repeated."""
        diary = Diary()
        config = TaskConfig().with_fixed_retry(3, 1).with_attempt_timeout(5)
        task = asyncio.ensure_future(one(diary.waiting("task", config=config)).orchestrate("only"))

        await ticks(2)
        asyncio.get_running_loop().call_at(5, task.cancel)
        await asyncio.wait((task,))

        assert task.cancelled()
        assert str(diary) == "+task !task .task"

    async def test_cancel_while_branches_are_being_made_starts_none(self) -> None:
        """A cancelled factory of branches ends like a task, and no branch is made."""
        diary = Diary()

        async def make() -> list[Any]:
            await diary.waits("factory")
            return [diary.waiting("branch")]

        workflow = (
            Workflow[str]().register_split("only", make, JoinConfig(JoinStrategy.All, "done")).add_exit_state("done")
        )
        task = await cancelled_after(2, workflow.orchestrate("only"))

        assert task.cancelled()
        assert str(diary) == "+factory !factory .factory"

    async def test_cancel_during_a_split_reaches_every_branch_with_its_message(self) -> None:
        """Each branch gets the cancel with its message, and the run ends when the slowest has cleaned up."""
        # CN-005, B27
        diary = Diary()
        branches = [diary.waiting(name, clean_up=turns) for name, turns in (("a", 1), ("b", 9), ("c", 3))]

        task = await cancelled_after(3, split(*branches).orchestrate("only"), "stop")

        assert task.cancelled()
        assert str(diary) == "+a +b +c !a(stop) !b(stop) !c(stop) .a .c .b"

    async def test_cancel_during_a_split_never_starts_what_the_bulkhead_holds_back(self) -> None:
        """Branches that wait for the bulkhead stay unstarted."""
        diary = Diary()

        task = await cancelled_after(3, split(*map(diary.waiting, "abcd"), bulkhead=2).orchestrate("only"))

        assert task.cancelled()
        assert str(diary) == "+a +b !a !b .a .b"

    async def test_cancel_while_losers_clean_up_passes_through(self) -> None:
        """A decided join still waits for its losers; a cancel in that time ends the run, not their clean-up's promise."""
        diary = Diary()

        async def wins() -> None:
            await ticks(1)

        workflow = split(diary.waiting("loser", clean_up=20), wins, strategy=JoinStrategy.Any)
        task = await cancelled_after(8, workflow.orchestrate("only"))

        assert task.cancelled()
        assert str(diary) == "+loser !loser !!loser"

    async def test_cancel_reaches_a_split_within_a_branch(self) -> None:
        """The cancel and its message go down through every level of nested runs."""
        diary = Diary()
        inner = split(diary.waiting("x"), diary.waiting("y"))

        async def nested() -> str:
            return await inner.orchestrate("only")

        task = await cancelled_after(5, split(nested, diary.waiting("z")).orchestrate("only"), "stop")

        assert task.cancelled()
        assert sorted(diary.lines) == ["!x(stop)", "!y(stop)", "!z(stop)", "+x", "+y", "+z", ".x", ".y", ".z"]

    async def test_errors_of_cancelled_branches_do_not_replace_the_cancel(self) -> None:
        """What branches raise while they are cancelled is not reported: CancelledError leaves the run."""

        async def fails() -> None:
            try:
                await forever()
            finally:
                raise Boom

        task = await cancelled_after(3, split(fails, forever).orchestrate("only"))

        assert task.cancelled()

    @pytest.mark.parametrize("ending", ["done", Boom()], ids=["success", "failure"])
    async def test_cancel_during_tear_down_still_tears_the_rest_down(self, ending: Any) -> None:
        """The tear-down in progress is cancelled, the others are done, and the cancel replaces what the run ended with."""
        diary = Diary()

        def task() -> str:
            if isinstance(ending, Exception):
                raise ending
            return ending

        ended = await cancelled_after(2, one(task, parts(diary, "b", "teardown")).orchestrate("only"), "m")

        assert ended.cancelled()
        assert str(diary) == "up-a up-b up-c down-c down-b +teardown-b !teardown-b(m) .teardown-b down-a"

    async def test_run_cancel_during_tear_down_is_told_like_any_other(self) -> None:
        """`Run.cancel` is accepted until the last tear-down is over."""
        diary = Diary()
        handle = one(lambda: "done", parts(diary, "a", "teardown")).start("only")
        await ticks(2)

        accepted = handle.cancel("late")
        with pytest.raises(WorkflowCancelledError, match="late"):
            await handle

        assert accepted
        assert str(diary).endswith("down-a +teardown-a !teardown-a(late) .teardown-a")

    async def test_run_that_never_suspends_ends_before_its_own_cancel(self) -> None:
        """Code that never waits cannot be interrupted: the run succeeds, and its caller's next await is cancelled."""
        # B28: past the last task nothing is taken back
        results = []

        def cancels() -> str:
            asyncio.current_task().cancel("self")
            return "done"

        async def caller() -> None:
            results.append(await one(cancels).orchestrate("only"))
            await forever()

        task = asyncio.ensure_future(caller())
        await asyncio.wait((task,))

        assert task.cancelled()
        assert results == ["done"]

    async def test_loop_of_plain_tasks_can_be_cancelled(self) -> None:
        """Tasks that never wait give the loop a turn now and then between states, and there the cancel falls."""
        visits = []

        def spins() -> str:
            visits.append(1)
            return "only"

        task = await cancelled_after(3, one(spins).orchestrate("only"))

        assert task.cancelled()
        assert len(visits) > 1024


class TestSecondCancel:
    async def test_second_cancel_reaches_the_clean_up_of_a_task(self) -> None:
        """A second cancel interrupts the task's clean-up, and the newest message is the one told."""
        diary = Diary()

        task = await cancelled_after(2, one(diary.waiting("task", clean_up=20)).orchestrate("only"), "one", "two")

        assert task.cancelled()
        assert task.cancelling() == 2
        assert str(diary) == "+task !task(one) !!task"
        with pytest.raises(asyncio.CancelledError, match="two"):
            task.result()

    async def test_second_cancel_reaches_the_clean_up_of_every_branch(self) -> None:
        """A second cancel interrupts the clean-up of the branches that are left; the run still waits for all of them."""
        diary = Diary()
        quick, slow = diary.waiting("quick", clean_up=0), diary.waiting("slow", clean_up=20)

        task = await cancelled_after(3, split(quick, slow, slow).orchestrate("only"), "one", "two")

        assert task.cancelled()
        assert task.cancelling() == 2
        assert diary.lines[-2:] == ["!!slow", "!!slow"]
        assert diary.lines.count("!slow(one)") == 2

    async def test_second_cancel_during_tear_down_still_tears_the_rest_down(self) -> None:
        """Each cancel ends one tear-down at most; none is left out."""
        diary = Diary()
        hanging = {name: Part(diary, name, hangs_in="teardown") for name in "ab"} | {"c": Part(diary, "c")}
        task = asyncio.ensure_future(one(lambda: "done", hanging).orchestrate("only"))
        await ticks(2)

        for _ in range(2):
            task.cancel()
            await ticks(10)
        await asyncio.wait((task,))

        assert task.cancelled()
        assert [line for line in diary.lines if line.startswith("down")] == ["down-c", "down-b", "down-a"]
        assert (diary.lines.count("!teardown-a"), diary.lines.count("!teardown-b")) == (1, 1)

    def test_branches_alive_at_the_end_of_asyncio_run_are_awaited(self) -> None:
        """`asyncio.run` cancels each branch as well as their run, in any order; whatever is cut short has ended."""
        diary = Diary()

        async def main() -> None:
            split(diary.waiting("branch", clean_up=20)).start("only")
            await ticks(5)

        run(main())

        assert str(diary) in ("+branch !branch !!branch", "+branch !branch .branch")

    @pytest.mark.virtual
    @pytest.mark.parametrize("shape", ["task", "split", "thread", "tear-down"])
    async def test_newest_cancel_leaves_the_run(self, shape: str) -> None:
        """As from any coroutine, the newest of several cancellations comes out, with its message; anyio relies on it."""
        diary, entered, goes_on = Diary(), threading.Event(), threading.Event()

        def blocks() -> None:
            entered.set()
            goes_on.wait(10)

        workflow = {
            "task": lambda: one(diary.waiting("task", clean_up=20)),
            "split": lambda: split(diary.waiting("branch", clean_up=20)),
            "thread": lambda: one(in_thread(blocks)),
            "tear-down": lambda: one(lambda: "done", {name: Part(diary, name, hangs_in="teardown") for name in "ab"}),
        }[shape]()
        task = asyncio.ensure_future(workflow.orchestrate("only"))
        await ticks(3)
        while shape == "thread" and not entered.is_set():
            await ticks(1)

        for message in ("one", "two"):
            task.cancel(message)
            await ticks(5)
        goes_on.set()
        await asyncio.wait((task,))

        with pytest.raises(asyncio.CancelledError) as caught:
            task.result()
        assert caught.value.args == ("two",)


class TestSwallowedCancel:
    async def test_task_that_swallows_the_cancel_keeps_the_run_going(self) -> None:
        """As anywhere in asyncio, who catches CancelledError and goes on has taken it: the run reaches its end."""

        async def swallows() -> str:
            try:
                await forever()
            except asyncio.CancelledError:
                await ticks(2)
            return "done"

        task = await cancelled_after(2, one(swallows).orchestrate("only"))

        assert task.result() == "done"
        assert task.cancelling() == 1

    async def test_run_whose_task_swallows_the_cancel_of_the_handle_ends_as_if_there_was_none(self) -> None:
        """A handle that was cancelled in vain gives the exit state."""

        async def swallows() -> str:
            try:
                await forever()
            except asyncio.CancelledError:
                return "done"

        handle = one(swallows).start("only")
        await ticks(1)

        accepted = handle.cancel()

        assert (accepted, await handle) == (True, "done")

    @pytest.mark.virtual
    @pytest.mark.parametrize(
        ("then", "outcome"),
        [
            pytest.param("only", WorkflowTimeoutError, id="another state"),
            pytest.param("done", "done", id="exit"),
        ],
    )
    async def test_task_that_swallows_the_run_timeout_is_the_last_one(self, then: str, outcome: Any) -> None:
        """The budget is looked at again before each task, so one that ignores it is never followed by another."""
        # B30
        attempts = []

        async def swallows() -> str:
            attempts.append(1)
            try:
                await forever()
            except asyncio.CancelledError:
                await asyncio.sleep(10)
            return then

        (ended,) = await asyncio.gather(one(swallows).orchestrate("only", timeout=5), return_exceptions=True)

        assert ended == outcome if outcome == "done" else type(ended) is outcome
        assert len(attempts) == 1
        assert asyncio.get_running_loop().time() == 15
        assert asyncio.current_task().cancelling() == 0

    @pytest.mark.virtual
    @pytest.mark.parametrize("run_limit", [1, 1.5, 2, None])
    @pytest.mark.parametrize("attempt_limit", [1, 1.5, 2, None])
    @pytest.mark.parametrize("does", ["swallows", "cleans up"])
    @pytest.mark.parametrize("shape", ["task", "branch"])
    async def test_timeouts_of_attempt_and_run_take_back_what_they_asked_for(
        self, shape: str, does: str, attempt_limit: float | None, run_limit: float | None
    ) -> None:
        """Whatever the limits and whatever the task makes of them, no cancel of theirs stays counted."""

        async def task() -> str:
            for _ in range(3):
                try:
                    await asyncio.sleep(1.25)
                except asyncio.CancelledError:
                    if does == "cleans up":
                        await asyncio.sleep(5)
                        raise
            return "done"

        configuration = TaskConfig().with_attempt_timeout(attempt_limit)
        workflow = one(configured(task, configuration)) if shape == "task" else split(configured(task, configuration))
        host = asyncio.ensure_future(workflow.orchestrate("only", timeout=run_limit))
        (outcome,) = await asyncio.gather(host, return_exceptions=True)

        assert host.cancelling() == 0
        if attempt_limit is None and run_limit is None:
            assert outcome == "done"
        elif does == "cleans up":
            of_attempt = AttemptTimeoutError if shape == "task" else JoinError
            assert type(outcome) is (of_attempt if run_limit is None else WorkflowTimeoutError)
        else:
            assert outcome == "done" or (shape == "branch" and type(outcome) is WorkflowTimeoutError)

    async def test_branch_that_swallows_the_cancel_is_waited_for(self) -> None:
        """A branch that goes on after a cancel holds the run up until it ends, and the cancel comes out all the same."""
        goes_on = asyncio.Event()

        async def swallows() -> str:
            while not goes_on.is_set():
                try:
                    await goes_on.wait()
                except asyncio.CancelledError:
                    continue
            return "value"

        task = asyncio.ensure_future(split(swallows, forever).orchestrate("only"))
        await ticks(3)

        for _ in range(3):
            task.cancel()
            await ticks(5)
        was_done = task.done()
        goes_on.set()
        await asyncio.wait((task,))

        assert not was_done
        assert task.cancelled()

    async def test_tear_down_that_swallows_the_cancel_does_not_hide_it(self) -> None:
        """A tear-down is the engine's own await: what it keeps to itself is raised when all is down."""
        diary = Diary()

        class Swallows(Resource):
            async def teardown(self) -> None:
                try:
                    await forever()
                except asyncio.CancelledError:
                    diary.lines.append("swallowed")

        task = await cancelled_after(
            2, one(lambda: "done", {"a": Part(diary, "a"), "b": Swallows()}).orchestrate("only")
        )

        assert task.cancelled()
        assert str(diary) == "up-a swallowed down-a"


class TestThreads:
    async def test_running_call_is_waited_for(self) -> None:
        """A thread cannot be interrupted: the cancel comes out when the call has ended, and its result is dropped."""
        entered, goes_on, ended = threading.Event(), threading.Event(), threading.Event()

        def blocks() -> str:
            entered.set()
            goes_on.wait(10)
            ended.set()
            return "done"

        task = asyncio.ensure_future(one(in_thread(blocks)).orchestrate("only"))
        while not entered.is_set():
            await ticks(1)

        for _ in range(3):
            task.cancel("stop")
            await ticks(5)
        was_done = task.done()
        goes_on.set()
        await asyncio.wait((task,))

        assert not was_done
        assert task.cancelled()
        assert ended.is_set()

    async def test_error_of_a_running_call_gives_way_to_the_cancel(self) -> None:
        """What a function raises after the cancel is dropped, without a report by asyncio."""
        entered, goes_on = threading.Event(), threading.Event()

        def fails() -> None:
            entered.set()
            goes_on.wait(10)
            raise Boom

        task = asyncio.ensure_future(one(in_thread(fails)).orchestrate("only"))
        while not entered.is_set():
            await ticks(1)

        task.cancel()
        await ticks(2)
        goes_on.set()
        await asyncio.wait((task,))

        assert task.cancelled()

    async def test_call_that_waits_for_a_free_thread_is_dropped(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A call that has not begun never will: the cancel comes out at once."""
        entered, goes_on, calls = threading.Event(), threading.Event(), []

        def blocks() -> str:
            entered.set()
            goes_on.wait(10)
            return "done"

        with ThreadPoolExecutor(1, thread_name_prefix="cano-thread") as pool:
            monkeypatch.setattr(_tasks._threads, "_pool", pool)
            busy = asyncio.ensure_future(one(in_thread(blocks)).orchestrate("only"))
            while not entered.is_set():
                await ticks(1)

            queued = await cancelled_after(2, one(in_thread(lambda: calls.append(1))).orchestrate("only"))
            was_busy = not busy.done()
            goes_on.set()

            assert await busy == "done"

        assert queued.cancelled()
        assert was_busy
        assert calls == []


class TestFromWithin:
    async def test_task_may_cancel_its_own_run(self) -> None:
        """A task that cancels the run it is in gets the cancel where it waits next."""
        diary, handles = Diary(), []

        async def cancels() -> Any:
            handles[0].cancel("from within")
            return await diary.waits("task")

        handles.append(one(cancels, parts(diary)).start("only"))
        with pytest.raises(WorkflowCancelledError, match="from within"):
            await handles[0]

        assert diary.lines[3:] == ["+task", "!task(from within)", ".task", "down-c", "down-b", "down-a"]

    @pytest.mark.virtual
    @pytest.mark.parametrize("where", ["retry", "attempt timeout", "run timeout", "split", "set-up"])
    async def test_cancel_pending_when_the_run_first_waits_is_not_lost(self, where: str) -> None:
        """A cancel that was requested before the run waits at all is one that it must still hear of."""
        attempts = []

        async def cleans_up() -> None:
            attempts.append(1)
            try:
                await forever()
            finally:
                await asyncio.sleep(60)
                if where == "retry":
                    raise Boom

        class Slow(Resource):
            async def setup(self) -> None:
                await cleans_up()

        config = {
            "retry": TaskConfig().with_fixed_retry(3, 0),
            "attempt timeout": TaskConfig().with_attempt_timeout(5).with_fixed_retry(3, 0),
        }.get(where)
        workflow = {
            "split": lambda: split(cleans_up),
            "set-up": lambda: one(lambda: "done", {"slow": Slow()}),
        }.get(where, lambda: one(configured(cleans_up, config)))()
        timeout = 5 if where in ("run timeout", "split", "set-up") else None

        async def caller() -> None:
            asyncio.current_task().cancel("pending")
            await workflow.orchestrate("only", timeout=timeout)

        (outcome,) = await asyncio.gather(asyncio.ensure_future(caller()), return_exceptions=True)

        assert type(outcome) is (Boom if where == "retry" else asyncio.CancelledError)
        assert len(attempts) <= 1

    async def test_task_that_awaits_its_own_run_is_refused(self) -> None:
        """A run cannot wait for itself: asyncio refuses it, and the refusal is the task's failure."""
        handles = []

        async def awaits() -> str:
            return await handles[0]

        handles.append(one(awaits).start("only"))

        with pytest.raises(RuntimeError, match="cannot await on itself"):
            await handles[0]

    async def test_branch_may_cancel_its_own_run(self) -> None:
        """A branch that cancels the run it is in ends with the others."""
        diary, handles = Diary(), []

        async def cancels() -> Any:
            handles[0].cancel("from within")
            return await diary.waits("branch")

        handles.append(split(diary.waiting("other"), cancels).start("only"))
        with pytest.raises(WorkflowCancelledError, match="from within"):
            await handles[0]

        assert sorted(diary.lines[-2:]) == [".branch", ".other"]

    @pytest.mark.parametrize("where", ["body", "done callback", "finalizer"])
    async def test_branch_may_cancel_a_sibling(self, where: str) -> None:
        """A branch that somebody cancels counts as cancelled, and the join goes on with the rest."""
        diary, siblings = Diary(), []

        class Dropped:
            def __del__(self) -> None:
                siblings[0].cancel()

        async def sibling() -> Any:
            siblings.append(asyncio.current_task())
            return await diary.waits("sibling")

        async def cancels() -> str:
            if where == "body":
                siblings[0].cancel()
            elif where == "done callback":
                asyncio.current_task().add_done_callback(lambda _: siblings[0].cancel())
            else:
                Dropped()
            return "value"

        workflow = Workflow[str]().add_exit_state("done")
        workflow.register_split(
            "only", [sibling, cancels], JoinConfig(JoinStrategy.PartialTimeout, "after", timeout=60)
        )

        def after(result: SplitResult) -> str:
            diary.lines.append(f"cancelled={result.cancelled} values={result.values()}")
            return "done"

        await workflow.register("after", after).orchestrate("only")

        assert str(diary) == "+sibling !sibling .sibling cancelled=[0] values=['value']"

    async def test_finalizer_of_a_branch_value_may_cancel_the_run(self) -> None:
        """What a value's ``__del__`` does while the engine drops it finds no lock held: the cancel falls at the next wait."""
        diary, handles = Diary(), []

        class Dropped:
            def __del__(self) -> None:
                handles[0].cancel("finalizer")

        async def makes() -> Dropped:
            return Dropped()

        workflow = Workflow[str]().register_split("only", [makes], JoinConfig(JoinStrategy.All, "middle"))
        workflow.register("middle", lambda: "last").register("last", diary.waiting("last")).add_exit_state("done")
        handles.append(workflow.start("only"))

        with pytest.raises(WorkflowCancelledError, match="finalizer"):
            await handles[0]

        assert str(diary) == "+last !last(finalizer) .last"


class TestNotCancellation:
    @pytest.mark.parametrize("shape", ["task", "split"])
    async def test_exception_that_is_no_exception_ends_the_run_and_passes_unchanged(self, shape: str) -> None:
        """A BaseException of a task is never retried or wrapped; the other branches are cancelled and awaited first."""

        class Abort(BaseException):
            pass

        diary, error = Diary(), Abort()

        async def aborts() -> None:
            await ticks(2)
            raise error

        task = configured(aborts, TaskConfig().with_fixed_retry(3, 0))
        workflow = one(task, parts(diary)) if shape == "task" else split(task, diary.waiting("other"))
        with pytest.raises(Abort) as caught:
            await workflow.orchestrate("only")

        assert caught.value is error
        assert diary.lines[-1] == ("down-a" if shape == "task" else ".other")
        assert_no_orphans()

    async def test_cancelled_error_that_nobody_asked_for_passes_through(self) -> None:
        """A task that raises CancelledError itself ends the run with it; no cancel is counted."""
        attempts = []

        def raises() -> None:
            attempts.append(1)
            raise asyncio.CancelledError("mine")

        task = asyncio.ensure_future(one(configured(raises, TaskConfig().with_fixed_retry(3, 0))).orchestrate("only"))
        await asyncio.wait((task,))

        assert task.cancelled()
        assert (len(attempts), task.cancelling()) == (1, 0)

    async def test_branch_that_cancels_itself_counts_as_cancelled(self) -> None:
        """A branch that ends in CancelledError is one outcome of the split, not a cancel of the run."""

        async def cancels_itself() -> None:
            asyncio.current_task().cancel()
            await forever()

        async def succeeds() -> str:
            return "value"

        outcome = await split(cancels_itself, succeeds, strategy=JoinStrategy.Any).orchestrate("only")

        assert outcome == "done"
        assert asyncio.current_task().cancelling() == 0
