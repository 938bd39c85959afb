"""Noise from named seeds, the same numbers as everywhere in nd-jax: a draw depends on nothing but its name."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


def draw(seed: int, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal float32 from a Philox generator keyed with the start of SHA-256 of ``seed/name``."""
    key = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:16], "little")
    return np.random.Generator(np.random.Philox(key=key)).standard_normal(shape, dtype=np.float32)


def block_noise(white: np.ndarray, gamma: float) -> np.ndarray:
    """Noise of covariance (1 + gamma) I - gamma 1 1^T within 2x2 blocks, from white noise [h, w, C]."""
    h, w, c = white.shape
    blocks = white.reshape(h // 2, 2, w // 2, 2, c)
    mean = blocks.mean(axis=(1, 3), keepdims=True)
    out = math.sqrt(1 + gamma) * (blocks - mean) + math.sqrt(max(0.0, 1 - 3 * gamma)) * mean
    return out.reshape(white.shape)


@dataclass(frozen=True)
class Noise:
    """All random numbers of one video: initial noise [U, h, w, C] at full size; functions of (unit, stage) and (unit,
    stage, step) to [h, w, C] at the stage's size; the noise [h, w, C] of a given first frame's posterior."""

    initial: np.ndarray
    block: Callable[[int, int], np.ndarray]
    fresh: Callable[[int, int, int], np.ndarray]
    first: np.ndarray


def named_noise(
    seed: int, sample: int | str, frames: int, sizes: list[tuple[int, int]], channels: int, gamma: float
) -> Noise:
    """Noise of sample ``sample`` of a seed; ``sizes`` are the latent's at every stage, lowest first."""

    def at(stage: int) -> tuple[int, int, int]:
        return (*sizes[stage], channels)

    return Noise(
        np.stack([draw(seed, f"{sample}/initial/{t}", at(-1)) for t in range(frames)]),
        lambda unit, stage: block_noise(draw(seed, f"{sample}/block/{unit}/{stage}", (1, *at(stage)))[0], gamma),
        lambda unit, stage, step: draw(seed, f"{sample}/fresh/{unit}/{stage}/{step}", (1, *at(stage)))[0],
        draw(seed, f"{sample}/first", (1, *at(-1)))[0],
    )
