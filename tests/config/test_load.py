"""What the user types becomes one frozen configuration, or one line that says what to type instead."""

import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError

from gemini_hpc.config import Drill, RunConfig, dump, load_run, read_run
from gemini_hpc.errors import UserError


def refused(*overrides: str, **flags: object) -> str:
    """The one line with which `overrides` are refused."""
    with pytest.raises(UserError) as caught:
        load_run(overrides=overrides, site="local", **flags)  # type: ignore[arg-type]
    line = str(caught.value)
    assert "\n" not in line
    return line


def test_the_defaults_are_the_main_job() -> None:
    run = load_run(site="local")
    assert (run.cluster.nodes, run.cluster.spares, run.protect.replicas) == (4, 1, 2)
    assert run.drills == (Drill(step=60, phase="backward", rank=2, action="kill_node"),)
    assert (run.train.steps, run.verify, run.site.kind) == (120, True, "local")


@pytest.mark.parametrize(("site", "path"), [("local", "/a b/ü"), ("generic_slurm", "[/a b, ü]"), ("ibex", "null")])
def test_what_is_written_loads_back_as_an_equal_object(tmp_path: Path, site: str, path: str) -> None:
    run = load_run(
        overrides=[
            "model.lr=3e-5",
            "name=a.b-c",
            f"data.path={path}",
            "train.deepspeed.x.y=5e8",
            "drills=[{step: 9}]",
            "drills.0.step=7",
        ],
        site=site,
    )
    (tmp_path / "config.yaml").write_text(dump(run))
    assert load_run(tmp_path / "config.yaml") == run
    assert read_run(tmp_path) == run


def test_later_settings_win(tmp_path: Path) -> None:
    file = tmp_path / "my.yaml"
    file.write_text("train: {steps: 10, seed: 5}\ncluster: {nodes: 3}\nsite: ibex\ndrills: []\n")
    run = load_run(file, ["train.steps=20", "site.timeout_min=7"], nodes=6, spares=2)
    assert (run.train.steps, run.train.seed) == (20, 5)
    assert (run.cluster.nodes, run.cluster.spares) == (6, 2)
    assert (run.site.name, run.site.timeout_min) == ("ibex", 7)
    assert load_run(file, site="local").site.kind == "local"


def test_values_of_overrides_are_yaml() -> None:
    run = load_run(
        overrides=[
            "verify=false",
            "data.path=null",
            "model.lr=1e-4",
            "train.deepspeed={a: [1, 2]}",
            "train.deepspeed.b=1e3",
            "drills=[{step: 3, action: kill_worker}]",
            "drills.0.rank=1",
        ],
        site="local",
    )
    assert (run.verify, run.data.path, run.model.lr) == (False, None, 1e-4)
    assert run.train.deepspeed == {"a": [1, 2], "b": 1000.0}
    assert run.drills == (Drill(step=3, rank=1, action="kill_worker"),)


def test_off_is_a_mode_and_not_no() -> None:
    """YAML reads a bare `off` as false."""
    assert load_run(overrides=["protect.mode=off"], site="local").protect.mode == "off"
    with pytest.raises(UserError, match=r"protect\.mode"):
        load_run(overrides=["protect.mode=on"], site="local")


def test_the_default_drill_fits_the_run() -> None:
    assert load_run(overrides=["train.steps=30"], nodes=2, site="local").drills == (Drill(step=15, rank=1),)
    assert load_run(overrides=["drills.0.phase=forward", "train.steps=30"], site="local").drills[0].step == 15
    assert load_run(spares=0, site="local").drills == ()
    assert load_run(overrides=["train.steps=1"], site="local").drills == ()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.stpes=3", ["unknown key 'stpes' in train", "did you mean steps", "seed"]),
        ("nmae=x", ["unknown key 'nmae'", "did you mean name", "cluster"]),
        ("drills=[{step: 3, rnk: 1}]", ["'rnk' in drills.0", "did you mean rank", "phase"]),
        ("site.runs=x", ["'runs' in site", "did you mean runs_dir"]),
        ("qqq.zzz=1", ["unknown key 'qqq'", "valid are name, train"]),
        ("train.steps=many", ["train.steps", '"many"', "a whole number", "train.steps=120"]),
        ("train.steps=0", ["train.steps", "0", "at least 1"]),
        ("train.steps=2.5", ["train.steps", "2.5", "a whole number"]),
        ("train.steps=null", ["train.steps", "null", "a whole number"]),
        ("model.lr=.nan", ["model.lr", "a finite number"]),
        ("model.lr=0", ["model.lr", "more than 0"]),
        ("model.dropout=1", ["model.dropout", "less than 1"]),
        ("protect.mode=maybe", ["protect.mode", '"maybe"', "'immediate', 'interleaved', 'blocking' or 'off'"]),
        ("verify=maybe", ["verify", '"maybe"', "true or false"]),
        ("train.precision=fp8", ["train.precision", "'fp32', 'bf16' or 'fp16'"]),
        ("train.entry=nothing", ["train.entry", "MODULE:FUNCTION"]),
        ("train=3", ["train", "a mapping of keys to values"]),
        ("name=[a]", ["name", '["a"]', "text"]),
        ("name=../up", ["name", '"../up"']),
        ("drills=3", ["drills", "a list"]),
        ("drills.4.step=3", ["no item '4'", "0 to 0"]),
        ("drills=[{rank: 1}]", ["drills.0.step is missing"]),
        ("drills=[{step: 121}]", ["drills.0.step is 121", "train.steps is 120", "drills=[]"]),
        ("drills=[{step: 1, rank: 4}]", ["drills.0.rank is 4", "0 to 3", "drills=[]"]),
        ("protect.replicas=5", ["protect.replicas is 5", "cluster.nodes is 4", "cluster.nodes=5"]),
        ("recovery.heartbeat_timeout_s=0.1", ["heartbeat_timeout_s", "two heartbeats"]),
        ("recovery.heartbeat_s=0.3", ["suspect_s", "two heartbeats of 0.3 s", "recovery.suspect_s=1.2"]),
        ("cluster.spares=-1", ["cluster.spares", "at least 0"]),
        ("train.steps", ["not an override", "key=value"]),
        ("train..steps=3", ["not an override"]),
        ("train.steps=[1", ["train.steps=[1", "not YAML"]),
        ("site.runs_dir=$NOT_SET_ANYWHERE/x", ["NOT_SET_ANYWHERE", "set the variable"]),
        ("site.slurm_additional_parameters.qos=[1]", ["qos", "no sbatch option"]),
        ("site.slurm_additional_parameters.array=0-3", ["array", "each job does a run of its own"]),
        ("site.slurm_additional_parameters={ntasks-per-node: 2}", ["ntasks-per-node", "leave it out"]),
        ("site.mem_gb=0.0001", ["site.mem_gb", "at least 0.5"]),
        ("site.slurm_partition='a\n\nb'", ["site.slurm_partition"]),
    ],
)
def test_a_mistake_is_one_line_that_names_it(override: str, words: list[str]) -> None:
    line = refused(override)
    assert all(word in line for word in words), line


def test_counts_that_cannot_be() -> None:
    assert "protect.replicas is 2 but cluster.nodes is 1" in refused(nodes=1)
    assert "cluster.nodes" in refused(nodes=0)
    assert "cluster.spares" in refused(spares=-1)
    assert "cluster.spares=1" in refused("drills=[{step: 9, rank: 1}]", spares=0)


def test_several_mistakes_are_counted() -> None:
    assert refused("train.stpes=3", "model.lr=x", "name=7").endswith("(and 2 more)")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"train: {steps: [}", ["line 1", "not YAML"]),
        (b"train:\n  steps: 3\n  steps: 4\n", ["'steps' stands twice"]),
        (b"- a\n", ["not a mapping"]),
        (b"3: a\n", ["not a mapping"]),
        (b"\xff\xfe\x00", ["not a text file"]),
        (b"name: !!python/name:os.system x\n", ["not YAML"]),
        (b"train:\n", ["train is null", "a mapping"]),
        (b"stpes: 3\n", ["unknown key 'stpes'"]),
    ],
)
def test_a_file_that_is_wrong(tmp_path: Path, content: bytes, words: list[str]) -> None:
    file = tmp_path / "my.yaml"
    file.write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_run(file, site="local")
    line = str(caught.value)
    assert str(file) in line
    assert "\n" not in line
    assert all(word in line for word in words), line


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        load_run(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="Is a directory"):
        load_run(tmp_path)
    with pytest.raises(UserError, match="not a run directory"):
        read_run(tmp_path)


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("# nothing yet\n")
    assert load_run(tmp_path / "empty.yaml", site="local") == load_run(site="local")


def test_a_configuration_cannot_be_changed() -> None:
    run = load_run(site="local")
    with pytest.raises(ValidationError):
        run.train.steps = 3  # type: ignore[misc]


def test_every_field_says_what_it_means() -> None:
    def undocumented(model: type[BaseModel]) -> list[str]:
        found = [f"{model.__name__}.{name}" for name, field in model.model_fields.items() if not field.description]
        parts = (
            [type(getattr(load_run(site="local"), name)) for name in model.model_fields] if model is RunConfig else []
        )
        return found + [hit for part in parts if issubclass(part, BaseModel) for hit in undocumented(part)]

    assert undocumented(RunConfig) + undocumented(Drill) == []


def test_the_configuration_loads_no_heavy_library() -> None:
    heavy = "{'torch', 'numpy', 'submitit', 'mpi4py', 'zmq'}"
    code = f"import sys, gemini_hpc.config, gemini_hpc.config.capacity; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "set()"


def test_more_gpus_than_a_user_may_hold_are_refused_with_the_spares_counted() -> None:
    assert load_run(site="ibex", nodes=20, spares=4).cluster.nodes == 20
    with pytest.raises(UserError, match=r"takes 25 GPUs, those of its 5 spares included.* lets a user hold 24"):
        load_run(site="ibex", nodes=20, spares=5)
