"""What a run tells of itself while it runs: speed, utilisation, waiting, memory, goodput over restarts, and traces."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import jax

from nd_jax.errors import UserError
from nd_jax.outputs import new_file

BEGAN = "began.json"
"""In a run's folder: when it was first started, for goodput."""
GIB = 1 << 30


@dataclass(frozen=True)
class Work:
    """What one step amounts to on all devices together, for rates; whatever is None is not told."""

    tokens: float | None = None
    """Unpadded tokens."""
    videos: float | None = None
    flops: float | None = None
    """Useful operations: no padding, nothing recomputed."""
    peak: float | None = None
    """Operations per second of all devices, for model FLOPs utilisation."""


NO_WORK = Work()


class Clock:
    """Numbers between two log lines. ``waited`` are seconds that the loop waited for data since the last one."""

    def __init__(self, work: Work, folder: Path, productive: float):
        self._work, self._folder = work, folder
        self._since, self._step, self.waited = 0.0, None, 0.0
        self.productive = productive
        """Seconds spent on steps that count, earlier parts of the run included."""
        self._began = first_start(folder)

    def lap(self, step: int) -> dict[str, float]:
        """Numbers since the last call; none the first time, when the clock only starts."""
        now, told = time.monotonic(), {}
        if self._step is not None:
            elapsed, steps = max(now - self._since, 1e-9), step - self._step
            rate = steps / elapsed
            self.productive += elapsed - self.waited
            told = {"steps_per_second": rate, "step_seconds": 1 / max(rate, 1e-9), "data_wait": self.waited / elapsed}
            told |= self._rates(rate)
            told["goodput"] = min(1.0, self.productive / max(time.time() - self._began, 1e-9))
        self._since, self._step, self.waited = now, step, 0.0
        return told | memory()

    def _rates(self, rate: float) -> dict[str, float]:
        work = self._work
        known = {name: getattr(work, name) for name in ("tokens", "videos")}
        told = {f"{name}_per_second": value * rate for name, value in known.items() if value}
        if work.flops and work.peak:
            told["mfu"] = work.flops * rate / work.peak
        return told


def first_start(folder: Path) -> float:
    """When the run in ``folder`` was first started (seconds since 1970); the first process notes it the first time.

    Where that cannot be written or read it is now: the run matters more.
    """
    path = folder / BEGAN
    try:
        if not path.is_file() and jax.process_index() == 0:
            with new_file(path, overwrite=False) as part:
                part.write_text(json.dumps({"began": time.time()}) + "\n")
        return float(json.loads(path.read_text())["began"])
    except (UserError, OSError, ValueError, KeyError, TypeError):
        return time.time()


def memory() -> dict[str, float]:
    """GiB in use at most so far: on this process's fullest device, where the platform tells, and by this process."""
    peaks = [stats.get("peak_bytes_in_use", 0) for d in jax.local_devices() if (stats := d.memory_stats())]
    unit = 1 if sys.platform == "darwin" else 1024
    told = {"host_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB}
    return told | ({"device_gib": max(peaks) / GIB} if peaks else {})


class Tracer:
    """Records steps ``first`` to ``last`` for XProf (``tensorboard --logdir RUN/trace``), if there are any.

    Of several processes every one records its own devices.
    """

    def __init__(self, steps: tuple[int, int] | None, folder: Path):
        if steps is not None and not 0 < steps[0] <= steps[1]:
            raise UserError(f"trace: steps {steps[0]} to {steps[1]}, expected the first and the last one, from 1")
        self._steps, self._folder, self._on = steps, folder / "trace", False

    def before(self, step: int) -> None:
        """Called before step number ``step`` (the first is 1) is started."""
        if self._steps is not None and step == self._steps[0]:
            jax.profiler.start_trace(self._folder)
            self._on = True

    def after(self, step: int, result: jax.Array) -> None:
        """Called after it was started; ends the record when the last one is done."""
        if self._on and step >= self._steps[1]:
            result.block_until_ready()
            self.close()

    def close(self) -> None:
        """Ends a record that is still open."""
        if self._on:
            self._on = False
            jax.profiler.stop_trace()


def use_cache(folder: str | None) -> None:
    """Keeps compiled programs in ``folder``, for restarts and for the other hosts; None leaves JAX's own setting."""
    if folder is not None:
        jax.config.update("jax_compilation_cache_dir", folder)


def productive_seconds(record: Mapping[str, object]) -> float:
    """What a checkpoint's record says of it; 0 in older ones."""
    value = record.get("productive", 0.0)
    return float(value) if isinstance(value, int | float) else 0.0
