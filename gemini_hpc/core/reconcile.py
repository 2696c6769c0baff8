"""What should be: looks only at the state, never at an event, and orders the next moves towards it."""

from collections.abc import Mapping
from typing import Any

from gemini_hpc.core import checkpoints, recovery, replication, worlds
from gemini_hpc.core.messages import Join, Load, Pull
from gemini_hpc.core.state import Cluster, Missing, Phase, Source, Worker
from gemini_hpc.core.turn import Turn
from gemini_hpc.core.types import FRESH


def reconcile(turn: Turn) -> None:
    """Bring the cluster one move nearer to where it should be."""
    worlds.keep(turn)
    if turn.cluster.phase is Phase.FORMING:
        _form(turn)
    if turn.cluster.phase is Phase.GATHERING:
        _gather(turn)
    if turn.cluster.phase is Phase.JOINING:
        _watch_join(turn)
    if turn.cluster.phase is Phase.RUNNING:
        _run(turn)
    if turn.cluster.phase is Phase.SAVING:
        checkpoints.save(turn)


def _form(turn: Turn) -> None:
    """Plan the next generation as soon as there is a node for every rank."""
    if any(m.held is None for m in turn.alive) and not turn.cluster.counted:
        return  # a new coordinator first hears from all who live what they have
    if not turn.cluster.counted:
        turn.set(counted=True, ranks=recovery.last_ranks(turn.alive), copies=recovery.all_copies(turn.alive))
        turn.tell_hosts(node for node in turn.cluster.world.members if not turn.cluster.members[node].alive)
    cluster = turn.cluster
    if not cluster.surveyed:
        if turn.in_phase_for() < cluster.rules.suspect_s:
            return  # a checkpoint may be newer than what is in memory; but nobody waits long for what may hang
        step, _ = recovery.newest_complete(cluster.copies, cluster.rules.world_size)
        overdue = turn.in_phase_for() > cluster.rules.finish_s
        if step == FRESH and overdue:
            turn.save_and_stop("the persistent tier does not say which checkpoints it has")
        if step == FRESH or (step < max((m.told_safe for m in turn.alive), default=FRESH) and not overdue):
            return
    if not cluster.begun and any(m.able and m.worker is not Worker.IDLE for m in turn.alive):
        return  # the first time, wait for all that were asked for
    if cluster.fruitless > cluster.rules.max_fruitless:
        turn.save_and_stop(f"{cluster.fruitless} generations in a row ended before a step was done")
        return
    plan = recovery.plan(cluster)
    if plan is None and any(m.held is None for m in turn.alive):
        return  # somebody is on his way back, and is given up when he is due
    if plan is None:
        reason = f"no node is left for every rank (the last was lost because {cluster.last_loss})"
        # where enough nodes live their workers are to blame, and others would do no better
        enough = len(turn.alive) >= cluster.rules.world_size
        turn.save_and_stop(reason, "stopped" if enough else "suspended")
        return
    newest, _ = recovery.newest_complete(cluster.copies, cluster.rules.world_size)
    if newest > plan.step:
        turn.save_first(f"step {newest} lies in memory, but not where all can read it")
        return
    generation = cluster.generation + 1
    turn.note(
        "plan",
        generation=generation,
        step=plan.step,
        reason=plan.reason,
        moves=_moves(plan.ranks, plan.sources),
    )
    for rank, node in plan.ranks.items():
        if cluster.ranks.get(rank) != node:
            turn.note("promote", target=node, rank=rank, generation=generation)
    turn.set(
        begun=True,
        generation=generation,
        plan=plan,
        ranks=plan.ranks,
        copies=recovery.of_one_history(cluster.copies, plan.step, plan.origin),
        fetched=frozenset(r for r, s in plan.sources.items() if s.tier in ("fresh", "local")),
        resumed=frozenset(),
        stepped={},
        done_since=-1.0,
        ahead_since=-1.0,
        loading=frozenset(),
        misses={},
        safe_step=FRESH,
        exposed=True,
        lags=False,
        complete=FRESH,
        fruitless=cluster.fruitless + 1,
        furthest=max(cluster.furthest, cluster.all_stepped()),
    )
    turn.enter(Phase.GATHERING)


def _gather(turn: Turn) -> None:
    """New members fetch while survivors leave the old group; then everybody is told to join."""
    cluster, plan = turn.cluster, turn.cluster.plan
    assert plan is not None
    if reason := _plan_is_void(turn):
        turn.open_generation(reason)
        return
    alone = recovery.last_copies(cluster, plan.step)
    for rank, node in plan.ranks.items():
        by_others = alone.get(node, set()) - {rank}
        if rank not in cluster.fetched and not (by_others and plan.sources[rank].tier == "peer"):
            _fetch(turn, rank, node)  # else others read first what it would overwrite
    missing = [rank for rank in plan.ranks if rank not in cluster.fetched and plan.sources[rank].tier == "peer"]
    if missing and turn.in_phase_for() > cluster.rules.gather_s:
        deaf = plan.ranks[missing[0]]
        if recovery.has_substitute(cluster, deaf):
            turn.set_member(deaf, deaf=True)
            turn.replace(deaf, f"{deaf} could not read rank {missing[0]}; another takes its place")
            return
        turn.save_first(f"nobody could give rank {missing[0]} within {cluster.rules.gather_s:.0f} s")
        return
    for node in plan.ranks.values():
        member = turn.cluster.members[node]
        if member.worker is Worker.BUSY and turn.in_phase_for() > cluster.rules.leave_s:
            turn.lose_worker(node, f"did not leave its group within {cluster.rules.leave_s:.0f} s")
            return
    members = turn.cluster.members
    if len(turn.cluster.fetched) < len(plan.ranks):
        return
    if any(members[node].worker is not Worker.IDLE for node in plan.ranks.values()):
        return
    if plan.step == FRESH and turn.cluster.world.state == "starting":
        return  # half a second at the start of a run, so that it is protected from its first step on
    store = members[plan.ranks[0]].store
    for rank, node in plan.ranks.items():
        half = turn.cluster.copies[rank, plan.step][node].half if plan.step != FRESH else 0
        turn.order(Join(node, cluster.generation, rank, plan.step, half, store))
        turn.set_worker(node, Worker.BUSY, joined=cluster.generation)
    turn.enter(Phase.JOINING)


def _plan_is_void(turn: Turn) -> str:
    """Say why what was planned cannot be done any more; "" = it can."""
    cluster, plan = turn.cluster, turn.cluster.plan
    assert plan is not None
    for rank, source in plan.sources.items():
        if source.tier in ("local", "peer") and not cluster.copies.get((rank, plan.step)):
            return f"nobody has rank {rank} of step {plan.step} any more"
        if source.tier == "local" and plan.ranks[rank] not in cluster.copies[rank, plan.step]:
            return f"{plan.ranks[rank]} has rank {rank} of step {plan.step} no more"
        if source.tier == "persistent" and (cluster.published is None or cluster.published.step != plan.step):
            return f"another checkpoint than that of step {plan.step} is the newest"
    if len(cluster.fetched) < len(plan.ranks) and turn.in_phase_for() > cluster.rules.finish_s:
        return f"not every rank has its snapshot after {cluster.rules.finish_s:.0f} s"
    return ""


def _fetch(turn: Turn, rank: int, node: str) -> None:
    cluster, plan = turn.cluster, turn.cluster.plan
    assert plan is not None
    tier, source = plan.sources[rank].tier, ""
    if tier == "persistent":
        if rank in cluster.loading or turn.now < cluster.not_before.get(node, 0.0):
            return
        if not cluster.members[node].snapshot_bytes:
            return
        assert cluster.published is not None
        name, _, checksum = cluster.published.files[rank]
        turn.order(Load(node, cluster.generation, rank, plan.step, 0, 0, name, checksum))
        turn.set(loading=cluster.loading | {rank})
    else:
        places = cluster.copies[rank, plan.step]
        source = min(places, key=lambda place: _cost_of_reading(cluster, rank, plan.step, place))
        if not _pull(turn, Missing(rank, plan.step, node, 0, source, places[source])):
            return
    turn.note("fetch_started", rank=rank, source=source, tier=tier, generation=cluster.generation)


def _cost_of_reading(cluster: Cluster, rank: int, at_step: int, place: str) -> tuple[bool, int, str]:
    """Order those who have a snapshot: in the MPI world first, then who failed least often."""
    outside = cluster.members[place].host_world != cluster.world.number
    return outside, cluster.misses.get((rank, at_step, place), 0), place


def _pull(turn: Turn, want: Missing) -> bool:
    """Order one read, if both hosts are up and it is the pair's turn. Replicas mirror the owner's half."""
    cluster, world = turn.cluster, turn.cluster.world
    if world.state != "ready" or not replication.turn_is_free(cluster.pulls, want.holder, want.source):
        return False
    if any(cluster.members[node].host_world != world.number for node in (want.holder, want.source)):
        return False
    if turn.now < cluster.not_before.get(want.holder, 0.0):
        return False
    pull = Pull(
        node=want.holder,
        generation=cluster.generation,
        origin=want.copy.origin,
        rank=want.rank,
        step=want.step,
        source=want.source,
        world=world.number,
        target=world.members.index(want.source),
        source_area=want.copy.area,
        source_half=want.copy.half,
        area=want.area,
        half=want.copy.half,
        nbytes=want.copy.nbytes,
        checksum=want.copy.checksum,
        deadline_s=cluster.rules.fetch_s,
        patience_s=cluster.patience_s() if cluster.phase is Phase.RUNNING else 0.0,
    )
    turn.order(pull)
    turn.set(pulls={**cluster.pulls, want.holder: pull}, pull_since={**cluster.pull_since, want.holder: turn.now})
    return True


def _watch_join(turn: Turn) -> None:
    cluster = turn.cluster
    assert cluster.plan is not None
    if len(cluster.resumed) == cluster.rules.world_size:
        turn.set(progressed=turn.now)
        turn.enter(Phase.RUNNING)
    elif turn.in_phase_for() > cluster.rules.join_s:
        # who hangs cannot leave either, and is found out by that
        late = [str(rank) for rank in cluster.ranks if rank not in cluster.resumed]
        turn.open_generation(f"rank {', '.join(late)} did not resume within {cluster.rules.join_s:.0f} s")
    elif 0 <= cluster.trouble_since < turn.now - cluster.rules.suspect_s:
        turn.open_generation("a collective failed while the group formed, and nobody is dead")


def _run(turn: Turn) -> None:
    cluster = turn.cluster
    news = cluster.copies is not cluster.examined
    if news:
        turn.set(missing=tuple(replication.missing(cluster)))
    for want in cluster.missing:
        _pull(turn, want)
    if news:
        advanced = _advance_safe(turn)
        turn.set(examined=cluster.copies)
        if _leave_nodes(turn, advanced):
            return
    _watch_replication(turn)
    checkpoints.persist(turn)
    _end_run(turn)
    if turn.cluster.phase is Phase.RUNNING and 0 <= cluster.trouble_since < turn.now - cluster.rules.suspect_s:
        turn.open_generation("a collective failed, and nobody is dead")
    elif turn.cluster.done_since < 0 and turn.now - turn.cluster.progressed > cluster.rules.progress_s:
        # whoever hangs does not leave the group, and is found out by that
        turn.open_generation(f"no rank has done a step for {cluster.rules.progress_s:.0f} s (recovery.progress_s)")


def _watch_replication(turn: Turn) -> None:
    """Nothing became safe for long: then checkpoints protect what replicas do not.

    The cause may be a window host that does not seal what was written, and nobody may be there to read from it.
    """
    cluster, rules = turn.cluster, turn.cluster.rules
    if not 0 <= cluster.ahead_since < turn.now - rules.fetch_s - rules.suspect_s - cluster.patience_s():
        return
    turn.set(ahead_since=turn.now)
    assert cluster.plan is not None
    if cluster.plan.step == turn.published_step() > cluster.safe_step:
        turn.make_safe(cluster.plan.step)  # from which all went on: nobody need write it again
    if not cluster.lags:
        turn.set(exposed=True, lags=True)
        why = "; ".join(replication.hindrances(cluster)) or "replication is too slow"
        turn.note("unprotected", generation=cluster.generation, reason=f"checkpoints take the place of replicas: {why}")
    newer = [(rank, places) for (rank, step), places in cluster.copies.items() if step > cluster.safe_step]
    sealed = {rank for rank, places in newer if cluster.ranks[rank] in places}
    for rank, node in cluster.ranks.items():
        if rank not in sealed and cluster.world.number == cluster.members[node].host_world:
            turn.note("host_lost", target=node, reason="it does not seal what its worker has written")
            turn.shun_host(node)


def _leave_nodes(turn: Turn, advanced: bool) -> bool:
    """Move a rank off a node that should not have one, at a moment when that costs next to nothing.

    That is when a step has just become safe; or, where replication lags, when the first snapshots after a checkpoint
    are there, which will be written, too: the persistent tier works, and they are as new as can be.
    """
    cluster = turn.cluster
    if cluster.lags:
        newest, _ = recovery.newest_complete(cluster.copies, cluster.rules.world_size)
        advanced = newest > max(cluster.complete, cluster.safe_step) and cluster.safe_step == turn.published_step()
        turn.set(complete=newest)
    for node in cluster.ranks.values() if advanced else ():
        member = cluster.members[node]
        if (member.drains or member.hostless) and recovery.has_substitute(cluster, node, at_once=True):
            why = f"Slurm drains {node}" if member.drains else f"no window host starts on {node}"
            turn.replace(node, f"{why}; another takes its place")
            return True
    return False


def _advance_safe(turn: Turn) -> bool:
    newest = replication.newest_safe(turn.cluster)
    if newest <= turn.cluster.safe_step:
        return False
    # older copies are not forgotten until others take their places: perhaps some owner has overwritten its newer one
    turn.make_safe(newest)
    turn.note("safe", step=newest, generation=turn.cluster.generation)
    if turn.cluster.exposed:
        turn.set(exposed=False, lags=False, through_disk=FRESH)
        turn.note("protected", step=newest, generation=turn.cluster.generation)
    return True


def _end_run(turn: Turn) -> None:
    cluster = turn.cluster
    total = cluster.rules.total_steps
    assert cluster.plan is not None
    if any(cluster.stepped.get(rank, cluster.plan.step) < total for rank in cluster.ranks):
        return
    if cluster.done_since < 0:
        turn.set(done_since=turn.now)
    gave_up = cluster.next_persist > total and cluster.persisting == FRESH
    overdue = cluster.done_since >= 0 and turn.now - cluster.done_since > cluster.rules.finish_s
    if turn.published_step() == total:
        turn.finish("finished", f"all {total} steps are done")
    elif gave_up or overdue:
        turn.finish("failed", f"all {total} steps are done, but the last checkpoint could not be published")


def _moves(ranks: Mapping[int, str], sources: Mapping[int, Source]) -> list[dict[str, Any]]:
    return [
        {"rank": rank, "node": node, "tier": sources[rank].tier, "source": sources[rank].node}
        for rank, node in ranks.items()
    ]
