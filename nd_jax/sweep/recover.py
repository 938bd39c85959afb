"""Candidates of a sweep trained alike: what is left of their differences when the denoiser has recovered."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from nd_jax.checked_files import read_json
from nd_jax.errors import UserError
from nd_jax.generate import Generator
from nd_jax.models.system import DENOISER
from nd_jax.outputs import new_file
from nd_jax.pyramid.layout import Envelope, layout_arrays
from nd_jax.pyramid.sampler import CountingJit, twice
from nd_jax.recipes.preset import FlowRun, Preset, RecoveryRun
from nd_jax.recovery_workflow import recover
from nd_jax.sweep.calibration import Calibration
from nd_jax.sweep.table import SweepTable
from nd_jax.sweep.units import Drop
from nd_jax.system import VideoSystem
from nd_jax.workflow import train_flow, without_blocks


@dataclasses.dataclass(frozen=True)
class Recovered:
    """A candidate after training. ``errors``: of its velocity against the whole denoiser's on held-out prompts, before
    and after; ``accuracy``: judged, by video, or None."""

    before: Float[np.ndarray, "levels videos"]
    after: Float[np.ndarray, "levels videos"]
    accuracy: Float[np.ndarray, " videos"] | None = None


class Distance:
    """Squared velocity error of other denoisers on a teacher's recorded calls; one program for each stage and size."""

    def __init__(self, system: VideoSystem, envelopes: Sequence[Envelope], calibration: Calibration):
        self.calibration = calibration
        denoiser, guided = system.definitions[DENOISER], calibration.guided
        self._programs = [CountingJit(partial(_error, denoiser, e, guided=guided)) for e in envelopes]
        self._teacher = system.on_device[DENOISER]

    def __call__(self, params: Any) -> Float[np.ndarray, "levels videos"]:
        """By noise level and video: means over both branches of guidance and the latent frames."""
        calibration = self.calibration
        levels, batches = calibration.levels, len(calibration.conditions)
        videos = calibration.prompts * calibration.samples // batches
        sums, counts = np.zeros((len(levels), batches, videos)), np.zeros((len(levels), batches, 1))
        params = jax.tree.map(jnp.asarray, params)
        for call in calibration.calls:
            conditions, level = calibration.conditions[call.batch], levels.index((call.stage, call.timestep))
            sums[level, call.batch] += self._programs[call.stage](self._teacher, params, conditions, call.inputs)
            counts[level, call.batch] += 1
        return (sums / counts).reshape(len(levels), -1)


def _error(denoiser, envelope, teacher, student, conditions, inputs, *, guided) -> Float[jax.Array, " b"]:
    z, timestep, history, unit = inputs
    if guided:
        z, timestep, history = twice(z), twice(timestep), tuple(map(twice, history))
    layout = layout_arrays(envelope, unit, conditions.mask)
    arguments = [(*history, z)], conditions.text, conditions.pooled, timestep, [layout]
    one, other = (denoiser(params, *arguments)[0].astype(jnp.float32) for params in (student, teacher))
    return jnp.mean(jnp.square(one - other).reshape(2 if guided else 1, -1, one[0].size), axis=(0, 2))


def spread_choice(table: SweepTable, chosen: Mapping[str, Drop], count: int, most: int) -> list[Drop]:
    """Which candidates to train: the best that drop ``count`` blocks, what other scores chose, and the others evenly
    spread over the ranks, so that a correlation has something to tell apart.

    Raises UserError when fewer than three are known.
    """
    right = sorted((d for d in table.rows if len(d) == count), key=lambda d: (table.errors[d], d))
    if len(right) < 3:
        raise UserError(
            f"correlate: {len(right)} candidates that drop {count} blocks; expected at least 3 in the sweep"
        )
    first = list(dict.fromkeys([right[0], *(drop for drop in chosen.values() if drop in table.rows)]))[:most]
    rest = [drop for drop in right if drop not in first]
    places = np.unique(np.linspace(0, len(rest) - 1, min(len(rest), most - len(first))).round().astype(int))
    return first + [rest[place] for place in places] if rest and most > len(first) else first


def recovered_all(
    teacher: VideoSystem,
    drops: Sequence[Drop],
    out: Path,
    settings: Mapping[str, Any],
    train: Callable[[VideoSystem, Path], VideoSystem | None],
    distance: Distance,
    judged: Callable[[VideoSystem], Float[np.ndarray, " videos"]] | None = None,
    *,
    keep: bool = False,
    told: Callable[[str], None] = lambda line: None,
) -> dict[Drop, Recovered]:
    """Every candidate cut out of the teacher, trained by ``train`` in a folder of its own under ``out/runs``, and
    measured. ``out/recovered.json`` holds those that are done; run again, it goes on. A training that was interrupted
    ends it. Runs are removed once they are measured, unless ``keep``.

    Raises UserError for a file of other settings.
    """
    path = out / "recovered.json"
    found = _load(path, settings) if path.exists() else {}
    for place, drop in enumerate(drops):
        if drop in found:
            continue
        name = "-".join(map(str, drop))
        told(f"candidate {place + 1} of {len(drops)}: without {name.replace('-', ' ')}")
        start = without_blocks(teacher, drop)[0]
        before, run = distance(start.params[DENOISER]), out / "runs" / name
        trained = train(start, run)
        if trained is None:
            break
        accuracy = None if judged is None else judged(trained)
        found[drop] = Recovered(before, distance(trained.params[DENOISER]), accuracy)
        _save(path, settings, found)
        if not keep:
            shutil.rmtree(run)
    return found


def _save(path: Path, settings: Mapping[str, Any], found: Mapping[Drop, Recovered]) -> None:
    rows = [
        {
            "dropped": list(drop),
            "before": each.before.tolist(),
            "after": each.after.tolist(),
            "accuracy": None if each.accuracy is None else each.accuracy.tolist(),
        }
        for drop, each in found.items()
    ]
    with new_file(path, overwrite=True) as part:
        part.write_text(json.dumps({"settings": dict(settings), "candidates": rows}, indent=1) + "\n")


def _load(path: Path, settings: Mapping[str, Any]) -> dict[Drop, Recovered]:
    content = read_json(path, what="recovered candidates")
    if content.get("settings") != json.loads(json.dumps(dict(settings))):
        raise UserError(f"correlate: {path} was measured with other settings; name another --out")
    try:
        return {
            tuple(map(int, row["dropped"])): Recovered(
                np.array(row["before"], np.float64),
                np.array(row["after"], np.float64),
                None if row["accuracy"] is None else np.array(row["accuracy"], np.float64),
            )
            for row in content["candidates"]
        }
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"correlate: {path} is damaged ({error}); remove it to measure again") from None


def trainer(
    preset: Preset,
    name: str,
    teacher: VideoSystem,
    *,
    steps: int,
    compiled: Path,
    latents: Sequence[Path],
    codec_folder: Path,
    tokenizers: Mapping[str, Path],
    quiet: bool = True,
) -> Callable[[VideoSystem, Path], VideoSystem | None]:
    """For ``recovered_all``: a preset's run of flow matching or of recovery in two stages, cut to ``steps`` updates of
    each stage, with schedules in proportion. Programs are kept in ``compiled``: candidates of one size compile once.

    Raises UserError for a run of another kind.
    """
    run = preset.run(name)
    if not isinstance(run, FlowRun | RecoveryRun):
        raise UserError(f"correlate: run {name!r} of {preset.name} is no recovery; expected one such as recovery")

    def shorter(run: FlowRun) -> FlowRun:
        loop = dataclasses.replace(run.loop, steps=steps, save_every=0, compile_cache=str(compiled))
        # A learning rate that is still high where training is cut off tells little of what longer training gives.
        optim, share = run.recipe.optim, min(1.0, steps / run.loop.steps)
        spans = {name: max(1, round(share * getattr(optim, name))) for name in ("warmup_steps", "decay_steps")}
        recipe = dataclasses.replace(run.recipe, optim=dataclasses.replace(optim, **spans))
        return dataclasses.replace(run, loop=loop, recipe=recipe)

    run = shorter(run)
    given = {"latents": latents, "codec_folder": codec_folder, "tokenizers": dict(tokenizers), "quiet": quiet}

    def train(start: VideoSystem, out: Path) -> VideoSystem | None:
        if isinstance(run, RecoveryRun):
            both = dataclasses.replace(run, stage1=shorter(run.stage1))
            return recover(preset, name, both, out, start=start, teacher=teacher, **given)[1]
        return train_flow(preset, name, run, out, start=start, **given)[1]

    return train


def judge_with(generator: Generator, captions: Sequence[str], labels: Any, world: Any, *, seed: int, batch: int):
    """For ``recovered_all``: judged accuracy of every video of a recovered system."""
    from nd_jax.data import judge
    from nd_jax.generate import generate

    def judged(system: VideoSystem) -> Float[np.ndarray, " videos"]:
        own = Generator(system, height=generator.height, width=generator.width, frames=system.video.frames)
        videos = generate(system, captions, seed=seed, batch=batch, generator=own)
        return (judge.read_labels(videos, world) == labels).mean(axis=(1, 2))

    return judged
