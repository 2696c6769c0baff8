"""Build the engine of one worker over a fake group, and build it again in the same process.

DeepSpeed 0.19.8 on torch 2.13; the traps are those of FACTS.md section 2.
"""

import gc
import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch

from gemini_hpc.engine import compiler
from gemini_hpc.engine.capture import Shard
from gemini_hpc.engine.generators import seed_model
from gemini_hpc.engine.training import Training
from gemini_hpc.errors import UserError

with compiler.deferred():
    import deepspeed
    from deepspeed.runtime.zero import parameter_offload, partition_parameters
    from deepspeed.runtime.zero.muon import muon_optimizer  # noqa: F401  initialize() would import it
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

Entry = Callable[[Any], Training]


@dataclass
class Built:
    """An engine, what it was made from, and its shard. `rank`: the one whose initial values it holds."""

    engine: Any
    training: Training
    shard: Shard
    rank: int
    fresh: bool = True  # no update was done and nothing was restored yet


def load_entry(name: str) -> Entry:
    """Find "package.module:function", in the current folder too; UserError when there is none."""
    module_name, _, function = name.partition(":")
    try:
        entry = getattr(importlib.import_module(module_name), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"train.entry {name!r} cannot be loaded ({error}); give module:function") from error
    if not callable(entry):
        raise UserError(f"train.entry {name!r} is a {type(entry).__name__}; give module:function")
    return entry  # type: ignore[no-any-return]


def prepare(threads: int) -> None:
    """Once per process: use `threads` CPU threads, and keep DeepSpeed from compiling and from asking its launcher."""
    torch.set_num_threads(threads)
    # init_distributed on CPU would compile a shared-memory op for 14-80 s. The attribute must be replaced where
    # it is looked up; `deepspeed.comm.torch` as an attribute is the real torch.
    importlib.import_module("deepspeed.comm.torch")
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed refuses to start without it
    os.environ.setdefault("LOCAL_SIZE", "1")  # or it runs numactl in every step to count the devices of a CPU
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]


def build(entry: Entry, run: Any, rank: int) -> Built:
    """Build model and engine as `rank` of the current (fake) group. No peer takes part. About 2 s at first."""
    engine, training = make_engine(entry, run)
    return Built(engine, training, Shard(engine), rank)


def make_engine(entry: Entry, run: Any) -> tuple[Any, Training]:
    """Call the entry point and hand its model to DeepSpeed, in whatever group is the default (all its ranks)."""
    seed_model(run.train.seed)
    training = entry(run)
    if not isinstance(training, Training):
        raise UserError(f"{run.train.entry} returned {type(training).__name__}; return a gemini_hpc.Training")
    if training.config.get("zero_optimization", {}).get("stage") != 3:
        raise UserError("the DeepSpeed configuration must have zero_optimization.stage = 3")
    engine, *_ = deepspeed.initialize(
        model=training.model,
        optimizer=training.optimizer,
        config=dict(training.config),
        lr_scheduler=training.lr_scheduler,
    )
    return engine, training


def destroy(built: Built) -> None:
    """Take an engine apart so that another can be built in this process, and its memory is given back.

    DeepSpeed keeps process-wide state that a second engine trips over: counters of parameters and modules, a
    stack of modules in forward, empty buffers, and a cache that pins every engine ever built.
    """
    built.engine.destroy()
    for attribute in vars(PartitionedParameterCoordinator).values():
        for cell in getattr(attribute, "__closure__", None) or ():  # instrument_w_nvtx hides it in a closure
            if hasattr(cell.cell_contents, "cache_clear"):
                cell.cell_contents.cache_clear()
    partition_parameters.Init.param_id = 0
    counter = parameter_offload.DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__
    if counter and isinstance(counter[0], list):
        counter[0][0] = 0
    parameter_offload.FWD_MODULE_STACK.clear()
    partition_parameters.empty_buffers.clear()
    partition_parameters.temp_contiguous_tensor = None
    built.engine = built.training = built.shard = None
    gc.collect()
