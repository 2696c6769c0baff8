"""The MPI world of the window hosts: when another one is started, who is in it, and who keeps it from starting."""

from gemini_hpc.core import recovery
from gemini_hpc.core.messages import StartWorld
from gemini_hpc.core.state import Member, Phase, World
from gemini_hpc.core.turn import Turn
from gemini_hpc.core.types import changed

REST_S = 30.0
"""The longest pause between two attempts to start a world, and before the first other chance of who was left out."""

TRIES = 3
"""So many attempts with all nodes; from then on some are left out."""


def keep(turn: Turn) -> None:
    """Keep one MPI world over the arenas of all living nodes on which window hosts start."""
    rules, world = turn.cluster.rules, turn.cluster.world
    if world.state == "starting" and turn.now - world.since > rules.world_s:
        turn.world_lost(world.number, f"not ready after {rules.world_s:.0f} s")
    for holder, pull in turn.cluster.pulls.items():
        if turn.now - turn.cluster.pull_since[holder] > pull.patience_s + rules.fetch_s + rules.suspect_s:
            turn.note("host_lost", target=holder, reason="it does not answer")
            turn.shun_host(holder)
    if turn.cluster.world.state == "ready":
        _judge_hosts(turn)
    world = turn.cluster.world
    hosts = [m for m in turn.alive if m.snapshot_bytes and not m.hostless]
    if world.state == "starting" or not hosts:
        return
    if world.state == "none" and any(not m.snapshot_bytes for m in turn.alive):
        return  # at the start, one world for all rather than one for each that comes
    if world.state == "ready":
        without = [m for m in hosts if m.host_world != world.number]
        if not without:
            if world.without_since >= 0:
                turn.set(world=changed(world, without_since=-1.0))
            return
        if world.without_since < 0:
            turn.set(world=changed(world, without_since=turn.now))
            return
        if turn.now - world.without_since < rules.suspect_s or _is_read_in(turn, world):
            return  # the loss of a host is often the first sign of the loss of its node
    rest_s = min(world.failures - 1.0, REST_S)  # a second more after each failure in a row
    if world.state == "lost" and turn.now - world.since < rest_s:
        return
    number = turn.cluster.worlds + 1
    left_out, tried = _left_out(world, hosts)
    nodes = tuple(m.node for m in hosts if m.node not in left_out)
    fresh = World(number, nodes, "starting", turn.now, world.failures, left_out, tried)
    turn.set(worlds=number, pulls={}, world=fresh)
    turn.order(StartWorld("", number, nodes))
    turn.note("world", number=number, state="started", reason=f"without {', '.join(left_out)}" if left_out else "")


def _is_read_in(turn: Turn, world: World) -> bool:
    """Whether a new member can fetch in this world: a recovery does not wait for another one."""
    cluster, plan = turn.cluster, turn.cluster.plan
    if cluster.phase is not Phase.GATHERING or plan is None:
        return False
    there = {member.node for member in turn.alive if member.host_world == world.number}
    takers = [(rank, node) for rank, node in cluster.ranks.items() if rank not in cluster.fetched and node in there]
    return any(there & cluster.copies.get((rank, plan.step), {}).keys() - {node} for rank, node in takers)


def _left_out(world: World, hosts: list[Member]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Choose whom to leave out of the world after this one, when too many did not start; and who has been so far."""
    for some in ([m for m in hosts if m.doubted], [m for m in hosts if m.absences >= TRIES]):
        if world.failures and 0 < len(some) < len(hosts):
            return tuple(m.node for m in some), ()
    if world.failures < TRIES or len(hosts) == 1:
        return (), ()
    others = [m for m in hosts if m.node not in world.tried]
    chosen = max(others or hosts, key=lambda m: m.blamed).node
    return (chosen,), (*(world.tried if others else ()), chosen)


def _judge_hosts(turn: Turn) -> None:
    """The world started: whoever was left out of it is to blame, if it is so twice: it may have been chance.

    One that cannot be spared gets another chance now and then, others ever more rarely.
    """
    cluster, world = turn.cluster, turn.cluster.world
    left_out = [cluster.members[node] for node in world.left_out]
    if left_out and all(m.doubted for m in left_out):
        for m in left_out:
            turn.set_member(m.node, hostless=True, doubted=False)
            turn.note("no_host", target=m.node, reason="MPI worlds start without it, and do not with it")
        turn.set(world=changed(world, left_out=()))
    elif left_out:
        for m in left_out:
            turn.set_member(m.node, doubted=True)
        turn.set(world=changed(world, state="lost", left_out=(), tried=()))
    else:
        for m in [m for m in turn.alive if m.hostless]:
            needed = m.node in cluster.ranks.values() and not recovery.has_substitute(cluster, m.node)
            if turn.now - world.since > REST_S * (1 if needed else 2 ** min(m.chances + 1, 7)):
                turn.set_member(m.node, hostless=False, doubted=True, chances=m.chances + 1)
