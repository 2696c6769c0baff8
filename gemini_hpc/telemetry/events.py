"""The event log: every node appends to its own file, and whoever asks reads them all.

An event is {"t": unix seconds, "node": who wrote it, "kind": what happened, ...}. Python's floats survive
JSON to the last bit, so a loss in the log is the loss itself.
"""

import ctypes
import json
import os
import queue
import threading
import time
from math import isfinite
from pathlib import Path
from typing import Any


class EventLog:
    """Append events to RUN_DIR/events/NODE.jsonl (mode 0600)."""

    def __init__(self, run_dir: Path, node: str) -> None:
        """Open the file of `node`, creating it where needed. Raises OSError."""
        self.node = node
        self.lost = 0
        """Events that could not be written, as on a full disk: the log must not be able to stop a run."""
        directory = run_dir / "events"
        directory.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        self._descriptor = os.open(directory / f"{node}.jsonl", flags, 0o600)
        size = os.fstat(self._descriptor).st_size
        # the writer before us may have been killed in the middle of a line
        self._torn = size > 0 and os.pread(self._descriptor, 1, size - 1) != b"\n"

    def emit(self, kind: str, **fields: Any) -> None:
        """Append one event in a single write, so that lines of several writers do not mix.

        `fields` are JSON types; a field `t` replaces the time of the call. Blocks on the file system. Counts
        in `lost` what cannot be written, and raises only for fields that JSON does not know (TypeError).
        """
        event = {"t": time.time(), "node": self.node, "kind": kind, **fields}
        line = b"\n" * self._torn + json.dumps(event, separators=(",", ":")).encode() + b"\n"
        try:
            written = os.write(self._descriptor, line)
        except OSError:
            self.lost += 1
            return
        self._torn = written < len(line)
        self.lost += self._torn

    def close(self) -> None:
        os.close(self._descriptor)


_libc = ctypes.CDLL(None, use_errno=True)
_CLOSE_RANGE = 436
"""The system call, since Linux 5.9, on every architecture."""
_CLOSE_RANGE_UNSHARE = 2


def keep_files_apart() -> None:
    """Give the calling thread a table of open files of its own, in which there are only 0, 1 and 2.

    For a thread that works on a shared file system, of a process that starts others. Those get a copy of the table of
    whichever thread starts them, and close it. Where the file system hangs, so does closing a file of it; and with the
    child its whole starter, as Python forks holding its lock (vfork). An older kernel leaves the table shared.
    """
    _libc.syscall(_CLOSE_RANGE, ctypes.c_uint(3), ctypes.c_uint(0xFFFFFFFF), ctypes.c_uint(_CLOSE_RANGE_UNSHARE))


class EventThread:
    """An event log for a loop that must not wait for the file system: a thread writes, in the same order."""

    def __init__(self, run_dir: Path, node: str) -> None:
        """Open the file of `node`. Raises OSError."""
        self._run_dir, self._node = run_dir, node
        self._opened: queue.SimpleQueue[OSError | None] = queue.SimpleQueue()
        self._queue: queue.SimpleQueue[tuple[str, dict[str, Any]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write, daemon=True)
        self._thread.start()
        if (error := self._opened.get()) is not None:
            raise error

    def emit(self, kind: str, **fields: Any) -> None:
        """Queue one event, with the time of this call."""
        self._queue.put((kind, {"t": time.time(), **fields}))

    def close(self, timeout_s: float) -> None:
        """Write what is queued; wait for it at most `timeout_s` seconds."""
        self._queue.put(None)
        self._thread.join(timeout_s)

    def _write(self) -> None:
        keep_files_apart()
        try:
            log = EventLog(self._run_dir, self._node)
        except OSError as error:
            self._opened.put(error)
            return
        self._opened.put(None)
        while (event := self._queue.get()) is not None:
            kind, fields = event
            log.emit(kind, **fields)


def read_events(run_dir: Path) -> list[dict[str, Any]]:
    """Return the events of all nodes, sorted by time; none when there is no log yet.

    May be called while they are being written: a line that is not complete is left out.
    """
    events = []
    for path in sorted((run_dir / "events").glob("*.jsonl")):
        for line in _content(path).split(b"\n"):
            event = _parse(line)
            if event is not None:
                events.append(event)
    return sorted(events, key=lambda event: float(event["t"]))


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""  # the other nodes' logs say what they can


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        event = json.loads(line)
        known = isfinite(event["t"]) and isinstance(event["kind"], str)
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
    return event if known and isinstance(event, dict) else None
