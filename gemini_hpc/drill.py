"""`python -m gemini_hpc.drill RUN_DIR ACTION NODE`: a failure on purpose, on the real processes of a living run."""

import signal
import sys
from shlex import quote

from gemini_hpc.cli import Parser, run_command
from gemini_hpc.errors import UserError
from gemini_hpc.runtime.cluster import virtual_nodes
from gemini_hpc.runtime.faults import kill_node, signal_worker
from gemini_hpc.runtime.paths import open_run
from gemini_hpc.runtime.processes import is_held

ACTIONS = {
    "kill-node": "all processes of the node by SIGKILL, and its memory",
    "kill-worker": "the training process by SIGKILL; the node lives",
    "stop-worker": "the training process by SIGSTOP: it hangs, and nobody's connection breaks",
}


def main(arguments: list[str]) -> int:
    described = "; ".join(f"{action}: {what}" for action, what in ACTIONS.items())
    parser = Parser(prog="gemini_hpc.drill", description=f"Cause a real failure. {described}.")
    parser.add_argument("run_dir", help="the directory of a living run on this machine")
    parser.add_argument("action", choices=ACTIONS)
    parser.add_argument("node", help="a node by its name, as `status` shows it")
    options = parser.parse_args(arguments)
    paths, run = open_run(options.run_dir)
    nodes = virtual_nodes(run)
    if options.node not in nodes:
        raise UserError(f"no node {options.node!r}; the nodes are {', '.join(nodes)}")
    if not is_held(paths.lock):
        raise UserError(f"{options.run_dir} is not running on this machine; start a run with submit")
    if options.action == "kill-node":
        kill_node(paths, options.node)
    elif options.action == "kill-worker":
        signal_worker(paths, options.node, "kill_worker", signal.SIGKILL)
    else:
        signal_worker(paths, options.node, "stop_worker", signal.SIGSTOP)
    print(f"{options.action} {options.node}: done; see `python -m gemini_hpc.status {quote(options.run_dir)}`")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
