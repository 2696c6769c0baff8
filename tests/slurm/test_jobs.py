"""Runs on a real Slurm: its nodes vanish or are drained, its jobs are queued again."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cluster.runs import START_S, command, reference_losses, until
from tests.slurm.cluster import SlurmCluster
from tests.slurm.jobs import SlurmRun

pytestmark = [pytest.mark.cluster, pytest.mark.long, pytest.mark.timeout(600)]

DOWN_S = 60.0
AGAIN_S = 120.0
"""A job that was requeued starts again after its credential has expired."""


def shape(nodes: int, spares: int, steps: int) -> list[str]:
    return [f"cluster.nodes={nodes}", f"cluster.spares={spares}", f"train.steps={steps}"]


@contextmanager
def dead(cluster: SlurmCluster, node: str) -> Iterator[None]:
    """End a node; start it again afterwards, once Slurm has seen that it was gone."""
    cluster.nodes[node].end()
    try:
        yield
    finally:
        until(lambda: node in cluster.states("down"), f"{node} to be down", DOWN_S)
        cluster.boot(node)
        until(lambda: node in cluster.states("idle"), f"{node} to be back", DOWN_S)


def test_the_first_node_dies_and_the_others_finish_and_end_the_job(cluster: SlurmCluster, tmp_path: Path) -> None:
    """With it go the batch script, the supervisor, the coordinator and a rank."""
    with SlurmRun(cluster, tmp_path, *shape(3, 2, 150), "verify=true") as run:
        run.wait_for_training(step=10)
        first = run.nodes[0]
        assert run.status["coordinator"] == first
        with dead(cluster, first):
            run.wait_for("first_step", generation=run.wait_for("plan", at_least=10)["generation"])
            run.wait_for_end()
            assert run.status["state"] == "finished"
            assert "to the last bit" in run.status["verdict"]
            run.assert_identical_to(reference_losses(run.run_dir))
            assert {event["target"] for event in run.events("evict")} == {first}
            assert run.paths.report.exists()


def test_the_first_node_dies_without_a_spare_and_the_job_goes_on_from_the_queue(
    cluster: SlurmCluster, tmp_path: Path
) -> None:
    """Those who are left save what they have, and put the job back into the queue: nobody else could."""
    with SlurmRun(cluster, tmp_path, *shape(3, 0, 80), "protect.persist_every=1000") as run:
        run.wait_for_training(step=10)
        first = run.nodes[0]
        with dead(cluster, first):
            suspended = run.wait_for("run", node="cluster", state="suspended")
            assert "no node is left for every rank" in suspended["reason"] and "queued again" in suspended["reason"]
            again = run.wait_for("run", AGAIN_S, node="cluster", state="started", since=suspended["t"])
            assert again["step"] >= 10 and first not in run.nodes
            run.wait_for_end()
            assert run.status["state"] == "finished"


def test_a_drained_node_is_left_and_before_the_time_limit_the_job_is_queued_again(
    cluster: SlurmCluster, tmp_path: Path
) -> None:
    with SlurmRun(cluster, tmp_path, *shape(2, 1, 200), "verify=true") as run:
        run.wait_for_training(step=10)
        _, second, spare = run.nodes
        cluster.run("scontrol", "update", f"nodename={second}", "state=drain", "reason=test")
        try:
            run.wait_for("promote", target=spare)
            moved = run.wait_for("plan", at_least=10)
            assert not run.events("evict")
            run.wait_for("first_step", generation=moved["generation"])
            struck = cluster.run(*command("drill", str(run.run_dir), "kill-worker", spare))
            assert struck.returncode == 0, struck.stderr
            run.wait_for("first_step", generation=moved["generation"] + 1)
            cluster.run("scancel", "--signal=USR2", "--batch", run.job)
            suspended = run.wait_for("run", node="cluster", state="suspended")
            assert "the job is queued again" in suspended["reason"]
            again = run.wait_for("run", AGAIN_S, node="cluster", state="started", since=suspended["t"])
            assert again["step"] >= moved["step"]
            refused = cluster.run(*command("submit", "--resume", str(run.run_dir)))
            assert refused.returncode == 2 and f"as job {run.job}, RUNNING" in refused.stderr
            run.wait_for("first_step", START_S, since=again["t"])
            assert second not in run.nodes
            assert run.status_of()["alive"] is True
            run.wait_for_end()
        finally:
            cluster.run("scontrol", "update", f"nodename={second}", "state=resume")
        assert "to the last bit" in run.status["verdict"]
        assert run.status_of()["alive"] is False
