"""What float16 arithmetic makes of a graph, on a machine without it: every weight and value is rounded to float16.

Sums inside an operator stay float32, as in an NPU's accumulators. A proxy, to be confirmed by a compiler's emulator.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from nd_jax.converters.graphs.session import open_session


def rounded(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with its weights and the values of all nodes rounded to float16. ``model`` holds its weights."""
    found = onnx.ModelProto()
    found.CopyFrom(model)
    for tensor in found.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            half = numpy_helper.to_array(tensor).astype(np.float16)
            tensor.CopyFrom(numpy_helper.from_array(half.astype(np.float32), tensor.name))
    nodes, inputs = [], {value.name: f"{value.name}/rounded" for value in found.graph.input}

    def through(source: str, target: str) -> None:
        nodes.append(helper.make_node("Cast", [source], [f"{target}/half"], to=TensorProto.FLOAT16))
        nodes.append(helper.make_node("Cast", [f"{target}/half"], [target], to=TensorProto.FLOAT))

    for name, target in inputs.items():
        through(name, target)
    for node in found.graph.node:
        node.input[:] = [inputs.get(name, name) for name in node.input]
        names = list(node.output)
        node.output[:] = [f"{name}/float" for name in names]
        nodes.append(node)
        for name in names:
            through(f"{name}/float", name)
    graph = helper.make_graph(nodes, found.graph.name, found.graph.input, found.graph.output, found.graph.initializer)
    found.graph.CopyFrom(graph)
    return found


def half_session(path: Path) -> onnxruntime.InferenceSession:
    """A session of the rounded form of a saved float32 graph."""
    model = rounded(onnx.load(path))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / path.name
        onnx.save(model, file, save_as_external_data=True, location=f"{path.stem}.data")
        return open_session(file, optimise=False)  # an optimiser would see that the casts undo each other
