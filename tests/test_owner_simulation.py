"""A thousand workers, one database: `PostgresCheckpointStore` on a database of our own making, on the virtual clock.

The workers use the store as it is; only its connections are ours. The database does each statement at one instant, by the
rules of the core (`_core.Standing`), and by its own clock. Seeded dice decide who is killed and comes back as somebody else,
and whose network is down: then requests are lost, or land long after the client has given them up, and answers are lost.

Whatever happens: a sequence is written once, the fences of a log never go back, what was acknowledged stays, and once the
faults are over every run ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
from dataclasses import dataclass, field

import pytest

from cano import CheckpointError, CheckpointRow, RowKind, RunClaimedError, RunConflictError, RunStatus, testing
from cano._core import Standing

_connections = pytest.importorskip("cano._postgres_connection")
_writer = pytest.importorskip("cano._postgres_writer")
PostgresCheckpointStore = pytest.importorskip("cano._postgres").PostgresCheckpointStore

pytestmark = pytest.mark.model

LEASE = 15.0
STEPS = 5
RUNS_EACH = 2
FAULTY = 90.0
"""Seconds in which there are faults."""


@dataclass
class Run:
    workflow_id: str
    status: str = "running"
    owner: str | None = None
    fence: int = 0
    ticket: bytes | None = None
    rows: list[bytes] = field(default_factory=list)
    fences: list[int] = field(default_factory=list)
    """Of each row, what it was written under."""


class Database:
    """What PostgreSQL does, a statement at a time."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.runs: dict[str, Run] = {}
        self.running: dict[str, Run] = {}  # the longest untouched first
        self.leases: dict[str, float] = {}
        self.fence = 0
        self.refused = 0

    def do(self, name, arguments):
        return getattr(self, f"_{name.lower()}")(*arguments)

    def standing(self, run):
        until = None if run.owner is None else int(self.leases.get(run.owner, 0) * 1000)
        sizes = sum(map(len, run.rows))
        return Standing(run.workflow_id, run.status, run.owner, until, run.fence, len(run.rows), len(run.rows), sizes)

    @property
    def _now(self):
        return int(self._loop.time() * 1000)

    def _draw(self):
        self.fence += 1
        return self.fence

    def _touch(self, run):
        self.running.pop(run.workflow_id, None)
        if run.status == "running":
            self.running[run.workflow_id] = run

    def _beat(self, owner, lease, _sync):
        self.leases[owner] = max(self.leases.get(owner, 0), self._loop.time() + lease.total_seconds())
        return []

    def _forget_owners(self):
        return []

    def _start(self, owner, ids, tickets, _workflows, _versions, _sync):
        started = []
        for workflow_id, ticket in zip(ids, tickets, strict=True):
            if workflow_id not in self.runs:
                run = self.runs[workflow_id] = Run(workflow_id, owner=owner, fence=self._draw(), ticket=ticket)
                self._touch(run)
                started.append({"workflow_id": workflow_id, "fence": run.fence})
        return started

    def _claim(self, owner, ids, tickets, _sync):
        claimed = []
        for workflow_id, ticket in zip(ids, tickets, strict=True):
            run = self.runs.get(workflow_id)
            with contextlib.suppress(CheckpointError):
                if run is not None:
                    run.status = self.standing(run).claim(self._now)
                    run.owner, run.fence, run.ticket = owner, self._draw(), ticket
                    self._touch(run)
                    claimed.append({"workflow_id": workflow_id, "fence": run.fence})
        return claimed

    def _append(self, ids, fences, sequences, *columns):
        added = []
        for place, (workflow_id, fence, sequence, data) in enumerate(
            zip(ids, fences, sequences, columns[12], strict=True), 1
        ):
            run = self.runs.get(workflow_id)
            try:
                if run is not None:
                    row = CheckpointRow.decode(workflow_id, sequence, data)
                    run.status = self.standing(run).append(fence, row, data, None)
                    run.rows.append(data)
                    run.fences.append(fence)
                    self._touch(run)
                    if run.status == "finished":
                        run.owner = None
                    added.append({"place": place})
            except CheckpointError:
                self.refused += 1
        return added

    def _release(self, ids, fences, _stopped, _sync):
        released = []
        for place, (workflow_id, fence) in enumerate(zip(ids, fences, strict=True), 1):
            run = self.runs.get(workflow_id)
            with contextlib.suppress(CheckpointError):
                if run is not None:
                    self.standing(run).release(fence)
                    run.owner = None
                    released.append({"place": place})
        return released

    def _clear(self, ids, fences, _sync):
        cleared = []
        for place, (workflow_id, fence) in enumerate(zip(ids, fences, strict=True), 1):
            run = self.runs.get(workflow_id)
            with contextlib.suppress(CheckpointError):
                if run is not None:
                    self.standing(run).clear(fence, self._now)
                    del self.runs[workflow_id], self.running[workflow_id]
                    cleared.append({"run": workflow_id, "place": place, "left_over": 0})
        return cleared

    def _standings(self, ids, sequences):
        found = []
        for place, (workflow_id, sequence) in enumerate(zip(ids, sequences, strict=True), 1):
            run = self.runs.get(workflow_id)
            if run is None:
                continue
            until = None if run.owner is None else int(self.leases.get(run.owner, 0) * 1000)
            there = run.rows[sequence] if sequence is not None and sequence < len(run.rows) else None
            columns = {
                "status": run.status,
                "owner": run.owner,
                "until": until,
                "fence": run.fence,
                "ticket": run.ticket,
            }
            usage = {"next_sequence": len(run.rows), "kept_rows": len(run.rows), "kept_bytes": 0}
            found.append(
                {"place": place, "workflow_id": workflow_id, "row": there, "now": self._now, **columns, **usage}
            )
        return found

    def _load(self, workflow_id):
        run = self.runs.get(workflow_id)
        if run is None:
            return []
        rows = list(enumerate(run.rows)) or [(None, None)]
        return [{"next_sequence": len(run.rows), "sequence": sequence, "row": row} for sequence, row in rows]

    def _list(self, statuses, _age, limit):
        assert statuses == ["running"]
        return [
            {
                "workflow_id": run.workflow_id, "workflow": "", "version": 0, "status": run.status, "state": "",
                "owner": run.owner, "created_at": 0, "updated_at": 0, "kept_rows": len(run.rows), "kept_bytes": 0,
            }
            for run in itertools.islice(self.running.values(), limit)
        ]  # fmt: skip

    def _leave_runs(self, owner):
        for run in self.runs.values():
            if run.owner == owner:
                run.owner = None
        return []

    def _leave(self, owner):
        self.leases.pop(owner, None)
        return []


@dataclass
class Link:
    """The network between a worker and the database."""

    database: Database
    dice: random.Random
    down_until: float = 0.0

    @property
    def is_down(self) -> bool:
        return asyncio.get_running_loop().time() < self.down_until


class Connection:
    """A connection of the simulated database, with the face of `_postgres_connection.Connection`."""

    links: dict[str, Link] = {}  # noqa: RUF012 - of the simulation that runs

    sync = "on"

    def __init__(self, link: Link) -> None:
        self._link = link
        self._is_closed = False

    @classmethod
    async def open(cls, dsn, _schema, *, limit, **_settings):
        link = cls.links[dsn]
        await asyncio.sleep(link.dice.uniform(0.001, 0.01))
        if link.is_down:
            await asyncio.sleep(link.dice.choice((0.0, limit)))
            raise ConnectionRefusedError
        return cls(link)

    async def fetch(self, name, *arguments, limit=None):
        link, loop = self._link, asyncio.get_running_loop()
        arguments = [list(part) if isinstance(part, tuple) else part for part in arguments]
        trip = link.dice.uniform(0.0002, 0.003)
        await asyncio.sleep(trip)
        if self._is_closed:
            raise ConnectionResetError
        if link.is_down:
            if link.dice.random() < 0.5:  # it lands when nobody waits for it any more
                loop.call_at(link.down_until + link.dice.uniform(0, 5), link.database.do, name, arguments)
            await asyncio.sleep(link.dice.choice((0.01, limit)))
            raise TimeoutError
        found = link.database.do(name, arguments)
        if link.dice.random() < 0.003:
            raise ConnectionResetError
        await asyncio.sleep(trip)
        if link.is_down:
            await asyncio.sleep(link.dice.choice((0.01, limit)))
            raise TimeoutError
        return found

    async def close(self):
        self._is_closed = True

    def terminate(self):
        self._is_closed = True


class Simulation:
    """Workers that start runs, go on with those of the dead, are killed and come back."""

    def __init__(self, seed: int, workers: int) -> None:
        self.loop = asyncio.get_running_loop()
        self.dice = random.Random(seed)
        self.database = Database(self.loop)
        self.acknowledged: dict[tuple[str, int], bytes] = {}
        self.to_start = {number: [f"run-{number}-{run}" for run in range(RUNS_EACH)] for number in range(workers)}
        self.lives = self.losses = self.takeovers = 0
        self.workers: dict[int, asyncio.Task[None]] = {}

    def dsn(self, number: int) -> str:
        return f"postgresql://worker-{number}@simulation/db"

    async def play(self) -> None:
        for number in self.to_start:
            Connection.links[self.dsn(number)] = Link(self.database, random.Random(self.dice.random()))
            self.begin(number)
        while self.loop.time() < FAULTY:
            await asyncio.sleep(self.dice.expovariate(len(self.workers) / 60))
            self.strike(self.dice.choice(list(self.workers)))
        async with asyncio.timeout(20 * LEASE):
            while not self.is_over():
                for task in self.workers.values():
                    if task.done() and not task.cancelled():
                        task.result()  # a life that ended by itself has failed
                await asyncio.sleep(1)
        for task in self.workers.values():
            task.cancel()
        await asyncio.gather(*self.workers.values(), return_exceptions=True)

    def strike(self, number: int) -> None:
        """Kill a worker, which comes back as somebody else, or cut it off for a while."""
        link = Connection.links[self.dsn(number)]
        if self.dice.random() < 0.5:
            if self.workers[number].done():
                return
            self.workers[number].cancel()
            self.loop.call_later(self.dice.uniform(0, 2 * LEASE), self.begin, number)
        else:
            link.down_until = self.loop.time() + self.dice.choice((0.5, LEASE / 2, 2 * LEASE)) * self.dice.random()

    def begin(self, number: int) -> None:
        self.lives += 1
        self.workers[number] = self.loop.create_task(self.live(number))

    def is_over(self) -> bool:
        started = len(self.database.runs) == RUNS_EACH * len(self.to_start)
        return started and all(run.status == "finished" for run in self.database.runs.values())

    async def live(self, number: int) -> None:
        """One life of a worker, until it is killed."""
        store = PostgresCheckpointStore(self.dsn(number), lease=LEASE)
        try:
            async with asyncio.TaskGroup() as group:
                for workflow_id in list(self.to_start[number]):
                    group.create_task(self.start(number, store, workflow_id))
                group.create_task(self.look_for_the_dead(store, group))
        finally:
            task = store._writer._task
            if task is not None:  # it dies as it stands, and gives up nothing
                task.cancel()
                await asyncio.wait([task])

    def has_started(self, number: int, workflow_id: str) -> None:
        with contextlib.suppress(ValueError):  # of two lives that overlap the other one may have said so
            self.to_start[number].remove(workflow_id)

    async def start(self, number: int, store, workflow_id: str) -> None:
        while workflow_id in self.to_start[number]:
            await asyncio.sleep(self.dice.expovariate(1 / 15))
            try:
                fence = await store.start_run(workflow_id, workflow="simulated", version=1)
            except (RunClaimedError, RunConflictError):  # an earlier life did, or a request that was late
                self.has_started(number, workflow_id)
            except CheckpointError:
                continue
            else:
                self.has_started(number, workflow_id)
                await self.go_on(store, workflow_id, fence, 0)

    async def look_for_the_dead(self, store, group: asyncio.TaskGroup) -> None:
        while True:
            await asyncio.sleep(self.dice.uniform(LEASE / 2, LEASE))
            with contextlib.suppress(CheckpointError):
                for run in await store.list_runs(status=RunStatus.Running, limit=20):
                    if run.owner != store.owner and self.dice.random() < 0.1:
                        with contextlib.suppress(RunClaimedError, RunConflictError):
                            fence = await store.claim(run.id)
                            self.takeovers += 1
                            group.create_task(self.take_over(store, run.id, fence))

    async def take_over(self, store, workflow_id: str, fence: int) -> None:
        while True:  # what a living worker owns nobody else takes, so it may not give up
            with contextlib.suppress(CheckpointError):
                rows = await store.load_run(workflow_id)
                break
            await asyncio.sleep(1)
        await self.go_on(store, workflow_id, fence, len(rows))

    async def append(self, store, workflow_id: str, row: CheckpointRow, fence: int) -> None:
        """Send a row until the store says that it is there, or that the run is somebody else's."""
        while True:
            try:
                await store.append(workflow_id, row, fence=fence)
            except RunClaimedError:
                raise
            except RunConflictError as conflict:
                if not conflict.is_same:
                    raise
                return
            except CheckpointError:
                await asyncio.sleep(1)
            else:
                return

    async def go_on(self, store, workflow_id: str, fence: int, sequence: int) -> None:
        try:
            for place in range(sequence, STEPS + 1):
                await asyncio.sleep(self.dice.expovariate(1 / 4))
                mark = b"%d" % self.dice.getrandbits(64)
                row = CheckpointRow(place, RowKind.StateEntry, "STEP", snapshot=mark)
                if place == STEPS:
                    row = CheckpointRow(place, RowKind.Finished, "DONE", snapshot=mark)
                await self.append(store, workflow_id, row, fence)
                assert (workflow_id, place) not in self.acknowledged, "two workers were told that they wrote one row"
                self.acknowledged[workflow_id, place] = row.encode(workflow_id)
        except RunClaimedError:
            self.losses += 1


@pytest.mark.parametrize(("workers", "seed"), [(1_000, 1), (100, 2), (100, 3), (10, 4)])
@pytest.mark.timeout(120)
def test_whatever_happens_to_workers_each_run_is_written_once_and_ends(monkeypatch, workers, seed):
    """With crashes, partitions, late requests and lost answers, no row is written twice or lost, and every run ends."""
    monkeypatch.setattr(_writer, "Connection", Connection)
    monkeypatch.setattr(_connections, "Connection", Connection)
    monkeypatch.setattr(Connection, "links", {})

    async def main():
        simulation = Simulation(seed, workers)
        await simulation.play()
        return simulation

    simulation = testing.run(main())

    runs = simulation.database.runs
    assert len(runs) == workers * RUNS_EACH
    for workflow_id, run in runs.items():
        assert run.fences == sorted(run.fences)
        assert len(run.rows) == STEPS + 1
        rows = [CheckpointRow.decode(workflow_id, sequence, data) for sequence, data in enumerate(run.rows)]
        assert [row.sequence for row in rows] == list(range(STEPS + 1))
    for (workflow_id, sequence), data in simulation.acknowledged.items():
        assert runs[workflow_id].rows[sequence] == data
