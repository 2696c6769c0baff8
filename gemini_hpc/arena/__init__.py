"""A node's shared-memory file: where its own snapshots and its partners' replicas live."""

from gemini_hpc.arena.arena import OWN, Arena, ArenaError, Geometry, Record, State
from gemini_hpc.arena.snapshot import (
    COPY_TUNING,
    INDEX_BYTES,
    SnapshotIndex,
    TensorSpec,
    checksum,
    layout,
    write_index,
)

__all__ = [
    "COPY_TUNING",
    "INDEX_BYTES",
    "OWN",
    "Arena",
    "ArenaError",
    "Geometry",
    "Record",
    "SnapshotIndex",
    "State",
    "TensorSpec",
    "checksum",
    "layout",
    "write_index",
]
