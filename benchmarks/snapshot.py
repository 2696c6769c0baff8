"""How long training stands still for a snapshot, beside a plain copy of the same bytes into the same memory.

Two ranks in a real group, each the engine of GPT-2 of several sizes (as rank 0 or 1 of 4), in the environment of a
worker. In every turn, after other memory was written as an update does, they either take a snapshot, all of it: the
outcome of the vote that was cast before the update, the small state, the records and the copy; or copy as many bytes by
one memmove. `python -m benchmarks.snapshot` writes benchmarks/results/snapshot.json.
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

import numpy as np

from gemini_hpc.arena import COPY_TUNING, OWN, Arena, Geometry, Record, State
from gemini_hpc.config import load_run

WORLD_SIZE = 4
MEASURED = 2  # of its ranks: one a core
SIZES = ((192, 4), (320, 4), (768, 12), (1536, 12))  # hidden, layers; the first is the preset `small`
CACHE_BYTES = 64 << 20  # many times the second-level cache; the third level is shared with other machines
RUNS = 3
WARM_UP = 2
TURNS = 25

Outcome = Callable[[], bool]


def measure(rank: int, hidden: int, layers: int) -> dict[str, float]:
    """One run in this process: medians over TURNS of the seconds that each way takes."""
    from gemini_hpc.engine import builder
    from gemini_hpc.engine.elastic import ElasticWorld
    from gemini_hpc.models import job
    from gemini_hpc.models.presets import ModelShape

    shape = ModelShape("gpt2", hidden, 4 * hidden, layers, heads=4, vocab=256, seq_len=128)
    job.model_shape = lambda *_: shape
    builder.prepare(threads=1)
    world = ElasticWorld(rank, WORLD_SIZE, "127.0.0.1", timeout_s=120)
    run = load_run(overrides=["data.source=synthetic", "drills=[]"], site="local")
    built = builder.build(job.build, run, rank)
    world.size = MEASURED  # the engine is one of four; only these two vote
    world.join(1, rank, _meeting_point(world, rank))
    nbytes = built.shard.nbytes
    with tempfile.TemporaryDirectory(dir=run.site.shm_dir) as folder:
        arena = Arena.create(Path(folder, "arena"), Geometry(1, nbytes), "benchmark")
        places = [built.shard.place(arena.payload(OWN, half)) for half in (0, 1)]
        others = np.zeros(CACHE_BYTES, np.uint8)
        source = np.random.default_rng(0).integers(0, 255, nbytes, np.uint8)

        def snapshot(turn: int, outcome: Outcome) -> None:
            assert outcome()
            moment = built.shard.gather(turn, 1.0)
            arena.write_record(OWN, turn % 2, Record(State.WRITING, rank, turn, 1))
            built.shard.capture(places[turn % 2], moment)
            arena.write_record(OWN, turn % 2, Record(State.WRITTEN, rank, turn, 1, nbytes))

        def copy(turn: int, _: Outcome) -> None:
            np.copyto(np.frombuffer(arena.payload(OWN, turn % 2), np.uint8), source)

        seconds: dict[Callable[[int, Outcome], None], list[float]] = {snapshot: [], copy: []}
        for turn in range(WARM_UP + TURNS):
            for way in seconds:
                outcome = world.vote(True)  # as before an update
                others += 1  # the update
                world.vote(True)()  # both ranks begin at the same moment
                start = time.perf_counter()
                way(turn, outcome)
                seconds[way].append(time.perf_counter() - start)
    snapshot_s, copy_s = (statistics.median(taken[WARM_UP:]) for taken in seconds.values())
    return {"bytes": nbytes, "snapshot_s": snapshot_s, "copy_s": copy_s, "ratio": snapshot_s / copy_s}


def _meeting_point(world: "object", rank: int) -> str:
    """Rank 0 opens a store and tells the other through a file; return its address."""
    place = Path(os.environ["MEETING_POINT"])
    if rank == 0:
        place.with_suffix(".tmp").write_text(world.open_store())  # type: ignore[attr-defined]
        place.with_suffix(".tmp").rename(place)
    while not place.exists():
        time.sleep(0.01)
    return place.read_text()


def main() -> None:
    if len(sys.argv) > 1:
        print(json.dumps(measure(*map(int, sys.argv[1:]))), flush=True)
        os._exit(0)
    results = []
    for hidden, layers in SIZES:
        runs = [_in_processes(hidden, layers) for _ in range(RUNS)]
        medians = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        ratios = [run["ratio"] for run in runs]
        print(
            f"{medians['bytes'] / 1e6:8.1f} MB  snapshot {medians['snapshot_s'] * 1e3:7.2f} ms"
            f"  copy {medians['copy_s'] * 1e3:7.2f} ms"
            f"  ratio {medians['ratio']:.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        )
        results.append({"hidden": hidden, "layers": layers, **medians, "runs": runs})
    target = Path(__file__).parent / "results" / "snapshot.json"
    target.write_text(
        json.dumps({"world_size": WORLD_SIZE, "cores": os.cpu_count(), "sizes": results}, indent=1) + "\n"
    )
    print(f"written to {target}")


def _in_processes(hidden: int, layers: int) -> dict[str, float]:
    """Start one process a rank; return what rank 0 measured."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, **COPY_TUNING, "MEETING_POINT": f"{folder}/store"}
        ranks = [
            subprocess.Popen(
                [sys.executable, __file__, str(rank), str(hidden), str(layers)],
                env=environment,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            for rank in range(MEASURED)
        ]
        outputs = [rank.communicate(timeout=600) for rank in ranks]
    if any(rank.returncode for rank in ranks):
        sys.exit("\n".join(errors[-2000:] for _, errors in outputs))
    found: dict[str, float] = json.loads(outputs[0][0].splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
