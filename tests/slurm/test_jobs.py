"""Runs on a real Slurm: its nodes vanish or are drained, its jobs are queued again."""

import json
import re
import subprocess
import time
from pathlib import Path

import pytest

from gemini_hpc.analysis.timeline import recoveries
from tests.cluster.matrix import STEPS, STOPPED, Matrix, References, assert_identical
from tests.cluster.runs import GONE_S, START_S, command, reference_losses, until
from tests.slurm.cluster import SlurmCluster
from tests.slurm.jobs import AGAIN_S, DOWN_S, SlurmRun, dead, lost_power, shape, site_of

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]


def test_the_first_node_dies_and_the_others_finish_and_end_the_job(cluster: SlurmCluster, tmp_path: Path) -> None:
    """With it go the batch script, the supervisor, the coordinator and a rank."""
    with SlurmRun(cluster, tmp_path, *shape(3, 2, STEPS), "verify=true") as run:
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


@pytest.mark.faults
@pytest.mark.long
def test_the_first_node_dies_without_a_spare_and_the_job_goes_on_from_the_queue(
    cluster: SlurmCluster, tmp_path: Path
) -> None:
    """Those who are left save what they have, and put the job back into the queue: nobody else could."""
    with SlurmRun(cluster, tmp_path, *shape(3, 0, STEPS), "protect.persist_every=1000") as run:
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
    cluster: SlurmCluster, tmp_path: Path, references: References
) -> None:
    with SlurmRun(cluster, tmp_path, *shape(2, 1, 120)) as run:
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
            assert "the job is being queued again" in suspended["reason"]
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
        assert_identical(run, references(2, 120))
        assert run.status_of()["alive"] is False


@pytest.mark.faults
def test_a_node_loses_power_while_slurm_believes_it_alive(
    cluster: SlurmCluster, tmp_path: Path, matrix: Matrix, references: References
) -> None:
    """Nothing is reset, and Slurm will not know for seconds: the heartbeat alone tells."""
    with SlurmRun(cluster, tmp_path, *shape(3, 1, STEPS)) as run:
        run.wait_for_training(step=10)
        lost, since = run.nodes[1], time.time()
        with lost_power(cluster, lost):
            run.wait_for("first_step", generation=run.generation(2))
            assert lost not in cluster.states("down"), "Slurm knew it first"
            run.wait_for_end()
        assert_identical(run, references(3, STEPS))
        (item,) = recoveries(run.events())
        assert (item.targets, item.rung, item.tier) == ((lost,), "hot_swap", "peer")
        matrix.enter_recovery("Slurm: a node loses power", item, since)


@pytest.mark.faults
@pytest.mark.long
@pytest.mark.usefixtures("machines")  # each with its processes
def test_two_nodes_are_lost_with_the_sites_own_open_mpi(
    cluster: SlurmCluster, tmp_path: Path, matrix: Matrix, references: References
) -> None:
    """One dies; a window host breaks the world of the others; when the next one protects them, one loses its power."""
    with SlurmRun(cluster, tmp_path, *shape(3, 2, STEPS), "site.mpi=openmpi") as run:
        run.wait_for_training(step=10)
        assert all("/libmpi.so.40" in run.host_maps(node) for node in run.nodes)
        first, second, since = run.nodes[1], run.nodes[2], time.time()
        with dead(cluster, first):
            run.wait_for("first_step", generation=run.generation(2))
            assert run.status["window_world"] == {"number": 1, "state": "ready"}
            run.kill_host(run.nodes[0])
            ready = run.wait_for("world", number=2, state="ready")
            run.wait_for("safe", since=ready["t"])
            again = time.time()
            with lost_power(cluster, second):
                run.wait_for("first_step", generation=run.generation(3))
                run.wait_for_end()
        assert_identical(run, references(3, STEPS))
        for item, lost, struck in zip(recoveries(run.events()), (first, second), (since, again), strict=True):
            assert (item.targets, item.rung, item.tier) == ((lost,), "hot_swap", "peer")
            matrix.enter_recovery(f"Slurm, Open MPI: {'a node' if lost == first else 'another'} is lost", item, struck)


@pytest.mark.usefixtures("machines")  # with /ibex
def test_the_script_works_as_it_is_from_the_root_of_the_repository(cluster: SlurmCluster) -> None:
    """All that it asks for, Ibex's nodes have, and those of the tests."""
    told = cluster.run("sbatch", "--parsable", "--output=/dev/null", "sbatch/gpt2_gemini.sh", cwd=ROOT)
    assert told.returncode == 0, told.stderr
    job = told.stdout.strip()
    runs = cluster.place / "ibex/user"
    try:
        until(lambda: not cluster.run("squeue", "-h", "-j", job).stdout.strip(), "the end of the job", 300.0)
    finally:
        cluster.run("scancel", job)
    (status,) = runs.glob(f"*/gemini_hpc/runs/*job-{job}*/status.json")
    assert json.loads(status.read_text())["state"] == "finished"


def test_submit_may_wait_on_the_login_node_and_the_accounts_have_the_job(cluster: SlurmCluster, tmp_path: Path) -> None:
    words = command("submit", "--wait", "--site", str(site_of(tmp_path)), "model.preset=tiny", *shape(2, 0, 20))
    done = subprocess.run(cluster.login.enter(words, tmp_path), capture_output=True, text=True, timeout=2 * START_S)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^finished +all 20 steps are done", done.stdout, re.MULTILINE)
    job = re.search(r"^job +(\d+)$", done.stdout, re.MULTILINE)
    assert job is not None
    state = ("sacct", "--noheader", "--allocations", "--format=State", f"--jobs={job[1]}")
    until(lambda: cluster.run(*state).stdout.strip() == "COMPLETED", "the accounts to say so", GONE_S)


@pytest.mark.usefixtures("machines")  # which have an address that is not the loopback's
def test_jupyter_runs_on_a_compute_node_and_opens_to_its_token_alone(cluster: SlurmCluster, tmp_path: Path) -> None:
    output = tmp_path / "jupyter.out"
    (tmp_path / "jupyter_server_config.json").write_text('{"ServerApp": {"allow_root": true}}')  # as the tests are
    flags = ["--parsable", f"--output={output}", f"--export=ALL,JUPYTER_CONFIG_DIR={tmp_path}"]
    told = cluster.run("sbatch", *flags, "sbatch/jupyter.sh", cwd=ROOT)
    assert told.returncode == 0, told.stderr
    job = told.stdout.strip()
    secret = ROOT / f"jupyter-{job}.token"

    def answer(*headers: str) -> str:
        """What comes back through the way that it tells, for which the login node stands in."""
        tunnel = re.search(r"ssh -N -L \d+:(\S+):(\d+) ", output.read_text() if output.exists() else "")
        if tunnel is None:
            return ""
        return cluster.run("curl", "-s", *headers, f"http://{tunnel[1]}:{tunnel[2]}/api/status").stdout

    try:
        until(lambda: "Forbidden" in answer(), "an answer that asks for a token", START_S)
        token = secret.read_text().strip()
        assert secret.stat().st_mode & 0o777 == 0o600 and token not in output.read_text()
        assert "kernels" in answer("-H", f"Authorization: token {token}")
    finally:
        cluster.run("scancel", job)
    until(lambda: not cluster.run("squeue", "-h", "-j", job).stdout.strip(), "the end of the job", GONE_S)
    assert not secret.exists()


def test_scancel_ends_everything_at_once(cluster: SlurmCluster, tmp_path: Path) -> None:
    with SlurmRun(cluster, tmp_path, *shape(3, 1, 100_000)) as run:
        run.wait_for_training(step=10)
        assert cluster.run("scancel", run.job).returncode == 0
        run.wait_for_end()
        assert run.status["state"] == "stopped"
        assert not run.events("evict")


def test_a_preempted_job_is_saved_and_goes_on_when_there_are_nodes_again(
    cluster: SlurmCluster, tmp_path: Path, references: References
) -> None:
    """Slurm tells every process of it by SIGTERM, and gives it a grace (30 s here)."""
    with SlurmRun(cluster, tmp_path, *shape(3, 1, STEPS), "protect.persist_every=1000") as run:
        run.wait_for_training(step=10)
        urgent = cluster.run("sbatch", "-p", "urgent", "-N6", "--exclusive", "--output=/dev/null", "--wrap=sleep 5")
        assert urgent.returncode == 0, urgent.stderr
        suspended = run.wait_for("run", node="cluster", state="suspended")
        assert "preempted" in suspended["reason"] and "queued again" in suspended["reason"]
        again = run.wait_for("run", AGAIN_S, node="cluster", state="started", since=suspended["t"])
        assert again["step"] >= 10
        run.wait_for_end()
        assert_identical(run, references(3, STEPS))
        assert not run.events("evict")


@pytest.mark.faults
@pytest.mark.long
@pytest.mark.usefixtures("machines")  # each with its processes
def test_a_preempted_job_is_saved_though_slurm_does_not_answer(
    cluster: SlurmCluster, tmp_path: Path, references: References, matrix: Matrix
) -> None:
    """slurmctld is stopped as the grace begins: nobody can say whether it is that, or the end of the job."""
    with SlurmRun(cluster, tmp_path, *shape(3, 1, STEPS), "protect.persist_every=1000") as run:
        run.wait_for_training(step=10)
        struck = time.time()
        with cluster.hung_controller():
            told = cluster.run("pkill", "-TERM", "-f", r"[g]emini_hpc\.runtime\.(supervisor|agent)")  # as slurmd does
            assert told.returncode == 0
            saved = until(lambda: run.events("persisted"), "a checkpoint", DOWN_S)[-1]
        assert saved["step"] >= 10
        again = run.wait_for("run", AGAIN_S, node="cluster", state="started", since=struck)
        assert again["step"] == saved["step"]
        run.wait_for_end()
        assert_identical(run, references(3, STEPS))
        matrix.enter("Slurm: preempted while slurmctld does not answer", "saved, queued again", None, None, STOPPED)
