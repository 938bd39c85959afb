"""Recovery after pruning, both stages in one go: flow matching in ``out/stage1``, feature matching in ``out/stage2``.

Each stage is a run of its own with checkpoints of its own; run again, the chain goes on in the stage that was
interrupted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import jax
import numpy as np

from nd_jax.errors import UserError
from nd_jax.models.mmdit import definition
from nd_jax.models.mmdit_config import NARROWED
from nd_jax.models.system import DENOISER, TEXT_PARTS
from nd_jax.recipes.preset import Preset, RecoveryRun
from nd_jax.recipes.recovery import RecoveryRecipe
from nd_jax.system import VideoSystem, save_system
from nd_jax.training.cluster import once
from nd_jax.training.loop import Outcome
from nd_jax.workflow import train_flow


def recover(
    preset: Preset,
    name: str,
    run: RecoveryRun,
    out: str | Path,
    *,
    start: VideoSystem,
    teacher: VideoSystem,
    latents: str | Path | Sequence[str | Path],
    codec_folder: str | Path,
    tokenizers: Mapping[str, Path],
    alone: bool = False,
    quiet: bool = False,
) -> tuple[Outcome, VideoSystem | None]:
    """Train ``start``, which was cut out of ``teacher``, in both stages, or with ``alone`` in the second one only.

    Returns how it ended and, if nothing was interrupted, the recovered system. ``out/stage1/system`` is the system
    between the stages. Raises UserError for systems that do not belong together.
    """
    out = Path(out)
    check_pair(start, teacher)
    options = {"latents": latents, "codec_folder": codec_folder, "tokenizers": dict(tokenizers), "quiet": quiet}
    if not alone:
        outcome, recovered = train_flow(preset, f"{name}/stage1", run.stage1, out / "stage1", start=start, **options)
        if recovered is None:
            return outcome, None
        folder = out / "stage1" / "system"
        once(lambda: save_system(folder, recovered, tokenizers, overwrite=True), "writing the first stage's system")
        start = recovered
    make = partial(RecoveryRecipe, kept=start.kept_blocks)
    given = (teacher.params[DENOISER],)
    return train_flow(preset, name, run, out / "stage2", start=start, make=make, also_given=given, **options)


def check_pair(student: VideoSystem, teacher: VideoSystem) -> None:
    """Raises UserError unless the student says which of the teacher's blocks it has and reads text alike."""
    if student.kept_blocks is None:
        raise UserError(
            f"{student.folder or 'recovery'} does not say which blocks it kept (pruning.json is missing); expected a "
            "folder of nd-jax prune apply, or of a recovery that began with one"
        )
    depth = teacher.config.diffusion_transformer.num_layers
    if depth != student.kept_blocks[-1] + 1:
        raise UserError(
            f"{teacher.folder or 'recovery'}: a teacher of {depth} blocks, the student was cut out of one of "
            f"{student.kept_blocks[-1] + 1}; expected the system that was pruned"
        )
    parts = different_parts(student, teacher)
    if parts:
        raise UserError(
            f"{student.folder or 'recovery'}: {', '.join(parts)} is not the teacher's; expected the same text encoders "
            "and, but for the removed blocks, the same denoiser"
        )


def different_parts(student: VideoSystem, teacher: VideoSystem) -> list[str]:
    """Text encoders that differ in settings or numbers, and the denoiser if more than its depth and the width of its
    blocks differs in shape."""
    depth = student.config.diffusion_transformer.num_layers
    own = student.config.diffusion_transformer
    narrowed = {name: getattr(own, name) for name in NARROWED}
    like = dataclasses.replace(teacher.config.diffusion_transformer, num_layers=depth, **narrowed)
    parts = [part for part in TEXT_PARTS if getattr(teacher.config, part) != getattr(student.config, part)]
    parts += [DENOISER] if like != own else []
    return parts or [part for part in TEXT_PARTS if not _same(student.params.get(part), teacher.params.get(part))]


def _same(one: object, two: object) -> bool:
    leaves = jax.tree.leaves(one), jax.tree.leaves(two)
    return len(leaves[0]) == len(leaves[1]) and all(np.array_equal(a, b) for a, b in zip(*leaves, strict=True))


def with_fresh_denoiser(system: VideoSystem, seed: int = 0) -> VideoSystem:
    """The system with newly drawn denoiser weights: a network of this size trained from scratch, as a baseline."""
    network = definition(system.config.diffusion_transformer)
    params = jax.device_get(jax.jit(network.init)(jax.random.key(seed)))
    return dataclasses.replace(system, params={**system.params, DENOISER: params})
