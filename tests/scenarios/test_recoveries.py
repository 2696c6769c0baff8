"""One story per test: what fails, and what the coordinator makes of it."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from gemini_hpc.core import messages as m
from gemini_hpc.core.coordinator import step
from gemini_hpc.core.placement import Form, held_by
from gemini_hpc.core.recovery import newest_complete
from gemini_hpc.core.state import Checkpoint, Phase, Worker
from gemini_hpc.core.view import describe
from tests.scenarios.simulation import NBYTES, Content, Simulation, rules


def started(**changes: Any) -> Simulation:
    """A cluster in the middle of training, protected, at step 5 or later."""
    return Simulation(rules(**changes)).run(lambda c: c.running() and c.reached(5) and c.cluster.safe_step >= 3)


def finish(cluster: Simulation, published: int = 30) -> Simulation:
    """Run to the end, which must be a good one."""
    cluster.run(Simulation.over)
    assert cluster.cluster.outcome == "finished"
    assert cluster.cluster.published is not None
    assert cluster.cluster.published.step == published
    return cluster


def plan_of(cluster: Simulation, generation: int) -> dict[str, Any]:
    return next(plan for plan in cluster.said("plan") if plan["generation"] == generation)


def tiers(cluster: Simulation, generation: int) -> list[str]:
    return [move["tier"] for move in plan_of(cluster, generation)["moves"]]


# --- what the cluster announces ----------------------------------------------------------------------


def test_a_run_that_is_to_be_suspended_saves_its_newest_step_and_ends() -> None:
    cluster = started(persist_every=1000)
    newest = cluster.cluster.safe_step
    cluster.suspend()
    cluster.run(Simulation.over)
    assert (cluster.outcome, cluster.cluster.published is not None) == ("suspended", True)
    assert max(cluster.manifests) >= newest
    assert {order.node for order in cluster.ordered(m.Abort)} == {"n0", "n1", "n2", "n3"}  # nobody trains for nothing
    assert "the time limit is near; the newest checkpoint is" in cluster.reason


def test_it_is_suspended_before_it_has_begun_but_not_before_it_is_known_what_there_is() -> None:
    cluster = Simulation(prepare=lambda sim: setattr(sim, "build_s", 3.0))
    cluster.run(lambda c: c.leader is not None)
    cluster.suspend()
    cluster.run(Simulation.over)
    assert (cluster.outcome, cluster.manifests, cluster.most_trained) == ("suspended", {}, 0)


def test_a_new_coordinator_suspends_nothing_before_all_have_reported() -> None:
    cluster = started(persist_every=1000)
    newest = cluster.cluster.safe_step
    cluster.kill_node("n0")
    cluster.run(lambda c: c.leader is not None and c.leader.name == "n1")
    cluster.suspend()
    cluster.run(Simulation.over)
    assert cluster.outcome == "suspended" and max(cluster.manifests) >= newest


def test_whoever_leads_next_suspends_it_too() -> None:
    cluster = started()
    cluster.suspend()
    cluster.kill_node("n0")
    cluster.run(Simulation.over)
    assert cluster.outcome == "suspended" and cluster.manifests


def test_a_node_that_is_drained_gives_its_rank_away_once_a_step_is_safe() -> None:
    cluster = started()
    cluster.drain("n1")
    cluster.run(lambda c: c.cluster.generation == 2)
    before = max(event["step"] for event in cluster.said("safe") if event["generation"] == 1)
    assert plan_of(cluster, 2)["step"] >= before
    assert {move["rank"]: move["node"] for move in plan_of(cluster, 2)["moves"]}[1] == "n4"
    assert "Slurm drains n1" in cluster.said("abort")[0]["reason"]
    finish(cluster)
    assert not cluster.said("evict") and cluster.cluster.generation == 2
    assert cluster.cluster.members["n1"].alive


def test_without_another_node_it_keeps_its_rank_and_one_that_is_to_be_used_again_is_as_good_as_any() -> None:
    cluster = started()
    cluster.drain("n1")
    cluster.drain("n4")
    cluster.run_for(0.5)
    assert cluster.cluster.generation == 1
    cluster.drain("n4", False)
    cluster.run(lambda c: c.cluster.generation == 2)
    finish(cluster)
    assert cluster.cluster.ranks[1] == "n4"


def test_the_last_choice_is_a_choice() -> None:
    cluster = started()
    cluster.drain("n4")
    cluster.kill_node("n1")
    finish(cluster)
    assert cluster.cluster.ranks[1] == "n4"


# --- evidence -----------------------------------------------------------------------------------------


def test_a_second_witness_is_enough_at_once() -> None:
    cluster = started()
    cluster.pause("n2", 60.0)
    cluster.run(lambda c: bool(c.said("suspect")))
    assert not cluster.said("evict") and cluster.leader is not None
    cluster.leader.from_child(m.Disconnected("n2"))
    cluster.run_for(0.1)  # much less than a single witness has to be confirmed in
    assert [event["target"] for event in cluster.said("evict")] == ["n2"]
    assert "a second witness agrees" in cluster.said("evict")[0]["reason"]


def test_a_coordinator_whose_lines_all_break_takes_nobody_else_for_lost() -> None:
    cluster = started()
    others = ["n1", "n2", "n3", "n4"]
    cluster.cut(cluster.lines_between(["n0"], others), 0.4, broken=True)
    cluster.run_for(3.0)
    assert {event["target"] for event in cluster.said("suspect")} == set(others)
    assert not cluster.said("evict") and cluster.cluster.generation == 1
    finish(cluster)


def test_a_window_host_that_dies_a_moment_before_its_node_is_not_asked_into_a_new_world() -> None:
    cluster = started()
    cluster.crash_host("n2")
    cluster.run_for(0.2)
    cluster.kill_node("n2")
    finish(cluster)
    assert len(cluster.ordered(m.StartWorld)) == 1


# --- start and steady state -------------------------------------------------------------------------


def test_a_start_is_generation_1_with_fresh_ranks_and_one_world() -> None:
    cluster = finish(Simulation())
    assert plan_of(cluster, 1)["step"] == -1
    assert tiers(cluster, 1) == ["fresh"] * 4
    assert [move["node"] for move in plan_of(cluster, 1)["moves"]] == ["n0", "n1", "n2", "n3"]
    assert cluster.cluster.generation == 1
    assert [order.members for order in cluster.ordered(m.StartWorld)] == [("n0", "n1", "n2", "n3", "n4")]
    assert cluster.said("evict") == cluster.said("abort") == []


def test_a_start_waits_for_all_and_goes_on_without_a_node_that_never_came() -> None:
    cluster = Simulation(absent=("n1",))
    cluster.run_for(4.5)
    assert cluster.cluster.phase is Phase.FORMING
    assert any("n1" in line for line in describe(cluster.cluster, cluster.now)["waiting_for"])
    finish(cluster)
    assert [(e["target"], e["reason"]) for e in cluster.said("evict")] == [("n1", "it did not report in time")]
    assert sorted(move["node"] for move in plan_of(cluster, 1)["moves"]) == ["n0", "n2", "n3", "n4"]


def test_too_few_nodes_at_the_start_stop_the_run() -> None:
    cluster = Simulation(absent=("n1", "n4")).run(Simulation.over)
    assert cluster.cluster.outcome == "suspended"


def test_safe_steps_advance_and_checkpoints_are_persisted_at_the_interval_and_at_the_end() -> None:
    cluster = finish(Simulation())
    safe = [note["step"] for note in cluster.said("safe")]
    assert safe == sorted(set(safe))
    assert safe[0] == 0
    assert safe[-1] == 30
    assert len(safe) > 10
    persisted = [note["step"] for note in cluster.said("persisted")]
    assert len(persisted) == 3
    assert persisted[0] in range(10, 14)
    assert persisted[1] in range(20, 24)
    assert persisted[2] == 30
    assert [note["step"] for note in cluster.said("protected")] == [0]


def test_a_safe_step_is_told_to_all_nodes_and_only_once_it_is_true() -> None:
    cluster = Simulation()

    def first_safe(c: Simulation) -> bool:
        return bool(c.ordered(m.Safe))

    cluster.run(first_safe)
    assert [order.node for order in cluster.ordered(m.Safe)] == ["n0", "n1", "n2", "n3", "n4"]
    for rank in range(4):
        for area, owner in enumerate(cluster.areas[rank]):
            held = cluster.nodes[cluster.cluster.ranks[rank]].arena[area, 0]
            assert (held.rank, held.step, held.intact) == (owner, 0, True)


def test_resume_from_a_published_checkpoint() -> None:
    seven = Content(0, 20, 7, 0)
    files = {r: (f"rank-{r:04d}.h5", NBYTES, Content(r, 20, seven.state, 0).true_checksum) for r in range(4)}
    cluster = finish(Simulation(published=Checkpoint(20, files)))
    assert plan_of(cluster, 1)["step"] == 20
    assert tiers(cluster, 1) == ["persistent"] * 4
    assert {order.name for order in cluster.ordered(m.Load)} == {files[r][0] for r in range(4)}
    assert [note["step"] for note in cluster.said("persisted")] == [30]


# --- one loss ---------------------------------------------------------------------------------------


def test_a_lost_node_is_replaced_by_the_spare_which_fetches_from_the_holder() -> None:
    cluster = started()
    cluster.kill_node("n2")
    finish(cluster)
    assert tiers(cluster, 2) == ["local", "local", "peer", "local"]
    move = plan_of(cluster, 2)["moves"][2]
    assert (move["node"], move["source"]) == ("n4", "n3")
    assert [(n["target"], n["rank"]) for n in cluster.said("promote") if n["generation"] == 2] == [("n4", 2)]
    assert [(n["source"], n["tier"]) for n in cluster.said("fetched")] == [("n3", "peer")]
    assert cluster.ordered(m.Retire) == [m.Retire("n2", 2)]
    assert {order.node for order in cluster.ordered(m.Gone)} == {"n0", "n1", "n3", "n4"}
    assert [note["generation"] for note in cluster.said("protected")] == [1, 2]
    assert cluster.ordered(m.RestartWorker) == []


@pytest.mark.parametrize(("nodes", "form"), [(4, "mixed"), (5, "mixed"), (5, "ring"), (5, "overlap"), (5, "full_tail")])
def test_after_a_recovery_nothing_is_read_but_what_was_lost(nodes: int, form: Form) -> None:
    """The spare's own snapshot, and the replicas that the lost node held of others: the fewest bytes."""
    cluster = started(nodes=nodes + 1, world_size=nodes, placement=form)
    lost = nodes - 1
    cluster.kill_node(cluster.cluster.ranks[lost])
    cluster.run(lambda c: c.running() and any(event["generation"] == 2 for event in c.said("safe")))
    at_step = plan_of(cluster, 2)["step"]
    read = [(pull.node, pull.rank) for pull in cluster.ordered(m.Pull) if (pull.generation, pull.step) == (2, at_step)]
    spare = cluster.cluster.ranks[lost]
    assert sorted(read) == sorted((spare, rank) for rank in held_by(nodes, 2, form)[lost])


def test_a_lost_worker_restarts_on_its_node_and_no_spare_is_used() -> None:
    cluster = started()
    cluster.kill_worker("n1")
    finish(cluster)
    assert cluster.ordered(m.RestartWorker) == [m.RestartWorker("n1", 2)]
    assert tiers(cluster, 2) == ["local"] * 4
    assert [move["node"] for move in plan_of(cluster, 2)["moves"]] == ["n0", "n1", "n2", "n3"]
    assert all(member.alive for member in cluster.cluster.members.values())
    assert cluster.cluster.members["n1"].restarts == 0  # it works again: the next failure is a new one


def test_a_lost_idle_spare_changes_nothing_for_the_ranks() -> None:
    cluster = started()
    cluster.kill_node("n4")
    finish(cluster)
    assert cluster.cluster.generation == 1
    assert not cluster.cluster.members["n4"].alive


def test_a_lost_worker_of_a_spare_is_restarted() -> None:
    cluster = started()
    cluster.kill_worker("n4")
    cluster.run(lambda c: c.cluster.members["n4"].worker is Worker.BUILDING)
    cluster.run(lambda c: c.cluster.members["n4"].worker is Worker.IDLE)
    assert cluster.cluster.generation == 1
    finish(cluster)


def test_a_silent_node_is_evicted_after_the_timeout_and_a_second_look() -> None:
    cluster = started(total_steps=200)
    since = cluster.now
    cluster.mute("n3")
    cluster.run(lambda c: c.cluster.generation == 2)
    assert 1.2 < cluster.now - since < 1.2 + 0.5 + 0.5
    assert [note["evidence"] for note in cluster.said("suspect")] == ["heartbeat"]
    finish(cluster, 200)


def test_a_broken_connection_alone_is_forgiven_when_the_node_speaks_again() -> None:
    cluster = started()
    cluster.take(m.Disconnected("n3"))
    cluster.run(lambda c: bool(c.said("cleared")))
    finish(cluster)
    assert cluster.cluster.generation == 1


def test_a_broken_connection_and_the_trouble_of_a_peer_are_enough() -> None:
    cluster = started()
    cluster.mute("n3")
    cluster.take(m.Disconnected("n3"))
    assert cluster.cluster.generation == 1
    cluster.take(m.Trouble("n0", 1, "connection reset"))
    assert cluster.cluster.generation == 2
    assert not cluster.cluster.members["n3"].alive


def test_a_failed_collective_without_any_dead_ends_in_a_new_generation_of_the_same_nodes() -> None:
    cluster = started()
    cluster.nodes["n0"].worker.fail("a collective timed out")
    finish(cluster)
    assert cluster.cluster.generation == 2
    assert tiers(cluster, 2) == ["local"] * 4
    assert cluster.said("evict") == []


def test_our_own_stall_evicts_nobody() -> None:
    cluster = started(total_steps=200)
    cluster.pause("n0", 1.0)
    cluster.run_for(4.0)
    assert cluster.cluster.generation == 1
    assert cluster.said("evict") == []
    finish(cluster, 200)


# --- more than one loss -----------------------------------------------------------------------------


def test_two_nodes_of_different_groups_are_recovered_from_memory() -> None:
    cluster = started(nodes=6)
    cluster.kill_node("n1")
    cluster.kill_node("n2")
    finish(cluster)
    last = cluster.said("plan")[-1]
    assert last["step"] >= 3
    assert sorted(move["tier"] for move in last["moves"]) == ["local", "local", "peer", "peer"]


def test_a_whole_group_lost_goes_back_to_the_newest_checkpoint_all_together() -> None:
    cluster = Simulation(rules(nodes=6)).run(lambda c: c.cluster.published is not None and c.reached(14))
    published = cluster.cluster.published
    assert published is not None
    cluster.kill_node("n2")
    cluster.kill_node("n3")
    finish(cluster)
    last = cluster.said("plan")[-1]
    assert last["step"] == published.step
    assert [move["tier"] for move in last["moves"]] == ["persistent"] * 4


def test_a_whole_group_lost_before_any_checkpoint_starts_afresh() -> None:
    cluster = started(nodes=6)
    cluster.kill_node("n0")
    cluster.kill_node("n1")
    finish(cluster)
    assert cluster.said("plan")[-1]["step"] == -1


def test_another_node_is_lost_while_the_first_is_being_replaced() -> None:
    cluster = started(nodes=6)
    cluster.kill_node("n2")
    cluster.run(lambda c: c.cluster.phase is Phase.GATHERING and c.cluster.generation == 2)
    cluster.kill_node("n1")
    finish(cluster)
    assert cluster.cluster.generation == 3
    assert sorted(tiers(cluster, 3)) in (["local", "local", "peer", "peer"], ["local", "local", "local", "peer"])


def test_another_node_is_lost_while_the_group_forms() -> None:
    cluster = started(nodes=6)
    cluster.kill_node("n2")
    cluster.run(lambda c: c.cluster.phase is Phase.JOINING and c.cluster.generation == 2)
    cluster.kill_node("n1")
    finish(cluster)
    assert cluster.cluster.generation == 3
    assert "persistent" not in tiers(cluster, 3)


def test_the_spare_is_lost_while_it_fetches() -> None:
    cluster = started(nodes=6)
    cluster.kill_node("n2")
    cluster.run(lambda c: bool(c.said("fetch_started")))
    cluster.kill_node(cluster.cluster.ranks[2])
    finish(cluster)
    assert {note["tier"] for note in cluster.said("fetched")} == {"peer"}
    assert cluster.cluster.ranks[2] == "n5"


def test_out_of_nodes_saves_the_newest_complete_step_and_stops() -> None:
    cluster = started(nodes=4)
    cluster.kill_node("n3")
    cluster.run(Simulation.over)
    assert cluster.cluster.outcome == "suspended"
    published = cluster.cluster.published
    assert published is not None
    assert published.step >= 3
    files = {rank: cluster.files[published.step, rank, published.files[rank][2]] for rank in range(4)}
    cluster.invariants.one_history(published.step, files)
    assert m.Finish("", "suspended", cluster.said("run")[-1]["reason"]) in cluster.orders


# --- data that cannot be had ------------------------------------------------------------------------


def test_a_copy_with_a_wrong_checksum_is_dropped_and_an_older_step_is_taken() -> None:
    """Rank 2's only other copy of the newest step is damaged: all go back to the step before."""
    cluster = started()
    cluster.intercept = lambda event: isinstance(event, m.Copied) and event.rank == 1 and event.area == 1
    cluster.run(lambda c: bool(c.held))  # from here on nothing becomes safe, so two steps are in memory
    held = cluster.held[0][2]
    assert isinstance(held, m.Copied)
    cluster.run_for(0.3)
    newest = held.step
    assert cluster.cluster.safe_step < newest
    (area, half) = next((c.area, c.half) for n, c in cluster.cluster.copies[2, newest].items() if n == "n3")
    cluster.corrupt("n3", area, half)
    safe = cluster.cluster.safe_step
    cluster.kill_node("n2")
    cluster.run(lambda c: c.cluster.generation >= 3)
    cluster.held, cluster.intercept = [], None
    assert plan_of(cluster, 2)["step"] == newest
    assert plan_of(cluster, 3)["step"] == safe
    assert "checksum" in [note["reason"] for note in cluster.said("copy_failed")]


def test_a_copy_with_a_wrong_checksum_is_taken_from_the_other_holder() -> None:
    cluster = started(nodes=5, world_size=3, replicas=3)
    bad = cluster.cluster.copies[1, cluster.cluster.safe_step]["n2"]
    for half in (0, 1):
        cluster.corrupt("n2", bad.area, half)
    cluster.kill_node("n1")
    finish(cluster)
    assert [note["source"] for note in cluster.said("fetched")] == ["n0"]
    assert {plan["step"] for plan in cluster.said("plan")[1:]} == {plan_of(cluster, 2)["step"]}


def test_a_lost_window_host_costs_a_new_world_and_nothing_else() -> None:
    cluster = started()
    cluster.crash_host("n2")
    finish(cluster)
    assert cluster.cluster.generation == 1
    assert cluster.cluster.world.number == 2
    assert [note["state"] for note in cluster.said("world")] == ["started", "ready", "started", "ready"]
    assert [note["target"] for note in cluster.said("host_lost")] == ["n2"]


def test_a_persist_that_fails_is_tried_again_at_the_next_interval() -> None:
    cluster = Simulation()
    cluster.persist_fails = lambda order: order.step < 15 and order.rank == 2
    finish(cluster)
    assert cluster.said("persist_failed")
    assert min(note["step"] for note in cluster.said("persisted")) >= 20


def test_the_last_checkpoint_that_cannot_be_written_does_not_hold_up_the_end() -> None:
    cluster = Simulation()
    cluster.persist_fails = lambda order: order.step == 30
    cluster.run(Simulation.over)
    assert cluster.cluster.outcome == "failed"
    assert "could not be published" in cluster.said("run")[-1]["reason"]


def test_the_last_checkpoint_that_is_never_answered_does_not_hold_up_the_end() -> None:
    cluster = Simulation()
    cluster.intercept = lambda event: isinstance(event, m.Persisted) and event.step == 30
    cluster.run(Simulation.over)
    assert cluster.cluster.outcome == "failed"
    assert "could not be published" in cluster.said("run")[-1]["reason"]


# --- bounds -----------------------------------------------------------------------------------------


def test_a_worker_that_keeps_failing_costs_its_node_the_rank() -> None:
    cluster = started(total_steps=200)
    for _ in range(4):
        cluster.run(
            lambda c: c.nodes["n1"].worker.alive and c.nodes["n1"].worker.state in ("building", "joining", "training")
        )
        cluster.kill_worker("n1")
        lost = len(cluster.said("evict"))
        cluster.run(lambda c, lost=lost: len(c.said("evict")) > lost)
    assert cluster.cluster.members["n1"].worker is Worker.FAILED
    assert len(cluster.ordered(m.RestartWorker)) == 3
    finish(cluster, 200)
    assert cluster.cluster.ranks[1] == "n4" and cluster.cluster.members["n1"].alive


@pytest.mark.parametrize("ranks", [(1,), (0, 1), (0, 2), (0, 1, 2, 3)])
@pytest.mark.parametrize("spares", [0, 2])
def test_workers_that_keep_failing_cost_nothing_that_lies_in_memory(ranks: tuple[int, ...], spares: int) -> None:
    """What is wrong with the user's code is wrong on every node: it ends with the newest step saved, and says why."""
    cluster = started(nodes=4 + spares, total_steps=200, persist_every=100)
    safe = 0
    while not cluster.over():
        cluster.run(lambda c: c.over() or (c.running() and c.reached(5)))
        safe = max(safe, cluster.cluster.safe_step)
        for rank in () if cluster.over() else ranks:
            cluster.kill_worker(cluster.cluster.ranks[rank])
        cluster.run(lambda c: c.over() or not c.running())
    assert cluster.outcome == "stopped" and "failed 4 times in a row: killed by SIGKILL" in cluster.reason
    assert max(cluster.manifests) == safe >= 4
    assert not [said for said in cluster.said("plan")[1:] if said["step"] < 4]


@pytest.mark.parametrize("max_restarts", [0, 1])
def test_nobody_is_given_up_for_a_worker_while_the_run_is_saved(max_restarts: int) -> None:
    cluster = started(nodes=4, total_steps=400, persist_every=100, max_restarts=max_restarts)
    cluster.persist_s = 1.0
    for _ in range(max_restarts):
        before = cluster.cluster.generation
        for node in ("n0", "n1"):
            cluster.kill_worker(node)
        cluster.run(lambda c, before=before: c.running() and c.cluster.generation > before)
    safe = cluster.cluster.safe_step
    cluster.suspend()
    cluster.run(lambda c: c.cluster.phase is Phase.SAVING)
    for node in ("n0", "n1"):
        cluster.kill_worker(node)
    cluster.run(Simulation.over)
    assert cluster.outcome == "suspended" and max(cluster.manifests) >= safe > 0


def test_a_worker_that_is_not_built_in_time_makes_way_for_a_spare() -> None:
    cluster = started(total_steps=400)
    cluster.build_s = 1000.0
    cluster.kill_worker("n1")
    cluster.run(lambda c: c.running() and c.cluster.ranks[1] == "n4")
    assert len(cluster.ordered(m.RestartWorker)) == 2


def test_a_spare_whose_worker_fails_now_and_then_remains_one() -> None:
    cluster = started(total_steps=4000, persist_every=1000)
    for _ in range(5):
        cluster.run(lambda c: c.cluster.members["n4"].worker is Worker.IDLE)
        cluster.run_for(2 * cluster.rules.build_s)
        cluster.kill_worker("n4")
        cluster.run(lambda c: c.cluster.members["n4"].worker is not Worker.IDLE)
    assert cluster.cluster.members["n4"].able


def test_generations_without_a_single_step_end_the_run() -> None:
    cluster = Simulation(rules(max_fruitless=3))
    cluster.step_s = 1000.0
    for generation in range(1, 5):
        cluster.run(lambda c, g=generation: c.running() and c.cluster.generation == g)
        cluster.tell(m.Trouble("n0", generation, "nothing works"))
    cluster.run(Simulation.over)
    assert cluster.cluster.outcome == "stopped"
    assert cluster.cluster.generation == 4


def test_steps_that_are_only_done_again_end_the_run() -> None:
    """A worker fails in step 8 every time; that step 7 is done each time brings the run no further."""
    cluster = Simulation(rules(max_fruitless=3, max_restarts=9, total_steps=200))
    cluster.step_s = 1.0
    lost = 0
    while not cluster.over() and lost < 20:
        cluster.run(lambda c: c.over() or (c.running() and c.reached(7)))
        if not cluster.over():
            assert not cluster.reached(8)
            lost += 1
            cluster.kill_worker("n1")
            cluster.run(lambda c: c.over() or not c.running())
    assert cluster.cluster.outcome == "stopped"
    assert lost == 5  # the first generation came further, and four did not


def test_a_worker_that_could_not_be_helped_by_another_stops_the_run() -> None:
    """Its training diverges: what is safe is saved, and nobody tries again."""
    cluster = started()
    cluster.run(lambda c: c.cluster.safe_step >= 2)
    for name in ("n1", "n2"):  # every rank may say so; nothing is saved twice
        cluster.tell(m.WorkerLost(name, "the training diverges", True))
    cluster.run(Simulation.over)
    assert len(cluster.ordered(m.Persist)) == cluster.rules.world_size
    assert cluster.cluster.outcome == "stopped" and "diverges" in cluster.cluster.stopping
    assert cluster.cluster.published is not None and cluster.cluster.published.step >= 2
    assert not cluster.ordered(m.RestartWorker)


def test_a_worker_that_does_not_leave_is_restarted() -> None:
    cluster = started()
    cluster.nodes["n0"].worker.stuck = True
    cluster.kill_node("n2")
    finish(cluster)
    assert cluster.ordered(m.RestartWorker) == [m.RestartWorker("n0", 3)]


def test_a_training_that_hangs_without_a_failed_collective_starts_again() -> None:
    """All wait for data that do not come, say. Named in the status long before."""
    cluster = started()
    cluster.run(lambda c: c.cluster.safe_step >= 2)
    for name in ("n0", "n1", "n2", "n3"):
        cluster.nodes[name].worker.stuck = True
    cluster.intercept = lambda event: isinstance(event, m.Trouble)
    cluster.run_for(rules().progress_s / 2)
    shown = describe(cluster.cluster, cluster.now)
    assert [line.split(" to do step ")[0] for line in shown["waiting_for"]] == [f"rank {r} on n{r}" for r in range(4)]
    assert shown["waiting_s"] > rules().progress_s / 3
    assert cluster.cluster.generation == 1
    cluster.run(lambda c: len(c.ordered(m.RestartWorker)) == 4)
    assert "recovery.progress_s" in cluster.said("abort")[0]["reason"]
    cluster.intercept = None
    finish(cluster)
    assert plan_of(cluster, 2)["step"] >= 2 and tiers(cluster, 2) == ["local"] * 4


def test_the_last_step_is_persisted_though_it_could_not_be_replicated() -> None:
    cluster = started()
    cluster.network.cut(cluster.lines_between(["n2"], ["n3"]))  # of one group; the coordinator is another
    finish(cluster)
    assert max(note["step"] for note in cluster.said("safe")) < 30


def lagging(break_it: Callable[[Simulation], None], nodes: int) -> Simulation:
    """A long training of four ranks, of which from early on not every replica can be written; a minute of it."""
    cluster = started(nodes=nodes, total_steps=5000, persist_every=5000)
    break_it(cluster)
    cluster.run(lambda c: bool(c.said("unprotected")))
    return cluster.run_for(60.0)


@pytest.mark.parametrize("what", ["host", "link"])
def test_where_replicas_cannot_be_written_checkpoints_take_their_place(what: str) -> None:
    def break_it(cluster: Simulation) -> None:
        if what == "host":
            cluster.lose_host("n1")
            cluster.lose_host("n4")  # else this one would take its rank
        else:
            cluster.network.cut(cluster.lines_between(["n2"], ["n3"]))

    cluster = lagging(break_it, nodes=5)
    shown, now = describe(cluster.cluster, cluster.now), min(cluster.cluster.stepped.values())
    assert not shown["protected"]
    assert any(line.startswith("replicas: ") for line in shown["waiting_for"])
    saved = [note["step"] for note in cluster.said("persisted")]
    assert 4 <= len(saved) <= 7, "one in ten seconds"
    assert now - max(saved) < 25 / cluster.step_s, "each of a snapshot taken when the one before was on disk"
    cluster.kill_node("n2" if what == "host" else "n0")
    cluster.run(lambda c: len(c.said("plan")) > 1)
    assert cluster.said("plan")[-1]["step"] >= max(saved)


def test_replicas_that_can_be_written_again_protect_again() -> None:
    cluster = lagging(lambda sim: sim.lose_host("n1"), nodes=4)
    assert {note["target"] for note in cluster.said("no_host")} == {"n1"}
    cluster.no_host.clear()
    cluster.run(lambda c: len(c.said("protected")) == 2)
    assert describe(cluster.cluster, cluster.now)["protected"]
    saved = len(cluster.said("persisted"))
    cluster.run_for(30.0)
    assert len(cluster.said("persisted")) == saved


@pytest.mark.parametrize("broken", ["n0", "n2", "n4"])
def test_where_no_window_host_starts_another_node_takes_the_rank(broken: str) -> None:
    """A spare is only left out of the MPI world; either way all is protected again, and a node may be lost."""
    cluster = started(nodes=6, total_steps=5000, persist_every=5000)
    cluster.lose_host(broken)
    cluster.run(lambda c: bool(c.said("no_host")), 120.0)
    cluster.run(lambda c: broken not in c.cluster.ranks.values() and not c.cluster.exposed, 60.0)
    assert [note["target"] for note in cluster.said("no_host")] == [broken]
    avoided = {n["node"]: n["avoided_for"] for n in describe(cluster.cluster, cluster.now)["nodes"] if n["avoided_for"]}
    assert avoided == {broken: ["no window host starts on it"]}
    assert len(cluster.said("plan")) == (1 if broken == "n4" else 2)
    safe = cluster.cluster.safe_step
    cluster.kill_node("n1")
    cluster.run(lambda c: "n1" not in c.cluster.ranks.values() and c.running() and not c.cluster.exposed)
    assert cluster.said("plan")[-1]["step"] >= safe and tiers(cluster, len(cluster.said("plan"))).count("peer") == 1
    worlds = cluster.cluster.worlds
    cluster.run_for(100.0)
    assert cluster.cluster.worlds <= worlds + 2, "it gets another chance, but rarely"
    cluster.no_host.clear()
    cluster.run(
        lambda c: all(m.host_world == c.cluster.world.number for m in c.cluster.members.values() if m.alive), 200
    )


def test_whose_host_is_the_first_to_go_is_left_out_first() -> None:
    cluster = started(nodes=6, total_steps=5000, persist_every=5000)
    cluster.bad_host.add("n2")
    cluster.crash_host("n2")
    cluster.run(lambda c: bool(c.said("no_host")), 120.0)
    without = [note["reason"] for note in cluster.said("world") if note["reason"].startswith("without")]
    assert without == ["without n2"] * 2, "once more after it was tried with all"
    assert all(
        member.blamed == member.absences == 0 for member in cluster.cluster.members.values() if member.host_world
    )


def test_two_nodes_on_which_no_window_host_begins_are_left_out_together() -> None:
    cluster = started(nodes=7, total_steps=5000, persist_every=5000)
    cluster.lose_host("n1")
    cluster.lose_host("n5")
    cluster.run(lambda c: "n1" not in c.cluster.ranks.values() and not c.cluster.exposed, 120.0)
    assert [note["target"] for note in cluster.said("no_host")] == ["n1", "n5"]


def test_nobody_is_to_blame_for_worlds_that_another_did_not_let_start() -> None:
    """It died meanwhile; or none could be started anywhere, for a while."""
    cluster = started(nodes=7, total_steps=5000, persist_every=5000)
    cluster.lose_host("n2")
    cluster.run(lambda c: c.cluster.world.failures >= 3, 60.0)
    cluster.kill_node("n2")
    cluster.run(lambda c: c.running() and not c.cluster.exposed)
    assert not any("without" in note["reason"] for note in cluster.said("world"))
    cluster.lose_launcher(4.0)
    cluster.run(lambda c: c.cluster.world.failures >= 3, 60.0)
    cluster.run(lambda c: c.cluster.world.state == "ready" and not c.cluster.world.left_out, 60.0)
    cluster.run_for(20.0)
    assert not cluster.said("no_host") and not any(m.hostless or m.doubted for m in cluster.cluster.members.values())


def test_a_move_from_a_node_without_a_host_costs_no_training() -> None:
    cluster = started(nodes=6, total_steps=5000, persist_every=5000)
    cluster.lose_host("n2")
    cluster.run(lambda c: len(c.said("plan")) > 1, 120.0)
    assert cluster.said("plan")[-1]["step"] >= cluster.most_trained - 3.0 / cluster.step_s


def test_where_the_persistent_tier_is_down_a_rank_stays_where_it_can_be_restored() -> None:
    cluster = started(nodes=6, total_steps=5000, persist_every=5000)
    cluster.lose_host("n2")

    def moves(sim: Simulation) -> bool:
        """What is in memory is about to be written: from now on it cannot be."""
        if any(note["reason"].startswith("step ") for note in sim.said("save")):
            sim.no_writes |= set(sim.rules.nodes)
        return len(sim.said("plan")) > 1

    cluster.run(moves, 120.0)
    assert tiers(cluster, 2) == ["local"] * 4 and cluster.cluster.ranks[2] == "n2"
    cluster.run_for(60.0)
    assert len(cluster.said("plan")) == 2
    cluster.no_writes.clear()
    cluster.run(lambda c: "n2" not in c.cluster.ranks.values() and not c.cluster.exposed, 120.0)


def test_a_takeover_remembers_on_whom_no_host_starts() -> None:
    """And the rank of the lost one goes to a spare that is in the MPI world, while that one still is."""
    cluster = started(nodes=7, total_steps=5000, persist_every=5000)
    cluster.lose_host("n4")
    cluster.run(lambda c: bool(c.said("no_host")) and not c.cluster.exposed, 120.0)
    cluster.pull_s = 1.0  # longer than it takes to notice that one has no host
    cluster.kill_node("n0")
    cluster.run(lambda c: c.running() and "n0" not in c.cluster.ranks.values(), 2.0)
    assert "n4" not in cluster.cluster.ranks.values()
    cluster.run(lambda c: len(c.said("no_host")) > 1 and c.cluster.world.state == "ready", 60.0)


@pytest.mark.parametrize("kind", ["drain", "host"])
def test_a_rank_that_was_given_away_does_not_come_straight_back(kind: str) -> None:
    """Though its node is idle and has an engine that is built as this rank."""
    cluster = started(nodes=6, total_steps=5000, persist_every=5000)
    if kind == "drain":
        cluster.drain("n2")
    else:
        cluster.lose_host("n2")
    cluster.run(lambda c: len(c.said("plan")) > 1, 120.0)
    cluster.run(lambda c: c.running() and not c.cluster.exposed)
    assert "n2" not in cluster.cluster.ranks.values() and len(cluster.said("plan")) == 2


def test_a_holder_outside_the_mpi_world_is_not_asked() -> None:
    cluster = started(nodes=6, world_size=3, replicas=3, total_steps=5000, persist_every=5000)
    cluster.lose_host("n0")
    cluster.kill_node("n2")
    cluster.run(lambda c: c.running() and c.cluster.generation > 1, 2.0)
    assert tiers(cluster, 2).count("peer") == 1


def test_whoever_cannot_publish_is_asked_last() -> None:
    cluster = started(total_steps=5000, persist_every=5000)
    safe = cluster.cluster.safe_step
    cluster.no_writes.add("n0")
    cluster.suspend()
    cluster.run(Simulation.over, 20.0)
    assert max(cluster.manifests) >= safe
    assert len(cluster.ordered(m.Publish)) < 10


def test_what_is_damaged_is_not_saved_again_and_again() -> None:
    """An older step that is whole is, and in time."""
    cluster = started(total_steps=5000, persist_every=5000)
    newest, _ = newest_complete(cluster.cluster.copies, 4)
    damaged = 0
    for node in cluster.nodes.values():
        for (area, half), content in list(node.arena.items()):
            if (content.rank, content.step) == (1, newest):
                cluster.corrupt(node.name, area, half)
                damaged += 1
    cluster.suspend()
    cluster.run(Simulation.over, 5.0)
    assert damaged and newest - 2 <= max(cluster.manifests) < newest


def test_after_a_resume_without_replication_checkpoints_go_on() -> None:
    """Nobody need write the step again from which all went on."""
    checksums = {rank: Content(rank, 20, 7, 0).true_checksum for rank in range(4)}
    checkpoint = Checkpoint(20, {rank: (f"rank-{rank:04d}.h5", NBYTES, sum_) for rank, sum_ in checksums.items()})
    cluster = Simulation(rules(total_steps=5000, persist_every=5000), published=checkpoint)
    cluster.no_worlds_until = 1000.0
    cluster.run(lambda c: len(c.said("persisted")) > 2, 120.0)
    assert 20 not in [order.step for order in cluster.ordered(m.Persist)]


def test_a_read_whose_source_has_no_host_waits_for_a_new_world_and_no_longer() -> None:
    cluster = started(nodes=6, total_steps=5000, persist_every=5000)
    cluster.kill_node("n0")
    cluster.crash_host("n1")
    cluster.run(lambda c: c.running() and "n0" not in c.cluster.ranks.values(), 3.0)
    assert cluster.said("plan")[-1]["step"] >= cluster.most_trained - 5 and not cluster.said("save")


def test_a_drained_node_is_left_when_another_is_ready() -> None:
    cluster = started(total_steps=5000, persist_every=5000)
    cluster.build_s = 4.0
    cluster.kill_worker("n4")
    cluster.drain("n2")
    cluster.run_for(2.0)
    assert cluster.cluster.generation == 1
    cluster.run(lambda c: c.running() and "n2" not in c.cluster.ranks.values(), 5.0)


def test_what_its_owner_cannot_write_to_the_persistent_tier_is_written_by_its_partner() -> None:
    cluster = started(total_steps=60)
    cluster.no_writes.add("n1")
    finish(cluster, 60)
    assert [note["step"] for note in cluster.said("persisted")][-4:] == [30, 40, 50, 60]
    assert [note["target"] for note in cluster.said("persist_failed")] == ["n1"]


def test_what_an_owner_overwrote_before_it_heard_that_it_was_safe_does_not_cost_the_older_one() -> None:
    """The last snapshots are taken while reports are on their way. Then the coordinator learns, one by one, that
    a step is safe, that the last one lies in its place, and that a node is gone."""
    cluster = started(nodes=3, world_size=2, total_steps=10, join_s=2.0)
    cluster.kill_node("n2")

    def almost_safe(sim: Simulation) -> bool:
        pull = sim.cluster.pulls.get("n0")
        return pull is not None and "n1" in sim.cluster.copies.get((0, pull.step), {})

    cluster.run(almost_safe)
    before, newer = cluster.cluster.safe_step, cluster.cluster.pulls["n0"].step
    cluster.intercept = lambda event: isinstance(event, (m.Copied, m.Sealed, m.Stepped))
    cluster.run_for(3.0)
    assert {content.step for content in cluster.nodes["n1"].arena.values()} == {before, newer, 10}
    cluster.release()
    cluster.run(lambda c: c.cluster.safe_step == newer and "n0" not in c.cluster.copies[0, newer])
    cluster.kill_node("n1")
    cluster.run(Simulation.over)
    assert cluster.outcome == "suspended" and cluster.manifests.keys() == {before}


def test_an_inventory_that_is_lost_is_told_again() -> None:
    """The lines of the first coordinator break before anybody has reported."""
    cluster = Simulation()
    cluster.run(lambda c: c.leader is not None)
    cluster.cut(cluster.lines_between(["n0"], ["n1", "n2", "n3", "n4"]), 0.3, broken=True)
    finish(cluster)
    assert not cluster.said("evict")


def test_the_rank_that_others_wait_for_is_named() -> None:
    cluster = started(total_steps=1000)
    cluster.intercept = lambda event: isinstance(event, m.Stepped) and event.node == "n2"
    cluster.run(lambda c: c.cluster.stepped.get(0, 0) > c.cluster.stepped.get(2, 0) + 1)
    cluster.intercept = lambda event: isinstance(event, (m.Stepped, m.Trouble))
    cluster.run_for(6.0)
    (line,) = describe(cluster.cluster, cluster.now)["waiting_for"]
    assert line == f"rank 2 on n2 to do step {cluster.cluster.stepped[2] + 1}"


# --- the past ---------------------------------------------------------------------------------------


def test_messages_of_an_old_generation_and_of_strangers_change_nothing() -> None:
    cluster = started(total_steps=1000)
    cluster.kill_node("n2")
    cluster.run(lambda c: c.cluster.generation == 2 and c.running() and c.reached(10))
    place = (0, 0, NBYTES, 1)
    for event in (
        m.Stepped("n0", 1, 0, 999, 0.0, 0.0, 0.0),
        m.Resumed("n0", 1, 0, 5, 1.0, "hot_swap", 0.0, 0.0, 0.0),
        m.Sealed("n0", 1, 0, 999, *place[1:]),
        m.Sealed("n0", 2, 3, 999, *place[1:]),
        m.Copied("n0", 1, 1, 999, "n1", 1, 0, NBYTES, 1, True, "", 0.0),
        m.Trouble("n0", 1, "old"),
        m.Parked("n0", 1, "elsewhere"),
        m.HostReady("n0", 0, ("n0",)),
        m.HostLost("n0", 0, "old"),
        m.WorldFailed("", 0, "old"),
        m.Persisted("n0", 0, 3, "x", 1, 1, True, "", 0.0),
    ):
        before = cluster.cluster
        commands = list(cluster.take(event))
        assert cluster.cluster.members["n0"].heard == cluster.cluster.last_turn
        changed = {
            name
            for name in vars(before)
            if getattr(before, name) != getattr(cluster.cluster, name) and name not in ("members", "last_turn")
        }
        assert (changed, commands) == (set(), []), event
    for event in (m.WorkerLost("n2", "late", False), m.Heartbeat("stranger", 0.0), m.NodeExited("n2", "twice")):
        before = cluster.cluster
        assert cluster.take(event) == ()
        assert replace(cluster.cluster, last_turn=before.last_turn) == before


def test_nothing_is_said_after_the_end() -> None:
    state = finish(Simulation()).cluster
    for event in (m.NodeExited("n0", "gone"), m.Tick(""), m.WorkerLost("n1", "gone", False)):
        assert step(state, 1e6, event) == (state, [])


@pytest.mark.parametrize("at", ["start", "running", "gathering", "over"])
def test_what_is_shown_is_json_and_names_what_is_awaited(at: str) -> None:
    import json

    cluster = Simulation()
    if at == "running":
        cluster = started()
    if at == "gathering":
        cluster = started()
        cluster.kill_node("n2")
        cluster.run(lambda c: c.cluster.phase is Phase.GATHERING)
    if at == "over":
        finish(cluster)
    shown = describe(cluster.cluster, cluster.now)
    json.dumps(shown, allow_nan=False)
    assert bool(shown["waiting_for"]) == (at in ("start", "gathering"))


def test_who_is_to_publish_what_was_saved_is_named() -> None:
    cluster = started(persist_every=1000)
    cluster.obeyed = lambda order: not isinstance(order, m.Publish)
    cluster.suspend()
    cluster.run(lambda c: c.cluster.phase is Phase.SAVING and len(c.cluster.files) == 4)
    state = cluster.cluster
    said = f"{state.publisher} to publish the checkpoint of step {state.persisting}"
    assert describe(state, cluster.now)["waiting_for"] == [said]
