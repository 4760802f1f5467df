"""Whether a checkpoint store does what durable runs rely on.

Each check is a coroutine function of one sentence. It opens one store, or two with the same runs where it is about owners, and
uses ids of its own, so that all checks may share a database. Those about owners are skipped where there is no `start_run`.
"""

from __future__ import annotations

import asyncio
import secrets
import time
import unittest
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeAlias, TypeVar

from cano import CheckpointError, CheckpointRow, RowKind, RunClaimedError, RunConflictError, RunNotFoundError, RunStatus

_E = TypeVar("_E", bound=CheckpointError)
_OpenStore: TypeAlias = "Callable[[], Any]"
_Promise: TypeAlias = "Callable[[Callable[[], Any]], Awaitable[None]]"

_NOW = 1_764_000_000_000
_RUN = bytes(range(16))


class StoreCheck:
    """One promise of a checkpoint store, from `checkpoint_store_suite`.

    Attributes:
        name: The promise in a few words with underscores.
    """

    def __init__(self, promise: _Promise) -> None:
        self.name = getattr(promise, "__name__", "check").strip("_")
        self.__doc__ = promise.__doc__
        self._promise = promise

    async def __call__(self, open_store: Callable[[], Any]) -> None:
        """Check a store.

        Args:
            open_store: Called without arguments, gives the store, or an async context manager that gives it and closes it. A
                check about owners calls it twice and expects two owners of the same runs.

        Raises:
            AssertionError: The store does not keep the promise.
            unittest.SkipTest: The check is about owners, and the store coordinates none.
        """
        await self._promise(open_store)

    def __str__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return f"<StoreCheck {self.name}>"


_CHECKS: list[StoreCheck] = []


def checkpoint_store_suite() -> list[StoreCheck]:
    """The checks that a checkpoint store must pass, each by itself.

    A store of three methods is checked for what these promise; one with ``start_run`` also for what it says about owners.

    Example:
        With pytest and pytest-asyncio, for the store of a module of yours::

            @pytest.mark.parametrize("check", checkpoint_store_suite(), ids=str)
            async def test_my_store(check, tmp_path):
                await check(lambda: MyStore(tmp_path / "runs"))

        >>> from cano import InMemoryCheckpointStore
        >>> async def main():
        ...     for check in checkpoint_store_suite():
        ...         store = InMemoryCheckpointStore()
        ...         await check(store.another_owner)
        >>> asyncio.run(main())
    """
    return list(_CHECKS)


def _check(promise: _Promise) -> _Promise:
    _CHECKS.append(StoreCheck(promise))
    return promise


def _owners(promise: Callable[[Any, Any], Awaitable[None]]) -> Callable[[Any, Any], Awaitable[None]]:
    """A check of two owners of the same runs."""

    async def checked(open_store: _OpenStore) -> None:
        async with _opened(open_store) as store:
            if not hasattr(store, "start_run"):
                raise unittest.SkipTest("the store coordinates no owners: it has no start_run")
            async with _opened(open_store) as other:
                await promise(store, other)

    checked.__name__, checked.__doc__ = promise.__name__, promise.__doc__
    _check(checked)
    return promise


@asynccontextmanager
async def _opened(open_store: _OpenStore) -> AsyncIterator[Any]:
    store = open_store()
    if hasattr(store, "__aenter__"):
        async with store as entered:
            yield entered
    else:
        yield store


def _expect(what: str, found: object, wanted: object) -> None:
    if found != wanted:
        raise AssertionError(f"{what}: wanted {wanted!r}, found {found!r}")


async def _refused(error: type[_E], call: Callable[..., Awaitable[object]], *args: Any, **options: Any) -> _E:
    """The error that a call must raise; it may raise at once, or when it is awaited."""
    try:
        found = await call(*args, **options)
    except error as raised:
        return raised
    except CheckpointError as raised:
        found = raised
    what = f"{getattr(call, '__name__', call)} with {(*args[1:], *options.values())}"
    raise AssertionError(f"{what}: wanted {error.__name__}, found {found!r}")


def _id(name: str) -> str:
    return f"{name}-{secrets.token_hex(8)}"


def _entry(sequence: int, **fields: Any) -> CheckpointRow:
    return _row(sequence, RowKind.StateEntry, **fields)


def _row(sequence: int, kind: RowKind, state: str = "Order.CHARGE", **fields: Any) -> CheckpointRow:
    usual: dict[str, Any] = {"task_id": "charge", "workflow_version": 3, "run_id": _RUN, "recorded_at": _NOW + sequence}
    return CheckpointRow(sequence, kind, state, **usual | fields)


def _finished(sequence: int) -> CheckpointRow:
    return _row(sequence, RowKind.Finished, "Order.DONE", task_id="")


async def _append(store: Any, id_: str, rows: Iterable[CheckpointRow], **fence: int) -> None:
    for row in rows:
        await store.append(id_, row, **fence)


async def _summary(store: Any, id_: str) -> Any:
    found = [run for run in await store.list_runs(limit=1_000_000) if run.id == id_]
    _expect("runs of this id in list_runs", len(found), 1)
    return found[0]


# --- rows ----------------------------------------------------------------------------------------------------------------


@_check
async def _unknown_run_has_no_rows(open_store: _OpenStore) -> None:
    """Loading a run that is not there gives no rows."""
    async with _opened(open_store) as store:
        _expect("rows", list(await store.load_run(_id("unknown"))), [])


@_check
async def _rows_come_back_as_they_were(open_store: _OpenStore) -> None:
    """Every field of every kind of row comes back, an empty blob as empty and none as none."""
    forward = [
        _entry(0, snapshot=b"", fingerprint=2**64 - 1),
        _row(1, RowKind.TimerDue, due_at=_NOW + 60_000, visit=2, attempt=3),
        _row(2, RowKind.StepCursor, output_blob=b"[4096]", next_state="Order.SHIP"),
        _entry(3, state="Bestellung.\u00fcber\u65e5\u672c", is_intent=True, snapshot=bytes(range(256))),
        _row(4, RowKind.CompensationCompletion, output_blob=b"", next_state="Order.SHIP", workflow_version=2**32 - 1),
        _row(5, RowKind.RollbackStarted, output_blob=b'{"type":"OSError"}', recorded_at=0),
        _row(6, RowKind.Compensated, refers_to=4),
        _finished(7),
    ]
    parked = [_entry(0), _row(1, RowKind.NeedsAttention, output_blob=b"why")]
    async with _opened(open_store) as store:
        for rows in (forward, parked):
            id_ = _id("fields")
            await _append(store, id_, rows)
            _expect("rows", list(await store.load_run(id_)), rows)


@_check
async def _duplicate_row_is_refused(open_store: _OpenStore) -> None:
    """A second row of a sequence is a conflict, the first one stays as it is, and the next one is taken."""
    id_, rows = _id("duplicate"), [_entry(0), _entry(1)]
    async with _opened(open_store) as store:
        await store.append(id_, rows[0])
        error = await _refused(RunConflictError, store.append, id_, _entry(0, state="Order.OTHER"))
        _expect("workflow_id of the error", error.workflow_id, id_)
        await store.append(id_, rows[1])
        _expect("rows", list(await store.load_run(id_)), rows)


@_check
async def _ids_never_collide(open_store: _OpenStore) -> None:
    """Ids that differ in anything are different runs; clearing one leaves the others."""
    base = _id("id")
    ids = [base, base + "/", base + " ", base.upper(), base + "%", base + "_", base + "'\"", base + "\u00fc"]
    ids += [base + "u\u0308", base + "\\", base + "\U0001f6d2", base + "x" * (256 - len(base))]
    async with _opened(open_store) as store:
        for number, id_ in enumerate(ids):
            await store.append(id_, _entry(0, visit=number + 1))
        await store.clear(ids[0])
        found = [[row.visit for row in await store.load_run(id_)] for id_ in ids]
        _expect("visits", found, [[], *([number + 1] for number in range(1, len(ids)))])


@_check
async def _clear_forgets_all_rows(open_store: _OpenStore) -> None:
    """After clear a run has no rows and its id begins anew; clearing an unknown run is fine."""
    id_ = _id("clear")
    async with _opened(open_store) as store:
        await _append(store, id_, [_entry(0), _entry(1)])
        await store.clear(id_)
        await store.clear(id_)
        _expect("rows", list(await store.load_run(id_)), [])
        await store.append(id_, _entry(0, attempt=2))
        _expect("rows", list(await store.load_run(id_)), [_entry(0, attempt=2)])


@_check
async def _runs_stay_apart(open_store: _OpenStore) -> None:
    """Sixteen runs that write twelve rows each, at the same time, each find their own."""
    ids = [_id(f"apart-{number}") for number in range(16)]
    logs = {id_: [_entry(place, visit=number + 1) for place in range(12)] for number, id_ in enumerate(ids)}
    async with _opened(open_store) as store:
        await asyncio.gather(*(_append(store, id_, rows) for id_, rows in logs.items()))
        loaded = await asyncio.gather(*(store.load_run(id_) for id_ in ids))
        _expect("rows", {id_: list(rows) for id_, rows in zip(ids, loaded, strict=True)}, logs)


@_check
async def _large_blob_comes_back(open_store: _OpenStore) -> None:
    """A blob of a megabyte comes back as it was."""
    id_, row = _id("large"), _row(0, RowKind.StepCursor, output_blob=secrets.token_bytes(1 << 20))
    async with _opened(open_store) as store:
        await store.append(id_, row)
        _expect("the row is the same", list(await store.load_run(id_)) == [row], wanted=True)


@_check
async def _cursors_may_take_each_others_place(open_store: _OpenStore) -> None:
    """Of cursors that take each other's place the last one comes back; those before it may."""
    id_ = _id("cursors")
    cursors = [_row(1, RowKind.StepCursor, output_blob=b"1")]
    cursors += [_row(n, RowKind.StepCursor, output_blob=b"%d" % n, refers_to=1) for n in range(2, 6)]
    async with _opened(open_store) as store:
        await _append(store, id_, [_entry(0), *cursors, _entry(6)])
        rows = list(await store.load_run(id_))
        kept = [row for row in rows if row.kind is not RowKind.StepCursor]
        _expect("rows that are no cursors", kept, [_entry(0), _entry(6)])
        _expect("the last cursor", [row for row in rows if row in cursors][-1:], cursors[-1:])
        _expect("rows that were never written", [row for row in rows if row not in [*kept, *cursors]], [])


@_check
async def _cancelled_append_is_done_or_not(open_store: _OpenStore) -> None:
    """An append whose caller is cancelled is done as a whole or not at all, and the store goes on."""
    id_ = _id("cancelled")
    async with _opened(open_store) as store:
        append = asyncio.ensure_future(store.append(id_, _entry(0)))
        await asyncio.sleep(0)
        append.cancel()
        await asyncio.wait([append])
        with suppress(RunConflictError):
            await store.append(id_, _entry(0))
        await store.append(id_, _entry(1))
        _expect("rows", list(await store.load_run(id_)), [_entry(0), _entry(1)])


# --- owners --------------------------------------------------------------------------------------------------------------


@_owners
async def _started_run_is_claimed(store: Any, other: Any) -> None:
    """A run that was started is its owner's, and so it is listed; nobody can start or claim it, its owner included."""
    id_ = _id("started")
    fence = await store.start_run(id_, workflow="order", version=7)
    _expect("the fence is an int", type(fence), int)
    run = await _summary(other, id_)
    _expect("workflow, version, status", (run.workflow, run.version, run.status), ("order", 7, RunStatus.Running))
    for someone in (store, other):
        errors = [await _refused(RunClaimedError, someone.start_run, id_, workflow="order", version=7)]
        errors += [await _refused(RunClaimedError, someone.claim, id_)]
        _expect("owners of the errors", [error.owner for error in errors], [run.owner] * 2)
    await store.append(id_, _entry(0), fence=fence)
    _expect("rows", list(await other.load_run(id_)), [_entry(0)])


@_owners
async def _unknown_run_cannot_be_claimed(store: Any, _other: Any) -> None:
    """A run that is not there cannot be claimed, written with a fence, or released."""
    id_ = _id("unknown")
    await _refused(RunNotFoundError, store.claim, id_)
    await _refused(RunNotFoundError, store.append, id_, _entry(0), fence=1)
    await _refused(RunNotFoundError, store.release, id_, 1)
    _expect("rows", list(await store.load_run(id_)), [])


@_owners
async def _lost_claim_changes_nothing(store: Any, other: Any) -> None:
    """Whoever lost a run to another owner can neither write nor clear nor release it."""
    id_ = _id("lost")
    old = await store.start_run(id_, workflow="order", version=1)
    await store.append(id_, _entry(0), fence=old)
    await store.release(id_, old)
    await _refused(RunClaimedError, store.append, id_, _entry(1), fence=old)
    new = await other.claim(id_)
    _expect("the fences differ", new != old, wanted=True)
    await _refused(RunClaimedError, store.append, id_, _entry(1), fence=old)
    await _refused(RunClaimedError, store.append, id_, _entry(0), fence=old)
    await _refused(RunClaimedError, store.append, id_, _entry(1))
    await _refused(RunClaimedError, store.clear, id_, fence=old)
    await _refused(RunClaimedError, store.clear, id_)
    await _refused(RunClaimedError, store.release, id_, old)
    await other.append(id_, _entry(1), fence=new)
    _expect("rows", list(await store.load_run(id_)), [_entry(0), _entry(1)])


@_owners
async def _fence_is_never_drawn_twice(store: Any, other: Any) -> None:
    """The fence of a run that was forgotten is out of date for the next run of its id."""
    id_ = _id("fence")
    old = await store.start_run(id_, workflow="order", version=1)
    await store.clear(id_, fence=old)
    new = await other.start_run(id_, workflow="order", version=1)
    _expect("the fences differ", new != old, wanted=True)
    await _refused(RunClaimedError, store.append, id_, _entry(0), fence=old)
    await other.append(id_, _entry(0), fence=new)


@_owners
async def _left_over_run_cannot_be_started(store: Any, other: Any) -> None:
    """A run that is nobody's is not begun again: it is a conflict that says how far it is."""
    id_ = _id("left-over")
    fence = await store.start_run(id_, workflow="order", version=1)
    await store.append(id_, _entry(0), fence=fence)
    await store.release(id_, fence, stopped=True)
    error = await _refused(RunConflictError, other.start_run, id_, workflow="order", version=1)
    _expect("status of the error", error.status, RunStatus.Stopped)
    _expect("rows", list(await other.load_run(id_)), [_entry(0)])


@_owners
async def _stopped_run_goes_on_when_claimed(store: Any, other: Any) -> None:
    """A run that was given up as stopped is listed so, and runs again once it is claimed."""
    id_ = _id("stopped")
    fence = await store.start_run(id_, workflow="order", version=1)
    await store.append(id_, _entry(0), fence=fence)
    await store.release(id_, fence, stopped=True)
    run = await _summary(other, id_)
    _expect("status and owner", (run.status, run.owner), (RunStatus.Stopped, None))
    await _refused(RunClaimedError, store.append, id_, _entry(1), fence=fence)
    fence = await other.claim(id_)
    _expect("status", (await _summary(store, id_)).status, RunStatus.Running)
    await other.append(id_, _entry(1), fence=fence)


@_owners
async def _roll_back_goes_on_when_claimed(store: Any, other: Any) -> None:
    """A run that rolls back does so under its next owner, too, and ends as rolled back."""
    id_ = _id("roll-back")
    fence = await store.start_run(id_, workflow="order", version=1)
    await _append(store, id_, [_entry(0), _row(1, RowKind.RollbackStarted, output_blob=b"{}")], fence=fence)
    await store.release(id_, fence, stopped=True)
    _expect("status", (await _summary(store, id_)).status, RunStatus.RollingBack)
    fence = await other.claim(id_)
    await _refused(RunConflictError, other.append, id_, _entry(2), fence=fence)
    await _append(other, id_, [_row(2, RowKind.Compensated, refers_to=0), _finished(3)], fence=fence)
    run = await _summary(store, id_)
    _expect("status and owner", (run.status, run.owner), (RunStatus.RolledBack, None))


@_owners
async def _end_gives_up_the_claim(store: Any, other: Any) -> None:
    """A run that has ended is nobody's, cannot be claimed, begun or written, and is cleared with its last fence."""
    ends = [
        (_finished(1), RunStatus.Finished),
        (_row(1, RowKind.NeedsAttention, output_blob=b"why"), RunStatus.NeedsAttention),
    ]
    for end, status in ends:
        id_ = _id("ended")
        fence = await store.start_run(id_, workflow="order", version=1)
        await _append(store, id_, [_entry(0), end], fence=fence)
        run = await _summary(other, id_)
        _expect("status, owner, state", (run.status, run.owner, run.state), (status, None, end.state))
        error = await _refused(RunConflictError, other.claim, id_)
        _expect("status of the error", error.status, status)
        await _refused(RunConflictError, store.start_run, id_, workflow="order", version=1)
        await _refused(RunConflictError, store.append, id_, _entry(2), fence=fence)
        await store.clear(id_, fence=fence)
        _expect("rows", list(await other.load_run(id_)), [])


@_owners
async def _repeated_append_is_told_apart(store: Any, _other: Any) -> None:
    """A row that is sent again is a conflict that says so, also when it was the last one; a different row is not the same."""
    id_ = _id("again")
    fence = await store.start_run(id_, workflow="order", version=1)
    await _append(store, id_, [_entry(0), _finished(1)], fence=fence)
    for row, is_same in ((_entry(0), True), (_entry(0, attempt=2), False), (_finished(1), True)):
        error = await _refused(RunConflictError, store.append, id_, row, fence=fence)
        _expect("is_same and sequence", (error.is_same, error.sequence), (is_same, row.sequence))


@_owners
async def _rows_follow_each_other(store: Any, _other: Any) -> None:
    """A row with a gap before it, out of place, or in the place of no cursor is a conflict, and changes nothing."""
    id_ = _id("order")
    fence = await store.start_run(id_, workflow="order", version=1)
    await store.append(id_, _entry(0), fence=fence)
    wrong = [
        _entry(2),
        _row(1, RowKind.Compensated, refers_to=0),
        _row(1, RowKind.StepCursor, output_blob=b"", refers_to=0),
    ]
    for row in wrong:
        await _refused(RunConflictError, store.append, id_, row, fence=fence)
    _expect("rows", list(await store.load_run(id_)), [_entry(0)])


@_owners
async def _one_of_many_wins(store: Any, other: Any) -> None:
    """Of those who start one id at once, one has it, and so of those who claim it."""
    id_ = _id("race")

    async def start(owner: Any) -> tuple[Any, int] | None:
        try:
            return owner, await owner.start_run(id_, workflow="order", version=1)
        except (RunClaimedError, RunConflictError):
            return None

    async def claim(owner: Any) -> tuple[Any, int] | None:
        try:
            return owner, await owner.claim(id_)
        except RunClaimedError:
            return None

    for attempt in (start, claim):
        wins = [win for win in await asyncio.gather(*map(attempt, [store, other] * 4)) if win]
        _expect(f"how many won by {attempt.__name__}", len(wins), 1)
        [(winner, fence)] = wins
        await winner.release(id_, fence)


@_owners
async def _runs_are_listed(store: Any, other: Any) -> None:
    """Runs are listed by status and age, the longest untouched first, at most as many as asked for."""
    now, snapshot = time.time_ns() // 1_000_000, bytes(100)
    old, stopped, young = (_id(name) for name in ("list-old", "list-stopped", "list-young"))
    for id_, end in ((old, None), (stopped, True), (young, False)):
        fence = await store.start_run(id_, workflow="order", version=1)
        await store.append(id_, _entry(0, workflow_version=2, snapshot=snapshot, recorded_at=now), fence=fence)
        if end is not None:
            await store.release(id_, fence, stopped=end)

    async def listed(**filters: Any) -> list[str]:
        return [run.id for run in await other.list_runs(limit=1_000_000, **filters) if run.id in (old, stopped, young)]

    _expect("all", set(await listed()), {old, stopped, young})
    _expect("stopped", await listed(status=RunStatus.Stopped), [stopped])
    _expect("running", set(await listed(status=RunStatus.Running)), {old, young})
    _expect("two kinds", set(await listed(status=[RunStatus.Running, RunStatus.Stopped])), {old, stopped, young})
    _expect("none", await listed(status=[]), [])
    _expect("older than a day", await listed(older_than=86_400), [])
    _expect("the number of runs", len(await other.list_runs(limit=1)), 1)
    run = await _summary(other, young)
    _expect("workflow, version, state", (run.workflow, run.version, run.state), ("order", 2, "Order.CHARGE"))
    _expect("rows", run.rows, 1)
    _expect("at least the bytes of the snapshot", run.bytes > len(snapshot), wanted=True)


@_check
async def _closing_gives_up_claims(open_store: _OpenStore) -> None:
    """A store that is closed gives up its claims, and refuses everything after."""
    id_ = _id("closed")
    async with _opened(open_store) as other:
        if not hasattr(other, "start_run"):
            raise unittest.SkipTest("the store coordinates no owners: it has no start_run")
        async with _opened(open_store) as store:
            fence = await store.start_run(id_, workflow="order", version=1)
            await store.append(id_, _entry(0), fence=fence)
        await _refused(CheckpointError, store.append, id_, _entry(1), fence=fence)
        fence = await other.claim(id_)
        await other.append(id_, _entry(1), fence=fence)
