"""What tasks share: `Resources` holds it by key, and sets it up and tears it down around the runs that use it.

The life cycle is a count and two facts. ``_users`` counts everybody who wants the resources: runs, ``async with``
blocks and those who wait to become one. ``_ready`` says that all is set up. ``_change`` is an event while somebody sets
up or tears down. Who wants the resources while nothing is ready or changing sets them up; who leaves last tears them
down. Both happen in that user's task, so a cancel of it lands in the step in progress.

Invariants: the count changes outside every await, so no cancel loses a user; ``_live`` is exactly what is set up,
oldest first, and empty when nothing is ready or changing; waiters are all woken and look again, so none loses its turn.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Callable, Hashable, Mapping
from contextlib import AbstractAsyncContextManager, AbstractContextManager, suppress
from dataclasses import MISSING, Field, dataclass, fields
from types import UnionType
from typing import (
    Any,
    ClassVar,
    Final,
    Literal,
    Self,
    TypeVar,
    Union,
    cast,
    dataclass_transform,
    get_args,
    get_origin,
    get_type_hints,
    overload,
)

from ._errors import (
    ConfigurationError,
    DuplicateResourceError,
    ResourceError,
    ResourceNotFoundError,
    ResourceTypeError,
    show,
)

_T = TypeVar("_T")
_log = logging.getLogger("cano.resources")
_KEYS_SHOWN = 10
_LEVELS = ("healthy", "degraded", "unhealthy")
_UNSET: Final = object()


@dataclass(frozen=True, slots=True)
class HealthStatus:
    """How a resource is: `HealthStatus.Healthy`, `HealthStatus.Degraded` or `HealthStatus.Unhealthy`.

    Attributes:
        level: "healthy", "degraded" (works, with limits) or "unhealthy" (does not work).
        reason: Why it is not healthy; None when it is.
    """

    level: Literal["healthy", "degraded", "unhealthy"]
    reason: str | None = None

    Healthy: ClassVar[HealthStatus]

    def __post_init__(self) -> None:
        if self.level not in _LEVELS:
            raise ConfigurationError(f"level must be 'healthy', 'degraded' or 'unhealthy', got {show(self.level)}")

    @staticmethod
    def Degraded(reason: str) -> HealthStatus:
        """It works, with limits."""
        return HealthStatus("degraded", reason)

    @staticmethod
    def Unhealthy(reason: str) -> HealthStatus:
        """It does not work."""
        return HealthStatus("unhealthy", reason)


HealthStatus.Healthy = HealthStatus("healthy")


class Resource:
    """Optional base of a resource with a life cycle; override what it needs.

    ``setup`` runs in the task of the first run that uses the resource, ``teardown`` in that of the last.
    """

    __slots__ = ()

    async def setup(self) -> None:
        """Make it ready. When this raises or is cancelled, ``teardown`` is not called: clean up here."""

    async def teardown(self) -> None:
        """Undo ``setup``. An error is logged and changes nothing else."""

    async def health(self) -> HealthStatus:
        """Say how it is; healthy by default."""
        return HealthStatus.Healthy


@dataclass(frozen=True, slots=True)
class Res:
    """Names the resource that an annotation stands for: ``store: Annotated[MemoryStore, Res("store")]``.

    Attributes:
        key: The key in `Resources`; any hashable value.
    """

    key: Hashable

    def __post_init__(self) -> None:
        _check_key(self.key)


class Resources:
    """What tasks share, by key; set up once while anybody uses it.

    An entry that is a `Resource` or is managed has a life cycle. These are set up in the order in which they were added
    when the first run (or ``async with``) starts to use them, and torn down in reverse when the last one leaves: after
    success, failure and cancellation. A set-up that fails or is cancelled tears down what was set up before it, then
    raises; whoever waited for it tries again. Any other object is only held, and never entered as a context manager.

    Several workflows may share one `Resources`. An object under two keys is set up once; one in two `Resources` is set
    up by both, so keep it in one. While in use they take no new entry and belong to one event loop.

    Args:
        mapping: The first entries, in order; None for none.

    Raises:
        ConfigurationError: ``mapping`` is no mapping.
    """

    __slots__ = ("_change", "_changer", "_entries", "_lifecycle", "_live", "_loop", "_ready", "_users")

    def __init__(self, mapping: Mapping[Any, object] | None = None) -> None:
        self._entries: dict[Hashable, object] = {}
        self._lifecycle = False  # a run skips _acquire and _release; it asks once, as entries may be added meanwhile
        self._users = 0
        self._ready = False
        self._live: list[tuple[str, Resource]] = []
        self._change: asyncio.Event | None = None
        self._changer: asyncio.Task[Any] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        if mapping is not None and not isinstance(mapping, Mapping):
            raise ConfigurationError(f"resources must be a mapping of key to value, got a {_name(type(mapping))}")
        for key, value in (mapping or {}).items():
            self.insert(key, value)

    @classmethod
    def empty(cls) -> Self:
        """Resources without an entry."""
        return cls()

    def __repr__(self) -> str:
        return f"<{type(self).__qualname__} {self._known()}>"

    def insert(self, key: Hashable, value: object) -> Self:
        """Add an entry: any object, also None, under any hashable key.

        Raises:
            DuplicateResourceError: The key already has an entry.
            ConfigurationError: The key is not hashable, or the resources are in use.
        """
        if not self._add(key, value):
            raise DuplicateResourceError(f"resource {show(key)} exists already; try_insert would keep the first")
        return self

    def try_insert(self, key: Hashable, value: object) -> Self:
        """Add an entry as `insert` does, unless the key already has one, which then stays as it is."""
        self._add(key, value)
        return self

    def manage(
        self, key: Hashable, factory: Callable[[], AbstractAsyncContextManager[Any] | AbstractContextManager[Any]]
    ) -> Self:
        """Add an entry whose value is what a context manager gives when entered, at set-up; it is left at tear-down.

        ``factory`` is called at each set-up, which raises `ResourceError` when it gives no context manager. One that is
        both async and sync is entered as async. It is left without an exception, whatever the runs did, and perhaps in
        another task: one that must stay in its task (an anyio task group) belongs around ``async with resources``.

        Raises:
            DuplicateResourceError: The key already has an entry.
            ConfigurationError: The key is not hashable, ``factory`` is not callable, or the resources are in use.
        """
        if not callable(factory):
            raise ConfigurationError(f"factory of {show(key)} must be callable, got a {_name(type(factory))}")
        return self.insert(key, _Managed(key, factory))

    @overload
    def get(self, key: Hashable, type_: type[_T]) -> _T: ...

    @overload
    def get(self, key: Hashable, type_: object = None) -> Any: ...

    def get(self, key: Hashable, type_: object = None) -> Any:
        """Return the value of an entry; the same object each time.

        Args:
            key: The key given to `insert` or `manage`.
            type_: What the value must be an instance of; None for anything. Of ``list[int]`` only ``list`` is checked.

        Raises:
            ResourceNotFoundError: No entry has this key.
            ResourceTypeError: The value is no instance of ``type_``.
            ResourceError: The entry is managed and not set up.
            ConfigurationError: The key is not hashable, or ``isinstance`` cannot check ``type_``.
        """
        try:
            value = self._entries[key]
        except (KeyError, TypeError):
            _check_key(key)
            raise ResourceNotFoundError(f"no resource {show(key)}; {self._known()}") from None
        if type(value) is _Managed:
            value = value.value
            if value is _UNSET:
                raise ResourceError(f"resource {show(key)} is not set up; it is while a run or async with uses it")
        if type_ is not None and not is_a(value, type_):
            raise ResourceTypeError(f"resource {show(key)} is of type {_name(type(value))}, wanted {_name(type_)}")
        return value

    async def check_all_health(self) -> dict[Hashable, HealthStatus]:
        """Ask every resource how it is, one after another, without a time limit; call it while they are in use.

        An entry that is no `Resource` is healthy; a managed one that is not set up is unhealthy; a ``health()`` that
        raises counts as unhealthy, the error being the reason.

        Returns:
            One status per key, in the order in which the entries were added.
        """
        return {key: await _health_of(entry) for key, entry in list(self._entries.items())}

    async def aggregate_health(self) -> HealthStatus:
        """Return the worst status (healthy < degraded < unhealthy), the first of equals; healthy when there is none."""
        statuses = await self.check_all_health()
        return max(statuses.values(), key=lambda status: _LEVELS.index(status.level), default=HealthStatus.Healthy)

    async def __aenter__(self) -> Self:
        await self._acquire()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._release()

    async def _acquire(self, scope: asyncio.Timeout | None = None) -> None:
        """Become a user: return when all is set up. When it raises, the caller is no user.

        ``scope`` bounds the set-up; it is lifted before a tear-down.
        """
        loop = asyncio.get_running_loop()
        if self._in_use and self._loop is not loop:
            raise ResourceError("the resources are in use on another event loop; give each loop its own Resources")
        if self._change is not None and self._changer is asyncio.current_task():
            raise ResourceError("a set-up or tear-down uses its own Resources: it would wait for itself")
        self._loop = loop
        self._users += 1
        try:
            while not self._ready:
                if self._change is None:
                    await self._set_up(scope)
                else:
                    await self._change.wait()
        except BaseException:
            _lift(scope)
            await self._release()
            raise

    async def _release(self) -> None:
        """Stop being a user; the last one tears down. Raises only a cancel or an interrupt of this task."""
        self._users -= 1
        if self._users == 0 and self._ready:
            self._ready = False
            change = self._begin()
            try:
                await self._tear_down()
            finally:
                self._end(change)

    async def _set_up(self, scope: asyncio.Timeout | None) -> None:
        change = self._begin()
        try:
            for key, entry in self._entries.items():
                if isinstance(entry, Resource) and all(entry is not live for _, live in self._live):
                    name = show(key)  # here, where a key that cannot be shown does no harm
                    try:
                        await entry.setup()
                    except Exception as error:
                        _note(error, f"while setting up resource {name}")
                        raise
                    self._live.append((name, entry))
            self._ready = True
        except BaseException:
            _lift(scope)
            await self._tear_down()
            raise
        finally:
            self._end(change)

    async def _tear_down(self) -> None:
        """Tear down all that is live, newest first; only then raise what cancelled or interrupted it."""
        requests = _cancel_requests()
        interrupt: BaseException | None = None
        while self._live:
            name, entry = self._live.pop()
            try:
                await entry.teardown()
            except GeneratorExit:  # the coroutine is being closed: nothing can be awaited any more
                for lost, _ in reversed(self._live):
                    _log.error("resource %s was not torn down: the coroutine using it was closed", lost)
                self._live.clear()
                raise
            except Exception:  # noqa: BLE001 - logged
                _log.exception("tear-down of resource %s failed", name)
            except BaseException as error:  # noqa: BLE001 - raised below
                # The newest cancel leaves, with the one before as its context; no cancel replaces another interrupt.
                if interrupt is None or isinstance(interrupt, asyncio.CancelledError):
                    error.__context__, interrupt = interrupt, error
                elif not isinstance(error, asyncio.CancelledError):
                    interrupt = error
        if interrupt is None and _cancel_requests() > requests:  # a tear-down kept our cancel to itself
            interrupt = asyncio.CancelledError()
        if interrupt is not None:
            try:
                raise interrupt
            finally:
                del interrupt  # else its traceback and this frame hold each other

    def _begin(self) -> asyncio.Event:
        self._changer = asyncio.current_task()
        self._change = asyncio.Event()
        return self._change

    def _end(self, change: asyncio.Event) -> None:
        self._change = self._changer = None
        change.set()

    @property
    def _in_use(self) -> bool:
        return self._users > 0 or self._change is not None

    def _add(self, key: Hashable, value: object) -> bool:
        """Add an entry unless the key has one; False if so."""
        _check_key(key)
        if self._in_use:
            raise ConfigurationError(f"resource {show(key)} must be added before the resources are in use")
        if key in self._entries:
            return False
        self._entries[key] = value
        self._lifecycle = self._lifecycle or isinstance(value, Resource)
        return True

    def _known(self) -> str:
        keys = list(self._entries)
        more = len(keys) - _KEYS_SHOWN
        shown = ", ".join(map(show, keys[:_KEYS_SHOWN])) or "none"
        return f"known keys: {shown}" + (f" and {more} more" if more > 0 else "")


@dataclass_transform(kw_only_default=True, eq_default=False)
class FromResources:
    """Base of a bundle of resources, looked up and type-checked in one go.

    ::

        class Deps(FromResources):
            store: Annotated[MemoryStore, Res("store")]
            limit: int = 10

    ``Deps.from_resources(resources)`` makes one. A subclass is a dataclass with keyword-only arguments, so a test can
    make one by hand; its repr shows no values.
    """

    # No annotations here: they would be read with those of a subclass.
    _fields = cast(tuple[Field[Any], ...], ())
    _wanted = cast(tuple[tuple[str, object, Hashable], ...] | None, None)

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls._fields = fields(dataclass(kw_only=True, repr=False, eq=False)(cls))  # type: ignore[arg-type]
        cls._wanted = None

    @classmethod
    def from_resources(cls, resources: Resources) -> Self:
        """Make one: attributes with a `Res` are looked up, the others keep their defaults.

        Raises:
            ConfigurationError: The annotations cannot be read, or an attribute has neither a `Res` nor a default.
            ResourceNotFoundError: A key has no entry, even where the attribute has a default.
            ResourceTypeError: A value is not of the annotated type.
        """
        if not isinstance(resources, Resources):
            raise ConfigurationError(f"resources must be Resources, got {show(resources)}")
        if cls._wanted is None:
            cls._wanted = cls._read_annotations()
        return cls(**{name: resources.get(key, type_) for name, type_, key in cls._wanted})

    @classmethod
    def _read_annotations(cls) -> tuple[tuple[str, object, Hashable], ...]:
        try:
            hints = get_type_hints(cls, include_extras=True)
        except Exception as error:
            raise ConfigurationError(f"the annotations of {_name(cls)} cannot be read: {error}") from error
        wanted: list[tuple[str, object, Hashable]] = []
        problems: list[str] = []
        for field in cls._fields:
            marked = resource_of(hints[field.name])
            if marked is not None:
                wanted.append((field.name, *marked))
            elif field.default is MISSING and field.default_factory is MISSING:
                problems.append(f"attribute {field.name} must be Annotated[..., Res(key)] or have a default")
        if problems:
            raise ConfigurationError.of(_name(cls), problems)
        return tuple(wanted)

    def __repr__(self) -> str:
        return f"{type(self).__qualname__}({', '.join(field.name for field in self._fields)})"


def resource_of(hint: Any) -> tuple[object, Hashable] | None:
    """Return the type and the key of ``Annotated[T, Res(key)]``; None for any other annotation."""
    hint = getattr(hint, "__value__", hint)  # a type statement
    marker = next((extra for extra in getattr(hint, "__metadata__", ()) if isinstance(extra, Res)), None)
    return None if marker is None else (hint.__origin__, marker.key)


class _Managed(Resource):
    """An entry of `Resources.manage`."""

    __slots__ = ("_factory", "_key", "_manager", "value")

    def __init__(self, key: Hashable, factory: Callable[[], object]) -> None:
        self._key = key
        self._factory = factory
        self._manager: AbstractAsyncContextManager[Any] | AbstractContextManager[Any] | None = None
        self.value: object = _UNSET

    async def setup(self) -> None:
        manager = self._factory()
        if isinstance(manager, AbstractAsyncContextManager):
            self.value = await manager.__aenter__()
        elif isinstance(manager, AbstractContextManager):
            self.value = manager.__enter__()
        else:
            if inspect.iscoroutine(manager):
                manager.close()
            found = _name(type(manager))
            raise ResourceError(f"factory of {show(self._key)} must give a context manager, got a {found}")
        self._manager = manager

    async def teardown(self) -> None:
        manager, self._manager, self.value = self._manager, None, _UNSET
        if isinstance(manager, AbstractAsyncContextManager):
            await manager.__aexit__(None, None, None)
        elif manager is not None:
            manager.__exit__(None, None, None)

    async def health(self) -> HealthStatus:
        return HealthStatus.Unhealthy("not set up") if self.value is _UNSET else await _health_of(self.value)


async def _health_of(entry: object) -> HealthStatus:
    if not isinstance(entry, Resource):
        return HealthStatus.Healthy
    try:
        status: Any = await entry.health()
    except Exception as error:  # noqa: BLE001 - the error is the status
        return HealthStatus.Unhealthy(f"{type(error).__name__}: {error}")
    if isinstance(status, HealthStatus):
        return status
    return HealthStatus.Unhealthy(f"health() must return a HealthStatus, got a {_name(type(status))}")


def _check_key(key: object) -> None:
    try:
        hash(key)
    except TypeError:
        raise ConfigurationError(f"a resource key must be hashable, got a {_name(type(key))}") from None


def is_a(value: object, type_: Any) -> bool:
    try:
        return isinstance(value, type_)
    except TypeError:
        with suppress(TypeError):
            return isinstance(value, _checkable(type_))
    raise ConfigurationError(f"isinstance cannot check {_name(type_)}; use a class or a runtime_checkable Protocol")


def _checkable(hint: Any) -> Any:
    """Return the part of an annotation that ``isinstance`` accepts."""
    hint = getattr(hint, "__supertype__", getattr(hint, "__value__", hint))  # a NewType, a type statement
    if get_origin(hint) in (Union, UnionType):
        return tuple(map(_checkable, get_args(hint)))
    return object if hint is Any else get_origin(hint) or hint


def _name(type_: object) -> str:
    return type_.__qualname__ if isinstance(type_, type) else show(type_)


def _note(error: Exception, note: str) -> None:
    with suppress(Exception):  # a class that refuses attributes keeps its exception unchanged
        if note not in getattr(error, "__notes__", ()):
            error.add_note(note)


def _lift(scope: asyncio.Timeout | None) -> None:
    if scope is not None and not scope.expired():
        scope.reschedule(None)


def _cancel_requests() -> int:
    task = asyncio.current_task()
    return 0 if task is None else task.cancelling()
