"""Slurm, by way of submitit: the job script, and submission."""

from gemini_hpc.slurm.script import job_script
from gemini_hpc.slurm.submission import Job, submit_job

__all__ = ["Job", "job_script", "submit_job"]
