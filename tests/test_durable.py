"""Durable runs: which rows they write, and how they go on from them."""

import asyncio
import enum
import logging
import time
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from cano import (
    After,
    BatchTask,
    Caught,
    CheckpointError,
    CheckpointRow,
    CompensatableTask,
    ConfigurationError,
    Continue,
    CorruptRowError,
    Done,
    InMemoryCheckpointStore,
    JoinConfig,
    JoinStrategy,
    More,
    NeedsAttentionError,
    OutputNotSerializableError,
    OutputUnreadableError,
    Pending,
    PollTask,
    Ready,
    Resource,
    RowKind,
    RunClaimedError,
    RunConflictError,
    RunContext,
    RunNotFoundError,
    RunStatus,
    SplitResult,
    SqliteCheckpointStore,
    SteppedTask,
    Stop,
    StreamTask,
    StreamWindow,
    TaskConfig,
    TimerTask,
    UnknownStateError,
    Workflow,
    WorkflowTimeoutError,
    WorkflowVersionError,
    recover_all,
    testing,
)


class S(enum.Enum):
    START = 1
    WORK = 2
    REST = 3
    DONE = 4


class OwnStore:
    """The three methods that a store of a user's own needs, each with a suspension."""

    def __init__(self):
        self.runs: dict[str, dict[int, CheckpointRow]] = {}

    async def append(self, workflow_id, row):
        await asyncio.sleep(0.001)
        rows = self.runs.setdefault(workflow_id, {})
        if row.sequence in rows:
            raise RunConflictError("there already", workflow_id, row.sequence)
        rows[row.sequence] = row

    async def load_run(self, workflow_id):
        await asyncio.sleep(0)
        return [row for _, row in sorted(self.runs.get(workflow_id, {}).items(), reverse=True)]

    async def clear(self, workflow_id):
        await asyncio.sleep(0)
        self.runs.pop(workflow_id, None)


class Faulty:
    """A store that fails in its n-th call of the named kind, before or after it has taken effect."""

    def __init__(self, store, method, number, *, is_done=False, error=OSError):
        self.store, self.method, self.left, self.is_done, self.error = store, method, number, is_done, error

    def __getattr__(self, name):
        method = getattr(self.store, name)
        if name != self.method:
            return method

        async def failing(*args, **options):
            self.left -= 1
            if self.left != 0:
                return await method(*args, **options)
            if self.is_done:
                await method(*args, **options)
            raise self.error("the store is away")

        return failing


@pytest.fixture(params=["own", "memory", "sqlite"])
def store(request, tmp_path):
    if request.param == "own":
        yield OwnStore()
    elif request.param == "memory":
        yield InMemoryCheckpointStore()
    else:
        opened = SqliteCheckpointStore(tmp_path / "runs.db")
        yield opened
        opened.close()


@dataclass
class Steps:
    """Tasks that note their calls; those named in `fails` raise so often."""

    fails: dict[str, int] = field(default_factory=dict)
    calls: list[Any] = field(default_factory=list)

    def task(self, name, leads_to):
        async def task():
            self.calls.append(name)
            await asyncio.sleep(0)
            if self.fails.get(name, 0):
                self.fails[name] -= 1
                raise Boom(name)
            return leads_to

        task.__qualname__ = name
        return task

    def workflow(self, store, name="orders"):
        return (
            Workflow[S](name=name)
            .register(S.START, self.task("start", S.WORK))
            .register(S.WORK, self.task("work", S.REST))
            .register(S.REST, self.task("rest", S.DONE))
            .add_exit_state(S.DONE)
            .with_checkpoint_store(store)
        )


class Boom(Exception):
    pass


async def rows_of(store, workflow_id="1"):
    return sorted(await store.load_run(workflow_id), key=lambda row: row.sequence)


def told(rows):
    return [f"{row.sequence} {row.kind} {row.state}" for row in rows]


async def failed(workflow, initial=S.START, **options):
    with pytest.raises(Boom):
        await workflow.orchestrate(initial, workflow_id="1", **options)


# --- what is written -------------------------------------------------------------------------------------------------


async def test_rows_of_a_run(store):
    """Each state that is entered is a row, written before its task begins, under dense numbers."""
    # CK-001, CK-002, CK-007, CK-011, FSM-004
    seen = []

    async def looks():
        seen.append(told(await rows_of(store)))
        return S.REST

    workflow = Steps({"rest": 1}).workflow(store).copy().with_workflow_version(7)
    workflow._states[S.WORK] = Workflow[S]().register(S.WORK, looks)._states[S.WORK]
    await failed(workflow)

    rows = await rows_of(store)
    assert told(rows) == ["0 state entry START", "1 state entry WORK", "2 state entry REST"]
    assert seen == [told(rows)[:2]]
    assert {row.workflow_version for row in rows} == {7}
    assert {(row.visit, row.attempt, row.output_blob) for row in rows} == {(1, 1, None)}
    assert [row.task_id for row in rows] == ["start", looks.__qualname__, "rest"]
    assert len({row.run_id for row in rows}) == 1


async def test_run_that_ends_well_leaves_nothing(store):
    """The rows are cleared; their last was that of the exit state."""
    # CK-001, CK-003, FSM-005
    steps = Steps()
    kept = []
    clear = store.clear

    async def clears(*args, **options):
        kept.extend(await rows_of(store))
        await clear(*args, **options)

    spy = Faulty(store, "clear", -1)
    spy.clear = clears
    assert await steps.workflow(spy).orchestrate(S.START, workflow_id="1") is S.DONE

    assert told(kept)[-1] == "3 finished DONE"
    assert kept[-1].task_id == ""
    assert await rows_of(store) == []


async def test_visits_are_counted(store):
    """A state that is entered again is a new visit."""
    steps, turns = Steps(), iter([S.START, S.START, S.WORK])
    workflow = Workflow[S]().register(S.START, lambda: next(turns)).register(S.WORK, steps.task("work", S.DONE))
    steps.fails["work"] = 1
    await failed(workflow.add_exit_state(S.DONE).with_checkpoint_store(store))

    assert [(row.state, row.visit) for row in await rows_of(store)] == [
        ("START", 1),
        ("START", 2),
        ("START", 3),
        ("WORK", 1),
    ]


async def test_router_writes_nothing(store):
    """A router has no row and no number."""
    # CK-006, RS-016
    steps = Steps({"rest": 1})
    workflow = (
        Workflow[S]()
        .register(S.START, steps.task("start", S.WORK))
        .register_router(S.WORK, lambda: S.REST)
        .register(S.REST, steps.task("rest", S.DONE))
        .add_exit_state(S.DONE)
        .with_checkpoint_store(store)
    )
    await failed(workflow)
    assert told(await rows_of(store)) == ["0 state entry START", "1 state entry REST"]

    assert await workflow.resume_from("1") is S.DONE
    assert steps.calls == ["start", "rest", "rest"]


async def test_split_is_one_row(store):
    """A split has the row of its state, without a task; its branches have none, nor have those of a fork."""
    # CK-002, SP-037
    branch = Steps()
    workflow = (
        Workflow[S]()
        .register_split(S.START, [branch.task("a", None), branch.task("b", None)], JoinConfig(JoinStrategy.All, S.WORK))
        .register(S.WORK, Steps({"work": 1}).task("work", S.DONE))
        .add_exit_state(S.DONE)
        .with_checkpoint_store(store)
    )
    await failed(workflow)

    rows = await rows_of(store)
    assert told(rows) == ["0 state entry START", "1 state entry WORK"]
    assert rows[0].task_id == ""


async def test_models_in_a_row(store):
    """Of router, poll task, batch and stepped task all but the router have a row, and steps have cursors."""

    # CK-031
    class Wait(PollTask[str]):
        def poll(self):
            return Ready("crunch")

    class Crunch(BatchTask[str]):
        def load(self):
            return range(3)

        def process_item(self, item):
            return item

        def finish(self, outcomes):
            return "grind"

    workflow = (
        Workflow[str]()
        .register_router("route", lambda: "wait")
        .register("wait", Wait())
        .register("crunch", Crunch())
        .register_stepped("grind", Counting(3))
        .register("last", Steps({"last": 1}).task("last", "done"))
        .add_exit_state("done")
        .with_checkpoint_store(store)
    )
    await failed(workflow, "route")

    assert [f"{row.kind} {row.state}" for row in await rows_of(store)][:3] == [
        "state entry wait",
        "state entry crunch",
        "state entry grind",
    ]
    assert told(await rows_of(store))[-1] == "5 state entry last"


async def test_runs_of_one_store_do_not_mix(store):
    """Sixteen runs at once have rows of their own, and each clears its own."""
    # CK-023, CK-013
    workflows = [Steps({"rest": number % 2}).workflow(store) for number in range(16)]
    runs = [workflow.orchestrate(S.START, workflow_id=str(number)) for number, workflow in enumerate(workflows)]
    await asyncio.gather(*runs, return_exceptions=True)

    assert [len(await rows_of(store, str(number))) for number in range(16)] == [0, 3] * 8


async def test_without_a_store_nothing_can_be_resumed():
    """`resume_from` and `discard` say what is missing."""
    # CK-004
    workflow = Workflow[S]().register(S.START, lambda: S.DONE).add_exit_state(S.DONE)
    for call in (workflow.resume_from, workflow.discard):
        with pytest.raises(ConfigurationError, match="checkpoint store"):
            await call("1")


async def test_durable_run_needs_an_id(store):
    """Without a workflow id the run is refused before anything of it runs."""
    # CK-005
    steps = Steps()
    workflow = steps.workflow(store)
    with pytest.raises(ConfigurationError, match="workflow_id"):
        await workflow.orchestrate(S.START)
    with pytest.raises(ConfigurationError, match="workflow_id"):
        workflow.start(S.START)
    assert not steps.calls


@pytest.mark.parametrize("workflow_id", ["", " ", "x" * 257, "a\nb", "\ud800", 7])
async def test_ids_are_checked_at_every_door(store, workflow_id):
    """What cannot be an id is refused by start, resume and discard."""
    workflow = Steps().workflow(store)
    with pytest.raises(ConfigurationError, match="workflow_id"):
        await workflow.orchestrate(S.START, workflow_id=workflow_id)
    for call in (workflow.resume_from, workflow.discard):
        with pytest.raises(ConfigurationError, match="workflow_id"):
            await call(workflow_id)


async def test_handle_of_a_durable_run(store):
    """`start` gives the handle at once; the run is claimed and written in its own task."""
    steps = Steps()
    run = steps.workflow(store).start(S.START, workflow_id="1")

    assert run.id == "1"
    assert await run is S.DONE
    assert run.path == [S.START, S.WORK, S.REST, S.DONE]


# --- going on --------------------------------------------------------------------------------------------------------


async def test_resume_enters_the_last_state_again(store):
    """What came before is done; new rows go on with the numbers."""
    # RS-001, RS-002, CK-025, B20
    steps = Steps({"work": 1})
    workflow = steps.workflow(store)
    await failed(workflow)
    with pytest.raises(RunConflictError, match="resume or discard"):
        await workflow.orchestrate(S.START, workflow_id="1")
    assert len(await rows_of(store)) == 2

    steps.fails["rest"] = 1
    with pytest.raises(Boom):
        await workflow.resume_from("1")
    rows = await rows_of(store)
    assert told(rows)[2:] == ["2 state entry WORK", "3 state entry REST"]
    assert [(row.visit, row.attempt) for row in rows] == [(1, 1), (1, 1), (1, 2), (1, 1)]

    assert await workflow.resume_from("1") is S.DONE
    assert steps.calls == ["start", "work", "work", "rest", "rest"]
    assert await rows_of(store) == []


async def test_path_after_a_resume(store):
    """It has the states from before, and the one that goes on once."""
    # RS-013
    steps = Steps({"work": 1, "rest": 1})
    workflow = steps.workflow(store)
    await failed(workflow)
    with pytest.raises(Boom) as raised:
        await workflow.resume_from("1")

    assert raised.value.__cano__.path == (S.START, S.WORK, S.REST)


async def test_unknown_run(store):
    """An id without rows cannot be resumed, one that a finished run had neither."""
    # RS-006
    workflow = Steps().workflow(store)
    with pytest.raises(RunNotFoundError, match=r"""['"]1['"]"""):
        await workflow.resume_from("1")
    await workflow.orchestrate(S.START, workflow_id="1")
    with pytest.raises(LookupError):
        await workflow.resume_from("1")


async def test_log_that_ends_in_an_exit_state(store):
    """The state is returned and the log cleared; no task runs."""
    # RS-004
    steps = Steps()
    assert await steps.workflow(Faulty(store, "clear", 1)).orchestrate(S.START, workflow_id="1") is S.DONE
    assert told(await rows_of(store))[-1] == "3 finished DONE"
    steps.calls.clear()

    assert await steps.workflow(store).resume_from("1") is S.DONE
    assert not steps.calls
    assert await rows_of(store) == []


async def test_failing_clear_fails_no_run(store, caplog):
    """The result is that of the run; the failure is logged once, with the id."""
    # CK-027, B33
    with caplog.at_level(logging.ERROR, "cano"):
        assert await Steps().workflow(Faulty(store, "clear", 1)).orchestrate(S.START, workflow_id="1") is S.DONE

    assert [record.getMessage() for record in caplog.records] == ["the log of run '1' could not be cleared"]


@pytest.mark.parametrize("is_done", [False, True])
async def test_last_row_that_the_store_does_not_take(store, caplog, is_done):
    """Past the last task the run has ended well; that its log does not say so is logged."""
    # B28
    steps = Steps()
    flaky = Faulty(store, "append", 4, is_done=is_done)
    with caplog.at_level(logging.ERROR, "cano"):
        assert await steps.workflow(flaky).orchestrate(S.START, workflow_id="1") is S.DONE

    assert "has finished; its log was not closed" in caplog.text
    assert await steps.workflow(store).resume_from("1") is S.DONE


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("is_done", [False, True])
async def test_row_that_the_store_does_not_take(store, number, is_done):
    """The run ends with the store's error, before the task of that state; it can be resumed, whatever the store has kept."""
    # CK-029, R5, RS-025
    steps = Steps()
    with pytest.raises(OSError, match="away") as raised:
        await steps.workflow(Faulty(store, "append", number, is_done=is_done)).orchestrate(S.START, workflow_id="1")

    names = ["start", "work", "rest"]
    assert raised.value.__cano__.state is list(S)[number - 1]
    assert steps.calls == names[: number - 1]
    if number == 1:  # nothing of it has run: the id is free again
        assert await rows_of(store) == []
        assert await steps.workflow(store).orchestrate(S.START, workflow_id="1") is S.DONE
        assert steps.calls == names
    else:
        assert await steps.workflow(store).resume_from("1") is S.DONE
        again = names[number - 2 + is_done :]
        assert steps.calls == names[: number - 1] + again


async def test_error_of_the_store_is_not_retried_nor_routed(store):
    """Retries and `on_error` are for what tasks raise; a key that names `CheckpointError` does count."""

    # B29, B49
    def workflow(errors, error):
        return (
            Workflow[S]()
            .register(S.START, lambda: S.WORK, on_error=errors)
            .register(S.WORK, lambda: S.DONE, on_error=errors)
            .add_exit_states([S.REST, S.DONE])
            .with_checkpoint_store(Faulty(store, "append", 2, error=error))
        )

    with pytest.raises(CheckpointError):
        await workflow({Exception: S.REST}, CheckpointError).orchestrate(S.START, workflow_id="1")
    assert await workflow({CheckpointError: S.REST}, CheckpointError).orchestrate(S.START, workflow_id="2") is S.REST


async def test_rows_in_any_order(store):
    """A store may give the rows in any order."""
    # RS-012
    steps = Steps({"rest": 1})
    workflow = steps.workflow(store)
    await failed(workflow)
    shuffled = Faulty(store, "append", -1)
    rows = await rows_of(store)

    async def load_run(_id):
        return [rows[1], rows[2], rows[0]]

    shuffled.load_run = load_run
    assert await steps.workflow(shuffled).resume_from("1") is S.DONE
    assert steps.calls == ["start", "work", "rest", "rest"]


async def test_row_that_is_missing(store):
    """Rows with a gap are damage; nothing runs."""
    steps = Steps({"rest": 1})
    await failed(steps.workflow(store))
    steps.calls.clear()
    holed = Faulty(store, "append", -1)
    rows = await rows_of(store)

    async def load_run(_id):
        return [rows[0], rows[2]]

    holed.load_run = load_run
    with pytest.raises(CorruptRowError, match='row 1 of run "1" is missing'):
        await steps.workflow(holed).resume_from("1")
    assert not steps.calls
    assert await steps.workflow(store).resume_from("1") is S.DONE


async def test_resources_around_a_resume(store):
    """They are set up before the first task and torn down after the last; a set-up that fails leaves the log as it is."""
    # RS-010, RS-011
    log = []

    class Pool(Resource):
        def __init__(self, *, is_broken=False):
            self.is_broken = is_broken

        async def setup(self):
            log.append("set up")
            if self.is_broken:
                raise Boom("pool")

        async def teardown(self):
            log.append("torn down")

    steps = Steps({"work": 1})
    workflow = steps.workflow(store)
    await failed(workflow, resources={"pool": Pool()})
    before = await rows_of(store)
    with pytest.raises(Boom, match="pool"):
        await workflow.resume_from("1", resources={"pool": Pool(is_broken=True)})
    assert await rows_of(store) == before
    assert await workflow.resume_from("1", resources={"pool": Pool()}) is S.DONE

    assert log == ["set up", "torn down", "set up", "set up", "torn down"]


async def test_set_up_that_fails_in_a_fresh_run(store):
    """The id is free again."""

    class Broken(Resource):
        async def setup(self):
            raise Boom("pool")

        async def teardown(self):
            pass

    steps = Steps()
    workflow = steps.workflow(store)
    await failed(workflow, resources={"pool": Broken()})
    assert await workflow.orchestrate(S.START, workflow_id="1") is S.DONE


# --- another workflow ------------------------------------------------------------------------------------------------


async def test_other_version(store):
    """A run of another version is refused, both named; nothing runs, and the log stays."""
    # RS-008, RS-027, ER-009
    steps = Steps({"work": 1})
    await failed(steps.workflow(store).with_workflow_version(1))
    rows = await rows_of(store)
    steps.calls.clear()

    with pytest.raises(WorkflowVersionError, match=r"version 1 .* version 2") as raised:
        await steps.workflow(store).with_workflow_version(2).resume_from("1")
    assert (raised.value.stored, raised.value.expected, raised.value.workflow_id) == (1, 2, "1")
    assert (steps.calls, await rows_of(store)) == ([], rows)
    assert await steps.workflow(store).with_workflow_version(1).resume_from("1") is S.DONE


def changed(store, steps, how):
    """The workflow of `Steps`, changed in one way."""
    workflow = Workflow[Any](name="other" if how == "name" else "orders")
    workflow.register(S.START, steps.task("start", S.WORK))
    state = "WORK2" if how == "state renamed" else S.WORK
    if how == "model":
        workflow.register_router(state, steps.task("work", S.REST))
    else:
        workflow.register(state, steps.task("work2" if how == "task" else "work", S.REST))
    if how != "state removed":
        workflow.register(S.REST, steps.task("rest", S.DONE))
    workflow.add_exit_state(S.DONE)
    if how in ("exit added", "state removed"):
        workflow.add_exit_state(S.REST)
    if how == "data":
        workflow.with_data(Order)
    return workflow.with_checkpoint_store(store)


@pytest.mark.parametrize("how", ["name", "state renamed", "state removed", "exit added", "task", "model", "data"])
async def test_other_definition_of_the_same_version(store, how):
    """A run that another definition has begun is refused before any user code, and nothing is written."""
    # R11
    steps = Steps({"rest": 1})
    await failed(steps.workflow(store))
    rows = await rows_of(store)
    steps.calls.clear()

    with pytest.raises(WorkflowVersionError, match="another definition"):
        await changed(store, steps, how).resume_from("1")
    assert (steps.calls, await rows_of(store)) == ([], rows)
    assert await changed(store, steps, "").resume_from("1") is S.DONE


async def test_migration(store):
    """It sees each row of the other version and says how the present one would have written it."""
    # G17, RS-009
    steps = Steps({"rest": 1})
    await failed(steps.workflow(store))
    seen = []

    def migrate(row):
        seen.append((row.sequence, row.workflow_version))
        return row if row.state != "REST" else renamed(row, "LAST")

    workflow = (
        Workflow[Any](name="orders")
        .register("LAST", steps.task("last", S.DONE))
        .add_exit_state(S.DONE)
        .with_workflow_version(2)
        .with_migration(migrate)
        .with_checkpoint_store(store)
    )
    steps.fails["last"] = 1
    with pytest.raises(Boom) as raised:
        await workflow.resume_from("1")
    # RS-014: states that the workflow no longer has are left out of the path
    assert raised.value.__cano__.path == ("LAST",)
    assert seen == [(0, 0), (1, 0), (2, 0)]

    assert await workflow.resume_from("1") is S.DONE
    assert seen[3:] == seen[:3]
    assert steps.calls[-2:] == ["last", "last"]


def renamed(row, state):
    return row.replace(state=state)


async def test_state_that_the_workflow_does_not_have(store):
    """A migration that leaves it so is refused by name."""
    # RS-007
    await failed(Steps({"rest": 1}).workflow(store))
    workflow = Workflow[Any](name="orders").register("A", lambda: "B").add_exit_state("B").with_checkpoint_store(store)
    with pytest.raises(UnknownStateError, match="'REST', which is not a registered or exit state"):
        await workflow.with_migration(lambda row: row).resume_from("1")


async def test_migration_that_gives_no_row(store):
    """It must return the row of that number."""
    await failed(Steps({"rest": 1}).workflow(store))
    workflow = Steps().workflow(store).with_workflow_version(2)
    with pytest.raises(ConfigurationError, match="migration"):
        await workflow.with_migration(lambda _: None).resume_from("1")


# --- cursors and timers ----------------------------------------------------------------------------------------------


class Counting(SteppedTask[Any]):
    """Counts to its target; a cursor in `fails` raises so often."""

    def __init__(self, target, leads_to="last", **fails):
        self.target, self.leads_to, self.fails, self.cursors = target, leads_to, fails, []

    async def step(self, cursor: int | None):
        self.cursors.append(cursor)
        if self.fails.get(f"at_{cursor}", 0):
            self.fails[f"at_{cursor}"] -= 1
            raise Boom(cursor)
        reached = (cursor or 0) + 1
        return Done(self.leads_to) if reached >= self.target else More(reached)


def stepping(store, task):
    return (
        Workflow[Any]().register_stepped("count", task).add_exit_states(["last", "count2"]).with_checkpoint_store(store)
    )


async def test_cursors_are_rows(store):
    """The cursor is durable before the next step runs; a new one takes the place of the one before."""
    # ST-004, ST-009, ST-002, B41
    seen = []

    class Watching(Counting):
        async def step(self, cursor: int | None):
            rows = await rows_of(store)
            seen.append((cursor, [row.output_blob for row in rows if row.kind is RowKind.StepCursor][-1:]))
            return await super().step(cursor)

    await failed(stepping(store, Watching(5, at_3=1)), "count")

    assert seen == [(None, []), (1, [b"1"]), (2, [b"2"]), (3, [b"3"])]
    assert [row.refers_to for row in await rows_of(store)][-1] == 1


async def test_steps_go_on_at_the_newest_cursor(store):
    """No step whose cursor is stored is done again."""
    # ST-005, ST-008
    task = Counting(6, at_4=1)
    workflow = stepping(store, task)
    await failed(workflow, "count")
    assert await workflow.resume_from("1") == "last"
    assert task.cursors == [None, 1, 2, 3, 4, 4, 5]


async def test_no_cursor_yet(store):
    """A step that fails first begins with nothing again."""
    # ST-006
    task = Counting(2, at_None=1)
    workflow = stepping(store, task)
    await failed(workflow, "count")
    assert await workflow.resume_from("1") == "last"
    assert task.cursors == [None, None, 1]


async def test_cursor_belongs_to_its_visit(store):
    """A state that is entered again begins its steps anew."""
    # B05
    task = Counting(3, "again")
    turns = iter(["count", "last"])
    workflow = stepping(store, task).register("again", lambda: next(turns))
    task.leads_to = "again"
    fails = {"left": 0}

    class Third(Counting):
        async def step(self, cursor: int | None):
            fails["left"] += 1
            if fails["left"] == 4:
                raise Boom("second visit")
            return await super().step(cursor)

    task = Third(3, "again")
    workflow = stepping(store, task).register("again", lambda: next(turns))
    await failed(workflow, "count")
    assert [row.visit for row in await rows_of(store) if row.state == "count"][-1] == 2
    assert await workflow.resume_from("1") == "last"
    assert task.cursors == [None, 1, 2, None, 1, 2]


async def test_cursor_that_cannot_be_stored(store):
    """The error names the task and is not repeated; the cursor before counts."""

    # ST-014, B49
    class Odd(SteppedTask[str]):
        config = TaskConfig().with_fixed_retry(3, 0)
        calls = 0

        async def step(self, cursor: object):
            self.calls += 1
            return More(object())

    task = Odd()
    with pytest.raises(OutputNotSerializableError, match=r"cursor of task .*Odd in state count"):
        await stepping(store, task).orchestrate("count", workflow_id="1")
    assert task.calls == 1


async def test_cursor_that_the_store_does_not_take(store):
    """The run ends with the store's error."""
    # ST-015, STR-026
    task = Counting(5)
    with pytest.raises(OSError, match="away"):
        await stepping(Faulty(store, "append", 3), task).orchestrate("count", workflow_id="1")
    assert task.cursors == [None, 1]


class Numbers(StreamTask[Any]):
    """Reads numbers from its cursor on, in windows of two."""

    window = StreamWindow.Count(2)

    def __init__(self, *, until=7, fails_at=None, stops_at=None, hangs_at=None):
        self.until, self.fails_at, self.stops_at, self.hangs_at = until, fails_at, stops_at, hangs_at
        self.opened, self.flushed, self.closed = [], [], []

    async def open(self, cursor: int | None):
        self.opened.append(cursor)
        for number in range((cursor or 0) + 1, self.until + 1):
            if number == self.hangs_at:
                await asyncio.Event().wait()
            yield number

    async def process_item(self, item):
        if item == self.fails_at:
            self.fails_at = None
            raise Boom(item)
        return item, item

    async def flush_window(self, outputs):
        self.flushed.append(outputs)
        return Stop("stopped") if self.stops_at in outputs else Continue

    async def on_close(self, reason):
        self.closed.append(reason)
        return "last"


def streaming(store, task):
    return (
        Workflow[str]()
        .register_stream("read", task)
        .register("stopped", Steps({"stopped": 1}).task("stopped", "last"))
        .add_exit_state("last")
        .with_checkpoint_store(store)
    )


async def test_stream_goes_on_after_its_last_window(store):
    """Windows that were flushed are not read again; items of the open one are."""
    # STR-020, STR-021
    task = Numbers(fails_at=6)
    workflow = streaming(store, task)
    await failed(workflow, "read")
    assert await workflow.resume_from("1") == "last"

    assert task.opened == [None, 4]
    assert task.flushed == [[1, 2], [3, 4], [5, 6], [7]]
    assert task.closed == ["exhausted"]


async def test_stream_that_is_cancelled_commits_its_open_window(store):
    """What was drained is not read again."""
    # STR-019, CN-018, D09
    task = Numbers(hangs_at=4)
    workflow = streaming(store, task)
    run = asyncio.ensure_future(workflow.orchestrate("read", workflow_id="1"))
    while task.flushed != [[1, 2]] or len(await rows_of(store)) < 2:  # noqa: ASYNC110 - a store tells nobody
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.05)
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    task.hangs_at = None
    assert await workflow.resume_from("1") == "last"

    assert task.opened == [None, 3]
    assert task.flushed == [[1, 2], [3], [4, 5], [6, 7]]
    assert task.closed == ["cancelled", "exhausted"]


async def test_stop_of_a_stream_is_part_of_its_row(store):
    """A run that goes on after a stop does not open the stream again."""
    # B39
    task = Numbers(stops_at=4)
    flaky = Faulty(store, "append", 4)  # entry, two cursors, the entry of the next state
    with pytest.raises(OSError, match="away"):
        await streaming(flaky, task).orchestrate("read", workflow_id="1")
    with pytest.raises(Boom):
        await streaming(store, task).resume_from("1")

    assert task.opened == [None]
    assert told(await rows_of(store))[-1] == "3 state entry stopped"


async def test_stream_cursor_that_cannot_be_read(store):
    """A stored cursor that is not of the annotated type refuses the resume."""
    # STR-025, ST-014
    task = Counting(6, at_4=1)
    await failed(stepping(store, task), "count")
    rows = await rows_of(store)
    spoiled = Faulty(store, "append", -1)

    async def load_run(_id):
        last = rows[-1]
        return [
            *rows[:-1],
            CheckpointRow(
                last.sequence,
                last.kind,
                last.state,
                task_id=last.task_id,
                run_id=last.run_id,
                fingerprint=last.fingerprint,
                refers_to=last.refers_to,
                output_blob=b'"four"',
            ),
        ]

    spoiled.load_run = load_run
    with pytest.raises(OutputUnreadableError, match=r"cursor of task .* in state count"):
        await stepping(spoiled, task).resume_from("1")
    assert len(task.cursors) == 5


@pytest.mark.virtual
async def test_timer_keeps_its_due_time():
    """A resume waits for what is left, and `wait` is not asked again."""

    # TM-005, G09
    class Later(TimerTask[str]):
        asked = 0

        def wait(self):
            self.asked += 1
            return After(60)

        def after_wait(self):
            return "done"

    store, task, loop = OwnStore(), Later(), asyncio.get_running_loop()
    workflow = Workflow[str]().register("later", task).add_exit_state("done").with_checkpoint_store(store)
    run = asyncio.ensure_future(workflow.orchestrate("later", workflow_id="1"))
    await asyncio.sleep(1)
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    rows = await rows_of(store)
    assert told(rows) == ["0 state entry later", "1 timer due later"]
    assert rows[1].due_at == pytest.approx(time.time() * 1000 + 60_000, abs=5_000)
    row = rows[1]
    store.runs["1"][1] = CheckpointRow(
        1,
        row.kind,
        row.state,
        task_id=row.task_id,
        run_id=row.run_id,
        fingerprint=row.fingerprint,
        due_at=row.due_at - 50_000,
    )

    began = loop.time()
    assert await workflow.resume_from("1") == "done"
    assert loop.time() - began == pytest.approx(10, abs=5)
    assert task.asked == 1


# --- what only the step before can give ------------------------------------------------------------------------------


async def test_state_that_takes_a_split_result(store):
    """Its row is not enough to go on from: the split is done again, in the same visit."""
    keys = []

    async def branch(ctx: RunContext):
        keys.append((ctx.visit, ctx.idempotency_key))
        return 1

    class Sum:
        fails = 1

        async def run(self, result: SplitResult, ctx: RunContext):
            keys.append((ctx.visit, ctx.idempotency_key))
            if self.fails:
                self.fails -= 1
                raise Boom("sum")
            return S.DONE if sum(outcome.value for outcome in result.successes) == 2 else S.REST

    workflow = (
        Workflow[S]()
        .register_split(S.START, [branch, branch], JoinConfig(JoinStrategy.All, S.WORK))
        .register(S.WORK, Sum())
        .add_exit_states([S.DONE, S.REST])
        .with_checkpoint_store(store)
    )
    await failed(workflow)
    assert await workflow.resume_from("1") is S.DONE
    assert keys[:3] == keys[3:]


async def test_state_that_takes_a_split_result_and_never_ends(store):
    """However often it is done again, with its split, its visit and key are the first ones; and the recovery limit counts."""
    # G16
    keys = []

    def fails(result: SplitResult, ctx: RunContext):
        keys.append((ctx.visit, ctx.idempotency_key))
        raise Boom("sum")

    workflow = (
        Workflow[S]()
        .register_split(S.START, [lambda: 1], JoinConfig(JoinStrategy.All, S.WORK))
        .register(S.WORK, fails)
        .add_exit_state(S.DONE)
        .with_checkpoint_store(store)
        .with_recovery_limit(3)
    )
    await failed(workflow)
    for _ in range(2):
        with pytest.raises(Boom):
            await workflow.resume_from("1")
    with pytest.raises(NeedsAttentionError, match="START was begun 3 times"):
        await workflow.resume_from("1")
    assert len(keys) == 3
    assert len(set(keys)) == 1


async def test_state_that_takes_an_error(store):
    """The state that failed is entered again."""
    calls = []

    async def charge():
        calls.append("charge")
        raise Boom("declined")

    class Ask:
        fails = 1

        async def run(self, error: Caught[Boom]):
            calls.append(str(error))
            if self.fails:
                self.fails -= 1
                raise KeyError("ask")
            return S.DONE

    workflow = (
        Workflow[S]()
        .register(S.START, charge, on_error={Boom: S.WORK})
        .register(S.WORK, Ask())
        .add_exit_state(S.DONE)
        .with_checkpoint_store(store)
    )
    with pytest.raises(KeyError):
        await workflow.orchestrate(S.START, workflow_id="1")
    assert await workflow.resume_from("1") is S.DONE
    assert calls == ["charge", "declined"] * 2


# --- keys, limits, time ----------------------------------------------------------------------------------------------


async def test_idempotency_key(store):
    """It is the same after a crash and a resume, another in each visit, and another in a new run of the same id."""
    # G01
    keys, fails = [], [True]

    async def work(ctx: RunContext):
        keys.append(ctx.idempotency_key)
        if fails[0]:
            raise Boom("work")
        return S.WORK if ctx.visit == 1 else S.DONE

    workflow = Workflow[S]().register(S.WORK, work).add_exit_state(S.DONE).with_checkpoint_store(store)
    await failed(workflow, S.WORK)
    fails[0] = False
    assert await workflow.resume_from("1") is S.DONE
    assert await workflow.orchestrate(S.WORK, workflow_id="1") is S.DONE

    first, again, second, *other = keys
    assert first == again
    assert len({first, second, *other}) == 4


async def test_run_id_is_kept(store):
    """`RunContext.run_id` tells two runs under one id apart, and is the same after a resume."""
    ids, fails = [], [True]

    async def work(ctx: RunContext):
        ids.append(ctx.run_id)
        if fails[0]:
            raise Boom("work")
        return S.DONE

    workflow = Workflow[S]().register(S.WORK, work).add_exit_state(S.DONE).with_checkpoint_store(store)
    await failed(workflow, S.WORK)
    rows = await rows_of(store)
    fails[0] = False
    await workflow.resume_from("1")
    await workflow.orchestrate(S.WORK, workflow_id="1")

    assert ids[0] == ids[1] == rows[0].run_id.hex()
    assert ids[2] != ids[0]


async def test_poison_run_is_parked(store):
    """A visit that was begun so often needs attention: no task runs any more, until the run is discarded."""
    # G16
    steps = Steps({"work": 99})
    workflow = steps.workflow(store).with_recovery_limit(3)
    await failed(workflow)
    for _ in range(2):
        with pytest.raises(Boom):
            await workflow.resume_from("1")
    calls = list(steps.calls)
    for _ in range(2):
        with pytest.raises(NeedsAttentionError, match="WORK was begun 3 times"):
            await workflow.resume_from("1")

    assert steps.calls == calls
    assert told(await rows_of(store))[-1] == "4 needs attention WORK"
    await workflow.discard("1")
    steps.fails.clear()
    assert await workflow.orchestrate(S.START, workflow_id="1") is S.DONE


@pytest.mark.virtual
async def test_budget_of_a_resumed_run():
    """It begins anew with the resume, and can be given for it."""
    # TT-008
    store = OwnStore()

    async def slow():
        await asyncio.sleep(5)
        return S.DONE

    workflow = Workflow[S]().register(S.START, slow).add_exit_state(S.DONE).with_checkpoint_store(store)
    for call in (
        lambda: workflow.orchestrate(S.START, workflow_id="1", timeout=4),
        lambda: workflow.resume_from("1", timeout=4.9),
    ):
        with pytest.raises(WorkflowTimeoutError):
            await call()
    assert await workflow.resume_from("1", timeout=6) is S.DONE


# --- run data --------------------------------------------------------------------------------------------------------


@dataclass
class Order:
    total: int = 0
    lines: list[str] = field(default_factory=list)


@dataclass
class Other:
    pass


async def test_run_data_comes_back(store):
    """A resume has the data as it was when the state was entered."""
    fails = [True]

    async def start(order: Order):
        order.total += 40
        return S.WORK

    async def work(order: Order):
        order.lines.append("work")
        if fails[0]:
            raise Boom("work")
        order.total += 2
        seen.append(order)
        return S.DONE

    seen = []
    workflow = (
        Workflow[S]()
        .with_data(Order)
        .register(S.START, start)
        .register(S.WORK, work)
        .add_exit_state(S.DONE)
        .with_checkpoint_store(store)
    )
    await failed(workflow, data=Order())
    assert (await rows_of(store))[1].snapshot == b'{"total":40,"lines":[]}'
    fails[0] = False
    assert await workflow.resume_from("1") is S.DONE
    assert seen == [Order(42, ["work"])]


async def test_run_data_is_the_runs_own():
    """Two runs at once do not see each other's; branches share their run's."""

    async def add(order: Order):
        order.total += 1

    def last(order: Order):
        return S.DONE

    workflow = (
        Workflow[S]()
        .with_data(Order)
        .register_split(S.START, [add, add], JoinConfig(JoinStrategy.All, S.WORK))
        .register(S.WORK, last)
        .add_exit_state(S.DONE)
    )
    orders = [Order(number) for number in range(3)]
    await asyncio.gather(*(workflow.orchestrate(S.START, data=order) for order in orders))
    assert [order.total for order in orders] == [2, 3, 4]


def test_run_data_is_checked():
    """What does not fit the workflow's class is refused by name, before anything runs."""

    def takes(order: Order):
        return S.DONE

    workflow = Workflow[S]().with_data(Order).register(S.START, takes).add_exit_state(S.DONE)
    for data in (None, Other(), Order):
        with pytest.raises(ConfigurationError, match="data must be an instance of Order"):
            testing.run(workflow.orchestrate(S.START, data=data))
    with pytest.raises(ConfigurationError, match="no run data"):
        testing.run(Workflow[S]().register(S.START, lambda: S.DONE).add_exit_state(S.DONE).orchestrate(S.START, data=1))
    with pytest.raises(ConfigurationError, match="already"):
        Workflow[S]().with_data(Order).with_data(Other)


async def test_run_data_that_cannot_be_stored(store):
    """The run ends before the state is entered."""

    @dataclass
    class Odd:
        value: object = None

    async def start(data: Odd):
        data.value = object()
        return S.WORK

    start.__annotations__["data"] = Odd
    workflow = (
        Workflow[S]()
        .with_data(Odd)
        .register(S.START, start)
        .register(S.WORK, Steps().task("work", S.DONE))
        .add_exit_state(S.DONE)
        .with_checkpoint_store(store)
    )
    with pytest.raises(Exception, match=r"run data, of type .*Odd, would not come back"):
        await workflow.orchestrate(S.START, workflow_id="1", data=Odd())
    assert await rows_of(store) == []


# --- owners ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def shared():
    return InMemoryCheckpointStore()


async def test_running_run_is_nobody_elses(shared):
    """While a run is owned, another start, a resume and a discard of it are refused; nothing of them runs."""
    # B01, CK-024
    steps, gate = Steps(), asyncio.Event()

    async def waits():
        await gate.wait()
        return S.DONE

    workflow = Workflow[S]().register(S.START, waits).add_exit_state(S.DONE).with_checkpoint_store(shared)
    run = workflow.start(S.START, workflow_id="1")
    while not await rows_of(shared):  # noqa: ASYNC110 - a store tells nobody
        await asyncio.sleep(0)
    others = steps.workflow(shared)
    for call in (
        lambda: others.orchestrate(S.START, workflow_id="1"),
        lambda: others.resume_from("1"),
        lambda: workflow.resume_from("1"),
        lambda: workflow.discard("1"),
    ):
        with pytest.raises(RunClaimedError):
            await call()
    gate.set()
    assert await run is S.DONE
    assert not steps.calls


async def test_many_starts_of_one_id(shared):
    """One of them runs; the others run no user code."""
    steps = Steps()
    runs = [steps.workflow(shared).orchestrate(S.START, workflow_id="1") for _ in range(8)]
    outcomes = await asyncio.gather(*runs, return_exceptions=True)

    assert sum(outcome is S.DONE for outcome in outcomes) == 1
    assert steps.calls == ["start", "work", "rest"]


async def test_run_that_was_taken_over(shared):
    """Its next row is refused, which ends it: nothing is compensated, released or cleared, and no `on_error` is asked."""
    # B01
    undone = []

    class Reserve(CompensatableTask[S, int]):
        def run(self) -> tuple[S, int]:
            return S.WORK, 7

        def compensate(self, output: int) -> None:
            undone.append(output)

    async def loses():
        return S.REST

    taken = Faulty(shared, "append", 4, error=lambda text: RunClaimedError(text, "1"))
    workflow = (
        Workflow[S]()
        .register_with_compensation(S.START, Reserve())
        .register(S.WORK, loses)
        .register(S.REST, lambda: S.DONE, on_error={CheckpointError: S.DONE})
        .add_exit_state(S.DONE)
        .with_checkpoint_store(taken)
    )
    with pytest.raises(RunClaimedError):
        await workflow.orchestrate(S.START, workflow_id="1")

    assert not undone
    rows = await rows_of(shared)
    assert told(rows)[-1] == "2 state entry WORK"


async def test_recover_all(shared, caplog):
    """Runs whose owner is gone are gone on with; those that failed, need attention or are somebody else's are left."""
    # B42
    steps = Steps({"work": 2})
    workflow = steps.workflow(shared)
    await failed(workflow)  # stopped: resumed by who asks
    for name in ("2", "3"):
        fence = await shared.start_run(name, workflow="orders", version=0)
        row = (await rows_of(shared))[0]
        await shared.append(name, row, fence=fence)
        await shared.release(name, fence)
    fence = await shared.start_run("4", workflow="invoices", version=0)
    await shared.release("4", fence)
    await shared.start_run("5", workflow="orders", version=0)
    await shared.release("5", fence + 1)

    outcomes = await recover_all(workflow, shared)
    assert set(outcomes) == {"2", "3"}
    assert sorted(map(str, outcomes.values())) == ["S.DONE", "work"]
    assert not caplog.records
    left = {run.id: run.status for run in await shared.list_runs()}
    assert left.pop("4") is RunStatus.Running
    assert len(left) == 2
    assert set(left.values()) == {RunStatus.Stopped}


async def test_recover_all_clears_what_is_over(shared):
    """A run whose process was killed between its last row and the clearing is told of and cleared: its id is free again."""
    # B42
    steps = Steps()
    assert await steps.workflow(Faulty(shared, "clear", 1)).orchestrate(S.START, workflow_id="1") is S.DONE
    saga = Workflow[str](name="saga").register_with_compensation("start", Undoable(steps.calls, "start", "work"))
    saga.register("work", noting(steps.calls, "work", None)).add_exit_state("end")
    with pytest.raises(Boom):
        await saga.copy().with_checkpoint_store(Faulty(shared, "clear", 1)).orchestrate("start", workflow_id="2")
    assert {run.status for run in await shared.list_runs()} == {RunStatus.Finished, RunStatus.RolledBack}
    steps.calls.clear()

    assert await recover_all(steps.workflow(shared), shared) == {"1": S.DONE}
    outcomes = await recover_all(saga.with_checkpoint_store(shared), shared)
    assert isinstance(outcomes["2"], RunConflictError)
    assert not steps.calls
    assert await shared.list_runs() == []


# --- cancel ----------------------------------------------------------------------------------------------------------


@pytest.mark.virtual
@pytest.mark.parametrize("number", range(1, 7))
async def test_cancel_waits_for_the_answer_of_the_store(number):
    """A cancel while a row is on its way goes on when the store has answered; the run can be resumed."""
    # B62, B30
    store = OwnStore()
    answered, gate = [], asyncio.Event()

    class Slow(OwnStore):
        async def append(self, workflow_id, row):
            if row.sequence + 1 == number:
                gate.set()
                await asyncio.sleep(3)
            await OwnStore.append(store, workflow_id, row)
            answered.append(row.sequence)

        load_run = store.load_run
        clear = store.clear

    steps = Steps()
    workflow = steps.workflow(Slow())
    run = asyncio.ensure_future(workflow.orchestrate(S.START, workflow_id="1"))
    if number > 4:
        assert await run is S.DONE
        return
    await gate.wait()
    began = asyncio.get_running_loop().time()
    run.cancel("first")
    await asyncio.sleep(1)
    run.cancel("second")
    with pytest.raises(asyncio.CancelledError) as raised:
        await run

    assert asyncio.get_running_loop().time() - began == pytest.approx(3, abs=0.1)
    assert raised.value.args == ("second",)
    assert answered[-1] == number - 1
    assert len(steps.calls) == number - 1
    assert await steps.workflow(store).resume_from("1") is S.DONE


@pytest.mark.virtual
async def test_budget_that_ends_while_a_row_is_on_its_way():
    """It is a timeout like any other, once the store has answered."""

    class Slow(OwnStore):
        async def append(self, workflow_id, row):
            await asyncio.sleep(3)
            await super().append(workflow_id, row)

    store = Slow()
    with pytest.raises(WorkflowTimeoutError):
        await Steps().workflow(store).orchestrate(S.START, workflow_id="1", timeout=4)
    assert len(await rows_of(store)) == 2


# --- the whole -------------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    shape=st.lists(st.sampled_from(["task", "saga", "steps", "router"]), min_size=1, max_size=6),
    crashes=st.lists(st.integers(1, 25), max_size=4),
    fails=st.booleans(),
)
def test_any_history_of_crashes(shape, crashes, fails):  # noqa: C901 - a machine for each kind of state
    """Whatever rows were the last before a crash, the effects are those of a run without one: done once acknowledged, undone
    once in reverse order if the last state fails, and nothing left."""
    # R1, R2, R5, RS-021, SG-014, B03, B04
    # A crash is a store that fails for good from its n-th row on: nothing that the run does afterwards is kept.
    store, ledger = OwnStore(), []

    class Crashing(OwnStore):
        left = 0

        async def append(self, workflow_id, row):
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
            await store.append(workflow_id, row)

        load_run = store.load_run

        async def clear(self, workflow_id):
            if self.left < 0:
                raise KeyboardInterrupt
            await store.clear(workflow_id)

    crashing = Crashing()
    last = f"{len(shape)}"

    def workflow():
        made = Workflow[str](name="shape").with_recovery_limit(100)
        for number, kind in enumerate(shape):
            state, following = str(number), str(number + 1)
            if kind == "task":
                made.register(state, noting(ledger, state, following))
            elif kind == "router":
                made.register_router(state, noting(ledger, state, following))
            elif kind == "saga":
                made.register_with_compensation(state, Undoable(ledger, state, following))
            else:
                made.register_stepped(state, Stepping(ledger, state, following))
        made.register(last, noting(ledger, last, None if fails else "end"))
        return made.add_exit_state("end").with_checkpoint_store(crashing)

    outcome, is_first = "crash", True
    for left in [*crashes, 1_000]:
        crashing.left = left
        outcome = ended(workflow(), is_first=is_first and not store.runs)
        is_first = False
        if outcome not in ("crash", "gone") or not store.runs:
            break
    expected = expected_of(shape)
    done = [entry for entry in ledger if not entry.startswith("-")]
    undone = [entry[1:] for entry in ledger if entry.startswith("-")]
    assert unrepeated(done) == expected[: len(unrepeated(done))]
    if not fails:
        assert outcome in ("end", "gone")
        assert not undone
    elif outcome != "crash":
        assert unrepeated(done) == expected
        assert unrepeated(undone) == [str(n) for n, kind in reversed(list(enumerate(shape))) if kind == "saga"]
    assert not store.runs or outcome == "crash" or (fails and "saga" not in shape)


def ended(workflow, *, is_first):
    """How a run of the workflow ends, begun or resumed."""
    try:
        return testing.run(workflow.orchestrate("0", workflow_id="1") if is_first else workflow.resume_from("1"))
    except KeyboardInterrupt:
        return "crash"
    except RunNotFoundError:
        return "gone"
    except Exception as error:
        return type(error).__name__


def expected_of(shape):
    """The effects of a run without a crash."""
    expected = []
    for number, kind in enumerate(shape):
        expected += [f"{number}.{step}" for step in range(3)] if kind == "steps" else [str(number)]
    return [*expected, str(len(shape))]


def unrepeated(entries):
    """The entries in the order in which they first came."""
    return list(dict.fromkeys(entries))


def noting(ledger, name, leads_to):
    async def task():
        ledger.append(name)
        if leads_to is None:
            raise Boom(name)
        return leads_to

    task.__qualname__ = f"task{name}"
    return task


class Undoable(CompensatableTask[str, str]):
    def __init__(self, ledger, state, leads_to):
        self.ledger, self.state, self.leads_to, self.name = ledger, state, leads_to, f"saga{state}"

    async def run(self) -> tuple[str, str]:
        self.ledger.append(self.state)
        return self.leads_to, self.state

    async def compensate(self, output: str) -> None:
        self.ledger.append(f"-{output}")


class Stepping(SteppedTask[str]):
    def __init__(self, ledger, state, leads_to):
        self.ledger, self.state, self.leads_to, self.name = ledger, state, leads_to, f"steps{state}"

    async def step(self, cursor: int | None):
        self.ledger.append(f"{self.state}.{cursor or 0}")
        return Done(self.leads_to) if cursor == 2 else More((cursor or 0) + 1)


# --- pipelines -------------------------------------------------------------------------------------------------------


async def test_many_workflows_on_one_file(tmp_path):
    """Twelve workflows at once: each task runs once, and each log is cleared."""
    # RS-026
    async with SqliteCheckpointStore(tmp_path / "runs.db") as store:
        all_steps = [Steps() for _ in range(12)]
        runs = [
            steps.workflow(store, f"w{number}").orchestrate(S.START, workflow_id=f"run-{number}")
            for number, steps in enumerate(all_steps)
        ]
        assert await asyncio.gather(*runs) == [S.DONE] * 12
        assert [steps.calls for steps in all_steps] == [["start", "work", "rest"]] * 12
        assert await store.list_runs() == []


async def test_pipeline_that_crashes_in_its_stream(store):
    """Poll task and batch before it are not run again, and the stream goes on at its cursor."""
    # RS-028
    calls = {"poll": 0, "load": 0}

    class Wait(PollTask[str]):
        def poll(self):
            calls["poll"] += 1
            return Ready("crunch") if calls["poll"] == 3 else Pending(0)

    class Crunch(BatchTask[str]):
        def load(self):
            calls["load"] += 1
            return range(3)

        def process_item(self, item):
            return item

        def finish(self, outcomes):
            return "read"

    numbers = Numbers(fails_at=4)
    workflow = (
        Workflow[str]()
        .register("wait", Wait())
        .register("crunch", Crunch())
        .register_stream("read", numbers)
        .add_exit_states(["last", "stopped"])
        .with_checkpoint_store(store)
    )
    await failed(workflow, "wait")
    assert await workflow.resume_from("1") == "last"

    assert calls == {"poll": 3, "load": 1}
    assert numbers.opened == [None, 2]


async def test_saga_whose_second_step_fails(store):
    """The first is undone, the balance is nothing, and the log is empty."""
    # RS-032, SG-012
    balance = []

    class Charge(CompensatableTask[S, int]):
        def run(self) -> tuple[S, int]:
            balance.append(42)
            return S.WORK, 42

        def compensate(self, output: int) -> None:
            balance.append(-output)

    workflow = (
        Workflow[S]()
        .register_with_compensation(S.START, Charge())
        .register(S.WORK, Steps({"work": 1}).task("work", S.DONE))
        .add_exit_state(S.DONE)
        .with_checkpoint_store(store)
    )
    await failed(workflow)

    assert balance == [42, -42]
    assert await rows_of(store) == []


def test_run_data_is_known_to_its_own_workflow_alone():
    """A class is an annotation for run data only where it was given before; elsewhere a task that asks for it is refused."""

    def takes(order: Order):
        return S.DONE

    Workflow[S]().with_data(Order).register(S.START, takes)
    with pytest.raises(ConfigurationError, match="with_data"):
        Workflow[S]().register(S.START, takes)
    with pytest.raises(ConfigurationError, match="with_data"):
        Workflow[S]().with_data(Other).register(S.START, takes)


async def test_run_data_of_branches_made_at_run_time():
    """They may ask for it like others."""

    async def add(order: Order):
        order.total += 1

    workflow = (
        Workflow[S]()
        .with_data(Order)
        .register_split(S.START, lambda: [add] * 3, JoinConfig(JoinStrategy.All, S.DONE))
        .add_exit_state(S.DONE)
    )
    order = Order()
    assert await workflow.orchestrate(S.START, data=order) is S.DONE
    assert order.total == 3


@pytest.mark.virtual
@pytest.mark.parametrize("how", ["start_run", "claim"])
async def test_cancel_while_a_run_is_claimed(shared, how):
    """The claim that the store grants all the same is given up: the run can be begun, or resumed, at once."""
    steps = Steps({"work": 1} if how == "claim" else {})
    if how == "claim":
        await failed(steps.workflow(shared))
    slow = Faulty(shared, how, -1)
    method = getattr(shared, how)

    async def slowly(*args, **options):
        await asyncio.sleep(3)
        return await method(*args, **options)

    setattr(slow, how, slowly)
    workflow = steps.workflow(slow)
    calls = list(steps.calls)
    going = workflow.resume_from("1") if how == "claim" else workflow.orchestrate(S.START, workflow_id="1")
    run = asyncio.ensure_future(going)
    await asyncio.sleep(1)
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    assert steps.calls == calls

    again = steps.workflow(shared)
    going = again.resume_from("1") if how == "claim" else again.orchestrate(S.START, workflow_id="1")
    assert await going is S.DONE
