"""The comparison of batch sizes: what a factor changes, the table, and a run of it on a tiny system."""

import dataclasses
import math

import numpy as np
import pytest
import tiny_system

from nd_jax.batch_scaling import Row, compare, scaled, table
from nd_jax.errors import UserError
from nd_jax.models.system import CODEC
from nd_jax.recipes.flow_matching import FlowRecipe, FlowRecipeConfig
from nd_jax.training.optim import OptimConfig

CONFIG = FlowRecipeConfig(
    batch=2,
    stage_mix=(1, 0, 1),
    train_text=False,
    ema_decay=0.5,
    optim=OptimConfig(learning_rate=1e-3, warmup_steps=8),
)


def test_what_a_factor_changes():
    sqrt, linear = scaled(CONFIG, 16, "sqrt"), scaled(CONFIG, 16, "linear")
    assert (sqrt.optim.learning_rate, linear.optim.learning_rate) == (pytest.approx(4e-3), pytest.approx(16e-3))
    assert dataclasses.replace(sqrt, optim=linear.optim) == linear
    assert (sqrt.batch, sqrt.microbatches, sqrt.ema_decay) == (32, 16, 0.5**16)
    assert (sqrt.optim.warmup_steps, sqrt.optim.schedule) == (1, "constant")
    assert scaled(CONFIG, 4, "sqrt").optim.warmup_steps == 2
    with pytest.raises(UserError, match="factor 0"):
        scaled(CONFIG, 0, "sqrt")
    with pytest.raises(UserError, match="sqrt or linear"):
        scaled(CONFIG, 2, "cubic")


def test_the_table_tells_updates_and_examples():
    rows = [
        Row(1, "-", 24, 5e-4, 100, 100, 0.25),
        Row(4, "sqrt", 96, 1e-3, 50, 50, 0.249),
        Row(4, "linear", 96, 2e-3, None, 100, 0.3),
    ]
    lines = table(rows).splitlines()
    assert lines[2] == "| 24 | 1 | - | 5.00e-04 | 100 | 100% | 1.00 |"
    assert lines[3] == "| 96 | 4 | sqrt | 1.00e-03 | 50 | 50% | 2.00 |"
    assert lines[4] == "| 96 | 4 | linear | 2.00e-03 | not in 100 (loss 0.3000) | - | - |"
    assert "0.2500" in lines[-1]


@pytest.mark.heavy
def test_a_larger_batch_is_run_until_it_is_as_good(tiny):
    rng = np.random.Generator(np.random.Philox(0))
    clips = [{"latents": rng.standard_normal((2, 8, 8, 4), np.float32), "caption": f"clip {n}"} for n in range(10)]

    def make(config):
        return FlowRecipe(
            tiny_system.CONFIG,
            config,
            schedule=tiny.schedule,
            stats=tiny.stats,
            sizes=[(2, 8, 8)],
            text_length=tiny_system.TEXT_LENGTH,
            clip_length=tiny_system.TEXT_LENGTH,
        )

    params = {name: each for name, each in tiny.params.items() if name != CODEC}
    told = []
    rows = compare(
        make,
        CONFIG,
        params,
        clips[:8],
        clips[8:],
        steps=4,
        every=2,
        factors=(1, 4),
        rules=("linear",),
        tell=told.append,
        tokenizers=tiny.tokenizers,
    )
    assert told == rows
    assert [(row.factor, row.rule, row.batch) for row in rows] == [(1, "-", 2), (4, "linear", 8)]
    assert (rows[0].steps, rows[0].tried) == (4, 4)
    assert all(math.isfinite(row.loss) for row in rows)
    assert (rows[1].steps is None) == (rows[1].loss > rows[0].loss)
    with pytest.raises(UserError, match="1 held-out examples"):
        compare(make, CONFIG, params, clips, clips[:1], steps=1)
    with pytest.raises(UserError, match="expected 1 first"):
        compare(make, CONFIG, params, clips, clips, steps=1, factors=(4,))
