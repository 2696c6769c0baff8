"""The persistent tier: one HDF5 file per rank, and a manifest that makes them a checkpoint.

    checkpoints/step-00000040/rank-0000.h5 ... manifest.json

`hdf5` (write_shard, read_shard) is imported by name and only by who moves bytes: this package itself loads
neither h5py nor numpy, so that an agent can look for the newest checkpoint at its start.
"""

from gemini_hpc.persist.manifest import (
    Manifest,
    PersistError,
    ShardFile,
    checkpoint_dir,
    newest,
    prune,
    publish,
    shard_path,
    survey,
)

__all__ = [
    "Manifest",
    "PersistError",
    "ShardFile",
    "checkpoint_dir",
    "newest",
    "prune",
    "publish",
    "shard_path",
    "survey",
]
