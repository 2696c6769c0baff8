"""Bad moments: each test is the shortest story in which a wrong decision would lose steps, hang, or mix histories."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gemini_hpc.arena import OWN, Arena, Geometry, Record, State
from gemini_hpc.core import messages as m
from gemini_hpc.core.state import NUMBERS_OF_A_TERM, Checkpoint, Phase, Worker
from tests.scenarios.node import copied
from tests.scenarios.simulation import NBYTES, Content, Simulation, rules
from tests.scenarios.test_recoveries import finish, plan_of, started


def two_steps_in_memory(cluster: Simulation) -> int:
    """Hold one replica's report back, so that a step is sealed by all owners but not safe; return that step."""
    cluster.intercept = lambda event: isinstance(event, m.Copied) and event.rank == 1 and event.area == 1
    cluster.run(lambda c: bool(c.held))
    cluster.run_for(0.3)
    held = cluster.held[0][2]
    assert isinstance(held, m.Copied)
    assert cluster.cluster.safe_step < held.step
    return held.step


def checkpoint_of(step: int) -> Checkpoint:
    return Checkpoint(step, {r: (f"r{r}.h5", NBYTES, Content(r, step, 7, 0).true_checksum) for r in range(4)})


# --- the end of the run -----------------------------------------------------------------------------


@pytest.mark.parametrize("failure", ["kill_node", "kill_worker"])
def test_a_failure_after_the_last_step_does_not_keep_the_run_from_ending(failure: str) -> None:
    cluster = Simulation()
    cluster.persist_s = 1.0
    cluster.run(lambda c: c.cluster.done_since >= 0 and c.cluster.safe_step == 30)
    getattr(cluster, failure)("n2")
    finish(cluster)


def test_a_run_that_is_resumed_from_its_last_checkpoint_is_done() -> None:
    finish(Simulation(published=checkpoint_of(30)))


# --- copies that are dropped ------------------------------------------------------------------------


def test_a_replica_that_proves_damaged_while_a_generation_is_gathered() -> None:
    """The failed read takes away the very copy that the plan lets its owner restore."""
    cluster = started()
    newest = two_steps_in_memory(cluster)
    pulls = cluster.held[0][2]
    assert isinstance(pulls, m.Copied)
    cluster.kill_node("n2")
    cluster.run(lambda c: c.cluster.generation == 2 and c.cluster.phase is Phase.GATHERING)
    assert plan_of(cluster, 2)["step"] == newest
    cluster.intercept = None
    cluster.take(m.Copied("n0", 1, 1, newest, "n1", 1, pulls.half, NBYTES, pulls.checksum, False, "checksum", 0.1))
    finish(cluster)


def test_the_answer_to_an_abandoned_read_does_not_fail_its_successor() -> None:
    """m = 3: the owner and then one holder die; the last holder's good copy must be used, not thrown away."""
    cluster = Simulation(rules(nodes=6, world_size=3, replicas=3, total_steps=200, persist_every=200))
    cluster.run(lambda c: c.running() and c.cluster.safe_step >= 5)
    cluster.pull_s = 0.5
    cluster.kill_node("n0")
    cluster.run(lambda c: bool(c.said("fetch_started")))
    source = cluster.said("fetch_started")[0]["source"]
    cluster.run_for(0.1)
    cluster.kill_node(source)
    finish(cluster, 200)
    assert all(note["tier"] != "persistent" for note in cluster.said("fetch_started"))
    assert all(plan["step"] >= 5 for plan in cluster.said("plan")[1:])


def test_a_crash_of_the_window_host_during_a_fetch_does_not_cost_the_last_copy() -> None:
    """The source's memory is intact: its next window host can give what this one could not."""
    cluster = started(total_steps=100, persist_every=100)
    cluster.pull_s = 0.5
    cluster.kill_node("n2")
    cluster.run(lambda c: bool(c.said("fetch_started")))
    cluster.run_for(0.1)
    cluster.nodes["n3"].end_host(told=False)
    cluster.after(0.6, cluster.tell, m.HostLost("n3", 1, "it crashed"))  # its partner notices first
    cluster.run(lambda c: c.running() and c.cluster.generation > 1)
    assert cluster.said("plan")[-1]["step"] >= 3
    finish(cluster, 100)


def test_one_read_that_arrives_damaged_does_not_end_all_snapshots() -> None:
    """The workers wait for this step to be safe before they take the next snapshot: it must become so."""
    cluster = started(total_steps=100, persist_every=100)
    broken: list[m.Event] = []

    def damage_one(event: m.Event) -> bool:
        if broken or not (isinstance(event, m.Copied) and event.area == 1 and event.ok):
            return False
        broken.append(event)
        bad = m.Copied(**{**vars(event), "ok": False, "reason": "checksum"})
        cluster.nodes[event.node].arena.pop((event.area, event.half))
        cluster.after(0.0, cluster.take, bad)
        return True

    cluster.intercept = damage_one
    cluster.run(lambda c: bool(broken))
    before = cluster.cluster.safe_step
    cluster.run_for(1.0)
    assert cluster.cluster.safe_step > before + 2


# --- histories that were abandoned ------------------------------------------------------------------


def test_a_replica_of_an_abandoned_history_is_not_believed() -> None:
    """A read ordered in generation 1 ends in generation 2, after everybody went back behind its step."""
    cluster = started(total_steps=100, persist_every=100)
    slow: list[m.Pull] = []

    def hold_one(order: m.Command) -> bool:
        if isinstance(order, m.Pull) and order.area == 1 and order.node == "n0" and not slow:
            slow.append(order)
            return False
        return True

    cluster.obeyed = hold_one
    cluster.intercept = lambda e: isinstance(e, m.Sealed) and e.generation == 1 and e.rank == 3 and e.step >= 5
    cluster.run(lambda c: bool(slow) and bool(c.held))  # rank 3's snapshot is never sealed: the step is not complete
    (pull,) = slow
    cluster.kill_node("n3")
    cluster.run(lambda c: c.running() and c.cluster.generation == 2)
    assert plan_of(cluster, 2)["step"] < pull.step
    cluster.take(m.Copied("n0", 1, 1, pull.step, "n1", 1, pull.half, NBYTES, pull.checksum, True, "", 2.0))
    assert "n0" not in cluster.cluster.copies.get((1, pull.step), {})


def test_back_behind_the_safe_step_nothing_is_overwritten_too_early(tmp_path: Path) -> None:
    """After a return to an older checkpoint the arenas must not take their old safe step for a proof.

    The real agent on a real arena: the checkpoint of step 40 was loaded into half 0, and the step that was safe
    before the failure is 50. As long as the arena says 50, the worker finds every snapshot safe and half 0 free.
    """
    from gemini_hpc.core.account import Account
    from gemini_hpc.runtime.agent import Agent
    from gemini_hpc.runtime.archiving import Archiving

    arena = Arena.create(tmp_path / "arena", Geometry(2, 4096), "test")
    agent = Agent.__new__(Agent)
    agent._arena_maker, agent._account = SimpleNamespace(arena=arena), Account("n0")
    agent._account.generation = 1
    agent._account.informs(m.Lead("n0", "n1", 1, 0.0, True))
    agent._household = SimpleNamespace(send=lambda *order: True, start=lambda *order: None)
    agent._archiving = Archiving(agent._household, 5.0, lambda event: None)
    agent._obey(m.Safe("n0", 1, 50))
    assert arena.safe_step == 50
    arena.write_record(OWN, 0, Record(State.SEALED, 0, 40, 2, 4096))
    agent._obey(m.Join("n0", 2, 0, 40, 0, "n1:1"))
    assert arena.safe_step <= 40


def test_what_comes_too_late_or_to_the_wrong_node_changes_nothing_and_is_counted() -> None:
    from gemini_hpc.core.account import Account
    from gemini_hpc.runtime.agent import Agent
    from gemini_hpc.runtime.archiving import Archiving
    from gemini_hpc.runtime.wire import Tally

    sent: list[Any] = []
    inbox: list[tuple[str, Any]] = []
    agent = Agent.__new__(Agent)
    agent._node, agent._account = "n0", Account("n0")
    agent._arena_maker = SimpleNamespace(arena=None)
    agent._account.informs(m.Lead("n0", "n1", 1, 0.0, True))
    agent._seat = SimpleNamespace(leader="n1")
    agent._cluster = SimpleNamespace(hears=lambda node: None)
    agent._wire = SimpleNamespace(tally=Tally())
    agent._server = SimpleNamespace(receive=lambda: inbox.pop(0) if inbox else None)
    agent._household = SimpleNamespace(send=lambda *order: sent.append(order), start=lambda *order: None)
    agent._archiving = Archiving(agent._household, 5.0, lambda event: None)
    join = m.Join("n0", 3, 0, 40, 0, "n1:1")
    inbox += [
        ("n1", join),
        ("n1", m.Load("n0", 2, 0, 5, 0, 0, "file", 1)),  # of an older generation
        ("n1", m.Pull("n0", NUMBERS_OF_A_TERM + 1, 1, 0, 5, "n1", 3, 1, 0, 0, 1, 0, 10, 1, 1.0)),  # another term
        ("n1", m.Safe("n2", 3, 50)),  # for another
        ("n2", m.Join("n0", 4, 0, 50, 0, "n2:1")),  # from one who does not lead
        ("n1", m.Stepped("n1", 3, 0, 1, 0.0, 0.0, 0.0)),  # no order at all
    ]
    agent._read_orders()
    assert sent == [("worker", join)]
    assert agent._wire.tally.stale == 5


def test_a_load_that_was_overtaken_does_not_touch_the_arena() -> None:
    """It waits behind a file system that hangs, while its node joins with what lies in the arena by now."""
    from gemini_hpc.runtime.archiving import Archiving

    started, sent, told = [], [], []
    household = SimpleNamespace(send=lambda *order: sent.append(order), start=lambda *order: started.append(order))
    archiving = Archiving(household, 5.0, told.append)
    archiving.end_loads()
    assert len(started) == 1 and not told
    archiving.order(m.Persist("n0", 0, 10, 0, 0, 100, 1))
    archiving.order(m.Load("n0", 1, 0, 5, 0, 0, "file", 1))
    archiving.end_loads()
    assert len(started) == 2 and [type(event) for event in told] == [m.Copied] and not told[0].ok
    sent.clear()
    archiving.greet()
    assert [type(order) for _, order in sent] == [m.Persist]  # the next archiver goes on with it


# --- out of nodes -----------------------------------------------------------------------------------


def test_another_loss_while_the_last_state_is_saved_does_not_lose_it() -> None:
    cluster = started(nodes=4)
    cluster.persist_s = 0.5
    cluster.kill_node("n3")
    cluster.run(lambda c: c.cluster.phase is Phase.SAVING)
    cluster.run_for(0.1)
    cluster.kill_node("n0")  # of the other group: every rank still has a copy
    cluster.run(Simulation.over)
    assert cluster.cluster.published is not None, cluster.said("run")[-1]["reason"]
    assert cluster.cluster.published.step >= 3


def test_the_node_that_was_to_publish_the_last_state_may_die_too() -> None:
    """All shards are on the persistent tier; only the manifest is missing, and anybody can write that."""
    cluster = started(nodes=4)
    cluster.intercept = lambda event: isinstance(event, m.Published)
    cluster.kill_node("n3")
    cluster.run(lambda c: c.cluster.phase is Phase.SAVING and bool(c.held))
    cluster.held, cluster.intercept = [], None
    cluster.kill_node(cluster.ordered(m.Publish)[-1].node)
    cluster.run(Simulation.over)
    assert cluster.cluster.published is not None, cluster.said("run")[-1]["reason"]


def test_a_shard_that_one_holder_cannot_save_is_saved_by_the_other() -> None:
    cluster = started(nodes=4)
    cluster.persist_fails = lambda order: order.node == "n0"
    cluster.kill_node("n3")
    cluster.run(Simulation.over)
    assert cluster.cluster.published is not None, cluster.said("run")[-1]["reason"]


def test_writes_that_fail_for_a_while_do_not_give_up_a_step_that_is_whole_in_memory() -> None:
    """Nobody else holds it: the same node is asked again until it can."""
    cluster = started(nodes=4, persist_every=1000)
    newest, failed = cluster.cluster.safe_step, []

    def fails(order: m.Command) -> bool:
        failed.append(order)
        return len(failed) <= 6

    cluster.persist_fails = fails
    cluster.kill_node("n3")
    cluster.run(Simulation.over)
    assert cluster.cluster.published is not None, cluster.said("run")[-1]["reason"]
    assert cluster.cluster.published.step >= newest


def test_an_archiver_that_died_a_moment_ago_does_not_either() -> None:
    cluster = started(nodes=2, world_size=2, persist_every=1000)
    newest = cluster.cluster.safe_step
    cluster.nodes["n0"].end_archiver()
    cluster.kill_node("n1")
    cluster.run(Simulation.over)
    assert cluster.cluster.published is not None, cluster.said("run")[-1]["reason"]
    assert cluster.cluster.published.step >= newest


def test_a_write_that_lost_its_node_makes_way_for_the_next_checkpoint() -> None:
    cluster = started(persist_every=2)
    cluster.persist_s = 3.0
    cluster.run(lambda c: c.cluster.persisting >= 0)
    cluster.kill_node("n2")
    cluster.run(lambda c: bool(c.said("evict")))
    assert cluster.cluster.persisting == -1


def test_saving_may_take_as_long_as_a_checkpoint_may() -> None:
    cluster = started(nodes=4, join_s=2.0, finish_s=10.0)
    cluster.persist_s = 4.0
    cluster.kill_node("n3")
    cluster.run(Simulation.over)
    assert cluster.cluster.published is not None, cluster.said("run")[-1]["reason"]


# --- bounds -----------------------------------------------------------------------------------------


def test_a_window_host_that_never_answers_does_not_hold_up_the_recovery() -> None:
    cluster = started(total_steps=100)
    hung: list[m.Command] = []

    def hang_once(order: m.Command) -> bool:
        if isinstance(order, m.Pull) and order.area == 0 and not hung:
            hung.append(order)
            return False
        return True

    cluster.obeyed = hang_once
    cluster.kill_node("n2")
    cluster.run(lambda c: c.running() and c.cluster.generation > 1, 60.0)


def test_a_window_host_that_hangs_does_not_cost_the_copies_behind_it() -> None:
    """The only holder's host lets nobody read: a fresh world over the same arenas can (I3, I5)."""
    cluster = started(total_steps=200, persist_every=200)
    cluster.hang_host("n3")
    cluster.kill_node("n2")
    cluster.run(lambda c: c.running() and c.cluster.generation > 1, 60.0)
    assert cluster.said("plan")[-1]["step"] >= 3


def test_a_world_that_never_forms_again_does_not_hold_up_the_recovery() -> None:
    """Without windows there is still the persistent tier, and that is better than waiting for ever."""
    cluster = Simulation().run(lambda c: c.cluster.published is not None and c.running())
    cluster.start_world = lambda order: cluster.after(  # type: ignore[method-assign]
        0.1, cluster.take, m.WorldFailed("", order.world, "mpiexec ended with status 1")
    )
    cluster.crash_host("n1")
    cluster.kill_node("n2")
    cluster.run(lambda c: c.running() and c.cluster.generation > 1, 120.0)


def test_a_window_world_that_crashes_at_every_read_does_not_go_on_for_ever() -> None:
    cluster = Simulation().run(lambda c: c.cluster.published is not None and c.running())

    def crash_at_fetch(order: m.Command) -> bool:
        if isinstance(order, m.Pull) and order.area == 0:
            cluster.after(0.01, cluster.crash_host, order.source)
            return False
        return True

    cluster.obeyed = crash_at_fetch
    cluster.kill_node("n2")
    cluster.run(lambda c: c.running() and c.cluster.generation > 1, 120.0)


def test_a_shard_that_cannot_be_read_once_does_not_end_the_run() -> None:
    """A hung file system or a killed archiver is no reason to give up (I5)."""
    cluster = Simulation(published=checkpoint_of(20))
    failed: list[m.Event] = []

    def fail_once(event: m.Event) -> bool:
        if failed or not isinstance(event, m.Copied):
            return False
        failed.append(event)
        bad = m.Copied(**{**vars(event), "ok": False, "reason": "the archiver failed: it died"})
        cluster.after(0.0, cluster.take, bad)
        return True

    cluster.intercept = fail_once
    finish(cluster)


def test_one_hung_worker_does_not_cost_all_the_others_their_engines() -> None:
    """Nobody can resume while one does not come, but those who leave the group in time are not to blame."""
    cluster = started()
    cluster.obeyed = lambda order: not (isinstance(order, m.Join) and order.node == "n1" and order.generation == 2)
    cluster.kill_worker("n3")
    cluster.run(lambda c: c.cluster.phase is Phase.JOINING and c.cluster.generation == 2)
    cluster.nodes["n1"].worker.stuck = True
    finish(cluster)
    assert {order.node for order in cluster.ordered(m.RestartWorker)} == {"n3", "n1"}


# --- messages that cross each other -----------------------------------------------------------------


def test_the_late_farewell_of_a_worker_that_was_ended_is_not_its_successors() -> None:
    cluster = started()
    cluster.nodes["n0"].worker.stuck = True
    cluster.kill_node("n2")
    cluster.run(lambda c: c.cluster.members["n0"].worker is Worker.BUILDING)
    cluster.take(m.Parked("n0", 1, "n0:life1"))  # sent just before the order to end it arrived
    assert cluster.cluster.members["n0"].worker is Worker.BUILDING


def test_a_load_of_an_earlier_generation_is_not_taken_for_the_present_one() -> None:
    """The archiver would still be writing into the half from which the worker restores."""
    cluster = Simulation(published=checkpoint_of(20))
    cluster.persist_s = 1.0
    cluster.run(lambda c: len(c.ordered(m.Load)) == 4)
    cluster.run_for(0.5)
    cluster.kill_worker("n3")  # generation 2 orders all loads again
    cluster.intercept = lambda event: isinstance(event, m.Copied) and event.generation == 1
    cluster.run(lambda c: c.cluster.generation == 2 and len(c.held) == 4)
    for _, _, event in cluster.held:
        cluster.take(event)
    assert cluster.cluster.fetched == frozenset()


def test_a_checkpoint_is_published_once() -> None:
    cluster = started()
    cluster.intercept = lambda event: isinstance(event, m.Published)
    cluster.run(lambda c: bool(c.held))
    answer = next(e for _, _, e, _ in reversed(cluster.history) if isinstance(e, m.Persisted))
    cluster.take(answer)
    assert len(cluster.ordered(m.Publish)) == 1


def test_a_member_that_dies_while_the_world_starts_does_not_delay_it_by_its_timeout() -> None:
    cluster = Simulation()
    cluster.intercept = lambda event: isinstance(event, m.HostReady) and event.node == "n4"
    cluster.run(lambda c: bool(c.held))
    cluster.kill_node("n4")
    since = cluster.now
    cluster.run(lambda c: c.cluster.world.state == "ready" and "n4" not in c.cluster.world.members)
    assert cluster.now - since < cluster.rules.world_s


def test_the_answer_to_a_read_of_another_generation_is_not_believed() -> None:
    """It tells of the bytes that lay there then."""
    cluster = started(total_steps=100)
    cluster.pull_s = 0.2
    cluster.run(lambda c: bool(c.cluster.pulls))
    holder, pull = next(iter(cluster.cluster.pulls.items()))
    answer = copied(pull, "")
    cluster.take(m.Copied(**{**vars(answer), "generation": 0}))
    assert holder not in cluster.cluster.copies[pull.rank, pull.step]
    assert cluster.cluster.pulls[holder] == pull


@pytest.mark.parametrize("damaged", [False, True])
def test_a_read_that_was_given_up_counts_when_it_ended_well(damaged: bool) -> None:
    """The MPI world was lost, and with it the order. What arrived by then is what its owner has, or is nothing."""
    cluster = Simulation(rules(4))
    cluster.pull_s = 0.2
    cluster.run(lambda c: bool(c.cluster.pulls))
    holder, pull = next(iter(cluster.cluster.pulls.items()))
    cluster.take(m.WorldFailed("", cluster.cluster.world.number, "its launcher is gone"))
    assert holder not in cluster.cluster.pulls
    answer = copied(pull, "")
    cluster.take(m.Copied(**{**vars(answer), "checksum": pull.checksum + damaged}))
    assert (holder in cluster.cluster.copies[pull.rank, pull.step]) is not damaged
