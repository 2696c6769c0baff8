"""Capture and restore in place: training goes on as if nothing had been taken back, to the last bit."""

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
