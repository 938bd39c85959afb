"""Pixels and what networks see of them: 0 .. 255 and [-1, 1]. Numpy, on the host."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Shaped, UInt8

from nd_jax.errors import UserError


def to_uint8(video: Shaped[np.ndarray, "*shape"]) -> UInt8[np.ndarray, "*shape"]:
    """[-1, 1] -> 0 .. 255, clipped and truncated (not rounded), as the reference does it. uint8 passes unchanged.

    Raises UserError for NaN and infinity.
    """
    video = np.asarray(video)
    if video.dtype == np.uint8:
        return video
    if not np.isfinite(video).all():
        raise UserError("video: pixels are not finite (NaN or infinity), expected numbers in [-1, 1]")
    scaled = video.astype(np.float32) * np.float32(127.5) + np.float32(127.5)
    return np.clip(scaled, 0, 255).astype(np.uint8)


def round_to_uint8(image: Shaped[np.ndarray, "*shape"]) -> UInt8[np.ndarray, "*shape"]:
    """[-1, 1] -> 0 .. 255, clipped and rounded: how the image networks' pipeline makes pictures.

    Raises UserError for NaN and infinity.
    """
    image = np.asarray(image, np.float32)
    if not np.isfinite(image).all():
        raise UserError("image: pixels are not finite (NaN or infinity), expected numbers in [-1, 1]")
    half = np.float32(0.5)
    return np.rint(np.clip(image * half + half, 0, 1) * np.float32(255)).astype(np.uint8)


def from_uint8(pixels: UInt8[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """0 .. 255 -> [-1, 1], float32."""
    return np.asarray(pixels, np.float32) / np.float32(127.5) - np.float32(1)
