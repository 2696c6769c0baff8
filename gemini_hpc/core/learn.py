"""What an event tells: evidence, progress, copies. Stale generations and evicted nodes tell nothing."""

from collections.abc import Callable
from typing import Any

from gemini_hpc.core import checkpoints, recovery
from gemini_hpc.core.messages import (
    Abort,
    Copied,
    Damaged,
    Deposed,
    Disconnected,
    Event,
    Heartbeat,
    Hello,
    HostLost,
    HostReady,
    Inventory,
    NodeDrains,
    NodeExited,
    NodeUp,
    Parked,
    Persisted,
    Published,
    Resumed,
    Retire,
    Safe,
    Sealed,
    Stepped,
    Surveyed,
    Suspend,
    Tick,
    Trouble,
    Vote,
    WorkerLost,
    WorkerReady,
    WorldFailed,
)
from gemini_hpc.core.placement import areas
from gemini_hpc.core.state import Checkpoint, Cluster, Copy, Member, Phase, Worker, World, next_persist
from gemini_hpc.core.turn import Turn
from gemini_hpc.core.types import FRESH, changed

BAD_READS = 3
"""After so many reads that arrived damaged, the source is what is damaged."""

REST_S = 0.2
"""How long a node waits after a read that failed, before the next."""


def learn(turn: Turn, event: Event) -> None:
    """Change what is known by one event."""
    kind = type(event)
    if kind in _OF_THE_CLUSTER:
        _OF_THE_CLUSTER[kind](turn, event)
        return
    member = turn.cluster.members.get(event.node)
    if member is None:
        return  # a stranger
    if not member.alive:
        if isinstance(event, Heartbeat):  # an evicted node that does not know it yet
            turn.order(Retire(event.node, turn.cluster.generation + 1))
        return
    if kind in _EVIDENCE:
        _EVIDENCE[kind](turn, event)
        return
    _heard(turn, member)
    if kind in _SAID:
        _SAID[kind](turn, event)


def _heard(turn: Turn, member: Member) -> None:
    if not member.evidence:
        turn.set_member(member.node, heard=turn.now)
        return
    turn.note("cleared", target=member.node, reason="it spoke again")
    turn.set_member(member.node, heard=turn.now, evidence={})


def _on_tick(turn: Turn, _: Tick) -> None:
    rules = turn.cluster.rules
    for member in turn.alive:
        if member.heard >= 0 and turn.now - member.heard > rules.heartbeat_timeout_s:
            turn.suspect(member.node, "heartbeat", f"silent for {turn.now - member.heard:.1f} s")
    trusted = turn.trusts_silence()
    for member in turn.alive:
        if member.evidence and trusted and turn.now - min(member.evidence.values()) > rules.suspect_s:
            turn.evict(member.node, f"{' and '.join(sorted(member.evidence))}, not heard of again")
        elif member.held is None and turn.now > member.due:
            turn.evict(member.node, "it did not report in time")
        elif member.worker is Worker.BUILDING and turn.now - member.worker_since > rules.build_s:
            turn.lose_worker(member.node, f"not ready after {rules.build_s:.0f} s")
            if recovery.has_substitute(turn.cluster, member.node, at_once=True):
                turn.replace(member.node, f"{member.node} does not build a worker; another takes its place")


def _on_world_failed(turn: Turn, event: WorldFailed) -> None:
    turn.world_lost(event.world, event.reason)


def _on_suspend(turn: Turn, event: Suspend) -> None:
    if turn.cluster.counted:  # else it is not known yet what there is to be saved, and it is said again
        turn.save_and_stop(event.reason, "suspended")


def _on_node_up(turn: Turn, event: NodeUp) -> None:
    if event.node in turn.cluster.members:
        turn.welcome(event.node)


def _on_node_exited(turn: Turn, event: NodeExited) -> None:
    turn.evict(event.node, event.reason)


def _on_node_drains(turn: Turn, event: NodeDrains) -> None:
    if turn.cluster.members[event.node].drains is not event.drains:
        turn.set_member(event.node, drains=event.drains)
        turn.note("drain", target=event.node, drains=event.drains)


def _on_disconnected(turn: Turn, event: Disconnected) -> None:
    turn.suspect(event.node, "connection", "its control connection broke")


def _on_inventory(turn: Turn, event: Inventory) -> None:
    """What a node has, told to a new coordinator; put together once all have reported (`reconcile`)."""
    if turn.cluster.members[event.node].held is not None or event.term != turn.cluster.term:
        return
    if not _is_possible(turn.cluster, event):
        turn.note("refused", target=event.node, reason="what it reported names what there is not")
        return
    lost = event.worker == "lost"
    turn.set_worker(
        event.node,
        Worker.BUILDING if lost else Worker(event.worker),
        held=event.held,
        joined=event.generation,
        rank=event.rank,
        built_rank=event.built_rank,
        store=event.store,
        snapshot_bytes=event.snapshot_bytes,
        host_world=event.world if event.host else 0,
        blamed=int(not event.host and event.snapshot_bytes > 0),  # perhaps none starts there
        told_safe=event.safe_step,
    )
    if event.generation:
        turn.set(begun=True)
    world = turn.cluster.world
    if event.world > world.number:
        turn.set(world=World(event.world, event.members, "ready", turn.now))
    if lost:
        turn.lose_worker(event.node, event.reason)
    elif event.worker == Worker.BUSY:
        turn.order(Abort(event.node, event.generation))


def _is_possible(cluster: Cluster, event: Inventory) -> bool:
    """Whether it tells of nodes, ranks and places of this run: more than the types of its fields say."""
    rules = cluster.rules
    return (
        event.worker in ("lost", Worker.BUILDING, Worker.IDLE, Worker.BUSY)
        and -1 <= event.rank < rules.world_size
        and set(event.members) <= cluster.members.keys()
        and all(
            len(held) == 7
            and held[0] in range(areas(rules.world_size, rules.replicas, rules.placement))
            and held[1] in (0, 1)
            and held[2] in range(rules.world_size)
            for held in event.held
        )
    )


def _on_surveyed(turn: Turn, event: Surveyed) -> None:
    cluster = turn.cluster
    below = cluster.survey_below
    if cluster.surveyed or event.number != cluster.survey:
        return  # of a survey that began before something changed
    waited_for = (
        cluster.phase is Phase.FORMING
        and recovery.newest_complete(cluster.copies, cluster.rules.world_size)[0] == FRESH
    )
    if below is not None and event.step == FRESH and waited_for:  # rather than quietly from the beginning
        turn.finish("failed", f"the checkpoint of step {below} is damaged, and there is no older one")
        return
    turn.set(surveyed=True)
    if event.step > turn.published_step():
        files = {int(rank): (name, nbytes, checksum) for rank, (name, nbytes, checksum) in event.files.items()}
        turn.set(published=Checkpoint(event.step, files))
    turn.set(next_persist=next_persist(cluster.rules, max(turn.published_step(), 0)))


def _on_worker_ready(turn: Turn, event: WorkerReady) -> None:
    turn.set_worker(
        event.node,
        Worker.IDLE,
        built_rank=event.built_rank,
        store=event.store,
        snapshot_bytes=event.snapshot_bytes,
    )


def _on_worker_lost(turn: Turn, event: WorkerLost) -> None:
    if event.final and (not turn.cluster.begun or event.node in turn.cluster.ranks.values()):
        turn.note("suspect", target=event.node, evidence="worker", reason=event.reason)
        turn.save_and_stop(event.reason)
        return
    turn.lose_worker(event.node, event.reason)


def _on_trouble(turn: Turn, event: Trouble) -> None:
    if event.generation != turn.cluster.generation or turn.cluster.trouble_since >= 0:
        return
    if turn.cluster.phase not in (Phase.JOINING, Phase.RUNNING):
        return
    turn.set(trouble_since=turn.now)
    turn.note("trouble", target=event.node, generation=event.generation, reason=event.reason)
    for member in turn.alive if turn.trusts_silence() else ():
        if member.evidence:
            turn.evict(member.node, f"{' and '.join(member.evidence)}, and a peer's collective failed")


def _on_parked(turn: Turn, event: Parked) -> None:
    member = turn.cluster.members[event.node]
    if member.worker is Worker.BUSY and event.generation == member.joined:
        turn.set_worker(event.node, Worker.IDLE, store=event.store)


def _on_resumed(turn: Turn, event: Resumed) -> None:
    if event.generation != turn.cluster.generation or turn.cluster.phase is not Phase.JOINING:
        return
    turn.set(resumed=turn.cluster.resumed | {event.rank})
    turn.note(
        "resumed",
        target=event.node,
        rank=event.rank,
        generation=event.generation,
        step=event.step,
        loss=event.loss if event.step else None,
        rung=event.rung,
        group_s=event.group_s,
        reset_s=event.reset_s,
        restore_s=event.restore_s,
    )


def _on_stepped(turn: Turn, event: Stepped) -> None:
    cluster = turn.cluster
    if event.generation != cluster.generation or cluster.phase not in (Phase.JOINING, Phase.RUNNING):
        return
    if cluster.stepped.get(event.rank, FRESH) >= event.step:  # said again: perhaps it has not heard what is safe
        if cluster.safe_step > FRESH:
            turn.order(Safe(event.node, cluster.generation, cluster.safe_step))
        return
    stepped = {**cluster.stepped, event.rank: event.step}
    complete = len(stepped) == cluster.rules.world_size
    if complete and event.rank not in cluster.stepped:
        turn.note("first_step", generation=event.generation, step=event.step)
    turn.set(stepped=stepped, progressed=turn.now, step_s=event.step_s)
    every = cluster.rules.snapshot_every
    if cluster.ahead_since < 0 and event.step // every * every > cluster.safe_step:
        turn.set(ahead_since=turn.now)
    if complete and cluster.fruitless and min(stepped.values()) > cluster.furthest:
        turn.set(fruitless=0)  # further than ever: the next failure is a new one. A step done again proves nothing
        for node in cluster.ranks.values():
            turn.set_member(node, restarts=0)


def _on_sealed(turn: Turn, event: Sealed) -> None:
    cluster = turn.cluster
    if event.generation != cluster.generation or cluster.ranks.get(event.rank) != event.node:
        return
    if cluster.phase in (Phase.JOINING, Phase.RUNNING) and not _is_overtaken(cluster, event):
        copy = Copy(0, event.half, event.nbytes, event.checksum, event.generation)
        turn.add_copy(event.rank, event.step, event.node, copy)


def _is_overtaken(cluster: Cluster, event: Sealed) -> bool:
    """Whether a newer snapshot took its place: an agent says again what it said, and messages may cross."""
    if event.step < cluster.safe_step:
        return True
    newer = [p for (rank, at_step), p in cluster.copies.items() if at_step > event.step and rank == event.rank]
    copies = [places[event.node] for places in newer if event.node in places]
    return any((copy.area, copy.half) == (0, event.half) for copy in copies)


def _on_copied(turn: Turn, event: Copied) -> None:
    if event.source:
        _on_pulled(turn, event)
    elif event.rank in turn.cluster.loading and event.generation == turn.cluster.generation:
        turn.set(loading=turn.cluster.loading - {event.rank})
        _take_copy(turn, event, 0)
        failures = turn.cluster.misses.get((event.rank, event.step, ""), 0)
        if failures > turn.cluster.rules.max_restarts:
            turn.survey_again(survey_below=event.step, published=None)
            turn.open_generation(f"rank {event.rank} of step {event.step} cannot be loaded: {event.reason}")


def _on_pulled(turn: Turn, event: Copied) -> None:
    cluster = turn.cluster
    pull = cluster.pulls.get(event.node)
    answered = (event.generation, event.rank, event.step, event.area, event.half, event.source)
    if pull is None or answered != (
        pull.generation,
        pull.rank,
        pull.step,
        pull.area,
        pull.half,
        pull.source,
    ):
        if pull is None and event.generation == cluster.generation:
            _take_late_copy(turn, event)
        return
    turn.set(pulls={holder: other for holder, other in cluster.pulls.items() if holder != event.node})
    if pull.generation != cluster.generation and (cluster.plan is None or event.step > cluster.plan.step):
        return  # of a history that was abandoned
    _take_copy(turn, event, pull.origin)
    if event.ok and event.hurry != turn.cluster.members[event.node].hurry:
        turn.set_member(event.node, hurry=event.hurry)
        turn.note("hurry", target=event.node, reason=event.hurry)
    if event.reason in ("deadline", "gone"):  # gone: so says a coordinator before this one
        turn.note("host_lost", target=event.source, reason="nobody can read from it")
        turn.shun_host(event.source)
    key = (event.rank, event.step, event.source)
    if event.reason == "checksum" and turn.cluster.misses.get(key, 0) >= BAD_READS:
        turn.drop_copy(*key)
        turn.open_generation(f"the snapshot of rank {event.rank}, step {event.step} on {event.source} is damaged")


def _take_late_copy(turn: Turn, event: Copied) -> None:
    """A read that was given up has ended well all the same: the copy is there, if it is what somebody else has, too.

    By the time it would be read again it may be the last one.
    """
    places = turn.cluster.copies.get((event.rank, event.step), {})
    alike = next((copy for copy in places.values() if copy.checksum == event.checksum), None)
    if event.ok and alike:
        _take_copy(turn, event, alike.origin)


def _on_damaged(turn: Turn, event: Damaged) -> None:
    if event.generation != turn.cluster.generation:
        return
    turn.note("copy_failed", target=event.node, rank=event.rank, step=event.step, reason="checksum")
    turn.drop_copy(event.rank, event.step, event.node)
    turn.open_generation(f"the snapshot of rank {event.rank}, step {event.step} on {event.node} is damaged")


def _take_copy(turn: Turn, event: Copied, origin: int) -> None:
    """Believe a verified copy; count a failed one, and let its reader rest a moment."""
    cluster = turn.cluster
    if not event.ok:
        key = (event.rank, event.step, event.source)
        turn.note("copy_failed", target=event.node, rank=event.rank, step=event.step, reason=event.reason)
        turn.set(
            misses={**cluster.misses, key: cluster.misses.get(key, 0) + 1},
            not_before={**cluster.not_before, event.node: turn.now + REST_S},
        )
        return
    fetch = event.area == 0
    gathering = cluster.phase is Phase.GATHERING and cluster.plan is not None and cluster.plan.step == event.step
    if fetch and not (gathering and cluster.ranks.get(event.rank) == event.node):
        return
    copy = Copy(event.area, event.half, event.nbytes, event.checksum, origin)
    turn.add_copy(event.rank, event.step, event.node, copy)
    if fetch:
        turn.set(fetched=cluster.fetched | {event.rank})
        turn.note(
            "fetched",
            rank=event.rank,
            source=event.source,
            tier="peer" if event.source else "persistent",
            generation=cluster.generation,
            bytes=event.nbytes,
            seconds=event.seconds,
        )


def _on_hello(turn: Turn, event: Hello) -> None:
    if event.role == "host":
        turn.set_member(event.node, host_began=event.world)


def _on_host_ready(turn: Turn, event: HostReady) -> None:
    world = turn.cluster.world
    if event.world != world.number or world.state not in ("starting", "ready"):
        return
    if set(event.members) == set(world.members):  # the order is the launcher's
        turn.set(world=changed(world, members=event.members))
        world = turn.cluster.world
    turn.set_member(event.node, host_world=event.world)
    if world.state == "ready":
        return
    members = turn.cluster.members
    if all(members[n].host_world == world.number for n in world.members if members[n].alive):
        turn.set(world=changed(world, state="ready", since=turn.now, failures=0))
        for node in world.members:
            turn.set_member(node, blamed=0, absences=0, doubted=False, chances=0)
        turn.note("world", number=world.number, state="ready", reason="")


def _on_host_lost(turn: Turn, event: HostLost) -> None:
    if event.world == turn.cluster.world.number:
        turn.note("host_lost", target=event.node, reason=event.reason)
        turn.shun_host(event.node)


def _on_persisted(turn: Turn, event: Persisted) -> None:
    cluster = turn.cluster
    if event.step != cluster.persisting or event.checksum != cluster.persist_sums.get(event.rank):
        return  # of an order that was given up, perhaps of another history
    failed_writes = 0 if event.ok else cluster.members[event.node].failed_writes + 1
    turn.set_member(event.node, failed_writes=failed_writes)
    if not event.ok:
        turn.note("persist_failed", target=event.node, step=event.step, rank=event.rank, reason=event.reason)
        if event.reason == "checksum":
            turn.drop_copy(event.rank, event.step, event.node)
        if cluster.phase is Phase.SAVING:
            checkpoints.try_another(turn, event.rank, event.node)
        else:
            turn.end_persist(failed=True)
        return
    if event.rank in cluster.files:
        return
    files = {**cluster.files, event.rank: (event.name, event.nbytes, event.checksum)}
    turn.set(files=files)
    if len(files) == cluster.rules.world_size:
        turn.publish(event.node)


def _on_published(turn: Turn, event: Published) -> None:
    if event.step != turn.cluster.persisting or len(turn.cluster.files) < turn.cluster.rules.world_size:
        if event.ok and event.step > turn.published_step():  # ordered by a coordinator before, or in an attempt before
            turn.survey_again()
        return
    if not event.ok and turn.cluster.phase is Phase.SAVING:
        turn.note("persist_failed", target=event.node, step=event.step, reason=event.reason)
        failed_writes = turn.cluster.members[event.node].failed_writes + 1
        turn.set_member(event.node, failed_writes=failed_writes)
        turn.set(publisher="")  # another will try
        return
    if event.ok:
        turn.set(published=Checkpoint(event.step, turn.cluster.files), survey_below=None)
        total = sum(nbytes for _, nbytes, _ in turn.cluster.files.values())
        turn.note("persisted", step=event.step, path=event.path, bytes=total)
        if turn.cluster.lags and event.step > turn.cluster.safe_step:
            turn.make_safe(event.step)
    else:
        turn.note("persist_failed", step=event.step, reason=event.reason)
    turn.end_persist(failed=not event.ok)


Handlers = dict[type[Event], Callable[[Turn, Any], None]]

_OF_THE_CLUSTER: Handlers = {
    Tick: _on_tick,
    WorldFailed: _on_world_failed,
    Surveyed: _on_surveyed,
    NodeUp: _on_node_up,
    Suspend: _on_suspend,
}
_EVIDENCE: Handlers = {
    NodeExited: _on_node_exited,
    NodeDrains: _on_node_drains,
    Disconnected: _on_disconnected,
}
_SAID: Handlers = {
    WorkerReady: _on_worker_ready,
    WorkerLost: _on_worker_lost,
    Trouble: _on_trouble,
    Parked: _on_parked,
    Resumed: _on_resumed,
    Stepped: _on_stepped,
    Sealed: _on_sealed,
    Copied: _on_copied,
    Damaged: _on_damaged,
    Inventory: _on_inventory,
    Hello: _on_hello,
    HostReady: _on_host_ready,
    HostLost: _on_host_lost,
    Persisted: _on_persisted,
    Published: _on_published,
}

OF_AGENTS = frozenset({*_SAID, Deposed, Heartbeat, Vote})
"""What an agent may say; all else is the cluster's to tell, or the coordinator's own."""
