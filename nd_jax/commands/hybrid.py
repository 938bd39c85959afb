"""``nd-jax generate --mode hybrid`` with a first frame of the folder's own."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nd_jax.commands.console import say, warn
from nd_jax.errors import UserError
from nd_jax.outputs import check_new_file

SHEET_COLUMNS = 6


def generate_hybrid(
    checkpoint: Path,
    out: Path,
    prompts: Sequence[str],
    *,
    seed: int,
    video: Mapping[str, int | None],
    plan: Mapping[str, Any],
    super_resolution: Path | None,
    safety_checker: Path | None,
    safety_check: bool,
    dtype: str | None,
    dtypes: Sequence[str],
    compute: str,
    overwrite: bool,
) -> None:
    """Run the whole pipeline; prints the files, and on standard error time and peak memory of every part.

    ``video`` and ``plan`` are changes to what the folder asks for, ``None`` for none. Raises UserError when a video was
    withheld, after all others are written.
    """
    import jax.numpy as jnp

    from nd_jax.converters.folders import load_folder
    from nd_jax.data.video_out import contact_sheet, file_name
    from nd_jax.first_frame import UNET
    from nd_jax.hybrid import CHECKER, UPSCALER, HybridPipeline
    from nd_jax.meter import Meter
    from nd_jax.models.system import ADAPTER, DENOISER
    from nd_jax.parts import FolderParts, parse_dtypes
    from nd_jax.system import folder_defaults
    from nd_jax.weights import shipped_folder

    files = [out / f"{file_name(text, index=n)}.mp4" for n, text in enumerate(prompts)]
    sheet = out / "contact_sheet.png"
    for path in (*files, sheet):
        check_new_file(path, overwrite=overwrite)
    folder = load_folder(shipped_folder(checkpoint))
    if UNET not in folder.components:
        raise UserError(
            f"generate: hybrid generation starts from a first frame; expected --image FILE, or {UNET} in {checkpoint}"
        )
    elsewhere = {UPSCALER: super_resolution, CHECKER: safety_checker}
    elsewhere = {name: path for name, path in elsewhere.items() if path is not None}
    parts = FolderParts(folder, parse_dtypes(dtype, dtypes), elsewhere)
    usual, sampling, schedule = folder_defaults(folder, "hybrid")
    changes = {name: value for name, value in video.items() if value is not None}
    pipeline = HybridPipeline(
        parts,
        dataclasses.replace(usual, **changes),
        denoiser=folder.name_of(DENOISER, "hybrid"),
        adapter=folder.name_of(ADAPTER, "hybrid"),
        plan=_changed(sampling, plan, schedule.stages),
        schedule=schedule,
        compute=jnp.dtype(compute),
        safety=safety_check,
        meter=Meter(tell=lambda part: say(str(part))),
    )
    if not parts.has(UPSCALER):
        warn(f"{checkpoint} has no {UPSCALER}: videos keep their size; name a folder with --super-resolution")
    if not pipeline.checks:
        why = "--no-safety-check" if not safety_check else f"{checkpoint} has no {CHECKER}"
        warn(f"{why}: pictures are not checked")
    strips, lines = [], []
    for prompt, made in zip(prompts, pipeline.generate(prompts, files, seed=seed, overwrite=overwrite), strict=True):
        if made.file is not None:
            print(made.file, flush=True)
            shown = np.linspace(0, len(made.frames) - 1, min(SHEET_COLUMNS, len(made.frames))).round().astype(int)
            strips.append(np.stack([made.frames[n] for n in shown]))
            lines.append(prompt)
    if strips:
        print(contact_sheet(sheet, strips, captions=lines, columns=SHEET_COLUMNS, overwrite=overwrite))
    if withheld := len(prompts) - len(strips):
        raise UserError(
            f"generate: the safety checker objected to {withheld} of {len(prompts)} videos, which were not written; "
            "word the prompts differently, or use --no-safety-check"
        )


def _changed(plan: Any, changes: Mapping[str, Any], stages: int) -> Any:
    """The folder's plan with what the command line changes; guidance is off."""
    from nd_jax.commands.generate import changed_plan

    return changed_plan(plan, changes["steps"], changes["first_steps"], 0.0, 0.0, changes["grid"], stages)
