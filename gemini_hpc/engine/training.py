"""The public API: what a user's entry point returns, and the one training step made from it."""

from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch

from gemini_hpc.engine.generators import seed_step


@dataclass(frozen=True)
class Training:
    """A training effort, as a user describes it.

    An entry point `build(run) -> Training` (configuration key `train.entry`) is called in every worker, on spare
    nodes too, and again when an engine is rebuilt. It must be deterministic: all randomness, here and in the steps,
    comes from torch's, numpy's and Python's global generators. They are seeded with `train.seed` before the call, and
    again before every step, by that, the step and the rank.

    The training loop belongs to the library, because after a failure it goes on from an earlier step, possibly
    as another rank. So data is a function of the step rather than an iterator.
    """

    model: torch.nn.Module
    """The whole model, built outside `deepspeed.zero.Init` (FACTS.md section 2). Its state beside the parameters is
    what its `state_dict()` has: attributes and buffers that are not persistent are lost with the process."""

    optimizer: torch.optim.Optimizer
    """Adam or AdamW over the model's parameters: state that lies beside each parameter."""

    config: dict[str, Any]
    """DeepSpeed's configuration, ZeRO stage 3, without `train_batch_size`."""

    loss: Callable[[torch.nn.Module, Any], torch.Tensor]
    """loss(engine, batch): the forward pass of one micro-batch; returns a scalar tensor."""

    batch: Callable[[int, int, int], Any]
    """batch(step, rank, micro_step): a pure function, steps counted from 1; the same arguments give the same bits."""

    lr_scheduler: Any = None
    """A torch learning-rate scheduler, stepped by DeepSpeed once per optimizer update."""


def train_step(
    engine: Any,
    training: Training,
    seed: int,
    step: int,
    rank: int,
    agree: Callable[[], None] = lambda: None,
) -> float:
    """Do optimizer update `step` (all ranks); return this rank's loss, averaged over its micro-batches.

    `agree` is called before the last backward pass, and again once all gradients are there: it may begin a collective.
    Blocks on the collectives of the engine's group and raises what they raise when a peer is lost.
    """
    seed_step(seed, step, rank)
    losses = []
    micro_steps = engine.gradient_accumulation_steps()
    for micro_step in range(micro_steps):
        is_last = micro_step == micro_steps - 1
        loss = training.loss(engine, training.batch(step, rank, micro_step))
        if is_last:
            agree()
        engine.backward(loss)
        if is_last:
            agree()
        engine.step()
        losses.append(loss.detach().float())
    return float(torch.stack(losses).mean())


def not_finite(engine: Any, loss: float) -> str:
    """Say what in the step just done was NaN or infinite; empty when nothing was.

    DeepSpeed 0.19.8 leaves out an update whose gradient norm is not finite, on all ranks, in any precision, and goes
    on. With fp16 that is how its loss scale finds its place, and counts for nothing here.
    """
    if engine.fp16_enabled():
        return ""
    if not isfinite(loss):
        return f"the loss is {loss}"
    return "a gradient is not finite" if engine.optimizer.overflow else ""
