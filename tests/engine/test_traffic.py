"""The stamps of collectives, the profile made of them, and the gate."""

import time
from collections.abc import Callable
from math import inf

import pytest
import torch

from gemini_hpc.core.schedule import SHARE
from gemini_hpc.engine.traffic import FIRST_STEPS, Traffic, nbytes_of


class Work:
    """A collective that ends when it is told to."""

    def when_done(self, callback: Callable[[], None]) -> None:
        self.end = callback


class Clock:
    """Time that passes when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


class Training:
    """Steps of three collectives: 10 ms of computing, one, then two that overlap, then 30 ms more."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.traffic, self.gate = clock, Traffic(), [inf]
        self.traffic.attach(self.gate.append)

    def begin(self, nbytes: int = 8) -> Work:
        work = Work()
        self.traffic.stamp(work, self.clock.now, nbytes)
        return work

    def step(self, collectives: int = 3) -> object:
        made = self.traffic.begin_step()
        self.clock.now += 0.010
        first = self.begin()
        self.clock.now += 0.002
        first.end()
        self.clock.now += 0.020
        others = [self.begin() for _ in range(collectives - 1)]
        for work in others:
            self.clock.now += 0.001
            work.end()
        self.clock.now += 0.030
        return made


def test_the_profile_has_the_idle_span_before_each_collective(clock: Clock) -> None:
    training = Training(clock)
    made = [training.step() for _ in range(FIRST_STEPS + 3)]
    assert made[:-1] == [None] * (FIRST_STEPS + 2)
    profile, stamps = made[-1]
    usable = (SHARE * 0.040, SHARE * 0.020, 0.0)  # the first: since the step before
    assert profile.spans_s == pytest.approx(usable, abs=0.002)
    assert profile.idle_s == pytest.approx(0.060, abs=0.002)
    assert profile.step_s == pytest.approx(0.064)
    assert [nbytes for _, _, nbytes in stamps] == [8, 8, 8]
    assert [round(end - began, 3) for began, end, _ in stamps] == [0.002, 0.001, 0.002]


def test_the_gate_is_shut_while_anything_runs_and_open_as_long_as_the_profile_promises(clock: Clock) -> None:
    training = Training(clock)
    while training.step() is None:
        assert set(training.gate) <= {inf, 0.0}  # nothing is known yet: open but while a collective runs
    training.gate.clear()
    training.traffic.begin_step()
    clock.now += 0.010
    one = training.begin()
    assert training.gate == [0.0]
    one.end()
    assert training.gate[-1] == pytest.approx(clock.now + SHARE * 0.020)
    two, three = training.begin(), training.begin()
    two.end()
    assert training.gate[-1] == 0.0  # the other one still runs
    three.end()
    assert training.gate[-1] == pytest.approx(clock.now + SHARE * 0.040, abs=0.002)  # until the next step's first


def test_another_sort_of_step_makes_another_profile(clock: Clock) -> None:
    training = Training(clock)
    while training.step() is None:
        pass
    made = [training.step(collectives=2) for _ in range(FIRST_STEPS + 2)]  # as soon as at the start
    profile, stamps = next(item for item in made if item is not None)
    assert len(profile.spans_s) == len(stamps) == 2


def test_a_profile_like_the_one_before_is_not_to_be_drawn_again(clock: Clock) -> None:
    training = Training(clock)
    made = [training.step() for _ in range(3 + 7 * FIRST_STEPS)]
    assert [len(item[1]) for item in made if item is not None] == [3, 3, 0]


def test_a_group_that_was_left_has_nothing_under_way(clock: Clock) -> None:
    training = Training(clock)
    while training.step() is None:
        pass
    lost = training.begin()
    training.traffic.reset()
    assert training.gate[-1] == inf
    lost.end()  # late, and of no concern
    training.begin().end()
    assert training.gate[-1] == inf


def test_what_a_collective_exchanges_is_its_largest_argument() -> None:
    small, large = torch.zeros(2), torch.zeros(8)
    assert nbytes_of((small, large)) == 32
    assert nbytes_of(([small, small], [large, large], None)) == 64
    assert nbytes_of(()) == 0
