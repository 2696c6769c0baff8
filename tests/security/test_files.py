"""Other users of the machine: they see nothing of a run, whatever the umask of the user who started it."""

import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from gemini_hpc.arena import Arena, Geometry
from gemini_hpc.config import load_run
from gemini_hpc.runtime.channel import Listener
from gemini_hpc.runtime.children import Child, python
from gemini_hpc.runtime.paths import RunPaths
from gemini_hpc.runtime.processes import RunLock
from gemini_hpc.runtime.status_file import write_status
from gemini_hpc.runtime.wire import make_keys
from gemini_hpc.submit import _claim, _fill_directory
from gemini_hpc.telemetry import EventLog

SOMEBODY = 54321
MASKS = [0o000, 0o022, 0o027, 0o077]


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that everybody may enter, and write to as to /dev/shm."""
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="gemini-test-") as folder:
        os.chmod(folder, 0o1777)
        yield Path(folder)


def start_a_run(place: Path) -> RunPaths:
    """All files of a run, made as `submit`, the supervisor and the agents make them."""
    config = load_run(site="local")
    run_dir = _claim(place / "runs" / "mine")
    _fill_directory(run_dir, config, "#!/bin/bash\n", "corpus")
    paths = RunPaths(run_dir, place)
    make_keys(paths.keys)
    write_status(paths, {"state": "running"})
    log = EventLog(run_dir, "node0")
    log.emit("step", loss=1.0)
    log.close()
    Arena.create(paths.arena("node0"), Geometry(1, 100), paths.run_id)
    Listener(paths.socket("node0"))._line.close()
    child = Child(python("platform"), {}, paths.logs / "worker-node0.log")
    os.waitid(os.P_PIDFD, child.pidfd, os.WEXITED | os.WNOWAIT)
    child.end()
    return paths


@pytest.fixture(params=MASKS, ids=oct)
def paths(request: pytest.FixtureRequest, place: Path) -> Iterator[RunPaths]:
    (place / "runs").mkdir(mode=0o755)
    before = os.umask(request.param)
    try:
        yield start_a_run(place)
    finally:
        os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_the_modes(paths: RunPaths) -> None:
    assert mode(paths.run_dir) == 0o700, "and so everything in it is out of reach"
    for path in (paths.keys, paths.arena("node0"), paths.socket("node0"), paths.run_dir / "events" / "node0.jsonl"):
        assert mode(path) == 0o600, path
    assert (paths.logs / "worker-node0.log").stat().st_size > 0, "the user himself can read his logs"


LOOK = """
import os, socket, sys
from pathlib import Path
os.setgroups([]), os.setgid({somebody}), os.setuid({somebody})
reached = []
for name in sys.argv[1:]:
    for how in (os.O_RDONLY, os.O_WRONLY):
        try:
            os.close(os.open(name, how))
            reached.append(name)
        except PermissionError:
            pass
        except OSError as error:
            if error.errno != 6:  # a socket cannot be opened
                reached.append(f"{{name}}: {{error}}")
    try:
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET).connect(name)
        reached.append(name)
    except OSError:
        pass
    try:
        os.unlink(name)
        reached.append(f"{{name}} could be removed")
    except OSError:
        pass
print(*reached)
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
def test_somebody_else_reaches_none_of_them(paths: RunPaths) -> None:
    listener = Listener(paths.socket("node1"))
    files = [path for path in paths.run_dir.rglob("*") if path.is_file()]
    assert len(files) > 6
    files += [paths.arena("node0"), paths.socket("node0"), paths.socket("node1")]
    command = [sys.executable, "-I", "-S", "-c", LOOK.format(somebody=SOMEBODY), *map(str, files)]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert (answer.stdout.strip(), answer.returncode) == ("", 0), answer
    listener._line.close()
    assert all(path.exists() for path in files)


@pytest.mark.parametrize("mask", MASKS, ids=oct)
def test_the_lock(place: Path, mask: int) -> None:
    before = os.umask(mask)
    lock = RunLock(place / "lock")
    try:
        assert lock.take()
    finally:
        os.umask(before)
    assert mode(place / "lock") == 0o600
    lock.release()


def test_a_shared_lock_keeps_others_out_until_its_last_holder_has_left(place: Path) -> None:
    first, second, alone = (RunLock(place / "lock") for _ in range(3))
    assert first.take(shared=True) and second.take(shared=True) and not alone.take()
    first.release()
    assert (place / "lock").exists() and not alone.take()
    second.release()
    assert not (place / "lock").exists() and alone.take() and not second.take(shared=True)
    alone.release()
