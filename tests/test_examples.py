"""Every example runs, and what it prints or answers is checked."""

import asyncio
import itertools
import json
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from http import HTTPStatus
from pathlib import Path
from textwrap import dedent
from typing import Any

import httpx
import pytest
import uvicorn

from cano import WorkflowCancelledError, testing
from examples import ad_exchange, service
from tests.postgres_server import MISSING, PostgresServer, find_programs

EXAMPLES = Path(__file__).parent.parent / "examples"
STRICT = ("-W", "error")  # a warning would show on stderr, which must stay empty
ENVIRONMENT = {
    name: value for name, value in os.environ.items() if name != "PYTHONASYNCIODEBUG"
}  # too slow for budgets
posix = pytest.mark.skipif(os.name == "nt", reason="needs terminals, or Ctrl-C for another process")


def start(name: str, *arguments: object, **options: Any) -> subprocess.Popen[str]:
    """Start an example as a newcomer does."""
    command = [sys.executable, *STRICT, str(EXAMPLES / name), *map(str, arguments)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": ENVIRONMENT} | options
    process: subprocess.Popen[str] = subprocess.Popen(command, text=True, **pipes)  # noqa: S603 - our own examples
    return process


def run(name: str, *arguments: object, status: int = 0) -> str:
    """Run an example to its end; a good end is quiet on stderr."""
    with start(name, *arguments) as process:
        output, errors = process.communicate(timeout=19)
    assert process.returncode == status, errors
    assert status or not errors
    return output + errors


# --- the short ones --------------------------------------------------------------------------------------------------

OUTPUT = {
    "saga_payment": """\
        all is well
          reserved one item
          charged 42.00
          shipped
          Order.DONE
          stock 2, charged 42.00
        no courier
          reserved one item
          charged 42.00
          refunded 42.00
          put 1 item back
          NoCourier: nobody drives today
          stock 3, charged 0.00
        a customer without patience
          reserved one item
          charged 42.00
          refunded 42.00
          put 1 item back
          the customer went away
          stock 3, charged 0.00
        no courier, and no refund
          reserved one item
          charged 42.00
          put 1 item back
          NoCourier, and somebody has to look after:
            charge of 42.00: GatewayDown
          stock 3, charged 42.00
        """,
    "hello": """\
        hello,
        world
        State.DONE
        """,
    "split_join": """\
        total       55  after 0.3 s
        largest     10  after 0.1 s
        mean       5.5  after 0.2 s
        State.DONE
        """,
    "join_strategies": """\
        All               after 0.50 s  JoinError: b is down
        Any               after 0.10 s  got a         failed -  cancelled b c d e
        Quorum(2)         after 0.30 s  got a c       failed b  cancelled d e
        Percentage(0.8)   after 0.50 s  got a c d e   failed b  cancelled -
        PartialResults(3) after 0.30 s  got a c       failed b  cancelled d e
        PartialTimeout    after 0.35 s  got a c       failed b  cancelled d e
        """,
    "bulkhead": """\
        job 1  0.0 s to 0.2 s  ####
        job 2  0.0 s to 0.2 s  ####
        job 3  0.2 s to 0.4 s      ####
        job 4  0.2 s to 0.4 s      ####
        job 5  0.4 s to 0.6 s          ####
        job 6  0.4 s to 0.6 s          ####
        job 7  0.6 s to 0.8 s              ####
        job 8  0.6 s to 0.8 s              ####
        State.DONE
        """,
    "poll": """\
        look: working
        pause for 0.1 s
        request 2
        request 3
        request 4
        the report is here
        State.DONE
        """,
    "stepped": """\
        page a: anchors
        page b: failed
        page b: bells
        page c: failed
        page c: failed
        page c: chains
        State.DONE
        """,
    "stream": """\
        average of 2: 21.2
        average of 1: 21.8
        average of 2: 22.1
        cancelled after number 6, 1 skipped
        WorkflowTimeoutError
        """,
    "error_routing": """\
        blue then gold
          charge blue, attempt 1
          declined: no funds
          charge gold, attempt 1
          Payment.PAID by way of CHARGE ASK_AGAIN CHARGE PAID
        blue then black
          charge blue, attempt 1
          declined: no funds
          charge black, attempt 1
          declined: stolen
          Payment.FAILED by way of CHARGE ASK_AGAIN CHARGE ASK_AGAIN FAILED
        unlucky
          charge unlucky, attempt 1
          charge unlucky, attempt 2
          charge unlucky, attempt 3
          Payment.QUEUED by way of CHARGE QUEUED
        """,
    "dynamic_tasks": """\
        total of 75 records: 6252
        8 failed, 17 were not needed any more
        State.DONE
        """,
    "queue_consumer": """\
        10 jobs, 9 done
          set aside: scan-09.txt
        10 jobs, 9 done
          set aside: scan-18.txt
         5 jobs, 5 done
         0 jobs, 0 done
        State.DRAINED
        """,
    "recommendations": """\
        collaborative  after 0.30 s: Dune, Solaris
        trending       after 0.05 s: Solaris, Momo
        content-based  failed: content-based is down
        personalized   was too slow
        you may like Dune, Solaris, Momo
        State.DONE
        """,
    "replica_writes": """\
        replicas that are down: []
          written to 1, 2, 3; 0 failed
          2 not waited for
          State.WRITTEN
        replicas that are down: [2]
          written to 1, 3, 4; 1 failed
          1 not waited for
          State.WRITTEN
        replicas that are down: [1, 3, 4]
          not written: replica 1 is down, replica 3 is down, replica 4 is down
        """,
    "shared_limit": """\
        order 1    0.0 s to 0.2 s  ####
        order 2    0.0 s to 0.2 s  ####
        order 3    0.0 s to 0.2 s  ####
        check      0.2 s to 0.4 s      ####
        invoice 1  0.2 s to 0.4 s      ####
        order 4    0.2 s to 0.4 s      ####
        invoice 2  0.4 s to 0.6 s          ####
        order 5    0.4 s to 0.6 s          ####
        order 6    0.4 s to 0.6 s          ####
        invoice 3  0.6 s to 0.8 s              ####
        <Bulkhead api limit=3 in_use=0 waiting=0>
        """,
    "hedged_calls": """\
        a good day: near answered after 0.05 s, asked: near
        near is slow: far answered after 0.15 s, asked: near, far
        near is down: far answered after 0.07 s, asked: near, far
        two are slow: spare answered after 0.30 s, asked: near, far, spare
        all are down: 3 errors after 0.12 s, asked: near, far, spare
        """,
    "timeout": """\
        a run that may take 2 s:
          fetch, attempt 1: would take 1.0 s, may take 0.2 s
          fetch, attempt 2: would take 1.0 s, may take 0.2 s
          fetch, attempt 3: would take 0.05 s, may take 0.2 s
          store: takes 0.5 s, 1.4 s are left of the run
          State.DONE
        the same, but it may take 0.8 s:
          fetch, attempt 1: would take 1.0 s, may take 0.2 s
          fetch, attempt 2: would take 1.0 s, may take 0.2 s
          fetch, attempt 3: would take 0.05 s, may take 0.2 s
          store: takes 0.5 s, 0.2 s are left of the run
          WorkflowTimeoutError in State.STORE: the run took 0.800 s of the 0.8 s it was given
        """,
}


@pytest.mark.parametrize("name", OUTPUT)
def test_short_example_output(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """On the virtual clock a short example prints exactly this, times included."""
    monkeypatch.setattr(asyncio, "run", testing.run)
    monkeypatch.setattr(sys, "argv", [name])

    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")

    assert capsys.readouterr().out == dedent(OUTPUT[name])


def test_validation_output() -> None:
    """The broken definition is refused with all of its problems at once, the other one is not."""
    first, *lines = run("validation.py").splitlines()

    problems = [line.removeprefix("  - ") for line in lines if line.startswith("  - ")]
    assert first == f"workflow broken has {len(problems)} problems:"
    assert {
        "state VALIDATE leads to REJECTED, which is neither registered nor an exit state",
        "state CHARGE leads to SHIP, which is neither registered nor an exit state",
        "state WAIT cannot be reached from the initial state",
        "the split in state PRICE: Quorum(3) cannot be reached: the split has 2 branches",
    } <= set(problems)
    assert "order is valid and can start in VALIDATE" in lines
    assert "WAIT" in lines[-1]
    assert lines[-1].endswith("is neither registered nor an exit state")


@pytest.mark.realtime
@pytest.mark.parametrize("name", OUTPUT)
def test_short_example_as_a_script(name: str) -> None:
    """On the real clock a short example says as many lines, and nothing on stderr."""
    assert len(run(f"{name}.py").splitlines()) == len(OUTPUT[name].splitlines()) - 1


@pytest.fixture
def redis_url(tmp_path: Path) -> Iterator[str]:
    """A Redis server of our own, on a socket in a folder."""
    server = shutil.which("redis-server")
    if server is None:
        pytest.skip("needs redis-server")
    pytest.importorskip("redis")
    socket_path = tmp_path / "redis"
    options = ("--port", "0", "--unixsocket", str(socket_path), "--save", "", "--dir", str(tmp_path))
    with subprocess.Popen([server, *options], stdout=subprocess.DEVNULL) as process:  # noqa: S603 - found on the PATH
        while not socket_path.exists() and process.poll() is None:
            time.sleep(0.01)
        yield f"unix://{socket_path}"
        process.terminate()


@pytest.mark.realtime
@posix
def test_queue_consumer_with_redis(redis_url: str) -> None:
    """The queue may be a Redis list: every job is taken, what fails is set aside in a list of its own."""
    from redis import Redis  # noqa: PLC0415 - not there without the fixture

    output = run("queue_consumer.py", "--redis", redis_url)

    with Redis.from_url(redis_url, decode_responses=True) as client:
        assert client.llen("jobs") == 0
        assert client.lrange("jobs:failed", 0, -1) == ["scan-09.txt", "scan-18.txt"]
    assert output == dedent(OUTPUT["queue_consumer"])


# --- ad_exchange -----------------------------------------------------------------------------------------------------


class Report:
    """The two tables that the exchange prints, as numbers."""

    def __init__(self, output: str) -> None:
        self.outcomes: dict[str, int] = {}
        self.bidders: dict[str, dict[str, int]] = {}
        kinds: list[str] = []
        for line in output.splitlines():
            match re.split(r"\s{2,}", line.strip()):
                case ["outcome" | "bidder" as what, *heads]:
                    kinds = heads[:-1] if what == "bidder" else []
                case [name, count, *_] if not kinds and re.fullmatch(r"[A-Z_]+|all", name):
                    self.outcomes[name] = int(count)
                case [name, *counts] if kinds and len(counts) == len(kinds) + 1:
                    self.bidders[name] = dict(zip(kinds, map(int, counts[:-1]), strict=True))
        self.all = self.outcomes.pop("all")

    def check(self) -> None:
        assert list(self.outcomes) == ["SOLD", "UNSOLD", "TIMED_OUT", "FAILED"]
        assert list(self.bidders) == ["swift", "steady", "picky", "flaky", "sleepy"]
        assert sum(self.outcomes.values()) == self.all
        assert sum(bidder["wins"] for bidder in self.bidders.values()) == self.outcomes["SOLD"]
        asked = {bidder["asked"] for bidder in self.bidders.values()}
        assert len(asked) == 1
        assert self.outcomes["SOLD"] + self.outcomes["UNSOLD"] <= asked.pop() <= self.all
        for bidder in self.bidders.values():
            assert bidder["asked"] == sum(bidder[kind] for kind in ("bids", "no bid", "errors", "timeouts"))
            assert bidder["wins"] <= bidder["bids"]


@pytest.mark.realtime
def test_ad_exchange_numbers() -> None:
    """Each auction ends in one exit state; the slow bidder has timeouts, the failing one errors; plain text without a TTY."""
    output = run("ad_exchange.py", "--seconds", 1, "--rate", 20)

    report = Report(output)
    report.check()
    assert report.all == 20
    assert report.bidders["sleepy"]["timeouts"] > 0
    assert report.bidders["flaky"]["errors"] > 0
    assert report.outcomes["SOLD"] > 0
    assert "\x1b" not in output
    assert "\r" not in output


@pytest.mark.realtime
@posix
def test_ad_exchange_interrupted() -> None:
    """Ctrl-C ends the trading at once, and the table so far is printed."""
    with start("ad_exchange.py", "--seconds", 60, start_new_session=True) as process:
        assert process.stdout is not None
        while not process.stdout.readline().startswith(" 1."):
            pass
        os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to the whole group
        rest, errors = process.communicate(timeout=5)

    report = Report(rest)
    report.check()
    assert (process.returncode, errors) == (0, "")
    assert 0 < report.all < 100


@pytest.mark.realtime
@posix
def test_ad_exchange_in_a_terminal() -> None:
    """In a terminal the board is redrawn in place while the auctions run, and then printed once."""
    terminal = {"TERM": "xterm-256color", "COLUMNS": "100", "LINES": "40"}
    leader, follower = os.openpty()
    with os.fdopen(leader, "rb", buffering=0) as screen:
        process = start("ad_exchange.py", "--seconds", 1, stdout=follower, stderr=follower, env=ENVIRONMENT | terminal)
        os.close(follower)
        shown = bytearray()
        with process, suppress(OSError):  # which is how Linux says that nobody has the other end any more
            while chunk := screen.read(65536):
                shown += chunk

    drawn, _, final = shown.decode().rpartition("\x1b[?25h")  # the cursor is back
    assert process.returncode == 0
    assert drawn.count("auctions in flight") >= 3
    assert "\x1b[1A" in drawn
    Report(re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", final)).check()


@pytest.mark.parametrize("arguments", [("--rate", 0), ("--rate", 201), ("--seconds", -1), ("--seconds", "nan")])
def test_ad_exchange_bounds(arguments: tuple[object, ...]) -> None:
    """A load that is not bounded is refused before anything starts."""
    assert "must be above 0" in run("ad_exchange.py", *arguments, status=2)


BROKEN = HTTPStatus.INTERNAL_SERVER_ERROR
SILENT = HTTPStatus.NO_CONTENT


class Market:
    """Stands for the servers: answers at once, but for what a test says."""

    def __init__(self, **manners: float | HTTPStatus) -> None:
        self.manners = manners
        self.ledger: list[dict[str, object]] = []

    async def answer(self, request: httpx.Request) -> httpx.Response:
        what = request.url.path.split("/")[1]
        manner = self.manners.get(request.url.host if what == "bid" else what, 0.0)
        if isinstance(manner, HTTPStatus):
            return httpx.Response(manner)
        await asyncio.sleep(manner)
        match what:
            case "ledger":
                self.ledger.append(json.loads(request.content))
                return httpx.Response(204)
            case "bid":
                return httpx.Response(200, json={"price": len(request.url.host), "topic": "news"})
        return httpx.Response(200, json={"topic": "sport"})


@pytest.mark.virtual
@pytest.mark.parametrize(
    ("manners", "outcome", "took", "shows"),
    [
        ({}, "SOLD", 0.0, "steady: news"),
        ({"steady": 0.3, "sleepy": 0.199}, "SOLD", 0.2, "sleepy: news"),
        ({"steady": BROKEN, "sleepy": SILENT}, "SOLD", 0.0, "swift: news"),
        (dict.fromkeys(ad_exchange.NAMES, SILENT), "UNSOLD", 0.0, None),
        (dict.fromkeys(ad_exchange.NAMES, BROKEN), "FAILED", 0.0, "house ad"),
        (dict.fromkeys(ad_exchange.NAMES, 0.3), "TIMED_OUT", 0.2, "house ad"),
        ({"users": 0.15}, "TIMED_OUT", 0.1, "house ad"),
        ({"pages": BROKEN}, "FAILED", 0.0, "house ad"),
        ({"win": BROKEN}, "FAILED", 0.0, "house ad"),
        ({"win": 0.5}, "TIMED_OUT", 0.1, "house ad"),
        ({"users": 0.15, "ledger": BROKEN}, "TIMED_OUT", 0.1, "house ad"),
    ],
)
async def test_ad_exchange_outcome(
    manners: dict[str, float | HTTPStatus], outcome: str, took: float, shows: str | None
) -> None:
    """What the servers do decides the exit state, when it is reached, and what is shown."""
    market = Market(**manners)
    exchange = ad_exchange.make_exchange({name: f"http://{name}" for name in ad_exchange.NAMES})
    auction = ad_exchange.Auction(1, user=1, page=1, floor=1)
    loop = asyncio.get_running_loop()
    start = loop.time()

    async with httpx.AsyncClient(base_url="http://services", transport=httpx.MockTransport(market.answer)) as client:
        state = await ad_exchange.hold(exchange, auction, client)

    assert state.name == outcome
    assert loop.time() - start == pytest.approx(took)
    assert auction.shows == shows
    errors = [entry for entry in market.ledger if "error" in entry]
    assert len(errors) == (outcome in {"TIMED_OUT", "FAILED"} and "ledger" not in manners)
    assert ({"auction": 1, "shows": shows} in market.ledger) == (outcome == "SOLD")


# --- word_count ------------------------------------------------------------------------------------------------------


def test_word_count_of_a_small_folder(tmp_path: Path) -> None:
    """The counts are right, and what cannot be read is reported."""
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.txt").write_text("The cat and the dog.\nThe end", encoding="utf-8")
    (tmp_path / "deep" / "b.md").write_text("the DOG", encoding="utf-8")
    (tmp_path / "broken.txt").write_bytes(b"the \xff\xfe")
    (tmp_path / "image.png").write_bytes(b"the the the")
    missing = tmp_path / "missing.txt"

    output = run("word_count.py", tmp_path, missing)

    counts = dict(re.findall(r"^(\w+) +(\d+)$", output, re.MULTILINE))
    assert counts == {"the": "4", "dog": "2", "cat": "1", "and": "1", "end": "1"}
    assert "9 words, 5 different, in 2 of 4 files" in output
    assert re.search(r"^skipped .*broken\.txt: 'utf-8' codec can't decode", output, re.MULTILINE)
    assert re.search(r"^skipped .*missing\.txt: .*No such file", output, re.MULTILINE)
    assert "\x1b" not in output


def test_word_count_of_nothing(tmp_path: Path) -> None:
    """A folder without text files is an exit state of its own, and an exit status."""
    assert run("word_count.py", tmp_path, status=1) == "no text files found\n"


@pytest.mark.realtime
def test_word_count_of_the_standard_library() -> None:
    """Over 300 real files the totals are those of a plain loop."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [path for path in sorted(root.rglob("*.py")) if "site-packages" not in path.parts][:300]
    words: Counter[str] = Counter()
    readable = 0
    for path in files:
        with suppress(UnicodeDecodeError):
            words.update(re.findall(r"[a-z]{2,}", path.read_text(encoding="utf-8").lower()))
            readable += 1

    output = run("word_count.py", *files)

    assert f"{words.total():,} words, {len(words):,} different, in {readable} of 300 files" in output
    for word, count in words.most_common(19):
        assert re.search(rf"^{word} +{count:,}$", output, re.MULTILINE)


@pytest.mark.realtime
def test_word_count_out_of_time() -> None:
    """When the time is up, it reports what has been counted and what has not."""
    output = run("word_count.py", "--timeout", 0.2)

    found = re.search(r"in (\d+) of (\d+) files", output.replace(",", ""))
    assert found is not None
    assert int(found[1]) < int(found[2])
    assert "not done in time" in output
    assert re.search(r"^\.\.\. and [\d,]+ more$", output, re.MULTILINE)


# --- service ---------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def serving() -> AsyncIterator[httpx.AsyncClient]:
    """A client of the service, which runs on a real server; when it has stopped, no run is left."""
    service.outcomes.clear()
    server = uvicorn.Server(uvicorn.Config(service.app, log_level="warning", lifespan="off"))
    with socket.create_server(("127.0.0.1", 0), backlog=512) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        async with asyncio.TaskGroup() as group:
            group.create_task(server.serve(sockets=[listener]))
            async with httpx.AsyncClient(base_url=url, timeout=10, trust_env=False) as client:
                yield client
            server.should_exit = True
    assert not service.running


async def until(condition: Callable[[], object]) -> None:
    while not condition():  # noqa: ASYNC110 - what is waited for has no event
        await asyncio.sleep(0.01)


@pytest.mark.realtime
async def test_service_answers_many_at_once() -> None:
    """200 requests at once: each gets the answer to its own text."""

    async def ask(client: httpx.AsyncClient, number: int) -> None:
        text = f"Request {number} " + "again " * number
        answer = await client.post("/analyse", json={"text": text, "pause": 0.05})
        found = answer.json()
        assert answer.status_code == 200
        assert found["count"] == number + 2
        assert dict(found["frequent"])["again"] == number
        assert found["summary"].split()[:2] == ["request", str(number)]

    async with serving() as client:
        async with asyncio.TaskGroup() as group:
            for number in range(1, 201):
                group.create_task(ask(client, number))
        outcomes = (await client.get("/outcomes")).json()

    assert outcomes == {"running": 0, "DONE": 200}


@pytest.mark.realtime
async def test_service_status() -> None:
    """The exit state decides the status; a run over its budget is a 504."""
    bodies = {
        200: [b'{"text": "one two two"}', b'{"text": ""}', b'{"text": "one", "pause": 0.1}'],
        422: [b'{"text": 1}', b'{"text": "one", "pause": "long"}', b'{"text": "one", "pause": -1}', b"[]", b"{", b""],
        504: [b'{"text": "one", "pause": 10}'],
    }
    bodies[422] += [b"\xff", b"[" * 100_000, b'{"text": "one", "pause": NaN}']

    async with serving() as client:
        for status, several in bodies.items():
            for body in several:
                answer = await client.post("/analyse", content=body)
                assert (body[:40], answer.status_code) == (body[:40], status)
                assert ("error" in answer.json()) == (status != 200)

    assert service.outcomes == {"DONE": 3, "INVALID": 9, "TIMED_OUT": 1}


@pytest.mark.realtime
async def test_service_overloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Above its capacity the service refuses with 503, and only what is above."""
    monkeypatch.setattr(service, "CAPACITY", 3)
    body = {"text": "one", "pause": 0.5}

    async with serving() as client:
        answers = await asyncio.gather(*(client.post("/analyse", json=body) for _ in range(10)))

    assert Counter(answer.status_code for answer in answers) == {200: 3, 503: 7}


@pytest.mark.realtime
async def test_service_client_hangs_up() -> None:
    """A client that hangs up cancels its run, at once and with everything in it, and no other run."""
    async with serving() as client:
        before = asyncio.all_tasks()
        staying = asyncio.create_task(client.post("/analyse", json={"text": "stay", "pause": 1}))
        leaving = asyncio.create_task(client.post("/analyse", json={"text": "leave", "pause": 1.5}))
        await until(lambda: [run.state for run in service.running] == [service.State.ANALYSE] * 2)
        runs = set(service.running)

        leaving.cancel()
        await until(lambda: service.outcomes)

        (gone,) = runs - service.running
        assert service.outcomes == {"CANCELLED": 1}
        assert gone.done()
        with pytest.raises(WorkflowCancelledError) as caught:
            await gone
        assert caught.value.reason == "the client hung up"
        assert (await staying).json()["summary"] == "stay"
        assert service.outcomes == {"CANCELLED": 1, "DONE": 1}
        await until(lambda: asyncio.all_tasks() <= before)


@pytest.fixture
def script() -> Iterator[str]:
    """The service as `python examples/service.py` runs it; Ctrl-C ends it."""
    with start("service.py", "--port", 0, stdout=subprocess.DEVNULL) as process:
        assert process.stderr is not None
        log = ""
        while (found := re.search(r"running on (http://\S+)", log)) is None:
            line = process.stderr.readline()
            assert line, log
            log += line
        yield found[1]
        process.send_signal(signal.SIGINT)
        log += process.stderr.read()
    assert process.returncode == 0
    assert "Finished server process" in log
    assert "Error" not in log


@pytest.mark.realtime
@posix
def test_service_as_a_script(script: str) -> None:
    """`python examples/service.py` serves, and stops in good order."""
    answer = httpx.post(f"{script}/analyse", json={"text": "one two two"}, trust_env=False)

    assert answer.json() == {"count": 3, "frequent": [["two", 2], ["one", 1]], "summary": "one two two"}
    assert httpx.get(f"{script}/outcomes", trust_env=False).json() == {"running": 0, "DONE": 1}


# --- recovery --------------------------------------------------------------------------------------------------------


@posix
@pytest.mark.realtime
@pytest.mark.parametrize("steps", [0, 1, 2, 3, 5, 7])
def test_recovery_goes_on_after_a_kill(tmp_path: Path, steps: int) -> None:
    """Whatever step it is killed in, the next start does what was left of that order, and nothing that was done."""
    before = run("recovery.py", "--folder", tmp_path, "--crash-after", steps, status=-signal.SIGKILL)
    after = run("recovery.py", "--folder", tmp_path)

    lines = before.splitlines()
    assert lines.pop() == "killed"
    order = f"order-{1 if steps < 3 else 2 if steps < 5 else 3}"
    ended = "<Order.DONE: 4>"
    if order == "order-2":
        ended = "CardRefused('no money')"
    assert after.splitlines()[-1] == f"{order}: recovered, {ended}"
    if order != "order-2":
        of_order = [line for line in [*lines, *after.splitlines()] if line.startswith(order)]
        assert of_order[:-1] == [f"{order}: {step}" for step in ("reserved", "charged", "shipped")]


# --- order_service ---------------------------------------------------------------------------------------------------


def test_order_service_without_a_server() -> None:
    """It says that there is none, in a line."""
    output = run("order_service.py", "--dsn", "postgresql://nobody@127.0.0.1:1/nothing", status=1)
    assert output.startswith("the orders cannot be kept: ")
    assert len(output.splitlines()) == 1


@pytest.mark.realtime
@pytest.mark.skipif(find_programs() is None, reason=MISSING)
def test_order_service_with_a_worker_that_is_killed() -> None:
    """Each order is shipped, those of the killed process by another one, and no step that was written down is done again."""
    with PostgresServer.running() as server:
        lines = run("order_service.py", "--dsn", server.dsn).splitlines()

    assert (lines[0], lines[-1]) == ("0 orders are open", "all orders are done")
    (killed,) = [line.split()[0] for line in lines if line.endswith(" killed")]
    said = Counter(tuple(line.split()[:2]) for line in lines if " by " in line)
    for worker, order, step in itertools.product(range(3), range(5), ("charged", "packed", "shipped")):
        times = said[f"order-{worker}-{order}", step]
        assert times == 1 or (worker == 0 and times == 2), (worker, order, step)  # killed before it was written down
    shipped_by = dict(line.split()[::3] for line in lines if " shipped by " in line)
    taken = {line.split()[0] for line in lines if " taken over by " in line}
    assert taken >= {f"order-0-{order}" for order in range(5) if shipped_by[f"order-0-{order}"] != killed}
    assert taken
