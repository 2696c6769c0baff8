"""The window host of one node: `python -m gemini_hpc.windows.host WORLD`, started by `launch`.

It exposes the node's arena through an MPI window, computes the checksums of the node's own snapshots, and pulls
snapshots of other nodes into the arena, as its agent orders. One thread and one MPI world. It is expendable: it
owns nothing, may crash when a partner dies, and leaves by `os._exit`.

Once it is ready it makes no MPI call but Rget, Test and Iprobe: those outlive the death of a partner, while Flush,
collectives, point-to-point and Finalize do not (FACTS.md section 4). What is left are races inside UCX 1.20, which
aborts the process that sends to a partner it does not yet know to be dead:
- the puller, when its request waits behind other data for the same partner: so connections are made at the start,
  and the agents see to it that of two hosts only one pulls from the other at a time;
- the server, when a puller dies between its request and the first part of the answer: so no work here takes long.
"""

import contextlib
import os
import select
import socket
import sys
import time
import traceback
from collections import deque
from collections.abc import Generator, Iterator
from pathlib import Path

import mpi4py
import xxhash

from gemini_hpc.arena import OWN, Arena, Record, State
from gemini_hpc.core.codec import Message, decode
from gemini_hpc.core.messages import Copied, Gone, Hello, HostReady, Profiled, Pull, Reads, Sealed, Written
from gemini_hpc.errors import GeminiError
from gemini_hpc.windows.pace import Pace

mpi4py.rc.initialize = False  # the agent must know this process before MPI can hang in its start-up
mpi4py.rc.finalize = False

from mpi4py import MPI  # noqa: E402

READ_BYTES = 16 << 20
"""The largest read. Smaller ones are slower, and in each the death of the puller can hurt its source."""

PIECE_BYTES = 256 << 10
"""Copied and hashed, within the processor's cache (about 50 us), between two looks at the transport."""

PACKET_BYTES = 256 << 10
ABANDONED_READS_MAX = 16
"""Each keeps a buffer for ever; a host that has more of them makes way for a fresh world."""

NAME_BYTES = 256
"""More than the name of a node can have."""

UNPIPELINED = "GEMINI_UNPIPELINED"
"""Set in the environment, each read is stored before the next one begins: to measure what that would cost."""

IDLE_POLL_S = 0.010
SERVE_POLL_S = 0.001
SPAN_POLL_S = 0.002
"""How often a read that waits for an idle span looks whether one has begun."""

Job = Iterator[bool]
"""Work in pieces: yields whether it can go on at once (else it waits for the transport)."""


class PullFailed(GeminiError):
    """A pull that ends without a verified replica; the message goes to the agent as the reason."""


class Agent:
    """The line to the node's agent: one message a packet. Raises ConnectionError when the agent is gone."""

    def __init__(self, path: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.connect(path)
        self.socket.setblocking(False)

    def send(self, message: Message) -> None:
        self.socket.send(message.encode())

    def receive(self) -> Message:
        """Return the next order; to be called when the socket is readable."""
        packet = self.socket.recv(PACKET_BYTES)
        if not packet:
            raise ConnectionResetError
        return decode(packet)


class Host:
    """One loop: obey the agent, advance the first seal and the first pull by one piece, serve, wait."""

    def __init__(self, agent: Agent, arena: Arena, node: str) -> None:
        """Join the world (collective: returns when the windows of all ranks are ready and connected)."""
        self.node = node
        self.agent = agent
        self.arena = arena
        MPI.Init_thread(MPI.THREAD_SINGLE)
        _unlink_mpich_files()
        self.comm = MPI.COMM_WORLD
        self.comm.Set_errhandler(MPI.ERRORS_RETURN)
        self.members = self._names()
        self.window = MPI.Win.Create(arena.buffer, 1, comm=self.comm)
        self.window.Set_errhandler(MPI.ERRORS_RETURN)
        self.window.Lock_all(MPI.MODE_NOCHECK)
        self.pace = Pace(lambda: arena.idle_until, READ_BYTES, self._connect())
        self.waits_for_span = False
        self.pipelined = UNPIPELINED not in os.environ
        self.comm.Barrier()
        self.transport_fds = _transport_fds()
        self.wakeups = select.poll()
        for fd in (agent.socket.fileno(), *self.transport_fds):
            self.wakeups.register(fd, select.POLLIN)
        self.seals: deque[Job] = deque()
        self.pulls: deque[Job] = deque()
        self.gone: set[int] = set()
        self.free_buffers: list[bytearray] = []
        self.reads: list[tuple[MPI.Request, bytearray]] = []  # all abandoned ones, then the outstanding one

    def _names(self) -> tuple[str, ...]:
        """Return the nodes of all MPI ranks."""
        mine, names = bytearray(self.node.encode().ljust(NAME_BYTES, b"\0")), bytearray(NAME_BYTES * self.comm.size)
        self.comm.Allgather([mine, MPI.BYTE], [names, MPI.BYTE])
        pieces = (names[start : start + NAME_BYTES] for start in range(0, len(names), NAME_BYTES))
        return tuple(piece.rstrip(b"\0").decode() for piece in pieces)

    def _connect(self) -> float:
        """Read one byte of every other rank: a read that waits for its connection cannot outlive its source.

        Return the seconds that the least read takes.
        """
        byte, least_s = bytearray(1), 0.0
        for distance in range(1, self.comm.size):
            target = (self.comm.rank + distance) % self.comm.size
            for _ in ("connects", "does not"):
                began = time.monotonic()
                self.window.Rget([byte, 1, MPI.BYTE], target, [0, 1, MPI.BYTE]).Wait()
                least_s = time.monotonic() - began
        return least_s

    def run(self) -> None:
        while True:
            can_go_on = self._advance(self.seals) | self._advance(self.pulls)
            with contextlib.suppress(MPI.Exception):  # a partner died: the agents decide what that means
                self.comm.Iprobe(source=self.comm.rank)
            for fd, _ in self.wakeups.poll(0 if can_go_on else 1000 * self._poll_s()):
                if fd == self.agent.socket.fileno():
                    self._obey(self.agent.receive())

    def _advance(self, jobs: deque[Job]) -> bool:
        """Do one piece of the first job; return whether there is more to do at once."""
        if not jobs:
            return False
        with contextlib.suppress(StopIteration):
            return next(jobs[0])
        jobs.popleft()
        return bool(jobs)

    def _poll_s(self) -> float:
        """Return how long to wait for an order or for the transport.

        UCX's TCP has an epoll descriptor, which wakes this process at once, whether it pulls or serves. Without it
        (shared memory, InfiniBand, Open MPI) a pull has to spin: sleeping between tests costs two thirds of its speed.
        """
        if self.waits_for_span:
            return SPAN_POLL_S
        if self.transport_fds:
            return IDLE_POLL_S
        if self.pulls:
            os.sched_yield()
            return 0.0
        return SERVE_POLL_S

    def _obey(self, order: Message) -> None:
        if isinstance(order, Written):
            self.seals.append(self._seal(order.half))
        elif isinstance(order, Pull):
            self.pulls.append(self._pull(order, time.monotonic()))
        elif isinstance(order, Gone):
            self.gone.update(order.targets)
        elif isinstance(order, Profiled):
            self.pace.heed(order)
            if order.stamps:
                reads = self.pace.reads_between(order.stamps[0][0], order.stamps[-1][1])
                self.agent.send(Reads(self.node, order.step, reads))

    def _seal(self, half: int) -> Job:
        """Compute the checksum of a half of the own area and mark it SEALED; a sealed one is only reported."""
        record = self.arena.record(OWN, half)
        if record.state is State.WRITTEN:
            checksum = yield from self._checksum(OWN, half, record.nbytes)
            if self.arena.record(OWN, half) != record:
                return  # overwritten meanwhile; the worker will say so
            record = record._replace(state=State.SEALED, checksum=checksum)
            self.arena.write_record(OWN, half, record)
        if record.state is State.SEALED:
            at = (record.generation, record.rank, record.step)
            self.agent.send(Sealed(self.node, *at, half, record.nbytes, record.checksum))

    def _checksum(self, area: int, half: int, nbytes: int) -> Generator[bool, None, int]:
        payload = self.arena.payload(area, half)[:nbytes]
        digest = xxhash.xxh3_64()
        for start in range(0, nbytes, PIECE_BYTES):
            digest.update(payload[start : start + PIECE_BYTES])
            yield True
        return digest.intdigest()

    def _pull(self, order: Pull, ordered: float) -> Job:
        """Pull one snapshot into a half of the own arena, verify it, and leave the half SEALED or else FREE.

        What lies there already, intact, is not touched: the order may have come twice, and others count on it.
        """
        area, half, nbytes = order.area, order.half, order.nbytes
        wanted = Record(State.SEALED, order.rank, order.step, order.origin, nbytes, order.checksum)
        reason, (patience_s, hurry) = "", self.pace.patience_s(nbytes, order.patience_s)
        if self.arena.record(area, half) != wanted or (yield from self._checksum(area, half, nbytes)) != order.checksum:
            self.arena.write_record(area, half, wanted._replace(state=State.WRITING, checksum=0))
            try:
                yield from self._read(order, ordered + patience_s, ordered + patience_s + order.deadline_s)
            except GeminiError as failure:
                reason = str(failure)
            except MPI.Exception as failure:
                reason = failure.Get_error_string().splitlines()[-1].strip()
            self.waits_for_span = False
            self.arena.write_record(area, half, Record() if reason else wanted)
        at = (order.generation, order.rank, order.step, order.source, area, half, nbytes, order.checksum)
        self.agent.send(Copied(self.node, *at, not reason, reason, time.monotonic() - ordered, hurry))
        if len(self.reads) > ABANDONED_READS_MAX:
            raise PullFailed(f"{len(self.reads)} reads abandoned")

    def _read(self, order: Pull, patient_until: float, deadline: float) -> Job:
        """Read the source half, one outstanding read at a time, and store what arrived while the next one travels.

        Each read fits into an idle span, until patience is over. Raise PullFailed when what arrived is not what was
        ordered.

        The bytes land in a buffer of their own first: an abandoned read may still complete later, and must not
        write into a half that holds something else by then.
        """
        geometry = self.arena.geometry  # the arenas of a run are all alike
        if order.nbytes > geometry.snapshot_bytes:
            raise PullFailed(f"{order.nbytes} bytes do not fit into {geometry.snapshot_bytes}")
        digest = xxhash.xxh3_64()
        source = geometry.payload_offset(order.source_area, order.source_half)
        payload = self.arena.payload(order.area, order.half)[: order.nbytes]
        stored: Job = iter(())
        start = 0
        while start < len(payload):
            self._check(order.target, deadline)
            size = self.pace.size(len(payload) - start, patient_until)
            if not size:
                self.waits_for_span = True
                yield next(stored, False)
                continue
            self.waits_for_span = False
            place = payload[start : start + size]
            buffer = self.free_buffers.pop() if self.free_buffers else bytearray(READ_BYTES)
            remote = [source + start, len(place), MPI.BYTE]
            began = time.monotonic()
            request = self.window.Rget([buffer, len(place), MPI.BYTE], order.target, remote)
            self.reads.append((request, buffer))
            while not request.Test():
                yield next(stored, False)
                self._check(order.target, deadline)
            self.reads.pop()
            self.pace.took(size, began, time.monotonic())
            yield from stored
            stored = self._store(place, buffer, digest)
            start += size
            if not self.pipelined:
                yield from stored
        yield from stored
        if digest.intdigest() != order.checksum:
            raise PullFailed("checksum")

    def _check(self, target: int, deadline: float) -> None:
        if target in self.gone:
            raise PullFailed("gone")
        if time.monotonic() > deadline:
            raise PullFailed("deadline")

    def _store(self, place: memoryview, buffer: bytearray, digest: xxhash.xxh3_64) -> Job:
        for start in range(0, len(place), PIECE_BYTES):
            piece = place[start : start + PIECE_BYTES]
            piece[:] = memoryview(buffer)[start : start + len(piece)]
            digest.update(piece)
            yield True
        self.free_buffers.append(buffer)


def _transport_fds() -> list[int]:
    """Return the epoll descriptors of this process, which are all UCX's; only its TCP shows its events there."""
    if "tcp" not in os.environ.get("UCX_TLS", ""):
        return []
    links = {fd: Path(f"/proc/self/fd/{fd}") for fd in map(int, os.listdir("/proc/self/fd"))}
    return [fd for fd, link in links.items() if link.is_symlink() and "[eventpoll]" in os.readlink(link)]


def _unlink_mpich_files() -> None:
    """Remove MPICH's own file from /dev/shm: it stays mapped, and as every rank counts as remote nobody opens it.

    MPICH itself would remove it in Finalize, which is never called. Open MPI's files are Slurm's to remove.
    """
    for line in Path("/proc/self/maps").read_text().splitlines():
        _, start, name = line.partition("/dev/shm/mpich_shm_")
        if start:
            Path(start + name).unlink(missing_ok=True)


def main() -> None:
    world, node = int(sys.argv[1]), os.environ["GEMINI_NODE"].rpartition(":")[2]
    agent = Agent(os.environ["GEMINI_AGENT"])
    agent.send(Hello(node, "host", os.getpid(), world))
    host = Host(agent, Arena.open(Path(os.environ["GEMINI_ARENA"])), node)
    agent.send(HostReady(node, world, host.members))
    host.run()


if __name__ == "__main__":
    try:
        main()
    except ConnectionError:  # the agent is gone
        os._exit(0)
    except BaseException:  # noqa: BLE001 (the outermost loop: nothing may run MPI's own exit)
        traceback.print_exc()
        os._exit(1)
