"""The end of the demonstration: the student as a bundle for phones, and videos of its W8A16 graphs beside JAX's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from nd_jax.data.video_out import write_video
from nd_jax.errors import UserError
from nd_jax.report import Gallery, Section, Table
from nd_jax.system import VideoSystem

SHOWN = 3
"""Videos made with the bundle."""
RECORDED = 12
"""Prompts that ranges and figures come from."""


@dataclass(frozen=True)
class Phone:
    """``graphs``: the manifest's entries; ``videos``: the bundle's, of the first captions, with the noise that JAX's
    started from."""

    graphs: dict[str, Any]
    videos: UInt8[np.ndarray, "n t h w 3"]
    hexagon: dict[str, Any] | str = "not run here"
    """Entries of the compiled graphs, or why there are none."""

    def summary(self) -> dict[str, Any]:
        """JSON-ready figures: dB by graph."""
        return {name: graph["snr"] for name, graph in self.graphs.items()}


def phone_bundle(
    out: Path, system: VideoSystem, captions: Sequence[str], recorded: Sequence[str], seed: int, say: Callable
) -> Phone | None:
    """Build the bundle and make its first videos; None, with a word about it, where the extra is missing."""
    try:
        from nd_jax.demo_hexagon import hexagon_figures
        from nd_jax.npu_workflow import build_bundle, quantised
    except UserError as error:
        say(f"  bundle for phones: not run here ({error})")
        return None
    from nd_jax.converters.runtime.pipeline import Pipeline

    then = quantised(
        None, recorded[:RECORDED], samples=16, seed=seed + 1, overrides={}, say=lambda line: say(f"  {line}")
    )
    build_bundle(system, out, overwrite=True, then=then)
    pipeline = Pipeline(out)
    made = [pipeline.video(text, seed=seed, sample_name=n) for n, text in enumerate(captions[:SHOWN])]
    return Phone(dict(pipeline.bundle.graphs), np.stack(made), hexagon_figures(out, say))


def phone_sections(
    folder: Path, phone: Phone | None, jax: UInt8[np.ndarray, "n t h w 3"], captions: Sequence[str]
) -> list[Section]:
    """SNR by graph, and the videos beside JAX's."""
    if phone is None:
        return []

    def told(snr: dict[str, float], *keys: str) -> str:
        return next((f"{snr[key]:.1f}" for key in keys if key in snr), "")

    table = [
        [
            name,
            graph["precision"],
            told(graph["snr"], "fp32_to_jax"),
            told(graph["snr"], "w8a16_test", "fp16_test"),
            told(graph["snr"], "goal"),
        ]
        for name, graph in phone.graphs.items()
    ]
    videos = []
    for n, made in enumerate(phone.videos):
        pair = [
            write_video(folder / f"phone-{n}-{kind}.mp4", video, overwrite=True)
            for kind, video in (("jax", jax[n]), ("graphs", made))
        ]
        videos.append((captions[n], pair))
    from nd_jax.demo_hexagon import hexagon_section

    note = "SNR in dB: float32 graphs against JAX, deployed ones against float32 on recorded inputs."
    columns = ["graph", "precision", "float32 to JAX", "deployed", "goal"]
    return [
        Table("The student as graphs for a phone", columns, table, note),
        hexagon_section(phone.hexagon),
        Gallery("The student's video in JAX, and of its phone graphs on this CPU", ["JAX", "W8A16 graphs"], videos),
    ]
