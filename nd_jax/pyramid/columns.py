"""Columns: how one training batch is split over the stages.

With G columns, rows g, g + G, g + 2G, ... of the batch belong to column g, which trains one stage. The sample tensors
of a column have batch B; text, pooled and timestep tensors stay interleaved with B * G rows, row n = b * G + g.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array

from nd_jax.errors import UserError


def column_stages(sample_ratios: Sequence[int]) -> tuple[int, ...]:
    """Stage of each column, e.g. ratios 1:2:1 -> (0, 1, 1, 2). A ratio of 0 leaves its stage out."""
    if not sample_ratios or any(ratio < 0 or ratio != int(ratio) for ratio in sample_ratios) or not any(sample_ratios):
        raise UserError(
            f"sample ratios: {list(sample_ratios)}, expected one whole number >= 0 per stage and a positive sum"
        )
    return tuple(stage for stage, ratio in enumerate(sample_ratios) for _ in range(int(ratio)))


def column(x: Array, index: int, columns: int) -> Array:
    """Rows of one column, [B * G, ...] -> [B, ...]."""
    return x[index::columns]


def interleave(parts: Sequence[Array]) -> Array:
    """One [B, ...] array per column -> [B * G, ...] in row order; the inverse of taking every ``column``."""
    stacked = jnp.stack(parts, axis=1)
    return stacked.reshape(-1, *stacked.shape[2:])
