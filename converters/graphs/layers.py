"""Layers that several graphs share: linear maps, norms, activations. Parameters are leaves of the parameter tree."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from nd_jax.converters.graphs.builder import Graph, Value
from nd_jax.errors import UserError

Tree = Mapping[str, Any]


def layer_of(tree: Tree, index: int) -> Tree:
    """One layer of a stacked tree, or of one whose leaves are tuples of layers, which may differ in width; slices are
    taken when they are used."""

    def pick(leaf: Any) -> Any:
        return leaf[index] if isinstance(leaf, tuple) else Layer(leaf, index)

    return {key: layer_of(value, index) if isinstance(value, Mapping) else pick(value) for key, value in tree.items()}


class Layer:
    """``array[index]``, not copied yet."""

    def __init__(self, array: Any, index: int):
        self.array, self.index, self.shape = array, index, tuple(array.shape[1:])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(np.asarray(self.array)[self.index], dtype)  # a view: indexing in JAX would compile


def depth_of(tree: Tree) -> int:
    """Number of stacked layers."""
    leaf = next(iter(tree.values()))
    if isinstance(leaf, Mapping):
        return depth_of(leaf)
    return len(leaf) if isinstance(leaf, tuple) else leaf.shape[0]


def parameter(
    graph: Graph,
    name: str,
    leaf: Any,
    change: Callable[[np.ndarray], np.ndarray] | None = None,
    shape: tuple[int, ...] | None = None,
) -> Value:
    """A parameter as a weight, read (and changed) in float32 only when the graph is saved."""

    def array() -> np.ndarray:
        found = np.asarray(leaf, np.float32)
        return found if change is None else change(found)

    return graph.weight(name, array, tuple(leaf.shape) if shape is None else shape)


def linear(
    graph: Graph,
    x: Value,
    name: str,
    tree: Tree,
    change: Callable[[np.ndarray], np.ndarray] | None = None,
    suffix: str = "",
    width: int | None = None,
    shift: float = 0.0,
) -> Value:
    """``x @ kernel + bias`` for x [rows, in].

    ``change`` is applied to the kernel [in, out] and to the bias [1, out] alike (it permutes, scales or picks columns;
    ``width`` is what it leaves of them); ``shift`` is added to the bias.
    """
    rows, inputs = x.shape
    kernel, bias = tree["kernel"], tree.get("bias")
    outputs = kernel.shape[-1] if width is None else width
    weights = [parameter(graph, f"{name}/kernel{suffix}", kernel, change, (inputs, outputs))]
    if bias is not None:

        def moved(b: np.ndarray) -> np.ndarray:
            b = b.reshape(1, -1)
            return (b if change is None else change(b)).reshape(-1) + np.float32(shift)

        weights.append(parameter(graph, f"{name}/bias{suffix}", bias, moved, (outputs,)))
    if bias is None:
        return graph.matmul(x, weights[0], "linear")
    return graph.op("Gemm", [x, *weights], (rows, outputs), "linear")


def layer_norm(graph: Graph, x: Value, eps: float, scale: Value | None = None, bias: Value | None = None) -> Value:
    """Over the last axis; without ``scale`` a vector of ones, which the operator insists on."""
    width = x.shape[-1]
    if scale is None:
        scale = graph.weight(f"ones/{width}", np.ones(width, np.float32))
    return graph.op(
        "LayerNormalization", [x, scale, *([] if bias is None else [bias])], x.shape, "norm", axis=-1, epsilon=eps
    )


def rms_norm(graph: Graph, x: Value, eps: float, scale: Value) -> Value:
    """Over the last axis."""
    return graph.op("RMSNormalization", [x, scale], x.shape, "norm", axis=-1, epsilon=eps)


def modulate(graph: Graph, x: Value, scale: Value, shift: Value) -> Value:
    """Layer norm, then ``scale x + shift``; the scale already contains the 1 of ``(1 + scale)``."""
    return graph.add(graph.mul(layer_norm(graph, x, 1e-6), scale, "scaled"), shift, "shifted")


def silu(graph: Graph, x: Value) -> Value:
    return graph.mul(x, graph.unary("Sigmoid", x), "silu")


def quick_gelu(graph: Graph, x: Value) -> Value:
    return graph.mul(x, graph.unary("Sigmoid", graph.mul(x, graph.constant(1.702))), "quick_gelu")


def mish(graph: Graph, x: Value) -> Value:
    return graph.mul(x, graph.unary("Tanh", graph.unary("Softplus", x)), "mish")


def activation(graph: Graph, name: str, x: Value) -> Value:
    """The activation functions of ``nd_jax.models.activations`` by name."""
    plain = {"relu": "Relu", "elu": "Elu", "tanh": "Tanh", "sigmoid": "Sigmoid", "softplus": "Softplus"}
    if name in ("linear", "identity"):
        return x
    if name in plain:
        return graph.unary(plain[name], x)
    if name in ("silu", "swish"):
        return silu(graph, x)
    if name == "quick_gelu":
        return quick_gelu(graph, x)
    if name == "mish":
        return mish(graph, x)
    if name in ("gelu", "gelu_new", "gelu_pytorch_tanh"):
        return graph.unary("Gelu", x, approximate="none" if name == "gelu" else "tanh")
    if name == "leaky_relu":
        return graph.unary("LeakyRelu", x, alpha=0.01)
    if name == "relu6":
        six, zero = graph.constant(6.0), graph.constant(0.0)
        return graph.op("Clip", [x, zero, six], x.shape)
    raise UserError(f"graph {graph.name}: activation {name!r} has no graph")
