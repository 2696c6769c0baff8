"""From what the user typed to one frozen RunConfig, and back to YAML."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gemini_hpc.config.run import RunConfig
from gemini_hpc.config.site import AUTO, resolve_site
from gemini_hpc.config.validation import validate
from gemini_hpc.config.yaml_text import parse_yaml, read_yaml, to_yaml
from gemini_hpc.errors import UserError

CONFIG_FILE = "config.yaml"


def load_run(
    config_path: str | Path | None = None,
    overrides: Sequence[str] = (),
    nodes: int | None = None,
    spares: int | None = None,
    site: str | None = None,
) -> RunConfig:
    """Resolve a run: defaults, then the YAML file, then --site, --nodes and --spares, then `key.sub=value`.

    `overrides` have values in YAML and reach into lists by position (`drills.0.step=10`). Without `site` the
    file's own counts (a name, or the settings themselves), else "auto". Raises UserError.
    """
    raw = read_yaml(Path(config_path)) if config_path is not None else {}
    wanted = site if site is not None else raw.get("site") or AUTO
    if isinstance(wanted, str):
        raw["site"] = resolve_site(wanted).model_dump(mode="json")
    counts = {"nodes": nodes, "spares": spares}
    flags = [f"cluster.{key}={count}" for key, count in counts.items() if count is not None]
    # those that reach into a list come last: the default drills follow from the other settings
    for override in sorted([*flags, *overrides], key=_reaches_into_list):
        _apply(raw, override)
    return validate(RunConfig, raw, "" if config_path is None else str(config_path))


def read_run(run_dir: str | Path) -> RunConfig:
    """Return the configuration of an existing run directory. Raises UserError when it is not one."""
    path = Path(run_dir) / CONFIG_FILE
    try:
        found = path.is_file()
    except OSError as error:
        raise UserError(f"{run_dir} cannot be read ({error.strerror}): make it readable, or name another") from error
    if not found:
        raise UserError(f"{run_dir} is not a run directory (it has no {CONFIG_FILE}): name one that `submit` printed")
    return validate(RunConfig, read_yaml(path), str(path))


def dump(config: RunConfig) -> str:
    """Return `config` as YAML that loads back to an equal object."""
    return to_yaml(config.model_dump(mode="json"))


def _apply(raw: dict[str, Any], override: str) -> None:
    """Set one `key.sub=value` in `raw`, making the sections on the way."""
    path, equals, text = override.partition("=")
    parts = path.split(".")
    if not equals or not all(parts):
        raise UserError(f"{override!r} is not an override: write key=value, for example train.steps=50")
    value = parse_yaml(text, override)
    place: Any = raw
    for depth, part in enumerate(parts[:-1]):
        if isinstance(place, dict) and part not in place and parts[depth + 1].isdigit():
            place[part] = _default(raw, parts[: depth + 1], override)
        place = _inside(place, part, override)
    if isinstance(place, list):
        place[_position(place, parts[-1], override)] = value
    else:
        place[parts[-1]] = value


def _inside(place: Any, part: str, override: str) -> Any:
    if isinstance(place, list):
        inner = place[_position(place, part, override)]
    else:
        inner = place.setdefault(part, {})
        if inner is None:  # a section whose heading stands alone in the YAML file
            inner = place[part] = {}
    if not isinstance(inner, (dict, list)):
        raise UserError(f"{override}: {part} is {inner!r}, which has no keys: correct the key")
    return inner


def _position(items: list[Any], part: str, override: str) -> int:
    if not part.isdigit() or int(part) >= len(items):
        known = f"0 to {len(items) - 1}" if items else "none, the list is empty"
        raise UserError(f"{override}: no item {part!r}; there are {known}: correct the number, or write the whole list")
    return int(part)


def _default(raw: dict[str, Any], parts: Sequence[str], override: str) -> list[Any] | dict[str, Any]:
    """The list that is in force at `parts` while nobody has set it; {} where it is not a list."""
    place: Any = validate(RunConfig, raw, override).model_dump(mode="json")
    for part in parts:
        place = place.get(part) if isinstance(place, dict) else None
    return place if isinstance(place, list) else {}


def _reaches_into_list(override: str) -> bool:
    return any(part.isdigit() for part in override.partition("=")[0].split("."))
