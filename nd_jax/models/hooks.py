"""Where training hangs its sharding constraints, so that the networks need not know about meshes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax


@dataclass(frozen=True)
class ShardingHooks:
    """Two optional functions that a network calls at fixed points; both default to the identity.

    ``activation(x, name)`` constrains activations at block boundaries, with a name such as ``"image"`` ([B, L, D])
    or ``"text"`` ([B, S, D]). ``weights(w)`` receives one layer's weight, kernels already in the compute dtype, inside
    the scan body, and typically gathers it: the wire then carries bf16 and only one layer is whole at a time. It may
    change the sharding only, by a sharding constraint, reshard or all-gather; what these make is never kept for the
    backward pass.
    """

    activation: Callable[[jax.Array, str], jax.Array] | None = None
    weights: Callable[[jax.Array], jax.Array] | None = None

    def constrain(self, x: jax.Array, name: str) -> jax.Array:
        """``x`` under the constraint for activations called ``name``."""
        return x if self.activation is None else self.activation(x, name)

    def gather(self, w: jax.Array) -> jax.Array:
        """``w`` as the layer should read it."""
        return w if self.weights is None else self.weights(w)
