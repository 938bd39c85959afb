"""Gates on what a block adds to its tokens: a candidate for pruning as data, or a place to take gradients at.

A gate of 1 changes nothing. A gate of 0 on a head or on a slice of an MLP's hidden channels gives what the network
without their weights gives; on a stream, what the network gives whose block leaves that stream's tokens alone (the
other stream still reads them).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float

from nd_jax.errors import UserError
from nd_jax.models.mmdit_config import MMDiTConfig

IMAGE, TEXT = 0, 1
"""Places of the streams."""


class Gates(NamedTuple):
    """Of K stacked blocks and the last one; R is 1, or one row for each sample (of a single group).

    ``stream``: image and text. ``heads``: of both streams' queries, keys and values. ``mlp``: equal slices of hidden
    channels, of the image's and of the text's MLP. The last block has no stream gate, and its text gates do nothing.
    """

    stream: Float[Array, "k r 2"]
    heads: Float[Array, "k+1 r h"]
    mlp: Float[Array, "k+1 r 2 s"]


class BlockGates(NamedTuple):
    """Those of one block; ``stream`` is None in the last."""

    stream: Float[Array, "r 2"] | None
    heads: Float[Array, "r h"]
    mlp: Float[Array, "r 2 s"]


def open_gates(config: MMDiTConfig, slices: int = 8, rows: int = 1) -> Gates:
    """Gates that change nothing, float32 [..] in NumPy. Raises UserError unless the MLPs divide into ``slices``."""
    for channels in (config.mlp_channels, config.text_mlp_channels):
        if slices < 1 or channels % slices:
            raise UserError(f"gates: {channels} hidden channels in {slices} slices; expected a divisor of {channels}")
    depth = config.num_layers
    return Gates(
        np.ones((depth - 1, rows, 2), np.float32),
        np.ones((depth, rows, config.heads), np.float32),
        np.ones((depth, rows, 2, slices), np.float32),
    )


def of_last(gates: Gates | None) -> BlockGates | None:
    """The last block's."""
    return None if gates is None else BlockGates(None, gates.heads[-1], gates.mlp[-1])


def gated_pieces(x: Float[Array, "b l d"], gate: Float[Array, "r p"]) -> Float[Array, "b l d"]:
    """Equal pieces of the channels (heads, slices), each times its gate."""
    pieces = x.reshape(*x.shape[:-1], gate.shape[-1], -1)
    return (pieces * gate[:, None, :, None].astype(x.dtype)).reshape(x.shape)


def gated_stream(x: Float[Array, "b l d"], gates: BlockGates | None, stream: int) -> Float[Array, "b l d"]:
    """What a block adds to a stream, times the stream's gate."""
    if gates is None or gates.stream is None:
        return x
    return x * gates.stream[:, stream, None, None].astype(x.dtype)
