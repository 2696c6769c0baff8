"""Learnable random text: every symbol has four possible successors, all equally likely.

A model that knows nothing has a loss of ln(256) = 5.55, one that has learned the rule ln(4) = 1.39: how far a
run has come can be read off its loss.
"""

import numpy as np

from gemini_hpc.data.corpus import Corpus, Moment, draws

CHAINS, CHAIN_BYTES = 4096, 256
"""How much there is: 1 MiB, as chains that are grown side by side and then laid end to end."""


def synthetic_corpus() -> Corpus:
    """Make the corpus: the same bytes every time. Symbols are 1..255, since 0 is the mask of `bert`."""
    words = draws(Moment(0, 0, 0, 0), stream=2, count=CHAINS * CHAIN_BYTES).reshape(CHAIN_BYTES, CHAINS)
    symbols = np.empty((CHAIN_BYTES, CHAINS), dtype=np.int64)
    symbols[0] = words[0] % 255
    for i in range(1, CHAIN_BYTES):
        choice = (words[i] % 4).astype(np.int64)
        symbols[i] = (167 * symbols[i - 1] + 61 * choice + 13) % 255
    text = (symbols.T + 1).astype(np.uint8).reshape(-1)
    return Corpus(text, f"synthetic text ({len(text)} bytes, four successors to each symbol)")
