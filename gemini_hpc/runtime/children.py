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


LOGGED_TO = ["/bin/sh", "-c", '(umask 077; : >>"$0") 2>/dev/null && exec >>"$0" 2>&1; exec "$@"']
"""A program started behind these words and the path of a log writes to that, or to what it is given where that fails.

Both may lie on a file system that hangs: the starter waits for the shell alone. And it has no file open there. Whoever
is started gets a copy of all open files and has to close them, which hangs as well, and its starter waits for that.
"""


def carry_output() -> None:
    """Have a child pass on what this process prints from now on, for the same reason: its own log is such a file.

    What cannot be written (the disk is full) is lost, and whoever prints never hears of it. The child ends when nobody
    is left who could print.
    """
    end, beginning = os.pipe()
    command = ["/bin/sh", "-c", "trap '' INT TERM; until cat 2>/dev/null; do :; done"]
    os.posix_spawn(command[0], command, {}, file_actions=[(os.POSIX_SPAWN_DUP2, end, 0)])
    for output in (1, 2):
        os.dup2(beginning, output)
    os.close(end)
    os.close(beginning)


class Child:
    """A process that this one started and watches."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        """Start `command`, its output to the end of the file `log`, with `environment` added. Raises OSError."""
        self._process = subprocess.Popen(
            [*LOGGED_TO, str(log), *command],
            env={**os.environ, **environment, PARENT: str(os.getpid())},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
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
