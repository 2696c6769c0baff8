"""The supervisor: what a job runs. Brings up the nodes' agents, waits for the end of the run, and clears up.

On this machine its lock says that the run lives; however it dies, the kernel kills its children, and whatever is left
is swept by the next start. On Slurm it is the batch script's process, and the run outlives it (see `allocation`).
"""

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress

from gemini_hpc.config import RunConfig
from gemini_hpc.core.messages import Finish
from gemini_hpc.errors import GeminiError, UserError
from gemini_hpc.persist import manifest
from gemini_hpc.runtime.allocation import ANSWER_S
from gemini_hpc.runtime.children import ATTACHED
from gemini_hpc.runtime.closing import verify
from gemini_hpc.runtime.drills import missed
from gemini_hpc.runtime.living import claim
from gemini_hpc.runtime.nodes import Nodes, SlurmNodes, VirtualNodes
from gemini_hpc.runtime.paths import RunPaths, open_run
from gemini_hpc.runtime.processes import RunLock, clear, sweep, wait_exit
from gemini_hpc.runtime.status_file import update_status
from gemini_hpc.runtime.wire import make_keys
from gemini_hpc.slurm.control import SlurmError, this_job
from gemini_hpc.telemetry import EventLog, read_events
from gemini_hpc.windows.launch import remove_mpi_leftovers

CLEAR_UP_S = 15.0
"""Of the time before the limit: so much is kept for what comes after the last checkpoint."""

FRUITLESS_STARTS = 3
"""A job that was started so often from the same checkpoint is not put back into the queue."""


AGAIN_S, REFUSALS = 5.0, 3
"""How often Slurm is given an order that it did not take, and after how many of its answers no more."""


class Interrupted(GeminiError):
    """The run was told to end: Ctrl-C, scancel, SIGTERM."""


def supervise(paths: RunPaths, run: RunConfig) -> int:
    """Run one run from start to end; the exit status of the job."""
    lock = RunLock(paths.lock) if run.site.kind == "local" else None  # on Slurm every node has its own
    if lock is not None:
        sweep(paths.shm_dir)
        remove_mpi_leftovers()
        if not lock.take():
            print(
                f"{paths.run_dir} is being run already; watch it with `python -m gemini_hpc.status`",
                file=sys.stderr,
            )
            return 2
    else:
        job = this_job(run.site.call_timeout_s)
        print(f"run {paths.run_dir}", flush=True)
        if other := claim(paths, job.id):
            print(f"{paths.run_dir} is being run already, as job {other}", file=sys.stderr)
            return 2
    try:
        _log_start(paths)
        end = _train(paths, run)
    except (GeminiError, OSError) as error:
        end = Finish("", "failed", str(error))
    finally:
        if lock is not None:
            clear(paths.shm_dir, paths.run_id)
            remove_mpi_leftovers()
            lock.release()
    _conclude(paths, run, end)
    return 0 if end.state == "finished" else 1


def _train(paths: RunPaths, run: RunConfig) -> Finish:
    """Run the nodes until the run is over, and close it; on Slurm they stay until then: this one may die in between."""
    make_keys(paths.keys)
    shutil.rmtree(paths.run_dir / "closing", ignore_errors=True)  # of a start before this one
    on_slurm = run.site.kind == "slurm"
    nodes: Nodes = (SlurmNodes if on_slurm else VirtualNodes)(paths, run)
    try:
        end = _serve(nodes, run)
        nodes.dismiss(end)
        if not on_slurm:
            nodes.close()
            clear(paths.shm_dir, paths.run_id)
        return _close(paths, run, end)
    except Interrupted as interruption:
        end = Finish("", "stopped", str(interruption))
        nodes.dismiss(end)
        return end
    finally:
        nodes.close()


def _serve(nodes: Nodes, run: RunConfig) -> Finish:
    """Wait for the end of the run. Raises Interrupted when it is to end at once."""
    deadline = float("inf")
    while True:
        if (end := nodes.turn()) is not None:
            return end
        if time.monotonic() > deadline:
            return Finish("", "suspended", "the nodes were taken away before the newest step was saved")
        if reason := _taken_away(run):
            _signals.clear()
            nodes.suspend(reason)
            deadline = min(deadline, time.monotonic() + max(run.site.signal_delay_s - CLEAR_UP_S, CLEAR_UP_S))
        check_wanted()


def _close(paths: RunPaths, run: RunConfig, end: Finish) -> Finish:
    """Prove that no failure changed anything, and write the report."""
    if end.state != "finished":
        return end
    state, reason = end.state, end.reason
    if never := missed(paths, run):
        reason = f"{reason}; drills that never struck: {', '.join(never)}"
    if run.verify:
        try:
            comparison = verify(paths, run, check_wanted)
            update_status(paths, verdict=str(comparison))
            if not comparison.identical:
                state, reason = "failed", str(comparison)
        except Interrupted as interruption:  # the training is done all the same
            reason = f"{reason}; not compared with the reference: {interruption}"
    update_status(paths, state="reporting")
    from gemini_hpc.analysis.report import write_report  # pandas and plotly: only now, not while a run waits

    write_report(paths.run_dir)
    return Finish("", state, reason)


def _conclude(paths: RunPaths, run: RunConfig, end: Finish) -> bool:
    """Say how it ended; whether its job goes on elsewhere: then it is back in the queue, and this process ends soon."""
    reason, goes_on = end.reason, False
    if end.state == "suspended" and run.site.kind == "slurm":
        goes_on, how = _is_queued_again(paths, run)
        reason += f"; {how}"
    if run.site.kind == "slurm":
        print(f"{end.state}: {reason}", flush=True)  # in the job's own log
    EventLog(paths.run_dir, "cluster").emit("run", state=end.state, reason=reason)
    update_status(paths, state=end.state, reason=reason, waiting_for=[])
    if goes_on and (refusal := _insist(this_job(run.site.call_timeout_s).requeue, run)):
        reason = f"{end.reason}; the job could not be queued again ({refusal}): use --resume"
        print(f"{end.state}: {reason}", flush=True)
        EventLog(paths.run_dir, "cluster").emit("run", state=end.state, reason=reason)
        update_status(paths, reason=reason)
        return False
    return goes_on


def _insist(order: Callable[[], None], run: RunConfig) -> str:
    """Give Slurm an order that ends this job, until it answers; it may be away. Return why it does not obey."""
    job, refusals = this_job(run.site.call_timeout_s), 0
    while True:
        try:
            order()
            return ""
        except SlurmError as error:
            refusal = str(error)
        with suppress(SlurmError):
            if not job.goes_on():  # it has come to pass all the same
                return ""
            refusals += 1
        if refusals == REFUSALS or _signals:
            return refusal
        time.sleep(AGAIN_S)


def _is_queued_again(paths: RunPaths, run: RunConfig) -> tuple[bool, str]:
    """Say whether the job of a run that is suspended goes back into the queue, and how that is told."""
    try:
        if not this_job(run.site.call_timeout_s).goes_on():
            return False, "the job was cancelled and is not queued again"
    except SlurmError:
        pass  # it is asked again: to queue it
    if not _progressed(paths):
        return False, f"the job came no further in {FRUITLESS_STARTS} starts and is not queued again"
    return True, "the job is being queued again"


def see_out(paths: RunPaths, run: RunConfig, end: Finish) -> int:
    """Close a run of Slurm whose supervisor is gone, and its job, which would sit there until its time limit."""
    try:
        end = _close(paths, run, end)
    except (GeminiError, OSError) as error:
        end = Finish("", "failed", str(error))
    if not _conclude(paths, run, end) and (refusal := _insist(this_job(run.site.call_timeout_s).cancel, run)):
        print(refusal, file=sys.stderr)
    return 0 if end.state == "finished" else 1


def _log_start(paths: RunPaths) -> None:
    newest = manifest.newest(paths.run_dir)
    step = newest.step if newest else 0
    EventLog(paths.run_dir, "cluster").emit("run", state="started", reason="", step=step)


def _progressed(paths: RunPaths) -> bool:
    """Whether the last starts of this run did not all begin with the checkpoint that is still the newest."""
    starts = [event for event in read_events(paths.run_dir) if event["kind"] == "run" and event["state"] == "started"]
    newest = manifest.newest(paths.run_dir)
    steps = [event.get("step") for event in starts[-FRUITLESS_STARTS:]]
    return len(steps) < FRUITLESS_STARTS or set(steps) != {newest.step if newest else 0}


GONE = -1


def _pidfd_of_submit() -> int | None:
    """The `submit` that waits for the run, if one does. A pidfd tells its end even when nobody has reaped it yet."""
    try:
        return os.pidfd_open(int(os.environ[ATTACHED])) if ATTACHED in os.environ else None
    except ProcessLookupError:
        return GONE


_STARTED_BY = os.getppid()
_ATTACHED_TO = _pidfd_of_submit()
_signals: list[int] = []
"""Those that came. Noted rather than raised: an exception out of a signal handler may vanish anywhere."""


def _taken_away(run: RunConfig) -> str:
    """Say why the nodes are about to be taken away; "" = they are not."""
    if signal.SIGUSR2 in _signals:
        return f"told by SIGUSR2, {run.site.signal_delay_s} s before the time limit"
    if signal.SIGTERM in _signals and run.site.kind == "slurm":
        try:  # the end of a job begins with SIGTERM, and so does the grace before it is preempted
            if this_job(ANSWER_S).goes_on():
                return "the job is about to be preempted"
        except SlurmError:  # agents go on asking, and leave when it is its end
            return "told by SIGTERM, and Slurm does not say why"
    return ""


def check_wanted() -> None:
    """Raise Interrupted when the run was told to end, or nobody is left for whom it runs. Called by every loop."""
    told = [number for number in _signals if number in (signal.SIGTERM, signal.SIGINT)]
    if told:
        raise Interrupted(f"told to end by {signal.Signals(told[0]).name}")
    if _ATTACHED_TO == GONE or (_ATTACHED_TO and wait_exit(_ATTACHED_TO, 0.0)):
        raise Interrupted("the submit that waited for it is gone")
    if os.getppid() != _STARTED_BY:
        raise Interrupted("the job that it belonged to is gone")


def main() -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):  # by a person, by Slurm, before the time limit
        signal.signal(number, lambda told, _frame: _signals.append(told))
    try:
        paths, run = open_run(sys.argv[1])
        if len(sys.argv) > 2:  # by an agent
            _, state, reason = sys.argv[2:]
            sys.exit(see_out(paths, run, Finish("", state, reason)))
        sys.exit(supervise(paths, run))
    except (GeminiError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UserError) else 1)


if __name__ == "__main__":
    main()
