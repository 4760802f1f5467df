"""The table of ratios: reads .benchmarks/last.json, prints it, and writes it as Markdown beside the JSON.

Run it: python benches/report.py [FILE]
"""

import json
import os
import platform
import shlex
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

Result = Mapping[str, Any]
"""What one benchmark measured: section, title, unit, and samples by contender, in the order of the rounds."""

OURS = "cano"

METHOD = (
    "Times are CPU time of one operation, the median of all rounds; wall time of an import in a new interpreter and of a row.",
    "A ratio is the median of the ratios within each round, with their quartiles; best is that of the two fastest samples.",
    "The contenders of a row take turns, in random order, for 11 to 150 rounds in one process, garbage collector off.",
    'A verdict with "~" is a close one: the target lies between the quartiles, that of a time between best and upper quartile.',
)

SECTIONS = {
    "transitions": "one transition, in a loop of 10,000 through two states or a chain of 10 states",
    "timeouts": "what an attempt timeout of 5 s adds to one attempt",
    "retries": "what a retry adds to a call that succeeds, in cano with the run around it",
    "limiters": "what a rate limiter adds to a call that it grants at once",
    "runs": "one run",
    "splits": "one branch of a split, joined by All",
    "decisions": "one branch of a split that is decided or cancelled early, or whose branches raise",
    "batches": "one item of a BatchTask",
    "splits_uvloop": "one branch of a split, on uvloop",
    "splits_compatibility": "one branch of a split in compatibility mode: an asyncio.Task",
    "breakers": "a circuit breaker around a call that returns at once",
    "checkpoints": "a durable row in an SQLite file, wall time",
    "postgres": "durable rows in PostgreSQL, on this machine, wall time",
    "import_and_memory": "import, and memory of one of 10,000 runs, branches or items",
}
"""The headings, by the name of the file; in the order of the report."""


class Target(NamedTuple):
    """What a number must be.

    "faster" is their time in ours, and at least the bound. All others are at most: "time" and "share" are our time, or
    memory, in theirs, as a factor and in percent; "own" is our time alone.
    """

    form: str
    bound: float

    def verdict(self, low: float, middle: float, high: float) -> str:
        is_met = middle >= self.bound if self.form == "faster" else middle <= self.bound
        return ("met" if is_met else "MISSED") + (" ~" if low < self.bound < high else "")

    def __str__(self) -> str:
        if self.form == "own":
            bound = amount(self.bound, "s").replace(".00", "").replace(".0", "")
        else:
            bound = f"{self.bound:.0%}" if self.form == "share" else f"{self.bound:g}x"
        return f"{'>=' if self.form == 'faster' else '<='} {bound}"


TARGETS: Mapping[tuple[str, str], Target] = {
    ("loop, Enum", "awaited by hand"): Target("time", 1.25),
    ("loop, Enum", "pure Python"): Target("faster", 1.8),
    ("loop, Enum, retry + timeout", "pure Python"): Target("faster", 6),
    ("added to a task that returns at once", "asyncio.timeout"): Target("share", 0.05),
    ("added to a task that suspends once", "asyncio.timeout"): Target("share", 0.15),
    ("added by a retry, beside tenacity", "tenacity"): Target("share", 0.01),
    ("added by a retry, beside stamina", "stamina"): Target("share", 0.01),
    ("added by try_acquire", OURS): Target("own", 100e-9),
    ("3 branches that return at once", "asyncio.gather"): Target("faster", 6),
    ("3 branches that await a future", "asyncio.gather"): Target("faster", 1.8),
    ("1,000 branches that return at once", "asyncio.gather"): Target("faster", 10),
    ("1,000 branches that sleep(0)", "asyncio.gather"): Target("faster", 6),
    ("1,000 branches that await a future", "asyncio.gather"): Target("faster", 2.7),
    ("1,000 branches that await a timer", "asyncio.gather"): Target("faster", 1.5),
    ("10,000 that sleep(0), bulkhead 100", "semaphore + gather"): Target("faster", 6),
    ("first of 1,000 decides, 999 sleep", "wait + cancel + gather"): Target("faster", 1.8),
    ("1,000 branches that raise", "gather(return_exceptions)"): Target("faster", 6),
    ("10,000 items that return at once, 100 at once", "semaphore + gather"): Target("faster", 4),
    ("1,000 branches that return at once, as tasks", "asyncio.gather"): Target("faster", 1.15),
    ("1,000 branches that sleep(0), as tasks", "asyncio.gather"): Target("faster", 1.15),
    ("1,000 branches that await a future, as tasks", "asyncio.gather"): Target("faster", 1.15),
    ("branch that waits, memory allocated", "asyncio.gather"): Target("time", 1),
    ("added to a call, by hand", OURS): Target("own", 150e-9),
    ("added to a call, beside pybreaker", "pybreaker"): Target("faster", 8),
    ("added to a call, beside aiobreaker", "aiobreaker"): Target("faster", 8),
    ("added to a call, beside purgatory", "purgatory"): Target("faster", 8),
    ("fenced append, 64 runs in flight", "pool of 16, a transaction each"): Target("faster", 4),
    ("take-over of a killed worker, lease 2 s", OURS): Target("own", 2.5),
    ("five states, prebuilt", OURS): Target("own", 3e-6),
    ("five states, constructed and run", OURS): Target("own", 20e-6),
    ("durable row, 1,000 runs in flight", "a commit each"): Target("faster", 8),
    ("durable row, nobody else waiting", OURS): Target("own", 200e-6),
    ("durable row, nobody else waiting", "a commit each"): Target("time", 2.5),
    ("log of 10,000 rows, read", OURS): Target("own", 50e-3),
    ("import cano, asyncio being imported", OURS): Target("own", 30e-3),
}


class Row(NamedTuple):
    benchmark: str
    ours: str
    opponent: str = ""
    theirs: str = ""
    ratio: str = ""
    spread: str = ""
    best: str = ""
    target: str = ""
    verdict: str = ""


HEADINGS = Row("", OURS, "opponent", "opponent's", "ratio", "quartiles", "best", "target")
ALIGNED = "<><>>>><<"


# --- numbers ---------------------------------------------------------------------------------------------------------


def amount(number: float, unit: str) -> str:
    """Three digits and a unit, of seconds ("s") or bytes ("B")."""
    scales = {"s": (("ns", 1e-9), ("us", 1e-6), ("ms", 1e-3), ("s", 1.0)), "B": (("B", 1.0), ("kB", 1e3), ("MB", 1e6))}
    name, scale = next((it for it in scales[unit] if abs(number) < 999.5 * it[1]), scales[unit][-1])
    return f"{three_digits(number / scale)} {name}"


def three_digits(number: float) -> str:
    return f"{number:.{0 if abs(number) >= 99.5 else 1 if abs(number) >= 9.95 else 2}f}"


def quartiles(numbers: Sequence[float]) -> tuple[float, float, float]:
    low, middle, high = quantiles(numbers, n=4, method="inclusive") if len(numbers) > 1 else list(numbers) * 3
    return low, middle, high


def ratios(ones: Iterable[float], others: Iterable[float]) -> list[float]:
    return [one / other for one, other in zip(ones, others, strict=True)]


# --- the table -------------------------------------------------------------------------------------------------------


def rows(result: Result) -> Iterator[Row]:
    """A row for each opponent, after one for our own time if that has a target."""
    title, unit, samples = result["title"], result["unit"], result["samples"]
    first = Row(title, amount(median(samples[OURS]), unit))
    if (title, OURS) in TARGETS:
        yield _own_row(first, TARGETS[title, OURS], samples[OURS], unit)
        first = Row("", "")
    for opponent, theirs in samples.items():
        if opponent != OURS:
            row = first._replace(opponent=opponent, theirs=amount(median(theirs), unit))
            yield _ratio_row(row, TARGETS.get((title, opponent)), samples[OURS], theirs, unit)
            first = Row("", "")


def _own_row(row: Row, target: Target, ours: Sequence[float], unit: str) -> Row:
    low, middle, high = quartiles(ours)
    return row._replace(
        spread=f"{amount(low, unit)} - {amount(high, unit)}",
        best=amount(min(ours), unit),
        target=str(target),
        verdict=target.verdict(min(ours), middle, high),  # a busy machine only ever adds to it
    )


def _ratio_row(row: Row, target: Target | None, ours: Sequence[float], theirs: Sequence[float], unit: str) -> Row:
    form = target.form if target else "faster" if median(ratios(theirs, ours)) >= 1 else "time"
    one, other = (theirs, ours) if form == "faster" else (ours, theirs)
    low, middle, high = quartiles(ratios(one, other))
    if target:
        row = row._replace(target=str(target), verdict=target.verdict(low, middle, high))
    if form == "share":  # of differences, of which the smallest say nothing
        return row._replace(ratio=f"{middle:.1%} of it", spread=f"{low:.1%} - {high:.1%}")
    less, more = {"s": ("faster", "the time"), "B": ("smaller", "the size")}[unit]
    return row._replace(
        ratio=f"{three_digits(middle)}x {less if form == 'faster' else more}",
        spread=f"{three_digits(low)} - {three_digits(high)}",
        best=three_digits(min(one) / min(other)),
    )


def sections(results: Iterable[Result]) -> dict[str, list[Row]]:
    """The rows of all benchmarks, by heading."""
    table: dict[str, list[Row]] = {heading: [] for heading in SECTIONS.values()}
    for result in results:
        table.setdefault(SECTIONS.get(result["section"], result["section"]), []).extend(rows(result))
    return {heading: part for heading, part in table.items() if part}


def verdict(results: Iterable[Result]) -> str:
    """How many targets were met, and which were not."""
    judged = [(result["title"], row) for result in results for row in rows(result) if row.verdict]
    missed = [(title, row) for title, row in judged if row.verdict.startswith("MISSED")]
    lines = [f"{len(judged) - len(missed)} of {len(TARGETS)} targets met, {len(TARGETS) - len(judged)} not measured."]
    for title, row in missed:
        against = f" against {row.opponent}" if row.opponent else ""
        lines.append(f"{row.verdict}: {title}{against}: {row.ratio or row.ours}, best {row.best}, target {row.target}")
    return "\n".join(lines)


def text(environment: Mapping[str, str], results: Sequence[Result]) -> str:
    """The environment, the table and the verdict as plain text."""
    table = sections(results)
    every = [HEADINGS, *(row for part in table.values() for row in part)]
    widths = [max(map(len, column)) for column in zip(*every, strict=True)]

    def line(row: Row) -> str:
        cells = (f"{cell:{side}{width}}" for cell, side, width in zip(row, ALIGNED, widths, strict=True))
        return "  ".join(cells).rstrip()

    lines = [f"{name:{max(map(len, environment))}}  {value}" for name, value in environment.items()]
    lines += ["", *METHOD, "", f"  {line(HEADINGS)}"]
    for heading, part in table.items():
        lines += ["", heading, *(f"  {line(row)}" for row in part)]
    return "\n".join([*lines, "", verdict(results), ""])


def markdown(environment: Mapping[str, str], results: Sequence[Result]) -> str:
    """The same as Markdown, without the verdict."""

    def line(cells: Iterable[str]) -> str:
        return f"| {' | '.join(cells)} |"

    lines = [*(f"- {name}: {value}" for name, value in environment.items()), "", *METHOD, ""]
    lines += [line(HEADINGS), line({"<": ":--", ">": "--:"}[side] for side in ALIGNED)]
    for heading, part in sections(results).items():
        lines += [line(Row(f"**{heading}**", "")), *map(line, part)]
    return "\n".join([*lines, ""])


# --- the machine -----------------------------------------------------------------------------------------------------


def environment() -> dict[str, str]:
    """What the numbers depend on."""
    flags = str(sysconfig.get_config_var("CONFIG_ARGS") or "")
    optimised = " ".join(
        f"{'with' if flag in flags else 'without'} {name}"
        for flag, name in (("--enable-optimizations", "PGO"), ("--with-lto", "LTO"))
    )
    return {
        "date": f"{datetime.now().astimezone():%Y-%m-%d %H:%M %Z}",
        "command": shlex.join(["pytest", *sys.argv[1:]]),
        "cano": version("cano"),
        "Python": f"{platform.python_implementation()} {platform.python_version()}, {platform.python_compiler()}, {optimised}",
        "machine": f"{_cpu()}, {os.cpu_count()} cores, {platform.system()} {platform.release()}",
    }


def load() -> str:
    """How many threads wanted to run in the last 1, 5 and 15 minutes, on average."""
    return " ".join(f"{average:.1f}" for average in os.getloadavg()) if hasattr(os, "getloadavg") else "unknown"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def main(path: Path) -> None:
    """Print the report of one JSON file, and write it as Markdown beside."""
    if not path.exists():
        print(f"{path} does not exist; `make bench` writes it")
        return
    run = json.loads(path.read_text(encoding="utf-8"))
    results = [benchmark["extra_info"] for benchmark in run["benchmarks"]]
    path.with_name("report.md").write_text(markdown(run["environment"], results), encoding="utf-8")
    print(text(run["environment"], results))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else ".benchmarks/last.json"))
