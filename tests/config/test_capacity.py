"""Memory is computed from shapes alone, before anything starts, and a shortage says what would fit."""

from math import prod
from pathlib import Path

import pytest

from gemini_hpc.arena import arena, snapshot
from gemini_hpc.config import capacity, load_run
from gemini_hpc.config.capacity import GIB, Room, Shapes, check, plan
from gemini_hpc.errors import UserError

SMALL: Shapes = [("a", (1000, 1000)), ("b", (7,)), ("c", (3, 3))]
LARGE: Shapes = [("a", (100_000, 10_000))]
PRESETS = {"tiny": SMALL, "small": LARGE}
MUCH = Room(1000 * GIB, 1000 * GIB)


def test_every_parameter_is_cut_into_equal_pieces() -> None:
    assert capacity.partition_numel(SMALL, 4) == 250_000 + 2 + 3
    assert capacity.partition_numel(SMALL, 1) == sum(prod(shape) for _, shape in SMALL)


def test_the_arena_holds_what_the_arena_room_makes_of_it() -> None:
    """The sizes computed here are those of the real layout, never less."""
    numel = capacity.partition_numel(SMALL, 4)
    groups = [numel - 7, 7]  # with and without weight decay
    shapes = {f"{kind}/{group}": (size,) for kind in ("master", "m", "v") for group, size in enumerate(groups)}
    offset = snapshot.INDEX_BYTES
    for (size,) in shapes.values():
        offset = -(-offset // capacity.ALIGN_BYTES) * capacity.ALIGN_BYTES + 4 * size
    bound = capacity.snapshot_bytes(SMALL, 4)
    assert offset <= bound <= offset + 6 * capacity.ALIGN_BYTES
    for replicas in (1, 2, 3):
        assert arena.Geometry(replicas, bound).arena_bytes == capacity.arena_bytes(bound, replicas)


def test_virtual_nodes_share_one_machine_and_real_ones_do_not() -> None:
    local = plan(load_run(site="local"), SMALL)
    slurm = plan(load_run(site="generic_slurm"), SMALL)
    assert (local.snapshot_bytes, local.arena_bytes) == (slurm.snapshot_bytes, slurm.arena_bytes)
    assert local.shm_bytes == 5 * local.arena_bytes
    assert slurm.shm_bytes == slurm.arena_bytes
    assert slurm.memory_bytes == slurm.arena_bytes + slurm.worker_bytes


def test_what_fits_is_accepted_to_the_byte() -> None:
    run = load_run(site="local", overrides=["model.preset=tiny"])
    needs = plan(run, SMALL)
    assert check(run, PRESETS, Room(needs.shm_bytes, needs.memory_bytes)) == needs
    assert check(run, PRESETS, Room(None, None)) == needs
    with pytest.raises(UserError):
        check(run, PRESETS, Room(needs.shm_bytes - 1, needs.memory_bytes))
    with pytest.raises(UserError):
        check(run, PRESETS, Room(needs.shm_bytes, needs.memory_bytes - 1))


def test_too_little_shared_memory_names_the_largest_preset_that_fits() -> None:
    run = load_run(site="local")
    with pytest.raises(UserError, match=r"55\.\d+ GiB and /dev/shm has 2\.00 GiB.*set model\.preset=tiny"):
        check(run, PRESETS, Room(2 * GIB, 1000 * GIB))


def test_too_little_memory_names_the_nodes_that_fit() -> None:
    run = load_run(site="local", overrides=["model.preset=tiny"])
    with pytest.raises(UserError, match=r"this machine needs 2\.\d+ GiB.*has 2\.00 GiB.*cluster\.nodes=2") as caught:
        check(run, PRESETS, Room(2 * GIB, 2 * GIB))
    smaller = load_run(site="local", overrides=["model.preset=tiny", "cluster.nodes=2"])
    assert check(smaller, PRESETS, Room(2 * GIB, 2 * GIB))
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="larger machine"):
        check(run, PRESETS, Room(1024, 1024))


def test_a_slurm_site_is_told_how_much_to_ask_for() -> None:
    run = load_run(site="generic_slurm", overrides=["site.mem_gb=3"])
    with pytest.raises(
        UserError, match=r"each node needs .*has 3\.00 GiB.*site\.mem_gb=\d+, or set model\.preset=tiny"
    ) as caught:
        check(run, PRESETS, capacity.room_at(run.site))
    enough = str(caught.value).split("site.mem_gb=")[1].split(",")[0]
    more = load_run(site="generic_slurm", overrides=[f"site.mem_gb={enough}"])
    assert check(more, PRESETS, capacity.room_at(more.site))


def test_this_machine_is_measured() -> None:
    room = capacity.room_at(load_run(site="local").site)
    assert room.shm_bytes is not None and room.shm_bytes > 0
    assert room.memory_bytes is not None and room.memory_bytes > 64 << 20
    assert capacity.room_at(load_run(site="generic_slurm").site) == Room(None, None)
    with pytest.raises(UserError, match=r"site\.shm_dir"):
        capacity.room_at(load_run(site="local", overrides=["site.shm_dir=/no/such/place"]).site)


def test_memory_limits_of_control_groups(tmp_path: Path) -> None:
    def group(path: str, **files: str) -> None:
        (tmp_path / path).mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (tmp_path / path / name.replace("__", ".")).write_text(text + "\n")

    group("job", memory__max="1000", memory__current="700", memory__stat="anon 500\ninactive_file 50")
    group("job/step", memory__max="max", memory__current="10", memory__stat="inactive_file 0")
    group(
        "memory/a",
        memory__limit_in_bytes="900",
        memory__usage_in_bytes="100",
        memory__stat="total_inactive_file 5",
    )
    version2, version1 = "0::/job/step\n", "4:cpu,cpuacct:/a\n9:memory:/a/gone\n0::/\n"
    assert list(capacity.cgroup_room(version2, tmp_path)) == [350]
    assert list(capacity.cgroup_room(version1, tmp_path)) == [805]
    assert capacity.cgroup_used(version2, tmp_path, "step") == 10
    assert capacity.cgroup_used(version2, tmp_path, "job") == 700
    assert capacity.cgroup_used(version1, tmp_path, "a") == 100
    assert capacity.cgroup_used(version1, tmp_path, "gone") is None
    assert capacity.cgroup_used(version2, tmp_path, "other") is None
