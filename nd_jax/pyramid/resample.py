"""Going between the resolutions of the pyramid: bilinear down, nearest up. Channels last: [..., H, W, C]."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from nd_jax.errors import UserError


def _halve_axis(x: Array, axis: int) -> Array:
    size = x.shape[axis]
    half = size // 2
    if half < 1:
        raise UserError(f"downsampling: size {size} cannot be halved; use fewer stages or a larger picture")
    if size % 2 == 0:
        return jnp.mean(x.reshape(*x.shape[:axis], half, 2, *x.shape[axis + 1 :]), axis=axis + 1)
    # Half-pixel centres without antialiasing: two neighbours at unequal shares.
    centre = (np.arange(half) + 0.5) * (size / half) - 0.5
    low = np.floor(centre).astype(np.int64)
    share = jnp.asarray((centre - low).reshape(-1, *[1] * (x.ndim - 1 - axis)), x.dtype)
    return (1 - share) * jnp.take(x, low, axis=axis) + share * jnp.take(x, low + 1, axis=axis)


def halve(x: Float[Array, "*b h w c"]) -> Float[Array, "*b h//2 w//2 c"]:
    """Bilinear downsampling by 2 (odd sizes: to the floor of the half). Raises ``UserError`` for a size of 1."""
    wide = jnp.asarray(x, jnp.promote_types(x.dtype, jnp.float32))
    return _halve_axis(_halve_axis(wide, x.ndim - 2), x.ndim - 3).astype(x.dtype)


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
