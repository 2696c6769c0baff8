"""Try one thing that a run depends on: in a process of its own, within a bound, and nothing of it is left."""

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import NoReturn

from gemini_hpc.config import RunConfig
from gemini_hpc.config.capacity import Needs, Shapes, plan
from gemini_hpc.errors import GeminiError, UserError
from gemini_hpc.runtime.children import KILL_S
from gemini_hpc.runtime.processes import RUN_MARK, clear, die_with_parent, kill
from gemini_hpc.windows import mpi_leftovers

TICK_S = 0.02
UNDO_S = 5.0
"""How long clearing up after a probe that was killed may take: what it waited for may still hang."""

LEFTOVER_S = 1.1
"""After that long a file of MPICH's that nobody has mapped is taken for a leftover (`windows.mpi_leftovers`)."""


class Level(StrEnum):
    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"


@dataclass(frozen=True)
class Finding:
    """What a probe found: one line, with numbers; a warning or problem ends with the next thing to do."""

    level: Level
    text: str


def ok(text: str) -> Finding:
    return Finding(Level.OK, text)


def warning(text: str) -> Finding:
    return Finding(Level.WARNING, text)


def problem(text: str) -> Finding:
    return Finding(Level.PROBLEM, text)


@dataclass(frozen=True)
class Case:
    """The run that is planned, and what probes may use."""

    run: RunConfig
    shapes: Mapping[str, Shapes]
    """Of every size of the example model; none for somebody else's, which is known once it is built."""
    id: str
    """Like a run's: processes and files that bear it are found by `processes.clear`, and by the next run's sweep."""

    @property
    def needs(self) -> Needs | None:
        return plan(self.run, self.shapes[self.run.model.preset]) if self.shapes else None

    def shared(self, name: str) -> Path:
        """Name a file of a probe's in the memory file system."""
        return Path(self.run.site.shm_dir, f"gemini-{self.id}-{name}")


Look = Callable[[Case], Finding]


@dataclass(frozen=True)
class Probe:
    """`look` may block, crash, start processes and leave files of the case; what it raises is a problem found."""

    name: str
    awaits: str
    """What is waited for while it looks."""
    bound_s: float
    look: Look
    remedy: str
    """The next thing to do when there is no answer, or an error in its place."""
    undo: Look | None = None
    """Called when `look` was killed, by us or anybody, to take away what bears no mark of the case."""
    undo_s: float = UNDO_S


def examine(probe: Probe, case: Case, tick: Callable[[], None] = lambda: None) -> Finding:
    """Return what the probe finds, or a problem when it does not within its bound.

    `tick` is called many times a second meanwhile; what it raises ends the waiting. In any case all that the probe
    started is killed and its files in memory are removed. This process must have no threads: it forks.
    """
    mpich_files = _mpich_files()
    looker = _Looker(probe, case)
    try:
        deadline = time.monotonic() + probe.bound_s
        while not looker.ended() and time.monotonic() < deadline:
            tick()
            time.sleep(TICK_S)
        in_time = looker.ended()
    finally:
        left = "" if looker.ended() else looker.kill()
        clear(Path(case.run.site.shm_dir), case.id)
        _remove_leftovers(mpich_files)
        if probe.undo and not looker.answered:
            undoing = Probe(
                probe.name, f"clearing up after {probe.name}", probe.undo_s, probe.undo, "remove it by hand"
            )
            undone = examine(undoing, case)
            left += "" if undone.level is Level.OK else f"; {undone.text}"
    if not in_time:
        return problem(f"no {probe.awaits} within {probe.bound_s:g} s{left}: {probe.remedy}")
    return looker.finding()


class _Looker:
    """The process that looks, and what it says."""

    def __init__(self, probe: Probe, case: Case) -> None:
        self._probe = probe
        self._answer, self._words = os.memfd_create("answer"), os.memfd_create("words")
        self._status: int | None = None
        sys.stdout.flush()
        sys.stderr.flush()
        me = os.getpid()
        self._pid = os.fork()
        if self._pid == 0:
            self._look(case, me)

    def _look(self, case: Case, parent: int) -> NoReturn:
        try:
            os.setsid()  # Ctrl-C is for the command line, which ends everything in order
            die_with_parent(parent)
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_DFL)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(self._words, 1)
            os.dup2(self._words, 2)
            os.environ[RUN_MARK] = case.id
            finding = _found(self._probe, case)
            os.write(self._answer, json.dumps([finding.level, finding.text]).encode())
            os._exit(0)
        except BaseException:  # noqa: BLE001  the outermost loop of this process
            os.write(self._words, traceback.format_exc().encode())
            os._exit(1)

    def ended(self) -> bool:
        if self._status is None:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            self._status = status if pid else None
        return self._status is not None

    def kill(self) -> str:
        """Kill it; say so when it cannot be, as long as a file system hangs."""
        with suppress(ProcessLookupError):
            os.killpg(self._pid, signal.SIGKILL)  # what it forked bears no mark
        kill(self._pid, signal.SIGKILL)
        deadline = time.monotonic() + KILL_S
        while not self.ended():
            if time.monotonic() > deadline:
                return f"; process {self._pid} hangs in the kernel and dies when it lets go"
            time.sleep(0.001)
        return ""

    @property
    def answered(self) -> bool:
        return bool(_all(self._answer))

    def finding(self) -> Finding:
        if not self.answered:
            code = os.waitstatus_to_exitcode(self._status or 0)
            how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
            words = last_line(_all(self._words).decode(errors="replace").splitlines())
            return problem(f"{self._probe.awaits} ended with {how} ({words}): {self._probe.remedy}")
        level, text = json.loads(_all(self._answer))
        return Finding(Level(level), text)


def last_line(lines: Sequence[str]) -> str:
    """Return the last line that says something: of a traceback, the error."""
    return ([" ".join(line.split()) for line in lines if line.strip()] or ["no word"])[-1]


def _found(probe: Probe, case: Case) -> Finding:
    try:
        return probe.look(case)
    except UserError as error:  # its message ends with the next thing to do
        return problem(str(error))
    except GeminiError as error:
        return problem(f"{error}: {probe.remedy}")
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return problem(f"{where}{error.strerror or error}: {probe.remedy}")


def _all(fd: int) -> bytes:
    return os.pread(fd, os.fstat(fd).st_size, 0)


def _mpich_files() -> set[Path]:
    return set(Path("/dev/shm").glob("mpich_shm_*"))


def _remove_leftovers(before: set[Path]) -> None:
    """Remove what MPICH's processes left when they were killed during MPI's start-up."""
    if _mpich_files() - before:
        time.sleep(LEFTOVER_S)
        for path in set(mpi_leftovers()) - before:
            path.unlink(missing_ok=True)
