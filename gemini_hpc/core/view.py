"""The coordinator's knowledge in words, for `status` and the progress line."""

from typing import Any

from gemini_hpc.core.domains import shared
from gemini_hpc.core.placement import groups
from gemini_hpc.core.replication import hindrances
from gemini_hpc.core.state import Cluster, Member, Phase, Worker
from gemini_hpc.core.types import FRESH

LATE_S = 5.0
"""What takes longer while it trains, a step or the answers of a majority, is named as something that is waited for."""


def describe(cluster: Cluster, now: float) -> dict[str, Any]:
    """Return a JSON-ready summary: phase, ranks, nodes, tiers, and by name whatever is being waited for."""
    rules = cluster.rules
    return {
        "state": "closing" if cluster.phase is Phase.FINISHED else cluster.phase.value,  # the job has the last word
        "generation": cluster.generation,
        "step": max(0, min(cluster.stepped.values(), default=cluster.plan.step if cluster.plan else 0)),
        "total_steps": rules.total_steps,
        "world_size": rules.world_size,
        "replicas": rules.replicas,
        "placement_groups": [list(group) for group in groups(rules.world_size, rules.replicas, rules.placement)],
        "shared_domains": list(shared(cluster.ranks, rules.domains, rules.world_size, rules.replicas, rules.placement)),
        # right after a recovery, what was restored is complete in memory though not on all holders: not "protected"
        "safe_step": cluster.safe_step if cluster.safe_step != FRESH or not cluster.plan else cluster.plan.step,
        "persistent_step": cluster.published.step if cluster.published else -1,
        "protected": not cluster.exposed,
        "window_world": {"number": cluster.world.number, "state": cluster.world.state},
        "nodes": [_node(cluster, member, now) for member in cluster.members.values()],
        "waiting_for": _waiting_for(cluster, now),
        "waiting_s": round(now - (cluster.progressed if _trains(cluster) else cluster.phase_since), 1),
    }


def _node(cluster: Cluster, member: Member, now: float) -> dict[str, Any]:
    rank = next((r for r, node in cluster.ranks.items() if node == member.node), None)
    status = "failed" if not member.able else "spare" if rank is None else "active"
    return {
        "node": member.node,
        "status": status,
        "rank": rank,
        "worker": member.worker.value if member.alive else None,
        "suspected_for": sorted(member.evidence),
        "avoided_for": _why_avoided(member),
        "hurry": member.hurry,
        "heard_s_ago": round(now - member.heard, 2) if member.heard >= 0 else None,
        "restarts": member.restarts,
    }


def _why_avoided(member: Member) -> list[str]:
    """Say why any other node is preferred for a rank."""
    reasons = {
        "Slurm drains it": member.drains,
        "no window host starts on it": member.hostless,
        "it could not read a snapshot": member.deaf,
        "its worker keeps failing": not member.able,
    }
    return [reason for reason, holds in reasons.items() if holds and member.alive]


def _trains(cluster: Cluster) -> bool:
    return cluster.phase is Phase.RUNNING and cluster.done_since < 0


def _waiting_for(cluster: Cluster, now: float) -> list[str]:
    """Name what the cluster waits for now (I6); empty while it trains or when it is over."""
    members, plan = cluster.members, cluster.plan
    if cluster.phase is Phase.FORMING and not cluster.counted:
        return [f"{m.node} to report what it has" for m in members.values() if m.alive and m.held is None]
    if cluster.phase is Phase.FORMING:
        tier = [] if cluster.surveyed else ["the persistent tier to list its checkpoints"]
        building = [m for m in members.values() if m.worker is not Worker.IDLE and m.able]
        return tier + [f"worker of {m.node} ({m.worker.value})" for m in building]
    if cluster.phase is Phase.GATHERING and plan is not None:
        fetches = [
            f"rank {r}'s snapshot from {s.node or s.tier}" for r, s in plan.sources.items() if r not in cluster.fetched
        ]
        late = [node for node in plan.ranks.values() if members[node].worker is not Worker.IDLE]
        first = plan.step == FRESH and cluster.world.state == "starting"
        fetches += [f"MPI world {cluster.world.number} of the window hosts (starting)"] if first else []
        return fetches + [f"worker of {node} ({members[node].worker.value})" for node in late]
    if cluster.phase is Phase.JOINING:
        return [f"rank {rank} to resume" for rank in cluster.ranks if rank not in cluster.resumed]
    if cluster.phase is Phase.SAVING:
        return _unsaved(cluster)
    if cluster.phase is not Phase.RUNNING:
        return []
    world = cluster.world
    hosts = [f"MPI world {world.number} of the window hosts ({world.state})"] if world.state != "ready" else []
    if cluster.lags or 0 <= cluster.ahead_since < now - LATE_S:
        hosts += [f"replicas: {why}" for why in hindrances(cluster)]
    if not _trains(cluster):
        return [*hosts, f"the checkpoint of step {cluster.rules.total_steps} on the persistent tier"]
    return hosts + (_late(cluster) if now - cluster.progressed > LATE_S else [])


def _unsaved(cluster: Cluster) -> list[str]:
    if cluster.persisting == FRESH:  # nothing that is newer than the newest checkpoint, if there is one
        return ["the persistent tier to list its checkpoints"]
    ranks = [rank for rank in range(cluster.rules.world_size) if rank not in cluster.files]
    files = [f"rank {rank} of step {cluster.persisting} on the persistent tier" for rank in ranks]
    return files or [f"{cluster.publisher or 'a node'} to publish the checkpoint of step {cluster.persisting}"]


def _late(cluster: Cluster) -> list[str]:
    """The ranks that are behind the others, or all."""
    assert cluster.plan is not None
    done = {rank: cluster.stepped.get(rank, max(0, cluster.plan.step)) for rank in cluster.ranks}
    behind = [rank for rank, step in done.items() if step < max(done.values())] or list(done)
    return [f"rank {rank} on {cluster.ranks[rank]} to do step {done[rank] + 1}" for rank in behind]
