"""How much memory a run needs, how much there is, and what would fit. Computed before anything is started.

All of it is arithmetic on parameter shapes, but for `room_at`, `shm_left`, `memory_left` and `cgroup_used`, which look
at a machine.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, prod
from pathlib import Path
from typing import NamedTuple

from gemini_hpc.config.run import RunConfig
from gemini_hpc.config.site import SiteConfig
from gemini_hpc.core.placement import areas
from gemini_hpc.errors import UserError

Shapes = Sequence[tuple[str, tuple[int, ...]]]
"""(name, shape) of every parameter of a model."""

STATE_BYTES = 12
"""Of one parameter in a snapshot: the fp32 master and Adam's two moments."""

TRAIN_BYTES = 16
"""Of one parameter on the rank that owns it: STATE_BYTES and its gradient."""

BUILD_BYTES = 4
"""Of one parameter in every worker while the model is built whole, before DeepSpeed partitions it."""

WORKER_BASE_BYTES = 512 << 20
"""A worker without a model (0.36 GiB measured, torch 2.13, DeepSpeed 0.19.8) and a node's small processes."""

INDEX_BYTES = 256 << 10
"""The index at the head of a snapshot (arena/snapshot.py)."""

ALIGN_BYTES = 64
"""Tensors of a snapshot start at multiples of this."""

PARAM_GROUPS = 2
"""DeepSpeed flattens each parameter group of the optimizer: with and without weight decay."""

PAGE_BYTES = 4096

GIB = 1 << 30


@dataclass(frozen=True)
class Needs:
    """What a run takes, in bytes; `shm_bytes` and `memory_bytes` on the machine that carries the most."""

    snapshot_bytes: int  # one rank's state at one step
    arena_bytes: int  # of one node: two halves for each snapshot it holds
    worker_bytes: int  # of one worker process
    shm_bytes: int  # all arenas of the machine
    memory_bytes: int  # its workers and, since /dev/shm is memory too, its arenas


@dataclass(frozen=True)
class Room:
    """What a machine has to give, in bytes; None where it cannot be known from here."""

    shm_bytes: int | None
    memory_bytes: int | None


def plan(config: RunConfig, shapes: Shapes) -> Needs:
    """Compute what the run needs. On a local site all nodes and spares share one machine."""
    ranks = config.cluster.nodes
    snapshot = snapshot_bytes(shapes, ranks)
    arena = arena_bytes(snapshot, areas_of(config))
    parameters = sum(prod(shape) for _, shape in shapes)
    worker = WORKER_BASE_BYTES + TRAIN_BYTES * partition_numel(shapes, ranks) + BUILD_BYTES * parameters
    neighbors = ranks + config.cluster.spares if config.site.kind == "local" else 1
    return Needs(snapshot, arena, worker, neighbors * arena, neighbors * (arena + worker))


def partition_numel(shapes: Shapes, world_size: int) -> int:
    """Return how many elements of the parameters each rank owns, padding included.

    ZeRO-3 cuts every parameter into world_size equal pieces, the last one padded, and lays a rank's pieces
    flat: DeepSpeed 0.19.8, zero/partition_parameters.py `_padding_size`, zero/stage3.py
    `fp16_partitioned_groups_flat_numel`.
    """
    return sum(-(-prod(shape) // world_size) for _, shape in shapes)


def snapshot_bytes(shapes: Shapes, world_size: int) -> int:
    """Return an upper bound of one rank's snapshot: index, fp32 master and Adam's moments, alignment."""
    gaps = ALIGN_BYTES * 3 * PARAM_GROUPS
    return INDEX_BYTES + STATE_BYTES * partition_numel(shapes, world_size) + gaps


def areas_of(config: RunConfig) -> int:
    """Return how many snapshots a node has room for, its own included."""
    return areas(config.cluster.nodes, config.protect.replicas, config.protect.placement)


def arena_bytes(snapshot: int, held: int) -> int:
    """Return the size of a node's arena: two halves for each of the `held` snapshots, its own included."""
    half = -(-snapshot // PAGE_BYTES) * PAGE_BYTES
    return 2 * PAGE_BYTES + 2 * held * half


def check(config: RunConfig, presets: Mapping[str, Shapes], room: Room) -> Needs:
    """Return what the run needs, after comparing it with `room`.

    `presets` holds the shapes of each size that `model.preset` may name (for proposals), config's own too.
    Raises UserError with what is needed, what there is, and what would fit.
    """
    needs = plan(config, presets[config.model.preset])
    shortage = _shortage(config.site, needs, room)
    if shortage:
        raise UserError(f"model {config.model.preset} does not fit: {shortage}: {_proposal(config, presets, room)}")
    return needs


def room_at(site: SiteConfig) -> Room:
    """Return what this machine has to give now (local), or what will be asked of Slurm for each node."""
    if site.kind == "slurm":
        return Room(None, None if site.mem_gb is None else int(site.mem_gb * GIB))
    return Room(shm_left(site), min(memory_left()))


def shm_left(site: SiteConfig) -> int:
    """Return the bytes that are free in the memory file system of this machine."""
    try:
        shm = os.statvfs(site.shm_dir)
    except OSError as failed:
        raise UserError(f"site.shm_dir {site.shm_dir}: {failed.strerror}: name a memory file system") from None
    return shm.f_bavail * shm.f_frsize


def memory_left() -> list[int]:
    """Return the bytes of memory that this machine has left, then those left under each limit on this process."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) << 10
    return [available, *cgroup_room(Path("/proc/self/cgroup").read_text(), Path("/sys/fs/cgroup"))]


def cgroup_room(membership: str, root: Path) -> Iterable[int]:
    """Yield the bytes left under each memory limit on this process: `membership` is /proc/self/cgroup.

    Reads version 2 and version 1 below `root`. What the kernel can drop from its file cache counts as left.
    """
    for group, files in _memory_groups(membership, root):
        try:
            most = int((group / files.limit).read_text())
            stat = dict(entry.split() for entry in (group / "memory.stat").read_text().splitlines())
            yield most - int((group / files.used).read_text()) + int(stat.get(files.cache, "0"))
        except (OSError, ValueError):  # no such group in this namespace, or "max": no limit here
            continue


def cgroup_used(membership: str, root: Path, name: str) -> int | None:
    """Return the bytes that the memory group `name` of this process is charged with; None = it is in none."""
    for group, files in _memory_groups(membership, root):
        if group.name == name:
            try:
                return int((group / files.used).read_text())
            except (OSError, ValueError):  # it is shown, but not in this namespace
                continue
    return None


class _GroupFiles(NamedTuple):
    """What the files of a memory group are called, and the file cache in its memory.stat."""

    limit: str
    used: str
    cache: str


_VERSION_1 = _GroupFiles("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_VERSION_2 = _GroupFiles("memory.max", "memory.current", "inactive_file")


def _memory_groups(membership: str, root: Path) -> Iterator[tuple[Path, _GroupFiles]]:
    """Yield the memory groups that this process is in, the innermost first."""
    for line in membership.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, files = root, _VERSION_2
        elif "memory" in controllers.split(","):
            base, files = root / "memory", _VERSION_1
        else:
            continue
        leaf = base / path.lstrip("/")
        for group in (leaf, *leaf.parents):
            if group == base.parent:
                break
            yield group, files


def _shortage(site: SiteConfig, needs: Needs, room: Room) -> str | None:
    where = "this machine" if site.kind == "local" else "each node"
    if room.shm_bytes is not None and needs.shm_bytes > room.shm_bytes:
        free = f"{site.shm_dir} has {_gib(room.shm_bytes)} free"
        return f"the arenas need {_gib(needs.shm_bytes)} and {free}"
    if room.memory_bytes is not None and needs.memory_bytes > room.memory_bytes:
        return f"{where} needs {_gib(needs.memory_bytes)} of memory and has {_gib(room.memory_bytes)}"
    return None


def _proposal(config: RunConfig, presets: Mapping[str, Shapes], room: Room) -> str:
    """What to type instead: the largest preset that fits, more memory of Slurm, or fewer virtual nodes."""

    def fits(config: RunConfig, preset: str) -> bool:
        return _shortage(config.site, plan(config, presets[preset]), room) is None

    by_size = sorted(presets, key=lambda name: plan(config, presets[name]).snapshot_bytes)
    fitting = [name for name in by_size if fits(config, name)]
    smaller_model = f"set model.preset={fitting[-1]}, the largest that fits" if fitting else ""
    if config.site.kind == "slurm":
        enough = ceil(plan(config, presets[config.model.preset]).memory_bytes / GIB)
        return f"set site.mem_gb={enough}" + (f", or {smaller_model}" if smaller_model else "")
    if smaller_model:
        return smaller_model
    for nodes in range(config.cluster.nodes - 1, config.protect.replicas - 1, -1):
        cluster = config.cluster.model_copy(update={"nodes": nodes})
        if fits(config.model_copy(update={"cluster": cluster}), by_size[0]):
            return f"set model.preset={by_size[0]} cluster.nodes={nodes}, the most that fit"
    return "free some memory, or use a larger machine"


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB"
