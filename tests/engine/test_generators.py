"""Randomness is a function of (seed, step, rank), for every global generator."""

import random

import numpy as np
import torch

from gemini_hpc.engine.generators import seed_model, seed_step


def drawn() -> tuple[float, float, float]:
    np.random.randn()  # leaves half of a pair behind
    return torch.rand(()).item(), random.random(), np.random.randn()


def of_step(seed: int, step: int, rank: int) -> tuple[float, float, float]:
    seed_step(seed, step, rank)
    return drawn()


def test_a_step_that_is_done_again_draws_the_same() -> None:
    first = of_step(1, 7, 0)
    drawn()
    assert of_step(1, 7, 0) == first


def test_steps_ranks_and_seeds_draw_differently() -> None:
    everywhere = [of_step(seed, step, rank) for seed in range(3) for step in range(20) for rank in range(4)]
    for one_generator in zip(*everywhere, strict=True):
        assert len(set(one_generator)) == len(everywhere)


def test_a_model_is_built_alike_everywhere() -> None:
    seed_model(5)
    first = drawn()
    seed_model(5)
    assert drawn() == first
    seed_model(6)
    assert drawn() != first
