"""The most important splits on uvloop, whose loop costs less and whose timers are another's."""

from time import thread_time

import pytest

import cano
from benches.branches import (
    bodies,
    futures_of,
    gather,
    gather_behind_semaphore,
    gather_exceptions,
    raises,
    sleeps,
    sleeps_for_long,
    split,
    wait_for_the_first,
)

uvloop = pytest.importorskip("uvloop")

pytestmark = [pytest.mark.benchmark(timer=thread_time), pytest.mark.timeout(60)]


@pytest.mark.parametrize(
    ("branches", "kind"),
    [
        (3, "return at once"),
        (3, "await a future"),
        (1_000, "return at once"),
        (1_000, "sleep(0)"),
        (1_000, "await a future"),
        (1_000, "await a timer"),
    ],
)
def test_split(versus, branches, kind):
    these = bodies(kind, branches)
    versus(
        f"{branches:,} branches that {kind}, uvloop",
        {"cano": split(cano, these), "asyncio.gather": gather(these)},
        returns=[1] * branches,
        calls=max(1, 500 // branches),
        per=branches,
        prepare=futures_of(kind, branches),
        loop_factory=uvloop.new_event_loop,
    )


def test_first_decides(versus):
    these = [sleeps] + [sleeps_for_long] * 999
    contenders = {"cano": split(cano, these, strategy="Any"), "wait + cancel + gather": wait_for_the_first(these)}
    title = "first of 1,000 decides, 999 sleep, uvloop"
    versus(title, contenders, returns=[1], per=1_000, loop_factory=uvloop.new_event_loop)


def test_all_raise(versus):
    def count(joined):
        return len(joined.errors)

    these = [raises] * 1_000
    contenders = {
        "cano": split(cano, these, strategy="PartialResults", read=count),
        "gather(return_exceptions)": gather_exceptions(these),
    }
    title = "1,000 branches that raise, uvloop"
    versus(title, contenders, returns=1_000, per=1_000, loop_factory=uvloop.new_event_loop)


def test_bulkhead(versus):
    these = bodies("sleep(0)", 10_000)
    contenders = {
        "cano": split(cano, these, bulkhead=100),
        "semaphore + gather": gather_behind_semaphore(these, bulkhead=100),
    }
    title = "10,000 that sleep(0), bulkhead 100, uvloop"
    versus(title, contenders, returns=[1] * 10_000, per=10_000, loop_factory=uvloop.new_event_loop)
