"""Where an upscaler begins: at the best linear filter, found by least squares, instead of at nearest upsampling.

Ours. The first convolution makes nine copies of the colours, shifted by up to one pixel; +1 identities carry them to
the last convolution, whose 3x3 kernel sees with them 5x5 pixels. So any linear filter of that reach is exactly a
QuickSRNet, and the best one is one to two decibels above bicubic interpolation before training starts.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from nd_jax.models.functional import Params
from nd_jax.models.quicksrnet import COLOURS, QuickSRNetConfig
from nd_jax.recipes.upscaler import reduced

SHIFTS = sorted(((y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)), key=lambda shift: shift != (0, 0))
"""Down and right, in pixels of the small picture; none first."""
CARRIED = COLOURS * len(SHIFTS)
REACH = 2
RIDGE = 1e-8


def has_room(config: QuickSRNetConfig) -> bool:
    """Whether the network is of a form that can begin so: a whole factor, and channels for nine copies."""
    return config.ratio.denominator == 1 and config.num_channels >= CARRIED


def fit_filters(images: UInt8[np.ndarray, "n h w 3"], factor: int) -> Float[np.ndarray, "5 5 phases"]:
    """The filter for each of the ``factor``^2 pixels (row, column) that a small one becomes, one for all colours.

    Least squares over all pixels that are not near the edge, with a little ridge.
    """
    large = images.astype(np.float32) / 255
    small = np.asarray(reduced(jnp.asarray(large), factor))
    height, width = (side - 2 * REACH for side in small.shape[1:3])
    offsets = [(y, x) for y in range(2 * REACH + 1) for x in range(2 * REACH + 1)]
    seen = np.stack([small[:, y : y + height, x : x + width] for y, x in offsets], axis=-1).astype(np.float64)
    cut = large[:, factor * REACH : factor * (REACH + height), factor * REACH : factor * (REACH + width)]
    wanted = np.stack([cut[:, y::factor, x::factor] for y in range(factor) for x in range(factor)], axis=-1)
    seen, wanted = seen.reshape(-1, len(offsets)), wanted.reshape(-1, factor**2).astype(np.float64)
    normal = seen.T @ seen + RIDGE * len(seen) / len(offsets) * np.eye(len(offsets))
    found = np.linalg.solve(normal, seen.T @ wanted)
    return found.reshape(2 * REACH + 1, 2 * REACH + 1, -1).astype(np.float32)


def linear_start(config: QuickSRNetConfig, params: Params, filters: Float[np.ndarray, "5 5 phases"]) -> Params:
    """Fresh parameters that begin as the linear ``filters``. Channels beyond the 27 that carry copies stay random, and
    nothing of them reaches the result at first. ``has_room(config)`` has to hold."""
    params = jax.tree.map(jnp.asarray, params)
    cnn = {}
    for name, layer in params["cnn"].items():
        kernel = layer["kernel"].at[..., :CARRIED].set(0.0)
        if name == "0":
            for number, (y, x) in enumerate(SHIFTS):
                channels = COLOURS * number + np.arange(COLOURS)
                kernel = kernel.at[1 + y, 1 + x, np.arange(COLOURS), channels].set(1.0)
        else:
            index = np.arange(config.num_channels)
            kernel = kernel.at[1, 1, index, index].add(1.0)
        cnn[name] = {"kernel": kernel, "bias": jnp.zeros_like(layer["bias"])}
    # Every one of the 25 places is reached by 1 to 9 pairs of a shift and a tap, which share its weight evenly.
    pairs = np.zeros(filters.shape[:2])
    for y, x in SHIFTS:
        pairs[1 + y : 4 + y, 1 + x : 4 + x] += 1
    shared, phases = filters / pairs[..., None], filters.shape[-1]
    last = np.zeros(params["conv_last"]["kernel"].shape, np.float32)
    for number, (y, x) in enumerate(SHIFTS):
        taps = shared[1 + y : 4 + y, 1 + x : 4 + x]
        for colour in range(COLOURS):
            last[:, :, COLOURS * number + colour, colour * phases : (colour + 1) * phases] = taps
    params |= {"cnn": cnn}
    if config.use_ito_connection:  # the input's own branch repeats every pixel; the filters add what is missing
        branch = np.zeros(params["anchor"]["net"]["kernel"].shape, np.float32)
        for output in range(COLOURS * phases):
            branch[0, 0, output // phases, output] = 1
            last[1, 1, output // phases, output] -= 1
        params["anchor"] = {"net": {"kernel": jnp.asarray(branch), "bias": jnp.zeros((COLOURS * phases,))}}
    params["conv_last"] = {"kernel": jnp.asarray(last), "bias": jnp.zeros_like(params["conv_last"]["bias"])}
    return params
