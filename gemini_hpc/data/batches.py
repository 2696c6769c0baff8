"""Batches of tensors, each a pure function of the corpus and a moment of the run."""

import numpy as np
import torch
from torch import Tensor

from gemini_hpc.data.corpus import Corpus, Moment, draws

MASK = 0
"""The token that hides another: byte 0, which no text contains."""

MASKED_SHARE = 0.15
"""Share of tokens to be predicted; of them 80 % are hidden, 10 % replaced, 10 % left (BERT section 3.1)."""


def next_token_batch(corpus: Corpus, moment: Moment, rows: int, seq_len: int) -> tuple[Tensor, Tensor]:
    """Return tokens and, one place on, their targets: both int64 (rows, seq_len) on the CPU."""
    passages = torch.from_numpy(corpus.passages(moment, rows, seq_len + 1))
    return passages[:, :-1].contiguous(), passages[:, 1:].contiguous()


def masked_batch(
    corpus: Corpus, moment: Moment, rows: int, seq_len: int, unmasked: int = -100
) -> tuple[Tensor, Tensor]:
    """Return tokens, some of them hidden, and labels: the hidden ones' truth, `unmasked` elsewhere.

    Both int64 (rows, seq_len) on the CPU. Every row has the same number of tokens to predict, at least one.
    """
    truth = corpus.passages(moment, rows, seq_len)
    order, lot, other = draws(moment, stream=1, count=3 * rows * seq_len).reshape(3, rows, seq_len)
    chosen = order.argsort(axis=1).argsort(axis=1) < max(1, round(MASKED_SHARE * seq_len))
    hidden, replaced = chosen & (lot % 10 < 8), chosen & (lot % 10 == 8)
    strangers = corpus.symbols[other % np.uint64(len(corpus.symbols))]
    tokens = np.where(hidden, MASK, np.where(replaced, strangers, truth))
    labels = np.where(chosen, truth, unmasked)
    return torch.from_numpy(tokens), torch.from_numpy(labels)
