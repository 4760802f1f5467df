"""`SqliteCheckpointStore`: real files, other processes that share and die, loops that must not wait, and ends of every kind."""

import asyncio
import gc
import json
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from cano import (
    CheckpointRow,
    ConfigurationError,
    CorruptRowError,
    RowKind,
    RunClaimedError,
    RunConflictError,
    RunStatus,
    RunTooLargeError,
    SqliteCheckpointStore,
    StoreFailedError,
    StoreOpenError,
    testing,
)

try:
    import resource
except ImportError:  # Windows
    resource = None

posix = pytest.mark.skipif(os.name != "posix", reason="modes, signals and links are POSIX's")
root = pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root may do this")

PRELUDE = """
import asyncio, json, os, signal, sys, time
from cano import *
store = SqliteCheckpointStore(sys.argv[1], lease=float(sys.argv[2]))

def entry(sequence):
    return CheckpointRow(sequence, RowKind.StateEntry, "CHARGE")

def say(*values):
    print(json.dumps(values), flush=True)

async def begin(*ids):
    fences = [await store.start_run(id_, workflow="order", version=1) for id_ in ids]
    for id_, fence in zip(ids, fences):
        await store.append(id_, entry(0), fence=fence)
    return fences
"""


@pytest.fixture
def path(tmp_path):
    return tmp_path / "runs.db"


def entry(sequence, **fields):
    return CheckpointRow(sequence, RowKind.StateEntry, "CHARGE", **fields)


def finished(sequence):
    return CheckpointRow(sequence, RowKind.Finished, "DONE")


async def write(store, id_, rows):
    fence = await store.start_run(id_, workflow="order", version=1)
    for row in rows:
        await store.append(id_, row, fence=fence)
    return fence


class Child:
    """Another process with the store open; what it says are lines of JSON."""

    def __init__(self, path, program, lease=15.0):
        code = PRELUDE + textwrap.dedent(program)
        arguments = [sys.executable, "-c", code, str(path), str(lease)]
        self.process = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # noqa: S603

    def hear(self):
        return json.loads(self.process.stdout.readline())

    def say(self):
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def kill(self):
        self.process.kill()
        self.process.wait()

    def close(self):
        with suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


@contextmanager
def child(path, program, lease=15.0):
    other = Child(path, program, lease)
    try:
        yield other
    finally:
        other.close()


def ran(*command, check=True):
    """What came of a command that was run to its end."""
    return subprocess.run(command, capture_output=True, text=True, timeout=15, check=check)  # noqa: S603


def query(path, sql):
    """What the sqlite3 tool would show, asked in another process: two copies of SQLite in one would break its locks."""
    code = "import sqlite3, sys, json; print(json.dumps(sqlite3.connect(sys.argv[1]).execute(sys.argv[2]).fetchall()))"
    return json.loads(ran(sys.executable, "-c", code, path, sql).stdout)


def change(path, sql):
    code = "import sqlite3, sys; c = sqlite3.connect(sys.argv[1]); c.execute(sys.argv[2]); c.commit(); c.close()"
    ran(sys.executable, "-c", code, path, sql)


# Rows on the disk


async def test_rows_survive_a_reopen(path):
    """What was written is there when the file is opened again."""
    # CK-016
    rows = [entry(0, snapshot=b"{}"), entry(1, attempt=2), finished(2)]
    async with SqliteCheckpointStore(path) as store:
        await write(store, "order-1", rows)

    async with SqliteCheckpointStore(str(path)) as store:
        assert await store.load_run("order-1") == rows


async def test_many_at_once(path):
    """Sixteen runs of twelve rows and 32 appends to one more, all at the same time, all land where they belong."""
    # CK-015, CK-017, CK-023
    logs = {f"order-{number}": [entry(at, visit=number + 1) for at in range(12)] for number in range(16)}
    one = [entry(at) for at in range(32)]
    async with SqliteCheckpointStore(path) as store:
        fence = await store.start_run("one", workflow="order", version=1)
        await asyncio.gather(
            *(write(store, id_, rows) for id_, rows in logs.items()),
            *(store.append("one", row, fence=fence) for row in one),
        )

        assert {id_: await store.load_run(id_) for id_ in logs} == logs
        assert await store.load_run("one") == one
        await asyncio.gather(*(store.clear(run.id) for run in await store.list_runs() if run.owner is None))
        assert await store.load_run("one") == one


async def test_duplicate_and_gap(path):
    """A row that is there stays as it is, one that would leave a gap is refused, and the right one is taken."""
    # CK-012, CK-014
    async with SqliteCheckpointStore(path) as store:
        fence = await write(store, "order-1", [entry(0)])
        for wrong in (entry(0, attempt=2), entry(2)):
            with pytest.raises(RunConflictError):
                await store.append("order-1", wrong, fence=fence)
        await store.append("order-1", entry(1), fence=fence)

        assert await store.load_run("order-1") == [entry(0), entry(1)]


async def test_ids_are_apart(path):
    """Two ids never collide; clearing one leaves the other; an unknown id has no rows and may be cleared."""
    # CK-013
    async with SqliteCheckpointStore(path) as store:
        fence = await write(store, "order-1", [entry(0)])
        await write(store, "order-2", [entry(0, attempt=2)])
        await store.clear("order-1", fence=fence)
        await store.clear("order-3")

        assert await store.load_run("order-1") == await store.load_run("order-3") == []
        assert await store.load_run("order-2") == [entry(0, attempt=2)]


async def test_blobs_up_to_the_limit(path):
    """A blob of 5 MiB comes back where the limits allow it, and is refused where they do not; nothing is cut."""
    # CK-018
    row = CheckpointRow(0, RowKind.StepCursor, "LOAD", output_blob=os.urandom(5 << 20))
    async with SqliteCheckpointStore(path, max_blob=5 << 20) as store:
        await write(store, "order-1", [row])
        assert await store.load_run("order-1") == [row]

    async with SqliteCheckpointStore(path) as store:
        fence = await store.start_run("order-2", workflow="order", version=1)
        with pytest.raises(RunTooLargeError, match="output_blob must be at most 2097152 bytes long, got 5242880"):
            await store.append("order-2", row, fence=fence)
        assert await store.load_run("order-2") == []


async def test_runs_up_to_the_limits(path):
    """A run that has written all it may is told so, and keeps what it has."""
    async with SqliteCheckpointStore(path, max_rows=2, max_bytes=1_000) as store:
        fence = await write(store, "order-1", [entry(0), entry(1)])
        with pytest.raises(RunTooLargeError, match='run "order-1" has as many rows as it may, 2'):
            await store.append("order-1", entry(2), fence=fence)
        fence = await write(store, "order-2", [entry(0)])
        with pytest.raises(RunTooLargeError, match='run "order-2" has as many bytes as it may, 1000'):
            await store.append("order-2", entry(1, snapshot=bytes(1_000)), fence=fence)


async def test_long_log_is_read_quickly(path):
    """A log of ten thousand rows is loaded while the loop goes on, whole."""
    rows = [entry(at) for at in range(10_000)]
    async with SqliteCheckpointStore(path) as store:
        fence = await store.start_run("order-1", workflow="order", version=1)
        await asyncio.gather(*(store.append("order-1", row, fence=fence) for row in rows))

        assert await store.load_run("order-1") == rows


async def test_damaged_row(path):
    """Bytes in the file that no row was written as are an error that names run and sequence; other runs are read."""
    # CK-019
    async with SqliteCheckpointStore(path) as store:
        await write(store, "order-1", [entry(0), entry(1)])
        await write(store, "order-2", [entry(0)])
    change(path, "UPDATE rows SET row = zeroblob(length(row)) WHERE run = 1 AND sequence = 1")

    async with SqliteCheckpointStore(path) as store:
        with pytest.raises(CorruptRowError, match='row 1 of run "order-1" is damaged at byte 0') as caught:
            await store.load_run("order-1")
        assert (caught.value.workflow_id, caught.value.sequence) == ("order-1", 1)
        assert await store.load_run("order-2") == [entry(0)]


async def test_missing_row(path):
    """A row that is gone from the file is missed."""
    async with SqliteCheckpointStore(path) as store:
        await write(store, "order-1", [entry(0), entry(1), entry(2)])
    change(path, "DELETE FROM rows WHERE sequence = 1")

    async with SqliteCheckpointStore(path) as store:
        with pytest.raises(CorruptRowError, match='row 1 of run "order-1" is missing'):
            await store.load_run("order-1")


async def test_file_can_be_looked_into(path):
    """The tables of the file can be read by people, with any SQLite, while the store is open."""
    # CK-022: the sequence has a column of its own, for people
    async with SqliteCheckpointStore(path) as store:
        await write(store, "order-1", [entry(0, task_id="charge"), finished(1)])

        found = query(path, "SELECT workflow_id, sequence, kind, state, task FROM log")
        status = query(path, "SELECT workflow_id, status, workflow, state FROM runs")

    assert found == [["order-1", 0, "state entry", "CHARGE", "charge"], ["order-1", 1, "finished", "DONE", ""]]
    assert status == [["order-1", "finished", "order", "DONE"]]


# The file


@posix
async def test_file_is_its_users_own(path):
    """The file, and what SQLite puts beside it, is made with mode 0600."""
    async with SqliteCheckpointStore(path) as store:
        await write(store, "order-1", [entry(0)])
        modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()}

    assert modes == {"runs.db": 0o600, "runs.db-wal": 0o600, "runs.db-shm": 0o600}


def no_directory(path):
    return path / "runs.db"


def symlink(path):
    path.touch()
    (path.parent / "link.db").symlink_to(path)
    return path.parent / "link.db"


def directory(path):
    path.mkdir()
    return path


def insecure_directory(path):
    (path.parent / "open").mkdir()
    (path.parent / "open").chmod(0o777)
    return path.parent / "open" / "runs.db"


def insecure_file(path):
    path.touch()
    path.chmod(0o666)
    return path


def other_program(path):
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE t (a)")
    connection.close()
    path.chmod(0o600)
    return path


def no_database(path):
    path.write_bytes(b"something else entirely" * 100)
    path.chmod(0o600)
    return path


def later_version(path):
    SqliteCheckpointStore(path).close()
    change(path, "PRAGMA user_version = 2")
    return path


@posix
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (no_directory, "no-directory"),
        (symlink, "symlink"),
        (directory, "not-a-file"),
        (insecure_directory, "insecure-directory"),
        (insecure_file, "insecure-file"),
        (other_program, "not-a-store"),
        (no_database, "damaged"),
        (later_version, "version"),
    ],
)
def test_file_that_is_refused(make, reason, path):
    """A file that is none of ours, or that somebody else could change, is not opened; the error says why in a word."""
    file = make(path)

    with pytest.raises(StoreOpenError) as caught:
        SqliteCheckpointStore(file)

    assert caught.value.reason == reason
    assert str(caught.value).startswith(f'cannot open the store "{file}": ')


@root
def test_file_of_another_user(path):
    """A file of another user is not opened, unless that is asked for."""
    path.touch(mode=0o600)
    os.chown(path, 12345, -1)

    with pytest.raises(StoreOpenError, match=r"belongs to user 12345, and this process is user 0") as caught:
        SqliteCheckpointStore(path)

    assert caught.value.reason == "other-owner"
    SqliteCheckpointStore(path, allow_insecure_path=True).close()


@posix
def test_insecure_path_that_is_allowed(path):
    """Who asks for it gets a file that others may write to; a symbolic link never."""
    SqliteCheckpointStore(insecure_directory(path), allow_insecure_path=True).close()

    with pytest.raises(StoreOpenError, match="is a symbolic link"):
        SqliteCheckpointStore(symlink(path), allow_insecure_path=True)


def test_memory_is_no_file():
    """SQLite's name for a database in memory is refused, with the name of what is meant."""
    with pytest.raises(ConfigurationError, match="InMemoryCheckpointStore keeps runs in memory"):
        SqliteCheckpointStore(":memory:")


@pytest.mark.parametrize("seconds", [0, 0.09, 86_401, -1, float("nan"), True, "15"])
def test_lease_out_of_range(path, seconds):
    """A lease lasts from a tenth of a second to a day."""
    with pytest.raises(ConfigurationError, match=r"^lease must be "):
        SqliteCheckpointStore(path, lease=seconds)
    assert not path.exists()


@pytest.fixture
def small_disk(tmp_path):
    """A folder with room for a megabyte."""
    mounted = ran("mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path, check=False)
    if mounted.returncode:
        pytest.skip(f"no small disk can be mounted here: {mounted.stderr.strip()}")
    yield tmp_path
    ran("umount", "--lazy", tmp_path)


@root
async def test_disk_full(small_disk):
    """On a full disk an append fails by that name, nothing of it is written, and the store goes on when there is room."""
    async with SqliteCheckpointStore(small_disk / "runs.db") as store:
        fence = await write(store, "order-1", [entry(0)])
        ballast = small_disk / "ballast"
        with suppress(OSError), ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))

        with pytest.raises(StoreFailedError, match="the disk of the store is full") as caught:
            await store.append("order-1", entry(1, snapshot=bytes(100_000)), fence=fence)
        assert caught.value.reason == "disk-full"
        assert await store.load_run("order-1") == [entry(0)]

        ballast.unlink()
        await store.append("order-1", entry(1), fence=fence)
        assert await store.load_run("order-1") == [entry(0), entry(1)]


# Owners in several processes


async def test_killed_process_loses_its_claims_at_once(path):
    """Who opens the file after a process was killed, and has it alone, may claim its runs at once, however long the lease."""
    # CK-021: several processes may have the file open; runs have one owner
    program = """
        say(*asyncio.run(begin("order-1", "order-2")))
        sys.stdin.readline()
    """
    with child(path, program, lease=3600) as other:
        other.hear()
        async with SqliteCheckpointStore(path) as store:
            with pytest.raises(RunClaimedError) as caught:
                await store.claim("order-1")
            assert caught.value.owner.startswith(f"{other.process.pid}-")
            assert caught.value.until > (time.time() + 3000) * 1000
        other.kill()

        async with SqliteCheckpointStore(path) as store:
            for id_ in ("order-1", "order-2"):
                fence = await store.claim(id_)
                await store.append(id_, entry(1), fence=fence)
                assert await store.load_run(id_) == [entry(0), entry(1)]


@pytest.mark.realtime
async def test_killed_process_among_the_living(path):
    """If somebody else has the file open, the claims of a killed process last until its lease runs out, and no longer."""
    async with SqliteCheckpointStore(path) as store:
        with child(path, 'say(*asyncio.run(begin("order-1"))); sys.stdin.readline()', lease=1) as other:
            other.hear()
            other.kill()
        killed = time.monotonic()
        with pytest.raises(RunClaimedError):
            await store.claim("order-1")
        while True:
            try:
                await store.claim("order-1")
            except RunClaimedError:
                await asyncio.sleep(0.02)
            else:
                break

        assert 0.3 < time.monotonic() - killed < 2.5


@pytest.mark.realtime
async def test_lease_is_kept_alive(path):
    """An owner that lives keeps its runs, however short the lease and however long nothing is written."""
    async with SqliteCheckpointStore(path, lease=0.3) as store, SqliteCheckpointStore(path) as other:
        fence = await write(store, "order-1", [entry(0)])
        end = time.monotonic() + 1.5
        while time.monotonic() < end:
            with pytest.raises(RunClaimedError):
                await other.claim("order-1")
            await asyncio.sleep(0.05)
        await store.append("order-1", entry(1), fence=fence)


@posix
@pytest.mark.realtime
async def test_owner_that_comes_back_too_late(path):
    """An owner that was stopped for longer than its lease finds its run claimed, and can change nothing."""
    program = """
        async def main():
            [fence] = await begin("order-1")
            say(fence)
            sys.stdin.readline()
            for call in (store.append("order-1", entry(1), fence=fence), store.clear("order-1", fence=fence),
                         store.release("order-1", fence)):
                try:
                    await call
                except RunClaimedError as error:
                    say(error.owner)
        asyncio.run(main())
    """
    async with SqliteCheckpointStore(path) as store:
        with child(path, program, lease=0.5) as other:
            other.hear()
            other.process.send_signal(signal.SIGSTOP)
            await asyncio.sleep(1)
            fence = await store.claim("order-1")
            other.process.send_signal(signal.SIGCONT)
            other.say()
            owners = [other.hear() for _ in range(3)]

        await store.append("order-1", entry(1, attempt=2), fence=fence)
        assert owners == [[store.owner]] * 3
        assert await store.load_run("order-1") == [entry(0), entry(1, attempt=2)]


@pytest.mark.parametrize("processes", [2, 4, 8])
def test_race_of_processes(path, processes):
    """Of several processes that start one id at once, each time one wins, and its row is the one that is there."""
    # RS-030, RS-031
    program = """
        say("ready")
        sys.stdin.readline()
        async def main():
            won = []
            for number in range(20):
                try:
                    fence = await store.start_run(f"order-{number}", workflow="order", version=1)
                except RunClaimedError:
                    continue
                row = CheckpointRow(0, RowKind.StateEntry, str(os.getpid()))
                await store.append(f"order-{number}", row, fence=fence)
                won.append(number)
            say(*won)
            sys.stdin.readline()
        asyncio.run(main())
    """
    racers = [Child(path, program) for _ in range(processes)]
    try:
        for racer in racers:
            racer.hear()
        for racer in racers:
            racer.say()
        won = {racer.process.pid: racer.hear() for racer in racers}
    finally:
        for racer in racers:
            racer.close()

    async def states():
        async with SqliteCheckpointStore(path) as store:
            return {number: [row.state for row in await store.load_run(f"order-{number}")] for number in range(20)}

    assert sorted(number for numbers in won.values() for number in numbers) == list(range(20))
    assert testing.run(states()) == {number: [str(pid)] for pid, numbers in won.items() for number in numbers}


@pytest.mark.parametrize("round_", range(5))
def test_what_was_answered_outlives_a_kill(path, round_):
    """Every row whose append was answered is there after the process was killed in the middle of writing."""
    program = """
        async def run(number):
            id_, sequence = f"order-{number}", 0
            fence = await store.start_run(id_, workflow="order", version=1)
            while True:
                await store.append(id_, entry(sequence), fence=fence)
                say(number, sequence)
                sequence += 1

        async def main():
            await asyncio.gather(*map(run, range(20)))
        asyncio.run(main())
    """
    answered = {}
    with child(path, program) as other:
        for _ in range(200 + 37 * round_):
            number, sequence = other.hear()
            answered[number] = sequence
        other.process.kill()
        for line in other.process.stdout:  # what it had said before it was killed
            with suppress(json.JSONDecodeError):
                number, sequence = json.loads(line)
                answered[number] = sequence

    async def kept():
        async with SqliteCheckpointStore(path) as store:
            return {number: len(await store.load_run(f"order-{number}")) for number in answered}

    assert [number for number, rows in testing.run(kept()).items() if rows <= answered[number]] == []


# The loop


@contextmanager
def locked(path, seconds):
    """Another process keeps everybody else from writing for so long."""
    code = """
import sqlite3, sys, time
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN IMMEDIATE")
print("locked", flush=True)
time.sleep(float(sys.argv[2]))
connection.execute("COMMIT")
"""
    arguments = [sys.executable, "-c", code, str(path), str(seconds)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:  # noqa: S603
        process.stdout.readline()
        yield


def preempted():
    """How often the system has taken the processor from this thread, which is no wait of the loop's."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_nivcsw


@pytest.mark.realtime
@pytest.mark.skipif(not hasattr(resource, "RUSAGE_THREAD"), reason="a wait cannot be told from a busy machine here")
async def test_slow_disk_never_stalls_the_loop(path):
    """While the store waits for the disk, of a thousand turns of the loop one may take five milliseconds, and none fifty."""
    waits = []

    @contextmanager
    def timed():
        count = preempted()
        began = time.monotonic()
        yield
        took = time.monotonic() - began
        if preempted() == count:
            waits.append(took)

    async with SqliteCheckpointStore(path) as store:
        fence = await write(store, "order-1", [entry(0)])
        with locked(path, 1):
            with timed():
                append = store.append("order-1", entry(1), fence=fence)
            with timed():
                reads = [store.load_run("order-1"), store.list_runs()]
            await asyncio.wait(reads)
            end = time.monotonic() + 0.3
            while time.monotonic() < end:
                with timed():
                    await asyncio.sleep(0)
            assert not append.done()
        await append

    waits.sort()
    assert waits[len(waits) * 999 // 1000] < 0.005
    assert waits[-1] < 0.05


@pytest.mark.realtime
async def test_one_call_for_many_answers(path, monkeypatch):
    """What was written in one commit reaches the loop in one call, however many waited for it."""
    loop, calls = asyncio.get_running_loop(), []
    call = loop.call_soon_threadsafe

    def counted(*args, **options):
        calls.append(args)
        return call(*args, **options)

    async with SqliteCheckpointStore(path) as store:
        fence = await store.start_run("order-1", workflow="order", version=1)
        with locked(path, 0.5), monkeypatch.context() as patch:
            patch.setattr(loop, "call_soon_threadsafe", counted)
            await asyncio.gather(*(store.append("order-1", entry(at), fence=fence) for at in range(1_000)))

        assert 1 <= len(calls) <= 3
        assert len(await store.load_run("order-1")) == 1_000


@pytest.mark.virtual
async def test_virtual_clock_waits_for_the_disk(path):
    """On a virtual clock no timeout fires because the disk takes its real time."""
    loop = asyncio.get_running_loop()
    async with SqliteCheckpointStore(path) as store:
        fence = await store.start_run("order-1", workflow="order", version=1)
        for at in range(20):
            async with asyncio.timeout(60):
                await store.append("order-1", entry(at), fence=fence)
        with pytest.raises(RunConflictError):
            await store.append("order-1", entry(5), fence=fence)

    assert loop.time() < 60
    assert loop.holds == 0


async def test_cancelled_calls(path):
    """Who is cancelled while it waits is left alone; the row is written all the same."""
    async with SqliteCheckpointStore(path) as store:
        fence = await store.start_run("order-1", workflow="order", version=1)
        appends = [store.append("order-1", entry(at), fence=fence) for at in range(20)]
        reads = [store.load_run("order-1") for _ in range(5)]
        for call in (*appends[::2], *reads):
            call.cancel()
        await asyncio.wait([*appends, *reads])

        assert [append.cancelled() for append in appends] == [True, False] * 10
        assert len(await store.load_run("order-1")) == 20


async def test_claim_that_nobody_heard_of(path):
    """A claim whose caller was cancelled meanwhile is given back: the run can be started, or claimed, by others."""
    async with SqliteCheckpointStore(path) as store, SqliteCheckpointStore(path) as other:
        store.start_run("order-1", workflow="order", version=1).cancel()
        fence = await write(store, "order-2", [entry(0)])
        await store.release("order-2", fence)
        store.claim("order-2").cancel()
        # what is given back is written after the answer has come
        await store.load_run("order-1")
        await store.clear("order-3")
        await store.clear("order-3")

        await other.start_run("order-1", workflow="order", version=1)
        await other.claim("order-2")


def test_loop_that_is_closed(path):
    """What is done for a loop that was closed meanwhile goes nowhere, and the store works in the next loop."""
    store = SqliteCheckpointStore(path)

    async def begin():
        return await store.start_run("order-1", workflow="order", version=1)

    async def leave(fence):
        for at in range(100):
            store.append("order-1", entry(at), fence=fence)
        store.start_run("order-2", workflow="order", version=1)
        store.load_run("order-1")

    async def look():
        await store.start_run("order-2", workflow="order", version=1)
        return len(await store.load_run("order-1"))

    fence = asyncio.run(begin())
    with locked(path, 0.3):
        asyncio.run(leave(fence))
    deadline = time.monotonic() + 10
    while True:
        try:
            rows = asyncio.run(look())
        except RunClaimedError:  # until what it claimed is given back
            assert time.monotonic() < deadline
        else:
            break
    store.close()

    assert rows == 100


def test_several_loops_and_threads(path):
    """One store serves the loops of several threads at once."""
    store, counts = SqliteCheckpointStore(path), []

    async def work(number):
        await write(store, f"order-{number}", [entry(at) for at in range(50)])
        counts.append(len(await store.load_run(f"order-{number}")))

    threads = [threading.Thread(target=asyncio.run, args=(work(number),)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    store.close()

    assert counts == [50] * 6


def test_needs_a_running_loop(path):
    """Outside of a loop nothing can be awaited, and nothing is asked for."""
    store = SqliteCheckpointStore(path)
    with pytest.raises(RuntimeError, match="no running event loop"):
        store.start_run("order-1", workflow="order", version=1)
    with pytest.raises(RuntimeError, match="no running event loop"):
        store.load_run("order-1")
    store.close()

    assert query(path, "SELECT * FROM runs") == []


# Ends


async def test_closed_store(path):
    """A store that was closed says so, however often it is closed; what was submitted before is written."""
    store = SqliteCheckpointStore(path)
    fence = await store.start_run("order-1", workflow="order", version=1)
    appends = [store.append("order-1", entry(at), fence=fence) for at in range(100)]
    await asyncio.gather(store.aclose(), store.aclose(), *appends)
    store.close()

    calls = [
        lambda: store.start_run("order-2", workflow="order", version=1),
        lambda: store.claim("order-1"),
        lambda: store.append("order-1", entry(100), fence=fence),
        lambda: store.load_run("order-1"),
        lambda: store.clear("order-1"),
        lambda: store.release("order-1", fence),
        store.list_runs,
    ]
    for call in calls:
        with pytest.raises(StoreFailedError, match="the store is closed") as caught:
            await call()
        assert caught.value.reason == "closed"

    async with SqliteCheckpointStore(path) as store:
        assert len(await store.load_run("order-1")) == 100
        await store.claim("order-1")


async def test_store_that_goes_away(path):
    """A store that nobody keeps is closed when its object goes, also with writes under way: they are written."""
    store = SqliteCheckpointStore(path)
    fence = await store.start_run("order-1", workflow="order", version=1)
    appends = [store.append("order-1", entry(at), fence=fence) for at in range(200)]
    gone = weakref.ref(store)
    del store
    gc.collect()
    assert gone() is None
    await asyncio.gather(*appends)

    async with SqliteCheckpointStore(path) as store:
        assert len(await store.load_run("order-1")) == 200
        await store.claim("order-1")


@pytest.mark.parametrize(
    "end",
    [
        pytest.param("", id="falls off the end"),
        pytest.param("raise SystemExit(0)", id="exits"),
        pytest.param("del store", id="drops it"),
        pytest.param("keep = [store]; keep.append(keep)", id="keeps it in a cycle"),
        pytest.param(
            "async def close(): await store.aclose()\nasyncio.run(close())", id="closes it and leaves at once"
        ),
        pytest.param("import sys; sys.modules['kept'] = store", id="keeps it in a module"),
    ],
)
def test_interpreter_that_ends(path, end):
    """A program may end without closing the store: what it has submitted is written, its claims are given up."""
    program = """
        async def main():
            [fence] = await begin("order-1")
            for at in range(1, 100):
                store.append("order-1", entry(at), fence=fence)
            for _ in range(20):
                store.load_run("order-1")
        asyncio.run(main())
    """
    code = PRELUDE + textwrap.dedent(program) + end
    ended = ran(sys.executable, "-c", code, path, "15", check=False)

    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
    assert query(path, "SELECT owner, next_sequence FROM runs") == [[None, 100]]


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="nothing here tells of threads and files")
async def test_nothing_is_left(path):
    """A store that was closed, or dropped, leaves no thread and no open file behind."""

    def left():
        files = [file.readlink().name for file in Path("/proc/self/fd").iterdir() if file.exists()]
        threads = [(task / "comm").read_text() for task in Path("/proc/self/task").iterdir()]
        return [name for name in files + threads if name.startswith(("runs.db", "cano-"))]

    for number in range(10):
        async with SqliteCheckpointStore(path) as store:
            await write(store, f"order-{number}", [entry(0)])
            await store.load_run(f"order-{number}")
        store = SqliteCheckpointStore(path)
        store.load_run("order-0")
        del store

    assert left() == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no forks here")
def test_forked_child(path):
    """A child that was forked while the store was open is refused, by the store and by the file, and harms neither."""
    program = """
        async def refused(call):
            try:
                await call()
            except StoreFailedError as error:
                return error.reason

        async def main():
            [fence] = await begin("order-1")
            pid = os.fork()
            if pid == 0:
                async def child():
                    reasons = [await refused(lambda: store.append("order-1", entry(1), fence=fence))]
                    reasons += [await refused(lambda: store.load_run("order-1"))]
                    try:
                        SqliteCheckpointStore(sys.argv[1])
                    except StoreOpenError as error:
                        reasons.append(error.reason)
                    store.close()
                    return reasons
                asyncio._set_running_loop(None)
                say(*asyncio.new_event_loop().run_until_complete(child()))
                sys.stdout.flush()
                globals().pop("store")
                os._exit(0)
            os.waitpid(pid, 0)
            await store.append("order-1", entry(1), fence=fence)
            say(len(await store.load_run("order-1")))
            await store.aclose()
        asyncio.run(main())
    """
    with child(path, program) as other:
        assert other.hear() == ["forked", "forked", "forked"]
        assert other.hear() == [2]
        assert other.process.wait() == 0


# Lists


async def test_list_runs(path):
    """Runs are listed by how far they are and how long nothing has happened, the longest untouched first."""
    long_ago = int(time.time() * 1000) - 3_600_000
    async with SqliteCheckpointStore(path) as store:
        await write(store, "young", [entry(0, recorded_at=long_ago + 3_600_000)])
        await write(store, "old", [entry(0, recorded_at=long_ago)])
        await write(store, "done", [entry(0), CheckpointRow(1, RowKind.Finished, "DONE", recorded_at=long_ago + 1)])
        fence = await write(store, "failed", [entry(0)])
        await store.release("failed", fence, stopped=True)

        async def ids(**filters):
            return [run.id for run in await store.list_runs(**filters)]

        assert await ids() == ["old", "done", "young", "failed"]
        assert await ids(status=RunStatus.Running) == ["old", "young"]
        assert await ids(status={RunStatus.Finished, RunStatus.Stopped}) == ["done", "failed"]
        assert await ids(older_than=1800) == ["old", "done"]
        assert await ids(status=RunStatus.Running, older_than=1800, limit=1) == ["old"]
        [run] = await store.list_runs(status=[RunStatus.Finished])
        assert (run.workflow, run.state, run.owner, run.rows) == ("order", "DONE", None, 2)
        [run] = await store.list_runs(status=RunStatus.Stopped)
        assert (run.version, run.created_at <= run.updated_at, run.bytes) == (0, True, len(entry(0).encode("failed")))


def test_repr_and_path(path):
    """A store shows its file; its owner is the process and a number of its own."""
    store, other = SqliteCheckpointStore(path), SqliteCheckpointStore(Path(path))

    assert repr(store) == f'<SqliteCheckpointStore "{path}">'
    assert store.path == str(path)
    assert store.owner.startswith(f"{os.getpid()}-")
    assert store.owner != other.owner
    store.close()
    other.close()
