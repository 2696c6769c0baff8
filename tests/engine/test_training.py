"""When the ranks of a step agree on its snapshot."""

from collections.abc import Callable
from types import SimpleNamespace

import torch

from gemini_hpc.engine.elastic import Agreement
from gemini_hpc.engine.training import train_step


def test_the_ranks_may_agree_before_and_after_the_last_backward_pass() -> None:
    """The first hides behind the backward pass, the second is as late as it can be."""
    done: list[str] = []
    engine = SimpleNamespace(
        gradient_accumulation_steps=lambda: 2,
        backward=lambda loss: done.append("backward"),
        step=lambda: done.append("update"),
    )
    training = SimpleNamespace(
        batch=lambda step, rank, micro_step: micro_step,
        loss=lambda engine, batch: done.append("forward") or torch.tensor(float(batch)),
    )
    loss = train_step(engine, training, seed=1, step=1, rank=0, agree=lambda: done.append("agree"))
    first, last = ["forward", "backward", "update"], ["forward", "agree", "backward", "agree", "update"]
    assert done == first + last
    assert loss == 0.5


def test_a_yes_of_all_stands_and_after_a_no_they_vote_again() -> None:
    cast: list[bool] = []

    def outcomes(*answers: bool) -> Callable[[], Callable[[], bool]]:
        left = iter(answers)

        def vote() -> Callable[[], bool]:
            cast.append(answer := next(left))
            return lambda: answer

        return vote

    for answers, votes, reached in (((True,), [True], True), ((False, True), [False, True], True)):
        cast.clear()
        agreement = Agreement(outcomes(*answers))
        agreement.vote()
        agreement.vote()
        assert (cast, agreement.reached()) == (votes, reached)
    assert not Agreement(outcomes()).reached()
