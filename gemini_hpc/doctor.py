"""`python -m gemini_hpc.doctor [CONFIG] [--site S]`: what this site really allows, before a job is lost to it."""

import json
import secrets
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from gemini_hpc.cli import Parser, run_command, split_settings
from gemini_hpc.config import EXAMPLE, RunConfig, load_run
from gemini_hpc.errors import GeminiError
from gemini_hpc.models import presets
from gemini_hpc.runtime.paths import lock_path
from gemini_hpc.runtime.probes import Case, Finding, Level, Probe, examine, probes_for
from gemini_hpc.runtime.processes import RunLock

RENEW_S = 0.3
NOT_COMPUTE_NODES = "this version does not probe the compute nodes: it shows what this login node does"


def main(arguments: list[str]) -> int:
    parser = Parser(prog="gemini_hpc.doctor", description="Try everything that a run depends on, on this machine.")
    parser.add_argument("settings", nargs="*", metavar="CONFIG | key.sub=value", help="those of the run, as for submit")
    parser.add_argument("--site", help="auto (default), local, ibex, or a YAML file")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON, what is awaited on stderr")
    options = parser.parse_intermixed_args(arguments)
    config, overrides = split_settings(options.settings)
    run = load_run(config, overrides, site=options.site)
    told_to_end: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):  # noted rather than raised: nothing interrupts the clearing up
        signal.signal(number, lambda told, _frame: told_to_end.append(told))
    with case_for(run) as case:
        return _examine_all(case, told_to_end, as_json=options.json)


@contextmanager
def case_for(run: RunConfig) -> Iterator[Case]:
    """Make what all probes share; its lock keeps starting runs from sweeping the probes' processes away."""
    model, own = run.model, run.train.entry == EXAMPLE
    if own:
        presets.model_shape(model.family, model.preset, model.seq_len)
    shapes = presets.shapes_by_preset(model.family, model.seq_len) if own else {}
    name = secrets.token_hex(5)
    lock = RunLock(lock_path(name))
    try:
        lock.take()
    except OSError as error:
        raise GeminiError(f"{error.filename}: {error.strerror}: every run has its lock there; mount a tmpfs") from error
    try:
        yield Case(run, shapes, name)
    finally:
        lock.release()


def _examine_all(case: Case, told_to_end: list[int], as_json: bool) -> int:
    """Examine everything, print what is found; return the exit status."""
    if not as_json:
        print(_headline(case), flush=True)
    found: list[tuple[Probe, Finding, float]] = []
    for probe in probes_for(case.run):
        waiting = _Waiting(probe, sys.stderr if as_json else sys.stdout, told_to_end)
        try:
            finding = examine(probe, case, waiting.tick)
        finally:
            waiting.over()
        found.append((probe, finding, waiting.seconds))
        if not as_json:
            print(f"{finding.level:<8} {probe.name:<14} {finding.text}", flush=True)
    levels = [finding.level for _, finding, _ in found]
    verdict = _verdict(levels.count(Level.PROBLEM), levels.count(Level.WARNING))
    print(json.dumps(_as_json(case, found, verdict), indent=1) if as_json else f"verdict  {verdict}")
    return 1 if Level.PROBLEM in levels else 0


def _headline(case: Case) -> str:
    run, needs = case.run, case.needs
    model = f"{run.model.family} {run.model.preset}" if needs else run.train.entry
    size = f", {needs.snapshot_bytes / 1e6:.1f} MB a snapshot" if needs else ""
    planned = f"{model} on {run.cluster.nodes} nodes + {run.cluster.spares} spare, {run.protect.replicas} copies{size}"
    line = f"site     {run.site.name} ({run.site.kind}): {planned}"
    return line if run.site.kind == "local" else f"{line}\nnote     {NOT_COMPUTE_NODES}"


def _verdict(problems: int, warnings: int) -> str:
    counted = f"{problems} problem{'' if problems == 1 else 's'}, {warnings} warning{'' if warnings == 1 else 's'}"
    return f"{counted}: " + ("mend the problems before you submit" if problems else "submit can go ahead")


def _as_json(case: Case, found: list[tuple[Probe, Finding, float]], verdict: str) -> dict[str, Any]:
    findings = [
        {"probe": probe.name, "level": finding.level, "text": finding.text, "seconds": round(seconds, 3)}
        for probe, finding, seconds in found
    ]
    notes = [] if case.run.site.kind == "local" else [NOT_COMPUTE_NODES]
    site = {"site": case.run.site.name, "kind": case.run.site.kind}
    return {**site, "findings": findings, "notes": notes, "verdict": verdict}


class _Waiting:
    """Shows what one probe waits for: a line that renews itself on a terminal, else a line of its own."""

    def __init__(self, probe: Probe, out: TextIO, told_to_end: list[int]) -> None:
        self._out, self._told_to_end, self._renews = out, told_to_end, out.isatty()
        self._text = f"waiting for: {probe.awaits} (up to {probe.bound_s:g} s)"
        self._began = self._shown = time.monotonic()
        self._write(self._text if self._renews else f"{self._text}\n")

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    def tick(self) -> None:
        """Renew the line. Raises KeyboardInterrupt when the command is told to end."""
        if self._told_to_end:
            raise KeyboardInterrupt
        if self._renews and time.monotonic() - self._shown > RENEW_S:
            self._shown = time.monotonic()
            self._write(f"\r\x1b[K{self._text}, {self.seconds:.0f} s")

    def over(self) -> None:
        if self._renews:
            self._write("\r\x1b[K")

    def _write(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()


if __name__ == "__main__":
    sys.exit(run_command(main))
