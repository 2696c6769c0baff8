"""Who holds whose replicas: the paper's group, mixed and ring placement, and two forms that lose less.

Placement is over ranks, not machines: the node that takes over a rank takes over its duties as a holder, so a
recovery changes nothing here.
"""

from functools import lru_cache
from typing import Literal, get_args

from gemini_hpc.core.types import Rank

Form = Literal["mixed", "ring", "overlap", "full_tail"]
"""How ranks are grouped. Where m divides N all but the ring are the paper's group placement: N/m disjoint groups, each
member holding everyone's. Otherwise q = N mod m ranks are left over, and the last ranks are placed in another way:

mixed      the last m + q form a ring (paper section 4.1, Algorithm 1)
ring       all do: each rank is held by itself and the next m - 1
overlap    the last m hold the q left over, m - q of them beside their own group's: the fewest sets to lose
full_tail  the last m + q all hold one another's
"""

FORMS: tuple[Form, ...] = get_args(Form)


@lru_cache(maxsize=16)
def holders(world_size: int, replicas: int, form: Form = "mixed") -> tuple[tuple[Rank, ...], ...]:
    """For each rank, the ranks that hold its snapshot, itself first.

    `replicas` (m) includes the owner's own copy. Raises ValueError unless 1 <= m <= N.
    """
    if not 1 <= replicas <= world_size:
        raise ValueError(f"replicas must be between 1 and the number of ranks {world_size}, not {replicas}")
    whole, left_over = divmod(world_size, replicas)
    if form == "ring":
        grouped, tail = 0, range(world_size)
    elif not left_over:
        grouped, tail = world_size, range(0)
    elif form == "overlap":
        grouped, tail = whole * replicas, range(world_size - replicas, world_size)
    else:
        grouped = (whole - 1) * replicas
        tail = range(grouped, world_size)
    table: list[tuple[Rank, ...]] = []
    for rank in range(world_size):
        first = rank - rank % replicas
        among = range(first, first + replicas) if rank < grouped else tail
        copies = len(among) if form == "full_tail" else replicas
        places = (rank - among.start + k for k in range(copies))
        table.append(tuple(Rank(among[place % len(among)]) for place in places))
    return tuple(table)


@lru_cache(maxsize=16)
def held_by(world_size: int, replicas: int, form: Form = "mixed") -> tuple[tuple[Rank, ...], ...]:
    """For each rank, the ranks whose snapshots its node holds, its own first.

    The position in this tuple is the area of the arena: 0 = own, from 1 on replicas.
    """
    table: list[list[Rank]] = [[Rank(rank)] for rank in range(world_size)]
    for owner, keepers in enumerate(holders(world_size, replicas, form)):
        for keeper in keepers[1:]:
            table[keeper].append(Rank(owner))
    return tuple(tuple(owners) for owners in table)


@lru_cache(maxsize=16)
def companions(world_size: int, replicas: int, form: Form = "mixed") -> tuple[frozenset[Rank], ...]:
    """For each rank, the others that hold a snapshot which it holds, too."""
    keepers, held = holders(world_size, replicas, form), held_by(world_size, replicas, form)
    return tuple(
        frozenset(other for owner in held[rank] for other in keepers[owner] if other != rank)
        for rank in range(world_size)
    )


def areas(world_size: int, replicas: int, form: Form = "mixed") -> int:
    """Return how many snapshots an arena must have room for: as many as any rank holds, for a spare may become any."""
    return max(len(owners) for owners in held_by(world_size, replicas, form))


def groups(world_size: int, replicas: int, form: Form = "mixed") -> tuple[tuple[Rank, ...], ...]:
    """The placement groups (a ring, or another tail, counts as one), for people to read."""
    found: dict[tuple[Rank, ...], None] = {}
    for keepers in holders(world_size, replicas, form):
        found[tuple(sorted(keepers))] = None
    tail = [group for group in found if any(set(group) & set(other) for other in found if other != group)]
    whole = [group for group in found if group not in tail]
    ring = tuple(sorted({rank for group in tail for rank in group}))
    return tuple(whole) + ((ring,) if ring else ())
