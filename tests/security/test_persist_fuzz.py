"""The persistent tier: manifests and shards of any content are refused in one line, and lead nowhere else."""

import json
import os
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gemini_hpc.arena import SnapshotIndex, checksum, layout
from gemini_hpc.persist import Manifest, PersistError, ShardFile, newest, prune, publish, shard_path, survey
from gemini_hpc.persist.hdf5 import read_shard, write_shard

FUZZ = settings(
    max_examples=120, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
TEXT = st.text(st.characters(exclude_categories=()), max_size=6)  # surrogates and zero bytes too
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)
NAMES = [
    "",
    ".",
    "..",
    "/etc/passwd",
    "../step-00000040/rank-0001.h5",
    "rank-0001.h5/",
    "./rank-0001.h5",
    "a\0b",
    "\ud800",
    "rank-0001.h5\nsecond line",
    "\x1b[2J",
    "x" * 5000,
    "manifest.json",
]


def surveyed(run_dir: Path) -> Manifest | None:
    """Look for checkpoints as `submit`, `report` and the agents do; what is no checkpoint is one line."""
    valid, rejected = survey(run_dir)
    for line in rejected:
        assert "\n" not in line and "\x1b" not in line and "step-" in line
    for manifest in valid:
        assert [file.rank for file in manifest.files] == list(range(manifest.world_size))
        for file in manifest.files:
            path = manifest.path / file.name
            assert path.parent == manifest.path and path.is_file() and not path.is_symlink()
    prune(run_dir, 5)
    return newest(run_dir)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    entries = []
    for rank in range(2):
        path = shard_path(tmp_path, 40, rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(100))
        entries.append(ShardFile(rank, path.name, 100, 1))
    publish(tmp_path, 40, entries, world_size=2, run_id="r", generation=1, fingerprint="f")
    assert surveyed(tmp_path) is not None
    return tmp_path


def manifest_of(run_dir: Path) -> Path:
    return run_dir / "checkpoints" / "step-00000040" / "manifest.json"


def good(run_dir: Path) -> dict[str, Any]:
    path = manifest_of(run_dir).with_name("good.json")
    if not path.exists():
        path.write_bytes(manifest_of(run_dir).read_bytes())
    return dict(json.loads(path.read_text()))


FIELDS = ["format", "step", "world_size", "run_id", "generation", "fingerprint", "files"]


@FUZZ
@given(field=st.sampled_from([*FIELDS, "more"]), value=VALUES | st.integers(0, 2**80))
def test_any_value_in_a_manifest(run_dir: Path, field: str, value: Any) -> None:
    manifest_of(run_dir).write_text(json.dumps({**good(run_dir), field: value}))
    surveyed(run_dir)


@FUZZ
@given(
    field=st.sampled_from(["rank", "name", "bytes", "checksum"]),
    value=VALUES | st.sampled_from(NAMES),
    both=st.booleans(),
)
def test_any_value_in_an_entry(run_dir: Path, field: str, value: Any, both: bool) -> None:
    raw = good(run_dir)
    for entry in raw["files"][: 1 + both]:
        entry[field] = value
    manifest_of(run_dir).write_text(json.dumps(raw))
    surveyed(run_dir)


@pytest.mark.parametrize("name", NAMES, ids=lambda name: ascii(name)[:30])
def test_a_name_that_leads_elsewhere(run_dir: Path, name: str) -> None:
    """Whatever size it claims: a folder and a device have sizes too."""
    for nbytes in (0, 100, 4096, manifest_of(run_dir).stat().st_size, os.stat("/etc/passwd").st_size):
        raw = good(run_dir)
        raw["files"][1] |= {"name": name, "bytes": nbytes}
        manifest_of(run_dir).write_text(json.dumps(raw))
        assert surveyed(run_dir) is None


@FUZZ
@given(st.binary(max_size=200) | st.sampled_from([b"[" * 200_000, b"9" * 5000, b"1e999", b"null", b'{"format":1}']))
def test_any_manifest(run_dir: Path, content: bytes) -> None:
    manifest_of(run_dir).write_bytes(content)
    assert surveyed(run_dir) is None


@FUZZ
@given(st.data())
def test_a_changed_manifest(run_dir: Path, data: Any) -> None:
    text = bytearray(json.dumps(good(run_dir)).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(text) - 1))
        piece = data.draw(st.sampled_from([b"", b"-", b"0", b"1e999", b"null", b'"', b"[", b"}", b"\xff", b"\\ud800"]))
        text[place : place + data.draw(st.integers(0, 3))] = piece
    manifest_of(run_dir).write_bytes(text)
    surveyed(run_dir)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("what", ["manifest.json", "rank-0001.h5"])
@pytest.mark.parametrize("kind", ["pipe", "link", "link to a pipe", "folder", "link to nowhere", "link to itself"])
def test_what_is_no_plain_file(run_dir: Path, what: str, kind: str) -> None:
    """A pipe would hold up whoever opens it, for ever."""
    path = manifest_of(run_dir).with_name(what)
    kept = run_dir / "elsewhere"
    path.rename(kept)
    if "pipe" in kind:
        kept.unlink()
        os.mkfifo(kept if "link" in kind else path)
    if kind == "folder":
        path.mkdir()
    elif kind == "link to nowhere":
        path.symlink_to(run_dir / "nowhere")
    elif kind == "link to itself":
        path.symlink_to(path)
    elif "link" in kind:
        path.symlink_to(kept)
    assert surveyed(run_dir) is None


def test_a_manifest_of_a_huge_size(run_dir: Path) -> None:
    os.truncate(manifest_of(run_dir), 1 << 40)
    assert surveyed(run_dir) is None


def test_prune_follows_no_links(run_dir: Path) -> None:
    victim = run_dir / "victim"
    victim.mkdir()
    (victim / "precious").write_text("kept")
    (run_dir / "checkpoints" / "step-00000010").symlink_to(victim)
    folder = run_dir / "checkpoints" / "step-00000020"
    folder.mkdir()
    (folder / "link").symlink_to(victim)
    prune(run_dir, 1)
    assert (victim / "precious").read_text() == "kept"
    assert not folder.exists()


# --- shards -----------------------------------------------------------------------------------------------

SHAPES = [("group0/master", "float32", (300,)), ("mask", "bool", (7,)), ("empty", "int64", (0, 2))]


def payload() -> memoryview:
    specs, nbytes = layout(SHAPES)
    raw = memoryview(bytearray(nbytes))
    SnapshotIndex(1, 40, 4, nbytes, specs, {"lr": 0.1}).write(raw)
    raw[specs[0].offset : specs[0].offset + 1200] = bytes(range(240)) * 5
    return raw


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    path = tmp_path / "rank-0001.h5"
    write_shard(path, payload(), checksum(payload()))
    return path


def loaded(path: Path) -> bool:
    """Read it as an archiver does: True with the bytes that were saved, False when refused in one line."""
    out = memoryview(bytearray(len(payload())))
    try:
        found = read_shard(path, out)
    except PersistError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return False
    assert found == checksum(payload()) and out == payload()
    return True


def test_the_good_one_is_read(shard: Path) -> None:
    assert loaded(shard)


ATTRIBUTES = [
    float("nan"),
    float("inf"),
    -1,
    2**63,
    "1",
    b"1",
    "",
    [1, 2],
    [],
    [[1]],
    np.float64(1),
    np.zeros((2, 2)),
    h5py.Empty("f4"),
    np.array([("a", 1)], dtype=[("x", "S1"), ("y", "i4")]),
    np.bool_(True),
    np.complex128(1j),
]


@pytest.mark.parametrize("name", ["format", "checksum"])
@pytest.mark.parametrize("number", range(len(ATTRIBUTES)))
def test_any_attribute(shard: Path, name: str, number: int) -> None:
    with h5py.File(shard, "r+") as file:
        del file.attrs[name]
        file.attrs[name] = ATTRIBUTES[number]
    assert not loaded(shard)


def test_attributes_that_are_not_there(shard: Path) -> None:
    with h5py.File(shard, "r+") as file:
        del file.attrs["checksum"]
    assert not loaded(shard)


def replace_tensor(file: h5py.File, how: str, folder: Path) -> None:
    place, values = "tensors/group0/master", file["tensors/group0/master"][()]
    outside = folder / "outside.h5"
    with h5py.File(outside, "w") as other:
        other["secret"] = values
    (folder / "raw").write_bytes(values.tobytes())
    del file[place]
    if how == "a group":
        file.create_group(place)
    elif how == "a type":
        file[place] = np.dtype("f4")
    elif how == "of other files: link":
        file[place] = h5py.ExternalLink(str(outside), "secret")
    elif how == "of other files: raw bytes":
        file.create_dataset(place, (300,), "<f4", external=[(str(folder / "raw"), 0, 1200)])
    elif how == "of other files: virtual":
        layout = h5py.VirtualLayout((300,), "<f4")
        layout[:] = h5py.VirtualSource(str(outside), "secret", (300,))
        file.create_virtual_dataset(place, layout)
    elif how == "a link in circles":
        file[place] = h5py.SoftLink(f"/{place}")
    elif how == "a link to nowhere":
        file[place] = h5py.SoftLink("/nowhere")
    elif how == "objects":
        file.create_dataset(place, (300,), h5py.string_dtype())
    elif how == "references":
        file.create_dataset(place, (300,), h5py.ref_dtype)
    elif how == "structures":
        file.create_dataset(place, (300,), [("a", "<f4")])
    elif how == "nothing":
        file.create_dataset(place, data=h5py.Empty("<f4"))
    elif how == "big-endian":
        file.create_dataset(place, data=values.astype(">f4"))
    elif how == "huge":
        file.create_dataset(place, (2**40,), "<f4", chunks=(1024,))
    elif how == "another shape":
        file.create_dataset(place, data=values.reshape(3, 100))
    elif how == "compressed":
        file.create_dataset(place, data=values, compression="gzip")


HOWS = [
    *("a group", "a type", "of other files: link", "of other files: raw bytes", "of other files: virtual"),
    *("a link in circles", "a link to nowhere", "objects", "references", "structures", "nothing", "big-endian"),
    *("huge", "another shape", "compressed"),
]


@pytest.mark.parametrize("how", HOWS)
def test_a_tensor_that_is_something_else(shard: Path, tmp_path: Path, how: str) -> None:
    """The right bytes from the wrong place are refused as well: what is read is in this one file, as we write it."""
    with h5py.File(shard, "r+") as file:
        replace_tensor(file, how, tmp_path)
    assert not loaded(shard)


@pytest.mark.parametrize("how", ["a group", "objects", "an array", "empty", "a link", "huge", "of a name that climbs"])
def test_an_index_that_is_something_else(shard: Path, how: str) -> None:
    with h5py.File(shard, "r+") as file:
        text = bytes(file["index"][()])
        del file["index"]
        if how == "a group":
            file.create_group("index")
        elif how == "objects":
            file.create_dataset("index", data=text.decode(), dtype=h5py.string_dtype())
        elif how == "an array":
            file["index"] = np.array([np.bytes_(text)])
        elif how == "empty":
            file["index"] = h5py.Empty("S10")
        elif how == "a link":
            file["index"] = h5py.ExternalLink("/etc/passwd", "x")
        elif how == "huge":
            file["index"] = np.bytes_(text.ljust(70_000))
        else:
            file["index"] = np.bytes_(text.replace(b'"mask"', b'"../index"'))
    assert not loaded(shard)


@pytest.mark.parametrize("name", ["", ".", "/", "group0", "group0/master/x", "\ud800", "a\0b", "x" * 3000, "é" * 600])
def test_an_index_that_names_no_tensor(shard: Path, name: str) -> None:
    with h5py.File(shard, "r+") as file:
        text = bytes(file["index"][()])
        del file["index"]
        file["index"] = np.bytes_(text.replace(b'"mask"', json.dumps(name).encode()))
    assert not loaded(shard)


@FUZZ
@given(st.data())
def test_changed_bytes_of_a_shard(shard: Path, data: Any) -> None:
    """Of HDF5's own structures mostly: they lie at the beginning, and between the datasets."""
    path = shard.with_name("changed.h5")
    content = bytearray(shard.read_bytes())
    for _ in range(data.draw(st.integers(1, 5))):
        place = data.draw(st.integers(0, 2500) | st.integers(0, len(content) - 1))
        content[place : place + 1] = data.draw(st.binary(min_size=1, max_size=4) | st.just(b"\xff" * 8))
    path.write_bytes(content)
    loaded(path)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", ["pipe", "folder", "link to nowhere", "unreadable name"])
def test_a_shard_that_is_no_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "rank-0001.h5"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "link to nowhere":
        path.symlink_to(tmp_path / "nowhere")
    else:
        path = tmp_path / "a\0b"
    assert not loaded(path)
