"""Runs whose directory lies on a real network file system, which is slow, and at times hangs."""

import json
import os
import re
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from gemini_hpc.analysis.timeline import recoveries
from gemini_hpc.arena import INDEX_BYTES
from gemini_hpc.persist import survey
from gemini_hpc.persist.hdf5 import read_shard
from tests.cluster.matrix import STEPS, STOPPED, Matrix, References, assert_identical
from tests.cluster.runs import END_S, EVENT_S, START_S, until
from tests.slurm.cluster import SlurmCluster, Storage
from tests.slurm.cluster.storage import LINK_MBIT
from tests.slurm.jobs import SlurmRun, booted_again, dead, shape
from tests.slurm.test_doctor import doctor

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

SLOW_MBIT = 2
"""At this speed some seconds go by before the checkpoint of these small models is written."""

ARCHIVE_S = 6.0
MARGIN_S = 2.0
RECOVERED_S = 12.0
"""In all the file system hangs for 20 s; GlusterFS itself gives up, with errors for all who wait, after 42 s."""

STEP_S = 2.5
"""No step takes so long, on a machine that others use too."""

ASKED_S = 20.0
"""Within this time the supervisor asks Slurm something, and waits for whom it has started for that."""

LONG = 200

TALKS = """
from dataclasses import replace


def add_to(training):
    def batch(step, rank, micro_step):
        print(f"step {step}")
        return training.batch(step, rank, micro_step)

    return replace(training, batch=batch)
"""
"""Prints in every step, as trainings do."""


@pytest.fixture
def storage(cluster: SlurmCluster, machines: None) -> Iterator[Storage]:
    if not os.access("/dev/fuse", os.W_OK) or os.geteuid() != 0:
        pytest.skip("GlusterFS takes /dev/fuse, and root, for it keeps its own in trusted attributes of files")
    storage = Storage(cluster)
    try:
        yield storage
    finally:
        storage.close()


def in_storage(storage: Storage) -> str:
    return f"site.runs_dir={storage.path}/runs"


def checkpoints(run: SlurmRun) -> list[str]:
    """Return the names of those that are published, as the server's disk has them."""
    return [checkpoint.path.name for checkpoint in survey(run.run_dir)[0]]


def assert_whole(run: SlurmRun) -> None:
    """Every checkpoint that is published is what was in memory."""
    found, _ = survey(run.run_dir)
    assert found
    for checkpoint in found:
        for file in checkpoint.files:
            room = memoryview(bytearray(2 * file.nbytes + INDEX_BYTES))
            assert read_shard(checkpoint.path / file.name, room) == file.checksum


def test_doctor_finds_that_locks_hold_across_nodes_and_that_it_is_slow(
    cluster: SlurmCluster, storage: Storage, tmp_path: Path, matrix: Matrix
) -> None:
    """Locks and exclusive files, which a run relies on. The speeds are noted beside the fault matrix."""
    process = doctor(cluster, tmp_path, "--json", in_storage(storage))
    assert process.wait(START_S) == 0, (tmp_path / "output").read_text() + (tmp_path / "errors").read_text()
    found = {f["probe"]: f for f in json.loads((tmp_path / "output").read_text())["findings"] if "nodes" in f}
    assert found["locking"]["level"] == "ok" and len(found["locking"]["nodes"]) == 2, found["locking"]
    written, read = (
        int(re.findall(r"at (\d+) MB/s", found[probe]["text"])[-1]) for probe in ("run directory", "MPI world")
    )
    assert written < LINK_MBIT / 8
    matrix.notes.append(f"GlusterFS behind {LINK_MBIT} Mbit/s: written at {written} MB/s; replicas read at {read} MB/s")


@pytest.mark.faults
@pytest.mark.long
def test_a_run_out_of_spares_is_saved_through_the_slow_link_and_resumed_from_there(
    cluster: SlurmCluster, storage: Storage, tmp_path: Path, references: References
) -> None:
    """With the first node go the supervisor and the coordinator: who closes the run is settled in the file system."""
    with SlurmRun(cluster, tmp_path, *shape(3, 0, STEPS), in_storage(storage), "protect.persist_every=10") as run:
        first = run.wait_for("persisted", START_S)
        run.wait_for("safe", at_least=first["step"] + 5)  # written while training went on
        lost = run.nodes[0]
        with dead(cluster, lost):
            suspended = run.wait_for("run", node="cluster", state="suspended")
            assert "no node is left for every rank" in suspended["reason"]
            cluster.run("scancel", run.job)  # which was back in the queue
            run.wait_for_end()
    saved = run.events("persisted")[-1]
    with SlurmRun(cluster, tmp_path, resume=run.run_dir) as resumed:
        resumed.wait_for("promote", START_S)
        assert {move["tier"] for move in resumed.wait_for("plan")["moves"]} == {"persistent"}
        resumed.wait_for_end()
        assert resumed.wait_for("plan")["step"] == saved["step"]
        assert_identical(resumed, references(3, STEPS))


@pytest.mark.faults
@pytest.mark.long
@pytest.mark.parametrize(("victim", "place"), [("its coordinator", 0), ("a node", 1)])
def test_the_file_system_hangs_while_a_checkpoint_is_written_and_a_node_is_lost_meanwhile(
    cluster: SlurmCluster,
    storage: Storage,
    tmp_path: Path,
    references: References,
    matrix: Matrix,
    victim: str,
    place: int,
) -> None:
    """Training goes on, and is recovered, without it; when it is back checkpoints are written again."""
    (tmp_path / "trouble.py").write_text(TALKS)
    settings = ["protect.persist_every=20", f"recovery.archive_s={ARCHIVE_S}"]
    with SlurmRun(cluster, tmp_path, *shape(3, 1, LONG), in_storage(storage), *settings) as run:
        run.wait_for("persisted", START_S)
        storage.limit(SLOW_MBIT)
        half = until(lambda: next(run.run_dir.glob("checkpoints/*/.*.tmp"), None), "half a checkpoint", EVENT_S)
        with storage.away():
            away = time.time()
            published = checkpoints(run)
            time.sleep(ARCHIVE_S + MARGIN_S)
            lost, struck = run.nodes[place], time.time()
            cluster.lose_power(lost)
            time.sleep(RECOVERED_S)
            assert checkpoints(run) == published and half.parent.name not in published
            assert all(event["t"] < away + MARGIN_S for event in run.events()), "it did not hang"
            back = time.time()
        storage.limit(LINK_MBIT)
        with booted_again(cluster, lost):
            run.wait_for_end(timeout_s=2 * END_S)
        assert run.status["state"] == "finished", run.status
        reference, losses = references(3, LONG), run.losses()
        assert all(bits == {reference[key]} for key, bits in losses.items())
        unwritten = {rank for rank, step in reference if step <= LONG and (rank, step) not in losses}
        assert unwritten <= {place}, "only what the lost node could not write down any more is missing"
        times = [away, *(e["t"] for e in run.events("step", rank=2) if away < e["t"] < struck), struck]
        assert max(after - before for before, after in pairwise(times)) < STEP_S, "training stood still"
        failed = run.events("persist_failed")
        told = [event for event in failed if "no answer within" in event["reason"] and away < event["t"] < struck]
        assert told or place == 0, "by the coordinator, which may not have been able to write it down"
        (item,) = recoveries(run.events())
        assert (item.targets, item.rung, item.tier) == ((lost,), "hot_swap", "peer")
        assert run.events("first_step")[-1]["t"] < back
        assert {event["target"] for event in run.events("evict")} == {lost}
        later = [event["path"] for event in run.events("persisted") if event["t"] > back]
        assert later and f"checkpoints/{half.parent.name}" not in later
        assert_whole(run)
        matrix.enter_recovery(f"GlusterFS hangs, and {victim} loses power meanwhile", item, struck)


@pytest.mark.faults
@pytest.mark.long
def test_the_time_limit_comes_while_the_file_system_hangs(
    cluster: SlurmCluster, storage: Storage, tmp_path: Path, matrix: Matrix
) -> None:
    """The supervisor, whose log lies there, hears of it at once, and the run is saved as soon as that can be done."""
    with SlurmRun(cluster, tmp_path, *shape(3, 0, 10 * LONG), in_storage(storage)) as run:
        run.wait_for("persisted", START_S)
        with storage.away():
            time.sleep(ASKED_S)
            told = time.time()
            assert cluster.run("scancel", "--signal=USR2", "--batch", run.job).returncode == 0
            time.sleep(MARGIN_S)
            back = time.time()
        suspended = run.wait_for("run", node="cluster", state="suspended")
        assert "SIGUSR2" in suspended["reason"] and "queued again" in suspended["reason"]
        begun = run.wait_for("save", since=told)
        assert begun["t"] < back
        assert run.events("persisted")[-1]["t"] > back
        cluster.run("scancel", run.job)  # which is back in the queue
        run.wait_for_end()
        matrix.enter(
            "GlusterFS hangs as the time limit comes", "saved, queued again", 1000 * (begun["t"] - told), None, STOPPED
        )
