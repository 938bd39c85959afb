"""Adds to a float32 bundle what its graphs are deployed in: W8A16 forms, and figures for all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import onnx
from onnx import numpy_helper

from nd_jax.converters.bundle.calibration import Calibration
from nd_jax.converters.bundle.encodings import dequantise, quantise, weight_encoding
from nd_jax.converters.bundle.halves import half_session
from nd_jax.converters.bundle.measure import GOALS, split_snr
from nd_jax.converters.bundle.quantise import CHANNEL_AXIS, Overrides, quantise_graph
from nd_jax.converters.bundle.ranges import value_ranges
from nd_jax.converters.bundle.writer import GRAPHS, BundleWriter
from nd_jax.converters.graphs.builder import DataFile
from nd_jax.converters.graphs.session import open_session, snr

W8A16 = "w8a16"
EXACT = 100.0
"""dB from which a weight in 8 bits is as good as itself and needs no more: averages over a group, for example."""
OVERRIDES: Mapping[str, Overrides] = {}
"""Default exceptions by graph: patterns of weight names to types."""


def deploy(
    writer: BundleWriter,
    calibration: Calibration,
    overrides: Mapping[str, Overrides] = OVERRIDES,
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Quantise every W8A16 graph of a bundle under construction, and measure every graph on the test split.

    ``say`` receives one line per graph. Graphs that share their float32 weights share their integers.
    """
    files: dict[str, DataFile] = {}
    try:
        for name, entry in writer.content["graphs"].items():
            source = writer.folder / entry["files"]["fp32"]["model"]
            runs = list(zip(*(calibration.runs(name, "test", side) for side in ("inputs", "outputs")), strict=True))
            if entry["precision"] == "fp16":
                found = entry["snr"]["fp16_test"] = round(min(split_snr(name, half_session(source), runs), 999.0), 2)
                told = f"{name}: fp16 (rounded on the CPU) {found:.1f} dB"
            else:
                found, told = quantised_form(writer, name, calibration, runs, files, overrides.get(name))
            goal = GOALS.get(name)
            if goal is not None:
                entry["snr"]["goal"] = goal
                told += f" (goal {goal:.0f}{'' if found >= goal else ', MISSED'})"
            say(told)
    finally:
        for data in files.values():
            data.close()


def quantised_form(
    writer: BundleWriter,
    name: str,
    calibration: Calibration,
    runs: Sequence[tuple[Mapping, Mapping]],
    files: dict[str, DataFile],
    overrides: Overrides | None,
) -> tuple[float, str]:
    """Write one graph's W8A16 form; its SNR on ``runs`` and a line about it.

    Where a graph with weights of its own misses its goal and nobody has said which layers take 16 bits, those that 8
    bits hurt most do, in steps, until it is met; the manifest names them, and keeps the figure without them.
    """
    entry = writer.content["graphs"][name]
    source = writer.folder / entry["files"]["fp32"]["model"]
    weights = entry["files"]["fp32"]["data"]
    stem = weights[0].removeprefix(f"{GRAPHS}/").removesuffix(".data") if weights else name
    target = source.with_name(f"{name}.{W8A16}.onnx")
    ranges = value_ranges(source, calibration.runs(name, "calibration"))
    entry["ranges"] = {key: list(ranges[key]) for key in (*entry["inputs"], *entry["outputs"])}
    others = [each["files"]["fp32"]["data"] for key, each in writer.content["graphs"].items() if key != name]
    alone = not weights or weights not in others
    path = writer.folder / GRAPHS / f"{stem}.{W8A16}.data"
    tries = [overrides or {}]
    if alone and overrides is None and name in GOALS:
        tries += wider(source)
    for chosen in tries:
        if alone or stem not in files:
            files.pop(stem).close() if stem in files else None
            files[stem] = DataFile(path)
        quantise_graph(source, target, files[stem], ranges, chosen)
        files[stem].flush()
        found = split_snr(name, open_session(target), runs)
        entry["snr"].setdefault("w8a16_plain_test", round(min(found, 999.0), 2))
        if found >= GOALS.get(name, 0):
            break
    entry["snr"]["w8a16_test"] = round(min(found, 999.0), 2)
    entry["overrides"] = dict(chosen)
    writer.form(name, W8A16, f"{GRAPHS}/{target.name}", [f"{GRAPHS}/{path.name}"])
    told = f"{name}: W8A16 {found:.1f} dB"
    if chosen:
        told += f" with {len(chosen)} patterns of 16-bit weights, {entry['snr']['w8a16_plain_test']:.1f} dB without"
    return found, told


def wider(source: Path) -> list[Overrides]:
    """Overrides to try one after another: the weights that 8 bits hurt most, up to a tenth, a quarter, half and all of
    the graph's. Hurt is a weight's own SNR: low where a few large entries set the scale of many small ones."""
    graph = onnx.load(source).graph
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    axes = {node.input[1]: CHANNEL_AXIS[node.op_type] for node in graph.node if node.op_type in CHANNEL_AXIS}

    def hurt(name: str) -> float:
        encoding = weight_encoding(arrays[name], axes[name])
        return snr(arrays[name], dequantise(quantise(arrays[name], encoding), encoding))

    hurts = {name: hurt(name) for name in axes if name in arrays}
    weights = sorted((name for name in hurts if hurts[name] < EXACT), key=hurts.__getitem__)
    total, found = sum(arrays[name].size for name in weights), []
    for share in (0.1, 0.25, 0.5, 1.0):
        reached, chosen = 0, {}
        for name in weights:
            reached += arrays[name].size
            if reached <= share * total:
                chosen[name] = "int16"
        if chosen and chosen not in found:
            found.append(chosen)
    return found
