"""What `doctor`'s job runs: `python -m gemini_hpc.runtime.probes.job FOLDER` on its first node, `--node` on every one.

The first starts the second everywhere, in a step of its own, as a supervisor starts its agents. What is found goes to
the folder, where `nodes` on the login node reads it.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from gemini_hpc.config import RunConfig, read_run
from gemini_hpc.errors import GeminiError
from gemini_hpc.runtime.children import DYING_WITH_US, python
from gemini_hpc.runtime.paths import lock_path
from gemini_hpc.runtime.probes import between, compute, machine, network, storage
from gemini_hpc.runtime.probes.between import TOGETHER_S, Place
from gemini_hpc.runtime.probes.examine import Case, Finding, Level, Probe, examine
from gemini_hpc.runtime.probes.folder import Folder
from gemini_hpc.runtime.processes import RunLock
from gemini_hpc.slurm.control import step_environment, this_job

STEP = "gemini-doctor"
CASE, NODES, PING, OVER, SEEN = "case", "nodes", "ping", "over", "seen"
"""Files of the folder: what is examined; the job's nodes; the time on the login node, again and again; the status of
the step in the end; and that the login node has read it all."""

DONE = "done"
"""Stands for a probe in the last line of a node that has told everything; it has nothing to say by itself."""

LOCKING, MPI_WORLD = TOGETHER = "locking", "MPI world"
"""Probes that the nodes do together: the first speaks for all."""

OTHER_MPI = "load the module of an Open MPI 4 with PMIx in site.slurm_setup, or set site.mpi=mpich"

ABANDONED_S = 60.0
"""Without a new ping for so long nobody waits for what is found."""

WORLD_S = 20.0
"""For the pulls through an MPI world, which is given `recovery.world_s` twice to start."""

WATCH_S = 0.2
PONG_S = 0.05


def found_by(node: str) -> str:
    """Name the file of what a node finds: a line for each probe, in the order of `probes_on_node`."""
    return f"found-{node}"


def pong_of(node: str) -> str:
    """Name the file of a node's answers to PING: the time that it read there, and its own."""
    return f"pong-{node}"


def probes_on_node(run: RunConfig, place: Place) -> tuple[Probe, ...]:
    """Return what is examined on every node of the job, those last that the nodes do together."""
    archive_s, module = run.recovery.archive_s, "load Slurm's module in site.slurm_setup"
    alone = (
        Probe("versions", "the list of packages", 10, machine.versions, "install them anew: make"),
        Probe("Slurm", "Slurm's answers", 3 * run.site.call_timeout_s, compute.programs, module),
        Probe("kernel", "answers of the kernel", 10, machine.kernel, "ask the site for Linux 5.4 or newer"),
        Probe("limits", "threads to start", 10, machine.limits, "raise the limit (ulimit) in site.slurm_setup"),
        Probe("memory", "the sizes of memory", 10, machine.memory, "mount /proc"),
        Probe("memory files", f"an arena in {run.site.shm_dir}", 10, storage.memory_files, storage.ANOTHER_MEMORY),
        Probe("memory charge", "64 MiB of memory files", 20, compute.memory_charge, storage.ANOTHER_MEMORY),
        Probe("leftovers", "a list of dead runs", 10, storage.leftovers, storage.ANOTHER_MEMORY),
        Probe("clock", f"{machine.WATCH_S:g} s of ticks", 10 + machine.WATCH_S, machine.clock, "ask for more cores"),
        Probe("interface", "the list of interfaces", 10, compute.interface, network.other_interface()),
        Probe(
            "run directory",
            f"{storage.WRITE_BYTES >> 20} MiB on the disk of {run.site.runs_dir}",
            archive_s,
            storage.run_directory,
            "set site.runs_dir to a folder of yours on a file system that all nodes share",
            undo=storage.remove_trial,
        ),
    )
    if len(place.nodes) < 2:
        return alone
    locks = partial(between.locking, place)
    world = partial(between.mpi_world, place)
    # for this one they have met before, over the locks
    hosts, world_s = f"MPI world of {len(place.nodes)} window hosts", WORLD_S + 2 * run.recovery.world_s
    return (
        *alone,
        Probe(LOCKING, "answers of the other nodes", 2 * TOGETHER_S, locks, between.SHARED),
        Probe(MPI_WORLD, hosts, world_s, world, OTHER_MPI if run.site.mpi == "openmpi" else network.other_interface()),
    )


# --- on the first node: the batch script ---------------------------------------------------------------------


def lead(folder: Folder) -> int:
    """Start a probing program on every node, and wait until its end is seen; return the exit status of the step."""
    job = this_job(read_run(folder.path).site.call_timeout_s)
    nodes = job.nodes(os.environ.get("SLURM_JOB_NODELIST", ""))
    folder.post(NODES, nodes)
    step = subprocess.Popen(
        [*DYING_WITH_US, "/usr/bin/env", *job.step(nodes, STEP), *_program(folder)],
        env=step_environment(os.environ),
        stdin=subprocess.DEVNULL,
    )
    abandoned, status = _Abandoned(folder), None
    while status is None or not folder.read(SEEN):
        if abandoned():  # doctor was killed, and cannot clear up any more
            step.kill()
            folder.remove()
            return 1
        if status is None and (status := step.poll()) is not None:
            folder.post(OVER, status)
        time.sleep(WATCH_S)
    return status


def _program(folder: Folder) -> list[str]:
    return python("gemini_hpc.runtime.probes.job", str(folder.path), "--node")


class _Abandoned:
    """Whether the login node has not been heard of for long."""

    def __init__(self, folder: Folder) -> None:
        self._folder, self._last, self._heard = folder, None, time.monotonic()

    def __call__(self) -> bool:
        if (ping := self._folder.read(PING)) not in (None, self._last):
            self._last, self._heard = ping, time.monotonic()
        return time.monotonic() - self._heard > ABANDONED_S


# --- on every node --------------------------------------------------------------------------------------------


def probe_node(folder: Folder) -> int:
    """Examine this node, one probe after another. Raises KeyboardInterrupt when the job is cancelled."""
    told_to_end: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda told, _frame: told_to_end.append(told))
    run, node = read_run(folder.path), os.environ["SLURMD_NODENAME"]
    job = this_job(run.site.call_timeout_s)
    place = Place(folder, job, node, tuple(folder.wait(NODES, TOGETHER_S)))
    answer = _answering(folder, node)

    def tick() -> None:
        if told_to_end:
            raise KeyboardInterrupt
        answer()

    with _case(folder, run) as case:
        for probe in probes_on_node(run, place):
            began = time.monotonic()
            finding = examine(probe, case, tick)
            folder.add(found_by(node), entry(probe.name, finding, time.monotonic() - began))
    folder.add(found_by(node), entry(DONE, Finding(Level.OK, ""), 0.0))
    return 0


def entry(probe: str, finding: Finding, seconds: float) -> dict[str, object]:
    """Return a line of a node's file."""
    return {"probe": probe, "level": finding.level, "text": finding.text, "seconds": round(seconds, 3)}


@contextmanager
def _case(folder: Folder, run: RunConfig) -> Iterator[Case]:
    """Hold the case's lock on this node, as `doctor` does on its own."""
    told = folder.wait(CASE, TOGETHER_S)
    shapes = {preset: [(name, tuple(shape)) for name, shape in rows] for preset, rows in told["shapes"].items()}
    lock = RunLock(lock_path(told["id"]))
    if not lock.take():
        raise GeminiError("two nodes of the job are one machine: their agents would take each other's place")
    try:
        yield Case(run, shapes, told["id"])
    finally:
        lock.release()


def _answering(folder: Folder, node: str) -> Callable[[], None]:
    """Return what answers a new ping, when it is called often."""
    last, due = None, 0.0

    def answer() -> None:
        nonlocal last, due
        if (now := time.monotonic()) < due:
            return
        due = now + PONG_S
        if (ping := folder.read(PING)) not in (None, last):
            last = ping
            folder.post(pong_of(node), [ping, time.time()])

    return answer


def main() -> int:
    folder = Folder(Path(sys.argv[1]))
    if sys.argv[2:] != ["--node"]:
        return lead(folder)
    try:
        return probe_node(folder)
    except KeyboardInterrupt:
        return 130
    except GeminiError as error:  # nothing that a probe found: the node cannot be examined
        folder.add(found_by(os.environ["SLURMD_NODENAME"]), entry("node", Finding(Level.PROBLEM, str(error)), 0.0))
        return 1


if __name__ == "__main__":
    sys.exit(main())
