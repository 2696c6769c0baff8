"""status.json has several writers: the agent that leads, and the supervisor."""

import subprocess
import sys
from pathlib import Path

from gemini_hpc.runtime.paths import RunPaths
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
