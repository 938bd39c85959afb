"""What each kind of run needs per step: useful operations, tokens, videos, and how much of its tokens is padding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nd_jax.models.system import SystemConfig
from nd_jax.planning.programs import Systems, text_teacher
from nd_jax.planning.useful import (
    NOTHING,
    Tokens,
    adapter_flops,
    clip_flops,
    denoiser_flops,
    padded_tokens,
    real_tokens,
    t5_flops,
)
from nd_jax.recipes.adversarial import AdversarialRecipe
from nd_jax.recipes.dmd import DmdRecipe
from nd_jax.recipes.few_step import FewStepRecipe
from nd_jax.recipes.flow_matching import FlowRecipe
from nd_jax.recipes.mean_flow import MeanFlowRecipe
from nd_jax.recipes.preset import Preset
from nd_jax.recipes.progressive import ProgressiveRecipe
from nd_jax.recipes.recovery import RecoveryRecipe
from nd_jax.recipes.text_distillation import TextDistillRecipe


@dataclass(frozen=True)
class Demand:
    """Of one step of the whole slice."""

    flops: float | None
    """Useful operations; None where no closed formula is known (convolutions)."""
    tokens: float
    """Unpadded tokens that the trained network reads."""
    videos: float
    image_share: float
    """Of the image tokens that are computed, those that are data."""
    text_share: float
    """Of the text tokens that are computed, those that are data."""
    flops_share: float | None
    """Of the operations of a forward pass of the denoiser as padded, those of real tokens, all text taken as real."""


def demand(preset: Preset, systems: Systems, recipe: Any, text_tokens: int | None = None) -> Demand:
    """Of one step of ``recipe``; prompts are taken to have ``text_tokens`` tokens (default: as many as fit)."""
    length = preset.video.text_length
    text = length if text_tokens is None else min(text_tokens, length)
    if isinstance(recipe, FlowRecipe):
        return denoiser_demand(systems, recipe, text)
    if isinstance(recipe, TextDistillRecipe):
        teacher, n = text_teacher(preset), recipe.config.batch
        run = preset.run("text")
        wide = teacher.diffusion_transformer
        useful = t5_flops(teacher.text_encoder_3, n, text)
        if wide.context_embedder:
            useful += 2 * wide.joint_attention_dim * wide.width * n * text
        student = t5_flops(run.encoder, n, text)
        useful += student * (1 if recipe.config.encoder == "frozen" else 3)
        useful += 3 * adapter_flops(run.adapter, n * text)
        return Demand(useful, n * text, 0, 1.0, text / length, None)
    clips = recipe.config.batch
    return Demand(None, 0, clips, 1.0, 1.0, None)


def layout_tokens(recipe: FlowRecipe, text: int | None) -> tuple[Tokens, Tokens]:
    """All tokens of one row of columns, and those that are data."""
    padded, real = NOTHING, NOTHING
    for envelope, units in zip(recipe.envelopes, recipe.column_units, strict=True):
        padded, real = padded + padded_tokens(envelope), real + real_tokens(envelope, text, units)
    return padded, real


def denoiser_demand(systems: Systems, recipe: FlowRecipe, text: int) -> Demand:
    """Of one step of flow matching or what builds on it, with ``text`` real tokens in a prompt."""
    config, columns = recipe.config, len(recipe.columns)
    rows = config.batch // columns
    padded, real = layout_tokens(recipe, text)
    all_text = layout_tokens(recipe, None)[1]
    own, whole = recipe.system.diffusion_transformer, systems.whole.diffusion_transformer

    def passes(network: Any, tokens: Tokens) -> float:
        return denoiser_flops(network, tokens.times(rows), rows * columns)

    student, teacher = passes(own, real), passes(whole, real)
    if isinstance(recipe, FewStepRecipe):
        useful = _distilling(recipe, student, teacher)
    elif isinstance(recipe, RecoveryRecipe):
        useful = 3 * student + teacher
    else:
        useful = 3 * student
    if config.text == "live":
        useful += _text(recipe.system, config.batch, text) * (3 if config.train_text else 1)
    return Demand(
        useful,
        rows * (real.image + real.text),
        config.batch,
        real.image / padded.image,
        real.text / max(padded.text, 1),
        passes(own, all_text) / passes(own, padded),
    )


def _distilling(recipe: FewStepRecipe, student: float, teacher: float) -> float:
    """One update of step distillation, from the operations of one pass of either network. Rollouts do not count."""
    config = recipe.config
    asked = teacher if config.first_guidance == config.later_guidance == 1 else 2 * teacher
    if isinstance(recipe, DmdRecipe):
        # Every update of the fake trains it, on answers of the student's own unless they are shared. Then the student's
        # training, with what the fake and the teacher say of its answer.
        fake = (3 if config.shared else 4) * student
        return config.fake_updates * fake + 3 * student + student + asked
    if isinstance(recipe, ProgressiveRecipe):
        return 3 * student + config.teacher_steps * asked  # of the first round; later ones are not guided
    if isinstance(recipe, MeanFlowRecipe):
        return 3 * student + asked + (1 if config.difference else 2) * student
    if isinstance(recipe, AdversarialRecipe):
        return 3 * student + 3 * teacher  # which reads data and answers, and takes gradients to the answers
    raise TypeError(type(recipe))


def _text(system: SystemConfig, prompts: int, text: int) -> float:
    total = t5_flops(system.text_encoder_3, prompts, text)
    if system.context_adapter is not None:
        total += adapter_flops(system.context_adapter, prompts * text)
    for tower in (system.text_encoder, system.text_encoder_2):
        total += clip_flops(tower, prompts, min(text, tower.max_position_embeddings))
    return total
