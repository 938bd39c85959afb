"""Compiled graphs in the emulator: against their quantised models on the CPU and float32, and whole videos."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nd_jax.converters.bundle.halves import half_session
from nd_jax.converters.bundle.measure import outputs_snr
from nd_jax.converters.bundle.targets import Target
from nd_jax.converters.graphs.session import open_session, run_session
from nd_jax.converters.hexagon.jobs import run_worker
from nd_jax.converters.hexagon.section import KEY, change_manifest, compiled, context_files
from nd_jax.converters.hexagon.vectors import Run, open_vectors, vectors_of
from nd_jax.converters.runtime.manifest import Bundle
from nd_jax.errors import UserError

Outputs = list[Mapping[str, np.ndarray]]
Say = Callable[[str], None]


def decibels(name: str, references: Outputs, found: Outputs) -> float:
    """``outputs_snr`` for the manifest: rounded, at most 999."""
    return round(min(outputs_snr(name, zip(references, found, strict=True)), 999.0), 2)


def emulated(model: Path, number: int, runs: Sequence[Run], timeout: float, what: str) -> tuple[Outputs, float]:
    """Outputs of a compiled graph in the emulator for every run's inputs, and seconds. Raises UserError for failures,
    wrong shapes and values that are not finite."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for k, (inputs, _) in enumerate(runs):
            with open(folder / f"inputs.{k}.npz", "wb") as file:
                np.savez(file, **{name: np.ascontiguousarray(x, np.float32) for name, x in inputs.items()})
        job = {"model": str(model.absolute()), "number": number, "count": len(runs)}
        told = run_worker("run", job, folder, timeout=timeout, what=what)
        found = []
        for k, (_, expected) in enumerate(runs):
            with np.load(folder / f"outputs.{k}.npz", allow_pickle=False) as stored:
                outputs = {name: stored[str(index)] for index, name in enumerate(told["outputs"])}
            if {name: x.shape for name, x in outputs.items()} != {name: x.shape for name, x in expected.items()}:
                raise UserError(f"{what}: it gave outputs of other names or shapes than the graph has")
            wrong = [name for name, x in outputs.items() if not np.isfinite(x).all()]
            if wrong:
                raise UserError(f"{what}: output {wrong[0]} is not finite: its values leave float16's range")
            found.append(outputs)
    return found, told["seconds"]


def on_cpu(bundle: Bundle, name: str, form: str, runs: Sequence[Run]) -> Outputs:
    """The same graph on the CPU: its quantised model, or the float32 one rounded to float16 after every operator."""
    model = bundle.model(name, form)
    session = open_session(model) if form != "fp32" else half_session(model)
    return [run_session(session, inputs) for inputs, _ in runs]


def emulate_graphs(
    folder: Path, target: Target, names: Sequence[str] = (), *, timeout: float, say: Say = lambda line: None
) -> dict[str, dict[str, float]]:
    """SNR of every compiled graph (or those of ``names``) on the bundle's test vectors, also put into its manifest.

    Raises UserError where nothing is compiled or recorded, and for graphs that do not run.
    """
    bundle = Bundle(folder)
    entries = compiled(bundle, target.name)
    unknown = [name for name in names if name not in entries]
    if unknown:
        raise UserError(
            f"{folder}: graph {unknown[0]!r} is not compiled for {target.name}; it has {', '.join(entries)}"
        )
    picked, found = list(names) or list(entries), {}
    vectors = open_vectors(bundle, picked)
    for name in picked:
        entry, runs = entries[name], list(vectors_of(vectors, name))
        model, _ = context_files(bundle, entry)
        outputs, seconds = emulated(model, target.number, runs, timeout, f"emulate {name} for {target.name}")
        cpu, floats = on_cpu(bundle, name, entry["form"], runs), [reference for _, reference in runs]
        told = found[name] = {
            "emulator_to_fp32": decibels(name, floats, outputs),
            "cpu_to_fp32": decibels(name, floats, cpu),
            "emulator_to_cpu": decibels(name, cpu, outputs),
            "vectors": len(runs),
        }

        def noted(content: dict[str, Any], name: str = name, told: dict[str, float] = told) -> None:
            content[KEY][target.name]["graphs"][name]["snr"] = told

        change_manifest(folder, noted)
        say(
            f"{name}: emulator {told['emulator_to_fp32']:.1f} dB to float32, the CPU's {entry['form']} "
            f"{told['cpu_to_fp32']:.1f} dB; emulator to that {told['emulator_to_cpu']:.1f} dB ({seconds:.0f} s)"
        )
    return found


def emulate_videos(
    folder: Path, target: Target, prompts: Sequence[str], *, seed: int, timeout: float
) -> tuple[list[np.ndarray], float]:
    """uint8 [T, H, W, 3] for every prompt, each graph of the whole pipeline in the emulator; and seconds.

    Raises UserError unless every graph of the bundle's schedule is compiled for the target.
    """
    bundle = Bundle(folder)
    entries = compiled(bundle, target.name)
    needed = [name for step in bundle["schedule"] for name in step["load"]]
    missing = [name for name in needed if name not in entries]
    if missing:
        raise UserError(f"{folder}: {missing[0]} is not compiled for {target.name}; whole videos need every graph")
    models = {name: str(context_files(bundle, entries[name])[0].absolute()) for name in needed}
    job = {"bundle": str(folder.absolute()), "models": models, "number": target.number, "seed": seed}
    job["prompts"] = list(prompts)
    video = bundle["video"]
    shape = (video["frames"], video["height"], video["width"], 3)
    with tempfile.TemporaryDirectory() as temporary:
        told = run_worker("videos", job, Path(temporary), timeout=timeout, what=f"videos for {target.name}")
        made = [np.load(Path(temporary) / f"video.{k}.npy", allow_pickle=False) for k in range(len(prompts))]
    if any(each.shape != shape or each.dtype != np.uint8 for each in made):
        raise UserError(f"videos for {target.name}: expected uint8 of {shape}, found {made[0].dtype} {made[0].shape}")
    return made, told["seconds"]
