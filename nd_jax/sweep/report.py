"""A sweep as a page: what every block costs, which pairs belong together, and size against error."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from jaxtyping import Float

from nd_jax.report import HeatMap, Points, Table, write_report
from nd_jax.sweep.scores import Score, bootstrap_weights, score
from nd_jax.sweep.table import SweepTable
from nd_jax.sweep.workflow import Outcome

Drop = tuple[int, ...]
SHOWN = 12
"""Rows of the list of the best."""


def interaction(table: SweepTable) -> Float[np.ndarray, "k k"]:
    """Error without both blocks, less the errors without either; NaN where it was not measured. Above 0: one makes up
    for the other, so both must not go. The diagonal is the error without the block."""
    found = np.full((table.blocks, table.blocks), np.nan)
    for i in range(table.blocks):
        found[i, i] = table.errors.get((i,), np.nan)
        for j in range(i):
            pair = table.errors.get((j, i), np.nan)
            found[i, j] = found[j, i] = pair - table.errors.get((i,), np.nan) - table.errors.get((j,), np.nan)
    return found


def front(table: SweepTable) -> list[Drop]:
    """The best candidate of every size that no smaller one beats, largest network first."""
    best: list[Drop] = []
    for count in sorted({len(drop) for drop in table.rows}, reverse=True):
        drop = table.best(count)
        if not best or table.errors[drop] < table.errors[best[-1]]:
            best.append(drop)
    return best[::-1]


def difference(table: SweepTable, one: Drop, other: Drop) -> Score:
    """How much larger the error of ``one`` is than that of ``other``, on the same prompts; 95 % bootstrap interval."""
    errors = table.rows[one].errors.astype(np.float64) - table.rows[other].errors
    return score(errors, bootstrap_weights(table.prompts))


def sections(outcome: Outcome, count: int) -> list[HeatMap | Points | Table]:
    """For ``write_report``."""
    table, blocks = outcome.table, range(outcome.table.blocks)
    found: list[HeatMap | Points | Table] = []
    if all((k,) in table.rows for k in blocks):
        each = np.stack([table.rows[(k,)].errors.mean(axis=1) for k in blocks], axis=1)
        names = [f"stage {stage}, t={timestep:.0f}" for stage, timestep in table.levels]
        note = "Mean squared distance of the velocity from the whole denoiser's, on the same inputs."
        found.append(HeatMap("Error without each block, by noise level", each, names, list(blocks), "block", note))
    pairs = interaction(table)
    if np.isfinite(pairs).sum() > table.blocks:
        note = (
            "Off the diagonal: error without both, less the errors without either. Above 0, each makes up for the "
            "other, and removing both costs more than the single errors say. On the diagonal: error without the block."
        )
        found.append(HeatMap("Interaction of pairs", pairs, list(blocks), list(blocks), "block", note, signed=True))
    best = front(table)
    groups = {
        "candidates": [(table.parameters(d), table.errors[d]) for d in table.rows],
        "front": [(table.parameters(d), table.errors[d]) for d in best],
    }
    if outcome.influence in table.rows:
        groups["block influence"] = [(table.parameters(outcome.influence), table.errors[outcome.influence])]
    found.append(Points("Size against error", groups, "parameters of the denoiser", "error", joined={"front"}))
    right = sorted((d for d in table.rows if len(d) == count), key=lambda d: (table.errors[d], d))[:SHOWN]
    if outcome.influence in table.rows and outcome.influence not in right:
        right.append(outcome.influence)
    columns = ["dropped", "error", "95 %", "block influence's error less this", "95 %", "found by"]
    rows = []
    for drop in right:
        row, more = table.rows[drop], ("", "")
        if outcome.influence in table.rows:
            less = difference(table, outcome.influence, drop)
            more = f"{less.error:.3g}", f"{less.low:.3g} to {less.high:.3g}"
        own = row.score
        rows.append(
            [" ".join(map(str, drop)), f"{own.error:.4g}", f"{own.low:.4g} to {own.high:.4g}", *more, row.strategy]
        )
    note = (
        f"Intervals: bootstrap over {table.prompts} prompts, the same resamples for all. The best of many looks better "
        "than it is on other prompts, and none of them has been trained yet."
    )
    found.append(Table(f"The best that drop {count}", columns, rows, note))
    return found


def write_sweep(path: Path, outcome: Outcome, count: int, name: str) -> Path:
    """``path``, one HTML file."""
    known = len(outcome.table.rows)
    lead = f"{known} candidates of the denoiser in {name}; the search ended by: {outcome.ended}."
    return write_report(path, "nd-jax: which blocks can go", lead, sections(outcome, count))
