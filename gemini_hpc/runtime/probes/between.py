"""Probes that the nodes of a job do together: locks of the shared file system, and an MPI world of window hosts.

Each node calls the same function; the first of them speaks for all, the others only when something is wrong.
"""

import fcntl
import subprocess
import time
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from typing import Any

from gemini_hpc.arena import ArenaError
from gemini_hpc.core.messages import HostReady, Sealed
from gemini_hpc.errors import GeminiError, UserError
from gemini_hpc.runtime.allocation import world_step
from gemini_hpc.runtime.probes.examine import Case, Finding, last_line, ok, problem, warning
from gemini_hpc.runtime.probes.folder import Folder
from gemini_hpc.runtime.probes.network import PULLS, HostLine, interfaces, judge_world, small_arena
from gemini_hpc.runtime.probes.storage import NOT_TRIED
from gemini_hpc.slurm.control import SlurmJob
from gemini_hpc.windows import HostSpec, network_interface
from gemini_hpc.windows.launch import SRUN_MPI, THIS_NODE

TOGETHER_S = 60.0
"""How long a node waits for another one, which may not be done with what it looks at alone."""

EXCHANGES = 5
SLOW_FILE_S = 5.0
"""A file that takes longer to be seen holds up `status`, and who takes over the end of a run."""

SHARED = "set site.runs_dir to a file system that all nodes share"

FAILED = "world-failed"

SRUN = "srun: error: "
"""How srun begins to say that a task has ended, which is never why."""

SILENT = ok("")
"""What a node finds that leaves the word to the first."""


@dataclass(frozen=True)
class Place:
    """Where this process is: a node of a job."""

    folder: Folder
    job: SlurmJob
    node: str
    nodes: tuple[str, ...]

    @property
    def leads(self) -> bool:
        return self.node == self.nodes[0]

    @property
    def others(self) -> tuple[str, ...]:
        return tuple(node for node in self.nodes if node != self.node)

    def tell(self, what: str, value: Any = True) -> None:
        """Tell the others."""
        self.folder.post(f"{what}-{self.node}", value)

    def hear(self, what: str, node: str) -> Any:
        """Return what another node tells. Raises GeminiError when it does not within TOGETHER_S."""
        try:
            return self.folder.wait(f"{what}-{node}", TOGETHER_S)
        except GeminiError:
            raise GeminiError(f"{node} did not answer within {TOGETHER_S:g} s ({what})") from None

    def meet(self, what: str, value: Any = True) -> dict[str, Any]:
        """Wait until all nodes have come so far; return what each of them tells. Raises GeminiError."""
        self.tell(what, value)
        return {self.node: value, **{node: self.hear(what, node) for node in self.others}}


# --- the shared file system ---------------------------------------------------------------------------------


def locking(place: Place, case: Case) -> Finding:
    """Whether a lock, and the making of a file, on one node are seen by another; how long a file takes to be seen."""
    place.meet("locking")
    return _hold(place) if place.leads else _try(place)


def _hold(place: Place) -> Finding:
    with (place.folder.path / "lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        (place.folder.path / "claim").touch(exist_ok=False)
        times = [_exchange(place, number) for number in range(EXCHANGES)]
        tried = {node: place.hear("tried", node) for node in place.others}
    return judge_locks(place.node, tried, median(times))


def _try(place: Place) -> Finding:
    for number in range(EXCHANGES):
        place.hear(f"call-{number}", place.nodes[0])
        place.tell(f"answer-{number}")
    place.tell("tried", {"lock": _refused_lock(place), "claim": _refused_claim(place)})
    return SILENT


def _exchange(place: Place, number: int) -> float:
    """Post a file that all others answer; return how long that took, in seconds."""
    began = time.monotonic()
    place.tell(f"call-{number}")
    for node in place.others:
        place.hear(f"answer-{number}", node)
    return time.monotonic() - began


def _refused_lock(place: Place) -> bool:
    with (place.folder.path / "lock").open("r+") as asked:
        try:
            fcntl.flock(asked, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _refused_claim(place: Place) -> bool:
    try:
        (place.folder.path / "claim").touch(exist_ok=False)
    except FileExistsError:
        return True
    return False


def judge_locks(holder: str, tried: dict[str, dict[str, bool]], answer_s: float) -> Finding:
    """Judge by what the others were refused while `holder` had it."""
    others = ", ".join(tried)
    seen = f"a file and its answer take {answer_s * 1e3:.0f} ms"
    if not all(refused["claim"] for refused in tried.values()):
        what = f"{holder} and {others} both made one file, as if each were alone"
        return problem(f"{what}: {SHARED}")
    if not all(refused["lock"] for refused in tried.values()):
        # agents lock in memory, and HDF5 is told not to lock
        return ok(f"flock of {holder} is not seen by {others}, which no run needs; {seen}")
    found = f"flock and exclusive files of {holder} are seen by {others}; {seen}"
    if answer_s > SLOW_FILE_S:
        return warning(f"{found}: what status says is that old: set site.runs_dir to a file system that caches less")
    return ok(found)


# --- MPI ----------------------------------------------------------------------------------------------------


def mpi_world(place: Place, case: Case) -> Finding:
    """A world of window hosts on all nodes, started as in a run, and snapshots pulled through it."""
    interface = case.run.site.interface or network_interface()
    ready = place.meet("ready", interface in interfaces())
    if missing := [node for node, has_it in ready.items() if not has_it]:
        return (
            warning(f"not tried, {interface} is missing on {', '.join(missing)}: mend that") if place.leads else SILENT
        )
    world = _World(place, case)
    place.meet("arena")  # before any host starts
    try:
        return world.lead() if place.leads else world.follow()
    except GeminiError as error:
        if not place.leads and place.folder.read(FAILED):
            return SILENT
        if place.leads:
            place.folder.post(FAILED, str(error))
        raise


class _World:
    """This node's part of the world. What is started and made here is ended by `examine`, or with the job."""

    def __init__(self, place: Place, case: Case) -> None:
        self._place, self._case = place, case
        self._log = case.shared("windows.log")
        self._step: subprocess.Popen[bytes] | None = None
        try:
            self._arena = small_arena(case, place.node)
        except (ArenaError, UserError):
            raise GeminiError(NOT_TRIED) from None
        self._line = HostLine(case.shared(f"{place.node}.sock"), self._lost)

    def lead(self) -> Finding:
        recovery, nodes = self._case.run.recovery, self._place.nodes
        interface = self._case.run.site.interface or network_interface()
        began = time.monotonic()
        self._start()
        self._line.open()
        self._line.hear(HostReady)
        start_s = time.monotonic() - began
        sealed = self._line.publish(self._arena, self._place.node)
        self._place.tell("sealed", asdict(sealed))
        pulled = [self._place.hear("pulled", node) for node in self._place.others]
        speed = sealed.nbytes / median(s for times in pulled for s in times)
        kind = SRUN_MPI[self._case.run.site.mpi]
        hosts, over = f"{len(nodes)} window hosts by srun --mpi={kind}", f"TCP over {interface}"
        return judge_world(hosts, start_s, recovery.world_s, sealed.nbytes, speed, over)

    def follow(self) -> Finding:
        self._line.open()
        place, members = self._place, self._line.hear(HostReady).members
        source = place.nodes[0]
        sealed = Sealed(**place.hear("sealed", source))
        pull = partial(self._line.pull, self._arena, place.node, source, members.index(source), sealed)
        place.tell("pulled", [pull() for _ in range(PULLS)])
        return SILENT

    def _start(self) -> None:
        case, place = self._case, self._place
        here = HostSpec(THIS_NODE, case.shared(f"{THIS_NODE}.arena"), case.shared(f"{THIS_NODE}.sock"))
        command, environment = world_step(place.job, place.nodes, case.id, 1, here, case.run.site)
        with self._log.open("wb") as log:
            self._step = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )

    def _lost(self) -> GeminiError | None:
        if self._step is None:  # the first node's affair
            failed = None if self._place.leads else self._place.folder.read(FAILED)
            return GeminiError(failed) if failed else None
        if self._step.poll() is None:
            return None
        words = self._log.read_text(errors="replace").splitlines()
        word = last_line([line for line in words if not line.startswith(SRUN)] or words)
        return GeminiError(f"the MPI world of {len(self._place.nodes)} window hosts broke down ({word})")
