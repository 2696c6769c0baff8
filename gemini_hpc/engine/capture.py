"""A ZeRO-3 rank's shard: copied into a snapshot, and restored from one in place.

What is copied is 12 bytes per parameter (the fp32 master copy and Adam's two moments) and the small state. The
low-precision copy equals the master cast down, persistent parameters are gathered again, and gradients do not
exist between steps, so none of them is stored (measured bit-exact, FACTS.md section 2). Nor are the states of random
generators, which start anew in every step.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import nan
from typing import Any

import numpy as np
import torch

from gemini_hpc.arena import INDEX_BYTES, SnapshotIndex, TensorSpec, layout, write_index
from gemini_hpc.engine.json_state import from_json, to_json
from gemini_hpc.errors import GeminiError, UserError

GROWTH_BYTES = 4096
"""How much longer the numbers of the small state may become while it trains."""

_DTYPES = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.int64: "int64",
    torch.int32: "int32",
    torch.int16: "int16",
    torch.int8: "int8",
    torch.uint8: "uint8",
    torch.bool: "bool",
}
_MOMENTS = ("exp_avg", "exp_avg_sq")
_ENGINE_COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")
_PLAIN = (bool, int, float, str, type(None))


Adam = list[tuple[torch.Tensor, dict[str, torch.Tensor]]]
"""Of every group of parameters: the flat master copy, and its state in the optimizer."""


@dataclass(frozen=True)
class Moment:
    """What a snapshot will consist of: the index, complete, and the tensors to copy, as they lie in the engine."""

    index: bytes
    tensors: list["np.ndarray[Any, Any]"]


@dataclass(frozen=True)
class Place:
    """Where a snapshot goes: the payload of a half, and the place of each tensor in it."""

    payload: memoryview
    tensors: list["np.ndarray[Any, Any]"]


class Shard:
    """The tensors and the small state that make one rank of `engine`, and their places in a snapshot."""

    def __init__(self, engine: Any) -> None:
        """Find the shard; Adam's state, which torch creates in the first step, is created now."""
        self._engine = engine
        self._zero = engine.optimizer
        _check_settings(self._zero.optimizer)
        for flat in self._zero.fp32_partitioned_groups_flat:
            _create_moments(self._zero.optimizer, flat)
        self.clear_padding()
        persistent = engine.module.state_dict(keep_vars=True)
        trained = {id(parameter) for group in self._zero.fp16_groups for parameter in group}
        # constant, but partitioned: a spare that was built as another rank has another piece of them
        self._frozen = {n: p for n, p in engine.module.named_parameters() if id(p) not in trained}
        self._buffers = {name for name, _ in engine.module.named_buffers() if name in persistent}
        named = zip(self._names(), map(_storable, self._tensors(self._adam())), strict=True)
        self.specs, self.nbytes = layout([(name, _dtype_of(name, t), tuple(t.shape)) for name, t in named])
        self._seen: list[Any] = []  # where the tensors lay, and how, when the arrays were made
        self._arrays: list[np.ndarray[Any, Any]] = []
        self._steps: list[np.ndarray[Any, Any]] = []
        self._refuse_too_much()

    def clear_padding(self) -> None:
        """Zero the padding of the last rank's master shard, which DeepSpeed leaves uninitialised."""
        for flat, group, paddings in zip(
            self._zero.fp32_partitioned_groups_flat,
            self._zero.fp16_groups,
            self._zero.groups_padding,
            strict=True,
        ):
            end = 0
            for parameter, padding in zip(group, paddings, strict=True):
                end += parameter.partition_numel()
                if padding > 0:
                    flat.data[end - min(padding, parameter.partition_numel()) : end] = 0.0

    def gather(self, step: int, loss: float) -> Moment:
        """Prepare the snapshot of the shard as it is after `step` updates, the last of which had `loss`.

        Small things, whatever the size of the model.
        """
        adam = self._adam()
        tensors, steps = self._tensors(adam), [moments["step"] for _, moments in adam]
        # what numpy sees mostly stays the same, and to ask torch for it costs much when caches are cold
        seen = [(t.data_ptr(), t.shape, t.stride(), t.dtype) for t in (*tensors, *steps)]
        if seen != self._seen:
            self._seen = seen
            self._arrays = [_storable(tensor).numpy() for tensor in tensors]
            self._steps = [step.numpy() for step in steps]
        state = self._small_state() | {"loss": loss}
        rank, world_size = self._engine.global_rank, self._zero.partition_count
        index = SnapshotIndex(rank, step, world_size, self.nbytes, self.specs, state)
        return Moment(index.encode(), self._arrays)

    def _refuse_too_much(self) -> None:
        """What no snapshot can carry is refused before anything is trained. Raises UserError."""
        try:
            room = INDEX_BYTES - len(self.gather(step=0, loss=nan).index)
        except UserError:
            raise
        except GeminiError:  # it is longer than that
            room = 0
        if room < GROWTH_BYTES:
            raise UserError(
                f"the model's {len(self.specs)} tensors to save (optimizer state, buffers, frozen parameters) are more "
                f"than the index of a snapshot names in its {INDEX_BYTES} bytes; make them fewer"
            )

    def place(self, payload: memoryview) -> Place:
        """Find the tensors' places in a payload of at least `nbytes`; once, for many snapshots."""
        return Place(payload, [_view(payload, spec).numpy() for spec in self.specs])

    def capture(self, place: Place, moment: Moment) -> None:
        """Copy what was gathered to its place, before anything of it changes.

        Training stands still meanwhile; the cost is that of the memory copy. No collective.
        """
        for target, tensor in zip(place.tensors, moment.tensors, strict=True):
            np.copyto(target, tensor)  # memmove: a third faster than torch's copy
        write_index(place.payload, moment.index)

    def restore(self, payload: memoryview) -> SnapshotIndex:
        """Put a snapshot back into the live engine (all ranks); return its index.

        Collective at its end: persistent parameters are gathered again. Raises GeminiError when the payload is
        not a snapshot of this very shape.
        """
        index = SnapshotIndex.read(payload)
        if index.tensors != self.specs:
            raise UserError("the snapshot is of another model or another number of ranks; check the configuration")
        zero = self._zero
        zero.checkpoint_event_prologue()
        for spec, tensor in zip(self.specs, self._tensors(self._adam()), strict=True):
            _storable(tensor).copy_(_view(payload, spec))
        for i, flat in enumerate(zero.fp32_partitioned_groups_flat):
            low = zero.fp16_partitioned_groups_flat[i]
            if low.data_ptr() != flat.data_ptr():
                low.data.copy_(flat.data)
            zero._unflatten_partitioned_parameters(i)
        if zero.persistent_parameters:  # in one collective; checkpoint_event_epilogue has one for each of them
            zero.persistent_parameters[0].all_gather_coalesced(zero.persistent_parameters).wait()
        self._put_small_state(index.state)
        return index

    def _names(self) -> list[str]:
        """Return what the tensors are called in a snapshot, in the order of `_tensors`."""
        groups = range(len(self._zero.fp32_partitioned_groups_flat))
        names = [f"group{i}/{part}" for i in groups for part in ("master", *_MOMENTS)]
        names += [f"frozen/{name}" for name in self._frozen]
        return names + [f"buffer/{name}" for name, _ in self._engine.module.named_buffers() if name in self._buffers]

    def _tensors(self, adam: Adam) -> list[torch.Tensor]:
        """Return the shard's tensors, in a fixed order. In every step: what need not be done is left out."""
        found: list[torch.Tensor] = []
        for flat, moments in adam:
            found += (flat, *(moments[moment] for moment in _MOMENTS))
        found += [parameter.ds_tensor for parameter in self._frozen.values()]
        if self._buffers:
            found += [buffer for name, buffer in self._engine.module.named_buffers() if name in self._buffers]
        return found

    def _adam(self) -> Adam:
        """Return every group's master copy with its state in Adam."""
        state = self._zero.optimizer.state
        return [(flat, state[flat]) for flat in self._zero.fp32_partitioned_groups_flat]

    def _small_state(self) -> dict[str, Any]:
        engine, zero = self._engine, self._zero
        scheduler = engine.lr_scheduler
        return {
            "optimizer_steps": [float(step) for step in self._steps],
            "param_groups": [_without_parameters(group) for group in zero.optimizer.param_groups],
            "loss_scaler": {k: v for k, v in vars(zero.loss_scaler).items() if isinstance(v, _PLAIN)},
            "overflow": bool(zero.overflow),
            "engine": {name: int(getattr(engine, name)) for name in _ENGINE_COUNTERS},
            "lr_scheduler": to_json(scheduler.state_dict(), f"lr_scheduler {type(scheduler).__name__}")
            if scheduler is not None
            else None,
        }

    def _put_small_state(self, state: Mapping[str, Any]) -> None:
        engine, zero = self._engine, self._zero
        for (_, moments), count in zip(self._adam(), state["optimizer_steps"], strict=True):
            moments["step"].fill_(count)
        for group, saved in zip(zero.optimizer.param_groups, state["param_groups"], strict=True):
            for key, value in saved.items():
                group[key] = tuple(value) if isinstance(group.get(key), tuple) else value
        vars(zero.loss_scaler).update(state["loss_scaler"])
        zero.overflow = state["overflow"]
        zero.micro_step_id = 0
        for name in _ENGINE_COUNTERS:
            setattr(engine, name, int(state["engine"][name]))
        if engine.lr_scheduler is not None:
            engine.lr_scheduler.load_state_dict(from_json(state["lr_scheduler"]))


def _without_parameters(group: Mapping[str, Any]) -> dict[str, Any]:
    settings = dict(group)
    del settings["params"]
    return settings


def _check_settings(optimizer: torch.optim.Optimizer) -> None:
    """Refuse what a snapshot would not carry."""
    if not isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)):
        raise UserError(f"optimizer {type(optimizer).__name__} is not supported; use torch.optim.AdamW or Adam")
    for group in optimizer.param_groups:
        if group.get("amsgrad"):
            raise UserError("amsgrad=True is not supported; leave it out of the optimizer")
        for key, value in group.items():
            if key != "params" and not _is_plain(value):
                raise UserError(f"the optimizer's {key} is a {type(value).__name__}; give a plain number")


def _create_moments(optimizer: torch.optim.Optimizer, flat: torch.Tensor) -> None:
    """Create Adam's state as torch 2.13 does in its first step."""
    state = optimizer.state[flat]
    if not state:
        state["step"] = torch.tensor(0.0, dtype=torch.float32)
        for moment in _MOMENTS:
            state[moment] = torch.zeros_like(flat, memory_format=torch.preserve_format)


def _dtype_of(name: str, tensor: torch.Tensor) -> str:
    if tensor.dtype not in _DTYPES:
        raise UserError(
            f"{name} of the model is {tensor.dtype}, which a snapshot cannot carry; use {', '.join(_DTYPES.values())}"
        )
    return _DTYPES[tensor.dtype]


def _storable(tensor: torch.Tensor) -> torch.Tensor:
    """Return its data in a type that numpy and HDF5 know too: 16-bit floats travel as integers."""
    return tensor.data.view(torch.int16) if tensor.dtype in (torch.bfloat16, torch.float16) else tensor.data


def _view(payload: memoryview, spec: TensorSpec) -> torch.Tensor:
    dtype = next(d for d, name in _DTYPES.items() if name == spec.dtype)
    count = max(1, spec.nbytes // dtype.itemsize)
    return torch.frombuffer(payload, dtype=dtype, count=count, offset=spec.offset)[: _numel(spec)].view(spec.shape)


def _numel(spec: TensorSpec) -> int:
    count = 1
    for size in spec.shape:
        count *= size
    return count


def _is_plain(value: Any) -> bool:
    return isinstance(value, _PLAIN) or (isinstance(value, (tuple, list)) and all(isinstance(v, _PLAIN) for v in value))
