"""Where tokens are: sin-cos tables in space, rotary embedding in time.

Spatial positions are a fixed table, not a parameter: the first half of the channels encodes the column, the second
half the row, each sine half first. It is separable, so only one table per axis is ever made inside a program.
"""

from __future__ import annotations

import numpy as np


def axis_table(channels: int, grid: int, base_size: int) -> np.ndarray:
    """Sin-cos table of one axis, float64 [grid, channels]: positions ``i * base_size / grid``, sine half first."""
    positions = np.arange(grid, dtype=np.float32) / np.float32(grid / base_size)
    frequencies = 10000.0 ** -(np.arange(channels // 2, dtype=np.float64) / (channels / 2))
    angles = positions.astype(np.float64)[:, None] * frequencies
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def table(width: int, grid: int, base_size: int) -> np.ndarray:
    """The whole table as official checkpoints store it: float32 [1, grid*grid, width], row index = y * grid + x."""
    axis = axis_table(width // 2, grid, base_size).astype(np.float32)
    columns = np.broadcast_to(axis[None], (grid, grid, width // 2))
    rows = np.broadcast_to(axis[:, None], (grid, grid, width // 2))
    return np.concatenate([columns, rows], axis=-1).reshape(1, grid * grid, width)
