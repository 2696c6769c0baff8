"""The test's side: it starts ranks, plays the agents and the coordinator, and ends what it started."""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from gemini_hpc.arena import Arena, Geometry, State
from tests.engine.job import Case, fields_of

WAIT_S = 60.0
ROOT = Path(__file__).parents[2]


Losses = dict[tuple[int, int], float]
"""By rank and step."""


class CallFailed(AssertionError):
    """A rank's call raised. `peer`: what the library says of the error."""

    def __init__(self, answer: dict[str, Any]) -> None:
        super().__init__(f"{answer['error']}: {answer['text']}")
        self.kind, self.text, self.peer = answer["error"], answer["text"], answer["peer"]
        self.seconds = answer["seconds"]


class Nursery:
    """The process that forks ranks."""

    def __init__(self, logs: Path) -> None:
        self.logs = logs
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.settimeout(WAIT_S)
        environment = {**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        with (logs / "nursery.log").open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.engine.rank", str(os.getpid()), str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        theirs.close()
        assert self._control.recv(16) == b"ready", (logs / "nursery.log").read_text()[-2000:]
        self._count = 0

    def fork(self) -> "Rank":
        line, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._count += 1
        log = self.logs / f"rank-{self._count}.log"
        socket.send_fds(self._control, [str(log).encode()], [theirs.fileno()])
        theirs.close()
        return Rank(line, int(self._control.recv(16)), log)

    def close(self) -> None:
        self._control.close()
        self.process.kill()
        self.process.wait()


class Rank:
    """A process under test, seen from outside. `losses`: (step, loss) in the order they came."""

    def __init__(self, line: socket.socket, pid: int, log: Path) -> None:
        self._line, self.pid, self._log = line, pid, log
        self._pidfd = os.pidfd_open(pid)
        self.losses: list[tuple[int, int, float]] = []
        self._sent = self._begun = 0
        self.seconds = 0.0
        self.arena: Arena | None = None

    def send(self, name: str, **arguments: Any) -> None:
        self._line.send(json.dumps([name, arguments]).encode())
        self._sent += name != "abort"

    def answer(self, wait_s: float = WAIT_S) -> Any:
        """Wait for the answer to the oldest call; raises CallFailed, and AssertionError when there is none."""
        end = time.monotonic() + wait_s
        while True:
            if not select.select([self._line], [], [], max(0.0, end - time.monotonic()))[0]:
                raise AssertionError(f"no answer from {self.pid}: {self._stacks()}")
            raw = self._line.recv(1 << 20)
            assert raw, f"{self.pid} is gone: {self._log.read_text()[-2000:]}"
            packet = json.loads(raw)
            if self._take(packet):
                continue
            self.seconds = packet["seconds"]
            if "error" in packet:
                raise CallFailed(packet)
            return packet["value"]

    def call(self, name: str, **arguments: Any) -> Any:
        self.send(name, **arguments)
        return self.answer()

    def failure(self, wait_s: float = WAIT_S) -> CallFailed:
        """Wait for a call that must fail."""
        try:
            value = self.answer(wait_s)
        except CallFailed as failed:
            return failed
        raise AssertionError(f"{self.pid} succeeded: {value}")

    def state(self) -> str:
        """The kernel's letter: R, S, T (stopped), Z ...; X when it is gone."""
        try:
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return "X"

    def wait_struck(self, state: str, wait_s: float = WAIT_S) -> None:
        """Wait until it is dead (X) or stopped (T), and read what it still said: losses, no answer."""
        end = time.monotonic() + wait_s
        while self.state() not in ("XZ" if state == "X" else state):
            self._read_losses()
            assert time.monotonic() < end, f"{self.pid} lives: {self._stacks()}"
            time.sleep(0.001)
        self._read_losses()

    def _read_losses(self) -> None:
        while select.select([self._line], [], [], 0)[0] and (raw := self._line.recv(1 << 20)):
            packet = json.loads(raw)
            assert self._take(packet), packet

    def _take(self, packet: dict[str, Any]) -> bool:
        """Keep what is not an answer."""
        if "loss" in packet:
            self.losses.append((packet["rank"], packet["step"], packet["loss"]))
        elif "begun" in packet:
            self._begun += 1
        else:
            return False
        return True

    def end(self) -> None:
        """Kill it, and see that it is gone. May be called twice."""
        if self._pidfd < 0:
            return
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        gone = select.select([self._pidfd], [], [], WAIT_S)[0]
        os.close(self._pidfd)
        self._pidfd = -1
        self._line.close()
        assert gone

    def settle(self) -> None:
        """Wait until the last call has begun and stands still: no use of a processor for a while."""
        until(lambda: (self._read_losses(), self._begun == self._sent)[1])
        used, since = self._cpu_ticks(), time.monotonic()
        while time.monotonic() - since < 0.1:
            if (now := self._cpu_ticks()) != used:
                used, since = now, time.monotonic()
            time.sleep(0.005)

    def _cpu_ticks(self) -> int:
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])

    def _stacks(self) -> str:
        if self.state() in "XZT":
            return self.state()
        size = self._log.stat().st_size
        os.kill(self.pid, signal.SIGUSR1)
        until(lambda: self._log.stat().st_size > size)
        return self._log.read_text()[-4000:]


Fork = Callable[[], Rank]


class Cluster:
    """Ranks 0..size-1 of one training, and what agents and coordinator do for them."""

    def __init__(self, fork: Fork, place: Path, case: Case, size: int, spares: int = 1) -> None:
        self.size, self.case, self._place = size, case, place
        self.generation = 0
        built = [fork() for _ in range(size + spares)]
        self.stores: dict[int, str] = {}
        for number, rank in enumerate(built):
            role = number if number < size else 0  # a spare is built as rank 0 and adopts any
            rank.send("build", case=fields_of(case), rank=role, size=size)
        for rank in built:
            answer = rank.answer()
            self.stores[rank.pid] = answer["store"]
            rank.arena = Arena.create(place / f"arena-{rank.pid}", Geometry(1, answer["nbytes"] + (64 << 10)), "test")
            rank.call("open_arena", path=str(rank.arena.path))
        self.ranks, self.spares = built[:size], built[size:]
        self._all = built

    def all(self, name: str, **arguments: Any) -> list[Any]:
        """Call every rank at once, each with its rank; return the answers."""
        for rank in self.ranks:
            rank.send(name, **arguments)
        return [rank.answer() for rank in self.ranks]

    def start(self) -> "Cluster":
        """Generation 1, from nothing."""
        self._join()
        for number, rank in enumerate(self.ranks):
            rank.call("start", rank=number)
        return self

    def train(self, first: int, last: int) -> None:
        self.all("train", first=first, last=last)

    def train_until_struck(
        self, first: int, last: int, victim: int, phase: str, step: int, action: str = "kill"
    ) -> Rank:
        """Train until the trap strikes `victim`; its failure is seen, the survivors are still at it."""
        trap = {"phase": phase, "step": step, "action": action}
        for number, rank in enumerate(self.ranks):
            rank.send("train", first=first, last=last, trap=trap if number == victim else None)
        struck = self.ranks[victim]
        struck.wait_struck("X" if action == "kill" else "T")
        return struck

    def survivors_fail(self, *dead: int, abort: bool = True) -> list[CallFailed]:
        """Order the abort, and have every survivor's training fail as that of a lost peer."""
        survivors = [rank for number, rank in enumerate(self.ranks) if number not in dead]
        if abort:
            for rank in survivors:
                rank.send("abort", generation=self.generation)
        failures = [rank.failure() for rank in survivors]
        assert all(failure.peer for failure in failures), failures
        return failures

    def recover(self, dead: Sequence[int], rebuilt: Sequence[int] = ()) -> int:
        """Replace the dead by spares, bring all to the newest common step; return it. Survivors have failed."""
        step = self._newest_common()
        for number in dead:
            gone, new = self.ranks[number], self.spares.pop(0)
            assert gone.arena and new.arena
            new.arena.payload(0, step % 2)[:] = gone.arena.payload(0, step % 2)  # the fetch
            self.ranks[number] = new
        for number, rank in enumerate(self.ranks):
            if number not in dead:
                self.stores[rank.pid] = rank.call("leave")
            rank.call("rebuild" if number in rebuilt else "hot_swap", rank=number)
        self._join()
        self.restore(step)
        return step

    def restore(self, step: int) -> None:
        assert self.all("restore", half=step % 2) == [step] * self.size

    def losses(self) -> Losses:
        """All losses by (rank, step); a step that was trained twice must have had the same loss both times."""
        found: Losses = {}
        for process in self._all:
            for rank, step, loss in process.losses:
                assert found.setdefault((rank, step), loss) == loss, f"rank {rank} step {step}"
        return found

    def _newest_common(self) -> int:
        held = []
        for rank in self.ranks:
            assert rank.arena
            records = [rank.arena.record(0, half) for half in (0, 1)]
            held.append({record.step for record in records if record.state is State.WRITTEN})
        return max(set.intersection(*held))

    def _join(self) -> None:
        self.generation += 1
        store = self.stores[self.ranks[0].pid]
        for number, rank in enumerate(self.ranks):
            rank.send("join", generation=self.generation, rank=number, store=store)
        for rank in self.ranks:
            rank.answer()


def reference(fork: Fork, place: Path, case: Case, size: int, steps: int) -> Losses:
    """The losses of the undisturbed run on plain gloo."""
    ranks = [fork() for _ in range(size)]
    for number, rank in enumerate(ranks):
        meeting = str(place / "meeting")
        rank.send("reference", case=fields_of(case), rank=number, size=size, meeting=meeting, steps=steps)
    found = {}
    for rank in ranks:
        rank.answer()
        found.update({(number, step): loss for number, step, loss in rank.losses})
    assert len(found) == size * steps
    for rank in ranks:
        os.kill(rank.pid, signal.SIGKILL)
    return found


Clusters = Callable[..., Cluster]
"""cluster(case, size, spares), the fixture."""

Undisturbed = Callable[..., Losses]
"""undisturbed(case, size, steps), the fixture."""


def until(condition: Callable[[], object], wait_s: float = WAIT_S) -> None:
    end = time.monotonic() + wait_s
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.001)
