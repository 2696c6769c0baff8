"""What checkpoint traffic costs training on a slow network (the paper's Figure 16), in each `protect.mode`.

Four nodes of the tests' Slurm, each a set of namespaces on this machine, with links of RATE both ways (token bucket):
slow enough that the network and not the processors are the limit. Every run is a job of its own that trains the small
GPT-2; off has no snapshots between its start and its end. `python -m benchmarks.interleaving [RUNS [MBIT]]` writes
benchmarks/results/interleaving.json: for each mode the median step of each run, after the profile is there, and how
often a snapshot was taken.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from gemini_hpc.analysis import frames
from gemini_hpc.telemetry import read_events
from tests.cluster.runs import command
from tests.slurm.cluster import SlurmCluster, unavailable, without_namespaces

RUNS, MBIT = 3, 200
NODES = 4
STEPS, FROM = 70, 30
"""Steps of a run, and the first that counts."""

MODES = ("off", "blocking", "immediate", "interleaved")
SHAPE = ("cluster.nodes=4", "cluster.spares=0", f"train.steps={STEPS}", "protect.persist_every=1000")
COMPUTE = "train.micro_batch=16"
RUN_S = 900.0
SITE = "kind: slurm\nruns_dir: {place}/runs\ntimeout_min: 30\nsignal_delay_s: 60\ncpus_per_task: 2\ninterface: ib0\n"


def shape_links(cluster: SlurmCluster, mbit: int) -> None:
    """Limit what each node sends, and what it receives."""
    shape = ["root", "tbf", "rate", f"{mbit}mbit", "burst", "64kb", "latency", "50ms"]
    for name, node in cluster.nodes.items():
        for side, device in ((node, "ib0"), (cluster.login, f"v-{name}")):
            subprocess.run(side.enter(["tc", "qdisc", "replace", "dev", device, *shape], as_root=True), check=True)


def run_once(cluster: SlurmCluster, place: Path, mode: str) -> dict[str, Any]:
    settings = [*SHAPE, COMPUTE, f"protect.mode={mode}", f"name={mode}"]
    done = cluster.run(*command("submit", "--site", str(place / "site.yaml"), *settings), cwd=place)
    if done.returncode:
        sys.exit(done.stderr)
    words = dict(line.split(maxsplit=1) for line in done.stdout.splitlines() if line[:4] in ("run ", "job "))
    cluster.run("timeout", str(RUN_S), "sh", "-c", f"while squeue -h -j {words['job']} | grep -q .; do sleep 1; done")
    events = read_events(Path(words["run"]))
    steps = frames.final_steps(frames.steps(events))
    counted = steps[steps["step"] >= FROM]
    if counted["step"].max() != STEPS:
        sys.exit(f"{mode}: the run did not come to its end: {words['run']}")
    each = counted.groupby("step")["step_s"].max()
    taken = counted.groupby("step")["snapshot_s"].max().notna()
    told = [event for event in events if event["kind"] == "collectives"]
    idle = [event["idle_s"] / event["step_s"] for event in told]
    hurried = sorted({event["reason"] for event in events if event["kind"] == "hurry" and event["reason"]})
    return {
        "step_ms": round(1000 * float(each.median()), 1),
        "mean_step_ms": round(1000 * float(each.mean()), 1),
        "steps_per_snapshot": round(len(taken) / max(1, int(taken.sum())), 2),
        **({"idle_share": round(statistics.median(idle), 3)} if idle else {}),
        **({"hurried": hurried} if hurried else {}),
    }


def main() -> None:
    if reason := unavailable() or without_namespaces():
        sys.exit(reason)
    runs, mbit = [int(word) for word in sys.argv[1:]] + [RUNS, MBIT][len(sys.argv) - 1 :]
    found: dict[str, list[dict[str, Any]]] = {mode: [] for mode in MODES}
    with tempfile.TemporaryDirectory(prefix="interleaving-") as folder:
        place = Path(folder)
        (place / "site.yaml").write_text(SITE.format(place=place))
        cluster = SlurmCluster(place / "cluster", nodes=NODES)
        try:
            shape_links(cluster, mbit)
            for number in range(runs):
                for mode in MODES:  # side by side: whatever else the machine does meets all of them
                    found[mode].append(run_once(cluster, place, mode))
                    print(f"{number + 1} {mode:<12} {found[mode][-1]}", flush=True)
        finally:
            cluster.close()
    medians = {mode: statistics.median(one["step_ms"] for one in each) for mode, each in found.items()}
    ratios = {mode: round(medians[mode] / medians["off"], 4) for mode in MODES}
    print("  ".join(f"{mode} {medians[mode]:.0f} ms ({ratio:.3f})" for mode, ratio in ratios.items()))
    target = Path(__file__).parent / "results" / "interleaving.json"
    about = {"mbit": mbit, "nodes": NODES, "settings": [*SHAPE, COMPUTE], "cores": os.cpu_count(), "steps_from": FROM}
    target.write_text(
        json.dumps({**about, "median_step_ms": medians, "to_off": ratios, "runs": found}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
