"""A world of real window hosts, with the test in the place of their agents."""

import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from gemini_hpc.arena import OWN, Arena, Record, State, checksum
from gemini_hpc.windows import HostSpec, mpiexec_command

MIB = 1 << 20
WAIT_S = 20.0


class World:
    """One MPI world over `arenas`; MPI rank i serves arenas[i]. Made, it has said hello, but may not be ready."""

    def __init__(self, place: Path, arenas: list[Arena], number: int = 1) -> None:
        self.arenas = arenas
        self.number = number
        self.inbox: list[list[dict[str, Any]]] = [[] for _ in arenas]
        self.log = place / f"world-{number}.log"
        self.mpich_id = ""
        paths = [place / f"{number}-{rank}" for rank in range(len(arenas))]
        listeners = [_listen(path) for path in paths]
        specs = [HostSpec(f"node{i}", arena.path, paths[i]) for i, arena in enumerate(arenas)]
        command, environment = mpiexec_command(Path(sys.executable), "test", number, specs, os.environ)
        with self.log.open("wb") as log:
            self.launcher = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self.channels = [listener.accept()[0] for listener in listeners]
        for listener in listeners:
            listener.close()
        hellos = [
            self.wait(rank, "Hello", role="host", world=number, node=f"node{rank}") for rank in range(len(arenas))
        ]
        self.pids = [int(hello["pid"]) for hello in hellos]
        self.shields = [parent(pid) for pid in self.pids]

    def ready(self) -> "World":
        for rank in range(len(self.arenas)):
            self.wait(rank, "HostReady", world=self.number, node=f"node{rank}")
        assert self.find_mpich_id(0)
        return self

    def send(self, rank: int, kind: str, /, **fields: Any) -> None:
        self.channels[rank].send(json.dumps({"kind": kind, "node": f"node{rank}", **fields}).encode())

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
            assert packet, f"no {kind} from rank {rank}, log of the world: {self.log.read_text()[-2000:]}"
            self.inbox[rank].append(json.loads(packet))

    def publish(self, rank: int, nbytes: int, step: int = 1) -> Record:
        """Write a snapshot of random bytes into half 0 of the node's own area and have it sealed."""
        arena = self.arenas[rank]
        arena.payload(OWN, 0)[:nbytes] = Random(f"{rank} {step}").randbytes(nbytes)
        arena.write_record(OWN, 0, Record(State.WRITTEN, rank, step, 1, nbytes))
        self.send(rank, "Written", half=0)
        self.wait(rank, "Sealed", half=0, step=step, nbytes=nbytes)
        return arena.record(OWN, 0)

    def pull(self, rank: int, source: int, deadline_s: float = WAIT_S) -> None:
        """Order `rank` to pull the sealed snapshot of `source` into half 0 of its replica area."""
        record = self.arenas[source].record(OWN, 0)
        order = {
            "source": f"node{source}",
            "world": self.number,
            "target": source,
            "source_area": OWN,
            "source_half": 0,
            "area": 1,
            "half": 0,
            "rank": record.rank,
            "step": record.step,
            "generation": record.generation + 1,  # of the order; the replica keeps that of the snapshot
            "origin": record.generation,
            "nbytes": record.nbytes,
            "checksum": record.checksum,
            "deadline_s": float(deadline_s),
            "patience_s": 0.0,
        }
        self.send(rank, "Pull", **order)

    def pulled(self, rank: int) -> dict[str, Any]:
        """Return the answer to the next of the rank's pulls."""
        return self.wait(rank, "Copied")

    def pull_now(self, rank: int, source: int) -> dict[str, Any]:
        """Pull, and return the answer."""
        self.pull(rank, source)
        return self.pulled(rank)

    def holds(self, rank: int, record: Record) -> bool:
        """Whether the replica area of `rank` holds that snapshot, by its record and by its bytes."""
        arena = self.arenas[rank]
        found = checksum(arena.payload(1, 0)[: record.nbytes])
        return arena.record(1, 0) == record and found == record.checksum

    def stop(self, rank: int) -> None:
        os.kill(self.pids[rank], signal.SIGSTOP)

    def resume(self, rank: int) -> None:
        os.kill(self.pids[rank], signal.SIGCONT)

    def kill(self, rank: int) -> None:
        os.kill(self.pids[rank], signal.SIGKILL)
        until(lambda: not alive(self.pids[rank]))

    def find_mpich_id(self, rank: int) -> str:
        """Look for the number in the names of MPICH's files, which all ranks of a world share."""
        maps = Path(f"/proc/{self.pids[rank]}/maps").read_text()
        if found := re.search(r"/mpich_shm_([0-9a-f]+)_", maps):
            self.mpich_id = found[1]
        return self.mpich_id

    def files(self) -> list[Path]:
        """Return what MPICH has in /dev/shm for this world."""
        return list(Path("/dev/shm").glob(f"mpich_*_{self.mpich_id}_*")) if self.mpich_id else []

    def close(self) -> None:
        """Kill the launcher; the shields and hosts must follow by themselves."""
        self.launcher.kill()
        self.launcher.wait()
        until(lambda: not any(map(alive, [*self.pids, *self.shields])))
        for channel in self.channels:
            channel.close()


def _listen(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(path))
    listener.listen()
    listener.settimeout(WAIT_S)
    return listener


def parent(pid: int) -> int:
    return int(_status(pid)[1])


def alive(pid: int) -> bool:
    """Whether the process runs; one that has ended and waits for its parent does not."""
    try:
        return _status(pid)[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _status(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.001)
