"""Whatever a probe does, its examination ends in time, says what was awaited, and nothing of it is left."""

import json
from pathlib import Path

import pytest

from gemini_hpc.runtime.processes import state_of
from tests.probes.looking import look

HANGS = """
def look(case):
    sleeper = subprocess.Popen(["sleep", "600"], start_new_session=True)
    told, tell = os.pipe()
    if (forked := os.fork()) == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.write(tell, b"1")
        time.sleep(600)
    os.read(told, 1)
    case.shared("node0.arena").write_bytes(bytes(4096))
    Path(f"/dev/shm/mpich_shm_{case.id}_0").write_bytes(bytes(4096))
    Path(PLACE).write_text(json.dumps([os.getpid(), sleeper.pid, forked, case.id]))
    time.sleep(600)
"""


def assert_gone(place: Path) -> None:
    *pids, case = json.loads(place.read_text())
    assert len(pids) == 3 and [state_of(pid) for pid in pids if state_of(pid) not in ("", "Z")] == []
    assert list(Path("/dev/shm").glob(f"*{case}*")) == []


def test_a_probe_that_hangs_is_named_and_killed_with_all_it_started(tmp_path: Path) -> None:
    place = tmp_path / "started"
    found = look(HANGS.replace("PLACE", repr(str(place))))
    assert (found.level, found.text) == ("problem", "no a thing that never comes within 3 s: do that")
    assert found.left == []
    assert_gone(place)


def test_who_is_told_to_end_leaves_nothing(tmp_path: Path) -> None:
    place = tmp_path / "started"
    told = f"""
def tick():
    if Path({str(place)!r}).exists() and Path({str(place)!r}).stat().st_size:
        raise TimeoutError
"""
    found = look(HANGS.replace("PLACE", repr(str(place))) + told)
    assert found.text == "interrupted" and found.left == []
    assert_gone(place)


def test_what_a_probe_leaves_running_is_ended() -> None:
    found = look("""
def look(case):
    case.shared("node0.sock").touch()
    return ok(str(subprocess.Popen(["sleep", "600"]).pid))
""")
    assert found.level == "ok" and found.left == []
    assert state_of(int(found.text)) in ("", "Z")


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "a thing that never comes ended with SIGSEGV (no word): do that"),
        ("print('so', flush=True); os._exit(3)", "a thing that never comes ended with exit status 3 (so): do that"),
        ("return 1 / 0", "a thing that never comes ended with exit status 1 (ZeroDivisionError: division by zero)"),
        ("open('/no/such')", "/no/such: No such file or directory: do that"),
        ("raise OSError('it did not')", "it did not: do that"),
        ("raise GeminiError('it broke')", "it broke: do that"),
        ("raise UserError('wrong: correct it')", "wrong: correct it"),
    ],
)
def test_an_error_is_a_problem_in_one_line(body: str, text: str) -> None:
    found = look(f"def look(case):\n    {body}")
    assert found.level == "problem" and found.text.startswith(text)
    assert found.left == []


def test_what_bears_no_mark_is_undone_only_after_a_kill(tmp_path: Path) -> None:
    undo = f"\ndef undo(case):\n    Path({str(tmp_path / 'undone')!r}).touch()\n    return ok('')"
    assert look(f"def look(case):\n    return ok('fine'){undo}").level == "ok"
    assert not (tmp_path / "undone").exists()
    assert look(f"def look(case):\n    time.sleep(600){undo}").level == "problem"
    assert (tmp_path / "undone").exists()


def test_an_undoing_that_hangs_is_told() -> None:
    found = look("def look(case):\n    time.sleep(600)\nundo = look")
    assert found.text == (
        "no a thing that never comes within 3 s; no clearing up after trial within 5 s: remove it by hand: do that"
    )


def test_a_trial_on_a_file_system_that_hangs_is_removed(tmp_path: Path) -> None:
    found = look(
        """
def look(case):
    storage._trial(case).mkdir()
    (storage._trial(case) / "rank-0000.h5").touch()
    time.sleep(600)
undo = storage.remove_trial
""",
        f"site.runs_dir={tmp_path / 'runs'}",
    )
    assert found.level == "problem" and "left" not in found.text
    assert list(tmp_path.iterdir()) == []


def test_a_probe_that_somebody_else_kills_is_undone_too(tmp_path: Path) -> None:
    """As Slurm does, which tells all processes of a job to end."""
    undo = f"\ndef undo(case):\n    Path({str(tmp_path / 'undone')!r}).touch()\n    return ok('')"
    found = look(f"def look(case):\n    os.kill(os.getpid(), signal.SIGTERM)\n    time.sleep(600){undo}")
    assert found.level == "problem" and "ended with SIGTERM" in found.text
    assert (tmp_path / "undone").exists()
