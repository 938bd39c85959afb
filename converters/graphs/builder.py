"""An ONNX graph under construction: values that know their shapes, nodes named by scope, weights kept lazily.

Weights are thunks until the graph is saved, when they are written one at a time: a graph of any size is built in the
memory of its largest weight.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nd_jax.errors import UserError

try:
    import onnx
    import onnxruntime  # noqa: F401 (whoever builds graphs also checks them)
    from onnx import TensorProto, helper, numpy_helper
except ImportError:
    raise UserError("ONNX graphs need the packages onnx and onnxruntime: pip install 'nd-jax[npu]'") from None

OPSET, IR_VERSION = 23, 10
INLINE = 256
"""Bytes up to which a constant is stored in the graph itself."""
PAGE, ALIGNMENT = 4096, 64
"""Of weights in the external-data file: large ones begin with a page, so that they can be mapped."""
TYPES = {np.dtype(np.float32): TensorProto.FLOAT, np.dtype(np.int64): TensorProto.INT64}


@dataclass(frozen=True)
class Value:
    """A float32 tensor of the graph; its shape is static and has at most four axes."""

    name: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass
class Weight:
    """A constant: its shape, and how to get it. ``array`` is called once per graph file that is written."""

    shape: tuple[int, ...]
    array: Callable[[], np.ndarray]


class Graph:
    """Nodes, inputs, outputs and weights. ``name`` becomes the model's name and the stem of its files."""

    def __init__(self, name: str):
        self.name = name
        self.nodes: list[onnx.NodeProto] = []
        self.inputs: dict[str, Value] = {}
        self.outputs: dict[str, Value] = {}
        self.weights: dict[str, Weight] = {}
        self.values: dict[str, Value] = {}
        self._scope: list[str] = []
        self._used: dict[str, int] = {}

    # ---- structure

    @contextlib.contextmanager
    def scope(self, *names: object) -> Iterator[None]:
        """Names of nodes and values inside begin with these."""
        self._scope += map(str, names)
        yield
        del self._scope[len(self._scope) - len(names) :]

    def _unique(self, name: str) -> str:
        """``name`` in the scope, with a number from its second use on; taken from now on."""
        name = "/".join([*self._scope, name])
        self._used[name] = count = self._used.get(name, 0) + 1
        return name if count == 1 else f"{name}_{count}"

    def _add(self, name: str, shape: Sequence[int]) -> Value:
        if len(shape) > 4 or any(type(n) is not int or n < 1 for n in map(int, shape)):
            raise UserError(f"graph {self.name}: {name} has shape {list(shape)}; expected at most 4 axes, none empty")
        value = Value(name, tuple(map(int, shape)))
        self.values[name] = value
        return value

    def input(self, name: str, *shape: int) -> Value:
        """A float32 input."""
        self.inputs[name] = value = self._add(name, shape)
        return value

    def output(self, name: str, value: Value) -> None:
        """Make ``value`` an output called ``name``: it is renamed, or copied if it is an input."""
        if value.name in self.inputs:
            value = self.unary("Identity", value)
        for node in self.nodes:
            for names in (node.input, node.output):
                names[:] = [name if each == value.name else each for each in names]
        self.values.pop(value.name)
        self.outputs[name] = self._add(name, value.shape)

    def weight(self, name: str, array: np.ndarray | Callable[[], np.ndarray], shape: Sequence[int] = ()) -> Value:
        """A constant under its full name (no scope is added). A callable needs the ``shape`` it will have."""
        shape = tuple(shape) if callable(array) else array.shape
        if name not in self.weights:
            self.weights[name] = Weight(shape, array if callable(array) else lambda: array)
            return self._add(name, shape) if shape else self._scalar(name)
        if self.weights[name].shape != shape:
            raise UserError(f"graph {self.name}: weight {name} has shapes {self.weights[name].shape} and {shape}")
        return self.values[name]

    def _scalar(self, name: str) -> Value:
        self.values[name] = Value(name, ())
        return self.values[name]

    def constant(self, value: float) -> Value:
        """A scalar, shared by all who need the same."""
        return self.weight(f"constant/{value!r}", np.float32(value).reshape(()))

    def integers(self, *values: int) -> str:
        """Name of an int64 vector."""
        name = "integers/" + ",".join(map(str, values))
        self.weights.setdefault(name, Weight((len(values),), lambda: np.array(values, np.int64)))
        return name

    def op(self, op: str, inputs: Sequence[Value | str], shape: Sequence[int], name: str = "", **attributes: Any):
        """One node with one output of ``shape``."""
        return self.ops(op, inputs, [shape], name, **attributes)[0]

    def ops(
        self, op: str, inputs: Sequence[Value | str], shapes: Sequence[Sequence[int]], name: str = "", **attributes: Any
    ) -> list[Value]:
        """One node with an output for every shape."""
        base = self._unique(name or op)
        each = [base] if len(shapes) == 1 else [f"{base}.{i}" for i in range(len(shapes))]
        outs = [self._add(*pair) for pair in zip(each, shapes, strict=True)]
        names = [each.name if isinstance(each, Value) else each for each in inputs]
        self.nodes.append(helper.make_node(op, names, [out.name for out in outs], name=base, **attributes))
        return outs

    # ---- operations

    def add(self, a: Value, b: Value, name: str = "") -> Value:
        return self.op("Add", [a, b], np.broadcast_shapes(a.shape, b.shape), name)

    def sub(self, a: Value, b: Value, name: str = "") -> Value:
        return self.op("Sub", [a, b], np.broadcast_shapes(a.shape, b.shape), name)

    def mul(self, a: Value, b: Value, name: str = "") -> Value:
        return self.op("Mul", [a, b], np.broadcast_shapes(a.shape, b.shape), name)

    def div(self, a: Value, b: Value, name: str = "") -> Value:
        return self.op("Div", [a, b], np.broadcast_shapes(a.shape, b.shape), name)

    def unary(self, op: str, x: Value, name: str = "", **attributes: Any) -> Value:
        return self.op(op, [x], x.shape, name, **attributes)

    def matmul(self, a: Value, b: Value, name: str = "") -> Value:
        """Batched over leading axes, which must be equal or absent."""
        shape = (*np.broadcast_shapes(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1])
        if a.shape[-1] != b.shape[-2]:
            raise UserError(f"graph {self.name}: product of {a.name} {a.shape} and {b.name} {b.shape}")
        return self.op("MatMul", [a, b], shape, name)

    def softmax(self, x: Value, name: str = "") -> Value:
        return self.unary("Softmax", x, name, axis=-1)

    def reshape(self, x: Value, *shape: int) -> Value:
        if x.shape == shape:
            return x
        if math.prod(shape) != x.size:
            raise UserError(f"graph {self.name}: {x.name} {x.shape} cannot take the shape {shape}")
        return self.op("Reshape", [x, self.integers(*shape)], shape)

    def transpose(self, x: Value, *order: int) -> Value:
        return self.op("Transpose", [x], [x.shape[i] for i in order], perm=list(order))

    def concat(self, parts: Sequence[Value], axis: int) -> Value:
        if len(parts) == 1:
            return parts[0]
        axis %= len(parts[0].shape)
        shape = list(parts[0].shape)
        shape[axis] = sum(part.shape[axis] for part in parts)
        return self.op("Concat", list(parts), shape, axis=axis)

    def split(self, x: Value, sizes: Sequence[int], axis: int) -> list[Value]:
        """Pieces of these sizes along ``axis``."""
        axis %= len(x.shape)
        if len(sizes) == 1:
            return [x]
        shapes = [(*x.shape[:axis], n, *x.shape[axis + 1 :]) for n in sizes]
        return self.ops("Split", [x, self.integers(*sizes)], shapes, axis=axis)

    def slice(self, x: Value, axis: int, start: int, stop: int) -> Value:
        """``x[start:stop]`` along ``axis``."""
        if (start, stop) == (0, x.shape[axis]):
            return x
        shape = (*x.shape[:axis], stop - start, *x.shape[axis + 1 :])
        return self.op("Slice", [x, *map(self.integers, (start, stop, axis))], shape)

    # ---- files

    def proto(self) -> onnx.GraphProto:
        """The graph without its weights."""

        def info(value: Value) -> onnx.ValueInfoProto:
            return helper.make_tensor_value_info(value.name, TensorProto.FLOAT, value.shape)

        inner = [v for n, v in self.values.items() if n not in self.weights | self.inputs | self.outputs]
        return helper.make_graph(
            self.nodes,
            self.name,
            list(map(info, self.inputs.values())),
            list(map(info, self.outputs.values())),
            value_info=list(map(info, inner)),
        )

    def save(self, path: Path, data: DataFile) -> None:
        """Write the graph to ``path`` and its weights to ``data``, which may already hold them for another graph."""
        if data.path.parent != path.parent:
            raise UserError(f"{path}: its weights have to lie beside it, not in {data.path.parent}")
        graph = self.proto()
        for name, weight in self.weights.items():
            dtype = np.int64 if name.startswith("integers/") else np.float32
            size = math.prod(weight.shape) * np.dtype(dtype).itemsize
            if size <= INLINE:
                array = np.ascontiguousarray(weight.array(), dtype).reshape(weight.shape)
                graph.initializer.append(numpy_helper.from_array(array, name))
            else:
                graph.initializer.append(data.store(name, weight, dtype))
        save_model(graph, path)


class DataFile:
    """An external-data file that several graphs may share: a weight of one name is stored once."""

    def __init__(self, path: Path):
        self.path = path
        self._tensors: dict[str, TensorProto] = {}
        self._file = open(path, "wb")  # noqa: SIM115 (closed by ``close``)

    def __enter__(self) -> DataFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """No more weights."""
        self._file.close()

    def flush(self) -> None:
        """What has been stored so far can be read."""
        self._file.flush()

    def store(self, name: str, weight: Weight, dtype: Any = np.float32) -> TensorProto:
        """The tensor that refers to the stored weight."""
        known = self._tensors.get(name)
        if known is not None:
            if tuple(known.dims) != tuple(weight.shape):
                raise UserError(f"{self.path.name}: weight {name} has shapes {list(known.dims)} and {weight.shape}")
            return known
        array = np.ascontiguousarray(weight.array(), dtype)
        if array.shape != tuple(weight.shape):
            raise UserError(f"{self.path.name}: weight {name} has shape {array.shape}; expected {weight.shape}")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise UserError(f"{self.path.name}: weight {name} is not finite")
        self._file.write(b"\0" * (-self._file.tell() % (PAGE if array.nbytes >= 16 * PAGE else ALIGNMENT)))
        place = {"location": self.path.name, "offset": self._file.tell(), "length": array.nbytes}
        self._file.write(array.tobytes())
        tensor = TensorProto(name=name, dims=array.shape, data_type=helper.np_dtype_to_tensor_dtype(array.dtype))
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in place.items():
            tensor.external_data.add(key=key, value=str(value))
        self._tensors[name] = tensor
        return tensor


def save_model(graph: onnx.GraphProto, path: Path) -> None:
    """Write a graph that refers to weights beside it."""
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="nd-jax"
    )
    path.write_bytes(model.SerializeToString())
