"""From the death of a node to the first new step, on the embedded cluster: real runs, real SIGKILL.

Each run trains the small GPT-2 on 4 nodes and 1 spare and loses a node in the middle of a step; the milestones are
those of its event log. `python -m benchmarks.recovery [KIND ...]` writes benchmarks/results/recovery.json. Kinds:
node (hot swap), worker (restart on the same node), rebuild (the engine is built anew).
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from gemini_hpc.analysis import frames, timeline
from gemini_hpc.telemetry import read_events

RUNS = 5
STEPS = 24
KINDS = {
    "node": ["drills=[{step: 12, phase: backward, rank: 2, action: kill_node}]"],
    "worker": ["drills=[{step: 12, phase: backward, rank: 2, action: kill_worker}]"],
    "rebuild": ["drills=[{step: 12, phase: backward, rank: 2}]", "recovery.first_rung=rebuild"],
}


def run_once(kind: str) -> dict[str, float]:
    """One run; the milliseconds of its recovery's milestones, and the median step's beside them."""
    with tempfile.TemporaryDirectory() as runs:
        settings = [f"train.steps={STEPS}", "verify=false", f"site.runs_dir={runs}", *KINDS[kind]]
        command = [sys.executable, "-m", "gemini_hpc.submit", "--site", "local", *settings]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        if done.returncode:
            sys.exit(done.stdout + done.stderr)
        events = read_events(next(Path(runs).iterdir()))
    (item,) = [r for r in timeline.recoveries(events) if r.outcome == "recovered"]
    steps = frames.steps(events)
    milestones = {m.name: round(m.ms, 1) for m in item.milestones if m.ms is not None}
    pieces = [
        {key: round(1000 * event[key], 1) for key in ("group_s", "reset_s", "restore_s")}
        for event in events
        if event["kind"] == "resumed" and event["generation"] == item.generations[-1]
    ]
    longest = {key.replace("_s", "_ms"): max(piece[key] for piece in pieces) for key in pieces[0]}
    return {**milestones, **longest, "rung": item.rung, "step_ms": round(1000 * float(steps["step_s"].median()), 1)}


def main() -> None:
    target = Path(__file__).parent / "results" / "recovery.json"
    results = json.loads(target.read_text())["kinds"] if target.exists() else {}
    for kind in sys.argv[1:] or KINDS:
        runs = [run_once(kind) for _ in range(RUNS)]
        names = [name for name, value in runs[0].items() if isinstance(value, float)]
        medians = {name: statistics.median(run[name] for run in runs if name in run) for name in names}
        print(f"{kind}: " + ", ".join(f"{name} {value:,.0f}" for name, value in medians.items()) + " ms")
        results[kind] = {"median_ms": medians, "runs": runs}
    target.write_text(json.dumps({"steps": STEPS, "cores": os.cpu_count(), "kinds": results}, indent=1) + "\n")
    print(f"written to {target}")


if __name__ == "__main__":
    main()
