"""Pyramid-Flow's own decoder, streaming, as two graphs: a clip's first latent frame (one video frame comes out) and
every later one (eight). It is for bundles of systems whose decoder has not been distilled; it is 22 times larger.
"""

from __future__ import annotations

from nd_jax.converters.graphs.builder import Graph, Value
from nd_jax.converters.graphs.codec import Frames, enter, group_norm, leave
from nd_jax.converters.graphs.layers import Tree
from nd_jax.models.codec_config import NativeVAEConfig


def native_decoder_graph(
    config: NativeVAEConfig, params: Tree, height: int, width: int, *, first: bool, name: str
) -> Graph:
    """Inputs ``latent`` [1, h, w, C] and, unless ``first``, ``state/K``; outputs ``frame/F`` [1, H, W, 3], ``next/K``.

    ``first`` leaves out states that are zeros: ``next/K`` keeps the numbers of the later graph's states.
    """
    graph, tree, groups = Graph(name), params["decoder"], config.decoder_norm_num_groups
    count = 0

    def past(channels: int, rows: int, columns: int) -> Value:
        nonlocal count
        count += 1
        return enter(graph, f"state/{count - 1}", rows, columns, channels)

    frames = Frames(graph, None if first else past)
    x = [enter(graph, "latent", height, width, config.decoder_in_channels)]
    if "post_quant_conv" in params:
        x = frames.conv(x, "post_quant_conv", params["post_quant_conv"])
    x = frames.middle(
        frames.conv(x, "decoder/conv_in", tree["conv_in"]), "decoder/mid_block", tree["mid_block"], groups
    )
    for i in map(str, range(len(config.decoder_block_out_channels))):
        path, block = f"decoder/up_blocks/{i}", tree["up_blocks"][i]
        for j in sorted(block["resnets"], key=int):
            x = frames.residual(x, f"{path}/resnets/{j}", block["resnets"][j], groups)
        for j in block.get("upsamplers", {}):
            x = frames.conv(x, f"{path}/upsamplers/{j}/conv", block["upsamplers"][j]["conv"])
            x = [depth_to_space(graph, y, f"{path}/upsamplers/{j}") for y in x]
        for j in block.get("temporal_upsamplers", {}):
            name, layer = f"{path}/temporal_upsamplers/{j}/conv", block["temporal_upsamplers"][j]["conv"]
            early, late = (frames.conv(x, name, layer, pick=slice(k, None, 2)) for k in (0, 1))
            pairs = [frame for pair in zip(early, late, strict=True) for frame in pair]
            x = pairs[1:] if first else pairs
    x = [group_norm(graph, y, "decoder/conv_norm_out", tree["conv_norm_out"], groups) for y in x]
    x = frames.conv([frames.silu(y, "decoder/conv_norm_out") for y in x], "decoder/conv_out", tree["conv_out"])
    for k, frame in enumerate(x):
        leave(graph, f"frame/{k}", frame)
    for k, state in enumerate(frames.kept):
        if state is not None:
            leave(graph, f"next/{k}", state)
    return graph


def depth_to_space(graph: Graph, x: Value, name: str) -> Value:
    """Channels (channel, row, column) to twice the height and width."""
    _, channels, height, width = x.shape
    with graph.scope(name):
        return graph.op(
            "DepthToSpace", [x], (1, channels // 4, 2 * height, 2 * width), "depth_to_space", blocksize=2, mode="CRD"
        )
