"""Probes of the machine itself: its software, its kernel, its limits, its memory, its clock."""

import fcntl
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from importlib import metadata
from math import ceil

from gemini_hpc import versions as tested
from gemini_hpc.config.capacity import GIB, Room, check, memory_left
from gemini_hpc.core.messages import Hello
from gemini_hpc.runtime.channel import Channel, Listener
from gemini_hpc.runtime.children import DYING_WITH_US, KILL_S
from gemini_hpc.runtime.probes.examine import Case, Finding, ok, problem, warning
from gemini_hpc.runtime.processes import die_with_parent, kill, wait_exit

PACKAGES = (*tested.TESTED, "mpi4py", "mpich", "h5py", "submitit")
PYTHONS = ((3, 11), (3, 12))

FILES, FILES_PER_NODE = 64, 8
"""Open files of one process: twice what the agents had, which have the most (31, and 4 for each node, 2 to 7 nodes)."""

THREADS, THREADS_PER_NODE = 32, 22
"""Threads and processes of a run: 20 in the Python of a node (2 to 7 nodes) and its MPI launcher's."""

THREADS_TRIED = 4096
STACK_BYTES = 64 << 10

WATCH_S = 2.0
NAP_S = 0.005
BUSY = "import os; os.nice(5)\nwhile True: pass"
"""A process that computes, as nice as a worker."""


def versions(_case: Case) -> Finding:
    """The packages a run imports, and whether the hot swap knows them."""
    installed = {package.metadata["name"].lower() for package in metadata.distributions()}
    if missing := [name for name in PACKAGES if name not in installed]:
        return problem(f"{', '.join(missing)} not installed in {sys.prefix}: run make, or pip install them there")
    found = f"Python {platform.python_version()}, " + ", ".join(f"{n} {metadata.version(n)}" for n in PACKAGES)
    if sys.version_info[:2] not in PYTHONS:
        return warning(f"{found}: tested with Python 3.11 and 3.12 only: use one of them")
    if different := tested.mismatch():
        cure = " ".join(f"{name}=={version}" for name, version in tested.TESTED.items())
        return warning(f"{different}: a recovery builds engines anew (1 to 2 s): pip install {cure} for the hot swap")
    return ok(f"{found}: as tested, so recoveries swap hot")


def slurm_commands(_case: Case) -> Finding:
    """Whether jobs can be submitted from here at all."""
    if missing := [name for name in ("sbatch", "squeue", "scancel") if not shutil.which(name)]:
        return problem(f"no {', '.join(missing)} here: load Slurm's module, go to a login node, or take --site local")
    return ok(f"sbatch is {shutil.which('sbatch')}")


def kernel(case: Case) -> Finding:
    """What agents and supervisor need of it: pidfd, PR_SET_PDEATHSIG, packet sockets, flock."""
    _check_parental_death()
    listener = Listener(case.shared("agent.sock"))
    line = Channel.connect(case.shared("agent.sock"))
    line.send(Hello("node0", "worker", os.getpid(), 0))
    other_end = listener.accept()
    if other_end is None or not isinstance(other_end.receive(), Hello):
        return problem("a packet did not come out of a Unix socket: leave the sandbox (gVisor, WSL 1)")
    with open(case.shared("lock"), "w") as held, open(case.shared("lock"), "w") as asked:
        fcntl.flock(held, fcntl.LOCK_EX)
        try:
            fcntl.flock(asked, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return problem("flock lets two hold one lock: leave the sandbox, and put TMPDIR on a local disk")
        except BlockingIOError:
            pass
    return ok(f"Linux {platform.release()}: pidfd, PR_SET_PDEATHSIG, packet sockets and flock do as they should")


def _check_parental_death() -> None:
    """Have a child that dies with its parent, kill the parent, and see the child's end through a pidfd."""
    told, tell = os.pipe()
    we = os.getpid()
    if (parent := os.fork()) == 0:
        die_with_parent(we)
        me = os.getpid()
        if os.fork() == 0:
            die_with_parent(me)
            os.write(tell, str(os.getpid()).encode())
        signal.pause()
    child = os.pidfd_open(int(os.read(told, 20)))
    kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    if not wait_exit(child, KILL_S):
        signal.pidfd_send_signal(child, signal.SIGKILL)
        raise OSError("PR_SET_PDEATHSIG did not kill the child of a killed process")


def limits(case: Case) -> Finding:
    """The limits on this process, which all processes of a run inherit, against what they need."""
    cluster, needs = case.run.cluster, case.needs
    nodes = cluster.nodes + cluster.spares
    here = nodes if case.run.site.kind == "local" else 1
    files, threads = FILES + FILES_PER_NODE * nodes, THREADS + here * (THREADS_PER_NODE + case.run.train.threads)
    rows = [("open files", resource.RLIMIT_NOFILE, files, "n", 1)]
    if needs:
        rows.append(("bytes of a file", resource.RLIMIT_FSIZE, needs.arena_bytes, "f", 1024))
    for what, limit, needed, option, unit in rows:
        soft, hard = resource.getrlimit(limit)
        if soft != resource.RLIM_INFINITY and soft < needed:
            admit = "" if hard in (resource.RLIM_INFINITY, -1) or hard >= needed else " (first ask root to allow it)"
            return problem(f"{soft} {what}, {needed} needed: ulimit -{option} {ceil(needed / unit)}{admit}")
    tried = min(threads, THREADS_TRIED)
    if (started := _start_threads(tried)) < tried:
        return problem(
            f"only {started} of the {tried} threads of a run start: ulimit -u, or the container's pids limit"
        )
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    # InfiniBand's own verbs would pin the arenas; hosts use TCP (windows.launch)
    return ok(f"{soft} open files ({files} needed), {tried} threads started, memlock {_memlock()}: MPI runs over TCP")


def _memlock() -> str:
    soft = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return "unlimited, not needed" if soft == resource.RLIM_INFINITY else f"{soft >> 10} KiB, not needed"


def _start_threads(number: int) -> int:
    """Start so many threads at once, whatever limits them; return how many did."""
    threading.stack_size(STACK_BYTES)
    never = threading.Event()
    for started in range(number):
        try:
            threading.Thread(target=never.wait, daemon=True).start()  # they end with the probe's process
        except RuntimeError:
            return started
    return number


def memory(case: Case) -> Finding:
    """What this machine has left, and what a limit leaves of it. Memory files count: their pages are charged too."""
    machine, *limited = memory_left()
    left = min(machine, *limited) if limited else machine
    found = f"{machine / GIB:.1f} GiB left on this machine, "
    found += f"{left / GIB:.1f} by the cgroup's limit, which counts arenas too" if left < machine else "no lower limit"
    if not case.shapes:
        return ok(f"{found}; how much {case.run.train.entry} needs is known once it is built")
    needs = check(case.run, case.shapes, Room(None, left))
    return ok(f"{found}; the run needs {needs.memory_bytes / GIB:.1f} GiB, arenas included")


def clock(case: Case) -> Finding:
    """How long this process is kept from running while as many compute as in a run, against the heartbeats' timeout."""
    recovery, cores = case.run.recovery, len(os.sched_getaffinity(0))
    here = case.run.cluster.nodes if case.run.site.kind == "local" else 1
    busy = min(here * case.run.train.threads, 2 * cores)
    for _ in range(busy):
        subprocess.Popen([*DYING_WITH_US, sys.executable, "-I", "-S", "-c", BUSY])
    worst_s = _worst_stall()
    silence_s, timeout_s = worst_s + recovery.heartbeat_s, recovery.heartbeat_timeout_s
    found = (
        f"worst stall {worst_s * 1e3:.0f} ms in {WATCH_S:g} s while {busy} processes compute on {cores} cores; "
        f"a node is evicted after {timeout_s:g} s of silence"
    )
    cure = f"set recovery.heartbeat_timeout_s={ceil(40 * silence_s) / 10:g}, or give it more cores"
    if silence_s >= timeout_s:
        return problem(f"{found}: {cure}")
    return warning(f"{found}: {cure}") if silence_s >= timeout_s / 2 else ok(found)


def _worst_stall() -> float:
    end, worst_s = time.monotonic() + WATCH_S, 0.0
    while (before := time.monotonic()) < end:
        time.sleep(NAP_S)
        worst_s = max(worst_s, time.monotonic() - before - NAP_S)
    return worst_s
