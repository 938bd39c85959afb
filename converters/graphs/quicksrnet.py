"""QuickSRNet: one frame in [0, 1] to a larger one."""

from __future__ import annotations

from typing import Any

import numpy as np

from nd_jax.converters.graphs.builder import Graph, Value
from nd_jax.converters.graphs.codec import enter, leave
from nd_jax.converters.graphs.image_blocks import plain_conv
from nd_jax.converters.graphs.layers import Tree
from nd_jax.errors import UserError


def quicksrnet_graph(config: Any, params: Tree, height: int, width: int, name: str = "upscaler") -> Graph:
    """``image`` [1, H, W, 3] to ``larger`` [1, sH, sW, 3]. ``config``: a ``QuickSRNetConfig``.

    Raises UserError for 1.5x and odd sides.
    """
    graph, ratio = Graph(name), config.ratio
    down, up = ratio.denominator, ratio.numerator
    if height % down or width % down:
        raise UserError(f"super-resolution by {float(ratio):g}: image of {height}x{width}, expected even sides")
    image = x = enter(graph, "image", height, width, 3)
    for key in sorted(params["cnn"], key=int):
        x = clipped(graph, plain_conv(graph, x, f"cnn/{key}", params["cnn"][key]))
    last, options = params["conv_last"], {}
    if down > 1:
        channels = x.shape[1]
        x = graph.op(
            "SpaceToDepth",
            [x],
            (1, channels * down**2, height // down, width // down),
            "space_to_depth",
            blocksize=down,
        )
        # The operator's channels are (row, column, channel), the network's (channel, row, column).
        order = np.arange(channels * down**2).reshape(channels, down * down).T.ravel()
        options = {"change": lambda w: w[:, :, order]}
    x = plain_conv(graph, x, "conv_last", last, **options)
    if "anchor" in params:
        branch = plain_conv(graph, image, "anchor/net", params["anchor"]["net"], stride=down)
        x = graph.add(x, branch, "anchored")
    x = clipped(graph, x)
    _, channels, rows, columns = x.shape
    larger = graph.op(
        "DepthToSpace", [x], (1, channels // up**2, rows * up, columns * up), "depth_to_space", blocksize=up, mode="CRD"
    )
    leave(graph, "larger", larger)
    return graph


def clipped(graph: Graph, x: Value) -> Value:
    """``x`` held within 0 and 1."""
    return graph.op("Clip", [x, graph.constant(0.0), graph.constant(1.0)], x.shape, "clipped")
