"""Training examples: clean latents, a unit and random draws -> what the denoiser sees and what it should answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from nd_jax.pyramid.history import corrupt, exact_history, gather_history
from nd_jax.pyramid.layout import Envelope, UnitIndex, clip_times, unit_frames
from nd_jax.pyramid.resample import latent_pyramid, noise_at_level
from nd_jax.pyramid.schedule import Schedule
from nd_jax.pyramid.targets import clip_at, noisy_clip


class FlowExample(NamedTuple):
    """One column of a flow-matching batch.

    ``clips``: corrupted history (oldest first) and the noisy current clip, ready for the denoiser; ``target``: velocity
    of the current clip; ``timestep`` and ``local`` (noise within the stage): [B] float32; ``valid``: 1 for real frames
    of the current clip, [B or 1, T] (0 only in front of unit 0 when units have several frames); ``clean``: the current
    clip without noise, at the stage's resolution.
    """

    clips: tuple[Float[Array, "b t _ _ c"], ...]
    target: Float[Array, "b t h w c"]
    timestep: Float[Array, " b"]
    local: Float[Array, " b"]
    valid: Float[Array, "b t"]
    clean: Float[Array, "b t h w c"]


def history_noise_shapes(envelope: Envelope, batch: int, channels: int) -> tuple[tuple[int, ...], ...]:
    """Shapes of the noise arrays that corrupt the history, oldest clip first."""
    return tuple((batch, *clip, channels) for clip in envelope.clips[:-1])


def flow_example(
    envelope: Envelope,
    schedule: Schedule,
    latents: Float[Array, "b t h w c"],
    unit_index: UnitIndex,
    *,
    uniform: Float[Array, " b"] | None = None,
    local: Float[Array, " b"] | None = None,
    noise: Float[Array, "b f h w c"],
    corrupt_uniform: Float[Array, " b"] | None = None,
    history_noise: Sequence[Float[Array, "b t _ _ c"]] = (),
    corrupt_ratio: float = 1 / 3,
) -> FlowExample:
    """A column in the padded envelope; ``unit_index`` (scalar or [B], the trained unit) may be traced and may differ.

    ``latents`` are all clean normalised frames at full size; ``uniform`` draws in [0, 1) choose the local noise from
    the training tables, unless ``local`` gives it; ``noise`` is white noise for the current unit at FULL size
    (``f = frames_per_unit``); ``history_noise`` has the shapes of ``history_noise_shapes``. Without
    ``corrupt_uniform`` the history stays clean.
    """
    level = envelope.stage
    pyramid = latent_pyramid(latents, envelope.stages)
    times = jnp.broadcast_to(clip_times(envelope, unit_index)[-1], (latents.shape[0], envelope.frames_per_unit))
    pick = jnp.maximum(times, 0)[..., None, None, None]
    clean = jnp.take_along_axis(pyramid[level], pick, axis=1, mode="clip")
    lower = jnp.take_along_axis(pyramid[level - 1], pick, axis=1, mode="clip") if level else None
    eps = noise_at_level(noise, level, envelope.stages)
    make, how = (noisy_clip, uniform) if local is None else (clip_at, local)
    current = make(schedule, level, clean, lower, eps, how)
    history = gather_history(envelope, pyramid, unit_index)
    if corrupt_uniform is not None:
        history = corrupt(history, history_noise, corrupt_uniform, corrupt_ratio)
    valid = (times >= 0).astype(jnp.float32)
    return FlowExample((*history, current.noisy), current.target, current.timestep, current.local, valid, clean)


def exact_example(
    schedule: Schedule,
    pyramid: Sequence[Float[Array, "b t _ _ c"]],
    stage: int,
    units: int,
    *,
    uniform: Float[Array, " b"],
    noise: Float[Array, "b t h w c"],
    corrupt_uniform: Float[Array, " b"],
    history_noise: Sequence[Float[Array, "b t _ _ c"]],
    corrupt_ratio: float = 1 / 3,
    frames_per_unit: int = 1,
) -> FlowExample:
    """A column without padding: the last of the first ``units`` units is trained, those before it are its history.

    ``pyramid`` holds all clean frames per level, lowest first; ``noise`` is white noise for all frames at full size;
    ``history_noise`` has one array per history clip, oldest first.
    """
    spans = [unit_frames(unit, frames_per_unit) for unit in range(units)]
    now = spans[-1]
    eps = noise_at_level(noise[:, now], stage, schedule.stages)
    lower = pyramid[stage - 1][:, now] if stage else None
    clean = pyramid[stage][:, now]
    current = noisy_clip(schedule, stage, clean, lower, eps, uniform)
    history = exact_history([[level[:, span] for span in spans[:-1]] for level in pyramid], stage)
    history = corrupt(history, history_noise, corrupt_uniform, corrupt_ratio)
    valid = jnp.ones((1, eps.shape[1]))
    return FlowExample((*history, current.noisy), current.target, current.timestep, current.local, valid, clean)
