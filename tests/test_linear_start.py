"""The codec's initial weights: a coarse picture goes through, and the architecture is untouched."""

import dataclasses

import jax
import numpy as np
import pytest

from nd_jax.data import judge
from nd_jax.data.source import ShapesSource
from nd_jax.data.world import WORLDS
from nd_jax.errors import UserError
from nd_jax.models.causal_vae import definition, posterior
from nd_jax.pixels import from_uint8
from nd_jax.recipes.linear_start import LOGVAR, linear_start
from nd_jax.recipes.preset import load_preset

FAST = {"xla_backend_optimization_level": 0}
CONFIG = load_preset("shapes_tiny").system.causal_video_vae


@pytest.fixture(scope="module")
def through():
    """Clips, their labels, the moments' posterior and the reconstruction with untrained weights."""
    codec = definition(CONFIG)
    source = ShapesSource(WORLDS["64x64"], "train", 6, 0)
    clips = from_uint8(np.stack([source.video(n) for n in range(len(source))]))

    def run(key, clips):
        network = codec.bind(linear_start(CONFIG, codec.init(key)))
        code = posterior(network.encode(clips))
        return code, network.decode(code.mean)

    code, made = jax.jit(run, compiler_options=FAST)(jax.random.key(0), clips)
    return clips, source.labels, code, np.asarray(made)


def test_untrained_codec_passes_a_coarse_picture(through):
    clips, labels, _, made = through
    psnr = 10 * np.log10(4 / np.mean((made - clips) ** 2))
    assert psnr > 20
    scores = judge.score(judge.read_labels(made.clip(-1, 1), WORLDS["64x64"]), labels)
    assert scores.accuracy["colour"] == scores.accuracy["background"] == scores.accuracy["motion"] == 1


def test_latent_holds_block_averages_and_little_noise(through):
    clips, _, code, _ = through
    corner = clips[:, 0, :4, :4].mean(axis=(1, 2))
    scale = np.asarray(code.mean)[:, 0, 0, 0, :3] / corner
    assert np.allclose(scale, scale.mean(), rtol=0.1)  # the same factor for every clip and colour
    assert np.allclose(code.logvar, LOGVAR, atol=1e-3)


def test_usual_start_does_not(through):
    clips = through[0]
    codec = definition(CONFIG)

    def run(key, clips):
        network = codec.bind(codec.init(key))
        return network.decode(posterior(network.encode(clips)).mean)

    made = np.asarray(jax.jit(run, compiler_options=FAST)(jax.random.key(0), clips))
    assert 10 * np.log10(4 / np.mean((made - clips) ** 2)) < 15


def test_structure_is_the_official_one():
    codec = definition(CONFIG)
    started = jax.eval_shape(lambda key: linear_start(CONFIG, codec.init(key)), jax.random.key(0))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), started) == jax.tree.map(
        lambda x: (x.shape, x.dtype), codec.abstract()
    )


@pytest.mark.parametrize(
    "change",
    [
        {"encoder_norm_num_groups": 2},
        {"encoder_block_out_channels": (8, 8, 48, 48)},
        {"decoder_block_out_channels": (8, 8, 8, 8)},
    ],
)
def test_no_room_is_an_error(change):
    config = dataclasses.replace(CONFIG, **change)
    with pytest.raises(UserError, match="linear start needs"):
        linear_start(config, {})
