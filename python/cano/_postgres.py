"""Keeps the logs of durable runs in PostgreSQL, for many processes on many machines.

Who wants something written leaves an operation in the queue and awaits its answer. One task of the store does the rest, over
one connection: it takes all that waits, does the operations of each kind in one statement, which is one commit, and hands
out the answers. While it is busy the queue fills, so the more is asked of it, the more share a commit; who comes alone
waits for nobody. Reads have a connection of their own.

- One turn has at most `batch` operations and at most one of each run, in the order in which they came.
- An operation that may not be done changes nothing and does not disturb the others; why it may not is asked of
  `core::claim`, with what the database then has of the run.
- An answer that was lost with its connection is asked for again: each operation knows how to tell that it was done.
- The task keeps the owner's lease alive, in turn with the rest. If the database cannot be reached until the lease must
  have run out, the store takes its runs for lost: it says so to whoever goes on with them, and is another owner from then.
- Who is cancelled while it waits leaves its operation alone. A claim that nobody waits for any more is given up.
"""

import asyncio
import contextlib
import math
import os
import random
import secrets
import socket
from collections import deque
from collections.abc import Iterable
from datetime import timedelta
from typing import Any, ClassVar, Self

from . import _core
from ._checkpoints import RowKind, RunStatus, RunSummary
from ._config import Seconds
from ._core import CheckpointRow, Standing
from ._errors import (
    LABEL_LIMIT,
    CheckpointError,
    ConfigurationError,
    RunClaimedError,
    RunConflictError,
    RunNotFoundError,
    StoreFailedError,
    StoreOpenError,
    check_text,
    show,
)
from ._postgres_connection import Connection, check_schema, failed, text_of, verdict, without_password
from ._postgres_sql import SETTINGS

_MOST_BYTES = 16 << 20
"""Of the rows of one statement."""

_FIRST_DELAY, _LONGEST_DELAY = 0.05, 1.0
"""Seconds before a lost connection is opened again; never more than an eighth of the lease."""

_PAUSE = 0.005
"""Seconds before something is done again that was in somebody's way."""

_SHORTEST_LEASE, _LONGEST_LEASE = 0.5, 86_400.0
_MOST_BATCH = 4096

_AFTER = {(status, kind): after for status, kind, after in _core.rules_of_claims()}
_LIMITS = _core.limits_of_runs()

_LEFT_OUT = object()
"""Instead of an answer: the statement has not done it."""

_AGAIN = object()
"""What an operation answers that was left out and may be done: something was in the way that has gone."""


# --- operations ------------------------------------------------------------------------------------------------------


class _Operation:
    """Something to be written."""

    __slots__ = ("deadline", "done", "is_answered", "is_in_doubt", "workflow_id")

    statement: str
    size: int = 0

    def __init__(self, workflow_id: str, done: asyncio.Future[Any], deadline: float) -> None:
        self.workflow_id = workflow_id
        self.done = done
        self.deadline = deadline
        """From when it waits no longer for a database that is away."""
        self.is_answered = False
        self.is_in_doubt = False
        """Whether it was sent, and the answer was lost."""

    def columns(self) -> tuple[object, ...]:
        """Its part of the arrays of its statement."""
        raise NotImplementedError

    def left_out(self, standing: Standing | None, found: Any) -> object:
        """Its answer after it was left out: raises why; `_AGAIN`; or what it got when it was sent before."""
        raise NotImplementedError

    def sequence(self) -> int | None:
        """The place of its row, if it has one."""
        return None

    def answer(self, result: object) -> None:
        self.is_answered = True
        if not self.done.done():
            self.done.set_result(result)

    def refuse(self, error: Exception) -> None:
        self.is_answered = True
        if not self.done.done():
            self.done.set_exception(error)


class _Greeting(_Operation):
    """Answered as soon as there is a connection."""

    __slots__ = ()
    statement = "GREETING"

    def columns(self) -> tuple[object, ...]:
        return ()


class _Claim(_Operation):
    __slots__ = ("ticket",)
    statement = "CLAIM"

    def __init__(self, workflow_id: str, done: asyncio.Future[Any], deadline: float) -> None:
        super().__init__(workflow_id, done, deadline)
        self.ticket = secrets.token_bytes(16)

    def columns(self) -> tuple[object, ...]:
        return self.workflow_id, self.ticket

    def left_out(self, standing: Standing | None, found: Any) -> object:
        if standing is None:
            raise RunNotFoundError(f"run {show(self.workflow_id)} is not there", self.workflow_id)
        if self.is_mine(found):
            return found["fence"]
        standing.claim(found["now"])
        return _AGAIN

    def is_mine(self, found: Any) -> bool:
        return bool(found["ticket"] == self.ticket and found["owner"] is not None)


class _Start(_Claim):
    __slots__ = ("version", "workflow")
    statement = "START"

    def __init__(
        self, workflow_id: str, done: asyncio.Future[Any], deadline: float, workflow: str, version: int
    ) -> None:
        super().__init__(workflow_id, done, deadline)
        self.workflow = workflow
        self.version = version

    def columns(self) -> tuple[object, ...]:
        return self.workflow_id, self.ticket, self.workflow, self.version

    def left_out(self, standing: Standing | None, found: Any) -> object:
        if standing is None:  # it was there, and has been cleared
            return _AGAIN
        if self.is_mine(found):
            return found["fence"]
        standing.start(found["now"])
        return _AGAIN


class _Append(_Operation):
    __slots__ = ("data", "fence", "is_left_out", "row", "statement")

    def __init__(
        self, workflow_id: str, done: asyncio.Future[Any], deadline: float, row: CheckpointRow, fence: int | None
    ) -> None:
        super().__init__(workflow_id, done, deadline)
        self.row = row
        self.data = _core.encode_within_limits(workflow_id, row)
        self.fence = fence
        self.is_left_out = False
        if row.refers_to is not None and row.kind is RowKind.StepCursor:
            self.statement = "REPLACE"
        else:
            self.statement = "BEGIN" if fence is None and row.sequence == 0 else "APPEND"

    @property
    def size(self) -> int:  # type: ignore[override]
        return len(self.data)

    def sequence(self) -> int | None:
        return self.row.sequence

    def columns(self) -> tuple[object, ...]:
        row = self.row
        kind = row.kind.value
        return (
            self.workflow_id,
            self.fence,
            row.sequence,
            _AFTER.get(("running", kind)),
            _AFTER.get(("rolling back", kind)),
            kind,
            _readable(row.state),
            _readable(row.task_id),
            row.visit,
            row.attempt,
            None if row.next_state is None else _readable(row.next_state),
            row.refers_to,
            row.run_id,
            row.recorded_at,
            row.workflow_version,
            self.data,
        )

    def left_out(self, standing: Standing | None, found: Any) -> object:
        if standing is None:
            if self.fence is not None:
                raise RunNotFoundError(f"run {show(self.workflow_id)} is not there", self.workflow_id)
            Standing(self.workflow_id, "running", None, None, 0, 0, 0, 0).append(None, self.row, self.data, None)
            self.statement = "BEGIN"
            return _AGAIN
        try:
            standing.append(self.fence, self.row, self.data, found["row"])
        except RunConflictError as error:
            if self.is_in_doubt and error.is_same:
                return None
            raise
        if self.statement == "REPLACE" and self.is_left_out:
            standing.misplaced(self.row.sequence)
        if self.statement == "BEGIN":
            self.statement = "APPEND"
        self.is_left_out = True
        return _AGAIN


class _Release(_Operation):
    __slots__ = ("fence", "stopped")
    statement = "RELEASE"

    def __init__(
        self, workflow_id: str, done: asyncio.Future[Any], deadline: float, fence: int, *, stopped: bool
    ) -> None:
        super().__init__(workflow_id, done, deadline)
        self.fence = fence
        self.stopped = stopped

    def columns(self) -> tuple[object, ...]:
        return self.workflow_id, self.fence, self.stopped

    def left_out(self, standing: Standing | None, found: Any) -> object:
        if standing is None:
            raise RunNotFoundError(f"run {show(self.workflow_id)} is not there", self.workflow_id)
        if self.is_in_doubt and found["owner"] is None and found["fence"] == self.fence:
            return None
        standing.release(self.fence)
        return _AGAIN


class _Clear(_Operation):
    __slots__ = ("fence",)
    statement = "CLEAR"

    def __init__(self, workflow_id: str, done: asyncio.Future[Any], deadline: float, fence: int | None) -> None:
        super().__init__(workflow_id, done, deadline)
        self.fence = fence

    def columns(self) -> tuple[object, ...]:
        return self.workflow_id, self.fence

    def left_out(self, standing: Standing | None, found: Any) -> object:
        if standing is None:
            return None
        standing.clear(self.fence, found["now"])
        return _AGAIN


def _readable(text: str) -> str:
    """PostgreSQL keeps every text but those with a zero; the bytes of the row have what it was."""
    return text.replace("\0", "\N{SYMBOL FOR NULL}")


# --- the store -------------------------------------------------------------------------------------------------------


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
        if not isinstance(dsn, str) or not dsn.startswith(("postgresql://", "postgres://")):
            wanted = "an address that begins with postgresql://"
            raise ConfigurationError(
                f"dsn must be {wanted}, got {show(without_password(dsn) if isinstance(dsn, str) else dsn)}"
            )
        if isinstance(batch, bool) or not isinstance(batch, int) or not 1 <= batch <= _MOST_BATCH:
            raise ConfigurationError(f"batch must be an int from 1 to {_MOST_BATCH}, got {show(batch)}")
        self._dsn = dsn
        self._schema = check_schema(schema)
        self._lease = _between("lease", lease, _SHORTEST_LEASE, _LONGEST_LEASE)
        self._beat = self._lease / 5 if beat is None else _between("beat", beat, 0.01, self._lease / 2)
        self._batch = batch
        self._process = os.getpid()
        self._owner = _new_owner()
        self._waiting: deque[_Operation] = deque()
        self._under_way: list[_Operation] = []
        self._wake = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self._is_closed = False
        self._reading = asyncio.Lock()
        self._reader: Connection | None = None
        self._next_beat = 0.0
        self._alive_until = math.inf  # by the clock of the loop, which is behind the database's
        self._newest_fence = 0
        self._lost_fence = 0  # the newest of those that were lost with the lease

    def __repr__(self) -> str:
        return f"<PostgresCheckpointStore {without_password(self._dsn)!r}, schema {self._schema!r}>"

    @property
    def owner(self) -> str:
        """Who claims what is claimed through this store: the machine, the process, and a number that nobody else has.

        It changes when a lease was lost with the database.
        """
        return self._owner

    async def __aenter__(self) -> Self:
        """Connect, and make the tables if they are not there.

        Raises:
            StoreOpenError: The server cannot be reached, or its tables cannot be used.
        """
        await self._submit(_Greeting(*self._about("greeting")))
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
        if not isinstance(workflow, str):
            raise ConfigurationError(f"workflow must be a text, got {show(workflow)}")
        check_text("workflow", workflow, LABEL_LIMIT)
        if isinstance(version, bool) or not isinstance(version, int) or not 0 <= version < 1 << 32:
            raise ConfigurationError(f"version must be an int from 0 to {(1 << 32) - 1}, got {show(version)}")
        return await self._claimed(_Start(*self._about(workflow_id), workflow, version))

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
        return await self._claimed(_Claim(*self._about(workflow_id)))

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
        if fence is not None and _core.check_fence(fence) <= self._lost_fence:
            raise self._lost(workflow_id, row.sequence)
        await self._submit(_Append(*self._about(workflow_id), row, fence))

    async def clear(self, workflow_id: str, *, fence: int | None = None) -> None:
        """Forget a run and its rows; fine if there is none.

        Args:
            workflow_id: The id of the run.
            fence: What the run was claimed under, also after its end; None is for a run that is nobody's.

        Raises:
            RunClaimedError: The run is somebody else's.
            StoreFailedError: The database failed, or could not be reached.
        """
        await self._submit(_Clear(*self._about(workflow_id), None if fence is None else _core.check_fence(fence)))

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
        await self._submit(_Release(*self._about(workflow_id), _core.check_fence(fence), stopped=bool(stopped)))

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
            limit: How many at most, from 1.

        Raises:
            StoreFailedError: The database failed, or could not be reached.
        """
        wanted = list(RunStatus) if status is None else [status] if isinstance(status, RunStatus) else list(status)
        if not all(isinstance(one, RunStatus) for one in wanted):
            raise ConfigurationError(f"status must be a RunStatus, several of them, or None, got {show(status)}")
        if isinstance(limit, bool) or not isinstance(limit, int) or not 1 <= limit < 1 << 32:
            raise ConfigurationError(f"limit must be an int from 1 to {(1 << 32) - 1}, got {show(limit)}")
        age = None if older_than is None else timedelta(seconds=_core.seconds("older_than", older_than))
        found = await self._read("LIST", [one.value for one in wanted], age, limit)
        return [_summary(record) for record in found]

    async def aclose(self) -> None:
        """Write what waits, give up all claims, and disconnect; closing again does nothing.

        What waits for a database that is away waits no longer than it would have. Cancelled, it disconnects at once: what
        waits gets a `StoreFailedError`, and the claims are left to the lease.
        """
        self._is_closed = True
        self._wake.set()
        try:
            if self._task is not None:
                await self._task
            async with self._reading:
                if self._reader is not None:
                    await self._reader.close()
        finally:
            if self._reader is not None:
                self._reader.terminate()
            self._reader = None

    # --- the queue ---

    def _about(self, workflow_id: str) -> tuple[str, asyncio.Future[Any], float]:
        """The first arguments of every operation."""
        _core.check_workflow_id(workflow_id)
        self._check_usable()
        loop = asyncio.get_running_loop()
        return workflow_id, loop.create_future(), loop.time() + self._lease

    def _check_usable(self) -> None:
        if os.getpid() != self._process:
            text = "the store was made before this process was forked; make one after the fork"
            raise StoreFailedError(text, reason="forked")
        if self._is_closed:
            raise StoreFailedError("the store is closed", reason="closed")
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._loop = loop
        if self._loop is not loop:
            raise StoreFailedError("the store belongs to another event loop; make one in each", reason="other")

    def _submit(self, operation: _Operation) -> asyncio.Future[Any]:
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._work(), name="cano-postgres")
        self._waiting.append(operation)
        self._wake.set()
        return operation.done

    async def _claimed(self, operation: _Claim) -> int:
        done = self._submit(operation)
        try:
            fence: int = await done
        except asyncio.CancelledError:
            if done.done() and not done.cancelled() and done.exception() is None:
                self._give_up(operation, done.result())
            raise
        return fence

    def _give_up(self, operation: _Claim, fence: int) -> None:
        """Undo a claim that nobody waits for any more."""
        loop = asyncio.get_running_loop()
        done = loop.create_future()
        done.add_done_callback(lambda done: done.exception())  # who took it over in the meantime is welcome to it
        about = operation.workflow_id, done, loop.time() + self._lease
        is_new = isinstance(operation, _Start)
        self._waiting.append(_Clear(*about, fence) if is_new else _Release(*about, fence, stopped=False))
        self._wake.set()

    def _take(self) -> list[_Operation]:
        """What the next turn does."""
        taken: dict[str, _Operation] = {}
        later: list[_Operation] = []
        size = 0
        while self._waiting and len(taken) < self._batch:
            operation = self._waiting.popleft()
            if operation.done.cancelled() and not operation.is_in_doubt:
                continue
            if operation.workflow_id in taken:
                later.append(operation)
                continue
            size += operation.size
            if taken and size > _MOST_BYTES:
                later.append(operation)
                break
            taken[operation.workflow_id] = operation
        self._waiting.extendleft(reversed(later))
        return list(taken.values())

    # --- the task ---

    async def _work(self) -> None:
        """Do what waits until the store is closed, over one connection after the other."""
        connection: Connection | None = None
        try:
            try:
                connection = await self._connect()
                await connection.fetch("FORGET_OWNERS", limit=self._patience)
            except Exception as error:  # noqa: BLE001 - who waits gets it
                self._refuse_all(self._cannot_open(error))
                self._task = None  # the next operation tries again
                return
            while connection is not None:
                try:
                    await self._serve(connection)
                    await self._leave(connection)
                    return
                except Exception as error:
                    if verdict(error) != "lost":
                        raise
                    connection.terminate()
                    connection = await self._connect_again(error)
        except BaseException as error:
            trouble = StoreFailedError(f"the store was ended: {text_of(error)}", reason="closed")
            trouble.__cause__ = error
            self._is_closed = True
            self._refuse_all(trouble)
            raise
        finally:
            if connection is not None:
                connection.terminate()

    async def _connect(self) -> Connection:
        """A connection whose lease has begun."""
        connection = await Connection.open(self._dsn, self._schema, limit=self._patience, settings=SETTINGS)
        try:
            await self._renew(connection)
        except BaseException:
            connection.terminate()
            raise
        return connection

    @property
    def _patience(self) -> float:
        """Seconds without an answer after which a connection is taken for lost; as many are left for another one."""
        return self._lease / 2

    async def _connect_again(self, error: Exception) -> Connection | None:
        """Another connection, however long it takes; None if the store is closed and nothing waits any more."""
        self._waiting.extendleft(reversed([it for it in self._under_way if not it.is_answered]))
        self._under_way = []
        delay = _FIRST_DELAY
        while True:
            self._expire(error)
            if self._is_closed and not self._waiting:
                return None
            try:
                return await self._connect()
            except Exception as again:  # noqa: BLE001 - whatever it is, it may pass
                error = again
            await asyncio.sleep(delay * random.uniform(0.5, 1.0))  # noqa: S311 - so that not all come back at once
            delay = min(2 * delay, _LONGEST_DELAY, self._lease / 8)

    def _expire(self, error: Exception) -> None:
        """Tell those who have waited long enough for a database that is away."""
        now = asyncio.get_running_loop().time()
        is_lost = now >= self._alive_until
        if is_lost:
            self._lost_fence = self._newest_fence
            self._owner = _new_owner()
            self._alive_until = math.inf
        for operation in list(self._waiting):
            if isinstance(operation, _Append) and operation.fence is not None and operation.fence <= self._lost_fence:
                operation.refuse(self._lost(operation.workflow_id, operation.row.sequence))
            elif now >= operation.deadline or (is_lost and isinstance(operation, _Claim) and operation.is_in_doubt):
                text = f"the database could not be reached for {self._lease:g} s: {text_of(error)}"
                operation.refuse(StoreFailedError(text, operation.workflow_id, operation.sequence(), reason="io"))
        self._waiting = deque(operation for operation in self._waiting if not operation.is_answered)

    def _lost(self, workflow_id: str, sequence: int) -> RunClaimedError:
        text = (
            f"run {show(workflow_id)} is lost: the database could not be reached for as long as the lease lasts, "
            f"{self._lease:g} s, and somebody else may have claimed it"
        )
        return RunClaimedError(text, workflow_id, sequence)

    def _cannot_open(self, error: Exception) -> StoreOpenError:
        if isinstance(error, StoreOpenError):
            return error
        reason = "io" if verdict(error) == "lost" else "other"
        found = StoreOpenError(f"cannot open {without_password(self._dsn)}: {text_of(error)}", reason)
        found.__cause__ = error
        return found

    def _refuse_all(self, error: CheckpointError) -> None:
        for operation in (*self._under_way, *self._waiting):
            if not operation.is_answered:
                operation.refuse(error)
        self._under_way = []
        self._waiting.clear()

    async def _serve(self, connection: Connection) -> None:
        """Do what waits until the store is closed and nothing waits."""
        loop = asyncio.get_running_loop()
        while True:
            if loop.time() >= self._next_beat:
                await self._renew(connection)
            if self._waiting:
                self._under_way = self._take()
                await self._turn(connection)
            elif self._is_closed:
                return
            else:
                self._wake.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout_at(self._next_beat):
                        await self._wake.wait()

    async def _renew(self, connection: Connection) -> None:
        sent = asyncio.get_running_loop().time()
        await connection.fetch("BEAT", self._owner, timedelta(seconds=self._lease), limit=self._patience)
        self._alive_until = sent + self._lease
        self._next_beat = sent + self._beat

    async def _leave(self, connection: Connection) -> None:
        """Give up all claims; what fails here is left to the lease."""
        with contextlib.suppress(Exception):
            await connection.fetch("LEAVE_RUNS", self._owner, limit=self._patience)
            await connection.fetch("LEAVE", self._owner, limit=self._patience)
        await connection.close()

    # --- a turn ---

    async def _turn(self, connection: Connection) -> None:
        statements: dict[str, list[_Operation]] = {}
        for operation in self._under_way:
            statements.setdefault(operation.statement, []).append(operation)
        for name, operations in statements.items():
            await self._do(connection, name, operations)
        again = [operation for operation in self._under_way if not operation.is_answered]
        self._under_way = []
        if again:
            self._waiting.extendleft(reversed(again))
            await asyncio.sleep(_PAUSE)

    async def _do(self, connection: Connection, name: str, operations: list[_Operation]) -> None:
        """Do operations of one kind; those that are left without an answer are to be done again."""
        try:
            answers = await self._send(connection, name, operations)
        except Exception as error:
            match verdict(error):
                case "lost":
                    for operation in operations:
                        operation.is_in_doubt = True
                    raise
                case "again":
                    pass
                case "refused" if len(operations) > 1:  # the others need not suffer for the one that it is about
                    for operation in operations:
                        await self._do(connection, name, [operation])
                case "refused":
                    operations[0].refuse(failed(error, operations[0].workflow_id))
            return
        left_out = []
        for operation, answer in zip(operations, answers, strict=True):
            if answer is _LEFT_OUT:
                left_out.append(operation)
            else:
                self._answer(operation, answer)
        if left_out:
            await self._explain(connection, left_out)

    async def _send(self, connection: Connection, name: str, operations: list[_Operation]) -> list[object]:
        """The answers, in order; `_LEFT_OUT` for what the statement has left out."""
        columns = zip(*[operation.columns() for operation in operations], strict=True)
        limit = self._patience
        answers: list[object] = [_LEFT_OUT] * len(operations)
        if name == "GREETING":
            return [None] * len(operations)
        if name in ("START", "CLAIM"):
            found = await connection.fetch(name, self._owner, *columns, limit=limit)
            fences = {record["workflow_id"]: record["fence"] for record in found}
            return [fences.get(operation.workflow_id, _LEFT_OUT) for operation in operations]
        if name == "CLEAR":
            async with connection.transaction():
                found = await connection.fetch(name, *columns, limit=limit)
                await connection.fetch("CLEAR_ROWS", [record["run"] for record in found], limit=limit)
        elif name == "RELEASE":
            found = await connection.fetch(name, *columns, limit=limit)
        else:
            found = await connection.fetch(name, *columns, *_LIMITS, limit=limit)
        for record in found:
            answers[record["place"] - 1] = None
        return answers

    async def _explain(self, connection: Connection, operations: list[_Operation]) -> None:
        """Say of what was left out why, or leave it without an answer."""
        ids, sequences = zip(*[(operation.workflow_id, operation.sequence()) for operation in operations], strict=True)
        found = {
            record["place"]: record
            for record in await connection.fetch("STANDINGS", ids, sequences, limit=self._patience)
        }
        for place, operation in enumerate(operations, 1):
            record = found.get(place)
            try:
                answer = operation.left_out(record and _standing(record), record)
            except CheckpointError as error:
                operation.refuse(error)
                continue
            if answer is not _AGAIN:
                self._answer(operation, answer)
            elif asyncio.get_running_loop().time() >= operation.deadline:
                text = f"run {show(operation.workflow_id)} was locked for {self._lease:g} s"
                operation.refuse(StoreFailedError(text, operation.workflow_id, operation.sequence(), reason="busy"))

    def _answer(self, operation: _Operation, answer: object) -> None:
        if isinstance(operation, _Claim):
            fence = int(str(answer))
            self._newest_fence = max(self._newest_fence, fence)
            if operation.done.cancelled():
                self._give_up(operation, fence)
        operation.answer(answer)

    # --- reading ---

    async def _read(self, name: str, *arguments: object) -> list[Any]:
        self._check_usable()
        loop = asyncio.get_running_loop()
        deadline, delay = loop.time() + self._lease, _FIRST_DELAY
        async with self._reading:
            while True:
                is_new = self._reader is None
                try:
                    if self._reader is None:
                        self._reader = await Connection.open(self._dsn, self._schema, limit=self._patience)
                    return await self._reader.fetch(name, *arguments)
                except BaseException as error:
                    is_lost = isinstance(error, Exception) and verdict(error) == "lost"
                    if self._reader is not None and (is_lost or not isinstance(error, Exception)):
                        self._reader.terminate()
                        self._reader = None
                    if not isinstance(error, Exception):
                        raise
                    if is_new and self._reader is None and self._task is None:
                        raise self._cannot_open(error) from error
                    if not is_lost or loop.time() >= deadline:
                        raise failed(error) from error
                await asyncio.sleep(delay)
                delay = min(2 * delay, _LONGEST_DELAY, self._lease / 8)


def _standing(found: Any) -> Standing:
    return Standing(
        found["workflow_id"],
        found["status"],
        found["owner"],
        found["until"],
        found["fence"],
        found["next_sequence"],
        found["kept_rows"],
        found["kept_bytes"],
    )


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


def _new_owner() -> str:
    """A name that says where the owner lives and that nobody had before."""
    return f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(6)}"


def _between(name: str, value: Seconds, least: float, most: float) -> float:
    seconds = _core.seconds(name, value)
    if seconds is None or not least <= seconds <= most:
        raise ConfigurationError(f"{name} must be {least:g} to {most:g} seconds, got {show(value)}")
    return seconds
