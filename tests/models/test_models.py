"""The models by themselves: they start ignorant, learn, and give the same bits every time."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from gemini_hpc.data.batches import masked_batch, next_token_batch
from gemini_hpc.data.corpus import Moment
from gemini_hpc.data.synthetic import synthetic_corpus
from gemini_hpc.models.job import build_model
from gemini_hpc.models.presets import FAMILIES, ModelShape

SHAPE = ModelShape("gpt2", hidden=32, intermediate=64, layers=2, heads=2, vocab=256, seq_len=32)


def model_of(family: str, seed: int = 1, dropout: float = 0.0, recompute: bool = False) -> nn.Module:
    torch.manual_seed(seed)
    return build_model(replace(SHAPE, family=family, recompute=recompute), dropout)


def batch_of(family: str) -> tuple[Tensor, Tensor]:
    make = next_token_batch if family == "gpt2" else masked_batch
    return make(synthetic_corpus(), Moment(1, 1, 0, 0), 8, 32)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_new_model_knows_nothing(family: str) -> None:
    loss = model_of(family)(*batch_of(family))
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    assert abs(loss.item() - math.log(256)) < 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_the_seed_decides_the_weights(family: str) -> None:
    one, same, other = (nn.utils.parameters_to_vector(model_of(family, seed).parameters()) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_recomputing_activations_changes_no_bit(family: str, dropout: float) -> None:
    results = []
    for recompute in (False, True):
        model = model_of(family, dropout=dropout, recompute=recompute)
        torch.manual_seed(5)
        loss = model(*batch_of(family))
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        results.append(torch.cat([loss.detach().reshape(1), *(g.flatten() for g in gradients)]))
    assert torch.equal(*results)


def test_gpt2_does_not_see_the_future() -> None:
    model = model_of("gpt2")
    tokens, targets = batch_of("gpt2")
    seen: list[Tensor] = []
    model.norm.register_forward_hook(lambda module, inputs, output: seen.append(output))
    changed = tokens.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 256
    model(tokens, targets), model(changed, targets)
    assert torch.equal(seen[0][:, :-1], seen[1][:, :-1])
    assert not torch.equal(seen[0][:, -1], seen[1][:, -1])


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_the_encoders_see_both_ways_and_learn_from_labels_alone(family: str) -> None:
    model = model_of(family)
    tokens, labels = batch_of(family)
    changed = tokens.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 256
    first = torch.full_like(labels, -100)
    first[:, 0] = 7
    assert not torch.equal(model(tokens, first), model(changed, first))
    everywhere = labels.where(labels != -100, torch.tensor(3))
    assert not torch.equal(model(tokens, labels), model(tokens, everywhere))
