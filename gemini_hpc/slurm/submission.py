"""Start a run's job through submitit, on this machine or on Slurm. A script is submitted, nothing pickled."""

import os
import shlex
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from submitit.local.local import LocalExecutor, LocalJob
from submitit.slurm.slurm import SlurmExecutor

from gemini_hpc.config import RunConfig
from gemini_hpc.errors import UserError
from gemini_hpc.slurm.control import SlurmError, job_of_script

SCRIPT_FILE = "submit.sh"
LOG_DIR = "logs/submitit"

_PYTHON = f"GEMINI_PYTHON={sys.executable}"  # the job runs on the Python that submits it
_KILL_S = 5.0  # for a process to vanish after SIGKILL
_LOCAL_POLL_S = 0.05
_SLURM_POLL_S = 5.0  # be kind to the controller that all users share


class Job(ABC):
    """A submitted job."""

    def __init__(self, job_id: str, log: Path, poll_s: float) -> None:
        self.id = job_id
        """Slurm's job id; on a local site the process id of submitit's controller."""
        self.log = log
        """What the script and the supervisor print."""
        self._poll_s = poll_s

    @abstractmethod
    def done(self) -> bool:
        """Return whether the job has ended. What became of the run is written in its directory."""

    @abstractmethod
    def cancel(self, grace_s: float) -> bool:
        """Send the supervisor SIGTERM; return whether the job ended within `grace_s` seconds.

        On a local site what has not ended by then is killed.
        """

    def wait(self, timeout_s: float) -> bool:
        """Return whether the job ended within `timeout_s` seconds."""
        deadline = time.monotonic() + timeout_s
        while not self.done():
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                return False
            time.sleep(min(left_s, self._poll_s))
        return True


def submit_job(config: RunConfig, run_dir: Path) -> Job:
    """Submit RUN_DIR/submit.sh with the run directory as its argument; return once it is started or queued.

    Logs go to RUN_DIR/logs/submitit, named as by submitit. Raises UserError when Slurm is away or refuses.
    """
    run_dir = run_dir.absolute()
    folder = run_dir / LOG_DIR
    folder.mkdir(parents=True, exist_ok=True)
    site = config.site
    if site.kind == "local":
        local = _LocalExecutor(folder)
        local.update_parameters(timeout_min=site.timeout_min, signal_delay_s=site.signal_delay_s)
        command = ["env", _PYTHON, "bash", str(run_dir / SCRIPT_FILE), str(run_dir)]
        return _LocalJob(local._submit_command(shlex.join(command)))
    executor = None
    try:
        executor = _SlurmExecutor(folder, run_dir, site.call_timeout_s)
        job_id = executor._submit_command("").job_id
    except RuntimeError as failed:  # as all of submitit's own errors are
        job_id = _taken_all_the_same(executor.script if executor else "", site.call_timeout_s, str(failed))
    return _SlurmJob(job_id, folder / f"{job_id}_0_log.out", site.call_timeout_s)


def _taken_all_the_same(script: str, timeout_s: float, failure: str) -> str:
    """Return the job's id if Slurm has the job though sbatch failed, or said something else. Raises UserError."""
    words = (failure or f"no answer in {timeout_s:g} s").splitlines()
    reason = next((line for line in words if line.startswith("sbatch: error: ")), words[0])
    away = not failure or "timed out" in failure.lower() or "contact" in failure.lower()
    try:
        if script and (job_id := job_of_script(script, timeout_s)):
            return job_id
    except SlurmError:
        away = True
    if away:
        look = f"squeue -u $(id -un) -o '%i %o' | grep {shlex.quote(script)}"
        raise UserError(f"Slurm may have taken the job, or may yet ({reason}): before another try, {look}")
    raise UserError(f"Slurm did not take the job ({reason}): correct the site, or try --site local")


class _LocalExecutor(LocalExecutor):
    """submitit's local executor, off the terminal.

    Its controller would die of a Ctrl-C that is meant for `submit` (and kill the supervisor a second later),
    and would hold the output of `submit` open. Here it gets a session and a log of its own.
    """

    def _submit_command(self, command: str) -> LocalJob[Any]:
        settings = {
            "EXECUTOR": "local",
            "LOCAL_COMMAND": command,
            "LOCAL_TIMEOUT_S": 60 * self.parameters["timeout_min"],
            "LOCAL_SIGNAL_DELAY_S": self.parameters["signal_delay_s"],
            "LOCAL_NTASKS": 1,
            "LOCAL_NODEID": 0,
            "LOCAL_JOB_NUM_NODES": 1,
            "LOCAL_WITH_SHELL": "",
            "STDERR_TO_STDOUT": 1,
        }
        environment = {**os.environ, **{f"SUBMITIT_{key}": str(value) for key, value in settings.items()}}
        with (self.folder / "controller.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "submitit.local._local", str(self.folder)],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return LocalJob(self.folder, str(process.pid), process=process)


class _LocalJob(Job):
    def __init__(self, job: LocalJob[Any]) -> None:
        super().__init__(job.job_id, job.paths.stdout, _LOCAL_POLL_S)
        self._job = job
        self._controller = psutil.Process(int(job.job_id))

    def done(self) -> bool:
        return self._job.done()

    def cancel(self, grace_s: float) -> bool:
        # not submitit's cancel(): that is SIGINT for the supervisor and, one second later, SIGKILL
        with suppress(psutil.NoSuchProcess):
            self._controller.terminate()
        if self.wait(grace_s):
            return True
        with suppress(psutil.NoSuchProcess):
            for process in [*self._controller.children(recursive=True), self._controller]:
                process.kill()
        self.wait(_KILL_S)
        return False


class _SlurmExecutor(SlurmExecutor):
    """submitit's Slurm executor, for a script that is written already and with a bound on sbatch."""

    def __init__(self, folder: Path, run_dir: Path, call_timeout_s: float) -> None:
        super().__init__(folder)
        self._run_dir = run_dir
        self.script = ""  # submitit's copy of the script, that Slurm was given
        self._call_timeout_s = call_timeout_s

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        return (self._run_dir / SCRIPT_FILE).read_text()

    def _make_submission_command(self, submission_file_path: Path) -> list[str]:
        self.script = str(submission_file_path)
        bounded = ["env", _PYTHON, "timeout", str(self._call_timeout_s)]
        options = ["--export=ALL", f"--output={str(self.folder).replace('%', '%%')}/%j_0_log.out"]
        return [*bounded, "sbatch", *options, str(submission_file_path), str(self._run_dir)]


class _SlurmJob(Job):
    def __init__(self, job_id: str, log: Path, call_timeout_s: float) -> None:
        super().__init__(job_id, log, _SLURM_POLL_S)
        self._call_timeout_s = call_timeout_s

    def done(self) -> bool:
        # squeue needs no accounting; it lists nothing for a job that has ended, and in time forgets it
        answer = self._call("squeue", "--noheader", "--format=%T", f"--jobs={self.id}")
        if answer is None:
            return False
        return "Invalid job id" in answer.stderr or (answer.returncode == 0 and not answer.stdout.strip())

    def cancel(self, grace_s: float) -> bool:
        self._call("scancel", self.id)
        return self.wait(grace_s)

    def _call(self, *command: str) -> "subprocess.CompletedProcess[str] | None":
        try:
            return subprocess.run(command, capture_output=True, text=True, timeout=self._call_timeout_s)
        except subprocess.TimeoutExpired:
            return None  # Slurm is busy or away; whoever polls asks again
