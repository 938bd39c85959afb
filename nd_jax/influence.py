"""Block influence of a whole system: sampled videos, every denoising step, both guidance branches."""

from __future__ import annotations

from collections.abc import Sequence

from nd_jax.generate import Generator, needs_negative, sample_plan
from nd_jax.pyramid.sampler import SamplePlan
from nd_jax.recipes.pruning import BlockInfluence
from nd_jax.system import VideoSystem


def block_influence(
    system: VideoSystem,
    prompts: Sequence[str],
    *,
    seed: int = 0,
    plan: SamplePlan | None = None,
    generator: Generator | None = None,
) -> BlockInfluence:
    """Influence of every removable block, averaged over prompts, units, stages, steps and guidance branches.

    One sample per prompt; repeat prompts for more. ``plan`` and size default to the system's own.
    """
    plan = sample_plan(system.sampling) if plan is None else plan
    video = system.video
    if generator is None:
        generator = Generator(system, height=video.height, width=video.width, frames=video.frames)
    conditions, _ = system.conditions(prompts)
    negative = system.conditions([""] * len(prompts))[0] if needs_negative(plan) else None
    noise = generator.noise(seed, [f"influence-{n}" for n in range(len(prompts))])
    _, sums = generator.latents(conditions, noise, plan, negative=negative, influence=True)
    return BlockInfluence.from_sums(sums)
