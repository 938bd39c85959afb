"""What a compiled graph takes and gives: names, shapes, types, and the encodings that it uses inside."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import onnx
from onnx import numpy_helper

from nd_jax.converters.runtime.errors import BundleError
from nd_jax.converters.runtime.files import shown
from nd_jax.converters.runtime.manifest import Bundle

PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*")
"""Names of inputs and outputs that may appear in scripts and, with '_' for '/', name files."""


def flat(name: str) -> str:
    """An input's or output's name as a file's. Raises BundleError for names that could not be one."""
    if len(name) > 120 or not PLAIN.fullmatch(name):
        raise BundleError(f"{shown(name)} cannot name a file; expected letters, digits, '_', '-', '.' and '/'")
    return name.replace("/", "_")


def encodings(model: onnx.ModelProto) -> dict[str, dict[str, Any]]:
    """Scale, zero point and offset of every quantised input and output: ``real = (integer - zero) * scale``.

    ``offset`` is Qualcomm's: minus the zero point. Empty for a float graph.
    """
    arrays = {tensor.name: tensor for tensor in model.graph.initializer if not tensor.external_data}
    inputs = {value.name for value in model.graph.input}
    outputs = {value.name for value in model.graph.output}
    found = {}
    for node in model.graph.node:
        name = None
        if node.op_type == "QuantizeLinear" and node.input[0] in inputs:
            name = node.input[0]
        if node.op_type == "DequantizeLinear" and node.output[0] in outputs:
            name = node.output[0]
        if name is not None:
            scale, zero = (numpy_helper.to_array(arrays[each]) for each in node.input[1:3])
            found[name] = {
                "dtype": zero.dtype.name,
                "scale": float(scale),
                "zero_point": int(zero),
                "offset": -int(zero),
            }
    return found


def ends_of(bundle: Bundle, name: str, form: str) -> dict[str, dict[str, Any]]:
    """Inputs and outputs of a graph: shape, file name, dtype at the binary's border and the encoding inside it.

    The border is float32 on purpose: the binary quantises for itself, so that hosts need no arithmetic of their own.
    """
    inner = encodings(onnx.load(bundle.model(name, form), load_external_data=False))
    found: dict[str, dict[str, Any]] = {}
    for side in ("inputs", "outputs"):
        found[side] = {
            value: {"shape": list(shape), "dtype": "float32", "file": f"{flat(value)}.raw", "inner": inner.get(value)}
            for value, shape in bundle.graph(name)[side].items()
        }
        files = [each["file"] for each in found[side].values()]
        if len(set(files)) < len(files):
            raise BundleError(f"{bundle.folder}: two {side} of graph {name} have one file name")
    return found


def metadata(graphs: Mapping[str, Mapping[str, Any]], files: Mapping[str, str]) -> str:
    """``metadata.yaml`` as Qualcomm AI Hub's exports have it: model files with their inputs and outputs.

    Args:
        graphs: ``ends_of`` by graph.
        files: a graph's binary in the handed-over folder.
    """
    lines = ["model_files:"]
    for name, ends in graphs.items():
        lines.append(f"  {files[name]}:")
        for side in ("inputs", "outputs"):
            lines.append(f"    {side}:")
            for value, entry in ends[side].items():
                lines += [f"      {value}:", f"        shape: {entry['shape']}", f"        dtype: {entry['dtype']}"]
                inner = entry["inner"]
                if inner:
                    lines += [
                        f"        description: quantised inside the graph as {inner['dtype']}",
                        "        quantization_parameters:",
                        f"          scale: {inner['scale']!r}",
                        f"          zero_point: {inner['zero_point']}",
                    ]
    return "\n".join(lines) + "\n"
