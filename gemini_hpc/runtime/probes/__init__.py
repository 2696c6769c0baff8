"""What a machine really allows, found out by trying: one probe for each thing that a run depends on.

A probe is a name, a bound and a function (`examine.Probe`); `examine` runs it in a process of its own. `machine`,
`storage` and `network` hold the functions, `rank` the worker-like process of one. None is imported by a run.

On a Slurm site `nodes` submits and watches a job, and `job` is what runs there: the same functions, and those of
`compute` and `between`.
"""

from gemini_hpc.config import RunConfig
from gemini_hpc.runtime.probes import machine, network, storage
from gemini_hpc.runtime.probes.examine import Case, Finding, Level, Probe, examine

__all__ = ["Case", "Finding", "Level", "Probe", "examine", "probes_for"]


def probes_for(run: RunConfig) -> tuple[Probe, ...]:
    """Return what is to be examined before `run`: its machine, or of a Slurm site what a login node shows."""
    versions = Probe("versions", "the list of packages", 10, machine.versions, "install them anew: make")
    runs = Probe(
        "run directory",
        f"{storage.WRITE_BYTES >> 20} MiB on the disk of {run.site.runs_dir}",
        run.recovery.archive_s,
        storage.run_directory,
        "set site.runs_dir to a folder of yours on another disk",
        undo=storage.remove_trial,
    )
    if run.site.kind == "slurm":
        return versions, Probe("Slurm", "Slurm's commands", 10, machine.slurm_commands, "load its module"), runs
    # a machine may be slower than a run allows: then the probe still says how slow
    world_s, build_s = 2 * run.recovery.world_s, run.recovery.build_s
    return (
        versions,
        Probe("kernel", "answers of the kernel", 10, machine.kernel, "use Linux 5.4 or newer, without a sandbox"),
        Probe("limits", "threads to start", 10, machine.limits, "raise the limit on processes (ulimit -u)"),
        Probe("memory", "the sizes of memory", 10, machine.memory, "mount /proc"),
        Probe("memory files", f"an arena in {run.site.shm_dir}", 10, storage.memory_files, storage.ANOTHER_MEMORY),
        Probe("leftovers", "a list of dead runs", 10, storage.leftovers, storage.ANOTHER_MEMORY),
        Probe("clock", f"{machine.WATCH_S:g} s of ticks", 10 + machine.WATCH_S, machine.clock, "free some cores"),
        Probe("loopback", "connections to all nodes", 20, network.loopback, "bring the interface lo up"),
        Probe("control plane", "two CURVE sockets", 20, network.control_plane, "install pyzmq anew: make"),
        Probe("MPI world", "MPI world of 2 window hosts", world_s, network.mpi_world, network.other_interface()),
        Probe("gloo group", "gloo group of 2 processes", build_s, network.gloo_group, network.LOCALHOST),
        runs,
    )
