"""Sizes by name, without torch: they must be those of the models."""

import subprocess
import sys

import pytest

from gemini_hpc.errors import UserError
from gemini_hpc.models.job import build_model
from gemini_hpc.models.presets import (
    FAMILIES,
    PRESETS,
    ModelShape,
    model_shape,
    parameter_count,
    parameter_shapes,
)

SHAPES = [
    ("tiny", None),
    ("tiny", 48),
    ("small", 128),
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("preset", "seq_len"), SHAPES)
def test_the_shapes_are_those_of_the_model_in_its_order(family: str, preset: str, seq_len: int | None) -> None:
    shape = model_shape(family, preset, seq_len)
    parameters = [(name, tuple(p.shape)) for name, p in build_model(shape, dropout=0.0).named_parameters()]
    assert parameter_shapes(shape) == parameters


def test_the_sizes_of_the_paper_are_its_table() -> None:
    table = {
        "10b": (2560, 10240, 46, 40, 3.9),  # what the printed row makes
        "20b": (5120, 20480, 64, 40, 20.7),
        "40b": (5120, 20480, 128, 40, 40.8),
        "100b": (8192, 32768, 124, 64, 100.7),
    }
    for name, (hidden, intermediate, layers, heads, billions) in table.items():
        shape = model_shape("gpt2", name)
        assert shape == ModelShape("gpt2", hidden, intermediate, layers, heads, 50265, 512, recompute=True)
        assert round(parameter_count(shape) / 1e9, 1) == billions


def test_heads_divide_every_hidden_size() -> None:
    assert all(shape.hidden % shape.heads == 0 for shape in PRESETS.values())


def test_an_unknown_name_is_told_the_nearest_and_all() -> None:
    nearest = r"unknown model\.preset 'smal': did you mean 'small'\? valid are tiny, small, 10b, 20b, 40b, 100b"
    with pytest.raises(UserError, match=nearest):
        model_shape("gpt2", "smal")
    with pytest.raises(UserError, match=r"unknown model\.family 'llama': valid are gpt2, bert, roberta"):
        model_shape("llama", "small")
    with pytest.raises(UserError, match=r"model\.seq_len must be at least 1, not 0"):
        model_shape("gpt2", "small", 0)


def test_sizes_need_no_torch() -> None:
    script = (
        "import sys; from gemini_hpc.models.presets import *\n"
        "print(parameter_count(model_shape('gpt2', 'small')), 'torch' in sys.modules, 'numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(parameter_count(PRESETS["small"])), "False", "False"]
