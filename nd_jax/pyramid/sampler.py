"""The sampling loop: units in order, each through all stages, each stage by Euler steps (arXiv 2410.05954, section 3).

The denoiser comes from outside as one function per stage. The loop itself runs on the host; because envelopes and the
buffers of finished frames have fixed shapes, each of those functions is compiled once, whatever the number of frames.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from nd_jax.errors import UserError
from nd_jax.pyramid.clean import renewed_step
from nd_jax.pyramid.history import gather_history
from nd_jax.pyramid.layout import Envelope, unit_frames
from nd_jax.pyramid.renoise import jump
from nd_jax.pyramid.resample import latent_pyramid, noise_at_level
from nd_jax.pyramid.schedule import GRIDS, Schedule, euler_step


class Velocity(Protocol):
    """A denoiser for one stage, guidance included. ``z`` and ``history`` have the shapes of the stage's envelope.

    ``guidance`` is a traced float32 scalar; denoisers without a negative prompt ignore it.
    """

    def __call__(
        self,
        z: Float[Array, "b f h w c"],
        timestep: Float[Array, " b"],
        history: tuple[Float[Array, "b t _ _ c"], ...],
        unit_index: Int[Array, ""],
        guidance: Float[Array, ""],
    ) -> Float[Array, "b f h w c"]: ...


@dataclass(frozen=True)
class SamplePlan:
    """Euler steps per stage and guidance; ``first`` for a unit without history, ``later`` for all others.

    With a given first-frame latent every generated unit is a later one. With ``renew`` every step ends with fresh
    noise on the clean prediction (``clean.renewed_step``) instead of an Euler step: for students of distribution
    matching.
    """

    first_steps: tuple[int, ...]
    later_steps: tuple[int, ...]
    first_guidance: float = 0.0
    later_guidance: float = 0.0
    grid: str = "official"
    renew: bool = False

    def __post_init__(self):
        for name in ("first_steps", "later_steps"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
            if any(n < 1 for n in getattr(self, name)):
                raise UserError(f"sampling: {name} is {list(getattr(self, name))}, expected at least 1 per stage")
        if self.grid not in GRIDS:
            raise UserError(f"sampling: unknown step grid '{self.grid}', expected one of {', '.join(GRIDS)}")


MONOLITHIC = SamplePlan((20, 20, 20), (10, 10, 10), 7.0, 5.0)
"""The official multi-step plan, with guidance."""

HYBRID = SamplePlan((1, 1, 1), (1, 1, 1))
"""The official few-step plan after a given first frame, without guidance."""


class Call(NamedTuple):
    """One denoiser call, for the trace. Arrays are on the device and possibly not computed yet.

    With several frames per unit, unit 0 is the last frame of ``sample_before`` and ``velocity``.
    """

    unit: int
    stage: int
    step: int
    timestep: Float[Array, " b"]
    sigma: np.float32
    sigma_next: np.float32
    sample_before: Float[Array, "b t h w c"]
    velocity: Float[Array, "b t h w c"]


class CountingJit:
    """``jax.jit`` that knows how often it has compiled: ``.compilations``."""

    def __init__(self, function: Callable, **jit_options: Any):
        self.compilations = 0

        def counted(*args, **kwargs):
            self.compilations += 1
            return function(*args, **kwargs)

        self._jit = jax.jit(counted, **jit_options)

    def __call__(self, *args, **kwargs):
        return self._jit(*args, **kwargs)


def twice(x: Array) -> Array:
    """Rows for guidance: the batch once for the negative prompt (first) and once for the prompt."""
    return jnp.concatenate([x, x], axis=0)


def guide(velocity: Float[Array, "2*b t h w c"], guidance: Any) -> Float[Array, "b t h w c"]:
    """Classifier-free guidance, ``v_uncond + w (v_cond - v_uncond)``; negative rows first."""
    negative, positive = jnp.split(velocity, 2, axis=0)
    return negative + jnp.asarray(guidance, velocity.dtype) * (positive - negative)


_euler = jax.jit(euler_step)
_renew = jax.jit(renewed_step, static_argnames=("schedule", "stage"))
_jump = jax.jit(jump, static_argnames=("schedule", "stage"))
_noise_at_level = jax.jit(noise_at_level, static_argnames=("level", "stages"))
_gather = jax.jit(gather_history, static_argnames=("envelope",))


@partial(jax.jit, static_argnames=("stages",), donate_argnames=("buffers",))
def _store(buffers: list[Array], clean: Array, time: Array, stages: int) -> list[Array]:
    """Writes one frame into the buffers of finished frames at every level; beyond their end it is not kept."""
    frames = latent_pyramid(clean, stages)
    return [b.at[:, time].set(f[:, 0], mode="drop") for b, f in zip(buffers, frames, strict=True)]


def _check(
    envelopes: Sequence[Envelope], schedule: Schedule, plan: SamplePlan, noise: Array, first: Array | None
) -> int:
    """Number of units, or ``UserError``."""
    top = envelopes[-1]
    if [e.stage for e in envelopes] != list(range(schedule.stages)) or top.stages != schedule.stages:
        raise UserError(f"sampling: expected one envelope for each of the {schedule.stages} stages, lowest first")
    if not len(plan.first_steps) == len(plan.later_steps) == schedule.stages:
        raise UserError(f"sampling: steps {plan.first_steps} / {plan.later_steps}; expected {schedule.stages} numbers")
    if noise.ndim != 5 or noise.shape[2:4] != (top.height, top.width):
        raise UserError(
            f"sampling: initial noise has shape {tuple(noise.shape)}, expected [B, T, {top.height}, {top.width}, C]"
        )
    units, rest = divmod(noise.shape[1] - 1, top.frames_per_unit)
    if rest or units < 0 or units > top.units:
        raise UserError(
            f"sampling: {noise.shape[1]} latent frames, expected 1 + {top.frames_per_unit} k for k = 0 .. {top.units}; "
            "for longer videos build envelopes with more units"
        )
    expected = (noise.shape[0], 1, *noise.shape[2:])
    if first is not None and tuple(first.shape) != expected:
        raise UserError(f"sampling: first-frame latent has shape {tuple(first.shape)}, expected {expected}")
    return units + 1


def _steps(
    schedule: Schedule, stage: int, n: int, grid: str, dtype: Any
) -> Iterator[tuple[np.float32, np.float32, np.float32]]:
    """(timestep, sigma, next sigma) of each step, rounded to the latents' dtype as the official code does."""
    timesteps, sigmas = (values.astype(dtype).astype(np.float32) for values in schedule.steps(stage, n, grid))
    return zip(timesteps, sigmas[:-1], sigmas[1:], strict=True)


def sample(
    velocity: Callable[[int], Velocity],
    envelopes: Sequence[Envelope],
    schedule: Schedule,
    plan: SamplePlan,
    initial_noise: Float[Array, "b t h w c"],
    block_noise: Sequence[Array] | Callable[[int, int], Array],
    *,
    fresh_noise: Callable[[int, int, int], Array] | None = None,
    first_latent: Float[Array, "b 1 h w c"] | None = None,
    trace: Callable[[Call], None] | None = None,
) -> Float[Array, "b t h w c"]:
    """Normalised latents of a video, in the dtype of ``initial_noise``.

    ``velocity(stage)`` gives the stage's denoiser; ``envelopes`` one per stage, with room for at least all units but
    the last. ``initial_noise`` is white, for all frames at full size; ``block_noise`` is a list in order of use or a
    function (unit, stage) -> [B, frames of the unit, h, w, C], needed for every stage but the lowest. A plan that
    renews its noise needs ``fresh_noise``, white of the same shapes: (unit, stage, step) -> noise. With
    ``first_latent`` (normalised) unit 0 is given and slice 0 of the noise is not used. ``trace`` is called after every
    denoiser call. Raises ``UserError`` for shapes that do not fit together.
    """
    units = _check(envelopes, schedule, plan, initial_noise, first_latent)
    if plan.renew and fresh_noise is None:
        raise UserError("sampling: the plan renews its noise at every step, but no fresh_noise was given")
    top, batch, channels = envelopes[-1], initial_noise.shape[0], initial_noise.shape[-1]
    dtype = jax.dtypes.canonicalize_dtype(initial_noise.dtype)
    draw_block = _block_noise_function(block_noise)
    capacity = max(1, (top.units - 1) * top.frames_per_unit + 1)
    finished = [jnp.zeros((batch, capacity, *top.size(i), channels), dtype) for i in range(top.stages)]

    def fill(x: Array) -> Array:  # the one frame of unit 0 stands last in its slot of several frames
        missing = top.frames_per_unit - x.shape[1]
        x = jnp.asarray(x, dtype)
        return jnp.pad(x, ((0, 0), (missing, 0), (0, 0), (0, 0), (0, 0))) if missing else x

    def generate(unit: int, z: Array) -> Array:
        counts, guidance = (
            (plan.first_steps, plan.first_guidance) if unit == 0 else (plan.later_steps, plan.later_guidance)
        )
        index, guidance = np.int32(unit), np.float32(guidance)
        for stage, envelope in enumerate(envelopes):
            if stage:
                noise = draw_block(unit, stage)
                found = "missing" if noise is None else tuple(noise.shape)
                expected = (batch, 1 if unit == 0 else top.frames_per_unit, *top.size(stage), channels)
                if found != expected:
                    raise UserError(
                        f"sampling: block noise of unit {unit}, stage {stage}: {found}, expected shape {expected}"
                    )
                z = _jump(z, fill(noise), schedule=schedule, stage=stage)
            history, denoise = _gather(envelope, finished, index), velocity(stage)
            for step, (t, s, s_next) in enumerate(_steps(schedule, stage, counts[stage], plan.grid, dtype)):
                before, timestep = z, jnp.full((batch,), t)
                v = denoise(z, timestep, history, index, guidance)
                if plan.renew and (s_next > 0 or stage + 1 < schedule.stages):
                    z = _renew(z, v, fill(fresh_noise(unit, stage, step)), s, s_next, schedule=schedule, stage=stage)
                else:
                    z = _euler(z, v, s, s_next)
                if trace is not None:
                    trace(Call(unit, stage, step, timestep, s, s_next, before, v))
        return z

    out = []
    for unit in range(units):
        span = unit_frames(unit, top.frames_per_unit)
        if unit == 0 and first_latent is not None:
            clean = jnp.asarray(first_latent, dtype)
        else:
            noise = _noise_at_level(fill(initial_noise[:, span]), level=0, stages=top.stages)
            clean = generate(unit, noise)[:, span.start - span.stop :]
        for offset in range(clean.shape[1]):
            frame = clean[:, offset : offset + 1]
            finished = _store(finished, frame, np.int32(span.start + offset), stages=top.stages)
        out.append(clean)
    return jnp.concatenate(out, axis=1)


def _block_noise_function(block_noise: Sequence[Array] | Callable) -> Callable[[int, int], Array | None]:
    if callable(block_noise):
        return block_noise
    queue = iter(block_noise)
    return lambda unit, stage: next(queue, None)
