"""Failure domains: racks, switches, chassis whose nodes are lost together. Holders of a snapshot should share none."""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence

from gemini_hpc.core.placement import Form, companions

Domains = Mapping[str, str]
"""Node -> its domain. A node that is not in it is one of its own."""


def domain_of(domains: Domains, node: str) -> str:
    return domains.get(node, f"of {node}")


def arrange(nodes: Sequence[str], domains: Domains, world_size: int, replicas: int, form: Form) -> tuple[str, ...]:
    """Return the nodes in an order in which the first are the ranks, whose holders share no domain where that can be.

    The first node stays the first, for on Slurm the supervisor is there. Each rank after it takes a node of the domain
    with most nodes left among those that no companion of it is in, so that what is scarce is not used up: for disjoint
    groups this finds an order if there is one (of the domains that have a node for every group left, each group takes
    as many as it can).
    """
    if not domains:
        return tuple(nodes)
    among = companions(world_size, replicas, form)
    left: dict[str, deque[str]] = {}
    for node in nodes:
        left.setdefault(domain_of(domains, node), deque()).append(node)
    ranks = [left[domain_of(domains, nodes[0])].popleft()]
    for rank in range(1, world_size):
        taken = {domain_of(domains, ranks[other]) for other in among[rank] if other < rank}
        there = [domain for domain in left if left[domain]]
        free = [domain for domain in there if domain not in taken] or there
        ranks.append(left[max(free, key=lambda domain: len(left[domain]))].popleft())
    chosen = set(ranks)
    return (*ranks, *(node for node in nodes if node not in chosen))


def shared(ranks: Mapping[int, str], domains: Domains, world_size: int, replicas: int, form: Form) -> Iterator[str]:
    """Yield the domains in which a rank and a companion of it are: whoever loses such a domain may lose all copies."""
    among = companions(world_size, replicas, form)
    pairs = ((node, ranks[other]) for rank, node in ranks.items() for other in among[rank] if other in ranks)
    domains_of = ((domain_of(domains, node), domain_of(domains, other)) for node, other in pairs)
    yield from dict.fromkeys(one for one, another in domains_of if one == another)
