"""The table that `make faults` prints: what was done to a run, and what became of it."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from gemini_hpc.analysis.timeline import Recovery
from gemini_hpc.config import dump, load_run
from gemini_hpc.runtime import reference
from gemini_hpc.runtime.paths import RunPaths
from gemini_hpc.runtime.processes import RunLock, wait_exit
from tests.cluster.runs import SHM, Run, drills, reference_losses

Losses = Mapping[tuple[int, int], bytes]
References = Callable[[int, int], Losses]

IDENTICAL = "yes"
STOPPED = "clean stop"

STEPS = 80
"""Of most rows: enough to strike, to recover, and to see that it goes on."""

REFERENCE_S = 300.0

JOB = """
import os
from dataclasses import replace
from gemini_hpc.models import job


def build(run):
    # without a schedule the losses do not depend on the number of steps: one long reference serves short runs too
    training = replace(job.build(run), lr_scheduler=None)
    return trouble(training, run) if os.path.exists("trouble.py") else training


def trouble(training, run):
    import trouble

    return trouble.add_to(training)
"""
"""The job of all rows: the example's, and what `trouble.py` beside it does to that."""

JOB_ENTRY = "train.entry=fault_job:build"


@dataclass(frozen=True)
class Line:
    """One row: times in milliseconds since the fault; None = does not apply."""

    fault: str
    rung: str
    detected_ms: float | None
    total_ms: float | None
    losses: str


@dataclass
class Matrix:
    """What the rows of this session came to."""

    lines: list[Line] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Figures that have no column."""

    def enter(
        self, fault: str, rung: str, detected_ms: float | None, total_ms: float | None, losses: str = IDENTICAL
    ) -> None:
        """Add a row; to be called when everything about it has been asserted."""
        self.lines.append(Line(fault, rung, detected_ms, total_ms, losses))

    def enter_recovery(self, fault: str, item: Recovery, since: float | None = None) -> None:
        """Add a row for an outage as the event log tells it; total = until all ranks have done a new step.

        `since` (unix seconds) is when the fault struck, where the event log was not told.
        """
        late = 0.0 if since is None else 1000 * (item.start - since)
        times = [ms if ms is None else ms + late for ms in (item.ms("detected"), item.ms("first step"))]
        self.enter(fault, f"{item.rung.replace('_', ' ')}, {item.tier}", times[0], times[1])

    def table(self) -> Iterator[str]:
        yield f"{'fault':<64} {'rung taken':<24} {'detection ms':>12} {'total ms':>9}  losses identical"
        for line in self.lines:
            times = f"{_whole(line.detected_ms):>12} {_whole(line.total_ms):>9}"
            yield f"{line.fault:<64} {line.rung:<24} {times}  {line.losses}"


def _whole(ms: float | None) -> str:
    return "-" if ms is None else f"{ms:.0f}"


def start(
    place: Path, *settings: str, nodes: int = 3, spares: int = 1, steps: int = STEPS, trouble: str = "", **more: Path
) -> Run:
    """Start a run of the matrix: without drills of its own, its losses comparable to `references(nodes, steps)`."""
    place.mkdir(exist_ok=True)
    (place / "fault_job.py").write_text(JOB)
    if trouble:
        (place / "trouble.py").write_text(trouble)
    shape = (f"cluster.nodes={nodes}", f"cluster.spares={spares}", f"train.steps={steps}")
    return Run(place, JOB_ENTRY, *shape, "verify=false", drills(), *settings, **more)


def assert_identical(run: Run, reference: Losses) -> None:
    """The run is finished, and every loss that it logged has the bits of the undisturbed training."""
    assert run.status["state"] == "finished", run.status
    total = run.status["total_steps"]
    run.assert_identical_to({key: bits for key, bits in reference.items() if key[1] <= total})


def train_reference(place: Path, nodes: int, steps: int) -> Losses:
    """Train undisturbed on plain DeepSpeed, with the job of the rows; return the bits of all losses."""
    (place / "logs").mkdir(parents=True)
    settings = [JOB_ENTRY, "model.preset=tiny", f"cluster.nodes={nodes}", f"train.steps={steps}", "drills=[]"]
    (place / "config.yaml").write_text(dump(load_run(overrides=settings, site="local")))
    paths = RunPaths(place, SHM)
    lock = RunLock(paths.lock)
    assert lock.take()  # a run without its lock is dead, and swept by the next start of any other
    ranks = reference.start(paths, nodes)
    try:
        assert all(wait_exit(rank.pidfd, REFERENCE_S) for rank in ranks), "the reference takes too long"
    finally:
        for rank in ranks:
            rank.end()
        lock.release()
    losses = reference_losses(place)
    assert len(losses) == nodes * steps
    return losses
