"""What Slurm is asked and told while a job runs. Every call is bounded, and none is trusted to answer."""

import os
import subprocess
from collections.abc import Mapping, Sequence
from math import inf

from gemini_hpc.errors import GeminiError

_OF_THE_JOB = ("SLURM_CONF", "SLURM_JOB_ID", "SLURM_CLUSTER_NAME")
"""All other variables are of the step or batch script that a process was started by, and srun would take them for
options."""

_LAUNCHERS = ("SLURM_", "SRUN_", "PMI_", "PMIX_", "PMI2_")

_GONE = ("down", "fail", "error", "powering_down", "powered_down", "power_down", "unknown")
_GOES_ON = ("RUNNING", "SIGNALING", "RESIZING", "SUSPENDED", "STOPPED")
_LEAVING = ("failing", "drain", "drained", "draining", "drng", "maint")


class SlurmError(GeminiError):
    """Slurm did not answer, or refused."""


class SlurmJob:
    """One running job, from any of its nodes."""

    def __init__(self, job_id: str, timeout_s: float) -> None:
        self.id = job_id
        self._timeout_s = timeout_s

    def nodes(self, nodelist: str) -> tuple[str, ...]:
        """Return the names in a list such as n[1-4,7]."""
        return tuple(self._call("scontrol", "show", "hostnames", nodelist).split())

    def switches(self) -> dict[str, str]:
        """Return the nodes, as a list for `nodes`, at each leaf switch. Raises SlurmError where Slurm knows of none."""
        answer = self._call("scontrol", "show", "topology")
        leaves = [dict(word.split("=", 1) for word in line.split() if "=" in word) for line in answer.splitlines()]
        found = {leaf["SwitchName"]: leaf["Nodes"] for leaf in leaves if leaf.get("Level") == "0" and leaf.get("Nodes")}
        if not found:
            raise SlurmError("Slurm knows no switches (scontrol show topology): name the nodes in site.failure_domains")
        return found

    def node_states(self, nodes: Sequence[str]) -> dict[str, str]:
        """Return "up", "leaving" (it is drained: no new work) or "gone" for each node that Slurm knows."""
        answer = self._call("sinfo", "--noheader", "--Node", f"--nodes={','.join(nodes)}", "--format=%N %T")
        found = {}
        for line in answer.splitlines():
            node, state = line.split(maxsplit=1)
            state = state.lower().rstrip("*~#!%$@+^-")  # marks for: does not answer, powers up, and so on
            found[node] = "gone" if state in _GONE else "leaving" if state in _LEAVING else "up"
        return found

    def state(self) -> str:
        """Return the job's state as squeue has it, such as RUNNING; "" = it is not in the queue any more."""
        try:
            return self._call("squeue", "--noheader", "--format=%T", f"--jobs={self.id}").strip()
        except SlurmError as error:
            if "Invalid job id" in str(error):
                return ""
            raise

    def goes_on(self) -> bool:
        """Whether it has nodes and is not being ended; a job that is about to be preempted is not yet."""
        return self.state() in _GOES_ON

    def place(self) -> tuple[str, str]:
        """Return the job's state and, while it waits, why, such as ("PENDING", "Priority"); ("", "") = it is over."""
        try:
            answer = self._call("squeue", "--noheader", "--format=%T %r", f"--jobs={self.id}")
        except SlurmError as error:
            if "Invalid job id" in str(error):
                return "", ""
            raise
        state, _, reason = answer.strip().partition(" ")
        return state, reason if state == "PENDING" else ""

    def left_s(self) -> float:
        """Return the seconds until the job's time limit; infinite when it has none."""
        return duration_s(self._call("squeue", "--noheader", "--format=%L", f"--jobs={self.id}").strip())

    def nodelist(self) -> str:
        """Return the nodes that the job has now, as a list for `nodes`: it loses those that go down."""
        return self._call("squeue", "--noheader", "--format=%N", f"--jobs={self.id}").strip()

    def steps(self) -> list[tuple[str, str]]:
        """Return the name and the nodes, such as n[1-4], of each step that runs."""
        answer = self._call("squeue", "--steps", "--noheader", "--format=%j %N", f"--jobs={self.id}")
        return [(name, nodes) for name, _, nodes in (line.strip().partition(" ") for line in answer.splitlines())]

    def requeue(self) -> None:
        """Have the job start again, when there are nodes for it; this ends it now, the caller's step included."""
        self._call("scontrol", "requeue", self.id)

    def cancel(self) -> None:
        """End the job now, the caller's step included."""
        self._call("scancel", self.id)

    def step(self, nodes: Sequence[str], name: str, *options: str) -> list[str]:
        """Return the words before a program that is to run once on each of `nodes`, in a step of its own.

        The step shares the job's resources with all others, and outlives the loss of nodes, of tasks, and of srun.
        Its environment is `step_environment`. What it prints is srun's to write, and lost with it.
        """
        return [
            "srun",
            f"--jobid={self.id}",
            f"--job-name={name}",
            "--overlap",
            "--no-kill",
            "--kill-on-bad-exit=0",
            "--wait=0",
            f"--nodes={len(nodes)}",
            f"--ntasks={len(nodes)}",
            "--ntasks-per-node=1",
            f"--nodelist={','.join(nodes)}",
            "--input=none",
            *options,
        ]

    def _call(self, *words: str) -> str:
        return ask(self._timeout_s, *words)


def ask(timeout_s: float, *words: str) -> str:
    """Return what a program of Slurm prints. Raises SlurmError."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=timeout_s, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{words[0]} did not answer in {timeout_s:g} s") from None
    except OSError as error:
        raise SlurmError(f"{words[0]} cannot be started: {error.strerror}") from None
    if done.returncode:
        reason = done.stderr.strip().splitlines()
        raise SlurmError(reason[0] if reason else f"{words[0]} ended with status {done.returncode}")
    return done.stdout


def duration_s(text: str) -> float:
    """Return the seconds that squeue writes as [DAYS-][[HOURS:]MINUTES:]SECONDS; infinite for UNLIMITED and such."""
    days, _, time = text.rpartition("-") if text[:1] != "-" else ("", "", "0")  # below zero: it is over the limit
    parts = [days or "0", *["0"] * (2 - time.count(":")), *time.split(":")]
    if not all(part.isdecimal() for part in parts):
        return inf
    seconds = 0
    for part, unit in zip(parts, (1, 24, 60, 60), strict=True):
        seconds = seconds * unit + int(part)
    return seconds


def jobs_named(name: str, timeout_s: float) -> dict[str, str]:
    """Return the state of each job of this user that has this name and is not over yet."""
    answer = ask(timeout_s, "squeue", "--noheader", f"--user={os.getuid()}", f"--name={name}", "--format=%i %T")
    return dict(line.split(maxsplit=1) for line in answer.splitlines())


def job_of_script(path: str, timeout_s: float) -> str:
    """Return the id of this user's job that runs, or waits to run, the script at `path`; "" = there is none."""
    answer = ask(timeout_s, "squeue", "--noheader", f"--user={os.getuid()}", "--format=%i %o")
    jobs = (line.strip().partition(" ") for line in answer.splitlines())
    return next((job_id for job_id, _, command in jobs if command.strip().startswith(path)), "")


def cancel_named(name: str, timeout_s: float) -> None:
    """End all jobs of this user that have this name: whoever has been interrupted may not know the id of its job."""
    ask(timeout_s, "scancel", f"--user={os.getuid()}", f"--name={name}")


def step_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return what a new step may inherit: nothing of the step or script that starts it."""
    return {
        name: value for name, value in environment.items() if name in _OF_THE_JOB or not name.startswith(_LAUNCHERS)
    }


def this_job(timeout_s: float) -> SlurmJob:
    """Return the job that this process belongs to. Raises SlurmError where it belongs to none."""
    job_id = os.environ.get("SLURM_JOB_ID")
    if not job_id:
        raise SlurmError("this is no job of Slurm (SLURM_JOB_ID is not set): start it with sbatch")
    return SlurmJob(job_id, timeout_s)
