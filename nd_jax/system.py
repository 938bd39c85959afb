"""A video system in memory: networks, tokenizers and their constants, from an official-layout folder."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from nd_jax.checked_files import read_json
from nd_jax.converters.folders import MODES, Folder, load_folder, write_folder
from nd_jax.data.tokenizers import TextTokenizer
from nd_jax.errors import UserError
from nd_jax.models.causal_vae import AsymmetricVAEConfig
from nd_jax.models.functional import Definition, Params
from nd_jax.models.system import (
    CLIP_1,
    CLIP_2,
    CODEC,
    DENOISER,
    T5,
    TEXT_PARTS,
    Conditions,
    SystemConfig,
    TextTokens,
    encode_text,
)
from nd_jax.pruning_record import RECORD, read_record, record
from nd_jax.pyramid.normalise import NEODRAGON, PYRAMID_FLOW, LatentStats
from nd_jax.pyramid.sampler import HYBRID, MONOLITHIC, SamplePlan
from nd_jax.pyramid.schedule import Schedule
from nd_jax.recipes.preset import VideoConfig
from nd_jax.weights import shipped_folder

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
    sampling: SamplePlan
    schedule: Schedule = dataclasses.field(default_factory=Schedule)
    folder: Path | None = None
    mode: str = "monolithic"
    """Whose folder names the denoiser has: "monolithic", or "hybrid", which continues a given first frame."""
    kept_blocks: tuple[int, ...] | None = None
    """Of a pruned denoiser: which blocks of the original one it has."""
    compute: Any = jnp.float32
    """What the networks compute in, whatever their parameters are kept in."""

    @cached_property
    def definitions(self) -> dict[str, Definition]:
        return self.config.definitions(self.compute)

    @cached_property
    def on_device(self) -> dict[str, Params]:
        """The parameters, copied to the device once; ``params`` may lie on the host."""
        return jax.tree.map(jnp.asarray, self.params)

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
        warnings = dict.fromkeys(t5.warnings + clip.warnings + clip_2.warnings)
        return TextTokens(t5.ids, t5.mask, clip.ids, clip_2.ids), list(warnings)

    def conditions(self, prompts: Sequence[str]) -> tuple[Conditions, list[str]]:
        """What the denoiser reads of the prompts, and warnings for those that were cut."""
        tokens, warnings = self.tokens(prompts)
        text_params = {name: self.on_device[name] for name in TEXT_PARTS if name in self.params}
        return self._encode_text(text_params, TextTokens(*map(jnp.asarray, tokens))), warnings


def text_tokenizers(root: Mapping[str, Path], video: VideoConfig) -> dict[str, TextTokenizer]:
    """The tokenizers that are there, cut to the preset's lengths."""
    lengths = {"t5": video.text_length, "clip": video.clip_length, "clip_2": video.clip_length}
    return {
        name: TextTokenizer.from_folder(root[folder], max_length=lengths[name])
        for name, folder in TOKENIZERS.items()
        if folder in root
    }


def check_vocabularies(tokenizers: Mapping[str, TextTokenizer], config: SystemConfig) -> None:
    """Raises UserError for a tokenizer with more ids than its network has embeddings: they would read as others."""
    for name, part in (("t5", T5), ("clip", CLIP_1), ("clip_2", CLIP_2)):
        network = getattr(config, part)
        if name in tokenizers and network is not None and tokenizers[name].vocab_size > network.vocab_size:
            raise UserError(
                f"{TOKENIZERS[name]} has {tokenizers[name].vocab_size} ids and {part} {network.vocab_size} embeddings; "
                "expected no more ids than embeddings: these folders do not belong together"
            )


def check_parts(config: SystemConfig, where: str | Path) -> None:
    """Raises UserError when the networks do not fit each other, naming both sides."""
    denoiser, t5, adapter = config.diffusion_transformer, config.text_encoder_3, config.context_adapter
    pairs = [("codec's latent channels", config.causal_video_vae.encoder_out_channels, denoiser.in_channels)]
    if config.text_encoder is not None and config.text_encoder_2 is not None:
        pooled = config.text_encoder.projection_dim + config.text_encoder_2.projection_dim
        pairs.append(("CLIP towers' projections together", pooled, denoiser.pooled_projection_dim))
    if t5 is not None:
        text = t5.d_model if t5.out_dim is None else t5.out_dim
        if adapter is not None:
            pairs.append((f"{T5}'s output", text, adapter.input_dims))
            text = adapter.output_dims
        wanted = denoiser.joint_attention_dim if denoiser.context_embedder else denoiser.width
        pairs.append(("text states", text, wanted))
    for what, found, expected in pairs:
        if found != expected:
            raise UserError(f"{where}: the {what} have {found} channels, the next network expects {expected}")


LIMITS = {
    "video": {"height": 8192, "width": 8192, "frames": 1 << 16, "fps": 1000, "text_length": 8192, "clip_length": 8192},
    "schedule": {"stages": 8, "num_train_timesteps": 1 << 20},
}
"""Largest values that a folder may ask for: it is somebody else's."""


def folder_defaults(folder: Folder, mode: str) -> tuple[VideoConfig, SamplePlan, Schedule]:
    """Size, length, sampling and schedule that a folder's videos are meant for. Raises UserError."""
    path = folder.path / DEFAULTS
    if not path.exists():
        return VideoConfig(), HYBRID if mode == "hybrid" else MONOLITHIC, Schedule()
    content = read_json(path, what="generation defaults")
    parts = {name: _tuples(content.get(name, {}), f"{path}: {name}") for name in ("video", "sampling", "schedule")}
    for name, limits in LIMITS.items():
        for key, limit in limits.items():
            value = parts[name].get(key, 1)
            if type(value) is not int or not 1 <= value <= limit:
                raise UserError(f"{path}: {name} {key} is {value!r}; expected a whole number from 1 to {limit}")
    try:
        sampling = dataclasses.replace(MONOLITHIC, **parts["sampling"])
        if not all(math.isfinite(scale) for scale in (sampling.first_guidance, sampling.later_guidance)):
            raise ValueError("guidance is not finite")
        return VideoConfig(**parts["video"]), sampling, Schedule(**parts["schedule"])
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} is not a generation config: {error}") from None


def _tuples(content: Any, where: str) -> dict[str, Any]:
    """A JSON object with tuples, which configs want, in place of lists."""
    if not isinstance(content, dict):
        raise UserError(f"{where} is {content!r}; expected an object")
    return {key: tuple(value) if isinstance(value, list) else value for key, value in content.items()}


def _denoiser_name(folder: Folder, mode: str | None) -> str:
    """The denoiser's folder: one with an official name, or the only one (Pyramid-Flow has its own names)."""
    found = [name for name, kind in folder.kinds.items() if kind == "mmdit"]
    if mode is None and len(found) == 1:
        return found[0]
    return folder.name_of(DENOISER, mode)


def load_system(path: str | Path, *, mode: str | None = None, dtype: str | None = "fp32") -> VideoSystem:
    """Load an official-layout folder (hybrid, monolithic or Pyramid-Flow's).

    Args:
        path: the folder, or the name of weights that the package brings along.
        mode: "hybrid" or "monolithic" where the folder holds both denoisers.
        dtype: dtype of the parameters in memory; ``None`` keeps what is stored.

    Raises:
        UserError: for anything wrong in the folder, and if it has no denoiser or no codec.
    """
    path = shipped_folder(path)
    folder = load_folder(path)
    roles = {DENOISER: _denoiser_name(folder, mode), CODEC: folder.name_of(CODEC)}
    roles |= {name: folder.name_of(name, mode) for name in TEXT_PARTS if folder.has(name, mode)}
    configs, params = {}, {}
    for name, component in roles.items():
        configs[name], params[name] = folder.load(component, dtype=dtype)
    mode = "hybrid" if roles[DENOISER] == MODES["hybrid"][DENOISER] else "monolithic"
    system = SystemConfig(**configs)
    video, sampling, schedule = folder_defaults(folder, mode)
    towers = [tower.max_position_embeddings for tower in (system.text_encoder, system.text_encoder_2) if tower]
    video = dataclasses.replace(video, clip_length=min([video.clip_length, *towers]))
    tokenizers = text_tokenizers(folder.tokenizers, video)
    check_parts(system, path)
    check_vocabularies(tokenizers, system)
    kept = read_record(folder.path, system.diffusion_transformer.num_layers)
    return VideoSystem(system, params, tokenizers, video, sampling, schedule, Path(path), mode, kept)


def codec_folder(path: str | Path) -> Path:
    """Where a codec lies: ``path`` itself, or inside it if that is a system's folder or the name of shipped weights."""
    folder = shipped_folder(path)
    return folder / CODEC if (folder / CODEC).is_dir() else folder


def save_system(
    path: str | Path,
    system: VideoSystem,
    tokenizers: Mapping[str, Path],
    *,
    dtype: str | None = "fp32",
    overwrite: bool = False,
) -> Path:
    """Write a system as an official-layout PyTorch folder, tokenizers and defaults included.

    The latent constants of a codec of our own are in its config.json; the official pipeline hard-codes its own.
    """
    names = MODES[system.mode]
    with write_folder(path, dtype=dtype, overwrite=overwrite) as writer:
        for name, params in system.params.items():
            writer.component(names.get(name, name), getattr(system.config, name), params)
        for name, source in tokenizers.items():
            writer.tokenizer(name, source)
        if system.kept_blocks is not None:
            writer.json(RECORD, record(system.kept_blocks))
        writer.json(
            DEFAULTS,
            {
                "video": dataclasses.asdict(system.video),
                "sampling": dataclasses.asdict(system.sampling),
                "schedule": dataclasses.asdict(system.schedule),
            },
        )
    return Path(path)
