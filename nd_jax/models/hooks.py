"""Where training hangs its sharding constraints, so that the networks need not know about meshes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax


@dataclass(frozen=True)
class ShardingHooks:
    """Two optional functions that a network calls at fixed points; both default to the identity.

    ``activation(x, name)`` constrains activations: ``"image"`` [B, L, D] and ``"text"`` [B, S, D] at block boundaries,
    ``"heads"`` [B, L, H, K] (queries, keys and values before attention) and ``"seen"`` [B, L, D] (after it), and
    ``"prompts"`` [N, S, D] in text encoders.
    ``weights(w, name)`` receives one layer's weight, kernels already in the compute dtype, inside the scan body, with
    its path inside the layer (``"attn/to_q/kernel"``), and typically gathers it: the wire then carries bf16 and only
    one layer is whole at a time. It may change the sharding only, by a sharding constraint, reshard or all-gather; what
    these make is never kept for the backward pass.
    """

    activation: Callable[[jax.Array, str], jax.Array] | None = None
    weights: Callable[[jax.Array, str], jax.Array] | None = None
    attention: Callable[..., jax.Array] | None = None
    """Takes the place of dense attention where every token's time is known before compiling: ``attention(q, k, v,
    times, asking, segments)`` as ``splash.splash_attention``."""

    def constrain(self, x: jax.Array, name: str) -> jax.Array:
        """``x`` under the constraint for activations called ``name``."""
        return x if self.activation is None else self.activation(x, name)

    def gather(self, w: jax.Array, name: str = "") -> jax.Array:
        """``w`` as the layer should read it; ``name`` is its path inside the layer."""
        return w if self.weights is None else self.weights(w, name)


NO_HOOKS = ShardingHooks()
"""The identity everywhere."""
