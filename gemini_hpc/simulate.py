"""`python -m gemini_hpc.simulate --placement N`: what forms of placement protect from, and what each costs."""

import json
import sys
from typing import Any

from gemini_hpc.cli import Parser, run_command
from gemini_hpc.core.placement import FORMS, Form, areas, held_by, holders
from gemini_hpc.core.probability import recovery_probabilities, union_bound, upper_bound
from gemini_hpc.errors import UserError

LOST_MAX = 64
"""Beyond it nobody asks, and numbers get long."""


def main(arguments: list[str]) -> int:
    parser = Parser(prog="gemini_hpc.simulate", description="What forms of placement protect from, and their cost.")
    parser.add_argument("--placement", type=int, metavar="N", required=True, help="nodes that train")
    parser.add_argument("--replicas", type=int, default=2, metavar="M", help="copies of every snapshot (2)")
    parser.add_argument("--lost", type=int, metavar="K", help="nodes lost at once, at most (M + 3)")
    parser.add_argument("--json", action="store_true", help="for programs")
    options = parser.parse_args(arguments)
    nodes, replicas = options.placement, options.replicas
    if not 1 <= nodes <= 1 << 20:
        raise UserError(f"--placement {nodes}: between 1 and {1 << 20} nodes")
    if not 1 <= replicas <= nodes:
        raise UserError(f"--replicas {replicas}: each copy needs its own of the {nodes} nodes")
    most = min(nodes, replicas + 3) if options.lost is None else options.lost
    if not 1 <= most <= min(nodes, LOST_MAX):
        raise UserError(f"--lost {most}: between 1 and {min(nodes, LOST_MAX)}")
    found = {
        "nodes": nodes,
        "replicas": replicas,
        "upper_bound": float(upper_bound(nodes, replicas)),
        "placements": [compare(nodes, replicas, form, most) for form in FORMS],
    }
    print(json.dumps(found, indent=2) if options.json else table(found))
    return 0


def compare(nodes: int, replicas: int, form: Form, most: int) -> dict[str, Any]:
    """Return the probabilities of recovery from memory after 1 to `most` losses at once, and the costs of a form."""
    keepers, held = holders(nodes, replicas, form), held_by(nodes, replicas, form)
    return {
        "placement": form,
        "probability": dict(enumerate(map(float, recovery_probabilities(keepers, most)[1:]), 1)),
        "bound": {k: float(union_bound(keepers, k)) for k in range(1, most + 1)},
        "snapshots_held": areas(nodes, replicas, form),
        "snapshots_held_mean": sum(map(len, held)) / nodes,
        "read_per_step": areas(nodes, replicas, form) - 1,
        "sent_per_step": max(len(row) for row in keepers) - 1,
    }


def table(found: dict[str, Any]) -> str:
    """Return the comparison as people read it."""
    nodes, replicas = found["nodes"], found["replicas"]
    losses = list(found["placements"][0]["probability"])
    lines = [
        f"{nodes} nodes, {replicas} copies of every snapshot; nodes lost at once, all sets of them as likely:",
        "recovered from memory, percent (in brackets the union bound of the paper, where it differs)",
        "",
        f"{'':10}" + "".join(f"{f'{k} lost':>16}" for k in losses) + f"{'memory':>16}{'read':>7}{'sent':>7}",
    ]
    for row in found["placements"]:
        chances = "".join(f"{_percent(row['probability'][k], row['bound'][k]):>16}" for k in losses)
        memory = f"{2 * row['snapshots_held']} ({2 * row['snapshots_held_mean']:.2f})"
        lines.append(f"{row['placement']:10}{chances}{memory:>16}{row['read_per_step']:>7}{row['sent_per_step']:>7}")
    lines += [
        "",
        "memory: snapshots that a node has room for, which are two of each rank that it may hold (in use, mean)",
        "read, sent: snapshots a step by the node that has most to do; every read is one between two nodes",
        f"no placement of {replicas} copies exceeds {100 * found['upper_bound']:.2f} % when {replicas} nodes are lost;"
        " full_tail has more copies",
    ]
    if nodes % replicas == 0:
        lines.append(f"{replicas} divides {nodes}: all but the ring are the paper's group placement, which is optimal")
    return "\n".join(lines)


def _percent(exact: float, bound: float) -> str:
    shown, at_least = _rounded(exact), _rounded(bound)
    return shown if shown == at_least else f"{shown} ({at_least})"


def _rounded(probability: float) -> str:
    """Return it as percent; what is nearly certain is not called so."""
    text = f"{100 * probability:.2f}"
    if probability not in (0.0, 1.0) and text in ("0.00", "100.00"):
        return "<0.01" if text == "0.00" else ">99.99"
    return text


if __name__ == "__main__":
    sys.exit(run_command(main))
