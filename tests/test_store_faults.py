"""A store that fails in any one of its calls, in any way: what comes of the run is right, or a named error and a run to resume.

The n-th call fails, for every n, on the virtual clock. Then somebody goes on with the run, with a store that works, and the
ledger has to be that of a run that was interrupted once. ``CANO_DEEP=1`` has two calls fail, for all pairs.
"""

import asyncio
import itertools
import logging
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from cano import (
    CheckpointError,
    CheckpointRow,
    CorruptRowError,
    InMemoryCheckpointStore,
    RunClaimedError,
    RunStatus,
    SqliteCheckpointStore,
    StoreFailedError,
    testing,
)
from tests.recovery_shapes import SHAPES, Boom, World, broken, cut_short

pytestmark = pytest.mark.model

ROOT = Path(__file__).parent.parent
FOLDER = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # noqa: S108 - with folders of the test's own in it
CALLS = ("start_run", "claim", "append", "load_run", "clear", "release")


def away():
    return OSError("the store is away")


def full():
    return StoreFailedError("the disk is full", reason="disk-full")


def unreadable():
    return CorruptRowError("row 0 is damaged")


@dataclass(frozen=True)
class Fault:
    """What one call of a store does instead of what it should."""

    error: Any = None
    takes_effect: bool = False
    answers: bool = False
    """Whether it says that all is well, though nothing was done."""
    delay: float = 0
    calls: tuple[str, ...] = CALLS


FAULTS = {
    "error before": Fault(away),
    "error after": Fault(away, takes_effect=True),
    "disk full": Fault(full, calls=("start_run", "claim", "append", "clear", "release")),
    "slow": Fault(takes_effect=True, delay=5),
    "lost clear": Fault(answers=True, calls=("clear",)),
    "lost release": Fault(answers=True, calls=("release",)),
    "corrupt read": Fault(unreadable, calls=("load_run",)),
    "rows missing": Fault(calls=("load_run",)),
}


@dataclass
class Faulty:
    """A store with faults at the calls of these numbers, counted from 1."""

    store: Any
    faults: dict[int, Fault] = field(default_factory=dict)
    count: int = 0
    hit: list[str] = field(default_factory=list)

    def __getattr__(self, name):
        method = getattr(self.store, name)
        if name not in CALLS:
            return method

        async def call(*args, **options):
            self.count += 1
            fault = self.faults.get(self.count)
            if fault is None or name not in fault.calls:
                return await method(*args, **options)
            self.hit.append(name)
            await asyncio.sleep(fault.delay)
            answer = await method(*args, **options) if fault.takes_effect else None
            if fault.error is not None:
                raise fault.error()
            if name == "load_run" and not fault.takes_effect:
                return (await method(*args, **options))[1:]
            return answer

        return call


@dataclass
class Play:
    """One run of a shape, from its start to its end over as many resumes as it takes."""

    name: str
    store: Any = field(default_factory=InMemoryCheckpointStore)
    ledger: list[tuple[str, str]] = field(default_factory=list)
    told: list[Any] = field(default_factory=list)
    begins: list[int] = field(default_factory=list)
    """Where in the ledger each attempt begins."""
    hit: list[str] = field(default_factory=list)
    """The calls that had a fault."""

    async def attempt(self, faults, *, begins):
        """Begin it, or go on with it, with faults at these calls; gives the store that had them."""
        shape, faulty = SHAPES[self.name], Faulty(self.store, faults)
        world = World(lambda _, effect, key: self.ledger.append((effect, key)))
        workflow = shape.workflow(world, self.name, faulty)
        self.begins.append(len(self.ledger))
        try:
            if begins:
                self.told.append(await workflow.orchestrate("start", workflow_id="1", data=shape.data()))
            else:
                self.told.append(await workflow.resume_from("1"))
        except Exception as error:
            self.told.append(error)
        self.hit += faulty.hit
        return faulty

    async def status(self):
        return next((run.status for run in await self.store.list_runs()), None)

    async def finish(self):
        """Go on as long as there is something to go on with, and begin it if it never was."""
        for _ in range(4):
            if await self.status() in (None, RunStatus.RolledBack, RunStatus.NeedsAttention):
                break
            await self.attempt({}, begins=False)
            if isinstance(self.told[-1], RunClaimedError):
                self.store = await restarted(self.store)
            if self.name == "failing" and isinstance(self.told[-1], Boom):
                break
        if not self.ledger:
            await self.attempt({}, begins=True)

    def wrong(self, interruptions):
        """What is not as it should be, if each attempt was interrupted at most once."""
        shape = SHAPES[self.name]
        if shape.compensatable and (self.is_undone or (shape.outcome not in self.told and not shape.undone)):
            shape = cut_short(shape, self.ledger)
        faults = broken(
            shape, self.without_repeats(), interruptions + (len(self.told) if self.name == "failing" else 0)
        )
        named = {shape.outcome, "OSError", "StoreFailedError", "CorruptRowError", "RunNotFoundError"}
        if not {"start_run", "claim", "release"}.isdisjoint(self.hit):  # somebody has the claim, and nobody knows
            named.add("RunClaimedError")
        if shape.undone:
            named |= {"TaskExecutionError", "CompensationFailedError", "RunConflictError"}
        for told in self.told:
            if (name := type(told).__name__ if isinstance(told, Exception) else told) not in named:
                faults.append(f"ended as {name}: {told}")
        return faults

    def without_repeats(self):
        """The ledger, with each step that was undone there once: what could not be written down is undone again."""
        backward = [at for at, (effect, _) in enumerate(self.ledger) if effect.startswith("-")]
        if not backward:
            return self.ledger
        assert all(effect.startswith("-") for effect, _ in self.ledger[backward[0] :]), self.ledger
        for begin, end in itertools.pairwise([*self.begins, len(self.ledger)]):
            back = [effect for effect, _ in self.ledger[max(begin, backward[0]) : end]]
            order = cut_short(SHAPES[self.name], self.ledger).undone
            assert back == sorted(back, key=order.index), self.ledger
        return self.ledger[: backward[0]] + list(dict.fromkeys(self.ledger[backward[0] :]))

    @property
    def is_undone(self):
        return any(effect.startswith("-") for effect, _ in self.ledger)


def replaced(row, sequence):
    """A cursor of the same visit, with another number."""
    return CheckpointRow(
        sequence,
        row.kind,
        row.state,
        task_id=row.task_id,
        visit=row.visit,
        attempt=row.attempt,
        workflow_version=row.workflow_version,
        fingerprint=row.fingerprint,
        run_id=row.run_id,
        recorded_at=row.recorded_at,
        refers_to=row.refers_to if row.refers_to is not None and row.refers_to < sequence else None,
        output_blob=row.output_blob,
    )


async def restarted(store):
    """A store with the same rows and no claims, as after the end of a process whose claims nobody could give up."""
    new = InMemoryCheckpointStore()
    for run in await store.list_runs():
        fence = await new.start_run(run.id, workflow=run.workflow, version=run.version)
        sequence = 0
        for row in sorted(await store.load_run(run.id), key=lambda row: row.sequence):
            for missing in range(sequence, row.sequence):  # cursors whose place the row has taken
                await new.append(run.id, replaced(row, missing), fence=fence)
            await new.append(run.id, row, fence=fence)
            sequence = row.sequence + 1
        await new.release(run.id, fence, stopped=run.status is RunStatus.Stopped)
    return new


async def play(name, *attempts):
    """A run whose attempts have these faults, and then one without; None if a fault did not come to pass."""
    played = Play(name)
    for number, faults in enumerate(attempts):
        begins = number == 0
        if not begins and await played.status() in (None, RunStatus.RolledBack):
            return None
        if not begins:
            played.store = await restarted(played.store)
        faulty = await played.attempt(faults, begins=begins)
        if len(faulty.hit) < len(faults):
            return None
    await played.finish()
    return played


def calls_of(name, *attempts):
    """How many calls the last of these attempts makes."""

    async def count():
        played = Play(name)
        for number, faults in enumerate(attempts):
            if number:
                played.store = await restarted(played.store)
            faulty = await played.attempt(faults, begins=number == 0)
        return faulty.count

    return testing.run(count())


def stops_at(name):
    """The calls whose failure leaves a run that can be gone on with: one in the middle, and the last."""

    async def is_open(number):
        played = Play(name)
        await played.attempt({number: FAULTS["error before"]}, begins=True)
        return await played.status() in (RunStatus.Running, RunStatus.RollingBack, RunStatus.Stopped)

    found = [number for number in range(3, calls_of(name, {}) + 1) if testing.run(is_open(number))]
    return found[len(found) // 2], found[-1]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("stop", ["begun", "half way", "at the end"])
def test_nth_call_fails(name, fault, stop, caplog):
    """Whichever call of the store it is, of a run that begins or goes on, the run has a right end or can be gone on with, and
    nothing is done or undone twice that was acknowledged."""
    # R5, R8, CK-026, CK-027, B02, B28, SG-025
    caplog.set_level(logging.CRITICAL, "cano")
    before = [] if stop == "begun" else [{stops_at(name)[stop == "at the end"]: FAULTS["error before"]}]
    for number in range(1, calls_of(name, *before, {}) + 1):
        run = testing.run(play(name, *before, {number: FAULTS[fault]}))
        if run is None:
            continue
        wrong = run.wrong(1 + len(before))
        assert not wrong, (number, wrong, run.told, run.ledger)
        left = testing.run(run.status())
        expected = [None] if name != "failing" else [RunStatus.Stopped]
        if run.is_undone:
            expected += [RunStatus.RolledBack, RunStatus.NeedsAttention]
        assert left in expected, (number, run.told, run.ledger)
        if fault == "slow" and not before and name != "failing":
            assert len(run.told) == 1, run.told


@pytest.mark.skipif("CANO_DEEP" not in os.environ, reason="minutes; CANO_DEEP=1 plays it")
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", ["chain", "split", "saga", "cursors"])
def test_two_calls_fail(name, caplog):
    """So it is if a call of the resume fails as well, for all pairs of calls and of faults."""
    # R5
    caplog.set_level(logging.CRITICAL, "cano")
    for first, fault in itertools.product(range(1, calls_of(name, {}) + 1), FAULTS.values()):
        for second, other in itertools.product(itertools.count(1), FAULTS.values()):
            run = testing.run(play(name, {first: fault}, {second: other}))
            if run is not None:
                wrong = run.wrong(2)
                assert not wrong, (first, fault, second, other, wrong, run.told, run.ledger)
            elif second > calls_of(name, {}):
                break


# --- real files ------------------------------------------------------------------------------------------------------


@pytest.mark.realtime
async def test_store_does_not_hold_up_the_loop(tmp_path, monkeypatch):
    """While 200 durable runs share the loop, no callback of it takes 5 ms, but for one in a thousand, and none 50 ms."""
    # C10
    took = []
    run = asyncio.Handle._run

    def timed(handle):
        began = time.perf_counter()
        run(handle)
        took.append(time.perf_counter() - began)

    monkeypatch.setattr(asyncio.Handle, "_run", timed)
    rounds = []
    async with SqliteCheckpointStore(tmp_path / "runs.db") as store:
        workflow = SHAPES["chain"].workflow(World(lambda *_: None), "chain", store)
        for _ in range(3):  # the best of three: the machine has other things to do
            took.clear()
            for number in range(5):
                runs = (workflow.orchestrate("start", workflow_id=f"{number}-{place}") for place in range(200))
                assert await asyncio.gather(*runs) == ["done"] * 200
            rounds.append(sorted(took))
    assert min(took[-1 - len(took) // 1000] for took in rounds) < 0.005
    assert min(took[-1] for took in rounds) < 0.05


def damaged(data, dice):
    """A file with one thing wrong: bits, an end that is missing, pages that are empty, swapped or torn."""
    data, page = bytearray(data), 4096
    pages = len(data) // page
    kind = dice.randrange(6)
    if kind == 0:
        for _ in range(dice.randint(1, 8)):
            data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
    elif kind == 1:
        del data[dice.randrange(len(data)) :]
    elif kind == 2:
        at = dice.randrange(pages) * page
        data[at : at + page] = bytes(page)
    elif kind == 3:
        one, other = (dice.randrange(pages) * page for _ in range(2))
        data[one : one + page], data[other : other + page] = data[other : other + page], data[one : one + page]
    elif kind == 4:
        at = dice.randrange(len(data) - 64)
        data[at : at + 64] = dice.randbytes(64)
    else:
        at = dice.randrange(pages) * page + 512 * dice.randrange(8)
        data[at:] = data[at + dice.randint(1, 512) :]
    return bytes(data)


# Leaves 20 runs that have failed in their second state, in a file that was closed, or with all of them in the log beside it.
LEAVES_RUNS = """
import asyncio, contextlib, os, signal, sys
from cano import SqliteCheckpointStore
from tests.recovery_shapes import SHAPES, Boom, World

async def main():
    async with SqliteCheckpointStore(sys.argv[1]) as store:
        workflow = SHAPES["failing"].workflow(World(lambda *_: None), "failing", store)
        for number in range(20):
            with contextlib.suppress(Boom):
                await workflow.orchestrate("start", workflow_id=str(number))
        if sys.argv[2] == "wal":
            os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


@pytest.mark.realtime
@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is POSIX's")
@pytest.mark.timeout(7200 if "CANO_DEEP" in os.environ else 120)
@pytest.mark.parametrize("beside", ["file", "wal"])
def test_run_of_a_damaged_file(beside, caplog):
    """A run whose file is damaged, or the log beside it, goes on where its rows say, or not at all, with an error that has a
    name; what is lost of the log beside the file is its end."""
    # R7, CK-026; rust/store/tests/damage.rs reads rows of such files
    caplog.set_level(logging.CRITICAL, "cano")
    dice, outcomes = random.Random(7), Counter()
    with tempfile.TemporaryDirectory(prefix="cano-damage-", dir=FOLDER) as folder:
        path = Path(folder) / "runs.db"
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
        subprocess.run([sys.executable, "-c", LEAVES_RUNS, path, beside], env=environment, check=beside == "file")  # noqa: S603
        files = {file.name: file.read_bytes() for file in Path(folder).iterdir() if not file.name.endswith("-shm")}
        name = "runs.db" if beside == "file" else "runs.db-wal"
        for _ in range(20_000 if "CANO_DEEP" in os.environ else 2_000):
            for file in Path(folder).iterdir():
                file.unlink()
            for file, data in (files | {name: damaged(files[name], dice)}).items():
                (Path(folder) / file).write_bytes(data)
            path.chmod(0o600)
            began = time.perf_counter()
            outcomes += asyncio.run(read_and_resume(path, str(dice.randrange(20)), loses_its_end=beside == "wal"))
            assert time.perf_counter() - began < 2
    assert outcomes["Boom"] > 100  # it could be gone on with
    assert outcomes.total() - outcomes["Boom"] > 50  # it could not


async def read_and_resume(path, workflow_id, *, loses_its_end):
    """How it ends to go on with this run."""
    ledger = []

    def note(_, effect, __):
        ledger.append(effect)

    try:
        async with SqliteCheckpointStore(path) as store:
            workflow = SHAPES["failing"].workflow(World(note), "failing", store)
            rows = await store.load_run(workflow_id)
            states = [(row.sequence, row.kind.name, row.state) for row in rows]
            whole = [(0, "StateEntry", "start"), (1, "StateEntry", "b")]
            assert states == whole or (loses_its_end and states == whole[: len(states)])
            try:
                await workflow.resume_from(workflow_id)
            except Boom as error:
                assert ledger == (["b"] if len(rows) > 1 else ["a", "b"])
                return Counter([type(error).__name__])
    except CheckpointError as error:
        ended = error
    assert not ledger or isinstance(ended, StoreFailedError)  # the disk fails in the middle of it
    return Counter([type(ended).__name__])
