"""Schedules of failures: drawn from a seed, played on the simulation, and judged.

`python -m tests.scenarios.schedules SEED` replays one with a log; `python -m tests.scenarios.schedules 0:100000`
(`make simulate-faults SEEDS=0:100000`) plays many on all cores.
"""

import argparse
import json
import multiprocessing
import random
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from gemini_hpc.core.placement import FORMS, Form
from tests.scenarios.invariants import UNWRITTEN, Broken
from tests.scenarios.simulation import CLUSTER, Simulation, rules

END_S = 150.0
DISORDER_S = 30.0
SHAPES = [
    *((3, 1, 2), (4, 1, 2), (4, 2, 2), (2, 1, 2), (1, 1, 1), (3, 2, 3), (4, 1, 1), (2, 2, 1), (5, 1, 2), (3, 3, 2)),
    *((5, 2, 2), (6, 2, 3), (4, 2, 4), (3, 1, 3)),
]
"""Ranks, spares, replicas."""

COORDINATOR = "the coordinator"
"""As a target: whoever leads when it happens."""


@dataclass(frozen=True)
class Fault:
    """What fails, where, when, and for how long (where that has a meaning)."""

    at: float
    kind: str
    node: str
    seconds: float = 0.0
    other: str = ""  # the second node of a cut


@dataclass(frozen=True)
class Schedule:
    """One history, up to the seed of its delays."""

    sort: str
    shape: tuple[int, int, int]
    faults: tuple[Fault, ...]
    seed: int | None
    steps: int = 8
    persist_every: int = 4
    step_s: float = 0.05
    persist_s: float = 0.05
    pull_s: float = 0.02
    return_s: float | None = None
    disorder: float = 0.0
    bad_reads: float = 0.0
    delay_s: float = 0.001  # of a message
    placement: Form = "mixed"
    mode: str = "immediate"  # protect.mode

    def nodes(self) -> tuple[str, ...]:
        return tuple(f"n{i}" for i in range(self.shape[0] + self.shape[1]))

    def keeps_majority(self) -> bool:
        """Whether a majority can speak at all times, and be heard within the short bounds of a simulation.

        What is lost: nodes, as many as there are such faults.
        """
        lost = sum(fault.kind in COSTLY for fault in self.faults)
        apart = any(fault.kind == "split" for fault in self.faults)
        return not apart and self.delay_s < 0.1 and 2 * (sum(self.shape[:2]) - lost) > sum(self.shape[:2])

    def must_finish(self) -> bool:
        """I5: enough spares, and a majority that can speak."""
        lost = sum(fault.kind in COSTLY for fault in self.faults)
        kinds = {fault.kind for fault in self.faults}
        spared = lost + sum(fault.kind == "bad_node" for fault in self.faults)
        stuck = lost and "no_host" in kinds and kinds & {"no_tier", "bad_disk", "no_writes"}  # not read, and not saved
        return (
            not self.disorder
            and not stuck
            and spared <= self.shape[1]
            and self.keeps_majority()
            and not any(fault.kind in ENDING or fault.other == CLUSTER for fault in self.faults)
        )


Act = Callable[[Simulation, str, Fault], None]


def _cut_off(sim: Simulation, node: str, fault: Fault) -> None:
    sim.cut(sim.lines_between([node], [*sim.rules.nodes, CLUSTER]), fault.seconds, fault.other == "breaks")


def _one_way(sim: Simulation, node: str, fault: Fault) -> None:
    others = [other for other in sim.rules.nodes if other != node]
    sim.cut([(node, o) if fault.other == "out" else (o, node) for o in others], fault.seconds)


def _split(sim: Simulation, node: str, fault: Fault) -> None:
    """Two camps: `other` names the nodes of the first one."""
    camp = fault.other.split()
    sim.cut(sim.lines_between(camp, [n for n in sim.rules.nodes if n not in camp]), fault.seconds)


def _link(sim: Simulation, node: str, fault: Fault) -> None:
    """One line only: between two nodes, or between a node and the cluster."""
    if fault.other != node:
        sim.cut(sim.lines_between([node], [fault.other]), fault.seconds)


def _hang_worker(sim: Simulation, node: str, fault: Fault) -> None:
    worker = sim.nodes[node].worker
    if worker is not None:
        worker.stuck = True


def _trouble(sim: Simulation, node: str, fault: Fault) -> None:
    worker = sim.nodes[node].worker
    if worker is not None and worker.alive and worker.state == "training" and not worker.stuck:
        worker.fail("a collective timed out")


def _hang_archiver(sim: Simulation, node: str, fault: Fault) -> None:
    sim.nodes[node].archiver.hung = True


def _corrupt(sim: Simulation, node: str, fault: Fault) -> None:
    area, half = divmod(int(fault.seconds * 1000), 2)
    sim.corrupt(node, area % max(map(len, sim.areas)), half)


def _corrupt_file(sim: Simulation, node: str, fault: Fault) -> None:
    if sim.manifests:
        sim.corrupt_file(max(sim.manifests), int(fault.seconds * 1000) % sim.rules.world_size)


def _slow_disk(sim: Simulation, node: str, fault: Fault) -> None:
    sim.persist_s, sim.survey_s = 0.7, 0.5


def _bad_disk(sim: Simulation, node: str, fault: Fault) -> None:
    """For a while every other write to the persistent tier fails."""
    until = sim.now + fault.seconds
    sim.persist_fails = lambda order: sim.now < until and sim.chance(0.5)


def _no_tier(sim: Simulation, node: str, fault: Fault) -> None:
    """For a while nothing can be written to the persistent tier."""
    until = sim.now + fault.seconds
    sim.persist_fails = lambda order: sim.now < until


def _lose_host(sim: Simulation, node: str, fault: Fault) -> None:
    """For a while, or for good."""
    sim.lose_host(node)
    if fault.other:
        sim.after(fault.seconds, sim.no_host.discard, node)


def _drain(sim: Simulation, node: str, fault: Fault) -> None:
    """For a while, or for good."""
    sim.drain(node)
    if fault.other:
        sim.after(fault.seconds, sim.drain, node, False)


def _bad_code(sim: Simulation, node: str, fault: Fault) -> None:
    """A step that is yet to come cannot be done, on whatever node."""
    sim.bad_step = sim.most_trained + 1 + int(fault.seconds)


FAULTS: dict[str, Act] = {
    "bad_node": lambda sim, node, fault: sim.bad_nodes.add(node),
    "bad_code": _bad_code,
    "suspend": lambda sim, node, fault: sim.suspend(),
    "drain": _drain,
    "kill_node": lambda sim, node, fault: sim.kill_node(node),
    "kill_unseen": lambda sim, node, fault: sim.kill_node(node, seen=False),
    "kill_worker": lambda sim, node, fault: sim.kill_worker(node),
    "hang_worker": _hang_worker,
    "trouble": _trouble,
    "crash_host": lambda sim, node, fault: sim.crash_host(node),
    "hang_host": lambda sim, node, fault: sim.hang_host(node),
    "crash_archiver": lambda sim, node, fault: sim.nodes[node].end_archiver(),
    "hang_archiver": _hang_archiver,
    "pause": lambda sim, node, fault: sim.pause(node, fault.seconds),
    "cut_off": _cut_off,
    "one_way": _one_way,
    "split": _split,
    "link": _link,
    "corrupt": _corrupt,
    "corrupt_file": _corrupt_file,
    "slow_disk": _slow_disk,
    "bad_disk": _bad_disk,
    "no_tier": _no_tier,
    "no_worlds": lambda sim, node, fault: sim.lose_launcher(fault.seconds),
    "no_host": _lose_host,
    "no_writes": lambda sim, node, fault: sim.no_writes.add(node),
}
COSTLY = ("kill_node", "kill_unseen", "pause", "cut_off", "one_way", "split", "link")
"""They may cost a node."""

ENDING = ("corrupt_file", "suspend", "bad_code")
"""They may end a run."""

PROCESSES = ("kill_worker", "hang_worker", "trouble", "crash_host", "hang_host", "crash_archiver", "hang_archiver")
SORTS: dict[str, tuple[str, ...]] = {
    "single": tuple(kind for kind in FAULTS if kind not in ENDING),
    "crashes": ("kill_node", "kill_node", "kill_unseen", "bad_disk", "no_host", *PROCESSES),
    "coordinator": ("kill_node", "kill_unseen", "pause", "cut_off", "link", "kill_worker"),
    "partitions": ("cut_off", "one_way", "split", "split", "link", "kill_node", "pause"),
    "data": (
        *("corrupt", "corrupt", "corrupt_file", "slow_disk", "bad_disk", "no_writes"),
        *("crash_archiver", "hang_archiver", "kill_node"),
    ),
    "suspensions": (
        *("suspend", "suspend", "drain", "drain", "kill_node"),
        *("kill_worker", "hang_archiver", "slow_disk", "bad_disk", "no_writes", "link"),
    ),
    "hosts": (
        *("no_host", "no_host", "no_worlds", "crash_host", "hang_host", "kill_node", "kill_worker"),
        *("drain", "corrupt", "link", "no_tier", "bad_node"),
    ),
    "returns": ("kill_node", "kill_node", "kill_node", "kill_worker", "pause", "link", "split", "no_host", "drain"),
    "code": (
        *("bad_node", "bad_node", "bad_code", "bad_code", "kill_node", "kill_unseen", "kill_worker"),
        *("drain", "suspend", "link", "no_host", "bad_disk"),
    ),
    "disorder": ("kill_node", "kill_worker", "pause", "cut_off", "trouble", "crash_host"),
}


def schedule_of(seed: int) -> Schedule:
    """Draw a schedule. Every sort gets its turn."""
    draw = random.Random(seed)
    sort = list(SORTS)[seed % len(SORTS)]
    shape = draw.choice(SHAPES[:3] if sort == "single" else SHAPES)
    nodes = [f"n{i}" for i in range(shape[0] + shape[1])]
    faults, at = [], draw.choice((0.0, 0.5, 0.8)) + draw.random() * 0.7
    for place in range(1 if sort == "single" else draw.choice((1, 2, 2, 3, 3, 4, 6))):
        kind = draw.choice(SORTS[sort])
        to_coordinator = draw.random() < (0.8 if sort == "coordinator" and place == 0 else 0.25)
        node = COORDINATOR if to_coordinator else draw.choice(nodes)
        other = ""
        if kind == "split":
            other = " ".join(draw.sample(nodes, draw.randint(1, max(1, len(nodes) - 1))))
        elif kind == "link":
            other = draw.choice([*nodes, CLUSTER])
        elif kind in ("one_way", "cut_off"):
            other = draw.choice(("out", "in", "breaks"))
        elif kind in ("drain", "no_host"):
            other = draw.choice(("", "passes"))
        seconds = draw.choice((0.3, 1.0, 2.0, 2.0, 4.0, 20.0)) * (0.5 + draw.random())
        faults.append(Fault(round(at, 4), kind, node, round(seconds, 4), other))
        at += draw.choice((0.005, 0.05, 0.2, 1.0, 3.0)) * 2 * draw.random()
    return Schedule(
        sort,
        shape,
        tuple(faults),
        seed,
        steps=draw.choice((5, 7, 10)),
        persist_every=draw.choice((2, 4, 100)),
        step_s=draw.choice((0.03, 0.1, 0.2)),
        persist_s=draw.choice((0.02, 0.2, 0.6)),
        pull_s=draw.choice((0.005, 0.02, 0.15)),
        return_s=draw.choice((0.5, 2.0)) if sort == "returns" else None,
        disorder=draw.choice((0.01, 0.03, 0.1)) if sort == "disorder" else 0.0,
        bad_reads=draw.choice((0.0, 0.0, 0.05)) if sort in ("data", "crashes") else 0.0,
        delay_s=draw.choice((0.001, 0.001, 0.02, 0.1)) if sort not in ("single", "data") else 0.001,
        placement=draw.choice(FORMS),
        mode=draw.choice(("interleaved", "immediate", "off")),
    )


def play(schedule: Schedule, log: Callable[[Simulation, str], None] | None = None) -> Simulation:
    """Play one history to its end; raises Broken when it breaks an invariant."""
    world_size, spares, replicas = schedule.shape
    shape = rules(
        world_size + spares,
        world_size=world_size,
        replicas=replicas,
        placement=schedule.placement,
        total_steps=schedule.steps,
        snapshot_every=schedule.persist_every if schedule.mode == "off" else 1,
        persist_every=schedule.persist_every,
        patient=schedule.mode == "interleaved",
    )

    def prepare(sim: Simulation) -> None:
        sim.step_s, sim.persist_s, sim.pull_s = schedule.step_s, schedule.persist_s, schedule.pull_s
        sim.return_s, sim.bad_reads = schedule.return_s, schedule.bad_reads
        sim.network.disorder, sim.network.delay_s = schedule.disorder, schedule.delay_s
        if log is not None:
            sim.log = lambda line: log(sim, line)
        for fault in schedule.faults:
            sim.after(fault.at, strike, sim, fault)

    sim = Simulation(shape, schedule.seed, prepare=prepare)
    if schedule.disorder:  # nothing is promised but that no invariant breaks
        return sim.run_for(DISORDER_S)
    sim.run(Simulation.over, END_S)
    unwritten = "could not be published" in sim.reason and sim.struck & UNWRITTEN
    if schedule.must_finish() and sim.outcome != "finished" and not unwritten:
        raise Broken(f"I5: {sim.outcome}: {sim.reason}")
    lasts = schedule.keeps_majority() or schedule.return_s is not None
    if lasts and sim.reason == "no node is left":
        raise Broken(f"I5: {sim.reason}, though some were there, or came back")
    return sim


def strike(sim: Simulation, fault: Fault) -> None:
    node = fault.node
    if node == COORDINATOR:
        node = sim.leader.name if sim.leader is not None else sim.rules.nodes[0]
    if sim.log is not None:
        sim.log(f"--- {fault.kind} {node} {fault}")
    if sim.nodes[node].up and not sim.over():
        sim.struck.add(fault.kind)
        FAULTS[fault.kind](sim, node, fault)


# --- many of them ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    seed: int
    sort: str
    outcome: str
    events: int
    found: str = ""


def result_of(seed: int) -> Result:
    schedule = schedule_of(seed)
    try:
        sim = play(schedule)
    except Broken as error:
        return Result(seed, schedule.sort, "broken", 0, str(error)[:300])
    except Exception as error:  # noqa: BLE001  a crash of the core is a finding as well
        where = " ".join(traceback.format_exc().split("\n")[-6:-1])
        return Result(seed, schedule.sort, "crashed", 0, f"{type(error).__name__}: {error} {where}"[:500])
    return Result(seed, schedule.sort, sim.outcome or "unfinished", sim.events)


def sweep(seeds: range, processes: int) -> Iterator[Result]:
    if processes == 1:
        yield from map(result_of, seeds)
        return
    with multiprocessing.Pool(processes) as pool:
        yield from pool.imap_unordered(result_of, seeds, chunksize=50)


def report(seeds: range, processes: int, record: Path | None = None) -> int:
    """Play many, print what was found, and write it to `record`; the exit status."""
    start, shown = time.monotonic(), time.monotonic()
    outcomes: Counter[tuple[str, str]] = Counter()
    events, found = 0, []
    for done, result in enumerate(sweep(seeds, processes), 1):
        outcomes[result.sort, result.outcome] += 1
        events += result.events
        if result.found:
            found.append(result)
            print(f"seed {result.seed} ({result.sort}): {result.found}", flush=True)
        if time.monotonic() - shown > 10:
            shown = time.monotonic()
            print(f"{done} of {len(seeds)} schedules, {len(found)} findings, {shown - start:.0f} s", flush=True)
    passed = time.monotonic() - start
    print(f"{len(seeds)} schedules, {events} events, {passed:.1f} s, {1000 * passed / len(seeds):.2f} ms each")
    for sort in SORTS:
        ends = ", ".join(f"{number} {end}" for (s, end), number in sorted(outcomes.items()) if s == sort)
        print(f"  {sort:12} {sum(n for (s, _), n in outcomes.items() if s == sort):6}: {ends}")
    if record is not None:
        ends = [{"sort": sort, "end": end, "schedules": n} for (sort, end), n in sorted(outcomes.items())]
        counted = {"first": seeds.start, "end": seeds.stop, "events": events, "seconds": round(passed, 1)}
        summary = counted | {"processes": processes, "ends": ends, "found": [asdict(result) for result in found]}
        record.write_text(json.dumps(summary, indent=1) + "\n")
    for result in found:
        print(f"FOUND by seed {result.seed}: replay it with `python -m tests.scenarios.schedules {result.seed}`")
    return 1 if found else 0


def replay(seed: int) -> int:
    """Play one with a log of all that is decided."""
    schedule = schedule_of(seed)
    print(schedule)
    try:
        sim = play(schedule, lambda sim, line: print(f"{sim.now:8.3f} {line}"))
    except Broken as error:
        print(f"BROKEN {error}")
        return 1
    print(f"{sim.outcome}: {sim.reason}; {sim.events} events")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description="Play schedules of failures on the simulated cluster.")
    parser.add_argument("seeds", help="one seed, to be replayed with a log; or FIRST:END")
    parser.add_argument("--processes", type=int, default=multiprocessing.cpu_count())
    parser.add_argument("--record", type=Path, help="write the summary of many as JSON")
    options = parser.parse_args()
    first, colon, end = options.seeds.partition(":")
    seeds = range(int(first), int(end or 0))
    return report(seeds, options.processes, options.record) if colon else replay(int(first))


if __name__ == "__main__":
    sys.exit(main())
