"""Figures as tables for people."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from nd_jax.data.world import ATTRIBUTES, DISPLACEMENT
from nd_jax.protocol.definition import CONTROL_SPLIT, SPLITS
from nd_jax.protocol.figures import STANDARD_ERRORS, Chance, Comparison, Levels, SystemFigures
from nd_jax.protocol.readings import ProtocolResult
from nd_jax.protocol.statistics import ROWS, Estimate
from nd_jax.report import Table

Systems = Mapping[str, SystemFigures]
MISSING = "-"
"""Nothing to measure."""


def percent(x: float) -> str:
    return f"{x:.1%}" if math.isfinite(x) else MISSING


def number(x: float) -> str:
    return f"{x:.2f}" if math.isfinite(x) else MISSING


def with_interval(found: Estimate, show: Callable[[float], str]) -> str:
    """``0.91  [0.88, 0.94]``."""
    return f"{show(found.value)}  [{show(found.low)}, {show(found.high)}]" if math.isfinite(found.value) else MISSING


def _by_split(systems: Systems, cells: Callable[[str, str], list[str]]) -> list[list[str]]:
    """Rows ordered by split, then by system."""
    return [
        [split, name, *cells(name, split)]
        for split in SPLITS
        for name, figures in systems.items()
        if split in figures.splits
    ]


def _attributes(found: Mapping[str, Estimate], show: Callable[[float], str] = percent) -> list[str]:
    return [*(show(found[name].value) for name in ATTRIBUTES), with_interval(found["mean"], show)]


def prompts_table(results: Mapping[str, ProtocolResult]) -> Table:
    """What was asked."""
    rows = []
    for split, about in SPLITS.items():
        here = {name: result for name, result in results.items() if split in result.splits}
        if here:
            cut = ", ".join(f"{result.splits[split].cut} ({name})" for name, result in here.items())
            protocol = next(iter(here.values())).protocol
            rows.append([split, about.about, protocol.prompts, len(protocol.sampling_seeds), cut])
    return Table(
        "What was asked",
        ["split", "prompts", "number", "videos of each", "too long for the text encoders"],
        rows,
        "Prompts and sampling seeds are fixed; a prompt and a seed start from the same noise in every system.",
    )


def accuracy_table(systems: Systems) -> Table:
    return Table(
        "Judged accuracy",
        ["split", "system", *ATTRIBUTES, "mean [95 %]"],
        _by_split(systems, lambda name, split: _attributes(systems[name].splits[split].accuracy)),
        "Share of attributes that a judge without learned parts reads from the videos as prompted. Intervals resample "
        "prompts, each with all its videos.",
    )


def codec_tables(systems: Systems) -> list[Table]:
    return [
        Table(
            "Judged accuracy of the codec's reconstructions",
            ["split", "codec of", *ATTRIBUTES, "mean [95 %]"],
            _by_split(systems, lambda name, split: _attributes(systems[name].splits[split].codec_accuracy)),
            "Drawn clips with the same labels, encoded and decoded.",
        ),
        Table(
            "Judged accuracy divided by that of reconstructions",
            ["split", "system", *ATTRIBUTES, "mean [95 %]"],
            _by_split(systems, lambda name, split: _attributes(systems[name].splits[split].of_codec)),
        ),
    ]


def _levels(found: Levels) -> list[str]:
    return [with_interval(found.made, number), number(found.truth.value), number(found.codec.value)]


def motion_tables(systems: Systems) -> list[Table]:
    def moving(name: str, split: str) -> list[str]:
        found = systems[name].splits[split]
        return [*_levels(found.travel), with_interval(found.travel_of_truth, percent), percent(found.unread)]

    def still(name: str, split: str) -> list[str]:
        found = systems[name].splits[split]
        return [*_levels(found.still_travel), *_levels(found.flicker)]

    low, high = DISPLACEMENT
    return [
        Table(
            "How far objects move that are asked to",
            ["split", "system", "px [95 %]", "drawn px", "codec px", "of drawn [95 %]", "not found"],
            _by_split(systems, moving),
            "Length of the displacement over the whole clip as the judge reads it; drawn clips move "
            f"{low:g} to {high:g} px. Objects the judge does not find are left out here; they count as wrong above.",
        ),
        Table(
            "What changes where nothing should",
            ["split", "system", "px [95 %]", "drawn", "codec", "flicker [95 %]", "drawn", "codec"],
            _by_split(systems, still),
            "Objects that are asked to stand still: how far they move, and flicker, the mean absolute difference of "
            "neighbouring frames in 8-bit levels over the object's part of the frame (255 minus VBench's temporal "
            "flickering).",
        ),
    ]


def _chance_row(found: Chance) -> list[str]:
    level, error = found.expected["mean"]
    worst = max(ATTRIBUTES, key=lambda name: abs(found.deviation[name]))
    return [
        *(percent(found.score[name]) for name in ROWS),
        f"{percent(level)} ± {percent(error)}",
        f"{found.deviation['mean']:+.1f}",
        f"{worst} {found.deviation[worst]:+.1f}",
        "yes" if found.at_chance else "NO",
    ]


def controls_table(systems: Systems) -> Table:
    rows = []
    for name, figures in systems.items():
        rows += [[control, name, *_chance_row(found)] for control, found in figures.controls.items()]
        rows += [[f"captions shuffled, {split}", name, *_chance_row(f.shuffled)] for split, f in figures.splits.items()]
    return Table(
        "Controls",
        ["control", "system", *ROWS, "chance", "standard errors away", "farthest attribute", "at chance"],
        rows,
        f"The first controls are judged against the labels of {CONTROL_SPLIT}. Chance is what the same videos score "
        "with their captions in random order, mean and standard error over all orders; a control is at chance when its "
        f"mean is within {STANDARD_ERRORS:g} standard errors of it.",
    )


def templates_table(systems: Systems) -> list[Table]:
    rows = [
        [name, *(with_interval(figures.templates[row], _points) for row in ROWS)]
        for name, figures in systems.items()
        if figures.templates is not None
    ]
    note = (
        "Accuracy with held-out templates minus accuracy with training's, in points. Paired: the same labels, noise "
        "and words for colour, shape, size and background. The split seen has labels of its own and is not in this."
    )
    return [Table("What unknown templates cost", ["system", *ROWS], rows, note)] if rows else []


def _points(x: float) -> str:
    return f"{100 * x:+.1f}" if math.isfinite(x) else MISSING


def comparison_tables(comparisons: Mapping[str, Mapping[str, Comparison]], baseline: str) -> list[Table]:
    """Empty without systems to compare."""
    rows = [
        [
            split,
            name,
            *_attributes(found[split].difference, _points),
            with_interval(found[split].share["mean"], percent),
        ]
        for split in SPLITS
        for name, found in comparisons.items()
        if split in found
    ]
    note = f"Accuracy minus that of {baseline}, in points, prompt by prompt with the same noise; and divided by it."
    columns = ["split", "system", *ATTRIBUTES, "mean [95 %]", "of baseline [95 %]"]
    return [Table("Against the baseline", columns, rows, note)] if rows else []
