"""When replicas are read: while training leaves the network idle (the paper's section 5.3, Algorithm 2).

Between the collectives of a step lie idle spans, where the processors compute. They come again in every step, so a
profile of some steps predicts them. Chunks are put into them one after the other as long as the next one fits.

Three things are unlike in the printed text: a chunk shortens its span by what the chunk costs, not by what all that
is left would; each node reads m - 1 copies, not m; and a span too short for any byte ends there, rather than never.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, inf

SHARE = 0.8
"""Of a mean span this much is used at most (the paper's mu): a chunk that is late delays a collective."""

DEVIATIONS = 2.0
"""A span is counted on for its mean less this many standard deviations."""

SMALLEST_BYTES = 64 << 10
"""A chunk that is not the last of its snapshot has at least so many bytes: less is not worth a read."""

PATIENCE = 1.5
"""A read takes this many times what the profile promises before it goes on whenever it can."""


NOTABLE = 0.2
"""A change of the idle time in a step by this share is worth another picture."""


@dataclass(frozen=True)
class Link:
    """What a read costs: f(s) = startup + s / bandwidth."""

    startup_s: float
    bytes_per_s: float

    def cost_s(self, nbytes: int) -> float:
        return self.startup_s + nbytes / self.bytes_per_s

    def room(self, span_s: float) -> int:
        """Return how many bytes one read brings in so long."""
        return max(0, int((span_s - self.startup_s) * self.bytes_per_s))


def chunk(span_s: float, left_bytes: int, chunk_bytes: int, link: Link) -> int:
    """Return the size of the next read in what is left of an idle span, at most `chunk_bytes`; 0 when none fits."""
    size = min(left_bytes, chunk_bytes, link.room(span_s))
    return size if size >= min(left_bytes, SMALLEST_BYTES) else 0


@dataclass(frozen=True)
class Partition:
    """Chunks of one step: `chunks[i]` are the sizes in bytes put into idle span i; `left_bytes` found no room."""

    chunks: tuple[tuple[int, ...], ...]
    left_bytes: int


def partition(spans_s: Sequence[float], copies: Sequence[int], chunk_bytes: int, link: Link) -> Partition:
    """Put the bytes of the snapshots that a node reads (`copies`, m - 1 of them) into the usable spans of one step."""
    if chunk_bytes < 1:
        raise ValueError(f"chunk_bytes must be at least 1, not {chunk_bytes}")
    if link.bytes_per_s <= 0 or link.startup_s < 0:
        raise ValueError(f"a link must carry something: {link}")
    waiting = [nbytes for nbytes in copies if nbytes]
    chunks: list[tuple[int, ...]] = []
    for span_s in spans_s:
        left_s, here = span_s, []
        while waiting and (size := chunk(left_s, waiting[0], chunk_bytes, link)):
            here.append(size)
            left_s -= link.cost_s(size)
            waiting[0] -= size
            if not waiting[0]:
                waiting.pop(0)
        chunks.append(tuple(here))
    return Partition(tuple(chunks), sum(waiting))


def steps_per_snapshot(spans_s: Sequence[float], nbytes: int, chunk_bytes: int, link: Link) -> float:
    """Return how many steps' idle spans it takes to read `nbytes`; infinite when nothing fits into any."""
    endless = 1 << 62
    carried = endless - partition(spans_s, [endless], chunk_bytes, link).left_bytes
    return ceil(nbytes / carried) if carried else inf


@dataclass(frozen=True)
class Profile:
    """What the steps of some window had in common. Times in seconds."""

    step_s: float
    idle_s: float  # of the mean step
    spread: float  # standard deviation of the idle spans over their mean, weighted by it
    spans_s: tuple[float, ...]  # before each collective of a step, what can be used; the first begins with the last

    def is_like(self, other: "Profile") -> bool:
        """Whether nobody need draw it who has drawn the other."""
        alike = abs(self.idle_s - other.idle_s) <= NOTABLE * other.idle_s
        return alike and len(self.spans_s) == len(other.spans_s)


def profile(steps_s: Sequence[float], spans_s: Sequence[Sequence[float]]) -> Profile:
    """Average the idle spans of steps that had the same collectives."""
    count = len(spans_s)
    means = [sum(column) / count for column in zip(*spans_s, strict=True)]
    deviations = [
        (sum((span - mean) ** 2 for span in column) / count) ** 0.5
        for column, mean in zip(zip(*spans_s, strict=True), means, strict=True)
    ]
    idle_s = sum(means)
    usable = (min(SHARE * m, max(0.0, m - DEVIATIONS * d)) for m, d in zip(means, deviations, strict=True))
    return Profile(sum(steps_s) / count, idle_s, sum(deviations) / idle_s if idle_s else 0.0, tuple(usable))
