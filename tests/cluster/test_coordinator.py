"""The node that coordinates is lost too: another is elected, and the losses stay the same to the last bit."""

import os
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from gemini_hpc.analysis.timeline import recoveries
from gemini_hpc.runtime.processes import state_of
from tests.cluster.matrix import Matrix
from tests.cluster.runs import EVENT_S, START_S, Run, call, drill, drills, reference_losses, until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]

STEPS = 100
TWO_SPARES = ("cluster.nodes=3", "cluster.spares=2", f"train.steps={STEPS}", "protect.strict=true")

Reference = Mapping[tuple[int, int], bytes]


def coordinator(run: Run) -> str:
    """The node that was elected last."""
    return run.events("coordinator")[-1]["target"]


def wait_for_another(run: Run, lost: list[str]) -> str:
    """Wait until a node that is not among `lost` coordinates and the run is protected again; return it."""
    until(lambda: coordinator(run) not in lost, f"a coordinator after {lost}", EVENT_S)
    run.wait_for("protected", node=coordinator(run))
    return coordinator(run)


@pytest.fixture(scope="module")
def coordinator_lost(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """The whole node that coordinates is killed: its memory, and all its processes."""
    with Run(tmp_path_factory.mktemp("coordinator"), *TWO_SPARES, drills()) as run:
        run.wait_for_training(3)
        killed = call("drill", str(run.run_dir), "kill-node", coordinator(run))
        assert killed.returncode == 0, killed.stderr
        run.wait_for_end(timeout_s=300)
        yield run


@pytest.fixture(scope="module")
def reference(coordinator_lost: Run) -> Reference:
    return reference_losses(coordinator_lost.run_dir)


@pytest.mark.faults
def test_another_node_coordinates(coordinator_lost: Run, reference: Reference, matrix: Matrix) -> None:
    coordinator_lost.assert_identical_to(reference)
    assert coordinator_lost.status["verdict"].startswith("all ")
    (fault,) = coordinator_lost.events("fault")
    assert [event["target"] for event in coordinator_lost.events("evict")] == [fault["target"]]
    last = coordinator_lost.events("coordinator")[-1]
    assert last["target"] != fault["target"] and f"after {fault['target']}" in last["reason"]
    assert coordinator_lost.status["coordinator"] == last["target"]
    plan = coordinator_lost.events("plan", node=last["target"])[-1]
    assert {move["tier"] for move in plan["moves"]} <= {"peer", "local"}
    assert fault["target"] not in {move["node"] for move in plan["moves"]}
    (item,) = recoveries(coordinator_lost.events())
    assert (item.outcome, item.targets, item.rung) == ("recovered", (fault["target"],), "hot_swap")
    matrix.enter_recovery("the coordinator's node SIGKILL", item)


@pytest.mark.faults
def test_the_coordinators_agent_dies_in_the_middle_of_a_recovery(
    tmp_path: Path, reference: Reference, matrix: Matrix
) -> None:
    """A node is lost, and as soon as the recovery is planned so is the agent that planned it."""
    with Run(tmp_path, *TWO_SPARES, drills([drill(10, 2, "kill_node")]), "verify=false") as run:
        run.wait_for("fault", START_S)
        planned = until(lambda: run.events("plan")[1:], "the plan of a recovery", EVENT_S)[0]
        run.kill("gemini_hpc.runtime.agent", planned["node"])
        run.wait_for_end()
        run.assert_identical_to(reference)
        assert coordinator(run) != planned["node"]
        assert {event["target"] for event in run.events("evict")} == {"node2", planned["node"]}
        item = recoveries(run.events())[-1]
        assert item.outcome == "recovered" and planned["node"] in item.targets
        matrix.enter_recovery("the coordinator's agent SIGKILL in the middle of a recovery", item)


def test_one_coordinator_after_the_other(tmp_path: Path, reference: Reference) -> None:
    """Three in a row, each killed as soon as the run is protected again."""
    with Run(tmp_path, *TWO_SPARES, "cluster.spares=3", "verify=false", drills()) as run:
        run.wait_for_training(3)
        lost: list[str] = []
        for _ in range(3):
            lost.append(coordinator(run))
            run.kill("gemini_hpc.runtime.agent", lost[-1])
            wait_for_another(run, lost)
        run.wait_for_end()
        run.assert_identical_to(reference)
        assert [event["target"] for event in run.events("evict")] == lost


def test_a_lost_node_comes_back_and_is_a_spare(tmp_path: Path, reference: Reference) -> None:
    """The one spare makes up for the first loss, a node that came back for the second, the coordinator's."""
    with Run(tmp_path, *TWO_SPARES, "cluster.spares=1", "cluster.return_s=0.2", "verify=false", drills()) as run:
        run.wait_for_training(3)
        first = next(node for node in ("node2", "node1") if node != coordinator(run))
        run.kill("gemini_hpc.runtime.agent", first)
        run.wait_for("returned", target=first)
        second = coordinator(run)
        run.kill("gemini_hpc.runtime.agent", second)
        wait_for_another(run, [second])
        run.wait_for_end()
        run.assert_identical_to(reference)
        # or the second one itself, if it was back before the takeover was planned
        assert {first, second} & {move["node"] for move in run.events("plan")[-1]["moves"]}


@pytest.mark.faults
def test_a_silent_coordinator_is_replaced_and_leaves_when_it_is_back(
    tmp_path: Path, reference: Reference, matrix: Matrix
) -> None:
    """Its agent is stopped: no connection breaks. Nobody acts until its lease is over; then it is too late."""
    with Run(tmp_path, *TWO_SPARES, "verify=false", drills()) as run:
        run.wait_for_training(3)
        silent = coordinator(run)
        (agent,) = run.pids("gemini_hpc.runtime.agent", silent)
        os.kill(agent, signal.SIGSTOP)
        struck = time.time()
        plans = len(run.events("plan", node=silent))
        wait_for_another(run, [silent])
        os.kill(agent, signal.SIGCONT)
        until(lambda: state_of(agent) in ("Z", ""), "the end of the agent that was stopped", EVENT_S)
        run.wait_for_end()
        run.assert_identical_to(reference)
        assert silent in [event["target"] for event in run.events("evict")]
        assert len(run.events("plan", node=silent)) == plans
        item = recoveries(run.events())[-1]
        assert item.outcome == "recovered" and item.targets == (silent,)
        matrix.enter_recovery("the coordinator's agent SIGSTOP", item, struck)
