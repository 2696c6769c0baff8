#!/bin/bash
# gpt2-gemini under gemini_hpc. Rendered by: python -m gemini_hpc.submit --dry-run --site ibex
#   sbatch THIS_FILE            a new run, from the repository root after `make`
#   sbatch THIS_FILE RUN_DIR    go on with a run that exists

# Parameters
# All nodes of one kind.
#SBATCH --constraint='a100&4gpus'
# Cores of each node: the worker, and a little for its agent, window host and archiver.
#SBATCH --cpus-per-task=8
# GPUs of each node. Those of spares count as well.
#SBATCH --gpus-per-node=1
# The name in squeue.
#SBATCH --job-name=gpt2-gemini
# Memory of each node: the worker, and the arena, as /dev/shm often counts as memory of the job.
#SBATCH --mem=64GB
# The job lives on when a node of it fails: that is what the spares are for.
#SBATCH --no-kill
# 4 nodes that train and 1 standing by; sbatch --nodes may give it more or fewer of those.
#SBATCH --nodes=5
# One agent for each node; it starts everything else there.
#SBATCH --ntasks-per-node=1
# After a requeue the log goes on.
#SBATCH --open-mode=append
# The supervisor's log, where sbatch was called; all else is in the run directory.
#SBATCH --output=slurm-%j.out
# Slurm may start the job again, on other nodes too: it goes on from its newest checkpoint.
#SBATCH --requeue
# So many seconds before the time limit the supervisor is told, and ends the run in order.
#SBATCH --signal=B:USR2@120
# Time limit in minutes.
#SBATCH --time=120

# setup
export NCCL_SOCKET_IFNAME=ib0 NCCL_IB_HCA=mlx5 NCCL_NET_GDR_LEVEL=4

# command
export SUBMITIT_EXECUTOR=slurm
set -eu
run_dir=${1:-}
if [ -z "$run_dir" ]; then
    # The job makes its own run directory, under a name that it finds again after a requeue.
    run_dir=$("${GEMINI_PYTHON:-.venv/bin/python}" -m gemini_hpc.submit --prepare "job-${SLURM_JOB_ID:-$$}" --site ibex)
fi
# exec: what Slurm or submitit signals must reach the supervisor itself.
exec "${GEMINI_PYTHON:-.venv/bin/python}" -u -m gemini_hpc.runtime.supervisor "$run_dir"
