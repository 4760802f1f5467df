"""`PostgresCheckpointStore` against a real server: what it promises while processes die, pause and race."""

# ruff: noqa: S608 - the schemas of the tests are named here

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from cano import (
    CheckpointRow,
    ConfigurationError,
    CorruptRowError,
    PostgresCheckpointStore,
    RowKind,
    RunClaimedError,
    RunConflictError,
    RunNotFoundError,
    RunStatus,
    RunTooLargeError,
    StoreFailedError,
    StoreOpenError,
    _postgres_sql as sql,
)
from cano.testing import checkpoint_store_suite
from tests.postgres_server import MISSING, PostgresServer, find_programs

asyncpg = pytest.importorskip("asyncpg")
Writer = pytest.importorskip("cano._postgres_writer").Writer

pytestmark = [pytest.mark.realtime, pytest.mark.skipif(find_programs() is None, reason=MISSING)]

LEASE = 2.0
MANUAL = (Path(__file__).parent.parent / "docs" / "postgres.md").read_text(encoding="utf-8")
_numbers = itertools.count(1)


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    with PostgresServer.running() as running:
        yield running


@pytest.fixture
def schema() -> str:
    return f"cano_{next(_numbers)}"


@pytest.fixture
async def store(server: PostgresServer, schema: str) -> AsyncIterator[PostgresCheckpointStore]:
    async with PostgresCheckpointStore(server.dsn, schema=schema, lease=LEASE) as opened:
        yield opened


@pytest.fixture
async def other(
    store: PostgresCheckpointStore, server: PostgresServer, schema: str
) -> AsyncIterator[PostgresCheckpointStore]:
    """Another owner of the same schema."""
    async with PostgresCheckpointStore(server.dsn, schema=schema, lease=LEASE) as opened:
        yield opened


@contextlib.asynccontextmanager
async def raw(server):
    """A connection that goes around the store."""
    connection = await asyncpg.connect(server.dsn)
    try:
        yield connection
    finally:
        await connection.close()


def entry(sequence, **fields):
    return CheckpointRow(sequence, RowKind.StateEntry, "WORK", **fields)


def cursor(sequence, first=None, **fields):
    return CheckpointRow(sequence, RowKind.StepCursor, "WORK", output_blob=b"%d" % sequence, refers_to=first, **fields)


def finished(sequence):
    return CheckpointRow(sequence, RowKind.Finished, "DONE")


async def begun(store, workflow_id, rows=1):
    """A run that this store has claimed, with so many rows."""
    fence = await store.start_run(workflow_id, workflow="test", version=1)
    for sequence in range(rows):
        await store.append(workflow_id, entry(sequence), fence=fence)
    return fence


async def sequences(store, workflow_id):
    return [row.sequence for row in await store.load_run(workflow_id)]


async def expire(connection, schema):
    """Let all leases run out."""
    await connection.execute(f"UPDATE {schema}.owners SET lease_until = now() - interval '1 s'")


async def taken_over(store, workflow_id, poll=0.02):
    """The fence, as soon as the run can be claimed."""
    while True:
        try:
            return await store.claim(workflow_id)
        except RunClaimedError:
            await asyncio.sleep(poll)


@pytest.mark.parametrize("check", checkpoint_store_suite(), ids=str)
async def test_the_suite_for_checkpoint_stores(server, check):
    """The store keeps what every checkpoint store promises."""
    await check(lambda: PostgresCheckpointStore(server.dsn, schema="suite"))


# --- rows ------------------------------------------------------------------------------------------------------------


async def test_rows_come_back_as_they_were_written(store):
    """What a run has written is what is loaded, byte by byte, and nothing is there of a run that is unknown."""
    rows = [
        entry(
            0,
            task_id="work",
            visit=3,
            attempt=2,
            workflow_version=4,
            fingerprint=2**64 - 1,
            run_id=bytes(range(16)),
            snapshot=b"",
        ),
        CheckpointRow(
            1,
            RowKind.CompensationCompletion,
            "\N{SNOWMAN}\0",
            output_blob=b"\0\xff",
            next_state="\0",
            run_id=bytes(range(16)),
        ),
        CheckpointRow(2, RowKind.TimerDue, "WAIT", due_at=253_402_300_799_999, run_id=bytes(range(16))),
    ]
    fence = await store.start_run("run", workflow="test", version=1)

    for row in rows:
        await store.append("run", row, fence=fence)

    assert await store.load_run("run") == rows
    assert await store.load_run("nobody") == []


async def test_stored_bytes_are_those_of_the_format(store, server, schema):
    """A stored row is exactly what `CheckpointRow.encode` makes of it, with readable columns beside it."""
    await begun(store, "run")

    async with raw(server) as connection:
        [found] = await connection.fetch(f"SELECT * FROM {schema}.rows")
        [seen] = await connection.fetch(f"SELECT * FROM {schema}.log")

    assert found["row"] == entry(0).encode("run")
    assert (seen["workflow_id"], seen["sequence"], seen["kind"], seen["state"]) == ("run", 0, "state entry", "WORK")


async def test_a_cursor_takes_the_place_of_the_one_before(store):
    """A cursor that stands for the one before it replaces it; one that does not fit is refused."""
    fence = await begun(store, "run")
    await store.append("run", cursor(1), fence=fence)
    for sequence in range(2, 6):
        await store.append("run", cursor(sequence, 1), fence=fence)

    with pytest.raises(RunConflictError, match="no cursor of the same visit before row 6"):
        await store.append("run", cursor(6, 2), fence=fence)
    with pytest.raises(RunConflictError, match="no cursor of the same visit before row 6"):
        await store.append("run", cursor(6, 1, visit=2), fence=fence)

    assert await sequences(store, "run") == [0, 5]
    [run] = await store.list_runs()
    assert (run.rows, run.bytes) == (2, len(entry(0).encode("run")) + len(cursor(5, 1).encode("run")))


async def test_a_row_has_one_place(store):
    """A sequence is written once, in order; the same bytes again are told from others."""
    fence = await begun(store, "run", 2)

    with pytest.raises(RunConflictError) as same:
        await store.append("run", entry(1), fence=fence)
    with pytest.raises(RunConflictError) as different:
        await store.append("run", entry(0, attempt=7), fence=fence)
    with pytest.raises(RunConflictError, match="cannot have row 3 yet"):
        await store.append("run", entry(3), fence=fence)

    assert (same.value.is_same, different.value.is_same) == (True, False)
    assert await sequences(store, "run") == [0, 1]


async def test_a_run_that_is_too_large_is_refused(store, server, schema):
    """The limits of a row and of a run hold, and what is above is refused, not cut."""
    fence = await begun(store, "run")
    async with raw(server) as connection:
        await connection.execute(f"UPDATE {schema}.runs SET kept_rows = 50000")

    with pytest.raises(RunTooLargeError, match="as many rows as it may"):
        await store.append("run", entry(1), fence=fence)
    with pytest.raises(RunTooLargeError, match="snapshot"):
        await store.append("run", entry(1, snapshot=bytes((2 << 20) + 1)), fence=fence)


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE {schema}.rows SET row = set_byte(row, 30, 77) WHERE sequence = 1",
        "UPDATE {schema}.rows SET row = (SELECT row FROM {schema}.rows WHERE sequence = 0) WHERE sequence = 1",
        "DELETE FROM {schema}.rows WHERE sequence = 1",
        "DELETE FROM {schema}.rows WHERE sequence = 2",
        "DELETE FROM {schema}.rows",
    ],
    ids=["flipped", "moved", "gap", "cut", "empty"],
)
async def test_damage_is_found(store, server, schema, damage):
    """Rows that are damaged, moved or missing are never loaded as if nothing was."""
    await begun(store, "run", 3)
    async with raw(server) as connection:
        await connection.execute(damage.replace("{schema}", schema))

    with pytest.raises(CorruptRowError):
        await store.load_run("run")


# --- many at once ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 10, 256])
async def test_appends_that_wait_share_a_commit(server, schema, batch):
    """What waits while a statement is under way goes into the next one, `batch` operations at most."""
    async with PostgresCheckpointStore(server.dsn, schema=schema, batch=batch) as store:
        fences = [await begun(store, f"run-{number}", 0) for number in range(100)]

        await asyncio.gather(
            *[store.append(f"run-{number}", entry(0), fence=fence) for number, fence in enumerate(fences)]
        )

    async with raw(server) as connection:
        commits = [
            row["n"] for row in await connection.fetch(f"SELECT count(*) AS n FROM {schema}.rows GROUP BY xmin::text")
        ]
    assert sum(commits) == 100
    assert max(commits) <= batch
    assert len(commits) <= 100 // batch + 2


@pytest.mark.parametrize("default", ["on", "off"])
@pytest.mark.parametrize("last", ["done", "refused"])
async def test_what_was_answered_is_on_the_disk(server, schema, default, last):
    """When operations of several kinds that share a turn are answered, all of them are on the disk, whatever the default is."""
    async with (
        PostgresCheckpointStore(f"{server.dsn}?synchronous_commit={default}", schema=schema) as store,
        raw(server) as connection,
    ):
        flushed = []
        for number in range(30):
            fence, old = await begun(store, f"run-{number}"), await begun(store, f"old-{number}")
            found = await asyncio.gather(
                store.append(f"run-{number}", entry(1), fence=fence),
                store.start_run(f"new-{number}", workflow="test", version=1),
                store.clear(f"old-{number}", fence=old if last == "done" else fence),
                return_exceptions=True,
            )
            assert isinstance(found[2], RunClaimedError) == (last == "refused")
            at_once = "SELECT pg_current_wal_flush_lsn() >= pg_current_wal_insert_lsn()"
            flushed.append(await connection.fetchval(at_once))

    assert sum(flushed) > 25  # the server writes things of its own now and then


async def test_what_is_refused_does_not_disturb_the_others(store, server, schema):
    """Of many operations that share a statement, those that may not be done are refused by themselves."""
    fences = [await begun(store, f"run-{number}") for number in range(20)]
    rows = [entry(0 if number == 3 else 1) for number in range(20)]
    fences[5] += 1000

    found = await asyncio.gather(
        *[store.append(f"run-{number}", rows[number], fence=fences[number]) for number in range(20)],
        store.append("nobody", entry(1), fence=1),
        return_exceptions=True,
    )

    assert [type(error) for error in found if error is not None] == [
        RunConflictError,
        RunClaimedError,
        RunNotFoundError,
    ]
    assert [len(await store.load_run(f"run-{number}")) for number in range(20)] == [
        1 if n in (3, 5) else 2 for n in range(20)
    ]


async def test_what_the_database_refuses_fails_alone(store, server, schema):
    """If the database itself does not take one row of many, the others are written."""
    fences = [await begun(store, f"run-{number}", 0) for number in range(20)]
    async with raw(server) as connection:
        await connection.execute(f"ALTER TABLE {schema}.rows ADD CHECK (task <> 'poison')")

    found = await asyncio.gather(
        *[
            store.append(f"run-{number}", entry(0, task_id="poison" if number == 7 else "fine"), fence=fences[number])
            for number in range(20)
        ],
        return_exceptions=True,
    )

    [error] = [error for error in found if error is not None]
    assert isinstance(error, StoreFailedError)
    assert error.workflow_id == "run-7"
    assert [len(await store.load_run(f"run-{number}")) for number in range(20)] == [n != 7 for n in range(20)]


async def test_a_run_that_somebody_locks_holds_up_itself_alone(store, server, schema):
    """While somebody else's transaction has locked a run, others are written; its own row is, when the lock is gone."""
    fences = [await begun(store, f"run-{number}") for number in range(10)]
    async with raw(server) as connection:
        async with connection.transaction():
            await connection.execute(f"SELECT FROM {schema}.runs WHERE workflow_id = 'run-3' FOR UPDATE")
            loop = asyncio.get_running_loop()
            appends = [
                loop.create_task(store.append(f"run-{n}", entry(1), fence=fence)) for n, fence in enumerate(fences)
            ]
            done, locked = await asyncio.wait(appends, timeout=LEASE / 2)
            assert (len(done), locked) == (9, {appends[3]})
            backends = (
                "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%' || $1 || '%' AND pid <> pg_backend_pid()"
            )
            assert await connection.fetchval(backends, f'"{schema}"') <= 2

        await asyncio.gather(*appends)

        assert await sequences(store, "run-3") == [0, 1]
        async with connection.transaction():
            await connection.execute(f"SELECT FROM {schema}.runs WHERE workflow_id = 'run-3' FOR UPDATE")
            with pytest.raises(StoreFailedError, match=r"run-3.*was locked") as refused:
                await store.append("run-3", entry(2), fence=fences[3])
            assert refused.value.reason == "busy"


async def test_operations_on_one_run_keep_their_order(store):
    """What is asked of one run at once is done in the order in which it was asked."""
    fence = await begun(store, "run", 0)

    await asyncio.gather(*[store.append("run", entry(sequence), fence=fence) for sequence in range(50)])

    assert await sequences(store, "run") == list(range(50))


async def test_a_cancelled_caller_does_not_disturb_the_others(store):
    """Who is cancelled while it waits loses its own answer only, and the store goes on."""
    fences = [await begun(store, f"run-{number}", 0) for number in range(50)]

    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(store.append(f"run-{number}", entry(0), fence=fence))
            for number, fence in enumerate(fences)
        ]
        await asyncio.sleep(0)
        for task in tasks[::3]:
            task.cancel()

    for number, task in enumerate(tasks):
        assert task.cancelled() == (number % 3 == 0)
        rows = await sequences(store, f"run-{number}")
        assert rows in ([], [0]) if task.cancelled() else rows == [0]


@pytest.mark.parametrize("turns", range(6))
async def test_a_start_that_nobody_waits_for_is_forgotten(store, other, turns):
    """A start whose caller is cancelled at any moment leaves no run behind."""
    task = asyncio.get_running_loop().create_task(store.start_run("run", workflow="test", version=1))
    for _ in range(turns):
        await asyncio.sleep(0.0005)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await store.clear("run", fence=await task)

    async with asyncio.timeout(LEASE / 2):
        while await other.list_runs():  # noqa: ASYNC110 - the database does not call back
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("turns", range(6))
async def test_a_claim_that_nobody_waits_for_is_given_up(store, other, turns):
    """A claim whose caller is cancelled at any moment leaves the run free for others."""
    fence = await begun(store, "run")
    await store.release("run", fence)

    task = asyncio.get_running_loop().create_task(store.claim("run"))
    for _ in range(turns):
        await asyncio.sleep(0.0005)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await store.release("run", await task)

    async with asyncio.timeout(LEASE / 2):
        await taken_over(other, "run")


# --- who may write ---------------------------------------------------------------------------------------------------


async def test_a_run_has_one_owner_until_it_ends(store, other):
    """A claimed run is nobody else's; the row that ends it gives up the claim, and then it is over for all."""
    fence = await begun(store, "run")

    for attempt in (
        other.start_run("run", workflow="test", version=1),
        other.claim("run"),
        other.append("run", entry(1)),
        other.clear("run"),
        other.release("run", fence + 1),
        store.claim("run"),
    ):
        with pytest.raises(RunClaimedError) as refused:
            await attempt
        assert refused.value.owner == (await store.list_runs())[0].owner
    await store.append("run", finished(1), fence=fence)

    [run] = await other.list_runs()
    assert (run.status, run.owner, run.state) == (RunStatus.Finished, None, "DONE")
    for attempt in (
        store.append("run", entry(2), fence=fence),
        other.claim("run"),
        other.start_run("run", workflow="test", version=1),
    ):
        with pytest.raises(RunConflictError):
            await attempt


async def test_of_owners_that_want_the_same_runs_each_run_has_one(store, other, server, schema):
    """However the claims of two owners and the clears of a third meet, a run has one new owner, or is gone."""
    ids = [f"run-{number}" for number in range(100)]
    dice = random.Random(1)
    won = []

    async def claim(owner, workflow_id):
        with contextlib.suppress(RunClaimedError, RunNotFoundError):
            won.append((workflow_id, owner, await owner.claim(workflow_id)))

    async def clear(owner, workflow_id):
        with contextlib.suppress(RunClaimedError):
            await owner.clear(workflow_id)
            won.append((workflow_id, owner, None))

    async with PostgresCheckpointStore(server.dsn, schema=schema) as third:
        for _ in range(5):
            await asyncio.gather(*[store.append(workflow_id, entry(0)) for workflow_id in ids])
            attempts = [claim(owner, workflow_id) for owner in (store, other) for workflow_id in ids]
            attempts += [clear(third, workflow_id) for workflow_id in ids[::3]]
            dice.shuffle(attempts)
            await asyncio.gather(*attempts)

            assert sorted(workflow_id for workflow_id, _, _ in won) == sorted(ids)
            for workflow_id, owner, fence in won:
                if fence is not None:
                    await owner.clear(workflow_id, fence=fence)
            won.clear()


async def test_a_row_that_may_not_follow_is_refused(store):
    """Which kind of row may follow is asked of the rules of the core, also when the run goes backwards."""
    fence = await begun(store, "run")

    with pytest.raises(RunConflictError, match="no compensated row may follow"):
        await store.append("run", CheckpointRow(1, RowKind.Compensated, "WORK", refers_to=0), fence=fence)
    await store.append("run", CheckpointRow(1, RowKind.RollbackStarted, "WORK", output_blob=b"{}"), fence=fence)
    with pytest.raises(RunConflictError, match="no state entry row may follow"):
        await store.append("run", entry(2), fence=fence)
    await store.append("run", CheckpointRow(2, RowKind.Compensated, "WORK", refers_to=0), fence=fence)
    await store.append("run", finished(3), fence=fence)

    [run] = await store.list_runs()
    assert run.status is RunStatus.RolledBack


async def test_rows_without_a_claim(store, other):
    """A run that nobody has claimed begins with its row 0 and takes rows without a fence."""
    with pytest.raises(RunConflictError, match="cannot have row 1 yet"):
        await store.append("run", entry(1))
    await store.append("run", entry(0))
    with pytest.raises(RunConflictError, match="this row 0 already"):
        await other.append("run", entry(0))
    await other.append("run", entry(1))
    fence = await other.claim("run")
    with pytest.raises(RunClaimedError):
        await store.append("run", entry(2))
    await other.append("run", entry(2), fence=fence)

    assert await sequences(store, "run") == [0, 1, 2]


async def test_what_is_released_can_be_claimed_at_once(store, other):
    """A released run is free, a stopped one is shown as stopped, and its old fence is worth nothing."""
    fence = await begun(store, "run")
    await store.release("run", fence, stopped=True)
    assert [run.status for run in await other.list_runs()] == [RunStatus.Stopped]

    newer = await other.claim("run")

    assert newer > fence
    assert [run.status for run in await other.list_runs()] == [RunStatus.Running]
    for attempt in (
        store.append("run", entry(1), fence=fence),
        store.release("run", fence),
        store.clear("run", fence=fence),
    ):
        with pytest.raises(RunClaimedError):
            await attempt


async def test_an_id_that_was_cleared_begins_anew(store, other):
    """A cleared run leaves nothing, and its id gets a fence that was never there before."""
    fence = await begun(store, "run", 3)
    await store.clear("run", fence=fence)
    await store.clear("run")

    assert await store.load_run("run") == []
    assert await begun(other, "run") > fence
    assert await sequences(store, "run") == [0]
    with pytest.raises(RunClaimedError):
        await store.append("run", entry(1), fence=fence)


async def test_a_clear_leaves_no_row_behind(store, server, schema):
    """Clearing forgets the rows of a run, also one that was added while the clear was on its way."""
    await store.append("run", entry(0))
    async with raw(server) as connection:
        transaction = connection.transaction()
        await transaction.start()
        assert await _append_by_hand(connection, schema, "run", entry(1), None) == 1
        clearing = asyncio.get_running_loop().create_task(store.clear("run"))
        await asyncio.sleep(0.1)
        assert not clearing.done()
        await transaction.commit()
        await clearing

        assert await connection.fetch(f"SELECT FROM {schema}.rows") == []
    assert await store.load_run("run") == []


async def test_runs_are_listed_by_status_and_age(store):
    """Runs are listed by status, by the age of their last write, the longest untouched first, and as many as asked for."""
    for number in range(3):
        fence = await begun(store, f"run-{number}")
    await store.append("run-2", finished(1), fence=fence)

    assert [run.id for run in await store.list_runs()] == ["run-0", "run-1", "run-2"]
    assert [run.id for run in await store.list_runs(status=RunStatus.Finished)] == ["run-2"]
    assert [run.id for run in await store.list_runs(status=[RunStatus.Running, RunStatus.Stopped], limit=1)] == [
        "run-0"
    ]
    assert await store.list_runs(older_than=60) == []
    assert len(await store.list_runs(older_than=0)) == 3


# --- take-over -------------------------------------------------------------------------------------------------------


async def test_an_append_begun_before_a_take_over_is_seen_by_it(store, other, server, schema):
    """While an append of the old owner is not committed the run cannot be taken over; then its row is there to be loaded."""
    fence = await begun(store, "run")
    async with raw(server) as connection:
        transaction = connection.transaction()
        await transaction.start()
        assert await _append_by_hand(connection, schema, "run", entry(1), fence) == 1
        async with raw(server) as second:
            await expire(second, schema)
        claiming = asyncio.get_running_loop().create_task(other.claim("run"))
        await asyncio.sleep(0.2)
        assert not claiming.done()

        await transaction.commit()

    await claiming
    assert await sequences(other, "run") == [0, 1]


async def test_an_append_that_meets_a_take_over_is_refused(store, other, server, schema):
    """An append that waits for a take-over under way adds nothing behind the new owner's back."""
    fence = await begun(store, "run")
    async with raw(server) as connection:
        await expire(connection, schema)
        transaction = connection.transaction()
        await transaction.start()
        claimed = await connection.fetch(sql.CLAIM.replace("{schema}", schema), "somebody", ["run"], [bytes(16)], "on")
        assert len(claimed) == 1
        appending = asyncio.get_running_loop().create_task(store.append("run", entry(1), fence=fence))
        await asyncio.sleep(0.2)
        assert not appending.done()

        await transaction.commit()

    with pytest.raises(RunClaimedError, match="somebody"):
        await appending
    assert await sequences(other, "run") == [0]


async def _append_by_hand(connection, schema, workflow_id, row, fence):
    columns = [
        workflow_id, fence, row.sequence, "running", None, row.kind.value, row.state, row.task_id, row.visit, row.attempt,
        None, None, row.run_id, row.recorded_at, row.workflow_version, row.encode(workflow_id),
    ]  # fmt: skip
    statement = sql.APPEND.replace("{schema}", schema)
    return len(await connection.fetch(statement, *[[column] for column in columns], 50_000, 50 << 20, "on"))


async def test_a_new_owner_has_loaded_all_that_the_old_one_wrote(store, other, server, schema):
    """However appends and take-overs meet, nothing is added after the new owner has loaded the run."""
    async with raw(server) as connection:
        for number in range(40):
            workflow_id = f"run-{number}"
            fence = await begun(store, workflow_id)
            written = [0]

            async def go_on(workflow_id=workflow_id, fence=fence, written=written):
                with pytest.raises(RunClaimedError):
                    for sequence in itertools.count(1):
                        await store.append(workflow_id, entry(sequence), fence=fence)
                        written.append(sequence)

            going = asyncio.get_running_loop().create_task(go_on())
            await asyncio.sleep(0.001 * (number % 7))
            newer = None
            while newer is None:
                await expire(connection, schema)
                with contextlib.suppress(RunClaimedError):
                    newer = await other.claim(workflow_id)
            loaded = await sequences(other, workflow_id)
            await going

            assert await sequences(other, workflow_id) == loaded == written
            await other.append(workflow_id, finished(len(loaded)), fence=newer)


def processes(command, server, schema, *arguments, count=1):
    script = Path(__file__).with_name("postgres_worker.py")
    return [
        subprocess.Popen(  # noqa: S603 - our own script
            [sys.executable, str(script), command, server.dsn, schema, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(count)
    ]


@contextlib.contextmanager
def ended(started):
    """End the processes, whatever happens."""
    try:
        yield started
    finally:
        for process in started:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
            process.communicate()


def line(process):
    return process.stdout.readline().split()


def signal_all(started):
    for process in started:
        process.stdin.write("go\n")
        process.stdin.flush()


@pytest.mark.parametrize("command", ["claim", "start"])
async def test_of_processes_that_want_one_run_one_gets_it(server, schema, command):
    """Of several processes that claim one run at once, or start it in a schema that is not there yet, one wins."""
    # RS-031
    if command == "claim":
        async with PostgresCheckpointStore(server.dsn, schema=schema) as store:
            await store.release("run", await begun(store, "run"))

    with ended(processes(command, server, schema, "run", count=4)) as started:
        assert [line(process) for process in started] == [["ready"]] * 4
        signal_all(started)
        found = [line(process)[0] for process in started]
        signal_all(started)

    assert sorted(found) == ["lost"] * 3 + ["won"]


def acknowledged(process, runs, at_least):
    """How many rows of each run the process was told of, once each has so many."""
    counts = dict.fromkeys((f"run-{number}" for number in range(runs)), 0)
    while min(counts.values()) < at_least:
        word, workflow_id, sequence = line(process)
        assert word == "added"
        counts[workflow_id] = int(sequence) + 1
    return counts


async def test_the_runs_of_a_killed_process_are_taken_over(server, schema):
    """The runs of a process that was killed can be claimed half a second after its lease at the latest, with every row."""
    async with PostgresCheckpointStore(server.dsn, schema=schema, lease=LEASE) as store:
        with ended(processes("work", server, schema, LEASE, 20)) as [process]:
            counts = acknowledged(process, 20, at_least=5)
            os.kill(process.pid, signal.SIGKILL)
            killed = time.monotonic()
            rest, _ = process.communicate()

        fences = await asyncio.gather(*[taken_over(store, workflow_id) for workflow_id in counts])

        assert time.monotonic() - killed < LEASE + 0.5
        for words in map(str.split, rest.splitlines()):
            counts[words[1]] = int(words[2]) + 1
        for (workflow_id, count), fence in zip(counts.items(), fences, strict=True):
            rows = await sequences(store, workflow_id)
            assert rows == list(range(len(rows)))
            assert len(rows) in (count, count + 1)  # the last answer may be on its way
            await store.append(workflow_id, entry(len(rows)), fence=fence)


async def test_the_workflows_of_a_killed_process_are_finished_by_another(server, schema):
    """Another process goes on where the killed one was: no step is left out, and only the one under way is begun again."""
    # RS-029
    [victim] = processes("serve", server, schema, 1.0, "victim", 20)
    [heir] = processes("serve", server, schema, 1.0, "heir", 0)
    with ended([victim, heir]):
        begun_by_victim = [line(victim)[1:] for _ in range(50)]
        os.kill(victim.pid, signal.SIGKILL)
        killed = time.monotonic()
        begun_by_victim += [words.split()[1:] for words in victim.communicate()[0].splitlines()]
        assert line(heir) == ["served", "heir"]
        begun_by_heir, recovered = [], {}
        while len(recovered) < len({run for run, *_ in begun_by_victim}):
            word, run, *rest = line(heir)
            if word == "step":
                begun_by_heir.append([run, *rest])
            else:
                recovered[run] = rest

    assert time.monotonic() - killed < 5
    assert set(map(tuple, recovered.values())) == {("step-5",)}
    for run in recovered:
        before = [(int(step), key) for name, step, key in begun_by_victim if name == run]
        after = [(int(step), key) for name, step, key in begun_by_heir if name == run]
        assert [step for step, _ in before] == list(range(len(before)))
        first = after[0][0] if after else 5
        assert first in (len(before) - 1, len(before))
        assert [step for step, _ in after] == list(range(first, 5))
        again = {step: key for step, key in before if step == first}
        assert all(key == again.get(step, key) for step, key in after)


async def test_a_process_that_was_paused_writes_nothing_more(server, schema):
    """A process that comes back after its runs were taken over is refused in each, and has added no row."""
    async with PostgresCheckpointStore(server.dsn, schema=schema, lease=LEASE) as store:
        with ended(processes("work", server, schema, LEASE, 10)) as [process]:
            runs = acknowledged(process, 10, at_least=3)
            os.kill(process.pid, signal.SIGSTOP)
            fences = await asyncio.gather(*[taken_over(store, workflow_id) for workflow_id in runs])
            loaded = [await sequences(store, workflow_id) for workflow_id in runs]

            os.kill(process.pid, signal.SIGCONT)
            rest, _ = process.communicate(timeout=10)

        assert sorted(words.split()[1] for words in rest.splitlines() if words.startswith("lost")) == sorted(runs)
        assert [await sequences(store, workflow_id) for workflow_id in runs] == loaded
        for workflow_id, fence, rows in zip(runs, fences, loaded, strict=True):
            await store.append(workflow_id, entry(len(rows)), fence=fence)


async def test_a_living_process_keeps_its_runs(server, schema):
    """The lease of a process that lives is kept alive for all of its runs, however long they wait."""
    async with (
        PostgresCheckpointStore(server.dsn, schema=schema, lease=1) as store,
        PostgresCheckpointStore(server.dsn, schema=schema, lease=1) as other,
    ):
        fence = await begun(store, "run")

        for _ in range(25):
            await asyncio.sleep(0.1)
            with pytest.raises(RunClaimedError):
                await other.claim("run")

        await store.append("run", entry(1), fence=fence)


# --- a database that goes away ---------------------------------------------------------------------------------------


async def test_a_restarted_server_costs_time_only(server, schema):
    """Appends that meet a crash of the server wait, and land once."""
    async with PostgresCheckpointStore(server.dsn, schema=schema, lease=10) as store:
        fences = {f"run-{number}": await begun(store, f"run-{number}", 0) for number in range(30)}

        async def go_on(workflow_id):
            for sequence in range(100):
                await store.append(workflow_id, entry(sequence), fence=fences[workflow_id])
                await asyncio.sleep(0.005)

        async with asyncio.TaskGroup() as group:
            for workflow_id in fences:
                group.create_task(go_on(workflow_id))
            for _ in range(2):
                await asyncio.sleep(0.1)
                await asyncio.to_thread(server.restart, "immediate")

        for workflow_id in fences:
            assert await sequences(store, workflow_id) == list(range(100))


@pytest.mark.parametrize("operation", ["start", "claim", "append", "replace", "release", "clear"])
async def test_an_answer_that_was_lost_is_found_again(store, monkeypatch, operation):
    """An operation that was done while its connection was lost is not done twice, and is answered as if nothing had been."""
    fence = await begun(store, "run")
    await store.append("run", cursor(1), fence=fence)
    if operation == "claim":
        await store.release("run", fence)
    send, failures = Writer._send, itertools.count()

    async def done_and_lost(self, connection, name, operations, sync):
        answers = await send(self, connection, name, operations, sync)
        if next(failures) == 0:
            raise ConnectionResetError
        return answers

    monkeypatch.setattr(Writer, "_send", done_and_lost)
    match operation:
        case "start":
            await store.append("new", entry(0), fence=await store.start_run("new", workflow="test", version=1))
        case "claim":
            await store.append("run", entry(2), fence=await store.claim("run"))
        case "append":
            await store.append("run", entry(2), fence=fence)
        case "replace":
            await store.append("run", cursor(2, 1), fence=fence)
        case "release":
            await store.release("run", fence)
        case "clear":
            await store.clear("run", fence=fence)

    expected = {"claim": [0, 1, 2], "append": [0, 1, 2], "replace": [0, 2], "clear": []}
    assert next(failures) > 1
    assert await sequences(store, "run") == expected.get(operation, [0, 1])


async def test_runs_are_lost_with_the_lease(server, schema):
    """If the database is away for as long as the lease, who goes on with a run is told that it is lost; new ones can begin."""
    async with PostgresCheckpointStore(server.dsn, schema=schema, lease=0.8) as store:
        fence, kept = await begun(store, "run"), await begun(store, "kept")
        await asyncio.to_thread(server.stop, "immediate")
        began = time.monotonic()

        with pytest.raises(RunClaimedError, match="is lost") as refused:
            await store.append("run", entry(1), fence=fence)

        assert 0.5 < time.monotonic() - began < 1.6
        assert (refused.value.owner, refused.value.sequence) == (None, 1)
        await asyncio.to_thread(server.start)
        with pytest.raises(RunClaimedError, match="is lost"):
            await store.append("kept", entry(1), fence=kept)
        newer = await taken_over(store, "run")
        await store.append("run", entry(1), fence=newer)
        assert await sequences(store, "run") == [0, 1]


async def test_what_waits_for_a_database_that_is_away_waits_for_the_lease(server, schema):
    """Operations without a claim fail after as long as the lease, and the store can be closed meanwhile."""
    async with PostgresCheckpointStore(server.dsn, schema=schema, lease=0.5) as store:
        await begun(store, "run")
        await asyncio.to_thread(server.stop, "immediate")
        try:
            found = await asyncio.gather(
                store.claim("run"), store.append("new", entry(0)), store.load_run("run"), return_exceptions=True
            )

            assert [type(error) for error in found] == [StoreFailedError] * 3
            assert {error.reason for error in found} == {"io"}
            await store.aclose()
        finally:
            await asyncio.to_thread(server.start)


# --- opening and closing ---------------------------------------------------------------------------------------------


async def test_closing_writes_what_waits_and_gives_up_all_claims(server, schema, other):
    """Appends under way when the store is closed are done, and its runs are free at once."""
    store = PostgresCheckpointStore(server.dsn, schema=schema, batch=10)
    fences = [await begun(store, f"run-{number}", 0) for number in range(100)]
    appends = [
        asyncio.get_running_loop().create_task(store.append(f"run-{number}", entry(0), fence=fence))
        for number, fence in enumerate(fences)
    ]
    await asyncio.sleep(0)

    await store.aclose()
    await store.aclose()

    assert all(append.done() and append.exception() is None for append in appends)
    assert {run.owner for run in await other.list_runs()} == {None}
    await other.claim("run-0")
    for attempt in (store.append("run-1", entry(1), fence=fences[1]), store.load_run("run-1")):
        with pytest.raises(StoreFailedError, match="closed") as refused:
            await attempt
        assert refused.value.reason == "closed"


async def test_closing_can_be_cancelled(server, schema):
    """A close that is cancelled leaves no connection behind, and tells those who wait."""
    store = PostgresCheckpointStore(server.dsn, schema=schema, batch=1)
    fences = [await begun(store, f"run-{number}", 0) for number in range(50)]
    loop = asyncio.get_running_loop()
    appends = [loop.create_task(store.append(f"run-{n}", entry(0), fence=fence)) for n, fence in enumerate(fences)]
    closing = loop.create_task(store.aclose())
    await asyncio.sleep(0.002)

    closing.cancel()

    found = await asyncio.gather(*appends, closing, return_exceptions=True)
    assert isinstance(found.pop(), asyncio.CancelledError)
    assert {type(error) for error in found} <= {StoreFailedError, type(None)}


async def test_schemas_know_nothing_of_each_other(server, schema, store):
    """The same id in two schemas is two runs."""
    async with PostgresCheckpointStore(server.dsn, schema=f"{schema}_Too") as second:
        await begun(store, "run", 1)
        await begun(second, "run", 2)

        assert (await sequences(store, "run"), await sequences(second, "run")) == ([0], [0, 1])


async def test_the_tables_are_made_once(server, schema):
    """Stores that open a schema that is not there at once all find it made; so does one whose schema was there but empty."""
    async with raw(server) as connection:
        await connection.execute(f"CREATE SCHEMA {schema}")
    async with contextlib.AsyncExitStack() as stack:
        stores = [PostgresCheckpointStore(server.dsn, schema=schema) for _ in range(8)]
        await asyncio.gather(*[stack.enter_async_context(store) for store in stores])
        await asyncio.gather(*[begun(store, f"run-{number}") for number, store in enumerate(stores)])

        assert len(await stores[0].list_runs()) == 8


async def test_older_tables_are_brought_up_to_date(server, schema, monkeypatch):
    """A schema of an earlier version is migrated in one transaction and keeps its runs; a step that fails changes nothing."""
    async with PostgresCheckpointStore(server.dsn, schema=schema) as store:
        await store.release("run", await begun(store, "run", 3))
    monkeypatch.setattr(sql, "VERSION", 3)
    monkeypatch.setitem(sql.MIGRATIONS, 2, "ALTER TABLE {schema}.runs ADD COLUMN note text NOT NULL DEFAULT ''")
    monkeypatch.setitem(sql.MIGRATIONS, 3, "ALTER TABLE {schema}.nobody ADD COLUMN note text")
    with pytest.raises(StoreOpenError, match="nobody"):
        await PostgresCheckpointStore(server.dsn, schema=schema).__aenter__()
    monkeypatch.setitem(sql.MIGRATIONS, 3, "ALTER TABLE {schema}.owners ADD COLUMN note text")

    async with PostgresCheckpointStore(server.dsn, schema=schema) as store:
        await store.append("run", entry(3), fence=await store.claim("run"))

        assert await sequences(store, "run") == [0, 1, 2, 3]
    async with raw(server) as connection:
        assert [row["version"] for row in await connection.fetch(f"SELECT * FROM {schema}.versions ORDER BY 1")] == [
            1,
            2,
            3,
        ]


async def test_later_tables_are_refused(server, schema, store):
    """A schema of a later version is left alone, and the error says what to do."""
    async with raw(server) as connection:
        await connection.execute(f"INSERT INTO {schema}.versions VALUES (99)")
    second = PostgresCheckpointStore(server.dsn, schema=schema)

    for attempt in (second.load_run("run"), begun(second, "run")):
        with pytest.raises(
            StoreOpenError, match="version 99, and this version of cano knows 1: update cano"
        ) as refused:
            await attempt
        assert refused.value.reason == "version"
    await second.aclose()


async def test_who_may_not_make_tables_is_told_so(server, schema):
    """A user without the right to make a schema gets an error that says what to grant."""
    async with raw(server) as connection:
        await connection.execute(f"CREATE ROLE {schema} LOGIN")
    dsn = server.dsn.replace("postgres@", f"{schema}@")

    with pytest.raises(StoreOpenError, match=r"may not make them.*grant CREATE"):
        await PostgresCheckpointStore(dsn, schema=schema).__aenter__()


async def test_a_server_that_is_not_there_is_told_at_once(server):
    """The first connection fails fast, with an error that hides the password; the store can be used later."""
    dsn = "postgresql://me:secret@127.0.0.1:1/postgres?password=secret"
    store = PostgresCheckpointStore(dsn)

    for attempt in (begun(store, "run"), store.load_run("run"), store.__aenter__()):
        with pytest.raises(StoreOpenError) as refused:
            await attempt
        assert refused.value.reason == "io"
        assert "secret" not in str(refused.value)
        assert "127.0.0.1:1" in str(refused.value)
    assert "secret" not in repr(store)
    await store.aclose()


async def test_a_user_with_the_rights_of_the_manual_can_use_the_tables(server, schema, store):
    """The rights that docs/postgres.md names are enough for all but making the tables."""
    await begun(store, "run")
    async with raw(server) as connection:
        await connection.execute(f"CREATE ROLE {schema} LOGIN")
        for grant in re.findall(r"^GRANT .*$", MANUAL, re.MULTILINE):
            await connection.execute(
                grant.replace("SCHEMA cano", f"SCHEMA {schema}").replace("TO orders", f"TO {schema}")
            )

    async with PostgresCheckpointStore(server.dsn.replace("postgres@", f"{schema}@"), schema=schema) as second:
        fence = await begun(second, "second")
        await second.append("second", cursor(1), fence=fence)
        await second.append("second", cursor(2, 1), fence=fence)
        await second.release("second", fence)
        await second.clear("second")
        assert [run.id for run in await second.list_runs()] == ["run"]


def test_the_manual_is_true(server):
    """The examples of docs/postgres.md run, one after the other."""
    examples = re.findall(r"^```py\n(.*?)^```$", MANUAL, re.MULTILINE | re.DOTALL)
    namespace = {}

    for example in examples:
        exec(example.replace("postgresql://orders:secret@db.internal:5432/orders", server.dsn), namespace)  # noqa: S102

    assert len(examples) == 2


def test_a_missing_driver_is_named():
    """Without asyncpg cano is imported all the same, and the store's error says what to install."""
    script = (
        "import sys; sys.modules['asyncpg'] = None; import cano\n"
        "try: cano.PostgresCheckpointStore\n"
        "except ImportError as error: print(error)"
    )

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)  # noqa: S603

    assert done.stdout == "PostgresCheckpointStore needs asyncpg: install cano[postgres]\n"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"dsn": "sqlite:///file"}, "dsn must begin with postgresql://, got 'sqlite:///file'"),
        ({"dsn": None}, "dsn must be a text, got None"),
        ({"dsn": "mysql://me:sec:r@et@host"}, r"mysql://me:\*\*\*@host'"),
        ({"schema": "a b"}, "schema must be a name of 1 to 63"),
        ({"schema": "pg_mine"}, "schema must not begin with pg_"),
        ({"schema": 'x"; DROP TABLE y; --'}, "schema must be a name"),
        ({"lease": 0.1}, "lease must be at least 0.5 and at most 86400 seconds, got 0.1"),
        ({"lease": None}, "lease must be seconds"),
        ({"beat": 10}, "beat must be at least 0.01 and at most 7.5 seconds, got 10"),
        ({"batch": 0}, "batch must be at least 1 and at most 4096, got 0"),
        ({"batch": True}, "batch must be an int"),
    ],
)
def test_bad_arguments_are_refused(arguments, text):
    """What the store is made from is checked before anything is connected."""
    with pytest.raises(ConfigurationError, match=text):
        PostgresCheckpointStore(**({"dsn": "postgresql://localhost/db"} | arguments))


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda store: store.append("run", "row"), "row must be a CheckpointRow, got 'row'"),
        (lambda store: store.append("run", entry(0), fence="1"), "fence must be an int, got '1'"),
        (lambda store: store.append(" ", entry(0)), "must not be blank"),
        (lambda store: store.append("a\nb", entry(0)), "must not hold control characters"),
        (lambda store: store.load_run(7), "workflow_id must be a text, got 7"),
        (lambda store: store.claim("x" * 257), "must be at most 256 bytes long"),
        (lambda store: store.start_run("run", workflow="", version=1), "workflow must have 1 to 128 bytes, got 0"),
        (lambda store: store.start_run("run", workflow=None, version=1), "workflow must be a text, got None"),
        (lambda store: store.start_run("run", workflow="w", version=-1), "version must be at least 0"),
        (lambda store: store.release("run", None), "fence must be an int, got None"),
        (
            lambda store: store.list_runs(status="running"),
            "status must be a RunStatus, or an iterable of them, got 'running'",
        ),
        (lambda store: store.list_runs(limit=0), "limit must be at least 1 and at most 1000000, got 0"),
        (lambda store: store.list_runs(older_than="1"), "older_than must be"),
    ],
)
async def test_bad_values_are_refused(call, text):
    """What an operation is asked for is checked before anything is sent."""
    with pytest.raises(ConfigurationError, match=text):
        await call(PostgresCheckpointStore("postgresql://nobody@127.0.0.1:1/db"))


def test_a_store_belongs_to_one_loop_and_one_process(server, schema):
    """A store is refused in another event loop, and in a child that was forked."""
    store = PostgresCheckpointStore(server.dsn, schema=schema)
    asyncio.run(_used_and_closed_later(store))

    with pytest.raises(StoreFailedError, match="another event loop"):
        asyncio.run(store.load_run("run"))
    child = os.fork()
    if child == 0:
        try:
            asyncio.run(store.load_run("run"))
        except StoreFailedError as error:
            os._exit(7 if error.reason == "forked" else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


async def _used_and_closed_later(store):
    await store.load_run("run")
    await store._reader.aclose()
