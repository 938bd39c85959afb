"""Block influence and removal: what is measured, what is chosen, and that the rest stays as it was."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_system

from nd_jax import cli
from nd_jax.converters.component import load_component
from nd_jax.converters.safetensors_io import read_tensors
from nd_jax.data.source import prompts as world_prompts
from nd_jax.data.world import world_named
from nd_jax.errors import UserError
from nd_jax.generate import Generator, generate
from nd_jax.importance_report import Importance, read_score, write_importance
from nd_jax.influence import block_influence
from nd_jax.models.mmdit import definition
from nd_jax.models.system import DENOISER, TEXT_PARTS
from nd_jax.pruning_record import RECORD
from nd_jax.pyramid.layout import layout_arrays
from nd_jax.pyramid.sampler import CountingJit, SamplePlan
from nd_jax.pyramid.schedule import Schedule
from nd_jax.recipes.pruning import (
    BlockInfluence,
    choose_below,
    choose_blocks,
    one_minus_cosine,
    population,
    random_score,
    remove_blocks,
)
from nd_jax.remove_one import OutputError, judged_accuracy, without_each
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
    assert influence.by_stage.shape == (2, LAYERS - 1, 2)
    assert not influence.by_stage[:, 1].any()
    assert (influence.by_stage[0, 0] != influence.by_stage[1, 0]).all()
    for kind, whole in enumerate((influence.image, influence.text)):
        low, high = (edge(influence.by_stage[..., kind], axis=0) for edge in (np.min, np.max))
        assert ((low <= whole) & (whole <= high)).all()
    for kind in (influence.image, influence.text):
        assert kind.shape == (LAYERS - 1,)
        assert (np.delete(kind, 1) > 1e-3).all()
        assert (kind < 2).all()


def test_padding_does_not_count(sums):
    """Neither empty history slots nor padded text: the weights are the numbers of real tokens of both branches."""
    (padded, exact), positive, negative, envelopes, _ = sums
    text = int(positive.sum() + negative.sum()) * 2  # two units, one step each
    mask = np.zeros((1, envelopes[0].text_length))  # padded text, so that what is left is image
    for stage, envelope in enumerate(envelopes):
        rows = [layout_arrays(envelope, unit, mask) for unit in (0, 1)]
        image = 2 * len(PROMPTS) * sum(int((row.segments == 1).sum()) for row in rows)
        for found in (exact, padded):
            np.testing.assert_array_equal(found[stage, :, 0, 1], image)
            np.testing.assert_array_equal(found[stage, :, 1, 1], text)
    np.testing.assert_allclose(padded, exact, rtol=1e-4)


def test_influence_of_a_system_adds_up_over_batches(deep, sums):
    """Two samples of two prompts, by the programs that made the sums of two; each sample has noise of its own."""
    generator, seen = sums[4], []
    found = block_influence(
        deep, PROMPTS, seed=1, samples=2, batch=2, generator=generator, progress=lambda *at: seen.append(at)
    )
    assert generator.compilations == 2
    assert seen == [(2, 4), (4, 4)]
    negative, total = deep.conditions(["", ""])[0], 0
    for n, prompt in enumerate(PROMPTS):
        conditions = deep.conditions([prompt, prompt])[0]
        noise = generator.noise(1, [f"influence-{n}-0", f"influence-{n}-1"])
        total += generator.latents(conditions, noise, deep.sampling, negative=negative, influence=True)[1]
    expected = BlockInfluence.from_sums(total)
    np.testing.assert_allclose(found.image, expected.image, rtol=1e-6)
    np.testing.assert_allclose(found.text, expected.text, rtol=1e-6)
    np.testing.assert_allclose(found.by_stage, expected.by_stage, rtol=1e-6)
    with pytest.raises(UserError, match="no prompts"):
        block_influence(deep, [])
    with pytest.raises(UserError, match="0 samples"):
        block_influence(deep, PROMPTS, samples=0)


def test_score_weighs_both_kinds_alike():
    stages = np.zeros((1, 3, 2))
    influence = BlockInfluence(np.array([0.1, 0.2, 0.0]), np.array([10.0, 5.0, 0.0]), stages)
    np.testing.assert_allclose(influence.score, [0.75, 0.75, 0.0])
    nothing = BlockInfluence(np.zeros(2), np.zeros(2), stages)
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
    with pytest.raises(UserError, match=r"blocks \[6\] to protect"):
        choose_blocks(score, 1, (6,))


def test_all_below_a_threshold_go():
    score = np.array([0.3, 0.1, 0.2, 0.1, 0.9])
    assert choose_below(score, 0.1) == ()
    assert choose_below(score, 0.25) == (1, 2, 3)
    assert choose_below(score, 0.25, protect=(2, 5)) == (1, 3)
    with pytest.raises(UserError, match="finite"):
        choose_below(score, float("nan"))


def test_chance_chooses_every_block_alike():
    drawn = [choose_blocks(random_score(7, seed), 2) for seed in range(300)]
    counts = np.bincount(np.ravel(drawn), minlength=7)
    assert counts.sum() == 600
    assert abs(counts / 600 - 1 / 7).max() < 0.05
    assert drawn[5] == choose_blocks(random_score(7, 5), 2)


# ---- candidates


def test_candidates_are_those_networks_and_compile_once(deep, sums):
    """Kept blocks are data: one program for all selections of so many, which answers as the network cut to them."""
    conditions, envelope = deep.conditions(PROMPTS)[0], sums[3][1]
    rng = np.random.Generator(np.random.Philox(2))
    clips = [rng.standard_normal((2, *clip, 4), np.float32) for clip in envelope.clips]
    inputs = [clips], conditions.text, conditions.pooled, jnp.full((2,), 500.0), [layout_arrays(envelope, 1)]
    denoise = deep.definitions[DENOISER]
    run = CountingJit(lambda params, kept, inputs: denoise(params, *inputs, kept=kept)[0])
    drops = [(2, 0), (1, 3), (0, 1)]
    candidates = population(LAYERS - 1, drops)
    assert candidates.tolist() == [[1, 3], [0, 2], [2, 3]]
    exact = jax.jit(denoise)
    for drop, kept in zip(drops, candidates, strict=True):
        _, smaller, _ = remove_blocks(deep.config.diffusion_transformer, deep.params[DENOISER], drop)
        answer = run(deep.on_device[DENOISER], kept, inputs)
        np.testing.assert_allclose(answer, exact(smaller, *inputs)[0], rtol=0, atol=1e-6)
    assert run.compilations == 1
    with pytest.raises(UserError, match=r"candidates drop \[1, 2\] blocks"):
        population(4, [(0,), (1, 2)])
    with pytest.raises(UserError, match="block 4 is the last"):
        population(4, [(4,)])


def test_output_error_is_the_distance_on_the_same_inputs(deep):
    """One latent frame: the lowest stage's one call is computed again by hand, both branches of guidance."""
    generator = Generator(deep, height=64, width=64, frames=1)
    measure, candidates = OutputError(generator), without_each(deep)
    found = measure(PROMPTS, candidates, seed=4, batch=2)
    assert found.shape == (2, LAYERS - 1)
    assert (np.abs(found[:, 1]) < 1e-10).all(), "the block with closed gates changes nothing"
    assert (np.delete(found, 1, axis=1) > 1e-5).all()

    conditions, negative = deep.conditions(PROMPTS)[0], deep.conditions(["", ""])[0]
    noise = generator.noise(4, ["output error-0-0", "output error-1-0"])
    calls = []
    generator.latents(conditions, noise, deep.sampling, negative=negative, trace=calls.append)
    call, envelope = calls[0], generator.envelopes[0]
    denoise, errors = jax.jit(deep.definitions[DENOISER]), []
    _, smaller, _ = remove_blocks(deep.config.diffusion_transformer, deep.params[DENOISER], (2,))
    empty = [np.zeros((2, *clip, 4), np.float32) for clip in envelope.clips[:-1]]
    for branch in (conditions, negative):
        layout = layout_arrays(envelope, 0, branch.mask)
        inputs = [[*empty, call.sample_before]], branch.text, branch.pooled, call.timestep, [layout]
        full, without = (denoise(params, *inputs)[0] for params in (deep.params[DENOISER], smaller))
        errors.append(np.square(np.asarray(full) - np.asarray(without)).mean())
    np.testing.assert_allclose(found[0, 2], np.mean(errors), rtol=1e-4)

    assert measure.compilations == 2
    both = measure(PROMPTS, population(LAYERS - 1, [(2,), (1,), (0,), (3,)]), seed=4, batch=2)
    np.testing.assert_allclose(both, found[:, [2, 1, 0, 3]], rtol=1e-6, atol=1e-12)
    assert measure.compilations == 2, "other candidates are other data"


def test_judged_accuracy_without_each_block(deep, sums):
    """All candidates by the programs of one; without the closed block the videos, and so the readings, stay."""
    generator, world, seen = sums[4], world_named("64x64"), []
    before = generator.compilations
    full, each = judged_accuracy(
        deep, world, count=2, batch=2, generator=generator, progress=lambda *at: seen.append(at)
    )
    assert generator.compilations - before == 4, "two stages, for the whole network and for all smaller ones"
    assert each.shape == (LAYERS - 1,)
    assert each[1] == full
    assert seen[-1] == (4, 4)
    captions, _ = world_prompts(world, "train", 2, seed=1)
    videos = [generate(deep, captions, batch=2, generator=generator, kept=kept) for kept in without_each(deep)[:2]]
    whole = generate(deep, captions, batch=2, generator=generator)
    assert np.abs(videos[1].astype(int) - whole).max() <= 1
    assert (videos[0] != whole).any()


def test_importance_on_file_in_a_report_and_read_again(tmp_path):
    influence = BlockInfluence(np.array([0.1, 0.3]), np.array([0.2, 0.1]), np.full((3, 2, 2), 0.1))
    importance = Importance(influence, np.array([[1.0, 3.0], [3.0, 5.0]]), (0.9, np.array([0.8, 0.5])))
    path = tmp_path / "scores.json"
    path.write_text(json.dumps(importance.figures()))
    for by, expected in (("influence", influence.score), ("error", [2, 4]), ("judge", [0.1, 0.4])):
        np.testing.assert_allclose(read_score(path, by, 2), expected)
    for by, blocks in (("random", 2), ("error", 3)):
        with pytest.raises(UserError, match="scores by"):
            read_score(path, by, blocks)
    path.write_text(json.dumps({"scores": {"error": [1, "2"]}}))
    with pytest.raises(UserError, match="are not 2 numbers"):
        read_score(path, "error", 2)
    titles = [section.title for section in importance.sections((1,))]
    assert len(titles) == len(set(titles)) == 6
    html = write_importance(tmp_path / "report.html", importance, "<here>").read_text()
    assert all(title in html for title in titles)
    assert "<here>" not in html
    assert html.count("image/svg+xml") == 5


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
    assert smaller.kept_blocks == kept == (1, 3, 4)
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
    assert again.kept_blocks == (1, 3, 4)
    assert load_system(tmp_path / "before").kept_blocks is None
    assert without_blocks(again, (0,))[1] == (3, 4), "indices stay the original ones"
    for one, two in zip(jax.tree.leaves(smaller.params), jax.tree.leaves(again.params), strict=True):
        np.testing.assert_array_equal(one, two)
    config, _ = load_component(tmp_path / "after" / part)
    assert config.num_layers == 3


@pytest.mark.parametrize(
    "content",
    [
        {"kept_blocks": [0, 2], "original_blocks": 4},
        {"kept_blocks": [0], "original_blocks": 3},
        {"kept_blocks": [2, 0], "original_blocks": 1},
        {"kept_blocks": [-1, 2], "original_blocks": 3},
        {"kept_blocks": [True, 2], "original_blocks": 3},
        {"kept_blocks": "02", "original_blocks": 3},
        {},
    ],
)
def test_a_damaged_pruning_record_is_refused(pruned, content):
    (pruned / RECORD).write_text(json.dumps(content))
    with pytest.raises(UserError, match="prune again"):
        load_system(pruned)


@pytest.fixture(scope="module")
def pruned(tiny, tiny_folder, tmp_path_factory):
    """Folder of the tiny system without its second block of three."""
    tokenizers = {name: tiny_folder / "tokenizers" / name for name in TOKENIZERS.values()}
    smaller, _ = without_blocks(tiny, (1,))
    return save_system(tmp_path_factory.mktemp("pruned") / "system", smaller, tokenizers)


# ---- the commands


def test_importance_and_choice_by_command(tiny_folder, tmp_path, capsys):
    """Measured once, with a report; chosen from the file by error, at random, and with fresh weights."""
    system, scores, report = str(tiny_folder / "system"), tmp_path / "scores.json", tmp_path / "report.html"
    options = ("--prompts", "1", "--samples", "2", "--batch", "2", "--error", "--out", str(scores))
    assert cli.main(["prune", "importance", system, *options, "--report", str(report)]) == 0
    assert capsys.readouterr().out.split("\n")[0].split() == ["block", "image", "text", "influence", "error"]
    content = json.loads(scores.read_text())
    assert np.shape(content["stages"]) == (3, 2, 2)
    assert np.shape(content["error_stages"]) == (3, 2)
    assert content["settings"]["samples"] == 2
    assert report.exists()

    apply = ["prune", "apply", system, "--scores", str(scores)]
    assert cli.main([*apply, "--by", "error", "--count", "1", "--out", str(tmp_path / "a")]) == 0
    drop = int(np.argmin(content["scores"]["error"]))
    assert load_system(tmp_path / "a").kept_blocks == (1 - drop, 2)
    assert json.loads((tmp_path / "a" / RECORD).read_text()) == {"kept_blocks": [1 - drop, 2], "original_blocks": 3}
    told = [*apply, "--by", "error", "--threshold", "1e9", "--protect", "0", "--out", str(tmp_path / "b")]
    assert cli.main(told) == 0
    assert load_system(tmp_path / "b").kept_blocks == (0, 2)
    fresh = ["prune", "apply", system, "--by", "random", "--count", "1", "--seed", "3", "--out", str(tmp_path / "c")]
    assert cli.main([*fresh, "--fresh"]) == 0
    one, other = (load_system(tmp_path / name).params for name in ("b", "c"))
    kernels = [params[DENOISER]["last_block"]["ff"]["up"]["kernel"] for params in (one, other)]
    assert kernels[0].shape == kernels[1].shape
    assert (kernels[0] != kernels[1]).all()
    for part in TEXT_PARTS:
        for left, right in zip(jax.tree.leaves(one[part]), jax.tree.leaves(other[part]), strict=True):
            np.testing.assert_array_equal(left, right)
    capsys.readouterr()
    assert cli.main([*apply, "--by", "judge", "--count", "1", "--out", str(tmp_path / "d")]) == 2
    assert "no scores by judge, found error, influence" in capsys.readouterr().err
    assert cli.main([*apply, "--drop", "1", "--out", str(tmp_path / "d")]) == 2
    assert "--drop names the blocks" in capsys.readouterr().err
    assert not (tmp_path / "d").exists()
