"""A real-time ad exchange: every auction is a run of one workflow, against real HTTP servers.

    GATHER    split: All, 100 ms             who is the user, where, on what page?
    BID       split: PartialTimeout, 200 ms  ask five bidders, go on with what is there in time
    COLLECT   task                           no bid reaches the floor price: UNSOLD
    SCORE     split made at run time: All    rate each bid
    CHOOSE    task                           the best bid wins
    TRACK     split: All, 100 ms             tell the winner and the ledger: SOLD
    ABORT     split: PartialResults          a required split failed: house ad, error report
    CLOSE     task                           TIMED_OUT or FAILED

The bidders are not all well-behaved: "flaky" often answers HTTP 500, "sleepy" is mostly too slow. They and the services of
the exchange run in a second process, on free ports of the loopback interface.

Run it: python examples/ad_exchange.py --seconds 5 --rate 20
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
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
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


EXITS = {State.SOLD: "green", State.UNSOLD: "blue", State.TIMED_OUT: "yellow", State.FAILED: "red"}


@dataclass(frozen=True)
class Bid:
    bidder: str
    price: float
    topic: str


@dataclass
class Auction:
    """What one run is about; its tasks fill it in."""

    number: int
    user: int
    page: int
    floor: float
    context: dict[str, str] = field(default_factory=dict)
    answers: SplitResult | None = None
    bids: list[Bid] = field(default_factory=list)
    winner: Bid | None = None
    shows: str | None = None
    error: JoinError | None = None


ThisAuction = Annotated[Auction, Res("auction")]
Client = Annotated[httpx.AsyncClient, Res("client")]


async def look_up_user(auction: ThisAuction, client: Client) -> None:
    auction.context |= (await client.get(f"/users/{auction.user}")).raise_for_status().json()


async def look_up_place(auction: ThisAuction, client: Client) -> None:
    auction.context |= (await client.get(f"/places/{auction.user}")).raise_for_status().json()


async def look_up_page(auction: ThisAuction, client: Client) -> None:
    auction.context |= (await client.get(f"/pages/{auction.page}")).raise_for_status().json()


@dataclass(frozen=True)
class AskBidder:
    name: str
    url: str

    async def run(self, auction: ThisAuction, client: Client) -> Bid | None:
        wanted = {"auction": auction.number, "floor": auction.floor, **auction.context}
        answer = (await client.post(f"{self.url}/bid", json=wanted)).raise_for_status()
        return Bid(self.name, **answer.json()) if answer.content else None


async def collect(auction: ThisAuction, answers: SplitResult) -> Literal[State.SCORE, State.UNSOLD, State.ABORT]:
    auction.answers = answers
    auction.bids = [bid for bid in answers.values() if bid is not None and bid.price >= auction.floor]
    if not answers.successes:
        return State.ABORT
    return State.SCORE if auction.bids else State.UNSOLD


@dataclass(frozen=True)
class RateBid:
    bid: Bid

    def run(self, auction: ThisAuction) -> tuple[float, Bid]:
        fits = self.bid.topic == auction.context["topic"]
        return self.bid.price * (1.5 if fits else 1.0), self.bid


def rate_each(auction: ThisAuction) -> list[RateBid]:
    return [RateBid(bid) for bid in auction.bids]


async def choose(auction: ThisAuction, rated: SplitResult) -> Literal[State.TRACK]:
    _, auction.winner = max(rated.values(), key=lambda pair: pair[0])
    auction.shows = f"{auction.winner.bidder}: {auction.winner.topic}"
    return State.TRACK


@dataclass(frozen=True)
class TellWinner:
    urls: dict[str, str]

    async def run(self, auction: ThisAuction, client: Client) -> None:
        assert auction.winner is not None
        url = f"{self.urls[auction.winner.bidder]}/win"
        (await client.post(url, json={"auction": auction.number})).raise_for_status()


async def record_sale(auction: ThisAuction, client: Client) -> None:
    entry = {"auction": auction.number, "shows": auction.shows}
    (await client.post("/ledger", json=entry)).raise_for_status()


async def show_house_ad(auction: ThisAuction) -> None:
    auction.shows = "house ad"


async def report_error(auction: ThisAuction, client: Client) -> None:
    entry = {"auction": auction.number, "error": str(auction.error or "no bidder answered")}
    (await client.post("/ledger", json=entry)).raise_for_status()


async def close(auction: ThisAuction) -> Literal[State.TIMED_OUT, State.FAILED]:
    return State.TIMED_OUT if isinstance(auction.error, JoinTimeoutError) else State.FAILED


def make_exchange(bidders: dict[str, str]) -> Workflow[State]:
    """One definition for all auctions; what belongs to one auction comes with its run."""
    context = (look_up_user, look_up_place, look_up_page)
    requests = [AskBidder(name, url) for name, url in bidders.items()]
    follow_up = (TellWinner(bidders), record_sale)
    apology = (show_house_ad, report_error)
    return (
        Workflow[State](name="auction")
        .register_split(State.GATHER, context, JoinConfig(JoinStrategy.All, State.BID, timeout=0.1))
        .register_split(State.BID, requests, JoinConfig(JoinStrategy.PartialTimeout, State.COLLECT, timeout=0.2))
        .register(State.COLLECT, collect)
        .register_split(State.SCORE, rate_each, JoinConfig(JoinStrategy.All, State.CHOOSE))
        .register(State.CHOOSE, choose)
        .register_split(State.TRACK, follow_up, JoinConfig(JoinStrategy.All, State.SOLD, timeout=0.1))
        .register_split(State.ABORT, apology, JoinConfig(JoinStrategy.PartialResults(2), State.CLOSE))
        .register(State.CLOSE, close)
        .add_exit_states(EXITS)
    )


async def hold(exchange: Workflow[State], auction: Auction, client: httpx.AsyncClient) -> State:
    """Hold one auction. A required split that fails leaves the run as a JoinError; ABORT then ends it in good order."""
    resources = Resources({"auction": auction, "client": client})
    try:
        return await exchange.orchestrate(State.GATHER, resources=resources)
    except JoinError as error:
        auction.error = error
        return await exchange.orchestrate(State.ABORT, resources=resources)


# --- the servers -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Manners:
    """How a bidder behaves."""

    latency: float  # median, in seconds
    silent: float = 0.0  # the share of requests that it answers without a bid
    failing: float = 0.0  # the share of requests that it answers with HTTP 500


BIDDERS = {
    "swift": Manners(0.015, silent=0.2),
    "steady": Manners(0.050, silent=0.1),
    "picky": Manners(0.080, silent=0.6),
    "flaky": Manners(0.040, failing=0.4),
    "sleepy": Manners(0.300),
}
NAMES = tuple(BIDDERS)
SERVICES = "services"
TOPICS = ("news", "sport", "travel", "cooking")


async def work(median: float, dice: random.Random) -> None:
    """Take as long as servers do: mostly about the median, sometimes much longer."""
    await asyncio.sleep(median * dice.lognormvariate(0, 0.35))


def bidder(manners: Manners, dice: random.Random) -> Starlette:
    async def bid(_: Request) -> Response:
        await work(manners.latency, dice)
        if dice.random() < manners.failing:
            raise HTTPException(500)
        if dice.random() < manners.silent:
            return Response(status_code=204)
        return JSONResponse({"price": round(dice.lognormvariate(0.3, 0.5), 2), "topic": dice.choice(TOPICS)})

    async def win(_: Request) -> Response:
        return Response(status_code=204)

    return Starlette(routes=[Route("/bid", bid, methods=["POST"]), Route("/win", win, methods=["POST"])])


def services(dice: random.Random) -> Starlette:
    """What the exchange itself needs; not always in time, and not always there."""

    async def user(_: Request) -> Response:
        await work(0.25 if dice.random() < 0.04 else 0.015, dice)
        return JSONResponse({"segment": dice.choice(["student", "parent", "retired"])})

    async def place(_: Request) -> Response:
        await work(0.005, dice)
        return JSONResponse({"country": dice.choice(["PT", "FR", "JP"])})

    async def page(_: Request) -> Response:
        await work(0.020, dice)
        if dice.random() < 0.03:
            raise HTTPException(503)
        return JSONResponse({"topic": dice.choice(TOPICS)})

    async def ledger(_: Request) -> Response:
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
    """The body of the second process: one server per socket, until the first process ends."""
    dice = random.Random(7)
    apps = {SERVICES: services(dice), **{name: bidder(manners, dice) for name, manners in BIDDERS.items()}}
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
    """Start the servers; give their URLs by name."""
    listeners = {name: socket.create_server(("127.0.0.1", 0)) for name in (SERVICES, *NAMES)}
    urls = {name: f"http://127.0.0.1:{listener.getsockname()[1]}" for name, listener in listeners.items()}
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(listeners,), daemon=True)
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # what the process inherits: Ctrl-C is not for the servers
    process.start()
    signal.signal(signal.SIGINT, handler)
    for listener in listeners.values():
        listener.close()  # the process has its own
    try:
        yield urls
    finally:
        process.terminate()
        process.join()


# --- the report ------------------------------------------------------------------------------------------------------


@dataclass
class Board:
    """What has happened so far."""

    seconds: float
    opened: float = 0.0
    started: int = 0
    latencies: dict[State, list[float]] = field(default_factory=lambda: {state: [] for state in EXITS})
    reasons: Counter[tuple[State, str]] = field(default_factory=Counter)
    bidders: Counter[tuple[str, str]] = field(default_factory=Counter)
    answered: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in NAMES})

    def record(self, auction: Auction, outcome: State, elapsed: float) -> None:
        self.latencies[outcome].append(elapsed)
        failed_in, answers = None, auction.answers
        if auction.error is not None:
            failed_in = auction.error.state
            answers = auction.error.result if failed_in is State.BID else answers
        elif outcome is State.FAILED:
            failed_in = State.BID  # each of the bidders failed
        if isinstance(failed_in, State):
            self.reasons[outcome, failed_in.name] += 1
        if answers is not None:
            self.bidders.update((branch.name, "bids" if branch.value else "no bid") for branch in answers.successes)
            self.bidders.update((branch.name, "errors") for branch in answers.errors)
            self.bidders.update((NAMES[index], "timeouts") for index in answers.cancelled)
            for branch in answers.successes:
                self.answered[branch.name].append(branch.elapsed)
        if outcome is State.SOLD and auction.winner is not None:
            self.bidders[auction.winner.bidder, "wins"] += 1

    @property
    def finished(self) -> int:
        return sum(map(len, self.latencies.values()))

    def line(self) -> str:
        counts = ", ".join(f"{len(times)} {state.name}" for state, times in self.latencies.items())
        return f"{monotonic() - self.opened:4.1f} s: {self.started} auctions, {counts}"

    def live(self) -> Group:
        elapsed = min(monotonic() - self.opened, self.seconds)
        head = Table.grid(padding=(0, 2))
        head.add_row(
            f"{elapsed:.1f} of {self.seconds:g} s",
            ProgressBar(self.seconds, elapsed, width=36),
            f"{self.started - self.finished} auctions in flight",
        )
        return Group(head, "", self.tables())

    def tables(self) -> Group:
        outcomes = table("outcome", "auctions", "share", "p50 ms", "p95 ms", "p99 ms")
        outcomes.add_column("failed in", no_wrap=True)
        for state, times in self.latencies.items():
            why = (f"{where} {count}" for (outcome, where), count in self.reasons.most_common() if outcome is state)
            outcomes.add_row(f"[{EXITS[state]}]{state.name}", *self.row(times), ", ".join(why))
        outcomes.add_section()
        outcomes.add_row("all", *self.row([time for times in self.latencies.values() for time in times]))

        kinds = ("bids", "no bid", "errors", "timeouts")
        bidders = table("bidder", "asked", *kinds, "wins", "p50 ms")
        for name in NAMES:
            counts = [self.bidders[name, kind] for kind in kinds]
            numbers = [sum(counts), *counts, self.bidders[name, "wins"]]
            bidders.add_row(name, *map(str, numbers), percentile(self.answered[name], 0.5))
        return Group(outcomes, "", bidders)

    def row(self, times: Sequence[float]) -> list[str]:
        share = f"{len(times) / max(1, self.finished):.1%}"
        return [str(len(times)), share, *(percentile(times, p) for p in (0.5, 0.95, 0.99))]


def table(first: str, *numbers: str) -> Table:
    made = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    made.add_column(first, style="bold", min_width=9)
    for number in numbers:
        made.add_column(number, justify="right", no_wrap=True)
    return made


def percentile(times: Sequence[float], p: float) -> str:
    """The nearest-rank percentile, in milliseconds."""
    return f"{1000 * sorted(times)[math.ceil(p * len(times)) - 1]:.0f}" if times else "-"


async def show(board: Board, console: Console) -> None:
    """Show the board until cancelled: live in a terminal, else as a line per second."""
    if not console.is_terminal:
        while True:
            await asyncio.sleep(1)
            console.print(board.line(), highlight=False)
    with Live(console=console, auto_refresh=False, transient=True) as live:
        while True:
            live.update(board.live(), refresh=True)
            await asyncio.sleep(0.2)


# --- the load --------------------------------------------------------------------------------------------------------


async def trade(urls: dict[str, str], board: Board, rate: float, console: Console) -> None:
    """Hold auctions at a steady rate, whether or not those before have ended, and show how they go."""
    exchange = make_exchange({name: urls[name] for name in NAMES})
    exchange.validate()
    # The client outlives the single runs, so it is this block that uses the shared resources.
    async with Resources().manage("client", partial(make_client, urls)) as shared:
        client = shared.get("client", httpx.AsyncClient)
        for url in urls.values():
            await client.get(url, timeout=20)  # waits until the server is up
        board.opened = monotonic()
        async with asyncio.TaskGroup() as group:
            display = group.create_task(show(board, console))
            async with asyncio.TaskGroup() as auctions:
                for number in range(math.ceil(board.seconds * rate)):
                    await asyncio.sleep(board.opened + number / rate - monotonic())
                    auctions.create_task(hold_next(exchange, client, board))
            display.cancel()


def make_client(urls: dict[str, str]) -> httpx.AsyncClient:
    """One client with a pool per server: httpx looks through a whole pool for each request."""
    pools: dict[str, Any] = {url: httpx.AsyncHTTPTransport(verify=False) for url in urls.values()}
    return httpx.AsyncClient(base_url=urls[SERVICES], mounts=pools, transport=pools[urls[SERVICES]])


async def hold_next(exchange: Workflow[State], client: httpx.AsyncClient, board: Board) -> None:
    start = monotonic()
    board.started += 1
    dice = random.Random(board.started)
    auction = Auction(board.started, user=dice.randrange(9999), page=dice.randrange(99), floor=dice.choice([0.5, 1, 2]))
    outcome = await hold(exchange, auction, client)
    board.record(auction, outcome, monotonic() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description="A real-time ad exchange: one workflow run per auction.")
    parser.add_argument("--seconds", type=float, default=5, help="how long to trade (default: 5)")
    parser.add_argument("--rate", type=float, default=20, help="auctions per second, up to 200 (default: 20)")
    options = parser.parse_args()
    if not (0 < options.seconds <= 3600 and 0 < options.rate <= 200):
        parser.error("--seconds must be above 0 and at most 3600, --rate above 0 and at most 200")

    board = Board(options.seconds)
    console = Console()
    console.print(f"{options.rate:g} auctions per second for {options.seconds:g} s", highlight=False)
    with suppress(KeyboardInterrupt), servers() as urls:  # Ctrl-C ends the trading, not the report
        asyncio.run(trade(urls, board, options.rate, console))
    console.print("", board.tables(), sep="\n")
    if cancelled := board.started - board.finished:
        console.print(f"\n{cancelled} auctions were still running and have been cancelled.", highlight=False)


if __name__ == "__main__":
    main()
