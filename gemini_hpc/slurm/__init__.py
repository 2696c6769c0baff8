"""Slurm: the job script, its submission by way of submitit, and what a running job asks of Slurm.

`control` is used by every node's agent, and starts as fast as that: it does without submitit.
"""
