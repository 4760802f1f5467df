"""`cano.testing.VirtualClockLoop`, `run`, `real_time`: time that passes only when nothing else can happen."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import doctest
import math
import socket
import sys
import threading
import time
from collections.abc import Coroutine
from typing import Any

import pytest
from hypothesis import given, strategies as st

import cano.testing
from cano.testing import ClockStalledError, VirtualClockLoop, real_time, run

SHORT = 0.02
"""Real seconds that something real takes here."""


def now() -> float:
    return asyncio.get_running_loop().time()


class TestVirtualTime:
    @pytest.mark.parametrize("delay", [0.25, 0.1 + 0.2, 1e-12, 1e6, 2.0**24 + 1, 3.2e7, 1e12])
    def test_sleep_ends_exactly_at_its_deadline(self, delay: float) -> None:
        """After a sleep of any length the clock shows its deadline, to the last bit."""

        async def main() -> float:
            await asyncio.sleep(delay)
            return now()

        assert run(main()) == delay

    def test_time_starts_where_it_is_told(self) -> None:
        """The clock begins at start, and a sleep is counted from there."""

        async def main() -> tuple[float, float]:
            began = now()
            await asyncio.sleep(0.5)
            return began, now()

        assert run(main(), start=1000.0) == (1000.0, 1000.5)

    def test_time_stands_still_while_callbacks_run(self) -> None:
        """However often the loop goes round, no time passes until it has nothing left to do."""

        async def main() -> float:
            for _ in range(1000):
                await asyncio.sleep(0)
            return now()

        assert run(main()) == 0.0

    def test_a_million_seconds_cost_nothing(self) -> None:
        """Eleven days of sleeping end within the time limit of a test."""

        async def main() -> float:
            for _ in range(1000):
                await asyncio.sleep(1000)
            return now()

        assert run(main()) == 1e6

    def test_neighbouring_deadlines_fire_apart(self) -> None:
        """Two deadlines that differ in the last bit only each see the clock at their own."""
        sooner, later = 0.3, 0.1 + 0.2

        async def wake(delay: float) -> float:
            await asyncio.sleep(delay)
            return now()

        async def main() -> list[float]:
            return list(await asyncio.gather(wake(later), wake(sooner)))

        assert run(main()) == [later, sooner]

    def test_past_deadline_fires_at_once(self) -> None:
        """A timer set in the past fires in the next pass and does not turn the clock back."""

        async def main() -> float:
            await asyncio.sleep(10)
            fired = asyncio.Event()
            asyncio.get_running_loop().call_at(3, fired.set)
            await fired.wait()
            return now()

        assert run(main()) == 10.0

    @given(st.lists(st.sampled_from([0.0, 0.1, 0.1 + 0.2, 0.3, 1.0, 1e9]) | st.floats(0, 1e9), max_size=40))
    def test_timers_fire_by_deadline_then_by_turn(self, delays: list[float]) -> None:
        """Timers fire in the order of a stable sort by deadline, each at its own deadline."""

        async def main() -> list[tuple[float, int]]:
            fired: list[tuple[float, int]] = []

            def fire(turn: int) -> None:
                fired.append((now(), turn))

            for turn, delay in enumerate(delays):
                asyncio.get_running_loop().call_at(delay, fire, turn)
            await asyncio.sleep(2e9)
            return fired

        assert run(main()) == sorted((delay, turn) for turn, delay in enumerate(delays))

    @pytest.mark.parametrize("debug", [False, True], ids=["plain", "debug"])
    def test_timeout_fires_at_its_deadline(self, *, debug: bool) -> None:
        """asyncio's own timeouts read this clock, in debug mode too."""

        async def main() -> tuple[float, float]:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(5):
                    await asyncio.sleep(60)
            first = now()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.Event().wait(), 3600)
            return first, now()

        assert run(main(), debug=debug) == (5.0, 3605.0)


@pytest.mark.realtime
class TestRealWorkInFlight:
    """While something real is in flight the clock does not jump, and afterwards it does again.

    How far it went meanwhile is not certain: only real time that the loop waited counts, and on a busy machine the work may be
    done before the loop comes to wait.
    """

    async def _within_a_minute(self, work: asyncio.Task[None] | asyncio.Future[None]) -> None:
        began = now()
        async with asyncio.timeout(60):
            await work
        ended = now()
        assert ended < began + 60
        await asyncio.sleep(3600)
        assert now() == ended + 3600

    def test_clock_keeps_real_time(self) -> None:
        """While it is held the clock goes as fast as real time, so a sleep takes what it says."""

        async def main() -> float:
            with real_time():
                await asyncio.sleep(SHORT)
            return now()

        began = time.monotonic()
        virtual = run(main())

        assert SHORT <= virtual <= time.monotonic() - began

    @pytest.mark.parametrize("debug", [False, True], ids=["plain", "debug"])
    def test_default_executor_holds_the_clock(self, *, debug: bool) -> None:
        """A job in a thread is waited for in real time."""

        async def main() -> None:
            await self._within_a_minute(asyncio.create_task(asyncio.to_thread(time.sleep, SHORT)))

        run(main(), debug=debug)

    def test_custom_executor_holds_the_clock(self) -> None:
        """A job in an executor of one's own is waited for in real time."""

        async def main() -> None:
            with concurrent.futures.ThreadPoolExecutor(1) as pool:
                await self._within_a_minute(asyncio.get_running_loop().run_in_executor(pool, time.sleep, SHORT))

        run(main())

    def test_abandoned_job_holds_the_clock(self) -> None:
        """A job that nobody waits for any more holds the clock until it ends."""

        done = threading.Event()

        def job() -> None:
            time.sleep(SHORT)
            done.set()

        async def main() -> None:
            waiting = asyncio.create_task(asyncio.to_thread(job))
            await asyncio.sleep(0)
            waiting.cancel()
            await asyncio.sleep(60)
            assert done.is_set()

        run(main())

    def test_job_holds_the_clock_until_the_loop_closes(self) -> None:
        """Shutting down the default executor waits for its jobs in real time, so it never gives up on one too early."""
        done = threading.Event()

        def job() -> None:
            time.sleep(SHORT)
            done.set()

        async def main() -> None:
            asyncio.get_running_loop().run_in_executor(None, job)

        run(main())

        assert done.is_set()

    def test_socket_holds_the_clock(self) -> None:
        """A socket that is waited for is waited for in real time."""

        async def receive(sock: socket.socket) -> None:
            await asyncio.get_running_loop().sock_recv(sock, 1)

        async def main() -> None:
            near, far = socket.socketpair()
            near.settimeout(0)
            sender = threading.Timer(SHORT, far.send, (b"x",))
            sender.start()
            await self._within_a_minute(asyncio.create_task(receive(near)))
            sender.join()
            near.close()
            far.close()

        run(main())

    @pytest.mark.skipif(sys.platform == "win32", reason="this kind of loop has no subprocesses there")
    def test_child_process_holds_the_clock(self) -> None:
        """A child process without pipes is waited for in real time."""

        async def child() -> None:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-S", "-c", f"import time; time.sleep({SHORT})"
            )
            await process.wait()

        async def main() -> None:
            await self._within_a_minute(asyncio.create_task(child()))

        run(main())

    def test_real_time_block_holds_the_clock(self) -> None:
        """Inside real_time a thread that the loop knows nothing of is waited for in real time."""

        async def post() -> None:
            posted, loop = asyncio.Event(), asyncio.get_running_loop()
            with real_time():
                timer = threading.Timer(SHORT, loop.call_soon_threadsafe, (posted.set,))
                timer.start()
                await posted.wait()
            timer.join()

        async def main() -> None:
            await self._within_a_minute(asyncio.create_task(post()))

        run(main())

    async def test_real_time_block_on_a_stock_loop(self) -> None:
        """On a loop whose clock is real anyway real_time does nothing."""
        with real_time():
            await asyncio.sleep(0)

    def test_call_from_a_thread_within_the_grace(self) -> None:
        """A thread that calls in before the grace is over saves a program that looks stuck, and no time has passed."""

        async def main() -> float:
            posted = asyncio.Event()
            timer = threading.Timer(SHORT, asyncio.get_running_loop().call_soon_threadsafe, (posted.set,))
            timer.start()
            await posted.wait()
            timer.join()
            return now()

        assert run(main()) == 0.0

    def test_loop_run_forever_waits_for_calls(self) -> None:
        """A loop that has no coroutine to finish is not stuck when it is idle: it waits to be called."""
        loop = VirtualClockLoop(grace=0)
        timer = threading.Timer(SHORT, loop.call_soon_threadsafe, (loop.stop,))
        timer.start()

        loop.run_forever()

        timer.join()
        loop.close()


class TestStalled:
    """A program that waits for nothing. The grace is none here, so that no test waits for it."""

    def _run_stuck(self, main: Coroutine[Any, Any, object]) -> str:
        with (
            asyncio.Runner(loop_factory=lambda: VirtualClockLoop(grace=0)) as runner,
            pytest.raises(ClockStalledError) as caught,
        ):
            runner.run(main)
        return str(caught.value)

    def test_stuck_program_is_reported(self) -> None:
        """The error says when it was, and where each task stands."""

        async def wait_for_nobody() -> None:
            await asyncio.Event().wait()

        async def main() -> None:
            await asyncio.sleep(7)
            await asyncio.create_task(wait_for_nobody(), name="waiter")

        text = self._run_stuck(main())

        assert "the virtual clock stands at 7.0 s" in text
        assert "task 'waiter' of TestStalled.test_stuck_program_is_reported.<locals>.wait_for_nobody()" in text
        assert "in TestStalled.test_stuck_program_is_reported.<locals>.main" in text

    def test_endless_sleep_is_no_timer(self) -> None:
        """Sleeping for ever is stuck; it does not send the clock to infinity."""
        text = self._run_stuck(asyncio.sleep(math.inf))

        assert "stands at 0.0 s" in text

    def test_cancelled_timer_is_no_timer(self) -> None:
        """A timer that was cancelled does not keep a stuck program alive, nor move the clock."""

        async def main() -> None:
            asyncio.get_running_loop().call_later(60, print).cancel()
            await asyncio.Event().wait()

        assert "stands at 0.0 s" in self._run_stuck(main())

    def test_stuck_tasks_clean_up(self) -> None:
        """The runner cancels a stuck program, and its clean-up may take virtual time."""
        ended: list[float] = []

        async def main() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                await asyncio.sleep(60)
                ended.append(now())

        self._run_stuck(main())

        assert ended == [60.0]


class TestRun:
    def test_result_is_returned(self) -> None:
        """run returns what the coroutine returns."""
        assert run(asyncio.sleep(3600, "done")) == "done"

    def test_exception_is_raised(self) -> None:
        """The coroutine's own exception leaves run as the same object."""
        error = LookupError("mine")

        async def main() -> None:
            raise error

        with pytest.raises(LookupError) as caught:
            run(main())

        assert caught.value is error

    def test_leftover_tasks_are_cancelled(self) -> None:
        """Like asyncio.run, run cancels and awaits what the coroutine left."""
        left: list[asyncio.Task[None]] = []

        async def main() -> None:
            left.append(asyncio.create_task(asyncio.sleep(60)))

        run(main())

        assert left[0].cancelled()

    def test_loop_is_new_each_time(self) -> None:
        """Nothing of one run, not even its loop or its clock, is there in the next."""

        async def main() -> VirtualClockLoop:
            assert now() == 0.0
            await asyncio.sleep(60)
            loop = asyncio.get_running_loop()
            assert isinstance(loop, VirtualClockLoop)
            return loop

        first, second = run(main()), run(main())

        assert first is not second
        assert first.is_closed()

    @pytest.mark.parametrize("debug", [False, True], ids=["plain", "debug"])
    def test_debug_mode_is_set(self, *, debug: bool) -> None:
        """The loop's debug mode is the one asked for."""

        async def main() -> bool:
            return asyncio.get_running_loop().get_debug()

        assert run(main(), debug=debug) is debug

    async def test_inside_a_running_loop(self) -> None:
        """run refuses to run inside a loop, and closes the coroutine it was given."""
        with pytest.raises(RuntimeError, match="inside one, await the coroutine"):
            run(asyncio.sleep(0))


def test_documented_examples() -> None:
    """Every example in the docstrings of cano.testing runs as shown."""
    names = {"asyncio": asyncio, "threading": threading}

    failed, tried = doctest.testmod(cano.testing, extraglobs=names, optionflags=doctest.ELLIPSIS)

    assert not failed
    assert tried >= 9
