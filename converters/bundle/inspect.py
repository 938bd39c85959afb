"""What ``nd-jax npu inspect`` prints of a bundle."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import onnx

from nd_jax.converters.bundle.analysis import Counts, of_model
from nd_jax.converters.bundle.targets import PAPER, chosen
from nd_jax.converters.runtime.manifest import Bundle
from nd_jax.errors import UserError

PAPER_GIGABYTES = 3.5
"""Peak memory of the paper's pipeline."""
FULL_SIZE = {"height": 320, "width": 512, "frames": 49}


def counts_of(bundle: Bundle) -> dict[str, Counts]:
    """Counts of every graph."""
    return {
        name: of_model(onnx.load(bundle.folder / graph["files"]["fp32"]["model"], load_external_data=False))
        for name, graph in bundle.graphs.items()
    }


def resident(bundle: Bundle, counts: Mapping[str, Counts]) -> dict[str, int]:
    """Bytes of weights that every step of the schedule holds on a device; graphs over one data file count once."""
    found = {}
    for step in bundle["schedule"]:
        shared: dict[str, int] = {}
        for name in step["load"]:
            graph = bundle.graph(name)
            key = " ".join(graph["files"]["fp32"]["data"]) or name
            shared[key] = max(shared.get(key, 0), counts[name].weight_bytes(graph["precision"]))
        found[step["step"]] = sum(shared.values())
    return found


def report(bundle: Bundle, targets: tuple[str, ...] = (), names: Sequence[str] = ()) -> Iterator[str]:
    """Lines for people. Raises UserError for unknown targets and graphs."""
    unknown = [name for name in names if name not in bundle.graphs]
    if unknown:
        raise UserError(f"{bundle.folder} has no graph {unknown[0]!r}; it has {', '.join(bundle.graphs)}")
    picked, counts = chosen(targets), counts_of(bundle)
    yield f"{bundle.folder}: {sum(each['bytes'] for each in bundle.files.values()) / 1e6:.1f} MB, " + ", ".join(
        f"{key} {value}" for key, value in bundle["video"].items()
    )
    yield ""
    yield f"{'graph':<18}{'form':>7}{'ops':>7}{'weights':>10}{'GMAC':>9}{'MB moved':>10}{'layout':>22}  SNR"
    for name, each in counts.items():
        graph = bundle.graph(name)
        layout = ", ".join(f"{n} {op[:9]} {size / 1e6:.2f}" for op, (n, size) in each.layout.items()) or "none"
        snr = ", ".join(f"{key} {value:g}" for key, value in graph["snr"].items())
        yield (
            f"{name:<18}{graph['precision']:>7}{sum(each.operators.values()):>7}{each.parameters / 1e6:>8.2f} M"
            f"{each.macs / 1e9:>9.3f}{each.value_bytes / 1e6:>10.2f}{layout:>22}  {snr}"
        )
    yield "layout: number and MB of operators that only reorder values; of the codec's, those at inputs and outputs"
    yield (
        "  ("
        + ", ".join(
            f"{name} {each.boundary_bytes / 1e6:.2f} MB" for name, each in counts.items() if each.boundary_bytes
        )
        + ") vanish where the compiler works channels-last"
    )
    yield ""
    yield from _memory(bundle, counts)
    yield ""
    yield "estimated ms a call, max(MACs / rate, weight bytes / bandwidth) at assumed peaks; not a measurement"
    full = all(bundle["video"].get(key) == value for key, value in FULL_SIZE.items())
    head = f"{'graph':<18}" + "".join(f"{target.name:>12}" for target in picked)
    yield head + ("   paper: X Elite / 8 Elite" if full else "")
    for name, each in counts.items():
        precision = bundle.graph(name)["precision"]
        row = f"{name:<18}" + "".join(f"{each.milliseconds(target, precision):>12.3f}" for target in picked)
        yield row + (f"   {PAPER[name][0]} / {PAPER[name][1]}" if full and name in PAPER else "")
    for name in names:
        yield ""
        yield from _ends(bundle, name)


def _memory(bundle: Bundle, counts: Mapping[str, Counts]) -> Iterator[str]:
    steps = resident(bundle, counts)
    for step, size in steps.items():
        yield f"resident in step {step}: {size / 1e6:.2f} MB of weights"
    peak = max(steps.values())
    yield f"peak {peak / 1e9:.3f} GB of weights by the schedule; the paper's pipeline needs {PAPER_GIGABYTES} GB in all"


def _ends(bundle: Bundle, name: str) -> Iterator[str]:
    graph = bundle.graph(name)
    for side in ("inputs", "outputs"):
        yield f"{name} {side}"
        for value, shape in graph[side].items():
            found = graph.get("ranges", {}).get(value)
            told = "" if found is None else f"  {found[0]:.4g} to {found[1]:.4g}"
            yield f"  {value:<48}{'x'.join(map(str, shape)):>16}{told}"
