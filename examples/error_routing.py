"""Error routing: a declined card leads to a question, a second one to the end, a gateway that stays down to a queue.

Run it: python examples/error_routing.py
"""

import asyncio
from enum import Enum, auto
from typing import Annotated, Literal

from cano import Caught, MemoryStore, Res, RunContext, TaskConfig, Workflow


class Payment(Enum):
    CHARGE = auto()
    ASK_AGAIN = auto()
    PAID = auto()
    QUEUED = auto()
    FAILED = auto()


class CardDeclined(Exception):
    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


Store = Annotated[MemoryStore, Res("store")]


async def charge(store: Store, ctx: RunContext) -> Literal[Payment.PAID]:
    card = store.get("cards", list)[-1]
    print(f"  charge {card}, attempt {ctx.attempt}")
    await asyncio.sleep(0.1)
    if card == "unlucky":
        raise ConnectionError("the gateway is down")
    if card != "gold":
        raise CardDeclined("no funds" if card == "blue" else "stolen")
    return Payment.PAID


async def ask_again(
    declined: Caught[CardDeclined], store: Store, ctx: RunContext
) -> Literal[Payment.CHARGE, Payment.FAILED]:
    print(f"  declined: {declined.reason}")
    if ctx.visit == 2:
        return Payment.FAILED
    await asyncio.sleep(0.2)  # the customer types
    store.append("cards", store.get("next card", str))
    return Payment.CHARGE


workflow = (
    Workflow[Payment](name="payment")
    .register(
        Payment.CHARGE,
        charge,
        config=TaskConfig(retry_on=ConnectionError).with_fixed_retry(2, 0.1),
        on_error={CardDeclined: Payment.ASK_AGAIN, ConnectionError: Payment.QUEUED, Exception: Payment.FAILED},
    )
    .register(Payment.ASK_AGAIN, ask_again)
    .add_exit_states([Payment.PAID, Payment.QUEUED, Payment.FAILED])
)


async def pay(*cards: str) -> None:
    store = MemoryStore()
    store.put("cards", [cards[0]])
    store.put("next card", cards[-1])
    print(" then ".join(cards))
    run = workflow.start(Payment.CHARGE, resources={"store": store})
    print(f"  {await run} by way of {' '.join(state.name for state in run.path)}")


async def pay_all() -> None:
    await pay("blue", "gold")
    await pay("blue", "black")
    await pay("unlucky")


def main() -> None:
    asyncio.run(pay_all())


if __name__ == "__main__":
    main()
