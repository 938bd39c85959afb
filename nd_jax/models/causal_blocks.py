"""Building blocks of the causal video codecs: per-frame norm, residual block, per-frame attention, resampling."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from nd_jax.models.causal_conv import Carry, CausalConv, uniform_fan_in

EPS = 1e-6


class FrameGroupNorm(nnx.Module):
    """Group normalisation with statistics of each frame by itself, in float32 (in float64 if ``x`` is)."""

    def __init__(self, groups: int, channels: int, eps: float = EPS):
        self.groups, self.eps = groups, eps
        self.scale = nnx.Param(jnp.ones((channels,)))
        self.bias = nnx.Param(jnp.zeros((channels,)))

    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t h w c"]:
        centred = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        centred = centred - self._group_mean(centred)
        deviation = jax.lax.rsqrt(self._group_mean(jnp.square(centred)) + self.eps)
        return (centred * (deviation * self.scale[...]) + self.bias[...]).astype(x.dtype)

    def _group_mean(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t 1 1 c"]:
        """Mean over each frame and group, repeated for the group's channels.

        Positions first, channels after: reducing both at once is 2 to 5 times slower on XLA:CPU, its gradient 8.
        """
        each = x.mean((2, 3), keepdims=True)
        groups = each.reshape(*each.shape[:-1], self.groups, -1)
        return jnp.broadcast_to(groups.mean(-1, keepdims=True), groups.shape).reshape(each.shape)


class ResidualBlock(nnx.Module):
    """norm, SiLU, convolution, twice, around a skip (1x1x1 convolution where the channel count changes)."""

    def __init__(self, inputs: int, outputs: int, groups: int, *, dtype, rngs: nnx.Rngs):
        self.norm1 = FrameGroupNorm(groups, inputs)
        self.conv1 = CausalConv(inputs, outputs, dtype=dtype, rngs=rngs)
        self.norm2 = FrameGroupNorm(groups, outputs)
        self.conv2 = CausalConv(outputs, outputs, dtype=dtype, rngs=rngs)
        self.conv_shortcut = CausalConv(inputs, outputs, 1, dtype=dtype, rngs=rngs) if inputs != outputs else None

    def __call__(self, x: Float[Array, "b t h w c"], carry: Carry) -> Float[Array, "b t h w o"]:
        y = self.conv1(jax.nn.silu(self.norm1(x)), carry)
        y = self.conv2(jax.nn.silu(self.norm2(y)), carry)
        return y + (x if self.conv_shortcut is None else self.conv_shortcut(x, carry))


class Linear(nnx.Module):
    """``x @ kernel + bias``, kernel [in, out]."""

    def __init__(self, inputs: int, outputs: int, *, dtype, rngs: nnx.Rngs):
        self.dtype = dtype
        self.kernel = nnx.Param(uniform_fan_in(rngs.params(), (inputs, outputs)))
        self.bias = nnx.Param(jnp.zeros((outputs,)))

    def __call__(self, x: Float[Array, "... i"]) -> Float[Array, "... o"]:
        return x.astype(self.dtype) @ self.kernel[...].astype(self.dtype) + self.bias[...].astype(self.dtype)


class FrameAttention(nnx.Module):
    """Self-attention among the positions of each frame, one head over all channels, with residual."""

    def __init__(self, channels: int, groups: int, *, dtype, rngs: nnx.Rngs):
        self.group_norm = FrameGroupNorm(groups, channels)
        self.to_q = Linear(channels, channels, dtype=dtype, rngs=rngs)
        self.to_k = Linear(channels, channels, dtype=dtype, rngs=rngs)
        self.to_v = Linear(channels, channels, dtype=dtype, rngs=rngs)
        self.to_out = nnx.List([Linear(channels, channels, dtype=dtype, rngs=rngs)])

    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t h w c"]:
        b, t, h, w, c = x.shape
        y = self.group_norm(x).reshape(b * t, h * w, c)  # one batch axis: with two, XLA:CPU takes three times as long
        scores = jnp.matmul(self.to_q(y), self.to_k(y).swapaxes(1, 2), preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(scores * c**-0.5, axis=-1).astype(y.dtype)
        return x + self.to_out[0](weights @ self.to_v(y)).reshape(b, t, h, w, c)


class MiddleBlock(nnx.Module):
    """Residual block, attention, residual block."""

    def __init__(self, channels: int, groups: int, *, dtype, rngs: nnx.Rngs):
        self.resnets = nnx.List(ResidualBlock(channels, channels, groups, dtype=dtype, rngs=rngs) for _ in range(2))
        self.attentions = nnx.List([FrameAttention(channels, groups, dtype=dtype, rngs=rngs)])

    def __call__(self, x: Float[Array, "b t h w c"], carry: Carry) -> Float[Array, "b t h w c"]:
        return self.resnets[1](self.attentions[0](self.resnets[0](x, carry)), carry)


class Downsample(nnx.Module):
    """Halve height and width (``axis`` "space") or the frames after the first ("time") with a strided convolution."""

    def __init__(self, channels: int, axis: str, *, dtype, rngs: nnx.Rngs):
        strides = (1, 2, 2) if axis == "space" else (2, 1, 1)
        self.conv = CausalConv(channels, channels, strides=strides, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b t h w c"], carry: Carry) -> Float[Array, "b t2 h2 w2 c"]:
        return self.conv(x, carry)


class UpsampleSpace(nnx.Module):
    """Double height and width: convolution to 4x the channels, then (channel, row, column) depth to space."""

    def __init__(self, channels: int, *, dtype, rngs: nnx.Rngs):
        self.conv = CausalConv(channels, 4 * channels, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b t h w c"], carry: Carry) -> Float[Array, "b t h*2 w*2 c"]:
        b, t, h, w, c = x.shape
        y = self.conv(x, carry).reshape(b, t, h, w, c, 2, 2)
        return y.transpose(0, 1, 2, 5, 3, 6, 4).reshape(b, t, 2 * h, 2 * w, c)


class UpsampleTime(nnx.Module):
    """Double the frames: convolution to 2x the channels, then (channel, frame) depth to time.

    With ``drop_first`` the first frame made is dropped, so that 1 + n latent frames become 1 + 2n.
    """

    def __init__(self, channels: int, *, dtype, rngs: nnx.Rngs):
        self.conv = CausalConv(channels, 2 * channels, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b t h w c"], carry: Carry, drop_first: bool) -> Float[Array, "b t2 h w c"]:
        b, t, h, w, c = x.shape
        y = self.conv(x, carry).reshape(b, t, h, w, c, 2)
        y = jnp.moveaxis(y, 5, 2).reshape(b, 2 * t, h, w, c)
        return y[:, 1:] if drop_first else y
