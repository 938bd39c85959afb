"""Arithmetic of the pyramid on single frames [h, w, C], float32: between resolutions, steps and statistics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def halve(x: np.ndarray) -> np.ndarray:
    """Bilinear downsampling by 2 of [..., h, w, C], h and w even: the mean of every 2x2 block."""
    out = np.float32(0)
    for row in (x[..., 0::2, :, :], x[..., 1::2, :, :]):
        for part in (row[..., 0::2, :], row[..., 1::2, :]):
            out = out + np.float32(0.25) * part
    return out


def double(x: np.ndarray) -> np.ndarray:
    """Nearest upsampling by 2."""
    return x.repeat(2, axis=-3).repeat(2, axis=-2)


def levels(x: np.ndarray, stages: int) -> list[np.ndarray]:
    """``x`` at every resolution, lowest first."""
    found = [x]
    for _ in range(stages - 1):
        found.insert(0, halve(found[0]))
    return found


def lowest_noise(noise: np.ndarray, stages: int) -> np.ndarray:
    """Noise at full size brought down to the lowest resolution at unit variance."""
    for _ in range(stages - 1):
        noise = halve(noise) * np.float32(2)
    return noise


def steps(stage: Mapping[str, Any], n: int, grid: str) -> list[tuple[np.float32, np.float32, np.float32]]:
    """(timestep, local noise, next local noise) of ``n`` steps of a stage of the manifest.

    "official": even from 1 to the last entry of the table, then 0. "plain": even from 1 to 0.
    """
    first, last, end, sigma = (stage["timesteps"][key] for key in ("first", "last", "end", "sigma_last"))
    if grid == "official":
        timesteps, local = np.linspace(first, last, n), np.append(np.linspace(1.0, sigma, n), 0.0)
    else:
        local = np.linspace(1, 0, n + 1)
        timesteps = end + local[:-1] * (first - end)
    t, s = timesteps.astype(np.float32), local.astype(np.float32)
    return list(zip(t, s[:-1], s[1:], strict=True))


def jump(z: np.ndarray, noise: np.ndarray, stage: Mapping[str, Any]) -> np.ndarray:
    """From the end of the stage before to the start of this one."""
    alpha, beta = (np.float32(x) for x in stage["jump"])
    return alpha * double(z) + beta * noise


def euler(z: np.ndarray, velocity: np.ndarray, s: np.float32, s_next: np.float32) -> np.ndarray:
    """``z + (s_next - s) v``."""
    return z + np.float32(s_next - s) * velocity


def renew(
    z: np.ndarray,
    velocity: np.ndarray,
    noise: np.ndarray,
    s: np.float32,
    s_next: np.float32,
    stage: Mapping[str, Any],
    *,
    lowest: bool,
    top: bool,
) -> np.ndarray:
    """A step of a few-step student: its clean prediction, put back on the stage's flow with fresh noise."""
    start, end, excess = (np.float32(stage[key]) for key in ("start_sigma", "end_sigma", "excess"))
    one = np.float32(1)
    sigma = s * start + (one - s) * end
    clean = z - sigma / np.float32(stage["start_sigma"] - stage["end_sigma"]) * velocity
    if excess:
        clean = (clean + excess * double(halve(clean))) / (one + excess)
    y_start = noise if lowest else start * noise + (one - start) * double(halve(clean))
    y_end = clean if top else end * noise + (one - end) * clean
    return s_next * y_start + (one - s_next) * y_end


class Statistics:
    """Shift and scale of a codec's latents, one pair for frame 0 and one for all others."""

    def __init__(self, latent: Mapping[str, Any]):
        self._pairs = [
            tuple(np.broadcast_to(np.asarray(latent[prefix + key], np.float32), latent["channels"])
                  for key in ("shift", "scale"))
            for prefix in ("", "video_")
        ]  # fmt: skip

    def normalise(self, latent: np.ndarray, frame: int) -> np.ndarray:
        """Codec latent [h, w, C] of a frame to what the denoiser sees."""
        shift, scale = self._pairs[min(frame, 1)]
        return (latent - shift) * scale

    def denormalise(self, latent: np.ndarray, frame: int) -> np.ndarray:
        """The inverse."""
        shift, scale = self._pairs[min(frame, 1)]
        return latent / scale + shift


def to_patches(clips: Sequence[np.ndarray], patch: int) -> np.ndarray:
    """Clips [t, h, w, C] as rows of (row in patch, column in patch, channel), clip after clip."""
    rows = []
    for clip in clips:
        t, h, w, c = clip.shape
        cut = clip.reshape(t, h // patch, patch, w // patch, patch, c).transpose(0, 1, 3, 2, 4, 5)
        rows.append(cut.reshape(-1, patch * patch * c))
    return np.concatenate(rows)


def from_patches(rows: np.ndarray, height: int, width: int, patch: int) -> np.ndarray:
    """One frame [h, w, C] from its rows."""
    cut = rows.reshape(height // patch, width // patch, patch, patch, -1).transpose(0, 2, 1, 3, 4)
    return cut.reshape(height, width, -1)
