"""A process that shares a PostgreSQL store with others; `test_postgres_store` starts it and reads what it prints.

work DSN SCHEMA LEASE RUNS    starts so many runs and adds rows to each until it is killed or has lost it
claim DSN SCHEMA ID           waits for a line, then claims the run
start DSN SCHEMA ID           waits for a line, then starts the run, in a schema that may not be there yet
"""

from __future__ import annotations

import asyncio
import sys

from cano import (
    CheckpointRow,
    PostgresCheckpointStore,
    RowKind,
    RunClaimedError,
    RunConflictError,
    RunContext,
    Workflow,
    recover_all,
)


def say(*words: object) -> None:
    print(*words, flush=True)  # noqa: T201 - the test reads it


async def add_rows(store: PostgresCheckpointStore, workflow_id: str) -> None:
    fence = await store.start_run(workflow_id, workflow="work", version=1)
    for sequence in range(1_000_000):
        row = CheckpointRow(sequence, RowKind.StateEntry, "WORK", attempt=sequence + 1)
        try:
            await store.append(workflow_id, row, fence=fence)
        except RunClaimedError:
            say("lost", workflow_id, sequence)
            return
        say("added", workflow_id, sequence)
        await asyncio.sleep(0.01)


async def work(dsn: str, schema: str, lease: str, runs: str) -> None:
    async with PostgresCheckpointStore(dsn, schema=schema, lease=float(lease)) as store, asyncio.TaskGroup() as group:
        for number in range(int(runs)):
            group.create_task(add_rows(store, f"run-{number}"))


STEPS = 5


def workflow(store: PostgresCheckpointStore) -> Workflow[str]:
    """A chain of steps; each says that it has begun, in which run and under which key."""
    chain = Workflow[str](name="chain").with_checkpoint_store(store)
    for number in range(STEPS):

        async def step(context: RunContext, number: int = number) -> str:
            say("step", context.workflow_id, number, context.idempotency_key)
            await asyncio.sleep(0.02)
            return f"step-{number + 1}"

        chain.register(f"step-{number}", step)
    return chain.add_exit_state(f"step-{STEPS}")


async def serve(dsn: str, schema: str, lease: str, name: str, runs: str) -> None:
    async with PostgresCheckpointStore(dsn, schema=schema, lease=float(lease)) as store:
        chain = workflow(store)
        async with asyncio.TaskGroup() as group:
            for number in range(int(runs)):
                group.create_task(chain.orchestrate("step-0", workflow_id=f"{name}-{number}"))
        say("served", name)
        while True:
            for workflow_id, outcome in (await recover_all(chain, store)).items():
                say("recovered", workflow_id, outcome)
            await asyncio.sleep(0.1)


async def claim(dsn: str, schema: str, workflow_id: str) -> None:
    async with PostgresCheckpointStore(dsn, schema=schema) as store:
        await _at_the_signal()
        try:
            say("won", await store.claim(workflow_id))
        except RunClaimedError as error:
            say("lost", error.owner)
        await _at_the_signal()


async def start(dsn: str, schema: str, workflow_id: str) -> None:
    await _at_the_signal()
    async with PostgresCheckpointStore(dsn, schema=schema) as store:
        try:
            say("won", await store.start_run(workflow_id, workflow="race", version=1))
        except (RunClaimedError, RunConflictError) as error:
            say("lost", type(error).__name__)
        await _at_the_signal()


async def _at_the_signal() -> None:
    say("ready")
    assert await asyncio.to_thread(sys.stdin.readline)


if __name__ == "__main__":
    command, *arguments = sys.argv[1:]
    asyncio.run({"work": work, "serve": serve, "claim": claim, "start": start}[command](*arguments))
