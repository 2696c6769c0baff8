"""Training data as a pure function of (seed, step, rank, micro step): no recovery skips or repeats any.

Every source ends as one `Corpus`, a string of bytes: a byte is a token, which needs no tokenizer and no
download, and a step takes as long as with any other. Neither function here imports torch.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gemini_hpc.config import DataConfig
    from gemini_hpc.data.corpus import Corpus


def open_corpus(data: "DataConfig") -> "Corpus":
    """Load the corpus that the `data` section of a run's configuration names. Called by every worker.

    Raises UserError for text that is missing, unreadable or empty.
    """
    if data.source == "synthetic":
        from gemini_hpc.data.synthetic import synthetic_corpus

        return synthetic_corpus()
    if data.source == "wikipedia":
        from gemini_hpc.data.wikipedia import wikipedia_corpus

        return wikipedia_corpus(data.path)
    from gemini_hpc.data.text import text_corpus

    return text_corpus(data.path)


def check_source(data: "DataConfig", seq_len: int) -> str:
    """Check that there is text for sequences of `seq_len` tokens (`submit`); return its fingerprint.

    Reads local text, which takes well under a second; for Wikipedia without a path it fetches the corpus into
    the user's Hugging Face cache, since compute nodes may have no network. Raises UserError.
    """
    if data.source == "wikipedia":
        from gemini_hpc.data.wikipedia import prepare

        return prepare(data.path, seq_len)
    return open_corpus(data).require(seq_len).fingerprint
