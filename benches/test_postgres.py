"""Durable appends to PostgreSQL, and how long a killed worker's runs wait for somebody else.

The server is one of our own, on this machine, and waits for its disk at each commit. Times are wall time.
"""

import asyncio
import itertools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import asyncpg
import pytest

from benches.conftest import Versus
from cano import CheckpointRow, PostgresCheckpointStore, RowKind, RunClaimedError
from tests.postgres_server import MISSING, PostgresServer, find_programs

pytestmark = pytest.mark.skipif(find_programs() is None, reason=MISSING)

RUNS = 64
APPENDS = 20
LEASE = 2.0
WORKER = Path(__file__).parent.parent / "tests" / "postgres_worker.py"

_numbers = itertools.count()


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    with PostgresServer.running(durable=True) as running:
        yield running


def row(sequence: int) -> CheckpointRow:
    return CheckpointRow(sequence, RowKind.StateEntry, "CHARGE", task_id="charge", snapshot=b"x" * 200)


async def appended(store: PostgresCheckpointStore) -> float:
    """Seconds for each of so many appends to new runs that are all in flight."""
    name = next(_numbers)
    ids = [f"run-{name}-{run}" for run in range(RUNS)]
    fences = await asyncio.gather(*[store.start_run(id_, workflow="bench", version=1) for id_ in ids])

    async def go(id_: str, fence: int) -> None:
        for sequence in range(APPENDS):
            await store.append(id_, row(sequence), fence=fence)

    began = perf_counter()
    await asyncio.gather(*map(go, ids, fences))
    return (perf_counter() - began) / (RUNS * APPENDS)


TABLES = """
CREATE TABLE run (id text PRIMARY KEY, fence bigint NOT NULL, sequence bigint NOT NULL) WITH (fillfactor = 70);
CREATE TABLE event (
    id text NOT NULL, sequence bigint NOT NULL, kind text NOT NULL, state text NOT NULL, task text NOT NULL,
    attempt int NOT NULL, row bytea NOT NULL, PRIMARY KEY (id, sequence)
);
"""


async def pooled(dsn: str) -> Any:
    return await asyncpg.create_pool(dsn, min_size=16, max_size=16)


async def transacted(pool: Any) -> float:
    """The same by hand: each append is a transaction of its own, on a connection of a pool."""
    name = next(_numbers)
    ids = [f"run-{name}-{run}" for run in range(RUNS)]
    await pool.executemany("INSERT INTO run VALUES ($1, 1, 0)", [(id_,) for id_ in ids])

    async def go(id_: str) -> None:
        for sequence in range(APPENDS):
            data = row(sequence).encode(id_)
            async with pool.acquire() as connection, connection.transaction():
                fenced = "UPDATE run SET sequence = $2 WHERE id = $1 AND fence = 1"
                assert await connection.execute(fenced, id_, sequence) == "UPDATE 1"
                columns = (id_, sequence, "state entry", "CHARGE", "charge", 1, data)
                await connection.execute("INSERT INTO event VALUES ($1, $2, $3, $4, $5, $6, $7)", *columns)

    began = perf_counter()
    await asyncio.gather(*map(go, ids))
    return (perf_counter() - began) / (RUNS * APPENDS)


def test_appends(versus: Versus, server: PostgresServer) -> None:
    with asyncio.Runner() as runner:
        store = PostgresCheckpointStore(server.dsn)
        runner.run(store.__aenter__())
        pool = runner.run(pooled(server.dsn))
        runner.run(pool.execute(TABLES))
        samplers = {
            "cano": lambda: runner.run(appended(store)),
            "pool of 16, a transaction each": lambda: runner.run(transacted(pool)),
        }
        versus.sampled("fenced append, 64 runs in flight", samplers, unit="s", rounds=11)
        runner.run(pool.close())
        runner.run(store.aclose())


async def taken_over(server: PostgresServer, schema: str) -> float:
    """Seconds from the end of a worker to the moment when all of its runs are somebody else's."""
    runs = 20
    command = [sys.executable, str(WORKER), "work", server.dsn, schema, str(LEASE), str(runs)]
    async with PostgresCheckpointStore(server.dsn, schema=schema, lease=LEASE) as store:
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as worker:  # noqa: ASYNC220, S603 - our own script
            assert worker.stdout is not None
            told = [worker.stdout.readline() for _ in range(10 * runs)]
            assert all(line.startswith("added") for line in told)
            worker.kill()
            worker.stdout.read()
        began = perf_counter()

        async def claim(id_: str) -> None:
            while True:
                try:
                    await store.claim(id_)
                except RunClaimedError:
                    await asyncio.sleep(0.05)
                else:
                    return

        await asyncio.gather(*[claim(f"run-{run}") for run in range(runs)])
        return perf_counter() - began


def test_take_over(versus: Versus, server: PostgresServer) -> None:
    def sample() -> float:
        return asyncio.run(taken_over(server, f"cano_{next(_numbers)}"))

    versus.sampled("take-over of a killed worker, lease 2 s", {"cano": sample}, unit="s", rounds=3)
