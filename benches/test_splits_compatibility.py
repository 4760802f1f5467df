"""Splits in compatibility mode, where each branch is an asyncio.Task."""

from time import thread_time

import pytest

import cano
from benches.branches import bodies, futures_of, gather, split, task_group

pytestmark = [pytest.mark.benchmark(timer=thread_time), pytest.mark.timeout(60)]


@pytest.fixture(autouse=True)
def _compatibility_mode():
    cano.configure(branches="asyncio")
    yield
    cano.configure(branches="native")


@pytest.mark.parametrize("kind", ["return at once", "sleep(0)", "await a future"])
def test_split(versus, kind):
    these = bodies(kind, 1_000)
    contenders = {"cano": split(cano, these), "asyncio.gather": gather(these), "asyncio.TaskGroup": task_group(these)}
    title = f"1,000 branches that {kind}, as tasks"
    versus(title, contenders, returns=[1] * 1_000, per=1_000, prepare=futures_of(kind, 1_000))
