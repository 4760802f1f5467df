"""An order service of several processes over one PostgreSQL server: one of them is killed, and the others finish its orders.

Run it: python examples/order_service.py --dsn postgresql://user@localhost/database
It makes a schema named cano_orders of its own; --schema names another.
"""

import argparse
import asyncio
import os
import random
import sys
from asyncio.subprocess import PIPE, Process
from enum import Enum, auto
from typing import Literal

from cano import CheckpointError, PostgresCheckpointStore, RunContext, Workflow, recover_all

WORKERS, ORDERS, LEASE = 3, 5, 1.0


class Order(Enum):
    CHARGE = auto()
    PACK = auto()
    SHIP = auto()
    DONE = auto()


def tell(ctx: RunContext, done: str) -> None:
    print(f"{ctx.workflow_id} {done} by {os.getpid()}", flush=True)


async def charge(ctx: RunContext) -> Literal[Order.PACK]:
    await asyncio.sleep(random.uniform(0.02, 0.1))  # a bank would be sent ctx.idempotency_key
    tell(ctx, "charged")
    return Order.PACK


async def pack(ctx: RunContext) -> Literal[Order.SHIP]:
    await asyncio.sleep(random.uniform(0.1, 0.3))
    tell(ctx, "packed")
    return Order.SHIP


async def ship(ctx: RunContext) -> Literal[Order.DONE]:
    await asyncio.sleep(random.uniform(0.02, 0.1))
    tell(ctx, "shipped")
    return Order.DONE


workflow = (
    Workflow[Order](name="order")
    .register(Order.CHARGE, charge)
    .register(Order.PACK, pack)
    .register(Order.SHIP, ship)
    .add_exit_state(Order.DONE)
)


async def work(dsn: str, schema: str, number: int) -> None:
    """One process: its own orders, then those of whoever has died, until none is left."""
    async with PostgresCheckpointStore(dsn, schema=schema, lease=LEASE) as store:
        mine = workflow.copy().with_checkpoint_store(store)
        async with asyncio.TaskGroup() as group:
            for order in range(ORDERS):
                group.create_task(mine.orchestrate(Order.CHARGE, workflow_id=f"order-{number}-{order}"))
        while await store.list_runs():
            for name in await recover_all(mine, store):
                print(f"{name} taken over by {os.getpid()}", flush=True)
            await asyncio.sleep(0.2)


async def listen(process: Process, *, kill: bool) -> None:
    """Pass on what a process says; one is killed when it has packed its first order."""
    assert process.stdout is not None
    async for line in process.stdout:
        print(line.decode(), end="")
        if kill and b"packed" in line:
            process.kill()
            print(f"{process.pid} killed")
            kill = False
    await process.wait()


async def serve(dsn: str, schema: str) -> None:
    async with PostgresCheckpointStore(dsn, schema=schema, lease=LEASE) as store:
        left = await store.list_runs()  # this makes the tables
        print(f"{len(left)} orders are open")
    async with asyncio.TaskGroup() as group:
        for number in range(WORKERS):
            arguments = [__file__, "--dsn", dsn, "--schema", schema, "--worker", str(number)]
            process = await asyncio.create_subprocess_exec(sys.executable, *arguments, stdout=PIPE)
            group.create_task(listen(process, kill=number == 0))
    print("all orders are done")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dsn", required=True, help="where the PostgreSQL server is")
    parser.add_argument("--schema", default="cano_orders", help="the schema for its tables")
    parser.add_argument("--worker", type=int, help="be one of the processes")
    options = parser.parse_args()
    try:
        if options.worker is None:
            asyncio.run(serve(options.dsn, options.schema))
        else:
            asyncio.run(work(options.dsn, options.schema, options.worker))
    except CheckpointError as error:
        sys.exit(f"the orders cannot be kept: {error}")


if __name__ == "__main__":
    main()
