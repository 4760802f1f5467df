"""What a durable row costs: with a thousand runs in flight, with nobody else waiting, and when a long log is read.

Times are wall times, since most of them is the disk's. The opponents write the same bytes with Python's sqlite3, also in WAL
mode with ``synchronous=FULL``: one commit for each row, in the loop or in a thread beside it.
"""

import asyncio
import sqlite3
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import count
from pathlib import Path
from time import perf_counter

import pytest

from cano import CheckpointRow, RowKind, SqliteCheckpointStore

pytestmark = pytest.mark.benchmark(timer=perf_counter)

RUNS = 1_000
EACH = 10
"""Rows of a run, of ours; the opponents write one each, which takes them as long as it takes."""

LONE = 300
LONG = 10_000
SNAPSHOT = b'{"order": 17, "total": 42.5, "items": ["a", "b", "c"]}'

Append = Callable[[str, int], Awaitable[None]]


def row(sequence: int) -> CheckpointRow:
    options = {"task_id": "charge", "recorded_at": 1_764_000_000_000 + sequence}
    return CheckpointRow(sequence, RowKind.StateEntry, "Order.CHARGE", **options, snapshot=SNAPSHOT)


class Plain:
    """A table of rows, and a commit for each."""

    def __init__(self, path: Path) -> None:
        self.connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self.connection.execute("PRAGMA journal_mode = WAL")
        self.connection.execute("PRAGMA synchronous = FULL")
        self.connection.execute("CREATE TABLE rows (id TEXT, sequence INTEGER, row BLOB, PRIMARY KEY (id, sequence))")
        self.pool = ThreadPoolExecutor(1)

    def write(self, id_: str, sequence: int) -> None:
        self.connection.execute("INSERT INTO rows VALUES (?, ?, ?)", (id_, sequence, row(sequence).encode(id_)))

    async def append(self, id_: str, sequence: int) -> None:
        self.write(id_, sequence)

    async def append_in_thread(self, id_: str, sequence: int) -> None:
        await asyncio.get_running_loop().run_in_executor(self.pool, self.write, id_, sequence)

    def close(self) -> None:
        self.pool.shutdown()
        self.connection.close()


async def in_flight(append: Append, ids: list[str], each: int) -> float:
    async def run(id_: str) -> None:
        for sequence in range(each):
            await append(id_, sequence)

    began = perf_counter()
    await asyncio.gather(*map(run, ids))
    return (perf_counter() - began) / (len(ids) * each)


async def alone(append: Append, id_: str) -> float:
    began = perf_counter()
    for sequence in range(LONE):
        await append(id_, sequence)
    return (perf_counter() - began) / LONE


async def started(store: SqliteCheckpointStore, ids: list[str]) -> Append:
    fences = await asyncio.gather(*(store.start_run(id_, workflow="order", version=1) for id_ in ids))
    fence = dict(zip(ids, fences, strict=True))

    async def append(id_: str, sequence: int) -> None:
        await store.append(id_, row(sequence), fence=fence[id_])

    return append


def test_many_in_flight(versus, tmp_path):
    rounds = count()

    def ids() -> list[str]:
        number = next(rounds)
        return [f"order-{number}-{run}" for run in range(RUNS)]

    async def ours() -> float:
        names = ids()
        return await in_flight(await started(store, names), names, EACH)

    with closing(SqliteCheckpointStore(tmp_path / "runs.db")) as store, closing(Plain(tmp_path / "plain.db")) as other:
        samplers = {
            "cano": lambda: asyncio.run(ours()),
            "a commit each": lambda: asyncio.run(in_flight(other.append, ids(), 1)),
            "a commit each, in a thread": lambda: asyncio.run(in_flight(other.append_in_thread, ids(), 1)),
        }
        versus.sampled("durable row, 1,000 runs in flight", samplers, unit="s", rounds=11)


def test_alone(versus, tmp_path):
    ids = (f"order-{number}" for number in count())

    async def ours() -> float:
        id_ = next(ids)
        return await alone(await started(store, [id_]), id_)

    with closing(SqliteCheckpointStore(tmp_path / "runs.db")) as store, closing(Plain(tmp_path / "plain.db")) as other:
        samplers = {
            "cano": lambda: asyncio.run(ours()),
            "a commit each": lambda: asyncio.run(alone(other.append, next(ids))),
            "a commit each, in a thread": lambda: asyncio.run(alone(other.append_in_thread, next(ids))),
        }
        versus.sampled("durable row, nobody else waiting", samplers, unit="s", rounds=11)


def test_long_log(versus, tmp_path):
    async def write() -> None:
        append = await started(store, ["order-1"])
        await asyncio.gather(*(append("order-1", sequence) for sequence in range(LONG)))

    async def read() -> float:
        began = perf_counter()
        rows = await store.load_run("order-1")
        seconds = perf_counter() - began
        assert len(rows) == LONG
        return seconds

    with closing(SqliteCheckpointStore(tmp_path / "runs.db")) as store:
        asyncio.run(write())
        versus.sampled("log of 10,000 rows, read", {"cano": lambda: asyncio.run(read())}, unit="s", rounds=11)
