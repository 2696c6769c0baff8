"""The elastic group: a c10d backend that DeepSpeed holds for ever while the group inside it is exchanged.

A collective on an `ElasticGroup` runs on its inner group: a group over gloo, or a fake one whose collectives do
nothing, under which a worker builds its engine without any peers. c10d's interface as of torch 2.13.
"""

import datetime
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FakeProcessGroup
from torch.distributed import ProcessGroup
from torch.distributed import distributed_c10d as c10d

from gemini_hpc.engine import gloo
from gemini_hpc.engine.store import StoreClient, StoreServer
from gemini_hpc.engine.traffic import Traffic, nbytes_of
from gemini_hpc.errors import UserError

BACKEND = "elastic"

_AGAIN_S = 0.005

_DELEGATED = [
    "allreduce",
    "allreduce_coalesced",
    "allgather",
    "_allgather_base",
    "allgather_coalesced",
    "allgather_into_tensor_coalesced",
    "broadcast",
    "barrier",
    "reduce",
    "reduce_scatter",
    "_reduce_scatter_base",
    "reduce_scatter_tensor_coalesced",
    "alltoall",
    "alltoall_base",
    "send",
    "recv",
    "recv_anysource",
    "gather",
    "scatter",
    "all_gather_single",
    "reduce_scatter_single",
    "all_to_all_single",
    "all_gather_single_coalesced",
    "reduce_scatter_single_coalesced",
    "monitored_barrier",
    "_start_coalescing",
    "_end_coalescing",
]


class ElasticGroup(ProcessGroup):
    """A process group of fixed size whose rank and inner group may change between collectives."""

    def __init__(self, rank: int, size: int, traffic: Traffic) -> None:
        super().__init__(rank, size)
        self.traffic = traffic
        self._elastic_rank = rank
        self._elastic_size = size
        self.inner: gloo.Group | ProcessGroup = _fake_group(rank, size)

    def become(self, rank: int, inner: gloo.Group | ProcessGroup) -> None:
        self._elastic_rank = rank
        self.inner = inner

    def rank(self) -> int:
        return self._elastic_rank

    def size(self) -> int:
        return self._elastic_size

    def getBackendName(self) -> str:
        return BACKEND

    def name(self) -> str:
        return BACKEND

    def set_timeout(self, timeout: datetime.timedelta) -> None:
        """The bound of a collective is the inner group's, set when it is made."""


def _delegate(name: str) -> Any:
    def call(self: ElasticGroup, *args: Any, **kwargs: Any) -> Any:
        began = time.monotonic()
        work = getattr(self.inner, name)(*args, **kwargs)
        if isinstance(work, gloo.Work):
            self.traffic.stamp(work, began, nbytes_of(args))
        return work

    call.__name__ = name
    return call


for _name in _DELEGATED:
    setattr(ElasticGroup, _name, _delegate(_name))


class ElasticWorld:
    """All elastic groups of this process: swapped together, aborted together."""

    def __init__(self, rank: int, size: int, address: str, timeout_s: float) -> None:
        """Become the default process group, with nothing but a fake group inside: no peer is needed."""
        self.rank = rank
        self.size = size
        self._address = address
        self._timeout = datetime.timedelta(seconds=timeout_s)
        self._groups: list[ElasticGroup] = []
        self.traffic = Traffic()
        self._lock = threading.Lock()
        self._device: gloo.Device | None = None
        self._own_store: StoreServer | None = None
        self._store: StoreClient | None = None  # the group's: it may be asked for as long as the group lives
        self._generation = 0  # whose group is held or being made
        self._forming = False
        self._ended_through = -1  # all generations up to this one were aborted or left
        dist.Backend.register_backend(BACKEND, self._create, extended_api=True, devices=["cpu"])
        dist.init_process_group(BACKEND, store=dist.HashStore(), rank=rank, world_size=size, timeout=self._timeout)

    def _create(self, options: Any, _backend_options: Any = None) -> ElasticGroup:
        if options.group_size != self.size:
            raise UserError(
                f"DeepSpeed asks for a group of {options.group_size} of {self.size} ranks, which cannot be exchanged; "
                "leave hpZ, expert, tensor and sequence parallelism out of train.deepspeed"
            )
        group = ElasticGroup(options.group_rank, options.group_size, self.traffic)
        self._groups.append(group)
        return group

    def open_store(self) -> str:
        """Offer a store for the next generation, in case this process is its rank 0; return its "host:port"."""
        if self._own_store is not None:
            self._own_store.close()
        self._own_store = StoreServer(self._address)
        return self._own_store.address

    def join(self, generation: int, rank: int, address: str) -> None:
        """Put the real group of `generation` inside every elastic group (all ranks).

        They meet at rank 0's store, which listens at `address`. Blocks until all ranks came, at most the timeout;
        raises RuntimeError when `abort` is called meanwhile or a peer does not come.
        """
        self._device = device = self._device or gloo.Device(self._address)
        self._store = store = StoreClient(address, self._timeout.total_seconds())
        with self._lock:
            self._generation = generation
            self._forming = True
        try:
            self._refuse_ended()
            store.connect()
            for index, group in enumerate(self._groups):
                self._refuse_ended()
                prefix = dist.PrefixStore(f"generation-{generation}/group-{index}", store)
                group.become(rank, gloo.Group(prefix, rank, self.size, device, self._timeout, self._ended))
            self.rank = rank
        finally:
            with self._lock:
                self._forming = False
        self._refuse_ended()

    def _refuse_ended(self) -> None:
        if self.has_ended(self._generation):
            raise RuntimeError(f"generation {self._generation} was aborted while its group formed")

    def leave(self, rank: int | None = None) -> None:
        """End the group; a fake one takes its place, in which this process is `rank`.

        Blocks until nothing of the group can write to a tensor any more.
        """
        self.abort(self._generation)
        self.rank = self.rank if rank is None else rank
        old = [group.inner for group in self._groups]
        for group in self._groups:
            group.become(self.rank, _fake_group(self.rank, self.size))
            c10d._world.pg_coalesce_state.pop(group, None)  # filled when a coalesced collective failed
        # gloo's destructor waits for its threads, of which one may sleep until its timeout
        threading.Thread(target=old.clear, daemon=True).start()
        self._settle()
        self.traffic.reset()
        if self._store is not None:
            self._store.close()
            self._store = None

    def _ended(self) -> bool:
        """Whether the group has ended; if so, it has come to rest."""
        if self._forming or not self.has_ended(self._generation):
            return False
        self._settle()
        return True

    def _settle(self) -> None:
        if self._device is not None:
            gloo.settle(self._device.connections())

    def vote(self, mine: bool) -> Callable[[], bool]:
        """Cast a vote (all ranks); what is returned waits for all of them, and says whether all are true.

        It raises RuntimeError when a peer is lost.
        """
        answer = torch.tensor([mine], dtype=torch.int32)
        options = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp.MIN
        work = self._groups[0].inner.allreduce([answer], options)  # not stamped: no traffic of the training's

        def outcome() -> bool:
            work.wait()
            return bool(answer.item())

        return outcome

    def abort(self, generation: int) -> None:
        """End `generation` and all before it; from any thread but the joining one, even before `join`.

        Every collective in flight on its group, and every later one, raises. While the group forms, what it
        opens is shut until `join` gives up, which it does at once.
        """
        forming = True
        while forming:
            with self._lock:
                self._ended_through = max(self._ended_through, generation)
                if not self.has_ended(self._generation):
                    return
                forming = self._forming
                if self._store is not None:
                    self._store.shut()
                if self._device is not None:  # those of groups before are shut already
                    gloo.shut(self._device.connections())
            if forming:
                time.sleep(_AGAIN_S)

    def has_ended(self, generation: int) -> bool:
        """Whether `generation` was aborted or left."""
        return generation <= self._ended_through


class Agreement:
    """On one question, which all ranks ask at the same moments: a yes of all stands, after a no they vote again."""

    def __init__(self, cast: Callable[[], Callable[[], bool]]) -> None:
        """`cast` casts this rank's vote, as it is by then, and returns what waits for the outcome."""
        self._cast = cast
        self._reached: Callable[[], bool] = lambda: False

    def vote(self) -> None:
        if not self._reached():
            self._reached = self._cast()

    def reached(self) -> bool:
        """Wait for the last vote; whether all said yes."""
        return self._reached()


def _fake_group(rank: int, size: int) -> ProcessGroup:
    group = ProcessGroup(dist.HashStore(), rank, size)
    backend = FakeProcessGroup._create_internal(rank, size)
    group._set_default_backend(ProcessGroup.BackendType.CUSTOM)
    group._register_backend(torch.device("cpu"), ProcessGroup.BackendType.CUSTOM, backend)
    return group


def is_peer_failure(error: BaseException) -> bool:
    """Whether `error` comes from a collective whose peer is lost, rather than from the training itself."""
    if isinstance(error, dist.DistError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(word in text for word in ("gloo", "NCCL"))
