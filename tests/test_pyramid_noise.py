"""Named noise: pinned values, independence of batch and length, and its statistics."""

import numpy as np
import pytest

from nd_jax.errors import UserError
from nd_jax.pyramid.layout import envelopes
from nd_jax.pyramid.noise import block_noise_source, draw_initial_noise, draw_noise


def test_draws_are_pinned():
    """Every runtime must draw these; if NumPy's stream ever changes, old videos change with it."""
    draw = draw_noise(7, "0/initial/3", (2, 2))
    assert draw.dtype == np.float32
    np.testing.assert_allclose(draw, [[-2.4886253, -1.4852288], [0.997148, -0.10870441]], rtol=1e-6)


def test_names_and_seeds_are_apart():
    base = draw_noise(1, "a", (64,))
    np.testing.assert_array_equal(base, draw_noise(1, "a", (64,)))
    for other in (draw_noise(1, "b", (64,)), draw_noise(2, "a", (64,)), draw_noise(11, "", (64,))):
        assert abs(np.corrcoef(base, other)[0, 1]) < 0.5
        assert not np.array_equal(base, other)
    for seed in (-1, 1.5):
        with pytest.raises(UserError, match="seed"):
            draw_noise(seed, "a", (1,))


def test_noise_does_not_depend_on_batch_or_length():
    long = draw_initial_noise(3, (0, 1), 4, 8, 8, 2)
    assert long.shape == (2, 4, 8, 8, 2)
    np.testing.assert_array_equal(long[1:, :2], draw_initial_noise(3, (1,), 2, 8, 8, 2))
    np.testing.assert_allclose([long.mean(), long.std()], [0, 1], atol=0.1)


@pytest.mark.parametrize("gamma", [1 / 3, 0.2])
def test_block_noise_source(gamma):
    stages = envelopes(2, 0, 64, 64, frames_per_unit=2)
    draw = block_noise_source(3, (0, 1), stages, 2, gamma)
    assert draw(0, 1).shape == (2, 1, 32, 32, 2)
    noise = draw(1, 2)
    assert noise.shape == (2, 2, 64, 64, 2)
    np.testing.assert_array_equal(noise[1:], block_noise_source(3, (1,), stages, 2, gamma)(1, 2))
    blocks = noise.reshape(4, 32, 2, 32, 2, 2).transpose(2, 4, 0, 1, 3, 5).reshape(4, -1)
    expected = (1 + gamma) * np.eye(4) - gamma
    np.testing.assert_allclose(np.cov(blocks), expected, atol=0.06)
