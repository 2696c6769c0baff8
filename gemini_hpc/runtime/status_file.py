"""status.json: what the run is doing, renewed by whoever leads it, read by `submit` and `status`."""

import json
import os
import threading
import time
from typing import Any

from gemini_hpc.runtime.paths import RunPaths
from gemini_hpc.telemetry import keep_files_apart


def write_status(paths: RunPaths, status: dict[str, Any]) -> None:
    """Replace status.json in one move. A full disk must not stop a run: then the old one stays.

    Agents and supervisor may do it at once, each with a file of its own, or one would move what the other has begun.
    """
    temporary = paths.status.with_name(f".{paths.status.name}.{os.uname().nodename}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps({**status, "t": time.time()}, indent=1) + "\n")
        os.replace(temporary, paths.status)
    except OSError:
        return


class StatusThread:
    """Writes the newest status for a loop that must not wait for the file system."""

    def __init__(self, paths: RunPaths) -> None:
        self._paths = paths
        self._newest: dict[str, Any] = {}
        self._changed = threading.Event()
        threading.Thread(target=self._write, daemon=True).start()

    def show(self, status: dict[str, Any]) -> None:
        self._newest = status
        self._changed.set()

    def _write(self) -> None:
        keep_files_apart()
        while self._changed.wait():
            self._changed.clear()
            write_status(self._paths, self._newest)


def update_status(paths: RunPaths, **changes: Any) -> None:
    """Change some of its fields."""
    write_status(paths, {**read_status(paths), **changes})


def read_status(paths: RunPaths) -> dict[str, Any]:
    """Return its fields; none when there is no status yet, or it cannot be read."""
    try:
        status = json.loads(paths.status.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return status if isinstance(status, dict) else {}
