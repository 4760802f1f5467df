"""Branches under libraries that look closely at the current task: clients, servers, threads, time limits and task groups."""

import asyncio
import contextlib
import contextvars
import functools
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any

import aiohttp
import aiohttp.web
import aiotools
import anyio.to_thread
import async_timeout
import httpx
import pytest
import quattro

from cano import JoinConfig, JoinError, JoinStrategy, SplitResult, Workflow

realtime = pytest.mark.realtime

BRANCHES = 8
STEP = 0.02
FOREVER = 3600.0

variable: contextvars.ContextVar[int] = contextvars.ContextVar("variable", default=-1)


async def join(*branches: Any, strategy: JoinStrategy = JoinStrategy.All, **options: Any) -> list[Any]:
    """Run a split, and give the values of its branches."""
    results: list[SplitResult] = []

    async def joined(result: SplitResult) -> str:
        results.append(result)
        return "end"

    workflow = (
        Workflow[str]()
        .register_split("split", branches, JoinConfig(strategy, "joined", **options))
        .register("joined", joined)
        .add_exit_state("end")
    )
    await workflow.orchestrate("split")
    return results[0].values()


def me() -> asyncio.Task[Any]:
    """The current task."""
    task = asyncio.current_task()
    assert task is not None
    return task


def qualified(made: Any) -> str:
    """Its name as one would write it."""
    return f"{made.__module__.partition('.')[0]}.{made.__name__}"


@contextlib.asynccontextmanager
async def server() -> AsyncIterator[str]:
    """A small HTTP server: "/slow" never answers, "/part" never ends, everything else is answered with its path."""
    connections: set[asyncio.Task[Any]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        connections.add(task)
        try:
            while line := await reader.readline():
                path = line.split()[1]
                while (await reader.readline()).strip():
                    pass
                if path == b"/part":
                    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\npart")
                if path in (b"/slow", b"/part"):
                    await reader.read()  # until the client hangs up
                    return
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(path), path))
                await writer.drain()
        except (asyncio.CancelledError, ConnectionError):
            pass
        finally:
            connections.discard(task)
            writer.close()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    host, port = listening.sockets[0].getsockname()
    try:
        yield f"http://{host}:{port}"
    finally:
        listening.close()
        for task in list(connections):
            task.cancel()
        if connections:
            await asyncio.wait(list(connections))


@contextlib.asynccontextmanager
async def httpx_client(address: str, connections: int) -> AsyncIterator[Callable[..., Awaitable[str]]]:
    """A client whose locks and time limits are anyio's."""
    limits = httpx.Limits(max_connections=connections)
    async with httpx.AsyncClient(base_url=address, limits=limits, trust_env=False) as client:

        async def get(path: str, timeout: float | None = None) -> str:
            return (await client.get(path, timeout=timeout)).text

        yield get


@contextlib.asynccontextmanager
async def aiohttp_client(address: str, connections: int) -> AsyncIterator[Callable[..., Awaitable[str]]]:
    """A client whose time limits remember the task and its count of cancels."""
    async with aiohttp.ClientSession(address, connector=aiohttp.TCPConnector(limit=connections)) as session:

        async def get(path: str, timeout: float | None = None) -> str:
            async with session.get(path, timeout=aiohttp.ClientTimeout(timeout)) as response:
                return await response.text()

        yield get


clients = pytest.mark.parametrize("client", [httpx_client, aiohttp_client], ids=["httpx", "aiohttp"])


def timed_out() -> contextlib.AbstractContextManager[object]:
    """The block must run out of time, in the words of either library."""
    return pytest.raises((TimeoutError, httpx.TimeoutException))


@realtime
@clients
async def test_http_client(client: Any) -> None:
    """Branches share an HTTP client; a request that is too slow times out in its branch alone."""
    async with server() as address, client(address, BRANCHES + 1) as get:

        def getting(index: int) -> Any:
            async def gets() -> str:
                return ",".join([await get(f"/{index}-{turn}") for turn in range(3)])

            return gets

        async def too_slow() -> str:
            with timed_out():
                await get("/slow", 0.05)
            return "timed out"

        values = await join(*map(getting, range(BRANCHES)), too_slow)

    assert values == [f"/{index}-0,/{index}-1,/{index}-2" for index in range(BRANCHES)] + ["timed out"]


@realtime
@clients
async def test_http_losers(client: Any) -> None:
    """Requests of cancelled branches give their connections back, to their own clean-up as well: the client works on."""
    cleaned: list[str] = []

    async with server() as address, client(address, 3) as get:

        def losing(path: str) -> Any:
            async def loses() -> str:
                try:
                    return await get(path)
                finally:
                    with timed_out():
                        await get("/slow", 0.05)
                    cleaned.append(await get("/bye"))

            return loses

        async def quick() -> str:
            return await get("/quick")

        for _ in range(3):
            assert await join(losing("/slow"), losing("/part"), quick, strategy=JoinStrategy.Any) == ["/quick"]
        assert await join(quick, quick, quick, quick) == ["/quick"] * 4

    assert cleaned == ["/bye"] * 6


@realtime
@pytest.mark.parametrize("limit", ["total", "sock_read"])
@pytest.mark.parametrize("path", ["/slow", "/part"])
async def test_aiohttp_time_limits(path: str, limit: str) -> None:
    """aiohttp's time limits for a session end a request at its headers or in its body, and the branch goes on."""
    timeout = aiohttp.ClientTimeout(**{limit: 0.05})
    async with server() as address, aiohttp.ClientSession(address, timeout=timeout) as session:

        async def run() -> tuple[str, int]:
            with timed_out():
                async with session.get(path) as response:
                    await response.text()
            async with session.get("/next") as response:
                return await response.text(), me().cancelling()

        assert await join(run, run) == [("/next", 0)] * 2


@realtime
async def test_aiohttp_pool() -> None:
    """A branch that waits for a connection of aiohttp's pool can be timed out or cancelled; the next in line gets it."""
    async with (
        server() as address,
        aiohttp.ClientSession(address, connector=aiohttp.TCPConnector(limit=1)) as session,
    ):
        release = asyncio.Event()
        connected = asyncio.Event()

        async def holds() -> str:
            async with session.get("/part"):
                connected.set()
                await release.wait()
            return "held"

        async def loses() -> str:
            await connected.wait()
            return await gets()

        async def times_out() -> str:
            await connected.wait()
            with timed_out():
                await session.get("/never", timeout=aiohttp.ClientTimeout(connect=0.05))
            return "timed out"

        async def decides() -> str:
            (value,) = await join(loses, times_out, strategy=JoinStrategy.Any)
            release.set()
            return value

        async def gets() -> str:
            async with session.get("/got") as response:
                return await response.text()

        async def next_in_line() -> str:
            await connected.wait()
            return await gets()

        assert await join(holds, decides, next_in_line) == ["held", "timed out", "/got"]


@realtime
async def test_aiohttp_server() -> None:
    """A handler of aiohttp's server runs a split for each request; a client that hangs up ends its branches."""
    ended: asyncio.Queue[str] = asyncio.Queue()

    async def handle(request: aiohttp.web.Request) -> aiohttp.web.Response:
        async def answers() -> str:
            await asyncio.sleep(0.01)
            return request.path

        async def hangs() -> None:
            try:
                await asyncio.sleep(FOREVER)
            finally:
                await asyncio.sleep(0.01)
                ended.put_nowait(request.path)

        branch = hangs if request.path == "/slow" else answers
        return aiohttp.web.Response(text="".join(await join(branch, branch)))

    application = aiohttp.web.Application()
    application.router.add_get("/{name}", handle)
    runner = aiohttp.web.AppRunner(application, access_log=None, handler_cancellation=True)
    await runner.setup()
    try:
        await aiohttp.web.TCPSite(runner, "127.0.0.1", 0).start()
        host, port = runner.addresses[0]
        async with aiohttp_client(f"http://{host}:{port}", BRANCHES) as get:
            asks = [functools.partial(get, f"/{index}") for index in range(BRANCHES)]
            assert await join(*asks) == [f"/{index}/{index}" for index in range(BRANCHES)]

            assert await join(functools.partial(get, "/slow"), asks[1], strategy=JoinStrategy.Any) == ["/1/1"]
            assert [await ended.get(), await ended.get()] == ["/slow"] * 2
    finally:
        await runner.cleanup()


@realtime
@pytest.mark.parametrize("to_thread", [asyncio.to_thread, anyio.to_thread.run_sync], ids=["asyncio", "anyio"])
async def test_to_thread(to_thread: Callable[..., Awaitable[Any]]) -> None:
    """A function in a thread runs in a copy of the branch's context, and its value comes back to the branch."""

    def branch(index: int) -> Any:
        async def run() -> tuple[int, bool, int]:
            task = asyncio.current_task()
            variable.set(index)
            seen = await to_thread(variable.get)
            thread = await to_thread(threading.get_ident)
            assert asyncio.current_task() is task
            return seen, thread != threading.get_ident(), variable.get()

        return run

    values = await join(*map(branch, range(BRANCHES)))
    await asyncio.get_running_loop().shutdown_default_executor()

    assert values == [(index, True, index) for index in range(BRANCHES)]


@realtime
async def test_call_from_a_thread() -> None:
    """A thread hands a branch a value through the loop, also by run_coroutine_threadsafe."""
    loop = asyncio.get_running_loop()

    async def run() -> list[int]:
        future = loop.create_future()
        threading.Thread(target=loop.call_soon_threadsafe, args=(future.set_result, 1)).start()
        first = await future

        async def work() -> int:
            return 2

        second = await asyncio.wrap_future(await asyncio.to_thread(asyncio.run_coroutine_threadsafe, work(), loop))
        return [first, second]

    values = await join(run, run)
    await loop.shutdown_default_executor()

    assert values == [[1, 2]] * 2


@realtime
async def test_subprocess() -> None:
    """Branches run processes, write to them and read from them; a loser's process is killed in its clean-up."""
    killed: list[int] = []

    async def echo() -> bytes:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            "print(input()[::-1])",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        out, _ = await asyncio.wait_for(process.communicate(b"olleh\n"), 10)
        return out.strip()

    async def endless() -> None:
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", "import time; time.sleep(600)")
        try:
            await process.wait()
        finally:
            process.kill()
            killed.append(await process.wait())

    assert await join(echo, echo) == [b"hello"] * 2
    assert await join(endless, echo, strategy=JoinStrategy.Any) == [b"hello"]
    assert len(killed) == 1
    assert killed[0] != 0


@realtime
async def test_streams() -> None:
    """Branches are both ends of a stream."""
    ready: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def serves() -> int:
        done = asyncio.Event()
        lines = 0

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal lines
            async for line in reader:
                lines += 1
                writer.write(line.upper())
                await writer.drain()
            writer.close()
            done.set()

        async with await asyncio.start_server(serve, "127.0.0.1", 0) as listening:
            ready.set_result(listening.sockets[0].getsockname()[1])
            await done.wait()
        return lines

    async def talks() -> list[bytes]:
        reader, writer = await asyncio.open_connection("127.0.0.1", await ready)
        answers = []
        for index in range(50):
            writer.write(b"line %d\n" % index)
            await writer.drain()
            answers.append(await asyncio.wait_for(reader.readline(), 10))
        writer.close()
        await writer.wait_closed()
        return answers

    lines, answers = await join(serves, talks)

    assert lines == 50
    assert answers == [b"LINE %d\n" % index for index in range(50)]


@pytest.mark.parametrize(
    ("task_group", "error"),
    [
        pytest.param(asyncio.TaskGroup, JoinError, id="asyncio"),
        pytest.param(quattro.TaskGroup, JoinError, id="quattro"),
        pytest.param(aiotools.TaskGroup, aiotools.TaskGroupError, id="aiotools"),  # no Exception: it leaves the run
    ],
)
async def test_task_group(task_group: Any, error: type[BaseExceptionGroup]) -> None:
    """A TaskGroup in a branch: it gathers, it fails with its group, and it ends when the branch is cancelled."""
    ended: list[int] = []

    async def child(index: int) -> int:
        try:
            await asyncio.sleep(0.01 if index < BRANCHES else 3600)
        finally:
            ended.append(index)
        return index

    async def gathers() -> int:
        async with task_group() as group:
            tasks = [group.create_task(child(index)) for index in range(BRANCHES)]
        return sum(task.result() for task in tasks)

    async def fails() -> None:
        async def fail() -> None:
            raise ValueError("child")

        async with task_group() as group:
            group.create_task(child(100))
            group.create_task(fail())

    async def hangs() -> None:
        async with task_group() as group:
            group.create_task(child(200))

    with pytest.raises(error) as caught:
        await join(gathers, fails)
    assert caught.group_contains(ValueError, match="child")
    assert await join(hangs, gathers, strategy=JoinStrategy.Any) == [sum(range(BRANCHES))]
    assert {100, 200} <= set(ended)
    assert me().cancelling() == 0


async def test_locks_and_queues() -> None:
    """asyncio's locks, conditions, semaphores, barriers and queues between branches."""
    queue: asyncio.Queue[int] = asyncio.Queue(2)
    lock, condition, semaphore = asyncio.Lock(), asyncio.Condition(), asyncio.Semaphore(2)
    barrier = asyncio.Barrier(4)
    inside = 0

    async def produces() -> None:
        await barrier.wait()
        for index in range(30):
            async with lock:
                await asyncio.sleep(0)
            await queue.put(index)

    async def consumes() -> int:
        nonlocal inside
        await barrier.wait()
        total = 0
        for _ in range(30):
            async with semaphore:
                inside += 1
                assert inside <= 2
                await asyncio.sleep(0)
                inside -= 1
            total += await asyncio.wait_for(queue.get(), 10)
        async with condition:
            condition.notify_all()
        return total

    async def waits() -> None:
        async with condition:
            await asyncio.wait_for(condition.wait(), 10)

    values = await join(produces, produces, consumes, consumes, waits)

    assert values[2] + values[3] == 2 * sum(range(30))


async def test_asyncpg_pattern() -> None:
    """wait_for around a protocol's future, which hands a cancel to the far side first, as database drivers do."""
    loop = asyncio.get_running_loop()
    cancelled: list[str] = []

    async def query(seconds: float) -> str:
        waiter = loop.create_future()
        timer = loop.call_later(seconds, lambda: waiter.done() or waiter.set_result("row"))
        try:
            return await waiter
        except asyncio.CancelledError:
            timer.cancel()
            await asyncio.shield(asyncio.sleep(0.01))
            cancelled.append("told the server")
            raise

    async def quick() -> str:
        return await asyncio.wait_for(query(0.01), 5)

    async def slow() -> str:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(query(60), 0.02)
        return "timed out"

    async def loser() -> str:
        return await asyncio.wait_for(query(60), 60)

    assert await join(quick, slow) == ["row", "timed out"]
    assert await join(loser, quick, strategy=JoinStrategy.Any) == ["row"]
    assert cancelled == ["told the server"] * 2


async def test_async_generators() -> None:
    """Asynchronous generators and context managers of a branch are closed in that branch."""
    closed: list[bool] = []

    async def numbers() -> AsyncIterator[int]:
        task = asyncio.current_task()
        try:
            while True:
                await asyncio.sleep(0)
                yield 1
        finally:
            await asyncio.sleep(0)
            closed.append(asyncio.current_task() is task)

    async def run() -> int:
        total = 0
        async with contextlib.aclosing(numbers()) as source:
            async for one in source:
                total += one
                if total == 5:
                    break
        return total

    assert await join(run, run) == [5, 5]
    assert closed == [True, True]


# --- time limits, all used alike: some raise TimeoutError, some end quietly ----------------------------------------------

LIMITS = {
    "asyncio": asyncio.timeout,
    "async-timeout": async_timeout.timeout,
    "anyio-fail": anyio.fail_after,
    "anyio-move": anyio.move_on_after,
    "quattro-fail": quattro.fail_after,
    "quattro-move": quattro.move_on_after,
    "aiotools": aiotools.timeout,
}
Limit = Callable[[float], Any]
limits = pytest.mark.parametrize("limit", LIMITS.values(), ids=LIMITS)


async def expires(scope: Any, body: Awaitable[object]) -> bool:
    """Whether the time limit cut the body short."""
    with contextlib.suppress(TimeoutError):
        async with contextlib.AsyncExitStack() as stack:
            if hasattr(scope, "__aenter__"):
                await stack.enter_async_context(scope)
            else:
                stack.enter_context(scope)
            await body
            return False
    return True


@limits
async def test_limit_inside(limit: Limit) -> None:
    """A time limit in a branch ends its own block, from the first step on and again, and the branch goes on unharmed."""

    async def run() -> list[object]:
        seen: list[object] = []
        for _ in range(2):
            seen += [await expires(limit(STEP), asyncio.sleep(FOREVER)), me().cancelling()]
            await asyncio.sleep(STEP)
        seen += [await expires(limit(FOREVER), asyncio.sleep(STEP)), me().cancelling()]
        return seen

    async def beside() -> str:
        await asyncio.sleep(3 * STEP)
        return "unharmed"

    expected = [True, 0, True, 0, False, 0]
    assert await join(run, beside, run) == [expected, "unharmed", expected]


@limits
async def test_limit_around(limit: Limit) -> None:
    """A time limit around a split ends when the branches have, of nested splits too; no limit in them takes its cancel."""
    ended: list[str] = []

    async def waits() -> bool:
        try:
            return await expires(limit(FOREVER), asyncio.sleep(FOREVER))
        finally:
            try:
                await asyncio.sleep(0)  # where anyio's scopes cancel again
            finally:
                ended.append("inner")

    async def nests() -> bool:
        try:
            return await expires(limit(FOREVER), join(waits, waits))
        finally:
            ended.append("outer")

    assert await expires(limit(STEP), join(nests, waits))
    assert sorted(ended) == ["inner"] * 3 + ["outer"]
    assert ended[-1] == "outer"
    assert me().cancelling() == 0
    await asyncio.sleep(0)


@limits
async def test_limit_between(limit: Limit) -> None:
    """A time limit that a branch has around a nested split ends that split and nothing else."""

    async def waits() -> None:
        await asyncio.sleep(FOREVER)

    async def cuts() -> tuple[bool, int]:
        return await expires(limit(STEP), join(waits, waits)), me().cancelling()

    async def nests() -> list[Any]:
        return await join(cuts, cuts)

    async def nests_within() -> None:
        assert await join(nests, cuts) == [[(True, 0)] * 2, (True, 0)]

    assert not await expires(limit(FOREVER), nests_within())


@limits
async def test_limit_of_a_loser(limit: Limit) -> None:
    """A time limit that is open in a loser does not take the join's cancel for its own."""
    went_on: list[bool] = []

    async def loser() -> None:
        went_on.append(await expires(limit(FOREVER), asyncio.sleep(FOREVER)))

    async def quick() -> str:
        await asyncio.sleep(STEP)
        return "quick"

    assert await join(loser, quick, strategy=JoinStrategy.Any) == ["quick"]
    assert went_on == []


@pytest.mark.virtual
@limits
async def test_limit_and_cancel_at_once(limit: Limit) -> None:
    """A branch that its time limit and a sibling cancel in one turn ends: the limit counts, and lets the other pass."""
    went_on: list[bool] = []
    tasks: list[asyncio.Task[Any]] = []

    async def cancels_sibling() -> str:
        await asyncio.sleep(STEP)
        tasks[0].cancel()
        return "cancelled it"

    async def sibling() -> None:
        tasks.append(me())
        went_on.append(await expires(limit(STEP), asyncio.sleep(FOREVER)))

    assert await join(cancels_sibling, sibling, strategy=JoinStrategy.Any) == ["cancelled it"]
    assert went_on == []
    assert tasks[0].cancelled()


# --- task groups of others -----------------------------------------------------------------------------------------------

Children = list[Coroutine[Any, Any, Any]]


async def in_group(group_type: Any, children: Children) -> None:
    async with group_type() as group:
        for child in children:
            group.create_task(child)


async def in_background(children: Children) -> None:
    async with quattro.TaskGroup() as group:
        for child in children:
            group.create_background_task(child)
        await asyncio.sleep(FOREVER)


async def as_completed(children: Children) -> list[Any]:
    return [await child async for child in aiotools.as_completed_safe(children)]


async def quattro_gather(children: Children) -> tuple[Any, ...]:
    return await quattro.gather(*children)


@pytest.mark.parametrize(
    "wait_for_all",
    [
        pytest.param(functools.partial(in_group, group_type), id=qualified(group_type))
        for group_type in (
            asyncio.TaskGroup,
            quattro.TaskGroup,
            aiotools.TaskGroup,
            aiotools.TaskScope,
            aiotools.Supervisor,
        )
    ]
    + [
        pytest.param(in_background, id="quattro-background"),
        pytest.param(quattro_gather, id="quattro.gather"),
        pytest.param(as_completed, id="aiotools.as_completed_safe"),
        pytest.param(aiotools.gather_safe, id="aiotools.gather_safe"),
        pytest.param(aiotools.race, id="aiotools.race"),
    ],
)
async def test_children_of_a_loser(wait_for_all: Callable[[Children], Awaitable[object]]) -> None:
    """What a loser has begun in tasks of its own ends before it does, and it before the join."""
    ended: list[str] = []

    async def child() -> None:
        try:
            await asyncio.sleep(FOREVER)
        finally:
            await asyncio.sleep(STEP)
            ended.append("child")

    async def loser() -> None:
        try:
            await wait_for_all([child(), child()])
        finally:
            ended.append("loser")

    async def quick() -> str:
        await asyncio.sleep(STEP)
        return "quick"

    assert await join(loser, quick, strategy=JoinStrategy.Any) == ["quick"]
    assert ended == ["child", "child", "loser"]


async def after(delay: float, value: object) -> Any:
    """Sleep, then give the value, or raise it."""
    await asyncio.sleep(delay)
    if isinstance(value, Exception):
        raise value
    return value


async def test_quattro() -> None:
    """quattro in branches: background tasks end with their group, gather keeps to its limit, deadlines are the context's."""
    running = 0

    async def counted() -> int:
        nonlocal running
        running += 1
        try:
            return await after(STEP, running)
        finally:
            running -= 1

    async def background() -> bool:
        async with quattro.TaskGroup() as group:
            task = group.create_background_task(asyncio.sleep(FOREVER))
            group.create_task(asyncio.sleep(STEP))
        return task.cancelled()

    async def gathers() -> tuple[int, ...]:
        return await quattro.gather(*(counted() for _ in range(4)), concurrency_limit=1)

    async def own_deadline() -> bool:
        with quattro.fail_after(FOREVER / 2):
            await asyncio.sleep(STEP)
            return quattro.get_current_effective_deadline() < outer.deadline

    async def given_deadline() -> bool:
        await asyncio.sleep(STEP / 2)
        return quattro.get_current_effective_deadline() == outer.deadline

    with quattro.fail_after(FOREVER) as outer:
        values = await join(background, gathers, own_deadline, given_deadline)

    assert values == [True, (1, 1, 1, 1), True, True]


async def test_aiotools() -> None:
    """aiotools in branches: races, order of completion, supervised children, moving on, and a sibling cancelled for good."""
    siblings: list[asyncio.Task[Any]] = []

    async def races() -> tuple[Any, Any]:
        return await aiotools.race([after(FOREVER, "slow"), after(STEP, "quick")])

    async def in_order() -> list[Any]:
        return await as_completed([after(2 * STEP, 2), after(3 * STEP, 3), after(STEP, 1)])

    async def supervises() -> tuple[Any, ...]:
        async with aiotools.Supervisor() as supervisor:
            fails = supervisor.create_task(after(0, ValueError("child")))
            lives = supervisor.create_task(after(STEP, "lives"))
        return type(fails.exception()), lives.result()

    async def gathers() -> list[Any]:
        return await aiotools.gather_safe([after(STEP, 1), after(0, 2)])

    async def moves_on() -> bool:
        async with aiotools.move_on_after(STEP) as scope:
            child = scope.create_task(asyncio.sleep(FOREVER))
            await asyncio.sleep(FOREVER)
        return child.cancelled()

    async def victim() -> None:
        siblings.append(me())
        try:
            await asyncio.sleep(FOREVER)
        finally:
            await asyncio.sleep(STEP)

    async def kills() -> bool:
        await aiotools.cancel_and_wait(siblings[0])
        return siblings[0].cancelled()

    assert await join(races, in_order, supervises, gathers, moves_on) == [
        ("quick", []),
        [1, 2, 3],
        (ValueError, "lives"),
        [1, 2],
        True,
    ]
    assert await join(victim, kills, strategy=JoinStrategy.Any) == [True]


@pytest.mark.parametrize("by", ["join", "limit", "sibling"])
async def test_aiotools_shield(by: str) -> None:
    """aiotools.ShieldScope, which puts a `cancel` of its own on the task, holds every cancel back until it is left."""
    reached: list[str] = []
    tasks: list[asyncio.Task[Any]] = []

    async def shielded() -> None:
        tasks.append(me())
        with aiotools.ShieldScope():
            await asyncio.sleep(3 * STEP)
            reached.append("end of the shield")
        await asyncio.sleep(FOREVER)
        reached.append("too far")

    async def other() -> None:
        await asyncio.sleep(FOREVER if by == "limit" else STEP)
        if by == "sibling":
            tasks[0].cancel()
            await asyncio.wait(tasks)

    limit = asyncio.timeout(STEP if by == "limit" else FOREVER)
    assert await expires(limit, join(shielded, other, strategy=JoinStrategy.Any)) == (by == "limit")
    assert reached == ["end of the shield"]
    assert tasks[0].cancelled()
