"""Softmax attention under a boolean mask."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

SEEN = "attention_seen"
"""Name of what a kernel's backward pass needs of its forward pass, for remat policies."""
IN_CACHE = 2**20
"""Scores (all samples and heads) up to which a CPU computes all heads at once."""


class Placed(NamedTuple):
    """Tokens of an attention sequence: their places, known before compiling, and their segments, which are data."""

    places: Int[np.ndarray, "l 2"]
    """Group and time."""
    segments: Int[Array, "b l"]

    def __add__(self, other: Placed) -> Placed:
        """One behind the other."""
        places = np.concatenate([self.places, other.places])
        return Placed(places, jnp.concatenate([self.segments, other.segments], axis=1))


def causal_mask(times: Int[Array, "b l"], segments: Int[Array, "b l"], *, causal: bool = True) -> Bool[Array, "b l l"]:
    """Which key (last axis) a query may read: same segment and, if ``causal``, a time not later than its own.

    Tokens of one frame share a time and see each other; text has time 0, so text and frame 0 see each other. Padding
    has segments of its own and reads itself, so that no row is empty.
    """
    allowed = segments[:, :, None] == segments[:, None, :]
    if causal:
        allowed &= times[:, :, None] >= times[:, None, :]
    return allowed


def _softmax_product(
    q: Float[Array, "b q d"], k: Float[Array, "b k d"], v: Float[Array, "b k d"], mask: Bool[Array, "#b q k"]
) -> Float[Array, "b q d"]:
    """One head. The division by the softmax's sum comes last, where it is cheapest."""
    scores = jnp.einsum("bqd,bkd->bqk", q, k, preferred_element_type=jnp.float32)
    scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    total = weights.sum(axis=-1, keepdims=True)
    seen = jnp.einsum("bqk,bkd->bqd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return (seen / total).astype(v.dtype)


def _together(q, k, v, mask):
    return jax.vmap(_softmax_product, in_axes=(0, 0, 0, None))(q, k, v, mask)


def _one_by_one(q, k, v, mask):
    return jax.lax.map(lambda head: jax.checkpoint(_softmax_product)(*head, mask), (q, k, v))


@jax.checkpoint
def attend(
    q: Float[Array, "b q h d"], k: Float[Array, "b k h d"], v: Float[Array, "b k h d"], mask: Bool[Array, "#b q k"]
) -> Float[Array, "b q h*d"]:
    """Attention with scores and softmax in float32, scaled by 1/sqrt(d), heads concatenated in the result.

    The backward pass computes the weights anew instead of keeping them. On a CPU long sequences go head by head, so
    that the scores stay in its cache; that is three times faster there and needs a tenth of the memory.
    """
    q = q * q.shape[-1] ** -0.5
    heads = [jnp.moveaxis(x, 2, 0) for x in (q, k, v)]
    small = q.shape[0] * q.shape[2] * q.shape[1] * k.shape[1] <= IN_CACHE
    on_cpu = _together if small else _one_by_one
    out = jax.lax.platform_dependent(*heads, mask, cpu=on_cpu, default=_together)
    return jnp.moveaxis(out, 0, 2).reshape(*q.shape[:2], -1)
