"""How likely it is that memory still has every rank's snapshot when some nodes are lost at once, each set as likely.

Exact for any placement, however large; and the bounds that the paper works with (section 4.2, Theorem 1, Corollary 1).
"""

from collections.abc import Sequence
from fractions import Fraction
from math import comb

Keepers = Sequence[Sequence[int]]
"""For each rank those that hold its snapshot, as `placement.holders` returns it."""

_Doomed = frozenset[frozenset[int]]
"""Sets of holders of which some are lost, and none has survived so far."""


def recovery_probability(keepers: Keepers, lost: int) -> Fraction:
    """Return the share of all sets of `lost` nodes after which every rank still has a holder."""
    return recovery_probabilities(keepers, lost)[lost]


def recovery_probabilities(keepers: Keepers, most: int) -> list[Fraction]:
    """Return it for 0 to `most` lost nodes."""
    return [Fraction(ways, comb(len(keepers), lost)) for lost, ways in enumerate(survivable(keepers, most))]


def survivable(keepers: Keepers, most: int) -> list[int]:
    """Return, for 0 to `most` lost nodes, the number of sets of so many after which every rank still has a holder.

    Goes through the nodes in order, and of each way to lose some of those before remembers nothing but which sets of
    holders are doomed unless one of the others in it survives. Neighbors hold one another's, so those are few.
    """
    begun_at: dict[int, list[frozenset[int]]] = {}
    for members in {frozenset(row) for row in keepers}:
        begun_at.setdefault(min(members), []).append(members)
    ways: dict[_Doomed, list[int]] = {frozenset(): [1] + [0] * most}
    for node in range(len(keepers)):
        after: dict[_Doomed, list[int]] = {}
        for doomed, counts in ways.items():
            saved = frozenset(members for members in doomed if node not in members)
            _add(after, saved, counts)
            also = doomed.union(begun_at.get(node, ()))
            if all(max(members) != node for members in also):  # else the last of its holders is lost as well
                _add(after, also, [0, *counts[:most]])
        ways = after
    return ways[frozenset()]


def _add(ways: dict[_Doomed, list[int]], doomed: _Doomed, counts: list[int]) -> None:
    before = ways.get(doomed)
    ways[doomed] = counts if before is None else [a + b for a, b in zip(before, counts, strict=True)]


def union_bound(keepers: Keepers, lost: int) -> Fraction:
    """Return the paper's lower bound: the loss of two sets of holders at once is taken for two cases.

    For group placement Corollary 1: 1 - (N/m) C(N-m, k-m) / C(N, k).
    """
    size = len(keepers)
    sets = {frozenset(row) for row in keepers}
    bad = sum(comb(size - len(members), lost - len(members)) for members in sets if len(members) <= lost)
    return max(Fraction(0), 1 - Fraction(bad, comb(size, lost)))


def upper_bound(world_size: int, replicas: int) -> Fraction:
    """Return what no placement of m copies exceeds when m nodes are lost: ceil(N/m) sets are the fewest (Theorem 1)."""
    return 1 - Fraction(-(-world_size // replicas), comb(world_size, replicas))
