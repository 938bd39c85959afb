"""Graphs of the first frame (SSD-1B: text towers, UNet, image decoder) and of super-resolution."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nd_jax.converters.graphs import picture_references, references
from nd_jax.converters.graphs.clip import clip_graph
from nd_jax.converters.graphs.image_decoder import image_decoder_graph
from nd_jax.converters.graphs.parts import Part
from nd_jax.converters.graphs.quicksrnet import quicksrnet_graph
from nd_jax.converters.graphs.unet import unet_graph
from nd_jax.models.clip import CLIPTextConfig
from nd_jax.models.image_vae import ImageVAEConfig
from nd_jax.models.quicksrnet import MARGIN, QuickSRNetConfig
from nd_jax.models.unet import UNetConfig

TOWERS = ("picture_text_encoder", "picture_text_encoder_2")
UNET, IMAGE_DECODER, UPSCALER = "unet", "image_decoder", "upscaler"


@dataclass(frozen=True)
class Picture:
    """Networks that make the first frame, ``height`` x ``width`` pixels in ``steps`` latent-consistency steps.

    ``towers``, ``tokenizers``, ``probes`` belong to ``TOWERS``; ``load`` gives the parameters of a graph by its name.
    ``shared``: towers whose weights, tokenizer and length are those of a text encoder of the video system, by name:
    they have no graph of their own.
    """

    towers: tuple[CLIPTextConfig, CLIPTextConfig]
    unet: UNetConfig
    decoder: ImageVAEConfig
    height: int
    width: int
    steps: int
    load: Callable[[str], Mapping[str, Any]]
    tokenizers: tuple[Path, Path]
    probes: tuple[list[int], list[int]]
    shared: Mapping[str, str]

    @property
    def latent(self) -> tuple[int, int, int]:
        """Height, width and channels of the UNet's latent."""
        scale = self.decoder.space_scale
        return self.height // scale, self.width // scale, self.unet.in_channels


@dataclass(frozen=True)
class Upscaler:
    """A super-resolution network for frames of the video's ``height`` x ``width``."""

    config: QuickSRNetConfig
    params: Mapping[str, Any]
    height: int
    width: int


def picture_parts(picture: Picture) -> Iterator[Part]:
    """In the order in which a first frame needs them; parameters are loaded as their graph's turn comes."""
    for index, name in enumerate(TOWERS):
        if name not in picture.shared:
            config, params, last = picture.towers[index], picture.load(name), name == TOWERS[-1]
            length = config.max_position_embeddings
            graph = clip_graph(config, params, length, name, penultimate=True, pooled=last)
            yield Part(
                name, graph, "fp16", name, references.clip(config, params, length, penultimate=True, pooled=last)
            )
    params, (height, width, _) = picture.load(UNET), picture.latent
    length = picture.towers[0].max_position_embeddings
    graph = unet_graph(picture.unet, params, height, width, length, UNET)
    sample = picture_references.unet(picture.unet, params, height, width, length)
    yield Part(UNET, graph, "w8a16", UNET, sample)
    params = picture.load(IMAGE_DECODER)
    graph = image_decoder_graph(picture.decoder, params, height, width, IMAGE_DECODER)
    sample = picture_references.image_decoder(picture.decoder, params, height, width)
    yield Part(IMAGE_DECODER, graph, "w8a16", IMAGE_DECODER, sample)


def upscaler_part(upscaler: Upscaler) -> Part:
    """Takes a frame with the margin that ``quicksrnet.enlarge`` adds on every side."""
    size = upscaler.height + 2 * MARGIN, upscaler.width + 2 * MARGIN
    graph = quicksrnet_graph(upscaler.config, upscaler.params, *size, UPSCALER)
    sample = picture_references.upscaler(upscaler.config, upscaler.params, *size)
    return Part(UPSCALER, graph, "w8a16", UPSCALER, sample)
