"""The decision maker: `step(cluster, now, event) -> (cluster, commands)`, pure and deterministic.

An event first changes what is known (`_learn`), then the cluster is brought nearer to what it should be
(`_reconcile`): the second part looks only at the state, never at the event, so that a lost message, an event at
an odd moment or a new coordinator need no special case.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from gemini_hpc.core import recovery, replication
from gemini_hpc.core.messages import (
    Abort,
    Command,
    Copied,
    Disconnected,
    Event,
    Finish,
    Gone,
    HostLost,
    HostReady,
    Join,
    Load,
    NodeExited,
    Note,
    Parked,
    Persist,
    Persisted,
    Publish,
    Published,
    Pull,
    RestartWorker,
    Resumed,
    Retire,
    Safe,
    Sealed,
    Serve,
    StartWorld,
    Stepped,
    Tick,
    Trouble,
    WorkerLost,
    WorkerReady,
    WorldFailed,
)
from gemini_hpc.core.state import Checkpoint, Cluster, Copy, Member, Phase, Worker, World, next_persist
from gemini_hpc.core.types import FRESH

STALL_SHARE = 0.5
"""If we ourselves slept for more than this share of the heartbeat timeout, silence proves nothing."""


def step(cluster: Cluster, now: float, event: Event) -> tuple[Cluster, list[Command]]:
    """Take one event at time `now` (seconds, any monotonic clock); return the new state and the orders."""
    turn = _Turn(cluster, now)
    if cluster.phase is not Phase.FINISHED:
        turn.learn(event)
        turn.reconcile()
    return turn.cluster, turn.commands


class _Turn:
    """One call of `step`: a working copy of the state and the commands so far."""

    def __init__(self, cluster: Cluster, now: float) -> None:
        self.cluster = cluster
        self.now = now
        self.commands: list[Command] = []

    # --- small tools --------------------------------------------------------------------------------

    def set(self, **changes: Any) -> None:
        self.cluster = replace(self.cluster, **changes)

    def set_member(self, node: str, **changes: Any) -> None:
        members = dict(self.cluster.members)
        members[node] = replace(members[node], **changes)
        self.set(members=members)

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

    # --- what is known ------------------------------------------------------------------------------

    def learn(self, event: Event) -> None:
        if isinstance(event, Tick):
            self._tick()
            return
        if isinstance(event, WorldFailed):
            self._world_lost(event.world, event.reason)
            return
        member = self.cluster.members.get(event.node)
        if member is None or not member.alive:
            return  # a stranger, or an evicted node that does not know it yet
        if isinstance(event, NodeExited):
            self._evict(event.node, event.reason)
            return
        if isinstance(event, Disconnected):
            self._suspect(event.node, "connection", "its control connection broke")
            return
        self._heard(member)
        handler = getattr(self, f"_on_{type(event).__name__.lower()}", None)
        if handler is not None:
            handler(event)

    def _heard(self, member: Member) -> None:
        if member.evidence:
            self.note("cleared", target=member.node, reason="it spoke again")
        self.set_member(member.node, heard=self.now, evidence={})

    def _tick(self) -> None:
        rules, last = self.cluster.rules, self.cluster.last_tick
        self.set(last_tick=self.now)
        if last >= 0 and self.now - last > rules.heartbeat_timeout_s * STALL_SHARE:
            for member in self.alive:  # we were not running ourselves: start counting anew
                if member.heard >= 0:
                    self.set_member(member.node, heard=self.now)
            return
        for member in self.alive:
            if member.heard >= 0 and self.now - member.heard > rules.heartbeat_timeout_s:
                self._suspect(member.node, "heartbeat", f"silent for {self.now - member.heard:.1f} s")
        for member in self.alive:
            since = min(member.evidence.values(), default=self.now)
            if self.now - since > rules.suspect_s:
                self._evict(member.node, f"{' and '.join(sorted(member.evidence))}, not heard of again")
            elif member.heard < 0 and self.now - member.worker_since > rules.build_s:
                self._evict(member.node, f"never came within {rules.build_s:.0f} s")
            elif member.worker is Worker.BUILDING and self.now - member.worker_since > rules.build_s:
                self._lose_worker(member.node, f"not ready after {rules.build_s:.0f} s")

    def _suspect(self, node: str, kind: str, reason: str) -> None:
        member = self.cluster.members[node]
        if kind in member.evidence:
            return
        self.set_member(node, evidence={**member.evidence, kind: self.now})
        self.note("suspect", target=node, evidence=kind, reason=reason)
        if self.cluster.trouble_since >= 0 or len(member.evidence) > 0:
            self._evict(node, f"{reason}, and a second witness agrees")

    def _evict(self, node: str, reason: str) -> None:
        """Hard evidence, or soft evidence that was confirmed: the node is out."""
        if not self.cluster.members[node].evidence:
            self.note("suspect", target=node, evidence="exit", reason=reason)
        self.set_member(node, alive=False, evidence={})
        self.note("evict", target=node, generation=self.cluster.generation + 1, reason=reason)
        self.order(Retire(node, self.cluster.generation + 1))
        self._forget_copies_on(node)
        if self.cluster.persisting != FRESH:  # its shard will never come: tried again with the next safe step
            self.set(persisting=FRESH, files={})
        members = self.cluster.world.members
        if node in members:
            for other in self.alive:
                if other.host_world == self.cluster.world.number:
                    self.order(Gone(other.node, (members.index(node),)))
        if node in self.cluster.ranks.values():
            self._open_generation(f"{node} is lost")

    def _forget_copies_on(self, node: str) -> None:
        kept = {
            key: {n: copy for n, copy in places.items() if n != node} for key, places in self.cluster.copies.items()
        }
        pulls = {h: pull for h, pull in self.cluster.pulls.items() if node not in (h, pull.source)}
        self.set(copies={key: places for key, places in kept.items() if places}, pulls=pulls)

    def _open_generation(self, reason: str) -> None:
        """Fence the old generation: its workers drop their collectives, its messages change nothing."""
        cluster = self.cluster
        if cluster.phase is Phase.SAVING:
            return
        if cluster.phase is not Phase.FORMING:
            for member in self.alive:
                if member.worker is Worker.BUSY:
                    self.order(Abort(member.node, cluster.generation))
            self.note("abort", generation=cluster.generation, reason=reason)
        self.set(plan=None, trouble_since=-1.0)
        self.enter(Phase.FORMING)

    def _lose_worker(self, node: str, reason: str) -> None:
        """The node lives, its worker does not: start another there, unless it keeps failing."""
        member, rules = self.cluster.members[node], self.cluster.rules
        self.note("suspect", target=node, evidence="worker", reason=reason)
        if member.restarts >= rules.max_restarts:
            self._evict(node, f"its worker failed {member.restarts + 1} times in a row: {reason}")
            return
        self.set_worker(node, Worker.BUILDING, restarts=member.restarts + 1)
        self.order(RestartWorker(node))
        if node in self.cluster.ranks.values():
            rank = next(r for r, n in self.cluster.ranks.items() if n == node)
            self.note("evict", target=node, rank=rank, generation=self.cluster.generation + 1, reason=reason)
            self._open_generation(f"the worker of {node} is lost")

    def _on_workerready(self, event: WorkerReady) -> None:
        self.set_worker(
            event.node,
            Worker.IDLE,
            built_rank=event.built_rank,
            store=event.store,
            snapshot_bytes=event.snapshot_bytes,
        )

    def _on_workerlost(self, event: WorkerLost) -> None:
        self._lose_worker(event.node, event.reason)

    def _on_trouble(self, event: Trouble) -> None:
        if event.generation != self.cluster.generation or self.cluster.trouble_since >= 0:
            return
        if self.cluster.phase not in (Phase.JOINING, Phase.RUNNING):
            return
        self.set(trouble_since=self.now)
        self.note("trouble", target=event.node, generation=event.generation, reason=event.reason)
        for member in self.alive:
            if member.evidence:
                self._evict(member.node, f"{' and '.join(member.evidence)}, and a peer's collective failed")

    def _on_parked(self, event: Parked) -> None:
        if event.generation == self.cluster.members[event.node].joined:
            self.set_worker(event.node, Worker.IDLE, store=event.store)

    def _on_resumed(self, event: Resumed) -> None:
        if event.generation != self.cluster.generation or self.cluster.phase is not Phase.JOINING:
            return
        self.set(resumed=self.cluster.resumed | {event.rank})
        self.note(
            "resumed",
            target=event.node,
            rank=event.rank,
            generation=event.generation,
            step=event.step,
            rung=event.rung,
            group_s=event.group_s,
            reset_s=event.reset_s,
            restore_s=event.restore_s,
        )

    def _on_stepped(self, event: Stepped) -> None:
        cluster = self.cluster
        if event.generation != cluster.generation or cluster.phase not in (Phase.JOINING, Phase.RUNNING):
            return
        stepped = {**cluster.stepped, event.rank: event.step}
        first = len(stepped) == cluster.rules.world_size > len(cluster.stepped)
        self.set(stepped=stepped)
        if first:
            self.set(fruitless=0)
            self.note("first_step", generation=event.generation, step=event.step)
            for node in cluster.ranks.values():  # it works again: the next failure is a new one
                self.set_member(node, restarts=0)

    def _on_sealed(self, event: Sealed) -> None:
        cluster = self.cluster
        if event.generation != cluster.generation or cluster.ranks.get(event.rank) != event.node:
            return
        if cluster.phase in (Phase.JOINING, Phase.RUNNING):
            self._add_copy(event.rank, event.step, event.node, Copy(0, event.half, event.nbytes, event.checksum))

    def _add_copy(self, rank: int, at_step: int, node: str, copy: Copy) -> None:
        copies: dict[tuple[int, int], Mapping[str, Copy]] = dict(self.cluster.copies)
        for (other_rank, other_step), places in self.cluster.copies.items():
            here = places.get(node)
            if here and other_step != at_step and (here.area, here.half) == (copy.area, copy.half):
                copies[other_rank, other_step] = {n: c for n, c in places.items() if n != node}
        copies[rank, at_step] = {**copies.get((rank, at_step), {}), node: copy}
        self.set(copies={key: places for key, places in copies.items() if places})

    def _on_copied(self, event: Copied) -> None:
        cluster = self.cluster
        pull = cluster.pulls.get(event.node)
        expected = (event.rank, event.step, event.area, event.half)
        if pull is not None and (pull.rank, pull.step, pull.area, pull.half) == expected:
            self.set(pulls={h: p for h, p in cluster.pulls.items() if h != event.node})
        elif event.rank in cluster.loading:
            self.set(loading=cluster.loading - {event.rank})
        else:
            return
        fetch = event.area == 0
        wanted = cluster.plan is not None and cluster.plan.step == event.step and cluster.phase is Phase.GATHERING
        if event.ok and (not fetch or wanted) and self._in_lineage(event.step):
            copy = Copy(event.area, event.half, event.nbytes, event.checksum)
            self._add_copy(event.rank, event.step, event.node, copy)
        if not event.ok:
            self.note("copy_failed", target=event.node, rank=event.rank, step=event.step, reason=event.reason)
            if pull is not None and event.reason == "checksum":
                self._drop_copy(event.rank, event.step, pull.source)
        if fetch and wanted:
            self._on_fetched(event)

    def _in_lineage(self, at_step: int) -> bool:
        """Snapshots newer than the step of the plan belong to a history that was abandoned."""
        plan = self.cluster.plan
        return plan is None or at_step <= plan.step or self.cluster.phase is Phase.RUNNING

    def _drop_copy(self, rank: int, at_step: int, node: str) -> None:
        copies = dict(self.cluster.copies)
        copies[rank, at_step] = {n: c for n, c in copies.get((rank, at_step), {}).items() if n != node}
        self.set(copies={key: places for key, places in copies.items() if places})

    def _on_fetched(self, event: Copied) -> None:
        plan = self.cluster.plan
        assert plan is not None
        source = plan.sources[event.rank]
        if not event.ok:
            if source.tier == "persistent":
                self._finish("failed", f"rank {event.rank} of step {event.step} cannot be loaded: {event.reason}")
            else:
                self._drop_copy(event.rank, event.step, source.node)
                self._open_generation(f"{source.node} could not give rank {event.rank}: {event.reason}")
            return
        self.set(fetched=self.cluster.fetched | {event.rank})
        self.note(
            "fetched",
            rank=event.rank,
            source=source.node,
            tier=source.tier,
            generation=self.cluster.generation,
            bytes=event.nbytes,
            seconds=event.seconds,
        )

    def _on_hostready(self, event: HostReady) -> None:
        world = self.cluster.world
        if event.world != world.number or world.state != "starting":
            return
        self.set_member(event.node, host_world=event.world)
        members = self.cluster.members
        if all(members[n].host_world == world.number for n in world.members if members[n].alive):
            self.set(world=replace(world, state="ready", since=self.now, failures=0))
            self.note("world", number=world.number, state="ready", reason="")

    def _on_hostlost(self, event: HostLost) -> None:
        self._world_lost(event.world, f"the window host of {event.node} is gone: {event.reason}")

    def _world_lost(self, number: int, reason: str) -> None:
        world = self.cluster.world
        if number != world.number or world.state not in ("starting", "ready"):
            return
        failures = world.failures + 1
        self.set(world=replace(world, state="lost", since=self.now, failures=failures), pulls={})
        self.note("world", number=number, state="lost", reason=reason)

    def _on_persisted(self, event: Persisted) -> None:
        cluster = self.cluster
        if event.step != cluster.persisting:
            return
        if not event.ok:
            self.note("persist_failed", step=event.step, rank=event.rank, reason=event.reason)
            self._end_persist()
            return
        files = {**cluster.files, event.rank: (event.name, event.nbytes, event.checksum)}
        self.set(files=files)
        if len(files) == cluster.rules.world_size:
            wire = {str(rank): list(entry) for rank, entry in sorted(files.items())}
            self.order(Publish(event.node, cluster.generation, event.step, wire))

    def _on_published(self, event: Published) -> None:
        if event.step != self.cluster.persisting:
            return
        if event.ok:
            self.set(published=Checkpoint(event.step, self.cluster.files))
            total = sum(nbytes for _, nbytes, _ in self.cluster.files.values())
            self.note("persisted", step=event.step, path=event.path, bytes=total)
        else:
            self.note("persist_failed", step=event.step, reason=event.reason)
        self._end_persist()

    def _end_persist(self) -> None:
        following = next_persist(self.cluster.rules, self.cluster.persisting)
        self.set(persisting=FRESH, files={}, next_persist=following)

    # --- what should be -----------------------------------------------------------------------------

    def reconcile(self) -> None:
        """Bring the cluster one move nearer to where it should be."""
        self._keep_world()
        if self.cluster.phase is Phase.FORMING:
            self._form()
        if self.cluster.phase is Phase.GATHERING:
            self._gather()
        if self.cluster.phase is Phase.JOINING:
            self._watch_join()
        if self.cluster.phase is Phase.RUNNING:
            self._run()
        if self.cluster.phase is Phase.SAVING:
            self._save()

    def _keep_world(self) -> None:
        """Keep one MPI world over the arenas of all living nodes."""
        rules, world = self.cluster.rules, self.cluster.world
        hosts = tuple(m.node for m in self.alive if m.snapshot_bytes)
        if world.state == "starting" and self.now - world.since > rules.world_s:
            self._world_lost(world.number, f"not ready after {rules.world_s:.0f} s")
            world = self.cluster.world
        if world.state == "starting" or not hosts:
            return
        if world.number == 0 and any(not m.snapshot_bytes for m in self.alive):
            return  # at the start, one world for all rather than one for each that comes
        if world.state == "ready" and set(hosts) <= set(world.members):
            return
        if world.state == "lost":
            if world.failures > rules.max_restarts or self.now - world.since < world.failures - 1:
                return  # give up; or wait a second more after each failure in a row
        number = world.number + 1
        self.set(world=World(number, hosts, "starting", self.now, world.failures), pulls={})
        self.order(StartWorld("", number, hosts))
        self.note("world", number=number, state="started", reason="")

    def _form(self) -> None:
        """Plan the next generation as soon as there is a node for every rank."""
        cluster = self.cluster
        if cluster.generation == 0 and any(m.worker is not Worker.IDLE for m in self.alive):
            return  # the first time, wait for all that were asked for
        if cluster.fruitless > cluster.rules.max_fruitless:
            self._finish("failed", f"{cluster.fruitless} generations in a row ended before a step was done")
            return
        plan = recovery.plan(cluster)
        if plan is None:
            self._out_of_nodes()
            return
        generation = cluster.generation + 1
        self.note(
            "plan",
            generation=generation,
            step=plan.step,
            reason=plan.reason,
            moves=_moves(plan.ranks, plan.sources),
        )
        for rank, node in plan.ranks.items():
            if cluster.ranks.get(rank) != node:
                self.note("promote", target=node, rank=rank, generation=generation)
        self.set(
            generation=generation,
            plan=plan,
            ranks=plan.ranks,
            copies={key: places for key, places in cluster.copies.items() if key[1] <= plan.step},
            fetched=frozenset(r for r, s in plan.sources.items() if s.tier in ("fresh", "local")),
            resumed=frozenset(),
            stepped={},
            done_since=-1.0,
            loading=frozenset(),
            safe_step=FRESH,
            exposed=True,
            fruitless=cluster.fruitless + 1,
        )
        self.enter(Phase.GATHERING)

    def _out_of_nodes(self) -> None:
        """No node is left for some rank: save the newest complete step, so that nothing is lost, and stop."""
        cluster = self.cluster
        newest = recovery.newest_common_step(cluster.copies, cluster.rules.world_size)
        published = cluster.published.step if cluster.published else FRESH
        if newest is None or newest <= published:
            self._finish("stopped", "no node is left for every rank")
            return
        self.set(persisting=newest, files={})
        for rank in range(cluster.rules.world_size):
            node, copy = min(cluster.copies[rank, newest].items())
            self.order(Persist(node, rank, newest, copy.area, copy.half, copy.nbytes, copy.checksum))
        self.enter(Phase.SAVING)

    def _save(self) -> None:
        cluster = self.cluster
        if cluster.persisting == FRESH:
            saved = cluster.published.step if cluster.published else "nothing"
            self._finish("stopped", f"no node is left for every rank; the newest checkpoint is step {saved}")
        elif self.in_phase_for() > cluster.rules.join_s:
            self._finish("stopped", f"no node is left for every rank, and step {cluster.persisting} could not be saved")

    def _gather(self) -> None:
        """New members fetch while survivors leave the old group; then everybody is told to join."""
        cluster, plan = self.cluster, self.cluster.plan
        assert plan is not None
        for rank, node in plan.ranks.items():
            if rank not in cluster.fetched:
                self._fetch(rank, node)
        for node in plan.ranks.values():
            member = self.cluster.members[node]
            if member.worker is Worker.BUSY and self.in_phase_for() > cluster.rules.leave_s:
                self._lose_worker(node, f"did not leave its group within {cluster.rules.leave_s:.0f} s")
                return
        members = self.cluster.members
        if len(self.cluster.fetched) < len(plan.ranks):
            return
        if any(members[node].worker is not Worker.IDLE for node in plan.ranks.values()):
            return
        store = members[plan.ranks[0]].store
        for rank, node in plan.ranks.items():
            half = self.cluster.copies[rank, plan.step][node].half if plan.step != FRESH else 0
            self.order(Join(node, cluster.generation, rank, plan.step, half, store))
            self.set_worker(node, Worker.BUSY, joined=cluster.generation)
        self.enter(Phase.JOINING)

    def _fetch(self, rank: int, node: str) -> None:
        cluster, plan = self.cluster, self.cluster.plan
        assert plan is not None
        source = plan.sources[rank]
        if source.tier == "persistent":
            if rank in cluster.loading or not cluster.members[node].snapshot_bytes:
                return
            assert cluster.published is not None
            name, _, checksum = cluster.published.files[rank]
            self.order(Load(node, cluster.generation, rank, plan.step, 0, 0, name, checksum))
            self.set(loading=cluster.loading | {rank})
        else:
            copy = cluster.copies[rank, plan.step][source.node]
            missing = replication.Missing(rank, plan.step, node, 0, source.node, copy)
            if not self._pull(missing):
                return
        self.note("fetch_started", rank=rank, source=source.node, tier=source.tier, generation=cluster.generation)

    def _pull(self, want: replication.Missing) -> bool:
        """Order one read, if both hosts are up and it is the pair's turn. Replicas mirror the owner's half."""
        cluster, world = self.cluster, self.cluster.world
        hosts = (cluster.members[want.holder], cluster.members[want.source])
        if world.state != "ready" or any(m.host_world != world.number for m in hosts):
            return False
        if not replication.turn_is_free(cluster.pulls, want.holder, want.source):
            return False
        pull = Pull(
            node=want.holder,
            generation=cluster.generation,
            rank=want.rank,
            step=want.step,
            source=want.source,
            target=world.members.index(want.source),
            source_area=want.copy.area,
            source_half=want.copy.half,
            area=want.area,
            half=want.copy.half,
            nbytes=want.copy.nbytes,
            checksum=want.copy.checksum,
            deadline_s=cluster.rules.fetch_s,
        )
        self.order(Serve(want.source, cluster.rules.fetch_s))
        self.order(pull)
        self.set(pulls={**cluster.pulls, want.holder: pull})
        return True

    def _watch_join(self) -> None:
        cluster = self.cluster
        assert cluster.plan is not None
        if len(cluster.resumed) == cluster.rules.world_size:
            self.enter(Phase.RUNNING)
        elif self.in_phase_for() > cluster.rules.join_s:
            late = [node for rank, node in cluster.ranks.items() if rank not in cluster.resumed]
            for node in late:
                self._lose_worker(node, f"did not resume within {cluster.rules.join_s:.0f} s")
        elif 0 <= cluster.trouble_since < self.now - cluster.rules.suspect_s:
            self._open_generation("a collective failed while the group formed, and nobody is dead")

    def _run(self) -> None:
        cluster = self.cluster
        for want in replication.missing(cluster):
            self._pull(want)
        self._advance_safe()
        self._start_persist()
        self._end_run()
        if self.cluster.phase is Phase.RUNNING and 0 <= cluster.trouble_since < self.now - cluster.rules.suspect_s:
            self._open_generation("a collective failed, and nobody is dead")

    def _advance_safe(self) -> None:
        newest = replication.newest_safe(self.cluster)
        if newest <= self.cluster.safe_step:
            return
        copies = {key: places for key, places in self.cluster.copies.items() if key[1] >= newest}
        self.set(safe_step=newest, copies=copies)
        for member in self.alive:
            self.order(Safe(member.node, self.cluster.generation, newest))
        self.note("safe", step=newest, generation=self.cluster.generation)
        if self.cluster.exposed:
            self.set(exposed=False)
            self.note("protected", step=newest, generation=self.cluster.generation)

    def _start_persist(self) -> None:
        cluster = self.cluster
        if cluster.persisting != FRESH or cluster.safe_step < cluster.next_persist:
            return
        self.set(persisting=cluster.safe_step, files={})
        for rank, node in cluster.ranks.items():
            copy = cluster.copies[rank, cluster.safe_step][node]
            self.order(Persist(node, rank, cluster.safe_step, 0, copy.half, copy.nbytes, copy.checksum))

    def _published_step(self) -> int:
        return self.cluster.published.step if self.cluster.published else FRESH

    def _end_run(self) -> None:
        cluster = self.cluster
        total = cluster.rules.total_steps
        done = len(cluster.stepped) == cluster.rules.world_size and min(cluster.stepped.values()) >= total
        if not done:
            return
        if cluster.done_since < 0:
            self.set(done_since=self.now)
        gave_up = cluster.next_persist > total and cluster.persisting == FRESH
        overdue = cluster.done_since >= 0 and self.now - cluster.done_since > cluster.rules.finish_s
        if self._published_step() == total:
            self._finish("finished", f"all {total} steps are done")
        elif gave_up or overdue:
            self._finish("finished", f"all {total} steps are done, but the last checkpoint could not be published")

    def _finish(self, state: str, reason: str) -> None:
        for member in self.alive:
            self.order(Finish(member.node, state, reason))
        self.order(Finish("", state, reason))
        self.note("run", state=state, reason=reason)
        self.set(outcome=state)
        self.enter(Phase.FINISHED)


def _moves(ranks: Mapping[int, str], sources: Mapping[int, Any]) -> list[dict[str, Any]]:
    return [
        {"rank": rank, "node": node, "tier": sources[rank].tier, "source": sources[rank].node}
        for rank, node in ranks.items()
    ]
