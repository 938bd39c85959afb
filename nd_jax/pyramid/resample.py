"""Going between the resolutions of the pyramid: bilinear down, nearest up. Channels last: [..., H, W, C]."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from nd_jax.errors import UserError


def _neighbours(x: Array, axis: int) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """The two inputs of every output along ``axis``, and their shares: half-pixel centres, no antialiasing."""
    size = x.shape[axis]
    half = size // 2
    if half < 1:
        raise UserError(f"downsampling: size {size} cannot be halved; use fewer stages or a larger picture")
    if size % 2 == 0:
        pairs = x.reshape(*x.shape[:axis], half, 2, *x.shape[axis + 1 :])
        return tuple(jax.lax.index_in_dim(pairs, i, axis + 1, False) for i in (0, 1)), (
            np.float32(0.5),
            np.float32(0.5),
        )
    centre = (np.arange(half) + 0.5) * (size / half) - 0.5
    low = np.floor(centre).astype(np.int64)
    share = (centre - low).astype(np.float32).reshape(-1, *[1] * (x.ndim - 1 - axis))
    return tuple(jnp.take(x, low + i, axis=axis) for i in (0, 1)), (1 - share, share)


def halve(x: Float[Array, "*b h w c"]) -> Float[Array, "*b h//2 w//2 c"]:
    """Bilinear downsampling by 2 (odd sizes: to the floor of the half). Raises ``UserError`` for a size of 1."""
    wide = jnp.asarray(x, jnp.promote_types(x.dtype, jnp.float32))
    out = 0.0  # the four terms in this order round as the reference does
    for row, row_share in zip(*_neighbours(wide, x.ndim - 3), strict=True):
        for part, share in zip(*_neighbours(row, x.ndim - 2), strict=True):
            out += row_share * share * part
    return out.astype(x.dtype)


def halve_noise(x: Float[Array, "*b h w c"]) -> Float[Array, "*b h//2 w//2 c"]:
    """Bilinear downsampling times 2, which keeps white noise at unit variance."""
    return halve(x) * 2


def double(x: Float[Array, "*b h w c"]) -> Float[Array, "*b 2*h 2*w c"]:
    """Nearest-neighbour upsampling by 2."""
    return jnp.repeat(jnp.repeat(x, 2, axis=-3), 2, axis=-2)


def latent_pyramid(latents: Float[Array, "*b h w c"], stages: int) -> list[Float[Array, "*b _ _ c"]]:
    """The latents at every resolution, lowest first; the last entry is ``latents`` itself."""
    levels = [latents]
    for _ in range(stages - 1):
        levels.insert(0, halve(levels[0]))
    return levels


def noise_at_level(noise: Float[Array, "*b h w c"], level: int, stages: int) -> Float[Array, "*b _ _ c"]:
    """Noise drawn at full resolution, brought down to ``level`` (0 = lowest) with unit variance."""
    for _ in range(stages - 1 - level):
        noise = halve_noise(noise)
    return noise
