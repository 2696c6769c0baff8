"""The global random generators of torch, numpy and Python: seeded, captured and restored with the shard.

Their long states travel as tensors of the snapshot, the few numbers beside them in its index.
"""

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def seed_generators(seed: int) -> None:
    """Seed all three, before a model is built: the same on every rank."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def start_generators(seed: int, rank: int) -> None:
    """Seed all three for a fresh run: differently on each rank, as dropout wants."""
    seed_generators(seed * 1_000_003 + rank + 1)


class Generators:
    """Captures the states; those that did not change since the last time are not converted again."""

    def __init__(self) -> None:
        self._python: tuple[Any, ...] = ()
        self._numpy: tuple[Any, ...] = ()
        self._tensors: dict[str, torch.Tensor] = {}

    def capture(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Return the long states by their names in a snapshot, and what goes into its index."""
        python, numpy = random.getstate(), np.random.get_state()
        if python != self._python:  # training seldom uses this one, and 625 integers are slow to convert
            self._python = python
            self._tensors["generator/python"] = torch.tensor(python[1], dtype=torch.int64)
        if not self._numpy or not np.array_equal(numpy[1], self._numpy[1]):
            self._tensors["generator/numpy"] = torch.from_numpy(numpy[1].astype(np.int64))
        self._numpy = numpy
        self._tensors["generator/torch"] = torch.get_rng_state()
        extras = {"python": [python[0], python[2]], "numpy": [numpy[0], *numpy[2:]]}
        return self._tensors, extras

    @staticmethod
    def restore(tensors: Mapping[str, torch.Tensor], extras: Mapping[str, Any]) -> None:
        """Put captured states back."""
        torch.set_rng_state(tensors["generator/torch"])
        version, gauss = extras["python"]
        random.setstate((version, tuple(tensors["generator/python"].tolist()), gauss))
        name, *rest = extras["numpy"]
        np.random.set_state((name, tensors["generator/numpy"].numpy().astype(np.uint32), *rest))
