"""The image decoder (SDXL's): latents, divided by their scaling factor on the host, to an image."""

from __future__ import annotations

from typing import Any

from nd_jax.converters.graphs.builder import Graph
from nd_jax.converters.graphs.codec import attention, enter, group_norm, leave
from nd_jax.converters.graphs.image_blocks import grow, plain_conv, residual
from nd_jax.converters.graphs.layers import Tree, silu

EPS = 1e-6


def image_decoder_graph(config: Any, params: Tree, height: int, width: int, name: str = "image_decoder") -> Graph:
    """``latent`` [1, h, w, C] to ``image`` [1, H, W, 3] in [-1, 1], not clamped. ``config``: an ``ImageVAEConfig``."""
    graph, tree, groups = Graph(name), params["decoder"], config.norm_num_groups
    x = enter(graph, "latent", height, width, config.latent_channels)
    if "post_quant_conv" in params:
        x = plain_conv(graph, x, "post_quant_conv", params["post_quant_conv"])
    x = plain_conv(graph, x, "decoder/conv_in", tree["conv_in"])
    middle = tree["mid_block"]
    x = residual(graph, x, "decoder/mid_block/resnets/0", middle["resnets"]["0"], groups, EPS)
    for j in middle.get("attentions", {}):
        x = attention(graph, x, f"decoder/mid_block/attentions/{j}", middle["attentions"][j], groups)
    x = residual(graph, x, "decoder/mid_block/resnets/1", middle["resnets"]["1"], groups, EPS)
    for i in sorted(tree["up_blocks"], key=int):
        path, block = f"decoder/up_blocks/{i}", tree["up_blocks"][i]
        for j in sorted(block["resnets"], key=int):
            x = residual(graph, x, f"{path}/resnets/{j}", block["resnets"][j], groups, EPS)
        for j in block.get("upsamplers", {}):
            x = grow(graph, x, f"{path}/upsamplers/{j}", block["upsamplers"][j])
    with graph.scope("decoder/conv_norm_out"):
        x = silu(graph, group_norm(graph, x, "decoder/conv_norm_out", tree["conv_norm_out"], groups, EPS))
    leave(graph, "image", plain_conv(graph, x, "decoder/conv_out", tree["conv_out"]))
    return graph
