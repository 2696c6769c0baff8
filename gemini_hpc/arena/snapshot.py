"""The bytes of a snapshot: a JSON index, then raw tensors. Self-describing, and never pickled.

Layout of a payload: 8 bytes little-endian length of the index; the index, padded with spaces to INDEX_BYTES;
the tensors, each at a 64-byte aligned offset, the gaps zero. The layout depends on the shapes alone, so every
snapshot of a run has the same size, and the bytes between tensors are deterministic for the checksum.
"""

import json
import struct
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import xxhash
from pydantic_core import to_json

from gemini_hpc.errors import GeminiError

INDEX_BYTES = 256 << 10
"""Room for the index: some two thousand tensors and the small state."""

COPY_TUNING = {"GLIBC_TUNABLES": "glibc.cpu.x86_non_temporal_threshold=0x100000"}
"""Environment of a process that copies snapshots: from 1 MiB on, memmove writes past the caches. By default glibc does
so only from three quarters of the last-level cache on, and is 1.6 times slower below that (benchmarks/snapshot.py)."""

_LENGTH = struct.Struct("<Q")
_SPACES = memoryview(b" " * (INDEX_BYTES - _LENGTH.size))
_ALIGN = 64
_ITEM_BYTES = {"float32": 4, "float64": 8, "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "bool": 1}


class TensorSpec(NamedTuple):
    """One tensor of a snapshot: `offset` and `nbytes` count from the start of the payload."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class SnapshotIndex(NamedTuple):
    """The index of one snapshot. `state` is the small state (JSON types only)."""

    rank: int
    step: int
    world_size: int
    nbytes: int
    tensors: tuple[TensorSpec, ...]
    state: Mapping[str, Any]

    def encode(self) -> bytes:
        """Return the head of a payload, for `write_index`. Raises GeminiError when it is larger than INDEX_BYTES."""
        # in every step, so the table, always the same, only once
        rank, step, world_size, nbytes, tensors, state = self
        text = b'{"format":1,"rank":%d,"step":%d,"world_size":%d,"nbytes":%d,"state":%b,"tensors":%b}' % (
            *(rank, step, world_size, nbytes),
            to_json(state, inf_nan_mode="constants"),  # a third of the time of json's, when all caches are cold
            _table(tensors),
        )
        if len(text) > len(_SPACES):
            raise GeminiError(f"the snapshot index needs {len(text)} bytes, {len(_SPACES)} are reserved")
        return _LENGTH.pack(len(text)) + text

    def write(self, payload: memoryview) -> None:
        """Write it into the head of `payload`."""
        write_index(payload, self.encode())

    @classmethod
    def read(cls, payload: memoryview) -> "SnapshotIndex":
        """Parse and check the index of `payload`. Raises GeminiError when it is not one of ours."""
        try:
            (length,) = _LENGTH.unpack_from(payload)
            if length > INDEX_BYTES - _LENGTH.size:
                raise ValueError(f"index length {length}")
            raw = json.loads(bytes(payload[_LENGTH.size : _LENGTH.size + length]))
            if raw.pop("format") != 1:
                raise ValueError("unknown format")
            tensors = tuple(TensorSpec(**{**t, "shape": tuple(t["shape"])}) for t in raw.pop("tensors"))
            index = cls(tensors=tensors, **raw)
            _check(index, len(payload))
        except (struct.error, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise GeminiError(f"not a snapshot: {error}") from error
        return index


def write_index(payload: memoryview, head: bytes) -> None:
    """Write an encoded index, and the spaces after it, into the head of `payload`."""
    (before,) = _LENGTH.unpack_from(payload)  # of the index that lies there: behind it are spaces already
    end = min(_LENGTH.size + before, INDEX_BYTES) if before else INDEX_BYTES
    if end > len(head):  # before the index: killed in between, what is left must not look clean
        payload[len(head) : end] = _SPACES[: end - len(head)]
    payload[: len(head)] = head


def _check(index: SnapshotIndex, room: int) -> None:
    """Raise ValueError, KeyError or TypeError unless all fields have their types and all tensors their own place."""
    numbers = (index.rank, index.step, index.world_size, index.nbytes)
    if not all(type(number) is int for number in numbers) or not isinstance(index.state, dict):
        raise ValueError("types")
    if not 0 <= index.rank < index.world_size or index.step < 0:
        raise ValueError(f"rank {index.rank} of {index.world_size}, step {index.step}")
    if not INDEX_BYTES <= index.nbytes <= room:
        raise ValueError(f"{index.nbytes} bytes in a payload of {room}")
    end = INDEX_BYTES
    for tensor in index.tensors:
        if not isinstance(tensor.name, str) or not isinstance(tensor.dtype, str):
            raise ValueError("name of a tensor")
        sizes = (*tensor.shape, tensor.offset, tensor.nbytes)
        if any(type(size) is not int or size < 0 for size in sizes):
            raise ValueError(f"types in {tensor.name!r}")
        if tensor.nbytes != prod(tensor.shape) * _ITEM_BYTES[tensor.dtype]:
            raise ValueError(f"size of {tensor.name!r}")
        if tensor.offset < end or tensor.offset + tensor.nbytes > index.nbytes:
            raise ValueError(f"place of {tensor.name!r}")
        end = tensor.offset + tensor.nbytes


def _table(tensors: tuple[TensorSpec, ...]) -> bytes:
    global _last_table
    if tensors is not _last_table[0]:
        _last_table = tensors, to_json([tensor._asdict() for tensor in tensors])
    return _last_table[1]


_last_table: tuple[tuple[TensorSpec, ...], bytes] = (), b"[]"


def layout(shapes: Sequence[tuple[str, str, tuple[int, ...]]]) -> tuple[tuple[TensorSpec, ...], int]:
    """Place tensors given as (name, dtype, shape); return their specs and the payload's size in bytes."""
    specs, offset = [], INDEX_BYTES
    for name, dtype, shape in shapes:
        nbytes = prod(shape) * _ITEM_BYTES[dtype]
        specs.append(TensorSpec(name, dtype, tuple(shape), offset, nbytes))
        offset += -(-nbytes // _ALIGN) * _ALIGN
    return tuple(specs), offset


def checksum(payload: memoryview) -> int:
    """xxh3-64 of a whole payload (8-14 GB/s per thread, FACTS.md section 3)."""
    return xxhash.xxh3_64_intdigest(payload)
