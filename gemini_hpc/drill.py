"""`python -m gemini_hpc.drill RUN_DIR ACTION [NODE]`: a failure on purpose, on the real processes of a living run."""

import sys
from collections.abc import Callable
from shlex import quote

from gemini_hpc.cli import Parser, run_command
from gemini_hpc.errors import UserError
from gemini_hpc.runtime import faults
from gemini_hpc.runtime.cluster import nodes_of
from gemini_hpc.runtime.paths import RunPaths, open_run
from gemini_hpc.runtime.processes import is_held

ACTIONS: dict[str, tuple[str, Callable[[RunPaths, str], None]]] = {
    "kill-node": ("all processes of the node by SIGKILL, and its memory", faults.kill_node),
    "kill-worker": ("the training process by SIGKILL; the node lives", faults.kill_worker),
    "stop": ("all processes of the node by SIGSTOP: it falls silent, and nobody's connection breaks", faults.stop),
    "stop-worker": ("the training process by SIGSTOP: it hangs", faults.stop_worker),
    "cut": ("its control connection goes silent, its worker trains on", faults.cut),
    "break": ("the connections of its agent, all at once; they are made anew", faults.break_lines),
    "go-on": ("end of stop, stop-worker and cut", faults.go_on),
    "slow": (f"a tenth of its time for {faults.SLOW_S:.0f} s", faults.slow),
    "corrupt": ("one bit of its own snapshots in memory", faults.corrupt),
    "corrupt-replica": ("one bit of the replicas that it holds", faults.corrupt_replica),
    "corrupt-file": ("one bit of its file in the newest checkpoint", faults.corrupt_file),
}

LOOP = "loop"


def main(arguments: list[str]) -> int:
    described = "; ".join(f"{action}: {what}" for action, (what, _) in ACTIONS.items())
    parser = Parser(prog="gemini_hpc.drill", description=f"Cause a real failure. {described}; loop: one after another.")
    parser.add_argument("run_dir", help="the directory of a living run on this machine")
    parser.add_argument("action", choices=[*ACTIONS, LOOP])
    parser.add_argument("node", nargs="?", help="a node by its name, as `status` shows it; not for loop")
    parser.add_argument("--mtbf", type=float, default=30.0, help="loop: mean time between failures, seconds")
    parser.add_argument("--seed", type=int, help="loop: choose the same failures again")
    options = parser.parse_args(arguments)
    paths, run = open_run(options.run_dir)
    if options.action == LOOP:
        if options.node or not options.mtbf > 0:
            raise UserError("loop takes no node and a positive --mtbf: drill RUN_DIR loop --mtbf 30")
        _require_living(paths)
        print(f"{faults.loop(paths, options.mtbf, options.seed)} failures; the run is over")
        return 0
    nodes = nodes_of(run)
    if options.node is None:
        raise UserError(f"{options.action} needs a node: {', '.join(nodes)}")
    if options.node not in nodes:
        raise UserError(f"no node {options.node!r}; the nodes are {', '.join(nodes)}")
    _require_living(paths)
    ACTIONS[options.action][1](paths, options.node)
    print(f"{options.action} {options.node}: done; see `python -m gemini_hpc.status {quote(options.run_dir)}`")
    return 0


def _require_living(paths: RunPaths) -> None:
    if not is_held(paths.lock):
        raise UserError(f"{paths.run_dir} is not running on this machine; start a run with submit")


if __name__ == "__main__":
    sys.exit(run_command(main))
