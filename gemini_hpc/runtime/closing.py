"""After the last step: train the undisturbed reference, compare all losses bit for bit, write the report."""

import time
from collections.abc import Callable

from gemini_hpc.analysis import compare
from gemini_hpc.config import RunConfig
from gemini_hpc.errors import GeminiError
from gemini_hpc.runtime import reference
from gemini_hpc.runtime.children import Child
from gemini_hpc.runtime.paths import RunPaths
from gemini_hpc.runtime.processes import wait_exit
from gemini_hpc.runtime.status_file import update_status
from gemini_hpc.telemetry import read_events

POLL_S = 0.25


def verify(paths: RunPaths, run: RunConfig, check_wanted: Callable[[], None]) -> compare.Comparison:
    """Train the reference and compare every loss of the run with it. Raises GeminiError when it cannot be trained.

    `check_wanted` is called often; what it raises ends the reference.
    """
    ranks = reference.start(paths, run.cluster.nodes)
    try:
        while ranks:
            check_wanted()
            for child in [rank for rank in ranks if wait_exit(rank.pidfd, 0.0)]:
                ranks.remove(child)
                ended = child.reap()
                if ended != "exit status 0":
                    raise GeminiError(f"the reference run failed ({ended}); see {paths.logs}/reference-*.log")
            update_status(paths, state="verifying", reference_step=_progress(paths, run))
            time.sleep(POLL_S)
    finally:
        _end(ranks)
    return compare.compare(read_events(paths.run_dir), compare.read_reference(paths.run_dir))


def _end(ranks: list[Child]) -> None:
    for child in ranks:
        child.end()


def _progress(paths: RunPaths, run: RunConfig) -> int:
    return len(compare.read_reference(paths.run_dir)) // run.cluster.nodes
