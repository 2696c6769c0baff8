"""Placement against Algorithm 1 of the paper, and the probabilities that follow from it."""

from itertools import combinations
from math import comb

import pytest

from gemini_hpc.core.placement import groups, held_by, holders

EVERY_SIZE = [(n, m) for n in range(1, 41) for m in range(1, min(n, 5) + 1)]


def recovery_probability(keepers: tuple[tuple[int, ...], ...], lost_nodes: int) -> float:
    """Share of the sets of `lost_nodes` nodes after which every rank still has a holder."""
    size = len(keepers)
    masks = [sum(1 << keeper for keeper in row) for row in keepers]
    bad = sum(
        any(mask & ~lost == 0 for mask in masks)
        for lost in (sum(1 << node for node in chosen) for chosen in combinations(range(size), lost_nodes))
    )
    return 1 - bad / comb(size, lost_nodes)


def test_the_example_of_the_paper() -> None:
    assert holders(5, 2) == ((0, 1), (1, 0), (2, 3), (3, 4), (4, 2))
    assert groups(5, 2) == ((0, 1), (2, 3, 4))
    assert held_by(5, 2) == ((0, 1), (1, 0), (2, 4), (3, 2), (4, 3))


def test_disjoint_groups_where_replicas_divide_the_ranks() -> None:
    assert holders(4, 2) == ((0, 1), (1, 0), (2, 3), (3, 2))
    assert groups(6, 3) == ((0, 1, 2), (3, 4, 5))
    assert groups(3, 1) == ((0,), (1,), (2,))
    assert holders(3, 3) == ((0, 1, 2), (1, 2, 0), (2, 0, 1))


@pytest.mark.parametrize(("world_size", "replicas"), EVERY_SIZE)
def test_every_rank_has_its_holders_and_every_node_its_areas(world_size: int, replicas: int) -> None:
    keepers, areas = holders(world_size, replicas), held_by(world_size, replicas)
    assert len(keepers) == len(areas) == world_size
    for rank in range(world_size):
        assert keepers[rank][0] == areas[rank][0] == rank
        assert len(set(keepers[rank])) == len(keepers[rank]) == replicas
        assert len(set(areas[rank])) == len(areas[rank]) == replicas
        assert all(rank in areas[keeper] for keeper in keepers[rank])
        assert all(rank in keepers[owner] for owner in areas[rank])


@pytest.mark.parametrize(("world_size", "replicas"), EVERY_SIZE)
def test_groups_and_one_ring_as_algorithm_1_says(world_size: int, replicas: int) -> None:
    keepers = holders(world_size, replicas)
    grouped = world_size if world_size % replicas == 0 else (world_size // replicas - 1) * replicas
    for first in range(0, grouped, replicas):
        members = set(range(first, first + replicas))
        assert all(set(keepers[rank]) == members for rank in members)
    ring = list(range(grouped, world_size))
    for place, rank in enumerate(ring):
        assert list(keepers[rank]) == [ring[(place + k) % len(ring)] for k in range(replicas)]
    found = groups(world_size, replicas)
    assert sorted(rank for group in found for rank in group) == list(range(world_size))
    assert len(found) == grouped // replicas + bool(ring)


@pytest.mark.parametrize(
    ("world_size", "two_lost", "three_lost"),
    [(8, 85.71, 57.14), (16, 93.33, 80.00), (32, 96.77, 90.32), (64, 98.41, 95.24)],
)
def test_recovery_probabilities_of_the_paper(world_size: int, two_lost: float, three_lost: float) -> None:
    keepers = holders(world_size, 2)
    assert 100 * recovery_probability(keepers, 2) == pytest.approx(two_lost, abs=0.005)
    assert 100 * recovery_probability(keepers, 3) == pytest.approx(three_lost, abs=0.005)


@pytest.mark.parametrize(
    ("world_size", "replicas", "as_many_as_replicas", "one_more"),
    [(5, 2, 60.0, 0.0), (7, 2, 76.2, 34.3), (9, 2, 83.3, 52.4), (8, 3, 89.3, 64.3), (10, 3, 95.0, 81.4)],
)
def test_recovery_probabilities_of_mixed_placement(
    world_size: int, replicas: int, as_many_as_replicas: float, one_more: float
) -> None:
    keepers = holders(world_size, replicas)
    assert 100 * recovery_probability(keepers, replicas) == pytest.approx(as_many_as_replicas, abs=0.05)
    assert 100 * recovery_probability(keepers, replicas + 1) == pytest.approx(one_more, abs=0.05)
    if replicas > 1:
        assert recovery_probability(keepers, replicas - 1) == 1.0


def test_exact_probability_of_group_placement() -> None:
    """[x^k] ((1+x)^m - x^m)^(N/m) / C(N,k): the four nodes lost column of the table, N = 8 and 16."""
    assert 100 * recovery_probability(holders(8, 2), 4) == pytest.approx(22.86, abs=0.005)
    assert 100 * recovery_probability(holders(16, 2), 4) == pytest.approx(61.54, abs=0.005)
    assert recovery_probability(holders(8, 2), 5) == 0.0


@pytest.mark.parametrize(("world_size", "replicas"), [(4, 0), (4, 5), (4, -1), (0, 1), (1, 2)])
def test_more_copies_than_ranks_or_none_is_refused(world_size: int, replicas: int) -> None:
    with pytest.raises(ValueError, match="between 1 and the number of ranks"):
        holders(world_size, replicas)
