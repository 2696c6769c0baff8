"""Rung 2: the engine is taken apart and built again in the same process."""

from tests.engine.harness import Clusters, Undisturbed
from tests.engine.job import Case

CASE = Case(precision="bf16", grad_accum=2, grad_clip=0.5, groups=2, sub_group=150, dropout=0.2, persist=25)
STEPS = 7


def test_a_rebuilt_engine_goes_on_bit_exactly_beside_a_swapped_one(cluster: Clusters, undisturbed: Undisturbed) -> None:
    """One survivor is rebuilt, the other one hot-swapped: their groups must still match."""
    run = cluster(CASE).start()
    run.train_until_struck(1, STEPS, 2, "backward", 5)
    run.survivors_fail(2)
    step = run.recover([2], rebuilt=[0])
    run.train(step + 1, STEPS)
    assert run.losses() == undisturbed(CASE, 3, STEPS)


def test_three_rebuilds_leak_nothing(cluster: Clusters, undisturbed: Undisturbed) -> None:
    run = cluster(CASE, size=2, spares=0).start()
    run.train(1, 1)
    seen = []
    for step in range(1, 5):
        assert run.recover([], rebuilt=[0, 1]) == step
        run.train(step + 1, step + 1)
        seen.append(run.ranks[0].call("census"))
    for count in seen:
        assert count["old_engines"] == 0
        assert (count["groups"], count["threads"], count["fds"]) == tuple(
            seen[0][what] for what in ("groups", "threads", "fds")
        )
    assert seen[-1]["rss_kib"] - seen[1]["rss_kib"] < 8 << 10, [count["rss_kib"] for count in seen]
    losses = undisturbed(CASE, 2, STEPS)
    assert run.losses() == {key: loss for key, loss in losses.items() if key[1] <= 5}


def test_a_rebuilt_engine_may_become_another_rank(cluster: Clusters, undisturbed: Undisturbed) -> None:
    run = cluster(CASE, size=2, spares=0).start()
    run.train(1, 3)
    payloads = [bytes(rank.arena.payload(0, 1)) for rank in run.ranks]
    run.ranks.reverse()
    for rank, payload in zip(run.ranks, payloads, strict=True):
        rank.arena.payload(0, 1)[:] = payload
    assert run.recover([], rebuilt=[0, 1]) == 3
    run.train(4, STEPS)
    assert run.losses() == undisturbed(CASE, 2, STEPS)
