"""Whether a run lives: on this machine its lock says so, for a job of Slurm its place in the queue."""

import os
from contextlib import suppress

from gemini_hpc.config import RunConfig
from gemini_hpc.runtime.paths import RunPaths
from gemini_hpc.runtime.processes import is_held
from gemini_hpc.slurm.control import SlurmError, SlurmJob

ASK_S = 10.0


def claim(paths: RunPaths, job_id: str) -> str:
    """Make this job of Slurm the one that does the run; return the id of another that does it, "" = there is none.

    Claims are numbered, the newest counts, and none is ever changed: of two jobs that make the same one, one fails.
    Raises SlurmError when Slurm does not say whether the job that has the newest is over.
    """
    paths.jobs.mkdir(exist_ok=True)
    mine = paths.jobs / f".{job_id}.{os.uname().nodename}.{os.getpid()}"
    mine.write_text(job_id)
    try:
        while True:
            number, holder = _newest_claim(paths)
            if holder == job_id:
                return ""
            if holder and SlurmJob(holder, ASK_S).state():
                return holder
            with suppress(FileExistsError):
                os.link(mine, paths.jobs / str(number + 1))
    finally:
        mine.unlink()


def _newest_claim(paths: RunPaths) -> tuple[int, str]:
    """Return its number and its job; (0, "") = there is none."""
    numbers = (int(entry.name) for entry in paths.jobs.glob("[0-9]*") if entry.name.isdigit())
    newest = max(numbers, default=0)
    return newest, (paths.jobs / str(newest)).read_text() if newest else ""


def job_of(paths: RunPaths) -> SlurmJob | None:
    """Return the job that does the run, or did."""
    try:
        _, job_id = _newest_claim(paths)
        return SlurmJob(str(int(job_id)), ASK_S)
    except (OSError, ValueError):
        return None


def whereabouts(paths: RunPaths, run: RunConfig) -> str:
    """Say where the run is being done, or waits to be; "" = nowhere. Raises SlurmError when Slurm does not tell."""
    if run.site.kind == "local":
        return "on this machine" if is_held(paths.lock) else ""
    job = job_of(paths)
    return f"as job {job.id}, {state}" if job is not None and (state := job.state()) else ""


def awaited(paths: RunPaths, run: RunConfig) -> list[str]:
    """Name what a run that nobody has led yet waits for; nothing, if it is nowhere."""
    try:
        where = whereabouts(paths, run)
    except SlurmError as error:
        return [f"Slurm ({error})"]
    if where.endswith("PENDING"):
        return [f"Slurm to start it ({where.removeprefix('as ')})"]
    return ["more than half of the agents to start, and one to lead"] if where else []


def is_alive(paths: RunPaths, run: RunConfig) -> bool | None:
    """Whether it lives; None = that cannot be told now."""
    try:
        return bool(whereabouts(paths, run))
    except SlurmError:
        return None
