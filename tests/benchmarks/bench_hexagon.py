"""Full-size graphs from random weights to Hexagon binaries: time, peak memory and bytes of every step.

    python tests/benchmarks/bench_hexagon.py --out FOLDER [--blocks 18] [--target sm8750] [--graphs NAME ...] [--shared]

49 frames of 320x512. Every graph is written and quantised in a process of its own and compiled in another, so that the
most memory is one graph's; what is already in FOLDER/results.json is not done again. ``--shared`` compiles the three
stages, once they are written, into one binary. Needs the extra hexagon, some 10 GB of disk and, at 18 blocks, a machine
with 24 GiB that does nothing else. Nothing is run: ranges are made up, and the emulator's time would say nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

GRAPHS = (
    "text_encoder_3",
    "text_encoder",
    "text_encoder_2",
    "adapter",
    "conditioning",
    "denoiser_stage0",
    "denoiser_stage1",
    "denoiser_stage2",
    "vae_encoder",
    "decoder",
)
STAGES = tuple(name for name in GRAPHS if name.startswith("denoiser_"))
PORT_STAGE, PORT_DOWNLOAD, PAPER_PEAK = 1.53, 8.5, 3.5
"""GB: a stage's binary and all downloads of the third-party port; peak memory of the paper's pipeline."""


def write(name: str, blocks: int, out: Path) -> None:
    """One graph, in this process."""
    import resource

    from nd_jax.converters.hexagon.full_size import part_graph, write_graph
    from nd_jax.models.mmdit import MMDiTConfig
    from nd_jax.pyramid.layout import envelopes
    from nd_jax.recipes.preset import load_preset

    system = load_preset("neodragon_320p").system
    config = dataclasses.replace(system, diffusion_transformer=MMDiTConfig(num_layers=blocks))
    began = time.monotonic()
    graph, precision = part_graph(config, name, envelopes(6, 128, 40, 64), 128, 77)
    path = write_graph(out / "graphs", graph, precision)
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = {"write_seconds": round(time.monotonic() - began, 1), "write_peak_bytes": peak, "model": path.name}
    found |= {"precision": precision, "nodes": len(graph.nodes)}
    (out / "graphs" / f"{name}.json").write_text(json.dumps(found))


def compiled(name: str, model: Path, number: int, timeout: float, work: Path) -> dict:
    """Compile one graph; its figures."""
    from nd_jax.converters.hexagon.jobs import run_worker
    from nd_jax.converters.hexagon.trace import read_facts
    from nd_jax.converters.hexagon.worker import CONTEXT, TRACE
    from nd_jax.converters.hexagon.wrapper import BINARY, read_wrapper

    told = run_worker("compile", {"model": str(model), "number": number}, work, timeout=timeout, what=name)
    facts = read_facts(work / TRACE, name)
    size = (work / read_wrapper(work / CONTEXT)[1][BINARY]).stat().st_size
    return {
        "compile_seconds": told["seconds"],
        "compile_peak_bytes": told["peak_bytes"],
        "bytes": size,
        **facts.entry(),
    }


def shared(out: Path, number: int, timeout: float, work: Path) -> dict:
    """The three stages in one binary."""
    from nd_jax.converters.hexagon.jobs import run_worker
    from nd_jax.converters.hexagon.wrapper import BINARY, read_wrapper

    models = [(name, str(out.absolute() / "graphs" / f"{name}.w8a16.onnx")) for name in STAGES]
    told = run_worker("share", {"models": models, "number": number}, work, timeout=timeout, what="stages in one binary")
    size = (work / read_wrapper(work / f"{STAGES[0]}.onnx")[1][BINARY]).stat().st_size
    return {"compile_seconds": told["seconds"], "compile_peak_bytes": told["peak_bytes"], "bytes": size}


def report(results: dict, blocks: int) -> None:
    """A table, and the totals that there are."""
    print(f"| graph, {blocks} blocks | write s | write GB | compile s | compile GB | MB | QNN operators | transposes |")
    print("|---|---|---|---|---|---|---|---|")
    for name, r in results.items():
        written = f"{r['write_seconds']:.0f} | {r['write_peak_bytes'] / 1e9:.1f}" if "write_seconds" in r else " | "
        counts = f"{r['qnn_ops']} | {r['transposes']}" if "qnn_ops" in r else " | "
        made = f"{r['compile_seconds']:.0f} | {r['compile_peak_bytes'] / 1e9:.1f} | {r['bytes'] / 1e6:.1f}"
        print(f"| {name} | {written} | {made} | {counts} |")
    stages = sum(results[name]["bytes"] for name in STAGES if name in results)
    if "shared" in results and all(name in results for name in STAGES):
        size = results["shared"]["bytes"]
        print(f"stages: {size / 1e9:.3f} GB shared, {stages / 1e9:.3f} GB apart: {size / stages:.1%}")
        print(f"third-party port: three of {PORT_STAGE} GB")
    if all(name in results for name in (*GRAPHS, "shared")):
        total = sum(r["bytes"] for name, r in results.items() if name not in STAGES)
        print(f"everything, stages shared: {total / 1e9:.2f} GB; third-party port: {PORT_DOWNLOAD} GB of downloads")
        steps = [sum(results[name]["bytes"] for name in GRAPHS[:4]), results["conditioning"]["bytes"]]
        steps += [results["shared"]["bytes"], results["vae_encoder"]["bytes"], results["decoder"]["bytes"]]
        print(f"most bytes of binaries at once: {max(steps) / 1e9:.2f} GB; the paper's peak, all in: {PAPER_PEAK} GB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--blocks", type=int, default=18, help="at least 2: the last one has image queries alone")
    parser.add_argument("--target", default="sm8750")
    parser.add_argument("--graphs", nargs="*", default=list(GRAPHS), choices=GRAPHS)
    parser.add_argument("--shared", action="store_true")
    parser.add_argument("--timeout", type=float, default=7200)
    parser.add_argument("--write", help=argparse.SUPPRESS)
    options = parser.parse_args()
    from nd_jax.converters.bundle.targets import chosen
    from nd_jax.converters.hexagon.compile import workspace
    from nd_jax.converters.hexagon.extra import require

    (options.out / "graphs").mkdir(parents=True, exist_ok=True)
    if options.write:
        return write(options.write, options.blocks, options.out)
    require()
    (target,) = chosen((options.target,))
    kept = options.out / "results.json"
    results = json.loads(kept.read_text()) if kept.exists() else {}
    for name in [*options.graphs, *(["shared"] if options.shared else [])]:
        if name in results:
            continue
        with workspace(options.out) as work:
            if name == "shared":
                results[name] = shared(options.out, target.number, options.timeout, work.absolute())
            else:
                command = [sys.executable, __file__, "--out", options.out, "--blocks", options.blocks, "--write", name]
                subprocess.run(list(map(str, command)), check=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})
                about = json.loads((options.out / "graphs" / f"{name}.json").read_text())
                model = (options.out / "graphs" / about["model"]).absolute()
                results[name] = about | compiled(name, model, target.number, options.timeout, work.absolute())
        kept.write_text(json.dumps(results, indent=1))
        print(name, json.dumps({k: v for k, v in results[name].items() if k not in ("operators", "transposed")}))
    report(results, options.blocks)


if __name__ == "__main__":
    main()
