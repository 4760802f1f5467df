"""Every fact of the behaviour list is named at a test, or in DEPARTURES.md with the reason why not.

A fact is a behaviour of the engine that cano began from, under an id like WF-014. The test that shows it, or shows what
cano does instead, names it: in Python in a comment (``# WF-014``), in Rust in a comment or in the row of a table.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

FACTS = {
    "WF": 36,  # shape and validation
    "FSM": 17,  # the state loop
    "PAN": 14,  # panics
    "JN": 9,  # join strategies
    "SP": 40,  # splits
    "RT": 26,  # retry
    "TT": 13,  # total timeout
    "CN": 22,  # cancellation
    "RE": 11,  # resources
    "MS": 7,  # memory store
    "ER": 10,  # errors
    "CB": 26,  # circuit breaker
    "RL": 16,  # rate limiters: buckets
    "WN": 9,  # windows
    "ML": 11,  # several tiers
    "BT": 8,  # batches
    "RO": 3,  # routers
    "PL": 7,  # polling
    "TM": 5,  # timers
    "ST": 15,  # stepped tasks
    "STR": 31,  # streams
    "RS": 32,  # resume
    "CK": 31,  # rows and stores
    "SG": 30,  # sagas
}
# These arrive with their issues; until then only DEPARTURES.md names them.
LATER = {
    "OB": 14,
    "ME": 11,
    "SC": 32,
    "HE": 6,
}
SECTIONS = FACTS | LATER
FACT = re.compile(rf"\b({'|'.join(SECTIONS)})-(\d{{3}})(?:\.\.(\d{{3}}))?")
COMMENT = re.compile(r"#.*")
ENTRY = re.compile(r"- ([A-Z]+-\d{3}[A-Z0-9., -]*): \S.*\.")


def ids(section: str, numbers: range) -> set[str]:
    return {f"{section}-{number:03}" for number in numbers}


def facts_in(text: str) -> Iterator[str]:
    """The ids that a text names; ``WF-001..003`` is three."""
    for section, first, last in FACT.findall(text):
        yield from ids(section, range(int(first), int(last or first) + 1))


def named_by_tests() -> set[str]:
    files = [file for file in ROOT.glob("tests/**/test_*.py") if file != Path(__file__)]
    texts = [comment for file in files for comment in COMMENT.findall(file.read_text("utf-8"))]
    texts += [file.read_text("utf-8") for part in ("core", "store") for file in ROOT.glob(f"rust/{part}/**/*.rs")]
    return {fact for text in texts for fact in facts_in(text)}


def departures() -> list[str]:
    """The entries, one line each."""
    lines = (ROOT / "tests" / "DEPARTURES.md").read_text("utf-8").splitlines()
    return [line for line in lines if line.startswith("- ")]


@pytest.mark.parametrize("section", FACTS)
def test_every_fact_is_accounted_for(section):
    """Each fact of the section is named at a test, or is a departure with its reason."""
    accounted = named_by_tests() | {fact for line in departures() for fact in facts_in(line)}

    assert sorted(ids(section, range(1, FACTS[section] + 1)) - accounted) == []


@pytest.mark.parametrize("section", LATER)
def test_facts_that_come_later_are_listed(section):
    """The facts of what is not there yet are all listed, so that none is forgotten."""
    assert ids(section, range(1, LATER[section] + 1)) <= {fact for line in departures() for fact in facts_in(line)}


def test_named_facts_exist():
    """No test and no departure names a fact that is not in the list."""
    known = {fact for section, count in SECTIONS.items() for fact in ids(section, range(1, count + 1))}

    assert sorted(named_by_tests() - known) == []
    assert sorted({fact for line in departures() for fact in facts_in(line)} - known) == []


@pytest.mark.parametrize("line", departures())
def test_departure_has_a_reason(line):
    """A departure is one line: its ids, a colon, and the reason."""
    assert ENTRY.fullmatch(line)
