"""Repeated blocks as one module whose arrays carry a leading layer axis, run by ``lax.scan``.

The depth is read from the arrays, so a network with fewer blocks shares its code with the full one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Int

from nd_jax.models.hooks import NO_HOOKS, ShardingHooks


def stack(build: Callable[[nnx.Rngs], nnx.Module], depth: int, rngs: nnx.Rngs) -> nnx.Module:
    """``depth`` independently initialised copies of ``build(rngs)``, every array with a leading axis of that size."""

    @nnx.split_rngs(splits=depth)
    @nnx.vmap(in_axes=(0,), out_axes=0, transform_metadata={nnx.PARTITION_NAME: "layers"})
    def make(keys: nnx.Rngs) -> nnx.Module:
        return build(keys)

    return make(rngs)


def _flat(state: Any) -> list:
    return list(nnx.to_flat_state(state))


def scan_stack(
    blocks: nnx.Module,
    step: Callable[[nnx.Module, Any], tuple[Any, Any]],
    carry: Any,
    *,
    remat: bool = False,
    hooks: ShardingHooks = NO_HOOKS,
    dtype: DTypeLike | None = None,
) -> tuple[Any, Any]:
    """Run ``carry, out = step(block, carry)`` over the layer axis.

    Args:
        blocks: a module made by ``stack``.
        step: one layer; the block it gets has no layer axis.
        carry: what flows from layer to layer.
        remat: recompute each layer in the backward pass instead of keeping what is inside it.
        hooks: each layer's weights pass through it, kernels in ``dtype``, and so do its activations, as "prompts".
        dtype: what the layers cast their kernels to anyway.

    Returns:
        The last carry, and every layer's ``out`` stacked on a leading axis.
    """
    graphdef, state = nnx.split(blocks)

    def body(carry: Any, layer: Any) -> tuple[Any, Any]:
        if hooks.activation is not None:
            carry = jax.tree.map(lambda x: hooks.constrain(x, "prompts"), carry)
        if hooks.weights is not None:
            layer = nnx.from_flat_state([(path, leaf.replace(ready(path, leaf))) for path, leaf in _flat(layer)])
        return step(nnx.merge(graphdef, layer), carry)

    def ready(path: tuple, leaf: Any) -> jax.Array:
        w = leaf.get_value()
        return hooks.gather(w.astype(dtype or w.dtype) if path[-1] == "kernel" else w, "/".join(map(str, path)))

    return jax.lax.scan(jax.checkpoint(body) if remat else body, carry, state)


def run_chosen(
    step: Callable[[Any, Int[Array, ""]], tuple[Any, Any]],
    carry: Any,
    kept: Int[Array, " k"],
    known: tuple[Int[Array, " k"], Any],
    same: Bool[Array, " k"] | bool = True,
) -> tuple[Any, tuple[Int[Array, " k"], Any]]:
    """The carry after the layers ``kept``, a list that -1 may fill up at its end; and what is known then.

    ``step(carry, layer) -> (carry, out)`` runs a layer by its number. ``known`` is another such list, and the carry
    after each place of it on a leading axis: as long as the lists agree (and ``same`` says that nothing else changed),
    nothing has to run.
    """
    before, states = known
    shared = jnp.sum(jnp.cumprod((kept == before) & (kept >= 0) & same))

    def enter(first: Array, after: Array) -> Array:
        last = jax.lax.dynamic_index_in_dim(after, jnp.maximum(shared - 1, 0), keepdims=False)
        return jnp.where(shared > 0, last, first)

    def run(place: Array, both: tuple[Any, Any]) -> tuple[Any, Any]:
        carry, states = both
        carry, _ = step(carry, kept[place])
        write = jax.lax.dynamic_update_index_in_dim
        return carry, jax.tree.map(lambda after, x: write(after, x, place, 0), states, carry)

    carry = jax.tree.map(enter, carry, states)
    carry, states = jax.lax.fori_loop(shared, jnp.sum(kept >= 0), run, (carry, states))
    return carry, (kept, states)
