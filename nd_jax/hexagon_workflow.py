"""Whole videos from compiled graphs, and the vectors that graphs are compared on: behind ``nd-jax npu emulate``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from skimage.metrics import peak_signal_noise_ratio

from nd_jax.converters.bundle.calibration import record
from nd_jax.converters.bundle.targets import Target
from nd_jax.converters.hexagon import vectors
from nd_jax.converters.hexagon.compile import workspace
from nd_jax.converters.hexagon.emulate import emulate_videos
from nd_jax.converters.hexagon.section import KEY, change_manifest, put
from nd_jax.converters.runtime.manifest import Bundle
from nd_jax.converters.runtime.pipeline import Pipeline
from nd_jax.converters.runtime.video import write_video
from nd_jax.data import judge
from nd_jax.data.world import world_named

Say = Callable[[str], None]


def has_vectors(bundle: Bundle) -> bool:
    """Whether a bundle was built with test vectors, or has got some since."""
    return vectors.KEY in bundle.content


def need_vectors(bundle: Bundle, lines: Sequence[str], *, seed: int, say: Say) -> None:
    """Record test vectors with the float32 graphs and put them into the bundle, unless it has some."""
    if has_vectors(bundle):
        return
    say("the bundle has no test vectors: recording some with its float32 graphs")
    recorder = record(Pipeline(bundle, precision="fp32"), lines[:2], vectors.MOST, seed=seed)
    with workspace(bundle.folder) as work:
        section = vectors.write_vectors(work, recorder.kept)
        made = {path.relative_to(work).as_posix(): path for path in (work / vectors.FOLDER).iterdir()}
        put(bundle.folder, made, lambda content: content.__setitem__(vectors.KEY, section))


def judged_videos(
    folder: Path,
    target: Target,
    lines: Sequence[str],
    labels: np.ndarray | None,
    *,
    seed: int,
    timeout: float,
    out: Path | None = None,
    say: Say = lambda line: None,
) -> dict[str, Any]:
    """Videos with every graph in the emulator beside the same from the graphs on the CPU: PSNR, and the share of
    attributes that the judge reads as the captions name them. The figures also go into the manifest."""
    made, seconds = emulate_videos(folder, target, lines, seed=seed, timeout=timeout)
    pipeline = Pipeline(folder)
    cpu = [pipeline.video(line, seed=seed, sample_name=k) for k, line in enumerate(lines)]
    found: dict[str, Any] = {
        "videos": len(lines),
        "seconds": seconds,
        "psnr_to_cpu": [_psnr(a, b) for a, b in zip(cpu, made, strict=True)],
        "pixel_error": round(float(np.abs(np.asarray(made, np.int16) - np.asarray(cpu)).mean()), 4),
    }
    if labels is not None:
        world = world_named("64x64")
        for name, each in (("accuracy", made), ("accuracy_on_cpu", cpu)):
            read = judge.read_labels(np.stack(each), world) == labels[: len(lines)]
            found[name] = round(float(read.mean()), 4)
    change_manifest(folder, lambda content: content[KEY][target.name].__setitem__("videos", found))
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        for k, pair in enumerate(zip(made, cpu, strict=True)):
            for kind, video in zip(("emulator", "cpu"), pair, strict=True):
                write_video(
                    out / f"{target.name}-{k}-{kind}.mp4", video, pipeline.bundle["video"]["fps"], overwrite=True
                )
    say(f"{target.name}: {len(lines)} videos in the emulator, {seconds:.0f} s")
    return found


def _psnr(reference: np.ndarray, found: np.ndarray) -> float:
    """In dB, at most 99."""
    with np.errstate(divide="ignore"):
        return round(min(99.0, float(peak_signal_noise_ratio(reference, found, data_range=255))), 2)
