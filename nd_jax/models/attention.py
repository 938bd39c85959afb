"""Softmax attention under a boolean mask."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def causal_mask(times: Int[Array, "b l"], segments: Int[Array, "b l"], *, causal: bool = True) -> Bool[Array, "b l l"]:
    """Which key (last axis) a query may read: same segment and, if ``causal``, a time not later than its own.

    Tokens of one frame share a time and see each other; text has time 0, so text and frame 0 see each other. Padding
    has segments of its own and reads itself, so that no row is empty.
    """
    allowed = segments[:, :, None] == segments[:, None, :]
    if causal:
        allowed &= times[:, :, None] >= times[:, None, :]
    return allowed


def attend(
    q: Float[Array, "b q h d"], k: Float[Array, "b k h d"], v: Float[Array, "b k h d"], mask: Bool[Array, "#b q k"]
) -> Float[Array, "b q h*d"]:
    """Attention with scores and softmax in float32, scaled by 1/sqrt(d), heads concatenated in the result."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", q * q.shape[-1] ** -0.5, k, preferred_element_type=jnp.float32)
    scores = jnp.where(mask[:, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(*q.shape[:2], -1)
