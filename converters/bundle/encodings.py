"""Scales, zero points and integers of quantised tensors: activations unsigned 16-bit, weights signed 8-bit by channel.

A weight's encoding depends on the weight alone, so that the same weight has the same bytes in every graph.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

LEAST_SCALE = 1e-8
ROOM = 2.0**30 / 65535
"""A channel's scale is at least its bias by this: the bias then fits 32 bits if its input's range is 1 or more."""


class Encoding(NamedTuple):
    """``real = (integer - zero) * scale``. ``scale`` and ``zero`` are arrays, with one axis if given by channel."""

    scale: np.ndarray
    zero: np.ndarray
    axis: int | None = None


def activation_encoding(low: float, high: float, dtype: type = np.uint16) -> Encoding:
    """For values from ``low`` to ``high``; zero is always one of the values that can be told exactly."""
    low, high = min(low, 0.0), max(high, 0.0)
    top = np.iinfo(dtype).max
    scale = np.float32(max((high - low) / top, LEAST_SCALE))
    zero = np.clip(round(-low / float(scale)), 0, top)
    return Encoding(scale.reshape(()), np.array(zero, dtype))


def weight_encoding(
    weight: Float[np.ndarray, "*shape"], axis: int, bias: Float[np.ndarray, " c"] | None = None
) -> Encoding:
    """Symmetric, one scale for every index along ``axis``: the largest magnitude becomes 127.

    A channel that is all bias gets a larger scale, at which its ``bias`` can be told.
    """
    others = tuple(k for k in range(weight.ndim) if k != axis)
    scale = np.abs(weight).max(axis=others).astype(np.float64) / np.iinfo(np.int8).max
    least = np.zeros_like(scale) if bias is None else np.abs(bias) / ROOM
    scale = np.maximum(scale, np.maximum(least, LEAST_SCALE)).astype(np.float32)
    return Encoding(scale, np.zeros(scale.shape, np.int8), axis)


def quantise(x: Float[np.ndarray, "*shape"], encoding: Encoding) -> Int[np.ndarray, "*shape"]:
    """Integers of ``x``, rounded half to even and clipped."""
    scale, zero = encoding.scale.astype(np.float64), encoding.zero.astype(np.float64)
    if encoding.axis is not None:
        shape = [-1 if k == encoding.axis else 1 for k in range(x.ndim)]
        scale, zero = scale.reshape(shape), zero.reshape(shape)
    info = np.iinfo(encoding.zero.dtype)
    low = -info.max if info.min < 0 else 0
    return np.clip(np.rint(x / scale) + zero, low, info.max).astype(encoding.zero.dtype)


def dequantise(q: Int[np.ndarray, "*shape"], encoding: Encoding) -> Float[np.ndarray, "*shape"]:
    """What the integers stand for."""
    scale, zero = encoding.scale, encoding.zero.astype(np.float32)
    if encoding.axis is not None:
        shape = [-1 if k == encoding.axis else 1 for k in range(q.ndim)]
        scale, zero = scale.reshape(shape), zero.reshape(shape)
    return (q.astype(np.float32) - zero) * scale
