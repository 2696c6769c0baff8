"""The node that coordinates is lost too: another is elected, and the losses stay the same to the last bit."""

import os
import signal
import time
from pathlib import Path

import pytest

from gemini_hpc.analysis.timeline import recoveries
from gemini_hpc.runtime.processes import state_of
from tests.cluster.matrix import STEPS, STOPPED, Matrix, References, assert_identical, start
from tests.cluster.runs import EVENT_S, START_S, Run, call, drill, drills, until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]

AGENT = "gemini_hpc.runtime.agent"


def start_blocking(place: Path, *settings: str, spares: int = 2) -> Run:
    """Three ranks, of which none runs ahead of what is safe."""
    return start(place, "protect.mode=blocking", *settings, spares=spares)


def coordinator(run: Run) -> str:
    """The node that was elected last."""
    return run.events("coordinator")[-1]["target"]


def wait_for_another(run: Run, lost: list[str]) -> str:
    """Wait until a node that is not among `lost` coordinates and the run is protected again; return it."""
    until(lambda: coordinator(run) not in lost, f"a coordinator after {lost}", EVENT_S)
    run.wait_for("protected", node=coordinator(run))
    return coordinator(run)


@pytest.mark.faults
def test_another_node_coordinates(tmp_path: Path, references: References, matrix: Matrix) -> None:
    """The whole node that coordinates is killed: its memory, and all its processes."""
    with start_blocking(tmp_path) as run:
        run.wait_for_training(3)
        killed = call("drill", str(run.run_dir), "kill-node", coordinator(run))
        assert killed.returncode == 0, killed.stderr
        run.wait_for_end()
        assert_identical(run, references(3, STEPS))
        (fault,) = run.events("fault")
        assert [event["target"] for event in run.events("evict")] == [fault["target"]]
        last = run.events("coordinator")[-1]
        assert last["target"] != fault["target"] and f"after {fault['target']}" in last["reason"]
        assert run.status["coordinator"] == last["target"]
        plan = run.events("plan", node=last["target"])[-1]
        assert {move["tier"] for move in plan["moves"]} <= {"peer", "local"}
        assert fault["target"] not in {move["node"] for move in plan["moves"]}
        (item,) = recoveries(run.events())
        assert (item.outcome, item.targets, item.rung) == ("recovered", (fault["target"],), "hot_swap")
        matrix.enter_recovery("the coordinator's node SIGKILL", item)


@pytest.mark.faults
def test_the_coordinators_agent_dies_in_the_middle_of_a_recovery(
    tmp_path: Path, references: References, matrix: Matrix
) -> None:
    """A node is lost, and as soon as the recovery is planned so is the agent that planned it."""
    with start_blocking(tmp_path, drills([drill(10, 2, "kill_node")])) as run:
        run.wait_for("fault", START_S)
        planned = until(lambda: run.events("plan")[1:], "the plan of a recovery", EVENT_S)[0]
        run.kill(AGENT, planned["node"])
        run.wait_for_end()
        assert_identical(run, references(3, STEPS))
        assert coordinator(run) != planned["node"]
        assert {event["target"] for event in run.events("evict")} == {"node2", planned["node"]}
        item = recoveries(run.events())[-1]
        assert item.outcome == "recovered" and planned["node"] in item.targets
        matrix.enter_recovery("the coordinator's agent SIGKILL in the middle of a recovery", item)


def test_one_coordinator_after_the_other(tmp_path: Path, references: References) -> None:
    """Three in a row, each killed as soon as the run is protected again."""
    with start_blocking(tmp_path, spares=3) as run:
        run.wait_for_training(3)
        lost: list[str] = []
        for _ in range(3):
            lost.append(coordinator(run))
            run.kill(AGENT, lost[-1])
            wait_for_another(run, lost)
        run.wait_for_end()
        assert_identical(run, references(3, STEPS))
        assert [event["target"] for event in run.events("evict")] == lost


def test_a_lost_node_comes_back_and_is_a_spare(tmp_path: Path, references: References) -> None:
    """The one spare makes up for the first loss, a node that came back for the second, the coordinator's."""
    with start_blocking(tmp_path, "site.return_s=0.2", spares=1) as run:
        run.wait_for_training(3)
        first = next(node for node in ("node2", "node1") if node != coordinator(run))
        run.kill(AGENT, first)
        run.wait_for("returned", target=first)
        second = coordinator(run)
        run.kill(AGENT, second)
        wait_for_another(run, [second])
        run.wait_for_end()
        assert_identical(run, references(3, STEPS))
        # or the second one itself, if it was back before the takeover was planned
        assert {first, second} & {move["node"] for move in run.events("plan")[-1]["moves"]}


def test_a_run_that_ends_while_a_node_comes_back_ends_as_it_was_decided(tmp_path: Path) -> None:
    with start_blocking(tmp_path, "site.return_s=0", spares=0) as run:
        run.wait_for_training(3)
        run.kill(AGENT, "node1")
        run.wait_for_end(1)
        assert run.status["state"] == "suspended", run.status


@pytest.mark.faults
def test_a_silent_coordinator_is_replaced_and_leaves_when_it_is_back(
    tmp_path: Path, references: References, matrix: Matrix
) -> None:
    """Its agent is stopped: no connection breaks. Nobody acts until its lease is over; then it is too late."""
    with start_blocking(tmp_path) as run:
        run.wait_for_training(3)
        silent = coordinator(run)
        (agent,) = run.pids(AGENT, silent)
        os.kill(agent, signal.SIGSTOP)
        struck = time.time()
        plans = len(run.events("plan", node=silent))
        wait_for_another(run, [silent])
        os.kill(agent, signal.SIGCONT)
        until(lambda: state_of(agent) in ("Z", ""), "the end of the agent that was stopped", EVENT_S)
        run.wait_for_end()
        assert_identical(run, references(3, STEPS))
        assert silent in [event["target"] for event in run.events("evict")]
        assert len(run.events("plan", node=silent)) == plans
        item = recoveries(run.events())[-1]
        assert item.outcome == "recovered" and item.targets == (silent,)
        matrix.enter_recovery("the coordinator's agent SIGSTOP", item, struck)


@pytest.mark.long
@pytest.mark.parametrize("leader_too", [False, True])
def test_without_a_majority_nobody_acts_and_status_says_so(
    leader_too: bool, tmp_path: Path, references: References
) -> None:
    """Three of five agents stand still for some seconds, the leader among them or not; then all goes on."""
    with start_blocking(tmp_path) as run:
        run.wait_for_training(3)
        leader = coordinator(run)
        others = [f"node{number}" for number in range(5) if f"node{number}" != leader]
        silent = [leader, *others[:2]] if leader_too else others[:3]
        agents = [pid for node in silent for pid in run.pids(AGENT, node)]
        for pid in agents:
            os.kill(pid, signal.SIGSTOP)
        decided = len(run.events("evict")) + len(run.events("plan"))
        words = "no word of this run for" if leader_too else "a majority of the nodes to answer"
        until(lambda: words in call("status", str(run.run_dir)).stdout, words, EVENT_S)
        assert len(run.events("evict")) + len(run.events("plan")) == decided
        for pid in agents:
            os.kill(pid, signal.SIGCONT)
        run.wait_for_end()
        assert_identical(run, references(3, STEPS))


@pytest.mark.faults
@pytest.mark.long
def test_most_agents_are_silent_for_ever(tmp_path: Path, matrix: Matrix) -> None:
    """Nobody may lead any more, and who could has given up: the run is over, and nothing of it is left."""
    with start_blocking(tmp_path, "recovery.build_s=60", spares=0) as run:
        run.wait_for_training(3)
        struck = time.time()
        for node in ("node1", "node2"):
            run.kill(AGENT, node, signal.SIGSTOP)
        run.wait_for_end(1)
        assert run.status["state"] == "suspended" and "nobody has led" in run.status["reason"], run.status
        end_ms = 1000 * (run.events("run")[-1]["t"] - struck)
        matrix.enter("the agents of most nodes SIGSTOP for ever", "stopped", None, end_ms, STOPPED)
