"""``nd-jax train PRESET RUN``: the options are the fields of that run's settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import arg

from nd_jax.commands.console import say
from nd_jax.errors import UserError
from nd_jax.recipes.preset import (
    CodecRun,
    DecoderRun,
    FlowRun,
    Preset,
    RecoveryRun,
    TextRun,
    load_preset,
    preset_names,
)

INTERRUPTED = 130


@dataclass(frozen=True)
class CodecOptions:
    """Train a codec on clips of a dataset or on video files. Run the same command again to resume."""

    out: Path
    """Folder for checkpoints, metrics and the result, out/codec."""
    settings: Annotated[CodecRun, arg(name="")]
    data: Path | None = None
    """Folder of `nd-jax data prepare` or `nd-jax data videos`."""
    bucket: str | None = None
    """Size HEIGHTxWIDTH of your own clips, if the dataset has several and none is the preset's."""
    videos: tuple[Path, ...] = ()
    """Video files to train on, instead."""


@dataclass(frozen=True)
class DecoderOptions:
    """Distil a smaller decoder for a codec's latents; the encoder stays. Run the same command again to resume."""

    out: Path
    """Folder for checkpoints, metrics and the results: out/codec, out/decoders.json and, with --start, out/system."""
    settings: Annotated[DecoderRun, arg(name="")]
    start: Path | None = None
    """System folder whose codec gets the new decoder."""
    codec: Path | None = None
    """A codec's component folder, instead."""
    data: Path | None = None
    """Folder of `nd-jax data prepare` or `nd-jax data videos`; its held-out clips are measured at the end."""
    bucket: str | None = None
    """Size HEIGHTxWIDTH of your own clips, if the dataset has several and none is the preset's."""
    videos: tuple[Path, ...] = ()
    """Video files to train on, instead or as well."""
    shares: tuple[int, int] = (3, 1)
    """Clips of --data and windows of --videos, where there are both."""
    held_out: tuple[Path, ...] = ()
    """Video files that are never trained on, even if --videos names them, and are measured at the end."""
    lpips: Path | None = None
    """Safetensors file with LPIPS's weights; without one the weight-free multi-scale loss is used."""


@dataclass(frozen=True)
class TextOptions:
    """Pre-train text encoders on captions of the shapes worlds. Run the same command again to resume."""

    out: Path
    """Folder for checkpoints, metrics and the result, which `train PRESET RUN --text` reads."""
    settings: Annotated[TextRun, arg(name="")]
    data: Path
    """Folder of `nd-jax data prepare`, for its tokenizers."""


@dataclass(frozen=True)
class FlowOptions:
    """Flow matching on encoded clips, from scratch or from a system. Run the same command again to resume."""

    out: Path
    """Folder for checkpoints, metrics and the result, out/system."""
    settings: Annotated[FlowRun, arg(name="")]
    latents: tuple[Path, ...]
    """Folder of `nd-jax data latents`; one for each share of --recipe.size-mix."""
    data: Path | None = None
    """Folder of `nd-jax data prepare` or `videos`, for tokenizers and size; not needed with --start."""
    codec: Path | None = None
    """The codec's component folder; not needed with --start."""
    text: Path | None = None
    """Run whose text encoders to begin with."""
    start: Path | None = None
    """System folder to start from, such as one of `nd-jax prune apply`."""


@dataclass(frozen=True)
class RecoveryOptions:
    """Recovery after pruning: flow matching in out/stage1, then feature matching to the teacher in out/stage2. Run the
    same command again to resume in either."""

    out: Path
    """Folder for both runs and the result, out/system."""
    settings: Annotated[RecoveryRun, arg(name="")]
    start: Path
    """Pruned system, a folder of `nd-jax prune apply`; with --alone also one whose first stage is done."""
    teacher: Path
    """System folder that was pruned."""
    latents: tuple[Path, ...]
    """Folder of `nd-jax data latents`; one for each share of --recipe.size-mix."""
    alone: bool = False
    """Leave the first stage out."""


def train(
    preset: str, run: str, options: CodecOptions | DecoderOptions | TextOptions | FlowOptions | RecoveryOptions
) -> int:
    """Run one recipe of a preset. Returns the exit code, 130 when a signal interrupted it."""
    work = {
        CodecOptions: _train_codec,
        DecoderOptions: _train_decoder,
        TextOptions: _train_text,
        FlowOptions: _train_flow,
        RecoveryOptions: _recover,
    }[type(options)]
    outcome, result = work(load_preset(preset), run, options)
    say(f"stopped at step {outcome.step} ({outcome.reason}), {outcome.seconds:.0f} s")
    if not outcome.finished:
        say("run the same command again to continue")
        return INTERRUPTED
    print(result)
    return 0


def _train_codec(preset: Preset, run: str, options: CodecOptions) -> tuple[Any, Path]:
    if bool(options.videos) == (options.data is not None):
        raise UserError(f"train {preset.name} {run}: expected either --data FOLDER or --videos FILE ...")
    from nd_jax import workflow
    from nd_jax.data.buckets import parse_size

    size = None if options.bucket is None else parse_size(options.bucket)
    usual = (preset.video.height, preset.video.width)
    clips = None if options.data is None else workflow.open_data(options.data, size=size, prefer=usual)
    outcome = workflow.train_codec(preset, options.settings, options.out, clips=clips, videos=options.videos)
    return outcome, options.out / "codec"


def _train_decoder(preset: Preset, run: str, options: DecoderOptions) -> tuple[Any, Path]:
    if (options.start is None) == (options.codec is None):
        raise UserError(f"train {preset.name} {run}: expected either --start SYSTEM or --codec FOLDER")
    from nd_jax import decoder_workflow
    from nd_jax.data.buckets import parse_size

    return decoder_workflow.distil_decoder(
        preset,
        run,
        options.settings,
        options.out,
        start=options.start,
        codec=options.codec,
        data=options.data,
        size=None if options.bucket is None else parse_size(options.bucket),
        videos=options.videos,
        shares=options.shares,
        held_out=options.held_out,
        lpips=options.lpips,
    )


def _train_text(preset: Preset, run: str, options: TextOptions) -> tuple[Any, Path]:
    from nd_jax import workflow
    from nd_jax.system import TOKENIZERS

    tokenizers = {name: options.data / "tokenizers" / name for name in TOKENIZERS.values()}
    return workflow.train_text(preset, options.settings, options.out, tokenizers=tokenizers), options.out


def _train_flow(preset: Preset, run: str, options: FlowOptions) -> tuple[Any, Path]:
    needed = {"--data": options.data, "--codec": options.codec}
    missing = [name for name, value in needed.items() if value is None]
    if options.start is None and missing:
        raise UserError(f"train {preset.name} {run}: expected {' and '.join(missing)}, or --start FOLDER")
    if options.start is not None and options.text is not None:
        raise UserError(f"train {preset.name} {run}: expected either --start or --text, found both")
    from nd_jax import workflow
    from nd_jax.converters.folders import load_folder
    from nd_jax.models.system import CODEC
    from nd_jax.system import TOKENIZERS, load_system, save_system
    from nd_jax.video_folders import is_own_clips, sized

    if options.start is None:
        start, tokenizers = None, {name: options.data / "tokenizers" / name for name in TOKENIZERS.values()}
    else:
        start, folder = load_system(options.start), load_folder(options.start)
        tokenizers = dict(folder.tokenizers)
    codec = options.codec or folder.components[CODEC]
    if options.data is not None and is_own_clips(options.data):
        preset = sized(preset, options.latents[0])
    outcome, system = workflow.train_flow(
        preset,
        run,
        options.settings,
        options.out,
        latents=options.latents,
        codec_folder=codec,
        tokenizers=tokenizers,
        start=start,
        text=None if options.text is None else workflow.load_text(options.text),
    )
    if system is not None:
        save_system(options.out / "system", system, tokenizers, overwrite=True)
    return outcome, options.out / "system"


def _recover(preset: Preset, run: str, options: RecoveryOptions) -> tuple[Any, Path]:
    from nd_jax.converters.folders import load_folder
    from nd_jax.models.system import CODEC
    from nd_jax.recovery_workflow import recover
    from nd_jax.system import load_system, save_system

    folder = load_folder(options.start)
    outcome, system = recover(
        preset,
        run,
        options.settings,
        options.out,
        start=load_system(options.start),
        teacher=load_system(options.teacher),
        latents=options.latents,
        codec_folder=folder.components[CODEC],
        tokenizers=dict(folder.tokenizers),
        alone=options.alone,
    )
    if system is not None:
        save_system(options.out / "system", system, dict(folder.tokenizers), overwrite=True)
    return outcome, options.out / "system"


def resolve(arguments: Sequence[str]) -> tuple[Callable, Sequence[str], str, Callable[[Any], int]]:
    """What the words after ``nd-jax train`` stand for: options, remaining words, name of the command, and the work.

    Raises UserError, and SystemExit after printing help.
    """
    help_wanted = any(word in ("-h", "--help") for word in arguments)
    words = [word for word in arguments[:2] if not word.startswith("-")]
    known = preset_names() if not words else [words[0]]
    told = "; ".join(f"{name}: {', '.join(load_preset(name).runs)}" for name in known)
    if len(words) < 2:
        if help_wanted:
            print(f"usage: nd-jax train PRESET RUN --out FOLDER [options]\n\nruns of each preset: {told}")
            print("\nnd-jax train PRESET RUN --help lists that run's options with their defaults.")
            raise SystemExit(0)
        raise UserError(f"train: expected PRESET RUN first; {told}")
    settings = load_preset(words[0]).run(words[1])
    kinds = {
        CodecRun: CodecOptions,
        DecoderRun: DecoderOptions,
        TextRun: TextOptions,
        FlowRun: FlowOptions,
        RecoveryRun: RecoveryOptions,
    }
    options = kinds[type(settings)]
    return partial(options, settings=settings), arguments[2:], "nd-jax train " + " ".join(words), partial(train, *words)


train.resolve = resolve
