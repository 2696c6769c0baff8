"""A snapshot as an HDF5 file and back, to the byte. The only importer of h5py.

    /                attributes format, rank, step, world_size, checksum (xxh3-64 of the payload)
    /index           the index of the payload as text (JSON), verbatim; it holds the small state as well
    /tensors/NAME    one contiguous dataset per tensor; a slash in NAME makes a group

The payload is rebuilt from the index and the datasets alone, since everything between the tensors is zero,
and is then held against the checksum. So whatever happens to a file, it yields the bytes that were saved or
an error.
"""

from pathlib import Path
from typing import Any

import h5py
import numpy as np

from gemini_hpc.arena import INDEX_BYTES, SnapshotIndex, TensorSpec
from gemini_hpc.arena import checksum as checksum_of
from gemini_hpc.errors import GeminiError
from gemini_hpc.persist.manifest import PersistError, plain_size, reason, replacing


class ChecksumError(PersistError):
    """The bytes are not those that were to be written, or had been."""


_FORMAT = 1
_LENGTH_BYTES = 8
_DTYPES: dict[str, np.dtype[Any]] = {
    # little-endian as in the payload, and no conversion on the way; a bool's byte stays a byte
    "float32": np.dtype("<f4"),
    "float64": np.dtype("<f8"),
    "int64": np.dtype("<i8"),
    "int32": np.dtype("<i4"),
    "int16": np.dtype("<i2"),
    "int8": np.dtype("i1"),
    "uint8": np.dtype("u1"),
    "bool": np.dtype("u1"),
}


def write_shard(path: Path, payload: memoryview, checksum: int) -> None:
    """Write the snapshot `payload` to `path`, atomically and durably.

    For the archiver, which hands over a private copy: bytes that change meanwhile would spoil the file,
    though never unnoticed. Blocks on the file system for as long as that takes. Raises PersistError when
    the payload does not match `checksum` or the file cannot be written; then nothing is left behind.
    """
    try:
        index = SnapshotIndex.read(payload)
        payload = payload[: index.nbytes]
        _verify(payload, checksum)
        _check_gaps(index, payload)
    except GeminiError as error:
        raise PersistError(f"will not write {path}: {error}") from error
    with replacing(path) as temporary:
        try:
            # NFS does not have locks to offer everywhere (errno 37, 524), and nobody else knows this name
            with h5py.File(temporary, "w", locking=False) as file:
                _write(file, index, payload, checksum)
        except (RuntimeError, ValueError) as error:  # other ways in which h5py reports a failed write
            raise PersistError(f"cannot write {path}: {reason(error)}") from error


def read_shard(path: Path, out: memoryview) -> int:
    """Rebuild the payload saved in `path` at the head of `out`, zero the rest of `out`, return the checksum.

    The bytes are verified against the checksum in the file. Whether it is the file that the manifest means
    is for the caller to see: the checksum is returned for that. Raises PersistError naming the file and
    what is wrong with it; `out` is undefined then.
    """
    np.frombuffer(out, np.uint8).fill(0)
    try:
        plain_size(path)
        with h5py.File(path, "r", locking=False) as file:
            nbytes = _read(file, out)
            checksum = _number(file, "checksum")
        _verify(out[:nbytes], checksum)
    except (GeminiError, OSError, RuntimeError, ValueError, TypeError, KeyError, MemoryError) as error:
        raise PersistError(f"cannot use {path}: {reason(error)}") from error
    return checksum


def _verify(payload: memoryview, expected: int) -> None:
    found = checksum_of(payload)
    if found != expected:
        raise ChecksumError(f"its checksum is {found:016x} instead of {expected:016x}")


def _check_gaps(index: SnapshotIndex, payload: memoryview) -> None:
    """Refuse bytes that the file would not hold: better now than when the checkpoint is needed."""
    ends = [INDEX_BYTES, *(tensor.offset + tensor.nbytes for tensor in index.tensors)]
    starts = [*(tensor.offset for tensor in index.tensors), index.nbytes]
    for end, start in zip(ends, starts, strict=True):
        if start < end or any(payload[end:start]):
            raise PersistError(f"bytes {end} to {start} of it should be a gap of zeros")


def _write(file: h5py.File, index: SnapshotIndex, payload: memoryview, checksum: int) -> None:
    file.attrs["format"] = _FORMAT
    file.attrs["rank"] = index.rank
    file.attrs["step"] = index.step
    file.attrs["world_size"] = index.world_size
    file.attrs["checksum"] = np.uint64(checksum)
    length = int.from_bytes(payload[:_LENGTH_BYTES], "little")
    text = bytes(payload[_LENGTH_BYTES : _LENGTH_BYTES + length])
    # a dataset, since an attribute cannot hold more than 64 KiB
    file.create_dataset("index", data=np.bytes_(text))
    for tensor in index.tensors:
        file.create_dataset(_name(tensor), data=_view(payload, tensor))


def _read(file: h5py.File, out: memoryview) -> int:
    """Fill `out` from `file` and return the size of the payload."""
    if (known := _number(file, "format")) != _FORMAT:
        raise PersistError(f"format {known} is not known")
    stored = _dataset(file, "index")
    room = INDEX_BYTES - _LENGTH_BYTES
    if stored.shape != () or stored.dtype.kind != "S" or stored.dtype.itemsize > room:
        raise PersistError("its index is not one of ours")
    text = bytes(stored[()])
    out[:INDEX_BYTES] = len(text).to_bytes(_LENGTH_BYTES, "little") + text.ljust(room)
    index = SnapshotIndex.read(out)
    for tensor in index.tensors:
        dataset = _dataset(file, _name(tensor))
        if dataset.shape != tensor.shape or dataset.dtype != _DTYPES[tensor.dtype]:
            raise PersistError(f"tensor {tensor.name} is not what the index says")
        if tensor.nbytes:
            dataset.read_direct(_view(out, tensor))
    return index.nbytes


def _number(file: h5py.File, name: str) -> int:
    value = file.attrs[name]
    if not isinstance(value, np.integer):
        raise PersistError(f"its {name} is no whole number")
    return int(value)


def _dataset(file: h5py.File, name: str) -> h5py.Dataset:
    """Return a dataset that lies in this very file, as we write them.

    Others may name other files of the reader's (links, virtual and external data), or have HDF5 load filters.
    """
    parts = name.split("/")
    for depth in range(1, len(parts) + 1):
        if not isinstance(file.get("/".join(parts[:depth]), getlink=True), h5py.HardLink):
            raise PersistError(f"it has no {ascii(name)[:100]}")
    dataset = file[name]
    if not isinstance(dataset, h5py.Dataset):
        raise PersistError(f"{ascii(name)[:100]} holds no numbers")
    how = dataset.id.get_create_plist()
    if how.get_layout() not in (h5py.h5d.CONTIGUOUS, h5py.h5d.COMPACT) or how.get_external_count():
        raise PersistError(f"{ascii(name)[:100]} is not stored as we store it")
    return dataset


def _name(tensor: TensorSpec) -> str:
    return f"tensors/{tensor.name}"


def _view(payload: memoryview, tensor: TensorSpec) -> np.ndarray[Any, np.dtype[Any]]:
    flat = np.frombuffer(payload[tensor.offset : tensor.offset + tensor.nbytes], _DTYPES[tensor.dtype])
    return flat.reshape(tensor.shape)
