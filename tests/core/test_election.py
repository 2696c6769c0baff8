"""Elections among simulated agents: a few nodes, one clock each, and a test that decides which messages arrive.

The few-node cases as they are decided: silence alone never shrinks the majority, the cluster's word does.
"""

from collections.abc import Iterable
from itertools import combinations

import pytest

from gemini_hpc.core import election
from gemini_hpc.core.election import Election, new_election
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

BEAT_S, LEASE_S = 0.1, 1.2
STEP_S = 0.05


class Agents:
    """Elections, and the messages between them: delivered at once, unless the line is cut or the test keeps them."""

    def __init__(self, size: int, returned: Iterable[str] = ()) -> None:
        self.now = 0.0
        self.names = tuple(f"n{i}" for i in range(size))
        self.of = {n: self._new(n, n not in returned) for n in self.names}
        self.up = set(self.names)
        self.cut: set[tuple[str, str]] = set()
        self.kept: list[tuple[str, str, Event | Command]] = []
        self.keep: tuple[type, ...] = ()

    def _new(self, name: str, voter: bool) -> Election:
        return new_election(name, self.names, BEAT_S, LEASE_S, self.clock(name), voter)

    def clock(self, name: str) -> float:
        return self.now + 100.0 * self.names.index(name)

    def give(self, name: str, sender: str, message: Event | Command) -> None:
        if name not in self.up:
            return
        self.of[name], said = election.step(self.of[name], self.clock(name), message)
        for answer in said:
            to = answer.node if isinstance(answer, Command) else sender
            if isinstance(answer, self.keep):
                self.kept.append((to, name, answer))
            elif to and (name, to) not in self.cut:
                self.give(to, name, answer)
        assert len(self.acting()) <= 1, f"{self.acting()} may act at {self.now:.2f}"

    def release(self) -> None:
        kept, self.kept, self.keep = self.kept, [], ()
        for message in kept:
            self.give(*message)

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        while self.now < end - 1e-9:
            self.now += STEP_S
            for name in self.names:
                self.give(name, name, Tick(""))

    def acting(self) -> list[str]:
        return [n for n in sorted(self.up) if self.of[n].may_act(self.clock(n))]

    def split(self, camp: Iterable[str]) -> None:
        others = set(self.names) - set(camp)
        self.cut |= {line for a in camp for b in others for line in ((a, b), (b, a))}

    def heal(self) -> None:
        self.cut = set()

    def die(self, *names: str, seen_by: Iterable[str] | None = None) -> None:
        """They are gone; `seen_by`: to whom the cluster says so (to everybody, if not given)."""
        self.up -= set(names)
        for name in names:
            for other in self.up if seen_by is None else seen_by:
                self.give(other, "", NodeExited(name, "its agent is gone"))


def test_the_first_node_leads_at_once_and_all_others_follow_it() -> None:
    agents = Agents(5)
    agents.run(2 * STEP_S)
    assert agents.acting() == ["n0"]
    assert {state.leader for state in agents.of.values()} == {"n0"}
    agents.run(60.0)
    assert agents.acting() == ["n0"]
    assert agents.of["n4"].term == 1


def test_while_a_leader_lives_nobody_else_gets_a_vote() -> None:
    agents = Agents(3)
    agents.run(1.0)
    agents.give("n1", "n2", RequestVote("n1", "n2", 3))
    assert agents.of["n1"].leader == "n0"
    assert agents.of["n2"].votes == frozenset()


def test_a_silent_leader_is_replaced_after_the_lease_and_by_the_first_that_is_left() -> None:
    agents = Agents(4)
    agents.run(1.0)
    agents.die("n0", seen_by=())
    agents.run(LEASE_S - 2 * BEAT_S)
    assert agents.acting() == []
    agents.run(4 * BEAT_S)
    assert agents.acting() == ["n1"]


def test_a_leader_of_which_the_cluster_says_that_it_is_gone_is_replaced_at_once() -> None:
    agents = Agents(4)
    agents.run(1.0)
    agents.die("n0")
    agents.run(2 * STEP_S)
    assert agents.acting() == ["n1"]


def test_two_candidates_at_once_do_not_block_each_other_for_long() -> None:
    agents = Agents(4)
    agents.run(1.0)
    agents.cut = {(a, b) for a in agents.names for b in agents.names if a != b}
    agents.run(2 * LEASE_S)  # by now everybody else stands
    assert sum(state.ballot > 0 for state in agents.of.values()) == 3
    agents.heal()
    agents.run(2 * LEASE_S)
    assert len(agents.acting()) == 1


def test_a_candidate_that_hears_nobody_does_not_keep_the_others_from_electing_one() -> None:
    """Its question is heard by all, and their votes are lost: again and again."""
    agents = Agents(5)
    agents.run(1.0)
    agents.cut = {(other, "n1") for other in agents.names}
    agents.die("n0")
    agents.run(4 * LEASE_S)
    assert agents.acting() == ["n2"]


def test_terms_are_a_nodes_own() -> None:
    seen: set[int] = set()
    for name in ("n0", "n1", "n2"):
        state = new_election(name, ("n0", "n1", "n2"), BEAT_S, LEASE_S, 0.0, True)
        for _ in range(5):
            state = election._stand(state, 0.0)[0]
            assert state.ballot not in seen
            seen.add(state.ballot)
    assert seen == set(range(1, 16))


# --- one at a time --------------------------------------------------------------------------------------


def test_a_leader_that_was_stopped_may_not_act_when_it_goes_on() -> None:
    agents = Agents(3)
    agents.run(1.0)
    agents.up.discard("n0")
    agents.run(3 * LEASE_S)
    assert agents.acting() == ["n1"]
    agents.up.add("n0")
    assert agents.of["n0"].leads  # it believes so
    assert not agents.of["n0"].may_act(agents.clock("n0"))
    agents.run(2 * BEAT_S)
    assert agents.of["n0"].leader == "n1"


def test_a_leader_in_the_minority_stops_before_the_majority_has_another() -> None:
    agents = Agents(5)
    agents.run(1.0)
    agents.split(["n0", "n1"])
    agents.run(LEASE_S - 2 * STEP_S)
    assert agents.acting() in (["n0"], [])
    agents.run(4 * BEAT_S)
    assert agents.acting() == ["n2"]
    agents.heal()
    agents.run(2 * BEAT_S)
    assert agents.acting() == ["n2"]
    assert agents.of["n0"].leader == agents.of["n1"].leader == "n2"


def test_a_majority_lost_and_regained_before_anybody_stands_changes_nothing() -> None:
    agents = Agents(3)
    agents.run(1.0)
    agents.split(["n0"])
    agents.run(LEASE_S / 2)
    agents.heal()
    agents.run(3.0)
    assert (agents.acting(), agents.of["n0"].term) == (["n0"], 1)


def test_whoever_was_cut_off_disturbs_nobody_when_it_is_back_even_with_a_friend() -> None:
    """n3 and n4 voted for each other, in vain; n0 has its majority all the time."""
    agents = Agents(5)
    agents.run(1.0)
    agents.split(["n3", "n4"])
    agents.run(5 * LEASE_S)
    assert agents.acting() == ["n0"]
    agents.heal()
    for _ in range(100):
        agents.run(STEP_S)
        assert agents.acting() == ["n0"]
    assert agents.of["n4"].term == 1


def test_a_follower_answers_no_new_leader_while_the_old_ones_lease_runs() -> None:
    """n1 wins by a vote that was long on its way. n2, which gave it, follows n0 again: it cannot stand behind both."""
    agents = Agents(3)
    agents.run(1.0)
    agents.split(["n0"])
    agents.keep = (Vote,)
    agents.run(LEASE_S + 2 * BEAT_S)
    assert ("n1", "n2", Vote("n2", 2, True)) in agents.kept
    agents.cut = {("n0", "n1"), ("n1", "n0")}
    agents.run(BEAT_S + STEP_S)
    assert agents.acting() == ["n0"]
    agents.release()  # the assertion is in `give`: never two
    assert agents.of["n1"].leads
    assert agents.acting() == ["n0"]
    agents.run(2 * LEASE_S)
    assert agents.acting() == ["n1"]


def led_by_those_who_die() -> Agents:
    """n0 leads by the answers of n3 and n4, cut off from n1 and n2; these hear that n3 and n4 have died."""
    agents = Agents(5)
    agents.run(1.0)
    agents.split(["n0", "n3", "n4"])
    agents.run(2 * LEASE_S)
    assert agents.acting() == ["n0"]
    agents.die("n3", "n4", seen_by=["n1", "n2"])
    return agents


def test_a_dead_node_counts_until_the_lease_that_it_gave_has_run_out() -> None:
    """n0 lives on the answers of n3 and n4 when they die; n1 and n2, cut off from it, must not be a majority yet."""
    agents = led_by_those_who_die()
    for _ in range(60):  # the assertion is in `give`: never two
        agents.run(STEP_S)
    assert agents.acting() in (["n1"], ["n2"])


def test_a_leader_does_not_come_back_to_life_by_the_deaths_of_the_others() -> None:
    """n2 leads with n3 and n4, which die: n0 and n1, the old minority, are the new majority, but not yet."""
    agents = Agents(5)
    agents.run(1.0)
    agents.split(["n0", "n1"])
    agents.run(2 * LEASE_S)
    assert agents.acting() == ["n2"]
    agents.die("n3", "n4", seen_by=["n0", "n1"])
    agents.run(3 * LEASE_S)
    assert agents.acting() == ["n0"]


def test_a_late_leader_of_an_old_term_is_told_so() -> None:
    agents = Agents(3)
    agents.run(1.0)
    agents.split(["n0"])
    agents.run(2 * LEASE_S)
    told = election.step(agents.of["n2"], agents.clock("n2"), Lead("n2", "n0", 1, 0.0, True))[1]
    assert told == [Deposed("n2", 2)]
    agents.heal()
    agents.give("n0", "n2", told[0])
    assert agents.of["n0"].leader in ("", "n1")


def test_an_old_word_to_a_leader_changes_nothing() -> None:
    agents = Agents(3)
    agents.run(1.0)
    before = agents.of["n0"]
    for late in (Deposed("n1", 1), Vote("n1", 1, True), Vote("n1", 0, False), Heartbeat("n1", -5.0)):
        agents.give("n0", "n1", late)
    assert agents.of["n0"] == before


# --- a few nodes ----------------------------------------------------------------------------------------


def test_one_node_leads_alone() -> None:
    agents = Agents(1)
    agents.run(1.0)
    assert agents.acting() == ["n0"]


@pytest.mark.parametrize(("lost", "left"), [("n0", "n1"), ("n1", "n0")])
def test_of_two_nodes_one_goes_on_when_the_cluster_says_the_other_is_gone(lost: str, left: str) -> None:
    agents = Agents(2)
    agents.run(1.0)
    agents.die(lost)
    agents.run(3 * STEP_S)  # at once: there is nobody else who could lead
    assert agents.acting() == [left]


@pytest.mark.parametrize(("lost", "left"), [("n0", "n1"), ("n1", "n0")])
def test_of_two_nodes_none_goes_on_when_the_other_is_only_silent(lost: str, left: str) -> None:
    agents = Agents(2)
    agents.run(1.0)
    agents.die(lost, seen_by=())
    agents.run(LEASE_S + BEAT_S)
    for _ in range(100):
        agents.run(STEP_S)
        assert agents.acting() == []
    agents.give(left, "", NodeExited(lost, "its agent is gone"))
    agents.run(4 * BEAT_S)
    assert agents.acting() == [left]


@pytest.mark.parametrize("lost", list(combinations(["n0", "n1", "n2"], 2)))
def test_the_last_voter_of_three_goes_on_by_the_clusters_word(lost: tuple[str, str]) -> None:
    agents = Agents(3)
    agents.run(1.0)
    agents.die(*lost)
    agents.run(4 * BEAT_S)
    assert agents.acting() == sorted({"n0", "n1", "n2"} - set(lost))


@pytest.mark.parametrize("lost", ["n0", "n1", "n2"])
def test_of_three_nodes_one_may_be_silent(lost: str) -> None:
    agents = Agents(3)
    agents.run(1.0)
    agents.die(lost, seen_by=())
    agents.run(2 * LEASE_S)
    assert agents.acting() == ["n1" if lost == "n0" else "n0"]


def test_halves_of_four_both_stop() -> None:
    agents = Agents(4)
    agents.run(1.0)
    agents.split(["n0", "n1"])
    agents.run(LEASE_S + BEAT_S)
    for _ in range(100):
        agents.run(STEP_S)
        assert agents.acting() == []
    agents.die("n2")  # the first that gives up decides for the others: two of three
    agents.run(2 * LEASE_S)
    assert agents.acting() == ["n0"]


# --- nodes that come back -------------------------------------------------------------------------------


def test_a_node_that_came_back_neither_votes_nor_stands() -> None:
    agents = Agents(3, returned=["n2"])
    agents.run(1.0)
    agents.die("n0", seen_by=())
    agents.run(5 * LEASE_S)  # n1 does not know that n2's first life is gone: one of three is no majority
    assert agents.acting() == []
    assert agents.of["n2"].ballot == 0
    agents.give("n1", "", NodeExited("n0", "its agent is gone"))
    agents.give("n1", "", NodeExited("n2", "its agent is gone"))
    agents.run(2 * LEASE_S)
    assert agents.acting() == ["n1"]
    assert agents.of["n2"].leader == "n1"


def test_the_answer_of_a_node_that_came_back_makes_no_majority() -> None:
    agents = Agents(3)
    agents.run(1.0)
    for name in ("n0", "n1"):
        agents.give(name, "", NodeExited("n2", "its agent is gone"))
    agents.of["n2"] = new_election("n2", agents.names, BEAT_S, LEASE_S, agents.clock("n2"), voter=False)
    agents.run(2 * LEASE_S)
    agents.die("n1", seen_by=())
    agents.run(LEASE_S + 2 * BEAT_S)
    assert agents.acting() == []


def test_the_answers_of_nodes_that_came_back_do_not_prolong_a_lease() -> None:
    """n0 hears late that n3 and n4 are dead, and from them in their next lives at once."""
    agents = led_by_those_who_die()
    agents.run(LEASE_S / 2)
    for name in ("n3", "n4"):
        agents.give("n0", "", NodeExited(name, "its agent is gone"))
        agents.of[name] = agents._new(name, voter=False)
        agents.up.add(name)
    agents.run(3 * LEASE_S)  # the assertion is in `give`: never two
    assert agents.acting() in (["n1"], ["n2"])


def test_the_cluster_names_other_voters_once_none_of_the_former_is_left() -> None:
    agents = Agents(3, returned=["n1", "n2"])
    agents.run(1.0)
    agents.die("n0")
    agents.run(5 * LEASE_S)
    assert agents.acting() == []
    for name in ("n1", "n2"):
        agents.give(name, "", Voters("", ("n1", "n2"), 1, 7))
    agents.run(2 * BEAT_S)
    assert agents.acting() == ["n1"]
    assert agents.of["n1"].term == agents.of["n2"].term == 8, "the first of its own after all that the cluster knows"
    for late in (NodeExited("n1", "of its life before"), Voters("", ("n2",), 1, 1)):
        agents.give("n2", "", late)
    agents.run(5 * LEASE_S)
    assert agents.acting() == ["n1"] and agents.of["n2"].dead == {}
    agents.die("n1", seen_by=())
    agents.give("n2", "", NodeExited("n1", "its agent is gone", 1))
    agents.run(2 * BEAT_S)
    assert agents.acting() == ["n2"]


def test_whoever_is_not_named_does_not_vote() -> None:
    agents = Agents(3, returned=["n1", "n2"])
    agents.die("n0")
    agents.give("n1", "", Voters("", ("n1",), 1, 0))
    agents.give("n2", "", Voters("", ("n1",), 1, 0))
    agents.run(2 * BEAT_S)
    assert agents.acting() == ["n1"] and agents.of["n2"].voters == ()


def test_the_dead_without_a_vote_do_not_shorten_the_lease_of_those_who_had_one() -> None:
    """Two of seven have none, and die. A leader is cut off with two friends, who die when its lease is about to end."""
    names = ("n0", "n1", "n2", "n3", "n4")
    agents = Agents(7, returned=[f"n{i}" for i in range(7)])

    def die(lost: tuple[str, str], seen_by: tuple[str, ...]) -> None:
        agents.die(*lost, seen_by=())
        for name in seen_by:
            for one in lost:
                agents.give(name, "", NodeExited(one, "its agent is gone", 1))

    for name in names:
        agents.give(name, "", Voters("", names, 1, 0))
    die(("n5", "n6"), names)
    agents.run(2 * BEAT_S)
    assert agents.acting() == ["n0"]
    agents.split(["n0", "n1", "n2"])
    agents.run(LEASE_S - STEP_S)
    die(("n1", "n2"), ("n3", "n4"))
    agents.run(3 * LEASE_S)  # two act at once where the dead count who never voted
    assert len(agents.acting()) == 1
