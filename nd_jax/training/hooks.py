"""The constraints that keep the compiler honest inside a network (see ``nd_jax.models.hooks``).

Without them it splits matrix products in ways nobody asked for and moves twice the bytes.
"""

from __future__ import annotations

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from nd_jax.models.hooks import ShardingHooks
from nd_jax.training.mesh import batch_entry, check_batch
from nd_jax.training.sharding import DEFAULT_RULES, Rules, largest_free


def sharding_hooks(mesh: Mesh, rules: Rules = DEFAULT_RULES) -> ShardingHooks:
    """Hooks for networks trained on ``mesh``; the identity on a single device.

    Activations are split over examples (axis 0) and nothing else. Weights, already in the compute dtype, are gathered
    whole where a layer reads them; their gradients go straight back to fsdp slices (a reduce-scatter, where plain
    constraints would ask for an all-reduce). Raises ``UserError`` while tracing when axis 0 does not divide.
    """
    if mesh.size == 1:
        return ShardingHooks()

    def activation(x: jax.Array, name: str) -> jax.Array:
        if x.shape[0] == 1:
            return x
        check_batch(f"activation {name!r}", x.shape, mesh)
        spec = P(batch_entry(mesh), *(None,) * (x.ndim - 1))
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

    @jax.custom_vjp
    def gather(w: jax.Array) -> jax.Array:
        return jax.lax.with_sharding_constraint(w, NamedSharding(mesh, P()))

    def forward(w: jax.Array) -> tuple[jax.Array, None]:
        return gather(w), None

    def backward(_: None, grad: jax.Array) -> tuple[jax.Array]:
        entries: list = [None] * grad.ndim
        dim = largest_free(grad.shape, entries, mesh, rules.minimum) if grad.ndim > 1 else None  # vectors stay whole
        if dim is not None:
            entries[dim] = "fsdp"
        return (jax.lax.with_sharding_constraint(grad, NamedSharding(mesh, P(*entries))),)

    gather.defvjp(forward, backward)
    return ShardingHooks(activation=activation, weights=gather)
