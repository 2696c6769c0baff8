"""A corpus of bytes, and the counter-based draws that pick passages from it. NumPy only."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import xxhash

from gemini_hpc.errors import UserError

MAX_CORPUS_BYTES = 32 << 20
"""A corpus is cut here, so that every worker can hold it in memory."""


@dataclass(frozen=True)
class Moment:
    """Where in a run a batch belongs. Equal moments get equal data, on any machine, after any failure."""

    seed: int
    step: int
    rank: int
    micro_step: int


def draws(moment: Moment, stream: int, count: int) -> npt.NDArray[np.uint64]:
    """Return `count` random 64-bit words (uint64) that belong to this moment and `stream` alone.

    Philox is a function of key and counter, with nothing to advance, save or restore; its raw words are the
    same in every version of NumPy. The counter's lowest word counts within a batch, the rest is the moment.
    """
    counter = np.array([0, moment.micro_step, moment.rank, moment.step], dtype=np.uint64)
    key = np.array([moment.seed % 2**64, stream], dtype=np.uint64)
    return np.random.Philox(counter=counter, key=key).random_raw(count)


@dataclass(frozen=True)
class Corpus:
    """`symbols`: the text, one uint8 per byte. `origin`: what it is, in words for people."""

    symbols: npt.NDArray[np.uint8]
    origin: str

    @cached_property
    def fingerprint(self) -> str:
        """xxh3-64 of the bytes, and their number. Ranks and resumed runs must agree on it."""
        return f"xxh3-{xxhash.xxh3_64_hexdigest(self.symbols.data)}-{len(self.symbols)}"

    def require(self, seq_len: int) -> "Corpus":
        """Return itself. Raises UserError when it is too short for `seq_len` tokens and the next one."""
        if len(self.symbols) <= seq_len:
            raise UserError(
                f"the text is too short: {self.origin}; model.seq_len={seq_len} needs {seq_len + 1} bytes: "
                "name more text in data.path, or lower model.seq_len"
            )
        return self

    def passages(self, moment: Moment, rows: int, length: int) -> npt.NDArray[np.int64]:
        """Return `rows` passages of `length` bytes from random places: int64 (rows, length)."""
        starts = draws(moment, stream=0, count=rows) % np.uint64(len(self.symbols) - length + 1)
        places = starts.astype(np.int64)[:, None] + np.arange(length)
        return np.asarray(self.symbols[places], dtype=np.int64)
