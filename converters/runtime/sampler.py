"""The loop that makes a video's latents: units in order, each through all stages, each stage step by step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from . import layout
from .errors import BundleError
from .latents import euler, from_patches, jump, levels, lowest_noise, renew, steps, to_patches
from .noise import Noise
from .sessions import Arrays, Sessions

GRIDS = ("official", "plain")


@dataclass(frozen=True)
class Plan:
    """Steps per stage and guidance; ``first`` for a unit without history, ``later`` for all others."""

    first_steps: tuple[int, ...]
    later_steps: tuple[int, ...]
    first_guidance: float = 0.0
    later_guidance: float = 0.0
    grid: str = "official"
    renew: bool = False

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], stages: int) -> Plan:
        """From the manifest. Raises BundleError for other counts than one for each stage, or an unknown grid."""
        try:
            plan = cls(**content)
            plan = replace(plan, first_steps=tuple(plan.first_steps), later_steps=tuple(plan.later_steps))
            counts = (*plan.first_steps, *plan.later_steps)
            good = all(type(n) is int and 1 <= n <= 1000 for n in counts) and plan.grid in GRIDS
            good = good and np.isfinite([plan.first_guidance, plan.later_guidance]).all()
        except TypeError:
            good = False
        if not good or len(counts) != 2 * stages:
            raise BundleError(f"sampling plan {dict(content)}: expected {stages} step counts for first and later units")
        return plan

    @property
    def guided(self) -> bool:
        """Whether guidance does anything: at scales 0 and 1 only the prompt's own velocity counts."""
        return not {self.first_guidance, self.later_guidance} <= {0.0, 1.0}

    def of(self, unit: int) -> tuple[tuple[int, ...], float]:
        """Steps and guidance of a unit."""
        return (self.later_steps, self.later_guidance) if unit else (self.first_steps, self.first_guidance)


@dataclass(frozen=True)
class Condition:
    """What the denoiser reads of one prompt: text [S, D], its mask [S], pooled text [1, P]. ``towers``: all that the
    pooled towers' graphs have said of it, which the first frame may need."""

    text: np.ndarray
    mask: np.ndarray
    pooled: np.ndarray
    towers: Mapping[str, Arrays] = field(default_factory=dict)


class Denoiser:
    """The denoiser's graphs for one video: conditioning first, then any number of calls."""

    def __init__(self, sessions: Sessions, conditions: list[Condition]):
        """``conditions``: the prompt's, behind the negative prompt's if there is guidance."""
        self.sessions, self.conditions = sessions, conditions
        self.about = sessions.bundle["denoiser"]
        self._vectors: dict[tuple[int, float], Arrays] = {}

    @property
    def stages(self) -> list[Mapping[str, Any]]:
        return self.about["stages"]

    def prepare(self, plan: Plan, first_unit: int, units: int) -> None:
        """Everything that depends only on timestep and prompt, once each."""
        sets = {plan.of(unit)[0] for unit in range(first_unit, units)}
        for counts in sorted(sets):
            for stage, n in zip(self.stages, counts, strict=True):
                for timestep, _, _ in steps(stage, n, plan.grid):
                    for row, condition in enumerate(self.conditions):
                        if (row, float(timestep)) not in self._vectors:
                            found = self.sessions.run(
                                self.about["conditioning"],
                                {
                                    "sinusoid": layout.sinusoid(timestep, self.about["timestep_channels"]),
                                    "pooled": condition.pooled,
                                },
                            )
                            self._vectors[row, float(timestep)] = found

    def velocity(
        self, stage: Mapping[str, Any], z: np.ndarray, timestep: float, past: list[np.ndarray], unit: int, scale: float
    ) -> np.ndarray:
        """Velocity of ``z`` [h, w, C], guided by ``scale`` where there are two conditions."""
        patch, (height, width) = self.about["patch"], z.shape[:2]
        patches, found = to_patches([*past, z[None]], patch), []
        positions = self.sessions.bundle.table(stage["positions"])
        for row, condition in enumerate(self.conditions):
            times, real = layout.token_times(stage, unit, condition.mask, patch)
            rows = self.sessions.run(
                stage["graph"],
                {
                    "patches": patches,
                    "positions": positions,
                    "text": condition.text,
                    **layout.rotary(times, self.about["head_channels"], self.about["theta"]),
                    **layout.biases(
                        stage["groups"], times, real, causal=self.about["causal"], masked=self.about["masked"]
                    ),
                    **self._vectors[row, float(timestep)],
                },
            )["velocity"]
            found.append(from_patches(rows, height, width, patch))
        if len(found) == 1:
            return found[0]
        negative, positive = found
        return negative + np.float32(scale) * (positive - negative)


def sample(
    denoiser: Denoiser,
    plan: Plan,
    noise: Noise,
    units: int,
    first: np.ndarray | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> np.ndarray:
    """Normalised latents [U, h, w, C]; ``first`` [h, w, C] is a given unit 0."""
    stages = denoiser.stages
    count = len(stages)
    finished: list[list[np.ndarray]] = [[] for _ in stages]
    out = []
    for unit in range(units):
        if unit == 0 and first is not None:
            z = first
        else:
            z, (counts, scale) = lowest_noise(noise.initial[unit], count), plan.of(unit)
            for index, (stage, n) in enumerate(zip(stages, counts, strict=True)):
                if index:
                    z = jump(z, noise.block(unit, index), stage)
                past = layout.history(stage, finished, unit, z.shape[-1])
                for step, (timestep, s, s_next) in enumerate(steps(stage, n, plan.grid)):
                    # an unguided unit of a guided plan: its own velocity alone
                    v = denoiser.velocity(stage, z, timestep, past, unit, scale or 1.0)
                    top, lowest = index + 1 == count, index == 0
                    if plan.renew and (s_next > 0 or not top):
                        z = renew(z, v, noise.fresh(unit, index, step), s, s_next, stage, lowest=lowest, top=top)
                    else:
                        z = euler(z, v, s, s_next)
        for kept, frame in zip(finished, levels(z, count), strict=True):
            kept.append(frame)
        out.append(z)
        progress(unit + 1, units)
    return np.stack(out)
