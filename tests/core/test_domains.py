"""Holders of a snapshot are kept apart, wherever that can be done."""

from random import Random

import pytest

from gemini_hpc.core.domains import arrange, domain_of, shared
from gemini_hpc.core.placement import FORMS, Form


def racks(*sizes: int) -> dict[str, str]:
    """Racks a, b, ... with so many nodes each, named in the order of Slurm: a0 a1 ... b0 b1 ..."""
    names = [f"{chr(97 + rack)}{place}" for rack, size in enumerate(sizes) for place in range(size)]
    return {name: name[0] for name in names}


def ranks_of(order: tuple[str, ...], world_size: int) -> dict[int, str]:
    return dict(enumerate(order[:world_size]))


def test_neighbors_in_a_rack_are_not_partners() -> None:
    domains = racks(4, 4)
    order = arrange(tuple(domains), domains, 6, 2, "mixed")
    assert sorted(order) == sorted(domains)
    assert order == ("a0", "b0", "a1", "b1", "a2", "b2", "a3", "b3")
    assert list(shared(ranks_of(order, 6), domains, 6, 2, "mixed")) == []
    assert list(shared(ranks_of(tuple(domains), 6), domains, 6, 2, "mixed")) == ["a", "b"]


def test_without_domains_the_order_is_kept() -> None:
    names = tuple("dbca")
    assert arrange(names, {}, 3, 2, "ring") == names
    assert list(shared(ranks_of(names, 4), {}, 4, 2, "ring")) == []


def test_a_node_that_is_in_no_domain_is_one_of_its_own() -> None:
    domains = {"a0": "a", "a1": "a"}
    order = arrange(("a0", "a1", "x", "y"), domains, 4, 2, "mixed")
    assert list(shared(ranks_of(order, 4), domains, 4, 2, "mixed")) == []
    assert domain_of(domains, "x") != domain_of(domains, "y")


@pytest.mark.parametrize("replicas", [2, 3])
def test_disjoint_groups_are_apart_wherever_that_can_be(replicas: int) -> None:
    """It can where the domains, each counted with one node a group at most, have a node for every rank."""
    draw = Random(replicas)
    possible = 0
    for _ in range(300):
        domains = racks(*(draw.randint(1, 5) for _ in range(draw.randint(1, 5))))
        groups = len(domains) // replicas
        if not groups:
            continue
        world_size = replicas * draw.randint(1, groups)
        sizes = [list(domains.values()).count(domain) for domain in set(domains.values())]
        can_be = sum(min(size, world_size // replicas) for size in sizes) >= world_size
        order = arrange(tuple(domains), domains, world_size, replicas, "mixed")
        assert sorted(order) == sorted(domains)
        assert (list(shared(ranks_of(order, world_size), domains, world_size, replicas, "mixed")) == []) is can_be
        possible += can_be
    assert possible > 50


@pytest.mark.parametrize("form", FORMS)
def test_other_forms_are_apart_where_there_is_room(form: Form) -> None:
    domains = racks(4, 4, 4, 4)
    for world_size, replicas in ((9, 2), (10, 3), (7, 3)):
        order = arrange(tuple(domains), domains, world_size, replicas, form)
        together = list(shared(ranks_of(order, world_size), domains, world_size, replicas, form))
        crowded = form == "full_tail" and replicas + world_size % replicas > 4  # more companions than racks
        assert (together == []) is not crowded
