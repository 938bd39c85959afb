"""Videos of a few candidates, and how much of their prompts the judge reads in them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int, UInt8

from nd_jax.data import judge
from nd_jax.data.video_out import write_video
from nd_jax.data.world import World
from nd_jax.generate import Generator, generate
from nd_jax.report import Gallery, Table
from nd_jax.sweep.scores import Score, bootstrap_weights, score
from nd_jax.sweep.units import Drop, Units

WHOLE: Drop = ()
"""The candidate that drops nothing."""


@dataclasses.dataclass(frozen=True)
class Final:
    """A candidate's videos of the first seed, and its judged accuracy by video (prompts, a prompt's seeds side by
    side); None where the judge cannot read them."""

    videos: UInt8[np.ndarray, "n t h w 3"]
    accuracy: np.ndarray | None


def finalists(
    generator: Generator,
    units: Units,
    drops: Sequence[Drop],
    captions: Sequence[str],
    labels: Int[np.ndarray, "n objects 5"] | None,
    world: World,
    *,
    seed: int = 0,
    samples: int = 1,
    batch: int = 8,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[Drop, Final]:
    """Every candidate's videos for the same prompts and noise; judged where there are ``labels``.

    Candidates that keep equally many blocks share their programs; pieces of blocks always do. ``samples`` videos of
    every prompt are judged.
    """
    found = {}
    for drop in drops:
        data = units.encode([drop])
        kept = data.kept[0]
        chosen = {"kept": kept[kept >= 0], "gates": None if data.gates is None else units.gates(drop)}
        right, first = [], None
        for sample in range(samples if labels is not None else 1):
            given = {"seed": seed + sample, "batch": batch, "generator": generator, **chosen}
            videos = generate(generator.system, captions, **given)
            first = videos if first is None else first
            if labels is not None:
                right.append((judge.read_labels(videos, world) == labels).mean(axis=(1, 2)))
        found[drop] = Final(first, np.stack(right, axis=1).ravel() if right else None)
        progress(len(found), len(drops))
    return found


def accuracies(found: Mapping[Drop, Final], prompts: int) -> dict[Drop, tuple[Score, Score]]:
    """Judged accuracy of every candidate, and what it lost of the whole network's, with 95 % bootstrap intervals over
    prompts and seeds."""
    judged = {drop: final.accuracy for drop, final in found.items() if final.accuracy is not None}
    if not judged:
        return {}
    weights = bootstrap_weights(prompts, len(next(iter(judged.values()))) // prompts)
    whole = judged.get(WHOLE)
    return {
        drop: (score(each[None], weights), score((whole if whole is not None else each)[None] - each[None], weights))
        for drop, each in judged.items()
    }


def final_sections(
    found: Mapping[Drop, Final],
    names: Mapping[Drop, str],
    captions: Sequence[str],
    folder: Path,
    videos: int,
) -> list[Table | Gallery]:
    """For the report: a table of judged accuracies, and the first prompts' ``videos``, which are kept in ``folder``."""
    sections: list[Table | Gallery] = []
    judged = accuracies(found, len(captions))
    if judged:
        rows = [
            [names[drop], *(f"{x:.1%}" for x in mine), *(f"{x:.1%}" for x in lost)]
            for drop, (mine, lost) in judged.items()
        ]
        columns = ["candidate", "judged accuracy", "low", "high", "lost of the whole network's", "low", "high"]
        note = (
            f"{len(captions)} prompts, the same noise for all; 95 % bootstrap over prompts and seeds; nothing trained."
        )
        sections.append(Table("Judged accuracy of short generations", columns, rows, note))
    if videos:
        lines = []
        for n, caption in enumerate(captions[:videos]):
            paths = [
                write_video(folder / f"{n:03d}-{place}.mp4", final.videos[n], enlarge=2, overwrite=True)
                for place, final in enumerate(found.values())
            ]
            lines.append((caption, paths))
        sections.append(Gallery("Videos of chosen candidates", [names[drop] for drop in found], lines))
    return sections
