"""Stand between the MPI launcher and one window host, so that the launcher never sees the host die.

Hydra kills the whole world when a rank dies. It watches the process that it started and the rank's end of the PMI
connection: both are kept by this process, which ends when the launcher does, whatever became of the host, and
takes the host with it. Started as `python -I -S shield.py COMMAND...`: it imports nothing of the package, and costs
10 ms.
"""

import contextlib
import os
import select
import signal
import sys


def main() -> None:
    launcher = int(os.environ["PMI_FD"])
    pid = os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ)
    host = os.pidfd_open(pid)
    ends = select.poll()
    ends.register(launcher, 0)  # no bytes are awaited, only the hang-up, which is always reported
    ends.register(host, select.POLLIN)
    while True:
        ended = [fd for fd, _ in ends.poll()]
        if launcher in ended:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(host, signal.SIGKILL)
            return
        _, status = os.waitpid(pid, 0)
        print(f"window host {pid} ended with {os.waitstatus_to_exitcode(status)}", file=sys.stderr, flush=True)
        ends.unregister(host)


if __name__ == "__main__":
    main()
