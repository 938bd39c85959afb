"""The tiny decoder (TAEHV family): 2-D convolutions, one-frame memories and growth in time.

A list of entries, numbered as in the official files: squash, convolution, ReLU; then for each transition between two
levels three memory blocks, space doubling, time doubling and a convolution without bias; at last ReLU and a
convolution to pixels. A latent frame becomes 2 ** (number of time doublings) video frames; the first ones of a clip
are trimmed by the caller.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from nd_jax.models.causal_conv import Carry, Conv2d
from nd_jax.models.codec_config import AsymmetricVAEConfig
from nd_jax.models.growth import grow


class Squash(nnx.Module):
    """3 tanh(x / 3): holds back latents beyond three standard deviations."""

    def __call__(self, x: Array) -> Array:
        return jnp.tanh(x / 3) * 3


class Relu(nnx.Module):
    def __call__(self, x: Array) -> Array:
        return jax.nn.relu(x)


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

    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t h2 w2 c"]:
        return x.repeat(self.factor, axis=2).repeat(self.factor, axis=3)


class GrowTime(nnx.Module):
    """1x1 convolution to ``factor`` frames per frame, channels ordered (frame, channel)."""

    def __init__(self, channels: int, factor: int, *, dtype, rngs: nnx.Rngs):
        self.factor = factor
        self.conv = Conv2d(channels, factor * channels, 1, bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t2 h w c"]:
        b, t, h, w, c = x.shape
        y = self.conv(x).reshape(b, t, h, w, self.factor, c)
        return jnp.moveaxis(y, 4, 2).reshape(b, t * self.factor, h, w, c)


class TAEHVDecoder(nnx.Module):
    """Latents [B, T, h, w, C] to frames [B, 8T, 8h, 8w, 3], untrimmed (official scales)."""

    def __init__(self, config: AsymmetricVAEConfig, *, dtype=jnp.float32, rngs: nnx.Rngs):
        kw = {"dtype": dtype, "rngs": rngs}
        widths = config.decoder_num_features
        entries: list[nnx.Module] = [Squash(), Conv2d(config.encoder_out_channels, widths[0], **kw), Relu()]
        steps = zip(config.decoder_space_upscale, config.decoder_time_upscale, strict=True)
        for i, (space, time) in enumerate(steps):
            entries += [Memory(widths[i], **kw) for _ in range(3)]
            entries += [GrowSpace(2 if space else 1), GrowTime(widths[i], 2 if time else 1, **kw)]
            entries += [Conv2d(widths[i], widths[i + 1], bias=False, **kw)]
        entries += [Relu(), Conv2d(widths[-1], config.encoder_in_channels, **kw)]
        self.blocks = nnx.List(entries)

    def __call__(self, latent: Float[Array, "b t h w c"]) -> Float[Array, "b t2 h2 w2 3"]:
        """A whole clip, all its frames at once."""
        x = self._enter(latent)
        for level in range(self._levels()):
            x = self._level(level, x, Carry())
        return self._leave(x)

    def entries(self, latent: Float[Array, "b t h w c"]) -> list[Array]:
        """The output of every entry for a whole clip, entry by entry as the official decoder runs them."""
        outputs, carry = [latent], Carry()
        for block in self.blocks:
            x = outputs[-1]
            outputs.append(block(x, carry) if isinstance(block, Memory) else block(x))
        return outputs[1:]

    def stream(
        self, latent: Float[Array, "b t h w c"], memory: tuple[Array, ...]
    ) -> tuple[Float[Array, "b t2 h2 w2 3"], tuple[Array, ...]]:
        """The next latent frames of a clip and what to remember of them, equal to the whole clip's.

        ``memory`` comes from the call before, or is ``start`` for a clip's first frames. Every level works on one
        of its frames at a time, so that memory stays small: that is one latent frame's worth at the widest level.
        """
        return self._stream(0, self._enter(latent), memory)

    def start(self, batch: int, height: int, width: int, dtype=jnp.float32) -> tuple[Array, ...]:
        """The memory at the start of a clip of ``height`` x ``width`` latents: a frame of zeros for each block."""
        memory = []
        for block in self.blocks:
            if isinstance(block, Memory):
                channels = block.conv["4"].kernel.shape[-1]
                memory.append(jnp.zeros((batch, 1, height, width, channels), dtype))
            if isinstance(block, GrowSpace):
                height, width = height * block.factor, width * block.factor
        return tuple(memory)

    def _levels(self) -> int:
        return (len(self.blocks) - 5) // 6

    def _enter(self, x: Array) -> Array:
        squash, conv, relu = self.blocks[:3]
        return relu(conv(squash(x)))

    def _level(self, level: int, x: Array, carry: Carry) -> Array:
        *memories, space, time, conv = self.blocks[3 + 6 * level : 9 + 6 * level]
        for block in memories:
            x = block(x, carry)
        return grow(x, time.conv.kernel[...][0, 0], conv.kernel[...], space.factor, time.factor, conv.dtype)

    def _leave(self, x: Array) -> Array:
        relu, conv = self.blocks[-2:]
        return conv(relu(x))

    def _stream(self, level: int, x: Array, memory: tuple[Array, ...]) -> tuple[Array, tuple[Array, ...]]:
        """Frames of one level to video, one at a time through this level and all after it."""

        def one(memory: tuple[Array, ...], frame: Array) -> tuple[tuple[Array, ...], Array]:
            if level == self._levels():
                return memory, self._leave(frame[:, None])
            carry = Carry(memory[:3])
            grown = self._level(level, frame[:, None], carry)
            video, later = self._stream(level + 1, grown, memory[3:])
            return (*carry.frames, *later), video

        memory, videos = jax.lax.scan(one, memory, jnp.moveaxis(x, 1, 0))
        frames, batch, each = videos.shape[:3]
        return jnp.moveaxis(videos, 0, 1).reshape(batch, frames * each, *videos.shape[3:]), memory
