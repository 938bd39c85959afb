"""The video encoder for one frame (a given first frame): every 3-D convolution is the 2-D one by its last time slice,
because what lies before the first frame is zeros."""

from __future__ import annotations

import numpy as np

from nd_jax.converters.graphs.builder import Graph, Value
from nd_jax.converters.graphs.codec import Frames, conv, enter, group_norm, leave
from nd_jax.converters.graphs.layers import Tree
from nd_jax.models.codec_config import CodecConfig


def encoder_graph(config: CodecConfig, params: Tree, height: int, width: int, name: str = "vae_encoder") -> Graph:
    """Input ``image`` [1, H, W, 3] in [-1, 1], outputs ``mean`` and ``logvar`` [1, h, w, C], the latter not clamped.

    The halves leave apart, so that quantisation gives each a range of its own.
    """
    graph, tree, groups = Graph(name), params["encoder"], config.encoder_norm_num_groups
    frames = Frames(graph, None)
    x = [enter(graph, "image", height, width, config.encoder_in_channels)]
    x = frames.conv(x, "encoder/conv_in", tree["conv_in"])
    for i in map(str, range(len(config.encoder_block_out_channels))):
        path, block = f"encoder/down_blocks/{i}", tree["down_blocks"][i]
        for j in sorted(block["resnets"], key=int):
            x = frames.residual(x, f"{path}/resnets/{j}", block["resnets"][j], groups)
        for part, stride in (("downsamplers", 2), ("temporal_downsamplers", 1)):
            for j in block.get(part, {}):
                x = frames.conv(x, f"{path}/{part}/{j}/conv", block[part][j]["conv"], stride=stride)
    x = frames.middle(x, "encoder/mid_block", tree["mid_block"], groups)
    x = [group_norm(graph, x[0], "encoder/conv_norm_out", tree["conv_norm_out"], groups)]
    x, latent = frames.silu(x[0], "encoder/conv_norm_out"), config.encoder_out_channels
    for start, output in ((0, "mean"), (latent, "logvar")):
        leave(graph, output, _last(graph, x, tree["conv_out"], params["quant_conv"], slice(start, start + latent)))
    return graph


def _last(graph: Graph, x: Value, out: Tree, quant: Tree, half: slice) -> Value:
    """Some channels of ``quant_conv(conv_out(x))`` as one convolution. In between lie means beside log variances ten
    times their size, in one range, and quant_conv's sums would bring out what rounding did there."""

    def through(w: np.ndarray) -> np.ndarray:
        """By quant_conv's matrix, which has one pixel."""
        matrix = np.asarray(quant["kernel"], np.float64)[-1, 0, 0][:, half]
        return (w.astype(np.float64) @ matrix).astype(np.float32)

    def bias(b: np.ndarray) -> np.ndarray:
        return through(b) + np.asarray(quant["bias"], np.float32)[half]

    _, size, _, inputs, _ = out["kernel"].shape
    shape, suffix = (size, size, inputs, half.stop - half.start), f"/{half.start}"
    options = {"change": lambda w: through(w[-1]), "bias_change": bias, "shape": shape, "suffix": suffix}
    return conv(graph, x, "encoder/conv_out", out["kernel"], out["bias"], **options)
