"""A training whose layers compute nothing: they wait, as a processor does while its accelerator computes.

The gathers, the reductions and the update of a ZeRO-3 GPT-2 are real, and real bytes cross the network. With
arithmetic in place of the pauses, processors that are shared with others would decide how long a step takes.
"""

import time
from dataclasses import replace
from typing import Any

import torch

from gemini_hpc import Training
from gemini_hpc.data import open_corpus
from gemini_hpc.data.batches import next_token_batch
from gemini_hpc.data.corpus import Moment
from gemini_hpc.models import job
from gemini_hpc.models.presets import model_shape

SHAPE = replace(model_shape("gpt2", "tiny", seq_len=32), hidden=64, intermediate=256, layers=6)
FORWARD_S = 0.030
"""Of each layer; its backward pass takes twice as long."""


class Pause(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        time.sleep(FORWARD_S)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        time.sleep(2 * FORWARD_S)
        return gradient


def build(run: Any) -> Training:
    corpus = open_corpus(run.data).require(SHAPE.seq_len)
    model = job.build_model(SHAPE, dropout=0.0)
    for block in model.blocks:
        block.register_forward_hook(lambda _block, _inputs, output: Pause.apply(output))
    config = job.deepspeed_config(run, SHAPE)
    layer = 12 * SHAPE.hidden**2
    config["zero_optimization"] |= {
        "reduce_bucket_size": layer,
        "stage3_prefetch_bucket_size": layer,
        "stage3_param_persistence_threshold": 0,
    }
    return Training(
        model=model,
        optimizer=torch.optim.AdamW(job.parameter_groups(model, 0.1), lr=1e-3),
        config=config,
        loss=lambda engine, pair: engine(*pair),
        batch=lambda step, rank, micro_step: next_token_batch(
            corpus, Moment(run.train.seed, step, rank, micro_step), run.train.micro_batch, SHAPE.seq_len
        ),
    )
