"""Runs that are jobs of a real Slurm, as the tests of this folder see them."""

import json
import os
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.cluster.matrix import JOB, JOB_ENTRY
from tests.cluster.runs import GONE_S, Run, command, until
from tests.slurm.cluster import SlurmCluster

SITE = """\
kind: slurm
runs_dir: {place}/runs
timeout_min: 20
signal_delay_s: 60
cpus_per_task: 2
"""

LOOK_S = 0.5
DOWN_S = 60.0
AGAIN_S = 120.0
"""A job that was requeued starts again after its credential has expired."""


class SlurmRun(Run):
    """One `submit` on the login node, and its job, with the training of the fault matrix.

    Use as a context: at its end nothing of the run may be left.
    """

    def __init__(self, cluster: SlurmCluster, place: Path, *settings: str, resume: Path | None = None) -> None:
        (place / "fault_job.py").write_text(JOB)
        what = ["--resume", str(resume)] if resume else ["--site", str(site_of(place)), "model.preset=tiny", JOB_ENTRY]
        done = cluster.run(*command("submit", *what, *settings), cwd=place)
        assert done.returncode == 0, done.stderr
        told = dict(re.findall(r"^(run|job) +(.+)$", done.stdout, re.MULTILINE))
        self.cluster, self.place, self.shm = cluster, place, Path("/dev/shm")
        self._run_dir, self.job = Path(told["run"]), told["job"]
        self._earlier = len(self.events()) if resume else 0
        self._state, self._looked = "PENDING", 0.0

    @property
    def state(self) -> str:
        """The job's, as squeue has it; "" when it is over."""
        if time.monotonic() - self._looked > LOOK_S:
            self._looked = time.monotonic()
            self._state = self.cluster.run("squeue", "-h", "-o", "%T", "-j", self.job).stdout.strip()
        return self._state

    @property
    def text(self) -> str:
        return self.logs()

    @property
    def nodes(self) -> list[str]:
        """Those that the job has now."""
        names = self.cluster.run("squeue", "-h", "-o", "%N", "-j", self.job).stdout.strip()
        return self.cluster.run("scontrol", "show", "hostnames", names).stdout.split() if names else []

    def ended(self) -> bool:
        return self.state == ""

    def logs(self) -> str:
        logs = [*self.paths.logs.glob("*.log"), *self.paths.logs.glob("submitit/*.out")]
        return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')[-2000:]}" for path in logs)

    def wait_for_end(self, status: int = 0, timeout_s: float = 240.0) -> None:
        """Wait until the job has left the queue."""
        until(self.ended, "the end of the job", timeout_s)

    def note_mpi_files(self) -> None:
        """They lie in the nodes' own memory, all of which is looked at."""

    def host_maps(self, node: str) -> str:
        """Return what the window host of a node has mapped."""
        return self._of_host(node, "cat $(sed 's:.*:/proc/&/maps:')")

    def kill_host(self, node: str) -> None:
        self._of_host(node, "xargs kill -KILL")

    def _of_host(self, node: str, command: str) -> str:
        """Return what a shell command prints that reads the process of a node's window host from its input."""
        words = ["sh", "-c", f"pgrep -f '^[^ ]*python -m gemini_hpc.windows.host' | {command}"]
        return subprocess.run(self.cluster.nodes[node].enter(words), capture_output=True, text=True).stdout

    def leftovers(self) -> list[str]:
        left = []
        user = os.getuid()
        for node in self.cluster.nodes.values():
            if node.alive:
                mpi = f"/run/spmix_* /run/ompi.* /tmp/ompi.{node.name}.*"  # of Slurm's PMIx and of Open MPI
                look = (
                    f"find /dev/shm -mindepth 1 -user {user}; ls -d {mpi} 2>/dev/null; pgrep -u {user} -af [g]emini_hpc"
                )
                words = ["sh", "-c", look]
                found = subprocess.run(node.enter(words), capture_output=True, text=True)
                left += [f"{node.name}: {line}" for line in found.stdout.splitlines()]
        return left

    def destroy(self) -> None:
        self.cluster.run("scancel", self.job)
        until(self.ended, "the end of the cancelled job", GONE_S)

    def status_of(self) -> dict[str, Any]:
        """Return what `status --json` says on the login node."""
        return json.loads(self.cluster.run(*command("status", str(self.run_dir), "--json")).stdout)


def site_of(place: Path) -> Path:
    site = place / "test.yaml"
    site.write_text(SITE.format(place=place))
    return site


def shape(nodes: int, spares: int, steps: int) -> list[str]:
    return [f"cluster.nodes={nodes}", f"cluster.spares={spares}", f"train.steps={steps}"]


@contextmanager
def dead(cluster: SlurmCluster, node: str) -> Iterator[None]:
    """End a node; start it again afterwards, once Slurm has seen that it was gone."""
    cluster.nodes[node].end()
    with booted_again(cluster, node):
        yield


@contextmanager
def lost_power(cluster: SlurmCluster, node: str) -> Iterator[None]:
    cluster.lose_power(node)
    with booted_again(cluster, node):
        yield


@contextmanager
def booted_again(cluster: SlurmCluster, node: str) -> Iterator[None]:
    try:
        yield
    finally:
        until(lambda: node in cluster.states("down"), f"{node} to be down", DOWN_S)
        cluster.boot(node)
        until(lambda: node in cluster.states("idle"), f"{node} to be back", DOWN_S)
