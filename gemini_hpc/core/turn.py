"""The moves that the coordinator can make: each changes what is known and says what is to be done."""

from collections.abc import Iterable
from typing import Any

from gemini_hpc.core.messages import Abort, Command, Finish, Gone, Note, Publish, RestartWorker, Retire, Safe
from gemini_hpc.core.recovery import newest_complete, of_one_history
from gemini_hpc.core.state import Cluster, Copy, Member, Phase, Worker, next_persist
from gemini_hpc.core.types import FRESH, changed


class Turn:
    """One call of `coordinator.step`: a working copy of the state, the commands so far, and the moves on both.

    The copy is made once and then changed in place, as is its `members`: copies at every change cost more than all
    decisions together. Every other value in it is replaced, never changed: the state before still has it.
    """

    def __init__(self, cluster: Cluster, now: float) -> None:
        self._members = dict(cluster.members)
        self.cluster = changed(cluster, members=self._members, last_turn=now)
        self.now = now
        self.commands: list[Command] = []

    def set(self, **changes: Any) -> None:
        vars(self.cluster).update(changes)

    def set_member(self, node: str, **changes: Any) -> None:
        self._members[node] = changed(self._members[node], **changes)

    def set_worker(self, node: str, worker: Worker, **changes: Any) -> None:
        self.set_member(node, worker=worker, worker_since=self.now, **changes)

    def enter(self, phase: Phase) -> None:
        self.set(phase=phase, phase_since=self.now)

    def note(self, event: str, **details: Any) -> None:
        self.commands.append(Note("", event, details))

    def order(self, command: Command) -> None:
        self.commands.append(command)

    @property
    def alive(self) -> list[Member]:
        return [member for member in self.cluster.members.values() if member.alive]

    def in_phase_for(self) -> float:
        return self.now - self.cluster.phase_since

    def published_step(self) -> int:
        return self.cluster.published.step if self.cluster.published else FRESH

    def forgive(self, seconds: float) -> None:
        """For so long we did not run, or had no majority: nobody's silence or delay in that time proves anything."""
        cluster = self.cluster

        def later(since: float) -> float:
            return since + seconds if since >= 0 else since

        self.set(
            phase_since=later(cluster.phase_since),
            progressed=later(cluster.progressed),
            done_since=later(cluster.done_since),
            ahead_since=later(cluster.ahead_since),
            trouble_since=later(cluster.trouble_since),
            persist_since=later(cluster.persist_since),
            pull_since={node: later(since) for node, since in cluster.pull_since.items()},
            world=changed(
                cluster.world, since=later(cluster.world.since), without_since=later(cluster.world.without_since)
            ),
        )
        for member in cluster.members.values():
            self.set_member(
                member.node,
                due=later(member.due),
                heard=later(member.heard),
                worker_since=later(member.worker_since),
                evidence={kind: later(since) for kind, since in member.evidence.items()},
            )

    def suspect(self, node: str, kind: str, reason: str) -> None:
        member = self.cluster.members[node]
        if kind in member.evidence:
            return
        self.set_member(node, evidence={**member.evidence, kind: self.now})
        self.note("suspect", target=node, evidence=kind, reason=reason)
        if self.trusts_silence() and (self.cluster.trouble_since >= 0 or len(member.evidence) > 0):
            self.evict(node, f"{reason}, and a second witness agrees")

    def trusts_silence(self) -> bool:
        """Whether soft evidence may cost a node its place.

        Not while most are suspected at once: then it is this node that was cut off, and its lease, or their next word,
        will show it. And not while a run is saved: who is only silent may be the last to hold something.
        """
        voters = [member for member in self.alive if member.votes]
        heard = [member for member in voters if not member.evidence]
        return 2 * len(heard) > len(voters) and self.cluster.phase is not Phase.SAVING

    def evict(self, node: str, reason: str) -> None:
        """Hard evidence, or soft evidence that was confirmed: the node is out."""
        if not self.cluster.members[node].evidence:
            self.note("suspect", target=node, evidence="exit", reason=reason)
        self.set_member(node, alive=False, evidence={})
        self.set(last_loss=reason)
        self.note("evict", target=node, generation=self.cluster.generation + 1, reason=reason)
        self.order(Retire(node, self.cluster.generation + 1))
        self._forget_copies_on(node)
        if (
            self.cluster.persisting != FRESH and self.cluster.phase is not Phase.SAVING
        ):  # its shard will never come: tried again with the next safe step
            self.set(persisting=FRESH, files={})
        self.shun_host(node)
        # whoever it was that no world started with, it may have been this one
        self.set(world=changed(self.cluster.world, failures=0, left_out=(), tried=()))
        if node in self.cluster.ranks.values():
            self.open_generation(f"{node} is lost")

    def open_generation(self, reason: str) -> None:
        """Fence the old generation: its workers drop their collectives, its messages change nothing."""
        if self.cluster.phase is Phase.SAVING:
            return
        self._abort(reason)
        self.set(plan=None, trouble_since=-1.0)
        self.enter(Phase.FORMING)

    def _abort(self, reason: str) -> None:
        cluster = self.cluster
        if cluster.phase is Phase.FORMING:
            return  # done already
        for member in self.alive:
            if member.worker is Worker.BUSY:
                self.order(Abort(member.node, cluster.generation))
        self.note("abort", generation=cluster.generation, reason=reason)

    def replace(self, node: str, reason: str) -> None:
        """Give the rank of a node, which lives on as a spare, to another; nothing to do if it has none."""
        if node in self.cluster.ranks.values():
            self.set(ranks={rank: name for rank, name in self.cluster.ranks.items() if name != node})
            self.open_generation(reason)

    def welcome(self, node: str) -> None:
        """A node that was lost is back: it has nothing, and is a spare. Its old self is not heard any more."""
        if self.cluster.members[node].alive and self.cluster.members[node].held is not None:
            self.evict(node, "its agent was started again")
        if not self.cluster.members[node].alive:
            due = self.now + self.cluster.rules.build_s
            self._members[node] = Member(node, due=due, worker_since=self.now, votes=False)
            self.note("returned", target=node)

    def lose_worker(self, node: str, reason: str) -> None:
        """The node lives, its worker does not: start another there, unless it keeps failing.

        In that case the node has no rank any more, but what lies in its memory can still be read, and saved.
        """
        member, cluster = self.cluster.members[node], self.cluster
        self.note("suspect", target=node, evidence="worker", reason=reason)
        rank = next((r for r, name in cluster.ranks.items() if name == node), None)
        idle_s = self.now - member.worker_since if member.worker is Worker.IDLE and rank is None else 0.0
        restarts = 0 if idle_s > cluster.rules.build_s else member.restarts  # a spare's: it had worked meanwhile
        if restarts < cluster.rules.max_restarts:
            self.set_worker(node, Worker.BUILDING, restarts=restarts + 1)
            self.order(RestartWorker(node, cluster.generation + 1))
        else:
            reason = f"its worker failed {restarts + 1} times in a row: {reason}"
            self.set_worker(node, Worker.FAILED)
            self.set(last_loss=reason)
            self.note("no_worker", target=node, reason=reason)
        if rank is not None:
            self.note("evict", target=node, rank=rank, generation=cluster.generation + 1, reason=reason)
            self.open_generation(f"the worker of {node} is lost")

    def shun_host(self, node: str) -> None:
        """A window host is gone: the others go on without it, but a world that was starting cannot."""
        world = self.cluster.world
        if node not in world.members:
            return
        if world.state == "starting":
            self.set_member(node, blamed=self.cluster.members[node].blamed + 1)
            self.world_lost(world.number, f"the window host of {node} is gone")
            return
        self.set_member(node, host_world=0)
        pulls = {holder: pull for holder, pull in self.cluster.pulls.items() if node not in (holder, pull.source)}
        self.set(pulls=pulls)
        self.tell_hosts([node])

    def tell_hosts(self, gone: Iterable[str]) -> None:
        """Have the window hosts give up what they read from those of the nodes `gone`: MPI may never say so."""
        world = self.cluster.world
        targets = tuple(world.members.index(node) for node in gone)
        for member in self.alive:
            if targets and member.host_world == world.number:
                self.order(Gone(member.node, world.number, targets))

    def world_lost(self, number: int, reason: str) -> None:
        world = self.cluster.world
        if number != world.number or world.state not in ("starting", "ready"):
            return
        if world.state == "starting":
            for node in world.members:
                member = self.cluster.members[node]
                self.set_member(node, absences=0 if member.host_began == number else member.absences + 1)
        failures = world.failures + 1
        self.set(world=changed(world, state="lost", since=self.now, failures=failures), pulls={})
        self.note("world", number=number, state="lost", reason=reason)

    def make_safe(self, step: int) -> None:
        """A step outlives what may fail now: tell the workers, who then take the next snapshot."""
        self.set(safe_step=step, ahead_since=-1.0, misses={})
        for member in self.alive:
            self.order(Safe(member.node, self.cluster.generation, step))

    def survey_again(self, **changes: Any) -> None:
        """Have the persistent tier looked at anew; a look that is under way does not count any more."""
        self.set(surveyed=False, survey=self.cluster.survey + 1, **changes)

    def add_copy(self, rank: int, at_step: int, node: str, copy: Copy) -> None:
        """It lies in the node's arena, and what lay in that place before does not any more."""
        held = self.cluster.copies.get((rank, at_step), {})
        if held.get(node) == copy:
            return  # said again
        for other, places in self.cluster.copies.items():
            here = places.get(node)
            if here and other != (rank, at_step) and (here.area, here.half) == (copy.area, copy.half):
                self.drop_copy(*other, node)
        self.set(copies={**self.cluster.copies, (rank, at_step): {**held, node: copy}})

    def drop_copy(self, rank: int, at_step: int, node: str) -> None:
        copies, places = dict(self.cluster.copies), dict(self.cluster.copies.get((rank, at_step), {}))
        places.pop(node, None)
        if places:
            copies[rank, at_step] = places
        else:
            copies.pop((rank, at_step), None)
        self.set(copies=copies)

    def _forget_copies_on(self, node: str) -> None:
        for (rank, at_step), places in self.cluster.copies.items():
            if node in places:
                self.drop_copy(rank, at_step, node)

    def save_and_stop(self, reason: str, stops_as: str = "stopped") -> None:
        """The run cannot go on: save the newest complete step first, so that nothing is lost."""
        if self.cluster.phase is Phase.SAVING and not self.cluster.stops_as:
            self.set(stopping=reason, stops_as=stops_as)
        elif self.cluster.phase not in (Phase.SAVING, Phase.FINISHED):  # else for the reason that came first
            self._save(reason, stops_as)

    def save_first(self, reason: str) -> None:
        """Not everybody can read what lies in memory: all go on from the persistent tier, once it is there."""
        self._save(reason, "")

    def _save(self, reason: str, stops_as: str) -> None:
        self._abort(reason)
        self.note("save", reason=reason)
        self.set(stopping=reason, stops_as=stops_as)
        self.enter(Phase.SAVING)
        self.save_newest()

    def save_newest(self) -> None:
        """Choose what is to be saved: the newest step that is complete in memory, if it is newer than on disk."""
        newest, origin = newest_complete(self.cluster.copies, self.cluster.rules.world_size)
        self.set(copies=of_one_history(self.cluster.copies, newest, origin))
        self.save_step(newest if newest > self.published_step() else FRESH, origin)

    def save_step(self, at_step: int, origin: int) -> None:
        """Have a step saved that is complete in memory."""
        copies = {
            key: places if key[1] != at_step else {n: copy for n, copy in places.items() if copy.origin == origin}
            for key, places in self.cluster.copies.items()
        }
        copies = {key: places for key, places in copies.items() if places}
        self.set(copies=copies, persisting=at_step, files={}, savers={}, persist_sums={}, publisher="")

    def publish(self, node: str) -> None:
        """All files of the step that is being persisted are written: have its manifest written by `node`."""
        cluster = self.cluster
        wire = {str(rank): list(entry) for rank, entry in sorted(cluster.files.items())}
        self.set(publisher=node, asked=self.now)
        self.order(Publish(node, cluster.generation, cluster.persisting, wire))

    def end_persist(self, failed: bool = False) -> None:
        """It is done, or given up until the next one is due; the last of all is tried again."""
        rules, step = self.cluster.rules, self.cluster.persisting
        following = step if failed and step == rules.total_steps else next_persist(rules, step)
        self.set(persisting=FRESH, files={}, next_persist=following)

    def finish(self, state: str, reason: str) -> None:
        for member in self.alive:
            self.order(Finish(member.node, state, reason))
        self.order(Finish("", state, reason))
        self.note("run", state=state, reason=reason)
        self.set(outcome=state)
        self.enter(Phase.FINISHED)
