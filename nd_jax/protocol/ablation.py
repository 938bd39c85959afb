"""The ablation of step distillation, in the shape of the paper's table: what each way of taking few steps costs and
keeps of the guided many-step teacher (Neodragon, arXiv 2511.06055)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nd_jax.errors import UserError
from nd_jax.generate import needs_negative
from nd_jax.models.functional import count_parameters
from nd_jax.models.system import CODEC
from nd_jax.protocol.definition import FRAMES, SPLITS, Protocol, prompt_list
from nd_jax.protocol.figures import compare, system_figures, travel_against
from nd_jax.protocol.readings import ProtocolResult
from nd_jax.protocol.run import SystemVideos, Videos, clips_to_do, run_protocol
from nd_jax.protocol.units import HybridVideos, Recorded, UnitReadings, accuracy_by_unit, cpu_seconds, speed_by_unit
from nd_jax.pyramid.sampler import SamplePlan
from nd_jax.system import VideoSystem


@dataclass(frozen=True)
class Entry:
    """A row to be: a system as its plan samples it, after the first frames of ``first`` if there is one."""

    system: VideoSystem
    first: VideoSystem | None = None

    def calls(self) -> tuple[int, int]:
        """Denoiser calls for one video, and passes through the network: guidance takes two for a call."""
        plan, units = self.system.sampling, latent_frames(self.system)
        ours = (units - 1) * sum(plan.later_steps) + (0 if self.first else sum(plan.first_steps))
        given = sum(self.first.sampling.first_steps) if self.first else 0
        passes = ours * (2 if needs_negative(plan) else 1)
        return ours + given, passes + given * (2 if self.first and needs_negative(self.first.sampling) else 1)

    def about(self) -> dict[str, Any]:
        """JSON-ready facts that need no videos."""
        calls, passes = self.calls()
        return {
            "sampling": dataclasses.asdict(self.system.sampling),
            "first_frames": "given by the teacher" if self.first else "its own",
            "calls": calls,
            "passes": passes,
            "parameters": sum(count_parameters(params) for params in self.system.params.values()),
        }


def latent_frames(system: VideoSystem) -> int:
    """Of the videos that the protocol judges."""
    return 1 + (min(system.video.frames, FRAMES) - 1) // system.config.causal_video_vae.time_scale


def undistilled(teacher: VideoSystem, plan: SamplePlan) -> dict[str, Entry]:
    """The teacher, guided, at a student's calls on both step grids (which are one where every stage takes one step);
    and on the plain grid at a student's passes, without guidance."""
    few = dataclasses.replace(
        teacher.sampling, first_steps=plan.first_steps, later_steps=plan.later_steps, grid="plain", renew=False
    )
    alike = max(*plan.first_steps, *plan.later_steps) == 1
    plans = {f"the student's calls, {'either' if alike else 'plain'} grid": few}
    if not alike:
        plans["the student's calls, official grid"] = dataclasses.replace(few, grid="official")
    if needs_negative(teacher.sampling):
        plans["the student's passes, not guided"] = dataclasses.replace(few, first_guidance=1.0, later_guidance=1.0)
    return {f"teacher, {what}": Entry(dataclasses.replace(teacher, sampling=each)) for what, each in plans.items()}


@dataclass(frozen=True)
class Row:
    """What was measured of an ``Entry``."""

    entry: Entry
    result: ProtocolResult
    units: dict[str, UnitReadings]
    """By split, see ``Recorded.by_unit``."""
    cpu_seconds: float


def measure_row(
    entry: Entry,
    protocol: Protocol,
    splits: Sequence[str],
    *,
    batch: int = 16,
    videos: Videos | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Row:
    """Generate, read, and time. ``videos`` stands in for what the entry makes."""
    made = entry_videos(entry, batch) if videos is None else videos
    recorded = Recorded(made, entry.system.config.causal_video_vae.time_scale)
    result = run_protocol(
        entry.system, protocol, splits=splits, controls=(), batch=batch, videos=recorded, progress=progress
    )
    seeds = protocol.sampling_seeds
    units = {split: recorded.by_unit(prompt_list(protocol, split).captions, seeds) for split in splits}
    world = SPLITS[splits[0]].world
    timed = prompt_list(protocol, splits[0]).captions
    timed = timed if videos is not None else timed[:batch]
    return Row(entry, result, units, cpu_seconds(made, timed, world, seeds[0]))


def entry_videos(entry: Entry, batch: int) -> SystemVideos:
    """An entry's own videos."""
    if entry.first is None:
        return SystemVideos(entry.system, batch=batch)
    return HybridVideos(entry.system, entry.first, batch=batch)


def run_ablation(
    entries: Mapping[str, Entry],
    protocol: Protocol,
    splits: Sequence[str],
    *,
    batch: int = 16,
    progress: Callable[[str, int], Any] | None = None,
) -> dict[str, Row]:
    """Every row; the first entry is the teacher. ``progress(name, total)`` is a context that gives the callback of
    ``run_protocol``."""
    rows = {}
    for name, entry in entries.items():
        if progress is None:
            rows[name] = measure_row(entry, protocol, splits, batch=batch)
            continue
        with progress(name, clips_to_do(protocol, splits, ())) as told:
            rows[name] = measure_row(entry, protocol, splits, batch=batch, progress=told)
    return rows


def figures(rows: Mapping[str, Row], split: str) -> dict[str, dict[str, Any]]:
    """Every figure of one split's table by row; estimates where there are intervals."""
    baseline, *_ = rows.values()
    labels = prompt_list(baseline.result.protocol, split).labels
    resamples, found = baseline.result.protocol.resamples, {}
    for name, row in rows.items():
        measured = system_figures(row.result).splits[split]
        units, theirs = row.units[split], baseline.units[split]
        found[name] = {
            **row.entry.about(),
            "denoiser_parameters": row.result.about["denoiser_parameters"],
            "cpu_seconds": row.cpu_seconds,
            "accuracy": measured.accuracy["mean"],
            "accuracy_of_teacher": compare(row.result, baseline.result)[split].share["mean"],
            "motion_of_drawn": measured.travel_of_truth,
            "motion_of_teacher": travel_against(row.result, baseline.result, split),
            "accuracy_by_unit": accuracy_by_unit(units, labels, resamples=resamples),
            "accuracy_by_unit_of_teacher": accuracy_by_unit(units, labels, theirs, resamples=resamples),
            "speed_by_unit": speed_by_unit(units, labels, resamples=resamples),
            "speed_by_unit_of_teacher": speed_by_unit(units, labels, theirs, resamples=resamples),
        }
    return found


def check_latents(entries: Mapping[str, Entry]) -> None:
    """Raises UserError for given first frames in another latent space than their system's."""
    for name, entry in entries.items():
        if entry.first is not None and entry.first.stats != entry.system.stats:
            raise UserError(
                f"{name}: the latents of its codec ({CODEC}) are normalised otherwise than the teacher's; expected a "
                "decoder that was distilled from the teacher's codec"
            )
