"""Readings to numbers: accuracy, its share of the codec's, motion, flicker, chance, and differences between systems."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from nd_jax.data.judge import permutation_chance
from nd_jax.protocol.definition import CONTROL_SPLIT, TEMPLATES, Protocol, prompt_list
from nd_jax.protocol.readings import Measured, ProtocolResult, SplitReadings
from nd_jax.protocol.statistics import (
    ROWS,
    Estimate,
    by_attribute,
    estimate,
    mean,
    per_prompt,
    quotient,
    quotient_of_means,
)

STANDARD_ERRORS = 3.0
"""A mean accuracy this near to what shuffled captions give on average is at chance."""


@dataclass(frozen=True)
class Chance:
    """A score beside what the same readings score with their captions in random order, exact over all orders."""

    score: dict[str, float]
    expected: dict[str, tuple[float, float]]
    """Mean and standard error, by attribute and for their mean."""

    @property
    def deviation(self) -> dict[str, float]:
        """Score minus mean, in standard errors."""
        found = {}
        for name, (level, error) in self.expected.items():
            away = self.score[name] - level
            found[name] = 0.0 if abs(away) < 1e-12 else away / error if error else math.copysign(math.inf, away)
        return found

    @property
    def at_chance(self) -> bool:
        """Of the mean over attributes."""
        return abs(self.deviation["mean"]) <= STANDARD_ERRORS


@dataclass(frozen=True)
class Levels:
    """One quantity in a system's videos, in drawn clips with the same labels and in their reconstructions."""

    made: Estimate
    truth: Estimate
    codec: Estimate


@dataclass(frozen=True)
class SplitFigures:
    """A system on one split; dictionaries are by attribute and for their mean, shares in [0, 1]."""

    accuracy: dict[str, Estimate]
    codec_accuracy: dict[str, Estimate]
    """Of reconstructions of drawn clips with the same labels: what no system with this codec can beat by skill."""
    of_codec: dict[str, Estimate]
    """``accuracy`` divided by ``codec_accuracy``."""
    travel: Levels
    """Length of the displacement of objects that are asked to move and can be read, pixels over the full clip."""
    travel_of_truth: Estimate
    """``travel.made`` divided by ``travel.truth``."""
    unread: float
    """Share of objects asked to move in which the judge found none to follow; not part of ``travel``."""
    still_travel: Levels
    """The same of objects that are asked to stand still."""
    flicker: Levels
    """Of those, in 8-bit levels: there all change between frames is flicker."""
    shuffled: Chance
    """The videos with their captions in one random order."""


def split_figures(readings: SplitReadings, protocol: Protocol, split: str) -> SplitFigures:
    """All figures of one split."""
    labels, resamples = prompt_list(protocol, split).labels, protocol.resamples
    made, codec = per_prompt(readings.made.labels, labels), per_prompt(readings.codec.labels[None], labels)
    moves = labels[:, :, 3] != 0

    def levels(name: str, chosen: Bool[np.ndarray, "n objects"]) -> Levels:
        parts = (readings.made, _one_seed(readings.truth), _one_seed(readings.codec))
        return Levels(*(estimate(quotient, *_sums(part, name, chosen), resamples=resamples) for part in parts))

    ours, true = (_sums(part, "travel", moves) for part in (readings.made, _one_seed(readings.truth)))
    return SplitFigures(
        accuracy=by_attribute(mean, made, resamples=resamples),
        codec_accuracy=by_attribute(mean, codec, resamples=resamples),
        of_codec=by_attribute(quotient, made, codec, resamples=resamples),
        travel=levels("travel", moves),
        travel_of_truth=estimate(quotient_of_means, *ours, *true, resamples=resamples),
        unread=float(1 - readings.made.readable[:, moves].mean()) if moves.any() else math.nan,
        still_travel=levels("travel", ~moves),
        flicker=levels("flicker", ~moves),
        shuffled=shuffled(readings.made, labels, seed=protocol.prompt_seed),
    )


def _one_seed(measured: Measured) -> Measured:
    return Measured(*(part[None] for part in measured))


def _sums(measured: Measured, name: str, chosen: Bool[np.ndarray, "n objects"]) -> tuple[np.ndarray, np.ndarray]:
    """Sum and number of a quantity over the chosen objects of each prompt that has any; unread motions do not count."""
    values = getattr(measured, name)
    counts = np.broadcast_to(chosen, values.shape)
    if name == "travel":
        counts = counts & measured.readable
    rows = chosen.any(1)
    return (values * counts).sum((0, 2))[rows], counts.sum((0, 2))[rows].astype(np.float64)


def chance(read: Int[np.ndarray, "seeds n objects 5"], labels: Int[np.ndarray, "n objects 5"]) -> Chance:
    """Readings against labels that their videos should know nothing of."""
    score = per_prompt(read, labels).mean(1)
    return Chance(dict(zip(ROWS, score.tolist(), strict=True)), permutation_chance(read, labels))


def shuffled(made: Measured, labels: Int[np.ndarray, "n objects 5"], *, seed: int) -> Chance:
    """``chance`` of videos whose captions changed places once."""
    order = np.random.Generator(np.random.Philox(seed)).permutation(len(labels))
    return chance(made.labels, labels[order])


def control_figures(result: ProtocolResult) -> dict[str, Chance]:
    """Every control against the labels of ``CONTROL_SPLIT``."""
    if not result.controls:
        return {}
    labels = prompt_list(result.protocol, CONTROL_SPLIT).labels
    return {name: chance(measured.labels, labels) for name, measured in result.controls.items()}


def _rows(result: ProtocolResult, split: str) -> Float[np.ndarray, "6 n"]:
    return per_prompt(result.splits[split].made.labels, prompt_list(result.protocol, split).labels)


def template_difference(result: ProtocolResult) -> dict[str, Estimate] | None:
    """Accuracy with held-out templates minus accuracy with training's: same labels and noise, pair by pair.

    None where one of the two splits was not run.
    """
    if not set(TEMPLATES) <= set(result.splits):
        return None
    ours, theirs = (_rows(result, split) for split in TEMPLATES)
    return by_attribute(mean, ours - theirs, resamples=result.protocol.resamples)


@dataclass(frozen=True)
class Comparison:
    """Two systems on one split, prompt by prompt with the same noise."""

    difference: dict[str, Estimate]
    """Accuracy minus the baseline's."""
    share: dict[str, Estimate]
    """Accuracy divided by the baseline's."""


def compare(result: ProtocolResult, baseline: ProtocolResult) -> dict[str, Comparison]:
    """By split, for the splits that both have. Raises UserError where prompts or seeds differ."""
    baseline.protocol.check_same(result.protocol, "comparison")
    found = {}
    for split in result.splits:
        if split in baseline.splits:
            ours, theirs = _rows(result, split), _rows(baseline, split)
            resamples = min(result.protocol.resamples, baseline.protocol.resamples)
            found[split] = Comparison(
                by_attribute(mean, ours - theirs, resamples=resamples),
                by_attribute(quotient, ours, theirs, resamples=resamples),
            )
    return found


def travel_against(result: ProtocolResult, baseline: ProtocolResult, split: str) -> Estimate:
    """How far objects move that are asked to, divided by how far the baseline's do, prompt by prompt."""
    moves = prompt_list(result.protocol, split).labels[:, :, 3] != 0
    ours, theirs = (_sums(each.splits[split].made, "travel", moves) for each in (result, baseline))
    return estimate(quotient_of_means, *ours, *theirs, resamples=result.protocol.resamples)


@dataclass(frozen=True)
class SystemFigures:
    """Everything about one system."""

    splits: dict[str, SplitFigures]
    controls: dict[str, Chance]
    templates: dict[str, Estimate] | None
    """See ``template_difference``."""


def system_figures(result: ProtocolResult) -> SystemFigures:
    splits = {name: split_figures(each, result.protocol, name) for name, each in result.splits.items()}
    return SystemFigures(splits, control_figures(result), template_difference(result))


def as_json(value: Any) -> Any:
    """Figures as JSON-ready content; what could not be measured is null."""
    if isinstance(value, Estimate):
        return value.summary()
    if isinstance(value, Chance):
        parts = {"score": value.score, "expected": value.expected, "deviation": value.deviation}
        return {**as_json(parts), "at_chance": value.at_chance}
    if hasattr(value, "__dataclass_fields__"):
        return {name: as_json(getattr(value, name)) for name in value.__dataclass_fields__}
    if isinstance(value, dict):
        return {name: as_json(each) for name, each in value.items()}
    if isinstance(value, tuple | list):
        return [as_json(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
