"""A scheduler's state as JSON, and back as it was. JSON alone makes lists of tuples, and text of numeric keys."""

from collections import Counter, OrderedDict
from typing import Any

from gemini_hpc.errors import UserError

_PLAIN = (bool, int, float, str, type(None))
_MAPPINGS: dict[str, type] = {"dict": dict, "Counter": Counter, "OrderedDict": OrderedDict}
_TYPE = "!"


def to_json(value: Any, what: str) -> Any:
    """Return JSON types alone, perhaps the very value. Raises UserError for one that has none; `what` is its owner."""
    if type(value) in _PLAIN:
        return value
    if type(value) is list:
        return value if all(type(item) in _PLAIN for item in value) else [to_json(item, what) for item in value]
    if type(value) is tuple:
        return {_TYPE: "tuple", "items": [to_json(item, what) for item in value]}
    if type(value) is dict and _TYPE not in value and all(type(key) is str for key in value):
        return {key: to_json(item, what) for key, item in value.items()}
    if type(value).__name__ in _MAPPINGS and type(value) is _MAPPINGS[type(value).__name__]:
        pairs = [[to_json(key, what), to_json(item, what)] for key, item in value.items()]
        return {_TYPE: type(value).__name__, "items": pairs}
    kind = type(value).__name__
    raise UserError(f"{what} holds a {kind}, which a snapshot cannot carry; it may have numbers, text, lists, dicts")


def from_json(value: Any) -> Any:
    """Return what `to_json` was given."""
    if isinstance(value, list):
        return [from_json(item) for item in value]
    if not isinstance(value, dict):
        return value
    if _TYPE not in value:
        return {key: from_json(item) for key, item in value.items()}
    if value[_TYPE] == "tuple":
        return tuple(from_json(item) for item in value["items"])
    return _MAPPINGS[value[_TYPE]]({from_json(key): from_json(item) for key, item in value["items"]})
