"""Capture and restore in place: training goes on as if nothing had been taken back, to the last bit."""

from typing import Any

import pytest

from tests.engine.harness import Clusters, Undisturbed
from tests.engine.job import Case

CASES = {
    "fp32": Case(),
    "everything": Case(
        precision="bf16", grad_accum=2, grad_clip=0.5, groups=2, sub_group=150, dropout=0.2, persist=25, overlap=True
    ),
    "fp16 with a falling loss scale": Case(precision="fp16", dropout=0.1, persist=1_000_000),
    "fp32 with a buffer, tied": Case(buffer="float32", tied=True, groups=2, grad_clip=0.5, persist=25, dropout=0.2),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_capture_and_restore_in_place_is_bit_exact(case: Case, cluster: Clusters, undisturbed: Undisturbed) -> None:
    run = cluster(case, size=2, spares=0).start()
    run.train(1, 4)
    run.all("train", first=5, last=7, capture=False)
    run.restore(4)
    run.all("train", first=5, last=7, capture=False)
    losses = run.losses()
    assert losses == undisturbed(case, 2, 7)
    assert len(set(losses.values())) > 10  # it does train


def test_a_buffer_that_lies_otherwise_at_the_same_place_is_copied_as_it_is(cluster: Clusters) -> None:
    run = cluster(Case(buffer="float32"), size=2, spares=0).start()
    for rank in run.ranks:
        assert rank.call("call", module="tests.engine.test_snapshot", function="buffers_in_snapshots") == [True, True]


def buffers_in_snapshots(rank: Any) -> list[bool]:
    """In a rank: whether the snapshot has its buffer, before and after it became another view of the same memory."""
    import torch

    shard, (holder, width) = rank._built.shard, _holder(rank._built.engine.module)
    memory = torch.arange(2 * width, dtype=torch.float32)
    found = []
    for view in (memory[:width], memory[::2]):
        holder.mean = view
        (taken,) = [a for a, spec in zip(shard.gather(1, 1.0).tensors, shard.specs, strict=True) if "mean" in spec.name]
        found.append(taken.tolist() == view.tolist())
    return found


def _holder(model: Any) -> tuple[Any, int]:
    return next(
        (module, len(module.mean)) for module in model.modules() if "mean" in dict(module.named_buffers(recurse=False))
    )
