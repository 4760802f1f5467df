"""`cano.testing.assert_no_orphans`, `no_orphans`, and the rule of conftest.py that a test leaves nothing behind."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from cano.testing import _leaks, assert_no_orphans, no_orphans, run


@pytest.fixture(autouse=True)
def short_join(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that are left on purpose are not waited for."""
    monkeypatch.setattr(_leaks, "_JOIN", 0.01)


async def sleep_within(seconds: float) -> None:
    await asyncio.sleep(seconds)


async def start_sleeper(name: str = "sleeper") -> asyncio.Task[None]:
    task = asyncio.create_task(sleep_within(3600), name=name)
    await asyncio.sleep(0)
    return task


def message_of(main: Callable[[], Coroutine[Any, Any, None]]) -> str:
    with pytest.raises(AssertionError) as caught:
        run(main())
    return str(caught.value)


class TestAssertNoOrphans:
    def test_nothing_is_left(self) -> None:
        """Work that was awaited, and timers that were cancelled, are not orphans."""

        async def main() -> None:
            async with asyncio.timeout(60), asyncio.TaskGroup() as group:
                group.create_task(asyncio.sleep(1))
            asyncio.get_running_loop().call_later(60, print).cancel()
            assert_no_orphans()

        run(main())

    def test_task_is_named_with_its_place(self) -> None:
        """The message names the task and its coroutine, and each frame from there to where it is suspended."""

        async def main() -> None:
            await start_sleeper()
            assert_no_orphans()

        lines = message_of(main).splitlines()

        assert lines[:2] == ["1 orphan is left:", "- task 'sleeper' of sleep_within(), suspended"]
        assert lines[2] == f"    at {__file__}:{sleep_within.__code__.co_firstlineno + 1} in sleep_within"
        assert lines[3].endswith(" in sleep")

    def test_task_that_never_ran(self) -> None:
        """A task that was not started yet is an orphan, and is said not to have started."""

        async def main() -> None:
            asyncio.create_task(sleep_within(1), name="early").get_name()
            assert_no_orphans()

        assert "- task 'early' of sleep_within(), not started" in message_of(main)

    def test_task_of_another_class(self) -> None:
        """A task is what asyncio's registry says, whatever its class."""

        class Branch:
            def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
                self.get_loop = lambda: loop
                self.get_name = lambda: "branch 3"
                self.get_coro = lambda: self
                self.done = lambda: False

        async def main() -> None:
            branch: Any = Branch(asyncio.get_running_loop())
            asyncio._register_task(branch)
            try:
                assert_no_orphans()
            finally:
                asyncio._unregister_task(branch)

        assert "- task 'branch 3' of Branch()" in message_of(main)

    def test_pending_timer(self) -> None:
        """A timer that no task waits for is an orphan."""

        async def main() -> None:
            asyncio.get_running_loop().call_later(60, print)
            assert_no_orphans()

        text = message_of(main)

        assert text.startswith("1 orphan is left:\n- timer <TimerHandle when=60.0 print()")

    def test_timer_of_a_task_is_not_reported_beside_it(self) -> None:
        """A sleeping task is one orphan, not two; so is one under a timeout."""

        async def under_timeout() -> None:
            async with asyncio.timeout(60):
                await asyncio.Event().wait()

        async def main() -> None:
            tasks = [await start_sleeper(), asyncio.create_task(under_timeout())]
            await asyncio.sleep(1)
            assert_no_orphans(ignore=tasks[:1])

        assert message_of(main).startswith("1 orphan is left:\n- task 'Task-")

    def test_timeout_around_the_question(self) -> None:
        """The timeout that the asking task itself is under is not an orphan."""

        async def main() -> None:
            async with asyncio.timeout(60):
                await asyncio.sleep(1)
                assert_no_orphans()

        run(main())

    def test_ignored_task_and_timer(self) -> None:
        """What is ignored may stay."""

        async def main() -> None:
            task = await start_sleeper()
            timer = asyncio.get_running_loop().call_later(60, print)
            assert_no_orphans(ignore=[task, timer])

        run(main())

    def test_equal_timer_is_not_ignored(self) -> None:
        """Of two equal timers the one that is not ignored is an orphan."""

        async def main() -> None:
            loop = asyncio.get_running_loop()
            first, _ = loop.call_at(60, print), loop.call_at(60, print)
            assert_no_orphans(ignore=[first])

        assert message_of(main).startswith("1 orphan is left:\n- timer")

    def test_several_orphans(self) -> None:
        """Each orphan has an entry, tasks by name before timers by deadline."""

        async def main() -> None:
            loop = asyncio.get_running_loop()
            loop.call_at(20, print)
            loop.call_at(10, print)
            tasks = [await start_sleeper("b"), await start_sleeper("a")]
            assert_no_orphans(ignore=tasks[2:])

        entries = [line for line in message_of(main).splitlines() if not line.startswith("    ")]

        assert entries[0] == "4 orphans are left:"
        assert [entry.split()[2] for entry in entries[1:]] == ["'a'", "'b'", "<TimerHandle", "<TimerHandle"]
        assert "when=10.0" in entries[3]

    def test_many_orphans(self) -> None:
        """A message shows the first 20 orphans and counts the others."""

        async def main() -> None:
            for _ in range(25):
                asyncio.get_running_loop().call_later(60, print)
            assert_no_orphans()

        lines = message_of(main).splitlines()

        assert (lines[0], len(lines), lines[-1]) == ("25 orphans are left:", 22, "- and 5 more")


class TestNoOrphans:
    def test_what_was_there_may_stay(self) -> None:
        """Tasks and timers from before the block stay, and such a task may sleep anew in it."""

        async def beat() -> None:
            while True:  # noqa: ASYNC110 - the point is that it sets timers
                await asyncio.sleep(1)

        async def main() -> None:
            heart = asyncio.create_task(beat())
            asyncio.get_running_loop().call_later(60, print)
            with no_orphans():
                await asyncio.sleep(2.5)
            heart.cancel()

        run(main())

    def test_what_began_in_the_block_may_not(self) -> None:
        """A task that began in the block and is not done at its end is an orphan."""

        async def main() -> None:
            before = await start_sleeper("before")
            with no_orphans():
                during = await start_sleeper("during")
            del before, during

        text = message_of(main)

        assert "'during'" in text
        assert "'before'" not in text

    def test_thread_is_an_orphan(self) -> None:
        """A thread that began in the block and still runs is an orphan, named with its place."""
        stop = threading.Event()

        async def main() -> None:
            with no_orphans():
                threading.Thread(target=stop.wait, name="stray").start()

        text = message_of(main)
        stop.set()

        assert "- thread 'stray'\n    at " in text

    def test_idle_workers_are_no_orphans(self) -> None:
        """Workers of the engine, and of the loop's default executor, may wait for more work."""
        stop = threading.Event()

        async def main() -> None:
            with no_orphans():
                threading.Thread(target=stop.wait, name="cano-worker-0").start()
                await asyncio.to_thread(int)

        run(main())
        stop.set()

    def test_exception_goes_before_orphans(self) -> None:
        """An exception that leaves the block is not hidden by what it left behind."""

        async def main() -> None:
            with no_orphans():
                task = await start_sleeper()
                raise LookupError(task.get_name())

        with pytest.raises(LookupError, match="sleeper"):
            run(main())


LEAKS = {
    "task": (
        "await asyncio.sleep(0); t = asyncio.create_task(asyncio.sleep(60), name='stray')",
        "*task 'stray' of sleep()*",
    ),
    "timer": ("asyncio.get_running_loop().call_later(60, print)", "*timer <TimerHandle*"),
    "thread": ("threading.Thread(target=stop.wait, name='stray').start()", "*thread 'stray'*"),
    "exception": (
        "asyncio.get_running_loop().create_future().set_exception(LookupError('lost'))",
        "*was never retrieved*",
    ),
    "callback": (
        "asyncio.get_running_loop().call_soon(int, 'x'); await asyncio.sleep(0)",
        "*Exception in callback int(*",
    ),
    "coroutine": ("asyncio.sleep(0)", "*coroutine 'sleep' was never awaited*"),
    "cycle": ("f = asyncio.Future(); f.own = [f]; f.set_exception(LookupError('lost'))", "*was never retrieved*"),
}


class TestConftest:
    """The rules of our own conftest.py, tried on small suites."""

    @pytest.fixture(autouse=True)
    def rules(
        self, pytester: pytest.Pytester, asyncio_reports: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> Iterator[None]:
        """Give the small suite our rules, none of our options, and keep what it reports from failing the test around it."""
        monkeypatch.delenv("PYTHONASYNCIODEBUG", raising=False)
        pytester.makeconftest(Path(__file__).with_name("conftest.py").read_text())
        pytester.makeini("""
            [pytest]
            addopts = -p no:hypothesispytest --strict-markers -rfE
            asyncio_mode = auto
            asyncio_default_fixture_loop_scope = function
            filterwarnings = error
        """)
        yield
        asyncio_reports.clear()

    @pytest.mark.parametrize(("body", "message"), LEAKS.values(), ids=LEAKS)
    def test_leak_fails_its_own_test(self, pytester: pytest.Pytester, body: str, message: str) -> None:
        """A test that leaves something behind fails with a message that names it; the next test does not."""
        pytester.makepyfile(f"""
            import asyncio, threading
            stop = threading.Event()

            async def test_leak():
                {body}

            async def test_next():
                stop.set()
        """)

        result = pytester.runpytest_inprocess()

        outcomes = result.parseoutcomes()
        assert outcomes.get("failed", 0) + outcomes.get("errors", 0) == 1
        result.stdout.fnmatch_lines([message])
        result.stdout.re_match_lines([r"(FAILED|ERROR) .*::test_leak"])

    def test_leak_of_a_plain_test_fails_it(self, pytester: pytest.Pytester) -> None:
        """A test that runs its own loop is held to the same rule for what asyncio reports."""
        pytester.makepyfile("""
            import asyncio
            from cano.testing import run

            async def lose():
                asyncio.get_running_loop().create_future().set_exception(LookupError("lost"))

            def test_leak():
                run(lose())
        """)

        result = pytester.runpytest_inprocess()

        result.assert_outcomes(passed=1, errors=1)
        result.stdout.fnmatch_lines(["*was never retrieved*", "*LookupError: lost*"])

    def test_failure_is_not_hidden_by_a_leak(self, pytester: pytest.Pytester) -> None:
        """A test that fails and leaks shows its failure."""
        pytester.makepyfile("""
            import asyncio

            async def test_leak():
                asyncio.get_running_loop().call_later(60, print)
                assert "mine" == "yours"
        """)

        result = pytester.runpytest_inprocess()

        result.assert_outcomes(failed=1)
        result.stdout.fnmatch_lines(["*AssertionError*'mine' == 'yours'*"])
        result.stdout.no_fnmatch_line("*TimerHandle*")

    def test_what_is_no_leak(self, pytester: pytest.Pytester) -> None:
        """Tasks of fixtures, idle workers, reports that the test expects and its failures leave a test as it is."""
        pytester.makepyfile("""
            import asyncio, threading
            import pytest

            @pytest.fixture
            async def heart():
                task = asyncio.create_task(asyncio.sleep(3600))
                yield task
                task.cancel()

            async def test_fixture(heart):
                await asyncio.to_thread(int)
                assert not heart.done()

            async def test_report(asyncio_reports):
                asyncio.get_running_loop().create_future().set_exception(LookupError("lost"))
                assert "lost" in asyncio_reports.pop()

            async def test_worker():
                threading.Thread(target=stop.wait, name="cano-0").start()

            def test_end():
                stop.set()

            stop = threading.Event()
        """)

        result = pytester.runpytest_inprocess()

        result.assert_outcomes(passed=4)

    @pytest.mark.realtime
    def test_real_time_test_may_fade_out(self, pytester: pytest.Pytester) -> None:
        """What a real-time test leaves may end by itself within a second."""
        pytester.makepyfile("""
            import asyncio
            import pytest

            @pytest.mark.realtime
            async def test_far_side():
                test_far_side.task = asyncio.create_task(asyncio.sleep(0.02))
        """)

        result = pytester.runpytest_inprocess()

        result.assert_outcomes(passed=1)

    @pytest.mark.parametrize(
        ("option", "plain", "realtime", "virtual"),
        [
            ("virtual", "VirtualClockLoop False", "_UnixSelectorEventLoop False", "VirtualClockLoop False"),
            ("debug", "VirtualClockLoop True", "_UnixSelectorEventLoop True", "VirtualClockLoop True"),
            ("asyncio", "_UnixSelectorEventLoop False", "_UnixSelectorEventLoop False", None),
            ("uvloop", "Loop False", "Loop False", None),
        ],
    )
    @pytest.mark.skipif(sys.platform == "win32", reason="other classes there, and no uvloop")
    def test_option_and_marks_choose_the_loop(
        self, pytester: pytest.Pytester, option: str, plain: str, realtime: str, virtual: str | None
    ) -> None:
        """--loop chooses the loop of every async test, and the marks overrule it."""
        pytester.makepyfile(f"""
            import asyncio
            import pytest
            from cano.testing import run

            async def loop():
                return type(asyncio.get_running_loop()).__name__ + f" {{asyncio.get_running_loop().get_debug()}}"

            async def test_plain():
                assert await loop() == {plain!r}

            @pytest.mark.realtime
            async def test_realtime():
                assert await loop() == {realtime!r}

            @pytest.mark.virtual
            async def test_virtual():
                assert await loop() == {virtual!r}

            def test_run():
                assert run(loop()) == "VirtualClockLoop {option == "debug"}"
        """)

        result = pytester.runpytest_inprocess(f"--loop={option}")

        result.assert_outcomes(passed=4 if virtual else 3, skipped=0 if virtual else 1)
