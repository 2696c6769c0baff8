"""The one table of the variables that Slurm sets and we read."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from submitit.slurm.slurm import SlurmParseException, _parse_node_list

from gemini_hpc.errors import GeminiError


@dataclass(frozen=True)
class SlurmEnvironment:
    """What Slurm tells a process of a job about the job and about the process's own node."""

    job_id: str
    nodes: tuple[str, ...]  # of the whole allocation, spares included
    node_number: int  # this node's place in `nodes`; 0 in the batch script
    node_name: str  # this node; "" in the batch script of old versions
    restarts: int  # how often the job was requeued
    submit_dir: str  # where sbatch was called


_VARIABLES: dict[str, tuple[str, str | None, Callable[[str], Any]]] = {
    # field: (variable, value when it is unset; None = it must be set, type)
    "job_id": ("SLURM_JOB_ID", None, str),
    "nodes": ("SLURM_JOB_NODELIST", None, lambda text: tuple(_parse_node_list(text))),
    "node_number": ("SLURM_NODEID", "0", int),
    "node_name": ("SLURMD_NODENAME", "", str),
    "restarts": ("SLURM_RESTART_COUNT", "0", int),
    "submit_dir": ("SLURM_SUBMIT_DIR", ".", str),
}


def read_environment(variables: Mapping[str, str]) -> SlurmEnvironment | None:
    """Return what `variables` (os.environ) say of the Slurm job around this process; None outside of one.

    Raises GeminiError for a variable that is missing or malformed, by its name.
    """
    if "SLURM_JOB_ID" not in variables:
        return None
    values: dict[str, Any] = {}
    for field in fields(SlurmEnvironment):
        name, default, parse = _VARIABLES[field.name]
        text = variables.get(name, default)
        if text is None:
            raise GeminiError(f"Slurm has not set {name}: start this inside of a job, by sbatch or srun")
        try:
            values[field.name] = parse(text)
        except (ValueError, SlurmParseException):
            raise GeminiError(f"{name}={text!r} is not what Slurm sets: start this by sbatch or srun") from None
    return SlurmEnvironment(**values)
