"""Schedules, groups, clipping, accumulation and the moving average."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nd_jax.errors import UserError
from nd_jax.training.ema import update_ema
from nd_jax.training.optim import OptimConfig, learning_rate, make_optimizer, value_and_grad
from nd_jax.training.sharding import Rule, Rules

PLAIN = OptimConfig(learning_rate=0.1, schedule="constant", warmup_steps=0, weight_decay=0.0, clip_norm=None)


def config(**changes):
    return OptimConfig(**{**vars(PLAIN), **changes})


def apply(optimizer, grads, params):
    """The first update of fresh parameters, and its metrics."""

    @jax.jit
    def run(grads, params):
        new, _, metrics = optimizer.apply(grads, optimizer.init(params), params)
        return new, metrics

    return run(grads, params)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.25, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.25, 1.0, 0.6, 0.2, 0.2]),
        ("cosine", [0.25, 1.0, 0.6, 0.2, 0.2]),
    ],
)
def test_schedules(schedule, expected):
    rate = learning_rate(
        OptimConfig(learning_rate=1.0, schedule=schedule, warmup_steps=4, decay_steps=24, final_fraction=0.2)
    )
    np.testing.assert_allclose([rate(count) for count in (0, 3, 14, 24, 99)], expected, rtol=1e-6)


def test_one_update_is_adamw_with_decay_where_the_rules_say():
    rules = Rules()
    params = {"kernel": np.full((2, 2), 2.0, np.float32), "bias": np.full((2,), 2.0, np.float32)}
    optimizer = make_optimizer(config(weight_decay=0.5), rules)
    new, metrics = apply(optimizer, jax.tree.map(np.ones_like, params), params)
    np.testing.assert_allclose(new["kernel"], 2.0 - 0.1 * (1.0 + 0.5 * 2.0), rtol=1e-6)
    np.testing.assert_allclose(new["bias"], 2.0 - 0.1, rtol=1e-6)
    np.testing.assert_allclose(metrics["learning_rate"], 0.1)
    np.testing.assert_allclose(metrics["grad_norm"], np.sqrt(6), rtol=1e-6)


def test_rates_by_label_and_frozen_parameters():
    rules = Rules((Rule("text/", label="text"), Rule("vae/", label="frozen"), Rule(".")))
    params = {name: {"kernel": np.ones(3, np.float32)} for name in ("text", "vae", "net")}
    optimizer = make_optimizer(config(rates={"text": 0.1}, weight_decay=0.1, clip_norm=1.0), rules)
    grads = {"text": {"kernel": jnp.ones(3)}, "vae": {"kernel": jnp.full(3, jnp.nan)}, "net": {"kernel": jnp.ones(3)}}
    state = jax.eval_shape(optimizer.init, params)
    assert sum(leaf.size == 3 for leaf in jax.tree.leaves(state)) == 4  # no moments for what is frozen
    new, metrics = apply(optimizer, grads, params)
    np.testing.assert_allclose(new["net"]["kernel"], 1 - 0.1 * 1.1, rtol=1e-6)
    np.testing.assert_allclose(new["text"]["kernel"], 1 - 0.01 * 1.1, rtol=1e-6)
    np.testing.assert_array_equal(new["vae"]["kernel"], 1.0)
    np.testing.assert_allclose(metrics["grad_norm"], np.sqrt(6), rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm_text"], np.sqrt(3), rtol=1e-6)


def test_a_rate_for_a_label_that_no_rule_has_is_an_error():
    with pytest.raises(UserError, match=r"'txet': no such label, expected one of \['main'\]"):
        make_optimizer(config(rates={"txet": 0.1}), Rules())


def test_accumulation_equals_the_big_batch_under_clipping():
    """Clipping each part before averaging would differ: the parts' gradients are far from parallel here."""
    generator = np.random.Generator(np.random.Philox(0))
    x, y = generator.normal(size=(12, 5)), 100 * generator.normal(size=(12, 3))
    examples = {"x": jnp.asarray(x, jnp.float32), "y": jnp.asarray(y, jnp.float32)}
    params = {"kernel": jnp.zeros((5, 3))}
    optimizer = make_optimizer(config(clip_norm=0.01, eps=1e-2), Rules())

    def loss(params, examples):
        error = examples["x"] @ params["kernel"] - examples["y"]
        return jnp.mean(error**2), {"mean": {"error": jnp.mean(error)}}

    def update(microbatches):
        grads, metrics = jax.jit(value_and_grad(loss, microbatches))(params, examples)
        new, told = apply(optimizer, grads, params)
        return {**new, **metrics, **told}

    whole = update(1)
    for microbatches in (2, 4):
        parts = update(microbatches)
        assert jax.tree.structure(parts) == jax.tree.structure(whole)
        for a, b in zip(jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    with pytest.raises(UserError, match="12 examples do not divide into 5"):
        update(5)


def test_clipping_is_by_the_norm_of_all_parameters_together():
    """Adam hides the scale of gradients, so its epsilon is made to dominate."""
    params = {"kernel": jnp.zeros(2), "bias": jnp.zeros(2)}
    grads = {"kernel": jnp.array([3.0, 0.0]), "bias": jnp.array([0.0, 4.0])}
    optimizer = make_optimizer(config(clip_norm=1.0, eps=1e6), Rules())
    new, _ = apply(optimizer, grads, params)
    np.testing.assert_allclose(new["kernel"][0] * 1e7, -0.6, rtol=1e-5)
    np.testing.assert_allclose(new["bias"][1] * 1e7, -0.8, rtol=1e-5)


def test_ema_ramps_then_follows_the_decay():
    ema, params = {"w": jnp.zeros(1)}, {"w": jnp.ones(1, jnp.bfloat16)}
    first = update_ema(ema, params, jnp.int32(0), 0.99)
    assert first["w"].dtype == jnp.float32
    np.testing.assert_allclose(first["w"], 0.9, rtol=1e-6)
    np.testing.assert_allclose(update_ema(ema, params, jnp.int32(10**6), 0.99)["w"], 0.01, rtol=1e-4)
