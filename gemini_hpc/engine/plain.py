"""A plain gloo group, for the undisturbed reference."""

import datetime
from pathlib import Path

import torch.distributed as dist


def join_plain_group(rendezvous: Path, rank: int, world_size: int, timeout_s: float) -> None:
    """Become the default process group (all ranks), meeting at a file: no port to choose."""
    store = dist.FileStore(str(rendezvous), world_size)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=world_size, timeout=datetime.timedelta(seconds=timeout_s)
    )
