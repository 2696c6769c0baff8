"""Bring a ZeRO-3 engine that was interrupted anywhere inside a step back to a step boundary.

DeepSpeed 0.19.8: the names below are its private ones; `versions.mismatch` guards their use. Parameter values
need no care here, `capture.Shard.restore` writes all of them.
"""

import collections
from typing import Any

import torch
from deepspeed.runtime.base_optimizer import BackwardHookStateManager
from deepspeed.runtime.zero import parameter_offload
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

_COORDINATOR = "_PartitionedParameterCoordinator__"


def reset(engine: Any) -> None:
    """Forget the step in flight (one rank, no collective). For a survivor, before the new group is used."""
    zero = engine.optimizer
    _reset_fetching(zero.parameter_offload.get_param_coordinator())
    _reset_parameters(engine.module)
    _reset_gradients(zero)
    engine._running_engine_backward = False
    engine._running_engine_backward_count = 0
    engine._running_engine_step = False
    parameter_offload.FWD_MODULE_STACK.clear()


def adopt(engine: Any, rank: int) -> None:
    """Make an engine that was built as another rank `rank`'s (one rank, no collective)."""
    engine.global_rank = rank
    zero = engine.optimizer
    for parameter in engine.module.parameters():
        parameter.ds_zero_partition_rank = rank
    last = rank == zero.partition_count - 1
    zero.groups_padding = [[p.padding_size() if last else 0 for p in group] for group in zero.fp16_groups]


def _reset_fetching(coordinator: Any) -> None:
    """Drop gathers in flight and the recorded trace; the next step records it anew, with the same result."""
    getattr(coordinator, _COORDINATOR + "inflight_param_registry").clear()
    if not coordinator.is_invalid_trace():
        coordinator._invalidate_trace()
    setattr(coordinator, _COORDINATOR + "step_id", 0)
    setattr(coordinator, _COORDINATOR + "n_available_params", 0)
    setattr(coordinator, _COORDINATOR + "param_queue", collections.deque())
    getattr(coordinator, _COORDINATOR + "active_backward_submodules").clear()
    getattr(coordinator, _COORDINATOR + "ongoing_fetch_events").clear()
    getattr(coordinator, _COORDINATOR + "ongoing_fetch_leaf_module_events").clear()


def _reset_parameters(module: torch.nn.Module) -> None:
    for parameter in module.parameters():
        parameter.grad = None
        parameter.ds_active_sub_modules.clear()
        # persistent ones stay whole, but for those whose gathering was interrupted, as at the end of a restore
        whole = parameter.ds_persist and parameter.ds_status is ZeroParamStatus.AVAILABLE
        if parameter.ds_status is not ZeroParamStatus.NOT_AVAILABLE and not whole:
            parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
            parameter.ds_status = ZeroParamStatus.NOT_AVAILABLE
    for submodule in module.modules():
        if hasattr(submodule._parameters, "_in_forward"):
            submodule._parameters._in_forward = False


def _reset_gradients(zero: Any) -> None:
    for bucket in zero.ipg_buckets.values():
        bucket.clear_params()
    zero.averaged_gradients = {}
    zero.norm_for_param_grads = {}
    zero.previous_reduced_grads = None
    zero.params_already_reduced = dict.fromkeys(zero.params_already_reduced, False)
    zero.micro_step_id = 0
    zero._epilogue_ran_this_backward = False
    for value in vars(zero).values():
        if isinstance(value, BackwardHookStateManager):
            hooks = value._grad_acc_post_hooks
            value.__init__()  # type: ignore[misc]
            value._grad_acc_post_hooks = hooks
