"""Probes of a compute node that a login node cannot stand for: Slurm there, whose memory files are, the interface."""

import os
import re
import shutil
from pathlib import Path

from gemini_hpc.config.capacity import cgroup_used
from gemini_hpc.runtime.probes.examine import Case, Finding, ok, problem, warning
from gemini_hpc.runtime.probes.network import interfaces, no_interface
from gemini_hpc.slurm.control import ask
from gemini_hpc.windows import network_interface
from gemini_hpc.windows.launch import SRUN_MPI

OF_AGENTS = ("srun", "scontrol", "squeue", "sinfo", "scancel")
"""Programs of Slurm that agents call."""

CHARGE_BYTES = 64 << 20
CGROUPS = Path("/sys/fs/cgroup")
NET, RDMA = Path("/sys/class/net"), Path("/sys/class/infiniband")
PMI = re.compile(r"\b(?:pmi2|pmix(?:_v\d+)?)\b")


def programs(case: Case) -> Finding:
    """Slurm's programs on this node, their version, and how srun starts MPI programs."""
    timeout_s = case.run.site.call_timeout_s
    if missing := [name for name in OF_AGENTS if not shutil.which(name)]:
        return problem(f"no {', '.join(missing)} on PATH, which agents call: load Slurm's module in site.slurm_setup")
    version = ask(timeout_s, "srun", "--version").strip()
    # older versions list them on stderr
    offered = mpi_kinds(ask(timeout_s, "sh", "-c", "srun --mpi=list 2>&1"))
    found = f"{version}; srun --mpi offers {', '.join(offered) or 'neither pmi2 nor pmix'}"
    if (needed := SRUN_MPI[case.run.site.mpi]) not in offered:
        return problem(f"{found}: window hosts need {needed}: ask the site for Slurm's plugin mpi_{needed}")
    return ok(found)


def mpi_kinds(listed: str) -> list[str]:
    """Return what `srun --mpi=list` says of PMI: pmi2, pmix, and the versions of pmix; it may fail to load all the
    same."""
    return sorted(set(PMI.findall(listed)))


def memory_charge(case: Case) -> Finding:
    """Whether memory files count as memory of the job: write some, and look at the group of the job."""
    job = f"job_{os.environ.get('SLURM_JOB_ID', '')}"
    place, before = case.run.site.shm_dir, _used(job)
    if before is None:
        return ok(f"not known whether {place} counts as memory of the job: no cgroup limits it; plan as if it did")
    with case.shared("charge").open("wb") as file:
        for _ in range(CHARGE_BYTES >> 20):
            file.write(bytes(1 << 20))
    after = _used(job)
    return charge(place, before, before if after is None else after)


def charge(place: str, before: int, after: int) -> Finding:
    """Judge by what the job's group is charged with, in bytes, before and after CHARGE_BYTES were written."""
    written, grown = CHARGE_BYTES >> 20, (after - before) / (1 << 20)
    seen = f"{written} MiB there made it {grown:.0f} MiB larger"
    if after - before > CHARGE_BYTES // 2:
        return ok(f"{place} counts as memory of the job ({seen}): site.mem_gb must hold the arena, too")
    return ok(f"{place} does not count as memory of the job ({seen})")


def _used(job: str) -> int | None:
    return cgroup_used(Path("/proc/self/cgroup").read_text(), CGROUPS, job)


def interface(case: Case) -> Finding:
    """The interface of replicas and control plane: up, how fast, and whether an RDMA device is behind it."""
    name = case.run.site.interface or network_interface()
    if name is None:
        return problem("no interface but lo has a route: set site.interface to the one that reaches the other nodes")
    if name not in interfaces():
        return problem(no_interface(name))
    if not (NET / name).exists():
        return problem(f"{name} is not in {NET}, where UCX looks for it: mount /sys in the container of the job, too")
    found = f"{name}{'' if case.run.site.interface else ' (of the default route)'} is up, {speed(name)}; "
    devices = rdma_devices(name)
    if devices:
        return ok(f"{found}RDMA device {', '.join(devices)} behind it; window hosts use TCP over it")
    others = sorted({other for other in interfaces() if other != name and rdma_devices(other)})
    if others and not case.run.site.interface:
        cure = f"set site.interface={others[0]}"
        return warning(f"{found}no RDMA device behind it, but behind {', '.join(others)}, the faster network: {cure}")
    return ok(f"{found}no RDMA device behind it; window hosts use TCP over it")


def speed(name: str, net: Path = NET) -> str:
    """Return the speed that the kernel knows, in words."""
    try:
        megabits = int((net / name / "speed").read_text())
    except (OSError, ValueError):
        megabits = -1
    return f"{megabits / 1000:g} Gbit/s" if megabits > 0 else "of unknown speed"


def rdma_devices(name: str, net: Path = NET, rdma: Path = RDMA) -> list[str]:
    """Return the RDMA devices on the same card as an interface, with the rates of their ports."""
    card = net / name / "device"
    if not card.exists() or not rdma.is_dir():
        return []
    mine = [device for device in sorted(rdma.iterdir()) if (device / "device").resolve() == card.resolve()]
    return [" at ".join([device.name, *_rates(device)]) for device in mine]


def _rates(device: Path) -> list[str]:
    try:
        return sorted({(port / "rate").read_text().strip() for port in (device / "ports").iterdir()})
    except OSError:
        return []
