"""Block influence of a whole system: sampled videos, every denoising step, both guidance branches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from nd_jax.errors import UserError
from nd_jax.generate import Generator, Noise, needs_negative
from nd_jax.models.system import Conditions
from nd_jax.pyramid.sampler import SamplePlan
from nd_jax.recipes.pruning import BlockInfluence
from nd_jax.system import VideoSystem


def block_influence(
    system: VideoSystem,
    prompts: Sequence[str],
    *,
    seed: int = 0,
    samples: int = 1,
    plan: SamplePlan | None = None,
    batch: int = 8,
    generator: Generator | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> BlockInfluence:
    """Influence of every removable block, averaged over prompts, samples, units, steps and guidance branches; whole
    and by stage.

    ``samples`` videos of every prompt (the paper: 100 prompts, 5 samples). ``plan`` and size default to the system's
    own, ``batch`` videos run at a time. Raises UserError without prompts or samples.
    """
    plan, total, done = system.sampling if plan is None else plan, 0.0, 0
    generator = generator or generator_of(system)
    for conditions, negative, noise in sampled_batches(
        generator, prompts, plan, seed=seed, samples=samples, batch=batch, name="influence"
    ):
        _, sums = generator.latents(conditions, noise, plan, negative=negative, influence=True)
        total = total + np.asarray(sums, np.float64)
        done += len(conditions.mask)
        progress(done, len(prompts) * samples)
    return BlockInfluence.from_sums(total)


def generator_of(system: VideoSystem) -> Generator:
    """A generator of the size and length that the system's folder asks for."""
    video = system.video
    return Generator(system, height=video.height, width=video.width, frames=video.frames)


def sampled_batches(
    generator: Generator,
    prompts: Sequence[str],
    plan: SamplePlan,
    *,
    seed: int,
    samples: int,
    batch: int,
    name: str,
) -> Iterator[tuple[Conditions, Conditions | None, Noise]]:
    """Conditions, negative conditions (where the plan has guidance) and named noise of ``samples`` videos of every
    prompt, ``batch`` at a time. Raises UserError without prompts, samples or batch.
    """
    if not prompts or samples < 1 or batch < 1:
        raise UserError(
            f"block {name}: {'no' if not prompts else len(prompts)} prompts, {samples} samples, {batch} at a time; "
            "expected at least one of each"
        )
    rows = [(n, prompt, sample) for n, prompt in enumerate(prompts) for sample in range(samples)]
    system = generator.system
    for start in range(0, len(rows), batch):
        chosen = rows[start : start + batch]
        conditions, _ = system.conditions([prompt for _, prompt, _ in chosen])
        negative = system.conditions([""] * len(chosen))[0] if needs_negative(plan) else None
        yield conditions, negative, generator.noise(seed, [f"{name}-{n}-{sample}" for n, _, sample in chosen])
