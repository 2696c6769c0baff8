"""The global random generators of torch, numpy and Python: where they start, in every step anew.

So that no snapshot has to carry their states, and a step is random in the same way whenever it is done again.
"""

import hashlib
import random
import struct

import numpy as np
import torch


def seed_model(seed: int) -> None:
    """Seed all three before a model is built: the same on every rank."""
    _seed_all(seed)


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed all three before a step: differently on each rank, as dropout wants, and in each step."""
    digest = hashlib.blake2b(struct.pack("<qqq", seed, step, rank), digest_size=8).digest()
    _seed_all(int.from_bytes(digest, "little"))


def _seed_all(seed: int) -> None:
    torch.default_generator.manual_seed(seed)  # torch.manual_seed takes 0.2 ms to look for all kinds of devices
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
