"""W8A16: a float32 graph with quantise-dequantise pairs around every operator (QDQ form), weights as integers.

Written here instead of by onnxruntime's quantiser because every encoding has to be ours: weights by channel for matrix
products too, the same bytes in all three stages, one range for values that are only moved, 8-bit norm scales.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from nd_jax.converters.bundle.encodings import Encoding, activation_encoding, dequantise, quantise, weight_encoding
from nd_jax.converters.bundle.ranges import Range
from nd_jax.converters.graphs.builder import INLINE, DataFile, Weight, save_model
from nd_jax.errors import UserError

CHANNEL_AXIS = {"MatMul": 1, "Gemm": 1, "Conv": 0}
"""Operators with weights (their second input), and the axis of a weight's output channels."""
NORMS = {"LayerNormalization", "RMSNormalization"}
MOVING = {"Reshape", "Transpose", "Split", "Slice", "Resize", "DepthToSpace", "SpaceToDepth", "Identity"}
"""Operators that only move values: what comes out keeps the encoding of what goes in."""
AS_IT_IS = {"Resize", "Clip"}
"""Operators whose constants are not values of the network: scales, bounds."""
MARGIN = 2.0
"""Ranges are widened by this: 16 bits have room for it, and values beyond a recorded range would be cut off. Or less,
where a graph's input is sure to stay in its range."""
KNOWN = {"cosines": (-1.0, 1.0), "sines": (-1.0, 1.0), "sinusoid": (-1.0, 1.0), "bias*": (-100.0, 0.0)}
"""Ranges of inputs that are known without recording."""
FIXED = {"Softmax": (0.0, 1.0), "Sigmoid": (0.0, 1.0), "Tanh": (-1.0, 32767 / 32768)}
"""Ranges that the NPU's operators have whatever a graph says: a bias behind another one would be scaled wrongly."""
WEIGHT_TYPES = {"int8": np.int8, "int16": np.int16}
Overrides = Mapping[str, str]
"""Patterns of weight names to "int8" or "int16". 16 bits are two operators with 8-bit weights whose results are added:
as many bytes, and the NPU computes them as exactly as 8 bits, which it does not do with 16-bit integers."""


def value_groups(graph: onnx.GraphProto) -> dict[str, str]:
    """Representative of every value: those that are joined by moving operators share one."""
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent.setdefault(name, name) != name:
            name = parent[name]
        return name

    for node in graph.node:
        if node.op_type in MOVING:
            for output in node.output:
                parent[root(output)] = root(node.input[0])
    return {name: root(name) for name in list(parent)}


def activation_encodings(
    graph: onnx.GraphProto, ranges: Mapping[str, Range], margin: float = MARGIN
) -> dict[str, Encoding]:
    """One encoding for every value, from the ranges, times ``margin``, of all values of its group; softmax is 0 to 1.

    What a Gemm of two values takes as its second is symmetric: the NPU takes it in 16 bits only so.
    """
    groups, widest = value_groups(graph), {}
    fixed = {node.output[0]: FIXED[node.op_type] for node in graph.node if node.op_type in FIXED}
    for pattern, known in KNOWN.items():
        fixed |= {value.name: known for value in graph.input if fnmatch.fnmatchcase(value.name, pattern)}
    for name, (low, high) in ranges.items():
        low, high = fixed.get(name, (low * margin, high * margin))
        group = groups.get(name, name)
        before = widest.get(group, (low, high))
        widest[group] = (min(low, before[0]), max(high, before[1]))
    made = {name for node in graph.node for name in node.output} | {value.name for value in graph.input}
    seconds = {node.input[1] for node in graph.node if node.op_type == "Gemm" and node.input[1] in made}
    for group in {groups.get(name, name) for name in seconds}:
        reach = max(map(abs, widest[group]))
        widest[group] = (-reach, reach * 32767 / 32768)
    return {name: activation_encoding(*widest[groups.get(name, name)]) for name in ranges}


def weight_type(name: str, overrides: Overrides) -> type:
    """Type of a weight: the last pattern that fits its name decides."""
    chosen = "int8"
    for pattern, kind in overrides.items():
        if fnmatch.fnmatchcase(name, pattern):
            chosen = kind
    if chosen not in WEIGHT_TYPES:
        raise UserError(f"quantisation of {name}: {chosen!r}; expected one of {', '.join(WEIGHT_TYPES)}")
    return WEIGHT_TYPES[chosen]


@dataclass
class Quantiser:
    """One pass over a graph. ``weights``: every float initializer by name; ``data``: where large constants go."""

    graph: onnx.GraphProto
    weights: Mapping[str, np.ndarray]
    activations: dict[str, Encoding]
    data: DataFile
    overrides: Overrides = field(default_factory=dict)
    rounded: Mapping[str, tuple[np.ndarray, Encoding]] = field(default_factory=dict)
    """Integers and encodings that are given, of weights of 8 bits."""
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, TensorProto] = field(default_factory=dict)
    _real: set[str] = field(default_factory=set)

    def constant(self, name: str, array: np.ndarray) -> str:
        """A constant, in the graph if it is small."""
        if name not in self.constants:
            if array.nbytes <= INLINE:
                self.constants[name] = numpy_helper.from_array(array, name)
            else:
                self.constants[name] = self.data.store(name, Weight(array.shape, lambda: array), array.dtype)
        return name

    def dequantised(self, name: str, integers: np.ndarray, encoding: Encoding, *, own: str = "") -> str:
        """Name of the real value of an integer constant. ``own``: a suffix for constants that belong to one graph."""
        real = f"{name}{own}/real"
        if real not in self._real:
            inputs = [
                self.constant(f"{name}{own}/{integers.dtype.name}", integers),
                self.constant(f"{name}{own}/scale", encoding.scale),
            ]
            if encoding.zero.any() or encoding.zero.dtype.kind == "u":
                inputs.append(self.constant(f"{name}{own}/zero", encoding.zero))
            axis = {} if encoding.axis is None else {"axis": encoding.axis}
            self.nodes.append(helper.make_node("DequantizeLinear", inputs, [real], name=f"{real}/node", **axis))
            self._real.add(real)
        return real

    def weight(self, node: onnx.NodeProto, index: int) -> str:
        """The real value of a weight, norm scale, bias or other constant as its operator wants it."""
        name = node.input[index]
        array = self.weights[name]
        if node.op_type in CHANNEL_AXIS and index == 1:
            encoding = self.channels(node)
            given = self.given(name)
            return self.dequantised(name, quantise(array, encoding) if given is None else given[0], encoding)
        if node.op_type in CHANNEL_AXIS and index == 2:
            scale = self.channels(node).scale * self.activations[node.input[0]].scale
            integers = np.rint(array.astype(np.float64) / scale).clip(-(2**31) + 1, 2**31 - 1).astype(np.int32)
            encoding = Encoding(scale.astype(np.float32), np.zeros(scale.shape, np.int32), 0)
            # Once for every input: a layer that is used twice has inputs of two scales, and the NPU reads a bias's
            # integers at the scale of the products, not at the one that is written beside them.
            return self.dequantised(name, integers, encoding, own=f"/{self.graph.name}/{node.input[0]}")
        if node.op_type in NORMS and index == 1:
            encoding = activation_encoding(float(array.min()), float(array.max()), np.uint8)
            return self.dequantised(name, quantise(array, encoding), encoding)
        if node.op_type in NORMS and index == 2:
            scale = self.weights[node.input[1]]
            step = activation_encoding(float(scale.min()), float(scale.max()), np.uint8).scale
            step = step * self.activations[node.input[0]].scale
            step = np.maximum(step, np.abs(array).max() / 2**30).astype(np.float32).reshape(())
            encoding, integers = Encoding(step, np.zeros((), np.int32)), np.rint(array / np.float64(step))
            return self.dequantised(name, integers.astype(np.int32), encoding, own=f"/{self.graph.name}")
        encoding = activation_encoding(float(array.min()), float(array.max()))
        return self.dequantised(name, quantise(array, encoding), encoding)

    def given(self, name: str) -> tuple[np.ndarray, Encoding] | None:
        """Integers and encoding of a weight that need not be found here."""
        return self.rounded.get(name) if weight_type(name, self.overrides) is np.int8 else None

    def channels(self, node: onnx.NodeProto) -> Encoding:
        """Encoding of an operator's weight, or of the larger piece of a 16-bit one."""
        if (given := self.given(node.input[1])) is not None:
            return given[1]
        bias = self.weights[node.input[2]] if len(node.input) > 2 else None
        return weight_encoding(self.weights[node.input[1]], CHANNEL_AXIS[node.op_type], bias=bias)

    def wide(self, node: onnx.NodeProto) -> bool:
        """Whether an operator has weights that take 16 bits."""
        known = node.op_type in CHANNEL_AXIS and node.input[1] in self.weights
        return known and weight_type(node.input[1], self.overrides) is np.int16

    def add_pieces(self, node: onnx.NodeProto, new: onnx.NodeProto) -> None:
        """``new``, which has the larger piece of the weights and the bias, plus the same with what that leaves."""
        name, out, axis = node.input[1], node.output[0], CHANNEL_AXIS[node.op_type]
        encoding = self.channels(node)
        left = self.weights[name] - dequantise(quantise(self.weights[name], encoding), encoding)
        scale, zero, _ = self.activations[node.input[0]]
        others = tuple(k for k in range(left.ndim) if k != axis)
        reach = float(np.abs(left).sum(axis=others).max()) * max(int(zero), 65535 - int(zero)) * float(scale)
        low, high = (float(dequantise(np.array(end, np.uint16), self.activations[out])) for end in (0, 65535))
        self.activations[f"{out}/most"] = activation_encoding(low - reach, high + reach)
        self.activations[f"{out}/rest"] = activation_encoding(-reach, reach)
        encoding = weight_encoding(left, axis)
        weights = {"most": new.input[1], "rest": self.dequantised(f"{name}/rest", quantise(left, encoding), encoding)}
        for piece, weight in weights.items():
            part = onnx.NodeProto()
            part.CopyFrom(new)
            part.name, part.output[:] = f"{node.name}/{piece}", [f"{out}/{piece}/float"]
            part.input[:] = [new.input[0], weight, *(new.input[2:] if piece == "most" else [])]
            self.nodes.append(part)
            self.pair(f"{out}/{piece}/float", f"{out}/{piece}", f"{out}/{piece}")
        pieces = [f"{out}/{piece}" for piece in weights]
        self.nodes.append(helper.make_node("Add", pieces, [f"{out}/float"], name=node.name))

    def make_room(self) -> None:
        """Widen the encodings of inputs so narrow that a bias behind them would not fit 32 bits."""
        groups = value_groups(self.graph)
        for node in self.graph.node:
            if node.op_type in CHANNEL_AXIS and len(node.input) > 2:
                name, bias = node.input[0], np.abs(self.weights[node.input[2]])
                needed = float((bias / self.channels(node).scale).max()) / (2**31 - 1)
                scale, zero, _ = self.activations[name]
                if needed > scale:
                    wide = Encoding(np.float32(needed * 1.001).reshape(()), zero // np.uint16(needed / scale + 1))
                    group = groups.get(name, name)
                    for each in [n for n in self.activations if groups.get(n, n) == group]:
                        self.activations[each] = wide

    def pair(self, source: str, target: str, name: str) -> None:
        """Quantise ``source`` and dequantise it as ``target``."""
        encoding = self.activations[name]
        scale = self.constant(f"{name}/{self.graph.name}/scale", encoding.scale)
        zero = self.constant(f"{name}/{self.graph.name}/zero", encoding.zero)
        integers = f"{name}/integers"
        for op, given, made in (("QuantizeLinear", source, integers), ("DequantizeLinear", integers, target)):
            self.nodes.append(helper.make_node(op, [given, scale, zero], [made], name=f"{name}/{op}"))

    def signed(self, real: str, name: str) -> str:
        """``real``, the value of ``name``, once more, as signed 16-bit integers: what a product of two values takes as
        its second. Where that is unsigned, onnxruntime-qnn 2.7.0 puts 8 bits in its place and says nothing."""
        target = f"{name}/signed"
        if target not in self._real:
            scale, zero = (float(x) for x in self.activations[name][:2])
            reach = max(zero, 65535 - zero) * scale
            self.activations[target] = Encoding(np.float32(reach / 32767).reshape(()), np.array(0, np.int16))
            self.pair(real, target, target)
            self._real.add(target)
        return target

    def run(self) -> onnx.GraphProto:
        """The quantised graph, with the names of inputs, outputs and operators that the float one has."""
        self.make_room()
        inputs = {value.name: f"{value.name}/real" for value in self.graph.input}
        for name, real in inputs.items():
            self.pair(name, real, name)
        made = {name for node in self.graph.node for name in node.output} | set(inputs)
        for node in self.graph.node:
            new = onnx.NodeProto()
            new.CopyFrom(node)
            for index, name in enumerate(node.input):
                if name in self.weights and not (node.op_type in AS_IT_IS or name.startswith("integers/")):
                    new.input[index] = self.weight(node, index)
                elif name in inputs:
                    new.input[index] = inputs[name]
                if node.op_type == "MatMul" and index == 1 and name in made:
                    new.input[index] = self.signed(new.input[index], name)
            new.output[:] = [f"{name}/float" for name in node.output]
            if self.wide(node):
                self.add_pieces(node, new)
            else:
                self.nodes.append(new)
            for name in node.output:
                self.pair(f"{name}/float", name, name)
        graph = helper.make_graph(self.nodes, self.graph.name, self.graph.input, self.graph.output)
        used = {name for node in self.nodes for name in node.input}
        kept = [tensor for tensor in self.graph.initializer if tensor.name in used]
        graph.initializer.extend([*kept, *self.constants.values()])
        return graph


def stored_array(tensor: TensorProto, folder: Path) -> np.ndarray:
    """A saved graph's constant; one that lies in a file beside it is mapped, so that memory holds one at a time."""
    place = {entry.key: entry.value for entry in tensor.external_data}
    if not place:
        return numpy_helper.to_array(tensor)
    dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    path, offset = folder / place["location"], int(place.get("offset", 0))
    return np.memmap(path, dtype, "r", offset=offset, shape=tuple(tensor.dims))


def quantise_graph(
    source: Path,
    target: Path,
    data: DataFile,
    ranges: Mapping[str, Range],
    overrides: Overrides | None = None,
    rounded: Mapping[str, tuple[np.ndarray, Encoding]] | None = None,
    margin: float = MARGIN,
) -> None:
    """Write the W8A16 form of the saved float32 graph ``source`` to ``target``, its weights to ``data``.

    ``ranges`` is what ``value_ranges`` found, to be widened by ``margin``; graphs that share ``data`` share their
    weights. ``rounded``: integers and encodings of weights that were learned.
    """
    model = onnx.load(source, load_external_data=False)
    weights = {tensor.name: stored_array(tensor, source.parent) for tensor in model.graph.initializer}
    kept = {name for node in model.graph.node if node.op_type in AS_IT_IS for name in node.input}
    small = [
        numpy_helper.from_array(np.array(array), name)
        for name, array in weights.items()
        if name in kept or name.startswith("integers/")
    ]
    del model.graph.initializer[:]
    model.graph.initializer.extend(small)
    activations = activation_encodings(model.graph, ranges, margin)
    save_model(Quantiser(model.graph, weights, activations, data, overrides or {}, rounded or {}).run(), target)
