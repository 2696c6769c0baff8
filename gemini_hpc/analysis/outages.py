"""Which events belong to one recovery. Pure."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Event = Mapping[str, Any]

CAUSES = ("fault", "suspect", "evict")
"""The kinds of events that say that something was lost: all of them have a target."""


@dataclass(frozen=True)
class Outage:
    """What was logged between two first steps, whether anything was lost or not."""

    events: list[Event]
    active: frozenset[str]  # the nodes that held a rank before
    end: Event | None  # the first_step at its end; None = it did not come, or not yet


def attempts(events: Iterable[Event]) -> Iterator[list[Event]]:
    """Sort by time and split at the starts of the run: a resumed one counts its generations anew."""
    attempt: list[Event] = []
    for event in sorted(events, key=lambda event: float(event["t"])):
        if event["kind"] == "run" and event.get("state") == "started" and attempt:
            yield attempt
            attempt = []
        attempt.append(event)
    yield attempt


def outages(attempt: Sequence[Event]) -> Iterator[Outage]:
    """Split an attempt at its first steps, beginning with the first plan.

    That one is the start, not a recovery: what was lost before it held no rank.
    """
    start = next((i for i, event in enumerate(attempt) if event["kind"] == "plan"), None)
    if start is None:
        return
    active = _nodes(attempt[start])
    chunk: list[Event] = []
    for event in attempt[start + 1 :]:
        chunk.append(event)
        if event["kind"] == "first_step":
            early = _early(chunk, event)
            yield Outage([e for e in chunk if e not in early], active, event)
            active = next((_nodes(plan) for plan in reversed(of(chunk, "plan"))), active)
            chunk = early
    yield Outage(chunk, active, None)


def of(events: Iterable[Event], *kinds: str) -> list[Event]:
    """Return the events of these kinds."""
    return [event for event in events if event["kind"] in kinds]


def _early(chunk: Sequence[Event], first_step: Event) -> list[Event]:
    """Faults of the very next step, on record before the coordinator has heard that this one was done."""
    resumed = [i for i, event in enumerate(chunk) if event["kind"] == "resumed"]
    after = chunk[resumed[-1] + 1 :] if resumed else []
    return [e for e in after if e["kind"] == "fault" and int(e.get("step") or -1) > int(first_step["step"])]


def _nodes(plan: Event) -> frozenset[str]:
    return frozenset(str(move["node"]) for move in plan["moves"])
