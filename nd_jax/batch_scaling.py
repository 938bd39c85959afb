"""Recovery at larger batches: how many updates reach the loss that the usual batch reaches, by learning-rate rule.

For people who run pruning experiments at a pod's batch sizes. A factor k multiplies the batch (in k times as many
microbatches, so that memory stays) and the learning rate by k (linear, arXiv 1706.02677) or its square root (usual for
Adam, arXiv 2205.10287, whose changes of Adam's decays are not possible at these factors and are left out). Warm-up
takes as many examples, the average's decay is raised to the power k (arXiv 2307.13813), and the rate is constant after
the warm-up, so that no run ends its schedule early. Loss is that of flow matching with averaged parameters, on held-out
examples and draws that are the same for all.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from nd_jax.data.pipeline import batches
from nd_jax.errors import UserError
from nd_jax.recipes.flow_matching import FlowRecipe, FlowRecipeConfig

Rule = Literal["sqrt", "linear"]
RULES: tuple[Rule, ...] = ("sqrt", "linear")
FACTORS = (1, 4, 16, 64)
HELD_OUT = 96
"""Examples that the loss is measured on, at most; at least a usual batch."""
Make = Callable[[FlowRecipeConfig], FlowRecipe]
"""The recipe of a configuration, everything else fixed."""


@dataclass(frozen=True)
class Row:
    """One run. ``steps`` is None where the loss was not reached within ``tried`` updates."""

    factor: int
    rule: str
    batch: int
    learning_rate: float
    steps: int | None
    tried: int
    loss: float
    """At the last update that was made."""


def scaled(config: FlowRecipeConfig, factor: int, rule: Rule) -> FlowRecipeConfig:
    """The configuration with ``factor`` times the batch. Raises UserError for a factor below 1 or an unknown rule."""
    if factor < 1 or rule not in RULES:
        raise UserError(f"batch scaling: factor {factor}, rule {rule!r}; expected at least 1 and {' or '.join(RULES)}")
    optim = config.optim
    optim = dataclasses.replace(
        optim,
        learning_rate=optim.learning_rate * (math.sqrt(factor) if rule == "sqrt" else factor),
        warmup_steps=max(1, round(optim.warmup_steps / factor)),
        schedule="constant",
    )
    return dataclasses.replace(
        config,
        batch=config.batch * factor,
        microbatches=config.microbatches * factor,
        ema_decay=config.ema_decay**factor,
        optim=optim,
    )


def compare(
    make: Make,
    config: FlowRecipeConfig,
    params: Any,
    train: Any,
    held_out: Any,
    *,
    steps: int,
    every: int = 5,
    factors: Sequence[int] = FACTORS,
    rules: Sequence[Rule] = RULES,
    seed: int = 0,
    tell: Callable[[Row], None] = lambda row: None,
    **reading: Any,
) -> list[Row]:
    """Rows of the table: the usual batch for ``steps`` updates, then every larger one by every rule.

    ``train`` and ``held_out`` are sources of ``latents`` and ``caption``, ``reading`` goes to ``pipeline.batches`` (its
    tokenizers). A larger batch gets at most ``steps`` updates and is measured every ``every / factor`` of them, at
    least at each one. Raises UserError for too few held-out examples.
    """
    if steps < 1 or every < 1:
        raise UserError(f"batch scaling: {steps} steps, measured every {every}; expected at least 1 of both")
    if not factors or factors[0] != 1:
        raise UserError(f"batch scaling: factors {list(factors)}; expected 1 first, the batch that others are held to")
    if len(held_out) < config.batch:
        raise UserError(
            f"batch scaling: {len(held_out)} held-out examples, expected at least one batch, {config.batch}"
        )
    many = config.batch * max(1, min(len(held_out), HELD_OUT) // config.batch)
    judge = make(dataclasses.replace(scaled(config, 1, "linear"), batch=many))
    loss = jax.jit(lambda ema, examples: judge.loss(ema, examples)[0])
    batch = next(_stream(judge, held_out, seed, shuffle=False, **reading))
    groups = len(judge.columns)
    examples = {name: jnp.asarray(x).reshape(-1, groups, *x.shape[1:]) for name, x in batch.items()}
    examples |= judge.draws(jax.random.key(seed + 1))

    rows: list[Row] = []
    for factor in factors:
        for rule in rules if factor > 1 else ("linear",):
            chosen = scaled(config, factor, rule)
            target = None if not rows else rows[0].loss
            losses = _losses(make(chosen), params, train, loss, examples, max(1, every // factor), steps, seed, reading)
            reached, made, last = None, 0, math.nan
            for made, last in losses:
                if target is not None and last <= target:
                    reached = made
                    break
            name = rule if factor > 1 else "-"
            reached = made if target is None else reached
            rows.append(Row(factor, name, chosen.batch, chosen.optim.learning_rate, reached, made, last))
            tell(rows[-1])
            if target is None and not math.isfinite(last):
                raise UserError(f"batch scaling: the usual batch ends at a loss of {last}; lower its learning rate")
    return rows


def _losses(
    recipe: FlowRecipe,
    params: Any,
    train: Any,
    loss: Callable,
    examples: dict[str, Any],
    every: int,
    steps: int,
    seed: int,
    reading: dict[str, Any],
) -> Iterator[tuple[int, float]]:
    """Updates made and the loss then; ends early where it is no number."""
    state = jax.jit(recipe.init)(jax.random.key(seed), params)
    step, stream = jax.jit(recipe.step, donate_argnums=0), _stream(recipe, train, seed, **reading)
    for made in range(1, steps + 1):
        state, _ = step(state, next(stream))
        if made % every == 0 or made == steps:
            found = float(loss(state.ema, examples))
            yield made, found
            if not math.isfinite(found):
                return


def _stream(recipe: FlowRecipe, source: Any, seed: int, **reading: Any) -> Iterator[dict[str, Any]]:
    names = recipe.batch_spec()
    for batch in batches(source, recipe.config.batch, seed=seed, keys=("latents",), **reading):
        yield {name: batch[name] for name in names}


def table(rows: Sequence[Row]) -> str:
    """The rows in Markdown. Perfect scaling would need 1 / factor of the first row's updates, and 1 x its examples."""
    usual = rows[0]
    lines = [
        "| batch | x | rule | learning rate | updates to equal loss | of perfect scaling | examples, x row 1's |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        told = [f"not in {row.tried} (loss {row.loss:.4f})", "-", "-"]
        if row.steps is not None:
            examples = row.steps * row.factor / usual.steps
            told = [str(row.steps), f"{1 / examples:.0%}", f"{examples:.2f}"]
        cells = [str(row.batch), str(row.factor), row.rule, f"{row.learning_rate:.2e}", *told]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"Equal loss: {usual.loss:.4f}, what the first row reaches."])
