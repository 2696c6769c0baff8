"""The example job: what it builds from a configuration, and that it learns."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from gemini_hpc import Training
from gemini_hpc.config import RunConfig
from gemini_hpc.errors import UserError
from gemini_hpc.models.job import build, merged, warmup_then_cosine


def run_of(**sections: dict[str, Any]) -> RunConfig:
    model = {"preset": "tiny", "lr": 3e-3, "warmup_steps": 10, **sections.pop("model", {})}
    return RunConfig.model_validate({"model": model, "drills": [], **sections})


@pytest.fixture
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def losses_of(training: Training, steps: int, ranks: int) -> list[float]:
    """Train in plain torch, a batch being the ranks' batches together."""
    losses = []
    for step in range(1, steps + 1):
        training.optimizer.zero_grad()
        parts = [training.loss(training.model, training.batch(step, rank, 0)) for rank in range(ranks)]
        loss = torch.stack(parts).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(training.model.parameters(), 1.0)
        training.optimizer.step()
        training.lr_scheduler.step()
        losses.append(loss.item())
    return losses


@pytest.mark.usefixtures("one_thread")
def test_tiny_gpt2_learns_the_standard_library() -> None:
    torch.manual_seed(1)
    losses = losses_of(build(run_of(train={"steps": 60})), steps=60, ranks=2)
    assert abs(losses[0] - math.log(256)) < 0.1
    assert sum(losses[-5:]) / 5 < 3.3
    assert all(math.isfinite(loss) for loss in losses)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_the_encoders_learn_too(family: str) -> None:
    torch.manual_seed(1)
    run = run_of(model={"family": family}, train={"steps": 40})
    losses = losses_of(build(run), steps=40, ranks=1)
    assert abs(losses[0] - math.log(256)) < 0.15
    assert sum(losses[-5:]) / 5 < 4.3


@pytest.mark.usefixtures("one_thread")
def test_two_builds_from_one_seed_train_the_same() -> None:
    runs = []
    for _ in range(2):
        torch.manual_seed(1)
        runs.append(losses_of(build(run_of(data={"source": "synthetic"})), steps=3, ranks=1))
    assert runs[0] == runs[1]


def test_every_parameter_is_trained_and_only_matrices_decay() -> None:
    training = build(run_of(data={"source": "synthetic"}))
    decayed, plain = training.optimizer.param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert {p.dim() for p in decayed["params"]} == {2}
    assert {p.dim() for p in plain["params"]} == {1}
    count = len(decayed["params"]) + len(plain["params"])
    assert count == len(list(training.model.parameters()))


def test_the_learning_rate_rises_then_falls() -> None:
    factor = warmup_then_cosine(warmup_steps=4, total_steps=12)
    assert [factor(done) for done in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    falling = [factor(done) for done in range(4, 13)]
    assert falling == sorted(falling, reverse=True)
    assert factor(12) == factor(1000) == pytest.approx(0.1)
    assert warmup_then_cosine(warmup_steps=0, total_steps=1)(0) == 1.0


def test_the_scheduler_state_is_plain_json() -> None:
    state = build(run_of(data={"source": "synthetic"})).lr_scheduler.state_dict()
    assert all(isinstance(value, int | float | bool | list | None) for value in state.values())
    assert state["lr_lambdas"] == [None, None]


def test_the_configuration_is_zero_3_and_the_users_settings_win() -> None:
    overrides = {
        "zero_optimization": {"sub_group_size": 7, "overlap_comm": True},
        "wall_clock_breakdown": True,
    }
    train = {"deepspeed": overrides, "precision": "bf16", "grad_accum": 2}
    config = build(run_of(train=train, data={"source": "synthetic"})).config
    zero = config["zero_optimization"]
    assert (zero["stage"], zero["sub_group_size"], zero["overlap_comm"]) == (3, 7, True)
    assert config["bf16"] == {"enabled": True} and config["fp16"] == {"enabled": False}
    assert config["gradient_accumulation_steps"] == 2
    assert config["wall_clock_breakdown"] is True
    assert "train_batch_size" not in config


def test_merging_leaves_its_arguments_alone() -> None:
    ours, theirs = {"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 9}, "d": {"e": 4}}
    assert merged(ours, theirs) == {"a": {"b": 9, "c": 2}, "d": {"e": 4}}
    assert ours == {"a": {"b": 1, "c": 2}, "d": 3}


def test_bad_input_is_refused_before_anything_is_built(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("too short for a sequence")
    with pytest.raises(UserError, match="too short"):
        build(run_of(data={"path": str(tmp_path / "short.txt")}))
    with pytest.raises(UserError, match="did you mean 'tiny'"):
        build(run_of(model={"preset": "tinny"}))
