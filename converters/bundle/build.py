"""A checkpoint's float32 bundle: graphs, each checked against JAX, host tables, tokenizers, manifest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nd_jax.converters.bundle.picture import upscaler_section, write_picture
from nd_jax.converters.bundle.sections import (
    TOKENIZERS,
    codec_section,
    denoiser_section,
    latent_section,
    loading_section,
    sampling_section,
    text_section,
)
from nd_jax.converters.bundle.writer import BundleWriter
from nd_jax.converters.folders import read_tokenizer
from nd_jax.converters.graphs import host, t5
from nd_jax.converters.graphs.parity import check_part
from nd_jax.converters.graphs.parts import TEXT, Part, system_parts
from nd_jax.converters.graphs.picture_parts import Picture, Upscaler, picture_parts, upscaler_part
from nd_jax.errors import UserError
from nd_jax.models.system import CLIP_1, CLIP_2, DENOISER, T5, SystemConfig
from nd_jax.pyramid.layout import Envelope
from nd_jax.pyramid.normalise import LatentStats
from nd_jax.pyramid.sampler import SamplePlan
from nd_jax.pyramid.schedule import Schedule

PROBE = "A small red circle drifts to the upper left, over snow white; it's 2 o'clock!"
"""A text whose ids go into the manifest."""


@dataclass(frozen=True)
class Source:
    """What a bundle is made from. ``tokenizers``: folder by text encoder; ``lengths``: tokens by text encoder;
    ``probes``: ids of ``PROBE`` by text encoder; ``video``: height, width, frames, fps; ``about``: free words;
    ``picture``, ``upscaler``: what makes the first frame and what enlarges frames, if anything does."""

    config: SystemConfig
    params: Mapping[str, Any]
    stats: LatentStats
    schedule: Schedule
    plan: SamplePlan
    envelopes: tuple[Envelope, ...]
    latent_frames: int
    video: Mapping[str, Any]
    tokenizers: Mapping[str, Path]
    lengths: Mapping[str, int]
    probes: Mapping[str, list[int]]
    about: Mapping[str, Any]
    picture: Picture | None = None
    upscaler: Upscaler | None = None

    def parts(self) -> Iterator[Part]:
        """Every graph, in the order of their names in the manifest."""
        length = min(self.lengths[CLIP_1], self.lengths[CLIP_2])
        shared = {} if self.picture is None else self.picture.shared
        arguments = self.config, self.params, self.envelopes, self.lengths[T5], length
        yield from system_parts(*arguments, penultimate=shared.values())
        if self.picture is not None:
            yield from picture_parts(self.picture)
        if self.upscaler is not None:
            yield upscaler_part(self.upscaler)


def write_float_bundle(
    folder: Path, source: Source, *, check: bool = True, say: Callable[[str], None] = lambda line: None
) -> BundleWriter:
    """Write everything but the manifest into an empty folder. ``say`` gets one line per graph.

    Raises UserError for a system without text encoders, and for a graph that is not its network (with ``check``).
    """
    config, params = source.config, source.params
    missing = [name for name in (T5, CLIP_1, CLIP_2) if name not in params or name not in source.tokenizers]
    if missing:
        raise UserError(f"no bundle without {', '.join(missing)} and its tokenizer: the runtime reads prompts")
    for name in (CLIP_1, CLIP_2):
        if not getattr(config, name).with_projection:
            raise UserError(f"{name} has no projection; expected a CLIPTextModelWithProjection")
    writer = BundleWriter(folder)
    for part in source.parts():
        path = writer.graph(part.graph, precision=part.precision, data=part.data)
        told = f"{part.name}: {len(part.graph.nodes)} nodes, {weight_count(part.graph) / 1e6:.2f} M weights"
        if check:
            found = check_part(part, path)
            writer.content["graphs"][part.name]["snr"]["fp32_to_jax"] = round(min(found, 999.0), 2)
            told += f", {found:.1f} dB to JAX"
        say(told)
    write_tables(writer, source)
    for name, tokenizer in source.tokenizers.items():
        writer.tokenizer(TOKENIZERS[name][0], read_tokenizer(tokenizer))
    texts = [name for name in writer.content["graphs"] if name in (T5, CLIP_1, CLIP_2, TEXT)]
    probes = {name: {"text": PROBE, "ids": ids} for name, ids in source.probes.items()}
    writer.content |= {
        "about": dict(source.about),
        "video": dict(source.video),
        "text": text_section(config, source.lengths, probes),
        "latent": latent_section(config, source.stats, source.latent_frames),
        "denoiser": denoiser_section(config, source.schedule, source.envelopes, writer.content["graphs"]),
        "sampling": sampling_section(source.plan),
        "codec": codec_section(config),
        "schedule": loading_section(list(writer.content["graphs"]), texts),
    }
    if source.picture is not None:
        write_picture(writer, source.picture, PROBE)
    if source.upscaler is not None:
        writer.content["upscaler"] = upscaler_section(source.upscaler.config)
    return writer


def weight_count(graph: Any) -> int:
    """Elements of a graph's float weights."""
    return sum(int(np.prod(w.shape)) for name, w in graph.weights.items() if not name.startswith("integers/"))


def write_tables(writer: BundleWriter, source: Source) -> None:
    """Embeddings of the text encoders and positions of the denoiser's tokens."""
    writer.table(f"{T5}/embedding", t5.embedding_table(source.params[T5]))
    for name in (CLIP_1, CLIP_2):
        tables = source.params[name]["text_model"]["embeddings"]
        writer.table(f"{name}/embedding", np.asarray(tables["token_embedding"]["embedding"], np.float32))
        writer.table(f"{name}/positions", np.asarray(tables["position_embedding"]["embedding"], np.float32))
    if DENOISER in source.params:
        for envelope in source.envelopes:
            table = host.position_table(source.config.diffusion_transformer, envelope)
            writer.table(f"positions/{envelope.stage}", table)
