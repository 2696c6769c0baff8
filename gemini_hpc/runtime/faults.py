"""Failures on purpose, on the real processes: what `drill` and a run's scheduled drills do."""

import os
import signal
from pathlib import Path
from shlex import quote

from gemini_hpc.errors import UserError
from gemini_hpc.runtime.paths import RunPaths
from gemini_hpc.runtime.processes import NODE_MARK, kill, kill_marked, marked
from gemini_hpc.telemetry import EventLog

WORKER = "gemini_hpc.runtime.worker"


def kill_node(paths: RunPaths, node: str, **where: object) -> None:
    """Take a virtual node away: its memory, and all its processes by SIGKILL; the caller last, if it is one."""
    pids = marked(NODE_MARK, _mark(paths, node))
    inside = os.environ.get(NODE_MARK) == _mark(paths, node)
    if not pids:
        raise _nobody(paths, f"process of {node}")
    EventLog(paths.run_dir, "drill").emit("fault", action="kill_node", target=node, **where)
    # the memory first, and the agent after its other children: the kernel kills them with it, the caller too
    paths.arena(node).unlink(missing_ok=True)
    agent = os.getppid() if inside else None
    for pid in sorted(pids, key=lambda pid: pid == agent):
        kill(pid, signal.SIGKILL)
    if inside:
        kill(os.getpid(), signal.SIGKILL)
    kill_marked(NODE_MARK, _mark(paths, node))


def signal_worker(paths: RunPaths, node: str, action: str, number: int, **where: object) -> None:
    """Send a signal to the training process of `node` alone."""
    pids = [pid for pid in marked(NODE_MARK, _mark(paths, node)) if WORKER in _command(pid)]
    if os.environ.get(NODE_MARK) == _mark(paths, node):
        pids = [os.getpid()]
    if not pids:
        raise _nobody(paths, f"worker of {node}")
    EventLog(paths.run_dir, "drill").emit("fault", action=action, target=node, **where)
    for pid in pids:
        kill(pid, number)


def _nobody(paths: RunPaths, what: str) -> UserError:
    command = f"python -m gemini_hpc.status {quote(str(paths.run_dir))}"
    return UserError(f"no {what} is alive; `{command}` shows who is")


def _mark(paths: RunPaths, node: str) -> str:
    return f"{paths.run_id}:{node}"


def _command(pid: int) -> str:
    try:
        return Path("/proc", str(pid), "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""
