"""Real runs lose workers and nodes by SIGKILL at chosen moments, and come to the same losses to the last bit."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from gemini_hpc.analysis import timeline
from tests.cluster.matrix import STOPPED, Matrix
from tests.cluster.runs import Run, drill, drills, reference_losses

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]

STEPS = 24
THREE = ("cluster.nodes=3", f"train.steps={STEPS}", "protect.mode=blocking")  # safe from the first step on
NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "01_run_report.ipynb"

Reference = Mapping[tuple[int, int], bytes]


@pytest.fixture(scope="module")
def workers_lost(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Three nodes; a worker is lost in every phase of a step. Its reference serves the tests with three nodes."""
    struck = [
        drill(4, 0, phase="forward"),
        drill(8, 1, phase="optimizer"),
        drill(12, 2, phase="snapshot"),
        drill(16, 0, phase="after"),
        drill(20, 1, phase="backward"),
        drill(22, 2, phase="replication"),
    ]
    with Run(tmp_path_factory.mktemp("workers"), *THREE, drills(struck)) as run:
        run.wait_for_end(timeout_s=300)
        yield run


@pytest.fixture(scope="module")
def reference(workers_lost: Run) -> Reference:
    found = reference_losses(workers_lost.run_dir)
    assert len(found) == 3 * STEPS
    return found


@pytest.mark.faults
def test_lost_workers_come_back_on_their_nodes(workers_lost: Run, reference: Reference, matrix: Matrix) -> None:
    """In each of the six phases, from the node's own memory; the spare is not touched."""
    workers_lost.assert_identical_to(reference)
    assert workers_lost.status["verdict"].startswith("all ")
    assert [fault["phase"] for fault in workers_lost.events("fault")] == [
        "forward", "optimizer", "snapshot", "after", "backward", "replication",
    ]  # fmt: skip
    found = timeline.recoveries(workers_lost.events())
    assert [item.targets for item in found] == [
        ("node0",), ("node1",), ("node2",), ("node0",), ("node1",), ("node2",),
    ]  # fmt: skip
    assert all(item.outcome == "recovered" and item.rung == "restart" for item in found)
    assert {item.tier for item in found} == {"local"}
    assert {item.replayed for item in found} == {0}  # protect.mode=blocking: also when it is lost right after a step
    assert not workers_lost.events("promote", target="node3")
    (spare,) = [node for node in workers_lost.status["nodes"] if node["node"] == "node3"]
    assert spare["status"] == "spare"
    for item, fault in zip(found, workers_lost.events("fault"), strict=True):
        matrix.enter_recovery(f"worker SIGKILL, {fault['phase']}", item)


@pytest.mark.faults
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_lost_node_is_replaced_by_the_spare(
    precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, matrix: Matrix
) -> None:
    """The main job: hot swap, from peer memory, with a report; bf16 with two micro-batches a step."""
    accumulated = ["train.grad_accum=2", f"train.precision={precision}"] if precision == "bf16" else []
    place = tmp_path / "a place"
    place.mkdir()
    with Run(place, "train.steps=30", *accumulated) as run:
        run.wait_for_end(timeout_s=300)
        reference = reference_losses(run.run_dir)
        assert len(reference) == 4 * 30
        run.assert_identical_to(reference)
        assert "to the last bit" in run.status["verdict"]
        (fault,) = run.events("fault")
        assert (fault["action"], fault["target"], fault["step"]) == ("kill_node", "node2", 15)
        (found,) = timeline.recoveries(run.events())
        assert (found.outcome, found.rung, found.tier, found.targets) == ("recovered", "hot_swap", "peer", ("node2",))
        reached = [found.ms(name) for name in timeline.MILESTONES[:-1]]
        assert None not in reached and reached == sorted(ms for ms in reached if ms is not None)
        assert found.ms("protected") is not None
        holders = {node["node"]: node["rank"] for node in run.status["nodes"]}
        assert holders == {"node0": 0, "node1": 1, "node2": None, "node3": 3, "node4": 2}
        assert run.paths.report.stat().st_size > 10_000
        assert "proof" in run.text and "recovery 1" in run.text
        matrix.enter_recovery(f"node SIGKILL in the middle of a step, {precision}", found)
        if precision == "fp32":
            monkeypatch.setenv("GEMINI_RUN_DIR", str(run.run_dir))
            notebook = nbformat.read(NOTEBOOK, as_version=4)
            NotebookClient(notebook, timeout=60, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()


@pytest.mark.faults
def test_the_rebuild_rung_gives_the_same_losses(tmp_path: Path, reference: Reference, matrix: Matrix) -> None:
    """Survivors build their engines anew when they are told not to swap."""
    struck = drills([drill(10, 1, "kill_node")])
    with Run(tmp_path, *THREE, struck, "recovery.first_rung=rebuild", "verify=false") as run:
        run.wait_for_end(timeout_s=300)
        run.assert_identical_to(reference)
        generation = max(event["generation"] for event in run.events("plan"))
        rungs = {event["target"]: event["rung"] for event in run.events("resumed", generation=generation)}
        assert rungs.keys() == {"node0", "node2", "node3"}
        assert set(rungs.values()) == {"rebuild"}  # the spare's engine, too: it was built as another rank
        matrix.enter_recovery("node SIGKILL, no hot swap allowed", timeline.recoveries(run.events())[0])


@pytest.mark.faults
def test_out_of_spares_the_newest_step_is_saved_and_the_run_goes_on_later(
    tmp_path: Path, reference: Reference, matrix: Matrix
) -> None:
    struck = drills([drill(6, 1, "kill_node"), drill(12, 2, "kill_node", "forward")])
    with Run(tmp_path, *THREE, struck, "verify=false", "protect.persist_every=100") as run:
        run.wait_for_end(status=1)
        assert run.status["state"] == "suspended" and "no node is left" in run.status["reason"]
        (saved,) = run.events("persisted")
        done = min(max(e["step"] for e in run.events("step", rank=rank)) for rank in range(3))
        assert done - 1 <= saved["step"] <= done
        run.assert_nothing_is_left()
        with Run(tmp_path, resume=run.run_dir) as resumed:
            resumed.wait_for_end()
            resumed.assert_identical_to(reference)
            assert resumed.events("plan")[-1]["step"] == saved["step"]
            assert {move["tier"] for move in resumed.events("plan")[-1]["moves"]} == {"persistent"}
            assert resumed.status["state"] == "finished"
        fault = run.events("fault")[-1]
        stopped = next(event for event in run.events("run") if event["t"] > fault["t"])
        took = 1000 * (stopped["t"] - fault["t"])
        matrix.enter("a node more than there are spares, then --resume", "saved, stopped", None, took, STOPPED)


@pytest.mark.parametrize(("form", "shared"), [("overlap", []), ("full_tail", ["left"])])
def test_holders_are_in_different_racks_before_a_loss_and_after(tmp_path: Path, form: str, shared: list[str]) -> None:
    """Neighbors would be partners. The spare that takes over is of the rack that lost a node, though not the first.

    Of the full tail, three ranks that all hold one another's, two have to be in one of the two racks.
    """
    racks = "site.failure_domains={left: 'node0,node1,node2,node6', right: 'node3,node4,node5,node7'}"
    lost = drills([drill(8, 3, action="kill_node")])
    shape = ("cluster.nodes=5", "cluster.spares=3", f"train.steps={STEPS}", "protect.mode=blocking", "verify=false")
    with Run(tmp_path, *shape, f"protect.placement={form}", racks, lost) as run:
        run.wait_for_end(timeout_s=300)
        ranks = {node["rank"]: node["node"] for node in run.status["nodes"] if node["rank"] is not None}
        assert run.status["state"] == "finished"
        (item,) = timeline.recoveries(run.events())
        assert (item.rung, item.tier) == ("hot_swap", "peer")
        assert ranks == {0: "node0", 1: "node3", 2: "node1", 3: "node5", 4: "node2"}
        assert run.status["shared_domains"] == shared
