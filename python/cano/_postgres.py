"""Keeps the logs of durable runs in PostgreSQL, for many processes on many machines.

What is written goes through a task and a connection of its own (`_postgres_writer`); reads have another connection. Which
operations there are, and what becomes of them, is in `_postgres_operations`; the tables and statements are in
`_postgres_sql`; what the rules say is asked of `core::claim`.
"""

from collections.abc import Iterable
from datetime import timedelta
from typing import Any, Self

from . import _core
from ._checkpoints import RunStatus, RunSummary
from ._config import Seconds
from ._core import CheckpointRow
from ._errors import (
    LABEL_LIMIT,
    ConfigurationError,
    check_text,
    show,
)
from ._postgres_connection import Reader, check_dsn, check_schema, without_password
from ._postgres_operations import Append, Claim, Clear, Greeting, Release, Start
from ._postgres_writer import Writer

_SHORTEST_LEASE, _LONGEST_LEASE = 0.5, 86_400.0
_SHORTEST_BEAT = 0.01
_MOST_BATCH = 4_096
_MOST_RUNS = 1_000_000
_MOST_VERSION = (1 << 32) - 1


class PostgresCheckpointStore:
    """Keeps the logs of durable runs in PostgreSQL, so that many processes on many machines share them.

    An append is on the server's disk when it returns. A run is claimed before its first row, and claimed again by whoever
    goes on with it once its owner's lease has run out: at most `lease` seconds after its process has died. Whoever was taken
    for dead and comes back can write nothing more to the run. The tables are made at the first use.

    Use it with ``async with``, or call `aclose`; it belongs to one event loop. docs/postgres.md says more.

    Args:
        dsn: Where the server is and who asks, such as ``"postgresql://user:password@host:5432/database"``.
        schema: The schema that holds the tables: 1 to 63 letters, digits and underscores, not beginning with a digit or pg_.
        lease: Seconds after which the runs of a process that gives no sign of life may be claimed by others, 0.5 to a day.
        beat: Seconds between signs of life, at most half of the lease; None is a fifth of it: by default 3 s.
        batch: How many operations share a commit at most, 1 to 4,096.

    Raises:
        ConfigurationError: An argument is out of range or of the wrong type.

    Example::

        async with PostgresCheckpointStore("postgresql://localhost/orders") as store:
            workflow = Workflow(...).with_checkpoint_store(store)
    """

    def __init__(
        self, dsn: str, *, schema: str = "cano", lease: Seconds = 15.0, beat: Seconds | None = None, batch: int = 256
    ) -> None:
        self._dsn = check_dsn(dsn)
        self._schema = check_schema(schema)
        lease = _between("lease", lease, _SHORTEST_LEASE, _LONGEST_LEASE)
        beat = lease / 5 if beat is None else _between("beat", beat, _SHORTEST_BEAT, lease / 2)
        self._writer = Writer(dsn, self._schema, lease=lease, beat=beat, batch=_count("batch", batch, 1, _MOST_BATCH))
        self._reader = Reader(dsn, self._schema, patience=lease)

    def __repr__(self) -> str:
        return f"<PostgresCheckpointStore {without_password(self._dsn)!r}, schema {self._schema!r}>"

    @property
    def owner(self) -> str:
        """Who claims what is claimed through this store: the machine, the process, and a number that nobody else has.

        It changes when a lease was lost with the database.
        """
        return self._writer.owner

    async def __aenter__(self) -> Self:
        """Connect, and make the tables if they are not there.

        Raises:
            StoreOpenError: The server cannot be reached, or its tables cannot be used.
        """
        await self._writer.submit(Greeting(*self._writer.about("greeting")))
        return self

    async def __aexit__(self, *_error: object) -> None:
        await self.aclose()

    # --- what is written ---

    async def start_run(self, workflow_id: str, *, workflow: str, version: int) -> int:
        """Claim a run that is not there yet.

        Args:
            workflow_id: The id of the run: 1 to 256 bytes, printable.
            workflow: The workflow's name.
            version: The workflow's version, 0 if it has none.

        Returns:
            The fence, which every write to the run shows.

        Raises:
            RunClaimedError: The run is there, and somebody else's.
            RunConflictError: The run is there: resume or discard it.
            StoreFailedError: The database failed, or could not be reached.

        Cancellation: what was claimed is forgotten again.
        """
        _check_workflow(workflow)
        _count("version", version, 0, _MOST_VERSION)
        return await self._writer.claimed(Start(*self._writer.about(workflow_id), workflow, version))

    async def claim(self, workflow_id: str) -> int:
        """Claim a run that is nobody's, or whose owner's lease has run out.

        Returns:
            The fence, which every write to the run shows. Nobody else's row is added from now on.

        Raises:
            RunNotFoundError: There is no such run.
            RunClaimedError: It is somebody else's, or this store's.
            RunConflictError: It is over.
            StoreFailedError: The database failed, or could not be reached.

        Cancellation: what was claimed is given up again.
        """
        return await self._writer.claimed(Claim(*self._writer.about(workflow_id)))

    async def append(self, workflow_id: str, row: CheckpointRow, *, fence: int | None = None) -> None:
        """Add the next row of a run; it is on the disk then. A row that ends the run gives up the claim.

        Args:
            workflow_id: The id of the run.
            row: The row.
            fence: What the run was claimed under; None is for a run that nobody has claimed, which begins with its row 0.

        Raises:
            RunConflictError: A row of this sequence is there already, or none of this kind may follow.
            RunClaimedError: The run is somebody else's by now, or may be: the database was away for longer than the lease.
            RunNotFoundError: There is no such run.
            RunTooLargeError: The row or the run would be too large.
            StoreFailedError: The database failed, or could not be reached.

        Cancellation: the row is added or not.
        """
        if not isinstance(row, CheckpointRow):
            raise ConfigurationError(f"row must be a CheckpointRow, got {show(row)}")
        if fence is not None and _core.check_fence(fence) <= self._writer.lost_fence:
            raise self._writer.lost(workflow_id, row.sequence)
        await self._writer.submit(Append(*self._writer.about(workflow_id), row, fence))

    async def clear(self, workflow_id: str, *, fence: int | None = None) -> None:
        """Forget a run and its rows; fine if there is none.

        Args:
            workflow_id: The id of the run.
            fence: What the run was claimed under, also after its end; None is for a run that is nobody's.

        Raises:
            RunClaimedError: The run is somebody else's.
            StoreFailedError: The database failed, or could not be reached.
        """
        await self._writer.submit(
            Clear(*self._writer.about(workflow_id), None if fence is None else _core.check_fence(fence))
        )

    async def release(self, workflow_id: str, fence: int, *, stopped: bool = False) -> None:
        """Give up a claim, so that others may go on with the run at once.

        Args:
            workflow_id: The id of the run.
            fence: What the run was claimed under.
            stopped: Whether the run has failed and is resumed by those who ask for it only.

        Raises:
            RunClaimedError: The run is not this claim's any more.
            RunNotFoundError: There is no such run.
            StoreFailedError: The database failed, or could not be reached.
        """
        await self._writer.submit(
            Release(*self._writer.about(workflow_id), _core.check_fence(fence), stopped=bool(stopped))
        )

    # --- what is read ---

    async def load_run(self, workflow_id: str) -> list[CheckpointRow]:
        """The rows of a run in ascending order; none if there is no such run.

        Raises:
            CorruptRowError: A row is damaged or missing.
            StoreFailedError: The database failed, or could not be reached.
        """
        _core.check_workflow_id(workflow_id)
        found = await self._read("LOAD", workflow_id)
        if not found:
            return []
        stored = [(record["sequence"], record["row"]) for record in found if record["sequence"] is not None]
        return _core.decode_log(workflow_id, stored, found[0]["next_sequence"])

    async def list_runs(
        self,
        *,
        status: RunStatus | Iterable[RunStatus] | None = None,
        older_than: Seconds | None = None,
        limit: int = 1000,
    ) -> list[RunSummary]:
        """The runs of the store, the longest untouched first.

        Args:
            status: Which statuses; None is all.
            older_than: Only runs that nobody has written to for so many seconds, by the clock of the database; None is all.
            limit: How many at most, 1 to 1,000,000.

        Raises:
            StoreFailedError: The database failed, or could not be reached.
        """
        wanted = _statuses(status)
        age = None if older_than is None else timedelta(seconds=_core.seconds("older_than", older_than))
        found = await self._read("LIST", [one.value for one in wanted], age, _count("limit", limit, 1, _MOST_RUNS))
        return [_summary(record) for record in found]

    async def aclose(self) -> None:
        """Write what waits, give up all claims, and disconnect; closing again does nothing.

        What waits for a database that is away waits no longer than it would have. Cancelled, it disconnects at once: what
        waits gets a `StoreFailedError`, and the claims are left to the lease.
        """
        try:
            await self._writer.aclose()
        finally:
            await self._reader.aclose()

    async def _read(self, statement: str, *arguments: object) -> list[Any]:
        self._writer.check_usable()
        return await self._reader.read(statement, *arguments, fails_fast=not self._writer.is_connected)


def _summary(found: Any) -> RunSummary:
    return RunSummary(
        id=found["workflow_id"],
        workflow=found["workflow"],
        version=found["version"],
        status=RunStatus(found["status"]),
        state=found["state"],
        owner=found["owner"],
        created_at=found["created_at"],
        updated_at=found["updated_at"],
        rows=found["kept_rows"],
        bytes=found["kept_bytes"],
    )


def _check_workflow(workflow: Any) -> None:
    if not isinstance(workflow, str):
        raise ConfigurationError(f"workflow must be a text, got {show(workflow)}")
    check_text("workflow", workflow, LABEL_LIMIT)


def _statuses(status: Any) -> list[RunStatus]:
    """One status, or several; all if it is None."""
    if status is None or isinstance(status, RunStatus):
        return list(RunStatus) if status is None else [status]
    several = list(status) if isinstance(status, Iterable) else [status]
    if not all(isinstance(one, RunStatus) for one in several):
        raise ConfigurationError(f"status must be a RunStatus, or an iterable of them, got {show(status)}")
    return several


def _count(name: str, value: Any, least: int, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigurationError(f"{name} must be an int, got {show(value)}")
    if not least <= value <= most:
        raise ConfigurationError(f"{name} must be at least {least} and at most {most}, got {value}")
    return value


def _between(name: str, value: Seconds, least: float, most: float) -> float:
    if value is None:
        raise ConfigurationError(f"{name} must be seconds as a number or a timedelta, got None")
    seconds = _core.seconds(name, value)
    if not least <= seconds <= most:
        raise ConfigurationError(f"{name} must be at least {least:g} and at most {most:g} seconds, got {show(value)}")
    return seconds
