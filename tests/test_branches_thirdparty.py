"""Branches under libraries that look closely at the current task: clients, threads, processes and streams, on loopback."""

import asyncio
import contextlib
import contextvars
import sys
import threading
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from cano import JoinConfig, JoinError, JoinStrategy, SplitResult, Workflow

pytestmark = pytest.mark.realtime

BRANCHES = 8

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


@contextlib.asynccontextmanager
async def server() -> AsyncIterator[str]:
    """A small HTTP server: "/slow" never answers, everything else is answered with its path."""
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
                if path == b"/slow":
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


async def test_httpx() -> None:
    """Branches share an httpx client (whose locks and time limits are anyio's); one that is too slow times out alone."""
    async with server() as address, httpx.AsyncClient(base_url=address, trust_env=False) as client:

        def getting(index: int) -> Any:
            async def get() -> str:
                texts = [(await client.get(f"/{index}-{turn}")).text for turn in range(3)]
                return ",".join(texts)

            return get

        async def too_slow() -> str:
            with pytest.raises(httpx.ReadTimeout):
                await client.get("/slow", timeout=0.05)
            return "timed out"

        values = await join(*map(getting, range(BRANCHES)), too_slow)

    assert values == [f"/{index}-0,/{index}-1,/{index}-2" for index in range(BRANCHES)] + ["timed out"]


async def test_httpx_losers() -> None:
    """Requests of cancelled branches give their connections back: the client works on."""
    async with (
        server() as address,
        httpx.AsyncClient(base_url=address, limits=httpx.Limits(max_connections=3), trust_env=False) as client,
    ):

        async def slow() -> str:
            return (await client.get("/slow", timeout=None)).text

        async def quick() -> str:
            return (await client.get("/quick")).text

        for _ in range(3):
            assert await join(slow, slow, quick, strategy=JoinStrategy.Any) == ["/quick"]
        assert await join(quick, quick, quick, quick) == ["/quick"] * 4


async def test_to_thread() -> None:
    """asyncio.to_thread runs in a copy of the branch's context, and its value comes back to the branch."""

    def branch(index: int) -> Any:
        async def run() -> tuple[int, bool, int]:
            task = asyncio.current_task()
            variable.set(index)
            seen = await asyncio.to_thread(variable.get)
            thread = await asyncio.to_thread(threading.get_ident)
            assert asyncio.current_task() is task
            return seen, thread != threading.get_ident(), variable.get()

        return run

    values = await join(*map(branch, range(BRANCHES)))
    await asyncio.get_running_loop().shutdown_default_executor()

    assert values == [(index, True, index) for index in range(BRANCHES)]


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


async def test_task_group() -> None:
    """asyncio.TaskGroup in a branch: it gathers, it fails with its group, and it ends when the branch is cancelled."""
    ended: list[int] = []

    async def child(index: int) -> int:
        try:
            await asyncio.sleep(0.01 if index < BRANCHES else 3600)
        finally:
            ended.append(index)
        return index

    async def gathers() -> int:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(child(index)) for index in range(BRANCHES)]
        return sum(task.result() for task in tasks)

    async def fails() -> None:
        async def fail() -> None:
            raise ValueError("child")

        async with asyncio.TaskGroup() as group:
            group.create_task(child(100))
            group.create_task(fail())

    async def hangs() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(child(200))

    with pytest.raises(JoinError) as caught:
        await join(gathers, fails)
    (group,) = caught.value.exceptions
    assert isinstance(group, ExceptionGroup)
    assert await join(hangs, gathers, strategy=JoinStrategy.Any) == [sum(range(BRANCHES))]
    assert {100, 200} <= set(ended)
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


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
