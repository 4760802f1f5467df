"""Resources around runs: set up for the first, torn down after the last, injected into tasks.

What `Resources` does alone is in tests/test_resources.py; cancels at every step are in tests/test_cancel_everywhere.py.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from enum import Enum
from typing import Annotated, Any

import pytest

from cano import (
    ConfigurationError,
    FromResources,
    JoinConfig,
    JoinStrategy,
    MemoryStore,
    Res,
    Resource,
    ResourceError,
    ResourceNotFoundError,
    Resources,
    ResourceTypeError,
    RetryExhaustedError,
    RunContext,
    Task,
    TaskConfig,
    Workflow,
    WorkflowCancelledError,
    WorkflowTimeoutError,
)


class Boom(Exception):
    """A failure of the user's own."""


class Key(Enum):
    STORE = "store"


async def ticks(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


class Part(Resource):
    """A resource that writes down when it comes ("+a") and goes ("-a"), and may fail or take its time."""

    def __init__(
        self,
        diary: list[str],
        name: str,
        *,
        fails: BaseException | None = None,
        setup_takes: float = 0,
        teardown_takes: float = 0,
        teardown_fails: BaseException | None = None,
    ) -> None:
        self.diary = diary
        self.name = name
        self.fails = fails
        self.setup_takes = setup_takes
        self.teardown_takes = teardown_takes
        self.teardown_fails = teardown_fails

    async def setup(self) -> None:
        await asyncio.sleep(self.setup_takes)
        if self.fails is not None:
            raise self.fails
        self.diary.append(f"+{self.name}")

    async def teardown(self) -> None:
        await asyncio.sleep(self.teardown_takes)
        self.diary.append(f"-{self.name}")
        if self.teardown_fails is not None:
            raise self.teardown_fails


@pytest.fixture
def diary() -> list[str]:
    return []


def one(task: Any, resources: Any = None) -> Workflow[str]:
    """A workflow of one state."""
    return Workflow[str](resources).register("only", task).add_exit_state("done")


def writes(diary: list[str], result: Any = "done", *, turns: int = 2) -> Any:
    """A task that writes down that it ran, then ends with the result."""

    async def task() -> Any:
        diary.append("run")
        await ticks(turns)
        if isinstance(result, BaseException):
            raise result
        return result

    return task


class TestLifeCycle:
    async def test_run_sets_up_in_order_and_tears_down_in_reverse(self, diary: list[str]) -> None:
        """Resources come in insertion order before the first task, and go in reverse after the last."""
        # RE-003, RE-008
        workflow = one(writes(diary), {name: Part(diary, name) for name in "abc"})

        result = await workflow.orchestrate("only")

        assert result == "done"
        assert diary == ["+a", "+b", "+c", "run", "-c", "-b", "-a"]

    @pytest.mark.parametrize("count", [2, 3])
    async def test_runs_one_after_another_each_set_up_and_tear_down(self, diary: list[str], count: int) -> None:
        """Without anybody in between, every run has its own set-up and tear-down."""
        # RE-008
        workflow = one(writes(diary), {"a": Part(diary, "a")})

        for _ in range(count):
            await workflow.orchestrate("only")

        assert diary == ["+a", "run", "-a"] * count

    async def test_error_of_a_task_comes_out_after_the_tear_down(self, diary: list[str]) -> None:
        """A failing run tears down like any other, and raises the task's own exception."""
        # RE-008
        error = Boom()
        workflow = one(writes(diary, error), {name: Part(diary, name) for name in "ab"})

        with pytest.raises(Boom) as caught:
            await workflow.orchestrate("only")

        assert caught.value is error
        assert diary == ["+a", "+b", "run", "-b", "-a"]

    @pytest.mark.parametrize("how", ["task", "handle"])
    async def test_cancelled_run_tears_down_once(self, diary: list[str], how: str) -> None:
        """A cancelled run tears down before its awaiter hears of it."""
        # RE-008, CN-016, B35
        workflow = one(writes(diary, turns=100), {name: Part(diary, name) for name in "ab"})
        handle = workflow.start("only")
        awaiter = asyncio.ensure_future(handle)
        await ticks(10)

        (awaiter if how == "task" else handle).cancel()
        (outcome,) = await asyncio.gather(awaiter, return_exceptions=True)

        assert type(outcome) is (asyncio.CancelledError if how == "task" else WorkflowCancelledError)
        assert diary == ["+a", "+b", "run", "-b", "-a"]

    async def test_initial_state_that_is_an_exit_state_runs_no_task(self, diary: list[str]) -> None:
        """A run that starts at its end sets up and tears down like any other, and runs nothing between."""
        # WF-018
        workflow = one(writes(diary), {"a": Part(diary, "a")})

        result = await workflow.orchestrate("done")

        assert result == "done"
        assert diary == ["+a", "-a"]

    async def test_refused_run_sets_nothing_up(self, diary: list[str]) -> None:
        """A definition or an initial state that is refused comes before any set-up."""
        # WF-014
        workflow = one(writes(diary), {"a": Part(diary, "a")})

        with pytest.raises(ConfigurationError):
            await workflow.orchestrate("nowhere")

        assert diary == []

    async def test_failing_set_up_tears_down_what_was_set_up(self, diary: list[str]) -> None:
        """The set-up's own error comes out, what was up goes down in reverse, the rest is never touched."""
        # RE-004
        error = Boom()
        parts = {name: Part(diary, name, fails=error if name == "c" else None) for name in "abcd"}

        with pytest.raises(Boom) as caught:
            await one(writes(diary), parts).orchestrate("only")

        assert caught.value is error
        assert "while setting up resource 'c'" in caught.value.__notes__
        assert diary == ["+a", "+b", "-b", "-a"]

    async def test_failing_set_up_leaves_the_resources_usable(self, diary: list[str]) -> None:
        """The next run after a failed set-up tries again from the beginning."""
        parts = {"a": Part(diary, "a"), "b": Part(diary, "b", fails=Boom())}
        workflow = one(writes(diary), parts)

        with pytest.raises(Boom):
            await workflow.orchestrate("only")
        parts["b"].fails = None
        await workflow.orchestrate("only")

        assert diary == ["+a", "-a", "+a", "+b", "run", "-b", "-a"]

    @pytest.mark.parametrize("ending", ["done", Boom()], ids=["success", "failure"])
    async def test_failing_tear_down_is_logged_and_changes_nothing(
        self, diary: list[str], caplog: pytest.LogCaptureFixture, ending: Any
    ) -> None:
        """Errors of tear-downs go to the log; the others still go down, and the run ends as it did."""
        # RE-005, B36
        parts = {name: Part(diary, name, teardown_fails=Boom(name) if name != "b" else None) for name in "abc"}

        with caplog.at_level(logging.ERROR, logger="cano"):
            (outcome,) = await asyncio.gather(
                one(writes(diary, ending), parts).orchestrate("only"), return_exceptions=True
            )

        assert outcome is ending
        assert diary == ["+a", "+b", "+c", "run", "-c", "-b", "-a"]
        assert [record.getMessage() for record in caplog.records] == [
            "tear-down of resource 'c' failed",
            "tear-down of resource 'a' failed",
        ]

    @pytest.mark.parametrize("where", ["set-up", "tear-down"])
    async def test_exception_that_is_no_exception_tears_down_all_the_same(self, diary: list[str], where: str) -> None:
        """A BaseException of a set-up or a tear-down is contained until all is down, then passes unchanged."""
        # B36, PAN-013

        class Abort(BaseException):
            pass

        error = Abort()
        failing = {"fails": error} if where == "set-up" else {"teardown_fails": error}
        parts = {"a": Part(diary, "a"), "b": Part(diary, "b", **failing)}

        with pytest.raises(Abort) as caught:
            await one(writes(diary), parts).orchestrate("only")

        assert caught.value is error
        assert diary == (["+a", "-a"] if where == "set-up" else ["+a", "+b", "run", "-b", "-a"])

    async def test_plain_object_is_only_held(self) -> None:
        """An object that happens to be a context manager, such as a lock, is never entered."""
        lock = asyncio.Lock()

        async def task(held: Annotated[asyncio.Lock, Res("lock")]) -> str:
            assert held is lock
            return "locked" if held.locked() else "done"

        assert await one(task, {"lock": lock}).orchestrate("only") == "done"

    async def test_branches_of_a_split_are_over_before_the_tear_down(self, diary: list[str]) -> None:
        """Resources go when the last branch has ended, the cancelled losers of a join included."""
        # B27

        async def loser() -> None:
            try:
                await asyncio.get_running_loop().create_future()
            finally:
                await ticks(5)
                diary.append("loser")

        async def winner() -> None:
            await ticks(2)
            diary.append("winner")

        workflow = Workflow[str]({"a": Part(diary, "a")}).add_exit_state("done")
        workflow.register_split("only", [loser, winner], JoinConfig(JoinStrategy.Any, "done"))
        await workflow.orchestrate("only")

        assert diary == ["+a", "winner", "loser", "-a"]

    async def test_run_within_a_run_of_the_same_resources_uses_them_as_they_are(self, diary: list[str]) -> None:
        """A task that runs another workflow on its own resources finds them set up and leaves them so."""
        shared = Resources({"a": Part(diary, "a")})
        inner = one(writes(diary), shared)

        async def outer() -> str:
            await inner.orchestrate("only")
            diary.append("outer")
            return "done"

        await one(outer, shared).orchestrate("only")

        assert diary == ["+a", "run", "outer", "-a"]

    async def test_set_up_that_runs_a_workflow_on_its_own_resources_is_refused(self) -> None:
        """A set-up that would wait for itself gets an error instead of a deadlock."""
        resources = Resources()

        class Selfish(Resource):
            async def setup(self) -> None:
                await one(lambda: "done", resources).orchestrate("only")

        resources.insert("selfish", Selfish())

        with pytest.raises(ResourceError, match="wait for itself"):
            await one(lambda: "done", resources).orchestrate("only")


class TestSharing:
    async def test_concurrent_runs_share_one_set_up(self, diary: list[str]) -> None:
        """Two runs of one workflow at once set the resources up once, and the last one out tears them down."""
        # RE-011, B34
        workflow = one(writes(diary), {"a": Part(diary, "a")})

        results = await asyncio.gather(workflow.orchestrate("only"), workflow.orchestrate("only"))

        assert results == ["done", "done"]
        assert diary == ["+a", "run", "run", "-a"]

    async def test_first_run_to_end_leaves_the_resources_to_the_other(self, diary: list[str]) -> None:
        """A run never loses its resources because another one, which set them up, has ended."""
        # B34
        resources = Resources({"a": Part(diary, "a")})
        goes_on = asyncio.Event()

        async def waits() -> str:
            await goes_on.wait()
            diary.append("waited")
            return "done"

        quick = one(writes(diary), resources).start("only")
        slow = one(waits, resources).start("only")
        await quick
        seen = list(diary)
        goes_on.set()
        await slow

        assert seen == ["+a", "run"]
        assert diary == ["+a", "run", "waited", "-a"]

    @pytest.mark.parametrize("how", ["failure", "cancel"])
    async def test_run_that_ends_badly_leaves_the_resources_to_the_other(self, diary: list[str], how: str) -> None:
        """Failure and cancellation of one run do not touch the resources of another."""
        resources = Resources({"a": Part(diary, "a")})
        ending = Boom() if how == "failure" else "done"
        bad = one(writes(diary, ending, turns=1 if how == "failure" else 1000), resources).start("only")
        good = one(writes(diary, turns=20), resources).start("only")
        await ticks(6)

        if how == "cancel":
            bad.cancel()
        outcome = await asyncio.gather(bad, return_exceptions=True)
        seen = list(diary)
        await good

        assert type(outcome[0]) is (Boom if how == "failure" else WorkflowCancelledError)
        assert seen == ["+a", "run", "run"]
        assert diary[3:] == ["-a"]

    async def test_cancel_of_the_run_that_sets_up_hands_the_set_up_on(self, diary: list[str]) -> None:
        """Who waited for a set-up that was cancelled sets up itself."""
        workflow = one(writes(diary), {"a": Part(diary, "a"), "b": Part(diary, "b")})
        first, second = workflow.start("only"), workflow.start("only")
        await ticks(2)
        assert diary == ["+a"]

        first.cancel()
        outcomes = await asyncio.gather(first, second, return_exceptions=True)

        assert type(outcomes[0]) is WorkflowCancelledError
        assert outcomes[1] == "done"
        assert diary == ["+a", "-a", "+a", "+b", "run", "-b", "-a"]

    async def test_failed_set_up_is_told_to_its_own_run_only(self, diary: list[str]) -> None:
        """Each waiting run tries again, so each has an error of its own, and one that succeeds serves the rest."""

        class FailsOnce(Part):
            async def setup(self) -> None:
                error, self.fails = self.fails, None
                await ticks(3)
                if error is not None:
                    raise error
                await super().setup()

        workflow = one(writes(diary), {"a": FailsOnce(diary, "a", fails=Boom())})
        runs = [workflow.start("only") for _ in range(3)]
        outcomes = await asyncio.gather(*runs, return_exceptions=True)

        assert type(outcomes[0]) is Boom
        assert outcomes[1:] == ["done", "done"]
        assert diary == ["+a", "run", "run", "-a"]

    async def test_run_that_arrives_during_tear_down_sets_up_anew(self, diary: list[str]) -> None:
        """A run never uses resources that are going: it waits for the tear-down, then sets up."""
        workflow = one(writes(diary, turns=0), {"a": Part(diary, "a")})
        first = workflow.start("only")
        while "run" not in diary:
            await ticks(1)

        second = workflow.start("only")
        await asyncio.gather(first, second)

        assert diary == ["+a", "run", "-a", "+a", "run", "-a"]

    async def test_async_with_keeps_the_resources_up_across_runs(self, diary: list[str]) -> None:
        """Inside ``async with resources`` runs find everything set up; it goes at the end of the block."""
        resources = Resources({"a": Part(diary, "a")})
        workflow = one(writes(diary), resources)

        async with resources:
            await workflow.orchestrate("only")
            await asyncio.gather(workflow.orchestrate("only"), workflow.start("only"))
            diary.append("block")

        assert diary == ["+a", "run", "run", "run", "block", "-a"]

    async def test_async_with_that_ends_before_a_run_leaves_the_tear_down_to_the_run(self, diary: list[str]) -> None:
        """The last user tears down, whoever that is."""
        resources = Resources({"a": Part(diary, "a")})

        async with resources:
            handle = one(writes(diary, turns=10), resources).start("only")
            await ticks(3)
        diary.append("after block")
        await handle

        assert diary == ["+a", "run", "after block", "-a"]

    async def test_two_workflows_with_a_mapping_each_have_their_own(self, diary: list[str]) -> None:
        """A mapping is copied into resources of the workflow's own, so nothing is shared by accident."""
        first = one(writes(diary), {"a": Part(diary, "a")})
        second = one(writes(diary), {"b": Part(diary, "b")})

        await asyncio.gather(first.orchestrate("only"), second.orchestrate("only"))

        assert sorted(diary) == ["+a", "+b", "-a", "-b", "run", "run"]

    async def test_copy_of_a_workflow_shares_the_resources(self, diary: list[str]) -> None:
        """Runs of a workflow and of its copy count as users of the same resources."""
        workflow = one(writes(diary), {"a": Part(diary, "a")})

        await asyncio.gather(workflow.orchestrate("only"), workflow.copy().orchestrate("only"))

        assert diary == ["+a", "run", "run", "-a"]

    def test_resources_serve_one_loop_after_another(self, diary: list[str]) -> None:
        """Resources that nobody uses any more may be used on the next event loop."""
        workflow = one(writes(diary), {"a": Part(diary, "a")})

        results = [asyncio.run(workflow.orchestrate("only")) for _ in range(2)]

        assert results == ["done", "done"]
        assert diary == ["+a", "run", "-a"] * 2

    @pytest.mark.virtual
    async def test_hundred_overlapping_runs_set_up_once(self, diary: list[str]) -> None:
        """However many runs overlap, the resources come once and go once."""
        # B34
        resources = Resources({"a": Part(diary, "a", setup_takes=1, teardown_takes=1)})

        async def task(ctx: RunContext) -> str:
            assert diary == ["+a"]
            await asyncio.sleep(1)
            return "done"

        async def later(start: float) -> str:
            await asyncio.sleep(start)
            return await one(task, resources).orchestrate("only")

        await asyncio.gather(*(later(number / 100) for number in range(100)))

        assert diary == ["+a", "-a"]


class TestBudget:
    @pytest.mark.virtual
    async def test_set_up_counts_towards_the_timeout_of_the_run(self, diary: list[str]) -> None:
        """A set-up that takes too long is cancelled, what was up goes down, and the run's own timeout error comes out."""
        # TT-012, B30
        workflow = one(writes(diary), {"a": Part(diary, "a"), "b": Part(diary, "b", setup_takes=60)})

        with pytest.raises(WorkflowTimeoutError) as caught:
            await workflow.orchestrate("only", timeout=5)

        assert (caught.value.limit, caught.value.elapsed) == (5, 5)
        assert (caught.value.state, caught.value.task, caught.value.attempt) == ("only", None, 0)
        assert diary == ["+a", "-a"]
        assert asyncio.current_task().cancelling() == 0

    @pytest.mark.virtual
    async def test_time_of_the_set_up_is_missing_in_the_tasks(self, diary: list[str]) -> None:
        """A task's `remaining` is what the set-up left of the budget."""

        async def task(ctx: RunContext) -> str:
            diary.append(f"{ctx.remaining():g} left")
            await asyncio.sleep(60)
            return "done"

        with pytest.raises(WorkflowTimeoutError):
            await one(task, {"a": Part(diary, "a", setup_takes=3)}).orchestrate("only", timeout=5)

        assert diary == ["+a", "2 left", "-a"]
        assert asyncio.get_running_loop().time() == 5

    @pytest.mark.virtual
    async def test_tear_down_does_not_count(self, diary: list[str]) -> None:
        """A tear-down may take longer than the budget, and the run succeeds."""
        workflow = one(writes(diary), {"a": Part(diary, "a", teardown_takes=60)})

        result = await workflow.orchestrate("only", timeout=5)

        assert result == "done"
        assert diary == ["+a", "run", "-a"]

    @pytest.mark.virtual
    async def test_timeout_does_not_count_the_tear_down_after_a_failed_set_up(self, diary: list[str]) -> None:
        """What a failed set-up leaves behind is torn down in peace, and the set-up's own error comes out."""
        parts = {"a": Part(diary, "a", teardown_takes=60), "b": Part(diary, "b", fails=Boom())}

        with pytest.raises(Boom):
            await one(writes(diary), parts).orchestrate("only", timeout=5)

        assert diary == ["+a", "-a"]
        assert asyncio.get_running_loop().time() == 60

    @pytest.mark.virtual
    async def test_waiting_for_the_tear_down_of_another_run_counts(self, diary: list[str]) -> None:
        """A run that waits for others to tear down may time out, and leaves them alone."""
        workflow = one(writes(diary, turns=0), {"a": Part(diary, "a", teardown_takes=60)})
        first = workflow.start("only")
        await asyncio.sleep(1)

        with pytest.raises(WorkflowTimeoutError):
            await workflow.orchestrate("only", timeout=5)
        at = asyncio.get_running_loop().time()
        await first

        assert at == 6
        assert diary == ["+a", "run", "-a"]

    @pytest.mark.virtual
    async def test_waiting_for_the_set_up_of_another_run_counts(self, diary: list[str]) -> None:
        """A run that waits for another's set-up may time out; the set-up goes on for the other."""
        workflow = one(writes(diary), {"a": Part(diary, "a", setup_takes=60)})
        first = workflow.start("only")
        await asyncio.sleep(1)

        with pytest.raises(WorkflowTimeoutError):
            await workflow.orchestrate("only", timeout=5)
        result = await first

        assert result == "done"
        assert diary == ["+a", "run", "-a"]

    async def test_budget_of_nothing_sets_nothing_up(self, diary: list[str]) -> None:
        """A run whose budget is over before it begins runs no user code at all."""
        # B30
        with pytest.raises(WorkflowTimeoutError):
            await one(writes(diary), {"a": Part(diary, "a")}).orchestrate("only", timeout=0)

        assert diary == []

    @pytest.mark.virtual
    async def test_timeout_error_of_a_set_up_itself_is_not_taken_for_the_run_timeout(self) -> None:
        """A set-up that raises TimeoutError of its own has failed, within the budget."""
        error = TimeoutError("connection")

        with pytest.raises(TimeoutError) as caught:
            await one(lambda: "done", {"a": Part([], "a", fails=error)}).orchestrate("only", timeout=5)

        assert caught.value is error

    @pytest.mark.virtual
    async def test_set_up_that_swallows_the_timeout_is_followed_by_no_task(self, diary: list[str]) -> None:
        """The budget is looked at again after the set-up: no task starts late, and all goes down."""

        class Stubborn(Resource):
            async def setup(self) -> None:
                try:
                    await asyncio.sleep(60)
                except asyncio.CancelledError:
                    await asyncio.sleep(1)
                diary.append("+stubborn")

            async def teardown(self) -> None:
                diary.append("-stubborn")

        with pytest.raises(WorkflowTimeoutError):
            await one(writes(diary), {"stubborn": Stubborn()}).orchestrate("only", timeout=5)

        assert diary == ["+stubborn", "-stubborn"]
        assert asyncio.current_task().cancelling() == 0


class TestPerRun:
    async def test_resources_of_a_run_replace_those_of_the_workflow(self, diary: list[str]) -> None:
        """``resources=`` is used instead, not in addition: the workflow's own are not touched."""
        workflow = one(writes(diary), {"own": Part(diary, "own")})

        await workflow.orchestrate("only", resources={"other": Part(diary, "other")})

        assert diary == ["+other", "run", "-other"]

    async def test_concurrent_runs_with_their_own_resources_are_apart(self) -> None:
        """Each run's tasks see the resources given to that run."""

        async def task(name: Annotated[str, Res("name")], store: Annotated[MemoryStore, Res("store")]) -> str:
            await ticks(3)
            store.append("names", name)
            return "done"

        stores = [MemoryStore() for _ in range(3)]
        workflow = one(task)
        await asyncio.gather(
            *(
                workflow.orchestrate("only", resources={"name": f"run {number}", "store": store})
                for number, store in enumerate(stores)
            )
        )

        assert [store.get("names") for store in stores] == [["run 0"], ["run 1"], ["run 2"]]

    @pytest.mark.parametrize("given", [3, "text", [("a", 1)], object()], ids=["int", "text", "pairs", "object"])
    async def test_resources_that_are_none_are_refused(self, given: Any) -> None:
        """What is neither Resources nor a mapping is refused, by name, before anything runs."""
        with pytest.raises(ConfigurationError, match="resources must be"):
            await one(lambda: "done").orchestrate("only", resources=given)

    async def test_empty_resources_of_a_run_hide_those_of_the_workflow(self) -> None:
        """An empty mapping is a choice, not a default."""

        async def task(value: Annotated[int, Res("value")]) -> str:
            return "done"

        with pytest.raises(ResourceNotFoundError, match="known keys: none"):
            await one(task, {"value": 1}).orchestrate("only", resources={})


class TestInjection:
    @pytest.mark.parametrize("key", ["text", Key.STORE, 7, ("a", 1)], ids=["text", "enum member", "number", "tuple"])
    async def test_task_gets_the_resource_of_its_key(self, key: Any) -> None:
        """Any hashable key may stand in the annotation; the task gets the very object."""
        # RE-010
        store, seen = MemoryStore(), []

        async def task(store: Annotated[MemoryStore, Res(key)]) -> str:
            seen.append(store)
            return "done"

        await one(task, {key: store}).orchestrate("only")

        assert seen[0] is store

    async def test_parameter_without_annotation_gets_all_the_resources(self) -> None:
        """A single bare parameter, or one annotated Resources, is the Resources object of the run."""
        resources, seen = Resources({"a": 1}), []

        async def bare(res) -> str:
            seen.append(res)
            return "next"

        async def annotated(res: Resources) -> str:
            seen.append(res)
            return "done"

        workflow = Workflow[str](resources).register("only", bare).register("next", annotated).add_exit_state("done")
        await workflow.orchestrate("only")

        assert [given is resources for given in seen] == [True, True]

    async def test_managed_value_is_what_its_context_manager_gave(self, diary: list[str]) -> None:
        """Managed entries, async and sync, are entered at set-up, injected by value, and left in reverse order."""

        @asynccontextmanager
        async def connection() -> AsyncIterator[str]:
            diary.append("+connection")
            yield "the connection"
            diary.append("-connection")

        @contextmanager
        def folder() -> Iterator[str]:
            diary.append("+folder")
            yield "the folder"
            diary.append("-folder")

        async def task(folder: Annotated[str, Res("folder")], link: Annotated[str, Res("connection")]) -> str:
            diary.extend((folder, link))
            return "done"

        managed = Resources().manage("connection", connection).manage("folder", folder)
        await one(task, managed).orchestrate("only")

        assert diary == ["+connection", "+folder", "the folder", "the connection", "-folder", "-connection"]

    async def test_managed_value_is_made_anew_for_each_set_up(self) -> None:
        """The factory is called at each set-up, and a later run gets the later value."""
        made, seen = iter(range(10)), []

        @contextmanager
        def number() -> Iterator[int]:
            yield next(made)

        async def task(number: Annotated[int, Res("number")]) -> str:
            seen.append(number)
            return "done" if len(seen) % 2 == 0 else "only"

        workflow = one(task, Resources().manage("number", number))
        await workflow.orchestrate("only")
        await workflow.orchestrate("only")

        assert seen == [0, 0, 1, 1]

    async def test_resource_is_looked_up_once_per_run(self) -> None:
        """However often a state is entered or an attempt repeated, the look-up and its type check happen once."""

        class Counting(Resources):
            __slots__ = ("asked",)

            def get(self, key: Any, type_: Any = None) -> Any:
                self.asked = [*getattr(self, "asked", []), key]
                return super().get(key, type_)

        visits = iter(range(100))

        async def task(a: Annotated[int, Res("a")], b: Annotated[str, Res("b")]) -> str:
            visit = next(visits)
            if visit % 3 == 0:
                raise Boom
            return "only" if visit < 20 else "done"

        resources = Counting({"a": 1, "b": "x"})
        workflow = Workflow[str](resources).add_exit_state("done")
        workflow.register("only", task, config=TaskConfig().with_fixed_retry(9, 0))
        await workflow.orchestrate("only")
        first = resources.asked
        await workflow.orchestrate("only")

        assert first == ["a", "b"]
        assert resources.asked == ["a", "b", "a", "b"]

    async def test_missing_key_names_state_task_and_known_keys(self) -> None:
        """A task that asks for what nobody inserted fails there, is not retried, and the error says where."""
        # RE-001, RE-010
        calls = []

        async def charge(store: Annotated[MemoryStore, Res("store")]) -> str:
            calls.append(1)
            return "done"

        workflow = Workflow[str]({"cache": 1}).add_exit_state("done")
        workflow.register("only", charge, config=TaskConfig().with_fixed_retry(3, 0))
        with pytest.raises(ResourceNotFoundError) as caught:
            await workflow.orchestrate("only", workflow_id="order-7")

        assert str(caught.value) == "no resource 'store'; known keys: 'cache'"
        assert (caught.value.state, caught.value.attempt) == ("only", 1)
        assert caught.value.task.endswith("charge")
        assert caught.value.workflow_id == "order-7"
        assert calls == []

    async def test_wrong_type_names_state_task_and_both_types(self) -> None:
        """A value that is not what the annotation says fails before the task is called."""
        # RE-001
        calls = []

        async def charge(store: Annotated[MemoryStore, Res("store")]) -> str:
            calls.append(1)
            return "done"

        with pytest.raises(ResourceTypeError) as caught:
            await one(charge, {"store": {}}).orchestrate("only")

        assert str(caught.value) == "resource 'store' is of type dict, wanted MemoryStore"
        assert caught.value.state == "only"
        assert caught.value.task.endswith("charge")
        assert calls == []

    @pytest.mark.parametrize("broken", ["missing", "wrong type"])
    async def test_branch_that_cannot_be_given_its_resource_fails_alone(self, broken: str) -> None:
        """In a split the look-up error is that branch's outcome; the others run."""
        resources = {} if broken == "missing" else {"store": 3}
        ran = []

        async def needs(store: Annotated[MemoryStore, Res("store")]) -> None:
            ran.append("needs")

        async def free() -> None:
            ran.append("free")

        workflow = Workflow[str](resources).add_exit_state("done")
        workflow.register_split("only", [needs, free], JoinConfig(JoinStrategy.PartialResults(2), "done"))
        result = await workflow.orchestrate("only")

        assert result == "done"
        assert ran == ["free"]

    async def test_retried_branch_gets_its_resources_each_time(self) -> None:
        """A branch with a policy of its own is given the same objects in every attempt."""
        store, seen = MemoryStore(), []

        class Branch(Task[None]):
            config = TaskConfig().with_fixed_retry(2, 0)

            async def run(self, store: Annotated[MemoryStore, Res("store")], ctx: RunContext) -> None:
                seen.append((store, ctx.attempt))
                raise Boom

        workflow = Workflow[str]({"store": store}).add_exit_state("done")
        workflow.register_split("only", [Branch()], JoinConfig(JoinStrategy.PartialResults(1), "done"))
        await workflow.orchestrate("only")

        assert seen == [(store, 1), (store, 2), (store, 3)]

    async def test_bundle_is_looked_up_from_the_resources_of_the_run(self) -> None:
        """A FromResources bundle resolves text and Enum keys inside a task; a missing key is the task's error."""
        # RE-010

        class Deps(FromResources):
            store: Annotated[MemoryStore, Res(Key.STORE)]
            limit: Annotated[int, Res("limit")]

        seen = []

        async def task(res: Resources) -> str:
            deps = Deps.from_resources(res)
            seen.append((deps.store, deps.limit))
            return "done"

        store = MemoryStore()
        await one(task, {Key.STORE: store, "limit": 3}).orchestrate("only")
        with pytest.raises(ResourceNotFoundError) as caught:
            await one(task, {Key.STORE: store}).orchestrate("only")

        assert seen == [(store, 3)]
        assert caught.value.state == "only"

    async def test_look_up_error_of_a_retried_task_is_not_wrapped(self) -> None:
        """What cannot get better is not repeated: ResourceError is never retried, so never a RetryExhaustedError."""
        attempts = []

        class Work(Task[str]):
            config = TaskConfig().with_fixed_retry(3, 0)

            async def run(self, res: Resources) -> str:
                attempts.append(1)
                return res.get("nothing")

        (outcome,) = await asyncio.gather(one(Work()).orchestrate("only"), return_exceptions=True)

        assert type(outcome) is ResourceNotFoundError
        assert not isinstance(outcome, RetryExhaustedError)
        assert len(attempts) == 1
