"""What checkpoint traffic costs training on a slow network (the paper's Figure 16), in each `protect.mode`.

Four nodes of the tests' Slurm, each a set of namespaces on this machine, with links of MBIT both ways (token bucket),
so slow that the network and not the processors are the limit. Every run is a job of its own with the training of
`benchmarks.pauses`; off takes no snapshot between its start and its end; unpipelined is interleaved, but each read is
stored before the next one begins. `python -m benchmarks.interleaving [RUNS [MBIT]]` writes
benchmarks/results/interleaving.json.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import pauses
from gemini_hpc.analysis import frames
from gemini_hpc.telemetry import read_events
from tests.cluster.runs import command
from tests.slurm.cluster import SlurmCluster, unavailable, without_namespaces

RUNS, MBIT, NODES = 3, 100, 4
SETTLED = {"off": 6, "blocking": 6, "immediate": 6, "unpipelined": 20, "interleaved": 20}
"""The first step that counts. Idle spans are known well from the second profile on, which comes with step 18."""

COUNTED = 15
SHAPE = (
    f"cluster.nodes={NODES}",
    "cluster.spares=0",
    "protect.persist_every=1000",
    "train.entry=benchmarks.pauses:build",
)
SITE = "kind: slurm\nruns_dir: {place}/runs\ntimeout_min: 30\nsignal_delay_s: 60\ncpus_per_task: 2\ninterface: ib0\n"
UNPIPELINED = "slurm_setup: [export GEMINI_UNPIPELINED=1]\n"
RUN_S = 300.0
LOOK_S = 2.0
"""A look at the queue costs a tenth of a second of a processor."""


def shape_links(cluster: SlurmCluster, mbit: int) -> None:
    """Limit what each node sends, and what it receives."""
    shape = ["root", "tbf", "rate", f"{mbit}mbit", "burst", "48kb", "latency", "50ms"]
    for name, node in cluster.nodes.items():
        for side, device in ((node, "ib0"), (cluster.login, f"v-{name}")):
            # packets of less than a burst: larger ones would be cut into the network's own, which costs processors
            whole = ["ip", "link", "set", "dev", device, "gso_max_size", "32768"]
            for words in (whole, ["tc", "qdisc", "replace", "dev", device, *shape]):
                subprocess.run(side.enter(words, as_root=True), check=True)


def run_once(cluster: SlurmCluster, place: Path, mode: str) -> dict[str, Any]:
    """Run one job; return what its steps took, from the slowest rank of each."""
    first = SETTLED[mode]
    last = first + COUNTED - 1
    site = place / f"{mode}.yaml"
    site.write_text(SITE.format(place=place) + UNPIPELINED * (mode == "unpipelined"))
    protect = "interleaved" if mode == "unpipelined" else mode
    settings = [*SHAPE, f"train.steps={last}", f"protect.mode={protect}", f"name=traffic-{mode}"]
    done = cluster.run(*command("submit", "--site", str(site), *settings), cwd=Path.cwd())
    if done.returncode:
        sys.exit(done.stderr)
    words = dict(line.split(maxsplit=1) for line in done.stdout.splitlines() if line[:4] in ("run ", "job "))
    deadline = time.monotonic() + RUN_S
    while cluster.run("squeue", "-h", "-j", words["job"]).stdout.strip() and time.monotonic() < deadline:
        time.sleep(LOOK_S)
    events = read_events(Path(words["run"]))
    steps = frames.final_steps(frames.steps(events))
    if steps["step"].max() != last:
        sys.exit(f"{mode}: the run did not come to its end: {words['run']}")
    counted = steps[steps["step"] >= first]
    each = counted.groupby("step")["step_s"].max()
    taken = counted.groupby("step")["snapshot_s"].max().notna()
    told = [event for event in events if event["kind"] == "collectives"]
    return {
        "step_ms": round(1000 * float(each.median()), 1),
        "least_ms": round(1000 * float(each.min()), 1),
        "most_ms": round(1000 * float(each.max()), 1),
        "snapshots_per_step": round(float(taken.mean()), 2),
        "idle_share": round(statistics.median(event["idle_s"] / event["step_s"] for event in told), 3),
    }


def main() -> None:
    if reason := unavailable() or without_namespaces():
        sys.exit(reason)
    runs, mbit = [int(word) for word in sys.argv[1:]] + [RUNS, MBIT][len(sys.argv) - 1 :]
    found: dict[str, list[dict[str, Any]]] = {mode: [] for mode in SETTLED}
    with tempfile.TemporaryDirectory(prefix="interleaving-") as folder:
        cluster = SlurmCluster(Path(folder, "cluster"), nodes=NODES)
        try:
            shape_links(cluster, mbit)
            for number in range(runs):
                for mode in SETTLED:  # side by side: whatever else the machine does meets all of them
                    found[mode].append(run_once(cluster, Path(folder), mode))
                    print(f"run {number + 1}  {mode:<12} {found[mode][-1]}", flush=True)
        finally:
            cluster.close()
    table = {mode: _to_off(each, found["off"]) for mode, each in found.items()}
    for mode, line in table.items():
        low, high = line["to_off_from"], line["to_off_to"]
        print(f"{mode:<12} {line['step_ms']:7.1f} ms   {line['to_off']:.3f} x off ({low:.3f} to {high:.3f})")
    about = {
        "mbit": mbit,
        "nodes": NODES,
        "cores": os.cpu_count(),
        "forward_s": pauses.FORWARD_S,
        "settings": SHAPE,
        "settled": SETTLED,
        "counted": COUNTED,
    }
    target = Path(__file__).parent / "results" / "interleaving.json"
    target.write_text(json.dumps({**about, "modes": table, "runs": found}, indent=1) + "\n")
    print(f"written to {target}")


def _to_off(each: list[dict[str, Any]], off: list[dict[str, Any]]) -> dict[str, float]:
    """Compare each run with the one of `off` beside it."""
    ratios = [one["step_ms"] / other["step_ms"] for one, other in zip(each, off, strict=True)]
    return {
        "step_ms": statistics.median(one["step_ms"] for one in each),
        "to_off": round(statistics.median(ratios), 4),
        "to_off_from": round(min(ratios), 4),
        "to_off_to": round(max(ratios), 4),
    }


if __name__ == "__main__":
    main()
