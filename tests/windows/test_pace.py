"""When a window host reads, and how much."""

import time
from math import inf

import pytest

from gemini_hpc.core.messages import Profiled
from gemini_hpc.core.schedule import PATIENCE
from gemini_hpc.windows.pace import BELIEVED, Pace

MB = 1 << 20
CHUNK = 16 * MB


class Training:
    """A gate that is set by hand, and a clock that stands still."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.idle_until = 1000.0, inf
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        self.pace = Pace(lambda: self.idle_until, CHUNK, startup_s=0.001)
        self.pace.took(100 * MB, 0.0, 1.001)

    def profile(self, *spans_s: float, step_s: float = 1.0) -> None:
        self.pace.heed(Profiled("n0", 0, 20, step_s, sum(spans_s), 0.1, spans_s, ()))


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> Training:
    return Training(monkeypatch)


def test_without_a_profile_or_patience_it_reads_at_once(training: Training) -> None:
    assert training.pace.patience_s(50 * MB, 20.0) == (0.0, "")
    training.profile(0.5)
    assert training.pace.patience_s(50 * MB, 0.0) == (0.0, "")
    training.idle_until = 0.0
    assert training.pace.size(50 * MB, training.now) == CHUNK


def test_it_waits_as_long_as_the_idle_spans_take_and_somewhat_more(training: Training) -> None:
    training.profile(0.2, 0.3)
    patience_s, hurry = training.pace.patience_s(60 * MB, 20.0)  # 49 MB fit into a step
    assert (patience_s, hurry) == (PATIENCE * 3, "")


def test_it_says_why_it_does_not_wait(training: Training) -> None:
    training.profile(0.0, 0.0005)
    assert training.pace.patience_s(MB, 20.0)[0] == 0.0
    assert "no idle span" in training.pace.patience_s(MB, 20.0)[1]
    training.profile(0.2, 0.3)
    assert training.pace.patience_s(4000 * MB, 20.0) == (0.0, "a snapshot would take the idle spans of 81 steps")


def test_a_read_fits_into_what_is_left_of_the_idle_span(training: Training) -> None:
    later = training.now + 100
    training.idle_until = 0.0
    assert training.pace.size(50 * MB, later) == 0  # a collective is running
    training.idle_until = training.now + 0.101
    assert training.pace.size(50 * MB, later) == pytest.approx(10 * MB, rel=0.01)
    training.idle_until = training.now + 10
    assert training.pace.size(50 * MB, later) == CHUNK
    training.idle_until = inf
    assert training.pace.size(3 * MB, later) == 3 * MB
    training.idle_until = 0.0
    assert training.pace.size(50 * MB, training.now) == CHUNK  # patience is over


def test_the_newest_reads_together_say_what_the_link_carries(training: Training) -> None:
    training.idle_until = training.now + 0.101
    training.pace.took(MB // 10, 0.0, 0.0011)  # much faster, but what is that
    assert training.pace.size(CHUNK, inf) == pytest.approx(10 * MB, rel=0.01)
    for _ in range(BELIEVED):
        training.pace.took(20 * MB, 0.0, 1.001)
    assert training.pace.size(CHUNK, inf) == pytest.approx(2 * MB, rel=0.01)


def test_a_read_shorter_than_the_least_one_promises_no_miracles(training: Training) -> None:
    for _ in range(BELIEVED):
        training.pace.took(MB // 10, 0.0, 0.0005)
    training.idle_until = training.now + 0.011
    assert training.pace.size(10**9, inf) == pytest.approx(4 * MB, rel=0.01)  # at twice what was seen


def test_the_reads_of_a_while_are_told(training: Training) -> None:
    training.pace.took(5, 10.0, 11.0)
    training.pace.took(7, 12.0, 13.0)
    assert training.pace.reads_between(10.5, 12.0) == ((10.0, 11.0, 5),)
    assert training.pace.reads_between(10.5, 12.5) == ((10.0, 11.0, 5), (12.0, 13.0, 7))
