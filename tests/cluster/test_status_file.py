"""status.json has several writers: the agent that leads, and the supervisor."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gemini_hpc import status
from gemini_hpc.config import dump, load_run
from gemini_hpc.runtime.paths import RunPaths, open_run
from gemini_hpc.runtime.processes import RunLock
from gemini_hpc.runtime.status_file import read_status, write_status

WRITER = """
import sys
from pathlib import Path
from gemini_hpc.runtime.paths import RunPaths
from gemini_hpc.runtime.status_file import write_status
place = Path(sys.argv[1])
while True:
    write_status(RunPaths(place, place), {"by": "another"})
"""


def test_two_writers_at_once_leave_a_whole_file(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path, tmp_path)
    write_status(paths, {"by": "this"})
    other = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)])
    try:
        while read_status(paths).get("by") != "another":
            continue
        for _ in range(300):
            write_status(paths, {"by": "this"})
            assert read_status(paths)
    finally:
        other.kill()
        other.wait()


def test_before_anybody_leads_it_says_what_is_awaited(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text(dump(load_run(overrides=["drills=[]"], site="local")))
    paths, _ = open_run(str(tmp_path))
    lock = RunLock(paths.lock)
    assert lock.take()
    try:
        assert status.main([str(tmp_path)]) == 0
        assert "waiting for: more than half of the agents" in capsys.readouterr().out
        assert status.main([str(tmp_path), "--json"]) == 0
        assert len(json.loads(capsys.readouterr().out)["waiting_for"]) == 1
    finally:
        lock.release()
    assert status.main([str(tmp_path)]) == 0
    assert "waiting for" not in capsys.readouterr().out
