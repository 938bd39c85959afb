"""Estimates with bootstrap 95 % intervals over prompts.

Videos of one prompt are alike, whatever their seeds, so a prompt is resampled with all its videos (a cluster
bootstrap): the caller first sums or averages what belongs to a prompt. Percentile method, scipy.stats.bootstrap. Where
all prompts agree, for example where everything is right, the interval has no width; that says nothing about prompts
that were not asked.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import scipy.stats
from jaxtyping import Float

from nd_jax.data.world import ATTRIBUTES

ROWS = (*ATTRIBUTES, "mean")
"""The rows of ``per_prompt``."""


class Estimate(NamedTuple):
    """A figure and its 95 % interval; NaN where there was nothing to measure."""

    value: float
    low: float
    high: float

    def summary(self) -> dict[str, Any]:
        """JSON-ready."""
        value, low, high = (x if math.isfinite(x) else None for x in map(float, self))
        return {"value": value, "interval_95": [low, high]}


def mean(x: np.ndarray, axis: int) -> np.ndarray:
    return x.mean(axis)


def quotient(x: np.ndarray, y: np.ndarray, axis: int) -> np.ndarray:
    """A ratio of means, which is also a mean over all members where x holds sums and y counts."""
    return x.sum(axis) / y.sum(axis)


def quotient_of_means(x: np.ndarray, x_count: np.ndarray, y: np.ndarray, y_count: np.ndarray, axis: int) -> np.ndarray:
    """One mean over all members by another; x and y hold sums."""
    return quotient(x, x_count, axis) / quotient(y, y_count, axis)


def bootstrap(
    statistic: Callable[..., np.ndarray], *samples: Float[np.ndarray, "*rows n"], resamples: int, seed: int = 0
) -> Float[np.ndarray, "*rows 3"]:
    """``statistic(*samples, axis=-1)`` and the ends of its interval; the samples are paired, prompt by prompt.

    One prompt alone has an interval without width.
    """
    samples = tuple(np.asarray(sample, np.float64) for sample in samples)
    count = samples[0].shape[-1]
    rows = samples[0].shape[:-1]
    if not count:
        return np.full((*rows, 3), np.nan)
    with np.errstate(divide="ignore", invalid="ignore"), warnings.catch_warnings():
        # Resamples in which nothing was measured make the interval NaN, which is what callers are told.
        warnings.simplefilter("ignore", scipy.stats.DegenerateDataWarning)
        value = np.asarray(statistic(*samples, axis=-1))
        if count == 1:
            return np.stack([value] * 3, axis=-1)
        found = scipy.stats.bootstrap(
            samples,
            statistic,
            n_resamples=resamples,
            batch=max(1, (1 << 22) // count),
            vectorized=True,
            paired=True,
            axis=-1,
            method="percentile",
            rng=np.random.Generator(np.random.Philox(seed)),
        ).confidence_interval
    return np.stack([value, found.low, found.high], axis=-1)


def estimate(statistic: Callable[..., np.ndarray], *samples: Float[np.ndarray, " n"], resamples: int) -> Estimate:
    """``bootstrap`` of one figure."""
    return Estimate(*bootstrap(statistic, *samples, resamples=resamples).tolist())


def by_attribute(
    statistic: Callable[..., np.ndarray], *samples: Float[np.ndarray, "6 n"], resamples: int
) -> dict[str, Estimate]:
    """``bootstrap`` of what ``per_prompt`` returns: a figure for each attribute and for their mean."""
    found = bootstrap(statistic, *samples, resamples=resamples)
    return {name: Estimate(*row) for name, row in zip(ROWS, found.tolist(), strict=True)}


def per_prompt(read: np.ndarray, labels: np.ndarray) -> Float[np.ndarray, "6 n"]:
    """Share of right readings of each prompt, one row per attribute and one for their mean.

    ``read`` is [seeds, n, objects, 5], ``labels`` [n, objects, 5].
    """
    right = (read == labels[None]).mean(axis=(0, 2)).T
    return np.concatenate([right, right.mean(0, keepdims=True)])
