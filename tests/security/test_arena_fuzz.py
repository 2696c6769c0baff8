"""Whatever an arena's file holds: it is refused, or read as what it is. Nothing else, and no crash."""

import os
import stat
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gemini_hpc.arena import OWN, Arena, ArenaError, Geometry, Record, State

SMALL = Geometry(2, 5000)
RECORD = Record(State.SEALED, 3, 7, 2, 4999, 2**64 - 1)
FUZZ = settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
ANY_INT = st.integers(-(2**70), 2**70) | st.sampled_from([0, 1, -1, 2**31, 2**32, 2**63, 2**64 - 1])


def opened(path: Path) -> Arena | None:
    """Open it as a worker does; None when it is refused in one line. All that is reachable can be read."""
    try:
        arena = Arena.open(path)
    except ArenaError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return None
    geometry = arena.geometry
    assert geometry.areas >= 1 and geometry.arena_bytes == len(arena.buffer) == path.stat().st_size
    assert type(arena.safe_step) is int and isinstance(arena.run_id, str)
    for area in {0, geometry.areas // 2, geometry.areas - 1}:
        for half in (0, 1):
            record = arena.record(area, half)
            assert record == Record() or 0 <= record.nbytes <= geometry.snapshot_bytes
            assert len(arena.payload(area, half)) == geometry.snapshot_bytes
    return arena


def file_of(folder: Path, content: bytes) -> Path:
    path = folder / "arena"
    path.unlink(missing_ok=True)
    path.touch(mode=0o600)
    path.write_bytes(content)
    return path


@pytest.fixture
def image(tmp_path: Path) -> bytes:
    arena = Arena.create(tmp_path / "good", SMALL, "run")
    arena.write_record(1, 1, RECORD)
    return bytes(arena.buffer)


@FUZZ
@given(
    magic=st.sampled_from([b"GEMARENA", b"GEMARENB", b""]),
    version=st.sampled_from([1, 0, 2, 2**32 - 1]),
    areas=st.integers(0, 3) | st.integers(0, 2**32 - 1),
    size=st.integers(0, 20_000) | st.integers(0, 2**64 - 1),
    run_id=st.binary(max_size=32),
    length=st.sampled_from([0, 64, 4095, 4096, 8192, 8193, 12_288, 16_384, 24_576, 40_960]),
)
def test_any_header(
    tmp_path: Path, magic: bytes, version: int, areas: int, size: int, run_id: bytes, length: int
) -> None:
    header = struct.pack("<8sIIQ32s", magic, version, areas, size, run_id)
    opened(file_of(tmp_path, header.ljust(length, b"\xa5")[:length]))


@FUZZ
@given(data=st.data())
def test_a_header_that_fits_its_file(tmp_path: Path, data: Any) -> None:
    """What an attacker would write: sizes that agree, everything else as he likes."""
    geometry = Geometry(data.draw(st.integers(0, 40)), data.draw(st.sampled_from([0, 1, 4095, 4096, 4097, 9000])))
    header = struct.pack("<8sIIQ32s", b"GEMARENA", 1, geometry.areas, geometry.snapshot_bytes, b"run")
    rest = data.draw(st.binary(max_size=64)) * 200
    path = file_of(tmp_path, (header + rest)[:4096].ljust(4096, b"\xff") + rest)
    os.truncate(path, geometry.arena_bytes)
    assert (opened(path) is None) == (geometry.areas == 0)


@FUZZ
@given(data=st.data())
def test_flipped_bytes(tmp_path: Path, image: bytes, data: Any) -> None:
    content = bytearray(image)
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, 63) | st.integers(0, 8191))] = data.draw(st.integers(0, 255))
    arena = opened(file_of(tmp_path, bytes(content)))
    if arena is not None and arena.geometry == SMALL:
        assert arena.record(1, 1) in (RECORD, Record())


@FUZZ
@given(
    state=st.integers(0, 2**32 - 1) | st.integers(0, 5),
    rank=st.integers(-(2**31), 2**31 - 1),
    step=st.integers(-(2**63), 2**63 - 1),
    nbytes=st.integers(0, 2**64 - 1) | st.integers(4990, 5010),
)
def test_a_forged_record_with_a_good_sum(tmp_path: Path, state: int, rank: int, step: int, nbytes: int) -> None:
    (tmp_path / "a").unlink(missing_ok=True)
    arena = Arena.create(tmp_path / "a", SMALL, "run")
    raw = struct.pack("<IiqqQQ", state, rank, step, 1, nbytes, 0)
    start = SMALL.record_offset(0, 0)
    arena.buffer[start : start + 44] = raw + struct.pack("<I", zlib.crc32(raw))
    found = arena.record(0, 0)
    assert found == Record() or (found.state == state <= 3 and nbytes <= SMALL.snapshot_bytes)


@FUZZ
@given(area=ANY_INT, half=ANY_INT)
def test_no_half_but_those_there_are(tmp_path: Path, area: int, half: int) -> None:
    """An order may name any numbers: they must not lead into the header or into somebody else's half."""
    (tmp_path / "a").unlink(missing_ok=True)
    arena = Arena.create(tmp_path / "a", SMALL, "run")
    before = bytes(arena.buffer)
    inside = area in (0, 1) and half in (0, 1)
    for use in (arena.record, arena.payload, lambda a, h: arena.write_record(a, h, RECORD)):
        if inside:
            use(area, half)
        else:
            with pytest.raises(ArenaError):
                use(area, half)
    assert (bytes(arena.buffer) != before) == inside


@FUZZ
@given(rank=ANY_INT, step=ANY_INT, generation=ANY_INT, nbytes=ANY_INT, checksum=ANY_INT)
def test_a_record_of_any_numbers(
    tmp_path: Path, rank: int, step: int, generation: int, nbytes: int, checksum: int
) -> None:
    (tmp_path / "a").unlink(missing_ok=True)
    arena = Arena.create(tmp_path / "a", SMALL, "run")
    record = Record(State.SEALED, rank, step, generation, nbytes, checksum)
    try:
        arena.write_record(OWN, 0, record)
    except ArenaError as error:
        assert "\n" not in str(error)
        assert arena.record(OWN, 0) == Record()
    else:
        assert arena.record(OWN, 0) == (record if nbytes <= SMALL.snapshot_bytes else Record())


# --- files that are not what they seem --------------------------------------------------------------------


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077])
def test_an_arena_is_the_owner_s_alone_under_any_umask(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        Arena.create(tmp_path / "a", SMALL, "run")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o600


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o606, 0o666])
def test_an_arena_that_others_may_open_is_refused(tmp_path: Path, image: bytes, mode: int) -> None:
    path = file_of(tmp_path, image)
    assert opened(path) is not None
    path.chmod(mode)
    assert opened(path) is None


@pytest.mark.skipif(os.getuid() != 0, reason="only root can make a file of another user")
def test_an_arena_of_another_user_is_refused(tmp_path: Path, image: bytes) -> None:
    """/dev/shm is everybody's: he may have put one there where ours was."""
    path = file_of(tmp_path, image)
    os.chown(path, 12345, 12345)
    assert opened(path) is None


def test_a_link_to_an_arena_is_no_arena(tmp_path: Path, image: bytes) -> None:
    (tmp_path / "link").symlink_to(file_of(tmp_path, image))
    assert opened(tmp_path / "link") is None
    with pytest.raises(ArenaError):
        Arena.create(tmp_path / "link", SMALL, "run")
    (tmp_path / "nowhere").symlink_to(tmp_path / "victim")
    with pytest.raises(ArenaError):
        Arena.create(tmp_path / "nowhere", SMALL, "run")
    assert not (tmp_path / "victim").exists()


def test_no_arena_at_all(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/null"), Path("/dev/zero"), tmp_path / "a\0b"):
        assert opened(path) is None


def test_a_sparse_file_of_a_huge_size(tmp_path: Path) -> None:
    """The header agrees with it, and no machine can map it."""
    for size in (2**45, 2**40):
        geometry = Geometry(1, size)
        header = struct.pack("<8sIIQ32s", b"GEMARENA", 1, 1, size, b"run")
        path = file_of(tmp_path, header)
        try:
            os.truncate(path, geometry.arena_bytes)
        except OSError:
            continue
        arena = opened(path)
        assert arena is None or len(arena.buffer) == geometry.arena_bytes
    assert opened(file_of(tmp_path, header)) is None
