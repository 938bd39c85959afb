"""Stored text in place of live encoders: the same conditions and the same updates, and mismatches told in one line."""

from __future__ import annotations

import dataclasses
import json
from functools import partial

import jax
import numpy as np
import pytest
import tiny_system
import training_toy as toy

from nd_jax import workflow
from nd_jax.converters.component import save_component
from nd_jax.data.latent_shards import CLIPS, EMPTY, INFO, PLAN, Example, write_shard
from nd_jax.data.latents import write_latents
from nd_jax.data.shard_sources import open_latents
from nd_jax.dmd_workflow import distil_steps
from nd_jax.errors import UserError
from nd_jax.models.system import CODEC, DENOISER, TEXT_PARTS
from nd_jax.pyramid.normalise import LatentStats
from nd_jax.pyramid.schedule import Schedule
from nd_jax.recipes.dmd_config import DmdRecipeConfig
from nd_jax.recipes.flow_matching import FlowRecipe, FlowRecipeConfig
from nd_jax.recipes.preset import DmdRun, FlowRun, Preset, RecoveryRun
from nd_jax.recipes.recovery import RecoveryRecipeConfig
from nd_jax.recovery_workflow import recover
from nd_jax.stored_text import TextReader, check_stored
from nd_jax.system import TOKENIZERS
from nd_jax.training.checkpoint import load_tree
from nd_jax.training.loop import LoopConfig
from nd_jax.training.mesh import MeshConfig, make_mesh

CAPTIONS = ["a red ball", "a small blue square moves", "nothing", "two green discs", "a ball", "a tiny cross"]
LENGTH, SIZE = tiny_system.TEXT_LENGTH, (2, 8, 8)


def write_folder(folder, tiny, *, dtype="float32", embedded=False):
    """Six clips of random latents with stored text of the tiny system, as ``nd-jax data precompute`` leaves them."""
    folder.mkdir()
    read = TextReader(tiny.config, tiny.params, tiny.tokenizers, make_mesh(MeshConfig(), jax.devices()[:1]))
    rng = np.random.Generator(np.random.Philox(0))

    def examples(texts, latents):
        for n, (text, (ids, states, pooled)) in enumerate(zip(texts, read(texts, 2), strict=True)):
            values = rng.standard_normal((*SIZE, 4), np.float32) if latents else None
            yield Example(f"{n}.mp4", (text,), values, ids=(ids,), features=(states,), pooled=(pooled,))

    options = {"text_length": LENGTH, "text_dtype": dtype, "embedded": embedded}
    write_shard(folder, CLIPS, 0, examples(CAPTIONS, True), **options)
    write_shard(folder, EMPTY, 0, examples([""], False), **options)
    (folder / PLAN).write_text(json.dumps({"digest": "a", "shards": {CLIPS: 1, "prompts": 0, EMPTY: 1}}))
    (folder / INFO).write_text(json.dumps({"records": {CLIPS: len(CAPTIONS), "prompts": 0, EMPTY: 1}}))
    return folder


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("stored") / "shards", tiny)


def flow(text: str, **changes) -> FlowRecipe:
    return FlowRecipe(
        tiny_system.CONFIG,
        FlowRecipeConfig(**{"batch": 4, "stage_mix": (1, 0, 1), "train_text": False, "text": text} | changes),
        schedule=Schedule(),
        stats=LatentStats(0.1, 0.5, 0.1, 0.5),
        sizes=[SIZE],
        text_length=LENGTH,
        clip_length=LENGTH,
    )


def batch_of(folder, tiny, text):
    """The first four examples, one of them with the empty prompt, as ids or with what is stored."""
    source = open_latents(folder, dropout=0.2, text=LENGTH if text == "stored" else None)
    rows = [source[n] for n in range(4)]
    assert [row["caption"] for row in rows] == ["", *CAPTIONS[1:4]]
    if text == "stored":
        names = ("latents", "text", "t5_mask", "pooled")
        return {name: np.stack([row[name] for row in rows]) for name in names}
    tokens, _ = tiny.tokens([row["caption"] for row in rows])
    return {"latents": np.stack([row["latents"] for row in rows]), **tokens._asdict()}


def test_conditions_are_equal_to_the_last_bit(folder, tiny):
    """Padding apart, of which nothing is stored."""
    found = {}
    for text in ("live", "stored"):
        recipe, batch = flow(text), batch_of(folder, tiny, text)
        assert {name: x.shape for name, x in batch.items()} == {
            name: x.shape for name, x in recipe.batch_spec().items()
        }
        examples = {name: x.reshape(2, 2, *x.shape[1:]) for name, x in batch.items()}
        found[text] = jax.jit(recipe.encode)(tiny.params, examples)
    live, stored = found["live"], found["stored"]
    np.testing.assert_array_equal(stored.mask, live.mask)
    valid = np.asarray(live.mask) > 0
    np.testing.assert_array_equal(np.asarray(stored.text)[valid], np.asarray(live.text)[valid])
    np.testing.assert_array_equal(stored.pooled, live.pooled)
    assert valid[0].sum() < valid[1].sum()


@pytest.mark.heavy
def test_an_update_is_the_same_without_text_encoders(folder, tiny):
    given = {name: params for name, params in tiny.params.items() if name != CODEC}
    states, metrics = {}, {}
    for text in ("live", "stored"):
        recipe = flow(text)
        state = jax.jit(recipe.init)(jax.random.key(0), given)
        states[text], metrics[text] = jax.jit(recipe.step)(state, batch_of(folder, tiny, text))
    assert set(states["stored"].params) == {DENOISER}
    assert set(states["live"].params) == {DENOISER, *TEXT_PARTS}
    toy.assert_same(*(toy.numbers({"loss": metrics[text]["loss"]}) for text in ("live", "stored")))
    live, stored = (toy.numbers(states[text].params[DENOISER]) for text in ("live", "stored"))
    toy.assert_same(stored, live)
    begun = toy.numbers(tiny.params[DENOISER])
    assert any((begun[name] != value).any() for name, value in stored.items())


def check(folder, tiny, system=None, params=None, text=LENGTH):
    source = open_latents(folder, text=text)
    check_stored(source, system or tiny.config, params or tiny.params, tiny.tokenizers)


def test_stored_text_is_held_to_the_encoders(folder, tiny, tmp_path):
    check(folder, tiny)
    other = {**tiny.params, "text_encoder_2": jax.tree.map(lambda x: x * 1.1, tiny.params["text_encoder_2"])}
    with pytest.raises(UserError, match=r"holds text of other encoders: its first caption differs by .* of its size"):
        check(folder, tiny, params=other)
    low = write_folder(tmp_path / "low", tiny, dtype="bfloat16")
    check(low, tiny)
    with pytest.raises(UserError, match=r"behind the denoiser's own embedding.*--text encoder"):
        check(write_folder(tmp_path / "behind", tiny, embedded=True), tiny)
    wide = dataclasses.replace(tiny.config.diffusion_transformer, num_attention_heads=4)
    with pytest.raises(UserError, match="holds text of 16 and 16 channels, the denoiser reads 32 and 16"):
        check(folder, tiny, dataclasses.replace(tiny.config, diffusion_transformer=wide))
    with pytest.raises(UserError, match=r"are not given \(text_encoder, text_encoder_2, text_encoder_3\)"):
        check(folder, tiny, params={DENOISER: tiny.params[DENOISER]})


def test_folders_that_cannot_serve_are_told(folder, tmp_path):
    with pytest.raises(UserError, match="holds text of 12 tokens, this run reads 13"):
        open_latents(folder, text=13)
    long = open_latents(folder, text=3)
    with pytest.raises(UserError, match=r"a caption of 1\.mp4 has \d+ tokens, this run reads 3"):
        long[1]
    latents = write_latents(tmp_path / "latents", [np.zeros((1, *SIZE, 4), np.float32)], [["a ball"]])
    with pytest.raises(UserError, match=r"holds no text features; --recipe\.text stored expects shards"):
        open_latents(latents, text=LENGTH)
    bare = tmp_path / "bare"
    bare.mkdir()
    write_shard(bare, CLIPS, 0, [Example("a.mp4", ("a",), np.zeros((*SIZE, 4), np.float32))])
    (bare / PLAN).write_text('{"digest": "a", "shards": {"clips": 1, "prompts": 0}}')  # as older versions wrote it
    (bare / INFO).write_text('{"records": {"clips": 1, "prompts": 0}}')
    assert open_latents(bare)[0]["caption"] == "a"
    with pytest.raises(UserError, match=r"no text features to train denoisers on"):
        open_latents(bare, text=LENGTH)
    with pytest.raises(UserError, match=r"expected --recipe\.no-train-text"):
        flow("stored", train_text=True)


RUNS = {
    "teacher": FlowRun(FlowRecipeConfig(batch=2, stage_mix=(1, 0, 1), train_text=False)),
    "recovery_2": RecoveryRun(recipe=RecoveryRecipeConfig(batch=2, stage_mix=(1, 0, 1))),
    "student": DmdRun(DmdRecipeConfig(batch=2, stage_mix=(0, 1, 0), steps=(1, 1, 1))),
}


@pytest.mark.heavy
@pytest.mark.parametrize("name", RUNS)
def test_runs_end_in_the_same_system(name, folder, tiny, tiny_folder, tmp_path, monkeypatch):
    """Flow matching, recovery and distribution matching: two updates, live and stored, folder to folder."""
    one = make_mesh(MeshConfig(), jax.devices()[:1])
    monkeypatch.setattr(workflow, "make_mesh", lambda config: one)
    save_component(tmp_path / "codec", tiny.config.causal_video_vae, tiny.params[CODEC])
    tokenizers = {each: tiny_folder / "tokenizers" / each for each in TOKENIZERS.values()}
    preset = Preset("tiny", tiny.config, tiny_system.VIDEO, tiny_system.PLAN, RUNS)
    options = {"latents": folder, "codec_folder": tmp_path / "codec", "tokenizers": tokenizers, "quiet": True}
    pruned, _ = workflow.without_blocks(tiny, (1,))
    work = {
        "teacher": partial(workflow.train_flow, start=tiny),
        "recovery_2": partial(recover, start=pruned, teacher=tiny, alone=True),
        "student": partial(distil_steps, start=tiny),
    }[name]
    made = {}
    for text in ("live", "stored"):
        run = RUNS[name]
        recipe = dataclasses.replace(run.recipe, text=text)
        run = dataclasses.replace(run, recipe=recipe, loop=LoopConfig(steps=2, save_every=0))
        outcome, made[text] = work(preset, name, run, tmp_path / text, **options)
        assert outcome.finished
    assert set(made["stored"].params) == set(made["live"].params)
    for part, params in made["live"].params.items():
        for (path, x), (_, y) in zip(
            toy.numbers(made["stored"].params[part]).items(), toy.numbers(params).items(), strict=True
        ):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7, err_msg=f"{part}/{path}")
    kept = tmp_path / "stored" / ("stage2" if name == "recovery_2" else "")
    assert set(load_tree(kept)) == {DENOISER}, "the encoders are no part of the state"
