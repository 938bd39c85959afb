"""Numbers from the device to files, without making the device wait."""

from __future__ import annotations

import json
import math
import os
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tensorboardX import SummaryWriter

from nd_jax.errors import UserError
from nd_jax.training.paths import named_leaves


class TrainingDiverged(UserError):
    """A metric became infinite or not a number. ``step`` and ``metric`` say which."""

    def __init__(self, step: int, metric: str, value: float, kept: int | None):
        last = "no checkpoint was written yet" if kept is None else f"the checkpoint of step {kept} is kept"
        super().__init__(
            f"step {step}: metric {metric} is {value}, expected a finite number; {last}; "
            "lower the learning rate or look at the data of this step"
        )
        self.step, self.metric, self.kept = step, metric, kept


def metric_names(metrics: Any) -> list[str]:
    """Names of a (possibly abstract) tree of metrics. Raises ``TypeError`` naming one that is not a scalar."""
    for name, leaf in named_leaves(metrics):
        if leaf.shape != ():
            raise TypeError(f"metric {name} has shape {list(leaf.shape)}, expected a scalar")
    return [name for name, _ in named_leaves(metrics)]


def pack_metrics(metrics: Any) -> jax.Array:
    """All metrics as one float32 vector, in the order of ``metric_names``: one transfer a step instead of many."""
    return jnp.stack([leaf.astype(jnp.float32) for _, leaf in named_leaves(metrics)])


class LaggedMetrics:
    """Metrics of steps still under way. Reading lags ``lag`` steps behind, so the device always has work queued."""

    def __init__(self, names: list[str], lag: int):
        self._names, self._lag = names, lag
        self._waiting: deque[tuple[int, jax.Array]] = deque()

    def push(self, step: int, packed: jax.Array) -> None:
        """Takes the metrics of a step that was just dispatched."""
        packed.copy_to_host_async()
        self._waiting.append((step, packed))

    def ready(self, *, everything: bool = False) -> Iterator[tuple[int, dict[str, float]]]:
        """Metrics of steps older than the lag (or of all), oldest first; waits for those steps to finish."""
        while len(self._waiting) > (0 if everything else self._lag):
            step, packed = self._waiting.popleft()
            yield step, dict(zip(self._names, np.asarray(packed).tolist(), strict=True))


def first_non_finite(metrics: Mapping[str, float]) -> str | None:
    """The name of a metric that is infinite or not a number, or None. Losses come before what follows from them."""
    bad = [name for name, value in metrics.items() if not math.isfinite(value)]
    return min(bad, key=lambda name: (not name.startswith("loss"), name == "loss"), default=None)


class MetricsWriter:
    """``metrics.jsonl`` (one object a line, with ``step``) and TensorBoard events in one folder.

    Opening it for a run that resumes at ``step`` drops lines of later steps, which will be trained again, and a line
    that a killed process left half-written. Safe to call from several threads.
    """

    def __init__(self, folder: Path, step: int = 0):
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "metrics.jsonl"
        self._lock = threading.Lock()
        if self._path.exists():
            kept = "".join(json.dumps(row) + "\n" for row in read_metrics(folder) if row["step"] <= step)
            part = self._path.with_suffix(".jsonl.part")
            part.write_text(kept)
            os.replace(part, self._path)
        self._lines = self._path.open("a", buffering=1)
        self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One line and one event per value."""
        with self._lock:
            self._lines.write(json.dumps({"step": step, **values}) + "\n")
            for name, value in values.items():
                self._events.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes both files."""
        with self._lock:
            self._lines.close()
            self._events.close()


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The rows of ``metrics.jsonl``, oldest first; a half-written last line is left out."""
    rows = []
    for line in (Path(folder) / "metrics.jsonl").read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
