"""A user's own job that raises, or cannot be: the run says so, tries a bounded number of times, and ends."""

from pathlib import Path

import pytest

from tests.cluster.runs import Run, drills

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

JOB = """
from dataclasses import replace
from gemini_hpc.models import job


def build(run):
    training = job.build(run)

    def batch(step, rank, micro_step):
        if step == 5 and rank == 1:
            raise ValueError("a hole in the data at step 5")
        return training.batch(step, rank, micro_step)

    return replace(training, batch=batch)
"""


def test_an_exception_in_the_users_code(tmp_path: Path) -> None:
    (tmp_path / "my_job.py").write_text(JOB)
    settings = ("train.entry=my_job:build", "cluster.nodes=2", "cluster.spares=0", "train.steps=10", "verify=false")
    with Run(tmp_path, *settings, "recovery.max_restarts=1", drills()) as run:
        run.wait_for_end(1, timeout_s=200)
        assert run.status["state"] in ("stopped", "failed")
        starts = run.events("resumed", rank=1)
        assert 1 <= len(starts) <= 3
        assert f"logs     {run.paths.logs}" in run.text
        assert "ValueError: a hole in the data at step 5" in (run.paths.logs / "worker-node1.log").read_text()


LARGE = """
import torch
from gemini_hpc.models import job


def build(run):
    training = job.build(run)
    for number in range(4000):
        training.model.register_buffer(f"buffer_{number}", torch.zeros(1))
    return training
"""


def test_a_model_that_no_snapshot_can_carry_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "my_job.py").write_text(LARGE)
    settings = ("train.entry=my_job:build", "cluster.nodes=2", "cluster.spares=0", "verify=false")
    with Run(tmp_path, *settings, drills()) as run:
        run.wait_for_end(1, timeout_s=200)
        assert "tensors to save" in run.status["reason"] and "make them fewer" in run.status["reason"]
        assert not run.events("plan") and not run.events("evict")
