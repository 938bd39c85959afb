"""What the host tells the denoiser's graphs about one call: when tokens happened and which of them are padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def token_times(
    stage: Mapping[str, Any], unit: int, text_mask: np.ndarray, patch: int
) -> tuple[np.ndarray, np.ndarray]:
    """Times [L] of text (0) and image tokens while ``unit`` is current, and whether each is real (not padding)."""
    times, real = [np.zeros(len(text_mask), np.int64)], [text_mask > 0]
    slots = [*stage["slots"], [None, 0, 0]]  # the current clip: no units back
    for (frames, height, width), (_, oldest, _) in zip(stage["clips"], slots, strict=True):
        tokens = (height // patch) * (width // patch)
        clip = (unit - oldest + np.arange(frames)).repeat(tokens)
        times.append(np.maximum(clip, 0))
        real.append(clip >= 0)
    return np.concatenate(times), np.concatenate(real)


def biases(
    groups: Sequence[Mapping[str, Any]], times: np.ndarray, real: np.ndarray, *, causal: bool, masked: float
) -> dict[str, np.ndarray]:
    """The bias inputs [rows, keys]: 0 for keys that a query may read, ``masked`` for others."""
    found = {}
    for group in groups:
        start, rows, keys = group["start"], group["rows"], group["keys"]
        allowed = np.broadcast_to(real[:keys], (rows, keys))
        if causal:
            allowed = allowed & (times[:keys] <= times[start : start + rows, None])
        found[group["bias"]] = np.where(allowed, 0, masked).astype(np.float32)
    return found


def rotary(times: np.ndarray, channels: int, theta: float) -> dict[str, np.ndarray]:
    """Tables [L, 1, channels / 2] of the tokens' times, computed in float64."""
    angles = times[:, None] * theta ** -(np.arange(0, channels, 2) / channels)
    return {name: f(angles)[:, None].astype(np.float32) for name, f in (("cosines", np.cos), ("sines", np.sin))}


def sinusoid(timestep: float, channels: int) -> np.ndarray:
    """Embedding [1, channels] of a timestep, cosine half first, with float32 angles as in training."""
    half = channels // 2
    frequencies = np.exp(np.float32(-np.log(10000.0)) * np.arange(half, dtype=np.float32) / np.float32(half))
    angles = np.float32(timestep) * frequencies.astype(np.float32)
    return np.concatenate([np.cos(angles), np.sin(angles)])[None].astype(np.float32)


def history(
    stage: Mapping[str, Any], finished: Sequence[Sequence[np.ndarray]], unit: int, channels: int
) -> list[np.ndarray]:
    """The history's clips [t, h, w, C], oldest first, from finished frames by level and time; zeros where none is."""
    clips = []
    for (frames, height, width), (level, oldest, _) in zip(stage["clips"], stage["slots"], strict=False):
        clip = np.zeros((frames, height, width, channels), np.float32)
        for k in range(frames):
            if unit - oldest + k >= 0:
                clip[k] = finished[level][unit - oldest + k]
        clips.append(clip)
    return clips
