"""The steps between data and a trained system, shared by the commands and the demonstration.

Each takes folders in and leaves a folder behind, so that any of them can be run alone or again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nd_jax.converters.component import load_component, save_component
from nd_jax.converters.folders import load_folder
from nd_jax.data import shapes
from nd_jax.data.captions import caption
from nd_jax.data.clips import ClipSource
from nd_jax.data.latents import LatentSource, write_latents
from nd_jax.data.pipeline import batches
from nd_jax.data.tokenizers import TextTokenizer, train_clip_tokenizer, train_t5_tokenizer
from nd_jax.data.windows import WindowSource
from nd_jax.errors import UserError
from nd_jax.models.causal_vae import definition as codec_definition
from nd_jax.models.causal_vae import posterior
from nd_jax.models.functional import Params
from nd_jax.models.system import CODEC, DENOISER
from nd_jax.pixels import from_uint8
from nd_jax.recipes.codec import CodecRecipe
from nd_jax.recipes.feeds import Feed
from nd_jax.recipes.flow_matching import FlowRecipe
from nd_jax.recipes.preset import CodecRun, FlowRun, Preset, as_settings
from nd_jax.recipes.pruning import remove_blocks
from nd_jax.system import TOKENIZERS, VideoSystem, latent_stats, text_tokenizers
from nd_jax.training.checkpoint import load_tree
from nd_jax.training.hooks import sharding_hooks
from nd_jax.training.loop import Outcome, train
from nd_jax.training.mesh import make_mesh

CAPTIONS_PER_CLIP = 8


def prepare_data(preset: Preset, folder: str | Path, *, clips: int, seed: int = 0) -> Any:
    """Draw the preset's shapes dataset with TFDS (once; later calls find it). Returns the builder."""
    if preset.world is None:
        raise UserError(f"preset {preset.name} has no shapes world; expected one that has, such as shapes_tiny")
    return shapes.prepare(folder, preset.world, seed=seed, train=clips, evaluate=min(256, clips))


def prepare_tokenizers(preset: Preset, captions: Sequence[str], folder: str | Path) -> dict[str, Path]:
    """Train the three tokenizers of a shapes system on captions; folder names are the official ones."""
    folder, video = Path(folder), preset.video
    train_t5_tokenizer(
        captions, folder / TOKENIZERS["t5"], vocab_size=preset.tokenizer_vocabulary, max_length=video.text_length
    )
    for name in ("clip", "clip_2"):
        train_clip_tokenizer(
            captions,
            folder / TOKENIZERS[name],
            vocab_size=2 * preset.tokenizer_vocabulary,
            max_length=video.clip_length,
        )
    return {name: folder / name for name in TOKENIZERS.values()}


def train_codec(
    preset: Preset,
    run: CodecRun,
    out: str | Path,
    *,
    clips: Any = None,
    videos: Sequence[Path] = (),
    quiet: bool = False,
) -> Outcome:
    """Train the preset's codec on a source of clips (``{"video": uint8 [T, H, W, 3]}``) or on video files.

    When done, ``out/codec`` is a component folder in the official layout, without latent statistics yet.
    """
    video, recipe_config = preset.video, run.recipe
    network = preset.system.causal_video_vae
    if videos:
        source = ClipSource(videos, height=video.height, width=video.width, frames=recipe_config.frames)
    elif clips is not None:
        source = WindowSource(clips, recipe_config.frames, network.time_scale)
    else:
        raise UserError("codec: no clips to train on; expected a shapes dataset or --videos FILE ...")
    recipe = CodecRecipe(network, recipe_config, video.height, video.width)
    stream = _stream(source, recipe_config.batch, run.loop.seed, keys=("video",))
    outcome = _train(preset, "codec", recipe, Feed(stream, recipe.batch_spec()), run, out, quiet=quiet)
    if outcome.finished:
        save_component(Path(out) / "codec", network, load_tree(Path(out)), overwrite=True)
    return outcome


def _stream(source: Any, batch: int, seed: int, **options: Any):
    count = jax.process_count()
    if batch % count:
        raise UserError(f"data: a batch of {batch} for {count} processes; expected a multiple")
    return batches(source, batch // count, seed=seed, process_index=jax.process_index(), process_count=count, **options)


def _train(preset: Preset, name: str, recipe: Any, feed: Feed, run: Any, out: str | Path, **options: Any) -> Outcome:
    return train(
        recipe,
        feed,
        run.loop,
        Path(out),
        preset=f"{preset.name}/{name}",
        settings=as_settings(run),
        pinned={"batch": run.recipe.batch},
        **options,
    )


def encode_clips(
    codec_folder: str | Path, clips: Any, captions: Sequence[Sequence[str]], out: str | Path, *, batch: int = 16
) -> Path:
    """Encode every clip of a source (posterior means) into a latents folder."""
    config, params = load_component(codec_folder, "video_vae", dtype="fp32")
    codec = codec_definition(config)
    encode = jax.jit(lambda params, video: posterior(codec.bind(params).encode(video)).mean)

    def batched():
        for start in range(0, len(clips), batch):
            stop = min(start + batch, len(clips))
            videos = np.stack([clips[index]["video"] for index in range(start, stop)])
            yield np.concatenate([videos, np.repeat(videos[-1:], batch - len(videos), axis=0)]), stop - start

    def run(item):
        videos, count = item
        return np.asarray(encode(params, jnp.asarray(from_uint8(videos))))[:count]

    return write_latents(out, batched(), captions, run, info={"codec": str(Path(codec_folder).name)}, overwrite=True)


def shapes_captions(clips: Any, *, per_clip: int = CAPTIONS_PER_CLIP, seed: int = 0) -> list[list[str]]:
    """Several captions for every clip of a shapes source: other templates, other synonyms."""
    rng = np.random.Generator(np.random.Philox(seed))
    return [[caption(clips[n]["labels"], rng) for _ in range(per_clip)] for n in range(len(clips))]


def with_statistics(config: Any, latents: np.ndarray) -> Any:
    """The codec's config with the mean and deviation of its latents by channel, for frame 0 and for later ones."""

    def rows(reduce):
        parts = (latents[:, :1], latents[:, 1:] if latents.shape[1] > 1 else latents)
        return tuple(tuple(float(x) for x in reduce(part, axis=(0, 1, 2, 3))) for part in parts)

    deviation = tuple(tuple(max(x, 1e-4) for x in row) for row in rows(np.std))
    return dataclasses.replace(config, latents_mean=rows(np.mean), latents_std=deviation)


def train_flow(
    preset: Preset,
    name: str,
    run: FlowRun,
    out: str | Path,
    *,
    latents: str | Path,
    codec_folder: str | Path,
    tokenizers: dict[str, Path],
    start: VideoSystem | None = None,
    quiet: bool = False,
) -> tuple[Outcome, VideoSystem | None]:
    """Flow matching on a latents folder, from scratch or from ``start`` (e.g. a pruned system).

    Returns how it ended and, if it was not interrupted, the system with averaged (EMA) parameters and the codec.
    """
    video = preset.video
    source = LatentSource(latents, dropout=run.recipe.caption_dropout)
    codec_config, codec_params = load_component(codec_folder, "video_vae", dtype="fp32")
    if codec_config.latents_mean is None:
        codec_config = with_statistics(codec_config, source.latents)
    base = preset.system if start is None else start.config
    config = dataclasses.replace(base, causal_video_vae=codec_config)
    units, height, width = source.latents.shape[1:4]
    if (units, height, width) != preset.latent_size:
        raise UserError(
            f"{latents} holds latents of {units}x{height}x{width}, preset {preset.name} is for "
            f"{'x'.join(map(str, preset.latent_size))}; encode clips of its size"
        )
    mesh = make_mesh(run.loop.mesh)
    recipe = FlowRecipe(
        config,
        run.recipe,
        schedule=preset.schedule,
        stats=latent_stats(codec_config),
        units=units,
        height=height,
        width=width,
        text_length=video.text_length,
        clip_length=video.clip_length,
        hooks=sharding_hooks(mesh),
    )
    readers: dict[str, TextTokenizer] = text_tokenizers(tokenizers, video)
    stream = _stream(source, run.recipe.batch, run.loop.seed, keys=("latents",), tokenizers=readers)
    given = () if start is None else ({k: v for k, v in start.params.items() if k != CODEC},)
    feed = Feed(stream, recipe.batch_spec())
    outcome = _train(preset, name, recipe, feed, run, out, mesh=mesh, given=given, quiet=quiet)
    if not outcome.finished:
        return outcome, None
    params: dict[str, Params] = {**load_tree(Path(out)), CODEC: codec_params}
    return outcome, VideoSystem(config, params, readers, video, preset.sampling, preset.schedule)


def without_blocks(system: VideoSystem, drop: Sequence[int]) -> tuple[VideoSystem, tuple[int, ...]]:
    """The system with blocks ``drop`` taken out of its denoiser, and the original indices of those that stay."""
    smaller, params, kept = remove_blocks(system.config.diffusion_transformer, system.params[DENOISER], drop)
    config = dataclasses.replace(system.config, diffusion_transformer=smaller)
    return dataclasses.replace(system, config=config, params={**system.params, DENOISER: params}), kept


def tokenizer_folders(checkpoint: str | Path) -> dict[str, Path]:
    """The tokenizer folders of an official-layout folder, by name."""
    return dict(load_folder(checkpoint).tokenizers)
