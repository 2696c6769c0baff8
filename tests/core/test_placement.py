"""Placement against Algorithm 1 of the paper, and the forms of our own."""

import pytest

from gemini_hpc.core.placement import areas, groups, held_by, holders

EVERY_SIZE = [(n, m) for n in range(1, 41) for m in range(1, min(n, 5) + 1)]


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


@pytest.mark.parametrize(("world_size", "replicas"), EVERY_SIZE)
def test_the_other_forms_differ_in_the_tail_alone(world_size: int, replicas: int) -> None:
    mixed, left_over = holders(world_size, replicas), world_size % replicas
    whole = world_size // replicas * replicas
    for form in ("overlap", "full_tail"):
        keepers = holders(world_size, replicas, form)
        common = world_size if not left_over else whole - replicas
        assert keepers[:common] == mixed[:common]
        assert all(row[0] == rank and len(set(row)) == len(row) for rank, row in enumerate(keepers))
    if left_over:
        tail = set(range(whole - replicas, world_size))
        assert all(set(row) == tail for row in holders(world_size, replicas, "full_tail")[min(tail) :])
        overlap = holders(world_size, replicas, "overlap")
        assert all(set(row) == set(range(whole - replicas, whole)) for row in overlap[whole - replicas : whole])
        assert all(set(row) == set(range(world_size - replicas, world_size)) for row in overlap[whole:])
        assert len({frozenset(row) for row in overlap}) == -(-world_size // replicas)
        assert (
            areas(world_size, replicas, "overlap") == areas(world_size, replicas, "full_tail") == replicas + left_over
        )
    ring = holders(world_size, replicas, "ring")
    assert all(row == tuple((rank + k) % world_size for k in range(replicas)) for rank, row in enumerate(ring))
    assert areas(world_size, replicas, "ring") == areas(world_size, replicas) == replicas


@pytest.mark.parametrize(("world_size", "replicas"), [(4, 0), (4, 5), (4, -1), (0, 1), (1, 2)])
def test_more_copies_than_ranks_or_none_is_refused(world_size: int, replicas: int) -> None:
    with pytest.raises(ValueError, match="between 1 and the number of ranks"):
        holders(world_size, replicas)
