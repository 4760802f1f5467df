"""What cano costs before it does anything: the time of its import, and the memory of a run or a branch that waits.

All are measured in new interpreters, which take turns like all other contenders.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import pytest

pytestmark = [pytest.mark.benchmark(timer=perf_counter), pytest.mark.timeout(60)]

ROOT = Path(__file__).parents[1]

IMPORT = """
{first}
from time import {clock}
began = {clock}()
import {module}
print({clock}() - began)
"""

WAITING = """
import asyncio, gc, os, tracemalloc
import cano
from benches import pure_python

def resident():
    with open("/proc/self/statm") as memory:
        return int(memory.read().split()[1]) * os.sysconf("SC_PAGESIZE")

def allocated():
    return tracemalloc.get_traced_memory()[0]

async def main(used, count):
    gate = asyncio.get_running_loop().create_future()

    async def task():
        await gate
        return "done"

    def asyncio_task():
        return asyncio.create_task(task())

    def run():
        return workflow.start("wait")

    def pure_python_run():
        return asyncio.create_task(pure_python_workflow.orchestrate("wait"))

    async def begin(count):
        waiting = [{begin}() for _ in range(count)]
        for _ in range(3):
            await asyncio.sleep(0)
        gc.collect()
        return waiting

    workflow = cano.Workflow().register("wait", task).add_exit_state("done")
    pure_python_workflow = pure_python.Workflow().register("wait", task).add_exit_state("done")
    some = await begin(100)
    before = used()
    more = await begin(count)
    print((used() - before) / count)
    tracemalloc.stop()
    gate.set_result(None)
    assert [await one for one in some + more] == ["done"] * (100 + count)

if {used} is allocated:
    tracemalloc.start()
asyncio.run(main({used}, 10_000))
"""

BRANCHES = """
import asyncio, gc, os, tracemalloc
import cano
from benches import pure_python
from benches.branches import gather, resolve, split

def resident():
    with open("/proc/self/statm") as memory:
        return int(memory.read().split()[1]) * os.sysconf("SC_PAGESIZE")

def allocated():
    return tracemalloc.get_traced_memory()[0]

async def main(used, count):
    async def branch():
        return await next(left)

    async def turn():
        for _ in range(3):
            await asyncio.sleep(0)
        gc.collect()

    def waiting_futures(count):
        return [asyncio.get_running_loop().create_future() for _ in range(count)]

    def begin(count):
        branches = [branch] * count
        return asyncio.create_task({contender}())

    made = waiting_futures(1_000)
    left = iter(made)
    some = begin(1_000)
    await turn()
    more = waiting_futures(count)
    left = iter(more)
    if used is allocated:
        tracemalloc.start()
    before = used()
    others = begin(count)
    await turn()
    print((used() - before) / count)
    tracemalloc.stop()
    resolve(made)
    resolve(more)
    assert await some == [1] * 1_000
    assert await others == [1] * count

asyncio.run(main({used}, 10_000))
"""

BATCH = """
import asyncio, gc, os
from benches.test_batches import ITEMS, batch, gather_behind_semaphore, pulling_workers

most = 0

def resident():
    with open("/proc/self/statm") as memory:
        return int(memory.read().split()[1]) * os.sysconf("SC_PAGESIZE")

async def work(item):
    global most
    await asyncio.sleep(0)
    if item % 500 == 499:
        most = max(most, resident())
    return 1

gc.collect()
before = resident()
assert len(asyncio.run({contender}(work)())) == ITEMS
print((most - before) / ITEMS)
"""


@pytest.fixture(scope="module")
def child(tmp_path_factory):
    """Makes samplers that run code in a new interpreter and return the number that it prints."""
    # As where cano is installed, there is bytecode: the first run writes it, whatever the environment says.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPYCACHEPREFIX"] = str(tmp_path_factory.mktemp("bytecode"))

    def make(code: str, **names: str) -> Callable[[], float]:
        command = [sys.executable, "-c", code.format(**names)]

        def run() -> float:
            done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, check=True)  # noqa: S603
            return float(done.stdout)

        return run

    return make


@pytest.mark.parametrize("clock", ["perf_counter", "process_time"])
def test_import(versus, child, clock):
    contenders = {
        "cano": child(IMPORT, first="import asyncio", module="cano", clock=clock),
        "import asyncio": child(IMPORT, first="", module="asyncio", clock=clock),
    }
    title = "import cano, asyncio being imported" if clock == "perf_counter" else "import cano, CPU time"
    versus.sampled(title, contenders, unit="s", rounds=15 if clock == "perf_counter" else 9)


@pytest.mark.parametrize("used", ["allocated", "resident"])
def test_run_in_flight(versus, child, used):
    if used == "resident" and not Path("/proc/self/statm").exists():
        pytest.skip("needs Linux")
    contenders = {
        "cano": child(WAITING, begin="run", used=used),
        "asyncio task": child(WAITING, begin="asyncio_task", used=used),
        "pure Python": child(WAITING, begin="pure_python_run", used=used),
    }
    versus.sampled(f"run that waits, memory {used}", contenders, unit="B", rounds=2)


@pytest.mark.parametrize("used", ["allocated", "resident"])
def test_branch_in_flight(versus, child, used):
    if used == "resident" and not Path("/proc/self/statm").exists():
        pytest.skip("needs Linux")
    contenders = {
        "cano": child(BRANCHES, contender="split(cano, branches)", used=used),
        "asyncio.gather": child(BRANCHES, contender="gather(branches)", used=used),
        "pure Python": child(BRANCHES, contender="split(pure_python, branches)", used=used),
    }
    versus.sampled(f"branch that waits, memory {used}", contenders, unit="B", rounds=2)


def test_item_of_a_batch(versus, child):
    if not Path("/proc/self/statm").exists():
        pytest.skip("needs Linux")
    contenders = {
        "cano": child(BATCH, contender="batch"),
        "semaphore + gather": child(BATCH, contender="gather_behind_semaphore"),
        "workers that pull": child(BATCH, contender="pulling_workers"),
    }
    versus.sampled("item of 10,000 in a batch, most memory resident", contenders, unit="B", rounds=5)
