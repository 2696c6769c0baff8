"""A cluster without processes: nodes that answer the coordinator's orders as agents do, in virtual time.

It knows the truth, which the coordinator only hears of: what really lies in every arena, and of which history
it is. Training is not reproducible here: the state after a step names the generation that computed it, so that
snapshots of two histories never look alike. One seed is one history; without a seed all delays are constant.
"""

import heapq
import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from gemini_hpc.core import messages as m
from gemini_hpc.core.coordinator import step
from gemini_hpc.core.placement import held_by
from gemini_hpc.core.recovery import newest_common_step
from gemini_hpc.core.state import Checkpoint, Cluster, Phase, Rules, new_cluster
from gemini_hpc.core.types import FRESH

HEARTBEAT_S = 0.4
NBYTES = 1000


def rules(nodes: int = 5, **changes: Any) -> Rules:
    defaults: dict[str, Any] = {
        "nodes": tuple(f"n{i}" for i in range(nodes)),
        "world_size": 4,
        "replicas": 2,
        "total_steps": 30,
        "persist_every": 10,
        "heartbeat_timeout_s": 1.2,
        "suspect_s": 0.5,
        "leave_s": 2.0,
        "build_s": 5.0,
        "fetch_s": 3.0,
        "gather_s": 9.0,
        "join_s": 4.0,
        "world_s": 3.0,
        "finish_s": 10.0,
        "max_restarts": 3,
        "max_fruitless": 20,
    }
    return Rules(**(defaults | changes))


@dataclass(frozen=True)
class Content:
    """What a half really holds. `state` names the history of the training; `torn`: being written."""

    rank: int
    step: int
    state: int
    generation: int
    torn: bool = False

    @property
    def checksum(self) -> int:
        return zlib.crc32(repr((self.rank, self.step, self.state, self.torn)).encode())


@dataclass
class FakeNode:
    """One node: its agent, worker, window host and arena."""

    name: str
    up: bool = True
    mute: bool = False  # alive, but nothing gets in or out
    worker: str = "none"  # none | building | idle | joining | training | done | stuck
    life: int = 0  # of the worker: what was meant for an earlier one is void
    rank: int = -1
    generation: int = 0
    last_snapshot: int | None = None
    safe_step: int = -1
    arena: dict[tuple[int, int], Content] = field(default_factory=dict)
    world: int = 0
    host_life: int = 0
    hung: bool = False  # its window host neither answers nor lets others read
    pulling: bool = False
    pulls: list[m.Pull] = field(default_factory=list)
    gone: set[str] = field(default_factory=set)
    inbound: float = 0.0  # messages between two ends never overtake each other
    outbound: float = 0.0

    def free_half(self) -> int:
        """As the worker chooses it."""
        held = self.arena.get((0, 0))
        return 1 if held is not None and held.step == self.safe_step >= 0 else 0


class Broken(AssertionError):
    """An invariant does not hold."""


class FakeCluster:
    """The nodes, the clock, and the coordinator under test."""

    def __init__(
        self,
        the_rules: Rules | None = None,
        seed: int | None = None,
        published: Checkpoint | None = None,
        absent: tuple[str, ...] = (),
    ) -> None:
        self.rules = the_rules or rules()
        self.random = random.Random(seed) if seed is not None else None
        self.now = 0.0
        self.cluster: Cluster = new_cluster(self.rules, 0.0, published)
        self.nodes = {name: FakeNode(name) for name in self.rules.nodes}
        self.groups: dict[int, dict[int, FakeNode]] = {}
        self.states: dict[int, int] = {}  # generation -> the training state that its group holds now
        self.files: dict[tuple[int, int], Content] = {}  # (step, rank) -> what is on the persistent tier
        self.history: list[tuple[float, m.Event, tuple[m.Command, ...]]] = []
        self.orders: list[m.Command] = []
        self.notes: list[tuple[str, dict[str, Any]]] = []
        self.queue: list[tuple[float, int, Callable[[], None]]] = []
        self.order_number = count()
        self.world = (0, ())
        self.coordinator_stalls_until = -1.0
        self.bad_pulls = 0.0  # share of the reads whose bytes arrive damaged
        self.intercept: Callable[[m.Event], bool] | None = None  # True: the test keeps the event
        self.obeyed: Callable[[m.Command], bool] | None = None  # False: the order is lost
        self.held: list[m.Event] = []
        self.step_s = 0.05
        self.pull_s = 0.02
        self.persist_s = 0.05
        self.persist_fails: Callable[[m.Persist], bool] = lambda order: False
        self.areas = held_by(self.rules.world_size, self.rules.replicas)
        if published is not None:
            for rank in published.files:
                self.files[published.step, rank] = Content(rank, published.step, 7, 0)
        for node in self.nodes.values():
            if node.name in absent:
                node.up = False
                continue
            self.start_worker(node)
            self.after(0.0, self.beat, node)
        self.after(0.1, self.tick)

    # --- time -----------------------------------------------------------------------------------------

    def some(self, seconds: float) -> float:
        """About that long: exactly so without a seed."""
        if self.random is None:
            return seconds
        spread = self.random.choice((0.2, 1.0, 1.0, 1.0, 5.0))
        return seconds * spread * (0.5 + self.random.random())

    def after(self, seconds: float, action: Callable[..., None], *args: Any) -> None:
        entry = (self.now + seconds, next(self.order_number), lambda: action(*args))
        heapq.heappush(self.queue, entry)

    def run(self, until: Callable[["FakeCluster"], bool], seconds: float = 60.0) -> "FakeCluster":
        """Go on until the condition holds; fail when it does not within `seconds` of virtual time."""
        deadline = self.now + seconds
        while not until(self):
            if not self.queue or self.queue[0][0] > deadline:
                raise Broken(f"waited {seconds} s in vain: {self.where()}")
            self.now, _, action = heapq.heappop(self.queue)
            action()
        return self

    def run_for(self, seconds: float) -> "FakeCluster":
        end = self.now + seconds
        while self.queue and self.queue[0][0] <= end:
            self.now, _, action = heapq.heappop(self.queue)
            action()
        self.now = end
        return self

    def where(self) -> str:
        c = self.cluster
        workers = {n.name: (n.up, n.worker, c.members[n.name].worker.value) for n in self.nodes.values()}
        return f"{c.phase} g{c.generation} plan={c.plan} safe={c.safe_step} {c.world} {workers} {self.notes[-5:]}"

    # --- the coordinator ------------------------------------------------------------------------------

    def tick(self) -> None:
        self.take(m.Tick(""))
        self.after(0.1, self.tick)

    def take(self, event: m.Event) -> list[m.Command]:
        """Give the coordinator one event now; check what it says, and let it be done."""
        if self.now < self.coordinator_stalls_until:
            self.after(self.coordinator_stalls_until - self.now, self.take, event)
            return []
        before = self.cluster
        self.cluster, commands = step(before, self.now, event)
        self.history.append((self.now, event, tuple(commands)))
        self.check(before, commands)
        for command in commands:
            self.orders.append(command)
            if isinstance(command, m.Note):
                self.notes.append((command.event, dict(command.details)))
            elif self.obeyed is None or self.obeyed(command):
                self.send_order(command)
        return commands

    def check(self, before: Cluster, commands: list[m.Command]) -> None:
        """The invariants, after every single event."""
        after = self.cluster
        if after.generation < before.generation:
            raise Broken("the generation went backwards")
        if after.phase in (Phase.JOINING, Phase.RUNNING):
            if sorted(after.ranks) != list(range(self.rules.world_size)):
                raise Broken(f"a rank without a node: {after.ranks}")
            if len(set(after.ranks.values())) != self.rules.world_size:
                raise Broken(f"a node with two ranks: {after.ranks}")
            if any(not after.members[node].alive for node in after.ranks.values()):
                raise Broken("a rank on an evicted node")
        joins = [c for c in commands if isinstance(c, m.Join)]
        if joins:
            if {j.rank for j in joins} != set(range(self.rules.world_size)):
                raise Broken("not everybody was told to join")
            if len({(j.generation, j.step, j.store) for j in joins}) != 1 or joins[0].generation != after.generation:
                raise Broken(f"different joins: {joins}")
            for join in joins:
                if join.step != FRESH:
                    self.check_restorable(join)
        for (rank, at_step), places in after.copies.items():
            if len({copy.checksum for copy in places.values()}) > 1:
                raise Broken(f"copies of two histories under one name: rank {rank} step {at_step}: {places}")
        if len(after.copies) > 8 * self.rules.world_size:
            raise Broken("knowledge grows without a bound")
        if before.safe_step < after.safe_step and newest_common_step(after.copies, self.rules.world_size) is None:
            raise Broken("safe, and yet not complete")

    def check_restorable(self, join: m.Join) -> None:
        node = self.nodes[join.node]
        if not node.up:
            return
        content = node.arena.get((0, join.half))
        if content is None or content.torn or (content.rank, content.step) != (join.rank, join.step):
            raise Broken(f"{join} but there lies {content}")

    # --- the lines ------------------------------------------------------------------------------------

    def tell(self, event: m.Event) -> None:
        """A node reports; its reports arrive late, but in order."""
        node = self.nodes[event.node]
        node.outbound = max(node.outbound, self.now + self.some(0.001))
        self.after(node.outbound - self.now, self.arrive, event)

    def arrive(self, event: m.Event) -> None:
        node = self.nodes[event.node]
        if not node.up or node.mute:
            return
        if self.intercept is not None and self.intercept(event):
            self.held.append(event)
            return
        self.take(event)

    def send_order(self, order: m.Command) -> None:
        if isinstance(order, m.StartWorld):
            self.after(self.some(0.001), self.start_world, order)
        elif order.node:
            node = self.nodes[order.node]
            node.inbound = max(node.inbound, self.now + self.some(0.001))
            self.after(node.inbound - self.now, self.obey, node, order)

    def beat(self, node: FakeNode) -> None:
        if node.up:
            self.tell(m.Heartbeat(node.name))
            self.after(HEARTBEAT_S, self.beat, node)

    def obey(self, node: FakeNode, order: m.Command) -> None:
        if not node.up or node.mute:
            return
        action = getattr(self, f"do_{type(order).__name__.lower()}", None)
        if action is not None:
            action(node, order)

    # --- the worker -----------------------------------------------------------------------------------

    def start_worker(self, node: FakeNode) -> None:
        node.life += 1
        node.worker, node.generation, node.last_snapshot = "building", 0, None
        self.after(self.some(0.5), self.if_alive(node, self.worker_ready), node)

    def if_alive(self, node: FakeNode, action: Callable[..., None]) -> Callable[..., None]:
        """Do it only if the node and this very worker still live by then."""
        life = node.life

        def guarded(*args: Any) -> None:
            if node.up and node.life == life and node.worker != "none":
                action(*args)

        return guarded

    def worker_ready(self, node: FakeNode) -> None:
        node.worker = "idle"
        built = min(self.rules.nodes.index(node.name), self.rules.world_size - 1)
        self.tell(m.WorkerReady(node.name, built, NBYTES, f"{node.name}:life{node.life}"))

    def do_restartworker(self, node: FakeNode, order: m.RestartWorker) -> None:
        self.start_worker(node)

    def do_join(self, node: FakeNode, order: m.Join) -> None:
        if node.worker != "idle":
            return  # the agent has no line to a worker that could take it
        node.safe_step = min(node.safe_step, order.step)  # an abandoned history proves nothing
        node.worker, node.generation, node.rank = "joining", order.generation, order.rank
        self.after(self.some(0.01), self.if_alive(node, self.enter_group), node, order)

    def enter_group(self, node: FakeNode, order: m.Join) -> None:
        if node.worker != "joining" or node.generation != order.generation:
            return
        leader = self.nodes[order.store.split(":")[0]]
        if not leader.up or order.store.split(":")[1] != f"life{leader.life}":
            return  # nobody answers there: it waits until it is aborted
        group = self.groups.setdefault(order.generation, {})
        group[order.rank] = node
        if len(group) < self.rules.world_size or any(
            not member.up or member.generation != order.generation for member in group.values()
        ):
            return  # somebody is missing: all wait until they are aborted
        contents = {}
        for rank, member in group.items():
            if order.step != FRESH:
                half = next(j.half for j in reversed(self.orders) if isinstance(j, m.Join) and j.node == member.name)
                contents[rank] = member.arena.get((0, half))
        if contents:
            self.check_lineage(order.step, contents)
            self.states[order.generation] = contents[0].state
        else:
            self.states[order.generation] = zlib.crc32(b"fresh")
        for rank, member in group.items():
            member.worker = "training"
            member.last_snapshot = None if order.step == FRESH else order.step
            if order.step == FRESH:
                self.snapshot(member, 0, order.generation)
            self.tell(m.Resumed(member.name, order.generation, rank, max(order.step, 0), "hot_swap", 0.0, 0.0, 0.0))
        self.after(self.some(self.step_s), self.train, order.generation, max(order.step, 0) + 1)

    def check_lineage(self, at_step: int, contents: dict[int, Content | None]) -> None:
        for rank, content in contents.items():
            if content is None or content.torn or (content.rank, content.step) != (rank, at_step):
                raise Broken(f"rank {rank} restores {content} for step {at_step}")
        if len({content.state for content in contents.values() if content}) != 1:
            raise Broken(f"a mix of histories: {contents}")

    def train(self, generation: int, at_step: int) -> None:
        """All ranks do one step together, or none of them."""
        group = self.groups.get(generation, {})
        members = [n for n in group.values() if n.up and n.generation == generation and n.worker == "training"]
        if len(members) < self.rules.world_size:
            for node in members:
                self.tell(m.Trouble(node.name, generation, "a peer is lost"))
                self.leave_group(node)
            return
        total = self.rules.total_steps
        if at_step > total:
            for node in members:
                node.worker = "done"
            return
        self.states[generation] = zlib.crc32(repr((self.states[generation], at_step, generation)).encode())
        agreed = all(n.last_snapshot is None or n.safe_step >= n.last_snapshot for n in members)
        if at_step == total and not agreed:
            self.after(0.01, self.wait_for_safety, generation, at_step, self.now + self.rules.join_s)
            return
        self.end_step(generation, at_step, agreed)

    def wait_for_safety(self, generation: int, at_step: int, deadline: float) -> None:
        members = [n for n in self.groups[generation].values() if n.up and n.generation == generation]
        intact = len(members) == self.rules.world_size and all(n.worker == "training" for n in members)
        agreed = all(n.last_snapshot is None or n.safe_step >= n.last_snapshot for n in members)
        if not intact:
            self.train(generation, at_step)  # fails there
        elif agreed or self.now > deadline:
            self.end_step(generation, at_step, True)
        else:
            self.after(0.01, self.wait_for_safety, generation, at_step, deadline)

    def end_step(self, generation: int, at_step: int, with_snapshot: bool) -> None:
        for rank, node in self.groups[generation].items():
            if with_snapshot:
                self.snapshot(node, at_step, generation)
            self.tell(m.Stepped(node.name, generation, rank, at_step, 1.0, self.step_s, 0.0))
        self.after(self.some(self.step_s), self.train, generation, at_step + 1)

    def snapshot(self, node: FakeNode, at_step: int, generation: int) -> None:
        half = node.free_half()
        content = Content(node.rank, at_step, self.states[generation], generation)
        node.arena[0, half] = Content(node.rank, at_step, content.state, generation, torn=True)
        node.last_snapshot = at_step
        self.after(self.some(0.002), self.if_alive(node, self.snapshot_done), node, half, content)

    def snapshot_done(self, node: FakeNode, half: int, content: Content) -> None:
        if node.generation != content.generation:
            return  # it was told to leave in the middle
        node.arena[0, half] = content
        self.after(self.some(0.003), self.seal, node, half)

    def seal(self, node: FakeNode, half: int) -> None:
        content = node.arena.get((0, half))
        if not node.up or not node.world or content is None or content.torn:
            return  # without a host it stays unsealed; the next host is reminded
        self.tell(m.Sealed(node.name, content.generation, content.rank, content.step, half, NBYTES, content.checksum))

    def do_abort(self, node: FakeNode, order: m.Abort) -> None:
        if node.worker in ("joining", "training", "done"):
            self.after(self.some(0.01), self.if_alive(node, self.leave_group), node)

    def leave_group(self, node: FakeNode) -> None:
        if node.worker not in ("joining", "training", "done"):
            return
        generation, node.generation, node.worker = node.generation, 0, "leaving"
        self.after(self.some(0.005), self.if_alive(node, self.parked), node, generation)

    def parked(self, node: FakeNode, generation: int) -> None:
        node.worker = "idle"
        self.tell(m.Parked(node.name, generation, f"{node.name}:life{node.life}"))

    def do_safe(self, node: FakeNode, order: m.Safe) -> None:
        node.safe_step = order.step

    # --- the window host ------------------------------------------------------------------------------

    def start_world(self, order: m.StartWorld) -> None:
        for node in self.nodes.values():
            self.end_host(node)
        self.world = (order.world, order.members)
        if any(not self.nodes[name].up for name in order.members):
            self.after(self.some(0.3), self.take, m.WorldFailed("", order.world, "a member is gone"))
            return
        for name in order.members:
            self.after(self.some(0.2), self.host_ready, self.nodes[name], order.world)

    def host_ready(self, node: FakeNode, world: int) -> None:
        if not node.up or self.world[0] != world:
            return
        node.world = world
        self.tell(m.HostReady(node.name, world))
        for half in (0, 1):
            self.after(self.some(0.003), self.seal, node, half)

    def end_host(self, node: FakeNode) -> None:
        for key, content in list(node.arena.items()):
            if node.pulling and node.pulls and key == (node.pulls[0].area, node.pulls[0].half) and content.torn:
                del node.arena[key]
        node.world, node.pulls, node.pulling, node.gone, node.hung = 0, [], False, set(), False
        node.host_life += 1

    def crash_host(self, name: str) -> None:
        node = self.nodes[name]
        world = node.world
        if not node.up or not world:
            return
        self.end_host(node)
        self.after(self.some(0.01), self.tell, m.HostLost(name, world, "it crashed"))

    def hang_host(self, name: str) -> None:
        self.nodes[name].hung = bool(self.nodes[name].world)

    def do_gone(self, node: FakeNode, order: m.Gone) -> None:
        node.gone |= {self.world[1][target] for target in order.targets if target < len(self.world[1])}

    def do_pull(self, node: FakeNode, order: m.Pull) -> None:
        if node.world:
            node.pulls.append(order)
            self.next_pull(node)

    def next_pull(self, node: FakeNode) -> None:
        if node.pulling or not node.pulls:
            return
        order, node.pulling = node.pulls[0], True
        source = self.nodes[order.source]
        seen = source.arena.get((order.source_area, order.source_half))
        node.arena[order.area, order.half] = Content(order.rank, order.step, -1, order.generation, torn=True)
        takes = order.deadline_s if source.hung else self.some(self.pull_s)
        self.after(takes, self.end_pull, node, node.host_life, order, seen)

    def end_pull(self, node: FakeNode, host_life: int, order: m.Pull, seen: Content | None) -> None:
        if not node.up or node.hung or node.host_life != host_life:
            return
        source = self.nodes[order.source]
        now_there = source.arena.get((order.source_area, order.source_half))
        damaged = self.random is not None and self.random.random() < self.bad_pulls
        if order.source in node.gone:
            reason = "gone"
        elif source.hung:
            reason = "deadline"
        elif not source.up or source.world != node.world:
            reason = "MPI_ERR_OTHER"
        elif damaged or seen is None or seen != now_there or seen.checksum != order.checksum:
            reason = "checksum"
        else:
            reason = ""
        key = (order.area, order.half)
        if reason:
            node.arena.pop(key, None)
        else:
            assert seen is not None
            node.arena[key] = Content(seen.rank, seen.step, seen.state, order.generation)
        node.pulls.pop(0)
        node.pulling = False
        self.tell(self.copied(order, not reason, reason))
        self.next_pull(node)

    def copied(self, order: m.Pull, ok: bool, reason: str) -> m.Copied:
        place = (order.area, order.half, order.nbytes, order.checksum)
        return m.Copied(order.node, order.generation, order.rank, order.step, order.source, *place, ok, reason, 0.01)

    # --- the archiver ---------------------------------------------------------------------------------

    def do_persist(self, node: FakeNode, order: m.Persist) -> None:
        self.after(self.some(self.persist_s), self.end_persist, node, order)

    def end_persist(self, node: FakeNode, order: m.Persist) -> None:
        content = node.arena.get((order.area, order.half))
        ok = content is not None and content.checksum == order.checksum and not self.persist_fails(order)
        if ok and node.up:
            assert content is not None
            self.files[order.step, order.rank] = content
        if node.up:
            name = f"rank-{order.rank:04d}.h5"
            reason = "" if ok else "the file system said no"
            self.tell(m.Persisted(node.name, order.rank, order.step, name, NBYTES, order.checksum, ok, reason, 0.1))

    def do_publish(self, node: FakeNode, order: m.Publish) -> None:
        contents = {int(rank): self.files.get((order.step, int(rank))) for rank in order.files}
        self.check_lineage(order.step, contents)
        self.after(
            self.some(0.02),
            lambda: self.tell(m.Published(node.name, order.step, f"checkpoints/step-{order.step}", True, "")),
        )

    def do_load(self, node: FakeNode, order: m.Load) -> None:
        node.arena[order.area, order.half] = Content(order.rank, order.step, -1, order.generation, torn=True)
        self.after(self.some(self.persist_s), self.end_load, node, order)

    def end_load(self, node: FakeNode, order: m.Load) -> None:
        if not node.up:
            return
        content = self.files[order.step, order.rank]
        node.arena[order.area, order.half] = Content(content.rank, content.step, content.state, order.generation)
        place = (order.area, order.half, NBYTES, content.checksum)
        self.tell(m.Copied(node.name, order.generation, order.rank, order.step, "", *place, True, "", 0.1))

    # --- failures -------------------------------------------------------------------------------------

    def kill_worker(self, name: str) -> None:
        node = self.nodes[name]
        if node.up and node.worker not in ("none",):
            node.worker = "none"
            node.life += 1
            self.after(self.some(0.005), self.tell, m.WorkerLost(name, "killed by SIGKILL"))

    def kill_node(self, name: str, seen: bool = True) -> None:
        """All of it is gone. `seen`: the cluster says so at once; else only its silence does."""
        node = self.nodes[name]
        if not node.up:
            return
        self.end_host(node)
        node.up, node.worker = False, "none"
        node.life += 1
        node.arena.clear()
        if seen:
            self.after(self.some(0.02), self.take, m.NodeExited(name, "its agent is gone"))

    def do_retire(self, node: FakeNode, order: m.Retire) -> None:
        self.kill_node(node.name, seen=False)

    def do_finish(self, node: FakeNode, order: m.Finish) -> None:
        node.worker = "none"
        node.life += 1

    # --- questions ------------------------------------------------------------------------------------

    def said(self, event: str) -> list[dict[str, Any]]:
        return [details for kind, details in self.notes if kind == event]

    def ordered(self, kind: type[m.Command]) -> list[Any]:
        return [order for order in self.orders if isinstance(order, kind)]

    def running(self) -> bool:
        return self.cluster.phase is Phase.RUNNING

    def over(self) -> bool:
        return self.cluster.phase is Phase.FINISHED

    def reached(self, at_step: int) -> bool:
        c = self.cluster
        return len(c.stepped) == self.rules.world_size and min(c.stepped.values()) >= at_step

    def release(self) -> None:
        """Let the events that the test held arrive now."""
        held, self.held, self.intercept = self.held, [], None
        for event in held:
            self.take(event)
