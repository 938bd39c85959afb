"""``nd-jax generate``: prompts to video files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from nd_jax.commands.console import check_at_least, progress_bar, warn
from nd_jax.errors import UserError
from nd_jax.outputs import check_new_file
from nd_jax.prompt_suffix import with_suffix
from nd_jax.weights import SHIPPED

Mode = Literal["monolithic", "hybrid"]
SHEET_COLUMNS = 6
PROMPT_LIMIT = 1 << 20
"""Bytes of a prompt file."""


def generate(
    checkpoint: Path = Path(SHIPPED),
    out: Path = Path("videos"),
    prompt: tuple[str, ...] = (),
    prompts: Path | None = None,
    seed: int = 0,
    mode: Mode | None = None,
    image: Path | None = None,
    first_frames: Path | None = None,
    negative_prompt: str = "",
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
    steps: tuple[int, ...] | None = None,
    first_steps: tuple[int, ...] | None = None,
    guidance: float | None = None,
    first_guidance: float | None = None,
    grid: Literal["official", "plain"] | None = None,
    renew: Literal["yes", "no"] | None = None,
    batch: int = 8,
    suffix: str = "",
    super_resolution: Path | None = None,
    safety_checker: Path | None = None,
    safety_check: bool = True,
    dtype: Literal["fp32", "bf16", "fp16"] | None = None,
    dtypes: tuple[str, ...] = (),
    compute: Literal["float32", "bfloat16"] = "float32",
    overwrite: bool = False,
) -> None:
    """Videos from prompts, with any official-layout checkpoint folder. Writes mp4 files and a contact sheet.

    With --mode hybrid and no --image the folder's own first-frame networks (ssd_1b_*) make the first frame, and one
    network at a time is in memory; the options from --super-resolution to --compute are for that.

    Args:
        checkpoint: official-layout folder, or shapes_base, the small system that comes with the package.
        out: folder for the videos.
        prompt: one or more prompts; an empty one means unconditional.
        prompts: text file with one prompt per line, instead.
        seed: of the noise; a prompt's place in the list and the seed fix its video.
        mode: which denoiser, where the folder has both.
        image: first frame (hybrid generation) instead of one that is made; any size or mode.
        first_frames: system whose own first frames are continued, such as a student's many-step teacher.
        negative_prompt: what guidance steers away from.
        height: pixels; default: what the folder is meant for.
        width: pixels.
        frames: 1 + 8k.
        steps: Euler steps per stage, lowest resolution first.
        first_steps: the same for the first latent frame; default: as ``steps``.
        guidance: v_uncond + w (v_cond - v_uncond); 0 or 1: none.
        first_guidance: the same for the first latent frame; default: as ``guidance``.
        grid: step grid, "official" or "plain" (even).
        renew: whether every step ends with fresh noise on the clean prediction, for few-step students.
        batch: prompts at a time.
        suffix: appended to every prompt: any text, or one of the release's by name: quality, cinematic.
        super_resolution: component folder of a QuickSRNet; default: super_resolution in the folder, if it is there.
        safety_checker: component folder of a safety checker; default: safety_checker in the folder, if it is there.
        safety_check: look at the pictures where there is a safety checker, and write no video that it objects to.
        dtype: dtype of parameters in memory; default: as stored.
        dtypes: the same for single networks, such as ssd_1b_unet=bf16.
        compute: what networks compute in.
        overwrite: replace existing files.
    """
    check_at_least(0, seed=seed)
    check_at_least(1, batch=batch)
    lines = with_suffix(read_prompts(prompt, prompts), suffix)
    if image is not None and first_frames is not None:
        raise UserError("generate: expected either --image or --first-frames, found both")
    if mode == "hybrid" and image is None and first_frames is None:
        from nd_jax.commands.hybrid import generate_hybrid

        changes = {"height": height, "width": width, "frames": frames}
        plan = {"steps": steps, "first_steps": first_steps, "grid": grid}
        guided = {"guidance": guidance, "first_guidance": first_guidance}
        if named := [name for name, value in guided.items() if value not in (None, 0.0, 1.0)]:
            raise UserError(f"generate: hybrid generation has no guidance; leave --{named[0].replace('_', '-')} out")
        generate_hybrid(
            checkpoint,
            out,
            lines,
            seed=seed,
            video=changes,
            plan=plan,
            super_resolution=super_resolution,
            safety_checker=safety_checker,
            safety_check=safety_check,
            dtype=dtype,
            dtypes=dtypes,
            compute=compute,
            overwrite=overwrite,
        )
        return
    from nd_jax.data.clips import read_image
    from nd_jax.data.video_out import contact_sheet, file_name, write_video
    from nd_jax.generate import Generator, generate_batches
    from nd_jax.system import load_system

    files = [out / f"{file_name(text, index=n)}.mp4" for n, text in enumerate(lines)]
    sheet = out / "contact_sheet.png"
    for path in (*files, sheet):
        check_new_file(path, overwrite=overwrite)
    if image is not None and not image.is_file():
        raise UserError(f"image: {image} does not exist or is not a file")
    system = load_system(checkpoint, mode=mode)
    if system.mode == "hybrid" and image is None and first_frames is None:
        warn(f"{checkpoint} is made to continue a given first frame; expect more with --image FILE")
    video = system.video
    generator = Generator(
        system,
        height=video.height if height is None else height,
        width=video.width if width is None else width,
        frames=video.frames if frames is None else frames,
    )
    plan = changed_plan(
        system.sampling, steps, first_steps, guidance, first_guidance, grid, system.schedule.stages, renew
    )
    first = None
    if image is not None:
        first = np.repeat(read_image(image, size=(generator.height, generator.width))[None], len(lines), axis=0)
    if first_frames is not None:
        from nd_jax.teacher_frames import teacher_frames

        first = teacher_frames(
            load_system(first_frames),
            lines,
            height=generator.height,
            width=generator.width,
            seed=seed,
            batch=batch,
            negative_prompt=negative_prompt,
        )
    strips = []
    with progress_bar("videos", len(lines)) as progress:
        for made in generate_batches(
            system,
            lines,
            seed=seed,
            plan=plan,
            negative_prompt=negative_prompt,
            first_frames=first,
            batch=batch,
            generator=generator,
            warn=warn,
        ):
            for clip in made:
                print(write_video(files[len(strips)], clip, fps=video.fps, overwrite=overwrite), flush=True)
                strips.append(clip[np.linspace(0, len(clip) - 1, min(SHEET_COLUMNS, len(clip))).round().astype(int)])
            progress(len(strips), len(lines))
    print(contact_sheet(sheet, strips, captions=lines, columns=SHEET_COLUMNS, overwrite=overwrite))


def changed_plan(
    plan: Any,
    steps: Sequence[int] | None,
    first_steps: Sequence[int] | None,
    guidance: float | None,
    first_guidance: float | None,
    grid: str | None,
    stages: int,
    renew: str | None = None,
) -> Any:
    """The folder's plan with what the command line changes; ``first_`` follows the other where only that is given.

    Raises UserError for guidance that is not finite, step counts below 1, and other than one count for each stage.
    """
    from nd_jax.pyramid.sampler import SamplePlan

    def given(*values: Any) -> Any:
        return next(value for value in values if value is not None)

    scales = given(first_guidance, guidance, plan.first_guidance), given(guidance, plan.later_guidance)
    if not np.isfinite(scales).all():
        raise UserError(f"generate: guidance is {scales}, expected finite numbers; 0 or 1 means none")
    counts = given(first_steps, steps, plan.first_steps), given(steps, plan.later_steps)
    if {len(each) for each in counts} != {stages}:
        raise UserError(f"generate: steps {counts[0]} and {counts[1]}, expected {stages} numbers, one for each stage")
    return SamplePlan(*counts, *scales, given(grid, plan.grid), given(renew, plan.renew) in (True, "yes"))


def read_prompts(given: Sequence[str], path: Path | None) -> list[str]:
    """Prompts from the command line or from a file, one per line. Raises UserError when there are none or both."""
    if bool(given) == (path is not None):
        raise UserError('generate: expected either --prompt "..." or --prompts FILE')
    if path is None:
        return list(given)
    try:
        if path.stat().st_size > PROMPT_LIMIT:
            raise UserError(f"prompt file {path} has {path.stat().st_size} bytes; expected at most {PROMPT_LIMIT}")
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"prompt file {path} cannot be read ({error}); expected UTF-8 text, one prompt per line"
        ) from None
    if not lines:
        raise UserError(f"prompt file {path} is empty; expected one prompt per line")
    return lines
