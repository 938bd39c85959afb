"""Graphs of a configuration without any numbers: all that can be counted of the paper's pipeline at full size."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nd_jax.converters.bundle.analysis import Counts, of_graph
from nd_jax.converters.graphs.conditioning import conditioning_graph
from nd_jax.converters.graphs.mmdit import stage_graph
from nd_jax.converters.graphs.parts import Part, system_parts
from nd_jax.converters.graphs.picture_parts import (
    IMAGE_DECODER,
    TOWERS,
    UNET,
    Picture,
    Upscaler,
    picture_parts,
    upscaler_part,
)
from nd_jax.converters.graphs.taehv import decoder_graph
from nd_jax.models import causal_vae, clip, image_vae, mmdit, quicksrnet, unet
from nd_jax.models.causal_vae import AsymmetricVAEConfig
from nd_jax.models.clip import clip_bigg, clip_l
from nd_jax.models.context_adapter import ContextAdapterConfig
from nd_jax.models.image_vae import ImageVAEConfig
from nd_jax.models.mmdit import MMDiTConfig
from nd_jax.models.quicksrnet import QuickSRNetConfig
from nd_jax.models.system import SystemConfig
from nd_jax.models.t5 import T5Config
from nd_jax.models.unet import UNetConfig
from nd_jax.pyramid.layout import Envelope, envelopes


class DenoiserCosts(NamedTuple):
    """Counts of the conditioning graph and of every stage, its attention split by query clip or masked as a whole."""

    conditioning: Counts
    split: list[Counts]
    whole: list[Counts]

    def calls(self, units: int = 6) -> int:
        """Denoiser calls of a video with one step per stage, the first frame given."""
        return units * len(self.split)

    def lines(self) -> list[str]:
        """For people; 8-bit weights and 16-bit values."""
        kept, apart = self.split[0].parameters, self.conditioning.parameters
        told = [
            f"weights per denoiser call: {(kept + apart) / 1e9:.3f} G with conditioning, {kept / 1e9:.3f} G without",
            f"conditioning: {apart / 1e9:.3f} G weights, {apart / (kept + apart):.1%}, read {len(self.split)} times a "
            f"video instead of {self.calls()}: {apart * self.calls() / 1e9:.1f} GB of reading become "
            f"{apart * len(self.split) / 1e9:.1f} GB",
        ]
        for stage, (a, b) in enumerate(zip(self.split, self.whole, strict=True)):
            told.append(
                f"stage {stage}: {a.macs / 1e9:.0f} GMAC, values moved {a.value_bytes / 1e6:.0f} MB, of them scores "
                f"{a.attention_bytes / 1e6:.0f} MB; with one mask {b.macs / 1e9:.0f} GMAC, "
                f"{b.value_bytes / 1e6:.0f} MB, {b.attention_bytes / 1e6:.0f} MB"
            )
        return told


def denoiser_costs(config: MMDiTConfig | None = None, layouts: tuple[Envelope, ...] | None = None) -> DenoiserCosts:
    """Of a configuration (default: the full-size student, 49 frames of 320x512)."""
    config = MMDiTConfig() if config is None else config
    layouts = envelopes(6, 128, 40, 64) if layouts is None else layouts
    params = mmdit.definition(config).abstract()
    split, whole = (
        [of_graph(stage_graph(config, params, each, "stage", split=kind)) for each in layouts] for kind in (True, False)
    )
    return DenoiserCosts(of_graph(conditioning_graph(config, params)), split, whole)


def decoder_costs(config: AsymmetricVAEConfig | None = None, height: int = 40, width: int = 64) -> Counts:
    """Of one latent frame through the tiny decoder."""
    config = AsymmetricVAEConfig() if config is None else config
    params = causal_vae.definition(config, half="decoder").abstract()
    return of_graph(decoder_graph(config, params, height, width))


def layout_bytes(counts: Counts) -> int:
    """Bytes of layout copies that remain where the compiler works channels-last."""
    return int(np.sum([size for _, size in counts.layout.values()], dtype=np.int64)) - counts.boundary_bytes


VIDEO = {"height": 320, "width": 512, "frames": 49, "fps": 24}
"""The paper's videos, before super-resolution."""
TEXT_LENGTH, CLIP_LENGTH, STEPS, ENLARGED = 128, 77, 4, 2


def full_size_parts() -> Iterator[Part]:
    """Every graph of the paper's hybrid pipeline, weights as shapes alone. The picture's text towers are taken as
    graphs of their own, as if they were not the video system's."""
    config = SystemConfig(
        diffusion_transformer=MMDiTConfig(),
        causal_video_vae=AsymmetricVAEConfig(),
        text_encoder=clip_l(),
        text_encoder_2=clip_bigg(),
        text_encoder_3=T5Config(),
        context_adapter=ContextAdapterConfig(),
    )
    params = {name: network.abstract() for name, network in config.definitions().items()}
    height, width = VIDEO["height"], VIDEO["width"]
    space = config.causal_video_vae.space_scale
    layouts = envelopes(6, TEXT_LENGTH, height // space, width // space)
    yield from system_parts(config, params, layouts, TEXT_LENGTH, CLIP_LENGTH)
    yield from picture_parts(full_size_picture())
    network = QuickSRNetConfig()
    yield upscaler_part(Upscaler(network, quicksrnet.definition(network).abstract(), height, width))


def full_size_picture() -> Picture:
    """The first frame at twice the video's size, in four steps, without numbers."""
    towers, network, decoder = (clip_l(), clip_bigg()), UNetConfig(), ImageVAEConfig()

    def load(graph: str) -> Mapping[str, Any]:
        makers = {UNET: unet.definition(network), IMAGE_DECODER: image_vae.definition(decoder, half="decoder")}
        return (makers[graph] if graph in makers else clip.definition(towers[TOWERS.index(graph)])).abstract()

    return Picture(
        towers=towers,
        unet=network,
        decoder=decoder,
        height=VIDEO["height"] * ENLARGED,
        width=VIDEO["width"] * ENLARGED,
        steps=STEPS,
        load=load,
        tokenizers=(Path(), Path()),
        probes=([], []),
        shared={},
    )
