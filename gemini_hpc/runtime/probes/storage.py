"""Probes of the two places where bytes lie: the memory file system, and that of the run directories."""

import os
import platform
import re
import shutil
import time
from math import ceil
from pathlib import Path

from gemini_hpc.arena import Arena, Geometry, SnapshotIndex, checksum, layout
from gemini_hpc.config.capacity import GIB, Room, check, shm_left
from gemini_hpc.errors import GeminiError
from gemini_hpc.runtime.paths import lock_path
from gemini_hpc.runtime.probes.examine import Case, Finding, ok, problem, warning
from gemini_hpc.runtime.processes import is_held, traces
from gemini_hpc.runtime.wire import make_keys, read_keys
from gemini_hpc.windows import mpi_leftovers

TRIAL_BYTES = 1 << 20
WRITE_BYTES = 64 << 20
SOCKET_NAME_BYTES = 107
"""The longest path of a Unix socket."""

IN_MEMORY = ("tmpfs", "ramfs")
ANOTHER = "set site.runs_dir to a folder of yours"
ANOTHER_MEMORY = "set site.shm_dir to a tmpfs that you may write to"
NOT_TRIED = "not tried, as it needs site.shm_dir: mend that first"


def memory_files(case: Case) -> Finding:
    """The memory file system: whether it is one, takes an arena, and has room for all arenas of this machine."""
    directory, cluster = Path(case.run.site.shm_dir), case.run.cluster
    free = shm_left(case.run.site)
    socket = case.shared(f"node{cluster.nodes + cluster.spares}.sock")
    if (length := len(os.fsencode(socket))) > SOCKET_NAME_BYTES:
        return problem(
            f"a socket in {directory} has a name of {length} bytes, at most {SOCKET_NAME_BYTES} are allowed:"
            " set site.shm_dir to a shorter path"
        )
    arena = Arena.create(case.shared("trial.arena"), Geometry(2, TRIAL_BYTES), case.id)
    Arena.open(arena.path)  # refused where files do not keep their owner and mode
    kind = file_system(directory)
    found = f"{directory} is {kind}, {free / GIB:.1f} GiB free"
    if case.shapes:
        needs = check(case.run, case.shapes, Room(free, None))
        found += f"; arenas take {needs.shm_bytes / GIB:.2f} GiB, {needs.arena_bytes / 1e6:.1f} MB a node"
    if kind not in IN_MEMORY:
        return warning(f"{found}: snapshots would be as slow as a disk: {ANOTHER_MEMORY}")
    return ok(found)


def leftovers(case: Case) -> Finding:
    """What dead runs left in memory, which the next start sweeps, and what living ones use."""
    directory = Path(case.run.site.shm_dir)
    if not directory.is_dir():
        return warning(NOT_TRIED)
    runs = [run for run in traces(directory) if run != case.id]
    living = [run for run in runs if is_held(lock_path(run))]
    dead = [run for run in runs if run not in living]
    files = mpi_leftovers()
    alive = f"{len(living)} of your runs alive here with {_taken(directory, living) / GIB:.2f} GiB" if living else ""
    if not dead and not files:
        return ok(f"nothing of dead runs in {directory}" + (f"; {alive}" if alive else ""))
    left = f"dead runs ({len(dead)}) left {_taken(directory, dead) / GIB:.2f} GiB, and MPICH {len(files)} files"
    return warning(f"{left}{f'; {alive}' if alive else ''}: start any run, which sweeps them")


def run_directory(case: Case) -> Finding:
    """The file system of the run directories: room, a checkpoint's file as archivers write it, private keys."""
    place = existing(case)
    if not place.is_dir():
        return problem(f"{place} is no folder: {ANOTHER}")
    run, kind, free = case.run, file_system(place), _free(place)
    snapshot = case.needs.snapshot_bytes if case.needs else WRITE_BYTES
    checkpoint = run.cluster.nodes * snapshot
    needed = max(WRITE_BYTES, (run.protect.keep + 1) * checkpoint)
    wanted = Path(run.site.runs_dir).absolute()
    found = f"{wanted} {'is' if wanted == place else 'would be made'} on {kind}, {free / GIB:.1f} GiB free"
    if free < needed:
        return problem(f"{found}, {needed / GIB:.2f} GiB needed for checkpoints: lower protect.keep, or {ANOTHER}")
    trial = _trial(case)
    trial.mkdir(mode=0o700)
    try:
        speed = _write(trial)
    finally:
        shutil.rmtree(trial, ignore_errors=True)
    write_s = checkpoint / speed
    found += (
        f"; {WRITE_BYTES >> 20} MiB of HDF5 with fsync and rename at {speed / 1e6:.0f} MB/s: "
        f"{write_s:.2g} s a checkpoint of {checkpoint / 1e6:.0f} MB (archive_s {run.recovery.archive_s:g})"
    )
    if write_s > run.recovery.archive_s / 2:
        return warning(f"{found}: set recovery.archive_s={ceil(4 * write_s)}")
    if kind in IN_MEMORY:
        return warning(f"{found}: checkpoints there are lost with the machine: {ANOTHER} on a disk")
    return ok(found)


def remove_trial(case: Case) -> Finding:
    """Clear up after `run_directory`."""
    shutil.rmtree(_trial(case), ignore_errors=True)
    return problem(f"{_trial(case)} is left: remove it by hand") if _trial(case).exists() else ok("nothing left")


def file_system(path: Path) -> str:
    """Return the type of the file system that `path` lies on."""
    path, kind, depth = path.resolve(), "unknown", -1
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        mounted = Path(re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), fields[4]))
        if path.is_relative_to(mounted) and len(mounted.parts) >= depth:  # of two at one place, the later is on top
            kind, depth = fields[fields.index("-") + 1], len(mounted.parts)
    return kind


def _free(place: Path) -> int:
    status = os.statvfs(place)
    return status.f_bavail * status.f_frsize


def _taken(directory: Path, runs: list[str]) -> int:
    return sum(path.lstat().st_blocks * 512 for run in runs for path in directory.glob(f"gemini-{run}-*"))


def existing(case: Case) -> Path:
    """Return site.runs_dir, or where `submit` would make it."""
    wanted = Path(case.run.site.runs_dir).absolute()
    return next(path for path in (wanted, *wanted.parents) if path.exists())


def _trial(case: Case) -> Path:
    # with the machine's name, as the nodes of a job try it all at once
    return existing(case) / f".gemini-doctor-{case.id}-{platform.node()}"


def _write(trial: Path) -> float:
    """Do what a run does there; return the speed of a checkpoint's file, bytes per second."""
    from gemini_hpc.persist.hdf5 import write_shard  # h5py and numpy: not in the command line's own process

    try:
        make_keys(trial / "keys.json")
        read_keys(trial / "keys.json")
    except GeminiError as error:
        raise GeminiError(f"{trial.parent} does not keep owner and mode of the run's keys") from error
    payload = _snapshot()
    began = time.monotonic()
    write_shard(trial / "rank-0000.h5", payload, checksum(payload))
    return WRITE_BYTES / (time.monotonic() - began)


def _snapshot() -> memoryview:
    """Make up a snapshot; random, so that no file system can make it smaller."""
    tensors, nbytes = layout([("state", "float32", (WRITE_BYTES // 4,))])
    payload = memoryview(bytearray(nbytes))
    SnapshotIndex(0, 1, 1, nbytes, tensors, {}).write(payload)
    payload[tensors[0].offset :] = os.urandom(tensors[0].nbytes)
    return payload
