"""`python -m gemini_hpc.status RUN_DIR [--json]`: ranks, nodes, tiers, recoveries, and whatever is awaited."""

import json
import sys
import time
from typing import Any
from unicodedata import category

from gemini_hpc.analysis import timeline
from gemini_hpc.cli import Parser, run_command
from gemini_hpc.errors import parsing
from gemini_hpc.runtime.living import awaited, is_alive
from gemini_hpc.runtime.paths import open_run
from gemini_hpc.runtime.status_file import read_status
from gemini_hpc.telemetry import read_events

SILENT_S = 5.0
"""A status that is older was written by a coordinator that is no more."""

ENDED = ("finished", "suspended", "stopped", "failed")

AFTER_TRAINING = ("verifying", "reporting")


def main(arguments: list[str]) -> int:
    parser = Parser(prog="gemini_hpc.status", description="Show the state of a run.")
    parser.add_argument("run_dir", help="a run directory, as printed by submit")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    options = parser.parse_args(arguments)
    paths, run = open_run(options.run_dir)
    with parsing(f"the event log in {paths.run_dir / 'events'}"):
        recoveries = timeline.recoveries(read_events(paths.run_dir))
        told = timeline.table(recoveries) if recoveries else ""
    status = {"run_dir": str(paths.run_dir), "alive": is_alive(paths, run), **read_status(paths)}
    with parsing(str(paths.status)):
        status["age_s"] = round(max(0.0, time.time() - status["t"]), 1) if "t" in status else None
    if "generation" not in status:
        status["waiting_for"] = awaited(paths, run)
    with parsing(str(paths.status)):
        text = _json(status, recoveries) if options.json else _text(run.name, status)
    print(_printable(text if options.json or not told else f"{text}\n\n{told}"))
    return 0


def _json(status: dict[str, Any], recoveries: list[timeline.Recovery]) -> str:
    status["recoveries"] = [
        {
            "title": timeline.title(item),
            "summary": timeline.summary(item),
            "generations": list(item.generations),
            "milestones_ms": {m.name: m.ms for m in item.milestones},
        }
        for item in recoveries
    ]
    return json.dumps(status, indent=1)


def _printable(text: str) -> str:
    """Write control characters as escapes: what stands in a file must not steer the terminal."""
    return "".join(c if c == "\n" or category(c)[0] != "C" else ascii(c)[1:-1] for c in text)


def _text(name: str, status: dict[str, Any]) -> str:
    alive = {True: "alive", False: "not running", None: "Slurm does not say whether it runs"}[status["alive"]]
    if "generation" not in status:
        awaits = [f"waiting for: {', '.join(status['waiting_for'])}"] if status["waiting_for"] else []
        reason = [str(status["reason"])] if status.get("reason") else []
        return "\n".join([f"{name}: {alive}, {status.get('state', 'no status yet')}", *awaits, *reason])
    lines = [
        f"{name}: {status['state']} ({alive}), step {status['step']} of {status['total_steps']}, "
        f"generation {status['generation']}, coordinated by {status['coordinator']}",
        f"newest safe step: {_step(status['safe_step'])} in memory (m = {status['replicas']}), "
        f"{_step(status['persistent_step'])} on the persistent tier; "
        + ("protected" if status["protected"] else "not protected at this moment"),
    ]
    if status["shared_domains"]:
        lines.append(f"copies of one snapshot lie in one failure domain: {', '.join(status['shared_domains'])}")
    if status["waiting_for"]:
        lines.append(f"waiting for {status['waiting_s']} s for: " + ", ".join(status["waiting_for"]))
    if status["alive"] and status["age_s"] > SILENT_S:
        lines.append(
            f"no word of this run for {status['age_s']:.0f} s: a node that a majority answers is awaited, to lead it; "
            "or the run directory, to be written to (full, or its file system hangs)"
        )
    if status["alive"] is False and status["state"] not in ENDED:
        lines.append("it has ended without a word (cancelled, out of time, or killed); submit --resume goes on with it")
    if not status["alive"] or status["state"] in AFTER_TRAINING:
        lines.append("the nodes, when the training ended:")
    for node in status["nodes"]:
        rank = f"rank {node['rank']}" if node["rank"] is not None else ""
        hurry = [node["hurry"]] if node["hurry"] else []
        said = {"suspected": node["suspected_for"], "avoided": node["avoided_for"], "reads at once": hurry}
        doubt = "; ".join(f"{word}: {', '.join(reasons)}" for word, reasons in said.items() if reasons)
        lines.append(f"  {node['node']:<12} {node['status']:<8} {rank:<8} {node['worker'] or '':<9} {doubt}".rstrip())
    for key in ("verdict", "reason"):
        if status.get(key):
            lines.append(str(status[key]))
    return "\n".join(lines)


def _step(step: int) -> str:
    return str(step) if step >= 0 else "none"


if __name__ == "__main__":
    sys.exit(run_command(main))
