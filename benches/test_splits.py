"""A split into branches and their join, down to the list of what the branches returned."""

from time import thread_time

import pytest

import cano
from benches import pure_python
from benches.branches import (
    KINDS,
    bodies,
    futures_of,
    gather,
    gather_behind_semaphore,
    pulling_workers,
    split,
    task_group,
)

pytestmark = [pytest.mark.benchmark(timer=thread_time), pytest.mark.timeout(60)]


@pytest.mark.parametrize("branches", [3, 10, 100, 1_000, 10_000])
@pytest.mark.parametrize("kind", KINDS)
def test_split(versus, kind, branches):
    these = bodies(kind, branches)
    contenders = {
        "cano": split(cano, these),
        "asyncio.gather": gather(these),
        "asyncio.TaskGroup": task_group(these),
        "pure Python": split(pure_python, these),
    }
    # A timer makes the loop sleep for a millisecond, whatever the number of branches.
    calls = max(1, (50 if "timer" in kind or "all" in kind else 500) // branches)
    prepare = futures_of(kind, branches)
    versus(
        f"{branches:,} branches that {kind}",
        contenders,
        returns=[1] * branches,
        calls=calls,
        per=branches,
        prepare=prepare,
    )


@pytest.mark.parametrize("kind", ["return at once", "sleep(0)"])
def test_bulkhead(versus, kind):
    these = bodies(kind, 10_000)
    contenders = {
        "cano": split(cano, these, bulkhead=100),
        "cano, shared Bulkhead(100)": split(cano, these, bulkhead=cano.Bulkhead(100)),
        "semaphore + gather": gather_behind_semaphore(these, bulkhead=100),
        "workers that pull": pulling_workers(these, bulkhead=100),
        "pure Python": split(pure_python, these, bulkhead=100),
    }
    versus(f"10,000 that {kind}, bulkhead 100", contenders, returns=[1] * 10_000, per=10_000)


@pytest.mark.parametrize("kind", ["return at once", "sleep(0)", "await a future"])
def test_growth(versus, kind):
    """What a branch costs must not depend on how many there are."""
    sizes = {"cano": 10_000, "cano, splits of 1,000": 1_000, "cano, splits of 100": 100}
    contenders = {
        name: (branches, split(cano, bodies(kind, branches)), futures_of(kind, branches))
        for name, branches in sizes.items()
    }
    versus.growing(f"10,000 in one split that {kind}", contenders, returns=1)
