"""When the collectives of a training begin and end: the profile of its idle spans, and the gate made from it."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

import torch

from gemini_hpc.core.schedule import Profile, profile

WINDOW_STEPS = 20
"""So many steps make a profile (the paper's section 5.3)."""

FIRST_STEPS = 5
"""The first ones are made of fewer: until there is one, replicas are read at once, which makes spans of its own."""

Stamp = tuple[float, float, int]
"""A collective: when it began and ended (seconds, monotonic clock), and the bytes that this rank gave it."""


@dataclass
class _Step:
    began: float
    is_whole: bool  # what was before its first collective is known
    stamps: list[Stamp]
    spans_s: list[float]  # before each of them


class Traffic:
    """Stamps every collective of this process, whoever calls it, and says until when the network will be idle.

    A collective belongs to the step in which it began. Between two collectives of which one begins before the other
    ended there is no idle time. Threads: autograd's and gloo's call in here, too.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open_gate: Callable[[float], None] = lambda until: None
        self._epoch = 0
        self._under_way = 0
        self._idle_since = 0.0
        self._step: _Step | None = None
        self._window: list[_Step] = []
        self._window_steps = FIRST_STEPS
        self._profile: Profile | None = None
        self._shown: list[Profile] = []

    def attach(self, open_gate: Callable[[float], None]) -> None:
        """Have `open_gate(until)` told until when the network is idle: 0 while a collective runs, inf if unknown."""
        with self._lock:
            self._open_gate = open_gate
            open_gate(inf)

    def stamp(self, work: Any, began: float, nbytes: int) -> None:
        """A collective was started, at `began`; its `work` says when it is done."""
        with self._lock:
            idle_s = began - self._idle_since if not self._under_way else 0.0
            self._under_way += 1
            self._open_gate(0.0)
            step, epoch = self._step, self._epoch
            index = 0
            if step is not None:
                index = len(step.stamps)
                step.stamps.append((began, began, nbytes))
                step.spans_s.append(max(0.0, idle_s))
        work.when_done(lambda: self._ended(epoch, step, index))

    def _ended(self, epoch: int, step: _Step | None, index: int) -> None:
        now = time.monotonic()
        with self._lock:
            if epoch != self._epoch:
                return  # of a group that was left
            if step is not None:
                began, _, nbytes = step.stamps[index]
                step.stamps[index] = (began, now, nbytes)
            self._under_way -= 1
            if not self._under_way:
                self._idle_since = now
                self._open_gate(self._idle_until(now))

    def _idle_until(self, now: float) -> float:
        if self._profile is None or self._step is None:
            return inf
        spans = self._profile.spans_s
        following = len(self._step.stamps)
        if following > len(spans):
            return inf  # a step like none before: the next profile will know it
        return now + spans[following % len(spans)]

    def begin_step(self) -> tuple[Profile, list[Stamp]] | None:
        """A step begins. When a profile was made of the steps before, return it.

        With the stamps of the last of them, when it is the first, the second (before the first the gate did nothing),
        or unlike the one of which they were returned before.
        """
        now = time.monotonic()
        with self._lock:
            before, self._step = self._step, _Step(now, self._step is not None, [], [])
            if before is None or not before.is_whole:
                return None
            if self._window and len(self._window[-1].stamps) != len(before.stamps):
                self._begin_anew()
            self._window.append(before)
            if len(self._window) <= self._window_steps:  # the last one's length is known when the next one begins
                return None
            steps_s = [after.began - one.began for one, after in zip(self._window, self._window[1:], strict=False)]
            made = self._profile = profile(steps_s, [one.spans_s for one in self._window[:-1]])
            self._window = [before]
            self._window_steps = min(WINDOW_STEPS, 2 * self._window_steps)
            if len(self._shown) > 1 and made.is_like(self._shown[-1]):
                return made, []
            self._shown = [*self._shown[-1:], made]
            return made, before.stamps

    def _begin_anew(self) -> None:
        """The steps to come are others than those before."""
        self._window.clear()
        self._window_steps = FIRST_STEPS

    def reset(self) -> None:
        """The group was left: nothing is under way, and nothing is known of the steps to come for a while."""
        with self._lock:
            self._epoch += 1
            self._under_way = 0
            self._step = None
            self._begin_anew()
            self._profile = None
            self._open_gate(inf)


def nbytes_of(arguments: Sequence[Any]) -> int:
    """Return the bytes of the largest argument of a collective, a tensor or a list of tensors: what is exchanged."""
    return max((_nbytes(argument) for argument in arguments), default=0)


def _nbytes(argument: Any) -> int:
    if isinstance(argument, torch.Tensor):
        return argument.nbytes
    return sum(map(_nbytes, argument)) if isinstance(argument, (list, tuple)) else 0
