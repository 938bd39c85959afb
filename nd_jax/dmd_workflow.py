"""Step distillation: a few-step student of a many-step system by pyramidal distribution matching, folders to folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from nd_jax.errors import UserError
from nd_jax.models.system import DENOISER
from nd_jax.pyramid.sampler import SamplePlan
from nd_jax.recipes.dmd import DmdRecipe
from nd_jax.recipes.preset import DmdRun, Preset
from nd_jax.recovery_workflow import different_parts
from nd_jax.system import VideoSystem
from nd_jax.training.loop import Outcome
from nd_jax.workflow import train_flow


def distil_steps(
    preset: Preset,
    name: str,
    run: DmdRun,
    out: str | Path,
    *,
    start: VideoSystem,
    teacher: VideoSystem | None = None,
    latents: str | Path | Sequence[str | Path],
    codec_folder: str | Path,
    tokenizers: Mapping[str, Path],
    quiet: bool = False,
) -> tuple[Outcome, VideoSystem | None]:
    """Distil ``start`` into a student that samples in ``run.recipe.steps`` without guidance.

    The teacher is ``start`` itself, or another system with the same text encoders, such as the one that ``start`` was
    pruned from. Returns how it ended and, if it was not interrupted, the student, whose sampling plan is its schedule.
    Raises UserError for a teacher that reads text differently or differs in more than its depth.
    """
    if teacher is not None:
        parts = different_parts(start, teacher)
        if parts:
            raise UserError(
                f"{teacher.folder or 'step distillation'}: {', '.join(parts)} of the teacher is not the student's; "
                "expected the same text encoders and a denoiser that differs in depth alone"
            )
    negative, _ = start.tokens([""])
    outcome, student = train_flow(
        preset,
        name,
        run,
        out,
        latents=latents,
        codec_folder=codec_folder,
        tokenizers=dict(tokenizers),
        start=start,
        make=partial(DmdRecipe, negative=negative),
        also_given=() if teacher is None else (teacher.params[DENOISER],),
        quiet=quiet,
    )
    if student is None:
        return outcome, None
    plan = SamplePlan(run.recipe.steps, run.recipe.steps, grid="plain", renew=run.recipe.renew)
    return outcome, dataclasses.replace(student, sampling=plan)
