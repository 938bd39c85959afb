"""Self-forcing: the student's own videos as histories and inputs of its training."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import training_toy as toy
from test_dmd_recipe import ONE, RECIPE, linear, make_batch, numbers, recipe
from test_recipes_flow import CHANNELS, HEIGHT, SCHEDULE, UNITS, WIDTH, given

from nd_jax.models.system import DENOISER, Conditions
from nd_jax.pyramid.history import gather_history
from nd_jax.pyramid.layout import envelopes
from nd_jax.pyramid.renoise import block_noise
from nd_jax.pyramid.resample import double, latent_pyramid
from nd_jax.pyramid.sampler import SamplePlan, sample
from nd_jax.recipes.dmd import NEGATIVE, DmdState
from nd_jax.recipes.flow_matching import normals
from nd_jax.recipes.rollouts import motion_by_unit, roll_out
from nd_jax.training.mesh import MeshConfig, make_mesh
from nd_jax.training.program import Program

TEXT, ROWS = 3, 2
ENVELOPES = envelopes(UNITS - 1, TEXT, HEIGHT, WIDTH, patch_size=1)
POOLED = np.array([[0.3], [-0.7]], np.float32)


def denoise(clips, pooled, times, layout):
    """A denoiser that reads everything: ``0.4 z + 0.2 t / 1000 + 0.5 mean(history) + mean(pooled) + time / 10``."""
    (*history, z) = clips[0]
    past = sum(clip.mean((1, 2, 3, 4)) for clip in history)
    rows = 0.2 * times / 1000 + 0.5 * past + pooled.mean(-1) + layout.times[:, -1] / 10
    return 0.4 * z + rows.reshape(-1, 1, 1, 1, 1)


@pytest.mark.parametrize(("steps", "renew"), [((2, 1, 3), False), ((1, 2, 1), True)])
def test_a_rollout_is_what_the_sampler_makes(steps, renew):
    """The same noise through the sampler of `nd-jax generate`: every unit, and the input of every step."""
    conditions = Conditions(np.zeros((ROWS, TEXT, 2), np.float32), np.ones((ROWS, TEXT), np.int32), POOLED)
    key = jax.random.key(1)

    def call(clips, text, pooled, times, layouts):
        return [denoise(clips, pooled, times, layouts[0])]

    rolled = jax.jit(
        lambda key: roll_out(call, ENVELOPES, SCHEDULE, steps, conditions, key, channels=CHANNELS, renew=renew)
    )(key)

    sizes = [(*envelope.clips[-1], CHANNELS) for envelope in ENVELOPES]
    shapes = sizes + ([(n, *size) for n, size in zip(steps, sizes, strict=True)] if renew else [])
    noise = [normals(each, ROWS, shapes) for each in jax.random.split(key, UNITS)]
    initial = np.concatenate([double(double(each[0])) / 4 for each in noise], axis=1)
    seen = []

    def velocity(stage):
        def run(z, timestep, history, index, guidance):
            times = jnp.full((ROWS, 1), index)
            return denoise([(*history, z)], POOLED, timestep, type("Layout", (), {"times": times}))

        return run

    made = sample(
        velocity,
        ENVELOPES,
        SCHEDULE,
        SamplePlan(steps, steps, grid="plain", renew=renew),
        initial,
        lambda unit, stage: block_noise(noise[unit][stage], SCHEDULE.gamma),
        fresh_noise=lambda unit, stage, step: noise[unit][3 + stage][:, step],
        trace=seen.append,
    )
    np.testing.assert_allclose(rolled.units, made, atol=1e-4)
    assert len(seen) == UNITS * sum(steps)
    for call in seen:
        local = jnp.full(ROWS, 1 - call.step / steps[call.stage])
        found = rolled.input(call.stage, jnp.full(ROWS, call.unit), local)
        np.testing.assert_allclose(found, call.sample_before, atol=1e-4)
    changes = motion_by_unit(rolled.units, 2 * rolled.units)
    np.testing.assert_allclose(list(changes.values()), [0.5] * (UNITS - 1), rtol=1e-4)


def scene_of(made, count: int):
    """A state of numbers, and a batch with conditions that are their own row number."""
    groups, rows = len(made.columns), count // len(made.columns)
    made.definitions[DENOISER] = linear
    text = np.zeros((count, made.lengths[0], 2), np.float32)
    pooled = np.tile(np.arange(count, dtype=np.float32)[:, None] / count, (1, 5))
    made.encode = lambda params, examples: Conditions(text, np.ones(text.shape[:2], np.int32), pooled)
    start = numbers(0.2, -0.4, 0.3)
    state = DmdState.create(start, made.optimizer, jax.random.key(4))
    empty = {"text": text[:1], "mask": np.ones((1, made.lengths[0]), np.int32), "pooled": pooled[:1]}
    fake = {"fake": numbers(0.5, 0.1, -0.2), "fake_opt_state": made.fake_optimizer.init(start)}
    state = state.replace(frozen=numbers(0.9, -0.3, 0.6) | {NEGATIVE: empty}, **fake)
    return state, make_batch(count), pooled.reshape(rows, groups, -1)


def test_rows_of_the_students_own_know_nothing_of_the_data():
    """Its units are history and its way the input, clean, with one prompt for the row; other rows keep the data's."""
    made = recipe(batch=16, stage_mix=(1, 2, 1), steps=(2, 1, 2), own_history=0.5)
    assert made.rolled_rows == 2
    state, batch, pooled = scene_of(made, 16)
    examples, told = jax.jit(made.prepare)(state, batch)
    own = np.asarray(examples["own"])
    assert own.tolist() == [True, True, False, False]
    np.testing.assert_allclose(told["rollout"]["share"], 0.5)
    np.testing.assert_array_equal(examples["pooled"], np.where(own[:, None, None], pooled[:, :1], pooled))
    (rolled,) = examples["rolled"]
    assert not np.any(rolled.units[2:])
    assert np.abs(rolled.units[:2]).min() > 0

    drawn = jax.jit(made.draws)(jax.random.key(2)) | {"unit": np.full((4, 4), UNITS - 1, np.int32)}
    packed = jax.jit(made.inputs)(state.params[DENOISER], examples | drawn)
    plain = recipe(batch=16, stage_mix=(1, 2, 1), steps=(2, 1, 2))
    data = jax.jit(plain.scene)({name: x for name, x in examples.items() if name not in ("own", "rolled")} | drawn)
    levels = latent_pyramid(rolled.units, 3)
    for group, (stage, each, other) in enumerate(zip(made.columns, packed.examples, data.examples, strict=True)):
        expected = rolled.input(stage, drawn["unit"][:, group], drawn["local"][:, group])
        np.testing.assert_allclose(each.clips[-1][:2], expected[:2], atol=1e-6)
        histories = gather_history(made.envelopes[group], levels, drawn["unit"][:, group])
        for mine, history in zip(each.clips, histories, strict=False):
            np.testing.assert_allclose(mine[:2], history[:2], atol=1e-6)
        for mine, theirs in zip(each.clips, other.clips, strict=True):
            np.testing.assert_allclose(mine[2:], theirs[2:], atol=1e-6)


def test_the_share_grows_with_the_updates():
    made = recipe(own_history=0.6, own_after=10, own_ramp=20)
    shares = [float(made.own_share(jnp.int32(step))) for step in (0, 9, 19, 29, 500)]
    np.testing.assert_allclose(shares, [0, 0, 0.3, 0.6, 0.6], atol=1e-6)
    at_once = recipe(own_history=0.6)
    np.testing.assert_allclose(at_once.own_share(jnp.int32(0)), 0.6)


@pytest.mark.parametrize("videos", [True, False])
def test_a_step_on_nothing_but_its_own(videos):
    """Data without influence: another batch of latents leaves the step as it is, and prompts alone give the same."""
    options = {"own_history": 1.0, "stage_mix": (1, 1, 2), "steps": (1, 2, 1), "videos": videos}
    made = recipe(**options, cauchy_weight=0.5 if videos else 0.0)
    state, batch, _ = scene_of(made, RECIPE.batch)
    assert ("latents" in made.batch_spec()) == videos
    others = {**batch, "latents": -batch["latents"]}
    if not videos:
        batch = {name: x for name, x in batch.items() if name != "latents"}
        others = batch
    step = jax.jit(made.step)
    (after, metrics), (other, _) = step(state, batch), step(state, others)
    values = [float(after.params[DENOISER][name]["kernel"]) for name in ("noisy", "time", "prompt")]
    expected = [float(other.params[DENOISER][name]["kernel"]) for name in ("noisy", "time", "prompt")]
    np.testing.assert_allclose(values, expected, rtol=1e-6)
    assert np.abs(np.subtract(values, (0.2, -0.4, 0.3))).min() > 1e-4
    assert float(metrics["student"]["cauchy"]) == 0
    assert np.isfinite(jax.tree.leaves(jax.device_get(metrics))).all()
    assert isinstance(metrics["rollout"]["unit_1"], jax.Array)


@pytest.mark.heavy
def test_eight_devices_agree_with_one_on_rollouts():
    """One device makes half the videos, eight make all: a row's own is the same video, and the step the same step."""
    found = []
    for mesh in (ONE, make_mesh(MeshConfig(data=2, fsdp=4))):
        made = recipe(mesh, batch=16, stage_mix=(0, 1, 1), steps=(1, 2, 1), own_history=0.5)
        made.rules = dataclasses.replace(made.rules, minimum=1000)
        program = Program(made, mesh, jax.random.key(2), (given(),))
        before = program.initial_state()
        start = toy.numbers(before)
        after, _ = program.compile_step()(before, program.put(make_batch(16)))
        changes = {
            name: value - start[name] for name, value in toy.numbers(after).items() if name.startswith("params/")
        }
        found.append(changes)
    for name, change in found[0].items():
        tolerance = 1e-4 * np.abs(change).max() + 1e-6
        np.testing.assert_allclose(found[1][name], change, rtol=5e-3, atol=tolerance, err_msg=name)
