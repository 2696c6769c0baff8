"""The job script: complete, explained, runnable, free of this machine; and the one in sbatch/ is it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gemini_hpc.config import RunConfig, load_run
from gemini_hpc.slurm.script import job_script, probe_script, render_script

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "sbatch" / "gpt2_gemini.sh"


def slurm_run(*overrides: str, nodes: int | None = None, spares: int | None = None) -> RunConfig:
    return load_run(overrides=overrides, nodes=nodes, spares=spares, site="generic_slurm")


def options(text: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH")]


def test_the_script_in_sbatch_is_what_submit_renders() -> None:
    """If this fails, put the script that `submit --dry-run --site ibex` prints into sbatch/gpt2_gemini.sh."""
    assert job_script(load_run(site="ibex"), ["--site", "ibex"]) == SCRIPT.read_text()
    assert os.access(SCRIPT, os.X_OK)


def test_every_option_is_explained() -> None:
    everything = slurm_run(
        "site.mem_gb=1.5", "site.cpus_per_task=2", "site.gpus_per_node=1", "site.slurm_partition=p",
        "site.slurm_constraint=c", "site.slurm_account=a", "site.slurm_additional_parameters.qos=high",
    )  # fmt: skip
    for text in (SCRIPT.read_text(), job_script(everything, [])):
        lines = text.splitlines()
        named = [number for number, line in enumerate(lines) if line.startswith("#SBATCH")]
        assert len(named) >= 9
        assert all(lines[number - 1].startswith("# ") and lines[number - 1].endswith(".") for number in named)
    from_site = [line for line in job_script(everything, []).splitlines() if "site file" in line]
    assert len(from_site) == 1


def test_one_job_of_all_nodes_that_outlives_the_loss_of_one() -> None:
    asked = options(job_script(slurm_run(nodes=6, spares=2), []))
    expected = [
        "--nodes=8",
        "--ntasks-per-node=1",
        "--no-kill",
        "--requeue",
        "--signal=B:USR2@120",
        "--time=60",
    ]
    assert set(expected) <= set(asked)
    assert not any(option.startswith(("--mem", "--wckey", "--partition", "--array")) for option in asked)


def test_a_site_adds_and_takes_away_options() -> None:
    run = slurm_run("site.slurm_additional_parameters={exclusive: true, requeue: false, no-kill: false, qos: a b}")
    asked = options(job_script(run, []))
    assert "--exclusive" in asked
    assert "--qos='a b'" in asked
    assert not any("requeue" in option or "no-kill" in option for option in asked)


def test_probes_ask_for_their_nodes_as_a_run_does_but_for_few_and_once() -> None:
    run = load_run(site="ibex", overrides=["site.slurm_additional_parameters={time: 99, requeue: true, qos: high}"])
    whole, few = options(job_script(run, [])), options(probe_script(run, "gemini-doctor-1", 2, 5))
    of_a_run = ("--job-name", "--nodes", "--time", "--requeue", "--signal")
    assert [option for option in whole if not option.startswith(of_a_run)] == [
        option for option in few if not option.startswith((*of_a_run, "--no-requeue"))
    ]
    assert {"--job-name=gemini-doctor-1", "--nodes=2", "--time=5", "--no-requeue", "--no-kill", "--qos=high"} <= set(
        few
    )
    text = probe_script(run, "gemini-doctor-1", 2, 5)
    lines = text.splitlines()
    assert all(lines[n - 1].startswith("# ") for n, line in enumerate(lines) if line.startswith("#SBATCH"))
    assert "export NCCL_SOCKET_IFNAME=ib0" in text and lines[-1].endswith('probes.job "$1"')


def test_the_script_names_nothing_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for site in ("local", "generic_slurm", "ibex"):
        here = job_script(load_run(site=site), ["--site", site])
        with monkeypatch.context() as elsewhere:
            elsewhere.chdir(tmp_path)
            assert job_script(load_run(site=site), ["--site", site]) == here
        for path in (str(ROOT), sys.prefix, str(Path.home()), str(tmp_path)):
            assert path not in here


def test_hostile_arguments_stay_arguments(tmp_path: Path) -> None:
    """Quotes, braces, newlines and commands in an override reach `submit` as they are; nothing runs them."""
    hostile = [
        "a b.yaml",
        "data.path=/x'y\"z $(touch pwned) `touch pwned`",
        "drills=[{step: 5}]",
        "n=a\ntouch pwned",
        "a ) b",
    ]
    text = job_script(slurm_run(), hostile)
    result = run_with_fake_python(text, tmp_path, [])
    prepared, supervised = result.split("\0\0")[:2]
    assert prepared.split("\0")[4:] == hostile
    assert supervised.split("\0")[-1] == "PREPARED DIR"
    assert not (tmp_path / "pwned").exists()


def test_a_run_directory_as_argument_is_used_as_it_is(tmp_path: Path) -> None:
    (only,) = run_with_fake_python(job_script(slurm_run(), []), tmp_path, ["a 'run' dir"]).split("\0\0")[:-1]
    assert only.split("\0") == ["-u", "-m", "gemini_hpc.runtime.supervisor", "a 'run' dir"]


def test_the_name_of_the_prepared_run_survives_a_requeue(tmp_path: Path) -> None:
    first = run_with_fake_python(job_script(slurm_run(), []), tmp_path, [])
    assert first.split("\0")[:4] == ["-m", "gemini_hpc.submit", "--prepare", "job-77"]
    (tmp_path / "calls").unlink()
    assert run_with_fake_python(job_script(slurm_run(), []), tmp_path, []) == first


def test_nothing_is_supervised_when_preparing_fails(tmp_path: Path) -> None:
    calls = run_with_fake_python(job_script(slurm_run(), []), tmp_path, [], prepare_exit=2)
    assert "supervisor" not in calls


def test_the_supervisor_takes_the_place_of_the_script(tmp_path: Path) -> None:
    """Signals for the batch process reach it: the script has exec'ed it."""
    (tmp_path / "submit.sh").write_text(job_script(slurm_run(), []))
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho $$\n")
    python.chmod(0o755)
    with subprocess.Popen(
        ["bash", "submit.sh", "RUN"], cwd=tmp_path, env={**os.environ, "GEMINI_PYTHON": str(python)},
        stdout=subprocess.PIPE, text=True,
    ) as script:  # fmt: skip
        output, _ = script.communicate(timeout=30)
    assert int(output) == script.pid


def test_setup_lines_run_before_python(tmp_path: Path) -> None:
    text = job_script(slurm_run("site.slurm_setup=['export GEMINI_PYTHON=./other', 'unset NOT_SET']"), [])
    assert text.index("./other") < text.index("set -eu") < text.index("gemini_hpc.submit --prepare")


def test_shellcheck_finds_nothing(tmp_path: Path) -> None:
    shellcheck = shutil.which("shellcheck") or str(Path(sys.executable).with_name("shellcheck"))
    for number, text in enumerate([SCRIPT.read_text(), job_script(load_run(site="local"), ["x=a b"])]):
        (tmp_path / f"{number}.sh").write_text(text)
        done = subprocess.run([shellcheck, f"{number}.sh"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout


def test_a_misspelt_parameter_is_an_error() -> None:
    known = {"job_name": "x", "arguments": [], "active": 1, "spares": 0, "python": "python", "timeout_min": 1}
    with pytest.raises(TypeError, match="constrait"):
        render_script(**known, signal_delay_s=1, constrait="a")  # type: ignore[call-arg, arg-type]


def run_with_fake_python(text: str, folder: Path, arguments: list[str], prepare_exit: int = 0) -> str:
    """Run a job script with a program in Python's place that only writes down how it was called."""
    (folder / "submit.sh").write_text(text)
    python = folder / "fake python"
    python.write_text(
        '#!/bin/bash\nprintf "%s\\0" "$@" >> calls; printf "\\0" >> calls\n'
        f'case "$*" in *--prepare*) echo "PREPARED DIR"; exit {prepare_exit};; esac\n'
    )
    python.chmod(0o755)
    environment = {**os.environ, "GEMINI_PYTHON": str(python), "SLURM_JOB_ID": "77"}
    done = subprocess.run(["bash", "submit.sh", *arguments], cwd=folder, env=environment, timeout=30)
    assert done.returncode == prepare_exit
    return (folder / "calls").read_text()
