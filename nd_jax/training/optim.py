"""AdamW with a schedule, path rules for weight decay and learning rates, clipping and accumulation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from nd_jax.errors import UserError
from nd_jax.models.functional import Params
from nd_jax.training.metrics import NORM_OF
from nd_jax.training.paths import map_named, named_leaves
from nd_jax.training.sharding import Rules

FROZEN = "frozen"
"""The label of parameters that are not trained and have no optimizer state."""

Metrics = dict[str, Any]


@dataclass(frozen=True)
class OptimConfig:
    """AdamW [Loshchilov and Hutter 2019] and its learning rate."""

    learning_rate: float = 1e-4
    """Peak, per update."""
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    """Shape after the warm-up."""
    warmup_steps: int = 100
    """Updates of linear warm-up; the first update already takes 1 / warmup of the peak."""
    decay_steps: int = 10_000
    """Update at which cosine and linear schedules reach their end."""
    final_fraction: float = 0.1
    """Learning rate at the end, as a fraction of the peak."""
    b1: float = 0.9
    b2: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 1e-2
    """Decoupled, times the learning rate; only where the rules say ``decay``."""
    clip_norm: float | None = 1.0
    """Largest global norm of the gradients (of all trained parameters together); None for no clipping."""
    rates: Mapping[str, float] = field(default_factory=dict)
    """Learning-rate factors by rule label; labels not named take 1."""


def learning_rate(config: OptimConfig) -> optax.Schedule:
    """The schedule as a function of the number of updates made before (traceable)."""

    def rate(count: Any) -> jax.Array:
        warm = jnp.minimum(1.0, (count + 1.0) / max(config.warmup_steps, 1))
        span = max(config.decay_steps - config.warmup_steps, 1)
        done = jnp.clip((count - config.warmup_steps) / span, 0.0, 1.0)
        left = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + jnp.cos(jnp.pi * done))}[config.schedule]
        if config.schedule != "constant":
            left = config.final_fraction + (1.0 - config.final_fraction) * left
        return config.learning_rate * warm * left

    return rate


@dataclass(frozen=True)
class Optimizer:
    """An optax transformation that also reports what it did."""

    transform: optax.GradientTransformation
    rate: optax.Schedule
    rules: Rules

    def init(self, params: Params) -> Any:
        """Optimizer state for ``params``. Traceable."""
        return self.transform.init(params)

    def apply(self, grads: Params, opt_state: Any, params: Params) -> tuple[Params, Any, Metrics]:
        """Parameters and optimizer state after one update.

        Metrics: ``grad_norm`` before clipping (and ``grad_norm_LABEL`` when there are several groups),
        ``grad_norm_of/PART`` for every trained top-level part of ``params``, and ``learning_rate`` (peak group).
        """
        updates, new_state = self.transform.update(grads, opt_state, params)
        count = optax.tree_utils.tree_get(opt_state, "count", filtering=_is_schedule_count)
        metrics = {**self.norms(grads), "learning_rate": self.rate(count)}
        return optax.apply_updates(params, updates), new_state, metrics

    def norms(self, grads: Params) -> Metrics:
        """Global norm of the trained parameters' gradients: whole, by label, and by top-level part."""
        squares: dict[str, jax.Array] = {}
        parts: dict[str, jax.Array] = {}
        for path, leaf in named_leaves(grads):
            label, part = self.rules.find(path).label, path.partition("/")[0]
            if label != FROZEN:
                square = jnp.sum(jnp.square(leaf.astype(jnp.float32)))
                squares[label] = squares.get(label, 0.0) + square
                parts[part] = parts.get(part, 0.0) + square
        norms: Metrics = {"grad_norm": jnp.sqrt(sum(squares.values()))}
        if len(squares) > 1:
            norms |= {f"grad_norm_{label}": jnp.sqrt(value) for label, value in sorted(squares.items())}
        return norms | {NORM_OF: {part: jnp.sqrt(value) for part, value in parts.items()}}


def make_optimizer(config: OptimConfig, rules: Rules) -> Optimizer:
    """Clip, Adam, weight decay, learning rate by label; nothing for ``frozen`` parameters.

    Raises ``UserError`` for a rate whose label no rule has.
    """
    known = {rule.label for rule in rules.table}
    for label in config.rates:
        if label not in known:
            raise UserError(f"learning-rate factor for {label!r}: no such label, expected one of {sorted(known)}")
    rate = learning_rate(config)
    parts = [] if config.clip_norm is None else [optax.clip_by_global_norm(config.clip_norm)]
    parts += [
        optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps, mu_dtype=jnp.float32),
        optax.add_decayed_weights(config.weight_decay, mask=rules.decays),
        optax.stateless(lambda updates, _: _by_label(updates, config.rates, rules)),
        optax.scale_by_learning_rate(rate),
    ]
    transform = optax.chain(*parts)
    if FROZEN in known:

        def sides(params: Params) -> Params:
            return jax.tree.map(lambda label: FROZEN if label == FROZEN else "trained", rules.labels(params))

        # Partitioned, so that frozen parameters cost no moments and do not enter the clipping norm.
        transform = optax.partition({"trained": transform, FROZEN: optax.set_to_zero()}, sides)
    return Optimizer(transform, rate, rules)


def value_and_grad(
    loss: Callable[..., tuple[jax.Array, Metrics]], microbatches: int = 1
) -> Callable[..., tuple[Params, Metrics]]:
    """``f(params, examples, *rest) -> (grads, metrics)``, in ``microbatches`` passes over equal parts of ``examples``.

    ``loss(params, examples, *rest)`` returns a mean over axis 0 of ``examples``' leaves and a dict of metrics that are
    such means too. Gradients and metrics are averaged over the parts before anything else sees them, so accumulation
    equals the big batch, clipping included; draw the noise for the whole batch and pass it in ``examples``.
    Part i holds examples i, i + n, i + 2n, ...: every device then works on every part.
    """
    grad = jax.value_and_grad(loss, has_aux=True)

    def run(params: Params, examples: Any, *rest: Any) -> tuple[Params, Metrics]:
        def one(part: Any) -> tuple[Params, Metrics]:
            (value, metrics), grads = grad(params, part, *rest)
            return grads, {"loss": value, **metrics}

        if microbatches == 1:
            return one(examples)
        parts = jax.tree.map(lambda x: _deal(x, microbatches), examples)
        shapes = jax.eval_shape(one, jax.tree.map(lambda x: x[0], parts))
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.promote_types(s.dtype, jnp.float32)), shapes)
        total, _ = jax.lax.scan(lambda sums, part: (jax.tree.map(jnp.add, sums, one(part)), None), zeros, parts)
        return jax.tree.map(lambda x: x / microbatches, total)

    return run


def in_parts(function: Callable[..., Any], microbatches: int = 1) -> Callable[..., Any]:
    """``f(examples, *rest)`` in ``microbatches`` passes over the parts of ``value_and_grad``, for a function whose
    results have a row for each row of ``examples``; they come back in that order."""

    def run(examples: Any, *rest: Any) -> Any:
        if microbatches == 1:
            return function(examples, *rest)
        parts = jax.tree.map(lambda x: _deal(x, microbatches), examples)
        results = jax.lax.map(lambda part: function(part, *rest), parts)
        return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), results)

    return run


def _deal(x: jax.Array, parts: int) -> jax.Array:
    """[B, ...] -> [parts, B / parts, ...]."""
    if x.shape[0] % parts:
        raise UserError(f"{x.shape[0]} examples do not divide into {parts} microbatches")
    return x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)


def _by_label(updates: Params, rates: Mapping[str, float], rules: Rules) -> Params:
    return map_named(lambda path, leaf: leaf * rates.get(rules.find(path).label, 1.0), updates)


def _is_schedule_count(path: tuple, _: Any) -> bool:
    return getattr(path[-1], "tuple_name", None) == "ScaleByScheduleState"
