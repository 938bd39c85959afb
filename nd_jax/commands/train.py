"""``nd-jax train PRESET RUN``: the options are the fields of that run's settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from nd_jax.commands.console import say
from nd_jax.commands.train_options import (
    AdversarialOptions,
    CodecOptions,
    DecoderOptions,
    DmdOptions,
    FlowOptions,
    MeanFlowOptions,
    Options,
    ProgressiveOptions,
    RecoveryOptions,
    TextDistillOptions,
    TextOptions,
    UpscalerOptions,
)
from nd_jax.errors import UserError
from nd_jax.recipes.preset import (
    AdversarialRun,
    CodecRun,
    DecoderRun,
    DmdRun,
    FlowRun,
    MeanFlowRun,
    Preset,
    ProgressiveRun,
    RecoveryRun,
    TextDistillRun,
    TextRun,
    UpscalerRun,
    load_preset,
    preset_names,
)

INTERRUPTED = 130


def train(preset: str, run: str, options: Options) -> int:
    """Run one recipe of a preset. Returns the exit code, 130 when a signal interrupted it."""
    work = {
        CodecOptions: _train_codec,
        DecoderOptions: _train_decoder,
        TextOptions: _train_text,
        TextDistillOptions: _distil_text,
        FlowOptions: _train_flow,
        RecoveryOptions: _recover,
        DmdOptions: _distil_steps,
        ProgressiveOptions: _distil_steps,
        MeanFlowOptions: _distil_steps,
        AdversarialOptions: _distil_steps,
        UpscalerOptions: _train_upscaler,
    }[type(options)]
    from nd_jax.training.cluster import is_leader, join_cluster

    join_cluster()
    outcome, result = work(load_preset(preset), run, options)
    tell = say if is_leader() else lambda line: None
    tell(f"stopped at step {outcome.step} ({outcome.reason}), {outcome.seconds:.0f} s")
    if not outcome.finished:
        tell("run the same command again to continue")
        return INTERRUPTED
    if is_leader():
        print(result)
    return 0


def _train_codec(preset: Preset, run: str, options: CodecOptions) -> tuple[Any, Path]:
    if bool(options.videos) == (options.data is not None):
        raise UserError(f"train {preset.name} {run}: expected either --data FOLDER or --videos FILE ...")
    from nd_jax import datasets, workflow
    from nd_jax.data.buckets import parse_size

    size = None if options.bucket is None else parse_size(options.bucket)
    usual = (preset.video.height, preset.video.width)
    clips = None if options.data is None else datasets.open_data(options.data, size=size, prefer=usual)
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


def _distil_text(preset: Preset, run: str, options: TextDistillOptions) -> tuple[Any, Path]:
    captions, where = options.settings.recipe.captions, f"train {preset.name} {run}"
    if options.prompts and options.features is not None:
        raise UserError(f"{where}: expected either --prompts or --features, found both")
    if not captions and not options.prompts and options.features is None:
        raise UserError(f"{where}: expected --prompts FOLDER ..., --features FOLDER or --recipe.captions N to train on")
    if not captions and not options.prompts and not options.held_out:
        raise UserError(f"{where}: with --features expected --held-out FOLDER ..., for the report on held-out prompts")
    from nd_jax.text_student import distil_text

    outcome, report = distil_text(
        preset,
        run,
        options.settings,
        options.out,
        teacher=options.teacher,
        prompts=options.prompts,
        features=options.features,
        held_out=options.held_out,
        start=options.start,
    )
    if report is not None:
        say(
            f"{report['prompts']} held-out prompts: cosine {report['cosine']:.3f}, squared error "
            f"{report['relative_mse']:.1%} of the teacher's mean square, nearest other prompt the same for "
            f"{report['neighbours']:.0%}"
        )
    return outcome, options.out / "system"


def _train_flow(preset: Preset, run: str, options: FlowOptions) -> tuple[Any, Path]:
    needed = {"--data": options.data, "--codec": options.codec}
    missing = [name for name, value in needed.items() if value is None]
    if options.start is None and missing:
        raise UserError(f"train {preset.name} {run}: expected {' and '.join(missing)}, or --start FOLDER")
    if options.start is not None and options.text is not None:
        raise UserError(f"train {preset.name} {run}: expected either --start or --text, found both")
    from nd_jax import workflow
    from nd_jax.system import TOKENIZERS
    from nd_jax.video_folders import is_own_clips, sized

    if options.start is None:
        start, codec = None, options.codec
        tokenizers = {name: options.data / "tokenizers" / name for name in TOKENIZERS.values()}
    else:
        start, codec, tokenizers = _start(options.start)
        codec = options.codec or codec
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
    return outcome, _left(options.out, system, tokenizers)


def _start(path: Path) -> tuple[Any, Path, dict[str, Path]]:
    """The system that a run starts from, and where its codec and its tokenizers are."""
    from nd_jax.converters.folders import load_folder
    from nd_jax.models.system import CODEC
    from nd_jax.system import load_system

    system = load_system(path)
    folder = load_folder(system.folder)
    return system, folder.components[CODEC], dict(folder.tokenizers)


def _left(out: Path, system: Any, tokenizers: dict[str, Path]) -> Path:
    """Where a run's result is, written if the run was not interrupted."""
    from nd_jax.system import save_system
    from nd_jax.training.cluster import once

    if system is not None:
        once(lambda: save_system(out / "system", system, tokenizers, overwrite=True), "writing the system")
    return out / "system"


def _recover(preset: Preset, run: str, options: RecoveryOptions) -> tuple[Any, Path]:
    from nd_jax.recovery_workflow import recover
    from nd_jax.system import load_system

    start, codec, tokenizers = _start(options.start)
    outcome, system = recover(
        preset,
        run,
        options.settings,
        options.out,
        start=start,
        teacher=load_system(options.teacher),
        latents=options.latents,
        codec_folder=codec,
        tokenizers=tokenizers,
        alone=options.alone,
    )
    return outcome, _left(options.out, system, tokenizers)


def _distil_steps(preset: Preset, run: str, options: DmdOptions) -> tuple[Any, Path]:
    from nd_jax.dmd_workflow import distil_steps
    from nd_jax.system import load_system

    start, codec, tokenizers = _start(options.start)
    outcome, system = distil_steps(
        preset,
        run,
        options.settings,
        options.out,
        start=start,
        teacher=None if options.teacher is None else load_system(options.teacher),
        latents=options.latents,
        prompts=options.prompts,
        codec_folder=codec,
        tokenizers=tokenizers,
    )
    return outcome, _left(options.out, system, tokenizers)


def _train_upscaler(preset: Preset, run: str, options: UpscalerOptions) -> tuple[Any, Path]:
    from nd_jax.upscaler_workflow import RESULT, train_upscaler

    outcome, figures = train_upscaler(
        preset, run, options.settings, options.out, videos=options.videos, held_out=options.held_out
    )
    for name, found in (figures or {}).items():
        say(
            f"{name}: {found.network:.2f} dB, bilinear {found.bilinear:.2f}, bicubic {found.bicubic:.2f} "
            f"({found.gain:+.2f} dB above the better one)"
        )
    return outcome, options.out / RESULT


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
        TextDistillRun: TextDistillOptions,
        FlowRun: FlowOptions,
        RecoveryRun: RecoveryOptions,
        DmdRun: DmdOptions,
        ProgressiveRun: ProgressiveOptions,
        MeanFlowRun: MeanFlowOptions,
        AdversarialRun: AdversarialOptions,
        UpscalerRun: UpscalerOptions,
    }
    options = kinds[type(settings)]
    return partial(options, settings=settings), arguments[2:], "nd-jax train " + " ".join(words), partial(train, *words)


train.resolve = resolve
