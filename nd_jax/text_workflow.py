"""The steps of text distillation: prompts, targets computed before, training, and the student put in its place."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nd_jax.data import prompts as prompt_data
from nd_jax.data.caption_source import CaptionSource
from nd_jax.data.pipeline import batches
from nd_jax.data.prompt_source import PromptSource
from nd_jax.data.shard_sources import open_features
from nd_jax.data.text_features import write_features
from nd_jax.data.tokenizers import TextTokenizer
from nd_jax.data.world import WORLDS
from nd_jax.datasets import tfds_quiet
from nd_jax.errors import UserError
from nd_jax.models.context_adapter import ContextAdapterConfig
from nd_jax.models.functional import Params
from nd_jax.models.system import ADAPTER, DENOISER, T5
from nd_jax.models.t5 import T5Config
from nd_jax.recipes.feeds import Feed
from nd_jax.recipes.preset import TextDistillRun, as_settings
from nd_jax.recipes.text_distillation import TextDistillRecipe
from nd_jax.recipes.text_teacher import EMBEDDER, Teacher, check_student, teacher_params
from nd_jax.system import TOKENIZERS, VideoSystem, check_parts, check_vocabularies
from nd_jax.training.checkpoint import load_tree
from nd_jax.training.hooks import sharding_hooks
from nd_jax.training.loop import Outcome, train
from nd_jax.training.mesh import make_mesh
from nd_jax.training.sharding import param_shardings


def prompt_source(run: TextDistillRun, folders: Sequence[str | Path] = (), *, split: str = "train") -> PromptSource:
    """What a run is trained on: prompts of folders of ``nd-jax data prompts``, then captions of the shapes worlds.

    Of another split, all prompts once and no empty ones; captions then come from the templates held out of training.
    Raises UserError without any.
    """
    with tfds_quiet():
        sources: list[Any] = [prompt_data.open_split(folder, split) for folder in folders]
    config, training = run.recipe, split == "train"
    if config.captions:
        worlds = {world.objects: world for world in WORLDS.values()}  # captions know the number of objects only
        loose = config.loose if training else 0.0
        options = {"seed": run.loop.seed, "loose": loose, "held_out": not training}
        sources.append(CaptionSource(list(worlds.values()), config.captions, **options))
    return PromptSource(sources, empty=config.empty if training else 0.0)


def encode_prompts(
    system: VideoSystem,
    prompts: PromptSource,
    out: str | Path,
    *,
    batch: int = 64,
    dtype: str = "float32",
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Write what the system's denoiser reads of every prompt, for runs without a live teacher (``FeatureSource``)."""
    tokenizer, teacher = shared_tokenizer(system), Teacher(system.config)
    params = jax.tree.map(jnp.asarray, teacher_params(system.config, system.params))
    encode = jax.jit(teacher)

    def parts() -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        for start in range(0, len(prompts), batch):
            texts = [prompts[index]["caption"] for index in range(start, min(start + batch, len(prompts)))]
            ids, mask, _ = tokenizer([*texts, *[""] * (batch - len(texts))])  # the last batch keeps its shape
            states = np.asarray(encode(params, ids, mask))
            yield ids[: len(texts)], mask[: len(texts)], states[: len(texts)]
            progress(start + len(texts), len(prompts))

    return write_features(out, parts(), dtype=dtype, overwrite=overwrite)


def train_text_student(
    name: str,
    run: TextDistillRun,
    out: str | Path,
    *,
    teacher: VideoSystem,
    prompts: PromptSource | None = None,
    features: str | Path | None = None,
    start: Params | None = None,
    quiet: bool = False,
) -> tuple[Outcome, VideoSystem | None]:
    """Distil the teacher's text encoder on prompts, or on targets that ``encode_prompts`` has computed with it.

    ``start`` holds the student's networks that do not begin afresh, by the names ``T5`` and ``ADAPTER``.
    ``name`` is the run's, such as "shapes_base/text_student". Returns how it ended and, if it was not interrupted, the
    teacher's system with the student (averaged parameters) in place. Raises UserError for what does not fit.
    """
    if (prompts is None) == (features is None):
        raise UserError(f"{name}: expected either prompts or computed text features to train on")
    length = teacher.video.text_length
    live = teacher.config if features is None else None
    recipe = TextDistillRecipe(
        run.encoder,
        run.adapter,
        run.recipe,
        denoiser=teacher.config.diffusion_transformer,
        teacher=live,
        text_length=length,
        hooks=sharding_hooks(make_mesh(run.loop.mesh)),
    )
    recipe.check_start(start or {})
    check_vocabularies(teacher.tokenizers, dataclasses.replace(teacher.config, text_encoder_3=run.encoder))
    keys: tuple[str, ...] = ()
    if features is None:
        source, options = prompts, {"tokenizers": {"t5": shared_tokenizer(teacher)}}
    else:
        source, options, keys = open_features(features), {}, ("t5_ids", "t5_mask", "target")
        if teacher.config.diffusion_transformer.context_embedder and not source.embedded:
            raise UserError(
                f"{features} holds text in front of the denoiser's embedding; precompute it again with --text denoiser"
            )
        if (source.text_length, source.width) != (length, recipe.width):
            raise UserError(
                f"{features} holds targets of {source.text_length} tokens x {source.width} channels, expected "
                f"{length} x {recipe.width}; compute them again with this teacher"
            )
    count = jax.process_count()
    stream = batches(
        source,
        max(run.recipe.batch // count, 1),
        seed=run.loop.seed,
        keys=keys,
        process_index=jax.process_index(),
        process_count=count,
        **options,
    )
    mesh = make_mesh(run.loop.mesh)
    params = teacher_params(teacher.config, teacher.params)
    given = {"teacher": params if live else {k: v for k, v in params.items() if k == EMBEDDER}, "student": start or {}}
    given = jax.device_put(given, param_shardings(given, recipe.rules, mesh))  # whole, it may not fit one device
    outcome = train(
        recipe,
        Feed(stream, recipe.batch_spec()),
        run.loop,
        Path(out),
        preset=name,
        settings=as_settings(run),
        pinned={"batch": run.recipe.batch},
        mesh=mesh,
        given=(given["teacher"], given["student"]),
        quiet=quiet,
    )
    if not outcome.finished:
        return outcome, None
    networks = recipe.networks(load_tree(Path(out)), {"student": start or {}})
    networks = jax.tree.map(np.asarray, networks)
    return outcome, with_student(teacher, run.encoder, run.adapter, networks, mode=run.recipe.mode)


def with_student(
    system: VideoSystem, encoder: T5Config, adapter: ContextAdapterConfig, networks: Params, *, mode: str = "replace"
) -> VideoSystem:
    """The system with a student (``networks[T5]``, ``networks[ADAPTER]``) for its T5; the CLIP towers stay.

    In mode "replace" the denoiser loses its context embedder, if it has one; in mode "extend" it keeps it.
    Raises UserError when the student does not fit the denoiser.
    """
    config, denoiser = system.config, system.params[DENOISER]
    check_student(encoder, adapter, mode, config.diffusion_transformer)
    network = config.diffusion_transformer
    if mode == "replace":
        network = dataclasses.replace(network, context_embedder=False)
        denoiser = {name: part for name, part in denoiser.items() if name != EMBEDDER}
    config = dataclasses.replace(config, text_encoder_3=encoder, context_adapter=adapter, diffusion_transformer=network)
    check_parts(config, "text student")
    params = {**system.params, T5: networks[T5], ADAPTER: networks[ADAPTER], DENOISER: denoiser}
    return dataclasses.replace(system, config=config, params=params)


def shared_tokenizer(teacher: VideoSystem) -> TextTokenizer:
    """The tokenizer whose ids teacher and student read. Raises UserError for a system without it, or without a T5."""
    there = {T5: T5 in teacher.params, TOKENIZERS["t5"]: "t5" in teacher.tokenizers}
    lacks = [name for name, found in there.items() if not found]
    if lacks:
        raise UserError(
            f"{teacher.folder or 'the teacher'} has no {' and no '.join(lacks)}; expected a system that reads prompts"
        )
    return teacher.tokenizers["t5"]
