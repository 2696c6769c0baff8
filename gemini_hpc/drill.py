"""`python -m gemini_hpc.drill RUN_DIR ACTION [NODE]`: a failure on purpose, on the real processes of a living run."""

import os
import subprocess
import sys
from collections.abc import Callable
from shlex import quote

from gemini_hpc.cli import Parser, run_command
from gemini_hpc.config import RunConfig
from gemini_hpc.errors import UserError
from gemini_hpc.runtime import faults
from gemini_hpc.runtime.children import python
from gemini_hpc.runtime.cluster import nodes_of
from gemini_hpc.runtime.living import job_of, whereabouts
from gemini_hpc.runtime.paths import RunPaths, open_run
from gemini_hpc.runtime.status_file import read_status
from gemini_hpc.slurm.control import step_environment

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
    parser.add_argument("run_dir", help="the directory of a living run, on this machine or as a job of Slurm")
    parser.add_argument("action", choices=[*ACTIONS, LOOP])
    parser.add_argument("node", nargs="?", help="a node by its name, as `status` shows it; not for loop")
    parser.add_argument("--mtbf", type=float, default=30.0, help="loop: mean time between failures, seconds")
    parser.add_argument("--seed", type=int, help="loop: choose the same failures again")
    options = parser.parse_args(arguments)
    paths, run = open_run(options.run_dir)
    place = _Place(paths, run)
    if options.action == LOOP:
        if options.node or not options.mtbf > 0:
            raise UserError("loop takes no node and a positive --mtbf: drill RUN_DIR loop --mtbf 30")
        place.require_living()
        print(f"{faults.loop(paths, options.mtbf, options.seed, place.strike, place.lives)} failures; the run is over")
        return 0
    nodes = place.nodes()
    if options.node is None:
        raise UserError(f"{options.action} needs a node: {', '.join(nodes)}")
    if options.node not in nodes:
        raise UserError(f"no node {options.node!r}; the nodes are {', '.join(nodes)}")
    place.require_living()
    place.strike(options.action, options.node)
    print(f"{options.action} {options.node}: done; see `python -m gemini_hpc.status {quote(options.run_dir)}`")
    return 0


class _Place:
    """Where the nodes of a run are to be struck: here, or on a node of its job, by a step of its own there."""

    def __init__(self, paths: RunPaths, run: RunConfig) -> None:
        self._paths, self._run = paths, run

    def nodes(self) -> tuple[str, ...]:
        if self._run.site.kind == "local":
            return nodes_of(self._run)
        return tuple(place["node"] for place in read_status(self._paths).get("nodes", []))

    def lives(self) -> bool:
        return bool(whereabouts(self._paths, self._run))

    def require_living(self) -> None:
        if not self.lives():
            where = "on this machine" if self._run.site.kind == "local" else "as a job"
            raise UserError(f"{self._paths.run_dir} is not running {where}; start a run with submit")

    def strike(self, action: str, node: str) -> None:
        job = job_of(self._paths) if self._run.site.kind == "slurm" else None
        if job is None or os.environ.get("SLURMD_NODENAME") == node:
            ACTIONS[action][1](self._paths, node)
            return
        there = python("gemini_hpc.drill", str(self._paths.run_dir), action, node)
        step = [*job.step([node], "gemini-drill"), *there]
        done = subprocess.run(step, env=step_environment(os.environ), stdout=subprocess.DEVNULL)
        if done.returncode:
            raise UserError(f"{action} could not be done on {node}; see above")


if __name__ == "__main__":
    sys.exit(run_command(main))
