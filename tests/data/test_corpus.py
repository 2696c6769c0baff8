"""Data is a pure function of (seed, step, rank, micro step)."""

import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch

from gemini_hpc.config import DataConfig
from gemini_hpc.data import open_corpus
from gemini_hpc.data.batches import MASK, masked_batch, next_token_batch
from gemini_hpc.data.corpus import Corpus, Moment, draws
from gemini_hpc.data.synthetic import synthetic_corpus
from gemini_hpc.errors import UserError

MOMENT = Moment(seed=1, step=7, rank=2, micro_step=1)
OTHERS = [Moment(2, 7, 2, 1), Moment(1, 8, 2, 1), Moment(1, 7, 3, 1), Moment(1, 7, 2, 0)]

Batch = Callable[..., tuple[torch.Tensor, torch.Tensor]]

PRINT_A_BATCH = """
from gemini_hpc.data.corpus import Moment
from gemini_hpc.data.synthetic import synthetic_corpus
from gemini_hpc.data import batches
corpus = synthetic_corpus()
print(corpus.fingerprint)
print([t.tolist() for t in batches.{batch}(corpus, Moment(1, 7, 2, 1), 4, 32)])
"""


@pytest.mark.parametrize("batch", [next_token_batch, masked_batch])
def test_a_batch_is_the_same_in_another_process(batch: Batch) -> None:
    corpus = synthetic_corpus()
    here = [tensor.tolist() for tensor in batch(corpus, MOMENT, 4, 32)]
    script = PRINT_A_BATCH.format(batch=batch.__name__)
    there = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert there.stdout.splitlines() == [corpus.fingerprint, str(here)]


@pytest.mark.parametrize("batch", [next_token_batch, masked_batch])
def test_any_other_moment_has_another_batch(batch: Batch) -> None:
    corpus = synthetic_corpus()
    tokens, _ = batch(corpus, MOMENT, 4, 32)
    assert all(not torch.equal(tokens, batch(corpus, other, 4, 32)[0]) for other in OTHERS)


def test_the_draws_are_those_of_every_version_of_numpy() -> None:
    words = draws(Moment(seed=1, step=2, rank=3, micro_step=4), stream=5, count=2)
    assert words.tolist() == [6149752574130841405, 1782238438312112241]


def test_a_next_token_batch_is_the_text_and_the_text_one_place_on() -> None:
    text = bytes(range(1, 200))
    corpus = Corpus(np.frombuffer(text, dtype=np.uint8), "counting")
    tokens, targets = next_token_batch(corpus, MOMENT, 3, 16)
    assert tokens.dtype == targets.dtype == torch.int64
    assert tokens.shape == targets.shape == (3, 16)
    assert torch.equal(targets, tokens + 1)
    assert torch.equal(tokens[:, 1:], targets[:, :-1])


def test_a_masked_batch_hides_a_fixed_share_and_labels_only_that() -> None:
    corpus = synthetic_corpus()
    tokens, labels = masked_batch(corpus, MOMENT, 64, 128)
    assert tokens.dtype == labels.dtype == torch.int64
    chosen = labels != -100
    assert chosen.sum(dim=1).tolist() == [19] * 64  # 15 % of 128
    hidden = (tokens == MASK) & chosen
    assert 0.7 < hidden.sum() / chosen.sum() < 0.9
    assert not (tokens == MASK)[~chosen].any()
    truth = torch.from_numpy(corpus.passages(MOMENT, 64, 128))
    assert torch.equal(labels[chosen], truth[chosen])
    assert torch.equal(tokens[~chosen], truth[~chosen])


def test_even_the_shortest_row_has_something_to_predict() -> None:
    _, labels = masked_batch(synthetic_corpus(), MOMENT, 4, 1)
    assert (labels != -100).all()


def test_passages_reach_the_very_end_of_the_text() -> None:
    corpus = Corpus(np.frombuffer(b"abc", dtype=np.uint8), "abc")
    found = {bytes(row.astype(np.uint8)) for row in corpus.passages(MOMENT, 64, 2)}
    assert found == {b"ab", b"bc"}


def test_a_text_that_is_too_short_is_refused_with_what_is_needed() -> None:
    corpus = Corpus(np.frombuffer(b"abc", dtype=np.uint8), "note.txt (1 text, 3 bytes)")
    assert corpus.require(2) is corpus
    with pytest.raises(UserError, match=r"too short: note\.txt \(1 text, 3 bytes\); model\.seq_len=3 needs 4 bytes"):
        corpus.require(3)


def test_synthetic_text_has_four_equally_likely_successors() -> None:
    corpus = open_corpus(DataConfig(source="synthetic"))
    symbols = corpus.symbols.reshape(-1, 256).astype(int)
    pairs = symbols[:, :-1] * 256 + symbols[:, 1:]
    kinds, counts = np.unique(pairs, return_counts=True)
    assert np.unique(kinds // 256, return_counts=True)[1].tolist() == [4] * 255
    assert counts.min() > 0.7 * counts.mean()
    assert counts.max() < 1.3 * counts.mean()
    assert symbols.min() == 1  # 0 is the mask


def test_a_fingerprint_tells_texts_apart() -> None:
    one, other = (Corpus(np.frombuffer(text, dtype=np.uint8), "") for text in (b"abc", b"abd"))
    assert one.fingerprint != other.fingerprint
    assert one.fingerprint.endswith("-3")
