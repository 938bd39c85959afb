"""Self-forcing: a few-step student's own videos, as training inputs and histories (Huang et al., arXiv 2506.08009).

The whole rollout is one scan over the units inside the training step: history, jumps between stages and steps are the
sampler's, without gradient. What it leaves behind is every unit and the input of every step on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nd_jax.models.system import Conditions
from nd_jax.pyramid.clean import renewed_step
from nd_jax.pyramid.history import gather_history
from nd_jax.pyramid.layout import Envelope, layout_arrays
from nd_jax.pyramid.renoise import block_noise, jump
from nd_jax.pyramid.resample import latent_pyramid
from nd_jax.pyramid.schedule import Schedule
from nd_jax.recipes.flow_matching import normals


class Rollout(NamedTuple):
    """``units``: finished normalised latents. ``inputs``: per stage what each step of each unit began with."""

    units: Float[Array, "b u h w c"]
    inputs: tuple[Float[Array, "b u n 1 _ _ c"], ...]

    def input(self, stage: int, unit: Int[Array, " b"], local: Float[Array, " b"]) -> Float[Array, "b 1 _ _ c"]:
        """Each row's input at its unit and at its level ``local`` of the plain grid."""
        steps = self.inputs[stage].shape[2]
        step = jnp.round((1 - local) * steps).astype(jnp.int32)
        return self.inputs[stage][jnp.arange(len(unit)), unit, step]

    def padded(self, rows: int) -> Rollout:
        """With rows of zeros behind, ``rows`` in all."""
        return jax.tree.map(lambda x: jnp.pad(x, [(0, rows - len(x)), *[(0, 0)] * (x.ndim - 1)]), self)


def roll_out(
    denoise: Callable[..., Sequence[Array]],
    envelopes: Sequence[Envelope],
    schedule: Schedule,
    steps: Sequence[int],
    conditions: Conditions,
    key: jax.Array,
    *,
    channels: int,
    renew: bool = False,
) -> Rollout:
    """One video of ``envelopes[0].units + 1`` units for each row of the conditions, sampled as a ``SamplePlan`` on the
    plain grid with ``steps`` in each stage would.

    ``denoise`` takes the denoiser's inputs (``MMDiT.__call__``) for one group.
    """
    rows, units = len(conditions.text), envelopes[0].units + 1
    sizes = [(*envelope.clips[-1], channels) for envelope in envelopes]

    def one_unit(finished: list[Array], now: tuple[Array, jax.Array]) -> tuple[list[Array], tuple]:
        unit, key = now
        fresh = [(n, *size) for n, size in zip(steps, sizes, strict=True)] if renew else []
        noise = normals(key, rows, [*sizes, *fresh])
        z, inputs = noise[0], []
        for stage, (envelope, n) in enumerate(zip(envelopes, steps, strict=True)):
            if stage:
                z = jump(z, block_noise(noise[stage], schedule.gamma), schedule, stage)
            history = gather_history(envelope, finished, unit)
            layout = layout_arrays(envelope, jnp.full(rows, unit), conditions.mask)
            again = jnp.moveaxis(noise[len(sizes) + stage], 1, 0) if renew else jnp.zeros(n)

            def step(z: Array, now: tuple, stage=stage, n=n, history=history, layout=layout) -> tuple[Array, Array]:
                index, fresh = now
                local = 1 - index / n
                times = jnp.full(rows, schedule.timestep(stage, local))
                clips = [(*history, z)]
                v = denoise(clips, conditions.text, conditions.pooled, times, [layout])[0].astype(jnp.float32)
                moved = renewed_step(z, v, fresh, local, 1 - (index + 1) / n, schedule, stage) if renew else z - v / n
                return moved, z

            z, before = jax.lax.scan(step, z, (jnp.arange(n), again))
            inputs.append(before)
        levels = latent_pyramid(z, len(envelopes))
        finished = [kept.at[:, unit].set(level[:, 0]) for kept, level in zip(finished, levels, strict=True)]
        return finished, tuple(inputs)

    empty = [jnp.zeros((rows, units, *size[1:])) for size in sizes]
    finished, inputs = jax.lax.scan(one_unit, empty, (jnp.arange(units), jax.random.split(key, units)))
    return Rollout(finished[-1], tuple(jnp.moveaxis(x, 2, 0) for x in inputs))


def motion_by_unit(
    rollout: Float[Array, "b u h w c"], data: Float[Array, "b u h w c"] | None = None
) -> dict[str, Float[Array, ""]]:
    """Mean change from the unit before, relative to that in ``data`` if given: where a closed loop stands still."""

    def change(latents: Array) -> Array:
        return jnp.mean(jnp.abs(jnp.diff(latents, axis=1)), axis=(0, 2, 3, 4))

    found = change(rollout) / (1.0 if data is None else change(data) + 1e-6)
    return {f"unit_{unit + 1}": value for unit, value in enumerate(found)}
