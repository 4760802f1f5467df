"""What is asked of `PostgresCheckpointStore`: the arguments of each operation, and why one was left out.

A statement does many operations at once and leaves out what may not be done. Why it may not is asked of `core::claim`, with
what the database then has of the run; it may also be that the operation was done before and its answer was lost, or that
what was in its way has gone.
"""

import asyncio
import secrets
from typing import Any

from . import _core
from ._checkpoints import RowKind
from ._core import CheckpointRow, Standing
from ._errors import RunConflictError, RunNotFoundError, show

_AFTER = {(status, kind): after for status, kind, after in _core.rules_of_claims()}

AGAIN = object()
"""What an operation answers that was left out and may be done: something was in the way that has gone."""


class Operation:
    """Something to be written."""

    __slots__ = ("deadline", "done", "is_answered", "is_in_doubt", "is_sent", "workflow_id")

    statement: str
    size: int = 0

    def __init__(self, workflow_id: str, done: asyncio.Future[Any], deadline: float) -> None:
        self.workflow_id = workflow_id
        self.done = done
        self.deadline = deadline
        """From when it waits no longer for a database that is away."""
        self.is_answered = False
        self.is_sent = False
        """Whether it was, in this turn."""
        self.is_in_doubt = False
        """Whether it was sent, and the answer was lost."""

    def columns(self) -> tuple[object, ...]:
        """Its part of the arrays of its statement."""
        raise NotImplementedError

    def left_out(self, standing: Standing | None, found: Any) -> object:
        """Its answer after it was left out: raises why; `AGAIN`; or what it got when it was sent before."""
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


class Greeting(Operation):
    """Answered as soon as there is a connection."""

    __slots__ = ()
    statement = "GREETING"

    def columns(self) -> tuple[object, ...]:
        return ()


class Claim(Operation):
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
        return AGAIN

    def is_mine(self, found: Any) -> bool:
        return bool(found["ticket"] == self.ticket and found["owner"] is not None)


class Start(Claim):
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
            return AGAIN
        if self.is_mine(found):
            return found["fence"]
        standing.start(found["now"])
        return AGAIN


class Append(Operation):
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
            return AGAIN
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
        return AGAIN


class Release(Operation):
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
        return AGAIN


class Clear(Operation):
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
        return AGAIN


def _readable(text: str) -> str:
    """PostgreSQL keeps every text but those with a zero; the bytes of the row have what it was."""
    return text.replace("\0", "\N{SYMBOL FOR NULL}")
