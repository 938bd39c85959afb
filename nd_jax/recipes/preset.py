"""What a preset is: the networks, the videos, how each recipe is run and how videos are sampled."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nd_jax.errors import UserError
from nd_jax.models.context_adapter import ContextAdapterConfig
from nd_jax.models.quicksrnet import QuickSRNetConfig
from nd_jax.models.system import SystemConfig
from nd_jax.models.t5 import T5Config
from nd_jax.pyramid.sampler import SamplePlan
from nd_jax.pyramid.schedule import Schedule
from nd_jax.recipes.adversarial import AdversarialConfig
from nd_jax.recipes.codec import CodecRecipeConfig
from nd_jax.recipes.decoder_distillation import DecoderRecipeConfig
from nd_jax.recipes.dmd_config import DmdRecipeConfig
from nd_jax.recipes.flow_matching import FlowRecipeConfig
from nd_jax.recipes.mean_flow import MeanFlowConfig
from nd_jax.recipes.progressive import ProgressiveConfig
from nd_jax.recipes.recovery import RecoveryRecipeConfig
from nd_jax.recipes.text_attributes import TextRecipeConfig
from nd_jax.recipes.text_distillation import TextDistillConfig
from nd_jax.recipes.upscaler import UpscalerRecipeConfig
from nd_jax.training.loop import LoopConfig


@dataclass(frozen=True)
class VideoConfig:
    """The videos of a preset, and how long its prompts may be."""

    height: int = 320
    """Pixels."""
    width: int = 512
    """Pixels."""
    frames: int = 49
    """1 + 8k."""
    fps: int = 24
    text_length: int = 128
    """T5 tokens."""
    clip_length: int = 77
    """CLIP tokens."""


SamplingConfig = SamplePlan


@dataclass(frozen=True)
class CodecRun:
    """A codec run: recipe and loop."""

    recipe: CodecRecipeConfig = field(default_factory=CodecRecipeConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)


@dataclass(frozen=True)
class DecoderRun:
    """A run that distils a smaller decoder for a codec's latents: recipe and loop."""

    recipe: DecoderRecipeConfig = field(default_factory=DecoderRecipeConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)


@dataclass(frozen=True)
class TextRun:
    """A pre-training run of the text encoders: recipe and loop."""

    recipe: TextRecipeConfig = field(default_factory=TextRecipeConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)


@dataclass(frozen=True)
class TextDistillRun:
    """A run that distils a text encoder: the student's networks, recipe and loop. The teacher is a folder."""

    encoder: T5Config = field(default_factory=T5Config)
    """The student's T5, with or without projection."""
    adapter: ContextAdapterConfig = field(default_factory=ContextAdapterConfig)
    """From the encoder's width to the denoiser's (to ``joint_attention_dim`` in mode "extend")."""
    recipe: TextDistillConfig = field(default_factory=TextDistillConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)


@dataclass(frozen=True)
class FlowRun:
    """A flow-matching run: recipe and loop."""

    recipe: FlowRecipeConfig = field(default_factory=FlowRecipeConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)


@dataclass(frozen=True)
class RecoveryRun:
    """Recovery after pruning in two stages: a flow-matching run, then feature matching (recipe and loop)."""

    stage1: FlowRun = field(default_factory=FlowRun)
    recipe: RecoveryRecipeConfig = field(default_factory=RecoveryRecipeConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)


@dataclass(frozen=True)
class DmdRun:
    """A run that distils a many-step system into a few-step student: recipe and loop."""

    recipe: DmdRecipeConfig = field(default_factory=DmdRecipeConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)


@dataclass(frozen=True)
class ProgressiveRun:
    """The same by progressive distillation: recipe and loop."""

    recipe: ProgressiveConfig = field(default_factory=ProgressiveConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)


@dataclass(frozen=True)
class MeanFlowRun:
    """The same by mean flows: recipe and loop."""

    recipe: MeanFlowConfig = field(default_factory=MeanFlowConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)


@dataclass(frozen=True)
class AdversarialRun:
    """The same by adversarial distillation: recipe and loop."""

    recipe: AdversarialConfig = field(default_factory=AdversarialConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)


@dataclass(frozen=True)
class UpscalerRun:
    """A super-resolution run: network, recipe and loop."""

    network: QuickSRNetConfig = field(default_factory=QuickSRNetConfig)
    recipe: UpscalerRecipeConfig = field(default_factory=UpscalerRecipeConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)


StepRun = DmdRun | ProgressiveRun | MeanFlowRun | AdversarialRun
"""Runs that distil steps."""

Run = CodecRun | DecoderRun | TextRun | TextDistillRun | FlowRun | RecoveryRun | StepRun | UpscalerRun


@dataclass(frozen=True)
class Preset:
    """Everything `nd-jax train` needs to know. ``runs`` maps a run's name to its settings."""

    name: str
    system: SystemConfig
    video: VideoConfig
    sampling: SamplePlan
    runs: Mapping[str, Run]
    schedule: Schedule = field(default_factory=Schedule)
    world: str | None = None
    """The shapes world it trains on, if any."""
    plain_captions: bool = False
    """Whether its runs of minutes are trained and judged on captions that are all worded alike."""
    tokenizer_vocabulary: int = 512
    """Pieces of the T5 tokenizer that is trained for a shapes world; CLIP's has twice as many."""

    @property
    def latent_size(self) -> tuple[int, int, int]:
        """Latent frames, height and width."""
        codec = self.system.causal_video_vae
        frames = 1 + (self.video.frames - 1) // codec.time_scale
        return frames, self.video.height // codec.space_scale, self.video.width // codec.space_scale

    def run(self, name: str) -> Run:
        """The run of that name. Raises UserError listing the runs for any other."""
        if name not in self.runs:
            raise UserError(f"preset {self.name}: no run {name!r}, expected one of {', '.join(self.runs)}")
        return self.runs[name]


def preset_names() -> list[str]:
    """Every preset there is: the modules of ``configs/``."""
    package = importlib.import_module("nd_jax.configs")
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__))


def load_preset(name: str) -> Preset:
    """The preset of that name. Raises UserError listing the presets for any other."""
    if name not in preset_names():
        raise UserError(f"unknown preset {name!r}, expected one of {', '.join(preset_names())}")
    return importlib.import_module(f"nd_jax.configs.{name}").PRESET


def as_settings(value: Any) -> Any:
    """A config dataclass as JSON-able content, to be stored beside what it made."""
    if dataclasses.is_dataclass(value):
        return {f.name: as_settings(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): as_settings(item) for key, item in value.items()}
    return [as_settings(item) for item in value] if isinstance(value, tuple | list) else value
