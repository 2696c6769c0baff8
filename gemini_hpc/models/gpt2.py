"""GPT-2: a decoder of pre-norm blocks with learned positions. One sitting.

The head has its own weight, where GPT-2 ties it to the token table. Under ZeRO-3 a parameter belongs to the
module that uses it; one that two modules share is gathered and reduced twice, for a saving of vocab x hidden
numbers (under 2 % from 20B on). An untied head keeps every gather in one module and every step bit-exact.

Each layer draws its initial weights in its own constructor, from torch's global generator: the same seed
gives the same model.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from gemini_hpc.models.presets import ModelShape

INIT_STD = 0.02


class Linear(nn.Linear):
    """A linear layer with weights N(0, `std`) and zero bias."""

    def __init__(self, n_in: int, n_out: int, bias: bool = True, std: float = INIT_STD) -> None:
        super().__init__(n_in, n_out, bias)
        nn.init.normal_(self.weight, std=std)
        if bias:
            nn.init.zeros_(self.bias)


class Embedding(nn.Embedding):
    """A table of vectors N(0, INIT_STD)."""

    def __init__(self, rows: int, hidden: int) -> None:
        super().__init__(rows, hidden)
        nn.init.normal_(self.weight, std=INIT_STD)


class Attention(nn.Module):
    """Multi-head self-attention: (batch, time, hidden) -> the same."""

    def __init__(self, shape: ModelShape, dropout: float, causal: bool, out_std: float = INIT_STD) -> None:
        super().__init__()
        self.heads, self.dropout, self.causal = shape.heads, dropout, causal
        self.qkv = Linear(shape.hidden, 3 * shape.hidden)
        self.out = Linear(shape.hidden, shape.hidden, std=out_std)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, hidden = x.shape
        q, k, v = self.qkv(x).view(batch, time, 3, self.heads, hidden // self.heads).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=self.causal)
        return self.out(mixed.transpose(1, 2).reshape(batch, time, hidden))


class MLP(nn.Module):
    """Two linear layers with a GELU between them: (batch, time, hidden) -> the same."""

    def __init__(self, shape: ModelShape, out_std: float = INIT_STD) -> None:
        super().__init__()
        self.expand = Linear(shape.hidden, shape.intermediate)
        self.contract = Linear(shape.intermediate, shape.hidden, std=out_std)

    def forward(self, x: Tensor) -> Tensor:
        return self.contract(F.gelu(self.expand(x)))


class Block(nn.Module):
    """One pre-norm transformer block. What it adds to its input starts small (GPT-2 section 2.3)."""

    def __init__(self, shape: ModelShape, dropout: float) -> None:
        super().__init__()
        out_std = INIT_STD / (2 * shape.layers) ** 0.5
        self.attention_norm = nn.LayerNorm(shape.hidden)
        self.attention = Attention(shape, dropout, causal=True, out_std=out_std)
        self.mlp_norm = nn.LayerNorm(shape.hidden)
        self.mlp = MLP(shape, out_std)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x)))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class GPT2(nn.Module):
    """Next-token language model."""

    def __init__(self, shape: ModelShape, dropout: float = 0.0) -> None:
        super().__init__()
        self.recompute = shape.recompute
        self.tokens = Embedding(shape.vocab, shape.hidden)
        self.positions = Embedding(shape.seq_len, shape.hidden)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(shape, dropout) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.hidden)
        self.head = Linear(shape.hidden, shape.vocab, bias=False)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy in nats (float32 scalar); both inputs are int64 (batch, time)."""
        place = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.dropout(self.tokens(tokens) + self.positions(place))
        x = run_blocks(self.blocks, x, self.recompute and self.training)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def run_blocks(blocks: nn.ModuleList, x: Tensor, recompute: bool) -> Tensor:
    """Send x through the blocks; with `recompute`, keep only each block's input for the backward pass."""
    for block in blocks:
        # Reentrant: the other kind compares saved parameters, and ZeRO-3 has taken them away by then.
        x = checkpoint(block, x, use_reentrant=True) if recompute else block(x)
    return x
