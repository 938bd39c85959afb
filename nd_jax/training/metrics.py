"""Numbers from the device to files, without making the device wait."""

from __future__ import annotations

import json
import math
import os
import re
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nd_jax.errors import UserError
from nd_jax.outputs import new_file
from nd_jax.training.events import ScalarEvents
from nd_jax.training.paths import named_leaves

NORM_OF = "grad_norm_of"
"""Metrics named ``NORM_OF/PART`` are gradient norms of top-level parts of the parameters."""

OPTIMIZER = re.compile(r"(^|/)(grad_norm|learning_rate)")
"""Metrics that follow from the losses."""


class TrainingDiverged(UserError):
    """A metric became infinite or not a number. ``step``, ``metric`` and ``groups`` (of parameters) say which."""

    def __init__(self, step: int, metrics: Mapping[str, float], kept: int | None):
        metric, groups = first_non_finite(metrics), non_finite_groups(metrics)
        assert metric is not None
        what, parts = f"metric {metric}", f"the gradient of {', '.join(groups)}"
        told = "is not finite either" if groups else ""
        if OPTIMIZER.search(metric):
            what, parts, told = parts if groups else what, "every loss", "is finite"
        told = f"{what} is {metrics[metric]}, expected a finite number" + (f"; {parts} {told}" if told else "")
        last = "no checkpoint was written yet" if kept is None else f"the checkpoint of step {kept} is kept"
        super().__init__(f"step {step}: {told}; {last}; lower the learning rate or look at the data of this step")
        self.step, self.metric, self.groups, self.kept = step, metric, groups, kept


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
    """The name of a metric that is infinite or not a number, or None.

    A term of the loss (``flow/stage_1``) comes before the sum (``loss``), and that before what follows from it.
    """

    def rank(name: str) -> tuple:
        follows = OPTIMIZER.search(name) is not None
        return follows, follows and NORM_OF not in name, "/" not in name, name != "loss"

    return min((name for name, value in metrics.items() if not math.isfinite(value)), key=rank, default=None)


def non_finite_groups(metrics: Mapping[str, float]) -> list[str]:
    """The parameter groups whose gradients are not finite."""
    found = [name.rpartition(f"{NORM_OF}/") for name, value in metrics.items() if not math.isfinite(value)]
    return [group for _, match, group in found if match]


class MetricsWriter:
    """``metrics.jsonl`` (one object a line, with ``step``) and TensorBoard events in one folder.

    Opening it for a run that resumes at ``step`` drops lines of later steps, which will be trained again, and a line
    that a killed process left half-written. Safe to call from several threads.
    Raises ``UserError`` for a damaged file, and when the folder cannot be written, e.g. because the disk is full.
    """

    def __init__(self, folder: Path, step: int = 0):
        self._path, self._lock = folder / "metrics.jsonl", threading.Lock()
        with _writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        if self._path.exists():
            kept = "".join(json.dumps(row) + "\n" for row in read_metrics(folder) if row["step"] <= step)
            with new_file(self._path, overwrite=True) as part:
                part.write_text(kept)
        with _writing(folder):
            self._lines = self._path.open("a", buffering=1)
            self._events = ScalarEvents(folder / "tensorboard", step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One line and one event."""
        with self._lock, _writing(self._path.parent):
            self._lines.write(json.dumps({"step": step, **values}) + "\n")
            self._events.add(step, values)

    def flush(self) -> None:
        """Returns when everything so far would survive a power cut, as a checkpoint written next should."""
        with self._lock, _writing(self._path.parent):
            self._lines.flush()
            os.fsync(self._lines.fileno())
            self._events.flush()

    def close(self) -> None:
        """Closes both files. What cannot be written now was told by ``write`` or ``flush``."""
        with self._lock:
            for file in (self._lines, self._events):
                with suppress(OSError):
                    file.close()


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write metrics to {folder} ({error.strerror}); make it writable or free some space, then run the "
            "same command again: it goes on from the last checkpoint"
        ) from error


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The rows of ``metrics.jsonl``, oldest first; a half-written last line is left out.

    Raises ``UserError`` naming any other line that is not an object with a ``step``.
    """
    path = Path(folder) / "metrics.jsonl"
    rows, lines = [], path.read_text(errors="replace").splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            rows.append({**row, "step": int(row["step"])})
        except (ValueError, TypeError, KeyError):
            if number == len(lines):
                break
            raise UserError(f"{path} is damaged in line {number}: expected one JSON object; delete that line") from None
    return rows
