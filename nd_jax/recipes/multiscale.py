"""A reconstruction loss that needs no weights: what a picture lacks, at several scales.

Ours; it stands in for LPIPS where no weights are given. With e = reconstruction - video, e_0 = e and e_{k+1} = e_k
averaged over 2 x 2 pixels, its terms are, each averaged over the scales k:

    pyramid    mean |e_k - Up(e_{k+1})|, the Laplacian pyramid of the error (box filter, nearest Up; at the last scale
               |e_k| itself): every band counts alike, so that fine detail is not drowned by flat areas;
    gradient   mean |d/dy e_k| + mean |d/dx e_k|: outlines;
    structure  1 - SSIM of both pictures at scale k over windows of 4 x 4 (stride 2, plain means): local contrast;

and, at full resolution only,

    motion     mean |d/dt e|: error that changes between frames, which is flicker.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float

SMALLEST = 4
"""Pixels that a side must have at a scale, one window of the structure term; smaller scales are left out."""
STABLE = ((0.01 * 2) ** 2, (0.03 * 2) ** 2)
"""SSIM's constants for values in [-1, 1]."""


@dataclass(frozen=True)
class MultiscaleConfig:
    """Weights of the terms of the weight-free loss, relative to each other, and how many scales there are."""

    scales: int = 3
    pyramid: float = 1.0
    gradient: float = 0.5
    structure: float = 0.1
    motion: float = 0.5


def multiscale_terms(
    made: Float[Array, "b t h w 3"], video: Float[Array, "b t h w 3"], scales: int = 3
) -> dict[str, Float[Array, " b"]]:
    """The four terms of every clip, float32; pictures are in [-1, 1]."""
    made, video = made.astype(jnp.float32), video.astype(jnp.float32)
    error = made - video
    terms = {"pyramid": [], "gradient": [], "structure": []}
    motion = _mean(jnp.abs(jnp.diff(error, axis=1))) if error.shape[1] > 1 else jnp.zeros(len(error))
    for scale in range(scales):
        last = scale == scales - 1 or min(error.shape[2:4]) < 2 * SMALLEST
        coarser = None if last else halve(error)
        band = error if last else error - coarser.repeat(2, axis=2).repeat(2, axis=3)
        terms["pyramid"].append(_mean(jnp.abs(band)))
        terms["gradient"].append(sum(_mean(jnp.abs(jnp.diff(error, axis=axis))) for axis in (2, 3)))
        terms["structure"].append(1 - _mean(similarity(made, video)))
        if last:
            break
        error, made, video = coarser, halve(made), halve(video)
    return {name: sum(each) / len(each) for name, each in terms.items()} | {"motion": motion}


def similarity(a: Float[Array, "b t h w c"], b: Float[Array, "b t h w c"]) -> Float[Array, "b t h2 w2 c"]:
    """SSIM [Wang et al. 2004] of windows of 4 x 4 at stride 2, with plain means in place of Gaussian ones."""
    mean_a, mean_b = _window(a), _window(b)
    var_a = _window(jnp.square(a)) - jnp.square(mean_a)
    var_b = _window(jnp.square(b)) - jnp.square(mean_b)
    both = _window(a * b) - mean_a * mean_b
    one, two = STABLE
    above = (2 * mean_a * mean_b + one) * (2 * both + two)
    return above / ((jnp.square(mean_a) + jnp.square(mean_b) + one) * (var_a + var_b + two))


def halve(x: Float[Array, "b t h w c"]) -> Float[Array, "b t h2 w2 c"]:
    """Mean over 2 x 2 pixels. A last odd row or column is left out."""
    b, t, h, w, c = x.shape
    return x[:, :, : h // 2 * 2, : w // 2 * 2].reshape(b, t, h // 2, 2, w // 2, 2, c).mean((3, 5))


def _window(x: Array) -> Array:
    x = halve(x)
    x = (x[:, :, 1:] + x[:, :, :-1]) / 2
    return (x[:, :, :, 1:] + x[:, :, :, :-1]) / 2


def _mean(x: Array) -> Float[Array, " b"]:
    return x.mean((1, 2, 3, 4))
