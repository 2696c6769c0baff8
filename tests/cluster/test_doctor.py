"""The command line `doctor`: as a whole, on a terminal, on a Slurm site, with bad input, and when it is ended."""

import json
import os
import pty
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from gemini_hpc.config import load_run
from gemini_hpc.runtime.probes import probes_for
from gemini_hpc.runtime.processes import RUN_MARK, state_of, sweep
from tests.cluster.runs import GONE_S, SHM, START_S, call, command, until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(200)]

MPI = "waiting for: MPI world of 2 window hosts (up to 600 s)"

PATIENT = ["recovery.heartbeat_timeout_s=60", "recovery.world_s=60"]
"""A machine that others use too is slow, and no problem."""


def test_everything_is_tried(tmp_path: Path) -> None:
    answer = call("doctor", "--site", "local", "--json", *PATIENT, cwd=tmp_path)
    assert answer.returncode == 0, answer
    told = json.loads(answer.stdout)
    probes = probes_for(load_run(None, PATIENT, site="local"))
    assert [finding["probe"] for finding in told["findings"]] == [probe.name for probe in probes]
    assert all(finding["level"] in ("ok", "warning") and finding["seconds"] > 0 for finding in told["findings"])
    assert (told["site"], told["kind"], told["notes"]) == ("local", "local", [])
    assert told["verdict"].startswith("0 problems, ")
    numbers = told["numbers"]
    assert (numbers["nodes"], numbers["spares"], numbers["mem_gb"]) == (4, 1, None)
    assert 0 < numbers["snapshot_bytes"] < numbers["arena_bytes"] < numbers["memory_bytes"]
    assert answer.stderr.splitlines() == [
        f"waiting for: {probe.awaits} (up to {probe.bound_s:g} s)" for probe in probes
    ]
    assert list(tmp_path.iterdir()) == []


def _slurm_site(place: Path, *options: str, **programs: str) -> tuple[list[str], dict[str, str]]:
    """Return the arguments and the environment for a Slurm site in whose PATH are programs of these texts."""
    (place / "bin").mkdir()
    for name, text in programs.items():
        (place / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (place / "bin" / name).chmod(0o755)
    (place / "shared").mkdir()
    arguments = command("doctor", "--site", "generic_slurm", f"site.runs_dir={place / 'shared/runs'}", *options)
    return arguments, {**os.environ, "PATH": f"{place / 'bin'}:/usr/bin:/bin"}


MUTE = dict.fromkeys(("sbatch", "srun", "squeue", "scancel"), "")
"""Programs that are there, and say nothing."""


def test_a_slurm_site_shows_what_its_login_node_does(tmp_path: Path) -> None:
    arguments, environment = _slurm_site(tmp_path, "--login-only", **MUTE)
    answer = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=START_S)
    assert answer.returncode == 0 and answer.stderr == "", answer
    lines = answer.stdout.splitlines()
    assert lines[1] == "note     the compute nodes are not probed: this shows what the login node does"
    assert [line.split()[0] for line in lines] == ["site", "note", *["waiting", "ok"] * 3, "numbers", "verdict"]


def test_a_job_that_slurm_does_not_take_is_one_line(tmp_path: Path) -> None:
    refusal = "echo 'sbatch: error: invalid partition specified: gpu' >&2; exit 1"
    arguments, environment = _slurm_site(tmp_path, **{**MUTE, "sbatch": refusal})
    answer = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=START_S)
    assert answer.returncode == 1 and answer.stderr == "", answer
    (found,) = [line for line in answer.stdout.splitlines() if line.startswith("problem")]
    assert found.startswith("problem  job            Slurm did not take the job (sbatch: error: invalid partition")
    assert found.endswith("): correct the site, or try --site local")
    assert list((tmp_path / "shared").iterdir()) == []


def test_a_job_that_does_not_start_in_time_is_cancelled(tmp_path: Path) -> None:
    programs = {
        "sbatch": "echo Submitted batch job 4711",
        "squeue": f"""
            [ -e {tmp_path}/cancelled ] && exit
            case "$*" in *--jobs*) echo PENDING Priority;; *) echo 4711 PENDING;; esac
            """,
        "scancel": f'echo "$@" > {tmp_path}/cancelled',
    }
    arguments, environment = _slurm_site(tmp_path, "--wait-min", "0.02", **{**MUTE, **programs})
    answer = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=START_S)
    assert answer.returncode == 0 and answer.stderr == "", answer
    lines = answer.stdout.splitlines()
    assert "waiting for: job 4711 to start (up to 0.02 min): PENDING (Priority)" in lines
    (found,) = [line for line in lines if line.startswith("warning")]
    assert found.startswith(
        "warning  job            job 4711 did not start within 0.02 min (PENDING (Priority)) and was"
    )
    assert "--name=gemini-doctor-" in (tmp_path / "cancelled").read_text()
    assert list((tmp_path / "shared").iterdir()) == []


def test_a_terminal_is_overwritten_and_a_problem_is_the_exit_status(tmp_path: Path) -> None:
    arguments, environment = _slurm_site(tmp_path)
    shown, terminal = pty.openpty()
    doctor = subprocess.Popen(arguments, env=environment, stdin=subprocess.DEVNULL, stdout=terminal, stderr=terminal)
    os.close(terminal)
    text = b""
    try:
        while piece := os.read(shown, 4096):
            text += piece
    except OSError:  # how a terminal ends
        pass
    assert doctor.wait(START_S) == 1
    lines = text.decode().replace("\r\n", "\n").splitlines(keepends=False)
    waits = [line for line in text.decode().split("\r\n") if line.startswith("waiting for: ")]
    assert len(waits) == 3 and all("\r\x1b[K" in line for line in waits)  # each was followed on the same line
    assert any("\x1b[Kproblem  Slurm          no sbatch, squeue, scancel here: load" in line for line in waits), lines
    assert "note     the compute nodes are not probed: mend the problems of the login node first" in text.decode()
    assert "verdict  1 problem, 0 warnings: mend the problems before you submit" in text.decode()


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["--site", "loca"], "local"),
        (["train.step=3"], "steps"),
        (["model.preset=smal"], "small"),
        (["one.yaml", "two.yaml"], "one configuration file"),
        (["missing.yaml"], "missing.yaml"),
        (["--jason"], "--help"),
        (["--wait-min", "0"], "--login-only"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], hint: str, tmp_path: Path) -> None:
    answer = call("doctor", *arguments, cwd=tmp_path)
    assert answer.returncode == 2 and answer.stdout == ""
    assert answer.stderr.startswith("error: ") and answer.stderr.count("\n") == 1 and hint in answer.stderr
    assert list(tmp_path.iterdir()) == []


def test_its_own_process_stays_light() -> None:
    heavy = "{'torch', 'deepspeed', 'mpi4py', 'numpy', 'h5py'}"
    script = f"import sys, gemini_hpc.doctor; print({heavy} & set(sys.modules))"
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=START_S)
    assert answer.stdout == "set()\n", answer


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_whoever_ends_it_nothing_runs_on(number: int, tmp_path: Path) -> None:
    output = tmp_path / "output"
    (tmp_path / "mpi4py.py").write_text("import time\ntime.sleep(3600)\n")  # hosts start, and never get ready
    paths = f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"
    with output.open("wb") as out:
        doctor = subprocess.Popen(
            command("doctor", "--site", "local", "recovery.world_s=300"),
            env={**os.environ, "PYTHONPATH": paths},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
        )
    try:
        until(lambda: MPI in output.read_text() or doctor.poll() is not None, "the MPI world", START_S)
        hosts = until(lambda: _hosts(doctor.pid), "both window hosts", START_S)
        started = _descendants(doctor.pid)
        (case,) = {process.environ()[RUN_MARK] for process in hosts}
        doctor.send_signal(number)
        status = doctor.wait(GONE_S)
    finally:
        doctor.kill()
        doctor.wait()
    until(lambda: all(state_of(process.pid) in ("", "Z") for process in started), "the end of all", GONE_S)
    if number == signal.SIGKILL:  # what it could not remove itself, the next run's sweep does
        assert status == -signal.SIGKILL and case in sweep(SHM)
    else:
        assert status == 130
    assert list(SHM.glob(f"gemini-{case}*")) == []


def _descendants(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def _hosts(doctor: int) -> list[psutil.Process]:
    """Return the window hosts once both have begun."""
    module = ["-m", "gemini_hpc.windows.host", "1"]
    found = []
    for process in _descendants(doctor):
        with suppress(psutil.NoSuchProcess):
            found += [process] if process.cmdline()[1:] == module else []
    return found if len(found) == 2 else []
