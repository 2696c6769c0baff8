"""Run a program, and adopt what it and its children leave behind: adopt.py WORD ...; PID 1 of a node that is none.

On SIGTERM it kills all that descends from it, and leaves.
"""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

ADOPT = 36
"""PR_SET_CHILD_SUBREAPER"""


def descendants(pid: int) -> Iterator[int]:
    with suppress(OSError):  # gone meanwhile
        for child in map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()):
            yield child
            yield from descendants(child)


def end(*_: object) -> None:
    while found := list(descendants(os.getpid())):
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG) != (0, 0):
                pass
    os._exit(0)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, end)
    ctypes.CDLL(None).prctl(ADOPT, 1, 0, 0, 0)
    os.spawnvp(os.P_NOWAIT, sys.argv[1], sys.argv[1:])
    while True:
        try:
            os.wait()
        except ChildProcessError:
            time.sleep(1.0)
