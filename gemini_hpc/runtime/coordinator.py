"""The agent's second role: carries out what its `Seat` decides, in elections and, while it leads, for the whole run.

It decides nothing itself: it hands events and time to `core`, and orders to the wire.
"""

import queue
import threading
import time
from typing import Any

import zmq

from gemini_hpc.config import RunConfig
from gemini_hpc.core.domains import Domains
from gemini_hpc.core.learn import OF_AGENTS
from gemini_hpc.core.messages import (
    Command,
    Disconnected,
    Event,
    Finish,
    Lead,
    NodeUp,
    Note,
    RequestVote,
    StartWorld,
    Stepped,
    Surveyed,
)
from gemini_hpc.core.seat import Seat
from gemini_hpc.core.state import Rules
from gemini_hpc.core.types import FRESH
from gemini_hpc.core.view import LATE_S, describe
from gemini_hpc.errors import GeminiError
from gemini_hpc.persist import manifest
from gemini_hpc.runtime.allocation import Embedded
from gemini_hpc.runtime.paths import RunPaths
from gemini_hpc.runtime.status_file import StatusThread
from gemini_hpc.runtime.wire import Client, Wire
from gemini_hpc.telemetry import EventThread, keep_files_apart

STATUS_S = 0.25
"""How often status.json is renewed; also at every change of the phase."""

SURVEY_S = 1.0
"""Between two attempts to list the checkpoints."""


class Coordinator:
    """Lines to the other agents, opened when this one first has something to say to them."""

    def __init__(
        self, paths: RunPaths, run: RunConfig, seat: Seat, wire: Wire, cluster: Embedded, events: EventThread
    ) -> None:
        self._paths, self._run, self._wire, self._events = paths, run, wire, events
        self._seat = seat
        self._to_cluster = cluster
        self._endpoints: dict[str, str] = {}
        self._lines: dict[str, Client] = {}
        self._poller: zmq.Poller | None = None
        self._status = StatusThread(paths)
        self._surveys: queue.SimpleQueue[Surveyed] = queue.SimpleQueue()
        self._surveying = -1  # the number of the survey that is under way, or was the last
        self._last_status = 0.0
        self._shown: tuple[Any, ...] = ()
        self._progress: dict[str, float] = {}

    def hear(self, event: Event) -> None:
        """Take what the cluster or an agent says."""
        cluster = self._seat.cluster
        if cluster is not None and getattr(event, "generation", cluster.generation) < cluster.generation:
            self._wire.tally.stale += 1  # of the past: it changes nothing
        if isinstance(event, NodeUp):
            self._hang_up(event.node)
            self._endpoints[event.node] = event.endpoint
        elif isinstance(event, Stepped):
            self._progress = {"loss": event.loss, "step_s": event.step_s}
        self._carry_out(self._seat.hear(time.monotonic(), event))

    def obey(self, order: RequestVote | Lead) -> list[Event]:
        """Answer a candidate or a leader."""
        return self._seat.obey(time.monotonic(), order)

    def turn(self, poller: zmq.Poller) -> None:
        """Take everything that waits, and then the time: silence is judged only after all has been heard."""
        self._poller = poller
        for node, line in list(self._lines.items()):
            while (message := line.receive()) is not None:
                self._to_cluster.hears(node)
                if isinstance(message, Event) and type(message) in OF_AGENTS and message.node == node:
                    self.hear(message)
                else:
                    self._wire.tally.stale += 1
            if line.broke():
                self.hear(Disconnected(node))
        while not self._surveys.empty():
            self.hear(self._surveys.get())
        now = time.monotonic()
        self._carry_out(self._seat.tick(now))
        cluster = self._seat.cluster
        if cluster is not None and not cluster.surveyed and self._surveying != cluster.survey:
            self._surveying = cluster.survey
            threading.Thread(target=self._survey, args=(cluster.survey, cluster.survey_below), daemon=True).start()
        self._show(now)

    def _survey(self, number: int, below: int | None) -> None:
        """Look for the newest checkpoint (before step `below`); in a thread, for the shared file system may hang."""
        keep_files_apart()
        while True:
            try:
                found = manifest.newest(self._paths.run_dir, below)
                break
            except (GeminiError, OSError) as error:
                self._events.emit("survey_failed", reason=str(error))
                time.sleep(SURVEY_S)
        files = {str(f.rank): [f.name, f.nbytes, f.checksum] for f in found.files} if found else {}
        self._surveys.put(Surveyed("", number, found.step if found else FRESH, files))

    def _carry_out(self, orders: list[Command]) -> None:
        for order in orders:
            if isinstance(order, Note):
                self._events.emit(order.event, **order.details)
            elif isinstance(order, StartWorld) or (isinstance(order, (Finish, Lead)) and not order.node):
                self._to_cluster.send(order)
            else:
                self._send(order)

    def _send(self, order: Command) -> None:
        line = self._lines.get(order.node)
        if line is None and order.node in self._endpoints and self._poller is not None:
            line = self._lines[order.node] = self._wire.call(self._endpoints[order.node], self._seat.election.node)
            self._poller.register(line.socket, zmq.POLLIN)
            self._poller.register(line.monitor, zmq.POLLIN)
        if line is not None:
            line.send(order)

    def _hang_up(self, node: str) -> None:
        line = self._lines.pop(node, None)
        if line is not None and self._poller is not None:
            self._poller.unregister(line.socket)
            self._poller.unregister(line.monitor)
            line.close()

    def _show(self, now: float) -> None:
        cluster = self._seat.cluster
        if cluster is None:
            return
        shown = (cluster.phase, cluster.generation, cluster.outcome)
        if shown == self._shown and now - self._last_status < STATUS_S:
            return
        self._shown, self._last_status = shown, now
        led = {"run": self._run.name, "coordinator": self._seat.election.node}
        status = {**led, **describe(cluster, now), **self._progress}
        if (alone_s := self._seat.forsaken(now)) > LATE_S:
            status |= {"waiting_for": ["a majority of the nodes to answer"], "waiting_s": round(alone_s, 1)}
        self._status.show(status)


def rules_of(run: RunConfig, nodes: tuple[str, ...], domains: Domains) -> Rules:
    recovery = run.recovery
    return Rules(
        nodes=nodes,
        world_size=run.cluster.nodes,
        replicas=run.protect.replicas,
        placement=run.protect.placement,
        domains=domains,
        total_steps=run.train.steps,
        snapshot_every=run.protect.snapshot_every,
        persist_every=run.protect.persist_every,
        patient=run.protect.mode == "interleaved",
        heartbeat_timeout_s=recovery.heartbeat_timeout_s,
        suspect_s=recovery.suspect_s,
        leave_s=recovery.leave_s,
        build_s=recovery.build_s,
        takeover_s=recovery.heartbeat_timeout_s + recovery.suspect_s,
        fetch_s=recovery.fetch_s,
        gather_s=2 * recovery.fetch_s + recovery.world_s,
        join_s=recovery.join_s,
        progress_s=recovery.progress_s,
        world_s=recovery.world_s,
        finish_s=recovery.join_s + run.protect.replicas * recovery.archive_s,  # one node may write for its partners
        max_restarts=recovery.max_restarts,
        max_fruitless=recovery.max_fruitless,
    )
