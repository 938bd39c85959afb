"""Errors to scores with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

RESAMPLES = 1000


class Score(NamedTuple):
    """Mean error over noise levels, prompts and seeds, and its 95 % bootstrap interval over prompts and seeds."""

    error: float
    low: float
    high: float


def bootstrap_weights(prompts: int, samples: int = 1, seed: int = 0) -> Float[np.ndarray, "r videos"]:
    """How much every video counts in each resample; videos in order of prompts, a prompt's ``samples`` side by side.

    Prompts are drawn with replacement, and for each the seeds of its videos. Candidates share the weights, so their
    differences can be read too.
    """
    rng = np.random.Generator(np.random.Philox(seed))
    drawn = rng.multinomial(prompts, np.full(prompts, 1 / prompts), size=RESAMPLES)
    if samples == 1:
        return drawn / prompts
    videos = rng.multinomial(drawn * samples, np.full(samples, 1 / samples))
    return videos.reshape(RESAMPLES, -1) / (prompts * samples)


def score(errors: Float[np.ndarray, "levels videos"], weights: Float[np.ndarray, "r videos"]) -> Score:
    """Every noise level counts alike."""
    each = np.asarray(errors, np.float64).mean(axis=0)
    low, high = np.percentile(weights @ each, (2.5, 97.5))
    return Score(float(each.mean()), float(low), float(high))


def by_stage(
    errors: Float[np.ndarray, "levels videos"],
    levels: Sequence[tuple[int, float]],
    weights: Float[np.ndarray, "r videos"],
) -> list[Score]:
    """The score at every stage, its levels counting alike."""
    stages = np.array([stage for stage, _ in levels])
    return [score(np.asarray(errors)[stages == stage], weights) for stage in np.unique(stages)]
