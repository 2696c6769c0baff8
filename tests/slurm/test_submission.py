"""Jobs through submitit: real processes and signals on this machine, a stand-in for the programs of Slurm."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from gemini_hpc.config import RunConfig, load_run
from gemini_hpc.errors import UserError
from gemini_hpc.slurm.submission import Job, submit_job

LISTENER = """
import os, signal, sys
from pathlib import Path
log = Path(sys.argv[1]) / "heard"
deaf = "deaf" in sys.argv[1]
def hear(number, _):
    with log.open("a") as file: file.write(signal.Signals(number).name + "\\n")
    if number == signal.SIGTERM and not deaf: sys.exit(0)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGHUP): signal.signal(number, hear)
print("started", os.getpid(), os.environ["GEMINI_PYTHON"], flush=True)
log.touch()
while True: signal.pause()
"""


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run directory, in a path that needs quoting, whose job writes down the signals that it gets."""
    path = tmp_path / "a 'run' $dir"
    return listener_in(path)


def listener_in(path: Path) -> Path:
    path.mkdir()
    (path / "listen.py").write_text(LISTENER)
    (path / "submit.sh").write_text('#!/bin/bash\nexec "$GEMINI_PYTHON" "$1/listen.py" "$1"\n')
    return path


@pytest.fixture
def submit() -> Iterator[Callable[..., Job]]:
    """submit_job, of whose processes none is left after the test."""
    jobs: list[Job] = []

    def submitted(config: RunConfig, run_dir: Path) -> Job:
        jobs.append(submit_job(config, run_dir))
        return jobs[-1]

    yield submitted
    for job in jobs:
        job.cancel(grace_s=0.0)


def local(*overrides: str) -> RunConfig:
    return load_run(site="local", overrides=overrides)


def until(condition: Callable[[], object], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.01)


def supervisor(job: Job, run_dir: Path) -> psutil.Process:
    """The job's process, once it listens."""
    until((run_dir / "heard").exists)
    return psutil.Process(int(job.log.read_text().split()[1]))


def heard(run_dir: Path) -> list[str]:
    return (run_dir / "heard").read_text().split()


def test_cancel_reaches_the_job_as_sigterm_and_nothing_else(submit: Callable[..., Job], run_dir: Path) -> None:
    job = submit(local(), run_dir)
    process = supervisor(job, run_dir)
    assert not job.done()
    assert not job.wait(timeout_s=0.05)
    assert job.cancel(grace_s=20.0)
    assert job.done()
    assert not process.is_running()
    assert heard(run_dir) == ["SIGTERM"]
    assert job.cancel(grace_s=0.0), "a job that has ended can be cancelled again"


def test_a_job_that_does_not_listen_is_killed_with_its_children(submit: Callable[..., Job], tmp_path: Path) -> None:
    run_dir = listener_in(tmp_path / "deaf")
    job = submit(local(), run_dir)
    process = supervisor(job, run_dir)
    assert not job.cancel(grace_s=0.2)
    assert job.done()
    until(lambda: not process.is_running() or process.status() == psutil.STATUS_ZOMBIE)
    assert heard(run_dir) == ["SIGTERM"]


def test_the_job_runs_the_script_on_our_python_with_its_log_where_submitit_users_look(
    submit: Callable[..., Job], run_dir: Path
) -> None:
    job = submit(local(), run_dir)
    supervisor(job, run_dir)
    assert job.log == run_dir / "logs" / "submitit" / f"{job.id}_0_log.out"
    assert f" {sys.executable} " in f" {job.log.read_text()} ".replace("\n", " ")


def test_the_job_has_left_the_terminal(submit: Callable[..., Job], run_dir: Path) -> None:
    """Ctrl-C and a hang-up go to the session of the terminal; a pipe after `submit` ends with `submit`."""
    job = submit(local(), run_dir)
    process = supervisor(job, run_dir)
    assert os.getsid(process.pid) == os.getsid(int(job.id)) != os.getsid(0)
    ours = {os.readlink(f"/proc/self/fd/{number}") for number in (0, 1, 2)} - {os.devnull}
    for pid in (process.pid, int(job.id)):
        assert not ours & {os.readlink(f"/proc/{pid}/fd/{number}") for number in (0, 1, 2)}


def test_the_end_of_the_time_is_announced_by_usr2(submit: Callable[..., Job], run_dir: Path) -> None:
    """One minute is the shortest limit; the warning comes signal_delay_s before it."""
    job = submit(local("site.timeout_min=1", "site.signal_delay_s=59"), run_dir)
    supervisor(job, run_dir)
    until(lambda: heard(run_dir) == ["SIGUSR2"])
    assert not job.done()


def test_a_job_that_ends_by_itself(submit: Callable[..., Job], tmp_path: Path) -> None:
    (tmp_path / "submit.sh").write_text("echo out; echo err >&2; exit 3\n")
    job = submit(local(), tmp_path)
    assert job.wait(timeout_s=20.0)
    assert job.log.read_text().split() == ["out", "err"]


def test_the_job_outlives_whoever_submitted_it(run_dir: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from gemini_hpc.config import load_run\n"
        "from gemini_hpc.slurm.submission import submit_job\n"
        "print(submit_job(load_run(site='local'), Path(sys.argv[1])).id)"
    )
    # a pipe to us is closed as soon as the submitting process ends: communicate() returns
    done = subprocess.run(
        [sys.executable, "-c", code, str(run_dir)], stdout=subprocess.PIPE, text=True, timeout=30, check=True
    )
    controller = psutil.Process(int(done.stdout))
    try:
        until((run_dir / "heard").exists)
        assert controller.is_running()
        assert controller.children()
    finally:
        controller.send_signal(signal.SIGTERM)
        with suppress(psutil.TimeoutExpired):
            controller.wait(timeout=20)
    assert heard(run_dir) == ["SIGTERM"]


# --- Slurm: programs in its place, which write down how they were called --------------------------------


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder first on PATH; `program` writes programs into it."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    program(folder, "srun", "")
    program(folder, "sbatch", "echo Submitted batch job 4711")
    return folder


def program(folder: Path, name: str, body: str) -> None:
    path = folder / name
    path.write_text(f'#!/bin/bash\nprintf "%s\\n" "$@" > "{folder}/{name}.called"\n{body}\n')
    path.chmod(0o755)


def called(folder: Path, name: str) -> list[str]:
    return (folder / f"{name}.called").read_text().splitlines()


def on_slurm(*overrides: str) -> RunConfig:
    return load_run(site="generic_slurm", overrides=overrides)


def test_sbatch_gets_the_script_and_the_run_directory(slurm: Path, run_dir: Path) -> None:
    job = submit_job(on_slurm(), run_dir)
    assert job.id == "4711"
    assert job.log == run_dir / "logs" / "submitit" / "4711_0_log.out"
    *options, script, argument = called(slurm, "sbatch")
    assert f"--output={run_dir}/logs/submitit/%j_0_log.out" in options
    assert Path(script).read_text() == (run_dir / "submit.sh").read_text()
    assert argument == str(run_dir)
    assert not list(run_dir.rglob("*.pkl"))


@pytest.mark.parametrize(
    ("state", "done"),
    [
        ("echo RUNNING", False),
        ("echo PENDING", False),
        ("echo COMPLETING", False),
        ("true", True),
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", True),
        ("echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1", False),
        ("sleep 30", False),
    ],
)
def test_a_job_is_done_when_squeue_says_so(slurm: Path, run_dir: Path, state: str, done: bool) -> None:
    job = submit_job(on_slurm("site.call_timeout_s=2"), run_dir)
    program(slurm, "squeue", state.replace("sleep", "exec sleep"))
    assert job.done() is done
    assert "--jobs=4711" in called(slurm, "squeue")


def test_cancel_is_scancel(slurm: Path, run_dir: Path) -> None:
    job = submit_job(on_slurm(), run_dir)
    program(slurm, "squeue", f'test -e "{slurm}/scancel.called" || echo RUNNING')
    program(slurm, "scancel", "")
    assert not job.done()
    assert job.cancel(grace_s=5.0)
    assert called(slurm, "scancel") == ["4711"]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (
            "echo 'sbatch: error: invalid partition specified: gpu' >&2; exit 1",
            "invalid partition specified: gpu",
        ),
        ("exec sleep 30", "no answer in 0.5 s"),
        ("echo what", "Could not make sense"),
    ],
)
def test_a_refusal_is_one_line(slurm: Path, run_dir: Path, answer: str, words: str) -> None:
    program(slurm, "sbatch", answer)
    with pytest.raises(UserError, match=words) as caught:
        submit_job(on_slurm("site.call_timeout_s=0.5"), run_dir)
    assert "\n" not in str(caught.value)


def test_no_slurm_here(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="--site local"):
        submit_job(on_slurm(), run_dir)
