"""TensorBoard event files, written by whoever calls: tensorboardX's own threads hang on a full disk."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

FLUSH_SECONDS = 30.0
"""Between two moments at which readers see what is new."""


class ScalarEvents:
    """One event file of this part of a run. TensorBoard forgets what earlier parts wrote for steps after ``step``.

    Every method may raise ``OSError``.
    """

    def __init__(self, folder: Path, step: int):
        folder.mkdir(parents=True, exist_ok=True)
        # Part of the name, since two parts of a run may begin in the same second.
        self._writer = EventsWriter(str(folder / "events"), f".{time.time_ns()}")
        start = SessionLog(status=SessionLog.START)
        self._writer.write_event(Event(wall_time=time.time(), step=step + 1, session_log=start))
        self._flushed = time.monotonic()

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """One event with all values."""
        summary = Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in values.items()])
        self._writer.write_event(Event(wall_time=time.time(), step=step, summary=summary))
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Everything so far is on the disk."""
        self._writer.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        """Flushes and closes."""
        self._writer.close()
