"""A split that does not wait for all its branches, or whose branches raise."""

from time import thread_time

import pytest

import cano
from benches import pure_python
from benches.branches import (
    awaits_its_future,
    cancelled,
    futures,
    gather,
    gather_exceptions,
    raises,
    returns_at_once,
    sleeps,
    sleeps_for_long,
    split,
    task_group,
    task_group_until_the_first,
    wait_for_the_first,
)

pytestmark = [pytest.mark.benchmark(timer=thread_time), pytest.mark.timeout(60)]

BRANCHES = 1_000


def count_errors(joined):
    return len(joined.errors)


def count_read_errors(joined):
    return len([outcome.error for outcome in joined.errors])


ENDINGS = {
    # title: the first branch, the others
    "first of 1,000 decides, 999 sleep": (sleeps, sleeps_for_long),
    "first of 1,000 decides, 999 await a future": (sleeps, awaits_its_future),
    "first of 1,000 decides at once": (returns_at_once, sleeps_for_long),
}


@pytest.mark.parametrize("title", ENDINGS)
def test_first_decides(versus, title):
    first, others = ENDINGS[title]
    branches = [first] + [others] * (BRANCHES - 1)
    contenders = {
        "cano": split(cano, branches, strategy="Any"),
        "wait + cancel + gather": wait_for_the_first(branches),
        "asyncio.TaskGroup": task_group_until_the_first(branches),
        "pure Python": split(pure_python, branches, strategy="Any"),
    }
    prepare = futures(BRANCHES, resolved=False) if others is awaits_its_future else None
    versus(title, contenders, returns=[1], per=BRANCHES, prepare=prepare)


def test_cancelled_from_outside(versus):
    branches = [sleeps_for_long] * BRANCHES
    contenders = {
        "cano": cancelled(split(cano, branches)),
        "asyncio.gather": cancelled(gather(branches)),
        "asyncio.TaskGroup": cancelled(task_group(branches)),
        "pure Python": cancelled(split(pure_python, branches)),
    }
    versus("1,000 sleep, cancelled from outside", contenders, returns="cancelled", per=BRANCHES)


@pytest.mark.parametrize("branches", [3, 1_000])
@pytest.mark.parametrize("read", [count_errors, count_read_errors])
def test_all_raise(versus, branches, read):
    """The outcomes are asked for; and again each exception is looked at, which is when cano writes the note on it."""
    these = [raises] * branches
    contenders = {
        "cano": split(cano, these, strategy="PartialResults", read=read),
        "gather(return_exceptions)": gather_exceptions(these),
        "pure Python": split(pure_python, these, strategy="PartialResults", read=read),
    }
    title = f"{branches:,} branches that raise" + (", each with its note" if read is count_read_errors else "")
    versus(title, contenders, returns=branches, calls=max(1, 500 // branches), per=branches)
