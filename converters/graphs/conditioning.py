"""What depends only on timestep and prompt: the vectors that modulate every norm of the denoiser.

A third of the denoiser's weights are here. They are needed once per timestep and prompt (three times a video at one
step per stage) instead of at every call, in a graph that is unloaded before the stages run.
"""

from __future__ import annotations

import numpy as np

from nd_jax.converters.graphs.builder import Graph, Value
from nd_jax.converters.graphs.layers import Tree, layer_of, linear, silu
from nd_jax.converters.graphs.mmdit import modulations
from nd_jax.models.embeddings import TIMESTEP_CHANNELS
from nd_jax.models.mmdit import MMDiTConfig


def embedder(graph: Graph, x: Value, name: str, tree: Tree) -> Value:
    """Linear, SiLU, linear."""
    hidden = linear(graph, x, f"{name}/linear_1", tree["linear_1"])
    return linear(graph, silu(graph, hidden), f"{name}/linear_2", tree["linear_2"])


def subtree(params: Tree, norm: str) -> Tree:
    """The parameters of a norm called as in ``modulations``."""
    parts = norm.split("/")
    if parts[0] == "blocks":
        return layer_of(params["blocks"][parts[2]], int(parts[1]))
    for part in parts:
        params = params[part]
    return params


def conditioning_graph(config: MMDiTConfig, params: Tree, name: str = "conditioning") -> Graph:
    """Inputs: ``sinusoid`` [1, 256] of the timestep, ``pooled`` [1, P]. Outputs: every vector of ``modulations``.

    Each vector has a linear layer of its own (columns of the stored kernel), so that quantisation gives each a range of
    its own. Scales come with their 1 added.
    """
    graph, width = Graph(name), config.width
    sinusoid = graph.input("sinusoid", 1, TIMESTEP_CHANNELS)
    pooled = graph.input("pooled", 1, config.pooled_projection_dim)
    with graph.scope("time_text_embed"):
        tree = params["time_text_embed"]
        with graph.scope("timestep_embedder"):
            time = embedder(graph, sinusoid, "time_text_embed/timestep_embedder", tree["timestep_embedder"])
        with graph.scope("text_embedder"):
            text = embedder(graph, pooled, "time_text_embed/text_embedder", tree["text_embedder"])
        embedding = silu(graph, graph.add(time, text, "embedding"))
    for norm, chunks in modulations(params):
        tree = subtree(params, norm)["linear"]
        for index, chunk in enumerate(chunks):

            def columns(w: np.ndarray, start: int = index * width) -> np.ndarray:
                return w[:, start : start + width]

            with graph.scope(norm, "linear", chunk):
                vector = linear(
                    graph,
                    embedding,
                    f"{norm}/linear",
                    tree,
                    columns,
                    suffix=f"/{chunk}",
                    width=width,
                    shift=1.0 if chunk.endswith("scale") else 0.0,
                )
            graph.output(f"{norm}/{chunk}", vector)
    return graph
