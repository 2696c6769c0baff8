"""The command line, the environment, and the files that MPICH leaves: no MPI is started."""

import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gemini_hpc.errors import UserError
from gemini_hpc.windows import HostSpec, launch, mpi_leftovers, mpiexec_command, network_interface

PYTHON = Path(sys.executable)
ROUTES = """Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT
lo\t00000000\t0100007F\t0003\t0\t0\t0\t00000000\t0\t0\t0
docker0\t000011AC\t00000000\t0001\t0\t0\t0\t0000FFFF\t0\t0\t0
eth0\t00000000\t010200C0\t0003\t0\t0\t0\t00000000\t0\t0\t0
"""


def _hosts(number: int) -> list[HostSpec]:
    return [HostSpec(f"node{i}", Path(f"/dev/shm/arena {i}"), Path(f"/tmp/a b/{i}")) for i in range(number)]


def test_every_rank_carries_its_own_node() -> None:
    command, environment = mpiexec_command(PYTHON, "run 1", 7, _hosts(3), {"HOME": "/h", "PMI_RANK": "4"})
    ranks = " ".join(command).split(" : ")
    assert len(ranks) == 3
    for i, rank in enumerate(ranks):
        assert f"GEMINI_NODE=run 1:node{i} GEMINI_AGENT=/tmp/a b/{i} GEMINI_ARENA=/dev/shm/arena {i} " in rank
        assert rank.endswith("-m gemini_hpc.windows.host 7")
    assert environment["HOME"] == "/h"
    assert "PMI_RANK" not in environment


def test_hydra_takes_two_hundred_nodes_and_paths_with_spaces(tmp_path: Path) -> None:
    python = tmp_path / "a python"  # in the place of both the shield and the host
    python.write_text('#!/bin/sh\nwhile [ "$1" != env ]; do shift; done; exec env "$2" "$4" "$0-host"')
    host = tmp_path / "a python-host"
    host.write_text('#!/bin/sh\necho "$PMI_RANK $GEMINI_NODE $GEMINI_ARENA"')
    (tmp_path / "mpiexec.hydra").symlink_to(PYTHON.parent / "mpiexec.hydra")
    (tmp_path / "hydra_pmi_proxy").symlink_to(PYTHON.parent / "hydra_pmi_proxy")
    for script in (python, host):
        script.chmod(0o755)
    command, environment = mpiexec_command(python, "run 1", 1, _hosts(200), os.environ)
    run = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    assert set(run.stdout.splitlines()) == {f"{i} run 1:node{i} /dev/shm/arena {i}" for i in range(200)}


def test_without_mpich_the_next_thing_to_do_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="pip install mpich"):
        mpiexec_command(tmp_path / "python", "run", 1, _hosts(1), {})


def test_the_interface_of_the_default_route_is_preferred() -> None:
    assert network_interface(ROUTES) == "eth0"
    assert network_interface("".join(ROUTES.splitlines(keepends=True)[:3])) == "docker0"
    assert network_interface("".join(ROUTES.splitlines(keepends=True)[:2])) is None


def test_a_machine_with_loopback_alone_uses_shared_memory() -> None:
    assert launch.mpi_environment(None)["UCX_TLS"] == "posix,self"
    assert launch.mpi_environment("eth0")["UCX_NET_DEVICES"] == "eth0"


def test_open_mpi_meets_over_the_interface_too() -> None:
    settings = launch.mpi_environment("ib0", "openmpi")
    assert settings["MPI4PY_MPIABI"] == "openmpi" and settings["OMPI_MCA_btl_tcp_if_include"] == "ib0"
    assert not any(name.startswith(("UCX_", "MPIR_")) for name in settings)
    assert "OMPI_MCA_btl_tcp_if_include" not in launch.mpi_environment(None, "openmpi")


def test_a_missing_open_mpi_is_one_line(tmp_path: Path) -> None:
    python, why = tmp_path / "python", "OSError: libmpi.so.40: cannot open shared object file"
    python.write_text(f"#!/bin/sh\nprintf 'Traceback\n{why}\n' >&2; exit 1")
    python.chmod(0o755)
    with pytest.raises(UserError, match=f"openmpi, but {why}: load its module in site.slurm_setup, or set site.mpi="):
        launch.check_openmpi(python)
    python.write_text("#!/bin/sh\nexit 0")
    launch.check_openmpi(python)


def test_a_leftover_is_old_and_mapped_by_nobody() -> None:
    path = Path(f"/dev/shm/mpich_shm_test{os.getpid()}_0")
    path.write_bytes(bytes(mmap.PAGESIZE))
    try:
        assert path not in mpi_leftovers()
        assert path in mpi_leftovers(age_s=0)
        with path.open("r+b") as file, mmap.mmap(file.fileno(), 0):
            assert path not in mpi_leftovers(age_s=0)
        assert path in mpi_leftovers(age_s=0)
    finally:
        path.unlink()
