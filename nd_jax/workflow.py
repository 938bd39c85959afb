"""The steps between a dataset and a trained system, shared by the commands and the demonstration.

Each takes folders in and leaves a folder behind, so that any of them can be run alone or again.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nd_jax.converters.component import load_component, save_component
from nd_jax.data.caption_source import CaptionSource
from nd_jax.data.latents import check_finite, write_latents
from nd_jax.data.pipeline import BatchIterator, batches
from nd_jax.data.shard_sources import open_latents
from nd_jax.data.windows import ClipSource, WindowSource
from nd_jax.data.world import ATTRIBUTES, WORLDS
from nd_jax.errors import UserError
from nd_jax.models.causal_vae import definition as codec_definition
from nd_jax.models.causal_vae import posterior
from nd_jax.models.functional import Params
from nd_jax.models.system import CODEC, DENOISER, TEXT_PARTS
from nd_jax.pixels import from_uint8
from nd_jax.planning.live import flow_work
from nd_jax.recipes.codec import CodecRecipe
from nd_jax.recipes.feeds import Feed, MixedFeed
from nd_jax.recipes.flow_matching import FlowRecipe
from nd_jax.recipes.preset import CodecRun, FlowRun, Preset, TextRun, as_settings
from nd_jax.recipes.pruning import remove_blocks
from nd_jax.recipes.text_attributes import TextAttributesRecipe
from nd_jax.stored_text import check_stored
from nd_jax.system import VideoSystem, check_vocabularies, latent_stats, text_tokenizers
from nd_jax.training.checkpoint import load_tree
from nd_jax.training.cluster import once
from nd_jax.training.hooks import sharding_hooks
from nd_jax.training.loop import Outcome, train
from nd_jax.training.mesh import make_mesh


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
        raise UserError("codec: no clips to train on; expected a dataset or --videos FILE ...")
    recipe = CodecRecipe(network, recipe_config, source.height, source.width)
    stream = process_batches(source, recipe_config.batch, run.loop.seed, keys=("video",))
    mesh = make_mesh(run.loop.mesh)
    outcome = _train(preset, "codec", recipe, Feed(stream, recipe.batch_spec()), run, out, mesh=mesh, quiet=quiet)
    if outcome.finished:
        made = load_tree(Path(out))
        once(lambda: save_component(Path(out) / "codec", network, made, overwrite=True), "writing the codec")
    return outcome


def process_batches(source: Any, batch: int, seed: int, **options: Any) -> BatchIterator:
    """``pipeline.batches`` of this process's part of every batch. Raises UserError where it does not divide."""
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
    codec_folder: str | Path,
    clips: Any,
    captions: Sequence[Sequence[str]],
    out: str | Path,
    *,
    frames: int | None = None,
    batch: int = 16,
    overwrite: bool = True,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Encode every clip of a source, or its first ``frames`` frames, into a latents folder (posterior means)."""
    config, params = load_component(codec_folder, "video_vae", dtype="fp32")
    if frames is not None and (frames < 1 or (frames - 1) % config.time_scale):
        raise UserError(f"latents: {frames} frames do not fit the codec; expected 1 + {config.time_scale}k")
    codec = codec_definition(config)
    encode = jax.jit(lambda params, video: posterior(codec.bind(params).encode(video)).mean)

    def latents() -> Iterator[np.ndarray]:
        for start in range(0, len(clips), batch):
            videos = np.stack(
                [clips[index]["video"][:frames] for index in range(start, min(start + batch, len(clips)))]
            )
            missing = batch - len(videos)  # the last batch keeps its shape, so that nothing compiles again
            padded = np.pad(videos, ((0, missing), *((0, 0),) * 4), mode="edge")
            yield np.asarray(encode(params, jnp.asarray(from_uint8(padded))))[: len(videos)]
            progress(start + len(videos), len(clips))

    info = {"codec": Path(codec_folder).name}
    return write_latents(out, latents(), captions, info=info, overwrite=overwrite)


def with_statistics(config: Any, latents: np.ndarray, chunk: int = 256) -> Any:
    """The codec's config with the mean and deviation of its latents by channel, for frame 0 and for later ones.

    ``latents`` [N, U, h, w, C] may be larger than memory; it is read in slices of clips.
    """
    several = latents.shape[1] > 1
    first_later = (slice(0, 1), slice(1, None) if several else slice(None))
    sums = np.zeros((2, 2, latents.shape[-1]))
    for start in range(0, len(latents), chunk):
        part = np.asarray(latents[start : start + chunk], np.float64)
        check_finite(part, f"clips {start} to {start + len(part) - 1}")
        for row, frames in enumerate(first_later):
            sums[row] += part[:, frames].sum((0, 1, 2, 3)), np.square(part[:, frames]).sum((0, 1, 2, 3))
    units = (1, latents.shape[1] - 1 if several else 1)
    counts = [len(latents) * count * math.prod(latents.shape[2:4]) for count in units]
    mean, square = np.moveaxis(sums / np.reshape(counts, (2, 1, 1)), 1, 0)
    deviation = np.sqrt(np.maximum(square - mean**2, 1e-8))
    rows = [tuple(map(tuple, table.tolist())) for table in (mean, deviation)]
    return dataclasses.replace(config, latents_mean=rows[0], latents_std=rows[1])


def train_text(
    preset: Preset, run: TextRun, out: str | Path, *, tokenizers: dict[str, Path], quiet: bool = False
) -> Outcome:
    """Pre-train the preset's text encoders on captions of the shapes worlds; ``load_text`` reads the result."""
    video = preset.video
    recipe = TextAttributesRecipe(
        preset.system,
        run.recipe,
        values=[len(values) for values in ATTRIBUTES.values()],
        places=max(world.objects for world in WORLDS.values()),
        text_length=video.text_length,
        clip_length=video.clip_length,
    )
    readers = text_tokenizers(tokenizers, video)
    check_vocabularies(readers, preset.system)
    worlds = {world.objects: world for world in WORLDS.values()}  # captions know the number of objects only
    recipe_config = run.recipe
    source = CaptionSource(list(worlds.values()), recipe_config.captions, seed=run.loop.seed, loose=recipe_config.loose)
    stream = process_batches(source, run.recipe.batch, run.loop.seed, keys=("labels",), tokenizers=readers)
    return _train(preset, "text", recipe, Feed(stream, recipe.batch_spec()), run, out, quiet=quiet)


def load_text(run: str | Path) -> dict[str, Params]:
    """The averaged parameters of the text encoders that ``train_text`` left in a run's folder."""
    return {name: params for name, params in load_tree(Path(run)).items() if name in TEXT_PARTS}


def train_flow(
    preset: Preset,
    name: str,
    run: FlowRun,
    out: str | Path,
    *,
    latents: str | Path | Sequence[str | Path],
    codec_folder: str | Path,
    tokenizers: dict[str, Path],
    start: VideoSystem | None = None,
    text: dict[str, Params] | None = None,
    make: Callable[..., FlowRecipe] = FlowRecipe,
    also_given: tuple = (),
    prompts: Any = None,
    quiet: bool = False,
) -> tuple[Outcome, VideoSystem | None]:
    """Flow matching on one or more latents folders (one for each share of the recipe's ``size_mix``), or, for a recipe
    that needs no videos, on ``prompts`` (a source of examples with ``caption``) at the preset's size.

    Begins with ``start`` (e.g. a pruned system), with text encoders ``text``, or from scratch. ``make`` is the recipe,
    whose ``init`` receives ``also_given`` besides the parameters.
    Returns how it ended and, if it was not interrupted, the system with averaged (EMA) parameters and the codec.
    """
    video, units = preset.video, run.recipe.units
    folders = [latents] if isinstance(latents, str | Path) else list(latents)
    if bool(folders) == (prompts is not None):
        raise UserError(f"train {preset.name} {name}: expected latents to train on, or for prompts alone none")
    stored = run.recipe.text == "stored"
    if stored and not folders:
        raise UserError(f"train {preset.name} {name}: --recipe.text stored comes with latents; expected some")
    reading = {"units": units, "text": video.text_length if stored else None}
    sources = [open_latents(folder, dropout=run.recipe.caption_dropout, **reading) for folder in folders]
    codec_config, codec_params = load_component(codec_folder, "video_vae", dtype="fp32")
    if codec_config.latents_mean is None and folders:
        whole = open_latents(folders[0])
        codec_config = with_statistics(codec_config, whole.latents)
    base = preset.system if start is None else start.config
    config = dataclasses.replace(base, causal_video_vae=codec_config)
    sizes = [source.latents.shape[1:4] for source in sources] or [preset.latent_size]
    told = ["x".join(map(str, size)) for size in (*sizes, preset.latent_size)]
    if sources and (max(sizes)[0] != (units or preset.latent_size[0]) or sizes[0][1:] != preset.latent_size[1:]):
        raise UserError(
            f"{folders[0]} holds latents of {told[0]}, preset {preset.name} is for {told[-1]}; encode clips of its size"
        )
    mesh = make_mesh(run.loop.mesh)
    recipe = make(
        config,
        run.recipe,
        schedule=preset.schedule,
        stats=latent_stats(codec_config),
        sizes=sizes,
        text_length=video.text_length,
        clip_length=video.clip_length,
        hooks=sharding_hooks(mesh, attention=run.recipe.attention),
    )
    readers = text_tokenizers(tokenizers, video)
    check_vocabularies(readers, config)
    given = text or {} if start is None else {k: v for k, v in start.params.items() if k != CODEC}
    for source in sources if stored else ():
        check_stored(source, config, given, readers)
    columns = [recipe.column_sizes.count(index) for index in range(len(sizes))]
    keys = (("latents",) if folders else ()) + (("text", "t5_mask", "pooled") if stored else ())
    streams = [
        process_batches(
            source,
            run.recipe.batch * count // len(recipe.columns),
            run.loop.seed + index,
            keys=keys,
            tokenizers={} if stored else readers,
        )
        for index, (source, count) in enumerate(zip(sources or [prompts], columns, strict=True))
    ]
    spec = recipe.batch_spec()
    feed = MixedFeed(streams, columns, spec) if len(streams) > 1 else Feed(streams[0], spec)
    kept_text = {k: v for k, v in given.items() if k in TEXT_PARTS} if stored else {}
    given = {k: v for k, v in given.items() if k not in kept_text}
    work = flow_work(recipe, also_given[0] if also_given else None, list(mesh.devices.flat))
    options = {"mesh": mesh, "given": (given, *also_given), "work": work, "quiet": quiet}
    outcome = _train(preset, name, recipe, feed, run, out, **options)
    if not outcome.finished:
        return outcome, None
    params: dict[str, Params] = {**kept_text, **load_tree(Path(out)), CODEC: codec_params}
    kept = None if start is None else start.kept_blocks
    return outcome, VideoSystem(config, params, readers, video, preset.sampling, preset.schedule, kept_blocks=kept)


def without_blocks(system: VideoSystem, drop: Sequence[int]) -> tuple[VideoSystem, tuple[int, ...]]:
    """The system with blocks ``drop`` taken out of its denoiser, and the original indices of those that stay."""
    smaller, params, kept = remove_blocks(system.config.diffusion_transformer, system.params[DENOISER], drop)
    kept = kept if system.kept_blocks is None else tuple(system.kept_blocks[k] for k in kept)
    config = dataclasses.replace(system.config, diffusion_transformer=smaller)
    params = {**system.params, DENOISER: params}
    return dataclasses.replace(system, config=config, params=params, kept_blocks=kept), kept
