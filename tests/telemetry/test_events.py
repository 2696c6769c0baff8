"""What is emitted is read back, whatever happens to the writers."""

import os
import random
import resource
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from gemini_hpc.telemetry import EventLog, EventThread, read_events


def test_events_of_all_nodes_come_back_sorted(tmp_path: Path) -> None:
    a, b = EventLog(tmp_path, "node0"), EventLog(tmp_path, "node1")
    b.emit("suspect", t=3.0, target="node2", evidence="exit", reason="process 7 ended")
    a.emit("step", t=1.0, rank=0, step=1, loss=5.5, snapshot_s=None)
    b.emit("evict", t=2.0, target="node2")
    assert [(e["t"], e["node"], e["kind"]) for e in read_events(tmp_path)] == [
        (1.0, "node0", "step"),
        (2.0, "node1", "evict"),
        (3.0, "node1", "suspect"),
    ]
    assert read_events(tmp_path)[0]["snapshot_s"] is None


def test_the_time_is_now_unless_given(tmp_path: Path) -> None:
    log = EventLog(tmp_path, "node0")
    log.emit("run", state="started")
    log.emit("run", state="finished")
    first, second = read_events(tmp_path)
    assert 1.7e9 < first["t"] <= second["t"]


def test_losses_survive_to_the_last_bit(tmp_path: Path) -> None:
    generator = random.Random(1)
    losses = [struct.unpack("<f", generator.randbytes(4))[0] for _ in range(500)]
    losses = [loss for loss in losses if loss == loss]
    log = EventLog(tmp_path, "node0")
    for loss in losses:
        log.emit("step", loss=loss)
    read = [event["loss"] for event in read_events(tmp_path)]
    assert struct.pack(f"{len(losses)}d", *read) == struct.pack(f"{len(losses)}d", *losses)


def test_only_the_owner_may_read_the_log(tmp_path: Path) -> None:
    EventLog(tmp_path, "node0").emit("run", state="started")
    assert (tmp_path / "events" / "node0.jsonl").stat().st_mode & 0o777 == 0o600


def test_no_log_is_no_events(tmp_path: Path) -> None:
    assert read_events(tmp_path) == []


def test_a_torn_line_hides_nothing_else(tmp_path: Path) -> None:
    EventLog(tmp_path, "node0").emit("a")
    path = tmp_path / "events" / "node0.jsonl"
    path.write_bytes(path.read_bytes() + b'{"t":5,"kind":"to')
    assert [e["kind"] for e in read_events(tmp_path)] == ["a"]
    EventLog(tmp_path, "node0").emit("b")  # the agent was started again
    assert [e["kind"] for e in read_events(tmp_path)] == ["a", "b"]


def test_lines_that_are_no_events_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "events").mkdir()
    lines = ["[1]", "3", "{}", '{"t":1}', '{"t":"x","kind":"a"}', "", '{"t":2,"kind":"good"}']
    (tmp_path / "events" / "n.jsonl").write_text("\n".join(lines))
    assert [e["kind"] for e in read_events(tmp_path)] == ["good"]


def test_two_writers_of_one_file_do_not_mix_lines(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from gemini_hpc.telemetry import EventLog
log = EventLog(Path(sys.argv[1]), "drill")
for i in range(2000):
    log.emit("fault", writer=sys.argv[2], i=i, pad="x" * 300)
"""
    writers = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), name]) for name in "ab"]
    assert [process.wait(60) for process in writers] == [0, 0]
    events = read_events(tmp_path)
    for name in "ab":
        assert [e["i"] for e in events if e["writer"] == name] == list(range(2000))


def test_a_log_that_cannot_be_written_does_not_stop_its_writer(tmp_path: Path) -> None:
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    log = EventLog(tmp_path, "node0")
    log.emit("before")
    try:
        size = (tmp_path / "events" / "node0.jsonl").stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, old[1]))
        log.emit("torn")  # 10 bytes of it fit
        log.emit("lost")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    log.emit("after")
    assert log.lost == 2
    assert [e["kind"] for e in read_events(tmp_path)] == ["before", "after"]


def test_what_a_thread_that_keeps_its_files_apart_opens_no_child_inherits(tmp_path: Path) -> None:
    thread = EventThread(tmp_path, "node0")
    thread.emit("before")
    inherited = subprocess.run(["ls", "-l", "/proc/self/fd"], capture_output=True, text=True, close_fds=False)
    own = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    thread.close(5.0)
    assert str(tmp_path) not in inherited.stdout and not [name for name in own if str(tmp_path) in name]
    assert [e["kind"] for e in read_events(tmp_path)] == ["before"]


def test_an_event_thread_without_a_log_says_so_at_once(tmp_path: Path) -> None:
    (tmp_path / "events").touch()
    with pytest.raises(FileExistsError):
        EventThread(tmp_path, "node0")


def test_importing_it_loads_the_standard_library_only() -> None:
    code = """
import sys
import gemini_hpc.telemetry
for module in list(sys.modules.values()):
    assert "site-packages" not in (getattr(module, "__file__", None) or ""), module
"""
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    # -S: without site-packages there is nothing else to load, nor any .pth file that loads it before us
    subprocess.run([sys.executable, "-S", "-c", code], check=True, env=environment)
