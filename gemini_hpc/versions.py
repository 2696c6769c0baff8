"""Whether the hot swap may touch the internals of the torch and the DeepSpeed that are installed. Imports neither."""

from importlib import metadata

TESTED = {"torch": "2.13.0", "deepspeed": "0.19.8"}
"""The versions whose private attributes `engine.reset` and `engine.capture` know."""


def mismatch() -> str:
    """Return what differs from the tested versions, in words; empty when nothing does."""
    found = {name: metadata.version(name).split("+")[0] for name in TESTED}
    return ", ".join(
        f"{name} {found[name]} instead of {TESTED[name]}" for name in TESTED if found[name] != TESTED[name]
    )
