"""The report of ``nd-jax evaluate``: one table, the videos side by side, and a JSON file with every figure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from nd_jax.data.source import prompts as world_prompts
from nd_jax.data.video_out import write_video
from nd_jax.data.world import ATTRIBUTES, World
from nd_jax.evaluate import ACCURACY_COLUMNS, Judged, accuracy_row
from nd_jax.outputs import new_file
from nd_jax.report import Gallery, Table, write_report

GALLERY_ROWS = 8


def accuracy_table(judged: Mapping[str, Judged], baseline: str | None, *, title: str, note: str = "") -> Table:
    """One row per system and one for chance: what the first system's videos score with their captions shuffled."""
    first = next(iter(judged.values()))
    rows = [accuracy_row(name, each, judged.get(baseline)) for name, each in judged.items()]
    chance = first.scores.chance
    mean, deviation = chance["mean"]
    shuffled = [f"{chance[attribute][0]:.0%}" for attribute in ATTRIBUTES]
    rows.append(["captions shuffled", "", *shuffled, f"{mean:.1%}  ± {deviation:.1%}", "", ""])
    return Table(title, ACCURACY_COLUMNS, rows, note)


def gallery(
    folder: Path,
    judged: Mapping[str, Judged],
    captions: Sequence[str],
    *,
    title: str,
    rows: int = GALLERY_ROWS,
    note: str = "",
) -> Gallery:
    """Videos of the first prompts, one column per system; the mp4 files are kept in ``folder``."""
    lines = []
    for n, caption in enumerate(captions[:rows]):
        paths = []
        for place, each in enumerate(judged.values()):
            path = folder / f"{n:03d}-{place}.mp4"
            paths.append(write_video(path, each.videos[n], enlarge=2, overwrite=True))
        lines.append((caption, paths))
    return Gallery(title, list(judged), lines, note)


def write_evaluation(
    out: Path, world: World, split: str, seed: int, judged: Mapping[str, Judged], *, plain: bool = False
) -> Path:
    """report.html and summary.json in ``out``. Returns the report's path."""
    count = next(iter(judged.values())).scores.count
    captions, _ = world_prompts(world, split, count, seed=seed + 1, plain=plain)
    baseline = next(iter(judged))
    table = accuracy_table(judged, baseline, title="Judged accuracy", note=f"Prompts: split {split}, seed {seed}.")
    videos = gallery(out / "videos", judged, captions, title="The same prompts and noise")
    with new_file(out / "summary.json", overwrite=True) as part:
        part.write_text(json.dumps({name: each.summary() for name, each in judged.items()}, indent=2))
    return write_report(
        out / "report.html",
        "nd-jax evaluation",
        "How much of what the prompts ask for is in the videos.",
        [table, videos],
    )
