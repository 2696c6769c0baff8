"""A job too small to learn anything, with one of everything that a snapshot has to carry."""

from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn
from torch.nn import functional

from gemini_hpc.engine.training import Training

WORDS = 17
WIDTH = 10  # no parameter's size is a multiple of 2 and 3 ranks at once: the last rank's shard is padded


@dataclass(frozen=True)
class Case:
    """What differs between the jobs of the tests."""

    precision: str = "fp32"
    grad_accum: int = 1
    grad_clip: float = 0.0
    persist: int = 0  # parameters up to this many elements stay whole on every rank
    sub_group: int = 1_000_000_000
    overlap: bool = False
    dropout: float = 0.0
    groups: int = 1
    frozen: bool = False
    tied: bool = False
    buffer: str = ""  # the type of the buffer's numbers; empty: no buffer
    schedule: str = "lambda"  # or multistep: its state has numbers as keys
    hpz: int = 1  # ranks of a group that keeps a second copy of the parameters
    seed: int = 1


def run_of(case: Case, entry: str = "tests.engine.job:build") -> Any:
    return SimpleNamespace(train=SimpleNamespace(seed=case.seed, entry=entry), case=case)


def case_of(fields: dict[str, Any]) -> Case:
    return Case(**fields)


def fields_of(case: Case) -> dict[str, Any]:
    return asdict(case)


class Block(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.expand = nn.Linear(WIDTH, 2 * WIDTH)
        self.contract = nn.Linear(2 * WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.contract(functional.gelu(self.expand(self.norm(x)))))


class Model(nn.Module):
    """A few residual blocks; with `buffer`, a running mean that the output depends on."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList(Block(case.dropout) for _ in range(3))
        self.head = nn.Linear(WIDTH, WORDS, bias=not case.tied)
        if case.tied:
            self.head.weight = self.words.weight
        if case.frozen:
            self.blocks[0].requires_grad_(False)
        self.averaging = bool(case.buffer)
        if case.buffer:
            self.register_buffer("mean", torch.zeros(WIDTH, dtype=getattr(torch, case.buffer)))

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.words(tokens)
        for block in self.blocks:
            x = block(x)
        if self.averaging:
            self.mean.mul_(0.5).add_(x.detach().mean((0, 1)).to(self.mean.dtype), alpha=0.5)
            x = x + self.mean.to(x.dtype)
        return functional.cross_entropy(self.head(x).flatten(0, 1).float(), targets.flatten())


def build(run: Any) -> Training:
    case: Case = run.case
    if case.precision == "fp16":  # DeepSpeed refuses on a processor where it is slow
        get_accelerator().is_fp16_supported = lambda: True
        get_accelerator().supported_dtypes = lambda: [torch.float, torch.half, torch.bfloat16]
    model = Model(case)
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": trained}]
    if case.groups == 2:
        groups = [
            {"params": [p for p in trained if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in trained if p.dim() == 1], "weight_decay": 0.0},
        ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    schedulers = torch.optim.lr_scheduler
    schedule: Any = schedulers.LambdaLR(optimizer, lambda done: (done + 1) / 6 if done < 6 else 0.9)
    if case.schedule == "multistep":
        schedule = schedulers.MultiStepLR(optimizer, [3, 6, 7], gamma=0.5)
    return Training(
        model=model,
        optimizer=optimizer,
        config=config_of(case),
        loss=lambda engine, batch: engine(*batch),
        batch=batch,
        lr_scheduler=schedule,
    )


def config_of(case: Case) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": case.grad_accum,
        "gradient_clipping": case.grad_clip,
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": case.overlap,
            "reduce_bucket_size": 500,
            "stage3_prefetch_bucket_size": 500,
            "stage3_param_persistence_threshold": case.persist,
            "sub_group_size": case.sub_group,
            "zero_hpz_partition_size": case.hpz,
        },
        "bf16": {"enabled": case.precision == "bf16"},
        "fp16": {"enabled": case.precision == "fp16", "initial_scale_power": 20, "loss_scale_window": 3},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1_000_000_000,
    }


def batch(step: int, rank: int, micro_step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step * 10_000 + rank * 100 + micro_step)
    tokens = torch.randint(0, WORDS, (2, 6), generator=generator)
    return tokens, (tokens * 7 + 3) % WORDS


def build_sgd(run: Any) -> Training:
    """An optimizer without moments."""
    return _changed(build(run), optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.1))


def build_amsgrad(run: Any) -> Training:
    return _changed(build(run), optimizer=lambda model: torch.optim.AdamW(model.parameters(), amsgrad=True))


def build_tensor_lr(run: Any) -> Training:
    return _changed(build(run), optimizer=lambda model: torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.1)))


def build_odd_schedule(run: Any) -> Training:
    """A scheduler whose state no snapshot can carry."""
    training = build(run)
    training.lr_scheduler.helper = object()
    return training


def build_stage_2(run: Any) -> Training:
    training = build(run)
    training.config["zero_optimization"]["stage"] = 2
    return training


def build_nothing(run: Any) -> Any:
    """What a user gets wrong first: the entry point returns the model."""
    return build(run).model


def _changed(training: Training, optimizer: Any) -> Training:
    return Training(training.model, optimizer(training.model), training.config, training.loss, training.batch)
