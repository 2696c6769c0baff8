"""A loaded machine for half an hour: is anybody taken for dead who is not?

The small GPT-2 trains on 4 nodes and 1 spare while as many processes as BUSY do nothing but compute, beside whatever
else the machine does. Nothing is made to fail: every suspicion, eviction, election or repeated step would be a false
one. `python -m benchmarks.steadiness [MINUTES]` writes benchmarks/results/steadiness.json.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from gemini_hpc.analysis import frames
from gemini_hpc.telemetry import read_events

MINUTES = 30.0
BUSY = 4
SAMPLE_S = 0.1
NEVER = "train.steps=1000000"
WRONG = ("suspect", "evict", "trouble", "host_lost", "persist_failed", "copy_failed", "stalled")
"""Kinds of events that a run without failures must not have (stalled: an agent that stood still, and says so)."""


def watch(run_dir: Path, submit: "subprocess.Popen[bytes]", until: float) -> float:
    """Look at status.json until that time; return the longest silence of any node that the coordinator bore."""
    longest = 0.0
    while time.monotonic() < until and submit.poll() is None:
        time.sleep(SAMPLE_S)
        try:
            nodes = json.loads((run_dir / "status.json").read_text())["nodes"]
        except (OSError, ValueError, KeyError):
            continue  # not written yet
        longest = max(longest, *(node["heard_s_ago"] or 0.0 for node in nodes))
    return longest


def run(minutes: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as runs:
        busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(BUSY)]
        command = [sys.executable, "-m", "gemini_hpc.submit", "--site", "local", NEVER, "drills=[]", "verify=false"]
        submit = subprocess.Popen([*command, f"site.runs_dir={runs}"], stdout=subprocess.DEVNULL)
        try:
            while not (places := list(Path(runs).glob("*/events/node0.jsonl"))):
                time.sleep(SAMPLE_S)
            run_dir = places[0].parent.parent
            silence_s = watch(run_dir, submit, time.monotonic() + 60 * minutes)
            load = os.getloadavg()[2]
            submit.send_signal(signal.SIGINT)
            submit.wait(60)
        finally:
            for process in (*busy, submit):
                process.kill()
        events = read_events(run_dir)
        configured = (run_dir / "config.yaml").read_text()
    kinds = Counter(event["kind"] for event in events)
    steps = frames.steps(events)
    return {
        "minutes": minutes,
        "cores": os.cpu_count(),
        "busy_processes": BUSY,
        "load_of_15_minutes": round(load, 1),
        "heartbeat_timeout_s": next(float(s.split()[1]) for s in configured.splitlines() if "heartbeat_timeout_s" in s),
        "longest_silence_s": silence_s,
        "steps": int(steps["step"].max()),
        "step_s": {name: round(float(steps["step_s"].quantile(q)), 3) for name, q in (("median", 0.5), ("p99", 0.99))},
        "generations": kinds["plan"],
        "elections": kinds["coordinator"],
        **{kind: kinds[kind] for kind in WRONG},
    }


def main() -> None:
    result = run(float(sys.argv[1]) if len(sys.argv) > 1 else MINUTES)
    print(", ".join(f"{name} {value}" for name, value in result.items()))
    target = Path(__file__).parent / "results" / "steadiness.json"
    target.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {target}")


if __name__ == "__main__":
    main()
