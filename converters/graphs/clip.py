"""CLIP text towers: the pooled, projected state of a prompt."""

from __future__ import annotations

import numpy as np

from nd_jax.converters.graphs.builder import Graph, Value
from nd_jax.converters.graphs.layers import Tree, activation, depth_of, layer_norm, layer_of, linear, parameter
from nd_jax.converters.graphs.text_attention import HIDDEN, attend
from nd_jax.models.clip import CLIPTextConfig


def clip_graph(
    config: CLIPTextConfig, params: Tree, length: int, name: str, *, penultimate: bool = False, pooled: bool = True
) -> Graph:
    """Inputs: ``embeddings`` [S, D], token plus position; ``selector`` [1, S], 1 at the pooled position and 0
    elsewhere. Output ``text_embeds`` [1, P] (``pooled`` [1, D] of towers without projection) and, if asked for,
    ``penultimate`` [S, D], the last-but-one layer's states without norm. Without ``pooled`` those alone, and neither
    the last layer nor the selector."""
    graph, tree, heads = Graph(name), params["text_model"], config.num_attention_heads
    x = graph.input("embeddings", length, config.hidden_size)
    selector = graph.input("selector", 1, length) if pooled else None
    mask = graph.weight("causal_mask", lambda: np.triu(np.full((length, length), HIDDEN), 1), (length, length))
    layers, factor = tree["encoder"]["layers"], np.float32((config.hidden_size // heads) ** -0.5)
    before = x
    for i in range(depth_of(layers) - (not pooled)):
        layer, path, before = layer_of(layers, i), f"text_model/encoder/layers/{i}", x
        with graph.scope(path):
            y = _norm(graph, x, f"{path}/layer_norm1", layer["layer_norm1"], config.layer_norm_eps)
            inner, weights = f"{path}/self_attn", layer["self_attn"]
            query = linear(graph, y, f"{inner}/q_proj", weights["q_proj"], lambda w: w * factor)
            key, value = (linear(graph, y, f"{inner}/{each}", weights[each]) for each in ("k_proj", "v_proj"))
            seen = attend(graph, query, key, value, heads, mask)
            x = graph.add(x, linear(graph, seen, f"{inner}/out_proj", weights["out_proj"]), "attended")
            y = _norm(graph, x, f"{path}/layer_norm2", layer["layer_norm2"], config.layer_norm_eps)
            y = linear(graph, y, f"{path}/mlp/fc1", layer["mlp"]["fc1"])
            y = linear(graph, activation(graph, config.hidden_act, y), f"{path}/mlp/fc2", layer["mlp"]["fc2"])
            x = graph.add(x, y, "out")
    if selector is None:
        graph.output("penultimate", x)
        return graph
    # The norm is by token, so it may come after the choice of a token.
    token = graph.matmul(selector, x, "pooled_token")
    token = _norm(graph, token, "text_model/final_layer_norm", tree["final_layer_norm"], config.layer_norm_eps)
    if config.with_projection:
        graph.output("text_embeds", linear(graph, token, "text_projection", params["text_projection"]))
    else:
        graph.output("pooled", token)
    if penultimate:
        graph.output("penultimate", before)
    return graph


def _norm(graph: Graph, x: Value, name: str, tree: Tree, eps: float) -> Value:
    with graph.scope(name):
        scale, bias = (parameter(graph, f"{name}/{key}", tree[key]) for key in ("scale", "bias"))
        return layer_norm(graph, x, eps, scale, bias)
