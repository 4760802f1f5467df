"""The loop that async tests run on, and the rule that a test leaves nothing behind.

``--loop=virtual`` (the default) runs each async test on its own `cano.testing.VirtualClockLoop`, ``debug`` the same in
asyncio's debug mode, ``asyncio`` and ``uvloop`` on those loops in real time. ``--branches=asyncio`` runs every split in
compatibility mode. Two marks: ``virtual`` needs the virtual
clock and is skipped on the last two; ``realtime`` uses real time or real sockets and never runs on the virtual clock.
Plain tests that call `cano.testing.run` are on the virtual clock whatever the option says.

Hypothesis plays the same examples each time; ``--hypothesis-profile=default`` plays new ones.

A test fails that leaves a task, a pending timer, a thread, or an error that asyncio had to report because nobody took it.
In a test that runs a loop of its own nobody sees the tasks: there, `cano.testing.assert_no_orphans` is the last line.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
from collections.abc import Callable, Generator, Iterator, Mapping

import hypothesis
import pytest
from pytest_asyncio import is_async_test

import cano
from cano.testing import VirtualClockLoop
from cano.testing._leaks import ENGINE_THREADS, Orphan, alive, describe, expect_none, started_threads

pytest_plugins = ("pytester",)

hypothesis.settings.register_profile("fixed", derandomize=True)
hypothesis.settings.load_profile("fixed")

_LOOP = pytest.StashKey[asyncio.AbstractEventLoop]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--loop",
        choices=("virtual", "debug", "asyncio", "uvloop"),
        default="virtual",
        help="what async tests run on: the virtual clock (also in debug mode), or a stock loop in real time",
    )
    parser.addoption(
        "--branches",
        choices=("native", "asyncio"),
        default="native",
        help="what splits run their branches as: tasks of cano's own, or asyncio's (compatibility mode)",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "virtual: needs the virtual clock; skipped on other loops")
    config.addinivalue_line("markers", "realtime: needs real time or real sockets; never runs on the virtual clock")
    if config.getoption("--loop") == "debug":
        config.option.asyncio_debug = True  # for the loops of pytest-asyncio
        patch = pytest.MonkeyPatch()
        patch.setenv("PYTHONASYNCIODEBUG", "1")  # for every other loop
        config.add_cleanup(patch.undo)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kind = config.getoption("--loop")
    for item in items:
        if kind in ("asyncio", "uvloop") and item.get_closest_marker("virtual"):
            item.add_marker(pytest.mark.skip(reason="needs the virtual clock"))
        if kind != "virtual" and item.get_closest_marker("model"):
            item.add_marker(pytest.mark.skip(reason="has a loop of its own, or none: once is enough"))


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    kind = str(config.getoption("--loop"))
    new_loop: Callable[[], asyncio.AbstractEventLoop]
    if kind == "uvloop":
        import uvloop  # noqa: PLC0415 - not there on Windows

        new_loop = uvloop.new_event_loop
    elif kind == "asyncio" or item.get_closest_marker("realtime"):
        new_loop = asyncio.new_event_loop
    else:
        new_loop = VirtualClockLoop

    def factory() -> asyncio.AbstractEventLoop:
        loop = config.stash[_LOOP] = new_loop()
        return loop

    return {kind: factory}


def pytest_runtest_setup(item: pytest.Item) -> None:
    cano.configure(branches=item.config.getoption("--branches"))  # whatever the test before has chosen


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    """Fail the test that leaves a task or a timer, before the runner would clear them away."""
    if not is_async_test(item):
        return (yield)
    loop = item.config.stash[_LOOP]
    of_fixtures = alive(loop)
    yield
    left = _orphans(loop, of_fixtures)
    if not isinstance(loop, VirtualClockLoop):
        # In real time the far side of a connection ends when it ends: it is given up to a second.
        for _ in range(20):
            if not left:
                break
            loop.run_until_complete(asyncio.sleep(0.05))
            left = _orphans(loop, of_fixtures)
    if left:
        pytest.fail(left, pytrace=False)


def _orphans(loop: asyncio.AbstractEventLoop, ignore: list[Orphan]) -> str:
    try:
        expect_none(alive(loop), ignore)
    except AssertionError as error:
        return str(error)
    return ""


class _Reports(logging.Handler):
    """Keeps what asyncio's default exception handler logs."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(self.format(record))


@pytest.fixture(autouse=True)
def asyncio_reports() -> Iterator[list[str]]:
    """The errors that asyncio reported because nobody took them; a test that expects some must clear the list.

    As an autouse fixture it comes before the loop and goes after it, so it sees what is reported when the loop closes,
    and fails the test for that and for threads that are left.
    """
    threads = threading.enumerate()
    reports = _Reports()
    logger = logging.getLogger("asyncio")
    logger.addHandler(reports)
    gc.freeze()  # what is here now is not this test's; passing over it keeps the collection below cheap
    yield reports.texts
    gc.collect()  # an exception that nobody took may sit in a cycle, and is reported when that goes
    logger.removeHandler(reports)
    left = [describe(thread) for thread in started_threads(threads, idle=ENGINE_THREADS)]
    if left or reports.texts:
        pytest.fail("\n".join([*reports.texts, *left]), pytrace=False)
