"""What a person sees while a run goes on in the foreground, and at its end."""

import time
from pathlib import Path
from shlex import quote
from typing import Any, TextIO

from gemini_hpc.analysis import timeline
from gemini_hpc.runtime.paths import RunPaths
from gemini_hpc.runtime.status_file import read_status
from gemini_hpc.telemetry import read_events

RENEW_S = 0.3
FINAL = ("finished", "suspended", "stopped", "failed")
"""States in which nothing more comes."""

PLAIN_RENEW_S = 10.0
"""How often a line is printed where the terminal cannot rewrite one."""


class Progress:
    """One line that renews itself, and a line for each recovery."""

    def __init__(self, paths: RunPaths, out: TextIO) -> None:
        self.paths, self._out = paths, out
        self._rewrites = out.isatty()
        self._last = 0.0
        self._state = self._shown = ""
        self._recovered = len(self._recoveries())  # of the attempts before, when it is resumed
        self._told = 1  # the newest generation whose recovery was told; the first is the start

    def show(self) -> None:
        """Renew the line, if it is time."""
        status = read_status(self.paths)
        state = str(status.get("state", "starting"))
        wait_s = RENEW_S if self._rewrites else PLAIN_RENEW_S
        if state == self._state and time.monotonic() - self._last < wait_s:
            return
        self._state, self._last = state, time.monotonic()
        if status.get("generation", 0) > self._told:
            self._tell_recoveries()
        line = _line(status)
        if line != self._shown:
            self._shown = line
            self._out.write(f"\r\x1b[K{line}" if self._rewrites else f"{line}\n")
            self._out.flush()

    def conclude(self, log: Path) -> int:
        """Print what came of the run; return the exit status for it."""
        status = read_status(self.paths)
        if self._rewrites:
            self._out.write("\r\x1b[K")
        found = timeline.recoveries(read_events(self.paths.run_dir))
        if found:
            self._out.write("\n" + timeline.table(found) + "\n\n")
        state = status.get("state", "failed")
        if state not in FINAL:
            state, status["reason"] = "failed", "the job ended without a result: it was killed, or its disk is full"
        self._out.write(f"{state:<9}{status.get('reason', '')}\n".rstrip() + "\n")
        if status.get("verdict"):
            self._out.write(f"proof    {status['verdict']}\n")
        if self.paths.report.exists():
            self._out.write(f"report   {self.paths.report}\n")
        if state != "finished":
            self._out.write(f"logs     {self.paths.logs}; the job's own: {log}\n")
            self._out.write(f"resume   python -m gemini_hpc.submit --resume {quote(str(self.paths.run_dir))}\n")
        self._out.flush()
        return 0 if state == "finished" else 1

    def _tell_recoveries(self) -> None:
        found = self._recoveries()
        for item in found[self._recovered :]:
            again = f"training again after {item.ms('first step'):,.0f} ms"
            text = f"{timeline.title(item)}: {timeline.summary(item)}, {again}"
            self._out.write(("\r\x1b[K" if self._rewrites else "") + text + "\n")
            self._told = max(self._told, *item.generations)
        self._recovered = len(found)

    def _recoveries(self) -> list[timeline.Recovery]:
        return [r for r in timeline.recoveries(read_events(self.paths.run_dir)) if r.outcome == "recovered"]


def _line(status: dict[str, Any]) -> str:
    state = status.get("state", "starting")
    if state == "verifying":
        return f"proof    undisturbed reference, step {status.get('reference_step', 0)} of {status['total_steps']}"
    if state in ("running", "joining", "gathering") and "loss" in status:
        total = status["total_steps"]
        parts = [
            f"step {status['step']:>{len(str(total))}}/{total}",
            f"loss {status['loss']:.3f}",
            f"{status['step_s']:.2f} s a step",
            f"safe in memory {max(status['safe_step'], 0)}, on disk {max(status['persistent_step'], 0)}",
        ]
        return "  ".join(parts)
    waiting = status.get("waiting_for", [])
    return f"{state}" + (f": waiting for {', '.join(waiting)}" if waiting else "")
