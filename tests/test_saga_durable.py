"""Durable sagas: what a roll-back writes, and how it goes on after a crash.

A crash is a store that holds only the first rows of a run: whatever came after them is forgotten, but what the steps have
done to the world is not.
"""

import asyncio
from collections import Counter
from collections.abc import Awaitable
from typing import Any, Literal

import pytest
from hypothesis import given, settings, strategies as st

from cano import (
    Caught,
    CheckpointRow,
    CompensatableTask,
    CompensationFailedError,
    ConfigurationError,
    InMemoryCheckpointStore,
    NeedsAttentionError,
    OrphanedStepError,
    OutputNotSerializableError,
    OutputTooLargeError,
    OutputUnreadableError,
    Resources,
    RowKind,
    RunConflictError,
    RunContext,
    SplitResult,
    TaskConfig,
    Workflow,
    _core,
    testing,
)


class Boom(Exception):
    """A failure of the user's own."""


class Log:
    """A store that keeps every row that it was ever given, and fails at the appends it is told to."""

    def __init__(self, rows=(), *, fails=None, is_done=False):
        self.rows = {row.sequence: row for row in rows}
        self.all = list(rows)
        self.fails = fails
        self.is_done = is_done

    async def append(self, _workflow_id, row):
        await asyncio.sleep(0)
        fails = self.fails is not None and self.fails(row)
        if not fails or self.is_done:
            if row.sequence in self.rows:
                raise RunConflictError("there already", "1", row.sequence)
            self.rows[row.sequence] = row
            self.all.append(row)
        await asyncio.sleep(0)
        if fails:
            raise OSError("disk full")

    async def load_run(self, _workflow_id):
        return list(self.rows.values())

    async def clear(self, _workflow_id):
        self.rows.clear()

    def told(self):
        return [f"{row.kind} {row.state}" for row in self.all]


def changed(row, **fields):
    """The row with other fields."""
    names = ("task_id", "visit", "attempt", "workflow_version", "fingerprint", "run_id", "recorded_at", "next_state")
    names += ("refers_to", "due_at", "is_intent", "output_blob", "snapshot")
    kept = {name: getattr(row, name) for name in names}
    return CheckpointRow(row.sequence, row.kind, row.state, **(kept | fields))


def of_kind(kind):
    return lambda row: row.kind is kind


class Step(CompensatableTask[str, dict[str, int]]):
    """Notes in `log` what it does and undoes."""

    def __init__(self, log, name, then, **options):
        self.log = log
        self.name = name
        self.then = then
        self.options = options
        self.config = options.get("config")

    async def run(self) -> tuple[str, dict[str, int]]:
        await asyncio.sleep(0)
        self.log.append(self.name)
        if "fails" in self.options:
            raise self.options["fails"]
        return self.then, self.options.get("output", {self.name: self.log.count(self.name)})

    async def compensate(self, output: dict[str, int] | None):
        await asyncio.sleep(self.options.get("undoing_takes", 0))
        self.log.append(f"undo {self.name} {output}")
        if "undoing_fails" in self.options:
            raise self.options["undoing_fails"]


def saga(log, store, last=None, **steps):
    """The steps a, b and c, then a plain task that fails."""

    def fail():
        log.append("last")
        raise Boom

    workflow = Workflow(name="saga")
    for name, then in ("ab", "bc", ("c", "last")):
        options = steps.get(name, {})
        before = options.get("register_before", False)
        workflow.register_with_compensation(name, Step(log, name, then, **options), register_before=before)
    workflow.register("last", last or fail).add_exit_state("done")
    return workflow.with_checkpoint_store(store)


async def failure(awaitable):
    with pytest.raises(BaseException) as caught:
        await awaitable
    return caught.value


def start(workflow):
    return workflow.orchestrate("a", workflow_id="1")


ALL_UNDONE = ["undo c {'c': 1}", "undo b {'b': 1}", "undo a {'a': 1}"]


# --- what is written -------------------------------------------------------------------------------------------------


async def test_rows_of_a_roll_back():
    """A roll-back writes that it begins and why, each step that it has undone, and that all is done; then the log goes."""
    # SG-012, SG-030, B02
    log, store = [], Log()

    assert type(await failure(start(saga(log, store)))) is Boom

    assert store.told()[6:] == [
        "state entry last",
        "rollback started last",
        "compensated c",
        "compensated b",
        "compensated a",
        "finished last",
    ]
    assert store.all[7].output_blob == b"Boom: "
    assert [row.refers_to for row in store.all[8:11]] == [5, 3, 1]
    assert [row.output_blob for row in store.all if row.kind is RowKind.CompensationCompletion] == [
        b'{"a":1}',
        b'{"b":1}',
        b'{"c":1}',
    ]
    assert store.rows == {}


async def test_failed_roll_back_needs_attention():
    """If a step cannot be undone the log is kept and says so; the run is never resumed by itself."""
    # SG-012, B07
    log, store = [], Log()
    workflow = saga(log, store, b={"undoing_fails": ValueError("no")})

    error = await failure(start(workflow))

    assert type(error) is CompensationFailedError
    assert store.told()[7:] == ["rollback started last", "compensated c", "compensated a", "needs attention last"]
    assert store.all[-1].output_blob == b"not undone: b in state b"
    assert len(store.rows) == 11
    assert type(await failure(workflow.copy().resume_from("1"))) is NeedsAttentionError


async def test_nothing_to_undo_keeps_the_log():
    """A run that fails with nothing done writes no roll-back: it can be resumed where it failed."""
    # SG-011
    log, store = [], Log()

    assert type(await failure(start(saga(log, store, a={"fails": Boom()})))) is Boom
    assert store.told() == ["state entry a"]

    assert type(await failure(saga(log, store).resume_from("1"))) is Boom
    assert log == ["a", "a", "b", "c", "last", *["undo c {'c': 1}", "undo b {'b': 1}", "undo a {'a': 2}"]]


async def test_text_of_an_error_cannot_stop_a_roll_back():
    """An error whose text cannot be had is rolled back like any other."""

    class Mute(Exception):
        def __str__(self):
            raise RuntimeError

    log, store = [], Log()

    def fail():
        raise Mute

    assert type(await failure(start(saga(log, store, fail)))) is Mute
    assert log[3:] == ALL_UNDONE
    assert store.all[7].output_blob.startswith(b"test_text_of_an_error_cannot_stop_a_roll_back.<locals>.Mute: its text")


async def test_cancelled_run_is_rolled_back_in_its_log():
    """Cancels, how ever many, stop neither the roll-back nor its rows."""
    # CN-022, D09
    log, store = [], Log()
    task = asyncio.create_task(start(saga(log, store, lambda: asyncio.sleep(1e6))))
    while len(store.all) < 7:  # noqa: ASYNC110 - a store has no event for it
        await asyncio.sleep(0)
    for _ in range(12):
        task.cancel()
        await asyncio.sleep(0)
    await asyncio.wait((task,))

    assert task.cancelled()
    assert log == ["a", "b", "c", *ALL_UNDONE]
    assert store.told()[-1] == "finished last"
    assert store.rows == {}


async def test_cancelled_run_with_nothing_done_can_be_resumed():
    """A cancel with nothing to undo keeps the log, and the run goes on where it was."""
    # CN-022
    store = Log()

    def waiting(seconds):
        workflow = Workflow().register("a", lambda: asyncio.sleep(seconds, "done")).add_exit_state("done")
        return workflow.with_checkpoint_store(store)

    task = asyncio.create_task(start(waiting(1e6)))
    await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.wait((task,))

    assert (task.cancelled(), store.told()) == (True, ["state entry a"])
    assert await waiting(0).resume_from("1") == "done"


# --- outputs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("output", "kind"),
    [
        (object(), OutputNotSerializableError),
        ({"x": float("nan")}, OutputNotSerializableError),
        ([1], OutputNotSerializableError),
        ({"x" * 3_000_000: 1}, OutputTooLargeError),
    ],
    ids=["object", "nan", "of another type", "too large"],
)
async def test_output_that_cannot_be_stored_is_undone_at_once(output, kind):
    """The step was done, so it is undone first, with the object itself; it is not run again, and not led on from."""
    # SG-019, SG-022, B08
    log, store = [], Log()
    seen = []

    class Makes(Step):
        config = TaskConfig().with_fixed_retry(3, 0)

        async def compensate(self, output):
            seen.append(output)

    workflow = Workflow().register_with_compensation("a", Step(log, "a", "b"))
    workflow.register_with_compensation(
        "b", Makes(log, "b", "done", output=output, config=Makes.config), on_error={Exception: "done"}
    )

    error = await failure(start(workflow.add_exit_state("done").with_checkpoint_store(store)))

    assert type(error) is kind
    assert "the output of task b in state b" in str(error)
    assert (error.state, error.task) == ("b", "b")
    assert len(seen) == 1
    assert seen[0] is output
    assert log == ["a", "b", "undo a {'a': 1}"]
    assert store.told()[3:] == ["rollback started b", "compensated a", "finished b"]


async def test_output_that_can_neither_be_stored_nor_undone():
    """If that compensation fails, too, the refusal is the original failure, and the run needs attention."""
    # SG-020, B07
    log, store = [], Log()
    workflow = saga(log, store, b={"output": object(), "undoing_fails": ValueError("no")})

    error = await failure(start(workflow))

    assert [type(member) for member in error.exceptions] == [OutputNotSerializableError, ValueError]
    assert [orphan.task for orphan in error.orphans] == ["b"]
    assert log[-1] == "undo a {'a': 1}"
    assert store.told()[-1] == "needs attention b"


@pytest.mark.virtual
async def test_output_that_cannot_be_stored_is_undone_in_time():
    """That compensation is bounded as well."""
    # SG-021, B09
    options = {"output": object(), "undoing_takes": 1e6}
    workflow = saga([], Log(), b=options).with_compensation_timeout(5)

    error = await failure(start(workflow))

    assert asyncio.get_running_loop().time() < 10
    assert [orphan.output for orphan in error.orphans] == [options["output"], {"a": 1}]


def completion_of_b(row):
    return row.kind is RowKind.CompensationCompletion and row.state == "b"


async def test_completion_that_the_store_does_not_take():
    """If a completion cannot be written the step was done all the same: it is undone with the others."""
    # SG-025
    log, store = [], Log(fails=completion_of_b)

    assert type(await failure(start(saga(log, store)))) is OSError

    assert log == ["a", "b", "undo b {'b': 1}", "undo a {'a': 1}"]
    assert store.told()[3:] == ["rollback started b", "compensated a", "finished b"]


async def test_completion_that_the_store_took_unheard():
    """If it was written all the same, the log refuses the roll-back: nothing is undone, and the run can be resumed."""
    log, store = [], Log(fails=completion_of_b, is_done=True)

    error = await failure(start(saga(log, store)))

    assert type(error) is OSError
    assert "nothing was undone" in error.__notes__[-1]
    assert log == ["a", "b"]
    await failure(saga(log, Log(store.all)).resume_from("1"))
    assert log == ["a", "b", "c", "last", *ALL_UNDONE]


# --- crashes ---------------------------------------------------------------------------------------------------------


async def recorded(**steps):
    """Every row of a saga that fails, and what it noted."""
    log, store = [], Log()
    await failure(start(saga(log, store, **steps)))
    return log, store.all


@pytest.mark.parametrize("kept", range(1, 12))
async def test_crash_after_any_row(kept):
    """After a crash at any row the run goes on where it was: no step that is done is done again, nothing stays done."""
    # SG-014, B02, B03, B04, D10
    _, rows = await recorded()
    log, store = [], Log(rows[:kept])
    was_rolling_back = kept > 7

    error = await failure(saga(log, store).resume_from("1"))

    done = [row.state for row in rows[:kept] if row.kind is RowKind.CompensationCompletion]
    undone = [row.state for row in rows[:kept] if row.kind is RowKind.Compensated]
    forward = [] if was_rolling_back else [name for name in "abc" if name not in done] + ["last"]
    assert log == [*forward, *(text for text in ALL_UNDONE if text[5] not in undone)]
    assert str(error) == ("the run failed before it was resumed: Boom: " if was_rolling_back else "")
    assert store.rows == {}


async def test_crash_after_the_last_row():
    """A roll-back that is over is over: the run cannot be resumed, and nothing is undone twice."""
    _, rows = await recorded()
    log = []

    assert type(await failure(saga(log, Log(rows)).resume_from("1"))) is RunConflictError
    assert log == []


async def test_second_crash_in_the_roll_back():
    """Each resume of a roll-back goes on from what was undone before."""
    _, rows = await recorded()
    log, store = [], Log(rows[:9])
    await failure(saga(log, store).resume_from("1"))
    again, last = [], Log(store.all[:11])

    await failure(saga(again, last).resume_from("1"))

    assert log == ["undo b {'b': 1}", "undo a {'a': 1}"]
    assert store.told()[9:11] == ["rollback started last", "compensated b"]
    assert again == ["undo a {'a': 1}"]


@pytest.mark.model
@settings(deadline=None, max_examples=150)
@given(crashes=st.lists(st.integers(1, 4), max_size=8), before=st.sets(st.sampled_from("abc")))
def test_any_crashes_net_to_zero(crashes, before):
    """However often the process dies, each step is undone at least once after it was last done, and none is left out."""
    # SG-015, B04
    log: list[Any] = []
    steps: Any = {name: {"register_before": True} for name in before}

    async def live(rows):
        store = Log(rows)
        workflow = saga(log, store, **steps)
        error = await failure(start(workflow) if not rows else workflow.resume_from("1"))
        assert isinstance(error, (Boom, RunConflictError)) or "failed before it was resumed" in str(error)
        return store.all

    rows: list[CheckpointRow] = []
    for more in crashes:
        rows = testing.run(live(rows))[: len(rows) + more]
    testing.run(live(rows))

    for name in "abc":
        effects = [text for text in log if text == name or text.startswith(f"undo {name}")]
        assert effects
        assert effects[-1].startswith("undo")


async def test_intent_is_undone_after_a_crash():
    """A step registered before it began is done again after a crash, and undone with None if it then fails."""
    # G08
    intent = {"register_before": True}
    _, rows = await recorded(b=intent)
    assert [row.is_intent for row in rows[:4]] == [False, False, True, False]
    log, store = [], Log(rows[:3])

    await failure(saga(log, store, b={**intent, "fails": Boom()}).resume_from("1"))

    assert log == ["b", "undo b None", "undo a {'a': 1}"]
    assert [row.refers_to for row in store.all if row.kind is RowKind.Compensated] == [3, 1]


async def test_compensation_has_the_key_of_its_step_after_a_crash():
    """The idempotency key of a compensation is that of its step, also in another process."""
    # G01
    keys = []

    class Keeps(CompensatableTask[str, int]):
        name = "a"

        async def run(self, ctx: RunContext) -> tuple[str, int]:
            keys.append(ctx.idempotency_key)
            return "last", 1

        async def compensate(self, output: int, ctx: RunContext):
            keys.append(ctx.idempotency_key)

    def workflow(store):
        made = Workflow().register_with_compensation("a", Keeps()).register("last", lambda: 1 / 0)
        return made.add_exit_state("done").with_checkpoint_store(store)

    store = Log()
    await failure(start(workflow(store)))
    await failure(workflow(Log(store.all[:3])).resume_from("1"))

    assert len(keys) == 3
    assert len(set(keys)) == 1


# --- damage and change -----------------------------------------------------------------------------------------------


async def test_output_that_cannot_be_read():
    """If a stored output is not of its type any more the compensation is not called; it is reported with the bytes."""
    # SG-023
    _, rows = await recorded()
    rows[3] = changed(rows[3], output_blob=b'{"b":"x"}')
    log, store = [], Log(rows[:7])

    error = await failure(saga(log, store).resume_from("1"))

    assert [type(member) for member in error.exceptions] == [Boom, OutputUnreadableError]
    assert "the output of task b in state b cannot be read: " in str(error.exceptions[1])
    assert [(orphan.task, orphan.output) for orphan in error.orphans] == [("b", b'{"b":"x"}')]
    assert log == ["last", "undo c {'c': 1}", "undo a {'a': 1}"]
    assert store.told()[-1] == "needs attention last"


async def test_step_that_nobody_can_undo_any_more():
    """A step whose state is not compensatable in this version is an orphan with its task and bytes; the others are undone."""
    # SG-010
    _, rows = await recorded()
    log, store = [], Log(rows[:7])
    workflow = Workflow(name="saga").register_with_compensation("a", Step(log, "a", "b")).register("b", lambda: "last")
    workflow.register("last", lambda: 1 / 0).add_exit_state("done").with_checkpoint_store(store)
    workflow.with_workflow_version(2).with_migration(lambda row: changed(row, workflow_version=2))

    error = await failure(workflow.resume_from("1"))

    assert [type(member) for member in error.exceptions[1:]] == [OrphanedStepError, OrphanedStepError]
    assert [(orphan.state, orphan.task, orphan.output) for orphan in error.orphans] == [
        ("c", "c", b'{"c":1}'),
        ("b", "b", b'{"b":1}'),
    ]
    text = "task b in state b has no compensation in this version of the workflow"
    assert str(error.exceptions[2]) == text
    assert log == ["undo a {'a': 1}"]


class Receipt:
    """A type that no JSON becomes."""


@pytest.mark.parametrize(
    ("run", "compensate", "type_"),
    [
        (tuple[str, Receipt], int, Receipt),
        (Awaitable[tuple[Literal["done"], Receipt]], int, Receipt),
        (str, Receipt, Receipt),
        (None, None, Any),
    ],
)
def test_type_of_an_output(run, compensate, type_):
    """An output is read as ``run`` annotates it, or else as ``compensate`` does, or else as plain JSON."""

    class Tells(CompensatableTask[Any, Any]):
        async def run(self):
            raise AssertionError

        async def compensate(self, output):
            raise AssertionError

    if run is not None:
        Tells.run.__annotations__["return"] = run
    if compensate is not None:
        Tells.compensate.__annotations__["output"] = compensate
    workflow = Workflow().register_with_compensation("a", Tells()).add_exit_state("done")
    run = _core.Run(workflow._frozen(), "a", Resources(), None, None)

    assert run.completion("a", "a", 1, 0, b"1").output_type is type_


# --- a store that fails ----------------------------------------------------------------------------------------------


async def test_roll_back_that_cannot_be_recorded_does_not_begin(caplog):
    """If the start of a roll-back cannot be written nothing is undone, and the error says so: the run can be resumed."""
    # B02
    log = []
    store = Log(fails=of_kind(RowKind.RollbackStarted))

    error = await failure(start(saga(log, store)))

    assert type(error) is Boom
    assert "nothing was undone" in error.__notes__[-1]
    assert log == ["a", "b", "c", "last"]

    log.clear()
    assert type(await failure(saga(log, Log(store.all)).resume_from("1"))) is Boom
    assert log == ["last", *ALL_UNDONE]


async def test_step_that_cannot_be_recorded():
    """If it cannot be written that a step is undone, the others are undone all the same, and that is reported."""
    log = []
    store = Log(fails=lambda row: row.kind is RowKind.Compensated and row.state == "b")

    error = await failure(start(saga(log, store)))

    assert log == ["a", "b", "c", "last", *ALL_UNDONE]
    assert [type(member) for member in error.exceptions] == [Boom, OSError]
    assert error.orphans == ()

    log.clear()
    await failure(saga(log, Log(store.all)).resume_from("1"))
    assert log == ["undo b {'b': 1}"]  # at least once


@pytest.mark.parametrize("kind", [RowKind.Finished, RowKind.NeedsAttention])
async def test_end_that_cannot_be_recorded(kind):
    """If the end of a roll-back cannot be written, that is one more member of the error, and a resume ends it."""
    log: list[Any] = []
    options = {"undoing_fails": ValueError("no")} if kind is RowKind.NeedsAttention else {}
    store = Log(fails=of_kind(kind))

    error = await failure(start(saga(log, store, a=options)))

    assert isinstance(error.exceptions[-1], OSError)
    assert len(error.orphans) == (kind is RowKind.NeedsAttention)
    log.clear()
    last = Log(store.all)
    await failure(saga(log, last).resume_from("1"))
    assert log == (["undo a {'a': 1}"] if options else [])
    assert last.told()[-1] == "finished last"


@pytest.mark.parametrize("number", range(12))
@pytest.mark.parametrize("is_done", [False, True])
async def test_any_append_may_fail(number, is_done):
    """Whichever append fails, and whether or not it took effect, a resume leaves nothing done."""
    log: list[Any] = []
    store = Log(fails=lambda row: row.sequence == number, is_done=is_done)

    await failure(start(saga(log, store)))
    rows = list(store.rows.values())
    if rows and rows[-1].kind not in (RowKind.Finished, RowKind.NeedsAttention):
        await failure(saga(log, Log(rows)).resume_from("1"))

    for name in "abc":
        effects = [text for text in log if text == name or text.startswith(f"undo {name}")]
        assert not effects or effects[-1].startswith("undo")


async def test_forty_durable_runs_at_once():
    """Runs of one workflow and one store at once do not touch each other's rows: the failed ones net to zero."""
    # SG-015
    counts: Counter[int] = Counter()
    store = InMemoryCheckpointStore()

    class Charge(CompensatableTask[str, int]):
        def __init__(self, name, then):
            self.name = name
            self.then = then

        async def run(self, ctx: RunContext) -> tuple[str, int]:
            await asyncio.sleep(0)
            number = int(ctx.workflow_id or "")
            if "abc".index(self.name) == number % 4:
                raise Boom
            counts[number] += 1
            return self.then, number

        async def compensate(self, output: int) -> None:
            await asyncio.sleep(0)
            counts[output] -= 1

    workflow = Workflow[str]()
    for state, then in ("ab", "bc", ("c", "done")):
        workflow.register_with_compensation(state, Charge(state, then))
    workflow.add_exit_state("done").with_checkpoint_store(store)

    results = await asyncio.gather(
        *(workflow.orchestrate("a", workflow_id=str(number)) for number in range(40)), return_exceptions=True
    )

    assert [counts[number] for number in range(40)] == [0, 0, 0, 3] * 10
    assert [type(result) for result in results[:4]] == [Boom, Boom, Boom, str]


@pytest.mark.parametrize("asked", [SplitResult, SplitResult | None, Caught[ValueError]])
def test_step_that_is_registered_before_takes_nothing_of_the_step_before(asked):
    """A resume does the step before again and may not come to it any more, so its intent could not be undone."""

    class Step(CompensatableTask):
        def run(self, given):
            raise AssertionError

        def compensate(self, output):
            raise AssertionError

    Step.run.__annotations__["given"] = asked
    Workflow().register_with_compensation("a", Step())
    with pytest.raises(ConfigurationError, match="register_before=True rules out"):
        Workflow().register_with_compensation("a", Step(), register_before=True)
