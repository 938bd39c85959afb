"""The fixed inputs on which all candidates are compared: what the whole denoiser meets while it samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from nd_jax.errors import UserError
from nd_jax.generate import Generator, needs_negative, with_negative
from nd_jax.influence import sampled_batches
from nd_jax.models.system import DENOISER
from nd_jax.pyramid.sampler import SamplePlan, sample


@dataclass(frozen=True)
class Call:
    """One denoiser call. ``inputs`` are (z, timestep, history, unit) on the host, without the rows for guidance."""

    batch: int
    stage: int
    timestep: float
    inputs: tuple[Any, ...]


@dataclass(frozen=True)
class Calibration:
    """Calls of some batches of videos; ``conditions`` one for each batch, negative rows first where there are any."""

    conditions: tuple[Any, ...]
    calls: tuple[Call, ...]
    prompts: int
    samples: int
    guided: bool

    @property
    def levels(self) -> list[tuple[int, float]]:
        """(stage, timestep) of every noise level that was met: lowest stage first, then noisiest first."""
        return sorted({(call.stage, call.timestep) for call in self.calls}, key=lambda level: (level[0], -level[1]))


def record(
    generator: Generator,
    prompts: Sequence[str],
    *,
    seed: int = 0,
    samples: int = 1,
    batch: int = 8,
    plan: SamplePlan | None = None,
    steps: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Calibration:
    """Calls of ``samples`` videos of every prompt, sampled by the whole denoiser.

    Args:
        plan: steps and guidance; default: what the system's folder asks for.
        steps: keep this many steps of every unit and stage, evenly spread; default: all.

    Raises:
        UserError: unless prompts x samples is a multiple of ``batch``: all batches share one program.
    """
    system = generator.system
    plan, rows = system.sampling if plan is None else plan, len(prompts) * samples
    batch = min(batch, max(rows, 1))
    if batch > 0 and rows % batch:
        raise UserError(f"sweep: {rows} videos in batches of {batch}; expected a multiple of the batch")
    calls: list[Call] = []
    batches: list[Any] = []
    for conditions, negative, noise in sampled_batches(
        generator, prompts, plan, seed=seed, samples=samples, batch=batch, name="calibration"
    ):
        asked, given = with_negative(plan, conditions, negative)
        denoisers, params = generator.stage_programs(guided=needs_negative(plan)), system.on_device[DENOISER]
        met: list[Call] = []

        def velocity(stage: int, given=given, denoisers=denoisers, params=params, met=met):
            def run(z, timestep, history, unit, scale):
                met.append(Call(len(batches), stage, float(timestep[0]), _on_host((z, timestep, history, unit))))
                return denoisers[stage](params, given, z, timestep, history, unit, scale, kept=None)[0]

            return run

        draws = noise.initial, noise.block
        sample(velocity, generator.envelopes, system.schedule, asked, *draws, fresh_noise=noise.fresh)
        calls += met if steps is None else _spread(met, steps)
        batches.append(_on_host(given))
        progress(len(batches) * batch, rows)
    return Calibration(tuple(batches), tuple(calls), len(prompts), samples, needs_negative(plan))


def _on_host(tree: Any) -> Any:
    return jax.tree.map(np.asarray, tree)


def _spread(calls: Sequence[Call], steps: int) -> list[Call]:
    """``steps`` of the calls of every unit and stage, evenly spread over its steps."""
    if steps < 1:
        raise UserError(f"sweep: {steps} steps of every stage, expected at least one")
    kept: list[Call] = []
    groups: dict[tuple[int, int], list[Call]] = {}
    for call in calls:
        groups.setdefault((int(call.inputs[3]), call.stage), []).append(call)
    for group in groups.values():
        places = np.unique(np.linspace(0, len(group) - 1, min(steps, len(group))).round().astype(int))
        kept += [group[place] for place in places]
    return kept
