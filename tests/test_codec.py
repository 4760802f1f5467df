"""Values that are stored: what comes back, what is refused, and that bytes never run code."""

import enum
import json
import logging
import math
import pickle
import re
import subprocess
import sys
import tracemalloc
import uuid
from collections import namedtuple
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypedDict

import msgspec
import pytest
from hypothesis import given, strategies as st

import cano
from cano import (
    CanoError,
    Codec,
    JsonCodec,
    OutputNotSerializableError,
    OutputTooLargeError,
    OutputUnreadableError,
)
from cano._codec import decoded, encoded

KIB = 1024
WHAT = "the output of task charge in state CHARGE"
CODEC = JsonCodec()


@dataclass
class Receipt:
    number: int
    amount: Decimal
    tags: list[str] = field(default_factory=list)


class Refund(msgspec.Struct, frozen=True):
    receipt: str
    at: datetime


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Level(enum.IntEnum):
    LOW = 1


class Point(NamedTuple):
    x: int
    y: float


class Options(TypedDict, total=False):
    urgent: bool


class Model:
    """What cano asks of a model of pydantic, and no more."""

    def __init__(self, **fields):
        self.fields = fields

    def model_dump_json(self):
        return json.dumps(self.fields)

    def model_dump(self):
        return self.fields

    @classmethod
    def model_validate_json(cls, data):
        fields = json.loads(data)
        if not isinstance(fields, dict) or not isinstance(fields.get("id"), int):
            raise Invalid(f"the password is {fields}")
        return cls(**fields)

    def __eq__(self, other):
        return isinstance(other, Model) and self.fields == other.fields

    __hash__ = None


class Invalid(Exception):
    """As pydantic's, it tells the values."""


class Unlucky:
    """What a codec must not ask."""

    def __repr__(self):
        raise AssertionError("repr was called")


# --- what comes back -------------------------------------------------------------------------------------------------

VALUES = [
    (None, None),
    (True, bool),
    (2**80, int),
    (-0.5, float),
    ("grüße \U0001f600", str),
    (b"\x00\xff", bytes),
    ([1, 2], list[int]),
    ((1, "a"), tuple[int, str]),
    ({1, 2}, set[int]),
    ({"a": None, "b": 1.5}, dict[str, float | None]),
    ({1: "a"}, dict[int, str]),
    (date(2027, 1, 31), date),
    (time(12, 30), time),
    (datetime(2027, 1, 31, 12, tzinfo=UTC), datetime),
    (timedelta(hours=1.5), timedelta),
    (Decimal("0.10"), Decimal),
    (uuid.UUID(int=7), uuid.UUID),
    (Colour.BLUE, Colour),
    (Level.LOW, Level),
    ("a", Literal["a", "b"]),
    (Point(1, 2.5), Point),
    ({"urgent": True}, Options),
    (Receipt(7, Decimal("9.99"), ["a"]), Receipt),
    ([Receipt(7, Decimal("9.99"))], list[Receipt]),
    (Refund("r-1", datetime(2027, 1, 31, tzinfo=UTC)), Refund),
    (Model(id=1), Model),
    ({"all": [Model(id=1), Model(id=2)]}, dict[str, list[Model]]),
    ([1, "a", None, {"b": [True]}], Any),
    ([1, "a", None, {"b": [True]}], object),
]


@pytest.mark.parametrize(("value", "type_"), VALUES)
def test_value_comes_back_as_its_type(value, type_):
    """What is written comes back equal, and of the same type."""
    back = decoded(CODEC, WHAT, encoded(CODEC, WHAT, value, type_), type_)

    assert back == value
    assert type(back) is type(value)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters()), inner),
    max_leaves=20,
)


def is_plain(value):
    """Whether JSON in UTF-8 has a form for it."""
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, str):
        return value.isascii() or not any("\ud800" <= c <= "\udfff" for c in value)
    if isinstance(value, dict):
        return all(is_plain(part) for item in value.items() for part in item)
    return all(map(is_plain, value)) if isinstance(value, list) else True


@given(json_values)
def test_value_comes_back_or_is_refused(value):
    """Any value that JSON could have comes back equal, unless JSON has no form for it: then it is refused."""
    try:
        data = CODEC.encode(value)
    except OutputNotSerializableError:
        assert not is_plain(value)
    else:
        assert is_plain(value)
        assert CODEC.decode(data, Any) == value


def test_null_is_not_taken_for_a_nan():
    """None beside floats is written; only a float that is not finite is refused."""
    assert CODEC.encode({"a": None, "b": 0.5, "nan": "inf"}) == b'{"a":null,"b":0.5,"nan":"inf"}'


def nested(levels):
    value: object = 1
    for _ in range(levels):
        value = [value]
    return value


# --- what is refused -------------------------------------------------------------------------------------------------

loop: list[Any] = []
loop.append(loop)

REFUSED = {
    "nan": (math.nan, "not finite"),
    "infinity in a list": ([1, math.inf], "not finite"),
    "nan in a dataclass": (Receipt(1, math.nan), "not finite"),
    "nan in a model": (Model(id=1, x=math.nan), "JSON"),
    "nan as a key": ({math.nan: 1}, "not finite"),
    "lone surrogate": ("\ud800", "surrogates"),
    "lone surrogate as a key": ({"\udfff": 1}, "surrogates"),
    "65 levels": (nested(65), "64 levels"),
    "100,000 levels": (nested(100_000), "recursion"),
    "itself": (loop, "recursion"),
    "object": (object(), "type object has no form in JSON"),
    "unlucky": ([Unlucky()], "type Unlucky has no form in JSON"),
    "function": (print, "no form"),
    "class": (Receipt, "no form"),
    "generator": ((i for i in ()), "no form"),
    "complex": (1j, "no form"),
    "tuple as a key": ({(1, 2): 3}, "type tuple has no form"),
    "int of 5,000 digits": (10**5000, "digits"),
}


@pytest.mark.parametrize(("value", "reason"), REFUSED.values(), ids=REFUSED)
def test_value_without_a_form_is_refused(value, reason):
    """What JSON has no form for is refused with the reason; nothing is asked for its repr."""
    with pytest.raises(OutputNotSerializableError) as caught:
        encoded(CODEC, WHAT, value, Any)

    assert WHAT in str(caught.value)
    assert reason in str(caught.value)


def test_64_levels_are_fine():
    """The deepest value that is allowed comes back, and so does a wide one."""
    assert CODEC.decode(CODEC.encode(nested(64)), Any) == nested(64)
    assert CODEC.decode(CODEC.encode([[]] * 1000), Any) == [[]] * 1000


UNTRUE = [
    ((1, 2), Any, "would come back as list; annotate its type"),
    (Receipt(1, Decimal(1)), Any, "would come back as dict; annotate its type"),
    ({"number": 1}, Receipt, "no value of type Receipt can be read: Object missing required field `amount`"),
    ("1", int, "would not come back: no value of type int can be read: Expected `int`, got `str`"),
    (Receipt(1, Decimal(1)), Refund, "no value of type Refund can be read"),
    (object, "Receipt", "has no form in JSON"),
    ([1], "list[int", "no value of type list[int can be read"),
]


@pytest.mark.parametrize(("value", "type_", "text"), UNTRUE)
def test_value_that_would_not_come_back_is_refused(value, type_, text):
    """A value is read again before it is stored: one that would be something else is refused now, not when it is needed."""
    with pytest.raises(OutputNotSerializableError) as caught:
        encoded(CODEC, WHAT, value, type_)

    assert text in str(caught.value)


def test_size_limit():
    """At most 2 MiB are stored, to the byte."""
    limit = 2 * KIB * KIB
    assert len(encoded(CODEC, WHAT, "a" * (limit - 2), str)) == limit

    with pytest.raises(OutputTooLargeError) as caught:
        encoded(CODEC, WHAT, "a" * (limit - 1), str)

    assert (caught.value.size, caught.value.limit) == (limit + 1, limit)
    assert str(caught.value) == f"{WHAT}, of type str, has {limit + 1} bytes; at most {limit} can be stored"


def test_large_value_is_warned_of_once(caplog):
    """From 256 KiB on there is one warning for each place."""
    what = "the output of task bulk in state BULK"
    with caplog.at_level(logging.WARNING, "cano"):
        encoded(CODEC, what, "a" * (256 * KIB - 2), str)
        assert not caplog.records
        for _ in range(3):
            encoded(CODEC, what, "a" * (256 * KIB - 1), str)

    assert [record.getMessage() for record in caplog.records] == [
        f"{what} has {256 * KIB + 1} bytes; more than {2048 * KIB} cannot be stored"
    ]


def test_error_does_not_tell_values():
    """What another library says of a value may quote it; the message names only the kind of error, which is the cause."""
    with pytest.raises(OutputUnreadableError) as caught:
        decoded(CODEC, WHAT, b'{"id":"secret"}', Model)

    assert str(caught.value) == f"{WHAT} cannot be read: no value of type Model can be read: Invalid"
    assert isinstance(caught.value.__cause__.__cause__, Invalid)


# --- codecs of others ------------------------------------------------------------------------------------------------


class Upper:
    """A codec of the user's own."""

    def encode(self, value, /):
        return value.upper().encode()

    def decode(self, data, type_, /):
        return type_(data.decode().lower())


def test_own_codec():
    """A codec is any object with the two methods; what it raises is told as ours, with the cause."""
    assert isinstance(Upper(), Codec)
    assert decoded(Upper(), WHAT, encoded(Upper(), WHAT, "abc", str), str) == "abc"
    with pytest.raises(OutputNotSerializableError) as caught:
        encoded(Upper(), WHAT, 1, str)
    assert isinstance(caught.value.__cause__, AttributeError)
    with pytest.raises(OutputUnreadableError):
        decoded(Upper(), WHAT, b"\xff", str)


def test_codec_must_make_bytes():
    """What is no bytes is refused before a store sees it."""

    class Broken(Upper):
        def encode(self, value, /):
            return value

    with pytest.raises(OutputNotSerializableError, match="made no bytes"):
        encoded(Broken(), WHAT, "text", str)


# --- hostile bytes ---------------------------------------------------------------------------------------------------


class Exploit:
    def __reduce__(self):
        return print, ("the bytes ran code",)


def objects(**fields):
    return json.dumps(fields).encode()


HOSTILE = {
    "nothing": b"",
    "spaces": b"   ",
    "a nul": b"\x00",
    "pickle 0": pickle.dumps(Exploit(), 0),
    "pickle 2": pickle.dumps(Exploit(), 2),
    "pickle 5": pickle.dumps(Exploit(), 5),
    "marshal": b"\xe3\x00\x00\x00\x00",
    "yaml object": b"!!python/object/apply:os.system ['id']",
    "yaml name": b"!!python/name:os.system",
    "constructor": objects(lc=2, type="constructor", id=["os", "system"], kwargs={"command": "id"}),
    "constructor with a method": objects(lc=2, type="constructor", id=["builtins", "eval"], method=["x"], args=["1"]),
    "jsonpickle": objects(**{"py/reduce": [{"py/type": "os.system"}, {"py/tuple": ["id"]}]}),
    "jsonpickle object": objects(**{"py/object": "subprocess.Popen"}),
    "class name": objects(__class__="os.system", args=["id"]),
    "type tag": objects(type="Receipt", number="x"),
    "dunder": objects(__init__={"__globals__": {}}, __reduce__=["os.system"]),
    "django": objects(_model="auth.user", _pk="1; DROP TABLE runs"),
    "msgpack map": b"\x81\xa1a\x01",
    "msgpack extension": b"\xc7\x05\x05hello",
    "msgpack timestamp": b"\xd6\xff\x00\x00\x00\x00",
    "msgpack huge": b"\xdd\xff\xff\xff\xff",
    "cbor tag": b"\xd8\x25\x50" + bytes(16),
    "bson": b"\x16\x00\x00\x00\x02a\x00\x06\x00\x00\x00world\x00\x00",
    "java": b"\xac\xed\x00\x05sr",
    "million lists": b"[" * 1_000_000 + b"]" * 1_000_000,
    "million open lists": b"[" * 1_000_000,
    "million objects": b'{"a":' * 1_000_000,
    "million digits": b"1" * 1_000_000,
    "huge exponent": b"1e999999999",
    "tiny exponent": b'{"number":1e-999999999}',
    "nan": b"NaN",
    "infinity": b"-Infinity",
    "duplicate keys": b'{"number":1,"number":2,"amount":"1"}',
    "empty keys": b'{"":{"":{"":""}}}',
    "long key": b'{"' + b"k" * 1_000_000 + b'":1}',
    "lone surrogate": b'"\\ud800"',
    "surrogate bytes": b'"\xed\xa0\x80"',
    "overlong": b'"\xc0\xaf"',
    "bom": b"\xef\xbb\xbf{}",
    "utf-16": '{"number":1}'.encode("utf-16"),
    "cut off": b'{"number":1,"amount":"1',
    "two values": b'{"number":1,"amount":"1"}{"number":2,"amount":"1"}',
    "trailing comma": b'{"number":1,"amount":"1",}',
    "comment": b'/* */{"number":1,"amount":"1"}',
    "control character": b'"\x01"',
    "wrong types": objects(number=[], amount={}, tags="x"),
    "escape sequence": objects(number="\x1b[2J", amount="\n\nERROR root"),
}
CEILING = 32 * KIB * KIB


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("type_", [Any, Receipt, Refund, Model, list[Receipt], dict[str, int], int | None, str])
def test_hostile_bytes_are_refused_or_plain(data, type_, capsys):
    """Bytes that want more than to be plain data of the annotated type give our error, or such data; no code runs."""
    modules = set(sys.modules)
    try:
        value = decoded(CODEC, WHAT, data, type_)
    except OutputUnreadableError as error:
        text = str(error)
        assert text.isprintable()
        assert len(text) < 500
    else:
        plain = (dict, list, str, int, float, bool, type(None))
        assert type(value) in (plain if type_ is Any else (Receipt, Model, list, dict, int, type(None), str))
    assert capsys.readouterr().out == ""
    assert set(sys.modules) == modules


@pytest.mark.parametrize("name", ["million lists", "million open lists", "million objects", "million digits"])
def test_bomb_takes_no_memory(name):
    """Reading a bomb takes no more than a few times its bytes."""
    tracemalloc.start()
    try:
        with pytest.raises(CanoError):
            CODEC.decode(HOSTILE[name], Any)
        assert tracemalloc.get_traced_memory()[1] < CEILING
    finally:
        tracemalloc.stop()


def test_import_of_cano_leaves_msgspec_alone():
    """Importing cano is quick: msgspec comes with the first value that is written or read."""
    code = "import sys, cano; print('msgspec' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)  # noqa: S603

    assert done.stdout.strip() == "False"


def test_no_module_of_the_package_imports_pickle():
    """No module of cano imports a format that can run code."""
    runs_code = re.compile(r"^\s*(?:import|from)\s+(?:pickle|marshal|shelve|dill|cloudpickle|yaml)\b", re.MULTILINE)

    for file in Path(cano.__file__).parent.rglob("*.py"):
        assert not runs_code.search(file.read_text("utf-8")), file


def test_named_tuple_without_annotations_is_a_plain_tuple():
    """A collections.namedtuple comes back as itself."""
    Pair = namedtuple("Pair", "a b")  # noqa: PYI024 - this is what is tested

    assert CODEC.decode(CODEC.encode(Pair(1, "x")), Pair) == Pair(1, "x")
