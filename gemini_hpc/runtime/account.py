"""What a node has, as its agent keeps account of it. All of it goes into the inventory for a new coordinator."""

from collections.abc import Iterator

from gemini_hpc.arena import OWN, Arena, State
from gemini_hpc.core.messages import HostReady, Inventory, Join, Stepped, WorkerReady


class Account:
    """The worker, the snapshots, the window host."""

    def __init__(self, node: str) -> None:
        self.node = node
        self.worker = "building"  # or idle, busy, lost
        self.reason = ""  # why it was lost
        self.generation = 0  # that it was last told to join, as `rank`
        self.rank = -1
        self.ready: WorkerReady | None = None  # its newest word that an engine is built
        self.store = ""
        self.last_step: Stepped | None = None
        self.arena: Arena | None = None
        self.host: HostReady | None = None  # the newest that there was
        self.host_world = 0  # of the host that is connected; 0 = none

    def joins(self, order: Join) -> None:
        self.worker, self.generation, self.rank = "busy", order.generation, order.rank

    def is_idle(self, store: str) -> None:
        self.worker, self.store = "idle", store

    def inventory(self) -> Inventory:
        ready, host = self.ready, self.host
        return Inventory(
            node=self.node,
            worker=self.worker,
            reason=self.reason,
            generation=self.generation,
            rank=self.rank,
            built_rank=ready.built_rank if ready else -1,
            store=self.store,
            snapshot_bytes=self.arena.geometry.snapshot_bytes if self.arena and ready else 0,
            world=host.world if host else 0,
            members=host.members if host else (),
            host=host is not None and host.world == self.host_world,
            held=tuple(self._held()),
        )

    def unreported_halves(self) -> list[int]:
        """The halves of the own area that a new window host has to seal, or to report again."""
        if self.arena is None:
            return []
        return [half for half in (0, 1) if self.arena.record(OWN, half).state in (State.WRITTEN, State.SEALED)]

    def _held(self) -> Iterator[tuple[int, ...]]:
        if self.arena is None:
            return
        for area in range(self.arena.geometry.areas):
            for half in (0, 1):
                record = self.arena.record(area, half)
                if record.state is State.SEALED:
                    place = (area, half, record.rank, record.step)
                    yield (*place, record.generation, record.nbytes, record.checksum)
