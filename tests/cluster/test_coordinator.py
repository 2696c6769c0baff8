"""The node that coordinates is lost too: another is elected, and the losses stay the same to the last bit."""

import os
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from gemini_hpc.runtime.processes import state_of
from tests.cluster.runs import EVENT_S, START_S, Run, drill, drills, reference_losses, until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]

STEPS = 100
TWO_SPARES = ("cluster.nodes=3", "cluster.spares=2", f"train.steps={STEPS}", "protect.strict=true")

Reference = Mapping[tuple[int, int], bytes]


def coordinator(run: Run) -> str:
    """The node that was elected last."""
    return run.events("coordinator")[-1]["target"]


@pytest.fixture(scope="module")
def coordinator_lost(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Rank 0's node, which coordinates by its place, is killed in the backward of a step."""
    with Run(tmp_path_factory.mktemp("coordinator"), *TWO_SPARES, drills([drill(10, 0, "kill_node")])) as run:
        run.wait_for_end(timeout_s=300)
        yield run


@pytest.fixture(scope="module")
def reference(coordinator_lost: Run) -> Reference:
    return reference_losses(coordinator_lost.run_dir)


def test_another_node_coordinates_and_a_spare_takes_the_rank(coordinator_lost: Run, reference: Reference) -> None:
    coordinator_lost.assert_identical_to(reference)
    first, second = coordinator_lost.events("coordinator")
    (fault,) = coordinator_lost.events("fault")
    assert (first["target"], fault["target"]) == ("node0", "node0")
    assert second["target"] == "node1" and "term 2" in second["reason"]
    assert coordinator_lost.status["coordinator"] == "node1"
    (plan,) = coordinator_lost.events("plan", node="node1")
    assert {move["rank"]: move["tier"] for move in plan["moves"]} == {0: "peer", 1: "local", 2: "local"}


def test_the_coordinators_agent_dies_in_the_middle_of_a_recovery(tmp_path: Path, reference: Reference) -> None:
    """A node is lost, and as soon as the recovery is planned so is the agent that planned it."""
    with Run(tmp_path, *TWO_SPARES, drills([drill(10, 2, "kill_node")]), "verify=false") as run:
        run.wait_for("plan", START_S, generation=2)
        run.kill("gemini_hpc.runtime.agent", "node0")
        run.wait_for_end()
        run.assert_identical_to(reference)
        assert coordinator(run) != "node0"
        assert {e["target"] for e in run.events("evict")} == {"node0", "node2"}


def test_one_coordinator_after_the_other(tmp_path: Path, reference: Reference) -> None:
    """Three in a row, each killed as soon as the run is protected again."""
    with Run(tmp_path, *TWO_SPARES, "cluster.spares=3", "verify=false", drills()) as run:
        run.wait_for_training(3)
        lost: list[str] = []
        for _ in range(3):
            lost.append(coordinator(run))
            run.kill("gemini_hpc.runtime.agent", lost[-1])
            until(lambda: coordinator(run) not in lost, f"a coordinator after {lost}", EVENT_S)
            run.wait_for("protected", node=coordinator(run))
        run.wait_for_end()
        run.assert_identical_to(reference)
        assert len(set(lost)) == 3
        assert [event["target"] for event in run.events("evict")] == lost


def test_a_lost_node_comes_back_and_is_a_spare(tmp_path: Path, reference: Reference) -> None:
    """The one spare takes the first loss, the node that came back takes the second, the coordinator's."""
    with Run(tmp_path, *TWO_SPARES, "cluster.spares=1", "cluster.return_s=0.2", "verify=false", drills()) as run:
        run.wait_for_training(3)
        run.kill("gemini_hpc.runtime.agent", "node2")
        run.wait_for("returned", target="node2")
        run.wait_for("protected", generation=2)
        run.kill("gemini_hpc.runtime.agent", "node0")
        run.wait_for_end()
        run.assert_identical_to(reference)
        (plan,) = run.events("plan", node="node1")
        assert {move["rank"]: move["node"] for move in plan["moves"]} == {0: "node2", 1: "node1", 2: "node3"}


def test_a_silent_coordinator_is_replaced_and_leaves_when_it_is_back(tmp_path: Path, reference: Reference) -> None:
    """Its agent is stopped: no connection breaks. Nobody acts until its lease is over; then it is too late."""
    with Run(tmp_path, *TWO_SPARES, "verify=false", drills()) as run:
        run.wait_for_training(3)
        (agent,) = run.pids("gemini_hpc.runtime.agent", "node0")
        os.kill(agent, signal.SIGSTOP)
        second = run.wait_for("coordinator", target="node1")
        run.wait_for("first_step", node="node1")
        os.kill(agent, signal.SIGCONT)
        until(lambda: state_of(agent) in ("Z", ""), "the end of the agent that was stopped", EVENT_S)
        run.wait_for_end()
        run.assert_identical_to(reference)
        assert "after node0" in second["reason"]
        assert [e["target"] for e in run.events("evict")] == ["node0"]
        assert not [e for e in run.events("plan", node="node0") if e["generation"] > 1]
