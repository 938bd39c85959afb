"""Candidates put to the test: what videos and velocities lose without some blocks.

A candidate is a row of ``recipes.pruning.population``, int32 indices of the blocks that stay. The denoiser gathers
them inside its scan, so a whole population runs in the programs of one, and does not compute what it drops.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from nd_jax.data.source import prompts as world_prompts
from nd_jax.data.world import World
from nd_jax.evaluate import judge_videos
from nd_jax.generate import Generator, generate, needs_negative, with_negative
from nd_jax.influence import generator_of, sampled_batches
from nd_jax.models.system import DENOISER
from nd_jax.pyramid.layout import layout_arrays
from nd_jax.pyramid.sampler import CountingJit, SamplePlan, guide, sample, twice
from nd_jax.recipes.pruning import population
from nd_jax.system import VideoSystem

Progress = Callable[[int, int], None]


def without_each(system: VideoSystem) -> Int[np.ndarray, "k k-1"]:
    """The population that leaves out one block each, in order; the last block is no candidate."""
    blocks = system.config.diffusion_transformer.num_layers - 1
    return population(blocks, [(k,) for k in range(blocks)])


class OutputError:
    """How far candidates' velocities are from the full denoiser's on the same inputs.

    The inputs are those that the full denoiser meets while it samples: every unit, stage, step and guidance branch,
    with the history that it made itself. Only the current clip leaves the network, so padding never counts.
    """

    def __init__(self, generator: Generator):
        denoiser = generator.system.definitions[DENOISER]
        self.generator = generator
        self._stages = {
            guided: [CountingJit(partial(_step, denoiser, envelope, guided=guided)) for envelope in generator.envelopes]
            for guided in (False, True)
        }

    @property
    def compilations(self) -> int:
        """Programs compiled so far: one for each stage, however many candidates."""
        return sum(stage.compilations for stages in self._stages.values() for stage in stages)

    def __call__(
        self,
        prompts: Sequence[str],
        candidates: Int[np.ndarray, "p k"],
        *,
        seed: int = 0,
        samples: int = 1,
        plan: SamplePlan | None = None,
        batch: int = 8,
        progress: Progress = lambda done, total: None,
    ) -> Float[np.ndarray, "stages p"]:
        """Mean squared error of every candidate's velocity at every stage. Raises UserError without prompts."""
        generator, system = self.generator, self.generator.system
        plan = system.sampling if plan is None else plan
        stages, params = self._stages[needs_negative(plan)], system.on_device[DENOISER]
        sums, counts, done = np.zeros((len(stages), len(candidates))), np.zeros((len(stages), 1)), 0
        for conditions, negative, noise in sampled_batches(
            generator, prompts, plan, seed=seed, samples=samples, batch=batch, name="output error"
        ):
            asked, rows = with_negative(plan, conditions, negative)
            found: list[list[jax.Array]] = [[] for _ in stages]

            def velocity(stage: int, rows=rows, found=found):
                def run(*inputs):
                    v, errors = stages[stage](params, rows, candidates, *inputs)
                    found[stage].append(errors)
                    return v

                return run

            draws = noise.initial, noise.block
            sample(velocity, generator.envelopes, system.schedule, asked, *draws, fresh_noise=noise.fresh)
            for stage, errors in enumerate(found):
                sums[stage] += np.sum(np.asarray(errors, np.float64), axis=(0, 2))
                counts[stage] += len(errors) * errors[0].shape[1]
            done += len(conditions.mask)
            progress(done, len(prompts) * samples)
        return sums / counts


def _step(denoiser, envelope, params, conditions, candidates, z, timestep, history, unit, scale, *, guided):
    """The full denoiser's velocity, guidance included, and every candidate's error in every row, [P, rows]."""
    if guided:
        z, timestep, history = twice(z), twice(timestep), tuple(map(twice, history))
    layout = layout_arrays(envelope, unit, conditions.mask)

    def answer(kept=None):
        inputs = [(*history, z)], conditions.text, conditions.pooled, timestep, [layout]
        return denoiser(params, *inputs, kept=kept)[0].astype(jnp.float32)

    full = answer()
    errors = jax.lax.map(lambda kept: jnp.mean(jnp.square(answer(kept) - full), axis=(1, 2, 3, 4)), candidates)
    return (guide(full, scale) if guided else full), errors


def output_error(
    system: VideoSystem,
    prompts: Sequence[str],
    candidates: Int[np.ndarray, "p k"] | None = None,
    *,
    generator: Generator | None = None,
    **options,
) -> Float[np.ndarray, "stages p"]:
    """``OutputError`` of candidates, by default of those without one block; ``options`` are those of its call."""
    candidates = without_each(system) if candidates is None else candidates
    return OutputError(generator or generator_of(system))(prompts, candidates, **options)


def judged_accuracy(
    system: VideoSystem,
    world: World,
    candidates: Int[np.ndarray, "p k"] | None = None,
    *,
    split: str = "train",
    plain: bool = False,
    count: int = 48,
    seed: int = 0,
    batch: int = 16,
    generator: Generator | None = None,
    progress: Progress = lambda done, total: None,
) -> tuple[float, Float[np.ndarray, " p"]]:
    """Judged accuracy of the full system's videos, and of every candidate's (default: those without one block).

    All start from the same prompts and noise. The candidates share their programs.
    """
    candidates = without_each(system) if candidates is None else candidates
    generator = generator or generator_of(system)
    captions, labels = world_prompts(world, split, count, seed=seed + 1, plain=plain)

    def accuracy(kept: Int[np.ndarray, " k"] | None) -> float:
        videos = generate(system, captions, seed=seed, batch=batch, generator=generator, kept=kept)
        return judge_videos(videos, labels, world)[0].mean

    full, each = accuracy(None), []
    for kept in candidates:
        each.append(accuracy(kept))
        progress(len(each), len(candidates))
    return full, np.array(each)
