"""A bundle of a few hand-made graphs, quantised, with test vectors: what the Hexagon tools need and no more."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from nd_jax.converters.bundle.quantise import quantise_graph
from nd_jax.converters.bundle.ranges import value_ranges
from nd_jax.converters.bundle.writer import BundleWriter
from nd_jax.converters.graphs.builder import DataFile, Graph
from nd_jax.converters.graphs.session import open_session, run_session
from nd_jax.converters.hexagon.vectors import KEY, write_vectors

STAGES = ("denoiser_stage0", "denoiser_stage1", "denoiser_stage2")


def weights(name: str, *shape: int) -> np.ndarray:
    """Numbers that depend on the name alone."""
    rng = np.random.Generator(np.random.Philox(sum(map(ord, name))))
    return rng.standard_normal(shape, np.float32) / np.float32(np.sqrt(shape[0]))


def float_graph() -> Graph:
    """A linear layer and its activation, for fp16; names of inputs and outputs have a slash."""
    graph = Graph("adapter")
    x = graph.input("in/states", 4, 16)
    y = graph.op("Gemm", [x, graph.weight("w", weights("w", 16, 8)), graph.weight("b", weights("b", 8))], (4, 8), "fc")
    graph.output("out/text", graph.unary("Gelu", y))
    return graph


def attention_graph() -> Graph:
    """Products of two values, as in attention: one with a transposed operand that is mostly positive, one without."""
    graph = Graph("attention")
    x = graph.input("x", 12, 16)
    queries = graph.matmul(x, graph.weight("q/w", weights("q", 16, 8)), "q")
    inputs = [x, graph.weight("k/w", weights("k", 16, 8)), graph.weight("k/b", np.full(8, 2, np.float32))]
    keys = graph.op("Gemm", inputs, (12, 8), "k")
    scores = graph.op("Gemm", [queries, keys], (12, 12), "scores", transB=1)
    graph.output("y", graph.matmul(graph.softmax(scores), x, "seen"))
    return graph


def twice_graph() -> Graph:
    """One convolution with a large bias behind Tanh, used on inputs of two scales, as a decoder's frames use it."""
    graph = Graph("twice")
    x = graph.input("x", 1, 4, 8, 8)
    kernel = graph.weight("kernel", weights("kernel", 4, 4, 3, 3))
    bias = graph.weight("bias", np.array([2.0, -1.5, 1.0, -2.5], np.float32))

    def conv(value):
        return graph.op("Conv", [value, kernel, bias], (1, 4, 8, 8), "conv", kernel_shape=[3, 3], pads=[1, 1, 1, 1])

    first = conv(graph.unary("Tanh", x))
    graph.output("y", graph.add(first, conv(graph.mul(first, graph.constant(4.0)))))
    return graph


def wide_graph() -> Graph:
    """Kernels that are identities beside small corrections, which one scale of 8 bits cannot hold."""
    graph = Graph("wide")
    x = graph.input("x", 1, 8, 8, 8)
    kernel = 0.02 * weights("identity", 8, 8, 3, 3)
    kernel[np.arange(8), np.arange(8), 1, 1] += 1
    inputs = [x, graph.weight("kernel", kernel), graph.weight("bias", weights("bias", 8))]
    y = graph.op("Conv", inputs, (1, 8, 8, 8), "conv", kernel_shape=[3, 3], pads=[1, 1, 1, 1])
    y = graph.transpose(graph.reshape(y, 8, 64), 1, 0)
    inputs = [y, graph.weight("fc/kernel", weights("fc", 8, 4)), graph.weight("fc/bias", weights("fc", 4))]
    graph.output("y", graph.op("Gemm", inputs, (64, 4), "linear"))
    return graph


def stage_graph(name: str, rows: int) -> Graph:
    """A linear layer with weights that all stages share, over rows of its own."""
    graph = Graph(name)
    x = graph.input("x", rows, 512)
    graph.output("velocity", graph.matmul(x, graph.weight("shared", weights("shared", 512, 512)), "linear"))
    return graph


def write_mini(folder: Path, stages: tuple[str, ...] = STAGES[:2]) -> Path:
    """The bundle: ``adapter`` for fp16, the others W8A16."""
    folder.mkdir()
    writer, data = BundleWriter(folder), {}
    graphs = [(float_graph(), "fp16", "adapter"), (attention_graph(), "w8a16", "attention")]
    graphs += [(twice_graph(), "w8a16", "twice"), (wide_graph(), "w8a16", "wide")]
    graphs += [(stage_graph(name, 8 * (k + 1)), "w8a16", "denoiser") for k, name in enumerate(stages)]
    runs = {}
    for graph, precision, stem in graphs:
        path = writer.graph(graph, precision=precision, data=stem)
        rng = np.random.Generator(np.random.Philox(len(graph.name)))
        inputs = [
            {name: rng.standard_normal(value.shape, np.float32) for name, value in graph.inputs.items()}
            for _ in range(2)
        ]
        session = open_session(path)
        runs[graph.name] = [(each, run_session(session, each)) for each in inputs]
        if precision == "w8a16":
            if stem not in data:
                data[stem] = DataFile(path.with_name(f"{stem}.w8a16.data"))
            target = path.with_name(f"{graph.name}.w8a16.onnx")
            overrides = {"*": "int16"} if graph.name == "wide" else {}
            quantise_graph(path, target, data[stem], value_ranges(path, inputs), overrides)
            writer.form(graph.name, "w8a16", f"graphs/{target.name}", [f"graphs/{stem}.w8a16.data"])
    for file in data.values():
        file.close()
    writer.content[KEY] = write_vectors(folder, runs)
    writer.content |= {key: {} for key in ("text", "latent", "denoiser", "sampling", "codec")}
    writer.content["video"] = {"height": 64, "width": 64, "frames": 9, "fps": 24}
    steps = {"text": ["adapter", "attention"], "denoise": list(stages), "decode": ["twice", "wide"]}
    writer.content["schedule"] = [{"step": name, "load": each, "unload": each} for name, each in steps.items()]
    writer.finish()
    return folder
