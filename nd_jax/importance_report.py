"""Importance of blocks as numbers on file, as a table and as plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from nd_jax.checked_files import read_json
from nd_jax.errors import UserError
from nd_jax.recipes.pruning import BlockInfluence
from nd_jax.report import Bars, Table, write_report

SCORES = ("influence", "error", "judge")
"""What a choice of blocks can go by."""


@dataclass(frozen=True)
class Importance:
    """What was measured of a denoiser's blocks. Of the remove-one scores either, both or none.

    ``error``: velocity error without each block, at each stage. ``accuracy``: the judge's of the whole system, and
    without each block.
    """

    influence: BlockInfluence
    error: Float[np.ndarray, "stages k"] | None = None
    accuracy: tuple[float, Float[np.ndarray, " k"]] | None = None

    @property
    def scores(self) -> dict[str, Float[np.ndarray, " k"]]:
        """By name, one number for each block; the lowest go first. The error is the mean over stages."""
        found = {"influence": self.influence.score}
        if self.error is not None:
            found["error"] = self.error.mean(axis=0)
        if self.accuracy is not None:
            found["judge"] = self.accuracy[0] - self.accuracy[1]
        return found

    def figures(self) -> dict[str, Any]:
        """JSON-ready."""
        influence = self.influence
        told = {
            "image": influence.image.tolist(),
            "text": influence.text.tolist(),
            "stages": influence.by_stage.tolist(),
            "scores": {name: score.tolist() for name, score in self.scores.items()},
        }
        if self.error is not None:
            told["error_stages"] = self.error.tolist()
        if self.accuracy is not None:
            told["accuracy"] = {"full": self.accuracy[0], "without": self.accuracy[1].tolist()}
        return told

    def table(self) -> tuple[list[str], list[list[float]]]:
        """Names of columns, and a row for each block."""
        columns = {"image": self.influence.image, "text": self.influence.text, **self.scores}
        return list(columns), np.stack(list(columns.values()), axis=1).tolist()

    def sections(self, drop: Sequence[int] = ()) -> list[Bars | Table]:
        """For a report: influence whole and by stage, and what was measured by leaving blocks out."""
        names, rows = self.table()
        influence, depth = self.influence, len(self.influence.image)
        note = f"Removed: {', '.join(map(str, drop))}. " if drop else ""
        whole = {"image tokens": influence.image, "text tokens": influence.text}
        sections: list[Bars | Table] = [
            bars("Block influence", whole, "1 - cos(in, out)", f"{note}The last block stays: it has no text output."),
        ]
        for index, kind in enumerate(("image", "text")):
            stages = {f"stage {s}": each[:, index] for s, each in enumerate(influence.by_stage)}
            sections.append(bars(f"Block influence on {kind} tokens, by stage", stages, "1 - cos(in, out)"))
        if self.error is not None:
            stages = {f"stage {s}": each for s, each in enumerate(self.error)}
            note = "Mean squared distance of the velocity from the whole denoiser's, on the same inputs."
            sections.append(bars("Velocity error without each block", stages, "mean squared error", note))
        if self.accuracy is not None:
            full, without = self.accuracy
            both = {"without the block": without, "whole": np.full(depth, full)}
            sections.append(bars("Judged accuracy without each block", both, "accuracy"))
        told = [[block, *(f"{value:.4f}" for value in row)] for block, row in enumerate(rows)]
        return [*sections, Table("Importance of blocks", ["block", *names], told, "The lowest scores go first.")]


def bars(title: str, groups: Mapping[str, Sequence[float]], label: str, note: str = "") -> Bars:
    """One bar for each block and group."""
    return Bars(title, {name: dict(enumerate(map(float, x))) for name, x in groups.items()}, "block", label, note)


def write_importance(path: Path, importance: Importance, name: str) -> Path:
    """``path``, one HTML file."""
    return write_report(path, "nd-jax: importance of blocks", f"Of the denoiser in {name}.", importance.sections())


def read_score(path: Path, by: str, blocks: int) -> Float[np.ndarray, " k"]:
    """One score from a file of ``nd-jax prune importance``. Raises UserError unless it holds one for each block."""
    scores = read_json(path, what="importance file").get("scores")
    if not isinstance(scores, dict) or by not in scores:
        known = ", ".join(sorted(set(scores) & set(SCORES))) if isinstance(scores, dict) else "none"
        raise UserError(f"{path} has no scores by {by}, found {known}; make it with nd-jax prune importance --out FILE")
    score = scores[by]
    if not isinstance(score, list) or len(score) != blocks or any(type(x) not in (int, float) for x in score):
        raise UserError(f"{path}: scores by {by} are not {blocks} numbers, one for each block but the last")
    return np.array(score, np.float64)
