"""Stopping politely: SIGTERM and Ctrl-C end a run after the step under way, with a checkpoint."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType

import numpy as np
from jax.experimental import multihost_utils

SIGNALS = (signal.SIGINT, signal.SIGTERM)
AGREE_EVERY = 8
"""Steps between the moments at which several processes agree on whether to stop."""


class Interruption:
    """Context in which the first signal only sets ``name``; a second one raises ``KeyboardInterrupt``.

    Python runs handlers between its own instructions: during a compilation, signals of one kind count as one, and are
    noticed when it is over. Outside the main thread Python allows no handlers, and signals keep their usual meaning.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._previous: dict = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.name is not None:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name


def agreed(reason: str | None, step: int) -> str | None:
    """One decision for all processes, asked for now and then: a process alone cannot stop."""
    if step % AGREE_EVERY:
        return None
    reasons = [None, "seconds", "SIGINT", "SIGTERM"]
    votes = multihost_utils.process_allgather(np.int32(reasons.index(reason)))
    return reasons[int(np.max(votes))]
