"""Block influence of a whole system: sampled videos, every denoising step, both guidance branches."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from nd_jax.errors import UserError
from nd_jax.generate import Generator, needs_negative
from nd_jax.pyramid.sampler import SamplePlan
from nd_jax.recipes.pruning import BlockInfluence
from nd_jax.system import VideoSystem


def block_influence(
    system: VideoSystem,
    prompts: Sequence[str],
    *,
    seed: int = 0,
    plan: SamplePlan | None = None,
    batch: int = 8,
    generator: Generator | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> BlockInfluence:
    """Influence of every removable block, averaged over prompts, units, stages, steps and guidance branches.

    One sample per prompt; repeat prompts for more. ``plan`` and size default to the system's own, ``batch`` prompts
    run at a time. Raises UserError without prompts.
    """
    if not prompts:
        raise UserError("block influence: no prompts; expected at least one")
    plan = system.sampling if plan is None else plan
    video, total = system.video, 0
    if generator is None:
        generator = Generator(system, height=video.height, width=video.width, frames=video.frames)
    for start in range(0, len(prompts), batch):
        chosen = prompts[start : start + batch]
        conditions, _ = system.conditions(chosen)
        negative = system.conditions([""] * len(chosen))[0] if needs_negative(plan) else None
        noise = generator.noise(seed, [f"influence-{start + n}" for n in range(len(chosen))])
        _, sums = generator.latents(conditions, noise, plan, negative=negative, influence=True)
        total += sums
        progress(start + len(chosen), len(prompts))
    return BlockInfluence.from_sums(total)
