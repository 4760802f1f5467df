"""The methods of a processing model, and how their arguments come to them.

Each method asks for its own arguments by annotation. The plan of the one task that the model becomes asks for all of them,
one method after the other; when an attempt begins, the driver fills them in and the model deals them out again.
"""

from __future__ import annotations

import asyncio
import inspect
import types
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from . import _core
from ._errors import ConfigurationError, InvalidTransitionError
from ._tasks import Form, Reading, innermost, read, run_data

OWN = "own"
"""The kind of a source that the model itself fills in."""

# Remembered per function, by the method's name and the class of run data, without keeping the function alive.
_readings: WeakKeyDictionary[Callable[..., Any], dict[tuple[str, object], Reading]] = WeakKeyDictionary()


class Method(NamedTuple):
    """A method of a processing model, and how it wants to be called."""

    call: Callable[..., Any]
    reading: Reading

    @classmethod
    def of(cls, task: Any, task_name: str, name: str, form: Form) -> Method:
        """The task's method of this name, its signature read."""
        call = getattr(task, name)
        if not (isinstance(call, types.MethodType) and isinstance(call.__func__, types.FunctionType)):
            return cls(call, _read(call, f"{task_name}.{name}", form))
        known = _readings.setdefault(call.__func__, {})
        key = (name, run_data.get())
        if key not in known:
            known[key] = _read(call, f"{task_name}.{name}", form)
        return cls(call, known[key])

    def bind(self, filled: Iterator[Any], own: object = None) -> Callable[..., Any]:
        """The method with its share of what the driver filled in, to be called with what it is given."""
        call, names = self.call, self.reading.keywords or ()
        values = [own if kind == OWN else next(filled) for kind, _, _ in self.reading.sources]
        if not values:
            return call
        first = len(values) - len(names)
        named = dict(zip(names, values[first:], strict=True))
        return lambda *given: call(*given, *values[:first], **named)


def _read(call: Callable[..., Any], name: str, form: Form) -> Reading:
    inner = innermost(call)
    iterates = inspect.isgeneratorfunction(inner) and not form.iterates
    if iterates or (inspect.isasyncgenfunction(inner) and not form.yields):
        raise ConfigurationError(f"task {name} is a generator function; it returns its result once")
    return read(call, name, form)


def plan_of(
    methods: tuple[Method, ...], leading: tuple[Method, ...], *, leads_with: tuple[str, ...] = ()
) -> _core.Plan:
    """The plan of a model's one task.

    `leading` are the methods that tell the next state, `leads_with` the kinds of source that the model's loop asks for.
    """
    sources = [(kind, None, None) for kind in leads_with]
    sources += [source for method in methods for source in method.reading.sources if source[0] != OWN]
    parts = [method.reading.declared for method in leading]
    declared = None if None in parts else tuple(state for part in parts for state in part or ())
    return _core.Plan(sources, None, declared, True)  # noqa: FBT003 - a native function takes no names


async def outcome(result: Any) -> Any:
    """What a method returned, async or plain."""
    return await result if isinstance(result, Awaitable) else result


def not_one_of(name: str, returned: object, wanted: str) -> InvalidTransitionError:
    """The error of a method that returned something else than its model knows."""
    return InvalidTransitionError(f"{name} returned a value of type {type(returned).__qualname__}; it returns {wanted}")


def requests(task: asyncio.Task[Any] | None) -> int:
    """How many cancels of a task have reached its code.

    What a method raises after one more has is not the method's own failure: it must not be got over.
    """
    return 0 if task is None else task.cancelling() - getattr(task, "_must_cancel", False)
