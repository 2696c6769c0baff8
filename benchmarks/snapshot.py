"""How long training stands still for a snapshot, beside a plain copy of the same bytes into the same memory.

One worker's engine (rank 0 of 4 over the fake group) is built for GPT-2 of several sizes, in the environment of a
worker; then a snapshot and a plain copy (one memmove of as many bytes) take turns, so that both see the same machine,
each after other memory was written, as after a training step. Who goes first alternates.
`python benchmarks/snapshot.py` writes benchmarks/results/snapshot.json.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from gemini_hpc.arena import COPY_TUNING, OWN, Arena, Geometry, Record, State
from gemini_hpc.config import load_run

WORLD_SIZE = 4
SIZES = ((192, 4), (320, 4), (768, 12), (1536, 12))  # hidden, layers; the first is the preset `small`
CACHE_BYTES = 64 << 20  # many times the second-level cache; the third level is shared with other machines
RUNS = 3
PAIRS = 15


def measure(hidden: int, layers: int) -> dict[str, float]:
    """One run in this process: medians over PAIRS of the snapshot's and the copy's seconds."""
    from gemini_hpc.engine import builder
    from gemini_hpc.engine.elastic import ElasticWorld
    from gemini_hpc.models import job
    from gemini_hpc.models.presets import ModelShape

    shape = ModelShape("gpt2", hidden, 4 * hidden, layers, heads=4, vocab=256, seq_len=128)
    job.model_shape = lambda *_: shape
    builder.prepare(threads=1)
    ElasticWorld(0, WORLD_SIZE, "127.0.0.1", timeout_s=60)
    run = load_run(overrides=["data.source=synthetic", "drills=[]"], site="local")
    built = builder.build(job.build, run, rank=0)
    with tempfile.TemporaryDirectory(dir=run.site.shm_dir) as folder:
        arena = Arena.create(Path(folder, "arena"), Geometry(1, built.shard.nbytes), "benchmark")
        others = np.zeros(CACHE_BYTES, np.uint8)
        source = np.random.default_rng(0).integers(0, 255, built.shard.nbytes, np.uint8)

        def snapshot(turn: int, half: int) -> None:
            arena.write_record(OWN, half, Record(State.WRITING, 0, turn, 1))
            built.shard.capture(arena.payload(OWN, half), turn)
            arena.write_record(OWN, half, Record(State.WRITTEN, 0, turn, 1, built.shard.nbytes))

        def copy(_turn: int, half: int) -> None:
            np.copyto(np.frombuffer(arena.payload(OWN, half), np.uint8), source)

        seconds: dict[Callable[[int, int], None], list[float]] = {snapshot: [], copy: []}
        for turn in range(PAIRS + 2):
            order = (snapshot, copy) if turn % 2 else (copy, snapshot)
            for half, action in enumerate(order):
                others += 1
                start = time.perf_counter()
                action(turn, half)
                seconds[action].append(time.perf_counter() - start)
    snapshots, copies = seconds[snapshot], seconds[copy]
    snapshot_s, copy_s = statistics.median(snapshots[2:]), statistics.median(copies[2:])
    return {
        "bytes": built.shard.nbytes,
        "snapshot_s": snapshot_s,
        "copy_s": copy_s,
        "ratio": statistics.median(a / b for a, b in zip(snapshots[2:], copies[2:], strict=True)),
    }


def main() -> None:
    if len(sys.argv) > 1:
        print(json.dumps(measure(*map(int, sys.argv[1:]))), flush=True)
        os._exit(0)
    results = []
    for hidden, layers in SIZES:
        runs = [_in_a_process(hidden, layers) for _ in range(RUNS)]
        ratios = [run["ratio"] for run in runs]
        summary = SimpleNamespace(bytes=runs[0]["bytes"], ratio=statistics.median(ratios))
        print(
            f"{summary.bytes / 1e6:8.1f} MB  snapshot {statistics.median(r['snapshot_s'] for r in runs) * 1e3:7.2f} ms"
            f"  copy {statistics.median(r['copy_s'] for r in runs) * 1e3:7.2f} ms"
            f"  ratio {summary.ratio:.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        )
        results.append({"hidden": hidden, "layers": layers, **vars(summary), "runs": runs})
    target = Path(__file__).parent / "results" / "snapshot.json"
    target.write_text(
        json.dumps({"world_size": WORLD_SIZE, "cores": os.cpu_count(), "sizes": results}, indent=1) + "\n"
    )
    print(f"written to {target}")


def _in_a_process(hidden: int, layers: int) -> dict[str, float]:
    command = [sys.executable, __file__, str(hidden), str(layers)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env={**os.environ, **COPY_TUNING})
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
