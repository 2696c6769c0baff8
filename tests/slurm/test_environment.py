"""The variables of a Slurm job, typed."""

import pytest

from gemini_hpc.errors import GeminiError
from gemini_hpc.slurm.environment import SlurmEnvironment, read_environment

JOB = {"SLURM_JOB_ID": "12", "SLURM_JOB_NODELIST": "gpu[08-10,12],login-1", "SLURM_SUBMIT_DIR": "/a b"}


def test_outside_of_a_job_there_is_none() -> None:
    assert read_environment({"SLURM_CONF": "/etc/slurm.conf"}) is None


def test_the_batch_script_of_a_first_start() -> None:
    nodes = ("gpu08", "gpu09", "gpu10", "gpu12", "login-1")
    assert read_environment(JOB) == SlurmEnvironment("12", nodes, 0, "", 0, "/a b")


def test_a_task_after_two_requeues() -> None:
    task = read_environment({**JOB, "SLURM_NODEID": "3", "SLURMD_NODENAME": "gpu12", "SLURM_RESTART_COUNT": "2"})
    assert task is not None
    assert (task.node_number, task.node_name, task.restarts) == (3, "gpu12", 2)
    assert task.nodes[task.node_number] == task.node_name


@pytest.mark.parametrize(
    "wrong",
    [{"SLURM_NODEID": "x"}, {"SLURM_JOB_NODELIST": "gpu[1-"}, {"SLURM_RESTART_COUNT": ""}],
)
def test_a_malformed_variable_is_named(wrong: dict[str, str]) -> None:
    with pytest.raises(GeminiError, match=next(iter(wrong))):
        read_environment({**JOB, **wrong})


def test_a_missing_variable_is_named() -> None:
    with pytest.raises(GeminiError, match="SLURM_JOB_NODELIST"):
        read_environment({"SLURM_JOB_ID": "12"})
