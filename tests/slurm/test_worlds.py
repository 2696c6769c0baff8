"""The step that a world of window hosts is: no Slurm is asked."""

from pathlib import Path

import pytest

from gemini_hpc.config import SiteConfig
from gemini_hpc.runtime.allocation import world_step
from gemini_hpc.slurm.control import SlurmJob
from gemini_hpc.windows import HostSpec
from gemini_hpc.windows.launch import THIS_NODE

HERE = HostSpec(THIS_NODE, Path("/dev/shm/arena"), Path("/tmp/socket"))


@pytest.mark.parametrize(("mpi", "srun"), [("mpich", "--mpi=pmi2"), ("openmpi", "--mpi=pmix")])
def test_srun_starts_a_world_of_the_sites_mpi(mpi: str, srun: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PMIX_RANK", "3")
    monkeypatch.setenv("OMPI_MCA_pml", "ucx")
    site = SiteConfig(kind="slurm", mpi=mpi, interface="ib0")  # type: ignore[arg-type]
    command, environment = world_step(SlurmJob("7", 1.0), ("n1", "n2"), "run", 1, HERE, site)
    assert srun in command and "--nodelist=n1,n2" in command
    assert environment.get("MPI4PY_MPIABI", "mpich") == mpi
    assert environment["OMPI_MCA_pml"] == "ucx", "the site knows its fabric"
    assert "PMIX_RANK" not in environment
