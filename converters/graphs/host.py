"""What the host gives to the denoiser's graphs: positions, rotary tables, biases, sinusoids, patches. Numpy only.

The runtime has the same functions written for the bundle; these here read our own layouts, for checks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from nd_jax.converters.graphs.attention import query_groups
from nd_jax.models.mmdit import MMDiTConfig
from nd_jax.models.positions import axis_positions
from nd_jax.pyramid.layout import Envelope

MASKED = -100.0
"""Added to scores that do not count: exact in float16, and it leaves the range of the scores alone."""


def position_table(config: MMDiTConfig, envelope: Envelope) -> Float[np.ndarray, "l d"]:
    """Positions of all image tokens, float32."""
    patch, rows = config.patch_size, []
    target = tuple(n // patch for n in envelope.clips[-1][1:])
    for frames, height, width in envelope.clips:
        size = (height // patch, width // patch)
        goal = target if config.interp_condition_pos else size
        half = config.width // 2
        down, across = (
            axis_positions(half, config.pos_embed_max_size, config.base_size, *pair)
            for pair in zip(size, goal, strict=True)
        )
        both = [np.broadcast_to(across[None], (*size, half)), np.broadcast_to(down[:, None], (*size, half))]
        rows.append(np.tile(np.concatenate(both, axis=-1).reshape(-1, config.width), (frames, 1)))
    return np.concatenate(rows)


def rotary(times: Int[np.ndarray, " l"], channels: int, theta: float = 10000.0) -> list[np.ndarray]:
    """Cosines and sines [L, 1, channels / 2] of the tokens' times, computed in float64."""
    angles = times[:, None] * theta ** -(np.arange(0, channels, 2) / channels)
    return [f(angles)[:, None].astype(np.float32) for f in (np.cos, np.sin)]


def biases(
    envelope: Envelope, times: Int[np.ndarray, " l"], real: np.ndarray, *, causal: bool = True, split: bool = True
) -> dict[str, Float[np.ndarray, "rows keys"]]:
    """The bias inputs of a stage's graph for one layout: times and whether a token is real, text first."""
    found = {}
    for group in query_groups(envelope, causal=causal, split=split):
        query = times[group.start : group.start + group.rows, None]
        allowed = np.broadcast_to(real[: group.keys], (group.rows, group.keys))
        if causal:
            allowed = allowed & (times[: group.keys] <= query)
        found[group.bias] = np.where(allowed, 0, MASKED).astype(np.float32)
    return found


def to_patches(clips: Sequence[Float[np.ndarray, "t h w c"]], patch: int) -> Float[np.ndarray, "l ppc"]:
    """Clips cut into rows of (row in patch, column in patch, channel), clip after clip."""
    rows = []
    for clip in clips:
        t, h, w, c = clip.shape
        cut = clip.reshape(t, h // patch, patch, w // patch, patch, c).transpose(0, 1, 3, 2, 4, 5)
        rows.append(cut.reshape(-1, patch * patch * c))
    return np.concatenate(rows)
