"""The whole cluster in one thread and in simulated time: nodes with real seats, a network, the cluster's own process.

It knows the truth, which the nodes only hear of: what really lies in every arena and of which history it is, who is
alive, whose orders were obeyed. `invariants` holds what is decided against it, after every event. One seed is one
history, exactly; without a seed all delays are constant.
"""

import heapq
import random
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import count
from typing import Any

from gemini_hpc.core import messages as m
from gemini_hpc.core.placement import held_by
from gemini_hpc.core.state import Checkpoint, Cluster, Phase, Rules, new_cluster
from gemini_hpc.core.types import FRESH
from tests.scenarios.invariants import Broken, Invariants
from tests.scenarios.network import Line, Network
from tests.scenarios.node import CLUSTER, LEASE_TIMEOUTS, NBYTES, Content, Host, Node
from tests.scenarios.training import Group, Worker


def rules(nodes: int = 5, **changes: Any) -> Rules:
    defaults: dict[str, Any] = {
        "nodes": tuple(f"n{i}" for i in range(nodes)),
        "world_size": 4,
        "replicas": 2,
        "placement": "mixed",
        "domains": {},
        "total_steps": 30,
        "snapshot_every": 1,
        "persist_every": 10,
        "patient": False,
        "heartbeat_timeout_s": 1.2,
        "suspect_s": 0.5,
        "leave_s": 2.0,
        "build_s": 5.0,
        "takeover_s": 1.7,
        "fetch_s": 3.0,
        "gather_s": 9.0,
        "join_s": 4.0,
        "progress_s": 20.0,
        "world_s": 3.0,
        "finish_s": 10.0,
        "max_restarts": 3,
        "max_fruitless": 20,
    }
    return Rules(**(defaults | changes))


WATCH_S = 2.0
"""How often the cluster looks whether anybody leads."""

SUSPEND_S = 1.0
"""How often the cluster says that it takes the nodes away."""


class Simulation:
    """The clock, the nodes, and the cluster's own process (the supervisor, or Slurm)."""

    def __init__(
        self,
        the_rules: Rules | None = None,
        seed: int | None = None,
        published: Checkpoint | None = None,
        absent: tuple[str, ...] = (),
        prepare: Callable[["Simulation"], None] | None = None,
    ) -> None:
        self.rules = the_rules or rules()
        self._random = random.Random(seed) if seed is not None else None
        self.now, self.events = 0.0, 0
        self._queue: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._number = count()
        self.network = Network(self)
        self.invariants = Invariants(self)
        self.build_s, self.step_s, self.pull_s, self.persist_s, self.survey_s = 0.3, 0.05, 0.02, 0.05, 0.01
        self.host_s, self.exit_s, self.return_s = 0.2, 0.02, None
        self.bad_reads = 0.0  # share of the reads whose bytes arrive damaged
        self.struck: set[str] = set()  # kinds of the faults of a schedule that came to pass
        self.corrupted: set[str] = set()  # nodes where something that lies in memory was damaged
        self.spoiled: Counter[tuple[int, int, str]] = Counter()  # those of a rank's snapshot of a step on a node
        self.persist_fails: Callable[[m.Command], bool] = lambda order: False
        self.no_writes: set[str] = set()  # nodes that cannot write to the persistent tier
        self.no_host: set[str] = set()  # nodes whose window host does not start
        self.bad_host: set[str] = set()  # nodes whose window host starts, and dies before the others are ready
        self.bad_nodes: set[str] = set()  # nodes whose worker fails in the first step that it does
        self.bad_step = 0  # a step that no worker survives
        self.no_worlds_until = 0.0  # before then no window host starts at all
        self.areas = held_by(self.rules.world_size, self.rules.replicas, self.rules.placement)
        # what a test may look at or interfere with
        self.history: list[tuple[float, str, m.Event, tuple[m.Command, ...]]] = []
        self.orders: list[m.Command] = []
        self.notes: list[tuple[str, dict[str, Any]]] = []
        self.log: Callable[[str], None] | None = None
        self.intercept: Callable[[m.Event], bool] | None = None  # True: the test keeps the event
        self.held: list[tuple[Node, str, m.Event]] = []
        self.obeyed: Callable[[m.Command], bool] | None = None  # False: the order is lost
        self.deaf: set[str] = set()  # nodes of whose exit the cluster never speaks
        self.forsaken: list[str] = []
        # the truth
        self.groups: dict[int, Group] = {}
        self.stores: dict[str, Worker] = {}
        self.files: dict[tuple[int, int, int], Content] = {}  # (step, rank, checksum) -> on the persistent tier
        self.manifests: dict[int, dict[int, tuple[str, int, int]]] = {}
        self.most_trained = 0
        self.outcome, self.reason = "", ""
        # the cluster's own
        self._up: dict[str, m.NodeUp] = {}
        self._exited: dict[str, m.NodeExited] = {}
        self._voters, self._namings = set(self.rules.nodes), 0
        self._returning = 0  # nodes that are lost and will be back
        self._leader, self._term, self._led = "", 0, 0.0
        self._known = new_cluster(self.rules, 0.0)
        self._world = 0
        if published is not None:
            self.manifests[published.step] = dict(published.files)
            for rank, (_, _, checksum) in published.files.items():
                self.files[published.step, rank, checksum] = Content(rank, published.step, 7, 0).sealed()
        if prepare is not None:
            prepare(self)
        self.nodes = {}
        for name in self.rules.nodes:
            self.nodes[name] = Node(self, name, 0)
        self.after(WATCH_S, self._watch_leaders)
        for name in absent:
            self.nodes[name].up = False
            self.nodes[name].worker.alive = False
            self.network.cut([(name, CLUSTER)])

    # --- time and chance ----------------------------------------------------------------------------

    def some(self, seconds: float) -> float:
        """About that long, now and then much longer: exactly so without a seed."""
        if self._random is None:
            return seconds
        spread = self._random.random()
        return seconds * (0.2 + 1.6 * spread if spread < 0.9 else 5.0 * spread)

    def chance(self, share: float) -> bool:
        return share > 0 and self._random is not None and self._random.random() < share

    def after(self, seconds: float, action: Callable[..., None], *args: Any) -> None:
        heapq.heappush(self._queue, (self.now + seconds, next(self._number), action, args))

    def run(self, until: Callable[["Simulation"], bool], seconds: float = 60.0) -> "Simulation":
        """Go on until the condition holds; fail when it does not within `seconds`."""
        deadline, queue = self.now + seconds, self._queue
        while not until(self):
            if not queue or queue[0][0] > deadline:
                raise Broken(f"waited {seconds} s in vain: {self.where()}")
            self._next()
        return self

    def run_for(self, seconds: float) -> "Simulation":
        end = self.now + seconds
        while self._queue and self._queue[0][0] <= end:
            self._next()
        self.now = end
        return self

    def _next(self) -> None:
        self.now, _, action, args = heapq.heappop(self._queue)
        self.events += 1
        action(*args)

    def where(self) -> str:
        nodes = {
            n.name: (n.up, n.paused, n.worker.state if n.worker and n.worker.alive else "-", n.seat.leader)
            for n in self.nodes.values()
        }
        c = self.cluster
        return f"at {self.now:.2f} {c.phase} g{c.generation} plan={c.plan} {c.world} {nodes} {self.notes[-5:]}"

    # --- questions ----------------------------------------------------------------------------------

    @property
    def leader(self) -> Node | None:
        """The node that leads in the newest term."""
        leading = [n for n in self.nodes.values() if n.up and n.seat.cluster is not None]
        return max(leading, key=lambda n: n.seat.election.term, default=None)

    @property
    def cluster(self) -> Cluster:
        """What the coordinator knows; when there is none, what the last one knew."""
        leader = self.leader
        if leader is not None and leader.seat.cluster is not None:
            self._known = leader.seat.cluster
        return self._known

    def said(self, event: str) -> list[dict[str, Any]]:
        return [details for kind, details in self.notes if kind == event]

    def ordered(self, kind: type[m.Command]) -> list[Any]:
        return [order for order in self.orders if isinstance(order, kind)]

    def running(self) -> bool:
        return self.leader is not None and self.cluster.phase is Phase.RUNNING

    def over(self) -> bool:
        return bool(self.outcome)

    def reached(self, at_step: int) -> bool:
        c = self.cluster
        return len(c.stepped) == self.rules.world_size and min(c.stepped.values()) >= at_step

    # --- what nodes report to the simulation --------------------------------------------------------

    def looked_at(self, node: Node) -> None:
        self.invariants.one_acts(node)

    def decided(self, node: Node, before: Cluster | None, event: m.Event, orders: list[m.Command]) -> None:
        after = node.seat.cluster
        self.history.append((self.now, node.name, event, tuple(orders)))
        for order in orders:
            if isinstance(order, m.Note):
                self.notes.append((order.event, dict(order.details)))
                if self.log is not None:
                    self.log(f"{node.name} notes {order.event} {dict(order.details)}")
            elif not isinstance(order, (m.Lead, m.RequestVote)):
                self.orders.append(order)
                if self.log is not None:
                    self.log(f"{node.name} orders {order}")
        if after is not None:
            self._known = after
            self.invariants.decision(node, before, after, orders)
        self.invariants.one_acts(node)

    def obeys(self, node: Node, order: m.Command) -> bool:
        """Whether the order is carried out: a test may have it lost."""
        if self.obeyed is not None and not self.obeyed(order):
            return False
        self.invariants.obeyed(node, order)
        return True

    def restored(self, join: m.Join, members: dict[int, Worker]) -> int:
        """All ranks restore what lies in their own areas; return the state of that history."""
        contents = {rank: worker.restored for rank, worker in members.items()}
        return self.invariants.one_history(join.step, contents)

    def publish(self, order: m.Publish) -> None:
        named = {int(rank): entry for rank, entry in order.files.items()}
        contents = {rank: self.files.get((order.step, rank, entry[2])) for rank, entry in named.items()}
        self.invariants.one_history(order.step, contents)
        self.manifests[order.step] = {rank: (entry[0], entry[1], entry[2]) for rank, entry in named.items()}

    def survey(self, number: int, below: int | None) -> m.Surveyed:
        newest = max((step for step in self.manifests if below is None or step < below), default=FRESH)
        files = {str(rank): list(entry) for rank, entry in self.manifests.get(newest, {}).items()}
        return m.Surveyed("", number, newest, files)

    # --- the cluster's own process ------------------------------------------------------------------

    def cluster_hears(self, sender: str, life: int, message: m.Message) -> None:
        node = self.nodes[sender]
        alive = node.up and node.life == life
        if isinstance(message, m.NodeUp) and alive:
            for known in (*self._exited.values(), *self._up.values()):
                self._tell(sender, known)
            self._exited.pop(sender, None)
            self._up[sender] = message
            self._tell_all(message)
            self._name_voters()
        elif isinstance(message, m.Lead) and message.term >= self._term:
            self._leader, self._term, self._led = sender, message.term, self.now
        elif isinstance(message, m.StartWorld) and sender == self._leader:
            self.start_world(message)
        elif isinstance(message, m.Finish) and sender in self._up and not self.outcome:
            self.end(message.state, message.reason)

    def _watch_leaders(self) -> None:
        silent_s = self.rules.build_s + LEASE_TIMEOUTS * self.rules.heartbeat_timeout_s
        if not self.outcome and self.now - self._led > silent_s:
            self.end("suspended", f"nobody has led for {silent_s:.0f} s")
        self.after(WATCH_S, self._watch_leaders)

    def suspend(self) -> None:
        """The nodes are about to be taken away: say so until the run has ended."""
        if not self.outcome:
            self._tell_all(m.Suspend("", "the time limit is near"))
            self.after(SUSPEND_S, self.suspend)

    def drain(self, name: str, drains: bool = True) -> None:
        """The cluster gives the node no new work, or does again."""
        self._tell_all(m.NodeDrains(name, drains))

    def end(self, outcome: str, reason: str) -> None:
        self.outcome, self.reason = outcome, reason
        if self.log is not None:
            self.log(f"the run is over: {outcome}, {reason}")
        self.invariants.end()

    def _tell(self, name: str, message: m.Event) -> None:
        node = self.nodes[name]
        self.network.send((CLUSTER, name), node.arrive, node.life, CLUSTER, 0, message)

    def _tell_all(self, message: m.Event) -> None:
        for name in self._up:
            self._tell(name, message)

    def node_ended(self, node: Node, seen: bool) -> None:
        if self.log is not None:
            self.log(f"{node.name} has ended")
        for other in self.nodes.values():  # whose connection breaks
            if other.up and other.seat.cluster is not None:
                self.network.send((node.name, other.name), self._disconnected, other, node.name)
        last_words = self.network.quiet_at((node.name, CLUSTER)) - self.now
        if seen:
            self.after(max(self.some(self.exit_s), last_words), self._exit, node)
        if not any(other.up for other in self.nodes.values()):
            self.after(max(10 * self.exit_s, last_words), self._all_gone)

    def _disconnected(self, node: Node, lost: str) -> None:
        if node.up:
            node.from_child(m.Disconnected(lost))

    def _exit(self, node: Node) -> None:
        self._up.pop(node.name, None)
        self._voters.discard(node.name)
        self._exited[node.name] = m.NodeExited(node.name, "its agent is gone", self._namings)
        self._tell_all(self._exited[node.name])
        self._name_voters()
        if self.return_s is not None:
            self._returning += 1
            self.after(self.some(self.return_s), self._come_back, node)

    def _name_voters(self) -> None:
        if not self._voters and self._up:
            self._voters = set(self._up)
            self._namings += 1
            voters = tuple(name for name in self.rules.nodes if name in self._up)
            self._tell_all(m.Voters("", voters, self._namings, self._term))

    def _all_gone(self) -> None:
        if not self.outcome and not self._returning and not any(node.up for node in self.nodes.values()):
            self.end("suspended", "no node is left")

    def _come_back(self, node: Node) -> None:
        self._returning -= 1
        if not self.outcome:
            self.nodes[node.name] = Node(self, node.name, node.life + 1)

    def start_world(self, order: m.StartWorld) -> None:
        for node in self.nodes.values():
            node.end_host()
        self._world = order.world
        if self.now < self.no_worlds_until:
            self.after(self.some(0.3), self._tell_all, m.WorldFailed("", order.world, "the launcher failed"))
            return
        members = [self.nodes[name] for name in order.members]
        able = [n for n in members if n.up and n.account.snapshot_bytes and n.name not in self.no_host]
        hosts = []
        for node in able:
            node.host, node.account.host_world = Host(node, order.world, order.members), order.world
            hosts.append(node.host)
            self.after(self.some(0.05), node.from_child, m.Hello(node.name, "host", 1, order.world))
        if len(able) == len(members):
            self.after(self.some(self.host_s), self._world_ready, hosts)
            for node in members:
                if node.name in self.bad_host:
                    self.after(self.some(self.host_s / 2), node.end_host)
        elif not self.chance(0.5):  # else nobody says anything
            self.after(self.some(0.3), self._world_failed, order.world)

    def _world_failed(self, world: int) -> None:
        """The launcher ends the others; whether it or their agents say so first is chance."""
        failed = m.WorldFailed("", world, "a window host did not start")
        self.after(self.some(0.001), self._tell_all, failed)
        for node in self.nodes.values():
            if node.host is not None and node.host.world == world:
                node.end_host()

    def _world_ready(self, hosts: list[Host]) -> None:
        """All windows are made together, or none."""
        if all(host.alive and not host.hung for host in hosts):
            for host in hosts:
                host.ready = True
                self.after(self.some(0.01), self._host_ready, host)

    def _host_ready(self, host: Host) -> None:
        if host.alive:
            host.node.from_child(m.HostReady(host.node.name, host.world, host.members))

    # --- failures -----------------------------------------------------------------------------------

    def lose_host(self, name: str) -> None:
        """The window host of a node dies, and no other starts there."""
        self.no_host.add(name)
        self.crash_host(name)

    def lose_launcher(self, seconds: float) -> None:
        """All window hosts die, and for a while none can be started."""
        self.no_worlds_until = self.now + seconds
        for name in self.rules.nodes:
            self.crash_host(name)

    def kill_worker(self, name: str) -> None:
        self.nodes[name].end_worker("killed by SIGKILL")

    def kill_node(self, name: str, seen: bool = True) -> None:
        """All of it is gone. `seen`: the cluster says so at once; else only its silence does."""
        self.nodes[name].leave(seen)

    def pause(self, name: str, seconds: float) -> None:
        """Stop the agent, and let it go on later (SIGSTOP, SIGCONT). Its processes go on."""
        node = self.nodes[name]
        node.pause()
        self.after(seconds, node.go_on)

    def cut(self, lines: Iterable[Line], seconds: float, broken: bool = False) -> None:
        lines = tuple(lines)
        self.network.cut(lines)
        self.after(seconds, self.network.heal, lines, broken)
        if broken:
            self.after(seconds + 0.01, self._break_lines, lines)

    def _break_lines(self, lines: tuple[Line, ...]) -> None:
        pairs = dict.fromkeys(tuple(sorted(line)) for line in lines if CLUSTER not in line)  # a set has no fixed order
        for one, other in pairs:
            for end, far in ((self.nodes[one], other), (self.nodes[other], one)):
                if end.up and end.seat.cluster is not None:
                    end.from_child(m.Disconnected(far))

    def mute(self, name: str) -> None:
        """It lives, but nothing gets in or out any more."""
        self.network.cut(self.lines_between([name], [*self.rules.nodes, CLUSTER]))

    def lines_between(self, some: Iterable[str], others: Iterable[str]) -> list[Line]:
        others = list(others)
        return [line for a in some for b in others if a != b for line in ((a, b), (b, a))]

    def crash_host(self, name: str) -> None:
        self.nodes[name].end_host()

    def hang_host(self, name: str) -> None:
        host = self.nodes[name].host
        if host is not None:
            host.hung = True

    def corrupt(self, name: str, area: int, half: int) -> None:
        """A bit flips in a snapshot that lies there; before it is sealed, its checksum would be that of the damage."""
        arena = self.nodes[name].arena
        if (area, half) in arena and arena[area, half].record == "sealed":
            arena[area, half] = replace(arena[area, half], state=666)
            self.corrupted.add(name)

    def corrupt_file(self, at_step: int, rank: int) -> None:
        for key, content in self.files.items():
            if key[:2] == (at_step, rank):
                self.files[key] = replace(content, state=666)

    def take(self, event: m.Event) -> tuple[m.Command, ...]:
        """Give the coordinator one event now; return what it orders."""
        assert self.leader is not None
        said = len(self.history)
        self.leader.decide(event)
        return self.history[-1][3] if len(self.history) > said else ()

    def tell(self, event: m.Event) -> None:
        """Have the agent of `event.node` report it."""
        self.nodes[event.node].tell(event)

    def release(self) -> None:
        """Let the events that the test held arrive now."""
        held, self.held, self.intercept = self.held, [], None
        for node, caller, event in held:
            node.answer(caller, event)


__all__ = ["CLUSTER", "NBYTES", "Broken", "Content", "Simulation", "rules"]
