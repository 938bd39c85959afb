"""Repeated blocks as one module whose arrays carry a leading layer axis, run by ``lax.scan``.

The depth is read from the arrays, so a network with fewer blocks shares its code with the full one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx


def stack(build: Callable[[nnx.Rngs], nnx.Module], depth: int, rngs: nnx.Rngs) -> nnx.Module:
    """``depth`` independently initialised copies of ``build(rngs)``, every array with a leading axis of that size."""

    @nnx.split_rngs(splits=depth)
    @nnx.vmap(in_axes=(0,), out_axes=0, transform_metadata={nnx.PARTITION_NAME: "layers"})
    def make(keys: nnx.Rngs) -> nnx.Module:
        return build(keys)

    return make(rngs)


def scan_stack(
    blocks: nnx.Module, step: Callable[[nnx.Module, Any], tuple[Any, Any]], carry: Any, *, remat: bool = False
) -> tuple[Any, Any]:
    """Run ``carry, out = step(block, carry)`` over the layer axis.

    Args:
        blocks: a module made by ``stack``.
        step: one layer; the block it gets has no layer axis.
        carry: what flows from layer to layer.
        remat: recompute each layer in the backward pass instead of keeping what is inside it.

    Returns:
        The last carry, and every layer's ``out`` stacked on a leading axis.
    """
    graphdef, state = nnx.split(blocks)

    def body(carry: Any, layer: Any) -> tuple[Any, Any]:
        return step(nnx.merge(graphdef, layer), carry)

    return jax.lax.scan(jax.checkpoint(body) if remat else body, carry, state)
