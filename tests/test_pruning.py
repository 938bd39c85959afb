"""Block influence and removal: what is measured, what is chosen, and that the rest stays as it was."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_system

from nd_jax.converters.component import load_component
from nd_jax.converters.safetensors_io import read_tensors
from nd_jax.errors import UserError
from nd_jax.generate import Generator
from nd_jax.influence import block_influence
from nd_jax.models.mmdit import definition
from nd_jax.models.system import DENOISER
from nd_jax.pyramid.layout import layout_arrays
from nd_jax.pyramid.sampler import SamplePlan
from nd_jax.pyramid.schedule import Schedule
from nd_jax.recipes.pruning import BlockInfluence, choose_blocks, one_minus_cosine, remove_blocks
from nd_jax.system import TOKENIZERS, load_system, save_system
from nd_jax.workflow import without_blocks

LAYERS = 5
PROMPTS = ["a small red circle moves right", "a ball"]


@pytest.fixture(scope="module")
def deep(tiny):
    """The tiny system with five blocks, the second of which has its output gates closed, and two stages."""
    config = dataclasses.replace(tiny.config.diffusion_transformer, num_layers=LAYERS)
    params = tiny_system.random_params(definition(config), seed=9)
    for norm in ("norm1", "norm1_context"):
        for leaf in params["blocks"][norm]["linear"].values():
            gates = leaf.reshape(*leaf.shape[:-1], 6, config.width)  # shift, scale, gate of attention, then of MLP
            gates[1, ..., [2, 5], :] = 0
    changes = {
        "config": dataclasses.replace(tiny.config, diffusion_transformer=config),
        "params": {**tiny.params, DENOISER: params},
        "schedule": Schedule(stages=2),
        "sampling": SamplePlan((1, 1), (1, 1), 2.0, 2.0, "plain"),
    }
    return dataclasses.replace(tiny, **changes)


# ---- influence


def test_influence_is_one_minus_the_cosine():
    rng = np.random.Generator(np.random.Philox(0))
    before, after = rng.standard_normal((2, 3, 7, 5), np.float32)
    weight = rng.integers(0, 2, (3, 7)).astype(np.float32)
    cosine = (before * after).sum(-1) / np.linalg.norm(before, axis=-1) / np.linalg.norm(after, axis=-1)
    found = one_minus_cosine(before, after, weight)
    np.testing.assert_allclose(found, [(weight * (1 - cosine)).sum(), weight.sum()], rtol=1e-5)
    np.testing.assert_array_equal(one_minus_cosine(before, before, weight)[0], 0)
    np.testing.assert_allclose(one_minus_cosine(before, -before, weight)[0], 2 * weight.sum(), rtol=1e-6)
    assert np.isfinite(one_minus_cosine(0 * before, after, weight)).all()


@pytest.fixture(scope="module")
def sums(deep):
    """Sums of the same two latent frames in a layout with room for four and in one that fits; then what made them."""
    conditions, negative = deep.conditions(PROMPTS)[0], deep.conditions(["", ""])[0]
    found = []
    for frames in (25, 9):
        generator = Generator(deep, height=64, width=64, frames=frames)
        noise = generator.noise(0, [0, 1], 2)
        _, each = generator.latents(conditions, noise, deep.sampling, negative=negative, influence=True)
        found.append(np.asarray(each))
    return found, conditions.mask, negative.mask, generator.envelopes, generator


def test_a_block_that_changes_nothing_has_no_influence(sums):
    influence = BlockInfluence.from_sums(sums[0][0])
    assert influence.image[1] == influence.text[1] == 0
    for kind in (influence.image, influence.text):
        assert kind.shape == (LAYERS - 1,)
        assert (np.delete(kind, 1) > 1e-3).all()
        assert (kind < 2).all()


def test_padding_does_not_count(sums):
    """Neither empty history slots nor padded text: the weights are the numbers of real tokens of both branches."""
    (padded, exact), positive, negative, envelopes, _ = sums
    text = int(positive.sum() + negative.sum()) * 4  # two units, two stages, one step each
    mask = np.zeros((1, envelopes[0].text_length))  # padded text, so that what is left is image
    rows = [layout_arrays(e, unit, mask) for e in envelopes for unit in (0, 1)]
    image = 2 * len(PROMPTS) * sum(int((row.segments == 1).sum()) for row in rows)
    for found in (exact, padded):
        np.testing.assert_array_equal(found[:, 0, 1], image)
        np.testing.assert_array_equal(found[:, 1, 1], text)
    np.testing.assert_allclose(padded, exact, rtol=1e-4)


def test_influence_of_a_system_adds_up_over_batches(deep, sums):
    """Two batches of two prompts, by the programs that made the sums of two; each prompt has noise of its own."""
    generator, seen = sums[4], []
    prompts = [*PROMPTS, *PROMPTS]
    found = block_influence(deep, prompts, seed=1, batch=2, generator=generator, progress=lambda *at: seen.append(at))
    assert generator.compilations == 2
    assert seen == [(2, 4), (4, 4)]
    conditions, negative = deep.conditions(PROMPTS)[0], deep.conditions(["", ""])[0]
    total = 0
    for first in (0, 2):
        noise = generator.noise(1, [f"influence-{first}", f"influence-{first + 1}"])
        total += generator.latents(conditions, noise, deep.sampling, negative=negative, influence=True)[1]
    expected = BlockInfluence.from_sums(total)
    np.testing.assert_allclose(found.image, expected.image, rtol=1e-6)
    np.testing.assert_allclose(found.text, expected.text, rtol=1e-6)
    with pytest.raises(UserError, match="no prompts"):
        block_influence(deep, [])


def test_score_weighs_both_kinds_alike():
    influence = BlockInfluence(np.array([0.1, 0.2, 0.0]), np.array([10.0, 5.0, 0.0]))
    np.testing.assert_allclose(influence.score, [0.75, 0.75, 0.0])
    nothing = BlockInfluence(np.zeros(2), np.zeros(2))
    np.testing.assert_array_equal(nothing.score, [0, 0])


# ---- choice


def test_the_least_influential_go_and_the_protected_stay():
    score = np.array([0.3, 0.1, 0.2, 0.1, 0.9])
    assert choose_blocks(score, 0) == ()
    assert choose_blocks(score, 2) == (1, 3)
    assert choose_blocks(score, 3) == (1, 2, 3)
    assert choose_blocks(score, 2, protect=(1,)) == (2, 3)
    assert choose_blocks(score, 5) == (0, 1, 2, 3, 4)
    for count, protect in ((6, ()), (-1, ()), (5, (0,))):
        with pytest.raises(UserError, match=f"prune: {count} blocks"):
            choose_blocks(score, count, protect)


# ---- removal


def test_surviving_blocks_are_the_same_bits(deep):
    config, params = deep.config.diffusion_transformer, deep.params[DENOISER]
    smaller, left, kept = remove_blocks(config, params, (2, 0))
    assert smaller == dataclasses.replace(config, num_layers=3)
    assert kept == (1, 3, 4)
    assert {"blocks", *left} == {"blocks", *params}
    for before, after in zip(jax.tree.leaves(params["blocks"]), jax.tree.leaves(left["blocks"]), strict=True):
        np.testing.assert_array_equal(after, before[[1, 3]])
    assert all(left[name] is params[name] for name in params if name != "blocks")


@pytest.mark.parametrize("drop", [(4,), (-1,), (0, 0), (9,)])
def test_blocks_that_cannot_go(deep, drop):
    with pytest.raises(UserError, match="block 4 is the last"):
        remove_blocks(deep.config.diffusion_transformer, deep.params[DENOISER], drop)


def test_closed_gates_mean_that_removal_changes_nothing(deep, sums):
    """The block without influence goes, and the denoiser answers as before."""
    conditions, envelope = deep.conditions(PROMPTS)[0], sums[3][0]
    smaller, kept = without_blocks(deep, (1,))
    assert kept == (0, 2, 3, 4)
    rng = np.random.Generator(np.random.Philox(1))
    clips = [rng.standard_normal((2, *clip, 4), np.float32) for clip in envelope.clips]
    layout = layout_arrays(envelope, 1, conditions.mask)
    answers = []
    for system in (deep, smaller):
        call = jax.jit(system.definitions[DENOISER])
        times = jnp.full((2,), 500.0)
        answers.append(call(system.params[DENOISER], [clips], conditions.text, conditions.pooled, times, [layout])[0])
    np.testing.assert_allclose(*answers, rtol=0, atol=1e-6)
    assert float(jnp.abs(answers[0]).max()) > 0.01


def test_export_renumbers_and_imports_again(deep, tiny_folder, tmp_path):
    smaller, kept = without_blocks(deep, (0, 2))
    tokenizers = {name: tiny_folder / "tokenizers" / name for name in TOKENIZERS.values()}
    for name, system in (("before", deep), ("after", smaller)):
        save_system(tmp_path / name, system, tokenizers)
    part = "diffusion_transformer_320p_multistep_t2v"
    before, after = (
        read_tensors(tmp_path / name / part / "diffusion_pytorch_model.safetensors") for name in ("before", "after")
    )
    assert json.loads((tmp_path / "after" / part / "config.json").read_text())["num_layers"] == 3
    expected = {}
    for name, tensor in before.items():
        head, _, rest = name.partition("transformer_blocks.")
        number, _, tail = rest.partition(".")
        if head or not rest:
            expected[name] = tensor
        elif int(number) in kept:
            expected[f"transformer_blocks.{kept.index(int(number))}.{tail}"] = tensor
    assert after.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(after[name], tensor, err_msg=name)

    again = load_system(tmp_path / "after")
    assert again.config == smaller.config
    assert again.video == deep.video
    assert again.schedule == deep.schedule
    assert again.sampling == deep.sampling
    for one, two in zip(jax.tree.leaves(smaller.params), jax.tree.leaves(again.params), strict=True):
        np.testing.assert_array_equal(one, two)
    config, _ = load_component(tmp_path / "after" / part)
    assert config.num_layers == 3
