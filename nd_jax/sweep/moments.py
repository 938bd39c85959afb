"""Second moments of the denoiser's inner activations on recorded calls: what fitting the next layer needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from nd_jax.models.system import DENOISER
from nd_jax.pyramid.layout import REAL, Envelope, layout_arrays
from nd_jax.pyramid.sampler import CountingJit, twice
from nd_jax.sweep.calibration import Calibration
from nd_jax.system import VideoSystem


def inner_moments(
    system: VideoSystem,
    envelopes: Sequence[Envelope],
    calibration: Calibration,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[dict[str, Float[np.ndarray, "f+1 f+1"]]]:
    """For every block, the last one last, ``recipes.widths.Moments`` over all recorded calls, float64.

    Means over tokens of each call, padding left out, added up over calls: every stage counts alike. Memory is that of
    all blocks' moments at once, (4 x width)^2 floats for each MLP.
    """
    denoiser, guided = system.definitions[DENOISER], calibration.guided
    programs = [CountingJit(partial(_moments, denoiser, envelope, guided=guided)) for envelope in envelopes]
    params, total = system.on_device[DENOISER], None
    for done, call in enumerate(calibration.calls):
        found = programs[call.stage](params, calibration.conditions[call.batch], call.inputs)
        found = jax.tree.map(lambda x: np.asarray(x, np.float64), found)
        total = found if total is None else jax.tree.map(np.add, total, found)
        progress(done + 1, len(calibration.calls))
    stacked, last = total
    blocks = len(next(iter(stacked.values())))
    return [{name: x[place] for name, x in stacked.items()} for place in range(blocks)] + [last]


def _moments(denoiser, envelope, params, conditions, inputs, *, guided) -> Any:
    z, timestep, history, unit = inputs
    if guided:
        z, timestep, history = twice(z), twice(timestep), tuple(map(twice, history))
    layout = layout_arrays(envelope, unit, conditions.mask)
    real = jnp.broadcast_to(layout.segments == REAL, (len(z), envelope.length)).astype(jnp.float32)
    weights = {"text": real[:, : envelope.text_length], "image": real[:, envelope.text_length :]}

    def second(name: str, x: Float[Array, "b l f"]) -> Float[Array, "f+1 f+1"]:
        # The last block's activations are those of the current clip, which comes last.
        weight = weights[name.split("_")[0]][:, -x.shape[1] :]
        a = jnp.concatenate([x.astype(jnp.float32), jnp.ones((*x.shape[:2], 1))], axis=-1)
        product = jnp.einsum("blf,blg,bl->fg", a, a, weight, precision="highest")
        return product / jnp.maximum(jnp.sum(weight), 1.0)

    def inner(inside: dict[str, Array]) -> dict[str, Array]:
        return {name: second(name, x) for name, x in inside.items()}

    arguments = [(*history, z)], conditions.text, conditions.pooled, timestep, [layout]
    return denoiser(params, *arguments, inner=inner)[1]
