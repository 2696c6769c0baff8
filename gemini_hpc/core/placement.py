"""Who holds whose replicas: GEMINI's group and mixed placement (Algorithm 1 of the paper).

Placement is over ranks, not machines: the node that takes over a rank takes over its duties as a holder, so a
recovery changes nothing here.
"""

from functools import lru_cache

from gemini_hpc.core.types import Rank


@lru_cache(maxsize=8)
def holders(world_size: int, replicas: int) -> tuple[tuple[Rank, ...], ...]:
    """For each rank, the ranks that hold its snapshot, itself first.

    `replicas` (m) includes the owner's own copy. Where m divides N: N/m disjoint groups, each member holding
    everyone's; otherwise floor(N/m) - 1 such groups and a ring of the rest, in which each rank is held by
    itself and the next m - 1 (paper section 4.1, mixed placement). Raises ValueError unless 1 <= m <= N.
    """
    if not 1 <= replicas <= world_size:
        raise ValueError(f"replicas must be between 1 and the number of ranks {world_size}, not {replicas}")
    whole = world_size // replicas
    grouped = world_size if world_size % replicas == 0 else (whole - 1) * replicas
    table: list[tuple[Rank, ...]] = []
    for rank in range(grouped):
        first = rank - rank % replicas
        others = (first + (rank - first + k) % replicas for k in range(replicas))
        table.append(tuple(Rank(other) for other in others))
    ring = world_size - grouped
    for place in range(ring):
        table.append(tuple(Rank(grouped + (place + k) % ring) for k in range(replicas)))
    return tuple(table)


@lru_cache(maxsize=8)
def held_by(world_size: int, replicas: int) -> tuple[tuple[Rank, ...], ...]:
    """For each rank, the ranks whose snapshots its node holds, its own first.

    The position in this tuple is the area of the arena: 0 = own, 1..m-1 = replicas.
    """
    table: list[list[Rank]] = [[Rank(rank)] for rank in range(world_size)]
    for owner, keepers in enumerate(holders(world_size, replicas)):
        for keeper in keepers[1:]:
            table[keeper].append(Rank(owner))
    return tuple(tuple(owners) for owners in table)


def groups(world_size: int, replicas: int) -> tuple[tuple[Rank, ...], ...]:
    """The placement groups (the ring of a mixed placement counts as one), for people to read."""
    found: dict[tuple[Rank, ...], None] = {}
    for keepers in holders(world_size, replicas):
        found[tuple(sorted(keepers))] = None
    tail = [group for group in found if any(set(group) & set(other) for other in found if other != group)]
    whole = [group for group in found if group not in tail]
    ring = tuple(sorted({rank for group in tail for rank in group}))
    return tuple(whole) + ((ring,) if ring else ())
