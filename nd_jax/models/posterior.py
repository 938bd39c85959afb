"""The encoder's Gaussian posterior over latents."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float


class Posterior(NamedTuple):
    """Diagonal Gaussian, each [B, T, h, w, C], float32."""

    mean: Float[Array, "b t h w c"]
    logvar: Float[Array, "b t h w c"]

    @property
    def std(self) -> Float[Array, "b t h w c"]:
        return jnp.exp(0.5 * self.logvar)

    def sample(self, noise: Float[Array, "b t h w c"]) -> Float[Array, "b t h w c"]:
        """mean + std * noise; the caller draws the standard normal ``noise``."""
        return self.mean + self.std * noise

    def kl(self) -> Float[Array, " b"]:
        """KL divergence to the standard normal, in nats per latent element, one value for each clip."""
        each = 0.5 * (jnp.square(self.mean) + jnp.exp(self.logvar) - 1.0 - self.logvar)
        return each.mean(axis=(1, 2, 3, 4))


def posterior(moments: Float[Array, "b t h w m"]) -> Posterior:
    """Split moments into mean and log variance (mean first), the latter clamped to [-30, 20]."""
    mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
    return Posterior(mean, jnp.clip(logvar, -30.0, 20.0))
