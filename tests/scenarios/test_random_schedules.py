"""Random failures at random moments, with late, crossing and missing answers: the invariants hold, and the run ends.

Each seed is one history. The fake cluster checks after every event that nothing is restored that is not there, that
histories are never mixed, that every rank has one node, and that no generation comes back.
"""

import random

import pytest

from gemini_hpc.core.coordinator import step
from gemini_hpc.core.state import new_cluster
from tests.scenarios.fake_cluster import FakeCluster, rules

SHAPES = [(4, 2, 3), (5, 2, 3), (3, 3, 3), (6, 3, 3), (2, 1, 2), (4, 4, 2)]  # ranks, replicas, spares
END_S = 400.0


def troubled(seed: int, failures: int, losses: int) -> FakeCluster:
    """Train under `failures` random failures, of which at most `losses` cost a node."""
    chance = random.Random(seed)
    world_size, replicas, spares = chance.choice(SHAPES)
    the_rules = rules(
        world_size + spares,
        world_size=world_size,
        replicas=replicas,
        total_steps=chance.choice((10, 40, 80)),
        persist_every=chance.choice((3, 10, 100)),
        max_restarts=10,
        max_fruitless=50,
    )
    cluster = FakeCluster(the_rules, seed)
    cluster.bad_pulls = chance.choice((0.0, 0.0, 0.02))
    cluster.pull_s = chance.choice((0.005, 0.02, 0.2))
    cluster.persist_s = chance.choice((0.01, 0.1, 1.0))
    cluster.persist_fails = lambda order: chance.random() < 0.05
    left = [losses]

    def strike() -> None:
        node = chance.choice(list(cluster.nodes))
        action = chance.choice(["worker", "node", "silent", "host", "hang", "mute", "stall", "trouble"])
        deadly = action in ("node", "silent", "mute")
        if deadly and left[0] > 0 and cluster.nodes[node].up and not cluster.nodes[node].mute:
            left[0] -= 1
            if action == "mute":
                cluster.nodes[node].mute = True
            else:
                cluster.kill_node(node, seen=action == "node")
        elif action == "worker":
            cluster.kill_worker(node)
        elif action == "host":
            cluster.crash_host(node)
        elif action == "hang":
            cluster.hang_host(node)
        elif action == "stall":
            cluster.coordinator_stalls_until = cluster.now + 2 * chance.random()
        elif action == "trouble" and cluster.nodes[node].worker == "training":
            cluster.leave_group(cluster.nodes[node])

    at = 0.0
    for _ in range(failures):
        at += chance.choice((0.01, 0.05, 0.3, 1.0)) * chance.random() * 2
        cluster.after(at, strike)
    return cluster


@pytest.mark.parametrize("block", range(10))
def test_with_enough_nodes_the_run_finishes(block: int) -> None:
    for seed in range(15 * block, 15 * (block + 1)):
        cluster = troubled(seed, failures=12, losses=2)
        try:
            cluster.run(FakeCluster.over, END_S)
            assert cluster.cluster.outcome == "finished", cluster.said("run")[-1]
            assert cluster.reached(cluster.rules.total_steps) or cluster.cluster.plan.step == cluster.rules.total_steps
        except BaseException as error:
            error.add_note(f"seed {seed}")
            raise


@pytest.mark.parametrize("block", range(4))
def test_out_of_nodes_the_run_stops_by_itself(block: int) -> None:
    for seed in range(10_000 + 15 * block, 10_000 + 15 * (block + 1)):
        cluster = troubled(seed, failures=40, losses=8)
        try:
            cluster.run(FakeCluster.over, END_S)
            assert cluster.cluster.outcome in ("finished", "stopped"), cluster.said("run")[-1]
        except BaseException as error:
            error.add_note(f"seed {seed}")
            raise


@pytest.mark.parametrize("seed", range(5))
def test_a_history_can_be_replayed_exactly_and_no_state_is_changed_in_place(seed: int) -> None:
    cluster = troubled(seed, failures=12, losses=2).run(FakeCluster.over, END_S)
    state = new_cluster(cluster.rules, 0.0)
    for now, event, commands in cluster.history:
        before = repr((state, event))
        after, again = step(state, now, event)
        assert tuple(again) == commands
        assert repr((state, event)) == before
        state = after
    assert state == cluster.cluster
    twin = troubled(seed, failures=12, losses=2).run(FakeCluster.over, END_S)
    assert twin.history == cluster.history
