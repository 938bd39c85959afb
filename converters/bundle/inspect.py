"""What ``nd-jax npu inspect`` prints: of a bundle, or of the paper's pipeline at full size from shapes alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx

from nd_jax.converters.bundle.analysis import Counts, of_graph, of_model
from nd_jax.converters.bundle.full_size import VIDEO, full_size_parts
from nd_jax.converters.bundle.sections import loading_section
from nd_jax.converters.bundle.targets import PAPER, Target, chosen
from nd_jax.converters.graphs.parts import DECODER, TEXT
from nd_jax.converters.runtime.manifest import Bundle
from nd_jax.errors import UserError
from nd_jax.models.system import CLIP_1, CLIP_2, T5

PAPER_GIGABYTES = 3.5
"""Peak memory of the paper's pipeline."""
PUBLISHED = {name: f"{x:g} / {elite:g}" for name, (x, elite) in PAPER.items()} | {DECODER: "- / 249 for 7 calls"}
"""Milliseconds in the paper's Table 7, X Elite / 8 Elite."""


@dataclass(frozen=True)
class Row:
    """One graph. ``data``: which weights it has, the same for graphs that share them; ``held``: their bytes."""

    precision: str
    counts: Counts
    data: str
    held: int
    ends: Mapping[str, Mapping[str, Sequence[int]]]
    """Shapes by name of "inputs" and "outputs"."""
    snr: Mapping[str, float] = field(default_factory=dict)
    ranges: Mapping[str, Sequence[float]] = field(default_factory=dict)
    largest: float | None = None
    """Largest magnitude of any value over the recorded inputs."""


@dataclass(frozen=True)
class Subject:
    """What is inspected: graphs by name, their order of loading, and the video they make."""

    title: str
    rows: Mapping[str, Row]
    schedule: Sequence[Mapping[str, Any]]
    video: Mapping[str, Any]

    @property
    def full_size(self) -> bool:
        """Whether the videos are the paper's, so that its latencies may stand beside the estimates."""
        return all(self.video.get(key) == VIDEO[key] for key in ("height", "width", "frames"))


def of_bundle(bundle: Bundle) -> Subject:
    """Quantised graphs hold their data files; others two bytes a weight, as they run in fp16 on a device."""
    rows = {}
    for name, graph in bundle.graphs.items():
        counts = of_model(onnx.load(bundle.folder / graph["files"]["fp32"]["model"], load_external_data=False))
        files = graph["files"]
        data = " ".join(files.get("w8a16", files["fp32"])["data"]) or name
        held = counts.weight_bytes("fp16")
        if "w8a16" in files:
            held = sum(bundle.files[file]["bytes"] for file in files["w8a16"]["data"])
        known = {key: graph.get(key) for key in ("snr", "ranges", "largest") if graph.get(key) is not None}
        ends = {side: graph[side] for side in ("inputs", "outputs")}
        rows[name] = Row(graph["precision"], counts, data, held, ends, **known)
    size = sum(each["bytes"] for each in bundle.files.values()) / 1e6
    return Subject(f"{bundle.folder}: {size:.1f} MB", rows, bundle["schedule"], bundle["video"])


def of_full_size() -> Subject:
    """The paper's hybrid pipeline; weights of one byte where W8A16 is meant."""
    rows = {}
    for part in full_size_parts():
        counts, graph = of_graph(part.graph), part.graph
        ends = {
            side: {name: value.shape for name, value in each.items()}
            for side, each in (("inputs", graph.inputs), ("outputs", graph.outputs))
        }
        rows[part.name] = Row(part.precision, counts, part.data, counts.weight_bytes(part.precision), ends)
    text = [name for name in rows if name in (T5, CLIP_1, CLIP_2, TEXT)]
    return Subject("the paper's pipeline, from shapes alone", rows, loading_section(list(rows), text), VIDEO)


def resident(subject: Subject) -> dict[str, tuple[int, int]]:
    """(weights, values) in bytes that every step of the schedule holds: weights that several graphs share once, and the
    values of the graph that needs most, since a step's graphs run one after another."""
    found = {}
    for step in subject.schedule:
        rows = [subject.rows[name] for name in step["load"]]
        weights: dict[str, int] = {}
        for row in rows:
            weights[row.data] = max(weights.get(row.data, 0), row.held)
        found[step["step"]] = (sum(weights.values()), max((row.counts.peak_bytes for row in rows), default=0))
    return found


def report(
    subject: Subject, targets: tuple[str, ...] = (), names: Sequence[str] = (), *, details: bool = False
) -> Iterator[str]:
    """Lines for people; ``names``: graphs to show in detail. Raises UserError for unknown targets and graphs."""
    unknown = [name for name in names if name not in subject.rows]
    if unknown:
        raise UserError(f"{subject.title} has no graph {unknown[0]!r}; it has {', '.join(subject.rows)}")
    picked, width = chosen(targets), max(map(len, subject.rows)) + 2
    yield f"{subject.title}, " + ", ".join(f"{key} {value}" for key, value in subject.video.items())
    yield ""
    head = f"{'graph':<{width}}{'form':>6}{'ops':>6}{'weights':>12}{'GMAC':>10}{'MB moved':>11}{'MB alive':>10}"
    yield head + "  SNR in dB; layout copies"
    for name, row in subject.rows.items():
        each = row.counts
        yield (
            f"{name:<{width}}{row.precision:>6}{sum(each.operators.values()):>6}{each.parameters / 1e6:>10.3f} M"
            f"{each.macs / 1e9:>10.3f}{each.value_bytes / 1e6:>11.2f}{each.peak_bytes / 1e6:>10.2f}"
            f"  {_snr(row.snr)}; {_layout(each)}"
        )
    yield "SNR: float32 to JAX, deployed to float32 (without 16-bit weights), goal; MB: 16 bits, each operator reading"
    yield "and writing memory; alive: most values at once, operators in the graph's order; of layout copies, those at a"
    yield "codec graph's ends vanish in a channels-last compiler"
    yield ""
    yield from _memory(subject)
    yield ""
    yield "estimated ms a call, max(MACs / rate, weight bytes / bandwidth) at assumed peaks; not a measurement"
    head = f"{'graph':<{width}}" + "".join(f"{target.name:>12}" for target in picked)
    yield head + ("   paper, Table 7: X Elite / 8 Elite" if subject.full_size else "")
    for name, row in subject.rows.items():
        line = f"{name:<{width}}" + "".join(f"{_milliseconds(row, target):>12.3f}" for target in picked)
        yield line + (f"   {PUBLISHED[name]}" if subject.full_size and name in PUBLISHED else "")
    for name in subject.rows if details else names:
        yield ""
        yield from _detail(name, subject.rows[name])


def facts(subject: Subject, targets: tuple[str, ...] = ()) -> dict[str, Any]:
    """JSON-ready figures, all that ``report`` tells."""
    graphs = {}
    for name, row in subject.rows.items():
        each = row.counts
        graphs[name] = {
            "precision": row.precision,
            "macs": each.macs,
            "parameters": each.parameters,
            "weight_bytes": row.held,
            "value_bytes_moved": each.value_bytes,
            "peak_value_bytes": each.peak_bytes,
            "operators": dict(each.operators.most_common()),
            "layout": {op: {"count": n, "bytes": size} for op, (n, size) in each.layout.items()},
            "layout_bytes_at_ends": each.boundary_bytes,
            "snr": dict(row.snr),
            "largest": row.largest,
            "estimated_ms": {target.name: _milliseconds(row, target) for target in chosen(targets)},
            **{side: {key: list(shape) for key, shape in row.ends[side].items()} for side in row.ends},
            "ranges": {key: list(pair) for key, pair in row.ranges.items()},
        }
    steps = {name: {"weights": held, "values": alive} for name, (held, alive) in resident(subject).items()}
    return {"video": dict(subject.video), "graphs": graphs, "resident_bytes": steps}


def _milliseconds(row: Row, target: Target) -> float:
    return row.counts.milliseconds(target, row.precision)


def _snr(snr: Mapping[str, float]) -> str:
    told = [f"{snr[key]:g}" if key in snr else "-" for key in ("fp32_to_jax",)]
    deployed = snr.get("w8a16_test", snr.get("fp16_test"))
    plain = snr.get("w8a16_plain_test", deployed)
    told.append("-" if deployed is None else f"{deployed:g}" + (f" ({plain:g})" if plain != deployed else ""))
    return ", ".join([*told, f"goal {snr['goal']:g}" if "goal" in snr else "no goal"])


def _layout(counts: Counts) -> str:
    told = [f"{n} {op} {size / 1e6:.2f} MB" for op, (n, size) in counts.layout.items()]
    told += [f"{counts.boundary_bytes / 1e6:.2f} MB of them at the ends"] if counts.boundary_bytes else []
    return ", ".join(told) or "none"


def _memory(subject: Subject) -> Iterator[str]:
    steps = resident(subject)
    for step, (weights, values) in steps.items():
        yield f"resident in step {step}: {weights / 1e6:.2f} MB of weights, {values / 1e6:.2f} MB of values"
    step, (weights, values) = max(steps.items(), key=lambda each: sum(each[1]))
    yield (
        f"peak {(weights + values) / 1e9:.3f} GB in step {step} ({weights / 1e9:.3f} of weights); "
        f"the paper's pipeline needs {PAPER_GIGABYTES} GB in all"
    )


def _detail(name: str, row: Row) -> Iterator[str]:
    operators = ", ".join(f"{count} {op}" for op, count in row.counts.operators.most_common())
    yield f"{name}: {operators}"
    if row.largest is not None:
        yield f"{name}: values up to {row.largest:.4g} over the recorded inputs"
    for side, shapes in row.ends.items():
        yield f"{name} {side}"
        for value, shape in shapes.items():
            found = row.ranges.get(value)
            told = "" if found is None else f"  {found[0]:.4g} to {found[1]:.4g}"
            yield f"  {value:<48}{'x'.join(map(str, shape)):>16}{told}"
