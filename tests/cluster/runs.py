"""Real runs for the tests of this folder: started by the real command lines, watched through their event log."""

import json
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from gemini_hpc.analysis.compare import tells_loss
from gemini_hpc.runtime.paths import RunPaths
from gemini_hpc.runtime.processes import NODE_MARK, RUN_MARK
from gemini_hpc.telemetry import read_events

SHM = Path("/dev/shm")
POLL_S = 0.02

START_S = 120.0
"""Bound of everything that waits for workers to be built: they import torch on two cores that others use too."""

EVENT_S = 60.0
END_S = 120.0
GONE_S = 20.0

Event = dict[str, Any]


def command(module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", f"gemini_hpc.{module}", *arguments]


def call(module: str, *arguments: str, cwd: Path | None = None) -> "subprocess.CompletedProcess[str]":
    """Run one of the command lines to its end."""
    return subprocess.run(
        command(module, *arguments), cwd=cwd, capture_output=True, text=True, timeout=START_S, stdin=subprocess.DEVNULL
    )


def until(found: Callable[[], Any], what: str, timeout_s: float) -> Any:
    """Return the first result of `found` that is true; fail when there is none within `timeout_s` seconds."""
    deadline = time.monotonic() + timeout_s
    while not (result := found()):
        assert time.monotonic() < deadline, f"{what} not within {timeout_s:.0f} s"
        time.sleep(POLL_S)
    return result


class Run:
    """One `submit` in the foreground. Use as a context: at its end nothing of the run may be left."""

    def __init__(
        self,
        place: Path,
        *settings: str,
        resume: Path | None = None,
        env: Mapping[str, str] = {},
        shm: Path = SHM,
    ) -> None:
        self.place = place
        self.shm = shm
        self.output = place / f"submit-{len(list(place.glob('submit-*')))}.txt"
        before = set(place.glob("runs/*"))
        resumed = ["--resume", str(resume)] if resume else ["model.preset=tiny", f"site.runs_dir={place / 'runs'}"]
        with self.output.open("wb") as output:
            self.submit = subprocess.Popen(
                command("submit", *resumed, *settings),
                cwd=place,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, **env},
            )
        self.mpi_files: set[str] = set()
        self._run_dir = resume
        self._earlier = len(self.events()) if resume else 0
        if resume is None:
            try:
                until(lambda: set(place.glob("runs/*/config.yaml")) or self.ended(), "a run directory", START_S)
                (self._run_dir,) = set(place.glob("runs/*")) - before
            except BaseException:
                self.submit.kill()
                raise

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        try:
            if failure is None:
                self.assert_nothing_is_left()
        finally:
            self.destroy()

    # --- what it did --------------------------------------------------------------------------------

    @property
    def run_dir(self) -> Path:
        assert self._run_dir is not None
        return self._run_dir

    @property
    def paths(self) -> RunPaths:
        return RunPaths(self.run_dir.resolve(), self.shm)

    @property
    def text(self) -> str:
        """What `submit` printed."""
        return self.output.read_text(errors="replace")

    @property
    def status(self) -> dict[str, Any]:
        return json.loads(self.paths.status.read_text())

    def events(self, kind: str = "", **fields: Any) -> list[Event]:
        """Return the events of that kind with those fields; of all attempts, where the run was resumed."""
        return [
            event
            for event in read_events(self.run_dir)
            if kind in ("", event["kind"]) and all(event.get(name) == value for name, value in fields.items())
        ]

    def generation(self, number: int) -> int:
        """Return what the `number`-th generation is called: it begins with what the first coordinator's term does."""
        return int(self.events("plan")[0]["generation"]) + number - 1

    def ended(self) -> bool:
        return self.submit.poll() is not None

    # --- waiting ------------------------------------------------------------------------------------

    def wait_for(
        self, kind: str, timeout_s: float = EVENT_S, at_least: int = 0, since: float = 0.0, **fields: Any
    ) -> Event:
        """Return the first such event of this attempt; `since` then, and of a step that is `at_least` that."""

        def found() -> list[Event]:
            recent = read_events(self.run_dir)[self._earlier :]
            events = [e for e in recent if e["kind"] == kind and all(e.get(n) == v for n, v in fields.items())]
            events = [e for e in events if e["t"] >= since and (not at_least or e["step"] >= at_least)]
            if not events and self.ended():
                raise AssertionError(f"the run ended without {kind} {fields}:\n{self.text}")
            return events

        return until(found, f"{kind} {fields}", timeout_s)[0]

    def wait_for_training(self, step: int = 1) -> None:
        """Wait until step `step` is safe in memory."""
        self.wait_for("safe", START_S, at_least=step)
        self.note_mpi_files()

    def wait_for_end(self, status: int = 0, timeout_s: float = END_S) -> None:
        """Wait until `submit` ends, with that exit status."""
        assert self.submit.wait(timeout_s) == status, self.text + self.logs()

    def logs(self) -> str:
        parts = [
            f"--- {path.name}\n{path.read_text(errors='replace')[-2000:]}" for path in self.paths.logs.glob("*.log")
        ]
        return "\n".join(["", *parts])

    # --- its processes ------------------------------------------------------------------------------

    def pids(self, module: str = "", node: str = "") -> list[int]:
        """Return the living processes of the run, of one module or one node alone if told so."""
        name, value = (NODE_MARK, f"{self.paths.run_id}:{node}") if node else (RUN_MARK, self.paths.run_id)
        return [pid for pid in _marked(f"{name}={value}") if module in _command(pid)]

    def without_launcher(self) -> list[int]:
        """Return the living processes of the run but for MPI's launcher and its shields."""
        return [pid for pid in self.pids("-m gemini_hpc.") if "windows/shield.py" not in _command(pid)]

    def kill(self, module: str, node: str = "", number: int = signal.SIGKILL) -> float:
        """Send a signal to the one process of that module (on that node); return when."""
        (pid,) = until(lambda: self.pids(module, node), f"{module} of {node}", EVENT_S)
        now = time.time()
        os.kill(pid, number)
        return now

    def supervisor(self) -> int:
        """Return the supervisor's process: it is the one that the job runs, and bears no mark."""
        wanted = f"gemini_hpc.runtime.supervisor\0{self.run_dir}".encode()
        return until(lambda: [p for p in _pids() if wanted in _raw(p, "cmdline") and b"bash" not in _raw(p, "cmdline")],
                     "supervisor", EVENT_S)[0]  # fmt: skip

    def note_mpi_files(self) -> None:
        """Remember the names of MPICH's files that the window hosts have mapped."""
        for pid in self.pids("gemini_hpc.windows.host"):
            for line in _raw(pid, "maps").decode(errors="replace").splitlines():
                if "/mpich_shm_" in line:
                    self.mpi_files.add(line.split()[5])

    def leftovers(self) -> list[str]:
        shared = [str(path) for path in SHM.glob(f"gemini-{self.paths.run_id}*")]
        shared += [name for name in self.mpi_files if Path(name).exists()]
        return shared + [f"process {pid}: {_command(pid)}" for pid in self.pids()]

    def assert_nothing_is_left(self, timeout_s: float = GONE_S) -> None:
        """No process, no file in shared memory, within that time."""
        until(lambda: not self.leftovers(), f"the end of {self.leftovers()}", timeout_s)

    def destroy(self) -> None:
        """Whatever the test did: leave nothing behind."""
        if not self.ended():
            self.submit.kill()
        self.submit.wait()
        if self._run_dir is not None:
            for pid in self.pids():
                _kill(pid)
            for path in SHM.glob(f"gemini-{self.paths.run_id}*"):
                path.unlink(missing_ok=True)

    # --- the proof ----------------------------------------------------------------------------------

    def losses(self) -> dict[tuple[int, int], set[bytes]]:
        """Return (rank, step) -> the bits of every loss that was logged for it."""
        found: dict[tuple[int, int], set[bytes]] = {}
        for event in filter(tells_loss, self.events()):
            found.setdefault((event["rank"], event["step"]), set()).add(struct.pack("<d", event["loss"]))
        return found

    def assert_identical_to(self, reference: Mapping[tuple[int, int], bytes]) -> None:
        """All logged losses have the bits of the undisturbed run; each agent that died may have taken one with it."""
        losses = self.losses()
        different = {key: bits for key, bits in losses.items() if bits != {reference[key]}}
        assert not different
        missing = reference.keys() - losses.keys()
        assert len(missing) <= len(self.events("evict")), f"not logged: {sorted(missing)}"


def reference_losses(run_dir: Path) -> dict[tuple[int, int], bytes]:
    """Return the bits of the losses in RUN_DIR/reference/losses.jsonl."""
    lines = [json.loads(line) for line in (run_dir / "reference" / "losses.jsonl").read_text().splitlines()]
    return {(line["rank"], line["step"]): struct.pack("<d", line["loss"]) for line in lines}


def drill(step: int, rank: int, action: str = "kill_worker", phase: str = "backward") -> str:
    return f"{{step: {step}, rank: {rank}, phase: {phase}, action: {action}}}"


def drills(items: Iterable[str] = ()) -> str:
    return f"drills=[{', '.join(items)}]"


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _marked(variable: str) -> list[int]:
    """Return the processes with that environment variable; a zombie's environment reads as empty."""
    return [pid for pid in _pids() if variable.encode() in _raw(pid, "environ").split(b"\0")]


def _raw(pid: int, name: str) -> bytes:
    try:
        return Path("/proc", str(pid), name).read_bytes()
    except OSError:
        return b""


def _command(pid: int) -> str:
    return _raw(pid, "cmdline").replace(b"\0", b" ").decode(errors="replace")


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
