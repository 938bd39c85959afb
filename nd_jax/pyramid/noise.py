"""Noise from named seeds, drawn on the host with numpy alone, so that any runtime can draw the same.

Every draw has a name: it does not depend on what else was drawn before it, on the batch it is in, or on the length
of the video.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np

from nd_jax.errors import UserError
from nd_jax.pyramid.layout import Envelope
from nd_jax.pyramid.renoise import block_noise


def named_generator(seed: int, name: str) -> np.random.Generator:
    """A Philox generator whose 128-bit key is the start of SHA-256 of ``seed/name`` (little endian)."""
    if seed != int(seed) or seed < 0:
        raise UserError(f"seed: {seed} is not usable, expected a whole number >= 0")
    digest = hashlib.sha256(f"{int(seed)}/{name}".encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def draw_noise(seed: int, name: str, shape: Sequence[int]) -> np.ndarray:
    """Standard normal noise, float32 of ``shape``."""
    return named_generator(seed, name).standard_normal(tuple(shape), dtype=np.float32)


def draw_initial_noise(
    seed: int, samples: Sequence[int | str], frames: int, height: int, width: int, channels: int
) -> np.ndarray:
    """Initial noise at full resolution, [len(samples), frames, height, width, channels].

    Frame t of sample n is the draw ``n/initial/t``.
    """
    shape = (height, width, channels)
    return np.stack([[draw_noise(seed, f"{n}/initial/{t}", shape) for t in range(frames)] for n in samples])


def block_noise_source(
    seed: int, samples: Sequence[int | str], envelopes: Sequence[Envelope], channels: int, gamma: float
) -> Callable[[int, int], np.ndarray]:
    """Function (unit, stage) -> block noise [len(samples), frames, h, w, channels] for the jump into ``stage``.

    Made from the white draw ``n/block/unit/stage``. The first unit has one frame, later ones ``frames_per_unit``.
    """

    def draw(unit: int, stage: int) -> np.ndarray:
        frames, height, width = envelopes[stage].clips[-1]
        shape = (1 if unit == 0 else frames, height, width, channels)
        white = np.stack([draw_noise(seed, f"{n}/block/{unit}/{stage}", shape) for n in samples])
        return block_noise(white, gamma)

    return draw


def fresh_noise_source(
    seed: int, samples: Sequence[int | str], envelopes: Sequence[Envelope], channels: int
) -> Callable[[int, int, int], np.ndarray]:
    """Function (unit, stage, step) -> white noise [len(samples), frames, h, w, channels], the draw
    ``n/fresh/unit/stage/step``, for plans that renew their noise."""

    def draw(unit: int, stage: int, step: int) -> np.ndarray:
        frames, height, width = envelopes[stage].clips[-1]
        shape = (1 if unit == 0 else frames, height, width, channels)
        return np.stack([draw_noise(seed, f"{n}/fresh/{unit}/{stage}/{step}", shape) for n in samples])

    return draw
