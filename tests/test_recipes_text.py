"""Captions with labels, and the pre-training of text encoders on them."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
import tiny_system

from nd_jax.data.caption_source import ABSENT, CaptionSource
from nd_jax.data.captions import corpus
from nd_jax.data.pipeline import batches
from nd_jax.data.tokenizers import train_tokenizers
from nd_jax.data.world import ATTRIBUTES, combinations, world_named
from nd_jax.errors import UserError
from nd_jax.models.system import TEXT_PARTS
from nd_jax.recipes.feeds import Feed
from nd_jax.recipes.preset import load_preset
from nd_jax.recipes.text_attributes import PROBES, TextAttributesRecipe, TextRecipeConfig
from nd_jax.system import TOKENIZERS, text_tokenizers
from nd_jax.training.loop import LoopConfig, train
from nd_jax.training.optim import OptimConfig

VALUES = [len(values) for values in ATTRIBUTES.values()]
WORLDS = [world_named("64x64"), world_named("two_objects")]
CONFIG = TextRecipeConfig(
    batch=32, captions=512, optim=OptimConfig(learning_rate=5e-3, warmup_steps=5, schedule="constant")
)


def recipe(config: TextRecipeConfig = CONFIG) -> TextAttributesRecipe:
    lengths = {"text_length": tiny_system.TEXT_LENGTH, "clip_length": tiny_system.TEXT_LENGTH}
    return TextAttributesRecipe(tiny_system.CONFIG, config, values=VALUES, places=2, **lengths)


def test_captions_name_their_labels_and_nothing_held_out():
    source = CaptionSource(WORLDS, 400, seed=3)
    seen = {tuple(row) for row in combinations(False).tolist()}
    single = [source[n] for n in range(0, 400, 2)]
    assert all((example["labels"][1] == ABSENT).all() for example in single)
    assert {tuple(example["labels"][0].tolist()) for example in single} <= seen
    double = [source[n] for n in range(1, 400, 2)]
    assert all((example["labels"] >= 0).all() for example in double)
    assert {tuple(row) for example in double for row in example["labels"].tolist()} <= seen
    assert len({example["caption"] for example in single}) > 150
    assert source[7]["caption"] == CaptionSource(WORLDS, 400, seed=3)[7]["caption"]
    assert source[7]["caption"] != CaptionSource(WORLDS, 400, seed=4)[7]["caption"]
    assert "left" in source[1]["caption"] or "beside" in source[1]["caption"]


def test_held_out_templates_share_no_wording():
    trained, new = (CaptionSource(WORLDS[:1], 300, held_out=held_out) for held_out in (False, True))
    opening = [{source[n]["caption"].split()[0] for n in range(300)} for source in (trained, new)]
    assert {"clip", "over"} <= opening[1]
    assert not {"clip", "over"} & opening[0]


@pytest.mark.parametrize("arguments", [([], 4), (WORLDS, 1)])
def test_no_captions(arguments):
    with pytest.raises(UserError, match="expected at least one of each"):
        CaptionSource(*arguments)


def test_encoders_learn_to_name_attributes(tmp_path):
    """A hundred steps of a tiny system, through tokenizers, Grain and the loop; then only the encoders are kept."""
    train_tokenizers(
        tmp_path / "tokenizers",
        corpus(count=200),
        t5_length=tiny_system.TEXT_LENGTH,
        clip_length=tiny_system.TEXT_LENGTH,
        t5_vocab=tiny_system.CONFIG.text_encoder_3.vocab_size,
        clip_vocab=tiny_system.CONFIG.text_encoder.vocab_size,
    )
    folders = {name: tmp_path / "tokenizers" / name for name in TOKENIZERS.values()}
    preset = load_preset("shapes_base")
    video = dataclasses.replace(preset.video, text_length=tiny_system.TEXT_LENGTH, clip_length=tiny_system.TEXT_LENGTH)
    made = recipe()
    source = CaptionSource(WORLDS, CONFIG.captions)
    stream = batches(source, CONFIG.batch, keys=("labels",), tokenizers=text_tokenizers(folders, video))
    feed = Feed(stream, made.batch_spec())
    outcome = train(made, feed, LoopConfig(steps=100), tmp_path / "run", preset="tiny/text", quiet=True)
    assert set(outcome.state.params) == {PROBES, *TEXT_PARTS} & {PROBES, *made.definitions}
    _, metrics = jax.jit(made.loss)(outcome.state.params, jax.tree.map(np.asarray, next(feed)))
    chance = np.mean([1 / n for n in VALUES])
    for probe in ("pooled", "states"):
        assert metrics[probe]["accuracy"] > chance + 0.15


def test_absent_labels_are_not_asked_for():
    made = recipe(dataclasses.replace(CONFIG, batch=4))
    params = made.init(jax.random.key(0)).params
    rng = np.random.Generator(np.random.Philox(0))
    batch = {name: rng.integers(1, 3, s.shape, np.int32) for name, s in made.batch_spec().items()}
    batch["labels"][:] = ABSENT
    batch["labels"][:, 0] = 1
    loss = jax.jit(made.loss)
    before, _ = loss(params, batch)
    shifted = jax.tree.map(np.array, params)
    half = sum(VALUES)
    for probe in shifted[PROBES].values():
        probe["bias"][half:] += 5  # everything about the second object
    assert loss(shifted, batch)[0] == before
    for probe in shifted[PROBES].values():
        probe["bias"][0] += 5  # the first object's first colour, which is never right
    assert loss(shifted, batch)[0] > before
