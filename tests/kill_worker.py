"""Durable runs in processes that are killed; `test_recovery_kills` starts it and judges what it prints.

MODE SEED AMOUNT FOLDER. Each round begins a few runs in one process, kills it, and goes on in others, which are killed as
well, until the last one may end; the rounds go on until so many processes were killed, or so many races run. It prints a
line of JSON per round: the ledger, which outlives all of its processes, and how often they were killed.

once        the first process is killed, at any moment of its life, the second one ends
chain       so are the two to five processes before the last
rollback    so are one to three, once a roll-back has begun
race        a run is left behind by a process that is killed, two to eight go on with it at once, and some are killed

The processes are forked from this one, which has everything imported and never opens the store itself.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import random
import select
import signal
import sys
import time
import traceback
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, NoReturn

from cano import (
    InMemoryCheckpointStore,
    RunClaimedError,
    RunNotFoundError,
    SqliteCheckpointStore,
    Workflow,
    recover_all,
)
from tests.recovery_shapes import SHAPES, World

MAIN = ("chain", "loop", "split", "saga", "cursors")
RUNS = {"once": MAIN, "chain": MAIN, "rollback": ("saga", "saga", "intent"), "race": ("chain", "saga", "failing")}
KILLS = {"once": (1, 1), "chain": (2, 5), "rollback": (1, 3)}


class Ledger:
    """A file that takes a line at a time and knows nothing of transactions: what is written is written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def write(self, *words: object) -> None:
        os.write(self._file, (json.dumps([os.getpid(), *words]) + "\n").encode())

    def lines(self) -> list[Any]:
        return [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]

    def close(self) -> None:
        os.close(self._file)
        self.path.unlink()


class Child:
    """A process that was forked; `signs` is readable when it gives a sign, or has ended."""

    def __init__(self, work: Coroutine[Any, Any, None], seed: str) -> None:
        self.signs, sign = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self.signs)
            random.seed(seed)
            _carry_out(work, sign)
        work.close()
        os.close(sign)

    def await_sign(self) -> None:
        select.select([self.signs], [], [])

    def ended(self, *, killed: bool = False) -> bool:
        """Wait for its end; whether it was killed before it came to that by itself."""
        if killed:
            os.kill(self.pid, signal.SIGKILL)
        _, status = os.waitpid(self.pid, 0)
        os.close(self.signs)
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
            return True
        assert status == 0, f"a child ended with status {status}"
        return False


def _carry_out(work: Coroutine[Any, Any, None], sign: int) -> NoReturn:
    global _sign  # noqa: PLW0603 - one per process
    _sign = sign
    try:
        asyncio.run(work)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


_sign = -1


class Campaign:
    """Rounds on one file, with dice of its own."""

    def __init__(self, mode: str, seed: str, folder: Path) -> None:
        self.mode = mode
        self.seed = seed
        self.file = folder / "runs.db"
        self.folder = folder
        self.dice = random.Random(f"{mode} {seed}")
        self.life = self.since_sign = 0.0
        self.forks = 0

    def fork(self, work: Coroutine[Any, Any, None]) -> Child:
        self.forks += 1
        return Child(work, f"{self.mode} {self.seed} {self.forks}")

    def measure(self) -> None:
        """How long a process lives that is not killed, and how long from its sign on."""
        ledger = Ledger(self.folder / "measured")
        for name in RUNS[self.mode]:  # once here, so that all that is imported and made once is there in each child
            shape, store = SHAPES[name], InMemoryCheckpointStore()
            run = self.workflow(ledger, name, store).orchestrate("start", workflow_id=name, data=shape.data())
            asyncio.run(self.ends(ledger, name, run))
        lives, after = [], []
        for number in range(5):
            runs = {f"measured-{number}.{place}": name for place, name in enumerate(RUNS[self.mode])}
            began = time.perf_counter()
            child = self.fork(self.work(ledger, runs))
            child.await_sign()
            sign = time.perf_counter()
            child.ended()
            lives.append(time.perf_counter() - began)
            after.append(time.perf_counter() - sign)
        self.life, self.since_sign = min(lives), min(after)
        ledger.close()

    def round(self, number: int) -> tuple[int, list[Any], dict[str, str]]:
        runs = {f"{number}.{place}": name for place, name in enumerate(RUNS[self.mode])}
        ledger = Ledger(self.folder / f"{number}.ledger")
        kills = 0
        for _ in range(self.dice.randint(*KILLS[self.mode])):
            child = self.fork(self.work(ledger, runs))
            if self.mode == "rollback" or self.dice.random() < 0.8:
                child.await_sign()
                time.sleep(self.dice.uniform(0, self.since_sign))
            else:
                time.sleep(self.dice.uniform(0, self.life))
            is_hit = child.ended(killed=True)
            self.since_sign *= 1.02 if is_hit else 0.95  # so that most are hit, however busy the machine is
            if is_hit:
                kills += 1
                ledger.write("", "killed", child.pid)
        assert not self.fork(self.work(ledger, runs, is_last=True)).ended()
        lines = ledger.lines()
        ledger.close()
        return kills, lines, runs

    def race(self, number: int) -> tuple[int, list[Any], dict[str, str]]:
        """Several processes go on with the run of one that was killed; some of them are killed too."""
        dice, workflow_id, name = self.dice, f"{number}", self.dice.choice(("chain", "saga", "failing"))
        ledger = Ledger(self.folder / f"{number}.ledger")
        steps = sum(map(len, SHAPES[name].groups)) + len(SHAPES[name].undone)
        assert self.fork(self.leave_behind(ledger, workflow_id, name, dice.randint(1, steps))).ended()
        gate, opens = os.pipe()
        racers = [self.fork(self.take_part(ledger, workflow_id, name, gate)) for _ in range(dice.randint(2, 8))]
        for racer in racers:
            racer.await_sign()
        os.write(opens, b"!" * len(racers))
        kills = 1
        dice.shuffle(racers)
        doomed = dice.randint(0, len(racers) // 2)
        for place, racer in enumerate(racers):
            if place < doomed:
                time.sleep(dice.uniform(0, 0.01))
            if racer.ended(killed=place < doomed):
                kills += 1
                ledger.write(workflow_id, "killed", racer.pid)
        os.close(gate)
        os.close(opens)
        assert not self.fork(self.have_ended(ledger, workflow_id, name)).ended()
        lines = ledger.lines()
        ledger.close()
        return kills, lines, {workflow_id: name}

    async def leave_behind(self, ledger: Ledger, workflow_id: str, name: str, place: int) -> None:
        """Be killed within a step."""
        left = place

        def note(workflow_id: str, effect: str, key: str) -> None:
            nonlocal left
            ledger.write(workflow_id, effect, key)
            left -= 1
            if not left:
                ledger.write(workflow_id, "killed", os.getpid())
                os.kill(os.getpid(), signal.SIGKILL)

        store = SqliteCheckpointStore(self.file)
        await SHAPES[name].workflow(World(note), name, store).orchestrate("start", workflow_id=workflow_id)

    async def take_part(self, ledger: Ledger, workflow_id: str, name: str, gate: int) -> None:
        """Try to go on with the run, until it is over or time is."""
        async with SqliteCheckpointStore(self.file) as store:
            workflow = self.workflow(ledger, name, store)
            os.write(_sign, b"!")
            os.read(gate, 1)
            await asyncio.sleep(random.choice((0, 0, 0.001, 0.003)))
            for _ in range(10):
                try:
                    outcome = await workflow.resume_from(workflow_id)
                except (RunClaimedError, RunNotFoundError) as error:
                    ledger.write(workflow_id, "lost", told(error))
                    await asyncio.sleep(0.002)
                except Exception as error:
                    ledger.write(workflow_id, "outcome", told(error))
                    break
                else:
                    ledger.write(workflow_id, "outcome", told(outcome))
                    break

    async def have_ended(self, ledger: Ledger, workflow_id: str, name: str) -> None:
        """Bring the run to its end, and tell which rows are left then."""
        async with SqliteCheckpointStore(self.file) as store:
            workflow = self.workflow(ledger, name, store)
            await self.ends(ledger, workflow_id, workflow.resume_from(workflow_id))
            rows = sorted(await store.load_run(workflow_id), key=lambda row: row.sequence)
            ledger.write("", "left", [[row.sequence, row.kind.name, row.state] for row in rows])
            await workflow.discard(workflow_id)

    async def work(self, ledger: Ledger, runs: dict[str, str], *, is_last: bool = False) -> None:
        """As a service does when it starts: go on with what there is, and begin what was never begun."""
        begun = {workflow_id for _, workflow_id, *_ in ledger.lines()}
        async with SqliteCheckpointStore(self.file) as store:
            workflows = {name: self.workflow(ledger, name, store) for name in runs.values()}
            for workflow_id in runs:
                if rows := await store.load_run(workflow_id):
                    newest = max(rows, key=lambda row: row.sequence)
                    ledger.write(workflow_id, "found", newest.kind.name, newest.state, newest.next_state)
            recovered = await asyncio.gather(*(recover_all(workflow, store) for workflow in workflows.values()))
            for workflow_id, outcome in (pair for outcomes in recovered for pair in outcomes.items()):
                ledger.write(workflow_id, "outcome", told(outcome))
            begun.update(*recovered)
            new = [workflow_id for workflow_id in runs if workflow_id not in begun]
            async with asyncio.TaskGroup() as group:
                for workflow_id in new:
                    shape, workflow = SHAPES[runs[workflow_id]], workflows[runs[workflow_id]]
                    run = workflow.orchestrate("start", workflow_id=workflow_id, data=shape.data())
                    group.create_task(self.ends(ledger, workflow_id, run))
            if is_last:
                ledger.write("", "left", [summary.id for summary in await store.list_runs()])

    def workflow(self, ledger: Ledger, name: str, store: object) -> Workflow[str]:
        def note(workflow_id: str, effect: str, key: str) -> None:
            ledger.write(workflow_id, effect, key)
            if _sign >= 0 and (effect.startswith("-") or self.mode != "rollback"):
                os.write(_sign, b"!")

        async def work() -> None:
            await asyncio.sleep(random.choice((0, 0, 0.0005)))

        async def undo() -> None:
            await asyncio.sleep(random.uniform(0.0005, 0.003) if self.mode == "rollback" else 0)

        return SHAPES[name].workflow(World(note, work, undo), name, store)

    async def ends(self, ledger: Ledger, workflow_id: str, run: Coroutine[Any, Any, str]) -> None:
        try:
            outcome: object = await run
        except Exception as error:
            outcome = error
        ledger.write(workflow_id, "outcome", told(outcome))


def told(outcome: object) -> str:
    return type(outcome).__name__ if isinstance(outcome, Exception) else str(outcome)


def main(mode: str, seed: str, amount: str, folder: str) -> None:
    campaign = Campaign(mode, seed, Path(folder))
    campaign.measure()
    gc.collect()
    gc.freeze()
    done = number = 0
    while done < int(amount):
        number += 1
        more, lines, runs = campaign.race(number) if mode == "race" else campaign.round(number)
        done += 1 if mode == "race" else more
        print(json.dumps({"number": number, "kills": more, "lines": lines, "runs": runs}))  # noqa: T201 - the test reads it


if __name__ == "__main__":
    main(*sys.argv[1:])
