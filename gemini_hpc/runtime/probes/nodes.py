"""The compute nodes of a Slurm site: a short job is submitted, watched, and what its nodes find is handed on.

All of it is one probe, `job`, on the login node: its process may hang with the shared file system, and is then killed
and its job cancelled like any other's. What comes one by one goes through a `Stream` to whoever examines.
"""

import json
import os
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

from gemini_hpc.config import CONFIG_FILE, RunConfig, dump
from gemini_hpc.runtime.probes import job as on_nodes
from gemini_hpc.runtime.probes.examine import Case, Finding, Level, Probe, last_line, ok, problem, warning
from gemini_hpc.runtime.probes.folder import Folder
from gemini_hpc.runtime.probes.storage import existing
from gemini_hpc.runtime.processes import RUN_MARK
from gemini_hpc.slurm.control import SlurmError, SlurmJob, cancel_named, jobs_named
from gemini_hpc.slurm.script import probe_script

NODES_MAX = 2
JOB_MIN = 5
"""Time limit of the job; it takes half a minute where everything is well."""

QUEUE_S = 3.0
"""Between two questions to the controller that all users share."""

UNTOLD = "?"
NOT_STARTED = ("PENDING", "CONFIGURING", UNTOLD)

PING_S = 0.1
STALE_S = 5.0
"""How long a file may still look shorter than it is: file systems in user space believe sizes for a second."""

END_S = 5.0
"""How long a job that is done may take to leave the queue before it is cancelled."""

END_POLL_S = 0.5
LEAVE_S = 20.0
"""How long a cancelled one may."""

SKEW_S = 1.0
"""Clocks that differ by more put the events of a recovery in the wrong order."""


class Stream:
    """What the process of a probe tells before it is done. Made before the process is forked."""

    def __init__(self) -> None:
        self._fd, self._read = os.memfd_create("told"), 0

    def tell(self, **news: Any) -> None:
        os.write(self._fd, json.dumps(news).encode() + b"\n")

    def news(self) -> list[dict[str, Any]]:
        """Return what was told since the last call."""
        told = os.pread(self._fd, os.fstat(self._fd).st_size - self._read, self._read)
        whole = told[: told.rfind(b"\n") + 1]
        self._read += len(whole)
        return [json.loads(line) for line in whole.splitlines()]


def job_probe(run: RunConfig, stream: Stream, wait_min: float) -> Probe:
    """Return the probe that does it all. It tells {"waits": text} and {"finding": a line of a node, "nodes": names}.

    The job is cancelled when it does not start within `wait_min` minutes.
    """
    call_s = run.site.call_timeout_s
    return Probe(
        "job",
        "end of the job on the compute nodes",
        60 * (wait_min + JOB_MIN + 1) + LEAVE_S + 6 * call_s,
        partial(_look, stream, wait_min),
        "see squeue --me, or leave the job out with --login-only",
        undo=_undo,
        undo_s=LEAVE_S + 2 * call_s,
    )


def _look(stream: Stream, wait_min: float, case: Case) -> Finding:
    done = False
    try:
        watch = _Watch(case, stream, wait_min)
        finding = watch.start() or watch.collect()
        done = watch.over is not None
    finally:
        left = _clear(case, END_S if done else 0.0)
    return Finding(Level.PROBLEM if left else finding.level, finding.text + left)


def _undo(case: Case) -> Finding:
    left = _clear(case, 0.0)
    return problem(left.removeprefix("; ")) if left else ok("nothing left")


# --- the job ------------------------------------------------------------------------------------------------


def _name(case: Case) -> str:
    return f"gemini-doctor-{case.id}"


def _folder(case: Case) -> Folder:
    return Folder(existing(case) / f".{_name(case)}")


def _submit(case: Case, folder: Folder) -> tuple[str, Path]:
    """Submit the job; return its id and its log. Raises UserError when Slurm does not take it."""
    from gemini_hpc.slurm.submission import SCRIPT_FILE, submit_job  # submitit takes a moment to import

    run = case.run
    os.environ.pop(RUN_MARK, None)  # the job is not ours to kill as a process: on its nodes the case has another id
    nodes = min(NODES_MAX, run.cluster.nodes + run.cluster.spares)
    folder.path.mkdir(mode=0o700)
    (folder.path / CONFIG_FILE).write_text(dump(run))
    (folder.path / SCRIPT_FILE).write_text(probe_script(run, _name(case), nodes, JOB_MIN))
    folder.post(on_nodes.CASE, {"id": secrets.token_hex(5), "shapes": case.shapes})
    job = submit_job(run, folder.path)
    return job.id, job.log


def _clear(case: Case, patience_s: float) -> str:
    """End the job, if it has not ended `patience_s` seconds from now, and remove its folder; say what is left."""
    began, left = time.monotonic(), "unasked"
    while left and (waited_s := time.monotonic() - began) < patience_s + LEAVE_S:
        left = _still_there(case, cancel=waited_s >= patience_s)
        if left:
            time.sleep(END_POLL_S)
    folder = _folder(case)
    folder.remove()
    said = f"; its job may be left ({left}): scancel --name={_name(case)}" if left else ""
    return said + (f"; {folder.path} is left: remove it by hand" if folder.path.exists() else "")


def _still_there(case: Case, cancel: bool) -> str:
    """Return what squeue says of the job, or why it does not answer; "" = the job is over."""
    name, timeout_s = _name(case), case.run.site.call_timeout_s
    try:
        jobs = jobs_named(name, timeout_s)
        if cancel and any(state != "COMPLETING" for state in jobs.values()):
            cancel_named(name, timeout_s)
        return ", ".join(f"{number} {state}" for number, state in jobs.items())
    except SlurmError as error:  # busy, or away
        return str(error)


class _Watch:
    """The job from its submission to its end, seen through Slurm and through the folder."""

    def __init__(self, case: Case, stream: Stream, wait_min: float) -> None:
        """Submit it. Raises UserError when Slurm does not take it."""
        self._run, self._stream, self._wait_min = case.run, stream, wait_min
        self.over: int | None = None
        """The exit status of the probing step."""
        self._nodes: tuple[str, ...] = ()
        self._rows_told = 0
        self._clocks: dict[str, tuple[float, float]] = {}  # of each node: see `judge_clocks`
        self._folder = _folder(case)
        stream.tell(waits="sbatch to take the job")
        self._id, self._log = _submit(case, self._folder)
        self._job = SlurmJob(self._id, case.run.site.call_timeout_s)
        self._submitted = self._started = self._deadline = time.monotonic()

    def start(self) -> Finding | None:
        """Wait until the job runs; a warning when it does not in time."""
        while True:
            self._exchange_pings()
            state, reason = self._state()
            if state not in NOT_STARTED:
                self._started = time.monotonic()
                self._deadline = self._started + 60 * (JOB_MIN + 1)
                return None
            waited_min = (time.monotonic() - self._submitted) / 60
            shown = f"{state} ({reason})" if reason else state
            self._stream.tell(waits=f"job {self._id} to start (up to {self._wait_min:g} min): {shown}")
            if waited_min >= self._wait_min:
                cure = "try again when nodes are free, or with a longer --wait-min"
                found = f"job {self._id} did not start within {self._wait_min:g} min ({shown}) and was cancelled"
                return warning(f"{found}: {cure}")
            time.sleep(min(QUEUE_S, max(0.1, 60 * (self._wait_min - waited_min))))

    def collect(self) -> Finding:
        """Hand on what the nodes find until the job is over, or its time is."""
        ask, state = time.monotonic() + QUEUE_S, "RUNNING"
        while True:
            self._exchange_pings()
            self._tell_rows(whole=True)
            self.over = self._folder.read(on_nodes.OVER)
            if self.over is not None or state == "" or time.monotonic() > self._deadline:
                return self._conclude()
            if time.monotonic() > ask:
                ask, state = time.monotonic() + QUEUE_S, self._state()[0]
            if state:
                self._stream.tell(waits=f"job {self._id} ({state}) on {', '.join(self._nodes) or 'its nodes'}")
            time.sleep(PING_S)

    def _state(self) -> tuple[str, str]:
        try:
            return self._job.place()
        except SlurmError as error:  # busy, or away
            return UNTOLD, str(error)

    def _exchange_pings(self) -> None:
        """Post the time here, and see which times the nodes had when they saw one."""
        if not self._nodes:
            self._nodes = tuple(self._folder.read(on_nodes.NODES) or ())
        for node in self._nodes:
            if pong := self._folder.read(on_nodes.pong_of(node)):
                ping, there = pong  # between the time of the ping and now
                low, high = self._clocks.get(node, (-float("inf"), float("inf")))
                self._clocks[node] = max(low, there - time.time()), min(high, there - ping)
        self._folder.post(on_nodes.PING, time.time())

    def _tell_rows(self, whole: bool) -> None:
        """Tell what all nodes have found; without `whole` also what only some have."""
        lines = [self._folder.lines(on_nodes.found_by(node)) for node in self._nodes]
        rows = list(zip(*lines, strict=False)) if whole else list(zip_longest(*lines))
        for row in rows[self._rows_told :]:
            for nodes, found in merged(dict(zip(self._nodes, row, strict=True))):
                together = found["probe"] in on_nodes.TOGETHER and nodes == [self._nodes[0]]
                self._stream.tell(finding=found, nodes=self._nodes if together else nodes)
        self._rows_told = max(self._rows_told, len(rows))

    def _conclude(self) -> Finding:
        deadline = time.monotonic() + STALE_S
        while self.over == 0 and not self._is_all_there() and time.monotonic() < deadline:
            time.sleep(PING_S)
        self._tell_rows(whole=False)
        self._folder.post(on_nodes.SEEN, True)
        for node, last in silent({n: self._folder.lines(on_nodes.found_by(n)) for n in self._nodes}).items():
            fallen = problem(f"nothing was heard of it after {last}: see what sinfo says of it, and try again")
            self._stream.tell(finding=on_nodes.entry("node", fallen, 0.0), nodes=[node])
        if self._clocks:
            self._tell("clocks", judge_clocks(self._clocks))
        if self._rows_told:
            self._tell("no-kill", no_kill(self._run))
        waited_s, ran_s = self._started - self._submitted, time.monotonic() - self._started
        where = f" on {', '.join(self._nodes)}" if self._nodes else ""
        found = f"job {self._id}{where}: {waited_s:.0f} s in the queue, ran {ran_s:.0f} s"
        if self.over == 0:
            return ok(found)
        word = last_line(self._log.read_text(errors="replace").splitlines() if self._log.exists() else [])
        late = time.monotonic() > self._deadline
        how = f"step ended with status {self.over}" if self.over else "not done in time" if late else "ended early"
        return problem(f"{found}, {how} ({word}): see that the nodes see {self._folder.path.parent} and this Python")

    def _is_all_there(self) -> bool:
        files = [self._folder.lines(on_nodes.found_by(node)) for node in self._nodes]
        return all(lines and lines[-1]["probe"] == on_nodes.DONE for lines in files)

    def _tell(self, name: str, finding: Finding) -> None:
        self._stream.tell(finding=on_nodes.entry(name, finding, 0.0), nodes=self._nodes)


# --- what it comes to ---------------------------------------------------------------------------------------


def merged(row: Mapping[str, Mapping[str, Any] | None]) -> Iterator[tuple[list[str], dict[str, Any]]]:
    """Yield what the nodes found with one probe: what several agree on once, with the nodes for which it holds.

    A node without an entry has nothing to say, and so has one with an empty text.
    """
    agreeing: dict[tuple[str, str, str], list[str]] = {}
    for node, found in row.items():
        if found and found["text"]:
            agreeing.setdefault((found["probe"], found["level"], found["text"]), []).append(node)
    for (probe, level, text), nodes in agreeing.items():
        seconds = max(found["seconds"] for node in nodes if (found := row[node]))
        yield nodes, {"probe": probe, "level": level, "text": text, "seconds": seconds}


def silent(lines: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, str]:
    """Return the nodes that found less than others did, and the probe that was the last of each."""
    most = max(map(len, lines.values()), default=0)
    return {node: found[-1]["probe"] if found else "its start" for node, found in lines.items() if len(found) < most}


def judge_clocks(bounds: Mapping[str, tuple[float, float]]) -> Finding:
    """Judge by the least and the most, in seconds, that each node's clock is ahead of the login node's."""
    if stepped := [node for node, (low, high) in bounds.items() if low > high]:
        return warning(f"the clock of {', '.join(stepped)} was set meanwhile: ask the site whether that is usual there")
    middles = {node: (low + high) / 2 for node, (low, high) in bounds.items()}
    within_s = max((high - low) / 2 for low, high in bounds.values())
    shown = ", ".join(f"{node} {middle * 1e3:+.0f} ms" for node, middle in middles.items())
    found = f"against the login node: {shown}, each known to {within_s * 1e3:.0f} ms"
    if len(bounds) > 1:
        lows, highs = zip(*bounds.values(), strict=True)
        found += f"; between nodes at most {(max(highs) - min(lows)) * 1e3:.0f} ms"
    if _surely_apart_s([*bounds.values(), (0.0, 0.0)]) > SKEW_S:
        return warning(f"{found}; a run does not mind, but its events mix up: ask the site to synchronise them (NTP)")
    return ok(found)


def _surely_apart_s(bounds: Sequence[tuple[float, float]]) -> float:
    """Return the least by which two of these clocks differ for certain, seconds; negative: none need to."""
    return max(low for low, _ in bounds) - min(high for _, high in bounds)


def no_kill(run: RunConfig) -> Finding:
    """Say what is known of --no-kill: that it is asked for and taken. No command of Slurm shows whether it is on."""
    wanted = {key.replace("-", "_"): value for key, value in run.site.slurm_additional_parameters.items()}
    if wanted.get("no_kill") is False:
        cure = "take no-kill out of site.slurm_additional_parameters, or use submit --resume"
        return warning(f"the site file takes --no-kill away, so a failed node ends the whole job: {cure}")
    return ok("sbatch and srun take --no-kill; whether it is honoured Slurm does not tell before a node fails")
