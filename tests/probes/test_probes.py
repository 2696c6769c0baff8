"""Each probe on real resources that do: what it tells, and that nothing of it is left."""

import re
from pathlib import Path

import pytest

from tests.probes.looking import probe

GOOD = {
    "versions": r"torch \d.*deepspeed \d.*mpich \d",
    "kernel": r"^Linux \d.*pidfd.*flock",
    "limits": r"^\d+ open files \(104 needed\), 147 threads started",
    "memory": r"^\d+\.\d GiB left on this machine.*needs \d\.\d GiB",
    "memory files": r"^/dev/shm is tmpfs, \d+\.\d GiB free; arenas take 0\.\d\d GiB, \d+\.\d MB a node$",
    "loopback": r"^5 nodes at 127\.0\.0\.2 to 127\.0\.0\.6",
    "control plane": r"handshake \d+ ms; round trip \d+\.\d+ ms",
    "MPI world": r"^2 window hosts up in \d+\.\d\d s .*MB by Rget, verified, at \d+ MB/s; (TCP over \w+|shared memory)",
    "gloo group": r"^torch loaded in \d+\.\d s; a group of 2 at 127\.0\.0\.1 formed in \d+ ms",
    "run directory": r"on \w+, \d+\.\d GiB free; 64 MiB of HDF5 with fsync and rename at \d+ MB/s: ",
}


@pytest.mark.cluster
@pytest.mark.parametrize("name", GOOD)
def test_on_a_machine_that_can(name: str, tmp_path: Path) -> None:
    found = probe(name, f"site.runs_dir={tmp_path / 'to be' / 'runs'}", "recovery.world_s=60")
    assert found.level in ("ok", "warning"), found
    assert re.search(GOOD[name], found.text), found.text
    assert found.left == [] and list(tmp_path.iterdir()) == []
