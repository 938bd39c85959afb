"""Distribution matching on a stage of the pyramid (Neodragon, arXiv 2511.06055, pyramidal DMD; Yin et al., 2311.18828).

A student's clean prediction ``z^`` is put back on the flow; there the teacher knows the velocity of the data and a fake
network that of the student's own output. A velocity points from clean to noise, so ``v_teacher - v_fake`` points from
where the data has more mass to where the student has: descent moves ``z^`` the other way.

Pure functions; per-sample losses and errors are float32 [B], and the caller averages.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from nd_jax.pyramid.targets import per_row

Weighting = Literal["normalised", "raw", "none"]
Reduction = Literal["sum", "mean"]


def guided(
    unconditional: Float[Array, "b t h w c"], conditional: Float[Array, "b t h w c"], guidance: Float[Array, " b"]
) -> Float[Array, "b t h w c"]:
    """The teacher's velocity ``v_uncond + w (v_cond - v_uncond)``: 1 is no guidance. (Some code bases call that 0.)"""
    return unconditional + per_row(guidance, conditional) * (conditional - unconditional)


def few_step_levels(uniform: Float[Array, " b"], steps: int) -> Float[Array, " b"]:
    """Local noise at the start of one of ``steps`` Euler steps from 1 to 0 (the plain grid), by draws in [0, 1)."""
    return 1 - jnp.floor(uniform * steps) / steps


def even_levels(uniform: Float[Array, " b"], count: int) -> Float[Array, " b"]:
    """Local noise from ``count`` even values 1 / count .. 1, by draws in [0, 1); 4 in the paper."""
    return (jnp.floor(uniform * count) + 1) / count


def mean_size(x: Float[Array, "b t h w c"]) -> Float[Array, " b"]:
    """Mean absolute value of each sample, in float32."""
    return jnp.mean(jnp.abs(x.astype(jnp.float32)), axis=tuple(range(1, x.ndim)))


def error_weights(errors: Float[Array, ...], weighting: Weighting, floor: float = 0.1) -> Float[Array, ...]:
    """Weights of the samples of a whole batch from ``mean|v_teacher - (y_start^ - y_end^)|``, without gradient.

    ``raw`` is the paper's ``1 / error``, which has no bound. ``normalised`` lifts errors below ``floor`` times the
    batch's mean to that, so that no sample outweighs an ordinary one by more than 1 / floor, and scales the weights to
    a mean of 1 / (mean error), the paper's own size for equal errors. ``none``: 1.
    """
    errors = jax.lax.stop_gradient(errors)
    if weighting == "none":
        return jnp.ones_like(errors)
    mean = jnp.maximum(jnp.mean(errors), 1e-6)
    if weighting == "raw":
        return 1 / jnp.maximum(errors, 1e-6)
    weights = 1 / jnp.maximum(errors, floor * mean)
    return weights / (jnp.mean(weights) * mean)


def matching_loss(
    clean: Float[Array, "b t h w c"],
    teacher: Float[Array, "b t h w c"],
    fake: Float[Array, "b t h w c"],
    weight: Float[Array, " b"],
) -> Float[Array, " b"]:
    """A loss whose gradient with respect to ``clean`` is ``w (v_teacher - v_fake)`` over the sample's size.

    ``0.5 mean((z^ - stop(z^ - w (v_teacher - v_fake)))^2)``: half the mean square of the direction it moves ``z^`` in.
    The division lets a sample count the same at any resolution. The paper gives the gradient without it; whether its
    other term is to be divided likewise it does not say (see ``cauchy_loss``).
    """
    direction = per_row(weight, clean) * (teacher.astype(jnp.float32) - fake.astype(jnp.float32))
    clean = clean.astype(jnp.float32)
    goal = jax.lax.stop_gradient(clean - direction)
    return 0.5 * jnp.mean(jnp.square(clean - goal), axis=tuple(range(1, clean.ndim)))


def cauchy_loss(
    clean: Float[Array, "b t h w c"], target: Float[Array, "b t h w c"], reduction: Reduction = "sum"
) -> Float[Array, " b"]:
    """``0.5 log(1 + ||z^ - z_i||^2)``, a regression to the data that large errors do not dominate.

    The squared norm is the ``sum`` over the sample, as the paper writes it, or the ``mean``. For errors of root mean
    square ``e`` in samples of size D the gradient is about 1 / (D e) per value for the sum, whatever D, and
    e / (D (1 + e^2)) for the mean; that of ``matching_loss`` is w |v_teacher - v_fake| / D. Read literally, the paper's
    two gradients are w |v_teacher - v_fake| and 1 / (D e): a Cauchy weight of 1 / D here.
    """
    square = jnp.square(clean.astype(jnp.float32) - target.astype(jnp.float32))
    reduce = {"sum": jnp.sum, "mean": jnp.mean}[reduction]
    return 0.5 * jnp.log1p(reduce(square, axis=tuple(range(1, square.ndim))))
