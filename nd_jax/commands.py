"""The verbs of the command line. Their signatures are their options: names, types, defaults and help."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from rich.console import Console
from rich.progress import Progress
from tyro.conf import Positional, arg

from nd_jax.errors import UserError
from nd_jax.recipes.preset import FlowRun, load_preset

console = Console(stderr=True)


def warn(line: str) -> None:
    """A warning on standard error."""
    console.print(f"warning: {line}", style="yellow", markup=False, highlight=False)


def check_output(path: Path, overwrite: bool) -> None:
    """Raise UserError when ``path`` exists and may not be replaced."""
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists: use --overwrite to replace it")


def data_prepare(preset: Positional[str], out: Path, clips: int = 2048, seed: int = 0) -> None:
    """Draw the captioned shapes dataset of a preset.

    Args:
        preset: name of a preset with a shapes world, such as shapes_tiny.
        out: folder for the dataset.
        clips: clips in the training split.
        seed: of everything that is drawn.
    """
    from nd_jax.workflow import prepare_data, prepare_tokenizers

    chosen = load_preset(preset)
    builder = prepare_data(chosen, out, clips=clips, seed=seed)
    captions = [example["caption"].decode() for example in builder.as_data_source("train")]
    prepare_tokenizers(chosen, captions, out / "tokenizers")
    console.print(f"{clips} clips and three tokenizers in {out}")


def data_latents(
    preset: Positional[str],
    data: Path,
    codec: Path,
    out: Path,
    clips: int = 2048,
    seed: int = 0,
    overwrite: bool = False,
) -> None:
    """Encode a prepared dataset with a trained codec, once.

    Args:
        preset: the preset the dataset was drawn for.
        data: folder of `nd-jax data prepare`, with the same clips and seed.
        codec: component folder of a codec, such as RUN/codec.
        out: folder for the latents.
        clips: clips in the training split.
        seed: the dataset's seed.
        overwrite: replace an existing folder.
    """
    from nd_jax.workflow import encode_clips, prepare_data, shapes_captions

    check_output(out, overwrite)
    clips_source = prepare_data(load_preset(preset), data, clips=clips, seed=seed).as_data_source("train")
    encode_clips(codec, clips_source, shapes_captions(clips_source), out)
    console.print(f"latents in {out}")


def train(
    preset: str,
    run: str,
    settings: object,
    out: Path,
    data: Path | None,
    latents: Path | None,
    codec: Path | None,
    start: Path | None,
    videos: tuple[Path, ...],
    clips: int,
) -> None:
    """Run one recipe of a preset. See ``train.parse_arguments`` for the command line."""
    from nd_jax import workflow
    from nd_jax.system import TOKENIZERS, load_system, save_system

    chosen = load_preset(preset)
    if not isinstance(settings, FlowRun):
        source = None
        if not videos:
            if data is None:
                raise UserError("train: a codec needs --data FOLDER (of nd-jax data prepare) or --videos FILE ...")
            source = workflow.prepare_data(chosen, data, clips=clips).as_data_source("train")
        outcome = workflow.train_codec(chosen, settings, out, clips=source, videos=videos)
        console.print(
            f"stopped at step {outcome.step} ({outcome.reason})" + (f"; codec in {out / 'codec'}" * outcome.finished)
        )
        return
    missing = [name for name, value in (("--data", data), ("--latents", latents), ("--codec", codec)) if value is None]
    if missing:
        raise UserError(f"train: flow matching needs {', '.join(missing)}; see nd-jax train {preset} {run} --help")
    tokenizers = {name: data / "tokenizers" / name for name in TOKENIZERS.values()}
    system = load_system(start) if start else None
    outcome, trained = workflow.train_flow(
        chosen, run, settings, out, latents=latents, codec_folder=codec, tokenizers=tokenizers, start=system
    )
    if trained is not None:
        save_system(out / "system", trained, tokenizers, overwrite=True)
    console.print(
        f"stopped at step {outcome.step} ({outcome.reason})" + (f"; system in {out / 'system'}" * outcome.finished)
    )


def _parse_train(arguments: Sequence[str]) -> int:
    """``nd-jax train PRESET RUN [options]``: the options are the fields of that run's settings."""
    from nd_jax.cli import parse

    words = [word for word in arguments[:2] if not word.startswith("-")]
    if not words:
        from nd_jax.recipes.preset import preset_names

        listing = {name: ", ".join(load_preset(name).runs) for name in preset_names()}
        told = "; ".join(f"{name} ({runs})" for name, runs in listing.items())
        if arguments and arguments[0] in ("-h", "--help"):
            print(f"usage: nd-jax train PRESET RUN --out FOLDER [options]\n\npresets (runs): {told}")
            return 0
        raise UserError(f"train: expected PRESET RUN; presets (runs): {told}")
    preset = load_preset(words[0])
    if len(words) < 2:
        raise UserError(f"train: expected a run of {words[0]} after its name, one of {', '.join(preset.runs)}")
    settings = preset.run(words[1])

    def options(
        out: Path,
        settings: Annotated[type(settings), arg(name="")] = settings,
        data: Path | None = None,
        latents: Path | None = None,
        codec: Path | None = None,
        start: Path | None = None,
        videos: tuple[Path, ...] = (),
        clips: int = 2048,
    ) -> None:
        """Run one recipe of a preset; run the same command again to resume.

        Args:
            out: folder for checkpoints, metrics and the result.
            data: folder of `nd-jax data prepare`.
            latents: folder of `nd-jax data latents` (flow matching).
            codec: codec component folder (flow matching).
            start: system folder to start from, e.g. of `nd-jax prune apply` (flow matching).
            videos: video files to train a codec on instead of the dataset.
            clips: clips in the dataset's training split.
        """
        train(words[0], words[1], settings, out, data, latents, codec, start, videos, clips)

    parse(options, arguments[2:], f"nd-jax train {words[0]} {words[1]}")
    return 0


train.parse_arguments = _parse_train


def _influence(checkpoint: Path, prompts: int, seed: int):
    from nd_jax.data.source import prompts as world_prompts
    from nd_jax.data.world import world_named
    from nd_jax.influence import block_influence
    from nd_jax.system import load_system

    system = load_system(checkpoint)
    captions, _ = world_prompts(world_named("64x64"), "train", prompts, seed=seed)
    return system, block_influence(system, captions, seed=seed)


def prune_importance(
    checkpoint: Positional[Path], prompts: int = 16, seed: int = 0, json_out: Path | None = None
) -> None:
    """Block influence of a checkpoint's denoiser, over prompts, denoising steps and both guidance branches.

    Args:
        checkpoint: official-layout folder.
        prompts: prompts of the shapes world to average over.
        seed: of the prompts and their noise.
        json_out: also write the numbers to this file.
    """
    _, influence = _influence(checkpoint, prompts, seed)
    rows = zip(influence.image.tolist(), influence.text.tolist(), influence.score.tolist(), strict=True)
    print("block  image   text    score")
    for block, (image, text, score) in enumerate(rows):
        print(f"{block:5d}  {image:.4f}  {text:.4f}  {score:.4f}")
    if json_out:
        json_out.write_text(json.dumps({"image": influence.image.tolist(), "text": influence.text.tolist()}))


def prune_apply(
    checkpoint: Positional[Path],
    out: Path,
    drop: tuple[int, ...] = (),
    count: int | None = None,
    prompts: int = 16,
    seed: int = 0,
    overwrite: bool = False,
) -> None:
    """Remove blocks from a checkpoint's denoiser: those named, or the least influential ones.

    Args:
        checkpoint: official-layout folder.
        out: folder for the smaller system.
        drop: indices of the blocks to remove.
        count: how many of the least influential blocks to remove, instead of ``drop``.
        prompts: prompts of the shapes world for the influence.
        seed: of the prompts and their noise.
        overwrite: replace an existing folder.
    """
    from nd_jax.recipes.pruning import choose_blocks
    from nd_jax.system import load_system, save_system
    from nd_jax.workflow import tokenizer_folders, without_blocks

    if bool(drop) == (count is not None):
        raise UserError("prune apply: expected either --drop INDEX ... or --count N")
    check_output(out, overwrite)
    if drop:
        system = load_system(checkpoint)
    else:
        system, influence = _influence(checkpoint, prompts, seed)
        drop = choose_blocks(influence.score, count)
    smaller, kept = without_blocks(system, drop)
    save_system(out, smaller, tokenizer_folders(checkpoint), overwrite=overwrite)
    print(f"removed {', '.join(map(str, drop))}; kept {', '.join(map(str, kept))}")


def generate(
    checkpoint: Path,
    out: Path = Path("videos"),
    prompt: tuple[str, ...] = (),
    prompts: Path | None = None,
    seed: int = 0,
    mode: Literal["monolithic", "hybrid"] | None = None,
    image: Path | None = None,
    negative_prompt: str = "",
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
    steps: tuple[int, ...] | None = None,
    first_steps: tuple[int, ...] | None = None,
    guidance: float | None = None,
    first_guidance: float | None = None,
    grid: Literal["official", "plain"] | None = None,
    batch: int = 8,
    overwrite: bool = False,
) -> None:
    """Videos from prompts, with any official-layout checkpoint folder. Writes mp4 files and a contact sheet.

    Args:
        checkpoint: official-layout folder.
        out: folder for the videos.
        prompt: one or more prompts; an empty one means unconditional.
        prompts: text file with one prompt per line, instead.
        seed: of the noise; a prompt's place in the list and the seed fix its video.
        mode: which denoiser, where the folder has both.
        image: first frame (hybrid generation); any size or mode.
        negative_prompt: what guidance steers away from.
        height: pixels; default: what the folder is meant for.
        width: pixels.
        frames: 1 + 8k.
        steps: Euler steps per stage, lowest resolution first.
        first_steps: the same for the first latent frame; default: as ``steps``.
        guidance: v_uncond + w (v_cond - v_uncond); 0 or 1: none.
        first_guidance: the same for the first latent frame; default: as ``guidance``.
        grid: step grid, "official" or "plain" (even).
        batch: prompts at a time.
        overwrite: replace existing files.
    """
    from nd_jax.data.clips import read_image
    from nd_jax.data.video_out import contact_sheet, file_name, write_video
    from nd_jax.generate import generate as run
    from nd_jax.generate import sample_plan
    from nd_jax.recipes.preset import SamplingConfig
    from nd_jax.system import load_system

    lines = read_prompts(prompt, prompts)
    files = [out / f"{file_name(text, index=n)}.mp4" for n, text in enumerate(lines)]
    sheet = out / "contact_sheet.png"
    for path in (*files, sheet):
        check_output(path, overwrite)
    system = load_system(checkpoint, mode=mode)
    had = system.sampling
    sampling = SamplingConfig(
        first_steps or steps or had.first_steps,
        steps or had.later_steps,
        next(x for x in (first_guidance, guidance, had.first_guidance) if x is not None),
        had.later_guidance if guidance is None else guidance,
        grid or had.grid,
    )
    size = (height or system.video.height, width or system.video.width)
    first = None
    if image is not None:
        first = np.repeat(read_image(image, size=size)[None], len(lines), axis=0)
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("videos", total=len(lines))
        videos = run(
            system,
            lines,
            seed=seed,
            plan=sample_plan(sampling),
            negative_prompt=negative_prompt,
            height=size[0],
            width=size[1],
            frames=frames,
            first_frames=first,
            batch=batch,
            warn=warn,
            progress=lambda done, total: bar.update(task, completed=done),
        )
    for path, video in zip(files, videos, strict=True):
        write_video(path, video, fps=system.video.fps, overwrite=overwrite)
        print(path)
    contact_sheet(sheet, list(videos), captions=lines, overwrite=overwrite)
    print(sheet)


def read_prompts(given: Sequence[str], path: Path | None) -> list[str]:
    """Prompts from the command line or from a file, one per line. Raises UserError when there are none or both."""
    if bool(given) == (path is not None):
        raise UserError('generate: expected either --prompt "..." or --prompts FILE')
    if path is None:
        return list(given)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"prompt file {path} cannot be read ({error}); expected UTF-8 text, one prompt per line"
        ) from None
    if not lines:
        raise UserError(f"prompt file {path} is empty; expected one prompt per line")
    return lines


def evaluate(
    checkpoint: Positional[tuple[Path, ...]],
    out: Path = Path("evaluation"),
    prompts: int = 48,
    split: Literal["seen", "heldout_combinations", "heldout_templates"] = "seen",
    seed: int = 0,
    batch: int = 16,
    overwrite: bool = False,
) -> None:
    """Generate from prompts of the shapes world, judge, and write report.html and summary.json.

    Args:
        checkpoint: one or more official-layout folders; the first is the baseline of the others.
        out: folder for the report.
        prompts: how many.
        split: which prompts.
        seed: of prompts and noise.
        batch: prompts at a time.
        overwrite: replace an existing report.
    """
    from nd_jax.data.world import world_named
    from nd_jax.evaluate import evaluate_system
    from nd_jax.evaluation_report import write_evaluation
    from nd_jax.system import load_system

    check_output(out / "report.html", overwrite)
    if not checkpoint:
        raise UserError("evaluate: expected one or more checkpoint folders")
    world, judged = world_named("64x64"), {}
    with Progress(console=console, transient=True) as bar:
        for path in checkpoint:
            task = bar.add_task(str(path), total=prompts)
            judged[str(path)] = evaluate_system(
                load_system(path),
                world,
                split=split,
                count=prompts,
                seed=seed,
                batch=batch,
                progress=lambda done, total, task=task: bar.update(task, completed=done),
            )
    print(write_evaluation(out, world, split, seed, judged))


def convert_import(
    source: Positional[Path],
    destination: Positional[Path],
    dtype: Literal["fp32", "bf16", "fp16"] | None = None,
    overwrite: bool = False,
) -> None:
    """Official PyTorch folder (or one component of it) to nd-jax's own form.

    Args:
        source: official folder, Pyramid-Flow folder, or one component.
        destination: new folder.
        dtype: of the parameters; default: as stored.
        overwrite: replace an existing folder.
    """
    from nd_jax.converters.convert import convert_import as run

    for line in run(source, destination, dtype, overwrite=overwrite):
        warn(line)
    print(destination)


def convert_export(
    source: Positional[Path],
    destination: Positional[Path],
    dtype: Literal["fp32", "bf16", "fp16"] | None = None,
    overwrite: bool = False,
) -> None:
    """nd-jax's own form to an official PyTorch folder.

    Args:
        source: folder written by `nd-jax convert import`.
        destination: new folder.
        dtype: of the parameters; default: as stored.
        overwrite: replace an existing folder.
    """
    from nd_jax.converters.convert import convert_export as run

    for line in run(source, destination, dtype, overwrite=overwrite):
        warn(line)
    print(destination)


def verify(folder: Positional[Path]) -> int:
    """Recompute every golden case found in a folder and compare; exits 1 when one fails.

    Args:
        folder: golden cases, one folder each.
    """
    from nd_jax.verify import run

    return run(folder)
