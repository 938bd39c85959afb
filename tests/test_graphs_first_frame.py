"""Graphs of the first frame's networks and of super-resolution against JAX."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("nd_jax.models.unet")

import jax
import jax.numpy as jnp
import tiny_system

from nd_jax.converters.graphs.image_decoder import image_decoder_graph
from nd_jax.converters.graphs.quicksrnet import quicksrnet_graph
from nd_jax.converters.graphs.session import run_graph, snr
from nd_jax.converters.graphs.unet import unet_graph
from nd_jax.errors import UserError
from nd_jax.models import image_vae, quicksrnet, unet
from nd_jax.models.embeddings import sinusoid

LEAST = 100.0


def philox() -> np.random.Generator:
    return np.random.Generator(np.random.Philox(0))


@pytest.mark.parametrize(
    ("scale", "connection"), [(2, False), (2, True), (3, True), (1.5, True)], ids=["2x", "2x input", "3x", "1.5x"]
)
def test_super_resolution(scale, connection):
    config = quicksrnet.QuickSRNetConfig(8, 2, scale, connection)
    network = quicksrnet.definition(config)
    params, image = tiny_system.random_params(network), philox().random((1, 6, 10, 3), np.float32)
    found = run_graph(quicksrnet_graph(config, params, 6, 10), {"image": image})["larger"]
    assert snr(np.asarray(network(params, image)), found) > LEAST


def test_image_decoder():
    config = image_vae.ImageVAEConfig(block_out_channels=(4, 4, 8), layers_per_block=1, norm_num_groups=2)
    network = image_vae.definition(config, half="decoder")
    params, latent = tiny_system.random_params(network), philox().standard_normal((1, 3, 4, 4), np.float32)
    expected = jax.jit(lambda p, z: network.bind(p).decode(z))(params, latent)
    found = run_graph(image_decoder_graph(config, params, 3, 4), {"latent": latent})["image"]
    assert snr(np.asarray(expected), found) > LEAST


@pytest.mark.parametrize("guided", [False, pytest.param(True, marks=pytest.mark.heavy)])
def test_unet(guided):
    config = unet.UNetConfig(
        block_out_channels=(8, 8, 16),
        attention_head_dim=(1, 2, 2),
        cross_attention_dim=12,
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=10 + 24,
        norm_num_groups=2,
        transformer_layers_per_block=(1, (1, 1), (2, 1)),
        reverse_transformer_layers_per_block=((1, 1, 2), (1, 1, 1), 1),
        time_cond_proj_dim=6 if guided else None,
        mid_block_type="UNetMidBlock2DCrossAttn" if guided else "UNetMidBlock2D",
    )
    network, rng = unet.definition(config), philox()
    params = tiny_system.random_params(network)
    sample, text, pooled = (rng.standard_normal((1, *s), np.float32) for s in ((8, 12, 4), (5, 12), (10,)))
    sizes, timestep = np.array([[64, 96, 0, 0, 64, 96]], np.float32), np.array([499.0], np.float32)
    extra = {"guidance": rng.standard_normal((1, 6), np.float32)} if guided else {}
    expected = jax.jit(network)(params, sample, timestep, text, pooled, sizes, *extra.values())
    time, added = sinusoid(jnp.asarray(timestep), 8), unet.size_sinusoids(jnp.asarray(sizes), 4)
    inputs = {
        "sample": sample,
        "time": time,
        "added": np.concatenate([pooled, added], axis=1),
        "text": text[0],
        **extra,
    }
    found = run_graph(unet_graph(config, params, 8, 12, 5), inputs)["noise"]
    assert snr(np.asarray(expected), found) > LEAST
    with pytest.raises(UserError, match="expected multiples of 4"):
        unet_graph(config, params, 6, 12, 5)
