"""Resampling, the jump, block noise, history of any length, latent scaling, pixels: every pyramid_ops golden case."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nd_jax.errors import UserError
from nd_jax.pixels import from_uint8, to_uint8
from nd_jax.pyramid.history import unit_history
from nd_jax.pyramid.normalise import NEODRAGON, LatentStats
from nd_jax.pyramid.renoise import block_covariance, block_noise, jump, jump_coefficients, renoise
from nd_jax.pyramid.resample import double, halve, halve_noise, latent_pyramid, noise_at_level
from nd_jax.pyramid.schedule import Schedule

TOLERANCE = 1e-5


def last(x):
    """[B, C, T, H, W] -> [B, T, H, W, C]."""
    return np.moveaxis(x, 1, -1)


def close(actual, expected):
    np.testing.assert_allclose(actual, last(expected), rtol=0, atol=TOLERANCE)


@pytest.fixture(scope="module")
def ops(golden):
    return golden("pyramid_ops")


@pytest.mark.parametrize("name", ["even", "odd", "two_stages"])
def test_latent_pyramid(ops, name):
    inputs, expected = ops.subcase(f"pyramid_latent_{name}")
    levels = latent_pyramid(last(inputs["x"]), len(expected))
    for level, array in enumerate(levels):
        close(array, expected[f"pyramid/{level}"])


@pytest.mark.parametrize("times", [1, 2])
def test_noise_is_halved_at_unit_variance(ops, times):
    inputs, expected = ops.subcase(f"downsample_noise_{times}")
    close(noise_at_level(last(inputs["x"]), 2 - times, 3), expected["y"])


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("gamma", ["0.333", "0.500"])
def test_jump(ops, stage, gamma):
    name = f"upsample_stage{stage}_gamma{gamma}"
    inputs, expected = ops.subcase(name)
    facts = ops.meta["subcases"][name]
    latents, noise = last(inputs["latents"]), last(inputs["block_noise"])
    close(renoise(latents, noise, facts["orig_sigma"], facts["gamma"]), expected["y"])
    close(jump(latents, noise, Schedule(gamma=facts["gamma"]), stage), expected["y"])
    alpha, beta = jump_coefficients(facts["orig_sigma"], facts["gamma"])
    np.testing.assert_allclose([alpha, beta], [facts["alpha"], facts["beta"]], rtol=1e-12)


@pytest.mark.parametrize("gamma", ["0.333", "0.200"])
def test_block_noise_has_the_reference_covariance(ops, gamma):
    _, expected = ops.subcase(f"block_noise_cov_gamma{gamma}")
    exact = ops.meta["subcases"][f"block_noise_cov_gamma{gamma}"]["gamma"]
    np.testing.assert_allclose(block_covariance(exact), expected["covariance"], atol=1e-6)
    np.testing.assert_allclose(np.linalg.eigvalsh(block_covariance(exact)), np.sort(expected["eigenvalues"]), atol=1e-6)
    unit_vectors = np.eye(4).reshape(4, 2, 2, 1)  # as four "images" of one block: gives the root's columns
    root = block_noise(unit_vectors, exact).reshape(4, 4).T
    np.testing.assert_allclose(root @ root.T, block_covariance(exact), atol=1e-12)


def test_block_noise_keeps_blocks_apart():
    white = np.random.Generator(np.random.Philox(1)).standard_normal((2, 1, 4, 6, 3))
    out = block_noise(white, 1 / 3)
    np.testing.assert_allclose(np.asarray(halve(jnp.asarray(out))), 0, atol=1e-6)  # every block sums to zero
    changed = white.copy()
    changed[0, 0, 0, 0, 0] += 1
    moved = np.argwhere(block_noise(changed, 1 / 3) != out)
    assert {tuple(index) for index in moved} == {(0, 0, row, col, 0) for row in range(2) for col in range(2)}


def test_impossible_block_noise_is_refused():
    with pytest.raises(UserError, match="gamma is"):
        block_noise(np.zeros((1, 1, 2, 2, 1)), 0.5)
    with pytest.raises(UserError, match="3x2"):
        block_noise(np.zeros((1, 1, 3, 2, 1)), 0.2)


PAST = ["past_1", "past_2", "past_3", "past_3_cfg", "past_4", "past_5", "past_6", "past_4_frames_per_unit2"]


@pytest.mark.parametrize("name", [*PAST, "past_3_two_stages"])
def test_history(ops, name):
    inputs, expected = ops.subcase(name)
    facts = ops.meta["subcases"][name]
    units = [last(inputs[f"units/{i}"]) for i in range(len(inputs))]
    if facts["cfg"]:
        units = [np.concatenate([unit, unit]) for unit in units]
    history = unit_history(units, facts["num_stages"])
    assert [[list(np.moveaxis(clip, -1, 1).shape) for clip in clips] for clips in history] == facts["shapes"]
    for stage, clips in enumerate(history):
        for i, clip in enumerate(clips):
            close(clip, expected[f"past/{stage}/{i}"])


def test_no_history():
    assert unit_history([], 3) == [[], [], []]


@pytest.mark.parametrize("name", ["decode_latent_T1", "decode_latent_T4"])
def test_latents_are_unscaled_for_the_decoder(ops, name):
    inputs, expected = ops.subcase(name)
    latents = last(inputs["latents"])
    stats = LatentStats.from_dict({**ops.config["vae_factors"]})
    assert stats == NEODRAGON
    out = stats.denormalise(latents)
    close(out, expected["vae_input"])
    np.testing.assert_allclose(stats.normalise(out), latents, atol=1e-5)
    frames = np.asarray(out).reshape(-1, *out.shape[2:])  # the stand-in decoder is the identity
    np.testing.assert_allclose(frames, expected["video_bt_hwc"], rtol=0, atol=TOLERANCE)


def test_pixels_are_truncated_exactly(ops):
    inputs, expected = ops.subcase("numpy_to_pil")
    np.testing.assert_array_equal(to_uint8(inputs["images"]), expected["uint8"])
    inputs, expected = ops.subcase("pil_to_numpy")
    np.testing.assert_allclose(from_uint8(inputs["uint8"])[None], expected["images"], rtol=0, atol=TOLERANCE)


def test_statistics_per_channel():
    stats = LatentStats([0.0, 1.0], [1.0, 2.0], 0.5, (4.0, 8.0))
    assert LatentStats.from_dict(stats.to_dict()) == stats
    out = stats.normalise(jnp.ones((1, 2, 1, 1, 2)))
    np.testing.assert_allclose(out.reshape(2, 2), [[1, 0], [2, 4]])
    with pytest.raises(UserError, match="2 values for latents with 3 channels"):
        stats.normalise(jnp.ones((1, 2, 1, 1, 3)))
    with pytest.raises(UserError, match="scale is 0"):
        LatentStats(0.0, 0.0, 0.0, 1.0)
    with pytest.raises(UserError, match="missing video_scale"):
        LatentStats.from_dict({"shift": 0, "scale": 1, "video_shift": 0})


def test_resampling_portrait_and_types():
    x = jnp.arange(2 * 4 * 6, dtype=jnp.bfloat16).reshape(1, 2, 4, 6, 1)
    assert halve(x).shape == (1, 2, 2, 3, 1)
    assert halve(x).dtype == double(x).dtype == jnp.bfloat16
    np.testing.assert_array_equal(halve(double(x)), x)
    np.testing.assert_allclose(halve_noise(x), 2 * halve(x))
    assert jax.jit(halve)(jnp.ones((1, 7, 4, 1))).shape == (1, 3, 2, 1)
    with pytest.raises(UserError, match="size 1"):
        halve(jnp.ones((1, 1, 4, 1)))
