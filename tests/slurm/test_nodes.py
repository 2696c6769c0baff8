"""The fault matrix of nodes, on a real Slurm: they crash, are cut off, lose their slurmd, and run out of time."""

import time
from pathlib import Path

import pytest

from gemini_hpc.analysis.timeline import Recovery, recoveries
from tests.cluster.matrix import STEPS, STOPPED, Matrix, References, assert_identical
from tests.cluster.runs import EVENT_S, START_S, until
from tests.slurm.cluster import SlurmCluster
from tests.slurm.jobs import AGAIN_S, DOWN_S, SlurmRun, dead, lost_power, shape

pytestmark = [pytest.mark.cluster, pytest.mark.faults, pytest.mark.long, pytest.mark.timeout(600)]

AGENT = r"^\S*python -u -m gemini_hpc\.runtime\.agent"

SLOW = """
import time
from dataclasses import replace


def add_to(training):
    def batch(step, rank, micro_step):
        time.sleep(0.5)
        return training.batch(step, rank, micro_step)

    return replace(training, batch=batch)
"""
"""Does not get done before Slurm has noticed something, or the time limit comes."""


def hot_swapped(run: SlurmRun, lost: str) -> Recovery:
    (item,) = recoveries(run.events())
    assert (item.targets, item.rung, item.tier) == ((lost,), "hot_swap", "peer")
    return item


def test_a_node_crashes(cluster: SlurmCluster, tmp_path: Path, matrix: Matrix, references: References) -> None:
    """With its address: the next packet to it is answered by nobody."""
    with SlurmRun(cluster, tmp_path, *shape(3, 1, STEPS)) as run:
        run.wait_for_training(step=10)
        lost, since = run.nodes[1], time.time()
        with dead(cluster, lost):
            run.wait_for_end()
        assert_identical(run, references(3, STEPS))
        matrix.enter_recovery("Slurm: a node crashes", hot_swapped(run, lost), since)


@pytest.mark.usefixtures("machines")  # where an agent is killed alone, whose memory nobody shares
def test_the_node_of_the_coordinator_is_lost_and_it_is_not_the_first(
    cluster: SlurmCluster, tmp_path: Path, matrix: Matrix, references: References
) -> None:
    """The agent that leads first is killed, so that another one leads; then the node of that one loses its power."""
    with SlurmRun(cluster, tmp_path, *shape(3, 2, STEPS)) as run:
        run.wait_for_training(step=10)
        first = run.nodes[0]
        cluster.kill(first, AGENT)
        second = run.wait_for("coordinator", since=time.time() - 5, node=run.nodes[1])["target"]
        run.wait_for("first_step", node=second)
        until(lambda: run.events("protected", node=second), "protection again", EVENT_S)
        since = time.time()
        with lost_power(cluster, second):
            run.wait_for_end()
        assert_identical(run, references(3, STEPS))
        assert {event["target"] for event in run.events("evict")} == {first, second}
        item = recoveries(run.events())[-1]
        assert (item.targets, item.rung, item.tier) == ((second,), "hot_swap", "peer")
        matrix.enter_recovery("Slurm: the coordinator's node, not the first, loses power", item, since)


def test_a_link_is_cut_and_the_node_comes_back_as_a_spare(
    cluster: SlurmCluster, tmp_path: Path, matrix: Matrix, references: References
) -> None:
    """Before Slurm has noticed it. What was left behind there ends, and the node is needed when another one is lost."""
    (tmp_path / "trouble.py").write_text(SLOW)
    with SlurmRun(cluster, tmp_path, *shape(3, 1, 2 * STEPS), "site.return_s=1") as run:
        run.wait_for_training(step=10)
        (_, lost, second, _), since = run.nodes, time.time()
        cluster.cut(lost)
        try:
            first_step = run.wait_for("first_step", generation=run.generation(2))
        finally:
            cluster.mend(lost)
        back = run.wait_for("returned", DOWN_S, target=lost)
        ready = run.wait_for("memory", since=back["t"], node=lost)
        run.wait_for("safe", since=ready["t"])
        again = time.time()
        with dead(cluster, second):
            run.wait_for("promote", target=lost)
            run.wait_for_end()
        assert_identical(run, references(3, 2 * STEPS))
        items = recoveries(run.events())
        assert [(item.targets, item.rung, item.tier) for item in items] == [
            ((lost,), "hot_swap", "peer"),
            ((second,), "hot_swap", "peer"),
        ]
        assert first_step["t"] < back["t"]
        matrix.enter_recovery("Slurm: a node's link is cut, and comes back", items[0], since)
        matrix.enter_recovery("Slurm: another is lost, whose rank that node takes", items[1], again)


def test_slurmd_alone_is_killed(cluster: SlurmCluster, tmp_path: Path, matrix: Matrix, references: References) -> None:
    """Slurm sets its node DOWN, which works on: it is left in good order, before slurmd is back and ends all there."""
    (tmp_path / "trouble.py").write_text(SLOW)
    with SlurmRun(cluster, tmp_path, *shape(3, 1, 2 * STEPS)) as run:
        run.wait_for_training(step=10)
        lost = run.nodes[1]
        cluster.kill(lost, "^slurmd -D")
        try:
            drained = run.wait_for("drain", DOWN_S, target=lost, drains=True)
            moved = run.wait_for("first_step", generation=run.generation(2))
            assert not run.events("evict")
            run.wait_for("evict", target=lost)
        finally:
            cluster.start_slurmd(lost)
        until(lambda: lost in cluster.states("idle"), f"{lost} to be back", DOWN_S)
        run.wait_for_end()
        assert_identical(run, references(3, 2 * STEPS))
        total = 1000 * (moved["t"] - drained["t"])
        matrix.enter("Slurm: slurmd alone is killed", "moved to a spare", None, total)


def test_the_time_limit_comes_and_the_job_goes_on_from_the_queue(
    cluster: SlurmCluster, tmp_path: Path, matrix: Matrix, references: References
) -> None:
    """Slurm's own USR2, which may come up to a minute early."""
    (tmp_path / "trouble.py").write_text(SLOW)
    limit = ("site.timeout_min=2", "site.signal_delay_s=40", "protect.persist_every=1000")
    with SlurmRun(cluster, tmp_path, *shape(3, 1, 2 * STEPS), *limit) as run:
        run.wait_for_training(step=10)
        suspended = run.wait_for("run", 150.0, node="cluster", state="suspended", since=time.time())
        assert "SIGUSR2" in suspended["reason"] and "queued again" in suspended["reason"]
        again = run.wait_for("run", AGAIN_S, node="cluster", state="started", since=suspended["t"])
        assert again["step"] >= 10
        (tmp_path / "trouble.py").unlink()
        run.wait_for("first_step", START_S, since=again["t"])
        run.wait_for_end()
        assert_identical(run, references(3, 2 * STEPS))
        matrix.enter("Slurm: the time limit", "saved, queued again", None, None, STOPPED)


@pytest.mark.faults
@pytest.mark.long
@pytest.mark.usefixtures("machines")
def test_the_time_limit_comes_when_the_first_node_is_gone(
    cluster: SlurmCluster, tmp_path: Path, matrix: Matrix, references: References
) -> None:
    """And with it the batch script, which is all that Slurm tells of the limit."""
    (tmp_path / "trouble.py").write_text(SLOW)
    limit = ("site.timeout_min=2", "site.signal_delay_s=40", "protect.persist_every=1000")
    with SlurmRun(cluster, tmp_path, *shape(3, 1, 3 * STEPS), *limit) as run:
        run.wait_for_training(step=5)
        with dead(cluster, run.nodes[0]):
            suspended = run.wait_for("run", 150.0, node="cluster", state="suspended", since=time.time())
            assert "at its time limit" in suspended["reason"] and "queued again" in suspended["reason"]
            again = run.wait_for("run", AGAIN_S, node="cluster", state="started", since=suspended["t"])
            assert again["step"] >= 10
            (tmp_path / "trouble.py").unlink()
            run.wait_for("first_step", START_S, since=again["t"])
            run.wait_for_end()
        assert_identical(run, references(3, 3 * STEPS))
        matrix.enter("Slurm: the first node, then the time limit", "saved, queued again", None, None, STOPPED)
