"""The wire form of messages: one JSON object each, whose "kind" is the name of its class.

Decoding checks kind, field names and types, so that a malformed message is refused whole.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from math import isfinite
from typing import Any, get_args, get_type_hints

MAX_MESSAGE_BYTES = 1 << 20


class MessageError(ValueError):
    """The bytes are not one of our messages."""


_KINDS: dict[str, type["Message"]] = {}
_TYPES: dict[str, dict[str, type]] = {}


@dataclass(frozen=True)
class Message:
    """Base of all messages; subclasses are registered by their name."""

    def __init_subclass__(cls, abstract: bool = False) -> None:
        if not abstract:
            _KINDS[cls.__name__] = cls

    def encode(self) -> bytes:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        if not _is_text(values.get("reason", "")):  # an error may quote a file's name, and that may be any bytes
            values["reason"] = repr(values["reason"])
        return json.dumps({"kind": type(self).__name__, **values}, separators=(",", ":")).encode()


def decode(raw: bytes) -> Message:
    """Parse one message. Raises MessageError for anything that is not exactly one of ours."""
    if len(raw) > MAX_MESSAGE_BYTES:
        raise MessageError(f"{len(raw)} bytes, at most {MAX_MESSAGE_BYTES} are allowed")
    try:
        values = json.loads(raw)
        cls = _KINDS[values.pop("kind")]
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise MessageError("not a message") from error
    expected = _TYPES.get(cls.__name__) or _TYPES.setdefault(cls.__name__, get_type_hints(cls))
    if values.keys() != expected.keys():
        raise MessageError(f"{cls.__name__}: fields {sorted(values)} instead of {sorted(expected)}")
    for name, kind in expected.items():
        values[name] = _checked(cls.__name__, name, kind, values[name])
    return cls(**values)


def _checked(message: str, name: str, kind: Any, value: Any) -> Any:
    if kind is float and type(value) is int and abs(value) < 2**53:
        return float(value)
    if kind is float and type(value) is float and not isfinite(value) and name != "loss":  # training may diverge
        raise MessageError(f"{message}.{name}: {value} is no number to send")
    plain = getattr(kind, "__origin__", kind)
    if plain is tuple and isinstance(value, list):
        item = get_args(kind)[0]
        return tuple(_checked(message, name, item, one) for one in value)
    if plain is Mapping and isinstance(value, dict):
        return value
    if type(value) is not plain:
        raise MessageError(f"{message}.{name}: {type(value).__name__} instead of {plain.__name__}")
    if plain is int and not -(2**63) <= value < 2**64:  # of the arena's records
        raise MessageError(f"{message}.{name}: {value} has more than 64 bits")
    if plain is str and not _is_text(value):
        raise MessageError(f"{message}.{name} is no text")
    return value


def _is_text(value: str) -> bool:
    """Whether it can be written out; a lone surrogate, and a NUL for the system's calls, cannot."""
    try:
        return b"\0" not in value.encode()
    except UnicodeEncodeError:
        return False
