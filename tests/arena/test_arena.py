"""The arena file: what it holds, who may open it, and what a damaged one reads as."""

import os
import struct
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from gemini_hpc.arena import OWN, Arena, ArenaError, Geometry, Record, State

SMALL = Geometry(2, 10_000)
RECORD = Record(State.SEALED, rank=3, step=7, generation=2, nbytes=9_999, checksum=2**64 - 1)


@pytest.mark.parametrize("geometry", [SMALL, Geometry(1, 1), Geometry(3, 4096), Geometry(100, 4097)])
def test_halves_lie_side_by_side(geometry: Geometry) -> None:
    places = [geometry.payload_offset(area, half) for area in range(geometry.areas) for half in (0, 1)]
    ends = [place + geometry.snapshot_bytes for place in places]
    records = [geometry.record_offset(area, half) for area in range(geometry.areas) for half in (0, 1)]
    assert all(place % 4096 == 0 for place in places)
    assert all(end <= following for end, following in zip(ends, [*places[1:], geometry.arena_bytes], strict=True))
    assert all(later - earlier >= 64 for earlier, later in pairwise(records))
    assert records[0] >= 4096 and records[-1] + 64 <= places[0]


@pytest.mark.parametrize(("area", "half"), [(2, 0), (-1, 0), (0, 2), (0, -1)])
def test_there_are_no_other_halves(area: int, half: int) -> None:
    with pytest.raises(ArenaError):
        SMALL.payload_offset(area, half)


def test_a_new_arena_is_empty_and_private(tmp_path: Path) -> None:
    arena = Arena.create(tmp_path / "a", SMALL, "run")
    assert arena.path.stat().st_size == SMALL.arena_bytes
    assert arena.path.stat().st_mode & 0o777 == 0o600
    assert arena.safe_step == -1
    for area in range(2):
        for half in (0, 1):
            assert arena.record(area, half) == Record()
            assert len(arena.payload(area, half)) == SMALL.snapshot_bytes
            assert not any(arena.payload(area, half))


def test_two_processes_see_each_other_s_writes(tmp_path: Path) -> None:
    arena = Arena.create(tmp_path / "a", SMALL, "run")
    arena.payload(OWN, 1)[:5] = b"hello"
    arena.write_record(OWN, 1, RECORD)
    arena.safe_step = 2**40
    program = """
import sys
from itertools import pairwise
from pathlib import Path
from gemini_hpc.arena import *
arena = Arena.open(Path(sys.argv[1]))
assert (arena.geometry, arena.run_id, arena.safe_step) == (Geometry(2, 10_000), "run", 2**40)
assert bytes(arena.payload(OWN, 1)[:5]) == b"hello"
arena.write_record(1, 0, arena.record(OWN, 1))
arena.payload(1, 0)[-1] = 7
"""
    subprocess.run([sys.executable, "-c", program, str(arena.path)], check=True, timeout=60)
    assert arena.record(1, 0) == RECORD
    assert arena.payload(1, 0)[-1] == 7
    assert arena.record(1, 1) == Record()


def test_an_arena_stays_mapped_when_its_file_is_gone(tmp_path: Path) -> None:
    arena = Arena.create(tmp_path / "a", SMALL, "run")
    arena.path.unlink()
    arena.payload(OWN, 0)[:] = bytes(range(256)) * 39 + bytes(16)


def test_what_exists_is_not_overwritten(tmp_path: Path) -> None:
    Arena.create(tmp_path / "a", SMALL, "first").write_record(OWN, 0, RECORD)
    with pytest.raises(ArenaError, match="exists"):
        Arena.create(tmp_path / "a", SMALL, "second")
    assert Arena.open(tmp_path / "a").record(OWN, 0) == RECORD


def test_no_room(tmp_path: Path) -> None:
    """Larger than the file system, and larger than any file: an error, and nothing left behind."""
    for place in (tmp_path, Path("/dev/shm")):
        room = os.statvfs(place)
        path = place / f"gemini-test-{os.getpid()}"
        for size in (room.f_blocks * room.f_frsize, 2**60):
            before = os.statvfs(place).f_bfree
            with pytest.raises(ArenaError):
                Arena.create(path, Geometry(2, size), "run")
            assert not path.exists()
            assert before - os.statvfs(place).f_bfree < 2**30 // room.f_frsize


def test_no_such_place(tmp_path: Path) -> None:
    with pytest.raises(ArenaError, match="nowhere"):
        Arena.create(tmp_path / "nowhere" / "a", SMALL, "run")
    with pytest.raises(ArenaError, match="nowhere"):
        Arena.open(tmp_path / "nowhere")


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 8192, SMALL.arena_bytes - 1, SMALL.arena_bytes + 1])
def test_a_file_of_another_size_is_refused(size: int, tmp_path: Path) -> None:
    Arena.create(tmp_path / "a", SMALL, "run")
    os.truncate(tmp_path / "a", size)
    with pytest.raises(ArenaError):
        Arena.open(tmp_path / "a")


@pytest.mark.parametrize(
    "header",
    [
        b"GEMARENA" + struct.pack("<I", 99),  # of a later version
        b"NOTARENA",
        b"GEMARENA" + struct.pack("<IIQ", 1, 3, 10_000),  # other areas
        b"GEMARENA" + struct.pack("<IIQ", 1, 2, 20_000),
        b"GEMARENA" + struct.pack("<IIQ", 1, 2**32 - 1, 2**64 - 1),
        bytes(64),
    ],
)
def test_a_foreign_file_is_refused(header: bytes, tmp_path: Path) -> None:
    Arena.create(tmp_path / "a", SMALL, "run")
    with (tmp_path / "a").open("r+b") as file:
        file.write(header)
    with pytest.raises(ArenaError):
        Arena.open(tmp_path / "a")


def test_a_run_id_survives(tmp_path: Path) -> None:
    for number, run_id in enumerate(["", "0123456789abcdef0123456789abcdef", "é"]):
        Arena.create(tmp_path / str(number), SMALL, run_id)
        assert Arena.open(tmp_path / str(number)).run_id == run_id


def test_every_torn_record_reads_as_free(tmp_path: Path) -> None:
    """Of two records, any mixture of the first bytes of one and the last of the other."""
    arena = Arena.create(tmp_path / "a", SMALL, "run")
    start = SMALL.record_offset(1, 1)
    arena.write_record(1, 1, RECORD)
    old = bytes(arena.buffer[start : start + 64])
    newer = Record(State.WRITTEN, rank=4, step=8, generation=3, nbytes=1, checksum=5)
    arena.write_record(1, 1, newer)
    new = bytes(arena.buffer[start : start + 64])
    for cut in range(65):
        arena.buffer[start : start + 64] = new[:cut] + old[cut:]
        assert arena.record(1, 1) in (Record(), RECORD, newer)
        assert (arena.record(1, 1) == newer) == (new[:cut] + old[cut:] == new)


def test_every_flipped_bit_of_a_record_is_seen(tmp_path: Path) -> None:
    arena = Arena.create(tmp_path / "a", SMALL, "run")
    start = SMALL.record_offset(0, 0)
    arena.write_record(0, 0, RECORD)
    for bit in range(8 * 44):
        arena.buffer[start + bit // 8] ^= 1 << bit % 8
        assert arena.record(0, 0) == Record()
        arena.buffer[start + bit // 8] ^= 1 << bit % 8
    assert arena.record(0, 0) == RECORD


def test_a_record_that_cannot_be_true_reads_as_free(tmp_path: Path) -> None:
    arena = Arena.create(tmp_path / "a", SMALL, "run")
    arena.write_record(0, 0, Record(State.SEALED, nbytes=SMALL.snapshot_bytes + 1))
    assert arena.record(0, 0) == Record()
    arena.buffer[SMALL.record_offset(0, 1) : SMALL.record_offset(0, 1) + 64] = bytes(64)
    assert arena.record(0, 1) == Record()
