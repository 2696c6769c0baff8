"""Recoveries are read from the events as a person would tell them."""

import random
from itertools import pairwise
from typing import Any

import pytest

from gemini_hpc.analysis import timeline
from gemini_hpc.analysis.timeline import MILESTONES, Recovery
from tests.analysis.synthetic import Loss, build


def only(events: list[dict[str, Any]]) -> Recovery:
    (item,) = timeline.recoveries(events)
    return item


def test_a_start_is_no_recovery() -> None:
    assert timeline.recoveries(build(10)) == []
    assert timeline.recoveries([]) == []
    assert timeline.table([]) == "no recovery"


def test_a_killed_node() -> None:
    item = only(build(24, [Loss(12, rank=2, replayed=1)]))
    assert (item.number, item.outcome, item.action, item.targets) == (1, "recovered", "kill_node", ("node2",))
    assert (item.during, item.generations, item.step, item.first_step) == ("step 12, backward", (2,), 10, 11)
    assert (item.rung, item.tier, item.replayed) == ("hot_swap", "peer", 1)
    reached = [item.ms(name) for name in MILESTONES]
    assert reached == sorted(reached)
    assert item.ms("detected") == pytest.approx(31.2, abs=0.01)
    assert item.ms("evicted") == pytest.approx(33.3, abs=0.01)
    assert item.ms("fetched") == pytest.approx(55.6, abs=0.01)


def test_the_order_of_the_events_does_not_matter() -> None:
    events = build(24, [Loss(12, rank=2, replayed=1)])
    shuffled = random.Random(3).sample(events, len(events))
    assert timeline.recoveries(shuffled) == timeline.recoveries(events)


def test_without_a_recorded_fault_time_counts_from_the_first_suspicion() -> None:
    item = only(build(24, [Loss(12, rank=2, drill=False)]))
    assert (item.action, item.during, item.ms("detected")) == ("", "", 0.0)
    assert item.ms("evicted") == pytest.approx(2.1, abs=0.01)
    assert timeline.title(item) == "node2 lost"


def test_a_killed_worker_needs_no_spare() -> None:
    item = only(build(24, [Loss(12, rank=1, action="kill_worker")]))
    assert (item.rung, item.tier, item.replayed) == ("restart", "local", 0)
    assert item.ms("evicted") is None and item.ms("promoted") is None and item.ms("fetched") is None
    assert item.ms("first step") is not None
    assert timeline.title(item) == "worker of node1 killed (step 12, backward)"


def test_two_recoveries_each_count_from_their_own_fault() -> None:
    losses = [Loss(8, rank=2, replayed=2), Loss(16, rank=1, action="kill_worker")]
    first, second = timeline.recoveries(build(24, losses, spares=2))
    assert (first.number, first.targets, first.replayed) == (1, ("node2",), 2)
    assert (second.number, second.targets, second.replayed) == (2, ("node1",), 0)
    assert first.ms("detected") == pytest.approx(second.ms("detected"))
    assert first.ms("protected") < 2000


def test_a_fault_in_the_very_next_step_belongs_to_the_next_recovery() -> None:
    events = build(24, [Loss(8, rank=2), Loss(9, rank=1)], spares=2)
    (early,) = [e for e in events if e["kind"] == "fault" and e["step"] == 9]
    (done,) = [e for e in events if e["kind"] == "first_step" and e["step"] == 8]
    early["t"] = done["t"] - 0.001
    first, second = timeline.recoveries(events)
    assert (first.targets, second.targets) == (("node2",), ("node1",))
    assert second.start == early["t"]


def test_an_outage_that_a_second_loss_prolongs_counts_from_its_first_sign() -> None:
    """A worker is lost without a drill; on the way back a drill strikes another node."""
    events = build(24, [Loss(12, rank=2)])
    fault = next(event for event in events if event["kind"] == "fault")
    suspect = next(event for event in events if event["kind"] == "suspect")
    earlier = [{**suspect, "target": "node1", "t": fault["t"] - 2.0}]
    earlier.append({**earlier[0], "kind": "evict", "rank": 1, "generation": 2, "t": fault["t"] - 1.9})
    item = only([*events, *earlier])
    assert item.start == pytest.approx(fault["t"] - 2.0) and item.ms("detected") == 0.0
    assert item.action == "kill_node" and set(item.targets) == {"node1", "node2"}


def test_a_second_death_on_the_way_is_the_same_outage() -> None:
    item = only(build(24, [Loss(12, rank=2, again=True)], spares=2))
    assert (item.targets, item.generations, item.outcome) == (("node2", "node0"), (2, 3), "recovered")
    assert item.ms("detected") == pytest.approx(31.2, abs=0.01)
    assert item.ms("evicted") > 800
    assert timeline.title(item) == "node2, node0 lost (step 12, backward)"


def test_a_fault_that_nobody_recovers_from() -> None:
    item = only(build(24, [Loss(12, rank=2, final=True)]))
    assert (item.outcome, item.generations, item.step) == ("unfinished", (), None)
    assert item.ms("detected") is not None and item.ms("resumed") is None and item.ms("first step") is None
    assert timeline.summary(item) == "no new step was reached"


def test_a_recovery_that_is_still_going_on() -> None:
    events = build(24, [Loss(12, rank=2)])
    resumed = next(e["t"] for e in events if e["kind"] == "resumed" and e["generation"] == 2)
    item = only([e for e in events if e["t"] <= resumed])
    assert (item.outcome, item.generations) == ("unfinished", (2,))
    assert item.ms("fetched") is not None and item.ms("first step") is None


@pytest.mark.parametrize("drill", [True, False])
@pytest.mark.parametrize("target", ["node1", "node2"])
def test_a_suspicion_that_comes_to_nothing_is_not_told(target: str, drill: bool) -> None:
    events = build(24, [Loss(12, rank=2, drill=drill)])
    t = next(e["t"] for e in events if e["kind"] == "step" and e["step"] == 5)
    about = {"node": "node0", "target": target}
    false = [
        {**about, "t": t, "kind": "suspect", "evidence": "heartbeat", "reason": "late"},
        {**about, "t": t + 0.05, "kind": "cleared", "reason": "it spoke again"},
    ]
    assert only([*events, *false]) == only(events)
    assert timeline.recoveries([*build(24), *false]) == []


def test_a_lost_spare_is_told_apart() -> None:
    events = build(24)
    t = next(e["t"] for e in events if e["kind"] == "step" and e["step"] == 5)
    about = {"node": "node0", "target": "node4", "reason": "exit"}
    events += [
        {**about, "t": t, "kind": "suspect", "evidence": "exit"},
        {**about, "t": t + 0.01, "kind": "evict", "generation": 1},
    ]
    item = only(events)
    assert (item.outcome, item.targets, item.ms("first step")) == ("spare lost", ("node4",), None)
    assert item.ms("evicted") == pytest.approx(10, abs=0.01)


def test_a_node_is_lost_when_it_was_evicted_and_not_seen_again() -> None:
    assert timeline.lost_nodes(build(24)) == set()
    events = build(24, [Loss(12, rank=2)])
    assert timeline.lost_nodes(events) == {"node2"}
    back = {**next(e for e in events if e["kind"] == "memory"), "node": "node2", "t": events[-1]["t"]}
    assert timeline.lost_nodes([*events, back]) == set()


def test_a_resumed_run_starts_anew() -> None:
    failed = build(24, [Loss(12, rank=2, final=True)])
    later = [{**event, "t": event["t"] + 1000} for event in build(24, [Loss(20, rank=3)])]
    first, second = timeline.recoveries(failed + later)
    assert (first.outcome, second.outcome) == ("unfinished", "recovered")
    assert (second.targets, second.replayed) == (("node3",), 0)


def test_a_group_that_failed_without_a_suspect_counts_from_its_abort() -> None:
    events = [e for e in build(24, [Loss(12, rank=2)]) if e["kind"] not in ("fault", "suspect", "evict")]
    item = only(events)
    assert item.start == next(e["t"] for e in events if e["kind"] == "abort")
    assert timeline.title(item) == "group lost"


def test_the_table_is_aligned() -> None:
    items = timeline.recoveries(build(24, [Loss(8, rank=2, replayed=1), Loss(16, rank=1, again=True)], spares=3))
    lines = timeline.table(items).splitlines()
    assert lines[0] == "recovery 1  node2 killed (step 8, backward)"
    assert lines[1] == "  hot swap, step 6 from peer memory, 1 step replayed"
    assert lines[2] == "  detected          31 ms   exit: process 4711 ended by SIGKILL"
    ends = {line.index(" ms") for line in lines if " ms" in line and not line.startswith("recovery")}
    assert len(ends) == 1 and max(map(len, lines)) < 100


def test_the_spans_of_a_rank_follow_each_other_to_the_first_step() -> None:
    item = only(build(24, [Loss(12, rank=2)]))
    assert {span.lane for span in item.spans} == {"cluster", "rank 0", "rank 1", "rank 2", "rank 3"}
    moved = sorted((s for s in item.spans if s.lane == "rank 2"), key=lambda span: span.start_ms)
    assert [s.phase for s in moved] == ["fetch", "wait", "group", "reset", "restore", "first step"]
    for before, after in pairwise(moved):
        assert after.start_ms == pytest.approx(before.end_ms)
    assert moved[-1].end_ms == item.ms("first step")
