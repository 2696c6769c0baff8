"""Plan a generation: who takes which rank, from which step, and where each rank's snapshot comes from."""

from collections.abc import Iterable, Mapping, Set

from gemini_hpc.core.domains import domain_of
from gemini_hpc.core.placement import companions
from gemini_hpc.core.state import Cluster, Copies, Copy, Member, Plan, Rules, Source, Worker
from gemini_hpc.core.types import FRESH


def plan(cluster: Cluster) -> Plan | None:
    """Plan the next generation from what is alive; None when there are not enough nodes for all ranks."""
    ranks = assign(cluster)
    if ranks is None:
        return None
    copies = _readable(cluster, ranks)
    step, origin = newest_complete(copies, cluster.rules.world_size)
    published = cluster.published.step if cluster.published else FRESH
    if step > published or (step == published != FRESH and step != cluster.through_disk):
        sources = {}
        for rank, node in ranks.items():
            sources[rank] = _memory_source(_of_origin(copies[rank, step], origin), node)
        reason = f"step {step} is the newest with a verified snapshot of every rank in memory"
        return Plan(step, origin, ranks, sources, reason)
    if published > FRESH:
        sources = {rank: Source("persistent") for rank in ranks}
        return Plan(published, 0, ranks, sources, f"no step is complete in memory; {published} is the newest published")
    return Plan(FRESH, 0, ranks, {rank: Source("fresh") for rank in ranks}, "no step is complete, in memory or on disk")


def assign(cluster: Cluster) -> dict[int, str] | None:
    """Give every rank a living node: its own where that lives, else a spare.

    First one that has its snapshot already, as it was to take the rank before; then one whose engine is built as this
    rank; then the readiest.
    """
    ranks = {rank: node for rank, node in cluster.ranks.items() if cluster.members[node].able}
    taken = set(ranks.values())
    spares = _spares(cluster, taken)
    newest, origin = newest_complete(cluster.copies, cluster.rules.world_size)
    alone = last_copies(cluster, newest)
    for best in (
        lambda member, rank: _is_ready(member) and _is_at_home(cluster, member.node, rank, newest, origin),
        lambda member, rank: _is_ready(member) and member.built_rank == rank,
        lambda _member, _rank: True,
    ):
        for rank in [rank for rank in range(cluster.rules.world_size) if rank not in ranks]:
            fits = [m for m in spares if best(m, rank)]
            if fits:
                beside = _domains_beside(cluster.rules, ranks, rank)
                # best one whose arena is empty: what an evicted node still holds is overwritten when it takes a rank
                chosen = min(
                    fits,
                    key=lambda member: (
                        bool(alone.get(member.node, set()) - {rank}),
                        *(member.last_choice, member.worker is not Worker.IDLE),
                        domain_of(cluster.rules.domains, member.node) in beside,
                        *(member.host_world != cluster.world.number, bool(member.held)),
                        member.node,
                    ),
                )
                spares.remove(chosen)
                ranks[rank] = chosen.node
    return dict(sorted(ranks.items())) if len(ranks) == cluster.rules.world_size else None


def _is_at_home(cluster: Cluster, node: str, rank: int, at_step: int, origin: int) -> bool:
    """Whether a node has a rank's snapshot of a step in its own area."""
    copy = cluster.copies.get((rank, at_step), {}).get(node)
    return copy is not None and (copy.area, copy.origin) == (0, origin)


def last_copies(cluster: Cluster, at_step: int) -> dict[str, set[int]]:
    """Return the ranks of whose snapshot of a step there is none but in one node's own area, where it would restore."""
    found: dict[str, set[int]] = {}
    for (rank, step), places in cluster.copies.items():
        if step == at_step and len(places) == 1:
            ((node, copy),) = places.items()
            if copy.area == 0:
                found.setdefault(node, set()).add(rank)
    return found


def _domains_beside(rules: Rules, ranks: Mapping[int, str], rank: int) -> set[str]:
    """Return the failure domains in which the companions of a rank are."""
    others = companions(rules.world_size, rules.replicas, rules.placement)[rank] if rules.domains else ()
    return {domain_of(rules.domains, ranks[other]) for other in others if other in ranks}


def has_substitute(cluster: Cluster, node: str, at_once: bool = False) -> bool:
    """Whether a spare is left that is a better choice than `node`; `at_once`: its engine is built, too."""
    spares = _spares(cluster, {*cluster.ranks.values(), node})
    return any(_is_ready(member) if at_once else not member.last_choice for member in spares)


def _is_ready(member: Member) -> bool:
    return member.worker is Worker.IDLE and not member.last_choice


def _spares(cluster: Cluster, taken: Set[str]) -> list[Member]:
    return [m for m in cluster.members.values() if m.able and m.held is not None and m.node not in taken]


def last_ranks(members: Iterable[Member]) -> dict[int, str]:
    """Return which node had which rank last, as far as the living ones can tell."""
    newest: dict[int, Member] = {}
    for member in members:
        if member.joined and (member.rank not in newest or newest[member.rank].joined < member.joined):
            newest[member.rank] = member
    return {rank: member.node for rank, member in sorted(newest.items())}


def all_copies(members: Iterable[Member]) -> Copies:
    """Return what the members reported to hold."""
    found: dict[tuple[int, int], dict[str, Copy]] = {}
    for member in members:
        for area, half, rank, step, origin, nbytes, checksum in member.held or ():
            found.setdefault((rank, step), {})[member.node] = Copy(area, half, nbytes, checksum, origin)
    return found


def newest_complete(copies: Copies, world_size: int) -> tuple[int, int]:
    """Return the newest step of which every rank has a verified copy of one origin, and that; (FRESH, 0): none.

    A step that was trained again after a recovery lies in some arenas from before and in others from after it.
    """
    owners: dict[tuple[int, int], set[int]] = {}
    for (rank, step), places in copies.items():
        for copy in places.values():
            owners.setdefault((step, copy.origin), set()).add(rank)
    return max((key for key, ranks in owners.items() if len(ranks) == world_size), default=(FRESH, 0))


def of_one_history(copies: Copies, step: int, origin: int) -> dict[tuple[int, int], Mapping[str, Copy]]:
    """Leave out what is newer than `step`, and what is of `step` but of another origin."""
    kept: dict[tuple[int, int], Mapping[str, Copy]] = {}
    for (rank, at_step), places in copies.items():
        if at_step == step:
            kept[rank, at_step] = _of_origin(places, origin)
        elif at_step < step:
            kept[rank, at_step] = places
    return {key: places for key, places in kept.items() if places}


def _readable(cluster: Cluster, ranks: Mapping[int, str]) -> Copies:
    """Return the copies that whoever takes a rank can get at: without a window host its own alone."""

    def can_read(taker: str, place: str, copy: Copy) -> bool:
        at_home = place == taker and copy.area == 0
        return at_home or not (cluster.members[taker].hostless or cluster.members[place].hostless)

    return {
        (rank, step): {place: copy for place, copy in places.items() if can_read(ranks[rank], place, copy)}
        for (rank, step), places in cluster.copies.items()
    }


def _of_origin(places: Mapping[str, Copy], origin: int) -> dict[str, Copy]:
    return {node: copy for node, copy in places.items() if copy.origin == origin}


def _memory_source(places: Mapping[str, Copy], node: str) -> Source:
    if node in places and places[node].area == 0:
        return Source("local", node)
    return Source("peer", min(places))  # perhaps the node itself: what it holds for another is not where it restores
