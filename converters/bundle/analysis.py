"""Static counts of a graph: multiply-adds, weights, bytes, operators, layout copies, a roofline.

Bytes assume 16-bit values and that every operator reads its inputs from memory and writes its outputs there: an upper
bound, since compilers fuse and keep tiles in on-chip memory.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nd_jax.converters.bundle.targets import Target

VALUE_BYTES = 2
WEIGHT_BYTES = {"w8a16": 1, "fp16": 2}
LAYOUT = ("Transpose", "Reshape", "DepthToSpace")
FREE = ("Reshape", "Identity")
"""Operators that need not move anything, as far as bytes are concerned."""
Shapes = Mapping[str, tuple[int, ...]]


@dataclass
class Counts:
    """What a graph does once. ``layout``: (number, bytes written) of operators that only reorder values."""

    macs: int = 0
    parameters: int = 0
    value_bytes: int = 0
    attention_bytes: int = 0
    """Of the attention's scores and weights alone."""
    operators: Counter = field(default_factory=Counter)
    layout: dict[str, tuple[int, int]] = field(default_factory=dict)
    boundary_bytes: int = 0
    """Of transposes right behind an input or before an output, which vanish where the compiler works channels-last."""
    peak_bytes: int = 0
    """Most bytes of values that are alive at once, operators taken in the graph's order; weights are apart."""

    def weight_bytes(self, precision: str) -> int:
        """Of the weights in the precision the graph is deployed in."""
        return self.parameters * WEIGHT_BYTES[precision]

    def milliseconds(self, target: Target, precision: str) -> float:
        """Estimate: ``max(MACs / rate, weight bytes / bandwidth)``, both at the target's published peaks; float16 at
        half the rate of 8-bit weights. What a real chip loses to anything else is not in it."""
        rate = target.tmacs * 1e12 / (2 if precision == "fp16" else 1)
        return 1e3 * max(self.macs / rate, self.weight_bytes(precision) / (target.gigabytes * 1e9))


def analyse(nodes: Iterable[Any], shapes: Shapes, weights: Shapes, inputs: Iterable[str], outputs: Iterable[str]):
    """``Counts`` of ONNX nodes whose values and weights have these shapes."""
    nodes, starts, ends = list(nodes), set(inputs), set(outputs)
    found = Counts(peak_bytes=peak_bytes(nodes, shapes, starts, ends))
    found.parameters = sum(math.prod(shape) for name, shape in weights.items() if not name.startswith("integers/"))
    everything = {**shapes, **weights}
    for node in nodes:
        made = [shapes[name] for name in node.output]
        read = [everything[name] for name in node.input if name in shapes]
        found.operators[node.op_type] += 1
        found.macs += node_macs(node, everything)
        moved = VALUE_BYTES * sum(map(math.prod, made))
        if node.op_type not in FREE:
            found.value_bytes += moved + VALUE_BYTES * sum(map(math.prod, read))
        if node.op_type == "Softmax" or "masked" in node.name or "scores" in node.name:
            found.attention_bytes += moved + VALUE_BYTES * sum(map(math.prod, read))
        if node.op_type in LAYOUT:
            count, size = found.layout.get(node.op_type, (0, 0))
            found.layout[node.op_type] = (count + 1, size + moved)
            if node.op_type == "Transpose" and (node.input[0] in starts or node.output[0] in ends):
                found.boundary_bytes += moved
    return found


def peak_bytes(nodes: Sequence[Any], shapes: Shapes, inputs: Iterable[str], outputs: Iterable[str]) -> int:
    """Most bytes of values alive at once: from the operator that makes one (inputs: from the start) to the last that
    reads it (outputs: to the end). What only has another shape is the same memory."""
    owner = {name: name for name in inputs}
    last: dict[str, int] = {}
    for index, node in enumerate(nodes):
        for name in node.input:
            if name in owner:
                last[owner[name]] = index
        for name in node.output:
            owner[name] = owner.get(node.input[0], name) if node.op_type in FREE else name
    last |= {owner[name]: len(nodes) for name in outputs}
    size = {name: VALUE_BYTES * math.prod(shapes[name]) for name in set(owner.values())}
    live = {name for name in inputs if name in last}
    most = now = sum(size[name] for name in live)
    for index, node in enumerate(nodes):
        made = {owner[name] for name in node.output} - live
        live |= made
        now += sum(size[name] for name in made)
        most = max(most, now)
        gone = {name for name in live if last.get(name, index) <= index}
        live -= gone
        now -= sum(size[name] for name in gone)
    return most


def node_macs(node: Any, shapes: Shapes) -> int:
    """Multiply-adds of one node."""
    if node.op_type in ("MatMul", "Gemm"):
        return math.prod(shapes[node.output[0]]) * shapes[node.input[0]][-1]
    if node.op_type == "Conv":
        return math.prod(shapes[node.output[0]]) * math.prod(shapes[node.input[1]][1:])
    return 0


def of_graph(graph: Any) -> Counts:
    """Counts of a graph under construction; its weights need not exist."""
    shapes = {name: value.shape for name, value in graph.values.items() if name not in graph.weights}
    weights = {name: weight.shape for name, weight in graph.weights.items()}
    return analyse(graph.nodes, shapes, weights, graph.inputs, graph.outputs)


def of_model(model: Any) -> Counts:
    """Counts of a saved float32 graph, loaded without its weights."""
    graph = model.graph
    values = [*graph.input, *graph.output, *graph.value_info]
    shapes = {v.name: tuple(axis.dim_value for axis in v.type.tensor_type.shape.dim) for v in values}
    weights = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    ends = ([value.name for value in each] for each in (graph.input, graph.output))
    return analyse(graph.node, shapes, weights, *ends)
