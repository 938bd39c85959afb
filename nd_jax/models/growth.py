"""Upsampling, growth in time and a 3x3 convolution, as the tiny decoder chains them, in one convolution.

Nothing nonlinear lies between the three, so they compose exactly: on a nearest-upsampled picture a 3x3 convolution
sees only 2x2 different pixels, and the 1x1 convolution that makes new frames folds into its weights. That leaves
4/9 of the work and no upsampled intermediate.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def grow(
    x: Float[Array, "b t h w c"],
    frames: Float[Array, "c f*c"],
    kernel: Float[Array, "3 3 c o"],
    space: int,
    time: int,
    dtype,
) -> Float[Array, "b t*f h2 w2 o"]:
    """Nearest upsampling by ``space`` (1 or 2), 1x1 convolution to ``time`` frames, 3x3 convolution padded by 1."""
    b, t, h, w, c = x.shape
    outputs = kernel.shape[-1]
    folded = jnp.einsum("cfi,hwio->hwcfo", frames.reshape(c, time, c), kernel, precision=lax.Precision.HIGHEST)
    if space == 2:
        folded = _pair_rows(_pair_rows(folded).swapaxes(0, 1)).swapaxes(0, 1)  # [2, 2, c, f, o, row, column]
        folded = jnp.moveaxis(folded, 4, -1)
    folded = folded.reshape(*folded.shape[:3], -1).astype(dtype)
    y = lax.conv_general_dilated(
        x.reshape(b * t, h, w, c).astype(dtype),
        folded,
        (1, 1),
        [(1, 1), (1, 1)],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    if space == 2:
        y = y.reshape(b, t, h + 1, w + 1, time, 2, 2, outputs).transpose(0, 1, 4, 2, 5, 3, 6, 7)
        y = y.reshape(b, t * time, 2 * h + 2, 2 * w + 2, outputs)
        return y[:, :, 1:-1, 1:-1]
    y = y.reshape(b, t, h, w, time, outputs)
    return jnp.moveaxis(y, 4, 2).reshape(b, t * time, h, w, outputs)


def _pair_rows(kernel: Float[Array, "3 w ..."]) -> Float[Array, "2 w ... 2"]:
    """Three rows on the upsampled picture as two on the original, for the two output rows that lie between these.

    Between original rows i-1 and i lie the output rows 2i-1, which sees them as (i-1, i-1, i), and 2i: (i-1, i, i).
    """
    upper = jnp.stack([kernel[0] + kernel[1], kernel[2]])
    lower = jnp.stack([kernel[0], kernel[1] + kernel[2]])
    return jnp.stack([upper, lower], axis=-1)
