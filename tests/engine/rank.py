"""The processes under test: ranks that do what the test tells them, as an agent would.

One nursery process imports torch and DeepSpeed once and forks every rank. Run as a program with the nursery's
end of a socket; each rank has its own, on which calls and answers are JSON packets.
"""

import dataclasses
import faulthandler
import gc
import json
import os
import queue
import signal
import socket
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

MAX_PACKET_BYTES = 1 << 20


class Rank:
    """What a rank can be told. Methods are called by name from the test; `abort` from another thread."""

    def __init__(self, line: socket.socket) -> None:
        self._line = line
        self._calls: queue.SimpleQueue[tuple[str, dict[str, Any]]] = queue.SimpleQueue()
        self._world: Any = None
        self._built: Any = None
        self._arena: Any = None
        self._struck = False
        self._old: list[weakref.ref[Any]] = []

    def serve(self) -> None:
        threading.Thread(target=self._listen, daemon=True).start()
        while True:
            name, arguments = self._calls.get()
            self._send({"begun": name})
            start = time.monotonic()
            try:
                answer = {"value": getattr(self, name)(**arguments)}
            except Exception as error:  # noqa: BLE001  handed to the test, which knows what to expect
                traceback.print_exc()
                answer = {"error": type(error).__name__, "text": str(error), "peer": _is_peer_failure(error)}
            self._send({**answer, "seconds": time.monotonic() - start})

    def _listen(self) -> None:
        while True:
            raw = self._line.recv(MAX_PACKET_BYTES)
            if not raw:
                os._exit(0)
            name, arguments = json.loads(raw)
            if name == "abort":
                self._world.abort(**arguments)
            else:
                self._calls.put((name, arguments))

    def _send(self, packet: dict[str, Any]) -> None:
        self._line.send(json.dumps(packet).encode())

    # --- what a worker does -------------------------------------------------------------------------

    def build(
        self, case: dict[str, Any], rank: int, size: int, entry: str = "tests.engine.job:build", timeout_s: float = 60.0
    ) -> dict[str, Any]:
        """Become a spare, and offer a store."""
        from gemini_hpc.engine import builder
        from gemini_hpc.engine.elastic import ElasticWorld
        from tests.engine import job

        self._run = job.run_of(job.case_of(case), entry)
        builder.prepare(1)
        self._entry = builder.load_entry(self._run.train.entry)
        self._world = ElasticWorld(rank, size, "127.0.0.1", timeout_s)
        self._built = builder.build(self._entry, self._run, rank)
        return {"nbytes": self._built.shard.nbytes, "store": self.open_store()}

    def open_arena(self, path: str) -> None:
        from gemini_hpc.arena import Arena

        self._arena = Arena.open(Path(path))

    def open_store(self) -> str:
        return str(self._world.open_store())

    def leave(self) -> str:
        """Give up the group; return the address of a store for the next."""
        self._world.leave()
        return self.open_store()

    def hot_swap(self, rank: int) -> dict[str, float]:
        """Bring the engine to a step boundary, as `rank`."""
        from gemini_hpc.engine import reset

        start = time.monotonic()
        if not self._built.fresh:
            reset.reset(self._built.engine)
        reset.adopt(self._built.engine, rank)
        done = time.monotonic()
        self._world.leave(rank)
        return {"reset_s": done - start, "leave_s": time.monotonic() - done}

    def rebuild(self, rank: int) -> None:
        """Build the engine anew, as `rank`."""
        from gemini_hpc.engine import builder

        self._old.append(weakref.ref(self._built.engine))
        self._world.leave(rank)
        builder.destroy(self._built)
        self._built = builder.build(self._entry, self._run, rank)

    def join(self, generation: int, rank: int, store: str) -> None:
        self._world.join(generation, rank, store)

    def start(self, rank: int) -> None:
        """Begin at step 0."""
        self._built.fresh = False
        self.capture(0, float("nan"))

    def restore(self, half: int) -> int:
        index = self._built.shard.restore(self._arena.payload(0, half))
        self._built.fresh = False
        return index.step

    def capture(self, step: int, loss: float, trap: Callable[[], None] | None = None) -> float:
        from gemini_hpc.arena import Record, State

        start = time.monotonic()
        half, shard = step % 2, self._built.shard
        self._arena.write_record(0, half, Record(State.WRITING, self._world.rank, step))
        shard.capture(shard.place(self._arena.payload(0, half)), shard.gather(step, loss))
        if trap:
            trap()
        self._arena.write_record(0, half, Record(State.WRITTEN, self._world.rank, step, nbytes=shard.nbytes))
        return time.monotonic() - start

    def train(self, first: int, last: int, trap: dict[str, Any] | None = None, capture: bool = True) -> None:
        """Train steps first..last; `trap`: what strikes this rank, in which phase of which step."""
        from gemini_hpc.engine.training import train_step

        for step in range(first, last + 1):
            armed = trap if trap and step == trap["step"] else None
            training = self._arm(armed) if armed else self._built.training
            loss = train_step(self._built.engine, training, self._run.train.seed, step, self._world.rank)
            if capture:
                self.capture(step, loss, self._striker(armed, "snapshot"))
            self._send({"loss": loss, "step": step, "rank": self._world.rank})
            if armed and armed["phase"] == "after":
                self._strike(armed["action"])

    def _arm(self, trap: dict[str, Any]) -> Any:
        engine, training, phase = self._built.engine, self._built.training, trap["phase"]
        strike = self._striker(trap, phase)
        assert strike is not None
        middle = engine.module.blocks[1] if hasattr(engine.module, "blocks") else list(engine.module.modules())[7]
        if phase == "forward":
            middle.register_forward_pre_hook(lambda *_: strike())
        elif phase == "backward":
            middle.register_full_backward_pre_hook(lambda *_: strike())
        elif phase == "optimizer":
            engine.optimizer.optimizer.register_step_pre_hook(lambda *_: strike())
        elif phase == "between":

            def batch(step: int, rank: int, micro_step: int) -> Any:
                if micro_step == 1:
                    strike()
                return training.batch(step, rank, micro_step)

            return dataclasses.replace(training, batch=batch)
        return training

    def _striker(self, trap: dict[str, Any] | None, phase: str) -> Callable[[], None] | None:
        if trap is None or trap["phase"] != phase:
            return None
        action = trap["action"]
        return lambda: self._strike(action)

    def _strike(self, action: str) -> None:
        if self._struck:
            return
        self._struck = True
        if action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif action == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        else:
            raise ValueError(action)

    def reference(self, case: dict[str, Any], rank: int, size: int, meeting: str, steps: int) -> None:
        """Train undisturbed, in plain gloo, with nothing of ours but the step."""
        from gemini_hpc.engine import builder
        from gemini_hpc.engine.plain import join_plain_group
        from gemini_hpc.engine.training import train_step
        from tests.engine import job

        run = job.run_of(job.case_of(case))
        builder.prepare(1)
        join_plain_group(Path(meeting), rank, size, 60.0)
        engine, training = builder.make_engine(builder.load_entry(run.train.entry), run)
        for step in range(1, steps + 1):
            loss = train_step(engine, training, run.train.seed, step, rank)
            self._send({"loss": loss, "step": step, "rank": rank})

    # --- what a test looks at -----------------------------------------------------------------------

    def census(self) -> dict[str, Any]:
        """Count what could leak."""
        gc.collect()
        status = Path("/proc/self/status").read_text()
        fields = dict(line.split(":", 1) for line in status.splitlines())
        return {
            "threads": int(fields["Threads"]),
            "rss_kib": int(fields["VmRSS"].split()[0]),
            "fds": len(os.listdir("/proc/self/fd")),
            "groups": len(self._world._groups),
            "old_engines": sum(ref() is not None for ref in self._old),
        }

    def call(self, module: str, function: str, **arguments: Any) -> Any:
        """Call any function, with this rank as its first argument."""
        import importlib

        return getattr(importlib.import_module(module), function)(self, **arguments)


def _is_peer_failure(error: BaseException) -> bool:
    from gemini_hpc.engine.elastic import is_peer_failure

    return is_peer_failure(error)


# --- the nursery ------------------------------------------------------------------------------------


def nursery(control: socket.socket) -> None:
    """Fork a rank for every socket that arrives; answer with its process id."""
    from gemini_hpc.engine import builder, elastic  # noqa: F401  what all ranks need, imported once
    from tests.engine import job  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel buries them
    control.send(b"ready")
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 4096, 1)
        if not message:
            os._exit(0)
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            control.close()
            _become_rank(socket.socket(fileno=descriptors[0]), message.decode(), parent)
        os.close(descriptors[0])
        control.send(str(pid).encode())


def _become_rank(line: socket.socket, log: str, parent: int) -> None:
    from gemini_hpc.runtime.processes import die_with_parent

    try:
        die_with_parent(parent)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.close(output)
        faulthandler.register(signal.SIGUSR1, file=sys.__stderr__)
        Rank(line).serve()
    finally:
        traceback.print_exc()
        os._exit(1)


if __name__ == "__main__":
    import logging
    import warnings

    from gemini_hpc.runtime.processes import die_with_parent
    from tests.engine import rank

    logging.disable(logging.INFO)
    warnings.filterwarnings("ignore")
    die_with_parent(int(sys.argv[1]))
    rank.nursery(socket.socket(fileno=int(sys.argv[2])))
