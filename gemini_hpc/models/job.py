"""The example job. `build` is its entry point (`train.entry`), all that a user's own job must have."""

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gemini_hpc import Training
from gemini_hpc.data import open_corpus
from gemini_hpc.data.batches import masked_batch, next_token_batch
from gemini_hpc.data.corpus import Moment
from gemini_hpc.models.bert import MaskedLM
from gemini_hpc.models.gpt2 import GPT2
from gemini_hpc.models.presets import ModelShape, model_shape

if TYPE_CHECKING:
    from gemini_hpc.config import RunConfig

FINAL_LR = 0.1
"""Where the cosine ends, as a share of the highest learning rate."""

MIN_BUCKET_ELEMENTS = 1_000_000
"""ZeRO reduces and prefetches at least this much at once; larger models one hidden x hidden matrix."""


def build(run: "RunConfig") -> Training:
    """Make the model, its optimizer and its data from a run's configuration (every worker, spares too).

    The weights come from torch's global generator, seeded by the library: all ranks start from the same.
    Raises UserError for an unknown model, and for text that is missing or too short.
    """
    shape = model_shape(run.model.family, run.model.preset, run.model.seq_len)
    corpus = open_corpus(run.data).require(shape.seq_len)
    make_batch = next_token_batch if shape.family == "gpt2" else masked_batch
    model = build_model(shape, run.model.dropout)
    optimizer = torch.optim.AdamW(parameter_groups(model, run.model.weight_decay), lr=run.model.lr, betas=(0.9, 0.95))
    schedule = warmup_then_cosine(run.model.warmup_steps, run.train.steps)

    def batch(step: int, rank: int, micro_step: int) -> tuple[Tensor, Tensor]:
        moment = Moment(run.train.seed, step, rank, micro_step)
        return make_batch(corpus, moment, run.train.micro_batch, shape.seq_len)

    def loss(engine: nn.Module, pair: tuple[Tensor, Tensor]) -> Tensor:
        device = next(engine.parameters()).device
        tokens, targets = pair
        return engine(tokens.to(device), targets.to(device))

    return Training(
        model=model,
        optimizer=optimizer,
        config=merged(deepspeed_config(run, shape), run.train.deepspeed),
        loss=loss,
        batch=batch,
        lr_scheduler=torch.optim.lr_scheduler.LambdaLR(optimizer, schedule),
    )


def build_model(shape: ModelShape, dropout: float) -> nn.Module:
    """Build a model of `shape`, with new weights."""
    return GPT2(shape, dropout) if shape.family == "gpt2" else MaskedLM(shape, dropout)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Decay matrices and tables, but not biases and norms (which have one dimension)."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]


def warmup_then_cosine(warmup_steps: int, total_steps: int) -> Callable[[int], float]:
    """Return the learning rate's factor after `done` updates: a line up to 1, then a cosine to FINAL_LR."""

    def factor(done: int) -> float:
        if done < warmup_steps:
            return (done + 1) / warmup_steps
        progress = min(1.0, (done - warmup_steps) / max(1, total_steps - warmup_steps))
        return FINAL_LR + (1 - FINAL_LR) * (1 + math.cos(math.pi * progress)) / 2

    return factor


def deepspeed_config(run: "RunConfig", shape: ModelShape) -> dict[str, Any]:
    """Return DeepSpeed's configuration: ZeRO-3 with buckets of the model's size, and nothing printed."""
    # DeepSpeed's default of 500 million elements is allocated up front.
    bucket = max(MIN_BUCKET_ELEMENTS, shape.hidden**2)
    return {
        "train_micro_batch_size_per_gpu": run.train.micro_batch,
        "gradient_accumulation_steps": run.train.grad_accum,
        "gradient_clipping": run.model.grad_clip,
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": torch.cuda.is_available(),
            "reduce_bucket_size": bucket,
            "stage3_prefetch_bucket_size": bucket,
            # Norms and biases stay whole on every rank: one message each would cost more than their memory.
            "stage3_param_persistence_threshold": 10 * shape.hidden,
        },
        "bf16": {"enabled": run.train.precision == "bf16"},
        "fp16": {"enabled": run.train.precision == "fp16"},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1_000_000_000,
    }


def merged(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Return `ours` with `theirs` laid over it, section by section."""
    result = dict(ours)
    for key, value in theirs.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = merged(result[key], value) if both else value
    return result
