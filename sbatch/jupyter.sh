#!/bin/bash
# JupyterLab on a compute node, over the notebooks and runs of this clone.
#   sbatch sbatch/jupyter.sh    from the repository root after `make`; then do what jupyter-JOBID.out says

# Parameters
# Two cores: reading a run takes no more.
#SBATCH --cpus-per-task=2
# The name in squeue.
#SBATCH --job-name=gemini-jupyter
# Memory: the event log of a long run, and the notebooks' kernels.
#SBATCH --mem=8GB
# One node of any kind, and no GPU.
#SBATCH --nodes=1
# JupyterLab starts everything else.
#SBATCH --ntasks=1
# Where it says how to get there, where sbatch was called.
#SBATCH --output=jupyter-%j.out
# Time limit: what is not saved by then is lost.
#SBATCH --time=04:00:00

set -eu
python=${GEMINI_PYTHON:-.venv/bin/python}

# The password. In a file and an environment that nobody else can read: command lines and logs are seen by many.
secret=$PWD/jupyter-$SLURM_JOB_ID.token
trap 'rm -f "$secret"' EXIT
trap 'kill "$lab"; wait "$lab"; exit 0' TERM
(umask 077 && "$python" -c 'import secrets; print(secrets.token_hex(24))' >"$secret")
JUPYTER_TOKEN=$(<"$secret")
export JUPYTER_TOKEN

# A port that is free on this node; JupyterLab takes that one or none.
node=$(hostname -s)
port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')

cat >&2 <<END
On your own machine, and leave it open:
    ssh -N -L $port:$node:$port $(id -un)@${SLURM_SUBMIT_HOST:-the login node}
Then in its browser:
    http://localhost:$port/lab
The token it asks for, on the login node:
    cat $secret
To end it:
    scancel $SLURM_JOB_ID
END

"$python" -m jupyterlab --no-browser --ip="$node" --port="$port" --port-retries=0 notebooks/ &
lab=$!
wait "$lab"
