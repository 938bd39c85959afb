"""Full-size graphs from random weights, one at a time, for what compilation costs: time, memory, bytes.

Weights are random bytes, a layer's own, scaled as a fresh network's; ranges are made up. Sizes, operators, time and
memory do not depend on them; accuracy does, and is not measured here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nd_jax.converters.bundle.quantise import quantise_graph
from nd_jax.converters.graphs.builder import DataFile, Graph
from nd_jax.converters.graphs.parts import system_parts
from nd_jax.errors import UserError
from nd_jax.models.system import ADAPTER, CODEC, DENOISER, SystemConfig
from nd_jax.pyramid.layout import Envelope

RANGE = (-8.0, 8.0)
"""Of every value, made up."""


def random_tree(tree: Any, rng: np.random.Generator) -> Any:
    """Float16 arrays of an abstract parameter tree's shapes; half the memory of float32, and read as that."""
    if isinstance(tree, Mapping):
        return {key: random_tree(value, rng) for key, value in tree.items()}
    shape = tuple(tree.shape)
    fan_in = int(np.prod(shape[-2:-1])) if len(shape) > 1 else 16
    found = np.empty(shape, np.float16)
    for row in found.reshape(shape[0] if len(shape) > 2 else 1, -1):  # a stacked layer after the other
        row[:] = rng.integers(-127, 128, row.shape, np.int8)
        row *= np.float16(1 / (73 * np.sqrt(fan_in)))
    return found


def random_params(config: SystemConfig, names: tuple[str, ...], seed: int = 0) -> dict[str, Any]:
    """Random parameters of the named networks, the same for a name whatever else is asked for."""
    definitions = config.definitions()
    return {
        name: random_tree(definitions[name].abstract(), np.random.Generator(np.random.Philox([seed, *name.encode()])))
        for name in names
    }


def part_graph(
    config: SystemConfig, name: str, envelopes: tuple[Envelope, ...], text_length: int, clip_length: int, seed: int = 0
) -> tuple[Graph, str]:
    """A graph by its name in bundles, over random weights, and its precision. Raises UserError for other names."""
    definitions = config.definitions()
    wanted = {"adapter": ADAPTER, "vae_encoder": CODEC, "decoder": CODEC, "decoder_first": CODEC}.get(name, name)
    wanted = wanted if wanted in definitions else DENOISER
    params = {each: definition.abstract() for each, definition in definitions.items()}
    params |= random_params(config, (wanted,), seed)
    for part in system_parts(config, params, envelopes, text_length, clip_length):
        if part.name == name:
            return part.graph, part.precision
    raise UserError(f"no graph {name!r} in this system")


def write_graph(folder: Path, graph: Graph, precision: str) -> Path:
    """The form that is compiled, its weights beside it; the float32 form of a quantised graph is removed again."""
    path = folder / f"{graph.name}.onnx"
    with DataFile(folder / f"{graph.name}.data") as data:
        graph.save(path, data)
    if precision == "fp16":
        return path
    values = {name for node in graph.nodes for name in node.output} | set(graph.inputs)
    target = folder / f"{graph.name}.w8a16.onnx"
    with DataFile(folder / f"{graph.name}.w8a16.data") as data:
        quantise_graph(path, target, data, dict.fromkeys(values, RANGE))
    for each in (path, folder / f"{graph.name}.data"):
        each.unlink()
    return target
