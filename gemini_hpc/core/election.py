"""Who coordinates: one agent at a time, elected by a majority, and only for as long as a majority answers it.

Terms and votes are those of Raft (Ongaro and Ousterhout, 2014) without its log: a coordinator has nothing to
replicate, since all that it knows can be asked from the agents again. Two rules make "one at a time" hold:

- A voter that heard its leader within `lease_s` votes for nobody else. A leader may act only while a majority has
  answered something that it sent less than `lease_s` ago. So before a new leader can be elected, the old one has
  stopped by itself, however slow the network; only the rates of the clocks matter, not what they show.
- Votes and answers carry the newest generation that the voter knows, and a leader gives no order in a generation
  before a majority knows it. So the next leader, elected by another majority, starts beyond it.

The voters are the nodes of the start. One that the cluster says is gone (its process has exited, Slurm says DOWN)
no longer counts, so that two nodes, or the last one, can go on; one that is only silent does count. A node that
comes back has forgotten its votes and gets none. A candidate takes the new term for itself only when it wins: one
that was cut off for a while disturbs nobody when it is back.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from gemini_hpc.core.messages import Command, Deposed, Event, Heartbeat, Lead, NodeExited, RequestVote, Tick, Vote


@dataclass(frozen=True)
class Election:
    """What one agent knows of who leads. Times in seconds of its own monotonic clock."""

    node: str
    voters: tuple[str, ...]  # of the start, in order of preference
    peers: tuple[str, ...]  # all nodes: whom a leader tells that it leads
    beat_s: float
    lease_s: float
    free_since: float  # from when on it may vote, and stand itself
    term: int = 0  # the newest it has heard of
    choice: str = ""  # for whom it has voted in this term
    leader: str = ""  # who leads in this term; "" = nobody that it knows of
    heard: float = -1.0  # when the leader last spoke
    generation: int = 0  # the newest that any leader opened
    dead: frozenset[str] = frozenset()  # the cluster says so
    ballot: int = 0  # the term for which it stands; 0 = it does not
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

    def may_act(self, now: float, since: float = -1.0) -> bool:
        """Whether this node leads, and a majority answered what it sent within the lease (and not before `since`)."""
        oldest = max(now - self.lease_s, since)
        living = self._living()
        answered = [voter for voter in living if voter == self.node or self.echoes.get(voter, -1.0) >= oldest]
        return self.leads and 2 * len(answered) > len(living)

    def _living(self) -> list[str]:
        return [voter for voter in self.voters if voter not in self.dead]


def new_election(node: str, nodes: tuple[str, ...], beat_s: float, lease_s: float, now: float, voter: bool) -> Election:
    """Return the state of an agent that has just started; the first of `nodes` stands at once, the others wait."""
    first = voter and node == nodes[0]
    voters = nodes if voter else ()
    return Election(node, voters, nodes, beat_s, lease_s, now if first else now + lease_s)


def step(election: Election, now: float, message: Event | Command) -> tuple[Election, list[Event | Command]]:
    """Take one message, or the time (Tick). Events in the answer go to the sender, commands to their node."""
    handler = _HANDLERS.get(type(message))
    return handler(election, now, message) if handler else (election, [])


Step = tuple[Election, list[Event | Command]]


def _on_tick(election: Election, now: float, _: Tick) -> Step:
    if election.may_act(now):
        election = replace(election, granted_at=now)
    if election.leads:
        return _beat(election, now) if now - election.asked >= election.beat_s else (election, [])
    living = election._living()
    if election.node not in living or election.follows(now):
        return election, []
    if now >= election.free_since + living.index(election.node) * election.beat_s:
        return _stand(election, now)
    return _ask(election, now) if election.ballot and now - election.asked >= election.beat_s else (election, [])


def _stand(election: Election, now: float) -> Step:
    ballot = max(election.term, election.ballot) + 1
    # if nobody wins, the next to try is the first of the living
    election = replace(election, ballot=ballot, votes=frozenset({election.node}), free_since=now + election.lease_s)
    return _count(election, now)


def _ask(election: Election, now: float) -> Step:
    """Ask everybody who has not answered yet; again and again, for the question may be lost."""
    asked = [voter for voter in election._living() if voter not in election.votes]
    return replace(election, asked=now), [RequestVote(voter, election.node, election.ballot) for voter in asked]


def _count(election: Election, now: float) -> Step:
    if 2 * len(election.votes - election.dead) <= len(election._living()):
        return _ask(election, now)
    won: dict[str, Any] = {"term": election.ballot, "choice": election.node, "leader": election.node, "ballot": 0}
    return _beat(replace(election, **won, echoes={}, heard=now, granted_at=now), now)


def _beat(election: Election, now: float) -> Step:
    """Tell everybody who leads; what comes back is the lease."""
    lead: list[Event | Command] = [
        Lead(node, election.node, election.term, election.generation, now) for node in election.peers
    ]
    return replace(election, asked=now), lead


def open_generation(election: Election, now: float, generation: int) -> Step:
    """A leader's own: have a majority know of `generation` before any order is given in it."""
    return _beat(replace(election, generation=generation), now)


def _on_request_vote(election: Election, now: float, request: RequestVote) -> Step:
    living = election._living()
    bound = election.may_act(now) if election.leads else election.follows(now)
    taken = request.term == election.term and election.choice != request.candidate
    granted = {request.candidate, election.node} <= set(living) and not bound and not taken
    if granted and request.term >= election.term:
        known: dict[str, Any] = {"term": request.term, "choice": request.candidate, "leader": "", "ballot": 0}
        election = replace(election, **known, free_since=now + election.lease_s)
        return election, [Vote(election.node, election.term, True, election.generation)]
    return election, [Vote(election.node, election.term, False, election.generation)]


def _on_vote(election: Election, now: float, vote: Vote) -> Step:
    if not election.ballot:
        return election, []
    if vote.granted and vote.term == election.ballot:
        generation = max(vote.generation, election.generation)
        return _count(replace(election, votes=election.votes | {vote.node}, generation=generation), now)
    return (_follow(election, vote.term), []) if vote.term >= election.ballot else (election, [])


def _on_lead(election: Election, now: float, lead: Lead) -> Step:
    if lead.term < election.term or (lead.term == election.term and election.leader not in ("", lead.leader)):
        return election, [Deposed(election.node, election.term)]
    known: dict[str, Any] = {"term": lead.term, "choice": lead.leader, "leader": lead.leader, "ballot": 0}
    generation = max(lead.generation, election.generation)
    election = replace(election, **known, heard=now, generation=generation, free_since=now + election.lease_s)
    return election, [Heartbeat(election.node, lead.sent)]


def _on_heartbeat(election: Election, now: float, beat: Heartbeat) -> Step:
    newest = max(beat.echo, election.echoes.get(beat.node, -1.0))
    return replace(election, echoes={**election.echoes, beat.node: newest}), []


def _on_deposed(election: Election, now: float, told: Deposed) -> Step:
    return (_follow(election, told.term), []) if told.term > election.term else (election, [])


def _follow(election: Election, term: int) -> Election:
    """Somebody knows of a newer term: nobody leads in it that this node has heard of."""
    return replace(election, term=term, choice="", leader="", ballot=0)


def _on_node_exited(election: Election, now: float, event: NodeExited) -> Step:
    election = replace(election, dead=election.dead | {event.node})
    if event.node == election.leader:
        election = replace(election, free_since=now)
    return _count(election, now) if election.ballot else (election, [])  # a majority of fewer


_HANDLERS: dict[type[Event | Command], Any] = {
    Tick: _on_tick,
    RequestVote: _on_request_vote,
    Vote: _on_vote,
    Lead: _on_lead,
    Heartbeat: _on_heartbeat,
    Deposed: _on_deposed,
    NodeExited: _on_node_exited,
}
