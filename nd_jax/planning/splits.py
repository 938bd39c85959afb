"""How a slice is divided into mesh axes, and which batches fit it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from nd_jax.errors import UserError
from nd_jax.recipes.decoder_distillation import DecoderRecipe
from nd_jax.recipes.flow_matching import FlowRecipe
from nd_jax.recipes.upscaler import UpscalerRecipe
from nd_jax.training.mesh import MeshConfig
from nd_jax.training.sharding import SLICES


def parse_split(text: str) -> MeshConfig:
    """``fsdp=32,context=4`` as mesh sizes; axes not named are 1. Raises UserError for anything else."""
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.partition("=")
        if name.strip() not in MeshConfig.__dataclass_fields__ or not size.strip().lstrip("-").isdigit():
            known = ", ".join(MeshConfig.__dataclass_fields__)
            raise UserError(
                f"mesh {text!r}: {part!r} is no axis and size; expected such as fsdp=32,context=4 ({known})"
            )
        sizes[name.strip()] = int(size)
    return MeshConfig(**{"data": 1, "fsdp": 1} | sizes)


def usual_split(
    chips: int, rows: int, heads: int | None = None, parts: Sequence[int] = (), what: str = "tokens"
) -> MeshConfig:
    """All chips share the batch where its ``rows`` divide, and up to ``SLICES`` of them the parameters. What is left
    over splits ``what`` an example is made of, as far as every number in ``parts`` divides, and then each layer, as far
    as ``heads`` divide.

    Raises UserError when no division works, saying which number does not divide. ``heads`` is None for networks whose
    layers cannot be split, ``parts`` empty for examples that cannot.
    """
    most = math.gcd(chips, rows)
    left = chips // most
    context = math.gcd(left, *parts) if parts else 1
    tensor = left // context
    if tensor > 1 and (heads is None or heads % tensor):
        ways = f"context={context} is all that divides {' and '.join(map(str, parts))} {what}" if parts else ""
        if heads is None:
            ways = f"{ways}, and layers are not split" if parts else "examples cannot be split further"
        else:
            ways += f"{', and ' if parts else ''}{heads} heads do not divide by tensor={tensor}"
        raise UserError(
            f"a batch of {rows} rows for {chips} chips: data x fsdp={most} leaves {left} ways, but {ways}; use a batch "
            f"of a multiple of {chips} rows, or fewer chips"
        )
    slices = max(ways for ways in range(1, min(most, SLICES) + 1) if most % ways == 0)
    return MeshConfig(data=most // slices, fsdp=slices, tensor=tensor, context=context)


def recipe_split(chips: int, recipe: Any) -> MeshConfig:
    """``usual_split`` for a recipe's batch. Raises UserError likewise."""
    config = recipe.config
    if isinstance(recipe, FlowRecipe):
        heads = recipe.system.diffusion_transformer.num_attention_heads
        return usual_split(chips, rows_of(config, len(recipe.columns)), heads, token_counts(recipe))
    rows = rows_of(config, 1)
    if isinstance(recipe, DecoderRecipe):
        return usual_split(chips, rows, None, [recipe.latent_shape()[2]], "lines of latents")
    if isinstance(recipe, UpscalerRecipe):
        lines = round(config.size / recipe.network.scaling_factor)
        return usual_split(chips, rows, None, [lines], "lines of small pictures")
    return usual_split(chips, rows)


def token_counts(recipe: FlowRecipe) -> list[int]:
    """Lengths of the sequences that a row's columns make: image tokens, those of current clips, and text tokens."""
    current = [math.prod(envelope.clips[-1]) // envelope.patch_size**2 for envelope in recipe.envelopes]
    return [sum(envelope.image_length for envelope in recipe.envelopes), sum(current), recipe.lengths[0]]


def rows_of(recipe_config: Any, columns: int) -> int:
    """Rows that data axes divide: examples over columns, in the smallest pass."""
    return recipe_config.batch // columns // getattr(recipe_config, "microbatches", 1)
