"""One self-contained page about a run: RUN_DIR/report.html, readable without a network."""

import os
import time
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import yaml
from plotly.offline import get_plotlyjs

from gemini_hpc.analysis import figures, frames, timeline
from gemini_hpc.analysis.compare import Comparison, compare, read_reference
from gemini_hpc.analysis.timeline import number
from gemini_hpc.errors import UserError, parsing
from gemini_hpc.persist import survey
from gemini_hpc.telemetry import read_events

Event = Mapping[str, Any]

_STYLE = """
:root { --ink: #1e293b; --muted: #64748b; --line: #e2e8f0; --paper: #f6f7f9;
        --good: #0a7d5c; --bad: #c92a2a; --mark: #e8590c; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
       font: 15px/1.55 Inter, system-ui, "Segoe UI", sans-serif; font-variant-numeric: tabular-nums; }
main { max-width: 1080px; margin: 0 auto; padding: 48px 24px 32px; }
h1 { font-size: 30px; line-height: 1.2; letter-spacing: -0.02em; margin: 0 0 6px; }
h2 { font-size: 18px; letter-spacing: -0.01em; margin: 0; }
p { margin: 4px 0 0; color: var(--muted); max-width: 76ch; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(210px, 1fr)); gap: 16px;
         margin: 28px 0; }
.fact, section { background: white; border: 1px solid var(--line); border-radius: 12px; }
.fact { padding: 16px 20px; }
.fact span { display: block; color: var(--muted); font-size: 13px; }
.fact b { display: block; font-size: 25px; line-height: 1.3; letter-spacing: -0.02em; font-weight: 650; }
.good { color: var(--good); }
.bad { color: var(--bad); }
section { padding: 22px 24px 14px; margin: 0 0 20px; overflow-x: auto; }
.figure { margin-top: 8px; }
table { border-collapse: collapse; width: 100%; margin: 14px 0 8px; font-size: 14px; }
th { color: var(--muted); font-weight: 500; font-size: 13px; }
th, td { padding: 9px 12px; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap;
         vertical-align: top; }
tr:last-child td { border-bottom: 0; }
th:first-child, td:first-child { padding-left: 0; color: var(--mark); font-weight: 650; width: 1px; }
th:nth-child(2), td:nth-child(2) { text-align: left; white-space: normal; min-width: 220px; }
td small { display: block; color: var(--muted); font-size: 13px; }
td:last-child, th:last-child { padding-right: 0; }
footer { color: var(--muted); font-size: 13px; }
@media print { body { background: white; } section, .fact { break-inside: avoid; } }
"""

_CHARTS = 6
_SHOWN = ("detected", "evicted", "promoted", "fetched", "resumed", "first step")


def write_report(run_dir: Path) -> Path:
    """Write RUN_DIR/report.html from the events, the reference and the configuration of a run; return its
    path.

    For the end of a run, or any time before. Raises UserError when nothing was logged yet.
    """
    events = read_events(run_dir)
    if not events:
        raise UserError(f"{run_dir} has no events to report on; is it the directory of a run that was started?")
    reference = read_reference(run_dir)
    path = run_dir / "report.html"
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with parsing(f"the event log in {run_dir / 'events'}"):
        page = _page(run_dir, _config(run_dir), events, reference)
    temporary.write_text(page, encoding="utf-8", errors="backslashreplace")
    temporary.rename(path)
    return path


def _page(run_dir: Path, config: Mapping[str, Any], events: Sequence[Event], reference: Sequence[Event]) -> str:
    steps = frames.steps(events)
    undisturbed = frames.reference(reference)
    recovered = timeline.recoveries(events)
    proof = compare(events, reference)
    name = str(config.get("name") or run_dir.resolve().name)
    parts = [
        f"<h1>{escape(name)}</h1>",
        f"<p>{escape(_subtitle(config, events))}</p>",
        _facts(config, steps, recovered, proof, bool(reference)),
        _recoveries(recovered),
        _figure(
            "Loss",
            "The mean of all ranks; a click on a rank shows its own. "
            + ("Dashed: the undisturbed run of the same seed. " if reference else "")
            + (_sentence(str(proof)) if reference else ""),
            figures.loss(steps, undisturbed, recovered),
        ),
        _figure(
            "Step time",
            "Time of the slowest rank, and how long it stood still while its snapshot was copied to memory.",
            figures.step_time(steps, recovered),
        ),
    ]
    for item in _slowest(recovered):
        heading = f"Recovery {item.number}: {timeline.title(item)}"
        parts.append(_figure(heading, _sentence(timeline.summary(item)), figures.recovery(item)))
    traffic = frames.traffic(events)
    if len(traffic):
        parts.append(_figure("Traffic", _idle(config, events), figures.traffic(traffic)))
    memory = frames.memory(events)
    checkpoints, _ = survey(run_dir)
    stored = sum(checkpoint.nbytes for checkpoint in checkpoints)
    if len(memory):
        parts.append(
            _figure(
                "Memory per tier",
                "What each node's memory holds" + _stored([c.step for c in checkpoints][::-1]) + ".",
                figures.memory(memory, timeline.lost_nodes(events), stored),
            )
        )
    body = "\n".join(parts)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(name)}: run report</title>
<style>{_STYLE}</style>
<script>{get_plotlyjs()}</script>
</head>
<body>
<main>
{body}
<footer>Made by gemini_hpc from {number(len(events))} events in {escape(str(run_dir.resolve()))}.</footer>
</main>
</body>
</html>
"""


def _subtitle(config: Mapping[str, Any], events: Sequence[Event]) -> str:
    train, model, cluster, protect = (_part(config, key) for key in ("train", "model", "cluster", "protect"))
    states = [event for event in events if event["kind"] == "run"]
    start, end = float(events[0]["t"]), float(events[-1]["t"])
    parts = [
        " ".join(str(model[key]) for key in ("family", "preset") if key in model),
        str(train.get("precision", "")),
        f"{cluster['nodes']} nodes + {cluster.get('spares', 0)} spare" if "nodes" in cluster else "",
        f"{protect['replicas']} replicas" if "replicas" in protect else "",
        time.strftime("%Y-%m-%d %H:%M", time.localtime(start)),
        _duration(end - start),
        ": ".join(filter(None, [states[-1].get("state"), states[-1].get("reason")])) if states else "",
    ]
    return " · ".join(filter(None, parts))


def _facts(
    config: Mapping[str, Any],
    steps: pd.DataFrame,
    recovered: Sequence[timeline.Recovery],
    proof: Comparison,
    verified: bool,
) -> str:
    facts = []
    first = proof.first_difference
    if not verified:
        facts.append(_fact("losses", "not compared", "with those of an undisturbed run"))
    elif proof.identical:
        facts.append(
            _fact(
                "losses",
                "identical",
                f"{number(proof.equal)} of {number(proof.compared)}, bit for bit",
                "good",
            )
        )
    else:
        where = f"first at rank {first.rank}, step {first.step}" if first else "none to compare"
        facts.append(_fact("losses", "not identical", where, "bad"))
    outages = [item for item in recovered if item.outcome != "spare lost"]
    times = [ms for item in outages if (ms := item.ms("first step")) is not None]
    if len(times) < len(outages):
        facts.append(_fact("recovery", "failed", f"{len(times)} of {len(outages)} succeeded", "bad"))
    elif times:
        since = "fault" if outages[0].action else "suspicion"
        worst = f", worst of {len(times)}" if len(times) > 1 else ""
        facts.append(_fact("recovery", f"{number(max(times))} ms", f"{since} to first new step{worst}"))
    else:
        facts.append(_fact("recovery", "none", "nothing was lost"))
    total = _part(config, "train").get("steps")
    last = int(steps["step"].max()) if len(steps) else 0
    again = sum(item.replayed for item in recovered)
    facts.append(_fact("steps done", f"{last} of {total}" if total else f"{last}", f"{again} replayed"))
    stalls = steps["snapshot_s"].dropna()
    if len(stalls):
        share = stalls.median() / steps["step_s"].median()
        facts.append(
            _fact("a snapshot stops training for", f"{stalls.median() * 1e3:.1f} ms", f"{share:.1%} of a step")
        )
    return f'<div class="facts">{"".join(facts)}</div>'


def _fact(label: str, value: str, detail: str = "", mood: str = "") -> str:
    return (
        f'<div class="fact"><span>{escape(label)}</span><b class="{mood}">{escape(value)}</b>'
        f"<span>{escape(detail)}</span></div>"
    )


def _recoveries(recovered: Sequence[timeline.Recovery]) -> str:
    if not recovered:
        return ""
    head = "".join(f"<th>{name}</th>" for name in _SHOWN)
    rows = []
    for item in recovered:
        cells = "".join(f"<td>{_ms(item.ms(name))}</td>" for name in _SHOWN)
        what = f"{escape(timeline.title(item))}<small>{escape(timeline.summary(item))}</small>"
        rows.append(f"<tr><td>{item.number}</td><td>{what}</td>{cells}</tr>")
    note = "Milliseconds since the fault, or since the first suspicion where no fault was recorded."
    return (
        f"<section><h2>Recoveries</h2><p>{note}</p>"
        f"<table><thead><tr><th></th><th>lost</th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></section>"
    )


def _slowest(recovered: Sequence[timeline.Recovery]) -> list[timeline.Recovery]:
    """The ones worth a chart: all of a few, else those that took longest; in their order."""
    charted = [item for item in recovered if item.spans]
    charted.sort(key=lambda item: item.ms("first step") or float("inf"), reverse=True)
    return sorted(charted[:_CHARTS], key=lambda item: item.number)


def _figure(heading: str, caption: str, figure: go.Figure) -> str:
    html = figure.to_html(
        full_html=False,
        include_plotlyjs=False,
        config={"displaylogo": False, "responsive": True, "displayModeBar": "hover"},
    )
    return f'<section><h2>{escape(heading)}</h2><p>{escape(caption)}</p><div class="figure">{html}</div></section>'


def _idle(config: Mapping[str, Any], events: Sequence[Event]) -> str:
    """What the newest profile says of the network's idle time."""
    last = [event for event in events if event["kind"] == "collectives"][-1]
    share = last["idle_s"] / last["step_s"] if last["step_s"] else 0.0
    gated = _part(config, "protect").get("mode") == "interleaved"
    return (
        f"Training leaves the network idle for {share:.0%} of a step of {number(last['step_s'] * 1e3)} ms (its spans"
        f" vary by {last['spread']:.0%}){'; that is when replicas are read' if gated else ''}."
    )


def _stored(steps: Sequence[int]) -> str:
    names = ", ".join(map(str, steps))
    return f"; on the file system, {'checkpoints' if len(steps) > 1 else 'the checkpoint'} of step {names}" * bool(
        steps
    )


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "."


def _ms(value: float | None) -> str:
    return "-" if value is None else number(value)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _config(run_dir: Path) -> Mapping[str, Any]:
    try:
        config = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, ValueError, RecursionError):
        return {}  # the report is about what happened; without the configuration it says less
    return config if isinstance(config, dict) else {}


def _part(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    part = config.get(key)
    return part if isinstance(part, dict) else {}
