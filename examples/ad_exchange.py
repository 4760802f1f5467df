"""A real-time ad exchange: every auction is one run of one workflow, against real HTTP servers.

    GATHER    split, All, 100 ms             who is the user, where, on what page
    BID       split, PartialTimeout, 200 ms  ask five bidders, take what is there in time
    COLLECT   task                           no bid above the floor price: UNSOLD
    SCORE     split made at run time, All    rate each bid's advertisement
    CHOOSE    task                           the best bid wins
    TRACK     split, All                     tell the winner and the ledger: SOLD
    ABORT     split, PartialResults          a required split failed: house ad, error report
    CLOSE     task                           TIMED_OUT or FAILED

The bidders differ: one often answers HTTP 500, one is mostly too slow. They run in a second process, on loopback.

Run it: python examples/ad_exchange.py --seconds 5 --rate 50
"""

import argparse
import asyncio
import math
import multiprocessing
import random
import signal
import socket
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from enum import Enum, auto
from functools import partial
from time import monotonic
from typing import Annotated, Any, Literal

import httpx
import uvicorn
from rich.box import SIMPLE
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from cano import JoinConfig, JoinError, JoinStrategy, JoinTimeoutError, Res, Resources, SplitResult, Workflow

# --- the workflow ----------------------------------------------------------------------------------------------------


class State(Enum):
    GATHER = auto()
    BID = auto()
    COLLECT = auto()
    SCORE = auto()
    CHOOSE = auto()
    TRACK = auto()
    ABORT = auto()
    CLOSE = auto()

    SOLD = auto()
    UNSOLD = auto()
    TIMED_OUT = auto()
    FAILED = auto()


@dataclass(frozen=True)
class Bid:
    bidder: str
    price: float
    topic: str


@dataclass
class Auction:
    """What one run works on; its tasks fill it in."""

    id: int
    user: int
    page: str
    floor: float
    context: dict[str, str] = field(default_factory=dict)
    answers: SplitResult | None = None
    bids: list[Bid] = field(default_factory=list)
    winner: Bid | None = None
    shown: str = "house ad"
    error: JoinError | None = None


ThisAuction = Annotated[Auction, Res("auction")]
Client = Annotated[httpx.AsyncClient, Res("client")]


async def fetch(client: httpx.AsyncClient, path: str) -> dict[str, Any]:
    answer = (await client.get(path)).raise_for_status()
    found: dict[str, Any] = answer.json()
    return found


async def look_up_user(auction: ThisAuction, client: Client) -> None:
    auction.context |= await fetch(client, f"/users/{auction.user}")


async def look_up_place(auction: ThisAuction, client: Client) -> None:
    auction.context |= await fetch(client, f"/places/{auction.user}")


async def look_up_page(auction: ThisAuction, client: Client) -> None:
    auction.context |= await fetch(client, f"/pages/{auction.page}")


@dataclass(frozen=True)
class AskBidder:
    name: str
    url: str

    async def run(self, auction: ThisAuction, client: Client) -> Bid | None:
        request = {"auction": auction.id, "floor": auction.floor, **auction.context}
        answer = (await client.post(f"{self.url}/bid", json=request)).raise_for_status()
        return None if answer.status_code == httpx.codes.NO_CONTENT else Bid(self.name, **answer.json())


async def collect(auction: ThisAuction, answers: SplitResult) -> Literal[State.SCORE, State.UNSOLD, State.ABORT]:
    auction.answers = answers
    if not answers.successes:
        return State.ABORT
    auction.bids = [bid for bid in answers.values() if bid is not None and bid.price >= auction.floor]
    return State.SCORE if auction.bids else State.UNSOLD


@dataclass(frozen=True)
class RateBid:
    bid: Bid

    def run(self, auction: ThisAuction) -> tuple[float, Bid]:
        fits = self.bid.topic == auction.context["topic"]
        return self.bid.price * (1.5 if fits else 1.0), self.bid


def rate_each(auction: ThisAuction) -> list[RateBid]:
    return [RateBid(bid) for bid in auction.bids]


async def choose(auction: ThisAuction, ratings: SplitResult) -> Literal[State.TRACK]:
    _, auction.winner = max(ratings.values(), key=lambda rated: rated[0])
    auction.shown = f"{auction.winner.bidder}: {auction.winner.topic}"
    return State.TRACK


@dataclass(frozen=True)
class TellWinner:
    urls: dict[str, str]

    async def run(self, auction: ThisAuction, client: Client) -> None:
        assert auction.winner is not None
        await client.post(f"{self.urls[auction.winner.bidder]}/win", json={"auction": auction.id})


async def record_sale(auction: ThisAuction, client: Client) -> None:
    (await client.post("/ledger", json={"auction": auction.id, "sold": auction.shown})).raise_for_status()


async def serve_house_ad(auction: ThisAuction) -> None:
    auction.shown = "house ad"


async def report_error(auction: ThisAuction, client: Client) -> None:
    (await client.post("/ledger", json={"auction": auction.id, "error": str(auction.error)})).raise_for_status()


async def close(auction: ThisAuction) -> Literal[State.TIMED_OUT, State.FAILED]:
    return State.TIMED_OUT if isinstance(auction.error, JoinTimeoutError) else State.FAILED


def make_exchange(bidders: dict[str, str]) -> Workflow[State]:
    """One definition for all auctions; what belongs to one auction comes with its run."""
    return (
        Workflow[State](name="auction")
        .register_split(
            State.GATHER,
            [look_up_user, look_up_place, look_up_page],
            JoinConfig(JoinStrategy.All, State.BID, timeout=0.1),
        )
        .register_split(
            State.BID,
            [AskBidder(name, url) for name, url in bidders.items()],
            JoinConfig(JoinStrategy.PartialTimeout, State.COLLECT, timeout=0.2),
        )
        .register(State.COLLECT, collect)
        .register_split(State.SCORE, rate_each, JoinConfig(JoinStrategy.All, State.CHOOSE, timeout=0.1))
        .register(State.CHOOSE, choose)
        .register_split(
            State.TRACK, [TellWinner(bidders), record_sale], JoinConfig(JoinStrategy.All, State.SOLD, timeout=0.1)
        )
        .register_split(
            State.ABORT, [serve_house_ad, report_error], JoinConfig(JoinStrategy.PartialResults(2), State.CLOSE)
        )
        .register(State.CLOSE, close)
        .add_exit_states([State.SOLD, State.UNSOLD, State.TIMED_OUT, State.FAILED])
    )


async def hold(exchange: Workflow[State], auction: Auction, client: httpx.AsyncClient) -> State:
    """Hold one auction: a required split that fails leaves the run as a JoinError, and ABORT ends it in order."""
    resources = Resources({"auction": auction, "client": client})
    try:
        return await exchange.orchestrate(State.GATHER, resources=resources)
    except JoinError as error:
        auction.error = error
        return await exchange.orchestrate(State.ABORT, resources=resources)


# --- the load --------------------------------------------------------------------------------------------------------


@dataclass
class Board:
    """What has happened so far."""

    seconds: float
    rate: float
    opened: float = 0.0
    started: int = 0
    latencies: dict[State, list[float]] = field(default_factory=lambda: {state: [] for state in OUTCOMES})
    reasons: Counter[tuple[State, str]] = field(default_factory=Counter)
    answers: Counter[tuple[str, str]] = field(default_factory=Counter)
    answer_times: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in BIDDERS})

    def record(self, auction: Auction, outcome: State, elapsed: float) -> None:
        self.latencies[outcome].append(elapsed)
        if auction.error is not None and isinstance(auction.error.state, State):
            self.reasons[outcome, auction.error.state.name] += 1
        if (answers := auction.answers) is not None:
            for branch in answers.successes:
                self.answers[branch.name, "no bid" if branch.value is None else "bids"] += 1
                self.answer_times[branch.name].append(branch.elapsed)
            self.answers.update((branch.name, "errors") for branch in answers.errors)
            self.answers.update((NAMES[index], "timeouts") for index in answers.cancelled)
        if outcome is State.SOLD and auction.winner is not None:
            self.answers[auction.winner.bidder, "wins"] += 1

    def line(self) -> str:
        counts = ", ".join(f"{len(times)} {state.name}" for state, times in self.latencies.items() if times)
        return f"{monotonic() - self.opened:4.1f} s  {self.started} auctions: {counts or 'none finished'}"

    def view(self) -> RenderableType:
        elapsed = min(monotonic() - self.opened, self.seconds)
        progress = Table.grid(padding=(0, 2))
        progress.add_row(
            f" {elapsed:.1f} of {self.seconds:g} s",
            ProgressBar(self.seconds, elapsed, width=40),
            f"{self.started - self.finished} auctions in flight",
        )
        return Group(progress, self.tables())

    @property
    def finished(self) -> int:
        return sum(map(len, self.latencies.values()))

    def tables(self) -> RenderableType:
        outcomes = table("outcome", "auctions", "share", "p50 ms", "p95 ms", "p99 ms", why="failed in")
        for state, times in self.latencies.items():
            why = [f"{count} {where}" for (outcome, where), count in self.reasons.items() if outcome is state]
            outcomes.add_row(state.name, *self.row(times), ", ".join(sorted(why)))
        outcomes.add_section()
        outcomes.add_row("all", *self.row([time for times in self.latencies.values() for time in times]))

        kinds = ("bids", "no bid", "errors", "timeouts", "wins")
        bidders = table("bidder", "asked", *kinds, "p50 ms")
        for name in BIDDERS:
            counts = [self.answers[name, kind] for kind in kinds]
            bidders.add_row(name, *map(str, [sum(counts[:-1]), *counts]), percentile(self.answer_times[name], 0.5))
        return Group(outcomes, bidders)

    def row(self, times: Sequence[float]) -> list[str]:
        share = f"{len(times) / max(1, self.finished):.1%}"
        return [str(len(times)), share, *(percentile(times, p) for p in (0.5, 0.95, 0.99))]


def table(first: str, *numbers: str, why: str | None = None) -> Table:
    made = Table(box=SIMPLE, pad_edge=False)
    made.add_column(first, style="bold", min_width=9)
    for number in numbers:
        made.add_column(number, justify="right", no_wrap=True)
    if why is not None:
        made.add_column(why)
    return made


def percentile(times: Sequence[float], p: float) -> str:
    """The nearest-rank percentile in milliseconds."""
    return f"{1000 * sorted(times)[math.ceil(p * len(times)) - 1]:.0f}" if times else "-"


async def trade(board: Board, urls: dict[str, str], console: Console) -> None:
    """Hold auctions at a steady rate, and show how they go."""
    exchange = make_exchange({name: urls[name] for name in BIDDERS})
    exchange.validate()
    # The client outlives the single runs, so it is this block that uses the shared resources.
    pools = {url: httpx.AsyncHTTPTransport() for url in urls.values()}  # one per server, so that each is short
    shared = Resources().manage("client", partial(httpx.AsyncClient, base_url=urls[SERVICES], mounts=pools))
    async with shared:
        client = shared.get("client", httpx.AsyncClient)
        for url in urls.values():
            await client.get(url, timeout=20)  # waits until the server is up
        board.opened = monotonic()
        async with asyncio.TaskGroup() as group:
            display = group.create_task(show(board, console))
            async with asyncio.TaskGroup() as auctions:
                for number in range(math.ceil(board.seconds * board.rate)):
                    await asyncio.sleep(board.opened + number / board.rate - monotonic())
                    auctions.create_task(hold_next(exchange, client, board))
            display.cancel()


async def hold_next(exchange: Workflow[State], client: httpx.AsyncClient, board: Board) -> None:
    start = monotonic()
    board.started += 1
    dice = random.Random(board.started)
    auction = Auction(
        board.started, dice.randrange(10_000), f"page-{dice.randrange(100)}", dice.choice([0.5, 1.0, 1.5])
    )
    outcome = await hold(exchange, auction, client)
    board.record(auction, outcome, monotonic() - start)


async def show(board: Board, console: Console) -> None:
    """Show the board until cancelled: live in a terminal, else a line per second."""
    if not console.is_terminal:
        while True:
            await asyncio.sleep(1)
            console.print(board.line(), highlight=False)
    with Live(console=console, auto_refresh=False, transient=True) as live:
        while True:
            live.update(board.view(), refresh=True)
            await asyncio.sleep(0.1)


# --- the servers -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Manner:
    """How a bidder behaves."""

    latency: float  # median, in seconds
    silent: float = 0.0  # the share of requests that it answers without a bid
    failing: float = 0.0  # the share of requests that it answers with HTTP 500


SERVICES = "services"
BIDDERS = {
    "swift": Manner(0.015, silent=0.2),
    "steady": Manner(0.050, silent=0.1),
    "picky": Manner(0.080, silent=0.6),
    "flaky": Manner(0.040, failing=0.3),
    "sleepy": Manner(0.300),
}
NAMES = tuple(BIDDERS)
OUTCOMES = (State.SOLD, State.UNSOLD, State.TIMED_OUT, State.FAILED)
TOPICS = ("news", "sport", "travel", "cooking")


async def work(dice: random.Random, median: float) -> None:
    """Take as long as servers do: mostly about the median, sometimes much longer."""
    await asyncio.sleep(median * dice.lognormvariate(0, 0.35))


def bidder(manner: Manner, dice: random.Random) -> Starlette:
    async def bid(request: Request) -> Response:
        await request.json()
        await work(dice, manner.latency)
        if dice.random() < manner.failing:
            raise HTTPException(500)
        if dice.random() < manner.silent:
            return Response(status_code=204)
        price = round(dice.lognormvariate(0.3, 0.5), 2)
        return JSONResponse({"price": price, "topic": dice.choice(TOPICS)})

    async def win(_: Request) -> Response:
        return Response(status_code=204)

    return Starlette(routes=[Route("/bid", bid, methods=["POST"]), Route("/win", win, methods=["POST"])])


def services(dice: random.Random) -> Starlette:
    """What the exchange itself needs to know; not always in time, not always at all."""

    async def user(_: Request) -> Response:
        await work(dice, 0.2 if dice.random() < 0.03 else 0.015)
        return JSONResponse({"segment": dice.choice(["student", "parent", "retired"])})

    async def place(_: Request) -> Response:
        await work(dice, 0.005)
        return JSONResponse({"country": dice.choice(["PT", "FR", "JP"])})

    async def page(request: Request) -> Response:
        await work(dice, 0.020)
        if dice.random() < 0.02:
            raise HTTPException(503)
        return JSONResponse({"topic": dice.choice(TOPICS)})

    async def ledger(request: Request) -> Response:
        await request.json()
        return Response(status_code=204)

    return Starlette(
        routes=[
            Route("/users/{user}", user),
            Route("/places/{user}", place),
            Route("/pages/{page}", page),
            Route("/ledger", ledger, methods=["POST"]),
        ]
    )


def serve(listeners: dict[str, socket.socket]) -> None:
    """The body of the second process: six servers on six ports, until the first process ends."""
    dice = random.Random(7)
    apps = {SERVICES: services(dice)} | {name: bidder(manner, dice) for name, manner in BIDDERS.items()}
    by_port = {listener.getsockname()[1]: apps[name] for name, listener in listeners.items()}

    async def dispatch(scope: Scope, receive: Receive, send: Send) -> None:
        await by_port[scope["server"][1]](scope, receive, send)

    server = uvicorn.Server(uvicorn.Config(dispatch, lifespan="off", log_level="critical"))
    sockets = list(listeners.values())
    threading.Thread(target=server.run, kwargs={"sockets": sockets}, daemon=True).start()
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()


@contextmanager
def servers() -> Iterator[dict[str, str]]:
    """Start the servers on free ports of the loopback interface; give their URLs by name."""
    listeners = {name: socket.create_server(("127.0.0.1", 0)) for name in (SERVICES, *BIDDERS)}
    urls = {name: "http://{}:{}".format(*listener.getsockname()) for name, listener in listeners.items()}
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(listeners,), daemon=True)
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process inherits it: Ctrl-C is not for the servers
    process.start()
    signal.signal(signal.SIGINT, handler)
    for listener in listeners.values():
        listener.close()  # the process has its own
    try:
        yield urls
    finally:
        process.terminate()
        process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description="A real-time ad exchange, one workflow run per auction.")
    parser.add_argument("--seconds", type=float, default=5, help="how long to trade (default: 5)")
    parser.add_argument("--rate", type=float, default=50, help="auctions per second, up to 200 (default: 50)")
    arguments = parser.parse_args()
    if not (0 < arguments.seconds <= 3600 and 0 < arguments.rate <= 200):
        parser.error("--seconds must be above 0 and at most 3600, --rate above 0 and at most 200")

    board = Board(arguments.seconds, arguments.rate)
    console = Console()
    with servers() as urls, suppress(KeyboardInterrupt):  # Ctrl-C ends the trading, not the report
        asyncio.run(trade(board, urls, console))
    console.print(board.tables())


if __name__ == "__main__":
    main()
