"""What a retry adds to a call that succeeds; for cano that is all that a run with one adds to awaiting the task by hand."""

from collections.abc import Awaitable, Callable
from functools import partial
from time import thread_time

import pytest

from cano import TaskConfig, Workflow

pytestmark = pytest.mark.benchmark(timer=thread_time)

CALLS = 2_000

Task = Callable[[], Awaitable[str]]


def task_of_a_loop() -> Task:
    left = CALLS

    async def task() -> str:
        nonlocal left
        left = left - 1 or CALLS
        return "again" if left < CALLS else "done"

    return task


def with_cano(task: Task) -> Task:
    config = TaskConfig().with_exponential_retry()
    return partial(Workflow[str]().register("again", task, config=config).add_exit_state("done").orchestrate, "again")


def by_hand(task: Task) -> Task:
    async def loop() -> str:
        while await task() != "done":
            pass
        return "done"

    return loop


def with_tenacity(task: Task) -> Task:
    tenacity = pytest.importorskip("tenacity", reason="tenacity is not installed: make peers")
    wait = tenacity.wait_random_exponential(multiplier=0.1, max=30)
    return by_hand(tenacity.retry(stop=tenacity.stop_after_attempt(4), wait=wait)(task))


def with_stamina(task: Task) -> Task:
    stamina = pytest.importorskip("stamina", reason="stamina is not installed: make peers")
    return by_hand(stamina.retry(on=Exception, attempts=4, timeout=None)(task))


PEERS = {"tenacity": with_tenacity, "stamina": with_stamina}


@pytest.mark.parametrize("peer", PEERS)
def test_retry(versus, peer):
    task = task_of_a_loop()
    pairs = {"cano": (with_cano(task), by_hand(task)), peer: (PEERS[peer](task), by_hand(task))}
    versus.added(f"added by a retry, beside {peer}", pairs, returns="done", per=CALLS)
