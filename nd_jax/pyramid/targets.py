"""Stage pairs, noisy inputs, velocity targets and the loss of pyramidal flow matching (arXiv 2410.05954, eq. 7-11)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nd_jax.pyramid.resample import double
from nd_jax.pyramid.schedule import Schedule


class NoisyClip(NamedTuple):
    """One clip of a stage's flow: input ``noisy``, regression ``target``, conditioning ``timestep``, local noise."""

    noisy: Float[Array, "b t h w c"]
    target: Float[Array, "b t h w c"]
    timestep: Float[Array, " b"]
    local: Float[Array, " b"]


def table_entry(uniform: Float[Array, " b"], schedule: Schedule) -> Int[Array, " b"]:
    """Entry of the stage's tables for a uniform draw in [0, 1)."""
    return jnp.floor(uniform * schedule.num_train_timesteps).astype(jnp.int32)


def stage_pair(
    schedule: Schedule,
    stage: int,
    clean: Float[Array, "b t h w c"],
    lower: Float[Array, "b t h//2 w//2 c"] | None,
    noise: Float[Array, "b t h w c"],
) -> tuple[Float[Array, "b t h w c"], Float[Array, "b t h w c"]]:
    """Both ends of the stage's flow, sharing one ``noise`` (already at the stage's resolution).

    ``y_start = start * eps + (1 - start) * Up(z_{i-1})`` (stage 0: eps), ``y_end = end * eps + (1 - end) * z_i`` (last
    stage: z). ``lower`` is the clean latent one stage below, not used at stage 0.
    """
    start, end = float(schedule.start_sigmas[stage]), float(schedule.end_sigmas[stage])
    y_start = noise if stage == 0 else start * noise + (1 - start) * double(lower)
    y_end = clean if stage == schedule.stages - 1 else end * noise + (1 - end) * clean
    return y_start, y_end


def per_row(values: Float[Array, " b"], like: Array) -> Array:
    """One value per sample, ready to be multiplied with an array of samples."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def blend(y_start: Array, y_end: Array, local: Float[Array, " b"]) -> Array:
    """``z_s = s * y_start + (1 - s) * y_end`` with one local noise level per sample."""
    local = per_row(local, y_start)
    return local * y_start + (1 - local) * y_end


def clip_at(
    schedule: Schedule,
    stage: int,
    clean: Float[Array, "b t h w c"],
    lower: Float[Array, "b t h//2 w//2 c"] | None,
    noise: Float[Array, "b t h w c"],
    local: Float[Array, " b"],
) -> NoisyClip:
    """Noisy input, target ``y_start - y_end`` and timestep at given local noise, which need not be in the tables."""
    y_start, y_end = stage_pair(schedule, stage, clean, lower, noise)
    return NoisyClip(blend(y_start, y_end, local), y_start - y_end, schedule.timestep(stage, local), local)


def noisy_clip(
    schedule: Schedule,
    stage: int,
    clean: Float[Array, "b t h w c"],
    lower: Float[Array, "b t h//2 w//2 c"] | None,
    noise: Float[Array, "b t h w c"],
    uniform: Float[Array, " b"],
) -> NoisyClip:
    """Noisy input, target ``y_start - y_end``, timestep and local noise for uniform draws ``uniform``."""
    y_start, y_end = stage_pair(schedule, stage, clean, lower, noise)
    entry = table_entry(uniform, schedule)
    local = jnp.asarray(schedule.sigmas_per_stage[stage], jnp.float32)[entry]
    timestep = jnp.asarray(schedule.timesteps_per_stage[stage])[entry]
    return NoisyClip(blend(y_start, y_end, local), y_start - y_end, timestep, local)


def per_sample_loss(
    prediction: Float[Array, "b t h w c"], target: Float[Array, "b t h w c"], valid: Float[Array, "b t"] | None = None
) -> Float[Array, " b"]:
    """Mean squared error of each sample in float32, over the frames where ``valid`` is 1 (default: all)."""
    error = jnp.square(prediction.astype(jnp.float32) - target.astype(jnp.float32))
    per_frame = jnp.mean(error, axis=tuple(range(2, error.ndim)))
    return jnp.mean(per_frame, axis=1) if valid is None else jnp.sum(per_frame * valid, 1) / jnp.sum(valid, 1)


def flow_loss(predictions: Sequence[Array], targets: Sequence[Array]) -> Float[Array, ""]:
    """Mean over the samples of all columns of ``per_sample_loss``; every sample counts the same at any resolution."""
    losses = [per_sample_loss(*pair) for pair in zip(predictions, targets, strict=True)]
    return jnp.mean(jnp.concatenate(losses))
