"""What enters the diffusion transformer besides tokens: patches, timesteps and the pooled text."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

TIMESTEP_CHANNELS = 256


def sinusoid(timestep: Float[Array, " n"], channels: int = TIMESTEP_CHANNELS) -> Float[Array, "n channels"]:
    """Sinusoidal embedding, cosine half first, frequencies 10000^(-i / (channels/2)), always float32.

    Timesteps are used as they are (0 to 1000), so near 1000 float32 angles are off by about 4e-5.
    """
    half = channels // 2
    frequencies = jnp.exp(-math.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = timestep.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class Embedder(nnx.Module):
    """Linear, SiLU, linear, in float32."""

    def __init__(self, inputs: int, features: int, *, rngs: nnx.Rngs):
        init = nnx.initializers.normal(0.02)
        self.linear_1 = nnx.Linear(inputs, features, kernel_init=init, dtype=jnp.float32, rngs=rngs)
        self.linear_2 = nnx.Linear(features, features, kernel_init=init, dtype=jnp.float32, rngs=rngs)

    def __call__(self, x: Float[Array, "n i"]) -> Float[Array, "n d"]:
        """[n, inputs] to [n, features]."""
        return self.linear_2(jax.nn.silu(self.linear_1(x)))


class TimeTextEmbed(nnx.Module):
    """The conditioning vector: embedded timestep plus embedded pooled text, float32."""

    def __init__(self, pooled: int, features: int, *, rngs: nnx.Rngs):
        self.timestep_embedder = Embedder(TIMESTEP_CHANNELS, features, rngs=rngs)
        self.text_embedder = Embedder(pooled, features, rngs=rngs)

    def __call__(self, timestep: Float[Array, " n"], pooled: Float[Array, "n p"]) -> Float[Array, "n d"]:
        """Timesteps in 0 to 1000 and pooled text embeddings to [n, features]."""
        return self.timestep_embedder(sinusoid(timestep)) + self.text_embedder(pooled.astype(jnp.float32))


class PatchEmbed(nnx.Module):
    """Non-overlapping patches of each frame to tokens: a strided convolution written as one matrix product."""

    def __init__(self, channels: int, features: int, patch_size: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        size = (patch_size, patch_size)
        init = nnx.initializers.xavier_uniform(in_axis=(0, 1, 2), out_axis=3)
        self.proj = nnx.Conv(
            channels, features, size, strides=size, padding="VALID", kernel_init=init, dtype=dtype, rngs=rngs
        )
        self.patch_size = patch_size
        self.dtype = dtype

    def __call__(self, x: Float[Array, "b t hp wp c"]) -> Float[Array, "b t h w d"]:
        """Latents [B, T, H, W, C] to patches [B, T, H/p, W/p, D]."""
        b, t, height, width, c = x.shape
        p = self.patch_size
        x = x.astype(self.dtype).reshape(b, t, height // p, p, width // p, p, c).transpose(0, 1, 2, 4, 3, 5, 6)
        kernel = self.proj.kernel[...].astype(self.dtype).reshape(p * p * c, -1)
        return x.reshape(b, t, height // p, width // p, p * p * c) @ kernel + self.proj.bias[...].astype(self.dtype)
