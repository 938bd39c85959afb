"""A denoiser's sample as cases record it: clips per group, and the layout that belongs to them."""

from __future__ import annotations

from typing import Any

from jaxtyping import Array, Float, Int

from nd_jax.errors import UserError
from nd_jax.pyramid.layout import LayoutArrays, exact_layout
from nd_jax.verification.cases import Subcase
from nd_jax.verification.layouts import from_torch

Clips = list[list[Float[Array, "b t h w c"]]]


def clips_of(subcase: Subcase) -> Clips:
    """``sample/GROUP/CLIP``, or ``sample/GROUP`` where the only clip is not in a list."""
    groups: dict[int, dict[int, Any]] = {}
    for name, array in subcase.inputs.items():
        part, _, index = name.partition("/")
        if part == "sample":
            group, _, clip = index.partition("/")
            groups.setdefault(int(group), {})[int(clip or 0)] = from_torch(array)
    if not groups:
        raise UserError(f"{subcase}: no inputs sample/GROUP/CLIP")
    return [[clips[index] for index in sorted(clips)] for _, clips in sorted(groups.items())]


def layouts_of(sample: Clips, text_mask: Int[Array, "n s"], patch_size: int) -> list[LayoutArrays]:
    """The exact layout of every group; rows g, g + G, ... of the mask belong to group g."""
    return [
        exact_layout([clip.shape[1:4] for clip in clips], text_mask[group :: len(sample)], patch_size)
        for group, clips in enumerate(sample)
    ]
