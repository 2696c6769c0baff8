"""How long the coordinator takes to decide, with how many nodes: an event of every day, and the loss of a node.

A cluster of N nodes (one in a hundred a spare, m = 2) is brought by real events, one from each node, into the middle of
a step: all but 200 have stepped and sealed their snapshots, and half of the replicas are being read. Every decision is
taken from that one state, for `coordinator.step` is pure. Times are of the processor: nothing else is waited for.
`python -m benchmarks.decisions [N ...]` writes benchmarks/results/decisions.json.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from gemini_hpc.core import coordinator
from gemini_hpc.core import messages as m
from gemini_hpc.core.placement import held_by
from gemini_hpc.core.state import NUMBERS_OF_A_TERM, Cluster, Phase, Rules, new_cluster

SIZES = (100, 1000, 10_000)
REPLICAS = 2
NBYTES = 1 << 30
FIRST = NUMBERS_OF_A_TERM + 1  # generation of the second coordinator
ROUTINE = 200  # events of each kind
LOSSES = 10

T = TypeVar("T")


class Model:
    """The cluster as its coordinator sees it. Every node does at once what it is told."""

    def __init__(self, size: int) -> None:
        nodes = tuple(f"n{i:05d}" for i in range(size))
        self.ranks = size - max(1, size // 100)
        self.now = 0.0
        self.pulls: list[m.Pull] = []
        self.events = 0
        bounds = {"heartbeat_timeout_s": 60.0, "suspect_s": 5.0, "leave_s": 60.0, "build_s": 600.0, "takeover_s": 60.0}
        reads = {"fetch_s": 60.0, "gather_s": 60.0, "join_s": 60.0, "world_s": 60.0, "finish_s": 60.0}
        bounds["progress_s"] = 60.0
        shape = {
            "total_steps": 1000,
            "snapshot_every": 1,
            "persist_every": 100,
            "patient": True,
            "max_restarts": 3,
            "max_fruitless": 3,
        }
        rules = Rules(
            nodes, world_size=self.ranks, replicas=REPLICAS, placement="mixed", domains={}, **bounds, **reads, **shape
        )
        self.cluster = new_cluster(rules, self.now, term=2)

    def take(self, events: Iterable[m.Event]) -> list[m.Command]:
        """Have the coordinator hear all of `events`; return what it orders."""
        orders: list[m.Command] = []
        for event in events:
            self.now += 1e-6
            self.cluster, commands = coordinator.step(self.cluster, self.now, event)
            orders += commands
            self.events += 1
        self.pulls += [order for order in orders if isinstance(order, m.Pull)]
        return orders

    def start(self) -> None:
        """A new coordinator takes over: all report what they have, which is step 0 with all its replicas."""
        nodes, areas = self.cluster.rules.nodes, held_by(self.ranks, REPLICAS)
        self.take([m.Surveyed("", self.cluster.survey, -1, {})])
        for i, node in enumerate(nodes):
            owners = areas[i] if i < self.ranks else ()
            held = tuple((area, 0, owner, 0, 1, NBYTES, owner) for area, owner in enumerate(owners))
            was = (1, i) if owners else (0, -1)
            state = (min(i, self.ranks - 1), f"{node}:1", NBYTES, 1, nodes, True, -1, held)
            self.take([m.Inventory(node, self.cluster.term, "idle", "", *was, *state)])

    def members(self) -> list[tuple[int, str]]:
        return list(self.cluster.ranks.items())

    def resumed(self) -> list[m.Event]:
        return [m.Resumed(node, FIRST, rank, 0, 1.0, "hot_swap", 0.1, 0.1, 0.1) for rank, node in self.members()]

    def stepped(self, step: int) -> list[m.Event]:
        return [m.Stepped(node, FIRST, rank, step, 1.0, 1.0, 0.1) for rank, node in self.members()]

    def sealed(self, step: int) -> list[m.Event]:
        return [m.Sealed(node, FIRST, rank, step, step % 2, NBYTES, rank) for rank, node in self.members()]

    def copied(self) -> list[m.Event]:
        """The answers to all reads that were ordered so far."""
        pulls, self.pulls = self.pulls, []
        told = (True, "", 0.1)
        return [
            m.Copied(p.node, FIRST, p.rank, p.step, p.source, p.area, p.half, NBYTES, p.checksum, *told) for p in pulls
        ]


def measure(size: int) -> dict[str, Any]:
    """Milliseconds of one decision: medians of each kind of event."""
    begun = time.perf_counter()
    model = Model(size)
    model.start()
    resumed, stepped, sealed = model.resumed(), model.stepped(1), model.sealed(1)
    said = max(size // 2, model.ranks - ROUTINE)
    # one rank's word that it has resumed comes late: so long no read is ordered: 10,000 nodes take a minute, not ten
    model.take([*resumed[1:], *stepped[:said], *sealed[:said], resumed[0]])
    assert model.cluster.phase is Phase.RUNNING and model.cluster.safe_step == 0
    names = [node for _, node in model.members()]
    routine = {
        "Stepped": _decisions_ms(model, stepped[said:]),
        "Sealed": _decisions_ms(model, sealed[said:]),
        "Copied": _decisions_ms(model, model.copied()),
        "Heartbeat": _decisions_ms(model, [m.Heartbeat(node, 0.0) for node in names]),
        "Tick": _decisions_ms(model, [m.Tick("")] * ROUTINE),
    }
    losses = [_loss_ms(model, node) for node in _some(names, LOSSES)]
    return {
        "nodes": size,
        "routine_ms": {kind: round(statistics.median(times), 4) for kind, times in routine.items()},
        "loss_ms": round(statistics.median(losses), 2),
        "longest_loss_ms": round(max(losses), 2),
        "events": model.events,
        "all_s": round(time.perf_counter() - begun, 1),
    }


def _decisions_ms(model: Model, events: Sequence[m.Event]) -> list[float]:
    """Take some of the events, each from the state as it is now."""
    return [_decide(model, event)[0] for event in _some(events, ROUTINE)]


def _loss_ms(model: Model, node: str) -> float:
    """The cluster says that a node is gone: from that word to the Abort orders and the plan is one decision."""
    took_ms, after, orders = _decide(model, m.NodeExited(node, "its agent is gone"))
    assert after.generation == FIRST + 1 and node not in after.ranks.values()
    assert sum(isinstance(order, m.Abort) for order in orders) == model.ranks - 1
    return took_ms


def _decide(model: Model, event: m.Event) -> tuple[float, Cluster, list[m.Command]]:
    start = time.process_time()
    cluster, orders = coordinator.step(model.cluster, model.now, event)
    return 1000 * (time.process_time() - start), cluster, orders


def _some(things: Sequence[T], number: int) -> Sequence[T]:
    return things[:: max(1, len(things) // number)][:number]


def main() -> None:
    results = []
    for size in map(int, sys.argv[1:] or SIZES):
        found = measure(size)
        results.append(found)
        times = ", ".join(f"{kind} {ms:.3f}" for kind, ms in found["routine_ms"].items())
        loss = f"{found['loss_ms']:.1f} (at most {found['longest_loss_ms']:.1f})"
        print(f"{size:6} nodes: {times}; the loss of a node {loss} ms", flush=True)
    target = Path(__file__).parent / "results" / "decisions.json"
    target.write_text(json.dumps({"replicas": REPLICAS, "cores": os.cpu_count(), "sizes": results}, indent=1) + "\n")
    print(f"written to {target}")


if __name__ == "__main__":
    main()
