"""Step distillation: a few-step student of a many-step system, by any of the recipes, folders to folder."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from nd_jax.data import prompts as prompt_data
from nd_jax.data.caption_source import CaptionSource
from nd_jax.data.prompt_source import PromptSource
from nd_jax.data.shard_sources import open_latents
from nd_jax.data.world import world_named
from nd_jax.datasets import tfds_quiet
from nd_jax.errors import UserError
from nd_jax.models.system import DENOISER, Conditions
from nd_jax.pyramid.sampler import SamplePlan
from nd_jax.recipes.adversarial import AdversarialRecipe
from nd_jax.recipes.dmd import DmdRecipe
from nd_jax.recipes.few_step import FewStepRecipe
from nd_jax.recipes.mean_flow import MeanFlowRecipe
from nd_jax.recipes.preset import AdversarialRun, DmdRun, MeanFlowRun, Preset, ProgressiveRun, StepRun
from nd_jax.recipes.progressive import ProgressiveRecipe
from nd_jax.recovery_workflow import different_parts
from nd_jax.system import VideoSystem
from nd_jax.training.loop import Outcome
from nd_jax.workflow import train_flow

RECIPES: dict[type, type[FewStepRecipe]] = {
    DmdRun: DmdRecipe,
    ProgressiveRun: ProgressiveRecipe,
    MeanFlowRun: MeanFlowRecipe,
    AdversarialRun: AdversarialRecipe,
}
CAPTIONS = 1 << 16
"""Of a world, for students that train on prompts alone."""


def distil_steps(
    preset: Preset,
    name: str,
    run: StepRun,
    out: str | Path,
    *,
    start: VideoSystem,
    teacher: VideoSystem | None = None,
    latents: str | Path | Sequence[str | Path] = (),
    prompts: Sequence[str | Path] = (),
    codec_folder: str | Path,
    tokenizers: Mapping[str, Path],
    quiet: bool = False,
) -> tuple[Outcome, VideoSystem | None]:
    """Distil ``start`` into a student that samples in ``run.recipe.steps`` without guidance.

    The teacher is ``start`` itself, or another system with the same text encoders, such as the one that ``start`` was
    pruned from. A recipe without videos reads ``prompts``, folders of ``nd-jax data prompts``, or else captions of the
    preset's world. Returns how it ended and, if it was not interrupted, the student, whose plan is its schedule.
    Raises UserError for a teacher that reads text differently or differs in more than its depth, and for latents or
    prompts that the recipe has no use for.
    """
    if teacher is not None:
        parts = different_parts(start, teacher)
        if parts:
            raise UserError(
                f"{teacher.folder or 'step distillation'}: {', '.join(parts)} of the teacher is not the student's; "
                "expected the same text encoders and a denoiser that differs in depth alone"
            )
    videos = run.recipe.videos
    if bool(latents) != videos or (prompts and videos):
        raise UserError(
            f"train {preset.name} {name}: expected --latents FOLDER alone, or with --recipe.no-videos none and, "
            "if any, --prompts FOLDER"
        )
    asked = None if videos else prompts_to_train_on(preset, prompts, run.loop.seed)
    folders = [latents] if isinstance(latents, str | Path) else latents
    captions = itertools.chain.from_iterable(open_latents(folder).captions for folder in folders)
    length = preset.video.text_length
    if videos:
        length = min(length, longest(start, itertools.chain.from_iterable(captions)))
    if run.recipe.text == "stored" and videos:
        source = open_latents(folders[0], text=length)
        found = source.features(source.empty, 0)
        negative = Conditions(*(found[name][None] for name in ("text", "t5_mask", "pooled")))
    else:
        negative, _ = start.tokens([""])
        negative = negative._replace(t5_ids=negative.t5_ids[:, :length], t5_mask=negative.t5_mask[:, :length])
    outcome, student = train_flow(
        dataclasses.replace(preset, video=dataclasses.replace(preset.video, text_length=length)),
        name,
        run,
        out,
        latents=latents,
        prompts=asked,
        codec_folder=codec_folder,
        tokenizers=dict(tokenizers),
        start=start,
        make=partial(RECIPES[type(run)], negative=negative),
        also_given=() if teacher is None else (teacher.params[DENOISER],),
        quiet=quiet,
    )
    if student is None:
        return outcome, None
    plan = SamplePlan(run.recipe.steps, run.recipe.steps, grid="plain", renew=run.recipe.renew)
    return outcome, dataclasses.replace(student, sampling=plan, video=start.video, tokenizers=start.tokenizers)


def longest(system: VideoSystem, captions: Iterable[str]) -> int:
    """T5 tokens of the longest caption, at most what the system reads. More would be padding: the networks answer the
    same and take longer."""
    most, most_of_all, captions = 1, system.video.text_length, iter(captions)
    while most < most_of_all and (some := list(itertools.islice(captions, 1024))):
        most = max(most, int(np.sum(system.tokenizers["t5"](some).mask, axis=1).max()))
    return most


def prompts_to_train_on(preset: Preset, folders: Sequence[str | Path], seed: int) -> PromptSource:
    """Those of ``folders``, else captions of the preset's world. Raises UserError where there is neither."""
    if folders:
        with tfds_quiet():
            return PromptSource([prompt_data.open_split(folder, "train") for folder in folders])
    if preset.world is None:
        raise UserError(f"preset {preset.name} has no captions of its own; expected --prompts FOLDER ...")
    return PromptSource([CaptionSource([world_named(preset.world)], CAPTIONS, seed=seed)])
