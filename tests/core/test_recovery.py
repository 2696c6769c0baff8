"""What a plan may be made of: one step of one history, from memory or from a checkpoint, whichever is newer."""

from dataclasses import replace

from gemini_hpc.core.recovery import assign, of_one_history, plan
from gemini_hpc.core.state import Checkpoint, Cluster, Copies, Copy, Worker, new_cluster
from gemini_hpc.core.turn import Turn
from tests.scenarios.simulation import rules

NODES = {rank: f"n{rank}" for rank in range(4)}


def copy(origin: int, area: int = 0) -> Copy:
    return Copy(area, 0, 100, origin, origin)


def cluster(copies: Copies, published: int = -1) -> Cluster:
    """All five nodes live and have reported; n0 to n3 had the ranks."""
    state = new_cluster(rules(), 0.0)
    members = {node: replace(member, held=()) for node, member in state.members.items()}
    files = {rank: (f"rank-{rank}", 100, 1) for rank in range(4)}
    checkpoint = Checkpoint(published, files) if published >= 0 else None
    return replace(state, members=members, ranks=NODES, copies=copies, published=checkpoint)


def test_no_rank_restores_what_another_history_left_of_the_same_step() -> None:
    """n1 still has step 7 as generation 1 trained it; the others, and n0 for it, have that of generation 2."""
    copies = {(rank, 7): {NODES[rank]: copy(2)} for rank in (0, 2, 3)}
    copies[1, 7] = {"n1": copy(1), "n0": copy(2, area=1)}
    made = plan(cluster(copies))
    assert made is not None and (made.step, made.origin) == (7, 2)
    assert (made.sources[1].tier, made.sources[1].node) == ("peer", "n0")


def test_what_is_kept_for_a_plan_is_its_history_alone() -> None:
    copies = {(0, 6): {"n0": copy(1)}, (0, 7): {"n0": copy(1), "n1": copy(2)}, (1, 7): {"n2": copy(1)}}
    newer: Copies = {(0, 8): {"n0": copy(1)}}
    assert of_one_history({**copies, **newer}, 7, 2) == {(0, 6): {"n0": copy(1)}, (0, 7): {"n1": copy(2)}}


def test_the_newer_of_memory_and_checkpoint_is_taken() -> None:
    memory = {(rank, 7): {NODES[rank]: copy(1)} for rank in range(4)}
    for published, step, tier in ((6, 7, "local"), (7, 7, "local"), (8, 8, "persistent")):
        made = plan(cluster(memory, published))
        assert made is not None
        assert (made.step, made.sources[0].tier) == (step, tier), published


def test_a_place_holds_one_snapshot() -> None:
    """A spare fetched rank 2 for a coordinator that is lost; for the next it takes rank 0, into the same place."""
    turn = Turn(cluster({(2, 7): {"n4": copy(1), "n2": copy(1)}}), 0.0)
    turn.add_copy(0, 7, "n4", copy(1))
    assert {key: set(places) for key, places in turn.cluster.copies.items()} == {(2, 7): {"n2"}, (0, 7): {"n4"}}


def test_without_a_window_host_a_node_restores_what_lies_in_its_own_area_alone() -> None:
    """Not even what it holds for another: that has to be read, too."""
    for area, step in ((0, 7), (1, 5)):
        copies = {(rank, 7): {NODES[rank]: copy(3, area if rank == 1 else 0)} for rank in range(4)}
        turn = Turn(cluster(copies, published=5), 0.0)
        turn.set_member("n1", hostless=True)
        found = plan(turn.cluster)
        assert found is not None and found.ranks[1] == "n1" and found.step == step


def test_a_spare_from_another_rack_than_its_partner_is_better_when_both_are_ready() -> None:
    """Rank 2 is held by rank 3, on n3. A node that is ready is better still: it is there at once."""
    for domains, idle, chosen in (
        ({}, {"n4", "n5"}, "n4"),
        ({"n3": "a", "n4": "a", "n5": "b"}, {"n4", "n5"}, "n5"),
        ({"n3": "a", "n4": "a", "n5": "b"}, {"n4"}, "n4"),
    ):
        state = new_cluster(rules(6, domains=domains), 0.0)
        members = {
            node: replace(member, held=(), worker=Worker.IDLE if node in idle else Worker.BUILDING)
            for node, member in state.members.items()
        }
        members["n2"] = replace(members["n2"], alive=False)
        ranks = assign(replace(state, members=members, ranks=NODES))
        assert ranks == {**NODES, 2: chosen}, domains
