"""The command that starts one world of window hosts on this machine. No MPI here.

The settings are those that survived the killing of ranks (FACTS.md section 4): MPICH over UCX, TCP in large segments,
all ranks treated as remote. A Slurm site may name its own Open MPI in MPICH's place (DECISIONS.md, 38).
"""

import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gemini_hpc.errors import UserError

_SHARED_MEMORY = Path("/dev/shm")
_SEGMENT_BYTES = 256 << 10  # with UCX's own 8 KiB a quarter of the speed
_MPI_FILES = ("mpich_shm_*", "open_mpi.*")
_LEFTOVER_AGE_S = 1.0  # another MPI program of this user may be between creating and mapping its file
_FROM_OTHER_LAUNCHERS = ("PMI_", "PMIX_", "HYDI_", "HYDRA_", "MPIEXEC_")


THIS_NODE = "$SLURMD_NODENAME"
"""The name of the node, for a shell that runs in a step of Slurm."""

SRUN_MPI = {"mpich": "pmi2", "openmpi": "pmix"}
"""Which of srun's --mpi starts a world, by the site's MPI."""

_OPENMPI = "libmpi.so.40"  # of all its releases 4
_LOAD_S = 60.0


@dataclass(frozen=True)
class HostSpec:
    """One rank of the world: its node, the arena it exposes, and the socket of the agent that it obeys."""

    node: str
    arena_path: Path
    agent_socket: Path


def mpiexec_command(
    python: Path,
    run: str,
    world: int,
    hosts: Sequence[HostSpec],
    environment: Mapping[str, str],
    interface: str | None = None,
) -> tuple[list[str], dict[str, str]]:
    """Return the command line and environment that start one host per spec; `hosts[i]` gets MPI rank i.

    `environment` is what the caller would pass on. A node's own variables (GEMINI_NODE as `run:node`, GEMINI_AGENT,
    GEMINI_ARENA) are put before the host's command, not into the shield's environment, so that whoever kills a node
    by its GEMINI_NODE leaves the launcher's side alone. The hosts meet over `interface`, by default that of the default
    route (see `network_interface`). Start it with stdin closed. Raises UserError when MPICH's
    launcher is not installed beside `python`.
    """
    launcher = python.parent / "mpiexec.hydra"
    if not os.access(launcher, os.X_OK):
        raise UserError(f"no {launcher}: install MPICH there with `{python} -m pip install mpich`")
    # Fixed, or hydra asks a surrounding Slurm job, and the name service for this machine's name.
    command = [
        str(launcher),
        "-launcher",
        "fork",
        "-rmk",
        "user",
        "-hosts",
        "localhost",
        "-localhost",
        "localhost",
    ]
    shield = [str(python), "-I", "-S", str(Path(__file__).with_name("shield.py"))]
    host = [str(python), "-m", "gemini_hpc.windows.host", str(world)]
    for mpi_rank, spec in enumerate(hosts):
        node = [
            f"GEMINI_NODE={run}:{spec.node}",
            f"GEMINI_AGENT={spec.agent_socket}",
            f"GEMINI_ARENA={spec.arena_path}",
        ]
        command += [*([":"] if mpi_rank else []), "-n", "1", *shield, "env", *node, *host]
    inherited = {name: v for name, v in environment.items() if not name.startswith(_FROM_OTHER_LAUNCHERS)}
    return command, inherited | mpi_environment(interface or network_interface())


def step_command(python: Path, run: str, world: int, here: HostSpec) -> list[str]:
    """Return what every task of a step of Slurm runs: a host of `here`, in whose fields THIS_NODE is filled in there.

    The step is started with SRUN_MPI and `mpi_environment`; which node got which MPI rank, its hosts say.
    """
    fill_in = (
        f'GEMINI_NODE="{run}:{here.node}" GEMINI_AGENT="{here.agent_socket}" GEMINI_ARENA="{here.arena_path}" '
        'exec "$0" "$@"'
    )
    return ["sh", "-c", fill_in, str(python), "-m", "gemini_hpc.windows.host", str(world)]


def mpi_environment(interface: str | None, mpi: str = "mpich") -> dict[str, str]:
    """Return the settings of a site's `mpi` for hosts that meet over `interface`.

    None = shared memory of one machine with MPICH, whatever it chooses with Open MPI.
    """
    return _openmpi_environment(interface) if mpi == "openmpi" else _mpich_environment(interface)


def _mpich_environment(interface: str | None) -> dict[str, str]:
    settings = {
        "MPIR_CVAR_CH4_NETMOD": "ucx",
        "MPIR_CVAR_NOLOCAL": "1",
        "UCX_WARN_UNUSED_ENV_VARS": "n",
        "HWLOC_XMLFILE": os.devnull,
    }
    if interface is None:
        return settings | {"UCX_TLS": "posix,self", "UCX_NET_DEVICES": "all"}
    return settings | {
        "UCX_TLS": "tcp,self",
        "UCX_NET_DEVICES": interface,
        "UCX_TCP_TX_SEG_SIZE": str(_SEGMENT_BYTES),
        "UCX_TCP_RX_SEG_SIZE": str(_SEGMENT_BYTES),
    }


def _openmpi_environment(interface: str | None) -> dict[str, str]:
    settings = {
        "MPI4PY_MPIABI": "openmpi",
        "OMPI_MCA_pml": "ob1",
        "OMPI_MCA_btl": "tcp,self",
        "OMPI_MCA_osc": "pt2pt",
        # By default Slurm (22.05) lets a rank out of MPI_Init while others have not come as far: its first message
        # crashed them, in one start of six.
        "SLURM_PMIX_FENCE": "tree",
    }
    return settings | ({"OMPI_MCA_btl_tcp_if_include": interface} if interface else {})


def check_openmpi(python: Path) -> None:
    """Raise UserError where Open MPI's library cannot be loaded, which a process of its own tries."""
    load = [str(python), "-I", "-S", "-c", f"import ctypes; ctypes.CDLL({_OPENMPI!r})"]
    try:
        tried = subprocess.run(load, capture_output=True, text=True, timeout=_LOAD_S, stdin=subprocess.DEVNULL)
        if tried.returncode == 0:
            return
        why = (tried.stderr.strip().splitlines() or [f"{_OPENMPI} ended its process ({tried.returncode})"])[-1]
    except subprocess.TimeoutExpired:
        why = f"{_OPENMPI} could not be loaded in {_LOAD_S:.0f} s"
    raise UserError(f"site.mpi is openmpi, but {why}: load its module in site.slurm_setup, or set site.mpi=mpich")


def network_interface(routes: str | None = None) -> str | None:
    """Return the interface of the default IPv4 route, else of any route, else None (a machine with `lo` alone).

    `lo` itself cannot be used: UCX 1.20, the one in MPICH's wheel, looks up the route to a loopback address in the
    wrong place and finds its peers unreachable (openucx/ucx pull request 11202). Between processes of one machine the
    bytes do not leave it, whatever the interface. `routes` is for tests; the default is /proc/net/route.
    """
    text = Path("/proc/net/route").read_text() if routes is None else routes
    fields = [line.split() for line in text.splitlines()[1:]]
    usable = [(destination != "00000000", name) for name, destination, *_ in fields if name != "lo"]
    return min(usable)[1] if usable else None


def mpi_leftovers(age_s: float = _LEFTOVER_AGE_S) -> list[Path]:
    """Return the files in /dev/shm that killed MPI processes of this user left behind.

    A host removes its own file as soon as MPI is up, so only one killed during MPI's start-up (some 50 ms) leaves it.
    A leftover is a file of MPI's name, owned by this user, mapped by no living process, and not made just now.
    """
    mapped = "".join(_maps(process) for process in Path("/proc").glob("[0-9]*"))
    newest = time.time() - age_s
    leftovers = []
    for path in (path for pattern in _MPI_FILES for path in _SHARED_MEMORY.glob(pattern)):
        try:
            status = path.stat()
        except FileNotFoundError:
            continue
        if status.st_uid == os.getuid() and status.st_mtime <= newest and f"{path}\n" not in mapped:
            leftovers.append(path)
    return leftovers


def remove_mpi_leftovers() -> None:
    for leftover in mpi_leftovers():
        leftover.unlink(missing_ok=True)


def _maps(process: Path) -> str:
    try:
        return (process / "maps").read_text(errors="replace")
    except OSError:  # ended meanwhile, or another user's: that one cannot map a file of ours
        return ""
