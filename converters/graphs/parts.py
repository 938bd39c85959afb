"""All graphs of a system at one video size, each with a way to check it against the JAX network it came from."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from nd_jax.converters.bundle.analysis import of_graph
from nd_jax.converters.graphs import references
from nd_jax.converters.graphs.adapter import adapter_graph, embedder_graph
from nd_jax.converters.graphs.attention import WHOLE_MASK
from nd_jax.converters.graphs.builder import Graph
from nd_jax.converters.graphs.clip import clip_graph
from nd_jax.converters.graphs.conditioning import conditioning_graph
from nd_jax.converters.graphs.mmdit import stage_graph
from nd_jax.converters.graphs.native_decoder import native_decoder_graph
from nd_jax.converters.graphs.t5 import t5_graph
from nd_jax.converters.graphs.taehv import decoder_graph
from nd_jax.converters.graphs.vae_encoder import encoder_graph
from nd_jax.models.causal_vae import NativeVAEConfig
from nd_jax.models.mmdit import MMDiTConfig
from nd_jax.models.system import ADAPTER, CLIP_1, CLIP_2, CODEC, DENOISER, T5, SystemConfig
from nd_jax.pyramid.layout import Envelope

Precision = Literal["fp16", "w8a16"]
Arrays = dict[str, np.ndarray]
TEXT, CONDITIONING, ENCODER, DECODER, FIRST_DECODER = (
    "adapter",
    "conditioning",
    "vae_encoder",
    "decoder",
    "decoder_first",
)


def stage_name(stage: int) -> str:
    """Name of a stage's graph."""
    return f"denoiser_stage{stage}"


@dataclass(frozen=True)
class Part:
    """One graph. ``precision``: what it is meant to run in; ``data``: stem of its external-data file, which graphs of
    equal weights share; ``sample(rng)``: plausible inputs and what the JAX network answers."""

    name: str
    graph: Graph
    precision: Precision
    data: str
    sample: Callable[[np.random.Generator], tuple[Arrays, Arrays]]


def text_parts(
    config: SystemConfig,
    params: Mapping[str, Any],
    text_length: int,
    clip_length: int,
    penultimate: Collection[str] = (),
) -> Iterator[Part]:
    """Text encoders and what brings their states to the denoiser's width. Towers of ``penultimate`` also give their
    last-but-one states, for the first frame."""
    t5 = config.text_encoder_3
    if t5 is not None:
        sample = references.t5(t5, params[T5], text_length)
        yield Part(T5, t5_graph(t5, params[T5], text_length), "fp16", T5, sample)
    for name in (CLIP_1, CLIP_2):
        tower = getattr(config, name)
        if tower is not None:
            also = name in penultimate
            sample = references.clip(tower, params[name], clip_length, penultimate=also)
            graph = clip_graph(tower, params[name], clip_length, name, penultimate=also)
            yield Part(name, graph, "fp16", name, sample)
    if config.context_adapter is not None:
        graph = adapter_graph(config.context_adapter, params[ADAPTER], text_length, TEXT)
        sample = references.adapter(config.context_adapter, params[ADAPTER], text_length)
        yield Part(TEXT, graph, "fp16", TEXT, sample)
    elif config.diffusion_transformer.context_embedder:
        graph = embedder_graph(params[DENOISER], text_length, TEXT)
        yield Part(TEXT, graph, "fp16", TEXT, references.embedder(params[DENOISER], text_length))


def denoiser_parts(config: SystemConfig, params: Mapping[str, Any], envelopes: Sequence[Envelope]) -> Iterator[Part]:
    """Conditioning and one graph per stage, over the same weights."""
    network, tree = config.diffusion_transformer, params[DENOISER]
    graph = conditioning_graph(network, tree, CONDITIONING)
    yield Part(CONDITIONING, graph, "w8a16", CONDITIONING, references.conditioning(network, tree))
    for envelope in envelopes:
        graph = lighter_stage_graph(network, tree, envelope, stage_name(envelope.stage))
        sample = references.stage(network, tree, envelope, split=WHOLE_MASK not in graph.inputs)
        yield Part(graph.name, graph, "w8a16", "denoiser", sample)


def lighter_stage_graph(config: MMDiTConfig, params: Mapping[str, Any], envelope: Envelope, name: str) -> Graph:
    """The stage's graph with attention split by query clip, or under one mask, whichever moves fewer bytes: cutting
    keys for many short clips costs more than it saves."""
    graphs = [stage_graph(config, params, envelope, name, split=split) for split in (True, False)]
    return min(graphs, key=lambda graph: of_graph(graph).value_bytes)


def codec_parts(config: SystemConfig, params: Mapping[str, Any], height: int, width: int) -> Iterator[Part]:
    """The encoder for a given first frame and the streaming decoder; sizes are the latent's."""
    codec, tree = config.causal_video_vae, params[CODEC]
    pixels = (height * codec.space_scale, width * codec.space_scale)
    yield Part(
        ENCODER,
        encoder_graph(codec, tree, *pixels, ENCODER),
        "w8a16",
        ENCODER,
        references.encoder(codec, tree, *pixels),
    )
    if not isinstance(codec, NativeVAEConfig):
        graph = decoder_graph(codec, tree, height, width, DECODER)
        yield Part(DECODER, graph, "w8a16", DECODER, references.decoder(codec, tree, height, width, first=False))
        return
    for name, first in ((FIRST_DECODER, True), (DECODER, False)):
        graph = native_decoder_graph(codec, tree, height, width, first=first, name=name)
        # The first graph has only the last time slices of the kernels: its weights are not the other's.
        yield Part(name, graph, "w8a16", name, references.decoder(codec, tree, height, width, first=first))


def system_parts(
    config: SystemConfig,
    params: Mapping[str, Any],
    envelopes: Sequence[Envelope],
    text_length: int,
    clip_length: int,
    penultimate: Collection[str] = (),
) -> Iterator[Part]:
    """Every graph of a system, in the order in which a video needs them."""
    yield from text_parts(config, params, text_length, clip_length, penultimate)
    yield from denoiser_parts(config, params, envelopes)
    yield from codec_parts(config, params, envelopes[-1].height, envelopes[-1].width)
