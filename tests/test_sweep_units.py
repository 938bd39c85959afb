"""Streams, heads and slices as data: what gating them gives, what it costs, and what gradients say of them."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
import tiny_system

from nd_jax.errors import UserError
from nd_jax.generate import Generator
from nd_jax.models.gates import Gates, open_gates
from nd_jax.models.mmdit import definition
from nd_jax.models.system import DENOISER
from nd_jax.pyramid.layout import layout_arrays
from nd_jax.pyramid.sampler import SamplePlan
from nd_jax.pyramid.schedule import Schedule
from nd_jax.sweep.calibration import record
from nd_jax.sweep.costs import cost_model
from nd_jax.sweep.gradients import _at_budget, _squares, learned_gates, taylor
from nd_jax.sweep.population import Population, each_velocity
from nd_jax.sweep.units import Units
from nd_jax.training.mesh import MeshConfig, make_mesh

CONFIG = dataclasses.replace(tiny_system.CONFIG.diffusion_transformer, num_layers=4)
HEAD, SLICES = CONFIG.attention_head_dim, 4


@pytest.fixture(scope="module")
def system(tiny):
    changes = {
        "config": dataclasses.replace(tiny.config, diffusion_transformer=CONFIG),
        "params": {**tiny.params, DENOISER: tiny_system.random_params(definition(CONFIG), seed=9)},
        "schedule": Schedule(stages=1),
        "sampling": SamplePlan((2,), (1,), 2.0, 2.0, "plain"),
    }
    return dataclasses.replace(tiny, **changes)


@pytest.fixture(scope="module")
def generator(system):
    return Generator(system, height=64, width=64, frames=1)


@pytest.fixture(scope="module")
def calibration(generator):
    return record(generator, ["a ball", "a small red circle moves right"], seed=3, batch=2)


def without(params, units, drop, *, stacked=True):
    """Layer by layer, the arrays of the network that lacks some heads or slices: a tuple for each stacked array."""
    index = (lambda w, i: np.asarray(w)[i]) if stacked else (lambda w, i: w[i])
    is_stack = lambda x: isinstance(x, tuple)  # noqa: E731
    layers = [jax.tree.map(lambda w, i=i: index(w, i), params["blocks"], is_leaf=is_stack) for i in range(units.blocks)]
    layers.append(jax.tree.map(np.asarray, params["last_block"]))
    for block, layer in enumerate(layers):
        gone = [units.places[k][1:] for k in drop if units.places[k][0] == block]
        if units.kind == "heads":
            keep = np.array([c for c in range(CONFIG.width) if (c // HEAD,) not in gone])
            for name, tree in layer["attn"].items():
                if name.startswith(("to_out", "to_add_out")):
                    tree["kernel"] = tree["kernel"][keep]
                elif not name.startswith("norm"):
                    tree["kernel"], tree["bias"] = tree["kernel"][:, keep], tree["bias"][keep]
        else:
            for stream, name in enumerate(("ff", "ff_context")):
                if name in layer:
                    each, up, down = 4 * CONFIG.width // SLICES, layer[name]["up"], layer[name]["down"]
                    keep = np.array([c for c in range(4 * CONFIG.width) if (stream, c // each) not in gone])
                    up["kernel"], up["bias"] = up["kernel"][:, keep], up["bias"][keep]
                    down["kernel"] = down["kernel"][keep]
    blocks = jax.tree.map(lambda *each: each, *layers[:-1])
    return {**params, "blocks": blocks, "last_block": layers[-1]}


def exact(system, generator, calibration, params):
    """The velocity of a network at the first recorded call."""
    call, envelope, conditions = calibration.calls[0], generator.envelopes[0], calibration.conditions[0]
    z, timestep, history, unit = call.inputs
    double = [np.concatenate([x, x]) for x in (z, timestep, *history)]
    layout = layout_arrays(envelope, unit, conditions.mask)
    arguments = [(*double[2:], double[0])], conditions.text, conditions.pooled, double[1], [layout]
    return np.asarray(jax.jit(lambda p: system.definitions[DENOISER](p, *arguments)[0])(params))


DROPS = {
    # The last block's are the last; the first candidate is the whole network.
    "heads": [(), (0,), (1,), (2, 5, 6), (0, 3, 7), (7,)],
    "mlp": [(), (0,), (5,), (3, 9, 20, 27), (1, 2, 3, 26), (27,)],
}


@pytest.mark.parametrize("kind", ["heads", "mlp"])
def test_every_candidate_is_the_network_without_its_pieces(system, generator, calibration, kind):
    units, drops = Units(CONFIG, kind, SLICES), DROPS[kind]

    def answers(params, candidates):
        keep = lambda velocity, whole: velocity  # noqa: E731
        call, conditions = calibration.calls[0], calibration.conditions[0]
        given = params, conditions, call.inputs, candidates, keep
        return each_velocity(system.definitions[DENOISER], generator.envelopes[0], *given, guided=True)

    made = jax.jit(answers)(system.on_device[DENOISER], units.encode(drops))
    for drop, answer in zip(drops, made, strict=True):
        cut = exact(system, generator, calibration, without(system.params[DENOISER], units, drop))
        np.testing.assert_allclose(answer, cut, rtol=0, atol=1e-5)
    assert len({round(float(np.square(answer - made[0]).sum()), 5) for answer in made}) == len(drops)


def test_a_stream_that_is_gated_off_stays_as_it_is(system, generator, calibration):
    """Its tokens leave the block as they came; the other stream's see them all the same; without both it is no
    block."""
    units = Units(CONFIG, "streams")
    params, conditions = system.params[DENOISER], calibration.conditions[0]
    zeros = dict(params["blocks"])
    zeros["attn"] = {**zeros["attn"], "to_add_out": jax.tree.map(np.zeros_like, zeros["attn"]["to_add_out"])}
    zeros["ff_context"] = {**zeros["ff_context"], "down": jax.tree.map(np.zeros_like, zeros["ff_context"]["down"])}
    no_text = exact(system, generator, calibration, {**params, "blocks": zeros})
    one_block_less = jax.tree.map(lambda w: np.asarray(w)[[0, 2]], params["blocks"])
    no_block = exact(system, generator, calibration, {**params, "blocks": one_block_less})

    def answers(params, candidates):
        keep = lambda velocity, whole: velocity  # noqa: E731
        given = params, conditions, calibration.calls[0].inputs, candidates, keep
        return each_velocity(system.definitions[DENOISER], generator.envelopes[0], *given, guided=True)

    made = jax.jit(answers)(system.on_device[DENOISER], units.encode([(1, 3, 5), (2, 3), (2,)]))
    np.testing.assert_allclose(made[0], no_text, rtol=0, atol=1e-5)
    np.testing.assert_allclose(made[1], no_block, rtol=0, atol=1e-5)
    assert np.abs(made[2] - no_block).max() > 1e-3


def test_one_program_for_all_and_the_same_on_eight_devices(system, generator, calibration):
    units = Units(CONFIG, "heads")
    population = Population(system, generator.envelopes, calibration, units=units, chunk=1)
    found = population(DROPS["heads"])
    assert np.abs(found[0]).max() < 1e-9
    assert (found[1:] > 1e-7).all()
    np.testing.assert_allclose(population([(2, 5, 6)])[0], found[3], rtol=1e-5)
    assert population.compilations == 1
    mesh = make_mesh(MeshConfig(1, 1), jax.devices()[:1])
    alone = Population(system, generator.envelopes, calibration, units=units, mesh=mesh, chunk=6)
    np.testing.assert_allclose(alone(DROPS["heads"]), found, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("kind", ["blocks", "streams", "heads", "mlp"])
def test_units_are_numbered_and_found_again(kind):
    units = Units(CONFIG, kind, SLICES)
    assert len(units) == {"blocks": 3, "streams": 6, "heads": 8, "mlp": 28}[kind]
    gates = [units.gates((unit,)) for unit in range(len(units))]
    for unit, each in enumerate(gates):
        closed = units.of_gates(Gates(*(1 - g for g in each)))
        np.testing.assert_array_equal(closed[0] > 0, np.arange(len(units)) == unit)
        values = np.ones(len(units), np.float32)
        values[unit] = 0
        for one, other in zip(units.to_gates(values), each, strict=True):
            np.testing.assert_array_equal(one, other)
    grid = units.grid(np.arange(len(units)) + 1.0)
    assert np.nansum(grid) == sum(range(1, len(units) + 1))
    assert grid.shape == (len(units.rows), len(units.columns))
    assert len({units.name(unit) for unit in range(len(units))}) == len(units)
    with pytest.raises(UserError, match="hidden channels in 7 slices"):
        open_gates(CONFIG, 7)


def test_costs_are_those_of_the_networks(generator):
    """A piece costs what the network without it lacks; a block is its pieces and a little more."""
    model = {kind: cost_model(generator, Units(CONFIG, kind, SLICES)) for kind in ("blocks", "streams", "heads", "mlp")}
    whole = model["heads"]()
    assert all(each() == whole for each in model.values())
    narrow = dataclasses.replace(CONFIG, kept_heads=1)
    smaller = dataclasses.replace(
        generator.system, config=dataclasses.replace(generator.system.config, diffusion_transformer=narrow)
    )
    every_second = tuple(range(0, 8, 2))
    other = Generator(smaller, height=64, width=64, frames=1)
    assert model["heads"](every_second) == cost_model(other, Units(narrow, "mlp", SLICES))()
    block = whole.macs - model["blocks"]((0,)).macs
    pieces = [whole.macs - model[kind](drop).macs for kind, drop in (("heads", (0, 1)), ("mlp", tuple(range(8))))]
    np.testing.assert_allclose(sum(pieces), block, rtol=1e-6)
    streams = whole.macs - model["streams"]((0, 1)).macs
    assert 0.6 * block < streams < block, "keys and values stay"
    assert all(
        m < n for m, n in zip(model["blocks"]((0,)).milliseconds.values(), whole.milliseconds.values(), strict=True)
    )
    assert model["heads"].count("macs", 0.9 * whole.macs) > 0


@pytest.mark.heavy
def test_taylor_scores_are_second_differences(system, generator, calibration):
    """At small changes the formula is exact; here one gate at a time is moved a little. Directions along every entry of
    the velocity give the expectation itself, random ones come near it."""
    units, step = Units(CONFIG, "heads"), 0.005
    call, conditions = calibration.calls[0], calibration.conditions[0]
    moved = units.encode([(k,) for k in range(len(units))])
    moved = moved._replace(gates=jax.tree.map(lambda g: 1 - step * (1 - g), moved.gates))

    def error(velocity, whole):
        return ((velocity - whole) ** 2).mean(axis=(1, 2, 3, 4))

    given = system.definitions[DENOISER], generator.envelopes[0]
    run = jax.jit(lambda p, c: each_velocity(*given, p, conditions, call.inputs, c, error, guided=True))
    truth = np.asarray(run(system.on_device[DENOISER], moved)).reshape(len(units), 2, 2).mean(axis=1).T / step**2
    shape = call.inputs[0].shape[1:]
    size = int(np.prod(shape))
    along = np.sqrt(size) * np.eye(size, dtype=np.float32).reshape(size, 1, *shape).repeat(4, axis=1)
    squares = jax.jit(lambda p, d: _squares(*given, units, p, conditions, call.inputs, d, guided=True))
    exact = np.asarray(squares(system.on_device[DENOISER], along))
    np.testing.assert_allclose(exact, truth, rtol=0.05)
    found = taylor(system, generator.envelopes, calibration, units, probes=64)
    assert found.shape == (2, 2, len(units))
    np.testing.assert_allclose(found[0].sum(), exact.sum(), rtol=0.5)


def test_learned_gates_keep_to_their_budget(system, generator, calibration):
    """Two of three blocks go; the one that is kept is one that matters more than the cheapest alone."""
    units = Units(CONFIG)
    gates = learned_gates(system, generator.envelopes, calibration, units, 2, steps=30)
    np.testing.assert_allclose(gates.sum(), 1, atol=0.02)
    assert gates.max() > 0.9
    population = Population(system, generator.envelopes, calibration, units=units, chunk=1)
    left = [(1, 2), (0, 2), (0, 1)]
    errors = population(left).mean(axis=(1, 2))
    assert errors[np.argmax(gates)] < errors.max()
    np.testing.assert_allclose(_at_budget(np.array([0.0, 1.0, 5.0]), 0.1, 1.5).sum(), 1.5)
