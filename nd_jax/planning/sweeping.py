"""The step of ``nd-jax prune sweep`` on a mesh of any devices: what it holds, and how fast it could be."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from nd_jax.generate import needs_negative
from nd_jax.models import mmdit
from nd_jax.models.system import Conditions
from nd_jax.planning.programs import envelopes_of
from nd_jax.pyramid.layout import Envelope, layout_arrays
from nd_jax.pyramid.sampler import twice
from nd_jax.recipes.preset import Preset
from nd_jax.sweep.population import spread_errors
from nd_jax.sweep.units import Candidates
from nd_jax.training.mesh import batch_entry, batch_ways

Abstract = jax.ShapeDtypeStruct
LEVELS = 2
"""Noise levels of every stage, as the command has them."""


@dataclasses.dataclass(frozen=True)
class SweepCall:
    """A stage's program, its abstract arguments, and how often one chunk of candidates calls it.

    ``plain`` runs every candidate from its first block to its last, ``arguments`` with lists of blocks without padding:
    the same work, but that candidates which begin alike share nothing, in loops whose length a compiler knows.
    """

    stage: int
    function: Callable
    arguments: tuple
    plain: Callable
    plain_arguments: tuple
    times: int


def sweep_calls(
    preset: Preset, mesh: Mesh, *, layers: int, chunk: int, prompts: int, batch: int, dtype: Any = jnp.bfloat16
) -> list[SweepCall]:
    """For candidates of ``layers`` layers, ``chunk`` of them on every device, scored on ``prompts`` videos, ``batch``
    at a time, with every latent frame. Weights are whole on every device."""
    network, plan, units = preset.system.diffusion_transformer, preset.sampling, preset.latent_size[0]
    denoiser, guided = mmdit.definition(network, dtype=dtype), needs_negative(plan)
    whole, spread = NamedSharding(mesh, P()), NamedSharding(mesh, P(batch_entry(mesh)))
    rows, count = batch * (2 if guided else 1), chunk * batch_ways(mesh)

    def array(*shape: int, dtype: Any = jnp.float32, sharding: Any = whole) -> Abstract:
        return Abstract(shape, dtype, sharding=sharding)

    params = jax.tree.map(lambda x: array(*x.shape, dtype=dtype), denoiser.abstract())
    width = network.joint_attention_dim if network.context_embedder else network.width
    text = preset.video.text_length
    conditions = Conditions(
        array(rows, text, width),
        array(rows, text, dtype=jnp.int32),
        array(rows, network.pooled_projection_dim),
    )
    calls = []
    for envelope in envelopes_of(preset, units):
        clips = [array(batch, *clip, network.in_channels) for clip in envelope.clips]
        inputs = clips[-1], array(batch), tuple(clips[:-1]), array(dtype=jnp.int32)

        def kept(places: int) -> Abstract:
            return array(count, places, dtype=jnp.int32, sharding=spread)

        real = params, conditions, inputs, Candidates(kept(network.num_layers - 1), None)
        calls.append(
            SweepCall(
                envelope.stage,
                spread_errors(denoiser, envelope, mesh, guided=guided),
                real,
                _plain(denoiser, envelope, mesh, guided=guided),
                (params, conditions, inputs, kept(layers - 1)),
                LEVELS * units * -(-prompts // batch),
            )
        )
    return calls


def _plain(denoiser: Any, envelope: Envelope, mesh: Mesh, *, guided: bool) -> Callable:
    """Every candidate's mean squared velocity, run in full."""

    def norms(params: Any, conditions: Conditions, inputs: tuple, kept: jax.Array) -> jax.Array:
        z, timestep, history, unit = inputs
        if guided:
            z, timestep, history = twice(z), twice(timestep), tuple(map(twice, history))
        layout = layout_arrays(envelope, unit, conditions.mask)
        arguments = params, [(*history, z)], conditions.text, conditions.pooled, timestep, [layout]
        return jax.lax.map(lambda one: jnp.mean(jnp.square(denoiser(*arguments, kept=one)[0]), axis=(1, 2, 3, 4)), kept)

    entry = P(batch_entry(mesh))
    return jax.shard_map(norms, mesh=mesh, in_specs=(P(), P(), P(), entry), out_specs=entry, check_vma=False)
