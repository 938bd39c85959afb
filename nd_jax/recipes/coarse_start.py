"""Initial weights with which the tiny decoder already shows every latent's colours, so that minutes suffice.

Ours. ``fit_colours`` finds by least squares, from latents of some clips and their pixels, the linear map from 3 x 3
latents to the mean colour of the cell in the middle, for each of the frames that the latent stands for. The first
convolution makes these signals, lifted by a constant so that no ReLU cuts them; every growth in time hands each new
frame its half of them; the last convolution takes the constant off again. Channels without a signal start as usual, and
no residual branch adds to a signal yet. The architecture does not change.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from nd_jax.errors import UserError
from nd_jax.models.codec_config import AsymmetricVAEConfig
from nd_jax.models.functional import Params
from nd_jax.pixels import from_uint8

COLOURS = 3
LIFT = 2.0
"""Added to signals between the first and the last convolution; fitted colours stay within about [-1.5, 1.5]."""
RIDGE = 1e-4
"""Of the least squares, relative to the inputs' mean square: directions in which latents do not vary stay at zero."""


def signals(config: AsymmetricVAEConfig) -> list[int]:
    """Channels that carry colours at each level: three for every frame that is still to be made."""
    flags = config.decoder_time_upscale
    return [COLOURS * 2 ** sum(flags[level:]) for level in range(len(flags) + 1)]


def check_room(config: AsymmetricVAEConfig) -> None:
    """Raises UserError for a decoder with fewer channels than the start needs."""
    needed = signals(config)
    if any(have < need for have, need in zip(config.decoder_num_features, needed, strict=True)):
        raise UserError(
            f"decoder: channels {config.decoder_num_features} leave no room for a coarse start, which needs at least "
            f"{tuple(needed)}; set coarse_start to false"
        )


def fit_colours(
    latents: Float[np.ndarray, "n t h w c"], videos: UInt8[np.ndarray, "n f h2 w2 3"]
) -> dict[str, np.ndarray]:
    """``shift`` and ``scale`` [C] that bring the latents to unit variance, and ``kernel`` [3, 3, C, 3 * frames] and
    ``bias`` from these, squashed as the decoder does, to colours; a clip's first frame counts as ``frames`` equal ones.
    """
    count, length, height, width, channels = latents.shape
    frames = (videos.shape[1] - 1) // max(length - 1, 1)
    shift, deviation = latents.mean((0, 1, 2, 3)), latents.std((0, 1, 2, 3))
    scale = 1 / np.maximum(deviation, 1e-4)
    squashed = 3 * np.tanh((latents - shift) * scale / 3)
    padded = np.pad(squashed, ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0)))
    near = [padded[:, :, y : y + height, x : x + width] for y in range(3) for x in range(3)]
    inputs = np.concatenate([*near, np.ones_like(latents[..., :1])], axis=-1).reshape(-1, 9 * channels + 1)
    cell = (videos.shape[2] // height, videos.shape[3] // width)
    whole = np.concatenate([videos[:, :1].repeat(frames - 1, axis=1), videos], axis=1)
    colours = from_uint8(whole).reshape(count, length, frames, height, cell[0], width, cell[1], COLOURS).mean((4, 6))
    targets = np.moveaxis(colours, 2, 4).reshape(len(inputs), frames * COLOURS)
    inputs, targets = inputs.astype(np.float64), targets.astype(np.float64)
    square = inputs.T @ inputs
    square += RIDGE * np.trace(square) / len(square) * np.eye(len(square))
    found = np.linalg.solve(square, inputs.T @ targets).astype(np.float32)
    return {
        "shift": shift.astype(np.float32),
        "scale": scale.astype(np.float32),
        "kernel": found[:-1].reshape(3, 3, channels, -1),
        "bias": found[-1],
    }


def coarse_start(config: AsymmetricVAEConfig, params: Params, fit: Mapping[str, Array]) -> Params:
    """``params`` (``decoder`` and ``post_quant_conv``) of a fresh decoder with the fitted path put in. Traceable."""
    check_room(config)
    params = jax.tree.map(lambda leaf: leaf, params)  # new dicts: the caller's stay as they are
    blocks, carried = params["decoder"]["blocks"], signals(config)
    scale = jnp.asarray(fit["scale"])
    params["post_quant_conv"] = {
        "kernel": jnp.diag(scale)[None, None, None],
        "bias": -scale * jnp.asarray(fit["shift"]),
    }
    count = carried[0]
    first = blocks["1"]
    first["kernel"] = first["kernel"].at[..., :count].set(fit["kernel"])
    first["bias"] = first["bias"].at[:count].set(fit["bias"] + LIFT)
    for level, (count, later) in enumerate(pairwise(carried)):
        at = 3 + 6 * level
        for memory in range(at, at + 3):
            last = blocks[str(memory)]["conv"]["4"]
            last["kernel"], last["bias"] = last["kernel"].at[..., :count].set(0.0), last["bias"].at[:count].set(0.0)
        grow, conv = blocks[str(at + 4)]["conv"], blocks[str(at + 5)]
        width = grow["kernel"].shape[-2]
        split = grow["kernel"].reshape(width, -1, width).at[:, :, :later].set(0.0)  # channels come as (frame, channel)
        source = jnp.arange(count)
        split = split.at[source, source // later, source % later].set(1.0)
        grow["kernel"] = split.reshape(grow["kernel"].shape)
        conv["kernel"] = _copy(conv["kernel"], later)
    end = blocks[str(4 + 6 * (len(carried) - 1))]
    end["kernel"], end["bias"] = _copy(end["kernel"], COLOURS), jnp.full_like(end["bias"], -LIFT)
    return params


def _copy(kernel: Float[Array, "k k i o"], count: int) -> Float[Array, "k k i o"]:
    """The first ``count`` outputs become the inputs of the same number, at the same place."""
    middle, each = kernel.shape[0] // 2, jnp.arange(count)
    return kernel.at[..., :count].set(0.0).at[middle, middle, each, each].set(1.0)
