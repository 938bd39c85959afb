"""Errors to scores with intervals."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

RESAMPLES = 1000


class Score(NamedTuple):
    """Mean error over noise levels and prompts, and its 95 % bootstrap interval over prompts."""

    error: float
    low: float
    high: float


def bootstrap_weights(prompts: int, seed: int = 0) -> Float[np.ndarray, "r prompts"]:
    """How much every prompt counts in each resample. Candidates share them, so their differences can be read too."""
    rng = np.random.Generator(np.random.Philox(seed))
    return rng.multinomial(prompts, np.full(prompts, 1 / prompts), size=RESAMPLES) / prompts


def score(errors: Float[np.ndarray, "levels prompts"], weights: Float[np.ndarray, "r prompts"]) -> Score:
    """Every noise level counts alike."""
    each = np.asarray(errors, np.float64).mean(axis=0)
    low, high = np.percentile(weights @ each, (2.5, 97.5))
    return Score(float(each.mean()), float(low), float(high))


def by_stage(errors: Float[np.ndarray, "levels prompts"], levels: list[tuple[int, float]]) -> list[float]:
    """Mean error at every stage, its levels counting alike."""
    stages, each = np.array([stage for stage, _ in levels]), errors.mean(axis=1)
    return [float(each[stages == stage].mean()) for stage in np.unique(stages)]
