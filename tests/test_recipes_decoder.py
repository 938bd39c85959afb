"""Decoder distillation: a frozen encoder, a loss that adds up, the coarse start, and one device against eight."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_system
from test_perceptual import VGG, state_dict

from nd_jax.errors import UserError
from nd_jax.models.causal_vae import NativeVAEConfig, definition, posterior
from nd_jax.models.functional import count_parameters
from nd_jax.recipes.coarse_start import LIFT, check_room, coarse_start, fit_colours
from nd_jax.recipes.decoder_distillation import (
    DECODER,
    ENCODER,
    MATCH,
    DecoderRecipe,
    DecoderRecipeConfig,
    codec_params,
)
from nd_jax.recipes.multiscale import multiscale_terms
from nd_jax.recipes.perceptual import lpips_params
from nd_jax.recipes.preset import load_preset
from nd_jax.recipes.tiny_student import matching_levels, student_config
from nd_jax.training.hooks import sharding_hooks
from nd_jax.training.mesh import MeshConfig, make_mesh
from nd_jax.training.optim import OptimConfig
from nd_jax.training.paths import named_leaves
from nd_jax.training.program import Program

TEACHER = tiny_system.CONFIG.causal_video_vae
HEIGHT, WIDTH, FRAMES, BATCH = 32, 16, 9, 8
CONFIG = DecoderRecipeConfig(
    batch=BATCH,
    frames=FRAMES,
    channels=(8, 6, 4, 4),
    sample=True,
    features=0.2,
    coarse_start=False,
    ema_decay=0.5,
    optim=OptimConfig(learning_rate=1e-2, warmup_steps=1, schedule="constant"),
)


def clips(count: int, seed: int = 0) -> np.ndarray:
    """Smooth uint8 clips, [count, FRAMES, HEIGHT, WIDTH, 3]."""
    rng = np.random.Generator(np.random.Philox(seed))
    t, y, x = np.meshgrid(np.arange(FRAMES) / 9, np.arange(HEIGHT) / 16, np.arange(WIDTH) / 24, indexing="ij")
    wave = rng.normal(size=(count, 3, 4))
    phase = np.einsum("nck,kthw->nthwc", wave, np.stack([t, 2 * y, 2 * x, np.ones_like(t)]))
    return (127.5 + 100 * np.sin(phase)).astype(np.uint8)


def teacher_params() -> dict:
    return tiny_system.random_system_params()["causal_video_vae"]


def program_on(devices: int, sizes: MeshConfig | None = None, **changes) -> Program:
    mesh = make_mesh(sizes or MeshConfig(data=-1, fsdp=min(devices, 4)), jax.devices()[:devices])
    config = dataclasses.replace(CONFIG, **changes)
    recipe = DecoderRecipe(TEACHER, config, HEIGHT, WIDTH, hooks=sharding_hooks(mesh))
    recipe.rules = dataclasses.replace(recipe.rules, minimum=200)
    return Program(recipe, mesh, jax.random.key(0), (recipe.frozen(teacher_params()),))


def steps_of(program: Program, count: int) -> tuple[list[dict], object]:
    """Metrics of the first steps, and the state after them."""
    names, step, batch = program.metric_names, program.compile_step(), program.put({"video": clips(BATCH)})
    state, rows = program.initial_state(), []
    for _ in range(count):
        state, packed = step(state, batch)
        rows.append(dict(zip(names, np.asarray(packed).tolist(), strict=True)))
    return rows, state


@pytest.fixture(scope="module")
def program():
    return program_on(1)


@pytest.fixture(scope="module")
def trained(program):
    return steps_of(program, 12)


# ---- the step


def test_no_encoder_bit_moves(program, trained):
    """Encoder, and what it says of clips, are the same after twelve steps, in the state and in the codec made of it."""
    _, state = trained
    teacher = teacher_params()
    before = {name: np.asarray(leaf) for name, leaf in named_leaves({name: teacher[name] for name in ENCODER})}
    after = {name: np.asarray(leaf) for name, leaf in named_leaves(state.frozen["codec"])}
    made = codec_params(jax.device_get(state.ema), teacher)
    whole = {name: np.asarray(leaf) for name, leaf in named_leaves({name: made[name] for name in ENCODER})}
    assert before.keys() == after.keys() == whole.keys()
    for name, value in before.items():
        assert value.tobytes() == after[name].tobytes() == whole[name].tobytes(), name
    pixels = clips(2, seed=5).astype(np.float32) / 127.5 - 1
    encode = jax.jit(lambda params, x: program.recipe.encoder.bind(params).encode(x))
    parts = ({name: params[name] for name in ENCODER} for params in (teacher, made))
    np.testing.assert_array_equal(*(encode(part, pixels) for part in parts))
    for name, leaf in named_leaves(state.frozen["native"]):
        np.testing.assert_array_equal(leaf, dict(named_leaves(teacher))[name])


def test_frozen_parameters_cost_no_optimizer_state(program):
    state = program.state
    assert set(state.params) == set(state.ema) == {*DECODER, MATCH}
    assert set(state.frozen) == {"codec", "native"}
    trained = count_parameters(state.params)
    moments = sum(leaf.size for _, leaf in named_leaves(state.opt_state) if leaf.ndim)
    assert moments == 2 * trained
    assert {part for part in program.metric_names if "grad_norm_of" in part} == {
        f"optim/grad_norm_of/{part}" for part in state.params
    }


def test_steps_repeat_and_reduce_the_loss(program, trained):
    rows, state = trained
    losses = [row["loss"] for row in rows]
    assert np.mean(losses[-3:]) < 0.95 * np.mean(losses[:3]), losses
    assert int(state.step) == 12
    fresh = program.initial_state().params
    changes = jax.tree.map(lambda new, old: np.abs(new - old).max(), state.params, fresh)
    still = {name for name, change in named_leaves(changes) if not change}
    assert not still, f"{still} were not trained"


def test_loss_is_made_of_the_networks_own_answers(program, trained):
    """The first step's metrics, from both whole codecs run by hand with the step's own noise."""
    recipe, metrics, teacher = program.recipe, trained[0][0], teacher_params()
    state = program.initial_state()
    noise = recipe.draws(state.step_key())["noise"]
    pixels = clips(BATCH).astype(np.float32) / 127.5 - 1
    student = student_config(TEACHER, CONFIG.channels, CONFIG.space_growth, CONFIG.time_growth)
    whole = {**{name: teacher[name] for name in ENCODER}, **{name: state.params[name] for name in DECODER}}

    @jax.jit
    def through(teacher, whole, pixels, noise):
        code = posterior(definition(TEACHER).bind(teacher).encode(pixels))
        latent, native, tiny = code.mean + code.std * noise, {}, {}
        definition(TEACHER).bind(teacher).decode(latent, activations=native)
        definition(student).bind(whole).decode(latent, activations=tiny)
        return native, tiny

    native, tiny = through(teacher, whole, pixels, noise)
    made = np.asarray(tiny["22"])[:, 7:]
    assert made.shape == pixels.shape
    squared = np.square(made - pixels).mean()
    np.testing.assert_allclose(metrics["term/squared"], squared, rtol=1e-4)
    np.testing.assert_allclose(metrics["psnr"], 10 * np.log10(4 / squared), rtol=1e-4)
    total, weights = CONFIG.squared * squared, CONFIG.multiscale
    for name, term in multiscale_terms(jnp.asarray(made), jnp.asarray(pixels), weights.scales).items():
        np.testing.assert_allclose(metrics[f"term/{name}"], term.mean(), rtol=1e-4)
        total += CONFIG.perceptual * getattr(weights, name) * term.mean()
    apart = []
    for index, (entry, block, skip) in enumerate((("08", "up_0", 1), ("14", "up_1", 3), ("20", "up_2", 7))):
        found = np.asarray(tiny[entry])[:, skip:] @ np.asarray(state.params[MATCH][str(index)]["kernel"])
        target = np.asarray(native[block])
        apart.append(np.square(found - target).mean((1, 2, 3, 4)) / np.square(target).mean((1, 2, 3, 4)))
    np.testing.assert_allclose(metrics["term/features"], np.mean(apart), rtol=1e-3)
    np.testing.assert_allclose(metrics["loss"], total + CONFIG.features * np.mean(apart), rtol=1e-4)


@pytest.mark.heavy
def test_eight_devices_in_two_passes_agree_with_one(trained):
    """Parameters split four ways and clips eight ways, gradients accumulated over two microbatches."""
    program = program_on(8, microbatches=2)
    places = jax.tree.map(lambda leaf: leaf.sharding, (program.state.params, program.state.frozen))
    split = {name for name, place in named_leaves(places) if not place.is_fully_replicated}
    assert any("decoder/" in name for name in split)
    assert any("encoder/" in name for name in split)
    rows, _ = steps_of(program, 2)
    for found, expected in zip(rows, trained[0], strict=False):
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-3, atol=1e-6, err_msg=name)


@pytest.mark.heavy
def test_lines_of_a_picture_split_over_devices_change_nothing(trained):
    """Two clips a device's row, each clip's lines on two devices: what a batch smaller than a slice needs."""
    rows, _ = steps_of(program_on(4, MeshConfig(fsdp=2, context=2)), 2)
    for found, expected in zip(rows, trained[0], strict=False):
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-3, atol=1e-6, err_msg=name)


# ---- its parts


def test_lpips_takes_the_frames_that_were_drawn():
    params = lpips_params(state_dict(VGG, {}), "here")
    config = dataclasses.replace(CONFIG, features=0.0, perceptual_frames=2)
    recipe = DecoderRecipe(TEACHER, config, HEIGHT, WIDTH, lpips=params)
    assert set(recipe.frozen(teacher_params(), params)) == {"codec", "lpips"}
    frames = recipe.draws(jax.random.key(3))["frames"]
    assert frames.shape == (BATCH, 2)
    assert all(len(set(row.tolist())) == 2 for row in np.asarray(frames))
    assert np.asarray(frames).min() >= 0
    assert np.asarray(frames).max() < FRAMES
    made, video = (clips(2, seed).astype(np.float32) / 127.5 - 1 for seed in (1, 2))
    found = recipe._lpips(params, made, video, frames[:2])
    expected = [recipe.lpips(params, made[n][frames[n]], video[n][frames[n]]).mean() for n in range(2)]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    whole = recipe._lpips(params, made, video, None)
    assert np.abs(np.asarray(found) - np.asarray(whole)).max() > 1e-6
    with pytest.raises(UserError, match="perceptual_frames is 10"):
        DecoderRecipe(TEACHER, dataclasses.replace(config, perceptual_frames=10), HEIGHT, WIDTH)
    with pytest.raises(UserError, match="sides of at least 16"):
        DecoderRecipe(TEACHER, config, 8, 16, lpips=params)


def test_the_student_keeps_the_teachers_encoder_and_constants():
    rows = ((0.1, 0.2, 0.3, 0.4), (0.5, 0.6, 0.7, 0.8))
    teacher = dataclasses.replace(TEACHER, latents_mean=rows, latents_std=rows)
    with pytest.raises(UserError, match=r"time_growth .* grows 4 times, the encoder shrinks 8 times; expected 3 times"):
        student_config(teacher, (8, 6, 4, 4), (True, True, True), (True, True, False))
    student = student_config(teacher, (8, 6, 4, 4), (True, True, True), (True, True, True))
    assert (student.latents_mean, student.latents_std) == (rows, rows)
    shared = [each.name for each in dataclasses.fields(student) if each.name.startswith("encoder_")]
    assert all(getattr(student, name) == getattr(teacher, name) for name in shared)
    halves = [definition(student, half=half).abstract() for half in ("encoder", "decoder")]
    assert {**halves[0], **halves[1]} == definition(student).abstract()
    assert halves[0] == {name: definition(teacher).abstract()[name] for name in ENCODER}


def test_features_meet_where_sizes_agree():
    late = dataclasses.replace(
        TEACHER,
        decoder_spatial_up_sample=(True, True, False, True),
        decoder_temporal_up_sample=(True, False, True, True),
    )
    student = student_config(late, (8, 6, 4, 4), (True, True, True), (True, True, True))
    assert [(level.student, level.native, level.skip) for level in matching_levels(late, student)] == [
        ("08", "up_0", 1),
        ("14", "up_2", 3),
        ("20", "up_3", 7),
    ]
    odd = dataclasses.replace(
        TEACHER,
        decoder_spatial_up_sample=(True, True, True, False),
        decoder_temporal_up_sample=(False, True, True, True),
    )
    assert [level.native for level in matching_levels(odd, student)] == ["up_3"]
    with pytest.raises(UserError, match="features"):
        DecoderRecipe(student, CONFIG, HEIGHT, WIDTH)


# ---- the coarse start


def test_coarse_start_shows_the_fitted_colours():
    """At step 0 the decoder's video is the least-squares picture, frame by frame, and fits better than any constant."""
    teacher = dataclasses.replace(TEACHER, encoder_out_channels=6, decoder_in_channels=6)
    student = student_config(teacher, (26, 13, 7, 4), (True, True, True), (True, True, True))
    video = clips(6)[:, :, :16]
    cells = (video.astype(np.float32) / 127.5 - 1).reshape(6, 9, 2, 8, 2, 8, 3).mean((3, 5))
    latents = np.concatenate([cells[:, [0, 8]], cells[:, [0, 4]]], axis=-1) * 2 + 0.5
    fit = fit_colours(latents, video)
    assert fit["kernel"].shape == (3, 3, 6, 24)
    net = definition(student, half="decoder")
    made = np.asarray(
        jax.jit(lambda key, z: net.bind(coarse_start(student, net.init(key), fit)).decode(z))(
            jax.random.key(0), latents
        )
    )
    squashed = 3 * np.tanh((latents - fit["shift"]) * fit["scale"] / 3)
    padded = np.pad(squashed, ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0)))
    expected = fit["bias"] + sum(
        padded[:, :, y : y + 2, x : x + 2] @ fit["kernel"][y, x] for y in range(3) for x in range(3)
    )
    expected = np.moveaxis(expected.reshape(6, 2, 2, 2, 8, 3), 4, 2).reshape(6, 16, 2, 2, 3)[:, 7:]
    assert expected.min() > -LIFT
    np.testing.assert_allclose(made, expected.repeat(8, 2).repeat(8, 3), atol=1e-4)
    error, constant = np.square(expected - cells).mean(), np.square(cells - cells.mean((0, 1, 2, 3))).mean()
    assert error < 0.2 * constant


def test_coarse_start_needs_room():
    student = student_config(TEACHER, (23, 12, 6, 3), (True, True, True), (True, True, True))
    with pytest.raises(UserError, match=r"at least \(24, 12, 6, 3\); set coarse_start to false"):
        check_room(student)
    check_room(student_config(TEACHER, (24, 12, 6, 3), (True, True, True), (True, True, True)))


# ---- presets and the page


def test_the_shapes_decoder_has_at_most_a_fifth_of_the_parameters():
    preset = load_preset("shapes_base")
    recipe, teacher = preset.run("decoder").recipe, preset.system.causal_video_vae
    student = student_config(teacher, recipe.channels, recipe.space_growth, recipe.time_growth)
    ours, native = (count_parameters(definition(each, half="decoder").abstract()) for each in (student, teacher))
    assert 5 * ours <= native
    assert recipe.frames >= 17
    check_room(student)


def test_the_full_size_step_lowers():
    """Published channels, LPIPS with VGG16 at its real widths, eight devices; nothing is allocated or compiled."""
    run, video = load_preset("neodragon_320p").run("decoder"), load_preset("neodragon_320p").video
    tensors = state_dict(VGG, {}, widths=(64, 128, 256, 512, 512))
    lpips = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, lpips_params(tensors, "here")))
    teacher = NativeVAEConfig()
    recipe = DecoderRecipe(teacher, run.recipe, video.height, video.width, lpips=lpips)
    assert recipe.tiny == load_preset("neodragon_320p").system.causal_video_vae
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    fit = {"shift": (16,), "scale": (16,), "kernel": (3, 3, 16, 24), "bias": (24,)}
    fit = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in fit.items()}
    program = Program(recipe, mesh, jax.random.key(0), (recipe.frozen(definition(teacher).abstract(), lpips), fit))
    text = jax.jit(recipe.step).lower(program.state, program.batch).as_text()
    assert "64x17x320x512x3xui8" in text
    assert "bf16" in text
    assert count_parameters(program.state.params["decoder"]) == 9_910_147


def test_the_pages_example_is_a_decoder_the_recipe_takes():
    """docs/decoders.md: a decoder of another compression, behind an adapter, traced through a whole step."""
    page = (Path(__file__).parents[1] / "docs" / "decoders.md").read_text()
    code = re.search(r"```python\n(.*?)```", page, re.DOTALL).group(1)
    space = {"teacher": TEACHER}
    exec(compile(code, "docs/decoders.md", "exec"), space)
    recipe = space["recipe"]
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    program = Program(recipe, mesh, jax.random.key(0), (recipe.frozen(definition(TEACHER).abstract()),))
    assert {"loss", "term/squared", "term/motion"} <= set(program.metric_names)
    assert set(program.state.params) == {"adapter", "decoder"}
