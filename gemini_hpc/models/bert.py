"""BERT and RoBERTa: one encoder of post-norm blocks, trained on masked tokens.

RoBERTa differs from BERT in having no segments and in numbering positions from 2; both mask afresh at every
step, and neither has a next-sentence task (RoBERTa dropped it; in BERT it only concerns pairs of sentences).
Heads are untied, and weights are made in constructors, for the reasons given in `gpt2.py`.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gemini_hpc.models.gpt2 import MLP, Attention, Embedding, Linear, run_blocks
from gemini_hpc.models.presets import BERT_SEGMENTS, ROBERTA_POSITION_OFFSET, ModelShape

UNMASKED = -100
"""The label of a token that is not to be predicted (torch's default `ignore_index`)."""


class Block(nn.Module):
    """One post-norm transformer block, seeing the whole sequence."""

    def __init__(self, shape: ModelShape, dropout: float) -> None:
        super().__init__()
        self.attention = Attention(shape, dropout, causal=False)
        self.attention_norm = nn.LayerNorm(shape.hidden)
        self.mlp = MLP(shape)
        self.mlp_norm = nn.LayerNorm(shape.hidden)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attention_norm(x + self.dropout(self.attention(x)))
        return self.mlp_norm(x + self.dropout(self.mlp(x)))


class MaskedLM(nn.Module):
    """Masked-token language model: `shape.family` is "bert" or "roberta"."""

    def __init__(self, shape: ModelShape, dropout: float = 0.0) -> None:
        super().__init__()
        bert = shape.family == "bert"
        self.recompute = shape.recompute
        self.first_position = 0 if bert else ROBERTA_POSITION_OFFSET
        self.tokens = Embedding(shape.vocab, shape.hidden)
        self.positions = Embedding(shape.seq_len + self.first_position, shape.hidden)
        self.segments = Embedding(BERT_SEGMENTS, shape.hidden) if bert else None
        self.norm = nn.LayerNorm(shape.hidden)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(shape, dropout) for _ in range(shape.layers))
        self.transform = Linear(shape.hidden, shape.hidden)
        self.transform_norm = nn.LayerNorm(shape.hidden)
        self.head = Linear(shape.hidden, shape.vocab)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Return the mean cross-entropy over the masked tokens, in nats (float32 scalar).

        Both inputs are int64 (batch, time); `labels` is UNMASKED wherever nothing is to be predicted.
        """
        place = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.tokens(tokens) + self.positions(place + self.first_position)
        if self.segments is not None:
            x = x + self.segments(torch.zeros_like(place))  # a batch row is one passage: one segment
        x = run_blocks(self.blocks, self.dropout(self.norm(x)), self.recompute and self.training)
        logits = self.head(self.transform_norm(F.gelu(self.transform(x))))
        return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=UNMASKED)
