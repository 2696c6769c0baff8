"""One node's account of itself: what an agent makes of what it hears, and what it tells a new coordinator. Pure.

So that a simulated agent does the very same as a real one.
"""

from collections.abc import Iterable

from gemini_hpc.core.messages import (
    Abort,
    Command,
    Copied,
    Event,
    Gone,
    HostReady,
    Inventory,
    Join,
    Lead,
    Load,
    Parked,
    Pull,
    RestartWorker,
    Retire,
    Safe,
    Stepped,
    WorkerLost,
    WorkerReady,
)
from gemini_hpc.core.state import term_of
from gemini_hpc.core.types import FRESH

_OF_A_GENERATION = (Join, Safe, Pull, Load, RestartWorker, Retire)
"""The orders that do harm when they come late or twice. The others name what they are about, and it is no more."""


class Account:
    """Kept by the events of the node's processes (`hear`) and the coordinator's orders (`role_of`)."""

    def __init__(self, node: str) -> None:
        self.node = node
        self.worker = "building"  # or idle, busy, lost
        self.reason = ""  # why it was lost
        self.generation = 0  # that it was last told to join, as `rank`
        self.rank = -1
        self.fence = 0  # the newest generation of which there was an order
        self._pulled: dict[
            tuple[int, int], tuple[int, int]
        ] = {}  # (area, half) -> generation and step of the last Pull
        self._fetch: Pull | None = None  # the last read into the own area, until it is answered
        self.built_rank = -1
        self.store = ""
        self.snapshot_bytes = 0  # > 0: the arena exists
        self.safe_step: int = FRESH  # as the arena should show it to the worker
        self.last_step: Stepped | None = None
        self.host: HostReady | None = None  # the newest window host that was ready
        self.host_world = 0  # of the one that is connected; 0 = none
        self._informed = ("", 0)  # the coordinator, and its term, that has our inventory

    def hear(self, message: Event) -> None:
        """Take note of what a process of the node said."""
        if isinstance(message, WorkerReady):
            self.worker, self.store = "idle", message.store
            self.built_rank, self.snapshot_bytes = message.built_rank, message.snapshot_bytes
        elif isinstance(message, WorkerLost):
            self.worker, self.reason = "lost", message.reason
        elif isinstance(message, Parked):
            self.worker, self.store = "idle", message.store
        elif isinstance(message, Stepped):
            self.last_step = message
        elif isinstance(message, HostReady):
            self.host = message
        elif isinstance(message, Copied) and message.source and message.area == 0:
            self._fetch = None

    def is_stale(self, order: Command) -> bool:
        """Whether an order was on its way for so long that it has been overtaken by a later term or generation."""
        if not isinstance(order, _OF_A_GENERATION):
            return False
        if term_of(order.generation) != self._informed[1] or order.generation < self.fence:
            return True
        if isinstance(order, (RestartWorker, Retire, Load)) or (isinstance(order, Pull) and order.area == 0):
            return order.generation <= self.generation  # the Join of which it was to precede
        # in a generation what is pulled to a place only grows newer
        last = self._pulled.get((order.area, order.half)) if isinstance(order, Pull) else None
        return last is not None and (order.generation, order.step) < last

    def role_of(self, order: Command) -> str:
        """Take note of an order; return the process that carries it out: worker, host or archiver; "" = none."""
        if isinstance(order, (Join, Safe, Pull, Load)):
            self.fence = max(self.fence, order.generation)
        if isinstance(order, Safe):
            if order.generation == self.generation:
                self.safe_step = order.step
            return ""
        if isinstance(order, Join):
            if order.generation <= self.generation:
                return ""  # of the past
            self.worker, self.generation, self.rank = "busy", order.generation, order.rank
            # perhaps back behind the safe step of before: nothing is safe until the coordinator says so again
            self.safe_step = FRESH
            return "worker"
        if isinstance(order, Pull):
            self._pulled[order.area, order.half] = (order.generation, order.step)
            self._fetch = order if order.area == 0 else self._fetch
        if isinstance(order, (Pull, Gone)):
            return "host" if order.world == self.host_world else ""  # else of a world that is no more
        return "worker" if isinstance(order, Abort) else "archiver"

    @property
    def fetches(self) -> bool:
        """Whether the window host still reads into the worker's own area; that must end before the worker joins."""
        return self._fetch is not None and self._fetch.world == self.host_world

    def informs(self, lead: Lead) -> bool:
        """Whether this coordinator is to have our inventory now; from then on it understands what else we say."""
        if lead.term < self._informed[1]:
            return False  # overtaken on its way by one of a later term
        new = self._informed != (lead.leader, lead.term)
        self._informed = (lead.leader, lead.term)
        return new or not lead.reported

    @property
    def coordinator(self) -> str:
        """Who has our inventory, so that it understands what else we say; "" = nobody ever had."""
        return self._informed[0]

    def inventory(self, held: Iterable[tuple[int, ...]]) -> Inventory:
        """Return all that there is; `held` are the sealed snapshots, as Inventory has them."""
        host = self.host
        return Inventory(
            node=self.node,
            term=self._informed[1],
            worker=self.worker,
            reason=self.reason,
            generation=self.generation,
            rank=self.rank,
            built_rank=self.built_rank,
            store=self.store,
            snapshot_bytes=self.snapshot_bytes,
            world=host.world if host else 0,
            members=host.members if host else (),
            host=host is not None and host.world == self.host_world,
            safe_step=self.safe_step,
            held=tuple(held),
        )
