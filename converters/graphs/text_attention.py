"""Attention of the text encoders' and the UNet's graphs: all heads in one array [heads, tokens, channels]."""

from __future__ import annotations

from nd_jax.converters.graphs.builder import Graph, Value

HIDDEN = -1e4
"""Added to scores that do not count: nothing is left of them in float16, in which these graphs run."""


def attend(graph: Graph, query: Value, key: Value, value: Value, heads: int, bias: Value | None = None) -> Value:
    """Flat [tokens, width] arrays, of queries and of keys, and a bias that broadcasts to [heads, queries, keys]; flat
    [queries, width] out."""
    width = query.shape[1]
    q, k, v = (graph.reshape(x, x.shape[0], heads, width // heads) for x in (query, key, value))
    scores = graph.matmul(graph.transpose(q, 1, 0, 2), graph.transpose(k, 1, 2, 0), "scores")
    weights = graph.softmax(scores if bias is None else graph.add(scores, bias, "masked"))
    seen = graph.transpose(graph.matmul(weights, graph.transpose(v, 1, 0, 2), "seen"), 1, 0, 2)
    return graph.reshape(seen, query.shape[0], width)
