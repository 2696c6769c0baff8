"""The coordinator's loop: hands events and time to `core`, carries out what it orders. It decides nothing itself."""

import time
from typing import Any

import zmq

from gemini_hpc.config import RunConfig
from gemini_hpc.core.coordinator import step
from gemini_hpc.core.messages import (
    Command,
    Disconnected,
    Event,
    Finish,
    Heartbeat,
    Message,
    NodeUp,
    Note,
    StartWorld,
    Stepped,
    Tick,
)
from gemini_hpc.core.state import Checkpoint, Rules, new_cluster
from gemini_hpc.core.view import describe
from gemini_hpc.persist import manifest
from gemini_hpc.runtime.paths import RunPaths
from gemini_hpc.runtime.status_file import StatusThread
from gemini_hpc.runtime.wire import Client, Wire
from gemini_hpc.telemetry import EventThread

STATUS_S = 0.25
"""How often status.json is renewed; also at every change of the phase."""


class Coordinator:
    """One agent's second role."""

    def __init__(
        self,
        paths: RunPaths,
        run: RunConfig,
        nodes: tuple[str, ...],
        wire: Wire,
        cluster: Client,
        events: EventThread,
    ) -> None:
        self._run, self._wire, self._events = run, wire, events
        self._status = StatusThread(paths)
        self._to_cluster = cluster
        self._agents: dict[str, Client] = {}
        self._new_agents: list[Client] = []
        self._state = new_cluster(rules_of(run, nodes), time.monotonic(), published(paths))
        self._last_beat = 0.0
        self._last_status = 0.0
        self._shown: tuple[Any, ...] = ()
        self._progress: dict[str, float] = {}

    def hear(self, message: Message) -> None:
        """Take what the cluster says: a node came, a node's agent exited, a world's launcher ended."""
        if isinstance(message, NodeUp):
            client = self._wire.call(message.endpoint, "coordinator")
            self._agents[message.node] = client
            self._new_agents.append(client)
            client.send(Heartbeat(message.node))
        elif isinstance(message, Event):
            self._take(message)

    def turn(self, poller: zmq.Poller) -> None:
        """Take everything that waits, and then the time: silence is judged only after all has been heard."""
        for client in self._new_agents:
            poller.register(client.socket, zmq.POLLIN)
            poller.register(client.monitor, zmq.POLLIN)
        self._new_agents.clear()
        for node, client in self._agents.items():
            while (message := client.receive()) is not None:
                if isinstance(message, Event) and message.node == node:
                    self._take(message)
            if client.broke():
                self._take(Disconnected(node))
        now = time.monotonic()
        if now - self._last_beat >= self._run.recovery.heartbeat_s:
            self._last_beat = now
            for node, client in self._agents.items():
                client.send(Heartbeat(node))
            self._take(Tick(""))
        self._show(now)

    def _take(self, event: Event) -> None:
        if isinstance(event, Stepped):
            self._progress = {"loss": event.loss, "step_s": event.step_s}
        self._state, orders = step(self._state, time.monotonic(), event)
        for order in orders:
            self._carry_out(order)

    def _carry_out(self, order: Command) -> None:
        if isinstance(order, Note):
            self._events.emit(order.event, **order.details)
        elif isinstance(order, StartWorld) or (isinstance(order, Finish) and not order.node):
            self._to_cluster.send(order)
        elif order.node in self._agents:
            self._agents[order.node].send(order)

    def _show(self, now: float) -> None:
        shown = (self._state.phase, self._state.generation, self._state.outcome)
        if shown == self._shown and now - self._last_status < STATUS_S:
            return
        self._shown, self._last_status = shown, now
        self._status.show({"run": self._run.name, **describe(self._state, now), **self._progress})


def rules_of(run: RunConfig, nodes: tuple[str, ...]) -> Rules:
    recovery = run.recovery
    return Rules(
        nodes=nodes,
        world_size=run.cluster.nodes,
        replicas=run.protect.replicas,
        total_steps=run.train.steps,
        persist_every=run.protect.persist_every,
        heartbeat_timeout_s=recovery.heartbeat_timeout_s,
        suspect_s=recovery.suspect_s,
        leave_s=recovery.leave_s,
        build_s=recovery.build_s,
        fetch_s=recovery.fetch_s,
        gather_s=2 * recovery.fetch_s + recovery.world_s,
        join_s=recovery.join_s,
        world_s=recovery.world_s,
        finish_s=recovery.join_s + recovery.archive_s,
        max_restarts=recovery.max_restarts,
        max_fruitless=recovery.max_fruitless,
    )


def published(paths: RunPaths) -> Checkpoint | None:
    """Return the newest checkpoint of the persistent tier, as the core knows it."""
    found = manifest.newest(paths.run_dir)
    if found is None:
        return None
    return Checkpoint(found.step, {file.rank: (file.name, file.nbytes, file.checksum) for file in found.files})
