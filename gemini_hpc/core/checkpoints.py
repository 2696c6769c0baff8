"""The writing of checkpoints to the persistent tier: while training goes on, and of the newest step before the end."""

from collections.abc import Collection

from gemini_hpc.core.messages import Persist
from gemini_hpc.core.recovery import newest_complete
from gemini_hpc.core.state import Cluster, Phase, next_persist
from gemini_hpc.core.turn import Turn
from gemini_hpc.core.types import FRESH

AGAIN_S = 2.0
"""How long to wait before the last step is written again, or an order is repeated that saves a run."""

LAGGING_S = 10.0
"""The shortest pause between two checkpoints that take the place of replicas."""


def persist(turn: Turn) -> None:
    """Write a safe step every `persist_every` steps, and the last one; where replication lags, whatever is complete."""
    cluster = turn.cluster
    if cluster.persisting != FRESH and turn.now - cluster.persist_since > cluster.rules.finish_s:
        turn.note("persist_failed", step=cluster.persisting, reason="some node did not answer in time")
        for rank in cluster.ranks.keys() - cluster.files.keys():
            if (where := _writer(cluster, rank)) is not None:
                turn.set_member(where, failed_writes=cluster.members[where].failed_writes + 1)
        turn.end_persist(failed=True)
        cluster = turn.cluster
    if cluster.persisting != FRESH:
        if len(cluster.files) == cluster.rules.world_size:
            _publish_again(turn)
        elif turn.now - cluster.asked > AGAIN_S:
            _ask_to_persist(turn)
        return
    if not cluster.surveyed:
        return
    step, due, rest_s = cluster.safe_step, cluster.next_persist, 0.0
    if cluster.done_since >= 0:
        rest_s = AGAIN_S
    elif cluster.lags:
        due, rest_s = turn.published_step() + 1, LAGGING_S
    if cluster.done_since >= 0 or cluster.lags:  # a link may be down for as long as it likes
        step = max(step, newest_complete(cluster.copies, cluster.rules.world_size)[0])
    held = {rank: cluster.copies.get((rank, step), {}) for rank in cluster.ranks}
    rests = cluster.persist_since >= 0 and turn.now - cluster.persist_since < rest_s
    if step < due or not all(held.values()) or rests:
        return
    sums = {rank: next(iter(places.values())).checksum for rank, places in held.items()}
    turn.set(persisting=step, persist_since=turn.now, persist_sums=sums, files={})
    _ask_to_persist(turn)


def save(turn: Turn) -> None:
    """Have every rank's snapshot written by some living node that holds it.

    While all holders of one are silent an older step is saved first: it may be the newest that can be.
    """
    _choose_step(turn)
    cluster = turn.cluster
    if cluster.persisting == FRESH:
        newest = cluster.published
        _end_saving(turn, f"the newest checkpoint is {newest.step if newest else 'none'}")
        return
    if turn.in_phase_for() > cluster.rules.finish_s:
        _end_saving(turn, f"step {cluster.persisting} could not be saved in time")
        return
    again = turn.now - cluster.asked > AGAIN_S
    if len(cluster.files) == cluster.rules.world_size:
        _publish_again(turn)
        return
    if again:
        turn.set(asked=turn.now)
    for rank in range(cluster.rules.world_size):
        asked = turn.cluster.savers.get(rank)
        if rank in cluster.files or (asked is not None and cluster.members[asked].alive and not again):
            continue
        places = cluster.copies.get((rank, cluster.persisting), {})
        if not places:  # whoever held it died: an older step may still be whole
            wanted = cluster.persisting
            turn.note("persist_failed", step=wanted, rank=rank, reason="nobody has it any more")
            turn.save_newest()
            if turn.cluster.persisting == FRESH:
                _end_saving(turn, f"rank {rank} of step {wanted} could not be saved")
            return
        node = _saver(turn, rank, places)
        copy = places[node]
        turn.order(Persist(node, rank, cluster.persisting, copy.area, copy.half, copy.nbytes, copy.checksum))
        sums = {**turn.cluster.persist_sums, rank: copy.checksum}
        turn.set(savers={**turn.cluster.savers, rank: node}, persist_sums=sums)


def _choose_step(turn: Turn) -> None:
    cluster = turn.cluster
    world_size = cluster.rules.world_size
    if cluster.persisting == FRESH:
        newest, origin = newest_complete(cluster.copies, world_size)
        if newest > turn.published_step():  # which was older, as some were silent
            turn.save_step(newest, origin)
        return
    silent = {member.node for member in cluster.members.values() if member.evidence}
    unwritten = set(range(world_size)) - cluster.files.keys()
    if any(cluster.copies.get((rank, cluster.persisting), {}).keys() <= silent for rank in unwritten):
        heard = {
            key: {node: copy for node, copy in places.items() if node not in silent}
            for key, places in cluster.copies.items()
        }
        older, origin = newest_complete(heard, world_size)
        if turn.published_step() < older < cluster.persisting:
            turn.save_step(older, origin)


def _end_saving(turn: Turn, how: str) -> None:
    """End the run, or go on: from what was saved, else from what those can read who have it, else from what is older.

    From the beginning only when nothing is left that somebody could still save.
    """
    cluster = turn.cluster
    newest, _ = newest_complete(cluster.copies, cluster.rules.world_size)
    saved = turn.published_step() >= max(newest, 0)
    at_home = {} if saved else _at_home(cluster, newest)
    goes_on = not cluster.stops_as and (saved or at_home or cluster.published or newest == FRESH)
    if not (goes_on or cluster.stops_as or cluster.surveyed) and turn.in_phase_for() < 2 * cluster.rules.finish_s:
        return  # perhaps there is an older checkpoint; and what could not be saved may be yet
    if not goes_on:
        turn.finish(cluster.stops_as or "stopped", f"{cluster.stopping}; {how}")
        return
    if at_home:
        turn.set(ranks=at_home)
    elif not saved:
        turn.set(copies={})
    following = next_persist(cluster.rules, max(turn.published_step(), 0))
    turn.set(persisting=FRESH, files={}, next_persist=following, through_disk=newest if saved else FRESH, plan=None)
    turn.enter(Phase.FORMING)


def _at_home(cluster: Cluster, at_step: int) -> dict[int, str]:
    """Return who can restore each rank from its own area without reading from anybody; {} = for some rank nobody."""
    ranks: dict[int, str] = {}
    for rank in range(cluster.rules.world_size):
        places = cluster.copies.get((rank, at_step), {})
        homes = [n for n, copy in places.items() if copy.area == 0 and cluster.members[n].able]
        homes = [node for node in homes if node not in ranks.values()]
        if not homes:
            return {}
        ranks[rank] = homes[0]
    return ranks


def _saver(turn: Turn, rank: int, places: Collection[str]) -> str:
    """Choose who writes: who failed least and speaks, else who was asked before, else so that many write at once.

    Who was asked before, and has not answered for long, may be deaf.
    """
    cluster = turn.cluster
    asked = list(cluster.savers.values())
    late = turn.in_phase_for() > cluster.rules.finish_s / 2

    def cost(place: str) -> tuple[int, bool, bool, int, str]:
        failed = cluster.misses.get((rank, cluster.persisting, place), 0)
        silent = bool(cluster.members[place].evidence)
        return failed, silent, (cluster.savers.get(rank) == place) is late, asked.count(place), place

    return min(places, key=cost)


def try_another(turn: Turn, rank: int, failed: str) -> None:
    """A node could not save a rank: ask one at once that failed less often; else all again, a moment later."""
    cluster = turn.cluster
    key = (rank, cluster.persisting, failed)
    misses = {**cluster.misses, key: cluster.misses.get(key, 0) + 1}
    turn.set(misses=misses)
    places = cluster.copies.get((rank, cluster.persisting), {})
    if any(misses.get((rank, cluster.persisting, place), 0) < misses[key] for place in places):
        turn.set(savers={other: node for other, node in cluster.savers.items() if other != rank})


def _ask_to_persist(turn: Turn) -> None:
    """Have the ranks' snapshots written that are not yet, by their owners where these can.

    One may have overwritten its own, when it did not hear in time that it was safe; and one may be unable to write.
    """
    cluster = turn.cluster
    turn.set(asked=turn.now)
    for rank in cluster.ranks:
        where = _writer(cluster, rank)
        if where is not None and rank not in cluster.files:
            copy = cluster.copies[rank, cluster.persisting][where]
            turn.order(Persist(where, rank, cluster.persisting, copy.area, copy.half, copy.nbytes, copy.checksum))


def _writer(cluster: Cluster, rank: int) -> str | None:
    """Return who writes a rank's snapshot while training goes on; None: nobody has it."""
    places, owner = cluster.copies.get((rank, cluster.persisting), {}), cluster.ranks[rank]
    return min(places, key=lambda place: (cluster.members[place].failed_writes, place != owner, place), default=None)


def _publish_again(turn: Turn) -> None:
    """All files are written: see that they are published, by another node where the first one does not answer."""
    publisher = turn.cluster.members.get(turn.cluster.publisher)
    waited = turn.now - turn.cluster.asked > AGAIN_S
    others = [member for member in turn.alive if member.node != turn.cluster.publisher] or turn.alive
    another = min(others, key=lambda member: (bool(member.evidence), member.failed_writes))
    if waited or ((publisher is None or not publisher.alive) and not another.failed_writes):
        turn.publish(another.node)
