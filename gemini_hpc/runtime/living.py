"""Whether a run lives: on this machine its lock says so, for a job of Slurm its place in the queue."""

import json
import os

from gemini_hpc.config import RunConfig
from gemini_hpc.runtime.paths import RunPaths
from gemini_hpc.runtime.processes import is_held
from gemini_hpc.slurm.control import SlurmError, SlurmJob

ASK_S = 10.0


def note_job(paths: RunPaths, job_id: str) -> None:
    """Write down which job of Slurm does the run."""
    temporary = paths.job.with_suffix(".tmp")
    temporary.write_text(json.dumps({"id": job_id}) + "\n")
    os.replace(temporary, paths.job)


def job_of(paths: RunPaths) -> SlurmJob | None:
    """Return the job that does the run, or did."""
    try:
        return SlurmJob(str(int(json.loads(paths.job.read_text())["id"])), ASK_S)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def whereabouts(paths: RunPaths, run: RunConfig) -> str:
    """Say where the run is being done, or waits to be; "" = nowhere. Raises SlurmError when Slurm does not tell."""
    if run.site.kind == "local":
        return "on this machine" if is_held(paths.lock) else ""
    job = job_of(paths)
    return f"as job {job.id}, {state}" if job is not None and (state := job.state()) else ""


def is_alive(paths: RunPaths, run: RunConfig) -> bool | None:
    """Whether it lives; None = that cannot be told now."""
    try:
        return bool(whereabouts(paths, run))
    except SlurmError:
        return None
