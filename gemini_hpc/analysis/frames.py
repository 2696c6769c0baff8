"""Events as pandas DataFrames. Every frame has its columns even when nothing was logged."""

from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

from gemini_hpc.analysis import timeline
from gemini_hpc.analysis.compare import tells_loss

Event = Mapping[str, Any]

_STEPS = {
    "rank": "int64",
    "generation": "int64",
    "step": "int64",
    "loss": "float64",
    "step_s": "float64",
    "snapshot_s": "float64",
    "t": "float64",
}
_MEMORY = {
    "node": "object",
    "t": "float64",
    "local_bytes": "float64",
    "peer_bytes": "float64",
    "persistent_bytes": "float64",
}
_TRAFFIC = {
    "node": "object",
    "step": "int64",
    "what": "object",
    "begin_ms": "float64",
    "end_ms": "float64",
    "bytes": "float64",
}
_REFERENCE = {"rank": "int64", "step": "int64", "loss": "float64"}


def steps(events: Iterable[Event]) -> pd.DataFrame:
    """One row per step of a rank, in order of time; a replayed step has a row for each time it was done.

    Times in seconds; `snapshot_s` is NaN where no snapshot was taken, and `step_s` too where the step is known only
    from the snapshot that was restored, since who did it died before it was logged.
    """
    told = [e for e in events if tells_loss(e)]
    logged = {(e["rank"], e["step"]) for e in told if e["kind"] == "step"}
    return _frame((e for e in told if e["kind"] == "step" or (e["rank"], e["step"]) not in logged), _STEPS)


def final_steps(frame: pd.DataFrame) -> pd.DataFrame:
    """From `steps`, one row per (rank, step), sorted: where a step was replayed, the last time counts."""
    return frame.drop_duplicates(["rank", "step"], keep="last").sort_values(["rank", "step"], ignore_index=True)


def memory(events: Iterable[Event]) -> pd.DataFrame:
    """One row per report of a node: what it holds, in bytes per tier."""
    return _frame((e for e in events if e["kind"] == "memory"), _MEMORY)


def traffic(events: Iterable[Event]) -> pd.DataFrame:
    """One row per collective and per read of a replica in the newest step of which each node told both.

    `what` is "training" or "replicas"; times in milliseconds since the first collective of the node in that step.
    """
    told: dict[str, dict[int, dict[str, Event]]] = {}
    for event in events:
        if event["kind"] in ("collectives", "reads") and event["stamps"]:
            told.setdefault(event["node"], {}).setdefault(event["step"], {})[event["kind"]] = event
    rows = []
    for node, steps_told in sorted(told.items()):
        both = {step: kinds for step, kinds in steps_told.items() if len(kinds) == 2}
        for kind, event in both[max(both)].items() if both else ():
            origin = both[max(both)]["collectives"]["stamps"][0][0]
            what = "training" if kind == "collectives" else "replicas"
            rows += [
                {
                    "node": node,
                    "step": event["step"],
                    "what": what,
                    "begin_ms": (begin - origin) * 1e3,
                    "end_ms": (end - origin) * 1e3,
                    "bytes": nbytes,
                }
                for begin, end, nbytes in event["stamps"]
            ]
    return _frame(rows, _TRAFFIC)


def reference(lines: Iterable[Event]) -> pd.DataFrame:
    """The losses of the undisturbed run: one row per (rank, step)."""
    return _frame(lines, _REFERENCE)


def recoveries(events: Iterable[Event]) -> pd.DataFrame:
    """One row per recovery; milestones in milliseconds after its start, NaN where one was not reached."""
    return recovery_frame(timeline.recoveries(events))


def recovery_frame(items: Iterable[timeline.Recovery]) -> pd.DataFrame:
    """The same from recoveries that are at hand."""
    rows = [
        {
            "recovery": item.number,
            "lost": timeline.title(item),
            "outcome": item.outcome,
            "rung": item.rung,
            "tier": item.tier,
            "step": item.step,
            "replayed": item.replayed,
            **{name: item.ms(name) for name in timeline.MILESTONES},
        }
        for item in items
    ]
    columns = ["recovery", "lost", "outcome", "rung", "tier", "step", "replayed", *timeline.MILESTONES]
    frame = pd.DataFrame(rows, columns=columns)
    return frame.astype(dict.fromkeys(timeline.MILESTONES, "float64"))


def _frame(lines: Iterable[Event], columns: Mapping[str, str]) -> pd.DataFrame:
    rows = [{name: line.get(name) for name in columns} for line in lines]
    frame = pd.DataFrame(rows, columns=list(columns))
    return frame.astype(dict(columns))
