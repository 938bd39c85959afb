"""Graphs on onnxruntime's CPU provider, for checks."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime

from nd_jax.converters.graphs.builder import DataFile, Graph


def open_session(path: Path, *, threads: int = 0, optimise: bool = True) -> onnxruntime.InferenceSession:
    """A session on the CPU provider and on nothing else."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if not optimise:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def run_graph(graph: Graph, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Outputs by name of a graph that has not been saved yet."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{graph.name}.onnx"
        with DataFile(path.with_suffix(".data")) as data:
            graph.save(path, data)
        return run_session(open_session(path), inputs)


def run_session(session: onnxruntime.InferenceSession, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Outputs by name."""
    names = [output.name for output in session.get_outputs()]
    feed = {name: np.ascontiguousarray(x, np.float32) for name, x in inputs.items()}
    return dict(zip(names, session.run(names, feed), strict=True))


def snr(reference: np.ndarray, found: np.ndarray) -> float:
    """``20 log10(|ref| / |ref - found|)`` in dB, over all elements; infinite for equal arrays."""
    reference, found = (np.asarray(x, np.float64) for x in (reference, found))
    with np.errstate(divide="ignore"):
        return float(20 * np.log10(np.linalg.norm(reference) / np.linalg.norm(reference - found)))
