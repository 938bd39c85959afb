"""Building blocks of the image networks (UNet and image VAE). Images are channels-last, [B, H, W, C]."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from nd_jax.models.causal_blocks import FrameGroupNorm, Linear
from nd_jax.models.causal_conv import uniform_fan_in

QUERIES_AT_ONCE = 2048
"""Rows of scores that one-headed attention over a whole image holds at a time."""


class Conv(nnx.Module):
    """2-D convolution: ``kernel`` [k, k, in, out], ``bias`` [out]. ``pad`` is (before, after), the same on both axes;
    default ``size // 2`` on every side."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        size: int = 3,
        stride: int = 1,
        pad: tuple[int, int] | None = None,
        *,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.stride, self.dtype = stride, dtype
        self.pad = (size // 2, size // 2) if pad is None else pad
        self.kernel = nnx.Param(uniform_fan_in(rngs.params(), (size, size, inputs, outputs)))
        self.bias = nnx.Param(jnp.zeros((outputs,)))

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h2 w2 o"]:
        y = lax.conv_general_dilated(
            x.astype(self.dtype),
            self.kernel[...].astype(self.dtype),
            (self.stride, self.stride),
            [self.pad, self.pad],
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return y + self.bias[...].astype(self.dtype)


class GroupNorm(FrameGroupNorm):
    """Group normalisation of each image, in float32; dtype of the input out."""

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        return super().__call__(x[:, None])[:, 0]


class ResBlock(nnx.Module):
    """norm, SiLU, convolution, twice, around a skip (1x1 convolution where the channel count changes).

    With ``embedding`` channels, a linear map of the conditioning vector's SiLU is added after the first convolution.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        groups: int,
        eps: float,
        embedding: int | None = None,
        *,
        dtype,
        rngs: nnx.Rngs,
    ):
        kw = {"dtype": dtype, "rngs": rngs}
        self.norm1 = GroupNorm(groups, inputs, eps)
        self.conv1 = Conv(inputs, outputs, **kw)
        self.time_emb_proj = None if embedding is None else Linear(embedding, outputs, **kw)
        self.norm2 = GroupNorm(groups, outputs, eps)
        self.conv2 = Conv(outputs, outputs, **kw)
        self.conv_shortcut = Conv(inputs, outputs, 1, **kw) if inputs != outputs else None

    def __call__(
        self, x: Float[Array, "b h w i"], embedding: Float[Array, "b e"] | None = None
    ) -> Float[Array, "b h w o"]:
        y = self.conv1(jax.nn.silu(self.norm1(x)))
        if self.time_emb_proj is not None:
            y = y + self.time_emb_proj(jax.nn.silu(embedding))[:, None, None]
        y = self.conv2(jax.nn.silu(self.norm2(y)))
        return y + (x if self.conv_shortcut is None else self.conv_shortcut(x))


def _nearest(x: Array, size: int, axis: int) -> Array:
    found = x.shape[axis]
    if size % found == 0:
        return x.repeat(size // found, axis=axis)
    return jnp.take(x, jnp.arange(size) * found // size, axis=axis)


class Upsample(nnx.Module):
    """Nearest upsampling to a given size, then a convolution."""

    def __init__(self, channels: int, *, dtype, rngs: nnx.Rngs):
        self.conv = Conv(channels, channels, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"], size: tuple[int, int]) -> Float[Array, "b h2 w2 c"]:
        return self.conv(_nearest(_nearest(x, size[0], 1), size[1], 2))


class Downsample(nnx.Module):
    """Halve height and width with a strided convolution; ``pad`` as ``Conv`` has it."""

    def __init__(self, channels: int, pad: tuple[int, int], *, dtype, rngs: nnx.Rngs):
        self.conv = Conv(channels, channels, stride=2, pad=pad, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        return self.conv(x)


class PixelAttention(nnx.Module):
    """Self-attention among all positions of an image, one head over all channels, with residual.

    Large images take their queries in portions: at 128 x 80 latents all scores together would be 420 MB.
    """

    def __init__(self, channels: int, groups: int, eps: float, *, dtype, rngs: nnx.Rngs):
        kw = {"dtype": dtype, "rngs": rngs}
        self.group_norm = GroupNorm(groups, channels, eps)
        self.to_q, self.to_k, self.to_v = (Linear(channels, channels, **kw) for _ in range(3))
        self.to_out = nnx.List([Linear(channels, channels, **kw)])

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        b, h, w, c = x.shape
        y = self.group_norm(x).reshape(b, h * w, c)
        query, key, value = self.to_q(y), self.to_k(y), self.to_v(y)
        portions = max(1, -(-h * w // QUERIES_AT_ONCE))
        if portions == 1 or (h * w) % portions:
            seen = _attend(query, key=key, value=value)
        else:
            each = jnp.moveaxis(query.reshape(b, portions, -1, c), 1, 0)
            seen = jnp.moveaxis(lax.map(partial(_attend, key=key, value=value), each), 0, 1).reshape(b, h * w, c)
        return x + self.to_out[0](seen).reshape(b, h, w, c)


def _attend(query: Float[Array, "b q c"], key: Float[Array, "b k c"], value: Float[Array, "b k c"]) -> Array:
    at_least = jnp.promote_types(query.dtype, jnp.float32)
    scores = jnp.einsum("bqc,bkc->bqk", query, key, preferred_element_type=at_least)
    weights = jax.nn.softmax(scores * query.shape[-1] ** -0.5, axis=-1).astype(value.dtype)
    return weights @ value
