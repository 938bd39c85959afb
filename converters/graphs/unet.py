"""The first-frame UNet (SSD-1B): noise prediction for one latent. Embeddings' sinusoids come from the host."""

from __future__ import annotations

from typing import Any

import numpy as np

from nd_jax.converters.graphs.builder import Graph, Value
from nd_jax.converters.graphs.codec import enter, group_norm, leave
from nd_jax.converters.graphs.conditioning import embedder
from nd_jax.converters.graphs.image_blocks import grow, plain_conv, residual
from nd_jax.converters.graphs.layers import (
    Tree,
    depth_of,
    layer_norm,
    layer_of,
    linear,
    parameter,
    silu,
)
from nd_jax.converters.graphs.text_attention import attend
from nd_jax.errors import UserError

NORM_EPS, TOKEN_EPS = 1e-6, 1e-5
"""Of the group norm in front of transformer blocks, and of the layer norms in them."""


def unet_graph(config: Any, params: Tree, height: int, width: int, text_length: int, name: str = "unet") -> Graph:
    """Inputs: ``sample`` [1, h, w, C]; ``time`` [1, T], the timestep's sinusoid; ``added`` [1, A], pooled text and the
    six sizes' sinusoids side by side; ``text`` [S, D]; ``guidance`` [1, K] where the network has it. Output ``noise``.

    ``config``: a ``UNetConfig``. Raises UserError for latents that the levels do not halve evenly.
    """
    levels = len(config.block_out_channels)
    if height % 2 ** (levels - 1) or width % 2 ** (levels - 1):
        raise UserError(f"graph {name}: latent of {height}x{width}; expected multiples of {2 ** (levels - 1)}")
    graph, unet = Graph(name), _UNet(config, params)
    x = enter(graph, "sample", height, width, config.in_channels)
    time = graph.input("time", 1, config.block_out_channels[0])
    added = graph.input("added", 1, config.projection_class_embeddings_input_dim)
    text = graph.input("text", text_length, config.cross_attention_dim)
    with graph.scope("time_embedding"):
        if "cond_proj" in params["time_embedding"]:
            guidance = graph.input("guidance", 1, config.time_cond_proj_dim)
            projected = linear(graph, guidance, "time_embedding/cond_proj", params["time_embedding"]["cond_proj"])
            time = graph.add(time, projected, "guided")
        time = embedder(graph, time, "time_embedding", params["time_embedding"])
    with graph.scope("add_embedding"):
        added = embedder(graph, added, "add_embedding", params["add_embedding"])
        embedding = silu(graph, graph.add(time, added, "embedding"))
    x = plain_conv(graph, x, "conv_in", params["conv_in"])
    x = unet.run(graph, x, embedding, text)
    with graph.scope("conv_norm_out"):
        normed = group_norm(graph, x, "conv_norm_out", params["conv_norm_out"], config.norm_num_groups, config.norm_eps)
        x = silu(graph, normed)
    leave(graph, "noise", plain_conv(graph, x, "conv_out", params["conv_out"]))
    return graph


class _UNet:
    def __init__(self, config: Any, params: Tree):
        self.config, self.params = config, params

    def run(self, graph: Graph, x: Value, embedding: Value, text: Value) -> Value:
        """Down, through the middle and up."""
        heads, down, up = self.config.attention_head_dim, self.params["down_blocks"], self.params["up_blocks"]
        skips = [x]
        for i in sorted(down, key=int):
            path, block = f"down_blocks/{i}", down[i]
            for j in sorted(block["resnets"], key=int):
                x = self.layer(graph, x, path, block, j, embedding, text, heads[int(i)])
                skips.append(x)
            for j in block.get("downsamplers", {}):
                layer = block["downsamplers"][j]["conv"]
                x = plain_conv(graph, x, f"{path}/downsamplers/{j}/conv", layer, stride=2)
                skips.append(x)
        x = self.middle(graph, x, embedding, text, heads[-1])
        for i in sorted(up, key=int):
            path, block = f"up_blocks/{i}", up[i]
            for j in sorted(block["resnets"], key=int):
                with graph.scope(path):
                    x = graph.concat([x, skips.pop()], axis=1)
                x = self.layer(graph, x, path, block, j, embedding, text, heads[len(up) - 1 - int(i)])
            for j in block.get("upsamplers", {}):
                x = grow(graph, x, f"{path}/upsamplers/{j}", block["upsamplers"][j])
        return x

    def layer(
        self, graph: Graph, x: Value, path: str, block: Tree, j: str, embedding: Value, text: Value, heads: int
    ) -> Value:
        """A residual block and, if the level has any, the attention layer after it."""
        config = self.config
        name, tree = f"{path}/resnets/{j}", block["resnets"][j]
        x = residual(graph, x, name, tree, config.norm_num_groups, config.norm_eps, embedding)
        if j in block.get("attentions", {}):
            x = self.transformer(graph, x, f"{path}/attentions/{j}", block["attentions"][j], text, heads)
        return x

    def middle(self, graph: Graph, x: Value, embedding: Value, text: Value, heads: int) -> Value:
        """Residual block, then attention and residual block as often as there are."""
        config, block = self.config, self.params["mid_block"]
        for j in sorted(block["resnets"], key=int):
            if int(j):
                before = str(int(j) - 1)
                name = f"mid_block/attentions/{before}"
                x = self.transformer(graph, x, name, block["attentions"][before], text, heads)
            name, tree = f"mid_block/resnets/{j}", block["resnets"][j]
            x = residual(graph, x, name, tree, config.norm_num_groups, config.norm_eps, embedding)
        return x

    def transformer(self, graph: Graph, x: Value, name: str, tree: Tree, text: Value, heads: int) -> Value:
        """Group norm, linear, transformer blocks over all positions, linear; with residual."""
        _, channels, height, width = x.shape
        normed = group_norm(graph, x, f"{name}/norm", tree["norm"], self.config.norm_num_groups, NORM_EPS)
        with graph.scope(name):
            tokens = graph.reshape(graph.transpose(normed, 0, 2, 3, 1), height * width, channels)
            tokens = linear(graph, tokens, f"{name}/proj_in", tree["proj_in"])
            for k in range(depth_of(tree["transformer_blocks"])):
                path, layer = f"{name}/transformer_blocks/{k}", layer_of(tree["transformer_blocks"], k)
                tokens = transformer_block(graph, tokens, text, path, layer, heads)
            tokens = linear(graph, tokens, f"{name}/proj_out", tree["proj_out"])
            frame = graph.transpose(graph.reshape(tokens, 1, height, width, channels), 0, 3, 1, 2)
            return graph.add(x, frame, "out")


def transformer_block(graph: Graph, x: Value, text: Value, name: str, tree: Tree, heads: int) -> Value:
    """Self-attention, attention to the text, gated feed-forward; each behind a norm and added to ``x``."""
    width = x.shape[1]
    factor = np.float32((width // heads) ** -0.5)
    for index, part in ((1, "attn1"), (2, "attn2")):
        y = _norm(graph, x, f"{name}/norm{index}", tree[f"norm{index}"])
        with graph.scope(f"{index}", part):
            layer, context = tree[part], y if index == 1 else text
            query = linear(graph, y, f"{name}/{part}/to_q", layer["to_q"], lambda w: w * factor)
            key, value = (linear(graph, context, f"{name}/{part}/{each}", layer[each]) for each in ("to_k", "to_v"))
            seen = attend(graph, query, key, value, heads)
            x = graph.add(x, linear(graph, seen, f"{name}/{part}/to_out", layer["to_out"]), "out")
    y = _norm(graph, x, f"{name}/norm3", tree["norm3"])
    with graph.scope("ff"):
        up, wide = tree["ff"]["up"], 4 * width
        value, gate = (
            linear(graph, y, f"{name}/ff/up", up, lambda w, start=start: w[:, start : start + wide],
                   suffix=f"/{label}", width=wide)
            for start, label in ((0, "value"), (wide, "gate"))
        )  # fmt: skip
        gated = graph.mul(value, graph.unary("Gelu", gate, approximate="none"), "gated")
        return graph.add(x, linear(graph, gated, f"{name}/ff/down", tree["ff"]["down"]), "out")


def _norm(graph: Graph, x: Value, name: str, tree: Tree) -> Value:
    scale, bias = (parameter(graph, f"{name}/{key}", tree[key]) for key in ("scale", "bias"))
    with graph.scope(name):
        return layer_norm(graph, x, TOKEN_EPS, scale, bias)
