"""One agent's seat at the table: takes part in elections, and coordinates while it is elected. Pure, like its parts.

Whatever an agent hears goes through here, so that a simulated agent decides by the very same code as a real one.
"""

from collections import deque

from gemini_hpc.core import coordinator, election
from gemini_hpc.core.messages import Command, Event, Lead, NodeExited, NodeUp, Note, RequestVote, Suspend, Tick
from gemini_hpc.core.state import Cluster, Rules, new_cluster
from gemini_hpc.core.types import changed

TICK = Tick("")


class Seat:
    """`hear` and `tick` return orders to carry out: for agents, for the cluster (node ""), for the event log (Note)."""

    def __init__(self, rules: Rules, node: str, beat_s: float, now: float, returned: bool = False) -> None:
        self.election = election.new_election(
            node, rules.nodes, beat_s, rules.heartbeat_timeout_s, now, voter=not returned
        )
        self.cluster: Cluster | None = None  # while this node leads
        self._rules = rules
        self._term = 0  # in which `cluster` was made
        self._started = now
        self._absent: dict[str, tuple[float, NodeExited]] = {}  # the cluster says they are gone: since when
        self._seen = {node}  # nodes that the cluster ever said were up
        self._unheard: deque[Event] = deque()  # came while this leader could not be sure of a majority

    @property
    def leader(self) -> str:
        """The node whose orders count; "" = nobody's."""
        return self.election.leader

    def forsaken(self, now: float) -> float:
        """Return for how many seconds neither a leader nor, for a leader, a majority was heard."""
        return now - (self.election.granted_at if self.election.leads else self.election.heard)

    def obey(self, now: float, order: RequestVote | Lead) -> list[Event]:
        """Take what a candidate or a leader says; return what to answer to it."""
        before = self.election
        self.election, answers = election.step(before, now, order)
        self._change_role(now, before)
        return [answer for answer in answers if isinstance(answer, Event)]

    def hear(self, now: float, event: Event) -> list[Command]:
        """Take what an agent, or the cluster, says."""
        if isinstance(event, NodeExited):
            self._absent[event.node] = (now, event)
        elif isinstance(event, NodeUp):
            self._absent.pop(event.node, None)
            self._seen.add(event.node)
        orders = self._elect(now, event)
        if self.cluster is not None and not isinstance(event, Tick):
            self._unheard.append(event)
        return orders + self._act(now)

    def tick(self, now: float) -> list[Command]:
        """Take the time."""
        orders = self._elect(now, TICK) + self._act(now)
        if self.cluster is not None and not self._unheard and self.election.may_act(now):
            self.cluster, decided = coordinator.step(self.cluster, now, TICK)
            orders += decided
        return orders

    def _elect(self, now: float, event: Event) -> list[Command]:
        before = self.election
        self.election, said = election.step(before, now, event)
        if self.election is before:
            return []  # most of what is heard says nothing of who leads
        orders = [order for order in said if isinstance(order, Command)]
        if self._change_role(now, before):
            reason = f"elected in term {self.election.term}" + (f" after {before.leader}" if before.leader else "")
            orders.append(Note("", "coordinator", {"target": self.election.node, "reason": reason}))
            if silent := self._silent(before):
                reason = f"it led, and was silent for {now - before.heard:.1f} s"
                orders.append(Note("", "suspect", {"target": silent, "evidence": "heartbeat", "reason": reason}))
        return [self._asking(order) if isinstance(order, Lead) else order for order in orders]

    def _asking(self, lead: Lead) -> Lead:
        """Say to a node that has not reported what it has that it is to do so."""
        member = self.cluster.members.get(lead.node) if self.cluster is not None else None
        return lead if member is None or member.held is not None else changed(lead, reported=False)

    def _change_role(self, now: float, before: election.Election) -> bool:
        """Begin to lead, or stop it, as the election says; whether this is the beginning."""
        heard = before.heard
        if self.election.leads and self.election.term != self._term:
            self._forget()
            self._term = self.election.term
            # who died after the last word of the leader before is this one's to deal with
            gone = [node for node, (since, _) in self._absent.items() if since < heard]
            self._unheard.extend(event for node, (_, event) in self._absent.items() if node not in gone)
            due = self._due(now, first=heard < 0)
            voters = self.election.present()
            self.cluster = new_cluster(self._rules, now, self._term, due, voters, gone, self._silent(before))
            return True
        if not self.election.leads and self.cluster is not None:
            self._forget()
        return False

    def _silent(self, before: election.Election) -> str:
        """Return the leader before this one, if it is not known to be gone; "" = there was none."""
        return before.leader if before.leader != before.node and before.leader not in self._absent else ""

    def _due(self, now: float, first: bool) -> dict[str, float]:
        """Return by when each node is to report: soon, where it is at work; at the start it may still be coming up."""
        soon, starting = now + self._rules.takeover_s, self._started + self._rules.build_s
        return {node: soon if node in self._seen and not first else max(soon, starting) for node in self._rules.nodes}

    def _forget(self) -> None:
        self.cluster = None
        self._unheard.clear()

    def _act(self, now: float) -> list[Command]:
        """Decide on what was heard, as long as a majority stands behind it."""
        orders: list[Command] = []
        if len(self._unheard) > 1 and self.election.may_act(now):
            self._unheard = _ends_last(self._unheard)
        while self.cluster is not None and self._unheard and self.election.may_act(now):
            self.cluster, decided = coordinator.step(self.cluster, now, self._unheard.popleft())
            orders += decided
        return orders


def _ends_last(heard: deque[Event]) -> deque[Event]:
    """Return what came while nothing could be decided as if no end had overtaken the words of others.

    Who was lost may have been read from before. What concerns one node stays in its order.
    """
    ended = {event.node for event in heard if isinstance(event, (NodeExited, NodeUp, Suspend))}
    return deque(sorted(heard, key=lambda event: event.node in ended))
