"""Scores of single units that cost little: block influence, Taylor scores, learned gates. Kept in ``scores.json``."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from nd_jax.checked_files import read_json
from nd_jax.errors import UserError
from nd_jax.generate import Generator
from nd_jax.influence import block_influence
from nd_jax.outputs import new_file
from nd_jax.recipes.pruning import choose_blocks
from nd_jax.sweep.calibration import Calibration
from nd_jax.sweep.gradients import learned_gates, taylor
from nd_jax.sweep.scores import bootstrap_weights
from nd_jax.sweep.units import Drop, Units

INFLUENCE, TAYLOR, GATES = "block influence", "Taylor", "learned gates"


@dataclass(frozen=True)
class CheapScores:
    """By name a number for each unit; the lowest go first. ``levels``: Taylor scores by noise level; ``interval``:
    their 95 % bootstrap interval over prompts and seeds."""

    scores: dict[str, Float[np.ndarray, " n"]] = field(default_factory=dict)
    levels: Float[np.ndarray, "levels n"] | None = None
    interval: Float[np.ndarray, "2 n"] | None = None

    def choices(self, count: int) -> dict[str, Drop]:
        """What each score would drop."""
        return {name: choose_blocks(score, count) for name, score in self.scores.items()}

    def figures(self) -> dict[str, Any]:
        """JSON-ready."""
        told: dict[str, Any] = {"scores": {name: score.tolist() for name, score in self.scores.items()}}
        if self.levels is not None:
            told |= {"taylor_levels": self.levels.tolist(), "taylor_interval_95": self.interval.tolist()}
        return told


def cheap_scores(
    generator: Generator,
    prompts: Sequence[str],
    calibration: Calibration,
    units: Units,
    options: Any,
    settings: dict[str, Any],
    path: Path,
    *,
    told: Callable[[str], None] = lambda line: None,
) -> CheapScores:
    """The scores that ``options`` (``SweepOptions``) ask for; read from ``path`` where it holds them."""
    names = ("count", "batch", "probes", "gate_steps")
    asked = json.loads(json.dumps({**settings, **{name: getattr(options, name) for name in names}}))
    if path.exists():
        content = read_json(path, what="scores of units")
        if content.get("settings") == asked:
            return _read(path, content, len(units))
    system, given = generator.system, (generator.system, generator.envelopes, calibration, units)
    scores, levels, interval = {}, None, None
    if units.kind == "blocks":
        told("block influence")
        sampled = {"seed": options.seed, "samples": options.samples, "batch": options.batch}
        scores[INFLUENCE] = block_influence(system, prompts, generator=generator, **sampled).score
    if options.probes:
        told("Taylor scores")
        each = taylor(*given, probes=options.probes, seed=options.seed)
        levels, weights = each.mean(axis=1), bootstrap_weights(calibration.prompts, calibration.samples)
        interval = np.percentile(weights @ each.mean(axis=0), (2.5, 97.5), axis=0)
        scores[TAYLOR] = levels.mean(axis=0)
    if options.gate_steps:
        told("learning gates under the budget")
        scores[GATES] = learned_gates(*given, options.count, steps=options.gate_steps, seed=options.seed)
    found = CheapScores(scores, levels, interval)
    if jax.process_index() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        with new_file(path, overwrite=True) as part:
            part.write_text(json.dumps({**found.figures(), "settings": asked}, indent=2) + "\n")
    return found


def read_scores(path: Path, count: int) -> CheapScores:
    """What a sweep of ``count`` units left. Raises UserError for a file that is missing or damaged."""
    return _read(path, read_json(path, what="scores of units"), count)


def _read(path: Path, content: dict[str, Any], count: int) -> CheapScores:
    try:
        scores = {str(name): np.array(score, np.float64) for name, score in content["scores"].items()}
        levels, interval = (
            None if content.get(key) is None else np.array(content[key], np.float64)
            for key in ("taylor_levels", "taylor_interval_95")
        )
        shapes = [x.shape for x in scores.values()] + [x.shape[1:] for x in (levels, interval) if x is not None]
        if any(shape != (count,) for shape in shapes):
            raise ValueError(f"numbers of shapes {shapes} for {count} units")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"sweep: {path} is damaged ({error}); remove it to have it made again") from None
    return CheapScores(scores, levels, interval)
