"""The options of ``nd-jax train``, one class for each kind of run; its settings become options as well."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from nd_jax.recipes.preset import (
    AdversarialRun,
    CodecRun,
    DecoderRun,
    DmdRun,
    FlowRun,
    MeanFlowRun,
    ProgressiveRun,
    RecoveryRun,
    TextDistillRun,
    TextRun,
    UpscalerRun,
)


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
class TextDistillOptions:
    """Distil a smaller text encoder in the denoiser's space, on prompts alone. Run the same command again to resume."""

    out: Path
    """Folder for checkpoints, metrics and the results: out/system, and out/text.json with the report."""
    settings: Annotated[TextDistillRun, arg(name="")]
    teacher: Path
    """System folder whose text encoder is distilled; its denoiser, codec, pooled towers and tokenizers are kept."""
    prompts: tuple[Path, ...] = ()
    """Folders of `nd-jax data prompts` to train on, beside the captions of --recipe.captions."""
    features: Path | None = None
    """Folder of `nd-jax data features`, instead of prompts, captions and a live teacher."""
    held_out: tuple[Path, ...] = ()
    """Folders of `nd-jax data prompts` whose held-out prompts are reported on; default: those of --prompts."""
    start: Path | None = None
    """System, or folder of a T5 or of a context adapter, to begin with; --recipe.encoder frozen and lora need a T5."""


@dataclass(frozen=True)
class FlowOptions:
    """Flow matching on encoded clips, from scratch or from a system. Run the same command again to resume."""

    out: Path
    """Folder for checkpoints, metrics and the result, out/system."""
    settings: Annotated[FlowRun, arg(name="")]
    latents: tuple[Path, ...]
    """Folder of `nd-jax data latents` or `data precompute`; one for each share of --recipe.size-mix."""
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
    """Folder of `nd-jax data latents` or `data precompute`; one for each share of --recipe.size-mix."""
    alone: bool = False
    """Leave the first stage out."""


@dataclass(frozen=True)
class DmdOptions:
    """Distil a many-step system into one that samples in a few steps. Run the same command again to resume."""

    out: Path
    """Folder for checkpoints, metrics and the result, out/system."""
    settings: Annotated[DmdRun, arg(name="")]
    start: Path
    """Many-step system that the student begins as, such as one that was pruned and recovered."""
    latents: tuple[Path, ...] = ()
    """Folder of `nd-jax data latents` or `data precompute`; one for each share of --recipe.size-mix. None with
    --recipe.no-videos."""
    prompts: tuple[Path, ...] = ()
    """With --recipe.no-videos: folders of `nd-jax data prompts`; default: captions of the preset's world."""
    teacher: Path | None = None
    """System to learn from, if it is not --start: with the same text encoders, and as many or more blocks."""


@dataclass(frozen=True)
class ProgressiveOptions(DmdOptions):
    """Distil a many-step system into one that samples in a few steps, several of the teacher's steps into one. Run the
    same command again to resume."""

    settings: Annotated[ProgressiveRun, arg(name="")]


@dataclass(frozen=True)
class MeanFlowOptions(DmdOptions):
    """Distil a many-step system into one that samples in a few steps, by average velocities. Run the same command again
    to resume."""

    settings: Annotated[MeanFlowRun, arg(name="")]


@dataclass(frozen=True)
class AdversarialOptions(DmdOptions):
    """Distil a many-step system into one that samples in a few steps, against a head on the teacher's features. Run the
    same command again to resume."""

    settings: Annotated[AdversarialRun, arg(name="")]


@dataclass(frozen=True)
class UpscalerOptions:
    """Train super-resolution on video files. Run the same command again to resume."""

    out: Path
    """Folder for checkpoints, metrics and the results: out/super_resolution and out/upscaler.json."""
    settings: Annotated[UpscalerRun, arg(name="")]
    videos: tuple[Path, ...]
    """Video files to train on."""
    held_out: tuple[Path, ...] = ()
    """Video files that are never trained on, even if --videos names them, and are measured at the end."""


Options = (
    CodecOptions
    | DecoderOptions
    | TextOptions
    | TextDistillOptions
    | FlowOptions
    | RecoveryOptions
    | DmdOptions
    | UpscalerOptions
)
