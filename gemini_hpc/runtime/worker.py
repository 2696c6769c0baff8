"""The worker: trains one rank. Begins as a spare, with an engine but no peers, and joins what it is told to join."""

import logging
import os
import queue
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from math import inf, isfinite, nan

logging.disable(logging.INFO)  # the libraries' chatter; errors still reach the log
warnings.filterwarnings("ignore", category=FutureWarning)

from gemini_hpc import versions  # noqa: E402
from gemini_hpc.arena import OWN, Arena, Record, State, checksum  # noqa: E402
from gemini_hpc.config import RunConfig  # noqa: E402
from gemini_hpc.core.codec import Message  # noqa: E402
from gemini_hpc.core.messages import (  # noqa: E402
    Abort,
    Damaged,
    Hello,
    Join,
    Parked,
    Profiled,
    Resumed,
    Stepped,
    Trouble,
    WorkerLost,
    WorkerReady,
    Written,
)
from gemini_hpc.core.types import FRESH  # noqa: E402
from gemini_hpc.engine import builder, reset  # noqa: E402
from gemini_hpc.engine.capture import Place  # noqa: E402
from gemini_hpc.engine.elastic import Agreement, ElasticWorld, is_peer_failure  # noqa: E402
from gemini_hpc.engine.training import not_finite, train_step  # noqa: E402
from gemini_hpc.errors import GeminiError, UserError  # noqa: E402
from gemini_hpc.runtime.channel import Channel  # noqa: E402
from gemini_hpc.runtime.children import PARENT, carry_output  # noqa: E402
from gemini_hpc.runtime.drills import Drills  # noqa: E402
from gemini_hpc.runtime.paths import RunPaths, open_run  # noqa: E402
from gemini_hpc.runtime.processes import live_for  # noqa: E402

NOT_FINITE = "not_finite"
"""Folder of the run: a file for each step and generation in which a number was not finite."""

ALLOW_NAN = "set train.allow_nan=true to train on regardless"

NICENESS = 5
"""Training yields to the agents and window hosts: they need little, and soon."""

LATE_S = 2.0
"""A step that is to be safe before the next one, and is not after so long, is reported all the same."""


class NotFinite(GeminiError):
    """A loss or a gradient is NaN or infinite: the step must not count."""


class Diverges(GeminiError):
    """A number was not finite again when the step was repeated."""


class OthersNotFinite(GeminiError):
    """The gradients are not finite, but this rank's own loss is."""


class SnapshotDamaged(GeminiError):
    """The snapshot to restore is not what was sealed."""


class Worker:
    """One training process."""

    def __init__(self, paths: RunPaths, run: RunConfig, node: str, channel: Channel) -> None:
        self._paths, self._run, self._node = paths, run, node
        self._drills = Drills(paths, run, node)
        self._inbox: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._restarted = os.environ["GEMINI_RESTARTED"] == "1"
        self._generation = 0  # whose group is held; 0 = none
        self._last_snapshot: int | None = None
        self._arena: Arena | None = None
        self._places: list[Place] = []  # of the next snapshots: the halves of the own area
        rank = int(os.environ["GEMINI_RANK"])
        self._channel = channel
        builder.prepare(run.train.threads)
        self._entry = builder.load_entry(run.train.entry)
        self._world = ElasticWorld(rank, run.cluster.nodes, os.environ["GEMINI_ADDRESS"], run.recovery.collective_s)
        threading.Thread(target=self._listen, daemon=True).start()
        self._built = builder.build(self._entry, run, rank)
        address = self._world.open_store()
        self._channel.send(WorkerReady(node, rank, self._built.shard.nbytes, address))

    def serve(self) -> None:
        """Join generation after generation, until the agent ends this process."""
        while (order := self._inbox.get()) is not None:
            if isinstance(order, Join):
                self._take_part(order)
            elif isinstance(order, Abort) and order.generation == self._generation:  # all steps were done
                self._park()

    def _listen(self) -> None:
        """The control thread: an abort must reach a main thread that is stuck in a collective."""
        while True:
            order = self._channel.receive()
            if order is None:
                os._exit(0)  # the agent is gone
            if isinstance(order, Abort):
                self._world.abort(order.generation)
            self._inbox.put(order)

    # --- one generation -----------------------------------------------------------------------------

    def _take_part(self, join: Join) -> None:
        self._generation = join.generation
        try:
            self._enter(join)
            self._train(join)
            return
        except Exception as error:
            if isinstance(error, SnapshotDamaged):
                self._channel.send(Damaged(self._node, join.generation, join.rank, join.step))
            elif self._world.has_ended(join.generation) or is_peer_failure(error) or isinstance(error, OthersNotFinite):
                self._channel.send(Trouble(self._node, join.generation, _in_a_line(error)))
            else:
                raise
        self._park()  # now that the error, and what it held of the group, is gone

    def _park(self) -> None:
        """Leave the group, and hold a fresh store for the next."""
        self._world.leave()
        address = self._world.open_store()
        self._channel.send(Parked(self._node, self._generation, address))
        self._generation = 0

    def _enter(self, join: Join) -> None:
        """Become `join.rank` in a new group, with the state after `join.step`."""
        start = time.monotonic()
        if self._arena is None:
            self._arena = arena = Arena.open(self._paths.arena(self._node))
            self._world.traffic.attach(lambda until: setattr(arena, "idle_until", until))
        if join.step != FRESH:
            self._verify(self._arena, join)
        rung = self._prepare_engine(join)
        self._places = [self._built.shard.place(self._arena.payload(OWN, half)) for half in (0, 1)]
        ready = time.monotonic()
        self._world.join(join.generation, join.rank, join.store)
        joined = time.monotonic()
        if join.step == FRESH:
            self._last_snapshot = None
            loss = nan
            self._snapshot(0, loss, join, self._vote(wait=False), wait=False)
        else:
            self._built.fresh = False  # however this ends
            loss = self._built.shard.restore(self._arena.payload(OWN, join.half)).state["loss"]
            self._last_snapshot = join.step
        self._built.fresh = False
        self._channel.send(
            Resumed(
                self._node,
                join.generation,
                join.rank,
                max(join.step, 0),
                loss,
                rung,
                joined - ready,
                ready - start,
                time.monotonic() - joined,
            )
        )

    def _verify(self, arena: Arena, join: Join) -> None:
        """Hold the snapshot against its checksum: what was sealed long ago may have been damaged since."""
        held = arena.record(OWN, join.half)
        if (held.state, held.rank, held.step) != (State.SEALED, join.rank, join.step):
            raise SnapshotDamaged(f"half {join.half} holds {held}, not rank {join.rank} of step {join.step}")
        if checksum(arena.payload(OWN, join.half)[: held.nbytes]) != held.checksum:
            arena.write_record(OWN, join.half, Record())
            raise SnapshotDamaged(f"the snapshot of rank {join.rank}, step {join.step} has another checksum by now")

    def _prepare_engine(self, join: Join) -> str:
        """Bring the engine to a step boundary as the new rank, by the first rung that may be used; name it."""
        built = self._built
        swap = self._run.recovery.first_rung == "hot_swap" and not versions.mismatch()
        if built.fresh and built.rank == join.rank and (join.step == FRESH or not swap):
            rung = "fresh" if join.step == FRESH else "restart" if self._restarted else "rebuild"
            self._restarted = False
            return rung
        if join.step != FRESH and swap:
            try:
                if not built.fresh:
                    reset.reset(built.engine)
                reset.adopt(built.engine, join.rank)
                self._world.leave(join.rank)
                rung = "restart" if self._restarted else "hot_swap"
                self._restarted = False
                return rung
            except (AttributeError, KeyError, TypeError):
                traceback.print_exc()  # DeepSpeed's inside is not what it should be: build a new one
        self._world.leave(join.rank)
        builder.destroy(built)
        self._built = builder.build(self._entry, self._run, join.rank)
        return "rebuild"

    def _train(self, join: Join) -> None:
        total, seed = self._run.train.steps, self._run.train.seed
        for step in range(max(join.step, 0) + 1, total + 1):
            start = time.monotonic()
            self._drills.arm(step, join.rank, self._built.engine)
            self._tell_profile(join.rank, step - 1)
            blocking = self._run.protect.mode == "blocking"
            wait = step == total or blocking
            due = wait or step % self._run.protect.snapshot_every == 0
            agreement = Agreement(partial(self._vote, wait))
            agree = agreement.vote if due else lambda: None
            loss = train_step(self._built.engine, self._built.training, seed, step, join.rank, agree)
            if not self._run.train.allow_nan:
                self._refuse_not_finite(loss, step, join)
            snapshot_s = self._snapshot(step, loss, join, agreement.reached, wait) if due else -1.0
            if blocking:
                self._wait_until_safe(LATE_S)
            step_s = time.monotonic() - start
            self._channel.send(Stepped(self._node, join.generation, join.rank, step, loss, step_s, snapshot_s))
            if blocking:  # where replication fails the coordinator has a checkpoint written: that is safe, too
                self._wait_until_safe(inf)
            self._drills.strike_at("after", step, join.rank)

    def _tell_profile(self, rank: int, done: int) -> None:
        """The next step begins, `done` is over."""
        made = self._world.traffic.begin_step()
        if made is not None:
            profile, stamps = made
            found = (profile.step_s, profile.idle_s, profile.spread, profile.spans_s)
            self._channel.send(Profiled(self._node, rank, done, *found, tuple(stamps)))

    def _refuse_not_finite(self, loss: float, step: int, join: Join) -> None:
        """Take back a step with a number that is not finite: no snapshot of it may ever be restored.

        It may be the fault of a machine. So the rank whose loss it is makes way for a fresh process, the others
        park, and the step is done again; when that ends in the same way, it is the training that diverges.
        """
        what = not_finite(self._built.engine, loss)
        if not what:
            return
        where = f"{what} in step {step} (rank {join.rank})"
        if self._was_before(step, join.generation):
            raise Diverges(f"the training diverges: {where}, and again when the step was repeated; {ALLOW_NAN}")
        if isfinite(loss):
            raise OthersNotFinite(where)
        raise NotFinite(f"{where}; the step is taken back")

    def _was_before(self, step: int, generation: int) -> bool:
        """Leave a mark that outlives this process; whether the step was taken back in an earlier generation."""
        marks = self._paths.run_dir / NOT_FINITE
        marks.mkdir(exist_ok=True)
        (marks / f"step-{step}-generation-{generation}").touch()
        return any(int(mark.name.rpartition("-")[2]) < generation for mark in marks.glob(f"step-{step}-*"))

    # --- snapshots ----------------------------------------------------------------------------------

    def _vote(self, wait: bool) -> Callable[[], bool]:
        """Begin to find out whether all ranks can take a snapshot (all ranks).

        Called before the last backward pass, which hides the time it takes, and again before the update if somebody
        said no. A snapshot is of use when the one before it is safe everywhere. Where replication is slower than
        training that is not so in every step, and then snapshots get rarer; all ranks must leave out the same ones, so
        they vote.
        """
        assert self._arena is not None
        return self._world.vote(wait or self._is_safe(self._arena))

    def _snapshot(self, step: int, loss: float, join: Join, all_can: Callable[[], bool], wait: bool) -> float:
        """Copy the shard into the free half of the own area; return the seconds it cost, -1 if it was left out.

        With `wait` training first waits, a bounded time, until the one before is safe, and nothing is left out.
        """
        arena = self._arena
        assert arena is not None
        shard = self._built.shard
        if not all_can():
            return -1.0
        if wait:
            self._wait_until_safe(self._run.recovery.join_s)
        start = time.monotonic()
        moment = shard.gather(step, loss)
        half = self._free_half(arena)
        arena.write_record(OWN, half, Record(State.WRITING, join.rank, step, join.generation))
        shard.capture(self._places[half], moment)
        self._drills.strike_at("snapshot", step, join.rank)
        written = Record(State.WRITTEN, join.rank, step, join.generation, shard.nbytes)
        arena.write_record(OWN, half, written)
        taken_s = time.monotonic() - start
        self._channel.send(Written(self._node, half))
        self._drills.strike_in_replication(step, join.rank, arena, half)
        self._last_snapshot = step
        return taken_s

    def _wait_until_safe(self, for_s: float) -> None:
        """Wait until the newest snapshot is safe, at most for so long, or until this generation is over."""
        arena = self._arena
        assert arena is not None
        deadline = time.monotonic() + for_s
        while not self._is_safe(arena) and time.monotonic() < deadline:
            if self._world.has_ended(self._generation):
                raise RuntimeError("the group was aborted")
            time.sleep(0.001)

    def _is_safe(self, arena: Arena) -> bool:
        return self._last_snapshot is None or arena.safe_step >= self._last_snapshot

    def _free_half(self, arena: Arena) -> int:
        """Return the half that does not hold the newest safe step; or, while none is known, what was restored."""
        keep = arena.safe_step if arena.safe_step >= 0 else self._last_snapshot
        return 1 if arena.record(OWN, 0).step == keep else 0


def _in_a_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:300]}" if text else type(error).__name__


def main() -> None:
    run_dir, node = sys.argv[1:]
    live_for(int(os.environ[PARENT]))
    carry_output()  # a training that prints goes on while its log cannot be written
    os.nice(NICENESS)
    paths, run = open_run(run_dir)
    channel = Channel.connect(paths.socket(node))
    channel.send(Hello(node, "worker", os.getpid(), 0))
    try:
        Worker(paths, run, node, channel).serve()
    except BaseException as error:  # noqa: BLE001  the outermost loop
        words = f"{_in_a_line(error)}; see {paths.logs}/worker-{node}.log"
        channel.send(WorkerLost(node, words, isinstance(error, (Diverges, UserError))))
        traceback.print_exc()
        os._exit(1)  # no interpreter shutdown: threads of gloo may hang in it


if __name__ == "__main__":
    main()
