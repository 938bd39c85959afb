"""VBench's scores (arXiv 2311.17982): its runner's result files to Total, Quality and Semantic, beside the paper's.

Every dimension is brought to [0, 1] by a fixed range and averaged by weight; Total counts Quality four times.
Ranges and weights are those of VBench's scripts/constant.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from nd_jax.checked_files import read_json, shown
from nd_jax.errors import UserError
from nd_jax.report import Table

RESULTS = "_eval_results.json"
"""How the names of the official runner's result files end."""
RESULT_LIMIT = 64 << 20
"""Bytes of one; they also list every video's score."""


@dataclass(frozen=True)
class Dimension:
    """A dimension's range of raw scores and its weight within Quality or Semantic."""

    low: float = 0.0
    high: float = 1.0
    weight: float = 1.0


QUALITY = {
    "subject_consistency": Dimension(0.1462),
    "background_consistency": Dimension(0.2615),
    "temporal_flickering": Dimension(0.6293),
    "motion_smoothness": Dimension(0.706, 0.9975),
    "dynamic_degree": Dimension(weight=0.5),
    "aesthetic_quality": Dimension(),
    "imaging_quality": Dimension(),
}
SEMANTIC = {
    "object_class": Dimension(),
    "multiple_objects": Dimension(),
    "human_action": Dimension(),
    "color": Dimension(),
    "spatial_relationship": Dimension(),
    "scene": Dimension(high=0.8222),
    "appearance_style": Dimension(0.0009, 0.2855),
    "temporal_style": Dimension(high=0.364),
    "overall_consistency": Dimension(high=0.364),
}
DIMENSIONS = QUALITY | SEMANTIC
QUALITY_WEIGHT, SEMANTIC_WEIGHT = 4, 1

PUBLISHED: dict[str, dict[str, float]] = {
    "Neodragon hybrid (published)": {
        "total": 81.61,
        "quality": 83.68,
        "semantic": 73.36,
        "temporal_flickering": 99.27,
        "aesthetic_quality": 60.71,
        "imaging_quality": 59.78,
        "object_class": 92.37,
        "scene": 56.56,
        "overall_consistency": 28.09,
    },
    "Neodragon monolithic (published)": {
        "total": 79.02,
        "quality": 83.04,
        "semantic": 62.97,
        "temporal_flickering": 99.35,
        "aesthetic_quality": 59.75,
        "imaging_quality": 64.31,
        "object_class": 77.86,
        "scene": 49.24,
        "overall_consistency": 26.27,
    },
}
"""Percent, as the release gives them; other dimensions are not published."""


def total(quality: float, semantic: float) -> float:
    """Total of both parts, in their unit."""
    return (QUALITY_WEIGHT * quality + SEMANTIC_WEIGHT * semantic) / (QUALITY_WEIGHT + SEMANTIC_WEIGHT)


def _mean(raw: Mapping[str, float], dimensions: Mapping[str, Dimension]) -> float | None:
    if not dimensions.keys() <= raw.keys():
        return None
    scaled = [each.weight * (raw[name] - each.low) / (each.high - each.low) for name, each in dimensions.items()]
    return 100 * sum(scaled) / sum(each.weight for each in dimensions.values())


def aggregate(raw: Mapping[str, float]) -> dict[str, float]:
    """Percent: ``total``, ``quality`` and ``semantic`` as far as their dimensions are there, and every dimension's raw
    score. (VBench's own script counts a missing dimension as 0; here it leaves the sum out.)"""
    quality, semantic = _mean(raw, QUALITY), _mean(raw, SEMANTIC)
    both = None if quality is None or semantic is None else total(quality, semantic)
    found = {"total": both, "quality": quality, "semantic": semantic}
    found |= {name: 100 * raw[name] for name in DIMENSIONS if name in raw}
    return {name: value for name, value in found.items() if value is not None}


def read_results(folder: Path) -> dict[str, float]:
    """Raw scores by dimension from a folder of the official runner's result files.

    Raises UserError for a folder without any, and for files with anything else in them.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; expected one with VBench's *{RESULTS}")
    found: dict[str, float] = {}
    for path in sorted(folder.glob(f"*{RESULTS}")):
        for name, value in read_json(path, RESULT_LIMIT, "VBench result").items():
            key = name.replace(" ", "_")
            score = value[0] if isinstance(value, list) and value else value
            if key not in DIMENSIONS:
                raise UserError(f"{path}: dimension {shown(name)} is not one of VBench's sixteen")
            if isinstance(score, bool) or not isinstance(score, int | float) or not 0 <= score <= 1:
                raise UserError(f"{path}: {shown(name)} is {shown(score)}; expected a number from 0 to 1")
            if key in found and not math.isclose(found[key], score):
                raise UserError(f"{path}: {shown(name)} is {score}, another file in {folder} says {found[key]}")
            found[key] = float(score)
    if not found:
        raise UserError(f"{folder} has no results; expected VBench's *{RESULTS}")
    return found


def scores_table(systems: Mapping[str, Mapping[str, float]], *, published: bool = True) -> Table:
    """Systems beside each other and beside the paper's: one line each, percent."""
    shown_ones = {**systems, **(PUBLISHED if published else {})}
    names = ["total", "quality", "semantic", *DIMENSIONS]
    present = [name for name in names if any(name in scores for scores in shown_ones.values())]
    rows = [[system, *_cells(scores, present)] for system, scores in shown_ones.items()]
    return Table(
        "VBench",
        ["system", *(name.replace("_", " ") for name in present)],
        rows,
        note="Percent. Total, Quality and Semantic are normalised and weighted as VBench does it; dimensions are raw.",
    )


def _cells(scores: Mapping[str, float], names: Iterable[str]) -> list[str]:
    return [f"{scores[name]:.2f}" if name in scores else "" for name in names]
