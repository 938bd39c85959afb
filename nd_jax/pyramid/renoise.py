"""The jump between stages: upsample, then add the noise that restores the forward process (arXiv 2410.05954, 3.2)."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Array, Float

from nd_jax.errors import UserError
from nd_jax.pyramid.resample import double
from nd_jax.pyramid.schedule import Schedule


def block_covariance(gamma: float) -> np.ndarray:
    """Covariance within a 2x2 block, float64 [4, 4]: ``(1 + gamma) I - gamma 1 1^T``, row by row."""
    return (1 + gamma) * np.eye(4) - gamma


def block_noise(white: Float[Array, "*b h w c"], gamma: float) -> Float[Array, "*b h w c"]:
    """Block-correlated noise from white noise of the same shape (numpy or JAX); height and width even.

    Applies the exact symmetric root of ``block_covariance``, ``sqrt(1 + gamma) (z - mean) + sqrt(1 - 3 gamma) mean``,
    which exists where a Cholesky factor does not: at gamma = 1/3 every block sums to zero.
    Raises ``UserError`` for gamma > 1/3 (no such noise exists) or odd sizes.
    """
    *lead, height, width, channels = white.shape
    if 1 - 3 * gamma < -1e-9:
        raise UserError(f"block noise: gamma is {gamma}, too much correlation for 2x2 blocks; expected at most 1/3")
    if height % 2 or width % 2:
        raise UserError(f"block noise: size {height}x{width} does not divide into 2x2 blocks; expected even sizes")
    blocks = white.reshape(*lead, height // 2, 2, width // 2, 2, channels)
    mean = blocks.mean(axis=(-4, -2), keepdims=True)
    out = math.sqrt(1 + gamma) * (blocks - mean) + math.sqrt(max(0.0, 1 - 3 * gamma)) * mean
    return out.reshape(white.shape)


def jump_coefficients(clean: float, gamma: float) -> tuple[float, float]:
    """``(alpha, beta)`` of ``alpha Up(z) + beta n``; ``clean`` is 1 - the new stage's *original* start sigma."""
    alpha = 1 / (math.sqrt(1 + 1 / gamma) * (1 - clean) + clean)
    return alpha, alpha * (1 - clean) / math.sqrt(gamma)


def renoise(
    latents: Float[Array, "*b h w c"], noise: Float[Array, "*b 2*h 2*w c"], clean: float, gamma: float
) -> Float[Array, "*b 2*h 2*w c"]:
    """Nearest upsampling by 2, then renoising with the given block noise."""
    alpha, beta = jump_coefficients(clean, gamma)
    return alpha * double(latents) + beta * noise


def jump(
    latents: Float[Array, "*b h w c"], noise: Float[Array, "*b 2*h 2*w c"], schedule: Schedule, stage: int
) -> Float[Array, "*b 2*h 2*w c"]:
    """From the end of stage ``stage - 1`` to the start of ``stage``; ``noise`` comes from ``block_noise``."""
    return renoise(latents, noise, 1 - float(schedule.orig_start_sigmas[stage]), schedule.gamma)
