"""How a slice is divided into mesh axes, and which batches fit it."""

from __future__ import annotations

from typing import Any

from nd_jax.errors import UserError
from nd_jax.training.mesh import MeshConfig


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


def usual_split(chips: int, rows: int, heads: int | None) -> MeshConfig:
    """All chips share the batch where its ``rows`` divide; what is left over splits tokens, as far as heads divide.

    Raises UserError when no division works, saying which number does not divide. ``heads`` is None for networks whose
    tokens cannot be split.
    """
    most = max(n for n in range(1, chips + 1) if chips % n == 0 and rows % n == 0)
    context = chips // most
    if context > 1 and (heads is None or heads % context):
        what = (
            "examples cannot be split further" if heads is None else f"{heads} heads do not divide by context={context}"
        )
        raise UserError(
            f"a batch of {rows} rows for {chips} chips: fsdp={most} leaves {context} for axis context, and {what}; "
            f"use a batch of a multiple of {chips} rows, or fewer chips"
        )
    return MeshConfig(data=1, fsdp=most, context=context)


def rows_of(recipe_config: Any, columns: int) -> int:
    """Rows that data axes divide: examples over columns, in the smallest pass."""
    return recipe_config.batch // columns // getattr(recipe_config, "microbatches", 1)
