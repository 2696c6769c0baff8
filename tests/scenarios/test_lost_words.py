"""Any order and any answer may be lost with the line that carried it, and any attempt may fail once."""

import pytest

from gemini_hpc.core import messages as m
from gemini_hpc.core.account import Account
from gemini_hpc.core.coordinator import step
from gemini_hpc.core.state import Checkpoint, Phase, new_cluster
from tests.scenarios.node import CLUSTER
from tests.scenarios.simulation import NBYTES, Content, Simulation, rules
from tests.scenarios.test_recoveries import finish, started


def checkpoint(step: int) -> Checkpoint:
    checksums = {rank: Content(rank, step, 7, 0).sealed().checksum for rank in range(4)}
    return Checkpoint(step, {rank: (f"rank-{rank:04d}.h5", NBYTES, checksum) for rank, checksum in checksums.items()})


def saving() -> Simulation:
    """Out of nodes at step 100 or later, with nothing on the persistent tier."""
    cluster = started(nodes=4, persist_every=1000, total_steps=400)
    cluster.run(lambda c: c.cluster.safe_step >= 100, 100)
    cluster.persist_s = 0.3
    cluster.kill_node("n2")
    return cluster.run(lambda c: c.cluster.phase is Phase.SAVING)


def lose_first(cluster: Simulation, kind: type[m.Message]) -> list[m.Message]:
    """The first order or event of that kind is lost; return where it will be found."""
    lost: list[m.Message] = []

    def loses(message: m.Message) -> bool:
        if isinstance(message, kind) and not lost:
            lost.append(message)
            return True
        return False

    if issubclass(kind, m.Command):
        cluster.obeyed = lambda order: not loses(order)
    else:
        cluster.intercept = loses
    return lost


def test_a_line_that_breaks_for_a_second_while_the_last_state_is_saved() -> None:
    cluster = saving()
    cluster.run_for(0.05)
    cluster.cut(cluster.lines_between(["n3"], ["n0"]), 1.0, broken=True)
    cluster.run(Simulation.over, 100)
    assert max(cluster.manifests) >= 100


@pytest.mark.parametrize("kind", [m.Persist, m.Publish])
def test_an_order_is_lost_while_the_last_state_is_saved(kind: type[m.Command]) -> None:
    cluster = saving()
    lost = [] if cluster.ordered(m.Persist) and kind is m.Persist else lose_first(cluster, kind)
    cluster.run(Simulation.over, 100)
    assert max(cluster.manifests) >= 100 and (lost or kind is m.Persist)


@pytest.mark.parametrize("kind", [m.Persisted, m.Published])
def test_an_answer_is_lost_while_the_last_state_is_saved(kind: type[m.Event]) -> None:
    cluster = saving()
    lost = lose_first(cluster, kind)
    cluster.run(Simulation.over, 100)
    assert max(cluster.manifests) >= 100 and lost


def test_the_archiver_dies_while_it_publishes_the_last_state() -> None:
    cluster = saving()
    cluster.run(lambda c: bool(c.ordered(m.Publish)))
    (publish,) = cluster.ordered(m.Publish)
    cluster.nodes[publish.node].end_archiver()
    cluster.run(Simulation.over, 100)
    assert max(cluster.manifests) >= 100


def test_the_archiver_dies_while_it_writes_the_last_checkpoint() -> None:
    cluster = Simulation()
    cluster.run(lambda c: any(order.step == 30 for order in c.ordered(m.Persist)))
    cluster.nodes["n2"].end_archiver()
    finish(cluster)


@pytest.mark.parametrize("kind", [m.Persist, m.Publish])
def test_an_order_for_the_last_checkpoint_is_lost(kind: type[m.Command]) -> None:
    cluster = Simulation().run(lambda c: c.reached(29))
    lost = lose_first(cluster, kind)
    finish(cluster)
    assert lost


def test_a_spare_dies_while_a_checkpoint_is_published() -> None:
    """Its loss begins the writing anew; the word that the first attempt is published must not pass for the second's."""
    cluster = Simulation(rules(7, total_steps=400, persist_every=20))
    cluster.exit_s = 0.001
    cluster.run(lambda c: bool(c.ordered(m.Publish)))
    cluster.kill_node("n6")
    cluster.run(lambda c: c.cluster.published is not None)
    assert cluster.cluster.published is not None and len(cluster.cluster.published.files) == 4
    cluster.kill_node("n2")
    cluster.kill_node("n3")
    finish(cluster, published=400)


def test_the_only_source_dies_while_it_is_read_though_it_has_no_rank() -> None:
    """An evicted node that did not hear so still has what its successor has not replicated yet."""
    cluster = Simulation(rules(8, total_steps=2000, persist_every=5))
    cluster.run(lambda c: c.running() and c.reached(20) and c.cluster.published is not None)
    cluster.obeyed = lambda o: (
        not (isinstance(o, m.Retire) or (isinstance(o, m.Pull) and o.node == "n4" and o.area == 1))
    )
    cluster.cut(cluster.lines_between(["n3"], [*cluster.rules.nodes, CLUSTER]), 3.0, broken=True)
    cluster.run(lambda c: c.running() and c.cluster.generation > 1)
    cluster.run(lambda c: not c.network.cuts)
    cluster.run_for(0.5)
    cluster.kill_node("n0")
    cluster.kill_node("n2")
    cluster.obeyed = lambda o: not (isinstance(o, m.Retire) or (isinstance(o, m.Pull) and o.area == 0))
    cluster.run(lambda c: c.leader is not None and c.leader.name != "n0" and c.cluster.phase is Phase.GATHERING, 30)
    cluster.obeyed = None
    cluster.kill_node("n3")
    cluster.run(Simulation.over, 400)
    assert cluster.outcome == "finished"


def test_the_order_to_load_or_its_answer_is_lost() -> None:
    cluster = Simulation(published=checkpoint(20))
    cluster.persist_s = 0.2
    cluster.run(lambda c: len(c.ordered(m.Load)) == 4)
    cluster.cut(cluster.lines_between(["n2"], ["n0"]), 0.3, broken=True)
    finish(cluster)


def test_an_evicted_node_that_did_not_hear_so_is_told_again_and_comes_back() -> None:
    cluster = Simulation(rules(5, total_steps=2000)).run(lambda c: c.running() and c.reached(5))
    cluster.return_s = 0.5
    cluster.cut(cluster.lines_between(["n1"], ["n0", "n2", "n3", "n4", CLUSTER]), 4.0, broken=True)
    cluster.run(lambda c: any(said["target"] == "n1" for said in c.said("evict")))
    cluster.run(lambda c: any(said["target"] == "n1" for said in c.said("returned")))
    cluster.run_for(5.0)
    cluster.return_s = None
    cluster.kill_node("n2")
    cluster.run(Simulation.over, 400)
    assert cluster.outcome == "finished"


def unreadable(*pairs: tuple[str, str]) -> Simulation:
    """At step 100 or later n2 is lost, and nothing is on disk; neither node of a pair can read from the other."""
    cluster = started(nodes=6, persist_every=1000, total_steps=2000)
    cluster.run(lambda c: c.cluster.safe_step >= 100, 100)
    for one, other in pairs:
        cluster.cut(cluster.lines_between([one], [other]), 60.0)
    cluster.kill_node("n2")
    return cluster


def test_what_no_spare_can_read_goes_through_the_persistent_tier() -> None:
    cluster = unreadable(("n4", "n3"), ("n5", "n3"))
    cluster.run(lambda c: c.running() and c.cluster.generation > 1)
    plan = cluster.cluster.plan
    assert plan is not None and plan.step >= 100 and {source.tier for source in plan.sources.values()} == {"persistent"}
    cluster.run(lambda c: c.cluster.safe_step > plan.step)
    assert [note["step"] for note in cluster.said("persisted")].count(plan.step) == 1
    assert cluster.run(Simulation.over, 200).outcome == "finished"


def test_what_is_saved_before_the_nodes_are_taken_away_is_saved_once_and_the_run_ends() -> None:
    cluster = unreadable(("n4", "n3"), ("n5", "n3"))
    cluster.persist_s = 1.0
    cluster.run(lambda c: c.cluster.phase is Phase.SAVING)
    cluster.suspend()
    cluster.run(Simulation.over, 10)
    assert cluster.outcome == "suspended" and max(cluster.manifests) >= 100


def test_what_can_be_neither_read_nor_saved_stops_the_run_rather_than_starting_it_afresh() -> None:
    cluster = unreadable(("n4", "n3"), ("n5", "n3"))
    cluster.no_writes |= set(cluster.rules.nodes)
    cluster.run(Simulation.over, 120)
    assert cluster.outcome == "stopped" and "could not be saved" in cluster.reason


def test_what_one_spare_cannot_read_another_does() -> None:
    cluster = unreadable(("n4", "n3"))
    cluster.run(lambda c: c.running() and c.cluster.generation > 1)
    assert cluster.cluster.ranks[2] == "n5" and cluster.cluster.plan is not None and cluster.cluster.plan.step >= 100
    assert cluster.run(Simulation.over, 200).outcome == "finished"


def test_a_tier_that_hangs_for_a_while_does_not_let_the_training_begin_again() -> None:
    """The coordinator's node and all window hosts are lost; what lies in memory can be written only later."""
    cluster = started(nodes=6, persist_every=1000, total_steps=2000)
    cluster.run(lambda c: c.cluster.safe_step >= 60, 100)
    cluster.no_worlds_until, cluster.survey_s = 1000.0, 15.0
    cluster.no_writes |= set(cluster.rules.nodes)
    for name in cluster.rules.nodes:
        cluster.crash_host(name)
    cluster.kill_node("n0")
    cluster.run(Simulation.over, 200)
    assert [said["step"] for said in cluster.said("plan")].count(-1) == 1 and cluster.outcome == "stopped"


def test_a_new_coordinator_waits_for_a_checkpoint_that_is_newer_than_what_lies_in_memory() -> None:
    """Where replication lags, old replicas of all ranks are there still."""
    cluster = Simulation(rules(4, world_size=3, replicas=3, persist_every=1000, total_steps=5000))
    cluster.run(lambda c: c.running() and c.cluster.safe_step >= 20, 100)
    cluster.lose_launcher(1000.0)
    cluster.run(lambda c: len(c.said("persisted")) > 2, 100)
    cluster.survey_s = 3.0
    cluster.kill_node("n0")
    cluster.run(lambda c: len(c.said("plan")) > 1, 100)
    assert cluster.said("plan")[-1]["step"] >= cluster.said("persisted")[-1]["step"]


def test_a_node_that_is_back_does_not_answer_for_its_former_self() -> None:
    """Its former self voted for one leader, and still counts at the other for a lease."""
    cluster = Simulation(rules(3, world_size=2, total_steps=500))
    cluster.run(lambda c: c.running() and c.reached(5) and all(n.seat.leader == "n0" for n in c.nodes.values()))

    def between(one: str, other: str) -> list[tuple[str, str]]:
        return [(one, other), (other, one)]

    cluster.cut(between("n0", "n1"), 60.0)
    cluster.cut(between("n0", "n2"), 1.3)
    cluster.cut([("n2", "n1")], 2.2)
    cluster.run(lambda c: c.nodes["n2"].seat.election.voted > 1, 10)
    cluster.run(lambda c: c.nodes["n0"].seat.election.may_act(c.nodes["n0"].clock()), 10)
    cluster.cut([("n1", "n2")], 0.7)
    cluster.run(lambda c: c.nodes["n1"].seat.election.leads, 10)
    cluster.cut(between("n0", "n2"), 60.0)
    cluster.return_s = 0.2
    cluster.kill_node("n2")
    cluster.run_for(2.0)  # breaks I4 where the new life's answer counts


def test_a_node_that_is_on_its_way_back_is_waited_for() -> None:
    cluster = started(total_steps=200)
    cluster.return_s = 0.1
    cluster.kill_node("n1")
    cluster.run(lambda c: c.running() and c.cluster.generation > 1)
    cluster.run(lambda c: c.cluster.members["n1"].alive and c.cluster.members["n1"].held is None)
    cluster.kill_node("n2")
    cluster.run(Simulation.over, 100)
    assert cluster.outcome == "finished"


def test_a_spare_that_cannot_start_does_not_keep_the_others_from_it() -> None:
    cluster = Simulation()
    for attempt in range(rules().max_restarts + 1):
        cluster.run(lambda c, attempt=attempt: len(c.ordered(m.RestartWorker)) == attempt and c.leader is not None)
        cluster.run(lambda c: c.nodes["n4"].worker.alive and "n4" in c.cluster.members and c.cluster.counted)
        cluster.kill_worker("n4")
    finish(cluster)
    assert [said["target"] for said in cluster.said("no_worker")] == ["n4"]


@pytest.mark.parametrize("term", [1, 6, 11])
def test_a_report_counts_in_the_term_for_which_it_was_made(term: int) -> None:
    """The same node leads again; what reaches it late may tell of snapshots that are long overwritten."""
    account = Account("n1")
    account.informs(m.Lead("n1", "n0", 6, 0.0, True))
    cluster, _ = step(new_cluster(rules(), 0.0, term), 0.0, account.inventory([]))
    assert (cluster.members["n1"].held is not None) == (term == 6)


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_window_host_that_does_not_seal_is_found_out(replicas: int) -> None:
    cluster = started(replicas=replicas, total_steps=1000)
    cluster.hang_host("n1")
    at_step = cluster.cluster.safe_step
    cluster.run(lambda c: c.cluster.safe_step > at_step + 20, 60)
    assert cluster.said("host_lost") and cluster.cluster.generation == 1


def test_a_word_of_an_earlier_generation_does_not_pass_for_one_of_this() -> None:
    cluster = started()
    cluster.intercept = lambda event: isinstance(event, m.Resumed)
    cluster.kill_node("n2")
    cluster.run(lambda c: c.cluster.phase is Phase.JOINING)
    state = cluster.cluster
    for rank, node in state.ranks.items():
        at = (node, state.generation - 1, rank, 5, 0.0, "hot_swap", 0.0, 0.0, 0.0)
        state, _ = step(state, state.last_turn, m.Resumed(*at))
    assert state.phase is Phase.JOINING and not state.resumed


def test_a_coordinator_whose_lines_all_break_gives_nobody_up() -> None:
    """Not though a collective fails, which makes a node that is suspected as good as lost: it is its own network."""
    cluster = started(nodes=6, world_size=3)
    leader = cluster.leader
    assert leader is not None
    for node in set(cluster.rules.nodes) - {leader.name}:
        leader.decide(m.Disconnected(node))
    cluster.tell(m.Trouble("n1", cluster.cluster.generation, "a collective timed out"))
    cluster.run_for(1.0)
    assert cluster.said("trouble") and not cluster.said("evict")
    finish(cluster)


def test_a_rank_that_says_again_what_it_did_is_told_again_what_is_safe() -> None:
    """Its connection broke, and with it went what it was told: it would wait for ever."""
    cluster = started()
    state = cluster.cluster
    rank, done = next(iter(state.stepped.items()))
    said = m.Stepped(state.ranks[rank], state.generation, rank, done, 1.0, 0.1, 0.0)
    _, orders = step(state, state.last_turn, said)
    assert m.Safe(state.ranks[rank], state.generation, state.safe_step) in orders


def test_a_coordinator_that_stood_still_takes_nobody_for_silent() -> None:
    cluster = started()
    state, orders = step(cluster.cluster, cluster.cluster.last_turn + 1.19, m.Tick(""))
    assert not orders and not any(member.evidence for member in state.members.values())
