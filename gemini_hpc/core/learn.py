"""What an event tells: evidence, progress, copies. Stale generations and evicted nodes tell nothing."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from gemini_hpc.core.messages import (
    Copied,
    Disconnected,
    Event,
    HostLost,
    HostReady,
    NodeExited,
    Parked,
    Persisted,
    Publish,
    Published,
    Resumed,
    Sealed,
    Stepped,
    Tick,
    Trouble,
    WorkerLost,
    WorkerReady,
    WorldFailed,
)
from gemini_hpc.core.state import Checkpoint, Copy, Member, Phase, Worker
from gemini_hpc.core.turn import Turn

STALL_SHARE = 0.5
"""If we ourselves slept for more than this share of the heartbeat timeout, silence proves nothing."""


def learn(turn: Turn, event: Event) -> None:
    """Change what is known by one event."""
    if isinstance(event, Tick):
        _tick(turn)
        return
    if isinstance(event, WorldFailed):
        turn.world_lost(event.world, event.reason)
        return
    member = turn.cluster.members.get(event.node)
    if member is None or not member.alive:
        return  # a stranger, or an evicted node that does not know it yet
    if isinstance(event, NodeExited):
        turn.evict(event.node, event.reason)
        return
    if isinstance(event, Disconnected):
        turn.suspect(event.node, "connection", "its control connection broke")
        return
    _heard(turn, member)
    handler = _HANDLERS.get(type(event))
    if handler is not None:
        handler(turn, event)


def _heard(turn: Turn, member: Member) -> None:
    if member.evidence:
        turn.note("cleared", target=member.node, reason="it spoke again")
    turn.set_member(member.node, heard=turn.now, evidence={})


def _tick(turn: Turn) -> None:
    rules, last = turn.cluster.rules, turn.cluster.last_tick
    turn.set(last_tick=turn.now)
    if last >= 0 and turn.now - last > rules.heartbeat_timeout_s * STALL_SHARE:
        for member in turn.alive:  # we were not running ourselves: start counting anew
            if member.heard >= 0:
                turn.set_member(member.node, heard=turn.now)
        return
    for member in turn.alive:
        if member.heard >= 0 and turn.now - member.heard > rules.heartbeat_timeout_s:
            turn.suspect(member.node, "heartbeat", f"silent for {turn.now - member.heard:.1f} s")
    for member in turn.alive:
        since = min(member.evidence.values(), default=turn.now)
        if turn.now - since > rules.suspect_s:
            turn.evict(member.node, f"{' and '.join(sorted(member.evidence))}, not heard of again")
        elif member.heard < 0 and turn.now - member.worker_since > rules.build_s:
            turn.evict(member.node, f"never came within {rules.build_s:.0f} s")
        elif member.worker is Worker.BUILDING and turn.now - member.worker_since > rules.build_s:
            turn.lose_worker(member.node, f"not ready after {rules.build_s:.0f} s")


def _on_worker_ready(turn: Turn, event: WorkerReady) -> None:
    turn.set_worker(
        event.node,
        Worker.IDLE,
        built_rank=event.built_rank,
        store=event.store,
        snapshot_bytes=event.snapshot_bytes,
    )


def _on_worker_lost(turn: Turn, event: WorkerLost) -> None:
    turn.lose_worker(event.node, event.reason)


def _on_trouble(turn: Turn, event: Trouble) -> None:
    if event.generation != turn.cluster.generation or turn.cluster.trouble_since >= 0:
        return
    if turn.cluster.phase not in (Phase.JOINING, Phase.RUNNING):
        return
    turn.set(trouble_since=turn.now)
    turn.note("trouble", target=event.node, generation=event.generation, reason=event.reason)
    for member in turn.alive:
        if member.evidence:
            turn.evict(member.node, f"{' and '.join(member.evidence)}, and a peer's collective failed")


def _on_parked(turn: Turn, event: Parked) -> None:
    if event.generation == turn.cluster.members[event.node].joined:
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
        rung=event.rung,
        group_s=event.group_s,
        reset_s=event.reset_s,
        restore_s=event.restore_s,
    )


def _on_stepped(turn: Turn, event: Stepped) -> None:
    cluster = turn.cluster
    if event.generation != cluster.generation or cluster.phase not in (Phase.JOINING, Phase.RUNNING):
        return
    stepped = {**cluster.stepped, event.rank: event.step}
    first = len(stepped) == cluster.rules.world_size > len(cluster.stepped)
    turn.set(stepped=stepped)
    if first:
        turn.set(fruitless=0)
        turn.note("first_step", generation=event.generation, step=event.step)
        for node in cluster.ranks.values():  # it works again: the next failure is a new one
            turn.set_member(node, restarts=0)


def _on_sealed(turn: Turn, event: Sealed) -> None:
    cluster = turn.cluster
    if event.generation != cluster.generation or cluster.ranks.get(event.rank) != event.node:
        return
    if cluster.phase in (Phase.JOINING, Phase.RUNNING):
        turn.add_copy(event.rank, event.step, event.node, Copy(0, event.half, event.nbytes, event.checksum))


def _on_copied(turn: Turn, event: Copied) -> None:
    cluster = turn.cluster
    pull = cluster.pulls.get(event.node)
    expected = (event.rank, event.step, event.area, event.half)
    if pull is not None and (pull.rank, pull.step, pull.area, pull.half) == expected:
        turn.set(pulls={h: p for h, p in cluster.pulls.items() if h != event.node})
    elif event.rank in cluster.loading:
        turn.set(loading=cluster.loading - {event.rank})
    else:
        return
    fetch = event.area == 0
    wanted = cluster.plan is not None and cluster.plan.step == event.step and cluster.phase is Phase.GATHERING
    if event.ok and (not fetch or wanted) and _in_lineage(turn, event.step):
        copy = Copy(event.area, event.half, event.nbytes, event.checksum)
        turn.add_copy(event.rank, event.step, event.node, copy)
    if not event.ok:
        turn.note("copy_failed", target=event.node, rank=event.rank, step=event.step, reason=event.reason)
        if pull is not None and event.reason == "checksum":
            turn.drop_copy(event.rank, event.step, pull.source)
    if fetch and wanted:
        _on_fetched(turn, event)


def _in_lineage(turn: Turn, at_step: int) -> bool:
    """Snapshots newer than the step of the plan belong to a history that was abandoned."""
    plan = turn.cluster.plan
    return plan is None or at_step <= plan.step or turn.cluster.phase is Phase.RUNNING


def _on_fetched(turn: Turn, event: Copied) -> None:
    plan = turn.cluster.plan
    assert plan is not None
    source = plan.sources[event.rank]
    if not event.ok:
        if source.tier == "persistent":
            turn.finish("failed", f"rank {event.rank} of step {event.step} cannot be loaded: {event.reason}")
        else:
            turn.drop_copy(event.rank, event.step, source.node)
            turn.open_generation(f"{source.node} could not give rank {event.rank}: {event.reason}")
        return
    turn.set(fetched=turn.cluster.fetched | {event.rank})
    turn.note(
        "fetched",
        rank=event.rank,
        source=source.node,
        tier=source.tier,
        generation=turn.cluster.generation,
        bytes=event.nbytes,
        seconds=event.seconds,
    )


def _on_host_ready(turn: Turn, event: HostReady) -> None:
    world = turn.cluster.world
    if event.world != world.number or world.state != "starting":
        return
    turn.set_member(event.node, host_world=event.world)
    members = turn.cluster.members
    if all(members[n].host_world == world.number for n in world.members if members[n].alive):
        turn.set(world=replace(world, state="ready", since=turn.now, failures=0))
        turn.note("world", number=world.number, state="ready", reason="")


def _on_host_lost(turn: Turn, event: HostLost) -> None:
    turn.world_lost(event.world, f"the window host of {event.node} is gone: {event.reason}")


def _on_persisted(turn: Turn, event: Persisted) -> None:
    cluster = turn.cluster
    if event.step != cluster.persisting:
        return
    if not event.ok:
        turn.note("persist_failed", step=event.step, rank=event.rank, reason=event.reason)
        turn.end_persist()
        return
    files = {**cluster.files, event.rank: (event.name, event.nbytes, event.checksum)}
    turn.set(files=files)
    if len(files) == cluster.rules.world_size:
        wire = {str(rank): list(entry) for rank, entry in sorted(files.items())}
        turn.order(Publish(event.node, cluster.generation, event.step, wire))


def _on_published(turn: Turn, event: Published) -> None:
    if event.step != turn.cluster.persisting:
        return
    if event.ok:
        turn.set(published=Checkpoint(event.step, turn.cluster.files))
        total = sum(nbytes for _, nbytes, _ in turn.cluster.files.values())
        turn.note("persisted", step=event.step, path=event.path, bytes=total)
    else:
        turn.note("persist_failed", step=event.step, reason=event.reason)
    turn.end_persist()


_HANDLERS: dict[type[Event], Callable[[Turn, Any], None]] = {
    WorkerReady: _on_worker_ready,
    WorkerLost: _on_worker_lost,
    Trouble: _on_trouble,
    Parked: _on_parked,
    Resumed: _on_resumed,
    Stepped: _on_stepped,
    Sealed: _on_sealed,
    Copied: _on_copied,
    HostReady: _on_host_ready,
    HostLost: _on_host_lost,
    Persisted: _on_persisted,
    Published: _on_published,
}
