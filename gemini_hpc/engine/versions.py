"""Whether the hot swap may touch the internals of this torch and this DeepSpeed."""

import deepspeed
import torch

TESTED = {"torch": "2.13.0", "deepspeed": "0.19.8"}
"""The versions whose private attributes `reset` and `capture` know."""


def mismatch() -> str:
    """Return what differs from the tested versions, in words; empty when nothing does."""
    found = {"torch": torch.__version__.split("+")[0], "deepspeed": deepspeed.__version__.split("+")[0]}
    return ", ".join(
        f"{name} {found[name]} instead of {TESTED[name]}" for name in TESTED if found[name] != TESTED[name]
    )
