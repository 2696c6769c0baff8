"""When a window host reads, and how much at a time: in the idle spans of training, as long as that is fast enough."""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from math import inf, isinf

from gemini_hpc.core.messages import Profiled
from gemini_hpc.core.schedule import PATIENCE, Link, chunk, steps_per_snapshot

READS_KEPT = 1000
"""So many reads are remembered, to be drawn beside the collectives."""

FIRST_GUESS = 1e9
"""Bytes per second, before anything was read."""

BELIEVED = 16
"""The link is believed to carry what so many reads did together: a short one may find all buffers empty on its way."""


class Pace:
    """Of one window host, whose largest read is `chunk_bytes`."""

    def __init__(self, idle_until: Callable[[], float], chunk_bytes: int, startup_s: float) -> None:
        """`idle_until` tells until when the network is idle, as `Arena.idle_until` does."""
        self._idle_until, self._chunk_bytes = idle_until, chunk_bytes
        self._link = Link(startup_s, FIRST_GUESS)
        self._profile: Profiled | None = None
        self._reads: deque[tuple[float, float, float]] = deque(maxlen=READS_KEPT)

    def heed(self, profile: Profiled) -> None:
        self._profile = profile

    def patience_s(self, nbytes: int, most_s: float) -> tuple[float, str]:
        """Return how long to keep to idle spans while `nbytes` are read, at most `most_s`; 0 and why, if not at all."""
        if self._profile is None or not most_s:
            return 0.0, ""
        steps = steps_per_snapshot(self._profile.spans_s, nbytes, self._chunk_bytes, self._link)
        if steps == inf:
            return 0.0, "training leaves the network no idle span that a read would fit into"
        promised_s = PATIENCE * (steps + 1) * self._profile.step_s
        if promised_s > most_s:
            return 0.0, f"a snapshot would take the idle spans of {steps:.0f} steps"
        return promised_s, ""

    def size(self, left_bytes: int, patient_until: float) -> int:
        """Return how many of `left_bytes` to read now; 0: it is not the time."""
        now = time.monotonic()
        until = self._idle_until()
        if now >= patient_until or isinf(until):
            return min(left_bytes, self._chunk_bytes)
        return chunk(until - now, left_bytes, self._chunk_bytes, self._link)

    def took(self, nbytes: int, began: float, ended: float) -> None:
        """A read is done."""
        self._reads.append((began, ended, nbytes))
        newest = list(self._reads)[-BELIEVED:]
        taken_s = max(sum(end - begin for begin, end, _ in newest), 1e-9)
        moved_s = max(taken_s - len(newest) * self._link.startup_s, taken_s / 2)
        self._link = replace(self._link, bytes_per_s=sum(size for _, _, size in newest) / moved_s)

    def reads_between(self, began: float, ended: float) -> tuple[tuple[float, float, float], ...]:
        """Return those that were under way then, as (begin, end, bytes)."""
        return tuple(read for read in self._reads if read[0] < ended and read[1] > began)
