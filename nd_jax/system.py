"""A video system in memory: networks, tokenizers and their constants, from an official-layout folder."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from nd_jax.converters.checked_files import read_json
from nd_jax.converters.folders import MODES, Folder, load_folder, write_folder
from nd_jax.data.tokenizers import TextTokenizer
from nd_jax.errors import UserError
from nd_jax.models.causal_vae import AsymmetricVAEConfig
from nd_jax.models.functional import Definition, Params
from nd_jax.models.system import (
    ADAPTER,
    CLIP_1,
    CLIP_2,
    CODEC,
    DENOISER,
    T5,
    Conditions,
    SystemConfig,
    TextTokens,
    encode_text,
)
from nd_jax.pyramid.normalise import NEODRAGON, PYRAMID_FLOW, LatentStats
from nd_jax.pyramid.schedule import Schedule
from nd_jax.recipes.preset import SamplingConfig, VideoConfig

TOKENIZERS = {"t5": "tokenizer_3", "clip": "tokenizer", "clip_2": "tokenizer_2"}
DEFAULTS = "generation_config.json"
"""Ours: size, length and sampling that a folder's videos are meant for. The official loader ignores it."""


def latent_stats(codec: Any) -> LatentStats:
    """The constants a codec's latents are normalised with: measured ones from its config, else the official ones."""
    if codec.latents_mean is None or codec.latents_std is None:
        return NEODRAGON if isinstance(codec, AsymmetricVAEConfig) else PYRAMID_FLOW
    (first, later), (first_std, later_std) = codec.latents_mean, codec.latents_std
    return LatentStats(
        shift=first,
        scale=tuple(1 / x for x in first_std),
        video_shift=later,
        video_scale=tuple(1 / x for x in later_std),
    )


@dataclasses.dataclass
class VideoSystem:
    """Networks with their parameters. ``folder`` says where it came from, for messages."""

    config: SystemConfig
    params: dict[str, Params]
    tokenizers: dict[str, TextTokenizer]
    video: VideoConfig
    sampling: SamplingConfig
    schedule: Schedule = dataclasses.field(default_factory=Schedule)
    folder: Path | None = None

    @cached_property
    def definitions(self) -> dict[str, Definition]:
        return self.config.definitions()

    @property
    def stats(self) -> LatentStats:
        return latent_stats(self.config.causal_video_vae)

    @cached_property
    def _encode_text(self):
        definitions = self.definitions
        return jax.jit(lambda params, tokens: encode_text(definitions, params, tokens))

    def tokens(self, prompts: Sequence[str]) -> tuple[TextTokens, list[str]]:
        """Ids of the prompts for every text encoder, and a warning for each prompt that had to be cut.

        Raises UserError when the folder came without tokenizers or text encoders.
        """
        missing = [name for name in TOKENIZERS if name not in self.tokenizers]
        missing += [name for name in (CLIP_1, CLIP_2, T5) if name not in self.params]
        if missing:
            lacks = ", ".join(TOKENIZERS.get(name, name) for name in missing)
            raise UserError(f"{self.folder} cannot read prompts: it lacks {lacks}; add these folders")
        t5, clip, clip_2 = (self.tokenizers[name](prompts) for name in ("t5", "clip", "clip_2"))
        return TextTokens(t5.ids, t5.mask, clip.ids, clip_2.ids), t5.warnings

    def conditions(self, prompts: Sequence[str]) -> tuple[Conditions, list[str]]:
        """What the denoiser reads of the prompts, and warnings for those that were cut."""
        tokens, warnings = self.tokens(prompts)
        text_params = {name: self.params[name] for name in (CLIP_1, CLIP_2, T5, ADAPTER) if name in self.params}
        return self._encode_text(text_params, TextTokens(*map(jnp.asarray, tokens))), warnings


def text_tokenizers(root: Mapping[str, Path], video: VideoConfig) -> dict[str, TextTokenizer]:
    """The tokenizers that are there, cut to the preset's lengths."""
    lengths = {"t5": video.text_length, "clip": video.clip_length, "clip_2": video.clip_length}
    return {
        name: TextTokenizer.from_folder(root[folder], max_length=lengths[name])
        for name, folder in TOKENIZERS.items()
        if folder in root
    }


def _defaults(folder: Folder, mode: str) -> tuple[VideoConfig, SamplingConfig, Schedule]:
    path = folder.path / DEFAULTS
    if not path.exists():
        sampling = SamplingConfig((1, 1, 1), (1, 1, 1), 0.0, 0.0) if mode == "hybrid" else SamplingConfig()
        return VideoConfig(), sampling, Schedule()
    content = read_json(path, what="generation defaults")
    try:
        sampling = {k: tuple(v) if isinstance(v, list) else v for k, v in content["sampling"].items()}
        return VideoConfig(**content["video"]), SamplingConfig(**sampling), Schedule(**content.get("schedule", {}))
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a generation config ({error}); expected objects video and sampling") from None


def load_system(path: str | Path, *, mode: str | None = None, dtype: str | None = "fp32") -> VideoSystem:
    """Load an official-layout folder (hybrid, monolithic or Pyramid-Flow's).

    Args:
        path: the folder.
        mode: "hybrid" or "monolithic" where the folder holds both denoisers.
        dtype: dtype of the parameters in memory; ``None`` keeps what is stored.

    Raises:
        UserError: for anything wrong in the folder, and if it has no denoiser or no codec.
    """
    folder = load_folder(path)
    roles = {name: folder.name_of(name, mode) for name in (DENOISER, CODEC)}
    roles |= {name: folder.name_of(name, mode) for name in (CLIP_1, CLIP_2, T5, ADAPTER) if folder.has(name, mode)}
    configs, params = {}, {}
    for name, component in roles.items():
        configs[name], params[name] = folder.load(component, dtype=dtype)
    mode = "monolithic" if roles[DENOISER].endswith("multistep_t2v") else "hybrid"
    system = SystemConfig(**configs)
    video, sampling, schedule = _defaults(folder, mode)
    tokenizers = text_tokenizers(folder.tokenizers, video)
    return VideoSystem(system, params, tokenizers, video, sampling, schedule, Path(path))


def save_system(
    path: str | Path,
    system: VideoSystem,
    tokenizers: Mapping[str, Path],
    *,
    dtype: str | None = "fp32",
    overwrite: bool = False,
) -> Path:
    """Write a system as an official-layout PyTorch folder (monolithic names), tokenizers and defaults included.

    The latent constants of a codec of our own are in its config.json; the official pipeline hard-codes its own.
    """
    names = MODES["monolithic"]
    with write_folder(path, dtype=dtype, overwrite=overwrite) as writer:
        for name, params in system.params.items():
            writer.component(names.get(name, name), getattr(system.config, name), params)
        for name, source in tokenizers.items():
            writer.tokenizer(name, source)
        writer.json(
            DEFAULTS,
            {
                "video": dataclasses.asdict(system.video),
                "sampling": dataclasses.asdict(system.sampling),
                "schedule": json.loads(json.dumps(dataclasses.asdict(system.schedule))),
            },
        )
    return Path(path)
