"""What cano costs before it does anything: the time of its import, and the memory of a run that waits.

Both are measured in new interpreters, which take turns like all other contenders.
"""

import subprocess
import sys
from functools import partial
from pathlib import Path
from time import perf_counter

import pytest

SECTION = "import and memory"
pytestmark = [pytest.mark.benchmark(timer=perf_counter), pytest.mark.timeout(60)]

ROOT = Path(__file__).parents[1]

IMPORT = """
{before}
from time import perf_counter
began = perf_counter()
import {module}
print(perf_counter() - began)
"""

IN_FLIGHT = """
import asyncio, gc, os, tracemalloc
from pathlib import Path

import cano
from benches import pure_python

COUNT = 10_000

async def main():
    gate = asyncio.get_running_loop().create_future()

    async def task():
        await gate
        return "done"

    workflow = cano.Workflow().register("wait", task).add_exit_state("done")
    pure = pure_python.Workflow().register("wait", task).add_exit_state("done")
    begin = {begin}
    async def settle():
        for _ in range(3):
            await asyncio.sleep(0)
        gc.collect()

    warm = [begin() for _ in range(100)]
    await settle()
    before = {used}
    waiting = [begin() for _ in range(COUNT)]
    await settle()
    print(({used} - before) / COUNT)
    gate.set_result(None)
    ends = [await one for one in waiting + warm]
    assert ends == ["done"] * (COUNT + 100)

{prelude}
asyncio.run(main())
"""

BEGIN = {
    "cano": "lambda: workflow.start('wait')",
    "asyncio task": "lambda: asyncio.create_task(task())",
    "pure Python": "lambda: asyncio.create_task(pure.orchestrate('wait'))",
}


def in_new_interpreter(code: str) -> float:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)  # noqa: S603
    return float(done.stdout)


def test_import(versus):
    ours = IMPORT.format(before="import asyncio", module="cano")
    asyncio_itself = IMPORT.format(before="", module="asyncio")
    samplers = {
        "cano": partial(in_new_interpreter, ours),
        "import asyncio": partial(in_new_interpreter, asyncio_itself),
    }
    versus.sampled("import cano, asyncio being imported", samplers, unit="s", rounds=15)
