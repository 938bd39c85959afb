"""The T5 encoder (DT5 and its relatives), rescaled so that nothing overflows float16.

The residual stream is kept at 1/16: that factor goes into the embedding (the host's table) and into the matrices that
write to the stream, and 1/256 into the norms' epsilons. Powers of two: nothing is rounded.
"""

from __future__ import annotations

import numpy as np

from nd_jax.converters.graphs.builder import Graph, Value
from nd_jax.converters.graphs.layers import Tree, activation, depth_of, layer_of, linear, parameter, rms_norm
from nd_jax.converters.graphs.text_attention import attend
from nd_jax.models.t5 import T5Config, relative_position_bucket

DOWN = np.float32(1 / 16)


def embedding_table(params: Tree) -> np.ndarray:
    """The host's table [V, D]: the embedding at the stream's scale."""
    return np.asarray(params["shared"]["embedding"], np.float32) * DOWN


def t5_graph(config: T5Config, params: Tree, length: int, name: str = "text_encoder_3") -> Graph:
    """Inputs: ``embeddings`` [S, D], rows of ``embedding_table``; ``bias`` [1, 1, S], ``HIDDEN`` at padding.
    Output ``states`` [S, D or projected width]."""
    graph, tree, eps = Graph(name), params["encoder"], config.layer_norm_epsilon / 256
    x, bias = graph.input("embeddings", length, config.d_model), graph.input("bias", 1, 1, length)
    positions = np.arange(length)
    buckets = relative_position_bucket(
        positions[None, :] - positions[:, None],
        config.relative_attention_num_buckets,
        config.relative_attention_max_distance,
    )
    table = tree["relative_attention_bias"]["embedding"]
    by_position = parameter(
        graph,
        "encoder/relative_attention_bias/by_position",
        table,
        lambda w: w[buckets].transpose(2, 0, 1),
        (config.num_heads, length, length),
    )
    bias = graph.add(by_position, bias, "bias_of_all_layers")
    for i in range(depth_of(tree["block"])):
        attention, feed_forward = (layer_of(tree["block"], i)["layer"][k] for k in "01")
        path = f"encoder/block/{i}/layer"
        with graph.scope(path, 0):
            y = _norm(graph, x, f"{path}/0/layer_norm", attention["layer_norm"], eps)
            weights, inner = attention["SelfAttention"], f"{path}/0/SelfAttention"
            q, k, v = (linear(graph, y, f"{inner}/{each}", weights[each]) for each in "qkv")
            seen = attend(graph, q, k, v, config.num_heads, bias)
            x = graph.add(x, linear(graph, seen, f"{inner}/o", weights["o"], lambda w: w * DOWN), "out")
        with graph.scope(path, 1):
            y = _norm(graph, x, f"{path}/1/layer_norm", feed_forward["layer_norm"], eps)
            weights, inner = feed_forward["DenseReluDense"], f"{path}/1/DenseReluDense"
            first = "wi_0" if config.is_gated_act else "wi"
            hidden = activation(graph, config.dense_act_fn, linear(graph, y, f"{inner}/{first}", weights[first]))
            if config.is_gated_act:
                hidden = graph.mul(hidden, linear(graph, y, f"{inner}/wi_1", weights["wi_1"]), "gated")
            x = graph.add(x, linear(graph, hidden, f"{inner}/wo", weights["wo"], lambda w: w * DOWN), "out")
    x = _norm(graph, x, "encoder/final_layer_norm", tree["final_layer_norm"], eps)
    if config.out_dim is not None:
        first, second = (params["final_projection"][k] for k in "01")
        x = graph.unary("Relu", linear(graph, x, "final_projection/0", first))
        x = linear(graph, x, "final_projection/1", second)
    graph.output("states", x)
    return graph


def _norm(graph: Graph, x: Value, name: str, tree: Tree, eps: float) -> Value:
    with graph.scope(name):
        return rms_norm(graph, x, eps, parameter(graph, f"{name}/scale", tree["scale"]))
