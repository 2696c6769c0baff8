"""One agent's seat, and a few of them at one table: who decides, on what, and with which numbers."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import pytest

from gemini_hpc.core import messages as m
from gemini_hpc.core.seat import Seat
from gemini_hpc.core.state import NUMBERS_OF_A_TERM
from tests.scenarios.simulation import rules

BEAT_S = 0.1
LEASE_S = 1.2


class Table:
    """Seats whose elections reach one another at once; what they decide for agents is only collected."""

    def __init__(self, size: int, **changes: Any) -> None:
        self.now = 0.0
        self.rules = rules(size, **{"world_size": min(size, 2), **changes})
        self.seats = {name: Seat(self.rules, name, BEAT_S, 0.0) for name in self.rules.nodes}
        self.away: set[str] = set()
        self.orders: list[m.Command] = []

    def carry_out(self, sender: str, orders: list[m.Command]) -> None:
        for order in orders:
            if not isinstance(order, (m.RequestVote, m.Lead)):
                self.orders.append(order)
            elif order.node and not {sender, order.node} & self.away:
                for answer in self.seats[order.node].obey(self.now, order):
                    self.hear(sender, answer)

    def hear(self, name: str, event: m.Event) -> None:
        self.carry_out(name, self.seats[name].hear(self.now, event))

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        while self.now < end:
            self.now = round(self.now + 0.05, 6)
            for name, seat in self.seats.items():
                if name not in self.away:
                    self.carry_out(name, seat.tick(self.now))

    def lead(self) -> Seat:
        self.run(0.1)
        return self.seats["n0"]

    def report(self, to: str, *nodes: str, **changes: Any) -> None:
        for node in nodes:
            self.hear(to, inventory(node, **{"term": self.seats[to].election.term} | changes))
        self.survey(to)

    def survey(self, to: str, step: int = -1, files: Mapping[str, Any] = MappingProxyType({})) -> None:
        cluster = self.seats[to].cluster
        assert cluster is not None
        self.hear(to, m.Surveyed("", cluster.survey, step, files))


def inventory(node: str, **changes: Any) -> m.Inventory:
    idle = {
        "term": 1,
        "worker": "idle",
        "reason": "",
        "generation": 0,
        "rank": -1,
        "built_rank": 0,
        "store": f"{node}:1",
    }
    arena = {"snapshot_bytes": 9, "world": 0, "members": (), "host": False, "safe_step": -1, "held": ()}
    return m.Inventory(node, **(idle | arena | changes))


def kinds(orders: list[m.Command]) -> list[str]:
    return [type(order).__name__ for order in orders if not isinstance(order, m.Note)]


def test_the_first_seat_leads_and_only_it_knows_a_cluster() -> None:
    table = Table(3)
    table.lead()
    assert [name for name, seat in table.seats.items() if seat.cluster is not None] == ["n0"]
    assert [seat.leader for seat in table.seats.values()] == ["n0"] * 3


def test_nothing_is_planned_before_all_who_live_have_reported_and_the_checkpoints_are_known() -> None:
    table = Table(3)
    seat = table.lead()
    for event in (inventory("n0"), inventory("n1"), m.Surveyed("", 0, -1, {})):
        table.hear("n0", event)
        assert seat.cluster is not None
        assert seat.cluster.plan is None
    table.hear("n0", inventory("n2"))
    assert seat.cluster.plan is not None
    assert seat.cluster.generation == 1


def test_generations_and_worlds_are_numbered_by_the_term() -> None:
    table = Table(3)
    table.lead()
    table.report("n0", "n0", "n1", "n2")
    table.away.add("n0")
    table.run(2 * LEASE_S)
    seat = table.seats["n1"]
    assert seat.cluster is not None
    table.orders.clear()
    table.report("n1", "n1", "n2")
    table.run(3.0)  # n0 does not report
    assert seat.cluster.generation == NUMBERS_OF_A_TERM + 1
    assert next(o.world for o in table.orders if isinstance(o, m.StartWorld)) == NUMBERS_OF_A_TERM + 1


def test_what_comes_while_there_is_no_majority_is_decided_when_there_is_one_again() -> None:
    table = Table(3)
    seat = table.lead()
    table.report("n0", "n0", "n1", "n2")
    table.away |= {"n1", "n2"}
    for _ in range(26):
        table.now = round(table.now + 0.05, 6)
        table.carry_out("n0", seat.tick(table.now))
    before, table.orders = seat.cluster, []
    table.hear("n0", m.WorkerLost("n1", "killed", False))
    table.carry_out("n0", seat.tick(table.now))
    assert table.orders == []
    assert seat.cluster is before
    table.away.clear()
    table.now += 0.1
    table.carry_out("n0", seat.tick(table.now))  # asks
    table.carry_out("n0", seat.tick(table.now))
    assert any(isinstance(order, m.RestartWorker) and order.node == "n1" for order in table.orders)


@pytest.mark.parametrize(("end", "order"), [(m.NodeExited("n2", "gone"), "Retire"), (m.Suspend("", "told"), "Finish")])
def test_of_what_came_while_there_was_no_majority_the_end_of_something_counts_last(end: m.Event, order: str) -> None:
    """It was heard first, but the other lines were cut as well: it may have overtaken what they brought."""
    table = Table(3)
    seat = table.lead()
    table.report("n0", "n0", "n1", "n2")
    table.away |= {"n1", "n2"}
    table.now += 2 * LEASE_S
    table.orders = []
    table.hear("n0", end)
    table.hear("n0", m.WorkerLost("n1", "killed", False))
    assert table.orders == []
    table.away.clear()
    table.carry_out("n0", seat.tick(table.now))  # asks
    table.carry_out("n0", seat.tick(table.now))
    decided = kinds(table.orders)
    assert decided.index("RestartWorker") < decided.index(order)


def test_a_deposed_leader_forgets_what_it_knew() -> None:
    table = Table(3)
    seat = table.lead()
    table.report("n0", "n0", "n1", "n2")
    table.away.add("n0")
    table.run(2 * LEASE_S)
    assert seat.cluster is not None  # it was stopped, and does not know
    table.away.clear()
    table.run(0.2)
    assert seat.cluster is None
    assert seat.leader == "n1"
    table.orders.clear()
    table.hear("n0", m.WorkerLost("n1", "killed", False))
    assert table.orders == []


def test_who_died_before_the_last_word_of_the_old_leader_is_not_mourned_again() -> None:
    table = Table(5)
    table.lead()
    for name in ("n0", "n1", "n2", "n3"):
        table.hear(name, m.NodeExited("n4", "its agent is gone"))
    table.run(1.0)  # n0 has dealt with that
    table.away |= {"n0", "n3", "n4"}
    for name in ("n1", "n2"):
        table.hear(name, m.NodeExited("n3", "its agent is gone"))
        table.hear(name, m.NodeExited("n0", "its agent is gone"))
    table.orders.clear()
    table.run(2 * LEASE_S)
    notes = [o.details["target"] for o in table.orders if isinstance(o, m.Note) and o.event == "evict"]
    assert sorted(notes) == ["n0", "n3"]
    cluster = table.seats["n1"].cluster
    assert cluster is not None
    assert [node for node, member in cluster.members.items() if not member.alive] == ["n0", "n3", "n4"]


def test_at_the_start_nodes_may_be_long_in_coming_but_not_at_a_takeover() -> None:
    table = Table(4)
    seat = table.lead()
    assert seat.cluster is not None
    assert {member.due for member in seat.cluster.members.values()} == {table.rules.build_s}
    for name in table.seats:
        for up in ("n0", "n1", "n2"):
            table.hear(name, m.NodeUp(up, "somewhere"))
    table.away.add("n0")
    table.run(2 * LEASE_S)
    cluster = table.seats["n1"].cluster
    assert cluster is not None
    assert cluster.members["n2"].due < table.now + table.rules.takeover_s < table.rules.build_s
    assert cluster.members["n3"].due == table.rules.build_s  # nobody ever saw it


def test_what_a_busy_worker_holds_is_taken_over_and_it_is_told_to_leave_its_group() -> None:
    table = Table(3)
    table.lead()
    table.away.add("n0")
    table.run(2 * LEASE_S)
    table.orders.clear()
    held = tuple((0, 0, rank, 7, 1, 9, 100 + rank) for rank in (0, 1))
    table.hear("n1", inventory("n1", term=2, worker="busy", generation=1, rank=0, held=(held[0],)))
    table.hear("n1", inventory("n2", term=2, worker="busy", generation=1, rank=1, held=(held[1],)))
    table.survey("n1", 4, {"0": ["a", 1, 1], "1": ["b", 1, 1]})
    assert kinds(table.orders)[:2] == ["Abort", "Abort"]
    table.run(3.0)
    cluster = table.seats["n1"].cluster
    assert cluster is not None
    assert cluster.plan is not None
    assert (cluster.plan.step, cluster.plan.origin) == (7, 1)
    assert dict(cluster.plan.ranks) == {0: "n1", 1: "n2"}


def test_of_two_that_say_they_have_a_rank_the_newer_one_has_it() -> None:
    table = Table(3)
    table.lead()
    table.away.add("n0")
    table.run(2 * LEASE_S)
    table.hear("n1", inventory("n1", term=2, worker="busy", generation=1, rank=0))
    table.hear("n1", inventory("n2", term=2, worker="busy", generation=2, rank=0))
    table.survey("n1")
    table.run(3.0)
    cluster = table.seats["n1"].cluster
    assert cluster is not None
    assert cluster.ranks[0] == "n2"


def test_a_copy_in_the_place_of_a_replica_is_not_restored_but_fetched() -> None:
    """n2 was evicted as rank 1 and missed it; now it is the only one left to take rank 0, whose replica it holds."""
    table = Table(3)
    table.lead()
    table.away.add("n0")
    table.run(2 * LEASE_S)
    table.hear("n1", inventory("n1", term=2, worker="idle", generation=2, rank=1, held=((0, 0, 1, 7, 1, 9, 101),)))
    table.hear("n1", inventory("n2", term=2, worker="idle", generation=1, rank=1, held=((1, 0, 0, 7, 1, 9, 100),)))
    table.survey("n1")
    table.run(3.0)
    cluster = table.seats["n1"].cluster
    assert cluster is not None
    assert cluster.plan is not None
    assert {rank: (s.tier, s.node) for rank, s in cluster.plan.sources.items()} == {
        0: ("peer", "n2"),
        1: ("local", "n1"),
    }


@pytest.mark.parametrize(("answers", "step"), [(True, 10), (False, 7)])
def test_who_takes_over_asks_for_newer_checkpoints_but_does_not_wait_for_long(answers: bool, step: int) -> None:
    """All have step 7. That step 10 is on disk the one before had not told anybody yet."""
    table = Table(3)
    table.lead()
    table.away.add("n0")
    while table.seats["n1"].cluster is None:
        table.run(0.05)
    files = {rank: (f"rank-{rank:04d}.h5", 9, 100 + rank) for rank in (0, 1)}
    for rank, node in enumerate(("n1", "n2")):
        table.hear("n1", inventory(node, term=2, generation=1, rank=rank, held=((0, 0, rank, 7, 1, 9, 100 + rank),)))
    table.hear("n1", m.NodeExited("n0", "gone"))
    table.run(0.1)
    cluster = table.seats["n1"].cluster
    assert cluster is not None and cluster.plan is None
    if answers:
        table.survey("n1", 10, files)
    table.run(table.rules.suspect_s)
    cluster = table.seats["n1"].cluster
    assert cluster is not None and cluster.plan is not None and cluster.plan.step == step


@pytest.mark.parametrize("led_before", [True, False])
def test_who_hears_neither_a_leader_nor_a_majority_is_forsaken(led_before: bool) -> None:
    table = Table(3)
    table.lead()
    name = "n0" if led_before else "n2"
    table.run(5.0)
    assert table.seats[name].forsaken(table.now) < 2 * BEAT_S
    table.away |= {"n0", "n1", "n2"} - {name}
    since = table.now
    table.run(6.0)
    assert table.seats[name].forsaken(table.now) == pytest.approx(table.now - since, abs=LEASE_S + 2 * BEAT_S)


def test_a_node_that_came_back_never_leads() -> None:
    seat = Seat(rules(1, world_size=1, replicas=1), "n0", BEAT_S, 0.0, returned=True)
    for tick in range(200):
        assert seat.tick(tick / 10) == []
