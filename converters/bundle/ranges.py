"""The range of every value in a graph over recorded inputs: the graph itself, with its extremes as outputs."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from nd_jax.converters.graphs.session import open_session
from nd_jax.errors import UserError

Range = tuple[float, float]


def with_extremes(model: onnx.ModelProto) -> tuple[onnx.ModelProto, list[str]]:
    """The model whose outputs are the least and the largest element of every value that a node makes."""
    found = onnx.ModelProto()
    found.CopyFrom(model)
    names = [name for node in found.graph.node for name in node.output]
    del found.graph.output[:]
    for name in names:
        for op in ("ReduceMin", "ReduceMax"):
            found.graph.node.append(helper.make_node(op, [name], [f"{op}:{name}"], keepdims=0))
            found.graph.output.append(helper.make_tensor_value_info(f"{op}:{name}", TensorProto.FLOAT, []))
    return found, names


def value_ranges(path: Path, runs: Iterable[Mapping[str, np.ndarray]]) -> dict[str, Range]:
    """(least, largest) of every value of a saved float32 graph, inputs included, over ``runs``.

    Raises UserError if a value is not finite.
    """
    model, names = with_extremes(onnx.load(path, load_external_data=False))
    found: dict[str, Range] = {}

    def widen(name: str, low: float, high: float) -> None:
        if not np.isfinite([low, high]).all():
            raise UserError(f"{path.name}: value {name} is not finite on a recorded input")
        before = found.get(name, (low, high))
        found[name] = (min(before[0], low), max(before[1], high))

    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        # External data has to lie below the model's folder: link it there for as long as this takes.
        watched = Path(folder) / path.name
        for name in data_files(model):
            try:
                (Path(folder) / name).hardlink_to(path.with_name(name))
            except OSError:  # a file system without links
                shutil.copyfile(path.with_name(name), Path(folder) / name)
        watched.write_bytes(model.SerializeToString())
        session = open_session(watched)
        for inputs in runs:
            feed = {name: np.ascontiguousarray(x, np.float32) for name, x in inputs.items()}
            for name, x in feed.items():
                widen(name, float(x.min()), float(x.max()))
            extremes = session.run(None, feed)
            for index, name in enumerate(names):
                widen(name, float(extremes[2 * index]), float(extremes[2 * index + 1]))
    return found


def data_files(model: onnx.ModelProto) -> set[str]:
    """Names of the external-data files of a model that has been loaded without them."""
    return {
        entry.value for tensor in model.graph.initializer for entry in tensor.external_data if entry.key == "location"
    }
