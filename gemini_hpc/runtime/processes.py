"""Processes of a run: how they are marked, found, bound to their parent, and ended."""

import ctypes
import fcntl
import os
import re
import select
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from gemini_hpc.runtime.paths import lock_path

RUN_MARK = "GEMINI_RUN"
NODE_MARK = "GEMINI_NODE"

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


def die_with_parent(parent: int) -> None:
    """Have the kernel SIGKILL this process when process `parent`, which started it, is gone."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before the call
        os._exit(1)


def live_for(parent: int) -> None:
    """Be one of an agent's processes: end with it, and only with it.

    The SIGTERM with which Slurm begins the end of a job, or the grace before it is preempted, reaches all processes;
    what it means the agent finds out.
    """
    die_with_parent(parent)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def marked(name: str, value: str) -> list[int]:
    """Return the processes of this user whose environment has `name`=`value`, this one excluded.

    Those of another mount namespace (a container, a Slurm job with a /dev/shm of its own) are not ours to judge: the
    lock of their run, and its files, lie where we cannot see them.
    """
    return [pid for pid, found in _environments(name) if found == value]


def _environments(name: str) -> Iterator[tuple[int, str]]:
    key, here = f"{name}=".encode(), os.stat("/proc/self/ns/mnt").st_ino
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) == os.getpid():
            continue
        try:
            if os.stat(f"/proc/{entry}").st_uid != os.getuid():
                continue  # root could read it, but other users' runs are their own
            environment = Path("/proc", entry, "environ").read_bytes().split(b"\0")
            if os.stat(f"/proc/{entry}/ns/mnt").st_ino != here:
                continue
        except OSError:
            continue  # gone meanwhile, or somebody else's
        for item in environment:
            if item.startswith(key):
                yield int(entry), item[len(key) :].decode(errors="replace")


def kill_marked(name: str, value: str, timeout_s: float = 10.0) -> int:
    """SIGKILL all processes with a mark until none is left; return how many there were."""
    deadline, seen = time.monotonic() + timeout_s, set()
    while time.monotonic() < deadline:
        alive = [pid for pid in marked(name, value) if state_of(pid) not in ("Z", "")]
        if not alive:
            break
        for pid in alive:
            seen.add(pid)
            kill(pid, signal.SIGKILL)
        time.sleep(0.005)
    return len(seen)


def kill(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def children_of(pid: int) -> list[int]:
    """Return the processes that a process started, and that have not been collected; none when it is gone."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def state_of(pid: int) -> str:
    """Return the state of a process as /proc says it (R, S, T for stopped, Z for a zombie); "" = it is gone."""
    try:
        return Path("/proc", str(pid), "stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return ""


def wait_exit(pidfd: int, timeout_s: float) -> bool:
    """Wait for the process behind `pidfd`; whether it is gone within `timeout_s`."""
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    return bool(poller.poll(timeout_s * 1000))


class RunLock:
    """The claim on a run: held by its supervisor for life, given back by the kernel however it dies.

    On Slurm it is shared by the agents: several of them where nodes are no machines of their own.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = -1

    def take(self, shared: bool = False) -> bool:
        """Try to take the lock, alone or with others that share it; False when a living run holds it."""
        while True:
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(fd)
                return False
            try:
                if os.stat(self._path).st_ino == os.fstat(fd).st_ino:
                    self._fd = fd
                    return True
            except FileNotFoundError:
                pass  # its last holder removed it between our two calls: try again
            os.close(fd)

    def release(self) -> None:
        """Remove the file, unless others share it, then let go of it."""
        with suppress(BlockingIOError):
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._path.unlink(missing_ok=True)
        os.close(self._fd)


def is_held(path: Path) -> bool:
    """Whether a living run holds this lock."""
    if not path.exists():
        return False
    lock = RunLock(path)
    if not lock.take():
        return True
    lock.release()
    return False


_OURS = re.compile(r"gemini-([0-9a-f]{10})[.-]")


def sweep(shm_dir: Path) -> list[str]:
    """End what dead runs of this user left behind: processes and files; return the runs' ids."""
    swept = []
    for run in traces(shm_dir):
        lock = RunLock(lock_path(run))
        if not lock.take():
            continue  # it lives
        clear(shm_dir, run)
        lock.release()
        swept.append(run)
    return swept


def traces(shm_dir: Path) -> list[str]:
    """Return the ids of this user's runs, living or dead, that have processes or files on this machine."""
    entries = shm_dir.iterdir() if shm_dir.is_dir() else ()
    found = {match[1] for entry in entries if (match := _OURS.match(entry.name)) and _mine(entry)}
    return sorted(found | {value for _, value in _environments(RUN_MARK)})


def clear(shm_dir: Path, run: str) -> None:
    """Kill all processes of `run` (its supervisor calls this itself) and remove its files in memory."""
    kill_marked(RUN_MARK, run)
    for entry in shm_dir.glob(f"gemini-{run}-*"):
        entry.unlink(missing_ok=True)


def _mine(path: Path) -> bool:
    try:
        return path.stat().st_uid == os.getuid()
    except OSError:
        return False


if __name__ == "__main__":
    sweep(Path(sys.argv[1]))
