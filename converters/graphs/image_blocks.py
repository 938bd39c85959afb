"""Residual blocks of the image networks' graphs (UNet, image decoder), on one frame [1, C, h, w]."""

from __future__ import annotations

from typing import Any

from nd_jax.converters.graphs.builder import Graph, Value
from nd_jax.converters.graphs.codec import conv, double, group_norm
from nd_jax.converters.graphs.layers import Tree, linear, silu


def plain_conv(graph: Graph, x: Value, name: str, tree: Tree, **options: Any) -> Value:
    """A convolution with its bias."""
    return conv(graph, x, name, tree["kernel"], tree["bias"], **options)


def residual(
    graph: Graph, x: Value, name: str, tree: Tree, groups: int, eps: float, embedding: Value | None = None
) -> Value:
    """norm, SiLU, convolution, twice, around a skip; the activated ``embedding`` [1, E], if given, is projected and
    added after the first convolution."""
    with graph.scope(name):
        y = silu(graph, group_norm(graph, x, f"{name}/norm1", tree["norm1"], groups, eps))
        y = plain_conv(graph, y, f"{name}/conv1", tree["conv1"])
        if embedding is not None:
            added = linear(graph, embedding, f"{name}/time_emb_proj", tree["time_emb_proj"])
            y = graph.add(y, graph.reshape(added, 1, y.shape[1], 1, 1), "embedded")
        y = silu(graph, group_norm(graph, y, f"{name}/norm2", tree["norm2"], groups, eps))
        y = plain_conv(graph, y, f"{name}/conv2", tree["conv2"])
        if "conv_shortcut" in tree:
            x = plain_conv(graph, x, f"{name}/conv_shortcut", tree["conv_shortcut"])
        return graph.add(x, y, "out")


def grow(graph: Graph, x: Value, name: str, tree: Tree) -> Value:
    """Nearest upsampling by 2 and a convolution."""
    return plain_conv(graph, double(graph, x, name), f"{name}/conv", tree["conv"])
