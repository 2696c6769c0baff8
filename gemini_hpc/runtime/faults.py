"""Failures on purpose, on the real processes: what `drill` and a run's scheduled drills do.

Each is recorded before it happens, so that the time to its detection can be told: as an event "fault" where it takes
something away, and as a "drill" where nothing may be lost by it alone.
"""

import ctypes
import errno
import os
import random
import signal
import socket
import stat
import time
from collections.abc import Callable
from pathlib import Path
from shlex import quote

from gemini_hpc.arena import OWN, Arena, State
from gemini_hpc.errors import UserError
from gemini_hpc.persist import manifest
from gemini_hpc.runtime.paths import RunPaths
from gemini_hpc.runtime.processes import NODE_MARK, kill, kill_marked, marked
from gemini_hpc.runtime.status_file import read_status
from gemini_hpc.telemetry import EventLog

WORKER = "gemini_hpc.runtime.worker"
AGENT = "gemini_hpc.runtime.agent"

SLOW_S = 5.0
SLOW_STOP_S, SLOW_GO_S = 0.09, 0.01
"""A slow node gets a tenth of the time, in pieces too short to be taken for a hang."""

_PIDFD_GETFD = 438
"""The system call, since Linux 5.6, on every architecture."""

LOOK_S = 0.5
"""How often the loop looks whether the run still lives."""


def kill_node(paths: RunPaths, node: str, **where: object) -> None:
    """Take a virtual node away: its memory, and all its processes by SIGKILL; the caller last, if it is one."""
    pids = _processes(paths, node)
    inside = os.environ.get(NODE_MARK) == _mark(paths, node)
    _record(paths, node, "kill_node", **where)
    # the memory first, and the agent after its other children: the kernel kills them with it, the caller too
    paths.arena(node).unlink(missing_ok=True)
    agent = os.getppid() if inside else None
    for pid in sorted(pids, key=lambda pid: pid == agent):
        kill(pid, signal.SIGKILL)
    if inside:
        kill(os.getpid(), signal.SIGKILL)
    kill_marked(NODE_MARK, _mark(paths, node))


def kill_worker(paths: RunPaths, node: str, **where: object) -> None:
    """End the training process of `node` by SIGKILL; the node lives."""
    _signal_worker(paths, node, "kill_worker", signal.SIGKILL, **where)


def stop_worker(paths: RunPaths, node: str, **where: object) -> None:
    """Stop the training process of `node`: it hangs, and nobody's connection breaks."""
    _signal_worker(paths, node, "stop_worker", signal.SIGSTOP, **where)


def stop(paths: RunPaths, node: str) -> None:
    """Stop all processes of `node`, as when a machine hangs: no connection breaks, nobody is told."""
    pids = _processes(paths, node)
    _record(paths, node, "stop")
    for pid in pids:
        kill(pid, signal.SIGSTOP)


def cut(paths: RunPaths, node: str) -> None:
    """Silence the control connection of `node` without a reset: its agent is stopped, its worker trains on."""
    pids = _processes(paths, node, AGENT)
    _record(paths, node, "cut")
    for pid in pids:
        kill(pid, signal.SIGSTOP)


def break_lines(paths: RunPaths, node: str) -> None:
    """Shut every TCP connection of the agent of `node`, as a network that resets them does. All its processes live."""
    (pid,) = _processes(paths, node, AGENT)
    pidfd = os.pidfd_open(pid)
    try:
        shut = [_shut(pidfd, int(name)) for name in os.listdir(f"/proc/{pid}/fd")]
    finally:
        os.close(pidfd)
    _record(paths, node, "break", kind="drill", connections=sum(shut))


def _shut(pidfd: int, descriptor: int) -> bool:
    """Shut another process's connection; whether it was one."""
    taken = ctypes.CDLL(None, use_errno=True).syscall(_PIDFD_GETFD, pidfd, descriptor, 0)
    if taken < 0 and ctypes.get_errno() == errno.EPERM:
        raise UserError("the kernel lets this user reach into no other process (ptrace); break connections as root")
    if taken < 0:
        return False  # closed meanwhile
    try:
        if not stat.S_ISSOCK(os.fstat(taken).st_mode):
            return False
        with socket.socket(fileno=os.dup(taken)) as line:
            if line.family not in (socket.AF_INET, socket.AF_INET6):
                return False
            if line.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                return False  # it listens: shut, it would not do so again
            line.shutdown(socket.SHUT_RDWR)
        return True
    except OSError:
        return False  # not connected yet, or not any more
    finally:
        os.close(taken)


def go_on(paths: RunPaths, node: str) -> None:
    """Let what was stopped on `node` go on."""
    for pid in _processes(paths, node):
        kill(pid, signal.SIGCONT)


def slow(paths: RunPaths, node: str, seconds: float = SLOW_S) -> None:
    """Give the processes of `node` a tenth of their time for so long; returns after that."""
    pids = _processes(paths, node)
    _record(paths, node, "slow", kind="drill", seconds=seconds)
    deadline = time.monotonic() + seconds
    try:
        while time.monotonic() < deadline:
            for number, pause_s in ((signal.SIGSTOP, SLOW_STOP_S), (signal.SIGCONT, SLOW_GO_S)):
                for pid in pids:
                    kill(pid, number)
                time.sleep(pause_s)
    finally:
        for pid in pids:
            kill(pid, signal.SIGCONT)


def corrupt(paths: RunPaths, node: str) -> None:
    """Flip one bit in each sealed snapshot that `node` has of its own rank."""
    _corrupt(paths, node, "corrupt", lambda area: area == OWN)


def corrupt_replica(paths: RunPaths, node: str) -> None:
    """Flip one bit in each replica that `node` holds for others."""
    _corrupt(paths, node, "corrupt_replica", lambda area: area != OWN)


def corrupt_file(paths: RunPaths, node: str) -> None:
    """Flip one bit in the file that the rank of `node` has in the newest checkpoint."""
    checkpoint = manifest.newest(paths.run_dir)
    if checkpoint is None:
        raise UserError(f"{paths.run_dir} has no checkpoint yet; see protect.persist_every")
    ranks = [place["rank"] for place in read_status(paths).get("nodes", []) if place["node"] == node]
    if not ranks or ranks[0] is None:
        raise UserError(f"{node} has no rank; `python -m gemini_hpc.status {quote(str(paths.run_dir))}` shows who has")
    path = checkpoint.path / checkpoint.files[ranks[0]].name
    _record(paths, node, "corrupt_file", kind="drill", step=checkpoint.step, path=str(path))
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        (byte,) = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def loop(
    paths: RunPaths, mtbf_s: float, seed: int | None, strike: Callable[[str, str], None], lives: Callable[[], bool]
) -> int:
    """Kill a worker that trains or its node at random moments, `mtbf_s` seconds apart on average, until the run ends.

    A node is killed only where that can be recovered from memory: not before the run has recovered from the last
    strike, and while it has a spare. `strike(action, node)` does it, `lives` says whether the run does. Returns how
    many were struck.
    """
    chance, struck, generation = random.Random(seed), 0, 0
    while _trains_after(paths, chance.expovariate(1 / mtbf_s), lives):
        status = read_status(paths)
        nodes = status.get("nodes", [])
        active = [place["node"] for place in nodes if place["status"] == "active" and place["worker"] == "busy"]
        if not active:
            continue
        node, action = chance.choice(active), chance.choice(("kill-worker", "kill-node"))
        recovered = status["protected"] and status["generation"] > generation
        spare = any(place["status"] == "spare" for place in nodes)
        if not (recovered and spare):
            action = "kill-worker"
        generation = status["generation"]
        try:
            strike(action, node)
            struck += 1
        except UserError:
            continue  # it was gone already: the status is older than the last strike
    return struck


def _trains_after(paths: RunPaths, seconds: float, lives: Callable[[], bool]) -> bool:
    """Wait; whether the run still trains then."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and lives():
        time.sleep(min(LOOK_S, max(0.0, deadline - time.monotonic())))
    return lives() and read_status(paths).get("state") not in ("closing", "verifying", "reporting")


def _signal_worker(paths: RunPaths, node: str, action: str, number: int, **where: object) -> None:
    inside = os.environ.get(NODE_MARK) == _mark(paths, node)
    pids = [os.getpid()] if inside else _processes(paths, node, WORKER)
    _record(paths, node, action, **where)
    for pid in pids:
        kill(pid, number)


def _corrupt(paths: RunPaths, node: str, action: str, wanted: Callable[[int], bool]) -> None:
    arena = Arena.open(paths.arena(node))
    halves = [(area, half) for area in range(arena.geometry.areas) for half in (0, 1) if wanted(area)]
    sealed = [at for at in halves if arena.record(*at).state is State.SEALED]
    if not sealed:
        raise UserError(f"{node} holds no such snapshot now")
    steps = sorted(arena.record(*at).step for at in sealed)
    _record(paths, node, action, kind="drill", steps=steps)
    for at in sealed:
        arena.payload(*at)[arena.record(*at).nbytes // 2] ^= 1


def _record(paths: RunPaths, node: str, action: str, kind: str = "fault", **where: object) -> None:
    EventLog(paths.run_dir, "drill").emit(kind, action=action, target=node, **where)


def _processes(paths: RunPaths, node: str, module: str = "") -> list[int]:
    """Return the living processes of `node`, of one module alone if told so. Raises UserError when there is none."""
    pids = [pid for pid in marked(NODE_MARK, _mark(paths, node)) if module in _command(pid)]
    if not pids:
        what = f"no {module.rpartition('.')[2] or 'process'} of {node} is alive"
        raise UserError(f"{what}; `python -m gemini_hpc.status {quote(str(paths.run_dir))}` shows who is")
    return pids


def _mark(paths: RunPaths, node: str) -> str:
    return f"{paths.run_id}:{node}"


def _command(pid: int) -> str:
    try:
        return Path("/proc", str(pid), "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""
