"""Durable steps of DBOS on SQLite: seconds per step, of so many workflows of ten steps at once.

Run it: python benches/compare/durable_dbos.py 100
"""

import asyncio
import sys
import tempfile
from time import perf_counter

from dbos import DBOS

STEPS = 10


@DBOS.step()
async def step(number: int) -> int:
    return number + 1


@DBOS.workflow()
async def workflow() -> int:
    number = 0
    for _ in range(STEPS):
        number = await step(number)
    return number


async def measure(runs: int) -> float:
    await workflow()
    began = perf_counter()
    await asyncio.gather(*(workflow() for _ in range(runs)))
    return (perf_counter() - began) / (runs * STEPS)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite:///{folder}/runs.db"
        DBOS(config={"name": "bench", "system_database_url": url, "log_level": "ERROR", "run_admin_server": False})
        DBOS.launch()
        print(asyncio.run(measure(int(sys.argv[1]))))
        DBOS.destroy()
