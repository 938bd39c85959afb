"""Tiles in space for clips too large to code at once. Tiling changes the result: norms and attention see tiles only."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float


def tiled(
    run: Callable[[Float[Array, "b t h w c"]], Float[Array, "b t2 h2 w2 o"]],
    x: Float[Array, "b t h w c"],
    tile: int,
    tile_out: int,
    overlap: float = 0.25,
) -> Float[Array, "b t2 h3 w3 o"]:
    """Run ``run`` on overlapping square tiles of side ``tile`` (giving ``tile_out``) and cross-fade them linearly.

    Rows go top to bottom, columns left to right; a tile is faded into its upper and then its left neighbour as these
    came out of their own fading.
    """
    step, fade = int(tile * (1 - overlap)), int(tile_out * overlap)
    keep = tile_out - fade
    above: list[Array] = []
    bands = []
    for top in range(0, x.shape[2], step):
        row: list[Array] = []
        for column, left in enumerate(range(0, x.shape[3], step)):
            y = run(x[:, :, top : top + tile, left : left + tile])
            if above:
                y = _fade(above[column], y, fade, axis=2)
            if row:
                y = _fade(row[-1], y, fade, axis=3)
            row.append(y)
        bands.append(jnp.concatenate([y[:, :, :keep, :keep] for y in row], axis=3))
        above = row
    return jnp.concatenate(bands, axis=2)


def _fade(before: Array, after: Array, extent: int, axis: int) -> Array:
    """``after`` with its first ``extent`` rows (columns) ramping over from the last ones of ``before``."""
    extent = min(extent, before.shape[axis], after.shape[axis])
    ramp = (jnp.arange(extent, dtype=after.dtype) / max(extent, 1)).reshape([-1] + [1] * (after.ndim - 1 - axis))
    old = jnp.take(before, jnp.arange(before.shape[axis] - extent, before.shape[axis]), axis=axis)
    new, rest = jnp.split(after, [extent], axis=axis)
    return jnp.concatenate([old * (1 - ramp) + new * ramp, rest], axis=axis)
