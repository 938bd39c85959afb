"""Where tokens are: sin-cos tables in space, rotary embedding in time.

Spatial positions are a fixed table, not a parameter: the first half of the channels encodes the column, the second
half the row, each sine half first. It is separable, and so is bilinear resizing, so that a program only ever holds
one small table per axis.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from nd_jax.errors import UserError


def axis_table(channels: int, grid: int, base_size: int) -> Float[np.ndarray, "grid channels"]:
    """Sin-cos table of one axis in float64: positions ``i * base_size / grid``, sine half first."""
    positions = np.arange(grid, dtype=np.float32) / np.float32(grid / base_size)
    frequencies = 10000.0 ** -(np.arange(channels // 2, dtype=np.float64) / (channels / 2))
    angles = positions.astype(np.float64)[:, None] * frequencies
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def table(width: int, grid: int, base_size: int) -> Float[np.ndarray, "1 grid*grid width"]:
    """The whole table as official checkpoints store it, float32; row ``y * grid + x``."""
    axis = axis_table(width // 2, grid, base_size).astype(np.float32)
    columns = np.broadcast_to(axis[None], (grid, grid, width // 2))
    rows = np.broadcast_to(axis[:, None], (grid, grid, width // 2))
    return np.concatenate([columns, rows], axis=-1).reshape(1, grid * grid, width)


def resize_axis(rows: Float[np.ndarray, "n c"], size: int) -> Float[np.ndarray, "size c"]:
    """Bilinear resizing of one axis with half-pixel centres and no antialiasing."""
    source = np.maximum((np.arange(size) + 0.5) * (len(rows) / size) - 0.5, 0.0)
    low = source.astype(np.int64)
    high = np.minimum(low + 1, len(rows) - 1)
    part = (source - low)[:, None]
    return rows[low] * (1 - part) + rows[high] * part


def axis_positions(
    channels: int, grid: int, base_size: int, size: int, target: int
) -> Float[np.ndarray, "size channels"]:
    """Positions of ``size`` patches along one axis of a clip, float32.

    The centred crop of ``target`` patches (the current clip's size) is taken out of the table and, where the clip
    has another size, resized to it.
    """
    if target > grid:
        raise UserError(
            f"position table: the current clip has {target} patches along one axis, the table only {grid}; "
            "use smaller latents or a network with a larger pos_embed_max_size"
        )
    start = (grid - target) // 2
    rows = axis_table(channels, grid, base_size)[start : start + target].astype(np.float32)
    return rows if size == target else resize_axis(rows, size).astype(np.float32)


def spatial_positions(
    width: int, grid: int, base_size: int, size: tuple[int, int], target: tuple[int, int]
) -> Float[Array, "h w width"]:
    """Position embedding of a clip of ``size`` (rows, columns, in patches) while a clip of ``target`` is current.

    Pass ``target = size`` for the crop at the clip's own size (``interp_condition_pos`` false).
    """
    rows, columns = (
        jnp.asarray(axis_positions(width // 2, grid, base_size, *pair)) for pair in zip(size, target, strict=True)
    )
    half = (*size, width // 2)
    return jnp.concatenate([jnp.broadcast_to(columns[None], half), jnp.broadcast_to(rows[:, None], half)], axis=-1)


def rope_tables(
    times: Int[Array, "b l"], head_dim: int, theta: float = 10000.0
) -> tuple[Float[Array, "b l half"], Float[Array, "b l half"]]:
    """Cosines and sines of ``time * theta^(-2i / head_dim)``, float32 and right to its rounding for times below 4096.

    Each frequency is split in a 12-bit head, whose product with a time is exact, and a small rest.
    """
    frequencies = theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    unit = 2.0 ** (np.floor(np.log2(frequencies)) - 11)
    heads = np.floor(frequencies / unit) * unit
    t = times.astype(jnp.float32)[..., None]
    a, b = t * heads.astype(np.float32), t * (frequencies - heads).astype(np.float32)
    return jnp.cos(a) * jnp.cos(b) - jnp.sin(a) * jnp.sin(b), jnp.sin(a) * jnp.cos(b) + jnp.cos(a) * jnp.sin(b)


def apply_rope(
    x: Float[Array, "b l h d"], cosines: Float[Array, "b l 1 half"], sines: Float[Array, "b l 1 half"]
) -> Float[Array, "b l h d"]:
    """Rotate adjacent channel pairs (2i, 2i+1) by their angles; float32 out."""
    return jax.lax.platform_dependent(x.astype(jnp.float32), cosines, sines, tpu=_by_product, default=_by_pairs)


def _by_pairs(x: Array, cosines: Array, sines: Array) -> Array:
    pairs = x.reshape(*x.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    return jnp.stack([even * cosines - odd * sines, even * sines + odd * cosines], axis=-1).reshape(x.shape)


def _by_product(x: Array, cosines: Array, sines: Array) -> Array:
    """Neighbours change places in a product with a small matrix of zeros, ones and minus ones: pairs as an axis of
    their own would fill a TPU's lanes with two values each. HIGH keeps 16 bits of every value."""
    channels = np.arange(x.shape[-1])
    matrix = np.zeros((len(channels),) * 2, np.float32)
    matrix[channels ^ 1, channels] = np.where(channels % 2, 1, -1)
    partners = jnp.matmul(x, matrix, precision=jax.lax.Precision.HIGH)
    return x * jnp.repeat(cosines, 2, axis=-1) + partners * jnp.repeat(sines, 2, axis=-1)
