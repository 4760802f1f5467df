"""The task of a `PostgresCheckpointStore`: the queue, the one connection that writes, and the lease.

Who wants something written leaves an operation in the queue and awaits its answer. The task takes all that waits, does the
operations of each kind in one statement, which is one commit, and hands out the answers. While it is busy the queue fills,
so the more is asked of it, the more share a commit; who comes alone waits for nobody.

- What a turn does in several statements waits for the disk once, and is answered when the last of them has.
- One turn has at most `batch` operations and at most one of each run, in the order in which they came.
- An operation that may not be done changes nothing and does not disturb the others.
- An answer that was lost with its connection is asked for again: each operation knows how to tell that it was done.
- The task keeps the owner's lease alive, in turn with the rest. If the database cannot be reached until the lease must
  have run out, the store takes its runs for lost: it says so to whoever goes on with them, and is another owner from then.
- Who is cancelled while it waits leaves its operation alone. A claim that nobody waits for any more is undone.
"""

import asyncio
import contextlib
import math
import os
import secrets
import socket
from collections import deque
from datetime import timedelta
from typing import Any, TypeAlias

from . import _core
from ._core import Standing
from ._errors import CheckpointError, RunClaimedError, StoreFailedError, show
from ._postgres_connection import FIRST_LIMIT, Connection, cannot_open, failed, pauses, text_of, verdict
from ._postgres_operations import AGAIN, Append, Claim, Clear, Operation, Release, Start
from ._postgres_sql import SETTINGS

_MOST_BYTES = 16 << 20
"""Of the rows of one statement."""

_PAUSE = 0.005
"""Seconds before something is done again that was in somebody's way."""

_LIMITS = _core.limits_of_runs()

_Answer: TypeAlias = "tuple[Operation, Any]"

_LEFT_OUT = object()
"""Instead of an answer: the statement has not done it."""


class Writer:
    """Does what is submitted; it belongs to the loop that submits first."""

    def __init__(self, dsn: str, schema: str, *, lease: float, beat: float, batch: int) -> None:
        self._dsn = dsn
        self._schema = schema
        self._lease = lease
        self._beat = beat
        self._batch = batch
        self._process = os.getpid()
        self._waiting: deque[Operation] = deque()
        self._under_way: list[Operation] = []
        self._news: asyncio.Future[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self._is_closed = False
        self._next_beat = 0.0
        self._alive_until = math.inf  # by the clock of the loop: the database counts from a moment that is later
        self._newest_fence = 0
        self.lost_fence = 0
        """The newest of those that were lost with the lease."""
        self.owner = _new_owner()
        self.is_connected = False
        """Whether it ever was."""

    def about(self, workflow_id: str) -> tuple[str, asyncio.Future[Any], float]:
        """The first arguments of every operation."""
        _core.check_workflow_id(workflow_id)
        self.check_usable()
        loop = asyncio.get_running_loop()
        return workflow_id, loop.create_future(), loop.time() + self._lease

    def check_usable(self) -> None:
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

    def submit(self, operation: Operation) -> asyncio.Future[Any]:
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._work(), name="cano-postgres")
        self._waiting.append(operation)
        self._wake()
        return operation.done

    async def claimed(self, operation: Claim) -> int:
        done = self.submit(operation)
        try:
            fence: int = await done
        except asyncio.CancelledError:
            if done.done() and not done.cancelled() and done.exception() is None:
                self._give_up(operation, done.result())
            raise
        return fence

    def _give_up(self, operation: Claim, fence: int) -> None:
        """Undo a claim that nobody waits for any more."""
        loop = asyncio.get_running_loop()
        done = loop.create_future()
        done.add_done_callback(lambda done: done.exception())  # who took it over in the meantime is welcome to it
        about = operation.workflow_id, done, loop.time() + self._lease
        is_new = isinstance(operation, Start)
        self._waiting.append(Clear(*about, fence) if is_new else Release(*about, fence, stopped=False))
        self._wake()

    def _take(self) -> list[Operation]:
        """What the next turn does."""
        taken: dict[str, Operation] = {}
        later: list[Operation] = []
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

    async def aclose(self) -> None:
        """Do what waits, give up all claims, and disconnect."""
        self._is_closed = True
        self._wake()
        if self._task is not None:
            await self._task

    # --- the task ---

    async def _work(self) -> None:
        """Do what waits until the store is closed, over one connection after the other."""
        try:
            try:
                connection = await self._connect(FIRST_LIMIT)
            except Exception as error:  # noqa: BLE001 - who waits gets it
                self._refuse_all(cannot_open(error, self._dsn))
                self._task = None  # the next operation tries again
                return
            self.is_connected = True
            while (loss := await self._use(connection)) is not None:
                again = await self._connect_again(loss)
                if again is None:
                    return
                connection = again
        except BaseException as error:
            trouble = StoreFailedError(f"the store was ended: {text_of(error)}", reason="closed")
            trouble.__cause__ = error
            self._is_closed = True
            self._refuse_all(trouble)
            raise

    async def _use(self, connection: Connection) -> Exception | None:
        """Do what waits until the store is closed, or the connection is lost: then by what."""
        try:
            await self._serve(connection)
            await self._leave(connection)
        except Exception as error:
            if verdict(error) != "lost":
                raise
            return error
        finally:
            connection.terminate()
        return None

    async def _connect(self, limit: float) -> Connection:
        """A connection whose lease has begun."""
        milliseconds = 1000 * self._patience
        settings = SETTINGS.format(lock_timeout=int(milliseconds / 4), statement_timeout=int(milliseconds * 0.9))
        connection = await Connection.open(self._dsn, self._schema, limit=limit, settings=settings)
        try:
            await self._renew(connection)
            await connection.fetch("FORGET_OWNERS", limit=self._patience)
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
        again = [operation for operation in self._under_way if not operation.is_answered]
        for operation in again:
            operation.is_in_doubt |= operation.is_sent
        self._waiting.extendleft(reversed(again))
        self._under_way = []
        for pause in pauses(self._lease):
            self._expire(error)
            if self._is_closed and not self._waiting:
                return None
            try:
                return await self._connect(self._patience)
            except Exception as again:  # noqa: BLE001 - whatever it is, it may pass
                error = again
            await asyncio.sleep(pause)
        raise AssertionError("the pauses have no end")

    def _expire(self, error: Exception) -> None:
        """Tell those who have waited long enough for a database that is away."""
        now = asyncio.get_running_loop().time()
        is_lost = now >= self._alive_until
        if is_lost:
            self.lost_fence = self._newest_fence
            self.owner = _new_owner()
            self._alive_until = math.inf
        for operation in list(self._waiting):
            if isinstance(operation, Append) and operation.fence is not None and operation.fence <= self.lost_fence:
                operation.refuse(self.lost(operation.workflow_id, operation.row.sequence))
            elif now >= operation.deadline or (is_lost and isinstance(operation, Claim) and operation.is_in_doubt):
                text = f"the database could not be reached for {self._lease:g} s: {text_of(error)}"
                operation.refuse(StoreFailedError(text, operation.workflow_id, operation.sequence(), reason="io"))
        self._waiting = deque(operation for operation in self._waiting if not operation.is_answered)

    def lost(self, workflow_id: str, sequence: int) -> RunClaimedError:
        text = (
            f"run {show(workflow_id)} is lost: the database could not be reached for as long as the lease lasts, "
            f"{self._lease:g} s, and somebody else may have claimed it"
        )
        return RunClaimedError(text, workflow_id, sequence)

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
                await self._wait(loop)

    async def _wait(self, loop: asyncio.AbstractEventLoop) -> None:
        """Until there is something to do, or the next beat is due."""
        self._news = loop.create_future()
        timer = loop.call_at(self._next_beat, _tell, self._news)
        try:
            await self._news
        finally:
            timer.cancel()

    def _wake(self) -> None:
        if self._news is not None:
            _tell(self._news)

    async def _renew(self, connection: Connection) -> None:
        sent = asyncio.get_running_loop().time()
        await connection.fetch(
            "BEAT", self.owner, timedelta(seconds=self._lease), connection.sync, limit=self._patience
        )
        self._alive_until = sent + self._lease
        self._next_beat = sent + self._beat

    async def _leave(self, connection: Connection) -> None:
        """Give up all claims; what fails here is left to the lease."""
        with contextlib.suppress(Exception):
            await connection.fetch("LEAVE_RUNS", self.owner, limit=self._patience)
            await connection.fetch("LEAVE", self.owner, limit=self._patience)
        await connection.close()

    # --- a turn ---

    async def _turn(self, connection: Connection) -> None:
        statements: dict[str, list[Operation]] = {}
        for operation in self._under_way:
            operation.is_sent = False
            statements.setdefault(operation.statement, []).append(operation)
        answers: list[_Answer] = []
        is_synced = True
        for place, (name, operations) in enumerate(statements.items(), 1):
            is_last = place == len(statements)
            done, found = await self._do(connection, name, operations, connection.sync if is_last else "off")
            answers += done + found
            is_synced = is_last and bool(done) and not found
        if answers and not is_synced:  # nothing has waited for the disk
            await self._renew(connection)
        for operation, answer in answers:
            self._answer(operation, answer)
        again = [operation for operation in self._under_way if not operation.is_answered]
        is_stuck = len(again) == len(self._under_way)
        self._under_way = []
        now = asyncio.get_running_loop().time()
        for operation in reversed(again):
            if now < operation.deadline:
                self._waiting.appendleft(operation)
            else:
                text = f"run {show(operation.workflow_id)} was locked by somebody else for {self._lease:g} s"
                operation.refuse(StoreFailedError(text, operation.workflow_id, operation.sequence(), reason="busy"))
        if again and is_stuck:
            await asyncio.sleep(_PAUSE)

    async def _do(
        self, connection: Connection, name: str, operations: list[Operation], sync: str
    ) -> tuple[list[_Answer], list[_Answer]]:
        """Do operations of one kind: what was done, and what was found to have been done before.

        What is refused is told so at once; what is in neither list is to be done again.
        """
        for operation in operations:
            operation.is_sent = True
        try:
            answers = await self._send(connection, name, operations, sync)
        except Exception as error:
            match verdict(error):
                case "lost":
                    raise
                case "again":
                    return [], []
                case "busy" if len(operations) == 1:
                    return [], []
                case "busy" | "refused":
                    return await self._do_each(connection, name, operations, error)
        pairs = list(zip(operations, answers, strict=True))
        left_out = [operation for operation, answer in pairs if answer is _LEFT_OUT]
        found = await self._explain(connection, left_out) if left_out else []
        return [(operation, answer) for operation, answer in pairs if answer is not _LEFT_OUT], found

    async def _do_each(
        self, connection: Connection, name: str, operations: list[Operation], error: Exception
    ) -> tuple[list[_Answer], list[_Answer]]:
        """Find the operation that the database refuses, or that somebody locks out; the others need not suffer for it."""
        done: list[_Answer] = []
        found: list[_Answer] = []
        if len(operations) == 1:
            operations[0].refuse(failed(error, operations[0].workflow_id))
        else:
            for operation in operations:
                one = await self._do(connection, name, [operation], connection.sync)
                done += one[0]
                found += one[1]
        return done, found

    async def _send(self, connection: Connection, name: str, operations: list[Operation], sync: str) -> list[Any]:
        """The answers, in order; `_LEFT_OUT` for what the statement has left out."""
        columns = zip(*[operation.columns() for operation in operations], strict=True)
        limit = self._patience
        answers: list[Any] = [_LEFT_OUT] * len(operations)
        if name == "GREETING":
            return [None] * len(operations)
        if name in ("START", "CLAIM"):
            found = await connection.fetch(name, self.owner, *columns, sync, limit=limit)
            fences = {record["workflow_id"]: record["fence"] for record in found}
            return [fences.get(operation.workflow_id, _LEFT_OUT) for operation in operations]
        limits = () if name in ("CLEAR", "RELEASE") else _LIMITS
        found = await connection.fetch(name, *columns, *limits, sync, limit=limit)
        if name == "CLEAR" and (left_over := [record["run"] for record in found if record["left_over"]]):
            await connection.fetch("CLEAR_ROWS", left_over, limit=limit)
        for record in found:
            answers[record["place"] - 1] = None
        return answers

    async def _explain(self, connection: Connection, operations: list[Operation]) -> list[_Answer]:
        """Say of what was left out why; what was done before is returned."""
        ids, sequences = zip(*[(operation.workflow_id, operation.sequence()) for operation in operations], strict=True)
        records = await connection.fetch("STANDINGS", ids, sequences, limit=self._patience)
        known = {record["place"]: record for record in records}
        found: list[_Answer] = []
        for place, operation in enumerate(operations, 1):
            record = known.get(place)
            try:
                answer = operation.left_out(record and _standing(record), record)
            except CheckpointError as error:
                operation.refuse(error)
                continue
            if answer is not AGAIN:
                found.append((operation, answer))
        return found

    def _answer(self, operation: Operation, answer: Any) -> None:
        if isinstance(operation, Claim):
            self._newest_fence = max(self._newest_fence, answer)
            if operation.done.cancelled():
                self._give_up(operation, answer)
        operation.answer(answer)


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


def _tell(news: asyncio.Future[None]) -> None:
    if not news.done():
        news.set_result(None)


def _new_owner() -> str:
    """A name that says where the owner lives and that nobody had before."""
    return f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(6)}"
