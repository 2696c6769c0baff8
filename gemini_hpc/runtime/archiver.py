"""The archiver: moves snapshots between a node's arena and the persistent tier.

A process of its own because a shared file system may hang whoever writes to it (I5): its agent kills it at a
deadline and starts another.
"""

import os
import sys
import time

from gemini_hpc.arena import Arena, Record, State
from gemini_hpc.config import RunConfig
from gemini_hpc.core.codec import Message
from gemini_hpc.core.messages import Copied, Hello, Load, Persist, Persisted, Publish, Published
from gemini_hpc.errors import GeminiError
from gemini_hpc.persist import hdf5, manifest
from gemini_hpc.runtime.channel import Channel
from gemini_hpc.runtime.children import PARENT
from gemini_hpc.runtime.fingerprint import fingerprint
from gemini_hpc.runtime.paths import RunPaths, open_run
from gemini_hpc.runtime.processes import live_for


class Archiver:
    """Carries out one order after the other; every order is answered."""

    def __init__(self, paths: RunPaths, run: RunConfig, node: str) -> None:
        self._paths, self._run, self._node = paths, run, node

    def answer(self, order: Message) -> Message | None:
        start = time.monotonic()
        if isinstance(order, Persist):
            return self._persist(order, start)
        if isinstance(order, Load):
            return self._load(order, start)
        if isinstance(order, Publish):
            return self._publish(order)
        return None

    def _persist(self, order: Persist, start: float) -> Persisted:
        path = manifest.shard_path(self._paths.run_dir, order.step, order.rank)
        nbytes, failure = 0, ""
        try:
            # a copy first: the half may be overwritten while the file system takes its time, and the checksum
            # tells whether it was overwritten during the copy
            arena = Arena.open(self._paths.arena(self._node))
            payload = memoryview(bytearray(arena.payload(order.area, order.half)[: order.nbytes]))
            hdf5.write_shard(path, payload, order.checksum)
            nbytes = path.stat().st_size
        except hdf5.ChecksumError:
            failure = "checksum"
        except (GeminiError, OSError) as error:
            failure = str(error)
        return Persisted(
            self._node,
            order.rank,
            order.step,
            path.name,
            nbytes,
            order.checksum,
            not failure,
            failure,
            time.monotonic() - start,
        )

    def _load(self, order: Load, start: float) -> Copied:
        failure, nbytes = "", 0
        try:
            arena = Arena.open(self._paths.arena(self._node))
            nbytes = arena.geometry.snapshot_bytes
            arena.write_record(order.area, order.half, Record(State.WRITING, order.rank, order.step))
            path = manifest.checkpoint_dir(self._paths.run_dir, order.step) / order.name
            checksum = hdf5.read_shard(path, arena.payload(order.area, order.half))
            if checksum != order.checksum:
                raise GeminiError(f"{path} is not the file that its manifest names")
            sealed = Record(State.SEALED, order.rank, order.step, 0, nbytes, checksum)  # 0: of no generation
            arena.write_record(order.area, order.half, sealed)
        except (GeminiError, OSError) as error:
            failure = str(error)
        return Copied(
            self._node,
            order.generation,
            order.rank,
            order.step,
            "",
            order.area,
            order.half,
            nbytes,
            order.checksum,
            not failure,
            failure,
            time.monotonic() - start,
        )

    def _publish(self, order: Publish) -> Published:
        run_dir = self._paths.run_dir
        try:
            entries = [
                manifest.ShardFile(int(rank), name, nbytes, checksum)
                for rank, (name, nbytes, checksum) in order.files.items()
            ]
            path = manifest.publish(
                run_dir,
                order.step,
                entries,
                world_size=len(entries),
                run_id=self._paths.run_id,
                generation=order.generation,
                fingerprint=fingerprint(self._run),
            )
            manifest.prune(run_dir, self._run.protect.keep)
        except (GeminiError, OSError, ValueError, TypeError) as error:
            return Published(self._node, order.step, "", False, str(error))
        return Published(self._node, order.step, str(path.parent.relative_to(run_dir)), True, "")


def main() -> None:
    run_dir, node = sys.argv[1:]
    live_for(int(os.environ[PARENT]))
    paths, run = open_run(run_dir)
    archiver = Archiver(paths, run, node)
    channel = Channel.connect(paths.socket(node))
    channel.send(Hello(node, "archiver", os.getpid(), 0))
    while (order := channel.receive()) is not None:
        answer = archiver.answer(order)
        if answer is not None:
            channel.send(answer)


if __name__ == "__main__":
    main()
