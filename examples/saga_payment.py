"""A saga: an order reserves stock, charges a card and ships; whatever fails, what was done before is undone, newest first.

Run it: python examples/saga_payment.py
"""

import asyncio
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Annotated, Literal

from cano import CompensatableTask, CompensationFailedError, Res, RunContext, TaskConfig, Workflow


class Order(Enum):
    RESERVE = auto()
    CHARGE = auto()
    SHIP = auto()
    DONE = auto()


class OutOfStock(Exception):
    pass


class NoCourier(Exception):
    pass


class GatewayDown(Exception):
    pass


@dataclass
class Shop:
    """What the steps change, and what goes wrong."""

    stock: int = 3
    charged: dict[str, int] = field(default_factory=dict)
    courier: bool = True
    refunds: bool = True


@dataclass
class Receipt:
    payment: str
    cents: int


Store = Annotated[Shop, Res("shop")]


class Reserve(CompensatableTask[Order, int]):
    name = "reserve"

    async def run(self, shop: Store) -> tuple[Literal[Order.CHARGE], int]:
        if shop.stock == 0:
            raise OutOfStock
        shop.stock -= 1
        print("  reserved one item")
        return Order.CHARGE, 1

    async def compensate(self, output: int, shop: Store) -> None:
        shop.stock += output
        print(f"  put {output} item back")


class Charge(CompensatableTask[Order, Receipt]):
    name = "charge"
    config = TaskConfig().with_attempt_timeout(5)

    async def run(self, shop: Store, ctx: RunContext) -> tuple[Literal[Order.SHIP], Receipt]:
        payment = ctx.idempotency_key  # the same in each attempt, so that nobody is charged twice
        await asyncio.sleep(0.1)
        shop.charged[payment] = 4200
        print("  charged 42.00")
        return Order.SHIP, Receipt(payment, 4200)

    async def compensate(self, output: Receipt, shop: Store) -> None:
        await asyncio.sleep(0.1)
        if not shop.refunds:
            raise GatewayDown
        shop.charged.pop(output.payment, None)  # refunding twice must not hurt
        print(f"  refunded {output.cents / 100:.2f}")


async def ship(shop: Store) -> Literal[Order.DONE]:
    await asyncio.sleep(0.2)
    if not shop.courier:
        raise NoCourier("nobody drives today")
    print("  shipped")
    return Order.DONE


workflow = (
    Workflow[Order](name="order")
    .register_with_compensation(Order.RESERVE, Reserve())
    .register_with_compensation(Order.CHARGE, Charge())
    .register(Order.SHIP, ship)
    .add_exit_state(Order.DONE)
    .with_timeout(10)
    .with_compensation_timeout(5)
)


async def place(title: str, shop: Shop, patience: float = 60) -> None:
    print(title)
    try:
        async with asyncio.timeout(patience):
            print(f"  {await workflow.orchestrate(Order.RESERVE, resources={'shop': shop})}")
    except TimeoutError:
        print("  the customer went away")
    except CompensationFailedError as error:
        print(f"  {type(error.exceptions[0]).__name__}, and somebody has to look after:")
        for orphan in error.orphans:
            print(f"    {orphan.task} of {orphan.output.cents / 100:.2f}: {type(orphan.error).__name__}")
    except NoCourier as error:
        print(f"  NoCourier: {error}")
    print(f"  stock {shop.stock}, charged {sum(shop.charged.values()) / 100:.2f}")


async def place_all() -> None:
    await place("all is well", Shop())
    await place("no courier", Shop(courier=False))
    await place("a customer without patience", Shop(), patience=0.2)
    await place("no courier, and no refund", Shop(courier=False, refunds=False))


def main() -> None:
    asyncio.run(place_all())


if __name__ == "__main__":
    main()
