"""The decision maker: `step(cluster, now, event) -> (cluster, commands)`, pure and deterministic.

An event first changes what is known (`learn`), then the cluster is brought nearer to what it should be
(`reconcile`): the second part looks only at the state, never at the event, so that a lost message, an event at an
odd moment or a new coordinator need no special case.
"""

from gemini_hpc.core.learn import learn
from gemini_hpc.core.messages import Command, Event, Heartbeat
from gemini_hpc.core.reconcile import reconcile
from gemini_hpc.core.state import Cluster, Phase
from gemini_hpc.core.turn import Turn

STALL_SHARE = 0.5
"""A pause between two events that is longer than this share of the heartbeat timeout is one of our own."""


def step(cluster: Cluster, now: float, event: Event) -> tuple[Cluster, list[Command]]:
    """Take one event at time `now` (seconds, any monotonic clock); return the new state and the orders."""
    if cluster.phase is Phase.FINISHED:
        return cluster, []
    turn = Turn(cluster, now)
    pause_s = now - cluster.last_turn
    if cluster.last_turn >= 0 and pause_s > STALL_SHARE * cluster.rules.heartbeat_timeout_s:
        turn.forgive(pause_s)
    learn(turn, event)
    if not isinstance(event, Heartbeat):  # there are many; the next tick looks at what they mean
        reconcile(turn)
    return turn.cluster, turn.commands
