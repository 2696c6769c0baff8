"""The figures of a run (plotly). Labels are plain text: LaTeX would load MathJax from the network."""

from collections.abc import Collection, Sequence

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from gemini_hpc.analysis.frames import final_steps
from gemini_hpc.analysis.timeline import Recovery, Span, number, summary, title, what

INK, MUTED, GRID, AXIS = "#1e293b", "#64748b", "#e8ecf2", "#cbd5e1"
LINE, LOST = "#4263eb", "#e8590c"

TIERS = {"local": "#0ca678", "peer": "#4263eb", "persistent": "#b08d57"}
"""Color of each tier, in every figure."""

PHASES = {
    "detect": "#e8590c",
    "decide": "#f7b267",
    "wait": "#eef1f6",
    "fetch": TIERS["peer"],
    "group": "#845ef7",
    "reset": "#d0bfff",
    "restore": TIERS["local"],
    "first step": "#b6c2d2",
}
"""Color of each phase of a recovery; fetching and restoring have those of the tiers that they read."""

_RANKS = ["#0ca678", "#e8590c", "#845ef7", "#1098ad", "#d6336c", "#74b816", "#b08d57", "#495057"]
_OFF_SCALE = 1.8


def loss(steps: pd.DataFrame, reference: pd.DataFrame, recoveries: Sequence[Recovery] = ()) -> go.Figure:
    """Loss over step: the mean of the ranks, each rank at a click, and the undisturbed run dashed on top."""
    figure = _figure("step", "loss")
    done = final_steps(steps)
    mean = done.groupby("step")["loss"].mean()
    figure.add_scatter(
        x=mean.index,
        y=mean,
        name="mean of the ranks",
        line={"color": LINE, "width": 5},
        opacity=0.55,
        hovertemplate="%{y:.4f}",
    )
    for rank, rows in done.groupby("rank"):
        figure.add_scatter(
            x=rows["step"],
            y=rows["loss"],
            name=f"rank {rank}",
            visible="legendonly",
            line={"color": _RANKS[len(figure.data) % len(_RANKS)], "width": 1.2},
            hovertemplate="%{y:.6f}",
        )
    if len(reference):
        undisturbed = reference.groupby("step")["loss"].mean()
        figure.add_scatter(
            x=undisturbed.index,
            y=undisturbed,
            name="undisturbed run",
            line={"color": INK, "width": 1.6, "dash": "5px,5px"},
            hovertemplate="%{y:.4f}",
        )
    _mark(figure, recoveries)
    return figure


def step_time(steps: pd.DataFrame, recoveries: Sequence[Recovery] = ()) -> go.Figure:
    """Time per step of the slowest rank; below, how much of it training stood still for the snapshot."""
    figure = _figure("", "ms per step", rows=2)
    times = final_steps(steps).groupby("step")[["step_s", "snapshot_s"]].max() * 1e3
    figure.add_scatter(
        x=times.index,
        y=times["step_s"],
        name="step",
        mode="lines",
        line={"color": LINE, "width": 1.8},
        hovertemplate="%{y:.1f} ms",
        row=1,
        col=1,
    )
    figure.add_bar(
        x=times.index,
        y=times["snapshot_s"],
        name="of which standing still for the snapshot",
        marker={"color": TIERS["local"], "line_width": 0},
        hovertemplate="%{y:.2f} ms",
        row=2,
        col=1,
    )
    figure.update_yaxes(rangemode="tozero")
    figure.update_layout(bargap=0.25, height=420)
    figure.update_xaxes(title_text="step", row=2, col=1)
    _cut(figure, times["step_s"])
    _mark(figure, recoveries)
    return figure


def memory(frame: pd.DataFrame, lost: Collection[str] = (), stored_bytes: int = 0) -> go.Figure:
    """What each node holds in memory by its last report, and what is on the shared file system.

    The nodes in `lost` have taken theirs with them; `stored_bytes` are those of all checkpoints.
    """
    last = frame.drop_duplicates("node", keep="last").sort_values("node")
    held = last[["local_bytes", "peer_bytes"]]
    unit, size = ("GB", 1e9) if stored_bytes >= 5e9 or (held >= 5e9).any(axis=None) else ("MB", 1e6)
    figure = _figure("", unit)
    labels = [f"{node}<br>lost" if node in lost else node for node in last["node"]]
    names = {"local": "local: snapshots of its own rank", "peer": "peer: replicas of other ranks"}
    for tier, name in names.items():
        figure.add_bar(
            x=labels,
            y=held[f"{tier}_bytes"] / size,
            name=name,
            marker={
                "color": TIERS[tier],
                "opacity": [0.3 if node in lost else 1.0 for node in last["node"]],
                "line_width": 0,
            },
            hovertemplate=f"%{{y:,.1f}} {unit}",
        )
    if stored_bytes:
        figure.add_bar(
            x=["file system"],
            y=[stored_bytes / size],
            name="persistent: checkpoints of all ranks",
            marker={"color": TIERS["persistent"], "line_width": 0},
            hovertemplate=f"%{{y:,.1f}} {unit}",
        )
    figure.update_layout(bargap=0.5, barmode="stack")
    figure.update_xaxes(showgrid=False)
    return figure


def traffic(frame: pd.DataFrame) -> go.Figure:
    """Collectives of training, and reads of replicas, on one axis of time: one step of each node (`frames.traffic`)."""
    figure = _figure("milliseconds since the first collective of the step", "")
    lanes = [f"{node} {who}" for node in frame["node"].unique() for who in ("training", "replicas")]
    for who, color in (("training", LINE), ("replicas", LOST)):
        rows = frame[frame["what"] == who]
        figure.add_bar(
            orientation="h",
            y=rows["node"] + f" {who}",
            base=rows["begin_ms"],
            x=rows["end_ms"] - rows["begin_ms"],
            name={"training": "collectives of training", "replicas": "reads of replicas"}[who],
            marker={"color": color, "line_width": 0},
            customdata=rows["bytes"] / 1e6,
            hovertemplate="%{x:.1f} ms, %{customdata:.2f} MB<extra></extra>",
        )
    figure.update_yaxes(categoryorder="array", categoryarray=lanes[::-1], showgrid=False)
    figure.update_layout(barmode="overlay", bargap=0.3, hovermode="closest", height=130 + 22 * len(lanes))
    return figure


def recovery(item: Recovery) -> go.Figure:
    """One recovery as a Gantt chart, in milliseconds from its start."""
    figure = _figure("milliseconds since the fault" if item.action else "milliseconds since the first suspicion", "")
    lanes = _lanes(item.spans)
    for phase, color in PHASES.items():
        spans = [span for span in item.spans if span.phase == phase and span.end_ms > span.start_ms]
        if not spans:
            continue
        figure.add_bar(
            orientation="h",
            y=[span.lane for span in spans],
            base=[span.start_ms for span in spans],
            x=[span.end_ms - span.start_ms for span in spans],
            name=phase,
            marker={"color": color, "line_width": 0},
            customdata=[[span.start_ms, span.end_ms, span.note] for span in spans],
            hovertemplate=f"<b>{phase}</b> %{{x:.1f}} ms<br>"
            "%{customdata[0]:.0f} to %{customdata[1]:.0f} ms<br>%{customdata[2]}<extra></extra>",
        )
    for name, position in (("detected", "top right"), ("first step", "top left")):
        ms = item.ms(name)
        if ms is not None:
            figure.add_vline(
                x=ms,
                line={"color": INK, "width": 1, "dash": "dot"},
                annotation={
                    "text": f"{name} {number(ms)} ms",
                    "font": {"size": 12, "color": INK},
                    "yshift": 18,
                },
                annotation_position=position,
            )
    figure.update_yaxes(categoryorder="array", categoryarray=lanes[::-1], showgrid=False)
    figure.update_xaxes(rangemode="tozero")
    figure.update_layout(barmode="overlay", bargap=0.35, hovermode="closest", height=130 + 34 * len(lanes))
    return figure


def _lanes(spans: Sequence[Span]) -> list[str]:
    ranks = {span.lane for span in spans} - {"cluster"}
    return ["cluster", *sorted(ranks, key=lambda lane: int(lane.split()[-1]))]


def _figure(x: str, y: str, rows: int = 1) -> go.Figure:
    figure = make_subplots(rows=rows, shared_xaxes=True, row_heights=[0.68, 0.32][:rows], vertical_spacing=0.07)
    figure.update_layout(
        template="none",
        font={"family": "Inter, system-ui, 'Segoe UI', sans-serif", "size": 12, "color": INK},
        paper_bgcolor="white",
        plot_bgcolor="white",
        height=340,
        margin={"l": 64, "r": 20, "t": 56, "b": 48},
        separators=". ",
        hovermode="x unified",
        hoverlabel={"bgcolor": "white", "bordercolor": AXIS, "font": {"size": 12}},
        # from the top of the figure, whatever its height
        legend={
            "orientation": "h",
            "x": 0,
            "xanchor": "left",
            "yref": "container",
            "y": 1,
            "yanchor": "top",
            "traceorder": "normal",
        },
        modebar={"remove": ["select2d", "lasso2d", "zoomIn2d", "zoomOut2d", "autoScale2d"]},
    )
    style = {"gridcolor": GRID, "zeroline": False, "linecolor": AXIS, "ticks": "outside", "tickcolor": AXIS}
    for axes in (figure.update_xaxes, figure.update_yaxes):
        axes(**style, ticklen=4, title={"font": {"size": 12, "color": MUTED}, "standoff": 10})
    figure.update_xaxes(title_text=x)
    figure.update_yaxes(title_text=y, row=1, col=1)
    return figure


def _mark(figure: go.Figure, recoveries: Sequence[Recovery]) -> None:
    """A dotted line at each recovery: by its name, or by its number where there are several."""
    for item in recoveries:
        if item.first_step is None:
            continue
        at = item.first_step - 0.5
        figure.add_vline(x=at, line={"color": LOST, "width": 1.4, "dash": "dot"})
        figure.add_annotation(
            x=at,
            y=1,
            yref="y domain",
            text=what(item) if len(recoveries) == 1 else f"<b>{item.number}</b>",
            hovertext=f"{title(item)}<br>{summary(item)}",
            showarrow=False,
            xanchor="left" if len(recoveries) == 1 else "center",
            yanchor="top",
            font={"size": 12, "color": LOST},
            bgcolor="white",
            borderpad=3,
        )


def _cut(figure: go.Figure, times: pd.Series) -> None:
    """Leave far outliers off the scale, and say so: the first step allocates, and would flatten the rest."""
    if not len(times):
        return
    top = _OFF_SCALE * float(times.quantile(0.9))
    above = times[times > top]
    if not len(above):
        return
    figure.update_yaxes(range=[0, top], row=1, col=1)
    which = ", ".join(f"step {step} took {number(ms)} ms" for step, ms in above[:3].items())
    more = f", and {len(above) - 3} more" if len(above) > 3 else ""
    figure.add_annotation(
        text=f"off the scale: {which}{more}",
        x=1,
        y=0.02,
        xref="x domain",
        yref="y domain",
        xanchor="right",
        yanchor="bottom",
        showarrow=False,
        font={"size": 11, "color": MUTED},
    )
