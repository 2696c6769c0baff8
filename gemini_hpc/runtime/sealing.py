"""Seals what the worker has written when the window host does not: no checkpoint can hold what is not sealed."""

import queue
import threading
from collections.abc import Iterator

from gemini_hpc.arena import OWN, Arena, Record, State, checksum


class Sealer:
    """Takes the place of a window host that is not there, or hangs; in a thread, for a checksum takes its time."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[Record, float]] = {}  # half -> what was written there, and since when it waits
        self._thread: threading.Thread | None = None
        self._done: queue.SimpleQueue[tuple[Record, int]] = queue.SimpleQueue()

    def look(self, arena: Arena, now: float, patience_s: float) -> Iterator[tuple[Record, int]]:
        """Begin to seal what has waited for longer; yield (record, half) of what was sealed since the last look."""
        for half in (0, 1):
            record = arena.record(OWN, half)
            if self._seen.get(half, (None, 0.0))[0] != record:
                self._seen[half] = record, now
            waits = record.state is State.WRITTEN and now - self._seen[half][1] > patience_s
            if waits and (self._thread is None or not self._thread.is_alive()):
                self._thread = threading.Thread(target=self._seal, args=(arena, half, record), daemon=True)
                self._thread.start()
        while not self._done.empty():
            yield self._done.get()

    def _seal(self, arena: Arena, half: int, record: Record) -> None:
        sealed = record._replace(state=State.SEALED, checksum=checksum(arena.payload(OWN, half)[: record.nbytes]))
        if arena.record(OWN, half) == record:  # not overwritten meanwhile
            arena.write_record(OWN, half, sealed)
            self._done.put((sealed, half))
