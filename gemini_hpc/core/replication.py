"""Which replicas are missing, and whose turn it is to pull.

Partners take turns: at any time at most one read is outstanding per holder, and within a pair of nodes only one
direction, because that is the pattern of one-sided reads that survives the death of a partner (FACTS.md section
4). The choice is a pure function of what is verified where, so a lost message or a new member needs no special
case: what is missing is pulled.
"""

from collections.abc import Iterator, Mapping

from gemini_hpc.core.messages import Pull
from gemini_hpc.core.placement import held_by, holders
from gemini_hpc.core.state import Cluster, Missing


def missing(cluster: Cluster) -> Iterator[Missing]:
    """Yield the missing replicas of every rank's newest sealed snapshot, in rank order; of a safe one none is."""
    newest: dict[int, int] = {}
    for (rank, step), places in cluster.copies.items():
        if step > newest.get(rank, cluster.safe_step) and cluster.ranks[rank] in places:
            newest[rank] = step
    rules = cluster.rules
    keepers = holders(rules.world_size, rules.replicas, rules.placement)
    areas = held_by(rules.world_size, rules.replicas, rules.placement)
    for rank, step in sorted(newest.items()):
        owner = cluster.ranks[rank]
        places = cluster.copies[rank, step]
        for keeper in keepers[rank][1:]:
            node = cluster.ranks[keeper]
            if node not in places:
                area = areas[keeper].index(rank)
                yield Missing(rank, step, node, area, owner, places[owner])


def turn_is_free(pulls: Mapping[str, Pull], holder: str, source: str) -> bool:
    """Whether `holder` may start to read from `source` beside the outstanding `pulls`."""
    if holder in pulls:
        return False
    opposite = pulls.get(source)
    return opposite is None or opposite.source != holder


def newest_safe(cluster: Cluster) -> int:
    """Newest step whose snapshot is verified on all its holders, for every rank; what it was when none is newer."""
    rules = cluster.rules
    keepers = holders(rules.world_size, rules.replicas, rules.placement)
    steps = {step for _, step in cluster.copies if step > cluster.safe_step}
    for step in sorted(steps, reverse=True):
        if all(
            cluster.ranks[keeper] in cluster.copies.get((rank, step), {})
            for rank in cluster.ranks
            for keeper in keepers[rank]
        ):
            return step
    return cluster.safe_step


def hindrances(cluster: Cluster) -> list[str]:
    """Name what keeps the newest snapshots from their holders: hosts that are not there, else reads that fail."""
    world = cluster.world
    if world.state != "ready":
        return [f"MPI world {world.number} of the window hosts does not start ({world.failures} failures in a row)"]
    absent = [node for node in cluster.ranks.values() if cluster.members[node].host_world != world.number]
    if absent:
        return [f"no window host on {node}" for node in absent]
    return [f"{want.holder} to read rank {want.rank} from {want.source}" for want in missing(cluster)]
