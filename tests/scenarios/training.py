"""Simulated workers and their groups: all ranks of a generation do one step together, or none of them.

Training is not reproducible here, unlike in truth: the state after a step names the generation that computed it, so
that snapshots of two histories never look alike, and a mix of them is found.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gemini_hpc.core import messages as m
from gemini_hpc.core.types import FRESH

if TYPE_CHECKING:
    from tests.scenarios.node import Node
    from tests.scenarios.simulation import Simulation

COLLECTIVE_S = 3.0
IN_GROUP = ("joining", "training", "done")


class Worker:
    """One worker process: building → idle → joining → training → done, and back to idle by leaving."""

    def __init__(self, node: "Node") -> None:
        self.node, self.alive, self.state = node, True, "building"
        self.stuck = False  # it neither computes nor leaves
        self.generation, self.rank = 0, -1
        self.restored: Any = None  # what it found when it joined
        self.last_snapshot: int | None = None
        self._waiting: list[m.Join] = []
        self._aborted = 0
        self._later(node.sim.build_s, self._built)

    def _later(self, seconds: float, action: Callable[..., None], *args: Any) -> None:
        """Do it in about so many seconds, if this process still lives."""
        self.node.sim.after(self.node.sim.some(seconds), self._if_alive, action, *args)

    def _if_alive(self, action: Callable[..., None], *args: Any) -> None:
        if self.alive:
            action(*args)

    def _new_store(self) -> str:
        stores = self.node.sim.stores
        self.store = f"{self.node.name}:{len(stores)}"
        stores[self.store] = self
        return self.store

    def _built(self) -> None:
        self._be_idle(m.WorkerReady(self.node.name, self.node.built_rank(), 1000, self._new_store()))

    def _be_idle(self, message: m.Event) -> None:
        self.state, self.generation = "idle", 0
        self.node.from_child(message)
        if self._waiting:
            self.take(self._waiting.pop(0))

    def take(self, order: m.Join | m.Abort) -> None:
        """An order from the agent: Join when idle, Abort at any time."""
        if not self.alive:
            return
        if isinstance(order, m.Abort):
            self._aborted = max(self._aborted, order.generation)
            if order.generation == self.generation and not self.stuck:
                self._later(0.01, self.leave, order.generation)
        elif self.state != "idle":
            self._waiting.append(order)
        else:
            self.state, self.generation, self.rank = "joining", order.generation, order.rank
            self._later(0.01, self._enter, order)

    def _enter(self, order: m.Join) -> None:
        if self.generation != order.generation or self.state != "joining" or self.stuck:
            return
        if order.generation <= self._aborted:
            self.fail("aborted before it began")
            return
        if order.step != FRESH:
            held = self.node.arena.get((0, order.half))
            self.restored = held
            wanted = ("sealed", order.rank, order.step)
            if held is None or (held.record, held.rank, held.step) != wanted or not held.intact:
                self.node.from_child(m.Damaged(self.node.name, order.generation, order.rank, order.step))
                self.leave(order.generation)
                return
        sim = self.node.sim
        server = sim.stores.get(order.store)
        if server is None or not server.alive or server.store != order.store:
            return  # nobody answers there: it waits until it is aborted
        sim.groups.setdefault(order.generation, Group(sim, order)).enter(self, order)

    def leave(self, generation: int) -> None:
        if self.generation == generation and self.state in IN_GROUP and not self.stuck:
            self.state = "leaving"
            self._later(0.005, self._park)

    def fail(self, reason: str) -> None:
        """A collective failed."""
        self.node.from_child(m.Trouble(self.node.name, self.generation, reason))
        self.leave(self.generation)

    def _park(self) -> None:
        self._be_idle(m.Parked(self.node.name, self.generation, self._new_store()))

    # --- snapshots ----------------------------------------------------------------------------------

    def is_safe(self) -> bool:
        return self.last_snapshot is None or self.node.account.safe_step >= self.last_snapshot

    def free_half(self) -> int:
        """As the real one: not the half with the newest safe step; while none is known, not what was restored."""
        keep = self.node.account.safe_step if self.node.account.safe_step >= 0 else self.last_snapshot
        held = self.node.arena.get((0, 0))
        return 1 if held is not None and held.step == keep else 0


@dataclass
class Group:
    """The workers of one generation."""

    sim: "Simulation"
    join: m.Join
    members: dict[int, Worker] = field(default_factory=dict)
    state: int = 0
    step: int = 0

    def enter(self, worker: Worker, order: m.Join) -> None:
        self.members[worker.rank] = worker
        if len(self.members) < self.sim.rules.world_size or not self.intact("joining"):
            return  # somebody is missing: all wait until they are aborted
        self.step = max(order.step, 0)
        self.state = zlib.crc32(b"fresh")
        if order.step != FRESH:
            self.state = self.sim.restored(order, self.members)
        for rank, member in self.members.items():
            member.state = "training"
            member.last_snapshot = None if order.step == FRESH else order.step
            told = (order.generation, rank, self.step, 1.0, "hot_swap", 0.0, 0.0, 0.0)
            member.node.from_child(m.Resumed(member.node.name, *told))
        if order.step == FRESH:
            self._snapshot()
        self.sim.after(self.sim.some(self.sim.step_s), self._train)

    def intact(self, state: str) -> bool:
        generation = self.join.generation
        return all(w.alive and w.generation == generation and w.state == state for w in self.members.values())

    def _train(self) -> None:
        if any(w.stuck and w.alive for w in self.members.values()):
            self.sim.after(COLLECTIVE_S, self._break, "a collective timed out")
        elif not self.intact("training"):
            self._break("a peer is lost")
        elif self.step == self.sim.rules.total_steps:
            for worker in self.members.values():
                worker.state = "done"
        elif failing := [w for w in self.members.values() if self._cannot_do(w)]:
            for worker in failing:
                worker.node.end_worker("an exception in the user's code")
            self._break("a peer is lost")
        else:
            self.step += 1
            self.state = zlib.crc32(b"%d %d %d" % (self.state, self.step, self.join.generation))
            self.sim.most_trained = max(self.sim.most_trained, self.step)
            self._finish_step(self.sim.now + self.sim.rules.join_s)

    def _cannot_do(self, worker: Worker) -> bool:
        return worker.node.name in self.sim.bad_nodes or self.step + 1 == self.sim.bad_step

    def _break(self, reason: str) -> None:
        for worker in self.members.values():
            if worker.alive and worker.generation == self.join.generation and worker.state == "training":
                worker.fail(reason)

    def _finish_step(self, deadline: float) -> None:
        """Vote whether the snapshot before is safe; after the last step wait for it."""
        if not self.intact("training") or any(w.stuck for w in self.members.values()):
            self._train()  # fails there
            return
        last = self.step == self.sim.rules.total_steps
        due = self.step % self.sim.rules.snapshot_every == 0
        agreed = due and all(worker.is_safe() for worker in self.members.values())
        if last and not agreed and self.sim.now < deadline:
            self.sim.after(0.05, self._finish_step, deadline)
            return
        if agreed or last:
            self._snapshot()
        for rank, worker in self.members.items():
            told = (self.join.generation, rank, self.step, 1.0, self.sim.step_s, 0.0)
            worker.node.from_child(m.Stepped(worker.node.name, *told))
        self.sim.after(self.sim.some(self.sim.step_s), self._train)

    def _snapshot(self) -> None:
        from tests.scenarios.node import Content

        halves = {}
        for rank, worker in self.members.items():
            halves[rank] = worker.free_half()
            being_written = Content(rank, self.step, self.state, self.join.generation, "writing")
            worker.node.arena[0, halves[rank]] = being_written
            worker.last_snapshot = self.step
        self.sim.after(self.sim.some(0.002), self._written, halves, self.step, self.state)

    def _written(self, halves: dict[int, int], at_step: int, state: int) -> None:
        from tests.scenarios.node import Content

        for rank, worker in self.members.items():
            begun = worker.node.arena.get((0, halves[rank]))
            unchanged = begun == Content(rank, at_step, state, self.join.generation, "writing")
            if worker.alive and unchanged and worker.state in ("training", "done"):
                content = Content(rank, at_step, state, self.join.generation, "written")
                worker.node.arena[0, halves[rank]] = content
                host = worker.node.host
                if host is not None and host.ready:
                    self.sim.after(self.sim.some(0.003), host.seal, halves[rank])
