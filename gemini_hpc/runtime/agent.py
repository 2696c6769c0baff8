"""The agent: one per node, durable. Owns the arena, starts and watches the node's processes, obeys a coordinator.

It imports neither torch nor MPI, so it starts fast and their bugs cannot kill it. The agent of the first node also
plays the coordinator.
"""

import os
import signal
import sys
import threading
import time

import zmq

from gemini_hpc.arena import OWN, Arena, ArenaError, Geometry, State
from gemini_hpc.config import RunConfig
from gemini_hpc.core.messages import (
    Abort,
    Command,
    Copied,
    Event,
    Finish,
    Gone,
    Heartbeat,
    Hello,
    HostLost,
    HostReady,
    Join,
    Load,
    Message,
    NodeExited,
    NodeUp,
    Persist,
    Persisted,
    Publish,
    Published,
    Pull,
    RestartWorker,
    Retire,
    Safe,
    Stepped,
    WorkerLost,
    WorkerReady,
    WorldFailed,
    Written,
)
from gemini_hpc.runtime.channel import Channel, Listener
from gemini_hpc.runtime.children import PARENT, Child
from gemini_hpc.runtime.cluster import CLUSTER, NODES, address_of, coordinator_of
from gemini_hpc.runtime.coordinator import Coordinator
from gemini_hpc.runtime.paths import RunPaths, open_run
from gemini_hpc.runtime.processes import NODE_MARK, RUN_MARK, die_with_parent, wait_exit
from gemini_hpc.runtime.wire import Wire
from gemini_hpc.telemetry import EventLog, EventThread

TICK_MS = 20
LEASE_TIMEOUTS = 10
"""After this many heartbeat timeouts without a coordinator, a node takes itself for evicted."""

FLUSH_S = 2.0
"""How long the end may wait for the event log."""

ORDERS_FOR = {
    "worker": (Join, Abort),
    "host": (Pull, Gone),
    "archiver": (Persist, Load, Publish),
}


class Agent:
    """The node's supervisor: one loop over its sockets, its children and the clock."""

    def __init__(self, paths: RunPaths, run: RunConfig, node: str, nodes: tuple[str, ...]) -> None:
        self._paths, self._run, self._node = paths, run, node
        self._address = address_of(node, nodes)
        self._built_rank = min(nodes.index(node), run.cluster.nodes - 1)
        self._events = EventThread(EventLog(paths.run_dir, node))
        self._wire = Wire(paths.keys)
        self._server = self._wire.listen(self._address)
        self._cluster = self._wire.call(os.environ[CLUSTER], node)
        self._listener = Listener(paths.socket(node))
        self._poller = zmq.Poller()
        self._arena: Arena | None = None
        self._ready: WorkerReady | None = None  # a worker that waits for its arena
        self._making_arena: threading.Thread | None = None
        self._arena_failure = ""
        self._strangers: list[Channel] = []  # connected, not introduced yet
        self._channels: dict[str, Channel] = {}  # role -> the line to it
        self._children: dict[str, Child] = {}
        self._host_world = 0
        self._archiving: list[tuple[float, Message]] = []  # orders that the archiver has not answered
        self._coordinator_id = ""  # of the coordinator's client on our server
        self._backlog: list[Event] = []  # events from before it came
        self._last_order = time.monotonic()
        self._last_beat = 0.0
        self._last_round = time.monotonic()
        self._worker_starts = 0
        self._over = False
        self._role = Coordinator(paths, run, nodes, self._wire, self._cluster, self._events)
        self._coordinates = node == coordinator_of(nodes)

    # --- the loop -----------------------------------------------------------------------------------

    def serve(self) -> None:
        """Run until the run is over, or this node is evicted."""
        for source in (self._server.socket, self._cluster.socket, self._listener):
            self._poller.register(source, zmq.POLLIN)
        self._cluster.send(NodeUp(self._node, self._server.endpoint))
        self._start_worker()
        self._start_archiver()
        while not self._over:
            self._poller.poll(TICK_MS)
            self._read_cluster()
            self._read_orders()
            self._read_children()
            self._watch_children()
            self._finish_arena()
            self._watch_clock()
            self._note_stall()
            if self._coordinates:
                self._role.turn(self._poller)
        self._leave()

    def _leave(self) -> None:
        for child in self._children.values():
            child.end()
        self._wire.close()
        self._events.close(FLUSH_S)
        self._paths.socket(self._node).unlink(missing_ok=True)
        self._paths.arena(self._node).unlink(missing_ok=True)

    def _watch_clock(self) -> None:
        now, rules = time.monotonic(), self._run.recovery
        if now - self._last_beat >= rules.heartbeat_s:
            self._last_beat = now
            self._tell(Heartbeat(self._node))
        if now - self._last_order > LEASE_TIMEOUTS * rules.heartbeat_timeout_s and self._coordinator_id:
            self._events.emit("run", state="stopped", reason="no coordinator was heard for the lease time")
            self._over = True
        if self._archiving and now - self._archiving[0][0] > rules.archive_s:
            self._restart_archiver(f"no answer within {rules.archive_s:.0f} s")

    def _note_stall(self) -> None:
        """Say so when the loop stood still for long: others may have taken this node for dead."""
        now, before = time.monotonic(), self._last_round
        self._last_round = now
        if now - before > self._run.recovery.heartbeat_timeout_s / 2:
            self._events.emit("stalled", seconds=now - before)

    # --- the coordinator and the cluster ------------------------------------------------------------

    def _tell(self, event: Event) -> None:
        """Report to the coordinator; kept until there is one."""
        if self._coordinator_id:
            self._server.send(self._coordinator_id, event)
        elif not isinstance(event, Heartbeat):
            self._backlog.append(event)

    def _read_cluster(self) -> None:
        while (message := self._cluster.receive()) is not None:
            if isinstance(message, (NodeUp, NodeExited, WorldFailed)):
                self._role.hear(message)

    def _read_orders(self) -> None:
        while (received := self._server.receive()) is not None:
            identity, message = received
            self._last_order = time.monotonic()
            if identity != self._coordinator_id:
                self._coordinator_id = identity
                for event in self._backlog:
                    self._tell(event)
                self._backlog.clear()
            if isinstance(message, Command):
                self._obey(message)

    def _obey(self, order: Command) -> None:
        if isinstance(order, (Finish, Retire)):
            self._over = True
        elif isinstance(order, RestartWorker):
            self._end_worker()
            self._start_worker()
        elif isinstance(order, Safe):
            if self._arena is not None:
                self._arena.safe_step = order.step
        else:
            role = next(role for role, kinds in ORDERS_FOR.items() if isinstance(order, kinds))
            self._pass_on(role, order)

    def _pass_on(self, role: str, order: Command) -> None:
        if role == "archiver":
            self._archiving.append((time.monotonic(), order))
        channel = self._channels.get(role)
        if channel is not None:
            channel.send(order)

    # --- the node's processes -----------------------------------------------------------------------

    def _start(self, role: str, module: str, **environment: str) -> None:
        marks = {RUN_MARK: self._paths.run_id, NODE_MARK: f"{self._paths.run_id}:{self._node}"}
        arguments = [str(self._paths.run_dir), self._node]
        log = self._paths.logs / f"{role}-{self._node}.log"
        child = Child(module, arguments, {**marks, **environment}, log)
        self._children[role] = child
        self._poller.register(child.pidfd, zmq.POLLIN)

    def _start_worker(self) -> None:
        self._worker_starts += 1
        self._start(
            "worker",
            "gemini_hpc.runtime.worker",
            GEMINI_RANK=str(self._built_rank),
            GEMINI_ADDRESS=self._address,
            GEMINI_RESTARTED=str(int(self._worker_starts > 1)),
        )

    def _end_worker(self) -> None:
        child = self._children.pop("worker", None)
        if child is not None:
            self._poller.unregister(child.pidfd)
            child.end()
        self._drop_channel("worker")
        self._ready = None

    def _start_archiver(self) -> None:
        self._start("archiver", "gemini_hpc.runtime.archiver")

    def _restart_archiver(self, reason: str) -> None:
        """Kill a hung archiver, or follow a dead one; what it was ordered to do has failed."""
        child = self._children.pop("archiver", None)
        if child is not None:
            self._poller.unregister(child.pidfd)
            child.end()
        self._drop_channel("archiver")
        failed, self._archiving = self._archiving, []
        for _, order in failed:
            self._tell(_failure(order, f"the archiver failed: {reason}"))
        self._start_archiver()

    def _watch_children(self) -> None:
        for role, child in list(self._children.items()):
            if not wait_exit(child.pidfd, 0.0):
                continue
            if role == "archiver":
                self._restart_archiver("it died")
                continue
            del self._children[role]
            self._poller.unregister(child.pidfd)
            self._tell(WorkerLost(self._node, child.reap()))
            self._drop_channel(role)

    def _read_children(self) -> None:
        ready = dict(self._poller.poll(0))
        speaking = [(role, channel) for role, channel in self._channels.items() if channel.fileno() in ready]
        for channel in [c for c in self._strangers if c.fileno() in ready]:
            self._introduce(channel, channel.receive())
        if self._listener.fileno() in ready:
            channel = self._listener.accept()
            self._strangers.append(channel)
            self._poller.register(channel.fileno(), zmq.POLLIN)
        for role, channel in speaking:
            if self._channels.get(role) is not channel:
                continue  # replaced a moment ago
            message = channel.receive()
            if message is None:
                self._drop_channel(role)
            else:
                self._hear(message)

    def _introduce(self, channel: Channel, hello: Message | None) -> None:
        self._strangers.remove(channel)
        if not isinstance(hello, Hello) or hello.role not in ORDERS_FOR:
            self._poller.unregister(channel.fileno())
            channel.close()
            return
        if hello.role in self._channels:
            self._drop_channel(hello.role)
        self._channels[hello.role] = channel
        if hello.role == "host":
            self._host_world = hello.world
        if hello.role == "archiver":
            for _, order in self._archiving:  # ordered before it was up
                channel.send(order)

    def _drop_channel(self, role: str) -> None:
        channel = self._channels.pop(role, None)
        if channel is None:
            return
        self._poller.unregister(channel.fileno())
        channel.close()
        if role == "host":
            self._tell(HostLost(self._node, self._host_world, "its line to the agent ended"))

    def _hear(self, message: Message) -> None:
        """What a child says goes to the coordinator, after what it means here."""
        if isinstance(message, Written):
            self._pass_to_host(message)
            return
        if isinstance(message, HostReady):
            self._remind_host()
        if isinstance(message, WorkerReady):
            self._ready = message
            self._make_arena(message.snapshot_bytes)
            return
        if isinstance(message, (Persisted, Published)) or (isinstance(message, Copied) and self._is_load(message)):
            self._archiving = self._archiving[1:]
        if isinstance(message, Stepped):
            self._log_step(message)
        if isinstance(message, Event):
            self._tell(message)

    def _pass_to_host(self, message: Message) -> None:
        host = self._channels.get("host")
        if host is not None:
            host.send(message)

    def _remind_host(self) -> None:
        """A new host has to seal what was written, or sealed without a report, while there was none."""
        assert self._arena is not None
        for half in (0, 1):
            if self._arena.record(OWN, half).state in (State.WRITTEN, State.SEALED):
                self._pass_to_host(Written(self._node, half))

    def _is_load(self, message: Copied) -> bool:
        order = self._archiving[0][1] if self._archiving else None
        return isinstance(order, Load) and (order.rank, order.step) == (message.rank, message.step)

    def _log_step(self, message: Stepped) -> None:
        self._events.emit(
            "step",
            rank=message.rank,
            generation=message.generation,
            step=message.step,
            loss=message.loss,
            step_s=message.step_s,
            snapshot_s=message.snapshot_s if message.snapshot_s >= 0 else None,
        )

    # --- the arena ----------------------------------------------------------------------------------

    def _make_arena(self, snapshot_bytes: int) -> None:
        """Allocate and touch the arena in a thread: it may take seconds, and the heart must go on beating."""
        geometry = Geometry(self._run.protect.replicas, snapshot_bytes)
        if self._arena is not None:
            if self._arena.geometry != geometry:
                self._arena_failure = "its snapshots have another size than before"
            return
        path = self._paths.arena(self._node)

        def make() -> None:
            try:
                self._arena = Arena.create(path, geometry, self._paths.run_id)
            except ArenaError as error:
                self._arena_failure = str(error)

        self._making_arena = threading.Thread(target=make, daemon=True)
        self._making_arena.start()

    def _finish_arena(self) -> None:
        """Report the worker as ready once there is an arena for it."""
        if self._ready is None or (self._making_arena is not None and self._making_arena.is_alive()):
            return
        ready, self._ready = self._ready, None
        if self._arena_failure:
            self._end_worker()
            self._tell(WorkerLost(self._node, self._arena_failure))
            return
        assert self._arena is not None
        self._log_memory(self._arena)
        self._tell(ready)

    def _log_memory(self, arena: Arena) -> None:
        each = 2 * arena.geometry.half_bytes
        remote = each * (arena.geometry.areas - 1)
        self._events.emit("memory", local_bytes=each, peer_bytes=remote)


def _failure(order: Message, reason: str) -> Event:
    if isinstance(order, Persist):
        return Persisted(order.node, order.rank, order.step, "", 0, order.checksum, False, reason, 0.0)
    if isinstance(order, Load):
        return Copied(
            order.node,
            order.generation,
            order.rank,
            order.step,
            order.area,
            order.half,
            0,
            0,
            False,
            reason,
            0.0,
        )
    assert isinstance(order, Publish)
    return Published(order.node, order.step, "", False, reason)


def main() -> None:
    run_dir, node = sys.argv[1:]
    die_with_parent(int(os.environ[PARENT]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the supervisor's to handle
    paths, run = open_run(run_dir)
    Agent(paths, run, node, tuple(os.environ[NODES].split(","))).serve()


if __name__ == "__main__":
    main()
