"""`python -m gemini_hpc.doctor [CONFIG] [--site S]`: what this site really allows, before a job is lost to it."""

import json
import secrets
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

from gemini_hpc.cli import Parser, run_command, split_settings
from gemini_hpc.config import EXAMPLE, RunConfig, load_run
from gemini_hpc.config.capacity import GIB, Needs
from gemini_hpc.errors import GeminiError, UserError
from gemini_hpc.models import presets
from gemini_hpc.runtime.paths import lock_path
from gemini_hpc.runtime.probes import Case, Level, Probe, examine, probes_for
from gemini_hpc.runtime.probes.nodes import Stream, job_probe
from gemini_hpc.runtime.processes import RunLock

RENEW_S = 0.3
NOT_COMPUTE_NODES = "the compute nodes are not probed: this shows what the login node does"
MEND_FIRST = "the compute nodes are not probed: mend the problems of the login node first"
WAIT_MIN = 10.0


def main(arguments: list[str]) -> int:
    parser = Parser(prog="gemini_hpc.doctor", description="Try everything that a run depends on, on this machine.")
    parser.add_argument("settings", nargs="*", metavar="CONFIG | key.sub=value", help="those of the run, as for submit")
    parser.add_argument("--site", help="auto (default), local, ibex, or a YAML file")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON, what is awaited on stderr")
    parser.add_argument("--login-only", action="store_true", help="on a Slurm site: submit no job to its nodes")
    parser.add_argument(
        "--wait-min", type=float, default=WAIT_MIN, help="minutes for that job to start (default %(default)g)"
    )
    options = parser.parse_intermixed_args(arguments)
    if options.wait_min <= 0:
        raise UserError(f"--wait-min is {options.wait_min:g}: give more than 0 minutes, or --login-only")
    config, overrides = split_settings(options.settings)
    run = load_run(config, overrides, site=options.site)
    told_to_end: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):  # noted rather than raised: nothing interrupts the clearing up
        signal.signal(number, lambda told, _frame: told_to_end.append(told))
    with case_for(run) as case:
        report = _Report(case, told_to_end, as_json=options.json)
        if options.login_only and run.site.kind == "slurm":
            report.note(NOT_COMPUTE_NODES)
        for probe in probes_for(run):
            report.examine(probe)
        if run.site.kind == "slurm" and not options.login_only:
            report.examine_nodes(options.wait_min)
        return report.conclude()


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


class _Report:
    """What is found, printed as it comes: a line each, or all of it as JSON in the end."""

    def __init__(self, case: Case, told_to_end: list[int], as_json: bool) -> None:
        self._case, self._told_to_end, self._as_json = case, told_to_end, as_json
        self._found: list[dict[str, Any]] = []
        self._notes: list[str] = []
        self._print(_headline(case))

    def note(self, text: str) -> None:
        self._notes.append(text)
        self._print(f"note     {text}")

    def examine(self, probe: Probe, tick: "Callable[[_Waiting], None]" = lambda _: None) -> None:
        waiting = _Waiting(f"{probe.awaits} (up to {probe.bound_s:g} s)", sys.stderr if self._as_json else sys.stdout)

        def ticked() -> None:
            """Raises KeyboardInterrupt when the command is told to end."""
            tick(waiting)
            if self._told_to_end:
                raise KeyboardInterrupt
            waiting.renew()

        try:
            finding = examine(probe, self._case, ticked)
        finally:
            waiting.over()
        tick(waiting)  # its last words
        waiting.over()
        self._add(probe.name, finding.level, finding.text, waiting.seconds)

    def examine_nodes(self, wait_min: float) -> None:
        """Have a job probe the compute nodes, if jobs can be submitted and their files be written at all."""
        if self._levels(Level.PROBLEM):
            self.note(MEND_FIRST)
            return
        stream = Stream()

        def tick(waiting: _Waiting) -> None:
            for news in stream.news():
                if found := news.get("finding"):
                    waiting.over()
                    self._add(found["probe"], Level(found["level"]), found["text"], found["seconds"], news["nodes"])
                else:
                    waiting.say(news["waits"])
            if self._told_to_end:
                waiting.say("the end of the job, which is cancelled")

        self.examine(job_probe(self._case.run, stream, wait_min), tick)

    def conclude(self) -> int:
        """Print the numbers and the verdict; return the exit status."""
        run, needs = self._case.run, self._case.needs
        problems, warnings = self._levels(Level.PROBLEM), self._levels(Level.WARNING)
        verdict = _verdict(problems, warnings)
        self._print(f"numbers  {_numbers(run, needs)}")
        self._print(f"verdict  {verdict}")
        if self._as_json:
            site = {"site": run.site.name, "kind": run.site.kind}
            told = {"findings": self._found, "notes": self._notes, "numbers": numbers(run, needs), "verdict": verdict}
            print(json.dumps({**site, **told}, indent=1))
        return 1 if problems else 0

    def _add(self, probe: str, level: Level, text: str, seconds: float, nodes: Sequence[str] = ()) -> None:
        found = {"probe": probe, "level": level, "text": text, "seconds": round(seconds, 3)}
        self._found.append({**found, "nodes": list(nodes)} if nodes else found)
        where = f"{', '.join(nodes)}: " if nodes else ""
        self._print(f"{level:<8} {probe:<14} {where}{text}")

    def _levels(self, level: Level) -> int:
        return sum(finding["level"] == level for finding in self._found)

    def _print(self, line: str) -> None:
        if not self._as_json:
            print(line, flush=True)


def _headline(case: Case) -> str:
    run, needs = case.run, case.needs
    model = f"{run.model.family} {run.model.preset}" if needs else run.train.entry
    size = f", {needs.snapshot_bytes / 1e6:.1f} MB a snapshot" if needs else ""
    planned = f"{model} on {run.cluster.nodes} nodes + {run.cluster.spares} spare, {run.protect.replicas} copies{size}"
    return f"site     {run.site.name} ({run.site.kind}): {planned}"


def numbers(run: RunConfig, needs: Needs | None) -> dict[str, Any]:
    """Return what `submit` goes by; sizes in bytes, null where they are known only once the model is built."""
    return {
        "nodes": run.cluster.nodes,
        "spares": run.cluster.spares,
        "snapshot_bytes": needs and needs.snapshot_bytes,
        "arena_bytes": needs and needs.arena_bytes,
        "memory_bytes": needs and needs.memory_bytes,
        "mem_gb": run.site.mem_gb,
        "interface": run.site.interface,
        "timeout_min": run.site.timeout_min,
        "signal_delay_s": run.site.signal_delay_s,
    }


def _numbers(run: RunConfig, needs: Needs | None) -> str:
    site, where = run.site, "this machine" if run.site.kind == "local" else "a node"
    sizes = "sizes are known once the model is built"
    if needs:
        sizes = (
            f"{needs.snapshot_bytes / 1e6:.1f} MB a snapshot, {needs.arena_bytes / 1e6:.1f} MB of arena a node, "
            f"{needs.memory_bytes / GIB:.1f} GiB of memory {where}"
        )
    asked = f"{site.mem_gb:g} GiB a node asked for" if site.mem_gb else "no memory asked for"
    return (
        f"{run.cluster.nodes} nodes + {run.cluster.spares} spare; {sizes} ({asked}); "
        f"interface {site.interface or 'of the default route'}; "
        f"time limit {site.timeout_min} min, USR2 {site.signal_delay_s} s before it"
    )


def _verdict(problems: int, warnings: int) -> str:
    counted = f"{problems} problem{'' if problems == 1 else 's'}, {warnings} warning{'' if warnings == 1 else 's'}"
    return f"{counted}: " + ("mend the problems before you submit" if problems else "submit can go ahead")


class _Waiting:
    """Shows what is waited for: a line that renews itself on a terminal, else a line of its own for each."""

    def __init__(self, awaited: str, out: TextIO) -> None:
        self._out, self._renews = out, out.isatty()
        self._text = ""
        self._began = self._shown = time.monotonic()
        self.say(awaited)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    def say(self, awaited: str) -> None:
        """Show that something else is waited for now."""
        text = f"waiting for: {awaited}"
        if text != self._text:
            self.over()
            self._text = text
            self._write(text if self._renews else f"{text}\n")

    def renew(self) -> None:
        if self._renews and time.monotonic() - self._shown > RENEW_S:
            self._shown = time.monotonic()
            self._write(f"\r\x1b[K{self._text}, {self.seconds:.0f} s")

    def over(self) -> None:
        """Make room for another line."""
        if self._renews and self._text:
            self._write("\r\x1b[K")

    def _write(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()


if __name__ == "__main__":
    sys.exit(run_command(main))
