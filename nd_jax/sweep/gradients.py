"""Scores from gradients at the gates: what removing a unit would cost by Taylor's formula, and gates learned under a
budget.

The distance from the whole denoiser is at its minimum where all gates are open, so the formula's first term is zero and
its second one is what a removal costs: ``E |dv/dg|^2`` (Gauss-Newton; the diagonal of LeCun et al., Optimal Brain
Damage, 1990, for gates instead of weights). For a random direction r with unit covariance, ``(d(r v)/dg)^2`` has that
expectation, so one backward pass serves all units and videos at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float

from nd_jax.models.functional import Params
from nd_jax.models.gates import Gates, open_gates
from nd_jax.models.system import DENOISER
from nd_jax.pyramid.layout import Envelope, layout_arrays
from nd_jax.pyramid.sampler import CountingJit, twice
from nd_jax.sweep.calibration import Calibration
from nd_jax.sweep.units import Units
from nd_jax.system import VideoSystem

Progress = Callable[[int, int], None]
SHARPEST = 0.05
"""Temperature of the gates at the end of their training."""


def taylor(
    system: VideoSystem,
    envelopes: Sequence[Envelope],
    calibration: Calibration,
    units: Units,
    *,
    probes: int = 4,
    seed: int = 0,
    progress: Progress = lambda done, total: None,
) -> Float[np.ndarray, "levels videos units"]:
    """Expected squared velocity error without each unit, by noise level and video, estimated with ``probes``
    directions.

    Of the same kind as the errors of a ``Population``: means over both branches of guidance and the latent frames.
    """
    denoiser, guided = system.definitions[DENOISER], calibration.guided
    programs = [CountingJit(partial(_squares, denoiser, e, units, guided=guided)) for e in envelopes]
    params = system.on_device[DENOISER]
    rng, levels = np.random.Generator(np.random.Philox(seed)), calibration.levels
    videos = calibration.prompts * calibration.samples // len(calibration.conditions)
    sums = np.zeros((len(levels), len(calibration.conditions), videos, len(units)))
    counts = np.zeros((len(levels), len(calibration.conditions), 1, 1))
    for done, call in enumerate(calibration.calls):
        rows = (2 if guided else 1) * videos
        directions = rng.standard_normal((probes, rows, *call.inputs[0].shape[1:]), np.float32)
        found = programs[call.stage](params, calibration.conditions[call.batch], call.inputs, directions)
        level = levels.index((call.stage, call.timestep))
        sums[level, call.batch] += np.asarray(found, np.float64)
        counts[level, call.batch] += 1
        progress(done + 1, len(calibration.calls))
    return (sums / counts).reshape(len(levels), -1, len(units))


def _squares(
    denoiser, envelope, units, params, conditions, inputs, directions, *, guided
) -> Float[jax.Array, "b units"]:
    """Mean over directions and branches of guidance of the squared derivatives, a mean over the velocity's entries."""
    rows = directions.shape[1]
    start = jax.tree.map(jnp.asarray, open_gates(units.config, units.mlp_slices, rows))

    def square(direction):
        def projected(gates):
            return jnp.sum(direction * _velocity(denoiser, envelope, params, conditions, inputs, gates, guided=guided))

        return jnp.square(units.of_gates(jax.grad(projected)(start)))

    squares = jnp.mean(jax.lax.map(square, directions), axis=0) / directions[0, 0].size
    return jnp.mean(squares.reshape(2 if guided else 1, -1, len(units)), axis=0)


def _velocity(
    denoiser, envelope, params: Params, conditions, inputs, gates: Gates | None, *, guided: bool
) -> jax.Array:
    """The denoiser's answer to a recorded call, float32, guidance's rows doubled."""
    z, timestep, history, unit = inputs
    if guided:
        z, timestep, history = twice(z), twice(timestep), tuple(map(twice, history))
    layout = layout_arrays(envelope, unit, conditions.mask)
    arguments = [(*history, z)], conditions.text, conditions.pooled, timestep, [layout]
    return denoiser(params, *arguments, gates=gates, remat="full")[0].astype(jnp.float32)


def learned_gates(
    system: VideoSystem,
    envelopes: Sequence[Envelope],
    calibration: Calibration,
    units: Units,
    count: int,
    *,
    steps: int = 100,
    rate: float = 0.1,
    seed: int = 0,
    progress: Progress = lambda done, total: None,
) -> Float[np.ndarray, " units"]:
    """Gates in [0, 1] that keep the velocity near the whole denoiser's while their sum is what a budget allows.

    Gates are ``sigmoid((logit - shift) / temperature)``; the shift makes them add up to the budget at every step, which
    goes from all units to all but ``count`` in the first half of the steps, and the temperature falls to ``SHARPEST``,
    so that they end near 0 and 1. Adam on the logits, one recorded call of every stage a step, each stage's error
    counting alike. The lowest ``count`` are the choice.
    """
    denoiser, guided = system.definitions[DENOISER], calibration.guided
    params = system.on_device[DENOISER]
    programs = [CountingJit(partial(_slope, denoiser, e, units, guided=guided)) for e in envelopes]
    by_stage = [[call for call in calibration.calls if call.stage == e.stage] for e in envelopes]
    rng = np.random.Generator(np.random.Philox(seed))
    logits, adam = np.zeros(len(units), np.float32), optax.adam(rate)
    state, gates = adam.init(logits), np.ones(len(units))
    for step in range(steps):
        part = (step + 1) / steps
        budget = len(units) - count * min(1.0, 2 * part) - 0.01
        temperature = SHARPEST**part
        gates = _at_budget(logits, temperature, max(budget, 0.01))
        slope = np.zeros(len(units))
        for program, calls in zip(programs, by_stage, strict=True):
            call = calls[rng.integers(len(calls))]
            found = program(params, calibration.conditions[call.batch], call.inputs, gates.astype(np.float32))
            slope += np.asarray(found, np.float64)
        steep = gates * (1 - gates) / temperature
        # Along the budget: what the shift gives back is subtracted.
        slope = steep * (slope - steep @ slope / max(steep.sum(), 1e-12))
        slope /= max(np.abs(slope).max(), 1e-12)
        updates, state = adam.update(slope.astype(np.float32), state)
        logits = logits + np.asarray(updates)
        progress(step + 1, steps)
    return gates


def _at_budget(logits: np.ndarray, temperature: float, budget: float) -> np.ndarray:
    """Gates of these logits that add up to ``budget``: bisection on the shift."""
    low, high = logits.min() - 40 * temperature, logits.max() + 40 * temperature

    def at(shift: float) -> np.ndarray:
        return 1 / (1 + np.exp(-np.clip((logits - shift) / temperature, -60, 60)))

    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if at(middle).sum() > budget else (low, middle)
    return at((low + high) / 2)


def _slope(denoiser, envelope, units, params, conditions, inputs, values, *, guided) -> Float[jax.Array, " units"]:
    """How the squared error, in units of the velocity's own square, changes with every unit's gate."""
    whole = jax.lax.stop_gradient(_velocity(denoiser, envelope, params, conditions, inputs, None, guided=guided))

    def error(values: Any) -> jax.Array:
        gates = units.to_gates(values)
        velocity = _velocity(denoiser, envelope, params, conditions, inputs, gates, guided=guided)
        return jnp.mean(jnp.square(velocity - whole)) / jnp.mean(jnp.square(whole))

    return jax.grad(error)(values)
