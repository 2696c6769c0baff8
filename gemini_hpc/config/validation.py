"""Check raw YAML values against a model; a mistake becomes one line that says what to type instead."""

import json
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from gemini_hpc.errors import UserError


class Section(BaseModel):
    """Base of every configuration model: frozen, unknown keys refused, finite numbers only."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_number_by_yes_or_no(cls, value: Any, info: ValidationInfo) -> Any:
        """`true` is not 1."""
        annotation = cls.model_fields[str(info.field_name)].annotation
        kinds = get_args(annotation) or (annotation,)
        if isinstance(value, bool) and bool not in kinds and (int in kinds or float in kinds):
            raise PydanticCustomError("int_bool", "a number")
        return value


M = TypeVar("M", bound=BaseModel)

_EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "finite_number": "a finite number",
    "bool": "true or false",
    "string_pattern_mismatch": "text that matches {pattern}",
    "string": "text",
    "tuple": "a list",
    "list": "a list",
    "dict": "a mapping of keys to values",
    "model": "a mapping of keys to values",
    "greater_than_equal": "at least {ge}",
    "greater_than": "more than {gt}",
    "less_than_equal": "at most {le}",
    "less_than": "less than {lt}",
    "literal_error": "{expected}",
}
"""What is expected, by how pydantic's error type starts (the first that fits)."""


def validate(model: type[M], raw: Mapping[str, Any], origin: str) -> M:
    """Return `raw` as a `model`. Raises UserError naming `origin` (a file, or "") and the wrong key."""
    try:
        return model.model_validate(raw)
    except ValidationError as invalid:
        # a default that follows from other fields is not computed when one of them is wrong: not a mistake
        errors = [e for e in invalid.errors() if e["type"] != "default_factory_not_called"]
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        where = f"{origin}: " if origin else ""
        raise UserError(f"{where}{_line(model, errors[0])}{more}") from None


def nearest(name: str, valid: Sequence[str]) -> str:
    """Return "did you mean X? valid are ..." for an unknown `name`."""
    close = get_close_matches(name, valid, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"{hint}valid are {', '.join(valid)}"


def _line(model: type[BaseModel], error: ErrorDetails) -> str:
    if error["type"] == "value_error":  # raised by a check of our own, which says everything itself
        return str(error["ctx"]["error"])
    *parents, last = error["loc"]
    section = _section_at(model, parents)
    if error["type"] == "extra_forbidden" and section:
        path = ".".join(str(part) for part in parents)
        inside = f" in {path}" if path else ""
        return f"unknown key {last!r}{inside}: {nearest(str(last), list(section.model_fields))}"
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "missing":
        return f"{key} is missing: set it{_example(section, last, key)}"
    example = _example(section, last, key)
    return f"{key} is {_short(error['input'])} but must be {_expected(error)}: set it{example}"


def _section_at(model: type[BaseModel], path: Sequence[int | str]) -> type[BaseModel] | None:
    """The model that `path` leads to; None where it leads into a plain mapping or list."""
    section: type[BaseModel] | None = model
    for part in path:
        if isinstance(part, int):
            continue  # a list item has its list's type
        field = section.model_fields.get(part) if section else None
        section = next(_models_in(field.annotation), None) if field else None
    return section


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models_in(inner)


def _expected(error: ErrorDetails) -> str:
    for start, words in _EXPECTED.items():
        if error["type"] == start or error["type"].startswith(f"{start}_"):
            return words.format(**error.get("ctx", {}))
    return error["msg"]


def _example(section: type[BaseModel] | None, name: int | str, key: str) -> str:
    field = section.model_fields.get(str(name)) if section else None
    if field is None:
        return ""
    meaning = f" ({' '.join(field.description.split())})" if field.description else ""
    if not isinstance(field.default, (str, int, float)):
        return meaning
    default = field.default if isinstance(field.default, str) else _short(field.default)
    return f", for example {key}={default}{meaning}"


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
