"""Frames, figures and the page that is made of them."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import pytest

from gemini_hpc.analysis import figures, frames, timeline
from gemini_hpc.analysis.report import write_report
from gemini_hpc.errors import UserError
from tests.analysis.synthetic import SHARD_BYTES, Loss, build, loss_of, reference_of, write_run

LOSSES = [Loss(8, rank=2, replayed=1), Loss(16, rank=1, action="kill_worker")]
EVENTS = build(40, LOSSES)


def test_steps_have_a_row_for_each_time_a_step_was_done() -> None:
    steps = frames.steps(EVENTS)
    assert list(steps.columns) == ["rank", "generation", "step", "loss", "step_s", "snapshot_s", "t"]
    assert len(steps) == 4 * 40 + 4
    assert steps["loss"].dtype == "float64" and steps["snapshot_s"].isna().sum() == 4 * 2
    row = steps.iloc[100]
    assert row["loss"] == loss_of(int(row["rank"]), int(row["step"]))


def test_final_steps_have_one_row_each_and_the_last_time_counts() -> None:
    done = frames.final_steps(frames.steps(EVENTS))
    assert len(done) == 4 * 40
    assert set(done[done["step"] == 7]["generation"]) == {2}


def test_frames_of_nothing_have_their_columns() -> None:
    assert list(frames.steps([]).columns)[:3] == ["rank", "generation", "step"]
    assert len(frames.memory([])) == len(frames.recoveries([])) == len(frames.reference([])) == 0
    assert "first step" in frames.recoveries([]).columns


def test_recoveries_as_a_frame() -> None:
    frame = frames.recoveries(EVENTS)
    assert list(frame["lost"]) == [
        "node2 killed (step 8, backward)",
        "worker of node1 killed (step 16, backward)",
    ]
    assert frame["fetched"].isna().tolist() == [False, True]


def trace(figure: go.Figure, name: str) -> Any:
    return next(t for t in figure.data if t.name == name)


def test_the_loss_figure_shows_the_mean_and_the_reference_and_hides_the_ranks() -> None:
    figure = figures.loss(frames.steps(EVENTS), frames.reference(reference_of(40)), timeline.recoveries(EVENTS))
    mean = [sum(loss_of(rank, step) for rank in range(4)) / 4 for step in range(1, 41)]
    assert list(trace(figure, "mean of the ranks").y) == pytest.approx(mean)
    assert list(trace(figure, "undisturbed run").y) == pytest.approx(mean)
    assert [trace(figure, f"rank {rank}").visible for rank in range(4)] == ["legendonly"] * 4
    assert [shape.x0 for shape in figure.layout.shapes] == [6.5, 15.5]


def test_the_step_time_figure_is_in_milliseconds_and_tells_what_is_off_the_scale() -> None:
    figure = figures.step_time(frames.steps(EVENTS))
    assert trace(figure, "step").y[0] == pytest.approx(1860)
    assert figure.layout.yaxis.range[1] < 1000
    assert any("step 1 took" in a.text for a in figure.layout.annotations)


def test_the_memory_figure_has_each_node_and_tier() -> None:
    figure = figures.memory(frames.memory(EVENTS), {"node2"}, 5_000_000)
    local, peer, persistent = figure.data
    assert (list(persistent.x), list(persistent.y)) == (["file system"], [5.0])
    assert peer.marker.color == figures.TIERS["peer"]
    assert list(local.x) == ["node0", "node1", "node2<br>lost", "node3", "node4"]
    assert list(local.y) == pytest.approx([2 * SHARD_BYTES / 1e6] * 5)
    assert local.marker.color == figures.TIERS["local"]


def test_memory_in_the_unit_that_fits() -> None:
    frame = frames.memory([{**e, "local_bytes": 40e9} for e in EVENTS if e["kind"] == "memory"])
    figure = figures.memory(frame, stored_bytes=10**9)
    assert figure.layout.yaxis.title.text == "GB" and figure.data[0].y[0] == 40


PROFILE = {"step_s": 1.0, "idle_s": 0.25, "spread": 0.1}
TRAFFIC = [
    {"t": 1.0, "node": "n0", "kind": "collectives", "step": 20, "rank": 0, "stamps": [[5.0, 5.1, 8]], **PROFILE},
    {
        "t": 2.0,
        "node": "n0",
        "kind": "collectives",
        "step": 40,
        "rank": 0,
        "stamps": [[7.0, 7.1, 8], [7.3, 7.4, 9]],
        **PROFILE,
    },
    {"t": 2.1, "node": "n0", "kind": "reads", "step": 40, "stamps": [[7.15, 7.25, 1000]]},
    {"t": 3.0, "node": "n1", "kind": "collectives", "step": 60, "rank": 1, "stamps": [[9.0, 9.1, 8]], **PROFILE},
    {"t": 3.1, "node": "n1", "kind": "reads", "step": 60, "stamps": []},
]


def test_traffic_of_training_and_of_replicas_is_on_one_axis() -> None:
    """Of the newest step of which a node told both."""
    frame = frames.traffic(TRAFFIC)
    assert list(frame["what"]) == ["training", "training", "replicas"]
    assert list(frame["begin_ms"].round(3)) == [0.0, 300.0, 150.0]
    figure = figures.traffic(frame)
    assert list(trace(figure, "reads of replicas").x.round(3)) == [100.0]
    assert list(figure.layout.yaxis.categoryarray) == ["n0 replicas", "n0 training"]


def test_the_recovery_figure_has_every_phase_in_its_place() -> None:
    item = timeline.recoveries(EVENTS)[0]
    figure = figures.recovery(item)
    fetch = trace(figure, "fetch")
    assert list(fetch.y) == ["rank 2"] and fetch.x[0] == pytest.approx(19.2, abs=0.01)
    assert max(b + x for t in figure.data for b, x in zip(t.base, t.x, strict=True)) == pytest.approx(
        item.ms("first step")
    )


def test_figures_of_nothing_can_be_drawn() -> None:
    empty = frames.steps([])
    for figure in (
        figures.loss(empty, frames.reference([])),
        figures.step_time(empty),
        figures.memory(frames.memory([])),
    ):
        assert figure.to_json()
    assert figures.recovery(timeline.recoveries(build(24, [Loss(12, rank=2, final=True)]))[0]).to_json()


def page(run_dir: Path) -> str:
    return write_report(run_dir).read_text(encoding="utf-8")


def body(text: str) -> str:
    """What a reader sees: without the library, and without the figures' data."""
    return re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)


def test_the_report_stands_alone(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "a run", steps=40, losses=LOSSES)
    text = page(run_dir)
    assert "plotly.js v" in text
    assert not re.search(r"""<(script|link|img|iframe)[^>]*(src|href)\s*=""", text)
    assert "@import" not in body(text) and "url(" not in body(text)
    assert text.count('class="plotly-graph-div"') == 5
    assert not list(run_dir.glob(".*.tmp"))


def test_the_report_opens_with_what_matters(tmp_path: Path) -> None:
    seen = body(page(write_run(tmp_path, steps=40, losses=LOSSES)))
    assert "<h1>gpt2-gemini</h1>" in seen
    assert "gpt2 small · bf16 · 4 nodes + 1 spare · 2 replicas" in seen
    assert '<b class="good">identical</b>' in seen and "164 of 164" in seen
    assert "node2 killed (step 8, backward)" in seen and "restart, step 15 from its own node" in seen
    assert "40 of 40" in seen


def test_one_wrong_bit_is_in_the_report(tmp_path: Path) -> None:
    write_run(tmp_path, steps=24)
    path = tmp_path / "reference" / "losses.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[41]["loss"] += 2e-16 * 4
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    seen = body(page(tmp_path))
    assert '<b class="bad">not identical</b>' in seen and "first at rank 1, step 11" in seen


def test_a_report_of_a_run_without_reference_configuration_or_end(tmp_path: Path) -> None:
    write_run(tmp_path, steps=24, losses=[Loss(12, rank=2, final=True)])
    (tmp_path / "reference" / "losses.jsonl").unlink()
    (tmp_path / "config.yaml").write_text("{ not: [yaml")
    seen = body(page(tmp_path))
    assert "not compared" in seen and "no new step was reached" in seen and "0 of 1 succeeded" in seen


def test_names_cannot_write_the_page(tmp_path: Path) -> None:
    write_run(tmp_path)
    (tmp_path / "config.yaml").write_text("name: '<script>alert(1)</script>'\n")
    for path in (tmp_path / "events").iterdir():
        path.write_text(path.read_text().replace('"target":"node2"', '"target":"<img src=x onerror=alert(1)>"'))
    text = page(tmp_path)
    assert "<script>alert" not in text and "<img src=x" not in text


def test_many_recoveries_are_all_listed_and_the_slowest_charted(tmp_path: Path) -> None:
    losses = [Loss(4 * i, rank=1, action="kill_worker") for i in range(1, 11)]
    text = page(write_run(tmp_path, steps=44, losses=losses))
    assert body(text).count("worker of node1 killed") == 10 + 6


def test_no_events_is_said_in_words(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no events"):
        write_report(tmp_path)


def test_the_command_lines_can_use_timeline_and_compare_without_pandas() -> None:
    code = """
import sys
from gemini_hpc.analysis import compare, timeline
assert not {"pandas", "numpy", "plotly", "yaml"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_pandas_keeps_the_bits_of_a_loss() -> None:
    assert [loss.hex() for loss in frames.reference(reference_of(9))["loss"]] == [
        float(line["loss"]).hex() for line in reference_of(9)
    ]
    assert isinstance(frames.reference([]), pd.DataFrame)
