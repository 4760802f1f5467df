"""The public suite for checkpoint stores: every store of ours passes it, and a store that breaks a promise does not."""

import asyncio
import unittest

import pytest

from cano import CheckpointError, CheckpointRow, InMemoryCheckpointStore, RunConflictError, SqliteCheckpointStore
from cano.testing import checkpoint_store_suite


class DictStore:
    """A store of one's own, with the three methods that are enough."""

    def __init__(self):
        self.runs = {}

    async def append(self, workflow_id, row):
        rows = self.runs.setdefault(workflow_id, {})
        if row.sequence in rows:
            raise RunConflictError(f"run {workflow_id} has row {row.sequence} already", workflow_id, row.sequence)
        rows[row.sequence] = row.encode(workflow_id)

    async def load_run(self, workflow_id):
        rows = sorted(self.runs.get(workflow_id, {}).items())
        return [CheckpointRow.decode(workflow_id, sequence, data) for sequence, data in rows]

    async def clear(self, workflow_id):
        self.runs.pop(workflow_id, None)


def sqlite(path):
    return lambda: SqliteCheckpointStore(path / "runs.db")


def memory(_path):
    return InMemoryCheckpointStore().another_owner


@pytest.mark.parametrize("check", checkpoint_store_suite(), ids=str)
@pytest.mark.parametrize("kind", [sqlite, memory], ids=["SqliteCheckpointStore", "InMemoryCheckpointStore"])
async def test_our_stores_pass(kind, check, tmp_path):
    """Each store of ours passes each check."""
    await check(kind(tmp_path))


@pytest.mark.parametrize("check", checkpoint_store_suite(), ids=str)
async def test_store_of_three_methods(check):
    """A store of one's own passes what three methods promise; what is about owners is skipped."""
    store = DictStore()

    if check in OWNERS:
        with pytest.raises(unittest.SkipTest, match="the store coordinates no owners: it has no start_run"):
            await check(lambda: store)
    else:
        await check(lambda: store)


OWNERS = checkpoint_store_suite()[9:]


class Overwrites(DictStore):
    async def append(self, workflow_id, row):
        self.runs.setdefault(workflow_id, {})[row.sequence] = row.encode(workflow_id)


class MixesIds(DictStore):
    async def append(self, workflow_id, row):
        await super().append(workflow_id.casefold(), row)

    async def load_run(self, workflow_id):
        return await super().load_run(workflow_id.casefold())


class KeepsRows(DictStore):
    async def clear(self, workflow_id):
        pass


class RefusesUnknown(DictStore):
    async def load_run(self, workflow_id):
        return await super().load_run(workflow_id) if workflow_id in self.runs else None


class ForgetsFields(DictStore):
    async def append(self, workflow_id, row):
        await super().append(workflow_id, CheckpointRow(row.sequence, row.kind, row.state, **self.fields(row)))

    def fields(self, row):
        names = (
            "task_id",
            "visit",
            "attempt",
            "workflow_version",
            "fingerprint",
            "run_id",
            "recorded_at",
            "next_state",
        )
        names += ("refers_to", "due_at", "is_intent", "output_blob")
        return {name: getattr(row, name) for name in names}


class HalfDone(DictStore):
    """Between the two steps of an append a cancel can come in."""

    async def append(self, workflow_id, row):
        if row.sequence in self.runs.setdefault(workflow_id, {}):
            raise RunConflictError("no", workflow_id, row.sequence)
        self.runs[workflow_id][row.sequence] = b"half"
        await asyncio.sleep(0)
        self.runs[workflow_id][row.sequence] = row.encode(workflow_id)


class Wrapped:
    """A store of ours of which one method does something else."""

    def __init__(self, store, **methods):
        self.store = store
        self.methods = methods

    def __getattr__(self, name):
        if name in self.methods:
            return lambda *args, **options: self.methods[name](self.store, *args, **options)
        return getattr(self.store, name)

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_error):
        await self.store.aclose()


async def constant_fence(store, workflow_id, **options):
    await store.start_run(workflow_id, **options)
    return 1


async def append_without_fence(store, workflow_id, row, *, fence=None):  # the newest fence will do
    run = [run for run in await store.list_runs() if run.id == workflow_id]
    if fence is not None and run and run[0].owner == store.owner:
        return
    await store.append(workflow_id, row, fence=fence)


async def release_as_running(store, workflow_id, fence, *, stopped=False):
    await store.release(workflow_id, fence)


async def list_everything(store, **_filters):
    return await store.list_runs()


async def say_not_the_same(store, workflow_id, row, *, fence=None):
    try:
        await store.append(workflow_id, row, fence=fence)
    except RunConflictError as error:
        raise RunConflictError(str(error), error.workflow_id, error.sequence, error.status) from error


@pytest.mark.parametrize(
    ("open_store", "broken"),
    [
        pytest.param(Overwrites, "duplicate_row_is_refused", id="overwrites"),
        pytest.param(MixesIds, "ids_never_collide", id="mixes ids"),
        pytest.param(KeepsRows, "clear_forgets_all_rows", id="keeps rows"),
        pytest.param(RefusesUnknown, "unknown_run_has_no_rows", id="has no unknown run"),
        pytest.param(ForgetsFields, "rows_come_back_as_they_were", id="forgets fields"),
        pytest.param(HalfDone, "cancelled_append_is_done_or_not", id="is half done"),
        pytest.param({"start_run": constant_fence}, "fence_is_never_drawn_twice", id="does not draw fences"),
        pytest.param({"append": append_without_fence}, "rows_follow_each_other", id="writes nothing"),
        pytest.param({"release": release_as_running}, "stopped_run_goes_on_when_claimed", id="knows no stopped run"),
        pytest.param({"list_runs": list_everything}, "runs_are_listed", id="does not filter"),
        pytest.param({"append": say_not_the_same}, "repeated_append_is_told_apart", id="cannot tell rows apart"),
    ],
)
async def test_broken_store_is_found(open_store, broken):
    """A store that breaks a promise fails the check that is about it."""
    if isinstance(open_store, dict):
        methods, first = open_store, InMemoryCheckpointStore()
        open_store = lambda: Wrapped(first.another_owner(), **methods)  # noqa: E731
    [check] = [check for check in checkpoint_store_suite() if check.name == broken]

    with pytest.raises((AssertionError, CheckpointError, TypeError)):
        await check(open_store)
