"""Runs that never ran: events as agents and coordinator would have logged them, true to the schema."""

import json
import math
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemini_hpc.persist import ShardFile, publish, shard_path
from gemini_hpc.telemetry import EventLog

START = 1_790_000_000.0
STEP_S = 0.31
SHARD_BYTES = 9_600_000

CONFIG = """\
name: gpt2-gemini
train: {steps: %d, seed: 1, micro_batch: 4, grad_accum: 1, precision: bf16}
model: {family: gpt2, preset: small, seq_len: 128}
data: {source: text, path: null}
cluster: {nodes: 4, spares: 1}
protect: {replicas: 2, mode: interleaved, persist_every: 40, keep: 3}
site: {kind: local}
"""


def loss_of(rank: int, step: int) -> float:
    """A plausible loss, rounded to fp32 as a real one is."""
    value = (
        2.1 + 3.5 * math.exp(-step / 22) + 0.12 * math.sin(step * 1.7 + rank) + 0.03 * math.cos(step * 5.1 * (rank + 1))
    )
    return struct.unpack("<f", struct.pack("<f", value))[0]


@dataclass(frozen=True)
class Loss:
    """The worker of `rank` dies while `step` is being done, or its node does."""

    step: int
    rank: int
    action: str = "kill_node"
    phase: str = "backward"
    replayed: int = 0
    drill: bool = True
    again: bool = False  # the first plan fails: a second node dies before anybody has resumed
    final: bool = False  # nobody recovers


class Run:
    """Builds the events of a run as it goes along."""

    def __init__(self, world_size: int = 4, spares: int = 1) -> None:
        self.now = START
        self.events: list[dict[str, Any]] = []
        self.world_size = world_size
        self.nodes = {rank: f"node{rank}" for rank in range(world_size)}
        self.spares = [f"node{world_size + i}" for i in range(spares)]
        self.generation = 0

    def emit(self, kind: str, node: str = "node0", after: float = 0.0, **fields: Any) -> None:
        self.now += after
        self.events.append({"t": self.now, "node": node, "kind": kind, **fields})

    def start(self) -> None:
        self.emit("run", state="started", reason="")
        self.emit("world", after=0.6, number=1, state="ready", reason="")
        self._plan(-1, dict.fromkeys(self.nodes, "fresh"), "no step is complete, in memory or on disk", after=4.0)
        for rank, node in self.nodes.items():
            self.emit("promote", target=node, rank=rank, generation=self.generation)
        self._resume(-1, "fresh", set())

    def train(self, first: int, last: int, ranks: Sequence[int] | None = None) -> None:
        for step in range(first, last + 1):
            self.now += STEP_S * (6 if step == 1 else 1 + 0.06 * math.sin(step * 2.3))
            for rank in self.nodes if ranks is None else ranks:
                self.now += 0.0004
                self.emit(
                    "step",
                    self.nodes[rank],
                    rank=rank,
                    generation=self.generation,
                    step=step,
                    loss=loss_of(rank, step),
                    step_s=STEP_S * (6 if step == 1 else 1 + 0.06 * math.sin(step * 2.3 + rank / 3)),
                    snapshot_s=None if step % 17 == 0 else 0.0046 + 0.0006 * math.sin(step),
                )
            self._after_step(step)

    def _after_step(self, step: int) -> None:
        seen = {e["generation"] for e in self.events if e["kind"] == "first_step"}
        if self.generation not in seen:
            self.emit("first_step", generation=self.generation, step=step)
            if self.generation > 1:
                self.emit("protected", after=0.21, step=step, generation=self.generation)
        self.emit("safe", step=step, generation=self.generation)
        if step % 40 == 0:
            self.emit(
                "persisted",
                after=0.05,
                step=step,
                path=f"step-{step:08d}",
                bytes=SHARD_BYTES * 4,
                seconds=0.4,
            )
        if step % 5 == 0:
            for node in self.nodes.values():
                self.emit(
                    "memory",
                    node,
                    local_bytes=2 * SHARD_BYTES,
                    peer_bytes=2 * SHARD_BYTES,
                    persistent_bytes=0,
                )

    def lose(self, what: Loss) -> int:
        """A failure while `what.step` is being done; returns the step from which training goes on."""
        dead = self.nodes[what.rank]
        fields = {"target": dead, "rank": what.rank, "step": what.step, "phase": what.phase}
        if what.drill:
            self.emit("fault", "drill", after=0.2, action=what.action, **fields)
        self.emit("suspect", after=0.0312, target=dead, evidence="exit", reason="process 4711 ended by SIGKILL")
        if what.final:
            self.emit("evict", after=0.001, target=dead, generation=self.generation + 1, reason="exit")
            self.emit("run", after=2.0, state="failed", reason="out of spares")
            return what.step
        if what.action == "kill_node":
            reason = "process 4711 ended by SIGKILL"
            self.emit("evict", after=0.0021, target=dead, generation=self.generation + 1, reason=reason)
        self.emit("abort", after=0.0004, generation=self.generation)
        step = what.step - 1 - what.replayed
        tiers = {rank: "peer" if rank == what.rank else "local" for rank in self.nodes}
        if what.action == "kill_node":
            self._promote(what.rank, step, tiers)
        else:
            self._plan(step, dict.fromkeys(self.nodes, "local"), f"step {step} is the newest", after=0.0007)
        if what.again:
            other = next(rank for rank in self.nodes if rank != what.rank)
            self.emit("suspect", after=0.3, target=self.nodes[other], evidence="heartbeat", reason="1.2 s late")
            self.emit("evict", after=0.5, target=self.nodes[other], generation=self.generation + 1, reason="late")
            self._promote(other, step, tiers | {other: "peer"})
        if what.action == "kill_node":
            for rank in (r for r, tier in tiers.items() if tier == "peer"):
                self._fetch(rank, self.nodes[(rank + 1) % self.world_size])
        self._resume(step, "hot_swap" if what.action == "kill_node" else "restart", {what.rank})
        return step + 1

    def _promote(self, rank: int, step: int, tiers: dict[int, str]) -> None:
        self.nodes[rank] = self.spares.pop(0)
        self._plan(step, tiers, f"step {step} is the newest with a verified snapshot of every rank", after=0.0007)
        self.emit("promote", after=0.0011, target=self.nodes[rank], rank=rank, generation=self.generation)

    def _plan(self, step: int, tiers: dict[int, str], reason: str, after: float) -> None:
        self.generation += 1
        moves = [{"rank": r, "node": self.nodes[r], "tier": tier, "source": self.nodes[r]} for r, tier in tiers.items()]
        self.emit("plan", after=after, generation=self.generation, step=step, reason=reason, moves=moves)

    def _fetch(self, rank: int, source: str) -> None:
        fields = {"rank": rank, "source": source, "tier": "peer", "generation": self.generation}
        self.emit("fetch_started", after=0.0009, **fields)
        self.emit("fetched", after=0.0192, bytes=SHARD_BYTES, seconds=0.0174, **fields)

    def _resume(self, step: int, rung: str, moved: set[int]) -> None:
        self.now += 0.058
        for rank, node in self.nodes.items():
            restore = 0.021 if rank in moved else 0.0062 + rank * 0.0011
            self.emit(
                "resumed",
                after=0.0015,
                rank=rank,
                target=node,
                generation=self.generation,
                step=step,
                rung=rung if rung != "restart" or rank in moved else "hot_swap",
                group_s=0.0123 + 0.001 * rank,
                reset_s=0.0031,
                restore_s=restore,
            )

    def finish(self) -> None:
        self.emit("run", after=0.1, state="finished", reason="")


def _write_checkpoint(run_dir: Path, step: int) -> None:
    """One checkpoint as the archivers leave it, though its files hold no tensors."""
    files = []
    for rank in range(4):
        path = shard_path(run_dir, step, rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.truncate(path, SHARD_BYTES)
        files.append(ShardFile(rank, path.name, SHARD_BYTES, rank))
    publish(run_dir, step, files, world_size=4, run_id="r1", generation=1, fingerprint="")


def build(steps: int, losses: Sequence[Loss] = (), spares: int = 1) -> list[dict[str, Any]]:
    """The events of a whole run of 4 ranks."""
    run = Run(spares=spares)
    run.start()
    step = 1
    for loss in losses:
        run.train(step, loss.step - 1)
        step = run.lose(loss)
        if loss.final:
            return run.events
    run.train(step, steps)
    run.finish()
    return run.events


def reference_of(steps: int) -> list[dict[str, Any]]:
    return [
        {"rank": rank, "step": step, "loss": loss_of(rank, step)} for step in range(1, steps + 1) for rank in range(4)
    ]


def write_run(run_dir: Path, steps: int = 24, losses: Sequence[Loss] = (Loss(12, rank=2),)) -> Path:
    """A run directory with events, the undisturbed reference and the configuration."""
    run_dir.mkdir(parents=True, exist_ok=True)
    logs: dict[str, EventLog] = {}
    for event in build(steps, losses, spares=max(1, len(losses))):
        fields = {key: value for key, value in event.items() if key not in ("node", "kind")}
        node = event["node"]
        if node not in logs:
            logs[node] = EventLog(run_dir, node)
        logs[node].emit(event["kind"], **fields)
    for log in logs.values():
        log.close()
    (run_dir / "reference").mkdir(exist_ok=True)
    lines = "".join(json.dumps(line) + "\n" for line in reference_of(steps))
    (run_dir / "reference" / "losses.jsonl").write_text(lines)
    (run_dir / "config.yaml").write_text(CONFIG % steps)
    if steps >= 40:
        _write_checkpoint(run_dir, 40)
    return run_dir
