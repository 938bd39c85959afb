"""A sweep as a page: what every block costs, which pairs belong together, and size against error."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from nd_jax.report import HeatMap, Points, Section, Table, write_report
from nd_jax.sweep.cheap import TAYLOR
from nd_jax.sweep.scores import Score, by_stage, score
from nd_jax.sweep.table import SweepTable
from nd_jax.sweep.units import Drop, Units
from nd_jax.sweep.workflow import Outcome

SCALES = {
    "parameters": (1, "parameters of the denoiser"),
    "macs": (1e9, "multiply-adds of a video, 10^9"),
    "bytes": (1e6, "MB of weights, 8 bits"),
}
"""What figures of ``Cost`` are divided by for a plot, and its label."""
SHOWN = 12
"""Rows of the list of the best."""
MOST_PAIRS = 64
"""Units of which the interaction of pairs is drawn."""


def interaction(table: SweepTable) -> Float[np.ndarray, "n n"]:
    """Error without both units, less the errors without either; NaN where it was not measured. Above 0: one makes up
    for the other, so both must not go. The diagonal is the error without the unit."""
    found = np.full((table.units, table.units), np.nan)
    for i in range(table.units):
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
    return score(errors, table.weights)


def sections(outcome: Outcome, count: int) -> list[Section]:
    """For ``write_report``."""
    table, units = outcome.table, outcome.units
    levels = [f"stage {stage}, t={timestep:.0f}" for stage, timestep in table.levels]
    found: list[Section] = []
    if all((k,) in table.rows for k in range(table.units)):
        each = np.stack([table.rows[(k,)].errors.mean(axis=1) for k in range(table.units)], axis=1)
        note = "Mean squared distance of the velocity from the whole denoiser's, on the same inputs."
        found += maps("Error without each unit", each, levels, units, note)
    if outcome.cheap.levels is not None:
        note = "What Taylor's formula says of the same; see nd_jax/sweep/gradients.py."
        found += maps("Taylor scores", outcome.cheap.levels, levels, units, note)
    found.append(importance(outcome))
    pairs = interaction(table) if table.units <= MOST_PAIRS else np.zeros((0, 0))
    if np.isfinite(pairs).sum() > table.units:
        names = [units.name(k) for k in range(table.units)]
        note = (
            "Off the diagonal: error without both, less the errors without either. Above 0, each makes up for the "
            "other, and removing both costs more than the single errors say. On the diagonal: error without one."
        )
        found.append(HeatMap("Interaction of pairs", pairs, names, names, units.kind, note, signed=True))
    return [*found, *fronts(outcome), *best_of(outcome, count)]


def maps(
    title: str, each: Float[np.ndarray, "levels n"], levels: Sequence[str], units: Units, note: str
) -> list[HeatMap]:
    """Blocks: one map by noise level. Pieces of blocks: a map over blocks and pieces, and one over blocks and
    levels."""
    if units.kind == "blocks":
        return [HeatMap(f"{title}, by noise level", each, levels, list(range(len(units))), "block", note)]
    grids = np.stack([units.grid(row) for row in each])
    by_block = np.nanmean(grids, axis=2)
    return [
        HeatMap(
            f"{title}: {units.kind} of every block", grids.mean(axis=0), units.rows, units.columns, units.kind, note
        ),
        HeatMap(f"{title}, mean of a block's {units.kind}", by_block, levels, units.rows, "block", note),
    ]


def importance(outcome: Outcome) -> Table:
    """Every unit's scores side by side, those that cost least first; at most ``4 * SHOWN`` of them."""
    table, scores = outcome.table, outcome.cheap.scores
    alone = {k: table.rows[(k,)].score for k in range(table.units) if (k,) in table.rows}
    order = sorted(range(table.units), key=lambda k: (alone[k].error if k in alone else np.inf, k))[: 4 * SHOWN]
    rows = []
    for k in order:
        error = told(alone[k]) if k in alone else ("", "")
        taylor = ("", "")
        if outcome.cheap.interval is not None:
            low, high = outcome.cheap.interval[:, k]
            taylor = told(Score(float(scores[TAYLOR][k]), float(low), float(high)))
        others = [f"{score[k]:.4g}" for name, score in scores.items() if name != TAYLOR]
        rows.append([outcome.units.name(k), *error, *taylor, *others])
    columns = ["unit", "error without it", "95 %", "Taylor", "95 %", *(name for name in scores if name != TAYLOR)]
    return Table(f"Importance of {outcome.units.kind}", columns, rows, "The cheapest first. Intervals as below.")


def fronts(outcome: Outcome) -> list[Points]:
    """Error against every cost."""
    table, best = outcome.table, front(outcome.table)
    if table.costs is None:
        return []
    costs = {drop: table.costs(drop).figures() for drop in table.rows}
    found = []
    for name in next(iter(costs.values()), ()):
        scale, label = SCALES.get(name, (1, f"estimated ms on {name.removeprefix('ms_')}"))
        groups = {
            "candidates": [(costs[d][name] / scale, table.errors[d]) for d in table.rows],
            "front": [(costs[d][name] / scale, table.errors[d]) for d in best],
        }
        for who, drop in outcome.chosen.items():
            if drop in table.rows:
                groups[who] = [(costs[drop][name] / scale, table.errors[drop])]
        title = "Size against error" if name == "parameters" else f"Cost against error: {label}"
        found.append(Points(title, groups, label, "error", joined={"front"}))
    return found


def best_of(outcome: Outcome, count: int) -> list[Table]:
    """The best candidates of the size asked for, and by stage."""
    table, baseline = outcome.table, outcome.baseline
    right = sorted((d for d in table.rows if len(d) == count), key=lambda d: (table.errors[d], d))[:SHOWN]
    right += [drop for drop in outcome.chosen.values() if drop in table.rows and drop not in right]
    against = next(iter(outcome.chosen), "")
    rows, stages = [], []
    for drop in right:
        row, more = table.rows[drop], ("", "")
        if baseline in table.rows:
            more = told(difference(table, baseline, drop), 3)
        who = ", ".join([row.strategy, *(n for n, d in outcome.chosen.items() if d == drop and n != row.strategy)])
        name = "; ".join(map(outcome.units.name, drop)) if outcome.units.kind != "blocks" else " ".join(map(str, drop))
        rows.append([name, *told(row.score), *more, who])
        stages.append(
            [name, *(part for each in by_stage(row.errors, table.levels, table.weights) for part in told(each))]
        )
    note = (
        f"Intervals: bootstrap over {table.prompts} prompts and {table.samples} seeds of each, the same for all. "
        "The best of many looks better than it is on other prompts, and none of them has been trained yet."
    )
    columns = ["dropped", "error", "95 %", f"{against}'s error less this", "95 %", "found by"]
    names = [part for stage in sorted({stage for stage, _ in table.levels}) for part in (f"stage {stage}", "95 %")]
    return [
        Table(f"The best that drop {count}", columns, rows, note),
        Table("Their errors by stage", ["dropped", *names], stages, note),
    ]


def told(found: Score, digits: int = 4) -> tuple[str, str]:
    """A number and its interval."""
    return f"{found.error:.{digits}g}", f"{found.low:.{digits}g} to {found.high:.{digits}g}"


def write_sweep(path: Path, outcome: Outcome, count: int, name: str, more: Sequence[Section] = ()) -> Path:
    """``path``, one HTML file; ``more`` comes last."""
    known = len(outcome.table.rows)
    lead = f"{known} candidates of the denoiser in {name}; the search ended by: {outcome.ended}."
    return write_report(path, f"nd-jax: which {outcome.units.kind} can go", lead, [*sections(outcome, count), *more])
