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
    """Bytes of weights that every step of the schedule holds on a device: quantised graphs' data files, those that
    several graphs share once; two bytes a weight where a graph runs in fp16 or has not been quantised."""
    found = {}
    for step in bundle["schedule"]:
        held: dict[str, int] = {}
        for name in step["load"]:
            files = bundle.graph(name)["files"]
            if "w8a16" in files:
                held |= {file: bundle.files[file]["bytes"] for file in files["w8a16"]["data"]}
            else:
                key = " ".join(files["fp32"]["data"]) or name
                held[key] = max(held.get(key, 0), counts[name].weight_bytes("fp16"))
        found[step["step"]] = sum(held.values())
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
    yield f"{'graph':<18}{'form':>7}{'ops':>7}{'weights':>12}{'GMAC':>10}{'MB moved':>11}  SNR in dB; layout copies"
    for name, each in counts.items():
        graph = bundle.graph(name)
        yield (
            f"{name:<18}{graph['precision']:>7}{sum(each.operators.values()):>7}{each.parameters / 1e6:>10.3f} M"
            f"{each.macs / 1e9:>10.3f}{each.value_bytes / 1e6:>11.2f}  {_snr(graph['snr'])}; {_layout(each)}"
        )
    yield "SNR: float32 to JAX, deployed to float32 (without 16-bit weights), goal; MB: 16 bits, each operator reading"
    yield "and writing memory; of layout copies, those at a codec graph's ends vanish in a channels-last compiler"
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
