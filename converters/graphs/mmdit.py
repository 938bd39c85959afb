"""The denoiser, one graph per stage: patches of all clips in, velocity of the current clip's patches out.

Everything that depends only on timestep and prompt comes in as vectors from the conditioning graph; positions, rotary
tables and biases come from the host. See ``nd_jax.models.mmdit`` for the network and ``mmdit_block`` for its blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from nd_jax.converters.graphs.attention import Heads, Queries, attend, current_queries, project, query_groups, rotate
from nd_jax.converters.graphs.builder import Graph, Value
from nd_jax.converters.graphs.layers import Tree, depth_of, layer_of, linear, modulate
from nd_jax.models.mmdit import MMDiTConfig
from nd_jax.pyramid.layout import Envelope

ZERO = ("shift", "scale", "gate", "mlp_shift", "mlp_scale", "mlp_gate")
CONTINUOUS = ("scale", "shift")
"""Names of the chunks of the two kinds of conditioned norms, in the order of their kernels' columns."""


def modulations(params: Tree) -> list[tuple[str, tuple[str, ...]]]:
    """Every conditioned norm of the network with the names of its vectors: what flows between the two graphs."""
    norms = []
    for i in range(depth_of(params["blocks"])):
        norms += [(f"blocks/{i}/norm1", ZERO), (f"blocks/{i}/norm1_context", ZERO)]
    return [
        *norms,
        ("last_block/norm1", ZERO),
        ("last_block/norm1_context", CONTINUOUS),
        ("norm_out", CONTINUOUS),
    ]


class Stage(NamedTuple):
    """What every block of one stage needs."""

    graph: Graph
    heads: Heads
    groups: tuple[Queries, ...]
    biases: Mapping[str, Value]
    envelope: Envelope
    current: int
    """Tokens of the current clip."""
    vectors: Mapping[str, Value]


def stage_graph(config: MMDiTConfig, params: Tree, envelope: Envelope, name: str, *, split: bool = True) -> Graph:
    """The graph of one stage.

    Inputs: ``patches`` [L, p p C] of all clips, oldest first; ``positions`` [L, D]; ``text`` [S, D]; ``cosines`` and
    ``sines`` [S + L, 1, head / 2]; the biases of ``query_groups``; the vectors of ``modulations``, each [1, D], scales
    with their 1 added. Output: ``velocity`` [n, p p C], the current clip's patches.
    """
    graph, width, text_length = Graph(name), config.width, envelope.text_length
    length, image = envelope.length, envelope.image_length
    patch = config.patch_size**2 * config.in_channels
    _, height, columns = envelope.clips[-1]
    patches, positions = graph.input("patches", image, patch), graph.input("positions", image, width)
    text = graph.input("text", text_length, width)
    tables = [graph.input(each, length, 1, config.attention_head_dim // 2) for each in ("cosines", "sines")]
    groups = query_groups(envelope, causal=config.use_temporal_causal, split=split)
    stage = Stage(
        graph,
        Heads(config.heads, config.attention_head_dim, config.qk_norm, *tables),
        groups,
        {group.bias: graph.input(group.bias, group.rows, group.keys) for group in groups},
        envelope,
        envelope.frames_per_unit * height * columns // config.patch_size**2,
        {
            f"{norm}/{chunk}": graph.input(f"{norm}/{chunk}", 1, width)
            for norm, chunks in modulations(params)
            for chunk in chunks
        },
    )
    with graph.scope("pos_embed"):
        tree = dict(params["pos_embed"]["proj"])
        tree["kernel"] = Flat(tree["kernel"])
        tokens = graph.add(linear(graph, patches, "pos_embed/proj", tree), positions, "tokens")
    for i in range(depth_of(params["blocks"])):
        with graph.scope("blocks", i):
            tokens, text = block(stage, tokens, text, f"blocks/{i}", layer_of(params["blocks"], i))
    with graph.scope("last_block"):
        tokens = last_block(stage, tokens, text, "last_block", params["last_block"])
    with graph.scope("norm_out"):
        tokens = modulate(graph, tokens, stage.vectors["norm_out/scale"], stage.vectors["norm_out/shift"])
    with graph.scope("proj_out"):
        velocity = linear(graph, tokens, "proj_out", params["proj_out"])
    graph.output("velocity", velocity)
    return graph


class Flat:
    """A convolution's kernel [p, p, C, D] as a matrix [p p C, D], not copied yet."""

    def __init__(self, array: Any):
        self.array, self.shape = array, (int(np.prod(array.shape[:-1])), array.shape[-1])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.array, dtype).reshape(self.shape)


def feed_forward(stage: Stage, x: Value, name: str, norm: str, tree: Tree, part: str) -> Value:
    """The gated feed-forward branch of a block, added to ``x``."""
    graph, vectors = stage.graph, stage.vectors
    with graph.scope(part):
        y = modulate(graph, x, vectors[f"{name}/{norm}/mlp_scale"], vectors[f"{name}/{norm}/mlp_shift"])
        y = linear(graph, y, f"{name}/{part}/up", tree[part]["up"])
        y = linear(graph, graph.unary("Gelu", y, approximate="tanh"), f"{name}/{part}/down", tree[part]["down"])
        return graph.add(x, graph.mul(vectors[f"{name}/{norm}/mlp_gate"], y, "gated"), "out")


def keys_and_values(stage: Stage, image: Value, text: Value, name: str, attn: Tree) -> tuple[Value, Value]:
    """Rotated keys and values [S + L, width] of modulated tokens, text first."""
    graph, h = stage.graph, heads_of(stage, attn)
    with graph.scope("keys"):
        text_keys = project(graph, text, name, attn, "add_k_proj", "norm_add_k", h, query=False)
        image_keys = project(graph, image, name, attn, "to_k", "norm_k", h, query=False)
        keys = rotate(graph, graph.concat([text_keys, image_keys], axis=0), h.cosines, h.sines)
    with graph.scope("values"):
        values = [
            linear(graph, x, f"{name}/{layer}", attn[layer]) for x, layer in ((text, "add_v_proj"), (image, "to_v"))
        ]
        return keys, graph.concat(values, axis=0)


def heads_of(stage: Stage, attn: Tree) -> Heads:
    """With as many heads as a block's arrays have: blocks may be narrowed."""
    return stage.heads._replace(heads=attn["to_q"]["kernel"].shape[-1] // stage.heads.channels)


def block(stage: Stage, image: Value, text: Value, name: str, tree: Tree) -> tuple[Value, Value]:
    """Image [L, D] and text [S, D] tokens after one block."""
    graph, vectors, attn, path = stage.graph, stage.vectors, tree["attn"], f"{name}/attn"
    h = heads_of(stage, attn)
    with graph.scope("norm1"):
        x = modulate(graph, image, vectors[f"{name}/norm1/scale"], vectors[f"{name}/norm1/shift"])
    with graph.scope("norm1_context"):
        y = modulate(graph, text, vectors[f"{name}/norm1_context/scale"], vectors[f"{name}/norm1_context/shift"])
    with graph.scope("attn"):
        keys, values = keys_and_values(stage, x, y, path, attn)
        with graph.scope("queries"):
            text_queries = project(graph, y, path, attn, "add_q_proj", "norm_add_q", h, query=True)
            image_queries = project(graph, x, path, attn, "to_q", "norm_q", h, query=True)
            queries = rotate(graph, graph.concat([text_queries, image_queries], axis=0), h.cosines, h.sines)
        seen = attend(graph, queries, keys, values, stage.groups, stage.biases, h.heads)
        if len(seen) == 1:
            seen = graph.split(seen[0], [text.shape[0], image.shape[0]], axis=0)
        with graph.scope("to_out"):
            moved = linear(graph, graph.concat(seen[1:], axis=0), f"{path}/to_out", attn["to_out"])
            image = graph.add(image, graph.mul(vectors[f"{name}/norm1/gate"], moved, "gated"), "out")
        with graph.scope("to_add_out"):
            moved = linear(graph, seen[0], f"{path}/to_add_out", attn["to_add_out"])
            text = graph.add(text, graph.mul(vectors[f"{name}/norm1_context/gate"], moved, "gated"), "out")
    image = feed_forward(stage, image, name, "norm1", tree, "ff")
    return image, feed_forward(stage, text, name, "norm1_context", tree, "ff_context")


def last_block(stage: Stage, image: Value, text: Value, name: str, tree: Tree) -> Value:
    """The current clip's tokens [n, D] after the block that updates no text."""
    graph, vectors, attn, path = stage.graph, stage.vectors, tree["attn"], f"{name}/attn"
    h = heads_of(stage, attn)
    length, image_length, current = stage.envelope.length, image.shape[0], stage.current
    with graph.scope("norm1"):
        x = modulate(graph, image, vectors[f"{name}/norm1/scale"], vectors[f"{name}/norm1/shift"])
    with graph.scope("norm1_context"):
        y = modulate(graph, text, vectors[f"{name}/norm1_context/scale"], vectors[f"{name}/norm1_context/shift"])
    with graph.scope("attn"):
        keys, values = keys_and_values(stage, x, y, path, attn)
        with graph.scope("queries"):
            x = graph.slice(x, 0, image_length - current, image_length)
            queries = project(graph, x, path, attn, "to_q", "norm_q", h, query=True)
            tables = [graph.slice(table, 0, length - current, length) for table in (h.cosines, h.sines)]
            queries = rotate(graph, queries, *tables)
        groups = current_queries(stage.groups, stage.envelope, current)
        seen = attend(graph, queries, keys, values, groups, stage.biases, h.heads)[0]
        with graph.scope("to_out"):
            image = graph.slice(image, 0, image_length - current, image_length)
            moved = linear(graph, seen, f"{path}/to_out", attn["to_out"])
            image = graph.add(image, graph.mul(vectors[f"{name}/norm1/gate"], moved, "gated"), "out")
    return feed_forward(stage, image, name, "norm1", tree, "ff")
