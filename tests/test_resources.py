"""`Resources`: look-up by key and type, set-up and tear-down around their users, health, bundles."""

import asyncio
import enum
import gc
import logging
import weakref
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import field
from typing import Annotated, Any, ClassVar, NewType, Optional, Protocol, runtime_checkable

import pytest
from hypothesis import given, strategies as st
from typing_extensions import TypeAliasType

from cano import (
    CanoError,
    ConfigurationError,
    DuplicateResourceError,
    FromResources,
    HealthStatus,
    Res,
    Resource,
    ResourceError,
    ResourceNotFoundError,
    Resources,
    ResourceTypeError,
    _resources,
)


class Key(enum.Enum):
    STORE = "store"
    CACHE = "cache"


class Secret:
    """A value that must never be shown."""

    def __repr__(self):
        raise AssertionError("a value was shown")


class Enterable:
    """A plain object that could be entered, both ways."""

    def __init__(self):
        self.entered = []

    async def __aenter__(self):
        self.entered.append("async")
        return self

    async def __aexit__(self, *_):
        self.entered.append("async exit")

    def __enter__(self):
        self.entered.append("sync")
        return self

    def __exit__(self, *_):
        self.entered.append("sync exit")


async def ticks(count):
    for _ in range(count):
        await asyncio.sleep(0)


class Ledger:
    """What happened, in order: "+a" set up, "-a" tear-down begun, ".a" tear-down ended, "in" and "out" of a user."""

    def __init__(self, names="abc"):
        self.names = names
        self.events = []

    def __str__(self):
        return " ".join(self.events)

    def check(self):
        """Each set-up has one tear-down, newest first, one at a time; users see all of it set up and nothing going."""
        live, users, going = [], 0, None
        for event in self.events:
            if event == "in":
                users += 1
                assert live == list(self.names)
            elif event == "out":
                users -= 1
            elif event[0] == "+":
                assert (users, going) == (0, None)
                live.append(event[1:])
            elif event[0] == "-":
                assert (users, going, live.pop()) == (0, None, event[1:])
                going = event[1:]
            else:
                assert going == event[1:]
                going = None
        assert (live, users, going) == ([], 0, None)


class Part(Resource):
    """A resource that takes two ticks to set up and two to tear down, and fails when told to."""

    def __init__(self, ledger, name, *, setup_error=None, teardown_error=None):
        self.ledger = ledger
        self.name = name
        self.setup_error = setup_error
        self.teardown_error = teardown_error

    async def setup(self):
        await ticks(2)
        if self.setup_error is not None:
            raise self.setup_error
        self.ledger.events.append(f"+{self.name}")

    async def teardown(self):
        self.ledger.events.append(f"-{self.name}")
        try:
            await ticks(2)
            if self.teardown_error is not None:
                raise self.teardown_error
        finally:
            self.ledger.events.append(f".{self.name}")


def parts(ledger, **errors):
    """Resources with a `Part` for each name of the ledger; ``b={"setup_error": ...}`` makes one fail."""
    return Resources({name: Part(ledger, name, **errors.get(name, {})) for name in ledger.names})


def managed(ledger):
    """The same life cycle as `parts`, from context managers."""

    @asynccontextmanager
    async def manager(name):
        part = Part(ledger, name)
        await part.setup()
        try:
            yield name
        finally:
            await part.teardown()

    resources = Resources()
    for name in ledger.names:
        resources.manage(name, lambda name=name: manager(name))
    return resources


def mixed(ledger):
    """The same life cycle, from two `Resource`s with a sync manager and plain objects between them."""

    @contextmanager
    def sync(name):
        ledger.events.append(f"+{name}")
        try:
            yield name
        finally:
            ledger.events.extend((f"-{name}", f".{name}"))

    first, second, third = ledger.names
    resources = Resources({"lock": asyncio.Lock(), first: Part(ledger, first)})
    resources.manage(second, lambda: sync(second)).insert("plain", Enterable())
    return resources.insert(third, Part(ledger, third))


async def use(resources, ledger, body=1):
    async with resources:
        ledger.events.append("in")
        try:
            await ticks(body)
        finally:
            ledger.events.append("out")


def assert_idle(resources):
    assert (resources._users, resources._ready, resources._live, resources._change) == (0, False, [], None)


# Look-up


def test_get_same_object_twice():
    """Two gets of a key give the same object, which is the one inserted."""
    store = {}
    resources = Resources().insert("store", store)

    # RE-001
    assert resources.get("store") is store
    assert resources.get("store", dict) is store


def test_get_unknown_key():
    """A key without an entry raises an error that names it and the known keys."""
    resources = Resources({"store": 1, Key.CACHE: 2})

    # RE-001
    with pytest.raises(ResourceNotFoundError) as caught:
        resources.get("stoer")

    assert str(caught.value) == "no resource 'stoer'; known keys: 'store', <Key.CACHE: 'cache'>"
    assert isinstance(caught.value, KeyError)
    assert isinstance(caught.value, CanoError)


@pytest.mark.parametrize(
    ("count", "ending"),
    [
        pytest.param(0, "known keys: none", id="none"),
        pytest.param(10, "7, 8, 9", id="ten"),
        pytest.param(12, "7, 8, 9 and 2 more", id="twelve"),
    ],
)
def test_get_unknown_key_lists_ten_keys(count, ending):
    """The error lists at most ten keys and counts the others."""
    resources = Resources(dict.fromkeys(range(count)))

    with pytest.raises(ResourceNotFoundError) as caught:
        resources.get("x")

    assert str(caught.value).endswith(ending)


def test_get_other_type():
    """A value of another type raises an error that names key, type found and type wanted, and shows no value."""
    resources = Resources({"store": Secret()})

    # RE-001
    with pytest.raises(ResourceTypeError) as caught:
        resources.get("store", Ledger)

    assert str(caught.value) == "resource 'store' is of type Secret, wanted Ledger"
    assert isinstance(caught.value, TypeError)


@runtime_checkable
class Sized(Protocol):
    def __len__(self) -> int: ...


class Closable(Protocol):
    def close(self) -> None: ...


UserId = NewType("UserId", int)


@pytest.mark.parametrize(
    ("value", "type_"),
    [
        pytest.param(1, int, id="class"),
        pytest.param(True, int, id="subclass"),
        pytest.param(1, int | str, id="union"),
        pytest.param(None, Optional[int], id="optional"),  # noqa: UP045 - the old spelling is the case
        pytest.param([1], list[int], id="generic"),
        pytest.param([1], list[int] | None, id="union with a generic"),
        pytest.param(1, UserId, id="NewType"),
        pytest.param(1, TypeAliasType("Alias", UserId | str), id="type statement"),
        pytest.param("x", Any, id="Any"),
        pytest.param([], Sized, id="runtime protocol"),
    ],
)
def test_get_accepts_annotations(value, type_):
    """Whatever isinstance can check of an annotation is checked, and a fitting value passes."""
    resources = Resources({"x": value})

    assert resources.get("x", type_) is value


@pytest.mark.parametrize(
    ("value", "type_", "wanted"),
    [
        pytest.param("x", int, "int", id="class"),
        pytest.param(None, int, "int", id="None"),
        pytest.param(1.5, int | str, "int | str", id="union"),
        pytest.param((1,), list[int], "list[int]", id="generic"),
        pytest.param("x", UserId, "UserId", id="NewType"),
        pytest.param(1, Sized, "Sized", id="runtime protocol"),
    ],
)
def test_get_refuses_other_types(value, type_, wanted):
    """A value that does not fit the annotation is a ResourceTypeError that names the annotation."""
    resources = Resources({"x": value})

    with pytest.raises(ResourceTypeError, match=r"resource 'x' is of type \w+, wanted ") as caught:
        resources.get("x", type_)

    assert wanted in str(caught.value)


@pytest.mark.parametrize("type_", [Closable, "Store", 3], ids=["protocol", "text", "number"])
def test_get_type_that_cannot_be_checked(type_):
    """A type that isinstance cannot check is a ConfigurationError."""
    resources = Resources({"x": 1})

    with pytest.raises(ConfigurationError, match="isinstance cannot check"):
        resources.get("x", type_)


@pytest.mark.parametrize("key", ["store", Key.STORE, Secret, ("a", 1), None, 7], ids=lambda key: type(key).__name__)
def test_any_hashable_key(key):
    """Any hashable value is a key."""
    resources = Resources().insert(key, 1)

    assert resources.get(key) == 1


@pytest.mark.parametrize(
    "action",
    [
        pytest.param(lambda: Resources().insert([], 1), id="insert"),
        pytest.param(lambda: Resources().try_insert([], 1), id="try_insert"),
        pytest.param(lambda: Resources().manage([], Enterable), id="manage"),
        pytest.param(lambda: Resources().get([]), id="get"),
        pytest.param(lambda: Res([]), id="Res"),
    ],
)
def test_unhashable_key(action):
    """A key that cannot be hashed is a ConfigurationError."""
    with pytest.raises(ConfigurationError, match="a resource key must be hashable, got a list"):
        action()


def test_none_is_a_value():
    """None can be stored and is found again."""
    assert Resources({"x": None}).get("x") is None


def test_insert_duplicate():
    """Inserting a key twice raises and leaves the first entry alone."""
    resources = Resources().insert("x", 1)

    # RE-002
    with pytest.raises(DuplicateResourceError, match="'x'"):
        resources.insert("x", 2)

    assert resources.get("x") == 1


def test_try_insert_duplicate():
    """try_insert keeps the first entry, adds what is new, and chains."""
    # RE-002
    resources = Resources().insert("x", 1).try_insert("x", 2).try_insert("y", 3)

    assert (resources.get("x"), resources.get("y")) == (1, 3)


def test_manage_duplicate():
    """Managing a key that has an entry raises."""
    # RE-002
    with pytest.raises(DuplicateResourceError):
        Resources({"x": 1}).manage("x", Enterable)


def test_construct_from_what_is_no_mapping():
    """Resources take a mapping or nothing."""
    with pytest.raises(ConfigurationError, match="must be a mapping of key to value, got a list"):
        Resources([("x", 1)])


def test_empty_has_no_entries():
    """Resources.empty() holds nothing and needs no life cycle."""
    resources = Resources.empty()

    assert repr(resources) == "<Resources known keys: none>"
    assert not resources._lifecycle


def test_repr_shows_keys_only():
    """The repr names the keys and never shows a value."""
    assert repr(Resources({"a": Secret(), 2: Secret()})) == "<Resources known keys: 'a', 2>"


@pytest.mark.parametrize(
    ("resources", "expected"),
    [
        pytest.param(Resources({"lock": asyncio.Lock(), "x": Enterable()}), False, id="plain"),
        pytest.param(Resources({"x": Resource()}), True, id="Resource"),
        pytest.param(Resources({"x": Resource()}).insert("y", 1), True, id="Resource, then plain"),
        pytest.param(Resources().manage("x", Enterable), True, id="managed"),
    ],
)
def test_lifecycle_flag(resources, expected):
    """The engine is told to skip the life cycle exactly when nothing has one."""
    assert resources._lifecycle is expected


# Managed entries


async def test_managed_value_is_what_entering_gives():
    """The value of a managed entry is what its context manager gives, made anew by each set-up and dropped after it."""
    made = []

    @asynccontextmanager
    async def manager() -> AsyncIterator[list[int]]:
        made.append([])
        yield made[-1]

    resources = Resources().manage("x", manager)

    for count in (1, 2):
        async with resources:
            assert resources.get("x", list) is made[count - 1]
        with pytest.raises(ResourceError, match="resource 'x' is not set up"):
            resources.get("x")


async def test_managed_sync_context_manager():
    """A context manager that is only sync is entered and left as such."""
    events = []

    @contextmanager
    def manager() -> Iterator[int]:
        events.append("enter")
        yield 5
        events.append("exit")

    async with Resources().manage("x", manager) as resources:
        assert resources.get("x", int) == 5

    assert events == ["enter", "exit"]


async def test_managed_both_kinds_is_entered_as_async():
    """A manager with both pairs of methods is entered as async."""
    manager = Enterable()

    async with Resources().manage("x", lambda: manager):
        pass

    assert manager.entered == ["async", "async exit"]


async def test_managed_before_set_up():
    """Getting a managed entry that is not set up says so."""
    with pytest.raises(ResourceError, match="resource 'x' is not set up"):
        Resources().manage("x", Enterable).get("x")


async def coroutine_function():
    return Enterable()


@pytest.mark.parametrize(
    ("factory", "found"),
    [
        pytest.param(lambda: 3, "int", id="number"),
        pytest.param(lambda: Enterable, "type", id="class"),
        pytest.param(coroutine_function, "coroutine", id="coroutine function"),
    ],
)
async def test_managed_factory_gives_no_context_manager(factory, found):
    """A factory that gives something else fails the set-up, naming key and type; earlier entries are torn down."""
    ledger = Ledger("a")
    resources = parts(ledger).manage("x", factory)

    with pytest.raises(ResourceError, match=f"factory of 'x' must give a context manager, got a {found}"):
        await use(resources, ledger)

    ledger.check()
    assert_idle(resources)


def test_manage_without_a_callable():
    """The factory must be callable: a context manager itself is refused."""
    with pytest.raises(ConfigurationError, match="factory of 'x' must be callable, got a Enterable"):
        Resources().manage("x", Enterable())


async def test_managed_factory_uses_earlier_entries():
    """A factory finds the entries that were set up before its own."""
    resources = Resources().manage("first", Enterable)

    @asynccontextmanager
    async def second():
        yield resources.get("first", Enterable)

    async with resources.manage("second", second):
        assert resources.get("second") is resources.get("first")


async def test_managed_resource_has_one_life_cycle():
    """A managed value that is itself a Resource lives by its manager alone."""
    ledger = Ledger("a")

    @asynccontextmanager
    async def manager():
        yield Part(ledger, "a")

    async with Resources().manage("a", manager):
        pass

    assert ledger.events == []


async def test_plain_objects_are_never_entered():
    """An object that merely could be entered is left alone."""
    lock, plain = asyncio.Lock(), Enterable()

    async with Resources({"lock": lock, "plain": plain, "part": Resource()}):
        assert not lock.locked()

    assert plain.entered == []


# Set-up and tear-down


@pytest.mark.parametrize("make", [parts, managed, mixed])
async def test_order(make):
    """Set-up runs in the order of insertion, tear-down in reverse."""
    ledger = Ledger()

    await use(make(ledger), ledger)

    # RE-003
    assert str(ledger) == "+a +b +c in out -c .c -b .b -a .a"


@pytest.mark.parametrize(("failing", "events"), [("a", ""), ("b", "+a -a .a"), ("c", "+a +b -b .b -a .a")])
async def test_set_up_fails(failing, events):
    """A failing set-up tears down what was set up before it, never itself, and raises its own error with a note."""
    ledger = Ledger()
    error = OSError("no route")
    resources = parts(ledger, **{failing: {"setup_error": error}})

    # RE-004
    with pytest.raises(OSError, match="no route") as caught:
        await use(resources, ledger)

    assert caught.value is error
    assert caught.value.__notes__ == [f"while setting up resource '{failing}'"]
    assert str(ledger) == events
    assert_idle(resources)


async def test_set_up_fails_with_the_same_object_twice():
    """An exception object that fails two set-ups keeps one note."""
    ledger = Ledger("a")
    error = OSError("no route")
    resources = parts(ledger, a={"setup_error": error})

    for _ in range(2):
        with pytest.raises(OSError, match="no route"):
            await use(resources, ledger)

    assert len(error.__notes__) == 1


async def test_set_up_fails_with_an_error_that_refuses_notes():
    """An exception that takes no attributes is raised unchanged."""

    class Sealed(Exception):
        def __setattr__(self, name, value):
            raise AttributeError(name)

    error = Sealed()

    with pytest.raises(Sealed) as caught:
        await use(parts(Ledger("a"), a={"setup_error": error}), Ledger("a"))

    assert caught.value is error


@pytest.mark.parametrize("outcome", [None, OSError("from the body")], ids=["success", "failure"])
async def test_tear_down_fails(outcome, caplog):
    """A tear-down error is logged once, by key, and changes neither the sequence nor the outcome."""
    ledger = Ledger()
    resources = parts(ledger, b={"teardown_error": ValueError("stuck")})
    result = None

    try:
        async with resources:
            if outcome is not None:
                raise outcome
    except OSError as error:
        result = error

    # RE-005, RE-008
    assert result is outcome
    assert [event for event in ledger.events if event[0] == "-"] == ["-c", "-b", "-a"]
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("cano.resources", logging.ERROR)
    assert record.getMessage() == "tear-down of resource 'b' failed"
    assert "stuck" in str(record.exc_info[1])
    assert_idle(resources)


async def test_tear_down_fails_after_set_up_failed(caplog):
    """When both fail, the set-up's error is raised and the tear-down's is logged."""
    ledger = Ledger()
    resources = parts(ledger, a={"teardown_error": ValueError("stuck")}, b={"setup_error": OSError("no route")})

    # RE-004, RE-005
    with pytest.raises(OSError, match="no route"):
        await use(resources, ledger)

    assert [record.getMessage() for record in caplog.records] == ["tear-down of resource 'a' failed"]
    ledger.check()


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt(), SystemExit(3)], ids=["KeyboardInterrupt", "SystemExit"])
async def test_interrupt_in_set_up(interrupt):
    """An interrupt out of a set-up leaves after everything before it was torn down."""
    ledger = Ledger()
    resources = parts(ledger, c={"setup_error": interrupt})

    # B36
    with pytest.raises(type(interrupt)) as caught:
        await use(resources, ledger)

    assert caught.value is interrupt
    assert str(ledger) == "+a +b -b .b -a .a"
    assert_idle(resources)


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt(), SystemExit(3)], ids=["KeyboardInterrupt", "SystemExit"])
async def test_interrupt_in_tear_down(interrupt, caplog):
    """An interrupt out of a tear-down leaves after the remaining ones were torn down, and is not logged."""
    ledger = Ledger()
    resources = parts(ledger, c={"teardown_error": interrupt}, b={"teardown_error": ValueError("stuck")})

    # B36
    with pytest.raises(type(interrupt)) as caught:
        await use(resources, ledger)

    assert caught.value is interrupt
    assert [record.getMessage() for record in caplog.records] == ["tear-down of resource 'b' failed"]
    ledger.check()
    assert_idle(resources)


@pytest.mark.parametrize("order", ["ab", "ba"])
async def test_interrupt_and_cancel_in_tear_down(order):
    """Of a cancel and an interrupt in one tear-down the interrupt is raised, whichever came first."""
    ledger = Ledger("ab")
    errors = dict(zip(order, [KeyboardInterrupt(), asyncio.CancelledError()], strict=True))
    resources = parts(ledger, **{name: {"teardown_error": error} for name, error in errors.items()})

    with pytest.raises(KeyboardInterrupt):
        await use(resources, ledger)

    ledger.check()


async def test_one_object_under_two_keys():
    """An object under two keys is set up and torn down once."""
    ledger = Ledger("a")
    part = Part(ledger, "a")

    await use(Resources({"x": part, "y": part}), ledger)

    assert str(ledger) == "+a in out -a .a"


async def test_values_are_never_shown(caplog):
    """Neither errors nor log records call the repr of a value."""

    class SecretPart(Part, Secret):
        pass

    ledger = Ledger("a")
    resources = Resources({"a": SecretPart(ledger, "a", teardown_error=OSError("stuck"))})

    async with resources:
        with pytest.raises(ConfigurationError):
            resources.insert("b", Secret())
        with pytest.raises(ResourceTypeError):
            resources.get("a", int)

    assert "Secret" not in caplog.text.replace("SecretPart", "")


async def test_key_in_a_log_record_is_escaped(caplog):
    """Control characters of a key do not reach the log."""
    ledger = Ledger("a")

    await use(Resources({"a\nb": Part(ledger, "a", teardown_error=OSError())}), ledger)

    assert caplog.records[0].getMessage() == r"tear-down of resource 'a\nb' failed"


async def test_key_that_cannot_be_shown():
    """A key whose repr raises fails the set-up, and never the tear-down of the others."""
    ledger = Ledger("a")
    resources = Resources({"a": Part(ledger, "a"), Secret(): Resource()})

    with pytest.raises(AssertionError, match="a value was shown"):
        await use(resources, ledger)

    ledger.check()
    assert_idle(resources)


# Several users


async def test_two_users_at_once():
    """Two users share one set-up, and the last one to leave tears down."""
    ledger = Ledger()
    resources = parts(ledger)

    await asyncio.wait([asyncio.ensure_future(use(resources, ledger, body)) for body in (1, 9)])

    # B34, RE-011
    ledger.check()
    assert [event[0] for event in ledger.events].count("+") == 3
    assert_idle(resources)


async def test_user_leaves_before_the_one_who_waited_wakes():
    """A user who waited for the set-up counts from the start: the one who set up cannot tear down before it wakes."""
    ledger = Ledger()
    resources = parts(ledger)

    # B34
    await asyncio.wait([asyncio.ensure_future(use(resources, ledger, body=0)) for _ in range(3)])

    ledger.check()
    assert str(ledger) == "+a +b +c in out in out in out -c .c -b .b -a .a"


async def test_nested_use():
    """Resources that are in use can be entered again, also by the same task."""
    ledger = Ledger()
    resources = parts(ledger)

    async with resources:
        await use(resources, ledger)
        await use(resources, ledger)

    ledger.check()
    assert len(ledger.events) == 3 + 4 + 6


async def test_set_up_again_after_tear_down():
    """After the last user left, the next one sets up anew."""
    ledger = Ledger()
    resources = parts(ledger)

    # RE-008
    await use(resources, ledger)
    await use(resources, ledger)

    ledger.check()
    assert len(ledger.events) == 2 * 11


async def test_user_comes_during_tear_down():
    """Who comes while a tear-down is going waits for its end and sets up anew."""
    ledger = Ledger()
    resources = parts(ledger)
    first = asyncio.ensure_future(use(resources, ledger))
    while "-c" not in ledger.events:
        await ticks(1)

    await use(resources, ledger)

    ledger.check()
    assert first.done()
    assert len(ledger.events) == 2 * 11


@pytest.mark.parametrize("event", ["-c", ".c", "-b"])
async def test_user_cancelled_while_it_waits_for_a_tear_down(event):
    """A user who comes during a tear-down and is cancelled there does not disturb it."""
    ledger = Ledger()
    resources = parts(ledger)
    first = asyncio.ensure_future(use(resources, ledger))
    while event not in ledger.events:
        await ticks(1)
    second = asyncio.ensure_future(use(resources, ledger))
    await ticks(1)

    second.cancel()
    await asyncio.wait([first, second])

    # B34, B35
    assert (first.cancelled(), second.cancelled()) == (False, True)
    assert str(ledger) == "+a +b +c in out -c .c -b .b -a .a"
    assert_idle(resources)


async def test_failed_set_up_is_retried_by_the_one_who_waited():
    """A set-up error goes to the user whose set-up failed; the one who waited sets up itself."""
    ledger = Ledger()
    resources = parts(ledger, b={"setup_error": OSError("no route")})
    first = asyncio.ensure_future(use(resources, ledger))
    second = asyncio.ensure_future(use(resources, ledger))
    third = asyncio.ensure_future(use(resources, ledger))
    await ticks(1)

    await asyncio.wait([first])
    resources._entries["b"].setup_error = None
    await asyncio.wait([second, third])

    # RE-004, B34
    assert isinstance(first.exception(), OSError)
    assert (second.exception(), third.exception()) == (None, None)
    ledger.check()
    assert_idle(resources)


async def test_failed_set_up_fails_each_in_turn():
    """While the set-up keeps failing, each user gets the error of its own attempt."""
    ledger = Ledger("a")
    resources = parts(ledger, a={"setup_error": OSError("no route")})
    users = [asyncio.ensure_future(use(resources, ledger)) for _ in range(3)]

    await asyncio.wait(users)

    assert [type(user.exception()) for user in users] == [OSError] * 3
    assert_idle(resources)


async def test_cancelled_set_up_is_taken_over():
    """When the user who sets up is cancelled, what it had set up is torn down and the one who waited starts over."""
    ledger = Ledger()
    resources = parts(ledger)
    first = asyncio.ensure_future(use(resources, ledger))
    second = asyncio.ensure_future(use(resources, ledger))
    while "+b" not in ledger.events:
        await ticks(1)

    first.cancel()
    await asyncio.wait([first, second])

    # B34, B35
    assert first.cancelled()
    assert second.exception() is None
    assert str(ledger) == "+a +b -b .b -a .a +a +b +c in out -c .c -b .b -a .a"
    assert_idle(resources)


async def test_cancelled_waiter_leaves_the_others():
    """A user cancelled while it waits for a set-up takes neither the set-up nor a count with it."""
    ledger = Ledger()
    resources = parts(ledger)
    first, second, third = (asyncio.ensure_future(use(resources, ledger)) for _ in range(3))
    await ticks(2)

    second.cancel()
    await asyncio.wait([first, second, third])

    assert [user.cancelled() for user in (first, second, third)] == [False, True, False]
    ledger.check()
    assert_idle(resources)


async def test_last_waiter_cancelled_as_it_wakes_tears_down():
    """A waiter that is the last user when its cancel arrives tears down what nobody uses."""
    ledger = Ledger()
    resources = parts(ledger)
    first = asyncio.ensure_future(use(resources, ledger, body=0))
    second = asyncio.ensure_future(use(resources, ledger))
    while "out" not in ledger.events:
        await ticks(1)
        if "+c" in ledger.events:
            second.cancel()

    await asyncio.wait([first, second])

    assert (first.cancelled(), second.cancelled()) == (False, True)
    ledger.check()
    assert_idle(resources)


@pytest.mark.parametrize("step", ["setup", "teardown"])
async def test_life_cycle_that_uses_its_own_resources(step, caplog):
    """A set-up or tear-down that enters the resources it belongs to is an error instead of an endless wait."""

    class Cyclic(Resource):
        pass

    async def enter(self):
        async with resources:
            pass

    setattr(Cyclic, step, enter)
    resources = Resources({"x": Cyclic()})
    text = "a set-up or tear-down uses its own Resources"

    if step == "setup":
        with pytest.raises(ResourceError, match=text):
            await use(resources, Ledger())
    else:
        async with resources:
            pass
        assert text in caplog.text

    assert_idle(resources)


# In use


@pytest.mark.parametrize(
    "action",
    [
        pytest.param(lambda resources: resources.insert("x", 1), id="insert"),
        pytest.param(lambda resources: resources.try_insert("x", 1), id="try_insert"),
        pytest.param(lambda resources: resources.manage("x", Enterable), id="manage"),
    ],
)
async def test_addition_while_in_use(action):
    """Nothing can be added from the begin of the set-up to the end of the tear-down."""
    ledger = Ledger()
    resources = parts(ledger)
    user = asyncio.ensure_future(use(resources, ledger))
    refused = 0

    await ticks(1)
    while not user.done():
        with pytest.raises(ConfigurationError, match="resource 'x' must be added before the resources are in use"):
            action(resources)
        refused += 1
        await ticks(1)
    action(resources)

    assert refused >= 12
    assert len(resources._entries) == 4


def in_other_loop(coroutine):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, coroutine).result()


async def test_two_event_loops_at_once():
    """Resources in use belong to their event loop: another one is refused, and the first goes on."""
    ledger = Ledger()
    resources = parts(ledger)

    async with resources:
        with pytest.raises(ResourceError, match="in use on another event loop"):
            in_other_loop(use(resources, ledger))

    ledger.check()
    assert_idle(resources)


def test_two_event_loops_in_turn():
    """Resources that nobody uses can be used on another event loop, also when users had to wait."""
    ledger = Ledger()
    resources = parts(ledger)

    async def two_users():
        await asyncio.wait([asyncio.ensure_future(use(resources, ledger)) for _ in range(2)])

    asyncio.run(two_users())
    asyncio.run(two_users())

    ledger.check()
    assert_idle(resources)


# Cancellation at every step

STEPS = 18  # set-up 3 x 2, body 3, tear-down 3 x 2, and some


@pytest.mark.parametrize("make", [parts, managed])
@pytest.mark.parametrize("after", range(STEPS))
async def test_cancel_at_every_step(make, after):
    """A cancel at any step tears down exactly what is set up, is never swallowed and loses no user."""
    ledger = Ledger()
    resources = make(ledger)
    user = asyncio.ensure_future(use(resources, ledger, body=3))
    await ticks(after)

    accepted = user.cancel("mine")
    await asyncio.wait([user])

    # RE-003, RE-004, RE-008, B35
    assert user.cancelled() == accepted
    if accepted:
        with pytest.raises(asyncio.CancelledError, match="mine"):
            await user
    ledger.check()
    assert_idle(resources)


@pytest.mark.parametrize("after", range(STEPS))
@pytest.mark.parametrize("again", range(8))
async def test_cancel_twice_at_every_step(after, again):
    """A second cancel interrupts just the tear-down in progress; the remaining ones still run."""
    ledger = Ledger()
    resources = parts(ledger)
    user = asyncio.ensure_future(use(resources, ledger, body=3))

    await ticks(after)
    accepted = user.cancel()
    await ticks(again)
    accepted |= user.cancel()
    await asyncio.wait([user])

    # RE-004, B35
    assert user.cancelled() == accepted
    ledger.check()
    assert_idle(resources)


@pytest.mark.parametrize("first", range(STEPS))
@pytest.mark.parametrize("second", range(0, STEPS, 3))
async def test_cancel_two_users_at_every_step(first, second):
    """Two users cancelled at any steps leave nothing behind, and a third is served."""
    ledger = Ledger()
    resources = parts(ledger)
    users = [asyncio.ensure_future(use(resources, ledger, body=3)) for _ in range(3)]

    for step in range(2 * STEPS):
        for user, at in zip(users, (first, second), strict=False):
            if step == at:
                user.cancel()
        await ticks(1)
    await asyncio.wait(users)

    # B34, B35
    assert not users[2].cancelled()
    assert ledger.events.count("in") >= 1
    ledger.check()
    assert_idle(resources)


@pytest.mark.parametrize("replacement", [None, OSError("stuck")], ids=["dropped", "replaced"])
async def test_cancel_that_a_tear_down_swallows(replacement):
    """A cancel that a tear-down drops or turns into an error is raised all the same, after the remaining ones."""

    class Stubborn(Part):
        async def teardown(self):
            try:
                await super().teardown()
            except asyncio.CancelledError:
                if replacement is not None:
                    raise replacement from None

    ledger = Ledger()
    resources = Resources({name: Stubborn(ledger, name) for name in ledger.names})
    user = asyncio.ensure_future(use(resources, ledger))
    while "-b" not in ledger.events:
        await ticks(1)

    user.cancel()
    await asyncio.wait([user])

    # B35
    assert user.cancelled()
    ledger.check()
    assert_idle(resources)


async def test_newest_of_two_cancels_in_a_tear_down_is_raised():
    """Of two cancels in one tear-down the newest is raised, with the one before as its context."""
    ledger = Ledger()
    resources = parts(ledger)
    user = asyncio.ensure_future(use(resources, ledger))

    for name in "cb":
        while f"-{name}" not in ledger.events:
            await ticks(1)
        user.cancel(name)
    await asyncio.wait([user])

    with pytest.raises(asyncio.CancelledError, match="b") as raised:
        await user
    assert isinstance(raised.value.__context__, asyncio.CancelledError)
    assert raised.value.__context__.args == ("c",)
    ledger.check()


async def test_cancelled_tear_down_leaves_no_garbage():
    """What a cancelled tear-down raised holds nothing alive once it is gone, without the garbage collector's help."""
    ledger = Ledger()
    user = asyncio.ensure_future(use(parts(ledger), ledger))
    alive = weakref.ref(ledger)
    while "-c" not in ledger.events:
        await ticks(1)
    gc.collect()
    gc.disable()

    try:
        user.cancel()
        await asyncio.wait([user])
        del user, ledger

        assert alive() is None
    finally:
        gc.enable()


async def test_timeout_inside_a_tear_down(caplog):
    """A tear-down may cancel itself through a timeout of its own: that is its error, not a cancel of the run."""

    class Slow(Part):
        async def teardown(self):
            async with asyncio.timeout(0):
                await super().teardown()

    ledger = Ledger("a")

    await use(Resources({"a": Slow(ledger, "a")}), ledger)

    assert "TimeoutError" in caplog.text
    ledger.check()


async def test_timeout_around_a_tear_down():
    """A timeout around the block that interrupts its tear-down ends as a TimeoutError, with everything torn down."""
    ledger = Ledger()
    resources = parts(ledger)
    started = asyncio.get_running_loop().time

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(None) as budget, resources:
            budget.reschedule(started())

    ledger.check()
    assert asyncio.current_task().cancelling() == 0


async def test_error_of_the_body_and_cancel_of_the_tear_down():
    """A cancel during the tear-down after a failure is raised with the failure as its context."""
    ledger = Ledger()
    error = OSError("from the body")

    async def failing():
        async with parts(ledger):
            raise error

    user = asyncio.ensure_future(failing())
    while "-c" not in ledger.events:
        await ticks(1)
    user.cancel()

    with pytest.raises(asyncio.CancelledError) as caught:
        await user

    context = caught.value
    while context.__context__ is not None:
        context = context.__context__
    assert context is error
    ledger.check()


async def test_coroutine_closed_during_tear_down(caplog):
    """A coroutine that is closed, not cancelled, cannot wait: what it leaves standing is logged and forgotten."""
    ledger = Ledger()
    resources = parts(ledger)
    await resources._acquire()
    releasing = resources._release()
    releasing.send(None)

    releasing.close()

    assert [record.getMessage() for record in caplog.records] == [
        "resource 'b' was not torn down: the coroutine using it was closed",
        "resource 'a' was not torn down: the coroutine using it was closed",
    ]
    assert_idle(resources)


@given(
    st.lists(
        st.tuples(
            st.integers(0, 12),  # the step at which the user comes
            st.integers(0, 4),  # how long it stays
            st.one_of(st.none(), st.integers(0, 30)),  # the step at which it is cancelled
        ),
        min_size=1,
        max_size=6,
    ),
    st.dictionaries(st.integers(0, 5), st.sampled_from("ab"), max_size=3),  # which set-ups fail, and where
)
def test_any_users_any_cancels(users, failures):
    """Whoever comes, goes, is cancelled or fails: users see everything set up, and nothing stays behind."""
    ledger = Ledger("ab")
    set_ups = iter(range(1000))

    class Flaky(Part):
        async def setup(self):
            if self.name == "a":
                self.ledger.attempt = next(set_ups)
            await ticks(1)
            if failures.get(self.ledger.attempt) == self.name:
                raise OSError("no route")
            self.ledger.events.append(f"+{self.name}")

    resources = Resources({name: Flaky(ledger, name) for name in ledger.names})

    async def user(at, stay):
        await ticks(at)
        await use(resources, ledger, stay)

    async def story():
        tasks = [asyncio.ensure_future(user(at, stay)) for at, stay, _ in users]
        for step in range(31):
            for task, (_, _, cancel_at) in zip(tasks, users, strict=True):
                if step == cancel_at:
                    task.cancel()
            await ticks(1)
        await asyncio.wait(tasks)
        return tasks

    tasks = asyncio.run(story())

    # B34, B35
    ledger.check()
    assert_idle(resources)
    errors = [task.exception() for task in tasks if not task.cancelled()]
    assert all(error is None or isinstance(error, OSError) for error in errors)
    assert not any(task.cancelled() for task, (_, _, at) in zip(tasks, users, strict=True) if at is None)


# Health


class Patient(Resource):
    def __init__(self, answer):
        self.answer = answer

    async def health(self):
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer


DEGRADED = HealthStatus.Degraded("slow")
UNHEALTHY = HealthStatus.Unhealthy("down")


async def test_health_of_every_key():
    """Every key has a status, in order; a plain object and a Resource that does not say are healthy."""
    resources = Resources({"plain": 1, "default": Resource(), Key.CACHE: Patient(DEGRADED), "bad": Patient(UNHEALTHY)})

    # RE-006
    assert list((await resources.check_all_health()).items()) == [
        ("plain", HealthStatus.Healthy),
        ("default", HealthStatus.Healthy),
        (Key.CACHE, DEGRADED),
        ("bad", UNHEALTHY),
    ]


@pytest.mark.parametrize(
    ("answers", "worst"),
    [
        pytest.param([], HealthStatus.Healthy, id="empty"),
        pytest.param([HealthStatus.Healthy], HealthStatus.Healthy, id="healthy"),
        pytest.param([HealthStatus.Healthy, DEGRADED], DEGRADED, id="degraded"),
        pytest.param([UNHEALTHY, DEGRADED, HealthStatus.Healthy], UNHEALTHY, id="unhealthy"),
        pytest.param([DEGRADED, HealthStatus.Degraded("later")], DEGRADED, id="first of equals"),
    ],
)
async def test_aggregate_health_is_the_worst(answers, worst):
    """The aggregate is the worst status, the first of equals, and healthy when there is none."""
    resources = Resources({number: Patient(answer) for number, answer in enumerate(answers)})

    # RE-006
    assert await resources.aggregate_health() == worst


async def test_health_that_raises():
    """A health check that raises counts as unhealthy, with the error as the reason."""
    resources = Resources({"x": Patient(OSError("no route"))})

    assert await resources.check_all_health() == {"x": HealthStatus.Unhealthy("OSError: no route")}


async def test_health_that_gives_something_else():
    """A health check that gives no HealthStatus counts as unhealthy."""
    status = (await Resources({"x": Patient("fine")}).check_all_health())["x"]

    assert status == HealthStatus.Unhealthy("health() must return a HealthStatus, got a str")


async def test_health_of_managed_entries():
    """A managed entry is as healthy as its value, and unhealthy while it is not set up."""

    @asynccontextmanager
    async def patient():
        yield Patient(DEGRADED)

    resources = Resources().manage("plain", Enterable).manage("patient", patient)
    before = await resources.check_all_health()
    async with resources:
        during = await resources.check_all_health()

    assert before == {"plain": HealthStatus.Unhealthy("not set up"), "patient": HealthStatus.Unhealthy("not set up")}
    assert during == {"plain": HealthStatus.Healthy, "patient": DEGRADED}


async def test_health_checks_run_one_after_another():
    """One health check ends before the next begins, and a cancel passes through."""
    events = []

    class Slow(Resource):
        async def health(self):
            events.append("begin")
            await ticks(2)
            events.append("end")
            return HealthStatus.Healthy

    resources = Resources({1: Slow(), 2: Slow()})

    # RE-007
    await resources.check_all_health()
    check = asyncio.ensure_future(resources.aggregate_health())
    await ticks(1)
    check.cancel()
    await asyncio.wait([check])

    assert events[:4] == ["begin", "end", "begin", "end"]
    assert check.cancelled()


def test_health_status_is_a_value():
    """Statuses compare by value, cannot be changed, and know only three levels."""
    assert HealthStatus.Degraded("slow") == DEGRADED != HealthStatus.Degraded("other")
    assert (DEGRADED.level, DEGRADED.reason, HealthStatus.Healthy.reason) == ("degraded", "slow", None)
    with pytest.raises(AttributeError):
        DEGRADED.reason = "other"
    with pytest.raises(ConfigurationError, match="level must be 'healthy', 'degraded' or 'unhealthy', got 'bad'"):
        HealthStatus("bad")


# Bundles


class Deps(FromResources):
    registry: ClassVar[list[str]] = []
    store: Annotated[dict[str, int], Res("store")]
    cache: Annotated[list[int] | None, "a note", Res(Key.CACHE)]
    limit: int = 10
    seen: list[int] = field(default_factory=list)


def test_from_resources():
    """A bundle has its attributes looked up by string and enum keys, and defaults for the others."""
    store, cache = {}, []
    resources = Resources({"store": store, Key.CACHE: cache})

    # RE-010
    deps = Deps.from_resources(resources)

    assert deps.store is store
    assert deps.cache is cache
    assert (deps.limit, deps.seen) == (10, [])


def test_from_resources_type_statement():
    """A marked annotation may have a name of its own, by assignment or by a type statement."""
    plain = Annotated[int, Res("x")]

    class Aliased(FromResources):
        one: plain
        two: TypeAliasType("Alias", plain)

    deps = Aliased.from_resources(Resources({"x": 5}))

    assert (deps.one, deps.two) == (5, 5)


def test_from_resources_missing_key():
    """A key that is missing is an error, also where the attribute has a default."""

    class Optimist(FromResources):
        store: Annotated[int | None, Res("store")] = None

    # RE-010
    with pytest.raises(ResourceNotFoundError, match="'store'"):
        Optimist.from_resources(Resources())


def test_from_resources_other_type():
    """A value that is not of the annotated type is an error."""
    with pytest.raises(ResourceTypeError, match="resource 'store' is of type int, wanted dict"):
        Deps.from_resources(Resources({"store": 1, Key.CACHE: None}))


def test_from_resources_attribute_without_marker():
    """Attributes with neither marker nor default are refused at first use, all at once, by class and name."""

    class Broken(FromResources):
        store: dict
        fine: Annotated[int, Res("fine")]
        other: Annotated[int, "no marker"]

    with pytest.raises(ConfigurationError) as caught:
        Broken.from_resources(Resources())

    assert "Broken has 2 problems" in str(caught.value)
    assert [problem.split()[1] for problem in caught.value.problems] == ["store", "other"]


def test_from_resources_unreadable_annotation():
    """An annotation that names nothing is refused at first use, by class and name."""

    class Broken(FromResources):
        store: "Annotated[Nowhere, Res('store')]"  # noqa: F821 - the point

    with pytest.raises(ConfigurationError, match=r"the annotations of .*Broken cannot be read: name 'Nowhere'"):
        Broken.from_resources(Resources())


def test_from_resources_inherits():
    """A bundle has the attributes of its bases; each class reads its own annotations."""

    class More(Deps):
        extra: Annotated[int, Res("extra")]

    resources = Resources({"store": {}, Key.CACHE: None, "extra": 5})

    assert Deps.from_resources(resources).limit == 10
    assert More.from_resources(resources).extra == 5
    assert repr(More.from_resources(resources)).endswith("More(store, cache, limit, seen, extra)")


def test_from_resources_reads_annotations_once(monkeypatch):
    """Annotations are read at the first use of a class and never again."""

    class Once(FromResources):
        store: Annotated[int, Res("store")]

    calls = []
    original = _resources.get_type_hints
    monkeypatch.setattr(_resources, "get_type_hints", lambda *args, **kw: calls.append(args) or original(*args, **kw))

    for _ in range(3):
        Once.from_resources(Resources({"store": 1}))

    assert calls == [(Once,)]


def test_bundle_made_by_hand():
    """A bundle can be made without resources, by keyword only, and its repr shows names alone."""
    deps = Deps(store=Secret(), cache=Secret(), limit=3)

    assert deps.limit == 3
    assert repr(deps) == "Deps(store, cache, limit, seen)"
    with pytest.raises(TypeError):
        Deps({}, None)
    with pytest.raises(TypeError, match="cache"):
        Deps(store={})


def test_res_is_a_value():
    """Two markers with the same key are equal and hash alike."""
    assert Res("a") == Res("a") != Res("b")
    assert len({Res("a"), Res("a")}) == 1
    with pytest.raises(AttributeError):
        Res("a").key = "b"
