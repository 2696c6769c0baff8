"""The agent: one per node, durable. Owns the arena, starts and watches the node's processes, obeys a coordinator.

It imports neither torch nor MPI, so it starts fast and their bugs cannot kill it. One of the agents also coordinates:
the one that the others elected.
"""

import json
import os
import signal
import sys
import time
from dataclasses import replace
from math import inf

import zmq

from gemini_hpc.arena import COPY_TUNING, OWN, Arena, State
from gemini_hpc.config import RunConfig
from gemini_hpc.config.capacity import areas_of
from gemini_hpc.core.account import Account
from gemini_hpc.core.codec import Message
from gemini_hpc.core.domains import Domains
from gemini_hpc.core.messages import (
    Command,
    Event,
    Finish,
    Hello,
    HostLost,
    HostReady,
    Join,
    Lead,
    Load,
    NodeDrains,
    NodeExited,
    NodeUp,
    Profiled,
    Reads,
    RequestVote,
    RestartWorker,
    Retire,
    Sealed,
    Stepped,
    Suspend,
    Voters,
    WorkerLost,
    WorkerReady,
    WorldFailed,
    Written,
)
from gemini_hpc.core.seat import Seat
from gemini_hpc.runtime.allocation import Allocation, Embedded
from gemini_hpc.runtime.archiving import Archiving
from gemini_hpc.runtime.arena_maker import ArenaMaker
from gemini_hpc.runtime.children import PARENT, carry_output
from gemini_hpc.runtime.cluster import CLUSTER, DOMAINS, NODES, RETURNED
from gemini_hpc.runtime.coordinator import Coordinator, rules_of
from gemini_hpc.runtime.household import Household, LineEnded, ProcessEnded
from gemini_hpc.runtime.paths import RunPaths, open_run
from gemini_hpc.runtime.processes import die_with_parent
from gemini_hpc.runtime.sealing import Sealer
from gemini_hpc.runtime.wire import Wire
from gemini_hpc.telemetry import EventThread

TICK_MS = 20
FLUSH_S = 2.0
"""How long the end may wait for the event log."""

REPEAT_S = 1.0
"""How often the last step and the sealed snapshots are told again."""


_signals: list[int] = []
"""Those that came, and tell the agent to end."""


class Agent:
    """The node's supervisor: one loop over its sockets, its children and the clock."""

    def __init__(self, paths: RunPaths, run: RunConfig, node: str, nodes: tuple[str, ...], domains: Domains) -> None:
        self._paths, self._run, self._node = paths, run, node
        self._built_rank = min(nodes.index(node), run.cluster.nodes - 1)
        self._events = EventThread(paths.run_dir, node)
        self._wire = Wire(paths.keys)
        supervisor = self._wire.call(os.environ[CLUSTER], node)
        on_slurm = run.site.kind == "slurm"
        self._cluster = (
            Allocation(supervisor, paths, run, node, nodes) if on_slurm else Embedded(supervisor, node, nodes)
        )
        self._server = self._wire.listen(self._cluster.address)
        self._cluster.announce(NodeUp(node, self._server.endpoint))
        self._poller = zmq.Poller()
        self._household = Household(paths, node, self._poller, self._wire.tally)
        self._arena_maker = ArenaMaker(paths.arena(node), areas_of(run), paths.run_id)
        self._account = Account(node)
        self._ready: WorkerReady | None = None  # a worker that waits for its arena
        self._sealer = Sealer()
        self._started = self._last_round = time.monotonic()
        self._said_again = self._started
        self._told_tally = replace(self._wire.tally)
        self._profile: Profiled | None = None  # of the worker's steps, for another window host
        self._stopped_since = 0.0  # since when the worker does not run, because of a signal
        self._worker_starts = 0
        self._last_words = ""  # why the worker is about to exit
        self._final = False  # and whether another would do no better
        self._over = False
        self._forsaken = False  # as nobody is left to work for
        self._end: Finish | None = None  # how the run ended, once it has
        returned = os.environ.get(RETURNED) == "1"
        self._seat = Seat(rules_of(run, nodes, domains), node, run.recovery.heartbeat_s, self._started, returned)
        self._role = Coordinator(paths, run, self._seat, self._wire, self._cluster, self._events)
        self._archiving = Archiving(self._household, run.recovery.archive_s, self._tell)

    # --- the loop -----------------------------------------------------------------------------------

    def serve(self) -> None:
        """Run until the run is over, or this node is evicted."""
        for source in (self._server.socket, self._cluster.socket):
            self._poller.register(source, zmq.POLLIN)
        self._start_worker()
        while not self._over and not self._is_cancelled():
            self._poller.poll(TICK_MS)
            self._read_cluster()
            self._read_orders()
            self._hear_children()
            self._finish_arena()
            self._watch_clock()
            self._note_stall()
            self._role.turn(self._poller)
        self._leave()

    def _leave(self) -> None:
        self._household.end_all()
        self._paths.socket(self._node).unlink(missing_ok=True)
        self._paths.arena(self._node).unlink(missing_ok=True)
        if self._end is not None:
            self._cluster.see_out(self._end, self._is_cancelled, self._forsaken)
        self._cluster.close()
        self._wire.close()
        self._events.close(FLUSH_S)

    def _is_cancelled(self) -> bool:
        if _signals:
            _signals.clear()
            self._cluster.told_to_end()
        return self._cluster.is_cancelled

    def _watch_clock(self) -> None:
        now, rules = time.monotonic(), self._run.recovery
        led = self._account.coordinator
        alone_s = self._seat.forsaken(now) if led else now - self._started
        self._cluster.ask(self._seat.election.leads or alone_s > rules.heartbeat_timeout_s)
        if alone_s > (self._cluster.forsaken_timeouts * rules.heartbeat_timeout_s if led else rules.build_s):
            self._give_up(f"no majority has had a coordinator for {alone_s:.0f} s")
        self._archiving.watch(now)
        self._watch_worker(now)
        if now - self._said_again > REPEAT_S:
            self._said_again = now
            self._say_again()
            if self._wire.tally != self._told_tally:
                self._told_tally = replace(self._wire.tally)
                self._events.emit("turned_away", **vars(self._told_tally))

    def _give_up(self, reason: str) -> None:
        """Leave a run that goes on, perhaps, without this node."""
        self._events.emit("run", state="stopped", reason=reason)
        self._over = self._forsaken = True
        self._end = Finish("", "suspended", reason)

    def _say_again(self) -> None:
        """A line may have broken, and a message with it: repeat what is told only once. And see that all is there."""
        if self._account.last_step is not None:
            self._tell(self._account.last_step)
        if self._account.host_world:
            self._remind_host()
        if self._arena is not None:
            host_s = self._run.recovery.fetch_s if self._account.host_world else 0.0
            patience_s = host_s + 2 * self._run.recovery.suspect_s
            for record, half in self._sealer.look(self._arena, time.monotonic(), patience_s):
                at = (record.generation, record.rank, record.step)
                self._report(Sealed(self._node, *at, half, record.nbytes, record.checksum))
        for path in (self._arena.path if self._arena is not None else None, self._paths.socket(self._node)):
            if path is not None and not path.exists():
                # what it holds can be reached by nobody new, and every MPI world would fail
                self._give_up(f"{path} is gone")

    def _watch_worker(self, now: float) -> None:
        """A stopped worker (SIGSTOP, a debugger) holds up all ranks, and no socket breaks: end it."""
        if not self._household.is_stopped("worker"):
            self._stopped_since = 0.0
        elif not self._stopped_since:
            self._stopped_since = now
        elif now - self._stopped_since > self._run.recovery.suspect_s:
            self._last_words = "it was stopped by a signal"
            self._household.kill("worker")

    def _note_stall(self) -> None:
        """Say so when the loop stood still for long: others may have taken this node for dead."""
        now, before = time.monotonic(), self._last_round
        self._last_round = now
        if now - before > self._run.recovery.heartbeat_timeout_s / 2:
            self._events.emit("stalled", seconds=now - before)

    # --- the coordinator and the cluster ------------------------------------------------------------

    def _tell(self, event: Event) -> None:
        """Report to the coordinator. While there is none it is lost: the next one is told all by the inventory."""
        if self._seat.leader and self._seat.leader == self._account.coordinator:
            self._server.send(self._seat.leader, event)

    def _read_cluster(self) -> None:
        while (message := self._cluster.receive()) is not None:
            if isinstance(message, (NodeUp, NodeExited, NodeDrains, Voters, WorldFailed, Suspend)):
                self._role.hear(message)
            elif isinstance(message, Finish):
                self._events.emit("run", state=message.state, reason=message.reason)
                self._over, self._end = True, message

    def _read_orders(self) -> None:
        while (received := self._server.receive()) is not None:
            sender, message = received
            self._cluster.hears(sender)
            if isinstance(message, (RequestVote, Lead)):
                for answer in self._role.obey(message):
                    self._server.send(sender, answer)
                if isinstance(message, Lead) and sender == self._seat.leader:
                    self._inform(message)
            elif isinstance(message, Command) and sender == self._seat.leader and message.node == self._node:
                self._obey(message)
            else:
                self._wire.tally.stale += 1

    def _inform(self, lead: Lead) -> None:
        """Tell a new coordinator what there is on this node."""
        if self._account.informs(lead):
            held = self._arena.sealed() if self._arena is not None else ()
            self._tell(
                self._account.inventory(
                    (area, half, r.rank, r.step, r.generation, r.nbytes, r.checksum) for area, half, r in held
                )
            )

    def _obey(self, order: Command) -> None:
        if self._account.is_stale(order):
            self._wire.tally.stale += 1
            return
        if isinstance(order, Finish):
            self._cluster.send(Finish("", order.state, order.reason))  # the coordinator's own word may not arrive
            self._over, self._end = True, order
        elif isinstance(order, Retire):
            self._over = True
        elif isinstance(order, RestartWorker):
            self._start_worker()
        else:
            role = self._account.role_of(order)
            if self._arena is not None:
                self._arena.safe_step = self._account.safe_step
            if isinstance(order, Join):
                self._archiving.end_loads()
            if isinstance(order, (Join, Load)) and self._account.fetches:  # now the own area is another's to write to
                self._household.kill("host")
            if role == "archiver":
                self._archiving.order(order)
            elif role:
                self._household.send(role, order)

    # --- the node's processes -----------------------------------------------------------------------

    def _start_worker(self) -> None:
        self._ready = None
        self._profile = None
        if self._arena is not None:
            self._arena.idle_until = inf
        self._last_words, self._final = "", False
        self._stopped_since = 0.0
        self._account.worker = "building"
        self._worker_starts += 1
        self._household.start(
            "worker",
            "gemini_hpc.runtime.worker",
            GEMINI_RANK=str(self._built_rank),
            GEMINI_ADDRESS=self._cluster.group_address,
            GEMINI_RESTARTED=str(int(self._worker_starts > 1)),
            **({} if "GLIBC_TUNABLES" in os.environ else COPY_TUNING),
        )

    def _hear_children(self) -> None:
        for role, news in self._household.news():
            if isinstance(news, ProcessEnded):
                if role == "worker":
                    self._lose_worker(self._last_words or news.how)
                else:
                    self._archiving.ended()
            elif isinstance(news, LineEnded):
                if role == "host":
                    lost, self._account.host_world = self._account.host_world, 0
                    self._tell(HostLost(self._node, lost, "its line to the agent ended"))
            elif isinstance(news, Hello):
                self._greet(news)
            else:
                self._hear(news)

    def _lose_worker(self, reason: str) -> None:
        if self._arena is not None:
            self._arena.idle_until = inf  # it uses the network no more
        self._report(WorkerLost(self._node, reason, self._final))

    def _report(self, event: Event) -> None:
        """What a process of the node said, or came to: into the account, and to the coordinator."""
        self._account.hear(event)
        self._tell(event)

    def _greet(self, hello: Hello) -> None:
        if hello.role == "host":
            self._account.host_world = hello.world
            self._tell(hello)
        if hello.role == "archiver":
            self._archiving.greet()

    def _hear(self, message: Message) -> None:
        """What a child says goes to the coordinator, after what it means here."""
        if isinstance(message, Written):
            self._household.send("host", message)
            return
        if isinstance(message, WorkerReady):
            self._ready = message
            self._arena_maker.make(message.snapshot_bytes)
            return
        if isinstance(message, WorkerLost):
            self._last_words, self._final = message.reason, message.final  # the coordinator hears of it when it exits
            return
        if isinstance(message, HostReady):
            self._remind_host()
        elif isinstance(message, Stepped):
            self._log_step(message)
        elif isinstance(message, (Profiled, Reads)):
            self._log_traffic(message)
            return
        self._archiving.answered(message)
        if isinstance(message, Event):
            self._report(message)

    def _remind_host(self) -> None:
        """A new host has to seal what was written, or sealed without a report, while there was none."""
        for half in (0, 1):
            if self._arena is not None and self._arena.record(OWN, half).state in (State.WRITTEN, State.SEALED):
                self._household.send("host", Written(self._node, half))
        if self._profile is not None:
            self._household.send("host", self._profile)

    def _log_traffic(self, message: Profiled | Reads) -> None:
        """Training's use of the network and the window host's, in seconds since the step began."""
        if isinstance(message, Profiled):
            self._household.send("host", message)
            self._profile = replace(message, stamps=())
            fields = {"step_s": message.step_s, "idle_s": message.idle_s, "spread": message.spread}
            if message.stamps:
                self._events.emit("collectives", step=message.step, rank=message.rank, stamps=message.stamps, **fields)
        else:
            self._events.emit("reads", step=message.step, stamps=message.stamps)

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

    @property
    def _arena(self) -> Arena | None:
        return self._arena_maker.arena

    def _finish_arena(self) -> None:
        """Report the worker as ready once there is an arena for it."""
        if self._ready is None or self._arena_maker.is_busy():
            return
        ready, self._ready = self._ready, None
        if self._arena_maker.failure:
            self._household.end("worker")
            self._final = self._arena is not None  # another worker's would be as large; but room may come free
            self._lose_worker(self._arena_maker.failure)
            return
        assert self._arena is not None
        self._log_memory(self._arena)
        self._report(ready)

    def _log_memory(self, arena: Arena) -> None:
        each = 2 * arena.geometry.half_bytes
        remote = each * (arena.geometry.areas - 1)
        self._events.emit("memory", local_bytes=each, peer_bytes=remote)


def main() -> None:
    run_dir, node = sys.argv[1:]
    paths, run = open_run(run_dir)
    # in a step of Slurm the parent is Slurm's own, on this node
    die_with_parent(int(os.environ[PARENT]) if run.site.kind == "local" else os.getppid())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the supervisor's to handle
    signal.signal(signal.SIGTERM, lambda told, _frame: _signals.append(told))
    carry_output()
    Agent(paths, run, node, tuple(os.environ[NODES].split(",")), json.loads(os.environ[DOMAINS])).serve()


if __name__ == "__main__":
    main()
