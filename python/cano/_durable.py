"""Durable runs: who owns one, what is checked before it goes on, and how it leaves its log.

The rows themselves are written by the driver (`Log`). Everything here happens once per run: it is claimed, read, and at the
end cleared, or given up so that it can be resumed. A store's answer is always waited for, whatever is cancelled meanwhile:
only then is it known what the store holds.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Hashable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeVar

from . import _core
from ._checkpoints import RunStatus
from ._codec import Codec, decoded, encoded
from ._core import CheckpointRow
from ._errors import (
    CheckpointError,
    ConfigurationError,
    NeedsAttentionError,
    RunClaimedError,
    RunConflictError,
    RunNotFoundError,
    UnknownStateError,
    WorkflowVersionError,
    show,
)
from ._log import settled, written

if TYPE_CHECKING:
    from ._workflow import Workflow

S = TypeVar("S", bound=Hashable)
T = TypeVar("T")

_log = logging.getLogger("cano")

Migration: TypeAlias = Callable[[CheckpointRow], CheckpointRow]
"""A row of another version or definition, as the present one would have written it."""

RECOVERY_LIMIT = 10
"""How often a visit to a state is begun before the run is parked."""


class Definition(NamedTuple):
    """What a durable run has to know of its workflow."""

    name: str
    version: int
    fingerprint: int
    codec: Codec
    cursors: dict[str, tuple[str, Any]]
    """The task and the annotation of the cursor, of each state whose task has one."""
    outputs: dict[str, tuple[str, Any]]
    """The same of the outputs of those that can be undone."""
    data: type[Any] | None
    migrate: Migration | None
    recovery_limit: int

    def differs(self, row: CheckpointRow) -> bool:
        """Whether a row was written by another version or definition."""
        return (row.workflow_version, row.fingerprint) != (self.version, self.fingerprint)

    def log(self, ownership: Ownership, data: object, resumed: _core.Resumed | None = None) -> _core.Log:
        """The log of a run that begins, or goes on."""
        cursor = None
        if resumed is not None and resumed.position == "again":
            cursor = self.decode_cursor(resumed.state, resumed.blob)
        run_id = os.urandom(16) if resumed is None else resumed.run_id
        return _core.Log(
            ownership.store,
            ownership.workflow_id,
            self,
            None if self.data is None else partial(encoded, self.codec, "the run data", data, self.data),
            run_id,
            self.version,
            self.fingerprint,
            resumed,
            cursor,
        )

    def stored_data(self, resumed: _core.Resumed) -> object:
        """The run's own variables, as they were when the state was entered."""
        if self.data is None or resumed.snapshot is None:
            return None
        return decoded(self.codec, "the run data", resumed.snapshot, self.data)

    def encode_cursor(self, state: str, cursor: object) -> bytes:
        task, type_ = self.cursors[state]
        return encoded(self.codec, f"the cursor of task {task} in state {state}", cursor, type_)

    def encode_output(self, state: str, output: object) -> bytes:
        task, type_ = self.outputs[state]
        return encoded(self.codec, f"the output of task {task} in state {state}", output, type_)

    def decode_cursor(self, state: str, data: bytes | None) -> Any:
        if data is None or state not in self.cursors:
            return None
        task, type_ = self.cursors[state]
        return decoded(self.codec, f"the cursor of task {task} in state {state}", data, type_)


def fingerprint(parts: object) -> int:
    """A digest of a definition, for those who compare it."""
    from hashlib import blake2b  # noqa: PLC0415 - it brings OpenSSL along, which only durable runs need

    return int.from_bytes(blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


class Ownership:
    """A run of a store, from its claim to the moment when it is let go."""

    def __init__(self, store: Any, workflow_id: str) -> None:
        self.store = store
        self.workflow_id = workflow_id
        self._fence: dict[str, int] = {}
        self._coordinates = hasattr(store, "start_run")

    async def start(self, definition: Definition) -> None:
        """Claim a run that is not there yet."""
        store, workflow_id = self.store, self.workflow_id
        if self._coordinates:
            claim = store.start_run(workflow_id, workflow=definition.name, version=definition.version)
            await self._hold(claim)
        elif await settled(store.load_run(workflow_id)):
            raise RunConflictError(f"run {show(workflow_id)} is there already: resume or discard it", workflow_id)

    async def claim(self) -> None:
        """Claim a run that is there."""
        if self._coordinates:
            await self._hold(self.store.claim(self.workflow_id))

    async def _hold(self, claim: Awaitable[int]) -> None:
        """Keep the fence of a claim, also where a cancel goes on: whoever leaves gives up what it has."""
        answer = asyncio.ensure_future(claim)
        try:
            await settled(answer)
        finally:
            if not answer.cancelled() and answer.exception() is None:
                self._fence["fence"] = answer.result()

    async def load_any(self) -> list[CheckpointRow]:
        """The rows of the run; there is at least one."""
        rows = await settled(self.store.load_run(self.workflow_id))
        if not rows:
            await self.forget()  # it was claimed and never begun
            self._fence.clear()
            raise RunNotFoundError(f"there is no run {show(self.workflow_id)}", self.workflow_id)
        return list(rows)

    def own(self, log: _core.Log) -> None:
        """Have the run write under the claim."""
        if self._fence:
            log.owned(self._fence["fence"])

    async def forget(self) -> None:
        """Forget the run, which is over; it is over all the same if the store cannot (CK-027)."""
        await self._let_go("cleared", partial(self.store.clear, self.workflow_id, **self._fence))

    async def forget_claim(self) -> None:
        """Forget a run that was claimed, if it was, and never begun."""
        if self._fence:
            await self.forget()

    async def release(self, *, stopped: bool) -> None:
        """Give the run up, so that it can be resumed: by anyone, or if it has stopped by who asks for it only."""
        if self._fence:
            release = partial(self.store.release, self.workflow_id, self._fence["fence"], stopped=stopped)
            await self._let_go("released", release)

    async def _let_go(self, done: str, act: Callable[[], Awaitable[None]]) -> None:
        try:
            await settled(act())
        except RunClaimedError:
            _log.warning("run %s was taken over by somebody else meanwhile", show(self.workflow_id))
        except Exception:  # noqa: BLE001 - whatever a store raises: the run has ended already
            _log.exception("the log of run %s could not be %s", show(self.workflow_id), done)


async def begin(definition: Definition, ownership: Ownership, log: _core.Log, body: Callable[[], Awaitable[S]]) -> S:
    """A fresh run, from its claim to the end of its log."""
    try:
        await ownership.start(definition)
    except asyncio.CancelledError:
        await ownership.forget_claim()
        raise
    ownership.own(log)
    return await _carried_through(ownership, log, body)


async def resume(
    definition: Definition,
    ownership: Ownership,
    table: _core.Table,
    launch: Callable[[Any, _core.Log, _core.Resumed, Any], Awaitable[S]],
) -> S:
    """A run that is there, from where its rows say; `launch` makes the run that goes on."""
    workflow_id = ownership.workflow_id
    over: RunConflictError | None = None
    try:
        try:
            await ownership.claim()
        except RunConflictError as error:
            over = error
        resumed = _read(definition, await ownership.load_any(), workflow_id, table)
        state: S = _state(table, workflow_id, resumed.state)
        if resumed.position == "finished":
            await ownership.forget()
            return state
        _check_open(workflow_id, resumed, over)
        data = definition.stored_data(resumed)
        log = definition.log(ownership, data, resumed)
        ownership.own(log)
        await _check_starts(definition, log, workflow_id, resumed)
    except BaseException:
        await ownership.release(stopped=False)
        raise
    return await _carried_through(ownership, log, lambda: launch(state, log, resumed, data))


async def _carried_through(ownership: Ownership, log: _core.Log, body: Callable[[], Awaitable[S]]) -> S:
    """Run, and let the log go as the run has ended."""
    try:
        state = await body()
    except GeneratorExit:  # closed from outside: nothing can be awaited any more
        raise
    except BaseException as error:
        if log.is_lost:
            await ownership.release(stopped=True)  # refused if it is somebody else's by now
        elif log.next == 0 or log.is_rolled_back:
            await ownership.forget()
        elif not log.is_over:  # what failed for the store's sake is anybody's to go on with
            await ownership.release(stopped=not isinstance(error, CheckpointError))
        raise
    if log.unclosed is None:
        await ownership.forget()
    else:
        _log.error("run %s has finished; its log was not closed", show(ownership.workflow_id), exc_info=log.unclosed)
        await ownership.release(stopped=True)
    return state


def _read(definition: Definition, rows: list[CheckpointRow], workflow_id: str, table: _core.Table) -> _core.Resumed:
    """What the rows say, once it is sure that they are rows of this workflow."""
    rows = sorted(rows, key=lambda row: row.sequence)
    if definition.migrate is not None:
        rows = [_migrated(definition.migrate, row) if definition.differs(row) else row for row in rows]
        return _core.Resumed(workflow_id, rows, table.passing)
    newest = rows[-1]
    if newest.workflow_version != definition.version:
        raise WorkflowVersionError(
            f"run {show(workflow_id)} was begun by version {newest.workflow_version} of workflow {definition.name}, "
            f"which is version {definition.version} now; with_migration() says how its rows are to be read",
            workflow_id,
            newest.workflow_version,
            definition.version,
        )
    if definition.differs(newest):
        raise WorkflowVersionError(
            f"run {show(workflow_id)} was begun by another definition of workflow {definition.name}, version "
            f"{definition.version}; give it another version, and with_migration() says how the rows are to be read",
            workflow_id,
            newest.workflow_version,
            definition.version,
        )
    return _core.Resumed(workflow_id, rows, table.passing)


def _migrated(migrate: Migration, row: CheckpointRow) -> CheckpointRow:
    new = migrate(row)
    if getattr(new, "sequence", None) != row.sequence:
        raise ConfigurationError(f"a migration must return the row in its new form, got {show(new)}")
    return new


def _state(table: _core.Table, workflow_id: str, label: str) -> Any:
    try:
        return table.labels[label]
    except KeyError:
        raise UnknownStateError(
            f"run {show(workflow_id)} is in state {show(label)}, which is not a registered or exit state"
        ) from None


def _check_open(workflow_id: str, resumed: _core.Resumed, over: RunConflictError | None) -> None:
    """Refuse to go on with a run that is over."""
    if resumed.position == "needs attention":
        why = (resumed.blob or b"").decode(errors="replace")
        raise NeedsAttentionError(f"run {show(workflow_id)} needs attention: {show(why)}", workflow_id)
    if resumed.position == "rolled back":
        raise RunConflictError(
            f"run {show(workflow_id)} has failed and everything was undone; discard it",
            workflow_id,
            None,
            None if over is None else over.status,
        )
    if over is not None:
        raise over


async def _check_starts(definition: Definition, log: _core.Log, workflow_id: str, resumed: _core.Resumed) -> None:
    """Park a run whose state was begun too often."""
    if resumed.position != "again" or resumed.start <= definition.recovery_limit:
        return
    why = f"state {resumed.state} was begun {resumed.start - 1} times and never ended"
    await written(log, log.needs_attention(why.encode()))
    raise NeedsAttentionError(f"run {show(workflow_id)} is parked: {why}", workflow_id)


async def recover_all(workflow: Workflow[S], store: Any, *, limit: int = 1000) -> dict[str, S | Exception]:
    """Go on with all runs of a workflow that nobody goes on with, as a service does when it starts.

    Those are the runs whose process was killed, and those that were given up for somebody else; not those that have failed
    or were cancelled, nor those that need attention. A run that somebody else claims first is left to them. Of a run that is
    over, but whose process was killed before its rows were cleared, they are cleared now.

    Args:
        workflow: A workflow whose name is that of the runs.
        store: Where they are; it has ``list_runs``. The workflow's own store may be another.
        limit: How many runs are listed at most, those first that were untouched for longest.

    Returns:
        By the run's id the exit state that it reached, or the error that it ended with: a `RunConflictError` if it was rolled
        back already.

    Raises:
        ConfigurationError: `workflow` is none, `store` cannot list, or `limit` is no int of 1 or more.

    Cancellation: every run is cancelled and awaited.

    Example:
        >>> import asyncio
        >>> from cano import InMemoryCheckpointStore, Workflow
        >>> workflow = Workflow[str](name="orders").register("start", lambda: "done").add_exit_state("done")
        >>> asyncio.run(recover_all(workflow, InMemoryCheckpointStore()))
        {}
    """
    if not hasattr(workflow, "resume_from"):
        raise ConfigurationError(f"workflow must be a Workflow, got {show(workflow)}")
    if not hasattr(store, "list_runs"):
        raise ConfigurationError(f"store must be one that lists its runs, got {show(store)}")
    statuses = (RunStatus.Running, RunStatus.RollingBack, RunStatus.Finished, RunStatus.RolledBack)
    listed = await settled(store.list_runs(status=statuses, limit=limit))
    mine = [run.id for run in listed if run.workflow == workflow.name]
    outcomes: dict[str, S | Exception] = {}

    async def recover(workflow_id: str) -> None:
        try:
            outcomes[workflow_id] = await workflow._resume(workflow_id, store)
        except (RunClaimedError, RunNotFoundError):
            pass  # somebody else goes on with it, or has ended it
        except Exception as error:  # noqa: BLE001 - the caller gets each run's own error
            outcomes[workflow_id] = error
            if isinstance(error, RunConflictError) and error.status is RunStatus.RolledBack:
                await Ownership(store, workflow_id).forget()

    async with asyncio.TaskGroup() as group:
        for workflow_id in mine:
            group.create_task(recover(workflow_id))
    return outcomes
