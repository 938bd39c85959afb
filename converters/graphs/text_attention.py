"""Self-attention of the text encoders' graphs: all heads in one array [heads, tokens, channels]."""

from __future__ import annotations

from nd_jax.converters.graphs.builder import Graph, Value

HIDDEN = -1e4
"""Added to scores that do not count: nothing is left of them in float16, in which these graphs run."""


def attend(graph: Graph, query: Value, key: Value, value: Value, heads: int, bias: Value) -> Value:
    """Flat [tokens, width] arrays and a bias that broadcasts to [heads, tokens, tokens]; flat out."""
    tokens, width = query.shape
    q, k, v = (graph.reshape(x, tokens, heads, width // heads) for x in (query, key, value))
    scores = graph.matmul(graph.transpose(q, 1, 0, 2), graph.transpose(k, 1, 2, 0), "scores")
    weights = graph.softmax(graph.add(scores, bias, "masked"))
    seen = graph.transpose(graph.matmul(weights, graph.transpose(v, 1, 0, 2), "seen"), 1, 0, 2)
    return graph.reshape(seen, tokens, width)
