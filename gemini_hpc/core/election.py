"""Who coordinates: one agent at a time, elected by a majority, and only for as long as a majority answers it.

What makes "one at a time" hold is the lease. A leader may act only while a majority has answered something that it
sent less than `lease_s` ago, and an agent that answered a leader answers no other before that lease has run out. Two
leaders that may act would have a voter in common, and it would have answered both: it cannot have. However slow the
network; only the rates of the clocks matter, not what they show.

The voters are the nodes of the start. One that is only silent counts. One that the cluster says is gone (its process
has exited, Slurm says DOWN) no longer does, so that two nodes, or the last one, can go on; but it does for one more
lease, in which another leader may still live on its answer (unless nobody else is left who could lead). A node that
comes back does not vote, until the cluster says that all who did are gone: then it names those who are there.

Terms and votes keep the peace: they choose whom the others answer. The terms are dealt out to the nodes in turn, so
that no two of them ever lead in the same one. A voter that follows a living leader votes for nobody, and an agent
enters a new term only when somebody leads in it: whoever was cut off for a while disturbs nobody when it is back.
"""

from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from typing import Any

from gemini_hpc.core.messages import (
    Command,
    Deposed,
    Event,
    Heartbeat,
    Lead,
    NodeExited,
    RequestVote,
    Tick,
    Vote,
    Voters,
)
from gemini_hpc.core.types import changed

PATIENCE = 2
"""In leases: so long the first node may come later than another before that one stands for election at the start."""

STAGGER = 0.5
"""Of a beat: by so much one node stands later than the one before it, which is time enough to win."""

CLUSTER = ""
"""What orders to the cluster have for their node."""


@dataclass(frozen=True)
class Election:
    """What one agent knows of who leads. Times in seconds of its own monotonic clock."""

    node: str
    voters: tuple[str, ...]  # in order of preference; of nobody, where this node has no vote
    peers: tuple[str, ...]  # all nodes: whom a leader tells that it leads
    beat_s: float
    lease_s: float
    free_since: float  # from when on it may stand itself
    term: int = 0  # the newest in which anybody led
    leader: str = ""  # who leads in this term; "" = nobody that it knows of
    heard: float = -1.0  # when the leader last spoke
    promised: float = -1.0  # until when it answers no other leader: the one before may live on its last answer
    dead: Mapping[str, float] = field(default_factory=dict)  # the cluster says so: since when
    named: int = 0  # how often the cluster had named voters, when it named these
    ballot: int = 0  # the term for which it stands; 0 = it does not
    voted: int = 0  # the newest term for which it voted
    votes: frozenset[str] = frozenset()  # for this node, in that term
    asked: float = -1.0  # when it last sent something, as a candidate or as the leader
    echoes: Mapping[str, float] = field(default_factory=dict)  # node -> newest of our own times that it sent back
    granted_at: float = -1.0  # when it last had the answers of a majority

    @property
    def leads(self) -> bool:
        return self.leader == self.node

    def follows(self, now: float) -> bool:
        """Whether its leader, another node, lives as far as it knows."""
        alive = self.leader not in ("", self.node) and self.leader not in self.dead
        return alive and now < self.heard + self.lease_s

    def may_act(self, now: float) -> bool:
        """Whether this node leads, and a majority answered what it sent within the lease."""
        if self.leader != self.node:
            return False
        oldest = now - self.lease_s
        answered = {node for node, echo in self.echoes.items() if echo >= oldest}
        answered.add(self.node)
        return self.is_majority(answered, now)

    def is_majority(self, some: Set[str], now: float) -> bool:
        """Whether `some` are more than half of the voters that count."""
        counted = set(self.voters)
        if self.dead:
            alone = counted <= self.dead.keys() | {self.node}
            counted -= {node for node, since in self.dead.items() if alone or now >= since + self.lease_s}
        return 2 * len(counted & some) > len(counted)

    def present(self) -> list[str]:
        """The voters that may still be there."""
        return [voter for voter in self.voters if voter not in self.dead]


def new_election(node: str, nodes: tuple[str, ...], beat_s: float, lease_s: float, now: float, voter: bool) -> Election:
    """Return the state of an agent that has just started; the first of `nodes` stands at once, the others wait."""
    first = voter and node == nodes[0]
    voters = nodes if voter else ()
    return Election(node, voters, nodes, beat_s, lease_s, now if first else now + PATIENCE * lease_s)


def step(election: Election, now: float, message: Event | Command) -> tuple[Election, list[Event | Command]]:
    """Take one message, or the time (Tick). Events in the answer go to the sender, commands to their node."""
    handler = _HANDLERS.get(type(message))
    return handler(election, now, message) if handler else (election, [])


Step = tuple[Election, list[Event | Command]]


def _on_tick(election: Election, now: float, _: Tick) -> Step:
    if election.leads:
        if election.may_act(now):
            election = changed(election, granted_at=now)
        return _beat(election, now) if now - election.asked >= election.beat_s else (election, [])
    if election.follows(now):
        return election, []
    present = election.present()
    if election.node not in present:
        return election, []
    if now >= election.free_since + present.index(election.node) * election.beat_s * STAGGER:
        return _stand(election, now)
    return _count(election, now) if election.ballot and now - election.asked >= election.beat_s else (election, [])


def _stand(election: Election, now: float) -> Step:
    ballot = _next_term(election, max(election.term, election.ballot))
    # if it does not win it lets others try: it may be deaf, and those who vote for it do not stand meanwhile
    again = now + 2 * election.lease_s
    return _count(changed(election, ballot=ballot, votes=frozenset({election.node}), free_since=again), now)


def _next_term(election: Election, term: int) -> int:
    """Return the first after `term` that belongs to this node: terms 1, n + 1, ... to the first of n nodes."""
    return term + 1 + (election.peers.index(election.node) - term) % len(election.peers)


def _count(election: Election, now: float) -> Step:
    if not election.is_majority(election.votes - election.dead.keys(), now):
        return _ask(election, now)
    won: dict[str, Any] = {"term": election.ballot, "leader": election.node, "ballot": 0}
    return _beat(changed(election, **won, echoes={}, heard=now, granted_at=now), now)


def _ask(election: Election, now: float) -> Step:
    """Ask everybody who has not answered yet; again and again, for the question may be lost."""
    asked = [voter for voter in election.present() if voter not in election.votes]
    return changed(election, asked=now), [RequestVote(voter, election.node, election.ballot) for voter in asked]


def _beat(election: Election, now: float) -> Step:
    """Tell everybody, and the cluster, who leads; what comes back is the lease."""
    told = (*election.peers, CLUSTER)
    lead: list[Event | Command] = [Lead(node, election.node, election.term, now, True) for node in told]
    return changed(election, asked=now), lead


def _on_request_vote(election: Election, now: float, request: RequestVote) -> Step:
    bound = election.may_act(now) or election.follows(now)
    known = {request.candidate, election.node} <= set(election.present())
    if bound or not known or request.term <= election.term:
        return election, [Vote(election.node, election.term, False)]
    if request.term > election.voted:  # and now it does not stand against the one for whom it votes
        election = changed(election, voted=request.term, ballot=0, free_since=now + election.lease_s)
    return election, [Vote(election.node, request.term, True)]


def _on_vote(election: Election, now: float, vote: Vote) -> Step:
    if not election.ballot:
        return election, []
    if vote.granted and vote.term == election.ballot:
        return _count(changed(election, votes=election.votes | {vote.node}), now)
    return (_without_leader(election, vote.term), []) if vote.term >= election.ballot else (election, [])


def _on_lead(election: Election, now: float, lead: Lead) -> Step:
    if lead.term < election.term:
        return election, [Deposed(election.node, election.term)]
    promised = election.promised
    if lead.leader != election.leader and election.follows(now):
        promised = max(promised, election.heard + election.lease_s)
    known: dict[str, Any] = {"term": lead.term, "leader": lead.leader, "ballot": 0, "heard": now, "promised": promised}
    election = changed(election, **known, free_since=now + election.lease_s)
    return election, [Heartbeat(election.node, lead.sent)] if now >= promised else []


def _on_heartbeat(election: Election, now: float, beat: Heartbeat) -> Step:
    if beat.node in election.dead:
        return election, []  # it is back, while its former self may still count elsewhere: it has no vote
    newest = max(beat.echo, election.echoes.get(beat.node, -1.0))
    return changed(election, echoes={**election.echoes, beat.node: newest}), []


def _on_deposed(election: Election, now: float, told: Deposed) -> Step:
    return (_without_leader(election, told.term), []) if told.term > election.term else (election, [])


def _without_leader(election: Election, term: int) -> Election:
    """Somebody has led in a newer term: nobody that this node has heard of."""
    return changed(election, term=term, leader="", ballot=0)


def _on_node_exited(election: Election, now: float, event: NodeExited) -> Step:
    if event.number < election.named:
        return election, []  # of its life before
    election = changed(election, dead={event.node: now, **election.dead})
    if event.node == election.leader:
        election = changed(election, free_since=now)
    return _count(election, now) if election.ballot else (election, [])  # a majority of fewer


def _on_voters(election: Election, now: float, event: Voters) -> Step:
    """No lease is left of those who voted before."""
    if event.number <= election.named or election.node not in event.voters:
        return election, []
    known: dict[str, Any] = {"voters": event.voters, "named": event.number, "dead": {}}
    term = max(event.term, election.term)
    return changed(election, **known, term=term, leader="", free_since=now), []


_HANDLERS: dict[type[Event | Command], Any] = {
    Tick: _on_tick,
    RequestVote: _on_request_vote,
    Vote: _on_vote,
    Lead: _on_lead,
    Heartbeat: _on_heartbeat,
    Deposed: _on_deposed,
    NodeExited: _on_node_exited,
    Voters: _on_voters,
}
