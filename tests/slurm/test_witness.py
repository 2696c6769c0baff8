"""What Slurm's word about the nodes comes to, and that of the nodes themselves."""

import time
from collections.abc import Sequence
from itertools import count
from math import inf
from typing import Any

import pytest

from gemini_hpc.core.messages import NodeDrains, NodeExited, Suspend
from gemini_hpc.runtime import witness
from gemini_hpc.runtime.witness import Witness, words
from gemini_hpc.slurm.control import duration_s
from tests.cluster.runs import until

WAIT_S = 20.0


def test_what_states_mean() -> None:
    told = {word.node: word for word in words({"n0": "up", "n1": "gone", "n2": "leaving", "n3": "gone"}, {"n1"})}
    assert isinstance(told["n1"], NodeExited)
    assert told["n0"] == NodeDrains("n0", False)
    assert told["n2"] == NodeDrains("n2", True) and told["n3"] == NodeDrains("n3", True)


def test_nobody_is_gone_by_the_word_of_a_slurm_for_which_all_are() -> None:
    assert set(words({"n0": "gone", "n1": "gone"}, {"n1"})) == {NodeDrains("n0", True), NodeDrains("n1", True)}


class Slurm:
    """Says of all nodes but n0 that they are down; counts how often it was asked. The job has a while left."""

    def __init__(self) -> None:
        self.asked = count()
        self.until = inf

    def left_s(self) -> float:
        return self.until - time.monotonic()

    def node_states(self, nodes: Sequence[str]) -> dict[str, str]:
        next(self.asked)
        return {node: "up" if node == "n0" else "gone" for node in nodes}


def test_a_node_that_is_down_is_gone_when_it_is_silent_and_drained_while_it_is_heard_of(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(witness, "ASK_S", 0.01)
    monkeypatch.setattr(witness, "IN_ORDER_S", 1.0)
    slurm: Any = Slurm()
    observer = Witness(slurm, "n0", ("n0", "n1", "n2"), 0.2, notice_s=1.0)
    observer.want(True)
    observer.want(True)  # at every turn of the loop
    began, said = time.monotonic(), {}

    def all_are_gone() -> bool:
        observer.hears("n2")
        while (word := observer.next()) is not None:
            said.setdefault((word.node, type(word)), time.monotonic() - began)
        return {("n1", NodeExited), ("n2", NodeExited)} <= said.keys()

    until(all_are_gone, "both to be given up", WAIT_S)
    assert said["n1", NodeExited] > 0.2 and said["n2", NodeExited] > 1.0
    assert said["n2", NodeDrains] < said["n2", NodeExited]
    assert ("n0", NodeExited) not in said


def test_it_tells_of_the_time_limit_before_it_comes_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(witness, "ASK_S", 0.01)
    slurm: Any = Slurm()
    slurm.until = time.monotonic() + 1.5
    observer = Witness(slurm, "n0", ("n0",), 0.2, notice_s=1.0)
    observer.want(True)
    told: list[float] = []

    def twice() -> bool:
        while (word := observer.next()) is not None:
            if isinstance(word, Suspend):
                assert "at its time limit" in word.reason
                told.append(slurm.until - time.monotonic())
        return len(told) >= 2

    until(twice, "the news", WAIT_S)
    assert max(told) <= 1.0


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1-02:03:04", 93784),
        ("2:03:04", 7384),
        ("3:04", 184),
        ("59", 59),
        ("0:00", 0),
        ("-0:12", 0),
        ("UNLIMITED", inf),
        ("NOT_SET", inf),
        ("", inf),
    ],
)
def test_the_time_that_is_left(text: str, seconds: float) -> None:
    assert duration_s(text) == seconds
