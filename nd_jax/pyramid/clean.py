"""From a stage's noisy latent and its velocity to the clean latent of that stage, and back to noise (Neodragon, arXiv
2511.06055, pyramidal DMD).

Along the velocity the noisy latent reaches global noise 0 at

``z^ = z_s - sigma / (start_i - end_i) * v``, ``sigma = s * start_i + (1 - s) * end_i``.

That is the stage's end only where ``end_i = 0``. Since the stage starts from ``Up(Down(z_i))``, the true velocity gives
``(1 + c) z_i - c Up(Down(z_i))`` with ``c = end (1 - start) / (start - end)``: 0, 1/7, 0 for three equal stages, so the
middle stage comes out sharper than it is. ``Down`` undoes ``Up``, hence ``z_i = (z^ + c Up(Down(z^))) / (1 + c)``.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from nd_jax.pyramid.resample import double, halve
from nd_jax.pyramid.schedule import Schedule
from nd_jax.pyramid.targets import NoisyClip, clip_at, per_row


def oversharpening(schedule: Schedule, stage: int) -> float:
    """The factor ``c`` by which the raw prediction exaggerates the latent's detail; 0 for the first and last stage."""
    start, end = float(schedule.start_sigmas[stage]), float(schedule.end_sigmas[stage])
    return end * (1 - start) / (start - end)


def clean_prediction(
    schedule: Schedule,
    stage: int,
    noisy: Float[Array, "b t h w c"],
    velocity: Float[Array, "b t h w c"],
    local: Float[Array, " b"],
    *,
    exact: bool = True,
) -> Float[Array, "b t h w c"]:
    """The clean latent of ``stage`` that ``velocity`` at ``noisy`` points to; ``local`` is each row's local noise.

    ``exact`` returns ``z_i`` for the true velocity; without it, this is the paper's formula, sharper by
    ``oversharpening``. Heights and widths are even wherever that is not 0.
    """
    start, end = float(schedule.start_sigmas[stage]), float(schedule.end_sigmas[stage])
    sigma = per_row(schedule.global_sigma(stage, local), noisy)
    raw = noisy - sigma / (start - end) * velocity
    excess = oversharpening(schedule, stage)
    return (raw + excess * double(halve(raw))) / (1 + excess) if exact and excess else raw


def renoised(
    schedule: Schedule,
    stage: int,
    clean: Float[Array, "b t h w c"],
    noise: Float[Array, "b t h w c"],
    local: Float[Array, " b"],
) -> NoisyClip:
    """A clean prediction put back on the stage's flow with fresh ``noise`` of its own size, at local noise ``local``.

    ``y_start^ = (1 - start) Up(Down(z^)) + start eps``, ``y_end^ = (1 - end) z^ + end eps``; ``noisy`` lies between
    them, ``target`` is ``y_start^ - y_end^``.
    """
    return clip_at(schedule, stage, clean, halve(clean) if stage else None, noise, local)


def renewed_step(
    noisy: Float[Array, "b t h w c"],
    velocity: Float[Array, "b t h w c"],
    noise: Float[Array, "b t h w c"],
    local: Any,
    local_next: Any,
    schedule: Schedule,
    stage: int,
) -> Float[Array, "b t h w c"]:
    """A few-step student's step: its exact clean prediction, put back on the flow at ``local_next`` with fresh noise.

    An Euler step would keep the noise it came with. Distribution matching makes the clean prediction right, and that is
    largely a function of this noise: together they are not distributed as a stage's end is, where both are independent.
    Local noise levels are scalars. The last step of the last stage is the same either way.
    """
    rows = jnp.ones(noisy.shape[0], jnp.float32)
    clean = clean_prediction(schedule, stage, noisy, velocity, rows * local)
    return renoised(schedule, stage, clean, noise, rows * local_next).noisy.astype(noisy.dtype)
