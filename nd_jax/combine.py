"""The whole student: a denoiser, a text encoder and a decoder that were distilled apart, in one system."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from nd_jax.decoder_workflow import replace_decoder
from nd_jax.errors import UserError
from nd_jax.models.codec_config import CodecConfig
from nd_jax.models.functional import Params
from nd_jax.models.system import ADAPTER, CLIP_1, CLIP_2, DENOISER, T5
from nd_jax.system import VideoSystem, load_system, save_system
from nd_jax.text_workflow import with_student


def combine(
    denoiser: VideoSystem, *, text: VideoSystem | None = None, codec: tuple[CodecConfig, Params] | None = None
) -> VideoSystem:
    """``denoiser``'s system (its sampling plan and blocks included) with the text student of ``text`` and the decoder
    of ``codec``. The denoiser may have been pruned and given fewer steps after the text student was distilled.

    Raises UserError for a text system without an adapter, of another denoiser's text space or with other CLIP towers,
    and for a decoder that was distilled from another codec.
    """
    system = denoiser
    if text is not None:
        encoder, adapter = text.config.text_encoder_3, text.config.context_adapter
        where = text.folder or "text student"
        if encoder is None or adapter is None:
            raise UserError(f"{where} has no text student; expected the system of a run that distilled a text encoder")
        for tower in (CLIP_1, CLIP_2):
            pairs = jax.tree.leaves(text.params[tower]), jax.tree.leaves(system.params[tower])
            same = len(pairs[0]) == len(pairs[1]) and all(map(np.array_equal, *pairs))
            if not same or getattr(text.config, tower) != getattr(system.config, tower):
                raise UserError(
                    f"{where}: {tower} is not that of {denoiser.folder or 'the denoiser'}; expected the same"
                )
        # A student in "extend" mode stands in front of the embedder, which its denoiser keeps.
        mode = "extend" if text.config.diffusion_transformer.context_embedder else "replace"
        networks = {T5: text.params[T5], ADAPTER: text.params[ADAPTER]}
        system = with_student(system, encoder, adapter, networks, mode=mode)
        tokens = min(text.video.text_length, system.video.text_length)
        if tokens < system.video.text_length:
            raise UserError(
                f"{where} reads {tokens} tokens, {denoiser.folder} {system.video.text_length}; expected as many"
            )
    return system if codec is None else replace_decoder(system, *codec)


def write_combined(
    path: Path, system: VideoSystem, tokenizers: Mapping[str, Path], *, overwrite: bool = False
) -> VideoSystem:
    """Export in the official layout and read it back, which must give the same numbers.

    Raises UserError if anything is another after the way through the folder.
    """
    again = load_system(save_system(path, system, tokenizers, overwrite=overwrite))
    wanted = dataclasses.replace(system.config, causal_video_vae=again.config.causal_video_vae)
    same = again.config == wanted and (again.sampling, again.kept_blocks) == (system.sampling, system.kept_blocks)
    for name, params in system.params.items():
        leaves = jax.tree.leaves(params), jax.tree.leaves(again.params[name])
        same &= len(leaves[0]) == len(leaves[1]) and all(map(np.array_equal, *leaves))
    if not same:
        raise UserError(f"{path}: read back it is not what was written ({DENOISER} or another part); do not use it")
    return again
