"""What happened in a run, as one JSON line per event in RUN_DIR/events/. Standard library only."""

from gemini_hpc.telemetry.events import EventLog, EventThread, keep_files_apart, read_events

__all__ = ["EventLog", "EventThread", "keep_files_apart", "read_events"]
