"""Plan a generation: who takes which rank, from which step, and where each rank's snapshot comes from."""

from gemini_hpc.core.state import Cluster, Copies, Plan, Source, Worker
from gemini_hpc.core.types import FRESH


def plan(cluster: Cluster) -> Plan | None:
    """Plan the next generation from what is alive; None when there are not enough nodes for all ranks."""
    ranks = assign(cluster)
    if ranks is None:
        return None
    step = newest_common_step(cluster.copies, cluster.rules.world_size)
    published = cluster.published.step if cluster.published else FRESH
    if step is not None and step >= published:
        sources = {rank: _memory_source(cluster.copies, rank, step, node) for rank, node in ranks.items()}
        reason = f"step {step} is the newest with a verified snapshot of every rank in memory"
        return Plan(step, ranks, sources, reason)
    if published > FRESH:
        sources = {rank: Source("persistent") for rank in ranks}
        return Plan(published, ranks, sources, f"no step is complete in memory; {published} is the newest published")
    return Plan(FRESH, ranks, {rank: Source("fresh") for rank in ranks}, "no snapshot exists yet")


def assign(cluster: Cluster) -> dict[int, str] | None:
    """Give every rank a living node: its own where that lives, else a spare, the readiest first."""
    ranks = {rank: node for rank, node in cluster.ranks.items() if cluster.members[node].alive}
    taken = set(ranks.values())
    spares = [m for m in cluster.members.values() if m.alive and m.heard >= 0 and m.node not in taken]
    for as_built in (True, False):  # an engine that is built as this rank already is the best choice
        for rank in range(cluster.rules.world_size):
            fits = [m for m in spares if not as_built or (m.built_rank == rank and m.worker is Worker.IDLE)]
            if rank not in ranks and fits:
                chosen = min(fits, key=lambda member: (member.worker is not Worker.IDLE, member.node))
                spares.remove(chosen)
                ranks[rank] = chosen.node
    return dict(sorted(ranks.items())) if len(ranks) == cluster.rules.world_size else None


def newest_common_step(copies: Copies, world_size: int) -> int | None:
    """Return the newest step of which every rank has a verified copy somewhere, else None."""
    owners: dict[int, set[int]] = {}
    for (rank, step), places in copies.items():
        if places:
            owners.setdefault(step, set()).add(rank)
    return max((step for step, ranks in owners.items() if len(ranks) == world_size), default=None)


def _memory_source(copies: Copies, rank: int, step: int, node: str) -> Source:
    places = copies[rank, step]
    if node in places:
        return Source("local", node)
    return Source("peer", min(places))
