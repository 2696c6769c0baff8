"""Makes the arena of a node in a thread: it may take seconds, and the agent's heart must go on beating."""

import threading
from pathlib import Path

from gemini_hpc.arena import Arena, ArenaError, Geometry


class ArenaMaker:
    """Makes it once, for the first worker that there is room for; every later one must fit into it."""

    def __init__(self, path: Path, areas: int, run_id: str) -> None:
        path.unlink(missing_ok=True)  # of this node's life before, if it had one
        self.arena: Arena | None = None
        self.failure = ""
        """Why there is none, or none that fits."""
        self._path, self._areas, self._run_id = path, areas, run_id
        self._thread: threading.Thread | None = None

    def make(self, snapshot_bytes: int) -> None:
        """Begin to allocate and touch it; see `is_busy`."""
        geometry = Geometry(self._areas, snapshot_bytes)
        self.failure = ""
        if self.arena is not None:
            if self.arena.geometry != geometry:
                self.failure = "its snapshots have another size than before"
            return
        self._thread = threading.Thread(target=self._make, args=(geometry,), daemon=True)
        self._thread.start()

    def is_busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _make(self, geometry: Geometry) -> None:
        try:
            self.arena = Arena.create(self._path, geometry, self._run_id)
        except ArenaError as error:
            self.failure = str(error)
