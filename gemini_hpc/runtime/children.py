"""Start a process of the run: marked, logged to a file, bound to its parent, watched by a pidfd."""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from gemini_hpc.runtime.processes import wait_exit

PARENT = "GEMINI_PARENT"
"""The process that started this one; see `processes.die_with_parent`."""


ATTACHED = "GEMINI_ATTACHED"
"""The `submit` that waits for the run in the foreground; the run ends with it."""


KILL_S = 0.4
"""How long to wait for a killed process to be gone: an agent's loop must not stand still for as long as a heartbeat."""

DYING_WITH_US = [
    *(sys.executable, "-I", "-S", "-c"),
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9); os.execv(sys.argv[1], sys.argv[1:])",
]
"""A program started behind these words is killed when its starter dies (PR_SET_PDEATHSIG), as all children are."""


def python(module: str, *arguments: str) -> list[str]:
    """Return the command `python -m module arguments`, by this Python."""
    return [sys.executable, "-u", "-m", module, *arguments]


NOT_WAITED_FOR = ["/bin/sh", "-c", 'exec "$@"', "sh"]
"""A program started behind these words may lie on a file system that hangs: its starter waits for the shell alone."""


def open_log(path: Path) -> int:
    """Open a file for the output of processes, once for all that will be started; it is lost where that fails."""
    try:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    except OSError:
        return os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)


class Child:
    """A process that this one started and watches."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: int) -> None:
        """Start `command`, its output to the open file `log`, with `environment` added. Raises OSError."""
        self._process = subprocess.Popen(
            [*NOT_WAITED_FOR, *command],
            env={**os.environ, **environment, PARENT: str(os.getpid())},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        self.pid = self._process.pid
        self.pidfd = os.pidfd_open(self.pid)

    def reap(self) -> str:
        """Collect an ended process; say how it ended."""
        code = self._process.wait()
        os.close(self.pidfd)
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"

    def end(self) -> None:
        """Kill it. One that hangs in the kernel (NFS) is left to die later."""
        self._process.kill()
        if wait_exit(self.pidfd, KILL_S):
            self.reap()
