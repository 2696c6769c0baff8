"""What is done to a living run from outside: drills, and SIGKILL for the expendable processes."""

import json
import shutil
from pathlib import Path

import pytest

from tests.cluster.runs import EVENT_S, Run, call, drills, reference_losses, until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]

DOCUMENTED = {
    "run_dir", "alive", "run", "state", "generation", "step", "total_steps", "world_size", "replicas",
    "placement_groups", "shared_domains", "safe_step", "persistent_step", "protected", "window_world", "nodes",
    "waiting_for", "waiting_s", "recoveries", "loss", "step_s", "t",
}  # fmt: skip


def opened(pid: int) -> list[Path]:
    """Return the files that a process has open, as its main thread sees them."""
    links = Path(f"/proc/{pid}/fd").iterdir()
    return [link.readlink() for link in links if link.is_symlink()]


def test_a_drill_from_a_second_terminal(tmp_path: Path) -> None:
    with Run(tmp_path, "cluster.nodes=3", "train.steps=60", drills()) as run:
        run.wait_for_training(step=5)
        before = json.loads(call("status", str(run.run_dir), "--json").stdout)
        assert before.keys() >= DOCUMENTED and before["alive"] is True and before["state"] == "running"
        answer = call("drill", str(run.run_dir), "kill-node", "node1")
        assert answer.returncode == 0 and answer.stdout.startswith("kill-node node1: done"), answer.stderr
        run.wait_for("fault", action="kill_node", target="node1")
        run.wait_for("first_step", generation=run.generation(2))
        again = call("drill", str(run.run_dir), "kill-node", "node1")
        assert again.returncode == 2 and again.stderr.startswith("error: ") and again.stderr.count("\n") == 1
        run.wait_for_end(timeout_s=300)
        run.assert_identical_to(reference_losses(run.run_dir))
        after = json.loads(call("status", str(run.run_dir), "--json").stdout)
        assert DOCUMENTED | {"verdict", "reason"} <= after.keys()
        assert after["alive"] is False and after["state"] == "finished"
        (recovery,) = after["recoveries"]
        assert recovery["milestones_ms"]["first step"] > 0
        words = call("status", str(run.run_dir)).stdout
        assert "finished" in words and "node1" in words
        late = call("drill", str(run.run_dir), "kill-worker", "node0")
        assert late.returncode == 2 and "not running" in late.stderr


def test_the_expendable_processes_may_die(tmp_path: Path) -> None:
    """A window host, an archiver, an idle spare: no rank is lost, and training goes on in the same generation.

    Though their logs cannot be opened any more: the shared file system may do what it likes. So no agent has a file
    of it open, which whatever it starts would have to close.
    """
    settings = ("cluster.nodes=3", "train.steps=100", "protect.persist_every=30", "verify=false")
    with Run(tmp_path, *settings, drills()) as run:
        run.wait_for_training(step=4)
        assert not [
            path for pid in run.pids("gemini_hpc.runtime.agent") for path in opened(pid) if run.run_dir in path.parents
        ]
        shutil.rmtree(run.paths.logs)
        run.kill("gemini_hpc.windows.host", "node1")
        run.wait_for("world", state="ready", number=2)
        run.note_mpi_files()
        safe = max(event["step"] for event in run.events("safe"))
        run.wait_for("safe", at_least=safe + 2)
        (archiver,) = run.pids("gemini_hpc.runtime.archiver", "node0")
        run.kill("gemini_hpc.runtime.archiver", "node0")
        until(lambda: run.pids("gemini_hpc.runtime.archiver", "node0") not in ([], [archiver]), "archiver", EVENT_S)
        for role in ("worker", "agent"):
            run.kill(f"gemini_hpc.runtime.{role}", "node3")
        run.wait_for("evict", target="node3")
        run.wait_for_end()
        assert [plan["generation"] for plan in run.events("plan")] == [1]
        assert not run.events("abort")
        assert run.status["persistent_step"] == 100
        assert max(event["step"] for event in run.events("persisted")) == 100
