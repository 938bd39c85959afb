"""A hybrid folder's first-frame networks and super-resolution, as a bundle's graphs are made from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from nd_jax import first_frame
from nd_jax.converters.bundle.build import PROBE
from nd_jax.converters.folders import Folder, load_folder, read_tokenizer
from nd_jax.converters.graphs.picture_parts import IMAGE_DECODER, TOWERS, UNET, Picture, Upscaler
from nd_jax.errors import UserError
from nd_jax.hybrid import UPSCALER
from nd_jax.models.system import CLIP_1, CLIP_2
from nd_jax.parts import FolderParts
from nd_jax.system import VideoSystem

SYSTEM_TOWERS = {CLIP_1: "clip", CLIP_2: "clip_2"}
"""The video system's own towers and their tokenizers' names."""


def folder_picture(folder: Folder, system: VideoSystem, height: int, width: int) -> Picture | None:
    """What makes first frames for videos of that size; ``None`` for a folder without any of it.

    Raises UserError if only some of the networks are there, or if they do not fit each other or the size.
    """
    parts = FolderParts(folder)
    missing = [name for name in first_frame.NAMES if not parts.has(name)]
    if len(missing) == len(first_frame.NAMES):
        return None
    if missing:
        raise UserError(f"{folder.path} has no {', '.join(missing)}; first frames need these folders beside the others")
    first_frame.check(parts, height, width)
    configs, folders = [parts.config(name) for name in first_frame.TOWERS], list(first_frame.TOWERS.values())
    readers = [
        parts.tokenizer(name, config.max_position_embeddings) for name, config in zip(folders, configs, strict=True)
    ]
    return Picture(
        towers=tuple(configs),
        unet=parts.config(first_frame.UNET),
        decoder=parts.config(first_frame.VAE),
        height=height * first_frame.ENLARGED,
        width=width * first_frame.ENLARGED,
        steps=first_frame.STEPS,
        load=partial(load_network, parts),
        tokenizers=tuple(reader.folder for reader in readers),
        probes=tuple(reader([PROBE]).ids[0].tolist() for reader in readers),
        shared=shared_towers(parts, system, readers),
    )


def load_network(parts: FolderParts, graph: str) -> Mapping[str, Any]:
    """Parameters of a graph's network."""
    if graph == UNET:
        return parts.load(first_frame.UNET)
    if graph == IMAGE_DECODER:
        wanted = ["decoder", *(["post_quant_conv"] if parts.config(first_frame.VAE).use_post_quant_conv else [])]
        return parts.load(first_frame.VAE, wanted)
    return parts.load(list(first_frame.TOWERS)[TOWERS.index(graph)])


def shared_towers(parts: FolderParts, system: VideoSystem, readers: Sequence[Any]) -> dict[str, str]:
    """The picture's towers whose weights, tokenizer and length are those of a tower of the video system."""
    found = {}
    for tower, official, own, reader in zip(TOWERS, first_frame.TOWERS, SYSTEM_TOWERS, readers, strict=True):
        mine, config = getattr(system.config, own), parts.config(official)
        tokenizer = system.tokenizers.get(SYSTEM_TOWERS[own])
        if mine is None or tokenizer is None or tokenizer.max_length != reader.max_length:
            continue
        keys = ("text_model", "text_projection")
        if tower == TOWERS[0]:  # the picture reads its last-but-one states alone: the projection does not matter
            keys = keys[:1]
            mine, config = (dataclasses.replace(c, with_projection=False, projection_dim=0) for c in (mine, config))
        if mine == config and read_tokenizer(tokenizer.folder) == read_tokenizer(reader.folder):
            theirs, ours = ({key: tree[key] for key in keys} for tree in (parts.load(official), system.params[own]))
            pairs = zip(jax.tree.leaves(theirs), jax.tree.leaves(ours), strict=True)
            if all(np.array_equal(*pair) for pair in pairs):
                found[tower] = own
    return found


def folder_upscaler(folder: Folder | None, given: Path | None, height: int, width: int) -> Upscaler | None:
    """Super-resolution from the folder ``given``, or a checkpoint folder's own, if it has one."""
    if given is None and (folder is None or UPSCALER not in folder.components):
        return None
    source = folder if given is None else load_folder(given)
    parts = FolderParts(source, elsewhere={} if given is None else {UPSCALER: given})
    return Upscaler(parts.config(UPSCALER), parts.load(UPSCALER), height, width)


def picture_and_upscaler(
    system: VideoSystem, height: int, width: int, super_resolution: Path | None = None
) -> dict[str, Any]:
    """``picture`` and ``upscaler`` of a ``Source``: a hybrid folder's own, and super-resolution where it is named."""
    folder = None
    if system.mode == "hybrid" and system.folder is not None:
        folder = load_folder(system.folder)
    picture = None if folder is None else folder_picture(folder, system, height, width)
    return {"picture": picture, "upscaler": folder_upscaler(folder, super_resolution, height, width)}
