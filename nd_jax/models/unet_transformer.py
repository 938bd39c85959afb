"""The attention layers of the UNet: transformer blocks over the pixels of a level, reading the text."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from nd_jax.models.attention import attend
from nd_jax.models.causal_blocks import Linear
from nd_jax.models.causal_conv import uniform_fan_in
from nd_jax.models.image_blocks import GroupNorm
from nd_jax.models.norms import LayerNorm
from nd_jax.models.stacked import scan_stack, stack

NORM_EPS = 1e-6
"""Of the group norm in front of the blocks, whatever the config says."""


class Projection(nnx.Module):
    """``x @ kernel``, without bias."""

    def __init__(self, inputs: int, outputs: int, *, dtype, rngs: nnx.Rngs):
        self.dtype = dtype
        self.kernel = nnx.Param(uniform_fan_in(rngs.params(), (inputs, outputs)))

    def __call__(self, x: Float[Array, "... i"]) -> Float[Array, "... o"]:
        return x.astype(self.dtype) @ self.kernel[...].astype(self.dtype)


class Attention(nnx.Module):
    """Multi-head attention of ``x`` to ``context``; softmax in float32."""

    def __init__(self, channels: int, context: int, heads: int, **kw: Any):
        self.heads = heads
        self.to_q = Projection(channels, channels, **kw)
        self.to_k = Projection(context, channels, **kw)
        self.to_v = Projection(context, channels, **kw)
        self.to_out = Linear(channels, channels, **kw)

    def __call__(self, x: Float[Array, "b q c"], context: Float[Array, "b k d"]) -> Float[Array, "b q c"]:
        query, key, value = (
            projected.reshape(*projected.shape[:2], self.heads, -1)
            for projected in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        return self.to_out(attend(query, key, value, jnp.ones((1, 1, 1), bool)))


class GatedFeedForward(nnx.Module):
    """GEGLU (arXiv 2002.05202) with erf GELU, four times as wide inside."""

    def __init__(self, channels: int, **kw: Any):
        self.up = Linear(channels, 8 * channels, **kw)
        self.down = Linear(4 * channels, channels, **kw)

    def __call__(self, x: Float[Array, "b l c"]) -> Float[Array, "b l c"]:
        value, gate = jnp.split(self.up(x), 2, axis=-1)
        return self.down(value * jax.nn.gelu(gate, approximate=False))


class TransformerBlock(nnx.Module):
    """Pre-norm residual self-attention, attention to the text, and feed-forward."""

    def __init__(self, channels: int, context: int, heads: int, *, dtype, rngs: nnx.Rngs):
        kw = {"dtype": dtype, "rngs": rngs}
        self.norm1, self.norm2, self.norm3 = (LayerNorm(channels, rngs=rngs) for _ in range(3))
        self.attn1 = Attention(channels, channels, heads, **kw)
        self.attn2 = Attention(channels, context, heads, **kw)
        self.ff = GatedFeedForward(channels, **kw)

    def __call__(self, x: Float[Array, "b l c"], text: Float[Array, "b s d"]) -> Float[Array, "b l c"]:
        y = self.norm1(x)
        x = x + self.attn1(y, y)
        x = x + self.attn2(self.norm2(x), text)
        return x + self.ff(self.norm3(x))


class ImageTransformer(nnx.Module):
    """Group norm, linear, ``depth`` transformer blocks on a layer axis, linear; with residual."""

    def __init__(self, channels: int, context: int, heads: int, depth: int, groups: int, *, dtype, rngs: nnx.Rngs):
        kw = {"dtype": dtype, "rngs": rngs}
        self.norm = GroupNorm(groups, channels, NORM_EPS)
        self.proj_in = Linear(channels, channels, **kw)
        self.transformer_blocks = stack(
            lambda keys: TransformerBlock(channels, context, heads, dtype=dtype, rngs=keys), depth, rngs
        )
        self.proj_out = Linear(channels, channels, **kw)

    def __call__(self, x: Float[Array, "b h w c"], text: Float[Array, "b s d"]) -> Float[Array, "b h w c"]:
        tokens = self.proj_in(self.norm(x).reshape(x.shape[0], -1, x.shape[-1]))
        tokens, _ = scan_stack(self.transformer_blocks, lambda block, y: (block(y, text), None), tokens)
        return x + self.proj_out(tokens).reshape(x.shape)
