"""Processes that are really killed, at any moment: what a durable run did before is neither lost nor done again.

`kill_worker` kills them and keeps the ledger; here it is judged. ``CANO_DEEP=1`` kills twenty times as many.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.recovery_shapes import SHAPES, broken

pytestmark = [
    pytest.mark.realtime,
    pytest.mark.model,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="the processes are forked, and SIGKILL is POSIX's"),
    pytest.mark.timeout(7200 if "CANO_DEEP" in os.environ else 600),
]

TIMES = 20 if "CANO_DEEP" in os.environ else 1
ROOT = Path(__file__).parent.parent
# What a killed process has written is in the system's hands, whether it has reached a disk or not: memory is faster.
FOLDER = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # noqa: S108 - with folders of the test's own in it


def campaign(mode, amount):
    """The rounds of two workers, which kill so many processes together, or play so many rounds."""
    rounds = []
    with ExitStack() as stack:
        workers = []
        for seed in (1, 2):
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="cano-kills-", dir=FOLDER))
            command = [sys.executable, "-m", "tests.kill_worker", mode, str(seed), str(amount // 2), folder]
            environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
            output = stack.enter_context(
                (Path(folder) / "output").open("w+")
            )  # a pipe that nobody reads would hold it up
            worker = subprocess.Popen(command, stdout=output, stderr=subprocess.PIPE, text=True, env=environment)  # noqa: S603
            stack.callback(worker.kill)
            workers.append((stack.enter_context(worker), output))
        for worker, output in workers:
            _, errors = worker.communicate()
            assert worker.returncode == 0, errors
            assert not errors
            output.seek(0)
            rounds += map(json.loads, output)
    return rounds


def entries(round_, workflow_id):
    """What a ledger says of one run: process, word, and what belongs to it."""
    return [(pid, *words) for pid, of, *words in round_["lines"] if of == workflow_id]


def effects(round_, workflow_id):
    told = entries(round_, workflow_id)
    return [(word, about[0]) for _, word, *about in told if word not in ("found", "outcome", "lost", "killed")]


def judge(rounds):
    """What is wrong with each round, and where the runs were when their processes were killed."""
    wrong, where = [], Counter()
    for round_ in rounds:
        for workflow_id, name in round_["runs"].items():
            shape = SHAPES[name]
            faults = broken(shape, effects(round_, workflow_id), round_["kills"])
            faults += misjudged(round_, workflow_id, shape)
            faults += strayed(round_, workflow_id)
            if faults:
                wrong.append((round_["number"], workflow_id, name, faults, entries(round_, workflow_id)))
            where += places(round_, workflow_id)
        (left,) = [words[0] for _, of, word, *words in round_["lines"] if (of, word) == ("", "left")]
        if left:
            wrong.append((round_["number"], "left behind", left))
    return wrong, where


def misjudged(round_, workflow_id, shape):
    """What a process was told about the end of a run, if it is not how that ends."""
    found = {}
    for pid, word, *about in entries(round_, workflow_id):
        if word == "found":
            found[pid] = about[0]
        elif word == "outcome":
            expected = shape.outcome
            if shape.undone:  # the error itself is gone with the process in which it was raised
                gone = {"RollbackStarted": "TaskExecutionError", "Compensated": "TaskExecutionError"}
                expected = (gone | {"Finished": "RunConflictError"}).get(found.get(pid), expected)
            if about[0] != expected:
                yield f"ended as {about[0]} from {found.get(pid)}"


def strayed(round_, workflow_id):
    """Where a process went on with a run elsewhere than at the newest row that it had found."""
    found = None
    for _, word, *about in entries(round_, workflow_id):
        if word == "found":
            found = about
        elif found is not None and word != "outcome":
            kind, state, following = found
            found = None
            if word.startswith("-"):
                if kind not in ("RollbackStarted", "Compensated", "StateEntry"):
                    yield f"went back from {kind} of {state}"
            elif kind in ("RollbackStarted", "Compensated", "Finished", "NeedsAttention"):
                yield f"went forward from {kind} of {state}"
            elif following not in (None, state) and word.startswith(state):
                yield f"{word} is done again: {kind} of {state} leads to {following}"


def places(round_, workflow_id):
    """Where the run was at each kill."""
    at, last, names = Counter(), "", {"": "not begun", "found": "found", "outcome": "over"}
    for _, of, word, *_ in round_["lines"]:
        if of == workflow_id:
            last = word
        elif word == "killed":
            at[names.get(last, "going back" if last.startswith("-") else "going forward")] += 1
    return at


def show(rounds, where):
    kills = sum(round_["kills"] for round_ in rounds)
    print(f"{kills} processes killed in {len(rounds)} rounds; their runs were: {dict(where)}")  # noqa: T201 - shown with -s
    return kills


def test_killed_once():
    """A run whose process is killed at any moment goes on in another one: no step that was acknowledged is done again."""
    # R1, RS-024, RS-028, CK-024
    rounds = campaign("once", 1000 * TIMES)
    wrong, where = judge(rounds)
    assert show(rounds, where) >= 1000 * TIMES
    assert not wrong, wrong[:3]
    assert where["going forward"] > 1000
    assert where["going back"] > 20


def test_killed_again_and_again():
    """So it is if those that go on with it are killed as well."""
    # R2, B04
    rounds = campaign("chain", 300 * TIMES)
    wrong, where = judge(rounds)
    assert show(rounds, where) >= 300 * TIMES
    assert not wrong, wrong[:3]
    assert sum(round_["kills"] > 1 for round_ in rounds) > 50


def test_killed_while_it_goes_back():
    """Each step that was done is undone at least once, newest first; none is forgotten, and no run goes forward again."""
    # R3, B02, SG-014, SG-030
    rounds = campaign("rollback", 300 * TIMES)
    wrong, where = judge(rounds)
    assert show(rounds, where) >= 300 * TIMES
    assert not wrong, wrong[:3]
    assert where["going back"] > 300


def judge_race(round_):
    """What is wrong with a race."""
    ((workflow_id, name),) = round_["runs"].items()
    told = entries(round_, workflow_id)
    shape, owners = SHAPES[name], [None]
    given_up = {about[0] for _, word, *about in told if word == "killed"}  # by whom the run could be lost to another
    if name == "failing":
        given_up |= {pid for pid, word, *_ in told if word == "outcome"}
    for pid, word, *_ in told:
        if word == "lost" and pid in owners:
            yield f"{pid} ran and lost"
        elif word not in ("lost", "killed", "outcome") and pid != owners[-1]:
            if pid in owners or not given_up.issuperset(owners[1:]):
                yield f"{pid} did {word} while {owners[-1]} had the run"
            owners.append(pid)
    entered = effects(round_, workflow_id)
    failures = sum(word == "outcome" for _, word, *_ in told) if name == "failing" else 0
    yield from broken(shape, entered, round_["kills"] + failures)
    (left,) = [words[0] for _, of, word, *words in round_["lines"] if (of, word) == ("", "left")]
    if [sequence for sequence, *_ in left] != list(range(len(left))):
        yield f"rows with gaps: {left}"
    if name == "failing":
        unused = sum(kind == "StateEntry" for _, kind, _ in left) - len(entered)
        if not 0 <= unused <= round_["kills"]:
            yield f"{len(entered)} steps, but rows {left}"
    elif left and not (shape.undone and left[-1][1] == "Finished"):  # killed before it was cleared: to be discarded
        yield f"left behind: {left}"


def test_race_for_one_run():
    """Of several processes that go on with one run one does, and the others are told so: they do and change nothing."""
    # R4, B01, RS-031, DBOS 812
    rounds = campaign("race", 300 * TIMES)
    wrong = [(round_["number"], faults, round_["lines"]) for round_ in rounds if (faults := list(judge_race(round_)))]
    words = Counter(words[0] if word == "lost" else word for round_ in rounds for _, _, word, *words in round_["lines"])
    claimed, over = words["RunClaimedError"], words["RunNotFoundError"]
    print(f"{len(rounds)} races: {claimed} times claimed, {over} times over")  # noqa: T201 - shown with -s
    assert not wrong, wrong[:3]
    assert min(claimed, over) > 50
