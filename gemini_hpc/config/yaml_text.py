"""YAML in and out."""

import re
from pathlib import Path
from typing import Any

import yaml

from gemini_hpc.errors import UserError


class _Loader(yaml.SafeLoader):
    """YAML's safe subset, in which 1e-3 is a number (PyYAML wants 1.0e-3) and a key may stand only once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.MarkedYAMLError(problem=f"the key {key!r} stands twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def parse_yaml(text: str, origin: str) -> Any:
    """Return the value of a YAML text. Raises UserError with `origin` and the line of a mistake."""
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as wrong:
        line = f", line {wrong.problem_mark.line + 1}" if wrong.problem_mark else ""
        raise UserError(f"{origin}{line}: not YAML: {wrong.problem or wrong.context}: correct it") from None
    except (yaml.YAMLError, ValueError, RecursionError) as wrong:
        raise UserError(f"{origin}: not YAML ({str(wrong).splitlines()[0]}): correct it") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file ({} for an empty one). Raises UserError."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file: name a YAML file") from None
    except OSError as failed:
        raise UserError(f"{path}: {failed.strerror}: name a YAML file that can be read") from None
    values = parse_yaml(text, str(path))
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UserError(f"{path}: not a mapping of keys to values: write lines such as `name: my-run`")
    return values


def to_yaml(values: dict[str, Any]) -> str:
    """Return `values` as YAML that `parse_yaml` reads back as the same values."""
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
