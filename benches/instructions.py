"""Instructions per branch of a split, counted by valgrind's callgrind; unlike time, they do not depend on what else runs.

Each case runs in a child process, 1 split and again 11 splits of 200 branches: the difference is what 10 splits take.
Making the futures that branches await does not count: both make as many.

Run it by hand, it takes some minutes: python benches/instructions.py
"""

import asyncio
import gc
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

BRANCHES = 200

LARGE = 2_000
"""Again with so many: what a branch takes must not grow."""

FEW, MANY = 1, 11

KINDS = ["return at once", "sleep(0)", "await a future"]

OURS, GATHER = "cano", "asyncio.gather"


def main() -> None:
    """Print the table."""
    if not shutil.which("valgrind"):
        print("valgrind is not on PATH")
        return
    print(f"{'instructions of a branch that':29}{OURS:>10}{GATHER:>18}{'ratio':>9}{f'{OURS}, of {LARGE:,}':>18}")
    for kind in KINDS:
        ours, theirs = per_branch(OURS, kind, BRANCHES), per_branch(GATHER, kind, BRANCHES)
        large = per_branch(OURS, kind, LARGE)
        print(f"{kind:29}{ours:10,.0f}{theirs:18,.0f}{theirs / ours:8.2f}x{large:18,.0f}", flush=True)


def per_branch(contender: str, kind: str, branches: int) -> float:
    few, many = (instructions(contender, kind, branches, times) for times in (FEW, MANY))
    return (many - few) / (MANY - FEW) / branches


def instructions(contender: str, kind: str, branches: int, times: int) -> int:
    """What the whole process takes for so many splits."""
    valgrind = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={os.devnull}"]
    command = [*valgrind, sys.executable, __file__, contender, kind, str(branches), str(times)]
    environment = os.environ | {"PYTHONHASHSEED": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)  # noqa: S603
    collected = re.search(r"Collected : (\d+)", done.stderr)
    if done.returncode or not collected:
        sys.exit(done.stderr)
    return int(collected[1])


def count(contender: str, kind: str, branches: int, times: int) -> None:
    """In the child: so many splits."""
    sys.path.insert(0, str(ROOT))
    import cano  # noqa: PLC0415
    from benches.branches import bodies, futures, gather, split  # noqa: PLC0415

    these = bodies(kind, branches)
    run = split(cano, these) if contender == OURS else gather(these)
    prepare, prepare_only = futures(branches), futures(branches, resolved=False)

    async def repeat() -> None:
        for _ in range(times):
            if kind == "await a future":
                prepare()
            assert await run() == [1] * branches
        for _ in range(MANY - times if kind == "await a future" else 0):
            prepare_only()

    gc.disable()
    asyncio.run(repeat())


if __name__ == "__main__":
    if len(sys.argv) > 1:
        count(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    else:
        main()
