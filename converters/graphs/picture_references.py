"""What the JAX networks of the first frame and of super-resolution answer; see ``references``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nd_jax.converters.graphs.references import Arrays, Sample, draw, wide
from nd_jax.models import image_vae, quicksrnet
from nd_jax.models import unet as unet_network
from nd_jax.models.embeddings import sinusoid


def unet(config: unet_network.UNetConfig, params: Mapping[str, Any], height: int, width: int, length: int) -> Sample:
    """Sizes are the latent's; the timestep is one of 1000."""

    def sample(rng: np.random.Generator) -> tuple[Arrays, Arrays]:
        latent, text = draw(rng, 1, height, width, config.in_channels), draw(rng, 1, length, config.cross_attention_dim)
        pooled, timestep = draw(rng, 1, config.pooled_channels), rng.integers(0, 1000, 1).astype(np.float32)
        sizes = np.array([[8 * height, 8 * width, 0, 0, 8 * height, 8 * width]], np.float32)
        guided = config.time_cond_proj_dim is not None
        extra = {"guidance": draw(rng, 1, config.time_cond_proj_dim)} if guided else {}
        run = jax.jit(unet_network.definition(config))
        noise = run(wide(params), latent, timestep, text, pooled, sizes, *extra.values())
        added = unet_network.size_sinusoids(jnp.asarray(sizes), config.addition_time_embed_dim)
        inputs = {
            "sample": latent,
            "time": np.asarray(sinusoid(jnp.asarray(timestep), config.block_out_channels[0])),
            "added": np.concatenate([pooled, np.asarray(added)], axis=1),
            "text": text[0],
            **extra,
        }
        return inputs, {"noise": np.asarray(noise)}

    return sample


def image_decoder(config: image_vae.ImageVAEConfig, params: Mapping[str, Any], height: int, width: int) -> Sample:
    """Latents are those after division by the scaling factor."""
    network = image_vae.definition(config, half="decoder")

    def sample(rng: np.random.Generator) -> tuple[Arrays, Arrays]:
        latent = draw(rng, 1, height, width, config.latent_channels)
        image = jax.jit(lambda p, z: network.bind(p).decode(z))(wide(params), latent)
        return {"latent": latent}, {"image": np.asarray(image)}

    return sample


def upscaler(config: quicksrnet.QuickSRNetConfig, params: Mapping[str, Any], height: int, width: int) -> Sample:
    def sample(rng: np.random.Generator) -> tuple[Arrays, Arrays]:
        image = rng.random((1, height, width, 3), np.float32)
        return {"image": image}, {"larger": np.asarray(jax.jit(quicksrnet.definition(config))(wide(params), image))}

    return sample
