"""The coordinator is lost, at every moment that could matter; and what its successor makes of what it finds."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from gemini_hpc.core import messages as m
from gemini_hpc.core.state import NUMBERS_OF_A_TERM, Phase
from tests.scenarios.simulation import CLUSTER, Content, Simulation, rules
from tests.scenarios.test_attacks import checkpoint_of
from tests.scenarios.test_recoveries import finish, started

MOMENTS: dict[str, Callable[[Simulation], bool]] = {
    "before anybody has built": lambda c: c.leader is not None,
    "when all are ready": lambda c: bool(c.ordered(m.StartWorld)),
    "forming the first group": lambda c: c.cluster.phase is Phase.JOINING,
    "training": lambda c: c.running() and c.cluster.safe_step >= 4,
    "a node is lost": lambda c: bool(c.said("evict")),
    "fetching": lambda c: bool(c.said("fetch_started")),
    "fetched": lambda c: bool(c.said("fetched")),
    "joining": lambda c: c.cluster.generation == 2 and c.cluster.phase is Phase.JOINING,
    "one has resumed": lambda c: c.cluster.generation == 2 and bool(c.cluster.resumed),
    "training again, exposed": lambda c: c.cluster.generation == 2 and c.running() and c.cluster.exposed,
    "protected again": lambda c: c.cluster.generation == 2 and not c.cluster.exposed,
    "persisting": lambda c: c.cluster.persisting > 0,
    "publishing": lambda c: bool(c.ordered(m.Publish)),
    "the last step is done": lambda c: c.cluster.done_since >= 0,
}
WITH_A_LOSS = {"a node is lost", "fetching", "fetched", "joining", "one has resumed"} | {
    "training again, exposed",
    "protected again",
}


def until(moment: str) -> Simulation:
    cluster = Simulation(rules(nodes=7, total_steps=14, persist_every=6))
    if moment in WITH_A_LOSS:
        cluster.run(lambda c: c.running() and c.cluster.safe_step >= 2)
        cluster.kill_node("n2")
    return cluster.run(MOMENTS[moment])


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("how", ["its node dies", "its node dies unseen", "it is stopped", "it is cut off"])
def test_the_coordinator_is_lost_and_the_run_goes_on(moment: str, how: str) -> None:
    cluster = until(moment)
    lost = cluster.leader
    assert lost is not None
    safe = cluster.cluster.safe_step
    if how == "it is stopped":
        cluster.pause(lost.name, 8.0)
    elif how == "it is cut off":
        cluster.cut(cluster.lines_between([lost.name], [*cluster.rules.nodes, CLUSTER]), 8.0)
    else:
        cluster.kill_node(lost.name, seen=how == "its node dies")
    cluster.run(Simulation.over)
    assert cluster.outcome == "finished"
    assert max(cluster.manifests) == 14
    after = [plan for plan in cluster.said("plan") if plan["generation"] > NUMBERS_OF_A_TERM]
    assert all(plan["step"] >= safe for plan in after)
    assert after or "last step" in moment or how == "it is stopped"


@pytest.mark.parametrize("second", ["before it is elected", "while it asks", "when it has planned"])
def test_the_successor_is_lost_too(second: str) -> None:
    cluster = started(nodes=7)
    cluster.kill_node("n0")
    if second == "before it is elected":
        cluster.kill_node("n1")
    elif second == "while it asks":
        cluster.run(lambda c: c.leader is not None and c.leader.name == "n1")
        cluster.kill_node("n1")
    else:
        cluster.run(lambda c: c.cluster.generation > NUMBERS_OF_A_TERM)
        cluster.kill_node("n1")
    finish(cluster)  # the group of n0 and n1 is lost, so from the newest checkpoint or afresh; but it goes on
    assert cluster.cluster.generation > 2 * NUMBERS_OF_A_TERM


def test_while_the_last_state_is_saved_the_coordinator_is_lost_and_it_is_saved_all_the_same() -> None:
    cluster = started(nodes=5)
    cluster.persist_s = 0.5
    cluster.kill_node("n4")
    cluster.kill_node("n3")
    cluster.run(lambda c: c.cluster.phase is Phase.SAVING)
    safe = cluster.cluster.safe_step
    cluster.run_for(0.2)
    cluster.kill_node("n0")
    cluster.run(Simulation.over)
    assert cluster.outcome == "suspended"
    assert max(cluster.manifests) >= safe


def test_a_deposed_coordinator_changes_nothing_any_more() -> None:
    cluster = started(total_steps=200)
    old = cluster.nodes["n0"]
    cluster.pause("n0", 3.0)
    cluster.run(lambda c: c.leader is not None and c.leader.name == "n1")
    cluster.run(lambda c: not old.paused)
    before = len(cluster.orders)
    for event in (m.NodeExited("n3", "it says"), m.WorkerLost("n2", "it says", False), m.Tick("")):
        old.decide(event)
    assert cluster.orders[before:] == []
    cluster.run(lambda c: old.seat.leader == "n1")
    assert old.seat.cluster is None


def test_the_orders_of_a_deposed_coordinator_are_not_obeyed() -> None:
    cluster = started(total_steps=200)
    cluster.pause("n0", 3.0)
    cluster.run(lambda c: c.cluster.generation > NUMBERS_OF_A_TERM and c.running())
    node = cluster.nodes["n1"]
    for order in (m.Join("n1", 9 * NUMBERS_OF_A_TERM, 1, 0, 0, "x"), m.Retire("n1", 2), m.Finish("n1", "failed", "x")):
        node.arrive(node.life, "n0", 0, order)
    assert node.up
    assert node.account.generation == cluster.cluster.generation


def test_numbers_of_generations_and_worlds_are_never_used_by_two() -> None:
    cluster = started(nodes=7)
    cluster.crash_host("n3")
    cluster.run(lambda c: c.cluster.world.state == "starting")
    first = cluster.cluster.world.number
    cluster.kill_node("n0")  # n1 has never heard of the world that is starting
    finish(cluster)
    numbers = [order.world for order in cluster.ordered(m.StartWorld)]
    assert len(numbers) == len(set(numbers))
    assert first in numbers
    assert max(numbers) > NUMBERS_OF_A_TERM


def test_snapshots_of_two_coordinators_are_never_mixed() -> None:
    """n0 trains on after its rank was given away: what it then holds is of its own generation."""
    cluster = started(total_steps=60, persist_every=100)
    cluster.cut(cluster.lines_between(["n0", "n1"], ["n2", "n3", "n4"]), 3.0)
    finish(cluster, 60)  # the invariant is checked at every restore


def test_a_checkpoint_that_the_predecessor_had_ordered_is_found_though_the_survey_came_before() -> None:
    cluster = started()
    cluster.obeyed = lambda order: not isinstance(order, m.Publish)
    cluster.run(lambda c: bool(c.ordered(m.Publish)))
    (order,) = cluster.ordered(m.Publish)
    cluster.kill_node("n0")
    cluster.run(lambda c: c.leader is not None and c.leader.name == "n1" and c.cluster.surveyed)
    cluster.obeyed = lambda order: not isinstance(order, m.Persist)  # so that it cannot write one of its own
    assert cluster.cluster.published is None
    cluster.publish(order)  # the archiver is slow
    cluster.tell(m.Published(order.node, order.step, "checkpoints", True, ""))
    cluster.run(lambda c: c.cluster.published is not None)
    assert cluster.cluster.published is not None
    assert cluster.cluster.published.step == order.step


def test_a_damaged_checkpoint_gives_way_to_an_older_one() -> None:
    cluster = Simulation(published=checkpoint_of(10))
    newest = checkpoint_of(20)
    cluster.manifests[20] = dict(newest.files)
    for rank, (_, _, checksum) in newest.files.items():
        cluster.files[20, rank, checksum] = Content(rank, 20, 7, 0).sealed()
    cluster.corrupt_file(20, 2)
    finish(cluster)
    assert [plan["step"] for plan in cluster.said("plan")] == [20, 10]


def test_without_an_older_checkpoint_a_damaged_one_ends_the_run_rather_than_starting_afresh() -> None:
    cluster = Simulation(published=checkpoint_of(10))
    cluster.corrupt_file(10, 2)
    cluster.run(Simulation.over)
    assert (cluster.outcome, cluster.most_trained) == ("failed", 0)
    assert "no older" in cluster.reason


def test_a_shard_written_by_a_history_that_was_given_up_is_not_published() -> None:
    cluster = started()
    cluster.intercept = lambda event: isinstance(event, m.Persisted) and event.rank == 2
    cluster.run(lambda c: bool(c.held))
    told = cluster.held[0][2]
    assert isinstance(told, m.Persisted)
    cluster.take(m.Persisted(**{**vars(told), "checksum": told.checksum + 1}))
    assert 2 not in cluster.cluster.files
    cluster.release()
    finish(cluster)


def test_a_snapshot_that_rotted_in_its_owners_memory_is_fetched_from_a_holder() -> None:
    cluster = started(total_steps=60, persist_every=100)
    cluster.kill_worker("n3")
    cluster.run(lambda c: c.cluster.phase is Phase.GATHERING)
    step = cluster.cluster.plan.step
    half = cluster.cluster.copies[1, step]["n1"].half
    cluster.corrupt("n1", 0, half)
    finish(cluster, 60)
    assert [plan["step"] for plan in cluster.said("plan")[1:]] == [step, step]
    assert cluster.said("fetched")[-1]["source"] == "n0"


def test_a_line_that_breaks_costs_nothing_but_what_was_on_it() -> None:
    """The order that a step is safe is lost: it is given again when the agent repeats its step."""
    cluster = started(total_steps=60, persist_every=100)
    lost: list[m.Command] = []

    def lose_one(order: m.Command) -> bool:
        if isinstance(order, m.Safe) and order.node == "n2" and not lost:
            lost.append(order)
            return False
        return True

    cluster.obeyed = lose_one
    finish(cluster, 60)
    assert len(lost) == 1
    assert cluster.said("safe")[-1]["step"] == 60
    assert len(cluster.said("plan")) == 1


# --- a few nodes ----------------------------------------------------------------------------------------


def test_one_node_alone() -> None:
    finish(Simulation(rules(nodes=1, world_size=1, replicas=1)))


@pytest.mark.parametrize("lost", ["n0", "n1"])
def test_one_rank_and_one_spare_go_on_by_the_clusters_word(lost: str) -> None:
    cluster = Simulation(rules(nodes=2, world_size=1, replicas=1)).run(lambda c: c.running() and c.reached(5))
    cluster.kill_node(lost)
    finish(cluster)


@pytest.mark.parametrize("lost", ["n0", "n1"])
def test_one_rank_and_one_spare_stop_when_the_other_is_only_silent(lost: str) -> None:
    cluster = Simulation(rules(nodes=2, world_size=1, replicas=1, total_steps=1000))
    cluster.run(lambda c: c.running() and c.reached(5))
    cluster.kill_node(lost, seen=False)
    cluster.run(Simulation.over)
    assert (cluster.outcome, len(cluster.forsaken)) == ("suspended", 1)


@pytest.mark.parametrize("lost", ["n0", "n1"])
def test_two_ranks_without_a_spare_save_what_they_have(lost: str) -> None:
    cluster = Simulation(rules(nodes=2, world_size=2)).run(lambda c: c.running() and c.cluster.safe_step >= 5)
    cluster.kill_node(lost)
    cluster.run(Simulation.over)
    assert cluster.outcome == "suspended"
    assert max(cluster.manifests) >= 5


@pytest.mark.parametrize("lost", ["n0", "n1", "n2"])
@pytest.mark.parametrize("seen", [True, False])
def test_two_ranks_and_a_spare_survive_any_one_of_them(lost: str, seen: bool) -> None:
    cluster = Simulation(rules(nodes=3, world_size=2)).run(lambda c: c.running() and c.cluster.safe_step >= 5)
    cluster.kill_node(lost, seen)
    finish(cluster)


def test_halves_of_four_stop_and_the_half_that_is_left_by_the_other_goes_on_or_saves() -> None:
    cluster = Simulation(rules(nodes=4, world_size=2, total_steps=1000))
    cluster.run(lambda c: c.running() and c.cluster.safe_step >= 5)
    cluster.cut(cluster.lines_between(["n0", "n1"], ["n2", "n3"]), 100.0)
    since = len(cluster.orders)
    cluster.run_for(3.0)
    before = len(cluster.orders)
    cluster.run_for(5.0)
    assert since <= before == len(cluster.orders)  # nobody decides anything
    cluster.run(Simulation.over, 200.0)
    assert cluster.outcome in ("finished", "suspended", "failed")


# --- messages that are lost, late, or of somebody before ------------------------------------------------


def test_a_host_that_the_predecessor_declared_gone_can_be_read_again_in_a_new_world() -> None:
    cluster = started(nodes=6, total_steps=200, persist_every=200)
    for name in ("n4", "n5"):  # n0 had suspected n1, falsely, and the hosts do not forget
        cluster.nodes[name].host.gone.add(cluster.cluster.world.members.index("n1"))
    cluster.kill_node("n0")
    cluster.run(lambda c: c.running() and c.cluster.generation > NUMBERS_OF_A_TERM)
    assert cluster.said("plan")[-1]["step"] >= 3
    assert cluster.said("fetched")[-1]["source"] == "n1"


def test_orders_to_window_hosts_name_the_world_in_which_their_ranks_count() -> None:
    cluster = started(nodes=6)
    cluster.crash_host("n1")
    cluster.run(lambda c: c.cluster.world.number == 2 and c.cluster.world.state == "ready")
    cluster.kill_node("n2")
    finish(cluster)
    worlds = {order.world: order.members for order in cluster.ordered(m.StartWorld)}
    assert len(worlds) > 1
    for pull in cluster.ordered(m.Pull):
        assert worlds[pull.world][pull.target] == pull.source
    assert {gone.world for gone in cluster.ordered(m.Gone)} == {1, 2}


@pytest.mark.parametrize("kind", [m.Sealed, m.Stepped, m.Copied, m.Persisted, m.Published, m.Resumed, m.Parked])
@pytest.mark.parametrize("nth", [0, 3, -1])
def test_a_report_that_is_lost_on_its_way_is_made_up_for(kind: type[m.Event], nth: int) -> None:
    """Any one of them, the first or the last of the run: it goes on, protected, to its end."""
    if nth < 0 and kind in (m.Resumed, m.Parked):
        pytest.skip("nobody says that at the end of a run")
    cluster = Simulation(rules(total_steps=12, persist_every=6))
    seen: list[m.Event] = []

    def lose_one(event: m.Event) -> bool:
        if not isinstance(event, kind) or (nth < 0 and getattr(event, "step", 12) < 12):
            return False
        seen.append(event)
        return len(seen) == max(nth, 0) + 1

    cluster.intercept = lose_one
    if kind is m.Parked:
        cluster.after(1.0, cluster.nodes["n1"].end_worker, "killed")
    cluster.run(Simulation.over, 100.0)
    assert (cluster.outcome, cluster.most_trained) == ("finished", 12)
    assert seen or nth == 3
    if kind not in (m.Persisted, m.Published):
        assert max(cluster.manifests) == 12


def test_a_late_report_does_not_displace_the_newer_snapshot_in_the_same_place() -> None:
    cluster = started(total_steps=200)
    generation = cluster.cluster.generation
    (at_step,) = [step for rank, step in cluster.cluster.copies if rank == 1][-1:]
    copy = cluster.cluster.copies[1, at_step]["n1"]
    cluster.take(m.Sealed("n1", generation, 1, at_step - 2, copy.half, 1000, 7))
    assert cluster.cluster.copies[1, at_step]["n1"] == copy


def test_a_coordinator_whose_own_worker_keeps_failing_leads_on_without_a_rank() -> None:
    cluster = started(total_steps=200)
    for _ in range(4):
        cluster.run(lambda c: c.nodes["n0"].worker.alive and c.nodes["n0"].worker.state in ("building", "training"))
        cluster.kill_worker("n0")
        lost = len(cluster.said("suspect"))
        cluster.run(lambda c, lost=lost: len(c.said("suspect")) > lost)
    finish(cluster, 200)
    assert cluster.cluster.generation < NUMBERS_OF_A_TERM
    assert "n0" not in cluster.cluster.ranks.values()


@pytest.mark.parametrize(
    "wrong",
    [
        {"worker": "bogus"},
        {"rank": 77, "generation": 5},
        {"world": 99, "members": ("stranger",)},
        {"held": ((1, 2),)},
        {"held": ((0, 0, 77, 5, 1, 10, 1),)},
        {"held": ((9, 0, 1, 5, 1, 10, 1),)},
    ],
    ids=str,
)
def test_a_report_that_names_what_there_is_not_counts_for_nothing(
    wrong: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its node is given up as one that does not report."""
    cluster = started(nodes=6, total_steps=200)
    account = cluster.nodes["n2"].account
    inventory = account.inventory
    monkeypatch.setattr(account, "inventory", lambda held: replace(inventory(held), **wrong))
    cluster.kill_node("n0")
    finish(cluster, 200)
    assert {said["target"] for said in cluster.said("refused")} == {"n2"}
    assert not cluster.cluster.members["n2"].alive


def test_a_node_that_comes_back_is_a_spare_under_any_coordinator() -> None:
    cluster = Simulation(rules(total_steps=200), prepare=lambda sim: setattr(sim, "return_s", 0.5))
    cluster.run(lambda c: c.running() and c.cluster.safe_step >= 3)
    for name in ("n3", "n0", "n1"):  # the first two were coordinators, or would have been the next
        cluster.kill_node(name)
        cluster.run(lambda c, name=name: c.nodes[name].life == 1 and c.running() and not c.cluster.exposed)
    finish(cluster, 200)
    assert cluster.nodes["n2"].seat.election.term == cluster.nodes["n4"].seat.election.term
    assert all(node.life == 1 for name, node in cluster.nodes.items() if name in ("n0", "n1", "n3"))


def test_when_all_who_voted_are_gone_those_vote_who_came_back() -> None:
    """And again, when all of these are gone; nothing that was safe is ever lost."""
    cluster = Simulation(rules(total_steps=2000, persist_every=2000), prepare=lambda sim: setattr(sim, "return_s", 0.5))
    cluster.run(lambda c: c.running() and c.cluster.safe_step >= 3)
    for life in (1, 2, 3):
        for name in cluster.rules.nodes:
            safe = cluster.cluster.safe_step
            cluster.kill_node(name)
            back = (life, True, False)
            cluster.run(lambda c, n=name, back=back: (c.nodes[n].life, c.running(), c.cluster.exposed) == back)
            assert cluster.said("plan")[-1]["step"] >= safe
            (leader,) = [node for node in cluster.nodes.values() if node.seat.cluster is not None]
            votes = {m.node for m in cluster.cluster.members.values() if m.alive and m.votes}
            assert votes == set(leader.seat.election.present())
    assert max(node.seat.election.named for node in cluster.nodes.values()) >= 3
    assert not cluster.said("persisted")


def test_when_all_nodes_are_gone_at_once_those_that_come_back_go_on_from_the_newest_checkpoint() -> None:
    cluster = Simulation(rules(total_steps=200), prepare=lambda sim: setattr(sim, "return_s", 0.5))
    cluster.run(lambda c: bool(c.said("persisted")))
    for name in cluster.rules.nodes:
        cluster.kill_node(name)
    finish(cluster, 200)
    assert [said["step"] for said in cluster.said("plan")] == [-1, 10]


def test_when_nobody_comes_back_the_run_is_over() -> None:
    cluster = started()
    for name in cluster.rules.nodes:
        cluster.kill_node(name)
    cluster.run(Simulation.over)
    assert (cluster.outcome, cluster.reason) == ("suspended", "no node is left")


def test_when_most_who_vote_are_silent_for_ever_the_run_is_over() -> None:
    """Though others come back, again and again: they have no vote, for those who have may still be there."""
    cluster = Simulation(rules(total_steps=2000), prepare=lambda sim: setattr(sim, "return_s", 0.5))
    cluster.run(lambda c: c.running() and c.cluster.safe_step >= 3)
    for name in ("n1", "n2", "n3"):
        cluster.kill_node(name)
        cluster.run(lambda c, name=name: c.nodes[name].life == 1 and c.running() and not c.cluster.exposed)
    cluster.pause("n4", 1000.0)
    cluster.run(Simulation.over, 100.0)
    assert cluster.outcome == "suspended" and "nobody has led" in cluster.reason


def test_a_file_system_that_hangs_does_not_hold_up_a_takeover() -> None:
    """What is in memory is newer than any checkpoint: there is no need to know which ones there are."""
    cluster = started(nodes=6, total_steps=200, persist_every=200)
    safe = cluster.cluster.safe_step
    cluster.survey_s = 1000.0
    cluster.kill_node("n0")
    cluster.run(lambda c: c.cluster.generation > NUMBERS_OF_A_TERM and c.running(), 5.0)
    assert cluster.said("plan")[-1]["step"] >= safe
    assert not cluster.cluster.surveyed


def test_a_leader_that_falls_silent_is_found_out_as_quickly_as_any_node() -> None:
    cluster = started(total_steps=400)
    since = cluster.now
    cluster.pause("n0", 100.0)
    cluster.run(lambda c: any(said["target"] == "n0" for said in c.said("suspect")))
    assert cluster.now - since < 1.5
    cluster.run(lambda c: any(said["target"] == "n0" for said in c.said("evict")))
    assert cluster.now - since < 2.2
    assert cluster.run(Simulation.over).outcome == "finished"


def test_a_leader_that_was_only_slow_keeps_its_rank() -> None:
    cluster = started(total_steps=400)
    cluster.pause("n0", 1.4)
    cluster.run(lambda c: any(said["target"] == "n0" for said in c.said("cleared")))
    finish(cluster, published=400)
    assert not cluster.said("evict") and "n0" in cluster.cluster.ranks.values()


def test_hosts_hear_from_a_new_leader_who_is_gone() -> None:
    """Else a read from a dead node, begun before, would hold up its reader until its deadline."""
    cluster = started(nodes=6, total_steps=400)
    cluster.kill_node("n2")
    cluster.kill_node("n0")
    cluster.run(lambda c: c.running() and c.leader is not None and c.leader.name != "n0")
    told = {order.node: order.targets for order in cluster.ordered(m.Gone) if order.node not in ("n0", "n2")}
    assert set(told) == {"n1", "n3", "n4", "n5"} and all(set(targets) >= {0, 2} for targets in told.values())


def test_a_spare_that_has_fetched_a_rank_keeps_it_under_the_next_coordinator() -> None:
    """It was told to join by nobody yet. As it was for another rank, its fetch overwrote the last copy of the first."""
    cluster = started(nodes=5, world_size=3, persist_every=1000)
    cluster.intercept = lambda event: isinstance(event, m.Parked)  # survivors are slow to leave
    safe = cluster.cluster.safe_step
    cluster.kill_node(cluster.leader.name)
    cluster.run(lambda c: bool(c.said("fetched")))
    (fetched,) = cluster.said("fetched")
    partner = fetched["source"]
    assert partner == cluster.leader.name  # who has the only other copy, and now is lost
    cluster.kill_node(partner)
    cluster.release()
    cluster.run(lambda c: c.leader is not None and c.cluster.generation > 2 * NUMBERS_OF_A_TERM and c.running())
    plan = cluster.said("plan")[-1]
    assert plan["step"] >= safe
    assert {move["rank"]: move["tier"] for move in plan["moves"]}[fetched["rank"]] == "local"
    finish(cluster)
