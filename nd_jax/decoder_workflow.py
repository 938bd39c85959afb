"""Asymmetric decoder distillation from folder to folder: a codec's encoder stays, its decoder becomes a smaller one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nd_jax.converters.component import load_component, save_component
from nd_jax.converters.folders import load_folder
from nd_jax.converters.safetensors_io import TensorFile
from nd_jax.data.buckets import Size
from nd_jax.datasets import open_data
from nd_jax.decoder_clips import SHARES, held_out_clips, training_source
from nd_jax.decoder_report import compare_decoders, encode, write_figures
from nd_jax.errors import UserError
from nd_jax.models.causal_vae import AsymmetricVAEConfig
from nd_jax.models.codec_config import CodecConfig
from nd_jax.models.functional import Params
from nd_jax.models.system import CODEC
from nd_jax.recipes.coarse_start import check_room, fit_colours
from nd_jax.recipes.decoder_distillation import ENCODER, DecoderRecipe, codec_params
from nd_jax.recipes.feeds import Feed
from nd_jax.recipes.perceptual import lpips_params
from nd_jax.recipes.preset import DecoderRun, Preset, as_settings
from nd_jax.system import VideoSystem, latent_stats, load_system, save_system
from nd_jax.training.checkpoint import load_tree
from nd_jax.training.cluster import once
from nd_jax.training.hooks import sharding_hooks
from nd_jax.training.loop import Outcome, train
from nd_jax.training.mesh import make_mesh
from nd_jax.training.paths import named_leaves
from nd_jax.workflow import process_batches

FIT_CLIPS = 24
"""Clips that the coarse start is fitted to."""
FIGURES = "decoders.json"
LPIPS_LIMIT = 1 << 30
"""Bytes of an LPIPS weights file; VGG16's trunk has 59 MB."""


def with_constants(config: CodecConfig) -> CodecConfig:
    """The config with its latent constants written out: where there are none, official codecs of different classes
    mean different ones, and a new decoder must not change what its latents are normalised with."""
    if config.latents_mean is not None and config.latents_std is not None:
        return config
    stats, channels = latent_stats(config), config.encoder_out_channels
    shifts, scales = (stats.shift, stats.video_shift), (stats.scale, stats.video_scale)
    return dataclasses.replace(
        config,
        latents_mean=tuple((shift,) * channels for shift in shifts),
        latents_std=tuple((1 / scale,) * channels for scale in scales),
    )


def read_lpips(path: str | Path) -> Params:
    """LPIPS's parameters from a safetensors file; ``recipes.perceptual`` says what is in it.

    Raises UserError for a file that is damaged, too large, or holds anything else.
    """
    with TensorFile(path, follow=True) as file:
        wanted = {name: tensor for name, tensor in file.items() if not name.startswith("lins.")}
        if sum(tensor.nbytes for tensor in wanted.values()) > LPIPS_LIMIT:
            raise UserError(f"{path}: more than {LPIPS_LIMIT} bytes of tensors; expected the weights of LPIPS")
        return lpips_params({name: tensor.read() for name, tensor in wanted.items()}, str(path))


def train_decoder(
    preset: Preset,
    name: str,
    run: DecoderRun,
    out: str | Path,
    *,
    codec: str | Path | tuple[CodecConfig, Params],
    source: Any,
    lpips: str | Path | None = None,
    quiet: bool = False,
) -> tuple[Outcome, tuple[AsymmetricVAEConfig, Params] | None]:
    """Train a TAEHV decoder for a codec's latents, on a source of clips such as ``training_source``'s.

    ``codec`` is a component folder, or config and parameters. Returns how it ended and, if it was not interrupted, the
    new codec, which is also in ``out/codec``: the same encoder, the same latent constants, the averaged decoder.
    """
    config, params = load_component(codec, "video_vae", dtype="fp32") if isinstance(codec, str | Path) else codec
    teacher = with_constants(config)
    weights = None if lpips is None else read_lpips(lpips)
    mesh = make_mesh(run.loop.mesh)
    recipe = DecoderRecipe(teacher, run.recipe, source.height, source.width, lpips=weights, hooks=sharding_hooks(mesh))
    fit = None
    if run.recipe.coarse_start:
        check_room(recipe.tiny)
        chosen = np.linspace(0, len(source) - 1, min(FIT_CLIPS, len(source))).astype(int)
        videos = np.stack([source[int(index)]["video"] for index in chosen])
        fit = fit_colours(encode(teacher, params, videos), videos)
    stream = process_batches(source, run.recipe.batch, run.loop.seed, keys=("video",))
    outcome = train(
        recipe,
        Feed(stream, recipe.batch_spec()),
        run.loop,
        Path(out),
        preset=f"{preset.name}/{name}",
        settings=as_settings(run),
        pinned={"batch": run.recipe.batch},
        mesh=mesh,
        given=(recipe.frozen(params, weights), fit),
        quiet=quiet,
    )
    if not outcome.finished:
        return outcome, None
    made = codec_params(load_tree(Path(out)), params)
    once(lambda: save_component(Path(out) / "codec", recipe.tiny, made, overwrite=True), "writing the codec")
    return outcome, (recipe.tiny, made)


def replace_decoder(system: VideoSystem, config: AsymmetricVAEConfig, params: Params) -> VideoSystem:
    """The system with the decoder of another codec that has the same encoder; its latent constants stay its own.

    Raises UserError when the encoders differ, in form or in any bit: the system's latents would be others.
    """
    own = with_constants(system.config.causal_video_vae)
    for each in dataclasses.fields(CodecConfig):
        if each.name.startswith("encoder_") and getattr(own, each.name) != getattr(config, each.name):
            raise UserError(
                f"decoder: {each.name} is {getattr(config, each.name)}, the system's codec has "
                f"{getattr(own, each.name)}; expected a decoder that was distilled from this system's codec"
            )
    ours, theirs = ({name: tree[name] for name in ENCODER} for tree in (system.params[CODEC], params))
    for (name, a), (_, b) in zip(named_leaves(ours), named_leaves(theirs), strict=True):
        if not np.array_equal(a, b):
            raise UserError(
                f"decoder: parameter {name} differs from the system's codec's; expected the same encoder, bit for bit: "
                "distil the decoder from this system's codec"
            )
    config = dataclasses.replace(config, latents_mean=own.latents_mean, latents_std=own.latents_std)
    changed = dataclasses.replace(system.config, causal_video_vae=config)
    return dataclasses.replace(system, config=changed, params={**system.params, CODEC: params})


def distil_decoder(
    preset: Preset,
    name: str,
    run: DecoderRun,
    out: Path,
    *,
    start: Path | None = None,
    codec: Path | None = None,
    data: Path | None = None,
    size: Size | None = None,
    videos: Sequence[Path] = (),
    shares: tuple[int, int] = SHARES,
    held_out: Sequence[Path] = (),
    lpips: Path | None = None,
    quiet: bool = False,
) -> tuple[Outcome, Path]:
    """From folders to folders: train, measure both decoders on held-out clips, and put the new one into the system.

    ``out`` receives ``codec``; ``decoders.json`` if there are held-out clips; with ``start`` (a system folder, whose
    codec is the teacher) also ``system``. Returns how it ended and the result's folder.
    """
    usual = (preset.video.height, preset.video.width)
    clips = None if data is None else open_data(data, size=size, prefer=usual)
    measured = held_out_clips(preset, data=data, size=size, videos=held_out)
    system = None if start is None else load_system(start)
    if system is None:
        teacher = load_component(codec, "video_vae", dtype="fp32")
    else:
        teacher = system.config.causal_video_vae, system.params[CODEC]
    source = training_source(run, teacher[0], usual, clips=clips, videos=videos, held_out=held_out, shares=shares)
    outcome, made = train_decoder(preset, name, run, out, codec=teacher, source=source, lpips=lpips, quiet=quiet)
    if made is None:
        return outcome, out / "codec"
    if measured:
        both = {"native": teacher, "distilled": made}
        once(lambda: write_figures(out / FIGURES, compare_decoders(both, measured)), "measuring the decoders")
    if system is None:
        return outcome, out / "codec"
    tokenizers = dict(load_folder(system.folder).tokenizers)
    changed = replace_decoder(system, *made)
    once(lambda: save_system(out / "system", changed, tokenizers, overwrite=True), "writing the system")
    return outcome, out / "system"
