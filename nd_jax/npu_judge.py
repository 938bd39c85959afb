"""Judged accuracy of a bundle's videos beside the JAX system's: same prompts, same noise, prompt by prompt."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from nd_jax.checked_files import read_json, shown
from nd_jax.converters.runtime.files import MANIFEST, sha256
from nd_jax.converters.runtime.pipeline import Pipeline
from nd_jax.data import judge
from nd_jax.data.source import prompts as world_prompts
from nd_jax.data.world import world_named
from nd_jax.errors import UserError
from nd_jax.evaluate import bootstrap_interval
from nd_jax.generate import Generator, generate
from nd_jax.outputs import check_new_file, new_file
from nd_jax.system import VideoSystem

BATCH = 8
"""Prompts that JAX makes at once; what has been judged is kept after each."""
ALLOWED = 0.02
"""Accuracy that a bundle may lose."""
FIGURES = ("jax", "bundle", "error")


@dataclass(frozen=True)
class Paired:
    """Mean accuracies over all attributes, and the bundle's minus JAX's with its 95 % interval over prompts."""

    prompts: int
    jax: float
    bundle: float
    low: float
    high: float
    pixel_error: float
    """Mean absolute difference of the videos, in grey levels."""

    def lines(self) -> list[str]:
        """For people."""
        difference = self.bundle - self.jax
        within = "within" if difference >= -ALLOWED else "NOT within"
        return [
            f"{self.prompts} prompts, same noise: JAX {self.jax:.1%}, bundle {self.bundle:.1%}",
            f"difference {difference:+.1%}, 95 % interval [{self.low:+.1%}, {self.high:+.1%}]; "
            f"{within} {100 * ALLOWED:.0f} points",
            f"mean absolute difference of pixels: {self.pixel_error:.2f} grey levels",
        ]


class Record:
    """Figures of every prompt judged so far, in a file if there is one; ``about`` says what they belong to."""

    def __init__(self, file: Path | None, about: Mapping[str, Any]):
        """Raises UserError for a file that holds something else than the beginning of this judgement."""
        self.file, self.about = file, dict(about)
        self.rows: list[list[float]] = []
        if file is None or not file.exists():
            if file is not None:
                check_new_file(file, overwrite=False)
            return
        content = read_json(file, what="record of a judgement")
        if content.get("about") != self.about:
            raise UserError(f"{file} was begun with another bundle, checkpoint or options; name another file")
        rows = content.get("rows")
        fine = isinstance(rows, list) and all(
            isinstance(row, list) and len(row) == len(FIGURES) and all(type(x) in (int, float) for x in row)
            for row in rows
        )
        if not fine:
            raise UserError(f"{file}: its rows are {shown(rows)}; expected three numbers for every prompt")
        self.rows = [list(map(float, row)) for row in rows]

    def add(self, rows: list[list[float]]) -> None:
        """Keep the figures of the next prompts."""
        self.rows += rows
        if self.file is not None:
            with new_file(self.file, overwrite=True) as part:
                part.write_text(json.dumps({"about": self.about, "rows": self.rows}) + "\n")


def fingerprint(system: VideoSystem) -> str:
    """Hexadecimal digest of a system's parameters and plan."""
    found = hashlib.sha256(repr((system.config, system.sampling, system.schedule)).encode())
    for leaf in jax.tree.leaves(system.params):
        found.update(np.ascontiguousarray(leaf).tobytes())
    return found.hexdigest()


def judge_bundle(
    bundle: Path,
    system: VideoSystem,
    count: int,
    *,
    seed: int = 0,
    threads: int = 0,
    precision: str = "deployed",
    file: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Paired:
    """Make ``count`` videos with both and judge them, going on where ``file`` ends, if there is such a file.

    Raises UserError for videos that are not of the shapes world or not of one size, and for a file of something else.
    """
    world, pipeline = world_named("64x64"), Pipeline(bundle, precision=precision, threads=threads)
    about, size = pipeline.bundle["video"], system.video
    if (about["height"], about["width"]) != (world.height, world.width):
        raise UserError(f"{bundle}: videos of {about['height']}x{about['width']}; the judge reads 64x64 only")
    if (about["height"], about["width"], about["frames"]) != (size.height, size.width, size.frames):
        raise UserError(
            f"{bundle}: {about['frames']} frames of {about['height']}x{about['width']}, the checkpoint's videos have "
            f"{size.frames} of {size.height}x{size.width}; expected the checkpoint that the bundle was built from"
        )
    stated = {"bundle": sha256(pipeline.bundle.folder / MANIFEST), "checkpoint": fingerprint(system)}
    record = Record(file, {**stated, "prompts": count, "seed": seed, "precision": precision})
    done = len(record.rows)
    progress(done, count)
    if done < count:
        captions, labels = world_prompts(world, "seen", count, seed=seed + 1)
        for start, videos in _jax_videos(system, captions, done, seed):
            rows = []
            for index, expected in enumerate(videos, start):
                made = pipeline.video(captions[index], seed=seed, sample_name=index, upscale=False)
                read = judge.read_labels(np.stack([expected, made]), world)
                right = (read == labels[index]).mean(axis=(1, 2))
                rows.append([*map(float, right), float(np.abs(made.astype(np.int16) - expected).mean())])
                progress(index + 1, count)
            record.add(rows)
    right, made, error = np.array(record.rows[:count]).T
    low, high = bootstrap_interval(made - right)
    return Paired(count, float(right.mean()), float(made.mean()), low, high, float(error.mean()))


def _jax_videos(system: VideoSystem, captions: list[str], start: int, seed: int) -> Iterator[tuple[int, np.ndarray]]:
    """(index of the first, videos) from ``start`` on, always as many at once, so that nothing compiles again."""
    size = system.video
    generator = Generator(system, height=size.height, width=size.width, frames=size.frames)
    for first in range(start, len(captions), BATCH):
        names = [min(n, len(captions) - 1) for n in range(first, first + BATCH)]
        lines = [captions[n] for n in names]
        made = generate(system, lines, seed=seed, samples=names, batch=BATCH, generator=generator)
        yield first, made[: len(captions) - first]
