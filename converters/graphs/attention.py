"""The denoiser's attention for an NPU: one product per head and query clip, no mask over all pairs of tokens.

Tokens are in order of time (text, then the clips oldest first), so what a clip may read is a prefix of the keys, cut
off statically; what is left to say is which keys are padding, one row for all queries of a clip. Only a clip of
several frames needs a row for each query. Padded queries read something harmless: nothing reads them.

Heads are pieces of [tokens, channels], as Qualcomm's own converters split them, and scores are Gemm with its second
operand transposed: nothing is copied, and what onnxruntime-qnn makes of it keeps 16 bits of both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from nd_jax.converters.graphs.builder import Graph, Value
from nd_jax.converters.graphs.layers import layer_norm, linear, parameter, rms_norm
from nd_jax.pyramid.layout import Envelope

WHOLE_MASK = "bias"
"""Name of the bias input where queries are not split: [tokens or 1, tokens]."""
EPS = 1e-5
"""Of the norms of queries and keys."""


class Queries(NamedTuple):
    """Query tokens ``start`` .. ``stop`` read keys 0 .. ``keys`` through the bias input ``bias`` [rows, keys]."""

    start: int
    stop: int
    keys: int
    bias: str
    rows: int


def query_groups(envelope: Envelope, *, causal: bool = True, split: bool = True) -> tuple[Queries, ...]:
    """How attention is cut. Without ``split`` all queries read all keys through a whole mask."""
    length = envelope.length
    if not causal:
        return (Queries(0, length, length, WHOLE_MASK, 1),)
    if not split:
        return (Queries(0, length, length, WHOLE_MASK, length),)
    start = envelope.text_length
    groups = [Queries(0, start, length, "bias/text", 1)]
    for index, (frames, height, width) in enumerate(envelope.clips):
        stop = start + frames * height * width // envelope.patch_size**2
        groups.append(Queries(start, stop, stop, f"bias/clip{index}", 1 if frames == 1 else stop - start))
        start = stop
    return tuple(groups)


def current_queries(groups: Sequence[Queries], envelope: Envelope, current: int) -> tuple[Queries, ...]:
    """The group of the current clip alone, for the last block."""
    last, length = groups[-1], envelope.length
    rows = last.rows if last.rows == 1 or last.start else current
    return (last._replace(start=length - current, rows=rows),)


class Heads(NamedTuple):
    """Sizes and rotary tables ([tokens, 1, channels / 2]) of one stage."""

    heads: int
    channels: int
    norm: str | None
    cosines: Value
    sines: Value


def to_halves(heads: int, channels: int):
    """Function from [n, heads * channels] to the same with pairs (2i, 2i + 1) moved to (i, channels / 2 + i)."""
    order = np.concatenate([np.arange(0, channels, 2), np.arange(1, channels, 2)])
    return lambda x: x.reshape(-1, heads, channels)[:, :, order].reshape(x.shape[0], -1)


def project(
    graph: Graph, x: Value, name: str, attn: Mapping[str, Any], layer: str, norm: str, h: Heads, *, query: bool
) -> Value:
    """Normalised queries or keys [tokens, heads, channels], pairs moved to halves, queries scaled for the scores."""
    permute, factor = to_halves(h.heads, h.channels), np.float32(h.channels**-0.5 if query else 1.0)
    if h.norm is None:
        moved = linear(graph, x, f"{name}/{layer}", attn[layer], lambda w: permute(w) * factor)
        return graph.reshape(moved, x.shape[0], h.heads, h.channels)
    projected = graph.reshape(
        linear(graph, x, f"{name}/{layer}", attn[layer], permute), x.shape[0], h.heads, h.channels
    )

    def per_head(w: np.ndarray) -> np.ndarray:
        return to_halves(1, h.channels)(w[None])[0] * factor

    with graph.scope(norm):
        scale = parameter(graph, f"{name}/{norm}/scale", attn[norm]["scale"], per_head)
        if h.norm == "rms_norm":
            return rms_norm(graph, projected, EPS, scale)
        bias = parameter(graph, f"{name}/{norm}/bias", attn[norm]["bias"], per_head)
        return layer_norm(graph, projected, EPS, scale, bias)


def rotate(graph: Graph, x: Value, cosines: Value, sines: Value) -> Value:
    """Rotary embedding of [tokens, heads, channels] on contiguous halves; flat [tokens, heads * channels] out."""
    tokens, heads, channels = x.shape
    a, b = graph.split(x, [channels // 2] * 2, axis=2)
    first = graph.sub(graph.mul(a, cosines), graph.mul(b, sines), "rotated_a")
    second = graph.add(graph.mul(a, sines), graph.mul(b, cosines), "rotated_b")
    return graph.reshape(graph.concat([first, second], axis=2), tokens, heads * channels)


def attend(
    graph: Graph, q: Value, k: Value, v: Value, groups: Sequence[Queries], biases: Mapping[str, Value], heads: int
) -> list[Value]:
    """Attention of flat [tokens, width] arrays, group by group. ``q`` holds the groups' queries one after another."""
    width, first = q.shape[1], groups[0].start
    seen = []
    for group in groups:
        with graph.scope(group.bias.replace("bias/", "")):
            bias = biases[group.bias]
            if bias.shape[0] not in (1, group.stop - group.start):  # a whole mask, of which the last block needs a part
                bias = graph.slice(bias, 0, group.start, group.stop)
            pieces = [width // heads] * heads
            queries = graph.split(graph.slice(q, 0, group.start - first, group.stop - first), pieces, axis=1)
            k_heads = graph.split(graph.slice(k, 0, 0, group.keys), pieces, axis=1)
            v_heads = graph.split(graph.slice(v, 0, 0, group.keys), pieces, axis=1)
            out = []
            for q_head, k_head, v_head in zip(queries, k_heads, v_heads, strict=True):
                # A product that takes its second operand transposed: no layout copy, and 16 bits stay 16 bits.
                shape = (q_head.shape[0], k_head.shape[0])
                scores = graph.op("Gemm", [q_head, k_head], shape, "scores", transB=1)
                scores = graph.add(scores, bias, "masked")
                out.append(graph.matmul(graph.softmax(scores), v_head, "seen"))
            seen.append(graph.concat(out, axis=1))
    return seen
