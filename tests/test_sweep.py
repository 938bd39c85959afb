"""Populations of pruned denoisers: exact, compiled once, the same on any number of devices; and what searches them."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
import tiny_system

from nd_jax.errors import UserError
from nd_jax.generate import Generator
from nd_jax.models.mmdit import definition
from nd_jax.models.system import DENOISER
from nd_jax.pyramid.layout import layout_arrays
from nd_jax.pyramid.sampler import SamplePlan
from nd_jax.pyramid.schedule import Schedule
from nd_jax.recipes.pruning import remove_blocks
from nd_jax.sweep.calibration import record
from nd_jax.sweep.population import Population, arrange, each_velocity
from nd_jax.sweep.units import Units, sort_keys
from nd_jax.training.mesh import MeshConfig, make_mesh

LAYERS = 6
PROMPTS = ["a small red circle moves right", "a ball", "a square"]
DROPS = [(), (0,), (4,), (1, 3), (0, 4), (3, 4), (0, 1, 2), (2,), (0, 1, 2, 3, 4), (1,)]


@pytest.fixture(scope="module")
def deep(tiny):
    """The tiny system with six blocks and two stages."""
    config = dataclasses.replace(tiny.config.diffusion_transformer, num_layers=LAYERS)
    changes = {
        "config": dataclasses.replace(tiny.config, diffusion_transformer=config),
        "params": {**tiny.params, DENOISER: tiny_system.random_params(definition(config), seed=9)},
        "schedule": Schedule(stages=2),
        "sampling": SamplePlan((2, 1), (1, 1), 2.0, 2.0, "plain"),
    }
    return dataclasses.replace(tiny, **changes)


@pytest.fixture(scope="module")
def generator(deep):
    return Generator(deep, height=64, width=64, frames=1)


@pytest.fixture(scope="module")
def calibration(generator):
    return record(generator, PROMPTS, seed=3, samples=2, batch=6)


@pytest.fixture(scope="module")
def population(deep, generator, calibration):
    return Population(deep, generator.envelopes, calibration, chunk=2)


@pytest.fixture(scope="module")
def found(population):
    return population(DROPS)


def pruned(system, drop):
    return remove_blocks(system.config.diffusion_transformer, system.params[DENOISER], drop)[1]


def test_every_candidate_is_the_network_cut_to_it(deep, generator, calibration):
    """Of any length, entered at any depth, in one program."""
    call, envelope, denoise = calibration.calls[0], generator.envelopes[0], deep.definitions[DENOISER]
    conditions = calibration.conditions[0]

    def answers(params, candidates):
        keep = lambda velocity, whole: velocity  # noqa: E731
        return each_velocity(denoise, envelope, params, conditions, call.inputs, candidates, keep, guided=True)

    made = jax.jit(answers)(deep.on_device[DENOISER], Units(deep.config.diffusion_transformer).encode(DROPS))
    z, timestep, history, unit = call.inputs
    double = [np.concatenate([x, x]) for x in (z, timestep, *history)]
    layout = layout_arrays(envelope, unit, conditions.mask)
    exact = jax.jit(lambda params: denoise(
        params, [(*double[2:], double[0])], conditions.text, conditions.pooled, double[1], [layout]
    )[0])  # fmt: skip
    for drop, answer in zip(DROPS, made, strict=True):
        np.testing.assert_allclose(answer, exact(pruned(deep, drop)), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("ways", "size"), [(1, 10), (8, 16), (3, 15)])
def test_candidates_are_sorted_and_dealt_out(ways, size):
    config = dataclasses.replace(tiny_system.CONFIG.diffusion_transformer, num_layers=LAYERS)
    kept = sort_keys(Units(config).encode(DROPS))
    chosen, rows = arrange(kept, ways, size)
    full = kept[chosen]
    np.testing.assert_array_equal(full[rows], kept)
    assert len(set(rows.tolist())) == len(DROPS)
    assert np.bincount(rows // (size // ways), minlength=ways).max() <= -(-len(DROPS) // ways)
    in_order = full[np.sort(rows)].tolist()
    assert in_order == sorted(in_order)
    few, _ = arrange(kept[:1], ways, size)
    assert (few == 0).all()


def test_errors_by_level_and_video(deep, generator, calibration, found):
    """One level computed again by hand: both branches of guidance, both samples of a prompt."""
    assert [stage for stage, _ in calibration.levels] == [0, 0, 1]
    assert calibration.levels[0][1] > calibration.levels[1][1]
    assert found.shape == (len(DROPS), 3, 2 * len(PROMPTS))
    assert np.abs(found[0]).max() < 1e-9, "nothing dropped, nothing lost"
    assert (found[1:] > 1e-6).all()
    call, conditions = calibration.calls[1], calibration.conditions[0]
    z, timestep, history, unit = call.inputs
    layout = layout_arrays(generator.envelopes[0], unit, conditions.mask)
    double = [np.concatenate([x, x]) for x in (z, timestep, *history)]
    run = jax.jit(lambda params: deep.definitions[DENOISER](
        params, [(*double[2:], double[0])], conditions.text, conditions.pooled, double[1], [layout]
    )[0])  # fmt: skip
    far = np.square(np.asarray(run(pruned(deep, (1, 3)))) - np.asarray(run(deep.params[DENOISER])))
    expected = far.mean(axis=(1, 2, 3, 4)).reshape(2, -1).mean(axis=0)
    np.testing.assert_allclose(found[3, 1], expected, rtol=1e-4)


def test_one_program_for_each_stage_whatever_is_dropped(population, found):
    assert population.compilations == 2
    again = population([DROPS[5], DROPS[6], DROPS[1]])
    np.testing.assert_allclose(again, found[[5, 6, 1]], rtol=1e-6)
    assert population.compilations == 2
    with pytest.raises(ValueError, match="17 candidates"):
        population([()] * 17)


def test_one_device_and_eight_agree(deep, generator, calibration, population, found):
    assert population.mesh.shape["data"] == 8
    alone = Population(
        deep, generator.envelopes, calibration, mesh=make_mesh(MeshConfig(1, 1), jax.devices()[:1]), chunk=len(DROPS)
    )
    np.testing.assert_allclose(alone(DROPS), found, rtol=1e-5, atol=1e-12)


def test_calibration_keeps_the_steps_it_is_asked_for(generator):
    one = record(generator, PROMPTS, samples=2, batch=6, steps=1)
    assert [(call.stage, call.batch) for call in one.calls] == [(0, 0), (1, 0)]
    with pytest.raises(UserError, match="3 videos in batches of 2"):
        record(generator, PROMPTS, batch=2)
