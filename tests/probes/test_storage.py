"""Probes of the memory file system and of the run directories'."""

import os
import re
import tempfile
from pathlib import Path

import pytest

from gemini_hpc.runtime.paths import lock_path
from gemini_hpc.runtime.probes import storage
from gemini_hpc.runtime.processes import RunLock
from tests.probes.looking import NOBODY, SHM, planned, probe


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["site.shm_dir=/no/such/place"], "site.shm_dir /no/such/place: No such file or directory"),
        (["site.shm_dir=/proc"], "cannot create /proc/"),
        (["model.preset=100b"], "model 100b does not fit: the arenas need"),
    ],
)
def test_memory_files_that_cannot_be(overrides: list[str], text: str) -> None:
    found = probe("memory files", *overrides)
    assert found.level == "problem" and found.text.startswith(text), found


def test_what_needs_memory_files_says_so_and_no_more(tmp_path: Path) -> None:
    for name in ("leftovers", "MPI world"):
        found = probe(name, f"site.shm_dir={tmp_path / 'missing'}")
        assert (found.level, found.text) == ("warning", storage.NOT_TRIED)


def test_a_path_too_long_for_sockets(tmp_path: Path) -> None:
    place = tmp_path / ("x" * 90)
    place.mkdir()
    found = probe("memory files", f"site.shm_dir={place}")
    assert found.level == "problem" and found.text.endswith("set site.shm_dir to a shorter path")


def test_a_disk_in_the_place_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = storage.file_system(tmp_path)
    with planned(f"site.shm_dir={tmp_path}", "model.preset=tiny") as case:
        monkeypatch.setattr(storage, "IN_MEMORY", (kind,))
        assert storage.memory_files(case).level == "ok"
        (made,) = tmp_path.iterdir()
        made.unlink()
        monkeypatch.setattr(storage, "IN_MEMORY", ("tmpfs of another kind",))
        found = storage.memory_files(case)
    assert found.level == "warning" and f"{tmp_path} is {kind}" in found.text


def test_the_type_of_a_file_system_is_that_of_the_mount_on_top() -> None:
    assert storage.file_system(SHM) == "tmpfs"
    assert storage.file_system(Path("/proc/self")) == "proc"
    assert storage.file_system(Path("/dev/shm/../../proc")) == "proc"


def test_leftovers_of_dead_runs_and_not_of_living_ones(tmp_path: Path) -> None:
    dead, alive = f"{os.getpid():010x}", f"{os.getpid() + (1 << 32):010x}"
    lock = RunLock(lock_path(alive))
    assert lock.take()
    try:
        with planned(f"site.shm_dir={tmp_path}") as case:
            (tmp_path / f"gemini-{alive}-node0.arena").write_bytes(bytes(1 << 20))
            before = storage.leftovers(case).text
            assert "of your runs alive here" in before
            (tmp_path / f"gemini-{dead}-node0.arena").write_bytes(os.urandom(32 << 20))
            (tmp_path / f"gemini-{case.id}-node0.arena").touch()
            found = storage.leftovers(case)
    finally:
        lock.release()
    assert found.level == "warning" and found.text.endswith("start any run, which sweeps them")
    assert re.match(r"dead runs \([1-9]\d*\) left 0\.0[3-9] GiB", found.text), found.text


def test_a_run_directory_that_may_not_be_written() -> None:
    with tempfile.TemporaryDirectory() as place:  # pytest's own folders are closed to others
        os.chmod(place, 0o555)
        look = f"probe = None\ndef look(case):\n    {NOBODY}\n    return storage.run_directory(case)"
        found = probe("run directory", f"site.runs_dir={place}/runs", before=look)
        os.chmod(place, 0o755)
    assert found.level == "problem" and found.text.endswith(": Permission denied: do that"), found


def test_a_file_in_the_place_of_the_run_directory(tmp_path: Path) -> None:
    (tmp_path / "runs").touch()
    found = probe("run directory", f"site.runs_dir={tmp_path / 'runs' / 'mine'}")
    assert found.level == "problem" and found.text == f"{tmp_path / 'runs'} is no folder: {storage.ANOTHER}"


def test_a_disk_that_is_full(tmp_path: Path) -> None:
    place = f"site.runs_dir={tmp_path}"
    found = probe("run directory", place, "model.preset=100b", "protect.keep=100000")
    assert found.level == "problem" and "needed for checkpoints: lower protect.keep" in found.text
    stopped = "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))"  # in the middle of the file
    found = probe("run directory", place, before=stopped)
    assert found.level == "problem" and "rank-0000.h5: File too large: set site.runs_dir" in found.text, found
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_too_slow_for_the_archivers(tmp_path: Path) -> None:
    found = probe("run directory", f"site.runs_dir={tmp_path}", "recovery.archive_s=0.001")
    assert found.level == "problem" and "within 0.001 s" in found.text
    slow = "probe = None\nlook = storage.run_directory\nPROBE = Probe\nProbe = lambda *a: PROBE(a[0], a[1], 60, *a[3:])"
    found = probe("run directory", f"site.runs_dir={tmp_path}", "recovery.archive_s=0.001", before=slow)
    assert found.level == "warning" and re.search(r"set recovery\.archive_s=\d+$", found.text)
