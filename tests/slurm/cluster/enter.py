"""Run a command in all namespaces of a process: enter.py PID FOLDER AS_ROOT WORD ...; it knows Python alone.

It is nsenter, but for one thing: whoever enters a user namespace of his own has all capabilities there, and loses them
with the next program unless they are made ambient. AS_ROOT ("yes", "no") keeps them.
"""

import ctypes
import os
import sys

LIBC = ctypes.CDLL(None, use_errno=True)

NEW_USER = 0x10000000
OTHERS = 0x00020000 | 0x04000000 | 0x08000000 | 0x20000000 | 0x40000000
"""Mounts, host name, IPC, processes, network. <linux/sched.h>"""

VERSION = 0x20080522
"""Of what capget(2) fills: for the lower and the upper 32 capabilities the effective, permitted and inheritable."""

AMBIENT, RAISE = 47, 2


def main(pid: int, folder: str, as_root: str, *words: str) -> int:
    """Run the command, and return its exit status; raises OSError when there is no way in."""
    ours, theirs = (os.stat(f"/proc/{process}/ns/user").st_ino for process in ("self", pid))
    through = os.pidfd_open(pid)
    _demand(LIBC.setns(through, OTHERS | (NEW_USER if ours != theirs else 0)))
    os.close(through)
    os.chdir(folder)
    if as_root == "yes":
        _keep_capabilities()
    return os.spawnvp(os.P_WAIT, words[0], words)  # a new process, as its PID namespace is that of children


def _keep_capabilities() -> None:
    header, data = (ctypes.c_uint32 * 2)(VERSION, 0), (ctypes.c_uint32 * 6)()
    _demand(LIBC.capget(header, data))
    data[2], data[5] = data[1], data[4]
    _demand(LIBC.capset(header, data))
    for number in range(64):
        if data[1 + number // 32 * 3] >> number % 32 & 1:
            _demand(LIBC.prctl(AMBIENT, RAISE, number, 0, 0))


def _demand(result: int) -> None:
    if result:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), *sys.argv[2:]))
