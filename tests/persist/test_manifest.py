"""A directory is a checkpoint if and only if its manifest holds."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gemini_hpc.persist import (
    PersistError,
    ShardFile,
    checkpoint_dir,
    newest,
    prune,
    publish,
    shard_path,
    survey,
)

RANKS = 3

Damage = Callable[[Path], object]


def write_files(run_dir: Path, step: int) -> list[ShardFile]:
    entries = []
    for rank in range(RANKS):
        path = shard_path(run_dir, step, rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(100 + rank))
        entries.append(ShardFile(rank, path.name, 100 + rank, 2**64 - 1 - rank))
    return entries


def publish_step(run_dir: Path, step: int, entries: list[ShardFile] | None = None) -> Path:
    files = write_files(run_dir, step) if entries is None else entries
    return publish(run_dir, step, files, world_size=RANKS, run_id="r1", generation=2, fingerprint="f" * 8)


def test_what_is_published_is_found(tmp_path: Path) -> None:
    path = publish_step(tmp_path, 40)
    assert path == tmp_path / "checkpoints" / "step-00000040" / "manifest.json"
    found = newest(tmp_path)
    assert found is not None
    assert (found.step, found.world_size, found.run_id) == (40, RANKS, "r1")
    assert (found.generation, found.fingerprint, found.path) == (2, "f" * 8, path.parent)
    assert found.files == tuple(write_files(tmp_path, 40))
    assert sorted(os.listdir(path.parent)) == ["manifest.json", *(f.name for f in found.files)]


def test_the_order_of_the_entries_does_not_matter(tmp_path: Path) -> None:
    publish_step(tmp_path, 40, write_files(tmp_path, 40)[::-1])
    assert [f.rank for f in newest(tmp_path).files] == [0, 1, 2]


def test_the_newest_is_the_highest_step(tmp_path: Path) -> None:
    for step in (80, 40, 120):
        publish_step(tmp_path, step)
    assert newest(tmp_path).step == 120
    assert [m.step for m in survey(tmp_path)[0]] == [120, 80, 40]


def test_no_checkpoints_yet(tmp_path: Path) -> None:
    assert newest(tmp_path) is None
    assert survey(tmp_path) == ([], [])
    assert prune(tmp_path, 1) == []


def test_nothing_incomplete_is_published(tmp_path: Path) -> None:
    entries = write_files(tmp_path, 40)
    small = ShardFile(1, entries[1].name, 5, 0)
    elsewhere = ShardFile(1, "../step-00000040/rank-0001.h5", 101, 0)
    for bad, why in [
        (entries[:2], "ranks"),
        ([entries[0], entries[1], entries[1]], "ranks"),
        ([], "ranks"),
        ([entries[0], small, entries[2]], "instead of 5"),
        ([entries[0], elsewhere, entries[2]], "elsewhere"),
        ([entries[0], ShardFile(1, "rank-0009.h5", 101, 0), entries[2]], "No such file"),
    ]:
        with pytest.raises(PersistError, match=why):
            publish_step(tmp_path, 40, bad)
        assert newest(tmp_path) is None
        assert not list(tmp_path.rglob("manifest.json"))


def damage_json(directory: Path) -> None:
    path = directory / "manifest.json"
    path.write_text(path.read_text()[:-20])


def damage_field(field: str, value: object) -> Damage:
    def change(directory: Path) -> None:
        path = directory / "manifest.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))

    return change


def write(content: bytes) -> Damage:
    return lambda directory: (directory / "manifest.json").write_bytes(content)


DAMAGES: dict[str, tuple[Damage, str]] = {
    "truncated": (damage_json, "damaged"),
    "format": (damage_field("format", 9), "format 9"),
    "other step": (damage_field("step", 81), "belongs to step 81"),
    "step as text": (damage_field("step", "80"), "damaged"),
    "too few files": (damage_field("world_size", 4), "ranks"),
    "file without a name": (damage_field("files", [{"rank": 0}]), "damaged"),
    "no files": (damage_field("files", None), "damaged"),
    "not text": (write(b"\xff\x00"), "damaged"),
    "not an object": (write(b"[1]"), "damaged"),
    "nested": (write(b"[" * 100_000), "damaged"),
    "no manifest": (lambda d: (d / "manifest.json").unlink(), "never published"),
    "file gone": (lambda d: (d / "rank-0001.h5").unlink(), "rank-0001.h5"),
    "file cut": (lambda d: os.truncate(d / "rank-0002.h5", 7), "7 bytes instead of 102"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_one_is_named_and_the_one_before_it_is_used(tmp_path: Path, name: str) -> None:
    damage, why = DAMAGES[name]
    publish_step(tmp_path, 40)
    damage(publish_step(tmp_path, 80).parent)
    assert newest(tmp_path).step == 40
    valid, rejected = survey(tmp_path)
    assert [m.step for m in valid] == [40]
    assert len(rejected) == 1 and why in rejected[0] and "step-00000080" in rejected[0]
    assert "\n" not in rejected[0]


def test_prune_keeps_the_newest(tmp_path: Path) -> None:
    for step in (40, 80, 120, 160):
        publish_step(tmp_path, step)
    assert prune(tmp_path, 2) == [checkpoint_dir(tmp_path, 80), checkpoint_dir(tmp_path, 40)]
    assert [m.step for m in survey(tmp_path)[0]] == [160, 120]
    prune(tmp_path, 0)
    assert [m.step for m in survey(tmp_path)[0]] == [160]


def test_prune_removes_what_was_abandoned_but_not_what_is_being_written(tmp_path: Path) -> None:
    write_files(tmp_path, 40)
    publish_step(tmp_path, 80)
    write_files(tmp_path, 120)
    (tmp_path / "checkpoints" / "notes").mkdir()
    assert prune(tmp_path, 3) == [checkpoint_dir(tmp_path, 40)]
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["notes", "step-00000080", "step-00000120"]


def test_prune_does_not_count_a_damaged_one_and_leaves_it(tmp_path: Path) -> None:
    for step in (40, 80):
        publish_step(tmp_path, step)
    damage_json(publish_step(tmp_path, 120).parent)
    damage_json(publish_step(tmp_path, 20).parent)
    assert prune(tmp_path, 1) == [checkpoint_dir(tmp_path, 40)]
    assert newest(tmp_path).step == 80
    assert checkpoint_dir(tmp_path, 120).exists() and checkpoint_dir(tmp_path, 20).exists()


def test_prune_touches_nothing_while_nothing_is_published(tmp_path: Path) -> None:
    write_files(tmp_path, 40)
    assert prune(tmp_path, 1) == []
    assert checkpoint_dir(tmp_path, 40).exists()


def test_looking_for_checkpoints_loads_neither_h5py_nor_numpy() -> None:
    code = "import sys, gemini_hpc.persist; assert not {'h5py', 'numpy', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
