"""The supervisor: what a job runs. Brings up the nodes' agents, launches MPI worlds when asked, and clears up.

On the embedded cluster it is the cluster: virtual nodes are its child processes. It decides nothing about the
training. Its lock says that the run lives; however it dies, the kernel kills its children, and whatever is left
is swept by the next start on this machine.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import zmq

from gemini_hpc.config import RunConfig
from gemini_hpc.core.codec import Message
from gemini_hpc.core.messages import Finish, Lead, NodeExited, NodeUp, StartWorld, WorldFailed
from gemini_hpc.errors import GeminiError
from gemini_hpc.runtime.children import ATTACHED, DYING_WITH_US, NOT_WAITED_FOR, Child, open_log
from gemini_hpc.runtime.closing import verify
from gemini_hpc.runtime.cluster import CLUSTER, NODES, RETURNED, virtual_nodes
from gemini_hpc.runtime.drills import missed
from gemini_hpc.runtime.paths import RunPaths, open_run
from gemini_hpc.runtime.processes import NODE_MARK, RUN_MARK, RunLock, clear, sweep, wait_exit
from gemini_hpc.runtime.status_file import update_status
from gemini_hpc.runtime.wire import Server, Wire, make_keys
from gemini_hpc.telemetry import EventLog
from gemini_hpc.windows.launch import HostSpec, mpi_leftovers, mpiexec_command

POLL_MS = 100
PATIENCE_S = 5.0
"""How long agents may take to leave after the end of the run."""


class Interrupted(GeminiError):
    """The run was told to end: Ctrl-C, scancel, SIGTERM."""


class Supervisor:
    """The embedded cluster of one run."""

    def __init__(self, paths: RunPaths, run: RunConfig) -> None:
        self._paths, self._run = paths, run
        self._nodes = virtual_nodes(run)
        self._events = EventLog(paths.run_dir, "cluster")
        self._wire = Wire(paths.keys)
        self._server: Server = self._wire.listen("127.0.0.1")
        self._poller = zmq.Poller()
        self._poller.register(self._server.socket, zmq.POLLIN)
        self._logs = {node: open_log(paths.logs / f"agent-{node}.log") for node in self._nodes}
        self._windows_log = open_log(paths.logs / "windows.log")
        self._agents: dict[str, Child] = {}
        self._up: dict[str, NodeUp] = {}
        self._exited: dict[str, NodeExited] = {}
        self._return_at: dict[str, float] = {}  # when a lost node comes back
        self._voters = set(self._nodes)  # have never been lost
        self._leader = ""
        self._term = 0
        self._world: subprocess.Popen[bytes] | None = None
        self._world_number = 0

    def serve(self) -> tuple[str, str]:
        """Run the cluster until the run is over; return its outcome and the reason."""
        for node in self._nodes:
            self._start_agent(node)
        while True:
            self._poller.poll(POLL_MS)
            check_wanted()
            ended = self._ended_agents()  # before their last words are read
            while (received := self._server.receive()) is not None:
                sender, message = received
                if isinstance(message, Finish) and sender in self._up:  # from the coordinator, or passed on by another
                    return message.state, message.reason
                self._handle(sender, message)
            self._watch_world()
            for node in ended:
                self._lose(node)
            for node in [node for node, due in self._return_at.items() if time.monotonic() >= due]:
                del self._return_at[node]
                self._start_agent(node, returned=True)
            if not self._voters:  # nodes that came back cannot coordinate
                return "failed", "no node of the start is left; go on from the newest checkpoint with --resume"

    def dismiss(self, reason: str) -> None:
        """Tell all agents to leave now: nobody waits for what they still do."""
        self._tell_all(Finish("", "stopped", reason))
        for node, child in self._agents.items():
            if node not in self._up:  # it could not be told
                child.end()

    def close(self) -> None:
        """End what still runs: agents get a moment to leave, the rest gets none."""
        deadline = time.monotonic() + PATIENCE_S
        for child in self._agents.values():
            wait_exit(child.pidfd, max(0.0, deadline - time.monotonic()))
            child.end()
        self._end_world()
        self._wire.close()

    def _start_agent(self, node: str, returned: bool = False) -> None:
        marks = {RUN_MARK: self._paths.run_id, NODE_MARK: f"{self._paths.run_id}:{node}"}
        names = {CLUSTER: self._server.endpoint, NODES: ",".join(self._nodes), RETURNED: str(int(returned))}
        arguments = [str(self._paths.run_dir), node]
        child = Child("gemini_hpc.runtime.agent", arguments, {**marks, **names}, self._logs[node])
        self._agents[node] = child
        self._poller.register(child.pidfd, zmq.POLLIN)

    def _lose(self, node: str) -> None:
        """Tell everybody that a node is gone. The kernel killed its other processes with its agent."""
        self._up.pop(node, None)
        self._voters.discard(node)
        self._exited[node] = NodeExited(node, "its agent is gone")
        self._tell_all(self._exited[node])
        if self._run.cluster.return_s is not None:
            self._return_at[node] = time.monotonic() + self._run.cluster.return_s

    def _ended_agents(self) -> list[str]:
        ended = [node for node, child in self._agents.items() if wait_exit(child.pidfd, 0.0)]
        for node in ended:
            child = self._agents.pop(node)
            self._poller.unregister(child.pidfd)
            child.reap()
        return ended

    def _handle(self, sender: str, message: Message) -> None:
        if isinstance(message, NodeUp) and message.node == sender and sender in self._agents:
            for known in (*self._exited.values(), *self._up.values()):
                self._server.send(message.node, known)
            self._exited.pop(message.node, None)
            self._up[message.node] = message
            self._tell_all(message)
        elif isinstance(message, Lead) and message.term > self._term:
            self._leader, self._term = sender, message.term
        elif isinstance(message, StartWorld) and sender == self._leader and set(message.members) <= set(self._nodes):
            self._start_world(message)

    def _tell_all(self, message: Message) -> None:
        for node in self._up:
            self._server.send(node, message)

    # --- the MPI world of the window hosts ----------------------------------------------------------

    def _start_world(self, order: StartWorld) -> None:
        self._end_world()
        hosts = [HostSpec(n, self._paths.arena(n), self._paths.socket(n)) for n in order.members]
        environment = {**os.environ, RUN_MARK: self._paths.run_id}
        command, environment = mpiexec_command(
            Path(sys.executable), self._paths.run_id, order.world, hosts, environment, self._run.site.interface
        )
        self._world_number = order.world
        try:
            self._world = subprocess.Popen(
                [*NOT_WAITED_FOR, *DYING_WITH_US, *command],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=self._windows_log,
                stderr=subprocess.STDOUT,
            )
        except OSError as error:
            self._tell_all(WorldFailed("", order.world, f"mpiexec could not be started ({error.strerror})"))

    def _watch_world(self) -> None:
        if self._world is not None and self._world.poll() is not None:
            code, self._world = self._world.returncode, None
            self._tell_all(WorldFailed("", self._world_number, f"mpiexec ended with status {code}"))

    def _end_world(self) -> None:
        if self._world is not None:
            self._world.kill()
            self._world.wait()
            self._world = None


def supervise(paths: RunPaths, run: RunConfig) -> int:
    """Run one run from start to end; the exit status of the job."""
    lock = RunLock(paths.lock)
    sweep(paths.shm_dir)
    _remove_mpi_leftovers()
    if not lock.take():
        print(
            f"{paths.run_dir} is being run already; watch it with `python -m gemini_hpc.status`",
            file=sys.stderr,
        )
        return 2
    events = EventLog(paths.run_dir, "cluster")
    events.emit("run", state="started", reason="")
    try:
        outcome, reason = _train(paths, run)
        if outcome == "finished":
            outcome, reason = _close(paths, run, reason)
    except Interrupted as interruption:
        outcome, reason = "stopped", str(interruption)
    except (GeminiError, OSError) as error:
        outcome, reason = "failed", str(error)
    finally:
        clear(paths.shm_dir, paths.run_id)
        _remove_mpi_leftovers()
        lock.release()
    events.emit("run", state=outcome, reason=reason)
    update_status(paths, state=outcome, reason=reason, waiting_for=[])
    return 0 if outcome == "finished" else 1


def _remove_mpi_leftovers() -> None:
    for leftover in mpi_leftovers():
        leftover.unlink(missing_ok=True)


def _train(paths: RunPaths, run: RunConfig) -> tuple[str, str]:
    make_keys(paths.keys)
    supervisor = Supervisor(paths, run)
    try:
        return supervisor.serve()
    except Interrupted as interruption:
        supervisor.dismiss(str(interruption))
        raise
    finally:
        supervisor.close()


def _close(paths: RunPaths, run: RunConfig, reason: str) -> tuple[str, str]:
    """Prove that no failure changed anything, and write the report."""
    clear(paths.shm_dir, paths.run_id)
    outcome = "finished"
    if never := missed(paths, run):
        reason = f"{reason}; drills that never struck: {', '.join(never)}"
    if run.verify:
        try:
            comparison = verify(paths, run, check_wanted)
            update_status(paths, verdict=str(comparison))
            if not comparison.identical:
                outcome, reason = "failed", str(comparison)
        except Interrupted as interruption:  # the training is done all the same
            reason = f"{reason}; not compared with the reference: {interruption}"
    update_status(paths, state="reporting")
    from gemini_hpc.analysis.report import write_report  # pandas and plotly: only now, not while a run waits

    write_report(paths.run_dir)
    return outcome, reason


GONE = -1


def _pidfd_of_submit() -> int | None:
    """The `submit` that waits for the run, if one does. A pidfd tells its end even when nobody has reaped it yet."""
    try:
        return os.pidfd_open(int(os.environ[ATTACHED])) if ATTACHED in os.environ else None
    except ProcessLookupError:
        return GONE


_STARTED_BY = os.getppid()
_ATTACHED_TO = _pidfd_of_submit()
_told_to_end: list[int] = []
"""The signals that came. Noted rather than raised: an exception out of a signal handler may vanish anywhere."""


def check_wanted() -> None:
    """Raise Interrupted when the run was told to end, or nobody is left for whom it runs. Called by every loop."""
    if _told_to_end:
        raise Interrupted(f"told to end by {signal.Signals(_told_to_end[0]).name}")
    if _ATTACHED_TO == GONE or (_ATTACHED_TO and wait_exit(_ATTACHED_TO, 0.0)):
        raise Interrupted("the submit that waited for it is gone")
    if os.getppid() != _STARTED_BY:
        raise Interrupted("the job that it belonged to is gone")


def main() -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):  # by a person, by Slurm, before the time limit
        signal.signal(number, lambda told, _frame: _told_to_end.append(told))
    paths, run = open_run(sys.argv[1])
    sys.exit(supervise(paths, run))


if __name__ == "__main__":
    main()
