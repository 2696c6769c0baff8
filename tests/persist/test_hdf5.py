"""A snapshot becomes a file and comes back to the byte, or does not come back at all."""

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from gemini_hpc.arena import SnapshotIndex, checksum, layout
from gemini_hpc.persist import PersistError, newest, shard_path
from gemini_hpc.persist.hdf5 import read_shard, write_shard

Saved = tuple[Path, memoryview]

SHAPES = [
    ("master/0", "float32", (4097,)),
    ("exp_avg/0", "float32", (3, 5, 7)),
    ("step/0", "float32", ()),
    ("frozen.weight", "float64", (9,)),
    ("ids", "int64", (2, 3)),
    ("counts", "int32", (1,)),
    ("rng", "uint8", (5056,)),
    ("mask", "bool", (13,)),
    ("empty", "float32", (0, 4)),
]


def make_payload(shapes: Sequence[tuple[str, str, tuple[int, ...]]] = SHAPES, seed: int = 0) -> memoryview:
    """A snapshot of random bits: all kinds of NaN, infinities and denormals among its floats."""
    specs, nbytes = layout(shapes)
    payload = memoryview(bytearray(nbytes))
    state = {"lr": 0.1, "nan": float("nan"), "text": "Grüße\n", "rng": list(range(600)), "none": None}
    SnapshotIndex(1, 40, 4, nbytes, specs, state).write(payload)
    generator = np.random.default_rng(seed)
    for spec in specs:
        payload[spec.offset : spec.offset + spec.nbytes] = generator.bytes(spec.nbytes)
    special = np.array([0x7FC00000, 0x7F800001, 0xFFC12345, 0x80000000, 0x7F800000, 1], "<u4").tobytes()
    payload[specs[0].offset : specs[0].offset + len(special)] = special
    return payload


@pytest.fixture
def saved(tmp_path: Path) -> Saved:
    path, payload = shard_path(tmp_path, 40, 1), make_payload()
    write_shard(path, payload, checksum(payload))
    return path, payload


def test_every_byte_comes_back(saved: Saved) -> None:
    path, payload = saved
    out = memoryview(bytearray(b"\xa5" * (len(payload) + 4096)))
    assert read_shard(path, out) == checksum(payload)
    assert out[: len(payload)] == payload
    assert not any(out[len(payload) :])


def test_a_longer_arena_half_may_be_handed_over(tmp_path: Path) -> None:
    payload = make_payload()
    half = memoryview(bytes(payload) + b"older bytes")
    write_shard(tmp_path / "a.h5", half, checksum(payload))
    out = memoryview(bytearray(len(payload)))
    assert read_shard(tmp_path / "a.h5", out) == checksum(payload)
    assert out == payload


def test_anybody_can_read_the_file_with_plain_h5py(saved: Saved) -> None:
    path, _ = saved
    with h5py.File(path) as file:
        assert (file.attrs["rank"], file.attrs["step"], file.attrs["world_size"]) == (1, 40, 4)
        master = file["tensors/master/0"]
        assert master.shape == (4097,) and master.dtype == np.float32 and master.chunks is None
        assert b"exp_avg/0" in file["index"][()]


def test_writing_again_replaces_the_file(saved: Saved) -> None:
    path, _ = saved
    other = make_payload(seed=7)
    write_shard(path, other, checksum(other))
    out = memoryview(bytearray(len(other)))
    assert read_shard(path, out) == checksum(other)
    assert os.listdir(path.parent) == [path.name]


def test_a_payload_that_is_not_what_its_checksum_says_is_not_written(tmp_path: Path) -> None:
    payload = make_payload()
    good = checksum(payload)
    payload[-100] ^= 1
    with pytest.raises(PersistError, match=r"a\.h5.*checksum"):
        write_shard(tmp_path / "a.h5", payload, good)
    assert os.listdir(tmp_path) == []


def test_bytes_that_the_file_would_not_hold_are_refused(tmp_path: Path) -> None:
    payload = make_payload(shapes=[("x", "uint8", (10,)), ("y", "uint8", (64,))])
    payload[-64 - 20] = 1  # in the gap after x
    with pytest.raises(PersistError, match="gap of zeros"):
        write_shard(tmp_path / "a.h5", payload, checksum(payload))


def test_an_output_that_is_too_small_is_refused(saved: Saved) -> None:
    path, payload = saved
    for size in (0, 100, len(payload) - 1):
        with pytest.raises(PersistError, match=r"rank-0001\.h5"):
            read_shard(path, memoryview(bytearray(size)))


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.999])
def test_a_truncated_file_is_refused(saved: Saved, share: float) -> None:
    path, payload = saved
    os.truncate(path, int(path.stat().st_size * share))
    assert_refused(path, payload)


def test_a_flipped_bit_anywhere_never_yields_other_bytes(saved: Saved) -> None:
    path, payload = saved
    raw = bytearray(path.read_bytes())
    out = memoryview(bytearray(len(payload)))
    refused = 0
    places = [*range(0, 3000, 7), *range(3000, len(raw), 211)]
    for place in places:
        raw[place] ^= 1 << place % 8
        path.write_bytes(raw)
        raw[place] ^= 1 << place % 8
        try:
            assert read_shard(path, out) == checksum(payload)
            assert out == payload  # the bit was one of HDF5's own that nobody needs
        except PersistError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            refused += 1
    assert refused > len(places) / 4


def test_a_flipped_bit_in_a_tensor_is_called_by_its_name(saved: Saved) -> None:
    path, payload = saved
    with h5py.File(path, "r+") as file:
        file["tensors/exp_avg/0"][2, 4, 6] += 1
    assert_refused(path, payload, "checksum")


@pytest.mark.parametrize("content", [b"", b"not HDF5 at all", b"\x89HDF\r\n\x1a\n" + bytes(3000)])
def test_a_foreign_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.h5").write_bytes(content)
    assert_refused(tmp_path / "a.h5", make_payload())


def test_somebody_elses_hdf5_is_refused(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["index"] = np.arange(3)
        file.attrs["format"] = 1
    assert_refused(tmp_path / "a.h5", make_payload(), "not one of ours")
    assert_refused(tmp_path / "absent.h5", make_payload(), "No such file")
    assert_refused(tmp_path, make_payload())


def test_a_missing_tensor_is_refused(saved: Saved) -> None:
    path, payload = saved
    with h5py.File(path, "r+") as file:
        del file["tensors/rng"]
    assert_refused(path, payload)


def assert_refused(path: Path, payload: memoryview, why: str = "") -> None:
    with pytest.raises(PersistError) as caught:
        read_shard(path, memoryview(bytearray(len(payload))))
    text = str(caught.value)
    assert str(path) in text and why in text and "\n" not in text


WRITER = """
import sys
from pathlib import Path
from gemini_hpc.arena import checksum
from gemini_hpc.persist.hdf5 import write_shard
from test_hdf5 import make_payload

path, count = Path(sys.argv[1]), int(sys.argv[2])
payload = make_payload(shapes=[(f"t{i}", "float32", (1 << 20,)) for i in range(count)])
print("ready", flush=True)
try:
    write_shard(path, payload, checksum(payload))
except Exception as error:
    print(type(error).__name__, error, sep=": ", flush=True)
    sys.exit(3)
"""


def writer(path: Path, count: int, **options: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    command = [sys.executable, "-c", WRITER, str(path), str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, **options)


def test_a_killed_writer_leaves_nothing_that_counts(tmp_path: Path) -> None:
    path = shard_path(tmp_path, 40, 0)
    with writer(path, count=24) as process:
        deadline = time.monotonic() + 60
        while not any(f.stat().st_size > 4 << 20 for f in path.parent.glob(".*.tmp")):
            assert process.poll() is None and time.monotonic() < deadline
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL, "it was done before the kill"
    assert [name.endswith(".tmp") for name in os.listdir(path.parent)] == [True]
    assert newest(tmp_path) is None


def test_a_failed_write_is_told_in_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    path = shard_path(tmp_path, 40, 0)
    limit = 3 << 20

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    with writer(path, count=2, preexec_fn=small_files) as process:
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 3
    assert output.splitlines()[1:] == [f"PersistError: cannot write {path}: File too large"]
    assert os.listdir(path.parent) == []
