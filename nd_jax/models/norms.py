"""Normalisations of the diffusion transformer, all computed in float32.

The backward pass computes them anew from their inputs (``jax.checkpoint``): that is cheaper than writing and reading
the four or five arrays of the input's size that would be kept otherwise.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


def layer_norm(x: Float[Array, "... d"], eps: float) -> Float[Array, "... d"]:
    """Zero mean and unit variance over the last axis, without affine part. float32 out."""
    x = x.astype(jnp.float32)
    x = x - x.mean(axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + eps)


@jax.checkpoint
def modulate(
    x: Float[Array, "b l d"], shift: Float[Array, "b m d"], scale: Float[Array, "b m d"], eps: float = 1e-6
) -> Float[Array, "b l d"]:
    """Layer norm, then ``(1 + scale) x + shift`` (DiT, arXiv 2212.09748, section 3.2). Dtype of ``x``.

    ``shift`` and ``scale`` are given per token (m = l) or once for all of them (m = 1).
    """
    return (layer_norm(x, eps) * (1 + scale.astype(jnp.float32)) + shift.astype(jnp.float32)).astype(x.dtype)


@partial(jax.checkpoint, static_argnums=2)
def _rms_norm(x: Float[Array, "... d"], scale: Float[Array, " d"], eps: float) -> Float[Array, "... d"]:
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + eps) * scale.astype(jnp.float32)


class RMSNorm(nnx.Module):
    """Division by the root mean square over the last axis, then a learned ``scale`` [d]."""

    def __init__(self, features: int, *, eps: float = 1e-5, rngs: nnx.Rngs):
        self.scale = nnx.Param(nnx.initializers.ones(rngs.params(), (features,), jnp.float32))
        self.eps = eps

    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        """float32 out: RoPE follows and stays in float32."""
        return _rms_norm(x, self.scale[...], self.eps)


class LayerNorm(nnx.Module):
    """Layer norm over the last axis with learned ``scale`` and ``bias`` [d]."""

    def __init__(self, features: int, *, eps: float = 1e-5, rngs: nnx.Rngs):
        self.scale = nnx.Param(nnx.initializers.ones(rngs.params(), (features,), jnp.float32))
        self.bias = nnx.Param(nnx.initializers.zeros(rngs.params(), (features,), jnp.float32))
        self.eps = eps

    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        """float32 out."""
        return layer_norm(x, self.eps) * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)


class NoNorm(nnx.Module):
    """Stands where a norm could: no parameters, nothing done."""

    def __init__(self, features: int, *, rngs: nnx.Rngs):
        del features, rngs

    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        """``x``."""
        return x


class AdaLayerNorm(nnx.Module):
    """The conditioning of a norm: ``chunks`` vectors of width ``features``, linear in SiLU of the embedding.

    Six chunks are adaLN-zero's shift, scale, gate for attention, then the same for the MLP; two are
    adaLN-continuous, scale first and then shift. The kernel starts at zero, so a fresh block is the identity.
    """

    def __init__(self, features: int, chunks: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        zeros = nnx.initializers.zeros_init()
        self.linear = nnx.Linear(features, chunks * features, kernel_init=zeros, dtype=dtype, rngs=rngs)
        self.chunks = chunks

    def __call__(self, embedding: Float[Array, "n d"]) -> tuple[Float[Array, "n d"], ...]:
        """The chunks, each [n, d] in the compute dtype."""
        return tuple(jnp.split(self.linear(jax.nn.silu(embedding)), self.chunks, axis=-1))
