"""The tiny decoder (TAEHV family): 2-D convolutions, one-frame memories and growth in time.

A list of entries, numbered as in the official files: squash, convolution, ReLU; then for each of three transitions
three memory blocks, space doubling, time doubling and a convolution without bias; at last ReLU and a convolution to
pixels. Each latent frame becomes 2 ** (number of time doublings) video frames; the first ones of a clip are trimmed.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from nd_jax.models.causal_conv import Carry, Conv2d
from nd_jax.models.codec_config import AsymmetricVAEConfig


class Squash(nnx.Module):
    """3 tanh(x / 3): latents beyond three standard deviations are held back."""

    def __call__(self, x: Array, carry: Carry) -> Array:
        return jnp.tanh(x / 3) * 3


class Relu(nnx.Module):
    def __call__(self, x: Array, carry: Carry) -> Array:
        return jax.nn.relu(x)


class Conv(Conv2d):
    def __call__(self, x: Array, carry: Carry) -> Array:
        return super().__call__(x)


class Memory(nnx.Module):
    """Residual block that sees each frame beside the one before it (zeros before the first)."""

    def __init__(self, channels: int, *, dtype, rngs: nnx.Rngs):
        inputs = {"0": 2 * channels, "2": channels, "4": channels}
        self.conv = nnx.Dict({name: Conv2d(n, channels, dtype=dtype, rngs=rngs) for name, n in inputs.items()})

    def __call__(self, x: Float[Array, "b t h w c"], carry: Carry) -> Float[Array, "b t h w c"]:
        past = carry.past()
        carry.keep(past, x, 1)
        first = jnp.zeros_like(x[:, :1]) if past is None else past.astype(x.dtype)
        before = jnp.concatenate([first, x[:, :-1]], axis=1)
        y = jax.nn.relu(self.conv["0"](jnp.concatenate([x, before], axis=-1)))
        y = self.conv["4"](jax.nn.relu(self.conv["2"](y)))
        return jax.nn.relu(x + y)


class GrowSpace(nnx.Module):
    """Nearest upsampling of height and width by ``factor``."""

    def __init__(self, factor: int):
        self.factor = factor

    def __call__(self, x: Float[Array, "b t h w c"], carry: Carry) -> Float[Array, "b t h2 w2 c"]:
        return x.repeat(self.factor, axis=2).repeat(self.factor, axis=3)


class GrowTime(nnx.Module):
    """1x1 convolution to ``factor`` frames per frame, channels ordered (frame, channel)."""

    def __init__(self, channels: int, factor: int, *, dtype, rngs: nnx.Rngs):
        self.factor = factor
        self.conv = Conv2d(channels, factor * channels, 1, bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b t h w c"], carry: Carry) -> Float[Array, "b t2 h w c"]:
        b, t, h, w, c = x.shape
        y = self.conv(x).reshape(b, t, h, w, self.factor, c)
        return jnp.moveaxis(y, 4, 2).reshape(b, t * self.factor, h, w, c)


class TAEHVDecoder(nnx.Module):
    """Latents [B, T, h, w, C] to frames [B, 8T, 8h, 8w, 3], untrimmed (official scales)."""

    def __init__(self, config: AsymmetricVAEConfig, *, dtype=jnp.float32, rngs: nnx.Rngs):
        kw = {"dtype": dtype, "rngs": rngs}
        widths = config.decoder_num_features
        entries: list[nnx.Module] = [Squash(), Conv(config.encoder_out_channels, widths[0], **kw), Relu()]
        steps = zip(config.decoder_space_upscale, config.decoder_time_upscale, strict=True)
        for i, (space, time) in enumerate(steps):
            entries += [Memory(widths[i], **kw) for _ in range(3)]
            entries += [GrowSpace(2 if space else 1), GrowTime(widths[i], 2 if time else 1, **kw)]
            entries += [Conv(widths[i], widths[i + 1], bias=False, **kw)]
        entries += [Relu(), Conv(widths[-1], config.encoder_in_channels, **kw)]
        self.blocks = nnx.List(entries)

    def __call__(
        self, latent: Float[Array, "b t h w c"], carry: Carry, activations: dict[str, Array] | None = None
    ) -> Float[Array, "b t2 h2 w2 3"]:
        """``activations``, if given, is filled with the output of every entry, keys "00" onwards."""
        x = latent
        for i, block in enumerate(self.blocks):
            x = block(x, carry)
            if activations is not None:
                activations[f"{i:02d}"] = x
        return x
