"""What people look at a run with: whatever lies in its directory, they get an answer or one line, never a traceback."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gemini_hpc import status, submit
from gemini_hpc.analysis.compare import read_reference
from gemini_hpc.analysis.report import write_report
from gemini_hpc.analysis.timeline import recoveries
from gemini_hpc.config import dump, load_run
from gemini_hpc.errors import GeminiError
from gemini_hpc.runtime.paths import RunPaths
from gemini_hpc.runtime.status_file import read_status, update_status
from gemini_hpc.telemetry import read_events

FUZZ = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
TEXT = st.text(st.characters(exclude_categories=()), max_size=6)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(-(10**400), 10**400) | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)
BYTES = [
    b"",
    b"\xff\xfe\x00",
    b"[" * 200_000,
    b'{"a":' * 100_000,
    b"9" * 5000,
    b"null",
    b"[]",
    b'"text"',
    b"{}",
    b'{"t": 1e999, "kind": "plan"}',
    b'{"t": 1' + b"0" * 400 + b', "kind": "plan"}',
    b'{"t": NaN, "kind": "plan"}',
    b'{"rank": 1e999, "step": 1, "loss": 1}\n',
]

STATUS = {
    "state": "running",
    "step": 3,
    "total_steps": 9,
    "coordinator": "node0",
    "generation": 1,
    "safe_step": 2,
    "persistent_step": -1,
    "replicas": 2,
    "protected": True,
    "shared_domains": ["rack1"],
    "waiting_for": ["node1"],
    "waiting_s": 0.5,
    "nodes": [
        {
            "node": "node0",
            "status": "active",
            "rank": 0,
            "worker": "training",
            "suspected_for": ["exit"],
            "avoided_for": [],
            "hurry": "",
        }
    ],
    "verdict": "",
    "reason": "",
}
EVENTS = [
    {"t": 1.0, "kind": "run", "node": "cluster", "state": "started", "reason": ""},
    {"t": 2.0, "kind": "plan", "node": "node0", "generation": 1, "step": -1, "reason": "start",
     "moves": [{"rank": 0, "node": "node0", "tier": "fresh"}, {"rank": 1, "node": "node1", "tier": "fresh"}]},
    {"t": 3.0, "kind": "step", "node": "node0", "rank": 0, "generation": 1, "step": 1, "loss": 2.5, "step_s": 0.1,
     "snapshot_s": 0.01},
    {"t": 3.1, "kind": "first_step", "node": "node0", "generation": 1, "step": 1},
    {"t": 4.0, "kind": "fault", "node": "drill", "action": "kill_node", "target": "node1", "step": 2,
     "phase": "backward"},
    {"t": 4.1, "kind": "suspect", "node": "node0", "target": "node1", "evidence": "exit", "reason": "gone"},
    {"t": 4.2, "kind": "evict", "node": "node0", "target": "node1", "reason": "gone"},
    {"t": 4.3, "kind": "plan", "node": "node0", "generation": 2, "step": 1, "reason": "lost node1",
     "moves": [{"rank": 1, "node": "node2", "tier": "peer"}]},
    {"t": 4.4, "kind": "promote", "node": "node0", "target": "node2", "rank": 1, "generation": 2},
    {"t": 4.5, "kind": "fetched", "node": "node0", "generation": 2, "rank": 1, "source": "node0", "bytes": 10,
     "seconds": 0.1},
    {"t": 4.6, "kind": "resumed", "node": "node0", "generation": 2, "rank": 1, "rung": "hot_swap", "group_s": 0.1,
     "reset_s": 0.1, "restore_s": 0.1, "target": "node2"},
    {"t": 4.7, "kind": "first_step", "node": "node0", "generation": 2, "step": 2},
    {"t": 4.8, "kind": "memory", "node": "node0", "local_bytes": 10, "peer_bytes": 10},
]  # fmt: skip


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    (folder / "events").mkdir(parents=True)
    (folder / "reference").mkdir()
    (folder / "config.yaml").write_text(dump(load_run(overrides=["drills=[]"], site="local")))
    (folder / "env.json").write_text('{"corpus": ""}')
    (folder / "status.json").write_text(json.dumps(STATUS))
    write_events(folder, EVENTS)
    return folder


def write_events(run_dir: Path, events: list[Any]) -> None:
    (run_dir / "events" / "node0.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))


def answers(ask: Callable[[], Any]) -> bool:
    """Whether it answers; if not, it says why in one line that a terminal can show."""
    try:
        ask()
    except GeminiError as error:
        assert "\n" not in str(error)
        str(error).encode()
        return False
    return True


def look(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> bool:
    """Ask for the status both ways."""
    said = [answers(lambda: status.main([str(run_dir)])), answers(lambda: status.main([str(run_dir), "--json"]))]
    capsys.readouterr().out.encode()
    return all(said)


def test_the_good_one(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert look(run_dir, capsys)
    assert [item.outcome for item in recoveries(read_events(run_dir))] == ["recovered"]
    assert answers(lambda: write_report(run_dir))


@pytest.mark.parametrize("state", ["running", "finished"])
def test_a_run_that_ended_without_a_word(run_dir: Path, state: str, capsys: pytest.CaptureFixture[str]) -> None:
    (run_dir / "status.json").write_text(json.dumps(STATUS | {"state": state}))
    assert status.main([str(run_dir)]) == 0
    assert ("ended without a word" in capsys.readouterr().out) == (state == "running")


@pytest.mark.parametrize("content", BYTES, ids=lambda content: ascii(content[:24]))
@pytest.mark.parametrize("name", ["status.json", "events/node0.jsonl", "reference/losses.jsonl", "config.yaml"])
def test_any_bytes_in_any_file(run_dir: Path, name: str, content: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    (run_dir / name).write_bytes(content)
    look(run_dir, capsys)
    answers(lambda: read_reference(run_dir))
    if name.startswith(("reference", "config")):
        answers(lambda: write_report(run_dir))
    if name == "status.json":
        update_status(RunPaths(run_dir, run_dir), state="stopped")
        assert read_status(RunPaths(run_dir, run_dir))["state"] == "stopped"


@pytest.mark.parametrize("name", ["status.json", "events/node0.jsonl", "events/x.jsonl", "reference/losses.jsonl"])
@pytest.mark.parametrize("kind", ["folder", "link to itself", "nothing"])
def test_what_is_no_file(run_dir: Path, name: str, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = run_dir / name
    path.unlink(missing_ok=True)
    if kind == "folder":
        path.mkdir()
    elif kind == "link to itself":
        path.symlink_to(path)
    look(run_dir, capsys)
    answers(lambda: read_reference(run_dir))


@FUZZ
@given(field=st.sampled_from([*STATUS, "t"]), value=VALUES, gone=st.booleans())
def test_any_value_in_the_status(
    run_dir: Path, capsys: pytest.CaptureFixture[str], field: str, value: Any, gone: bool
) -> None:
    changed = {**STATUS, field: value}
    if gone:
        del changed[field]
    (run_dir / "status.json").write_text(json.dumps(changed))
    look(run_dir, capsys)


@FUZZ
@given(value=VALUES, field=st.sampled_from(list(STATUS["nodes"][0])))
def test_any_value_in_a_node_of_the_status(
    run_dir: Path, capsys: pytest.CaptureFixture[str], field: str, value: Any
) -> None:
    nodes = [{**STATUS["nodes"][0], field: value}]
    (run_dir / "status.json").write_text(json.dumps({**STATUS, "nodes": nodes}))
    look(run_dir, capsys)


@FUZZ
@given(data=st.data(), value=VALUES, gone=st.booleans())
def test_any_value_in_an_event(
    run_dir: Path, capsys: pytest.CaptureFixture[str], data: Any, value: Any, gone: bool
) -> None:
    events = [dict(event) for event in EVENTS]
    event = data.draw(st.sampled_from(events))
    field = data.draw(st.sampled_from(list(event)))
    if gone:
        del event[field]
    else:
        event[field] = value
    write_events(run_dir, events)
    look(run_dir, capsys)


@settings(FUZZ, max_examples=12)
@given(data=st.data(), value=VALUES)
def test_a_report_of_any_event(run_dir: Path, data: Any, value: Any) -> None:
    events = [dict(event) for event in EVENTS]
    event = data.draw(st.sampled_from(events))
    event[data.draw(st.sampled_from(list(event)))] = value
    write_events(run_dir, events)
    answers(lambda: write_report(run_dir))


def test_a_report_runs_no_script_of_an_event(run_dir: Path) -> None:
    evil = "<script>alert(1)</script><img src=x onerror=alert(1)>"
    events = [{**event, "reason": evil} if "reason" in event else event for event in EVENTS]
    write_events(run_dir, [{**e, "target": e["target"] + evil} if "target" in e else e for e in events])
    page = write_report(run_dir).read_text()
    assert evil not in page and "<img src=x" not in page


@pytest.mark.parametrize("content", BYTES, ids=lambda content: ascii(content[:24]))
def test_any_environment_file(run_dir: Path, content: bytes) -> None:
    (run_dir / "env.json").write_bytes(content)
    assert not answers(lambda: submit._check_corpus(run_dir, "a fingerprint"))


@pytest.mark.skipif(os.getuid() == 0, reason="root may read everything")
def test_what_may_not_be_read(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("status.json", "events/node0.jsonl"):
        (run_dir / name).chmod(0)
        look(run_dir, capsys)
