"""A rank dies anywhere in a step, a spare takes its place, and the losses are those of the undisturbed run."""

from dataclasses import replace

import pytest

from tests.engine.harness import Cluster, Clusters, Undisturbed
from tests.engine.job import Case

STEPS = 8
DEATH = 5
PLAIN = Case()
HARD = Case(precision="bf16", grad_accum=2, grad_clip=0.5, groups=2, sub_group=150, dropout=0.2, overlap=True)
PERSISTENT = Case(persist=25, grad_accum=2, groups=2, tied=True, buffer="float32")


def train_through_a_death(run: Cluster, victim: int, phase: str, action: str = "kill") -> Cluster:
    run.start()
    run.train_until_struck(1, STEPS, victim, phase, DEATH, action)
    run.survivors_fail(victim)
    step = run.recover([victim])
    assert step in (DEATH - 1, DEATH)
    run.train(step + 1, STEPS)
    return run


@pytest.mark.parametrize(
    ("case", "victim", "phase"),
    [
        (PLAIN, 1, "forward"),
        (HARD, 2, "backward"),
        (HARD, 1, "between"),
        (HARD, 2, "optimizer"),
        (PERSISTENT, 2, "backward"),
        (PERSISTENT, 0, "snapshot"),
        (PLAIN, 1, "after"),
    ],
)
def test_a_spare_takes_the_place_of_the_dead(
    case: Case, victim: int, phase: str, cluster: Clusters, undisturbed: Undisturbed
) -> None:
    run = train_through_a_death(cluster(case), victim, phase)
    assert run.losses() == undisturbed(case, 3, STEPS)


def test_parameters_that_do_not_train_are_the_adopted_rank_s(cluster: Clusters, undisturbed: Undisturbed) -> None:
    """A spare built as rank 0 holds rank 0's piece of them, and no optimizer state to restore it from."""
    case = replace(PLAIN, frozen=True)
    run = train_through_a_death(cluster(case), 1, "backward")
    assert run.losses() == undisturbed(case, 3, STEPS)


def test_a_schedule_whose_state_is_more_than_json(cluster: Clusters, undisturbed: Undisturbed) -> None:
    """MultiStepLR keeps its milestones as numeric keys; as text they would never be met again."""
    case = replace(PLAIN, schedule="multistep")
    run = train_through_a_death(cluster(case), 1, "backward")
    assert run.losses() == undisturbed(case, 3, STEPS)


def test_a_buffer_in_low_precision_is_part_of_the_snapshot(cluster: Clusters, undisturbed: Undisturbed) -> None:
    case = Case(precision="bf16", buffer="bfloat16")
    run = train_through_a_death(cluster(case, size=2), 1, "backward")
    assert run.losses() == undisturbed(case, 2, STEPS)


def test_only_the_abort_wakes_survivors_of_a_frozen_peer(cluster: Clusters, undisturbed: Undisturbed) -> None:
    """SIGSTOP stands for a node without power: no connection is reset."""
    run = cluster(HARD).start()
    frozen = run.train_until_struck(1, STEPS, 2, "backward", DEATH, "stop")
    run.ranks[0].settle()
    run.ranks[1].settle()
    with pytest.raises(AssertionError, match="no answer"):
        run.ranks[0].answer(wait_s=1.0)
    run.survivors_fail(2)
    step = run.recover([2])
    run.train(step + 1, STEPS)
    assert run.losses() == undisturbed(HARD, 3, STEPS)
    assert frozen.state() == "T"


def test_leaving_a_group_with_a_frozen_peer_does_not_block(cluster: Clusters) -> None:
    """A survivor may leave while the others are still in their collectives."""
    run = cluster(HARD).start()
    run.train_until_struck(1, STEPS, 2, "backward", DEATH, "stop")
    run.ranks[0].send("abort", generation=1)
    assert run.ranks[0].failure().peer
    run.ranks[0].call("leave")
    run.ranks[1].send("abort", generation=1)
    assert run.ranks[1].failure().peer
    run.ranks[1].call("leave")


def test_two_deaths_one_after_the_other(cluster: Clusters, undisturbed: Undisturbed) -> None:
    run = cluster(HARD, spares=2).start()
    first = 1
    for victim, phase, step in ((1, "optimizer", 3), (2, "forward", 6)):
        run.train_until_struck(first, STEPS, victim, phase, step)
        run.survivors_fail(victim)
        first = run.recover([victim]) + 1
    run.train(first, STEPS)
    assert run.losses() == undisturbed(HARD, 3, STEPS)


def test_a_mistake_of_the_user_is_not_taken_for_a_lost_peer(cluster: Clusters) -> None:
    run = cluster(PLAIN, size=2, spares=0).start()
    trap = {"phase": "forward", "step": 1, "action": "boom"}
    for number, rank in enumerate(run.ranks):
        rank.send("train", first=1, last=1, trap=trap if number == 0 else None)
    failure = run.ranks[0].failure()
    assert (failure.kind, failure.peer) == ("ValueError", False)
