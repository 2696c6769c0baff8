"""Probes of the lines between nodes, where they fail."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.probes.looking import SHM, look, probe

pytestmark = pytest.mark.cluster


def test_many_nodes_have_addresses() -> None:
    found = probe("loopback", "cluster.nodes=300")
    assert found.level == "ok" and found.text.startswith("301 nodes at 127.0.0.2 to 127.0.1.52")


def test_a_machine_whose_loopback_is_down() -> None:
    unshare = ["unshare", "--user", "--map-root-user", "--net"]
    try:
        subprocess.run([*unshare, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no namespaces here")
    down = "CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000\nimport ctypes\n"
    down += "assert ctypes.CDLL(None).unshare(CLONE_NEWUSER | CLONE_NEWNET) == 0"
    found = probe("loopback", before=down)
    assert found.level == "problem" and found.text.endswith("bring lo up with 127.0.0.1/8, the whole network"), found


def test_an_interface_that_is_not_there() -> None:
    found = probe("MPI world", "site.interface=ib9")
    assert found.level == "problem" and found.text.startswith("no interface ib9 is up: set site.interface to one of")


def test_a_world_that_is_late_is_named_and_leaves_nothing() -> None:
    before = set(SHM.glob("mpich_shm_*"))
    found = probe("MPI world", "recovery.world_s=0.1")
    assert found.level == "problem" and found.text.startswith("no MPI world of 2 window hosts within 0.2 s: set site")
    assert found.left == [] and set(SHM.glob("mpich_shm_*")) <= before


def test_a_world_that_breaks_down_says_why(tmp_path: Path) -> None:
    (tmp_path / "mpi4py").mkdir()
    (tmp_path / "mpi4py" / "__init__.py").write_text("raise ImportError('no libmpi here')")
    paths = f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"
    found = probe("MPI world", PYTHONPATH=paths)
    assert found.level == "problem", found
    assert "broke down" in found.text and found.left == []


def test_a_torch_that_does_not_load_says_why(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('no libtorch here')")
    found = probe("gloo group", PYTHONPATH=f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    assert found.level == "problem" and "ImportError: no libtorch here" in found.text
    assert found.left == []


PULL = """
from gemini_hpc.arena import Arena, Geometry, Record, State
from gemini_hpc.core.messages import Copied, Hello, Sealed
from gemini_hpc.runtime.channel import Channel

def look(case):
    arena = Arena.create(case.shared("n2.arena"), Geometry(2, 4096), case.id)
    arena.write_record(1, 0, Record(State.SEALED, 0, 1, 1, 4096, 7))
    line = network.HostLine(case.shared("n2.sock"), lambda: None)
    host = Channel.connect(case.shared("n2.sock"))
    host.send(Hello("n2", "host", os.getpid(), 1))
    line.open()
    host.send(Copied("n2", 1, 0, 1, "n1", 1, 0, 4096, 7, True, "", 0.5))
    seconds = line.pull(arena, "n2", "n1", 3, Sealed("n1", 1, 0, 1, 0, 4096, 7))
    order = host.receive()
    return ok(f"{seconds} {arena.record(1, 0).state.name} {order.source} {order.target} {order.checksum}")
"""


def test_every_pull_is_a_read() -> None:
    """A host leaves alone what it has already, and would be as fast as a checksum."""
    assert look(PULL).text == "0.5 FREE n1 3 7"
