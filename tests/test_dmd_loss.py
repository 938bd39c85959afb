"""The pieces of distribution matching, one by one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nd_jax.recipes.dmd_loss import (
    cauchy_loss,
    error_weights,
    even_levels,
    few_step_levels,
    guided,
    matching_loss,
    mean_size,
)

RNG = np.random.Generator(np.random.Philox(0))
SHAPE = (3, 1, 2, 4, 2)
CLEAN, TEACHER, FAKE = RNG.standard_normal((3, *SHAPE), np.float32)
SIZE = np.prod(SHAPE[1:])


def test_descent_moves_the_prediction_along_fake_minus_teacher():
    weight = np.array([0.5, 1.0, 4.0], np.float32)
    losses, gradient = jax.value_and_grad(lambda z: matching_loss(z, TEACHER, FAKE, weight).sum())(CLEAN)
    direction = weight.reshape(-1, 1, 1, 1, 1) * (TEACHER - FAKE)
    np.testing.assert_allclose(gradient, direction / SIZE, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(losses, 0.5 * np.square(direction).mean((1, 2, 3, 4)).sum(), rtol=1e-4)
    for index in (1, 2):
        other = jax.grad(lambda *args: matching_loss(*args, weight).sum(), argnums=index)(CLEAN, TEACHER, FAKE)
        assert not np.any(other), "neither teacher nor fake learns from it"


def test_guidance_of_one_is_none():
    guidance = np.array([1.0, 0.0, 7.0], np.float32)
    found = guided(FAKE, TEACHER, guidance)
    np.testing.assert_allclose(found[0], TEACHER[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found[1], FAKE[1])
    np.testing.assert_allclose(found[2], 7 * TEACHER[2] - 6 * FAKE[2], rtol=1e-4, atol=1e-5)


def test_weights_stay_bounded():
    """A sample that the teacher explains perfectly, beside ordinary ones."""
    errors = jnp.array([0.2, 0.4, 1e-12, 0.4])
    raw, weights, none = (error_weights(errors, each) for each in ("raw", "normalised", "none"))
    np.testing.assert_allclose(raw[:2], [5, 2.5], rtol=1e-6)
    assert raw[2] >= 1e6
    np.testing.assert_array_equal(none, 1)
    np.testing.assert_allclose(weights.mean() * errors.mean(), 1, rtol=1e-6)
    np.testing.assert_allclose(weights[0] / weights[1], 2, rtol=1e-6)
    np.testing.assert_allclose(weights[2] / weights[1], 0.4 / 0.025, rtol=1e-5)
    same = jnp.full((2, 3), 0.3)
    np.testing.assert_allclose(error_weights(same, "normalised"), error_weights(same, "raw"), rtol=1e-6)
    assert np.isfinite(error_weights(jnp.zeros(3), "normalised")).all()
    assert not np.any(jax.grad(lambda e: error_weights(e, "normalised").sum())(errors))


@pytest.mark.parametrize(("reduction", "size"), [("sum", 1), ("mean", SIZE)])
def test_cauchy_by_hand(reduction, size):
    square = np.square(CLEAN - TEACHER).sum((1, 2, 3, 4)) / size
    loss, gradient = jax.value_and_grad(lambda z: cauchy_loss(z, TEACHER, reduction).sum())(CLEAN)
    np.testing.assert_allclose(loss, 0.5 * np.log(1 + square).sum(), rtol=1e-5)
    expected = (CLEAN - TEACHER) / size / (1 + square).reshape(-1, 1, 1, 1, 1)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-7)


def test_levels():
    uniform = jnp.linspace(0, 0.999, 1000)
    assert np.unique(even_levels(uniform, 4)).tolist() == [0.25, 0.5, 0.75, 1.0]
    assert np.unique(few_step_levels(uniform, 1)).tolist() == [1.0]
    for steps in (2, 3, 4):
        found, counts = np.unique(few_step_levels(uniform, steps), return_counts=True)
        np.testing.assert_allclose(found[::-1], np.linspace(1, 0, steps + 1)[:-1], rtol=1e-6)
        assert np.ptp(counts) <= 2
    np.testing.assert_allclose(mean_size(CLEAN), np.abs(CLEAN).mean((1, 2, 3, 4)), rtol=1e-6)
