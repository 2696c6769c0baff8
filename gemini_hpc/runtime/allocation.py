"""The cluster as an agent sees it: virtual nodes on this machine, or the allocation of a Slurm job.

Virtual nodes belong to their supervisor, and it does everything. On Slurm no role is bound to the node of the batch
script: the supervisor there only brings the agents up. What a run needs of the cluster later, the agents do from
wherever they are: start MPI worlds as steps of the job, ask Slurm which nodes are gone, and end the job when the
supervisor is no more.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path

import zmq

from gemini_hpc.config import RunConfig, SiteConfig
from gemini_hpc.core.codec import Message
from gemini_hpc.core.messages import Finish, NodeUp, Retire, StartWorld, Suspend, WorldFailed
from gemini_hpc.errors import GeminiError
from gemini_hpc.runtime.children import DYING_WITH_US, LOGGED_TO, python
from gemini_hpc.runtime.cluster import LOOPBACK, address_of, own_address
from gemini_hpc.runtime.paths import RunPaths
from gemini_hpc.runtime.processes import RunLock, sweep
from gemini_hpc.runtime.status_file import read_status
from gemini_hpc.runtime.wire import Client
from gemini_hpc.runtime.witness import Witness
from gemini_hpc.slurm.control import SlurmError, SlurmJob, step_environment, this_job
from gemini_hpc.windows.launch import (
    SRUN_MPI,
    THIS_NODE,
    HostSpec,
    mpi_environment,
    network_interface,
    remove_mpi_leftovers,
    step_command,
)

LEAVING_S = 10.0
"""How long to wait for an agent of the same run that is leaving this node."""

SUSPEND_S = 1.0
"""How often it is said that the job is preempted: a new coordinator may not have heard."""

ANSWER_S, UNANSWERED_S = 5.0, 20.0
"""How long one question what SIGTERM means may take, and all: SIGKILL follows after KillWait, by default 30 s."""

SEE_OUT_POLL_S = 0.5
ECHO_S = 10.0
"""A supervisor that lives says within this time that it has heard of a node, or of the end."""


class Embedded:
    """Virtual nodes: a line to the supervisor."""

    is_cancelled = False
    """Whether this node is to leave now."""

    forsaken_timeouts = 10
    """After so many heartbeat timeouts without a coordinator a node takes itself for evicted."""

    def __init__(self, supervisor: Client, node: str, nodes: tuple[str, ...]) -> None:
        self._supervisor = supervisor
        self.address = address_of(node, nodes)
        """Where this node's agent listens."""
        self.group_address = LOOPBACK
        """Where its worker does."""

    def announce(self, up: NodeUp) -> None:
        """Say that this node is there. Before that it has begun nothing that outlives a sudden end."""
        self._supervisor.send(up)

    @property
    def socket(self) -> "zmq.Socket[bytes]":
        return self._supervisor.socket

    def send(self, message: Message) -> None:
        self._supervisor.send(message)

    def receive(self) -> Message | None:
        """Return the next thing that the cluster tells; None = nothing."""
        return self._supervisor.receive()

    def ask(self, wanted: bool) -> None:
        """Look after the other nodes from now on, or do not. Here the supervisor always does."""

    def hears(self, node: str) -> None:
        """Take note that a node spoke to this one just now."""

    def told_to_end(self) -> None:
        """Take a signal that tells this node to end."""
        self.is_cancelled = True

    def see_out(self, end: Finish, is_cancelled: Callable[[], bool], forsaken: bool) -> None:
        """The run is over, and this node has let everything go: see to it that the job ends, too.

        `forsaken`: nobody has said so; this node only knows that it has nobody to work for.
        """

    def close(self) -> None:
        """End what was started here."""


class Allocation(Embedded):
    """The nodes of a Slurm job."""

    forsaken_timeouts = 500  # Slurm may take minutes to say that a node is down, and its word lets the others go on

    def __init__(self, supervisor: Client, paths: RunPaths, run: RunConfig, node: str, nodes: tuple[str, ...]) -> None:
        self._supervisor = supervisor
        self.address = self.group_address = own_address(run)
        self._paths, self._run, self._node, self._nodes = paths, run, node, nodes
        self._job = this_job(run.site.call_timeout_s)
        self._world: subprocess.Popen[bytes] | None = None
        self._world_number = 0
        self._failed = ""  # why the world is no more
        self._preempted = False
        self._said_preempted = 0.0
        self._supervisor_closes = False  # it has said that it knows of the end of the run
        self._dismissed = False  # and that it is done with it
        notice_s = run.site.signal_delay_s
        self._witness = Witness(self._job, node, nodes, run.recovery.heartbeat_timeout_s, notice_s)
        self._node_lock, self._lock = RunLock(paths.node_lock(node)), RunLock(paths.lock)
        self._here = NodeUp(node, "")
        self._early: deque[Message] = deque()  # came before the word that we waited for

    def announce(self, up: NodeUp) -> None:
        self._here = up
        self._is_known()  # until then we hang on our srun, which may end us without a word
        self._claim()

    def _is_known(self) -> bool:
        """Tell the supervisor that this node is there; whether it lives and has taken note."""
        self._supervisor.send(self._here)
        deadline = time.monotonic() + ECHO_S
        while time.monotonic() < deadline:
            self._supervisor.socket.poll(1000 * SEE_OUT_POLL_S)
            while (message := self._supervisor.receive()) is not None:
                self._early.append(message)
                if message == self._here:
                    return True
        return False

    def _claim(self) -> None:
        """Do for this node what the supervisor does for virtual ones: hold the run's lock, sweep what is dead."""
        deadline = time.monotonic() + LEAVING_S
        for lock, shared in ((self._node_lock, False), (self._lock, True)):
            while not lock.take(shared):
                if time.monotonic() > deadline:
                    raise GeminiError("another job does this run on this node already; cancel it, or start a new run")
                time.sleep(0.1)
        sweep(self._paths.shm_dir)
        remove_mpi_leftovers()

    def send(self, message: Message) -> None:
        if isinstance(message, StartWorld):
            self._start_world(message)
        else:
            super().send(message)

    def receive(self) -> Message | None:
        if self._world is not None and (status := self._world.poll()) is not None:
            self._world, self._failed = None, f"its step ended with status {status}: see logs/windows.log"
        if self._failed:
            failed, self._failed = self._failed, ""
            return WorldFailed("", self._world_number, failed)
        if self._preempted and time.monotonic() - self._said_preempted > SUSPEND_S:
            self._said_preempted = time.monotonic()
            return Suspend("", "the job is about to be preempted")
        return self._hear_supervisor() or self._witness.next()

    def _hear_supervisor(self) -> Message | None:
        message = self._early.popleft() if self._early else super().receive()
        self._supervisor_closes |= isinstance(message, Finish)
        self._dismissed |= isinstance(message, Retire)
        return message

    def ask(self, wanted: bool) -> None:
        self._witness.want(wanted)

    def hears(self, node: str) -> None:
        self._witness.hears(node)

    def told_to_end(self) -> None:
        """Find out, in a thread, what SIGTERM means: the end of a job begins with it, and so does its preemption."""
        threading.Thread(target=self._find_out, daemon=True).start()

    def _find_out(self) -> None:
        """Until Slurm answers the run is saved, as before a preemption: at the end of a job that does no harm."""
        job, deadline = this_job(ANSWER_S), time.monotonic() + UNANSWERED_S
        while time.monotonic() < deadline:
            try:
                self._preempted = job.goes_on()
                break
            except SlurmError:
                self._preempted = True
                time.sleep(1.0)
        else:
            self._preempted = False
        self.is_cancelled = not self._preempted

    def see_out(self, end: Finish, is_cancelled: Callable[[], bool], forsaken: bool) -> None:
        """Wait for the end of the job. It ends with its batch script; where that is gone, the first of us ends it."""
        self._end_world()
        if forsaken and (self._is_led() or self._is_known()):
            return  # it goes on, or the supervisor ends it
        rounds = int(ECHO_S / SEE_OUT_POLL_S)
        closer, claims = self._nodes[0], 0
        for number in count(1):
            while self._hear_supervisor() is not None:
                pass
            if self._dismissed or is_cancelled():
                return
            # whoever closes lives, or has answered at least; should its node die, Slurm will say so
            silent = not self._supervisor_closes and not claims
            if number % rounds == 0 and (silent or self._has_gone(closer, claims)):
                claims += 1
                closer = self._claim_closing(claims)
                if closer == self._node:
                    break
            time.sleep(SEE_OUT_POLL_S)
        subprocess.run(
            [*python("gemini_hpc.runtime.supervisor", str(self._paths.run_dir)), "--close", end.state, end.reason],
            stdin=subprocess.DEVNULL,
        )
        again = time.monotonic() + ECHO_S
        while not is_cancelled():  # as the end of the job begins
            time.sleep(SEE_OUT_POLL_S)
            if time.monotonic() > again:  # it came to a bad end, and nobody else will see to it
                with suppress(SlurmError):
                    if not self._job.goes_on():
                        return
                    self._job.cancel()
                again = time.monotonic() + ECHO_S

    def _is_led(self) -> bool:
        """Whether others do the run, and only this node is cut off: whoever leads renews the status."""
        before = read_status(self._paths)
        deadline = time.monotonic() + ECHO_S
        while time.monotonic() < deadline:
            time.sleep(SEE_OUT_POLL_S)
            if read_status(self._paths) != before:
                return True
        return False

    def _has_gone(self, closer: str, claims: int) -> bool:
        """Whether nothing is left of the node, or of the agent, that said it closes the run."""
        try:
            gone = self._job.node_states([closer]).get(closer) == "gone"
            return gone or (claims > 0 and closer not in (node for _, node in self._job.steps()))
        except SlurmError:
            return False

    def _claim_closing(self, number: int) -> str:
        """Return the node that closes the run after so many others were lost: the first one that said so."""
        claim = self._paths.run_dir / "closing" / str(number)
        try:
            claim.parent.mkdir(exist_ok=True)
            with claim.open("x") as file:
                file.write(self._node)
            return self._node
        except FileExistsError:
            return claim.read_text()

    def close(self) -> None:
        self._end_world()
        remove_mpi_leftovers()
        self._lock.release()
        self._node_lock.release()

    def _start_world(self, order: StartWorld) -> None:
        self._end_world()
        paths, site = self._paths, self._run.site
        here = HostSpec(THIS_NODE, paths.arena(THIS_NODE), paths.socket(THIS_NODE))
        command, environment = world_step(self._job, order.members, paths.run_id, order.world, here, site)
        self._world_number = order.world
        try:
            self._world = subprocess.Popen(
                [*LOGGED_TO, str(paths.logs / "windows.log"), *command],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.STDOUT,
            )
        except OSError as error:
            self._failed = f"srun could not be started ({error.strerror})"

    def _end_world(self) -> None:
        """End the step; a host whose node is cut off leaves when its agent takes another one in."""
        if self._world is None:
            return
        self._world.send_signal(signal.SIGTERM)  # srun passes it on
        try:
            self._world.wait(1.0)
        except subprocess.TimeoutExpired:
            self._world.kill()
            self._world.wait()
        self._world = None


def world_step(
    job: SlurmJob, members: Sequence[str], run: str, world: int, here: HostSpec, site: SiteConfig
) -> tuple[list[str], dict[str, str]]:
    """Return the command and the environment that start a world of window hosts on `members`: a step of the job.

    In the fields of `here` THIS_NODE stands for each node's name. What site.slurm_setup says to Open MPI counts.
    """
    step = job.step(members, "gemini-windows", f"--mpi={SRUN_MPI[site.mpi]}")
    program = step_command(Path(sys.executable), run, world, here)
    inherited, settings = step_environment(os.environ), mpi_environment(site.interface or network_interface(), site.mpi)
    said = {name: value for name, value in inherited.items() if name.startswith("OMPI_MCA_")}
    return [*DYING_WITH_US, "/usr/bin/env", *step, *program], inherited | settings | said
