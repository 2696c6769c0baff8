"""How jobs end: cancelled at the worst moments, without whoever should have ended them, beside another of the run."""

import re
import shlex
import sys
import time
from pathlib import Path

import pytest

from tests.cluster.matrix import JOB, JOB_ENTRY
from tests.cluster.runs import EVENT_S, GONE_S, START_S, command, until
from tests.slurm.cluster import SlurmCluster
from tests.slurm.jobs import AGAIN_S, DOWN_S, SlurmRun, dead, shape, site_of

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]

AGENT = r"^\S*python -u -m gemini_hpc\.runtime\.agent"
ROOT = Path(__file__).parents[2]
FOREVER = 100_000


def test_scancel_counts_while_the_run_is_being_saved(cluster: SlurmCluster, tmp_path: Path) -> None:
    """Slurm would take a job back into the queue that is being cancelled."""
    with SlurmRun(cluster, tmp_path, *shape(3, 1, FOREVER), "protect.persist_every=1000") as run:
        run.wait_for_training(step=10)
        cluster.run("scancel", "--signal=USR2", "--batch", run.job)
        time.sleep(0.2)
        cluster.run("scancel", run.job)
        run.wait_for_end(timeout_s=GONE_S)


@pytest.mark.long
@pytest.mark.parametrize("after_s", [0.6, 1.2, 1.8, 3.0])
def test_scancel_while_agents_start_leaves_nothing(cluster: SlurmCluster, tmp_path: Path, after_s: float) -> None:
    with SlurmRun(cluster, tmp_path, *shape(3, 1, FOREVER)) as run:
        until(lambda: run.state == "RUNNING", "the job", START_S)
        time.sleep(after_s)
        cluster.run("scancel", run.job)
        run.wait_for_end(timeout_s=GONE_S)


@pytest.mark.long
@pytest.mark.usefixtures("machines")
@pytest.mark.parametrize("after_s", [0.3, 0.8, 2.0])
def test_the_first_node_dies_before_the_agents_know_one_another(
    cluster: SlurmCluster, tmp_path: Path, after_s: float
) -> None:
    """The agents that there are give up, and one of them sees to it that the job is put back into the queue."""
    with SlurmRun(cluster, tmp_path, *shape(3, 1, 30), "recovery.build_s=15") as run:
        until(lambda: run.state == "RUNNING", "the job", START_S)
        time.sleep(after_s)
        with dead(cluster, run.nodes[0]):
            until(lambda: run.state != "RUNNING", "the job to be over", 90.0)
            if run.state:  # in the queue: it begins again on other nodes
                run.wait_for("first_step", AGAIN_S)
                run.wait_for_end()
                assert run.status["state"] == "finished"


@pytest.mark.long
def test_whoever_closes_the_run_cannot_write_the_report(cluster: SlurmCluster, tmp_path: Path) -> None:
    with SlurmRun(cluster, tmp_path, *shape(3, 1, 60)) as run:
        run.wait_for_training(step=10)
        run.paths.report.mkdir()
        with dead(cluster, run.nodes[0]):
            run.wait_for_end(timeout_s=90)
            assert run.status["state"] == "failed" and str(run.paths.report.name) in run.status["reason"]


def test_one_job_at_a_time_does_a_run(cluster: SlurmCluster, tmp_path: Path) -> None:
    """However the second one comes about; it says so, and changes nothing."""
    with SlurmRun(cluster, tmp_path, *shape(2, 0, FOREVER)) as run:
        run.wait_for_training(step=10)
        output = tmp_path / "second.out"
        script = [str(run.run_dir / "submit.sh"), str(run.run_dir)]
        told = cluster.run("sbatch", "--parsable", "-w", "n3,n4", f"--output={output}", *script, cwd=ROOT)
        second = told.stdout.strip()
        until(
            lambda: not cluster.run("squeue", "-h", "-j", second).stdout.strip(), "the end of the second job", START_S
        )
        assert f"is being run already, as job {run.job}" in output.read_text()
        assert len(run.events("run", state="started")) == 1
        assert run.status_of()["alive"] is True
        since = time.time()
        run.wait_for("safe", since=since)
        cluster.run("scancel", run.job)
        run.wait_for_end()
        again = shlex.join(command("submit", "--resume", str(run.run_dir)))
        both = cluster.run("sh", "-c", f"{again} & {again}; wait", cwd=tmp_path)
        jobs = re.findall(r"^job +(\d+)$", both.stdout, re.MULTILINE)
        assert len(jobs) == 1, both.stdout + both.stderr
        assert f"is being run already, as job {jobs[0]}" in both.stderr or "is being run already (as job" in both.stderr
        cluster.run("scancel", *jobs)
        until(lambda: not cluster.run("squeue", "-h", "-j", jobs[0]).stdout.strip(), "the end of the job", GONE_S)


@pytest.mark.long
@pytest.mark.usefixtures("machines")
def test_a_node_that_is_lost_again_soon_comes_back_again(cluster: SlurmCluster, tmp_path: Path) -> None:
    with SlurmRun(cluster, tmp_path, *shape(2, 1, FOREVER), "site.return_s=1") as run:
        run.wait_for_training(step=10)
        lost = run.nodes[1]
        for _ in range(2):
            struck = time.time()
            cluster.kill(lost, AGENT)
            run.wait_for("returned", DOWN_S, target=lost, since=struck)
        cluster.run("scancel", run.job)
        run.wait_for_end()


@pytest.mark.parametrize("argument", ["train.steps=5", "/nowhere"])
def test_what_is_no_run_directory_gets_one_line(cluster: SlurmCluster, tmp_path: Path, argument: str) -> None:
    output = tmp_path / "job.out"
    told = cluster.run(
        *("sbatch", "--parsable", "--nodes=1", "--time=1", f"--output={output}", "sbatch/gpt2_gemini.sh", argument),
        cwd=ROOT,
    )
    job = told.stdout.strip()
    until(lambda: not cluster.run("squeue", "-h", "-j", job).stdout.strip(), "the end of the job", EVENT_S)
    (line,) = output.read_text().splitlines()
    assert line.startswith("error: ") and argument in line


@pytest.mark.long
@pytest.mark.usefixtures("machines")
def test_the_last_survivor_ends_the_job_once_slurm_is_back(cluster: SlurmCluster, tmp_path: Path) -> None:
    """slurmctld is away when the run is closed, and there is nobody else who would try again."""
    with SlurmRun(cluster, tmp_path, *shape(2, 0, FOREVER), "protect.persist_every=1000") as run:
        run.wait_for_training(step=5)
        with dead(cluster, run.nodes[0]):
            run.wait_for("persisted", DOWN_S)  # two nodes go on by Slurm's word alone
            with cluster.without_controller():
                until(lambda: run.events("run", node="cluster", state="suspended"), "the run to be closed", DOWN_S)
                time.sleep(10.0)  # in which it tries in vain
            until(lambda: run.state not in ("", "RUNNING"), "the job to be queued again", DOWN_S)
        cluster.run("scancel", run.job)
        run.wait_for_end(timeout_s=AGAIN_S)


def test_slurm_takes_a_job_and_does_not_say_so(cluster: SlurmCluster, tmp_path: Path) -> None:
    """Nobody is told to submit it once more."""
    (tmp_path / "fault_job.py").write_text(JOB)
    what = ["--site", str(site_of(tmp_path)), "model.preset=tiny", JOB_ENTRY, *shape(2, 0, FOREVER), "name=unheard"]
    with cluster.hung_controller():
        told = cluster.run(*command("submit", *what, "site.call_timeout_s=3"), cwd=tmp_path)
    assert told.returncode == 2
    (line,) = told.stderr.splitlines()
    assert "Slurm may have taken the job, or may yet" in line and "squeue" in line
    until(lambda: cluster.run("squeue", "-h", "-n", "unheard").stdout.strip(), "the job", EVENT_S)
    look = line.partition("before another try, ")[2]
    assert cluster.run("sh", "-c", look).stdout.strip()
    cluster.run("scancel", "-n", "unheard")
    until(lambda: not cluster.run("squeue", "-h", "-n", "unheard").stdout.strip(), "the end of the job", GONE_S)


@pytest.mark.long
def test_sbatch_says_something_else(cluster: SlurmCluster, tmp_path: Path) -> None:
    with SlurmRun(cluster, tmp_path, *shape(2, 0, FOREVER), "site.slurm_additional_parameters={parsable: true}") as run:
        run.wait_for_training(step=5)
        cluster.run("scancel", run.job)
        run.wait_for_end()


@pytest.mark.long
def test_a_job_may_have_other_nodes_than_its_script_asks_for(cluster: SlurmCluster, tmp_path: Path) -> None:
    """`sbatch --nodes`: whatever does not train stands by; too few to train are refused."""
    with SlurmRun(cluster, tmp_path, *shape(3, 0, FOREVER)) as run:
        run.wait_for_training(step=5)
        cluster.run("scancel", run.job)
        run.wait_for_end()
        script = [str(run.run_dir / "submit.sh"), str(run.run_dir)]
        for nodes, said in ((2, "the run needs 3 to train"), (4, "the job has 4 nodes: 3 train, 1 stand by")):
            output, since = tmp_path / f"{nodes}.out", time.time()
            submitted = ["env", f"GEMINI_PYTHON={sys.executable}", "sbatch", "--parsable", f"--nodes={nodes}"]
            told = cluster.run(*submitted, f"--output={output}", *script, cwd=tmp_path)
            run.job = told.stdout.strip()
            if nodes == 4:
                until(lambda since=since: run.events("first_step")[-1]["t"] > since, "its first step", START_S)
                cluster.run("scancel", run.job)
            until(lambda: not cluster.run("squeue", "-h", "-j", run.job).stdout.strip(), "the end of the job", START_S)
            assert said in output.read_text()


def test_a_folder_for_memory_that_is_not_there_ends_the_run_at_once(cluster: SlurmCluster, tmp_path: Path) -> None:
    with SlurmRun(cluster, tmp_path, *shape(2, 0, 5), "site.shm_dir=/dev/nowhere") as run:
        run.wait_for_end()
        assert run.status["state"] == "failed" and "site.shm_dir" in run.status["reason"]
