"""The arena file: one header page, one record per half, then the halves.

Area 0 holds the snapshots of the node's own rank, areas 1..m-1 the replicas of its partners. Each area is a
double buffer (halves 0 and 1), so that one complete snapshot exists while the next is being written. Every
record has one writer at a time: the worker for its own area while writing, the window host afterwards and for
replicas. `safe_step` in the header is written by the agent alone, `idle_until` by the worker, and by the agent while
there is none.

A plain mmap of a file rather than `multiprocessing.shared_memory`, whose resource tracker in Python 3.11
unlinks a segment that other processes still use (FACTS.md section 3).
"""

import mmap
import os
import stat
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from math import inf
from pathlib import Path
from typing import NamedTuple

from gemini_hpc.errors import GeminiError

OWN = 0
"""The area of the node's own rank."""

_MAGIC = b"GEMARENA"
_VERSION = 1
_HEADER = struct.Struct("<8sIIQ32s")  # magic, version, areas, half_bytes, run id
_SAFE = struct.Struct("<q")
_SAFE_OFFSET = 256  # its own cache line: written while others read the header
_IDLE = struct.Struct("<d")
_IDLE_OFFSET = 320
_RECORD = struct.Struct("<IiqqQQ")  # state, rank, step, generation, nbytes, checksum
_CRC = struct.Struct("<I")
_RECORD_STRIDE = 64
_PAGE = 4096
_TOUCH_BYTES = 16 << 20


class ArenaError(GeminiError):
    """The arena file is missing, foreign, damaged, or does not fit into the memory of the node."""


class State(IntEnum):
    FREE = 0
    WRITING = 1
    WRITTEN = 2  # complete, checksum not computed yet
    SEALED = 3  # complete, checksum computed (own) or verified (replica)


class Record(NamedTuple):
    """What a half holds. `checksum` (xxh3-64 of `nbytes` payload bytes) counts only when SEALED."""

    state: State = State.FREE
    rank: int = -1
    step: int = -1
    generation: int = 0
    nbytes: int = 0
    checksum: int = 0


@dataclass(frozen=True)
class Geometry:
    """Sizes of an arena: `areas` double buffers of 2 x `snapshot_bytes`."""

    areas: int
    snapshot_bytes: int

    @property
    def half_bytes(self) -> int:
        return -(-self.snapshot_bytes // _PAGE) * _PAGE

    @property
    def data_offset(self) -> int:
        return _PAGE + -(-self.areas * 2 * _RECORD_STRIDE // _PAGE) * _PAGE

    @property
    def arena_bytes(self) -> int:
        return self.data_offset + 2 * self.areas * self.half_bytes

    def record_offset(self, area: int, half: int) -> int:
        return _PAGE + self._number(area, half) * _RECORD_STRIDE

    def payload_offset(self, area: int, half: int) -> int:
        """Byte offset of a half in the file, and so the displacement in the MPI window over it."""
        return self.data_offset + self._number(area, half) * self.half_bytes

    def _number(self, area: int, half: int) -> int:
        if not (0 <= area < self.areas and half in (0, 1)):
            raise ArenaError(f"no half ({area}, {half}) in an arena of {self.areas} areas")
        return 2 * area + half


class Arena:
    """An open arena. Pages stay mapped for the life of the process: a torn-down window crashes its readers."""

    def __init__(self, path: Path, mapping: mmap.mmap, geometry: Geometry, run_id: str) -> None:
        self.path = path
        self.geometry = geometry
        self.run_id = run_id
        self.buffer = memoryview(mapping)

    @classmethod
    def create(cls, path: Path, geometry: Geometry, run_id: str) -> "Arena":
        """Allocate, map and touch a new arena (mode 0600); for the agent, which must outlive all users.

        Blocks for about a second per 3 GB, the cost of the page faults (FACTS.md section 2). Raises
        ArenaError when the file exists or the memory file system is too small.
        """
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ArenaError(f"cannot create {path}: {error.strerror}") from error
        try:
            os.posix_fallocate(fd, 0, geometry.arena_bytes)
            mapping = mmap.mmap(fd, geometry.arena_bytes)
        except OSError as error:
            os.unlink(path)
            raise ArenaError(f"no room for {geometry.arena_bytes} bytes at {path}: {error.strerror}") from error
        finally:
            os.close(fd)
        zeros = bytes(_TOUCH_BYTES)
        for start in range(0, geometry.arena_bytes, _TOUCH_BYTES):
            size = min(_TOUCH_BYTES, geometry.arena_bytes - start)
            mapping[start : start + size] = zeros[:size]
        _HEADER.pack_into(mapping, 0, _MAGIC, _VERSION, geometry.areas, geometry.snapshot_bytes, run_id.encode()[:32])
        arena = cls(path, mapping, geometry, run_id)
        arena.safe_step = -1
        arena.idle_until = inf
        for area in range(geometry.areas):
            for half in (0, 1):
                arena.write_record(area, half, Record())
        return arena

    @classmethod
    def open(cls, path: Path) -> "Arena":
        """Map an existing arena. Raises ArenaError when it is missing, foreign or of the wrong size."""
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except (OSError, ValueError) as error:
            raise ArenaError(f"cannot open {path}: {getattr(error, 'strerror', None) or error}") from error
        try:
            geometry, run_id = _read_header(path, fd)
            mapping = mmap.mmap(fd, geometry.arena_bytes)
        except OSError as error:
            raise ArenaError(f"cannot map {path}: {error.strerror}") from error
        finally:
            os.close(fd)
        return cls(path, mapping, geometry, run_id)

    def payload(self, area: int, half: int) -> memoryview:
        """Writable view of one half, `snapshot_bytes` long."""
        start = self.geometry.payload_offset(area, half)
        return self.buffer[start : start + self.geometry.snapshot_bytes]

    def record(self, area: int, half: int) -> Record:
        """Read a half's record; one that is torn or damaged (its own CRC) reads as FREE."""
        start = self.geometry.record_offset(area, half)
        raw = bytes(self.buffer[start : start + _RECORD.size + _CRC.size])
        state, rank, step, generation, nbytes, checksum = _RECORD.unpack_from(raw)
        (crc,) = _CRC.unpack_from(raw, _RECORD.size)
        if crc != zlib.crc32(raw[: _RECORD.size]) or state not in State._value2member_map_:
            return Record()
        if nbytes > self.geometry.snapshot_bytes:
            return Record()
        return Record(State(state), rank, step, generation, nbytes, checksum)

    def write_record(self, area: int, half: int, record: Record) -> None:
        """Write a half's record. Raises ArenaError for one that does not fit: orders may name any numbers."""
        try:
            raw = _RECORD.pack(*record)
        except struct.error as error:
            raise ArenaError(f"no such record: {tuple(record)}") from error
        start = self.geometry.record_offset(area, half)
        self.buffer[start : start + len(raw) + _CRC.size] = raw + _CRC.pack(zlib.crc32(raw))

    def sealed(self) -> Iterator[tuple[int, int, Record]]:
        """Yield what is complete and has its checksum, as (area, half, record)."""
        for area in range(self.geometry.areas):
            for half in (0, 1):
                record = self.record(area, half)
                if record.state is State.SEALED:
                    yield area, half, record

    @property
    def safe_step(self) -> int:
        """Newest step of which every rank's snapshot is verified on all its holders; -1 when there is none."""
        return int(_SAFE.unpack_from(self.buffer, _SAFE_OFFSET)[0])

    @safe_step.setter
    def safe_step(self, step: int) -> None:
        _SAFE.pack_into(self.buffer, _SAFE_OFFSET, step)

    @property
    def idle_until(self) -> float:
        """Until when training leaves the network alone (monotonic clock): 0 = it uses it now, inf = nobody knows."""
        return float(_IDLE.unpack_from(self.buffer, _IDLE_OFFSET)[0])

    @idle_until.setter
    def idle_until(self, moment: float) -> None:
        _IDLE.pack_into(self.buffer, _IDLE_OFFSET, moment)


def _read_header(path: Path, fd: int) -> tuple[Geometry, str]:
    """Check a file before it is mapped; return what its header says."""
    status = os.fstat(fd)
    # the memory file system is everybody's: a file that somebody else put under our name would see our snapshots
    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
        raise ArenaError(f"{path} is not a file of yours alone")
    head = os.pread(fd, _PAGE, 0)
    if len(head) < _PAGE:
        raise ArenaError(f"{path} is too short to be an arena ({len(head)} bytes)")
    magic, version, areas, snapshot_bytes, run_id = _HEADER.unpack_from(head)
    if magic != _MAGIC or version != _VERSION:
        raise ArenaError(f"{path} is not an arena of version {_VERSION}")
    geometry = Geometry(areas, snapshot_bytes)
    if areas < 1 or geometry.arena_bytes != status.st_size:
        raise ArenaError(f"{path} has {status.st_size} bytes, its header says {areas} areas of {snapshot_bytes} bytes")
    return geometry, run_id.rstrip(b"\0").decode(errors="replace")
