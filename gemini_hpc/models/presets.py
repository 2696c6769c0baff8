"""Model sizes by name, and what follows from a size alone. No torch: `submit` computes memory from it.

The paper's four sizes are its table (hidden / intermediate / layers / heads; vocabulary 50265, sequences of
512 tokens, activation recomputation). Its "10B" row is kept as printed and makes 3.9 billion parameters; the
other three are what their names say. `tiny` and `small` are ours: bytes as tokens, for a few cores.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from difflib import get_close_matches
from math import prod

from gemini_hpc.errors import UserError

FAMILIES = ("gpt2", "bert", "roberta")

ROBERTA_POSITION_OFFSET = 2
"""RoBERTa numbers its positions from 2: the original reserved the first two rows for padding."""

BERT_SEGMENTS = 2
"""Rows of BERT's segment table."""


@dataclass(frozen=True)
class ModelShape:
    """Everything that decides a model's parameters. `seq_len` is the longest sequence, in tokens."""

    family: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocab: int
    seq_len: int
    recompute: bool = False
    """Recompute each block's activations in the backward pass: a third more work for far less memory."""


def _paper(hidden: int, intermediate: int, layers: int, heads: int) -> ModelShape:
    return ModelShape("gpt2", hidden, intermediate, layers, heads, vocab=50265, seq_len=512, recompute=True)


PRESETS = {
    "tiny": ModelShape("gpt2", hidden=64, intermediate=256, layers=2, heads=2, vocab=256, seq_len=128),
    "small": ModelShape("gpt2", hidden=192, intermediate=768, layers=4, heads=4, vocab=256, seq_len=128),
    "10b": _paper(2560, 10240, 46, 40),
    "20b": _paper(5120, 20480, 64, 40),
    "40b": _paper(5120, 20480, 128, 40),
    "100b": _paper(8192, 32768, 124, 64),
}


def model_shape(family: str, preset: str, seq_len: int | None = None) -> ModelShape:
    """Return a preset's shape in `family`, for sequences of `seq_len` tokens (None: the preset's own length).

    Raises UserError for an unknown family or preset (naming the nearest one and all), and for seq_len < 1.
    """
    if seq_len is not None and seq_len < 1:
        raise UserError(f"model.seq_len must be at least 1, not {seq_len}")
    shape = PRESETS[_known("preset", preset, tuple(PRESETS))]
    return replace(shape, family=_known("family", family, FAMILIES), seq_len=seq_len or shape.seq_len)


def parameter_shapes(shape: ModelShape) -> list[tuple[str, tuple[int, ...]]]:
    """Return (name, shape) of every parameter, in the order of the model's `named_parameters()`."""
    rows = _gpt2(shape) if shape.family == "gpt2" else _encoder(shape)
    return list(rows)


def shapes_by_preset(family: str, seq_len: int) -> dict[str, list[tuple[str, tuple[int, ...]]]]:
    """Return preset -> `parameter_shapes`, as `config.capacity` wants them."""
    return {name: parameter_shapes(model_shape(family, name, seq_len)) for name in PRESETS}


def parameter_count(shape: ModelShape) -> int:
    """Return how many parameters the model has."""
    return sum(prod(size) for _, size in parameter_shapes(shape))


def _known(what: str, name: str, valid: tuple[str, ...]) -> str:
    if name in valid:
        return name
    near = get_close_matches(name, valid, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise UserError(f"unknown model.{what} {name!r}: {hint}valid are {', '.join(valid)}")


Parameters = Iterator[tuple[str, tuple[int, ...]]]


def _linear(name: str, n_in: int, n_out: int) -> Parameters:
    yield f"{name}.weight", (n_out, n_in)
    yield f"{name}.bias", (n_out,)


def _norm(name: str, hidden: int) -> Parameters:
    yield f"{name}.weight", (hidden,)
    yield f"{name}.bias", (hidden,)


def _gpt2(shape: ModelShape) -> Parameters:
    h = shape.hidden
    yield "tokens.weight", (shape.vocab, h)
    yield "positions.weight", (shape.seq_len, h)
    for i in range(shape.layers):
        yield from _norm(f"blocks.{i}.attention_norm", h)
        yield from _linear(f"blocks.{i}.attention.qkv", h, 3 * h)
        yield from _linear(f"blocks.{i}.attention.out", h, h)
        yield from _norm(f"blocks.{i}.mlp_norm", h)
        yield from _linear(f"blocks.{i}.mlp.expand", h, shape.intermediate)
        yield from _linear(f"blocks.{i}.mlp.contract", shape.intermediate, h)
    yield from _norm("norm", h)
    yield "head.weight", (shape.vocab, h)


def _encoder(shape: ModelShape) -> Parameters:
    h, bert = shape.hidden, shape.family == "bert"
    yield "tokens.weight", (shape.vocab, h)
    yield "positions.weight", (shape.seq_len + (0 if bert else ROBERTA_POSITION_OFFSET), h)
    if bert:
        yield "segments.weight", (BERT_SEGMENTS, h)
    yield from _norm("norm", h)
    for i in range(shape.layers):
        yield from _linear(f"blocks.{i}.attention.qkv", h, 3 * h)
        yield from _linear(f"blocks.{i}.attention.out", h, h)
        yield from _norm(f"blocks.{i}.attention_norm", h)
        yield from _linear(f"blocks.{i}.mlp.expand", h, shape.intermediate)
        yield from _linear(f"blocks.{i}.mlp.contract", shape.intermediate, h)
        yield from _norm(f"blocks.{i}.mlp_norm", h)
    yield from _linear("transform", h, h)
    yield from _norm("transform_norm", h)
    yield from _linear("head", h, shape.vocab)
