"""Candidates per second of a sweep, beside running pruned networks one by one; all in one run, on one device.

    python tests/benchmarks/bench_sweep.py [--checkpoint shapes_base] [--layers N] [--candidates 96] [--drop N]
        [--prompts 4]

Random sets of N blocks (default: a quarter) and the remove-one sets, each scored on the same calls. Rivals:
"indexed": a compiled K-block program for each stage, fed with the weights of one candidate after the other, gathered by
another compiled program; "built": ``remove_blocks`` and a new ``jax.jit`` for each (a few are enough). Both are given
the whole denoiser's velocities. Then every head alone, gated in one program, beside a compiled gated network fed with
one after the other. All results are compared, and the sweep's time is also taken for half the candidates. ``--layers``
takes a denoiser of so many, of random weights and the checkpoint's other sizes.
"""

import argparse
import dataclasses
import itertools
import time

import jax
import jax.numpy as jnp
import numpy as np

from nd_jax.converters.hexagon.full_size import random_params
from nd_jax.data.source import prompts as world_prompts
from nd_jax.data.world import world_named
from nd_jax.generate import Generator
from nd_jax.models.system import DENOISER
from nd_jax.pyramid.layout import layout_arrays
from nd_jax.pyramid.sampler import twice
from nd_jax.recipes.pruning import kept_blocks, remove_blocks
from nd_jax.sweep.calibration import record
from nd_jax.sweep.population import Population
from nd_jax.sweep.units import Units
from nd_jax.system import load_system
from nd_jax.training.mesh import MeshConfig, make_mesh


def run_velocity(denoiser, envelope, params, conditions, inputs, *, guided, gates=None):
    z, timestep, history, unit = inputs
    if guided:
        z, timestep, history = twice(z), twice(timestep), tuple(map(twice, history))
    layout = layout_arrays(envelope, unit, conditions.mask)
    arguments = [(*history, z)], conditions.text, conditions.pooled, timestep, [layout]
    return denoiser(params, *arguments, gates=gates)[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="shapes_base")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--candidates", type=int, default=96)
    parser.add_argument("--drop", type=int)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--frames", type=int, default=9)
    parser.add_argument("--built", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()

    system = load_system(options.checkpoint, dtype=None)
    if options.layers:
        deep = dataclasses.replace(system.config.diffusion_transformer, num_layers=options.layers)
        config = dataclasses.replace(system.config, diffusion_transformer=deep)
        params = {**system.params, **random_params(config, (DENOISER,))}
        system = dataclasses.replace(system, config=config, params=params)
    blocks = system.config.diffusion_transformer.num_layers - 1
    count = options.drop or max(1, round((blocks + 1) / 4))
    generator = Generator(system, height=system.video.height, width=system.video.width, frames=options.frames)
    captions, _ = world_prompts(world_named("64x64"), "train", options.prompts, seed=0)
    calibration = record(generator, captions, batch=options.prompts, steps=1)
    sets = list(itertools.combinations(range(blocks), count))
    rng = np.random.Generator(np.random.Philox(0))
    chosen = [sets[k] for k in rng.choice(len(sets), min(len(sets), options.candidates), replace=False)]
    mesh = make_mesh(MeshConfig(1, 1), jax.devices()[:1])
    population = Population(system, generator.envelopes, calibration, mesh=mesh, chunk=options.candidates)
    denoiser, params, guided = system.definitions[DENOISER], system.on_device[DENOISER], calibration.guided
    told = f"{blocks + 1} layers, {len(calibration.calls)} calls of {options.prompts} prompts, guidance {guided}"
    print(f"{options.checkpoint}: {told}")

    def swept(drops):
        parts = [population(drops[n : n + population.size]) for n in range(0, len(drops), population.size)]
        return np.concatenate(parts).mean(axis=(1, 2))

    stage_run = [
        lambda p, c, i, envelope=envelope: run_velocity(denoiser, envelope, p, c, i, guided=guided)
        for envelope in generator.envelopes
    ]
    conditions = jax.device_put(calibration.conditions[0])
    calls = [(call, jax.device_put(call.inputs)) for call in calibration.calls]
    compiled = [jax.jit(run) for run in stage_run]
    whole = [compiled[call.stage](params, conditions, inputs) for call, inputs in calls]
    score = [
        jax.jit(lambda p, c, i, w, run=run: jnp.mean(jnp.square(run(p, c, i).astype(jnp.float32) - w)))
        for run in stage_run
    ]
    gather = jax.jit(lambda p, kept: {**p, "blocks": jax.tree.map(lambda x: jnp.take(x, kept, axis=0), p["blocks"])})

    def by_level(found):
        levels = calibration.levels
        groups = [[] for _ in levels]
        for (call, _), error in zip(calls, found, strict=True):
            groups[levels.index((call.stage, call.timestep))].append(float(error))
        return np.mean([np.mean(group) for group in groups])

    def each(smaller, programs):
        return [programs[call.stage](smaller, conditions, i, w) for (call, i), w in zip(calls, whole, strict=True)]

    def indexed(drops):
        found = [each(gather(params, kept_blocks(blocks, drop)), score) for drop in drops]  # the device is kept busy
        return np.array([by_level(errors) for errors in found])

    def built(drops):
        found = []
        for drop in drops:
            smaller = remove_blocks(system.config.diffusion_transformer, params, drop)[1]
            # A function of its own for each: jax caches by function.
            fresh = [
                jax.jit(lambda p, c, i, w, run=run: jnp.mean(jnp.square(run(p, c, i).astype(jnp.float32) - w)))
                for run in stage_run
            ]
            found.append(by_level(each(smaller, fresh)))
        return np.array(found)

    def best(run, drops):
        times = []
        for _ in range(options.repeats):
            start = time.perf_counter()
            run(drops)
            times.append(time.perf_counter() - start)
        return min(times)

    alone = [(k,) for k in range(blocks)]
    for name, drops in ((f"{count} of {blocks} blocks dropped", chosen), ("one block dropped", alone)):
        ours, theirs = swept(drops), indexed(drops)
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-9)
        a, b = best(swept, drops), best(indexed, drops)
        start = time.perf_counter()
        np.testing.assert_allclose(built(drops[: options.built]), theirs[: options.built], rtol=1e-3, atol=1e-9)
        c = (time.perf_counter() - start) / options.built
        n = len(drops)
        print(f"{name}: sweep {n / a:.2f}/s, indexed {n / b:.2f}/s, built {1 / c:.3f}/s")
        print(f"  sweep over indexed {b / a:.2f}x, over built {c * n / a:.1f}x")
    heads = Units(system.config.diffusion_transformer, "heads")
    gated = Population(system, generator.envelopes, calibration, units=heads, mesh=mesh, chunk=len(heads))
    single = [(k,) for k in range(len(heads))]
    run = jax.jit(
        lambda p, c, i, w, g, stage: jnp.mean(jnp.square(gated_velocity(stage, p, c, i, g) - w)), static_argnums=5
    )

    def gated_velocity(stage, p, c, i, gates):
        return run_velocity(denoiser, generator.envelopes[stage], p, c, i, guided=guided, gates=gates)

    def one_by_one(drops):
        found = []
        for drop in drops:
            gates = heads.gates(drop)
            found.append(
                [run(params, conditions, i, w, gates, call.stage) for (call, i), w in zip(calls, whole, strict=True)]
            )
        return np.array([by_level(errors) for errors in found])

    np.testing.assert_allclose(gated(single).mean(axis=(1, 2)), one_by_one(single), rtol=1e-3, atol=1e-9)
    a, b = best(gated, single), best(one_by_one, single)
    print(f"each of {len(single)} heads gated off: sweep {len(single) / a:.2f}/s, one by one {len(single) / b:.2f}/s")
    half, once = best(swept, chosen[: len(chosen) // 2]), best(swept, chosen)
    print(f"{len(chosen)} candidates take {once / half:.2f}x the time of {len(chosen) // 2}")
    print(f"programs compiled by the sweep: {population.compilations} for {len(generator.envelopes)} stages")


if __name__ == "__main__":
    main()
