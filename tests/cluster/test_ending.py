"""However a run is ended, it ends within seconds and leaves nothing behind."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from gemini_hpc.runtime.processes import RUN_MARK, sweep
from tests.cluster.runs import GONE_S, SHM, Run, call, drills, until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

SMALL = ("cluster.nodes=2", "cluster.spares=0", "train.steps=2000", "verify=false", drills())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_a_signal_to_submit_ends_the_run(number: signal.Signals, tmp_path: Path) -> None:
    with Run(tmp_path, *SMALL) as run:
        run.wait_for_training(step=3)
        run.submit.send_signal(number)
        run.assert_nothing_is_left()  # though nobody has reaped it yet
        run.wait_for_end(-9 if number == signal.SIGKILL else 130, timeout_s=GONE_S)
        assert run.status["state"] == "stopped"
        told = {event["node"] for event in run.events("run", state="stopped")}
        assert told == {"node0", "node1", "cluster"}  # they left when they were told, and did not train on
        if number != signal.SIGKILL:
            assert "--resume" in run.text
        if number == signal.SIGTERM:
            refused = call("submit", "--resume", str(run.run_dir), "train.seed=7")
            assert refused.returncode == 2 and "other settings" in refused.stderr


def test_a_finished_training_that_was_not_proven_can_be_resumed_for_the_proof(tmp_path: Path) -> None:
    settings = ("cluster.nodes=2", "cluster.spares=0", "train.steps=6", "verify=false", drills())
    with Run(tmp_path, *settings) as run:
        run.wait_for_end()
    done = call("submit", "--resume", str(run.run_dir))
    assert done.returncode == 2 and "has done all its 6 steps" in done.stderr
    with Run(tmp_path, "verify=true", resume=run.run_dir) as again:
        again.wait_for_end(timeout_s=300)
        assert again.status["verdict"] == "all 14 losses equal those of the undisturbed run to the last bit"


def test_ctrl_c_while_the_workers_start(tmp_path: Path) -> None:
    with Run(tmp_path, *SMALL) as run:
        until(lambda: run.pids("gemini_hpc.runtime.worker"), "a worker", GONE_S)
        run.submit.send_signal(signal.SIGINT)
        run.wait_for_end(130, timeout_s=GONE_S)


def test_the_next_start_sweeps_what_a_killed_supervisor_left(tmp_path: Path) -> None:
    with Run(tmp_path, *SMALL) as run:
        run.wait_for_training(step=3)
        os.kill(run.supervisor(), signal.SIGKILL)
        run.wait_for_end(1, timeout_s=GONE_S)
        # the kernel and the channels see to it; MPI's launcher, which holds nothing, is left for the sweep
        until(lambda: not run.without_launcher(), f"the end of {run.pids()}", GONE_S)
        assert list(SHM.glob(f"gemini-{run.paths.run_id}*"))  # that is what has to be swept
        assert call("status", str(run.run_dir)).returncode == 0
        assert run.paths.run_id in sweep(SHM)
        run.assert_nothing_is_left()


@pytest.mark.parametrize("elsewhere", [False, True], ids=["here", "another /dev/shm"])
def test_a_sweep_leaves_alone_whose_lock_it_cannot_see(elsewhere: bool) -> None:
    """A container, or a Slurm job with a /dev/shm of its own: its run may well live."""
    apart = ["unshare", *(["--user", "--map-current-user"] if os.geteuid() else []), "--mount"] if elsewhere else []
    if elsewhere and subprocess.run([*apart, "true"], capture_output=True).returncode:
        pytest.skip("this user may not make a mount namespace")
    run = "0" * 9 + ("1" if elsewhere else "0")
    process = subprocess.Popen([*apart, "sleep", "100"], env={**os.environ, RUN_MARK: run})
    try:
        until(lambda: Path(f"/proc/{process.pid}/comm").read_text() == "sleep\n", "the process", GONE_S)
        assert (run in sweep(SHM)) is not elsewhere
        assert (process.poll() is None) is elsewhere
    finally:
        process.kill()
        process.wait()


def test_two_runs_side_by_side(tmp_path: Path) -> None:
    """Neither knows of the other, and neither is hurt by an attempt to resume it."""
    places = [tmp_path / "one", tmp_path / "two"]
    for place in places:
        place.mkdir()
    settings = ("cluster.nodes=2", "train.steps=40", "verify=false", "drills=[{step: 10, rank: 1}]")
    with Run(places[0], *settings) as one, Run(places[1], *settings) as two:
        one.wait_for_training(step=2)
        keys, config = one.paths.keys.read_bytes(), one.paths.config.read_bytes()
        refused = call("submit", "--resume", str(one.run_dir))
        assert refused.returncode == 2 and refused.stdout == ""
        assert refused.stderr.startswith("error: ") and refused.stderr.count("\n") == 1
        assert "is being run already" in refused.stderr
        assert (one.paths.keys.read_bytes(), one.paths.config.read_bytes()) == (keys, config)
        for run in (one, two):
            run.wait_for_end()
            assert run.status["state"] == "finished" and run.status["persistent_step"] == 40
            assert [event["target"] for event in run.events("evict")] == ["node1"]
            assert [event["step"] for event in run.events("step", rank=0)][-1] == 40
        assert one.losses() == two.losses()
