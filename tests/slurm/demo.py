"""`make slurm-demo`: a Slurm of six nodes on this machine, sbatch/gpt2_gemini.sh on it, and a node that loses power."""

import re
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gemini_hpc.analysis.timeline import Recovery, recoveries
from gemini_hpc.telemetry import read_events
from tests.cluster.runs import EVENT_S, START_S, until
from tests.slurm.cluster import SlurmCluster, unavailable, without_namespaces

ROOT = Path(__file__).parents[2]
END_S = 600.0
STEP = 20


@contextmanager
def brought_up() -> Iterator[SlurmCluster]:
    with tempfile.TemporaryDirectory(prefix="slurm-demo-") as place:
        began = time.monotonic()
        cluster = SlurmCluster(Path(place) / "cluster", nodes=6)
        try:
            say(f"a Slurm of {len(cluster.names)} nodes is up after {time.monotonic() - began:.1f} s")
            yield cluster
        finally:
            cluster.close()


def say(text: str) -> None:
    print(f"slurm-demo  {text}", flush=True)


def main() -> int:
    if reason := unavailable() or without_namespaces():
        print(reason, file=sys.stderr)
        return 1
    with brought_up() as cluster:
        done = cluster.run("sbatch", "--output=/dev/null", "sbatch/gpt2_gemini.sh", cwd=ROOT)
        if done.returncode:
            print(done.stderr, file=sys.stderr)
            return 1
        say(f"sbatch sbatch/gpt2_gemini.sh: {done.stdout.strip()}")
        job = done.stdout.split()[-1]
        run_dir = until(lambda: next((cluster.place / "ibex").glob(f"user/*/*/runs/*{job}*"), None), "a run", START_S)
        until(lambda: any(e["kind"] == "step" and e["step"] >= STEP for e in read_events(run_dir)), "training", START_S)
        names = cluster.run("squeue", "-h", "-o", "%N", "-j", job).stdout.strip()
        victim = cluster.run("scontrol", "show", "hostnames", names).stdout.split()[2]
        since = time.time()
        cluster.lose_power(victim)
        say(f"{victim} has lost its power in step {STEP} or so; nobody was told")
        (item,) = until(
            lambda: [r for r in recoveries(read_events(run_dir)) if r.outcome == "recovered"], "it", EVENT_S
        )
        show(item, since)
        knows = victim in cluster.states("down")
        say(f"and Slurm {'knows by now' if knows else 'still believes it alive'}")
        until(lambda: not cluster.run("squeue", "-h", "-j", job).stdout.strip(), "the end of the job", END_S)
        steps = max(int(e["step"]) for e in read_events(run_dir) if e["kind"] == "step")
        say(f"the job has ended, with all of its {steps} steps")
    return 0


def recovered(run_dir: Path) -> Recovery | None:
    return next((item for item in recoveries(read_events(run_dir)) if item.outcome == "recovered"), None)


def show(item: Recovery, since: float) -> None:
    """Print what came when, in milliseconds since the power was lost."""
    late = 1000 * (item.start - since)
    for milestone in item.milestones:
        if milestone.ms is not None:
            say(f"{milestone.ms + late:8.0f} ms  {milestone.name:<12} {milestone.note}")
    say(f"rung: {re.sub('_', ' ', item.rung)}; its state came from: {item.tier}")


if __name__ == "__main__":
    sys.exit(main())
