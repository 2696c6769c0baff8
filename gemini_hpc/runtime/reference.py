"""The undisturbed reference: the same training on plain DeepSpeed and plain gloo.

No elastic group, no snapshots, no agents: nothing of what the hot swap consists of takes part, so equal losses
prove that it changes nothing. `python -m gemini_hpc.runtime.reference RUN_DIR` starts one process per rank.
"""

import json
import os
import signal
import sys
import traceback

from gemini_hpc.runtime.children import PARENT, Child, carry_output, python
from gemini_hpc.runtime.paths import RunPaths, open_run
from gemini_hpc.runtime.processes import RUN_MARK, die_with_parent

RANK = "GEMINI_RANK"


def train(paths: RunPaths, rank: int) -> None:
    """Train as one rank from the first step to the last; append each loss to reference/losses.jsonl."""
    from gemini_hpc.engine import builder
    from gemini_hpc.engine.plain import join_plain_group
    from gemini_hpc.engine.training import train_step

    _, run = open_run(paths.run_dir)
    builder.prepare(run.train.threads)
    join_plain_group(paths.reference / "rendezvous", rank, run.cluster.nodes, run.recovery.collective_s)
    engine, training = builder.make_engine(builder.load_entry(run.train.entry), run)
    log = os.open(losses_file(paths), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    for step in range(1, run.train.steps + 1):
        loss = train_step(engine, training, run.train.seed, step, rank)
        os.write(log, json.dumps({"rank": rank, "step": step, "loss": loss}).encode() + b"\n")


def losses_file(paths: RunPaths) -> str:
    return str(paths.reference / "losses.jsonl")


def start(paths: RunPaths, world_size: int) -> list[Child]:
    """Start all ranks of the reference, from scratch."""
    paths.reference.mkdir(exist_ok=True)
    for name in ("rendezvous", "losses.jsonl"):
        (paths.reference / name).unlink(missing_ok=True)
    return [_start(paths, rank) for rank in range(world_size)]


def _start(paths: RunPaths, rank: int) -> Child:
    environment = {RUN_MARK: paths.run_id, RANK: str(rank)}
    log = paths.logs / f"reference-{rank}.log"
    return Child(python("gemini_hpc.runtime.reference", str(paths.run_dir)), environment, log)


def main() -> None:
    die_with_parent(int(os.environ[PARENT]))
    carry_output()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    paths, _ = open_run(sys.argv[1])
    try:
        train(paths, int(os.environ[RANK]))
    except BaseException:  # noqa: BLE001  the outermost loop
        traceback.print_exc()
        os._exit(1)
    os._exit(0)  # no interpreter shutdown: gloo's threads have nothing to say any more


if __name__ == "__main__":
    main()
