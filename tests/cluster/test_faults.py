"""The fault matrix: every failure that DESIGN.md names, on real processes, and the losses identical to the last bit.

`make faults` runs all rows and prints a table; rows that are not `long` belong to `make test` too. A row waits for
events, never for a time; what it did is proven to have happened before anything is concluded from it.
"""

import contextlib
import os
import resource
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from gemini_hpc.analysis.timeline import Recovery, recoveries
from gemini_hpc.arena import OWN, Arena, State
from gemini_hpc.persist import manifest
from gemini_hpc.runtime import faults
from tests.cluster.matrix import STEPS, STOPPED, Matrix, References, assert_identical, start
from tests.cluster.runs import EVENT_S, GONE_S, START_S, Run, call, until

pytestmark = [pytest.mark.cluster, pytest.mark.faults, pytest.mark.timeout(600)]

WORKER = "gemini_hpc.runtime.worker"
HOST = "gemini_hpc.windows.host"
ARCHIVER = "gemini_hpc.runtime.archiver"
AGENT = "gemini_hpc.runtime.agent"

FAIR_STEPS = 200
LONG_STEPS = 400


def recovered(run: Run) -> list[Recovery]:
    found = [item for item in recoveries(run.events()) if item.outcome != "spare lost"]
    assert all(item.outcome == "recovered" for item in found), found
    return found


def ms_since(t: float, event: dict[str, float]) -> float:
    return 1000 * (event["t"] - t)


@contextmanager
def host_stopped(run: Run, node: str) -> Iterator[int]:
    """Stop the window host of `node`: whoever reads from it now waits. Yields its process."""
    (pid,) = run.pids(HOST, node)
    os.kill(pid, signal.SIGSTOP)
    try:
        yield pid
    finally:
        faults.kill(pid, signal.SIGCONT)


def stop_amid_pull(run: Run, source: str, holder: str) -> int:
    """Stop the window host of `source` while that of `holder` reads from it; return the stopped process."""
    arenas = [Arena.open(run.paths.arena(node)) for node in (source, holder)]
    read_from, reader = (
        until(lambda n=node: run.pids(HOST, n), f"a window host of {node}", EVENT_S)[0] for node in (source, holder)
    )

    def steps(arena: Arena, area: int, *states: State) -> set[int]:
        records = [arena.record(area, half) for half in (0, 1)]
        return {record.step for record in records if record.state in states}

    os.kill(reader, signal.SIGSTOP)
    until(lambda: steps(arenas[0], OWN, State.SEALED) - steps(arenas[1], 1, State.SEALED), "a seal", EVENT_S)
    os.kill(read_from, signal.SIGSTOP)
    os.kill(reader, signal.SIGCONT)
    until(lambda: steps(arenas[1], 1, State.WRITING), f"a pull of {holder} from {source}", EVENT_S)
    return read_from


def stop_with_all_sealed(run: Run, *nodes: str) -> None:
    """Stop the worker of the first node, and wait until all that the arenas of these nodes hold is sealed."""
    arenas = [Arena.open(run.paths.arena(node)) for node in nodes]
    (pid,) = run.pids(WORKER, nodes[0])

    def between_snapshots() -> bool:
        os.kill(pid, signal.SIGSTOP)
        if all(arenas[0].record(OWN, half).state is not State.WRITING for half in (0, 1)):
            return True
        os.kill(pid, signal.SIGCONT)
        return False

    def sealed() -> bool:
        places = [(arena, area, half) for arena in arenas for area in range(arena.geometry.areas) for half in (0, 1)]
        return all(arena.record(area, half).state is State.SEALED for arena, area, half in places)

    until(between_snapshots, f"the worker of {nodes[0]} between two snapshots", EVENT_S)
    until(sealed, f"the snapshots on {nodes} to be sealed", EVENT_S)


# --- the worker ---------------------------------------------------------------------------------------

ONCE = """
import os
import signal
from dataclasses import replace
from pathlib import Path


def first(name):
    try:
        os.close(os.open(name, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def add_to(training):
    def batch(step, rank, micro_step):
        if (step, rank) == (10, 1) and first("raised"):
            raise ValueError("a hole in the data")
        if (step, rank) == (30, 0) and first("memory"):
            Path("greedy").write_text(str(os.getpid()))
            while not Path("limited").exists():
                pass
            hoard = []
            while True:
                hoard.append(bytearray(os.urandom(1 << 20)))
        return training.batch(step, rank, micro_step)

    def loss(engine, pair):
        value = training.loss(engine, pair)
        step = engine.global_steps + 1
        if (step, engine.global_rank) == (20, 2) and first("not a number"):
            return value * float("nan")
        return value

    return replace(training, batch=batch, loss=loss)
"""

MEMORY_LEFT = 64 << 20
"""Between what the greedy worker has, and what it may have."""


def test_the_users_code_raises_once_is_nan_once_and_eats_all_memory_once(
    tmp_path: Path, matrix: Matrix, references: References
) -> None:
    """Each costs the worker concerned, which is started again; the step with the NaN is taken back."""
    with start(tmp_path, "protect.mode=blocking", trouble=ONCE) as run:
        greedy = tmp_path / "greedy"
        until(lambda: greedy.exists() and greedy.read_text(), "step 30", START_S)
        with memory_limited(int(greedy.read_text())) as means:
            (tmp_path / "limited").touch()
            killed = run.wait_for("evict", target="node0", rank=0)
        run.wait_for_end()
        assert_identical(run, references(3, STEPS))
        exception, nan, memory = recovered(run)
        reasons = [event["reason"] for event in run.events("evict")]
        assert "ValueError: a hole in the data" in reasons[0]
        assert "NotFinite: the loss is nan in step 20 (rank 2)" in reasons[1]
        assert "SIGKILL" in killed["reason"] or "MemoryError" in killed["reason"] or "SIGABRT" in killed["reason"]
        for item, target in ((exception, "node1"), (nan, "node2"), (memory, "node0")):
            assert (item.targets, item.rung, item.tier) == ((target,), "restart", "local")
        since = {name: (tmp_path / name).stat().st_mtime for name in ("raised", "not a number", "limited")}
        matrix.enter_recovery("an exception in the user's code", exception, since["raised"])
        matrix.enter_recovery("a loss that is NaN", nan, since["not a number"])
        matrix.enter_recovery(f"out of memory ({means})", memory, since["limited"])


@contextmanager
def memory_limited(pid: int) -> Iterator[str]:
    """Let process `pid` have little more memory than it has: by a control group, or else by its own limit."""
    group = Path("/sys/fs/cgroup/memory", f"gemini-faults-{os.getpid()}")
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(MEMORY_LEFT))
        (group / "cgroup.procs").write_text(str(pid))
    except OSError:
        import resource

        pages = int(Path("/proc", str(pid), "statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + MEMORY_LEFT
        resource.prlimit(pid, resource.RLIMIT_AS, (limit, limit))
        yield "RLIMIT_AS"
        return
    try:
        yield "killed by the kernel"
    finally:
        until(lambda: not (group / "cgroup.procs").read_text(), "the end of the greedy process", EVENT_S)
        group.rmdir()


ALWAYS_NAN = """
from dataclasses import replace


def add_to(training):
    def loss(engine, pair):
        value = training.loss(engine, pair)
        return value * float("nan") if (engine.global_steps, engine.global_rank) == (9, 1) else value

    return replace(training, loss=loss)
"""


def test_a_training_that_diverges_is_stopped(tmp_path: Path, matrix: Matrix) -> None:
    with start(tmp_path, "protect.mode=blocking", trouble=ALWAYS_NAN) as run:
        run.wait_for_end(1)
        (first, *_) = run.events("evict")
        assert "the loss is nan in step 10 (rank 1); the step is taken back" in first["reason"]
        reason = run.status["reason"]
        assert "the training diverges: " in reason and "not finite in step 10" in reason.replace("nan", "not finite")
        assert "train.allow_nan=true" in reason
        assert max(event["step"] for event in run.events("persisted")) == 9
        took = 1000 * (run.events("run")[-1]["t"] - first["t"])
        matrix.enter("a loss that is NaN again and again", "saved, stopped", None, took, STOPPED)


ALWAYS_RAISES = """
from dataclasses import replace


def add_to(training):
    def batch(step, rank, micro_step):
        if step == 20:
            raise ValueError("a hole in the data")
        return training.batch(step, rank, micro_step)

    return replace(training, batch=batch)
"""


@pytest.mark.long
def test_an_exception_on_every_rank_again_and_again_costs_no_step(tmp_path: Path, matrix: Matrix) -> None:
    """No node is to blame: none is lost, and what they have in memory is saved."""
    with start(tmp_path, "protect.persist_every=1000", "recovery.max_restarts=1", trouble=ALWAYS_RAISES) as run:
        run.wait_for_end(1)
        assert run.status["state"] == "stopped"
        assert "failed 2 times in a row: ValueError: a hole in the data" in run.status["reason"]
        assert [event["step"] for event in run.events("persisted")] == [max(e["step"] for e in run.events("safe"))]
        assert run.events("persisted")[0]["step"] >= 18
        took = 1000 * (run.events("run")[-1]["t"] - run.events("suspect")[0]["t"])
        matrix.enter("an exception on every rank again and again", "saved, stopped", None, took, STOPPED)


@pytest.mark.long
def test_a_diverging_training_goes_on_when_it_may(tmp_path: Path) -> None:
    with start(tmp_path, "train.allow_nan=true", trouble=ALWAYS_NAN, steps=20) as run:
        run.wait_for_end()
        assert not run.events("evict")
        assert str(run.events("step", rank=1, step=10)[0]["loss"]) == "nan"


@pytest.mark.long
def test_a_worker_is_stopped(tmp_path: Path, matrix: Matrix, references: References) -> None:
    with start(tmp_path) as run:
        run.wait_for_training(step=4)
        faults.stop_worker(run.paths, "node1")
        run.wait_for_end()
        assert_identical(run, references(3, STEPS))
        (item,) = recovered(run)
        assert (item.targets, item.rung, item.tier) == (("node1",), "restart", "local")
        detected = item.ms("detected")
        assert detected is not None and detected < 2500
        matrix.enter_recovery("worker SIGSTOP", item)


# --- window hosts and archivers -----------------------------------------------------------------------


@pytest.mark.long
def test_window_hosts_die_at_any_moment(tmp_path: Path, matrix: Matrix, references: References) -> None:
    """Nothing is lost: a new MPI world over the same arenas, and nobody leaves his generation."""
    with start(tmp_path, steps=LONG_STEPS) as run:
        run.wait_for_training(step=4)
        world = 1
        rows: list[tuple[str, float, float]] = []
        for number in (signal.SIGKILL, signal.SIGSEGV):
            for moment in ("idle", "serving", "pulling"):
                stopped = stop_amid_pull(run, "node0", "node1") if moment != "idle" else 0
                struck = run.kill(HOST, "node0" if moment == "serving" else "node1", number)
                if stopped:
                    os.kill(stopped, signal.SIGCONT)
                lost = run.wait_for("host_lost", since=struck)
                world += 1
                ready = run.wait_for("world", state="ready", since=struck)
                assert ready["number"] == world
                run.note_mpi_files()
                run.wait_for("safe", since=ready["t"])
                fault = f"window host {signal.Signals(number).name} while {moment}"
                rows.append((fault, ms_since(struck, lost), ms_since(struck, ready)))
        run.wait_for_end()
        assert_identical(run, references(3, LONG_STEPS))
        assert len(run.events("plan")) == 1
        for fault, lost_ms, ready_ms in rows:
            matrix.enter(fault, "new MPI world", lost_ms, ready_ms)


@pytest.mark.long
def test_an_archiver_hangs_a_node_is_slow_and_the_idle_spare_is_lost(
    tmp_path: Path, matrix: Matrix, references: References
) -> None:
    """None of them costs a step."""
    with start(tmp_path, "recovery.archive_s=2", "protect.persist_every=20", steps=FAIR_STEPS) as run:
        run.wait_for_training(step=4)
        struck = run.kill(ARCHIVER, "node1", signal.SIGSTOP)
        failed = run.wait_for("persist_failed", since=struck)
        assert "no answer within 2 s" in failed["reason"]
        persisted = run.wait_for("persisted", since=failed["t"])
        times = ms_since(struck, failed), ms_since(struck, persisted)

        faults.slow(run.paths, "node1")
        assert not run.events("suspect", target="node1")

        faults.kill_node(run.paths, "node3")
        run.wait_for("evict", target="node3")
        (lost,) = recoveries(run.events())
        assert lost.outcome == "spare lost"

        run.wait_for_end()
        assert_identical(run, references(3, FAIR_STEPS))
        assert len(run.events("plan")) == 1
        matrix.enter("archiver stopped, and ordered to write", "killed, started again", *times)
        matrix.enter(f"node at a tenth of its speed for {faults.SLOW_S:.0f} s", "none", None, None)
        matrix.enter("spare lost while idle", "none", lost.ms("detected"), None)


# --- nodes --------------------------------------------------------------------------------------------


@pytest.mark.long
def test_an_agent_is_killed(tmp_path: Path, matrix: Matrix, references: References) -> None:
    with start(tmp_path) as run:
        run.wait_for_training(step=4)
        struck = run.kill(AGENT, "node1")
        run.wait_for_end()
        assert_identical(run, references(3, STEPS))
        (item,) = recovered(run)
        assert (item.targets, item.rung, item.tier) == (("node1",), "hot_swap", "peer")
        matrix.enter_recovery("agent SIGKILL", item, struck)


@pytest.mark.parametrize("what", ["cut", pytest.param("stop", marks=pytest.mark.long)])
def test_a_node_falls_silent(what: str, tmp_path: Path, matrix: Matrix, references: References) -> None:
    """No connection breaks, nobody is told: found by its silence. When it speaks again it learns that it is out."""
    with start(tmp_path) as run:
        run.wait_for_training(step=4)
        {"cut": faults.cut, "stop": faults.stop}[what](run.paths, "node1")
        run.wait_for("first_step", generation=run.generation(2))
        assert run.pids(AGENT, "node1")
        faults.go_on(run.paths, "node1")
        until(lambda: not run.pids(node="node1"), "node1 to leave by itself", GONE_S)
        assert not run.ended()
        run.wait_for_end()
        assert_identical(run, references(3, STEPS))
        (item,) = recovered(run)
        assert (item.targets, item.rung, item.tier) == (("node1",), "hot_swap", "peer")
        fault = {"cut": "control connection cut without a reset", "stop": "node hangs (all SIGSTOP)"}[what]
        detected = item.ms("detected")
        assert detected is not None and detected < 1500
        matrix.enter_recovery(fault, item)


def test_connections_break_and_are_made_anew(tmp_path: Path, matrix: Matrix, references: References) -> None:
    """Those of a node, and those of the coordinator, which takes all the others for suspects at once."""
    with start(tmp_path) as run:
        run.wait_for_training(step=4)
        leader = run.events("coordinator")[-1]["target"]
        for node in ("node1", leader, "node3"):
            done = call("drill", str(run.run_dir), "break", node)
            assert done.returncode == 0, done.stderr
            broken = run.events("drill", action="break", target=node)[-1]
            assert broken["connections"] > 0
            suspect = run.wait_for("suspect", evidence="connection", since=broken["t"] - 1.0)
            run.wait_for("cleared", target=suspect["target"], since=suspect["t"])
        run.wait_for_end()
        assert_identical(run, references(3, STEPS))
        assert not run.events("evict") and len(run.events("plan")) == 1
        matrix.enter("connections of agents broken, three times", "none", None, None)


@pytest.mark.long
def test_a_worker_then_its_node_are_killed_amid_replication(
    tmp_path: Path, matrix: Matrix, references: References
) -> None:
    """While its partner reads the newest snapshot: the older one is safe, and nothing is read of the torn one."""
    with start(tmp_path) as run:
        run.wait_for_training(step=4)
        stopped = stop_amid_pull(run, "node1", "node2")
        faults.kill_worker(run.paths, "node1")
        os.kill(stopped, signal.SIGCONT)
        run.wait_for("first_step", generation=run.generation(2))
        stop_amid_pull(run, "node1", "node2")
        faults.kill_node(run.paths, "node1")
        run.wait_for_end()
        assert_identical(run, references(3, STEPS))
        worker, node = recovered(run)
        assert (worker.targets, worker.rung, worker.tier) == (("node1",), "restart", "local")
        assert (node.targets, node.rung, node.tier) == (("node1",), "hot_swap", "peer")
        for item, fault in ((worker, "worker"), (node, "node")):
            matrix.enter_recovery(f"{fault} SIGKILL amid the replication of its snapshot", item)


@pytest.mark.long
def test_two_nodes_of_different_groups(tmp_path: Path, matrix: Matrix, references: References) -> None:
    with start(tmp_path, nodes=4, spares=2) as run:
        run.wait_for_training(step=4)
        for node in ("node1", "node2"):
            faults.kill_node(run.paths, node)
        run.wait_for_end()
        assert_identical(run, references(4, STEPS))
        (item,) = recovered(run)
        assert (set(item.targets), item.rung, item.tier) == ({"node1", "node2"}, "hot_swap", "peer")
        matrix.enter_recovery("two nodes of different groups at once", item)


@pytest.mark.long
def test_two_nodes_of_one_group(tmp_path: Path, matrix: Matrix, references: References) -> None:
    with start(tmp_path, "protect.persist_every=10", nodes=4, spares=2) as run:
        persisted = run.wait_for("persisted", START_S)
        for node in ("node2", "node3"):
            faults.kill_node(run.paths, node)
        run.wait_for_end()
        assert_identical(run, references(4, STEPS))
        (item,) = recovered(run)
        assert (set(item.targets), item.rung, item.tier) == ({"node2", "node3"}, "hot_swap", "persistent")
        assert item.step is not None and item.step >= persisted["step"]
        matrix.enter_recovery("two nodes of one group at once", item)


# --- failures during a recovery -----------------------------------------------------------------------


@pytest.mark.long
def test_the_spare_is_lost_while_it_fetches(tmp_path: Path, matrix: Matrix, references: References) -> None:
    with start(tmp_path, spares=2) as run:
        run.wait_for_training(step=4)
        with host_stopped(run, "node2"):  # it holds rank 1's replica: the fetch cannot end
            faults.kill_node(run.paths, "node1")
            run.wait_for("fetch_started", rank=1, source="node2")
            spare = run.wait_for("promote", rank=1, generation=run.generation(2))["target"]
            faults.kill_node(run.paths, spare)
            run.wait_for("evict", target=spare)
        run.wait_for_end()
        assert_identical(run, references(3, STEPS))
        (item,) = recovered(run)
        assert (set(item.targets), item.tier) == ({"node1", spare}, "peer")
        assert len(item.generations) == 2
        matrix.enter_recovery("spare lost while fetching", item)


def test_a_worker_is_lost_in_the_middle_of_a_recovery(tmp_path: Path, matrix: Matrix, references: References) -> None:
    with start(tmp_path) as run:
        run.wait_for_training(step=4)
        with host_stopped(run, "node2"):
            faults.kill_node(run.paths, "node1")
            run.wait_for("fetch_started", rank=1, source="node2")
            faults.kill_worker(run.paths, "node0")
            run.wait_for("evict", target="node0", rank=0)
        run.wait_for_end()
        assert_identical(run, references(3, STEPS))
        (item,) = recovered(run)
        assert (set(item.targets), item.rung, item.tier) == ({"node1", "node0"}, "restart", "peer")
        matrix.enter_recovery("a survivor's worker in the middle of a recovery", item)


@pytest.mark.long
def test_another_node_is_lost_in_the_middle_of_a_recovery(
    tmp_path: Path, matrix: Matrix, references: References
) -> None:
    with start(tmp_path, nodes=4, spares=2) as run:
        run.wait_for_training(step=4)
        with host_stopped(run, "node0"):  # groups are 0 and 1, 2 and 3
            faults.kill_node(run.paths, "node1")
            run.wait_for("fetch_started", rank=1, source="node0")
            faults.kill_node(run.paths, "node3")
            run.wait_for("evict", target="node3")
        run.wait_for_end()
        assert_identical(run, references(4, STEPS))
        (item,) = recovered(run)
        assert (set(item.targets), item.rung, item.tier) == ({"node1", "node3"}, "hot_swap", "peer")
        matrix.enter_recovery("a second node in the middle of a recovery", item)


# --- damaged bytes ------------------------------------------------------------------------------------


def test_a_bit_of_a_nodes_own_snapshot_flips(tmp_path: Path, matrix: Matrix, references: References) -> None:
    """Found when the snapshot is restored; the copy of the partner is used."""
    with start(tmp_path) as run:
        run.wait_for_training(step=4)
        stop_with_all_sealed(run, "node1")
        faults.corrupt(run.paths, "node1")
        faults.kill_worker(run.paths, "node1")
        run.wait_for_end()
        assert_identical(run, references(3, STEPS))
        (item,) = recovered(run)
        assert item.tier == "peer"
        assert any("checksum" in event.get("reason", "") for event in run.events())
        matrix.enter_recovery("a bit flipped in a node's own snapshot", item)


@pytest.mark.long
def test_a_bit_of_a_replica_flips(tmp_path: Path, matrix: Matrix, references: References) -> None:
    """Of three copies one is lost with its owner and one is damaged: the third is used."""
    with start(tmp_path, "protect.replicas=3") as run:
        run.wait_for_training(step=4)
        stop_with_all_sealed(run, "node1", "node0", "node2")
        faults.corrupt_replica(run.paths, "node0")  # the one that would be asked first
        faults.kill_node(run.paths, "node1")
        run.wait_for_end()
        assert_identical(run, references(3, STEPS))
        (item,) = recovered(run)
        assert (item.targets, item.rung, item.tier) == (("node1",), "hot_swap", "peer")
        assert run.events("copy_failed", rank=1, reason="checksum")
        assert run.events("fetched", rank=1)[0]["source"] == "node2"
        matrix.enter_recovery("a bit flipped in a replica", item)


@pytest.mark.long
def test_a_bit_of_a_checkpoint_flips(tmp_path: Path, matrix: Matrix, references: References) -> None:
    """All of a group is lost, and of the newest checkpoint a file is damaged: the one before is used."""
    with start(tmp_path, "protect.persist_every=20", nodes=4, spares=2) as run:
        first = run.wait_for("persisted", START_S)
        run.wait_for("persisted", at_least=first["step"] + 1)
        faults.corrupt_file(run.paths, "node2")
        newest = manifest.newest(run.run_dir)
        for node in ("node2", "node3"):
            faults.kill_node(run.paths, node)
        run.wait_for_end()
        assert_identical(run, references(4, STEPS))
        (item,) = recovered(run)
        assert item.tier == "persistent"
        assert newest is not None and item.step is not None and item.step < newest.step
        assert any("checksum" in event["reason"] for event in run.events("copy_failed"))
        matrix.enter_recovery("a bit flipped in an HDF5 file", item)


# --- what stays broken --------------------------------------------------------------------------------


@pytest.mark.long
def test_an_archiver_that_cannot_write(tmp_path: Path, matrix: Matrix, references: References) -> None:
    """What its node has of its own is written by the partner, and the run ends with its last step on disk."""
    with start(tmp_path, "protect.persist_every=10") as run:
        run.wait_for_training(step=4)
        (archiver,) = until(lambda: run.pids(ARCHIVER, "node1"), "an archiver", EVENT_S)
        resource.prlimit(archiver, resource.RLIMIT_FSIZE, (1000, 1000))
        run.wait_for_end()
        assert_identical(run, references(3, STEPS))
        newest = manifest.newest(run.run_dir)
        assert newest is not None and newest.step == STEPS
        assert {event["target"] for event in run.events("persist_failed")} == {"node1"}
        matrix.enter("an archiver that cannot write any more", "none: the partner writes", None, None)


@contextmanager
def no_host(run: Run, node: str) -> Iterator[None]:
    """Kill every window host of a node as soon as it is there."""
    over = threading.Event()

    def kill_all() -> None:
        while not over.wait(0.02):
            for pid in run.pids(HOST, node):
                faults.kill(pid, signal.SIGKILL)

    killer = threading.Thread(target=kill_all)
    killer.start()
    try:
        yield
    finally:
        over.set()
        killer.join()


@pytest.mark.long
def test_no_window_host_starts_on_a_node_any_more(tmp_path: Path, matrix: Matrix, references: References) -> None:
    """A spare takes its rank; all is protected again, so that another node may be lost."""
    settings = ("protect.persist_every=1000", "recovery.fetch_s=2", "recovery.world_s=5")
    with start(tmp_path, *settings, spares=2, steps=LONG_STEPS) as run:
        run.wait_for_training(step=4)
        struck = time.time()
        with no_host(run, "node1"):
            found = run.wait_for("no_host", target="node1")
            run.wait_for("protected", since=found["t"])
            run.wait_for("first_step", generation=run.generation(2))
            assert "node1" not in {move["node"] for move in run.events("plan")[-1]["moves"]}
            faults.kill_node(run.paths, "node2")
            run.wait_for_end()
        assert_identical(run, references(3, LONG_STEPS))
        assert {event["target"] for event in run.events("no_host")} == {"node1"}
        moved, lost = recovered(run)
        assert lost.tier == "peer"
        matrix.enter_recovery("no window host starts on a node any more", moved, struck)
        matrix.enter_recovery("another node lost after that", lost)


@pytest.mark.long
def test_no_window_host_starts_on_two_nodes(tmp_path: Path, matrix: Matrix, references: References) -> None:
    """Nothing can be replicated, and status says so; checkpoints take the place of replicas, and a node may be lost."""
    settings = ("protect.persist_every=1000", "recovery.fetch_s=2", "recovery.world_s=5")
    with start(tmp_path, *settings, steps=LONG_STEPS) as run:
        run.wait_for_training(step=4)
        with no_host(run, "node1"), no_host(run, "node3"):
            run.wait_for("unprotected")
            until(lambda: not run.status["protected"], "status to say so", EVENT_S)
            run.wait_for("persisted", at_least=20)
            faults.kill_node(run.paths, "node2")
            run.wait_for("first_step", generation=run.generation(2))
        run.wait_for("protected", generation=run.generation(2))
        run.wait_for_end()
        assert_identical(run, references(3, LONG_STEPS))
        (item,) = recovered(run)
        assert (item.rung, item.tier) == ("hot_swap", "persistent")
        matrix.enter_recovery("a node lost while no window host starts on two others", item)


@pytest.mark.long
@pytest.mark.parametrize("replicas", [1, 2])
def test_a_window_host_hangs_and_no_step_may_be_lost(
    tmp_path: Path, matrix: Matrix, references: References, replicas: int
) -> None:
    """With protect.mode=blocking all wait until it is found out; no worker is to blame."""
    settings = ("protect.mode=blocking", f"protect.replicas={replicas}", "recovery.fetch_s=3")
    with start(tmp_path, *settings) as run:
        run.wait_for_training(step=4)
        struck = time.time()
        with host_stopped(run, "node1"):
            run.wait_for("host_lost", target="node1")
            found = run.wait_for("world", since=struck, state="ready")
        run.wait_for_end()
        assert_identical(run, references(3, STEPS))
        assert not run.events("abort")
        gaps = [b["t"] - a["t"] for a, b in pairwise(run.events("step", rank=0))]
        fault = f"a window host SIGSTOP, every step to be safe, {replicas} copies"
        matrix.enter(fault, "another MPI world", ms_since(struck, found), 1000 * max(gaps))


# --- memory -------------------------------------------------------------------------------------------


@pytest.mark.long
def test_an_arena_is_deleted(tmp_path: Path, matrix: Matrix, references: References) -> None:
    """Nobody new can reach what is in it: with the next failure of its worker the node gives up its rank."""
    with start(tmp_path) as run:
        run.wait_for_training(step=4)
        run.paths.arena("node1").unlink()
        faults.kill_worker(run.paths, "node1")
        run.wait_for_end()
        assert_identical(run, references(3, STEPS))
        (item,) = recovered(run)
        assert (item.targets, item.tier) == (("node1",), "peer")
        matrix.enter_recovery("the file of an arena deleted", item)


@pytest.fixture
def small_memory() -> Iterator[Path]:
    """A memory file system of its own, 64 MiB; it takes the right to mount one."""
    with TemporaryDirectory(prefix="gf", dir="/tmp") as place:  # short: there will be sockets in it
        mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "gemini-faults", place]
        if subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("this user may not mount a memory file system")
        try:
            yield Path(place)
        finally:
            subprocess.run(["umount", place], check=True)


def fill(place: Path, but: int = 0) -> None:
    """Leave no room there, or that for so many bytes."""
    with (place / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while shutil.disk_usage(place).free > but:
            file.write(bytes(1 << 16))


@pytest.mark.long
def test_the_memory_file_system_is_full(
    small_memory: Path, tmp_path: Path, matrix: Matrix, references: References
) -> None:
    """In the middle of a run it takes nothing from anybody; before there are arenas whoever has none does not train."""
    with start(tmp_path / "later", f"site.shm_dir={small_memory}", shm=small_memory) as run:
        run.wait_for_training(step=4)
        fill(small_memory)
        faults.kill_worker(run.paths, "node0")
        run.wait_for("first_step", generation=run.generation(2))
        faults.kill_node(run.paths, "node1")
        arena = run.paths.arena("node0").stat().st_size
        run.wait_for_end()
        assert_identical(run, references(3, STEPS))
        for item, fault in zip(recovered(run), ("worker SIGKILL", "node lost"), strict=True):
            matrix.enter_recovery(f"{fault}, the memory file system full", item)
    (small_memory / "filler").unlink()
    fill(small_memory, but=7 * arena // 2)
    with start(tmp_path / "narrow", f"site.shm_dir={small_memory}", shm=small_memory) as run:
        run.wait_for_end()
        assert_identical(run, references(3, STEPS))
        (failed,) = run.events("no_worker")
        assert "no room for" in failed["reason"]
        took = ms_since(run.events("run")[0]["t"], run.events("first_step")[0])
        matrix.enter("no room for the arena of one node at the start", "the others train", None, took)
    (small_memory / "filler").unlink()
    with start(tmp_path / "first", f"site.shm_dir={small_memory}", shm=small_memory) as run:
        fill(small_memory)
        run.wait_for_end(1)
        assert "no room for" in run.status["reason"], run.status
        times = ms_since(run.events("run")[0]["t"], run.events("run")[-1])
        matrix.enter("the memory file system full at the start", "stopped", None, times, STOPPED)


TALKS = """
from dataclasses import replace


def add_to(training):
    def batch(step, rank, micro_step):
        print(f"step {step}", "and more than a line of it" * 10)
        return training.batch(step, rank, micro_step)

    return replace(training, batch=batch)
"""
"""Prints in every step, as trainings do."""

FULL_S = 5.0


@pytest.mark.long
def test_the_run_directory_is_full(small_memory: Path, tmp_path: Path, matrix: Matrix, references: References) -> None:
    """What is printed or noted is lost, and no checkpoint is written; but training goes on, and saves its last step."""
    (tmp_path / "runs").symlink_to(small_memory)
    with start(tmp_path, "protect.persist_every=20", trouble=TALKS, steps=LONG_STEPS) as run:
        run.wait_for("persisted")
        workers, filled = run.pids(WORKER), time.time()
        fill(small_memory)
        time.sleep(FULL_S)
        (small_memory / "filler").unlink()
        written = run.wait_for("persisted", since=filled + FULL_S)
        assert written["step"] < LONG_STEPS, "not long enough to see anything"
        assert run.pids(WORKER) == workers
        run.wait_for_end()
        assert run.status["state"] == "finished", run.status
        reference = references(3, LONG_STEPS)
        assert all(bits == {reference[key]} for key, bits in run.losses().items())
        assert not run.events("abort") and not run.events("evict")
        matrix.enter("the run directory full, and a training that prints", "training goes on", None, None)


# --- one after another --------------------------------------------------------------------------------

KILLS = 50


def usage(pid: int) -> tuple[float, int, int]:
    """Memory in MB, descriptors and threads of a process."""
    status = Path("/proc", str(pid), "status").read_text()
    values = dict(line.split(":", 1) for line in status.splitlines())
    memory = int(values["VmRSS"].split()[0]) / 1e3
    return memory, len(os.listdir(f"/proc/{pid}/fd")), int(values["Threads"])


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_fifty_kills_in_a_row(tmp_path: Path, matrix: Matrix, references: References) -> None:
    """As soon as all ranks have done a step again: memory, descriptors and threads of the survivors stay flat."""
    with start(tmp_path, steps=FAIR_STEPS) as run:
        run.wait_for_training(step=4)
        survivors = {f"agent of node{i}": run.pids(AGENT, f"node{i}")[0] for i in range(4)}
        survivors["worker of node0"] = run.pids(WORKER, "node0")[0]
        before: dict[str, tuple[float, int, int]] = {}
        for kill in range(KILLS):
            if kill == KILLS // 5:  # what is only needed once has been made by then
                before = {name: usage(pid) for name, pid in survivors.items()}
            faults.kill_worker(run.paths, f"node{1 + kill % 2}")
            run.wait_for("first_step", generation=run.generation(2 + kill))
        after = {name: usage(pid) for name, pid in survivors.items()}
        run.wait_for_end()
        assert_identical(run, references(3, FAIR_STEPS))
        items = recovered(run)
        assert len(items) == KILLS
        assert {item.rung for item in items} == {"restart"}
        for name, (memory, *counts) in before.items():
            matrix.notes.append(f"after {KILLS // 5} and after {KILLS} kills, {name}: {before[name]} {after[name]}")
            assert after[name][0] < 1.05 * memory + 2, matrix.notes[-1]
            assert all(late <= early + 1 for early, late in zip(counts, after[name][1:], strict=True)), matrix.notes[-1]
        slowest = max(items, key=lambda item: item.ms("first step") or 0.0)
        matrix.enter_recovery(f"{KILLS} workers SIGKILL, one after another (the slowest)", slowest)


@pytest.mark.long
def test_every_node_is_lost_in_turn_and_comes_back(tmp_path: Path, matrix: Matrix, references: References) -> None:
    """Twice: when none is left of those who voted, those elect who are back. The persistent tier is never needed."""
    rounds, nodes = 2, [f"node{i}" for i in range(4)]
    with start(tmp_path, "site.return_s=0.2", "protect.persist_every=1000", steps=LONG_STEPS) as run:
        run.wait_for_training(step=4)
        for node in rounds * nodes:
            struck = time.time()
            faults.kill_node(run.paths, node)
            back = run.wait_for(
                "memory", since=struck, node=node
            )  # its arena is there, and a worker that can take a rank
            run.wait_for("safe", since=back["t"])
        run.wait_for_end()
        assert_identical(run, references(3, LONG_STEPS))
        items = recovered(run)
        assert {item.tier for item in items} <= {"local", "peer"}
        slowest = max(items, key=lambda item: item.ms("first step") or 0.0)
        matrix.enter_recovery(f"every node, one after another, {rounds} times (the slowest)", slowest)


@pytest.mark.long
def test_a_loop_of_drills(tmp_path: Path, matrix: Matrix, references: References) -> None:
    """Workers and nodes die at random moments, on average every three seconds, until the run ends."""
    with start(tmp_path, nodes=4, spares=3) as run:
        run.wait_for_training(step=2)
        answer = call("drill", str(run.run_dir), "loop", "--mtbf", "3", "--seed", "7")
        assert answer.returncode == 0 and "the run is over" in answer.stdout, answer
        run.wait_for_end()
        assert_identical(run, references(4, STEPS))
        items = recovered(run)
        assert items
        matrix.enter_recovery(f"drill loop: {len(run.events('fault'))} failures at random (the last)", items[-1])
