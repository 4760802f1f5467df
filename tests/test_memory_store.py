"""`MemoryStore`: values by key, shared and never copied, safe between tasks and threads."""

import asyncio
import enum
import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Annotated

import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from cano import (
    ConfigurationError,
    KeyNotFoundError,
    MemoryStore,
    Res,
    Resources,
    StoreError,
    StoreTypeError,
    Workflow,
)


class Key(enum.Enum):
    TOTAL = 1


@dataclass(frozen=True)
class Point:
    x: int
    y: int


class Animal:
    pass


class Dog(Animal):
    pass


def store_of_one():
    store = MemoryStore()
    store.put("key", 1)
    return store


VALUES = [
    pytest.param(5, id="int"),
    pytest.param("text", id="str"),
    pytest.param(None, id="None"),
    pytest.param([1, 2], id="list"),
    pytest.param({"a": {1}}, id="dict"),
    pytest.param(Dog(), id="object"),
    pytest.param(Dog, id="class"),
    pytest.param(print, id="function"),
]


@pytest.mark.parametrize("value", VALUES)
def test_get_what_was_put(value):
    """Any value is found again under its key, as the same object every time."""
    store = MemoryStore()

    store.put("key", value)

    # MS-001, MS-006
    assert store.get("key") is value
    assert store.get("key") is value


@pytest.mark.parametrize("key", ["key", 5, None, Key.TOTAL, ("a", 1), Point(1, 2), frozenset({1}), Dog], ids=repr)
def test_any_hashable_key(key):
    """Any hashable value is a key."""
    store = MemoryStore()

    store.put(key, 1)

    assert store.get(key) == 1
    assert key in store


def test_equal_keys_are_one():
    """Keys are told apart by hash and equality, as in a dict."""
    store = MemoryStore()

    store.put(Point(1, 2), "a")
    store.put(1, "b")

    assert store.get(Point(1, 2)) == "a"
    assert store.get(1.0) == "b"
    assert len(store) == 2


def test_values_are_shared():
    """A change of a value is seen by everyone who gets it."""
    store = MemoryStore()
    store.put("list", [1])

    store.get("list").append(2)

    # MS-006
    assert store.get("list") == [1, 2]


@pytest.mark.parametrize(
    ("key", "shown"),
    [
        pytest.param("total", "'total'", id="text"),
        pytest.param(Key.TOTAL, "<Key.TOTAL: 1>", id="Enum"),
        pytest.param("a\nb", r"'a\nb'", id="control character"),
    ],
)
def test_missing_key(key, shown):
    """A key without a value is named; the error is a KeyError and a StoreError."""
    # MS-001
    with pytest.raises(KeyNotFoundError) as caught:
        MemoryStore().get(key)

    assert str(caught.value) == f"no value under key {shown}"
    assert isinstance(caught.value, KeyError)
    assert isinstance(caught.value, StoreError)


@pytest.mark.parametrize(
    ("value", "type_"),
    [
        pytest.param(5, int, id="class"),
        pytest.param(True, int, id="subclass"),
        pytest.param(Dog(), Animal, id="own subclass"),
        pytest.param(5, (str, int), id="tuple"),
        pytest.param(5, int | str, id="union"),
        pytest.param(None, type(None), id="None"),
        pytest.param(5, object, id="object"),
    ],
)
def test_get_with_a_fitting_type(value, type_):
    """A value of the type asked for, or of a subclass, is returned."""
    store = MemoryStore()
    store.put("key", value)

    assert store.get("key", type_) is value


@pytest.mark.parametrize(
    ("value", "type_", "text"),
    [
        pytest.param("five", int, "the value under key 'key' must be a int, it is a str", id="class"),
        pytest.param(Animal(), Dog, "the value under key 'key' must be a Dog, it is a Animal", id="superclass"),
        pytest.param(None, int, "the value under key 'key' must be a int, it is a NoneType", id="None"),
        pytest.param(5, (str, bytes), "the value under key 'key' must be a str or bytes, it is a int", id="tuple"),
    ],
)
def test_get_with_another_type(value, type_, text):
    """A value of another type is refused, naming key, type wanted and type found; the error is a TypeError."""
    store = MemoryStore()
    store.put("key", value)

    # MS-001
    with pytest.raises(StoreTypeError) as caught:
        store.get("key", type_)

    assert str(caught.value) == text
    assert isinstance(caught.value, TypeError)
    assert store.get("key") is value


def test_get_of_a_missing_key_with_a_type():
    """A missing key is missing, whatever the type."""
    with pytest.raises(KeyNotFoundError):
        MemoryStore().get("key", int)


@pytest.mark.parametrize("type_", [5, "int", [int], list[int]], ids=["number", "text", "list", "generic"])
def test_get_with_a_type_that_is_none(type_):
    """What isinstance cannot check is a ConfigurationError that names the parameter."""
    store = MemoryStore()
    store.put("key", [1])

    with pytest.raises(ConfigurationError, match="type_ must be"):
        store.get("key", type_)


def test_overwrite():
    """Another value, also of another type, takes the place of the first; the length stays."""
    store = MemoryStore()
    store.put("key", 5)

    store.put("key", "five")

    # MS-002
    assert (store.get("key"), len(store)) == ("five", 1)


def test_get_or():
    """`get_or` gives the value, or the default where there is none, which is not stored."""
    store = MemoryStore()
    store.put("none", None)
    default = object()

    assert store.get_or("none", default) is None
    assert store.get_or("missing", default) is default
    assert "missing" not in store


def test_remove():
    """A removed key is gone; removing a missing one changes nothing."""
    store = MemoryStore()
    store.put("a", 1)
    store.put("b", 2)

    # MS-003
    store.remove("a")
    store.remove("a")

    assert (store.keys(), len(store)) == (["b"], 1)


def test_clear():
    """`clear` removes everything; the store can be used again."""
    store = MemoryStore()
    store.put("a", 1)

    # MS-003
    store.clear()

    assert (len(store), list(store), store.contains_key("a")) == (0, [], False)
    store.put("a", 2)
    assert store.get("a") == 2


def test_looking():
    """Length, membership, keys and iteration agree, in the order in which the keys came first."""
    store = MemoryStore()
    for key in "bca":
        store.put(key, key)
    store.put("b", 2)

    # MS-003
    assert store.keys() == list(store) == ["b", "c", "a"]
    assert [key for key in "abcd" if key in store] == [key for key in "abcd" if store.contains_key(key)] == list("abc")
    assert repr(store) == "<MemoryStore with 3 keys>"


def test_keys_are_a_copy():
    """The keys may be changed, and iteration goes on over the keys it began with."""
    store = MemoryStore()
    for key in "abc":
        store.put(key, key)

    store.keys().clear()
    for key in store:
        store.remove(key)
        store.put(key * 2, key)

    assert store.keys() == ["aa", "bb", "cc"]


def test_append():
    """`append` makes a list, and makes it longer."""
    store = MemoryStore()

    # MS-004
    store.append("log", 1)
    store.append("log", 2)

    assert store.get("log", list) == [1, 2]


def test_append_to_a_list_that_was_put():
    """A list that was put grows in place."""
    store, log = MemoryStore(), [1]
    store.put("log", log)

    store.append("log", 2)

    assert log == [1, 2]


@pytest.mark.parametrize("value", [5, None, (1,), "text", {1: 2}], ids=repr)
def test_append_to_something_else(value):
    """What is no list is refused and stays as it was."""
    store = MemoryStore()
    store.put("log", value)

    # MS-004
    with pytest.raises(StoreTypeError, match="the value under key 'log' must be a list to append to, it is a"):
        store.append("log", 1)

    assert store.get("log") is value


@pytest.mark.parametrize(
    "use",
    [
        pytest.param(lambda store, key: store.put(key, 1), id="put"),
        pytest.param(lambda store, key: store.get(key), id="get"),
        pytest.param(lambda store, key: store.get_or(key, 1), id="get_or"),
        pytest.param(lambda store, key: store.remove(key), id="remove"),
        pytest.param(lambda store, key: store.append(key, 1), id="append"),
        pytest.param(lambda store, key: store.contains_key(key), id="contains_key"),
        pytest.param(lambda store, key: key in store, id="in"),
    ],
)
class TestKeysThatCannotBeHashed:
    @pytest.mark.parametrize("key", [[], {}, (1, [])], ids=repr)
    def test_unhashable(self, use, key):
        """A key that cannot be hashed is a ConfigurationError that names the parameter and the type."""
        with pytest.raises(ConfigurationError, match=f"key must be hashable, got a {type(key).__name__}"):
            use(store_of_one(), key)

    def test_broken_hash(self, use):
        """What a key's own __hash__ raises comes out as it is."""

        class Broken:
            def __hash__(self):
                raise RuntimeError("broken")

        with pytest.raises(RuntimeError, match="broken"):
            use(store_of_one(), Broken())


def test_store_of_its_own_subclass():
    """The store may be a base class."""

    class Counting(MemoryStore):
        puts = 0

        def put(self, key, value):
            self.puts += 1
            super().put(key, value)

    store = Counting()
    store.put("a", 1)

    assert (store.puts, store.get("a")) == (1, 1)


def test_store_goes_with_its_cycles():
    """A store that is reached from its own values is collected."""
    store = MemoryStore()
    animal = Animal()
    animal.store = store
    store.put("animal", animal)
    reference = weakref.ref(store)

    del store, animal
    gc.collect()

    assert reference() is None


async def test_store_is_a_resource():
    """A workflow's tasks share a store that is a resource."""

    def count(store: Annotated[MemoryStore, Res("store")]):
        store.append("visits", len(store))
        return "count" if len(store.get("visits", list)) < 3 else "done"

    store = MemoryStore()
    workflow = Workflow(Resources({"store": store})).register("count", count).add_exit_state("done")

    # MS-007
    await workflow.orchestrate("count")

    assert store.get("visits") == [0, 1, 1]


async def test_store_between_tasks():
    """Concurrent tasks lose nothing."""
    store = MemoryStore()

    async def write(n):
        for _ in range(10):
            store.append("log", n)
            await asyncio.sleep(0)

    await asyncio.gather(*(write(n) for n in range(20)))

    assert sorted(store.get("log")) == sorted(list(range(20)) * 10)


def test_store_between_threads():
    """10 readers, 10 writers and 5 appenders at once: every read is whole, every write and every item is there."""
    store = MemoryStore()
    store.put("fixed", "value")
    begin = threading.Barrier(25, timeout=10)

    def read():
        begin.wait()
        return all(store.get("fixed") == "value" and isinstance(store.keys(), list) for _ in range(100))

    def write(n):
        begin.wait()
        for i in range(10):
            store.put(("written", n, i), i)
        return True

    def append(n):
        begin.wait()
        for i in range(10):
            store.append("log", (n, i))
        return True

    # MS-005
    with ThreadPoolExecutor(25) as pool:
        jobs = [pool.submit(read) for _ in range(10)]
        jobs += [pool.submit(write, n) for n in range(10)]
        jobs += [pool.submit(append, n) for n in range(5)]
        done = [job.result(10) for job in jobs]

    assert all(done)
    assert len(store) == 2 + 100
    assert sorted(store.get("log")) == [(n, i) for n in range(5) for i in range(10)]


KEYS = st.one_of(st.sampled_from(["a", "b", 1, True, 1.0, None, ("a",)]), st.integers(0, 3))
ITEMS = st.one_of(st.integers(), st.text(max_size=3), st.none())


class StoreAgainstDict(RuleBasedStateMachine):
    """Whatever is done to the store in whatever order, it is as if it were done to a dict."""

    def __init__(self):
        super().__init__()
        self.store = MemoryStore()
        self.model = {}

    @rule(key=KEYS, value=st.one_of(ITEMS, st.lists(ITEMS, max_size=2)))
    def put(self, key, value):
        self.store.put(key, value)
        self.model[key] = value

    @rule(key=KEYS)
    def get(self, key):
        try:
            found = self.store.get(key)
        except KeyNotFoundError:
            assert key not in self.model
        else:
            assert found is self.model[key]

    @rule(key=KEYS, type_=st.sampled_from([int, str, list, (int, str)]))
    def get_typed(self, key, type_):
        try:
            found = self.store.get(key, type_)
        except KeyNotFoundError:
            assert key not in self.model
        except StoreTypeError:
            assert not isinstance(self.model[key], type_)
        else:
            assert isinstance(found, type_)
            assert found is self.model[key]

    @rule(key=KEYS)
    def get_or(self, key):
        default = object()
        assert self.store.get_or(key, default) is self.model.get(key, default)

    @rule(key=KEYS)
    def remove(self, key):
        self.store.remove(key)
        self.model.pop(key, None)

    @rule(key=KEYS, item=ITEMS)
    def append(self, key, item):
        before = list(self.model[key]) if isinstance(self.model.get(key), list) else []
        try:
            self.store.append(key, item)
        except StoreTypeError:
            assert not isinstance(self.model[key], list)
        else:
            found = self.store.get(key)
            assert self.model.setdefault(key, found) is found
            assert found == [*before, item]

    @rule()
    def clear(self):
        self.store.clear()
        self.model.clear()

    @invariant()
    def agree(self):
        assert self.store.keys() == list(self.store) == list(self.model)
        assert len(self.store) == len(self.model)
        assert all(key in self.store and self.store.contains_key(key) for key in self.model)


StoreAgainstDict.TestCase.settings = settings(deadline=None, max_examples=60, stateful_step_count=30)
test_store_against_a_dict = StoreAgainstDict.TestCase
