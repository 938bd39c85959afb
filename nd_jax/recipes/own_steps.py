"""Backward simulation: inputs of a few-step student as its own earlier steps in the stage leave them, rather than as
noise on data does (Yin et al., arXiv 2405.14867, section 4.5)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from nd_jax.pyramid.clean import renewed_step
from nd_jax.pyramid.schedule import Schedule
from nd_jax.pyramid.targets import NoisyClip, per_row
from nd_jax.recipes.packed import Packed


def own_steps(
    velocity: Callable[[Packed], Sequence[Array]],
    packed: Packed,
    schedule: Schedule,
    stages: Sequence[int],
    steps: Sequence[int],
    noise: Sequence[Float[Array, "b n t h w c"]] | None = None,
) -> list[Float[Array, "b t h w c"]]:
    """Per column the latents at each row's own ``local`` level, after steps from the start of its stage: Euler steps,
    or with ``noise`` (fresh for each of the ``max(steps) - 1`` steps) those of ``clean.renewed_step``.

    ``velocity`` is the student; ``stages`` and ``steps`` are the columns' stages and how many steps the student takes
    there on the plain grid, to which all levels belong. Rows whose level is reached wait for the others, so that one
    loop of ``max(steps) - 1`` calls serves all. The starts are those of the clips themselves: their data and noise.
    """
    examples = packed.examples

    def step(index: Array, clips: list[Array]) -> list[Array]:
        levels = [
            jnp.full_like(each.local, jnp.maximum(1 - index / n, 0)) for each, n in zip(examples, steps, strict=True)
        ]
        times = [schedule.timestep(stage, s) for stage, s in zip(stages, levels, strict=True)]
        parts = zip(clips, examples, times, levels, strict=True)
        answers = velocity(packed.at([NoisyClip(z, each.target, t, s) for z, each, t, s in parts]))
        if noise is None:
            moved = [z - v / n for z, v, n in zip(clips, answers, steps, strict=True)]
        else:
            moved = [
                renewed_step(z, v, fresh[:, index], 1 - index / n, jnp.maximum(1 - (index + 1) / n, 0), schedule, stage)
                for z, v, n, fresh, stage in zip(clips, answers, steps, noise, stages, strict=True)
            ]
        early = [s > each.local + 0.5 / n for s, each, n in zip(levels, examples, steps, strict=True)]
        return [jnp.where(per_row(e, z), m, z) for e, m, z in zip(early, moved, clips, strict=True)]

    starts = [each.clips[-1] + per_row(1 - each.local, each.target) * each.target for each in examples]
    return jax.lax.fori_loop(0, max(steps) - 1, step, starts)
