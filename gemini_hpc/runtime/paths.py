"""Where the files of a run are: its directory on the shared file system, its names in shared memory."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from gemini_hpc.config import RunConfig, read_run


def run_id(run_dir: Path) -> str:
    """Return the short name of a run, the same for every process that is given its directory."""
    return hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:10]


def lock_path(run: str) -> Path:
    return Path("/dev/shm", f"gemini-{run}.lock")


@dataclass(frozen=True)
class RunPaths:
    """The files of one run. `shm_dir` is the memory file system, /dev/shm."""

    run_dir: Path
    shm_dir: Path

    @cached_property
    def run_id(self) -> str:
        return run_id(self.run_dir)  # once: it looks at the shared file system, and an agent's loop must not

    @property
    def config(self) -> Path:
        return self.run_dir / "config.yaml"

    @property
    def keys(self) -> Path:
        return self.run_dir / "keys.json"

    @property
    def status(self) -> Path:
        return self.run_dir / "status.json"

    @property
    def jobs(self) -> Path:
        return self.run_dir / "jobs"

    @property
    def logs(self) -> Path:
        return self.run_dir / "logs"

    @property
    def checkpoints(self) -> Path:
        return self.run_dir / "checkpoints"

    @property
    def reference(self) -> Path:
        return self.run_dir / "reference"

    @property
    def report(self) -> Path:
        return self.run_dir / "report.html"

    def arena(self, node: str) -> Path:
        return self.shm_dir / f"gemini-{self.run_id}-{node}.arena"

    def socket(self, node: str) -> Path:
        """The agent's local socket; here because the path of a Unix socket must be short."""
        return self.shm_dir / f"gemini-{self.run_id}-{node}.sock"

    @property
    def lock(self) -> Path:
        """Held while the run lives. In one place whatever the site, so that everybody on the machine finds it."""
        return lock_path(self.run_id)

    def node_lock(self, node: str) -> Path:
        """Held while the agent of a node of Slurm lives."""
        return Path(self.lock.parent, f"gemini-{self.run_id}-{node}.lock")


def open_run(run_dir: str | Path) -> tuple[RunPaths, RunConfig]:
    """Return the files and the configuration of an existing run. Raises UserError when it is not one."""
    run = read_run(run_dir)
    return RunPaths(Path(run_dir).resolve(), Path(run.site.shm_dir)), run
