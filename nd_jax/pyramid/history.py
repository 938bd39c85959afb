"""Finished units as the clean context of the next one: the temporal pyramid (arXiv 2410.05954, section 3.3)."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

from nd_jax.pyramid.layout import Envelope, UnitIndex, clip_times, history_plan
from nd_jax.pyramid.resample import latent_pyramid


def exact_history(pyramid: Sequence[Sequence[Array]], stage: int) -> list[Float[Array, "b t h w c"]]:
    """History clips without padding, oldest first, from ``pyramid[level][unit]`` ([B, frames, h, w, C], oldest first).

    An empty history gives an empty list.
    """
    units = len(pyramid[0])
    return [
        jnp.concatenate([pyramid[slot.level][units - back] for back in range(slot.oldest, slot.newest - 1, -1)], axis=1)
        for slot in history_plan(stage, units)
    ]


def unit_history(units: Sequence[Float[Array, "b t h w c"]], stages: int) -> list[list[Float[Array, "b t _ _ c"]]]:
    """For every stage, the history clips of the given clean full-size units, as in sampling."""
    levels = list(zip(*[latent_pyramid(unit, stages) for unit in units], strict=True)) if units else [[]] * stages
    return [exact_history(levels, stage) for stage in range(stages)]


def gather_history(
    envelope: Envelope, pyramid: Sequence[Float[Array, "b t _ _ c"]], unit_index: UnitIndex
) -> tuple[Float[Array, "b t _ _ c"], ...]:
    """The envelope's history clips, oldest first, from frames kept at every level (lowest first); zeros where empty.

    Frames at or after the current unit are never read. ``unit_index`` is a scalar or [B], and may be traced.
    """
    clips = []
    for slot, times in zip(envelope.slots, clip_times(envelope, unit_index), strict=False):
        frames = pyramid[slot.level]
        times = jnp.broadcast_to(times, (frames.shape[0], times.shape[1]))
        picked = jnp.take_along_axis(frames, jnp.maximum(times, 0)[..., None, None, None], axis=1, mode="clip")
        clips.append(jnp.where(times[..., None, None, None] >= 0, picked, 0))
    return tuple(clips)


def history_slots(
    envelope: Envelope, latents: Float[Array, "b t h w c"], unit_index: UnitIndex
) -> tuple[Float[Array, "b t _ _ c"], ...]:
    """The envelope's history clips from clean full-size latent frames 0 .. T-1; zeros where empty."""
    return gather_history(envelope, latent_pyramid(latents, envelope.stages), unit_index)


def corrupt(
    clips: Sequence[Float[Array, "b t _ _ c"]],
    noises: Sequence[Float[Array, "b t _ _ c"]],
    uniform: Float[Array, " b"],
    ratio: float = 1 / 3,
) -> tuple[Float[Array, "b t _ _ c"], ...]:
    """``k n + (1 - k) z`` with one strength ``k = ratio * uniform`` per sample, shared by all its clips.

    ``noises`` are in the order of ``clips`` (oldest first). Training does this, sampling does not.
    """
    strength = (uniform * ratio).reshape(-1, 1, 1, 1, 1)
    return tuple(strength * noise + (1 - strength) * clip for clip, noise in zip(clips, noises, strict=True))
