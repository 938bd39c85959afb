"""Counting what XLA compiles."""

from __future__ import annotations

from typing import Any

import jax.monitoring

EVENT = "/jax/core/compile/backend_compile_duration"


class CompileCounter:
    """Context that counts every compilation of this process, reads from a persistent cache included."""

    def __init__(self) -> None:
        self.count = 0
        self.seconds = 0.0

    def __enter__(self) -> CompileCounter:
        jax.monitoring.register_event_duration_secs_listener(self._note)
        return self

    def __exit__(self, *_: Any) -> None:
        jax.monitoring.unregister_event_duration_listener(self._note)

    def _note(self, event: str, duration: float, **_: Any) -> None:
        if event == EVENT:
            self.count += 1
            self.seconds += duration
