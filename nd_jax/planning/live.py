"""What a step of a running recipe amounts to, for the rates in its log."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax

from nd_jax.models.functional import Params
from nd_jax.planning.chips import CHIPS
from nd_jax.planning.demand import denoiser_demand
from nd_jax.planning.programs import Systems
from nd_jax.recipes.flow_matching import FlowRecipe
from nd_jax.training.watch import Work

KINDS = {
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
}
"""Generations by what JAX calls their devices."""


def peak_flops(devices: Sequence[jax.Device]) -> float | None:
    """Operations per second of all devices together; None for kinds without an entry in the table."""
    chips = [CHIPS.get(KINDS.get(device.device_kind, "")) for device in devices]
    return None if None in chips else sum(chip.flops for chip in chips)


def flow_work(recipe: FlowRecipe, teacher: Params | None, devices: Sequence[jax.Device]) -> Work:
    """Of one step. ``teacher`` is the denoiser it learns from, if that is another one. All text counts as real."""
    system = recipe.system
    if teacher is not None:
        depth = len(jax.tree.leaves(teacher["blocks"])[0]) + 1
        network = dataclasses.replace(system.diffusion_transformer, num_layers=depth)
        system = dataclasses.replace(system, diffusion_transformer=network)
    needed = denoiser_demand(Systems(system, recipe.system, ()), recipe, recipe.lengths[0])
    return Work(needed.tokens, needed.videos, needed.flops, peak_flops(devices))
