"""Values as bytes, for what is to outlive the process: outputs, cursors, run data.

Bytes are plain data. Which type they become is said by the annotation in the code that reads them, never by the bytes, so
they cannot name a class or a function; what cannot be written this way is refused, there is no second way.
"""

from __future__ import annotations

import logging
import math
from functools import cache
from types import ModuleType
from typing import Any, Protocol, runtime_checkable

from ._errors import OutputNotSerializableError, OutputTooLargeError, OutputUnreadableError, show, shown_label

DEPTH_LIMIT = 64
"""How many lists and objects may be in one another."""

_SIZE_WARNING = 256 * 1024
_SIZE_LIMIT = 2 * 1024 * 1024
_REASON_LIMIT = 200
_WARNINGS = 1000
# What msgspec writes for floats that are not finite: as a value, and as a key.
_NOT_FINITE = (b"null", b'"nan"', b'"inf"', b'"-inf"')

_log = logging.getLogger("cano")


@runtime_checkable
class Codec(Protocol):
    """How values become bytes and come back.

    A codec reads bytes that were written by another process, maybe with an older version of the code, or damaged. One that
    can be told by bytes to make any object (``pickle`` is one) lets whoever can write to the store run code.
    """

    def encode(self, value: object, /) -> bytes:
        """The value as bytes; raises an Exception for one that it cannot write."""
        ...

    def decode(self, data: bytes, type_: Any, /) -> Any:
        """The value of the annotated type; raises an Exception if the bytes are no such value."""
        ...


class JsonCodec:
    """The codec that is used unless another is given: JSON, typed by annotation.

    It writes None, bool, int, finite float, str, bytes, lists, tuples, sets and dicts, dates, times and durations, Decimal,
    UUID, Enum members whose values are all int or all str, dataclasses, named and typed dicts and tuples, Structs of msgspec,
    and models of pydantic (whatever has ``model_dump_json`` and ``model_validate_json``). Refused are NaN and infinity, lone
    surrogates, and lists and objects in one another beyond 64 levels.

    A value comes back as the annotated type: of an instance of a subclass only the annotated fields, and without an
    annotation as what JSON has.

    Example:
        >>> from datetime import date
        >>> JsonCodec().encode({"due": date(2027, 1, 31)})
        b'{"due":"2027-01-31"}'
        >>> JsonCodec().decode(b'{"due":"2027-01-31"}', dict[str, date])
        {'due': datetime.date(2027, 1, 31)}
    """

    __slots__ = ()

    def encode(self, value: object, /) -> bytes:
        """The value as JSON, UTF-8.

        Raises:
            OutputNotSerializableError: The value, or a part of it, cannot be written.
        """
        try:
            data: bytes = _msgspec().json.encode(value, enc_hook=_written)
            flaw = _flaw(value, data)
        except Exception as error:
            raise _not_serializable(value, _reason(error)) from error
        if flaw is not None:
            raise _not_serializable(value, flaw)
        return data

    def decode(self, data: bytes, type_: Any, /) -> Any:
        """The value of the annotated type.

        Args:
            data: What `encode` gave.
            type_: A type or an annotation; ``Any`` and ``object`` are what JSON has.

        Raises:
            OutputUnreadableError: The bytes are no JSON, or not of that type.
        """
        try:
            return _msgspec().json.decode(data, type=Any if type_ is object else type_, dec_hook=_read)
        except Exception as error:
            raise OutputUnreadableError(f"no value of type {_name(type_)} can be read: {_reason(error)}") from error

    def __repr__(self) -> str:
        return "JsonCodec()"


def encoded(codec: Codec, what: str, value: object, type_: Any) -> bytes:
    """What is stored of a value: bytes that are known to come back as the annotated type.

    Args:
        codec: Writes and reads them.
        what: The value's place in messages, like "the output of task charge in state CHARGE".
        value: The value.
        type_: The annotation by which it is to be read.

    Raises:
        OutputNotSerializableError: The codec refuses the value, or cannot read it again.
        OutputTooLargeError: There are more than 2 MiB of it.
    """
    try:
        data = codec.encode(value)
    except Exception as error:
        raise OutputNotSerializableError(f"{what} cannot be stored: {_reason(error)}") from error
    if not isinstance(data, bytes):
        raise OutputNotSerializableError(f"{what} cannot be stored: the codec made no bytes of it, but {show(data)}")
    if len(data) > _SIZE_LIMIT:
        raise OutputTooLargeError(
            f"{what}, of type {_name(type(value))}, has {len(data)} bytes; at most {_SIZE_LIMIT} can be stored",
            len(data),
            _SIZE_LIMIT,
        )
    if len(data) > _SIZE_WARNING:
        _warn(what, len(data))
    try:
        back = codec.decode(data, type_)
        # Without an annotation anything can be read, but not as what it was.
        lost = type_ in (Any, object) and bool(back != value)
    except Exception as error:
        raise OutputNotSerializableError(
            f"{what}, of type {_name(type(value))}, would not come back: {_reason(error)}"
        ) from error
    if lost:
        raise OutputNotSerializableError(
            f"{what}, of type {_name(type(value))}, would come back as {_name(type(back))}; annotate its type"
        )
    return data


def decoded(codec: Codec, what: str, data: bytes, type_: Any) -> Any:
    """The value that was stored.

    Raises:
        OutputUnreadableError: The bytes are no value of the type.
    """
    try:
        return codec.decode(data, type_)
    except Exception as error:
        raise OutputUnreadableError(f"{what} cannot be read: {_reason(error)}") from error


@cache
def _msgspec() -> ModuleType:
    import msgspec  # noqa: PLC0415 - only durable runs need it

    return msgspec


def _written(value: Any) -> Any:
    """What msgspec does not know: a model of pydantic."""
    dump = getattr(type(value), "model_dump_json", None)
    if dump is None:
        raise TypeError(f"type {_name(type(value))} has no form in JSON")
    return _msgspec().Raw(dump(value).encode())


def _read(type_: Any, value: Any) -> Any:
    """The same for reading: a type that the annotation names."""
    validate = getattr(type_, "model_validate_json", None)
    if validate is None:
        raise TypeError(f"type {_name(type_)} has no form in JSON")
    return validate(_msgspec().json.encode(value))


def _flaw(value: object, data: bytes) -> str | None:
    """What JSON itself would not tell: a float that is not finite, written as null, and too many levels."""
    if any(text in data for text in _NOT_FINITE) and _has_nan(_msgspec().to_builtins(value, enc_hook=_parts)):
        return "it has a float that is not finite"
    if data.count(b"[") + data.count(b"{") > DEPTH_LIMIT and _depth(_msgspec().json.decode(data)) > DEPTH_LIMIT:
        return f"it is nested more than {DEPTH_LIMIT} levels deep"
    return None


def _parts(value: Any) -> Any:
    dump = getattr(type(value), "model_dump", None)
    return None if dump is None else dump(value)


def _children(value: object) -> list[object]:
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    return list(value) if isinstance(value, (list, tuple)) else []


def _has_nan(value: object) -> bool:
    rest = [value]
    while rest:
        value = rest.pop()
        if isinstance(value, float) and not math.isfinite(value):
            return True
        rest += _children(value)
    return False


def _depth(value: object) -> int:
    levels, layer = 0, [value]
    while layer := [item for item in layer if isinstance(item, (dict, list))]:
        layer = [child for item in layer for child in _children(item)]
        levels += 1
    return levels


def _not_serializable(value: object, reason: str) -> OutputNotSerializableError:
    return OutputNotSerializableError(f"a value of type {_name(type(value))} cannot be written as JSON: {reason}")


def _reason(error: Exception) -> str:
    """What an error says, if it is known to quote no values, which may be secrets; else what it is."""
    if type(error).__module__ not in ("builtins", "cano", "msgspec"):
        return type(error).__qualname__
    text = "".join(c if c.isprintable() else " " for c in str(error)[:_REASON_LIMIT])
    return text or type(error).__qualname__


def _name(type_: Any) -> str:
    return shown_label(type_.__qualname__ if isinstance(type_, type) else str(type_))


_warned: set[str] = set()


def _warn(what: str, size: int) -> None:
    if what in _warned or len(_warned) >= _WARNINGS:
        return
    _warned.add(what)
    _log.warning("%s has %d bytes; more than %d cannot be stored", what, size, _SIZE_LIMIT)
