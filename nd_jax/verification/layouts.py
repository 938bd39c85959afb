"""Between the torch boundary (channels second) and JAX (channels last)."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float


def from_torch(x: Float[Array, "b c *size"]) -> Float[Array, "b *size c"]:
    """NC... to N...C, on the device."""
    return jnp.moveaxis(jnp.asarray(x), 1, -1)


def to_torch(x: Float[Array, "b *size c"]) -> Float[Array, "b c *size"]:
    """N...C to NC...."""
    return jnp.moveaxis(x, -1, 1)
