"""Probes of software, limits, memory and clock."""

import re

import pytest

from gemini_hpc import versions as tested
from gemini_hpc.config.capacity import GIB
from gemini_hpc.errors import UserError
from gemini_hpc.runtime.probes import machine
from tests.probes.looking import NOBODY, planned, probe


def test_other_versions_than_the_tested_cost_the_hot_swap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tested.TESTED, "torch", "9.8.7")
    with planned() as case:
        found = machine.versions(case)
    assert found.level == "warning" and "instead of 9.8.7" in found.text and "pip install torch==9.8.7" in found.text


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "PACKAGES", ("torch", "no-such-package"))
    with planned() as case:
        found = machine.versions(case)
    assert found.level == "problem" and found.text.startswith("no-such-package not installed")


@pytest.mark.parametrize(
    ("before", "overrides", "text"),
    [
        ("resource.setrlimit(resource.RLIMIT_NOFILE, (90, 4096))", [], "90 open files, 104 needed: ulimit -n 104"),
        (
            "resource.setrlimit(resource.RLIMIT_NOFILE, (90, 90))",
            ["cluster.nodes=5"],
            "90 open files, 112 needed: ulimit -n 112 (first ask root to allow it)",
        ),
        ("resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))", [], r"1048576 bytes of a file, "),
        (
            f"probe = None\ndef look(case):\n    {NOBODY}\n"
            "    resource.setrlimit(resource.RLIMIT_NPROC, (20, 20))\n    return machine.limits(case)",
            [],
            "only ",
        ),
    ],
    ids=["files", "files, hard", "file size", "threads"],
)
def test_a_limit_that_is_too_low(before: str, overrides: list[str], text: str) -> None:
    found = probe("limits", *overrides, before=before)
    assert found.level == "problem" and found.text.startswith(text), found
    assert "ulimit -" in found.text


def test_a_limit_on_memory_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    with planned() as case:
        monkeypatch.setattr(machine, "memory_left", lambda: [64 * GIB, 32 * GIB])
        assert "64.0 GiB left on this machine, 32.0 by the cgroup's limit" in machine.memory(case).text
        monkeypatch.setattr(machine, "memory_left", lambda: [64 * GIB, GIB])
        with pytest.raises(UserError, match=r"has 1\.00 GiB: "):
            machine.memory(case)


def test_what_another_model_needs_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "memory_left", lambda: [GIB])
    with planned("train.entry=my_job:build") as case:
        assert machine.memory(case).text.endswith("how much my_job:build needs is known once it is built")


STALL = """
import ctypes, threading
threading.Timer(0.2, ctypes.PyDLL(None).usleep, [800_000]).start()  # holds Python's lock
"""


@pytest.mark.parametrize(("timeout_s", "level"), [(0.5, "problem"), (1.5, "warning"), (60.0, "ok")])
def test_stalls_are_held_against_the_heartbeats(timeout_s: float, level: str) -> None:
    before = "probe = None\ndef look(case):\n" + "".join(f"    {line}\n" for line in STALL.strip().splitlines())
    before += "    return machine.clock(case)\nPROBE = Probe\nProbe = lambda *a: PROBE(a[0], a[1], 30, *a[3:])"
    found = probe("clock", f"recovery.heartbeat_timeout_s={timeout_s}", "recovery.heartbeat_s=0.05", before=before)
    assert found.level == level, found
    worst = re.search(r"worst stall (\d+) ms", found.text)
    assert worst and int(worst[1]) >= 700
    advised = re.search(r"set recovery\.heartbeat_timeout_s=([\d.]+)", found.text)
    assert (level == "ok") == (advised is None)
    assert advised is None or float(advised[1]) > 4 * 0.7
    assert found.left == []
