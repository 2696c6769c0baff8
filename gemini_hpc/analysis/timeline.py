"""Recoveries as the event log tells them: what was lost, what came when, and what it cost. Pure.

A recovery is one outage: from the loss of a worker or a node until all ranks have finished a new step. When
another one dies on the way, or a plan fails, that is still the same outage, with one more generation.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from gemini_hpc.analysis.outages import CAUSES, Event, Outage, attempts, of, outages

MILESTONES = ("detected", "evicted", "promoted", "fetched", "resumed", "first step", "protected")
"""In the order in which they come. The outage ends with the first step; once protected, the next may come."""

RUNGS = ("fresh", "hot_swap", "rebuild", "restart")
TIERS = ("fresh", "local", "peer", "persistent")


@dataclass(frozen=True)
class Milestone:
    """`ms` counts from the start of the recovery; None = it was not reached, or not needed."""

    name: str
    ms: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Span:
    """Something that lasted, for the chart: `lane` is "cluster" or "rank N"; `note` says more."""

    lane: str
    phase: str  # detect | decide | fetch | wait (for others) | group | reset | restore | first step
    start_ms: float
    end_ms: float
    note: str = ""


@dataclass(frozen=True)
class Recovery:
    """One outage.

    Times count from `start` (unix seconds): the drill's fault where one was recorded (`action` is its
    name), else the first suspicion. `outcome` is "recovered", "unfinished" (no new step was reached) or
    "spare lost" (a node without a rank: nothing had to be recovered). `tier` and `rung` are the furthest
    that any rank had to go. `step` is the one that was restored (-1: from the beginning), `replayed` how
    many finished steps were done again.
    """

    number: int
    start: float
    action: str
    during: str
    targets: tuple[str, ...]
    outcome: str
    milestones: tuple[Milestone, ...]
    generations: tuple[int, ...] = ()
    rung: str = ""
    tier: str = ""
    step: int | None = None
    first_step: int | None = None
    replayed: int = 0
    reason: str = ""
    spans: tuple[Span, ...] = ()

    def ms(self, milestone: str) -> float | None:
        """Return when `milestone` was reached, in milliseconds since `start`; None when it was not."""
        return next(m.ms for m in self.milestones if m.name == milestone)


def recoveries(events: Iterable[Event]) -> list[Recovery]:
    """Return the recoveries of a run, oldest first, from its events in any order."""
    found: list[Recovery] = []
    for attempt in attempts(events):
        for outage in outages(attempt):
            found += _recoveries_of(outage, attempt, len(found) + 1)
    return found


def lost_nodes(events: Sequence[Event]) -> set[str]:
    """Return the nodes that were evicted and did not come back."""
    evicted = {str(event["target"]): float(event["t"]) for event in of(events, "evict")}
    seen = {str(event["node"]): float(event["t"]) for event in of(events, "step", "memory")}
    return {node for node, t in evicted.items() if seen.get(node, t) <= t}


def table(items: Sequence[Recovery]) -> str:
    """Return the recoveries as text for the terminal, one line per milestone."""
    if not items:
        return "no recovery"
    return "\n\n".join(_text(item) for item in items)


def what(item: Recovery) -> str:
    """Say in a few words what was lost."""
    names = ", ".join(item.targets) or "group"
    if len(item.targets) == 1 and item.action in ("kill_node", "kill_worker"):
        return f"{'worker of ' * (item.action == 'kill_worker')}{names} killed"
    return f"{names} lost"


def title(item: Recovery) -> str:
    """Say in one line what was lost, and when."""
    return what(item) + (f" ({item.during})" if item.during else "")


def summary(item: Recovery) -> str:
    """Say in one line how it was recovered."""
    if item.outcome == "spare lost":
        return "it held no rank: nothing had to be recovered"
    if item.outcome == "unfinished":
        return "no new step was reached" + (f" (generation {item.generations[-1]})" if item.generations else "")
    source = {
        "fresh": "from the beginning",
        "local": "from its own node's memory",
        "peer": "from peer memory",
        "persistent": "from the persistent tier",
    }.get(item.tier, item.tier)
    restored = source if item.step is None or item.step < 0 else f"step {item.step} {source}"
    count = item.replayed
    again = f"{count} step{'s' * (count > 1)} replayed" if count else "nothing done twice"
    return ", ".join(filter(None, [item.rung.replace("_", " "), restored, again]))


def number(value: float) -> str:
    """Write a whole number with thin spaces between the thousands, as the figures do."""
    return f"{value:,.0f}".replace(",", "\u2009")


def _text(item: Recovery) -> str:
    lines = [f"recovery {item.number}  {title(item)}", f"  {summary(item)}"]
    for milestone in item.milestones:
        if milestone.ms is not None:
            time = f"{milestone.ms:>9,.0f} ms".replace(",", " ")
            lines.append(f"  {milestone.name:<10} {time}   {milestone.note}".rstrip())
    return "\n".join(lines)


def _recoveries_of(outage: Outage, attempt: Sequence[Event], number: int) -> list[Recovery]:
    promoted = {str(event["target"]) for event in of(outage.events, "promote")}
    causes = of(outage.events, *CAUSES)
    idle = [e for e in causes if str(e["target"]) not in outage.active | promoted]
    found: list[Recovery] = []
    for target in dict.fromkeys(str(e["target"]) for e in idle if e["kind"] != "suspect"):
        about = [e for e in idle if str(e["target"]) == target]
        found.append(_build(number + len(found), about, None, attempt, "spare lost"))
    ours = [e for e in outage.events if e not in idle]
    if of(ours, "plan", "fault", "evict"):
        outcome = "recovered" if outage.end else "unfinished"
        found.append(_build(number + len(found), ours, outage.end, attempt, outcome))
    return found


def _build(
    number: int,
    events: Sequence[Event],
    end: Event | None,
    attempt: Sequence[Event],
    outcome: str,
) -> Recovery:
    causes = of(events, *CAUSES)
    # A suspicion that was dropped again is not what this is about; nor is one that came before the fault.
    lost = {str(e["target"]) for e in of(causes, "evict")} or {str(e["target"]) for e in causes}
    faults = [e for e in of(causes, "fault") if str(e["target"]) in lost]
    since = {str(e["target"]): float(e["t"]) for e in of(events, "cleared", "fault")}
    suspects = [
        e for e in of(causes, "suspect") if str(e["target"]) in lost and e["t"] >= since.get(str(e["target"]), 0.0)
    ]
    signs = faults + suspects + of(causes, "evict") or of(events, "abort", "plan")
    first = min(signs, key=lambda event: float(event["t"]))
    plans = of(events, "plan")
    plan = plans[-1] if plans else None
    generation = plan["generation"] if plan else None
    last = [e for e in events if plan and e.get("generation") == generation and e["t"] >= plan["t"]]
    resumed = of(last, "resumed")
    before = [e["step"] for e in of(attempt, "step") if plan and e["generation"] < generation]
    protected = [e for e in of(attempt, "protected") if end and e["generation"] == generation]
    reached = {
        "detected": suspects[:1],
        "evicted": of(causes, "evict")[-1:],
        "promoted": of(last, "promote")[-1:],
        "fetched": of(last, "fetched")[-1:],
        "resumed": resumed[-1:],
        "first step": [end] if end else [],
        "protected": protected[:1],
    }
    origin = float(first["t"])
    return Recovery(
        number=number,
        start=origin,
        action=str(faults[0].get("action", "")) if faults else "",
        during=_during(faults[0]) if faults else "",
        targets=tuple(dict.fromkeys(str(e["target"]) for e in causes if str(e["target"]) in lost)),
        outcome=outcome,
        milestones=tuple(_milestone(name, reached[name], origin) for name in MILESTONES),
        generations=tuple(dict.fromkeys(int(p["generation"]) for p in plans)),
        rung=_furthest((str(e["rung"]) for e in resumed), RUNGS),
        tier=_furthest((str(m["tier"]) for m in plan["moves"]), TIERS) if plan else "",
        step=int(plan["step"]) if plan else None,
        first_step=int(end["step"]) if end else None,
        replayed=max(0, max(before) - max(int(plan["step"]), 0)) if plan and before else 0,
        reason=str(plan.get("reason", "")) if plan else "",
        spans=tuple(_spans(last, plan, end, suspects, origin)),
    )


def _during(fault: Event) -> str:
    parts = [f"step {fault['step']}" if fault.get("step") is not None else "", str(fault.get("phase") or "")]
    return ", ".join(filter(None, parts))


def _milestone(name: str, reached: Sequence[Event], origin: float) -> Milestone:
    if not reached:
        return Milestone(name)
    event = reached[-1]
    return Milestone(name, _ms(event["t"], origin), _note(event))


def _note(event: Event) -> str:
    match event["kind"]:
        case "suspect":
            return ": ".join(filter(None, [str(event.get("evidence", "")), str(event.get("reason", ""))]))
        case "promote":
            return f"{event['target']} takes rank {event['rank']}"
        case "fetched":
            size, seconds = event.get("bytes") or 0, event.get("seconds") or 0
            source = event["source"] or event.get("tier", "")
            return f"rank {event['rank']}, {size / 1e6:.1f} MB from {source} in {seconds * 1e3:.0f} ms"
        case "resumed":
            return "last rank in the new group"
        case "first_step":
            return f"step {event['step']} done by all ranks"
        case "protected":
            return f"step {event['step']} safe on all holders again"
    return str(event.get("reason", ""))


def _furthest(values: Iterable[str], order: Sequence[str]) -> str:
    return max(values, key=lambda v: order.index(v) if v in order else len(order), default="")


def _ms(t: float, origin: float) -> float:
    return (float(t) - origin) * 1e3


def _spans(
    last: Sequence[Event], plan: Event | None, end: Event | None, suspects: Sequence[Event], origin: float
) -> Iterator[Span]:
    if plan is None:
        return
    decided = _ms(plan["t"], origin)
    detected = _ms(suspects[0]["t"], origin) if suspects else 0.0
    yield Span("cluster", "detect", 0.0, detected)
    yield Span("cluster", "decide", detected, decided, str(plan.get("reason", "")))
    free = {}  # when a rank has all that it needs
    begun = {e["rank"]: _ms(e["t"], origin) for e in of(last, "fetch_started")}
    for event in of(last, "fetched"):
        rank = event["rank"]
        free[rank] = _ms(event["t"], origin)
        yield Span(f"rank {rank}", "fetch", begun.get(rank, decided), free[rank], _note(event))
    for event in of(last, "resumed"):
        lane, done = f"rank {event['rank']}", _ms(event["t"], origin)
        note = f"on {event.get('target', '')}, {event['rung']}".replace("_", " ")
        parts = [(p, (event.get(f"{p}_s") or 0.0) * 1e3) for p in ("group", "reset", "restore")]
        at = done - sum(ms for _, ms in parts)
        yield Span(lane, "wait", min(at, free.get(event["rank"], decided)), at, "for the other ranks")
        for phase, ms in parts:
            yield Span(lane, phase, at, at + ms, note)
            at += ms
        if end is not None:
            yield Span(lane, "first step", done, _ms(end["t"], origin), f"step {end['step']}")
