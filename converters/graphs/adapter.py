"""From text states to the denoiser's width, once per prompt: the ContextAdapter, or a teacher's context embedder."""

from __future__ import annotations

from nd_jax.converters.graphs.builder import Graph
from nd_jax.converters.graphs.layers import Tree, activation, linear
from nd_jax.models.context_adapter import ContextAdapterConfig


def adapter_graph(config: ContextAdapterConfig, params: Tree, length: int, name: str = "context_adapter") -> Graph:
    """``states`` [S, in] to ``text`` [S, out]."""
    graph = Graph(name)
    x = hidden = graph.input("states", length, config.input_dims)
    for i, skip in enumerate(config.skips):
        tree, path = params["network_layers"][str(i)], f"network_layers/{i}"
        with graph.scope(path):
            if config.pre_activation:
                hidden = linear(graph, activation(graph, config.activation_fn, hidden), path, tree)
            else:
                hidden = activation(graph, config.activation_fn, linear(graph, hidden, path, tree))
            if skip:
                hidden = graph.concat([x, hidden], axis=1)
    with graph.scope("output_layer"):
        out = linear(graph, hidden, "output_layer", params["output_layer"])
        out = activation(graph, config.out_activation_fn, out)
    graph.output("text", out)
    return graph


def embedder_graph(params: Tree, length: int, name: str = "context_embedder") -> Graph:
    """The same for a denoiser's own linear layer."""
    graph, tree = Graph(name), params["context_embedder"]
    x = graph.input("states", length, tree["kernel"].shape[0])
    with graph.scope("context_embedder"):
        graph.output("text", linear(graph, x, "context_embedder", tree))
    return graph
