"""Bad input: one line that says what to do, exit status 2, and nothing was touched."""

from pathlib import Path

import pytest

from gemini_hpc.config import dump, load_run
from tests.cluster.runs import call

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(60)]

WRONG = {
    "unknown key": (["trane.steps=3"], "train"),
    "misspelt nested key": (["train.step=3"], "steps"),
    "unknown section of a section": (["model.head.size=3"], "model"),
    "fewer nodes than replicas": (["cluster.nodes=1"], "protect.replicas=1"),
    "fewer nodes by the flag": (["--nodes", "1"], "protect.replicas=1"),
    "negative spares": (["cluster.spares=-1"], "cluster.spares"),
    "negative spares by the flag": (["--spares", "-1"], "cluster.spares"),
    "a model that does not fit": (["model.preset=100b"], "set model.preset="),
    "too little shared memory": (["site.shm_dir=/proc"], "/proc has 0.00 GiB free"),
    "missing text": (["data.path=no/such/text"], "data.path"),
    "an empty folder of text": (["data.path={place}/empty"], "data.path"),
    "unknown preset": (["model.preset=smal"], "small"),
    "unknown preset in a dry run": (["--dry-run", "model.preset=smal"], "small"),
    "more nodes than a checkpoint can name": (["cluster.nodes=5000"], "cluster.nodes"),
    "unknown site": (["--site", "loca"], "local"),
    "a drill after the end": (["train.steps=10", "drills=[{step: 11}]"], "drills.0.step"),
    "a drill on no rank": (["drills=[{step: 5, rank: 9}]"], "drills.0.rank"),
    "a drill without a spare": (["cluster.spares=0", "drills=[{step: 5, rank: 1}]"], "cluster.spares=1"),
    "not a YAML file": (["{place}/not.yaml"], "not.yaml"),
    "a file that is not there": (["{place}/missing.yaml"], "missing.yaml"),
    "two files": (["{place}/a.yaml", "{place}/b.yaml"], "one configuration file"),
    "not a number": (["train.steps=many"], "train.steps"),
    "yes for a number": (["train.steps=true"], "train.steps"),
    "no steps": (["train.steps=0"], "train.steps"),
    "an entry that is not there": (["train.entry=no_such_job:build"], "no_such_job"),
    "an entry without a function": (["train.entry=gemini_hpc"], "MODULE:FUNCTION"),
    "another stage": (["train.deepspeed={zero_optimization: {stage: 2}}"], "zero_optimization.stage must be 3"),
    "a file beside a resumed run": (["{place}/a.yaml", "--resume", "{place}"], "leave out"),
    "more threads than there are": (["train.threads=100000"], "train.threads"),
    "resume of no run": (["--resume", "{place}/empty"], "run directory"),
    "resume of nothing": (["--resume", "{place}/nowhere"], "run directory"),
    "runs under a file": (["site.runs_dir={place}/not.yaml/runs"], "site.runs_dir"),
    "an unset variable": (["site.runs_dir=$NO_SUCH_VARIABLE/runs"], "NO_SUCH_VARIABLE"),
}


@pytest.mark.parametrize("case", WRONG)
def test_submit_refuses(case: str, tmp_path: Path) -> None:
    arguments, hint = WRONG[case]
    (tmp_path / "empty").mkdir()
    (tmp_path / "not.yaml").write_text("train: [unbalanced\n")
    before = sorted(tmp_path.rglob("*"))
    answer = call("submit", *[a.replace("{place}", str(tmp_path)) for a in arguments], cwd=tmp_path)
    assert answer.returncode == 2, answer
    assert answer.stdout == ""
    assert answer.stderr.startswith("error: ") and answer.stderr.count("\n") == 1, answer.stderr
    assert hint in answer.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_submit_does_not_begin_anew_over_checkpoints_that_are_damaged(tmp_path: Path) -> None:
    """All manifests of the run are cut short: what is left of it may still be saved by hand."""
    (tmp_path / "config.yaml").write_text(dump(load_run(site="local")))
    for step in (10, 20):
        folder = tmp_path / "checkpoints" / f"step-{step:08}"
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text('{"step": ')
    before = sorted(tmp_path.rglob("*"))
    answer = call("submit", "--resume", str(tmp_path), cwd=tmp_path)
    assert answer.returncode == 2 and answer.stderr.count("\n") == 1, answer
    assert "no checkpoint of" in answer.stderr and "step-00000020" in answer.stderr
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "arguments",
    [
        ("status", "nowhere"),
        ("status", "."),
        ("drill", "nowhere", "kill-node", "node1"),
        ("drill", "nowhere", "loop"),
        ("drill", "nowhere", "loop", "--mtbf", "soon"),
    ],
    ids=lambda arguments: " ".join(arguments),
)
def test_other_commands_refuse(arguments: tuple[str, ...], tmp_path: Path) -> None:
    answer = call(*arguments, cwd=tmp_path)
    assert answer.returncode == 2 and answer.stdout == ""
    assert answer.stderr.startswith("error: ") and answer.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    answer = call("submit", "--dry-run", "train.steps=7", cwd=tmp_path)
    assert answer.returncode == 0 and answer.stderr == ""
    assert answer.stdout.startswith("#!/bin/bash\n") and "steps: 7" in answer.stdout
    assert list(tmp_path.iterdir()) == []
