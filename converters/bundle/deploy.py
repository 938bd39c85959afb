"""Adds to a float32 bundle what its graphs are deployed in: W8A16 forms, and figures for all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import onnx
from onnx import numpy_helper

from nd_jax.converters.bundle.calibration import Calibration
from nd_jax.converters.bundle.encodings import dequantise, quantise, weight_encoding
from nd_jax.converters.bundle.halves import half_session
from nd_jax.converters.bundle.measure import GOALS, split_snr
from nd_jax.converters.bundle.quantise import CHANNEL_AXIS, MARGIN, Overrides, quantise_graph
from nd_jax.converters.bundle.ranges import Range, value_ranges
from nd_jax.converters.bundle.rounding import Rounded, Rounding, rounded_weights
from nd_jax.converters.bundle.writer import GRAPHS, BundleWriter
from nd_jax.converters.graphs.builder import DataFile
from nd_jax.converters.graphs.session import open_session, snr
from nd_jax.errors import UserError

W8A16 = "w8a16"
EXACT = 100.0
"""dB from which a weight in 8 bits is as good as itself and needs no more: averages over a group, for example."""
ABOVE_GOAL = 2.0
"""dB that a graph with layers of 16 bits has to have beyond its goal: the NPU loses up to that against the CPU."""
MEASURED = 64
"""Of up to so many layers it is measured, one by one, what their 8 bits do to the graph's outputs."""
MARGINS = {"vae_encoder": 1.25}
"""In place of ``MARGIN``: a picture never leaves its range. The NPU's products of two values are off by up to half a
step on average, which the sums behind them bring out, so that steps have to be small."""
OVERRIDES: Mapping[str, Overrides] = {}
"""Default exceptions by graph: patterns of weight names to types."""
LARGEST_HALF = 65504.0
"""Of fp16's numbers."""


def deploy(
    writer: BundleWriter,
    calibration: Calibration,
    overrides: Mapping[str, Overrides] = OVERRIDES,
    say: Callable[[str], None] = lambda line: None,
    rounding: Rounding | None = None,
) -> None:
    """Quantise every W8A16 graph of a bundle under construction, and measure every graph on the test split.

    ``say`` receives one line per graph. Graphs that share their float32 weights share their integers.
    """
    files: dict[str, DataFile] = {}
    try:
        for name, entry in writer.content["graphs"].items():
            source = writer.folder / entry["files"]["fp32"]["model"]
            runs = list(zip(*(calibration.runs(name, "test", side) for side in ("inputs", "outputs")), strict=True))
            ranges = value_ranges(source, calibration.runs(name, "calibration"))
            entry["ranges"] = {key: list(ranges[key]) for key in (*entry["inputs"], *entry["outputs"])}
            entry["largest"] = max(abs(end) for pair in ranges.values() for end in pair)
            if entry["precision"] == "fp16":
                found = entry["snr"]["fp16_test"] = round(min(split_snr(name, half_session(source), runs), 999.0), 2)
                told = f"{name}: fp16 (rounded on the CPU) {found:.1f} dB, values up to {entry['largest']:.4g}"
                if entry["largest"] >= LARGEST_HALF:
                    raise UserError(f"graph {name}: a value of {entry['largest']:.4g} does not fit fp16")
            else:
                quantiser = Quantised(writer, name, ranges, runs, files, overrides.get(name))
                found, told = quantiser.best(calibration, rounding)
            goal = GOALS.get(name)
            if goal is not None:
                entry["snr"]["goal"] = goal
                told += f" (goal {goal:.0f}{'' if found >= goal else ', MISSED'})"
            say(told)
    finally:
        for data in files.values():
            data.close()


class Quantised:
    """One graph's W8A16 form, written as often as it takes."""

    def __init__(
        self,
        writer: BundleWriter,
        name: str,
        ranges: Mapping[str, Range],
        runs: Sequence[tuple[Mapping, Mapping]],
        files: dict[str, DataFile],
        overrides: Overrides | None,
    ):
        self.name, self.ranges, self.runs, self.files, self.overrides = name, ranges, runs, files, overrides
        self.writer, self.entry = writer, writer.content["graphs"][name]
        self.source = writer.folder / self.entry["files"]["fp32"]["model"]
        self.target = self.source.with_name(f"{name}.{W8A16}.onnx")
        weights = self.entry["files"]["fp32"]["data"]
        self.stem = weights[0].removeprefix(f"{GRAPHS}/").removesuffix(".data") if weights else name
        self.data = writer.folder / GRAPHS / f"{self.stem}.{W8A16}.data"
        others = [each["files"]["fp32"]["data"] for key, each in writer.content["graphs"].items() if key != name]
        self.alone = not weights or weights not in others

    def write(self, chosen: Overrides, rounded: Rounded | None = None) -> float:
        """Its SNR on the test split with these types of weights."""
        if self.alone or self.stem not in self.files:
            if self.stem in self.files:
                self.files.pop(self.stem).close()
            self.files[self.stem] = DataFile(self.data)
        file = self.files[self.stem]
        margin = MARGINS.get(self.name, MARGIN)
        quantise_graph(self.source, self.target, file, self.ranges, chosen, rounded, margin)
        file.flush()
        return round(min(split_snr(self.name, open_session(self.target), self.runs), 999.0), 2)

    def best(self, calibration: Calibration, rounding: Rounding | None) -> tuple[float, str]:
        """Its SNR and a line about it.

        Where a graph with weights of its own misses its goal and nobody has said which layers take 16 bits, those whose
        8 bits cost most do, as few as it takes; the manifest names them, and keeps the figure without them. A learned
        rounding is kept if it is better than the plain one.
        """
        entry, chosen, rounded, goal = self.entry, self.overrides or {}, None, GOALS.get(self.name, 0)
        found = entry["snr"]["w8a16_plain_test"] = self.write(chosen)
        told = ""
        if rounding is not None and self.name in rounding.graphs and self.alone:
            learned = rounded_weights(self.source, calibration.runs(self.name, "calibration"), rounding)
            plain, found = found, self.write(chosen, learned)
            told = f", {rounding.method} {found:.1f} dB"
            entry["snr"][f"w8a16_{rounding.method}_test"] = found
            if found > plain:
                rounded, entry["rounding"] = learned, rounding.method
            else:
                found = self.write(chosen)
        if found < goal and self.alone and self.overrides is None and self.name in GOALS:
            weights, measured = most_hurt(self.source), partial(self.write, rounded=rounded)
            if len(weights) <= MEASURED:
                weights = by_effect(weights, measured)
            chosen, found = fewest(weights, measured, goal + ABOVE_GOAL)
        entry["snr"]["w8a16_test"], entry["overrides"] = found, dict(chosen)
        self.writer.form(self.name, W8A16, f"{GRAPHS}/{self.target.name}", [f"{GRAPHS}/{self.data.name}"])
        if chosen:
            plain = entry["snr"]["w8a16_plain_test"]
            told = f" with {len(chosen)} patterns of 16-bit weights, {plain:.1f} dB without{told}"
        return found, f"{self.name}: W8A16 {found:.1f} dB{told}"


def most_hurt(source: Path) -> list[str]:
    """A saved float32 graph's weights, those first that 8 bits hurt most. Hurt is a weight's own SNR: low where a few
    large entries set the scale of many small ones."""
    graph = onnx.load(source).graph
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    axes = {node.input[1]: CHANNEL_AXIS[node.op_type] for node in graph.node if node.op_type in CHANNEL_AXIS}

    def hurt(name: str) -> float:
        encoding = weight_encoding(arrays[name], axes[name])
        return snr(arrays[name], dequantise(quantise(arrays[name], encoding), encoding))

    hurts = {name: hurt(name) for name in axes if name in arrays}
    return sorted((name for name in hurts if hurts[name] < EXACT), key=hurts.__getitem__)


def by_effect(weights: Sequence[str], measured: Callable[[Overrides], float]) -> list[str]:
    """Those first whose 8 bits cost most where all others have 16. Errors of different layers add up, so what one costs
    alone is what it brings to any choice; a weight's own SNR does not tell how far its error reaches."""
    alone = {name: measured({other: "int16" for other in weights if other != name}) for name in weights}
    return sorted(weights, key=alone.__getitem__)


def fewest(weights: Sequence[str], measured: Callable[[Overrides], float], enough: float) -> tuple[Overrides, float]:
    """The shortest beginning of ``weights`` in 16 bits with which ``measured`` gives at least ``enough`` dB, found by
    halving, and its figure; all of them where none is enough. What was measured last is what is returned.

    The figure mostly rises with every weight. Where it does not, the beginning found is enough all the same, but there
    may be a shorter one.
    """

    def first(count: int) -> Overrides:
        return dict.fromkeys(weights[:count], "int16")

    low, high = 0, len(weights)  # nothing is known to be too little
    last, best = high, measured(first(high))
    while best >= enough and high - low > 1:
        last = (low + high) // 2
        found = measured(first(last))
        if found >= enough:
            high, best = last, found
        else:
            low = last
    if last != high:
        best = measured(first(high))
    return first(high), best
