"""Clips on a clock: when a file's frames are shown, and which of them are nearest to the ticks of another rate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int, UInt8

from nd_jax.data.clips import Limits, decode, fit
from nd_jax.errors import UserError


@dataclass(frozen=True)
class Timeline:
    """Seconds from the first frame at which each frame begins, when the last one ends, and (height, width)."""

    times: Float[np.ndarray, " n"]
    end: float
    size: tuple[int, int]


def read_timeline(path: Path, limits: Limits) -> Timeline:
    """Decode the whole file, keeping its clock only: what does not decode is found out here.

    Raises UserError, ``video: PATH ...``, for a file that is broken, beyond the limits, without a clock, or of several
    frame sizes.
    """
    times, lengths, size = [], [], None
    for frame in decode(path, limits, wanted=lambda index: False):
        if size is not None and frame.size != size:
            raise UserError(f"video: {path} changes its frame size after {len(times)} frames, expected one size")
        size = frame.size
        if frame.time is None:
            raise UserError(f"video: {path} does not say when its frames are shown")
        times.append(frame.time)
        lengths.append(frame.duration)
    clock = np.asarray(times) - times[0]
    steps = np.diff(clock)
    if (steps < 0).any():
        raise UserError(f"video: {path} has frames whose times go backwards")
    last = lengths[-1] or (float(np.median(steps)) if len(steps) else 0.0)
    return Timeline(clock, float(clock[-1] + last), size)


def resample(times: Float[np.ndarray, " n"], end: float, fps: float) -> Int[np.ndarray, " m"]:
    """Index of the frame nearest in time to each tick 0, 1/fps, 2/fps, ... before ``end``; the later one of a tie."""
    ticks = np.arange(max(1, int(np.floor(end * fps + 1e-6)))) / fps
    between = (times[1:] + times[:-1]) / 2
    return np.searchsorted(between, ticks + 1e-9, side="right")


def window_starts(count: int, frames: int, most: int) -> list[int]:
    """Up to ``most`` windows of ``frames`` ticks that do not overlap, what is left over spread evenly around them."""
    windows = min(most, count // frames)
    slack = count - windows * frames
    return [k * frames + round(slack * (k + 1) / (windows + 1)) for k in range(windows)]


def read_picks(
    path: Path, picks: Sequence[Sequence[int]], size: tuple[int, int], limits: Limits
) -> UInt8[np.ndarray, "windows t h w 3"]:
    """Windows of a file's frames by index (repeats allowed), covering ``size``, the overhang cut evenly.

    Raises UserError as `decode`, and for a file that ends before the last index.
    """
    needed = {index for window in picks for index in window}
    last, found = max(needed), {}
    for index, frame in enumerate(decode(path, limits, wanted=needed.__contains__)):
        if frame.image is not None:
            found[index] = fit(frame.image, size, None)
        if index == last:
            return np.stack([np.stack([found[index] for index in window]) for window in picks])
    raise UserError(f"video: {path} has fewer frames than before: it was changed while it was read")
