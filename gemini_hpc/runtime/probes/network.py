"""Probes of the lines between nodes: addresses, the control plane, MPI windows, gloo."""

import json
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import TypeVar

import zmq

from gemini_hpc.arena import OWN, Arena, ArenaError, Geometry, Record, State
from gemini_hpc.config.capacity import shm_left
from gemini_hpc.core.codec import Message
from gemini_hpc.core.messages import Copied, Heartbeat, Hello, HostReady, Lead, Pull, Sealed, Written
from gemini_hpc.errors import GeminiError, UserError
from gemini_hpc.runtime.channel import Listener
from gemini_hpc.runtime.children import DYING_WITH_US
from gemini_hpc.runtime.cluster import LOOPBACK, address_of, nodes_of
from gemini_hpc.runtime.probes.examine import Case, Finding, last_line, ok, problem, warning
from gemini_hpc.runtime.probes.storage import NOT_TRIED
from gemini_hpc.runtime.processes import wait_exit
from gemini_hpc.runtime.wire import Client, Server, Wire, make_keys
from gemini_hpc.windows import HostSpec, mpiexec_command, network_interface

CONNECT_S = 2.0
EXCHANGES = 200
PULL_BYTES = 32 << 20
PULLS = 5
PULL_S = 60.0
NODES = ("node0", "node1")
LOCALHOST = f"see that torch can be imported, and give {LOOPBACK} the name localhost in /etc/hosts"
SHIELD = "window host "
"""How a shield's word begins that its host has ended (windows/shield.py); it keeps that from the launcher."""

WATCH_MS = 100
LAST_WORDS_S = 1.0
SLOW_JOIN_S = 1.0
"""A group forms in milliseconds; seconds mean that a name service is asked for addresses it does not know."""

M = TypeVar("M", bound=Message)


def loopback(case: Case) -> Finding:
    """The addresses of the virtual nodes: bound and connected to."""
    nodes = nodes_of(case.run)
    addresses = [address_of(node, nodes) for node in nodes]
    for address in addresses:
        try:
            with socket.create_server((address, 0)) as server:
                socket.create_connection(server.getsockname(), CONNECT_S).close()
        except OSError as error:
            return problem(f"{address}: {error.strerror or error}: bring lo up with 127.0.0.1/8, the whole network")
    return ok(f"{len(addresses)} nodes at {addresses[0]} to {addresses[-1]}, all reached")


def control_plane(case: Case) -> Finding:
    """A handshake with keys made for it, and messages there and back."""
    make_keys(case.shared("keys.json"))
    wire = Wire(case.shared("keys.json"))
    server = wire.listen(address_of(NODES[0], NODES))
    client = wire.call(server.endpoint, NODES[1])
    times = [_exchange(client, server) for _ in range(1 + EXCHANGES)]
    first_s, typical_s, worst_s = times[0], median(times[1:]), max(times[1:])
    found = (
        f"CURVE handshake {first_s * 1e3:.0f} ms; round trip {typical_s * 1e3:.2f} ms (median of {EXCHANGES}), "
        f"slowest {worst_s * 1e3:.1f} ms; heartbeats go out every {case.run.recovery.heartbeat_s * 1e3:.0f} ms"
    )
    if typical_s > case.run.recovery.heartbeat_s / 2:
        return warning(f"{found}: set recovery.heartbeat_s={4 * typical_s:.2g}")
    return ok(found)


def _exchange(client: Client, server: Server) -> float:
    """Send a message there and the answer back; return how long it took, in seconds."""
    began = time.monotonic()
    client.send(Lead(NODES[0], NODES[1], 1, began, reported=True))
    while (heard := server.receive()) is None:
        server.socket.poll(100, zmq.POLLIN)
    server.send(heard[0], Heartbeat(NODES[0], began))
    while client.receive() is None:
        client.socket.poll(100, zmq.POLLIN)
    return time.monotonic() - began


# --- MPI --------------------------------------------------------------------------------------------------


def other_interface() -> str:
    """Say what to try when window hosts do not start, or do not find each other."""
    return f"set site.interface to another of {', '.join(interfaces()) or 'none'}, or install MPICH anew: make"


def mpi_world(case: Case) -> Finding:
    """A world of two window hosts, started as in a run, and snapshots pulled through it."""
    site, recovery = case.run.site, case.run.recovery
    interface = site.interface or network_interface()
    if interface and interface not in interfaces():
        return problem(no_interface(interface))
    try:
        arenas = [small_arena(case, node) for node in NODES]
    except (ArenaError, UserError):
        return warning(NOT_TRIED)
    began = time.monotonic()
    world = _World(case, arenas)
    start_s = time.monotonic() - began
    sealed = world.publish()
    speed = median(sealed.nbytes / world.pull(sealed) for _ in range(PULLS))
    over = f"TCP over {interface}" if interface else "shared memory (no interface but lo)"
    return judge_world("2 window hosts", start_s, recovery.world_s, sealed.nbytes, speed, over)


def judge_world(hosts: str, start_s: float, world_s: float, nbytes: int, speed: float, over: str) -> Finding:
    """Judge an MPI world by its start, seconds, of `world_s` that it may take, and reads of `nbytes`, bytes/s."""
    found = (
        f"{hosts} up in {start_s:.2f} s (world_s {world_s:g}); "
        f"{nbytes / 1e6:.0f} MB by Rget, verified, at {speed / 1e6:.0f} MB/s; {over}"
    )
    if start_s > world_s / 2:
        return warning(f"{found}: set recovery.world_s={4 * start_s:.0f}")
    return ok(found)


def small_arena(case: Case, node: str) -> Arena:
    """Make a small arena, which takes a quarter of what is free at most. Raises ArenaError or UserError."""
    geometry = Geometry(2, min(PULL_BYTES, shm_left(case.run.site) // 16))
    return Arena.create(case.shared(f"{node}.arena"), geometry, case.id)


class HostLine:
    """The line to one window host, as its agent has it. `lost` says why the world has broken down, if it has."""

    def __init__(self, socket: Path, lost: Callable[[], GeminiError | None]) -> None:
        self._listener, self._lost = Listener(socket), lost

    def open(self) -> None:
        """Wait until the host has begun. Raises GeminiError when the world breaks down."""
        self._await(self._listener.fileno())
        line = self._listener.accept()
        if line is None:
            raise self._hung_up()
        self._line = line
        self.hear(Hello)

    def send(self, message: Message) -> None:
        self._line.send(message)

    def hear(self, kind: type[M]) -> M:
        """Wait for a message of that kind, which is due. Raises GeminiError when something else comes."""
        self._await(self._line.fileno())
        message = self._line.receive()
        if not isinstance(message, kind):
            raise self._hung_up()
        return message

    def publish(self, arena: Arena, node: str) -> Sealed:
        """Put a snapshot into the host's arena and have it sealed."""
        payload = arena.payload(OWN, 0)
        payload[:] = os.urandom(len(payload))
        arena.write_record(OWN, 0, Record(State.WRITTEN, 0, 1, 1, len(payload)))
        self.send(Written(node, 0))
        return self.hear(Sealed)

    def pull(self, arena: Arena, node: str, source: str, target: int, sealed: Sealed) -> float:
        """Have this host, of `node`, pull a snapshot from `source`, which is MPI rank `target`; return the seconds.

        Raises GeminiError.
        """
        what = (sealed.nbytes, sealed.checksum)
        arena.write_record(1, 0, Record())  # what it has already, a host does not read again
        self.send(Pull(node, 1, 1, 0, sealed.step, source, 1, target, OWN, sealed.half, 1, 0, *what, PULL_S))
        copied = self.hear(Copied)
        if not copied.ok:
            raise GeminiError(f"a pull from window to window failed ({copied.reason})")
        return copied.seconds

    def _await(self, fd: int) -> None:
        poller = select.poll()
        poller.register(fd, select.POLLIN)
        while not poller.poll(WATCH_MS):
            if lost := self._lost():
                raise lost

    def _hung_up(self) -> GeminiError:
        """Say why, which may be told a moment later than the line ends."""
        deadline = time.monotonic() + LAST_WORDS_S
        while (lost := self._lost()) is None and time.monotonic() < deadline:
            time.sleep(0.01)
        return lost or GeminiError("a window host ended without a word")


class _World:
    """Two window hosts over small arenas. What is started and made here is ended by `examine`."""

    def __init__(self, case: Case, arenas: list[Arena]) -> None:
        self._log = case.shared("windows.log")
        self._arenas = arenas
        sockets = [case.shared(f"{node}.sock") for node in NODES]
        self._lines = [HostLine(path, self._lost) for path in sockets]
        hosts = [HostSpec(n, a.path, s) for n, a, s in zip(NODES, arenas, sockets, strict=True)]
        command, environment = mpiexec_command(
            Path(sys.executable), case.id, 1, hosts, os.environ, case.run.site.interface
        )
        with self._log.open("wb") as log:
            launcher = subprocess.Popen(
                [*DYING_WITH_US, *command], env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        self._launcher = os.pidfd_open(launcher.pid)
        for line in self._lines:
            line.open()
        for line in self._lines:
            line.hear(HostReady)

    def publish(self) -> Sealed:
        return self._lines[0].publish(self._arenas[0], NODES[0])

    def pull(self, sealed: Sealed) -> float:
        """Have the second node pull it; return how long that took, in seconds. Raises GeminiError."""
        return self._lines[1].pull(self._arenas[1], NODES[1], NODES[0], 0, sealed)

    def _lost(self) -> GeminiError | None:
        words = self._log.read_text(errors="replace").splitlines()
        if not wait_exit(self._launcher, 0.0) and not any(line.startswith(SHIELD) for line in words):
            return None
        word = last_line([line for line in words if not line.startswith(SHIELD)])
        return GeminiError(f"the MPI world of 2 window hosts broke down ({word})")


def no_interface(name: str) -> str:
    return f"no interface {name} is up: set site.interface to one of {', '.join(interfaces())}"


def interfaces() -> list[str]:
    return sorted(name for _, name in socket.if_nameindex() if name != "lo" and _state(name) != "down")


def _state(interface: str) -> str:
    try:
        return Path("/sys/class/net", interface, "operstate").read_text().strip()
    except OSError:
        return "unknown"


# --- gloo -------------------------------------------------------------------------------------------------


def gloo_group(case: Case) -> Finding:
    """Two processes that load torch, as workers do, form an elastic group and vote."""
    timeout = str(case.run.recovery.join_s)
    ranks = [
        subprocess.Popen(
            [*DYING_WITH_US, sys.executable, "-m", "gemini_hpc.runtime.probes.rank", str(rank), LOOPBACK, timeout],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=case.shared(f"rank-{rank}.log").open("wb"),
            text=True,
        )
        for rank in range(2)
    ]
    stores = [_line(case, ranks, rank) for rank in range(2)]
    for process in ranks:
        assert process.stdin
        process.stdin.write(stores[0])  # every worker offers one, and rank 0's is taken
        process.stdin.flush()
    load_s, join_s, vote_s = (
        max(of_rank) for of_rank in zip(*(json.loads(_line(case, ranks, r)) for r in range(2)), strict=True)
    )
    found = (
        f"torch loaded in {load_s:.1f} s; a group of 2 at {LOOPBACK} formed in {join_s * 1e3:.0f} ms; "
        f"a vote of the ranks, one a step, takes {vote_s * 1e3:.2f} ms"
    )
    if join_s > SLOW_JOIN_S:
        return warning(f"{found}: {LOCALHOST}")
    return ok(found)


def _line(case: Case, ranks: "list[subprocess.Popen[str]]", rank: int) -> str:
    """Return the next line of a rank. Raises GeminiError when it has ended instead."""
    output = ranks[rank].stdout
    assert output
    if line := output.readline():
        return line
    word = last_line(case.shared(f"rank-{rank}.log").read_text(errors="replace").splitlines())
    raise GeminiError(f"a process of the gloo group broke down ({word})")
