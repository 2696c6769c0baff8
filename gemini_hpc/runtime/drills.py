"""A run's scheduled drills: strike in a chosen phase of a chosen step, from inside the worker that is struck."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gemini_hpc.arena import OWN, Arena, State
from gemini_hpc.config import RunConfig
from gemini_hpc.runtime.faults import kill_node, kill_worker, stop_worker
from gemini_hpc.runtime.paths import RunPaths

STRIKES = {"kill_node": kill_node, "kill_worker": kill_worker, "stop_worker": stop_worker}

SEAL_S = 1.0
"""A drill that strikes during replication waits so long for the snapshot to be sealed."""


def missed(paths: RunPaths, run: RunConfig) -> list[str]:
    """Name the drills that never struck."""
    return [
        f"{drill.action} in step {drill.step} ({drill.phase}, rank {drill.rank})"
        for number, drill in enumerate(run.drills)
        if not _mark(paths, number).exists()
    ]


def _mark(paths: RunPaths, number: int) -> Path:
    return paths.run_dir / "drills" / f"{number}.struck"


class Drills:
    """The drills of one worker. Each strikes once in the life of a run, also when its step is trained again."""

    def __init__(self, paths: RunPaths, run: RunConfig, node: str) -> None:
        self._paths, self._node = paths, node
        self._planned = list(enumerate(run.drills))

    def arm(self, step: int, rank: int, engine: Any) -> None:
        """Before a step: set the traps of the drills that strike in the middle of its computation."""
        for number, drill in self._planned:
            if (drill.step, drill.rank) != (step, rank):
                continue
            strike = self._strike(number, drill.action, step, rank, drill.phase)
            modules = list(engine.module.modules())
            middle = modules[len(modules) // 2]
            if drill.phase == "forward":
                middle.register_forward_pre_hook(lambda *_, strike=strike: strike())
            elif drill.phase == "backward":
                middle.register_full_backward_pre_hook(lambda *_, strike=strike: strike())
            elif drill.phase == "optimizer":
                engine.optimizer.optimizer.register_step_pre_hook(lambda *_, strike=strike: strike())

    def strike_in_replication(self, step: int, rank: int, arena: Arena, half: int) -> None:
        """After a snapshot was written: strike, if that is planned, once its seal lets the holders pull it."""
        if any((drill.phase, drill.step, drill.rank) == ("replication", step, rank) for _, drill in self._planned):
            deadline = time.monotonic() + SEAL_S
            while arena.record(OWN, half).state is not State.SEALED and time.monotonic() < deadline:
                time.sleep(0.0005)
            self.strike_at("replication", step, rank)

    def strike_at(self, phase: str, step: int, rank: int) -> None:
        """Between the phases of the loop: strike now, if that is planned."""
        for number, drill in self._planned:
            if (drill.phase, drill.step, drill.rank) == (phase, step, rank):
                self._strike(number, drill.action, step, rank, phase)()

    def _strike(self, number: int, action: str, step: int, rank: int, phase: str) -> Callable[[], None]:
        def strike() -> None:
            if not self._first(number):
                return
            where = {"step": step, "rank": rank, "phase": phase}
            STRIKES[action](self._paths, self._node, **where)

        return strike

    def _first(self, number: int) -> bool:
        """Leave a mark that outlives this node; whether there was none yet."""
        mark = _mark(self._paths, number)
        mark.parent.mkdir(exist_ok=True)
        try:
            os.close(os.open(mark, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        except FileExistsError:
            return False
        return True
