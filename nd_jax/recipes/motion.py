"""How much a predicted frame moves: what a student loses first when its history is not its own."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nd_jax.pyramid.resample import latent_pyramid


def previous_frame(
    latents: Float[Array, "b u h w c"], unit: Int[Array, " b"], level: int, stages: int
) -> Float[Array, "b 1 h_i w_i c"]:
    """The clean latent frame before each row's ``unit``, at a resolution level; frame 0 before unit 0."""
    index = jnp.maximum(unit - 1, 0).reshape(-1, 1, 1, 1, 1)
    return jnp.take_along_axis(latent_pyramid(latents, stages)[level], index, axis=1)


def motion_ratio(found: Float[Array, ...], truth: Float[Array, ...], unit: Int[Array, ...]) -> Float[Array, ""]:
    """Change from the previous frame in predictions, relative to that in the data, over rows with a history.

    ``found`` and ``truth`` are mean absolute changes by row. 1 moves as much as the data (and is told when no row has
    a history), 0 stands still.
    """
    later = (unit > 0).astype(jnp.float32)
    return (jnp.sum(later * found) + 1e-6) / (jnp.sum(later * truth) + 1e-6)
