"""Do cheap scores foretell quality after recovery? Rank correlations over candidates, with intervals, as a page."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.stats import rankdata

from nd_jax.report import Points, Section, Table, write_report
from nd_jax.sweep.recover import Recovered
from nd_jax.sweep.report import told
from nd_jax.sweep.scores import bootstrap_weights, score
from nd_jax.sweep.table import SweepTable
from nd_jax.sweep.units import Drop

RESAMPLES = 2000
OWN = "error before recovery"
"""The sweep's own score of a candidate."""


class Correlation(NamedTuple):
    """Spearman's rank correlation and its 95 % bootstrap interval over candidates; NaN where one side is constant."""

    rho: float
    low: float
    high: float


def spearman(x: Float[np.ndarray, "*r n"], y: Float[np.ndarray, "*r n"]) -> Float[np.ndarray, "*r"]:
    """Row by row; ties share their mean rank."""
    a, b = (rankdata(each, axis=-1) for each in (x, y))
    a, b = (each - each.mean(axis=-1, keepdims=True) for each in (a, b))
    with np.errstate(invalid="ignore", divide="ignore"):
        return (a * b).sum(axis=-1) / np.sqrt((a * a).sum(axis=-1) * (b * b).sum(axis=-1))


def correlation(x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"], seed: int = 0) -> Correlation:
    """Of two scores of the same candidates."""
    rng = np.random.Generator(np.random.Philox(seed))
    drawn = rng.integers(len(x), size=(RESAMPLES, len(x)))
    many = spearman(x[drawn], y[drawn])
    many = many[np.isfinite(many)]
    low, high = np.percentile(many, (2.5, 97.5)) if len(many) else (np.nan, np.nan)
    return Correlation(float(spearman(x, y)), float(low), float(high))


def foretold(
    table: SweepTable, scores: Mapping[str, Float[np.ndarray, " n"]], drops: list[Drop]
) -> dict[str, np.ndarray]:
    """By name, what each cheap score says of every candidate, larger is worse: sums of its blocks' scores, remove-one
    errors alone and with the interaction of pairs, and the candidate's own error."""
    found = {name: np.array([score[list(drop)].sum() for drop in drops]) for name, score in scores.items()}
    single = [table.errors.get((k,), np.nan) for k in range(table.units)]
    alone = np.array([sum(single[k] for k in drop) for drop in drops])
    pairs = [
        sum(
            table.errors.get(pair, np.nan) - single[pair[0]] - single[pair[1]]
            for pair in itertools.combinations(drop, 2)
        )
        for drop in drops
    ]
    found |= {"sum of remove-one": alone, "with pairs": alone + np.array(pairs)}
    found[OWN] = np.array([table.errors[drop] for drop in drops])
    return {name: each for name, each in found.items() if np.isfinite(each).all()}


def sections(
    table: SweepTable,
    scores: Mapping[str, Float[np.ndarray, " n"]],
    chosen: Mapping[str, Drop],
    recovered: Mapping[Drop, Recovered],
    prompts: int,
) -> list[Section]:
    """Correlations, the candidates, and the sweep's choice beside those of other scores."""
    drops = list(recovered)
    weights = bootstrap_weights(prompts, recovered[drops[0]].after.shape[1] // prompts)
    after = {drop: score(each.after, weights) for drop, each in recovered.items()}
    quality = {"error after recovery": np.array([after[drop].error for drop in drops])}
    judged = all(each.accuracy is not None for each in recovered.values())
    if judged:
        quality["judged accuracy lost"] = np.array([1 - each.accuracy.mean() for each in recovered.values()])
    said = foretold(table, scores, drops)
    rows = []
    for name, each in said.items():
        found = [correlation(each, worse) for worse in quality.values()]
        rows.append([name, *(part for c in found for part in (f"{c.rho:.2f}", f"{c.low:.2f} to {c.high:.2f}"))])
    columns = ["score", *(part for name in quality for part in (f"rank correlation with {name}", "95 %"))]
    note = (
        f"Spearman, over {len(drops)} candidates trained alike; 95 % bootstrap over candidates, which were picked by "
        "rank and not at random. 1: the score orders candidates as they end up."
    )
    return [
        Table("Do cheap scores foretell quality after recovery?", columns, rows, note),
        _points(said[OWN], quality["error after recovery"]),
        _against(table, chosen, recovered, weights, judged),
        _all(recovered, after, judged, chosen),
    ]


def _points(before: np.ndarray, after: np.ndarray) -> Points:
    pairs = list(zip(before.tolist(), after.tolist(), strict=True))
    return Points("Before and after", {"candidates": pairs}, OWN, "error after recovery")


def _against(
    table: SweepTable, chosen: Mapping[str, Drop], recovered: Mapping[Drop, Recovered], weights, judged: bool
) -> Table:
    """Is the found set better than other scores' choices after the same training, and than chance?"""
    best = min(recovered, key=lambda drop: (table.errors[drop], drop))
    rivals = {name: [drop] for name, drop in chosen.items() if drop in recovered}
    rivals["chance: all others, on average"] = [drop for drop in recovered if drop != best]
    rows = []
    for name, drops in rivals.items():
        less = score(np.mean([recovered[drop].after for drop in drops], axis=0) - recovered[best].after, weights)
        row = [name, " ".join(map(str, drops[0])) if len(drops) == 1 else "", *told(less, 3)]
        row.append("the same set" if drops == [best] else verdict(less.low, less.high))
        if judged:
            videos = recovered[best].accuracy - np.mean([recovered[drop].accuracy for drop in drops], axis=0)
            points = score(100 * videos[None], bootstrap_weights(len(videos)))
            row += [f"{points.error:+.1f}", f"{points.low:+.1f} to {points.high:+.1f}"]
        rows.append(row)
    note = (
        f"The found set, without {' '.join(map(str, best))}: lowest error before training. Same prompts and noise for "
        "all. The others are every other set of this size, or some of all ranks: see the table below."
    )
    columns = ["choice of", "dropped", "its error after recovery less the found set's", "95 %", "the found set is"]
    columns += ["points of judged accuracy that the found set is ahead", "95 %"] if judged else []
    return Table("The found set after equal recovery", columns, rows, note)


def verdict(low: float, high: float) -> str:
    """What an interval of differences allows to say of the found set."""
    return "better" if low > 0 else "worse" if high < 0 else "not told apart"


def _all(recovered: Mapping[Drop, Recovered], after: Mapping, judged: bool, chosen: Mapping[str, Drop]) -> Table:
    rows = []
    for drop in sorted(recovered, key=lambda drop: after[drop].error):
        each = recovered[drop]
        accuracy = [f"{each.accuracy.mean():.1%}"] if judged else []
        names = ", ".join(name for name, choice in chosen.items() if choice == drop)
        rows.append([" ".join(map(str, drop)), f"{each.before.mean():.4g}", *told(after[drop]), *accuracy, names])
    columns = [
        "dropped",
        "held-out error before",
        "after",
        "95 %",
        *(["judged accuracy"] if judged else []),
        "chosen by",
    ]
    return Table("Candidates, best first", columns, rows)


def write_correlation(path: Path, name: str, steps: int, found: list[Section]) -> Path:
    """``path``, one HTML file."""
    lead = f"Candidates of a sweep of {name}, each trained for {steps} updates of every stage."
    return write_report(path, "nd-jax: pruned denoisers after recovery", lead, found)
