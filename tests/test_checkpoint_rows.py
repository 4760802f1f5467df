"""Rows of durable runs: which fields they have, that they are values, and what their stored bytes give."""

import copy
import pickle
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from cano import CheckpointRow, ConfigurationError, CorruptRowError, RowKind, RunStatus, RunTooLargeError

GOLDEN = Path(__file__).parent / "golden" / "checkpoints" / "1"
ID = "order-1"

VALUES = {
    "next_state": "SHIP",
    "refers_to": 2,
    "due_at": 1_764_000_000_000,
    "output_blob": b"4096",
    "snapshot": b"{}",
    "is_intent": True,
}
# For each kind what a row has, and what it may have.
FIELDS = {
    RowKind.StateEntry: ((), ("snapshot", "is_intent")),
    RowKind.CompensationCompletion: (("next_state", "output_blob"), ("snapshot",)),
    RowKind.StepCursor: (("output_blob",), ("next_state", "refers_to", "snapshot")),
    RowKind.TimerDue: (("due_at",), ("snapshot",)),
    RowKind.RollbackStarted: (("output_blob",), ("snapshot",)),
    RowKind.Compensated: (("refers_to",), ()),
    RowKind.Finished: ((), ("snapshot",)),
    RowKind.NeedsAttention: (("output_blob",), ("snapshot",)),
}
KINDS = pytest.mark.parametrize("kind", RowKind, ids=str)

labels = st.text(max_size=32)
numbers = st.integers(1, 2**32 - 1)
times = st.integers(0, 253_402_300_799_999)


@st.composite
def rows(draw):
    """Any row that there can be."""
    kind = draw(st.sampled_from(RowKind))
    has, may = FIELDS[kind]
    sequence = draw(st.integers(1, 2**63 - 1))
    values = {
        "next_state": labels,
        "refers_to": st.integers(0, sequence - 1),
        "due_at": times,
        "output_blob": st.binary(max_size=200),
        "snapshot": st.binary(max_size=200),
        "is_intent": st.booleans(),
    }
    names = [*has, *(name for name in may if draw(st.booleans()))]
    return CheckpointRow(
        sequence,
        kind,
        draw(labels),
        task_id=draw(labels),
        visit=draw(numbers),
        attempt=draw(numbers),
        workflow_version=draw(st.integers(0, 2**32 - 1)),
        fingerprint=draw(st.integers(0, 2**64 - 1)),
        run_id=draw(st.binary(min_size=16, max_size=16)),
        recorded_at=draw(times),
        **{name: draw(values[name]) for name in names},
    )


def row(kind, **fields):
    has, _ = FIELDS[kind]
    return CheckpointRow(3, kind, "CHARGE", **{name: VALUES[name] for name in has} | fields)


# What a row has


def test_plain_row():
    """A row without options is the first attempt of a first visit, of a workflow without a version."""
    plain = CheckpointRow(0, RowKind.StateEntry, "CHARGE")

    # CK-007, CK-009
    assert (plain.sequence, plain.kind, plain.state, plain.task_id) == (0, RowKind.StateEntry, "CHARGE", "")
    assert (plain.visit, plain.attempt, plain.workflow_version, plain.fingerprint) == (1, 1, 0, 0)
    assert (plain.run_id, plain.recorded_at, plain.is_intent) == (bytes(16), 0, False)
    assert (plain.next_state, plain.refers_to, plain.due_at, plain.output_blob, plain.snapshot) == (None,) * 5


@KINDS
@pytest.mark.parametrize("field", VALUES)
def test_fields_of_a_kind(kind, field):
    """A kind of row has some fields, may have some, and has none of the others: a row that breaks this is refused."""
    has, may = FIELDS[kind]

    if field in has:
        with pytest.raises(ConfigurationError, match=f"a {kind} row needs {field}, got none"):
            row(kind, **{field: None})
    if field in (*has, *may):
        assert getattr(row(kind, **{field: VALUES[field]}), field) == VALUES[field]
    else:
        with pytest.raises(ConfigurationError, match=f"a {kind} row has no {field}, got one"):
            row(kind, **{field: VALUES[field]})


@pytest.mark.parametrize("field", ["output_blob", "snapshot"])
def test_empty_blob_is_there(field):
    """An empty blob is a blob; only None is none."""
    # CK-008
    cursor = CheckpointRow.decode(ID, 3, row(RowKind.StepCursor, **{field: b""}).encode(ID))

    assert getattr(cursor, field) == b""


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        pytest.param({"visit": 0}, "visit must be at least 1 and at most 4294967295, got 0 (int)", id="visit"),
        pytest.param(
            {"attempt": 2**32}, "attempt must be at least 1 and at most 4294967295, got 4294967296", id="attempt"
        ),
        pytest.param({"workflow_version": -1}, "workflow_version must be at least 0", id="version"),
        pytest.param({"fingerprint": 2**64}, "fingerprint must be at least 0", id="fingerprint"),
        pytest.param({"run_id": b"short"}, "run_id must be 16 bytes, got b'short' (bytes)", id="run id"),
        pytest.param({"recorded_at": 2**48}, "recorded_at must be at least 0 and at most 253402300799999", id="time"),
        pytest.param({"state": "x" * 129}, "state must be at most 128 bytes long, got 129", id="long state"),
        pytest.param({"task_id": "\u00fc" * 65}, "task_id must be at most 128 bytes long, got 130", id="long task"),
        pytest.param({"state": "\ud800"}, "state must be a text that UTF-8 can hold", id="lone surrogate"),
        pytest.param({"sequence": 2**63}, "sequence must be at least 0 and at most 9223372036854775807", id="sequence"),
        pytest.param({"kind": "finished"}, "kind must be a RowKind, got 'finished' (str)", id="kind"),
        pytest.param({"snapshot": "text"}, "snapshot must be bytes, got 'text' (str)", id="blob"),
        pytest.param({"is_intent": 1}, "is_intent must be a bool, got 1 (int)", id="flag"),
    ],
)
def test_value_out_of_range(fields, text):
    """A value of the wrong type or out of range is refused by the name of its parameter."""
    with pytest.raises(ConfigurationError) as caught:
        CheckpointRow(**{"sequence": 3, "kind": RowKind.StateEntry, "state": "CHARGE"} | fields)

    assert str(caught.value).startswith(text)


def test_reference_to_a_later_row():
    """A row refers to earlier rows alone."""
    with pytest.raises(ConfigurationError, match="refers_to must be below sequence, got 3"):
        row(RowKind.Compensated, refers_to=3)


@pytest.mark.parametrize("kind", [RowKind, RunStatus], ids=["RowKind", "RunStatus"])
def test_kinds_read_as_people_say_them(kind):
    """The value of a kind or a status is how people and stores write it, and so is its text."""
    assert [str(member) for member in kind] == [member.value for member in kind]
    assert [kind(member.value) for member in kind] == list(kind)


# Rows are values


@settings(deadline=None)
@given(rows())
def test_copies_are_equal(made):
    """A row survives pickling, copying and a round trip through its bytes, with every field."""
    # CK-010
    copies = [pickle.loads(pickle.dumps(made)), copy.copy(made), copy.deepcopy(made)]  # noqa: S301 - our own
    copies.append(CheckpointRow.decode(ID, made.sequence, made.encode(ID)))

    assert copies == [made] * 4
    assert {hash(one) for one in copies} == {hash(made)}
    assert [repr(one) for one in copies] == [repr(made)] * 4


def test_rows_that_differ():
    """Rows that differ in one field are not equal, nor is a row to anything else."""
    plain = row(RowKind.StateEntry)
    others = [
        {"state": "SHIP"},
        {"task_id": "charge"},
        {"visit": 2},
        {"attempt": 2},
        {"workflow_version": 1},
        {"fingerprint": 1},
        {"run_id": bytes([1] * 16)},
        {"recorded_at": 1},
        {"is_intent": True},
        {"snapshot": b""},
    ]
    different = [CheckpointRow(**{"sequence": 3, "kind": plain.kind, "state": plain.state} | other) for other in others]

    assert all(one != plain for one in different)
    assert plain != (3, RowKind.StateEntry, "CHARGE")


def test_row_is_frozen():
    """A row does not change."""
    with pytest.raises(AttributeError):
        row(RowKind.StateEntry).state = "SHIP"


def test_repr_keeps_blobs_to_itself():
    """The repr of a row tells what it is about, and of blobs their size alone."""
    cursor = row(RowKind.StepCursor, task_id="load\n", refers_to=1, next_state="SHIP", output_blob=b"secret")

    assert repr(cursor) == (
        '<CheckpointRow 3: step cursor of "CHARGE", task "load\\n", visit 1, attempt 1, goes to "SHIP", refers to 1,'
        " output_blob of 6 bytes>"
    )


# Bytes


@pytest.mark.parametrize("file", sorted(GOLDEN.glob("*.row")), ids=lambda file: file.stem)
def test_golden_rows(file):
    """Rows that an earlier version wrote are read, and written again as the same bytes."""
    data = file.read_bytes()
    sequence = int.from_bytes(data[12:20], "little")

    golden = CheckpointRow.decode(ID, sequence, data)

    assert golden.encode(ID) == data
    assert golden.kind.value.replace(" ", "-") in file.stem


@KINDS
def test_damaged_bytes(kind):
    """Any byte that is changed, or missing at the end, is found, with the run and the sequence."""
    # CK-019
    data = row(kind).encode(ID)
    damaged = [data[:at] + bytes([data[at] ^ 0x40]) + data[at + 1 :] for at in range(len(data))]
    damaged += [data[:at] for at in range(len(data))]
    damaged.append(data + b"\0")

    for bad in damaged:
        with pytest.raises(CorruptRowError) as caught:
            CheckpointRow.decode(ID, 3, bad)
        assert (caught.value.workflow_id, caught.value.sequence) == (ID, 3)


@pytest.mark.parametrize(("id_", "sequence"), [("order-2", 3), (ID, 4)], ids=["another run", "another place"])
def test_row_in_the_wrong_place(id_, sequence):
    """A row is read under the run and in the place that it was written for, nowhere else."""
    with pytest.raises(CorruptRowError) as caught:
        CheckpointRow.decode(id_, sequence, row(RowKind.StateEntry).encode(ID))

    assert (caught.value.workflow_id, caught.value.sequence) == (id_, sequence)


def test_later_format():
    """A row of a format that is not known yet is refused as that, and nothing is guessed."""
    # CK-020: there is no format before the first
    data = bytearray(row(RowKind.StateEntry).encode(ID))
    data[4] = 2

    with pytest.raises(CorruptRowError, match="is of format 2, and this version of cano reads format 1"):
        CheckpointRow.decode(ID, 3, bytes(data))


@settings(deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes(data):
    """Bytes that no row was written as are refused, whatever they are."""
    with pytest.raises(CorruptRowError):
        CheckpointRow.decode(ID, 3, data)


def test_blob_beyond_any_limit():
    """A blob of more than 64 MiB is in no row."""
    large = row(RowKind.StepCursor, output_blob=bytes((64 << 20) + 1))

    with pytest.raises(RunTooLargeError) as caught:
        large.encode(ID)

    assert (caught.value.workflow_id, caught.value.sequence) == (ID, 3)


@pytest.mark.parametrize("id_", ["", " ", "a\nb", "x" * 257, "\ud800", None, 5, b"x"], ids=repr)
def test_bytes_need_an_id(id_):
    """A row's bytes belong to a run with an id."""
    with pytest.raises(ConfigurationError, match=r"^workflow_id must "):
        row(RowKind.StateEntry).encode(id_)
    with pytest.raises(ConfigurationError, match=r"^workflow_id must "):
        CheckpointRow.decode(id_, 3, b"")
