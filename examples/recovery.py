"""Recovery: orders whose process is killed in mid-work go on where they were when it is started again.

Run it twice: python examples/recovery.py --crash-after 5; python examples/recovery.py
The first run kills itself; the second one finds the orders in the file orders.db and finishes them. --folder says where it is.
"""

import argparse
import asyncio
import os
import signal
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from typing import Annotated, Literal

from cano import CompensatableTask, Res, RunContext, SqliteCheckpointStore, Workflow, recover_all


class Order(Enum):
    RESERVE = auto()
    CHARGE = auto()
    SHIP = auto()
    DONE = auto()


@dataclass
class Power:
    """Fails after so many steps."""

    steps: int | None

    def use(self) -> None:
        if self.steps is not None:
            self.steps -= 1
            if self.steps < 0:
                print("killed", flush=True)
                os.kill(os.getpid(), signal.SIGKILL)


Supply = Annotated[Power, Res("power")]


class Reserve(CompensatableTask[Order, str]):
    name = "reserve"

    async def run(self, ctx: RunContext, power: Supply) -> tuple[Literal[Order.CHARGE], str]:
        power.use()
        print(f"{ctx.workflow_id}: reserved", flush=True)
        return Order.CHARGE, f"shelf of {ctx.workflow_id}"

    async def compensate(self, output: str) -> None:
        print(f"{output}: filled again", flush=True)


class CardRefused(Exception):
    pass


async def charge(ctx: RunContext, power: Supply) -> Literal[Order.SHIP]:
    power.use()  # after a kill in here the step runs again: a bank would be sent ctx.idempotency_key
    if ctx.workflow_id == "order-2":
        raise CardRefused("no money")
    print(f"{ctx.workflow_id}: charged", flush=True)
    return Order.SHIP


async def ship(ctx: RunContext, power: Supply) -> Literal[Order.DONE]:
    power.use()
    print(f"{ctx.workflow_id}: shipped", flush=True)
    return Order.DONE


def orders(store: SqliteCheckpointStore, power: Power) -> Workflow[Order]:
    return (
        Workflow[Order]({"power": power}, name="order")
        .register_with_compensation(Order.RESERVE, Reserve())
        .register(Order.CHARGE, charge)
        .register(Order.SHIP, ship)
        .add_exit_state(Order.DONE)
        .with_checkpoint_store(store)
    )


async def work(folder: Path, crash_after: int | None) -> None:
    async with SqliteCheckpointStore(folder / "orders.db") as store:
        workflow = orders(store, Power(crash_after))
        recovered = await recover_all(workflow, store)
        for name, outcome in sorted(recovered.items()):
            print(f"{name}: recovered, {outcome!r}")
        if recovered:
            return
        for number in range(1, 4):
            try:
                await workflow.orchestrate(Order.RESERVE, workflow_id=f"order-{number}")
            except CardRefused as error:
                print(f"order-{number}: {error.args[0]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(), help="where orders.db is; the present one by default")
    parser.add_argument("--crash-after", type=int, help="kill the process after so many steps")
    options = parser.parse_args()
    asyncio.run(work(options.folder, options.crash_after))


if __name__ == "__main__":
    main()
