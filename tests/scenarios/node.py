"""One simulated node: its agent with a real `Seat`, its arena, window host and archiver (its worker: `training`).

The agent does what runtime/agent.py and runtime/coordinator.py do, order for order. Everything else is a model of the
process that it stands for, as far as others can see it.
"""

import zlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gemini_hpc.core import messages as m
from gemini_hpc.core.account import Account
from gemini_hpc.core.seat import Seat
from gemini_hpc.core.types import changed
from tests.scenarios.training import Worker

if TYPE_CHECKING:
    from tests.scenarios.simulation import Simulation

CLUSTER = "cluster"
BEAT_S = 0.2
TICK_S = 0.2
LEASE_TIMEOUTS = 10
ARCHIVE_S = 5.0
RESTART_S = 0.5
REPEAT_S = 1.0
TICK = m.Tick("")
NBYTES = 1000


@dataclass(frozen=True)
class Content:
    """What lies in a half. `state` names the history that computed it; `origin` and `checksum` are as in its record."""

    rank: int
    step: int
    state: int
    origin: int
    record: str = "sealed"  # or writing, written
    checksum: int = 0
    arrived: float = field(default=-1.0, compare=False)  # when it was read from another node

    @property
    def true_checksum(self) -> int:
        return zlib.crc32(b"%d %d %d" % (self.rank, self.step, self.state))

    @property
    def intact(self) -> bool:
        return self.record == "sealed" and self.checksum == self.true_checksum

    def sealed(self) -> "Content":
        return changed(self, record="sealed", checksum=self.true_checksum)


class Host:
    """The window host of one MPI world on one node."""

    def __init__(self, node: "Node", world: int, members: tuple[str, ...]) -> None:
        self.node, self.world, self.members = node, world, members
        self.alive, self.ready, self.hung = True, False, False
        self.queue: list[m.Pull] = []
        self.reads = 0  # begun so far
        self.gone: set[int] = set()

    def end(self) -> None:
        """Die. A half that it was writing stays as it is: not sealed."""
        self.alive = False

    def seal(self, half: int) -> None:
        node = self.node
        content = node.arena.get((0, half))
        if not self.alive or self.hung or content is None or content.record == "writing":
            return
        if content.record == "written":
            node.arena[0, half] = content = content.sealed()
        at = (content.origin, content.rank, content.step)
        node.from_child(m.Sealed(node.name, *at, half, NBYTES, content.checksum))

    def obey(self, order: m.Command) -> None:
        if isinstance(order, m.Gone):
            self.gone |= set(order.targets)
            if self.queue and self.queue[0].target in self.gone:
                self._end(self.reads, self.queue[0], self.node.sim.nodes[self.members[self.queue[0].target]], None)
        elif isinstance(order, m.Pull):
            self.queue.append(order)
            if len(self.queue) == 1:
                self._begin()

    def _begin(self) -> None:
        order, sim = self.queue[0], self.node.sim
        held = self.node.arena.get((order.area, order.half))
        wanted = (order.rank, order.step, order.origin, order.checksum)
        if held and held.intact and (held.rank, held.step, held.origin, held.checksum) == wanted:
            self._answer("")
            return
        source = sim.nodes[self.members[order.target]]
        self.node.arena[order.area, order.half] = Content(order.rank, order.step, 0, order.origin, "writing")
        stalled = source.host is None or source.host.hung or (source.name, self.node.name) in sim.network.cuts
        stalled |= not source.up and order.target not in self.gone and sim.chance(0.5)  # MPI may say so, or hang
        seen = source.arena.get((order.source_area, order.source_half))
        self.reads += 1
        waits_s = min(sim.some(order.patience_s), order.patience_s) if order.patience_s else 0.0  # for idle spans
        takes_s = order.deadline_s if stalled else sim.some(sim.pull_s)
        sim.after(waits_s + takes_s, self._end, self.reads, order, source, seen)

    def _end(self, read: int, order: m.Pull, source: "Node", seen: Content | None) -> None:
        """The bytes are verified against the order; MPI's word counts for nothing."""
        if not self.alive or self.hung or read != self.reads or not self.queue:
            return
        sim, there = self.node.sim, source.host
        if order.target in self.gone:
            reason = "gone"
        elif not source.up or there is None or not there.alive or there.world != self.world:
            reason = "MPI_ERR_OTHER"
        elif there.hung or (source.name, self.node.name) in sim.network.cuts:
            reason = "deadline"
        else:
            same = seen is not None and seen == source.arena.get((order.source_area, order.source_half))
            spoiled = sim.chance(sim.bad_reads)
            sim.spoiled[order.rank, order.step, order.source] += spoiled
            arrived = same and seen.true_checksum == order.checksum and not spoiled
            reason = "" if arrived else "checksum"
        if reason:
            del self.node.arena[order.area, order.half]
        else:
            assert seen is not None
            known = {"origin": order.origin, "checksum": order.checksum, "arrived": sim.now}
            self.node.arena[order.area, order.half] = changed(seen, **known)
        self._answer(reason)

    def _answer(self, reason: str) -> None:
        self.node.from_child(copied(self.queue.pop(0), reason))
        if self.queue:
            self._begin()


class Archiver:
    """Carries out one order after the other, as fast as the shared file system lets it."""

    def __init__(self, node: "Node") -> None:
        self.node, self.alive, self.hung = node, True, False
        self.busy = False

    def next(self) -> None:
        if self.alive and not self.busy and self.node.archiving:
            self.busy = True
            sim = self.node.sim
            order = self.node.archiving[0][1]
            if isinstance(order, m.Load):
                self.node.arena[order.area, order.half] = Content(order.rank, order.step, 0, 0, "writing")
            takes_s = 0.02 if isinstance(order, m.Publish) else sim.persist_s
            sim.after(sim.some(takes_s), self._do, order)

    def _do(self, order: m.Command) -> None:
        if not self.alive or self.hung or not self.node.up:
            return
        self.busy = False
        self.node.from_child(self._answer(order))

    def _fails(self, order: m.Command) -> bool:
        return self.node.name in self.node.sim.no_writes or self.node.sim.persist_fails(order)

    def _answer(self, order: m.Command) -> m.Event:
        sim, node = self.node.sim, self.node
        if isinstance(order, m.Persist):
            content = node.arena.get((order.area, order.half))
            whole = content is not None and content.true_checksum == order.checksum
            reason = "the bytes could not be written" if self._fails(order) else "" if whole else "checksum"
            if not reason:
                assert content is not None
                sim.files[order.step, order.rank, order.checksum] = content.sealed()
            at = (order.rank, order.step, f"rank-{order.rank:04d}.h5", NBYTES, order.checksum)
            return m.Persisted(node.name, *at, not reason, reason, 0.1)
        if isinstance(order, m.Load):
            file = sim.files.get((order.step, order.rank, order.checksum))
            ok = file is not None and file.intact
            if ok:
                assert file is not None
                node.arena[order.area, order.half] = changed(file, origin=0)
            at = (order.generation, order.rank, order.step, "", order.area, order.half, NBYTES, order.checksum)
            return m.Copied(node.name, *at, ok, "" if ok else "it is not the file that its manifest names", 0.1)
        assert isinstance(order, m.Publish)
        if self._fails(order):
            return m.Published(node.name, order.step, "", False, "the manifest could not be written")
        sim.publish(order)
        return m.Published(node.name, order.step, f"checkpoints/step-{order.step}", True, "")


class Node:
    """One life of a node. A node that comes back is another one, with the same name."""

    def __init__(self, sim: "Simulation", name: str, life: int) -> None:
        self.sim, self.name, self.life = sim, name, life
        self.up, self.paused = True, False
        self._inbox: list[tuple[Any, ...]] = []  # came while it was paused
        self._unsealed: dict[int, tuple[Content, float]] = {}  # half -> what waits for its seal, and since when
        self._skew = 1000.0 * sim.rules.nodes.index(name)  # every node has a clock of its own
        self.started = self.clock()
        self.seat = Seat(sim.rules, name, BEAT_S, self.started, returned=life > 0)
        self._lives: dict[str, int] = {}  # which life of each node is at the endpoint that the cluster told
        self._callers: dict[str, int] = {}  # and which one called last
        self._surveying = -1
        self.account = Account(name)
        self.worker: Worker | None = None
        self.arena: dict[tuple[int, int], Content] = {}
        self._said_again = self.started
        self.host: Host | None = None
        self.archiver = Archiver(self)
        self.archiving: list[tuple[float, m.Command]] = []
        self._archiver_due = 0.0
        self.start_worker()
        self.say_to_cluster(m.NodeUp(name, str(life)))
        sim.after(sim.some(TICK_S), self.tick)

    def clock(self) -> float:
        return self.sim.now + self._skew

    # --- the loop -----------------------------------------------------------------------------------

    def arrive(self, life: int, sender: str, sender_life: int, message: m.Message) -> None:
        """Something reaches the socket of the agent's life `life`."""
        if self.paused:
            self._inbox.append((self.arrive, life, sender, sender_life, message))
        elif self.up and life == self.life:
            self._take(sender, sender_life, message)

    def from_child(self, message: m.Event) -> None:
        """A process of this node says something to its agent."""
        if self.up and self.paused:
            self._inbox.append((self._from_child, message))
        elif self.up:
            self._from_child(message)

    def tick(self) -> None:
        if not self.up:
            return
        self.sim.after(TICK_S, self.tick)
        if self.paused:
            return
        now = self.clock()
        alone_s, bound_s = now - self.started, self.sim.rules.build_s
        if self.account.coordinator:
            alone_s = self.seat.forsaken(now)
            bound_s = LEASE_TIMEOUTS * self.sim.rules.heartbeat_timeout_s
        if alone_s > bound_s:
            self.sim.forsaken.append(self.name)
            self.leave()
            return
        hung = self.archiving and now - self.archiving[0][0] > ARCHIVE_S
        if hung:
            self._restart_archiver([order for _, order in self.archiving])
        elif 0 < self._archiver_due <= now:
            self._restart_archiver([order for _, order in self.archiving[:1]])
        if now > self._said_again + REPEAT_S:
            self._said_again = now
            self._say_again()
        self.decide(TICK)
        cluster = self.seat.cluster
        if cluster is not None and not cluster.surveyed and self._surveying != cluster.survey:
            self._surveying = cluster.survey
            found = self.sim.survey(cluster.survey, cluster.survey_below)  # as it was when it was looked at
            self.sim.after(self.sim.some(self.sim.survey_s), self.from_child, found)

    def _say_again(self) -> None:
        """A line may have broken, and a message with it: repeat what is told only once."""
        if self.account.last_step is not None:
            self.tell(self.account.last_step)
        for half in (0, 1):
            if self.host is not None and self.host.ready:
                self.host.seal(half)
            self._seal(half)

    def _seal(self, half: int) -> None:
        """Take the place of a window host that does not seal what was written."""
        content, rules = self.arena.get((0, half)), self.sim.rules
        patience_s = (rules.fetch_s if self.account.host_world else 0.0) + 2 * rules.suspect_s
        if content is None or content.record != "written":
            self._unsealed.pop(half, None)
            return
        found, since = self._unsealed.setdefault(half, (content, self.clock()))
        if found is not content:
            self._unsealed[half] = content, self.clock()
        elif self.clock() - since > patience_s:
            self.arena[0, half] = content = content.sealed()
            at = (content.origin, content.rank, content.step)
            self.from_child(m.Sealed(self.name, *at, half, NBYTES, content.checksum))

    def pause(self) -> None:
        self.paused = True

    def go_on(self) -> None:
        self.paused = False
        waiting, self._inbox = self._inbox, []
        for take, *args in waiting:
            if self.up:
                take(*args)

    def leave(self, seen: bool = True) -> None:
        """Everything of this node ends with its agent. `seen`: the cluster notices."""
        if not self.up:
            return
        self.up = False
        if self.worker is not None:
            self.worker.alive = False
        if self.host is not None:
            self.host.end()
        self.archiver.alive = False
        self.sim.node_ended(self, seen)

    # --- the coordinator and the cluster ------------------------------------------------------------

    def _take(self, sender: str, sender_life: int, message: m.Message) -> None:
        if isinstance(message, m.Event):
            if sender in (CLUSTER, message.node):
                if isinstance(message, m.NodeUp):
                    self._lives[message.node] = int(message.endpoint)
                self.decide(message)
        elif isinstance(message, (m.RequestVote, m.Lead)):
            self._callers[sender] = sender_life
            for answer in self.seat.obey(self.clock(), message):
                self.answer(sender, answer)
            if isinstance(message, m.Lead) and sender == self.seat.leader:  # now there is a line to it
                self._inform(message)
            self.sim.looked_at(self)
        elif isinstance(message, m.Command) and sender == self.seat.leader:
            self._obey(message)

    def decide(self, event: m.Event) -> None:
        """Give the seat an event, or the time, and carry out what it says."""
        seat, now = self.seat, self.clock()
        before = seat.cluster
        orders = seat.tick(now) if isinstance(event, m.Tick) else seat.hear(now, event)
        if orders or before is not seat.cluster:
            self.sim.decided(self, before, event, orders)
        for order in orders:
            if order.node in self._lives:
                self._send(order.node, self._lives[order.node], order)
            elif not order.node and not isinstance(order, m.Note):
                self.say_to_cluster(order)

    def _send(self, to: str, life: int, message: m.Message) -> None:
        """To a life of a node, which is the one that is now or one before it."""
        sim = self.sim
        sim.network.send((self.name, to), sim.nodes[to].arrive, life, self.name, self.life, message)

    def say_to_cluster(self, message: m.Message) -> None:
        self.sim.network.send((self.name, CLUSTER), self.sim.cluster_hears, self.name, self.life, message)

    def answer(self, caller: str, event: m.Event) -> None:
        if self.sim.intercept is not None and self.sim.intercept(event):
            self.sim.held.append((self, caller, event))
            return
        self._send(caller, self._callers[caller], event)

    def tell(self, event: m.Event) -> None:
        """Report to the coordinator, if there is one that has our inventory."""
        leader = self.seat.leader
        if leader and leader == self.account.coordinator:
            self.answer(leader, event)

    def _inform(self, lead: m.Lead) -> None:
        if self.account.informs(lead):
            contents = sorted(self.arena.items())
            sealed = [(*p, c.rank, c.step, c.origin, NBYTES, c.checksum) for p, c in contents if c.record == "sealed"]
            self.tell(self.account.inventory(sealed))

    def built_rank(self) -> int:
        return min(self.sim.rules.nodes.index(self.name), self.sim.rules.world_size - 1)

    def _obey(self, order: m.Command) -> None:
        if self.account.is_stale(order) or not self.sim.obeys(self, order):
            return
        if isinstance(order, (m.Finish, m.Retire)):
            if isinstance(order, m.Finish):  # the coordinator's own word may not arrive
                self.say_to_cluster(m.Finish("", order.state, order.reason))
            self.leave()
        elif isinstance(order, m.RestartWorker):
            self.start_worker()
        else:
            self._pass_on(self.account.role_of(order), order)

    def _pass_on(self, role: str, order: m.Command) -> None:
        loads = [waiting for _, waiting in self.archiving if isinstance(waiting, m.Load)]
        if isinstance(order, m.Join) and loads:
            self._restart_archiver(loads)
        if isinstance(order, (m.Join, m.Load)) and self.account.fetches:
            self.end_host()
        if role == "worker" and self.worker is not None:
            assert isinstance(order, (m.Join, m.Abort))
            self.worker.take(order)
        elif role == "host" and self.host is not None:
            self.host.obey(order)
        elif role == "archiver" and all(order != waiting for _, waiting in self.archiving):
            self.archiving.append((self.clock(), order))
            self.archiver.next()

    # --- the node's processes -----------------------------------------------------------------------

    def start_worker(self) -> None:
        if self.worker is not None:
            self.worker.alive = False
        self.account.worker = "building"
        self.worker = Worker(self)

    def end_worker(self, reason: str) -> None:
        """The worker dies; the agent sees that at once."""
        if self.worker is not None and self.worker.alive:
            self.worker.alive = False
            self.from_child(m.WorkerLost(self.name, reason, False))

    def end_host(self, told: bool = True) -> None:
        """The window host ends; its line to the agent does, too."""
        if self.host is not None and self.host.alive:
            self.host.end()
            self.account.host_world = 0
            if told:
                self.from_child(m.HostLost(self.name, self.host.world, "its line to the agent ended"))

    def end_archiver(self) -> None:
        self.archiver.alive = False
        self._archiver_due = self.clock() + RESTART_S

    def _restart_archiver(self, failed: list[m.Command]) -> None:
        self.archiving = [(self.clock(), order) for _, order in self.archiving if order not in failed]
        self._archiver_due = 0.0
        self.archiver.alive = False
        self.archiver = Archiver(self)
        self.archiver.next()
        for order in failed:
            self.tell(failure(order))

    def _from_child(self, message: m.Event) -> None:
        if isinstance(message, (m.Surveyed, m.Disconnected)):  # of its own lines and threads
            self.decide(message)
            return
        self.account.hear(message)
        if isinstance(message, m.HostReady):
            for half in (0, 1):
                if self.host is not None:
                    self.sim.after(self.sim.some(0.003), self.host.seal, half)
        elif isinstance(message, (m.Persisted, m.Published)) or (isinstance(message, m.Copied) and not message.source):
            self.archiving = [(self.clock(), order) for _, order in self.archiving[1:]]
            self.archiver.next()
        self.tell(message)


def copied(order: m.Pull, reason: str) -> m.Copied:
    place = (order.area, order.half, order.nbytes, order.checksum)
    told = (not reason, reason, 0.01)
    return m.Copied(order.node, order.generation, order.rank, order.step, order.source, *place, *told)


def failure(order: m.Command) -> m.Event:
    if isinstance(order, m.Persist):
        return m.Persisted(order.node, order.rank, order.step, "", 0, order.checksum, False, "no archiver", 0.0)
    if isinstance(order, m.Load):
        at = (order.generation, order.rank, order.step, "", order.area, order.half)
        return m.Copied(order.node, *at, 0, order.checksum, False, "no archiver", 0.0)
    assert isinstance(order, m.Publish)
    return m.Published(order.node, order.step, "", False, "no archiver")
