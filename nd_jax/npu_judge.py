"""Judged accuracy of a bundle's videos beside the JAX system's: same prompts, same noise, prompt by prompt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nd_jax.converters.runtime.pipeline import Pipeline
from nd_jax.data import judge
from nd_jax.data.source import prompts as world_prompts
from nd_jax.data.world import world_named
from nd_jax.errors import UserError
from nd_jax.evaluate import bootstrap_interval
from nd_jax.generate import generate
from nd_jax.system import VideoSystem


@dataclass(frozen=True)
class Paired:
    """Mean accuracies over all attributes, and the bundle's minus JAX's with its 95 % interval over prompts."""

    prompts: int
    jax: float
    bundle: float
    low: float
    high: float
    pixel_error: float
    """Mean absolute difference of the videos, in grey levels."""

    def lines(self) -> list[str]:
        """For people."""
        return [
            f"{self.prompts} prompts, same noise: JAX {self.jax:.1%}, bundle {self.bundle:.1%}",
            f"difference {self.bundle - self.jax:+.1%}, 95 % interval [{self.low:+.1%}, {self.high:+.1%}]",
            f"mean absolute difference of pixels: {self.pixel_error:.2f} grey levels",
        ]


def judge_bundle(
    bundle: Path,
    system: VideoSystem,
    count: int,
    *,
    seed: int = 0,
    threads: int = 0,
    precision: str = "deployed",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Paired:
    """Make ``count`` videos with both and judge them. Raises UserError for videos that are not of the shapes world."""
    world, pipeline = world_named("64x64"), Pipeline(bundle, precision=precision, threads=threads)
    about = pipeline.bundle["video"]
    if (about["height"], about["width"]) != (world.height, world.width):
        raise UserError(f"{bundle}: videos of {about['height']}x{about['width']}; the judge reads 64x64 only")
    captions, labels = world_prompts(world, "seen", count, seed=seed + 1)
    made = []
    for index, caption in enumerate(captions):
        made.append(pipeline.video(caption, seed=seed, sample_name=index))
        progress(index + 1, count)
    videos = generate(system, captions, seed=seed)
    right = [(judge.read_labels(each, world) == labels).mean(axis=(1, 2)) for each in (videos, made)]
    low, high = bootstrap_interval(right[1] - right[0])
    error = np.abs(np.asarray(made, np.int16) - videos).mean()
    return Paired(count, float(right[0].mean()), float(right[1].mean()), low, high, float(error))
