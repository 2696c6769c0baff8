"""Where a run lives: a machine of one's own, or a Slurm site. One YAML file per site, in site_configs/."""

import getpass
import os
import shutil
from contextlib import suppress
from pathlib import Path
from string import Template
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from gemini_hpc.config.validation import Section, nearest, validate
from gemini_hpc.config.yaml_text import read_yaml
from gemini_hpc.errors import UserError

SITES_DIR = Path(__file__).resolve().parents[1] / "site_configs"
"""In a checkout a link to the top-level folder; in an installed package the files themselves."""

AUTO = "auto"

TOPOLOGY = "topology"
"""Slurm's leaf switches are the failure domains."""

_SHAPE = {
    "nodes": "set cluster.nodes and cluster.spares",
    "ntasks": "a run has one agent a node: leave it out",
    "ntasks_per_node": "a run has one agent a node: leave it out",
    "array": "each job does a run of its own: submit several",
}
"""Options that would make another job than the one that the run needs."""

_ONE_LINE = r"^[^\n\r]*$"
"""What becomes an #SBATCH line must not become two."""


class SiteConfig(Section):
    """A site. A setting that submitit knows has submitit's name."""

    name: str = Field("local", pattern=_ONE_LINE)
    """Name of the site, which is its file's"""
    kind: Literal["local", "slurm"] = "local"
    """local: virtual nodes on this machine; slurm: nodes of a Slurm allocation"""
    runs_dir: str = Field("runs", min_length=1)
    """folder of the run directories, on a file system that all nodes share; ~ and $VARIABLES are expanded"""
    shm_dir: str = Field("/dev/shm", min_length=1)
    """the memory file system of every node, for the arenas"""
    interface: str | None = None
    """network interface of the replicas, such as ib0; null: the default route's"""
    mpi: Literal["mpich", "openmpi"] = "mpich"
    """MPI of the replicas: mpich: the one that comes with the package; openmpi: the site's own Open MPI 4, on Slurm"""
    failure_domains: dict[str, str] | Literal["topology"] | None = None
    """what is lost together: {RACK: "n[1-4],n9", ...}; topology: what Slurm has as switches; null: each node alone"""
    return_s: float | None = Field(None, ge=0)
    """a node that was lost, and that is there, comes back as a spare after so many seconds; null: it does not"""
    timeout_min: int = Field(1440, ge=1)
    """time limit of the job, minutes"""
    signal_delay_s: int = Field(120, ge=1)
    """how long before the time limit the job is told by USR2, seconds"""
    python: str = Field('"${GEMINI_PYTHON:-.venv/bin/python}"', min_length=1, pattern=_ONE_LINE)
    """shell words that start Python in the job script; `submit` sets GEMINI_PYTHON to its own Python"""
    mem_gb: float | None = Field(None, ge=0.5)  # less than a worker takes; 0 would be all of it for Slurm
    """memory of each node, GiB; null: left to the site"""
    cpus_per_task: int | None = Field(None, ge=1)
    """cores of each node; null: left to the site"""
    gpus_per_node: int | None = Field(None, ge=0)
    """GPUs of each node; null: none are asked for"""
    gpu_limit: int | None = Field(None, ge=1)
    """GPUs that one user may hold in running jobs; null: no limit"""
    call_timeout_s: float = Field(60, gt=0)
    """bound of every call to Slurm (sbatch, squeue, scancel), seconds"""
    slurm_partition: str | None = Field(None, pattern=_ONE_LINE)
    """partition; null: the site's default or routing"""
    slurm_constraint: str | None = Field(None, pattern=_ONE_LINE)
    """features that every node must have; null: any node"""
    slurm_account: str | None = Field(None, pattern=_ONE_LINE)
    """account to charge; null: the user's default"""
    slurm_setup: tuple[str, ...] = ()
    """shell lines that run before Python is started, such as `module load`"""
    slurm_additional_parameters: dict[str, Any] = Field(default_factory=dict)
    """any other sbatch option by its long name; true: an option without a value, false: take ours away"""

    @field_validator("runs_dir", "shm_dir")
    @classmethod
    def _expand(cls, path: str) -> str:
        try:
            return str(Path(Template(path).substitute(_variables())).expanduser())
        except (KeyError, ValueError, RuntimeError) as unknown:
            raise ValueError(f"cannot expand {path!r} ({unknown}): set the variable, or write the path out") from None

    @field_validator("slurm_additional_parameters")
    @classmethod
    def _options(cls, options: dict[str, Any]) -> dict[str, Any]:
        for key, value in options.items():
            one_line = isinstance(value, (bool, int, float, str)) and "\n" not in str(value)
            if not one_line or not key.replace("-", "").replace("_", "").isalnum():
                wrong = f"slurm_additional_parameters: {key!r}: {value!r} is no sbatch option"
                raise ValueError(f"{wrong}: write its long name and one value")
            name = key.replace("-", "_")
            if name in _SHAPE:
                raise ValueError(f"slurm_additional_parameters: {key}: {_SHAPE[name]}")
            if name.startswith("gpus") or (name in ("gres", "tres_per_node", "tres_per_task") and "gpu" in str(value)):
                raise ValueError(f"slurm_additional_parameters: {key}: set site.gpus_per_node, which is checked")
        return options

    @model_validator(mode="after")
    def _has_slurm(self) -> Self:
        if self.failure_domains == TOPOLOGY and self.kind == "local":
            raise ValueError("site.failure_domains: only Slurm has a topology: name the nodes, or set it to null")
        return self

    @model_validator(mode="after")
    def _has_time_to_save(self) -> Self:
        if self.kind == "slurm" and self.signal_delay_s >= 60 * self.timeout_min:
            raise ValueError(
                f"site.signal_delay_s is {self.signal_delay_s} s, and the job has {60 * self.timeout_min} s in all:"
                f" set site.timeout_min={self.signal_delay_s // 60 + 10}"
            )
        return self

    @model_validator(mode="after")
    def _has_its_mpi(self) -> Self:
        if self.mpi == "openmpi" and self.kind == "local":
            raise ValueError("site.mpi is openmpi, which srun starts on Slurm sites only: set site.mpi=mpich")
        return self


def site_names() -> list[str]:
    """Return the names of the sites that come with the package."""
    return sorted(path.stem for path in SITES_DIR.glob("*.yaml"))


def resolve_site(name_or_path: str) -> SiteConfig:
    """Return the site of that name or YAML file; "auto" is Slurm where `sbatch` is found, else this machine.

    Raises UserError for an unknown name (naming the nearest), and for a file that cannot be read or is wrong.
    """
    if name_or_path == AUTO:
        name_or_path = "generic_slurm" if shutil.which("sbatch") else "local"
    path = SITES_DIR / f"{name_or_path}.yaml"
    if name_or_path not in site_names():
        path = Path(name_or_path).expanduser()
        if path.suffix not in (".yaml", ".yml"):
            known = nearest(name_or_path, [AUTO, *site_names()])
            raise UserError(f"unknown site {name_or_path!r}: {known}, or the path of a .yaml file")
    return validate(SiteConfig, {"name": path.stem, **_values(path)}, str(path))


def _values(path: Path) -> dict[str, Any]:
    """Return what a site file says: with `extends: NAME` that beside what that site of the package says."""
    own = read_yaml(path)
    base = own.pop("extends", None)
    if base is None:
        return own
    if base not in site_names():
        raise UserError(f"{path}: extends: {base!r}: {nearest(str(base), site_names())}")
    others = read_yaml(SITES_DIR / f"{base}.yaml")
    if "extends" in others:
        raise UserError(f"{path}: extends: {base!r} extends another one itself: write down what that one says")
    return others | own


def _variables() -> dict[str, str]:
    variables = dict(os.environ)
    if "USER" not in variables:  # as in containers and cron jobs
        with suppress(KeyError, OSError):
            variables["USER"] = getpass.getuser()
    return variables
