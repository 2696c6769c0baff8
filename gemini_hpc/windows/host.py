"""The window host of one node: `python -m gemini_hpc.windows.host WORLD`, started by `launch`.

It exposes the node's arena through an MPI window, computes the checksums of the node's own snapshots, and pulls snapshots
of other nodes into the arena, as its agent orders. One thread, one MPI world, expendable: it owns nothing, and leaves by
`os._exit`, without MPI's knowledge.

After start-up it makes no MPI call but Rget, Test and Iprobe. Those alone outlived the death of their partners; Flush,
collectives, point-to-point and Finalize did not (FACTS.md section 4).
"""

import contextlib
import json
import os
import select
import socket
import sys
import time
import traceback
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mpi4py
import xxhash

from gemini_hpc.arena import OWN, Arena, Record, State
from gemini_hpc.errors import GeminiError

mpi4py.rc.initialize = False  # the agent must know this process before MPI can hang in its start-up
mpi4py.rc.finalize = False

from mpi4py import MPI  # noqa: E402

CHUNK_BYTES = 16 << 20
"""One read, and one piece of checksum work (about 2 ms), between two looks at the agent's orders."""

STORE_BYTES = 256 << 10
"""Copied and then hashed while still in the processor's cache."""

PACKET_BYTES = 256 << 10
ABANDONED_READS_MAX = 16
"""Each keeps a chunk of memory for ever; a host that reached it makes way for a fresh one."""

IDLE_POLL_S = 0.010
SERVE_POLL_S = 0.001


class PullFailed(GeminiError):
    """A pull that ends without a verified replica; the message goes to the agent as the reason."""


class Agent:
    """The channel to the node's agent: one JSON object a packet. Never blocks, and ends the process with the agent."""

    def __init__(self, path: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.connect(path)
        self.socket.setblocking(False)

    def send(self, kind: str, **fields: Any) -> None:
        self.socket.send(json.dumps({"kind": kind, **fields}).encode())

    def receive(self) -> dict[str, Any]:
        """Return the next order; to be called when the socket is readable."""
        packet = self.socket.recv(PACKET_BYTES)
        if not packet:
            raise ConnectionResetError
        order: dict[str, Any] = json.loads(packet)
        return order


class Host:
    """The loop: obey the agent, advance the first seal and the first pull by one piece, let MPI progress, wait."""

    def __init__(self, agent: Agent, arena: Arena, world: int) -> None:
        self.agent = agent
        self.arena = arena
        MPI.Init_thread(MPI.THREAD_SINGLE)
        _unlink_mpich_files()
        self.comm = MPI.COMM_WORLD
        self.comm.Set_errhandler(MPI.ERRORS_RETURN)
        self.window = MPI.Win.Create(arena.buffer, 1, comm=self.comm)
        self.window.Set_errhandler(MPI.ERRORS_RETURN)
        self.window.Lock_all(MPI.MODE_NOCHECK)
        self._connect()
        self.comm.Barrier()
        self.transport_fds = _transport_fds()
        self.wakeups = select.poll()
        for fd in (agent.socket.fileno(), *self.transport_fds):
            self.wakeups.register(fd, select.POLLIN)
        self.seals: deque[Iterator[None]] = deque()
        self.pulls: deque[Iterator[None]] = deque()
        self.gone: set[int] = set()
        self.serve_until = 0.0
        self.free_buffers: list[bytearray] = []
        self.reads: list[tuple[MPI.Request, bytearray]] = []  # the outstanding one, and all abandoned ones
        agent.send("host_ready", world=world, mpi_rank=self.comm.rank)

    def _connect(self) -> None:
        """Read one byte from every other rank, so that all connections exist before anybody may die.

        MPICH 5.0 aborts the reader when its partner dies while a read still waits for the connection (ucx_rma.h
        asserts that a queued read never fails); one that was sent just stays unanswered.
        """
        byte = bytearray(1)
        for distance in range(1, self.comm.size):
            target = (self.comm.rank + distance) % self.comm.size
            self.window.Rget([byte, 1, MPI.BYTE], target, [0, 1, MPI.BYTE]).Wait()

    def run(self) -> None:
        while True:
            for fd, _ in self.wakeups.poll(1000 * self._poll_s()):
                if fd == self.agent.socket.fileno():
                    self._obey(self.agent.receive())
            for jobs in (self.seals, self.pulls):
                if jobs and next(jobs[0], True):  # a job yields None until it is done
                    jobs.popleft()
            with contextlib.suppress(MPI.Exception):  # a partner died; the agents will say so
                self.comm.Iprobe(source=self.comm.rank)

    def _poll_s(self) -> float:
        """Return how long to wait for an order or an event of the transport.

        UCX's TCP has its events on an epoll descriptor, which wakes this process at once, whether it pulls or
        serves. Where there is none a pull has to spin: to sleep between tests costs two thirds of its speed.
        """
        if self.seals:
            return 0.0
        if self.transport_fds:
            return IDLE_POLL_S
        if self.pulls:
            os.sched_yield()
            return 0.0
        return SERVE_POLL_S if time.monotonic() < self.serve_until else IDLE_POLL_S

    def _obey(self, order: dict[str, Any]) -> None:
        match order["kind"]:
            case "seal":
                self.seals.append(self._seal(order["half"]))
            case "pull":
                self.pulls.append(self._pull(order, time.monotonic()))
            case "gone":
                self.gone.update(order["targets"])
            case "serve":
                self.serve_until = time.monotonic() + order["seconds"]
            case "quit":
                os._exit(0)
            case kind:
                raise ValueError(f"an agent gives no order {kind!r}")

    def _seal(self, half: int) -> Iterator[None]:
        """Compute the checksum of a half of the own area and mark it SEALED; a sealed one is reported again."""
        record = self.arena.record(OWN, half)
        if record.state is State.WRITTEN:
            payload = self.arena.payload(OWN, half)[: record.nbytes]
            digest = xxhash.xxh3_64()
            for start in range(0, record.nbytes, CHUNK_BYTES):
                digest.update(payload[start : start + CHUNK_BYTES])
                yield
            if self.arena.record(OWN, half) != record:
                self.agent.send("seal_failed", half=half, reason="changed meanwhile")
                return
            record = replace(record, state=State.SEALED, checksum=digest.intdigest())
            self.arena.write_record(OWN, half, record)
        if record.state is State.SEALED:
            fields = {
                name: getattr(record, name) for name in ("rank", "step", "generation", "checksum", "nbytes")
            }
            self.agent.send("sealed", half=half, **fields)
        else:
            self.agent.send("seal_failed", half=half, reason=f"the half is {record.state.name}")

    def _pull(self, order: dict[str, Any], ordered: float) -> Iterator[None]:
        """Pull one snapshot into a half of the own arena, verify it, and mark the half SEALED, or FREE on failure."""
        area, half, nbytes = order["area"], order["half"], order["nbytes"]
        record = Record(State.WRITING, order["rank"], order["step"], order["generation"], nbytes)
        reason = ""
        self.arena.write_record(area, half, record)
        try:
            if nbytes > self.arena.geometry.snapshot_bytes:
                raise PullFailed(f"{nbytes} bytes do not fit into {self.arena.geometry.snapshot_bytes}")
            digest = xxhash.xxh3_64()
            yield from self._read(order, ordered + order["deadline_s"], digest)
            if digest.intdigest() != order["checksum"]:
                raise PullFailed("checksum")
            record = replace(record, state=State.SEALED, checksum=order["checksum"])
        except GeminiError as failure:
            reason = str(failure)
        except MPI.Exception as failure:
            reason = failure.Get_error_string().splitlines()[-1].strip()
        self.arena.write_record(area, half, Record() if reason else record)
        seconds = time.monotonic() - ordered
        self.agent.send("pulled", id=order["id"], ok=not reason, seconds=seconds, reason=reason)
        if len(self.reads) > ABANDONED_READS_MAX:
            raise PullFailed(f"{len(self.reads)} reads abandoned")

    def _read(self, order: dict[str, Any], deadline: float, digest: xxhash.xxh3_64) -> Iterator[None]:
        """Read the source half chunk by chunk, one outstanding read at a time, and store what arrived.

        The bytes land in a buffer of their own first: a read that was abandoned may still complete later, and
        must not write into a half that holds something else by then. A chunk is stored while the next one travels.
        """
        geometry = self.arena.geometry  # the arenas of a run are all alike
        source = geometry.payload_offset(order["source_area"], order["source_half"])
        payload = self.arena.payload(order["area"], order["half"])[: order["nbytes"]]
        landed = None
        for start in range(0, order["nbytes"], CHUNK_BYTES):
            size = min(CHUNK_BYTES, order["nbytes"] - start)
            self._check(order["target"], deadline)
            buffer = self.free_buffers.pop() if self.free_buffers else bytearray(CHUNK_BYTES)
            request = self.window.Rget(
                [buffer, size, MPI.BYTE], order["target"], [source + start, size, MPI.BYTE]
            )
            self.reads.append((request, buffer))
            if landed:
                self._store(*landed, digest)
            while not request.Test():
                yield
                self._check(order["target"], deadline)
            self.reads.pop()
            landed = (payload[start : start + size], buffer)
        if landed:
            self._store(*landed, digest)

    def _check(self, target: int, deadline: float) -> None:
        if target in self.gone:
            raise PullFailed("gone")
        if time.monotonic() > deadline:
            raise PullFailed("deadline")

    def _store(self, place: memoryview, buffer: bytearray, digest: xxhash.xxh3_64) -> None:
        for start in range(0, len(place), STORE_BYTES):
            piece = place[start : start + STORE_BYTES]
            piece[:] = memoryview(buffer)[start : start + len(piece)]
            digest.update(piece)
        self.free_buffers.append(buffer)


def _transport_fds() -> list[int]:
    """Return the epoll descriptors of this process: those of UCX. Other transports than TCP may have none."""
    links = {fd: Path(f"/proc/self/fd/{fd}") for fd in map(int, os.listdir("/proc/self/fd"))}
    return [fd for fd, link in links.items() if link.is_symlink() and "[eventpoll]" in os.readlink(link)]


def _unlink_mpich_files() -> None:
    """Remove MPICH's own file from /dev/shm: it stays mapped, and nobody else opens it (every rank counts as remote).

    MPICH itself would remove it in Finalize, which is never called.
    """
    for line in Path("/proc/self/maps").read_text().splitlines():
        _, slash, name = line.partition("/dev/shm/mpich_shm_")
        if slash:
            Path(slash + name).unlink(missing_ok=True)


def main() -> None:
    world = int(sys.argv[1])
    agent = Agent(os.environ["GEMINI_AGENT"])
    agent.send("hello", role="host", pid=os.getpid(), world=world, mpi_rank=int(os.environ["PMI_RANK"]))
    Host(agent, Arena.open(Path(os.environ["GEMINI_ARENA"])), world).run()


if __name__ == "__main__":
    try:
        main()
    except ConnectionError:  # the agent is gone
        os._exit(0)
    except BaseException:  # noqa: BLE001 (the outermost loop: MPI must not learn how the process ends)
        traceback.print_exc()
        os._exit(1)
