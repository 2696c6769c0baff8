"""Worlds of real window hosts, with the test in the place of their agents."""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

from gemini_hpc.arena import OWN, Arena, Record, State, checksum
from gemini_hpc.windows import HostSpec, mpiexec_command

MIB = 1 << 20
WAIT_S = 20.0


class World:
    """One MPI world over `arenas`; MPI rank i serves arenas[i]. The methods play the agents."""

    def __init__(self, place: Path, arenas: list[Arena], number: int = 1) -> None:
        self.arenas = arenas
        self.number = number
        self.inbox: list[list[dict[str, Any]]] = [[] for _ in arenas]
        self.ids = count()
        listeners, specs = [], []
        for rank, arena in enumerate(arenas):
            path = place / f"{number}-{rank}"
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            listener.bind(str(path))
            listener.listen()
            listener.settimeout(WAIT_S)
            listeners.append(listener)
            specs.append(HostSpec(f"node{rank}", arena.path, path))
        command, environment = mpiexec_command(Path(sys.executable), "test", number, specs, os.environ)
        self.log = place / f"world-{number}.log"
        with self.log.open("wb") as log:
            self.launcher = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        self.channels = [listener.accept()[0] for listener in listeners]
        for listener in listeners:
            listener.close()
        hellos = [self.wait(rank, "hello") for rank in range(len(arenas))]
        assert [(h["role"], h["world"], h["mpi_rank"]) for h in hellos] == [
            ("host", number, rank) for rank in range(len(arenas))
        ]
        self.pids = [int(hello["pid"]) for hello in hellos]
        self.shields = [int(Path(f"/proc/{pid}/stat").read_text().split()[3]) for pid in self.pids]

    def ready(self) -> "World":
        for rank in range(len(self.arenas)):
            assert self.wait(rank, "host_ready")["mpi_rank"] == rank
        return self

    def send(self, rank: int, kind: str, /, **fields: Any) -> None:
        self.channels[rank].send(json.dumps({"kind": kind, **fields}).encode())

    def wait(self, rank: int, kind: str, wait_s: float = WAIT_S, /, **fields: Any) -> dict[str, Any]:
        """Return the next message of that kind (and with those fields) from a host; others stay for later."""
        end = time.monotonic() + wait_s
        while True:
            for message in self.inbox[rank]:
                if message["kind"] == kind and fields.items() <= message.items():
                    self.inbox[rank].remove(message)
                    return message
            ready, _, _ = select.select([self.channels[rank]], [], [], max(0.0, end - time.monotonic()))
            packet = self.channels[rank].recv(256 << 10) if ready else b""
            assert packet, f"no {kind} from rank {rank} (world log: {self.log.read_text()[-2000:]})"
            self.inbox[rank].append(json.loads(packet))

    def pull(self, rank: int, source: int, half: int = 0, deadline_s: float = WAIT_S) -> int:
        """Order `rank` to pull the sealed snapshot of `source` into its replica area; return the order's id."""
        record = self.arenas[source].record(OWN, half)
        order = next(self.ids)
        self.send(
            rank,
            "pull",
            id=order,
            target=source,
            source_area=OWN,
            source_half=half,
            area=1,
            half=half,
            rank=record.rank,
            step=record.step,
            generation=record.generation,
            nbytes=record.nbytes,
            checksum=record.checksum,
            deadline_s=deadline_s,
        )
        return order

    def pulled(self, rank: int, order: int) -> dict[str, Any]:
        return self.wait(rank, "pulled", id=order)

    def publish(self, rank: int, nbytes: int, step: int = 1, half: int = 0) -> Record:
        """Write a snapshot of random bytes into the node's own area and have it sealed."""
        arena = self.arenas[rank]
        arena.payload(OWN, half)[:nbytes] = Random(f"{rank} {step}").randbytes(nbytes)
        arena.write_record(OWN, half, Record(State.WRITTEN, rank, step, 1, nbytes))
        self.send(rank, "seal", half=half)
        self.wait(rank, "sealed", step=step)
        return arena.record(OWN, half)

    def kill(self, rank: int) -> None:
        os.kill(self.pids[rank], signal.SIGKILL)
        until(lambda: not alive(self.pids[rank]))

    def close(self) -> None:
        """Kill the launcher; the shields and hosts must follow by themselves."""
        self.launcher.kill()
        self.launcher.wait()
        until(lambda: not any(map(alive, [*self.pids, *self.shields])))
        for channel in self.channels:
            channel.close()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def until(condition: Callable[[], object], wait_s: float = WAIT_S) -> None:
    end = time.monotonic() + wait_s
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.001)


def holds(arena: Arena, record: Record, half: int = 0) -> bool:
    """Whether the replica area holds that snapshot, by its record and by its bytes."""
    return (
        arena.record(1, half) == record
        and checksum(arena.payload(1, half)[: record.nbytes]) == record.checksum
    )
