"""The table of ratios: reads .benchmarks/last.json, prints it, and writes it as Markdown beside the JSON.

A ratio is the median of the ratios within each round, its spread their quartiles; *best* is the ratio of the fastest samples.
A target that is missed is marked, and nothing fails: a benchmark is not a timed test.

Run it: python benches/report.py [FILE]
"""

import json
import os
import platform
import shlex
import sys
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

OURS = "cano"
Result = Mapping[str, Any]


class Target(NamedTuple):
    """What a number must be.

    The forms: "time" and "share" are ours in theirs, as a factor and in percent; "faster" is theirs in ours, at least the
    bound; "own" is our time alone.
    """

    form: str
    bound: float

    def is_met_by(self, number: float) -> bool:
        return number >= self.bound if self.form == "faster" else number <= self.bound

    def __str__(self) -> str:
        bound = {"own": amount(self.bound, "s"), "share": f"{self.bound:.0%}"}.get(self.form, f"{self.bound:g}x")
        return f">= {bound} faster" if self.form == "faster" else f"<= {bound}"


TARGETS: Mapping[tuple[str, str | None], Target] = {
    ("loop of 10,000, Enum, nothing configured", "awaited by hand"): Target("time", 1.25),
    ("loop of 10,000, Enum, nothing configured", "pure Python"): Target("faster", 1.8),
    ("loop of 10,000, Enum, retry and attempt timeout", "pure Python"): Target("faster", 6),
    ("attempt timeout, of a task that returns at once", "asyncio.timeout"): Target("share", 0.05),
    ("attempt timeout, of a task that suspends once", "asyncio.timeout"): Target("share", 0.15),
    ("1,000 branches that return at once", "asyncio.gather"): Target("faster", 1.15),
    ("1,000 branches that sleep(0)", "asyncio.gather"): Target("faster", 1.15),
    ("1,000 branches that wait for a future", "asyncio.gather"): Target("faster", 1.15),
    ("five states, prebuilt", None): Target("own", 3e-6),
    ("five states, constructed and run", None): Target("own", 20e-6),
    ("import cano, asyncio being imported", None): Target("own", 30e-3),
}


class Row(NamedTuple):
    benchmark: str
    ours: str
    opponent: str
    theirs: str
    ratio: str
    spread: str
    best: str
    target: str
    verdict: str


HEADINGS = Row("", OURS, "opponent", "opponent's", "cano is", "quartiles", "best", "target", "")
RIGHT = (1, 3, 4, 5, 6)
"""The columns that are aligned to the right."""


# --- numbers ---------------------------------------------------------------------------------------------------------


def amount(number: float, unit: str) -> str:
    """Three digits and a unit, from seconds ("s") or bytes ("B")."""
    scales = (("ns", 1e-9), ("us", 1e-6), ("ms", 1e-3), ("s", 1.0)) if unit == "s" else (("B", 1.0), ("kB", 1e3), ("MB", 1e6))
    name, scale = next(((name, scale) for name, scale in scales if abs(number) < 999.5 * scale), scales[-1])
    return f"{_digits(number / scale)} {name}"


def _digits(number: float) -> str:
    return f"{number:.{0 if abs(number) >= 99.5 else 1 if abs(number) >= 9.95 else 2}f}"


def _quartiles(numbers: Sequence[float]) -> tuple[float, float, float]:
    low, middle, high = quantiles(numbers, n=4, method="inclusive") if len(numbers) > 1 else numbers * 3
    return low, middle, high


# --- rows ------------------------------------------------------------------------------------------------------------


def rows(result: Result) -> Iterator[Row]:
    """One row for each opponent, and one before them where there is none, or a target for our own time."""
    title, unit, samples = result["title"], result["unit"], result["samples"]
    target = TARGETS.get((title, None))
    ours = amount(median(samples[OURS]), unit)
    if target or len(samples) == 1:
        low, middle, high = _quartiles(samples[OURS])
        spread, best = f"{amount(low, unit)} - {amount(high, unit)}", amount(min(samples[OURS]), unit)
        yield Row(title, ours, "", "", "", spread, best, str(target or ""), _verdict(target, low, middle, high))
        title = ours = ""
    for opponent in list(samples)[1:]:
        yield Row(title, ours, *_compare(result, opponent))
        title = ours = ""


def _compare(result: Result, opponent: str) -> tuple[str, ...]:
    unit, ours, theirs = result["unit"], result["samples"][OURS], result["samples"][opponent]
    target = TARGETS.get((result["title"], opponent))
    is_share = target is not None and target.form == "share"
    is_faster = not is_share and median(one / other for one, other in zip(theirs, ours, strict=True)) >= 1
    if target is not None and target.form == "faster":
        is_faster = True
    if target is not None and target.form == "time":
        is_faster = False
    words = {"s": ("faster", "the time"), "B": ("smaller", "the size")}[unit]
    pairs = list(zip(theirs, ours, strict=True) if is_faster else zip(ours, theirs, strict=True))
    low, middle, high = _quartiles([one / other for one, other in pairs])
    best = min(theirs) / min(ours) if is_faster else min(ours) / min(theirs)
    ...
