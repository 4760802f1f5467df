"""One step of a durable run, ten steps in a run and many runs at once, on SQLite; each contender in a process of its own."""

import subprocess
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter

import pytest

pytestmark = [pytest.mark.benchmark(timer=perf_counter), pytest.mark.timeout(300)]

SCRIPTS = Path(__file__).parent / "compare"
PEERS = {"DBOS": ("dbos", "durable_dbos.py"), "LangGraph": ("langgraph", "durable_langgraph.py")}


def measured(script: str, runs: int) -> float:
    command = [sys.executable, "-W", "ignore", str(SCRIPTS / script), str(runs)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603 - scripts of this folder
    return float(done.stdout.split()[-1])


@pytest.mark.parametrize("peer", PEERS)
def test_durable_step(versus, peer):
    package, script = PEERS[peer]
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed: make peers")
    contenders = {"cano": partial(measured, "durable_cano.py", 1_000), peer: partial(measured, script, 100)}
    versus.sampled(f"durable step, many runs at once, beside {peer}", contenders, unit="s", rounds=5)
