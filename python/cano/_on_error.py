"""Errors that lead to a state: what `on_error` may say, and the parameter that takes the error."""

import types
from collections.abc import Hashable, Mapping
from typing import Annotated, Any, TypeAlias, TypeVar, Union, get_args, get_origin

from ._errors import ConfigurationError, label, show

S = TypeVar("S", bound=Hashable)
E = TypeVar("E", bound=Exception)

OnError: TypeAlias = Mapping[type[Exception] | tuple[type[Exception], ...], S]
"""Which state follows which error."""

Keys: TypeAlias = tuple[tuple[type[Exception], S], ...]
"""The same with one class to a key."""


class _Marker:
    """Tells `Caught` from other annotations."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "Caught"


Caught: TypeAlias = Annotated[E, _Marker()]
"""The error that led into the task's state by ``on_error``, for a parameter: ``error: Caught[CardDeclined]``.

``Caught[CardDeclined | Expired]`` takes any of several classes, ``Caught[CardDeclined] | None`` is None where the state is
entered in another way. To a type checker it is the class itself.
"""


def keys_of(state: Hashable, on_error: OnError[S]) -> Keys[S]:
    """The classes of `on_error` one by one, each with its state.

    Raises:
        ConfigurationError: It is no mapping, empty, or a key is something else than a subclass of Exception or a tuple of
            them, or names a class again.
    """
    what = f"on_error of state {label(state)}"
    if not isinstance(on_error, Mapping):
        raise ConfigurationError(f"{what} must be a mapping from exception classes to states, got {show(on_error)}")
    keys: dict[type[Exception], S] = {}
    for given, target in on_error.items():
        classes = given if isinstance(given, tuple) else (given,)
        if not classes or not all(_is_error_class(one) for one in classes):
            raise ConfigurationError(
                f"a key in {what} must be a subclass of Exception or a tuple of them, got {show(given)}"
            )
        for one in classes:
            if one in keys:
                raise ConfigurationError(f"{what} must name each class once, got {one.__qualname__} twice")
            keys[one] = target
    if not keys:
        raise ConfigurationError(f"{what} must have a key, got {show(on_error)}; None leaves every error as it is")
    return tuple(keys.items())


def caught_by(annotation: Any) -> tuple[str, tuple[type[Exception], ...], None] | None:
    """The source of an argument for ``Caught[E]`` or ``Caught[E] | None``; None for any other annotation."""
    if classes := _classes(annotation):
        return ("caught", classes, None)
    if get_origin(annotation) in (Union, types.UnionType):
        others = [one for one in get_args(annotation) if one is not types.NoneType]
        if len(others) == 1 and (classes := _classes(others[0])):
            return ("caught or none", classes, None)
    return None


def _classes(annotation: Any) -> tuple[type[Exception], ...]:
    """The classes in ``Caught[...]``; none for any other annotation."""
    annotation = getattr(annotation, "__value__", annotation)  # a type statement
    if not any(isinstance(extra, _Marker) for extra in getattr(annotation, "__metadata__", ())):
        return ()
    asked = annotation.__origin__
    parts = get_args(asked) if get_origin(asked) in (Union, types.UnionType) else (asked,)
    classes = tuple(get_origin(one) or one for one in parts)
    if not all(_is_error_class(one) for one in classes):
        raise ConfigurationError(
            f"Caught must be given subclasses of Exception, as in Caught[ValueError] or Caught[KeyError | OSError], "
            f"got {show(str(asked))}"
        )
    return classes


def _is_error_class(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, Exception)
