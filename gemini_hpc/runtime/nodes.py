"""The nodes of a run as its supervisor sees them: brings their agents up, and tells each of the others.

It decides nothing about the training: who leads, and what is done, the agents settle among themselves.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from abc import ABC, abstractmethod
from pathlib import Path

import zmq

from gemini_hpc.config import RunConfig
from gemini_hpc.core.codec import Message
from gemini_hpc.core.messages import Finish, Lead, NodeExited, NodeUp, Retire, StartWorld, Suspend, Voters, WorldFailed
from gemini_hpc.errors import UserError
from gemini_hpc.runtime.allocation import Embedded
from gemini_hpc.runtime.children import DYING_WITH_US, LOGGED_TO, Child, python
from gemini_hpc.runtime.cluster import CLUSTER, DOMAINS, LOOPBACK, NODES, RETURNED, arranged_nodes, own_address
from gemini_hpc.runtime.paths import RunPaths
from gemini_hpc.runtime.processes import NODE_MARK, RUN_MARK, children_of, kill, wait_exit
from gemini_hpc.runtime.wire import Server, Wire
from gemini_hpc.slurm.control import SlurmError, this_job
from gemini_hpc.windows.launch import HostSpec, check_openmpi, mpiexec_command

POLL_MS = 100
SUSPEND_S = 1.0
"""How often the agents are told that the nodes are taken away: a new coordinator may not have heard."""

AWAY_S = 1.0
"""A pause between two turns that is longer than this is one of our own: we did not run."""

PATIENCE_S = 5.0
"""How long agents may take to leave after the end of the run."""

AGENT_STEP = "gemini-agent"
"""Name of the steps of Slurm that agents are."""

SHEPHERD = """\
trap "" TERM INT USR1 USR2
shm=$1 log=$2
shift 2
"$@" >>"$log" 2>&1 || exec "$0" -m gemini_hpc.runtime.processes "$shm" >>"$log" 2>&1
"""
"""Stands between Slurm and an agent, which decides what signals mean. The log is not srun's, which does not outlive us;
an agent that is killed, alone, leaves files in memory: no other process of ours is on its node then."""

STEPS_S, STEPS_POLL_S = 15.0, 0.5
"""How often Slurm is asked where there are such steps, also at the end."""


class Nodes(ABC):
    """All agents of a run, as processes that this one started."""

    def __init__(self, paths: RunPaths, run: RunConfig, address: str) -> None:
        self._paths, self._run = paths, run
        self._names, self._domains = arranged_nodes(run)
        self._wire = Wire(paths.keys)
        self._server: Server = self._wire.listen(address)
        self._poller = zmq.Poller()
        self._poller.register(self._server.socket, zmq.POLLIN)
        self._agents: dict[str, Child] = {}
        self._alive: set[str] = set()  # nodes whose agents were started, and have not been lost
        self._up: dict[str, NodeUp] = {}
        self._exited: dict[str, NodeExited] = {}
        self._return_at: dict[str, float] = {}  # when a lost node comes back, if it does
        self._voters = set(self._names)  # those among whom the agents elect, without the lost ones
        self._namings = 0  # how often other voters were named
        self._leader = ""
        self._term = 0
        self._led = time.monotonic()  # when anybody last said that it leads
        self._suspend: Suspend | None = None
        self._said_suspend = 0.0
        self._closed = False
        for node in self._names:
            self._start(node)

    @abstractmethod
    def _command(self, node: str, environment: dict[str, str]) -> list[str]:
        """Return the command that starts the agent of a node."""

    def _may_return(self, node: str) -> bool:
        """Whether a node that was lost some time ago is there."""
        return True

    def turn(self) -> Finish | None:
        """Wait a moment, pass on what happened; return how the run ended, once it has."""
        self._poller.poll(POLL_MS)
        ended = self._ended_agents()  # before their last words are read
        while (received := self._server.receive()) is not None:
            sender, message = received
            if isinstance(message, Finish) and sender in self._up:  # from the coordinator, or passed on by another
                return message
            self._handle(sender, message)
        for node in ended:
            self._lose(node)
        if self._suspend is not None and time.monotonic() - self._said_suspend > SUSPEND_S:
            self._said_suspend = time.monotonic()
            self._tell_all(self._suspend)
        if not self._alive and not any(self._may_return(node) for node in self._return_at):
            return Finish("", "suspended", "no node is left; go on from the newest checkpoint")
        now = time.monotonic()
        for node in [node for node, due in self._return_at.items() if now >= due and self._may_return(node)]:
            del self._return_at[node]
            self._start(node, returned=True)
        return None

    def suspend(self, reason: str) -> None:
        """Have the run saved and ended: the nodes are about to be taken away."""
        self._suspend = self._suspend or Suspend("", reason)

    def dismiss(self, end: Finish) -> None:
        """Tell all agents to leave now: nobody waits for what they still do."""
        self._tell_all(end)
        for node in self._agents.keys() - self._up.keys():  # could not be told
            self._agents.pop(node).end()

    def close(self) -> None:
        """End what still runs: agents get a moment to leave, the rest gets none. May be called again."""
        if self._closed:
            return
        self._closed = True
        deadline = time.monotonic() + PATIENCE_S
        for child in self._agents.values():
            wait_exit(child.pidfd, max(0.0, deadline - time.monotonic()))
            child.end()
        self._wire.close()

    def _start(self, node: str, returned: bool = False) -> None:
        marks = {RUN_MARK: self._paths.run_id, NODE_MARK: f"{self._paths.run_id}:{node}"}
        names = {CLUSTER: self._server.endpoint, NODES: ",".join(self._names), RETURNED: str(int(returned))}
        names[DOMAINS] = json.dumps(dict(self._domains))
        child = Child(self._command(node, marks | names), {}, self._paths.logs / f"agent-{node}.log")
        self._agents[node] = child
        self._alive.add(node)
        self._poller.register(child.pidfd, zmq.POLLIN)

    def _lose(self, node: str) -> None:
        """Tell everybody that a node is gone. It may come back."""
        if self._run.site.return_s is not None:
            self._return_at[node] = time.monotonic() + self._run.site.return_s
        self._up.pop(node, None)
        self._alive.discard(node)
        self._voters.discard(node)
        self._exited[node] = NodeExited(node, "its agent is gone", self._namings)
        self._tell_all(self._exited[node])
        self._name_voters()

    def _name_voters(self) -> None:
        """Have those elect who are there, once nobody is left who could."""
        if not self._voters and self._up:
            self._voters = set(self._up)
            self._namings += 1
            self._tell_all(Voters("", tuple(n for n in self._names if n in self._up), self._namings, self._term))

    def _ended_agents(self) -> list[str]:
        ended = [node for node, child in self._agents.items() if wait_exit(child.pidfd, 0.0)]
        for node in ended:
            child = self._agents.pop(node)
            self._poller.unregister(child.pidfd)
            child.reap()
        return ended

    def _handle(self, sender: str, message: Message) -> None:
        if isinstance(message, NodeUp) and message.node == sender and sender in self._alive:
            for known in (*self._exited.values(), *self._up.values()):
                self._server.send(message.node, known)
            self._exited.pop(message.node, None)
            self._up[message.node] = message
            self._tell_all(message)
            self._name_voters()
        elif isinstance(message, Lead) and message.term >= self._term:
            self._leader, self._term, self._led = sender, message.term, time.monotonic()

    def _tell_all(self, message: Message) -> None:
        for node in self._up:
            self._server.send(node, message)


class VirtualNodes(Nodes):
    """The embedded cluster: nodes are child processes, and MPI worlds are launched here."""

    def __init__(self, paths: RunPaths, run: RunConfig) -> None:
        self._turned = time.monotonic()
        self._world: subprocess.Popen[bytes] | None = None
        self._world_number = 0
        super().__init__(paths, run, LOOPBACK)

    def _command(self, node: str, environment: dict[str, str]) -> list[str]:
        told = [f"{name}={value}" for name, value in environment.items()]
        return ["/usr/bin/env", *told, *python("gemini_hpc.runtime.agent", str(self._paths.run_dir), node)]

    def turn(self) -> Finish | None:
        away_s = time.monotonic() - self._turned
        end = super().turn()
        self._turned = time.monotonic()
        if away_s > AWAY_S:  # what was said meanwhile may not have been read yet
            self._led = self._turned
        recovery = self._run.recovery
        bound_s = recovery.build_s + Embedded.forsaken_timeouts * recovery.heartbeat_timeout_s
        if end is None and self._turned - self._led > bound_s:  # and whoever could have led has given up
            why = f"nobody has led for {bound_s:.0f} s, for most of those who vote are silent"
            end = Finish("", "suspended", f"{why}; go on from the newest checkpoint")
        self._watch_world()
        return end

    def close(self) -> None:
        super().close()
        self._end_world()

    def _handle(self, sender: str, message: Message) -> None:
        if isinstance(message, StartWorld) and sender == self._leader and set(message.members) <= set(self._names):
            self._start_world(message)
        else:
            super()._handle(sender, message)

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
                [*LOGGED_TO, str(self._paths.logs / "windows.log"), *DYING_WITH_US, *command],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
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


class SlurmNodes(Nodes):
    """The nodes of a Slurm job: each agent is a step of its own.

    Its srun is our child, and is killed as soon as the agent is up, which outlives it: at the SIGTERM with which Slurm
    begins the end of a job, or its preemption, srun would kill the agent at once.
    """

    def __init__(self, paths: RunPaths, run: RunConfig) -> None:
        if run.site.mpi == "openmpi":
            check_openmpi(Path(sys.executable))
        if not paths.shm_dir.is_dir():
            raise UserError(f"site.shm_dir: there is no folder {paths.shm_dir} on {os.uname().nodename}; correct it")
        self._job = this_job(run.site.call_timeout_s)
        self._up_since: dict[str, float] = {}
        self._without: dict[str, float] = {}  # nodes without an agent, since when
        self._free: frozenset[str] = frozenset()  # those of them that the job has, and Slurm would use
        super().__init__(paths, run, own_address(run))
        active = run.cluster.nodes
        if len(self._names) != active + run.cluster.spares:
            print(
                f"the job has {len(self._names)} nodes: {active} train, {len(self._names) - active} stand by",
                flush=True,
            )
        threading.Thread(target=self._watch_steps, daemon=True).start()

    def turn(self) -> Finish | None:
        end = super().turn()
        for node, since in self._without.items():
            if since > self._up_since.get(node, float("inf")):
                del self._up_since[node]
                self._lose(node)
        return end

    def _may_return(self, node: str) -> bool:
        return node in self._free

    def close(self) -> None:
        for node in self._alive:
            self._server.send(node, Retire(node, 0))
        deadline = time.monotonic() + PATIENCE_S
        while self._with_agents() != set() and time.monotonic() < deadline:
            time.sleep(STEPS_POLL_S)
        super().close()

    def _handle(self, sender: str, message: Message) -> None:
        if isinstance(message, NodeUp) and (srun := self._agents.pop(sender, None)) is not None:
            self._poller.unregister(srun.pidfd)
            for shepherd in children_of(srun.pid):  # first: it is there to end the step when srun dies
                kill(shepherd, signal.SIGKILL)
            srun.end()
            self._up_since[sender] = time.monotonic()
        super()._handle(sender, message)  # the agent hears of it, and begins

    def _command(self, node: str, environment: dict[str, str]) -> list[str]:
        # not into srun's own environment: whoever looks for the node's processes is not to find it
        told = [f"{name}={value}" for name, value in environment.items()]
        shepherd = ["/bin/sh", "-c", SHEPHERD, sys.executable, str(self._paths.shm_dir)]
        agent = python("gemini_hpc.runtime.agent", str(self._paths.run_dir), node)
        step = [*self._job.step([node], AGENT_STEP), *shepherd, str(self._paths.logs / f"agent-{node}.log")]
        return [*DYING_WITH_US, "/usr/bin/env", *step, "env", *told, *agent]

    def _watch_steps(self) -> None:
        """See which nodes have no agent any more. Those that have one see it by themselves, and sooner as a rule."""
        missed: dict[str, float] = {}  # since when
        while not self._closed:
            time.sleep(STEPS_S)
            asked = time.monotonic()
            found = self._with_agents()
            if found is None:
                continue
            lone = [node for node in self._names if node not in found]
            missed = {node: missed[node] if self._is_missed(missed.get(node), node) else asked for node in lone}
            without = {node: since for node, since in missed.items() if since < asked}  # said twice
            if self._run.site.return_s is not None and without:
                self._free = self._usable() & without.keys()
            self._without = without

    def _is_missed(self, since: float | None, node: str) -> bool:
        """Whether it has been missed since then; one that came back, and was lost, between two looks is missed anew."""
        return since is not None and since > self._up_since.get(node, 0.0)

    def _with_agents(self) -> set[str] | None:
        """Return the nodes whose agents run; None = Slurm does not say."""
        try:
            return {node for name, node in self._job.steps() if name == AGENT_STEP}
        except SlurmError:  # it is busy, or away
            return None

    def _usable(self) -> frozenset[str]:
        """Return the nodes that the job has, and that are neither down nor drained: those that go down it loses."""
        try:
            states = self._job.node_states(self._job.nodes(self._job.nodelist()))
        except SlurmError:
            return frozenset()
        return frozenset(node for node, state in states.items() if state == "up")
