"""Map and reduce: count the words of many files, one branch per file, at most eight of them at once.

How many branches the split has is known only when its state is entered. A file that cannot be read fails its branch, not
the run: PartialTimeout goes on when every branch has ended, or when the time is up, with what there is.

Run it: python examples/word_count.py [file or folder ...]     (default: the sources of Python's standard library)
"""

import argparse
import asyncio
import re
import sysconfig
from collections import Counter
from dataclasses import dataclass, field
from enum import Enum, auto
from pathlib import Path
from typing import Annotated, Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from cano import JoinConfig, JoinStrategy, Res, SplitResult, Workflow, in_thread

WORD = re.compile(r"[a-z]{2,}")
TEXTS = {".md", ".py", ".rst", ".txt"}


class State(Enum):
    FIND = auto()
    COUNT = auto()
    MERGE = auto()
    DONE = auto()
    NO_FILES = auto()


@dataclass
class Job:
    paths: list[Path]
    progress: Progress
    files: list[Path] = field(default_factory=list)
    words: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)


TheJob = Annotated[Job, Res("job")]


@in_thread  # it reads the disk, which would block the event loop
def find(job: TheJob) -> Literal[State.COUNT, State.NO_FILES]:
    for path in job.paths:
        found = [path] if not path.is_dir() else (file for file in path.rglob("*") if file.suffix in TEXTS)
        job.files += sorted(file for file in found if "site-packages" not in file.parts)
    job.progress.add_task("counting", total=len(job.files))
    return State.COUNT if job.files else State.NO_FILES


@in_thread
def count(path: Path) -> Counter[str]:
    return Counter(WORD.findall(path.read_text(encoding="utf-8").lower()))


@dataclass(frozen=True)
class CountWords:
    path: Path

    async def run(self, job: TheJob) -> Counter[str]:
        try:
            return await count(self.path)
        finally:
            job.progress.advance(job.progress.task_ids[0])


def count_each(job: TheJob) -> list[CountWords]:
    return [CountWords(path) for path in job.files]


@in_thread
def merge(job: TheJob, counted: SplitResult) -> Literal[State.DONE]:
    for words in counted.values():
        job.words.update(words)
    job.problems += [f"{job.files[branch.index]}: {branch.error}" for branch in counted.errors]
    job.problems += [f"{job.files[index]}: not done in time" for index in counted.cancelled]
    return State.DONE


def make_workflow(timeout: float) -> Workflow[State]:
    return (
        Workflow[State](name="word count")
        .register(State.FIND, find)
        .register_split(
            State.COUNT,
            count_each,
            JoinConfig(JoinStrategy.PartialTimeout, State.MERGE, timeout=timeout, bulkhead=8),
        )
        .register(State.MERGE, merge)
        .add_exit_states([State.DONE, State.NO_FILES])
    )


def report(job: Job, console: Console) -> None:
    table = Table("word", box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("count", justify="right")
    for word, times in job.words.most_common(20):
        table.add_row(word, f"{times:,}")
    console.print(table)
    words = f"{job.words.total():,} words, {len(job.words):,} different"
    files = f"{len(job.files) - len(job.problems):,} of {len(job.files):,} files"
    console.print(f"\n{words}, in {files}", highlight=False)
    for problem in job.problems[:5]:
        console.print(f"skipped {problem}", highlight=False, markup=False, soft_wrap=True)
    if len(job.problems) > 5:
        console.print(f"... and {len(job.problems) - 5:,} more", highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(description="Count the words of text files.")
    parser.add_argument("paths", nargs="*", type=Path, default=[Path(sysconfig.get_path("stdlib"))])
    parser.add_argument("--timeout", type=float, default=60, help="seconds the counting may take (default: 60)")
    options = parser.parse_args()

    console = Console()
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        job = Job(options.paths, progress)
        outcome = asyncio.run(make_workflow(options.timeout).orchestrate(State.FIND, resources={"job": job}))
    if outcome is State.NO_FILES:
        parser.exit(1, "no text files found\n")
    report(job, console)


if __name__ == "__main__":
    main()
