"""`InMemoryCheckpointStore`: the same contract as the durable stores, kept as long as the process lives."""

import asyncio
import contextlib
import gc
import tempfile
import threading
from pathlib import Path

import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from cano import (
    CheckpointError,
    CheckpointRow,
    InMemoryCheckpointStore,
    RowKind,
    RunClaimedError,
    RunConflictError,
    RunStatus,
    RunTooLargeError,
    SqliteCheckpointStore,
    StoreFailedError,
)


def entry(sequence, **fields):
    return CheckpointRow(sequence, RowKind.StateEntry, "CHARGE", **fields)


async def test_contract():
    """A duplicate is refused, ids are apart, clear forgets, many appends at once land: as in a durable store."""
    # CK-012, CK-013, CK-015, CK-030
    store = InMemoryCheckpointStore()
    await asyncio.gather(*(store.append("order-1", entry(at)) for at in range(20)))
    await store.append("order-2", entry(0))
    with pytest.raises(RunConflictError):
        await store.append("order-1", entry(3, attempt=2))
    await store.clear("order-2")
    await store.clear("order-3")

    assert await store.load_run("order-1") == [entry(at) for at in range(20)]
    assert await store.load_run("order-2") == await store.load_run("order-3") == []


async def test_rows_are_the_stores_own():
    """What was loaded is a list of its own: changing it changes nothing in the store."""
    store = InMemoryCheckpointStore()
    await store.append("order-1", entry(0))
    (await store.load_run("order-1")).clear()

    assert await store.load_run("order-1") == [entry(0)]


async def test_nothing_suspends():
    """No call suspends the caller, so a durable run on this store needs no more turns of the loop than a plain one."""
    store = InMemoryCheckpointStore()
    calls = [
        store.start_run("order-1", workflow="order", version=1),
        store.append("order-1", entry(0), fence=1),
        store.load_run("order-1"),
        store.list_runs(),
        store.release("order-1", 1),
        store.claim("order-1"),
        store.clear("order-1", fence=2),
        store.aclose(),
    ]

    assert all(call.done() for call in calls)


async def test_limits():
    """The limits of a run hold here as well."""
    store = InMemoryCheckpointStore(max_blob=100, max_rows=2, max_bytes=300)
    await store.append("order-1", entry(0))
    with pytest.raises(RunTooLargeError, match="snapshot must be at most 100 bytes long, got 101"):
        await store.append("order-1", entry(1, snapshot=bytes(101)))
    await store.append("order-1", entry(1))
    with pytest.raises(RunTooLargeError, match="as many rows as it may, 2"):
        await store.append("order-1", entry(2))
    await store.append("order-2", entry(0, snapshot=bytes(100)))
    with pytest.raises(RunTooLargeError, match="as many bytes as it may, 300"):
        await store.append("order-2", entry(1, snapshot=bytes(100)))


@pytest.mark.parametrize("end", ["close", "aclose", "async with", "gone"])
async def test_owner_that_goes(end):
    """The claims of an owner last until it is closed, or gone; then another owner of the same runs has them."""
    first = InMemoryCheckpointStore()
    other = first.another_owner()
    await first.start_run("order-1", workflow="order", version=1)
    await first.append("order-1", entry(0), fence=1)
    with pytest.raises(RunClaimedError) as caught:
        await other.claim("order-1")
    assert caught.value.owner == first.owner != other.owner

    if end == "close":
        first.close()
    elif end == "aclose":
        await first.aclose()
    elif end == "async with":
        async with first:
            pass
    else:
        del first
        gc.collect()

    assert await other.claim("order-1") == 2
    assert await other.load_run("order-1") == [entry(0)]


async def test_closed_store():
    """A store that was closed refuses everything; another owner of the same runs goes on."""
    store = InMemoryCheckpointStore()
    other = store.another_owner()
    store.close()
    store.close()

    for call in (store.load_run, store.claim, store.clear):
        with pytest.raises(StoreFailedError, match="the store is closed") as caught:
            await call("order-1")
        assert caught.value.reason == "closed"
    await other.start_run("order-1", workflow="order", version=1)


def test_several_loops_and_threads():
    """One store serves the loops of several threads at once, and of those who start one id, one has it."""
    store, winners = InMemoryCheckpointStore(), []

    async def work(number):
        for at in range(200):
            await store.append(f"order-{number}", entry(at))
        with contextlib.suppress(RunClaimedError):
            winners.append(await store.start_run("one", workflow="order", version=1))

    threads = [threading.Thread(target=asyncio.run, args=(work(number),)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(winners) == 1


IDS = st.sampled_from(["order-1", "order-2"])
OWNERS = st.integers(0, 1)
FENCES = st.sampled_from([0, 0, 0, 0, 0, -1, None])  # relative to the last claim of the run; or none
ROWS = {
    "entry": lambda at: entry(at, snapshot=b"{}"),
    "another entry": lambda at: entry(at, attempt=2),
    "timer": lambda at: CheckpointRow(at, RowKind.TimerDue, "WAIT", due_at=1),
    "cursor": lambda at: CheckpointRow(at, RowKind.StepCursor, "LOAD", output_blob=b"%d" % at),
    "next cursor": lambda at: CheckpointRow(
        at, RowKind.StepCursor, "LOAD", output_blob=b"", refers_to=at - 1 if at else None
    ),
    "cursor of row 1": lambda at: CheckpointRow(
        at, RowKind.StepCursor, "LOAD", output_blob=b"", refers_to=1 if at > 1 else None
    ),
    "completion": lambda at: CheckpointRow(
        at, RowKind.CompensationCompletion, "PAY", next_state="SHIP", output_blob=b""
    ),
    "rollback": lambda at: CheckpointRow(at, RowKind.RollbackStarted, "PAY", output_blob=b"{}"),
    "compensated": lambda at: CheckpointRow(max(at, 1), RowKind.Compensated, "PAY", refers_to=0),
    "finished": lambda at: CheckpointRow(at, RowKind.Finished, "DONE"),
    "parked": lambda at: CheckpointRow(at, RowKind.NeedsAttention, "PAY", output_blob=b"why"),
}


class BothStores(RuleBasedStateMachine):
    """Two owners of each store, asked the same: whatever they are asked, both stores answer alike."""

    def __init__(self):
        super().__init__()
        self.runner = asyncio.Runner()
        self.fences = {}
        self.folder = tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None)  # noqa: S108
        path = Path(self.folder.name) / "runs.db"
        memory = InMemoryCheckpointStore()
        self.stores = [
            (SqliteCheckpointStore(path), memory),
            (SqliteCheckpointStore(path), memory.another_owner()),
        ]

    def teardown(self):
        for store in self.stores[0] + self.stores[1]:
            store.close()
        self.runner.close()
        self.folder.cleanup()

    async def answer(self, call):
        try:
            return await call()
        except CheckpointError as error:
            facts = {name: getattr(error, name, None) for name in ("workflow_id", "sequence", "status", "is_same")}
            return type(error), facts

    def ask(self, owner, method, *args, **options):
        durable, memory = [
            self.runner.run(self.answer(lambda store=store: getattr(store, method)(*args, **options)))
            for store in self.stores[owner]
        ]
        assert durable == memory
        return durable

    def fence(self, id_, relative):
        return None if relative is None else max(self.fences.get(id_, 1) + relative, 0)

    @rule(owner=OWNERS, id_=IDS)
    def start(self, owner, id_):
        fence = self.ask(owner, "start_run", id_, workflow="order", version=1)
        self.fences[id_] = fence if isinstance(fence, int) else self.fences.get(id_, 1)

    @rule(owner=OWNERS, id_=IDS)
    def claim(self, owner, id_):
        fence = self.ask(owner, "claim", id_)
        self.fences[id_] = fence if isinstance(fence, int) else self.fences.get(id_, 1)

    @rule(
        owner=OWNERS, id_=IDS, kind=st.sampled_from(sorted(ROWS)), fence=FENCES, off=st.sampled_from([0] * 8 + [1, -1])
    )
    def append(self, owner, id_, kind, fence, off):
        rows = self.ask(owner, "load_run", id_)
        last = rows[-1].sequence if isinstance(rows, list) and rows else -1
        self.ask(owner, "append", id_, ROWS[kind](max(last + 1 + off, 0)), fence=self.fence(id_, fence))

    @rule(owner=OWNERS, id_=IDS, fence=FENCES)
    def clear(self, owner, id_, fence):
        self.ask(owner, "clear", id_, fence=self.fence(id_, fence))

    @rule(owner=OWNERS, id_=IDS, fence=st.sampled_from([0, 0, -1]), stopped=st.booleans())
    def release(self, owner, id_, fence, stopped):
        self.ask(owner, "release", id_, self.fence(id_, fence), stopped=stopped)

    @rule(owner=OWNERS, id_=IDS)
    def look(self, owner, id_):
        self.ask(owner, "load_run", id_)

    @rule(owner=OWNERS, status=st.one_of(st.none(), st.sampled_from(RunStatus)))
    def listed(self, owner, status):
        def facts(store, runs):
            for run in runs if isinstance(runs, list) else ():
                yield (
                    run.id,
                    run.workflow,
                    run.version,
                    run.status,
                    run.state,
                    run.owner == store.owner,
                    run.rows,
                    run.bytes,
                )

        found = [
            set(facts(store, self.runner.run(self.answer(lambda store=store: store.list_runs(status=status)))))
            for store in self.stores[owner]
        ]
        assert found[0] == found[1]

    @rule(owner=OWNERS)
    def owner_goes(self, owner):
        for store in self.stores[owner]:
            store.close()  # and says so from now on, while the other one goes on


TestBothStores = pytest.mark.model(BothStores.TestCase)
TestBothStores.settings = settings(deadline=None, max_examples=100, stateful_step_count=40)
